"""What 20 more labels bring when a network is trained again with them, by how they are chosen: at random, where the pseudo-labels are
least certain, or as `suggest` asks. Digits, ten draws of the first labels, all paired; about 15 minutes on one core.

    python benchmarks/label_next.py [--first 20] [--seeds 10]
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastai.callback.schedule import *
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.experiments.train import environment
from fastai_lp.interpret import LPInterpretation
from fastai_lp.experiments.models import small_convnet


def train(d, seed):
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(d), small_convnet(10), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(20, 5e-3, cbs=LPCallback(warmup=5, truth=d.train_truth))
        return learn, learn.validate()[1], learn.lp_record.history[-1]['accuracy']


def more(d, items):
    shown = d.shown.copy()
    shown[items] = d.truth[d.train][items]
    return replace(d, shown=shown)


def one(first, seed, m=20):
    d = digits(first, seed)
    learn, *before = train(d, seed)
    interp = LPInterpretation.from_learner(learn)
    free = np.flatnonzero(d.shown < 0)
    chosen = dict(random=np.random.default_rng(seed).permutation(free)[:m], suggest=interp.suggest(m).index.to_numpy(),
        least_certain=interp.to_df().query('~labeled').nsmallest(m, 'certainty').index.to_numpy())
    return dict(seed=seed, before=before, **{name: train(more(d, items), seed)[1:] for name, items in chosen.items()})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--first', type=int, default=20, help='labels to begin with, the same number of each class')
    parser.add_argument('--seeds', type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(args.seeds):
        runs.append(one(args.first, seed))
        print(runs[-1], flush=True)
    rows = {}
    for name in ('before', 'random', 'least_certain', 'suggest'):
        v = 100*np.array([r[name] for r in runs])
        gain = v - 100*np.array([r['random'] for r in runs])
        rows[name] = [[float(o) for o in (v[:, j].mean(), v[:, j].std(ddof=1)/len(v)**.5, gain[:, j].mean(), gain[:, j].std(ddof=1)/len(v)**.5)] for j in (0, 1)]
        print(f'{name:14} ' + '   '.join(f'{what} {m:.1f} ± {s:.1f} % (over random {g:+.1f} ± {e:.1f})' for what, (m, s, g, e) in zip(('test', 'pseudo-labels'), rows[name])))
    fname = Path(__file__).parent/'results'/f'label_next_{args.first}.json'
    fname.write_text(json.dumps(dict(first=args.first, runs=runs, summary=rows, environment=environment()), indent=1) + '\n')
