"""Exact search, which uses bounds in few dimensions if they pay, against FAISS alone, on features of a network in training.

FEATURES.npy [n, d] is written by record_features.py. For more dimensions than it has, the features are multiplied by a
random matrix. Both take turns; a ratio is FAISS's time over that of `knn`. Both find the same neighbors, which is checked
for each pair: similarities agree to 2e-6, and neighbors differ only if their similarities do not. Appends lines to
results/epoch/search.jsonl:

    export OMP_NUM_THREADS=2
    python benchmarks/record_features.py cifar10 --data cifar10_jpeg.npz --splits cifar10_splits.npz --epochs 3
    for i in 0 1 2; do python benchmarks/search.py results/drift/cifar10-$i.npy --dims 128,512; done"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastcore.script import call_parse

from fastai_lp.transductive.neighbors import knn, search
from fastai_lp.utils.files import append_json_line
from step import faiss_flat, machine, race


def spread_over(x, d):
    "The features in d dimensions"
    if d == x.shape[1]: return F.normalize(x)
    return F.normalize(x @ torch.randn(x.shape[1], d, generator=torch.Generator().manual_seed(0)))


def check(found, peer):
    "Assert that two searches agree; returns the share of equal neighbors. The others have equal similarities, but for rounding"
    (sims, idxs), (other, numbers) = found, peer
    assert (sims-other).abs().max() < 2e-6
    assert (idxs.sort(1).values.diff() > 0).all()
    return (idxs == numbers).float().mean().item()


def without_self(sims, idxs):
    rows = torch.arange(len(idxs))[:, None]
    idxs, sims = torch.from_numpy(idxs), torch.from_numpy(sims)
    own = idxs == rows
    own[:, -1] |= ~own.any(1)
    return sims[~own].view(len(idxs), -1), idxs[~own].view(len(idxs), -1)


@call_parse
def main(
    features:Path, # .npy file
    dims:str='128,512', # dimensions
    k:int=50, # neighbors
    repeats:int=5,
    out:Path=Path(__file__).parent/'results/epoch/search.jsonl',
):
    x = torch.from_numpy(np.load(features)).float()
    for d in map(int, dims.split(',')):
        v = spread_over(x, d)
        res, found = race(repeats, knn=lambda: knn(v, k), faiss=lambda: faiss_flat(v.numpy(), k+1))
        same, how = check(found['knn'], without_self(*found['faiss'])), search(v, k)
        row = dict(features=features.stem, n=len(v), d=d, k=k, seconds=res['seconds'], ratio=res['ratio']['faiss'],
            ratios=res['ratios']['faiss'], same=same, dims=how.dims, proven=how.proven, machine=machine(), date=time.strftime('%Y-%m-%d'))
        print(f"{features.stem}, {d} dimensions: {row['ratio']:.2f} times as fast as FAISS ({min(row['ratios']):.2f} to "
            f"{max(row['ratios']):.2f}), {how.proven:.2%} proven in {how.dims} dimensions, {same:.3%} the same neighbors", flush=True)
        append_json_line(out, row)
