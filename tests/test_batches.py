"Batches as rows of one tensor: augmentation, a table of images as a dataset, DataLoaders."
import os
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage
from PIL import Image
from torch import nn

from fastai_lp.experiments.batches import BatchAugment, ImageTableDL, augmentations, image_dls
from fastai_lp.experiments.datasets import ImageArrays, digits
from fastai_lp.experiments.readers import cifar10
from fastai_lp.experiments.splits import show_labels
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import targets_of
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.streams import TwoStream

DATA = Path(os.environ.get('FASTAI_LP_DATA', 'nowhere'))


def noise(n, h=32, w=32): return np.random.default_rng(0).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
def as_tensor(images): return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


# Augmentation

def slowly(x, down, right, flip, shift, mode, angle=None):
    out = []
    for i, o in enumerate(x.permute(0, 2, 3, 1).numpy()):
        if angle is not None: o = np.asarray(Image.fromarray(o).rotate(float(angle[i]), Image.Resampling.NEAREST))
        o = np.pad(o, ((shift, shift), (shift, shift), (0, 0)), mode=mode)
        o = o[shift+down[i]:, shift+right[i]:][:x.shape[2], :x.shape[3]]
        out.append(o[:, ::-1] if flip[i] else o)
    return as_tensor(np.stack(out))


@pytest.mark.parametrize('shift', [0, 4, 19])
@pytest.mark.parametrize('pad, mode', [('reflect', 'reflect'), ('zeros', 'constant')])
def test_shift_and_flip_equal_a_loop(pad, mode, shift):
    x, tfm = as_tensor(noise(300, 20, 33)), BatchAugment(shift, pad=pad)
    set_seed(3)
    how = tfm.draw(len(x))
    assert {*how['down'].tolist()} == {*how['right'].tolist()} == {*range(-shift, shift+1)}
    assert .35 < how['flip'].float().mean() < .65
    got = tfm.place(x, **how)
    assert got.dtype == torch.uint8
    assert torch.equal(got, slowly(x, how['down'], how['right'], how['flip'], shift, mode))
    set_seed(3)
    assert torch.equal(tfm(TensorImage(x), split_idx=0), got)


def test_rotation_equals_pillow():
    "Apart from pixels whose source lies between two pixels"
    x, tfm = as_tensor(noise(100, 84, 84)), augmentations['mini_imagenet']
    how = tfm.draw(len(x))
    assert how['angle'].abs().max() <= 10
    assert how['angle'].std() > 4
    same = tfm.place(x, **how) == slowly(x, how['down'], how['right'], how['flip'], 8, 'constant', how['angle'])
    assert same.float().mean() > .999
    zeros, never = torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.bool)
    quarter = BatchAugment(0, degrees=90, pad='zeros').place(x, zeros, zeros, never, torch.full((100,), 90.))
    assert torch.equal(quarter, x.rot90(1, (2, 3)))


def test_augmentation_of_floats_and_its_limits():
    x, tfm = torch.rand(8, 1, 8, 8), BatchAugment(2)
    how = tfm.draw(8)
    assert torch.equal(tfm.place(x, **how).mul(255).byte(), tfm.place(x.mul(255).byte(), **how))
    with pytest.raises(ValueError, match='shift must be less than 8 .* got 8'): BatchAugment(8)(TensorImage(x), split_idx=0)
    with pytest.raises(ValueError, match="pad must be 'reflect' or 'zeros', got 'wrap'"): BatchAugment(pad='wrap')


# Batches

