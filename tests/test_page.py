"The labeling page: its data survive as JSON, nothing in them can run, and a person can label with it in a browser. See also test_faults."
import base64
import hashlib
import io
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import ColReader, ColSplitter
from fastai.learner import Learner
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularPandas
from fastai.text.data import TextBlock
from fastai.vision.core import PILImage
from fastcore.basics import noop
from PIL import Image

from conftest import blobs, quiet
from fastai_lp.experiments.models import small_convnet
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.relabel import relabel
from fastai_lp.page import PER_CLASS, as_pil, item_content, page_data, picture
from fastai_lp.transductive.graph import affinity
from fastai_lp.transductive.labelers import NetworkPrediction
from fastai_lp.transductive.propagate import propagate, spread
from fastai_lp.transductive.pseudo import PseudoLabels

root = Path(__file__).resolve().parents[1]
CLASSES = [
    '<img src=x onerror="document.title=1">', '"&\'', '</script><script>document.title=1</script>', '汉字', 'שלום ‮RTL', '=1+1', '@x,\n']
NAMES = [
    '<img src=x onerror="document.title=1">.png', '"&\'.png', '<!--<script>.png', '汉字.png', 'שלום.png', '=1+1.png', '@x, y.png', ' a .png']


def pseudo_labels(n, c, per_class=3, x=None, k=7):
    data = blobs(n=n, c=c, n_valid=0, per_class=per_class)
    return propagate(data.x if x is None else x, [-1 if o is None else o for o in data.labels], c, k=k)


def dl_of(items, *tfms): return TfmdDL(Datasets(items, [list(tfms)]), bs=8)


@pytest.fixture
def pictures(tmp_path):
    "An interpretation of 80 pictures of noise, the names and classes of which look like markup"
    files = []
    for i in range(80):
        f = tmp_path/'data'/('<' if i == 20 else f'{i // 8:02d}')/('script>.png' if i == 20 else NAMES[i % 8])
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 40), 50).convert('RGB').save(f)
        files.append(f)
    return LPInterpretation(pseudo_labels(80, 7), items=[str(o) for o in files], vocab=CLASSES, dl=dl_of(files, PILImage.create))


def parts(page):
    "Text of the page and its data"
    text = Path(page).read_text(encoding='utf-8')
    return text, json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# Without a browser

def test_markup_in_names_is_data(pictures, tmp_path):
    text, data = parts(pictures.to_html(tmp_path/'label.html'))
    assert data['classes'] == CLASSES
    df = pictures.to_df()
    assert {o['name'] for o in data['items']} <= set(df.item)
    template = (root/'fastai_lp'/'page.html').read_text(encoding='utf-8')
    for o in '<>&': assert text.count(o) == template.count(o)
    assert text.isascii() == template.isascii()
    asked = [data['items'][o['item']]['name'] for o in data['lists'][0]['entries']]
    assert asked == pictures.suggest(40).item.tolist()


def test_policy_allows_only_the_program_of_the_page(pictures, tmp_path):
    text, _ = parts(pictures.to_html(tmp_path/'label.html', suggest=2))
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    assert "default-src 'none'" in policy and 'unsafe' not in policy and 'http' not in policy
    for element in 'style', 'script':
        content = re.search(rf'<{element}>(.*?)</{element}>', text, re.S)[1].encode()
        assert f"{element}-src 'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'" in policy
    assert not re.search(r'\son\w+="|style="|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://', text)


def test_the_same_data_give_the_same_page(pictures, tmp_path):
    pages = [pictures.to_html(tmp_path/f'{i}.html', suggest=m) for i, m in enumerate([5, 5, 6])]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert parts(pages[0])[1]['id'] != parts(pages[2])[1]['id']


def test_lists_are_those_of_the_interpretation(pictures):
    p = pictures.pseudo
    wrong = p.labeled.nonzero().flatten()[0].item()
    p.labels[wrong] = (p.labels[wrong]+1) % 7
    data = page_data(pictures, 30, 60)
    found = {o['title']: o['entries'] for o in data['lists']}
    def names(title): return [data['items'][o['item']]['name'] for o in found[title]]
    issues = pictures.label_issues()
    assert names('Labels to check') == issues.item.tolist()
    assert [CLASSES[o['given']] for o in found['Labels to check']] == issues.given.tolist()
    assert [CLASSES[o['proposed']] for o in found['Labels to check']] == issues.suggested.tolist()
    df = pictures.to_df()
    best = df[~df.labeled].groupby('label').certainty.nlargest(PER_CLASS)
    assert len(found['Most certain']) == len(best)
    assert sorted(names('Most certain')) == sorted(df.item[best.index.get_level_values(1)])
    assert 'Suspected junk' not in found


