"""Add an "Open in Colab" badge below the title of every notebook: `python .ci/badges.py OWNER/NAME`.

The docs workflow runs this on its own checkout, so that the docs of a fork link to the fork. It publishes the changed
notebooks in `colab/`, where the badges point to: on Colab, a notebook has to install the package first, which the notebooks
in `nbs/` do not do. Running it again changes nothing."""
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

root = Path(__file__).resolve().parents[1]
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'


def add_badges(folder, repo):
    "Adds a badge and an install cell to every notebook below `folder`; returns the paths of the notebooks"
    def hidden(path): return any(o.startswith(('.', '_')) for o in path.relative_to(folder).parts)
    paths = sorted(p for p in Path(folder).rglob('*.ipynb') if not hidden(p))
    for p in paths:
        nb = nbformat.read(p, 4)
        url = f'https://colab.research.google.com/github/{repo}/blob/gh-pages/colab/{p.relative_to(folder).as_posix()}'
        badge = new_markdown_cell(f'[![Open in Colab]({BADGE})]({url})', id='colab-badge')
        command = f'!pip install -q git+https://github.com/{repo}'
        install = new_code_cell(f'#| hide\n#| eval: false\n{command}', id='colab-install')
        rest = [c for c in nb.cells if c.id not in (badge.id, install.id)]
        nb.cells = [*rest[:1], badge, install, *rest[1:]]
        nbformat.write(nb, p)
    return paths


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].count('/') != 1: sys.exit(__doc__)
    print(f'{len(add_badges(root/"nbs", sys.argv[1]))} notebooks')
