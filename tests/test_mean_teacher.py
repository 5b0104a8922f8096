"MeanTeacherCallback against an independent mean and a training loop written out; two views; no trace."
import copy

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conftest import blob_learner, blob_model, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback, ema_decay, teacher_in_place


class TwoHeads(nn.Module):
    "Both heads in training, the first alone in evaluation"
    def __init__(self, d=8, c=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.other, self.head = nn.Linear(16, c), nn.Linear(16, c)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.other(x)) if self.training else self.head(x)


class Spy(Callback):
    "What the student and the loss see"
    order = 100
    def before_fit(self): self.x, self.y, self.losses, self.states = [], [], [], [copy.deepcopy(self.learn.model.state_dict())]
    def after_pred(self):
        if self.training: self.x.append(self.xb[0].clone()), self.y.append(self.yb[0].clone())
    def after_loss(self):
        if self.training: self.losses.append(self.loss.item())
    def after_step(self): self.states.append(copy.deepcopy(self.learn.model.state_dict()))


class Noise(Callback):
    "Augmentation: noise, independent for each item, before anything else happens to the batch"
    order = -50
    def before_batch(self):
        if self.training: self.learn.xb = tuple(o + .01*torch.randn_like(o) for o in self.xb)


def traceless(learn):
    dl = learn.dls.train
    assert (dl.bs, dl.views) == (16, 1) and '_with_events' not in vars(learn)
    assert [m.name for m in learn.metrics] == ['accuracy']


@pytest.fixture
def data(): return blobs()


@pytest.mark.parametrize('extra', [[], [LPCallback(warmup=1)]], ids=['alone', 'with LPCallback'])
def test_the_mean_is_that_of_swa_utils(data, extra):
    learn, spy, cb = blob_learner(data), Spy(), MeanTeacherCallback()
    reference = AveragedModel(copy.deepcopy(learn.model), avg_fn=lambda mean, p, n: mean*ema_decay(int(n), .97) + p*(1-ema_decay(int(n), .97)))
    reference.update_parameters(learn.model)  # its first call copies
    learn.fit(3, 1e-2, cbs=[*extra, cb, spy])
    model = blob_model()
    for state in spy.states[1:]:
        model.load_state_dict(state)
        reference.update_parameters(model)
    assert cb.record.step == len(spy.states)-1 > 6
    for p, q in zip(cb.record.teacher.parameters(), reference.module.parameters()): torch.testing.assert_close(p, q)


@pytest.mark.parametrize('model', [blob_model, TwoHeads])
def test_equals_a_loop_written_out(data, model):
    "The first epochs of a run, with a model without dropout, from its batches"
    net = model()
    for m in net.modules():
        if isinstance(m, nn.Dropout): m.p = 0
    learn, spy, cb, views = blob_learner(data, model=net), Spy(), MeanTeacherCallback(weight=30, rampup=2, decay=.9), []
    class Both(Callback):
        order = -20
        def before_batch(self):
            if self.training: views.append((self.xb[0].clone(), self.yb[0].clone()))
    start = copy.deepcopy(net)
    learn.fit(2, 1e-2, cbs=[Noise(), Both(), cb, spy])
    student, teacher, t = copy.deepcopy(start), copy.deepcopy(start).train(), 0
    for i, ((x, y), state, loss) in enumerate(zip(views, spy.states[1:], spy.losses)):
        n, epoch = len(x)//2, i//learn.dls.train.__len__()
        assert torch.equal(y[:n], y[n:]) and not torch.equal(x[:n], x[n:]) and (x[:n]-x[n:]).abs().max() < .2
        student.load_state_dict(spy.states[i])
        out = student.train()(x[:n])
        first, second = out if isinstance(out, tuple) else (out, out)
        with torch.no_grad(): target = teacher(x[n:])
        target = (target[0] if isinstance(target, tuple) else target).softmax(1)
        expected = F.cross_entropy(first, y[:n], ignore_index=-100, reduction='sum')/n
        expected = expected + 30*torch.exp(torch.tensor(-5*(1-min(epoch/2, 1))**2))*((second.softmax(1)-target)**2).sum()/3/n
        if second is not first: expected = expected + .01*((first-second)**2).sum()/3/n
        assert abs(expected.item()-loss) < 1e-5
        t += 1
        student.load_state_dict(state)
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), student.parameters()): p.copy_(ema_decay(t, .9)*p + (1-ema_decay(t, .9))*q)
    for (k, p), q in zip(teacher.state_dict().items(), cb.record.teacher.state_dict().values()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=k)


