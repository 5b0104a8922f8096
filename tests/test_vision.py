"The promise of the README: a folder of JPEG images, `vision_learner`, one more argument."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.schedule import *
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.learner import vision_learner
from PIL import Image
from torchvision.models import resnet18

import fastai_lp.learner.callback
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import targets_of
from fastai_lp.learner.streams import TwoStream
from fastai_lp.learner.images import SemiImageDataLoaders

CIFAR = Path(__file__).resolve().parents[2]/'shared'/'data'/'cifar10_jpeg.npz'
CLASSES = ['airplane', 'frog', 'ship']


def cifar_files():
    "(class name, JPEG bytes) of a few classes"
    with np.load(CIFAR) as f:
        jpeg, at, labels = (f[f'train_{o}'] for o in ('jpeg', 'offsets', 'labels'))
        classes = [str(c) for c in f['classes']]
    for i in range(2000):
        if classes[labels[i]] in CLASSES: yield classes[labels[i]], jpeg[at[i]:at[i+1]].tobytes()


def made_up_files():
    "Stripes of three directions"
    import io
    rng = np.random.default_rng(0)
    i, j = np.mgrid[:32, :32]
    for n in range(600):
        c = n % 3
        wave = np.sin((i, j, i+j)[c]*rng.uniform(.7, .9) + rng.uniform(0, 6))
        a = (128 + 70*wave[..., None]*rng.uniform(.3, 1, 3) + rng.normal(0, 25, (32, 32, 3))).clip(0, 255).astype('uint8')
        out = io.BytesIO()
        Image.fromarray(a).save(out, 'jpeg')
        yield CLASSES[c], out.getvalue()


@pytest.fixture(scope='module', params=['cifar', 'made up'])
def folder(request, tmp_path_factory):
    if request.param == 'cifar' and not CIFAR.exists(): pytest.skip(f'{CIFAR} is not here')
    root, count = tmp_path_factory.mktemp('images'), dict.fromkeys(CLASSES, 0)
    for name, data in cifar_files() if request.param == 'cifar' else made_up_files():
        n = count[name]
        where = f'train/{name}' if n < 8 else f'valid/{name}' if n < 20 else 'unsup' if n < 60 else None
        if where:
            (root/where).mkdir(parents=True, exist_ok=True)
            (root/where/f'{name}{n}.jpg').write_bytes(data)
        count[name] += 1
    return root


@pytest.fixture
def graphs(monkeypatch):
    calls, real = [], fastai_lp.learner.callback.extract_features
    monkeypatch.setattr(fastai_lp.learner.callback, 'extract_features', lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_imagewang_layout(tmp_path):
    "fastai's Image网: the validation set has some of the classes, `unsup` has no folders, and no name tells a class"
    for n, (name, data) in zip(range(36), made_up_files()):
        where = 'unsup' if n >= 24 else f'val/{name}' if n >= 12 and name != CLASSES[2] else f'train/{name}'
        (tmp_path/where).mkdir(parents=True, exist_ok=True)
        (tmp_path/where/f'{n:03}.jpg').write_bytes(data)
    dls = SemiImageDataLoaders.from_folder(tmp_path, valid='val', item_tfms=Resize(32), bs=8, num_workers=0, device='cpu')
    assert list(dls.vocab) == CLASSES and {dls.vocab[i] for i in targets_of(dls.valid)} == set(CLASSES[:2])
    assert (dls.train.targets < 0).sum() == 12 and len(dls.train_ds) == 28 and len(dls.valid_ds) == 8


@pytest.mark.parametrize('workers', [0, 2])
def test_folder_to_exported_model(folder, workers, graphs, tmp_path):
    set_seed(0, reproducible=True)
    dls = SemiImageDataLoaders.from_folder(folder, unlabeled='unsup', item_tfms=Resize(32), batch_tfms=aug_transforms(size=32),
        bs=16, num_workers=workers, device='cpu')
    assert isinstance(dls.train, TwoStream) and (dls.train.targets < 0).sum() == 120 and (targets_of(dls.valid) >= 0).all()
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    learn.path = tmp_path
    loss = learn.loss_func
    with learn.no_bar(): learn.fit_one_cycle(2, cbs=LPCallback())
    assert len(graphs) == 2 and learn.loss_func is loss
    p = learn.lp_record.pseudo
    assert p.labels.shape == (144,) and (p.labels >= 0).all() and torch.isfinite(p.weights).all()
    assert p.Z.shape == (144, 3) and p.labeled.sum() == 24

    img = folder/'valid'/'frog'/sorted(os.listdir(folder/'valid'/'frog'))[0]
    name, i, probs = learn.predict(img)
    assert name == CLASSES[int(i)] and abs(float(probs.sum())-1) < 1e-5
    preds, targs = learn.get_preds()
    assert preds.shape == (36, 3) and (targs >= 0).all()
    value = learn.validate()
    assert len(value) == 2
    assert abs((preds.argmax(1) == targs).float().mean().item() - value[1]) < 1e-6
    learn.show_results(max_n=4)
    dls.show_batch(max_n=4)
    learn.export('export.pkl')
    loaded = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(loaded.predict(img)[2], probs, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


def test_load_learner_in_a_fresh_process(folder, tmp_path):
    dls = SemiImageDataLoaders.from_folder(folder, item_tfms=Resize(32), bs=16, num_workers=0, device='cpu')
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=LPCallback(warmup=1))
    with learn.no_bar(): learn.fit_one_cycle(2)
    learn.export(tmp_path/'export.pkl')
    img = folder/'valid'/'ship'/sorted(os.listdir(folder/'valid'/'ship'))[0]
    with learn.no_bar(): here = learn.predict(img)[2]
    code = f"from fastai.learner import load_learner; print(load_learner({str(tmp_path/'export.pkl')!r}).predict({str(img)!r})[2].tolist())"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(out.strip().splitlines()[-1])), here, rtol=1e-4, atol=1e-5)


def test_fine_tune(folder):
    dls = SemiImageDataLoaders.from_folder(folder, item_tfms=Resize(32), bs=16, labeled_bs=4, num_workers=0, device='cpu')
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    cb = LPCallback(warmup=1)
    with learn.no_bar(): learn.fine_tune(1, freeze_epochs=2, cbs=cb)
    assert [h['epoch'] for h in cb.record.history] == [1, 2]
