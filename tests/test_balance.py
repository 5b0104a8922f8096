"Scores in line with a prior, temperature and soft labels: what each does, against slow loops."
import math

import pytest
import torch

from conftest import Spy, blob_learner, blobs, flat_weights, item_numbers
from fastai_lp.transductive.balance import balanced, class_prior, sharpened
from fastai_lp.learner.callback import LPCallback
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction
from fastai_lp.transductive.poisson import Poisson
from fastai_lp.transductive.pseudo import PseudoLabels, certainty, from_scores, propagate

LABELERS = Diffusion, NetworkPrediction, GTG, Poisson


def scores(n=200, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, c, generator=g)**3*torch.tensor([4., 1, 1, .5][:c])


def labels(n=200, c=4, known=12): return torch.where(torch.arange(n) < known, torch.arange(n) % c, -1)


# Balance

@pytest.mark.parametrize('prior', [[.25]*4, [.4, .3, .2, .1], [.9, .05, .03, .02]])
@pytest.mark.parametrize('seed', range(3))
def test_sinkhorn_reaches_its_prior(prior, seed):
    P, prior = sharpened(scores(seed=seed)), torch.tensor(prior)
    assert (P.mean(0)-prior).abs().max() > .05
    B = balanced(P, prior.double())
    torch.testing.assert_close(B.mean(0), prior, rtol=0, atol=3e-6)
    torch.testing.assert_close(B.sum(1), torch.ones(len(P)))


def test_a_class_has_one_factor():
    P = sharpened(scores())
    for how in ('align', 'sinkhorn'):
        ratio = (balanced(P.double(), class_prior('uniform', labels(), 4), how)/P).log()
        ratio = ratio - ratio[:, :1]  # what is left is the classes', the same in each row
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=0, atol=1e-5)


def test_align_is_one_round():
    P, prior = sharpened(scores()), torch.tensor([.4, .3, .2, .1])
    B, mean = balanced(P, prior.double(), 'align'), [sum(P[i, j].item() for i in range(len(P)))/len(P) for j in range(4)]
    for i in range(0, len(P), 17):
        row = [P[i, j].item()*prior[j].item()/mean[j] for j in range(4)]
        torch.testing.assert_close(B[i], torch.tensor([o/sum(row) for o in row]), rtol=1e-4, atol=1e-6)
    assert (B.mean(0)-prior).abs().max() < (P.mean(0)-prior).abs().max()


def test_what_cannot_be_reached_is_left():
    P = sharpened(scores())
    P[:, 3] = 0
    B = balanced(P, class_prior('uniform', labels(), 4))
    assert torch.isfinite(B).all() and (B[:, 3] == 0).all()
    torch.testing.assert_close(B[:, :3].mean(0), torch.full((3,), 1/3), rtol=0, atol=1e-4)
    assert balanced(torch.zeros(5, 4), class_prior('uniform', labels(), 4)).abs().sum() == 0
    sure = torch.eye(4)[torch.tensor([0]*9 + [1])]  # nothing can move
    assert torch.equal(balanced(sure, class_prior('uniform', labels(), 4)), sure)


def test_tiny_scores():
    Z = scores()*torch.logspace(-40, 0, 200)[:, None]
    B = balanced(sharpened(Z.float()), class_prior('uniform', labels(), 4))
    assert torch.isfinite(B).all()
    reached = (Z.float() > 0).any(1)
    torch.testing.assert_close(B[reached].mean(0), torch.full((4,), .25), rtol=0, atol=1e-5)


def test_the_prior():
    y = torch.tensor([0, 0, 0, 1, -1, -5])
    assert class_prior('labels', y, 2).tolist() == [.75, .25] and class_prior('uniform', y, 2).tolist() == [.5, .5]
    assert class_prior([3, 1], y, 2).tolist() == [.75, .25] == class_prior(torch.tensor([3., 1]), y, 2).tolist()
    for bad in ('flat', [1, 2, 3], [1, 0], [1, -1], [1, math.nan], [1, math.inf]):
        with pytest.raises(ValueError, match='prior='): class_prior(bad, y, 2)


# In from_scores

def test_off_it_changes_nothing():
    Z, y = scores(), labels()
    a, b = from_scores(Z, y), from_scores(Z, y, temperature=1., balance=None, soft=False)
    for k in ('labels', 'certainty', 'class_weights', 'Z'): assert torch.equal(getattr(a, k), getattr(b, k))
    assert a.soft is None and torch.equal(a.labels[12:], Z[12:].argmax(1))


@pytest.mark.parametrize('how', ['align', 'sinkhorn'])
def test_unlabeled_items_are_balanced(how):
    Z, y = scores(), labels()
    Z[150:] = 0
    p = from_scores(Z, y, balance=how, prior=[4, 3, 2, 1], soft=True)
    assert torch.equal(p.Z, Z) and torch.equal(p.labels[:12], y[:12]) and (p.labels[150:] == -1).all() and not p.reached[150:].any()
    assert torch.equal(p.soft[:12], torch.eye(4)[y[:12]]) and (p.soft[150:] == 0).all()
    expected = balanced(sharpened(Z[12:150]), class_prior([4, 3, 2, 1], y, 4), how)
    torch.testing.assert_close(p.soft[12:150], expected)
    assert torch.equal(p.labels[12:150], expected.argmax(1))
    assert torch.equal(p.certainty, from_scores(Z, y).certainty)
    if how == 'sinkhorn': torch.testing.assert_close(p.soft[12:150].mean(0), torch.tensor([.4, .3, .2, .1]), rtol=0, atol=1e-5)


