"""Every common fastai habit with `LPCallback` in place: a function per habit, an entry of `LEARNERS` per way to make a Learner.

Each habit is tried with each Learner, but for the pairs of `CANNOT`, which plain fastai refuses as well."""
import math
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.block import DataBlock
from fastai.data.transforms import CategoryMap, ColReader, ColSplitter
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.losses import LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.tabular.core import Categorify, FillMissing, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.text.data import TextBlock
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.torch_core import params, set_seed, trainable_params
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import TensorImage
from fastai.vision.learner import vision_learner
from fastcore.basics import noop
from torchvision.models import resnet18

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategoryBlock, TwoStream, semi_dls, targets_of
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.experiments.datasets import digits, digits_folder
from fastai_lp.learner.features import find_classifier
from fastai_lp.transductive.labelers import Diffusion


pytestmark = pytest.mark.filterwarnings('ignore')  # of networks that have seen next to nothing, and of precision that a CPU does not have


# The Learners, each with a few of the items that its `predict` takes, those of its validation set

NAMES = np.array(['ham', 'eggs', 'spam'])
CLASS = np.arange(84) % 3
VALID = list(range(60, 84))


def labels(hide): return [NAMES[c] if not hide or i < 12 or i in VALID else None for i, c in enumerate(CLASS)]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A few zeros, ones and twos"
    path, truth, room = digits_folder(tmp_path_factory.mktemp('images'), labels=40), digits().truth, dict(train=12, unsup=16, valid=12)
    for f in sorted(path.rglob('*.png')):
        part = f.relative_to(path).parts[0]
        if truth[int(f.stem)] < 3 and room[part]: room[part] -= 1
        else: f.unlink()
    return path


def of_images(arch, images, **kwargs):
    dls = SemiImageDataLoaders.from_folder(images, item_tfms=Resize(32), batch_tfms=aug_transforms(size=32, do_flip=False), bs=16, num_workers=0, device='cpu')
    return vision_learner(dls, arch, pretrained=False, metrics=accuracy, **kwargs), list(dls.valid_ds.items)


def of_tensors(images, hide=True, **kwargs):
    data = blobs()
    return blob_learner(data, labels=data.labels if hide else data.truth.tolist(), two_stream=hide, **kwargs), list(range(120, 150))


@cache
def table(hide):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(rng.normal(size=(84, 4)) + 2*CLASS[:, None], columns=list('wxyz'))
    df.loc[5, 'w'] = np.nan
    return df.assign(kind=rng.choice(['p', 'q'], 84), meal=pd.Series(labels(hide), dtype=object))


def of_a_table(images, hide=True, y_block=None, two_streams=True, **kwargs):
    dls = TabularDataLoaders.from_df(table(hide), procs=[Categorify, FillMissing, Normalize], cat_names=['kind'], cont_names=list('wxyz'),
        y_names='meal', y_block=y_block, valid_idx=VALID, bs=16, device='cpu')
    learn = tabular_learner(semi_dls(dls) if hide and two_streams else dls, layers=[16], metrics=accuracy, **kwargs)
    return learn, [row for _, row in table(hide).iloc[VALID].iterrows()]


@cache
def texts(hide):
    "Of 1 to 5 times `seq_len` tokens (the first says that a text begins): other lengths fastai pads so that what is read depends on the batch"
    rng, common = np.random.default_rng(0), 'the of and to in was'.split()
    words = dict(ham='ridge pine leaf stone'.split(), eggs='tide foam gull sail'.split(), spam='lamp desk shelf chair'.split())
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(words[NAMES[c]] + common, 8*rng.integers(1, 6)-1)) for c in CLASS], label=labels(hide)))
    df['valid'] = df.index.isin(VALID)
    block = DataBlock(blocks=(TextBlock.from_df('text', seq_len=8, min_freq=1, n_workers=0), SemiCategoryBlock), get_x=ColReader('text'),
        get_y=ColReader('label'), splitter=ColSplitter('valid'))
    return block.dataloaders(df, bs=16, num_workers=0, device='cpu', seq_len=8), df.text[df.valid].tolist()


