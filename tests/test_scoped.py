"Only a real fit touches files, weights and data; and a callback that is in a fit twice is named."
import importlib.util

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.hook import summary  # chkstyle: ignore (adds Learner.summary)
from fastai.callback.schedule import fit_one_cycle, lr_find  # chkstyle: ignore (adds methods of Learner)
from fastai.learner import Learner, load_learner
from fastai.torch_core import get_random_states, set_random_states, set_seed

from conftest import blob_learner, blobs, flat_weights, state_of
from fastai_lp.learner import scoped
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamMixUp
from fastai_lp.learner.resume import ResumeCallback

pytestmark = pytest.mark.filterwarnings('ignore')  # about networks that are hardly trained


# Only a real fit

CALLBACKS = dict(lp=lambda file: [LPCallback()], mt=lambda file: [MeanTeacherCallback()], resume=lambda file: [ResumeCallback(file)],
    all=lambda file: [LPCallback(), MeanTeacherCallback(), ResumeCallback(file)],
    mixup=lambda file: [LPCallback(), StreamMixUp(), ResumeCallback(file)])


def entered(learn):
    with learn: pass


CALLS = dict(tta=lambda learn: learn.tta(n=2), summary=lambda learn: learn.summary(), loop=lambda learn: learn.show_training_loop(),
    get_preds=lambda learn: learn.get_preds(), validate=lambda learn: learn.validate(), enter=entered,
    events=lambda learn: learn(['before_fit', 'before_epoch', 'after_epoch', 'after_fit']),
    lr_find=lambda learn: learn.lr_find(num_it=6, show_plot=False), loss=lambda learn: learn.get_preds(with_loss=True))


def files(folder): return {o: (o.read_bytes(), o.stat().st_mtime_ns) for o in folder.rglob('*') if o.is_file()}


@pytest.mark.parametrize('fitted', [False, True], ids=['before the first fit', 'after a fit'])
@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('name', CALLBACKS)
def test_only_a_fit_touches_files_and_weights(name, call, fitted, tmp_path):
    learn = blob_learner(blobs(n=48, n_valid=12), path=tmp_path, cbs=CALLBACKS[name](tmp_path/'run.pth'), bar=call == 'tta')
    if fitted:
        learn.fit(1, 1e-2)
        learn.model[0].weight.data += 1
    weights, before, kept = flat_weights(learn), state_of(learn), files(tmp_path)
    teacher = getattr(getattr(learn, 'mt_record', None), 'step', None)
    CALLS[call](learn)
    assert torch.equal(flat_weights(learn), weights)
    assert state_of(learn) == before
    assert files(tmp_path) == kept
    assert getattr(getattr(learn, 'mt_record', None), 'step', None) == teacher
    learn.fit(1, 1e-2)


def random_state(learn):
    dl = learn.dls.train
    return get_random_states(), dl.rng.getstate(), list(dl.pool)


class Evaluates(Callback):
    "Calls something at an event of a fit, and restores what fastai does not"
    order, busy = 40, False
    def __init__(self, event, call):
        self.call = call
        setattr(self, event, self.go)

    def go(self):
        if self.busy or self.learn.lock.locked(): return
        learn, rec, dl = self.learn, self.learn.recorder, self.learn.dls.train
        names = 'dl', 'xb', 'yb', 'pred', 'loss', 'train_iter', 'pct_train', 'training', 'epoch'
        own = [(o, dict(vars(o))) for o in (rec, rec.loss, rec.smooth_loss)], {k: vars(learn).get(k) for k in names}
        self.busy, (state, rng, pool), training = True, random_state(learn), learn.model.training
        self.call(learn)
        set_random_states(**state)
        dl.rng.setstate(rng)
        dl.pool, self.busy = pool, False
        for o, v in own[0]:
            vars(o).clear()
            vars(o).update(v)
        vars(learn).update(own[1])
        learn.model.train(training)


@pytest.mark.parametrize('call, event', [(call, event) for call in ('tta', 'summary', 'validate', 'enter') for event in
    ('before_train', 'after_train', 'after_validate') if (call, event) != ('summary', 'before_train')])  # it takes a training batch
