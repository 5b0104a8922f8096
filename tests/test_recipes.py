"The paper's experiments: every method, stopped and resumed, and from the command line."
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image

import fastai_lp.recipes
from fastai_lp.callback import LPCallback
from fastai_lp.datasets import ImageArrays, show_labels
from fastai_lp.interpret import LPInterpretation
from fastai_lp.recipes import PAPER_METHODS, RECIPES, PaperRecipe, cosine, paper_table, run_method


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


FEW = PaperRecipe(bs=16, labeled_bs=6, stage1=2, stage2=3, k=7)


def figures(run):
    "What must be equal, whatever the clock says"
    stages = [[{k: v for k, v in row.items() if k != 'lp_sec'} for row in stage] for stage in run['stages']]
    history = [{k: v for k, v in row.items() if k not in ('sec', 'seconds')} for row in run['history']]
    return str((stages, history, run['error_rate'], run['top5_error'], run['kept']))


class Stop(Callback):
    def __init__(self, kind, epoch): self.kind, self.at = kind, epoch
    def before_batch(self):
        has = any(isinstance(cb, LPCallback) for cb in self.learn.cbs)
        if self.training and self.epoch == self.at and self.iter == self.dls.train.__len__()-1 and has == (self.kind == 'stage2'): raise KeyboardInterrupt


@pytest.mark.parametrize('method, stage, epoch', [('lp', 'stage1', 1), ('lp', 'stage2', 2), ('mt+lp', 'stage2', 1), ('gtg', 'stage2', 1)])
def test_stopped_and_resumed(data, method, stage, epoch, tmp_path, monkeypatch):
    recipe = replace(FEW, bs=8, labeled_bs=4)
    through = run_method(data, method, recipe, tmp_path/'a', keep=(0, 2), device='cpu', bar=False)
    with monkeypatch.context() as m:
        m.setattr(fastai_lp.recipes, 'cosine', lambda *a: _Both(cosine(*a), Stop(stage, epoch)))
        with pytest.raises(KeyboardInterrupt): run_method(data, method, recipe, tmp_path/'b', keep=(0, 2), device='cpu', bar=False)
    resumed = run_method(data, method, recipe, tmp_path/'b', keep=(0, 2), device='cpu', bar=False)
    assert figures(resumed) == figures(through)
    for file in (tmp_path/'a').glob('*.pth'):
        a, b = (torch.load(tmp_path/o/file.name, weights_only=True)['model'] for o in 'ab')
        for k in a: assert torch.equal(a[k], b[k]), k


class _Both(Callback):
    "Two callbacks in one place"
    order = 60
    def __init__(self, schedule, stop): self.schedule, self.stop = schedule, stop
    def __call__(self, name):
        for cb in (self.schedule, self.stop):
            cb.learn = self.learn
            cb(name)


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
    assert set(RECIPES) == {'cifar10', 'cifar100', 'mini_imagenet'} and PAPER_METHODS == ('supervised', 'network', 'gtg', 'lp', 'mt', 'mt+lp')
    r = RECIPES['cifar10']
    assert (r.lr, r.bs, r.labeled_bs, r.stage1, r.stage2, r.momentum, r.wd, r.k, r.gamma, r.alpha, r.max_iter) == (.05, 100, 50, 180, 180, .9, 2e-4, 50, 3, .99, 20)


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


def test_command_line(cifar_like, tmp_path):
    lp_train = str(Path(sys.executable).with_name('lp_train'))
    def call(*args): return subprocess.run([lp_train, 'cifar10', '--labels', '20', '--data', str(cifar_like), '--epochs', '1', '--out', str(tmp_path), '--device', 'cpu', *args], capture_output=True, text=True)
    split = '--split', '1', '--splits', str(cifar_like.with_name('splits.npz'))
    res = call('--methods', 'supervised,lp', *split)
    assert res.returncode == 0 and '| lp | 20 |' in res.stdout, res.stderr
    assert call('--methods', 'lp', '--no-omega', *split).returncode == 0
    runs = [json.loads(line) for line in (tmp_path/'cifar10.jsonl').read_text().splitlines()]
    assert [(r['name'], r['method'], r['recipe']['omega']) for r in runs] == [('cifar10-20-split1', 'supervised', True), ('cifar10-20-split1', 'lp', True), ('cifar10-20-split1', 'lp', False)]
    assert runs[1]['environment']['fastai_lp'] and runs[1]['labels'] == 20 and runs[1]['items'] == 80 and len(runs[1]['history']) == 1
    assert call('--methods', 'lp', *split).returncode == 0
    assert len((tmp_path/'cifar10.jsonl').read_text().splitlines()) == 3  # the same run has one line
    for args, said in ((('--methods', 'vat', *split), 'unknown method(s) vat'), (('--split', '1'), '--split and --splits together')):
        res = call(*args)
        assert res.returncode and said in res.stderr and 'Traceback' not in res.stderr
    res = subprocess.run([lp_train, 'digits', '--epochs', '3'], capture_output=True, text=True)
    assert res.returncode and 'the digits have' in res.stderr


def test_table():
    runs = [dict(method='lp', labels=500, error_rate=e, history=[dict(accuracy=.7)]) for e in (.3, .32)] + [dict(method='mt', labels=500, error_rate=.9, teacher_error_rate=.25, history=[])]
    assert paper_table(runs).splitlines()[2:] == ['| lp | 500 | 31.0 ± 1.4 | 70.0 ± 0.0 | 2 |', '| mt | 500 | 25.0 | – | 1 |']
