"Suggested items and doubtful labels against dense linear algebra."
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from fastai_lp.learner.splitting import hide_labels
from fastai_lp.transductive.curation import LEAST, familiarity, label_issues, margin, suggest
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.propagate import propagate, spread

pixels, truth = load_digits(return_X_y=True)


def small(n=40, d=4, k=5, seed=0):
    x = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    return affinity(*knn(x, k))


def covariance(W, labeled, alpha):
    "Green's function of the graph without the labeled items, in float64"
    S = normalize(W)[0].to_dense().double()[~labeled][:, ~labeled]
    return torch.linalg.inv(torch.eye(len(S)).double() - alpha*S)


def uncertainty(W, labeled, certainty, alpha):
    return (1-certainty).clamp(min=LEAST)[~labeled].double() @ covariance(W, labeled, alpha).diagonal()


def greedy(W, labeled, certainty, m, alpha):
    "The definition: choose the uncertain item whose label reduces the weighted sum of variances most, and recompute everything"
    labeled, chosen, gain = labeled.clone(), [], []
    for _ in range(m):
        before = uncertainty(W, labeled, certainty, alpha)
        def drop(j): return max(1-certainty[j], LEAST)*(before - uncertainty(W, labeled | (torch.arange(len(W)) == j), certainty, alpha))
        j = max((~labeled).nonzero().flatten().tolist(), key=drop)
        chosen.append(j)
        gain.append(drop(j))
        labeled[j] = True
    return chosen, torch.stack(gain)


@pytest.mark.parametrize('alpha', [.5, .99])
@pytest.mark.parametrize('seed', [0, 1])
def test_suggest_is_greedy_v_optimality(alpha, seed):
    W, labeled = small(seed=seed), torch.arange(40) < 4
    omega = torch.where(labeled, 1, torch.rand(40, generator=torch.Generator().manual_seed(seed)))
    found = suggest(W, labeled, omega, 5, alpha, max_iter=500, tol=1e-7)
    items, gain = greedy(W, labeled, omega, 5, alpha)
    assert found.items.tolist() == items
    torch.testing.assert_close(found.gain.double(), gain, rtol=1e-3, atol=1e-4)


def test_suggestions_are_unlabeled_distinct_and_not_isolated():
    x = torch.cat([F.normalize(torch.rand(60, 5)), torch.zeros(3, 5)])  # the last three have no neighbors
    W, labeled = affinity(*knn(x, 6)), torch.arange(63) < 5
    items = suggest(W, labeled, torch.zeros(63), 20).items
    assert len(set(items.tolist())) == 20
    assert not labeled[items].any()
    assert items.max() < 60
    assert set(suggest(W, labeled, torch.zeros(63), 58).items.tolist()) == set(range(5, 63))


def test_margin_is_the_difference_of_the_largest_shares():
    Z = torch.tensor([[3., 1, 0], [1, 1, -9], [0, 0, 0], [0, 5, 0]])
    assert torch.equal(margin(Z), torch.tensor([.5, 0, 0, 1]))
    assert torch.equal(margin(Z[:, :1]), torch.zeros(4))


def test_suggestions_if_everything_seems_certain():
    "As by the least uncertainty of all, and not the first items in order"
    W, labeled = small(), torch.arange(40) < 4
    items = suggest(W, labeled, torch.ones(40), 6).items
    assert torch.equal(items, suggest(W, labeled, torch.zeros(40), 6).items)
    assert not torch.equal(items, torch.arange(4, 10))


def test_candidates_are_drawn_by_the_seed():
    p = propagate(pixels, hide_labels(truth, n=2)[0])
    def pool(seed): return suggest(p.W, p.labeled, p.certainty, 10, pool=200, seed=seed)
    assert torch.equal(pool(0).items, pool(0).items)
    assert not torch.equal(pool(0).items, pool(1).items)
    best = suggest(p.W, p.labeled, p.certainty, 10, pool=len(truth)).gain.sum()
    assert .7*best < pool(0).gain.sum() <= 1.001*best


@pytest.mark.parametrize('m, pool, match', [(37, 100, r'1 to 36 \(36 unlabeled'), (0, 100, 'got 0'), (9, 8, 'pool=8')])
def test_invalid_number_of_suggestions(m, pool, match):
    with pytest.raises(ValueError, match=match): suggest(small(), torch.arange(40) < 4, torch.zeros(40), m, pool=pool)


def test_lengths_must_match():
    with pytest.raises(ValueError, match='got 40, 39 and 40'): suggest(small(), torch.arange(39) < 4, torch.zeros(40), 2)


