"""Compares approximate indexes with exact search: time, recall, and the pseudo-label accuracy of the resulting graph.

Exact search runs first in the same process; the ratio is its time over that of an index, including its construction.
FEATURES.npy [n, d] and FILE.npz with y (−1 if unlabeled) and truth are written by record_features.py. Reproduces
results/index.json:

    OMP_NUM_THREADS=2 python benchmarks/index.py results/drift/cifar10-8.npy --labels results/drift/cifar10.npz --save
    OMP_NUM_THREADS=2 python benchmarks/index.py results/drift/cifar10-19.npy --labels results/drift/cifar10.npz --save

With --n instead of files, it uses the synthetic items of step.py."""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastai_lp.transductive.graph import affinity
from fastai_lp.transductive.neighbors import knn, knn_recall
from fastai_lp.transductive.propagate import spread
from step import NOISE, items, machine


def load(args):
    "(features [n, d], truth [n], labels [n])"
    if not args.features: return items(args.n, 128, 10, NOISE[10], intrinsic=args.intrinsic)
    x, known = torch.from_numpy(np.load(args.features)).float(), np.load(args.labels)
    return F.normalize(x), *(torch.from_numpy(known[o]) for o in ('truth', 'y'))


def main(args):
    (x, truth, y), rows = load(args), []
    for index in ('Flat', *args.index):
        start = time.perf_counter()
        sims, idxs = knn(x, args.k, index=index)
        seconds = time.perf_counter() - start
        p = spread(affinity(sims, idxs), y, int(truth.max())+1)
        rows.append(dict(index=index, seconds=seconds, ratio=rows[0]['seconds']/seconds if rows else 1.,
            recall=knn_recall(x, sims), accuracy=p.accuracy(truth), reached=p.reached.float().mean().item()))
        text = '{index:<14} {seconds:7.1f} s {ratio:5.2f}× recall {recall:.4f} accuracy {accuracy:.4f} reached {reached:.4f}'
        print(text.format(**rows[-1]), flush=True)
    if not args.save: return
    what = args.name or (Path(args.features).stem if args.features else f'made up, {args.n}')
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    res = dict(n=len(x), d=x.shape[1], k=args.k, rows=rows, machine=machine(), date=time.strftime('%Y-%m-%d'))
    args.out.write_text(json.dumps({**old, what: res}, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('features', nargs='?', help='.npy file; without it, synthetic items')
    parser.add_argument('--labels', help='.npz file with y and truth')
    parser.add_argument('--name', help='key of the result; default: name of the file, or number of synthetic items')
    parser.add_argument('--n', type=int, default=50_000, help='number of synthetic items')
    parser.add_argument('--k', type=int, default=50, help='neighbors')
    parser.add_argument('--intrinsic', type=int, help='dimensions of their subspace; default: all 128')
    parser.add_argument('--index', nargs='+', default=['HNSW16', 'HNSW32', 'IVF832,Flat'], help='FAISS factory strings')
    parser.add_argument('--save', action='store_true', help='merge the result into --out')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'index.json')
    main(parser.parse_args())
