"The same seed gives bitwise the same pseudo-labels and weights on the same machine."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, RandomResizedCrop, aug_transforms
from PIL import Image
from torch import nn

from conftest import blob_learner, blobs, flat_weights, quiet
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.transductive.labelers import GTG
from fastai_lp.transductive.neighbors import knn


def outcome(learn):
    p = learn.lp_record.pseudo
    teacher = list(learn.mt_record.teacher.state_dict().values()) if hasattr(learn, 'mt_record') else []
    return [flat_weights(learn), p.labels, p.certainty, p.weights, *([p.Z] if p.Z is not None else []), *teacher]


def same(a, b): return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


CBS = dict(lp=lambda: [LPCallback()], torch=lambda: [LPCallback(backend='torch')], gtg=lambda: [LPCallback(GTG())],
    HNSW=lambda: [LPCallback(index='HNSW16')], both=lambda: [LPCallback(warmup=1), MeanTeacherCallback()])


def run(cbs, seed=0, workers=0, two_stream=True):
    learn = blob_learner(blobs(spread=1.), seed=seed, num_workers=workers, two_stream=two_stream)
    learn.fit_one_cycle(2, 1e-2, cbs=CBS[cbs]())
    return outcome(learn)


@pytest.mark.parametrize('cbs', CBS)
def test_the_same_seed(cbs):
    first = run(cbs)
    assert same(first, run(cbs))
    assert not same(first, run(cbs, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize('cbs, two_stream', [('lp', True), ('both', True), ('lp', False)])
def test_any_number_of_workers(cbs, two_stream):
    first, second = (run(cbs, two_stream=two_stream, workers=n) for n in (0, 2))
    assert same(first, second)


@pytest.mark.parametrize('index', ['HNSW16', 'IVF32,Flat'])
def test_approximate_search_on_one_thread(index):
    x = F.normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)))
    first, second = (knn(x, 10, index=index)[1] for _ in range(2))
    assert torch.equal(first, second)


# Images

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(40):
        path = root/(f"{'train' if i < 8 else 'valid'}/{'ab'[i % 2]}" if i < 14 else 'unsup')
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray((80*(i % 2) + rng.integers(0, 120, (20, 20, 3))).astype('uint8')).save(path/f'{i}.png')
    return root


def run_on_images(folder, workers, seed=0, **tfms):
    set_seed(seed, reproducible=True)
    dls = SemiImageDataLoaders.from_folder(folder, bs=8, num_workers=workers, device='cpu', **tfms)
    set_seed(seed, reproducible=True)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    learn = quiet(Learner(dls, nn.Sequential(*body, nn.Linear(8, 2))))
    learn.fit(2, 1e-2, cbs=LPCallback())
    return outcome(learn)


def test_augmented_batches(folder):
    "The main process draws the augmentation of batches, so the number of workers does not matter"
    def tfms(): return dict(batch_tfms=[*aug_transforms(size=16), Flip()])
    first = run_on_images(folder, 0, **tfms())
    assert same(first, run_on_images(folder, 0, **tfms()))
    assert same(first, run_on_images(folder, 2, **tfms()))
    assert not same(first, run_on_images(folder, 0, seed=1, **tfms()))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_augmented_items(folder, workers):
    "Workers draw the augmentation of items from their own seeds, so the number of workers must be the same"
    first, second = (run_on_images(folder, workers, item_tfms=RandomResizedCrop(16)) for _ in range(2))
    assert same(first, second)
