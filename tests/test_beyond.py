"What LPCallback can do beyond the paper: each option does what it says, and none is on unless asked for."
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.schedule import *
from fastai.data.core import Datasets
from fastai.learner import Learner, load_learner
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from fasttransform import ItemTransform
from torch import nn

import fastai_lp.learner.callback
from conftest import Look, Spy, blob_learner, blob_model, blobs, flat_weights, item_numbers
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize
from fastai_lp.utils.ema import RunningMean, ema_decay, update_mean
from fastai_lp.learner.features import extract_features
from fastai_lp.transductive.labelers import Diffusion, NetworkPrediction
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamMixUp
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.learner.augment import OnUnlabeled
from test_resume import Stop, same
from test_strong import Mark

OPTIONS = dict(steps=dict(steps=3), strong=dict(strong_tfms=Mark()), views=dict(unlabeled_views=2), least=dict(min_labeled=10), mean_of_views=dict(augment=2), ema=dict(ema=.9),
    backbone=dict(backbone=nn.Identity()), beside=dict(backbone=nn.Identity(), beside=1.), mixup=dict(mixup=.4), balance=dict(balance='sinkhorn', prior='uniform'), sharp=dict(temperature=.5, balance='sinkhorn', prior='uniform'))


class Codes(ItemTransform):
    "The inputs as codes, 0 to 19"
    def encodes(self, b): return (b[0]*4+10).long().clamp(0, 19), *b[1:]


@pytest.fixture
def extracted(monkeypatch):
    found, real = [], fastai_lp.learner.callback.extract_features
    monkeypatch.setattr(fastai_lp.learner.callback, 'extract_features', lambda *a, **k: found.append(real(*a, **k)) or found[-1])
    return found


def trained(epochs=2, data=None, cbs=(), two_stream=True, **options):
    learn = blob_learner(data, two_stream=two_stream)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[LPCallback(**options), *cbs])
    return learn


# Off unless asked for

def test_alone_it_is_the_paper():
    args = inspect.signature(LPCallback).parameters
    off = dict(steps=None, strong_tfms=None, unlabeled_views=1, min_labeled=0, augment=0, ema=None, backbone=None, beside=None, mixup=None, balance=None, temperature=1.)
    assert {k: args[k].default for k in off} == off
    assert torch.equal(flat_weights(trained()), flat_weights(trained(**off)))


@pytest.mark.parametrize('option', OPTIONS)
def test_each_option_changes_the_training_and_leaves_no_trace(option):
    learn = trained(**OPTIONS[option])
    if option != 'least': assert not torch.equal(flat_weights(learn), flat_weights(trained()))  # of two streams, labeled_bs decides
    dl = learn.dls.train
    assert (dl.bs, dl.views, dl.unlabeled_views, dl.own_bs) == (16, 1, 1, 16) and 'get_idxs' not in vars(dl)
    assert not any(isinstance(o, OnUnlabeled) for o in dl.after_batch.fs) and not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert [m.name for m in learn.metrics] == ['accuracy'] and learn.validate()[1] > .5


@pytest.mark.parametrize('option', OPTIONS)
def test_each_option_is_reproducible(option):
    assert torch.equal(flat_weights(trained(**OPTIONS[option])), flat_weights(trained(**OPTIONS[option])))


@pytest.mark.parametrize('option', OPTIONS)
def test_stopped_and_resumed(option, tmp_path):
    def run(*extra):
        learn = blob_learner(path=tmp_path)
        learn.fit_one_cycle(4, 1e-2, cbs=[LPCallback(warmup=1, **OPTIONS[option]), *extra])
        return learn
    through = run()
    with pytest.raises(KeyboardInterrupt): run(ResumeCallback(tmp_path/'run.pth'), Stop('before_batch', 2))
    same(through, run(ResumeCallback(tmp_path/'run.pth')))


@pytest.mark.parametrize('name, bad', dict(steps=0, unlabeled_views=0, min_labeled=-1, augment=-1, mixup=-1., ema=1., temperature=0, balance='even').items())
def test_settings_that_cannot_be(name, bad):
    with pytest.raises(ValueError, match=f'{name}(=| must be)'): LPCallback(**{name: bad})


