"""Errors and bad input: nothing is lost, nothing is left half changed, and the message says what to do.

The table of errors in the docs is made of what these tests see: pytest tests/test_faults.py --write-faults"""
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import CancelFitException
from fastai.callback.schedule import fine_tune  # chkstyle: ignore (adds Learner.fine_tune)
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.utils import verify_images
from PIL import Image
from torch import nn

from conftest import Break, Look, blob_learner, blob_model, blobs, flat_weights, quiet, state_of
from fastai_lp.experiments.results import read_lines
from fastai_lp.estimator import LabelDiffusion
from fastai_lp.interpret import LPInterpretation
from fastai_lp.label_studio import labels_from_label_studio
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, targets_of
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.record import item_names
from fastai_lp.learner.relabel import relabel
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.learner.splitting import LabeledOnlySplitter
from fastai_lp.learner.streams import semi_dls
from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.propagate import propagate
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.utils.files import append_json_line, atomic_write, read_npz

LABELS, FEATURES, BATCHES, IMAGES = 'Labels', 'Features and graph', 'Batches', 'Image files and names'
LABELING = 'Labeling'
FILES, STOPPED, SPACE = 'Damaged or changed files', 'Interrupted or failed fits', 'No space left'
linux = pytest.mark.skipif(sys.platform != 'linux', reason='sets limits of a process as in Linux')


def clouds(n=60, d=8, c=3, per_class=1, seed=0, spread=.1):
    "(features, labels with `per_class` of each class known, true classes)"
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % c
    centers = torch.eye(c, d) if c <= d else F.normalize(torch.randn(c, d, generator=g))
    x = centers[truth] + spread*torch.randn(n, d, generator=g)
    return x, torch.where(torch.arange(n) < c*per_class, truth, -1), truth


def assert_unchanged(learn, fit, match, error=ValueError):
    "Asserts that `fit` raises, and leaves weights and Learner as they were"
    before, weights = state_of(learn), flat_weights(learn)
    with pytest.raises(error, match=match): fit()
    assert state_of(learn) == before
    assert torch.equal(weights, flat_weights(learn))


# Labels

def test_no_label(shows, data):
    x, y, _ = clouds()
    with shows.error(LABELS, 'no item is labeled, arrays', 'no item is labeled'): propagate(x, torch.full_like(y, -1))
    data.labels = [None]*120 + data.labels[120:]
    with shows.error(LABELS, 'no item is labeled, two-stream `DataLoaders`', 'none of the 120'): blob_learner(data)
    learn = blob_learner(data, two_stream=False, cbs=LPCallback())
    assert_unchanged(learn, lambda: learn.fit(1), 'no item is labeled')


def test_a_class_without_label(shows, data):
    x, y, _ = clouds()
    with shows.error(LABELS, 'a class has no label', 'class 2 has no labeled item'): propagate(x, torch.where(y == 2, -1, y), 3)
    data.labels = [None if o == 1 and i < 120 else o for i, o in enumerate(data.labels)]
    learn = blob_learner(data, cbs=LPCallback())
    assert_unchanged(learn, lambda: learn.fit(1), 'class 1 has no labeled item')


def test_a_single_label(shows):
    x, y, _ = clouds()
    p = propagate(x, torch.where(torch.arange(60) == 7, 0, -1))
    assert 0 < p.reached.sum() < 60
    assert (p.labels[p.reached] == 0).all()
    assert (p.certainty[p.reached] == 1).all()
    assert (p.weights[~p.reached] == 0).all()
    shows.result(LABELS, 'a single label, so one class', 'Every item that the label reaches gets it, with certainty '
        '1. The others get label −1 and weight 0.')


@pytest.mark.parametrize('y, what, match', [([0, 1, 5], 'a label is out of range', 'label 5 is out of range'),
    ([0., 1., -1.], 'labels are floats', 'one integer per item'), ([True, False, True], 'labels are booleans', 'one integer per item'),
    ([[0], [1], [-1]], 'labels have two dimensions', 'one integer per item'), ([0, 1], 'a label is missing', '2 labels for 3 items')])
def test_invalid_labels(shows, y, what, match):
    with shows.error(LABELS, what, match): propagate(torch.eye(3), torch.tensor(y), 2)


@pytest.mark.parametrize('y_block, y, what, match', [
    (CategoryBlock, np.nan, '`CategoryBlock` and a missing label', 'use SemiCategoryBlock'),
    (MultiCategoryBlock, ['a', 'b'], 'several labels per item', 'one integer target per item'),
    (RegressionBlock, .5, 'numbers as targets (regression)', 'one integer target per item')])
def test_targets_that_are_not_one_class(shows, y_block, y, what, match):
    block = DataBlock((TransformBlock, y_block), get_y=lambda i: y)
    with shows.error(LABELS, what, match): block.semi_dataloaders(list(range(20)), bs=4, num_workers=0)


def test_validate_on_unlabeled_items(shows, learn):
    with shows.warning(LABELS, '`learn.validate(dl=)` on unlabeled items', 'are unlabeled: metrics', 'They are evaluated.'):
        learn.validate(dl=learn.dls.train.new(shuffle=False))


def test_a_label_outside_the_vocab(shows):
    with shows.error(LABELS, 'a label is not in the vocab', "label 'bird' is not in the vocab", KeyError):
        SemiCategorize(vocab=['cat', 'dog']).encodes('bird')


def test_the_model_has_another_number_of_classes(shows, data):
    learn = blob_learner(data, model=blob_model(c=5), cbs=LPCallback())
    before = state_of(learn)
    with shows.error(LABELS, 'the model has another number of classes', 'no nn.Linear with 3 outputs'): learn.fit(1)
    assert state_of(learn) == before


@pytest.mark.parametrize('labels', [[1, None, 'two'], ['a', Path('a'), None]], ids=str)
def test_labels_of_mixed_types(shows, labels):
    with shows.error(LABELS, f'labels {labels}', 'the labels are of mixed types'):
        Datasets(range(len(labels)), [[], [Look(labels), SemiCategorize()]])


