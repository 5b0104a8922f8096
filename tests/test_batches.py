"Batches that are rows of one tensor: augmentation, a table of images as a dataset, DataLoaders."
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage
from PIL import Image
from torch import nn

from fastai_lp.experiments.batches import BatchAugment, ImageTable, ImageTableDL, augmentations, image_dls
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import targets_of
from fastai_lp.learner.streams import TwoStream
from fastai_lp.experiments.datasets import ImageArrays, cifar10, digits, show_labels
from fastai_lp.learner.features import Extractor
from fastai_lp.interpret import LPInterpretation

shared = Path(__file__).resolve().parents[2]/'shared'/'data'


def noise(n, h=32, w=32, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
def as_tensor(images): return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


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
    set_seed(3)
    how = tfm.draw(len(x))
    set_seed(3)
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
    feats = Extractor()(learn).feats
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
    for x, y in dls.train: assert len(x) == 40 and torch.equal(number_of(x[:20]), number_of(x[20:])) and torch.equal(y[:20], y[20:])
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
    with pytest.raises(ValueError, match='digits have digits_dls'): image_dls(digits())
    assert len(image_dls(full, labeled_only=True, bs=50, device='cpu').train) == 4
    dls = image_dls(d, bs=20, device='cpu')
    assert dls.train_ds.images is dls.valid_ds.images is d.images                      # one copy on the device
    same = cloudpickle.loads(cloudpickle.dumps(dls.train))
    assert len(list(same)) == len(dls.train) and type(dls.train.new(shuffle=False)) is ImageTableDL
    assert dls.train.new(num_workers=4).fake_l.num_workers == 0 and dls.test_dl([d.images[0]]*3).one_batch()[0].shape == (3, 3, 12, 12)
    empty = dls.train_ds.new_empty()
    assert len(empty) == 0 and len(cloudpickle.dumps(empty)) < 20_000 and isinstance(empty, ImageTable)


@pytest.mark.skipif(not (shared/'cifar10_jpeg.npz').exists(), reason='CIFAR-10 is not beside the repository')
def test_batches_of_cifar10(tmp_path):
    d = cifar10(shared/'cifar10_jpeg.npz', cache=tmp_path)
    dls = image_dls(show_labels(d, 500, file=shared/'cifar10_splits.npz', split=10), device='cpu')
    assert len(dls.train) == 990 and dls.train.labeled_bs == 50 and dls.one_batch()[0].shape == (100, 3, 32, 32)
    assert len(image_dls(show_labels(d, 500), labeled_only=True, device='cpu').train) == 5
    x = torch.cat([x for x, _ in dls.valid])
    assert abs(x.mean()) < .02 and abs(x.std()-1) < .02
