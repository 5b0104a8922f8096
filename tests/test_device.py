"What a GPU would wait for, counted on the CPU: a training step asks for no value. And channels-last and bfloat16."
import pytest
import torch
import torch.nn.functional as F
from fastai.callback import fp16
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.learner import AvgSmoothLoss, Learner, Recorder, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.callbacks import LossOnDevice
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import ImageArrays
from fastai_lp.experiments.splits import show_labels
from fastai_lp.transductive.diffusion import _cg, diffuse, spmm
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.experiments.models import ConvNet13, TwoHeads, resnet18_84, small_convnet
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.transductive.neighbors import _exact_torch, knn

aten, T = torch.ops.aten, torch.Tensor
asking = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten._unique, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount}
indexing = {aten.index, aten.index_put, aten.index_put_}


class Waits(TorchDispatchMode):
    "The operations for which the program would wait for a GPU: those whose result, or its size, it must know, and copies between host and device"
    def __init__(self):
        super().__init__()
        self.found, self.calls = [], _Calls(self)

    def __enter__(self): self.calls.__enter__(); return super().__enter__()
    def __exit__(self, *args): super().__exit__(*args); self.calls.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.overloadpacket
        if op in asking or op in indexing and any(o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1]): self.found.append(str(op))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    "Copies: on CPU tensors they are no operation"
    def __init__(self, waits): super().__init__(); self.waits = waits
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host, to_device = func in (T.cpu, T.numpy, T.tolist), func in (torch.tensor, torch.as_tensor) and kwargs.get('device') is not None
        if to_host or to_device: self.waits.found.append(func.__name__)
        return func(*args, **kwargs)


