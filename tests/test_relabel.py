"`relabel` on every source of DataLoaders: what changes, what stays, what is refused, and training that goes on."
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.utils.data as td
from fastai.callback.data import WeightedDL
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, IndexSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.tabular.core import Normalize, TabularPandas
from fastai.text.data import TextBlock
from fastai.vision.data import ImageBlock
from fasttransform import Transform
from PIL import Image
from torch import nn

from conftest import Look, Stop, blob_learner, blobs
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock, class_names, targets_of
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.record import item_names
from fastai_lp.learner.relabel import relabel
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.learner.streams import TwoStream, semi_dls
from fastai_lp.transductive.ensemble import Ensemble

E = pytest.raises
LOAD = dict(bs=4, num_workers=0, device='cpu')


# Sources. Each has the classes cat and dog, labels in validation, and unlabeled items in training

def pictures(root):
    rng = np.random.default_rng(0)
    for name in ['train/cat/0.png', 'train/dog/1.png', 'valid/cat/2.png', 'valid/dog/3.png', *(f'unsup/{i}.png' for i in range(4, 10))]:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype('uint8')).save(root/name)
    return root


def table(root):
    names = sorted(str(o.relative_to(root)) for o in pictures(root).rglob('*.png'))
    df = pd.DataFrame(dict(name=names, x=np.arange(10.), text=[f'text number {i}' for i in range(10)]))
    df['label'] = [None if o.startswith('unsup') else o.split('/')[1] for o in names]
    return df.assign(valid=df.name.str.startswith('valid'))


def folder(root): return SemiImageDataLoaders.from_folder(pictures(root), **LOAD)
def from_df(root): return SemiImageDataLoaders.from_df(table(root), root, label_col='label', valid_col='valid', **LOAD)


def from_csv(root):
    table(root).to_csv(root/'data.csv', index=False)
    return SemiImageDataLoaders.from_csv(root, 'data.csv', label_col='label', valid_pct=.5, seed=0, **LOAD)


def from_lists(root):
    df = table(root)
    return SemiImageDataLoaders.from_lists(root, df.name.tolist(), df.label.tolist(), valid_pct=.5, seed=0, **LOAD)


def block(root, target, one_stream=False, unlabeled=True):
    files = get_image_files(pictures(root)).sorted().filter(lambda o: unlabeled or 'unsup' not in o.parts)
    valid = [i for i, o in enumerate(files) if 'valid' in o.parts]
    get_y = parent_label if not unlabeled else Known()
    data = DataBlock((ImageBlock, target), get_y=get_y, splitter=IndexSplitter(valid))
    return (data.dataloaders if one_stream else data.semi_dataloaders)(files, **LOAD | dict(drop_last=False))


class Known:
    def __call__(self, o): return None if 'unsup' in o.parts else parent_label(o)


def semi_block(root): return block(root, SemiCategoryBlock)
def one_stream(root): return block(root, SemiCategoryBlock, True)
def around(root): return semi_dls(block(root, SemiCategoryBlock, True))
def fastai_block(root): return block(root, CategoryBlock, True, unlabeled=False)


def tabular(root, index=None):
    df = table(root)
    if index is not None: df = df.set_index(pd.Index(index))
    splits = [np.flatnonzero(~df.valid).tolist(), np.flatnonzero(df.valid).tolist()]
    to = TabularPandas(df, [Normalize], cont_names=['x'], y_names='label', y_block=SemiCategoryBlock(), splits=splits)
    return semi_dls(to.dataloaders(**LOAD))


def text(root):
    df = table(root)
    blocks = TextBlock.from_df('text', n_workers=0, min_freq=1), SemiCategoryBlock
    data = DataBlock(blocks, get_x=ColReader('text'), get_y=ColReader('label'),
        splitter=IndexSplitter(np.flatnonzero(df.valid).tolist()))
    return data.semi_dataloaders(df, **LOAD)


class Plain:
    def __init__(self, y): self.y = y
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return torch.full((8,), float(i)), self.y[i]


