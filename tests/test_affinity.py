"The options of `graph.affinity`, on both paths that assemble W, against dense references, and on hard cases."
import pytest
import torch
import torch.nn.functional as F

from fastai_lp.transductive import graph
from fastai_lp.transductive.graph import _plus_transpose_by_keys, affinity, knn, normalize

SYMMETRIES = ['sum', 'max', 'mutual']


@pytest.fixture(params=['scipy', 'keys'])
def path(request, monkeypatch):
    "Either path on a CPU; the second is what other devices take"
    if request.param == 'keys': monkeypatch.setattr(graph, '_plus_transpose', _plus_transpose_by_keys)
    return request.param


def reference(sims, idxs, symmetry='sum', local=None, gamma=3.):
    "W by its definition, dense, in float64, one entry at a time"
    n, s = len(sims), sims.double().tolist()
    named = [[(s[i][m], j) for m, j in enumerate(idxs[i].tolist()) if j >= 0 and j != i] for i in range(n)]
    sigma = []
    for row in named:
        d2 = sorted(0 if 2-2*o < 4e-6 else 2-2*o for o, _ in row)
        of = d2[min(local, len(d2))-1] if local and d2 else 0
        sigma.append(max(of, min((o for o in d2 if o > 0), default=0))**.5)
    A = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(named):
        for o, j in row:
            if o <= 0: continue
            if local is None: a = o**gamma
            else:
                d2 = 2-2*o
                a = 1. if d2 < 4e-6 else torch.tensor(-d2/((sigma[i] or sigma[j])*(sigma[j] or sigma[i])), dtype=torch.float64).exp().float().item()
            A[i, j] = A[i, j]+a if symmetry == 'sum' else max(A[i, j], a)
    return dict(sum=A+A.T, max=torch.maximum(A, A.T), mutual=torch.minimum(A, A.T))[symmetry]


def check(W, rtol=0):
    "What every W is: symmetric, of zero diagonal, positive where stored, columns in order, each once"
    n, crow, col, values = len(W), W.crow_indices(), W.col_indices(), W.values()
    row = torch.repeat_interleave(torch.arange(n), crow.diff())
    dense = W.to_dense()
    torch.testing.assert_close(dense, dense.T, rtol=rtol, atol=0)
    assert (dense.diagonal() == 0).all()
    assert (values > 0).all() and torch.isfinite(values).all() and values.dtype == torch.float32
    assert ((row*n + col).diff() > 0).all() and crow[0] == 0 and crow[-1] == len(col) == len(values) and crow.dtype == col.dtype
    S, degree = normalize(W)
    assert torch.isfinite(S.values()).all() and torch.equal(degree == 0, (dense == 0).all(1))
    return dense.double()


def compare(sims, idxs, symmetry, local, gamma=3., rtol=0):
    W = affinity(sims, idxs, gamma, symmetry, local)
    torch.testing.assert_close(check(W, rtol), reference(sims, idxs, symmetry, local, gamma), rtol=2e-4, atol=1e-7)
    return W


def rows(seed, n=80, d=5): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize('local', [None, 1, 3, 7, 50])
@pytest.mark.parametrize('symmetry', SYMMETRIES)
def test_equals_the_definition(path, symmetry, local):
    for seed in range(3): compare(*knn(rows(seed), 8), symmetry, local, gamma=1+seed)


@pytest.mark.parametrize('local', [None, 4])
@pytest.mark.parametrize('symmetry', SYMMETRIES)
def test_missing_neighbours_own_name_negatives_and_any_order(path, symmetry, local):
    sims, idxs = knn(rows(0, d=3), 9)
    g = torch.Generator().manual_seed(0)
    idxs[torch.rand(idxs.shape, generator=g) < .3] = -1
    idxs[5], idxs[6, 1:], idxs[7, 2] = -1, -1, 7
    sims[8], sims[9, 3:] = -.5, 0
    shuffled = torch.rand(idxs.shape, generator=g).argsort(1)
    W = compare(sims, idxs, symmetry, local)
    assert symmetry != 'mutual' or W.to_dense()[5].sum() == 0
    torch.testing.assert_close(affinity(sims.gather(1, shuffled), idxs.gather(1, shuffled), symmetry=symmetry, local=local).to_dense(), W.to_dense())


def test_default_is_the_papers(path):
    sims, idxs = knn(rows(1), 8)
    a, W = torch.zeros(80, 80).scatter_(1, idxs, sims.clamp(min=0)**3), affinity(sims, idxs)
    assert torch.equal(W.to_dense(), a + a.T)
    assert torch.equal(W.values(), affinity(sims, idxs, 3., 'sum', None).values())


def test_one_sided_and_mutual_edges(path):
    sims, idxs = torch.full((3, 1), .5), torch.tensor([[1], [0], [0]])   # 2 names 0, and not the other way round
    for symmetry, both, one in (('sum', .25, .125), ('max', .125, .125), ('mutual', .125, 0)):
        assert check(affinity(sims, idxs, symmetry=symmetry)).tolist() == [[0, both, one], [both, 0, 0], [one, 0, 0]]


