"The labelers against slow, obvious references, on hard cases, and with the weights of the paper's ablation switched off."
import warnings

import pytest
import torch
import torch.nn.functional as F

from fastai_lp.transductive.graph import affinity, csr
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction, replicator
from fastai_lp.transductive.pseudo import certainty, class_weights, propagate

LABELERS = [Diffusion, NetworkPrediction, GTG]


def problem(seed, n=120, d=6, c=4, labeled=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + 1.5*torch.randn(c, d, generator=g)[torch.arange(n) % c]
    y = torch.full((n,), -1)
    y[:labeled] = torch.arange(labeled) % c
    return x, torch.randn(n, c, generator=g), y


def start_of(y, c, logits=None):
    P = torch.full((len(y), c), 1/c) if logits is None else logits.softmax(1)
    return torch.where((y >= 0)[:, None], F.one_hot(y.clamp(min=0), c).float(), P)


def slow_game(W, P, y, steps):
    "The definition: dense, float64, one player after the other"
    W, P, labeled = W.to_dense().double(), P.double(), y >= 0
    reached = labeled.clone()
    for _ in range(steps):
        new, known = P.clone(), reached.clone()
        for i in range(len(P)):
            neighbours = W[i].nonzero().flatten().tolist()
            reached[i] |= any(known[j] for j in neighbours)
            if labeled[i] or not reached[i]: continue
            gain = P[i]*sum(W[i, j]*P[j] for j in neighbours)
            if gain.sum() > 0: new[i] = gain/gain.sum()
        P = new
    return P, reached


@pytest.mark.parametrize('start', ['uniform', 'network'])
@pytest.mark.parametrize('steps', [1, 4, 15])
@pytest.mark.parametrize('seed', range(3))
def test_gtg_equals_the_definition(seed, steps, start):
    x, logits, y = problem(seed)
    p = GTG(k=8, start=start, max_iter=steps, tol=0)(x, logits, y)
    P, reached = slow_game(p.W, start_of(y, 4, logits if start == 'network' else None), y, steps)
    assert p.n_iter == steps and torch.equal(p.reached, reached)
    torch.testing.assert_close(p.Z.double(), P*reached[:, None], atol=1e-4, rtol=0)
    assert torch.equal(p.labels, torch.where(y >= 0, y, torch.where(reached, P.argmax(1), -1)))
    assert torch.equal(p.W.to_dense(), propagate(x, y, k=8).W.to_dense())


def test_gtg_weights_are_eq_11_and_zeta_of_its_distributions():
    x, logits, y = problem(0)
    p = GTG(k=8, max_iter=6, omega_norm='unlabeled', zeta_norm='classes')(x, logits, y)
    omega = certainty(p.Z)
    torch.testing.assert_close(p.certainty, torch.where(y >= 0, 1., omega/omega[y < 0].max()))
    assert torch.equal(p.class_weights, class_weights(p.labels, 4, 'classes'))
    assert set(p.seconds) == {'graph', 'diffusion'} and p.Z.dtype == torch.float32


def test_gtg_stops_when_it_has_settled():
    x, logits, y = problem(1)
    p = GTG(k=8, tol=1e-3)(x, logits, y)
    before = GTG(k=8, max_iter=p.n_iter-1, tol=0)(x, logits, y)
    assert 1 < p.n_iter < 100 and p.residual <= 1e-3
    assert abs(p.residual - (p.Z-before.Z).abs().sum(1).mean().item()/2) <= 1e-6
    assert GTG(k=8, max_iter=3, tol=1e-3)(x, logits, y).n_iter == 3
    assert torch.equal(GTG(k=8, tol=0, max_iter=1000)(x, logits, y).labels, GTG(k=8, tol=1e-6, max_iter=1000)(x, logits, y).labels)


def test_total_payoff_never_falls():
    x, logits, y = problem(2)
    W = GTG(k=8)(x, logits, y).W
    for P in (start_of(y, 4), start_of(y, 4, logits)):
        P = [replicator(W, P, y >= 0, m, 0).P.double() for m in range(1, 30)]
        payoff = torch.stack([(W.to_dense().double()*(p@p.T)).sum() for p in P])
        assert (payoff.diff() >= -1e-5*payoff[:-1]).all() and payoff[-1] > payoff[0]


def test_classes_may_be_renumbered():
    x, logits, y = problem(3)
    classes = torch.tensor([2, 0, 3, 1])
    p, q = (GTG(k=8)(x, logits, o) for o in (y, torch.where(y >= 0, classes[y.clamp(min=0)], -1)))
    torch.testing.assert_close(q.Z[:, classes], p.Z, atol=1e-4, rtol=0)


def chain(n, w=.5):
    i = torch.arange(n)
    sims = torch.full((n, 2), w)
    sims[0, 0] = sims[-1, 1] = 0
    return affinity(sims, torch.stack([i-1, torch.where(i < n-1, i+1, -1)], 1))


def test_a_label_moves_one_edge_per_step_and_the_game_waits_for_it():
    y = torch.full((3000,), -1)
    y[0], y[1] = 1, 0
    game = replicator(chain(3000), start_of(y, 2), y >= 0, max_iter=50)
    assert game.n_iter == 50 and game.reached.sum() == 52    # a step moves far less than tol, yet the game goes on
    assert (game.P[52:] == .5).all()


def test_the_game_does_not_stop_before_it_takes_off():
    "With many neighbours and few labels the first steps move next to nothing"
    g, t = torch.Generator().manual_seed(0), torch.arange(1000) % 2
    x, y = torch.randn(2, 16, generator=g)[t] + 1.5*torch.randn(1000, 16, generator=g), torch.where(torch.arange(1000) < 2, t, -1)
    p = GTG(k=150, tol=3e-3)(x, torch.zeros(1000, 2), y)
    first = replicator(p.W, start_of(y, 2), y >= 0, max_iter=3)
    assert first.change < 3e-3 and first.reached.all() and first.P.amax(1).mean() < .6
    assert p.Z.amax(1).mean() > .95 and p.n_iter < 100


def test_a_tie_is_reached_without_certainty():
    y = torch.tensor([0, -1, 1])
    game = replicator(chain(3), start_of(y, 2), y >= 0)
    assert game.reached.all() and game.P[1].tolist() == [.5, .5] and game.change == 0


def test_tiny_payoffs_do_not_underflow():
    W, y = chain(3), torch.tensor([1, -1, 1])
    P = torch.tensor([[0, 1], [1, 1e-20], [0, 1]])
    for scale in (1, 1e-30):
        game = replicator(csr(W.crow_indices(), W.col_indices(), W.values()*scale, 3), P, y >= 0)
        assert game.P[1].tolist() == [0, 1] and game.reached.all()


def test_an_item_keeps_its_distribution_where_neighbours_play_none_of_its_classes():
    y = torch.tensor([0, -1, 1])
    P = torch.tensor([[1., 0, 0], [0, 0, 1], [0, 1, 0]])
    assert torch.equal(replicator(chain(3), P, y >= 0).P, P)


@pytest.mark.parametrize('start', ['uniform', 'network'])
def test_duplicates_zero_vectors_and_islands(start):
    x, logits, y = problem(4, n=200)
    x[50:100] = x[50]          # many identical items
    x[120:125] = 0             # no direction: no neighbour
    x = torch.cat([torch.cat([x, torch.zeros(200, 2)], 1), torch.cat([torch.zeros(30, 6), 1+torch.rand(30, 2)], 1)])   # an island without label
    y, logits = torch.cat([y, torch.full((30,), -1)]), torch.cat([logits, torch.zeros(30, 4)])
    p = GTG(k=8, start=start)(x, logits, y)
    lost = torch.zeros(230, dtype=bool)
    lost[120:125] = lost[200:] = True
    assert torch.equal(p.reached, ~lost) and (p.labels[lost] == -1).all() and (p.certainty[lost] == 0).all() and (p.weights[lost] == 0).all()
    assert torch.isfinite(p.Z).all() and torch.isfinite(p.weights).all() and torch.equal(p.Z.sum(1).round(decimals=4), (~lost).float())
    P, reached = slow_game(p.W, start_of(y, 4, logits if start == 'network' else None), y, p.n_iter)
    clear = P.topk(2).values.diff().abs().flatten() > 1e-2
    assert torch.equal(p.reached, reached) and torch.equal(p.labels[reached & clear & (y < 0)], P.argmax(1)[reached & clear & (y < 0)])
    for labeler in (Diffusion(k=8, omega=False, zeta=False), GTG(k=8, start=start, omega=False, zeta=False)):
        plain = labeler(x, logits, y)
        assert torch.equal(plain.weights, (~lost).float()) and torch.equal(plain.certainty, plain.weights)


def test_one_label_per_class_and_more_neighbours_than_items():
    x, logits, y = problem(5, n=20, labeled=4)
    with pytest.warns(UserWarning, match='k=50 is not below'): p = GTG(k=50)(x, logits, y)
    P, _ = slow_game(p.W, start_of(y, 4), y, p.n_iter)
    torch.testing.assert_close(p.Z.double(), P, atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        q = GTG(k=19)(x, logits, y)
    assert torch.equal(p.labels, q.labels) and p.reached.all()
    everything = GTG(k=5)(x, logits, torch.arange(20) % 4)
    assert everything.labels.tolist() == [i % 4 for i in range(20)] and (everything.certainty == 1).all() and everything.residual == 0


def test_gtg_takes_what_diffusion_takes():
    x, logits, y = problem(6)
    p = GTG(k=8)(x, logits, y)
    assert torch.equal(GTG(k=8)(x.double().numpy(), logits, y.numpy()).labels, p.labels)
    assert (GTG(k=8)(x.half(), logits.half(), y.int()).labels == p.labels).float().mean() > .97
    assert torch.equal(GTG(k=8, backend='torch')(x, logits, y).Z, p.Z)


def test_bad_input_is_named():
    x, logits, y = problem(7)
    for bad, match in ((torch.where(y == 2, -1, y), 'class 2 has no labeled item'), (y[:50], '50 labels for 120 rows'), (y.float(), 'one integer per item'), (y+1, 'out of range')):
        with pytest.raises(ValueError, match=match): GTG()(x, logits, bad)
    x[[7, 9], 0] = torch.nan
    with pytest.raises(ValueError, match=r'item\(s\) 7, 9'): GTG()(x, logits, y)
    for bad in (dict(k=0), dict(gamma=0), dict(max_iter=0), dict(tol=-1), dict(start='random'), dict(omega_norm='one'), dict(backend='annoy')):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))!r}"): GTG(**bad)


@pytest.mark.parametrize('labeler', LABELERS)
def test_either_weight_can_be_switched_off(labeler):
    x, logits, y = problem(8)
    full, no_omega, no_zeta, neither = (labeler(omega=o, zeta=z)(x, logits, y) for o, z in ((True, True), (False, True), (True, False), (False, False)))
    assert not torch.equal(full.weights, no_omega.weights) and not torch.equal(full.weights, no_zeta.weights)
    torch.testing.assert_close(no_omega.weights, full.class_weights[full.labels])
    assert torch.equal(no_zeta.weights, full.certainty) and torch.equal(no_omega.certainty, torch.ones(120)) and torch.equal(neither.weights, torch.ones(120))
    for p in (no_omega, no_zeta, neither): assert torch.equal(p.labels, full.labels) and torch.equal(p.Z, full.Z)


def test_diffusion_is_propagate():
    x, logits, y = problem(9)
    p, q = Diffusion(k=8, alpha=.9, omega_norm=None)(x, logits, y), propagate(x, y, 4, k=8, alpha=.9, omega_norm=None)
    assert torch.equal(p.Z, q.Z) and torch.equal(p.weights, q.weights)