@pytest.mark.parametrize('seeds', ['class_size', 'raw'])
def test_doubt_is_diffusion_with_the_label_hidden(seeds):
    W, y = small(60, seed=3), torch.where(torch.arange(60) < 24, torch.arange(60)*7 % 3, -1)
    doubt, other = {}, {}
    for i in range(24):
        hidden = torch.where(torch.arange(60) == i, -1, y)
        z = spread(W, hidden, 3, seeds=seeds, max_iter=500, tol=1e-8).Z[i].clamp(min=0)
        z = z/z.sum()
        rest = z.clone()
        rest[y[i]] = -1
        doubt[i], other[i] = (rest.max()-z[y[i]]).item(), rest.argmax().item()
    found = label_issues(W, y, seeds=seeds, max_iter=500, tol=1e-7)
    items = found.items.tolist()
    assert len(items) > 3
    assert items == sorted((i for i in doubt if doubt[i] > 0), key=lambda i: -doubt[i])
    assert found.suggested.tolist() == [other[i] for i in items]
    torch.testing.assert_close(found.doubt, torch.tensor([doubt[i] for i in items]), rtol=0, atol=1e-3)


def test_labels_that_cannot_be_judged_are_not_reported():
    W = affinity(torch.ones(40, 1), (torch.arange(40)//20*20 + (torch.arange(40)+1) % 20)[:, None])  # two rings
    y = torch.full((40,), -1)
    y[0] = y[5] = 0
    y[2] = 1   # the only one of its class, among zeros
    y[30] = 0  # the only one in its ring
    assert not {2, 30} & set(label_issues(W, y).items.tolist())
    y[12] = 1  # now class 1 has another label, but item 2 is closer to the zeros
    assert 2 in label_issues(W, y).items.tolist()


# Wrong calls

@pytest.mark.parametrize('kwargs, match', [(dict(m=2.5), 'got 2.5'), (dict(m='5'), "got '5'"), (dict(m=None), 'got None'),
    (dict(m=-1), 'got -1'), (dict(m=True), 'got True'), (dict(pool=0), 'pool must be'), (dict(pool=2.5), 'pool must be'),
    (dict(seed=-1), 'seed must be'), (dict(alpha=1), 'alpha must be'), (dict(W=None), 'W must be a graph .* got NoneType'),
    (dict(W=torch.eye(40)), 'W must be a graph'), (dict(labeled=torch.zeros(40)), 'one boolean per item'),
    (dict(labeled=torch.ones(40) > 0), 'nothing is left to label: all 40'),
    (dict(certainty=torch.full((40,), torch.nan)), 'got NaN')])
def test_suggestions_from_wrong_values(kwargs, match):
    with pytest.raises(ValueError, match=match):
        suggest(**dict(W=small(), labeled=torch.arange(40) < 4, certainty=torch.zeros(40), m=2) | kwargs)


@pytest.mark.parametrize('kwargs, match', [(dict(seeds='squared'), 'seeds must be'), (dict(alpha=2), 'alpha must be'),
    (dict(W=None), 'W must be a graph'), (dict(y=torch.full((40,), -1)), 'no item is labeled')])
def test_issues_from_wrong_values(kwargs, match):
    with pytest.raises(ValueError, match=match): label_issues(**dict(W=small(), y=torch.arange(40) % 4 - 1) | kwargs)


def test_labeled_and_certainty_may_be_arrays():
    W, labeled, omega = small(), torch.arange(40) < 4, torch.rand(40, generator=torch.Generator().manual_seed(0))
    found = suggest(W, labeled, omega, 5)
    for other in (suggest(W, labeled.numpy(), omega.numpy(), 5), suggest(W, labeled.tolist(), omega.tolist(), 5)):
        assert torch.equal(found.items, other.items)


# Items of no class

@pytest.mark.parametrize('alpha', [.5, .99])
def test_familiarity_counts_visits(alpha):
    "The walk, step by step: visits to labeled items, weighted by one over the square root of their degree"
    W, labeled = small(), torch.arange(40) < 6
    A = W.to_dense().double()
    degree = A.sum(1)
    P, visits, at = A/degree[:, None], torch.zeros(40).double(), torch.eye(40).double()
    for _ in range(3000):
        visits += at[:, labeled] @ degree[labeled].rsqrt()
        at = alpha*at @ P
    found = familiarity(W, labeled, alpha, max_iter=500, tol=1e-7).double()
    torch.testing.assert_close(found, visits/visits[~labeled].mean(), rtol=1e-3, atol=1e-4)


def test_familiarity_of_unreachable_items():
    x = torch.cat([F.normalize(torch.rand(60, 5)), torch.zeros(3, 5)])  # the last three have no neighbors
    W = affinity(*knn(x, 6))
    f = familiarity(W, torch.arange(63) < 5)
    assert (f[60:] == 0).all()
    assert (f[5:60] > 0).all()
    assert (familiarity(W, torch.arange(63) >= 60)[:60] == 0).all()  # only labels that reach nobody


def test_familiarity_of_bad_arguments():
    W = small()
    with pytest.raises(ValueError, match='one boolean per item, got torch.int64'): familiarity(W, torch.zeros(40).long())
    with pytest.raises(ValueError, match='one boolean per item'): familiarity(W, torch.ones(39, dtype=torch.bool))
    with pytest.raises(ValueError, match='sparse CSR'): familiarity(None, torch.ones(40, dtype=torch.bool))