@pytest.mark.parametrize('workers', [0, 2])
def test_views_targets_and_steps(data, workers):
    learn, spy = blob_learner(data, num_workers=workers), Spy()
    n = len(learn.dls.train)
    learn.fit(2, 1e-2, cbs=[LPCallback(warmup=1, truth=data.truth[:data.n_train]), MeanTeacherCallback(), spy])
    assert len(spy.x) == 2*n  # both streams in warm-up too, and as many steps as ever
    p = learn.lp_record.pseudo
    for i, (x, y) in enumerate(zip(spy.x, spy.y)):
        items = torch.cdist(x, data.x).argmin(1)
        assert len(x) == 16 and torch.equal(x, data.x[items])
        labels = torch.tensor([-1 if data.labels[j] is None else data.labels[j] for j in items.tolist()])
        expected = (labels >= 0).float() if i < n else p.weights[items]
        torch.testing.assert_close(torch.as_tensor(y).sum(1), expected)
        assert (y.argmax(1) == (labels if i < n else p.labels[items]))[expected > 0].all()
    traceless(learn)


def test_weight_zero_trains_the_student_as_without():
    "but for the loss, which is divided by the whole batch, and the order of the random numbers"
    weights = []
    for cbs in ([], [MeanTeacherCallback(weight=0)]):
        set_seed(3)
        learn = blob_learner(model=nn.Linear(8, 3))
        if not cbs: learn.loss_func = lambda pred, y: F.cross_entropy(pred, y, ignore_index=-100, reduction='sum')/16
        learn.fit(2, 1e-2, cbs=cbs)
        weights.append(flat_weights(learn))
    torch.testing.assert_close(*weights)


def test_columns_and_the_teacher_in_place(data, tmp_path):
    learn = blob_learner(data, path=tmp_path)
    learn.fit(3, 1e-2, cbs=MeanTeacherCallback())
    reported = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    student, before = learn.validate(), flat_weights(learn)
    with teacher_in_place(learn):
        teacher = learn.validate()
        learn.export('teacher.pkl')
    assert torch.equal(flat_weights(learn), before) and learn.validate() == student
    assert reported['accuracy'] == pytest.approx(student[1]) and reported['teacher_accuracy'] == pytest.approx(teacher[1])
    learn.export('student.pkl')
    for name, params in (('student', learn.model.parameters()), ('teacher', learn.mt_record.teacher.parameters())):
        loaded = load_learner(tmp_path/f'{name}.pkl')
        assert loaded.mt_record.teacher is None  # no second network in the file
        for p, q in zip(loaded.model.parameters(), params): assert torch.equal(p, q)
    with pytest.raises(ZeroDivisionError), teacher_in_place(learn): 1/0
    assert torch.equal(flat_weights(learn), before)
    with pytest.raises(ValueError, match='no teacher'), teacher_in_place(blob_learner(data)): pass


def test_a_later_fit_goes_on_with_the_teacher(data):
    learn = blob_learner(data)
    learn.fit(1, 1e-2, cbs=MeanTeacherCallback())
    first, steps = learn.mt_record.teacher, learn.mt_record.step
    learn.fit(2, 1e-2, cbs=(cb := MeanTeacherCallback()))
    assert cb.record is learn.mt_record and cb.record.teacher is first and cb.record.step == 3*steps and cb.record.epochs == 3
    set_seed(9)
    fresh = blob_model()
    learn.fit(1, 0., cbs=(cb := MeanTeacherCallback(teacher=fresh, decay=.5)))
    assert cb.record.step == steps and learn.mt_record is cb.record and cb.record.teacher is not first
    assert all(p.requires_grad for p in learn.model.parameters()) and not any(p.requires_grad for p in cb.record.teacher.parameters())