def test_temperature_sharpens_what_is_learned():
    "ω is that of the scores as they came; labels are the same, soft ones sharper"
    Z, y = scores(), labels()
    plain = from_scores(Z, y, soft=True)
    for T in (.25, .5, 2.):
        p = from_scores(Z, y, temperature=T, soft=True)
        torch.testing.assert_close(p.soft[12:], sharpened((Z/Z.amax(1, keepdim=True))**(1/T))[12:])
        assert torch.equal(p.labels, plain.labels) and torch.equal(p.certainty, plain.certainty)
        assert ((p.soft.amax(1) >= plain.soft.amax(1)-1e-6) if T < 1 else (p.soft.amax(1) <= plain.soft.amax(1)+1e-6)).all()


def test_power_of_certainty():
    Z, y = scores(), labels()
    p = from_scores(Z, y)
    for power in (0., .5, 2., 3.):
        q = from_scores(Z, y, omega_power=power)
        torch.testing.assert_close(q.certainty, p.certainty**power)
        assert torch.equal(q.labels, p.labels) and (q.certainty[:12] == 1).all() and q.certainty.max() == 1
    torch.testing.assert_close(from_scores(Z, y, omega_norm=None, omega_power=2.).certainty[12:], certainty(Z)[12:]**2)
    data = blobs(spread=2.)
    given = torch.tensor([-1 if o is None else o for o in data.labels])
    whole, blocks = (propagate(data.x, given, omega_power=3., keep_Z=keep) for keep in (True, False))
    torch.testing.assert_close(whole.certainty, blocks.certainty, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('labeler', LABELERS)
def test_every_labeler_has_them(labeler):
    data = blobs(n=300, spread=2.)
    y = torch.tensor([-1 if o is None else o for o in data.labels])[:270]
    logits = torch.randn(270, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([2., 0, 0])
    plain = labeler()(data.x[:270], logits, y)
    p = labeler(balance='sinkhorn', prior='uniform', soft=True, temperature=.7)(data.x[:270], logits, y)
    torch.testing.assert_close(p.soft[9:].mean(0), torch.full((3,), 1/3), rtol=0, atol=1e-4)
    assert plain.soft is None and torch.equal(p.labels[:9], y[:9])
    if labeler is NetworkPrediction: assert p.labels.bincount().max() < plain.labels.bincount().max()


@pytest.mark.parametrize('labeler', LABELERS)
def test_settings_that_cannot_be(labeler):
    for name, bad in dict(temperature=0., balance='even', prior='flat', omega_power=-1.).items():
        with pytest.raises(ValueError, match=f'{name}='): labeler(**{name: bad})
    with pytest.raises(ValueError, match='prior='): labeler(prior=[1, 0, 1])
    assert labeler(prior=torch.tensor([1., 2])) == labeler(prior=[1, 2])


def test_all_scores_are_needed():
    for more in (dict(soft=True), dict(balance='align'), dict(temperature=.5)):
        with pytest.raises(ValueError, match='keep_Z=False: expected True'): Diffusion(keep_Z=False, **more)
        with pytest.raises(ValueError, match='keep_Z=False'): propagate(torch.randn(9, 2), labels(9, 3, 3), keep_Z=False, **more)


def test_saved_and_loaded(tmp_path):
    p = from_scores(scores(), labels(), soft=True)
    q = PseudoLabels.load(p.save(tmp_path/'p.npz'))
    assert torch.equal(p.soft, q.soft) and PseudoLabels.load(from_scores(scores(), labels()).save(tmp_path/'q.npz')).soft is None
    p.soft = p.soft[:, :2].clone()
    p.save(tmp_path/'bad.npz')
    with pytest.raises(ValueError, match='soft has shape'): PseudoLabels.load(tmp_path/'bad.npz')


# In training

def test_soft_targets_sum_to_their_weight():
    data, spy = blobs(spread=1.5), Spy()
    learn = blob_learner(data)
    learn.fit(1, cbs=[LPCallback(soft=True), spy])
    p = learn.lp_record.pseudo
    for x, target in spy.seen:
        items = item_numbers(data, x)
        torch.testing.assert_close(target.sum(1), p.weights[items])
        torch.testing.assert_close(target, p.soft[items]*p.weights[items][:, None])
        known = p.labeled[items]
        assert (target[known].count_nonzero(1) == 1).all() and (target[~known].count_nonzero(1) > 1).any()
    assert torch.equal(spy.last_target, p.labels[items])


def test_soft_labels_that_are_sure_train_as_hard_ones():
    "At a temperature near 0 a distribution is one-hot: bitwise the same targets, but for ω"
    def run(**more):
        learn = blob_learner()
        learn.fit(2, cbs=LPCallback(temperature=1e-3, omega=False, **more))
        return flat_weights(learn)
    torch.testing.assert_close(run(soft=True), run())


def test_balance_in_a_learner():
    learn = blob_learner(blobs(spread=3.))
    learn.fit(2, cbs=LPCallback(balance='sinkhorn', prior='uniform', soft=True))
    p = learn.lp_record.pseudo
    torch.testing.assert_close(p.soft[~p.labeled].mean(0), torch.full((3,), 1/3), rtol=0, atol=1e-4)
