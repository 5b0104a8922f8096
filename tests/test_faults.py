"Faults and bad input: nothing is lost, nothing is left half-changed, and the message says what to do. The docs' table is made of what these tests see."
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
from fastai.callback.core import CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.utils import verify_images
from PIL import Image
from torch import nn

import fastai_lp.utils.files
from conftest import Look, blob_learner, blob_model, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize
from fastai_lp.learner.streams import semi_dls
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.experiments.results import read_lines
from fastai_lp.learner.features import Extractor
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.propagate import propagate
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.learner.resume import ResumeCallback
from test_callback import Break, traceless

LABELS, DESCRIPTORS, BATCHES, IMAGES, FILES, STOPPED, ROOM = ('Labels', 'Descriptors and graph', 'Batches', 'Image files and names', 'Files that were damaged or changed',
    'Stopped or failed in the middle', 'No room left')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='limits of a process as Linux has them')


def clouds(n=60, d=8, c=3, per_class=1, seed=0, spread=.1):
    "(x, y with `per_class` labels of each class shown, truth)"
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % c
    x = (torch.eye(c, d) if c <= d else F.normalize(torch.randn(c, d, generator=g)))[truth] + spread*torch.randn(n, d, generator=g)
    return x, torch.where(torch.arange(n) < c*per_class, truth, -1), truth


def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)


# Labels

def test_no_label(shows, data):
    x, y, _ = clouds()
    with shows.error(LABELS, 'no item is labeled, arrays', 'no item is labeled'): propagate(x, torch.full_like(y, -1))
    data.labels = [None]*120 + data.labels[120:]
    with shows.error(LABELS, 'no item is labeled, `DataLoaders` of two streams', 'none of the 120'): blob_learner(data)
    learn = blob_learner(data, two_stream=False, cbs=LPCallback())
    with pytest.raises(ValueError, match='no item is labeled'): learn.fit(1)
    traceless(learn)


def test_a_class_without_label(shows, data):
    x, y, _ = clouds()
    with shows.error(LABELS, 'a class has no label, arrays', 'class 2 has no labeled item'): propagate(x, torch.where(y == 2, -1, y), 3)
    data.labels = [None if o == 1 and i < 120 else o for i, o in enumerate(data.labels)]
    learn = blob_learner(data, cbs=LPCallback())
    with shows.error(LABELS, 'a class has no label, in a fit', 'class 1 has no labeled item'): learn.fit(1)
    traceless(learn)


def test_one_label_in_all(shows):
    x, y, _ = clouds()
    y = torch.where(torch.arange(60) == 7, 0, -1)
    p = propagate(x, y)
    assert (p.labels[p.reached] == 0).all() and (p.certainty[p.reached] == 1).all() and 0 < p.reached.sum() < 60 and (p.weights[~p.reached] == 0).all()
    shows.result(LABELS, 'one label in all, so one class', 'Every item that the label reaches gets it, with certainty 1; an item that it does not reach has label −1 and weight 0.')
    with pytest.raises(ValueError, match='class 1, 2 has no labeled item'): propagate(x, y, 3)


@pytest.mark.parametrize('y, what, match', [
    ([0, 1, 5], 'a label is out of range', 'label 5 is out of range'), ([0., 1., -1.], 'labels are floats', 'torch.float'),
    ([[0], [1], [-1]], 'labels have two dimensions', r'shape \(3, 1\)'), ([True, False, True], 'labels are booleans', 'torch.bool'), ([0, 1], 'a label is lacking', '2 labels for 3 items')])
def test_labels_that_are_none(shows, y, what, match):
    with shows.error(LABELS, what, match): propagate(torch.eye(3), torch.tensor(y), 2)


def test_a_label_outside_the_vocab(shows):
    with shows.error(LABELS, 'a label is not in the vocab', "label 'bird' is not in the vocab", KeyError): SemiCategorize(vocab=['cat', 'dog']).encodes('bird')


def test_outputs_and_classes_differ(shows, data):
    learn = blob_learner(data, model=blob_model(c=5), cbs=LPCallback())
    before = state_of(learn)
    with shows.error(LABELS, 'the model has another number of outputs than there are classes', 'no nn.Linear with 3 outputs'): learn.fit(1)
    assert state_of(learn) == before


@pytest.mark.parametrize('labels', [['1', 1, None, '2'], [1, None, 'two'], ['a', Path('a'), None]], ids=str)
def test_labels_of_mixed_types(shows, labels):
    with shows.error(LABELS, f'labels {labels}', 'the labels are of mixed types'): Datasets(range(len(labels)), [[], [Look(labels), SemiCategorize()]])


