"Neighbours: blocks, shares, candidates, what is remembered; against a search written out."
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.labelers import GTG, Diffusion
from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.pseudo import propagate
from fastai_lp.transductive.neighbors import EXACT_UP_TO, _exact_faiss, _exact_torch, _found, as_rows, index_for, knn, knn_recall, unit_rows
from fastai_lp.transductive.warm import Neighbors
from fastai_lp.utils.distributed import share_of, shared
from fastai_lp.utils.progress import reporting


def points(n=400, d=12, seed=0): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def brute(x, k): return (x@x.T).fill_diagonal_(-torch.inf).topk(k)


@pytest.mark.parametrize('search', [_exact_faiss, lambda x, k, rows: _exact_torch(x, k, rows, 1), lambda x, k, rows: _exact_torch(x, k, rows, 4*97*31), lambda x, k, rows: _exact_torch(x, k, rows, 2**28)],
    ids=['faiss', 'torch, 1 byte', 'torch, blocks', 'torch'])
@pytest.mark.parametrize('rows', [torch.arange(97), torch.arange(40, 53), torch.tensor([0, 3, 4, 96])], ids=len)
def test_any_rows_by_any_engine(search, rows):
    x = points(97)
    ref, where = brute(x, 9)
    sims, idxs = search(x, 9, rows)
    assert torch.equal(idxs, where[rows])
    torch.testing.assert_close(sims, ref[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize('n', [2, 3, 5, 8191])
def test_neighbours_of_few_items_and_of_odd_blocks(n):
    x = points(n, 4)
    k = min(3, n-1)
    for backend in ('faiss', 'torch'):
        sims, idxs = knn(x, k, backend)
        torch.testing.assert_close(sims, brute(x, k)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize('world', [1, 2, 3, 7])
@pytest.mark.parametrize('index', ['auto', 'HNSW16'])
def test_shares_together_are_all(world, index):
    x, parts, seen = points(101), [], []
    ref = knn(x, 6, index=index)
    for rank in range(world):
        def gather(t):
            seen.append(len(t))
            return t
        with shared(rank, world, gather): parts.append(knn(x, 6, index=index)); share = share_of(101)
        assert len(parts[-1][0]) == share[1]-share[0]
    assert torch.equal(torch.cat([o[1] for o in parts]), ref[1]) and sum(seen) == 2*101 and share_of(5) == (0, 5)


def test_index_by_size(monkeypatch):
    assert index_for(EXACT_UP_TO['cpu']) == 'Flat' and index_for(EXACT_UP_TO['cpu']+1) == 'HNSW32' and index_for(EXACT_UP_TO['cpu']+1, 'cuda') == 'Flat'
    monkeypatch.setitem(EXACT_UP_TO, 'cpu', 300)
    x = points()
    y = torch.where(torch.arange(400) < 8, torch.arange(400) % 4, -1)
    found = propagate(x, y, k=10)
    truth = knn(x, 10, index='Flat')
    assert .9 < found.graph['recall'] <= 1 and found.graph['recall'] == pytest.approx(_found(truth[0], knn(x, 10)[0]))
    assert propagate(x, y, k=10, index='Flat').graph['recall'] == 1
    assert not torch.equal(knn(x, 10, index='HNSW2')[1], truth[1])


@pytest.mark.parametrize('index', ['HNSW16', 'HNSW16,SQ8', 'IVF20,Flat', 'IVF20,PQ4x8', 'PCA6,Flat', 'NSG16', 'SQ8'])
def test_an_approximate_index_gives_true_similarities(index):
    "Whatever it keeps of the vectors: what it names is compared exactly, and in order"
    x = points(700)
    sims, idxs = knn(x, 10, index=index)
    there = idxs >= 0
    torch.testing.assert_close(sims[there], (x[:, None]*x[idxs.clamp(min=0)]).sum(2)[there], atol=1e-6, rtol=0)
    assert (sims[:, :-1] >= sims[:, 1:]).all() and not (idxs == torch.arange(700)[:, None]).any() and there.float().mean() > .5
    real = np.mean([len(set(a) & set(b)) for a, b in zip(idxs.tolist(), brute(x, 10)[1].tolist())])/10
    assert knn_recall(x, sims) == pytest.approx(real, abs=.002) and (real < 1 or index == 'HNSW16')


def test_recall_of_a_planted_search():
    "A tenth of the neighbours lost, everywhere"
    x = points(3000)
    sims, _ = brute(x, 10)
    assert knn_recall(x, sims) == 1
    sims[:, -1] = -1
    assert knn_recall(x, sims) == pytest.approx(.9) and knn_recall(x, sims, sample=50) == pytest.approx(.9)
    twins = torch.ones(500, 3)/3**.5
    assert knn_recall(twins, knn(twins, 5, index='IVF4,Flat')[0]) == 1  # equally near: any of them is right


def test_too_little_found_is_said():
    x = points(2000, 30)
    y = torch.where(torch.arange(2000) < 40, torch.arange(2000) % 4, -1)
    p = propagate(x, y, index='IVF400,PQ2x4')
    assert p.graph['recall'] < .9 and f"found {p.graph['recall']:.0%}" in advice(p)['recall'] and 'recall' not in advice(propagate(x, y))


def test_memory_mapped_and_read_only_features(tmp_path):
    x = points()
    np.save(tmp_path/'x.npy', x.numpy())
    there = np.load(tmp_path/'x.npy', mmap_mode='r')
    assert as_rows(there).data_ptr() == there.ctypes.data and unit_rows(as_rows(there)).data_ptr() == there.ctypes.data  # not copied
    assert torch.equal(knn(there, 7)[1], knn(x, 7)[1])
    for odd in (x.numpy()[::-1][::-1], np.asfortranarray(x.numpy()), x.double().numpy(), x.half()): assert (knn(odd, 7)[1] == knn(x, 7)[1]).float().mean() > .99
    with pytest.raises(ValueError, match='read-only|assignment'): there[0] = 0


def test_unit_rows():
    x = torch.randn(50, 8)
    torch.testing.assert_close(unit_rows(x), F.normalize(x))
    x[3] = 0
    assert torch.equal(unit_rows(x)[3], x[3]) and unit_rows(u := unit_rows(x)) is u


def moving(epochs=8, n=2000, d=24, seed=0, step=.04, leap=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + 2*torch.randn(20, d, generator=g)[torch.arange(n) % 20]
    for i in range(epochs):
        x = x + (1. if i == leap else step)*torch.randn(n, d, generator=g)
        yield F.normalize(x)


def test_old_candidates_where_they_will_do():
    warm, plain, old = Neighbors('auto', min_recall=.95, sample=500), Neighbors(), None
    for i, x in enumerate(moving(leap=5)):
        sims, idxs = warm(x, 10)
        ref, where = brute(x, 10)
        assert torch.equal(plain(x, 10)[1], knn(x, 10)[1])
        if not warm.searched:
            torch.testing.assert_close(sims, (x[:, None]*x[idxs]).sum(2), atol=1e-6, rtol=0)
            assert abs(_found(ref, sims) - warm.recall) < .01 and warm.recall >= .95
        else: assert torch.equal(idxs, knn(x, 10)[1]) and warm.recall == 1
        if i:
            overlap = np.mean([len(set(a) & set(b)) for a, b in zip(where.tolist(), old.tolist())])/10
            assert abs(warm.overlap - overlap) < .03 and plain.overlap == pytest.approx(np.mean([len(set(a) & set(b)) for a, b in zip(where.tolist(), last.tolist())])/10, abs=.03)
        old, last = idxs, where
        if i in (0, 3, 4, 5): assert warm.searched == (i in (0, 5)), i
    assert warm.info().keys() == {'recall', 'overlap', 'searched'}


def test_other_items_are_noticed():
    warm = Neighbors('auto')
    for x in moving(3): warm(x, 10)
    assert not warm.searched
    for x in (points(2000, 24, seed=9), points(1999, 24), points(300, 5)):
        assert torch.equal(warm(x, 10)[1], knn(x, 10)[1]) and warm.searched
    assert torch.equal(warm(x, 40)[1], knn(x, 40)[1]) and warm.searched  # more than were kept
    warm.forget()
    assert warm.pool is None and 'overlap' not in warm.info()


def test_labelers_remember():
    y = torch.where(torch.arange(2000) < 60, torch.arange(2000) % 20, -1)
    for cls in (Diffusion, GTG):
        labeler = cls(k=10, **(dict(refresh='auto', min_recall=.95) if cls is Diffusion else {}))
        res = [labeler(x, torch.zeros(2000, 20), y) for x in moving(4)]
        assert 'overlap' not in res[0].graph and .5 < res[-1].graph['overlap'] < 1
        assert res[-1].graph['searched'] == (cls is GTG)
        state, again = labeler.state_dict(), cls(**{k: v for k, v in vars(labeler).items() if k[0] != '_'})
        again.load_state_dict(state)
        x = next(moving(1, seed=0))
        assert torch.equal(labeler(x, torch.zeros(2000, 20), y).labels, again(x, torch.zeros(2000, 20), y).labels) and again._neighbors.info() == labeler._neighbors.info()
        assert len(pickle.dumps(labeler)) < 1000 and pickle.loads(pickle.dumps(labeler))._neighbors.pool is None
    with pytest.raises(ValueError, match='refresh'): Diffusion(refresh='never')
    with pytest.raises(ValueError, match='min_recall'): Diffusion(min_recall=1.2)


def test_scores_of_the_last_epoch_as_a_start():
    y = torch.where(torch.arange(2000) < 60, torch.arange(2000) % 20, -1)
    cold, warm = Diffusion(k=10, max_iter=5), Diffusion(k=10, max_iter=5, warm_start=True)
    for x in moving(3): a, b = (o(x, torch.zeros(2000, 20), y) for o in (cold, warm))
    assert b.residual < .5*a.residual
    assert torch.equal(Diffusion(k=10, max_iter=5)(x, torch.zeros(2000, 20), y).Z, a.Z)  # and without it nothing is kept
    with pytest.raises(ValueError, match='keep_Z'): Diffusion(warm_start=True, keep_Z=False)


def test_work_is_reported():
    said = []
    with reporting(lambda *a: said.append(a)):
        sims, idxs = knn(points(5000), 5)
        diffuse(normalize(affinity(sims, idxs))[0], torch.eye(5000)[:, :70])
    assert said == [('neighbours', 4096, 5000), ('neighbours', 5000, 5000), ('diffusion', 32, 70), ('diffusion', 64, 70), ('diffusion', 70, 70)]
    knn(points(5000), 5)
    assert len(said) == 5


@pytest.mark.parametrize('index', ['Flat', 'HNSW32'])
def test_ctrl_c_stops_a_search(index):
    code = ("import os, signal, threading, torch; from fastai_lp.transductive.neighbors import knn\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background has it ignored\n"
        "x = torch.randn(60_000, 64)\n"
        "threading.Timer(.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        f"try: knn(x, 20, index='{index}'); print('went on')\n"
        "except KeyboardInterrupt: print('stopped')")
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert res.stdout.strip() == 'stopped', res.stderr


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='the peak of a process from a mark on is read where Linux counts it')
@pytest.mark.parametrize('n, d, c, k, keep_Z', [(30_000, 32, 10, 50, True), (20_000, 32, 400, 10, True), (60_000, 32, 400, 10, False)])
def test_peak_memory_is_as_the_formula_says(n, d, c, k, keep_Z):
    code = f"""
import gc, re, torch
from pathlib import Path
from fastai_lp.transductive.advice import peak_memory
from fastai_lp.transductive.pseudo import propagate
def resident(what): return int(re.search(rf'{{what}}:\\s*(\\d+)', Path('/proc/self/status').read_text()).group(1))*1024
few = torch.nn.functional.normalize(torch.randn({c}*3, {d}))
propagate(few, torch.arange({c}*3) % {c})  # what libraries allocate once
x = torch.nn.functional.normalize(torch.randn({n}, {d}))
y = torch.where(torch.arange({n}) < {c}, torch.arange({n}), -1)
gc.collect()
Path('/proc/self/clear_refs').write_text('5')
before = resident('VmRSS') - 4*{n}*{d}
propagate(x, y, k={k}, keep_Z={keep_Z})
print(resident('VmHWM') - before, peak_memory({n}, {d}, {c}, {k}, keep_Z={keep_Z}))
"""
    used, formula = map(int, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}).stdout.split())
    assert .6*formula < used < 1.2*formula + 4e7, (used, formula)  # the allocator keeps some tens of megabytes
