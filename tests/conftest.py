"Small learners on made-up data, seconds each."
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from fastai_lp.data import SemiCategorize

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


def flat_weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.state_dict().values()])


@pytest.fixture
def data(): return blobs()


@pytest.fixture
def learn(tmp_path): return blob_learner(path=tmp_path)
