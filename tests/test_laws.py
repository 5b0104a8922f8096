"Laws of the graph, the diffusion, the certainty, the weights and the loss, for any descriptors, graphs, labels and scores."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse.csgraph import connected_components, shortest_path
from scipy.stats import entropy
from sklearn.neighbors import NearestNeighbors

from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.graph import affinity, csr, normalize
from fastai_lp.learner.losses import PseudoLabelLoss, weighted_targets
from fastai_lp.transductive.pseudo import _Rows, build_graph, certainty, class_weights, from_scores, propagate, seed_matrix, spread
from fastai_lp.transductive.neighbors import _exact_torch, knn, unit_rows

samples, alphas, classes = st.integers(0, 2**32-1), st.floats(0, .99), st.integers(1, 4)
decimals = st.integers(-4000, 4000).map(lambda o: o/1000)  # squares of all of them, and of their sums, are far from underflow
options = st.fixed_dictionaries(dict(seeds=st.sampled_from(['class_size', 'raw']), omega_norm=st.sampled_from(['all', 'unlabeled', None]), zeta_norm=st.sampled_from(['items', 'classes']),
    alpha=alphas, max_iter=st.integers(1, 30), keep_Z=st.booleans()))


def generator(seed): return torch.Generator().manual_seed(seed)


def normal(seed, *shape): return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def sparse(W):
    "CSR of a dense W"
    rows, cols = W.nonzero().T
    return csr(F.pad(torch.bincount(rows, minlength=len(W)).cumsum(0), (1, 0)), cols, W[rows, cols], len(W))


def solved(W, Y, alpha):
    "Z = (I − αS)⁻¹Y in float64"
    Z, _, residual = diffuse(normalize(sparse(W))[0], Y, alpha, max_iter=5000, tol=1e-12)
    assert not len(residual) or residual.max() < 1e-11
    return Z


def parts(W): return torch.from_numpy(connected_components(W.numpy(), directed=False)[1]).long()


def tensors(shape, elements, dtype=np.float64): return arrays(dtype, shape, elements=elements, fill=st.nothing()).map(torch.from_numpy)


@st.composite
def descriptors(draw, grid=True):
    "float32 [n, d], a Gaussian sample or (`grid`, which has ties) quarters; then some rows equal to another, nearly so, or zero"
    n, d = draw(st.integers(2, 40)), draw(st.integers(1, 8))
    if grid and draw(st.booleans()): x = draw(arrays(np.int64, (n, d), elements=st.integers(-8, 8)).map(torch.from_numpy))/4
    else: x = normal(draw(samples), n, d).float()
    item = st.integers(0, n-1)
    for i, j, how in draw(st.lists(st.tuples(item, item, st.sampled_from(['equal', 'near', 'zero'])), max_size=6)):
        x[i] = dict(equal=x[j], near=x[j]+1e-6, zero=0*x[j])[how]
    return x


@st.composite
def graphs(draw, weights=st.integers(1, 8).map(lambda o: o/4) | st.floats(1e-3, 1e3)):
    "Dense float64 W [n, n], symmetric, of any number of components, isolated items among them"
    n = draw(st.integers(2, 30))
    item, m = st.integers(0, n-1), draw(st.integers(0, 3*n))
    W = torch.zeros(n, n, dtype=torch.float64)
    for i, j, w in draw(st.lists(st.tuples(item, item, weights), min_size=m, max_size=m)):
        if i != j: W[i, j] = W[j, i] = w
    return W


@st.composite
def labels_of(draw, n):
    "(y [n], c), each class with a label, most items without"
    c = draw(st.integers(1, min(n, 4)))
    item, y = st.integers(0, n-1), torch.full((n,), -1)
    for i, j in draw(st.lists(st.tuples(item, st.integers(0, c-1)), max_size=n)): y[i] = j
    y[draw(st.lists(item, min_size=c, max_size=c, unique=True))] = torch.arange(c)
    return y, c


@st.composite
def problems(draw):
    "(W, y, c)"
    W = draw(graphs())
    return W, *draw(labels_of(len(W)))


