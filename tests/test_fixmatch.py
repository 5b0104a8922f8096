"FixMatchCallback against the loss written out; the two views; with LPCallback; resuming; what it leaves on the Learner."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.losses import LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.torch_core import set_seed
from torch import nn

from conftest import Mark, Stop, blob_learner, flat_weights, same_run, state_of, traceless
from fastai_lp.experiments.callbacks import BFloat16
from fastai_lp.learner.augment import strong_tfms
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.fixmatch import FixMatchCallback, fixmatch_loss
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamMixUp
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.learner.streams import semi_dls

pytestmark = pytest.mark.filterwarnings('ignore:LPCallback, epoch')  # about networks that are hardly trained


def fixmatch(threshold=.5, tfms=None, **kwargs): return FixMatchCallback(threshold, unlabeled_tfms=tfms, **kwargs)


class Noise(Callback):
    "Weak augmentation, independent for each item, and copies of the batches of two views"
    order = -20
    def __init__(self, size=.1): self.size = size
    def before_fit(self): self.batches = []
    def before_batch(self):
        if not self.training: return
        self.learn.xb = tuple(o + self.size*torch.randn_like(o) for o in self.xb)
        self.batches.append((self.xb[0].clone(), self.yb[0].clone()))


class Watch(Callback):
    "What the loss gets, and the loss"
    order = 100
    def before_fit(self): self.preds, self.targets, self.losses, self.sizes = [], [], [], []
    def after_pred(self):
        if self.training: self.preds.append(self.pred.detach().clone()), self.targets.append(self.yb[0].clone())
    def after_loss(self):
        if not self.training: return
        self.losses.append(self.loss.item())
        self.sizes.append((len(self.xb[0]), len(self.pred), len(self.yb[0])))


class Joint(nn.Module):
    "A network without randomness that keeps its outputs in training"
    def __init__(self, d=8, c=3):
        super().__init__()
        self.body, self.head, self.out = nn.Sequential(nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, c), []

    def forward(self, x):
        res = self.head(self.body(x))
        if self.training: self.out.append(res.detach().clone())
        return res


# The method

def test_loss_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    strong, weak = 3*torch.randn(20, 4, generator=g), 3*torch.randn(20, 4, generator=g)
    total, n = 0., 0
    for s, w in zip(strong.tolist(), weak.tolist()):
        p, q = ([math.exp(o)/sum(map(math.exp, z)) for o in z] for z in (s, w))
        if max(q) < .8: continue
        total, n = total - math.log(p[q.index(max(q))]), n+1
    loss, used = fixmatch_loss(strong, weak, .8)
    assert 0 < n < 20
    assert used.sum() == n
    assert loss.item() == pytest.approx(total/20, rel=1e-5)
    assert fixmatch_loss(strong[:0], weak[:0])[0] == 0


def test_no_gradient_flows_through_the_pseudo_label():
    strong, weak = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    fixmatch_loss(strong, weak, 0.)[0].backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0


def expected_loss(out, y, threshold, weight):
    "The loss of a batch from the logits of [first view, unlabeled items of the second], item by item"
    n = len(y)
    labeled = [F.cross_entropy(out[i], y[i]) for i in range(n) if y[i] >= 0]
    unlabeled, first = [i for i in range(n) if y[i] < 0], 0.
    for j, i in enumerate(unlabeled):
        q = out[n+j].softmax(0)
        if q.max() >= threshold: first = first - out[i].log_softmax(0)[q.argmax()]/len(unlabeled)
    return float(sum(labeled)/len(labeled) + weight*first)


