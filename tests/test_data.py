"Missing labels, hidden labels, splits and two-stream batches."
from collections import Counter
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.callback.data import WeightedDL  # chkstyle: ignore (adds Datasets.weighted_dataloaders)
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, ColReader, IndexSplitter, RandomSplitter
from fastai.tabular.core import Categorify, Normalize, TabularPandas
from fastai.tabular.learner import tabular_learner
from fastai.vision.augment import aug_transforms  # chkstyle: ignore (adds Learner.tta)

from conftest import Look, blob_learner, blobs
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock, targets_of
from fastai_lp.learner.splitting import LabeledOnlySplitter, hide_labels
from fastai_lp.learner.streams import TwoStreamDL, semi_dls


def datasets(n_labeled, n_unlabeled, **kwargs):
    n = n_labeled+n_unlabeled
    labels = [i % 2 if i < n_labeled else None for i in range(n)]
    return Datasets(range(n), [[Look(list(map(float, range(n))))], [Look(labels), SemiCategorize()]], **kwargs)


def loaders(n_labeled, n_unlabeled, workers=0, **kwargs):
    return datasets(n_labeled, n_unlabeled).semi_dataloaders(num_workers=workers, device='cpu', **kwargs)


def epoch(dl): return [(b[0].long().tolist(), (b[1] < 0).tolist()) for b in dl]


# Batches

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('n_labeled, n_unlabeled, bs, labeled_bs',
    [(10, 100, 16, 4), (3, 50, 8, 5), (100, 30, 10, 1), (2, 64, 16, 8), (40, 3, 16, 8)])
def test_an_epoch(n_labeled, n_unlabeled, bs, labeled_bs, drop_last):
    dl = loaders(n_labeled, n_unlabeled, bs=bs, labeled_bs=labeled_bs, drop_last=drop_last).train
    batches = epoch(dl)
    full, rest = divmod(n_unlabeled, bs-labeled_bs)
    assert len(batches) == len(dl) == max(1, full + (rest > 0 and not drop_last))
    unlabeled = [i for idxs, free in batches for i, f in zip(idxs, free) if f]
    expected = max(full*(bs-labeled_bs), min(n_unlabeled, bs-labeled_bs)) if drop_last else n_unlabeled
    assert len(set(unlabeled)) == len(unlabeled) == expected, 'each unlabeled item appears at most once'
    for idxs, free in batches[:full]: assert (len(idxs), free.count(False)) == (bs, labeled_bs)
    drawn = Counter(i for idxs, free in batches for i, f in zip(idxs, free) if not f)
    counts = [drawn[i] for i in range(n_labeled)]
    assert max(counts)-min(counts) <= 1, 'labeled items are reshuffled, not drawn with replacement'
    assert epoch(dl) != batches, 'the next epoch has another order'


def test_workers_load_the_planned_order():
    dl = loaders(10, 100, workers=2, bs=16).train
    idxs = dl.get_idxs()
    dl.get_idxs = lambda: idxs
    assert [i for batch, _ in epoch(dl) for i in batch] == idxs


@pytest.mark.parametrize('n_labeled, n_batches', [(70, 4), (3, 1)])
def test_labeled_only_epochs_have_full_batches(n_labeled, n_batches):
    dl = loaders(n_labeled, 200, bs=16).train
    dl.labeled_only = True
    assert len(dl) == n_batches
    assert [(len(idxs), any(free)) for idxs, free in epoch(dl)] == [(16, False)]*n_batches


def test_copies():
    dls = loaders(10, 90, bs=16)
    dl = dls.train
    plain = dl.new(shuffle=False)
    assert (type(plain), len(plain.get_idxs())) == (TfmdDL, 100)
    larger = dl.new(bs=20)
    assert (type(larger), larger.bs, larger.labeled_bs) == (type(dl), 20, 10)
    fewer = semi_dls(dls, labeled_bs=2).train
    assert (fewer.labeled_bs, len(fewer)) == (2, 90//14)
    assert type(dls.new_empty().train) is TfmdDL


def test_a_pickled_copy_draws_the_same_epoch():
    dl = loaders(10, 90, bs=16).train
    dl.get_idxs()
    copy = cloudpickle.loads(cloudpickle.dumps(dl))
    assert copy.get_idxs() == dl.get_idxs()


@pytest.mark.parametrize('n_labeled, n_unlabeled, labeled_bs, match', [(5, 50, 8, 'got 8'), (5, 50, 0, 'got 0'),
    (5, 0, None, 'all 5 training items are labeled'), (0, 50, None, 'none of the 50 training items is labeled')])
def test_impossible_streams(n_labeled, n_unlabeled, labeled_bs, match):
    with pytest.raises(ValueError, match=match): loaders(n_labeled, n_unlabeled, bs=8, labeled_bs=labeled_bs)


def test_unlabeled_validation_items():
    dsets = datasets(10, 50, splits=RandomSplitter(.5, seed=0)(range(60)))
    with pytest.warns(UserWarning, match='validation items are unlabeled'): dsets.semi_dataloaders(bs=8, num_workers=0)


def test_tta_of_training_items_is_in_order():
    learn = blob_learner()
    a, b = learn.tta(ds_idx=0, n=2), learn.get_preds(ds_idx=0)
    assert torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)


