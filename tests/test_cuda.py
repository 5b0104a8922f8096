"On a CUDA GPU: the same results as on the CPU, and every way to train. Skipped without one."
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from conftest import blobs, quiet
from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import ImageArrays
from fastai_lp.experiments.models import TwoHeads, small_convnet
from fastai_lp.experiments.splits import show_labels
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.fixmatch import FixMatchCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.transductive.diffusion import diffuse
from fastai_lp.transductive.graph import affinity, normalize
from fastai_lp.transductive.labelers import GTG, Diffusion, NetworkPrediction
from fastai_lp.transductive.neighbors import knn
from fastai_lp.transductive.propagate import seed_matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def problem(n=3000):
    data = blobs(n=n, d=16, c=5, n_valid=0, spread=1.)
    y = torch.tensor([-1 if o is None else o for o in data.labels])
    return F.normalize(data.x), y, data.truth


@pytest.mark.parametrize('chunk_bytes', [2**28, 2**16])
def test_neighbors(chunk_bytes):
    x, *_ = problem()
    sims, idxs = knn(x, 20)
    found, numbers = knn(x.cuda(), 20, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(found.cpu(), sims, atol=2e-6, rtol=0)
    assert (numbers.cpu() == idxs).float().mean() > .999  # rounding can exchange two neighbors


@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_graph_and_diffusion(dtype, close):
    x, y, _ = problem()
    sims, idxs = knn(x, 20)
    W, on = affinity(sims.to(dtype), idxs), affinity(sims.cuda().to(dtype), idxs.cuda())
    assert torch.equal(W.crow_indices(), on.crow_indices().cpu())
    assert torch.equal(W.col_indices(), on.col_indices().cpu())
    torch.testing.assert_close(on.values().cpu(), W.values(), rtol=1e-6, atol=0)
    Y = seed_matrix(y, 5).to(dtype)
    Z, expected = diffuse(normalize(on)[0], Y.cuda(), max_iter=200).Z.cpu(), diffuse(normalize(W)[0], Y, max_iter=200).Z
    assert (Z-expected).norm()/expected.norm() < close


@pytest.mark.parametrize('labeler', [Diffusion(), Diffusion(balance='sinkhorn', temperature=.5), Diffusion(keep_Z=False),
    NetworkPrediction(), GTG()], ids=str)
def test_labelers(labeler):
    x, y, truth = problem()
    logits = 3*F.one_hot(truth, 5) + torch.randn(len(x), 5, generator=torch.Generator().manual_seed(0))
    p, on = labeler(x, logits, y), labeler(x.cuda(), logits.cuda(), y.cuda())
    assert on.labels.device.type == 'cuda'
    assert (on.labels.cpu() == p.labels).float().mean() > .999
    torch.testing.assert_close(on.weights.cpu(), p.weights, rtol=.01, atol=.01)


CALLBACKS = dict(lp=lambda: [LPCallback()], strong=lambda: [LPCallback.strong()], fixmatch=lambda: [FixMatchCallback()],
    teacher=lambda: [MeanTeacherCallback(), LPCallback()], network=lambda: [LPCallback(NetworkPrediction())])


@pytest.mark.parametrize('method', CALLBACKS)
def test_training(method):
    truth = torch.arange(660) % 3
    x = 60*torch.rand(660, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 90*F.one_hot(truth, 3)[:, :, None, None]
    images = show_labels(ImageArrays(x.to(torch.uint8), truth.numpy(), *torch.arange(660).split([600, 60])), 12)
    set_seed(0)
    dls = image_dls(images, bs=32, device='cuda')
    model = TwoHeads(small_convnet(3, n_in=3, width=8)[:-1], 16, 3) if method == 'teacher' else small_convnet(3, n_in=3, width=8)
    learn = quiet(Learner(dls, model, metrics=accuracy))
    learn.fit(4, 1e-2, cbs=CALLBACKS[method]())
    assert next(learn.model.parameters()).device.type == 'cuda'
    assert learn.validate()[1] > .9
