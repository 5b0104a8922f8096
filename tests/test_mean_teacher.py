"MeanTeacherCallback against an independent average and a training loop; the two views; what it leaves on the Learner."
import copy

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.metrics import F1Score, Perplexity, accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conftest import blob_learner, blob_model, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback, teacher_in_place
from fastai_lp.utils.ema import ema_decay


class TwoHeads(nn.Module):
    "Both heads in training, the first one in evaluation"
    def __init__(self, d=8, c=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.other, self.head = nn.Linear(16, c), nn.Linear(16, c)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.other(x)) if self.training else self.head(x)


class Spy(Callback):
    "The batches, the losses, and the weights of the student after each step"
    order = 100
    def before_fit(self):
        self.x, self.y, self.losses, self.states = [], [], [], []
        self.after_step()
    def after_pred(self):
        if self.training: self.x.append(self.xb[0].clone()), self.y.append(self.yb[0].clone())
    def after_loss(self):
        if self.training: self.losses.append(self.loss.item())
    def after_step(self): self.states.append(copy.deepcopy(self.learn.model.state_dict()))


class Noise(Callback):
    "Augmentation by noise, independent for each item, before anything else happens to the batch"
    order = -50
    def before_batch(self):
        if self.training: self.learn.xb = tuple(o + .01*torch.randn_like(o) for o in self.xb)


# The method

@pytest.mark.parametrize('extra', [[], [LPCallback(warmup=1)]], ids=['alone', 'with LPCallback'])
def test_teacher_equals_averaged_model_of_torch(data, extra):
    learn, spy, cb = blob_learner(data), Spy(), MeanTeacherCallback()
    def average(mean, p, n): return mean*ema_decay(int(n), .97) + p*(1-ema_decay(int(n), .97))
    reference, model = AveragedModel(copy.deepcopy(learn.model), avg_fn=average), blob_model()
    reference.update_parameters(learn.model)  # its first update copies
    learn.fit(3, 1e-2, cbs=[*extra, cb, spy])
    for state in spy.states[1:]:
        model.load_state_dict(state)
        reference.update_parameters(model)
    assert cb.record.step == len(spy.states)-1 > 6
    for p, q in zip(cb.record.teacher.parameters(), reference.module.parameters()): torch.testing.assert_close(p, q)


def expected_loss(student, teacher, x, y, weight):
    "The loss of a batch of two views, written out"
    n = len(x)//2
    out = student.train()(x[:n])
    first, second = out if isinstance(out, tuple) else (out, out)
    with torch.no_grad(): target = teacher(x[n:])
    target = (target[0] if isinstance(target, tuple) else target).softmax(1)
    loss = F.cross_entropy(first, y[:n], ignore_index=-100, reduction='sum')/n
    loss = loss + weight*((second.softmax(1)-target)**2).sum()/3/n
    return loss if second is first else loss + .01*((first-second)**2).sum()/3/n