def plain(kind, make):
    y = [0, 1, -100, -100, -100, -100, -100, -100]
    dls = DataLoaders(*(kind(make(o), batch_size=4, shuffle=shuffle) for o, shuffle in ((y, True), ([0, 1], False))))
    dls.vocab, dls.c = ['cat', 'dog'], 2
    return dls


def tensors(y): return td.TensorDataset(torch.arange(len(y)).float()[:, None].repeat(1, 8), torch.tensor(y))
def torch_plain(root): return plain(td.DataLoader, Plain)
def torch_tensors(root): return plain(td.DataLoader, tensors)
def torch_subset(root): return plain(td.DataLoader, lambda y: td.Subset(tensors(y), range(len(y))))
def torch_two_stream(root): return semi_dls(plain(td.DataLoader, Plain))


SOURCES = [folder, from_df, from_csv, from_lists, semi_block, one_stream, around, fastai_block, tabular, text, torch_plain, torch_tensors,
    torch_subset, torch_two_stream]
each_source = pytest.mark.parametrize('make', SOURCES, ids=lambda o: o.__name__)


def names_of(dls):
    names = item_names(dls.train)
    return list(range(len(dls.train.dataset))) if names is None else names.tolist()


def targets(dls): return [targets_of(o).tolist() for o in dls.loaders]


def one_epoch(dl):
    "The targets of the batches, without two streams"
    if isinstance(dl, DataLoader): dl = dl.new(shuffle=False, drop_last=False)
    return torch.cat([b[-1].flatten().clamp(min=-1) for b in dl]).tolist()


def state(dls): return [(type(o).__name__, len(o.dataset), getattr(o, 'bs', None) or o.batch_size, o.drop_last) for o in dls.loaders]


@each_source
def test_new_corrected_and_removed_labels(make, tmp_path):
    dls = make(tmp_path)
    names, before = names_of(dls), targets(dls)
    y = before[0]
    first, second = (y.index(c) for c in (0, 1))
    free = [i for i, o in enumerate(y) if o < 0][:2]
    changes = {first: 'dog'} | dict(zip(free, ['dog', 'cat']))
    if make is not fastai_block: changes[second] = ''
    new = relabel(dls, {names[i]: o for i, o in changes.items()})
    expected = list(y)
    for i, o in changes.items(): expected[i] = {'cat': 0, 'dog': 1, '': -1}[o]
    assert targets(new) == [expected, before[1]]
    assert targets(dls) == before
    assert new.loaders[1:] == dls.loaders[1:]
    assert state(new) == state(dls)
    assert list(class_names(new)) == ['cat', 'dog'] and type(new) is type(dls)
    if isinstance(new.train, TwoStream): assert new.train.targets.tolist() == expected
    back = relabel(new, {names[i]: '' if y[i] < 0 else ['cat', 'dog'][y[i]] for i in changes})
    assert targets(back) == before


@each_source
def test_batches_have_the_new_labels(make, tmp_path):
    dls = make(tmp_path)
    new = relabel(dls, {names_of(dls)[-1]: 'dog', names_of(dls)[0]: 'dog'})
    assert sorted(one_epoch(new.train)) == sorted(targets(new)[0]) != sorted(one_epoch(dls.train))


@pytest.mark.parametrize('make', [folder, fastai_block, tabular, text], ids=lambda o: o.__name__)
def test_fastai_shows_and_decodes_as_before(make, tmp_path):
    dls = make(tmp_path)
    names, y = names_of(dls), targets(dls)[0]
    last = y.index(1)
    new = relabel(dls, {names[last]: ''})
    if make is not text: new.show_batch()
    if make is tabular: return
    assert new.train_ds.decode(new.train_ds[last])[-1] == '?'
    assert [str(o[-1]) for o in map(new.train_ds.decode, new.train_ds[:2])] == [['cat', 'dog', '?'][o] for o in (targets(new)[0][:2])]


# Reading labels

def csv_file(tmp_path, text, encoding='utf-8'):
    file = tmp_path/'labels.csv'
    file.write_bytes(text.encode(encoding, 'surrogateescape'))
    return file


