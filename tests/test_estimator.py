"LabelDiffusion equals `propagate`; new rows, input types, errors. The page `estimator` runs scikit-learn's checks."
import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import SVC
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score

from fastai_lp.estimator import LabelDiffusion
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.transductive.propagate import propagate

pixels, truth = load_digits(return_X_y=True)


@pytest.fixture(scope='module')
def fitted():
    y = hide_labels(truth, n=2)[0]
    return LabelDiffusion(None).fit(pixels, y), y


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
    other = LabelDiffusion(None).fit(convert(pixels), y)
    assert (other.transduction_ == model.transduction_).mean() > .999
    np.testing.assert_allclose(other.predict_proba(pixels[:50]), model.predict_proba(sp.csr_array(pixels[:50])), atol=1e-3)


@pytest.mark.parametrize('dense', [False, True])
def test_precomputed_affinity(fitted, dense):
    model, y = fitted
    W = model.affinity_.toarray() if dense else model.affinity_
    other = LabelDiffusion(None, affinity='precomputed').fit(W, y)
    np.testing.assert_array_equal(other.transduction_, model.transduction_)
    assert (other.predict(W[:50]) == truth[:50]).mean() > .85


def test_new_rows_are_labeled_by_their_neighbors():
    train, test = np.arange(1200), np.arange(1200, len(truth))
    model = LabelDiffusion(None).fit(pixels[train], hide_labels(truth[train], n=5)[0])
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
    model = LabelDiffusion(None, k=3).fit(X, y)
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


three, names = truth[truth < 3][:90], np.array(['a', 'b', 'c'])[truth[truth < 3][:90]]
rows, shown = pixels[truth < 3][:90], hide_labels(three, n=5)[0] >= 0


def hidden(values, missing): return [o if is_shown else missing for o, is_shown in zip(values, shown)]


def fit_quietly(y, **params):
    "The fitted model; a warning is an error"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return LabelDiffusion(**params).fit(rows, y)


@pytest.fixture(scope='module')
def expected(): return LabelDiffusion().fit(rows, np.where(shown, three, -1)).transduction_


MISSING = [-1, -1., np.int8(-1), None, float('nan'), pd.NA, pd.NaT, '']


@pytest.mark.parametrize('missing', MISSING, ids=repr)
@pytest.mark.parametrize('container', [list, tuple, lambda y: np.array(y, dtype=object), lambda y: pd.Series(y, dtype=object),
    lambda y: [np.str_(o) if isinstance(o, str) else o for o in y]], ids=['list', 'tuple', 'array', 'Series', 'np.str_'])
def test_text_with_missing_labels_in_lists(expected, container, missing):
    model = fit_quietly(container(hidden(names.tolist(), missing)))
    assert model.classes_.tolist() == ['a', 'b', 'c']
    np.testing.assert_array_equal(model.transduction_, np.array(['a', 'b', 'c'])[expected])


@pytest.mark.parametrize('missing', [-1, -1., float('nan')], ids=repr)
def test_array_of_text_that_swallowed_missing_labels(missing):
    assigned = three.astype(str)
    assigned[~shown] = missing
    for y in (np.array(hidden(names.tolist(), missing)), assigned, assigned.astype(np.dtypes.StringDType())):
        with pytest.raises(ValueError, match=f"array of text with '{missing}'"): LabelDiffusion().fit(rows, y)


@pytest.mark.parametrize('missing,text', [(-1, '-'), (float('nan'), 'n')])
def test_missing_labels_cut_to_one_character(missing, text):
    y = names.copy()
    y[~shown] = missing
    with pytest.warns(UserWarning, match=f"'{text}' in y is taken as a class"): LabelDiffusion().fit(rows, y)
    fit_quietly(np.array(['+', '-'])[(three > 0).astype(int)])
    fit_quietly(np.array(['y', 'n'])[(three > 0).astype(int)])


@pytest.mark.parametrize('name', ['nan', '-1', 'None'])
def test_class_named_like_a_missing_label(expected, name):
    y = hidden(np.array(['a', 'b', name])[three].tolist(), None)
    for container in (list, pd.Series):
        with pytest.warns(UserWarning, match=f"'{name}' in y is taken as a class"): model = LabelDiffusion().fit(rows, container(y))
        np.testing.assert_array_equal(model.transduction_, np.array(['a', 'b', name])[expected])


