"""Every common use of fastai with `LPCallback`: one function per use, and one entry of `LEARNERS` per way to make a Learner.

All pairs are tested, except those that plain fastai cannot do either (`CANNOT`). Most are slow tests: by default,
each use is tested with one Learner, and each Learner with the main uses."""
import math
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import fastai.callback.schedule  # chkstyle: ignore (adds Learner.fit_one_cycle and others)
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
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
from torchvision.models import resnet18

from conftest import blob_learner, blobs, flat_weights, quiet, state_of
from fastai_lp.experiments.datasets import digits, digits_folder
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategoryBlock, targets_of
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.layers import find_classifier
from fastai_lp.learner.streams import semi_dls
from fastai_lp.transductive.labelers import Diffusion

pytestmark = pytest.mark.filterwarnings('ignore')  # about networks that are hardly trained, and precision that a CPU lacks


# Learners, each with the items of its validation set as `predict` takes them

NAMES = np.array(['ham', 'eggs', 'spam'])
CLASS = np.arange(84) % 3
VALID = list(range(60, 84))


def labels(): return [NAMES[c] if i < 12 or i in VALID else None for i, c in enumerate(CLASS)]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder with a few zeros, ones and twos"
    path, truth = digits_folder(tmp_path_factory.mktemp('images'), labels=40), digits().truth
    places = dict(train=12, unsup=16, valid=12)
    for f in sorted(path.rglob('*.png')):
        part = f.relative_to(path).parts[0]
        if truth[int(f.stem)] < 3 and places[part]: places[part] -= 1
        else: f.unlink()
    return path


def of_images(arch, images, **kwargs):
    tfms = dict(item_tfms=Resize(32), batch_tfms=aug_transforms(size=32, do_flip=False))
    dls = SemiImageDataLoaders.from_folder(images, bs=16, num_workers=0, device='cpu', **tfms)
    return vision_learner(dls, arch, pretrained=False, metrics=accuracy, **kwargs), list(dls.valid_ds.items)


def of_tensors(images, **kwargs): return blob_learner(blobs(), **kwargs), list(range(120, 150))


@cache
def table():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(rng.normal(size=(84, 4)) + 2*CLASS[:, None], columns=list('wxyz'))
    df.loc[5, 'w'] = np.nan
    return df.assign(kind=rng.choice(['p', 'q'], 84), meal=pd.Series(labels(), dtype=object))


def of_a_table(images, y_block=None, two_streams=True, **kwargs):
    columns = dict(cat_names=['kind'], cont_names=list('wxyz'), y_names='meal', y_block=y_block)
    procs = [Categorify, FillMissing, Normalize]
    dls = TabularDataLoaders.from_df(table(), procs=procs, valid_idx=VALID, bs=16, device='cpu', **columns)
    learn = tabular_learner(semi_dls(dls) if two_streams else dls, layers=[16], metrics=accuracy, **kwargs)
    return learn, [row for _, row in table().iloc[VALID].iterrows()]


