"""Trains with few labels on the data people have, by several methods with equal steps: a head on frozen embeddings ("head"), a
pretrained network that is fine-tuned ("fine"), or a small network from random weights ("scratch").

head: fastai's default head on the embeddings of real_data.py, 10 epochs of one cycle, batches of 32 labeled and 32 unlabeled
items. fine: the EfficientNet-Lite0 of real_data.py on 2,000 photographs of 96×96 pixels, `fine_tune` with one frozen epoch and
8 more, batches of 10 labeled and 30 unlabeled images; 2,000 other images for testing. The BatchNorm layers of the network keep
their statistics: photographs enlarged from 32×32 pixels have others, which spoil the features. scratch: the digits, with the
recipe of `lp_train digits`.

The condition "junk" has 40 % of unlabeled items that belong to no class, "skew" has classes of 1 : 10 in size with as many
labels each; see real_data.py. The test set has the known classes, in equal shares.

`supervised` sees as many batches of the same size, all labeled. The error of Mean Teacher (mt) is the teacher's. Rates were
chosen with --tune, on draws from 100 on and with other photographs. Lines that are in the file are skipped; a run of "fine"
takes 6 to 18 minutes. Heads have no FixMatch, which needs augmentation. Reproduces results/real/training.jsonl, after
`export FASTAI_LP_DATA=folder OMP_NUM_THREADS=1`:

    python benchmarks/training.py fine --draws 0-2
    python benchmarks/training.py head
    python benchmarks/training.py head --labels 10 --data sentences
    python benchmarks/training.py head --labels 10 --methods supervised,lp,strong --condition junk,skew
    python benchmarks/training.py head --labels 10 --methods strong:trust=0,strong:backbone=null,strong:balance=null
    python benchmarks/training.py head --labels 10 --methods strong:temperature=1,strong:omega=false,strong:mixup=null
    python benchmarks/training.py scratch --condition junk,skew --draws 0-9"""
import json
import os
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import fine_tune, fit_one_cycle  # chkstyle: ignore (added to Learner)
from fastai.data.core import DataLoaders
from fastai.layers import LinBnDrop
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import error_rate
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner
from fastcore.script import call_parse
from real_data import Rows, lite0, photos, rows, task
from torch import nn

from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import ImageArrays, digits
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.train import run_method
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.fixmatch import FixMatchCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.streams import semi_dls
from fastai_lp.transductive.labelers import NetworkPrediction
from fastai_lp.utils.files import append_json_line, read_json_lines

TUNING_IMAGES, IMAGES = 77, 10  # seeds of the photographs
# best of --tune; in fine-tuning, Mean Teacher has the rate of the others
RATES = dict(head=dict(supervised=1e-2, network=3e-4, mt=1e-3, lp=3e-4, strong=1e-3),
    fine=dict.fromkeys(['supervised', 'mt', 'fixmatch', 'lp', 'strong'], 4e-3))


def callbacks(method, layer, truth):
    "Callbacks of a method, such as strong, or strong:mixup=null with a setting as JSON; `truth` is for diagnostics"
    tfms, (method, *changes) = True if layer == 'fine' else None, method.split(':')
    changes = {name: json.loads(value) for name, value in (o.split('=') for o in changes)}
    return dict(supervised=lambda: [], network=lambda: [LPCallback(NetworkPrediction(), truth=truth)], lp=lambda: [LPCallback(truth=truth)],
        mt=lambda: [MeanTeacherCallback()], fixmatch=lambda: [FixMatchCallback(unlabeled_tfms=tfms)],
        strong=lambda: [LPCallback.strong(**dict(truth=truth, unlabeled_tfms=tfms) | changes)],
        **{'lp+fixmatch': lambda: [LPCallback(truth=truth), FixMatchCallback(unlabeled_tfms=tfms)]})[method]()


class KeepStatistics(Callback):
    "The BatchNorm layers of the network keep the statistics of the pretraining"
    order = 0  # after fastai has set the training mode
    def before_train(self):
        for m in self.learn.model[0].modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()


class Items:
    "Rows with their labels, −100 if hidden, as a dataset"
    def __init__(self, x, y): self.x, self.y = torch.from_numpy(x).float(), torch.from_numpy(np.where(y < 0, -100, y)).long()
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i], self.y[i]


def repeated(y, bs, labeled_bs):
    "Indices of the labeled items for as many batches as there are two-stream batches in an epoch, the last incomplete one dropped"
    return np.resize(np.flatnonzero(y >= 0), (y < 0).sum()//(bs-labeled_bs)*bs)


def head_learner(data, y, labeled_only, bs=64, labeled_bs=32):
    own, c = repeated(y, bs, labeled_bs) if labeled_only else np.arange(len(y)), int(data.y.max())+1
    dls = DataLoaders.from_dsets(Items(data.x[own], y[own]), Items(data.new_x, data.new_y), bs=bs, device='cpu', num_workers=0)
    dls.c = c
    head = nn.Sequential(*LinBnDrop(data.x.shape[1], 512, p=.25, act=nn.ReLU()), *LinBnDrop(512, c, p=.5))
    return Learner(dls if labeled_only else semi_dls(dls, labeled_bs), head, CrossEntropyLossFlat(), metrics=error_rate)


def fine_learner(data, y, labeled_only, bs=40, labeled_bs=10):
    own = repeated(y, bs, labeled_bs) if labeled_only else np.arange(len(y))
    data = replace(data, train=data.train[own], shown=y[own], ids=None)
    dls = image_dls(data, bs, labeled_bs, labeled_only, device='cpu')
    learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained=False, normalize=False, metrics=error_rate, cbs=KeepStatistics())
    network = learn.model[0].model
    network.load_state_dict({k: v for k, v in lite0().state_dict().items() if k in network.state_dict()})
    learn.model.to(memory_format=torch.channels_last)  # twice as fast
    return learn


