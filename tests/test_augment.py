"Strong augmentation: what it does to a batch, to which items, and when."
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import TensorImage
from torch.utils.data import TensorDataset

from conftest import Mark, blob_learner, blobs, flat_weights
from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import ImageArrays, digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.learner.augment import Cutout, OnUnlabeled, RandomAffine, strong_tfms
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.mean_teacher import MeanTeacherCallback


class Seen(Callback):
    "Keeps inputs and targets of every batch, and whether it is for training"
    order = -10  # before LPCallback
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((self.training, self.learn.xb[0].clone(), self.learn.yb[0].clone()))


def image_batch(n=40, c=3): return TensorImage(torch.rand(n, c, 16, 16, generator=torch.Generator().manual_seed(0)))


def plain(x): return x.as_subclass(torch.Tensor)


# The transforms

def is_rectangle(mask):
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return bool(mask[rows[0]:rows[-1]+1, cols[0]:cols[-1]+1].all())


@pytest.mark.parametrize('size', [.2, .5, 1.])
def test_cutout_covers_one_square_of_each_image(size):
    x = image_batch(200)
    set_seed(0)
    out = Cutout(size)(x, split_idx=0)
    changed = (plain(x) != plain(out)).any(1)
    for mask, a, b in zip(changed, plain(x), plain(out)):
        if not mask.any(): continue
        assert is_rectangle(mask), 'a square that the border may cut'
        assert max(mask.any(0).sum(), mask.any(1).sum()) <= 16*size+1
        torch.testing.assert_close(b[:, mask], a.mean((1, 2))[:, None].expand(-1, int(mask.sum())))
    assert len(set(changed.sum((1, 2)).tolist())) > 5


def test_cutout_of_nothing():
    x = image_batch()
    assert torch.equal(Cutout(0)(x, split_idx=0), x)
    with pytest.raises(ValueError, match='size must be .*got 1.5'): Cutout(1.5)


def test_every_image_has_its_own_draw():
    x = image_batch(1).expand(30, -1, -1, -1).clone().as_subclass(TensorImage)
    for tfm in strong_tfms():
        set_seed(1)
        out = tfm(x, split_idx=0)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert torch.isfinite(out).all()
        assert len({o.numpy().tobytes() for o in out}) > 20
        set_seed(1)
        assert torch.equal(tfm(x, split_idx=0), out)


def test_lighting_changes_color_images_only():
    _, lighting, _ = strong_tfms()
    for c in (1, 2, 4):
        x = image_batch(c=c)
        assert torch.equal(lighting(x, split_idx=0), x)
    x = image_batch()
    out = lighting(x, split_idx=0)
    assert not torch.equal(out, x)
    assert (out.min() >= 0, out.max() <= 1) == (True, True)
    assert len(strong_tfms(lighting=0, cutout=0)) == 1


def test_affine_matrices():
    assert torch.equal(RandomAffine(0, 0, 0, 0)(torch.zeros(3, 1)), torch.eye(3).expand(3, 3, 3))
    m = RandomAffine(40., .2, .3, .2)(torch.zeros(500, 1))
    assert torch.equal(m[:, 2], torch.tensor([0., 0, 1]).expand(500, 3))
    assert m[:, :2, 2].abs().max() <= .3
    det = torch.linalg.det(m[:, :2, :2])  # rotation and shear keep areas, a scale of s makes them s²
    assert det.min() >= .8**2-1e-5
    assert det.max() <= 1.2**2+1e-5


# Unlabeled items only

def test_on_unlabeled():
    x, y = image_batch(10), TensorCategory(torch.tensor([0, -100, 2, -1, 1, -100, -100, 0, 0, -100]))
    free = plain(y) < 0
    out = OnUnlabeled(Mark())((x, x*2, y), split_idx=0)
    for given, got in zip((x, 2*x), out):
        assert (got[free] == 7).all()
        assert torch.equal(got[~free], given[~free])
        assert type(got) is TensorImage
    assert torch.equal(out[2], y)
    assert not (x == 7).any(), 'the given batch is not changed'


def test_on_unlabeled_skips_labeled_batches():
    x, mark = image_batch(4), Mark()
    OnUnlabeled(mark)((x, TensorCategory(torch.tensor([0, 1, 2, 0]))), split_idx=0)
    assert not mark.log


@pytest.mark.parametrize('change', [lambda x: x[:, :1], lambda x: x.double(), lambda x: x[:, :, :8]])
def test_a_transform_must_keep_shape_and_type(change):
    class Other(Mark):
        def encodes(self, x: torch.Tensor): return change(x)
    with pytest.raises(ValueError, match='must keep type and shape'):
        OnUnlabeled(Other())((image_batch(4), TensorCategory(torch.tensor([0, -100, 0, 1]))), split_idx=0)


# In a fit

def small_images(n=120):
    truth = np.arange(n) % 3
    images = np.random.default_rng(0).integers(0, 80, (n, 3, 8, 8)) + 80*truth[:, None, None, None]
    shown = np.where(np.arange(n-30) < 9, truth[:n-30], -1)
    return ImageArrays(torch.from_numpy(images.astype('uint8')), truth, np.arange(n-30), np.arange(n-30, n), shown=shown)


