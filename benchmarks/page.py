"""Size and load time of the labeling page with 500 photographs of 224×224 pixels, in headless Chromium.

Needs `pip install -e '.[browser]'` and Chromium. The photographs are crops of the two that come with scikit-learn."""
import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from fastai.data.core import Datasets, TfmdDL
from fastai.vision.core import PILImage
from PIL import Image
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_sample_images

from fastai_lp.interpret import LPInterpretation
from fastai_lp.transductive.propagate import propagate

SCREENS = dict(desktop=dict(viewport=dict(width=1280, height=900)),
    phone=dict(viewport=dict(width=390, height=844), is_mobile=True, has_touch=True))
KEY = """async () => {
    const start = performance.now()
    for (let i = 0; i < 20; i++) {
        document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true}))
        await new Promise(requestAnimationFrame)
    }
    return (performance.now()-start)/20
}"""


def photographs(folder, n, side=224, seed=0):
    "Paths of `n` random crops"
    rng, images = np.random.default_rng(seed), load_sample_images().images
    for i in range(n):
        image = images[i % len(images)]
        y, x = (rng.integers(0, o-side) for o in image.shape[:2])
        Image.fromarray(image[y:y+side, x:x+side]).save(f := Path(folder)/f'{i:04d}.jpg', quality=92)
        yield f


def interpretation(files, c=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.arange(len(files)) % c
    x = 2*torch.randn(c, 32, generator=g)[truth] + torch.randn(len(files), 32, generator=g)
    pseudo = propagate(x, torch.where(torch.arange(len(files)) < 5*c, truth, -1), c)
    dl = TfmdDL(Datasets(files, [[PILImage.create]]), bs=8)
    return LPInterpretation(pseudo, items=[str(o) for o in files], vocab=[f'kind {i}' for i in range(c)], dl=dl)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=500, help='suggested items')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        interp = interpretation(list(photographs(folder, args.n+200)))
        start = time.perf_counter()
        page = interp.to_html(f'{folder}/label.html', suggest=args.n)
        print(f'{args.n} photographs: {page.stat().st_size/1e6:.1f} MB, written in {time.perf_counter()-start:.1f} s')
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        for name, screen in SCREENS.items():
            found = [measure(browser, page, screen) for _ in range(args.repeats)]
            load, key = map(median, zip(*found))
            print(f'{name}: loaded after {load/1e3:.2f} s, {key:.0f} ms per label (median of {args.repeats})')


def measure(browser, page, screen):
    "Milliseconds until the page is loaded, and per label"
    context = browser.new_context(**screen)
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_function("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
    res = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"), tab.evaluate(KEY)
    context.close()
    return res


if __name__ == '__main__': main()
