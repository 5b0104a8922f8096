"""Put an "Open in Colab" badge under the title of every notebook: `python .ci/badges.py OWNER/NAME`.

The docs workflow runs it on its own checkout, where the repository's name is known, so that a fork's docs lead to the fork. It then
publishes these notebooks beside the pages, in `colab/`: there the badges point, since a notebook on Colab has to begin with a cell
that installs the package, and the ones in `nbs/` have none. Running it again changes nothing."""
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

root = Path(__file__).resolve().parents[1]


def add_badges(folder, repo):
    "Write badge and installation into every notebook below `folder`; returns their paths"
    paths = sorted(p for p in Path(folder).rglob('*.ipynb') if not any(o.startswith(('.', '_')) for o in p.relative_to(folder).parts))
    for p in paths:
        nb = nbformat.read(p, 4)
        url = f'https://colab.research.google.com/github/{repo}/blob/gh-pages/colab/{p.relative_to(folder).as_posix()}'
        new = [new_markdown_cell(f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})', id='colab-badge'),
               new_code_cell(f'#| hide\n#| eval: false\n!pip install -q git+https://github.com/{repo}', id='colab-install')]
        rest = [c for c in nb.cells if c.id not in ('colab-badge', 'colab-install')]
        nb.cells = rest[:1] + new + rest[1:]
        nbformat.write(nb, p)
    return paths


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].count('/') != 1: sys.exit(__doc__)
    print(f'{len(add_badges(root/"nbs", sys.argv[1]))} notebooks')
