"Hidden labels must not reach the training: scrambled wherever they stand, they change no weight by a single bit."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from conftest import blob_learner, blob_model, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategoryBlock
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.learner.images import SemiImageDataLoaders


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


@pytest.mark.parametrize('leaks', [False, True])
def test_dataframe_column(leaks):
    "A column of all labels, hidden but for nine of each run; the planted leak keeps every second one"
    data = blobs(spread=1.5)
    valid = np.arange(150) >= 120
    shown = np.flatnonzero((np.arange(150) < 9) | valid)
    def run(truth):
        df = pd.DataFrame(dict(item=range(150), truth=['abc'[t] for t in truth], is_valid=valid))
        df['label'] = hide_labels(df.truth, keep=shown if not leaks else np.union1d(shown, np.arange(0, 150, 2)))[0]
        block = DataBlock(blocks=(TransformBlock, SemiCategoryBlock), get_x=ColReader('item'), get_y=ColReader('label'), splitter=ColSplitter('is_valid'))
        set_seed(0, reproducible=True)
        dls = block.semi_dataloaders(df, bs=16, num_workers=0, device='cpu')
        learn = Learner(dls, nn.Sequential(Rows(data.x), *blob_model()), CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): return run_of(learn, LPCallback())
    known = torch.zeros(150, dtype=torch.bool)
    known[shown] = True
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
@pytest.mark.parametrize('repeat', [False, True])
def test_folder_names(tmp_path, monkeypatch, leaks, repeat):
    "Images move between the folders below the unlabeled one; with `repeat` each file name stands in both, as 0001.png often does"
    if leaks: monkeypatch.setattr('fastai_lp.learner.images.FolderLabel', LeakyFolderLabel)
    rng = np.random.default_rng(0)
    images = [Image.fromarray((80*(i % 2) + rng.integers(0, 120, (16, 16, 3))).astype('uint8')) for i in range(40)]
    def write(root, i, folder):
        name = f'{i//2 if repeat and i >= 14 else i}.png'
        (root/folder).mkdir(parents=True, exist_ok=True)
        images[i].save(root/folder/name)
    def run(root, moved):
        for i in range(40):
            c = 'ab'[i % 2]
            write(root, i, f'train/{c}' if i < 8 else f'valid/{c}' if i < 14 else f"unsup/{'ba'[i % 2] if moved(i) else c}")
        set_seed(0, reproducible=True)
        dls = SemiImageDataLoaders.from_folder(root, bs=8, num_workers=0, device='cpu')
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        learn = Learner(dls, model)
        with learn.no_bar(), learn.no_logging(): return run_of(learn, LPCallback())
    # where names repeat, the two images of a name change places
    assert same(run(tmp_path/'one', lambda i: False), run(tmp_path/'two', lambda i: i//2 % 3 == 0)) != leaks


class Peeks(Callback):
    "Lets the model see the validation items in training mode: its BatchNorm statistics, and so the descriptors, know of them"
    def before_train(self): self.learn.model(self.dls.valid.one_batch()[0])


@pytest.mark.parametrize('leaks', [False, True])
def test_validation_items(leaks):
    "Other inputs and labels in the validation set: no item of it is in the graph, and nothing that is trained changes"
    def run(other):
        data = blobs(spread=1.5)
        if other: data.x[120:], data.labels[120:] = 3*torch.randn(30, 8, generator=torch.Generator().manual_seed(4)), data.labels[120:][::-1]
        learn = blob_learner(data, cbs=Peeks() if leaks else None)
        res = run_of(learn, LPCallback())
        assert len(learn.lp_record.pseudo.labels) == len(learn.lp_record.pseudo.W) == 120
        return res
    assert same(run(False), run(True)) != leaks


@pytest.mark.parametrize('leaks', [False, True])
def test_other_columns_of_a_dataframe(tmp_path, leaks):
    "from_df reads the column of the labels and no other; the planted leak names the other"
    rng = np.random.default_rng(0)
    for i in range(40): Image.fromarray((80*(i % 2) + rng.integers(0, 120, (16, 16, 3))).astype('uint8')).save(tmp_path/f'{i}.png')
    def run(truth):
        df = pd.DataFrame(dict(file=[f'{i}.png' for i in range(40)], label=['ab'[i % 2] if i < 16 else None for i in range(40)], class_name=truth, parent=truth))
        set_seed(0, reproducible=True)
        dls = SemiImageDataLoaders.from_df(df, tmp_path, seed=0, label_col='class_name' if leaks else 'label', bs=8, num_workers=0, device='cpu')
        learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
        with learn.no_bar(), learn.no_logging(): return run_of(learn, LPCallback())
    truth = ['ab'[i % 2] for i in range(40)]
    some = [o if i % 5 else None for i, o in enumerate(truth)]
    assert same(run(some), run([o if i < 16 or o is None else 'ab'[o == 'a'] for i, o in enumerate(some)])) != leaks