@st.composite
def clear_problems(draw):
    "(x, y, c, k) where no edge hangs on the last digits: all of the k similarities are away from 0 and from the next one, or negative"
    x = draw(descriptors(grid=False))
    s = F.normalize(x.double()) @ F.normalize(x.double()).T
    none = (x == 0).all(1)
    s[none], s[:, none] = -1, -1
    s = s.fill_diagonal_(-1).sort(1, descending=True)[0]
    k = [k for k in range(1, len(x)) if (s[:, :k].abs() > .05).all() and ((s[:, k-1]-s[:, k] > 1e-4) | (s[:, k-1] < 0)).all()]
    assume(k)
    return x, *draw(labels_of(len(x))), draw(st.sampled_from(k))


@st.composite
def scores(draw, dtype=np.float32, c=st.integers(2, 12)):
    "Z [n, c] ≥ 0, of large and small entries, zeros, rows of zeros"
    n, c = draw(st.integers(1, 12)), draw(c)
    low = float(np.float32(1e-6))
    entries = st.floats(low, 1, width=np.dtype(dtype).itemsize*8)
    Z = draw(tensors((n, c), entries | entries | st.just(0.), dtype))
    Z[draw(st.lists(st.integers(0, n-1), max_size=3))] = 0
    return Z


@st.composite
def neighborhoods(draw):
    "Symmetric similarities s [n, n] and who names whom, bool [n, n]"
    n = draw(st.integers(2, 10))
    s = draw(tensors((n, n), st.floats(-1, 1, width=32), np.float32))
    return torch.maximum(s, s.T), draw(tensors((n, n), st.booleans(), bool))


def affinity_by_loops(s, named, gamma):
    n = len(s)
    W = torch.zeros(n, n)
    for i in range(n):
        for j in range(n):
            if i != j: W[i, j] = (int(named[i, j]) + int(named[j, i]))*max(float(s[i, j]), 0)**gamma
    return W


def check_affinity(W):
    assert (W.values() > 0).all() and W.dtype == torch.float32
    W = W.to_dense()
    assert torch.equal(W, W.T) and not W.diagonal().any()
    return W


@given(neighborhoods(), st.floats(.1, 8))
def test_affinity_is_twice_s_to_gamma_where_mutual_and_once_where_not(case, gamma):
    "W_ij = ([j ∈ N_i] + [i ∈ N_j])·max(s_ij, 0)^γ, W_ii = 0"
    s, named = case
    W = check_affinity(affinity(s, torch.where(named, torch.arange(len(s)), -1), gamma))
    torch.testing.assert_close(W, affinity_by_loops(s, named, gamma), rtol=1e-5, atol=1e-37)


@given(descriptors(), st.integers(1, 39), st.floats(1, 5), st.sampled_from(['faiss', 'torch']))
def test_affinity_of_descriptors(x, k, gamma, backend):
    "The same, of what `knn` names and the cosines"
    k, u = min(k, len(x)-1), F.normalize(x.double())
    W, _ = build_graph(x, k, gamma, backend)
    named = torch.zeros(len(x), len(x)).scatter_(1, knn(unit_rows(x), k, backend)[1], 1.) > 0
    assert (named.sum(1) == k).all()
    close(check_affinity(W), affinity_by_loops(u@u.T, named, gamma), 2e-4)  # a length that is 1 to 1e-5 is left as it is


@given(graphs())
def test_root_of_degree_is_an_eigenvector(W):
    "S√d = √d, d = W·1; the rows of isolated items are 0"
    S, d = normalize(sparse(W))
    close(d, W.sum(1))
    S = S.to_dense()
    close(S, S.T)
    close(S@d.sqrt(), d.sqrt())
    assert not S[d == 0].any() and (d[d > 0] > 0).all()


@given(problems(), alphas, st.sampled_from(['class_size', 'raw']))
def test_mass_is_conserved_in_each_component(problem, alpha, how):
    "√dᵀZ = √dᵀY/(1−α) on each component, as √dᵀS = √dᵀ; Z = Y for isolated items"
    W, y, c = problem
    Y = seed_matrix(y, c, how).double()
    Z, d = solved(W, Y, alpha), W.sum(1)
    def mass(Z): return torch.zeros_like(Z).index_add_(0, parts(W), d.sqrt()[:, None]*Z)
    torch.testing.assert_close(mass(Z), mass(Y)/(1-alpha), rtol=1e-8, atol=1e-8*d.max().item()**.5)
    close(Z[d == 0], Y[d == 0])