def test_labels_that_numpy_converted_to_text(shows):
    y = np.array(['ant', 'bee', -1])
    with shows.error(LABELS, "`LabelDiffusion().fit(X, np.array(['ant', 'bee', -1]))`", "array of text with '-1'"):
        LabelDiffusion().fit(np.eye(3), y)
    assert LabelDiffusion(k=1).fit(np.eye(3)+1, ['ant', 'bee', -1]).classes_.tolist() == ['ant', 'bee']


def test_labels_with_missing_values_in_arrays(shows):
    with shows.error(LABELS, 'labels have missing values, arrays', 'pandas.factorize'): propagate(torch.eye(3), [0, 1, None])
    assert propagate(torch.eye(3), pd.factorize(np.array(['ant', 'bee', None]))[0]).labels.tolist()[:2] == [0, 1]


def test_settings_that_are_not_integers(shows):
    with shows.error(FEATURES, '`LPCallback(k=10.)`', 'got 10.0'): LPCallback(k=10.)
    assert LPCallback(k=np.int64(10)).labeler.k == 10


@pytest.mark.parametrize('labels, n', [([1, np.int64(2), None, 3., float('nan')], 3), (['a', np.str_('b'), None, ''], 2)])
def test_labels_of_one_kind_are_not_mixed(labels, n):
    assert len(Datasets(range(len(labels)), [[], [Look(labels), SemiCategorize()]]).vocab) == n


def test_class_names_that_differ_in_spaces(shows):
    labels = ['cat', 'cat ', None]
    with shows.warning(LABELS, "classes 'cat' and 'cat '", 'differ only in spaces', 'They are two classes.'):
        assert len(Datasets(range(3), [[], [Look(labels), SemiCategorize()]]).vocab) == 2


def test_a_class_in_validation_only(shows):
    labels = [i if i < 20 else None for i in range(30)]
    what = 'all labels of a class fall into the validation set'
    with shows.warning(LABELS, what, 'have labels in validation only', 'One of them trains.'):
        train, _ = LabeledOnlySplitter(labels.__getitem__, .5, seed=0)(range(30))
    assert len(train) == 30


def test_all_labeled(shows, data):
    x, _, truth = clouds()
    p = propagate(x, truth)
    assert torch.equal(p.labels, truth)
    assert (p.certainty == 1).all()
    assert np.isnan(p.accuracy(truth))
    shows.result(LABELS, 'all items are labeled, arrays', 'Returns the given labels, with certainty 1.')
    data.labels = [int(o) for o in data.truth]
    with shows.error(LABELS, 'all items are labeled, `DataLoaders`', 'all 120 training items are labeled'): blob_learner(data)
    learn = blob_learner(data, two_stream=False, cbs=LPCallback())
    assert_unchanged(learn, lambda: learn.fit(1), 'all 120')


@pytest.mark.parametrize('two_stream', [True, False])
def test_a_single_unlabeled_item(shows, data, two_stream):
    data.labels = [None if i == 50 else int(o) for i, o in enumerate(data.truth)]
    learn = blob_learner(data, two_stream=two_stream)
    learn.fit(3, 1e-2, cbs=LPCallback())
    p = learn.lp_record.pseudo
    assert (~p.labeled).nonzero().flatten().tolist() == [50]
    assert p.labels[50] == data.truth[50]
    if two_stream:
        assert len(learn.dls.train) == 1
        shows.result(LABELS, 'a single unlabeled item', 'It trains with its pseudo-label. With two streams, an epoch '
            'is one pass over the unlabeled items, so it has one batch.')


def test_classes_of_very_different_size(shows):
    truth = torch.tensor([0]*4000 + [1]*4)
    x = torch.tensor([1., -1])[truth, None] + .1*torch.randn(4004, 16, generator=torch.Generator().manual_seed(0))
    y = torch.full((4004,), -1)
    y[[0, 4000]] = torch.tensor([0, 1])
    p = propagate(x, y, 2)
    assert torch.equal(p.labels, truth)
    assert p.class_weights[1] == pytest.approx(1000*p.class_weights[0])
    shows.result(LABELS, 'classes of 4,000 and 4 items, one label each', 'Both are found if they are far apart. ζ '
        'gives both classes the same weight in the loss: an item of the rare class weighs 1,000 times as much.')


def test_hundreds_of_classes(shows):
    x, y, truth = clouds(3000, 64, 300, spread=.03)
    p, small = propagate(x, y), propagate(x, y, keep_Z=False)
    assert p.Z.shape == (3000, 300)
    assert p.accuracy(truth) > .99
    assert torch.equal(p.labels, small.labels)
    assert small.Z is None
    learn = blob_learner(blobs(1000, 32, 200, 1, 200))
    learn.fit(1, cbs=LPCallback())
    assert len(learn.lp_record.pseudo.class_weights) == 200
    shows.result(LABELS, 'hundreds of classes', 'Works as with a few. `keep_Z=False` saves the memory of the n × c '
        'scores.')


@pytest.mark.parametrize('what, truth, match', [('has another length', blobs().truth[:50], 'truth has shape'),
    ('contradicts a known label', blobs().truth[:120].roll(1), 'truth contradicts the known label'),
    ('has an unknown class', ['zebra']*120, "truth contains the class 'zebra'")])
def test_invalid_truth(shows, data, what, truth, match):
    learn = blob_learner(data)
    before = state_of(learn)
    with shows.error(LABELS, f'`truth=` {what}', match): learn.fit(1, cbs=LPCallback(truth=truth))
    assert state_of(learn) == before


# Features and graph

def test_fewer_items_than_neighbors(shows):
    x, y, truth = clouds(6)
    with shows.warning(FEATURES, 'fewer items than k', 'k=50 is not below', 'All items are neighbors.'): p = propagate(x, y, k=50)
    assert torch.equal(p.labels, truth)


