"Image sets: readers, which labels are shown, and batches that are rows of one tensor."
import io
import tempfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage
from PIL import Image
from torch import nn

from fastai_lp import datasets
from fastai_lp.callback import LPCallback
from fastai_lp.data import TwoStream, targets_of
from fastai_lp.datasets import (BatchAugment, ImageArrays, ImageTable, ImageTableDL, augmentations, cifar10, cifar100, digits, image_dls, imagewang,
                                mini_imagenet, show_labels)
from fastai_lp.features import extract_features
from fastai_lp.interpret import LPInterpretation

shared = Path(__file__).resolve().parents[2]/'shared'/'data'


def noise(n, h=32, w=32, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def write(root, images, where):
    for i, o in enumerate(images):
        file = Path(root)/where(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(o).save(file)


def as_tensor(images): return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


def jpeg(o):
    Image.fromarray(o).save(f := io.BytesIO(), 'jpeg')
    return np.frombuffer(f.getvalue(), dtype=np.uint8)


# Readers

def test_cifar10_from_folders(tmp_path):
    x = noise(36)
    write(tmp_path, x, lambda i: f"{'train' if i < 24 else 'test'}/{'cat dog'.split()[i//2 % 2]}/{i}_x.png")
    d = cifar10(tmp_path)
    assert d.vocab == ['cat', 'dog'] and d.n_classes == 2
    assert torch.equal(d.images, as_tensor(x))                     # 9 before 10, in whatever folder
    assert d.truth.tolist() == [i//2 % 2 for i in range(36)] and d.names[11] == '11_x.png'
    assert d.train.tolist() == list(range(24)) and d.test.tolist() == list(range(24, 36))
    assert (d.shown == d.truth[:24]).all() and torch.equal(d.train_truth, torch.as_tensor(d.truth[:24]))
    assert d.mean == (.4914, .4822, .4465) and d.augment == 'cifar' and '24 training items, 24 labeled; 12 test' in repr(d)


def test_names_of_folders_do_not_decide_the_order(tmp_path):
    x = noise(12)
    for name, classes in (('a', 'ab'), ('b', 'ba')): write(tmp_path/name, x, lambda i: f"{'train' if i < 8 else 'test'}/{classes[i % 2]}/pic{i:02}.png")
    assert torch.equal(cifar10(tmp_path/'a').images, cifar10(tmp_path/'b').images)


def test_cifar100_has_superclasses(tmp_path):
    x = noise(16)
    write(tmp_path, x, lambda i: f"{'train' if i < 8 else 'test'}/{'sea land'.split()[i % 2]}/{'seal cow ray ant'.split()[i % 4]}/{i}.png")
    d = cifar100(tmp_path, cache=False)
    assert d.vocab == ['ant', 'cow', 'ray', 'seal'] and d.truth[:4].tolist() == [3, 1, 2, 0]
    assert not list(tmp_path.glob('*.npz'))


@pytest.fixture
def encoded(tmp_path):
    x, y = noise(50), np.arange(50) % 5
    files, at = [jpeg(o) for o in x], lambda o: np.cumsum([0] + [len(f) for f in o])
    arrays = dict(classes=np.array(list('vwxyz')), **{f'{name}_{k}': v for name, part in (('train', slice(0, 40)), ('test', slice(40, 50)))
                  for k, v in dict(jpeg=np.concatenate(files[part]), offsets=at(files[part]), labels=y[part].astype(np.uint8)).items()})
    np.savez(tmp_path/'set.npz', **arrays)
    return tmp_path/'set.npz', torch.stack([torch.tensor(np.array(Image.open(io.BytesIO(f.tobytes())))).permute(2, 0, 1) for f in files]), arrays


def test_an_npz_of_jpeg_bytes(encoded, tmp_path):
    file, x, arrays = encoded
    d = cifar10(file)
    assert torch.equal(d.images, x) and d.vocab == list('vwxyz') and (d.truth == np.arange(50) % 5).all() and d.names[41] == '1'
    arrays['train_names'] = np.array([f'{i}.jpg' for i in range(40)])
    np.savez(tmp_path/'named.npz', **arrays)
    assert cifar100(tmp_path/'named.npz').names[3] == '3.jpg'
    del arrays['test_offsets']
    np.savez(tmp_path/'less.npz', **arrays)
    with pytest.raises(ValueError, match='CIFAR-10: .*less.npz has no test_offsets'): cifar10(tmp_path/'less.npz')
    with pytest.raises(FileNotFoundError, match='there is no file .*no.npz'): cifar10(tmp_path/'no.npz')


def test_decoded_once(tmp_path, monkeypatch):
    x, calls, decode = noise(12), [], datasets._pictures
    write(tmp_path, x, lambda i: f"{'train' if i < 8 else 'test'}/{i % 2}/{i}.png")
    monkeypatch.setattr(datasets, '_pictures', lambda *a: calls.append(len(a[0])) or decode(*a))
    few = cifar10(tmp_path, n_train=4, n_test=2)
    assert calls == [6] and not (tmp_path/'decoded-32x32.npz').exists()            # a part is decoded alone, and not kept
    for _ in range(2): assert torch.equal(cifar10(tmp_path).images, as_tensor(x))
    assert calls == [6, 12] and np.load(tmp_path/'decoded-32x32.npz', allow_pickle=False)['images'].shape == (12, 3, 32, 32)
    assert torch.equal(cifar10(tmp_path, n_train=4, n_test=2).images, few.images) and len(calls) == 2
    Image.fromarray(255-x[0]).save(tmp_path/'train/0/0.png')
    assert torch.equal(cifar10(tmp_path).images[0], as_tensor(255-x[:1])[0]) and calls[-1] == 12
    (tmp_path/'decoded-32x32.npz').write_bytes(b'PK broken')
    assert len(cifar10(tmp_path, cache=tmp_path/'new').images) == 12 and (tmp_path/'new'/'decoded-32x32.npz').exists()
    assert len(cifar10(tmp_path).images) == 12 and len(calls) == 5
    (tmp_path/'decoded-32x32.npz').unlink()
    def refuse(*args, **kwargs): raise PermissionError('read-only')
    monkeypatch.setattr(tempfile, 'mkstemp', refuse)
    assert len(cifar10(tmp_path).images) == 12 and not (tmp_path/'decoded-32x32.npz').exists()
    assert not list(tmp_path.glob('*.part'))


def test_a_part_of_a_set(encoded):
    file, x, _ = encoded
    d, again, other = (cifar10(file, n_train=12, n_test=5, seed=seed) for seed in (1, 1, 2))
    assert np.bincount(d.truth[d.train]).tolist() == [3, 3, 2, 2, 2] and np.bincount(d.truth[d.test]).tolist() == [1]*5
    assert (d.ids == again.ids).all() and (d.ids != other.ids).any() and (np.diff(d.ids) > 0).all()
    assert torch.equal(d.images[d.train], x[d.ids])
    with pytest.raises(ValueError, match=r"n_test=15 takes 3 images of class 'v', which has 2"): cifar10(file, n_test=15)


def test_downloads(tmp_path, monkeypatch):
    write(tmp_path, noise(8), lambda i: f"{'train' if i < 4 else 'test'}/{i % 2}/{i}.png")
    asked = []
    monkeypatch.setattr(datasets, 'untar_data', lambda url: asked.append(url) or tmp_path)
    assert len(cifar10().images) == len(cifar100().images) == 8
    assert [o.rsplit('/', 1)[1] for o in asked] == ['cifar10.tgz', 'cifar100.tgz']
    def offline(url): raise OSError('no route')
    monkeypatch.setattr(datasets, 'untar_data', offline)
    with pytest.raises(FileNotFoundError, match=r'Image网 could not be downloaded from .*no route.*pass path='): imagewang()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match='CIFAR-10: no images in .*train, .*Pass the folder that has train/ and test/'): cifar10(tmp_path)
    write(tmp_path, noise(4), lambda i: f'train/{i % 2}/{i}.png')
    with pytest.raises(FileNotFoundError, match='no images in .*test'): cifar10(tmp_path)
    write(tmp_path, noise(3), lambda i: f'test/{i}/{i}.png')
    with pytest.raises(ValueError, match="class '2' of the test images has no training image"): cifar10(tmp_path)
    (tmp_path/'test'/'2'/'2.png').rename(tmp_path/'test'/'2.png')
    with pytest.raises(ValueError, match='2.png is in no class folder'): cifar10(tmp_path)
    (tmp_path/'test'/'2.png').unlink()
    (tmp_path/'train'/'0'/'0.png').write_text('no picture')
    with pytest.raises(ValueError, match='0.png: no image that Pillow can read'): cifar10(tmp_path)


def test_mini_imagenet(tmp_path):
    x = noise(30, 84, 84)
    write(tmp_path/'a', x, lambda i: f'images/n{i % 3}/n{i % 3}_{i:03}.png')
    d = mini_imagenet(tmp_path/'a', per_class=(6, 3))
    assert d.images.shape == (27, 3, 84, 84) and d.augment == 'mini_imagenet' and abs(d.mean[0]*255-120.4) < 1e-6
    for c in range(3):                                             # first 6 and last 3 of 10 files per class
        numbers = [[int(d.names[i][3:6]) for i in part if d.truth[i] == c] for part in (d.train, d.test)]
        assert numbers == [[c+3*k for k in range(6)], [c+3*k for k in range(7, 10)]]
    for i, name in enumerate(d.names): assert torch.equal(d.images[i], as_tensor(x[int(name[3:6])][None])[0])
    with pytest.raises(ValueError, match=r"class 'n0' has 10 images in .*n0, expected 500 \+ 100"): mini_imagenet(tmp_path/'a')
    write(tmp_path/'b', x, lambda i: f"{'test' if i < 6 else 'train'}/n{i % 3}/{i:03}.png")
    d = mini_imagenet(tmp_path/'b')
    assert len(d.train) == 24 and [d.names[i] for i in d.test] == [f'{i:03}.png' for i in range(6)]
    with pytest.raises(FileNotFoundError, match='mini-ImageNet: no images in .*one folder per class'): mini_imagenet(tmp_path/'c')


def test_resizing(tmp_path):
    x = np.zeros((8, 84, 168, 3), dtype=np.uint8)
    x[:, :, :42], x[:, :, -42:] = 255, 255                         # white sides that a crop cuts off
    write(tmp_path, x, lambda i: f'{i % 2}/{i}.png')
    squeezed, cropped = (mini_imagenet(tmp_path, per_class=(2, 2), crop=crop).images for crop in (False, True))
    assert squeezed.shape == cropped.shape == (8, 3, 84, 84)
    assert cropped.max() == 0 and squeezed[:, :, :, :15].min() == 255 and squeezed[:, :, :, 30:50].max() == 0


def test_imagewang(tmp_path):
    x = noise(40, 30, 50)
    write(tmp_path, x, lambda i: f'train/{i % 4}/{i}.png' if i < 16 else f'val/{i % 2}/{i}.png' if i < 24 else f'unsup/{i}.png')
    d = imagewang(tmp_path, size=20)
    assert d.images.shape == (40, 3, 20, 20) and (len(d.train), len(d.test), d.n_classes) == (32, 8, 4)
    assert (d.shown == d.truth[d.train]).all() and (d.shown[:16] >= 0).all() and (d.shown[16:] == -1).all()
    flat = d.images[d.train].double().transpose(0, 1).flatten(1)/255
    assert np.allclose(d.mean, flat.mean(1)) and np.allclose(d.std, flat.std(1, correction=0))
    few = imagewang(tmp_path, n_train=8, n_unlabeled=5, n_test=2, size=20)
    assert (len(few.train), (few.shown >= 0).sum(), len(few.test)) == (13, 8, 2)
    dls = image_dls(d, bs=8, augment='cifar', device='cpu')
    assert len(dls.train) == 4 and dls.vocab == list('0123')
    again = show_labels(d, 8, seed=3)
    assert (again.shown >= 0).sum() == 8 and (again.shown[16:] == -1).all()
    with pytest.raises(ValueError, match='whose class nobody knows'): show_labels(d, idxs=[0, 1, 2, 3, 20])


# Which labels are shown

@pytest.fixture
def ten():
    y = np.arange(60) % 3
    return ImageArrays(as_tensor(noise(60)), y, np.arange(45), np.arange(45, 60), vocab=['cat', 'dog', 'eel'], names=[f'{i}.png' for i in range(60)])


def known(d): return np.flatnonzero(d.shown >= 0).tolist()


def test_drawn_labels(ten):
    a, b, c = (show_labels(ten, 6, seed=seed) for seed in (0, 0, 1))
    assert known(a) == known(b) != known(c) and np.bincount(a.shown[a.shown >= 0]).tolist() == [2]*3
    assert (a.shown[known(a)] == a.truth[known(a)]).all() and a.images is ten.images and (ten.shown >= 0).all()
    for n in (7, 0, 2):
        with pytest.raises(ValueError, match=f'n={n}: expected a multiple of 3'): show_labels(ten, n)
    with pytest.raises(ValueError, match='class 0 has 15 items: cannot keep 20'): show_labels(ten, 60)


def test_indices_and_their_files(ten, tmp_path):
    assert known(show_labels(ten, idxs=[44, 3, 1])) == [1, 3, 44]
    assert known(show_labels(ten, idxs=torch.tensor([0, 1, 2]))) == [0, 1, 2]
    np.savez(tmp_path/'s.npz', labels_3=np.array([[0, 1, 2], [5, 4, 3]], dtype=np.int32), labels_4=np.zeros((1, 4), dtype=int))
    assert known(show_labels(ten, 3, file=tmp_path/'s.npz', split=1)) == [3, 4, 5]
    for kwargs, match in ((dict(n=3, split=2), 'split=2: labels_3 of .* has rows 0 to 1'), (dict(n=5, split=0), 'no array labels_5, only labels_3, labels_4'),
                          (dict(n=4, split=0), 'index 0 comes twice'), (dict(n=3), 'expected n, or idxs'), (dict(split=1), 'expected n, or idxs')):
        with pytest.raises(ValueError, match=match): show_labels(ten, file=tmp_path/'s.npz', **kwargs)
    np.savez(tmp_path/'uneven.npz', labels_6=np.array([[0, 1, 2, 3, 6, 9]]))
    with pytest.warns(UserWarning, match='labels_6 of .* shows 1 to 4 labels of a class'): show_labels(ten, 6, file=tmp_path/'uneven.npz', split=0)
    for idxs, match in (([0, 1, 2, 2], 'index 2 comes twice'), ([0, 1, 45, 99], r'2 indices are not in the training set, first \[45, 99\]: it has 45 items, 0 to 44$'),
                        ([-1, 1, 2], r'first \[-1\]'), ([0, 1], "class 'eel' has no labeled item"), ([0], "class 'dog' has no labeled item, and 1 more"),
                        (np.ones(45, dtype=bool), 'np.flatnonzero'), ([[0, 1, 2]], 'expected int')):
        with pytest.raises(ValueError, match=match): show_labels(ten, idxs=idxs)
    for kwargs in ({}, dict(n=3, idxs=[0, 1, 2]), dict(idxs=[0], file='x.txt'), dict(n=3, split=1)):
        with pytest.raises(ValueError, match='expected n, or idxs, or the file'): show_labels(ten, **kwargs)
    with pytest.raises(FileNotFoundError, match='no file of splits'): show_labels(ten, 3, file='nowhere.npz', split=0)


def test_indices_count_in_the_whole_set(encoded):
    d = cifar10(encoded[0], n_train=20)
    idxs = d.ids[[0, 5, *range(10, 20)]]
    assert known(show_labels(d, idxs=idxs)) == [0, 5, *range(10, 20)]
    left_out = sorted(set(range(40)) - set(d.ids))[0]
    with pytest.raises(ValueError, match=rf'first \[{left_out}\].* of which a part was read'): show_labels(d, idxs=[left_out])


def test_label_lists(ten, tmp_path):
    file = tmp_path/'00.txt'
    file.write_text('0.png cat\n4.png dog\n\n44.png eel\n')
    assert known(show_labels(ten, file=file)) == [0, 4, 44]
    for text, match in (('0.png cat\n1.png', 'line 2: expected NAME LABEL'), ('0.png cat\n0.png cat', "names '0.png' twice"), ('0.png cow', "'cow' is no class of this set, which has .*'cat'"),
                        ('50.png eel\n0.png cat', "names 1 images that are not in the training set, first '50.png'; it has names such as '0.png'"),
                        ('0.png cat\n1.png cat', "gives 1 images another class than the data, first '1.png': 'cat' rather than 'dog'"), ('0.png cat', "class 'dog' has no labeled item")):
        file.write_text(text)
        with pytest.raises(ValueError, match=match): show_labels(ten, file=file)
    ten.names[3] = '0.png'
    file.write_text('0.png cat')
    with pytest.raises(ValueError, match="'0.png' is the name of 2 training images"): show_labels(ten, file=file)
    with pytest.raises(FileNotFoundError, match='no label list'): show_labels(ten, file=tmp_path/'no.txt')


def test_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match='shown has 3 labels for 4 training items'): ImageArrays(as_tensor(noise(6)), np.arange(6), np.arange(4), np.arange(4, 6), shown=np.zeros(3))
    with pytest.raises(ValueError, match='digits have digits_dls'): image_dls(digits())


# Augmentation

def slowly(x, down, right, flip, shift, mode, angle=None):
    out = []
    for i, o in enumerate(x.permute(0, 2, 3, 1).numpy()):
        if angle is not None: o = np.asarray(Image.fromarray(o).rotate(float(angle[i]), Image.Resampling.NEAREST))
        o = np.pad(o, ((shift, shift), (shift, shift), (0, 0)), mode=mode)[shift+down[i]:, shift+right[i]:][:x.shape[2], :x.shape[3]]
        out.append(o[:, ::-1] if flip[i] else o)
    return as_tensor(np.stack(out))


@pytest.mark.parametrize('h, w', [(32, 32), (20, 33)])
@pytest.mark.parametrize('pad, mode', [('reflect', 'reflect'), ('zeros', 'constant')])
@pytest.mark.parametrize('shift', [0, 4, 19])
def test_shift_and_flip_equal_a_loop(h, w, pad, mode, shift):
    x, tfm = as_tensor(noise(300, h, w)), BatchAugment(shift, pad=pad)
    how = tfm.draw(len(x))
    assert {*how['down'].tolist()} == {*how['right'].tolist()} == {*range(-shift, shift+1)} and .35 < how['flip'].float().mean() < .65
    got = tfm.place(x, **how)
    assert got.dtype == torch.uint8 and torch.equal(got, slowly(x, how['down'], how['right'], how['flip'], shift, mode))
    set_seed(3); how = tfm.draw(len(x)); set_seed(3)
    assert torch.equal(tfm(TensorImage(x), split_idx=0), tfm.place(x, **how)) and len({*how['down'].tolist()}) == 2*shift+1


def test_rotation_equals_pillow():
    x, tfm = as_tensor(noise(100, 84, 84)), augmentations['mini_imagenet']
    how = tfm.draw(len(x))
    assert how['angle'].abs().max() <= 10 and how['angle'].std() > 4
    same = tfm.place(x, **how) == slowly(x, how['down'], how['right'], how['flip'], 8, 'constant', how['angle'])
    assert same.float().mean() > .999                              # but for pixels whose source lies between two
    quarter = BatchAugment(0, degrees=90, pad='zeros').place(x, *torch.zeros(2, 100, dtype=torch.int64), torch.zeros(100, dtype=torch.bool), torch.full((100,), 90.))
    assert torch.equal(quarter, x.rot90(1, (2, 3)))


def test_augmentation_of_floats_and_its_limits():
    x = torch.rand(8, 1, 8, 8)
    how = BatchAugment(2).draw(8)
    assert torch.equal(BatchAugment(2).place(x, **how).mul(255).byte(), BatchAugment(2).place(x.mul(255).byte(), **how))
    with pytest.raises(ValueError, match='shift=8: images of 8×8 pixels'): BatchAugment(8)(TensorImage(x), split_idx=0)
    with pytest.raises(ValueError, match="pad='wrap': expected 'reflect' or 'zeros'"): BatchAugment(pad='wrap')


# Batches

def numbered(n=200, n_test=30, c=3, size=12, labels=12):
    "Images of one colour, which says their number"
    i = torch.arange(n+n_test)
    x = torch.stack([i % 16 * 16, i//16 * 16, i % c * 100], 1).to(torch.uint8)[:, :, None, None].expand(-1, -1, size, size).contiguous()
    return show_labels(ImageArrays(x, (i % c).numpy(), np.arange(n), np.arange(n, n+n_test), vocab=list('abc'), mean=(.5,)*3, std=(.25,)*3), labels)


def number_of(x): return (((x.as_subclass(torch.Tensor)*.25+.5)*255).round()[:, :2, 5, 5] @ torch.tensor([1/16, 1.])).long()
def plain(o): return o.as_subclass(torch.Tensor)


def small(c=3): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, c))


def test_images_and_labels_stay_together():
    d = numbered()
    set_seed(0)
    dls = image_dls(d, bs=20, labeled_bs=5, device='cpu')
    assert isinstance(dls.train, TwoStream) and isinstance(dls.train, ImageTableDL) and dls.c == 3 and list(dls.vocab) == list('abc')
    assert torch.equal(dls.train.targets, torch.tensor(d.shown)) and torch.equal(targets_of(dls.valid), torch.as_tensor(d.truth[d.test]))
    seen = []
    for x, y in dls.train:
        i = number_of(x)
        assert torch.equal(plain(y), torch.where(torch.tensor(d.shown)[i] < 0, -100, torch.tensor(d.shown)[i])) and (y[:5] >= 0).all() and (y[5:] < 0).all()
        seen += i[5:].tolist()
    assert len(seen) == len(set(seen)) == len(dls.train)*15 == 180
    for labeled_only in (image_dls(d, bs=20, labeled_only=True, device='cpu').train, image_dls(d, bs=5, labeled_only=True, device='cpu').train):
        batches = [(number_of(x), y) for x, y in labeled_only]
        assert [len(y) for _, y in batches] == ([12] if labeled_only.bs == 12 else [5, 5])
        for i, y in batches: assert torch.equal(plain(y), torch.as_tensor(d.shown)[i])


class Watch(Callback):
    "Compares the targets of every training batch with the pseudo-labels of the images in it"
    order, run_valid, batches = 60, False, 0
    def before_batch(self):
        p, i = self.learn.lp_record.pseudo, number_of(self.x)
        expected = torch.nn.functional.one_hot(p.labels[i].clamp(min=0), 3)*p.weights[i][:, None]*(p.labels[i] >= 0)[:, None]
        torch.testing.assert_close(self.y.as_subclass(torch.Tensor), expected)
        self.batches += 1


def test_label_propagation_trains_on_it(tmp_path):
    d = numbered()
    set_seed(0)
    dls = image_dls(d, bs=20, device='cpu')
    learn = Learner(dls, small(), metrics=accuracy, path=tmp_path, cbs=LPCallback(truth=d.train_truth))
    watch = Watch()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=watch)
    assert watch.batches == 2*len(dls.train) and len(learn.lp_record.history) == 2
    assert torch.equal(learn.lp_record.pseudo.labeled, torch.tensor(d.shown) >= 0)
    with learn.no_bar(), learn.no_logging():
        value, (preds, y) = learn.validate()[1], learn.get_preds()
        assert torch.equal(plain(y), torch.as_tensor(d.truth[d.test])) and abs((preds.argmax(1) == y).float().mean() - value) < 1e-6
        picture = Image.fromarray(d.images[205].permute(1, 2, 0).numpy()).resize((40, 40))
        for o in (205, d.images[205], picture, d.images[205].permute(1, 2, 0).numpy()):
            name, i, probs = learn.predict(o)
            torch.testing.assert_close(probs, preds[5])
            assert name == 'abc'[int(i)]
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == 30
        ClassificationInterpretation.from_learner(learn).plot_top_losses(4)
        learn.show_results(max_n=4)
        assert learn.tta(n=2)[0].shape == (30, 3)
    interp = LPInterpretation.from_learner(learn)
    assert interp.to_df()['item'].tolist() == list(range(200)) and interp.show_errors() is not None
    learn.export('export.pkl')
    loaded = load_learner(tmp_path/'export.pkl')
    with loaded.no_bar(): torch.testing.assert_close(loaded.predict(d.images[205])[2], preds[5])
    with pytest.raises(ValueError, match='image 205 is not among the 0 here'): loaded.predict(205)
    assert (tmp_path/'export.pkl').stat().st_size < d.images.numel()/2 and len(learn.dls.train.dataset) == 200


