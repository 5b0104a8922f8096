"Image sets: readers, the cache of decoded images, and which labels are shown."
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastai_lp.experiments import decode, readers
from fastai_lp.experiments.datasets import ImageArrays
from fastai_lp.experiments.readers import cifar10, cifar100, imagewang, mini_imagenet
from fastai_lp.experiments.splits import show_labels

DATA = Path(os.environ.get('FASTAI_LP_DATA', 'nowhere'))


def noise(n, h=32, w=32): return np.random.default_rng(0).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
def as_tensor(images): return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


def write(root, images, where):
    for i, o in enumerate(images):
        file = Path(root)/where(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(o).save(file)


# Readers

def test_cifar10_from_folders(tmp_path):
    "Numbers in the file names decide the order, whatever the folders"
    x = noise(36)
    write(tmp_path, x, lambda i: f"{'train' if i < 24 else 'test'}/{'cat dog'.split()[i//2 % 2]}/{i}_x.png")
    d = cifar10(tmp_path)
    assert d.vocab == ['cat', 'dog']
    assert torch.equal(d.images, as_tensor(x))
    assert d.truth.tolist() == [i//2 % 2 for i in range(36)]
    assert d.names[11] == '11_x.png'
    assert d.train.tolist() == list(range(24))
    assert d.test.tolist() == list(range(24, 36))
    assert (d.shown == d.truth[:24]).all()
    assert torch.equal(d.train_truth, torch.as_tensor(d.truth[:24]))
    assert d.mean == (.4914, .4822, .4465)
    assert d.augment == 'cifar'
    assert '24 training items, 24 labeled; 12 test' in repr(d)


def test_names_of_folders_do_not_decide_the_order(tmp_path):
    x = noise(12)
    for name, classes in (('a', 'ab'), ('b', 'ba')):
        write(tmp_path/name, x, lambda i: f"{'train' if i < 8 else 'test'}/{classes[i % 2]}/pic{i:02}.png")
    assert torch.equal(cifar10(tmp_path/'a').images, cifar10(tmp_path/'b').images)


def test_cifar100_has_superclasses(tmp_path):
    x, large, small = noise(16), 'sea land'.split(), 'seal cow ray ant'.split()
    write(tmp_path, x, lambda i: f"{'train' if i < 8 else 'test'}/{large[i % 2]}/{small[i % 4]}/{i}.png")
    d = cifar100(tmp_path, cache=False)
    assert d.vocab == ['ant', 'cow', 'ray', 'seal']
    assert d.truth[:4].tolist() == [3, 1, 2, 0]
    assert not list(tmp_path.glob('*.npz'))


@pytest.fixture
def encoded(tmp_path):
    "An .npz of JPEG bytes, its images, and its arrays"
    def jpeg(o):
        Image.fromarray(o).save(f := io.BytesIO(), 'jpeg')
        return np.frombuffer(f.getvalue(), dtype=np.uint8)
    y, files = np.arange(50) % 5, [jpeg(o) for o in noise(50)]
    arrays = dict(classes=np.array(list('vwxyz')))
    for name, part in (('train', slice(0, 40)), ('test', slice(40, 50))):
        offsets = np.cumsum([0] + [len(f) for f in files[part]])
        arrays |= {f'{name}_jpeg': np.concatenate(files[part]), f'{name}_offsets': offsets, f'{name}_labels': y[part].astype(np.uint8)}
    np.savez(tmp_path/'set.npz', **arrays)
    return tmp_path/'set.npz', as_tensor([np.array(Image.open(io.BytesIO(f.tobytes()))) for f in files]), arrays


def test_an_npz_of_jpeg_bytes(encoded, tmp_path):
    file, x, arrays = encoded
    d = cifar10(file)
    assert torch.equal(d.images, x)
    assert d.vocab == list('vwxyz')
    assert (d.truth == np.arange(50) % 5).all()
    assert d.names[41] == '1'
    arrays['train_names'] = np.array([f'{i}.jpg' for i in range(40)])
    np.savez(tmp_path/'named.npz', **arrays)
    assert cifar100(tmp_path/'named.npz').names[3] == '3.jpg'
    del arrays['test_offsets']
    np.savez(tmp_path/'less.npz', **arrays)
    with pytest.raises(ValueError, match='CIFAR-10: .*less.npz lacks the arrays test_offsets'): cifar10(tmp_path/'less.npz')
    with pytest.raises(FileNotFoundError, match='there is no file .*no.npz'): cifar10(tmp_path/'no.npz')


def test_a_part_of_a_set_is_balanced(encoded):
    file, x, _ = encoded
    d, again, other = (cifar10(file, n_train=12, n_test=5, seed=seed) for seed in (1, 1, 2))
    assert np.bincount(d.truth[d.train]).tolist() == [3, 3, 2, 2, 2]
    assert np.bincount(d.truth[d.test]).tolist() == [1]*5
    assert (d.ids == again.ids).all()
    assert (d.ids != other.ids).any()
    assert (np.diff(d.ids) > 0).all()
    assert torch.equal(d.images[d.train], x[d.ids])
    with pytest.raises(ValueError, match=r"n_test=15 needs 3 images of class 'v', which has 2"): cifar10(file, n_test=15)


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    "A folder of 12 images, and how many images each call decoded"
    write(tmp_path, noise(12), lambda i: f"{'train' if i < 8 else 'test'}/{i % 2}/{i}.png")
    calls, real = [], decode.decode_images
    monkeypatch.setattr(decode, 'decode_images', lambda *args: calls.append(len(args[0])) or real(*args))
    return tmp_path, calls


def test_images_are_decoded_once(decoded):
    path, calls = decoded
    few = cifar10(path, n_train=4, n_test=2)
    assert calls == [6]
    assert not (path/'decoded-32x32.npz').exists()
    for _ in range(2): assert torch.equal(cifar10(path).images, as_tensor(noise(12)))
    assert calls == [6, 12]
    assert torch.equal(cifar10(path, n_train=4, n_test=2).images, few.images)
    assert calls == [6, 12]


def test_changed_images_and_damaged_caches_are_decoded_again(decoded, monkeypatch):
    path, calls = decoded
    cache = path/'decoded-32x32.npz'
    cifar10(path)
    Image.fromarray(255-noise(1)[0]).save(path/'train/0/0.png')
    assert torch.equal(cifar10(path).images[0], as_tensor(255-noise(1))[0])
    cache.write_bytes(b'PK broken')
    assert len(cifar10(path).images) == 12
    assert calls == [12]*3
    cifar10(path, cache=path/'new')
    assert (path/'new'/cache.name).exists()
    cache.unlink()
    def refuse(*args, **kwargs): raise PermissionError('read-only')
    monkeypatch.setattr(os, 'replace', refuse)
    assert len(cifar10(path).images) == 12
    assert not cache.exists()
    assert not list(path.glob('*.tmp'))


def test_downloads(tmp_path, monkeypatch):
    write(tmp_path, noise(8), lambda i: f"{'train' if i < 4 else 'test'}/{i % 2}/{i}.png")
    asked = []
    monkeypatch.setattr(readers, 'untar_data', lambda url: asked.append(url) or tmp_path)
    assert len(cifar10().images) == len(cifar100().images) == 8
    assert [o.rsplit('/', 1)[1] for o in asked] == ['cifar10.tgz', 'cifar100.tgz']
    def offline(url): raise OSError('no route')
    monkeypatch.setattr(readers, 'untar_data', offline)
    with pytest.raises(FileNotFoundError, match=r'Image网 could not be downloaded from .*no route.*pass path='): imagewang()


def test_errors_of_class_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='CIFAR-10: expected class folders in .*train'): cifar10(tmp_path)
    write(tmp_path, noise(4), lambda i: f'train/{i % 2}/{i}.png')
    with pytest.raises(FileNotFoundError, match='expected class folders in .*test'): cifar10(tmp_path)
    write(tmp_path, noise(3), lambda i: f'test/{i}/{i}.png')
    with pytest.raises(ValueError, match="class '2' has test images but no training images"): cifar10(tmp_path)
    (tmp_path/'test'/'2'/'2.png').rename(tmp_path/'test'/'2.png')
    with pytest.raises(ValueError, match='2.png is not in a class folder'): cifar10(tmp_path)
    (tmp_path/'test'/'2.png').unlink()
    (tmp_path/'train'/'0'/'0.png').write_text('no picture')
    with pytest.raises(ValueError, match='0.png: Pillow cannot read this image'): cifar10(tmp_path)


def test_mini_imagenet(tmp_path):
    "The first 6 and the last 3 of 10 files per class, or a given split"
    x = noise(30, 84, 84)
    write(tmp_path/'a', x, lambda i: f'images/n{i % 3}/n{i % 3}_{i:03}.png')
    d = mini_imagenet(tmp_path/'a', per_class=(6, 3))
    assert d.images.shape == (27, 3, 84, 84)
    assert d.augment == 'mini_imagenet'
    assert d.mean[0]*255 == pytest.approx(120.4)
    for c in range(3):
        numbers = [[int(d.names[i][3:6]) for i in part if d.truth[i] == c] for part in (d.train, d.test)]
        assert numbers == [[c+3*k for k in range(6)], [c+3*k for k in range(7, 10)]]
    assert torch.equal(d.images, as_tensor(x[[int(name[3:6]) for name in d.names]]))
    with pytest.raises(ValueError, match=r"class 'n0' has 10 images in .*n0, expected 500 \+ 100"): mini_imagenet(tmp_path/'a')
    write(tmp_path/'b', x, lambda i: f"{'test' if i < 6 else 'train'}/n{i % 3}/{i:03}.png")
    d = mini_imagenet(tmp_path/'b')
    assert len(d.train) == 24
    assert [d.names[i] for i in d.test] == [f'{i:03}.png' for i in range(6)]


def test_images_are_squeezed_or_cropped(tmp_path):
    "White sides are cut off by a crop"
    x = np.zeros((8, 84, 168, 3), dtype=np.uint8)
    x[:, :, :42], x[:, :, -42:] = 255, 255
    write(tmp_path, x, lambda i: f'{i % 2}/{i}.png')
    squeezed, cropped = (mini_imagenet(tmp_path, per_class=(2, 2), crop=crop).images for crop in (False, True))
    assert squeezed.shape == cropped.shape == (8, 3, 84, 84)
    assert cropped.max() == 0
    assert squeezed[:, :, :, :15].min() == 255
    assert squeezed[:, :, :, 30:50].max() == 0


def test_imagewang(tmp_path):
    def where(i): return f'train/{i % 4}/{i}.png' if i < 16 else f'val/{i % 2}/{i}.png' if i < 24 else f'unsup/{i}.png'
    write(tmp_path, noise(40, 30, 50), where)
    d = imagewang(tmp_path, size=20)
    assert d.images.shape == (40, 3, 20, 20)
    assert (len(d.train), len(d.test), d.n_classes) == (32, 8, 4)
    assert (d.shown == d.truth[d.train]).all()
    assert (d.shown[:16] >= 0).all()
    assert (d.shown[16:] == -1).all()
    few = imagewang(tmp_path, n_train=8, n_unlabeled=5, n_test=2, size=20)
    assert (len(few.train), (few.shown >= 0).sum(), len(few.test)) == (13, 8, 2)
    again = show_labels(d, 8, seed=3)
    assert (again.shown >= 0).sum() == 8
    assert (again.shown[16:] == -1).all()
    with pytest.raises(ValueError, match='images of unknown class'): show_labels(d, idxs=[0, 1, 2, 3, 20])


# Which labels are shown

@pytest.fixture
def three():
    "45 training items of three classes, all labeled"
    names = [f'{i}.png' for i in range(60)]
    return ImageArrays(as_tensor(noise(60)), np.arange(60) % 3, np.arange(45), np.arange(45, 60), vocab=['cat', 'dog', 'eel'], names=names)


def labeled(d): return np.flatnonzero(d.shown >= 0).tolist()


def test_labels_are_drawn_with_a_seed(three):
    a, b, c = (show_labels(three, 6, seed=seed) for seed in (0, 0, 1))
    assert labeled(a) == labeled(b) != labeled(c)
    assert np.bincount(a.shown[a.shown >= 0]).tolist() == [2]*3
    assert (a.shown[labeled(a)] == a.truth[labeled(a)]).all()
    assert a.images is three.images
    assert (three.shown >= 0).all()
    for n in (7, 0, 2):
        with pytest.raises(ValueError, match=f'n must be a multiple of 3, .* got {n}'): show_labels(three, n)
    with pytest.raises(ValueError, match='class 0 has 15 items'): show_labels(three, 60)


def test_indices_of_the_labeled_items(three):
    assert labeled(show_labels(three, idxs=[44, 3, 1])) == [1, 3, 44]
    assert labeled(show_labels(three, idxs=torch.tensor([0, 1, 2]))) == [0, 1, 2]


@pytest.mark.parametrize('idxs, match', [([0, 1, 2, 2], 'index 2 occurs twice'), ([-1, 1, 2], r'first \[-1\]'),
    ([0, 1, 45, 99], r'2 indices are not in the training set, first \[45, 99\]: it has 45 items from 0 to 44$'),
    ([0, 1], "class 'eel' has no labeled item"), ([0], r"class 'dog' has no labeled item \(1 more"),
    (np.ones(45, dtype=bool), 'np.flatnonzero'), ([[0, 1, 2]], 'must be int')])
def test_indices_that_do_not_fit(three, idxs, match):
    with pytest.raises(ValueError, match=match): show_labels(three, idxs=idxs)


@pytest.fixture
def index_file(tmp_path):
    rows = dict(labels_3=np.array([[0, 1, 2], [5, 4, 3]], dtype=np.int32), labels_4=np.zeros((1, 4), dtype=int))
    np.savez(tmp_path/'splits.npz', **rows, labels_6=np.array([[0, 1, 2, 3, 6, 9]]))
    return tmp_path/'splits.npz'


def test_rows_of_an_index_file(three, index_file):
    assert labeled(show_labels(three, 3, file=index_file, split=1)) == [3, 4, 5]
    with pytest.warns(UserWarning, match='labels_6 of .* gives 1 to 4 labels'): show_labels(three, 6, file=index_file, split=0)


@pytest.mark.parametrize('kwargs, match', [(dict(n=3, split=2), 'split must be a row of labels_3, 0 to 1, got 2'),
    (dict(n=5, split=0), 'no array labels_5, only labels_3, labels_4'), (dict(n=4, split=0), 'index 0 occurs twice'),
    (dict(n=3), 'expected one of'), (dict(split=1), 'expected one of')])
def test_rows_that_do_not_exist(three, index_file, kwargs, match):
    with pytest.raises(ValueError, match=match): show_labels(three, file=index_file, **kwargs)


@pytest.mark.parametrize('kwargs', [{}, dict(n=3, idxs=[0, 1, 2]), dict(idxs=[0], file='x.txt'), dict(n=3, split=1)])
def test_exactly_one_kind_of_labels(three, kwargs):
    with pytest.raises(ValueError, match='expected one of: n, idxs'): show_labels(three, **kwargs)


def test_missing_files_of_labels(three):
    with pytest.raises(FileNotFoundError, match='no index file'): show_labels(three, 3, file='nowhere.npz', split=0)
    with pytest.raises(FileNotFoundError, match='no label list'): show_labels(three, file='nowhere.txt')


def test_indices_refer_to_the_whole_set(encoded):
    d = cifar10(encoded[0], n_train=20)
    assert labeled(show_labels(d, idxs=d.ids[[0, 5, *range(10, 20)]])) == [0, 5, *range(10, 20)]
    left_out = sorted(set(range(40)) - set(d.ids))[0]
    with pytest.raises(ValueError, match=rf'first \[{left_out}\].*only part of the set was read'): show_labels(d, idxs=[left_out])


def test_label_lists(three, tmp_path):
    file = tmp_path/'00.txt'
    file.write_text('0.png cat\n4.png dog\n\n44.png eel\n')
    assert labeled(show_labels(three, file=file)) == [0, 4, 44]
    three.names[3] = '0.png'
    file.write_text('0.png cat')
    with pytest.raises(ValueError, match="2 training images are named '0.png'"): show_labels(three, file=file)


@pytest.mark.parametrize('text, match', [('0.png cat\n1.png', 'line 2: expected NAME LABEL'),
    ('0.png cat\n0.png cat', "lists '0.png' twice"), ('0.png cow', "'cow' is not a class of this set; .*'cat'"),
    ('50.png eel\n0.png cat', "1 images are not in the training set, first '50.png'; its names look like '0.png'"),
    ('0.png cat\n1.png cat', "class of 1 images differs from the data, first '1.png': 'cat' in the file, 'dog' in the data"),
    ('0.png cat', "class 'dog' has no labeled item")])
def test_label_lists_that_do_not_fit(three, tmp_path, text, match):
    (tmp_path/'00.txt').write_text(text)
    with pytest.raises(ValueError, match=match): show_labels(three, file=tmp_path/'00.txt')


def test_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match='one label per training item, got 3 for 4'):
        ImageArrays(as_tensor(noise(6)), np.arange(6), np.arange(4), np.arange(4, 6), shown=np.zeros(3))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA/'cifar10_jpeg.npz').exists(), reason='FASTAI_LP_DATA has no CIFAR-10')
def test_the_papers_splits_of_cifar10(tmp_path):
    d = cifar10(DATA/'cifar10_jpeg.npz', cache=tmp_path)
    assert d.images.shape == (60000, 3, 32, 32)
    assert len(d.train) == 50000
    assert d.vocab[d.truth[0]] == 'frog'
    for n in (500, 1000, 2000, 4000):
        for split in (10, 19):
            shown = show_labels(d, n, file=DATA/'cifar10_splits.npz', split=split).shown
            assert np.bincount(shown[shown >= 0]).tolist() == [n//10]*10