def of_texts(images, hide=True, **kwargs):
    dls, items = texts(hide)
    config = awd_lstm_clas_config | dict(emb_sz=12, n_hid=16, n_layers=2)
    return text_classifier_learner(semi_dls(dls) if hide else dls, AWD_LSTM, pretrained=False, config=config, seq_len=8, metrics=accuracy, **kwargs), items


LEARNERS = dict(vision_learner=partial(of_images, resnet18), timm=partial(of_images, 'test_efficientnet'), Learner=of_tensors,
    tabular_learner=of_a_table, tabular_learner_one_stream=partial(of_a_table, y_block=SemiCategoryBlock, two_streams=False),
    text_classifier_learner=of_texts)


class Make:
    "Makes Learners of one kind, and looks in the end whether they are as they were"
    def __init__(self, kind, images, path): self.kind, self.images, self.path, self.made = kind, images, path, []

    def __call__(self, **kwargs):
        set_seed(0, reproducible=True)
        learn, self.items = LEARNERS[self.kind](images=self.images, path=self.path, **kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        self.made.append((learn, learn.loss_func))
        return learn

    def fitted(self):
        "A Learner that has been trained for an epoch, and keeps its callback"
        learn = self(cbs=LPCallback())
        learn.fit(1)
        return learn

    def leaves_no_trace(self):
        for learn, loss in self.made:
            assert learn.loss_func is loss and learn.metrics.attrgot('name') == ['accuracy'] and '_with_events' not in vars(learn)
            assert 'get_idxs' not in vars(learn.dls.train) and not getattr(learn.dls.train, 'labeled_only', False)
            last = find_classifier(learn.model, learn.dls.c)
            assert not last._forward_hooks and not last._forward_pre_hooks


# What the habits ask

def labeled_all(learn, cb, epochs):
    "The callback renewed the pseudo-labels of every item at these epochs"
    p, n, y = cb.record.pseudo, len(learn.dls.train_ds), targets_of(learn.dls.train)
    assert learn.lp_record is cb.record and [h['epoch'] for h in cb.record.history] == list(epochs)
    assert p.labels.shape == p.weights.shape == (n,) and p.labels.min() >= 0 and p.labels.max() < learn.dls.c
    assert torch.isfinite(p.weights).all() and p.weights.max() > 0 and all(math.isfinite(o) for o in learn.recorder.losses)
    assert torch.equal(p.labels[y >= 0], y[y >= 0]) and p.labeled.sum() == (y >= 0).sum() < n


@contextmanager
def inference(learn):
    "Nothing is trained, and no graph built"
    before, history = flat_weights(learn), len(learn.lp.record.history)
    yield
    assert torch.equal(flat_weights(learn), before) and len(learn.lp.record.history) == history and learn.lp_record is learn.lp.record


def column(learn, name): return [dict(zip(learn.recorder.metric_names[1:], v))[name] for v in learn.recorder.values]


def names(learn): return learn.dls.vocab[-1] if isinstance(learn.dls.vocab[-1], CategoryMap) else learn.dls.vocab


def correct(preds, targs): return (preds.argmax(1) == targs.flatten()).float().mean().item()


def entropies(preds, targs):
    targs = targs.flatten().long()
    return -preds[range(len(targs)), targs.clamp(min=0)].log()*(targs >= 0)


def shown(show):
    "All that a person sees: the titles of the images, or the table"
    tables = []
    plt.close('all')
    with patch('IPython.display.display', lambda o: tables.append(o.data)): show()
    return '\n'.join(tables + [ax.get_title() for i in plt.get_fignums() for ax in plt.figure(i).axes])


class Spy(Callback):
    "What reaches the loss in training, and what comes out of it"
    order, run_valid = 100, False
    def before_fit(self): self.batches = []
    def after_pred(self): self.seen = self.learn.pred.detach().clone(), self.learn.yb[0].clone()
    def after_loss(self): self.batches.append((*self.seen, self.learn.loss.item(), self.learn.yb[0].clone()))


class Steps(Callback):
    "The norm of the gradient at each step of the optimizer"
    order = 100
    def before_fit(self): self.norms = []
    def after_step(self): self.norms.append(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item())


HABITS = {}
def habit(f): return HABITS.setdefault(f.__name__, f)


# Ways to train

@habit
def fit(make):
    learn, cb = make(), LPCallback()
    before = flat_weights(learn)
    learn.fit(2, cbs=cb)
    labeled_all(learn, cb, [0, 1])
    assert not torch.equal(flat_weights(learn), before)
    assert list(learn.recorder.metric_names) == 'epoch train_loss valid_loss accuracy lp_certainty lp_sec time'.split()
    assert column(learn, 'lp_certainty') == [h['certainty'] for h in cb.record.history] and min(column(learn, 'lp_sec')) > 0


@habit
def fit_one_cycle(make):
    learn, cb = make(), LPCallback()
    learn.fit_one_cycle(2, 1e-3, cbs=cb)
    labeled_all(learn, cb, [0, 1])
    lrs = learn.recorder.lrs
    assert len(lrs) == 2*len(learn.dls.train) and lrs[0] == pytest.approx(1e-3/25) and max(lrs) == pytest.approx(1e-3, rel=.1) and lrs[-1] < max(lrs)/2


@habit
def fine_tune(make):
    learn, cb = make(), LPCallback(warmup=1)
    learn.fine_tune(2, cbs=cb)
    labeled_all(learn, cb, [1, 2])
    assert learn.opt.frozen_idx == 0


@habit
def freeze_unfreeze(make):
    learn, cb = make(), LPCallback()
    last = find_classifier(learn.model, learn.dls.c)
    if learn.splitter is trainable_params:
        learn.splitter = lambda m: [[p for p in params(m) if not any(p is q for q in params(last))], params(last)]
    learn.freeze()
    frozen = [p for p in learn.model.parameters() if not p.requires_grad]
    body, head = [p.detach().clone() for p in frozen], last.weight.detach().clone()
    learn.fit(1, cbs=cb)
    assert body and all(torch.equal(p, q) for p, q in zip(frozen, body)) and not torch.equal(last.weight, head)
    learn.unfreeze()
    learn.fit(1, cbs=cb)
    labeled_all(learn, cb, [0, 1])
    assert not all(torch.equal(p, q) for p, q in zip(frozen, body))


@habit
def lr_find(make):
    learn = make(cbs=LPCallback())
    before = flat_weights(learn)
    found = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 < found.valley < 10 and torch.equal(flat_weights(learn), before) and not learn.lp.record.history
    learn.fit(1, found.valley)
    labeled_all(learn, learn.lp, [0])


@habit
def start_epoch(make):
    learn, cb = make(), LPCallback()
    learn.fit_one_cycle(3, 1e-3, cbs=cb, start_epoch=2)
    labeled_all(learn, cb, [2])
    assert len(learn.recorder.lrs) == len(learn.dls.train) and max(learn.recorder.lrs) < 1e-3


@habit
def short_epoch(make):
    learn, cb, spy = make(), LPCallback(), Spy()
    learn.fit(2, cbs=[cb, spy, ShortEpochCallback(0)])
    labeled_all(learn, cb, [0, 1])
    assert len(spy.batches) == 2 < 2*len(learn.dls.train)


# Precision, mixing, losses and steps

def trained_in(make, amp, dtype, *cbs):
    learn, found, dtypes = make(), [], set()
    def labeler(feats, logits, y):
        found.extend([feats, logits])
        return Diffusion()(feats, logits, y)
    def note(m, args, out):
        if m.training: dtypes.add(out.dtype)
    amp(learn)
    cb = LPCallback(labeler)
    hook = find_classifier(learn.model, learn.dls.c).register_forward_hook(note)
    learn.fit(1, cbs=[cb, *cbs])
    hook.remove()
    labeled_all(learn, cb, [0])
    assert dtypes == {dtype} and len(found) == 2 and all(o.dtype == torch.float32 and torch.isfinite(o).all() for o in found)
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())


