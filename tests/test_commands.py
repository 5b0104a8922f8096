"`lp_train`: results file, table and figure, splits, and messages for wrong calls."
import io
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from fastai_lp.experiments import runs
from fastai_lp.experiments.commands import lp_train
from fastai_lp.experiments.figures import lp_figures
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.report import lp_tables
from fastai_lp.experiments.results import plot_runs, read_lines, row_name, summarize, to_markdown
from fastai_lp.experiments.runs import run_experiment
from fastai_lp.utils.files import read_json_lines

SMALL = replace(RECIPES['digits'], stage1=1, stage2=2, width=8)


def program(name): return Path(sys.executable).with_name(name)


def test_programs_exist():
    ours = [o for o in entry_points(group='console_scripts') if o.value.startswith('fastai_lp.')]
    assert {o.name for o in ours} == {'lp_label', 'lp_train', 'lp_tables', 'lp_figures'}
    for o in ours: assert callable(o.load())


# One line per run

@pytest.fixture(scope='module')
def digits_runs(tmp_path_factory):
    "Runs of three methods on two draws, and their folder"
    out = tmp_path_factory.mktemp('digits')/'new'
    return run_experiment('digits', 20, ['lp', 'supervised', 'diffusion'], [0, 1], SMALL, out=out, device='cpu'), out


def test_a_run_is_a_line(digits_runs):
    runs, out = digits_runs
    assert sorted(read_lines(out/'digits.jsonl'), key=str) == sorted(json.loads(json.dumps(runs)), key=str)
    assert [(r['method'], r['seed']) for r in runs] == [(m, s) for m in ('lp', 'supervised', 'diffusion') for s in (0, 1)]


def test_what_a_line_contains(digits_runs):
    (lp, *_), out = digits_runs
    assert (lp['dataset'], lp['labels'], lp['items']) == ('digits', 20, 1347)
    assert [row['epoch'] for row in lp['history']] == [0, 1]
    assert [len(o) for o in lp['stages']] == [1, 2]
    assert lp['error_rate'] == lp['stages'][1][-1]['error_rate']
    for row in sum(lp['stages'], []):
        assert row['top5_error'] <= row['error_rate']
        assert row['sec'] > 0
    assert lp['seconds'] == {f'stage{i+1}': sum(row['sec'] for row in o) for i, o in enumerate(lp['stages'])}
    assert lp['recipe']['lr'] == RECIPES['digits'].lr['lp']
    assert lp['recipe']['stage2'] == 2
    assert lp['environment']['torch'] == torch.__version__.partition('+')[0]
    assert lp['kept'] == [f"{lp['name']}-lp-{i}.npz" for i in (0, 1)]
    for o in lp['kept']: assert (out/o).exists()


def test_a_finished_run_is_neither_repeated_nor_written_again(digits_runs, tmp_path):
    runs, out = digits_runs
    before = (out/'digits.jsonl').read_text()
    again = run_experiment('digits', 20, ['lp', 'lp'], [0, 0], SMALL, out=out, device='cpu')
    assert [o['stages'] for o in again] == [runs[0]['stages']]
    assert (out/'digits.jsonl').read_text() == before


def test_a_seed_decides_the_result(digits_runs, tmp_path):
    again = run_experiment('digits', 20, ['lp'], [1], SMALL, out=tmp_path, device='cpu')[0]
    first = digits_runs[0][1]
    errors = [[row['error_rate'] for o in r['stages'] for row in o] for r in (first, again)]
    assert errors[0] == errors[1]
    assert first['history'][-1]['accuracy'] == again['history'][-1]['accuracy']


def without_seconds(run):
    stages = [[{k: v for k, v in row.items() if not k.endswith('sec')} for row in o] for o in run['stages']]
    history = [{k: v for k, v in row.items() if k not in ('sec', 'seconds')} for row in run['history']]
    return run | dict(stages=stages, history=history, seconds=None)


def test_the_number_of_processes_changes_no_result(digits_runs, tmp_path):
    again = run_experiment('digits', 20, ['lp', 'supervised', 'diffusion'], [0, 1], SMALL, out=tmp_path, device='cpu', jobs=2)
    assert list(map(without_seconds, again)) == list(map(without_seconds, digits_runs[0]))
    assert sorted(read_lines(tmp_path/'digits.jsonl'), key=str) == sorted(json.loads(json.dumps(again)), key=str)