@pytest.mark.parametrize('local', [None, 2])
def test_a_neighbour_named_twice_counts_twice_only_in_a_sum(path, local):
    sims = torch.tensor([[.5, .9, .7], [.9, .8, .9], [.7, .7, .6], [.3, .2, .1]])
    idxs = torch.tensor([[1, 1, 2], [0, 2, 0], [0, 0, 1], [2, 2, 2]])
    for symmetry in SYMMETRIES: compare(sims, idxs, symmetry, local, rtol=1e-6 if symmetry == 'sum' else 0)  # sums of more than two depend on their order
    a = .9**3
    assert affinity(sims, idxs).to_dense()[0, 1].item() == pytest.approx(.5**3 + 3*a)
    assert affinity(sims, idxs, symmetry='max').to_dense()[0, 1].item() == affinity(sims, idxs, symmetry='mutual').to_dense()[0, 1].item() == pytest.approx(a)
    assert affinity(sims, idxs, symmetry='mutual').to_dense()[3].sum() == 0


def test_max_does_not_see_how_many_name_an_edge_and_mutual_is_its_part(path):
    sims, idxs = knn(rows(2), 6)
    total, most, mutual = (check(affinity(sims, idxs, symmetry=o)) for o in SYMMETRIES)
    both = mutual > 0
    torch.testing.assert_close(mutual, torch.where(both, most, 0))
    torch.testing.assert_close(total, most + mutual)
    assert 0 < both.sum() < (most > 0).sum()


@pytest.mark.parametrize('symmetry', SYMMETRIES)
def test_no_edge_at_all(path, symmetry):
    for local in (None, 3):
        for idxs in (torch.full((4, 2), -1), torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]])):
            W = affinity(torch.zeros(4, 2), idxs, symmetry=symmetry, local=local)
            assert check(W).sum() == 0 and len(W.values()) == 0
    one_way = torch.tensor([[1], [2], [3], [0]])                        # nobody is named back
    assert len(affinity(torch.ones(4, 1), one_way, symmetry='mutual').values()) == 0


@pytest.mark.parametrize('symmetry', SYMMETRIES)
def test_identical_items_have_affinity_1_and_are_not_cut_off(path, symmetry):
    x = rows(3, n=60)
    x[:10], x[10:15] = x[0], x[10]                                      # ten copies, more than the neighbours of an item; and five, fewer
    sims, idxs = knn(x, 8)
    sims[:15] += torch.linspace(-1e-6, 1e-6, 8)                          # rounding, to both sides of 1
    W = compare(sims, idxs, symmetry, 3)
    dense, copies = W.to_dense(), torch.zeros(60, 60, dtype=torch.bool)
    copies[:10, :10] = copies[10:15, 10:15] = True
    assert set(dense[copies].unique().tolist()) <= {0, 1, 2} and (dense[copies] > 0).any()
    if symmetry != 'mutual': assert (dense[10:15, 15:] > 1e-3).any() and (dense[:10, 15:] > 0).any() == (idxs[10:] < 10).any()


def test_all_items_identical(path):
    W = affinity(torch.full((5, 2), 1+1e-7), torch.tensor([[1, 2], [2, 3], [3, 4], [4, 0], [0, 1]]), symmetry='max', local=2)
    assert set(check(W).unique().tolist()) == {0, 1}


@pytest.mark.parametrize('symmetry', SYMMETRIES)
def test_local_scaling_does_not_see_density(symmetry):
    "A cluster and the same one shrunk: the graph of the plane of each has the same affinities"
    pts = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).double()
    idxs = torch.cdist(pts, pts).fill_diagonal_(torch.inf).topk(8, largest=False).indices
    scaled, plain = [], []
    for size in (.06, .03):
        x = F.normalize(torch.cat([size*pts, torch.ones(60, 1)], 1))
        sims = (x @ x.T).gather(1, idxs)
        scaled.append(affinity(sims, idxs, symmetry=symmetry, local=7).to_dense())
        plain.append(1 - sims.mean())
    torch.testing.assert_close(*scaled, atol=.02, rtol=0)
    assert plain[0] > 3*plain[1]                                        # which s^γ does see


def test_gamma_is_not_used_with_local():
    sims, idxs = knn(rows(4), 8)
    assert torch.equal(affinity(sims, idxs, 1., local=3).values(), affinity(sims, idxs, 9., local=3).values())
    assert not torch.equal(affinity(sims, idxs, local=3).values(), affinity(sims, idxs, local=5).values())


def test_arguments_stay_as_they_were(path):
    sims, idxs = knn(rows(5), 8)
    before = sims.clone(), idxs.clone()
    for symmetry in SYMMETRIES: affinity(sims, idxs, symmetry=symmetry, local=3)
    assert torch.equal(sims, before[0]) and torch.equal(idxs, before[1])


@pytest.mark.parametrize('local', [None, 5])
@pytest.mark.parametrize('symmetry', SYMMETRIES)
def test_items_may_be_renumbered(symmetry, local):
    sims, idxs = knn(rows(6), 8)
    new = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    s, i = torch.empty_like(sims), torch.empty_like(idxs)
    s[new], i[new] = sims, new[idxs]
    torch.testing.assert_close(affinity(s, i, symmetry=symmetry, local=local).to_dense()[new][:, new], affinity(sims, idxs, symmetry=symmetry, local=local).to_dense())


@pytest.mark.parametrize('bad', [dict(gamma=0), dict(symmetry='min'), dict(symmetry=None), dict(local=0), dict(local=-1), dict(local=2.5)])
def test_settings_that_cannot_be_are_named(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f'{name}={value!r}: expected'): affinity(*knn(rows(7), 3), **bad)
