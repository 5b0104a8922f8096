"House style: what a machine can check of it."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
modules = [p for p in sorted((root/'fastai_lp').rglob('*.py')) if p.name != '_modidx.py']
scripts = sorted([*(root/'tests').glob('*.py'), *(root/'benchmarks').glob('*.py')])
texts = [p for p in root.rglob('*') if p.suffix in ('.md', '.ipynb', '.py', '.cff', '.yml', '.toml') and '.venv' not in p.parts]


def test_chkstyle_agrees():
    "fast.ai's own checker, on the source of the modules: the notebooks"
    res = subprocess.run([shutil.which('chkstyle', path=str(Path(sys.executable).parent)), '--show-rule', 'nbs', 'tests', 'benchmarks'],
        cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-5000:]


def test_line_length():
    lines = [(len(line), f'{p.relative_to(root)}:{i}') for p in modules+scripts for i, line in enumerate(p.read_text().splitlines(), 1)]
    longest = sorted(lines)[-5:]
    assert longest[-1][0] <= 140, longest
    assert sum(n > 120 for n, _ in lines) <= .03*len(lines)


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(root).as_posix())
def test_no_private_name_crosses_modules(path):
    for names in re.findall(r'^from [.\w]+ import (.+)$', path.read_text(), re.M):
        assert not [o for o in re.split(r'[ ,()]+', names) if re.match(r'_[a-z]', o)], names


def test_american_spelling():
    british = re.compile(r'\b\w*(?:neighbour|colour|behaviour|labelled|labelling|normalis|organis|recognis|initialis|centre[ds]?\b)\w*', re.I)
    found = {p.relative_to(root).as_posix(): words for p in texts if p.name != 'test_style.py' and '/.' not in p.as_posix()
             and (words := set(british.findall(p.read_text(encoding='utf-8'))))}
    assert not found, found