def test_labels_of_one_kind_are_not_mixed():
    for labels in ([1, np.int64(2), None, 3., float('nan')], ['a', np.str_('b'), None, '']): assert len(Datasets(range(len(labels)), [[], [Look(labels), SemiCategorize()]]).vocab) == (3 if labels[0] == 1 else 2)


def test_all_labeled(shows, data):
    x, _, truth = clouds()
    p = propagate(x, truth)
    assert torch.equal(p.labels, truth) and (p.certainty == 1).all() and np.isnan(p.accuracy(truth))
    shows.result(LABELS, 'all items are labeled, arrays', 'The labels as given, with certainty 1.')
    data.labels = [int(o) for o in data.truth]
    with shows.error(LABELS, 'all items are labeled, `DataLoaders`', 'all 120 training items are labeled'): blob_learner(data)
    learn = blob_learner(data, two_stream=False, cbs=LPCallback())
    with pytest.raises(ValueError, match='all 120'): learn.fit(1)
    traceless(learn)


@pytest.mark.parametrize('two_stream', [True, False])
def test_one_unlabeled_item(shows, data, two_stream):
    data.labels = [None if i == 50 else int(o) for i, o in enumerate(data.truth)]
    learn = blob_learner(data, two_stream=two_stream)
    learn.fit(3, 1e-2, cbs=LPCallback())
    p = learn.lp_record.pseudo
    assert (~p.labeled).nonzero().flatten().tolist() == [50] and p.labels[50] == data.truth[50]
    if two_stream: assert len(learn.dls.train) == 1
    shows.result(LABELS, f"one unlabeled item, {'two streams' if two_stream else 'plain batches'}", 'It is trained with its pseudo-label. ' + (
        'An epoch is one pass over the unlabeled items, so it has one batch.' if two_stream else 'An epoch is one pass over all items.'))


def test_very_unequal_classes(shows):
    g = torch.Generator().manual_seed(0)
    truth = torch.tensor([0]*4000 + [1]*4)
    x = torch.tensor([1., -1])[truth, None] + .1*torch.randn(4004, 16, generator=g)
    y = torch.full((4004,), -1)
    y[[0, 4000]] = torch.tensor([0, 1])
    p = propagate(x, y, 2)
    assert (p.labels == truth).float().mean() == 1
    assert p.class_weights[1] == pytest.approx(1000*p.class_weights[0]) and p.weights[truth == 1].sum() > .5*p.weights[truth == 0].sum()
    shows.result(LABELS, 'classes of 4,000 and 4 items, one label each', 'Both are found where they lie apart, and ζ gives both the same weight in the loss: an item of the rare class weighs a thousand times as much.')


def test_hundreds_of_classes(shows):
    x, y, truth = clouds(3000, 64, 300, spread=.03)
    p, thrifty = propagate(x, y), propagate(x, y, keep_Z=False)
    assert p.Z.shape == (3000, 300) and p.accuracy(truth) > .99 and torch.equal(p.labels, thrifty.labels) and thrifty.Z is None
    data = blobs(1000, 32, 200, 1, 200)
    learn = blob_learner(data)
    learn.fit(1, cbs=LPCallback())
    assert len(learn.lp_record.pseudo.class_weights) == 200
    shows.result(LABELS, 'hundreds of classes', 'The same as with a few; `keep_Z=False` does without the n × c scores.')


def test_truth_that_does_not_fit(shows, data):
    for what, truth, match in (('`truth=` has another length', data.truth[:50], 'truth has shape'), ('`truth=` contradicts a known label', data.truth[:120].roll(1), 'truth contradicts the known label'),
        ('`truth=` names an unknown class', ['zebra']*120, "names the class 'zebra'")):
        learn = blob_learner(data)
        with shows.error(LABELS, what, match): learn.fit(1, cbs=LPCallback(truth=truth))
        traceless(learn)


# Descriptors and graph

def test_fewer_items_than_neighbours(shows):
    x, y, truth = clouds(6, per_class=1)
    with shows.warning(DESCRIPTORS, 'fewer items than k', 'k=50 is not below', 'The graph has the neighbours that there are.'): p = propagate(x, y, k=50)
    assert torch.equal(p.labels, truth)


def test_two_items_and_one(shows):
    p = propagate(torch.tensor([[1., 0], [1, .1]]), torch.tensor([0, -1]))
    assert p.labels.tolist() == [0, 0] and p.W.to_dense()[0, 1] == p.W.to_dense()[1, 0] > 1.9
    shows.result(DESCRIPTORS, 'two items', 'One edge, and the label goes over it.')
    with shows.error(DESCRIPTORS, 'one item', 'at least 2 items'): propagate(torch.ones(1, 3), torch.tensor([0]))