@pytest.mark.parametrize('y', [[0, 1, 2, -1, None], np.array([0, 1, 2, -1, np.nan]), pd.Series([0, 1, 2, -1, None], dtype='Int64')])
def test_two_marks_of_missing_numbers(y):
    with pytest.warns(UserWarning, match='both −1 and other missing labels'): model = LabelDiffusion(k=2).fit(np.eye(5) + .1, y)
    assert model.classes_.tolist() == [0, 1, 2]


@pytest.mark.parametrize('y', [['a', 1, None], ['a', True, -1], np.array([1, 'b', ''], dtype=object)])
def test_text_mixed_with_numbers(y):
    with pytest.raises(ValueError, match='the labels are of mixed types'): LabelDiffusion(k=1).fit(np.eye(3), y)


NULLABLE = ['Int64', 'UInt8', 'Float64', 'float32', 'category', 'object']


@pytest.mark.parametrize('dtype', NULLABLE)
def test_numbers_with_missing_labels(expected, dtype):
    y = pd.Series(hidden(three.tolist(), None), dtype=dtype)
    for labels in (y, y.array, pd.Index(y), y.to_frame()[0], y[::-1][::-1]):
        model = fit_quietly(labels)
        assert model.classes_.tolist() == [0, 1, 2]
        np.testing.assert_array_equal(model.transduction_, expected)


@pytest.mark.parametrize('y', [np.array(hidden(three.tolist(), np.nan)), np.ma.masked_array(three, ~shown),
    hidden(three.tolist(), pd.NA), torch.tensor(np.where(shown, three, -1)), hidden([np.uint8(o) for o in three], None)],
    ids=['NaN', 'masked', 'NA', 'tensor', 'uint8'])
def test_numbers_with_missing_labels_in_arrays(expected, y): np.testing.assert_array_equal(fit_quietly(y).transduction_, expected)


@pytest.mark.parametrize('dtype', ['string', 'str', 'category'])
def test_columns_of_text(expected, dtype):
    model = fit_quietly(pd.Series(hidden(names.tolist(), None), dtype=dtype))
    np.testing.assert_array_equal(model.transduction_, np.array(['a', 'b', 'c'])[expected])


@pytest.mark.parametrize('y', [pd.Series(hidden((three > 0).tolist(), None), dtype='boolean'), hidden((three > 0).tolist(), pd.NA)])
def test_booleans_with_missing_labels(y):
    model = fit_quietly(y)
    assert model.classes_.tolist() == [False, True]
    assert (model.transduction_ == (three > 0)).mean() > .9


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_labels(dtype):
    model = fit_quietly(three.astype(dtype))
    assert model.classes_.dtype == model.transduction_.dtype == dtype
    assert model.predict(np.r_[rows[:1], 0*rows[:1]]).tolist() == [three[0], -1]
    cast = np.where(shown, three, -1).astype(dtype)
    with pytest.warns(UserWarning, match='also what −1 becomes as uint'): LabelDiffusion().fit(rows, cast)


def test_dates():
    days = np.array(['2024-01-01', '2025-01-01', '2026-01-01'], dtype='datetime64[D]')[three]
    model = fit_quietly(np.where(shown, days, np.datetime64('NaT')))
    assert len(model.classes_) == 3
    assert (model.transduction_ == days).mean() > .9
    assert np.isnat(model.predict(0*rows[:1])).all()
    with pytest.raises(ValueError, match='got Timestamp such as'): LabelDiffusion().fit(rows, pd.Series(days).dt.tz_localize('UTC'))


@pytest.mark.parametrize('params', [dict(k=np.int64(5)), dict(k=np.uint8(5)), dict(k=5, max_iter=np.int32(20)),
    dict(k=5, gamma=np.float32(3)), dict(k=5, gamma=np.int64(3)), dict(k=5, tol=np.float64(1e-6)), dict(k=5, alpha=np.float64(.9))])
def test_numpy_settings(params):
    y = np.where(shown, three, -1)
    model, plain = fit_quietly(y, **params), fit_quietly(y, k=5)
    np.testing.assert_array_equal(model.label_distributions_, plain.label_distributions_)
    np.testing.assert_array_equal(model.predict_proba(rows[:9]), plain.predict_proba(rows[:9]))
    assert clone(model).get_params() == model.get_params()


