"Labeled and unlabeled images from tables, CSV files and folders."
import csv
import os
import shutil
import unicodedata
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import FuncSplitter, get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.data import ImageBlock
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategoryBlock
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.splitting import LabeledOnlySplitter
from fastai_lp.learner.streams import TwoStream, semi_dls
from fastai_lp.transductive.propagate import propagate

LOAD = dict(bs=4, num_workers=0, device='cpu', valid_pct=0)


def pictures(root, names, size=4):
    rng = np.random.default_rng(0)
    for name in names:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size, size, 3)).astype('uint8')).save(root/name)


def labels_file(root, labels, file='labels.csv', **kwargs):
    "A CSV file in which every label is followed by an unlabeled image"
    rows = [o for label in labels for o in (label, '')]
    names = [f'{i:03}.png' for i in range(len(rows))]
    pictures(root, names)
    pd.DataFrame(dict(name=names, label=rows)).to_csv(root/file, index=False, **kwargs)
    return root


def vocab_of(dls): return list(dls.vocab)


# Labels in CSV files

TEXTS = ['None', 'NA', 'null', 'n/a', 'nan', 'NULL', '#N/A', '<NA>', ' a', 'a',
    'b,c', 'say "x"', 'two\nlines', 'Öl', '1', '1.0', 'True']


@pytest.mark.parametrize('texts', [['None', 'cat'], ['NA', 'cat'], ['null', 'n/a', 'nan'], TEXTS], ids=lambda o: o[0])
def test_csv_only_an_empty_field_is_unlabeled(tmp_path, texts):
    dls = SemiImageDataLoaders.from_csv(labels_file(tmp_path, texts), **LOAD)
    assert vocab_of(dls) == sorted(texts)
    assert (dls.train.targets >= 0).tolist() == [True, False]*len(texts)
    dls.one_batch()


@pytest.mark.parametrize('labels, vocab', [(['0', '1', '2', '10'], [0, 1, 2, 10]), (['-1', '7'], [-1, 7]), (['01', '1'], ['01', '1']),
    (['1.0', '2.0', '10.0'], [1, 2, 10]), (['0.5', '2.5', '10.5'], [.5, 2.5, 10.5]), (['1', '1.0'], ['1', '1.0']),
    (['12345678901234567890123', '1'], [1, 12345678901234567890123]), (['1e3', '1000'], ['1000', '1e3']),
    (['True', 'False'], [False, True]), (['yes', 'True'], ['True', 'yes'])], ids=lambda o: str(o[0]))
def test_csv_numbers_stay_what_they_are(tmp_path, labels, vocab):
    found = vocab_of(SemiImageDataLoaders.from_csv(labels_file(tmp_path, labels), **LOAD))
    assert found == vocab
    assert [str(o) for o in found] == [str(o) for o in vocab]


def test_csv_file_names_are_read_as_text(tmp_path):
    pictures(tmp_path, [f'{i:03}.png' for i in range(4)])
    (tmp_path/'labels.csv').write_text('id,label\n000,a\n001,\n002,b\n003,\n')
    dls = SemiImageDataLoaders.from_csv(tmp_path, suff='.png', **LOAD)
    assert len(list(dls.train.new(shuffle=False))) == 1


@pytest.mark.parametrize('text, kwargs', [
    ('name,label\n000.png,a\n001.png,?\n002.png,b\n003.png,None\n', dict(csv_kwargs=dict(na_values=['?', 'None']))),
    ('# photos\nname;label\n000.png;a\n001.png;\n002.png;b\n003.png;\n', dict(delimiter=';', csv_kwargs=dict(comment='#'))),
    ("name,label\n'000.png',a\n'001.png',\n'002.png',b\n'003.png',\n", dict(csv_kwargs=dict(quotechar="'"))),
    ('name,label\n000.png,a\n001.png,NA\n002.png,b\n003.png,nan\n', dict(csv_kwargs=dict(keep_default_na=True))),
    ('000.png,a\n001.png,\n002.png,b\n003.png,\n', dict(header=None)),
    ('name,label\n000.png,a\n001.png,\n002.png,b\n003.png,\n', dict(quoting=csv.QUOTE_NONE))],
    ids=['na_values', 'comment', 'quotechar', 'keep_default_na', 'header', 'quoting'])
