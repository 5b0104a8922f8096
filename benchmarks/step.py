"""Compares the transductive step (graph, diffusion, pseudo-labels) with other implementations: time per stage,
accuracy, agreement with float64, peak memory.

The items are synthetic: each class is a mixture of 3 random unit directions with random positive weights plus
Gaussian noise of length about `noise` (chosen so that label propagation labels about 80 to 95 % correctly),
ℓ2-normalized, in random order, with 10 labels per class (5 from 1,000 classes on). Unlike real features, they have no
low-dimensional structure and no order in memory.

All implementations take turns in one process. A ratio is taken per repeat (other/ours, for `knn` ours/other), and the
median is shown.
  knn        faiss: a plain faiss.IndexFlatIP, add and search of k+1
  assembly   scipy: csr of (s^γ, (i, j)), W = A + Aᵀ, zero diagonal, D^-½ W D^-½ with scipy.sparse.diags, in float32;
             scipy_direct: the same by an expert: rows as they are, no diagonal to clear, scaled in place
  diffusion  authors: scipy.sparse.linalg.cg class by class in float64, as in their program; authors32: in float32;
             torch_csr: our block CG with torch's sparse CSR product
  step       authors: FAISS flat, SciPy assembly, cg class by class, ω with scipy.stats.entropy; LabelSpreading of
             scikit-learn (knn kernel, same k, α, 20 iterations), once from 50,000 items on and not beyond 100,000
  agreement  with 20 iterations in float64 on the same graph

Each (n, c) is a row of the result; --save merges into existing rows. --bounds adds what the machine could do at most
(see `bounds`) to the rows of the same day, and needs an idle machine. --memory measures the peak memory of `propagate`
in a process of its own. Reproduces results/step.json:

    export OMP_NUM_THREADS=2
    for n in 2000 5000; do python benchmarks/step.py --n $n --repeats 5 --save; done
    for n in 10000 20000 50000; do python benchmarks/step.py --n $n --save; done
    python benchmarks/step.py --n 50000 --c 10 100 --parts diffusion --repeats 5 --save
    python benchmarks/step.py --n 50000 --c 1000 --parts diffusion --repeats 1 --save
    python benchmarks/step.py --n 10000 --c 1000 --repeats 1 --save
    python benchmarks/step.py --n 100000 --c 10 --repeats 1 --save
    python benchmarks/step.py --n 200000 --c 10 --parts assembly diffusion agreement --save
    python benchmarks/step.py --n 200000 --c 1000 --parts --memory --drop-Z --intrinsic 16 --save
    python benchmarks/step.py --n 1000000 --c 10 --parts --memory --intrinsic 16 --save
    python benchmarks/step.py --bounds"""
import argparse
import gc
import json
import os
import platform
import re
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
import faiss
from scipy.sparse.linalg import cg
from scipy.stats import entropy
from sklearn.semi_supervised import LabelSpreading

from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.advice import peak_memory
from fastai_lp.transductive.propagate import propagate, seed_matrix

GAMMA, ALPHA, ITERS, TOL = 3, .99, 20, 1e-6
NOISE = {10: 2.6, 100: 2., 1000: 1.5}
WANTED = {  # goals for (part, peer, (n, c) or None for any): minimum ratio, for knn the maximum
    ('knn', 'faiss', None): 1.2, ('assembly', 'scipy', None): 1.8, ('diffusion', 'authors', (50_000, 100)): 12,
    ('diffusion', 'authors', (50_000, 10)): 6, ('diffusion', 'authors', (200_000, 10)): 10,
    ('step', 'authors', (50_000, 100)): 2.2, ('step', 'LabelSpreading', (50_000, 100)): 3}


