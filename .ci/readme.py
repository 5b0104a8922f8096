"""Make README.md from nbs/index.ipynb: `python .ci/readme.py`. With `--check`, only check that README.md is up to date.

Cells with `#| hide` are left out. Of cells with `#| echo: false` only the output is shown: Markdown made by code, such
as a sentence with numbers from the run files. Links to pages become links to their notebooks."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

root = Path(__file__).resolve().parents[1]


def page(notebook):
    "The address of a notebook's page below `nbs/`, without the number in its name"
    return (notebook.parent/re.sub(r'^\d+\w?_', '', notebook.stem)).relative_to(root/'nbs').as_posix() + '.html'


def notebook_links(text):
    "Links to pages and images of the site as paths from the root of the repository"
    notebooks = {page(o): o.relative_to(root).as_posix() for o in (root/'nbs').rglob('*.ipynb')}
    def link(m):
        if '://' in m[1]: return m[0]
        if m[1] not in notebooks: sys.exit(f'nbs/index.ipynb links to {m[1]}, but no notebook has this page')
        return f'({notebooks[m[1]]}'
    return re.sub(r'(?<=\])\(([^)#\s]+\.html)', link, text).replace('](images/', '](nbs/images/')


def shown(cell):
    "The cell as README shows it: its code with text outputs, or with `#| echo: false` the Markdown it displays"
    if cell.cell_type != 'code': return cell
    data = [o.get('data', {}) for o in cell.outputs]
    if re.search(r'^#\|\s*echo:\s*false', cell.source, re.M):
        return new_markdown_cell('\n\n'.join(o['text/markdown'] for o in data if 'text/markdown' in o))
    for o in data:
        for kind in [k for k, v in o.items() if k != 'text/plain' or v.startswith('<')]: del o[kind]
    cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr' and (o.get('text') or o.get('data'))]
    return cell


def render():
    "The index notebook as Markdown"
    nb = nbformat.read(root/'nbs'/'index.ipynb', 4)
    nb.cells = [shown(c) for c in nb.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
    nb.metadata['language_info'] = {'name': 'python'}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return notebook_links(re.sub(r'\n{3,}', '\n\n', text)).strip() + '\n'


if __name__ == '__main__':
    readme, text = root/'README.md', render()
    if '--check' not in sys.argv: readme.write_text(text, encoding='utf-8')
    elif not readme.exists() or readme.read_text(encoding='utf-8') != text:
        sys.exit('README.md differs from nbs/index.ipynb: run python .ci/readme.py and commit the result')
