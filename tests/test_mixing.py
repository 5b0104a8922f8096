"StreamMixUp and StreamCutMix against loops over items and against fastai's MixUp; what is left alone; no trace."
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import TensorImage
from torch import nn

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.learner.losses import PseudoLabelLoss, weighted_targets
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamCutMix, StreamMixUp, cut_boxes, partners
from fastai_lp.experiments.models import small_convnet
from test_device import Waits

E = pytest.raises
OPTIONS, KINDS = ['unlabeled', 'labeled', 'each', 'all'], [StreamMixUp, StreamCutMix]


# Who is mixed with whom

def test_partners_are_a_permutation_of_each_stream():
    streams = torch.tensor([2, 0, 0, -1, 5, 2, 0, -1, 2, 0])
    for seed in range(50):
        torch.manual_seed(seed)
        p = partners(streams)
        assert sorted(p.tolist()) == list(range(10)) and torch.equal(streams[p], streams)
        assert p[[3, 4, 7]].tolist() == [3, 4, 7]  # no stream, and a stream of one


def test_every_permutation_is_as_likely():
    streams, found = torch.tensor([1, 0, 1, 0, 1]), {}
    torch.manual_seed(0)
    for _ in range(6000):
        p = tuple(partners(streams).tolist())
        found[p] = found.get(p, 0)+1
    counts = np.array(list(found.values()))
    assert len(found) == 12 and ((counts-500)**2/500).sum() < 31.3  # χ² with 11 degrees of freedom: 1 in 1000


def test_without_streams_it_is_fastais_draw():
    torch.manual_seed(3)
    p = partners(torch.zeros(20, dtype=torch.long))
    torch.manual_seed(3)
    assert torch.equal(p, torch.randperm(20)) and len(partners(torch.zeros(0, dtype=torch.long))) == 0


# Boxes

