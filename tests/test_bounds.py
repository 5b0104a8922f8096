"Search by bounds: exact on whatever data, and only used if it pays."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_info

from fastai_lp.transductive import bounds
from fastai_lp.transductive.bounds import Bounds, coordinates, dims_for, principal_axes, tree_order
from fastai_lp.transductive.neighbors import _exact_faiss, search
from fastai_lp.transductive.propagate import propagate


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def narrow(n, rank=6, d=40, noise=.05): return F.normalize(randn(n, rank) @ randn(rank, d, seed=1) + noise*randn(n, d, seed=2))


DATA = dict(narrow=lambda: narrow(900), noise=lambda: F.normalize(randn(900, 30)), one_dimension=lambda: randn(600, 1),
    equal=lambda: torch.ones(300, 5), duplicates=lambda: narrow(300).repeat(3, 1), grid=lambda: randn(900, 4).round(),
    zero_rows=lambda: torch.cat([torch.zeros(100, 40), narrow(500), torch.zeros(100, 40)]), all_zero=lambda: torch.zeros(200, 3),
    heavy_tails=lambda: randn(900, 20)/randn(900, 20, seed=1), lengths=lambda: randn(900, 20)*torch.logspace(-6, 6, 900)[:, None],
    tight=lambda: F.one_hot(torch.arange(900) % 3, 8) + 1e-5*randn(900, 8),
    opposite=lambda: torch.cat([narrow(400, noise=0), -narrow(400, noise=0)]), few=lambda: narrow(12))


@pytest.mark.parametrize('sizes', [(256, 4096, 32), (50, 130, 7)], ids=['', 'small blocks'])
@pytest.mark.parametrize('dims', [1, 4, 20])
@pytest.mark.parametrize('data', DATA)
def test_equals_brute_force(data, dims, sizes, monkeypatch):
    for name, o in zip(('n_rows', 'n_cols', 'n_group'), sizes): monkeypatch.setattr(Bounds, name, o)
    x, k = DATA[data]().float(), 9
    sims, idxs, proven = Bounds(x, min(dims, x.shape[1])).search(k, torch.arange(len(x)))
    true = (x.double() @ x.double().T).fill_diagonal_(-torch.inf).topk(k).values[proven]
    norms = torch.linalg.vector_norm(x.double(), dim=1)
    close = 1e-6*norms[proven, None]*norms.max() + 1e-30
    assert ((sims[proven]-true).abs() <= close).all()
    found = (x.double()[proven][:, None]*x.double()[idxs[proven]]).sum(2)
    assert ((found-true).abs() <= close).all()
    assert not (idxs == torch.arange(len(x))[:, None])[proven].any()
    assert all(len(set(row)) == k for row in idxs[proven].tolist())
    if data == 'narrow' and dims > 4: assert proven.float().mean() > .9
    if data in ('equal', 'all_zero'): assert not proven.any()


@pytest.mark.parametrize('dims', [1, 5, 40])
def test_bounds_are_bounds(dims):
    "Also in float32, with the slack that makes up for rounding"
    for x in (narrow(300), randn(300, 40)*10, narrow(300, noise=0)):
        b = Bounds(x, dims)
        exact = b.x.astype(np.float64) @ b.x.T.astype(np.float64)
        assert (b.few @ b.few.T + b.slack[:, None] >= exact).all()


def test_order_is_balanced():
    order = tree_order(coordinates(x := narrow(1000), principal_axes(x)[:, :5]), 20)
    assert sorted(order) == list(range(1000))
    v = x.numpy()[order]
    assert (v[:-1]*v[1:]).sum(1).mean() > .5


def test_some_rows():
    x, rows = narrow(500), torch.tensor([3, 77, 78, 400])
    some, all_rows = (Bounds(x, 8).search(5, o) for o in (rows, torch.arange(500)))
    for a, b in zip(some, all_rows): assert torch.equal(a, b[rows])


def test_the_rest_is_compared_with_all():
    "Items in a dense cluster have too many candidates"
    x = torch.cat([narrow(11_000, 4, noise=.01), F.normalize(narrow(1, 4) + 1e-3*randn(400, 40))])
    found, (sims, idxs) = search(x, 10), _exact_faiss(x, 10, torch.arange(len(x)))
    assert found.dims and .8 < found.proven < 1
    torch.testing.assert_close(found.sims, sims, atol=1e-6, rtol=0)
    assert (found.idxs == idxs).float().mean() > .99  # rounding can exchange two neighbors


def test_only_if_it_pays():
    "The choice is the same each time, and draws no random numbers"
    state = torch.get_rng_state()
    assert dims_for(narrow(10_000, 4), 10) == dims_for(narrow(10_000, 4), 10) > 0
    assert torch.equal(state, torch.get_rng_state())
    for x in (F.normalize(randn(10_000, 40)), narrow(9999, 4), torch.zeros(10_000, 3), narrow(12_000, 4, 700)): assert not dims_for(x, 10)


def test_reported():
    x = narrow(10_000, 4)
    y = torch.where(torch.arange(10_000) < 20, (x[:, 0] > 0).long(), -1)
    p, other = propagate(x, y, k=10), propagate(x, y, k=10, backend='torch')
    assert p.graph == dict(recall=1, dims=dims_for(x, 10), proven=1)
    assert other.graph == dict(recall=1, dims=0, proven=0)
    assert (p.labels == other.labels).float().mean() > .999


def test_threads_are_left_as_they_were(monkeypatch):
    def threads(): return [o['num_threads'] for o in threadpool_info()], torch.get_num_threads()
    before = threads()
    x = narrow(500)
    Bounds(x, 8).search(5, torch.arange(500))
    assert threads() == before
    def broken(*args): raise RuntimeError('out of order')
    monkeypatch.setattr(bounds.faiss, 'fvec_inner_products_by_idx', broken)
    with pytest.raises(RuntimeError, match='out of order'): Bounds(x, 8).search(5, torch.arange(500))
    assert threads() == before