@pytest.mark.parametrize('like_others', [True, False])
@pytest.mark.parametrize('index', ['auto', 'HNSW16'])
def test_thousands_of_duplicates(shows, like_others, index):
    x, y, truth = clouds(300, spread=.05)
    copies = x[4:5] if like_others else -torch.ones(1, 8)
    x, y, truth = torch.cat([x, copies.repeat(3000, 1)]), torch.cat([y, torch.full((3000,), -1)]), torch.cat([truth, torch.ones(3000, dtype=torch.int64)])
    p = propagate(x, y, index=index)
    assert torch.isfinite(p.weights).all() and (p.weights[~p.reached] == 0).all()
    if index == 'HNSW16':
        assert p.W.values().min() > 0 and (like_others or not p.reached[300:].any())
        if not like_others: shows.result(DESCRIPTORS, '3,000 copies of one item, and an approximate index (`HNSW…`, `IVF…`)', "The index can lose other items in the crowd, so that they get no label or a wrong one. Remove copies first, or take index='Flat', which misses none.")
        return
    assert p.reached[300:].all() == like_others == p.reached[300:].any() and p.reached[:300].all() and (p.labels == truth)[p.reached].float().mean() > .97
    if not like_others: assert 'no label reaches' in advice(p)['reached']
    shows.result(DESCRIPTORS, f"3,000 copies of one item, {'which others are like' if like_others else 'which no other is like'}, none of them labeled", 'They are the nearest neighbours of each other. ' + (
        'The label of the others reaches all of them.' if like_others else 'No label reaches them: label −1, weight 0, and a fit warns of it. One label among them reaches all.'))
    if not like_others:
        y[300] = 1
        assert (propagate(x, y).labels[300:] == 1).all()


def test_constant_descriptors(shows):
    y = torch.where(torch.arange(200) < 3, torch.arange(200) % 3, -1)
    p = propagate(torch.ones(200, 5), y)
    assert torch.isfinite(p.Z).all() and torch.isfinite(p.weights).all() and (p.certainty >= 0).all() and torch.equal(p.labels[:3], y[:3])
    data = blobs()
    data.x[:] = 1.
    learn = blob_learner(data)
    with pytest.warns(UserWarning, match='mean certainty|takes over|no label reaches'): learn.fit(2, cbs=LPCallback())
    assert torch.isfinite(flat_weights(learn)).all()
    shows.result(DESCRIPTORS, 'all descriptors are the same', 'Pseudo-labels mean nothing, and all numbers are finite. A fit warns of low certainty, that one class takes over, or that no label reaches items, whichever is the case.')


def test_zero_vectors(shows):
    x, y, truth = clouds()
    x[[10, 20]] = 0
    p = propagate(x, y)
    assert (~p.reached).nonzero().flatten().tolist() == [10, 20] and p.labels[10] == -1 and p.weights[10] == 0 and (p.W.to_dense()[10] == 0).all()
    assert (p.labels == truth)[p.reached].all()
    shows.result(DESCRIPTORS, 'a descriptor of zeros', 'It is similar to nothing and has no edge: label −1, weight 0 (a labeled one keeps its label, and spreads it to nobody).')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_descriptors_that_are_not_finite(shows, data, value):
    x, y, _ = clouds()
    x[[3, 7]] = value
    with shows.error(DESCRIPTORS, f'a descriptor holds {value}, arrays', r'features of item\(s\) 3, 7 are NaN'): propagate(x, y)
    data.x[33, 2] = value
    learn = blob_learner(data, cbs=LPCallback())
    before = flat_weights(learn)
    with pytest.raises(ValueError, match=r'item\(s\) 33 are NaN'): learn.fit(1)
    assert torch.equal(before, flat_weights(learn))
    traceless(learn)


def test_one_dimension(shows):
    x, y = torch.tensor([[1.], [2.], [-3.], [-4.], [5.], [-6.]]), torch.tensor([0, -1, 1, -1, -1, -1])
    assert propagate(x, y).labels.tolist() == [0, 0, 1, 1, 0, 1]
    shows.result(DESCRIPTORS, 'descriptors of one number', 'Normalised they are 1 and −1: two groups.')


@pytest.mark.parametrize('x, what', [(np.ones((4, 2), complex), 'complex'), (np.array([['a', 'b']]*4), 'text'), (torch.ones(4, 2, dtype=torch.bool), 'boolean'), (np.full((4, 2), None), 'object')])
def test_descriptors_that_are_no_numbers(shows, x, what):
    with shows.error(DESCRIPTORS, f'{what} descriptors', 'must be real numbers'): propagate(x, np.array([0, 1, -1, -1]))


@pytest.mark.parametrize('shape', [(4,), (4, 2, 2), (4, 0)])
def test_descriptors_of_another_shape(shows, shape):
    with shows.error(DESCRIPTORS, f'descriptors of shape {shape}', 'one row per item'): propagate(torch.ones(shape), torch.tensor([0, 1, -1, -1]))


