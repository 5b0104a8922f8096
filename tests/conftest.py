"Small data and Learners, callbacks that watch or interrupt a fit, and what tests read and write of the docs."
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_basics import DisplayedTransform
from fastai.torch_core import set_seed
from hypothesis import settings
from torch import nn

from fastai_lp.learner.augment import OnUnlabeled
from fastai_lp.learner.data import SemiCategorize

settings.register_profile('fastai_lp', deadline=None, derandomize='CI' in os.environ)
settings.load_profile('fastai_lp')
torch.set_num_threads(1)  # the tensors are small, and the number of threads changes the rounding


# Data and Learners

class Look:
    "`table[i]` as a transform that can be pickled"
    def __init__(self, table): self.table = table
    def __call__(self, i): return self.table[i]


def blobs(n=150, d=8, c=3, per_class=3, n_valid=30, seed=0, spread=.5):
    "Gaussian classes. The last `n_valid` items are for validation; of the others, `per_class` items per class are labeled"
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % c
    x = 2*torch.randn(c, d, generator=g)[truth] + spread*torch.randn(n, d, generator=g)
    labels = [int(t) if i < c*per_class or i >= n-n_valid else None for i, t in enumerate(truth)]
    return SimpleNamespace(x=x, truth=truth, labels=labels, n_train=n-n_valid, c=c, d=d)


def blob_model(d=8, c=3):
    body = nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.1)
    return nn.Sequential(*body, nn.Linear(16, c))


def blob_learner(data=None, bs=16, two_stream=True, num_workers=0, seed=0, labels=None, bar=False, cbs=None, model=None,
    loss_func=None, path='.'):
    data = data or blobs()
    set_seed(seed, reproducible=True)
    labels = data.labels if labels is None else labels
    n = len(labels)
    dsets = Datasets(range(n), [[Look(data.x)], [Look(labels), SemiCategorize(vocab=list(range(data.c)))]],
        splits=[list(range(data.n_train)), list(range(data.n_train, n))])
    make = dsets.semi_dataloaders if two_stream else dsets.dataloaders
    dls = make(bs=bs, num_workers=num_workers, device='cpu')
    learn = Learner(dls, model or blob_model(data.d, data.c), metrics=accuracy, cbs=cbs, loss_func=loss_func, path=path)
    return learn if bar else quiet(learn)


def quiet(learn):
    "The Learner without progress bar and table"
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn


@pytest.fixture
def data(): return blobs()


@pytest.fixture
def learn(tmp_path): return blob_learner(path=tmp_path)


# What is compared

def item_numbers(data, x): return torch.cdist(x, data.x).argmin(1)


def flat_weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.state_dict().values()])


def state_of(learn):
    "What a fit must leave as it was"
    dl = learn.dls.train
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()]
    own = [getattr(dl, name, None) for name in ('bs', 'views', 'labeled_only', 'ranks')]
    tfms = [id(o) for o in getattr(getattr(dl, 'after_batch', None), 'fs', [])]
    data = id(learn.dls), len(dl), own, 'get_idxs' in vars(dl), tfms
    metrics, cbs = [(type(m), m.name) for m in learn.metrics], [type(o) for o in learn.cbs]
    return dict(loss=learn.loss_func, metrics=metrics, cbs=cbs, hooks=hooks, data=data, events='_with_events' in vars(learn))


def traceless(learn):
    "Asserts that a Learner from `blob_learner` is as new, except for its weights and records"
    dl = learn.dls.train
    assert type(learn.loss_func) is CrossEntropyLossFlat
    assert learn.loss_func.func.reduction == 'mean'
    assert [m.name for m in learn.metrics] == ['accuracy']
    assert '_with_events' not in vars(learn)
    assert 'get_idxs' not in vars(dl)
    assert not getattr(dl, 'labeled_only', False)
    assert (dl.bs, getattr(dl, 'views', 1)) == (16, 1)
    assert not any(isinstance(o, OnUnlabeled) for o in dl.after_batch.fs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    learn.validate()
    assert learn.get_preds()[0].shape == (len(learn.dls.valid_ds), 3)


def same_run(a, b):
    "Asserts that two Learners have bitwise equal weights, recorders, pseudo-labels and teachers"
    assert torch.equal(flat_weights(a), flat_weights(b))
    keep = [i for i, name in enumerate(a.recorder.metric_names[1:-1]) if name != 'lp_sec']
    assert np.array_equal(*(np.array(o.recorder.values, dtype=float)[:, keep] for o in (a, b)), equal_nan=True)
    assert np.allclose(a.recorder.lrs, b.recorder.lrs)
    assert list(a.recorder.iters) == list(b.recorder.iters)
    assert np.array_equal(*([float(x) for x in o.recorder.losses] for o in (a, b)))
    if hasattr(a, 'lp_record'):
        p, q = a.lp_record.pseudo, b.lp_record.pseudo
        for name in ('labels', 'certainty', 'Z'): assert torch.equal(getattr(p, name), getattr(q, name)), name
        for name in ('epoch', 'certainty', 'recall'):
            assert [row.get(name) for row in a.lp_record.history] == [row.get(name) for row in b.lp_record.history], name
    if hasattr(a, 'mt_record'):
        assert a.mt_record.step == b.mt_record.step
        for p, q in zip(*(o.mt_record.teacher.state_dict().values() for o in (a, b)), strict=True): assert torch.equal(p, q)


# Callbacks and transforms that watch or interrupt

class Spy(Callback):
    "Keeps the inputs and targets of each training batch, as model and loss see them"
    order = 100
    def before_fit(self): self.seen = []
    def after_pred(self):
        if self.training: self.seen.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))
    def after_batch(self):
        if self.training: self.last_target = self.learn.yb[0]


