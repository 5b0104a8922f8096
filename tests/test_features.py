"Features of common models, and that extracting them changes nothing."
import pytest
import torch
import torch.nn.functional as F
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.vision.augment import RandTransform
from fastai.vision.learner import create_timm_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import resnet18

from conftest import Look, blob_learner, blob_model, blobs
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.learner.data import SemiCategorize
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.layers import L2Linear, add_l2norm, find_classifier, find_feature_layer

MODELS = dict(
    vision=(lambda: create_vision_model(resnet18, 4, pretrained=False), 1024),
    average_pool=(lambda: create_vision_model(resnet18, 4, pretrained=False, concat_pool=False), 512),
    timm=(lambda: create_timm_model('resnet18', 4, pretrained=False)[0], 1024),
    transformer=(lambda: create_timm_model('test_vit', 4, pretrained=False, img_size=64)[0], 64),  # pools by itself
    xresnet=(lambda: xresnet18(n_out=4), 512),
    torchvision=(lambda: resnet18(num_classes=4), 512))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_feature_layer_of_common_models(name):
    make, d = MODELS[name]
    model, seen = make().eval(), []
    module, is_input = find_feature_layer(model, 4)
    hook = module.register_forward_hook(lambda m, i, o: seen.append(i[0] if is_input else o))
    model(torch.randn(2, 3, 64, 64))
    hook.remove()
    assert seen[0].flatten(1).shape == (2, d)


def test_features_of_a_layer():
    learn, (x, valid) = blob_learner(), blobs().x.split(120)
    full = Extractor()(learn)
    model = learn.model.eval()
    close(full.feats, F.normalize(model[:4](x)))
    close(full.logits, model(x))
    close(Extractor('0')(learn).feats, F.normalize(model[0](x)))
    close(Extractor(model[2])(learn, dl=learn.dls.valid).feats, F.normalize(model[:3](valid)))


def test_layers_without_features():
    learn = blob_learner(model=nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Identity(), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match=r'expected \[batch, d\]'): Extractor('1')(learn)
    with pytest.raises(ValueError, match='is not in the model'): Extractor('head')(learn)


class Noise(RandTransform):
    "Noise on items and batches of the training set"
    split_idx = 0
    def encodes(self, x: torch.Tensor): return x + torch.randn_like(x) if x.is_floating_point() else x


def test_extraction_does_not_augment():
    data = blobs()
    tfms = [Look(data.x), Noise()], [Look(data.labels), SemiCategorize()]
    dsets = Datasets(range(150), tfms, splits=[range(120), range(120, 150)])
    learn = Learner(dsets.semi_dataloaders(bs=16, num_workers=0, device='cpu', after_batch=[Noise()]), blob_model())
    a, b = Extractor()(learn), Extractor()(learn)
    close(a.logits, learn.model.eval()(data.x[:120]))
    assert torch.equal(a.feats, b.feats)
    seen = torch.cat([b[0] for b in learn.dls.train])
    assert torch.cdist(seen, data.x).min(1).values.min() > .1  # training still does


def test_augmented_features():
    learn = Learner(digits_dls(digits(20)), small_convnet(10))
    clean = Extractor()(learn).feats
    a, b = (Extractor(augment=True)(learn).feats for _ in range(2))
    assert torch.equal(clean, Extractor()(learn).feats)
    assert torch.equal(a, b)  # the random state is restored
    assert ((a-clean).norm(dim=1) > 0).float().mean() > .99
    assert (a*clean).sum(1).mean() > .8


def test_features_in_a_file_are_the_same(learn):
    for a, b in zip(Extractor(max_bytes=100)(learn), Extractor()(learn), strict=True): assert torch.equal(a, b)


def test_l2norm_keeps_parameters_optimizer_and_state():
    learn = blob_learner()
    learn.create_opt()
    keys, weight = list(learn.model.state_dict()), learn.model[-1].weight
    assert add_l2norm(learn.model, 3) is learn.model
    assert add_l2norm(learn.model) is learn.model  # again: no change
    last = learn.model[-1]
    assert isinstance(last, L2Linear)
    assert last.weight is weight
    assert list(learn.model.state_dict()) == keys
    assert find_classifier(learn.model, 3) is last
    learn.fit(1, 1e-1)
    x = torch.randn(5, 16)
    torch.testing.assert_close(last(x), F.linear(F.normalize(x), last.weight, last.bias))
    with pytest.raises(ValueError, match='no nn.Linear'): add_l2norm(nn.Conv2d(3, 3, 3))
