"Label propagation against independent references: a dense solver, an optimizer on Eq. 8, scikit-learn."
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.semi_supervised import LabelSpreading

import fastai_lp.transductive
from fastai_lp.transductive.diffusion import _cg, diffuse, spmm
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.propagate import propagate, seed_matrix, spread
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.transductive.scoring import certainty, from_scores


def problem(seed, n=200, d=6, c=4, labeled=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + 1.5*torch.randn(c, d, generator=g)[torch.arange(n) % c]
    y = torch.full((n,), -1)
    y[:labeled] = torch.arange(labeled) % c
    return x, y


def dense_graph(x, k, gamma=3.):
    "W by its definition (Eq. 9), one entry at a time in float64"
    v = F.normalize(x.double())
    s = (v @ v.T).fill_diagonal_(-torch.inf)
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
def test_equals_a_dense_solver(alpha, seed):
    x, y = problem(seed)
    p = propagate(x, y, k=8, alpha=alpha, max_iter=2000, tol=1e-7)
    A = torch.eye(len(x)).double() - alpha*dense_S(dense_graph(x, 8))[0]
    Y = seed_matrix(y, 4).double()
    Z = torch.linalg.solve(A, Y)
    assert (p.Z - Z).norm()/Z.norm() <= 1e-5
    recomputed = ((Y - A@p.Z.double()).norm(dim=0)/Y.norm(dim=0)).max()
    assert abs(p.residual - recomputed) <= 1e-6


@pytest.mark.parametrize('m', [1, 5, 20])
def test_residual_after_early_stopping(m):
    x, y = problem(0)
    S, _ = normalize(affinity(*knn(F.normalize(x), 8)))
    Y = seed_matrix(y, 4)
    Z, n_iter, residual = diffuse(S, Y, max_iter=m, tol=0)
    assert n_iter == m
    expected = (Y - (Z - .99*S.to_dense()@Z)).norm(dim=0)/Y.norm(dim=0)
    torch.testing.assert_close(residual, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('alpha', [.5, .9])
def test_minimizes_eq_8(alpha):
    x, y = problem(1, n=30, labeled=4)
    W = dense_graph(x, 5)
    _, d = dense_S(W)
    Y = seed_matrix(y, 4, 'raw').double()
    Z = torch.zeros_like(Y, requires_grad=True)
    opt = torch.optim.LBFGS([Z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn='strong_wolfe')
    def closure():
        opt.zero_grad()
        u = Z/d.sqrt()[:, None]
        loss = alpha/2*(W*((u[:, None]-u[None])**2).sum(2)).sum() + (1-alpha)*((Y-Z)**2).sum()
        loss.backward()
        return loss
    opt.step(closure)
    p = propagate(x, y, k=5, alpha=alpha, seeds='raw', max_iter=1000, tol=1e-7)
    torch.testing.assert_close(Z.detach(), (1-alpha)*p.Z.double(), rtol=1e-4, atol=1e-5)


def test_equals_label_spreading_of_scikit_learn():
    x, y = problem(2)
    W = affinity(*knn(F.normalize(x), 8))
    ls = LabelSpreading(kernel=lambda a, b: W.to_dense().double().numpy(), alpha=.9, max_iter=10_000, tol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ls.fit(x.numpy(), y.numpy())
    p = propagate(x, y, k=8, alpha=.9, seeds='raw', max_iter=1000, tol=1e-7)
    np.testing.assert_allclose(p.Z/p.Z.sum(1, keepdim=True), ls.label_distributions_, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(p.labels, ls.transduction_)


def test_certainty_of_tiny_and_negative_rows():
    Z = torch.tensor([[1e-42, 1e-42], [-1., -2], [1e-38, 0], [0, 0]])
    torch.testing.assert_close(certainty(Z), torch.tensor([0., 0, 1, 0]), atol=1e-3, rtol=0)


def test_normalization_of_certainty():
    Z, y = torch.tensor([[.9, .1], [.7, .3], [.6, .4], [1., 0]]), torch.tensor([0, -1, -1, 1])
    raw, unlabeled, all_items = (from_scores(Z, y, omega_norm=o).certainty for o in (None, 'unlabeled', 'all'))
    torch.testing.assert_close(raw[1:3], certainty(Z)[1:3])
    torch.testing.assert_close(unlabeled[1:3], raw[1:3]/raw[1])
    torch.testing.assert_close(all_items[1:3], raw[1:3])  # the one-hot row has certainty 1 already
    assert all_items[[0, 3]].tolist() == [1, 1]


def test_duplicates_and_zero_vectors():
    x, y = problem(4)
    x[50:100] = x[50]
    x[120:125] = 0
    p = propagate(x, y, k=8)
    assert (p.labels[120:125] == -1).all()
    assert not p.weights[120:125].any()
    assert torch.isfinite(p.weights).all()
    assert p.labels[50:100].unique().numel() == 1


INVALID = [  # chkstyle: ignore-node (one case per line)
    (dict(y=torch.zeros(200)), 'one integer per item'),
    (dict(y=torch.zeros(200, 1).long()), 'shape'),
    (dict(y=torch.arange(200) % 3), 'class 3 has no labeled item'),
    (dict(y=torch.arange(4)), 'got 4 labels for 200 items'),
    (dict(x=torch.full((200, 2), torch.inf)), r'item\(s\) 0, 1, .*200 in total'),
    (dict(x=torch.ones(200, 6, 1)), 'one row per item'),
    (dict(seeds='mean'), 'seeds must be'),
    (dict(k=2.5), 'k must be an integer of at least 1 or None, got 2.5.')]


@pytest.mark.parametrize('change, match', INVALID, ids=[match for _, match in INVALID])
def test_invalid_input(change, match):
    x, y = problem(5)
    with pytest.raises(ValueError, match=match): propagate(**(dict(x=x, y=y, n_classes=4) | change))


def test_too_few_items():
    x, y = problem(5)
    with pytest.warns(UserWarning, match='k=500 is not below'): propagate(x, y, k=500)
    with pytest.raises(ValueError, match='at least 2 items'): propagate(x[:1], y[:1])
    with pytest.raises(TypeError, match="unexpected parameter 'gama'"): propagate(x, y, gama=3)


@pytest.mark.parametrize('settings', [{}, dict(keep_Z=False)], ids=str)
def test_saved_and_restored(tmp_path, settings):
    x, y = problem(6)
    p = propagate(x, y, **settings)
    torch.save(p.state_dict(), tmp_path/'p.pth')
    state = torch.load(tmp_path/'p.pth', weights_only=True)
    for q in (PseudoLabels.load(p.save(tmp_path/'p.npz')), PseudoLabels.from_state_dict(state)):
        for name, value in vars(p).items():
            other = getattr(q, name)
            if name == 'W': assert torch.equal(other.to_dense(), value.to_dense())
            else: assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_transductive_modules_do_not_import_fastai():
    names = sorted(p.stem for p in Path(fastai_lp.transductive.__file__).parent.glob('[a-z]*.py'))
    assert 'propagate' in names
    imports = '; '.join(f'import fastai_lp.transductive.{o}' for o in names)
    code = f"import sys; {imports}; sys.exit('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


CASES = [(1, 'all', 'items', 'raw'), (3, None, 'classes', 'class_size'), (64, 'unlabeled', 'items', 'raw'),
    (65, 'all', 'items', 'class_size'), (150, 'all', 'classes', 'class_size')]


@pytest.mark.parametrize('c, omega_norm, zeta_norm, seeds', CASES)
def test_scores_need_not_be_kept(c, omega_norm, zeta_norm, seeds):
    "keep_Z=False gives the same result; the last two items are a component without labels"
    x, y = problem(0, n=4*c+60, d=20, c=c, labeled=2*c)
    W = torch.block_diag(affinity(*knn(F.normalize(x), 6)).to_dense(), torch.tensor([[0., 1], [1, 0]])).to_sparse_csr()
    y = F.pad(y, (0, 2), value=-1)
    a, b = (spread(W, y, c, seeds=seeds, omega_norm=omega_norm, zeta_norm=zeta_norm, keep_Z=o) for o in (True, False))
    assert b.Z is None
    assert a.n_iter == b.n_iter
    assert a.residual == pytest.approx(b.residual, rel=1e-4)
    assert not a.reached[-2:].any()
    for name in ('labels', 'reached', 'class_weights'): assert torch.equal(getattr(a, name), getattr(b, name))
    torch.testing.assert_close(a.certainty, b.certainty, rtol=0, atol=1e-5)


@pytest.mark.parametrize('max_iter, tol', [(5, 1e-6), (200, 1e-5), (20, 0.), (1, 1e-6)])
def test_iterations_on_a_gpu(max_iter, tol):
    "A GPU is not asked whether all classes have converged; converged ones no longer change, so the result is the same"
    x, y = problem(3)
    S, _ = normalize(affinity(*knn(F.normalize(x), 8)))
    Y = seed_matrix(y, 5)  # the last class has no labels
    Z, r = torch.zeros_like(Y), Y.clone()
    n_iter = _cg(lambda x: torch.sub(x, spmm(S, x), alpha=.99), Z, r, tol**2*(Y*Y).sum(0), max_iter, ask=False)
    expected = diffuse(S, Y, max_iter=max_iter, tol=tol)
    assert n_iter == expected.n_iter
    assert torch.equal(Z, expected.Z)
    assert max_iter < 200 or n_iter < 200


@pytest.mark.parametrize('c', [1, 3, 33, 200])
def test_many_items(c):
    "From 10,000 items on, the vectors of the solver are read as wide rows, the last of them incomplete"
    n, g = 10_007, torch.Generator().manual_seed(0)
    S, _ = normalize(affinity(torch.rand(n, 4, generator=g).double(), torch.randint(n, (n, 4), generator=g)))
    Y = torch.zeros(n, c).double()
    Y[torch.arange(3*c), torch.arange(3*c) % c] = 1
    Z = torch.zeros_like(Y)
    _cg(lambda x: torch.sub(x, spmm(S, x), alpha=.99), Z, Y.clone(), torch.zeros(c), 12, ask=True)
    torch.testing.assert_close(diffuse(S, Y, max_iter=12, tol=0).Z, Z, rtol=1e-9, atol=1e-12)