# What semi_dls keeps of the DataLoaders

def plain(n_labeled=10, n_unlabeled=90, bs=16, **kwargs):
    return datasets(n_labeled, n_unlabeled).dataloaders(bs=bs, num_workers=0, device='cpu', **kwargs)


@pytest.mark.parametrize('name, value', [('c', 5), ('vocab', ['x', 'y']), ('note', 'mine'), ('n_inp', 1)])
def test_semi_dls_keeps_what_was_set(name, value):
    dls = plain(path='some')
    setattr(dls, name, value)
    semi = semi_dls(dls, 4)
    assert getattr(semi, name) == getattr(semi_dls(semi), name) == value
    assert (str(semi.path), semi.device, type(semi)) == ('some', dls.device, type(dls))
    assert (type(semi.train), type(dls.train)) == (TwoStreamDL, TfmdDL), 'the original is unchanged'
    assert semi.valid is dls.valid


def test_semi_dls_keeps_what_was_set_on_the_dataloader():
    dls = plain()
    dls.train.note, dls.train.c = 'mine', 7
    semi = semi_dls(dls)
    for o in (semi, semi_dls(semi, 2)): assert (o.train.note, o.c) == ('mine', 7)
    assert semi.train.new(bs=20).note == 'mine'


def test_semi_dls_of_a_class_with_its_own_arguments():
    class Mine(DataLoaders):
        def __init__(self, name, *loaders):
            super().__init__(*loaders)
            self.name = name
    semi = semi_dls(Mine('mine', *plain().loaders))
    assert (type(semi), semi.name, len(semi.loaders)) == (Mine, 'mine', 2)


def weighted(wgts): return datasets(10, 90).weighted_dataloaders(np.array(wgts, dtype=float), bs=16, num_workers=0, device='cpu')


@pytest.mark.parametrize('copied', [lambda o: o, semi_dls, lambda o: semi_dls(o, 4)], ids=['once', 'twice', 'another labeled_bs'])
def test_the_weights_of_a_weighted_dl_are_kept(copied):
    dl = copied(semi_dls(weighted([1, 0]*50))).train
    drawn = [i for _ in range(3) for i in dl.get_idxs()]
    assert all(i % 2 == 0 for i in drawn), 'items of weight 0 are never drawn'
    assert {i for i in drawn if i < 10} == set(range(0, 10, 2))
    assert all(i % 2 == 0 for i in dl.new(bs=20).get_idxs())
    drawn = Counter(i for _ in range(20) for i in semi_dls(weighted([1]*10 + [1, 3]*45)).train.get_idxs() if i >= 10)
    assert sum(n for i, n in drawn.items() if i % 2)/sum(drawn.values()) == pytest.approx(.75, abs=.03)


@pytest.mark.parametrize('wgts, stream', [([0]*10 + [1]*90, 'labeled'), ([1]*10 + [0]*90, 'unlabeled')])
def test_a_stream_without_weight(wgts, stream):
    with pytest.raises(ValueError, match=f'every {stream} item has the weight 0'): semi_dls(weighted(wgts))


@pytest.mark.parametrize('dls, match', [
    (lambda: datasets(10, 90).partial_dataloaders(40, bs=16, num_workers=0), 'partial_n=40'),
    (lambda: DataLoaders(TfmdDL(datasets(10, 90), bs=16, shuffle=True, num_workers=0, get_idxs=lambda: [0]*100)), 'get_idxs'),
    (lambda: DataLoaders(TfmdDL(datasets(10, 90), bs=16, shuffle=True, num_workers=0, shuffle_fn=sorted)), 'shuffle_fn')],
    ids=['PartialDL', 'get_idxs=', 'shuffle_fn='])
def test_a_dataloader_that_chooses_its_items_is_refused(dls, match):
    with pytest.raises(ValueError, match=f'{match}.*without semi_dls'): semi_dls(dls())


@pytest.mark.parametrize('name', ['get_idxs', 'shuffle_fn', 'sample'])
def test_a_class_with_its_own_order_warns(name):
    own = type('Own', (TfmdDL,), {name: lambda self, *args: getattr(TfmdDL, name)(self, *args)})
    with pytest.warns(UserWarning, match=f'two streams replace Own.{name}.*without semi_dls'): dls = semi_dls(plain(dl_type=own))
    assert isinstance(dls.train, own)


