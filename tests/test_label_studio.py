"Tasks for Label Studio, and its exports as its documentation shows them."
import json
import xml.etree.ElementTree as ET
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.core import Datasets
from fastai.data.transforms import ColReader, IndexSplitter
from fastai.tabular.core import Normalize, TabularPandas
from fastai.text.data import TextBlock

from fastai_lp.interpret import LPInterpretation
from fastai_lp.label_studio import labeling_config, labels_from_label_studio
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock, targets_of
from fastai_lp.learner.relabel import relabel
from fastai_lp.transductive.propagate import propagate

E = pytest.raises
VOCAB = ['cat', '<img src=x onerror="alert(1)">']


def interp_of(items=None, dl=None, vocab=VOCAB):
    "Items 0 and 2 are labeled"
    x = torch.tensor([[1., 0], [1, .1], [0, 1], [.1, 1]])
    return LPInterpretation(propagate(x, torch.tensor([0, -1, 1, -1]), k=2), items=items, vocab=vocab, dl=dl)


def tasks_of(interp, folder, *args, **kwargs): return json.loads(interp.to_label_studio(folder/'tasks.json', *args, **kwargs).read_text())


# Tasks

FILES = ['/d/pets/a.jpg', '/d/pets/b & c?.jpg', '/d/pets/x/d.png', '/d/pets/猫.jpeg']


def test_tasks_have_predictions_with_scores(tmp_path):
    interp = interp_of(FILES)
    tasks = tasks_of(interp, tmp_path, [1, 2])
    df = interp.to_df()
    assert [o['data']['item'] for o in tasks] == FILES[1:3]
    for task, i in zip(tasks, (1, 2)):
        prediction, = task['predictions']
        result, = prediction['result']
        assert prediction['score'] == df.certainty[i] and prediction['model_version']
        assert {k: result[k] for k in ('type', 'from_name', 'to_name')} == dict(type='choices', from_name='label', to_name='item')
        assert result['value'] == dict(choices=[df.label[i]])


def test_only_unlabeled_items_by_default(tmp_path): assert [o['data']['item'] for o in tasks_of(interp_of(FILES), tmp_path)] == FILES[1::2]


def test_configuration_fits_the_tasks(tmp_path):
    result = tasks_of(interp_of(FILES), tmp_path)[0]['predictions'][0]['result'][0]
    config = ET.parse(tmp_path/'tasks.xml').getroot()
    shown, choices = config
    assert (shown.tag, shown.get('name'), shown.get('value')) == ('Image', result['to_name'], '$image')
    assert choices.attrib | dict(name=result['from_name'], toName=result['to_name'], choice='single') == choices.attrib
    assert [o.get('value') for o in choices] == VOCAB


@pytest.mark.parametrize('name', ['a\x00b', '\udcff', '\x0b'])
def test_classes_that_xml_cannot_hold(name):
    with E(ValueError, match='has a character that XML does not allow: rename'): labeling_config([name])


@pytest.mark.parametrize('root, expected', [(None, 'pets/b & c?.jpg'), ('/d/pets', 'b & c?.jpg'), ('/', 'd/pets/b & c?.jpg')])
def test_images_are_relative_to_the_document_root(tmp_path, root, expected):
    url = tasks_of(interp_of(FILES), tmp_path, root=root)[0]['data']['image']
    assert '&' not in url and unquote(url) == f'/data/local-files/?d={expected}'


def test_images_outside_the_document_root(tmp_path):
    with E(ValueError, match=r"/d/pets/b & c\?.jpg is not in the folder /d/pets/x"): tasks_of(interp_of(FILES), tmp_path, root='/d/pets/x')
    assert not list(tmp_path.iterdir())


def test_texts(tmp_path):
    assert [o['data'] for o in tasks_of(interp_of(list('abcd')), tmp_path)] == [dict(item=o, text=o) for o in 'bd']
    assert ET.parse(tmp_path/'tasks.xml').getroot()[0].tag == 'Text'


def test_texts_in_files(tmp_path):
    files = [tmp_path/f'{o}.txt' for o in 'abcd']
    for o in files: o.write_text(f'xxbos xxmaj the text\nof {o.stem}')
    assert [o['data']['text'] for o in tasks_of(interp_of(list(map(str, files))), tmp_path)] == ['the text\nof b', 'the text\nof d']


def test_table_rows_are_text_without_their_label(tmp_path):
    df = pd.DataFrame(dict(size=[1., 2, 3, 4], note=['p', '<b>', 'r', 's'], label=['cat', None, 'dog', None]), index=[5, 6, 7, 8])
    dl = Datasets(df, [[ColReader('size')], [ColReader('label'), SemiCategorize()]]).dataloaders(bs=2, device='cpu').train
    tasks = tasks_of(interp_of(df.index.tolist(), dl), tmp_path)
    assert [o['data'] for o in tasks] == [dict(item=6, text='size: 2.0\nnote: <b>'), dict(item=8, text='size: 4.0\nnote: s')]
    to = TabularPandas(df, [Normalize], cont_names=['size'], y_names='label', y_block=SemiCategoryBlock())
    tasks = tasks_of(interp_of(df.index.tolist(), to.dataloaders(bs=2, device='cpu').train), tmp_path)
    assert [float(o['data']['text']) for o in tasks] == [pytest.approx(2), pytest.approx(4)]


def test_tokenized_texts_are_readable(tmp_path):
    df = pd.DataFrame(dict(text=[f'The text {i}' for i in 'abcd'], label=['cat', None, 'dog', None]))
    block = DataBlock((TextBlock.from_df('text', n_workers=0, min_freq=1), SemiCategoryBlock), get_x=ColReader('text'),
        get_y=ColReader('label'), splitter=IndexSplitter([]))
    dl = block.dataloaders(df, bs=2, device='cpu').train
    assert tasks_of(interp_of(dl=dl), tmp_path)[0]['data'] == dict(item=1, text='the text b')


