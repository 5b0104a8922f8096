"""Where to read the descriptor of a fastai vision model: after the pooling that its head starts with, or before its last Linear.

    python benchmarks/descriptor.py [--data ../shared/data/cifar10_jpeg.npz] [--seeds 2]

A ResNet-18 with fastai's head, from random weights: 40 steps on the labels, then 2 epochs of label propagation with each
descriptor. Prints pseudo-label accuracy of both descriptors of the same network, before any training and after the warm-up,
and the test error in the end. CIFAR-10 is left out where its file is not there."""
import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.metrics import error_rate
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage
from fastai.vision.learner import create_vision_model
from PIL import Image
from torchvision.models import resnet18

from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize
from fastai_lp.learner.splitting import hide_labels
from fastai_lp.experiments.datasets import Rows, digits
from fastai_lp.experiments.commands import environment
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.layers import find_classifier
from fastai_lp.transductive.propagate import propagate


def digit_images():
    d = digits()
    x = torch.nn.functional.interpolate((d.images+1)/2, size=32, mode='bilinear').expand(-1, 3, -1, -1)
    return x, torch.tensor(d.truth), d.train, d.test, 2


def cifar_images(file, n_train=1500, n_test=500):
    with np.load(file) as f: f = {k: f[k] for k in f.files}
    def load(part, n):
        at = f[f'{part}_offsets']
        images = [Image.open(io.BytesIO(f[f'{part}_jpeg'][a:b].tobytes())) for a, b in zip(at[:n], at[1:n+1])]
        return torch.stack([torch.tensor(np.array(o)).permute(2, 0, 1)/255 for o in images])
    x = torch.cat([load('train', n_train), load('test', n_test)])
    y = torch.tensor(np.concatenate([f['train_labels'][:n_train], f['test_labels'][:n_test]])).long()
    return x, y, np.arange(n_train), np.arange(n_train, n_train+n_test), 25


def run(x, y, train, test, per_class, seed, steps, epochs):
    shown = hide_labels(y[train], n=per_class, seed=seed)[0]
    labels = [None]*len(y)
    for i, o in zip(train, shown): labels[i] = None if o < 0 else int(o)
    for i in test: labels[i] = int(y[i])
    res = {}
    for where in ('pooled', 'last Linear'):
        set_seed(seed)
        def datasets(items):
            return Datasets([*items, *test], [[Rows(x, TensorImage)], [Rows(labels), SemiCategorize(vocab=range(10))]],
                splits=[list(range(len(items))), list(range(len(items), len(items)+len(test)))])
        args = dict(bs=64, num_workers=0, device='cpu', after_batch=aug_transforms(do_flip=per_class > 2, max_rotate=10, max_warp=0, max_lighting=0))
        dls = datasets(train).semi_dataloaders(**args)
        labeled = datasets(np.resize([i for i in train if labels[i] is not None], steps*64)).dataloaders(**args)
        learn = Learner(dls, create_vision_model(resnet18, 10, pretrained=False), metrics=error_rate)
        *_, before_last, classifier = learn.model[1].children()   # a Dropout, which does nothing in evaluation mode, and the last Linear
        assert classifier is find_classifier(learn.model, 10)
        layer = None if where == 'pooled' else before_last
        def pseudo_accuracy(): return propagate(Extractor(layer)(learn).feats, shown).accuracy(y[train])
        with learn.no_bar(), learn.no_logging():
            row = [pseudo_accuracy()]
            learn.dls = labeled
            learn.fit_one_cycle(1, 1e-3)
            learn.dls = dls
            row.append(pseudo_accuracy())
            learn.fit_one_cycle(epochs, 1e-3, cbs=LPCallback(layer=layer))
            res[where] = [*row, learn.validate()[1]]
    return res


def main(data, seeds, out):
    sets = dict(digits=digit_images())
    if data.exists(): sets['cifar10'] = cifar_images(data)
    else: print(f'{data} is not here: CIFAR-10 left out')
    table = {}
    for name, (x, y, train, test, per_class) in sets.items():
        runs = [run(x, y, train, test, per_class, seed, steps=40, epochs=2) for seed in range(seeds)]
        for where in runs[0]:
            v = 100*np.array([r[where] for r in runs])
            table[f'{name}, {where}'] = dict(mean=v.mean(0).tolist(), se=(v.std(0, ddof=1)/np.sqrt(len(v))).tolist())
            print(f'{name:<8} {where:<12} pseudo-label accuracy: untrained {v[:, 0].mean():.1f} %, after warm-up {v[:, 1].mean():.1f} %; '
                f'test error {v[:, 2].mean():.1f} ± {v[:, 2].std(ddof=1)/np.sqrt(len(v)):.1f} %', flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(columns=['pseudo-label accuracy, untrained', 'pseudo-label accuracy, after warm-up', 'test error'],
        seeds=seeds, environment=environment(), percent=table), indent=1))


if __name__ == '__main__':
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=here.parents[1]/'shared'/'data'/'cifar10_jpeg.npz')
    parser.add_argument('--seeds', type=int, default=2)
    parser.add_argument('--out', type=Path, default=here/'results'/'descriptor.json')
    args = parser.parse_args()
    main(args.data, args.seeds, args.out)