@pytest.mark.parametrize('convert', [lambda x: x.half(), lambda x: x.double(), lambda x: (100*x).round().long(), lambda x: (50*x).round().to(torch.int8), lambda x: x.bfloat16(),
    lambda x: x.numpy().astype('>f4'), lambda x: np.asfortranarray(x.numpy()), lambda x: x.numpy()[:, ::-1], lambda x: x.T.contiguous().T, lambda x: x.numpy().tolist()],
    ids=['float16', 'float64', 'int64', 'int8', 'bfloat16', 'big-endian', 'columns first', 'reversed', 'transposed', 'lists'])
def test_numbers_of_other_types_and_orders(shows, convert, request):
    x, y, truth = clouds()
    odd = convert(x)
    kept = odd.clone() if isinstance(odd, torch.Tensor) else np.array(odd)
    assert torch.equal(propagate(odd, y).labels, truth) and np.array_equal(np.asarray(kept.float() if isinstance(kept, torch.Tensor) else kept), np.asarray(odd.float() if isinstance(odd, torch.Tensor) else odd))
    shows.result(DESCRIPTORS, f'descriptors: {request.node.callspec.id}', 'Taken as float32; what was given is not changed.')


def test_read_only_arrays(shows):
    x, y, truth = (o.numpy().copy() for o in clouds())
    for o in (x, y): o.flags.writeable = False
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*not writable')
        assert np.array_equal(propagate(x, y).labels, truth)
    shows.result(DESCRIPTORS, 'read-only arrays', 'Taken as they are.')


@pytest.mark.parametrize('size', [1e-30, 1e-42, 1e25, 1e37])
def test_numbers_at_the_ends_of_float32(shows, size):
    x, y, truth = clouds()
    mixed = torch.where(torch.arange(60)[:, None] % 2 == 0, x, x*size)
    assert torch.equal(propagate(mixed, y).labels, truth)
    shows.result(DESCRIPTORS, f'descriptors of size {size}', 'Normalised like all others.')
    with shows.error(DESCRIPTORS, 'float64 descriptors beyond float32', r'item\(s\) 5 are NaN, infinite or too large') if size == 1e37 else warnings.catch_warnings():
        if size == 1e37: propagate(torch.where(torch.arange(60)[:, None] == 5, x.double()*1e300, x.double()).numpy(), y)


def test_unlabeled_component(shows):
    x, y, truth = clouds(spread=.01)
    apart = torch.cat([F.pad(x, (0, 4)), F.pad(torch.randn(20, 4), (8, 0))])
    p = propagate(apart, torch.cat([y, torch.full((20,), -1)]))
    assert torch.equal(p.labels[:60], truth) and not p.reached[60:].any() and (p.labels[60:] == -1).all() and (p.weights[60:] == 0).all()
    said = advice(p)['reached']
    assert 'no label reaches 20 of 77' in said
    shows.result(DESCRIPTORS, 'part of the graph has no label', f'Its items have label −1 and weight 0. Where it is more than a tenth of the unlabeled items, a fit warns: {said}')


def test_graph_in_pieces(shows):
    x, y, truth = clouds(90, spread=.001)
    p = propagate(x, y, k=5)
    assert torch.equal(p.labels, truth) and (p.certainty > .999).all()
    shows.result(DESCRIPTORS, 'the graph falls into pieces, each with labels', 'Each piece is solved with its own labels; the others do not know of it.')


# Batches

@pytest.mark.parametrize('labeled_bs', [16, 20, 0])
def test_no_room_for_both_streams(shows, data, labeled_bs):
    dls = blob_learner(data, two_stream=False).dls
    with shows.error(BATCHES, f'`labeled_bs={labeled_bs}` with `bs=16`', 'must be at least 1 and less than the batch size 16'): semi_dls(dls, labeled_bs)


def test_fewer_labeled_items_than_places(shows, data):
    learn = blob_learner(data, bs=64)
    idxs = learn.dls.train.get_idxs()[:64]
    assert sum(i < 9 for i in idxs) == 32 and set(range(9)) <= set(idxs)
    learn.fit(1, cbs=LPCallback())
    shows.result(BATCHES, 'fewer labeled items than `labeled_bs`', 'The labeled part of a batch repeats them, each as often as the others to within one.')


@pytest.mark.parametrize('two_stream', [True, False])
def test_batches_larger_than_the_data(shows, data, two_stream):
    learn = blob_learner(data, bs=1000, two_stream=two_stream)
    before = flat_weights(learn)
    if two_stream:
        learn.fit(1, cbs=LPCallback())
        assert len(learn.dls.train) == 1 and not torch.equal(before, flat_weights(learn))
        shows.result(BATCHES, 'a batch is larger than the data, two streams', 'One batch per epoch, filled up with labeled items.')
    else:
        with shows.error(BATCHES, 'a batch is larger than the data, plain batches with `drop_last`', 'no batch'): learn.fit(1, cbs=LPCallback())
        traceless(learn)