def test_items_that_label_studio_cannot_show(tmp_path):
    with E(ValueError, match='Write the images to files'): interp_of().to_label_studio(tmp_path/'t.json')
    with E(ValueError, match='a name that ends in .json, got t.txt'): interp_of(FILES).to_label_studio(tmp_path/'t.txt')


def test_items_without_a_pseudo_label_have_no_prediction(tmp_path):
    x = torch.eye(4)
    interp = LPInterpretation(propagate(x, torch.tensor([0, 1, -1, -1]), k=1), items=list('abcd'), vocab=VOCAB)
    assert not interp.pseudo.reached.all()
    assert [o['predictions'] for o in tasks_of(interp, tmp_path, [3])] == [[]]


# Exports

def annotation(choices, user=1, time='2021-03-09T22:16:08.728353Z', cancelled=False, name='label'):
    result = dict(value=dict(choices=choices), id='Dx_aB91ISN', from_name=name, to_name='item', type='choices', origin='manual')
    return dict(id=1001, completed_by=user, result=[result] if choices else [], was_cancelled=cancelled, ground_truth=False,
        created_at='2021-03-01T00:00:00Z', updated_at=time, lead_time=4.3, task=1, parent_prediction=None)


def task(item, *annotations, i=1):
    data = item if isinstance(item, dict) else dict(item=item, text=item)
    return dict(id=i, annotations=list(annotations), file_upload='tasks.json', drafts=[], predictions=[], data=data, meta={},
        created_at='2021-03-01T00:00:00Z', inner_id=i, project=83)


def record(item, label, user=1, time='2021-03-09T22:16:08Z', i=1):
    return dict(item=item, text=item, id=i, label=label, annotator=user, annotation_id=i, created_at=time, updated_at=time, lead_time=4.3)


@pytest.fixture
def read(tmp_path):
    def f(tasks, **kwargs):
        (tmp_path/'export.json').write_text(json.dumps(tasks), encoding='utf-8')
        return labels_from_label_studio(tmp_path/'export.json', **kwargs)
    return f


def test_json(read):
    other = annotation(['猫'], user=dict(id=2, email='x@y.z'))
    assert read([task('a', annotation(['cat'])), task('b', other), task('c')]) == dict(a='cat', b='猫')


def test_json_min(read): assert read([record('a', 'cat'), record('b', 'dog', i=2), {'item': 'c', 'id': 3}]) == dict(a='cat', b='dog')


def test_the_last_label_of_an_annotator_counts(read):
    later = '2021-03-10T00:00:00Z'
    assert read([task('a', annotation(['dog'], time=later), annotation(['cat']))]) == dict(a='dog')
    assert read([record('a', 'dog', time=later), record('a', 'cat')]) == dict(a='dog')


def test_skipped_and_empty_annotations_are_left_out(read):
    skipped = annotation(['cat'], cancelled=True)
    assert read([task('a', skipped), task('b', annotation([])), task('c', annotation(['cat']))]) == dict(c='cat')
    with E(ValueError, match="has no labels: expected choices of the tag 'label'"): read([task('a', annotation([]))])


@pytest.mark.parametrize('tasks', [[task('a', annotation(['cat', 'dog']), i=7)], [record('a', dict(choices=['cat', 'dog']), i=7)]])
def test_several_choices(read, tasks):
    with E(ValueError, match=r"several choices in one annotation: 'a' \(task 7\): 'cat', 'dog'. Choose"): read(tasks)


def test_annotators_who_disagree(read):
    with E(ValueError, match='annotators disagree'): read([record('a', 'cat'), record('a', 'dog', user=2)])


def test_tasks_that_somebody_else_made(read):
    data = dict(image='/data/local-files/?d=pets/b%20%26%20c.jpg')
    assert read([task(data, annotation(['cat'], name='animal'))]) == {'pets/b & c.jpg': 'cat'}
    assert read([dict(text='t', animal='cat')], control='animal') == dict(t='cat')
    with E(ValueError, match=r"task 1 of .* has the data \['audio'\], expected item"): read([task(dict(audio='x'), annotation(['cat']))])
    with E(ValueError, match='has choices for animal, color: pass one of these names as control='):
        read([task('a', dict(result=annotation(['cat'], name='animal')['result'] + annotation(['red'], name='color')['result']))])


@pytest.mark.parametrize('text, match', [('{"id": 1}', 'is not a list of'), ('[1]', 'is not a list of')])
def test_files_that_are_no_exports(tmp_path, text, match):
    (tmp_path/'e.json').write_text(text)
    with E(ValueError, match=match): labels_from_label_studio(tmp_path/'e.json')
    with E(FileNotFoundError, match='there is no file'): labels_from_label_studio(tmp_path/'none.json')


def test_there_and_back(tmp_path, read):
    "Tasks that are written, answered as predicted, read and given to the data"
    items = ['a', '"&<b>', '=1', 'NA']
    dsets = Datasets(items, [[Numbers(items)], [Known(), SemiCategorize(VOCAB, sort=False)]])
    dls = dsets.dataloaders(bs=2, device='cpu')
    tasks = tasks_of(interp_of(items, dls.train), tmp_path)
    for o in tasks: o['annotations'] = [dict(completed_by=1, result=o['predictions'][0]['result'])]
    assert targets_of(relabel(dls, read(tasks)).train).tolist() == [0, 0, 1, 1]


class Numbers:
    def __init__(self, items): self.items = items
    def __call__(self, o): return np.float32(self.items.index(o))


class Known:
    def __call__(self, o): return {'a': VOCAB[0], '=1': VOCAB[1]}.get(o)
