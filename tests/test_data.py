"Unlabeled items, splits and batches of two streams."
from collections import Counter

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import ColReader, IndexSplitter, RandomSplitter
from fastai.tabular.core import Categorify, Normalize, TabularPandas
from fastai.data.block import CategoryBlock
import fastai.vision.augment  # patches in tta
from fastai.tabular.learner import tabular_learner

from conftest import Look, blob_learner, blobs
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock, targets_of
from fastai_lp.learner.splitting import LabeledOnlySplitter, hide_labels
from fastai_lp.learner.streams import TwoStream, semi_dls, two_stream


def loaders(n_labeled, n_unlabeled, **kwargs):
    labels = [i % 2 if i < n_labeled else None for i in range(n_labeled+n_unlabeled)]
    n = len(labels)
    dsets = Datasets(range(n), [[Look(list(map(float, range(n))))], [Look(labels), SemiCategorize()]])
    return dsets.semi_dataloaders(num_workers=0, device='cpu', **kwargs)


def epoch(dl): return [(b[0].long().tolist(), (b[1] < 0).tolist()) for b in dl]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('n_labeled, n_unlabeled, bs, labeled_bs', [(10, 100, 16, 4), (3, 50, 8, 5), (100, 30, 10, 1), (2, 64, 16, 8), (40, 3, 16, 8)])
def test_an_epoch(n_labeled, n_unlabeled, bs, labeled_bs, drop_last, workers):
    dls = loaders(n_labeled, n_unlabeled, bs=bs, labeled_bs=labeled_bs, drop_last=drop_last)
    dls.train.fake_l.num_workers = workers
    batches = epoch(dls.train)
    full, rest = divmod(n_unlabeled, bs-labeled_bs)
    assert len(batches) == len(dls.train) == max(1, full + (rest > 0 and not drop_last))
    unlabeled = [i for idxs, free in batches for i, f in zip(idxs, free) if f]
    assert len(set(unlabeled)) == len(unlabeled)                                                  # each at most once
    assert len(unlabeled) == (n_unlabeled if not drop_last else max(full*(bs-labeled_bs), min(n_unlabeled, bs-labeled_bs)))
    for idxs, free in batches[:full]: assert len(idxs) == bs and free.count(False) == labeled_bs
    drawn = Counter(i for idxs, free in batches for i, f in zip(idxs, free) if not f)
    assert max(drawn.values()) - min(drawn[i] for i in range(n_labeled)) <= 1                     # reshuffles, not draws with replacement
    assert epoch(dls.train) != batches                                                            # the next epoch has another order


def test_labeled_only_epochs_have_full_batches():
    dls = loaders(70, 200, bs=16)
    dls.train.labeled_only = True
    assert len(dls.train) == 4
    for idxs, free in epoch(dls.train): assert len(idxs) == 16 and not any(free)
    small = loaders(3, 200, bs=16).train
    small.labeled_only = True
    assert [len(idxs) for idxs, _ in epoch(small)] == [16]


def test_classes_and_copies():
    dls = loaders(10, 90, bs=16)
    dl = dls.train
    assert isinstance(dl, TwoStream) and two_stream(TfmdDL) is two_stream(TfmdDL)
    assert type(dl.new(shuffle=False)) is TfmdDL and len(dl.new(shuffle=False).get_idxs()) == 100
    same = dl.new(bs=20)
    assert type(same) is type(dl) and same.labeled_bs == 10 and same.bs == 20
    again = cloudpickle.loads(cloudpickle.dumps(dl))
    assert len(epoch(again)) == len(dl) and torch.equal(again.targets, dl.targets)
    assert dl.new(bs=6).labeled_bs == 3
    smaller = semi_dls(dls, labeled_bs=2)
    assert smaller.train.labeled_bs == 2 and len(smaller.train) == 90//14
    assert [type(o) for o in dls.new_empty().loaders][0] is TfmdDL


def test_impossible_streams():
    for kwargs, match in ((dict(bs=8, labeled_bs=8), 'got 8'), (dict(bs=8, labeled_bs=0), 'got 0')):
        with pytest.raises(ValueError, match=match): loaders(5, 50, **kwargs)
    with pytest.raises(ValueError, match='all 5 training items are labeled'): loaders(5, 0, bs=4)
    with pytest.raises(ValueError, match='none of the 50 training items is labeled'): loaders(0, 50, bs=4)


def test_unlabeled_validation_items_are_warned_of():
    labels = [i % 2 if i < 10 else None for i in range(60)]
    dsets = Datasets(range(60), [[Look(list(map(float, range(60))))], [Look(labels), SemiCategorize()]], splits=RandomSplitter(.5, seed=0)(range(60)))
    with pytest.warns(UserWarning, match='validation items are unlabeled'): dsets.semi_dataloaders(bs=8, num_workers=0)