def test_descriptors_are_of_clean_images_and_training_is_augmented():
    d = numbered()
    d.images[:] = as_tensor(noise(230, 12, 12))
    dls = image_dls(d, bs=20, device='cpu')
    clean = (d.images/255-.5)/.25
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 3)))
    feats = extract_features(learn).feats
    torch.testing.assert_close(feats, torch.nn.functional.normalize(clean[:200].flatten(1)))
    passes = [torch.cat([x for x, _ in dls.valid]) for _ in range(2)]
    torch.testing.assert_close(plain(passes[0]), clean[200:])
    assert torch.equal(*passes)
    originals = {o.numpy().tobytes() for o in d.images[:200]}
    for augment, same in (('set', False), ('mini_imagenet', False), (aug_transforms(), False), (None, True)):
        x = torch.cat([x for x, _ in image_dls(d, bs=20, augment=augment, device='cpu').train])
        share = np.mean([np.round((o.numpy()*.25+.5)*255).astype(np.uint8).tobytes() in originals for o in x])
        assert share == 1 if same else share < .2
    with pytest.raises(ValueError, match=r"augment='cutout': expected one of \['cifar', 'mini_imagenet'"): image_dls(d, augment='cutout')


def test_two_views():
    d = numbered()
    dls = image_dls(d, bs=20, device='cpu')
    dls.train.two_views()
    for x, y in dls.train:
        assert len(x) == 40 and torch.equal(number_of(x[:20]), number_of(x[20:])) and torch.equal(y[:20], y[20:])
    d.images[:] = as_tensor(noise(230, 12, 12))
    x = next(iter(dls.train))[0]
    assert (x[:20] != x[20:]).flatten(1).any(1).float().mean() > .8                   # each view has its own draw


