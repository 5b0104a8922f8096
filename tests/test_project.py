"The project's own promises: README and notebooks in step, one version, dependencies that are declared."
import ast
import importlib.util
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import replace
from importlib import import_module
from importlib.metadata import requires, version
from pathlib import Path
from statistics import stdev

import pytest
import yaml

import fastai_lp
from fastai_lp.experiments.recipes import METHODS, RECIPES, settings_of

root = Path(__file__).resolve().parents[1]
modules = sorted(p for p in (root/'fastai_lp').rglob('*.py') if p.name != '_modidx.py')


def dotted(path): return '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')


def test_readme_is_made_from_the_index_notebook():
    res = subprocess.run([sys.executable, root/'.ci'/'readme.py', '--check'], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr


def test_table_in_readme_is_that_of_the_committed_runs():
    from fastai_lp.experiments.commands import summarize, to_markdown
    runs = [json.loads(line) for line in (root/'benchmarks'/'results'/'digits.jsonl').read_text().splitlines()]
    assert to_markdown(summarize(runs)) in (root/'README.md').read_text()
    for r in runs:
        recipe = replace(RECIPES['digits'], omega=r['recipe']['omega'], zeta=r['recipe']['zeta']).of(r['method'])
        assert r['recipe'] == settings_of(recipe), 'the recipe has changed since the runs: run them again'


def test_what_the_committed_runs_show():
    "Digits, 20 labels, draws 0 to 9"
    from fastai_lp.experiments.commands import summarize
    runs = [json.loads(line) for line in (root/'benchmarks'/'results'/'digits.jsonl').read_text().splitlines()]
    error = {s['row']: s['error'] for s in summarize(runs)}
    assert {(r['labels'], r['seed']) for r in runs} == {(20, i) for i in range(10)} and {s['runs'] for s in summarize(runs)} == {10}
    assert error['supervised'][0] > error['network'][0] > error['lp'][0]
    assert error['mt+lp'][0] < error['mt'][0] + min(error['mt'][1], error['mt+lp'][1])
    assert {'gtg', 'lp, ω = 1', 'lp, ζ = 1', 'lp, ω = ζ = 1'} < error.keys()


def test_rates_of_the_digits_are_the_best_of_the_grid():
    res = json.loads((root/'benchmarks'/'results'/'tune_digits.json').read_text())
    assert res['seeds'] == [100, 107] and set(res['error']) == set(METHODS) - {'diffusion'}
    for method, row in res['error'].items():
        rates = sorted(map(float, row))
        assert RECIPES['digits'].lr[method] == (best := float(min(row, key=lambda lr: row[lr][0]))) and rates[0] < best < rates[-1], method
        assert rates[:6] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], method


def test_one_version(): assert version('fastai_lp') == fastai_lp.__version__


def test_settings_reach_the_metadata():
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    names = {re.match(r'[\w-]+', o).group() for key in ('requirements', 'dev_requirements') for o in settings['DEFAULT'][key].split('\n') if o.strip()}
    assert {re.match(r'[\w-]+', o).group() for o in requires('fastai_lp')} == names


