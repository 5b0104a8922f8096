"ResumeCallback: an interrupted and resumed fit equals one that was not interrupted."
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import fit_one_cycle, lr_find  # chkstyle: ignore (adds methods of Learner)
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed

from conftest import Stop, blob_learner, blobs, flat_weights, same_run
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback


TORCH_SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True)
CBS = dict(none=lambda: [], lp=lambda: [LPCallback(warmup=1)], every=lambda: [LPCallback(every=3)],
    mt=lambda: [MeanTeacherCallback()], both=lambda: [LPCallback(warmup=2), MeanTeacherCallback()])


def run(cbs, path, extra=(), opt=None, seed=0, workers=0, epochs=5, data=None):
    learn = blob_learner(data or blobs(), path=path, num_workers=workers)
    if opt: learn.opt_func = opt
    if seed: set_seed(seed)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[*(CBS[cbs]() if isinstance(cbs, str) else cbs), *extra])
    return learn


def interrupted(cbs, file, stop, extra=(), every=1, **kwargs):
    with pytest.raises(KeyboardInterrupt): run(cbs, file.parent, [*extra, ResumeCallback(file, every), stop], **kwargs)


@pytest.fixture
def file(tmp_path): return tmp_path/'run.pth'


@pytest.mark.parametrize('cbs', CBS)
@pytest.mark.parametrize('event, epoch', dict(before_batch=3, after_validate=1, before_train=4, after_epoch=2).items())
def test_interrupted_and_resumed(cbs, event, epoch, file):
    through = run(cbs, file.parent)
    interrupted(cbs, file, Stop(event, epoch))
    same_run(through, run(cbs, file.parent, [ResumeCallback(file)], seed=7))


def test_interrupted_twice(file):
    through = run('both', file.parent)
    for epoch in (1, 3): interrupted('both', file, Stop('before_batch', epoch))
    same_run(through, run('both', file.parent, [ResumeCallback(file)]))