@habit
def to_fp16(make): trained_in(make, lambda learn: learn.to_fp16(), torch.float32)  # fastai's autocast('cuda') asks nothing of a CPU


class OnCPU(MixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)


@habit
def bf16(make): trained_in(make, lambda learn: learn.add_cb(OnCPU('bf16')), torch.bfloat16, ShortEpochCallback(0))  # a step can take 10 s


def mixed(make, cb):
    learn, lp, spy = make(), LPCallback(), Spy()
    learn.fit(1, cbs=[lp, cb, spy])
    labeled_all(learn, lp, [0])
    most = lp.record.pseudo.weights.max()
    for pred, target, loss, hard in spy.batches:
        assert target.shape == pred.shape and target.min() >= 0 and target.sum(1).max() <= most*(1+1e-5) and math.isfinite(loss)
        assert not hard.is_floating_point()
    assert max((target > 0).sum(1).max() for _, target, *_ in spy.batches) == 2


@habit
def mixup(make): mixed(make, MixUp())


@habit
def cutmix(make): mixed(make, CutMix())


@habit
def beyond_the_paper(make):
    "The preset, and more of what goes beyond the paper; what is no image keeps its inputs, with a warning"
    learn, cb, spy = make(), LPCallback.strong(ema=.9, steps=2, unlabeled_views=2 if isinstance(make().dls.train, TwoStream) else 1, min_labeled=1), Spy()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1, cbs=[cb, spy])
    images = any(isinstance(o, TensorImage) for o in learn.dls.train.one_batch())
    assert images == (not any('strong_tfms=True is for images' in str(o.message) for o in said))
    p = cb.record.pseudo
    most = max(p.weights.max(), 1)
    for pred, target, loss, hard in spy.batches: assert target.shape == pred.shape and target.min() >= 0 and math.isfinite(loss) and not hard.is_floating_point()
    learn.validate()


