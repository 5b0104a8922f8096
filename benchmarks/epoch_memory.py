"""Peak memory of epochs with LPCallback on 50,000 images, with and without the cache of decoded images, and of plain epochs.

The images are JPEG files of 160×120 pixels: 500 distinct ones, with 100 hard links each, because writing more would only take
time. `Resize(64)`, two worker processes, a small network with 128-dimensional features, one thread per process. Each variant
runs in a process of its own: one epoch, and a second one with a cache, which is full then. Its memory is that of the process and
its workers, the sum of their proportional set sizes (Pss_Anon and Pss_Shmem in /proc/PID/smaps_rollup, thus without the files of
the libraries), read about 10 times per second; a page that they share counts once. `phases` has the peak during the extraction
of features, the rest of the update (graph, diffusion) and training; `start` is the memory before the fit. Reproduces
results/epoch/memory.jsonl, one line per variant, in about 15 minutes on two cores:

    OMP_NUM_THREADS=1 python benchmarks/epoch_memory.py > benchmarks/results/epoch/memory.jsonl"""
import json
import os
import tempfile
import time
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from fastcore.basics import patch_to
from fastcore.script import call_parse
from torch import nn

from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.transductive.advice import peak_memory
from fastai_lp.transductive.neighbors import default_k
from fastai_lp.utils.memory import free_memory
from epoch import photograph
from step import machine

WIDTH, HEIGHT, SIZE, D, C, DISTINCT = 160, 120, 64, 128, 10, 500
PHASES = 'start', 'features', 'graph', 'training'
VARIANTS = {'plain': None, 'no cache': 0, 'cache of 1 GB': 10**9, 'default cache': None}


def write_images(path, n, labeled, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        folder = path/(f'train/{i % C}' if i < labeled else 'unsup')
        folder.mkdir(parents=True, exist_ok=True)
        file = folder/f'{i}.jpg'
        if i >= DISTINCT:
            os.link(path/'images'/f'{i % DISTINCT}.jpg', file)
            continue
        photograph(rng, WIDTH, HEIGHT).save(file, quality=90)
        (path/'images').mkdir(exist_ok=True)
        os.link(file, path/'images'/file.name)


class Phases(Callback):
    "Writes to shared memory what the Learner is doing; the step from features to graph is seen by `extract`"
    order = -50
    def __init__(self, phase): self.phase = phase
    def before_batch(self): self.phase.value = PHASES.index('training')


def fit(path, variant, workers, phase, answer):
    "In a process of its own"
    set_start_method('fork', force=True)  # of the workers
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kw = dict(seed=0, item_tfms=Resize(SIZE), num_workers=workers, bs=64)
    if variant == 'plain':
        files = get_image_files(path, folders=['train', 'unsup'])
        dls = ImageDataLoaders.from_path_func(path, files, lambda o: str(int(o.stem) % C), valid_pct=.002, **kw)
    else: dls = SemiImageDataLoaders.from_folder(path, valid_pct=.1, **kw)
    model = nn.Sequential(nn.Conv2d(3, D, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, dls.c))
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=[Phases(phase)])
    cbs = [] if variant == 'plain' else [LPCallback(cache=VARIANTS[variant])]
    extract = Extractor.__call__

    @patch_to(Extractor)
    def __call__(self, *args, **kwargs):
        phase.value = PHASES.index('features')
        try: return extract(self, *args, **kwargs)
        finally: phase.value = PHASES.index('graph')

    epochs = 1 if variant in ('plain', 'no cache') else 2
    free = free_memory()
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=cbs)
    n, cache = len(dls.train_ds), cbs[0].cache if cbs else None
    answer.put(dict(n=n, epochs=epochs, free=free, cached=cache and cache.kept,
        bound=cache.store.max_bytes if cache and cache.store else 0))


def family(pid):
    "A process and its descendants"
    yield pid
    try: children = [o for f in Path(f'/proc/{pid}/task').iterdir() for o in (f/'children').read_text().split()]
    except OSError: return
    for o in children: yield from family(int(o))


def shared_size(pid):
    "Proportional set size in bytes, without files; 0 if the process has ended"
    try: lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    except OSError: return 0
    return sum(1024*int(o.split()[1]) for o in lines if o.startswith(('Pss_Anon:', 'Pss_Shmem:')))


def measure(path, variant, workers, every=.1):
    context = get_context('spawn')
    phase, answer = context.Value('i', 0), context.Queue()
    process = context.Process(target=fit, args=(path, variant, workers, phase, answer))
    process.start()
    peaks, samples = dict.fromkeys(PHASES, 0), 0
    while process.is_alive():
        before = phase.value
        used = sum(map(shared_size, family(process.pid)))
        if before == phase.value: peaks[PHASES[before]] = max(peaks[PHASES[before]], used)
        samples += 1
        time.sleep(every)
    if process.exitcode: raise SystemExit(f'{variant}: exit code {process.exitcode}')
    return dict(variant=variant, peak=max(peaks.values()), phases=peaks, samples=samples, **answer.get())


@call_parse
def main(
    n:int=50_000, # images
    labeled:int=1000, # of them
    variants:str='plain,no cache,cache of 1 GB,default cache', # separated by commas
    workers:int=2, # processes that load
):
    about = dict(width=WIDTH, height=HEIGHT, size=SIZE, d=D, c=C, k=default_k(n), workers=workers,
        step=peak_memory(n, D, C, default_k(n)), machine=machine(), date=time.strftime('%Y-%m-%d'))
    with tempfile.TemporaryDirectory() as d:
        write_images(Path(d), n, labeled)
        for variant in variants.split(','): print(json.dumps(measure(Path(d), variant, workers) | about), flush=True)
