"""Studies everything beyond the paper, added to plain `lp` and left out of the preset, on the digits and on part of
CIFAR-10.

A row is a set of changes to `LPCallback()` ("alone") or to `LPCallback.strong()` ("without"). Everything else
is equal: labels, initial weights, batches, number of steps; the learning rate is the best of `lp` or of `strong`.
Each run is a line of study_DATASET.jsonl; runs that are in the file are skipped. --tune runs `lp` and `strong` with
several learning rates on seeds 100 to 102, which no row uses, into study_tune.jsonl (the digits have tune_digits.py).
The preset was designed on seeds from 100 on.

digits: 20 labels of 1,347 training items, 450 test items, the recipe of `lp_train digits`. cifar10: 250 labels of
5,000 training images, 2,000 test images; the small network with a first stride of 2, Adam, one cycle per stage: 60
epochs on the labels (300 steps), 6 with pseudo-labels (570 steps), batches of 50 + 50. Parts are left out on the
digits only.

Rows of ideas that are added alone were made with commit 8e89eaf; some are of options that were removed because of these
results. Reproduces the remaining rows:

    python benchmarks/study.py digits
    python benchmarks/study.py cifar10 --data cifar10_jpeg.npz
    python benchmarks/study.py cifar10 --data cifar10_jpeg.npz --tune"""
import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from fastai_lp.experiments.datasets import digits
from fastai_lp.experiments.readers import cifar10
from fastai_lp.experiments.recipes import RECIPES, Recipe
from fastai_lp.experiments.splits import show_labels
from fastai_lp.experiments.train import run_method
from fastai_lp.utils.files import append_json_line, read_json_lines

CIFAR = Recipe('small', l2=False, optimizer='adam', schedule='one_cycle', lr=dict(lp=3e-3, strong=1e-2), wd=.01, bs=100,
    labeled_bs=50, k=None, threads=1, stage1=60, stage2=6, stride=2)
RATES = 1e-3, 3e-3, 1e-2, 3e-2

TRICKS = {  # chkstyle: ignore-node
    # `tricks` of a recipe, see `recipes.lp_callback`; 'recipe': other settings per data set
    'strong augmentation': dict(unlabeled_tfms=True),
    'affine alone': dict(unlabeled_tfms=dict(cutout=0, lighting=0)),
    'cutout alone': dict(unlabeled_tfms=dict(degrees=0, scale=0, shift=0, shear=0, lighting=0)),
    'Sinkhorn': dict(balance='sinkhorn'),
    'Sinkhorn, T = 0.2': dict(balance='sinkhorn', temperature=.2),
    'ω = 1': dict(omega=False),
    'thumbnail beside': dict(features=dict(backbone='thumbnail', weight=1.)),
    'thumbnail as backbone': dict(features=dict(backbone='thumbnail')),
    'fewer labeled per batch': dict(recipe=dict(digits=dict(labeled_bs=16, stage2=22), cifar10=dict(labeled_bs=25, stage2=9))),
    'k = 5': dict(k=5),
    'k = 10': dict(k=10),
    'k = 20': dict(k=20),
    'MixUp': dict(mixup=True)}
LEFT_OUT = {  # chkstyle: ignore-node
    'strong augmentation': dict(unlabeled_tfms=None),
    'MixUp': dict(mixup=None),
    'Sinkhorn': dict(balance=None),
    'temperature': dict(temperature=1.),
    'certainty weights': dict(omega=False),
    'thumbnail': dict(backbone=None),
    'graph': dict(trust=0.)}
DIGITS_ONLY = 'affine alone', 'cutout alone', 'k = 5', 'k = 20'


def rows_of(dataset):
    "name: (method, changes)"
    rows = {'plain': ('lp', {}), 'strong': ('strong', {})}
    rows |= {f'alone: {k}': ('lp', v) for k, v in TRICKS.items() if dataset == 'digits' or k not in DIGITS_ONLY}
    return rows | {f'without: {k}': ('strong', v) for k, v in LEFT_OUT.items() if dataset == 'digits'}


def data_and_recipe(dataset, seed, data):
    if dataset == 'cifar10': return show_labels(cifar10(data, 5000, 2000), 250, seed=seed), CIFAR
    return digits(20, seed), RECIPES['digits']


@cache
def folder(): return tempfile.mkdtemp(prefix='study-')


def run(dataset, row, method, changes, seed, data, lr, out):
    tricks = dict(changes)
    more = tricks.pop('recipe', {}).get(dataset, {})
    images, recipe = data_and_recipe(dataset, seed, data)
    recipe = replace(recipe, **({} if lr is None else dict(lr=lr)), **more, tricks=tricks or None)
    name = '-'.join([dataset, str(seed), str(lr), *more])  # rows with the same first stage share its file
    r = run_method(images, method, recipe, folder(), name, seed, keep=(), device='cpu', bar=False)
    (first, *_), last, history = r['stages'], r['stages'][-1], r['history']
    line = dict(dataset=dataset, row=row, seed=seed, lr=lr, method=method, changes=changes, recipe=r['recipe'])
    line |= dict(error=r['error_rate'], first_error=first[-1]['error_rate'], pseudo_accuracy=history[-1]['accuracy'])
    line |= dict(epoch_sec=median(o['sec'] for o in last), update_sec=median(o['sec'] for o in history), environment=r['environment'])
    append_json_line(out, line)
    return line


def main(dataset, seeds, jobs, rows, out, data, tune):
    file, known = out/('study_tune.jsonl' if tune else f'study_{dataset}.jsonl'), rows_of(dataset)
    rows = rows or (['plain', 'strong'] if tune else list(known))
    if unknown := [o for o in rows if o not in known]:
        raise SystemExit(f"unknown row {unknown[0]!r}: expected any of the following: {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    done = {(o['dataset'], o['row'], o['seed'], o['lr']) for _, o in read_json_lines(file)} if file.exists() else set()
    plan = [(dataset, row, *known[row], seed, data, lr, file) for lr in (RATES if tune else [None]) for seed in seeds
        for row in rows if (dataset, row, seed, lr) not in done]
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        for o in pool.map(run, *zip(*plan)) if plan else ():
            print(f"{o['row']:<34} seed {o['seed']} lr {o['lr']} error {100*o['error']:5.1f} %", flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=['digits', 'cifar10'])
    parser.add_argument('--seeds', help='such as 0-4, the default; with --tune 100-102')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='number of processes')
    parser.add_argument('--rows', nargs='+', help='names of rows; default: all')
    parser.add_argument('--tune', action='store_true', help='several learning rates for plain and strong')
    parser.add_argument('--data', help='folder or .npz file of CIFAR-10; default: download it')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'beyond')
    args = parser.parse_args()
    a, _, b = (args.seeds or ('100-102' if args.tune else '0-4')).partition('-')
    main(args.dataset, range(int(a), int(b or a)+1), args.jobs, args.rows, args.out, args.data, args.tune)
