"Laws of the graph, the diffusion, the weights and the loss, for random features, graphs, labels and scores."
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

from fastai_lp.learner.losses import PseudoLabelLoss, weighted_targets
from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.graph import csr, normalize
from fastai_lp.transductive.neighbors import knn, unit_rows
from fastai_lp.transductive.propagate import build_graph, propagate, seed_matrix, spread
from fastai_lp.transductive.scoring import BlockScores, certainty, class_weights, from_scores

samples, alphas, classes = st.integers(0, 2**32-1), st.floats(0, .99), st.integers(1, 4)
decimals = st.integers(-4000, 4000).map(lambda o: o/1000)  # far from underflow, also when squared
norms = dict(omega_norm=st.sampled_from(['all', 'unlabeled', None]), zeta_norm=st.sampled_from(['items', 'classes']))
options = st.fixed_dictionaries(dict(norms, alpha=alphas, max_iter=st.integers(1, 30), keep_Z=st.booleans(),
    seeds=st.sampled_from(['class_size', 'raw'])))


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


def components(W): return torch.from_numpy(connected_components(W.numpy(), directed=False)[1]).long()


def tensors(shape, elements, dtype=np.float64): return arrays(dtype, shape, elements=elements, fill=st.nothing()).map(torch.from_numpy)


# Random problems

@st.composite
def features(draw, grid=True):
    "float32 [n, d], Gaussian or (`grid`) quarters, which have ties; some rows equal to others, nearly equal, or zero"
    n, d = draw(st.integers(2, 40)), draw(st.integers(1, 8))
    if grid and draw(st.booleans()): x = draw(arrays(np.int64, (n, d), elements=st.integers(-8, 8)).map(torch.from_numpy))/4
    else: x = normal(draw(samples), n, d).float()
    item = st.integers(0, n-1)
    for i, j, how in draw(st.lists(st.tuples(item, item, st.sampled_from(['equal', 'near', 'zero'])), max_size=6)):
        x[i] = dict(equal=x[j], near=x[j]+1e-6, zero=0*x[j])[how]
    return x


@st.composite
def graphs(draw, weights=st.integers(1, 8).map(lambda o: o/4) | st.floats(1e-3, 1e3)):
    "Symmetric dense float64 W [n, n] with any number of components, including isolated items"
    n = draw(st.integers(2, 30))
    item, m = st.integers(0, n-1), draw(st.integers(0, 3*n))
    W = torch.zeros(n, n, dtype=torch.float64)
    for i, j, w in draw(st.lists(st.tuples(item, item, weights), min_size=m, max_size=m)):
        if i != j: W[i, j] = W[j, i] = w
    return W


@st.composite
def labels_of(draw, n):
    "(y [n], c), most items unlabeled, at least one label per class"
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
    "(x, y, c, k) in which rounding changes no edge: the k similarities are away from 0 and from the next one, or negative"
    x = draw(features(grid=False))
    s = F.normalize(x.double()) @ F.normalize(x.double()).T
    none = (x == 0).all(1)
    s[none], s[:, none] = -1, -1
    s = s.fill_diagonal_(-1).sort(1, descending=True)[0]
    def is_clear(k): return (s[:, :k].abs() > .05).all() and ((s[:, k-1]-s[:, k] > 1e-4) | (s[:, k-1] < 0)).all()
    k = [k for k in range(1, len(x)) if is_clear(k)]
    assume(k)
    return x, *draw(labels_of(len(x))), draw(st.sampled_from(k))


@st.composite
def scores(draw, dtype=np.float32, c=st.integers(2, 12)):
    "Z [n, c] ≥ 0 with large and small entries, zeros, and rows of zeros"
    n, c = draw(st.integers(1, 12)), draw(c)
    entries = st.floats(float(np.float32(1e-6)), 1, width=np.dtype(dtype).itemsize*8)
    Z = draw(tensors((n, c), entries | entries | st.just(0.), dtype))
    Z[draw(st.lists(st.integers(0, n-1), max_size=3))] = 0
    return Z