def one_hot_on_a_gpu(x, n): return torch.zeros(*x.shape, n, dtype=torch.int64).scatter_(-1, x[..., None], 1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    "What torch and LPCallback do with values of CPU tensors only: look whether they can be classes, and whether the batch is the expected one"
    check = LPCallback._in_step
    monkeypatch.setattr(LPCallback, '_in_step', lambda self: None if self.iter else check(self))
    monkeypatch.setattr(F, 'one_hot', one_hot_on_a_gpu)


def images(n=80, n_test=20, c=3, size=10, labels=12):
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(n+n_test) % c
    x = (40*torch.rand(n+n_test, 3, size, size, generator=g) + 90*F.one_hot(truth, 3)[:, :, None, None]).to(torch.uint8)
    return show_labels(ImageArrays(x, truth.numpy(), *torch.arange(n+n_test).split([n, n_test])), labels)


def sgd(params, **kwargs): return OptimWrapper(params, torch.optim.SGD, momentum=.9, nesterov=True)


def small(dual=False): return TwoHeads(small_convnet(3, n_in=3, width=4)[:-1], 8, 3, dual=dual)


def learner(dual=False, bar=False, labels=12, **kwargs):
    set_seed(0, reproducible=True)
    learn = Learner(image_dls(images(labels=labels), bs=16, device='cpu'), small(dual), metrics=accuracy, **kwargs)
    if not bar:
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *args: None
    return learn


def waits_of_steps(learn, cbs=(), epochs=2, lr=1e-2):
    "Of all training steps of a fit, but the first of each epoch"
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


# The count

@pytest.mark.parametrize('f', [
    lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool(x[0]), lambda x: 1 if x.any() else 0, lambda x: x.nonzero(), lambda x: torch.where(x > 1),
    lambda x: x[x > 1], lambda x: x.masked_select(x > 1), lambda x: x.unique(), lambda x: torch.equal(x, x), lambda x: x.cpu(), lambda x: x.numpy(),
    lambda x: x.tolist(), lambda x: torch.tensor([1, 2], device=x.device), lambda x: x.long().bincount(), lambda x: F.embedding(x.long(), x[:, None])[x > 1]])
def test_what_waits_is_seen(f):
    with Waits() as waits: f(torch.arange(4.))
    assert waits.found


@pytest.mark.parametrize('f', [
    lambda x: torch.where(x > 1, x, 0), lambda x: x.masked_fill(x > 1, 0), lambda x: x[x.long()], lambda x: (x > 1).any(), lambda x: x[1:3], lambda x: x.numel(),
    lambda x: x.long().clamp(min=0), lambda x: F.one_hot(x.long(), 4), lambda x: torch.lerp(x, 2*x, .5), lambda x: x.flip(0), lambda x: torch.rand(4, device=x.device)])
def test_what_does_not_wait_is_not(f):
    with Waits() as waits: f(torch.arange(4.))
    assert not waits.found


# Steps

methods = dict(supervised=(), lp=(LPCallback,), mt=(MeanTeacherCallback,), mt_lp=(LPCallback, MeanTeacherCallback))


def make(method): return [cb(rampup=1) if cb is MeanTeacherCallback else cb(k=5) for cb in methods[method]]


@pytest.mark.parametrize('opt_func', [None, sgd], ids=['adam', 'torch'])
@pytest.mark.parametrize('method', [o for o in methods if o != 'supervised'])
def test_callbacks_wait_for_nothing(method, opt_func):
    kwargs = {} if opt_func is None else dict(opt_func=opt_func)
    dual = 'mt' in method
    assert waits_of_steps(learner(dual, **kwargs), make(method)) == waits_of_steps(learner(**kwargs)) == ['cpu']*14     # Recorder's


def test_nor_do_they_while_warming_up_or_where_pseudo_labels_are_kept():
    for cb in (LPCallback(k=5, warmup=9), LPCallback(k=5, every=9)): assert waits_of_steps(learner(labels=48), [cb, LossOnDevice()]) == []


def test_a_planted_wait_is_found():
    class Look(Callback):
        def after_loss(self): self.seen = self.loss.item() if self.training else None
    found = waits_of_steps(learner(), [LPCallback(k=5), LossOnDevice(), Look()])
    assert found == ['aten._local_scalar_dense']*14


@pytest.mark.parametrize('bar', [False, True])
@pytest.mark.parametrize('method', methods)
def test_with_the_loss_on_the_device_a_step_waits_for_nothing(method, bar, capsys):
    learn = learner('mt' in method, bar)
    assert waits_of_steps(learn, [*make(method), LossOnDevice()]) == []
    assert len(waits_of_steps(learn, make(method))) >= 14                             # and afterwards Recorder is what it was


@pytest.mark.parametrize('model', [ConvNet13, resnet18_84])
def test_nor_do_the_networks_wait(model):
    set_seed(0)
    learn = Learner(image_dls(images(size=12), bs=16, device='cpu'), model(3, l2=False, dual=True), opt_func=sgd)
    with learn.no_bar(), learn.no_logging(): assert waits_of_steps(learn, [*make('mt_lp'), LossOnDevice()], 1) == []


@pytest.mark.parametrize('two_views', [False, True])
def test_batches_are_made_without_waiting(two_views):
    dl = image_dls(images(), bs=16, augment='cifar', device='cpu').train
    if two_views: dl.two_views()
    batches = iter(dl)
    next(batches)
    with Waits() as waits: rest = list(batches)
    assert len(rest) == len(dl)-1 and not waits.found


@pytest.mark.parametrize('augment', ['cifar', 'mini_imagenet', None])
def test_batches_on_a_device_that_has_no_values(augment):
    "Where anything asks for a value, the meta device raises an error"
    dl = image_dls(images(size=20), bs=16, augment=augment, device='cpu').train
    table = dl.dataset
    table.images, table.rows, table.y = (o.to('meta') for o in (table.images, table.rows, table.y))
    dl.to(torch.device('meta'))
    for x, y in dl: assert (x.device.type, x.dtype, x.shape, y.shape) == ('meta', torch.float32, (16, 3, 20, 20), (16,))


# LossOnDevice

class Rows(Callback):
    "The table"
    order = 52
    def __init__(self): self.rows = []
    def after_epoch(self): self.rows.append(list(self.recorder.log[1:-1]))


def fitted(*cbs, epochs=2, **kwargs):
    learn, rows = learner(**kwargs), Rows()
    learn.fit(epochs, 1e-2, cbs=[LPCallback(k=5), rows, *cbs])
    return learn, rows.rows


def as_numbers(o): return [float(x) for x in o]


def test_the_record_is_the_same(capsys):
    (a, rows_a), (b, rows_b), (c, _) = fitted(), fitted(LossOnDevice()), fitted(LossOnDevice(), bar=True)
    rec, ref = b.recorder, a.recorder
    assert len(rec.losses) == 16 and as_numbers(rec.losses) == as_numbers(ref.losses) == as_numbers(c.recorder.losses)
    assert [type(o) for o in rec.losses] == [type(o) for o in ref.losses] and rec.losses[0].untyped_storage().nbytes() == 4
    assert rec.lrs == ref.lrs and rec.iters == ref.iters and rec.smooth_loss.count == ref.smooth_loss.count
    assert [row[:3] for row in rows_a] == [row[:3] for row in rows_b]                # train_loss, valid_loss, accuracy
    assert b.smooth_loss == a.smooth_loss and rec.smooth_loss.val == ref.smooth_loss.val
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    lines = rec.plot_loss().lines
    assert lines[0].get_ydata().tolist() == as_numbers(ref.losses[5:])


def assert_as_before(learn):
    assert type(learn.recorder.smooth_loss) is AvgSmoothLoss and '_with_events' not in vars(learn)
    if hasattr(learn, 'progress'): assert 'after_batch' not in vars(learn.progress)


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_it(error, tmp_path, capsys):
    class Stop(Callback):
        def before_step(self):
            if self.learn.train_iter == 10: raise error('stop')
    cb = LossOnDevice()
    learn = learner(bar=True, cbs=[cb])                        # stays with the Learner
    with pytest.raises(error): learn.fit(3, 1e-2, cbs=Stop())
    assert_as_before(learn)
    assert len(learn.recorder.losses) == 10
    learn.fit(2, 1e-2)
    assert_as_before(learn)
    assert len(learn.recorder.losses) == 16
    preds = learn.get_preds()[0]
    learn.validate()
    assert_as_before(learn)
    learn.path = tmp_path
    learn.export()
    assert torch.equal(load_learner(tmp_path/'export.pkl').get_preds(dl=learn.dls.valid)[0], preds)
    learn.remove_cb(cb)
    assert cb.learn is None


def test_epochs_that_are_cut_short(capsys):
    for error, n in ((CancelTrainException, 10), (CancelEpochException, 10), (CancelFitException, 5)):
        class Cut(Callback):
            order = 55
            def after_batch(self):
                if self.training and self.iter == 4: raise error
        learn = learner()
        learn.fit(2, 1e-2, cbs=[LossOnDevice(), Cut()])
        assert_as_before(learn)
        other = learner()
        other.fit(2, 1e-2, cbs=Cut())
        assert len(learn.recorder.losses) == n and as_numbers(learn.recorder.losses) == as_numbers(other.recorder.losses)


def test_where_it_has_nothing_to_do():
    learn = learner(cbs=LossOnDevice())
    learn.lr_find(num_it=5, show_plot=False)
    assert_as_before(learn)
    learn.remove_cb(Recorder)
    learn.fit(1, 1e-2)
    fresh = Learner(learn.dls, small(), cbs=[LossOnDevice()])
    fresh.recorder.smooth_loss = own = type('Own', (AvgSmoothLoss,), {})()
    with fresh.no_bar(), fresh.no_logging(): fresh.fit(1, 1e-2)
    assert type(own).__name__ == 'Own' and own.count == 8


def test_a_stopped_run_goes_on(tmp_path):
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    whole, rows = fitted(LossOnDevice(), epochs=4)
    with pytest.raises(KeyboardInterrupt): fitted(LossOnDevice(), ResumeCallback(tmp_path/'run.pth'), Stop(), epochs=4)
    resumed, _ = fitted(LossOnDevice(), ResumeCallback(tmp_path/'run.pth'), epochs=4)
    assert as_numbers(resumed.recorder.losses) == as_numbers(whole.recorder.losses) and resumed.recorder.iters == whole.recorder.iters
    for p, q in zip(resumed.model.parameters(), whole.model.parameters()): assert torch.equal(p, q)


# Channels-last and bfloat16

def test_channels_last():
    learn = learner(dual=True)
    seen = []
    hook = learn.model.body[0][0].register_forward_hook(lambda m, x, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
    learn.fit(2, 1e-2, cbs=[ChannelsLast(), *make('mt_lp'), LossOnDevice()])
    hook.remove()
    plain = learner(dual=True)
    plain.fit(2, 1e-2, cbs=make('mt_lp'))
    assert seen and all(seen)
    for net in (learn.model, learn.mt_record.teacher):
        for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)): assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.stack(learn.recorder.losses), torch.stack(plain.recorder.losses), rtol=1e-3, atol=1e-3)
    assert len(learn.lp_record.history) == 2 and learn.lp_record.pseudo.reached.all()