def test_two_items_and_one(shows):
    p = propagate(torch.tensor([[1., 0], [1, .1]]), torch.tensor([0, -1]))
    assert p.labels.tolist() == [0, 0]
    assert p.W.to_dense()[0, 1] == p.W.to_dense()[1, 0] > 1.9
    shows.result(FEATURES, 'two items', 'The graph has one edge, and the label spreads over it.')
    with shows.error(FEATURES, 'a single item', 'at least 2 items'): propagate(torch.ones(1, 3), torch.tensor([0]))


def with_copies(of):
    "300 items, and 3,000 unlabeled copies of one item"
    x, y, truth = clouds(300, spread=.05)
    copies = x[4:5] if of == 'one of them' else -torch.ones(1, 8)
    unlabeled, class_1 = torch.full((3000,), -1), torch.ones(3000, dtype=torch.int64)
    return torch.cat([x, copies.repeat(3000, 1)]), torch.cat([y, unlabeled]), torch.cat([truth, class_1])


def test_thousands_of_copies(shows):
    x, y, truth = with_copies('one of them')
    p = propagate(x, y)
    assert p.reached.all()
    assert (p.labels == truth).float().mean() > .97
    shows.result(FEATURES, '3,000 copies of an item that resembles others', 'They are the nearest neighbors of each '
        'other. The labels of the others reach all of them.')


def test_thousands_of_copies_apart_from_the_rest(shows):
    x, y, truth = with_copies('another one')
    p = propagate(x, y)
    assert not p.reached[300:].any()
    assert p.reached[:300].all()
    assert 'no label reaches' in advice(p)['reached']
    y[300] = 1
    assert (propagate(x, y).labels[300:] == 1).all()
    shows.result(FEATURES, '3,000 copies of an item that resembles no other', 'They are the nearest neighbors of each '
        'other. No label reaches them: label −1, weight 0, and a fit warns. One label among them reaches all.')


@pytest.mark.parametrize('of', ['one of them', 'another one'])
def test_thousands_of_copies_and_an_approximate_index(shows, of):
    x, y, _ = with_copies(of)
    p = propagate(x, y, index='HNSW16')
    assert torch.isfinite(p.weights).all()
    assert (p.weights[~p.reached] == 0).all()
    assert p.W.values().min() > 0
    if of == 'another one':
        assert not p.reached[300:].any()
        shows.result(FEATURES, '3,000 copies of an item, and an approximate index (`HNSW…`, `IVF…`)', "The index can "
            "miss other items among the copies, so these get a wrong label or none. Remove the copies, or use "
            "index='Flat', which is exact.")


def test_constant_features(shows, data):
    y = torch.where(torch.arange(200) < 3, torch.arange(200) % 3, -1)
    p = propagate(torch.ones(200, 5), y)
    assert torch.isfinite(p.Z).all()
    assert torch.isfinite(p.weights).all()
    assert torch.equal(p.labels[:3], y[:3])
    data.x[:] = 1.
    learn = blob_learner(data)
    with pytest.warns(UserWarning, match='below 0.05|takes over|no label reaches'): learn.fit(2, cbs=LPCallback())
    assert torch.isfinite(flat_weights(learn)).all()
    shows.result(FEATURES, 'all features are equal', 'The pseudo-labels mean nothing, but all numbers are finite. A '
        'fit warns of low certainty, of a class that takes over, or of items that no label reaches.')


def test_features_of_zeros(shows):
    x, y, truth = clouds()
    x[[10, 20]] = 0
    p = propagate(x, y)
    assert (~p.reached).nonzero().flatten().tolist() == [10, 20]
    assert p.labels[10] == -1
    assert p.weights[10] == 0
    assert (p.labels == truth)[p.reached].all()
    shows.result(FEATURES, 'the features of an item are 0', 'It has no edge: label −1, weight 0. A labeled one keeps '
        'its label, which spreads to no other item.')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_features_that_are_not_finite(shows, data, value):
    x, y, _ = clouds()
    x[[3, 7]] = value
    with shows.error(FEATURES, f'features are {value}', r'features of item\(s\) 3, 7 are NaN'): propagate(x, y)
    data.x[33, 2] = value
    learn = blob_learner(data, cbs=LPCallback())
    assert_unchanged(learn, lambda: learn.fit(1), r'item\(s\) 33 are NaN')


def test_one_dimension(shows):
    x, y = torch.tensor([[1.], [2.], [-3.], [-4.], [5.], [-6.]]), torch.tensor([0, -1, 1, -1, -1, -1])
    assert propagate(x, y).labels.tolist() == [0, 0, 1, 1, 0, 1]
    shows.result(FEATURES, 'features of one dimension', 'After normalization they are 1 or −1: two groups.')


@pytest.mark.parametrize('x, what', [(np.ones((4, 2), complex), 'complex'), (np.array([['a', 'b']]*4), 'text'),
    (torch.ones(4, 2, dtype=torch.bool), 'boolean'), (np.full((4, 2), None), 'object')])
def test_features_that_are_no_real_numbers(shows, x, what):
    with shows.error(FEATURES, f'{what} features', 'must be real numbers'): propagate(x, np.array([0, 1, -1, -1]))


@pytest.mark.parametrize('shape', [(4,), (4, 2, 2), (4, 0)])
def test_features_of_another_shape(shows, shape):
    y = torch.tensor([0, 1, -1, -1])
    with shows.error(FEATURES, f'features of shape {shape}', 'one row per item'): propagate(torch.ones(shape), y)


CONVERSIONS = dict(float16=lambda x: x.half(), float64=lambda x: x.double(), int64=lambda x: (100*x).round().long(),
    int8=lambda x: (50*x).round().to(torch.int8), bfloat16=lambda x: x.bfloat16(), lists=lambda x: x.numpy().tolist(),
    big_endian=lambda x: x.numpy().astype('>f4'), columns_first=lambda x: np.asfortranarray(x.numpy()),
    reversed=lambda x: x.numpy()[:, ::-1], transposed=lambda x: x.T.contiguous().T)