# Neighbors and graph

@given(features(), st.booleans(), st.data())
def test_knn_equals_scikit_learn(x, unit, data):
    "The same similarities, and the same neighbors except among equal similarities; by cosine or by inner product"
    if unit: x = F.normalize(x)
    n = len(x)
    k = data.draw(st.integers(1, n-1), 'k')
    chunk = st.integers(1, 64) | st.integers(1, 4*n*n) | st.integers(2**12, 2**19)
    search = data.draw(st.just(dict(backend='faiss')) | chunk.map(lambda o: dict(backend='torch', chunk_bytes=o)), 'search')
    s = x.double()@x.double().T
    if unit: distance = NearestNeighbors(n_neighbors=k, metric='cosine', algorithm='brute').fit(x.double().numpy()).kneighbors()[0]
    else:
        below = (s.max()-s).fill_diagonal_(0).numpy()
        distance = NearestNeighbors(n_neighbors=k, metric='precomputed', algorithm='brute').fit(below).kneighbors()[0]
    expected = (1 if unit else s.max().item()) - torch.from_numpy(distance)
    sims, idxs = knn(x, k, **search)
    tol = 1e-6*max(1, s.diagonal().max().item())
    s = s.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(sims.double(), expected, rtol=0, atol=tol)
    torch.testing.assert_close(sims.double(), s.gather(1, idxs), rtol=0, atol=tol)
    named = torch.zeros_like(s).scatter_(1, idxs, 1.) > 0
    last = expected[:, -1:]
    assert (named.sum(1) == k).all()
    assert (named | (s < last+2*tol)).all()
    assert (s[named] > (last-2*tol).expand_as(s)[named]).all()


@given(features(), st.data())
def test_unit_rows_of_any_length(x, data):
    "x/‖x‖ for norms from 1e-37 to 1e37; a zero row stays zero"
    u = F.normalize(x.double())
    lengths = 10**data.draw(tensors((len(x), 1), st.integers(-37, 37)), 'norms, as powers of ten')
    close(unit_rows((u*lengths).float()), u.float(), 1e-6)


@given(features(), st.integers(1, 39), st.floats(1, 5), st.sampled_from(['faiss', 'torch']))
def test_graph_of_features(x, k, gamma, backend):
    "W_ij = ([j ∈ N_i] + [i ∈ N_j])·max(s_ij, 0)^γ, W_ii = 0"
    k, u = min(k, len(x)-1), F.normalize(x.double())
    W, found = build_graph(x, k, gamma, backend)
    named = torch.zeros(len(x), len(x)).scatter_(1, knn(unit_rows(x), k, backend)[1], 1.)
    expected = (named + named.T)*(u@u.T).clamp(min=0)**gamma
    assert found == dict(recall=1, dims=0, proven=0)
    close(W.to_dense().double(), expected.fill_diagonal_(0), 2e-4)  # `unit_rows` leaves norms that are 1 to within 1e-5


@given(graphs())
def test_root_of_degree_is_an_eigenvector(W):
    "S√d = √d with d = W·1; rows of isolated items are 0"
    S, d = normalize(sparse(W))
    close(d, W.sum(1))
    S = S.to_dense()
    close(S, S.T)
    close(S@d.sqrt(), d.sqrt())
    assert not S[d == 0].any()


# Diffusion

@given(problems(), alphas, st.sampled_from(['class_size', 'raw']))
def test_mass_is_conserved_in_each_component(problem, alpha, how):
    "√dᵀZ = √dᵀY/(1−α) on each component, because √dᵀS = √dᵀ; Z = Y for isolated items"
    W, y, c = problem
    Y = seed_matrix(y, c, how).double()
    Z, d = solved(W, Y, alpha), W.sum(1)
    def mass(Z): return torch.zeros_like(Z).index_add_(0, components(W), d.sqrt()[:, None]*Z)
    torch.testing.assert_close(mass(Z), mass(Y)/(1-alpha), rtol=1e-8, atol=1e-8*d.max().item()**.5)
    close(Z[d == 0], Y[d == 0])