def test_an_error_in_a_process_is_a_sentence(tmp_path):
    for i in (0, 1): (tmp_path/f'digits-20-seed{i}-supervised-stage1.pth').write_bytes(b'x')
    with pytest.raises(SystemExit, match='stage1.pth is truncated'):
        lp_train('digits', methods='supervised', seeds=2, out=str(tmp_path), device='cpu', jobs=2)


def test_a_log_file_has_a_line_per_run(tmp_path, capsys):
    lp_train('digits', methods='diffusion', seeds=2, out=str(tmp_path), device='cpu')
    printed = capsys.readouterr().out
    assert re.search(r'^digits-20-seed1-diffusion: test error \d+\.\d%, \d+\.\d s \(2 of 2\)$', printed, re.M)
    assert '\r' not in printed


def test_other_settings_have_other_lines_and_files(tmp_path):
    def call(methods, **changes):
        return run_experiment('digits', 20, methods, [0], replace(SMALL, **changes), out=tmp_path, device='cpu')[0]
    first, _, other = call(['lp']), call(['lp'], omega=False), call(['lp'], stage2=3)
    runs = read_lines(tmp_path/'digits.jsonl')
    assert [(r['recipe']['omega'], len(r['stages'][1])) for r in runs] == [(True, 2), (False, 2), (True, 3)]
    assert other['name'] != first['name']
    assert not {*first['kept']} & {*other['kept']}
    for r in runs:
        for o in r['kept']: assert (tmp_path/o).exists()
    for omega in (True, False): call(['supervised'], omega=omega)  # it has no weights to switch off
    assert [row_name(r) for r in read_lines(tmp_path/'digits.jsonl')[3:]] == ['supervised']


