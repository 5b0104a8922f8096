"Nearest-neighbor search: engines, blocks, shares of processes, approximate indexes and their recall."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.neighbors import EXACT_UP_TO, engine_for, knn, knn_recall, unit_rows
from fastai_lp.transductive.propagate import propagate
from fastai_lp.transductive.settings import as_rows
from fastai_lp.utils.progress import reporting
from fastai_lp.utils.distributed import share_of, shared


def points(n=400, d=12, seed=0): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def brute(x, k): return (x@x.T).fill_diagonal_(-torch.inf).topk(k)


def overlap(a, b): return np.mean([len(set(u) & set(v)) for u, v in zip(a.tolist(), b.tolist())])/a.shape[1]


def labels(n, c=4): return torch.where(torch.arange(n) < 2*c, torch.arange(n) % c, -1)


SEARCHES = [dict(backend='faiss'), *(dict(backend='torch', chunk_bytes=o) for o in (1, 4*97*31, 2**28))]


@pytest.mark.parametrize('search', SEARCHES, ids=str)
@pytest.mark.parametrize('world', [1, 2, 7])
def test_engines_and_shares(search, world):
    "Each of several processes searches for its share of the items; together they find what one would"
    x, parts, sizes = points(97), [], []
    def gather(t):
        sizes.append(len(t))
        return t
    for rank in range(world):
        with shared(rank, world, gather):
            parts.append(knn(x, 9, **search))
            first, stop = share_of(97)
            assert len(parts[-1][0]) == stop-first
    sims, idxs = (torch.cat(o) for o in zip(*parts))
    ref = brute(x, 9)
    assert torch.equal(idxs, ref.indices)
    torch.testing.assert_close(sims, ref.values, atol=1e-6, rtol=0)
    assert sum(sizes) == 3*97


@pytest.mark.parametrize('n', [2, 3, 5, 8191])
@pytest.mark.parametrize('backend', ['faiss', 'torch'])
def test_few_items_and_partial_blocks(n, backend):
    x, k = points(n, 4), min(3, n-1)
    torch.testing.assert_close(knn(x, k, backend)[0], brute(x, k).values, atol=1e-6, rtol=0)


def test_index_depends_on_size(monkeypatch):
    monkeypatch.setitem(EXACT_UP_TO, 'cpu', 300)
    x = points()
    assert engine_for(x[:300]) == ('faiss', 'Flat')
    assert engine_for(x) == ('faiss', 'HNSW32')
    assert engine_for(x, 'torch') == ('torch', 'Flat')
    recall = propagate(x, labels(400), k=10).graph['recall']
    assert .9 < recall <= 1
    assert recall == pytest.approx(overlap(knn(x, 10)[1], brute(x, 10).indices), abs=1e-6)
    assert propagate(x, labels(400), k=10, index='Flat').graph == dict(recall=1, dims=0, proven=0)


@pytest.mark.parametrize('index', ['HNSW16', 'HNSW16,SQ8', 'IVF20,Flat', 'IVF20,PQ4x4', 'PCA6,Flat', 'NSG16', 'SQ8'])
def test_approximate_index(index):
    "Similarities are exact and sorted, even if the index stores rounded vectors; no item is its own neighbor"
    x = points(700)
    sims, idxs = knn(x, 10, index=index)
    there = idxs >= 0
    assert there.float().mean() > .5
    assert not (idxs == torch.arange(700)[:, None]).any()
    torch.testing.assert_close(sims[there], (x[:, None]*x[idxs.clamp(min=0)]).sum(2)[there], atol=1e-6, rtol=0)
    assert (sims[:, :-1] >= sims[:, 1:]).all()
    assert knn_recall(x, sims) == pytest.approx(overlap(idxs, brute(x, 10).indices), abs=.002)


def test_missing_neighbors():
    "Eleven of a hundred cells do not hold 60 neighbors"
    sims, idxs = knn(points(300, 8), 60, index='IVF100,Flat')
    assert (idxs == -1).any()
    assert not sims[idxs == -1].any()
    W = affinity(sims, idxs).to_dense()
    assert torch.equal(W, W.T)


