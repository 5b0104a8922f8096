"""Every trick beyond the paper, alone and left out of the preset, on the digits and on a part of CIFAR-10.

    python benchmarks/study.py digits [--seeds 0-4] [--jobs 2] [--rows plain strong ...] [--out benchmarks/results/beyond]
    python benchmarks/study.py cifar10 --data cifar10_jpeg.npz
    python benchmarks/study.py uneven

A row is a set of changes to plain `lp` ("alone"), or to `LPCallback.strong()` ("without", "with"), all else equal: draw of the labels,
weights to begin with, batches, number of steps; the learning rate is the best of `lp` or of `strong`. Each run is a line of `study_DATASET.jsonl`; lines that are there are not run again.
`--tune` runs `lp` and `strong` over the learning rates on seeds 100 to 102, which no row uses, into `study_tune.jsonl` (the digits' are those of
`tune_digits.py`). The preset was put together on the seeds from 100 on. nbs/27_beyond.ipynb makes the tables and figures.

uneven: the digits without four fifths of the unlabeled 5s to 9s, still two labels of each: the labels say nothing of the classes' shares.
digits: 20 labels of 1,347 training items, 450 test items, the recipe of `lp_train digits`.
cifar10: 250 labels of 5,000 training images, 2,000 test images, 32×32 pixels; the small network with a first stride of 2, Adam, one cycle
per stage: 60 epochs on the labels (300 steps), 6 with the pseudo-labels (570 steps), batches of 50 + 50."""
import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from fastai_lp.experiments.datasets import cifar10, digits, show_labels
from fastai_lp.utils.files import append_json_line, read_json_lines
from fastai_lp.experiments.recipes import RECIPES, Recipe
from fastai_lp.experiments.train import run_method

CIFAR = Recipe('small', l2=False, optimizer='adam', schedule='one_cycle', lr=dict(lp=3e-3, strong=1e-2), wd=.01, bs=100, labeled_bs=50, k=None, threads=1, stage1=60, stage2=6, stride=2)
RATES = 1e-3, 3e-3, 1e-2, 3e-2

# what is tried: arguments of LPCallback (see `recipes.beyond`); 'recipe': of the recipe
TRICKS = {
    'strong augmentation': dict(strong_tfms=True),
    'affine alone': dict(strong_tfms=dict(cutout=0, lighting=0)),
    'cutout alone': dict(strong_tfms=dict(degrees=0, scale=0, shift=0, shear=0, lighting=0)),
    'Sinkhorn': dict(balance='sinkhorn'),
    'Sinkhorn, T = 0.2': dict(balance='sinkhorn', temperature=.2),
    'alignment': dict(balance='align'),
    'soft labels': dict(soft=True),
    'soft labels, T = 0.2': dict(soft=True, temperature=.2),
    'ω = 1': dict(omega=False),
    'ω²': dict(omega_power=2.),
    'thumbnail beside': dict(backbone='thumbnail', beside=1.),
    'thumbnail as backbone': dict(backbone='thumbnail'),
    'two views': dict(unlabeled_views=2),
    'fewer labeled per batch': dict(recipe=dict(digits=dict(labeled_bs=16, stage2=22), cifar10=dict(labeled_bs=25, stage2=9))),
    'mean of 4 views': dict(augment=4),
    'k = 5': dict(k=5), 'k = 10': dict(k=10), 'k = 20': dict(k=20),
    'max': dict(symmetry='max'), 'mutual': dict(symmetry='mutual'), 'local scaling': dict(local=7),
    'Poisson': dict(labeler='poisson'),
    'MixUp': dict(mixup=.4),
    'twice an epoch': dict(steps=21)}
LEFT_OUT = {'strong augmentation': dict(strong_tfms=None), 'MixUp': dict(mixup=None), 'Sinkhorn': dict(balance=None), 'temperature': dict(temperature=1.), 'ω = 1': dict(omega=True), 'thumbnail': dict(beside=0.), 'k = 10': dict(k=None)}
ADDED = 'k = 20', 'local scaling', 'mean of 4 views', 'two views', 'twice an epoch'
DIGITS_ONLY = 'affine alone', 'cutout alone', 'alignment', 'k = 5', 'k = 20'


