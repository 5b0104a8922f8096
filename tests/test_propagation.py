"The transductive step against independent references: a dense solve, an optimizer on Eq. 8, scikit-learn."
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.semi_supervised import LabelSpreading

from fastai_lp.transductive.diffusion import _cg, diffuse, spmm
from fastai_lp.transductive.graph import _plus_transpose, _plus_transpose_by_keys, affinity, knn, normalize
from fastai_lp.transductive.labelers import Diffusion
from fastai_lp.transductive.neighbors import _drop_self
from fastai_lp.transductive.pseudo import PseudoLabels, _Rows, certainty, class_weights, from_scores, propagate, seed_matrix, spread


def problem(seed, n=200, d=6, c=4, labeled=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + 1.5*torch.randn(c, d, generator=g)[torch.arange(n) % c]
    y = torch.full((n,), -1)
    y[:labeled] = torch.arange(labeled) % c
    return x, y


def dense_graph(x, k, gamma=3.):
    "W by the definition (Eq. 9), one entry at a time in float64"
    v = F.normalize(x.double())
    s = v @ v.T
    s.fill_diagonal_(-torch.inf)
    W = torch.zeros(len(x), len(x), dtype=torch.float64)
    for j in range(len(x)):
        for i in s[j].topk(k).indices: W[i, j] = s[j, i].clamp(min=0)**gamma
    return W + W.T


def dense_S(W):
    d = W.sum(1)
    scale = torch.where(d > 0, d.rsqrt(), 0)
    return scale[:, None]*W*scale, d


@pytest.mark.parametrize('alpha', [0, .5, .9, .99])
@pytest.mark.parametrize('seed', range(3))
def test_propagate_equals_dense_solve(alpha, seed):
    x, y = problem(seed)
    p = propagate(x, y, k=8, alpha=alpha, max_iter=2000, tol=1e-7)
    S, d = dense_S(dense_graph(x, 8))
    A = torch.eye(len(x)).double() - alpha*S
    Y = seed_matrix(y, 4).double()
    Z = torch.linalg.solve(A, Y)
    assert (p.Z - Z).norm()/Z.norm() <= 1e-5
    recomputed = ((Y - A@p.Z.double()).norm(dim=0)/Y.norm(dim=0)).max()
    assert abs(p.residual - recomputed) <= 1e-6
    mass, expected = d.sqrt() @ p.Z.double(), d.sqrt() @ Y/(1-alpha)
    assert ((mass-expected).abs()/expected).max() <= 1e-4


def test_residual_is_the_recomputed_one_when_stopped_early():
    x, y = problem(0)
    S, _ = normalize(affinity(*knn(F.normalize(x), 8)))
    Y = seed_matrix(y, 4)
    for m in (1, 5, 20):
        Z, n_iter, residual = diffuse(S, Y, max_iter=m, tol=0)
        ref = (Y - (Z - .99*S.to_dense()@Z)).norm(dim=0)/Y.norm(dim=0)
        assert n_iter == m
        torch.testing.assert_close(residual, ref, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('alpha', [.5, .9])
def test_minimiser_of_eq_8(alpha):
    x, y = problem(1, n=30, labeled=4)
    W = dense_graph(x, 5)
    _, d = dense_S(W)
    Y = seed_matrix(y, 4, 'raw').double()
    Z = torch.zeros_like(Y, requires_grad=True)
    opt = torch.optim.LBFGS([Z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn='strong_wolfe')
    def J():
        u = Z/d.sqrt()[:, None]
        return alpha/2*(W*((u[:, None]-u[None])**2).sum(2)).sum() + (1-alpha)*((Y-Z)**2).sum()
    def closure():
        opt.zero_grad()
        loss = J()
        loss.backward()
        return loss
    opt.step(closure)
    p = propagate(x, y, k=5, alpha=alpha, seeds='raw', max_iter=1000, tol=1e-7)
    torch.testing.assert_close(Z.detach(), (1-alpha)*p.Z.double(), rtol=1e-4, atol=1e-5)


def test_agrees_with_label_spreading():
    x, y = problem(2)
    W = affinity(*knn(F.normalize(x), 8))
    ls = LabelSpreading(kernel=lambda a, b: W.to_dense().double().numpy(), alpha=.9, max_iter=10_000, tol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ls.fit(x.numpy(), y.numpy())
    p = propagate(x, y, k=8, alpha=.9, seeds='raw', max_iter=1000, tol=1e-7)
    Z = p.Z/p.Z.sum(1, keepdim=True)
    assert np.abs(Z.numpy() - ls.label_distributions_).max() <= 1e-5
    assert (p.labels.numpy() == ls.transduction_).all()


def test_certainty_is_scipys_entropy():
    from scipy.stats import entropy
    Z = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))**4
    ref = 1 - entropy(Z.double().numpy(), axis=1)/np.log(7)
    np.testing.assert_allclose(certainty(Z), ref, atol=1e-5)


def test_certainty_of_tiny_and_negative_rows():
    Z = torch.tensor([[1e-42, 1e-42], [-1., -2], [1e-38, 0], [0, 0]])
    torch.testing.assert_close(certainty(Z), torch.tensor([0., 0, 1, 0]), atol=1e-3, rtol=0)


def test_omega_and_zeta_normalisations():
    Z = torch.tensor([[.9, .1], [.7, .3], [.6, .4], [1., 0]])
    y = torch.tensor([0, -1, -1, 1])
    raw = from_scores(Z, y, omega_norm=None).certainty
    top = from_scores(Z, y, omega_norm='unlabeled').certainty
    torch.testing.assert_close(top[1:3], raw[1:3]/raw[1])
    torch.testing.assert_close(from_scores(Z, y).certainty[1:3], raw[1:3])  # the one-hot row is the maximum already
    assert (from_scores(Z, y).certainty[[0, 3]] == 1).all()
    p = from_scores(Z, y)
    torch.testing.assert_close(p.class_weights, class_weights(p.labels, 2))
    torch.testing.assert_close(p.weights, p.certainty*p.class_weights[p.labels])
    with pytest.raises(ValueError, match='omega_norm'): from_scores(Z, y, omega_norm='max')
    with pytest.raises(ValueError, match='zeta_norm'): from_scores(Z, y, zeta_norm='max')


def test_items_and_classes_may_be_renumbered():
    x, y = problem(3)
    perm = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([2, 0, 3, 1])
    p = propagate(x, y, k=8, max_iter=2000, tol=1e-7)
    q = propagate(x[perm], torch.where(y >= 0, classes[y.clamp(min=0)], -1)[perm], k=8, max_iter=2000, tol=1e-7)
    torch.testing.assert_close(q.Z[:, classes], p.Z[perm], rtol=1e-3, atol=1e-5)
    assert (q.labels == classes[p.labels][perm]).float().mean() > .99


def test_duplicates_zero_vectors_and_half_precision():
    x, y = problem(4)
    x[50:100] = x[50]          # many identical items
    x[120:125] = 0             # no direction: no neighbour
    p = propagate(x, y, k=8)
    assert not p.reached[120:125].any() and (p.labels[120:125] == -1).all() and (p.weights[120:125] == 0).all()
    assert torch.isfinite(p.weights).all() and p.labels[50:100].unique().numel() == 1
    for z in (x.half(), x.double(), x.double().numpy(), x.numpy()[:, ::-1]):
        assert (propagate(z, y, k=8).labels == p.labels).float().mean() > .97


def test_an_index_that_names_the_item_twice_or_not_at_all():
    idxs = torch.tensor([[0, 2, 0, 1], [3, 2, 1, 0], [1, 0, 3, 4]])
    sims, idxs = _drop_self(torch.arange(4., 0, -1).expand(3, 4), idxs, torch.arange(3))
    assert idxs.tolist() == [[2, -1, 1], [3, 2, 0], [1, 0, 3]] and sims.tolist() == [[3, 2, 1], [4, 3, 1], [4, 3, 2]]


@pytest.mark.parametrize('backend', ['faiss', 'torch'])
def test_knn_equals_brute_force(backend):
    x = torch.randn(97, 5, generator=torch.Generator().manual_seed(0))   # rows as given: not normalised
    s = (x@x.T).fill_diagonal_(-torch.inf)
    ref, idx = s.topk(9)
    for chunk in (1, 97*4*10, 2**28):
        sims, idxs = knn(x, 9, backend, chunk_bytes=chunk)
        assert (idxs == idx).all()
        torch.testing.assert_close(sims, ref, atol=1e-5, rtol=1e-5)


def test_any_faiss_index_and_missing_neighbours():
    x = F.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))
    exact = knn(x, 10)[1]
    _, found = knn(x, 10, index='HNSW16')
    recall = np.mean([len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist())])/10
    assert recall > .9
    sims, idxs = knn(x, 60, index='IVF100,Flat')     # eleven cells of a hundred do not hold 60 neighbours
    assert (idxs == -1).any() and (sims[idxs == -1] == 0).all()
    W = affinity(sims, idxs).to_dense()
    assert (W.diagonal() == 0).all() and torch.equal(W, W.T) and torch.isfinite(W).all()
    with pytest.raises(ValueError, match='FAISS'): knn(x, 5, backend='torch', index='HNSW16')


