"`lp_label`, as people run it: any folder of images, any mistake, and rounds of labeling."
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from fastai_lp.folder import commands, embeddings
from fastai_lp.folder.commands import lp_label
from test_page import add_class, chromium, downloaded, parts, visit  # chkstyle: ignore (fixtures)

RED, BLUE, GREEN = (220, 60, 60), (60, 60, 220), (60, 220, 60)
NAMES = ['a, "b".png', "it's #1 100%.png", '猫 1.png', ' c .png', '=1+1.png']


def draw(file, color, seed=0, size=(40, 30)):
    "A noisy image in one color"
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed, *color]).random((*size[::-1], 3))
    Image.fromarray((noise*color).astype(np.uint8)).save(file)


def color(file):
    "The class of an image"
    with Image.open(file) as o: red, _, blue = np.array(o).mean((0, 1))
    return 'red' if red > blue else 'b, "lue"'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "60 images of two colors: four in folders of classes, the others loose. Names are paths from the current folder"
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        name = f'{i}.png' if i >= len(NAMES) else NAMES[i]
        if i in (10, 12): name = f'red/{i}.png'
        if i in (11, 13): name = f'b, "lue"/more/{i}.png'
        draw(tmp_path/'photos'/name, BLUE if i % 2 else RED, i)
    return Path('photos')


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "Weights of ResNet-18 in torch's cache: random ones, which can tell colors apart"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    torch.manual_seed(0)
    file = tmp_path/'torch'/'hub'/'checkpoints'/'resnet18-f37072fd.pth'
    file.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), file)
    return file


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    "No weights, and no server answers"
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    def fail(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr('urllib.request.OpenerDirector.open', fail)


def label(folder, size=32, suggest=5, **kwargs):
    "Run the command; the table of pseudo-labels"
    lp_label(str(folder), size=size, suggest=suggest, **kwargs)
    out = Path(kwargs.get('out') or folder/'lp_label')
    return pd.read_csv(out/'pseudo_labels.csv', index_col='item', dtype=dict(label=str), keep_default_na=False)


def write(labels, file='labels.csv'):
    with open(file, 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([('item', 'label'), *labels.items()])
    return file


def mistake(*args, **kwargs):
    "The message of a mistake"
    with pytest.raises(SystemExit) as e: lp_label(*map(str, args), **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def contents(folder): return {o: o.read_bytes() for o in folder.rglob('*') if o.is_file()}


# A round

def test_a_round(folder, weights, capsys):
    df = label(folder)
    assert len(df) == 60 and df.labeled.sum() == 4
    assert (df.label == [color(folder/o) for o in df.index]).mean() > .95
    assert set(NAMES) < set(df.index)
    said = capsys.readouterr().out
    assert 'reading images: 60 of 60' in said
    assert '60 images, 4 labeled (b, "lue" 2, red 2)' in said
    assert 'lp_label photos --suggest 5 --size 32 --labels ~/Downloads/labels.csv' in said
    page = parts(folder/'lp_label'/'label.html')[1]
    assert {o['name'] for o in page['items']} <= set(df.index)
    assert all('picture' in o for o in page['items'])


def test_the_same_input_gives_the_same_files(folder, weights):
    label(folder)
    first = contents(folder/'lp_label')
    label(folder)
    assert contents(folder/'lp_label') == first


def test_rounds(folder, weights, capsys):
    before = label(folder)
    label(folder, labels=write({NAMES[0]: 'red', NAMES[1]: 'b, "lue"', NAMES[2]: 'owl 🦉', 'red/12.png': 'dark'}))
    said = capsys.readouterr().out
    assert '4 new labels' in said and 'New classes: dark, owl 🦉' in said
    agree = sum(before.label[o] == new for o, new in zip(NAMES[:2], ['red', 'b, "lue"']))
    assert f'{agree} of 3 agree' in said  # the fourth had a label
    labels = write({NAMES[2]: 'red', NAMES[3]: 'b, "lue"', 'red/10.png': ''}, 'labels (1).csv')
    df = label(folder, labels=labels)
    known = dict(zip([*NAMES[:4], 'red/12.png'], ['red', 'b, "lue"', 'red', 'b, "lue"', 'dark']))
    assert df.label[df.labeled].to_dict() == known | {f'b, "lue"/more/{i}.png': 'b, "lue"' for i in (11, 13)}
    assert label(folder).equals(df)
    capsys.readouterr()
    label(folder, labels=labels)
    assert 'are known already' in capsys.readouterr().out


def test_labels_of_images_that_are_gone(folder, weights, capsys):
    label(folder, labels=write({NAMES[0]: 'red', '20.png': 'red', 'nowhere.png': 'red'}))
    assert "1 labels in labels.csv are of images that are gone, and are left out: 'nowhere.png'" in capsys.readouterr().out
    (folder/'20.png').rename('away.png')
    assert label(folder).labeled.sum() == 5
    Path('away.png').rename(folder/'20.png')
    assert label(folder).labeled.sum() == 6, 'the label comes back with the image'


def test_folders_without_labels(folder, weights):
    draw(folder/'UNLABELED'/'1.png', RED)
    draw(folder/'2024-05'/'1.png', RED)
    assert set(label(folder).query('labeled').label) == {'red', 'b, "lue"', '2024-05'}
    assert set(label(folder, unlabeled='2024*').query('labeled').label) == {'red', 'b, "lue"'}
    assert not label(folder, unlabeled='*').labeled.any()


def test_results_in_another_folder(folder, weights):
    before = contents(folder)
    label(folder, out='photos/results')
    draw(folder/'results'/'chart.png', GREEN)
    assert len(label(folder, out='photos/results')) == 60
    assert {k: v for k, v in contents(folder).items() if folder/'results' not in k.parents} == before


# What is kept

def test_each_image_is_read_once(folder, weights, monkeypatch):
    read = []
    monkeypatch.setattr(commands, 'embed', lambda files, **kwargs: read.extend(files) or embeddings.embed(files, **kwargs))
    df = label(folder)
    assert len(read) == 60
    read.clear()
    assert label(folder).equals(df) and not read
    draw(folder/'20.png', BLUE, 99)
    draw(folder/'new.png', RED, 99)
    changed = label(folder)
    assert sorted(read) == [folder/'20.png', folder/'new.png']
    assert changed.label['20.png'] == 'b, "lue"' and changed.label['new.png'] == 'red'
    read.clear()
    label(folder, arch='none', epochs=2, unlabeled='*')
    assert len(read) == 61, 'no weights, other features'
    file = folder/'lp_label'/'embeddings.npz'
    file.write_bytes(file.read_bytes()[:-100])
    assert label(folder).label.equals(changed.label)


def test_interrupted(folder, weights, monkeypatch):
    label(folder)
    before = contents(folder)
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(commands.LabelDiffusion, 'fit', interrupt)
    with pytest.raises(SystemExit, match='Stopped'): lp_label('photos', size=32, labels=write({NAMES[0]: 'owl'}))
    assert contents(folder) == before


def test_interrupted_while_reading(folder, weights, monkeypatch):
    "What was read is kept"
    def some(files, **kwargs):
        yield from embeddings.embed(files[:20], **kwargs)
        raise KeyboardInterrupt
    monkeypatch.setattr(commands, 'embed', some)
    with pytest.raises(SystemExit, match='Stopped'): label(folder)
    read = []
    monkeypatch.setattr(commands, 'embed', lambda files, **kwargs: read.extend(files) or embeddings.embed(files, **kwargs))
    df = label(folder)
    assert len(read) == 40
    shutil.rmtree(folder/'lp_label')
    np.testing.assert_allclose(label(folder).certainty, df.certainty, rtol=1e-3)


# Few labels

@pytest.mark.parametrize('arch', ['resnet18', 'none'])
def test_without_labels(folder, weights, arch, capsys):
    df = label(folder, arch=arch, unlabeled='*')
    assert 'Labels of at least two classes are needed' in capsys.readouterr().out
    assert not df.labeled.any() and not df.reached.any()
    page = parts(folder/'lp_label'/'label.html')[1]
    assert page['classes'] == [] and len(page['lists'][0]['entries']) == 5
    label(folder, arch=arch, unlabeled='*', classes='red, dark blue,red')
    assert parts(folder/'lp_label'/'label.html')[1]['classes'] == ['red', 'dark blue']


def test_one_class(folder, weights, capsys):
    shutil.rmtree(folder/'red')
    df = label(folder)
    assert 'Labels of at least two classes are needed' in capsys.readouterr().out
    assert df.labeled.sum() == 2 and not df.reached[~df.labeled].any()
    assert label(folder, classes='owl', labels=write({NAMES[0]: 'red'})).reached.all()
    assert parts(folder/'lp_label'/'label.html')[1]['classes'] == ['b, "lue"', 'red', 'owl']


@pytest.mark.parametrize('arch', ['resnet18', 'none'])
def test_all_labeled(folder, weights, arch, capsys):
    df = label(folder, unlabeled='*')
    wrong = dict(zip(df.index, ['red' if '1' in o else 'blue' for o in df.index]))
    assert label(folder, arch=arch, labels=write(wrong)).labeled.all()
    assert 'All images are labeled' in capsys.readouterr().out
    assert [o['title'] for o in parts(folder/'lp_label'/'label.html')[1]['lists']] == ['Labels to check']


@pytest.mark.parametrize('n', [2, 3, 5])
@pytest.mark.parametrize('color', [(0, 0, 0), RED])
def test_few_images(tmp_path, weights, n, color):
    for i in range(n): draw(tmp_path/'photos'/['a/1.png', 'b/1.png', '1.png', '2.png', '3.png'][i], color, i)
    assert len(label(tmp_path/'photos')) == n


# Without a pretrained network

def test_without_weights_a_network_is_trained(folder, no_network, capsys):
    df = label(folder, epochs=4, size=16)
    said = capsys.readouterr().out
    assert 'no route to host' in said and 'https://download.pytorch.org/models/resnet18-f37072fd.pth' in said
    assert 'Training a network from random weights' in said and 'training: ' in said
    assert df.reached.all() and set(df.label) == {'red', 'b, "lue"'}


def test_weights_in_a_file(folder, weights, no_network, tmp_path):
    shutil.move(weights, tmp_path/'mine.pth')
    assert label(folder, weights=str(tmp_path/'mine.pth')).reached.all()


# Mistakes

def test_images_that_cannot_be_read(folder, weights, capsys):
    whole = contents(folder)
    (folder/'text.jpg').write_text('shopping list')
    draw(folder/'cut.jpg', RED, size=(400, 300))
    (folder/'cut.jpg').write_bytes((folder/'cut.jpg').read_bytes()[:9000])
    (folder/'red'/'empty.png').touch()
    (folder/'notes.txt').write_text('no image')
    assert len(label(folder)) == len(whole)
    said = capsys.readouterr().out
    assert '3 of 63 images cannot be read and are left out: cut.jpg (' in said and 'red/empty.png (not an image' in said
    label(folder)
    assert '3 of 63' in capsys.readouterr().out, 'also if the embeddings are at hand'


def test_mistakes(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'there is no folder nowhere' in mistake('nowhere')
    Path('empty/.hidden').mkdir(parents=True)
    draw(Path('empty/.hidden/1.png'), RED)
    assert 'there is no image in empty' in mistake('empty')
    assert not Path('empty/lp_label').exists()
    Path('bad').mkdir()
    Path('bad/1.jpg').write_text('text')
    assert 'at least 2 images that can be read, got 0' in mistake('bad')
    assert 'is a file, expected a folder' in mistake('bad/1.jpg')
    for i in range(3): draw(Path(f'photos/{i}.png'), RED, i)
    assert "did you mean 'resnet18'" in mistake('photos', arch='resnet81')
    assert 'size must be' in mistake('photos', size=0)
    assert 'there is no file of weights no.pth' in mistake('photos', weights='no.pth')
    assert 'is damaged, or no file of weights' in mistake('photos', weights='bad/1.jpg')
    torch.save(dict(fc=torch.ones(1)), 'other.pth')
    assert 'do not fit the network resnet18' in mistake('photos', weights='other.pth')
    assert 'cannot write to the folder bad/1.jpg/out' in mistake('photos', out='bad/1.jpg/out')
    weights.write_bytes(b'half')
    assert 'is damaged' in mistake('photos')


@pytest.mark.parametrize('text, message', [
    ('', 'is empty'), ('item,label\n', 'has no labels'), ('0.png,cat\n', 'expected item and label'),
    ('item,label\n0.png,cat\n0.png,dog\n', "'cat' and 'dog'"), ('item,label\n0.png\n', 'line 2'),
    ('item,label\nx.png,cat\ny.png,dog\n', 'Is it the file of another folder?'), ('item,label,certainty\n0.png,cat,1\n', 'pseudo-labels')])
def test_mistakes_in_labels(tmp_path, text, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(Path('photos/0.png'), RED)
    Path('labels.csv').write_text(text)
    assert message in mistake('photos', labels='labels.csv')
    assert 'there is no file none.csv' in mistake('photos', labels='none.csv')
    assert [o.name for o in Path('photos').iterdir()] == ['0.png']


def test_program(tmp_path):
    "In a shell: help, one line for a mistake, no traceback"
    (tmp_path/'program.py').write_text('from fastai_lp.folder.commands import lp_label\nlp_label()\n')
    def run(*args):
        command = [sys.executable, '-W', 'ignore', 'program.py', *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    res = run('--help')
    assert res.returncode == 0 and '--labels' in res.stdout and 'Label a folder of images in rounds' in res.stdout
    res = run('nowhere')
    assert res.returncode == 1 and res.stderr.strip() == 'there is no folder nowhere'


# In a browser

@pytest.mark.browser
def test_from_no_labels_to_pseudo_labels(folder, weights, visit, tmp_path):
    "A person types the classes of the suggested images"
    label(folder, unlabeled='*')
    tab = visit((folder/'lp_label'/'label.html').resolve())
    for i in range(5):
        add_class(tab, color(folder/tab.locator('#name').text_content()))
    df = label(folder, unlabeled='*', labels=str(downloaded(tab, tmp_path)))
    assert df.labeled.sum() == 5
    assert (df.label == [color(folder/o) for o in df.index]).mean() > .95
