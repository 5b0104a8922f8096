"Scrambling the hidden labels changes no weight by a single bit. Each test also detects a leak made on purpose."
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

from conftest import blob_learner, blob_model, blobs, flat_weights, quiet
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategoryBlock
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.splitting import hide_labels

with_leaks = pytest.mark.parametrize('leaks', [False, True])


def scramble(truth, known):
    "Shuffles the classes of all items except the known ones"
    res, order = truth.clone(), torch.randperm(int((~known).sum()), generator=torch.Generator().manual_seed(9))
    res[~known] = truth[~known][order]
    assert (res != truth).float().mean() > .4
    return res


def outcome(learn, cb):
    learn.fit(2, 1e-2, cbs=cb)
    p = learn.lp_record.pseudo
    return flat_weights(learn), p.labels, p.weights


def same(a, b): return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


class LeakyCallback(LPCallback):
    "Uses the true classes as labels"
    def _update(self):
        if self._fit.truth is not None: self._fit.y = self._fit.truth
        super()._update()
    def before_batch(self):
        self._fit.mismatch = torch.zeros((), dtype=torch.bool)
        y, self._fit.y = self._fit.y, self.dls.train.targets
        super().before_batch()
        self._fit.y = y


@with_leaks
def test_truth_for_diagnostics(leaks):
    data, callback = blobs(spread=1.5), LeakyCallback if leaks else LPCallback
    known = torch.arange(120) < 9
    true = outcome(blob_learner(data), callback(truth=data.truth[:120]))
    assert same(true, outcome(blob_learner(data), callback(truth=scramble(data.truth[:120], known)))) != leaks
    assert same(true, outcome(blob_learner(data), callback())) != leaks


class Rows(nn.Module):
    "Maps item numbers to rows of `x`"
    def __init__(self, x):
        super().__init__()
        self.x = x
    def forward(self, i): return self.x[i.long()]


@with_leaks
def test_hidden_labels_of_a_dataframe(leaks):
    "The leak keeps every second label"
    data = blobs(spread=1.5)
    valid = np.arange(150) >= 120
    shown = np.flatnonzero((np.arange(150) < 9) | valid)
    keep = np.union1d(shown, np.arange(0, 150, 2)) if leaks else shown
    def run(truth):
        df = pd.DataFrame(dict(item=range(150), truth=['abc'[t] for t in truth], is_valid=valid))
        df['label'] = hide_labels(df.truth, keep=keep)[0]
        block = DataBlock(blocks=(TransformBlock, SemiCategoryBlock), get_x=ColReader('item'), get_y=ColReader('label'),
            splitter=ColSplitter('is_valid'))
        set_seed(0, reproducible=True)
        dls = block.semi_dataloaders(df, bs=16, num_workers=0, device='cpu')
        learn = Learner(dls, nn.Sequential(Rows(data.x), *blob_model()), CrossEntropyLossFlat())
        return outcome(quiet(learn), LPCallback())
    known = torch.zeros(150, dtype=torch.bool)
    known[shown] = True
    assert same(run(data.truth), run(scramble(data.truth, known))) != leaks


# Images

def pictures(n=40):
    "Two classes: every second picture is brighter"
    rng = np.random.default_rng(0)
    return [Image.fromarray((80*(i % 2) + rng.integers(0, 120, (16, 16, 3))).astype('uint8')) for i in range(n)]


def outcome_on_images(dls):
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return outcome(quiet(Learner(dls, nn.Sequential(*body, nn.Linear(8, 2)))), LPCallback())


class LeakyFolderLabel:
    "Also labels every second image in the folder of unlabeled ones, by its subfolder"
    def __init__(self, unlabeled): self.unlabeled = unlabeled
    def __call__(self, o): return o.parent.name if self.unlabeled not in o.parents or int(o.stem) % 2 else None


@with_leaks
@pytest.mark.parametrize('repeat', [False, True])
def test_folder_names(tmp_path, monkeypatch, leaks, repeat):
    """Unlabeled images move between subfolders. With `repeat`, each file name is in both subfolders, as 0001.png often is,
    and the two images of a name change places"""
    if leaks: monkeypatch.setattr('fastai_lp.learner.images.FolderLabel', LeakyFolderLabel)
    def folder(i, moved):
        c = 'ab'[i % 2]
        if i < 14: return f"{'train' if i < 8 else 'valid'}/{c}"
        return f"unsup/{'ba'[i % 2] if moved(i) else c}"
    def run(root, moved):
        for i, image in enumerate(pictures()):
            path = root/folder(i, moved)
            path.mkdir(parents=True, exist_ok=True)
            image.save(path/f'{i//2 if repeat and i >= 14 else i}.png')
        set_seed(0, reproducible=True)
        return outcome_on_images(SemiImageDataLoaders.from_folder(root, bs=8, num_workers=0, device='cpu'))
    assert same(run(tmp_path/'one', lambda i: False), run(tmp_path/'two', lambda i: i//2 % 3 == 0)) != leaks


@with_leaks
def test_other_columns_of_a_dataframe(tmp_path, leaks):
    "from_df reads labels from one column only. The leak names another one"
    for i, image in enumerate(pictures()): image.save(tmp_path/f'{i}.png')
    labels = ['ab'[i % 2] if i < 16 else None for i in range(40)]
    def run(truth):
        df = pd.DataFrame(dict(file=[f'{i}.png' for i in range(40)], label=labels, class_name=truth, parent=truth))
        set_seed(0, reproducible=True)
        column = 'class_name' if leaks else 'label'
        dls = SemiImageDataLoaders.from_df(df, tmp_path, seed=0, label_col=column, bs=8, num_workers=0, device='cpu')
        return outcome_on_images(dls)
    truth = ['ab'[i % 2] if i % 5 else None for i in range(40)]
    other = [o if i < 16 or o is None else 'ab'[o == 'a'] for i, o in enumerate(truth)]
    assert same(run(truth), run(other)) != leaks


# Validation items

class Peeks(Callback):
    "Runs the model on validation items in training mode, which changes its BatchNorm statistics"
    def before_train(self): self.learn.model(self.dls.valid.one_batch()[0])


@with_leaks
def test_validation_items(leaks):
    "No validation item is in the graph. Other ones change nothing that is trained"
    def run(other):
        data = blobs(spread=1.5)
        if other:
            data.x[120:] = 3*torch.randn(30, 8, generator=torch.Generator().manual_seed(4))
            data.labels[120:] = data.labels[120:][::-1]
        learn = blob_learner(data, cbs=Peeks() if leaks else None)
        res = outcome(learn, LPCallback())
        assert len(learn.lp_record.pseudo.labels) == 120
        assert len(learn.lp_record.pseudo.W) == 120
        return res
    assert same(run(False), run(True)) != leaks
