"""Time and memory of each stage of the transductive step for up to a million items, to check the formulas of
nbs/results/07_scale.ipynb.

The items are those of step.py, with 128 dimensions, 16 of them intrinsic so that an index can find the neighbors; k = 50 and 10
classes. Each size runs in a process of its own with one thread. Times are CPU seconds, which other programs on the machine
change little. Searches:
  exact      FAISS's flat search of 2,000 items among all
  HNSW32     `knn` of all items: construction, search, rescoring; up to 300,000 items, results/step.json has a million
  IVF-PQ     IVF with about √n cells and product quantization to 32 bytes ("np": without polysemous training, which takes a minute):
             `train` and `add` of all items, `search` of 2,000 with 64 cells each; the recall is that of the codes
`bytes` is the size of an index when serialized. Assembly and diffusion use the neighbors of the HNSW search, from half a million
items on those of IVF-PQ with 4 cells, which are worse but take less time to find; their `peak` includes what they are given, as
the terms of `peak_memory` do; assembly64 is the same with 64-bit indices. Reproduces results/scale/scale.jsonl in about 6 minutes:

    OMP_NUM_THREADS=1 python benchmarks/scale.py > benchmarks/results/scale/scale.jsonl"""
import ctypes
import gc
import json
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import faiss
import torch
from fastcore.script import call_parse

from fastai_lp.transductive import graph as graphs
from fastai_lp.transductive.graph import affinity
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.propagate import spread
from step import NOISE, items, machine

D, K, C, QUERIES, INTRINSIC = 128, 50, 10, 2000, 16


def resident(what): return int(re.search(rf'{what}:\s*(\d+)', Path('/proc/self/status').read_text()).group(1))*1024


def used(f, given=0):
    "(CPU seconds, peak bytes with those of its arguments, result) of f()"
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what has been freed
    Path('/proc/self/clear_refs').write_text('5')  # from here on, Linux counts the peak
    before, start = resident('VmRSS'), time.process_time()
    res = f()
    return time.process_time()-start, resident('VmHWM')-before+given, res


def size_of(*tensors): return sum(o.nbytes for o in tensors)


def ivf_pq(x, true):
    "`true`: the neighbors of the first items"
    n = len(x)
    cells = 2**round(torch.log2(torch.tensor(n**.5)).item())
    index = faiss.index_factory(D, f'IVF{cells},PQ32np', faiss.METRIC_INNER_PRODUCT)
    train, _, _ = used(lambda: index.train(x))
    add, _, _ = used(lambda: index.add(x))
    faiss.extract_index_ivf(index).nprobe = 64
    search, _, found = used(lambda: index.search(x[:QUERIES], K+1)[1])
    recall = sum(len({*a} & {*b}) for a, b in zip(found.tolist(), true.tolist()))/true.size
    size = len(faiss.serialize_index(index))
    return dict(cells=cells, train=train, add=add, search=search, recall=recall, bytes=size), index


def hnsw_bytes(x):
    "Of an index with the same links in other places, which is faster to make: an item has as much room for them"
    index = faiss.index_factory(D, 'HNSW32', faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 2
    index.add(x)
    return len(faiss.serialize_index(index))


def measure(n):
    x, truth, y = items(n, D, C, NOISE[C], intrinsic=INTRINSIC)
    row, v = dict(n=n, d=D, k=K, c=C, queries=QUERIES), x.numpy()
    exact, _, (_, true) = used(lambda: faiss.knn(v[:QUERIES], v, K+1, metric=faiss.METRIC_INNER_PRODUCT))
    row['exact'] = dict(search=exact)
    row['IVF-PQ'], index = ivf_pq(v, true)
    if n <= 500_000:
        seconds, peak, graph = used(lambda: knn(x, K, index='HNSW32'), 4*n*D)
        row['HNSW32'] = dict(search=seconds, peak=peak, bytes=hnsw_bytes(v))
    else:
        faiss.extract_index_ivf(index).nprobe = 4
        graph = tuple(torch.from_numpy(o[:, 1:].copy()) for o in index.search(v, K+1))
    seconds, peak, W = used(lambda: affinity(*graph), size_of(*graph))
    edges = size_of(W.values(), W.col_indices(), W.crow_indices())
    row['assembly'] = dict(seconds=seconds, peak=peak, edges=len(W.values()), bytes=edges)
    original, graphs._index_dtype = graphs._index_dtype, lambda edges: torch.int64  # as from 2³¹ edges on
    row['assembly64'] = dict(zip(('seconds', 'peak'), used(lambda: affinity(*graph), size_of(*graph))))
    graphs._index_dtype = original
    del graph
    seconds, peak, p = used(lambda: spread(W, y, C), edges)
    row['diffusion'] = dict(seconds=seconds, peak=peak, iterations=p.n_iter, accuracy=p.accuracy(truth))
    return row | dict(machine=machine(), date=time.strftime('%Y-%m-%d'))


@call_parse
def main(
    sizes:str='30000,100000,300000,1000000', # numbers of items
):
    os.environ['OMP_NUM_THREADS'] = '1'
    for n in map(int, sizes.split(',')):
        with ProcessPoolExecutor(1, get_context('spawn')) as pool: print(json.dumps(pool.submit(measure, n).result()), flush=True)
