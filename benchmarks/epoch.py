"""Time of an epoch with LPCallback over that of a plain epoch on the same images, where loading takes the time: JPEG files of
400×300 pixels, `Resize(128)`, fastai's augmentation, and a network that costs nothing.

The plain epoch trains on all images, as if all were labeled. Both repeat in turn in one process; the first epochs are left out
(the cache fills there, and they are reported apart). Without a cache, two repeats have to do. Reproduces results/epoch/epoch.json:

    OMP_NUM_THREADS=1 python benchmarks/epoch.py"""
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders
from fastcore.script import call_parse
from PIL import Image
from torch import nn

from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from step import machine


def photograph(rng, width, height):
    "Smooth shapes and fine texture"
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 12, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_images(path, n, labeled, classes, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        folder = path/(f'train/{i % classes}' if i < labeled else 'unsup')
        folder.mkdir(parents=True, exist_ok=True)
        photograph(rng, 400, 300).save(folder/f'{i}.jpg', quality=90)


class Seconds(Callback):
    "Seconds of each epoch, with what the other callbacks do before it"
    order = -50
    def before_fit(self): self.found = []
    def before_epoch(self): self.start = time.perf_counter()
    def after_train(self): self.found.append(time.perf_counter()-self.start)


def seconds(dls, epochs, cbs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, dls.c))
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=[timer := Seconds()])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=cbs)
    return timer.found, learn


def measure(path, workers, repeats, epochs, cache, bs=64):
    kw = dict(valid_pct=.2, seed=0, item_tfms=Resize(128), batch_tfms=aug_transforms(), num_workers=workers, bs=bs)
    semi = SemiImageDataLoaders.from_folder(path, **kw)
    plain = ImageDataLoaders.from_path_func(path, get_image_files(path), lambda o: '0', **kw | dict(valid_pct=0.))
    ratios, first = [], []
    for _ in range(repeats):
        base = median(seconds(plain, epochs, [])[0])
        found, learn = seconds(semi, epochs+1, [LPCallback(cache=cache)])
        ratios.append(median(found[1:])/base)
        first.append(found[0]/base)
        times = ', '.join(f'{o:.1f}' for o in found)
        print(f'{workers} workers: plain {base:.1f} s, LPCallback {times} s, ratio {ratios[-1]:.2f}', flush=True)
    return dict(ratio=ratios, first=first, cached=learn.lp_record.history[-1].get('cached'))


@call_parse
def main(
    n:int=2000, # images
    labeled:int=100, # of them
    workers:str='0,2', # separated by commas
    repeats:int=5,
    epochs:int=3, # per repeat
    out:str=str(Path(__file__).parent/'results/epoch/epoch.json'),
):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        write_images(Path(d), n, labeled, 10)
        found = {name: {w: measure(Path(d), int(w), repeats if name == 'default' else 2, epochs, cache) for w in workers.split(',')}
            for name, cache in (('default', None), ('none', 0))}
    for name, rows in found.items():
        for w, o in rows.items():
            low, high = min(o['ratio']), max(o['ratio'])
            print(f"{w} workers, cache {name}: {median(o['ratio']):.2f} times a plain epoch ({low:.2f} to {high:.2f}), "
                f"the first epoch {median(o['first']):.2f}; kept {o['cached']}")
    row = dict(images=n, labeled=labeled, cache=found, machine=machine(), date=time.strftime('%Y-%m-%d'))
    Path(out).write_text(json.dumps(row, indent=1) + '\n')