def test_mutual_edges_count_twice():
    sims = torch.tensor([[.9], [.9], [.5]])
    W = affinity(sims, torch.tensor([[1], [0], [0]]), gamma=2).to_dense()
    torch.testing.assert_close(W, torch.tensor([[0, 1.62, .25], [1.62, 0, 0], [.25, 0, 0]]))
    with pytest.raises(ValueError, match='gamma'): affinity(sims, torch.tensor([[1], [0], [0]]), gamma=0)


def test_bad_input_is_named():
    x, y = problem(5)
    with pytest.warns(UserWarning, match='k=500 is not below'): propagate(x, y, k=500)
    x[[7, 9], 0] = torch.inf
    with pytest.raises(ValueError, match=r'item\(s\) 7, 9'): propagate(x, y)
    x, y = problem(5)
    for bad, match in ((y.float(), 'one integer per item'), (y[:, None], 'shape'), (torch.where(y == 2, -1, y), 'class 2 has no labeled item')):
        with pytest.raises(ValueError, match=match): propagate(x, bad, 4)
    with pytest.raises(ValueError, match='at least 2 items'): propagate(x[:1], y[:1])
    with pytest.raises(ValueError, match='seeds'): propagate(x, y, seeds='mean')
    with pytest.raises(ValueError, match='one row per item'): propagate(x[:, :, None], y)