def test_names_in_a_csv_file_stay_what_they_are(tmp_path):
    items = ['NA', 'nan', '001', '=x', 'a,b', ' ', '猫', '\udcff', '<b>', 'two\nlines', 'q"q']
    classes = ['null', 'NA', '=c']
    dsets = Datasets(items + classes, [[Own(items + classes)], [Own(classes), SemiCategorize()]])
    dls = DataLoaders(dsets.dataloaders(bs=2, device='cpu').train)
    labels = dict(zip(items, classes*4))
    df = pd.DataFrame(dict(item=labels.keys(), label=labels.values()))
    df.to_csv(tmp_path/'labels.csv', index=False, errors='surrogateescape', encoding='utf-8-sig', lineterminator='\r\n')
    given = relabel(dls, tmp_path/'labels.csv').train_ds
    assert [str(given.decode(given[i])[-1]) for i in range(len(items))] == list(labels.values())


class Own:
    "The item itself, or None if it is not among these"
    def __init__(self, classes): self.classes = classes
    def __call__(self, o): return o if o in self.classes else None


@pytest.mark.parametrize('text, encoding, match', [
    ('', 'utf-8', 'is empty'),
    ('item,label\n', 'utf-8', 'there are no labels'),
    ('name,label\nx,cat\n', 'utf-8', r"has the columns \['name', 'label'\], expected item and label"),
    ('item,label\na,b,cat\n', 'utf-8', 'line 2 of .* has 3 columns, expected 2'),
    ('item,label\nx,cat\n', 'utf-16', 'has the columns'),
])
def test_files_that_are_no_labels(tmp_path, text, encoding, match):
    with E(ValueError, match=match): relabel(torch_plain(tmp_path), csv_file(tmp_path, text, encoding))


def test_other_arguments_that_are_no_labels(tmp_path):
    dls = torch_plain(tmp_path)
    with E(ValueError, match='labels is a list'): relabel(dls, [('x', 'cat')])
    with E(ValueError, match='dls is a DataLoader, expected DataLoaders'): relabel(dls.train, {})


def test_items_by_full_and_relative_path(tmp_path, monkeypatch):
    dls = folder(tmp_path)
    paths = [f'{tmp_path}/unsup/4.png', 'unsup/5.png', Path('unsup/6.png'), 'unsup\\7.png', './unsup/8.png']
    y = dict(zip(names_of(dls), targets(relabel(dls, dict.fromkeys(paths, 'dog')))[0]))
    assert [y[f'{tmp_path}/unsup/{i}.png'] for i in range(4, 10)] == [1]*5 + [-1]
    monkeypatch.chdir(tmp_path)
    relative = SemiImageDataLoaders.from_folder('.', **LOAD)
    assert sorted(targets(relabel(relative, {f'{tmp_path}/unsup/4.png': 'cat', 'unsup/5.png': 'dog'}))[0]) == [-1]*4 + [0, 0, 1, 1]


def test_all_rows_of_a_file(tmp_path):
    df = table(tmp_path)
    dls = SemiImageDataLoaders.from_df(pd.concat([df, df]), tmp_path, label_col='label', valid_col='valid', **LOAD)
    new = relabel(dls, {'unsup/4.png': 'dog'})
    assert [o for o, y in zip(names_of(new), targets(new)[0]) if y == 1 and 'unsup' in o] == [f'{tmp_path}/unsup/4.png']*2


def test_rows_of_a_table_by_index(tmp_path):
    dls = tabular(tmp_path, index=[f'row {i}' for i in range(10)])
    names = names_of(dls)
    free = targets(dls)[0].index(-1)
    assert targets(relabel(dls, {names[free]: 'dog'}))[0][free] == 1
    dls = tabular(tmp_path)
    name = names_of(dls)[free]
    for given in (name, str(name), float(name)): assert targets(relabel(dls, pd.Series({given: 'dog'})))[0][free] == 1
    with E(ValueError, match='10|2 rows of the table have the index'): relabel(tabular(tmp_path, [0]*2 + list(range(1, 9))), {0: 'dog'})