@given(problems(), alphas)
def test_scores_are_not_negative(problem, alpha):
    "Z = Σ (αS)^t Y ≥ 0, and Z ≥ Y; 0 exactly where no label of the class is in the component"
    W, y, c = problem
    Y, part = seed_matrix(y, c, 'raw').double(), parts(W)
    Z = solved(W, Y, alpha)
    assert (Z >= Y-1e-9).all()
    assert (Z[torch.zeros_like(Z).index_add_(0, part, Y)[part] == 0] == 0).all()


@given(problems(), alphas, samples)
def test_items_and_classes_may_be_renumbered_on_a_graph(problem, alpha, seed):
    "Z(PWPᵀ, PYQ) = P·Z(W, Y)·Q"
    W, y, c = problem
    g = generator(seed)
    P, Q = torch.randperm(len(W), generator=g), torch.randperm(c, generator=g)
    Y = seed_matrix(y, c).double()
    close(solved(W[P][:, P], Y[P][:, Q], alpha), solved(W, Y, alpha)[P][:, Q])


def pseudo(x, y, c, k): return propagate(x, y, c, k=k, alpha=.8, max_iter=500, tol=1e-6, omega_norm=None)


def check_same(p, q, graph=False):
    "Pseudo-labels are the same to rounding, labels where the best score stands out"
    scale = p.Z.max()
    if graph: torch.testing.assert_close(q.W.to_dense(), p.W.to_dense(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(q.Z, p.Z, rtol=0, atol=3e-4*scale.item())
    assert torch.equal(q.reached, p.reached) and torch.equal(q.labeled, p.labeled)
    top = F.pad(p.Z, (0, 1)).topk(2)[0]
    clear = (top[:, 0]-top[:, 1] > .003*scale) | p.labeled | ~p.reached
    assert torch.equal(q.labels[clear], p.labels[clear])
    clear &= top[:, 0] > .1*scale
    torch.testing.assert_close(q.certainty[clear], p.certainty[clear], rtol=0, atol=.01)


@given(clear_problems(), samples)
def test_items_and_classes_may_be_renumbered_through_the_search(problem, seed):
    x, y, c, k = problem
    g = generator(seed)
    P, Q = torch.randperm(len(x), generator=g), torch.randperm(c, generator=g)
    p, q = pseudo(x, y, c, k), pseudo(x[P], torch.where(y >= 0, Q[y.clamp(min=0)], -1)[P], c, k)
    back, q.Z = P.argsort(), q.Z[:, Q]
    q.labels = torch.where(q.labels >= 0, Q.argsort()[q.labels.clamp(min=0)], -1)
    q.W = sparse(q.W.to_dense()[back][:, back])
    for name in ('Z', 'labels', 'certainty', 'labeled', 'reached'): setattr(q, name, getattr(q, name)[back])
    check_same(p, q, graph=True)


@given(clear_problems(), samples)
def test_descriptors_may_be_rotated(problem, seed):
    "Cosines are those of xQ, QᵀQ = I"
    x, y, c, k = problem
    Q = torch.linalg.qr(normal(seed, x.shape[1], x.shape[1]))[0]
    check_same(pseudo(x, y, c, k), pseudo((x.double()@Q).float(), y, c, k), graph=True)


@given(clear_problems(), st.data())
def test_descriptors_may_be_scaled(problem, data):
    "Each by a factor of its own from 1e-30 to 1e30, or all by one"
    x, y, c, k = problem
    powers = data.draw(st.integers(-30, 30) | tensors((len(x), 1), st.floats(-30, 30)), 'powers of ten')
    check_same(pseudo(x, y, c, k), pseudo((x.double()*10.**powers).float(), y, c, k), graph=True)


@given(descriptors(), st.data())
def test_unit_rows_of_any_length(x, data):
    "‖x‖ from 1e-37 to 1e37: x/‖x‖; a zero row stays zero"
    u = F.normalize(x.double())
    norms = 10**data.draw(tensors((len(x), 1), st.integers(-37, 37)), 'norms, as powers of ten')
    close(unit_rows((u*norms).float()), u.float(), 1e-6)


@given(problems(), st.floats(-30, 30), options)
def test_the_affinity_may_be_scaled(problem, power, options):
    "S(cW) = S(W), d(cW) = c·d(W), and the pseudo-labels with it"
    W, y, c = problem
    W, cW = W.float(), (W*10**power).float()
    (S, d), (cS, cd) = normalize(sparse(W)), normalize(sparse(cW))
    torch.testing.assert_close(cS.to_dense(), S.to_dense(), rtol=1e-5, atol=0)
    torch.testing.assert_close(cd.double(), d.double()*10**power, rtol=1e-5, atol=0)
    options |= dict(alpha=.8, max_iter=500, omega_norm=None, keep_Z=True)
    check_same(spread(sparse(W), y, c, **options), spread(sparse(cW), y, c, **options))


@given(graphs(), classes, alphas, decimals, decimals, st.data())
def test_solution_is_linear_in_the_seeds(W, c, alpha, a, b, data):
    "Z(aY₁ + bY₂) = aZ(Y₁) + bZ(Y₂)"
    Y1, Y2 = (data.draw(tensors((len(W), c), decimals)) for _ in range(2))
    close(solved(W, a*Y1 + b*Y2, alpha), a*solved(W, Y1, alpha) + b*solved(W, Y2, alpha), 1e-7)


@given(graphs(), classes, alphas, st.just(0.) | st.floats(.01, 100), st.data())
def test_twins_get_the_same_scores(W, c, alpha, edge, data):
    "W_ui = W_vi for all other i, no seed on u and v: Z_u = Z_v, whether or not there is an edge between the two"
    n, u = len(W), data.draw(st.integers(0, len(W)-1), 'u')
    W = torch.cat([W, W[u:u+1]])
    W = torch.cat([W, F.pad(W[u], (0, 1))[:n+1, None]], 1)
    W[u, n] = W[n, u] = edge
    Y = data.draw(tensors((n+1, c), decimals))
    Y[[u, n]] = 0
    Z = solved(W, Y, alpha)
    close(Z[u], Z[n])


@given(problems(), alphas, st.data())
def test_a_further_label_lowers_no_score_of_its_class(problem, alpha, data):
    "Z(Y + e_i e_jᵀ) − Z(Y) = (I − αS)⁻¹ e_i in column j, ≥ 0, at i ≥ 1; 0 in the other columns"
    W, y, c = problem
    free = (y < 0).nonzero().flatten().tolist()
    assume(free)
    i, j = data.draw(st.sampled_from(free), 'i'), data.draw(st.integers(0, c-1), 'j')
    more = y.clone()
    more[i] = j
    gain = solved(W, seed_matrix(more, c, 'raw').double(), alpha) - solved(W, seed_matrix(y, c, 'raw').double(), alpha)
    assert (gain[:, j] >= -1e-9).all() and gain[i, j] >= 1-1e-9
    close(gain[:, torch.arange(c) != j], torch.zeros(len(W), c-1).double())


def on_k2(n, a):
    "(I − αS)⁻¹ = [[1, α], [α, 1]]/(1−α²)"
    return torch.tensor([[1, a], [a, 1]], dtype=torch.float64)/(1-a*a)


def on_complete(n, a):
    "S = (J−I)/(n−1), J all ones: (I − αS)⁻¹ = (I + β/(1−α)·J)/(1+β), β = α/(n−1)"
    b = a/(n-1)
    return (torch.eye(n).double() + b/(1-a))/(1+b)


def on_cycle(n, a):
    "At a distance of m: (λ^m + λ^(n−m))/(√(1−α²)·(1−λ^n)), λ = α/(1+√(1−α²)): λ^|m|/√(1−α²) of the endless line, wound around"
    root, m = (1-a*a)**.5, (torch.arange(n)[:, None]-torch.arange(n)).abs().double()
    l = a/(1+root)
    return (l**m + l**(n-m))/(root*(1-l**n))


def on_star(n, a):
    "m = n−1 leaves, S = 1/√m between them and the centre: 1/(1−α²) at the centre, α/(√m(1−α²)) to a leaf, [l = l′] + α²/(m(1−α²)) between leaves"
    e, m = 1/(1-a*a), n-1
    M = torch.eye(n).double() + a*a*e/m
    M[0], M[:, 0], M[0, 0] = a*e/m**.5, a*e/m**.5, e
    return M


def ring(n): return torch.eye(n).roll(1, 0) + torch.eye(n).roll(-1, 0)


def complete(n): return 1-torch.eye(n)


def star(n): return torch.eye(n)[0] + torch.eye(n)[:, :1] - 2*torch.eye(n)[0]*torch.eye(n)[:, :1]


@pytest.mark.parametrize('formula, graph, n', [
    (on_k2, complete, st.just(2)), (on_complete, complete, st.integers(2, 40)), (on_cycle, ring, st.integers(3, 40)), (on_star, star, st.integers(2, 40))], ids=['two items', 'complete', 'cycle', 'star'])
@given(data=st.data(), alpha=st.floats(0, .999), w=st.floats(1e-3, 1e3))
def test_closed_forms(formula, graph, n, data, alpha, w):
    n = data.draw(n, 'n')
    close(solved(w*graph(n).double(), torch.eye(n).double(), alpha), formula(n, alpha), 1e-8)


@given(problems(), st.floats(.1, .99), st.integers(1, 8))
def test_after_m_steps_labels_have_come_m_1_edges_far(problem, alpha, m):
    "Z = Σ_{t<m} a_t S^t Y with a_{m−1} > 0: 0 exactly beyond m−1 edges from all seeds of the class, > 0 at m−1"
    W, y, c = problem
    Z, n_iter, _ = diffuse(normalize(sparse(W))[0], seed_matrix(y, c).double(), alpha, max_iter=m, tol=0)
    hops = torch.from_numpy(shortest_path(W.numpy(), unweighted=True, directed=False))
    far = torch.stack([hops[y == j].amin(0) for j in range(c)], 1)
    assert n_iter <= m and (Z[far > m-1] == 0).all() and (Z[far == m-1] > 0).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@given(problem=problems(), alpha=alphas, m=st.integers(1, 300))
def test_steps_beyond_convergence_do_no_harm(dtype, problem, alpha, m):
    "Z after any number of steps at tol = 0 is finite, and solves (I − αS)Z = Y where there were enough of them"
    W, y, c = problem
    Z, _, residual = diffuse(normalize(sparse(W))[0].to(dtype), seed_matrix(y, c).to(dtype), alpha, max_iter=m, tol=0)
    assert torch.isfinite(Z).all() and (m < 200 or residual.max() < 1e-3)


@given(scores(np.float64))
def test_certainty_is_one_less_the_entropy(Z):
    "ω = 1 − H(row/Σ row)/log c, in [0, 1]; 0 for a row of zeros"
    omega, some = certainty(Z), Z.any(1)
    assert ((omega >= 0) & (omega <= 1)).all() and (omega[~some] == 0).all()
    np.testing.assert_allclose(omega[some], 1 - entropy(Z[some].numpy(), axis=1)/np.log(Z.shape[1]), rtol=0, atol=1e-12)


@given(st.integers(2, 200), st.floats(-30, 30), st.data())
def test_certainty_of_uniform_and_one_hot_rows(c, power, data):
    "ω(a·1) = 0, ω(a·e_j) = 1"
    a, j = 10**power, data.draw(st.integers(0, c-1), 'j')
    Z = torch.stack([torch.full((c,), a), a*torch.eye(c)[j]])
    omega = certainty(Z)
    assert 0 <= omega[0] < 1e-6 and omega[1] == 1


@given(scores(), st.data())
def test_certainty_of_a_scaled_row(Z, data):
    "ω(aZ) = ω(Z), a > 0 for each row"
    powers = data.draw(tensors((len(Z), 1), st.floats(-30, 30)), 'powers of ten')
    torch.testing.assert_close(certainty((Z*10**powers).float()), certainty(Z), rtol=0, atol=1e-5)


@given(scores(c=st.integers(1, 12)), st.data())
def test_scores_block_by_block_are_those_of_the_whole(Z, data):
    "Whatever the blocks, for rows of any size: the same ω, the same best class, the first of equal ones"
    n, c = Z.shape
    Z = (Z*10**data.draw(tensors((n, 1), st.floats(-30, 30)), 'powers of ten')).float()
    ends = sorted({c, *data.draw(st.sets(st.integers(1, c)), 'ends of blocks')})
    rows = _Rows(n, 'cpu')
    for a, b in zip([0, *ends], ends): rows.add(Z[:, a:b], a)
    torch.testing.assert_close(rows.certainty(c), certainty(Z), rtol=0, atol=1e-5)
    assert torch.equal(rows.peak, Z.amax(1)) and torch.equal(rows.top, Z.argmax(1))


@given(problems(), options)
def test_scores_need_not_be_kept(problem, options):
    W, y, c = problem
    a, b = (spread(sparse(W.float()), y, c, **{**options, 'keep_Z': o}) for o in (True, False))
    assert b.Z is None and torch.equal(a.labels, b.labels) and torch.equal(a.reached, b.reached) and torch.equal(a.class_weights, b.class_weights)
    torch.testing.assert_close(a.certainty, b.certainty, rtol=0, atol=1e-5)


def check_weights(p, y):
    "Given labels stay; 0 ≤ ω·ζ ≤ max ζ; ω = 1 for labeled items; weight 0 and label −1 for unreached ones, and for these alone"
    given, weights = y >= 0, p.weights
    assert torch.equal(p.labeled, given) and torch.equal(p.labels[given], y[given]) and (p.certainty[given] == 1).all()
    assert torch.isfinite(weights).all() and ((weights >= 0) & (weights <= p.class_weights.max())).all() and ((p.certainty >= 0) & (p.certainty <= 1)).all()
    assert (weights[~p.reached] == 0).all() and torch.equal(p.labels == -1, ~p.reached)
    if p.Z is not None: assert torch.equal(p.labels[p.reached & ~given], p.Z.argmax(1)[p.reached & ~given])


@given(problems(), options)
def test_labels_and_weights_of_a_diffusion(problem, options):
    "And an item is reached only from its component"
    W, y, c = problem
    p, part = spread(sparse(W.float()), y, c, **options), parts(W)
    check_weights(p, y)
    assert not p.reached[~torch.isin(part, part[y >= 0])].any()


@given(descriptors(), st.integers(1, 39), st.data(), options)
def test_labels_and_weights_of_descriptors(x, k, data, options):
    y, c = data.draw(labels_of(len(x)), 'labels')
    check_weights(propagate(x, y, c, k=min(k, len(x)-1), **options), y)


@given(scores(c=st.integers(1, 6)), st.data())
def test_labels_and_weights_of_any_scores(Z, data):
    n, c = Z.shape
    y = data.draw(tensors(n, st.integers(-1, c-1), np.int64), 'labels')
    assume((y >= 0).any())
    check_weights(from_scores(Z, y, data.draw(st.sampled_from(['all', 'unlabeled', None])), data.draw(st.sampled_from(['items', 'classes']))), y)


@given(classes.flatmap(lambda c: st.tuples(st.just(c+2), st.lists(st.integers(-1, c+1), min_size=1, max_size=40))))
def test_class_weights_balance_the_classes(case):
    "count_j·ζ_j is the same for all classes that have items, 0 for the others; ζ averages 1 over items, or over classes"
    c, labels = case[0], torch.tensor(case[1])
    labeled = labels[labels >= 0]
    assume(len(labeled))
    count = torch.bincount(labeled, minlength=c)
    for norm in ('items', 'classes'):
        zeta = class_weights(labels, c, norm)
        assert (zeta[count == 0] == 0).all() and (zeta > 0)[count > 0].all()
        total = (count*zeta)[count > 0]
        torch.testing.assert_close(total, total[:1].expand_as(total), rtol=1e-5, atol=0)
        torch.testing.assert_close(zeta[labeled].mean() if norm == 'items' else zeta.mean(), torch.tensor(1.))


@given(st.integers(0, 5), classes, st.sampled_from(['items', 'classes']))
def test_class_weights_without_any_label(n, c, norm):
    "ζ_j = 0 for a class without items, all of them too"
    assert not class_weights(torch.full((n,), -1), c, norm).any()


@given(problems())
def test_seeds_of_a_class_sum_to_one_or_are_one(problem):
    "Σ_i Y_ij = 1 ('class_size'), Y_ij = [y_i = j] ('raw')"
    _, y, c = problem
    raw, by_size = (seed_matrix(y, c, o) for o in ('raw', 'class_size'))
    assert torch.equal(raw, (y[:, None] == torch.arange(c)).float())
    torch.testing.assert_close(by_size.sum(0), torch.ones(c))
    torch.testing.assert_close(by_size*raw.sum(0), raw)


BASES = dict(function=F.cross_entropy, module=torch.nn.CrossEntropyLoss(), smoothed=torch.nn.CrossEntropyLoss(label_smoothing=.1),
    fastai=CrossEntropyLossFlat(), smoothed_fastai=LabelSmoothingCrossEntropyFlat())


@st.composite
def batches(draw):
    "(logits [b, c], labels [b])"
    b, c = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    return draw(tensors((b, c), st.floats(-50, 50, width=32), np.float32)), draw(tensors(b, st.integers(0, c-1), np.int64))


def loss_and_gradient(loss, pred, target):
    pred = pred.clone().requires_grad_()
    value = loss(pred, target)
    return value.detach(), torch.autograd.grad(value, pred)[0]


@pytest.mark.parametrize('base', BASES)
@given(batch=batches())
@settings(max_examples=40)
def test_all_weights_one_is_plain_cross_entropy(base, batch):
    "ω = ζ = 1: its value and its gradient"
    pred, labels = batch
    weighted = loss_and_gradient(PseudoLabelLoss(BASES[base]), pred, weighted_targets(labels, torch.ones(len(labels)), pred.shape[1]))
    for a, b in zip(weighted, loss_and_gradient(BASES[base], pred, labels)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('base', BASES)
@given(batch=batches(), data=st.data())
@settings(max_examples=40)
def test_a_weight_scales_its_items_gradient(base, batch, data):
    "The gradient of row i is w_i times the plain one; 0 exactly where w_i = 0, or where there is no label"
    pred, labels = batch
    weights = data.draw(tensors(len(labels), st.just(0.) | st.floats(.125, 8, width=32), np.float32), 'weights')
    none = data.draw(tensors(len(labels), st.integers(0, 3), np.int64), 'no label where 0') == 0
    _, grad = loss_and_gradient(PseudoLabelLoss(BASES[base]), pred, weighted_targets(torch.where(none, -1, labels), weights, pred.shape[1]))
    _, plain = loss_and_gradient(BASES[base], pred, labels)
    weights = torch.where(none, 0, weights)
    assert not grad[weights == 0].any()
    torch.testing.assert_close(grad, weights[:, None]*plain, rtol=1e-5, atol=1e-6)


def engines(n):
    "'faiss', 'torch', or torch with a number of bytes"
    return st.sampled_from(['faiss', 'torch']) | st.integers(1, 64) | st.integers(1, 4*n*n) | st.integers(2**12, 2**19)


@given(descriptors(), st.booleans(), st.data())
def test_neighbors_are_scikit_learns(x, unit, data):
    "The same similarities; the same neighbours but among equal similarities; by cosine, or by inner products of any rows; no item its own"
    if unit: x = F.normalize(x)  # not `unit_rows`: it leaves lengths that are 1 to 1e-5
    n = len(x)
    k, engine, rows = data.draw(st.integers(1, n-1), 'k'), data.draw(engines(n), 'engine'), torch.arange(n)
    s = x.double()@x.double().T
    if unit: distance = NearestNeighbors(n_neighbors=k, metric='cosine', algorithm='brute').fit(x.double().numpy()).kneighbors()[0]
    else: distance = NearestNeighbors(n_neighbors=k, metric='precomputed', algorithm='brute').fit((s.max()-s).fill_diagonal_(0).numpy()).kneighbors()[0]
    ref = (1 if unit else s.max().item()) - torch.from_numpy(distance)
    if isinstance(engine, str): sims, idxs = knn(x, k, engine)
    else:
        rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n-1), min_size=1), 'rows'))) if data.draw(st.booleans(), 'some rows') else rows
        sims, idxs = _exact_torch(x, k, rows, engine)
    tol = 1e-6*max(1, s.diagonal().max().item())
    s = s.fill_diagonal_(-torch.inf)[rows]
    assert not (idxs == rows[:, None]).any() and (sims[:, 1:] <= sims[:, :-1]).all()
    named = torch.zeros_like(s).scatter_(1, idxs, 1.) > 0
    assert (named.sum(1) == k).all()
    torch.testing.assert_close(sims.double(), ref[rows], rtol=0, atol=tol)
    torch.testing.assert_close(sims.double(), s.gather(1, idxs), rtol=0, atol=tol)
    last = ref[rows][:, -1:]
    assert (named | (s < last+2*tol)).all() and (s[named] > (last-2*tol).expand_as(s)[named]).all()
