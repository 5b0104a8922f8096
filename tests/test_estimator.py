"LabelDiffusion: scikit-learn's own checks, LabelSpreading as reference, and input as people have it."
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading
from sklearn.utils.estimator_checks import check_estimator

from fastai_lp.learner.data import hide_labels
from fastai_lp.estimator import LabelDiffusion
from fastai_lp.transductive.propagate import propagate

pixels, truth = load_digits(return_X_y=True)


@pytest.fixture(scope='module')
def fitted():
    y = hide_labels(truth, n=2)[0]
    return LabelDiffusion().fit(pixels, y), y


def test_check_estimator():
    results = check_estimator(LabelDiffusion(), on_skip=None)
    assert len(results) > 50 and {o['status'] for o in results} <= {'passed', 'skipped'}


def test_the_same_as_propagate(fitted):
    model, y = fitted
    p = propagate(pixels, y)
    np.testing.assert_array_equal(model.transduction_, p.labels.numpy())
    np.testing.assert_allclose(model.certainty_, p.certainty.numpy(), atol=1e-6)
    np.testing.assert_allclose(model.affinity_.toarray(), p.W.to_dense().numpy(), atol=1e-6)
    assert model.n_iter_ == p.n_iter and model.residual_ == pytest.approx(p.residual, rel=1e-3)


def test_label_spreading_on_the_same_affinity_gives_the_same_distributions():
    X, y = pixels[:300], hide_labels(truth[:300], n=2)[0]
    ours = LabelDiffusion(seeds='raw', max_iter=3000, tol=1e-8).fit(X, y)
    W = ours.affinity_.toarray()
    for alpha in (.5, .9):
        theirs = LabelSpreading(kernel=lambda a, b: W, alpha=alpha, max_iter=100_000, tol=1e-10).fit(X, y)
        mine = LabelDiffusion(affinity='precomputed', alpha=alpha, seeds='raw', max_iter=3000, tol=1e-8).fit(W, y)
        np.testing.assert_allclose(mine.label_distributions_, theirs.label_distributions_, atol=1e-4)
        np.testing.assert_array_equal(mine.transduction_[y < 0], theirs.transduction_[y < 0])
        np.testing.assert_array_equal(mine.classes_, theirs.classes_)


def test_dense_sparse_float32_and_precomputed_agree(fitted):
    model, y = fitted
    for X in (sp.csr_array(pixels), sp.csr_matrix(pixels), pixels.astype(np.float32), pixels.tolist()):
        other = LabelDiffusion().fit(X, y)
        assert (other.transduction_ == model.transduction_).mean() > .999
        np.testing.assert_allclose(other.predict_proba(pixels[:50]), model.predict_proba(sp.csr_array(pixels[:50])), atol=1e-3)
    for W in (model.affinity_, model.affinity_.toarray()):
        other = LabelDiffusion(affinity='precomputed').fit(W, y)
        np.testing.assert_array_equal(other.transduction_, model.transduction_)
        assert (other.predict(W[:50]) == truth[:50]).mean() > .85


def test_new_rows_are_labeled_through_their_neighbours():
    train, test = np.arange(1200), np.arange(1200, len(truth))
    y = hide_labels(truth[train], n=5)[0]
    model = LabelDiffusion().fit(pixels[train], y)
    unit = pixels/np.linalg.norm(pixels, axis=1, keepdims=True)
    sims = unit[test] @ unit[train].T
    expected = np.zeros((len(test), 10))
    for i, s in enumerate(sims):
        for j in np.argsort(-s)[:8]: expected[i] += s[j]**3*model.label_distributions_[j]   # √1200/4.5 ≈ 8
    np.testing.assert_allclose(model.predict_proba(pixels[test]), expected/expected.sum(1, keepdims=True), atol=1e-6)
    assert model.score(pixels[test], truth[test]) > .85


def test_rows_that_no_label_reaches():
    X = np.r_[np.eye(3).repeat(10, 0) + .01*np.eye(3)[np.arange(30) % 3], np.zeros((1, 3))]
    y = np.full(31, -1)
    y[0], y[10] = 3, 7
    model = LabelDiffusion(k=3).fit(X, y)
    assert model.reached_.tolist() == [True]*20 + [False]*11
    assert set(model.transduction_[:20]) == {3, 7} and set(model.transduction_[20:]) == {-1}
    np.testing.assert_allclose(model.label_distributions_[20:], .5)
    assert model.predict([[0, 0, 1.], [0, 0, 0], [1, 0, 0]]).tolist() == [-1, -1, 3]
    np.testing.assert_allclose(model.predict_proba([[0, 0, 1.], [0, 0, 0]]), .5)
    assert np.isfinite(model.certainty_).all() and not model.certainty_[20:].any()