# Errors name what they are about, and nothing is changed (see also test_faults.py)

@pytest.mark.parametrize('labels, match', [
    ({'unsup/4.png': 'cat', './unsup/4.png': 'dog'}, "different labels for the item .*4.png': 'cat' and 'dog'. Keep"),
    ({'unsup/4.png': 'cat', './unsup/4.png': ''}, "'cat' and ''"),
    ({f'unsup/{i}.png': 'cat' for i in range(4, 10)}, 'all 8 training items are labeled'),
    ({'train/cat/0.png': '', 'train/dog/1.png': None}, 'none of the 8 training items is labeled'),
])
def test_refused(tmp_path, labels, match):
    dls = folder(tmp_path)
    before = targets(dls)
    with E(ValueError, match=match): relabel(dls, labels)
    assert targets(dls) == before


# Classes

@pytest.mark.parametrize('make', [folder, text, tabular, torch_plain], ids=lambda o: o.__name__)
def test_new_classes_are_appended(make, tmp_path):
    dls = make(tmp_path)
    names, before = names_of(dls), targets(dls)
    a, b = [i for i, o in enumerate(before[0]) if o < 0][:2]
    with pytest.warns(UserWarning, match="'ape', 'owl' became classes of the data, which has 4 classes now.*Make a new Learner"):
        new = relabel(dls, {names[a]: 'owl', names[b]: 'ape'}, add_classes=True)
    assert list(class_names(new)) == ['cat', 'dog', 'ape', 'owl'] and new.c == 4
    assert [targets(new)[0][i] for i in (a, b)] == [3, 2]
    assert targets(new)[1] == before[1]
    assert list(class_names(dls)) == ['cat', 'dog'] and dls.c == 2
    if make is not torch_plain: assert list(class_names(new.valid)) == ['cat', 'dog', 'ape', 'owl']
    if make is tabular: assert new.train.after_batch.fs[0].to.vocab[3] == new.train_ds.iloc[[a]].decode().items.label.item() == 'owl'
    assert targets(relabel(new, {names[a]: 'ape'}))[0][a] == 2


def test_new_classes_without_validation(tmp_path):
    df = table(tmp_path)
    dls = SemiImageDataLoaders.from_df(df[~df.valid], tmp_path, label_col='label', valid_pct=0, **LOAD)
    with pytest.warns(UserWarning): new = relabel(dls, {'unsup/4.png': 'owl'}, add_classes=True)
    assert list(new.vocab) == ['cat', 'dog', 'owl'] and len(new.valid_ds) == 0


def test_classes_that_are_numbers(tmp_path):
    df = table(tmp_path)
    df['label'] = df.label.map({'cat': 3, 'dog': 7})
    dls = SemiImageDataLoaders.from_df(df, tmp_path, label_col='label', valid_col='valid', **LOAD)
    names = names_of(dls)
    free = [i for i, o in enumerate(targets(dls)[0]) if o < 0]
    labels = [7, '7', 7., np.int64(3)]
    assert [targets(relabel(dls, dict(zip([names[i] for i in free], labels))))[0][i] for i in free[:4]] == [1, 1, 1, 0]
    with pytest.warns(UserWarning): new = relabel(dls, {names[free[0]]: '12'}, add_classes=True)
    assert list(new.vocab) == [3, 7, 12]
    with E(ValueError, match='mixed types'): relabel(dls, {names[free[0]]: 'owl'}, add_classes=True)


def test_data_without_class_names(tmp_path):
    dls = torch_plain(tmp_path)
    del dls.vocab
    assert targets(relabel(dls, {0: '', 2: 1, 3: '0', 1: -1}))[0][:5] == [-1, -1, 1, 0, -1]
    with E(ValueError, match='has no class names to which .* numbers 0 to 1'): relabel(dls, {2: 2}, add_classes=True)


# Training goes on

def given(learn, n=3): return {int(o): learn.dls.vocab[0] for o in range(60, 60+n)}