def test_order_among_the_transforms():
    "Order 50 comes after bytes have become numbers from 0 to 1, and before Normalize"
    class Half(Mark):
        def encodes(self, x: TensorImage):
            self.log.append((x.dtype, x.min().item() >= 0, x.max().item() <= 1))
            return torch.full_like(x, .5)
    half, seen, dls = Half(), Seen(), image_dls(small_images(), 16, device='cpu')
    learn = Learner(dls, small_convnet(3, 3, 4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[LPCallback(unlabeled_tfms=half), seen])
    assert set(half.log) == {(torch.float32, True, True)}
    norm = next(o for o in dls.train.after_batch.fs if isinstance(o, Normalize))
    gray = plain((.5-norm.mean)/norm.std)
    for training, x, y in seen.batches:
        x, free = plain(x), plain(y) < 0
        if training: torch.testing.assert_close(x[free], gray.expand_as(x[free]))
        assert (x[~free].std((2, 3)) > 1e-3).all()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('two_stream', [True, False])
def test_unlabeled_training_items_after_the_warmup(workers, two_stream):
    learn, seen = blob_learner(num_workers=workers, two_stream=two_stream), Seen()
    before = learn.dls.train.after_batch
    learn.fit(3, cbs=[LPCallback(warmup=1, unlabeled_tfms=Mark()), seen])
    n_warm = 1 if two_stream else len(learn.dls.train)  # two streams warm up on one batch per epoch: 9 labeled items
    for i, (_, x, y) in enumerate(b for b in seen.batches if b[0]):
        free = y < 0
        if free.any(): assert (x[free] == 7).all() == (i >= n_warm)
        assert not (x[~free] == 7).any()
    assert not any((x == 7).any() for training, x, _ in seen.batches if not training)
    assert learn.dls.train.after_batch is before


@pytest.mark.parametrize('features', [Extractor(), Extractor(augment=True)], ids=['plain', 'augmented'])
def test_features_are_extracted_without_it(features):
    mark, learn = Mark(), blob_learner()
    learn.fit(2, cbs=LPCallback(unlabeled_tfms=mark, features=features))
    assert mark.log == 2*len(learn.dls.train)*[8], 'the unlabeled half of the batches of two epochs, and nothing else'


def test_lr_find_does_without_it():
    learn = blob_learner(cbs=LPCallback(unlabeled_tfms=(mark := Mark())))
    learn.lr_find(num_it=6, show_plot=False)
    assert not mark.log


@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_train'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelEpochException])
def test_an_interrupted_epoch_leaves_no_trace(event, error):
    class Fails(Callback):
        order = 99
        def __call__(self, name):
            if name == event and self.training: raise error
    learn = blob_learner()
    before = learn.dls.train.after_batch
    fs = list(before.fs)
    try: learn.fit(1, cbs=[LPCallback(unlabeled_tfms=Mark()), Fails()])
    except KeyboardInterrupt: assert error is KeyboardInterrupt
    assert learn.dls.train.after_batch is before
    assert list(before.fs) == fs


def test_the_teacher_sees_the_weak_view():
    class Views(Callback):
        order = -3  # after both
        def before_batch(self):
            views = self.learn.xb, self.mean_teacher._view
            if self.training: self.student, self.teacher = (bool((o[0] == 7).any()) for o in views)
    learn, seen, views = blob_learner(), Seen(), Views()
    learn.fit(1, cbs=[LPCallback(unlabeled_tfms=Mark()), MeanTeacherCallback(), seen, views])
    for _, x, y in (b for b in seen.batches if b[0]):
        n = len(y)//2
        assert torch.equal(y[:n], y[n:])
        assert (x[:n][y[:n] < 0] == 7).all()
        assert not (x[n:] == 7).any()
    assert (views.student, views.teacher) == (True, False)


def test_true_means_strong_tfms():
    assert [type(o) for o in LPCallback(unlabeled_tfms=True).unlabeled_tfms] == [type(o) for o in strong_tfms()]
    assert not LPCallback(unlabeled_tfms=[]).unlabeled_tfms


def test_a_dataloader_without_batch_transforms():
    data, learn = blobs(), blob_learner()
    y = torch.tensor([-100 if o is None else o for o in data.labels])
    def make(a, b, **kwargs): return DataLoader(TensorDataset(data.x[a:b], y[a:b]), bs=16, **kwargs)
    learn.dls = DataLoaders(make(0, 120, shuffle=True), make(120, 150))
    learn.dls.c = 3
    with pytest.raises(ValueError, match='unlabeled_tfms need a DataLoader with batch transforms'):
        learn.fit(1, cbs=LPCallback(unlabeled_tfms=Mark()))


def test_it_changes_the_training_on_digits():
    d = digits()
    def trained(**kwargs):
        set_seed(0)
        learn = Learner(digits_dls(d, device='cpu'), small_convnet(10, width=4))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=LPCallback(**kwargs))
        return flat_weights(learn)
    without, strong = trained(), trained(unlabeled_tfms=True)
    assert not torch.equal(without, strong)
    assert torch.equal(strong, trained(unlabeled_tfms=True))
    assert torch.equal(without, trained(unlabeled_tfms=[]))


def test_inputs_that_are_not_images():
    "One warning, and only for the default transforms"
    with pytest.warns(UserWarning, match='unlabeled_tfms=True is for images, and the inputs are Tensor') as seen:
        blob_learner().fit(3, cbs=LPCallback(warmup=1, unlabeled_tfms=True))
    assert sum('unlabeled_tfms' in str(o.message) for o in seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        blob_learner().fit(1, cbs=LPCallback(unlabeled_tfms=Mark()))
        blob_learner().fit(1, cbs=LPCallback.strong(unlabeled_tfms=None))
