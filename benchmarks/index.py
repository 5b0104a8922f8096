"""Approximate indexes against exact search: time, recall, and what the graph's misses cost in pseudo-label accuracy.

    OMP_NUM_THREADS=2 python benchmarks/index.py FEATURES.npy --labels FILE.npz [--index HNSW16 HNSW32 IVF832,Flat] [--save]
    OMP_NUM_THREADS=2 python benchmarks/index.py --n 200000 [--intrinsic 12]        # made-up items, see step.py

FEATURES.npy, [n, d], and FILE.npz, with y (−1 where unlabeled) and truth, are what benchmarks/drift.py records. Every index is set as
`knn(index=...)` sets it, exact search runs first in the same process; ratio is its time over the index's, building included."""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastai_lp.transductive.graph import affinity
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.propagate import spread
from fastai_lp.transductive.neighbors import knn_recall
from step import NOISE, items, machine


def main(args):
    if args.features:
        x, known = F.normalize(torch.from_numpy(np.load(args.features)).float()), np.load(args.labels)
        y, truth = torch.from_numpy(known['y']), torch.from_numpy(known['truth'])
    else: x, truth, y = items(args.n, 128, 10, NOISE[10], intrinsic=args.intrinsic)
    c, rows = int(truth.max())+1, []
    for index in ('Flat', *args.index):
        start = time.perf_counter()
        sims, idxs = knn(x, args.k, index=index)
        seconds = time.perf_counter() - start
        p = spread(affinity(sims, idxs), y, c)
        rows.append(dict(index=index, seconds=seconds, ratio=rows[0]['seconds']/seconds if rows else 1., recall=knn_recall(x, sims), accuracy=p.accuracy(truth), reached=p.reached.float().mean().item()))
        print('{index:<14} {seconds:7.1f} s  {ratio:5.2f}×  recall {recall:.4f}  accuracy {accuracy:.4f}  reached {reached:.4f}'.format(**rows[-1]), flush=True)
    if not args.save: return
    what = args.name or (Path(args.features).stem if args.features else f'made up, {args.n}')
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps({**old, what: dict(n=len(x), d=x.shape[1], k=args.k, rows=rows, machine=machine(), date=time.strftime('%Y-%m-%d'))}, indent=1) + '\n')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('features', nargs='?')
    parser.add_argument('--labels')
    parser.add_argument('--name')
    parser.add_argument('--n', type=int, default=50_000)
    parser.add_argument('--k', type=int, default=50)
    parser.add_argument('--intrinsic', type=int)
    parser.add_argument('--index', nargs='+', default=['HNSW16', 'HNSW32', 'IVF832,Flat'])
    parser.add_argument('--save', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'index.json')
    main(parser.parse_args())
