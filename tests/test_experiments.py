"The main job, small: table, JSON lines, figure, and messages for a wrong call."
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastai_lp.experiments.commands import plot_runs, read_lines, row_name, run_experiment, summarize, to_markdown
from fastai_lp.experiments.recipes import METHODS, RECIPES, Recipe

SMALL = replace(RECIPES['digits'], stage1=1, stage2=2, width=8)


def test_a_run_is_a_line(tmp_path):
    runs = run_experiment('digits', 20, ['lp', 'supervised', 'diffusion'], [0, 1], SMALL, out=tmp_path/'new', device='cpu')
    lines = [{k: v for k, v in json.loads(line).items() if k != 'sha256'} for line in (tmp_path/'new'/'digits.jsonl').read_text().splitlines()]
    assert sorted(lines, key=str) == sorted(json.loads(json.dumps(runs)), key=str)
    assert [(r['method'], r['seed']) for r in runs] == [(m, s) for m in ('lp', 'supervised', 'diffusion') for s in (0, 1)]
    lp = runs[0]
    assert [row['epoch'] for row in lp['history']] == [0, 1] and [len(o) for o in lp['stages']] == [1, 2] and lp['error_rate'] == lp['stages'][1][-1]['error_rate']
    assert all(row['top5_error'] <= row['error_rate'] and row['sec'] > 0 for o in lp['stages'] for row in o)
    assert lp['seconds'] == {f'stage{i+1}': sum(row['sec'] for row in o) for i, o in enumerate(lp['stages'])}
    assert lp['recipe']['lr'] == RECIPES['digits'].lr['lp'] and lp['recipe']['stage2'] == 2 and lp['environment']['torch'] and lp['kept'] == [f"{lp['name']}-lp-{i}.npz" for i in (0, 1)] and all((tmp_path/'new'/o).exists() for o in lp['kept'])
    assert (lp['dataset'], lp['labels'], lp['items']) == ('digits', 20, 1347)


def test_one_folder_for_many_calls(tmp_path):
    "Other settings have lines and files of their own; what is done is neither trained nor written again; methods without weights have none to switch off"
    def call(methods=('lp',), **changes): return run_experiment('digits', 20, methods, [0], replace(SMALL, **changes), out=tmp_path, device='cpu')[0]
    first = call()
    call(omega=False)
    other = call(stage2=3)
    before = (tmp_path/'digits.jsonl').read_text()
    assert call()['stages'] == first['stages'] and (tmp_path/'digits.jsonl').read_text() == before
    runs = read_lines(tmp_path/'digits.jsonl')
    assert [(r['recipe']['omega'], len(r['stages'][1])) for r in runs] == [(True, 2), (False, 2), (True, 3)]
    assert other['name'] != first['name'] and not {*first['kept']} & {*other['kept']} and all((tmp_path/o).exists() for r in runs for o in r['kept'])
    call(['supervised'])
    call(['supervised'], omega=False)
    assert [row_name(r) for r in read_lines(tmp_path/'digits.jsonl')[3:]] == ['supervised']


def test_two_programs_one_file(tmp_path):
    "Each writes whole lines, and none is lost"
    run = dict(dataset='digits', method='lp', labels=20, items=9, recipe=dict(omega=True), error_rate=.1, top5_error=0., environment={}, history=list(range(9000)))
    code = ("import json, sys; from pathlib import Path; from fastai_lp.experiments.commands import _record\n"
        f"for i in range(30): _record(Path(sys.argv[1]), json.loads({json.dumps(run)!r}) | dict(name=sys.argv[2]+str(i)))")
    both = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, tmp_path/'digits.jsonl', name]) for name in 'ab']
    assert [p.wait() for p in both] == [0, 0]
    assert sorted(r['name'] for r in read_lines(tmp_path/'digits.jsonl')) == sorted(f'{o}{i}' for o in 'ab' for i in range(30))


