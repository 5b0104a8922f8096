"Notebooks as pages: each is listed in the sidebar, has a title, was run without errors, and links to pages that exist."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from conftest import sidebar

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if not {'.ipynb_checkpoints', '_proc'} & set(p.parts))
pages = {(p.parent/re.sub(r'^\d+_', '', p.stem)).relative_to(nbs).as_posix() for p in notebooks}


def name_of(path): return path.relative_to(nbs).as_posix()


each_notebook = pytest.mark.parametrize('path', notebooks, ids=name_of)


def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


def test_sidebar_lists_every_notebook_once(): assert sorted(sidebar()) == sorted(map(name_of, notebooks))


def test_sidebar_follows_the_numbers_in_each_folder():
    numbered = [Path(o) for o in sidebar() if re.match(r'\d+_', Path(o).name)]
    for folder in {p.parent for p in numbered}:
        names = [p.name for p in numbered if p.parent == folder]
        assert names == sorted(names)
        assert [int(o.split('_')[0]) for o in names] == list(range(1, len(names)+1)), names


@each_notebook
def test_begins_with_title_and_summary(path):
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == 'markdown' and re.fullmatch(r'# \S.*\n\n> \S.*', first.source)


@each_notebook
def test_was_run_without_errors(path):
    outputs = [o for c in code_cells(path) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == 'error']
    assert not [o for o in outputs if o.get('name') == 'stderr'], 'the page would show warnings'
    assert outputs or not re.search(r'plt\.|print\(', ''.join(c.source for c in code_cells(path)))


@each_notebook
def test_asserts_something(path):
    source = '\n'.join(c.source for c in code_cells(path))
    assert re.search(r'^\s*(assert|test_\w+\()', source, re.M)


@each_notebook
def test_links_to_pages_that_exist(path):
    text = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    for link in re.findall(r'\]\(([^)#]+\.html)', text):
        if '://' in link: continue
        page = (path.parent/link).resolve().relative_to(nbs).with_suffix('').as_posix()
        assert page in pages, f'{link}: no such page'


def test_badges(tmp_path):
    folder = tmp_path/'nbs'
    shutil.copytree(nbs, folder, ignore=shutil.ignore_patterns('data', '_proc', '.ipynb_checkpoints'))
    sys.path.insert(0, str(root/'.ci'))
    try: from badges import add_badges
    finally: sys.path.pop(0)
    for _ in range(2): assert len(add_badges(folder, 'somebody/fastai_lp')) == len(notebooks)
    for p in notebooks:
        old, new = nbformat.read(p, 4).cells, nbformat.read(folder/p.relative_to(nbs), 4).cells
        assert [c.source for c in new[:1]+new[3:]] == [c.source for c in old]
        assert new[1].source.endswith(f'/github/somebody/fastai_lp/blob/gh-pages/colab/{name_of(p)})')
        assert new[2].source.endswith('pip install -q git+https://github.com/somebody/fastai_lp')
    res = subprocess.run([sys.executable, root/'.ci'/'badges.py'], capture_output=True, text=True)
    assert res.returncode and 'OWNER/NAME' in res.stderr


@pytest.mark.parametrize('command', re.findall(r'\bnbdev-[a-z-]+|\bpytest\b', (root/'CONTRIBUTING.md').read_text()))
def test_contributing_names_commands(command): assert shutil.which(command, path=str(Path(sys.executable).parent))