@cache
def texts():
    """Texts of 1 to 5 times `seq_len` tokens, counting the one that starts a text: fastai pads texts of other lengths
    so that the output depends on the batch"""
    rng, common = np.random.default_rng(0), 'the of and to in was'.split()
    words = dict(ham='ridge pine leaf stone', eggs='tide foam gull sail', spam='lamp desk shelf chair')
    def text(c): return ' '.join(rng.choice(words[NAMES[c]].split() + common, 8*rng.integers(1, 6)-1))
    df = pd.DataFrame(dict(text=[text(c) for c in CLASS], label=labels()))
    df['valid'] = df.index.isin(VALID)
    text_block = TextBlock.from_df('text', seq_len=8, min_freq=1, n_workers=0)
    block = DataBlock(blocks=(text_block, SemiCategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
        splitter=ColSplitter('valid'))
    return block.dataloaders(df, bs=16, num_workers=0, device='cpu', seq_len=8), df.text[df.valid].tolist()


def of_texts(images, **kwargs):
    dls, items = texts()
    settings = dict(config=awd_lstm_clas_config | dict(emb_sz=12, n_hid=16, n_layers=2), seq_len=8, pretrained=False)
    return text_classifier_learner(semi_dls(dls), AWD_LSTM, metrics=accuracy, **settings, **kwargs), items


LEARNERS = dict(  # chkstyle: ignore-node (one kind per line)
    vision_learner=partial(of_images, resnet18),
    timm=partial(of_images, 'test_efficientnet'),
    Learner=of_tensors,
    tabular_learner=of_a_table,
    tabular_learner_one_stream=partial(of_a_table, y_block=SemiCategoryBlock, two_streams=False),
    text_classifier_learner=of_texts)


class Make:
    "Makes Learners of one kind, and checks in the end that training left no trace on them"
    def __init__(self, kind, images, path, other_process=None):
        self.kind, self.images, self.path, self.other_process, self.made = kind, images, path, other_process, []

    def __call__(self, **kwargs):
        set_seed(0, reproducible=True)
        learn, self.items = LEARNERS[self.kind](images=self.images, path=self.path, **kwargs)
        quiet(learn)
        self.made.append((learn, state_of(learn)))
        return learn

    def fitted(self):
        "A Learner that keeps its callback, after an epoch"
        learn = self(cbs=LPCallback())
        learn.fit(1)
        return learn

    def check_no_trace(self):
        for learn, before in self.made: assert state_of(learn) | dict(cbs=None) == before | dict(cbs=None)


# Helpers of the uses

def check_labels(learn, cb, epochs):
    "Asserts that the callback renewed the pseudo-labels of all items in these epochs"
    p, n, y = cb.record.pseudo, len(learn.dls.train_ds), targets_of(learn.dls.train)
    assert learn.lp_record is cb.record
    assert [row['epoch'] for row in cb.record.history] == list(epochs)
    assert p.labels.shape == p.weights.shape == (n,)
    assert set(p.labels.tolist()) <= set(range(learn.dls.c))
    assert torch.isfinite(p.weights).all()
    assert p.weights.max() > 0
    assert torch.equal(p.labels[y >= 0], y[y >= 0])
    assert p.labeled.sum() == (y >= 0).sum() < n
    assert all(math.isfinite(o) for o in learn.recorder.losses)


@contextmanager
def inference(learn):
    "Asserts that nothing is trained and no graph is built"
    before, history = flat_weights(learn), len(learn.lp.record.history)
    yield
    assert torch.equal(flat_weights(learn), before)
    assert len(learn.lp.record.history) == history
    assert learn.lp_record is learn.lp.record


def column(learn, name): return [dict(zip(learn.recorder.metric_names[1:], v))[name] for v in learn.recorder.values]


def names(learn): return learn.dls.vocab[-1] if isinstance(learn.dls.vocab[-1], CategoryMap) else learn.dls.vocab


def correct(preds, targs): return (preds.argmax(1) == targs.flatten()).float().mean().item()


def cross_entropies(preds, targs):
    targs = targs.flatten().long()
    return -preds[range(len(targs)), targs.clamp(min=0)].log()*(targs >= 0)


def shown(show):
    "The text that a person sees: titles of images, or a table"
    tables = []
    plt.close('all')
    with patch('IPython.display.display', lambda o: tables.append(o.data)): show()
    return '\n'.join(tables + [ax.get_title() for i in plt.get_fignums() for ax in plt.figure(i).axes])


class Batches(Callback):
    "Keeps (prediction, target, loss, target after the loss) of each training batch"
    order, run_valid = 100, False
    def before_fit(self): self.kept = []
    def after_pred(self): self.seen = self.learn.pred.detach().clone(), self.learn.yb[0].clone()
    def after_loss(self): self.kept.append((*self.seen, self.learn.loss.item(), self.learn.yb[0].clone()))


class Steps(Callback):
    "Keeps the norm of the gradient at each step of the optimizer"
    order = 100
    def before_fit(self): self.norms = []
    def after_step(self):
        grads = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(torch.stack(grads).norm().item())


USES = {}
def use(f): return USES.setdefault(f.__name__, f)


# Training

@use
def fit(make):
    learn, cb = make(), LPCallback()
    before = flat_weights(learn)
    learn.fit(2, cbs=cb)
    check_labels(learn, cb, [0, 1])
    assert not torch.equal(flat_weights(learn), before)
    assert list(learn.recorder.metric_names) == 'epoch train_loss valid_loss accuracy lp_certainty lp_sec time'.split()
    assert column(learn, 'lp_certainty') == [row['certainty'] for row in cb.record.history]
    assert min(column(learn, 'lp_sec')) > 0


@use
def fit_one_cycle(make):
    learn, cb = make(), LPCallback()
    learn.fit_one_cycle(2, 1e-3, cbs=cb)
    check_labels(learn, cb, [0, 1])
    lrs = learn.recorder.lrs
    assert len(lrs) == 2*len(learn.dls.train)
    assert lrs[0] == pytest.approx(1e-3/25)
    assert max(lrs) == pytest.approx(1e-3, rel=.1)
    assert lrs[-1] < max(lrs)/2


@use
def fine_tune(make):
    learn, cb = make(), LPCallback(warmup=1)
    learn.fine_tune(2, cbs=cb)
    check_labels(learn, cb, [1, 2])
    assert learn.opt.frozen_idx == 0


@use
def freeze_unfreeze(make):
    learn, cb = make(), LPCallback()
    last = find_classifier(learn.model, learn.dls.c)
    if learn.splitter is trainable_params:
        learn.splitter = lambda m: [[p for p in params(m) if not any(p is q for q in params(last))], params(last)]
    learn.freeze()
    frozen = [p for p in learn.model.parameters() if not p.requires_grad]
    body, head = [p.detach().clone() for p in frozen], last.weight.detach().clone()
    learn.fit(1, cbs=cb)
    assert body
    assert all(torch.equal(p, q) for p, q in zip(frozen, body))
    assert not torch.equal(last.weight, head)
    learn.unfreeze()
    learn.fit(1, cbs=cb)
    check_labels(learn, cb, [0, 1])
    assert not all(torch.equal(p, q) for p, q in zip(frozen, body))


@use
def lr_find(make):
    learn = make(cbs=LPCallback())
    before = flat_weights(learn)
    found = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 < found.valley < 10
    assert torch.equal(flat_weights(learn), before)
    assert not learn.lp.record.history
    learn.fit(1, found.valley)
    check_labels(learn, learn.lp, [0])


@use
def start_epoch(make):
    learn, cb = make(), LPCallback()
    learn.fit_one_cycle(3, 1e-3, cbs=cb, start_epoch=2)
    check_labels(learn, cb, [2])
    assert len(learn.recorder.lrs) == len(learn.dls.train)
    assert max(learn.recorder.lrs) < 1e-3


@use
def short_epoch(make):
    learn, cb, batches = make(), LPCallback(), Batches()
    learn.fit(2, cbs=[cb, batches, ShortEpochCallback(0)])
    check_labels(learn, cb, [0, 1])
    assert len(batches.kept) == 2 < 2*len(learn.dls.train)


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
    check_labels(learn, cb, [0])
    assert dtypes == {dtype}
    assert [o.dtype for o in found] == [torch.float32]*2
    assert all(torch.isfinite(o).all() for o in found)
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())


