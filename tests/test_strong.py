"Strong augmentation: what it does to a batch, on which items, and when."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.torch_basics import DisplayedTransform
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import TensorImage

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.experiments.batches import image_dls
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import ImageArrays, digits, digits_dls
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.augment import Cutout, OnUnlabeled, RandomAffine, strong_tfms


class Mark(DisplayedTransform):
    "Sets all to 7, and counts its calls"
    order, split_idx = 50, 0
    def __init__(self, log=None): self.log = [] if log is None else log
    def encodes(self, x: torch.Tensor):
        self.log.append(len(x))
        return torch.full_like(x, 7.)


class Seen(Callback):
    "Inputs and known labels of every batch, with whether it trained"
    order = -10  # before LPCallback
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((self.training, self.learn.xb[0].clone(), self.learn.yb[0].clone()))


def image_batch(n=40, c=3, size=16, seed=0): return TensorImage(torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(seed)))


# The transforms

@pytest.mark.parametrize('size', [.2, .5, 1.])
def test_cutout_covers_one_square_of_each_image(size):
    x = image_batch(200)
    set_seed(0)
    out = Cutout(size)(x, split_idx=0)
    areas = []
    for a, b in zip(x, out):
        changed = (torch.as_tensor(a) != torch.as_tensor(b)).any(0)
        if not changed.any(): areas.append(0); continue
        rows, cols = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed[rows[0]:rows[-1]+1, cols[0]:cols[-1]+1].all() and changed.sum() == len(rows)*len(cols)  # a rectangle: a square, cut by the border
        assert max(len(rows), len(cols)) <= 16*size+1
        torch.testing.assert_close(b[:, changed].as_subclass(torch.Tensor), a.mean((1, 2)).as_subclass(torch.Tensor)[:, None].expand(-1, int(changed.sum())))
        areas.append(int(changed.sum()))
    assert len(set(areas)) > 5 and torch.equal(Cutout(size)(x, split_idx=1), x)
    assert torch.equal(Cutout(0)(x, split_idx=0), x)
    with pytest.raises(ValueError, match='size=1.5'): Cutout(1.5)


def test_every_image_has_its_own_draw():
    x = image_batch(1).expand(30, -1, -1, -1).clone().as_subclass(TensorImage)
    for tfm in strong_tfms():
        set_seed(1)
        out = tfm(x, split_idx=0)
        assert out.shape == x.shape and out.dtype == x.dtype and torch.isfinite(out).all()
        assert len({o.numpy().tobytes() for o in out}) > 20
        set_seed(1)
        assert torch.equal(tfm(x, split_idx=0), out)


def test_colour_is_of_colour_images():
    affine, colour, cutout = strong_tfms()
    for c in (1, 2, 4):
        x = image_batch(c=c)
        assert torch.equal(colour(x, split_idx=0), x)
    x = image_batch()
    out = colour(x, split_idx=0)
    assert not torch.equal(out, x) and out.min() >= 0 and out.max() <= 1
    assert len(strong_tfms(lighting=0, cutout=0)) == 1


def test_affine_without_anything_is_the_identity():
    m = RandomAffine(0, 0, 0, 0)(torch.zeros(3, 1))
    assert torch.equal(m, torch.eye(3).expand(3, 3, 3))
    m = RandomAffine(40., .2, .3, .2)(torch.zeros(500, 1))
    assert torch.equal(m[:, 2], torch.tensor([0., 0, 1]).expand(500, 3)) and m[:, :2, 2].abs().max() <= .3
    det = torch.linalg.det(m[:, :2, :2])  # turning and shearing leave areas, scaling by s makes them s²
    assert det.min() >= .8**2-1e-5 and det.max() <= 1.2**2+1e-5


# On the unlabeled items