@pytest.mark.parametrize('convert', CONVERSIONS)
def test_types_and_memory_orders(convert):
    def numbers(o): return np.asarray(o.float() if isinstance(o, torch.Tensor) else o).astype(float)
    x, y, truth = clouds()
    x = CONVERSIONS[convert](x)
    before = numbers(x)
    assert torch.equal(propagate(x, y).labels, truth)
    assert np.array_equal(before, numbers(x))


def test_read_only_arrays(shows):
    x, y, truth = (o.numpy().copy() for o in clouds())
    for o in (x, y): o.flags.writeable = False
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*not writable')
        assert np.array_equal(propagate(x, y).labels, truth)
    shows.result(FEATURES, f"features of another type or memory order ({', '.join(CONVERSIONS)}), or read-only", 'Used '
        'as float32. The input is not changed.')


@pytest.mark.parametrize('size', [1e-30, 1e-42, 1e25, 1e37])
def test_very_small_and_very_large_features(size):
    x, y, truth = clouds()
    assert torch.equal(propagate(torch.where(torch.arange(60)[:, None] % 2 == 0, x, x*size), y).labels, truth)


def test_features_too_large_for_float32(shows):
    x, y, _ = clouds()
    shows.result(FEATURES, 'features between 1e-42 and 1e37', 'Normalized like all others.')
    with shows.error(FEATURES, 'float64 features that are too large for float32', r'item\(s\) 5 are NaN, infinite or too large'):
        propagate(torch.where(torch.arange(60)[:, None] == 5, x.double()*1e300, x.double()).numpy(), y)


def test_a_component_without_label(shows):
    x, y, truth = clouds(spread=.01)
    apart = torch.cat([F.pad(x, (0, 4)), F.pad(torch.randn(20, 4), (8, 0))])
    p = propagate(apart, torch.cat([y, torch.full((20,), -1)]))
    assert torch.equal(p.labels[:60], truth)
    assert not p.reached[60:].any()
    assert (p.labels[60:] == -1).all()
    assert (p.weights[60:] == 0).all()
    message = advice(p)['reached']
    assert 'no label reaches 20 of 77' in message
    shows.result(FEATURES, 'a part of the graph has no label', 'Its items get label −1 and weight 0. If these are '
        f'more than a tenth of the unlabeled items, a fit warns: {message}')


def test_components_with_labels(shows):
    x, y, truth = clouds(90, spread=.001)
    p = propagate(x, y, k=5)
    assert torch.equal(p.labels, truth)
    assert (p.certainty > .999).all()
    shows.result(FEATURES, 'the graph is not connected, each component has labels', 'Labels spread within their '
        'component.')


# Batches

@pytest.mark.parametrize('labeled_bs', [16, 0])
def test_labeled_bs_leaves_no_place_for_a_stream(shows, data, labeled_bs):
    dls = blob_learner(data, two_stream=False).dls
    with shows.error(BATCHES, f'`labeled_bs={labeled_bs}` with `bs=16`', 'must be at least 1 and less than the batch size 16'):
        semi_dls(dls, labeled_bs)


def test_fewer_labeled_items_than_labeled_bs(shows, data):
    learn = blob_learner(data, bs=64)
    idxs = learn.dls.train.get_idxs()[:64]
    assert sum(i < 9 for i in idxs) == 32
    assert set(range(9)) <= set(idxs)
    learn.fit(1, cbs=LPCallback())
    shows.result(BATCHES, 'fewer labeled items than `labeled_bs`', 'A batch repeats them, all equally often up to a '
        'difference of one.')


def test_batches_larger_than_the_data(shows, data):
    learn = blob_learner(data, bs=1000)
    learn.fit(1, cbs=LPCallback())
    assert len(learn.dls.train) == 1
    shows.result(BATCHES, 'a batch is larger than the data, two streams', 'One batch per epoch, filled with labeled '
        'items.')
    learn = blob_learner(data, bs=1000, two_stream=False)
    before = state_of(learn)
    what = 'a batch is larger than the data, plain batches with `drop_last`'
    with shows.error(BATCHES, what, 'no batch'): learn.fit(1, cbs=LPCallback())
    assert state_of(learn) == before


def test_a_dataloader_with_an_order_of_its_own(shows, data):
    dls = blob_learner(data, two_stream=False).dls
    dls.train.get_idxs = lambda: list(range(120))
    with shows.error(BATCHES, '`semi_dls` of a DataLoader with an order of its own', 'cannot keep get_idxs'): semi_dls(dls)


# Image files and names

NAMES = 'train/größe', 'train/小 猫'


def pictures(root, labeled=NAMES, free='un labeled'):
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root/(labeled[i % 2] if i < 8 else labeled[i % 2].replace('train', 'valid') if i < 14 else free)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((80*(i % 2) + rng.integers(0, 120, (16, 16, 3))).astype('uint8')).save(folder/f'bild ñ {i}.png')
    return root


def picture_learner(root, workers=0):
    set_seed(0, reproducible=True)
    dls = SemiImageDataLoaders.from_folder(root, unlabeled='un labeled', bs=8, num_workers=workers, device='cpu')
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return quiet(Learner(dls, nn.Sequential(*layers)))


def test_names_of_all_scripts_and_with_spaces(shows, tmp_path):
    root = pictures(tmp_path/'meine Bilder')
    learn = picture_learner(root)
    learn.fit(1, cbs=[LPCallback(), ResumeCallback(root/'läuft weiter.pth')])
    picture_learner(root).fit(1, cbs=[LPCallback(), ResumeCallback(root/'läuft weiter.pth')])
    interp = LPInterpretation.from_learner(learn)
    again = LPInterpretation.load(interp.save(root/'schätzung 1.npz'))
    df = pd.read_csv(interp.to_csv(root/'für später.csv'))
    assert again.vocab == ['größe', '小 猫']
    assert set(df.label) == {'größe', '小 猫'}
    assert list(again.items) == list(df.item)
    assert df.item.str.contains('bild ñ').all()
    shows.result(IMAGES, 'non-ASCII names and spaces, in paths and classes', 'Work like any others, in all files that '
        'are read and written.')


