"""Trains with few labels on the data people have, by several methods with equal steps: a head on frozen embeddings ("head"), or
a pretrained network that is fine-tuned ("fine").

head: fastai's default head on the embeddings of real_data.py, 10 epochs of one cycle, batches of 32 labeled and 32 unlabeled
items. fine: the EfficientNet-Lite0 of real_data.py on 2,000 photographs of 96×96 pixels, `fine_tune` with one frozen epoch and
8 more, batches of 10 labeled and 30 unlabeled images; 2,000 other images for testing. The BatchNorm layers of the network keep
their statistics: photographs enlarged from 32×32 pixels have others, which spoil the features.

`supervised` sees as many batches of the same size, all labeled. Rates were chosen with --tune, on draws from 100 on and with
other photographs. Lines that are in the file are skipped; a run of "fine" takes five to eight minutes. Reproduces
results/real/training.jsonl:

    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/training.py head --data photos
    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/training.py fine --draws 0-2"""
import os
import time
from dataclasses import replace
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
from real_data import lite0, photos, rows, shown
from torch import nn

from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import ImageArrays
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.fixmatch import FixMatchCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.streams import semi_dls
from fastai_lp.transductive.labelers import NetworkPrediction
from fastai_lp.utils.files import append_json_line, read_json_lines

TUNING_IMAGES, IMAGES = 77, 10  # seeds of the photographs
RATES = dict(head=dict(), fine=dict())  # best of --tune; 2e-3 otherwise


def callbacks(method, layer, truth):
    "Callbacks of a method; `truth` is for diagnostics"
    tfms = True if layer == 'fine' else None
    return dict(supervised=lambda: [], network=lambda: [LPCallback(NetworkPrediction(), truth=truth)], lp=lambda: [LPCallback(truth=truth)],
        mt=lambda: [MeanTeacherCallback()], fixmatch=lambda: [FixMatchCallback(unlabeled_tfms=tfms)],
        strong=lambda: [LPCallback.strong(truth=truth, unlabeled_tfms=tfms)],
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
    "Indices of the labeled items for as many batches as there are two-stream batches in an epoch"
    return np.resize(np.flatnonzero(y >= 0), -(-(y < 0).sum()//(bs-labeled_bs))*bs)


def head_learner(data, y, labeled_only, bs=64, labeled_bs=32):
    own, c = repeated(y, bs, labeled_bs) if labeled_only else np.arange(len(y)), int(data.y.max())+1
    dls = DataLoaders.from_dsets(Items(data.x[own], y[own]), Items(data.new_x, data.new_y), bs=bs, device='cpu')
    dls.c = c
    head = nn.Sequential(*LinBnDrop(data.x.shape[1], 512, p=.25, act=nn.ReLU()), *LinBnDrop(512, c, p=.5))
    return Learner(dls if labeled_only else semi_dls(dls, labeled_bs), head, CrossEntropyLossFlat(), metrics=error_rate)


def fine_learner(data, y, labeled_only, bs=40, labeled_bs=10):
    own = repeated(y, bs, labeled_bs) if labeled_only else np.arange(len(y))
    data = replace(data, train=own, shown=y[own], ids=None)
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


def run(layer, data, method, labels, draw, lr):
    "Errors of the epochs, accuracy of the pseudo-labels, seconds"
    start, truth = time.perf_counter(), data.y if layer == 'head' else data.truth[data.train]
    y = shown(truth, labels, draw)
    set_seed(draw)
    learn = (head_learner if layer == 'head' else fine_learner)(data, y, method == 'supervised')
    cbs = callbacks(method, layer, truth)
    with learn.no_bar(), learn.no_logging():
        if layer == 'head': learn.fit_one_cycle(10, lr, cbs=cbs)
        else: learn.fine_tune(8, lr, freeze_epochs=1, cbs=cbs)
    place = learn.recorder.metric_names[1:].index('error_rate')
    errors = [round(float(o[place]), 4) for o in learn.recorder.values]
    right = [round(o['accuracy'], 4) for o in learn.lp_record.history] if hasattr(learn, 'lp_record') else None
    return dict(error=errors[-1], errors=errors, right=right, sec=round(time.perf_counter()-start))


@call_parse
def main(
    layer:str, # head or fine
    data:str='photos', # of a head: photos or sentences
    methods:str='supervised,network,mt,fixmatch,lp+fixmatch,lp,strong', # separated by commas
    labels:str='4,10,25', # per class, separated by commas; fine: 10
    draws:str='0-4', # range of the draws
    tune:str=None, # learning rates, separated by commas, instead of the best ones; for draws from 100 on
    cache:str=None, # folder for the embeddings; the folder of the data if not given
    out:str=str(Path(__file__).parent/'results/real'), # folder of the results
):
    torch.set_num_threads(1)
    file, (first, last) = Path(out)/('tune.jsonl' if tune else 'training.jsonl'), map(int, draws.split('-'))
    if tune and first < 100: raise SystemExit('tune on draws from 100 on, which are not reported')
    folder, names = Path(os.environ.get('FASTAI_LP_DATA', '.')), ('layer', 'data', 'method', 'labels', 'draw', 'lr')
    done = {tuple(o[k] for k in names) for _, o in read_json_lines(file)} if file.exists() else set()
    seed = TUNING_IMAGES if tune else IMAGES
    found = rows(data, cache, seed) if layer == 'head' else images(folder, seed)
    for draw in range(first, last+1):
        for count in map(int, labels.split(',')) if layer == 'head' else [10]:
            for method in methods.split(','):
                for lr in map(float, tune.split(',')) if tune else [RATES[layer].get(method, 2e-3)]:
                    key = layer, data, method, count, draw, lr
                    if key in done: continue
                    res = run(layer, found, method, count, draw, lr)
                    append_json_line(file, dict(zip(names, key), **res))
                    print(*key, f"error {res['error']:.1%}, {res['sec']} s", flush=True)