def test_labels_that_are_refused_leave_the_model_as_it_was():
    model = LabelDiffusion().fit(rows, np.where(shown, three, -1))
    before = model.predict_proba(rows)
    with pytest.raises(ValueError, match='no row is labeled'): model.fit(rows[:50], np.full(50, -1))
    np.testing.assert_array_equal(model.predict_proba(rows), before)
    assert model.classes_.tolist() == [0, 1, 2]


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
    (dict(k=5.), None, 'k must be an integer of at least 1 or None, got 5.0'),
    (dict(k=np.float64(5)), None, 'k must be an integer'),
    (dict(gamma=np.inf), None, 'gamma must be a number above 0, got inf'),
    (dict(k=0), None, 'k must be an integer of at least 1 or None, got 0'),
    (dict(alpha=1), None, 'alpha must be'),
    (dict(affinity='rbf'), None, "affinity must be 'auto', 'cosine', 'euclidean' or 'precomputed', got 'rbf'"),
    (dict(device=0), None, 'device must be'),
    (dict(), np.full(20, -1), 'no row is labeled'),
    (dict(), np.zeros(19, int), '19 labels for 20 rows'),
    (dict(), np.full(20, np.nan), 'no row is labeled'),
    (dict(), np.full(20, np.inf), 'infinity')])
def test_invalid_arguments(params, y, match):
    with pytest.raises(ValueError, match=match): LabelDiffusion(**params).fit(pixels[:20], truth[:20] if y is None else y)


def test_invalid_affinity_shape():
    with pytest.raises(ValueError, match=r'must have shape \[n, n\], got \(9, 8\)'):
        LabelDiffusion(affinity='precomputed').fit(np.ones((9, 8)), np.arange(9) % 2)


def test_deepcopy_of_a_fitted_model(fitted):
    model, _ = fitted
    again = copy.deepcopy(model)
    np.testing.assert_array_equal(again.predict(pixels[:99]), model.predict(pixels[:99]))
    np.testing.assert_array_equal(again.suggest(5), model.suggest(5))
    assert again.label_issues().equals(model.label_issues())


@pytest.mark.parametrize('missing', [-1, None, np.nan], ids=repr)
def test_score_leaves_out_rows_without_label(missing):
    y = hide_labels(truth[:600], n=5)[0]
    model = LabelDiffusion().fit(pixels[:600], y)
    asked = np.arange(600) % 2 == 0
    labels, weight = np.where(asked, truth[:600], missing), np.arange(600.)
    assert model.score(pixels[:600], labels) == model.score(pixels[:600][asked], truth[:600][asked])
    assert model.score(pixels[:600], labels, weight) == model.score(pixels[:600][asked], truth[:600][asked], weight[asked])
    one = np.where(np.arange(600) < 3, truth[0], -1)
    assert model.score(pixels[:600], one) == (model.predict(pixels[:3]) == truth[0]).mean()
    assert cross_val_score(LabelDiffusion(), pixels[:600], y).min() > .7
    with pytest.raises(ValueError, match='no row is labeled'): model.score(pixels[:600], np.full(600, -1))


def test_score_of_a_class_minus_one():
    y = np.where(truth[:600] < 5, -1, 1)
    with pytest.warns(UserWarning, match='both are taken'): model = LabelDiffusion(None).fit(pixels[:600], y)
    assert model.score(pixels[:600], y) == (model.predict(pixels[:600]) == y).mean()


@pytest.mark.parametrize('convert', [np.asarray, sp.csr_array])
@pytest.mark.parametrize('scale', [1e200, 1e-200, 2.**-500])
def test_rows_of_extreme_length(fitted, convert, scale):
    model, y = fitted
    other = LabelDiffusion(None).fit(convert(pixels*scale), y)
    assert (other.transduction_ == model.transduction_).mean() > .99
    assert (model.predict(convert(pixels[:200]*scale)) == model.predict(convert(pixels[:200]))).all()


@pytest.mark.parametrize('scale', [1e300, 1e-200])
def test_precomputed_affinity_of_extreme_scale(fitted, scale):
    model, y = fitted
    other = LabelDiffusion(None, affinity='precomputed').fit(model.affinity_.astype(float)*scale, y)
    np.testing.assert_allclose(other.label_distributions_, model.label_distributions_, atol=1e-4)


@pytest.mark.parametrize('X', [torch.tensor(pixels, requires_grad=True), torch.tensor(pixels).bfloat16(), torch.tensor(pixels).half()],
    ids=['gradient', 'bfloat16', 'half'])