@use
def to_fp16(make):
    "On a CPU, fastai's autocast('cuda') does nothing"
    trained_in(make, lambda learn: learn.to_fp16(), torch.float32)


class OnCPU(MixedPrecision):
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)


@use
def bf16(make):
    "One step, which can take 10 s"
    trained_in(make, lambda learn: learn.add_cb(OnCPU('bf16')), torch.bfloat16, ShortEpochCallback(0))


def mixed(make, mix):
    learn, cb, batches = make(), LPCallback(), Batches()
    learn.fit(1, cbs=[cb, mix, batches])
    check_labels(learn, cb, [0])
    most = cb.record.pseudo.weights.max()*(1+1e-5)
    for pred, target, loss, hard in batches.kept:
        assert target.shape == pred.shape
        assert target.min() >= 0
        assert target.sum(1).max() <= most
        assert math.isfinite(loss)
        assert not hard.is_floating_point()
    assert max((target > 0).sum(1).max() for _, target, *_ in batches.kept) == 2


@use
def mixup(make): mixed(make, MixUp())


@use
def cutmix(make): mixed(make, CutMix())


@use
def strong(make):
    "The recommended recipe. Inputs other than images are not transformed, with a warning"
    learn, cb, batches = make(), LPCallback.strong(), Batches()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1, cbs=[cb, batches])
    check_labels(learn, cb, [0])
    images = any(isinstance(o, TensorImage) for o in learn.dls.train.one_batch())
    assert images != any('unlabeled_tfms=True is for images' in str(o.message) for o in said)
    for pred, target, loss, hard in batches.kept:
        assert target.shape == pred.shape
        assert math.isfinite(loss)
        assert not hard.is_floating_point()


