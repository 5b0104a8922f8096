"House style, as far as a program can check it."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
modules = [p for p in sorted((root/'fastai_lp').rglob('*.py')) if p.name != '_modidx.py']
scripts = sorted([*(root/'tests').glob('*.py'), *(root/'benchmarks').glob('*.py')])
kinds = '.md', '.ipynb', '.py', '.cff', '.yml', '.yaml', '.toml', '.ini'
tracked = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
texts = [root/o for o in tracked if Path(o).suffix in kinds and (root/o).exists()]


def name_of(path): return path.relative_to(root).as_posix()


def test_chkstyle():
    "fast.ai's own checker, on notebooks instead of the modules made from them"
    program = shutil.which('chkstyle', path=str(Path(sys.executable).parent))
    command = [program, '--show-rule', 'nbs', 'tests', 'benchmarks', '.ci']
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-5000:]


def test_line_length():
    files = [*modules, *scripts, root/'fastai_lp'/'page.html']
    lines = [(name_of(p), line) for p in files for line in p.read_text(encoding='utf-8').splitlines()]
    assert not [o for o in lines if len(o[1]) > 140]
    assert sum(len(line) > 120 for _, line in lines) <= .03*len(lines)


def test_exported_cells_are_short():
    cells = [(name_of(p), ''.join(c['source']).strip().splitlines()) for p in texts if p.suffix == '.ipynb'
        for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    exported = [(name, len(lines)-1) for name, lines in cells if lines and lines[0].startswith('#| export')]
    assert len(exported) > 100
    assert not [o for o in exported if o[1] > 40]


def imports(path):
    "(module, name) of each `from module import name`"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom): yield from ((node.module, o.name) for o in node.names)


def test_modules_import_public_names():
    assert not [(name_of(p), name) for p in modules for _, name in imports(p) if re.match(r'_[a-z]', name)]


def test_american_spelling():
    british = re.compile(r'\b\w*(?:neighbour|colour|behaviour|favour|labelled|labelling|centre[ds]?\b|\bgrey\b|'
        r'(?:normal|organ|recogn|initial|standard|minim|maxim|summar|visual|general)is)\w*', re.I)
    image = re.compile(r'"image/\w+": "[^"]*"')
    found = {name_of(p): words for p in texts if p.name != 'test_style.py'
        if (words := set(british.findall(image.sub('', p.read_text(encoding='utf-8')))))}
    assert not found
