"The main job, small: table, JSON, figure, and messages for a wrong call."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastai_lp.experiments import Recipe, run_experiment, summarize, to_markdown


def test_run_writes_table_json_and_figure(tmp_path):
    recipe = Recipe(stage1=1, stage2=2, width=8)
    res = run_experiment(methods=['lp', 'supervised'], seeds=[0, 1], recipe=recipe, out=tmp_path/'new', device='cpu')
    assert json.loads((tmp_path/'new'/'digits.json').read_text()) == json.loads(json.dumps(res))
    assert (tmp_path/'new'/'digits.png').read_bytes()[:4] == b'\x89PNG'
    assert [(r['method'], r['seed']) for r in res['runs']] == [('lp', 0), ('lp', 1), ('supervised', 0), ('supervised', 1), ('diffusion', 0), ('diffusion', 1)]
    lp = res['runs'][0]
    assert [row['epoch'] for row in lp['history']] == [1, 2] and len(lp['errors']) == 3 and lp['error'] == lp['errors'][-1]
    assert lp['pseudo_accuracy'] == lp['history'][-1]['accuracy']
    assert res['recipe']['stage2'] == 2 and res['environment']['torch']


def test_same_seed_same_result(tmp_path):
    runs = [run_experiment(methods=['lp'], seeds=[3], recipe=Recipe(stage1=1, stage2=1, width=8), out=tmp_path, device='cpu')['runs'][0] for _ in range(2)]
    assert runs[0]['errors'] == runs[1]['errors'] and runs[0]['pseudo_accuracy'] == runs[1]['pseudo_accuracy']


def test_summary_is_mean_and_standard_error():
    runs = [dict(method='lp', error=e, pseudo_accuracy=1-e, seconds=2.) for e in (.1, .2, .3)] + [dict(method='supervised', error=.5, pseudo_accuracy=None, seconds=1.)]
    lp, sup = summarize(runs)
    assert lp['error'] == pytest.approx([.2, .1/3**.5]) and lp['runs'] == 3 and sup['error'] == [.5, None] and sup['pseudo_accuracy'] is None
    assert '| lp         | 20.0 ± 5.8   |' in to_markdown([lp, sup]) and '| supervised | 50.0         | –' in to_markdown([lp, sup])


@pytest.mark.parametrize('args, message', [(['cifar'], "unknown dataset 'cifar'"), (['digits', '--methods', 'lp,svm'], 'unknown method(s) svm'),
                                           (['digits', '--labels', '25'], 'multiple of 10')])
def test_wrong_calls(args, message, tmp_path):
    res = subprocess.run([Path(sys.executable).with_name('lp_train'), *args], capture_output=True, text=True, cwd=tmp_path)
    assert res.returncode != 0 and message in res.stderr and 'Traceback' not in res.stderr
    assert not (tmp_path/'results').exists()
