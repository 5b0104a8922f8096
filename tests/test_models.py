"The networks: values and sizes equal networks written out plainly, and a Learner can do everything with them."
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from conftest import blob_learner, blobs
from fastai_lp.experiments.models import ConvNet13, WNConv2d, WNL2Linear, WNLinear, resnet18_84, small_convnet
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.layers import L2Linear, add_l2norm, find_classifier, find_feature_layer
from fastai_lp.learner.mean_teacher import MeanTeacherCallback, teacher_in_place

CONVS = [(3, 128, 3, 1), (128, 128, 3, 1), (128, 128, 3, 1), (128, 256, 3, 1), (256, 256, 3, 1), (256, 256, 3, 1),
    (256, 512, 3, 0), (512, 256, 1, 0), (256, 128, 1, 0)]
both = pytest.mark.parametrize('make, size', [(ConvNet13, 12), (resnet18_84, 84)], ids=['13', 'resnet'])


def images(n=4, size=12, seed=0): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
def n_params(m): return sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize('make, plain, x', [
    (lambda: WNConv2d(3, 8, 3, padding=1, bias=False), lambda: nn.Conv2d(3, 8, 3, padding=1, bias=False), images()),
    (lambda: WNLinear(6, 5), lambda: nn.Linear(6, 5), torch.randn(7, 6)),
    (lambda: WNL2Linear(6, 5), lambda: L2Linear(6, 5), torch.randn(7, 6))], ids=['conv', 'linear', 'l2'])
def test_weight_normalization_equals_torchs(make, plain, x):
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    init = plain()
    torch.testing.assert_close(ours.weight, init.weight)
    ref = weight_norm(init)
    opts = [torch.optim.SGD(m.parameters(), lr=.1, weight_decay=.01) for m in (ours, ref)]
    for _ in range(5):
        for m, opt in zip((ours, ref), opts):
            opt.zero_grad()
            m(x).square().mean().backward()
            opt.step()
    torch.testing.assert_close(ours(x), ref(x))
    torch.testing.assert_close(ours.weight_g, ref.parametrizations.weight.original0)
    torch.testing.assert_close(ours.weight_v, ref.parametrizations.weight.original1)
    assert {n for n, _ in ours.named_parameters()} - {'bias'} == {'weight_g', 'weight_v'}


def reference13(net, x, l2):
    "The 13-layer network written out with torch's own weight_norm, in evaluation mode, with the weights of `net`"
    def normed(plain, layer):
        ref = weight_norm(plain)
        ref.parametrizations.weight.original0.data = layer.weight_g.data
        ref.parametrizations.weight.original1.data = layer.weight_v.data
        return ref
    convs, norms = ([m for m in net.body.modules() if isinstance(m, t)] for t in (nn.Conv2d, nn.BatchNorm2d))
    assert len(convs) == len(norms) == len(CONVS)
    for i, ((n_in, n_out, ks, pad), conv, norm) in enumerate(zip(CONVS, convs, norms)):
        x = normed(nn.Conv2d(n_in, n_out, ks, padding=pad, bias=False), conv)(x)
        x = F.leaky_relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias), .1)
        if i in (2, 5): x = F.max_pool2d(x, 2)
    x, head = x.mean((2, 3)), nn.Linear(128, 10)
    head.bias.data = net.head1.bias.data
    return normed(head, net.head1)(x/x.norm(dim=1, keepdim=True) if l2 else x)


@pytest.mark.parametrize('l2', [True, False])
def test_convnet13_equals_the_network_written_out(l2):
    torch.manual_seed(0)
    net = ConvNet13(10, l2=l2)
    net(images(8, 16))  # BatchNorm statistics differ from the initial ones
    with torch.no_grad():
        for p in net.parameters(): p += .1*p.abs().mean()*torch.randn_like(p)
        torch.testing.assert_close(net.eval()(images(2, 32)), reference13(net, images(2, 32), l2))


@pytest.mark.parametrize('c, dual, n_in', [(100, True, 3), (7, False, 1)])
def test_convnet13_number_of_parameters(c, dual, n_in):
    "A convolution has v, g and two of BatchNorm; a head has v, g and bias"
    convs = [(n_in, *CONVS[0][1:]), *CONVS[1:]]
    expected = sum(i*o*k*k + o + 2*o for i, o, k, _ in convs) + (1+dual)*(128*c + c + c)
    assert n_params(ConvNet13(c, dual=dual, n_in=n_in)) == expected