@pytest.mark.parametrize('opt', [partial(SGD, mom=.9), TORCH_SGD], ids=['SGD', 'OptimWrapper'])
@pytest.mark.parametrize('workers, every', [(0, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_optimizers_workers_and_every(opt, workers, every, file):
    again = dict(opt=opt, workers=workers)
    through = run('both', file.parent, **again)
    interrupted('both', file, Stop('before_batch', 3), every=every, **again)
    assert torch.load(file, weights_only=True)['epoch'] == (2 if every == 2 else 3)
    same_run(through, run('both', file.parent, [ResumeCallback(file, every)], seed=7, **again))


def test_a_complete_fit_is_not_trained_again(file, capsys):
    through = run('both', file.parent, [ResumeCallback(file)])
    before = file.read_bytes()
    same_run(through, run('both', file.parent, [ResumeCallback(file)], seed=3))
    assert file.read_bytes() == before
    assert '5 of 5 epochs are done' in capsys.readouterr().out


def test_two_fits_with_a_file_each(tmp_path):
    def stages(*extra, resume=True, seed=0):
        learn = blob_learner(blobs(), path=tmp_path)
        if seed: set_seed(seed)
        cb, first, second = LPCallback(warmup=3), ResumeCallback(tmp_path/'1.pth'), ResumeCallback(tmp_path/'2.pth')
        learn.fit_one_cycle(3, 1e-2, cbs=[cb, *[first]*resume])
        learn.fit_one_cycle(4, 1e-2, cbs=[cb, *[second]*resume, *extra])
        return learn
    through = stages(resume=False)
    with pytest.raises(KeyboardInterrupt): stages(Stop('before_batch', 2))
    same_run(through, stages(seed=5))


def test_trackers_and_loggers(tmp_path, file):
    def extra(name):
        best, early = SaveModelCallback(monitor='accuracy', fname=name), EarlyStoppingCallback(monitor='accuracy', patience=4)
        return [best, early, CSVLogger(f'{name}.csv')]
    through = run('lp', tmp_path, extra('a'))
    interrupted('lp', file, Stop('before_batch', 3), extra('b'))
    same_run(through, run('lp', tmp_path, [*extra('b'), ResumeCallback(file)], seed=7))
    a, b = (torch.load(tmp_path/'models'/f'{o}.pth') for o in 'ab')
    for k in a: assert torch.equal(a[k], b[k])
    def rows(name):
        lines = (tmp_path/f'{name}.csv').read_text().splitlines()[1:]
        return [[f'{float(x):.5f}' for x in o.split(',')[:4]] for o in lines]
    assert len(rows('a')) == 5
    assert rows('a') == rows('b')


# States of callbacks

class LossEMA(Callback):
    "A user's callback with a state, which changes the training"
    run_valid, order = False, 3
    def __init__(self, start=None): self.mean, self.epochs = start, []
    def after_loss(self):
        if self.mean is not None: self.learn.loss_grad = self.loss_grad*(self.loss/self.mean).detach().clamp(max=2.)
        self.mean = self.loss.detach() if self.mean is None else .9*self.mean + .1*self.loss.detach()
    def after_epoch(self): self.epochs.append(dict(epoch=self.epoch, name=('a', None)))
    def state_dict(self): return dict(mean=self.mean, epochs=self.epochs)
    def load_state_dict(self, state): self.mean, self.epochs = state['mean'], []


def test_state_of_a_users_callback(tmp_path, file):
    "Two of the same class, with different states"
    def cbs(): return [LossEMA(), LPCallback(), LossEMA(torch.tensor(5.))]
    through = cbs()
    expected = run(through, tmp_path)
    interrupted(cbs(), file, Stop('before_batch', 3))
    saved = torch.load(file, weights_only=True)['callbacks']
    assert [name for name, _ in saved] == ['LPCallback', 'LossEMA', 'LossEMA']
    assert saved[1][1]['epochs'][2] == dict(epoch=2, name=['a', None])
    resumed = cbs()
    same_run(expected, run(resumed, tmp_path, [ResumeCallback(file)], seed=7))
    assert [o.mean for o in resumed[::2]] == [o.mean for o in through[::2]]
    assert resumed[0].mean != resumed[2].mean


def test_a_state_that_cannot_be_saved(tmp_path, file):
    class Bad(LossEMA):
        def state_dict(self): return dict(o={1, 2})
    with pytest.raises(TypeError, match='Bad.state_dict: a state has a set, expected tensors'):
        run([Bad()], tmp_path, [ResumeCallback(file)])
    assert not file.exists()


# Other fits

@pytest.mark.parametrize('change, match', [(dict(epochs=6), 'epochs 5 in the file, 6 now'),
    (dict(cbs='lp'), r"callbacks \['LPCallback', 'Mean"), (dict(data=blobs(per_class=5)), 'labels'),
    (dict(data=blobs(n=160)), 'items 120 in the file, 130 now'), (dict(data=blobs(d=9)), 'parameters')])
def test_another_fit_is_refused(change, match, file):
    args = dict(cbs='both', path=file.parent, extra=[ResumeCallback(file)])
    run(**args)
    with pytest.raises(ValueError, match=f'belongs to another fit.*{match}'): run(**args | change)


def test_other_settings_are_refused(file):
    run('lp', file.parent, [ResumeCallback(file, settings=dict(lr=1e-2, wd=.1))])
    with pytest.raises(ValueError, match='another fit .lr 0.01 in the file, 0.001 now.:'):
        run('lp', file.parent, [ResumeCallback(file, settings=dict(lr=1e-3, wd=.1))])


def test_inference_and_lr_find_neither_read_nor_write(file):
    learn = blob_learner(path=file.parent, cbs=ResumeCallback(file))
    learn.lr_find(num_it=5, show_plot=False)
    learn.get_preds()
    assert not file.exists()
    learn.fit(1)
    before = flat_weights(learn)
    learn.model[0].weight.data += 1
    learn.validate()
    assert not torch.equal(flat_weights(learn), before)