@use
def label_smoothing(make):
    learn, cb, batches = make(loss_func=LabelSmoothingCrossEntropyFlat()), LPCallback(), Batches()
    learn.fit(1, cbs=[cb, batches])
    check_labels(learn, cb, [0])
    smooth = LabelSmoothingCrossEntropy(reduction='none')
    for pred, target, loss, hard in batches.kept:
        assert loss == pytest.approx((target.sum(1)*smooth(pred, hard.flatten().long())).mean().item(), rel=1e-4)


@use
def gradient_accumulation(make):
    learn, cb, steps = make(), LPCallback(), Steps()
    learn.fit(2, cbs=[cb, GradientAccumulation(32), steps])
    check_labels(learn, cb, [0, 1])
    assert len(steps.norms) == len(learn.recorder.losses)//2 > 0


@use
def gradient_clip(make):
    learn, cb, steps = make(), LPCallback(), Steps()
    learn.fit(1, cbs=[cb, GradientClip(1e-3), steps])
    check_labels(learn, cb, [0])
    assert len(steps.norms) == len(learn.dls.train)
    assert max(steps.norms) <= 1e-3*(1+1e-4)


# Trackers, loggers and files

@use
def save_model(make):
    learn, cb = make(), LPCallback()
    learn.fit(3, 1e-2, cbs=[cb, SaveModelCallback(fname='best')])
    check_labels(learn, cb, [0, 1, 2])
    best, saved = min(column(learn, 'valid_loss')), torch.load(learn.path/'models'/'best.pth')
    assert learn.validate()[0] == pytest.approx(best, rel=1e-4)
    assert all(torch.equal(v, saved[k]) for k, v in learn.model.state_dict().items())


@use
def early_stopping(make):
    learn, cb = make(), LPCallback()
    learn.fit(5, cbs=[cb, EarlyStoppingCallback(min_delta=100)])
    check_labels(learn, cb, [0, 1])
    make.check_no_trace()
    learn.fit(1, cbs=cb)
    check_labels(learn, cb, [0, 1, 2])


@use
def reduce_lr_on_plateau(make):
    learn, cb = make(), LPCallback()
    learn.fit(3, 1e-3, cbs=[cb, ReduceLROnPlateau(min_delta=100)])
    check_labels(learn, cb, [0, 1, 2])
    assert learn.recorder.lrs[::len(learn.dls.train)] == pytest.approx([1e-3, 1e-3, 1e-4])


@use
def csv_logger(make):
    learn, cb = make(), LPCallback()
    learn.fit(2, cbs=[cb, CSVLogger()])
    df = pd.read_csv(learn.path/'history.csv')
    assert list(df) == list(learn.recorder.metric_names)
    assert df.epoch.tolist() == [0, 1]
    assert df.lp_certainty.tolist() == pytest.approx([row['certainty'] for row in cb.record.history])
    assert (df.lp_sec > 0).all()


@use
def train_metrics(make):
    learn, cb, batches = make(), LPCallback(), Batches()
    learn.recorder.train_metrics = True
    learn.fit(1, cbs=[cb, batches])
    check_labels(learn, cb, [0])
    trained = correct(*(torch.cat([b[i] for b in batches.kept]) for i in (0, 3)))
    assert column(learn, 'train_accuracy') == [pytest.approx(trained)]
    assert column(learn, 'valid_accuracy') == [pytest.approx(correct(*learn.get_preds()))]


@use
def plot_loss(make):
    learn = make()
    learn.fit(2, cbs=LPCallback())
    plt.close('all')
    train, valid = learn.recorder.plot_loss(skip_start=0).lines
    assert len(train.get_ydata()) == 2*len(learn.dls.train)
    assert list(valid.get_ydata()) == column(learn, 'valid_loss')


@use
def save_load(make):
    learn = make.fitted()
    preds = learn.get_preds()[0]
    learn.save('here')
    learn.fit(1, 1e-2)
    assert not torch.equal(learn.get_preds()[0], preds)
    learn.load('here')
    assert torch.equal(learn.get_preds()[0], preds)
    learn.fit(1)
    check_labels(learn, learn.lp, [0, 1, 2])


# Inference, with the callback still on the Learner

