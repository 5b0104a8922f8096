"""Measures what 20 more labels gain, by how they are chosen: at random, by least certainty, or with `suggest`.

A network is trained again with the additional labels; digits, ten draws of the first labels, all paired. Takes about
15 minutes on one core. Reproduces results/label_next_20.json and results/label_next_10.json:

    OMP_NUM_THREADS=1 python benchmarks/label_next.py
    OMP_NUM_THREADS=1 python benchmarks/label_next.py --first 10"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse

from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.experiments.train import environment
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback


def train(d, seed):
    "(Learner, test accuracy, pseudo-label accuracy)"
    set_seed(seed, reproducible=True)
    learn = Learner(digits_dls(d), small_convnet(10), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(20, 5e-3, cbs=LPCallback(warmup=5, truth=d.train_truth))
        return learn, learn.validate()[1], learn.lp_record.history[-1]['accuracy']


def with_labels(d, items):
    shown = d.shown.copy()
    shown[items] = d.truth[d.train][items]
    return replace(d, shown=shown)


def run(first, seed, m=20):
    d = digits(first, seed)
    learn, *before = train(d, seed)
    interp = LPInterpretation.from_learner(learn)
    random = np.random.default_rng(seed).permutation(np.flatnonzero(d.shown < 0))[:m]
    least_certain = interp.to_df().query('~labeled').nsmallest(m, 'certainty').index.to_numpy()
    chosen = dict(random=random, suggest=interp.suggest(m).index.to_numpy(), least_certain=least_certain)
    after = {name: train(with_labels(d, items), seed)[1:] for name, items in chosen.items()}
    return dict(seed=seed, before=before, **after)


def summarize(runs, name):
    "Mean, standard error, mean gain over random, its standard error; of test and pseudo-label accuracy"
    v = 100*np.array([r[name] for r in runs])
    gain = v - 100*np.array([r['random'] for r in runs])
    stats = [f(o) for o in (v, gain) for f in (lambda a: a.mean(0), lambda a: a.std(0, ddof=1)/len(a)**.5)]
    return np.stack(stats, 1).tolist()


@call_parse
def main(
    first:int=20, # labels at the start, the same number of each class
    seeds:int=10, # number of runs
):
    torch.set_num_threads(1)
    runs, rows = [], {}
    for seed in range(seeds):
        runs.append(run(first, seed))
        print(runs[-1], flush=True)
    for name in ('before', 'random', 'least_certain', 'suggest'):
        rows[name] = summarize(runs, name)
        text = '{} {:.1f} ± {:.1f} % (over random {:+.1f} ± {:.1f})'
        words = [text.format(what, *row) for what, row in zip(('test', 'pseudo-labels'), rows[name])]
        print(f'{name:14}', *words)
    file = Path(__file__).parent/'results'/f'label_next_{first}.json'
    file.write_text(json.dumps(dict(first=first, runs=runs, summary=rows, environment=environment()), indent=1) + '\n')