def items(n, d, c, noise, seed=0, modes=3, chunk=50_000, intrinsic=None):
    "(features [n, d], truth [n], labels [n], −1 if unlabeled); `intrinsic`: dimensions of the items' subspace, None: d"
    g, m = torch.Generator().manual_seed(seed), intrinsic or d
    truth, dirs = torch.randint(c, (n,), generator=g), F.normalize(torch.randn(c, modes, m, generator=g), dim=2)
    frame = None if intrinsic is None else torch.linalg.qr(torch.randn(d, m, generator=g))[0].T
    x = torch.empty(n, d)
    for a in range(0, n, chunk):
        t = truth[a:a+chunk]
        w = F.normalize(torch.rand(len(t), modes, generator=g))
        low = F.normalize(torch.einsum('nm,nmd->nd', w, dirs[t]) + noise*torch.randn(len(t), m, generator=g)/m**.5)
        x[a:a+chunk] = low if frame is None else low @ frame
    y = torch.full((n,), -1)
    for j in range(c): y[(truth == j).nonzero()[:5 if c >= 1000 else 10, 0]] = j
    return x, truth, y


def faiss_flat(x, k):
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return index.search(x, k)


def scipy_assembly(sims, idxs):
    n, k = idxs.shape
    A = sp.csr_matrix((np.maximum(sims, 0).ravel()**GAMMA, (np.arange(n).repeat(k), idxs.ravel())), shape=(n, n))
    W = A + A.T
    W.setdiag(0)
    W.eliminate_zeros()
    degree = np.asarray(W.sum(1)).ravel()
    D = sp.diags(np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0))
    return (D @ W @ D).tocsr()


def scipy_direct(sims, idxs):
    n, k = idxs.shape
    A = sp.csr_matrix((np.maximum(sims, 0).ravel()**GAMMA, idxs.ravel(), np.arange(n+1)*k), shape=(n, n))
    W = A + A.T
    scale = np.asarray(W.sum(1)).ravel()
    np.divide(1, np.sqrt(scale), out=scale, where=scale > 0)
    W.data *= scale.repeat(np.diff(W.indptr))
    W.data *= scale[W.indices]
    return W


def authors_cg(S, Y, dtype=np.float64):
    A = (sp.eye(S.shape[0], dtype=dtype) - dtype(ALPHA)*S).tocsr()
    Y = np.asarray(Y, dtype, order='F')
    return np.stack([cg(A, Y[:, j], rtol=TOL, maxiter=ITERS)[0] for j in range(Y.shape[1])], 1)


def weigh(Z, norm=True):
    "(pseudo-labels, ω) of scores, as in the authors' program; `norm`: ω divided by its maximum"
    Z = np.maximum(Z, 0)
    mass = Z.sum(1, keepdims=True)
    p = np.divide(Z, mass, out=np.zeros_like(Z), where=mass > 0)
    with np.errstate(invalid='ignore'): omega = np.where(mass[:, 0] > 0, 1 - entropy(p.T)/np.log(Z.shape[1]), 0)
    return Z.argmax(1), omega/omega.max() if norm else omega


def authors_step(x, Y, k):
    sims, idxs = faiss_flat(x, k+1)
    return weigh(authors_cg(scipy_assembly(sims, idxs), Y))


def block_cg(mul, Y):
    "`diffuse` with the product S @ x as `mul`"
    Z, r = torch.zeros_like(Y), Y.clone()
    p, rr, norm2 = r.clone(), (r*r).sum(0), (Y*Y).sum(0)
    for _ in range(ITERS):
        if not (active := rr > TOL**2*norm2).any(): break
        Ap = p - ALPHA*mul(p)
        step = torch.where(active, rr/(p*Ap).sum(0), 0)
        Z += step*p
        r -= step*Ap
        rr, old = (r*r).sum(0), rr
        p = r + torch.where(active, rr/old, 0)*p
    return Z


def label_spreading(x, y, k):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # 20 iterations do not reach its tolerance, and zero rows divide by zero
        model = LabelSpreading(kernel='knn', n_neighbors=k, alpha=ALPHA, max_iter=ITERS, n_jobs=-1)
        return model.fit(x, y).transduction_