def test_on_unlabeled_items_alone():
    x, y = image_batch(10), TensorCategory(torch.tensor([0, -100, 2, -1, 1, -100, -100, 0, 0, -100]))
    out = OnUnlabeled(Mark())((x, y), split_idx=0)
    free = (y < 0).as_subclass(torch.Tensor)
    assert (out[0][free] == 7).all() and torch.equal(out[0][~free], x[~free]) and torch.equal(out[1], y)
    assert not (x == 7).any()  # the batch that came is as it was
    assert type(out[0]) is TensorImage
    assert torch.equal(OnUnlabeled(Mark())((x, y), split_idx=1)[0], x)
    two = OnUnlabeled(Mark())((x, x*2, y), split_idx=0)
    assert (two[0][free] == 7).all() and (two[1][free] == 7).all() and torch.equal(two[1][~free], 2*x[~free])
    known = OnUnlabeled(mark := Mark())((x, y.clamp(min=0)), split_idx=0)
    assert torch.equal(known[0], x) and not mark.log


@pytest.mark.parametrize('change', [lambda x: x[:, :1], lambda x: x.double(), lambda x: x[:, :, :8]])
def test_a_transform_that_changes_shape_or_type(change):
    class Other(Mark):
        def encodes(self, x: torch.Tensor): return change(x)
    with pytest.raises(ValueError, match='leave type and shape'):
        OnUnlabeled(Other())((image_batch(4), TensorCategory(torch.tensor([0, -100, 0, 1]))), split_idx=0)


def small_images(n=120):
    g = np.random.default_rng(0)
    truth = np.arange(n) % 3
    images = torch.from_numpy((g.integers(0, 80, (n, 3, 8, 8)) + 80*truth[:, None, None, None]).astype('uint8'))
    return ImageArrays(images, truth, np.arange(n-30), np.arange(n-30, n), shown=np.where(np.arange(n-30) < 9, truth[:n-30], -1))


def test_in_its_place_among_the_transforms():
    "Order 50 is after bytes have become numbers from 0 to 1, and before they are normalised"
    class Half(Mark):
        def encodes(self, x: TensorImage):
            self.log.append((x.dtype, x.min().item() >= 0, x.max().item() <= 1))
            return torch.full_like(x, .5)
    learn, half, seen = blob_learner(), Half(), Seen()
    dls = image_dls(small_images(), 16, device='cpu')
    from fastai.learner import Learner
    from fastai_lp.experiments.models import small_convnet
    learn = Learner(dls, small_convnet(3, 3, 4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[LPCallback(strong_tfms=half), seen])
    assert half.log and set(half.log) == {(torch.float32, True, True)}
    normalise = next(o for o in dls.train.after_batch.fs if isinstance(o, Normalize))
    gray = ((.5-normalise.mean)/normalise.std).flatten()
    for training, x, y in seen.batches:
        free = (y < 0).as_subclass(torch.Tensor)
        if training: torch.testing.assert_close(x[free].mean((0, 2, 3)).as_subclass(torch.Tensor), gray.as_subclass(torch.Tensor))
        assert not training or (x[free].std((2, 3)) < 1e-5).all()
        assert (x[~free].std((2, 3)) > 1e-3).all()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('two_stream', [True, False])
def test_in_a_learner(workers, two_stream):
    learn, seen = blob_learner(num_workers=workers, two_stream=two_stream), Seen()
    before = learn.dls.train.after_batch
    learn.fit(3, cbs=[LPCallback(warmup=1, strong_tfms=Mark()), seen])
    n = 1 if two_stream else len(learn.dls.train)  # warm-up: two streams draw labeled items alone, in batches of 16 of 9
    for i, (training, x, y) in enumerate([b for b in seen.batches if b[0]]):
        free = y < 0
        assert (x[free] == 7).all() == (i >= n or not free.any()) and not (x[~free] == 7).any()
    assert not any((x == 7).any() for training, x, _ in seen.batches if not training)
    assert learn.dls.train.after_batch is before


def test_descriptors_are_taken_without_it(monkeypatch):
    import fastai_lp.learner.callback
    real, inputs = fastai_lp.learner.callback.extract_features, []
    monkeypatch.setattr(fastai_lp.learner.callback, 'extract_features', lambda *a, **k: inputs.append(real(*a, **k)) or inputs[-1])
    for more in (dict(), dict(augment=2), dict(steps=2)):
        log = []
        learn = blob_learner()
        learn.fit(2, cbs=LPCallback(strong_tfms=Mark(log), **more))
        assert sum(log) == 2*8*len(learn.dls.train)  # the unlabeled half of two epochs' batches, and nothing else
        assert all((o.feats != o.feats[:1]).any() for o in inputs)


def test_after_an_update_within_the_epoch_the_epoch_trains_on():
    "A copy of the DataLoader shares its transforms and says that they do not train; the epoch's own go on"
    log = []
    learn = blob_learner()
    learn.fit(1, cbs=LPCallback(strong_tfms=Mark(log), steps=3))
    assert len(learn.lp_record.history) > 2 and len(log) == len(learn.dls.train)


@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_train'])
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelEpochException])
def test_leaves_no_trace(event, error):
    class Fails(Callback):
        order = 99
        def __call__(self, name):
            if name == event and self.training: raise error
    learn = blob_learner()
    before = learn.dls.train.after_batch
    fs = list(before.fs)
    try: learn.fit(1, cbs=[LPCallback(strong_tfms=Mark()), Fails()])
    except error: pass
    assert learn.dls.train.after_batch is before and list(before.fs) == fs
    x, y = learn.dls.train.one_batch()
    assert not (x == 7).any()


