"`benchmarks/gpu.py`, which is for a GPU, at tiny size on a CPU: it runs, and what it derives is right."
import json
import shlex
from pathlib import Path

import pytest

from fastai_lp.experiments.recipes import METHODS


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1]/'benchmarks')
    from gpu import main
    def call(*args):
        main(args)
        return capsys.readouterr().out
    return call


def test_step(run):
    "Multiplications and additions per image; backward has twice as many as forward, but none for the image itself"
    row = json.loads(run('step', '--device', 'cpu', '--bs', '4', '--steps', '3', '--repeats', '1', '--matrix', '64'))
    size, channels = 32, [3, 128, 128, 128, 256, 256, 256]
    forward = [2*9*a*b*(size if i < 3 else size//2)**2 for i, (a, b) in enumerate(zip(channels, channels[1:]))]
    forward += [2*9*256*512*6*6, 2*512*256*6*6, 2*256*128*6*6, 2*128*10]
    assert row['gflop']*1e9 == pytest.approx(4*(3*sum(forward)-forward[0]), rel=.01)
    for name in ('network float32', 'network bfloat16', 'network channels_last', 'learner'):
        assert row[name]['share_of_bound'] == pytest.approx(row['bound_ms']/row[name]['ms'])
        assert row[name]['img_per_s'] == pytest.approx(4000/row[name]['ms'])


def test_update(run):
    sizes = '--n', '600', '--c', '5', '--k', '10', '--matrix', '64', '--numbers', '10000'
    row = json.loads(run('update', '--device', 'cpu', '--repeats', '1', '--peer', *sizes))
    assert 600*10 < row['edges'] < 2*600*10
    assert row['accuracy'] == pytest.approx(row['authors']['accuracy'], abs=.01)
    assert row['seconds']['all'] >= row['seconds']['graph'] > 0
    assert row['graph']['recall'] == 1


def test_plan(run):
    lines = run('plan').splitlines()
    assert len(lines) == 20
    for line in lines[1::2]:
        words = shlex.split(line)
        assert words[:2] == ['lp_train', 'cifar10']
        assert set(words[words.index('--methods')+1].split(',')) <= set(METHODS)
