"The paper's experiments: every method, stopped and resumed, and from the command line."
import io
import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastai_lp.experiments.train
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import ImageArrays, digits, show_labels
from fastai_lp.interpret import LPInterpretation
from fastai_lp.experiments.recipes import METHODS, RECIPES, Recipe, file_name, settings_of
from fastai_lp.experiments.train import run_method


def stripes(n, size, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:size, :size]
    truth = np.arange(n) % classes
    waves = [np.sin((i, j, i+j)[c % 3]*rng.uniform(.7, .9)*(1 + c//3) + rng.uniform(0, 6)) for c in truth]
    return np.stack([(128 + 70*w[None]*rng.uniform(.3, 1, (3, 1, 1)) + rng.normal(0, 25, (3, size, size))).clip(0, 255).astype('uint8') for w in waves]), truth


@pytest.fixture(scope='module')
def data():
    images, truth = stripes(90, 12)
    return show_labels(ImageArrays(torch.from_numpy(images), truth, np.arange(72), np.arange(72, 90)), 9)


FEW = Recipe(bs=16, labeled_bs=6, stage1=2, stage2=3, k=7)


def figures(run):
    "What must be equal, whatever the clock says"
    stages = [[{k: v for k, v in row.items() if k not in ('lp_sec', 'sec')} for row in stage] for stage in run['stages']]
    history = [{k: v for k, v in row.items() if k not in ('sec', 'seconds')} for row in run['history']]
    return str((stages, history, run['error_rate'], run['top5_error'], run['kept']))


class Stop:
    "Interrupts the last batch of an epoch"
    def __init__(self, stage, epoch): self.stage, self.epoch = stage, epoch
    def before_batch(self):
        def before_batch(watch):
            second = any(isinstance(cb, LPCallback) for cb in watch.learn.cbs)
            if watch.training and watch.epoch == self.epoch and watch.iter == len(watch.dls.train)-1 and second == (self.stage == 'stage2'): raise KeyboardInterrupt
        return before_batch


@pytest.mark.parametrize('of_digits', [False, True])
@pytest.mark.parametrize('method, stage, epoch', [('lp', 'stage1', 1), ('lp', 'stage2', 2), ('mt', 'stage1', 1), ('mt+lp', 'stage2', 1), ('gtg', 'stage2', 1)])
def test_stopped_and_resumed(data, of_digits, method, stage, epoch, tmp_path, monkeypatch):
    "Bitwise: figures, weights, the teacher's too, and pseudo-labels"
    if of_digits: data, recipe = digits(20), replace(RECIPES['digits'], stage1=2, stage2=3, width=4)
    else: recipe = replace(FEW, bs=8, labeled_bs=4)
    through = run_method(data, method, recipe, tmp_path/'a', device='cpu', bar=False)
    with monkeypatch.context() as m:
        m.setattr(fastai_lp.experiments.train._Watch, 'before_batch', Stop(stage, epoch).before_batch(), raising=False)
        with pytest.raises(KeyboardInterrupt): run_method(data, method, recipe, tmp_path/'b', device='cpu', bar=False)
    resumed = run_method(data, method, recipe, tmp_path/'b', device='cpu', bar=False)
    assert figures(resumed) == figures(through)
    assert (method == 'mt' and not of_digits) == (len(through['stages']) == 1)
    files = sorted(o.name for o in (tmp_path/'a').iterdir())
    assert files == sorted(o.name for o in (tmp_path/'b').iterdir()) and len([o for o in files if o.endswith('.npz')]) == (0 if method == 'mt' else 3)
    for file in files:
        a, b = (tmp_path/o/file for o in 'ab')
        if file.endswith('.pth'): states = [{**o['model'], **(o['mt'][0]['teacher'] if o['mt'] else {})} for o in (torch.load(f, weights_only=True) for f in (a, b))]
        else: states = [{k: v for k, v in vars(LPInterpretation.load(f).pseudo).items() if isinstance(v, torch.Tensor)} for f in (a, b)]
        assert len(states[0]) >= 5 and states[0].keys() == states[1].keys()
        for k in states[0]: assert torch.equal(states[0][k], states[1][k]), (file, k)


def test_methods_share_their_first_stage(data, tmp_path, capsys):
    runs = [run_method(data, m, FEW, tmp_path, device='cpu', bar=False) for m in ('supervised', 'lp', 'mt', 'mt+lp')]
    assert runs[0]['stages'] == runs[1]['stages'][:1] and runs[2]['stages'] == runs[3]['stages'][:1]
    assert capsys.readouterr().out.count('2 of 2 epochs are done') == 2
    assert sorted(o.name for o in tmp_path.glob('*stage1.pth')) == ['run-labeled-stage1.pth', 'run-mt-stage1.pth']


def test_ablation_and_kept_pseudo_labels(data, tmp_path):
    runs = {o: run_method(data, 'lp', replace(FEW, omega=o[0], zeta=o[1]), tmp_path, keep=(0,), device='cpu', bar=False) for o in ((True, True), (False, True), (True, False), (False, False))}
    for (omega, zeta), r in runs.items():
        interp = LPInterpretation.load(tmp_path/r['kept'][0])
        p = interp.pseudo
        assert (p.certainty[~p.labeled] == 1).all() == (not omega) and (p.class_weights == 1).all() == (not zeta)
        assert p.accuracy(interp.truth) == pytest.approx(r['history'][0]['accuracy']) and p.W is None
    assert len({r['kept'][0] for r in runs.values()}) == 4


def test_paper_settings():
    assert set(RECIPES) == {'digits', 'cifar10', 'cifar100', 'mini_imagenet'} and METHODS == ('supervised', 'network', 'gtg', 'lp', 'strong', 'mt', 'mt+lp', 'diffusion')
    r = RECIPES['cifar10']
    assert (r.lr, r.bs, r.labeled_bs, r.stage1, r.stage2, r.momentum, r.wd, r.k, r.gamma, r.alpha, r.max_iter) == (.05, 100, 50, 180, 180, .9, 2e-4, 50, 3, .99, 20)
    assert (r.tol, r.seeds, r.omega_norm, r.zeta_norm, r.decay, r.consistency, r.rampup, r.logit_distance) == (1e-6, 'class_size', 'all', 'items', .97, 100, 5, .01)
    assert not (r.bf16 or r.augment_descriptors or r.fresh_teacher or r.baselines_go_on) and r.l2 and (r.optimizer, r.schedule) == ('sgd', 'cosine')


@pytest.mark.parametrize('changes', [dict(omega_norm='unlabeled'), dict(zeta_norm='classes'), dict(seeds='raw'), dict(k=3), dict(gamma=1.), dict(alpha=.5), dict(max_iter=1),
    dict(augment_descriptors=True), dict(lr=.01), dict(momentum=.5), dict(wd=.1), dict(zero_at=1.), dict(l2=False), dict(bs=12), dict(bf16=True)])
def test_settings_reach_the_run(data, changes, tmp_path):
    a, b = (run_method(data, 'lp', replace(FEW, network='small', **o), tmp_path/str(i), device='cpu', bar=False) for i, o in enumerate(({}, changes)))
    assert figures(a) != figures(b)
    if changes.keys() & {'omega_norm', 'zeta_norm', 'seeds', 'k', 'gamma', 'alpha', 'max_iter', 'augment_descriptors'}:
        assert a['stages'][0] == b['stages'][0] or figures(dict(a, stages=a['stages'][:1], history=[], error_rate=0, top5_error=0)) == figures(dict(b, stages=b['stages'][:1], history=[], error_rate=0, top5_error=0))


@pytest.mark.parametrize('changes', [dict(decay=.5), dict(consistency=1.), dict(rampup=50), dict(logit_distance=.5), dict(fresh_teacher=True)])
def test_settings_of_mean_teacher_reach_the_run(data, changes, tmp_path):
    a, b = (run_method(data, 'mt+lp', replace(FEW, network='convnet13' if 'logit_distance' in changes else 'small', stage2=2, **o), tmp_path/str(i), device='cpu', bar=False) for i, o in enumerate(({}, changes)))
    assert figures(a) != figures(b)


TRICKS = dict(sharp=dict(temperature=.3, balance='sinkhorn'), even=dict(balance='sinkhorn', prior='uniform'), views=dict(unlabeled_views=2), augment=dict(augment=2),
    thumbnail=dict(backbone='thumbnail'), beside=dict(backbone='thumbnail', beside=1.), k=dict(k=3), mixup=dict(mixup=.4),
    steps=dict(steps=2), strong=dict(strong_tfms=True), milder=dict(strong_tfms=dict(degrees=1., cutout=0)))


@pytest.mark.parametrize('tricks', TRICKS)
def test_tricks_reach_the_run(data, tricks, tmp_path):
    "Each in files of its own, after the same first stage"
    recipe = replace(FEW, network='small', width=4)
    a, b = (run_method(data, 'lp', o, tmp_path, device='cpu', bar=False) for o in (recipe, replace(recipe, tricks=TRICKS[tricks])))
    assert figures(a) != figures(b) and figures(dict(a, stages=a['stages'][:1], history=[], error_rate=0, top5_error=0, kept=0)) == figures(dict(b, stages=b['stages'][:1], history=[], error_rate=0, top5_error=0, kept=0))
    assert b['recipe']['tricks'] == TRICKS[tricks] and not set(a['kept']) & set(b['kept'])
    assert len(list(tmp_path.glob('*-stage1.pth'))) == 1 and len(list(tmp_path.glob('*-stage2.pth'))) == 2
    assert json.loads(json.dumps(b))['recipe'] == b['recipe']


def test_strong_is_the_preset(data, tmp_path):
    recipe = replace(FEW, network='small', width=4, k=None)
    a = run_method(data, 'strong', recipe, tmp_path, device='cpu', bar=False)
    same = run_method(data, 'lp', replace(recipe, k=10, tricks=dict(strong_tfms=True, mixup=True, temperature=.2, balance='sinkhorn', prior='labels', omega=False, backbone='thumbnail', beside=1.)), tmp_path, device='cpu', bar=False)
    assert a['stages'][1][-1]['error_rate'] == same['stages'][1][-1]['error_rate'] and [o['accuracy'] for o in a['history']] == [o['accuracy'] for o in same['history']]
    other = run_method(data, 'strong', replace(recipe, tricks=dict(omega=True)), tmp_path, device='cpu', bar=False)
    assert [o['certainty'] for o in other['history']] != [o['certainty'] for o in a['history']]


def test_a_stopped_run_with_tricks(data, tmp_path, monkeypatch):
    recipe = replace(FEW, network='small', width=4, tricks=dict(steps=2, unlabeled_views=2))
    through = run_method(data, 'strong', recipe, tmp_path/'a', device='cpu', bar=False)
    with monkeypatch.context() as m:
        m.setattr(fastai_lp.experiments.train._Watch, 'before_batch', Stop('stage2', 1).before_batch(), raising=False)
        with pytest.raises(KeyboardInterrupt): run_method(data, 'strong', recipe, tmp_path/'b', device='cpu', bar=False)
    assert figures(run_method(data, 'strong', recipe, tmp_path/'b', device='cpu', bar=False)) == figures(through)


def test_settings_that_came_later_leave_older_runs_their_names():
    "Results and checkpoints from before have no such settings; a run without them is still the same run"
    assert not {'tricks', 'stride'} & set(settings_of(Recipe())) and set(settings_of(Recipe())) == set(asdict(Recipe())) - {'tricks', 'stride'}
    assert settings_of(Recipe(stride=2, tricks=dict(k=3)))['tricks'] == dict(k=3)
    assert file_name('a', 'lp', Recipe()) == 'a-lp' and file_name('a', 'lp', Recipe(tricks=dict(k=3))) != file_name('a', 'lp', Recipe(tricks=dict(k=4)))


@pytest.mark.parametrize('changes, said', [(dict(network='vgg'), 'network'), (dict(optimizer='lamb'), 'optimizer'), (dict(schedule='step'), 'schedule')])
def test_unknown_settings(data, changes, said, tmp_path):
    with pytest.raises(ValueError, match=said): run_method(data, 'lp', replace(FEW, **changes), tmp_path, device='cpu', bar=False)


@pytest.fixture(scope='module')
def cifar_like(tmp_path_factory):
    "An .npz in the form that `cifar10` reads, ten classes"
    file = tmp_path_factory.mktemp('cifar')/'cifar.npz'
    def encoded(n, seed):
        images, truth = stripes(n, 32, seed, 10)
        files = []
        for o in images:
            out = io.BytesIO()
            Image.fromarray(o.transpose(1, 2, 0)).save(out, 'jpeg')
            files.append(out.getvalue())
        return np.frombuffer(b''.join(files), np.uint8), np.cumsum([0, *map(len, files)]), truth
    parts = {f'{part}_{k}': v for part, n, seed in (('train', 80, 0), ('test', 20, 1)) for k, v in zip(('jpeg', 'offsets', 'labels'), encoded(n, seed))}
    np.savez(file, classes=np.array([f'class{i}' for i in range(10)]), **parts)
    np.savez(file.with_name('splits.npz'), labels_20=np.stack([np.arange(20)+10*i for i in range(3)]))
    return file


def names(folder): return [re.sub('-[0-9a-f]{6}-', '-', json.loads(line)['name']) for line in (folder/'cifar10.jsonl').read_text().splitlines()]


def test_command_line(cifar_like, tmp_path):
    lp_train = str(Path(sys.executable).with_name('lp_train'))
    def call(*args): return subprocess.run([lp_train, 'cifar10', '--labels', '20', '--data', str(cifar_like), '--epochs', '1', '--out', str(tmp_path), '--device', 'cpu', *args], capture_output=True, text=True)
    split = '--split', '1', '--splits', str(cifar_like.with_name('splits.npz'))
    drawn = call('--methods', 'diffusion', '--split', '0-1', '--out', str(tmp_path/'b'))
    assert drawn.returncode == 0  # the file beside the images is another
    assert names(tmp_path/'b') == ['cifar10-20-seed0', 'cifar10-20-seed1'] and 'with seeds 0-1' in drawn.stdout
    res = call('--methods', 'supervised,lp', *split)
    assert res.returncode == 0 and 'cifar10, 20 labels, 1 splits of' in res.stdout and '\n| lp         |' in res.stdout, res.stderr
    assert call('--methods', 'lp', '--no-omega', *split).returncode == 0
    runs = [json.loads(line) for line in (tmp_path/'cifar10.jsonl').read_text().splitlines()]
    assert names(tmp_path) == ['cifar10-20-split1']*3 and [(r['method'], r['recipe']['omega']) for r in runs] == [('supervised', True), ('lp', True), ('lp', False)]
    assert runs[1]['environment']['fastai_lp'] and runs[1]['labels'] == 20 and runs[1]['items'] == 80 and len(runs[1]['history']) == 1
    assert call('--methods', 'lp', *split).returncode == 0
    assert len((tmp_path/'cifar10.jsonl').read_text().splitlines()) == 3  # the same run has one line
    for args, said in ((('--methods', 'vat', *split), 'unknown method(s) vat'), (split[2:], 'expected --split'), (('--split', 'ten'), 'expected numbers')):
        res = call(*args)
        assert res.returncode and said in res.stderr and 'Traceback' not in res.stderr


def test_splits_beside_the_images(cifar_like, tmp_path):
    "DATASET_splits.npz in the folder of --data is what --split means"
    for o in ('cifar.npz', 'splits.npz'): (tmp_path/('cifar10_'*(o == 'splits.npz') + o)).symlink_to(cifar_like.with_name(o))
    res = subprocess.run([Path(sys.executable).with_name('lp_train'), 'cifar10', '--labels', '20', '--data', tmp_path/'cifar.npz', '--methods', 'diffusion', '--split', '2', '--out', tmp_path], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    assert names(tmp_path) == ['cifar10-20-split2'] and 'cifar10_splits.npz' in res.stdout


def test_label_lists(cifar_like, tmp_path):
    "As the paper's authors publish their splits: a file for each, `NAME LABEL` per line"
    for split, first in ((10, 0), (11, 10)): (tmp_path/f'{split}.txt').write_text(''.join(f'{i} class{i % 10}\n' for i in range(first, first+20)))
    def call(splits, split): return subprocess.run([Path(sys.executable).with_name('lp_train'), 'cifar10', '--labels', '20', '--data', cifar_like, '--methods', 'diffusion',
        '--splits', splits, '--split', split, '--out', tmp_path], capture_output=True, text=True)
    res = call(f'{tmp_path}/{{split}}.txt', '10-11')
    assert res.returncode == 0 and names(tmp_path) == ['cifar10-20-split10', 'cifar10-20-split11'], res.stderr
    (tmp_path/'12.txt').write_text('0 class0\n')
    for splits, split, said in ((f'{tmp_path}/10.txt', '10', 'with {split} where'), (f'{tmp_path}/{{split}}.txt', '12', 'class1'), (f'{tmp_path}/{{split}}.txt', '13', 'no label list')):
        res = call(splits, split)
        assert res.returncode and said in res.stderr and 'Traceback' not in res.stderr


def test_finished_files_are_of_their_data_only(data, tmp_path):
    "Other labels, another test set, other images under the same name: refused, where their figures would be the old ones'"
    run_method(data, 'supervised', replace(FEW, network='small'), tmp_path, device='cpu', bar=False)
    images = data.images.clone()
    images[0] += 1
    for other in (show_labels(data, 9, seed=1), replace(data, test=data.test[:9]), replace(data, images=images)):
        with pytest.raises(ValueError, match='another fit .images .* in the file'): run_method(other, 'supervised', replace(FEW, network='small'), tmp_path, device='cpu', bar=False)


def test_fresh_teacher_is_not_the_first_student(data, tmp_path, monkeypatch):
    made = []
    network = fastai_lp.experiments.train._network
    monkeypatch.setattr(fastai_lp.experiments.train, '_network', lambda *args: made.append(deepcopy(net := network(*args))) or net)
    run_method(data, 'mt+lp', replace(FEW, network='small', stage1=1, stage2=1, fresh_teacher=True), tmp_path, device='cpu', bar=False)
    student, teacher = made
    assert not any(torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters()) if p.ndim > 1)


@pytest.mark.parametrize('event', ['after_pred', 'after_backward', 'before_validate'])
def test_autocast_ends_with_the_fit(data, event, tmp_path, monkeypatch):
    def stop(self): raise KeyboardInterrupt
    monkeypatch.setattr(fastai_lp.experiments.train._Watch, event, stop, raising=False)
    with pytest.raises(KeyboardInterrupt): run_method(data, 'supervised', replace(FEW, network='small', bf16=True), tmp_path, device='cpu', bar=False)
    assert not torch.is_autocast_enabled('cpu') and (torch.ones(2, 2)@torch.ones(2, 2)).dtype == torch.float32
