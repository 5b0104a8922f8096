"A folder of JPEG images, `vision_learner` and one more argument: what the README promises."
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle and fine_tune)
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.learner import vision_learner
from PIL import Image
from torchvision.models import resnet18

from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import targets_of
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.streams import TwoStream

CLASSES = ['airplane', 'frog', 'ship']


def stripes(n):
    "(class name, JPEG bytes) of images with stripes in three directions"
    rng = np.random.default_rng(0)
    i, j = np.mgrid[:32, :32]
    for k in range(n):
        wave = np.sin((i, j, i+j)[k % 3]*rng.uniform(.7, .9) + rng.uniform(0, 6))
        a = 128 + 70*wave[..., None]*rng.uniform(.3, 1, 3) + rng.normal(0, 25, (32, 32, 3))
        out = io.BytesIO()
        Image.fromarray(a.clip(0, 255).astype('uint8')).save(out, 'jpeg')
        yield CLASSES[k % 3], out.getvalue()


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Per class 8 images for training, 12 for validation and 40 unlabeled ones"
    root = tmp_path_factory.mktemp('images')
    for n, (name, data) in enumerate(stripes(180)):
        write(root/(f'train/{name}' if n < 24 else f'valid/{name}' if n < 60 else 'unsup')/f'{name}{n}.jpg', data)
    return root


def loaders(folder, **kwargs):
    kwargs = dict(bs=16, num_workers=0, device='cpu', item_tfms=Resize(32)) | kwargs
    return SemiImageDataLoaders.from_folder(folder, **kwargs)


class Counts(Extractor):
    "Counts its calls"
    calls = 0
    def __call__(self, learn, **kwargs):
        self.calls += 1
        return super().__call__(learn, **kwargs)


def test_imagewang_layout(tmp_path):
    "fastai's Image网: only some classes in validation, no folders in `unsup`, no class in a file name"
    for n, (name, data) in enumerate(stripes(36)):
        where = 'unsup' if n >= 24 else f'val/{name}' if n >= 12 and name != CLASSES[2] else f'train/{name}'
        write(tmp_path/where/f'{n:03}.jpg', data)
    dls = loaders(tmp_path, valid='val', bs=8)
    assert list(dls.vocab) == CLASSES
    assert {dls.vocab[i] for i in targets_of(dls.valid)} == set(CLASSES[:2])
    assert (len(dls.train_ds), (dls.train.targets < 0).sum(), len(dls.valid_ds)) == (28, 12, 8)


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_folder_to_exported_model(folder, workers, tmp_path):
    set_seed(0, reproducible=True)
    dls = loaders(folder, unlabeled='unsup', batch_tfms=aug_transforms(size=32), num_workers=workers)
    assert isinstance(dls.train, TwoStream)
    assert (dls.train.targets < 0).sum() == 120
    assert (targets_of(dls.valid) >= 0).all()
    learn, features = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy), Counts()
    learn.path, loss = tmp_path, learn.loss_func
    with learn.no_bar(): learn.fit_one_cycle(2, cbs=LPCallback(features=features))
    assert learn.loss_func is loss
    p = learn.lp_record.pseudo
    assert (len(p.labels), tuple(p.Z.shape), p.labeled.sum()) == (144, (144, 3), 24)
    assert (p.labels >= 0).all()
    assert torch.isfinite(p.weights).all()

    img = next((folder/'valid'/'frog').iterdir())
    name, i, probs = learn.predict(img)
    assert name == CLASSES[int(i)]
    preds, targs = learn.get_preds()
    assert (tuple(preds.shape), targs.min()) == ((36, 3), 0)
    assert learn.validate()[1] == pytest.approx((preds.argmax(1) == targs).float().mean().item())
    learn.show_results(max_n=4)
    dls.show_batch(max_n=4)
    learn.export('export.pkl')
    torch.testing.assert_close(load_learner(tmp_path/'export.pkl').predict(img)[2], probs, rtol=1e-4, atol=1e-5)
    assert features.calls == 2, 'features are extracted once per epoch of training, and at no other time'


@pytest.mark.slow
def test_load_learner_in_a_new_process(folder, tmp_path):
    learn = vision_learner(loaders(folder), resnet18, pretrained=False, cbs=LPCallback(warmup=1))
    with learn.no_bar(): learn.fit_one_cycle(2)
    learn.export(tmp_path/'export.pkl')
    img = str(next((folder/'valid'/'ship').iterdir()))
    with learn.no_bar(): here = learn.predict(img)[2]
    code = "import sys; from fastai.learner import load_learner; print(load_learner(sys.argv[1]).predict(sys.argv[2])[2].tolist())"
    command = [sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'export.pkl'), img]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(out.strip().splitlines()[-1])), here, rtol=1e-4, atol=1e-5)


def test_fine_tune(folder):
    learn = vision_learner(loaders(folder, labeled_bs=4), resnet18, pretrained=False, metrics=accuracy)
    cb = LPCallback(warmup=1)
    with learn.no_bar(): learn.fine_tune(1, freeze_epochs=2, cbs=cb)
    assert [h['epoch'] for h in cb.record.history] == [1, 2]