def test_csv_options_of_pandas(tmp_path, text, kwargs):
    pictures(tmp_path, [f'{i:03}.png' for i in range(4)])
    (tmp_path/'labels.csv').write_text(text)
    dls = SemiImageDataLoaders.from_csv(tmp_path, **LOAD, **kwargs)
    assert vocab_of(dls) == ['a', 'b']
    assert dls.train.targets.tolist() == [0, -1, 1, -1]
    dls.one_batch()


def test_csv_encoding_and_types(tmp_path):
    labels_file(tmp_path, ['Öl', 'Süß'], encoding='latin1')
    dls = SemiImageDataLoaders.from_csv(tmp_path, csv_kwargs=dict(encoding='latin1'), **LOAD)
    assert vocab_of(dls) == ['Süß', 'Öl']
    labels_file(tmp_path, ['1', '2'])
    as_text = SemiImageDataLoaders.from_csv(tmp_path, csv_kwargs=dict(dtype=dict(label=str)), **LOAD)
    assert vocab_of(as_text) == ['1', '2']


@pytest.mark.parametrize('labels', [['None', 'NA'], ['nan', ' '], ['null', 'n/a', '']], ids=str)
def test_texts_in_a_table_are_classes(tmp_path, labels):
    names = [f'{i}.png' for i in range(8)]
    pictures(tmp_path, names)
    column = labels + [None]*(8-len(labels))
    expected = sorted(set(labels)-{''})
    df = pd.DataFrame(dict(name=names, label=column))
    assert vocab_of(SemiImageDataLoaders.from_df(df, tmp_path, **LOAD)) == expected
    assert vocab_of(SemiImageDataLoaders.from_lists(tmp_path, names, column, **LOAD)) == expected


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'Int64', object])
def test_whole_numbers_in_a_table_stay_whole(tmp_path, dtype):
    names = [f'{i}.png' for i in range(8)]
    pictures(tmp_path, names)
    df = pd.DataFrame(dict(name=names, label=pd.Series([3, None, 10, None]*2, dtype=dtype)))
    dls = SemiImageDataLoaders.from_df(df, tmp_path, **LOAD)
    assert [str(o) for o in dls.vocab] == ['3', '10']
    assert dls.train.targets.tolist() == [0, -1, 1, -1]*2