@habit
def label_smoothing(make):
    learn, cb, spy = make(loss_func=LabelSmoothingCrossEntropyFlat()), LPCallback(), Spy()
    learn.fit(1, cbs=[cb, spy])
    labeled_all(learn, cb, [0])
    smooth = LabelSmoothingCrossEntropy(reduction='none')
    for pred, target, loss, hard in spy.batches:
        assert loss == pytest.approx((target.sum(1)*smooth(pred, hard.flatten().long())).mean().item(), rel=1e-4)


@habit
def gradient_accumulation(make):
    learn, cb, steps = make(), LPCallback(), Steps()
    learn.fit(2, cbs=[cb, GradientAccumulation(32), steps])
    labeled_all(learn, cb, [0, 1])
    assert len(steps.norms) == len(learn.recorder.losses)//2 > 0


@habit
def gradient_clip(make):
    learn, cb, steps = make(), LPCallback(), Steps()
    learn.fit(1, cbs=[cb, GradientClip(1e-3), steps])
    labeled_all(learn, cb, [0])
    assert len(steps.norms) == len(learn.dls.train) and max(steps.norms) <= 1e-3*(1+1e-4)


# What watches a fit, and what is kept of it

@habit
def save_model(make):
    learn, cb = make(), LPCallback()
    learn.fit(3, 1e-2, cbs=[cb, SaveModelCallback(fname='best')])
    labeled_all(learn, cb, [0, 1, 2])
    best, saved = min(column(learn, 'valid_loss')), torch.load(learn.path/'models'/'best.pth')
    assert learn.validate()[0] == pytest.approx(best, rel=1e-4)
    assert all(torch.equal(v, saved[k]) for k, v in learn.model.state_dict().items())


@habit
def early_stopping(make):
    learn, cb = make(), LPCallback()
    learn.fit(5, cbs=[cb, EarlyStoppingCallback(min_delta=100)])
    labeled_all(learn, cb, [0, 1])
    make.leaves_no_trace()
    learn.fit(1, cbs=cb)
    labeled_all(learn, cb, [0, 1, 2])


