"Labelers against slow, obvious references, on difficult input, and with ω and ζ switched off."
import copy

import pytest
import torch
import torch.nn.functional as F

from fastai_lp.transductive.graph import affinity, csr
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction, replicator
from fastai_lp.transductive.propagate import propagate
from fastai_lp.transductive.scoring import certainty, class_weights

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


def play(W, P, y, max_iter=100, tol=1e-3): return replicator(W, P, y >= 0, max_iter, tol)


def slow_game(W, P, y, steps):
    "The definition: dense, float64, one player after the other"
    W, P, labeled = W.to_dense().double(), P.double(), y >= 0
    reached = labeled.clone()
    for _ in range(steps):
        new, known = P.clone(), reached.clone()
        for i in range(len(P)):
            neighbors = W[i].nonzero().flatten().tolist()
            reached[i] |= any(known[j] for j in neighbors)
            if labeled[i] or not reached[i]: continue
            gain = P[i]*sum(W[i, j]*P[j] for j in neighbors)
            if gain.sum() > 0: new[i] = gain/gain.sum()
        P = new
    return P, reached


def chain(n, w=.5):
    i = torch.arange(n)
    sims = torch.full((n, 2), w)
    sims[0, 0] = sims[-1, 1] = 0
    return affinity(sims, torch.stack([i-1, torch.where(i < n-1, i+1, -1)], 1))


@pytest.mark.parametrize('start', ['uniform', 'network'])
@pytest.mark.parametrize('steps', [1, 4, 15])
@pytest.mark.parametrize('seed', range(3))
def test_gtg_equals_its_definition(seed, steps, start):
    x, logits, y = problem(seed)
    p = GTG(k=8, start=start, max_iter=steps, tol=0)(x, logits, y)
    P, reached = slow_game(p.W, start_of(y, 4, logits if start == 'network' else None), y, steps)
    assert p.n_iter == steps
    assert torch.equal(p.reached, reached)
    torch.testing.assert_close(p.Z.double(), P*reached[:, None], atol=1e-4, rtol=0)
    assert torch.equal(p.labels, torch.where(y >= 0, y, torch.where(reached, P.argmax(1), -1)))
    assert torch.equal(p.W.to_dense(), propagate(x, y, k=8).W.to_dense())


def test_gtg_weights():
    x, logits, y = problem(0)
    p = GTG(k=8, max_iter=6, omega_norm='unlabeled', zeta_norm='classes')(x, logits, y)
    omega = certainty(p.Z)
    torch.testing.assert_close(p.certainty, torch.where(y >= 0, 1., omega/omega[y < 0].max()))
    assert torch.equal(p.class_weights, class_weights(p.labels, 4, 'classes'))
    assert set(p.seconds) == {'graph', 'diffusion'}


def test_gtg_ends_at_its_tolerance():
    x, logits, y = problem(1)
    p = GTG(k=8, tol=1e-3)(x, logits, y)
    before = GTG(k=8, max_iter=p.n_iter-1, tol=0)(x, logits, y)
    assert 1 < p.n_iter < 100
    assert p.residual <= 1e-3
    assert p.residual == pytest.approx((p.Z-before.Z).abs().sum(1).mean().item()/2, abs=1e-6)
    assert GTG(k=8, max_iter=3, tol=1e-3)(x, logits, y).n_iter == 3


def test_a_label_moves_one_edge_per_step():
    "The game goes on while labels spread, even if a step moves less than the tolerance"
    y = torch.full((3000,), -1)
    y[0], y[1] = 1, 0
    game = play(chain(3000), start_of(y, 2), y, max_iter=50)
    assert game.n_iter == 50
    assert game.reached.sum() == 52
    assert (game.P[52:] == .5).all()


def test_the_game_does_not_end_before_it_takes_off():
    "With many neighbors and few labels, the first steps move almost nothing"
    g, t = torch.Generator().manual_seed(0), torch.arange(1000) % 2
    x = torch.randn(2, 16, generator=g)[t] + 1.5*torch.randn(1000, 16, generator=g)
    y = torch.where(torch.arange(1000) < 2, t, -1)
    p = GTG(k=150, tol=3e-3)(x, torch.zeros(1000, 2), y)
    first = play(p.W, start_of(y, 2), y, max_iter=3)
    assert first.change < 3e-3
    assert first.P.amax(1).mean() < .6
    assert p.Z.amax(1).mean() > .95
    assert p.n_iter < 100


def test_ties_stay_undecided():
    y = torch.tensor([0, -1, 1])
    game = play(chain(3), start_of(y, 2), y)
    assert game.reached.all()
    assert game.P[1].tolist() == [.5, .5]
    assert game.change == 0


@pytest.mark.parametrize('scale', [1, 1e-30])
def test_tiny_payoffs_do_not_underflow(scale):
    W, y = chain(3), torch.tensor([1, -1, 1])
    P = torch.tensor([[0, 1], [1, 1e-20], [0, 1]])
    game = play(csr(W.crow_indices(), W.col_indices(), W.values()*scale, 3), P, y)
    assert game.P[1].tolist() == [0, 1]


def test_an_item_does_not_move_if_neighbors_play_none_of_its_classes():
    P = torch.tensor([[1., 0, 0], [0, 0, 1], [0, 1, 0]])
    assert torch.equal(play(chain(3), P, torch.tensor([0, -1, 1])).P, P)