def race(repeats, once=(), **fns):
    "Run `fns` in turn, backwards every other time, those in `once` once: medians, ratios to the first, last results"
    names, times, res = list(fns), {o: [] for o in fns}, {}
    for i in range(repeats):
        for name in names[::-1] if i % 2 else names:
            if i and name in once: continue
            start = time.perf_counter()
            res[name] = fns[name]()
            times[name].append(time.perf_counter() - start)
    ours = times[names[0]]
    ratio = {o: [t/u for t, u in zip(times[o], ours)] for o in names[1:]}
    return dict(seconds={o: median(t) for o, t in times.items()}, ratio={o: median(r) for o, r in ratio.items()},
        ratios=ratio, repeats={o: len(t) for o, t in times.items()}), res


def bounds(n, d, nnz, c):
    "Lower bounds on this machine: inner products at the rate of a matrix product, scores at the rate of a sum"
    a, x = torch.randn(3072, 3072), torch.randn(n, min(c, 32))
    def best(f): return min(timed(f) for _ in range(9))
    flops, read = 2*3072**3/best(lambda: a @ a), 4*x.numel()/best(x.sum)
    return dict(sgemm_gflops=flops/1e9, read_gb_per_s=read/1e9, knn=2*n*n*d/flops, diffusion=ITERS*nnz*4*c/read)


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def sp_csr(S):
    arrays = (o.numpy() for o in (S.values(), S.col_indices(), S.crow_indices()))
    return sp.csr_matrix(tuple(arrays), shape=S.shape)


def accuracy(labels, truth, y): return (torch.as_tensor(labels)[y < 0] == truth[y < 0]).float().mean().item()


def measure_knn(x, k, repeats):
    res, found = race(repeats, knn=lambda: knn(x, k), faiss=lambda: faiss_flat(x.numpy(), k+1))
    res['ratio'] = dict(faiss=median(1/o for o in res.pop('ratios')['faiss']))  # ours/other
    return res, found['knn']


def measure_assembly(graph, repeats):
    sims, idxs = (o.numpy() for o in graph)
    def ours(): return normalize(affinity(*graph, GAMMA))[0]
    peers = dict(scipy=lambda: scipy_assembly(sims, idxs), scipy_direct=lambda: scipy_direct(sims, idxs))
    res, found = race(repeats+2, ours=ours, **peers)
    for peer in peers:
        diff = abs(sp_csr(found['ours']) - found[peer]).max()
        assert diff < 1e-5, f'the assembly differs from {peer} by {diff}'
    return res


def measure_diffusion(S, Y, repeats):
    T = sp_csr(S)
    peers = dict(authors=lambda: authors_cg(T, Y.numpy()), authors32=lambda: authors_cg(T, Y.numpy(), np.float32),
        torch_csr=lambda: block_cg(lambda p: S @ p, Y))
    res, found = race(repeats, ours=lambda: diffuse(S, Y, ALPHA, ITERS, TOL).Z, **peers)
    def same(z): return (found['ours'].argmax(1) == torch.as_tensor(z).argmax(1)).float().mean().item()
    res['same_argmax'] = {o: same(z) for o, z in found.items()}
    assert res['same_argmax']['authors'] >= .999, res['same_argmax']
    return res


def measure_agreement(x, y, Y, k, kw):
    "With float64 on our own graph, since rounding of the ℓ2 norm can change the k-th neighbor"
    ours = propagate(x, y, Y.shape[1], k=k, gamma=GAMMA, alpha=ALPHA, max_iter=ITERS, tol=TOL, **kw)
    T = sp_csr(normalize(ours.W.double())[0])
    Z = block_cg(lambda p: torch.from_numpy(T @ p.numpy()), Y.double()).numpy()
    labels, omega = weigh(Z)
    unlabeled, reached = (y < 0).numpy(), (Z > 0).any(1)
    both = unlabeled & ours.reached.numpy() & reached
    differs = (ours.reached.numpy() != reached)[unlabeled]
    return dict(argmax=float((ours.labels.numpy() == labels)[both].mean()),
        omega=float(abs(ours.certainty.numpy() - omega)[both].max()), reached=float(both.sum()/unlabeled.sum()),
        reached_differs=int(differs.sum()), omega_raw_max=float(weigh(Z, False)[1].max()))