class Break(Callback):
    "Raises `error` the `at`-th time that an event happens"
    order = 10
    def __init__(self, error, event='after_pred', at=3):
        self.error, self.at = error, at
        setattr(self, event, self.go)
    def go(self):
        self.at -= 1
        if self.at == 0: raise self.error


class Stop(Callback):
    "Raises an error once, at an event of an epoch"
    order, done = 99, False
    def __init__(self, event, epoch, error=KeyboardInterrupt): self.event, self.at, self.error = event, epoch, error
    def __call__(self, name):
        if name == self.event and not self.done and (name in ('before_fit', 'after_fit') or self.epoch == self.at):
            self.done = True
            raise self.error
        return super().__call__(name)


class Mark(DisplayedTransform):
    "Sets everything to 7 and keeps the sizes of its batches"
    order, split_idx = 50, 0
    def __init__(self, log=None): self.log = [] if log is None else log
    def encodes(self, x: torch.Tensor):
        self.log.append(len(x))
        return torch.full_like(x, 7.)


# The docs

NBS = Path(__file__).resolve().parents[1]/'nbs'


def sidebar():
    "The notebooks in the order of the sidebar"
    def leaves(o):
        if isinstance(o, str): return [o]
        return [x for part in (o.get('contents', []) if isinstance(o, dict) else o) for x in leaves(part)]
    return leaves(yaml.safe_load((NBS/'_quarto.yml').read_text())['website']['sidebar']['contents'])


# The table of errors in the docs

TABLE = NBS/'faults.json'
PASSED, ROWS = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption('--write-faults', action='store_true', help='write the table of errors in the docs, with slow tests')


def pytest_configure(config):
    if config.getoption('--write-faults'): config.option.markexpr = ''


class Shows:
    "Collects rows of the table. Their messages are those that were raised, not typed ones"
    def __init__(self, test, folder): self.test, self.folder, self.rows = test, folder, []

    def result(self, group, what, happens):
        happens = re.sub(r"Exception occured in `\w+` when calling event `\w+`:\s*", '', happens)  # fastai's
        happens = re.sub(r'[\d.]+ GB (are )?free', '… GB free', happens.replace(f'{self.folder}', 'FOLDER'))
        self.rows.append(dict(group=group, what=what, happens=' '.join(happens.split()), test=self.test))

    @contextmanager
    def error(self, group, what, match, error=ValueError):
        with pytest.raises(error, match=match) as e: yield e
        message = e.value.args[0] if isinstance(e.value, KeyError) else e.value
        self.result(group, what, f'`{type(e.value).__name__}`: {message}')

    @contextmanager
    def warning(self, group, what, match, then):
        with pytest.warns(UserWarning, match=match) as w: yield
        said = next(str(o.message) for o in w if re.search(match, str(o.message)))
        self.result(group, what, f'{then} Warning: {said}')


@pytest.fixture
def shows(request, tmp_path):
    res = Shows(request.node.name, tmp_path)
    yield res
    if request.node.stash.get(PASSED, False): request.session.stash.setdefault(ROWS, []).extend(res.rows)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    rep = yield
    if rep.when == 'call': item.stash[PASSED] = rep.passed
    return rep


@pytest.fixture
def table(request):
    "(rows collected so far, rows of the committed file). With --write-faults the file is written first"
    found = request.session.stash.get(ROWS, [])
    if request.config.getoption('--write-faults'): TABLE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n')
    return found, json.loads(TABLE.read_text())
