"A view that training does not change, and the labeler that uses it."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from sklearn.datasets import load_digits
from torch import nn

from conftest import blob_learner, blobs
from fastai_lp.estimator import LabelDiffusion
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.layers import RawInput, Thumbnail
from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.ensemble import Ensemble, fixed_view, kept_variance
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.views import LeftOut, View, left_out, same_shares, shares


def clusters(shares=(1, 1, 1, 1), n=400, per_class=5, spread=1., seed=0):
    "(features [n, 16], true classes, labels)"
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(n)*sum(shares)//n)
    truth = np.repeat(np.arange(len(shares)), shares)[truth]
    x = 2*rng.normal(size=(len(shares), 16))[truth] + spread*rng.normal(size=(n, 16))
    shown = np.concatenate([rng.permutation(np.flatnonzero(truth == c))[:per_class] for c in range(len(shares))])
    y = np.full(n, -1)
    y[shown] = truth[shown]
    return torch.from_numpy(x).float(), torch.from_numpy(truth), torch.from_numpy(y)


def logits_of(y): return torch.zeros(len(y), int(y.max())+1)


# The view

@pytest.mark.parametrize('seed', range(3))
def test_a_view_is_the_estimator(seed):
    x, _, y = clusters(seed=seed, spread=3.)
    expected = LabelDiffusion(affinity='cosine').fit(x.numpy(), y.numpy()).label_distributions_
    np.testing.assert_allclose(View(x)(y), expected, atol=1e-4)


@pytest.mark.parametrize('per_class', [2, 3, 5, 12])
def test_no_label_is_used_for_its_own_prediction(per_class):
    "The probabilities are one-hot where the view sees a label"
    _, _, y = clusters(per_class=per_class)
    def seen(rest):
        assert all((rest == c).any() for c in range(4))
        return torch.where((rest >= 0)[:, None], F.one_hot(rest.clamp(min=0), 4), .25).numpy()
    o = left_out(seen, y)
    assert (o.P == .25).all()
    assert (o.mean == .25).all()
    assert sorted(o.codes) == sorted(y[y >= 0].tolist())


def test_a_class_with_a_single_label_keeps_it():
    _, _, y = clusters(per_class=3)
    only = (y == 2).nonzero().flatten()
    y[only[1:]] = -1
    view = View(clusters()[0])
    assert 2 not in left_out(view, y).codes
    for c in range(4): y[(y == c).nonzero().flatten()[1:]] = -1
    assert left_out(view, y) is None


def test_the_level_of_the_shares_test():
    "Equal shares are rarely taken for different"
    found = []
    for seed in range(60):
        x, _, y = clusters(seed=seed, spread=3., n=300)
        found.append(same_shares(left_out(View(x), y), level=.05))
    assert found.count(False) <= 12  # the folds share labels: about twice the nominal 3


@pytest.mark.parametrize('seed', range(3))
def test_shares_that_the_labels_do_not_show(seed):
    x, _, y = clusters((10, 5, 2, 1), per_class=8, spread=2., n=600, seed=seed)
    view = View(x)
    o = left_out(view, y)
    assert same_shares(o) is False
    assert shares(view(y), y, o) is None


@pytest.mark.parametrize('per_class', [2, 4, 10])
def test_balanced_classes_that_are_easy_to_tell_apart(per_class):
    "A difference that is certain but small is no reason to do without shares"
    x, truth = load_digits(return_X_y=True)
    view = View(x.astype(np.float32))
    found = []
    for seed in range(15):
        rng, y = np.random.default_rng(seed), torch.full((len(x),), -1)
        shown = np.concatenate([rng.permutation(np.flatnonzero(truth == c))[:per_class] for c in range(10)])
        y[shown] = torch.from_numpy(truth[shown])
        found.append(shares(view(y), y, left_out(view, y)))
    assert sum(o is None for o in found) <= 1


def test_shares_of_a_random_sample():
    x, truth, _ = clusters(spread=2.)
    y = torch.full_like(truth, -1)
    for c, m in enumerate((20, 10, 4, 3)): y[(truth == c).nonzero().flatten()[:m]] = c
    P = View(x)(y)
    found = shares(P, y, left_out(View(x), y))
    true = torch.bincount(truth[y < 0])/(y < 0).sum()
    assert (found-true).abs().max() < .5*(torch.bincount(y[y >= 0])/37 - true).abs().max()