def test_lr_find_does_without():
    learn, log = blob_learner(cbs=LPCallback(strong_tfms=Mark(log := []))), log
    learn.lr_find(num_it=6, show_plot=False)
    assert not log and not any(isinstance(o, OnUnlabeled) for o in learn.dls.train.after_batch.fs)


def test_the_teacher_sees_the_weak_view():
    learn, seen = blob_learner(), Seen()
    class Views(Callback):
        order = -3  # after both
        def before_batch(self):
            if self.training: self.views = self.learn.xb[0].clone(), self.mean_teacher._view[0].clone(), self.learn.yb[0].clone()
    views = Views()
    learn.fit(1, cbs=[LPCallback(strong_tfms=Mark()), MeanTeacherCallback(), seen, views])
    for training, x, y in seen.batches:
        if not training: continue
        n, free = len(y)//2, y < 0
        assert torch.equal(y[:n], y[n:]) and (x[:n][free[:n]] == 7).all() and not (x[n:] == 7).any()
    assert (views.views[0] == 7).any() and not (views.views[1] == 7).any()


def test_true_is_the_default_set():
    assert [type(o) for o in LPCallback(strong_tfms=True).strong_tfms] == [type(o) for o in strong_tfms()]
    assert not LPCallback().strong_tfms and not LPCallback(strong_tfms=[]).strong_tfms


def test_without_transforms_of_a_batch():
    "A plain DataLoader of fastai's has nowhere to put them"
    from fastai.data.load import DataLoader
    from torch.utils.data import TensorDataset
    learn = blob_learner(two_stream=False)
    data = blobs()
    y = torch.tensor([-100 if o is None else o for o in data.labels])
    make = lambda a, b, **kw: DataLoader(TensorDataset(data.x[a:b], y[a:b]), bs=16, **kw)
    learn.dls = DataLoaders(make(0, 120, shuffle=True), make(120, 150))
    learn.dls.c = 3
    with pytest.raises(ValueError, match='strong_tfms need a DataLoader with transforms'): learn.fit(1, cbs=LPCallback(strong_tfms=Mark()))


def test_on_digits_it_is_seen():
    d = digits()
    learn_dls, seen = digits_dls(d, device='cpu'), Seen()
    from fastai.learner import Learner
    from fastai_lp.experiments.models import small_convnet
    def last(**more):
        set_seed(0)
        learn = Learner(digits_dls(d, device='cpu'), small_convnet(10, width=4))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=LPCallback(**more))
        return flat_weights(learn)
    assert not torch.equal(last(), last(strong_tfms=True)) and torch.equal(last(strong_tfms=True), last(strong_tfms=True))
    assert torch.equal(last(), last(strong_tfms=[]))


def test_inputs_that_are_no_images():
    "The default transforms would do nothing, which is said, once"
    learn = blob_learner()
    with pytest.warns(UserWarning, match='strong_tfms=True is for images, and the inputs are Tensor') as seen: learn.fit(3, cbs=LPCallback(warmup=1, strong_tfms=True))
    assert sum('strong_tfms' in str(o.message) for o in seen) == 1
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        blob_learner().fit(1, cbs=LPCallback(strong_tfms=Mark()))  # somebody's own are theirs
        blob_learner().fit(1, cbs=LPCallback.strong(strong_tfms=None))