def test_seeds():
    def batches(seed):
        set_seed(seed)
        d = numbered(size=10)
        d.images[:] = as_tensor(noise(230, 10, 10))
        return [(x, y) for x, y in image_dls(d, bs=20, device='cpu').train]
    a, b, c = batches(1), batches(1), batches(2)
    assert all(torch.equal(p, q) for one, two in zip(a, b) for p, q in zip(one, two)) and not torch.equal(a[0][0], c[0][0])


def test_a_set_without_hidden_labels_and_copies_of_its_batches():
    d = numbered()
    full = ImageArrays(d.images, d.truth, d.train, d.test, vocab=d.vocab)
    with pytest.raises(ValueError, match='all 200 training items are labeled'): image_dls(full)
    assert len(image_dls(full, labeled_only=True, bs=50, device='cpu').train) == 4
    dls = image_dls(d, bs=20, device='cpu')
    assert dls.train_ds.images is dls.valid_ds.images is d.images                      # one copy on the device
    same = cloudpickle.loads(cloudpickle.dumps(dls.train))
    assert len(list(same)) == len(dls.train) and type(dls.train.new(shuffle=False)) is ImageTableDL
    assert dls.train.new(num_workers=4).fake_l.num_workers == 0 and dls.test_dl([d.images[0]]*3).one_batch()[0].shape == (3, 3, 12, 12)
    empty = dls.train_ds.new_empty()
    assert len(empty) == 0 and len(cloudpickle.dumps(empty)) < 20_000 and isinstance(empty, ImageTable)


@pytest.mark.skipif(not (shared/'cifar10_jpeg.npz').exists(), reason='CIFAR-10 is not beside the repository')
def test_the_papers_splits_of_cifar10(tmp_path):
    d = cifar10(shared/'cifar10_jpeg.npz', cache=tmp_path)
    assert d.images.shape == (60000, 3, 32, 32) and len(d.train) == 50000 and d.vocab[d.truth[0]] == 'frog'
    for n in (500, 1000, 2000, 4000):
        for split in (10, 19):
            shown = show_labels(d, n, file=shared/'cifar10_splits.npz', split=split).shown
            assert np.bincount(shown[shown >= 0]).tolist() == [n//10]*10
    dls = image_dls(show_labels(d, 500, file=shared/'cifar10_splits.npz', split=10), device='cpu')
    assert len(dls.train) == 990 and dls.train.labeled_bs == 50 and dls.one_batch()[0].shape == (100, 3, 32, 32)
    assert len(image_dls(show_labels(d, 500), labeled_only=True, device='cpu').train) == 5
    x = torch.cat([x for x, _ in dls.valid])
    assert abs(x.mean()) < .02 and abs(x.std()-1) < .02