def test_tensors_from_a_network(fitted, X):
    model, y = fitted
    np.testing.assert_array_equal(LabelDiffusion(None).fit(X, y).predict(X), model.predict(pixels))


@pytest.mark.parametrize('params', [dict(k=0), dict(k=5.), dict(gamma='3')])
def test_settings_changed_after_fit(params):
    model = LabelDiffusion().fit(pixels[:50], truth[:50]).set_params(**params)
    with pytest.raises(ValueError, match='must be'): model.predict(pixels[:5])


# A classifier on diffused features

blobs_x = np.random.default_rng(3).normal(size=(4, 60))[np.arange(400) % 4] + 1.2*np.random.default_rng(4).normal(size=(400, 60))
blobs_y = np.arange(400) % 4


def blobs_shown(per_class=2): return np.where(np.arange(400) < 4*per_class, blobs_y, -1)


@pytest.mark.parametrize('base', ['logistic', LogisticRegression(C=1.), GaussianNB(), RandomForestClassifier(20, random_state=0)])
@pytest.mark.parametrize('columns', [60, 20])  # with 50 or fewer, both similarities are used
def test_any_classifier(base, columns):
    X, y = blobs_x[:, :columns], blobs_shown(5)
    model = LabelDiffusion(base).fit(X[:300], y[:300])
    assert (model.transduction_ == blobs_y[:300])[20:].mean() > .85
    assert (model.predict(X[300:]) == blobs_y[300:]).mean() > .85
    np.testing.assert_allclose(model.predict_proba(X[300:]).sum(1), 1)


@pytest.mark.parametrize('base', ['tree', 3, SVC()])
def test_other_classifiers_are_refused(base):
    with pytest.raises(ValueError, match="base must be 'logistic', None or a classifier with predict_proba"):
        LabelDiffusion(base).fit(blobs_x, blobs_shown())


@pytest.mark.parametrize('params', [{}, dict(base=None), dict(affinity='euclidean'), dict(prior='labels'), dict(temperature=.5)])
@pytest.mark.parametrize('convert', [np.asarray, sp.csr_array])
def test_rows_of_fit_keep_their_result(params, convert):
    if convert is sp.csr_array and 'affinity' in params: return
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 8)), (rng.random(200) > .5).astype(int) + 1
    X[::2] += .5*(y[::2, None] == 1)  # two classes that overlap
    y[20:] = -1
    model = LabelDiffusion(**params).fit(convert(X), y)
    np.testing.assert_array_equal(model.predict(convert(X)), model.transduction_)


def test_a_new_row_next_to_an_old_one_gets_nearly_its_result():
    model = LabelDiffusion().fit(blobs_x, blobs_shown())
    near = model.predict_proba(blobs_x[50:100] + 1e-6)
    assert abs(near-model.label_distributions_[50:100]).max() < .2
    assert (near.argmax(1) == model.label_distributions_[50:100].argmax(1)).mean() > .95


def test_the_given_shares_are_reached():
    y = blobs_shown(5)
    for prior in ([.7, .1, .1, .1], 'uniform'):
        model = LabelDiffusion(prior=prior, alpha=0., temperature=1.).fit(blobs_x, y)
        share = model.label_distributions_[20:].mean(0)
        np.testing.assert_allclose(share, np.full(4, .25) if prior == 'uniform' else prior, atol=.02)


def test_euclidean_needs_dense_rows():
    with pytest.raises(ValueError, match='needs dense rows'): LabelDiffusion(affinity='euclidean').fit(sp.csr_array(blobs_x), blobs_shown())


def test_a_single_class():
    model = LabelDiffusion().fit(blobs_x, np.where(np.arange(400) < 3, 'a', ''))
    assert set(model.transduction_) == {'a'}
    assert set(model.predict(blobs_x[:5] + 1)) == {'a'}


def test_a_fit_that_fails_leaves_the_model_as_it_was():
    model = LabelDiffusion().fit(blobs_x, blobs_shown())
    before = model.predict_proba(blobs_x + .1)
    with pytest.raises(ValueError, match='prior must have one number'): model.set_params(prior=[1., 2.]).fit(blobs_x, blobs_shown(5))
    np.testing.assert_array_equal(model.set_params(prior=None).predict_proba(blobs_x + .1), before)