def test_every_import_is_declared():
    declared = {re.match(r'[\w-]+', o).group().lower() for o in requires('fastai_lp') if 'extra ==' not in o}
    packages = dict(sklearn='scikit-learn', faiss='faiss-gpu', fastcore='fastai', PIL='fastai')  # fastai brings fastcore and Pillow
    for p in modules:
        for node in ast.walk(ast.parse(p.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {o.split('.')[0] for o in names} - set(sys.stdlib_module_names) - {'fastai_lp'}:
                assert packages.get(name, name).lower() in declared, f'{p.name} imports {name}'


def test_modules_import_only_what_comes_before_them():
    "Down or left through the packages, and within a package in the order of the sidebar"
    packages = ['utils', 'transductive', 'learner', '.', 'experiments']
    def leaves(o): return [o] if isinstance(o, str) else [x for part in (o.get('contents', []) if isinstance(o, dict) else o) for x in leaves(part)]
    pages = [Path(o) for o in leaves(yaml.safe_load((root/'nbs'/'_quarto.yml').read_text())['website']['sidebar']['contents'])]
    listed = [(root/'fastai_lp'/p.parent/re.sub(r'^\d+\w?_', '', p.stem)).with_suffix('.py') for p in pages]
    order = [dotted(p) for package in packages for p in listed if p.parent == root/'fastai_lp'/package and p.exists()]
    assert sorted(order) == sorted(dotted(p) for p in modules if p.name not in ('__init__.py', 'all.py'))
    for p in modules:
        if dotted(p) not in order: continue
        for level, name in re.findall(r'^from (\.+|fastai_lp\.)([\w.]+) import', p.read_text(), re.M):
            used = f'fastai_lp.{name}' if level == 'fastai_lp.' else '.'.join([*dotted(p).split('.')[:-len(level)], name])
            assert used in order[:order.index(dotted(p))], f'{dotted(p)} imports {used}'


@pytest.mark.parametrize('path', modules, ids=dotted)
def test_public_names_have_docstrings(path):
    module = import_module(dotted(path))
    for name in getattr(module, '__all__', []):
        o = getattr(module, name)
        if callable(o): assert o.__doc__, f'{dotted(path)}.{name}'


def test_what_the_runs_beyond_the_paper_show():
    "Of the preset's page: digits, 20 labels, draws 0 to 9, and a part of CIFAR-10, draws 0 to 4"
    runs = [json.loads(line) for line in (root/'benchmarks'/'results'/'beyond'/'digits.jsonl').read_text().splitlines()]
    assert {(r['method'], r['seed']) for r in runs} == {(m, i) for m in ('lp', 'strong') for i in range(10)}
    for r in runs: assert r['recipe'] == settings_of(RECIPES['digits'].of(r['method'])), 'the recipe has changed since the runs: run them again'
    def mean(some): return sum(some)/len(some)
    error = {m: mean([r['error_rate'] for r in runs if r['method'] == m]) for m in ('lp', 'strong')}
    readme = (root/'README.md').read_text()
    assert f"leaves {error['strong']/error['lp']:.2f} of the error" in readme
    shown = {m: f"{100*error[m]:.1f} ± {100*stdev([r['error_rate'] for r in runs if r['method'] == m])/10**.5:.1f} %" for m in error}
    assert f"ends at {shown['strong']}, where `lp`, run anew beside it, has {shown['lp']}" in readme
    pixels = [json.loads(line) for line in (root/'benchmarks'/'results'/'digits.jsonl').read_text().splitlines()]
    assert error['strong'] <= .6*error['lp'] and error['strong'] < mean([r['error_rate'] for r in pixels if r['method'] == 'diffusion'])
    found = {o: [json.loads(line) for line in (root/'benchmarks'/'results'/'beyond'/f'study_{o}.jsonl').read_text().splitlines()] for o in ('digits', 'cifar10', 'tune')}
    gain = [a['error']-b['error'] for a, b in zip(*(sorted((r for r in found['cifar10'] if r['row'] == row), key=lambda r: r['seed']) for row in ('plain', 'strong')))]
    assert len(gain) == 5 and mean(gain) > 2*stdev(gain)/5**.5
    spec = importlib.util.spec_from_file_location('study', root/'benchmarks'/'study.py')
    spec.loader.exec_module(study := importlib.util.module_from_spec(spec))
    for o in ('digits', 'cifar10'):
        assert sorted((r['row'], r['seed']) for r in found[o]) == sorted((row, i) for row in study.rows_of(o) for i in range(5))
        for r in found[o]:
            wanted = json.loads(json.dumps(study.rows_of(o)[r['row']][1]))
            assert {k: r['changes'][k] for k in r['changes'] if k != 'steps'} == {k: v for k, v in wanted.items() if k not in ('recipe', 'steps')}, f"{r['row']} is another row now: run it again"
    for row, method in (('plain', 'lp'), ('strong', 'strong')):
        tuned = {lr: mean([r['error'] for r in found['tune'] if r['row'] == row and r['lr'] == lr]) for lr in study.RATES if any(r['row'] == row and r['lr'] == lr for r in found['tune'])}
        best = min(tuned, key=tuned.get)
        assert best == study.CIFAR.lr[method] and min(tuned) < best < max(tuned)