def test_killed_and_called_again(tmp_path):
    "kill -9 in the second stage; called again, the program ends bitwise where it would have ended"
    def call(out): return [Path(sys.executable).with_name('lp_train'), 'digits', '--methods', 'mt+lp', '--seeds', '1', '--epochs', '1,4', '--device', 'cpu', '--out', out]
    subprocess.run(call(tmp_path/'a'), check=True, capture_output=True)
    stage2 = next((tmp_path/'a').glob('*-stage2.pth')).name
    with subprocess.Popen(call(tmp_path/'b'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path/'b'/stage2).exists() and process.poll() is None: time.sleep(.05)
        process.kill()
    assert process.returncode == -9 and not (tmp_path/'b'/'digits.jsonl').exists() and torch.load(tmp_path/'b'/stage2)['epoch'] < 4
    subprocess.run(call(tmp_path/'b'), check=True, capture_output=True)
    a, b = (torch.load(tmp_path/o/stage2) for o in 'ab')
    for x, y in ((a['model'], b['model']), (a['mt'][0]['teacher'], b['mt'][0]['teacher']), (a['lp'][0]['pseudo'], b['lp'][0]['pseudo'])):
        assert x.keys() == y.keys() and len(x) > 5
        for k in x:
            if isinstance(x[k], torch.Tensor): assert torch.equal(x[k], y[k]), k
    def line(out):
        run = json.loads((tmp_path/out/'digits.jsonl').read_text())
        return [[{k: v for k, v in row.items() if not k.endswith('sec')} for row in o] for o in run['stages']], [(h['accuracy'], h['network_accuracy'], h['residual']) for h in run['history']], run['kept']
    assert line('a') == line('b')


def test_same_seed_same_result(tmp_path):
    runs = [run_experiment('digits', 20, ['lp'], [3], SMALL, out=tmp_path/str(i), device='cpu')[0] for i in range(2)]
    errors = [[row['error_rate'] for o in r['stages'] for row in o] for r in runs]
    assert errors[0] == errors[1] and runs[0]['history'][-1]['accuracy'] == runs[1]['history'][-1]['accuracy']


def run(method, error, accuracy=None, sec=2., teacher=None, **recipe):
    return dict(method=method, error_rate=error, history=[] if accuracy is None else [dict(epoch=0, accuracy=.1), dict(epoch=1, accuracy=accuracy)],
        seconds=dict(stage1=sec/2, stage2=sec/2), recipe=dict(omega=True, zeta=True) | recipe, **({} if teacher is None else dict(teacher_error_rate=teacher)))


def test_summary_is_mean_and_standard_error():
    runs = [run('lp', e, 1-e) for e in (.1, .2, .3)] + [run('supervised', .5, sec=1.), run('mt', .9, teacher=.25), run('lp', .4, .6, omega=False), run('lp', .5, .5, omega=False, zeta=False)]
    lp, sup, mt, plain, neither = summarize(runs)
    assert lp['error'] == pytest.approx([.2, .1/3**.5]) and lp['runs'] == 3 and lp['seconds'] == 2 and sup['error'] == [.5, None] and sup['pseudo_accuracy'] is None
    assert mt['error'] == [.25, None] and plain['row'] == 'lp, ω = 1' and neither['row'] == 'lp, ω = ζ = 1'
    assert '| lp            | 20.0 ± 5.8   |' in to_markdown([lp, sup, plain, neither]) and '| supervised    | 50.0         | –' in to_markdown([lp, sup, plain, neither])


def test_figure():
    fig = plot_runs([run('lp', e, 1-e) for e in (.1, .2)] + [run('supervised', .5), run('lp', .3, .8, zeta=False)], 'some')
    left, right = fig.axes
    assert [o.get_text() for o in left.get_xticklabels()] == ['lp', 'supervised', 'lp, ζ = 1'] and [o.get_label() for o in right.lines] == ['lp', 'lp, ζ = 1']
    assert right.lines[0].get_ydata() == pytest.approx([10, 85])


def test_twice_is_once(tmp_path):
    assert len(run_experiment('digits', 20, ['diffusion', 'diffusion'], [3, 3], SMALL, out=tmp_path)) == 1 == len(read_lines(tmp_path/'digits.jsonl'))


@pytest.mark.parametrize('args, message', [pytest.param(['digits', '--device', 'cuda'], 'no CUDA GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one')), (['cifar'], "unknown dataset 'cifar'"), (['digits', '--methods', 'lp,svm'], 'unknown method(s) svm'), (['digits', '--labels', '25'], 'multiple of 10'),
    (['digits', '--n-train', '100'], 'come with scikit-learn'), (['digits', '--network', 'vgg'], "network='vgg'"), (['digits', '--network', 'convnet13'], "use 'small'"), (['digits', '--epochs', '5,0'], 'one or two numbers'), (['digits', '--labels', '0'], 'multiple of 10'),
    (['digits', '--split', '9-3'], 'expected numbers'), (['digits', '--seeds', '0'], 'at least one'), (['mini_imagenet'], 'pass data'), (['cifar10', '--data', 'nowhere'], 'nowhere')])
def test_wrong_calls(args, message, tmp_path):
    res = subprocess.run([Path(sys.executable).with_name('lp_train'), *args], capture_output=True, text=True, cwd=tmp_path)
    assert res.returncode != 0 and message in res.stderr and 'Traceback' not in res.stderr
    assert not list(tmp_path.glob('results/*.jsonl'))


def test_every_method_has_a_rate():
    assert set(RECIPES['digits'].lr) == set(METHODS) and {RECIPES['digits'].of(m).lr for m in METHODS} == set(RECIPES['digits'].lr.values()) and Recipe().of('lp') == Recipe()
