"Public functions of the transductive step take float32, float64, arrays and any memory layout; settings may be NumPy's."
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import blobs
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.learner.streams import TwoStreamDL
from fastai_lp.transductive.balance import class_prior, sharpened
from fastai_lp.transductive.curation import label_issues, suggest
from fastai_lp.transductive.diffusion import diffuse, spmm
from fastai_lp.transductive.graph import affinity, csr, normalize
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction, replicator
from fastai_lp.transductive.neighbors import knn, knn_recall, unit_rows
from fastai_lp.transductive.propagate import build_graph, propagate, seed_matrix, spread
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.transductive.scoring import certainty, class_weights, from_scores
from fastai_lp.transductive.settings import check_labels

data = blobs(n=90, n_valid=0, spread=1.)
x, y = data.x, torch.tensor([-1 if o is None else o for o in data.labels])
logits = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
base = propagate(x, y, k=5)
W, Z, P, labeled = base.W, base.Z, sharpened(base.Z), base.labeled
sims, idxs = knn(x, 5)
S, Y = normalize(W)[0], seed_matrix(y, 3)
start = torch.where(labeled[:, None], torch.eye(3)[y.clamp(min=0)], 1/3)


def wide(W): return csr(W.crow_indices(), W.col_indices(), W.values().double(), len(W))


def flipped(o):
    "An array with negative strides"
    return np.ascontiguousarray(o.numpy()[::-1])[::-1]


def big_endian(o): return o.numpy().astype(o.numpy().dtype.newbyteorder('>'))


LAYOUTS = dict(array=torch.Tensor.numpy, flipped=flipped, big_endian=big_endian, columns=lambda o: o.T.contiguous().T if o.ndim == 2 else o)
of_floats = dict(  # chkstyle: ignore-node (one function per line)
    unit_rows=lambda c: unit_rows(c(x)),
    knn=lambda c: knn(c(x), 5)[0],
    build_graph=lambda c: build_graph(c(x), 5)[0].values(),
    knn_recall=lambda c: torch.tensor(knn_recall(c(x), c(sims))),
    affinity=lambda c: affinity(c(sims), idxs).values(),
    diffuse=lambda c: diffuse(S, c(Y)).Z,
    sharpened=lambda c: sharpened(c(Z)),
    certainty=lambda c: certainty(c(Z)),
    from_scores=lambda c: from_scores(c(Z), y).certainty,
    balancing=lambda c: from_scores(c(Z), y, balance='sinkhorn', prior=c(torch.tensor([.5, .25, .25]))).labels,
    network=lambda c: NetworkPrediction()(x, c(logits), y).Z,
    game=lambda c: GTG(k=5, start='network')(c(x), c(logits), y).Z,
    replicator=lambda c: replicator(W, c(start), labeled, 9, 1e-3).P,
    suggest=lambda c: suggest(W, labeled, c(base.certainty), 5).items)
of_labels = dict(  # chkstyle: ignore-node (one function per line)
    seed_matrix=lambda c: seed_matrix(c(y), 3),
    class_prior=lambda c: class_prior('labels', c(y), 3),
    check_labels=lambda c: check_labels(c(y))[0],
    class_weights=lambda c: class_weights(c(base.labels), 3),
    spread=lambda c: spread(W, c(y)).Z,
    from_scores=lambda c: from_scores(Z, c(y)).certainty,
    label_issues=lambda c: label_issues(W, c(y)).items,
    suggest=lambda c: suggest(W, c(labeled), base.certainty, 5).items,
    replicator=lambda c: replicator(W, start, c(labeled), 9, 1e-3).P,
    accuracy=lambda c: torch.tensor(base.accuracy(c(data.truth))),
    affinity=lambda c: affinity(sims, c(idxs)).values())


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('function', of_floats)
def test_any_memory_layout_of_floats(function, layout):
    assert torch.equal(of_floats[function](LAYOUTS[layout]), of_floats[function](torch.clone))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('function', of_labels)
def test_any_memory_layout_of_labels(function, layout):
    assert torch.equal(of_labels[function](LAYOUTS[layout]), of_labels[function](torch.clone))


KEEP_FLOAT64 = 'unit_rows', 'affinity', 'diffuse', 'sharpened', 'certainty', 'from_scores', 'replicator'


@pytest.mark.parametrize('function', of_floats)
def test_float64(function):
    res, expected = of_floats[function](torch.Tensor.double), of_floats[function](torch.clone)
    assert res.dtype == (torch.float64 if function in KEEP_FLOAT64 else expected.dtype)
    torch.testing.assert_close(res.to(expected), expected, rtol=1e-3, atol=1e-4)