@given(problems(), alphas)
def test_scores_are_not_negative(problem, alpha):
    "Z = Σ (αS)^t Y ≥ Y ≥ 0; exactly 0 if no label of the class is in the component"
    W, y, c = problem
    Y, part = seed_matrix(y, c, 'raw').double(), components(W)
    Z = solved(W, Y, alpha)
    assert (Z >= Y-1e-9).all()
    assert not Z[torch.zeros_like(Z).index_add_(0, part, Y)[part] == 0].any()


@given(graphs(), classes, alphas, decimals, decimals, st.data())
def test_solution_is_linear_in_the_labels(W, c, alpha, a, b, data):
    "Z(aY₁ + bY₂) = aZ(Y₁) + bZ(Y₂)"
    Y1, Y2 = (data.draw(tensors((len(W), c), decimals)) for _ in range(2))
    close(solved(W, a*Y1 + b*Y2, alpha), a*solved(W, Y1, alpha) + b*solved(W, Y2, alpha), 1e-7)


@given(graphs(), classes, alphas, st.just(0.) | st.floats(.01, 100), st.data())
def test_twins_get_equal_scores(W, c, alpha, edge, data):
    "If W_ui = W_vi for all other i, and u and v are unlabeled, then Z_u = Z_v, with or without an edge between them"
    n, u = len(W), data.draw(st.integers(0, len(W)-1), 'u')
    W = torch.cat([W, W[u:u+1]])
    W = torch.cat([W, F.pad(W[u], (0, 1))[:n+1, None]], 1)
    W[u, n] = W[n, u] = edge
    Y = data.draw(tensors((n+1, c), decimals))
    Y[[u, n]] = 0
    Z = solved(W, Y, alpha)
    close(Z[u], Z[n])


@given(problems(), alphas, st.data())
def test_another_label_lowers_no_score_of_its_class(problem, alpha, data):
    "Z(Y + e_i e_jᵀ) − Z(Y) is (I − αS)⁻¹ e_i ≥ 0 in column j, at least 1 at item i, and 0 in the other columns"
    W, y, c = problem
    free = (y < 0).nonzero().flatten().tolist()
    assume(free)
    i, j = data.draw(st.sampled_from(free), 'i'), data.draw(st.integers(0, c-1), 'j')
    more = y.clone()
    more[i] = j
    gain = solved(W, seed_matrix(more, c, 'raw').double(), alpha) - solved(W, seed_matrix(y, c, 'raw').double(), alpha)
    assert (gain[:, j] >= -1e-9).all()
    assert gain[i, j] >= 1-1e-9
    close(gain[:, torch.arange(c) != j], torch.zeros(len(W), c-1).double())


def on_complete(n, a):
    "S = (J−I)/(n−1) with J all ones: (I − αS)⁻¹ = (I + β/(1−α)·J)/(1+β), β = α/(n−1)"
    b = a/(n-1)
    return (torch.eye(n).double() + b/(1-a))/(1+b)


def on_cycle(n, a):
    "(λ^m + λ^(n−m))/(√(1−α²)·(1−λ^n)) at distance m, with λ = α/(1+√(1−α²))"
    root, m = (1-a*a)**.5, (torch.arange(n)[:, None]-torch.arange(n)).abs().double()
    l = a/(1+root)
    return (l**m + l**(n-m))/(root*(1-l**n))


def on_star(n, a):
    "With m = n−1 leaves: e = 1/(1−α²) at the center, αe/√m to a leaf, [l = l′] + α²e/m between leaves"
    e, m = 1/(1-a*a), n-1
    M = torch.eye(n).double() + a*a*e/m
    M[0], M[:, 0], M[0, 0] = a*e/m**.5, a*e/m**.5, e
    return M


