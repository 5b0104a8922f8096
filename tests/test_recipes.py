"Recipes and runs: every setting reaches the run, and an interrupted run ends with the same bits."
import json
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import asdict, replace
from io import StringIO
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fastai_lp.experiments import train
from fastai_lp.experiments.callbacks import EpochTimer
from fastai_lp.experiments.datasets import ImageArrays
from fastai_lp.experiments.recipes import METHODS, RECIPES, Recipe, file_name, lp_callback, settings_of
from fastai_lp.experiments.splits import show_labels
from fastai_lp.experiments.train import run_method
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.layers import RawInput
from fastai_lp.transductive.ensemble import Ensemble

FEW = Recipe('small', width=4, bs=16, labeled_bs=6, stage1=2, stage2=3, k=7)


@pytest.fixture(scope='module')
def data():
    rng, (i, j), truth = np.random.default_rng(0), np.mgrid[:12, :12], np.arange(90) % 3
    waves = np.stack([np.sin((i, j, i+j)[c]*rng.uniform(.7, .9) + rng.uniform(0, 6)) for c in truth])
    images = 128 + 70*waves[:, None]*rng.uniform(.3, 1, (90, 3, 1, 1)) + rng.normal(0, 25, (90, 3, 12, 12))
    images = torch.from_numpy(images.clip(0, 255).astype('uint8'))
    return show_labels(ImageArrays(images, truth, np.arange(72), np.arange(72, 90)), 9)


def run(data, method, recipe, out, **kwargs): return run_method(data, method, recipe, out, device='cpu', bar=False, **kwargs)


@pytest.fixture(scope='module')
def plain(data, tmp_path_factory): return run(data, 'lp', FEW, tmp_path_factory.mktemp('plain'))


def figures(run, stages=slice(None)):
    "Everything that must be equal in equal runs: all but durations"
    def without(rows, *times): return [{k: v for k, v in row.items() if k not in times} for row in rows]
    metrics, history = [without(o, 'lp_sec', 'sec') for o in run['stages'][stages]], without(run['history'], 'sec', 'seconds', 'cached')
    return str(metrics if stages == slice(1) else (metrics, history, run['error_rate'], run['top5_error'], run['kept']))


# Recipes

def test_paper_settings():
    r = RECIPES['cifar10']
    assert (r.lr, r.bs, r.labeled_bs, r.stage1, r.stage2, r.momentum, r.wd) == (.05, 100, 50, 180, 180, .9, 2e-4)
    assert (r.k, r.gamma, r.alpha, r.max_iter, r.tol) == (50, 3, .99, 20, 1e-6)
    assert (r.seeds, r.omega_norm, r.zeta_norm) == ('class_size', 'all', 'items')
    assert (r.decay, r.consistency, r.rampup, r.logit_distance) == (.97, 100, 5, .01)
    assert (r.l2, r.optimizer, r.schedule) == (True, 'sgd', 'cosine')
    assert not (r.bf16 or r.augment_descriptors or r.fresh_teacher or r.baselines_go_on)


def test_every_method_has_a_learning_rate():
    assert {RECIPES['digits'].of(m).lr for m in METHODS} == set(RECIPES['digits'].lr.values())
    assert Recipe().of('lp') == Recipe()


def test_settings_that_were_added_later_leave_the_names_of_older_runs():
    later = {'tricks', 'stride'}
    assert set(settings_of(Recipe())) == set(asdict(Recipe())) - later
    assert settings_of(Recipe(stride=2, tricks=dict(k=3))).keys() >= later
    assert file_name('a', 'lp', Recipe()) == 'a-lp'
    assert file_name('a', 'lp', Recipe(tricks=dict(k=3))) != file_name('a', 'lp', Recipe(tricks=dict(k=4)))


def test_tricks_change_the_preset():
    preset = LPCallback.strong()
    cb = lp_callback('strong', Recipe(tricks=dict(features=dict(max_bytes=100), k=3), augment_descriptors=True))
    assert (cb.features.max_bytes, cb.features.augment) == (100, True)
    assert replace(cb.labeler, backbone=None) == replace(preset.labeler, k=3, backbone=None)


# Settings that reach the run

