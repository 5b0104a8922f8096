"A cache of decoded images changes nothing but the time: same weights, same pseudo-labels, whatever happens to it."
import errno
import mmap
import os
import pickle
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_basics import DisplayedTransform
from fastai.torch_core import set_seed
from fastai.vision.augment import RandTransform, Resize, aug_transforms
from fastai.vision.core import PILImage
from PIL import Image
from torch import nn

from fastai_lp.learner.cache import ItemCache
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.streams import semi_dls
from fastai_lp.utils import store
from fastai_lp.utils.store import Store


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    "36 JPEG images: 12 labeled, 24 unlabeled, of different sizes"
    res, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(36):
        folder = res/(f'train/{i % 3}' if i < 12 else 'unsup')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (240, 300+i, 3), dtype=np.uint8)).save(folder/f'{i:02d}.jpg', quality=95)
    return res


def loaders(path, workers=0, tfms=None, **kwargs):
    set_seed(0)
    return SemiImageDataLoaders.from_folder(path, valid_pct=.25, seed=0, item_tfms=[Resize(24), *(tfms or [])], bs=8, num_workers=workers,
        batch_tfms=aug_transforms(max_warp=0), **kwargs)


def fit(dls, cb, epochs=3, cbs=()):
    set_seed(0, reproducible=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, dls.c))
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, cbs=[cb, *cbs])
    return learn


def same(a, b):
    for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(p, q)
    assert torch.equal(a.lp_record.pseudo.labels, b.lp_record.pseudo.labels)
    assert torch.equal(a.lp_record.pseudo.weights, b.lp_record.pseudo.weights)
    return True


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('settings', [{}, dict(warmup=1, every=2), 'strong'], ids=str)
def test_same_to_the_bit(path, workers, settings):
    make = LPCallback.strong if settings == 'strong' else LPCallback
    settings = {} if settings == 'strong' else settings
    plain, kept = fit(loaders(path, workers), make(**settings, cache=0)), fit(loaders(path, workers), cb := make(**settings))
    assert same(plain, kept)
    assert plain.lp_record.history[-1]['cached'] == dict(images=0, inputs=0, bytes=0)
    n = len(kept.dls.train_ds)
    assert cb.cache.kept['inputs'] == n and n//2 < cb.cache.kept['images'] <= n


class Opened:
    "Counts its calls"
    def __init__(self, f): self.f, self.n = f, 0
    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.f(*args, **kwargs)


class Count(Callback):
    "Counts the files that are opened in each epoch, for features and training"
    order = -50
    def __init__(self, opened): self.opened, self.found = opened, []
    def before_epoch(self): self.found.append(-self.opened.n)
    def after_train(self): self.found[-1] += self.opened.n


def test_images_are_decoded_once(path, monkeypatch):
    dls = loaders(path)
    monkeypatch.setattr(Image, 'open', opened := Opened(Image.open))
    fit(dls, LPCallback(), cbs=[count := Count(opened)])
    n, sample = len(dls.train_ds), min(32, len(dls.train_ds))
    assert count.found[0] <= 2*n + 6*sample  # the sample is made three times with and three times without augmentation
    assert count.found[1:] == [0, 0]
    fit(dls, LPCallback(cache=0), cbs=[count := Count(opened)])
    assert min(count.found) >= 2*n


class Noise(DisplayedTransform):
    "Random numbers of its own, as albumentations has"
    order, split_idx = 1, None
    def __init__(self): self.rng = np.random.default_rng(0)
    def encodes(self, x:PILImage): return PILImage.create(np.asarray(x) + self.rng.integers(0, 2, dtype=np.uint8))


class Rare(RandTransform):
    order, split_idx = 1, None
    def encodes(self, x:PILImage): return PILImage.create(255-np.asarray(x))


@pytest.mark.parametrize('tfm', [Noise, partial(Rare, p=.3)], ids=['own', 'rare'])
def test_random_inputs_are_made_again(path, tfm):
    cb = LPCallback()
    fit(loaders(path, tfms=[tfm()]), cb)
    assert cb.cache.kept['inputs'] == 0 and cb.cache.kept['images'] > 0


class Files(torch.utils.data.Dataset):
    "Of torch, with augmentation inside"
    def __init__(self, items, y, draw): self.items, self.y, self.draw = items, y, draw
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        x = torch.from_numpy(np.array(Image.open(self.items[i]).resize((24, 24)))).permute(2, 0, 1)/255
        return x*(1+.1*self.draw()), int(self.y[i])


@pytest.mark.parametrize('draw, kept', [(random.random, 0), (lambda: torch.rand(()).item(), 0), (np.random.default_rng(0).random, 0),
    (lambda: .5, 36)], ids=['python', 'torch', 'own', 'fixed'])