def interpretation(names, vocab):
    n, c = len(names), len(vocab)
    x = torch.eye(c).repeat_interleave(n//c, 0)
    y = torch.full((n,), -1)
    y[::n//c] = torch.arange(c)
    return LPInterpretation(propagate(x, y, c, k=1), items=names, vocab=vocab)


VOCABS = TEXTS, ['None', 'cat'], ['NA', 'null', 'nan'], [0, 1, 10], [False, True], ['01', '1']


@pytest.mark.filterwarnings('ignore:pandas')
@pytest.mark.parametrize('vocab', VOCABS, ids=str)
def test_labels_written_by_an_interpretation_are_read_back(tmp_path, vocab):
    names = [f'{i:03}.png' for i in range(3*len(vocab))]
    pictures(tmp_path, names)
    interp = interpretation(names, vocab)
    interp.pseudo.labels[1] = -1
    interp.to_csv(tmp_path/'labels.csv')
    dls = SemiImageDataLoaders.from_csv(tmp_path, vocab=vocab, **LOAD)
    assert [str(dls.vocab[o]) if o >= 0 else None for o in dls.train.targets.tolist()] == \
        [None if pd.isna(o) else str(o) for o in interp.to_df().label]


@pytest.mark.parametrize('named', ['None', 'NA', 'n/a', 'nan'])
def test_writing_a_class_that_pandas_reads_as_missing_warns(tmp_path, named):
    interp = interpretation([f'{i:03}.png' for i in range(6)], ['a', named])
    with pytest.warns(UserWarning, match=f'{named!r}.*keep_default_na=False'): file = interp.to_csv(tmp_path/'a.csv')
    assert pd.read_csv(file).label.isna().any()
    assert pd.read_csv(file, keep_default_na=False, na_values=['']).label.tolist() == interp.to_df().label.tolist()


def test_writing_other_classes_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        interpretation([f'{i:03}.png' for i in range(6)], ['cat', 'No\nne']).to_csv(tmp_path/'a.csv')


# The place of an image does not change

def split_names(dls):
    "Names of the labeled images for training and for validation"
    def names(ds, idxs):
        items = ds.items.name.tolist() if hasattr(ds.items, 'iloc') else ds.items
        return {Path(items[i]).name for i in idxs}
    targets = dls.train.targets
    return names(dls.train_ds, (targets >= 0).nonzero().flatten().tolist()), names(dls.valid_ds, range(len(dls.valid_ds)))


def assert_only_adds(before, after):
    for old, new in zip(before, after): assert old <= new
    assert all(before)
    assert sum(map(len, after)) > sum(map(len, before))


@pytest.mark.parametrize('seed', [0, 1, 7])
def test_images_moved_into_class_folders_only_add(tmp_path, seed):
    names = [f'{i:03}.png' for i in range(80)]
    folders = ['unsup/some' if i >= 30 else 'train/cat' if i % 2 else 'train/dog' for i in range(80)]
    pictures(tmp_path/'a', [f'{folder}/{o}' for folder, o in zip(folders, names)])
    load = LOAD | dict(valid_pct=.3, seed=seed)
    before = split_names(SemiImageDataLoaders.from_folder(tmp_path/'a', **load))
    for i, o in enumerate(names[30:60]): (tmp_path/'a/unsup/some'/o).rename(tmp_path/('a/train/cat' if i % 3 else 'a/train/dog')/o)
    after = split_names(SemiImageDataLoaders.from_folder(tmp_path/'a', **load))
    assert_only_adds(before, after)
    (tmp_path/'a').rename(tmp_path/'moved')
    assert split_names(SemiImageDataLoaders.from_folder(tmp_path/'moved', **load)) == after


@pytest.mark.parametrize('change', [lambda df, root: df, lambda df, root: df.sample(frac=1, random_state=0), lambda df, root: df[20:],
    lambda df, root: df.assign(name=[str(root/o) for o in df.name]), lambda df, root: df.assign(name='./' + df.name)],
    ids=['same', 'shuffled', 'fewer', 'absolute', 'dot'])
def test_labels_added_to_a_table_only_add(tmp_path, change):
    names = [f'some/{i:03}.png' for i in range(80)]
    pictures(tmp_path, names)
    load = LOAD | dict(valid_pct=.3, seed=0)
    labels = ['ab'[i % 2] for i in range(80)]
    first = pd.DataFrame(dict(name=names, label=[o if 20 <= i < 50 else None for i, o in enumerate(labels)]))
    then = pd.DataFrame(dict(name=names, label=[o if i < 70 else None for i, o in enumerate(labels)]))
    before = split_names(SemiImageDataLoaders.from_df(first, tmp_path, **load))
    assert_only_adds(before, split_names(SemiImageDataLoaders.from_df(change(then, tmp_path), tmp_path, **load)))


def test_names_of_other_systems_have_the_same_place(tmp_path):
    names = [f'Größe {i}.png' for i in range(40)]
    def valid(names):
        df = pd.DataFrame(dict(name=names, label=['ab'[i % 2] for i in range(40)]))
        return LabeledOnlySplitter('label', .3, 0, name='name')(df)[1]
    expected = valid([f'x/{o}' for o in names])
    assert 4 < len(expected) < 20
    assert valid([f'x\\{o}' for o in names]) == expected
    assert valid([unicodedata.normalize('NFD', f'x/{o}') for o in names]) == expected
    def valid_files(root): return LabeledOnlySplitter(lambda o: 'a', .3, 0)([root/o for o in names])[1]
    assert valid_files(tmp_path) == valid_files(tmp_path/'moved') == valid_files(PureWindowsPath('C:/x'))


# Copies of validation images

def copied(root, copies=5, distinct=12):
    "4 labeled and 4 validation images, `distinct` unlabeled ones, and copies of validation images under other names"
    labeled = [f'{part}/{c}/{part[0]}{c}{i}.png' for part in ('train', 'valid') for c in 'ab' for i in range(2)]
    pictures(root, labeled + [f'unsup/u{i}.png' for i in range(distinct)])
    held_out = sorted((root/'valid').rglob('*.png'))
    for i in range(copies): shutil.copy(held_out[i % 4], root/f'unsup/copy{i}.png')
    return root


def table(root):
    files = sorted(root.rglob('*.png'))
    names = [o.relative_to(root).as_posix() for o in files]
    labels = [None if 'unsup' in o.parts else o.parent.name for o in files]
    return pd.DataFrame(dict(name=names, label=labels, valid=['valid' in o.parts for o in files]))


def from_csv(root):
    table(root).to_csv(root/'labels.csv', index=False)
    return SemiImageDataLoaders.from_csv(root, valid_col='valid', **COPIES)


def from_block(root):
    def get_y(o): return None if 'unsup' in o.parts else o.parent.name
    splitter = FuncSplitter(lambda o: 'valid' in o.parts)
    block = DataBlock(blocks=(ImageBlock, SemiCategoryBlock), get_items=get_image_files, get_y=get_y, splitter=splitter)
    return block.semi_dataloaders(root, bs=4, num_workers=0, device='cpu')


COPIES = dict(bs=4, num_workers=0, device='cpu')
def from_df(root): return SemiImageDataLoaders.from_df(table(root), root, valid_col='valid', **COPIES)


def absolute(root):
    df = table(root)
    return SemiImageDataLoaders.from_df(df.assign(name=f'{root}/' + df.name), valid_col='valid', **COPIES)


def from_folder(root): return SemiImageDataLoaders.from_folder(root, **COPIES)


SOURCES = dict(from_folder=from_folder, from_df=from_df, absolute=absolute, from_csv=from_csv, block=from_block)


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('copies', [1, 5])
def test_unlabeled_copies_of_validation_images_warn(tmp_path, source, copies):
    match = rf'^{copies} training images \({copies} of them unlabeled\) are copies of validation images.*copy[0-4].png'
    with pytest.warns(UserWarning, match=match): SOURCES[source](copied(tmp_path, copies))


@pytest.mark.parametrize('source', SOURCES)
def test_other_images_do_not_warn(tmp_path, source):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'copies|training')
        SOURCES[source](copied(tmp_path, 0))


def test_the_same_file_twice_in_a_table(tmp_path):
    names = [f'{i}.png' for i in range(8)]
    pictures(tmp_path, names)
    df = pd.DataFrame(dict(name=names + names[:2], label=['a', 'b']*2 + [None]*6, valid=[True]*2 + [False]*8))
    with pytest.warns(UserWarning, match='^2 training images .2 of them unlabeled.'):
        SemiImageDataLoaders.from_df(df, tmp_path, valid_col='valid', **COPIES)


def test_only_files_of_the_same_size_are_read(tmp_path, monkeypatch):
    root = copied(tmp_path, 2, 30)
    for i in range(30): (root/f'unsup/u{i}.png').write_bytes((root/f'unsup/u{i}.png').read_bytes() + b'\0'*(i+100))
    read = []
    def noted(self, *args, opened=Path.open): return read.append(self.name) or opened(self, *args)
    monkeypatch.setattr(Path, 'open', noted)
    with pytest.warns(UserWarning, match='2 training images'): SemiImageDataLoaders.from_folder(root, **COPIES)
    assert {'copy0.png', 'copy1.png'} <= set(read)
    assert not [o for o in read if o[0] == 'u']
    assert len(read) == len(set(read)), 'each file once'


@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8], ids=str)
def test_copies_among_arrays(dtype):
    rows = torch.arange(120, dtype=dtype).view(40, 1, 3)
    rows[20:23] = rows[30:33]
    y = torch.where(torch.arange(40) < 6, torch.arange(40) % 2, -100)
    y[30:] = torch.arange(10) % 2
    train, valid = TensorDataset(rows[:30], y[:30]), TensorDataset(rows[30:], y[30:])
    dls = DataLoaders(DataLoader(train, bs=8, shuffle=True, num_workers=0), DataLoader(valid, bs=8, num_workers=0))
    with pytest.warns(UserWarning, match='^3 training items .3 of them unlabeled. are copies of validation items'): semi_dls(dls)


