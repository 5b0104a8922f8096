"ResumeCallback: an interrupted and resumed fit equals one that was not interrupted."
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find  # chkstyle: ignore (adds methods of Learner)
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.learner import SkipToEpoch
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed

from conftest import Stop, blob_learner, blobs, flat_weights, same_run
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.utils.files import atomic_write


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


# Several fits with one callback: a course

def halves(model): return [list(o.parameters()) for o in (model[:2], model[2:])]


class EndOfFit(Callback):
    "Weights and table after each fit, and how many batches it trained"
    order = 98
    def __init__(self): self.seen, self.batches = [], 0
    def before_fit(self): self.batches = 0
    def after_step(self): self.batches += 1
    def after_fit(self):
        if self.learn.lock.locked(): return
        keep = [i for i, name in enumerate(self.recorder.metric_names[1:-1]) if name != 'lp_sec']
        table = torch.tensor([[row[i] for i in keep] for row in self.recorder.values], dtype=torch.float64)
        self.seen.append((flat_weights(self.learn), table.nan_to_num(), self.batches))


class StopInFit(Stop):
    "Raises an error in the fit with this index"
    def __init__(self, fit, *args): super().__init__(*args); self.fit, self.begun = fit, 0  # chkstyle: ignore
    def __call__(self, name):
        self.begun += name == 'before_fit' and not self.learn.lock.locked()
        if self.begun == self.fit+1: return super().__call__(name)


def two_cells(learn, cbs):
    learn.freeze()
    learn.fit_one_cycle(2, 1e-2, cbs=cbs)
    learn.unfreeze()
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit_one_cycle(3, slice(1e-3, 1e-2), cbs=cbs)


def in_the_learner(learn, cbs):
    learn.add_cbs(cbs)
    learn.fine_tune(2, 1e-2)
    learn.validate()
    learn.fit(2, 1e-3)
    learn.remove_cbs(cbs)


def equal_fits(learn, cbs):
    for _ in range(3): learn.fit(2, 1e-2, cbs=cbs)


def stopped_early(learn, cbs):
    trackers = [SaveModelCallback(monitor='accuracy'), EarlyStoppingCallback(monitor='accuracy', min_delta=1., patience=2)]
    learn.fine_tune(3, 1e-3, freeze_epochs=6, cbs=[*cbs, *trackers])


def one(learn, cbs): learn.fine_tune(1, cbs=cbs)
def two(learn, cbs): learn.fine_tune(2, 1e-2, freeze_epochs=2, cbs=cbs)


COURSES = dict(one=one, two=two, cells=two_cells, learner=in_the_learner, equal=equal_fits, early=stopped_early)


def course(name, path, extra=(), seed=0, cbs=None, learn=None):
    "(Learner, what there was after each fit)"
    learn = learn or blob_learner(path=path)
    learn.splitter, ends = halves, EndOfFit()
    if seed: set_seed(seed)
    COURSES[name](learn, [*CBS[cbs or ('lp' if name == 'one' else 'both')](), ends, *extra])
    return learn, ends.seen


def same_course(a, b):
    same_run(a[0], b[0])
    assert len(a[1]) == len(b[1])
    for (w, table, _), (v, other, _) in zip(a[1], b[1]):
        assert torch.equal(w, v)
        assert torch.equal(table, other)


PLACES = [('one', 0, 'before_batch', 0), ('one', 1, 'before_batch', 0), ('two', 0, 'before_batch', 1), ('two', 1, 'before_fit', 0),
    ('two', 1, 'after_validate', 1), ('cells', 0, 'after_epoch', 0), ('cells', 1, 'before_train', 2), ('learner', 1, 'before_batch', 1),
    ('learner', 2, 'before_batch', 0), ('learner', 2, 'before_batch', 1), ('equal', 1, 'before_batch', 1), ('early', 0, 'before_batch', 2),
    ('early', 1, 'before_batch', 0), ('early', 1, 'before_batch', 2)]


@pytest.mark.parametrize('name, fit, event, epoch', PLACES)
def test_course_is_resumed(name, fit, event, epoch, tmp_path):
    "fine_tune, and fits that follow each other, stopped in either fit"
    file = tmp_path/'run.pth'
    through = course(name, tmp_path/'through')
    stop = StopInFit(fit, event, epoch)
    with pytest.raises(KeyboardInterrupt): course(name, tmp_path/'run', [ResumeCallback(file), stop])
    resumed = course(name, tmp_path/'run', [ResumeCallback(file)], seed=7*file.exists())
    same_course(through, resumed)
    if name != 'early' or epoch > 0: assert [o[2] for o in resumed[1][:fit]] == [0]*fit  # complete fits are not trained again