def measure_step(x, truth, y, Y, k, repeats, kw):
    n, v = len(x), x.numpy()
    peers = dict(authors=lambda: authors_step(v, Y.numpy(), k)[0])
    if n <= 100_000: peers['LabelSpreading'] = lambda: label_spreading(v, y.numpy(), k)
    once = ('LabelSpreading',) if n >= 50_000 else ()
    res, found = race(repeats, once, ours=lambda: propagate(x, y, Y.shape[1], k=k, **kw), **peers)
    res['stages'], found['ours'] = found['ours'].seconds, found['ours'].labels
    return res | dict(accuracy={o: accuracy(p, truth, y) for o, p in found.items()})


def measure(n, d, k, c, noise, parts, repeats, kw):
    x, truth, y = items(n, d, c, noise)
    Y, row, graph = seed_matrix(y, c), dict(n=n, d=d, k=k, c=c, noise=noise), None
    if 'knn' in parts: row['knn'], graph = measure_knn(x, k, repeats)
    if graph is None and {'assembly', 'diffusion'} & set(parts): graph = knn(x, k)
    if 'assembly' in parts: row['assembly'] = measure_assembly(graph, repeats)
    if 'diffusion' in parts:
        S = normalize(affinity(*graph, GAMMA))[0]
        row['nnz'], row['diffusion'] = len(S.values()), measure_diffusion(S, Y, repeats)
    if 'agreement' in parts: row['agreement'] = measure_agreement(x, y, Y, k, kw)
    if 'step' in parts: row['step'] = measure_step(x, truth, y, Y, k, repeats, kw)
    return row


def memory(n, d, k, c, noise, kw, intrinsic=None):
    "Memory of this process in GB: before `propagate`, with the features, and the peak within it"
    def resident(what):
        status = Path('/proc/self/status').read_text()
        return int(re.search(rf'{what}:\s*(\d+)', status).group(1))*1024/1e9
    x, truth, y = items(n, d, c, noise, intrinsic=intrinsic)
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # from here on, Linux counts the peak
    before, start = resident('VmRSS'), time.perf_counter()
    res = propagate(x, y, c, k=k, **kw)
    seconds, peak = time.perf_counter()-start, resident('VmHWM')
    formula = peak_memory(n, d, c, k, **{o: kw[o] for o in ('keep_Z', 'index') if o in kw})/1e9
    return dict(before=before, peak=peak, formula=formula, features=4*n*d/1e9, seconds=seconds, stages=res.seconds,
        accuracy=res.accuracy(truth), graph=res.graph, edges=None if res.W is None else len(res.W.values()),
        intrinsic=intrinsic, settings=kw)


BOUND = 'neighbors {knn:.3f} s ({sgemm_gflops:.0f} GFlop/s), diffusion {diffusion:.3f} s ({read_gb_per_s:.1f} GB/s)'
AGREEMENT = ('argmax {argmax:.6f} (goal ≥ .9999), |Δω| {omega:.1e} (goal ≤ 1e-5), reached {reached:.4f}, '
    'maximum ω before normalization {omega_raw_max:.4f}')
MEMORY = ('peak {peak:.2f} GB, {before:.2f} before with features of {features:.2f}; formula {formula:.2f}; '
    '{seconds:.1f} s, accuracy {accuracy:.4f}, {graph}, {settings}, in {intrinsic} dimensions')


def goal(part, peer, ratio, n, c):
    want = next((w for (p, q, at), w in WANTED.items() if (p, q) == (part, peer) and at in (None, (n, c))), None)
    if want is None: return ''
    return f"  goal {'≤' if part == 'knn' else '≥'} {want}: {'met' if (ratio <= want) == (part == 'knn') else 'NOT MET'}"