def test_a_plain_dataloader_warns_when_the_callback_starts(tmp_path):
    with pytest.warns(UserWarning, match='copies of validation images'): dls = SOURCES['block'](copied(tmp_path))
    plain = DataLoaders(dls.train.new(shuffle=False).new(shuffle=True), dls.valid, device='cpu')
    assert not isinstance(plain.train, TwoStream)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    learn = Learner(plain, model, loss_func=CrossEntropyLossFlat())
    with pytest.warns(UserWarning, match='5 training images .5 of them'), learn.no_bar(): learn.fit(1, cbs=LPCallback())


# Tables as other programs write them

@pytest.fixture
def some(tmp_path):
    "Eight images and their table"
    names = [f'a b/{i}.png' for i in range(8)]
    pictures(tmp_path, names)
    return pd.DataFrame(dict(name=names, label=['a', 'b', None, None]*2)), tmp_path


def shape_of(dls): return tuple(dls.one_batch()[0].shape)


@pytest.mark.parametrize('change', [lambda o, root: str(root/o), lambda o, root: root/o, lambda o, root: './' + o,
    lambda o, root: o.replace('/', '\\')], ids=['absolute', 'Path', 'dot', 'backslash'])
def test_file_names_in_a_table(some, change):
    df, root = some
    changed = df.assign(name=pd.Series([change(o, root) for o in df.name], dtype=object))
    assert shape_of(SemiImageDataLoaders.from_df(changed, root, **LOAD)) == (4, 3, 4, 4)
    dls = SemiImageDataLoaders.from_lists(root, changed.name.tolist(), df.label.tolist(), **LOAD)
    assert shape_of(dls) == (4, 3, 4, 4)