def test_names_as_classes_and_what_counts_as_missing():
    y = np.array(['cat', 'dog', None, '', float('nan'), -1], dtype=object)
    X = np.array([[1, 0], [0, 1], [1, .1], [.1, 1], [1, .2], [0, 0]])
    model = LabelDiffusion(k=2).fit(X, y)
    assert model.classes_.tolist() == ['cat', 'dog'] and model.transduction_.tolist() == ['cat', 'dog', 'cat', 'dog', 'cat', '']
    assert LabelDiffusion(k=2).fit(X[:5], np.array(['cat', 'dog', '', '', ''])).transduction_.tolist() == ['cat', 'dog', 'cat', 'dog', 'cat']
    assert LabelDiffusion(k=2).fit(X[:5], np.array([1., 2., -1, -1, -1])).transduction_.tolist() == [1, 2, 1, 2, 1]


def test_minus_one_beside_a_single_class_is_a_class_and_said():
    with pytest.warns(UserWarning, match='both are taken as classes'):
        assert LabelDiffusion().fit(pixels[:50], np.where(truth[:50] < 5, -1, 1)).classes_.tolist() == [-1, 1]


def test_params_clone_pickle_refit_and_grid_search(fitted):
    model, y = fitted
    assert clone(LabelDiffusion(k=5, gamma=2)).get_params() == LabelDiffusion().set_params(k=5, gamma=2).get_params()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(pixels[:99]), model.predict(pixels[:99]))
    smaller = clone(model).fit(pixels, y).fit(pixels[:200], hide_labels(truth[:200], n=2)[0])
    assert len(smaller.transduction_) == 200 and len(smaller.predict(pixels)) == len(pixels)
    y = hide_labels(truth, n=6)[0]
    fold = np.full(len(y), -1)               # unlabeled rows are always trained with, never scored
    fold[y >= 0] = np.arange((y >= 0).sum()) % 3
    search = GridSearchCV(make_pipeline(StandardScaler(with_mean=False), LabelDiffusion()), dict(labeldiffusion__k=[5, 50]), cv=PredefinedSplit(fold)).fit(pixels, y)
    assert search.best_params_ == dict(labeldiffusion__k=5) and search.best_score_ > .8


def test_suggest_and_label_issues(fitted):
    model, y = fitted
    items = model.suggest(10)
    assert len(set(items.tolist())) == 10 and (y[items] < 0).all()
    y = hide_labels(truth, n=20)[0]
    i = np.flatnonzero(y >= 0)[3]
    y[i] = (y[i]+1) % 10
    issues = LabelDiffusion().fit(pixels, y).label_issues()
    assert issues.index[0] == i and issues.given.iloc[0] == y[i] and issues.suggested.iloc[0] == truth[i] and issues.doubt.is_monotonic_decreasing


@pytest.mark.parametrize('params,y,match', [
    (dict(k=0), None, 'k must be'), (dict(gamma=0), None, 'gamma must'), (dict(alpha=1), None, 'alpha must'), (dict(max_iter=0), None, 'max_iter must'),
    (dict(seeds='mean'), None, 'seeds'), (dict(affinity='rbf'), None, "'cosine' or 'precomputed'"), (dict(backend='annoy'), None, 'backend'),
    (dict(), np.full(20, -1), 'no row is labeled'), (dict(), np.zeros(19, int), '19 labels for 20 rows'), (dict(), np.full(20, np.nan), 'NaN')])
def test_refuses(params, y, match):
    with pytest.raises(ValueError, match=match): LabelDiffusion(**params).fit(pixels[:20], truth[:20] if y is None else y)


def test_refuses_affinities_that_are_none():
    y = np.arange(9) % 2
    for W, match in ((np.triu(np.ones((9, 9))), 'not symmetric'), (-np.ones((9, 9)), 'Negative values'), (np.ones((9, 8)), r'\[n, n\]')):
        with pytest.raises(ValueError, match=match): LabelDiffusion(affinity='precomputed').fit(W, y)