def images(folder, seed):
    x, y, new_x, new_y = photos(folder, 96, 2000, 2000, seed)
    pixels = torch.from_numpy(np.concatenate([x, new_x])).permute(0, 3, 1, 2).contiguous()
    train, test = np.arange(len(y)), np.arange(len(y), len(pixels))
    return ImageArrays(pixels, np.concatenate([y, new_y]), train, test, mean=(.5,)*3, std=(.5,)*3)


def restricted(data, t):
    "Only the rows of a task, and the tests of its classes"
    place = np.full(10**3, -1)
    place[t.known] = np.arange(len(t.known))
    if isinstance(data, Rows):
        new_y = place[data.new_y]
        return Rows(data.x[t.kept], t.truth, data.new_x[new_y >= 0], new_y[new_y >= 0])
    truth, train = np.full(len(data.truth), -1), data.train[t.kept]
    truth[data.test], truth[train] = place[data.truth[data.test]], t.truth
    return replace(data, truth=truth, train=train, test=data.test[truth[data.test] >= 0], shown=t.shown, vocab=None, ids=None)


def from_scratch(images, method, draw, lr):
    "Errors of the epochs, accuracy of the pseudo-labels"
    recipe = replace(RECIPES['digits'], **({} if lr is None else dict(lr=lr)))
    with tempfile.TemporaryDirectory() as out: res = run_method(images, method, recipe, out, seed=draw, keep=(), device='cpu', bar=False)
    return [o['error_rate'] for stage in res['stages'] for o in stage], [o['accuracy'] for o in res['history']]


def fitted(layer, data, shown, truth, method, draw, lr):
    "Errors of the epochs, accuracy of the pseudo-labels"
    set_seed(draw)
    learn = (head_learner if layer == 'head' else fine_learner)(data, shown, method == 'supervised')
    cbs = callbacks(method, layer, truth)
    with learn.no_bar(), learn.no_logging():
        if layer == 'head': learn.fit_one_cycle(10, lr, cbs=cbs)
        else: learn.fine_tune(8, lr, freeze_epochs=1, cbs=cbs)
    names = list(learn.recorder.metric_names[1:])
    place = names.index('teacher_error_rate' if method == 'mt' else 'error_rate')
    history = learn.lp_record.history if hasattr(learn, 'lp_record') else []
    return [o[place] for o in learn.recorder.values], [o['accuracy'] for o in history]


def run(layer, data, condition, method, labels, draw, lr):
    "Errors of the epochs, accuracy of the pseudo-labels, seconds"
    start = time.perf_counter()
    t = task(data.y if layer == 'head' else data.truth[data.train], labels, draw, condition)
    data = restricted(data, t)
    if layer == 'scratch': found = from_scratch(data, method, draw, lr)
    else: found = fitted(layer, data, t.shown, t.truth, method, draw, lr)
    errors, right = ([round(float(o), 4) for o in some] for some in found)
    return dict(error=errors[-1], errors=errors, right=right, sec=round(time.perf_counter()-start))


@call_parse
def main(
    layer:str, # head, fine or scratch
    data:str='photos', # of a head: photos or sentences
    methods:str=None, # separated by commas; all that have a rate if not given
    labels:str=None, # per class, separated by commas; 4,10,25 for a head, 10 for fine, 2 for scratch
    draws:str='0-4', # range of the draws
    condition:str='plain', # plain, junk, skew, separated by commas
    tune:str=None, # learning rates, separated by commas, instead of the best ones; for draws from 100 on
    cache:str=None, # folder for the embeddings; the folder of the data if not given
    out:str=str(Path(__file__).parent/'results/real'), # folder of the results
):
    torch.set_num_threads(1)
    file, (first, last) = Path(out)/('tune.jsonl' if tune else 'training.jsonl'), map(int, draws.split('-'))
    if tune and first < 100: raise SystemExit('tune on draws from 100 on, which are not reported')
    names = 'layer', 'data', 'condition', 'method', 'labels', 'draw', 'lr'
    done = {tuple(o[k] for k in names) for _, o in read_json_lines(file)} if file.exists() else set()
    data, seed = 'digits' if layer == 'scratch' else data, TUNING_IMAGES if tune else IMAGES
    if layer == 'head': found = rows(data, cache, seed)
    else: found = images(Path(os.environ.get('FASTAI_LP_DATA', '.')), seed) if layer == 'fine' else digits()
    known = RATES.get(layer, dict.fromkeys(['supervised', 'lp', 'strong']))  # None: the rate of the recipe
    counts = [int(o) for o in (labels or dict(head='4,10,25', fine='10', scratch='2')[layer]).split(',')]
    methods = methods.split(',') if methods else known
    unknown = [o for o in methods if o.partition(':')[0] not in known]
    if unknown and not tune: raise SystemExit(f"no learning rate is known for {', '.join(unknown)}: find it with --tune")
    for draw, how, count, method in product(range(first, last+1), condition.split(','), counts, methods):
        for lr in map(float, tune.split(',')) if tune else [known[method.partition(':')[0]]]:
            key = layer, data, how, method, count, draw, lr
            if key in done: continue
            res = run(layer, found, how, method, count, draw, lr)
            append_json_line(file, dict(zip(names, key), **res))
            print(*key, f"error {res['error']:.1%}, {res['sec']} s", flush=True)
