"The options of LPCallback: each does what it says and, if not given, changes nothing."
import inspect

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fasttransform import ItemTransform
from torch import nn

from conftest import Mark, Stop, blob_learner, blobs, flat_weights, same_run
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamMixUp
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.transductive.ensemble import Ensemble
from fastai_lp.transductive.labelers import Diffusion, NetworkPrediction

OPTIONS = dict(tfms=lambda: dict(unlabeled_tfms=Mark()), mixup=lambda: dict(mixup=.4), sharp=lambda: dict(temperature=.5),
    balance=lambda: dict(balance='sinkhorn', prior='uniform'), augment=lambda: dict(features=Extractor(augment=True)),
    ensemble=lambda: dict(labeler=Ensemble()), backbone=lambda: dict(features=Extractor(backbone=nn.Identity())),
    joined=lambda: dict(features=Extractor(backbone=nn.Identity(), weight=1.)))
SAME_HERE = 'sharp', 'augment'  # temperature alone changes no label, and these data have no augmentation


class Keeps(Extractor):
    "Keeps what it extracts"
    def __call__(self, learn, **kwargs):
        self.found = [*getattr(self, 'found', []), super().__call__(learn, **kwargs)]
        return self.found[-1]


def trained(epochs=2, data=None, cbs=(), **options):
    learn = blob_learner(data)
    learn.fit_one_cycle(epochs, 1e-2, cbs=[LPCallback(**options), *cbs])
    return learn


def test_the_default_is_the_paper():
    off = dict(warmup=0, every=1, features=None, unlabeled_tfms=None, mixup=None, truth=None,
        balance=None, temperature=1., alpha=.99, gamma=3.)
    assert {k: p.default for k, p in inspect.signature(LPCallback).parameters.items() if k in off} == off


@pytest.fixture(scope='module')
def plain_weights(): return flat_weights(trained())


@pytest.mark.parametrize('option', OPTIONS)
def test_each_option_changes_the_training(option, plain_weights):
    assert torch.equal(flat_weights(trained(**OPTIONS[option]())), plain_weights) == (option in SAME_HERE)


@pytest.mark.parametrize('option', OPTIONS)
def test_stopped_and_resumed(option, tmp_path):
    def run(*extra):
        learn = blob_learner(path=tmp_path)
        learn.fit_one_cycle(4, 1e-2, cbs=[LPCallback(warmup=1, **OPTIONS[option]()), *extra])
        return learn
    through = run()
    with pytest.raises(KeyboardInterrupt): run(ResumeCallback(tmp_path/'run.pth'), Stop('before_batch', 2))
    same_run(through, run(ResumeCallback(tmp_path/'run.pth')))


# The recommended recipe

def test_strong_can_be_changed():
    assert type(LPCallback.strong()) is LPCallback
    cb = LPCallback.strong(k=3, alpha=.5)
    assert cb.labeler == Ensemble(k=3, alpha=.5, backbone=cb.labeler.backbone)
    assert LPCallback.strong(backbone=None).labeler == Ensemble()
    assert LPCallback.strong(warmup=2).warmup == 2
    assert not LPCallback.strong(unlabeled_tfms=None).unlabeled_tfms
    assert LPCallback.strong(features=Extractor()).features == Extractor()
    own = NetworkPrediction()
    assert LPCallback.strong(labeler=own).labeler is own
    with pytest.raises(ValueError, match='pass k to NetworkPrediction'): LPCallback.strong(labeler=own, k=3)


def test_strong_trains_on_any_inputs():
    learn = blob_learner()
    with pytest.warns(UserWarning, match='unlabeled_tfms=True is for images'): learn.fit(1, cbs=LPCallback.strong())
    assert learn.lp_record.pseudo.certainty.mean() > 0


# MixUp

@pytest.mark.parametrize('given, alpha', [(.7, .7), (True, .4)])
def test_mixup_equals_the_callback(given, alpha):
    assert torch.equal(flat_weights(trained(mixup=given)), flat_weights(trained(cbs=[StreamMixUp(alpha)])))


class Mixers(Callback):
    "Counts the mixing callbacks in each batch. An exception ends the second epoch"
    order, run_valid = 95, False
    def __init__(self, error=None): self.error, self.seen = error, []
    def before_batch(self):
        self.seen.append(sum(isinstance(cb, StreamMixUp) for cb in self.learn.cbs))
        if self.error is not None and self.epoch == 1: raise self.error