def cycle(n): return torch.eye(n).roll(1, 0) + torch.eye(n).roll(-1, 0)


def complete(n): return 1-torch.eye(n)


def star(n): return torch.eye(n)[0] + torch.eye(n)[:, :1] - 2*torch.eye(n)[0]*torch.eye(n)[:, :1]


CLOSED_FORMS = dict(complete=(on_complete, complete, 2), cycle=(on_cycle, cycle, 3), star=(on_star, star, 2))


@pytest.mark.parametrize('formula, graph, least', CLOSED_FORMS.values(), ids=CLOSED_FORMS)
@given(data=st.data(), alpha=st.floats(0, .999), w=st.floats(1e-3, 1e3))
def test_closed_forms(formula, graph, least, data, alpha, w):
    n = data.draw(st.integers(least, 40), 'n')
    close(solved(w*graph(n).double(), torch.eye(n).double(), alpha), formula(n, alpha), 1e-8)


@given(problems(), st.floats(.1, .99), st.integers(1, 8))
def test_labels_move_one_edge_per_iteration(problem, alpha, m):
    "After m iterations, Z is 0 beyond m−1 edges from all labels of the class, and positive at m−1 edges"
    W, y, c = problem
    Z, n_iter, _ = diffuse(normalize(sparse(W))[0], seed_matrix(y, c).double(), alpha, max_iter=m, tol=0)
    hops = torch.from_numpy(shortest_path(W.numpy(), unweighted=True, directed=False))
    far = torch.stack([hops[y == j].amin(0) for j in range(c)], 1)
    assert n_iter <= m
    assert not Z[far > m-1].any()
    assert (Z[far == m-1] > 0).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@given(problem=problems(), alpha=alphas, m=st.integers(1, 300))
def test_iterations_beyond_convergence_are_harmless(dtype, problem, alpha, m):
    W, y, c = problem
    Z, _, residual = diffuse(normalize(sparse(W))[0].to(dtype), seed_matrix(y, c).to(dtype), alpha, max_iter=m, tol=0)
    assert torch.isfinite(Z).all()
    assert m < 200 or residual.max() < 1e-3


# Invariance of the pseudo-labels

def pseudo(x, y, c, k): return propagate(x, y, c, k=k, alpha=.8, max_iter=500, tol=1e-6, omega_norm=None)