@pytest.mark.parametrize('h, w', [(8, 8), (5, 12), (1, 7)])
def test_boxes_equal_a_loop(h, w):
    lam = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.tensor([0., 1., .5])])
    torch.manual_seed(1)
    boxes = cut_boxes(lam, h, w)
    torch.manual_seed(1)
    rows, columns = torch.randint(h, lam.shape), torch.randint(w, lam.shape)
    for box, l, row, column in zip(boxes, lam, rows.tolist(), columns.tolist()):
        height, width = int((h*(1-l).sqrt()).round()), int((w*(1-l).sqrt()).round())
        expected = torch.zeros(h, w, dtype=torch.bool)
        for i in range(row-height//2, row-height//2+height):
            for j in range(column-width//2, column-width//2+width):
                if 0 <= i < h and 0 <= j < w: expected[i, j] = True
        assert torch.equal(box, expected)
    assert boxes[-2].sum() == 0 and len({tuple(b.flatten().tolist()) for b in boxes}) > min(20, h*w-1)


# A batch made by hand

def batch(n_labeled=5, n_unlabeled=9, c=4, h=6, w=8, seed=0):
    "Labeled and unlabeled items in disorder; two of them, one of each stream, are without weight"
    g = torch.Generator().manual_seed(seed)
    b = n_labeled+n_unlabeled
    unlabeled = (torch.arange(b) >= n_labeled)[torch.randperm(b, generator=g)]
    labels, weights = torch.randint(c, (b,), generator=g), torch.rand(b, generator=g)+.1
    for stream in (unlabeled, ~unlabeled):
        if stream.sum() > 3: weights[stream.nonzero()[0]] = 0
    return SimpleNamespace(x=TensorImage(torch.randn(b, 3, h, w, generator=g)), labels=labels, weights=weights, unlabeled=unlabeled, rows=weighted_targets(labels, weights, c), c=c)


def stand_in(xb, yb, loss_func, *cbs, **kwargs):
    "What a callback sees of a Learner in training"
    return SimpleNamespace(xb=xb, yb=yb, loss_func=loss_func, training=True, cbs=list(cbs), dls=SimpleNamespace(train=None), **kwargs)


def mix(cb, b, seed=0, xb=None):
    "Mixes a batch as it is with LPCallback; gives the inputs and rows"
    lp = LPCallback()
    lp.batch_unlabeled = b.unlabeled
    cb.learn = learn = stand_in((b.x,) if xb is None else xb, (b.rows,), PseudoLabelLoss(CrossEntropyLossFlat()), lp, cb)
    torch.manual_seed(seed)
    cb.before_train()
    assert isinstance(learn.loss_func, PseudoLabelLoss)
    cb.before_batch()
    return learn.xb, learn.yb[0]


def may_meet(b, streams, i, j):
    "Whether item i may be mixed with j ≠ i, said plainly"
    if b.weights[i] == 0 or b.weights[j] == 0: return False
    of = ['unlabeled' if b.unlabeled[k] else 'labeled' for k in (i, j)]
    return streams == 'all' or of[0] == of[1] and streams in ('each', of[0])


@pytest.mark.parametrize('streams', OPTIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_each_option_equals_a_loop_over_items(kind, streams):
    met, b = set(), batch()
    x0, rows0 = b.x.clone(), b.rows.clone()
    for seed in range(40):
        cb = kind(alpha=1., streams=streams)
        (x,), rows = mix(cb, b, seed)
        assert type(x) is TensorImage and x.dtype == b.x.dtype
        assert sorted(cb.partner.tolist()) == list(range(len(x)))
        for i, j in enumerate(cb.partner.tolist()):
            own, other, l = b.x[i], b.x[j], cb.lam[i].item()
            if i == j:
                assert l == 1 and torch.equal(x[i], own) and torch.equal(rows[i], b.rows[i])
                continue
            assert may_meet(b, streams, i, j)
            if kind is StreamMixUp:
                assert .5 <= l <= 1
                expected = l*own + (1-l)*other
            else:
                pasted = (x[i] != own).any(0)
                assert abs(pasted.float().mean().item()-(1-l)) < 1e-6  # the share of pixels is that of the target
                at = pasted.nonzero()
                if len(at): assert len(at) == (at.max(0).values-at.min(0).values+1).prod()  # one box
                expected = torch.where(pasted, other, own)
            torch.testing.assert_close(torch.Tensor(x[i]), torch.Tensor(expected))
            mixed = torch.zeros(b.c)
            mixed[b.labels[i]] += l*b.weights[i]
            mixed[b.labels[j]] += (1-l)*b.weights[j]
            torch.testing.assert_close(rows[i], mixed)
            assert abs(rows[i].sum() - (l*b.weights[i] + (1-l)*b.weights[j])) < 1e-6  # no weight is lost
    assert torch.equal(b.x, x0) and torch.equal(b.rows, rows0)  # not written to
    for seed in range(300):
        mix(cb, b, seed)
        met |= {(i, j) for i, j in enumerate(cb.partner.tolist()) if i != j}
    assert met == {(i, j) for i in range(14) for j in range(14) if i != j and may_meet(b, streams, i, j)}


@pytest.mark.parametrize('streams', OPTIONS)
def test_each_item_has_a_lambda_and_a_box_of_its_own(streams):
    b = batch(20, 20)
    for kind in KINDS:
        cb = kind(1., streams)
        mix(cb, b)
        assert len(cb.lam[cb.lam < 1].unique()) >= (10 if kind is StreamMixUp else 5)


def test_lambdas_are_of_the_beta_distribution():
    b = batch(2000, 0, h=2, w=2)
    cb = StreamMixUp(.4, 'labeled')
    mix(cb, b)
    lam = cb.lam[cb.partner != torch.arange(2000)]
    mu = np.random.default_rng(0).beta(.4, .4, 200000)
    expected = np.maximum(mu, 1-mu)
    assert abs(lam.mean().item()-expected.mean()) < 4*expected.std()/len(lam)**.5
    assert abs(np.quantile(lam, .2)-np.quantile(expected, .2)) < .03


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n_labeled, n_unlabeled', [(1, 6), (6, 1), (1, 1), (0, 3), (3, 0), (1, 0)])
def test_a_stream_of_one_is_left_alone(kind, n_labeled, n_unlabeled):
    b = batch(n_labeled, n_unlabeled)
    b.weights = b.weights + .1
    b.rows = weighted_targets(b.labels, b.weights, b.c)
    for streams in OPTIONS[:3]:
        for seed in range(5):
            (x,), rows = mix(kind(1., streams), b, seed)
            for stream in (b.unlabeled, ~b.unlabeled):
                if stream.sum() < 2: assert torch.equal(x[stream], b.x[stream]) and torch.equal(rows[stream], b.rows[stream])


def test_infinite_values_of_items_that_stay_are_kept():
    b = batch()
    b.x[~b.unlabeled] = float('inf')
    for kind in KINDS:
        (x,), _ = mix(kind(streams='unlabeled'), b)
        assert torch.equal(x[~b.unlabeled], b.x[~b.unlabeled]) and x[b.unlabeled].isfinite().all()


def test_several_inputs_are_mixed_alike():
    b = batch()
    tokens = torch.randn(14, 5, 3)
    cb = StreamMixUp(streams='each')
    xb, _ = mix(cb, b, xb=(b.x, tokens, b.x[:, 0, 0, 0].half()))
    for new, old in zip(xb, (b.x, tokens, b.x[:, 0, 0, 0].half())):
        lam = cb.lam.view(-1, *[1]*(old.ndim-1))
        torch.testing.assert_close(torch.Tensor(new).float(), torch.Tensor(lam*old + (1-lam)*old[cb.partner]).float(), rtol=2e-3, atol=2e-3)
        assert type(new) is type(old) and new.dtype == old.dtype


@pytest.mark.parametrize('kind', KINDS)
def test_same_seed_same_batch(kind):
    b = batch()
    runs = [mix(kind(streams='each'), b, seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0][0][0], runs[1][0][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0][0], runs[2][0][0])


@pytest.mark.parametrize('streams', OPTIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_nothing_that_a_gpu_would_wait_for(kind, streams):
    b = batch()
    with Waits() as waits: mix(kind(streams=streams), b)
    assert not waits.found


# Integer targets: the losses are mixed

@pytest.mark.parametrize('make', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, FocalLossFlat, nn.CrossEntropyLoss, lambda: F.cross_entropy], ids=['ce', 'smooth', 'focal', 'torch', 'function'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('share', [0., .6])
def test_losses_equal_a_loop(kind, make, share):
    b, loss, cb = batch(), make(), kind(alpha=1., streams='labeled')
    y = torch.where(b.unlabeled, -100, b.labels) if share else b.labels
    pred = torch.randn(14, b.c, generator=torch.Generator().manual_seed(5), requires_grad=True)
    cb.learn = learn = stand_in((b.x,), (TensorCategory(y),), loss, cb)
    cb.before_train()
    torch.manual_seed(0)
    cb.before_batch()
    assert torch.equal(learn.yb[0], y) and (cb.partner != torch.arange(14)).any()
    assert torch.equal(learn.xb[0][y < 0], b.x[y < 0]) and (cb.partner[y < 0] == torch.arange(14)[y < 0]).all()
    res = learn.loss_func(pred, *learn.yb)
    known = [i for i in range(14) if y[i] >= 0]
    one = lambda i, k: loss(pred[i:i+1], y[k:k+1])
    expected = sum(cb.lam[i]*one(i, i) + (1-cb.lam[i])*one(i, cb.partner[i]) for i in known)/len(known)
    torch.testing.assert_close(torch.as_tensor(res).as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    learn.training = False
    torch.testing.assert_close(learn.loss_func(pred[known], y[known]), loss(pred[known], y[known]), rtol=0, atol=0)
    cb.after_train()
    assert learn.loss_func is loss


@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_the_losss_own_reduction(reduction):
    b, cb = batch(), StreamMixUp(streams='labeled')
    pred, loss = torch.randn(14, b.c), nn.CrossEntropyLoss(reduction=reduction)
    cb.learn = learn = stand_in((b.x,), (b.labels,), loss, cb)
    cb.before_train()
    cb.before_batch()
    each = cb.lam*F.cross_entropy(pred, b.labels, reduction='none') + (1-cb.lam)*F.cross_entropy(pred, b.labels[cb.partner], reduction='none')
    torch.testing.assert_close(learn.loss_func(pred, *learn.yb), each.sum() if reduction == 'sum' else each)
    assert loss.reduction == reduction


def test_unlabeled_items_add_nothing_and_a_batch_without_labels_costs_nothing():
    cb, x = StreamMixUp(streams='labeled'), torch.randn(4, 3)
    for y, n in ((torch.tensor([0, -100, -100, 1]), 2), (torch.full((4,), -100), 0)):
        pred = torch.randn(4, 2, requires_grad=True)
        cb.learn = learn = stand_in((x,), (y,), CrossEntropyLossFlat(), cb)
        cb.before_train()
        cb.before_batch()
        loss = learn.loss_func(pred, y)
        loss.backward()
        assert loss.isfinite() and (loss > 0) == (n > 0)
        assert pred.grad.isfinite().all() and (pred.grad.abs().sum(1) > 0).sum() == n


def test_float_targets_of_another_loss_are_mixed_themselves():
    x, y, cb = torch.randn(6, 3), torch.randint(2, (6, 5)).float(), StreamMixUp(streams='all')
    y[0] = 0  # a target like any other
    cb.learn = learn = stand_in((x,), (y,), nn.BCEWithLogitsLoss(), cb)
    torch.manual_seed(1)
    cb.before_train()
    cb.before_batch()
    torch.testing.assert_close(learn.yb[0], cb.lam[:, None]*y + (1-cb.lam[:, None])*y[cb.partner])
    pred = torch.randn(6, 5)
    torch.testing.assert_close(learn.loss_func(pred, *learn.yb), nn.BCEWithLogitsLoss()(pred, learn.yb[0]))
    assert cb.partner[0] != 0


# In a Learner

class Before(Callback):
    "The batch after LPCallback and before the mixing"
    order = -1
    def before_fit(self): self.batches = []
    def before_batch(self):
        if self.training: self.batches.append((self.xb[0].clone(), self.yb[0].clone(), None if not hasattr(self.learn, 'lp') else self.lp.batch_unlabeled.clone()))


class After(Callback):
    "The batch as the model sees it, and what is said to have been done"
    order = 50
    def before_fit(self): self.batches, self.losses, self.validated = [], [], []
    def after_pred(self):
        mix = next(cb for cb in self.learn.cbs if isinstance(cb, (StreamMixUp, StreamCutMix)))
        if self.training: self.batches.append((self.xb[0].clone(), self.yb[0].clone(), mix.lam, mix.partner))
        else: self.validated.append((self.xb[0].clone(), self.learn.loss_func, mix.lam))
    def after_loss(self):
        if self.training: self.losses.append(self.loss.item())


def digits_learner(seed=0, **kwargs):
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(digits(20, seed=0), device='cpu', **kwargs), small_convnet(10))
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn


def traceless(learn):
    assert type(learn.loss_func) is CrossEntropyLossFlat and learn.loss_func.func.reduction == 'mean'
    assert not any(isinstance(cb, (StreamMixUp, StreamCutMix)) for cb in learn.cbs) or learn.cbs[-1].old_lf is None
    learn.validate()


@pytest.mark.parametrize('streams', OPTIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_an_epoch_on_digits_with_LPCallback(kind, streams):
    learn, before, after, lp = digits_learner(), Before(), After(), LPCallback()
    learn.fit(1, 3e-3, cbs=[lp, before, kind(streams=streams), after])
    traceless(learn)
    assert lp.batch_unlabeled is None and len(before.batches) == len(after.batches) == len(learn.dls.train)
    assert np.isfinite(after.losses).all()
    met = set()
    for (x0, y0, unlabeled), (x, y, lam, partner) in zip(before.batches, after.batches):
        assert unlabeled[:32].logical_not().all() and unlabeled[32:].all()
        stays = partner == torch.arange(len(x))
        assert torch.equal(x[stays], x0[stays]) and torch.equal(y[stays], y0[stays])
        if streams in ('unlabeled', 'labeled'): assert stays[unlabeled if streams == 'labeled' else ~unlabeled].all()
        if streams != 'all': assert torch.equal(unlabeled[partner], unlabeled)
        met |= set(zip(unlabeled[~stays].tolist(), unlabeled[partner][~stays].tolist()))
        torch.testing.assert_close(y, lam[:, None]*y0 + (1-lam[:, None])*y0[partner])
        assert lam[~stays].min() < 1
    assert met == dict(unlabeled={(True, True)}, labeled={(False, False)}, each={(True, True), (False, False)}, all={(a, b) for a in (True, False) for b in (True, False)})[streams]
    assert after.validated and all(type(lf) is CrossEntropyLossFlat and lam is None for _, lf, lam in after.validated)
    valid = torch.cat([torch.Tensor(x) for x, *_ in after.validated])
    assert torch.equal(valid, torch.cat([torch.Tensor(b[0]) for b in learn.dls.valid]))


@pytest.mark.parametrize('streams', OPTIONS)
@pytest.mark.parametrize('two_stream', [True, False])
def test_warmup_mixes_the_labeled_items_alone(streams, two_stream):
    learn, before, after = blob_learner(two_stream=two_stream), Before(), After()
    learn.fit(1, 1e-2, cbs=[LPCallback(warmup=1), before, StreamMixUp(1., streams), after])
    seen = 0
    for (x0, y0, unlabeled), (x, y, lam, partner) in zip(before.batches, after.batches):
        assert torch.equal(unlabeled, y0.sum(1) == 0) and torch.equal(x[unlabeled], x0[unlabeled]) and not y[unlabeled].any()
        if streams == 'unlabeled': assert torch.equal(x, x0) and torch.equal(y, y0)
        else:
            assert not unlabeled[partner[~unlabeled]].any()
            torch.testing.assert_close(y.sum(), y0.sum())  # all weigh the same, so the mean stays one over the labeled items
            seen += (lam < 1).sum().item()
    assert (seen > 0) == (streams != 'unlabeled')
    if two_stream: assert all(len(u) == 9 or not u.any() for _, _, u in before.batches)


def test_in_warmup_unlabeled_changes_no_weight():
    "What is drawn there moves torch's generator, so the data and the model draw from none"
    def run(*cbs):
        torch.manual_seed(0)
        learn = blob_learner(model=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
        learn.fit(2, 1e-2, cbs=[LPCallback(warmup=2), *cbs])
        return flat_weights(learn)
    assert torch.equal(run(), run(StreamMixUp())) and not torch.equal(run(), run(StreamMixUp(streams='labeled')))


def test_two_fits_in_a_row_and_a_callback_that_stays():
    learn, cb, after = digits_learner(), StreamMixUp(), After()
    learn.add_cbs([LPCallback(warmup=1), after, cb])
    for warm in (True, False, False):
        learn.fit(1)
        assert after.batches and all((lam == 1).all() == warm for *_, lam, _ in after.batches)
        traceless(learn)
        assert not after.batches and after.validated  # this was a validation


INNER = ['before_batch', 'after_pred', 'after_loss']
TRAIN = ['before_train', *INNER, 'after_batch']
ENDS = [(error, o) for error in (KeyboardInterrupt, CancelFitException) for o in [*TRAIN, 'after_train', 'before_validate', 'after_epoch']] + \
       [(CancelEpochException, o) for o in [*TRAIN, 'after_train', 'before_validate']] + [(CancelTrainException, o) for o in TRAIN] + [(CancelBatchException, o) for o in INNER]


@pytest.mark.parametrize('error, event', ENDS, ids=lambda o: o if isinstance(o, str) else o.__name__)
@pytest.mark.parametrize('with_lp', [True, False])
def test_nothing_is_left_however_a_fit_ends(event, error, with_lp):
    class Ends(Callback):
        order = 60
        def end(self):
            if self.epoch == 0 and (self.training or event in ('before_validate', 'after_epoch')): raise error
    setattr(Ends, event, Ends.end)
    learn, cb = blob_learner(), StreamMixUp(streams='labeled')
    extra = [LPCallback()]*with_lp
    try: learn.fit(2, 1e-2, cbs=[*extra, cb, Ends()])
    except KeyboardInterrupt: assert error is KeyboardInterrupt
    traceless(learn)
    assert cb.old_lf is cb.lam is None
    learn.fit(1, 1e-2, cbs=[*extra, cb])
    traceless(learn)


def test_the_loss_is_back_at_once_while_the_callback_stays():
    "fastai's own MixUp leaves the loss mixed after an error, so this is what FitScoped is for"
    class Stops(Callback):
        order = 60
        def after_pred(self): raise KeyboardInterrupt
    learn, own = blob_learner(cbs=StreamMixUp(streams='labeled')), None
    own, stops = learn.loss_func, Stops()
    learn.add_cb(stops)
    with E(KeyboardInterrupt): learn.fit(1)
    assert learn.loss_func is own
    learn.remove_cb(stops)
    learn.fit(1)
    assert learn.loss_func is own


@pytest.mark.parametrize('with_lp', [True, False])
def test_lr_find_inference_and_export(with_lp, tmp_path, monkeypatch):
    learn = blob_learner(path=tmp_path)
    if with_lp: learn.add_cb(LPCallback())
    learn.add_cb(StreamMixUp(streams='labeled'))
    assert learn.lr_find(show_plot=False).valley > 0
    traceless(learn)
    with monkeypatch.context() as m:
        m.setattr('fastai_lp.learner.mixing.partners', None)  # not called in inference
        for ds_idx in (0, 1): learn.get_preds(ds_idx=ds_idx, with_loss=True)
        learn.validate()
        learn.tta()
    learn.fit(1)
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    torch.testing.assert_close(loaded.get_preds(dl=learn.dls.valid)[0], learn.get_preds()[0])
    cb = pickle.loads(pickle.dumps(StreamCutMix(.7, 'each')))
    assert (cb.alpha, cb.streams, cb.lam) == (.7, 'each', None)


@pytest.mark.parametrize('kind', KINDS)
def test_same_seed_same_run(kind):
    def run(seed):
        learn = digits_learner(seed)
        learn.fit(2, 3e-3, cbs=[LPCallback(warmup=1), kind(streams='all')])
        return flat_weights(learn)
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize('with_lp', [True, False])
def test_all_is_fastais_MixUp(data, with_lp):
    def run(cb):
        if with_lp: learn, cbs = blob_learner(data), [LPCallback(), cb]
        else: learn, cbs = blob_learner(data, two_stream=False, labels=data.truth.tolist()), [cb]
        learn.opt_func = SGD
        learn.fit(2, .1, cbs=cbs)
        return flat_weights(learn)
    ours = run(StreamMixUp(.7, 'all'))
    torch.testing.assert_close(ours, run(MixUp(.7)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, run(MixUp(.1)), rtol=1e-3)


def test_plain_two_streams_without_LPCallback(data):
    learn, before, after = blob_learner(data), Before(), After()
    learn.fit(1, 1e-2, cbs=[before, StreamMixUp(1., 'labeled'), after])
    for (x0, y0, _), (x, y, lam, partner) in zip(before.batches, after.batches):
        unlabeled = torch.Tensor(y0) < 0
        assert unlabeled.sum() == 8 and torch.equal(y, y0) and torch.equal(x[unlabeled], x0[unlabeled]) and (lam[~unlabeled] < 1).any()
    traceless(learn)


@pytest.mark.parametrize('kind', KINDS)
def test_data_that_is_the_batch_is_not_written_to(kind):
    "A batch that is a view of the data; fastai's CutMix pastes into it"
    x, y = torch.randn(32, 1, 6, 6), torch.arange(32) % 3
    class Views(DataLoader):
        def create_batches(self, idxs): return ((x[i:i+8], y[i:i+8]) for i in range(0, 32, 8))
    def run(cb):
        dls = DataLoaders(*[Views(list(range(32)), bs=8, num_workers=0) for _ in range(2)], device='cpu')
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
    kept = x.clone()
    run(kind(streams='all'))
    assert torch.equal(x, kept)
    run(CutMix())
    assert not torch.equal(x, kept)


def test_two_kinds_at_once_with_LPCallback():
    learn, after = digits_learner(), After()
    learn.fit(1, cbs=[LPCallback(), StreamMixUp(streams='unlabeled'), StreamCutMix(streams='labeled'), after])
    assert all((y > 0).sum(1).max() <= 2 for _, y, *_ in after.batches) and any((y[:32] > 0).sum(1).max() == 2 and (y[32:] > 0).sum(1).max() == 2 for _, y, *_ in after.batches)


# What is refused

def short(kind, streams, two_stream=True, extra=(), more=(), **kwargs):
    def fit():
        learn = blob_learner(two_stream=two_stream, **kwargs)
        own = flat_weights(learn)
        try: learn.fit(1, cbs=[*extra, kind(streams=streams), *more])
        finally:
            if two_stream: assert torch.equal(flat_weights(learn), own)
            assert type(learn.loss_func) is CrossEntropyLossFlat
    return fit


REFUSED = [
    (lambda: StreamMixUp(streams='both'), "streams='both'"),
    (lambda: StreamCutMix(alpha=-1), 'alpha=-1'),
    (lambda: StreamMixUp(alpha=float('nan')), 'above 0'),
    (short(StreamMixUp, 'unlabeled'), r'add LPCallback\(\), or take streams=.labeled'),
    (short(StreamMixUp, 'each'), r'StreamMixUp\(streams=.each.\) mixes unlabeled items, which have no target'),
    (short(StreamMixUp, 'all', two_stream=False), 'have no target without LPCallback'),
    (short(StreamMixUp, 'unlabeled', two_stream=False, labels=blobs().truth.tolist()), 'have no target without LPCallback'),
    (short(StreamCutMix, 'labeled'), r'the inputs are \(16, 8\), expected one tensor of images'),
    (short(StreamCutMix, 'unlabeled', extra=[LPCallback()]), 'expected one tensor of images'),
    (short(StreamMixUp, 'labeled', extra=[StreamMixUp(streams='labeled')]), 'two callbacks that mix'),
    (short(StreamMixUp, 'labeled', more=[MixUp()]), 'two callbacks that mix'),
    (short(StreamMixUp, 'unlabeled', extra=[LPCallback(), MeanTeacherCallback()]), 'leave them out with Mean Teacher'),
    (short(StreamCutMix, 'labeled', extra=[MeanTeacherCallback()]), 'leave them out with Mean Teacher')]


@pytest.mark.parametrize('make, message', REFUSED, ids=[m for _, m in REFUSED])
def test_refused(make, message):
    with E(ValueError, match=message): make()


@pytest.mark.parametrize('xb, message', [((torch.zeros(4, 2, dtype=torch.long),), 'input 0 of the model is torch.int64'), ((torch.zeros(4, 2), (torch.zeros(4),)), 'input 1 of the model is tuple')])
def test_codes_have_no_mean(xb, message):
    cb = StreamMixUp(streams='labeled')
    cb.learn = stand_in(xb, (torch.arange(4),), CrossEntropyLossFlat(), cb)
    cb.before_train()
    with E(ValueError, match=message): cb.before_batch()


def test_a_class_per_pixel_is_refused():
    cb = StreamMixUp(streams='labeled')
    cb.learn = stand_in((torch.zeros(4, 1, 3, 3),), (torch.zeros(4, 3, 3, dtype=torch.long),), CrossEntropyLossFlat(), cb)
    cb.before_train()
    with E(ValueError, match=r'shape \(4, 3, 3\), expected one class per item'): cb.before_batch()