@pytest.mark.slow
def test_a_killed_call_ends_with_the_same_bits(tmp_path):
    "kill -9 in the second stage, and the same call again"
    def call(out):
        options = '--methods', 'mt+lp', '--seeds', '1', '--epochs', '1,3', '--device', 'cpu'
        return [program('lp_train'), 'digits', *options, '--out', out]
    subprocess.run(call(tmp_path/'a'), check=True, capture_output=True)
    stage2 = next((tmp_path/'a').glob('*-stage2.pth')).name
    with subprocess.Popen(call(tmp_path/'b'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path/'b'/stage2).exists() and process.poll() is None: time.sleep(.05)
        process.kill()
    assert process.returncode == -9
    assert not (tmp_path/'b'/'digits.jsonl').exists()
    assert torch.load(tmp_path/'b'/stage2)['epoch'] < 3
    subprocess.run(call(tmp_path/'b'), check=True, capture_output=True)
    a, b = (torch.load(tmp_path/o/stage2)['model'] for o in 'ab')
    for k in a: assert torch.equal(a[k], b[k]), k
    def figures(out):
        run = read_lines(tmp_path/out/'digits.jsonl')[0]
        stages = [[{k: v for k, v in row.items() if not k.endswith('sec')} for row in o] for o in run['stages']]
        return stages, [(h['accuracy'], h['network_accuracy'], h['residual']) for h in run['history']], run['kept']
    assert figures('a') == figures('b')


@pytest.mark.slow
def test_an_interrupted_call_with_processes_continues(tmp_path):
    options = '--methods', 'lp', '--seeds', '2', '--epochs', '1,5', '--jobs', '2', '--device', 'cpu'
    def call(out): return [program('lp_train'), 'digits', *options, '--out', tmp_path/out]
    subprocess.run(call('a'), check=True, capture_output=True)
    def heeds_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by default in a background process
    with subprocess.Popen(call('b'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heeds_ctrl_c) as process:
        while len([*(tmp_path/'b').glob('*stage2.pth')]) < 2 and process.poll() is None: time.sleep(.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)  # ends with the last process
    assert process.returncode != 0
    assert not [*(tmp_path/'b').glob('*.tmp')]
    done = tmp_path/'b'/'digits.jsonl'
    assert not done.exists() or len(read_lines(done)) < 2  # one run can end before the other one begins its second stage
    subprocess.run(call('b'), check=True, capture_output=True)
    a, b = ({r['name'] + r['method']: without_seconds(r) for r in read_lines(tmp_path/o/'digits.jsonl')} for o in 'ab')
    assert a == b


def test_two_programs_share_one_file(tmp_path):
    "No line is lost or cut"
    code = ("import sys; from fastai_lp.utils.files import append_json_line\n"
        "for i in range(30): append_json_line(sys.argv[1], dict(name=sys.argv[2]+str(i), history=list(range(9000))))")
    file = tmp_path/'digits.jsonl'
    both = [subprocess.Popen([sys.executable, '-c', code, file, name]) for name in 'ab']
    assert [p.wait() for p in both] == [0, 0]
    assert sorted(r['name'] for _, r in read_json_lines(file)) == sorted(f'{o}{i}' for o in 'ab' for i in range(30))


# Table and figure

def made_up(method, error, accuracy=None, sec=2., teacher=None, **recipe):
    history = [] if accuracy is None else [dict(epoch=0, accuracy=.1), dict(epoch=1, accuracy=accuracy)]
    teacher = {} if teacher is None else dict(teacher_error_rate=teacher)
    return dict(method=method, error_rate=error, history=history, seconds=dict(stage1=sec/2, stage2=sec/2),
        recipe=dict(omega=True, zeta=True) | recipe, **teacher)


def test_summary_is_mean_and_standard_error():
    runs = [made_up('lp', e, 1-e) for e in (.1, .2, .3)]
    lp, sup, mt = summarize([*runs, made_up('supervised', .5, sec=1.), made_up('mt', .9, teacher=.25)])
    assert lp['error'] == pytest.approx([.2, .1/3**.5])
    assert (lp['runs'], lp['seconds']) == (3, 2)
    assert sup['error'] == [.5, None]
    assert sup['pseudo_accuracy'] is None
    assert mt['error'] == [.25, None]
    assert '| lp         | 20.0 ± 5.8   |' in to_markdown([lp, sup])
    assert '| supervised | 50.0         | –' in to_markdown([lp, sup])


def test_rows_have_the_weights_and_tricks_in_their_name():
    changes = dict(omega=False), dict(omega=False, zeta=False), dict(tricks=dict(k=3))
    assert [o['row'] for o in summarize([made_up('lp', .4, **o) for o in changes])] == ['lp, ω = 1', 'lp, ω = ζ = 1', 'lp, k=3']


def test_figure():
    runs = [*(made_up('lp', e, 1-e) for e in (.1, .2)), made_up('supervised', .5), made_up('lp', .3, .8, zeta=False)]
    left, right = plot_runs(runs, 'some').axes
    assert [o.get_text() for o in left.get_xticklabels()] == ['lp', 'supervised', 'lp, ζ = 1']
    assert [o.get_label() for o in right.lines] == ['lp', 'lp, ζ = 1']
    assert right.lines[0].get_ydata() == pytest.approx([10, 85])
    plt.close('all')


# Images and splits

@pytest.fixture(scope='module')
def cifar_like(tmp_path_factory):
    "An .npz that `cifar10` reads with ten classes, a file of splits, and label lists"
    folder = tmp_path_factory.mktemp('cifar')
    def encoded(n, seed):
        rng, files = np.random.default_rng(seed), []
        for i in range(n):
            pixels = (rng.integers(0, 60, (32, 32, 3)) + 19*(i % 10)).astype('uint8')
            Image.fromarray(pixels).save(out := io.BytesIO(), 'jpeg')
            files.append(out.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        return dict(jpeg=np.frombuffer(b''.join(files), np.uint8), offsets=offsets, labels=np.arange(n) % 10)
    parts = {f'{part}_{k}': v for part, n, seed in (('train', 80, 0), ('test', 20, 1)) for k, v in encoded(n, seed).items()}
    np.savez(folder/'cifar.npz', classes=np.array([f'class{i}' for i in range(10)]), **parts)
    np.savez(folder/'splits.npz', labels_20=np.stack([np.arange(20)+10*i for i in range(3)]))
    for split, first in ((10, 0), (11, 10)):
        (folder/f'{split}.txt').write_text(''.join(f'{i} class{i % 10}\n' for i in range(first, first+20)))
    (folder/'12.txt').write_text('0 class0\n')
    return folder


def call(out, data, **kwargs):
    "`lp_train cifar10`, and the names of the runs without the hash of the settings"
    lp_train('cifar10', labels=20, data=str(data), out=str(out), device='cpu', **kwargs)
    return [re.sub('-[0-9a-f]{6}-', '-', o['name']) for o in read_lines(out/'cifar10.jsonl')]


def test_rows_of_a_file_of_splits(cifar_like, tmp_path, capsys):
    kwargs = dict(split='1', splits=str(cifar_like/'splits.npz'), epochs='1')
    call(tmp_path, cifar_like/'cifar.npz', methods='supervised,lp', network='small', **kwargs)
    printed = capsys.readouterr().out
    assert 'cifar10, 20 labels, 1 splits of' in printed
    assert '\n| lp         |' in printed
    names = call(tmp_path, cifar_like/'cifar.npz', methods='lp', network='small', no_omega=True, **kwargs)
    assert names == ['cifar10-20-split1']*3
    runs = read_lines(tmp_path/'cifar10.jsonl')
    assert [(r['method'], r['recipe']['omega']) for r in runs] == [('supervised', True), ('lp', True), ('lp', False)]
    assert (runs[1]['labels'], runs[1]['items']) == (20, 80)
    assert (tmp_path/'cifar10.png').exists()


def test_splits_are_seeds_without_a_file(cifar_like, tmp_path, capsys):
    names = call(tmp_path, cifar_like/'cifar.npz', methods='diffusion', split='0-1')
    assert names == ['cifar10-20-seed0', 'cifar10-20-seed1']
    assert 'drawn with seeds 0-1' in capsys.readouterr().out


def test_file_of_splits_next_to_the_images(cifar_like, tmp_path):
    (tmp_path/'cifar.npz').symlink_to(cifar_like/'cifar.npz')
    (tmp_path/'cifar10_splits.npz').symlink_to(cifar_like/'splits.npz')
    assert call(tmp_path, tmp_path/'cifar.npz', methods='diffusion', split='2') == ['cifar10-20-split2']


def test_label_lists(cifar_like, tmp_path):
    lists = f'{cifar_like}/{{split}}.txt'
    names = call(tmp_path, cifar_like/'cifar.npz', methods='diffusion', split='10-11', splits=lists)
    assert names == ['cifar10-20-split10', 'cifar10-20-split11']


@pytest.mark.parametrize('splits, split, match', [('10.txt', '10', 'such as lists/{split}.txt'),
    ('{split}.txt', '12', 'class1'), ('{split}.txt', '13', 'no label list'),
    ('splits.npz', None, '--splits needs --split'), ('splits.npz', 'ten', 'must be numbers')])
def test_splits_that_do_not_fit(cifar_like, tmp_path, splits, split, match):
    with pytest.raises(SystemExit, match=match):
        call(tmp_path, cifar_like/'cifar.npz', methods='diffusion', splits=f'{cifar_like}/{splits}', split=split)


# Wrong calls

@pytest.mark.parametrize('kwargs, match', [(dict(methods='lp,svm'), r'unknown method\(s\) svm'),
    (dict(labels=25), 'multiple of 10'), (dict(labels=0), 'multiple of 10'), (dict(n_train=100), 'part of scikit-learn'),
    (dict(network='vgg'), "got 'vgg'"), (dict(network='convnet13'), "use 'small'"), (dict(epochs='5,0'), 'epochs must be'),
    (dict(split='9-3'), 'must be numbers'), (dict(seeds=0), 'seeds must be an integer'), (dict(dataset='cifar'), "unknown dataset 'cifar'"),
    (dict(dataset='mini_imagenet'), 'pass data'), (dict(dataset='cifar10', data='nowhere'), 'nowhere')], ids=str)
def test_wrong_calls(kwargs, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=match): lp_train(**{'dataset': 'digits', **kwargs})
    assert not list(tmp_path.glob('results/*.jsonl'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_wrong_call_has_no_traceback():
    res = subprocess.run([program('lp_train'), 'digits', '--device', 'cuda'], capture_output=True, text=True)
    assert res.returncode != 0
    assert 'finds no CUDA GPU' in res.stderr
    assert 'Traceback' not in res.stderr


@pytest.mark.parametrize('kwargs, match', [(dict(seeds=-1), 'seeds must be'), (dict(methods=''), "separated by commas, .* got ''"),
    (dict(methods='lp,,mt'), "got 'lp,,mt'"), (dict(device='gpu'), "device must be .* got 'gpu'"), (dict(device=''), "got ''"),
    (dict(device='meta'), "got 'meta'"), (dict(split='0-99999999999'), '100,000,000,000 runs'), (dict(seeds=10**9), '1,000,000,000 runs'),
    (dict(dataset='cifar10', data='x', n_train=0), 'n_train must be'), (dict(dataset='cifar10', data='x', n_test=-5), 'n_test must be'),
    (dict(splits='lists/{split}{x}.txt', split='0'), r'lists/0\{x\}.txt'), (dict(labels=-10), 'labels must be')], ids=str)
def test_wrong_values_are_a_sentence(kwargs, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=match): lp_train(**{'dataset': 'digits', **kwargs})
    assert not list(tmp_path.iterdir())


def in_the_way(folder, kind):
    "Something in `folder` that keeps lp_train from writing; returns its --out"
    if kind == 'file': (folder/'x').write_text('')
    elif kind == 'below a file': (folder/'y').write_text('')
    elif kind in ('jsonl', 'png'): (folder/'x'/f'digits.{kind}').mkdir(parents=True)
    else:
        (folder/'x').mkdir()
        (folder/'x'/'digits.jsonl').write_bytes({'not json': b'{"a": 1}\nx\n{}\n', 'binary': b'\xff\xfe\n', 'other': b'[1]\n'}[kind])
    return folder/('y/x' if kind == 'below a file' else 'x')


@pytest.mark.parametrize('kind, match', [('file', r'x \(File exists\): choose a writable folder'),
    ('below a file', 'choose a writable folder'), ('jsonl', 'digits.jsonl is a folder'),
    ('png', 'digits.png is a folder'), ('not json', 'line 2: this is not JSON'),
    ('binary', 'line 1: this is not JSON'), ('other', 'line 1: this is not a run')])
def test_results_that_cannot_be_written_stop_the_program_before_the_training(kind, match, tmp_path, monkeypatch):
    out = in_the_way(tmp_path, kind)
    monkeypatch.setattr(runs, 'run_method', lambda *a, **k: pytest.fail('has trained'))
    with pytest.raises(SystemExit, match=match): lp_train('digits', methods='diffusion', seeds=1, out=str(out), device='cpu')


def test_a_line_that_was_cut_is_written_again(tmp_path):
    def call(seeds): lp_train('digits', methods='diffusion', seeds=seeds, out=str(tmp_path), device='cpu')
    call(1)
    file = tmp_path/'digits.jsonl'
    whole = file.read_text()
    file.write_text(whole + whole[:200])
    with pytest.warns(UserWarning, match='incomplete'): call(2)
    assert file.read_text().startswith(whole)
    assert [r['seed'] for r in read_lines(file)] == [0, 1]


@pytest.mark.parametrize('changes', [dict(seconds=None), dict(recipe={}), dict(recipe=3), dict(history=3), dict(error_rate='x'),
    dict(labels='x'), dict(name=3), dict(data=5)], ids=str)
def test_a_line_that_is_no_run_is_a_sentence(changes, digits_runs, tmp_path):
    (tmp_path/'digits.jsonl').write_text(json.dumps(digits_runs[0][0] | changes) + '\n')
    for call in (lp_tables, lp_figures):
        with pytest.raises(SystemExit, match='line 1: this is not a run of lp_train'): call(str(tmp_path))


def test_tables_and_figures_that_cannot_be_written(digits_runs, tmp_path):
    (tmp_path/'file').write_text('')
    for call in (lp_tables, lp_figures):
        with pytest.raises(SystemExit, match='file'): call(str(digits_runs[1]), out=str(tmp_path/'file'/'x'))
    with pytest.raises(SystemExit, match="unknown dataset 'cifar'"): lp_figures(str(digits_runs[1]), dataset='cifar')
