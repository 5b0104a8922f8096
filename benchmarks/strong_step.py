"""What the preset costs: seconds per training step of `LPCallback.strong()` over those of `LPCallback()`, and of their updates.

    OMP_NUM_THREADS=1 python benchmarks/strong_step.py [--repeats 7] [--out benchmarks/results/beyond/strong_step.json]

An epoch of each, turn about, with the same network and data: the digits, and made-up images of 32×32 pixels in place of CIFAR-10's
(5,000, of which 250 labeled). A ratio is of one pair of epochs; the median over the repeats is shown, with the smallest and largest."""
import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import set_seed

from fastai_lp.experiments.batches import image_dls
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import ImageArrays, digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.experiments.train import environment


class Clock(Callback):
    "Seconds per batch of an epoch, their loading and transforms included, a GPU waited for at both ends; the update is before"
    order = 98
    def before_train(self): self.start = self.now()
    def after_train(self): self.sec = (self.now()-self.start)/self.n_iter
    def now(self):
        if self.dls.device.type == 'cuda': torch.cuda.synchronize(self.dls.device)
        return time.perf_counter()


def made_up(labeled=250, unlabeled=4750, test=500, seed=0):
    "Images of CIFAR-10's size, noise a little brighter from class to class"
    g, n = np.random.default_rng(seed), labeled+unlabeled
    truth, train = np.arange(n+test) % 10, np.arange(n)
    images = torch.from_numpy((g.integers(0, 156, (n+test, 3, 32, 32)) + 10*truth[:, None, None, None]).astype('uint8'))
    return ImageArrays(images, truth, train, np.arange(n, n+test), shown=np.where(train < labeled, truth[train], -1))


def epoch(dls, model, cb):
    set_seed(0)
    learn, clock = Learner(dls, model(), opt_func=Adam), Clock()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[cb, clock])
    return clock.sec, learn.lp_record.history[0]['sec']


def main(repeats, out):
    d, images = digits(), made_up()
    work = dict(digits=(digits_dls(d, 64, 32, device='cpu'), lambda: small_convnet(10)), cifar10=(image_dls(images, 100, 50, device='cpu'), lambda: small_convnet(10, 3, stride=2)))
    res = {}
    for name, (dls, model) in work.items():
        pairs = []
        for i in range(repeats+1):
            pair = {}
            for kind in ('lp', 'strong')[::1 if i % 2 else -1]: pair[kind] = epoch(dls, model, LPCallback() if kind == 'lp' else LPCallback.strong())
            if i: pairs.append(pair)  # the first warms up
        steps, updates = ([p['strong'][j]/p['lp'][j] for p in pairs] for j in (0, 1))
        res[name] = dict(step=[median(steps), min(steps), max(steps)], update=[median(updates), min(updates), max(updates)],
            ms_per_step={k: 1000*median(p[k][0] for p in pairs) for k in ('lp', 'strong')}, sec_per_update={k: median(p[k][1] for p in pairs) for k in ('lp', 'strong')})
        print(f"{name:<8} step {res[name]['step'][0]:.2f} ({min(steps):.2f} to {max(steps):.2f}) times lp's {res[name]['ms_per_step']['lp']:.1f} ms; "
            f"update {res[name]['update'][0]:.2f} ({min(updates):.2f} to {max(updates):.2f}) times {res[name]['sec_per_update']['lp']:.2f} s", flush=True)
    if out: out.write_text(json.dumps(dict(repeats=repeats, environment=environment(), **res), indent=1)+'\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--out', type=Path, default=None)
    args = parser.parse_args()
    main(args.repeats, args.out)