def rows_of(dataset):
    "name: (method, changes)"
    if dataset == 'uneven': return {'plain': ('lp', {}), 'strong': ('strong', {}), 'without: Sinkhorn': ('strong', dict(balance=None)), 'with: the true shares': ('strong', dict(prior=[5]*5+[1]*5))}
    rows = {'plain': ('lp', {}), 'strong': ('strong', {})}
    rows |= {f'alone: {k}': ('lp', v) for k, v in TRICKS.items() if dataset == 'digits' or k not in DIGITS_ONLY}
    rows |= {f'without: {k}': ('strong', v) for k, v in LEFT_OUT.items()}
    return rows | {f'with: {k}': ('strong', TRICKS[k]) for k in ADDED if dataset == 'digits'}


def thinned(images):
    "One in five of the unlabeled items of the classes 5 to 9"
    truth, kept = images.truth[images.train], np.ones(len(images.train), dtype=bool)
    for c in range(5, 10):
        free = np.flatnonzero((truth == c) & (images.shown < 0))
        kept[free[np.arange(len(free)) % 5 > 0]] = False
    return replace(images, train=images.train[kept], shown=images.shown[kept], ids=None)


@cache
def folder(): return tempfile.mkdtemp(prefix='study-')


def one(dataset, row, method, changes, seed, data, lr, out):
    changes = dict(changes)
    more = changes.pop('recipe', {}).get(dataset, {})
    if dataset != 'cifar10': images, recipe = digits(20, seed), RECIPES['digits']
    else: images, recipe = show_labels(cifar10(data, 5000, 2000), 250, seed=seed), CIFAR
    if changes.get('steps') and dataset == 'cifar10': changes['steps'] = 48
    if dataset == 'uneven': images = thinned(images)
    recipe = replace(recipe, **({} if lr is None else dict(lr=lr)), **more, tricks=changes or None)
    name = '-'.join([dataset, str(seed), str(lr), *more])  # rows with the same first stage find it in the folder of their process
    run = run_method(images, method, recipe, folder(), name, seed, keep=(), device='cpu', bar=False)
    run = dict(dataset=dataset, row=row, seed=seed, lr=lr, error=run['error_rate'], first_error=run['stages'][0][-1]['error_rate'], pseudo_accuracy=run['history'][-1]['accuracy'],
        epoch_sec=sorted(o['sec'] for o in run['stages'][-1])[len(run['stages'][-1])//2], update_sec=sorted(o['sec'] for o in run['history'])[len(run['history'])//2],
        method=method, changes=changes, recipe=run['recipe'], environment=run['environment'])
    append_json_line(out, run)
    return run


def main(dataset, seeds, jobs, rows, out, data, tune):
    file = out/('study_tune.jsonl' if tune else f'study_{dataset}.jsonl')
    out.mkdir(parents=True, exist_ok=True)
    done = {(o['dataset'], o['row'], o['seed'], o['lr']) for _, o in read_json_lines(file)} if file.exists() else set()
    known = rows_of(dataset)
    if unknown := [o for o in rows if o not in known]: raise SystemExit(f"unknown row {unknown[0]!r}: expected any of {', '.join(known)}")
    plan = [(dataset, row, *known[row], seed, data, lr, file) for lr in (RATES if tune else [None]) for seed in seeds for row in rows if (dataset, row, seed, lr) not in done]
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        for run in pool.map(one, *zip(*plan)) if plan else (): print(f"{run['row']:<34} seed {run['seed']} lr {run['lr']} error {100*run['error']:5.1f} %", flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=['digits', 'cifar10', 'uneven'])
    parser.add_argument('--seeds', default=None)
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--rows', nargs='+', default=None)
    parser.add_argument('--tune', action='store_true')
    parser.add_argument('--data', default=None)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'beyond')
    args = parser.parse_args()
    a, _, b = (args.seeds or ('100-102' if args.tune else '0-4')).partition('-')
    main(args.dataset, range(int(a), int(b or a)+1), args.jobs, args.rows or (['plain', 'strong'] if args.tune else list(rows_of(args.dataset))), args.out, args.data, args.tune)
