"StreamMixUp against a loop over items: pseudo-labeled items are mixed with each other, all else is left alone."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.core import TensorImage

from conftest import blob_learner, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.losses import weighted_targets
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamMixUp, partners
from waits import Waits


# Who is mixed with whom

def test_partners_are_a_permutation_of_the_mixed_items():
    mixed = torch.tensor([1, 0, 0, 1, 1, 0, 1]).bool()
    for seed in range(50):
        torch.manual_seed(seed)
        p = partners(mixed)
        assert sorted(p.tolist()) == list(range(7))
        assert torch.equal(p[~mixed], torch.arange(7)[~mixed])


def test_all_permutations_are_equally_likely():
    mixed, found = torch.tensor([1, 0, 1, 0, 1]).bool(), {}
    torch.manual_seed(0)
    for _ in range(6000):
        p = tuple(partners(mixed).tolist())
        found[p] = found.get(p, 0)+1
    counts = np.array(list(found.values()))
    assert len(found) == 6
    assert ((counts-1000)**2/1000).sum() < 20.5  # χ² with 5 degrees of freedom: 1 in 1000


def test_if_all_are_mixed_it_is_fastais_draw():
    torch.manual_seed(3)
    p = partners(torch.ones(20, dtype=torch.bool))
    torch.manual_seed(3)
    assert torch.equal(p, torch.randperm(20))


# One batch

def batch(n_labeled=5, n_unlabeled=9, c=4, h=6, w=8, seed=0):
    "Labeled and unlabeled items in random order; one of each kind has no weight if there are more than three"
    g, n = torch.Generator().manual_seed(seed), n_labeled+n_unlabeled
    unlabeled = (torch.arange(n) >= n_labeled)[torch.randperm(n, generator=g)]
    labels, weights = torch.randint(c, (n,), generator=g), torch.rand(n, generator=g)+.1
    for kind in (unlabeled, ~unlabeled):
        if kind.sum() > 3: weights[kind.nonzero()[0]] = 0
    x, rows = TensorImage(torch.randn(n, 3, h, w, generator=g)), weighted_targets(labels, weights, c)
    return SimpleNamespace(x=x, labels=labels, weights=weights, unlabeled=unlabeled, rows=rows, c=c)


def mix(cb, b, seed=0, xb=None):
    "The inputs and target rows of a batch after mixing"
    lp = LPCallback()
    lp.batch_unlabeled = b.unlabeled
    cb.learn = learn = SimpleNamespace(xb=(b.x,) if xb is None else xb, yb=(b.rows,), training=True, cbs=[lp, cb])
    torch.manual_seed(seed)
    cb.before_batch()
    return learn.xb, learn.yb[0]


def test_a_batch_equals_a_loop_over_items():
    b, cb, met = batch(), StreamMixUp(alpha=1.), set()
    x0, rows0 = b.x.clone(), b.rows.clone()
    may_meet = (b.unlabeled & (b.weights > 0)).nonzero().flatten().tolist()
    for seed in range(300):
        (x,), rows = mix(cb, b, seed)
        assert type(x) is TensorImage
        for i, (j, lam) in enumerate(zip(cb.partner.tolist(), cb.lam.tolist())):
            if i == j:
                assert lam == 1
                assert torch.equal(x[i], b.x[i])
                assert torch.equal(rows[i], b.rows[i])
                continue
            met.add((i, j))
            assert .5 <= lam <= 1
            torch.testing.assert_close(torch.Tensor(x[i]), torch.Tensor(lam*b.x[i] + (1-lam)*b.x[j]))
            expected = torch.zeros(b.c)
            expected[b.labels[i]] += lam*b.weights[i]
            expected[b.labels[j]] += (1-lam)*b.weights[j]
            torch.testing.assert_close(rows[i], expected)
    assert met == {(i, j) for i in may_meet for j in may_meet if i != j}
    assert torch.equal(b.x, x0)
    assert torch.equal(b.rows, rows0)


def test_each_item_has_its_own_lambda_of_the_beta_distribution():
    b, cb = batch(0, 2000, h=2, w=2), StreamMixUp(.4)
    mix(cb, b)
    lam, mu = cb.lam[cb.lam < 1], np.random.default_rng(0).beta(.4, .4, 200000)
    expected = np.maximum(mu, 1-mu)
    assert len(lam.unique()) > 1000
    assert abs(lam.mean().item()-expected.mean()) < 4*expected.std()/len(lam)**.5
    assert abs(np.quantile(lam, .2)-np.quantile(expected, .2)) < .03