def test_choices_that_exclude_each_other():
    with pytest.raises(ValueError, match='layer= is a place'): LPCallback(layer='0', backbone=nn.Identity())
    with pytest.raises(ValueError, match='unlabeled_views=2 needs batches of two streams'): trained(two_stream=False, unlabeled_views=2)
    with pytest.raises(ValueError, match='min_labeled=17 with a batch size of 16'): trained(min_labeled=17)


# The preset

def test_the_preset():
    cb = LPCallback.strong()
    assert type(cb) is LPCallback and cb.strong_tfms and cb.mixup is True
    assert LPCallback.strong(k=3).labeler.k == 3 and LPCallback.strong(warmup=2).warmup == 2 and not LPCallback.strong(strong_tfms=None).strong_tfms
    own = NetworkPrediction()
    assert LPCallback.strong(labeler=own).labeler is own
    with pytest.raises(ValueError, match='pass k to it'): LPCallback.strong(labeler=own, k=3)
    learn = blob_learner()
    learn.fit(1, cbs=LPCallback.strong(strong_tfms=Mark()))
    assert learn.lp_record.pseudo.certainty.mean() > 0


# MixUp

@pytest.mark.parametrize('alpha, given', [(.7, .7), (.4, True)])
def test_mixup_is_the_callback_of_the_unlabeled_stream(alpha, given):
    assert torch.equal(flat_weights(trained(mixup=given)), flat_weights(trained(cbs=[StreamMixUp(alpha, 'unlabeled')])))


class Mixers(Callback):
    "Who mixes, in each batch; the second epoch ends as `how` says"
    order, run_valid = 95, False
    def __init__(self, how=None): self.how, self.seen = how, []
    def before_batch(self):
        self.seen.append(sum(isinstance(cb, StreamMixUp) for cb in self.learn.cbs))
        if self.how is not None and self.epoch == 1: raise self.how


@pytest.mark.parametrize('how', [None, CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException, KeyboardInterrupt])
def test_mixup_goes_with_its_epoch_however_that_ends(how):
    learn, seen = blob_learner(), Mixers(how)
    cbs = [LPCallback(mixup=.4, warmup=1), seen]
    for mixing in ({0, 1}, {1}):
        seen.seen.clear()
        try: learn.fit(2, cbs=cbs)
        except KeyboardInterrupt: assert how is KeyboardInterrupt
        assert not any(isinstance(cb, StreamMixUp) for cb in learn.cbs) and cbs[0]._mix is None
        assert set(seen.seen) == mixing  # not while it warms up, in the first epoch of all
    learn.validate()


def test_mixup_where_it_cannot_be():
    def fit(mixup):
        learn = blob_learner()
        learn.fit(1, cbs=[LPCallback(mixup=mixup), MeanTeacherCallback()])
        return flat_weights(learn)
    assert torch.equal(fit(True), fit(None))
    with pytest.raises(ValueError, match='mixup=0.4 changes the student'): fit(.4)
    def embed(mixup):
        set_seed(0)
        learn, seen = blob_learner(), Mixers()
        learn.model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(32, learn.dls.c))
        for dl in learn.dls.loaders: dl.after_batch.add(Codes())
        learn.fit(1, cbs=[LPCallback(mixup=mixup), seen])
        return flat_weights(learn), seen.seen
    (got, mixers), (plain, _) = embed(True), embed(None)
    assert torch.equal(got, plain) and set(mixers) == {0}
    with pytest.raises(ValueError, match='StreamMixUp: input 0 of the model is torch.int64'): embed(.4)


# Updates within the epoch

@pytest.mark.parametrize('steps', [1, 3, 5, 100])
def test_updates_every_so_many_steps(steps, extracted):
    learn = trained(2, steps=steps)
    n = len(learn.dls.train)
    at = [(epoch, step) for epoch in (0, 1) for step in range(0, n, steps)]
    assert [(r['epoch'], r['step']) for r in learn.lp_record.history] == at and len(extracted) == len(at)
    sec = [sum(r['sec'] for r in learn.lp_record.history if r['epoch'] == e) for e in (0, 1)]
    i = list(learn.recorder.metric_names[1:]).index('lp_sec')
    np.testing.assert_allclose([row[i] for row in learn.recorder.values], sec)


