"Image sets: readers, and which labels are shown."
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastai_lp.experiments import datasets
from fastai_lp.experiments.datasets import ImageArrays, cifar10, cifar100, imagewang, mini_imagenet, show_labels

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
    monkeypatch.setattr(os, 'replace', refuse)
    assert len(cifar10(tmp_path).images) == 12 and not (tmp_path/'decoded-32x32.npz').exists()
    assert not list(tmp_path.glob('*.tmp'))


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
    assert d.vocab == list('0123')
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


@pytest.mark.skipif(not (shared/'cifar10_jpeg.npz').exists(), reason='CIFAR-10 is not beside the repository')
def test_the_papers_splits_of_cifar10(tmp_path):
    d = cifar10(shared/'cifar10_jpeg.npz', cache=tmp_path)
    assert d.images.shape == (60000, 3, 32, 32) and len(d.train) == 50000 and d.vocab[d.truth[0]] == 'frog'
    for n in (500, 1000, 2000, 4000):
        for split in (10, 19):
            shown = show_labels(d, n, file=shared/'cifar10_splits.npz', split=split).shown
            assert np.bincount(shown[shown >= 0]).tolist() == [n//10]*10