@habit
def reduce_lr_on_plateau(make):
    learn, cb = make(), LPCallback()
    learn.fit(3, 1e-3, cbs=[cb, ReduceLROnPlateau(min_delta=100)])
    labeled_all(learn, cb, [0, 1, 2])
    assert learn.recorder.lrs[::len(learn.dls.train)] == pytest.approx([1e-3, 1e-3, 1e-4])


@habit
def csv_logger(make):
    learn, cb = make(), LPCallback()
    learn.fit(2, cbs=[cb, CSVLogger()])
    df = pd.read_csv(learn.path/'history.csv')
    assert list(df) == list(learn.recorder.metric_names) and df.epoch.tolist() == [0, 1]
    assert df.lp_certainty.tolist() == pytest.approx([h['certainty'] for h in cb.record.history]) and (df.lp_sec > 0).all()


@habit
def train_metrics(make):
    learn, cb, spy = make(), LPCallback(), Spy()
    learn.recorder.train_metrics = True
    learn.fit(1, cbs=[cb, spy])
    labeled_all(learn, cb, [0])
    train = correct(*(torch.cat([b[i] for b in spy.batches]) for i in (0, 3)))
    assert [column(learn, 'train_accuracy'), column(learn, 'valid_accuracy')] == [pytest.approx([o]) for o in (train, correct(*learn.get_preds()))]


@habit
def plot_loss(make):
    learn = make()
    learn.fit(2, cbs=LPCallback())
    plt.close('all')
    train, valid = learn.recorder.plot_loss(skip_start=0).lines
    assert len(train.get_ydata()) == 2*len(learn.dls.train) and list(valid.get_ydata()) == column(learn, 'valid_loss')


@habit
def save_load(make):
    learn = make.fitted()
    preds = learn.get_preds()[0]
    learn.save('here')
    learn.fit(1, 1e-2)
    assert not torch.equal(learn.get_preds()[0], preds)
    learn.load('here')
    assert torch.equal(learn.get_preds()[0], preds)
    learn.fit(1)
    labeled_all(learn, learn.lp, [0, 1, 2])


# Inference, with the callback still there

@habit
def get_preds(make):
    learn = make.fitted()
    with inference(learn):
        preds, targs = learn.get_preds()
        assert preds.shape == (len(learn.dls.valid_ds), 3) and targs.min() >= 0 and torch.allclose(preds.sum(1), torch.ones(len(preds)))
        train, given, losses = learn.get_preds(ds_idx=0, with_loss=True)
        assert torch.equal(given.flatten().clamp(min=-1).long(), targets_of(learn.dls.train))
        torch.testing.assert_close(losses.flatten(), entropies(train, given), rtol=1e-4, atol=1e-5)
    learn.remove_cb(LPCallback)
    assert torch.equal(learn.get_preds()[0], preds)


@habit
def validate(make):
    learn = make.fitted()
    seen = column(learn, 'valid_loss') + column(learn, 'accuracy')
    with inference(learn):
        assert learn.validate() == seen
        preds, targs = learn.get_preds()
        assert seen == pytest.approx([entropies(preds, targs).mean().item(), correct(preds, targs)], rel=1e-4)


@habit
def predict(make):
    learn = make.fitted()
    with inference(learn):
        for item, probs in zip(make.items[:3], learn.get_preds()[0]):
            name, i, p = learn.predict(item)
            torch.testing.assert_close(p, probs, rtol=1e-4, atol=1e-5)
            assert int(i) == probs.argmax() and str(names(learn)[int(i)]) == (name if isinstance(name, str) else name.decode().items.meal.iloc[0])


@habit
def tta(make):
    learn = make.fitted()
    with inference(learn):
        preds, targs = learn.get_preds()
        (augmented, plain), given = learn.tta(n=2, beta=None)
        assert torch.equal(given, targs) and augmented.shape == plain.shape
        torch.testing.assert_close(plain, preds, rtol=1e-4, atol=1e-5)