@pytest.mark.parametrize('size', [12, 40])
def test_convnet13_takes_images_of_any_size(size):
    net = ConvNet13(5, n_in=1).eval()
    assert net(torch.randn(2, 1, size, size)).shape == (2, 5)


def test_convnet13_has_dropout_in_training_only():
    net, x = ConvNet13(5), images(2, 32)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [.5, .5]


def test_convnet13_keeps_the_order_of_its_random_weights():
    torch.manual_seed(3)
    convs = [nn.Conv2d(i, o, k, bias=False) for i, o, k, _ in CONVS]
    heads = [nn.Linear(128, 5) for _ in range(2)]
    torch.manual_seed(3)
    net = ConvNet13(5, dual=True)
    ours = [m for m in net.body.modules() if isinstance(m, nn.Conv2d)]
    for a, b in zip([*ours, net.head2, net.head1], convs+heads): torch.testing.assert_close(a.weight, b.weight)


def test_resnet18_84_has_the_papers_stem_and_initialization():
    torch.manual_seed(0)
    net = resnet18_84(64)
    assert (net.body.conv1.kernel_size, net.body.conv1.stride) == ((7, 7), (2, 2))
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):  # Kaiming, fan-out
        assert conv.weight.std().item() == pytest.approx((2/(conv.out_channels*conv.kernel_size[0]**2))**.5, rel=.05)
    def block(i, o): return (i*o + o*o)*9 + 4*o + (i*o + 2*o if i != o else 0)
    blocks = sum(block(i, o) + block(o, o) for i, o in ((64, 64), (64, 128), (128, 256), (256, 512)))
    assert n_params(net) == 3*64*49 + 2*64 + blocks + 513*64


@pytest.mark.parametrize('l2', [True, False])
def test_small_convnet_takes_any_width(l2):
    for width in (8, 32):
        net = small_convnet(5, n_in=3, width=width, l2=l2)
        assert net(images()).shape == (4, 5)
        assert find_feature_layer(net, 5) == (net[-1], True)
        assert net[-1].in_features == 2*width
        assert isinstance(net[-1], L2Linear) == l2


@pytest.mark.parametrize('head', [WNL2Linear(8, 5), ConvNet13(5).head1, resnet18_84(5).head1], ids=['wn', '13', 'resnet'])
def test_l2_heads_use_the_direction_of_the_features_only(head):
    v = torch.randn(3, head.in_features)
    torch.testing.assert_close(head(v), head(7*v))
    torch.testing.assert_close(head(v), F.linear(v/v.norm(dim=1, keepdim=True), head.weight, head.bias))


@both
def test_two_heads(make, size):
    net, x = make(5, dual=True), images(size=size)
    one, two = net(x)
    assert one.shape == two.shape == (4, 5)
    assert not torch.equal(one, two)
    net.eval()
    assert torch.equal(net(x), net.head1(net.body(x)))
    assert find_classifier(net, 5) is net.head1
    assert find_feature_layer(net, 5) == (net.head1, True)
    single = make(5)
    assert single.head2 is None
    left = single.load_state_dict(net.state_dict(), strict=False)
    assert not left.missing_keys
    assert {o.split('.')[0] for o in left.unexpected_keys} == {'head2'}
    assert torch.equal(single.eval()(x), net(x))


@both
def test_gradients_reach_every_parameter(make, size):
    torch.manual_seed(0)
    net, x = make(5, dual=True), images(2, size)
    sum(F.cross_entropy(o, torch.arange(len(x))) for o in net(x)).backward()
    for p in net.parameters():
        assert torch.isfinite(p.grad).all()
        assert p.grad.abs().sum() > 0


def inputs_of(layer, net, x):
    seen = []
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize('make', [lambda: ConvNet13(5, l2=False), lambda: resnet18_84(5, l2=False), lambda: small_convnet(5, n_in=3)],
    ids=['13', 'resnet', 'small'])
def test_add_l2norm_gives_the_network_with_l2(make):
    net, x = make().eval(), images(size=32)
    keys, opt, head = list(net.state_dict()), torch.optim.SGD(net.parameters(), lr=.1), find_classifier(net, 5)
    with torch.no_grad(): feats, plain = inputs_of(head, net, x), net(x)
    assert add_l2norm(net, 5) is net
    assert find_classifier(net, 5) is head
    assert isinstance(head, L2Linear)
    torch.testing.assert_close(net(x), F.linear(F.normalize(feats), head.weight, head.bias))
    assert not torch.allclose(net(x), plain)
    assert list(net.state_dict()) == keys
    assert {id(p) for p in net.parameters()} == {id(p) for p in opt.param_groups[0]['params']}
    for o in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))): assert torch.equal(o(x), net(x))