def test_batches_after_an_update_have_its_labels():
    class Counts:
        "The n-th call gives every unlabeled item the class n mod 3"
        n = -1
        def __call__(self, feats, logits, y):
            self.n += 1
            from fastai_lp.transductive.scoring import from_scores
            return from_scores(F.one_hot(torch.where(y < 0, self.n % 3, y), 3).float(), y)
    spy, data = Spy(), blobs()
    learn = trained(1, data, [spy], labeler=Counts(), steps=4)
    for i, (x, target) in enumerate(spy.seen):
        free = item_numbers(data, x) >= 9
        assert (target[free].argmax(1) == i//4 % 3).all() and (target[~free].argmax(1) == data.truth[item_numbers(data, x)][~free]).all()


def test_steps_do_not_count_in_warmup_or_lr_find(extracted):
    trained(2, warmup=2, steps=1)
    blob_learner(cbs=LPCallback(steps=1)).lr_find(num_it=5, show_plot=False)
    assert not extracted


def test_an_update_within_the_epoch_does_not_change_what_is_drawn():
    "Same items, same order, same augmentation, whether or not the labels are renewed on the way"
    class Noise(Mark):
        def encodes(self, x: torch.Tensor): return x + 1e-3*torch.randn(x.shape)
    def inputs(**more):
        spy = Spy()
        trained(2, cbs=[spy], strong_tfms=Noise(), **more)
        return spy.seen
    for (a, _), (b, _) in zip(inputs(), inputs(steps=2)): assert torch.equal(a, b)


@pytest.mark.parametrize('workers', [0, 2])
def test_item_transforms_go_on_training_after_an_update(workers):
    from fastai.torch_basics import DisplayedTransform
    class Shift(DisplayedTransform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + 100. if x.is_floating_point() else x
    data, spy = blobs(), Spy()
    dsets = Datasets(range(150), [[Look(data.x)], [Look(data.labels), SemiCategorize(vocab=[0, 1, 2])]], splits=[list(range(120)), list(range(120, 150))])
    dls = dsets.semi_dataloaders(bs=16, device='cpu', num_workers=workers, after_item=Shift())
    learn = Learner(dls, blob_model())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[LPCallback(steps=2), spy])
    assert len(spy.seen) > 4 and all((x > 50).all() for x, _ in spy.seen)


# Views and labeled items of a batch

@pytest.mark.parametrize('views', [2, 3])
def test_several_views_of_unlabeled_items(views):
    data, spy = blobs(), Spy()
    learn = trained(1, data, [spy], unlabeled_views=views)
    assert len(spy.seen) == len(blob_learner(data).dls.train)
    for x, target in spy.seen:
        items = item_numbers(data, x)
        assert len(items) == 8 + 8*views and (items[:8] < 9).all() and (items[8:] >= 9).all()
        for v in range(views): assert torch.equal(items[8+8*v:16+8*v], items[8:16])
        p = learn.lp_record.pseudo
        torch.testing.assert_close(target, F.one_hot(p.labels[items], 3)*p.weights[items][:, None])


def test_each_view_is_augmented_anew():
    class Noise(Mark):
        def encodes(self, x: torch.Tensor): return x + torch.randn(x.shape)
    spy = Spy()
    trained(1, cbs=[spy], unlabeled_views=2, strong_tfms=Noise())
    for x, _ in spy.seen: assert (x[8:16] != x[16:24]).any(1).all()


def test_warmup_and_several_views():
    "Warm-up batches are of labeled items alone, as many as without views"
    spy = Spy()
    learn = trained(2, cbs=[spy], warmup=1, unlabeled_views=3)
    assert [len(x) for x, _ in spy.seen] == [16] + [32]*len(learn.dls.train)


def test_several_views_and_mean_teacher():
    data, spy = blobs(), Spy()
    learn = blob_learner(data)
    learn.fit(1, cbs=[LPCallback(unlabeled_views=2), MeanTeacherCallback(), spy])
    assert learn.dls.train.bs == 16 and all(len(x) == 24 for x, _ in spy.seen)


@pytest.mark.parametrize('least', [1, 6, 16])
def test_at_least_so_many_labeled_items(least):
    data, spy = blobs(), Spy()
    learn = blob_learner(data, two_stream=False)
    learn.fit(1, cbs=[LPCallback(min_labeled=least), spy])
    plain = len(learn.dls.train)
    free = torch.cat([items[items >= 9] for items in (item_numbers(data, x) for x, _ in spy.seen)])
    assert len(spy.seen) == plain and len(free) == len(free.unique())  # an unlabeled item comes once at most
    counts = [(item_numbers(data, x) < 9).sum().item() for x, _ in spy.seen]
    assert min(counts) >= least
    if least == 6:
        known = torch.cat([items[items < 9] for items in (item_numbers(data, x) for x, _ in spy.seen)])
        assert known.bincount(minlength=9).min() >= 3  # they take turns


def test_min_labeled_is_drawn_as_before_where_there_are_enough():
    assert torch.equal(flat_weights(trained(min_labeled=8)), flat_weights(trained()))


def test_min_labeled_in_a_sorted_dataloader():
    from fastai_lp.learner.data import SemiCategorize
    data, spy = blobs(), Spy()
    lengths = torch.arange(150) % 37
    dsets = Datasets(range(150), [[Look(torch.cat([data.x, lengths[:, None]], 1).float())], [Look(data.labels), SemiCategorize(vocab=[0, 1, 2])]], splits=[list(range(120)), list(range(120, 150))])
    dls = dsets.dataloaders(bs=16, device='cpu', num_workers=0, dl_type=SortedDL, sort_func=lambda o: o[0][-1].item())
    learn = Learner(dls, blob_model(9))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[LPCallback(min_labeled=5), spy])
    for x, target in spy.seen: assert (x[:, -1].diff() <= 0).all() and len(x) == 16


