"House style, as far as a machine can check it."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
modules = sorted(p for p in (root/'fastai_lp').rglob('*.py') if p.name != '_modidx.py')
scripts = sorted([*(root/'tests').glob('*.py'), *(root/'benchmarks').glob('*.py'), *(root/'.ci').glob('*.py')])
kinds = '.md', '.ipynb', '.py', '.cff', '.yml', '.yaml', '.toml', '.ini', '.json'
tracked = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True).stdout.splitlines()
texts = [root/o for o in tracked if Path(o).suffix in kinds and Path(o).name != 'test_style.py' and (root/o).exists()]
BRITISH = re.compile(r'\b\w*(?:neighbour|colour|behaviour|labelled|labelling|(?:normal|organ|recogn|initial)is|centre[ds]?\b)\w*', re.I)


def test_chkstyle_agrees():
    "fast.ai's checker, on the notebooks that the modules are exported from, tests and scripts"
    chkstyle = shutil.which('chkstyle', path=str(Path(sys.executable).parent))
    command = [chkstyle, '--show-rule', 'nbs', 'tests', 'benchmarks', '.ci']
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-5000:]


def test_line_length():
    read = ((p, i, line) for p in modules+scripts for i, line in enumerate(p.read_text().splitlines(), 1))
    lines = [(len(line), f'{p.relative_to(root)}:{i}') for p, i, line in read]
    longest = sorted(lines)[-5:]
    assert longest[-1][0] <= 140, longest
    assert sum(n > 120 for n, _ in lines) <= .03*len(lines)


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(root).as_posix())
def test_no_private_name_crosses_modules(path):
    for names in re.findall(r'^from [.\w]+ import (.+)$', path.read_text(), re.M):
        assert not [o for o in re.split(r'[ ,()]+', names) if re.match(r'_[a-z]', o)], names


def test_american_spelling():
    found = {p: set(BRITISH.findall(p.read_text(encoding='utf-8'))) for p in texts}
    assert not any(found.values()), {str(p): words for p, words in found.items() if words}
