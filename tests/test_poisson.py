"Poisson learning against its dense definition, on graphs that hang together and that do not, and the labeler made of it."
import pickle

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastai_lp.transductive.graph import affinity, csr, knn
from fastai_lp.transductive.poisson import Poisson, poisson, poisson_sources, potential_scores
from fastai_lp.transductive.pseudo import certainty, class_weights, from_scores, propagate


def problem(seed, n=120, d=6, c=4, labeled=12):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + torch.randn(c, d, generator=g)[torch.arange(n) % c]
    return x, torch.zeros(n, c), torch.where(torch.arange(n) < labeled, torch.arange(n) % c, -1)


def from_dense(W):
    row, col = W.nonzero(as_tuple=True)
    return csr(F.pad(row.bincount(minlength=len(W)).cumsum(0), (1, 0)), col, W[row, col], len(W))


def random_graph(seed, parts, dtype=torch.float32):
    "Random weights within each part, a ring so that it hangs together, and nothing between"
    g, n = torch.Generator().manual_seed(seed), sum(parts)
    W, first = torch.zeros(n, n, dtype=dtype), 0
    for m in parts:
        w = torch.rand(m, m, generator=g).to(dtype)*(torch.rand(m, m, generator=g) < .15)
        i = torch.arange(m)
        if m > 1: w[i, (i+1) % m] += .2 + torch.rand(m, generator=g).to(dtype)
        w.fill_diagonal_(0)
        W[first:first+m, first:first+m] = w + w.T
        first += m
    return W


def parts_of(W):
    "The components of a dense graph, by walking"
    left, parts = set(range(len(W))), []
    while left:
        part, new = set(), {min(left)}
        while new:
            part |= new
            new = {j for i in new for j in W[i].nonzero().flatten().tolist()} - part
        parts.append(sorted(part))
        left -= part
    return parts


def definition(W, y, c, prior=None):
    "(u, label) by the pseudo-inverse of L, float64, each component for itself; label −1 where no label reaches"
    W = W.double()
    u, label = torch.zeros(len(W), c, dtype=torch.float64), torch.full((len(W),), -1)
    for part in parts_of(W):
        w, labels = W[part][:, part], y[part]
        given = [o for o in labels.tolist() if o >= 0]
        if not given: continue
        mean = torch.stack([F.one_hot(torch.tensor(o), c).double() for o in given]).mean(0)
        B = torch.stack([F.one_hot(torch.tensor(o), c).double() - mean if o >= 0 else torch.zeros(c).double() for o in labels.tolist()])
        assert B.sum(0).abs().max() < 1e-12
        d = w.sum(1)
        one = torch.linalg.pinv(torch.diag(d) - w, hermitian=True) @ B
        if len(part) > 1: one = one - (d @ one)/d.sum()
        u[part] = one
        s = torch.ones(c).double() if prior is None else torch.where(mean > 0, torch.tensor(prior).double()/mean, 0)
        label[part] = (s*one).argmax(1) if len(set(given)) > 1 else given[0]
    return u, torch.where(y >= 0, y, label)


PARTS = [[60], [2, 60], [30, 20, 25], [40, 1, 1, 15, 12, 1]]
def labels_for(parts, seed, c=3):
    "Classes are missing in some parts, one part has one class only, the last no label at all"
    g, y, first = torch.Generator().manual_seed(seed), torch.full((sum(parts),), -1), 0
    for i, m in enumerate(parts):
        n = min(m, 5)
        if i == 0: y[first:first+n] = torch.tensor([0, 1, 2, 0, 0])[:n]
        elif i < len(parts)-1: y[first:first+n] = torch.randint(c, (n,), generator=g) if i % 2 else 1
        first += m
    if len(parts) == 2: y[:2], y[2:7] = torch.tensor([0, 2]), torch.tensor([0, 1, 2, 1, 1])
    return y


