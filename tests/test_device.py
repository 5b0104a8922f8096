"No training step waits for a GPU, checked on the CPU by counting what would wait; channels-last and bfloat16."
import pytest
import torch
import torch.nn.functional as F
from fastai.callback import fp16
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.learner import AvgSmoothLoss, Learner, Recorder, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from torch import nn

from conftest import quiet
from fastai_lp.experiments.callbacks import LossOnDevice
from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import ImageArrays
from fastai_lp.experiments.splits import show_labels
from fastai_lp.experiments.models import ConvNet13, TwoHeads, resnet18_84, small_convnet
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.transductive.diffusion import _cg, diffuse, spmm
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.neighbors import _exact_torch, knn
from waits import Waits


def one_hot_on_a_gpu(x, n): return torch.zeros(*x.shape, n, dtype=torch.int64).scatter_(-1, x[..., None], 1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    "torch and LPCallback check on the CPU only whether values can be classes, and whether a batch is the expected one"
    check = LPCallback._check_match
    monkeypatch.setattr(LPCallback, '_check_match', lambda self: None if self.iter else check(self))
    monkeypatch.setattr(F, 'one_hot', one_hot_on_a_gpu)


def images(n=80, n_test=20, c=3, size=10, labels=12):
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(n+n_test) % c
    x = (40*torch.rand(n+n_test, 3, size, size, generator=g) + 90*F.one_hot(truth, 3)[:, :, None, None]).to(torch.uint8)
    return show_labels(ImageArrays(x, truth.numpy(), *torch.arange(n+n_test).split([n, n_test])), labels)


def sgd(params, **kwargs): return OptimWrapper(params, torch.optim.SGD, momentum=.9, nesterov=True)


def small(dual=False): return TwoHeads(small_convnet(3, n_in=3, width=4)[:-1], 8, 3, dual=dual)


def learner(dual=False, bar=False, labels=12, model=None, **kwargs):
    set_seed(0, reproducible=True)
    dls = image_dls(images(labels=labels), bs=16, device='cpu')
    learn = Learner(dls, model or small(dual), metrics=accuracy, **kwargs)
    return learn if bar else quiet(learn)


def waits_of_steps(learn, cbs=(), epochs=2, lr=1e-2):
    "What all training steps of a fit wait for, except the first step of each epoch"
    step, waits, steps = learn.one_batch, Waits(), []
    def one_batch(i, b):
        if i == 0 or not learn.training: return step(i, b)
        steps.append(i)
        with waits: step(i, b)
    learn.one_batch = one_batch
    learn.fit(epochs, lr, cbs=cbs)
    del learn.one_batch
    assert len(steps) >= 2*epochs
    return sorted(waits.found)


# The counter

WAITS = dict(item=lambda x: x.sum().item(), float=lambda x: float(x[0]), bool=lambda x: 1 if x.any() else 0,
    nonzero=lambda x: x.nonzero(), where=lambda x: torch.where(x > 1), mask=lambda x: x[x > 1], cpu=lambda x: x.cpu(),
    masked_select=lambda x: x.masked_select(x > 1), unique=lambda x: x.unique(), equal=lambda x: torch.equal(x, x),
    bincount=lambda x: x.long().bincount(), numpy=lambda x: x.numpy(), tensor=lambda x: torch.tensor([1], device=x.device))
WAITS_NOT = dict(where=lambda x: torch.where(x > 1, x, 0), masked_fill=lambda x: x.masked_fill(x > 1, 0),
    index=lambda x: x[x.long()], any=lambda x: (x > 1).any(), slice=lambda x: x[1:3], numel=lambda x: x.numel(),
    clamp=lambda x: x.long().clamp(min=0), one_hot=lambda x: F.one_hot(x.long(), 4), rand=lambda x: torch.rand(4))


def count(f):
    with Waits() as waits: f(torch.arange(4.))
    return waits.found


def test_the_counter_counts_what_waits(): assert [k for k, f in WAITS.items() if not count(f)] == []


def test_the_counter_counts_nothing_else(): assert [k for k, f in WAITS_NOT.items() if count(f)] == []


# Training steps

METHODS = dict(supervised=(), lp=(LPCallback,), mt=(MeanTeacherCallback,), mt_lp=(LPCallback, MeanTeacherCallback))


def make(method): return [cb(rampup=1) if cb is MeanTeacherCallback else cb(k=5) for cb in METHODS[method]]


@pytest.mark.parametrize('opt_func', [None, sgd], ids=['adam', 'torch'])
@pytest.mark.parametrize('method', [o for o in METHODS if o != 'supervised'])
def test_callbacks_wait_for_nothing(method, opt_func):
    "Recorder copies the loss"
    kwargs = {} if opt_func is None else dict(opt_func=opt_func)
    assert waits_of_steps(learner('mt' in method, **kwargs), make(method)) == ['cpu']*14


@pytest.mark.parametrize('option', [dict(warmup=9), dict(every=9), dict(mixup=.4)], ids=str)
def test_options_wait_for_nothing(option):
    cbs = [LPCallback(k=5, **option), LossOnDevice()]
    assert waits_of_steps(learner(labels=48), cbs) == []


def test_a_planted_wait_is_found():
    class Look(Callback):
        def after_loss(self): self.seen = self.loss.item() if self.training else None
    assert waits_of_steps(learner(), [LPCallback(k=5), LossOnDevice(), Look()]) == ['aten._local_scalar_dense']*14


@pytest.mark.parametrize('bar', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_with_the_loss_on_the_device_a_step_waits_for_nothing(method, bar, capsys):
    assert waits_of_steps(learner('mt' in method, bar), [*make(method), LossOnDevice()]) == []


@pytest.mark.parametrize('model', [ConvNet13, resnet18_84])
def test_networks_wait_for_nothing(model):
    set_seed(0)
    learn = quiet(Learner(image_dls(images(size=12), bs=16, device='cpu'), model(3, l2=False, dual=True), opt_func=sgd))
    assert waits_of_steps(learn, [*make('mt_lp'), LossOnDevice()], 1) == []


@pytest.mark.parametrize('two_views', [False, True])
def test_batches_are_made_without_waiting(two_views):
    dl = image_dls(images(), bs=16, augment='cifar', device='cpu').train
    if two_views: dl.two_views()
    batches = iter(dl)
    next(batches)
    with Waits() as waits: rest = list(batches)
    assert len(rest) == len(dl)-1
    assert not waits.found


@pytest.mark.parametrize('augment', ['cifar', 'mini_imagenet', None])
def test_batches_on_a_device_without_values(augment):
    "The meta device raises an error if a value is needed"
    dl = image_dls(images(size=20), bs=16, augment=augment, device='cpu').train
    table = dl.dataset
    table.images, table.rows, table.y = (o.to('meta') for o in (table.images, table.rows, table.y))
    dl.to(torch.device('meta'))
    for x, y in dl: assert (x.device.type, x.dtype, x.shape, y.shape) == ('meta', torch.float32, (16, 3, 20, 20), (16,))


def test_graph_and_diffusion_wait_for_nothing():
    "Neither blocks of the search nor iterations of CG ask for a value; the number of iterations is read once"
    x, Y = F.normalize(torch.randn(300, 8)), torch.eye(300)[:, :40]
    with Waits() as waits: sims, idxs = _exact_torch(x, 7, torch.arange(300), 4*64*50)
    assert not waits.found
    assert torch.equal(idxs, knn(x, 7)[1])
    S, _ = normalize(affinity(sims, idxs))
    def system(p): return torch.sub(p, spmm(S, p), alpha=.99)
    for max_iter in (2, 30):
        Z, r = torch.zeros_like(Y), Y.clone()
        with Waits() as waits: _cg(system, Z, r, 1e-12*torch.ones(40), max_iter, ask=False)
        assert waits.found == ['aten._local_scalar_dense']
    torch.testing.assert_close(Z, diffuse(S, Y, max_iter=30).Z)


# LossOnDevice

class Rows(Callback):
    "The rows of the table"
    order = 52
    def __init__(self): self.rows = []
    def after_epoch(self): self.rows.append(list(self.recorder.log[1:-1]))


def fitted(*cbs, epochs=2, **kwargs):
    learn, rows = learner(**kwargs), Rows()
    learn.fit(epochs, 1e-2, cbs=[LPCallback(k=5), rows, *cbs])
    return learn, rows.rows


def as_numbers(o): return [float(x) for x in o]


def test_the_recorder_is_the_same(capsys):
    (a, rows_a), (b, rows_b), (c, _) = fitted(), fitted(LossOnDevice()), fitted(LossOnDevice(), bar=True)
    rec, ref = b.recorder, a.recorder
    assert len(rec.losses) == 16
    assert as_numbers(rec.losses) == as_numbers(ref.losses) == as_numbers(c.recorder.losses)
    assert [type(o) for o in rec.losses] == [type(o) for o in ref.losses]
    assert rec.losses[0].untyped_storage().nbytes() == 4  # not a view of all losses
    assert (rec.lrs, rec.iters) == (ref.lrs, ref.iters)
    assert (rec.smooth_loss.count, rec.smooth_loss.val) == (ref.smooth_loss.count, ref.smooth_loss.val)
    assert b.smooth_loss == a.smooth_loss
    assert [row[:3] for row in rows_a] == [row[:3] for row in rows_b]  # train_loss, valid_loss, accuracy
    assert rec.plot_loss().lines[0].get_ydata().tolist() == as_numbers(ref.losses[5:])
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def assert_as_before(learn):
    assert type(learn.recorder.smooth_loss) is AvgSmoothLoss
    assert '_with_events' not in vars(learn)
    if hasattr(learn, 'progress'): assert 'after_batch' not in vars(learn.progress)


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_losses_on_the_device_leave_no_trace_after_an_error(error, capsys):
    class Stop(Callback):
        def before_step(self):
            if self.learn.train_iter == 10: raise error('stop')
    learn = learner(bar=True, cbs=LossOnDevice())
    with pytest.raises(error): learn.fit(3, 1e-2, cbs=Stop())
    assert_as_before(learn)
    assert len(learn.recorder.losses) == 10
    learn.fit(2, 1e-2)
    assert_as_before(learn)
    assert len(learn.recorder.losses) == 16


def test_losses_on_the_device_in_inference_and_export(tmp_path):
    learn = learner(cbs=LossOnDevice())
    learn.fit(1, 1e-2)
    preds = learn.get_preds()[0]
    assert_as_before(learn)
    learn.path = tmp_path
    learn.export()
    assert torch.equal(load_learner(tmp_path/'export.pkl').get_preds(dl=learn.dls.valid)[0], preds)


@pytest.mark.parametrize('error, n', [(CancelTrainException, 10), (CancelEpochException, 10), (CancelFitException, 5)])
def test_epochs_that_are_cancelled(error, n, capsys):
    class Cut(Callback):
        order = 55
        def after_batch(self):
            if self.training and self.iter == 4: raise error
    learn = learner()
    learn.fit(2, 1e-2, cbs=[LossOnDevice(), Cut()])
    other = learner()
    other.fit(2, 1e-2, cbs=Cut())
    assert_as_before(learn)
    assert len(learn.recorder.losses) == n
    assert as_numbers(learn.recorder.losses) == as_numbers(other.recorder.losses)


def test_losses_on_the_device_do_nothing_without_fastais_recorder():
    learn = learner(cbs=LossOnDevice())
    learn.lr_find(num_it=5, show_plot=False)
    assert_as_before(learn)
    learn.remove_cb(Recorder)
    learn.fit(1, 1e-2)
    fresh = quiet(Learner(learn.dls, small(), cbs=[LossOnDevice()]))
    fresh.recorder.smooth_loss = own = type('Own', (AvgSmoothLoss,), {})()
    fresh.fit(1, 1e-2)
    assert type(own).__name__ == 'Own'
    assert own.count == 8


def test_an_interrupted_run_resumes(tmp_path):
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    whole, _ = fitted(LossOnDevice(), epochs=4)
    with pytest.raises(KeyboardInterrupt): fitted(LossOnDevice(), ResumeCallback(tmp_path/'run.pth'), Stop(), epochs=4)
    resumed, _ = fitted(LossOnDevice(), ResumeCallback(tmp_path/'run.pth'), epochs=4)
    assert as_numbers(resumed.recorder.losses) == as_numbers(whole.recorder.losses)
    assert resumed.recorder.iters == whole.recorder.iters
    for p, q in zip(resumed.model.parameters(), whole.model.parameters()): assert torch.equal(p, q)


# Channels-last and bfloat16

def in_channels_last(x): return x.is_contiguous(memory_format=torch.channels_last)


def same_losses(learn, other, tol):
    torch.testing.assert_close(*(torch.stack(o.recorder.losses) for o in (learn, other)), rtol=tol, atol=tol)


def test_channels_last():
    learn, seen = learner(dual=True), []
    hook = learn.model.body[0][0].register_forward_hook(lambda m, x, out: seen.append(in_channels_last(out)))
    learn.fit(2, 1e-2, cbs=[ChannelsLast(), *make('mt_lp'), LossOnDevice()])
    hook.remove()
    plain = learner(dual=True)
    plain.fit(2, 1e-2, cbs=make('mt_lp'))
    assert len(seen) > 0
    assert all(seen)
    for net in (learn.model, learn.mt_record.teacher):
        assert all(in_channels_last(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d))
    same_losses(learn, plain, 1e-3)
    assert learn.lp_record.pseudo.reached.all()


@pytest.fixture
def autocast_on_cpu(monkeypatch):
    "fastai's MixedPrecision asks for CUDA"
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype))


def test_bfloat16(autocast_on_cpu):
    learn, dtypes = learner(dual=True, opt_func=sgd).to_channelslast(amp_mode='bf16'), set()
    hook = learn.model.head1.register_forward_hook(lambda m, x, out: dtypes.add((m.training, out.dtype)))
    learn.fit(2, 1e-2, cbs=[*make('mt_lp'), LossOnDevice()])
    hook.remove()
    plain = learner(dual=True, opt_func=sgd)
    plain.fit(2, 1e-2, cbs=make('mt_lp'))
    assert (True, torch.bfloat16) in dtypes
    for net in (learn.model, learn.mt_record.teacher):
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in net.parameters())
    same_losses(learn, plain, .05)
    assert learn.lp_record.pseudo.W.dtype == torch.float32


def test_a_step_in_bfloat16_waits_for_nothing(autocast_on_cpu):
    cbs = [ChannelsLast(), MixedPrecision(amp_mode='bf16'), *make('mt_lp'), LossOnDevice()]
    assert waits_of_steps(learner(True, opt_func=sgd), cbs) == []
