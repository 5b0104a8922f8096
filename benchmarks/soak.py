"""Does a long fit grow, or leave anything behind?

Trains on the digits for 300 epochs, label propagation and Mean Teacher with a file of ResumeCallback's, two workers. After each epoch it reads the
process's resident memory (RSS), its open files and its children. fastai's Recorder keeps a tensor per step, whoever trains;
unless --keep-losses is given, the tensors of past epochs are turned into numbers, so that what is measured is not that list. It prints the slope of RSS from epoch 50 on, its standard error from the means of
blocks of 25 epochs (neighbouring epochs are not independent), and what is left of hooks, callbacks, files and processes when the fit is over.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --out benchmarks/results/soak.json
    OMP_NUM_THREADS=1 python benchmarks/soak.py --plain --out benchmarks/results/soak_plain.json
"""
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
from fastai.callback.schedule import *  # fit_one_cycle
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true

from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.experiments.models import small_convnet
from fastai_lp.learner.resume import ResumeCallback


def children(): return [o for o in Path('/proc').iterdir() if o.name.isdecimal() and (o/'stat').exists() and (o/'stat').read_text().rsplit(')', 1)[1].split()[1] == str(os.getpid())]


def now(learn):
    "What a fit could leave behind"
    gc.collect()
    return dict(hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in learn.model.modules()), callbacks=[type(o).__name__ for o in learn.cbs],
        files=len(os.listdir('/proc/self/fd')), processes=len(children()), threads=threading.active_count(), metrics=[m.name for m in learn.metrics])


def kinds(): return Counter(type(o).__name__ for o in gc.get_objects())


class Watch(Callback):
    order = 99
    def __init__(self, start, keep_losses): self.start, self.keep_losses = start, keep_losses
    def before_fit(self): self.rows = []
    def after_epoch(self):
        if not self.keep_losses: self.recorder.losses[:] = [float(o) for o in self.recorder.losses]
        gc.collect()
        if self.epoch == self.start: self.then = kinds()
        self.rows.append(dict(rss=int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGESIZE')/2**20, files=len(os.listdir('/proc/self/fd')), processes=len(children()), objects=len(gc.get_objects())))


def slope(rows, start, block):
    "(MB per epoch, its standard error) of a line through the means of blocks"
    rss = np.array([o['rss'] for o in rows[start:]])
    y = rss[:len(rss)//block*block].reshape(-1, block).mean(1)
    x = start + block*(np.arange(len(y)) + .5)
    (a, b), x0 = np.polyfit(x, y, 1), x.mean()
    return float(a), float(np.sqrt(((y-a*x-b)**2).sum()/(len(y)-2)/((x-x0)**2).sum()))


@call_parse
def main(
    epochs:int=300, # of the fit
    start:int=50, # first epoch of the slope
    workers:int=2, # of the training data
    plain:store_true=False, # fastai alone, on the same batches
    keep_losses:store_true=False, # leave fastai's list of losses as it is
    out:str=None, # write the result to this .json file
):
    torch.set_num_threads(1)
    set_seed(0)
    dls = digits_dls(digits(20))
    dls.train.fake_l.num_workers = workers
    learn = Learner(dls, small_convnet(10), metrics=accuracy)
    watch, before = Watch(start, keep_losses), now(learn)
    with tempfile.TemporaryDirectory() as tmp, learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 3e-3, cbs=([] if plain else [LPCallback(), MeanTeacherCallback(), ResumeCallback(Path(tmp)/'run.pth')]) + [watch])
        left = [o.name for o in Path(tmp).iterdir() if o.name != 'run.pth']
    after = now(learn)
    a, se = slope(watch.rows, start, max(1, min(25, (epochs-start)//4)))
    rss = [round(o['rss'], 1) for o in watch.rows]
    print(f"RSS {rss[0]:.0f} MB after epoch 1, {rss[start]:.0f} after {start+1}, {rss[-1]:.0f} after {epochs}; slope from epoch {start} on {1000*a:.1f} ± {1000*se:.1f} KB per epoch")
    print('objects', watch.rows[start]['objects'], watch.rows[-1]['objects'], '; open files', watch.rows[start]['files'], watch.rows[-1]['files'], '; processes', max(o['processes'] for o in watch.rows[start:]))
    print('objects that are more:', (kinds()-watch.then).most_common(6))
    print('left behind:', {k: (before[k], after[k]) for k in before if before[k] != after[k]} or 'nothing', left or '')
    if out: Path(out).write_text(json.dumps(dict(epochs=epochs, start=start, workers=workers, keep_losses=keep_losses, slope_mb=a, se_mb=se, rss=rss, objects=[o['objects'] for o in watch.rows], before=before, after=after)) + '\n')
    sys.exit(bool(before != after or left))