def test_too_few_labels_to_tell():
    o = LeftOut(np.array([0, 1]), np.full((2, 2), .5), np.full((2, 2), .5))
    assert same_shares(o) is None
    y = torch.tensor([0, 1, 1, -1])
    torch.testing.assert_close(shares(np.full((4, 2), .5), y, o), torch.tensor([1/3, 2/3], dtype=torch.float64))


def test_with_one_label_per_class_all_views_count():
    x, truth, y = clusters(per_class=1, spread=3.)
    noise = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    views = dict(a=View(x), b=View(noise))
    kept, P = fixed_view(views, y), [view(y) for view in views.values()]
    expected = np.sqrt((P[0]+1e-6)*(P[1]+1e-6))
    np.testing.assert_allclose(kept['P'], expected/expected.sum(1, keepdims=True), atol=1e-5)
    similarity = sum(F.normalize(torch.from_numpy(o.features)) @ F.normalize(torch.from_numpy(o.features)).T for o in views.values())
    torch.testing.assert_close(kept['feats'] @ kept['feats'].T, similarity/2, rtol=1e-4, atol=1e-4)
    assert kept['name'] == 'a and b'


# The labeler

def test_the_formula():
    "P_view · P_network, sharpened and clamped, averaged with its diffusion"
    x, _, y = clusters(spread=3.)
    logits = 3*torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    labeler = Ensemble(balance=None, k=8, trust=2., omega_norm=None)
    view = labeler.look(x, logits, y)
    p = labeler(x, logits, y, view)
    P = (view['P'].double()+1e-6).sqrt()*(logits.double().softmax(1)+1e-6).sqrt()
    P = P**(1/.3)
    P = P/P.sum(1, keepdim=True)
    P[y >= 0] = F.one_hot(y[y >= 0], 4).double()
    joint = F.normalize(torch.cat([view['feats'], F.normalize(x)], 1))
    S = normalize(affinity(*knn(joint, 8)))[0]
    Z = diffuse(S, P.float(), .9).Z.double()
    Z = Z/Z.sum(1, keepdim=True)
    w = 2*kept_variance(joint, S, .9)**2
    Q = (P+1e-6)*(Z+1e-6)**w
    Q = Q/Q.sum(1, keepdim=True)
    close = (Q**(1/(1+w))/(Q**(1/(1+w))).sum(1, keepdim=True) - p.Z.double()).abs()[y < 0]
    assert close.max() < 1e-3
    assert torch.equal(p.labels[y >= 0], y[y >= 0])


def test_without_trust_the_graph_does_not_count():
    x, _, y = clusters(spread=3.)
    p = Ensemble(trust=0., balance=None)(x, logits_of(y), y)
    torch.testing.assert_close(p.Z[y < 0].double(), Ensemble(balance=None).sharpened(View_P(x, y), y, None)[y < 0], atol=1e-4, rtol=0)


def test_the_network_counts_once_it_is_trained():
    x, _, y = clusters(spread=3.)
    labeler = Ensemble()
    def logits(seed): return 3*torch.randn(400, 4, generator=torch.Generator().manual_seed(seed))
    view = labeler.look(x, logits(0), y)
    assert torch.equal(labeler(x, logits(0), y).Z, labeler(x, logits(1), y, view, network=False).Z)
    assert not torch.equal(labeler(x, logits(0), y, view).Z, labeler(x, logits(1), y, view).Z)


def test_kept_variance():
    x, _, y = clusters(spread=.1)
    def kept(x): return kept_variance(x, normalize(affinity(*knn(F.normalize(x), 8)))[0], .9)
    assert kept(F.normalize(x)) > .95
    assert kept(F.normalize(torch.randn(400, 16, generator=torch.Generator().manual_seed(0)))) < .2


def test_balanced_shares():
    x, _, y = clusters(spread=3.)
    P = Ensemble(prior=[4, 3, 2, 1]).sharpened(View_P(x, y), y, None)
    torch.testing.assert_close(P[y < 0].mean(0), torch.tensor([.4, .3, .2, .1], dtype=torch.float64), rtol=0, atol=1e-5)