@pytest.mark.parametrize('parts', PARTS)
@pytest.mark.parametrize('seed', range(3))
def test_equals_the_definition(parts, seed):
    for dtype, tol, close in ((torch.float32, 1e-6, 1e-4), (torch.float64, 1e-12, 1e-9)):
        W, y = random_graph(seed, parts, dtype), labels_for(parts, seed)
        res = poisson(from_dense(W), y, 3, tol=tol)
        u, label = definition(W, y, 3)
        assert res.u.dtype == dtype and ((res.u.double()-u).norm(dim=0) <= close*u.norm(dim=0)).all()
        assert torch.equal(from_scores(potential_scores(res), y).labels, label)
        for i, part in enumerate(parts_of(W)):
            assert len(set(res.component[part].tolist())) == 1
            mass = W[part].sum(1) @ res.u[part]
            assert (mass.abs() <= close*(W[part].sum(1) @ res.u[part].abs() + 1e-9)).all()
        assert len(res.mean) == len(parts_of(W))


def test_residual_is_the_recomputed_one_when_stopped_early():
    W, y = random_graph(0, [200]), labels_for([200], 0)
    d = W.sum(1)
    B, _ = poisson_sources(y, torch.zeros(200, dtype=torch.int64), 3)
    for m in (1, 5, 10):
        res = poisson(from_dense(W), y, 3, max_iter=m, tol=0)
        r = (B - (torch.diag(d)-W) @ res.u)/d.sqrt()[:, None]
        assert res.n_iter == m
        torch.testing.assert_close(res.residual, r.norm(dim=0)/(B/d.sqrt()[:, None]).norm(dim=0), rtol=1e-3, atol=1e-6)
    assert poisson(from_dense(W), y, 3).residual.max() <= 1.1e-5


@pytest.mark.parametrize('parts', PARTS)
def test_sources_sum_to_zero_in_each_component(parts):
    y = labels_for(parts, 1)
    component = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    B, mean = poisson_sources(y, component, 3, torch.float64)
    for i in range(len(parts)):
        here = component == i
        assert B[here].sum(0).abs().max() < 1e-12
        given = y[here & (y >= 0)]
        torch.testing.assert_close(mean[i], torch.bincount(given, minlength=3)/max(len(given), 1), check_dtype=False)
    torch.testing.assert_close(B[y >= 0], F.one_hot(y[y >= 0], 3) - mean[component[y >= 0]], check_dtype=False)
    assert (B[y < 0] == 0).all()


def test_iterations_far_beyond_convergence_do_not_drift():
    "Float32 CG on I − S alone does: what rounding puts into its null space never leaves the residual"
    W, y = random_graph(2, [300, 80]), labels_for([300, 80], 2)
    y[300:304] = torch.tensor([0, 1, 1, 2])
    u, _ = definition(W, y, 3)
    for m in (200, 5000):
        res = poisson(from_dense(W), y, 3, max_iter=m, tol=0)
        assert (res.u-u).norm() <= 1e-4*u.norm() and torch.isfinite(res.residual).all() and res.residual.max() < 1e-5


def test_a_long_chain_is_solved_in_float32():
    "The potential between a source and a sink falls by the same amount from edge to edge, and is flat beyond them"
    n, i = 400, torch.arange(400)
    sims = torch.ones(n, 2)
    sims[0, 0] = sims[-1, 1] = 0
    W = affinity(sims, torch.stack([i-1, torch.where(i < n-1, i+1, -1)], 1), symmetry='max')
    y = torch.full((n,), -1)
    y[100], y[300] = 0, 1
    res = poisson(W, y, 2)
    step = res.u[:, 0].diff()
    torch.testing.assert_close(step[100:300], torch.full((200,), -.5), atol=2e-3, rtol=0)
    torch.testing.assert_close(torch.cat([step[:100], step[300:]]), torch.zeros(199), atol=2e-3, rtol=0)
    p = from_scores(potential_scores(res), y)
    assert p.labels[:199].tolist() == [0]*199 and p.labels[202:].tolist() == [1]*198 and p.reached.all()