BREAK = {'no image': lambda o: o.write_bytes(b'no image at all'), 'truncated': lambda o: o.write_bytes(o.read_bytes()[:400]),
    'empty': lambda o: o.write_bytes(b''), 'missing': lambda o: o.unlink()}


@pytest.mark.parametrize('what, workers', [(o, 0) for o in BREAK] + [('truncated', 2)])
def test_broken_images(shows, tmp_path, workers, what):
    root = pictures(tmp_path/'pics')
    file = root/'un labeled'/'bild ñ 30.png'
    learn = picture_learner(root, workers)
    BREAK[what](file)
    before, i = flat_weights(learn), [str(o) for o in learn.dls.train.items].index(str(file))
    match = rf'cannot read item\(s\) {i} of .*ñ 30.png'
    with shows.error(IMAGES, f'an image file is {what}, {workers} workers', match): learn.fit(1, cbs=LPCallback())
    assert torch.equal(before, flat_weights(learn))
    assert not any(m._forward_hooks for m in learn.model.modules())
    if what != 'missing': assert [Path(o) for o in verify_images(list(learn.dls.train.items))] == [file]


def test_an_error_of_the_model_is_no_broken_item(data):
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError('of the model')
    learn = blob_learner(data, model=nn.Sequential(Fails(), *blob_model()))
    with pytest.raises(RuntimeError, match='of the model'): Extractor()(learn)


def test_copies_of_validation_images(shows, tmp_path):
    root = pictures(tmp_path/'pics')
    original = next((root/'valid').rglob('*.png'))
    (root/'un labeled'/'copy.png').write_bytes(original.read_bytes())
    with shows.warning(IMAGES, 'an unlabeled image is a copy of a validation image', 'copies of validation images', 'It trains.'):
        picture_learner(root)


def test_a_row_without_file_name(shows, tmp_path):
    df = pd.DataFrame(dict(name=['1.png', None], label=['a', None]))
    with shows.error(IMAGES, 'a row has no file name', 'have no file name'): SemiImageDataLoaders.from_df(df, tmp_path)


def test_a_validation_column_of_texts(shows, tmp_path):
    df = pd.DataFrame(dict(name=['1.png', '2.png'], label=['a', None], valid=['yes', 'no']))
    with shows.error(IMAGES, 'the column of the validation set has no booleans', 'must hold True and False'):
        SemiImageDataLoaders.from_df(df, tmp_path, valid_col='valid')


# Labeling

@pytest.fixture
def pets(tmp_path): return picture_learner(pictures(tmp_path/'pets', ('train/cat', 'train/dog'))).dls


def interp_of(dls, vocab=('cat', 'dog')):
    "Pseudo-labels of these items from two groups of points"
    x, y, _ = clouds(len(dls.train_ds), c=2)
    return LPInterpretation(propagate(x, y), items=item_names(dls.train), vocab=vocab, dl=dls.train)


PET = 'un labeled/bild ñ 30.png'
MISTAKES = {
    'items that are not in the training set': (f'item,label\n{PET},cat\n30.png,cat\ny.png,dog\n',
        r"items that are not in the training set: '30.png', 'y.png'\. Expected names as in .*, such as '.*png'"),
    'an item of the validation set': ('item,label\nvalid/cat/bild ñ 8.png,dog\n', 'items of the validation set, .*ñ 8.png.*Remove'),
    'two labels for an item': (f'item,label\n{PET},cat\n{PET},dog\n', "different labels for the item .*: 'cat' and 'dog'"),
    'a label that is no class': (f'item,label\n{PET},dgo\n',
        r"'dgo' of the item .* is not a class \(did you mean 'dog'\?\): expected 'cat', 'dog'. Correct"),
    'semicolons instead of commas': (f'item;label\n{PET};cat\n', r"has the columns \['item;label'\]"),
    'a table of pseudo-labels': (f'item,label,certainty\n{PET},cat,.5\n', 'is a table of pseudo-labels')}


@pytest.mark.parametrize('what', MISTAKES)
def test_labels_that_are_refused(shows, pets, tmp_path, what):
    before, (text, match) = targets_of(pets.train).tolist(), MISTAKES[what]
    (tmp_path/'labels.csv').write_text(text, encoding='utf-8')
    with shows.error(LABELING, f'`relabel`: {what}', match): relabel(pets, tmp_path/'labels.csv')
    assert targets_of(pets.train).tolist() == before


def test_a_file_of_labels_that_does_not_exist(shows, pets, tmp_path):
    with shows.error(LABELING, '`relabel`: the file does not exist', 'there is no file', FileNotFoundError):
        relabel(pets, tmp_path/'labels.csv')


def test_a_page_with_items_that_cannot_be_read(shows, pets, tmp_path):
    interp, root = interp_of(pets), tmp_path/'pets'/'un labeled'
    BREAK['missing'](root/'bild ñ 20.png')
    BREAK['no image'](root/'bild ñ 30.png')
    match, then = r'2 of \d+ items cannot be read', 'The page is written.'
    with shows.warning(LABELING, '`to_html`: items cannot be read', match, then): page = interp.to_html(tmp_path/'label.html')
    data = json.loads(page.read_text(encoding='utf-8').split('id="data">')[1].split('</script>')[0])
    noted = {o['name']: o['note'] for o in data['items'] if 'note' in o}
    assert noted == {str(root/f'bild ñ {i}.png'): 'This item cannot be read.' for i in (20, 30)}


def test_classes_with_the_same_text(shows, pets, tmp_path):
    with shows.error(LABELING, "`to_html`: classes 1 and '1'", "two classes have the same text '1'"):
        interp_of(pets, [1, '1']).to_html(tmp_path/'label.html')
    assert not (tmp_path/'label.html').exists()