@habit
def interpretation(make):
    learn = make.fitted()
    with inference(learn):
        interp, (preds, targs) = ClassificationInterpretation.from_learner(learn), learn.get_preds()
        cm = interp.confusion_matrix()
        assert cm.sum() == len(targs) and np.trace(cm)/len(targs) == pytest.approx(correct(preds, targs))
        torch.testing.assert_close(interp.top_losses(5)[0].flatten(), entropies(preds, targs).topk(5)[0], rtol=1e-4, atol=1e-5)
        plt.close('all')
        interp.plot_confusion_matrix()
        assert [t.get_text() for t in plt.gca().get_xticklabels()] == [str(o) for o in names(learn)]


@habit
def top_losses(make):
    learn = make.fitted()
    with inference(learn):
        interp = ClassificationInterpretation.from_learner(learn)
        seen = [float(o) for o in re.findall(r'\d+\.\d+', shown(lambda: interp.plot_top_losses(3)))]
        assert all(any(abs(o-loss) < .01 for o in seen) for loss in interp.top_losses(3)[0].tolist())


@habit
def show_batch(make):
    learn = make()
    seen = shown(lambda: learn.dls.show_batch(max_n=2))  # one of each
    assert re.search(r'\?|NaN', seen) and any(o in seen for o in names(learn))


@habit
def show_results(make):
    learn = make.fitted()
    with inference(learn): seen = shown(lambda: learn.show_results(max_n=9))
    assert 'meal_pred' in seen or sum(seen.count(o) for o in names(learn)) == 18


@habit
def summary(make):
    learn = make.fitted()
    with inference(learn): seen = str(learn.summary())
    learn.remove_cb(LPCallback)
    assert seen.count('  - LPCallback\n') == 1
    assert seen.replace('  - LPCallback\n', '').partition('Total params')[2] == str(learn.summary()).partition('Total params')[2]


LOAD = """
import sys, torch
from fastai.learner import load_learner
for line in sys.stdin:
    path = line.strip()
    learn = load_learner(path + '/export.pkl')
    probs = torch.stack([learn.predict(o)[2] for o in torch.load(path + '/items.pt', weights_only=False)])
    torch.save((probs, learn.lp_record.history, learn.lp_record.pseudo), path + '/probs.pt')
    print('done', flush=True)
"""


@cache
def fresh_process():
    "Has made none of the Learners; one for all of them, since it takes long to start"
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)


@habit
def export(make):
    learn = make.fitted()
    with inference(learn): here = torch.stack([learn.predict(o)[2] for o in make.items[:4]])
    learn.export('export.pkl')
    torch.save(make.items[:4], make.path/'items.pt')
    process = fresh_process()
    print(make.path, file=process.stdin, flush=True)
    assert process.stdout.readline() == 'done\n'
    there, history, pseudo = torch.load(make.path/'probs.pt', weights_only=False)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    assert history == learn.lp_record.history and pseudo is None


# What plain fastai refuses: its error, or None where it shows nothing

TABLE = dict(mixup="'tuple' object has no attribute 'device'", cutmix="'tuple' object has no attribute 'size'", tta='set_split_idx', top_losses=None)
CANNOT = dict(vision_learner={}, timm={}, tabular_learner=TABLE, tabular_learner_one_stream=TABLE,
    Learner=dict(cutmix='not enough values to unpack', show_batch="no attribute 'show'", show_results="no attribute 'show'",
        top_losses='plot_top_losses is not implemented'),
    text_classifier_learner=dict(mixup='expected dtype long int', cutmix='not enough values to unpack', show_results='not subscriptable'))
NO_KERNEL = [('text_classifier_learner', 'bf16')]  # an LSTM in bfloat16: not on every CPU