@pytest.mark.parametrize('changes', [dict(omega_norm='unlabeled'), dict(zeta_norm='classes'), dict(seeds='raw'), dict(k=3),
    dict(gamma=1.), dict(alpha=.5), dict(max_iter=1), dict(augment_descriptors=True), dict(tricks=dict(temperature=.3)),
    dict(tricks=dict(balance='sinkhorn', prior='uniform')), dict(tricks=dict(features=dict(backbone='thumbnail'))),
    dict(tricks=dict(features=dict(backbone='thumbnail', weight=1.))), dict(tricks=dict(k=3)), dict(tricks=dict(mixup=True)),
    dict(tricks=dict(unlabeled_tfms=True)), dict(tricks=dict(unlabeled_tfms=dict(degrees=1., cutout=0)))], ids=str)
@pytest.mark.filterwarnings('ignore:LPCallback')
def test_settings_of_the_second_stage(data, plain, changes, tmp_path):
    other = run(data, 'lp', replace(FEW, **changes), tmp_path)
    assert figures(other, slice(1)) == figures(plain, slice(1))
    assert figures(other) != figures(plain)
    assert json.loads(json.dumps(other))['recipe'] == other['recipe']


@pytest.mark.parametrize('changes', [dict(lr=.01), dict(momentum=.5), dict(wd=.1), dict(zero_at=1.), dict(l2=False),
    dict(bs=12), dict(bf16=True)], ids=str)
@pytest.mark.filterwarnings('ignore:LPCallback')
def test_settings_of_both_stages(data, plain, changes, tmp_path):
    assert figures(run(data, 'lp', replace(FEW, **changes), tmp_path)) != figures(plain)


@pytest.mark.parametrize('changes', [dict(decay=.5), dict(consistency=1.), dict(rampup=50), dict(fresh_teacher=True),
    dict(network='convnet13', logit_distance=.5)], ids=str)
@pytest.mark.filterwarnings('ignore:LPCallback')
def test_settings_of_mean_teacher(data, changes, tmp_path):
    recipe = replace(FEW, network=changes.get('network', 'small'), stage1=1, stage2=1 if 'network' in changes else 2)
    a, b = (run(data, 'mt+lp', o, tmp_path/name) for name, o in (('a', recipe), ('b', replace(recipe, **changes))))
    assert figures(a) != figures(b)


def test_weights_that_are_switched_off(data, tmp_path):
    kept = []
    for omega, zeta in ((True, True), (False, True), (True, False), (False, False)):
        r = run(data, 'lp', replace(FEW, omega=omega, zeta=zeta), tmp_path, keep=(0,))
        kept += r['kept']
        interp = LPInterpretation.load(tmp_path/kept[-1])
        p = interp.pseudo
        assert (p.certainty[~p.labeled] == 1).all() == (not omega)
        assert (p.class_weights == 1).all() == (not zeta)
        assert p.accuracy(interp.truth) == pytest.approx(r['history'][0]['accuracy'])
        assert p.W is None
    assert len(set(kept)) == 4


def test_strong_is_the_preset(data, tmp_path):
    "Written out"
    def own(method, recipe, truth): return LPCallback(Ensemble(backbone=RawInput()), unlabeled_tfms=True, mixup=True, truth=truth)
    a = run(data, 'strong', FEW, tmp_path)
    with patch('fastai_lp.experiments.train.lp_callback', own): b = run(data, 'lp', FEW, tmp_path)
    assert a['stages'][1][-1]['error_rate'] == b['stages'][1][-1]['error_rate']
    assert [o['accuracy'] for o in a['history']] == [o['accuracy'] for o in b['history']]


@pytest.mark.parametrize('changes, match', [(dict(network='vgg'), 'network must be'),
    (dict(optimizer='lamb'), 'optimizer must be'), (dict(schedule='step'), 'schedule must be')], ids=str)
def test_unknown_settings(data, changes, match, tmp_path):
    with pytest.raises(ValueError, match=match): run(data, 'lp', replace(FEW, **changes), tmp_path)


# Files