# Image files and names

NAMES = 'train/größe', 'train/小 猫'


def pictures(root, labeled=NAMES, free='un labeled'):
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root/(labeled[i % 2] if i < 8 else labeled[i % 2].replace('train', 'valid') if i < 14 else free)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((80*(i % 2) + rng.integers(0, 120, (16, 16, 3))).astype('uint8')).save(folder/f'bild ñ {i}.png')
    return root


def picture_learner(root, workers=0, **kwargs):
    set_seed(0, reproducible=True)
    dls = SemiImageDataLoaders.from_folder(root, unlabeled='un labeled', bs=8, num_workers=workers, device='cpu', **kwargs)
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))


def test_names_of_all_scripts_and_spaces(shows, tmp_path):
    root = pictures(tmp_path/'meine Bilder')
    learn = picture_learner(root)
    quiet(learn, 1, cbs=[LPCallback(), ResumeCallback(root/'läuft weiter.pth')])
    quiet(picture_learner(root), 1, cbs=[LPCallback(), ResumeCallback(root/'läuft weiter.pth')])
    interp = LPInterpretation.from_learner(learn)
    again = LPInterpretation.load(interp.save(root/'schätzung 1.npz'))
    df = pd.read_csv(interp.to_csv(root/'für später.csv'))
    assert again.vocab == ['größe', '小 猫'] and set(df.label) == {'größe', '小 猫'} and list(again.items) == list(df.item) and df.item.str.contains('bild ñ').all()
    shows.result(IMAGES, 'non-ASCII names and spaces, in paths and classes', 'As any others, in all files that are written and read.')


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('what', ['no image', 'cut off', 'empty', 'not there'])
def test_broken_pictures(shows, tmp_path, workers, what):
    root = pictures(tmp_path/'pics')
    file = root/'un labeled'/'bild ñ 30.png'
    learn = picture_learner(root, workers)
    if what == 'no image': file.write_bytes(b'no image at all')
    elif what == 'cut off': file.write_bytes(file.read_bytes()[:400])
    elif what == 'empty': file.write_bytes(b'')
    else: file.unlink()
    before, i = flat_weights(learn), [str(o) for o in learn.dls.train.items].index(str(file))
    with shows.error(IMAGES, f'an image file is {what}, {workers} workers', rf'item\(s\) {i} of the training data cannot be read, the first \(.*ñ 30.png\)'): quiet(learn, 1, cbs=LPCallback())
    assert torch.equal(before, flat_weights(learn)) and not any(m._forward_hooks for m in learn.model.modules())
    if what != 'not there': assert [Path(o) for o in verify_images(list(learn.dls.train.items))] == [file]


def test_an_error_of_the_model_is_no_broken_item(data):
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError('of the model')
    learn = blob_learner(data, model=nn.Sequential(Fails(), *blob_model()))
    with pytest.raises(RuntimeError, match='of the model'): Extractor()(learn)


# Files that were damaged or changed

def test_damaged_pseudo_labels(shows, tmp_path):
    x, y, _ = clouds(30)
    file = propagate(x, y).save(tmp_path/'p.npz')
    whole = file.read_bytes()
    for i in range(0, len(whole), 7):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 64]) + whole[i+1:]):
            file.write_bytes(damaged)
            for load in (PseudoLabels.load, LPInterpretation.load):
                with pytest.raises(ValueError, match='p.npz is truncated, damaged'): load(file)
    with shows.error(FILES, 'saved pseudo-labels that were cut off, or have one wrong bit', 'truncated, damaged'): PseudoLabels.load(file)


@pytest.mark.parametrize('change', [dict(labels=np.full(30, 7)), dict(labels=np.zeros(29, int)), dict(certainty=np.zeros(30)), dict(W_col=np.full(1, 10**6)), dict(W_crow=np.arange(31)[::-1].copy()),
    dict(labeled=np.zeros((30, 2), bool)), dict(Z=np.zeros((30, 9), np.float32)), dict(class_weights=np.float32(1)), dict(reached=None)], ids=lambda o: next(iter(o)))
def test_arrays_that_do_not_fit(shows, tmp_path, change):
    x, y, _ = clouds(30)
    file = propagate(x, y).save(tmp_path/'p.npz')
    f = {k: v for k, v in fastai_lp.utils.files.read_npz(file).items() if change.get(k, 0) is not None}
    change = {k: np.resize(v, f[k].shape) if k == 'W_col' else v for k, v in change.items() if v is not None}
    with fastai_lp.utils.files.atomic_write(file, checksum=True) as out: np.savez_compressed(out, **{**f, **change})
    with pytest.raises(ValueError, match='p.npz does not hold pseudo-labels'): PseudoLabels.load(file)
    if 'labels' in change and len(change['labels']) == 30:
        with shows.error(FILES, 'saved pseudo-labels whose arrays contradict each other', 'labels must be −1 to 2'): PseudoLabels.load(file)


