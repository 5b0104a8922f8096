"Make README.md from nbs/index.ipynb: `python .ci/readme.py`; with `--check`, only say whether it is in step."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def render():
    "The notebook as Markdown: hidden cells, outputs with HTML and the front matter left out, images by their path from the root"
    nb = nbformat.read(root/'nbs'/'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
    nb.metadata['language_info'] = {'name': 'python'}
    for c in nb.cells:
        c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
        for o in c.get('outputs', []):
            if 'data' in o: o['data'] = {k: v for k, v in o['data'].items() if k == 'text/plain'}
        if 'outputs' in c:
            c.outputs = [o for o in c.outputs if o.get('name') != 'stderr' and (o.get('text') or o.get('data', {}).get('text/plain', '<')[0] != '<')]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r'\n{3,}', '\n\n', text.replace('](images/', '](nbs/images/')).strip() + '\n'


if __name__ == '__main__':
    readme, text = root/'README.md', render()
    if '--check' in sys.argv:
        if not readme.exists() or readme.read_text(encoding='utf-8') != text:
            sys.exit('README.md is not what nbs/index.ipynb gives: run python .ci/readme.py and commit it')
    else: readme.write_text(text, encoding='utf-8')
