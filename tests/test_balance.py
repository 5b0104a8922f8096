"Temperature and Sinkhorn balancing of class scores."
import math

import numpy as np
import pytest
import torch

from conftest import blobs
from fastai_lp.transductive.balance import balanced, class_prior, sharpened
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction
from fastai_lp.transductive.propagate import propagate
from fastai_lp.transductive.scoring import from_scores


def scores(n=200, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, c, generator=g)**3*torch.tensor([4., 1, 1, .5][:c])


def labels(n=200, c=4, known=12): return torch.where(torch.arange(n) < known, torch.arange(n) % c, -1)


def uniform(c=4): return torch.full((c,), 1/c, dtype=torch.float64)


@pytest.mark.parametrize('prior', [[.25]*4, [.4, .3, .2, .1], [.9, .05, .03, .02]])
@pytest.mark.parametrize('seed', range(3))
def test_mean_row_becomes_the_prior(prior, seed):
    P, prior = sharpened(scores(seed=seed)), torch.tensor(prior)
    assert (P.mean(0)-prior).abs().max() > .05
    B = balanced(P, prior.double())
    torch.testing.assert_close(B.mean(0), prior, rtol=0, atol=3e-6)
    torch.testing.assert_close(B.sum(1), torch.ones(len(P)))


@pytest.mark.parametrize('prior', [torch.tensor([.5, .25, .125, .125]), np.array([.5, .25, .125, .125], dtype=np.float32),
    np.array([.5, .25, .125, .125])[::-1][::-1], [.5, .25, .125, .125]], ids=['float32', 'array32', 'array', 'list'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_prior_and_scores_of_any_precision(prior, dtype):
    P = sharpened(scores().to(dtype))
    expected = balanced(P, torch.tensor([.5, .25, .125, .125]).double())
    for same in (P, P.numpy(), P.T.contiguous().T):
        B = balanced(same, prior)
        assert B.dtype == dtype
        torch.testing.assert_close(B, expected)


@pytest.mark.parametrize('prior', [[1.], [.5, .5], torch.ones(200, 4)])
def test_prior_of_another_length(prior):
    with pytest.raises(ValueError, match='one number per column'): balanced(sharpened(scores()), prior)


def test_each_class_has_one_factor():
    P = sharpened(scores())
    ratio = (balanced(P.double(), uniform())/P).log()
    ratio = ratio - ratio[:, :1]  # the factors relative to the first class are the same in every row
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=0, atol=1e-5)


def test_unreachable_prior():
    P = sharpened(scores())
    P[:, 3] = 0
    B = balanced(P, uniform())
    assert not B[:, 3].any()
    torch.testing.assert_close(B[:, :3].mean(0), torch.full((3,), 1/3), rtol=0, atol=1e-4)
    assert not balanced(torch.zeros(5, 4), uniform()).any()
    one_hot = torch.eye(4)[torch.tensor([0]*9 + [1])]
    assert torch.equal(balanced(one_hot, uniform()), one_hot)


def test_tiny_scores():
    Z = (scores()*torch.logspace(-40, 0, 200)[:, None]).float()
    B = balanced(sharpened(Z), uniform())
    torch.testing.assert_close(B[(Z > 0).any(1)].mean(0), torch.full((4,), .25), rtol=0, atol=1e-5)


def test_prior():
    y = torch.tensor([0, 0, 0, 1, -1, -5])
    assert class_prior('labels', y, 2).tolist() == [.75, .25]
    assert class_prior('uniform', y, 2).tolist() == [.5, .5]
    assert class_prior([3, 1], y, 2).tolist() == [.75, .25]
    assert class_prior(torch.tensor([3., 1]), y, 2).tolist() == [.75, .25]


@pytest.mark.parametrize('bad', ['flat', {1: 2, 2: 3}, ['a', 'b'], [[1, 2]],
    [1, 2, 3], [1, 0], [1, -1], [1, math.nan], [1, math.inf], None])
def test_invalid_prior(bad):
    with pytest.raises(ValueError, match='prior must'): class_prior(bad, torch.tensor([0, 1]), 2)


def test_only_unlabeled_items_are_balanced():
    Z, y, prior = scores(), labels(), [4, 3, 2, 1]
    Z[150:] = 0
    p = from_scores(Z, y, balance='sinkhorn', prior=prior)
    expected = balanced(sharpened(Z[12:150]), class_prior(prior, y, 4))
    assert torch.equal(p.labels[:12], y[:12])
    assert torch.equal(p.labels[12:150], expected.argmax(1))
    assert (p.labels[150:] == -1).all()
    assert torch.equal(p.certainty, from_scores(Z, y).certainty)
    assert torch.equal(p.Z, Z)


@pytest.mark.parametrize('T', [.25, .5, 2.])
def test_temperature(T):
    Z, y = scores(), labels()
    torch.testing.assert_close(sharpened(Z, T), sharpened((Z/Z.amax(1, keepdim=True))**(1/T)))
    plain, p = from_scores(Z, y), from_scores(Z, y, temperature=T)
    assert torch.equal(p.labels, plain.labels)
    assert torch.equal(p.certainty, plain.certainty)
    balanced_labels = balanced(sharpened(Z[12:], T), uniform()).argmax(1)
    assert torch.equal(from_scores(Z, y, temperature=T, balance='sinkhorn', prior='uniform').labels[12:], balanced_labels)


@pytest.mark.parametrize('labeler', [Diffusion, NetworkPrediction, GTG])
def test_every_labeler_balances_its_scores(labeler):
    data = blobs(n=300, spread=2.)
    y = torch.tensor([-1 if o is None else o for o in data.labels])[:270]
    logits = torch.randn(270, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([2., 0, 0])
    p = labeler(balance='sinkhorn', prior='uniform', temperature=.7)(data.x[:270], logits, y)
    q = from_scores(p.Z, y, balance='sinkhorn', prior='uniform', temperature=.7)
    assert torch.equal(p.labels, q.labels)
    assert labeler(prior=torch.tensor([1., 2])) == labeler(prior=[1, 2])


@pytest.mark.parametrize('more', [dict(balance='sinkhorn'), dict(temperature=.5)])
def test_all_scores_are_needed(more):
    with pytest.raises(ValueError, match='keep_Z must be True'): Diffusion(keep_Z=False, **more)
    with pytest.raises(ValueError, match='keep_Z must be True'): propagate(torch.randn(9, 2), labels(9, 3, 3), keep_Z=False, **more)