@pytest.mark.parametrize('start', ['', 'photos', 'photos/more'])
def test_lists_of_files_as_get_image_files_returns_them(some, monkeypatch, start):
    df, root = some
    monkeypatch.chdir(root)
    (root/'photos/more').mkdir(parents=True)
    (root/'a b').rename(root/start/'a b')
    files = get_image_files(Path(start or '.')).sorted()
    assert shape_of(SemiImageDataLoaders.from_lists(start or '.', files, df.label.tolist(), **LOAD)) == (4, 3, 4, 4)


@pytest.mark.parametrize('first, rest', [(['True'], 'False'), (['yes'], 'no'), (['valid'], 'train'), ([True, None], False), ([1, 2], 0),
    ([1., np.nan], 0.)], ids=str)
def test_a_validation_column_that_is_not_boolean(some, first, rest):
    (df, root), values = some, first + [rest]*(8-len(first))
    with pytest.raises(ValueError, match="'valid' must hold True and False"):
        SemiImageDataLoaders.from_df(df.assign(valid=values), root, valid_col='valid', **LOAD)


@pytest.mark.parametrize('dtype', [bool, int, float, object, 'boolean'])
def test_a_validation_column(some, dtype):
    df, root = some
    valid = pd.Series([True, True] + [False]*6).astype(dtype)
    dls = SemiImageDataLoaders.from_df(df.assign(valid=valid), root, valid_col='valid', **COPIES)
    assert len(dls.valid_ds) == 2


@pytest.mark.parametrize('missing', [None, np.nan, '', pd.NA])
def test_a_row_without_file_name(some, missing):
    df, root = some
    names = df.name.astype(object)
    names.iloc[5] = missing
    with pytest.raises(ValueError, match=r"1 rows have no file name in 'name', first row 5"):
        SemiImageDataLoaders.from_df(df.assign(name=names), root, **LOAD)


@pytest.mark.parametrize('labels', [['cat', 'cat '], [' cat', 'cat', 'dog'], ['cat', 'cat\t']], ids=str)
def test_classes_that_differ_in_spaces_only(some, labels):
    df, root = some
    df = df.assign(label=labels + [None]*(8-len(labels)))
    with pytest.warns(UserWarning, match="'cat'.* only in spaces"): dls = SemiImageDataLoaders.from_df(df, root, **LOAD)
    assert dls.c == len(labels)


@pytest.mark.parametrize('given', [dict(label_delim='|'), dict(y_block=MultiCategoryBlock), dict(y_block=RegressionBlock)], ids=str)
def test_other_targets_than_one_class(some, given):
    df, root = some
    df.to_csv(root/'labels.csv', index=False)
    lists = df.name.tolist(), df.label.tolist()
    for make, args in dict(from_df=(df, root), from_csv=(root,), from_lists=(root, *lists)).items():
        with pytest.raises(ValueError, match='is not supported: each image has one class'):
            getattr(SemiImageDataLoaders, make)(*args, **LOAD, **given)


def test_file_names_that_are_not_utf_8_are_written_to_a_table(tmp_path):
    names = [os.fsdecode(f'{i}'.encode() + b'-caf\xe9.png') for i in range(6)]
    file = interpretation(names, ['cat', 'dog']).to_csv(tmp_path/'a.csv')
    assert pd.read_csv(file, encoding_errors='surrogateescape').item.tolist() == names