@pytest.mark.parametrize('scale', [1e-6, 1, 1e6])
def test_scores_do_not_depend_on_the_scale_of_W(scale):
    W, y = random_graph(3, [80]), labels_for([80], 3)
    res, ref = poisson(from_dense(W*scale), y, 3), poisson(from_dense(W), y, 3)
    torch.testing.assert_close(res.u*scale, ref.u, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(certainty(potential_scores(res)), certainty(potential_scores(ref)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('parts', [[60], [40, 30, 1, 10]])
def test_items_and_classes_may_be_renumbered(parts):
    W, y = random_graph(4, parts), labels_for(parts, 4)
    g = torch.Generator().manual_seed(0)
    items, classes = torch.randperm(len(y), generator=g), torch.tensor([2, 0, 1])
    a, b = poisson(from_dense(W), y, 3), poisson(from_dense(W[items][:, items]), torch.where(y >= 0, classes[y.clamp(min=0)], -1)[items], 3)
    torch.testing.assert_close(b.u[:, classes], a.u[items], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(potential_scores(b)[:, classes], potential_scores(a)[items], rtol=1e-3, atol=1e-4)


def test_many_classes_in_blocks():
    c = 70
    W, y = random_graph(5, [300], torch.float64), torch.where(torch.arange(300) < 2*c, torch.arange(300) % c, -1)
    u, _ = definition(W, y, c)
    torch.testing.assert_close(poisson(from_dense(W), y, tol=1e-12).u, u, rtol=0, atol=1e-9)


def test_w_stays_as_it_was_and_stored_zeros_join_nothing():
    W, y = from_dense(random_graph(6, [20, 20])), torch.full((40,), -1)
    y[[0, 1, 20, 21]] = torch.tensor([0, 1, 0, 1])
    values = W.values().clone()
    with_zero = torch.zeros(40, 40)
    with_zero[0, 39] = with_zero[39, 0] = 1
    both = (W.to_dense() + with_zero).to_sparse_csr()
    both = csr(both.crow_indices(), both.col_indices(), W.to_dense()[torch.repeat_interleave(torch.arange(40), both.crow_indices().diff()), both.col_indices()], 40)
    assert (both.values() == 0).sum() == 2
    before = [o.clone() for o in (both.crow_indices(), both.col_indices(), both.values())]
    a, b = poisson(W, y), poisson(both, y)
    torch.testing.assert_close(a.u, b.u)
    assert torch.equal(W.values(), values) and len(b.mean) == 2
    for o, now in zip(before, (both.crow_indices(), both.col_indices(), both.values())): assert torch.equal(o, now)


# scores and the labeler

def slow_scores(u, component, mean, prior=None):
    Z = torch.zeros_like(u)
    for part in component.unique():
        items, there = (component == part).nonzero().flatten().tolist(), mean[part] > 0
        su = {i: [max((1 if prior is None else prior[h]/mean[part, h].item())*u[i, h].item(), 0) if there[h] else None for h in range(u.shape[1])] for i in items}
        peaks = sorted(max((o for o in su[i] if o is not None), default=0) for i in items)
        tau = peaks[(len(peaks)-1)//2]
        if there.sum() < 2 or tau == 0: tau = 1
        for i in items:
            for h in range(u.shape[1]):
                if there[h]: Z[i, h] = (su[i][h] if there.sum() > 1 else 0) + tau/there.sum()
    return Z


@pytest.mark.parametrize('prior', [None, [.5, .3, .2]])
@pytest.mark.parametrize('parts', PARTS)
def test_scores_equal_their_definition(parts, prior):
    W, y = random_graph(7, parts, torch.float64), labels_for(parts, 7)
    res = poisson(from_dense(W), y, 3, tol=1e-13)
    Z = potential_scores(res, prior)
    torch.testing.assert_close(Z, slow_scores(res.u, res.component, res.mean, prior), rtol=1e-6, atol=1e-9)
    assert (Z >= 0).all() and torch.equal((Z > 0).any(1), (res.mean[res.component] > 0).any(1))
    p = from_scores(Z, y)
    assert torch.equal(p.labels, definition(W, y, 3, prior)[1])


def test_certainty_falls_towards_the_boundary_also_for_two_classes():
    W, y = random_graph(8, [90]), torch.full((90,), -1)
    y[0], y[45] = 0, 1
    res = poisson(from_dense(W), y, 2)
    omega, size = certainty(potential_scores(res)), res.u.abs().amax(1)
    assert (omega[size.argsort()].diff() >= -1e-5).all() and omega[0] > .9 and omega.min() < .2


def test_ties_are_reached_without_certainty_and_get_a_class_of_their_component():
    W = torch.zeros(5, 5)
    for i, j in ((0, 1), (1, 2)): W[i, j] = W[j, i] = 1
    for i, j in ((3, 4),): W[i, j] = W[j, i] = 1
    y = torch.tensor([1, -1, 2, 0, -1])
    p = from_scores(potential_scores(poisson(from_dense(W), y, 3)), y)
    assert p.reached.all() and p.labels[1] in (1, 2) and p.labels[4] == 0
    assert p.certainty[1] < p.certainty[4] == 1


def test_the_labeler_is_graph_potential_and_scores():
    x, logits, y = problem(0)
    for symmetry, local in (('sum', None), ('max', None), ('mutual', 5)):
        p = Poisson(k=8, symmetry=symmetry, local=local, gamma=2., omega_norm='unlabeled', zeta_norm='classes')(x, logits, y)
        W = affinity(*knn(F.normalize(x), 8), gamma=2., symmetry=symmetry, local=local)
        torch.testing.assert_close(p.W.to_dense(), W.to_dense())
        res = poisson(p.W, y, 4)
        assert torch.equal(p.Z, potential_scores(res)) and p.n_iter == res.n_iter and p.residual == res.residual.max().item()
        omega = certainty(p.Z)
        torch.testing.assert_close(p.certainty, torch.where(y >= 0, 1., omega/omega[y < 0].max()))
        assert torch.equal(p.class_weights, class_weights(p.labels, 4, 'classes')) and set(p.seconds) == {'graph', 'diffusion'}
        assert torch.equal(p.labels, definition(W.to_dense(), y, 4)[1])


def test_default_graph_is_diffusions():
    x, logits, y = problem(1)
    assert torch.equal(Poisson()(x, logits, y).W.to_dense(), propagate(x, y).W.to_dense())


def test_imbalanced_labels_with_prior():
    "Labels that say nothing of how large the classes are cost accuracy, which the class sizes give back"
    x, truth = load_digits(return_X_y=True)
    keep = truth < 4
    x, truth = torch.tensor(x[keep]).float(), torch.tensor(truth[keep])
    plain, known = [], []
    for seed in range(4):
        g, y = torch.Generator().manual_seed(seed), torch.full((len(x),), -1)
        for c, m in enumerate((1, 12, 2, 6)):
            items = (truth == c).nonzero().flatten()
            y[items[torch.randperm(len(items), generator=g)[:m]]] = c
        p, q = Poisson()(x, torch.zeros(len(x), 4), y), Poisson(prior=[1, 1, 1, 1])(x, torch.zeros(len(x), 4), y)
        plain.append(p.accuracy(truth))
        known.append(q.accuracy(truth))
        assert torch.equal(q.labels, Poisson(prior=[.25]*4)(x, torch.zeros(len(x), 4), y).labels)
    assert min(known) > .9 and all(k >= o for k, o in zip(known, plain))


def test_a_larger_prior_never_loses_items():
    x, logits, y = problem(2)
    counts = [(Poisson(k=8, prior=[b, 1, 1, 1])(x, logits, y).labels == 0).sum().item() for b in (.1, .5, 1, 2, 10)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_one_label_per_class_on_digits():
    x, truth = load_digits(return_X_y=True)
    x, truth = torch.tensor(x).float(), torch.tensor(truth)
    accuracy = []
    for seed in range(3):
        g, y = torch.Generator().manual_seed(seed), torch.full((1797,), -1)
        for c in range(10):
            items = (truth == c).nonzero().flatten()
            y[items[torch.randint(len(items), (1,), generator=g)]] = c
        p = Poisson()(x, torch.zeros(1797, 10), y)
        accuracy.append(p.accuracy(truth))
        right, asked = p.labels == truth, ~p.labeled
        assert p.certainty[asked & right].mean() > 1.5*p.certainty[asked & ~right].mean() and p.residual < 2e-5 and p.n_iter < 300
    assert sum(accuracy)/3 > .75


def test_islands_zero_vectors_and_duplicates():
    x, logits, y = problem(3, n=200)
    x[50:100] = x[50]
    x[120:125] = 0
    island = torch.cat([torch.zeros(30, 6), 1+torch.rand(30, 2)], 1)
    x = torch.cat([torch.cat([x, torch.zeros(200, 2)], 1), island, torch.cat([torch.zeros(30, 8), 1+torch.rand(30, 2)], 1)[:, 2:]*torch.tensor([0]*6+[1, -1.])])
    y, logits = torch.cat([y, torch.full((60,), -1)]), torch.zeros(260, 4)
    y[230] = 3                 # the only label of the second island
    p = Poisson(k=8)(x, logits, y)
    lost = torch.zeros(260, dtype=torch.bool)
    lost[120:125] = lost[200:230] = True
    lost[50:100] = (p.W.to_dense()[50:100][:, y >= 0].sum() == 0) & ~p.reached[50:100]      # copies of one item may be an island of their own
    assert torch.equal(p.reached, ~lost) and (p.labels[lost] == -1).all() and (p.certainty[lost] == 0).all() and (p.weights[lost] == 0).all()
    assert (p.labels[230:] == 3).all() and (p.certainty[230:] == 1).all()
    assert torch.isfinite(p.Z).all() and torch.isfinite(p.weights).all()
    assert torch.equal(p.labels, torch.where(lost, -1, definition(p.W.to_dense(), y, 4)[1]))
    plain = Poisson(k=8, omega=False, zeta=False)(x, logits, y)
    assert torch.equal(plain.weights, (~lost).float()) and torch.equal(plain.labels, p.labels)


def test_every_component_of_one_class_only():
    x = torch.cat([torch.cat([1+torch.rand(20, 2), torch.zeros(20, 2)], 1), torch.cat([torch.zeros(20, 2), 1+torch.rand(20, 2)], 1)])
    y = torch.full((40,), -1)
    y[0], y[20] = 1, 0
    p = Poisson(k=5)(x, torch.zeros(40, 2), y)
    assert p.labels.tolist() == [1]*20 + [0]*20 and (p.certainty == 1).all() and p.residual == p.n_iter == 0
    one = Poisson(k=5)(x[:20], torch.zeros(20, 1), y[:20]-1)
    assert (one.labels == 0).all() and (one.certainty == 1).all()


def test_all_labeled_and_bad_input():
    x, logits, y = problem(4, n=40, labeled=40)
    p = Poisson(k=5)(x, logits, y)
    assert torch.equal(p.labels, y) and (p.certainty == 1).all()
    x, logits, y = problem(5)
    for bad, match in ((torch.where(y == 2, -1, y), 'class 2 has no labeled item'), (y[:50], '50 labels for 120 rows'), (y.float(), 'one integer per item'), (y+1, 'out of range')):
        with pytest.raises(ValueError, match=match): Poisson()(x, logits, bad)
    with pytest.raises(ValueError, match='50 labels for a graph of 120'): poisson(Poisson()(x, logits, y).W, y[:50])
    with pytest.raises(ValueError, match='each of the 3 classes|each of the 4 classes'): Poisson(prior=[1, 1])(x, logits, y)
    for bad in (dict(k=0), dict(gamma=0), dict(max_iter=0), dict(tol=-1), dict(symmetry='min'), dict(local=0), dict(omega_norm='one'), dict(backend='annoy')):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))!r}"): Poisson(**bad)
    for prior in ([1, 0], [1, -1], [1, float('nan')], [1, float('inf')]):
        with pytest.raises(ValueError, match='prior=.*expected'): Poisson(prior=prior)


def test_takes_what_the_others_take_and_is_saved_like_them():
    x, logits, y = problem(6)
    labeler = Poisson(k=8, prior=torch.tensor([1., 2, 1, 1]))
    p = labeler(x, logits, y)
    assert torch.equal(labeler(x.double().numpy(), logits, y.numpy()).labels, p.labels) and labeler == Poisson(k=8, prior=[1, 2, 1, 1])
    again = pickle.loads(pickle.dumps(labeler))
    assert again == labeler and torch.equal(again(x, logits, y).Z, p.Z)
    state = labeler.state_dict()
    again.load_state_dict(state)
    assert torch.equal(again(x, logits, y).Z, p.Z)
    no_omega, no_zeta = Poisson(k=8, omega=False)(x, logits, y), Poisson(k=8, zeta=False)(x, logits, y)
    torch.testing.assert_close(no_omega.weights, no_omega.class_weights[no_omega.labels])
    assert torch.equal(no_zeta.weights, no_zeta.certainty) and torch.equal(no_omega.labels, no_zeta.labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_same_on_a_gpu():
    W, y = random_graph(9, [60, 20, 1]), labels_for([60, 20, 1], 9)
    a, b = poisson(from_dense(W), y, 3), poisson(from_dense(W).cuda(), y.cuda(), 3)
    torch.testing.assert_close(b.u.cpu(), a.u, rtol=1e-3, atol=1e-4)
    assert torch.equal(potential_scores(b).argmax(1).cpu(), potential_scores(a).argmax(1))