@use
def get_preds(make):
    learn = make.fitted()
    with inference(learn):
        preds, targs = learn.get_preds()
        assert preds.shape == (len(learn.dls.valid_ds), 3)
        assert targs.min() >= 0
        torch.testing.assert_close(preds.sum(1), torch.ones(len(preds)))
        train, given, losses = learn.get_preds(ds_idx=0, with_loss=True)
        assert torch.equal(given.flatten().clamp(min=-1).long(), targets_of(learn.dls.train))
        torch.testing.assert_close(losses.flatten(), cross_entropies(train, given), rtol=1e-4, atol=1e-5)
    learn.remove_cb(LPCallback)
    assert torch.equal(learn.get_preds()[0], preds)


@use
def validate(make):
    learn = make.fitted()
    seen = column(learn, 'valid_loss') + column(learn, 'accuracy')
    with inference(learn):
        assert learn.validate() == seen
        preds, targs = learn.get_preds()
        assert seen == pytest.approx([cross_entropies(preds, targs).mean().item(), correct(preds, targs)], rel=1e-4)


@use
def predict(make):
    learn = make.fitted()
    with inference(learn):
        for item, probs in zip(make.items[:3], learn.get_preds()[0]):
            name, i, p = learn.predict(item)
            torch.testing.assert_close(p, probs, rtol=1e-4, atol=1e-5)
            assert int(i) == probs.argmax()
            assert str(names(learn)[int(i)]) == (name if isinstance(name, str) else name.decode().items.meal.iloc[0])


@use
def tta(make):
    learn = make.fitted()
    with inference(learn):
        preds, targs = learn.get_preds()
        (augmented, plain), given = learn.tta(n=2, beta=None)
        assert torch.equal(given, targs)
        assert augmented.shape == plain.shape
        torch.testing.assert_close(plain, preds, rtol=1e-4, atol=1e-5)


@use
def interpretation(make):
    learn = make.fitted()
    with inference(learn):
        interp, (preds, targs) = ClassificationInterpretation.from_learner(learn), learn.get_preds()
        cm = interp.confusion_matrix()
        assert cm.sum() == len(targs)
        assert np.trace(cm)/len(targs) == pytest.approx(correct(preds, targs))
        losses = cross_entropies(preds, targs).topk(5)[0]
        torch.testing.assert_close(interp.top_losses(5)[0].flatten(), losses, rtol=1e-4, atol=1e-5)
        plt.close('all')
        interp.plot_confusion_matrix()
        assert [t.get_text() for t in plt.gca().get_xticklabels()] == [str(o) for o in names(learn)]


@use
def top_losses(make):
    learn = make.fitted()
    with inference(learn):
        interp = ClassificationInterpretation.from_learner(learn)
        seen = [float(o) for o in re.findall(r'\d+\.\d+', shown(lambda: interp.plot_top_losses(3)))]
        assert all(any(abs(o-loss) < .01 for o in seen) for loss in interp.top_losses(3)[0].tolist())


@use
def show_batch(make):
    learn = make()
    seen = shown(lambda: learn.dls.show_batch(max_n=2))  # an unlabeled item and a labeled one
    assert re.search(r'\?|NaN', seen)
    assert any(o in seen for o in names(learn))


@use
def show_results(make):
    learn = make.fitted()
    with inference(learn): seen = shown(lambda: learn.show_results(max_n=9))
    assert 'meal_pred' in seen or sum(seen.count(o) for o in names(learn)) == 18


@use
def summary(make):
    learn = make.fitted()
    with inference(learn): with_cb = str(learn.summary()).partition('Total params')[2]
    learn.remove_cb(LPCallback)
    without, line = str(learn.summary()).partition('Total params')[2], '  - LPCallback\n'
    assert with_cb.count(line) == 1
    assert with_cb.replace(line, '') == without


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


@pytest.fixture(scope='module')
def other_process():
    "A function that loads an exported Learner in another process and predicts. The process starts once, because that is slow"
    @cache
    def process():
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', LOAD], cwd=Path(__file__).parent, **pipes)
    def predict(path):
        print(path, file=process().stdin, flush=True)
        assert process().stdout.readline() == 'done\n'
        return torch.load(path/'probs.pt', weights_only=False)
    yield predict
    if process.cache_info().currsize:
        process().kill()
        process().communicate()