def test_datasets_of_torch(path, draw, kept):
    items = sorted(path.rglob('*.jpg'))
    y = [int(o.parent.name) if o.parent.name != 'unsup' else -100 for o in items]
    def make():
        dls = DataLoaders.from_dsets(Files(items, y, draw), Files(items[:12], y[:12], draw), bs=8, num_workers=0)
        dls.c = 3
        return semi_dls(dls)
    cb = LPCallback()
    learn = fit(make(), cb)
    assert cb.cache.kept['inputs'] == kept
    if kept: assert same(learn, fit(make(), LPCallback(cache=0)))


def test_labeled_images_come_first(path):
    dls = loaders(path)
    labeled = dls.train.targets >= 0
    cb = LPCallback(cache=int(240*340*3*(labeled.sum()+2)))
    learn = fit(dls, cb)
    there = cb.cache.store.there[:len(labeled)]
    assert there[labeled].all() and there[~labeled].sum() < 5
    assert cb.cache.kept['bytes'] <= cb.cache.store.max_bytes
    assert same(learn, fit(loaders(path), LPCallback(cache=0)))


@pytest.mark.parametrize('folder, where, number', [('on disk', 'reserve', errno.ENOSPC), (None, 'mmap', errno.ENOMEM)],
    ids=['disk', 'memory'])
def test_a_full_disk_or_memory(path, monkeypatch, tmp_path, folder, where, number):
    def full(*args): raise OSError(number, os.strerror(number))
    make = mmap.mmap
    if where == 'reserve': monkeypatch.setattr(store, 'reserve', full)
    else: monkeypatch.setattr(store.mmap, 'mmap', lambda file, size: make(file, size) if size < 10_000 else full())
    cb = LPCallback(cache=ItemCache(folder=folder and tmp_path))
    with pytest.warns(UserWarning, match=f'decoded images are not kept.*{os.strerror(number)}'): learn = fit(loaders(path), cb)
    monkeypatch.undo()
    assert same(learn, fit(loaders(path), LPCallback(cache=0)))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_is_not_left_behind(path, tmp_path, workers):
    cb = LPCallback(cache=ItemCache(folder=tmp_path))
    learn = fit(loaders(path, workers), cb)
    assert cb.cache.kept['images'] and not list(tmp_path.iterdir())
    assert same(learn, fit(loaders(path, workers), LPCallback(cache=0)))


def test_a_worker_killed_with_the_lock():
    lone = Store(3, 100)
    if not (pid := os.fork()):
        lone.used.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not lone.put(0, b'a') and lone.get(0) is None


class AtBatch(Callback):
    "Calls a function in the second epoch"
    def __init__(self, f): self.f = f
    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 0: self.f()


def kill_workers():
    for p in torch.multiprocessing.active_children(): os.kill(p.pid, signal.SIGKILL)


def ctrl_c(): raise KeyboardInterrupt


@pytest.mark.parametrize('workers, f, error', [(2, kill_workers, (RuntimeError, OSError)), (0, ctrl_c, KeyboardInterrupt),
    (2, ctrl_c, KeyboardInterrupt)])
def test_a_fit_ends_cleanly(path, tmp_path, workers, f, error):
    "After a killed worker or Ctrl-C, the next fit goes on with what has been kept"
    found = []
    for cache in ItemCache(folder=tmp_path), 0:
        dls, cb = loaders(path, workers), LPCallback(cache=cache)
        with pytest.raises(error): fit(dls, cb, cbs=[AtBatch(f)])
        assert not {'create_item', 'do_item', 'new', 'get_idxs'} & vars(dls.train).keys()
        before = cb.cache.store
        found.append(fit(dls, cb))
        assert cb.cache.store is before
    assert same(*found)
    assert not list(tmp_path.iterdir())


class Others(Callback):
    "Makes a DataLoader for other data in each batch"
    def __init__(self): self.found = []
    def before_batch(self):
        if self.training: self.found.append(self.learn.dls.train.new(self.learn.dls.valid_ds, shuffle=False, bs=3))


def test_other_data_within_an_epoch(path):
    learn = fit(loaders(path), LPCallback(), cbs=[others := Others()])
    assert others.found
    expected = learn.dls.train.new(learn.dls.valid_ds, shuffle=False, bs=3).one_batch()[1]
    for dl in others.found: assert torch.equal(dl.one_batch()[1], expected)


def test_copies_do_not_take_the_images_along(path, tmp_path):
    cb = LPCallback()
    learn = fit(loaders(path), cb)
    assert len(pickle.dumps(cb.cache)) < 500
    assert pickle.loads(pickle.dumps(cb.cache)).kept == dict(images=0, inputs=0, bytes=0)
    learn.add_cb(cb)
    learn.export(tmp_path/'model.pkl')
    assert (tmp_path/'model.pkl').stat().st_size < 2e5


def test_new_labels_and_new_data(path):
    cb = LPCallback()
    fit(loaders(path), cb)
    first = cb.cache.store
    fit(loaders(path), cb)
    assert cb.cache.store is not first