def test_complete_course_is_not_trained_again(file, capsys):
    through = course('two', file.parent, [ResumeCallback(file)])
    before = file.read_bytes()
    again = course('two', file.parent, [ResumeCallback(file)], seed=3)
    same_course(through, again)
    assert [o[2] for o in again[1]] == [0, 0]
    assert file.read_bytes() == before
    assert 'run.pth, fit 2: 2 of 2 epochs are done' in capsys.readouterr().out


def test_course_that_was_interrupted_in_each_fit(file):
    through = course('two', file.parent)
    for fit, epoch in (0, 1), (1, 0), (1, 1):
        stop = StopInFit(fit, 'before_batch', epoch)
        with pytest.raises(KeyboardInterrupt): course('two', file.parent, [ResumeCallback(file), stop])
    same_course(through, course('two', file.parent, [ResumeCallback(file)], seed=7))


@pytest.mark.parametrize('new_learner', [True, False])
@pytest.mark.parametrize('name, fit, epoch', [('two', 0, 1), ('two', 1, 1), ('learner', 2, 1), ('early', 1, 1)])
def test_same_callbacks_in_the_same_process(new_learner, name, fit, epoch, tmp_path):
    "The lines are run again in the same process, with the same callbacks, and the same Learner or a new one"
    file, through = tmp_path/'run.pth', course(name, tmp_path/'through')
    learn, cbs = blob_learner(path=tmp_path/'run'), [*CBS['both'](), ResumeCallback(file), StopInFit(fit, 'before_batch', epoch)]
    with pytest.raises(KeyboardInterrupt): course(name, tmp_path, cbs, learn=learn, cbs='none')
    learn.remove_cbs([cb for cb in learn.cbs if cb in cbs or isinstance(cb, EndOfFit)])
    resumed = course(name, tmp_path/'run', cbs, seed=7, cbs='none', learn=None if new_learner else learn)
    same_course(through, resumed)


def test_only_the_interrupted_cell_is_run_again(file):
    def learner():
        learn = blob_learner(path=file.parent)
        learn.splitter = halves
        return learn
    def first(learn, *cbs):
        learn.freeze()
        learn.fit_one_cycle(2, 1e-2, cbs=cbs)
    def second(learn, *cbs):
        learn.unfreeze()
        learn.fit_one_cycle(3, 1e-3, cbs=cbs)
    through, learn, lp, cb = learner(), learner(), LPCallback(warmup=3), ResumeCallback(file)
    lp_through = LPCallback(warmup=3)
    set_seed(0)
    for cell in first, second: cell(through, lp_through)
    set_seed(0)
    first(learn, lp, cb)
    for epoch in 1, 2:
        with pytest.raises(KeyboardInterrupt): second(learn, lp, cb, Stop('before_batch', epoch))
    second(learn, lp, cb)
    same_run(through, learn)


def test_a_course_goes_on_with_another_fit(file):
    "fits that are added to a complete course start from its result"
    def fits(learn, n, *cbs):
        for epochs in range(1, n+1): learn.fit(epochs, 1e-2, cbs=cbs)
        return learn
    through = fits(blob_learner(path=file.parent), 3, LPCallback())
    fits(blob_learner(path=file.parent), 2, LPCallback(), ResumeCallback(file))
    set_seed(9)
    same_run(through, fits(blob_learner(path=file.parent), 3, LPCallback(), ResumeCallback(file)))


def test_the_file_is_deleted_between_fits(file):
    "Then the next fit is the first one of the file"
    learn, cb = blob_learner(path=file.parent), ResumeCallback(file)
    learn.fit(1, cbs=cb)
    file.unlink()
    learn.fit(2, cbs=cb)
    assert torch.load(file, weights_only=True)['earlier'] == []
    blob_learner(path=file.parent).fit(2, cbs=ResumeCallback(file))


@pytest.mark.parametrize('change, match', [(dict(base_lr=1e-3), 'lr up to 0.01 in the file, 0.001 now'),
    (dict(freeze_epochs=3), 'epochs 2 in the file, 3 now'), (dict(epochs=3), 'fit 2: epochs 2 in the file, 3 now'),
    (dict(pct_start=.5), 'fit 2: schedule of lr'), (dict(wd=.3), 'wd up to 0.01 in the file, 0.3 now')])
