"""Measures what the preset costs: seconds per training step and per update of `LPCallback.strong()`, relative to
`LPCallback()`.

One epoch of each in turn, with the same network and data: the digits, and synthetic images of 32×32 pixels in place
of CIFAR-10 (5,000, of which 250 labeled). A ratio is that of one pair of epochs; the median is shown, with minimum
and maximum. Reproduces results/beyond/strong_step.json:

    OMP_NUM_THREADS=1 python benchmarks/strong_step.py --out benchmarks/results/beyond/strong_step.json"""
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastcore.script import call_parse

from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import ImageArrays, digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.experiments.train import environment
from fastai_lp.learner.callback import LPCallback

KINDS = dict(lp=LPCallback, strong=LPCallback.strong)


class Clock(Callback):
    "Seconds per batch of an epoch with loading and transforms, but without the update; waits for a GPU at both ends"
    order = 98
    def before_train(self): self.start = self.now()
    def after_train(self): self.sec = (self.now()-self.start)/self.n_iter
    def now(self):
        if torch.device(self.dls.device).type == 'cuda': torch.cuda.synchronize(self.dls.device)
        return time.perf_counter()


def synthetic(labeled=250, unlabeled=4750, test=500, seed=0):
    "Images of CIFAR-10's size: noise, a little brighter from class to class"
    g, n = np.random.default_rng(seed), labeled+unlabeled
    truth, train = np.arange(n+test) % 10, np.arange(n)
    noise = g.integers(0, 156, (n+test, 3, 32, 32))
    images = torch.from_numpy((noise + 10*truth[:, None, None, None]).astype('uint8'))
    return ImageArrays(images, truth, train, np.arange(n, n+test), shown=np.where(train < labeled, truth[train], -1))


def epoch(dls, model, kind):
    "Seconds per step and per update"
    set_seed(0)
    learn, clock = Learner(dls, model(), opt_func=Adam), Clock()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[KINDS[kind](), clock])
    return clock.sec, learn.lp_record.history[0]['sec']


def compare(dls, model, repeats):
    def pair(i): return {k: epoch(dls, model, k) for k in list(KINDS)[::1 if i % 2 else -1]}
    pairs = [pair(i) for i in range(repeats+1)][1:]  # the first warms up
    def ratios(j): return [p['strong'][j]/p['lp'][j] for p in pairs]
    def spread(v): return [median(v), min(v), max(v)]
    def times(j, unit): return {k: unit*median(p[k][j] for p in pairs) for k in KINDS}
    return dict(step=spread(ratios(0)), update=spread(ratios(1)), ms_per_step=times(0, 1000), sec_per_update=times(1, 1))


@call_parse
def main(
    repeats:int=7, # pairs of epochs
    out:str=None, # .json file of the result
):
    small, large = digits_dls(digits(), 64, 32, device='cpu'), image_dls(synthetic(), 100, 50, device='cpu')
    res = dict(digits=compare(small, lambda: small_convnet(10), repeats),
        cifar10=compare(large, lambda: small_convnet(10, 3, stride=2), repeats))
    for name, o in res.items():
        print('{:<8} step {:.2f} ({:.2f} to {:.2f}) times {:.1f} ms'.format(name, *o['step'], o['ms_per_step']['lp']),
            'update {:.2f} ({:.2f} to {:.2f}) times {:.2f} s'.format(*o['update'], o['sec_per_update']['lp']), sep='; ')
    if out: Path(out).write_text(json.dumps(dict(repeats=repeats, environment=environment(), **res), indent=1)+'\n')