# Missing labels

def test_block_with_missing_labels_of_all_kinds():
    df = pd.DataFrame(dict(x=range(8), y=['b', None, 'a', float('nan'), '', 'b', pd.NA, 'c']))
    def loaders(**kwargs):
        blocks = TransformBlock, SemiCategoryBlock(**kwargs)
        block = DataBlock(blocks=blocks, get_x=ColReader('x'), get_y=ColReader('y'), splitter=IndexSplitter([7]))
        return block.semi_dataloaders(df, bs=4, num_workers=0)
    with pytest.raises(KeyError, match="'c' is not in the vocab"): loaders()
    dls = loaders(vocab=['a', 'b', 'c'])
    assert (list(dls.vocab), dls.c) == (['a', 'b', 'c'], 3)
    assert dls.train.targets.tolist() == [1, -1, 0, -1, -1, 1, -1]
    assert targets_of(dls.valid).tolist() == [2]


def test_the_shared_loss_of_categorize_is_not_changed():
    assert SemiCategorize.loss_func is Categorize.loss_func
    assert type(Categorize.loss_func).__name__ == 'CrossEntropyLossFlat'


def test_a_table_with_missing_targets():
    data = blobs(n=200, per_class=5)
    df = pd.DataFrame(data.x.numpy(), columns=[f'x{i}' for i in range(8)])
    df['y'] = pd.Categorical([None if o is None else 'abc'[o] for o in data.labels])
    to = TabularPandas(df, procs=[Categorify, Normalize], cont_names=list(df.columns[:8]), y_names='y',
        y_block=CategoryBlock(), splits=(list(range(170)), list(range(170, 200))))
    dls = semi_dls(to.dataloaders(bs=32), 16)
    assert (dls.train.targets < 0).sum() == 170-15
    assert [((b[-1] < 0).sum().item(), len(b[-1])) for b in dls.train] == [(16, 32)]*9
    learn, cb = tabular_learner(dls, layers=[32]), LPCallback(truth=data.truth[:170])
    with learn.no_bar(), learn.no_logging(): learn.fit(8, 1e-2, cbs=cb)
    assert cb.record.history[-1]['accuracy'] > .8


# Hidden labels and splits

LABELS = np.repeat([0, 1, 2], [50, 5, 20])


def test_hide_labels_keeps_n_per_class():
    y, truth = hide_labels(LABELS, n=5)
    assert Counter(y[y >= 0].tolist()) == {0: 5, 1: 5, 2: 5}
    assert np.array_equal(truth, LABELS)
    assert truth is not LABELS


def test_hide_labels_keeps_the_given_indices():
    y, _ = hide_labels(torch.tensor(LABELS), keep=[3, 60])
    assert (y >= 0).nonzero().flatten().tolist() == [3, 60]


def test_hide_labels_of_other_types():
    s, _ = hide_labels(['x', 'y', 'x', 'y'], n=1)
    assert Counter(s) == {'x': 1, 'y': 1, None: 2}
    assert hide_labels(('x', 'y'), n=1) == (['x', 'y'], ('x', 'y'))
    for unsigned in (np.array([0, 1, 0, 1], dtype=np.uint8), torch.tensor([0, 1, 0, 1], dtype=torch.uint8)):
        y, truth = hide_labels(unsigned, n=1)
        assert sorted(y.tolist()) == [-1, -1, 0, 1]
        assert truth.dtype == unsigned.dtype


@pytest.mark.parametrize('kwargs, match', [
    (dict(n=6), 'cannot keep 6'), (dict(), 'either n'), (dict(n=1, keep=[0]), 'either n'), (dict(keep=[75]), 'outside 0 to 74'),
    (dict(keep=['a.png']), 'pass items='), (dict(keep=np.arange(75) < 3), 'keep is a mask'),
    (dict(keep=['a.png'], items=['b/a.png', 'c/a.png']), 'names 2 items')])
def test_hide_labels_rejects(kwargs, match):
    with pytest.raises(ValueError, match=match): hide_labels(LABELS, **kwargs)


def test_labeled_only_splitter_with_another_splitter():
    labels = [i % 2 if i % 5 == 0 else None for i in range(100)]
    train, valid = LabeledOnlySplitter(labels.__getitem__, splitter=RandomSplitter(.5, seed=0))(range(100))
    assert len(valid) == 10
    assert all(labels[i] is not None for i in valid)
    assert sorted(train+valid) == list(range(100))


@pytest.mark.parametrize('get_y', [ColReader('its label'), 'its label', lambda row: row['its label']])
def test_labeled_only_splitter_of_a_table(get_y):
    df = pd.DataFrame({'a file': range(40), 'its label': [i % 2 if i < 20 else None for i in range(40)]})
    _, valid = LabeledOnlySplitter(get_y, .5)(df)
    assert len(valid) == 10
    assert max(valid) < 20
    with pytest.warns(UserWarning, match='the validation set is empty'): LabeledOnlySplitter(get_y)(df.iloc[:2])