@pytest.fixture
def stop(monkeypatch):
    "Interrupts the last batch of an epoch of a stage, within a block"
    def stop_at(stage, epoch):
        def before_batch(watch):
            second = any(isinstance(cb, LPCallback) for cb in watch.learn.cbs)
            last = watch.training and watch.epoch == epoch and watch.iter == len(watch.dls.train)-1
            if last and second == (stage == 2): raise KeyboardInterrupt
        monkeypatch.setattr(EpochTimer, 'before_batch', before_batch, raising=False)
        return pytest.raises(KeyboardInterrupt)
    return stop_at


def tensors(o):
    "All tensors in nested lists and dicts"
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): o = list(o.values())
    return [t for x in o for t in tensors(x)] if isinstance(o, (list, tuple)) else []


def contents(file):
    if file.suffix == '.pth': return tensors(torch.load(file, weights_only=True))
    return tensors(vars(LPInterpretation.load(file).pseudo))


@pytest.mark.parametrize('method, recipe, stage, epoch', [('lp', FEW, 1, 1), ('lp', FEW, 2, 2), ('mt', FEW, 1, 1),
    ('mt+lp', replace(FEW, network='convnet13', stage1=1, stage2=2), 2, 1), ('strong', FEW, 2, 1)],
    ids=['lp-1', 'lp-2', 'mt-1', 'mt+lp-13-2', 'strong-2'])
@pytest.mark.filterwarnings('ignore:LPCallback')
def test_an_interrupted_run_ends_with_the_same_bits(data, method, recipe, stage, epoch, tmp_path, stop, monkeypatch):
    "Of the stripes; test_commands has the digits"
    through = run(data, method, recipe, tmp_path/'a')
    with stop(stage, epoch): run(data, method, recipe, tmp_path/'b')
    monkeypatch.undo()
    assert figures(run(data, method, recipe, tmp_path/'b')) == figures(through)
    a, b = (sorted((tmp_path/o).iterdir()) for o in 'ab')
    assert [o.name for o in a] == [o.name for o in b]
    for x, y in zip(a, b):
        pairs = list(zip(contents(x), contents(y), strict=True))
        assert len(pairs) >= 5
        for p, q in pairs: assert torch.equal(p, q), x.name


def test_methods_share_their_first_stage(data, tmp_path):
    methods = 'supervised', 'lp', 'mt', 'mt+lp'
    with redirect_stdout(StringIO()) as out: runs = [run(data, m, FEW, tmp_path) for m in methods]
    assert runs[0]['stages'] == runs[1]['stages'][:1]
    assert runs[2]['stages'] == runs[3]['stages'][:1]
    assert out.getvalue().count('2 of 2 epochs are done') == 2
    assert sorted(o.name for o in tmp_path.glob('*stage1.pth')) == ['run-labeled-stage1.pth', 'run-mt-stage1.pth']


def test_finished_files_are_only_used_for_their_data(data, tmp_path):
    "Other labels, another test set and other images under the same name are refused"
    run(data, 'supervised', FEW, tmp_path)
    images = data.images.clone()
    images[0] += 1
    for other in (show_labels(data, 9, seed=1), replace(data, test=data.test[:9]), replace(data, images=images)):
        with pytest.raises(ValueError, match='another fit .images .* in the file'): run(other, 'supervised', FEW, tmp_path)


def test_a_fresh_teacher_is_not_the_initial_student(data, tmp_path, monkeypatch):
    made, real = [], train.network_of
    monkeypatch.setattr(train, 'network_of', lambda *args: made.append(deepcopy(net := real(*args))) or net)
    run(data, 'mt+lp', replace(FEW, stage1=1, stage2=1, fresh_teacher=True), tmp_path)
    student, teacher = made
    assert not any(torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters()) if p.ndim > 1)


@pytest.mark.parametrize('event', ['after_pred', 'after_backward', 'before_validate'])
def test_autocast_ends_with_the_fit(data, event, tmp_path, monkeypatch):
    def stop(self): raise KeyboardInterrupt
    monkeypatch.setattr(EpochTimer, event, stop, raising=False)
    with pytest.raises(KeyboardInterrupt): run(data, 'supervised', replace(FEW, bf16=True), tmp_path)
    assert not torch.is_autocast_enabled('cpu')
    assert (torch.ones(2, 2)@torch.ones(2, 2)).dtype == torch.float32
