"ResumeCallback: a run that is stopped and resumed is the run that was never stopped."
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback


class Stop(Callback):
    order = 99
    def __init__(self, event, epoch): self.event, self.at = event, epoch
    def __call__(self, name):
        if name == self.event and self.epoch == self.at and self.training in (True, False): raise KeyboardInterrupt
        return super().__call__(name)


TORCH_SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True)
CBS = dict(none=lambda: [], lp=lambda: [LPCallback(warmup=1)], every=lambda: [LPCallback(every=3)], mt=lambda: [MeanTeacherCallback()],
    both=lambda: [LPCallback(warmup=2), MeanTeacherCallback()])


def run(cbs, path, extra=(), opt=None, seed=0, workers=0, epochs=5, data=None):
    learn = blob_learner(data or blobs(), path=path, num_workers=workers)
    if opt: learn.opt_func = opt
    if seed: set_seed(seed)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[*CBS[cbs](), *extra])
    return learn


def same(a, b):
    assert torch.equal(flat_weights(a), flat_weights(b))
    keep = [i for i, name in enumerate(a.recorder.metric_names[1:-1]) if name != 'lp_sec']
    assert np.array_equal(*(np.array(o.recorder.values, dtype=float)[:, keep] for o in (a, b)), equal_nan=True)
    assert np.allclose(a.recorder.lrs, b.recorder.lrs) and list(a.recorder.iters) == list(b.recorder.iters)
    assert np.array_equal(*([float(x) for x in o.recorder.losses] for o in (a, b)))
    if hasattr(a, 'lp_record'):
        for name in ('labels', 'certainty', 'Z'): assert torch.equal(getattr(a.lp_record.pseudo, name), getattr(b.lp_record.pseudo, name))
        for name in ('epoch', 'recall', 'overlap', 'searched'): assert [r.get(name) for r in a.lp_record.history] == [r.get(name) for r in b.lp_record.history]
    if hasattr(a, 'mt_record'):
        assert a.mt_record.step == b.mt_record.step
        for p, q in zip(a.mt_record.teacher.state_dict().values(), b.mt_record.teacher.state_dict().values()): assert torch.equal(p, q)


@pytest.mark.parametrize('cbs', CBS)
@pytest.mark.parametrize('event, epoch', [('before_batch', 3), ('after_validate', 1), ('before_train', 4), ('after_epoch', 2)])
def test_stopped_and_resumed(cbs, event, epoch, tmp_path):
    through = run(cbs, tmp_path)
    with pytest.raises(KeyboardInterrupt): run(cbs, tmp_path, [ResumeCallback(tmp_path/'run.pth'), Stop(event, epoch)])
    same(through, run(cbs, tmp_path, [ResumeCallback(tmp_path/'run.pth')], seed=7))


@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), TORCH_SGD], ids=['SGD', 'OptimWrapper'])
@pytest.mark.parametrize('workers, every', [(0, 2), (2, 1)])
def test_optimizers_workers_and_saving_now_and_then(opt, workers, every, tmp_path):
    again = dict(opt=opt, workers=workers)
    through = run('both', tmp_path, **again)
    with pytest.raises(KeyboardInterrupt): run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth', every), Stop('before_batch', 3)], **again)
    assert torch.load(tmp_path/'run.pth', weights_only=True)['epoch'] == (2 if every == 2 else 3)
    same(through, run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth', every)], seed=7, **again))


def test_stopped_twice(tmp_path):
    through = run('both', tmp_path)
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt): run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth'), Stop('before_batch', epoch)])
    same(through, run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth')]))


def test_complete(tmp_path, capsys):
    through = run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth')])
    before = (tmp_path/'run.pth').read_bytes()
    again = run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth')], seed=3)
    same(through, again)
    assert (tmp_path/'run.pth').read_bytes() == before and '5 of 5 epochs are done' in capsys.readouterr().out


def test_a_second_fit_after_one_that_is_complete(tmp_path):
    "Two stages, a file each: stopped in the second, both files are there"
    def stages(extra, seed=0):
        learn = blob_learner(blobs(), path=tmp_path)
        if seed: set_seed(seed)
        cb = LPCallback(warmup=3)
        learn.fit_one_cycle(3, 1e-2, cbs=[cb, *([ResumeCallback(tmp_path/'1.pth')] if extra is not None else [])])
        learn.fit_one_cycle(4, 1e-2, cbs=[cb, *([ResumeCallback(tmp_path/'2.pth')] + extra if extra is not None else [])])
        return learn
    through = stages(None)
    with pytest.raises(KeyboardInterrupt): stages([Stop('before_batch', 2)])
    same(through, stages([], seed=5))


def test_trackers_and_loggers(tmp_path):
    def extra(name): return [SaveModelCallback(monitor='accuracy', fname=name), EarlyStoppingCallback(monitor='accuracy', patience=4), CSVLogger(f'{name}.csv')]
    through = run('lp', tmp_path, extra('a'))
    resume = ResumeCallback(tmp_path/'run.pth')
    with pytest.raises(KeyboardInterrupt): run('lp', tmp_path, [*extra('b'), resume, Stop('before_batch', 3)])
    again = run('lp', tmp_path, [*extra('b'), ResumeCallback(tmp_path/'run.pth')], seed=7)
    same(through, again)
    a, b = (torch.load(tmp_path/'models'/f'{o}.pth') for o in 'ab')
    for k in a: assert torch.equal(a[k], b[k])
    rows = [[line.split(',')[:4] for line in (tmp_path/f'{o}.csv').read_text().splitlines()] for o in 'ab']
    assert len(rows[0]) == 6 and [[f'{float(x):.5f}' for x in r] for r in rows[0][1:]] == [[f'{float(x):.5f}' for x in r] for r in rows[1][1:]]


@pytest.mark.parametrize('change, match', [(dict(epochs=6), 'epochs 5 there, 6 here'), (dict(cbs='lp'), 'callbacks'), (dict(data=blobs(per_class=5)), 'labels'),
    (dict(data=blobs(n=160)), 'items 120 there, 130 here'), (dict(data=blobs(d=9)), 'parameters')])
def test_another_fit_is_refused(change, match, tmp_path):
    run('both', tmp_path, [ResumeCallback(tmp_path/'run.pth')])
    with pytest.raises(ValueError, match=f'is of another fit.*{match}'): run(**(dict(cbs='both', path=tmp_path, extra=[ResumeCallback(tmp_path/'run.pth')]) | change))


def test_other_settings_are_refused(tmp_path):
    run('lp', tmp_path, [ResumeCallback(tmp_path/'run.pth', settings=dict(lr=1e-2, wd=.1))])
    with pytest.raises(ValueError, match='of another fit .lr 0.01 there, 0.001 here.:'): run('lp', tmp_path, [ResumeCallback(tmp_path/'run.pth', settings=dict(lr=1e-3, wd=.1))])


def test_inference_and_lr_find_neither_read_nor_write(tmp_path):
    learn = blob_learner(path=tmp_path, cbs=ResumeCallback(tmp_path/'run.pth'))
    learn.lr_find(num_it=5, show_plot=False)
    learn.validate(), learn.get_preds()
    assert not (tmp_path/'run.pth').exists()
    learn.fit(1)
    before = flat_weights(learn)
    learn.model[0].weight.data += 1
    learn.validate()
    assert not torch.equal(flat_weights(learn), before) and not list(tmp_path.glob('*.tmp'))
