"Where the features of a model are, and that extracting them changes nothing."
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.vision.learner import create_timm_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import resnet18

from conftest import blob_learner, blob_model, blobs
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.layers import L2Linear, add_l2norm, find_classifier, find_feature_layer
from fastai_lp.experiments.models import small_convnet


@pytest.mark.parametrize('make, d', [
    (lambda: create_vision_model(resnet18, 4, pretrained=False), 1024),
    (lambda: create_vision_model(resnet18, 4, pretrained=False, concat_pool=False), 512),
    (lambda: create_timm_model('resnet18', 4, pretrained=False)[0], 1024),
    (lambda: xresnet18(n_out=4), 512),
    (lambda: resnet18(num_classes=4), 512),
    (lambda: create_timm_model('test_vit', 4, pretrained=False, img_size=64)[0], 64),  # a transformer that pools by itself
])
def test_features_of_common_models(make, d):
    model = make().eval()
    module, is_input = find_feature_layer(model, 4)
    seen = []
    hook = module.register_forward_hook(lambda m, i, o: seen.append(i[0] if is_input else o))
    model(torch.randn(2, 3, 64, 64))
    hook.remove()
    assert seen[0].flatten(1).shape == (2, d)


def test_features_of_a_layer():
    learn = blob_learner()
    full = Extractor()(learn)
    learn.model.eval()
    x = blobs().x[:120]
    torch.testing.assert_close(full.feats, F.normalize(learn.model[:4](x)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full.logits, learn.model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Extractor('0')(learn).feats, F.normalize(learn.model[0](x)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Extractor(learn.model[2])(learn, dl=learn.dls.valid).feats, F.normalize(learn.model[:3](blobs().x[120:])), rtol=1e-4, atol=1e-5)


def test_extraction_does_not_augment():
    from fastai.data.core import Datasets
    from fastai.vision.augment import RandTransform
    from conftest import Look
    from fastai_lp.learner.data import SemiCategorize
    class Noise(RandTransform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + torch.randn_like(x) if x.is_floating_point() else x
    data = blobs()
    dsets = Datasets(range(150), [[Look(data.x), Noise()], [Look(data.labels), SemiCategorize()]], splits=[list(range(120)), list(range(120, 150))])
    learn = Learner(dsets.semi_dataloaders(bs=16, num_workers=0, device='cpu', after_batch=[Noise()]), blob_model())
    a, b = Extractor()(learn), Extractor()(learn)
    learn.model.eval()
    torch.testing.assert_close(a.logits, learn.model(data.x[:120]), rtol=1e-4, atol=1e-5)
    assert torch.equal(a.feats, b.feats)
    x = torch.cat([b[0] for b in learn.dls.train])                                    # but training does
    assert torch.cdist(x, data.x).min(1).values.min() > .1


def test_l2_layer_keeps_parameters_optimizer_and_state():
    learn = blob_learner()
    learn.create_opt()
    keys, weight = list(learn.model.state_dict()), learn.model[-1].weight
    assert add_l2norm(learn.model, 3) is learn.model and add_l2norm(learn.model) is learn.model
    assert isinstance(learn.model[-1], L2Linear) and learn.model[-1].weight is weight and list(learn.model.state_dict()) == keys
    learn.fit(1, 1e-1)
    x = torch.randn(5, 16)
    torch.testing.assert_close(learn.model[-1](x), F.linear(F.normalize(x), learn.model[-1].weight, learn.model[-1].bias))
    assert find_classifier(learn.model, 3) is learn.model[-1]
    with pytest.raises(ValueError, match='no nn.Linear'): add_l2norm(nn.Conv2d(3, 3, 3))


def test_layer_with_a_wrong_shape():
    learn = blob_learner(model=nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Identity(), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(ValueError, match='expected \\[batch, d\\]'): Extractor('1')(learn)
    with pytest.raises(ValueError, match='is not in the model'): Extractor('head')(learn)


def test_features_of_augmented_items():
    learn = Learner(digits_dls(digits(20)), small_convnet(10))
    clean = Extractor()(learn).feats
    a, b = (Extractor(augment=True)(learn).feats for _ in range(2))
    assert torch.equal(clean, Extractor()(learn).feats)
    assert torch.equal(a, b)  # the random state is as it was
    assert ((a-clean).norm(dim=1) > 0).float().mean() > .99
    assert (a*clean).sum(1).mean() > .8