@pytest.mark.parametrize('n_labeled, n_unlabeled', [(6, 1), (0, 1), (3, 0)])
def test_a_single_unlabeled_item_is_left_alone(n_labeled, n_unlabeled):
    b = batch(n_labeled, n_unlabeled)
    (x,), rows = mix(StreamMixUp(1.), b)
    assert torch.equal(x, b.x)
    assert torch.equal(rows, b.rows)


def test_infinite_values_do_not_spread():
    b = batch()
    b.x[~b.unlabeled] = float('inf')
    (x,), _ = mix(StreamMixUp(), b)
    assert torch.equal(x[~b.unlabeled], b.x[~b.unlabeled])
    assert x[b.unlabeled].isfinite().all()


def test_several_inputs_are_mixed_with_the_same_lambda():
    b, cb = batch(), StreamMixUp()
    inputs = b.x, torch.randn(14, 5, 3), b.x[:, 0, 0, 0].half()
    mixed, _ = mix(cb, b, xb=inputs)
    for new, old in zip(mixed, inputs):
        lam = cb.lam.view(-1, *[1]*(old.ndim-1))
        assert (type(new), new.dtype) == (type(old), old.dtype)
        expected = lam*old + (1-lam)*old[cb.partner]
        torch.testing.assert_close(torch.Tensor(new).float(), torch.Tensor(expected).float(), rtol=2e-3, atol=2e-3)


def test_mixing_does_not_wait_for_a_gpu():
    b = batch()
    with Waits() as waits: mix(StreamMixUp(), b)
    assert not waits.found


# In a Learner

class Batches(Callback):
    "The batches that the model sees, with the loss"
    order = 50
    def before_fit(self): self.trained, self.validated = [], []
    def after_pred(self):
        mix = next(cb for cb in self.learn.cbs if isinstance(cb, StreamMixUp))
        batches = self.trained if self.training else self.validated
        batches.append((self.xb[0].clone(), mix.lam, mix.partner, self.learn.loss_func))


def test_training_batches_are_mixed_after_warmup_and_validation_is_not(data):
    learn, seen, cb = blob_learner(data), Batches(), StreamMixUp(1.)
    learn.fit(2, 1e-2, cbs=[LPCallback(warmup=1), cb, seen])
    warm, mixed = seen.trained[:-len(learn.dls.train)], seen.trained[-len(learn.dls.train):]
    assert all((lam == 1).all() for _, lam, *_ in warm)
    for x, lam, partner, _ in mixed:
        assert (lam[:8] == 1).all()  # the labeled items
        assert (partner[8:] >= 8).all()
        assert (lam[8:] < 1).any()
    assert all(type(loss) is CrossEntropyLossFlat for *_, loss in seen.validated)
    assert torch.equal(torch.cat([x for x, *_ in seen.validated[-2:]]), torch.cat([x for x, _ in learn.dls.valid]))
    assert cb.lam is cb.partner is None


def test_a_callback_that_stays_on_the_learner(tmp_path, monkeypatch):
    learn = blob_learner(path=tmp_path, cbs=[LPCallback(), StreamMixUp()])
    assert learn.lr_find(show_plot=False).valley > 0
    learn.fit(1)
    with monkeypatch.context() as m:
        m.setattr('fastai_lp.learner.mixing.partners', None)
        learn.validate()
        expected = learn.get_preds()[0]
    learn.remove_cb(LPCallback)
    learn.validate()
    learn.export('model.pkl')
    assert torch.equal(load_learner(tmp_path/'model.pkl').get_preds(dl=learn.dls.valid)[0], expected)


# Errors

@pytest.mark.parametrize('cbs, message', [
    (lambda: [StreamMixUp()], r'add LPCallback\(\)'),
    (lambda: [LPCallback(), MeanTeacherCallback(), StreamMixUp()], 'Mean Teacher'),
    (lambda: [StreamMixUp(-1)], 'alpha must be a number above 0, got -1'),
    (lambda: [StreamMixUp(float('nan'))], 'alpha must be a number above 0')], ids=['alone', 'mean_teacher', 'negative', 'nan'])
def test_errors_before_training(cbs, message):
    learn = blob_learner()
    before = flat_weights(learn)
    with pytest.raises(ValueError, match=message): learn.fit(1, cbs=cbs())
    assert torch.equal(flat_weights(learn), before)


@pytest.mark.parametrize('xb, message', [((torch.zeros(14, 2, dtype=torch.long),), 'input 0 of the model is torch.int64'),
    ((torch.zeros(14, 2), (torch.zeros(14),)), 'input 1 of the model is tuple')], ids=['codes', 'tuple'])
def test_inputs_without_a_mean(xb, message):
    with pytest.raises(ValueError, match=message): mix(StreamMixUp(), batch(), xb=xb)
