"What to label next, which labels to doubt: against dense algebra, and on the digits."
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from fastai_lp.transductive.curation import label_issues, suggest
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.transductive.graph import affinity, knn, normalize
from fastai_lp.transductive.pseudo import propagate, spread

pixels, truth = load_digits(return_X_y=True)


def small(n=40, d=4, k=5, seed=0):
    x = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))
    return affinity(*knn(x, k))


def covariance(W, labeled, alpha):
    "The Green's function of the graph without the labeled items, double precision"
    S = normalize(W)[0].to_dense().double()[~labeled][:, ~labeled]
    return torch.linalg.inv(torch.eye(len(S)).double() - alpha*S)


def greedy(W, labeled, certainty, m, alpha):
    "The definition: after each choice everything anew, the item taken whose label lowers the weighted sum of variances most"
    labeled, chosen, gain = labeled.clone(), [], []
    for _ in range(m):
        free, G = (~labeled).nonzero().flatten(), covariance(W, labeled, alpha)
        before = (1-certainty)[free].double() @ G.diagonal()
        drop = []
        for j in free.tolist():
            one_more = labeled.clone()
            one_more[j] = True
            drop.append(before - (1-certainty)[~one_more].double() @ covariance(W, one_more, alpha).diagonal())
        best = int(torch.stack(drop).argmax())
        chosen.append(free[best].item())
        gain.append(drop[best].item())
        labeled[free[best]] = True
    return chosen, gain


@pytest.mark.parametrize('alpha', [.5, .99])
@pytest.mark.parametrize('seed', [0, 1])
def test_suggest_is_greedy_v_optimality(alpha, seed):
    W, labeled = small(seed=seed), torch.arange(40) < 4
    omega = torch.where(labeled, 1, torch.rand(40, generator=torch.Generator().manual_seed(seed)))
    found = suggest(W, labeled, omega, 5, alpha, max_iter=500, tol=1e-7)
    items, gain = greedy(W, labeled, omega, 5, alpha)
    assert found.items.tolist() == items
    torch.testing.assert_close(found.gain.double(), torch.tensor(gain).double(), rtol=1e-3, atol=1e-4)


def test_suggestions_are_unlabeled_distinct_and_never_outliers():
    x = torch.cat([F.normalize(torch.rand(60, 5)), torch.zeros(3, 5)])  # the last three have no neighbour
    W, labeled = affinity(*knn(x, 6)), torch.arange(63) < 5
    items = suggest(W, labeled, torch.zeros(63), 20).items
    assert len(set(items.tolist())) == 20 and not labeled[items].any() and items.max() < 60
    assert set(suggest(W, labeled, torch.zeros(63), 58).items.tolist()) == set(range(5, 63))


def test_each_cluster_without_labels_is_asked_about_first():
    x = F.normalize(torch.eye(6).repeat_interleave(20, 0) + .01*torch.randn(120, 6, generator=torch.Generator().manual_seed(0)))
    y = torch.full((120,), -1)
    y[0], y[20] = 0, 1                       # four clusters have no label
    p = propagate(x, y, k=5)
    assert sorted((suggest(p.W, p.labeled, p.certainty, 4).items//20).tolist()) == [2, 3, 4, 5]


def test_pool_draws_candidates_from_all_unlabeled_items():
    p = propagate(pixels, hide_labels(truth, n=2)[0])
    one, other = (suggest(p.W, p.labeled, p.certainty, 10, pool=200, seed=s).items for s in (0, 1))
    assert not torch.equal(one, other) and torch.equal(one, suggest(p.W, p.labeled, p.certainty, 10, pool=200).items)
    full = suggest(p.W, p.labeled, p.certainty, 10, pool=len(truth)).gain.sum()
    assert .7*full < suggest(p.W, p.labeled, p.certainty, 10, pool=200).gain.sum() <= full*1.001


def test_suggest_refuses():
    W, labeled = small(), torch.arange(40) < 4
    for kwargs, match in ((dict(m=37), '37 items to suggest from 36 unlabeled'), (dict(m=0), '0 items'), (dict(m=9, pool=8), 'pool=8')):
        with pytest.raises(ValueError, match=match): suggest(W, labeled, torch.zeros(40), **kwargs)
    with pytest.raises(ValueError, match='40 items, 39 flags'): suggest(W, labeled[:-1], torch.zeros(40), 2)


@pytest.mark.parametrize('seeds', ['class_size', 'raw'])
def test_doubt_is_diffusion_with_the_label_hidden(seeds):
    W = small(60, seed=3)
    y = torch.where(torch.arange(60) < 24, torch.arange(60)*7 % 3, -1)
    doubt = {}
    for i in range(24):
        z = spread(W, torch.where(torch.arange(60) == i, -1, y), 3, seeds=seeds, max_iter=500, tol=1e-8).Z[i].clamp(min=0)
        z = z/z.sum()
        rest = z.clone()
        rest[y[i]] = -1
        doubt[i] = (rest.max()-z[y[i]]).item(), rest.argmax().item()
    found = label_issues(W, y, seeds=seeds, max_iter=500, tol=1e-7)
    assert found.items.tolist() == sorted((i for i in doubt if doubt[i][0] > 0), key=lambda i: -doubt[i][0]) and len(found.items) > 3
    assert found.suggested.tolist() == [doubt[i][1] for i in found.items.tolist()]
    torch.testing.assert_close(found.doubt, torch.tensor([doubt[i][0] for i in found.items.tolist()]), rtol=0, atol=1e-3)


def test_labels_that_cannot_be_judged_are_not_doubted():
    W = affinity(torch.ones(40, 1), (torch.arange(40)//20*20 + (torch.arange(40)+1) % 20)[:, None])  # two rings
    y = torch.full((40,), -1)
    y[0] = y[5] = 0
    y[2] = 1                                 # the only one of its class, among zeros
    y[30] = 0                                # alone in its ring
    assert not {2, 30} & set(label_issues(W, y).items.tolist())
    y[12] = 1
    assert 2 in label_issues(W, y).items.tolist()    # now it has a companion, and stands nearer to the zeros
