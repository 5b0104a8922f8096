"The affinity matrix against its definition, on both code paths."
import pytest
import torch
import torch.nn.functional as F

from fastai_lp.transductive import graph
from fastai_lp.transductive.graph import affinity, normalize, row_indices
from fastai_lp.transductive.neighbors import knn


@pytest.fixture(params=['scipy', 'keys'])
def path(request, monkeypatch):
    "Run both assemblies on a CPU; the second one is used on other devices"
    if request.param == 'keys': monkeypatch.setattr(graph, '_plus_transpose', graph._plus_transpose_by_keys)


def unit_vectors(seed, n=80, d=5): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def reference(sims, idxs, gamma=3.):
    "W = A + Aᵀ by its definition, dense, in float64, one entry at a time"
    A = torch.zeros(len(sims), len(sims), dtype=torch.float64)
    for i, row in enumerate(idxs.tolist()):
        for s, j in zip(sims[i].double(), row):
            if j not in (-1, i) and s > 0: A[i, j] += s**gamma
    return A + A.T


def check(sims, idxs, gamma=3.):
    "Compare to the reference; symmetric, zero diagonal, positive values, columns in order"
    W = affinity(sims, idxs, gamma)
    dense, values = W.to_dense(), W.values()
    torch.testing.assert_close(dense.double(), reference(sims, idxs, gamma), rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(dense, dense.T, rtol=1e-6, atol=0)
    assert not dense.diagonal().any()
    assert (values > 0).all()
    assert values.dtype == torch.float32
    assert W.crow_indices().dtype == W.col_indices().dtype == torch.int32
    assert ((row_indices(W)*len(W) + W.col_indices()).diff() > 0).all()
    S, degree = normalize(W)
    assert torch.isfinite(S.values()).all()
    assert torch.equal(degree == 0, (dense == 0).all(1))
    return W


@pytest.mark.parametrize('gamma', [1., 2., 3.])
def test_neighbors_from_knn(path, gamma): check(*knn(unit_vectors(int(gamma)), 8), gamma)


def test_missing_neighbors_own_index_and_negative_similarities(path):
    sims, idxs = knn(unit_vectors(0, d=3), 9)
    g = torch.Generator().manual_seed(0)
    idxs[torch.rand(idxs.shape, generator=g) < .3] = -1
    idxs[5], idxs[6, 1:], idxs[7, 2] = -1, -1, 7
    sims[8], sims[9, 3:] = -.5, 0
    W = check(sims, idxs)
    order = torch.rand(idxs.shape, generator=g).argsort(1)
    torch.testing.assert_close(check(sims.gather(1, order), idxs.gather(1, order)).to_dense(), W.to_dense())


@pytest.mark.parametrize('n, k', [(2, 1), (7, 3), (300, 12), (40, 60)])
def test_random_neighbors_with_repetitions(path, n, k):
    g = torch.Generator().manual_seed(n+k)
    idxs = torch.randint(-1, n, (n, k), generator=g)
    idxs[n//2] = -1
    check(torch.rand(n, k, generator=g), idxs)


def test_mutual_edges_count_twice(path):
    W = check(torch.tensor([[.9], [.9], [.5]]), torch.tensor([[1], [0], [0]]), gamma=2)
    torch.testing.assert_close(W.to_dense(), torch.tensor([[0, 1.62, .25], [1.62, 0, 0], [.25, 0, 0]]))


def test_no_edges(path): assert len(check(torch.zeros(4, 2), torch.tensor([[1, 2], [2, 3], [3, 0], [-1, -1]])).values()) == 0


def test_arguments_are_not_modified(path):
    sims, idxs = knn(unit_vectors(5), 8)
    before = sims.clone(), idxs.clone()
    affinity(sims, idxs)
    assert torch.equal(sims, before[0])
    assert torch.equal(idxs, before[1])