def test_block_with_missing_labels_of_all_kinds():
    df = pd.DataFrame(dict(x=range(8), y=['b', None, 'a', float('nan'), '', 'b', pd.NA, 'c']))
    block = DataBlock(blocks=(TransformBlock, SemiCategoryBlock), get_x=ColReader('x'), get_y=ColReader('y'), splitter=IndexSplitter([7]))
    with pytest.raises(KeyError, match="'c' is not in the vocab"): block.dataloaders(df, bs=2, num_workers=0).valid.one_batch()
    dls = DataBlock(blocks=(TransformBlock, SemiCategoryBlock(vocab=['a', 'b', 'c'])), get_x=ColReader('x'), get_y=ColReader('y'),
        splitter=IndexSplitter([7])).semi_dataloaders(df, bs=4, num_workers=0)
    assert list(dls.vocab) == ['a', 'b', 'c'] and dls.c == 3
    assert dls.train.targets.tolist() == [1, -1, 0, -1, -1, 1, -1]
    assert targets_of(dls.valid).tolist() == [2]


def test_the_shared_loss_of_categorize_is_not_touched():
    from fastai.data.transforms import Categorize
    assert SemiCategorize.loss_func is Categorize.loss_func
    assert type(Categorize.loss_func).__name__ == 'CrossEntropyLossFlat'


def test_hide_labels():
    labels = np.repeat([0, 1, 2], [50, 5, 20])
    y, truth = hide_labels(labels, n=5, seed=0)
    assert Counter(y[y >= 0].tolist()) == {0: 5, 1: 5, 2: 5} and (truth == labels).all() and truth is not labels
    t, _ = hide_labels(torch.tensor(labels), keep=[3, 60])
    assert t.nonzero().numel() and (t >= 0).nonzero().flatten().tolist() == [3, 60]
    s, _ = hide_labels(['x', 'y', 'x', 'y'], n=1, seed=0)
    assert sorted(o for o in s if o) == ['x', 'y'] and s.count(None) == 2
    for unsigned in (np.array([0, 1, 0, 1], dtype=np.uint8), torch.tensor([0, 1, 0, 1], dtype=torch.uint8)):
        y, truth = hide_labels(unsigned, n=1)
        assert sorted(y.tolist()) == [-1, -1, 0, 1] and truth.dtype == unsigned.dtype
    assert hide_labels(('x', 'y'), n=1) == (['x', 'y'], ('x', 'y'))
    for kwargs, match in ((dict(n=6), 'cannot keep 6'), (dict(), 'either n'), (dict(n=1, keep=[0]), 'either n'), (dict(keep=[75]), 'outside 0 to 74'),
        (dict(keep=['a.png']), 'pass items='), (dict(keep=np.arange(75) < 3), 'keep is a mask'), (dict(keep=['a.png'], items=['b/a.png', 'c/a.png']), 'names 2 items')):
        with pytest.raises(ValueError, match=match): hide_labels(labels, **kwargs)


def test_labeled_only_splitter_with_another_splitter():
    labels = [i % 2 if i % 5 == 0 else None for i in range(100)]
    train, valid = LabeledOnlySplitter(labels.__getitem__, splitter=RandomSplitter(.5, seed=0))(range(100))
    assert len(valid) == 10 and all(labels[i] is not None for i in valid) and sorted(train+valid) == list(range(100))


def test_splitter_with_a_reader_of_columns():
    df = pd.DataFrame({'a file': range(40), 'its label': [i % 2 if i < 20 else None for i in range(40)]})
    for get_y in (ColReader('its label'), 'its label', lambda row: row['its label']):
        train, valid = LabeledOnlySplitter(get_y, .5, seed=0)(df)
        assert len(valid) == 10 and max(valid) < 20
    with pytest.warns(UserWarning, match='the validation set is empty'): LabeledOnlySplitter('its label')(df.iloc[:2])


def test_tta_of_training_items_is_in_order():
    learn = blob_learner()
    a, b = learn.tta(ds_idx=0, n=2), learn.get_preds(ds_idx=0)
    assert len(a[0]) == 120 and torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)


def test_tabular_with_missing_targets():
    data = blobs(n=200, per_class=5)
    df = pd.DataFrame(data.x.numpy(), columns=[f'x{i}' for i in range(8)])
    df['y'] = pd.Categorical([None if o is None else 'abc'[o] for o in data.labels])
    to = TabularPandas(df, procs=[Categorify, Normalize], cont_names=list(df.columns[:8]), y_names='y', y_block=CategoryBlock(),
        splits=(list(range(170)), list(range(170, 200))))
    dls = semi_dls(to.dataloaders(bs=32), 16)
    assert (dls.train.targets < 0).sum() == 170-15
    assert [((b[-1] < 0).sum().item(), len(b[-1])) for b in dls.train] == [(16, 32)]*9
    learn = tabular_learner(dls, layers=[32])
    cb = LPCallback(truth=data.truth[:170])
    with learn.no_bar(), learn.no_logging(): learn.fit(8, 1e-2, cbs=cb)
    assert cb.record.history[-1]['accuracy'] > .8