def test_recall():
    x = points(3000)
    sims, _ = brute(x, 10)
    assert knn_recall(x, sims) == 1
    sims[:, -1] = -1
    assert knn_recall(x, sims) == pytest.approx(.9)
    assert knn_recall(x, sims, sample=50) == pytest.approx(.9)


def test_any_of_equally_near_neighbors_counts_as_found():
    twins = torch.ones(500, 3)/3**.5
    assert knn_recall(twins, knn(twins, 5, index='IVF4,Flat')[0]) == 1


def test_low_recall_is_reported():
    x = points(2000, 30)
    p = propagate(x, labels(2000), index='IVF400,PQ2x4')
    assert p.graph['recall'] < .9
    assert f"found only {p.graph['recall']:.0%}" in advice(p)['recall']
    assert 'recall' not in advice(propagate(x, labels(2000)))


def test_memory_mapped_features_are_not_copied(tmp_path):
    x = points()
    np.save(tmp_path/'x.npy', x.numpy())
    mapped = np.load(tmp_path/'x.npy', mmap_mode='r')
    assert unit_rows(as_rows(mapped)).data_ptr() == mapped.ctypes.data
    assert torch.equal(knn(mapped, 7)[1], knn(x, 7)[1])


def test_other_layouts_and_dtypes():
    x = points()
    for other in (x.numpy()[::-1][::-1], np.asfortranarray(x.numpy()), x.double().numpy(), x.half()):
        assert (knn(other, 7)[1] == knn(x, 7)[1]).float().mean() > .99


def test_progress_is_reported():
    said = []
    with reporting(lambda *a: said.append(a)):
        sims, idxs = knn(points(5000), 5)
        diffuse(normalize(affinity(sims, idxs))[0], torch.eye(5000)[:, :70])
    expected = [('neighbors', 4096, 5000), ('neighbors', 5000, 5000)]
    assert said == expected + [('diffusion', o, 70) for o in (32, 64, 70)]
    knn(points(5000), 5)
    assert len(said) == 5


@pytest.mark.parametrize('index, rank', [('Flat', 64), ('Flat', 4), ('HNSW32', 64)], ids=['all pairs', 'bounds', 'HNSW'])
def test_ctrl_c_stops_a_search(index, rank):
    code = ("import os, signal, threading, torch; from fastai_lp.transductive.neighbors import knn\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in a background process\n"
        f"x = torch.randn(60_000, {rank}) @ torch.randn({rank}, 64)\n"
        "threading.Timer(.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        f"try: knn(x, 20, index='{index}'); print('finished')\n"
        "except KeyboardInterrupt: print('stopped')")
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert res.stdout.strip() == 'stopped', res.stderr


PEAK = """
import gc, re, torch
from pathlib import Path
from fastai_lp.transductive.advice import peak_memory
from fastai_lp.transductive.propagate import propagate
n, d, c, k, keep_Z = {}
def resident(what): return int(re.search(rf'{{what}}:\\s*(\\d+)', Path('/proc/self/status').read_text()).group(1))*1024
propagate(torch.nn.functional.normalize(torch.randn(c*3, d)), torch.arange(c*3) % c)  # what libraries allocate once
x = torch.nn.functional.normalize(torch.randn(n, d))
y = torch.where(torch.arange(n) < c, torch.arange(n), -1)
gc.collect()
Path('/proc/self/clear_refs').write_text('5')
before = resident('VmRSS') - 4*n*d
propagate(x, y, k=k, keep_Z=keep_Z)
print(resident('VmHWM') - before, peak_memory(n, d, c, k, keep_Z=keep_Z))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux to reset the peak memory')
@pytest.mark.parametrize('case', [(30_000, 32, 10, 50, True), (20_000, 32, 400, 10, True), (60_000, 32, 400, 10, False)], ids=str)
def test_peak_memory(case):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    res = subprocess.run([sys.executable, '-c', PEAK.format(case)], capture_output=True, text=True, check=True, env=env)
    used, estimate = map(int, res.stdout.split())
    assert .6*estimate < used < 1.2*estimate + 4e7, (used, estimate)  # the allocator keeps some tens of megabytes