def numbered(n=200, n_test=30, c=3, size=12, labels=12):
    "Images of one color that encodes their number"
    i = torch.arange(n+n_test)
    x = torch.stack([i % 16 * 16, i//16 * 16, i % c * 100], 1).to(torch.uint8)
    x = x[:, :, None, None].expand(-1, -1, size, size).contiguous()
    stats = dict(mean=(.5,)*3, std=(.25,)*3)
    return show_labels(ImageArrays(x, (i % c).numpy(), np.arange(n), np.arange(n, n+n_test), vocab=list('abc'), **stats), labels)


def random_images(size=12):
    d = numbered(size=size)
    d.images[:] = as_tensor(noise(230, size, size))
    return d


def plain(o): return o.as_subclass(torch.Tensor)
def numbers_of(x): return ((plain(x)*.25+.5)*255).round()[:, :2, 5, 5].mul(torch.tensor([1/16, 1.])).sum(1).long()
def small(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_images_and_labels_stay_together():
    d = numbered()
    shown = torch.tensor(d.shown)
    dls = image_dls(d, bs=20, labeled_bs=5, device='cpu')
    assert isinstance(dls.train, TwoStream)
    assert isinstance(dls.train, ImageTableDL)
    assert list(dls.vocab) == list('abc')
    assert torch.equal(dls.train.targets, shown)
    assert torch.equal(targets_of(dls.valid), torch.as_tensor(d.truth[d.test]))
    seen = []
    for x, y in dls.train:
        i = numbers_of(x)
        assert torch.equal(plain(y), torch.where(shown[i] < 0, -100, shown[i]))
        assert (y[:5] >= 0).all()
        assert (y[5:] < 0).all()
        seen += i[5:].tolist()
    assert len(seen) == len(set(seen)) == len(dls.train)*15 == 180


@pytest.mark.parametrize('bs, sizes', [(20, [12]), (5, [5, 5])])
def test_labeled_items_only(bs, sizes):
    d = numbered()
    batches = [(numbers_of(x), y) for x, y in image_dls(d, bs=bs, labeled_only=True, device='cpu').train]
    assert [len(y) for _, y in batches] == sizes
    for i, y in batches: assert torch.equal(plain(y), torch.as_tensor(d.shown)[i])


class Watch(Callback):
    "Compares the targets of every training batch with the pseudo-labels of the images in it"
    order, run_valid, batches = 60, False, 0
    def before_batch(self):
        p, i = self.learn.lp_record.pseudo, numbers_of(self.x)
        expected = F.one_hot(p.labels[i].clamp(min=0), 3)*p.weights[i][:, None]*(p.labels[i] >= 0)[:, None]
        torch.testing.assert_close(plain(self.y), expected)
        self.batches += 1


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    d = numbered()
    set_seed(0)
    learn = Learner(image_dls(d, bs=20, device='cpu'), small(), metrics=accuracy, path=tmp_path_factory.mktemp('learner'),
        cbs=LPCallback(truth=d.train_truth))
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    watch = Watch()
    learn.fit_one_cycle(2, 1e-2, cbs=watch)
    assert watch.batches == 2*len(learn.dls.train)
    return d, learn


def test_label_propagation_trains_on_it(fitted):
    d, learn = fitted
    assert len(learn.lp_record.history) == 2
    assert torch.equal(learn.lp_record.pseudo.labeled, torch.tensor(d.shown) >= 0)
    value, (preds, y) = learn.validate()[1], learn.get_preds()
    assert torch.equal(plain(y), torch.as_tensor(d.truth[d.test]))
    assert (preds.argmax(1) == y).float().mean().item() == pytest.approx(value)


def test_fastais_methods_work(fitted):
    _, learn = fitted
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == 30
    ClassificationInterpretation.from_learner(learn).plot_top_losses(4)
    learn.show_results(max_n=4)
    assert learn.tta(n=2)[0].shape == (30, 3)
    interp = LPInterpretation.from_learner(learn)
    assert interp.to_df()['item'].tolist() == list(range(200))
    assert interp.show_errors() is not None


def test_prediction_of_items_and_pictures(fitted):
    d, learn = fitted
    preds, pixels = learn.get_preds()[0], d.images[205].permute(1, 2, 0).numpy()
    for o in (205, d.images[205], Image.fromarray(pixels).resize((40, 40)), pixels):
        name, i, probs = learn.predict(o)
        torch.testing.assert_close(probs, preds[5])
        assert name == 'abc'[int(i)]


def test_an_exported_learner_has_no_images(fitted):
    d, learn = fitted
    learn.export('export.pkl')
    loaded = load_learner(learn.path/'export.pkl')
    torch.testing.assert_close(loaded.predict(d.images[205])[2], learn.predict(205)[2])
    with pytest.raises(ValueError, match='image 205 is not among the 0 images here'): loaded.predict(205)
    assert (learn.path/'export.pkl').stat().st_size < d.images.numel()/2
    assert len(learn.dls.train.dataset) == 200


def test_features_and_validation_use_clean_images():
    d = random_images()
    dls, clean = image_dls(d, bs=20, device='cpu'), (d.images/255-.5)/.25
    feats = Extractor()(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 3)))).feats
    torch.testing.assert_close(feats, F.normalize(clean[:200].flatten(1)))
    for _ in range(2): torch.testing.assert_close(torch.cat([plain(x) for x, _ in dls.valid]), clean[200:])