def test_graph_of_float64():
    of_W = [lambda W: spread(W, y).Z, lambda W: spread(W, y, keep_Z=False).certainty, lambda W: label_issues(W, y).doubt,
        lambda W: replicator(W, start, labeled, 9, 1e-3).P, lambda W: spmm(W, Y), lambda W: diffuse(normalize(W)[0], Y).Z]
    for f in of_W: torch.testing.assert_close(f(wide(W)).float(), f(W), rtol=1e-3, atol=1e-4)
    assert diffuse(S, Y.double()).Z.dtype == torch.float64
    assert diffuse(normalize(wide(W))[0], Y).Z.dtype == torch.float32


@pytest.mark.parametrize('scores', [Z.double(), Z.clone().requires_grad_()], ids=['float64', 'gradient'])
def test_scores_are_saved(tmp_path, scores):
    p = from_scores(scores, y)
    q = PseudoLabels.load(p.save(tmp_path/'p.npz'))
    assert torch.equal(q.Z, p.Z)
    assert torch.equal(q.certainty, p.certainty)


def test_labels_are_read_by_position():
    assert check_labels(pd.Series([0, 1, 2, -1], index=[3, 2, 1, 0]))[0].tolist() == [0, 1, 2, -1]
    assert class_prior(pd.Series([3, 1], index=[1, 0]), [0, 1], 2).tolist() == [.75, .25]
    assert seed_matrix(torch.tensor([0, 1, 1], dtype=torch.uint8), 2).tolist() == [[1, 0], [0, .5], [0, .5]]


@pytest.mark.parametrize('bad', [[0, 1, None], pd.Series([0, 1, None], dtype='Int64'), np.array([0, 1, np.nan]), ['a', 'b']])
def test_labels_that_are_not_integers(bad):
    with pytest.raises(ValueError, match=r'one integer per item.* pandas.factorize'): check_labels(bad)


@pytest.mark.parametrize('settings', [dict(k=np.int64(5)), dict(k=np.uint8(5)), dict(k=5, gamma=np.int64(3)), dict(k=5, gamma=Fraction(3)),
    dict(k=5, index=np.str_('Flat'))])
@pytest.mark.parametrize('labeler', [Diffusion, GTG])
def test_numpy_settings(labeler, settings):
    made = LPCallback(**settings).labeler if labeler is Diffusion else labeler(**settings)
    assert made == labeler(**({'index': 'Flat'} if 'index' in settings else {}), k=5)
    assert {type(o) for o in vars(made).values()} <= {int, float, bool, str, type(None)}
    assert torch.equal(made(x, logits, y).Z, labeler(k=5)(x, logits, y).Z)


def test_numpy_booleans_and_sizes():
    assert Diffusion(omega=np.bool_(False)).omega is False
    assert torch.equal(propagate(x, y, np.int64(3), k=np.int64(5), max_iter=np.int8(20)).Z, Z)
    items = [suggest(W, labeled, base.certainty, m, pool=pool).items for m, pool in ((5, 50), (np.int64(5), np.int64(50)))]
    assert torch.equal(*items)
    assert type(LPCallback(warmup=np.int64(2)).warmup) is int


@pytest.mark.parametrize('call,match', [
    (lambda: LPCallback(k=10.), 'k must be an integer of at least 1 or None, got 10.0'),
    (lambda: LPCallback(mixup='x'), "mixup must be None, True, or a number above 0, got 'x'"),
    (lambda: LPCallback(mixup=[.4]), 'mixup must be'),
    (lambda: LPCallback(warmup=2.), 'warmup must be an integer'),
    (lambda: Extractor(max_bytes='1G'), 'max_bytes must be a number'),
    (lambda: Extractor(backbone=torch.nn.Flatten(), weight='1'), 'weight must be a number'),
    (lambda: MeanTeacherCallback(rampup='5'), 'rampup must be a number'),
    (lambda: hide_labels([0, 1], n=1.), 'n must be an integer of at least 0, got 1.0'),
    (lambda: TwoStreamDL([(o, int(t)) for o, t in zip(x, y)], bs=8, shuffle=True, labeled_bs=4.), 'labeled_bs must be an integer'),
    (lambda: propagate(x, y, 3.), 'n_classes must be an integer of at least 1, got 3.0'),
    (lambda: class_weights(y, 3.), 'n_classes must be an integer'),
    (lambda: seed_matrix(y, 3.), 'n_classes must be an integer'),
    (lambda: suggest(W, labeled, base.certainty, 5.), 'm must be an integer of at least 1'),
    (lambda: suggest(W, labeled, base.certainty, 5, pool=50.), 'pool must be an integer'),
    (lambda: label_issues(W, y, seeds='rw'), 'seeds must be'),
    (lambda: knn(x, 5, 'torch', chunk_bytes=1e6), 'chunk_bytes must be an integer'),
    (lambda: replicator(W, start, labeled, 5., 1e-3), 'max_iter must be an integer'),
    (lambda: sharpened(Z, np.inf), 'temperature must be a number above 0, got inf'),
    (lambda: base.accuracy([0]), 'one true class per item')])
def test_settings_refused_in_words(call, match):
    with pytest.raises(ValueError, match=match): call()