@use
def export(make):
    learn = make.fitted()
    with inference(learn): here = torch.stack([learn.predict(o)[2] for o in make.items[:4]])
    learn.export('export.pkl')
    torch.save(make.items[:4], make.path/'items.pt')
    there, history, pseudo = make.other_process(make.path)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    assert history == learn.lp_record.history
    assert pseudo is None


# The pairs

TABLE = {'mixup', 'cutmix', 'tta', 'top_losses'}
CANNOT = dict(vision_learner=set(), timm=set(), Learner={'cutmix', 'show_batch', 'show_results', 'top_losses'},
    tabular_learner=TABLE, tabular_learner_one_stream=TABLE, text_classifier_learner={'mixup', 'cutmix', 'show_results'})
NO_KERNEL = [('text_classifier_learner', 'bf16')]  # an LSTM in bfloat16: not on every CPU
MAIN = 'fit', 'fine_tune', 'get_preds', 'predict', 'show_batch'


def pair(kind, name):
    fast = name in MAIN or kind == ('timm' if name in CANNOT['Learner'] else 'Learner')
    return pytest.param(kind, name, id=f'{kind}-{name}', marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize('kind, name', [pair(kind, name) for kind in LEARNERS for name in USES
    if name not in CANNOT[kind] and (kind, name) not in NO_KERNEL])
def test_use(kind, name, images, other_process, tmp_path):
    make = Make(kind, images, tmp_path, other_process)
    USES[name](make)
    make.check_no_trace()


# What is particular to some of them

@pytest.mark.parametrize('labeled_only', [False, True])
def test_a_text_gives_the_same_output_in_every_batch(labeled_only, images, tmp_path):
    "AWD_LSTM needs the longest text of a batch first"
    learn = Make('text_classifier_learner', images, tmp_path)()
    probs, dl = learn.get_preds(ds_idx=0)[0], learn.dls.train
    dl.labeled_only = labeled_only
    idxs = list(dl.get_idxs())
    dl.get_idxs = lambda: idxs
    learn.model.eval()
    with torch.no_grad(): seen = torch.cat([learn.model(x)[0].softmax(1) for x, _ in dl])
    torch.testing.assert_close(seen, probs[idxs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['Learner', 'tabular_learner', 'text_classifier_learner'])
def test_lr_find_before_the_callback_is_added(kind, images, tmp_path):
    learn, cb = Make(kind, images, tmp_path)(), LPCallback()
    assert 1e-7 < learn.lr_find(num_it=30, show_plot=False).valley < 10
    assert torch.isfinite(torch.tensor(learn.recorder.losses)).all()
    learn.fit_one_cycle(1, cbs=cb)
    check_labels(learn, cb, [0])


MEALS = dict(  # chkstyle: ignore-node (one kind per line)
    none=pd.Series(labels(), dtype=object),
    empty=pd.Series([o or '' for o in labels()]),
    category=pd.Categorical(labels()),
    na=pd.Series([c if o else None for c, o in zip(CLASS, labels())], dtype='Int64'))


@pytest.mark.parametrize('missing', MEALS)
def test_missing_targets_of_a_table(missing):
    df = table().assign(meal=MEALS[missing])
    columns = dict(cont_names=list('xyz'), y_names='meal', y_block=SemiCategoryBlock)
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], valid_idx=VALID, bs=16, device='cpu', **columns)
    assert len(dls.vocab) == dls.c == 3
    assert dls.vocab == sorted(dls.vocab)
    assert torch.equal(targets_of(dls.train) < 0, torch.arange(60) >= 12)
    expected = [str(o) if i < 12 else '?' for i, o in enumerate(df.meal[:60])]
    assert [str(o) for o in dls.train_ds.decode().items.meal] == expected


@pytest.mark.parametrize('kind', ['Learner', 'timm', 'text_classifier_learner'])
def test_an_exported_learner_has_no_data(kind, images, tmp_path):
    make = Make(kind, images, tmp_path)
    make.fitted().export('export.pkl')
    there = load_learner(tmp_path/'export.pkl')
    dl = there.dls.test_dl(make.items[:4])
    with inference(there): plain = there.tta(dl=dl, n=2, beta=None)[0][1]
    torch.testing.assert_close(plain, there.get_preds(dl=dl)[0], rtol=1e-4, atol=1e-5)
    for kwargs in ({}, dict(start_epoch=1)):
        with pytest.raises(ValueError, match='there is no training data'): there.fit(2, **kwargs)