@pytest.fixture(scope='module')
def difficult():
    "Duplicates, zero vectors, and a component without labels; (feats, logits, y, which items no label reaches)"
    x, logits, y = problem(4, n=200)
    x[50:100] = x[50]
    x[120:125] = 0
    x = torch.cat([F.pad(x, (0, 2)), F.pad(1+torch.rand(30, 2), (6, 0))])
    lost = torch.zeros(230, dtype=bool)
    lost[120:125] = lost[200:] = True
    return x, F.pad(logits, (0, 0, 0, 30)), F.pad(y, (0, 30), value=-1), lost


@pytest.mark.parametrize('start', ['uniform', 'network'])
def test_gtg_on_difficult_input(difficult, start):
    x, logits, y, lost = difficult
    p = GTG(k=8, start=start)(x, logits, y)
    assert torch.equal(p.reached, ~lost)
    assert (p.labels[lost] == -1).all()
    assert not p.weights[lost].any()
    torch.testing.assert_close(p.Z.sum(1), (~lost).float())
    P, reached = slow_game(p.W, start_of(y, 4, logits if start == 'network' else None), y, p.n_iter)
    clear = (P.topk(2).values.diff().abs().flatten() > 1e-2) & reached & (y < 0)
    assert torch.equal(p.labels[clear], P.argmax(1)[clear])


@pytest.mark.parametrize('labeler', [Diffusion, GTG])
def test_unreached_items_have_no_weight_without_omega(difficult, labeler):
    x, logits, y, lost = difficult
    assert torch.equal(labeler(k=8, omega=False, zeta=False)(x, logits, y).weights, (~lost).float())


def test_all_items_labeled():
    x, logits, _ = problem(5, n=20)
    p = GTG(k=5)(x, logits, torch.arange(20) % 4)
    assert torch.equal(p.labels, torch.arange(20) % 4)
    assert p.residual == 0


def test_input_types():
    x, logits, y = problem(6)
    p = GTG(k=8)(x, logits, y)
    assert torch.equal(GTG(k=8)(x.double().numpy(), logits, y.numpy()).labels, p.labels)
    assert (GTG(k=8)(x.half(), logits.half(), y.int()).labels == p.labels).float().mean() > .97


@pytest.mark.parametrize('labeler', LABELERS)
def test_invalid_labels(labeler):
    x, logits, y = problem(7)
    with pytest.raises(ValueError, match='class 2 has no labeled item'): labeler()(x, logits, torch.where(y == 2, -1, y))
    with pytest.raises(ValueError, match='got 50 labels for 120 items'): labeler()(x, logits, y[:50])
    with pytest.raises(ValueError, match='label 4 is out of range'): labeler()(x, logits, y+1)


@pytest.mark.parametrize('name, bad', dict(k=0, gamma=0, max_iter=0, tol=-1, start='random', omega=1, backend='annoy').items())
def test_invalid_settings(name, bad):
    with pytest.raises(ValueError, match=f'{name} must be'): GTG(**{name: bad})


@pytest.mark.parametrize('labeler', LABELERS)
def test_weights_can_be_switched_off(labeler):
    x, logits, y = problem(8)
    switches = dict(), dict(omega=False), dict(zeta=False), dict(omega=False, zeta=False)
    full, no_omega, no_zeta, neither = (labeler(**o)(x, logits, y) for o in switches)
    assert not torch.equal(full.weights, no_omega.weights)
    assert not torch.equal(full.weights, no_zeta.weights)
    assert torch.equal(no_omega.weights, full.class_weights[full.labels])
    assert torch.equal(no_zeta.weights, full.certainty)
    assert torch.equal(neither.weights, torch.ones(120))
    for p in (no_omega, no_zeta, neither): assert torch.equal(p.labels, full.labels)


@pytest.mark.parametrize('labeler', LABELERS)
def test_labelers_have_no_state(labeler):
    x, logits, y = problem(8)
    one = labeler()
    before = copy.deepcopy(vars(one))
    first = one(x, logits, y)
    assert vars(one) == before
    assert torch.equal(one(x, logits, y).weights, first.weights)


def test_diffusion_is_propagate():
    x, logits, y = problem(9)
    p, q = Diffusion(k=8, alpha=.9, omega_norm=None)(x, logits, y), propagate(x, y, 4, k=8, alpha=.9, omega_norm=None)
    assert torch.equal(p.Z, q.Z)
    assert torch.equal(p.weights, q.weights)


def test_network_prediction_is_the_softmax():
    x, logits, y = problem(9)
    p = NetworkPrediction()(x, logits, y)
    assert torch.equal(p.Z, logits.softmax(1))
    assert torch.equal(p.labels[y < 0], logits.argmax(1)[y < 0])


def test_a_labeler_with_more_attributes():
    "A subclass may keep what it likes, such as the features of each epoch"
    class Recording(Diffusion):
        def __call__(self, feats, logits, y):
            self.seen = feats
            return super().__call__(feats, logits, y)
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    y[9:] = -1
    labeler = Recording(k=5)
    assert torch.equal(labeler(x, torch.zeros(60, 3), y).Z, Diffusion(k=5)(x, torch.zeros(60, 3), y).Z)
    assert labeler.seen is x