@pytest.mark.parametrize('augment, same', [('set', False), ('mini_imagenet', False), (aug_transforms(), False), (None, True)])
def test_training_images_are_augmented(augment, same):
    d = random_images()
    originals = {o.numpy().tobytes() for o in d.images[:200]}
    x = torch.cat([x for x, _ in image_dls(d, bs=20, augment=augment, device='cpu').train])
    share = np.mean([np.round((o.numpy()*.25+.5)*255).astype(np.uint8).tobytes() in originals for o in x])
    assert share == 1 if same else share < .2


def test_two_views_are_augmented_separately():
    dls = image_dls(numbered(), bs=20, device='cpu')
    dls.train.two_views()
    for x, y in dls.train:
        assert len(x) == 40
        assert torch.equal(numbers_of(x[:20]), numbers_of(x[20:]))
        assert torch.equal(y[:20], y[20:])
    dls = image_dls(random_images(), bs=20, device='cpu')
    dls.train.two_views()
    x = next(iter(dls.train))[0]
    assert (x[:20] != x[20:]).flatten(1).any(1).float().mean() > .8


def test_a_seed_decides_the_batches():
    def batches(seed):
        set_seed(seed)
        return list(image_dls(random_images(10), bs=20, device='cpu').train)
    a, b, c = batches(1), batches(1), batches(2)
    for one, two in zip(a, b):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert not torch.equal(a[0][0], c[0][0])


def test_images_are_stored_once():
    d = numbered()
    dls = image_dls(d, bs=20, device='cpu')
    assert dls.train_ds.images is dls.valid_ds.images is d.images
    empty = dls.train_ds.new_empty()
    assert len(empty) == 0
    assert len(cloudpickle.dumps(empty)) < 20_000


def test_copies_of_a_dataloader():
    d = numbered()
    dls = image_dls(d, bs=20, device='cpu')
    assert len(list(cloudpickle.loads(cloudpickle.dumps(dls.train)))) == len(dls.train)
    assert type(dls.train.new(shuffle=False)) is ImageTableDL
    assert dls.train.new(num_workers=4).fake_l.num_workers == 0
    assert dls.test_dl([d.images[0]]*3).one_batch()[0].shape == (3, 3, 12, 12)


def test_sets_that_do_not_fit():
    d = numbered()
    full = ImageArrays(d.images, d.truth, d.train, d.test, vocab=d.vocab)
    with pytest.raises(ValueError, match='200 training items are labeled'): image_dls(full)
    with pytest.raises(ValueError, match='the digits need digits_dls'): image_dls(digits())
    with pytest.raises(ValueError, match="augment must be cifar, .* got 'cutout'"): image_dls(d, augment='cutout')
    assert len(image_dls(full, labeled_only=True, bs=50, device='cpu').train) == 4


@pytest.mark.skipif(not (DATA/'cifar10_jpeg.npz').exists(), reason='FASTAI_LP_DATA has no CIFAR-10')
def test_batches_of_cifar10():
    d = cifar10(DATA/'cifar10_jpeg.npz', n_train=5000, n_test=1000, cache=False)
    dls = image_dls(show_labels(d, 500), device='cpu')
    assert len(dls.train) == 90
    assert dls.train.labeled_bs == 50
    assert dls.one_batch()[0].shape == (100, 3, 32, 32)
    x = torch.cat([x for x, _ in dls.valid])
    assert x.mean().abs() < .02
    assert x.std() == pytest.approx(1, abs=.02)