def View_P(x, y): return torch.from_numpy(View(x)(y)).float()


@pytest.mark.parametrize('bad', [dict(prior='none'), dict(prior=[1, 0]), dict(trust=-1), dict(temperature=0), dict(alpha=1.), dict(k=0)])
def test_invalid_settings(bad):
    with pytest.raises(ValueError, match=f'{[*bad][0]} must be'): Ensemble(**bad)


def test_invalid_labels():
    x, _, y = clusters()
    with pytest.raises(ValueError, match='class 2 has no labeled item'): Ensemble()(x, logits_of(y), torch.where(y == 2, -1, y))
    with pytest.raises(ValueError, match='one number above 0 for each of the 4'): Ensemble(prior=[1, 1])(x, logits_of(y), y)


@pytest.mark.parametrize('rows', [torch.zeros(400, 16), torch.ones(400, 16)])
def test_features_without_information(rows):
    _, _, y = clusters()
    p = Ensemble()(rows, logits_of(y), y)
    assert torch.isfinite(p.Z).all()
    assert torch.isfinite(p.weights).all()


def test_empty_backbone():
    x, _, y = clusters()
    assert Ensemble().look(x, logits_of(y), y, other=x[:, :0])['name'] == 'network'


def test_one_class():
    x = clusters()[0]
    y = torch.where(torch.arange(400) < 5, 0, -1)
    assert (Ensemble()(x, torch.zeros(400, 1), y).labels == 0).all()


# In a Learner

class Views(Callback):
    "Keeps the view of each epoch"
    def __init__(self, cb): self.lp, self.seen = cb, []
    def after_train(self): self.seen.append(self.lp._view[-1])


def test_the_view_is_made_once_per_data_and_labels():
    learn, cb = blob_learner(), LPCallback(Ensemble())
    views = Views(cb)
    learn.fit(2, cbs=[cb, views])
    learn.fit(1, cbs=[cb, views])
    assert all(o is views.seen[0] for o in views.seen)
    learn.dls = blob_learner(blobs(seed=1)).dls
    learn.fit(1, cbs=[cb, views])
    assert views.seen[-1] is not views.seen[0]


@pytest.mark.parametrize('warmup', [0, 2])
def test_the_view_is_the_features_before_training(warmup):
    learn, cb = blob_learner(), LPCallback(Ensemble(), warmup=warmup)
    y = torch.where(torch.arange(120) < 9, blobs().truth[:120], -1)
    expected = fixed_view(dict(network=View(Extractor()(learn).feats)), y)
    learn.fit(warmup+1, 1e-1, cbs=cb)
    torch.testing.assert_close(cb._view[-1]['P'], expected['P'])
    assert cb._view[-1]['name'] == 'network'
    assert len(cb.record.history) == 1


def test_a_network_that_knows_the_labels_is_not_asked():
    "Its left-out labels are in its features"
    x, _, y = clusters(spread=3., per_class=3)
    known = F.one_hot(y.clamp(min=0), 4).float()*(y >= 0)[:, None] + .1*torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.where((y >= 0)[:, None], 9*known, 0.)
    assert Ensemble().look(known, logits_of(y), y, other=x)['name'] == 'network'
    assert Ensemble().look(known, logits, y, other=x)['name'] == 'backbone'


def test_backbone_is_extracted_in_the_same_pass():
    learn, net = blob_learner(), nn.Linear(8, 5)
    found, other = Extractor()(learn, also=net)
    assert torch.equal(found.feats, Extractor()(learn).feats)
    torch.testing.assert_close(other, Extractor(backbone=net)(learn).feats)


def test_raw_inputs():
    x = torch.randn(2, 3, 16, 8)
    assert torch.equal(RawInput()(x), Thumbnail()(x))
    assert torch.equal(RawInput()(x[:, 0, 0]), x[:, 0, 0])
    assert RawInput()(x[:, 0, 0], x[:, 0, 0]).shape == (2, 0)  # such as the two inputs of a table
    assert RawInput()(torch.zeros(2, 9).long()).shape == (2, 0)