PLAIN = dict(mixup=lambda learn: learn.fit(1, cbs=MixUp()), cutmix=lambda learn: learn.fit(1, cbs=CutMix()), tta=lambda learn: learn.tta(),
    show_batch=lambda learn: learn.dls.show_batch(), show_results=lambda learn: learn.show_results(),
    top_losses=lambda learn: ClassificationInterpretation.from_learner(learn).plot_top_losses(3))


@pytest.mark.parametrize('kind, name', [pytest.param(l, h, id=f'{l}-{h}') for l in LEARNERS for h in HABITS
    if h not in CANNOT[l] and (l, h) not in NO_KERNEL])
def test_habit(kind, name, images, tmp_path):
    make = Make(kind, images, tmp_path)
    HABITS[name](make)
    make.leaves_no_trace()


@pytest.mark.parametrize('kind, name', [pytest.param(l, h, id=f'{l}-{h}') for l in LEARNERS for h in CANNOT[l]])
def test_fastai_itself_cannot(kind, name, images, tmp_path):
    learn, error = Make(kind, images, tmp_path)(hide=False), CANNOT[kind][name]
    if error is None: assert not shown(lambda: PLAIN[name](learn))
    else:
        with pytest.raises(Exception, match=error): PLAIN[name](learn)


# What is particular to one of them

@pytest.mark.parametrize('labeled_only', [False, True])
def test_a_text_reads_the_same_in_every_batch(labeled_only, images, tmp_path):
    "AWD_LSTM takes the first of a batch for the longest texts"
    learn = Make('text_classifier_learner', images, tmp_path)()
    probs, dl = learn.get_preds(ds_idx=0)[0], learn.dls.train
    dl.labeled_only = labeled_only
    idxs = list(dl.get_idxs())
    dl.get_idxs = lambda: idxs
    learn.model.eval()
    with torch.no_grad(): seen = torch.cat([learn.model(x)[0].softmax(1) for x, _ in dl])
    torch.testing.assert_close(seen, probs[idxs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['Learner', 'tabular_learner', 'text_classifier_learner'])
def test_lr_find_before_the_callback_is_there(kind, images, tmp_path):
    learn, cb = Make(kind, images, tmp_path)(), LPCallback()
    assert 1e-7 < learn.lr_find(num_it=30, show_plot=False).valley < 10 and torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    learn.fit_one_cycle(1, cbs=cb)
    labeled_all(learn, cb, [0])


@pytest.mark.parametrize('meals', [pd.Series(labels(True), dtype=object), pd.Series([o or '' for o in labels(True)]), pd.Categorical(labels(True)),
    pd.Series([c if o else None for c, o in zip(CLASS, labels(True))], dtype='Int64')], ids=['None', 'empty', 'category', 'NA'])
def test_missing_targets_of_a_table(meals):
    dls = TabularDataLoaders.from_df(table(True).assign(meal=meals), procs=[Normalize], cont_names=list('xyz'), y_names='meal', y_block=SemiCategoryBlock,
        valid_idx=VALID, bs=16, device='cpu')
    assert len(dls.vocab) == dls.c == 3 and dls.vocab == sorted(dls.vocab)
    assert torch.equal(targets_of(dls.train) < 0, torch.arange(60) >= 12)
    assert [str(o) for o in dls.train_ds.decode().items.meal] == [str(o) if i < 12 else '?' for i, o in enumerate(table(True).assign(meal=meals).meal[:60])]


@pytest.mark.parametrize('kind', ['Learner', 'timm', 'text_classifier_learner'])
def test_an_exported_learner_has_no_data(kind, images, tmp_path):
    make = Make(kind, images, tmp_path)
    make.fitted().export('export.pkl')
    there = load_learner(tmp_path/'export.pkl')
    dl = there.dls.test_dl(make.items[:4])
    with inference(there): plain = there.tta(dl=dl, n=2, beta=None)[0][1]
    torch.testing.assert_close(plain, there.get_preds(dl=dl)[0], rtol=1e-4, atol=1e-5)
    for kwargs in ({}, dict(start_epoch=1)):
        with pytest.raises(ValueError, match='comes without data'): there.fit(2, **kwargs)
