"README and notebooks agree, pages show the numbers of the run files, dependencies are declared, modules are in order."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import replace
from importlib import import_module
from importlib.metadata import requires, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml
from execnb.shell import CaptureShell

import fastai_lp
from conftest import sidebar
from fastai_lp.experiments.results import read_lines, summarize
from fastai_lp.experiments.recipes import METHODS, RECIPES, settings_of
from fastai_lp.utils.files import read_json_lines

root = Path(__file__).resolve().parents[1]
results = root/'benchmarks'/'results'
modules = sorted(p for p in (root/'fastai_lp').rglob('*.py') if p.name != '_modidx.py')
each_module = pytest.mark.parametrize('path', modules, ids=lambda p: dotted(p))


def dotted(path): return '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')


# README and pages

def test_readme_is_made_from_the_index_notebook():
    res = subprocess.run([sys.executable, root/'.ci'/'readme.py', '--check'], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr


def shown_text(outputs):
    "The words and numbers of Markdown and of tables"
    data = [o['data'] for o in outputs if 'data' in o]
    return [re.sub('<[^>]+>', ' ', ''.join(o.get('text/markdown') or o.get('text/html', ''))).split() for o in data]


@pytest.mark.parametrize('name', ['index', *(f'results/{p.stem}' for p in sorted((root/'nbs'/'results').glob('*.ipynb')))])
def test_pages_show_the_numbers_of_the_run_files(name, monkeypatch):
    "Run again, the cells give the stored outputs; of the index, those that train are left out"
    path = root/'nbs'/f'{name}.ipynb'
    monkeypatch.chdir(path.parent)
    plt.close('all')  # figures that other tests left open would be among the outputs
    shell = CaptureShell(path.parent)
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != 'code' or 'eval: false' in cell.source: continue
        if name == 'index' and '#| echo: false' not in cell.source: continue
        found = shell.run(cell.source)
        assert not shell.exc, cell.source
        assert shown_text(found) == shown_text(cell.outputs), cell.source


# Run files

def runs_of(file): return read_lines(results/file)


def study_of(name): return [run for _, run in read_json_lines(results/'beyond'/f'study_{name}.jsonl')]


def test_runs_on_the_digits_are_complete():
    runs = runs_of('digits.jsonl')
    assert {(r['labels'], r['seed']) for r in runs} == {(20, i) for i in range(10)}
    rows = set(METHODS) - {'strong', 'fixmatch', 'lp+fixmatch'} | {'lp, ω = 1', 'lp, ζ = 1', 'lp, ω = ζ = 1'}
    assert {s['row']: s['runs'] for s in summarize(runs)} == dict.fromkeys(rows, 10)
    runs = runs_of('beyond/digits.jsonl')
    assert {(r['method'], r['seed']) for r in runs} == {(m, i) for m in ('lp', 'strong') for i in range(10)}


@pytest.mark.parametrize('file', ['digits.jsonl', 'beyond/digits.jsonl'])
def test_runs_have_the_present_recipe(file):
    for r in runs_of(file):
        recipe = replace(RECIPES['digits'], omega=r['recipe']['omega'], zeta=r['recipe']['zeta']).of(r['method'])
        assert r['recipe'] == settings_of(recipe), 'the recipe has changed since the runs: run them again'


def test_label_propagation_beats_its_parts_on_the_digits():
    error = {s['row']: s['error'] for s in summarize(runs_of('digits.jsonl'))}
    assert error['lp'][0] < error['diffusion'][0] < error['supervised'][0]
    assert error['lp'][0] < error['network'][0] < error['supervised'][0]
    assert error['mt+lp'][0] < error['mt'][0] + min(error['mt'][1], error['mt+lp'][1])


def test_preset_beats_the_paper_on_the_digits():
    error = {s['row']: s['error'][0] for s in summarize(runs_of('beyond/digits.jsonl'))}
    assert error['strong'] <= .6*error['lp']


def test_preset_beats_the_paper_on_cifar10():
    error = {(r['row'], r['seed']): r['error'] for r in study_of('cifar10')}
    gain = [v - error['strong', seed] for (row, seed), v in error.items() if row == 'plain']
    assert len(gain) == 5
    assert mean(gain) > 2*stdev(gain)/len(gain)**.5


@pytest.mark.parametrize('method', sorted(set(METHODS) - {'diffusion', 'fixmatch', 'lp+fixmatch'}))
def test_learning_rate_of_the_digits_is_the_best_of_the_grid(method):
    tuned = json.loads((results/'tune_digits.json').read_text())
    assert tuned['seeds'] == [100, 107]
    error = {float(lr): v[0] for lr, v in tuned['error'][method].items()}
    assert sorted(error)[:6] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    best = min(error, key=error.get)
    assert RECIPES['digits'].lr[method] == best
    assert min(error) < best < max(error)


@pytest.fixture(scope='module')
def study():
    spec = spec_from_file_location('study', root/'benchmarks'/'study.py')
    spec.loader.exec_module(res := module_from_spec(spec))
    return res


@pytest.mark.parametrize('data', ['digits', 'cifar10'])
def test_study_has_five_draws_of_every_row(study, data):
    runs = study_of(data)
    rows = {r['row'] for r in runs}
    assert study.rows_of(data).keys() <= rows
    assert sorted((r['row'], r['seed']) for r in runs) == sorted((row, i) for row in rows for i in range(5))


@pytest.mark.parametrize('row, method', [('plain', 'lp'), ('strong', 'strong')])
def test_learning_rate_of_the_study_is_the_best_of_the_grid(study, row, method):
    runs = [r for r in study_of('tune') if r['row'] == row]
    error = {lr: mean(r['error'] for r in runs if r['lr'] == lr) for lr in {r['lr'] for r in runs}}
    best = min(error, key=error.get)
    assert study.CIFAR.lr[method] == best
    assert min(error) < best < max(error)


# The package

def test_one_version():
    assert version('fastai_lp') == fastai_lp.__version__
    assert yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))['version'] == fastai_lp.__version__