def test_state_of_the_record(data, tmp_path):
    learn = blob_learner(data)
    learn.fit(2, 1e-2, cbs=MeanTeacherCallback())
    torch.save(learn.mt_record.state_dict(), tmp_path/'teacher.pth')
    other = MeanTeacherCallback()
    other.record.load_state_dict(torch.load(tmp_path/'teacher.pth', weights_only=True), blob_model())
    assert (other.record.step, other.record.epochs) == (learn.mt_record.step, 2)
    for p, q in zip(other.record.teacher.state_dict().values(), learn.mt_record.teacher.state_dict().values()): assert torch.equal(p, q)


def test_own_batchnorm_statistics(data):
    learn = blob_learner(data)
    learn.fit(2, 1e-2, cbs=[Noise(), cb := MeanTeacherCallback()])
    student, teacher = learn.model[1], cb.record.teacher[1]
    assert teacher.num_batches_tracked == student.num_batches_tracked and not torch.equal(teacher.running_mean, student.running_mean)


def test_accumulated_gradients_are_one_step(data):
    learn = blob_learner(data)
    learn.fit(1, 1e-2, cbs=[cb := MeanTeacherCallback(), GradientAccumulation(32)])
    assert cb.record.step == len(learn.dls.train)//2


def test_mixed_precision(data):
    learn = blob_learner(data).to_bf16()
    with torch.autocast('cpu', torch.bfloat16): learn.fit(2, 1e-2, cbs=[LPCallback(warmup=1), cb := MeanTeacherCallback()])
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in cb.record.teacher.parameters())


def test_learns_more_than_the_labels_alone_teach():
    "Mean over three data sets; the labels alone have as many steps"
    acc = dict(alone=0., mt=0., both=0.)
    for seed in range(3):
        data = blobs(n=330, spread=2., seed=seed, per_class=2)
        for name, cbs in dict(alone=[MeanTeacherCallback(weight=0)], mt=[MeanTeacherCallback(weight=10)], both=[LPCallback(warmup=3), MeanTeacherCallback(weight=10)]).items():
            learn = blob_learner(data)
            learn.fit(12, 1e-2, cbs=cbs)
            acc[name] += learn.validate()[1]/3
    assert acc['mt'] > acc['alone'] and acc['both'] > acc['alone'], acc


class Break(Callback):
    def __init__(self, event, error): self.event, self.error = event, error
    def __call__(self, name):
        if name == self.event and self.epoch == 1: raise self.error
        return super().__call__(name)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('event', ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_step', 'before_validate', 'after_epoch'])
@pytest.mark.parametrize('lp', [False, True])
def test_interrupted_anywhere(data, event, error, lp):
    learn = blob_learner(data)
    cbs = [LPCallback()]*lp + [MeanTeacherCallback()]
    with pytest.raises(error): learn.fit(3, cbs=[*cbs, Break(event, error)])
    traceless(learn)
    learn.fit(1, cbs=cbs)
    traceless(learn)


def test_inference_and_lr_find_know_no_teacher(data, tmp_path):
    learn = blob_learner(data, cbs=MeanTeacherCallback(), path=tmp_path)
    learn.lr_find(num_it=5, show_plot=False)
    assert getattr(learn, 'mt_record', None) is None
    learn.fit(1, 1e-2)
    assert learn.get_preds()[0].shape == (30, 3) and len(learn.validate()) == 2
    traceless(learn)


@pytest.mark.parametrize('make, match', [
    (lambda: blob_learner(two_stream=False).fit(1, cbs=MeanTeacherCallback()), r'make it with semi_dls'),
    (lambda: blob_learner().fit(1, cbs=[MeanTeacherCallback(), MixUp()]), 'MixUp and CutMix'),
    (lambda: MeanTeacherCallback(decay=1.), r'a decay in \[0, 1\)'),
    (lambda: MeanTeacherCallback(weight=-1), 'weight=-1')])
def test_refused(make, match):
    with pytest.raises(ValueError, match=match): make()