class Bomb:
    def __reduce__(self): return os.system, ('touch executed',)


def test_pickles_are_not_executed(shows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y, _ = clouds(30)
    f = fastai_lp.utils.files.read_npz(propagate(x, y).save('p.npz'))
    with fastai_lp.utils.files.atomic_write('p.npz', checksum=True) as out: np.savez(out, **{**f, 'labels': np.array([Bomb()]*30, dtype=object)})
    with shows.error(FILES, 'a pickle in a file of pseudo-labels', 'not a complete .npz file of plain arrays'): PseudoLabels.load('p.npz')
    with fastai_lp.utils.files.atomic_write('run.pth', checksum=True) as out: torch.save(dict(epoch=1, model=Bomb()), out)
    with shows.error(FILES, 'a pickle in a file of `ResumeCallback`', 'holds more than numbers and text'): blob_learner().fit(1, cbs=ResumeCallback('run.pth'))
    Path('p.npz').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='truncated, damaged'): LPInterpretation.load('p.npz')
    assert not Path('executed').exists()
    pickle.loads(Path('p.npz').read_bytes())
    assert Path('executed').exists()  # it would have been


def test_damaged_resume_file(shows, tmp_path):
    def fit(learn): learn.fit(2, cbs=[LPCallback(), ResumeCallback(tmp_path/'run.pth')])
    fit(blob_learner())
    whole = (tmp_path/'run.pth').read_bytes()
    learn = blob_learner(seed=3)
    before = flat_weights(learn)
    for i in range(0, len(whole), len(whole)//40):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i+1:]):
            (tmp_path/'run.pth').write_bytes(damaged)
            with pytest.raises(ValueError, match='run.pth is truncated, damaged'): fit(learn)
            assert (tmp_path/'run.pth').read_bytes() == damaged and torch.equal(before, flat_weights(learn))
    with shows.error(FILES, 'a file of `ResumeCallback` that was cut off, or has one wrong bit', 'truncated, damaged'): fit(learn)
    traceless(learn)


def test_damaged_results(shows, tmp_path):
    line = (Path(__file__).parents[1]/'benchmarks'/'results'/'digits.jsonl').read_text().splitlines()[0]
    file = tmp_path/'digits.jsonl'
    for i in range(2): fastai_lp.utils.files.append_json_line(file, {k: v for k, v in json.loads(line).items() if k != 'sha256'} | dict(name=f'run{i}'))
    whole = file.read_text()
    with open(file, 'a') as f: f.write(whole[:100])
    with shows.warning(FILES, "the last line of `lp_train`'s results is half written", 'ignored the last line', 'The others are read.'): assert len(read_lines(file)) == 2
    file.write_text(whole.replace('"error_rate": ', '"error_rate": 1'))
    with shows.error(FILES, "a figure in `lp_train`'s results was changed", 'line 1 is damaged or was edited'): read_lines(file)
    file.write_text(whole[:50] + whole[60:])
    with pytest.raises(ValueError, match='line 1: this is not JSON|line 1 is damaged'): read_lines(file)


# Stopped or failed in the middle

EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_cancel_backward', 'before_step', 'after_step', 'after_batch', 'after_train',
    'before_validate', 'after_validate', 'after_epoch', 'after_fit']


def state_of(learn):
    return dict(loss=learn.loss_func, metrics=[(type(m), m.name) for m in learn.metrics], hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()],
        dls=(id(learn.dls), len(learn.dls.train), 'get_idxs' in vars(learn.dls.train), learn.dls.train.labeled_only, learn.dls.train.bs, learn.dls.train.views),
        cbs=[type(o) for o in learn.cbs])


@pytest.mark.parametrize('permanent', [False, True])
@pytest.mark.parametrize('event', [e for e in EVENTS if e != 'after_cancel_backward'])
def test_another_callback_fails(shows, event, permanent):
    ours = [LPCallback(), MeanTeacherCallback()]
    learn = blob_learner(cbs=ours if permanent else None)
    before = state_of(learn)
    fails = Break(RuntimeError('mine'), event, at=1)
    fails.order = 70
    with pytest.raises(RuntimeError, match='mine'): learn.fit(2, cbs=[fails] + ([] if permanent else ours))
    learn.validate()
    assert state_of(learn) == before
    learn.fit(1, cbs=[] if permanent else ours)
    assert state_of(learn) == before and torch.isfinite(flat_weights(learn)).all() and not learn.model.training
    if event == 'after_loss' and not permanent:
        shows.result(STOPPED, 'another callback raises an error, at any event', 'Loss, metrics, hooks, data and callbacks are as before the fit; the weights are those of the last step; the next fit works.')


