"""Checks whether a long fit grows in memory, or leaves anything behind.

Trains on the digits for 300 epochs with LPCallback, MeanTeacherCallback, ResumeCallback and two workers. After each
epoch it reads the resident memory (RSS), open files and child processes. fastai's Recorder keeps a tensor per step;
without --keep-losses, those of past epochs are turned into numbers, so that this list is not measured. Prints the
slope of RSS from epoch 50 on, with a standard error from the means of blocks of 25 epochs (neighboring epochs are not
independent), and what is left after the fit. Reproduces results/soak.json and results/soak_plain.json:

    OMP_NUM_THREADS=1 python benchmarks/soak.py --out benchmarks/results/soak.json
    OMP_NUM_THREADS=1 python benchmarks/soak.py --plain --out benchmarks/results/soak_plain.json"""
import gc
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true

from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback


def children():
    def parent(o): return (o/'stat').read_text().rsplit(')', 1)[1].split()[1]
    processes = [o for o in Path('/proc').iterdir() if o.name.isdecimal() and (o/'stat').exists()]
    return [o for o in processes if parent(o) == str(os.getpid())]


def open_files(): return len(os.listdir('/proc/self/fd'))
def megabytes(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGESIZE')/2**20
def kinds(): return Counter(type(o).__name__ for o in gc.get_objects())


def traces(learn):
    "What a fit could leave behind"
    gc.collect()
    kinds = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks'
    hooks = sum(len(getattr(m, kind)) for m in learn.model.modules() for kind in kinds)
    return dict(hooks=hooks, callbacks=[type(o).__name__ for o in learn.cbs], files=open_files(),
        processes=len(children()), threads=threading.active_count(), metrics=[m.name for m in learn.metrics])


class Watch(Callback):
    order = 99
    def __init__(self, start, keep_losses): self.start, self.keep_losses = start, keep_losses
    def before_fit(self): self.rows = []
    def after_epoch(self):
        if not self.keep_losses: self.recorder.losses[:] = [float(o) for o in self.recorder.losses]
        gc.collect()
        if self.epoch == self.start: self.then = kinds()
        objects = len(gc.get_objects())
        self.rows.append(dict(rss=megabytes(), files=open_files(), processes=len(children()), objects=objects))


def slope(rss, start, block):
    "(MB per epoch, its standard error) of a line through the means of blocks"
    rss = np.array(rss[start:])
    y = rss[:len(rss)//block*block].reshape(-1, block).mean(1)
    x = start + block*(np.arange(len(y)) + .5)
    a, b = np.polyfit(x, y, 1)
    return float(a), float(np.sqrt(((y-a*x-b)**2).sum()/(len(y)-2)/((x-x.mean())**2).sum()))


def show(watch, start, a, se):
    first, last, rss = watch.rows[start], watch.rows[-1], [f"{watch.rows[i]['rss']:.0f}" for i in (0, start, -1)]
    print(f"RSS {rss[0]} MB after epoch 1, {rss[1]} after {start+1}, {rss[2]} after {len(watch.rows)}; "
        f"slope from epoch {start} on {1000*a:.1f} ± {1000*se:.1f} KB per epoch")
    print(f"objects {first['objects']}, {last['objects']}; open files {first['files']}, {last['files']}; "
        f"processes {max(o['processes'] for o in watch.rows[start:])}")
    print('types with more objects:', (kinds()-watch.then).most_common(6))


@call_parse
def main(
    epochs:int=300, # of the fit
    start:int=50, # first epoch of the slope
    workers:int=2, # of the training DataLoader
    plain:store_true=False, # fastai only, with the same batches
    keep_losses:store_true=False, # leave fastai's list of losses as it is
    out:str=None, # .json file of the result
):
    torch.set_num_threads(1)
    set_seed(0)
    dls = digits_dls(digits(20))
    dls.train.fake_l.num_workers = workers
    learn = Learner(dls, small_convnet(10), metrics=accuracy)
    watch, before = Watch(start, keep_losses), traces(learn)
    with tempfile.TemporaryDirectory() as tmp, learn.no_bar(), learn.no_logging():
        cbs = [] if plain else [LPCallback(), MeanTeacherCallback(), ResumeCallback(Path(tmp)/'run.pth')]
        learn.fit_one_cycle(epochs, 3e-3, cbs=[*cbs, watch])
        left = [o.name for o in Path(tmp).iterdir() if o.name != 'run.pth']
    after, rss = traces(learn), [o['rss'] for o in watch.rows]
    a, se = slope(rss, start, max(1, min(25, (epochs-start)//4)))
    show(watch, start, a, se)
    print('left behind:', {k: (before[k], after[k]) for k in before if before[k] != after[k]} or 'nothing', left or '')
    res = dict(epochs=epochs, start=start, workers=workers, keep_losses=keep_losses, slope_mb=a, se_mb=se, before=before,
        after=after, rss=[round(o, 1) for o in rss], objects=[o['objects'] for o in watch.rows])
    if out: Path(out).write_text(json.dumps(res) + '\n')
    sys.exit(bool(before != after or left))