@pytest.mark.parametrize('workers', [0, 2])
def test_training_equals_the_loss_written_out(data, workers):
    net = Joint()
    learn, noise, watch = blob_learner(data, model=net, num_workers=workers), Noise(), Watch()
    learn.fit(2, 1e-2, cbs=[noise, fixmatch(.6, weight=2.), watch])
    used = []
    for (x, y), out, loss, sizes in zip(noise.batches, net.out, watch.losses, watch.sizes, strict=True):
        n = len(y)//2
        assert torch.equal(y[:n], y[n:])
        assert not torch.equal(x[:n], x[n:])
        assert len(out) == n + (y[:n] < 0).sum()
        assert loss == pytest.approx(expected_loss(out, y[:n], .6, 2.), rel=1e-4)
        assert sizes == (n, n, n)
        used.append((out[n:].softmax(1).max(1).values >= .6).sum().item())
    per_epoch = len(learn.dls.train)
    share = dict(zip(learn.recorder.metric_names[1:], zip(*learn.recorder.values)))['fm_used']
    counts = [sum((y < 0).sum().item()//2 for _, y in noise.batches[i*per_epoch:(i+1)*per_epoch]) for i in range(2)]
    assert share == pytest.approx([sum(used[:per_epoch])/counts[0], sum(used[per_epoch:])/counts[1]])
    assert 0 < share[0] < share[1]


@pytest.mark.parametrize('settings', [dict(threshold=1.), dict(threshold=0., weight=0)], ids=['threshold 1', 'weight 0'])
@pytest.mark.parametrize('loss_func', [None, LabelSmoothingCrossEntropyFlat()], ids=['cross-entropy', 'smoothed'])
def test_without_pseudo_labels_the_loss_is_that_of_the_labeled_items(loss_func, settings):
    "A linear network is never quite certain"
    class LabeledOnly(Callback):
        def after_pred(self):
            if not self.training: return
            labeled = self.yb[0] >= 0
            self.learn.pred, self.learn.yb = self.pred[labeled], (self.yb[0][labeled],)
    weights = []
    for cb in (LabeledOnly(), fixmatch(**settings)):
        set_seed(1)
        learn = blob_learner(model=nn.Linear(8, 3), loss_func=loss_func)
        learn.fit(2, 1e-3, cbs=cb)
        weights.append(flat_weights(learn))
    torch.testing.assert_close(*weights)


def test_batchnorm_is_updated_once_per_batch(data):
    learn = blob_learner(data)
    learn.fit(1, 1e-2, cbs=fixmatch())
    assert learn.model[1].num_batches_tracked == len(learn.dls.train)


def test_accumulated_gradients(data):
    steps = []
    class Count(Callback):
        def after_step(self): steps.append(self.iter)
    learn = blob_learner(data)
    learn.fit(1, 1e-2, cbs=[fixmatch(), GradientAccumulation(32), Count()])
    assert len(steps) == len(learn.dls.train)//2


# The strong view

def test_only_the_first_view_of_unlabeled_items_is_transformed(data):
    noise, mark = Noise(0.), Mark()
    learn = blob_learner(data)
    learn.fit(1, 1e-2, cbs=[noise, fixmatch(tfms=mark)])
    for x, y in noise.batches:
        seven, n = (x == 7).all(1), len(y)//2
        assert torch.equal(seven[:n], y[:n] < 0)
        assert not seven[n:].any()
    assert len(mark.log) == len(learn.dls.train)


@pytest.mark.parametrize('own', [None, Mark()], ids=['LPCallback without', 'LPCallback with'])
def test_transforms_are_applied_once_with_label_propagation(own):
    mark, learn = Mark(), blob_learner()
    if own: own.log.clear()
    n = len(learn.dls.train)
    learn.fit(3, 1e-2, cbs=[LPCallback(warmup=1, unlabeled_tfms=own), fixmatch(tfms=mark)])
    assert len(mark.log) == (n if own else 3*n)  # in its warm-up LPCallback has none
    if own: assert len(own.log) == 2*n


def test_transforms_of_images_warn_for_other_inputs(data):
    with pytest.warns(UserWarning, match='FixMatchCallback: unlabeled_tfms=True is for images, and the inputs are Tensor') as seen:
        blob_learner(data).fit(2, 1e-2, cbs=FixMatchCallback())
    assert len([o for o in seen if 'is for images' in str(o.message)]) == 1


def test_default_transforms(): assert [type(o) for o in FixMatchCallback().unlabeled_tfms] == [type(o) for o in strong_tfms()]


# With LPCallback

def test_loss_with_label_propagation(data):
    net = Joint()
    learn, noise, watch = blob_learner(data, model=net), Noise(), Watch()
    learn.fit(3, 1e-2, cbs=[LPCallback(warmup=1), noise, fixmatch(.6), watch])
    n_warm = len(learn.dls.train)
    outs = [o for o in net.out if len(o) > 8]
    for i, ((x, _), out, loss, pred, target) in enumerate(zip(noise.batches, outs, watch.losses, watch.preds, watch.targets)):
        n = len(x)//2
        unlabeled = torch.tensor([data.labels[j] is None for j in torch.cdist(x[:n], data.x).argmin(1).tolist()])
        assert len(pred) == ((~unlabeled).sum() if i < n_warm else n)
        own = -(target*pred.log_softmax(1)).sum(1).mean()
        other, _ = fixmatch_loss(out[:n][unlabeled], out[n:], .6)
        assert loss == pytest.approx((own + other).item(), rel=1e-4)
        assert watch.sizes[i] == (n, n, n)
    assert {'lp_certainty', 'fm_used'} <= set(learn.recorder.metric_names)


def test_warm_up_of_label_propagation_is_fixmatch_alone(data):
    weights = []
    for cbs in ([], [LPCallback(warmup=9)]):
        learn = blob_learner(data)
        learn.fit(2, 1e-2, cbs=[*cbs, fixmatch()])
        weights.append(flat_weights(learn))
    torch.testing.assert_close(*weights)


def test_the_preset_mixes_nothing(data):
    learn = blob_learner(data)
    learn.fit(2, 1e-2, cbs=[LPCallback.strong(unlabeled_tfms=None), fixmatch()])
    assert len(learn.lp_record.history) == 2
    traceless(learn)


# Resuming, and what a fit leaves

@pytest.mark.parametrize('with_lp', [False, True])
def test_an_interrupted_fit_resumes_bit_by_bit(with_lp, tmp_path):
    def run(*more, seed=0, stop=None):
        learn = blob_learner(path=tmp_path, seed=seed)
        cbs = [Noise(), FixMatchCallback(.5, unlabeled_tfms=Mark()), *[LPCallback(warmup=1)]*with_lp, *more]
        if stop is None: learn.fit_one_cycle(4, 1e-2, cbs=cbs)
        else:
            with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(4, 1e-2, cbs=[*cbs, stop])
        return learn
    file = tmp_path/'run.pth'
    run(ResumeCallback(file), stop=Stop('before_batch', 2))
    same_run(run(), run(ResumeCallback(file), seed=5))


EVENTS = ('before_fit before_epoch before_train before_batch after_pred after_loss before_backward before_step after_step after_batch '
    'after_train before_validate after_validate after_epoch after_fit').split()


@pytest.mark.parametrize('order', [-7, 70])
@pytest.mark.parametrize('event', EVENTS)
def test_an_error_leaves_no_trace(event, order, data):
    learn, stop = blob_learner(data), Stop(event, 1)
    stop.order = order
    before, mark = state_of(learn), Mark()
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[FixMatchCallback(.5, unlabeled_tfms=mark), stop])
    assert stop.done
    assert state_of(learn) == before
    traceless(learn)


def test_inference_and_lr_find_have_one_view(data, tmp_path):
    cb, sizes = FixMatchCallback(unlabeled_tfms=None), []
    learn = blob_learner(data, cbs=cb, path=tmp_path)
    learn.add_cb(Callback(before_batch=lambda o: sizes.append(len(o.learn.xb[0]))))
    before = state_of(learn)
    learn.lr_find(num_it=5, show_plot=False)
    assert set(sizes[:5]) == {16}
    learn.fit(1, 1e-2)
    assert learn.get_preds()[0].shape == (30, 3)
    assert len(learn.validate()) == 2
    assert state_of(learn) == before


def test_the_column(data, tmp_path):
    learn, names = blob_learner(data, path=tmp_path, cbs=[fixmatch(), LPCallback()]), []
    learn.add_cb(Callback(before_epoch=lambda cb: names.append(list(cb.recorder.metric_names))))
    learn.add_cb(SaveModelCallback(monitor='fm_used', comp=np.greater))
    learn.fit(2, 1e-2)
    used = [dict(zip(names[0][1:], row))['fm_used'] for row in learn.recorder.values]
    assert learn.save_model.best == max(used) == max(used[0], learn.fix_match.used)
    assert len(learn.validate()) == 2
    learn.get_preds()
    learn.lr_find(num_it=3, show_plot=False)
    assert len(names) >= 5
    for row in names: assert {'fm_used', 'lp_certainty'} <= set(row)
    assert [m.name for m in learn.metrics] == ['accuracy']


@pytest.mark.parametrize('extra', [[], [LPCallback(warmup=1)]], ids=['alone', 'with LPCallback'])
def test_metrics_of_the_training_set_in_bfloat16(data, extra):
    learn, kinds = blob_learner(data), []
    learn.recorder.train_metrics = True
    class Kinds(Callback):
        order = 100
        def after_batch(self): kinds.append((self.pred.dtype, self.yb[0].dtype, len(self.pred) == len(self.yb[0])))
    learn.fit(2, 1e-2, cbs=[*extra, fixmatch(), BFloat16(), Kinds()])
    assert set(kinds) == {(torch.float32, torch.int64, True)}
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_fm_used'] == row['valid_fm_used'] > 0


def test_exported_learners_predict(data, tmp_path):
    learn = blob_learner(data, path=tmp_path, cbs=fixmatch())
    learn.fit(1, 1e-2)
    learn.export('model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    assert torch.equal(flat_weights(loaded), flat_weights(learn))
    loaded.dls = semi_dls(learn.dls)
    loaded.fit(1, 1e-2)


@pytest.mark.parametrize('make, match', [
    (lambda: blob_learner(two_stream=False).fit(1, cbs=fixmatch()), 'FixMatch needs two-stream batches, .* use semi_dls'),
    (lambda: blob_learner().fit(1, cbs=[fixmatch(), MixUp()]), 'MixUp and CutMix cannot be used with FixMatch'),
    (lambda: blob_learner().fit(1, cbs=[LPCallback(), fixmatch(), StreamMixUp()]), 'MixUp and CutMix cannot be used with FixMatch'),
    (lambda: blob_learner().fit(1, cbs=[LPCallback(mixup=.4), fixmatch()]), 'mixup=0.4 cannot be used with Mean Teacher or FixMatch'),
    (lambda: blob_learner().fit(1, cbs=[MeanTeacherCallback(), fixmatch()]), 'cannot be used together'),
    (lambda: blob_learner(loss_func=MSELossFlat()).fit(1, cbs=fixmatch()), 'pseudo-labels need cross-entropy'),
    (lambda: blob_learner(model=nn.Linear(8, 5)).fit(1, cbs=fixmatch()), r'one output per class, \[items, 3\], got \(\d+, 5\)'),
    (lambda: fixmatch(95), r'threshold must be a number in \[0, 1\], got 95'),
    (lambda: fixmatch(weight=-1), 'weight must be a number of at least 0')],
    ids='plain mixup stream-mixup lp-mixup mean-teacher loss outputs threshold weight'.split())
def test_errors(make, match):
    with pytest.raises(ValueError, match=match): make()