# Descriptors

def test_ema_decay_zero_is_the_network_itself(): assert torch.equal(flat_weights(trained(ema=0.)), flat_weights(trained()))


def test_descriptors_of_the_running_mean(extracted):
    class Follow(Callback):
        order = 50
        def before_fit(self): self.mean = None
        def before_train(self):
            if self.mean is None: self.mean, self.n = [p.detach().clone() for p in self.learn.model.parameters()], 0
        def after_step(self):
            self.n += 1
            d = ema_decay(self.n, .9)
            self.mean = [d*m + (1-d)*p.detach() for m, p in zip(self.mean, self.learn.model.parameters())]
    follow = Follow()
    learn = trained(3, cbs=[follow], ema=.9)
    mean = learn.lp_record.mean
    assert not mean.model.training and mean.step == follow.n
    for a, b in zip(mean.model.parameters(), follow.mean): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not torch.equal(extract_features(learn).feats, extract_features(learn, model=mean.model).feats)
    assert all(p.grad is None and not p.requires_grad for p in mean.model.parameters())


@pytest.mark.parametrize('layer', ['0', 'module'])
def test_layer_of_the_running_mean(layer, extracted):
    learn = blob_learner()
    learn.fit(1, cbs=LPCallback(ema=0., layer=learn.model[0] if layer == 'module' else layer))
    other = blob_learner()
    other.fit(1, cbs=LPCallback(layer=other.model[0] if layer == 'module' else layer))
    assert extracted[0].feats.shape == (120, 16) and torch.equal(extracted[0].feats, extracted[1].feats) and torch.equal(flat_weights(learn), flat_weights(other))


def test_running_mean_of_buffers():
    model, d = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), .75
    mean = RunningMean(model, d)
    before = mean.model[1].running_var.clone()
    with torch.no_grad(): model[1].running_var.fill_(5.)
    model[1].num_batches_tracked += 3
    update_mean(mean.model, model, d, buffers=True)
    torch.testing.assert_close(mean.model[1].running_var, d*before + (1-d)*5)
    assert mean.model[1].num_batches_tracked == 3


def test_exported_learner_has_no_running_mean(tmp_path):
    learn = trained(ema=.9)
    learn.path = tmp_path
    learn.add_cb(LPCallback(ema=.9))
    learn.fit(1)
    assert learn.lp_record.mean is not None
    learn.export('x.pkl')
    assert learn.lp_record.mean is not None
    small = load_learner(tmp_path/'x.pkl')
    assert small.lp.record.mean is None