@pytest.mark.parametrize('model', [blob_model, TwoHeads])
def test_training_equals_a_loop(data, model):
    net, views = model(), []
    for m in net.modules():
        if isinstance(m, nn.Dropout): m.p = 0
    class Both(Callback):
        order = -20
        def before_batch(self):
            if self.training: views.append((self.xb[0].clone(), self.yb[0].clone()))
    learn, spy, cb = blob_learner(data, model=net), Spy(), MeanTeacherCallback(weight=30, rampup=2, decay=.9)
    student, teacher = copy.deepcopy(net), copy.deepcopy(net).train()
    learn.fit(2, 1e-2, cbs=[Noise(), Both(), cb, spy])
    for i, ((x, y), loss) in enumerate(zip(views, spy.losses)):
        ramp = torch.exp(torch.tensor(-5*(1-i//len(learn.dls.train)/2)**2))
        student.load_state_dict(spy.states[i])
        assert abs(expected_loss(student, teacher, x, y, 30*ramp).item()-loss) < 1e-5
        student.load_state_dict(spy.states[i+1])
        d = ema_decay(i+1, .9)
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), student.parameters()): p.copy_(d*p + (1-d)*q)
    for (k, p), q in zip(teacher.state_dict().items(), cb.record.teacher.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=k)


def test_views_have_the_same_items_and_their_own_augmentation(data):
    seen = []
    class Both(Callback):
        order = -20
        def before_batch(self):
            if self.training: seen.append((self.xb[0].clone(), self.yb[0].clone()))
    blob_learner(data).fit(1, cbs=[Noise(), Both(), MeanTeacherCallback()])
    for x, y in seen:
        (a, b), (c, d) = x.chunk(2), y.chunk(2)
        assert torch.equal(c, d)
        assert not torch.equal(a, b)
        assert (a-b).abs().max() < .2


@pytest.mark.parametrize('workers', [0, 2])
def test_targets_with_label_propagation(data, workers):
    learn, spy = blob_learner(data, num_workers=workers), Spy()
    n = len(learn.dls.train)
    learn.fit(2, 1e-2, cbs=[LPCallback(warmup=1), MeanTeacherCallback(), spy])
    assert len(spy.x) == 2*n  # both streams in warm-up too
    p = learn.lp_record.pseudo
    for i, (x, y) in enumerate(zip(spy.x, spy.y)):
        items = torch.cdist(x, data.x).argmin(1)
        assert torch.equal(x, data.x[items])
        labels = torch.tensor([-1 if data.labels[j] is None else data.labels[j] for j in items.tolist()])
        weights = (labels >= 0).float() if i < n else p.weights[items]
        torch.testing.assert_close(torch.as_tensor(y).sum(1), weights)
        assert (y.argmax(1) == (labels if i < n else p.labels[items]))[weights > 0].all()


def test_with_weight_0_the_student_learns_from_the_labels_alone():
    "The loss is divided by the size of the batch"
    weights = []
    for cbs in ([], [MeanTeacherCallback(weight=0)]):
        set_seed(3)
        learn = blob_learner(model=nn.Linear(8, 3))
        if not cbs: learn.loss_func = lambda pred, y: F.cross_entropy(pred, y, ignore_index=-100, reduction='sum')/16
        learn.fit(2, 1e-2, cbs=cbs)
        weights.append(flat_weights(learn))
    torch.testing.assert_close(*weights)


def test_teacher_has_its_own_batchnorm_statistics(data):
    learn, cb = blob_learner(data), MeanTeacherCallback()
    learn.fit(2, 1e-2, cbs=[Noise(), cb])
    student, teacher = learn.model[1], cb.record.teacher[1]
    assert teacher.num_batches_tracked == student.num_batches_tracked
    assert not torch.equal(teacher.running_mean, student.running_mean)


def test_statistics_that_the_student_keeps(data):
    class Keep(Callback):
        def before_train(self): self.learn.model[1].eval()
    learn, cb = blob_learner(data), MeanTeacherCallback()
    learn.fit(2, 1e-2, cbs=[Noise(), cb, Keep()])
    teacher = cb.record.teacher
    assert teacher[1].num_batches_tracked == 0
    assert not torch.equal(teacher[1].weight, torch.ones_like(teacher[1].weight))


def test_accumulated_gradients_are_one_step(data):
    learn, cb = blob_learner(data), MeanTeacherCallback()
    learn.fit(1, 1e-2, cbs=[cb, GradientAccumulation(32)])
    assert cb.record.step == len(learn.dls.train)//2


@pytest.mark.slow
def test_accuracy_is_better_than_with_the_labels_alone():
    "Mean over three data sets, with the same number of steps"
    acc = dict(alone=0., mt=0., both=0.)
    for seed in range(3):
        data = blobs(n=330, spread=2., seed=seed, per_class=2)
        runs = dict(alone=[MeanTeacherCallback(weight=0)], mt=[MeanTeacherCallback(weight=10)],
            both=[LPCallback(warmup=3), MeanTeacherCallback(weight=10)])
        for name, cbs in runs.items():
            learn = blob_learner(data)
            learn.fit(12, 1e-2, cbs=cbs)
            acc[name] += learn.validate()[1]/3
    assert acc['mt'] > acc['alone'], acc
    assert acc['both'] > acc['alone'], acc


# What a fit leaves

def test_metrics_of_the_teacher(data):
    learn = blob_learner(data)
    learn.fit(3, 1e-2, cbs=MeanTeacherCallback())
    reported = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    student, before = learn.validate(), flat_weights(learn)
    with teacher_in_place(learn): teacher = learn.validate()
    assert reported['accuracy'] == pytest.approx(student[1])
    assert reported['teacher_accuracy'] == pytest.approx(teacher[1])
    assert learn.validate() == student
    with pytest.raises(ZeroDivisionError), teacher_in_place(learn): 1/0
    assert torch.equal(flat_weights(learn), before)


def test_exported_learners_have_one_network(data, tmp_path):
    learn = blob_learner(data, path=tmp_path)
    learn.fit(1, 1e-2, cbs=MeanTeacherCallback())
    learn.export('student.pkl')
    with teacher_in_place(learn): learn.export('teacher.pkl')
    for name, net in dict(student=learn.model, teacher=learn.mt_record.teacher).items():
        loaded = load_learner(tmp_path/f'{name}.pkl')
        assert loaded.mt_record.teacher is None
        for p, q in zip(loaded.model.parameters(), net.parameters()): assert torch.equal(p, q)


def test_a_later_fit_continues_with_the_teacher(data):
    learn, cb = blob_learner(data), MeanTeacherCallback()
    learn.fit(1, 1e-2, cbs=MeanTeacherCallback())
    first, steps = learn.mt_record.teacher, learn.mt_record.step
    learn.fit(2, 1e-2, cbs=cb)
    assert cb.record is learn.mt_record
    assert cb.record.teacher is first
    assert (cb.record.step, cb.record.epochs) == (3*steps, 3)


def test_a_given_teacher_is_copied_and_starts_over(data):
    learn, given = blob_learner(data), blob_model()
    learn.fit(1, 1e-2, cbs=MeanTeacherCallback())
    steps, cb = learn.mt_record.step, MeanTeacherCallback(teacher=given, decay=.5)
    learn.fit(1, 0., cbs=cb)
    assert learn.mt_record is cb.record
    assert cb.record.step == steps
    assert cb.record.teacher is not given
    assert not any(p.requires_grad for p in cb.record.teacher.parameters())
    assert all(p.requires_grad for p in [*learn.model.parameters(), *given.parameters()])


def test_lr_find_and_inference_make_no_teacher(data, tmp_path):
    learn = blob_learner(data, cbs=MeanTeacherCallback(), path=tmp_path)
    learn.lr_find(num_it=5, show_plot=False)
    assert getattr(learn, 'mt_record', None) is None
    learn.fit(1, 1e-2)
    assert learn.get_preds()[0].shape == (30, 3)
    assert len(learn.validate()) == 2
    assert learn.dls.train.views == 1


@pytest.mark.parametrize('make, match', [
    (lambda: blob_learner(two_stream=False).fit(1, cbs=MeanTeacherCallback()), 'use semi_dls'),
    (lambda: blob_learner().fit(1, cbs=[MeanTeacherCallback(), MixUp()]), 'MixUp and CutMix'),
    (lambda: MeanTeacherCallback(decay=1.), r'decay must be a number in \[0, 1\)'),
    (lambda: MeanTeacherCallback(weight=-1), 'weight must be a number of at least 0')], ids=['plain', 'mixup', 'decay', 'weight'])
def test_errors(make, match):
    with pytest.raises(ValueError, match=match): make()


@pytest.mark.parametrize('metrics', [[accuracy], [accuracy, F1Score(average='macro')], [Perplexity()]], ids=['average', 'stored', 'loss'])
def test_metrics_of_the_training_set(data, metrics):
    "Recorder(train_metrics=True): the teacher is evaluated on the validation set only"
    learn = blob_learner(data)
    learn.metrics = metrics
    learn.recorder.train_metrics = True
    learn.fit(2, 1e-2, cbs=[LPCallback(), MeanTeacherCallback()])
    for row in learn.recorder.values:
        row = dict(zip(learn.recorder.metric_names[1:], row))
        for m in learn.metrics:
            assert row[f'train_teacher_{m.name}'] is None
            assert isinstance(row[f'train_{m.name}'], float)
    with teacher_in_place(learn): teacher = learn.validate()
    assert [row[f'valid_teacher_{m.name}'] for m in learn.metrics] == pytest.approx(teacher[-len(metrics):])