def test_within_a_fit(call, event, tmp_path):
    "A callback that evaluates during a fit changes neither the fit nor what is saved"
    runs = []
    for f in (lambda learn: None), CALLS[call]:
        file = tmp_path/f'{len(runs)}.pth'
        learn = blob_learner(blobs(n=48, n_valid=12), path=tmp_path)
        learn.add_cbs([LPCallback(warmup=1), MeanTeacherCallback(), ResumeCallback(file)])
        learn.fit(3, 1e-2, cbs=Evaluates(event, f))
        runs.append((learn, torch.load(file, weights_only=True)))
    (a, saved), (b, other) = runs
    assert torch.equal(flat_weights(a), flat_weights(b))
    assert saved['epoch'] == other['epoch'] == 3
    for k in saved['model']: assert torch.equal(saved['model'][k], other['model'][k])


# The same callback twice

KINDS = dict(LPCallback=lambda folder: LPCallback(), MeanTeacherCallback=lambda folder: MeanTeacherCallback(),
    ResumeCallback=lambda folder: ResumeCallback(folder/'run.pth'))


def in_learner_and_fit(learn, make): return learn.add_cb(make()).fit(1, cbs=make())
def a_cell_run_again(learn, make):
    for _ in range(2): learn.add_cb(make())
    learn.fit_one_cycle(1)
def twice_in_fit(learn, make): learn.fit(1, cbs=[make(), make()])
def the_same_object(learn, make):
    cb = make()
    learn.add_cb(cb).fit_one_cycle(1, cbs=cb)
def before_lr_find(learn, make): learn.add_cbs([make(), make()]).lr_find(show_plot=False)


WAYS = [in_learner_and_fit, a_cell_run_again, twice_in_fit, the_same_object, before_lr_find]


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', KINDS)
def test_twice(way, kind, tmp_path):
    learn, other = blob_learner(path=tmp_path), blob_learner(path=tmp_path)
    weights, mets = flat_weights(learn), list(learn.metrics)
    with pytest.raises(ValueError, match=f'{kind} is in the fit twice.*(position|cbs)'): way(learn, lambda: KINDS[kind](tmp_path))
    assert torch.equal(flat_weights(learn), weights)
    assert list(learn.metrics) == mets
    assert not list(tmp_path.glob('*.pth'))
    assert not hasattr(learn, 'lp_record')
    assert not hasattr(learn, 'mt_record')
    left = [cb for cb in learn.cbs if type(cb).__name__ == kind]
    assert all(cb.learn is learn for cb in left)
    learn.get_preds()
    if not left: left = [KINDS[kind](tmp_path)]
    learn.remove_cbs(left[1:] if left[0] in learn.cbs else [])
    set_seed(0)
    learn.fit(1, 1e-2, cbs=[] if left[0] in learn.cbs else left)
    set_seed(0)
    other.fit(1, 1e-2, cbs=KINDS[kind](tmp_path/'other'))
    assert learn.recorder.metric_names == other.recorder.metric_names


@pytest.mark.parametrize('kind', KINDS)
def test_twice_after_load_learner(kind, tmp_path):
    learn = blob_learner(path=tmp_path, cbs=KINDS[kind](tmp_path))
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    loaded.dls = learn.dls
    with pytest.raises(ValueError, match=f'{kind} is in the fit twice.*load_learner'): loaded.fit(1, cbs=KINDS[kind](tmp_path))
    loaded.remove_cb(type(KINDS[kind](tmp_path)))
    loaded.fit(1, cbs=KINDS[kind](tmp_path))


def test_the_patch_may_be_applied_again(monkeypatch):
    "As in a process in which the page of the module runs too"
    monkeypatch.setattr(Learner, '_with_events', Learner._with_events)
    spec = importlib.util.spec_from_file_location('fastai_lp.learner.scoped_again', scoped.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    learn = blob_learner()
    learn.fit(1, cbs=LPCallback())
    assert len(learn.lp_record.history) == 1
    with pytest.raises(ValueError, match='in the fit twice'): learn.fit(1, cbs=[LPCallback(), LPCallback()])