def test_junk_is_listed_if_there_is_any():
    x = torch.cat([blobs(n=90, n_valid=0).x, torch.tensor([[-5., 5, -5, 5, -5, 5, -5, 5]]) + .1*torch.randn(8, 8)])
    y = torch.tensor([i % 3 if i < 9 else -1 for i in range(98)])
    data = page_data(LPInterpretation(propagate(x, y, k=5)), 20, 60)
    assert data['lists'][-1]['title'] == 'Suspected junk'
    assert {data['items'][o['item']]['name'] for o in data['lists'][-1]['entries']} == {str(i) for i in range(90, 98)}


def decoded(uri):
    kind, text = uri.split(',')
    assert kind == 'data:image/jpeg;base64'
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_pictures_are_small(pictures):
    images = [decoded(o['picture']) for o in page_data(pictures, 10, 32)['items']]
    assert {o.size for o in images} == {(32, 21)}
    assert decoded(picture(Image.new('RGB', (3000, 2000)), 224)['picture']).size == (224, 149)


def test_images_of_any_kind():
    turned = Image.new('RGB', (20, 10))
    turned.getexif()[0x112] = 6
    assert as_pil(turned).size == (10, 20)
    assert as_pil(Image.new('RGBA', (2, 2))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 1000], [2000, 3000]], dtype=np.uint16))
    assert np.array(as_pil(deep)).tolist() == [[0, 85], [170, 255]]
    for o in torch.rand(1, 5, 4), torch.randn(3, 5, 4), torch.zeros(3, 5, 4, dtype=torch.uint8), torch.rand(7, 5, 4), torch.ones(1, 5, 4):
        assert as_pil(o).size == (4, 5)
    for mode in '1', 'L', 'P', 'LA', 'CMYK', 'I', 'F': assert decoded(picture(Image.new(mode, (4, 5)), 8)['picture']).size == (4, 5)


def test_without_a_data_loader_there_are_names(pictures, tmp_path):
    pictures.dl = None
    _, data = parts(pictures.to_html(tmp_path/'label.html'))
    assert all(o.keys() == {'name', 'certainty'} for o in data['items'])
    assert 'pass dl= to load' in data['notes'][0]


def test_texts_and_tables():
    texts = [f'text {i} {CLASSES[i % 7]}' for i in range(60)]
    data = page_data(LPInterpretation(pseudo_labels(60, 3), items=texts, vocab='abc', dl=dl_of(texts, noop)), 10, 60)
    assert all(o['text'] == o['name'] for o in data['items'])
    df = pd.DataFrame(dict(color=['red', CLASSES[0]]*30, size=np.arange(60)/3, y=['a', 'b', 'c']*20))
    to = TabularPandas(df, [Categorify, Normalize], 'color', 'size', 'y', CategoryBlock, splits=[list(range(60)), []])
    assert item_content(to.train, 1, 60)['row'] == [['color', CLASSES[0]], ['size', '0.333333']]
    rows = dl_of(df.assign(gone=np.nan), lambda o: torch.tensor([o['size']]))
    assert item_content(rows.dataset, 1, 60)['row'] == [['color', CLASSES[0]], ['size', '0.333333'], ['y', 'b']]


def test_tokenized_texts_get_their_capitals_back():
    df = pd.DataFrame(dict(text=['You LOVE this film', 'This Film is not Good'], valid=[False, False]))
    vocab = 'xxunk xxpad xxbos xxmaj xxup you love this film is not'.split()
    block = TextBlock.from_df('text', seq_len=8, n_workers=0, vocab=vocab)
    ds = DataBlock(block, get_x=ColReader('text'), splitter=ColSplitter('valid')).datasets(df).train
    assert [item_content(ds, i, 60)['text'] for i in range(2)] == ['You LOVE this film', 'This Film is not …']