def test_another_course_is_refused(change, match, file):
    def tune(**change):
        learn = blob_learner(path=file.parent)
        learn.splitter = halves
        learn.fine_tune(**dict(epochs=2, base_lr=1e-2, freeze_epochs=2, cbs=ResumeCallback(file)) | change)
    tune()
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f'belongs to another fit.*{match}'): tune(**change)
    assert file.read_bytes() == before


def test_frozen_parameters_differ(file):
    def fit(freeze):
        learn = blob_learner(path=file.parent)
        learn.splitter = halves
        if freeze: learn.freeze()
        learn.fit(1, cbs=ResumeCallback(file))
        return flat_weights(learn)
    fit(True)
    learn = blob_learner(path=file.parent)
    with pytest.raises(ValueError, match='2 frozen parameters in the file, 0 now'): fit(False)


def test_files_of_the_previous_layout_are_read(file):
    "They have one fit, and neither schedule nor frozen parameters"
    through = run('both', file.parent)
    interrupted('both', file, Stop('before_batch', 3))
    saved = torch.load(file, weights_only=True)
    saved = {k: v for k, v in saved.items() if k != 'earlier'} | dict(layout=2)
    saved['fit'] = {k: v for k, v in saved['fit'].items() if k not in ('frozen', 'hypers')}
    for _, state in saved['callbacks']: state.pop('start')
    with atomic_write(file, checksum=True) as f: torch.save(saved, f)
    same_run(through, run('both', file.parent, [ResumeCallback(file)], seed=7))


def test_an_epoch_that_is_cancelled_before_it_begins(file):
    "By a callback that comes before all others"
    class Every(Callback):
        order = -90
        def before_epoch(self):
            if self.epoch in (1, 3): raise CancelEpochException
    rows = []
    for stop in None, 2, 3:
        file.unlink(missing_ok=True)
        if stop: interrupted('lp', file, Stop('before_batch' if stop == 2 else 'after_epoch', stop), [Every()])
        learn = run('lp', file.parent, [Every(), *[ResumeCallback(file)]*bool(stop)], seed=7*bool(stop))
        rows.append((flat_weights(learn), [[o for o in row if isinstance(o, float)][:2] for row in learn.recorder.values]))
    for weights, table in rows[1:]:
        assert torch.equal(weights, rows[0][0])
        assert table == rows[0][1]


KILLED = '''
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from test_resume import EndOfFit, StopInFit, course
from fastai_lp.learner.resume import ResumeCallback
from pathlib import Path
import torch

class Kill(StopInFit):
    def __call__(self, name):
        try: super().__call__(name)
        except KeyboardInterrupt: os.kill(os.getpid(), signal.SIGKILL)

name, path, fit, event, epoch, seed = sys.argv[1:]
extra = [] if path.endswith('through') else [ResumeCallback(Path(path)/'run.pth'), Kill(int(fit), event, int(epoch))]
learn, seen = course(name, Path(path), extra, seed=int(seed))
history = [{{k: v for k, v in row.items() if k not in ('sec', 'seconds', 'cached')}} for row in learn.lp_record.history]
teacher = learn.mt_record.teacher.state_dict()
losses = list(map(float, learn.recorder.losses))
torch.save(dict(seen=[list(o[:2]) for o in seen], history=history, losses=losses, teacher=teacher), sys.argv[2]+'.end')
'''


@pytest.mark.slow
@pytest.mark.parametrize('name, fit, event, epoch', [('two', 0, 'before_batch', 1), ('two', 1, 'before_batch', 0),
    ('two', 1, 'after_validate', 1), ('learner', 2, 'before_batch', 1)])
def test_course_is_killed(name, fit, event, epoch, tmp_path):
    "kill -9 in the frozen fit, and in later ones"
    def process(folder, *place):
        args = [sys.executable, '-W', 'ignore', '-c', KILLED.format(tests=str(Path(__file__).parent)), name, str(tmp_path/folder)]
        return subprocess.run([*args, *map(str, place)], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True)
    res = process('through', 9, 'before_fit', 0, 0)
    assert res.returncode == 0, res.stderr
    assert process('run', fit, event, epoch, 0).returncode == -signal.SIGKILL
    res = process('run', 9, 'before_fit', 0, 7)
    assert res.returncode == 0, res.stderr
    a, b = (torch.load(tmp_path/f'{o}.end') for o in ('through', 'run'))
    assert a['losses'] == b['losses']
    assert a['history'] == b['history']
    for k in a['teacher']: assert torch.equal(a['teacher'][k], b['teacher'][k])
    for x, y in zip(a['seen'], b['seen'], strict=True):
        for p, q in zip(x, y): assert torch.equal(p, q)


# Callbacks and settings that people combine with it