def check_same(p, q, graph=True):
    "Equal up to rounding; labels only if the best score stands out"
    scale = p.Z.max()
    if graph: torch.testing.assert_close(q.W.to_dense(), p.W.to_dense(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(q.Z, p.Z, rtol=0, atol=3e-4*scale.item())
    assert torch.equal(q.reached, p.reached)
    assert torch.equal(q.labeled, p.labeled)
    top = F.pad(p.Z, (0, 1)).topk(2)[0]
    clear = (top[:, 0]-top[:, 1] > .003*scale) | p.labeled | ~p.reached
    assert torch.equal(q.labels[clear], p.labels[clear])
    clear &= top[:, 0] > .1*scale
    torch.testing.assert_close(q.certainty[clear], p.certainty[clear], rtol=0, atol=.01)


@given(clear_problems(), samples)
def test_renumbering_items_and_classes(problem, seed):
    x, y, c, k = problem
    g = generator(seed)
    P, Q = torch.randperm(len(x), generator=g), torch.randperm(c, generator=g)
    p, q = pseudo(x, y, c, k), pseudo(x[P], torch.where(y >= 0, Q[y.clamp(min=0)], -1)[P], c, k)
    back, q.Z = P.argsort(), q.Z[:, Q]
    q.labels = torch.where(q.labels >= 0, Q.argsort()[q.labels.clamp(min=0)], -1)
    q.W = sparse(q.W.to_dense()[back][:, back])
    for name in ('Z', 'labels', 'certainty', 'labeled', 'reached'): setattr(q, name, getattr(q, name)[back])
    check_same(p, q)


@given(clear_problems(), samples)
def test_rotating_the_features(problem, seed):
    "xQ has the same cosines if QᵀQ = I"
    x, y, c, k = problem
    Q = torch.linalg.qr(normal(seed, x.shape[1], x.shape[1]))[0]
    check_same(pseudo(x, y, c, k), pseudo((x.double()@Q).float(), y, c, k))


@given(clear_problems(), st.data())
def test_scaling_the_features(problem, data):
    "By one factor from 1e-30 to 1e30, or by one for each row"
    x, y, c, k = problem
    powers = data.draw(st.integers(-30, 30) | tensors((len(x), 1), st.floats(-30, 30)), 'powers of ten')
    check_same(pseudo(x, y, c, k), pseudo((x.double()*10.**powers).float(), y, c, k))


@given(problems(), st.floats(-30, 30), options)
def test_scaling_the_affinity(problem, power, options):
    "S(aW) = S(W) and d(aW) = a·d(W)"
    W, y, c = problem
    W, aW = W.float(), (W*10**power).float()
    (S, d), (aS, ad) = normalize(sparse(W)), normalize(sparse(aW))
    torch.testing.assert_close(aS.to_dense(), S.to_dense(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ad.double(), d.double()*10**power, rtol=1e-5, atol=0)
    options |= dict(alpha=.8, max_iter=500, omega_norm=None, keep_Z=True)
    check_same(spread(sparse(W), y, c, **options), spread(sparse(aW), y, c, **options), graph=False)


# Weights

@given(scores(np.float64))
def test_certainty_is_one_minus_the_entropy(Z):
    "ω = 1 − H(row/Σ row)/log c; 0 for a row of zeros"
    omega, some = certainty(Z), Z.any(1)
    assert not omega[~some].any()
    np.testing.assert_allclose(omega[some], 1 - entropy(Z[some].numpy(), axis=1)/np.log(Z.shape[1]), rtol=0, atol=1e-12)


@given(scores(), st.data())
def test_certainty_does_not_depend_on_the_scale(Z, data):
    powers = data.draw(tensors((len(Z), 1), st.floats(-30, 30)), 'powers of ten')
    torch.testing.assert_close(certainty((Z*10**powers).float()), certainty(Z), rtol=0, atol=1e-5)


@given(scores(c=st.integers(1, 12)), st.data())
def test_scores_in_blocks(Z, data):
    "For any blocks and rows of any size: the same certainty, and the same best class, the first of equal ones"
    n, c = Z.shape
    Z = (Z*10**data.draw(tensors((n, 1), st.floats(-30, 30)), 'powers of ten')).float()
    ends = sorted({c, *data.draw(st.sets(st.integers(1, c)), 'ends of blocks')})
    blocks = BlockScores(n, 'cpu')
    for a, b in zip([0, *ends], ends): blocks.add(Z[:, a:b], a)
    torch.testing.assert_close(blocks.certainty(c), certainty(Z), rtol=0, atol=1e-5)
    y = torch.full((n,), -1)
    p, q = blocks.pseudo_labels(y, c), from_scores(Z, y)
    assert torch.equal(p.labels, q.labels)
    assert torch.equal(p.reached, q.reached)


def check_weights(p, y):
    "Given labels stay, with ω = 1; only unreached items have label −1 and weight 0; all else is within bounds"
    given, weights = y >= 0, p.weights
    assert torch.equal(p.labeled, given)
    assert torch.equal(p.labels[given], y[given])
    assert (p.certainty[given] == 1).all()
    assert ((p.certainty >= 0) & (p.certainty <= 1)).all()
    assert ((weights >= 0) & (weights <= p.class_weights.max())).all()
    assert not weights[~p.reached].any()
    assert torch.equal(p.labels == -1, ~p.reached)
    if p.Z is not None: assert torch.equal(p.labels[p.reached & ~given], p.Z.argmax(1)[p.reached & ~given])


@given(problems(), options)
def test_labels_and_weights_of_a_diffusion(problem, options):
    "An item is reached only from within its component"
    W, y, c = problem
    p, part = spread(sparse(W.float()), y, c, **options), components(W)
    check_weights(p, y)
    assert not p.reached[~torch.isin(part, part[y >= 0])].any()


@given(scores(c=st.integers(1, 6)), st.data(), st.fixed_dictionaries(norms))
def test_labels_and_weights_of_any_scores(Z, data, norms):
    y = data.draw(tensors(len(Z), st.integers(-1, Z.shape[1]-1), np.int64), 'labels')
    assume((y >= 0).any())
    check_weights(from_scores(Z, y, **norms), y)


@pytest.mark.parametrize('norm', ['items', 'classes'])
@given(case=classes.flatmap(lambda c: st.tuples(st.just(c+2), st.lists(st.integers(-1, c+1), max_size=40))))
def test_class_weights_balance_the_classes(norm, case):
    "count_j·ζ_j is the same for all classes that have items, 0 for the others; ζ averages 1 over items or classes"
    c, labels = case[0], torch.tensor(case[1], dtype=torch.int64)
    labeled = labels[labels >= 0]
    count, zeta = torch.bincount(labeled, minlength=c), class_weights(labels, c, norm)
    assert torch.equal(zeta > 0, count > 0)
    if not len(labeled): return
    total = (count*zeta)[count > 0]
    torch.testing.assert_close(total, total[:1].expand_as(total), rtol=1e-5, atol=0)
    torch.testing.assert_close(zeta[labeled].mean() if norm == 'items' else zeta.mean(), torch.tensor(1.))


@given(problems())
def test_columns_of_the_label_matrix(problem):
    "Σ_i Y_ij = 1 ('class_size'), Y_ij = [y_i = j] ('raw')"
    _, y, c = problem
    raw, by_size = (seed_matrix(y, c, o) for o in ('raw', 'class_size'))
    assert torch.equal(raw, (y[:, None] == torch.arange(c)).float())
    torch.testing.assert_close(by_size.sum(0), torch.ones(c))
    torch.testing.assert_close(by_size*raw.sum(0), raw)


# Loss

LOSSES = dict(function=F.cross_entropy, module=torch.nn.CrossEntropyLoss(), smoothed=torch.nn.CrossEntropyLoss(label_smoothing=.1),
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


@pytest.mark.parametrize('name', LOSSES)
@given(batch=batches())
@settings(max_examples=40)
def test_unit_weights_give_plain_cross_entropy(name, batch):
    pred, labels = batch
    targets = weighted_targets(labels, torch.ones(len(labels)), pred.shape[1])
    weighted, plain = loss_and_gradient(PseudoLabelLoss(LOSSES[name]), pred, targets), loss_and_gradient(LOSSES[name], pred, labels)
    torch.testing.assert_close(weighted, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
@given(batch=batches(), data=st.data())
@settings(max_examples=40)
def test_a_weight_scales_the_gradient_of_its_item(name, batch, data):
    "Row i of the gradient is w_i times the plain one, and exactly 0 if w_i = 0 or there is no label"
    pred, labels = batch
    weights = data.draw(tensors(len(labels), st.just(0.) | st.floats(.125, 8, width=32), np.float32), 'weights')
    none = data.draw(tensors(len(labels), st.integers(0, 3), np.int64), 'no label if 0') == 0
    targets = weighted_targets(torch.where(none, -1, labels), weights, pred.shape[1])
    _, grad = loss_and_gradient(PseudoLabelLoss(LOSSES[name]), pred, targets)
    _, plain = loss_and_gradient(LOSSES[name], pred, labels)
    weights = torch.where(none, 0, weights)
    assert not grad[weights == 0].any()
    torch.testing.assert_close(grad, weights[:, None]*plain, rtol=1e-5, atol=1e-6)
