"LabelDiffusion equals `propagate`; new rows, input types, errors. The page `estimator` runs scikit-learn's checks."
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.datasets import load_digits

from fastai_lp.estimator import LabelDiffusion
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.transductive.propagate import propagate

pixels, truth = load_digits(return_X_y=True)


@pytest.fixture(scope='module')
def fitted():
    y = hide_labels(truth, n=2)[0]
    return LabelDiffusion().fit(pixels, y), y


def test_same_as_propagate(fitted):
    model, y = fitted
    p = propagate(pixels, y)
    np.testing.assert_array_equal(model.transduction_, p.labels.numpy())
    np.testing.assert_allclose(model.certainty_, p.certainty.numpy(), atol=1e-6)
    np.testing.assert_allclose(model.affinity_.toarray(), p.W.to_dense().numpy(), atol=1e-6)
    assert model.n_iter_ == p.n_iter
    assert model.residual_ == pytest.approx(p.residual, rel=1e-3)


@pytest.mark.parametrize('convert', [sp.csr_array, sp.csr_matrix, np.float32, np.ndarray.tolist])
def test_input_types_agree(fitted, convert):
    model, y = fitted
    other = LabelDiffusion().fit(convert(pixels), y)
    assert (other.transduction_ == model.transduction_).mean() > .999
    np.testing.assert_allclose(other.predict_proba(pixels[:50]), model.predict_proba(sp.csr_array(pixels[:50])), atol=1e-3)


@pytest.mark.parametrize('dense', [False, True])
def test_precomputed_affinity(fitted, dense):
    model, y = fitted
    W = model.affinity_.toarray() if dense else model.affinity_
    other = LabelDiffusion(affinity='precomputed').fit(W, y)
    np.testing.assert_array_equal(other.transduction_, model.transduction_)
    assert (other.predict(W[:50]) == truth[:50]).mean() > .85


def test_new_rows_are_labeled_by_their_neighbors():
    train, test = np.arange(1200), np.arange(1200, len(truth))
    model = LabelDiffusion().fit(pixels[train], hide_labels(truth[train], n=5)[0])
    unit = pixels/np.linalg.norm(pixels, axis=1, keepdims=True)
    sims = unit[test] @ unit[train].T
    expected = np.zeros((len(test), 10))
    for i, s in enumerate(sims):
        for j in np.argsort(-s)[:8]: expected[i] += s[j]**3*model.label_distributions_[j]  # k = 8: √1200/4.5, rounded
    np.testing.assert_allclose(model.predict_proba(pixels[test]), expected/expected.sum(1, keepdims=True), atol=1e-6)
    assert model.score(pixels[test], truth[test]) > .85


def test_rows_that_no_label_reaches():
    X = np.r_[np.eye(3).repeat(10, 0) + .01*np.eye(3)[np.arange(30) % 3], np.zeros((1, 3))]
    y = np.full(31, -1)
    y[0], y[10] = 3, 7
    model = LabelDiffusion(k=3).fit(X, y)
    assert model.reached_.tolist() == [True]*20 + [False]*11
    assert set(model.transduction_[:20]) == {3, 7}
    assert set(model.transduction_[20:]) == {-1}
    assert not model.certainty_[20:].any()
    assert model.predict([[0, 0, 1.], [0, 0, 0], [1, 0, 0]]).tolist() == [-1, -1, 3]
    np.testing.assert_allclose(model.predict_proba([[0, 0, 1.], [0, 0, 0]]), .5)


@pytest.mark.parametrize('y,expected', [
    (['cat', 'dog', '', '', ''], ['cat', 'dog', 'cat', 'dog', 'cat']),
    (np.array(['cat', 'dog', None, float('nan'), -1], dtype=object), ['cat', 'dog', 'cat', 'dog', 'cat']),
    ([1., 2., -1, -1, -1], [1, 2, 1, 2, 1])])
def test_missing_labels(y, expected):
    X = np.array([[1, 0], [0, 1], [1, .1], [.1, 1], [1, .2]])
    assert LabelDiffusion(k=2).fit(X, np.asarray(y)).transduction_.tolist() == expected


def test_minus_one_and_a_single_class_are_two_classes():
    with pytest.warns(UserWarning, match='both are taken as classes'):
        model = LabelDiffusion().fit(pixels[:50], np.where(truth[:50] < 5, -1, 1))
    assert model.classes_.tolist() == [-1, 1]


def test_clone_pickle_and_refit(fitted):
    model, y = fitted
    assert clone(LabelDiffusion(k=5, gamma=2)).get_params() == LabelDiffusion().set_params(k=5, gamma=2).get_params()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(pixels[:99]), model.predict(pixels[:99]))
    smaller = clone(model).fit(pixels, y).fit(pixels[:200], hide_labels(truth[:200], n=2)[0])
    assert len(smaller.transduction_) == 200
    assert len(smaller.predict(pixels)) == len(pixels)


def test_suggested_rows_are_unlabeled(fitted):
    model, y = fitted
    items = model.suggest(10)
    assert len(set(items.tolist())) == 10
    assert (y[items] < 0).all()


@pytest.mark.parametrize('params,y,match', [
    (dict(k=0), None, 'k must be an integer of at least 1 or None, got 0'),
    (dict(alpha=1), None, 'alpha must be'),
    (dict(affinity='rbf'), None, "affinity must be 'cosine' or 'precomputed', got 'rbf'"),
    (dict(device=0), None, 'device must be'),
    (dict(), np.full(20, -1), 'no row is labeled'),
    (dict(), np.zeros(19, int), '19 labels for 20 rows'),
    (dict(), np.full(20, np.nan), 'NaN')])
def test_invalid_arguments(params, y, match):
    with pytest.raises(ValueError, match=match): LabelDiffusion(**params).fit(pixels[:20], truth[:20] if y is None else y)


def test_invalid_affinity_shape():
    with pytest.raises(ValueError, match=r'must have shape \[n, n\], got \(9, 8\)'):
        LabelDiffusion(affinity='precomputed').fit(np.ones((9, 8)), np.arange(9) % 2)