# The place of an item does not change

def grown(n=200, of='ab', steps=(.1, .3, .6, 1)):
    "Labels of n items, more of them at each step"
    rng = np.random.default_rng(0)
    truth, order = rng.choice(list(of), n), rng.permutation(n)
    for share in steps:
        known = set(order[:int(n*share)].tolist())
        yield [str(o) if i in known else None for i, o in enumerate(truth)]


def assert_only_adds(splits):
    "Asserts of (training, validation) names of labeled items that no step moves an item"
    splits = [(set(a), set(b)) for a, b in splits]
    for (train, valid), (later, later_valid) in zip(splits, splits[1:]):
        assert train <= later, 'an item that was trained on is in validation'
        assert valid <= later_valid, 'a validation item is trained on'
    train, valid = splits[-1]
    assert .1 < len(valid)/len(train | valid) < .35


ROWS = pd.DataFrame(dict(file=[f'x/{i}.png' for i in range(200)], size=np.arange(200)/7))
KINDS = dict(rows=int, paths=lambda i: Path(f'a/{i}.png'), texts=str, pairs=lambda i: (str(i), None), objects=lambda i: object())
KINDS |= dict(arrays=lambda i: np.full(2, i), tensors=lambda i: torch.full((2,), i))


@pytest.mark.parametrize('kind', KINDS)
def test_adding_labels_only_adds(kind):
    items, splits = list(map(KINDS[kind], range(200))), []
    position = {id(o): i for i, o in enumerate(items)}
    for labels in grown():
        split = LabeledOnlySplitter(lambda o, labels=labels: labels[position[id(o)]], .2, seed=0)(items)
        splits.append([[i for i in idxs if labels[i] is not None] for idxs in split])
    assert_only_adds(splits)


@pytest.mark.parametrize('change', [lambda df: df, lambda df: df.sample(frac=1, random_state=1),
    lambda df: df.iloc[::-1].reset_index(drop=True), lambda df: df[df.label.notna() | (df['size'] > 5)]],
    ids=['same', 'shuffled', 'new index', 'fewer rows'])
@pytest.mark.parametrize('by', [dict(), dict(name='file')], ids=['content', 'name'])
def test_adding_labels_to_a_table_only_adds(change, by):
    splits = []
    for k, labels in enumerate(grown()):
        df = ROWS.assign(label=labels)
        if k: df = change(df)
        parts = [df.iloc[list(o)] for o in LabeledOnlySplitter('label', .2, 0, **by)(df)]
        splits.append([o.file[o.label.notna()] for o in parts])
    assert_only_adds(splits)


def test_a_corrected_label_stays_in_its_set():
    labels = next(grown(steps=[1]))
    df = ROWS.assign(label=labels)
    other = df.assign(label=['a' if i % 3 else o for i, o in enumerate(labels)])
    for get_y in ('label', ColReader('label'), ColReader(2)):
        assert LabeledOnlySplitter(get_y, .2, 0)(df) == LabeledOnlySplitter(get_y, .2, 0)(other)


@pytest.mark.parametrize('n, valid_pct', [(2000, .2), (2000, .5), (5000, .05)])
def test_the_share_is_near_valid_pct(n, valid_pct):
    labels = ['abc'[i % 3] for i in range(n)]
    splits = [LabeledOnlySplitter(labels.__getitem__, valid_pct, seed)(range(n))[1] for seed in range(5)]
    expected = valid_pct*n/3
    counts = np.array([list(Counter(labels[i] for i in valid).values()) for valid in splits])
    assert (abs(counts - expected) < 4*(expected*(1-valid_pct))**.5).all()
    assert len({tuple(o) for o in splits}) == 5
    assert LabeledOnlySplitter(labels.__getitem__, valid_pct, np.int64(4))(range(n))[1] == splits[4]


def test_a_place_is_the_same_in_every_version_and_on_every_machine():
    items = [*'abcdefgh', Path('x/größe 1.png'), *range(4), np.arange(3, dtype=np.uint8), torch.arange(2, dtype=torch.float32)]
    assert LabeledOnlySplitter(lambda o: 'c', .5, seed=0)(items)[1] == [2, 3, 5, 7, 9, 13]


def test_one_label_of_each_class_trains():
    labels = [i if i < 100 else None for i in range(150)]
    with pytest.warns(UserWarning) as seen: train, valid = LabeledOnlySplitter(labels.__getitem__, .3, 0)(range(150))
    assert (len(train), len(valid)) == (150, 0)
    said = [str(o.message) for o in seen]
    assert any('have labels in validation only' in o for o in said)
    assert any('the validation set is empty' in o for o in said)