def test_add_l2norm_refuses_a_weight_it_does_not_know():
    with pytest.raises(ValueError, match='ParametrizedLinear'): add_l2norm(nn.Sequential(weight_norm(nn.Linear(4, 3))))


@both
def test_copies_are_equal_and_independent(make, size, tmp_path):
    net, x = make(5, dual=True), images(2, size)
    net(x)[0].sum().backward()  # also after a step
    before = net.eval()(x)
    torch.save(net.state_dict(), tmp_path/'weights.pth')
    loaded = make(5, dual=True).eval()
    loaded.load_state_dict(torch.load(tmp_path/'weights.pth', weights_only=True))
    for o in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), loaded):
        assert torch.equal(o(x), before)
        with torch.no_grad(): find_classifier(o, 5).bias.add_(1)
        torch.testing.assert_close(o(x), before+1)
    assert torch.equal(net(x), before)


@both
def test_bfloat16_and_channels_last(make, size):
    torch.manual_seed(0)
    net, x = make(5, dual=True), images(4, size)
    net(x)
    ref = net.eval()(x)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), ref, atol=1e-4, rtol=1e-4)
    with torch.autocast('cpu', torch.bfloat16):
        out = net(x)
        net.train()(x)[0].float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert (out.float()-ref).abs().max() < .05*ref.abs().max()
    grad = next(p for p in net.parameters() if p.ndim == 4).grad
    assert grad.dtype == torch.float32
    assert torch.isfinite(grad).all()


class FirstHead(Callback):
    def after_pred(self):
        if isinstance(self.pred, tuple): self.learn.pred = self.pred[0]


def image_learner(tmp_path, model, cbs=None):
    data = blobs(n=48, d=3*12*12, per_class=4, n_valid=12)
    data.x = data.x.view(-1, 3, 12, 12)
    set_seed(0)
    return blob_learner(data, model=model(), path=tmp_path, cbs=cbs)


@pytest.mark.parametrize('make, d, dual', [(ConvNet13, 128, True), (resnet18_84, 512, False)], ids=['13', 'resnet'])
def test_fit_features_and_export(make, d, dual, tmp_path):
    learn = image_learner(tmp_path, lambda: make(3, dual=dual), FirstHead() if dual else None)
    learn.fit(2, 1e-3, cbs=LPCallback(k=5))
    assert learn.lp_record.pseudo.reached.all()
    learn.remove_cb(FirstHead)  # not needed in evaluation mode
    assert learn.get_preds()[0].shape == (12, 3)
    found, net = Extractor()(learn), learn.model.eval()
    x = torch.stack([o[0] for o in learn.dls.train_ds])
    assert found.feats.shape == (36, d)
    with torch.no_grad():
        torch.testing.assert_close(found.feats, F.normalize(net.body(x)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.logits, net.head1(net.body(x)), atol=1e-5, rtol=1e-5)
        learn.export('net.pkl')
        torch.testing.assert_close(load_learner(tmp_path/'net.pkl').model.eval()(x), net(x))


@pytest.mark.parametrize('make, lp', [(ConvNet13, True), (resnet18_84, False)], ids=['13', 'resnet'])
def test_mean_teacher_trains_both_heads(make, lp, tmp_path):
    learn = image_learner(tmp_path, lambda: make(3, l2=False, dual=True))
    first = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(2, 1e-3, cbs=[MeanTeacherCallback(rampup=0), *([LPCallback(k=5)] if lp else [])])
    teacher = learn.mt_record.teacher
    assert isinstance(teacher, type(learn.model))
    assert learn.mt_record.step == 2*len(learn.dls.train)
    for net in (learn.model, teacher):
        for name in ('head1.bias', 'head2.bias'): assert not torch.equal(net.state_dict()[name], first[name])
    preds = learn.get_preds()[0]
    with teacher_in_place(learn):
        assert not torch.allclose(learn.get_preds()[0], preds)
        learn.export('teacher.pkl')
    x = torch.stack([o[0] for o in learn.dls.valid_ds])
    with torch.no_grad(): torch.testing.assert_close(load_learner(tmp_path/'teacher.pkl').model.eval()(x), teacher.eval()(x))