def show(row):
    n, c = row['n'], row['c']
    print(f"\nn={n:,} d={row['d']} k={row['k']} c={c} noise={row['noise']}" + (f" nnz={row['nnz']:,}" if 'nnz' in row else ''))
    for part in ('knn', 'assembly', 'diffusion', 'step'):
        if part not in row: continue
        seconds = row[part]['seconds']
        ours = next(iter(seconds))
        print(f"{part:<10} {'ours':<15}{seconds[ours]:9.3f} s")
        for peer, t in list(seconds.items())[1:]:
            ratio = row[part]['ratio'][peer]
            print(f"{'':<10} {peer:<15}{t:9.3f} s {ratio:6.2f}×{goal(part, peer, ratio, n, c)}")
    if 'step' in row:
        print('stages     ' + ', '.join(f'{o} {t:.3f} s' for o, t in row['step']['stages'].items()))
        print('accuracy   ' + ', '.join(f'{o} {100*a:.2f} %' for o, a in row['step']['accuracy'].items()))
    for part, line in (('bound', BOUND), ('agreement', AGREEMENT), ('memory', MEMORY)):
        if part in row: print(f'{part:<10}', line.format(**row[part]))


def machine():
    cpuinfo, cores = Path('/proc/cpuinfo'), getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count()))(0)
    names = re.findall(r'^model name\s*: (.*)', cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    packages = 'fastai_lp', 'torch', 'numpy', 'scipy', 'scikit-learn'
    return dict(cpu=names[0] if names else platform.processor(), cores=len(cores), threads=torch.get_num_threads(),
        faiss_threads=faiss.omp_get_max_threads(), python=platform.python_version(),
        **{o: version(o) for o in packages}, faiss=faiss.__version__)


def add_bounds(out):
    rows = json.loads(out.read_text())['rows']
    for row in rows:
        if 'nnz' not in row or row['date'] != time.strftime('%Y-%m-%d'): continue
        row['bound'] = bounds(row['n'], row['d'], row['nnz'], row['c'])
        show({k: row[k] for k in ('n', 'c', 'd', 'k', 'noise', 'bound')})
    out.write_text(json.dumps(dict(rows=rows), indent=1) + '\n')


def main(args):
    if args.bounds: return add_bounds(args.out)
    kw = dict(keep_Z=False) if args.drop_Z else {}
    if args.index: kw['index'] = args.index
    info = machine()
    print(info)
    for c in args.c:
        noise = args.noise or NOISE.get(c, 2.)
        size, load = (args.n, args.d, args.k, c, noise), os.getloadavg()[0]  # on a busy machine the times mean little
        row = dict(zip(('n', 'd', 'k', 'c', 'noise'), size))
        if args.memory:  # first, since a child starts with the peak of its parent
            with ProcessPoolExecutor(1, get_context('spawn')) as pool:
                row['memory'] = pool.submit(memory, *size, kw, args.intrinsic).result()
        if args.parts: row.update(measure(*size, args.parts, args.repeats, kw))
        show(row)
        if not args.save: continue
        rows = json.loads(args.out.read_text())['rows'] if args.out.exists() else []
        same = [o for o in rows if all(o[i] == row[i] for i in ('n', 'd', 'k', 'c', 'noise'))]
        row = {**(same[0] if same else {}), **row, 'machine': info, 'load_before': load, 'date': time.strftime('%Y-%m-%d')}
        rows = sorted([o for o in rows if o not in same] + [row], key=lambda o: (o['n'], o['c'], o['d'], o['k']))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(dict(rows=rows), indent=1) + '\n')


if __name__ == '__main__':
    parts = 'knn', 'assembly', 'diffusion', 'step', 'agreement'
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=50_000)
    parser.add_argument('--d', type=int, default=128)
    parser.add_argument('--k', type=int, default=50)
    parser.add_argument('--c', type=int, nargs='+', default=[10, 100])
    parser.add_argument('--noise', type=float, help=f'default: {NOISE}, else 2')
    parser.add_argument('--parts', nargs='*', choices=parts, default=parts)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--bounds', action='store_true')
    parser.add_argument('--memory', action='store_true', help='measure the peak memory of propagate in a process of its own')
    parser.add_argument('--intrinsic', type=int, help='for --memory: dimensions of the subspace of the items; default: d')
    parser.add_argument('--index', help='for propagate: a FAISS factory string')
    parser.add_argument('--drop-Z', action='store_true', help='propagate(keep_Z=False)')
    parser.add_argument('--save', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'step.json')
    main(parser.parse_args())