def test_saved_file_is_whole_or_absent(tmp_path, monkeypatch):
    x, y = problem(6)
    p = propagate(x, y)
    f = p.save(tmp_path/'p.npz')
    assert torch.equal(PseudoLabels.load(f).labels, p.labels)
    before = f.read_bytes()
    def broken(*a, **k): raise OSError('disk full')
    monkeypatch.setattr(np, 'savez_compressed', broken)
    with pytest.raises(OSError): p.save(f)
    assert f.read_bytes() == before and [o.name for o in tmp_path.iterdir()] == ['p.npz']


def test_bottom_modules_do_not_import_fastai():
    import subprocess, sys
    code = "import fastai_lp.transductive.labelers, sys; sys.exit('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('n, k, missing', [(2, 1, 0), (7, 3, 0), (300, 12, .3), (300, 12, 1.), (40, 60, .5)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_both_assemblies_are_the_definition(n, k, missing, dtype):
    "Rows in any order, neighbours named twice, rows without neighbours"
    g = torch.Generator().manual_seed(n+k)
    keep, col, a = torch.rand(n, k, generator=g) >= missing, torch.randint(n, (n, k), generator=g), torch.rand(n, k, generator=g).to(dtype)
    keep[n//2] = False
    dense = torch.zeros(n, n, dtype=dtype).index_put((torch.arange(n)[:, None].expand(n, k)[keep], col[keep]), a[keep], accumulate=True)
    both = [merge(a*keep, col) for merge in (_plus_transpose, _plus_transpose_by_keys)]
    for W in both:
        torch.testing.assert_close(W.to_dense(), dense + dense.T, rtol=1e-6, atol=1e-7)
        assert W.crow_indices().dtype == W.col_indices().dtype == torch.int32 and W.values().dtype == dtype
    assert torch.equal(both[0].crow_indices(), both[1].crow_indices()) and torch.equal(both[0].col_indices(), both[1].col_indices())
    S, degree = normalize(both[0])
    torch.testing.assert_close(degree, (dense + dense.T).sum(1), rtol=1e-5, atol=1e-6)
    assert not S.to_dense().isnan().any() and (degree[n//2] > 0 or not S.to_dense()[n//2].any())


@pytest.mark.parametrize('c, omega_norm, zeta_norm, seeds', [(1, 'all', 'items', 'raw'), (3, None, 'classes', 'class_size'), (64, 'unlabeled', 'items', 'raw'), (65, 'all', 'items', 'class_size'), (150, 'all', 'classes', 'class_size')])
def test_scores_block_by_block(c, omega_norm, zeta_norm, seeds):
    "keep_Z=False is the same, item by item; two items that nothing reaches among them"
    x, y = problem(0, n=4*c+60, d=20, c=c, labeled=2*c)
    y = torch.cat([y, torch.tensor([-1, -1])])
    x = torch.cat([x, torch.zeros(2, 20)])
    x[-2:, 0] = torch.tensor([1e3, 1e3])
    W = affinity(*knn(F.normalize(x[:-2]), 6))
    W = torch.block_diag(W.to_dense(), torch.tensor([[0., 1], [1, 0]])).to_sparse_csr()
    a, b = (spread(W, y, c, seeds=seeds, omega_norm=omega_norm, zeta_norm=zeta_norm, keep_Z=o) for o in (True, False))
    assert b.Z is None and a.Z.shape == (len(y), c) and (a.n_iter, a.residual) == (b.n_iter, pytest.approx(a.residual, rel=1e-4))
    assert torch.equal(a.labels, b.labels) and torch.equal(a.reached, b.reached) and torch.equal(a.class_weights, b.class_weights) and not a.reached[-2:].any()
    torch.testing.assert_close(a.certainty, b.certainty, rtol=0, atol=1e-5)


def test_scores_of_any_size_block_by_block():
    "Rows of 1e-37 beside rows of 1; the largest in any block; ties go to the first; negative ones count as 0"
    g = torch.Generator().manual_seed(0)
    Z = torch.rand(500, 20, generator=g)**4 * 10**(-37*torch.rand(500, 1, generator=g)) - 1e-3*(torch.rand(500, 20, generator=g) < .1)
    Z[0], Z[1, 3:] = 0, 0
    Z[2, [4, 11]] = 5
    rows = _Rows(500, 'cpu')
    for first in range(0, 20, 7): rows.add(Z[:, first:first+7], first)
    torch.testing.assert_close(rows.certainty(20), certainty(Z), rtol=0, atol=1e-5)
    some = Z.clamp(min=0).amax(1) > 0
    assert torch.equal(rows.peak > 0, some) and torch.equal(Z.clamp(min=0).gather(1, rows.top[:, None])[:, 0], Z.clamp(min=0).amax(1)) and rows.top[2] == 4


def test_labeler_without_scores():
    x, y = problem(2)
    with_Z, without = (Diffusion(k=8, keep_Z=o)(x, torch.zeros(len(x), 4), y) for o in (True, False))
    assert without.Z is None and torch.equal(with_Z.labels, without.labels)
    torch.testing.assert_close(with_Z.weights, without.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize('max_iter, tol', [(5, 1e-6), (200, 1e-5), (20, 0.), (1, 1e-6)])
def test_not_asked_is_the_same(max_iter, tol):
    "As on a GPU: no iteration waits for an answer, and what has converged stands still"
    x, y = problem(3)
    S, _ = normalize(affinity(*knn(F.normalize(x), 8)))
    Y = seed_matrix(y, 5)  # the last class has no seed
    ref, found = diffuse(S, Y, max_iter=max_iter, tol=tol), []
    for ask in (True, False):
        Z, r = torch.zeros_like(Y), Y.clone()
        found.append((_cg(lambda x: torch.sub(x, spmm(S, x), alpha=.99), Z, r, tol**2*(Y*Y).sum(0), max_iter, ask), Z))
    assert found[0][0] == found[1][0] == ref.n_iter and torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], ref.Z)
    assert not ref.Z.isnan().any() and (max_iter < 200 or ref.n_iter < 200)
