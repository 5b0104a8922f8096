"`benchmarks/training.py` at tiny size: its tasks are what they say, and all methods take equal steps."
import importlib
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from fastai.callback.core import Callback
from fastai.learner import Learner

from fastai_lp.utils.files import read_json_lines


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1]/'benchmarks')
    return importlib.import_module('training')


@pytest.fixture
def data(script):
    rng = np.random.default_rng(0)
    centers, y, new_y = 3*rng.normal(size=(5, 16)), np.arange(400) % 5, np.arange(50) % 5
    x, new_x = (centers[o] + rng.normal(size=(len(o), 16)) for o in (y, new_y))
    return script.Rows(x.astype(np.float32), y, new_x.astype(np.float32), new_y)


def labels_of(t): return np.bincount(t.shown[t.shown >= 0]).tolist()


def test_junk(script, data):
    t = script.task(data.y, 4, 0, 'junk')
    free = t.shown < 0
    assert (t.truth[free] < 0).mean() == pytest.approx(.4, abs=.01)
    assert labels_of(t) == [4]*3
    assert (t.shown[~free] == t.truth[~free]).all()
    assert (data.y[t.kept][t.truth >= 0] == t.known[t.truth[t.truth >= 0]]).all()
    assert not np.isin(data.y[t.kept][t.truth < 0], t.known).any()


def test_skew(script, data):
    t = script.task(data.y, 4, 0, 'skew')
    sizes = np.sort(np.bincount(data.y[t.kept]))
    assert sizes.tolist() == [8, 14, 25, 45, 80]
    assert labels_of(t) == [4]*5


def test_only_known_classes_are_tested(script, data):
    t = script.task(data.y, 4, 0, 'junk')
    found = script.restricted(data, t)
    assert sorted(np.unique(found.new_y)) == [0, 1, 2]
    assert (np.bincount(found.new_y) == 10).all()


@pytest.mark.slow
def test_equal_steps(script, data, monkeypatch):
    steps, methods = {}, ['supervised', 'network', 'mt', 'lp', 'strong', 'strong:mixup=null']
    class Counts(Callback):
        def after_fit(self): steps[method] = self.train_iter
    own = Learner.fit_one_cycle
    monkeypatch.setattr(Learner, 'fit_one_cycle', lambda self, *args, cbs, **kw: own(self, *args, cbs=[*cbs, Counts()], **kw))
    for method in methods:
        found = script.run('head', data, 'junk', method, 4, 0, 1e-3)
        assert found['error'] == found['errors'][-1] < .7
        assert len(found['right']) == (10 if method not in ('supervised', 'mt') else 0)
    assert len(set(steps.values())) == 1
    assert set(steps) == set(methods)


@pytest.mark.parametrize('layer', ['head', 'fine'])
def test_learning_rates_are_the_best_of_the_grid(script, layer):
    error = defaultdict(lambda: defaultdict(dict))
    for _, o in read_json_lines(script.Path(script.__file__).parent/'results/real/tune.jsonl'):
        if o['layer'] == layer and o['labels'] == 10: error[o['method']][o['lr']][o['draw']] = o['error']
    assert {'supervised', 'lp', 'strong'} <= error.keys() <= script.RATES[layer].keys()
    for method, rates in error.items():
        most = max(map(len, rates.values()))
        found = {lr: mean(o.values()) for lr, o in rates.items() if len(o) == most}
        assert len(found) >= 2 and min(found, key=found.get) == script.RATES[layer][method]
        if layer == 'head': assert most == 3 and min(found) < script.RATES[layer][method] < max(found)
