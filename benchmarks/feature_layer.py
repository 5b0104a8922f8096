"""Compares two feature layers of a fastai vision model: the pooling at the start of its head, and the input of its
last Linear.

A ResNet-18 with fastai's head and random weights trains for 40 steps on the labels, then for 2 epochs with label
propagation on either kind of features. Prints the pseudo-label accuracy before any training and after the 40 steps,
and the final test error. CIFAR-10 is skipped without --data. Reproduces results/feature_layer.json:

    OMP_NUM_THREADS=1 python benchmarks/feature_layer.py --data cifar10_jpeg.npz --out benchmarks/results/feature_layer.json"""
import json
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.metrics import error_rate
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage
from fastai.vision.learner import create_vision_model
from fastcore.script import call_parse
from torchvision.models import resnet18

from fastai_lp.experiments.datasets import Rows, digits
from fastai_lp.experiments.readers import cifar10
from fastai_lp.experiments.train import environment
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.layers import find_classifier
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.transductive.propagate import propagate

COLUMNS = 'pseudo-label accuracy, untrained', 'pseudo-label accuracy, after warm-up', 'test error'


def digit_images():
    d = digits()
    return F.interpolate((d.images+1)/2, size=32, mode='bilinear').expand(-1, 3, -1, -1), d


def cifar_images(file):
    d = cifar10(file, n_train=1500, n_test=500, cache=False)
    return d.images/255, d


def learner(x, d, labels, steps, flip, seed):
    "A Learner with two-stream batches, and batches of labeled items only for a number of steps"
    set_seed(seed)
    args = dict(bs=64, num_workers=0, device='cpu',
        after_batch=aug_transforms(do_flip=flip, max_rotate=10, max_warp=0, max_lighting=0))
    def datasets(items):
        n, tfms = len(items), [[Rows(x, TensorImage)], [Rows(labels), SemiCategorize(vocab=range(10))]]
        return Datasets([*items, *d.test], tfms, splits=[list(range(n)), list(range(n, n+len(d.test)))])
    semi = datasets(d.train).semi_dataloaders(**args)
    labeled = datasets(np.resize([i for i in d.train if labels[i] is not None], steps*64)).dataloaders(**args)
    return Learner(semi, create_vision_model(resnet18, 10, pretrained=False), metrics=error_rate), labeled


def run(x, d, per_class, flip, seed, steps=40, epochs=2):
    "COLUMNS for each layer"
    shown, res = hide_labels(d.truth[d.train], n=per_class, seed=seed)[0], {}
    labels = [None]*len(d.truth)
    for i, o in zip(d.train, shown): labels[i] = None if o < 0 else int(o)
    for i in d.test: labels[i] = int(d.truth[i])
    for where in ('pooled', 'last Linear'):
        learn, labeled = learner(x, d, labels, steps, flip, seed)
        *_, before_last, classifier = learn.model[1].children()  # an inactive Dropout, and the last Linear
        assert classifier is find_classifier(learn.model, 10)
        extractor = Extractor(None if where == 'pooled' else before_last)
        def accuracy(): return propagate(extractor(learn).feats, shown).accuracy(d.truth[d.train])
        with learn.no_bar(), learn.no_logging():
            row, semi = [accuracy()], learn.dls
            learn.dls = labeled
            learn.fit_one_cycle(1, 1e-3)
            learn.dls = semi
            row.append(accuracy())
            learn.fit_one_cycle(epochs, 1e-3, cbs=LPCallback(features=extractor))
            res[where] = [*row, learn.validate()[1]]
    return res


@call_parse
def main(
    data:str=None, # cifar10_jpeg.npz; without it, only the digits
    seeds:int=2, # number of runs
    out:str=None, # .json file of the result
):
    sets, table = dict(digits=(*digit_images(), 2, False)), {}
    if data: sets['cifar10'] = *cifar_images(data), 25, True
    for name, args in sets.items():
        runs = [run(*args, seed) for seed in range(seeds)]
        for where in runs[0]:
            v = 100*np.array([r[where] for r in runs])
            mean, se = v.mean(0), v.std(0, ddof=1)/np.sqrt(len(v))
            table[f'{name}, {where}'] = dict(mean=mean.tolist(), se=se.tolist())
            values = ', '.join(f'{column} {m:.1f} ± {s:.1f} %' for column, m, s in zip(COLUMNS, mean, se))
            print(f'{name:<8} {where:<12} {values}', flush=True)
    res = dict(columns=COLUMNS, seeds=seeds, environment=environment(), percent=table)
    if out: Path(out).write_text(json.dumps(res, indent=1))