def test_another_export_of_label_studio(shows, tmp_path):
    (file := tmp_path/'export.csv').write_text('image,choice\n/data/local-files/?d=1.png,cat\n')
    with shows.error(LABELING, '`labels_from_label_studio`: an export as CSV', 'is not JSON'): labels_from_label_studio(file)


def test_annotators_who_disagree(shows, tmp_path):
    result = [[dict(type='choices', from_name='label', value=dict(choices=[o]))] for o in ('cat', 'dog')]
    tasks = [dict(id=7, data=dict(item='1.png'), annotations=[dict(completed_by=i, result=o) for i, o in enumerate(result, 1)])]
    (tmp_path/'export.json').write_text(json.dumps(tasks))
    match = r"annotators disagree: '1.png': 'cat' \(annotator 1\), 'dog' \(annotator 2\)"
    with shows.error(LABELING, '`labels_from_label_studio`: annotators disagree', match): labels_from_label_studio(tmp_path/'export.json')


# Damaged or changed files

def saved_pseudo_labels(path):
    x, y, _ = clouds(30)
    return propagate(x, y).save(path)


def test_damaged_pseudo_labels(shows, tmp_path):
    file = saved_pseudo_labels(tmp_path/'p.npz')
    intact = file.read_bytes()
    for i in range(0, len(intact), 101):
        for damaged in (intact[:i], intact[:i] + bytes([intact[i] ^ 64]) + intact[i+1:]):
            file.write_bytes(damaged)
            for load in (PseudoLabels.load, LPInterpretation.load):
                with pytest.raises(ValueError, match='p.npz is truncated, damaged'): load(file)
    with shows.error(FILES, 'saved pseudo-labels: truncated, or one bit wrong', 'truncated, damaged'): PseudoLabels.load(file)


ARRAYS = dict(labels=lambda o: np.full(30, 7), certainty=lambda o: np.zeros(30), class_weights=lambda o: np.float32(1),
    W_col=lambda o: np.full(o.shape, 10**6), W_crow=lambda o: np.arange(31)[::-1].copy(),
    labeled=lambda o: np.zeros((30, 2), bool), Z=lambda o: np.zeros((30, 9), np.float32), reached=None)


@pytest.mark.parametrize('name', ARRAYS)
def test_arrays_that_contradict_each_other(shows, tmp_path, name):
    file = saved_pseudo_labels(tmp_path/'p.npz')
    arrays = read_npz(file)
    if ARRAYS[name] is None: del arrays[name]
    else: arrays[name] = ARRAYS[name](arrays[name])
    with atomic_write(file, checksum=True) as f: np.savez_compressed(f, **arrays)
    if name == 'labels':
        with shows.error(FILES, 'saved pseudo-labels: invalid arrays', 'labels must be'): PseudoLabels.load(file)
    else:
        with pytest.raises(ValueError, match='p.npz does not hold pseudo-labels'): PseudoLabels.load(file)


class Bomb:
    def __reduce__(self): return os.system, ('touch executed',)


def test_pickles_are_not_executed(shows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = read_npz(saved_pseudo_labels('p.npz'))
    with atomic_write('p.npz', checksum=True) as f: np.savez(f, **{**arrays, 'labels': np.array([Bomb()]*30, dtype=object)})
    with shows.error(FILES, 'saved pseudo-labels: a pickle', 'not a complete .npz file of plain arrays'): PseudoLabels.load('p.npz')
    with atomic_write('run.pth', checksum=True) as f: torch.save(dict(epoch=1, model=Bomb()), f)
    with shows.error(FILES, 'file of `ResumeCallback`: a pickle', 'more than tensors, numbers and strings'):
        blob_learner().fit(1, cbs=ResumeCallback('run.pth'))
    Path('p.npz').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='truncated, damaged'): LPInterpretation.load('p.npz')
    assert not Path('executed').exists()
    pickle.loads(Path('p.npz').read_bytes())
    assert Path('executed').exists()  # the test would notice