def test_training_goes_on(tmp_path):
    learn = blob_learner(path=tmp_path)
    cb = LPCallback(every=5)
    learn.add_cb(cb)
    learn.fit(1, 1e-2)
    first = learn.lp_record.pseudo
    learn.dls = relabel(learn.dls, given(learn))
    learn.fit(1, 1e-2)
    p = learn.lp_record.pseudo
    assert first.labeled.sum() == 9 and p.labeled.sum() == 12, 'not renewed although it is not due by every='
    assert p.labels[60:63].tolist() == [0]*3
    assert LPInterpretation.from_learner(learn).to_df().labeled.sum() == 12


@pytest.mark.parametrize('label', [1, 3])
def test_an_exported_learner_reads_new_items(tmp_path, label):
    learn = blob_learner(path=tmp_path)
    with warnings.catch_warnings(action='ignore'): learn.dls = relabel(learn.dls, {60: label}, add_classes=True)
    learn.export('model.pkl')
    with warnings.catch_warnings(action='ignore'): loaded = load_learner(tmp_path/'model.pkl')
    assert list(loaded.dls.vocab) == list(learn.dls.vocab) == list(range(max(3, label+1)))
    test = loaded.dls.test_dl([0, 1, 2, 60], with_labels=True)
    assert targets_of(test).tolist() == [0, 1, 2, -1], 'items that come later have the labels of their source'


def test_decoded_images_of_other_labels_are_not_used(tmp_path):
    learn = Learner(folder(tmp_path), nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)))
    cb = LPCallback(k=2, cache=2**20)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=cb)
    learn.dls = relabel(learn.dls, {'train/cat/0.png': 'dog', 'train/dog/1.png': 'cat', 'unsup/4.png': 'dog'})
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=cb)
    assert cb.cache.dataset is learn.dls.train_ds
    assert cb.record.pseudo.labeled.sum() == 3


def test_settings_of_the_data_are_kept():
    data = blobs()
    dsets = Datasets(range(150), [[Look(data.x)], [Look(data.labels), SemiCategorize()]], splits=[list(range(120)), list(range(120, 150))])
    dls = dsets.dataloaders(bs=16, num_workers=0, dl_type=WeightedDL, dl_kwargs=[dict(wgts=np.arange(120) % 2), {}])
    dls.train.note = 'mine'
    for o in (dls, semi_dls(dls, labeled_bs=5)):
        new = relabel(o, {60: 1})
        assert all(i % 2 for i in new.train.get_idxs()) and new.train.note == 'mine'
    assert new.train.labeled_bs == 5


def test_ensemble_looks_again():
    learn, cb = blob_learner(), LPCallback(Ensemble())
    learn.fit(1, cbs=cb)
    learn.dls = relabel(learn.dls, given(learn))
    learn.fit(1, cbs=cb)
    data, y, _ = cb._view
    assert data is learn.dls.train_ds and (y >= 0).sum() == 12


def test_an_interrupted_fit_is_not_resumed_with_other_labels(tmp_path):
    learn = blob_learner()
    def cbs(): return [LPCallback(), ResumeCallback(tmp_path/'r.pth')]
    with E(KeyboardInterrupt): learn.fit(3, cbs=[*cbs(), Stop('after_batch', 2)])
    learn.dls = relabel(learn.dls, given(learn))
    with E(ValueError, match='labels'): learn.fit(3, cbs=cbs())


class Table(Transform):
    def encodes(self, o): return dict(a='cat', b='dog').get(o)


def test_pickle():
    dls = Datasets(['a', 'b', 'c'], [[], [Table(), SemiCategorize()]]).dataloaders(bs=2, device='cpu')
    assert targets_of(pickle.loads(pickle.dumps(relabel(dls, dict(c='cat')))).train).tolist() == [0, 1, 0]


def test_workers(tmp_path):
    dls = SemiImageDataLoaders.from_folder(pictures(tmp_path), **LOAD | dict(num_workers=2))
    new = relabel(dls, {'unsup/4.png': 'dog'})
    assert new.train.fake_l.num_workers == 2
    assert one_epoch(new.train) == targets(new)[0]