def test_bfloat16(monkeypatch):
    "fastai's MixedPrecision asks autocast for CUDA"
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype))
    dtypes = set()
    learn = learner(dual=True, opt_func=sgd).to_channelslast(amp_mode='bf16')
    hook = learn.model.head1.register_forward_hook(lambda m, x, out: dtypes.add((m.training, out.dtype)))
    learn.fit(2, 1e-2, cbs=[*make('mt_lp'), LossOnDevice()])
    hook.remove()
    assert (True, torch.bfloat16) in dtypes
    for net in (learn.model, learn.mt_record.teacher):
        assert {p.dtype for p in net.parameters()} == {torch.float32} and all(torch.isfinite(p).all() for p in net.parameters())
    plain = learner(dual=True, opt_func=sgd)
    plain.fit(2, 1e-2, cbs=make('mt_lp'))
    torch.testing.assert_close(torch.stack(learn.recorder.losses), torch.stack(plain.recorder.losses), rtol=.05, atol=.05)
    assert learn.lp_record.pseudo.W.dtype == torch.float32


def test_a_step_in_bfloat16_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype))
    assert waits_of_steps(learner(True, opt_func=sgd), [ChannelsLast(), MixedPrecision(amp_mode='bf16'), *make('mt_lp'), LossOnDevice()]) == []


def test_graph_and_diffusion_do_not_wait_for_a_gpu():
    "What would run there, on CPU tensors: blocks of the search, and iterations of CG, ask for nothing; the count of iterations is asked once"
    x = F.normalize(torch.randn(300, 8))
    with Waits() as waits: sims, idxs = _exact_torch(x, 7, torch.arange(300), 4*64*50)
    assert not waits.found and torch.equal(idxs, knn(x, 7)[1])
    S, _ = normalize(affinity(sims, idxs))
    Y = torch.eye(300)[:, :40]
    for max_iter in (2, 30):
        Z, r = torch.zeros_like(Y), Y.clone()
        with Waits() as waits: _cg(lambda p: torch.sub(p, spmm(S, p), alpha=.99), Z, r, 1e-12*torch.ones(40), max_iter, ask=False)
        assert waits.found == ['aten._local_scalar_dense']
    torch.testing.assert_close(Z, diffuse(S, Y, max_iter=30).Z)
