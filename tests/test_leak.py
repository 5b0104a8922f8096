"Hidden labels must not reach the training: scrambled wherever they stand, they change no weight by a single bit."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from conftest import blob_learner, blob_model, blobs, flat_weights
from fastai_lp.callback import LPCallback
from fastai_lp.data import SemiCategoryBlock, SemiImageDataLoaders


def scramble(truth, known, seed=9):
    "Other classes for all items but the known ones"
    res = truth.clone()
    res[~known] = truth[~known][torch.randperm(int((~known).sum()), generator=torch.Generator().manual_seed(seed))]
    assert (res != truth).float().mean() > .4
    return res


def run_of(learn, cb):
    learn.fit(2, 1e-2, cbs=cb)
    p = learn.lp_record.pseudo
    return flat_weights(learn), p.labels, p.weights


def same(a, b): return all(torch.equal(u, v) for u, v in zip(a, b))


class LeakyCallback(LPCallback):
    "Lets the truth in where only the given labels belong"
    def _update(self):
        if self._fit.truth is not None: self._fit.y = self._fit.truth
        super()._update()
    def before_batch(self):
        self._fit.mismatch = torch.zeros((), dtype=torch.bool)
        y, self._fit.y = self._fit.y, self.dls.train.targets
        super().before_batch()
        self._fit.y = y


@pytest.mark.parametrize('callback, leaks', [(LPCallback, False), (LeakyCallback, True)])
def test_truth(callback, leaks):
    data = blobs(spread=1.5)
    known = torch.arange(120) < 9
    runs = [run_of(blob_learner(data), callback(truth=t)) for t in (data.truth[:120], scramble(data.truth[:120], known))]
    if not leaks: runs.append(run_of(blob_learner(data), callback()))
    assert all(same(runs[0], r) for r in runs[1:]) != leaks


@pytest.mark.parametrize('column, leaks', [('label', False), ('truth', True)])
def test_dataframe_column(column, leaks):
    "A column of true labels beside the one that is read; reading it instead is the planted leak"
    data = blobs(spread=1.5)
    known = torch.tensor([o is not None for o in data.labels])
    def run(truth):
        df = pd.DataFrame(dict(item=range(150), label=pd.Series(data.labels, dtype=object), truth=truth.tolist(), is_valid=np.arange(150) >= 120))
        if leaks: df['label'] = [t if k or i % 2 else None for i, (t, k) in enumerate(zip(df.truth, known))]
        block = DataBlock(blocks=(TransformBlock, SemiCategoryBlock), get_x=ColReader('item'), get_y=ColReader('label'),
                          splitter=ColSplitter('is_valid'))
        set_seed(0, reproducible=True)
        dls = block.semi_dataloaders(df, bs=16, num_workers=0, device='cpu')
        learn = Learner(dls, nn.Sequential(Rows(data.x), *blob_model()), CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): return run_of(learn, LPCallback())
    assert same(run(data.truth), run(scramble(data.truth, known))) != leaks


class Rows(nn.Module):
    "The items' vectors from their numbers"
    def __init__(self, x):
        super().__init__()
        self.x = x
    def forward(self, i): return self.x[i.long()]


class LeakyFolderLabel:
    "Reads the folder's name below the unlabeled one too, for every second image"
    def __init__(self, unlabeled): self.unlabeled = unlabeled
    def __call__(self, o): return o.parent.name if self.unlabeled not in o.parents or int(o.stem) % 2 else None


@pytest.mark.parametrize('leaks', [False, True])
def test_folder_names(tmp_path, monkeypatch, leaks):
    if leaks: monkeypatch.setattr('fastai_lp.data.FolderLabel', LeakyFolderLabel)
    rng = np.random.default_rng(0)
    classes = 'ab'
    def write(path, c):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((80*(c == 'a') + rng.integers(0, 120, (16, 16, 3))).astype('uint8')).save(path)
    for i in range(8): write(tmp_path/'train'/classes[i % 2]/f'{i}.png', classes[i % 2])
    for i in range(8, 14): write(tmp_path/'valid'/classes[i % 2]/f'{i}.png', classes[i % 2])
    for i in range(14, 40): write(tmp_path/'unsup'/classes[i % 2]/f'{i}.png', classes[i % 2])
    def run():
        set_seed(0, reproducible=True)
        dls = SemiImageDataLoaders.from_folder(tmp_path, bs=8, num_workers=0, device='cpu')
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        learn = Learner(dls, model)
        with learn.no_bar(), learn.no_logging(): return run_of(learn, LPCallback())
    first = run()
    for i in range(14, 40):                                  # some images move to the other class's folder
        if i % 3 == 0:
            old = tmp_path/'unsup'/classes[i % 2]/f'{i}.png'
            old.rename(tmp_path/'unsup'/classes[1 - i % 2]/f'{i}.png')
    assert same(first, run()) != leaks