class Gradually(Callback):
    "Gradual unfreezing: clears the state of the optimizer"
    def before_epoch(self):
        if self.epoch == 1: self.learn.unfreeze()


class CountEpochs(Callback):
    "A state that changes in epochs, skipped ones too"
    epochs = 0
    def before_epoch(self): self.opt.set_hyper('mom', .9 - .1*self.epochs)
    def after_epoch(self): self.epochs += 1
    def state_dict(self): return dict(epochs=self.epochs)
    def load_state_dict(self, state): self.epochs = state['epochs']


class Draws(Callback):
    "Random numbers between epochs"
    def before_epoch(self): self.learn.model[0].weight.data += .01*torch.randn_like(self.learn.model[0].weight)


def frozen_learner(path):
    learn = blob_learner(path=path)
    learn.splitter = halves
    learn.freeze()
    return learn


@pytest.mark.parametrize('make', [Gradually, CountEpochs, Draws, lambda: ReduceLROnPlateau(monitor='accuracy', patience=1, min_delta=1.),
    lambda: SkipToEpoch(1), lambda: GradientClip(.1), lambda: SaveModelCallback(monitor='accuracy', reset_on_fit=False)],
    ids=['unfreeze', 'count', 'draws', 'plateau', 'start_epoch', 'clip', 'best of all fits'])
def test_callbacks_that_act_between_epochs(make, tmp_path):
    def fit(*cbs, seed=0, path='run'):
        learn, cb = frozen_learner(tmp_path/path), make()
        if seed: set_seed(seed)
        for n in 5, 2: learn.fit(n, 1e-2, cbs=[LPCallback(), cb, *cbs])
        return learn
    through = fit(path='through')
    for place in (0, 3), (1, 1):
        file = tmp_path/f'{place}.pth'
        with pytest.raises(KeyboardInterrupt): fit(ResumeCallback(file), StopInFit(place[0], 'before_batch', place[1]))
        resumed = fit(ResumeCallback(file), seed=7)
        assert torch.equal(flat_weights(through), flat_weights(resumed))
        assert list(map(float, through.recorder.losses)) == list(map(float, resumed.recorder.losses))
        assert resumed.opt.hypers[-1]['lr'] == through.opt.hypers[-1]['lr']


def test_a_metric_with_a_value_per_class(file):
    def fit(*cbs, seed=0):
        learn = blob_learner(path=file.parent)
        learn.metrics = [accuracy, F1Score(average=None)]
        if seed: set_seed(seed)
        learn.fit(4, 1e-2, cbs=[LPCallback(), *cbs])
        return learn
    through = fit()
    with pytest.raises(KeyboardInterrupt): fit(ResumeCallback(file), Stop('before_batch', 2))
    resumed = fit(ResumeCallback(file), seed=7)
    assert torch.equal(flat_weights(through), flat_weights(resumed))
    for a, b in zip(through.recorder.values, resumed.recorder.values, strict=True):
        assert torch.equal(torch.as_tensor(a[3]), torch.as_tensor(b[3]))


def test_models_of_each_epoch_are_not_overwritten(tmp_path, file):
    "SaveModelCallback(every_epoch=True): files of skipped epochs stay, the others are numbered on"
    def fit(*cbs): run('lp', tmp_path, [SaveModelCallback(every_epoch=True, fname='m'), *cbs])
    with pytest.raises(KeyboardInterrupt): fit(ResumeCallback(file), Stop('before_batch', 3))
    names = sorted(o.name for o in (tmp_path/'models').iterdir())
    assert names == ['m_0.pth', 'm_1.pth', 'm_2.pth']
    times = [(tmp_path/'models'/o).stat().st_mtime_ns for o in names]
    fit(ResumeCallback(file))
    assert [(tmp_path/'models'/o).stat().st_mtime_ns for o in names] == times
    assert len(list((tmp_path/'models').iterdir())) == 5


def test_larger_images_in_the_second_fit(file):
    "The data change between fits, as in progressive resizing"
    def fits(*cbs, seed=0):
        learn = blob_learner(path=file.parent)
        if seed: set_seed(seed)
        learn.fit(2, 1e-2, cbs=[LPCallback(), *cbs])
        learn.dls = blob_learner(blobs(n=100, seed=1), path=file.parent, seed=3).dls
        learn.fit(3, 1e-2, cbs=[LPCallback(), *cbs])
        return learn
    through = fits()
    with pytest.raises(KeyboardInterrupt): fits(ResumeCallback(file), StopInFit(1, 'before_batch', 1))
    same_run(through, fits(ResumeCallback(file), seed=7))