def test_damaged_resume_file(shows, tmp_path):
    def fit(learn): learn.fit(2, cbs=[LPCallback(), ResumeCallback(tmp_path/'run.pth')])
    fit(blob_learner())
    intact = (tmp_path/'run.pth').read_bytes()
    learn = blob_learner(seed=3)
    for i in range(0, len(intact), len(intact)//10):
        for damaged in (intact[:i], intact[:i] + bytes([intact[i] ^ 1]) + intact[i+1:]):
            (tmp_path/'run.pth').write_bytes(damaged)
            assert_unchanged(learn, lambda: fit(learn), 'run.pth is truncated, damaged')
            assert (tmp_path/'run.pth').read_bytes() == damaged
    with shows.error(FILES, 'file of `ResumeCallback`: truncated, or one bit wrong', 'truncated, damaged'): fit(learn)


def test_resume_file_of_another_layout(shows, tmp_path):
    with atomic_write(tmp_path/'run.pth', checksum=True) as f: torch.save(dict(epoch=1), f)
    learn = blob_learner()
    with shows.error(FILES, 'file of `ResumeCallback`: from another version', 'was not written by this version'):
        learn.fit(1, cbs=ResumeCallback(tmp_path/'run.pth'))


def test_damaged_results(shows, tmp_path):
    line = (Path(__file__).parents[1]/'benchmarks'/'results'/'digits.jsonl').read_text().splitlines()[0]
    file, run = tmp_path/'digits.jsonl', {k: v for k, v in json.loads(line).items() if k != 'sha256'}
    for i in range(2): append_json_line(file, run | dict(name=f'run{i}'))
    intact = file.read_text()
    with open(file, 'a') as f: f.write(intact[:100])
    with shows.warning(FILES, 'results of `lp_train`: an incomplete last line', 'ignored the last line', 'The others are read.'):
        assert len(read_lines(file)) == 2
    file.write_text(intact.replace('"error_rate": ', '"error_rate": 1'))
    with shows.error(FILES, 'results of `lp_train`: an edited number', 'line 1 is damaged or was edited'): read_lines(file)
    file.write_text(intact[:50] + intact[60:])
    with pytest.raises(ValueError, match='line 1: this is not JSON|line 1 is damaged'): read_lines(file)


# Interrupted or failed fits (see also test_no_trace.py)

def test_a_tracker_on_a_column_that_does_not_exist(shows, learn):
    stop = EarlyStoppingCallback(monitor='lp_accuracy')
    with shows.error(STOPPED, 'a tracker on `lp_accuracy`, without `truth=`', 'is not a column of this fit'):
        learn.fit(1, cbs=[LPCallback(), stop])


@pytest.mark.parametrize('error', [RuntimeError('mine'), CancelFitException()], ids=['error', 'cancelled'])
def test_another_callback_ends_the_fit(shows, error):
    learn, ours = blob_learner(), [LPCallback(), MeanTeacherCallback()]
    before = state_of(learn)
    try: learn.fit(2, cbs=[*ours, Break(error, 'after_loss')])
    except RuntimeError as e: assert 'mine' in str(e)
    assert state_of(learn) == before
    learn.fit(1, cbs=ours)
    assert torch.isfinite(flat_weights(learn)).all()
    if isinstance(error, RuntimeError):
        shows.result(STOPPED, 'another callback raises an error, at any event', 'Loss, metrics, hooks, data and '
            'callbacks are as before the fit. The weights are those of the last step. The next fit works.')
    else: shows.result(STOPPED, 'another callback cancels a batch, an epoch or the fit', 'As usual in fastai. Loss, '
        'metrics, hooks, data and callbacks are as before the fit.')


def test_the_same_callback_twice(shows, tmp_path):
    learn = blob_learner(cbs=[LPCallback(), MeanTeacherCallback(), ResumeCallback(tmp_path/'run.pth')])
    what = '`LPCallback`, `MeanTeacherCallback` or `ResumeCallback` is in a fit twice'
    with shows.error(STOPPED, what, 'LPCallback is in the fit twice'): learn.fit(1, cbs=LPCallback())
    assert not list(tmp_path.iterdir())
    learn.fit(1)


def test_fine_tune_with_other_settings(shows, tmp_path):
    def tune(lr): blob_learner().fine_tune(1, lr, cbs=[LPCallback(), ResumeCallback(tmp_path/'run.pth')])
    tune(1e-2)
    with shows.error(FILES, 'file of `ResumeCallback`: `fine_tune` with another learning rate', 'lr up to 0.01 in the file'): tune(1e-3)


PLACES = {'features are extracted': lambda m, stop: m.hooks.append(lambda training: None if training else stop()),
    'neighbors are searched': lambda m, stop: m.setattr('fastai_lp.transductive.propagate.search', stop),
    'labels are propagated': lambda m, stop: m.setattr('fastai_lp.transductive.propagate.diffuse', stop),
    'a step is made': lambda m, stop: m.hooks.append(lambda training: stop() if training else None),
    'a file is written': lambda m, stop: m.setattr(torch, 'save', lambda o, f: f.write(b'half') and stop())}


@pytest.mark.parametrize('where', PLACES)
def test_ctrl_c(shows, where, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    learn = blob_learner()
    before, monkeypatch.hooks = state_of(learn), []
    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**7): pass  # until the signal arrives
    def forward_hook(m, *args):
        for hook in monkeypatch.hooks: hook(m.training)
    PLACES[where](monkeypatch, stop)
    handle = learn.model[2].register_forward_hook(forward_hook)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[LPCallback(), ResumeCallback(tmp_path/'run.pth')])
    monkeypatch.undo()
    handle.remove()
    assert state_of(learn) == before
    assert not list(tmp_path.iterdir())
    learn.fit(1, cbs=LPCallback())
    shows.result(STOPPED, f'Ctrl-C while {where}', 'The fit stops. The Learner is as before, except for the steps '
        'that were made. No incomplete file is left.')


@pytest.mark.slow
def test_killed_again_and_again(shows):
    "The script of the docs, with two kills at random moments and one at each of ten places"
    script = Path(__file__).parents[1]/'benchmarks'/'kills.py'
    args = [sys.executable, '-W', 'ignore', script, '--kills', '2', '--places', '1', '--epochs', '1']
    res = subprocess.run(args, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert res.returncode == 0, res.stdout + res.stderr
    assert '2 kills' in res.stdout
    assert res.stdout.count('killed 1 times, 0 lost or different') == 10
    shows.result(STOPPED, '`kill -9` at random moments, and at ten places of an epoch', 'With `ResumeCallback`, the files of a '
        'run that is restarted until it ends are bitwise those of a run that was never killed.')


# No space left

def limited(code, **kwargs):
    "What a program prints that limits its own files or memory"
    folder, env = str(Path(__file__).parent), {**os.environ, 'OMP_NUM_THREADS': '1'}
    code = f"import resource, sys, warnings\nsys.path.insert(0, {folder!r})\nwarnings.simplefilter('ignore')\n{code}"
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, **kwargs)


@linux
def test_disk_full_before_the_first_epoch(shows, tmp_path):
    res = limited("""
from conftest import *
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.resume import ResumeCallback
learn = blob_learner()
before = flat_weights(learn)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: learn.fit(1, cbs=[LPCallback(), ResumeCallback('run.pth')])
except OSError as e: print(e)
assert torch.equal(before, flat_weights(learn))
""", cwd=tmp_path)
    with shows.error(SPACE, '`ResumeCallback`: the disk is full before the first epoch', 'nothing was written', OSError):
        raise OSError(res.stdout.strip() or res.stderr)
    assert not list(tmp_path.iterdir())


