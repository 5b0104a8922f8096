"Small learners on made-up data, seconds each; the profile of the property tests; the docs' table of faults, made from what the tests saw."
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from fastai_lp.learner.data import SemiCategorize

settings.register_profile('fastai_lp', deadline=None, derandomize='CI' in os.environ)
settings.load_profile('fastai_lp')
torch.set_num_threads(1)  # small work: more threads only wait for each other, and round differently


class Look:
    "table[i], as a transform that can be pickled"
    def __init__(self, table): self.table = table
    def __call__(self, i): return self.table[i]


def blobs(n=150, d=8, c=3, per_class=3, n_valid=30, seed=0, spread=.5):
    "Gaussian classes; the last `n_valid` items are for validation, all others but `per_class` of each class are unlabeled"
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % c
    x = 2*torch.randn(c, d, generator=g)[truth] + spread*torch.randn(n, d, generator=g)
    labels = [int(t) if i < c*per_class or i >= n-n_valid else None for i, t in enumerate(truth)]
    return SimpleNamespace(x=x, truth=truth, labels=labels, n_train=n-n_valid, c=c, d=d)


def blob_model(d=8, c=3): return nn.Sequential(nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.1), nn.Linear(16, c))


def blob_learner(data=None, bs=16, two_stream=True, num_workers=0, seed=0, labels=None, bar=False, cbs=None, model=None, loss_func=None, path='.'):
    data = data or blobs()
    set_seed(seed, reproducible=True)
    labels = data.labels if labels is None else labels
    n = len(labels)
    dsets = Datasets(range(n), [[Look(data.x)], [Look(labels), SemiCategorize(vocab=list(range(data.c)))]],
        splits=[list(range(data.n_train)), list(range(data.n_train, n))])
    make = dsets.semi_dataloaders if two_stream else dsets.dataloaders
    dls = make(bs=bs, num_workers=num_workers, device='cpu')
    learn = Learner(dls, model or blob_model(data.d, data.c), metrics=accuracy, cbs=cbs, loss_func=loss_func, path=path)
    if not bar:
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *a: None
    return learn


class Spy(Callback):
    "What reaches the model and the loss, batch by batch"
    order = 100
    def before_fit(self): self.seen = []
    def after_pred(self):
        if self.training: self.seen.append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))
    def after_batch(self):
        if self.training: self.last_target = self.learn.yb[0]


def item_numbers(data, x): return torch.cdist(x, data.x).argmin(1)


def flat_weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.state_dict().values()])


@pytest.fixture
def data(): return blobs()


@pytest.fixture
def learn(tmp_path): return blob_learner(path=tmp_path)


# The table of faults

TABLE = Path(__file__).resolve().parents[1]/'nbs'/'faults.json'


def pytest_addoption(parser): parser.addoption('--write-faults', action='store_true', help='write the table of the docs from what tests/test_faults.py saw')


class Shows:
    "What a test saw happen: rows of the table in the docs. A message is the one that came, not one that was typed"
    def __init__(self, test, folder): self.test, self.folder, self.rows = test, folder, []

    def result(self, group, what, happens):
        happens = re.sub(r"Exception occured in `\w+` when calling event `\w+`:\s*", '', happens)  # fastai's
        happens = re.sub(r'[\d.]+ GB (are )?free', '… GB free', happens.replace(f'{self.folder}', 'FOLDER'))
        self.rows.append(dict(group=group, what=what, happens=' '.join(happens.split()), test=self.test))

    @contextmanager
    def error(self, group, what, match, error=ValueError):
        with pytest.raises(error, match=match) as e: yield e
        self.result(group, what, f'`{type(e.value).__name__}`: {e.value.args[0] if isinstance(e.value, KeyError) else e.value}')

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


PASSED, ROWS = pytest.StashKey(), pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    rep = yield
    if rep.when == 'call': item.stash[PASSED] = rep.passed
    return rep


@pytest.fixture
def table(request):
    "(rows that the tests run so far showed, those of the committed file); with --write-faults the file is written first"
    found = request.session.stash.get(ROWS, [])
    if request.config.getoption('--write-faults'): TABLE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n')
    return found, json.loads(TABLE.read_text())