def test_other_labels(tmp_path):
    data = blobs(n=60, n_valid=0)
    y = torch.tensor([-1 if o is None else o for o in data.labels])
    network = LPInterpretation(NetworkPrediction()(data.x, 4*torch.eye(3)[data.truth] + torch.randn(60, 3), y))
    shown = page_data(network, 5, 60)
    assert [o['title'] for o in shown['lists']] == ['To label', 'Most certain']
    asked = [int(shown['items'][o['item']]['name']) for o in shown['lists'][0]['entries']]
    assert asked == network.to_df()[lambda o: ~o.labeled].nsmallest(5, 'certainty').index.tolist()
    full = LPInterpretation(propagate(data.x, data.truth, k=5), items=['twice', 'twice', *map(str, range(58))])
    notes = ' '.join(parts(full.to_html(tmp_path/'a.html'))[1]['notes'])
    assert 'All items are labeled.' in notes and 'Some items have the same name' in notes
    i = torch.arange(40)
    W = affinity(torch.ones(40, 1), (i//20*20 + (i+1) % 20)[:, None]) # two rings, one without labels
    shown = page_data(LPInterpretation(spread(W, torch.where(i < 2, i, -1)), vocab=['cat', 'dog']), 100, 60)
    assert len(shown['lists'][0]['entries']) == 38
    assert sum('proposed' not in o for o in shown['lists'][0]['entries']) == 20
    assert shown['summary'].endswith('20 that no label reaches')


@pytest.mark.parametrize('wrong, match', [(dict(suggest=0), 'suggest must be an integer of at least 1, got 0'),
    (dict(suggest=2.5), 'suggest must be'), (dict(suggest=None), 'suggest must be'), (dict(size=0), 'size must be')])
def test_wrong_options_write_nothing(pictures, tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match): pictures.to_html(tmp_path/'label.html', **wrong)
    assert not (tmp_path/'label.html').exists()


def test_every_file_of_the_package_is_in_the_wheel():
    listed = tomllib.loads((root/'pyproject.toml').read_text())['tool']['setuptools']['package-data']['fastai_lp']
    package = root/'fastai_lp'
    found = [p.relative_to(package).as_posix() for p in package.rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    assert sorted(o for o in found if not o.endswith('.py')) == sorted(listed)


# In a browser

@pytest.fixture(scope='module')
def chromium():
    sync_api = pytest.importorskip('playwright.sync_api', reason="Playwright is missing: pip install -e '.[browser]'")
    with sync_api.sync_playwright() as p:
        found = shutil.which('chromium'), p.chromium.executable_path, shutil.which('google-chrome')
        path = next((o for o in found if o and Path(o).exists()), None)
        if path is None: pytest.skip('Chromium is missing: playwright install --with-deps chromium, or apt-get install chromium')
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    "Opens a page; at the end, there was no error, no markup from data, and no connection"
    opened, wrong = [], []
    def go(path, script=None, **kwargs):
        opened.append(context := chromium.new_context(**kwargs))
        if script: context.add_init_script(script)
        tab = context.new_page()
        tab.on('console', lambda m: wrong.append(m.text))
        tab.on('pageerror', lambda e: wrong.append(str(e)))
        tab.on('request', lambda o: wrong.append(o.url) if not o.url.startswith(('file:', 'data:', 'blob:')) else None)
        tab.goto(Path(path).as_uri())
        return tab
    yield go
    for context in opened:
        for tab in context.pages:
            assert tab.title() == 'Labeling page'
            assert tab.locator('bdi *, .text *, img[src=x]').count() == 0
        context.close()
    assert not wrong


def downloaded(tab, tmp_path):
    with tab.expect_download() as d: tab.click('#download')
    d.value.save_as(tmp_path/d.value.suggested_filename)
    return tmp_path/'labels.csv'


def add_class(tab, name):
    tab.keyboard.insert_text(name) if tab.locator('#filter:focus').count() else tab.fill('#filter', name)
    tab.keyboard.press('Enter')


@pytest.mark.browser
@pytest.mark.filterwarnings('ignore:LPCallback, epoch')
def test_label_by_keys_undo_reload_download_and_train(pictures, visit, tmp_path):
    "The whole loop: train, label, two new classes among them, and train with the labels"
    vocab, y = sorted(CLASSES), [None if o < 0 else CLASSES[o] for o in torch.where(pictures.pseudo.labeled, pictures.pseudo.labels, -1)]
    dls = SemiImageDataLoaders.from_lists(tmp_path, pictures.items, y, valid_pct=0, bs=16, num_workers=0, device='cpu')
    def fitted(dls):
        learn = quiet(Learner(dls, small_convnet(len(dls.vocab), n_in=3, width=4), cbs=LPCallback()))
        learn.fit(1)
        return LPInterpretation.from_learner(learn)
    interp = fitted(dls)
    tab = visit(interp.to_html(tmp_path/'label.html', suggest=40))
    assert tab.locator('#classes bdi').all_text_contents() == vocab
    expected, new = {}, ['<b>new</b>', '鳥 & "חתול"']
    for k, item in enumerate(interp.suggest(40).item):
        assert tab.locator('#where').text_content() == f'Item {k+1} of 40'
        expected[item] = [*vocab, *new][k % 9]
        if k in (7, 8): add_class(tab, expected[item])
        else: tab.keyboard.press(f'{k % 9 + 1}')
    assert tab.locator('#end-title').text_content() == 'This list is done'
    tab.keyboard.press('Backspace')
    tab.reload()
    assert tab.locator('#where').text_content() == 'Item 40 of 40'
    assert tab.locator('#count').text_content() == ' (39)'
    tab.keyboard.press('9')
    expected[item] = new[1]
    with pytest.warns(UserWarning, match='became classes'): dls = relabel(dls, downloaded(tab, tmp_path), add_classes=True)
    assert list(dls.vocab) == [*vocab, *new]
    df = fitted(dls).to_df()[lambda o: o.labeled]
    assert dict(zip(df.item, df.label)) == expected | {item: o for item, o in zip(pictures.items, y) if o}


@pytest.mark.browser
def test_new_classes(visit, tmp_path):
    vocab = ['black cat', 'cat', 'Éclair']
    page = LPInterpretation(pseudo_labels(60, 3), vocab=vocab).to_html(tmp_path/'label.html', suggest=9)
    tab = visit(page)
    def shown(tab): return [o.strip() for o in tab.locator('#classes bdi').all_text_contents()]
    def count(): return int(tab.locator('#count').text_content().strip(' ()'))
    add = tab.locator('#add')
    assert add.is_disabled()
    for name in 'CAT', 'Cat ', 'black\u00a0 cat', 'e\u0301CLAIR', 'ca\u200bt':
        tab.fill('#filter', name)
        assert add.is_disabled() and 'already' in tab.locator('#note').text_content()
    tab.fill('#filter', '\u200b ')
    assert add.is_disabled()
    tab.keyboard.press('Enter')
    assert count() == 0
    tab.fill('#filter', 'cat')
    assert tab.locator('[data-enter]').text_content().endswith('cat') and not tab.locator('#note').is_visible()
    tab.keyboard.press('Enter')
    for name in ' big   dog ', 'og':
        tab.keyboard.type(name)
        if name == 'og': tab.keyboard.press('Tab')  # to the button, since the name is a part of another one
        tab.keyboard.press('Enter')
    assert shown(tab) == [*vocab, 'big dog', 'og']
    tab.keyboard.press('Backspace')
    assert shown(tab) == [*vocab, 'big dog'], 'the only label of a new class is taken back, and the class with it'
    other = tab.context.new_page()
    other.goto(page.as_uri())
    assert shown(other) == shown(tab)
    other.fill('#filter', '3D')
    other.click('#add')
    tab.wait_for_function("document.getElementById('count').textContent === ' (3)'")
    tab.locator('body').press('5')
    tab.locator('body').press('Escape')
    read = pd.read_csv(downloaded(tab, tmp_path))
    assert read.label.tolist() == ['cat', 'big dog', '3D', '3D']


@pytest.mark.browser
@pytest.mark.parametrize('stored', [
    '[[0, "cat"', '[[0, "new ", 0], [0, {}, 0], 1, null, [0, "", 0], [0, 9, 0], [0, "x", 9]]', '{"log": 1}', '7'])
def test_damaged_progress_is_ignored(visit, tmp_path, stored):
    page = LPInterpretation(pseudo_labels(60, 3)).to_html(tmp_path/'label.html', suggest=5)
    key = f'fastai_lp {parts(page)[1]["id"]}'
    tab = visit(page, f'if (!localStorage.length) localStorage.setItem({json.dumps(key)}, {json.dumps(stored)})')
    assert tab.locator('#count').text_content() == ' (0)'
    tab.keyboard.press('1')
    assert tab.locator('#count').text_content() == ' (1)'


def nothing_labeled(c, graph=True, n=60):
    p, no = pseudo_labels(n, 3), torch.zeros(n, dtype=torch.bool)
    return PseudoLabels(torch.full((n,), -1), torch.zeros(n), torch.ones(c), labeled=no, reached=no, W=p.W if graph else None)


@pytest.mark.parametrize('graph', [True, False])
@pytest.mark.parametrize('vocab', [[], ['cat'], ['cat', 'dog']], ids=len)
def test_nothing_is_labeled(tmp_path, vocab, graph):
    interp = LPInterpretation(nothing_labeled(len(vocab), graph), items=[f'{i}.png' for i in range(60)], vocab=vocab)
    data = page_data(interp, 40, 60)
    asked = [data['items'][o['item']]['name'] for o in data['lists'][0]['entries']]
    assert [o['title'] for o in data['lists']] == ['To label'] and len(set(asked)) == 40
    if graph: assert asked == interp.suggest(40).item.tolist()
    assert data['classes'] == vocab and data['figures'] == [] and len(data['counts']) == 1
    assert data['summary'] == f"60 items, 0 labeled, {len(vocab)} class{'' if len(vocab) == 1 else 'es'}"
    interp = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    df = pd.read_csv(interp.to_csv(tmp_path/'a.csv'))
    assert df.label.isna().all() and (df.weight == 0).all() and interp.vocab == vocab


@pytest.mark.browser
def test_the_first_classes_are_typed(visit, tmp_path):
    page = LPInterpretation(nothing_labeled(0), vocab=[]).to_html(tmp_path/'label.html', suggest=6)
    tab = visit(page)
    assert tab.locator('nav button').count() == 1
    assert tab.locator('#filter:focus').count() == 1
    for name in 'cat', 'dog':
        tab.keyboard.type(name)
        tab.keyboard.press('Enter')
    for key in '1', '2': tab.keyboard.press(key)
    tab.keyboard.type(' 1st')  # a space, since digits are keys
    tab.keyboard.press('Enter')
    tab.keyboard.press('3')
    assert pd.read_csv(downloaded(tab, tmp_path)).label.tolist() == ['cat', 'dog', 'cat', 'dog', '1st', '1st']


@pytest.mark.browser
def test_digits_are_their_own_keys(visit, tmp_path):
    tab = visit(LPInterpretation(pseudo_labels(60, 3)).to_html(tmp_path/'label.html', suggest=5))
    tab.keyboard.press('2')
    tab.keyboard.type('none')
    tab.keyboard.press('Enter')
    for key in '0', '3': tab.keyboard.press(key)  # 3 is the first free key
    assert pd.read_csv(downloaded(tab, tmp_path), keep_default_na=False).label.tolist() == ['2', 'none', '0', 'none']


@pytest.mark.browser
def test_policy_blocks_what_data_would_need(chromium, pictures, tmp_path):
    "Even if markup got into the page"
    tab = chromium.new_page()
    said = []
    tab.on('console', lambda m: said.append(m.text))
    tab.goto(pictures.to_html(tmp_path/'label.html', suggest=2).as_uri())
    tab.evaluate('''() => {
        const script = document.createElement('script')
        script.textContent = 'document.title = "bad"'
        const other = document.createElement('div')
        other.innerHTML = '<img src="data:," onerror="document.title = 1"><img src="http://127.0.0.1:9/x.png">'
        document.body.append(script, other)
        return fetch('http://127.0.0.1:9/').catch(() => 0)
    }''')
    tab.wait_for_timeout(100)
    assert tab.title() == 'Labeling page'
    assert sum('Content Security Policy' in o for o in said) >= 4
    tab.close()


@pytest.mark.browser
def test_two_tabs_share_their_progress(pictures, visit, tmp_path):
    tab = visit(page := pictures.to_html(tmp_path/'label.html', suggest=5))
    other = tab.context.new_page()
    other.goto(page.as_uri())
    other.focus('#classes button')
    other.keyboard.press('Space')
    tab.wait_for_function("document.getElementById('count').textContent === ' (1)'")
    assert tab.locator('#where').text_content() == 'Item 2 of 5'


@pytest.mark.browser
def test_mouse_lists_and_figures(pictures, visit, tmp_path):
    wrong = pictures.pseudo.labeled.nonzero().flatten()[0].item()
    pictures.pseudo.labels[wrong] = (pictures.pseudo.labels[wrong]+1) % 7
    pictures.history = [dict(epoch=i, accuracy=i/4) for i in range(4)]
    tab = visit(pictures.to_html(tmp_path/'label.html', suggest=3))
    tab.click('#classes button:nth-child(1)')
    tab.keyboard.press('Enter') # on the button that has the focus
    tab.click('#skip')
    assert 'labeled, 1 skipped' in tab.locator('#end-text').text_content()
    tab.click('#end-tools button:nth-child(2)')
    assert tab.locator('#proposal p').first.text_content() == f'Given label: {pictures.label_issues().given.iloc[0]}'
    tab.locator('body').press('Enter')
    tab.click('nav button:nth-child(3)')
    assert tab.locator('#grid h3').all_text_contents() == CLASSES
    tab.locator('.card').nth(5).click()
    tab.keyboard.press('2')
    assert tab.locator('#item').is_visible()
    tab.click('nav button:last-child')
    assert tab.evaluate('[...document.images].filter(o => o.checkVisibility()).map(o => o.naturalWidth > 100)') == [True, True]
    read = pd.read_csv(downloaded(tab, tmp_path), keep_default_na=False)
    assert read.label.tolist() == [CLASSES[0]]*2 + [pictures.label_issues().suggested.iloc[0], CLASSES[1]]


@pytest.mark.browser
def test_phone_has_no_horizontal_scrolling(pictures, visit, tmp_path):
    long = ['x'*200, *pictures.vocab[1:]]
    page = LPInterpretation(pictures.pseudo, items=pictures.items, vocab=long, dl=pictures.dl).to_html(tmp_path/'label.html')
    tab = visit(page, viewport=dict(width=360, height=640), is_mobile=True, has_touch=True)
    for i in range(tab.locator('nav button').count()):
        tab.locator('nav button').nth(i).tap()
        assert tab.evaluate('document.documentElement.scrollWidth') == 360


@pytest.mark.browser
def test_many_classes_are_filtered(visit, tmp_path):
    vocab = [f'kind {i}' for i in range(30)]
    tab = visit(LPInterpretation(pseudo_labels(120, 30, 1), vocab=vocab).to_html(tmp_path/'label.html', suggest=5))
    tab.keyboard.type('kind 27')
    assert tab.locator('#classes li:visible').count() == 1
    tab.keyboard.press('Enter')
    tab.keyboard.press('Escape')
    tab.keyboard.press('9')
    read = pd.read_csv(downloaded(tab, tmp_path))
    assert read.label.tolist() == ['kind 27', 'kind 8']


@pytest.mark.browser
def test_no_storage_is_said(pictures, visit, tmp_path):
    page = pictures.to_html(tmp_path/'label.html', suggest=3)
    tab = visit(page, "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no') }})")
    assert 'does not keep the progress' in tab.locator('#notes').text_content()
    tab.keyboard.press('1')
    assert tab.locator('#count').text_content() == ' (1)'


@pytest.mark.browser
def test_names_that_are_not_utf8_keep_their_bytes(visit, tmp_path):
    names = [os.fsdecode(b'\xff\xe9.png'), *map(str, range(59))]
    p = pseudo_labels(60, 3)
    asked = LPInterpretation(p).suggest(1).index[0]
    names[0], names[asked] = names[asked], names[0]
    tab = visit(LPInterpretation(p, items=names, vocab='abc').to_html(tmp_path/'label.html', suggest=1))
    tab.keyboard.press('1')
    assert downloaded(tab, tmp_path).read_bytes() == b'item,label\r\n\xff\xe9.png,a\r\n'


@pytest.mark.browser
def test_every_control_has_a_name_and_enough_contrast(pictures, visit, tmp_path):
    page = pictures.to_html(tmp_path/'label.html', suggest=3)
    for scheme in 'light', 'dark':
        tab = visit(page, color_scheme=scheme)
        tree = tab.locator('body').aria_snapshot()
        assert 'button "Undo"' in tree and 'status' in tree and 'navigation "Lists of items"' in tree
        for i in range(tab.locator('button:visible').count()):
            button = tab.locator('button:visible').nth(i)
            assert button.get_attribute('aria-label') or button.text_content().strip()
        value = {o: tab.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{o}').trim()")
            for o in ('back', 'card', 'text', 'soft', 'main', 'on-main', 'done', 'warn')}
        for text in 'text', 'soft', 'main', 'done', 'warn': assert contrast(value[text], value['card']) >= 4.5, (scheme, text)
        assert contrast(value['on-main'], value['main']) >= 4.5
        assert contrast(value['soft'], value['back']) >= 4.5


def contrast(a, b):
    "Contrast of two colors as in WCAG 2, from 1 to 21"
    def luminance(o):
        digits = o[1:] if len(o) == 7 else ''.join(2*d for d in o[1:])
        x = np.array([int(digits[i:i+2], 16)/255 for i in (0, 2, 4)])
        return np.where(x <= .04045, x/12.92, ((x+.055)/1.055)**2.4) @ [.2126, .7152, .0722]
    low, high = sorted((luminance(a), luminance(b)))
    return (high+.05)/(low+.05)
