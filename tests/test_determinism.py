"The same seed gives the same pseudo-labels and the same weights, to the last bit, on the same machine."
import numpy as np
import pytest
import torch
from fastai.callback.schedule import *  # fit_one_cycle
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, RandomResizedCrop, aug_transforms
from PIL import Image
from torch import nn

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.transductive.labelers import GTG
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.transductive.neighbors import knn


def outcome(learn):
    p = learn.lp_record.pseudo
    return [flat_weights(learn), p.labels, p.certainty, p.weights, *([p.Z] if p.Z is not None else [])] + (list(learn.mt_record.teacher.state_dict().values()) if hasattr(learn, 'mt_record') else [])


def same(a, b): return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


CBS = dict(lp=lambda: [LPCallback()], torch=lambda: [LPCallback(backend='torch')], gtg=lambda: [LPCallback(GTG())], HNSW=lambda: [LPCallback(index='HNSW16')],
    both=lambda: [LPCallback(warmup=1), MeanTeacherCallback()])


@pytest.mark.parametrize('cbs', CBS)
@pytest.mark.parametrize('two_stream', [True, False])
def test_the_same_seed(cbs, two_stream):
    if cbs == 'both' and not two_stream: pytest.skip('Mean Teacher takes two streams')
    def run(seed, workers):
        learn = blob_learner(blobs(spread=1.), seed=seed, num_workers=workers, two_stream=two_stream)
        learn.fit_one_cycle(3, 1e-2, cbs=CBS[cbs]())
        return outcome(learn)
    first = run(0, 0)
    assert same(first, run(0, 0)) and same(first, run(0, 2)) and not same(first, run(1, 0))


def pictures(root):
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root/(f"{'train' if i < 8 else 'valid'}/{'ab'[i % 2]}" if i < 14 else 'unsup')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((80*(i % 2) + rng.integers(0, 120, (20, 20, 3))).astype('uint8')).save(folder/f'{i}.png')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    pictures(root := tmp_path_factory.mktemp('pics'))
    return root


def on_images(folder, workers, seed=0, **kwargs):
    set_seed(seed, reproducible=True)
    dls = SemiImageDataLoaders.from_folder(folder, bs=8, num_workers=workers, device='cpu', **kwargs)
    set_seed(seed, reproducible=True)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=LPCallback())
    return outcome(learn)


def test_augmented_batches(folder):
    "Augmentation on the batch is drawn in the main process: the number of workers does not matter"
    def tfms(): return dict(batch_tfms=[*aug_transforms(size=16), Flip()])
    first = on_images(folder, 0, **tfms())
    assert same(first, on_images(folder, 0, **tfms())) and same(first, on_images(folder, 2, **tfms())) and not same(first, on_images(folder, 0, seed=1, **tfms()))


def test_augmented_items(folder):
    "Augmentation of single items is drawn in the workers, from seeds of their own: it is the same with the same number of them"
    def tfms(): return dict(item_tfms=RandomResizedCrop(16))
    for workers in (0, 2): assert same(on_images(folder, workers, **tfms()), on_images(folder, workers, **tfms()))


def test_approximate_search_on_one_thread():
    x = torch.nn.functional.normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)))
    for index in ('HNSW16', 'IVF32,Flat'): assert torch.equal(knn(x, 10, index=index)[1], knn(x, 10, index=index)[1])