@pytest.mark.parametrize('error, event', [(CancelBatchException, 'before_batch'), (CancelBatchException, 'after_loss'), (CancelStepException, 'before_step'), (CancelTrainException, 'before_batch'),
    (CancelEpochException, 'before_epoch'), (CancelEpochException, 'before_batch'), (CancelFitException, 'before_fit'), (CancelFitException, 'before_epoch'), (CancelFitException, 'after_batch'), (CancelFitException, 'after_epoch')])
def test_cancelled(shows, error, event):
    learn = blob_learner()
    before = state_of(learn)
    stop = Break(error(), event, at=1)
    stop.order = 70  # after Recorder, which needs its own before_epoch
    learn.fit(3, cbs=[LPCallback(), MeanTeacherCallback(), stop])
    assert state_of(learn) == before
    learn.fit(1, cbs=[LPCallback(), MeanTeacherCallback()])
    assert state_of(learn) == before
    shows.result(STOPPED, f'`{error.__name__}` in `{event}`', 'What fastai makes of it; loss, metrics, hooks and data are as before the fit.')


@pytest.mark.parametrize('where', ['a descriptor', 'the search', 'the diffusion', 'a step', 'the file is written'])
def test_ctrl_c(shows, where, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background has it ignored
    learn = blob_learner()
    before = state_of(learn)
    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**7): pass  # until the signal is seen
    if where == 'a descriptor': learn.model[2].register_forward_hook(lambda m, *a: None if m.training else stop())
    elif where == 'a step': learn.model[2].register_forward_hook(lambda m, *a: stop() if m.training else None)
    elif where == 'the file is written': monkeypatch.setattr(torch, 'save', lambda o, f: f.write(b'half') and stop())
    else: monkeypatch.setattr({'the search': 'fastai_lp.transductive.neighbors._drop_self', 'the diffusion': 'fastai_lp.transductive.diffusion.spmm'}[where], stop)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[LPCallback(), ResumeCallback(tmp_path/'run.pth')])
    monkeypatch.undo()
    learn.model[2]._forward_hooks.clear()
    assert state_of(learn) == before and not list(tmp_path.iterdir())
    learn.fit(1, cbs=LPCallback())
    shows.result(STOPPED, f'Ctrl-C while {where} is computed' if where != 'the file is written' else 'Ctrl-C while a file is written', 'It stops there. The Learner is as before the fit but for the steps it has made; no half file is left.')