def test_settings_reach_the_metadata():
    settings = ConfigParser()
    settings.read(root/'settings.ini')
    lines = '\n'.join(settings['DEFAULT'][o] for o in ('requirements', 'dev_requirements', 'browser_requirements'))
    names = {re.match(r'[\w-]+', o).group() for o in lines.splitlines() if o.strip()}
    assert {re.match(r'[\w-]+', o).group() for o in requires('fastai_lp')} == names


def imported(path):
    "Top-level names of the packages that a module imports"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


@each_module
def test_every_import_is_declared(path):
    declared = {re.match(r'[\w-]+', o).group().lower() for o in requires('fastai_lp') if 'extra ==' not in o}
    # fastai requires fastcore and Pillow
    packages = dict(sklearn='scikit-learn', faiss='faiss-gpu', fastcore='fastai', PIL='fastai')
    names = set(imported(path)) - set(sys.stdlib_module_names) - {'fastai_lp'}
    assert {packages.get(o, o).lower() for o in names} <= declared


def test_modules_import_only_what_comes_before_them():
    "Packages in the order below, modules of a package in the order of the sidebar"
    packages = ['utils', 'transductive', 'learner', '.', 'folder', 'experiments']
    listed = [(root/'fastai_lp'/p.parent/re.sub(r'^\d+_', '', p.stem)).with_suffix('.py') for p in map(Path, sidebar())]
    order = [dotted(p) for package in packages for p in listed if p.parent == root/'fastai_lp'/package and p.exists()]
    assert sorted(order) == sorted(dotted(p) for p in modules if p.name not in ('__init__.py', 'all.py'))
    for p in modules:
        if dotted(p) not in order: continue
        for level, name in re.findall(r'^from (\.+|fastai_lp\.)([\w.]+) import', p.read_text(), re.M):
            used = f'fastai_lp.{name}' if level == 'fastai_lp.' else '.'.join([*dotted(p).split('.')[:-len(level)], name])
            assert used in order[:order.index(dotted(p))], f'{dotted(p)} imports {used}'


@each_module
def test_public_names_have_docstrings(path):
    module = import_module(dotted(path))
    for name in getattr(module, '__all__', []):
        if callable(o := getattr(module, name)): assert o.__doc__, f'{dotted(path)}.{name}'


def test_all_exports_what_a_user_types():
    names = import_module('fastai_lp.all').__all__
    assert len(names) == len(set(names)) <= 55
    source = (root/'fastai_lp'/'all.py').read_text()
    assert not re.search(r'^from .* import \*', source, re.M)
    assert 'experiments' not in source