@pytest.mark.parametrize('error', [None, CancelBatchException, CancelFitException])
def test_mixup_starts_after_the_warmup_and_ends_with_its_epoch(error):
    learn, mixers = blob_learner(), Mixers(error)
    cbs = [LPCallback(mixup=.4, warmup=1), mixers]
    for expected in ({0, 1}, {1}):
        mixers.seen.clear()
        learn.fit(2, cbs=cbs)
        assert not any(isinstance(cb, StreamMixUp) for cb in learn.cbs)
        assert set(mixers.seen) == expected


def test_mixup_with_mean_teacher():
    def fit(mixup):
        learn = blob_learner()
        learn.fit(1, cbs=[LPCallback(mixup=mixup), MeanTeacherCallback()])
        return flat_weights(learn)
    assert torch.equal(fit(True), fit(None))
    with pytest.raises(ValueError, match='mixup=0.4 cannot be used with Mean Teacher'): fit(.4)


class Codes(ItemTransform):
    "Integer inputs, 0 to 19"
    def encodes(self, b): return (b[0]*4+10).long().clamp(0, 19), *b[1:]


def test_mixup_of_inputs_that_cannot_be_mixed():
    def fit(mixup):
        learn, mixers = blob_learner(), Mixers()
        learn.model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(32, learn.dls.c))
        for dl in learn.dls.loaders: dl.after_batch.add(Codes())
        learn.fit(1, cbs=[LPCallback(mixup=mixup), mixers])
        return mixers.seen
    assert set(fit(True)) == {0}
    with pytest.raises(ValueError, match='torch.int64'): fit(.4)


# Features

class Backbone(nn.Module):
    "A linear layer whose output is a vector or a map of features"
    def __init__(self, is_map):
        super().__init__()
        self.is_map, self.lin, self.drop = is_map, nn.Linear(8, 5), nn.Dropout(.9)
    def forward(self, x):
        v = self.drop(self.lin(x))
        return v[:, :, None, None].expand(-1, -1, 2, 3) if self.is_map else v


@pytest.mark.parametrize('is_map', [False, True])
def test_backbone_replaces_the_features(is_map):
    net, data = Backbone(is_map), blobs()
    before, features = [p.clone() for p in net.parameters()], Keeps(backbone=net)
    learn = trained(2, data, features=features)
    expected = F.normalize(net.lin(data.x[:120]))
    for found in features.found:
        torch.testing.assert_close(found.feats, expected)
        assert found.logits.shape == (120, 3)
    assert net.training
    assert net.drop.training
    for p, q in zip(before, net.parameters()): assert torch.equal(p, q)  # not trained
    y = torch.where(torch.arange(120) < 9, data.truth[:120], -1)
    assert torch.equal(learn.lp_record.pseudo.labels, Diffusion()(expected, torch.zeros(120, 3), y).labels)


def test_the_weight_of_a_joined_backbone_falls_over_the_fit():
    "The similarities are the weighted mean of both"
    net, data = nn.Linear(8, 5), blobs()
    features = Keeps(backbone=net, weight=2.)
    class Own(Callback):
        order = -6
        def before_fit(self): self.feats = []
        def before_train(self): self.feats.append(Extractor()(self.learn).feats)
    own = Own()
    trained(4, data, [own], features=features)
    other = F.normalize(net(data.x[:120])).detach()
    for epoch, (found, feats) in enumerate(zip(features.found, own.feats, strict=True)):
        w = 2*(1-epoch/4)
        torch.testing.assert_close(found.feats.norm(dim=1), torch.ones(120))
        expected = (feats@feats.T + w**2*other@other.T)/(1+w**2)
        torch.testing.assert_close(found.feats@found.feats.T, expected, rtol=1e-3, atol=1e-5)


class Nothing(nn.Module):
    def forward(self, x): return x.new_zeros(len(x), 0)


def test_joined_backbones_without_effect():
    learn = blob_learner()
    plain = Extractor()(learn).feats
    assert torch.equal(Extractor(backbone=nn.Linear(8, 5), weight=0.)(learn).feats, plain)
    torch.testing.assert_close(Extractor(backbone=Nothing(), weight=1.)(learn).feats, plain)