def test_killed_again_and_again(shows):
    "The script of the docs, with five kills, and one in each of ten places"
    res = subprocess.run([sys.executable, '-W', 'ignore', Path(__file__).parents[1]/'benchmarks'/'kills.py', '--kills', '5', '--places', '1', '--epochs', '1'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert res.returncode == 0 and '5 kills' in res.stdout and res.stdout.count('killed 1 times, 0 lost or different') == 10, res.stdout + res.stderr
    shows.result(STOPPED, '`kill -9` at random moments, and in the middle of extraction, search, graph, diffusion, a step, a file, and a change of files; then started again until it ends', 'With `ResumeCallback`, the files at the end are bitwise those of a run that was never killed; no half file has the name of a whole one.')


# No room left

def limited(code, limit, what='RLIMIT_FSIZE', **kwargs):
    "What a program prints whose files, or memory, end at `limit` bytes"
    code = f"import resource, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport warnings\nwarnings.simplefilter('ignore')\n{code}"
    return subprocess.run([sys.executable, '-c', code, str(limit)], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kwargs)


@linux
def test_disk_full_from_the_start(shows, tmp_path):
    res = limited("""
from conftest import *
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.resume import ResumeCallback
learn = blob_learner()
before = flat_weights(learn)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: learn.fit(1, cbs=[LPCallback(), ResumeCallback('run.pth')])
except OSError as e: print(e)
assert torch.equal(before, flat_weights(learn)) and '_with_events' not in vars(learn)
""", 0, cwd=tmp_path)
    with shows.error(ROOM, 'the disk is full before the first epoch, `ResumeCallback`', 'nothing was written and the previous file is unchanged', OSError): raise OSError(res.stdout.strip() or res.stderr)
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
    def after_epoch(self): resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if self.epoch in (1, 2) else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def run(epochs, *cbs):
    learn = blob_learner()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn.fit(epochs, cbs=[LPCallback(), *cbs])
    return learn, [str(o.message) for o in w if 'run.pth' in str(o.message)]
a, _ = run(4)
b, said = run(4, Fill(), ResumeCallback('run.pth'))
assert torch.equal(flat_weights(a), flat_weights(b)) and len(said) == 2, said
print(torch.load('run.pth', weights_only=True)['epoch'], said[0], sep='|')
""", 0, cwd=tmp_path)
    epoch, said = res.stdout.strip().split('|') if res.stdout else pytest.fail(res.stderr)
    assert epoch == '4' and 'The training goes on, and the next epoch tries again' in said and [o.name for o in tmp_path.iterdir()] == ['run.pth']
    shows.result(ROOM, 'the disk becomes full during a fit, `ResumeCallback`', f'The training goes on, the last whole file stays. Warning: {said}')


@linux
def test_folder_that_cannot_be_written_to(shows, tmp_path, data):
    learn = blob_learner(data)
    before = flat_weights(learn)
    with shows.error(ROOM, 'a folder that cannot be written to, `ResumeCallback`', 'Choose a path in a writable folder', OSError): learn.fit(1, cbs=[LPCallback(), ResumeCallback('/proc/run.pth')])
    assert torch.equal(before, flat_weights(learn))
    traceless(learn)
    learn.fit(1, cbs=LPCallback())
    for save in (learn.lp_record.pseudo.save, LPInterpretation.from_learner(learn).save, LPInterpretation.from_learner(learn).to_csv):
        with pytest.raises(OSError, match='nothing was written'): save('/proc/labels.npz')
    (tmp_path/'a').write_text('a file')
    with pytest.raises(OSError, match='nothing was written'): learn.lp_record.pseudo.save(tmp_path/'a'/'b.npz')


def test_no_room_for_descriptors(shows, data, monkeypatch):
    "The place is asked for before it is needed: a memory map on a full disk would kill the process"
    def full(fd, start, size): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    learn = blob_learner(data)
    before = flat_weights(learn)
    with shows.error(ROOM, 'no place on the disk for descriptors that exceed `max_bytes`', 'TMPDIR', OSError): learn.fit(1, cbs=LPCallback(max_bytes=100))
    assert torch.equal(before, flat_weights(learn))
    traceless(learn)


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), MemoryError(), RuntimeError('Error in void* faiss::gpu::StandardGpuResourcesImpl::allocMemory: out of memory'), RuntimeError('std::bad_alloc')])
@pytest.mark.parametrize('where', ['fastai_lp.transductive.propagate.affinity', 'fastai_lp.transductive.propagate.knn', 'fastai_lp.transductive.diffusion.spmm'])
def test_no_memory(shows, data, error, where, monkeypatch):
    learn = blob_learner(data)
    before, weights = state_of(learn), flat_weights(learn)
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)) as e: learn.fit(1, cbs=LPCallback())
    note = [o for o in e.value.__notes__ if o.startswith('LPCallback')][-1]
    assert 'pseudo-labels for 120 items with 16 feature dimensions and 3 classes need about' in note and 'k=' in note
    error.__notes__ = []
    monkeypatch.undo()
    assert state_of(learn) == before and torch.equal(weights, flat_weights(learn))
    learn.fit(1, cbs=LPCallback())
    if 'CUDA' in str(error) and 'affinity' in where: shows.result(ROOM, "no memory for neighbours, graph or diffusion, on a CPU or a GPU, by torch's or FAISS's account", f'The error as it came, with a note: {note}')


@linux
def test_really_no_memory(shows, tmp_path):
    "A process whose memory ends: torch, NumPy and FAISS tell of it in words of their own"
    res = limited("""
import torch
from fastai_lp.transductive.advice import memory_advice
from fastai_lp.transductive.labelers import Diffusion
from fastai_lp.transductive.propagate import propagate
x = torch.randn(40_000, 16)
y = torch.where(torch.arange(40_000) < 10, torch.arange(40_000), -1)
propagate(x[:500], y[:500])
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, resource.RLIM_INFINITY))
for i in range(2):
    try:
        with memory_advice(40_000, 16, 10, Diffusion()): Diffusion()(x, torch.zeros(40_000, 10), y)
    except Exception as e: print(type(e).__name__, e.__notes__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(propagate(x[:5000], y[:5000]).labels.shape)
""", 0, cwd=tmp_path)
    assert res.stdout.count('LPCallback: pseudo-labels for 40000 items') == 2 and 'torch.Size([5000])' in res.stdout, res.stdout + res.stderr


def test_table_of_the_docs_is_what_these_tests_showed(request, table):
    "pytest tests/test_faults.py --write-faults writes it"
    found, there = table
    ran = {o.name for o in request.session.items if o.path == request.node.path}
    assert found and [o for o in there if o['test'] in ran] == found, 'the table is of other tests: pytest tests/test_faults.py --write-faults'
    assert not {o['test'].split('[')[0] for o in there} - set(globals())