def test_descriptors_averaged_over_views():
    class Noise(Mark):
        def encodes(self, x: torch.Tensor): return x + .5*torch.randn(x.shape)
    learn = blob_learner()
    plain = extract_features(learn)
    for n in (1, 2, 5):  # without augmentation, all views are the same
        again = extract_features(learn, augment=n)
        torch.testing.assert_close(again.feats, plain.feats)
        torch.testing.assert_close(again.logits, plain.logits)
    learn.dls.train.after_batch.add(Noise())
    assert torch.equal(extract_features(learn).feats, plain.feats)
    state = torch.get_rng_state()
    views = []
    mean = extract_features(learn, augment=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(mean.feats.norm(dim=1), torch.ones(120))
    many = extract_features(learn, augment=30)
    assert (many.feats*plain.feats).sum(1).mean() > (mean.feats*plain.feats).sum(1).mean() > (extract_features(learn, augment=1).feats*plain.feats).sum(1).mean()
    assert (many.logits-plain.logits).norm() < (extract_features(learn, augment=1).logits-plain.logits).norm()


def test_views_in_a_temporary_file(tmp_path):
    learn = blob_learner()
    a, b = (extract_features(learn, augment=2, max_bytes=m) for m in (2**32, 0))
    assert torch.equal(a.feats, b.feats) and torch.equal(a.logits, b.logits)


@pytest.mark.parametrize('shape', [2, 4])
def test_backbone(shape, extracted):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.drop = nn.Linear(8, 5), nn.Dropout(.9)
        def forward(self, x):
            v = self.drop(self.lin(x))
            return v if shape == 2 else v[:, :, None, None].expand(-1, -1, 2, 3)
    net, data = Backbone(), blobs()
    before = [p.clone() for p in net.parameters()]
    learn = trained(2, data, backbone=net)
    expected = F.normalize(net.lin(data.x[:120]))
    for found in extracted:
        torch.testing.assert_close(found.feats, expected)
        assert found.logits.shape == (120, 3)
    assert net.training and net.drop.training and all(torch.equal(a, b) for a, b in zip(before, net.parameters()))  # as it was, and not trained
    assert torch.equal(learn.lp_record.pseudo.labels, Diffusion()(expected, torch.zeros(120, 3), torch.where(torch.arange(120) < 9, data.truth[:120], -1)).labels)


def test_a_second_fit_goes_on_with_the_mean_and_another_model_begins_anew():
    learn = blob_learner(cbs=LPCallback(ema=.9))
    learn.fit(1)
    mean, steps = learn.lp_record.mean, learn.lp_record.mean.step
    learn.fit(1)
    assert learn.lp_record.mean is mean and mean.step == 2*steps
    learn.model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    learn.opt = None
    learn.fit(1)
    assert learn.lp_record.mean is not mean and learn.lp_record.mean.step == steps


# A backbone beside the network

def test_a_descriptor_beside_the_networks_own(extracted):
    "Its weight falls from the first epoch to the last; the similarities are the weighted mean of both"
    net, data = nn.Linear(8, 5), blobs()
    class Own(Callback):
        order = -6
        def before_fit(self): self.feats = []
        def before_train(self): self.feats.append(extract_features(self.learn).feats)
    own = Own()
    trained(4, data, [own], backbone=net, beside=2.)
    other = F.normalize(net(data.x[:120])).detach()
    for epoch, (found, feats) in enumerate(zip(extracted, own.feats)):
        w = 2*(1-epoch/4)
        torch.testing.assert_close(found.feats.norm(dim=1), torch.ones(120))
        torch.testing.assert_close(found.feats @ found.feats.T, (feats@feats.T + w**2*other@other.T)/(1+w**2), rtol=1e-3, atol=1e-5)


def test_beside_of_zero_is_the_network_alone():
    assert torch.equal(flat_weights(trained(backbone=nn.Linear(8, 5), beside=0.)), flat_weights(trained()))
    with pytest.raises(ValueError, match='beside=1.0 is the weight'): LPCallback(beside=1.)
    with pytest.raises(ValueError, match='beside=-1'): LPCallback(backbone=nn.Identity(), beside=-1)


def test_thumbnail():
    from fastai_lp.learner.features import Thumbnail
    x = torch.randn(3, 2, 16, 32)
    t = Thumbnail(8)(x)
    small = x.unflatten(2, (4, 4)).unflatten(4, (8, 4)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(t, small - small.amin(1, keepdim=True))
    assert (t.amin(1) == 0).all() and Thumbnail(64)(x).shape == (3, 2*16*32) and Thumbnail(8)(x, None).shape == (3, 64)
    for other in (torch.randn(3, 5), torch.zeros(3, 1, 8, 8, dtype=torch.long)):
        with pytest.raises(ValueError, match='Thumbnail is for images'): Thumbnail()(other)
        assert Thumbnail(strict=False)(other).shape == (3, 0)
    learn = blob_learner()
    torch.testing.assert_close(extract_features(learn, backbone=Thumbnail(strict=False), beside=1.).feats, extract_features(learn).feats)