@linux
def test_disk_full_later(shows, tmp_path):
    res = limited("""
from conftest import *
from fastai.callback.core import Callback
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.resume import ResumeCallback
class Fill(Callback):
    order = 90
    def after_epoch(self):
        limit = 1000 if self.epoch in (1, 2) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
def run(epochs, *cbs):
    learn = blob_learner()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn.fit(epochs, cbs=[LPCallback(), *cbs])
    return learn, [str(o.message) for o in w if 'run.pth' in str(o.message)]
a, _ = run(4)
b, messages = run(4, Fill(), ResumeCallback('run.pth'))
assert torch.equal(flat_weights(a), flat_weights(b))
assert len(messages) == 2, messages
print(torch.load('run.pth', weights_only=True)['epoch'], messages[0], sep='|')
""", cwd=tmp_path)
    epoch, message = res.stdout.strip().split('|') if res.stdout else pytest.fail(res.stderr)
    assert epoch == '4'
    assert 'The training continues, and the next epoch tries again' in message
    assert [o.name for o in tmp_path.iterdir()] == ['run.pth']
    shows.result(SPACE, '`ResumeCallback`: the disk becomes full during a fit', 'The training continues, and the last '
        f'complete file stays. Warning: {message}')


@linux
def test_folder_that_is_not_writable(shows, tmp_path, data):
    learn = blob_learner(data)
    before = state_of(learn), flat_weights(learn)
    with shows.error(SPACE, '`ResumeCallback`: the folder is not writable', 'Choose a path in a writable folder', OSError):
        learn.fit(1, cbs=[LPCallback(), ResumeCallback('/proc/run.pth')])
    assert state_of(learn) == before[0]
    assert torch.equal(before[1], flat_weights(learn))
    learn.fit(1, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    with shows.error(SPACE, '`to_html`: the folder is not writable', 'nothing was written', OSError): interp.to_html('/proc/label.html')
    for save in (learn.lp_record.pseudo.save, interp.save, interp.to_csv):
        with pytest.raises(OSError, match='nothing was written'): save('/proc/labels.npz')
    (tmp_path/'a').write_text('a file')
    with pytest.raises(OSError, match='nothing was written'): interp.save(tmp_path/'a'/'b.npz')


@linux
def test_disk_full_while_a_page_is_written(shows, tmp_path):
    (tmp_path/'label.html').write_text('the previous page')
    res = limited("""
from conftest import *
from fastai_lp.interpret import LPInterpretation
from fastai_lp.transductive.propagate import propagate
interp = LPInterpretation(propagate(torch.eye(2).repeat(9, 1), [0, 1] + 16*[-1], k=3))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: interp.to_html('label.html')
except OSError as e: print(e)
""", cwd=tmp_path)
    with shows.error(SPACE, '`to_html`: the disk is full', 'the previous file is unchanged', OSError):
        raise OSError(res.stdout.strip() or res.stderr)
    assert [o.read_text() for o in tmp_path.iterdir()] == ['the previous page']


def test_no_space_for_features(shows, data, monkeypatch):
    "The space is reserved, because a memory map on a full disk would kill the process"
    def full(fd, start, size): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    learn = blob_learner(data)
    before = state_of(learn)
    with shows.error(SPACE, 'no disk space for features that exceed `max_bytes`', 'TMPDIR', OSError):
        learn.fit(1, cbs=LPCallback(features=Extractor(max_bytes=100)))
    assert state_of(learn) == before


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), MemoryError(),
    RuntimeError('Error in void* faiss::gpu::StandardGpuResourcesImpl::allocMemory: out of memory'), RuntimeError('std::bad_alloc'),
    RuntimeError("can't start new thread")], ids=['torch', 'Python', 'faiss', 'C++', 'threads'])
@pytest.mark.parametrize('where', ['search', 'affinity', 'diffuse'])
def test_out_of_memory(shows, data, error, where, monkeypatch):
    learn = blob_learner(data)
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(f'fastai_lp.transductive.propagate.{where}', fail)
    assert_unchanged(learn, lambda: learn.fit(1, cbs=LPCallback()), None, type(error))
    note = [o for o in error.__notes__ if o.startswith('LPCallback')][-1]
    assert 'pseudo-labels for 120 items with 16 feature dimensions and 3 classes need about' in note
    error.__notes__ = []
    monkeypatch.undo()
    learn.fit(1, cbs=LPCallback())
    if 'CUDA' in str(error) and where == 'affinity':
        shows.result(SPACE, 'no memory for neighbors, graph or diffusion, on a CPU or a GPU', 'The error of torch, '
            f'NumPy or FAISS, with a note: {note}')


@pytest.mark.slow
@linux
@pytest.mark.parametrize('room', [40, 60, 80, 100])
def test_a_process_without_memory(room, tmp_path):
    "torch, NumPy and FAISS report it in different ways, and OpenBLAS would end the process"
    res = limited(f"""
import torch
from fastai_lp.transductive.advice import memory_advice
from fastai_lp.transductive.labelers import Diffusion
from fastai_lp.transductive.propagate import propagate
x = torch.randn(40_000, 16)
y = torch.where(torch.arange(40_000) < 10, torch.arange(40_000), -1)
propagate(x[:500], y[:500])
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room}_000_000, resource.RLIM_INFINITY))
for i in range(2):
    try:
        with memory_advice(40_000, 16, 10, Diffusion()): Diffusion()(x, torch.zeros(40_000, 10), y)
    except Exception as e: print(type(e).__name__, e.__notes__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(propagate(x[:5000], y[:5000]).labels.shape)
""", cwd=tmp_path)
    assert res.stdout.count('LPCallback: pseudo-labels for 40000 items') == 2, res.stdout + res.stderr
    assert 'torch.Size([5000])' in res.stdout


def test_the_table_in_the_docs_is_what_these_tests_saw(request, table):
    found, there = table
    ran = {o.name for o in request.session.items if o.path == request.node.path}
    assert len(found) > 0
    assert [o for o in there if o['test'] in ran] == found, 'the table is out of date: pytest tests/test_faults.py --write-faults'
    assert not {o['test'].split('[')[0] for o in there} - set(globals())
