"""How far descriptors move from epoch to epoch: trains with LPCallback on real data and records the descriptors of every epoch.

    python benchmarks/drift.py record cifar10 [--data cifar10_jpeg.npz --splits cifar10_splits.npz --labels 4000] [--epochs 20] [--n 50000]
    python benchmarks/drift.py record digits

writes <name>-<epoch>.npy (float16 [n, d]) and <name>.npz (labels, truth) into --folder, 13 MB per epoch of 50,000 items.

The network for CIFAR-10 is a small one that two cores can train (4 + 1 convolutions, 128 numbers per image), trained with
fit_one_cycle for 4 epochs on the labeled items and then `--epochs` on all."""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.schedule import *  # fit_one_cycle
from torch import nn

from fastai_lp.experiments.batches import image_dls
from fastai_lp.learner.callback import LPCallback
from fastai_lp.experiments.datasets import cifar10, digits, digits_dls, show_labels
from fastai_lp.transductive.labelers import Diffusion
from fastai_lp.experiments.models import small_convnet


class Recording(Diffusion):
    "`Diffusion` that writes down the descriptors it is given"
    def __call__(self, feats, logits, y):
        np.save(self.files.format(self.epoch), feats.half().cpu().numpy())
        self.epoch += 1
        return super().__call__(feats, logits, y)


def conv(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


def net(c): return nn.Sequential(conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 128),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, c))


def record(args):
    args.folder.mkdir(parents=True, exist_ok=True)
    labeler = Recording()
    labeler.files, labeler.epoch = str(args.folder/f'{args.name}-{{}}.npy'), 0
    if args.name == 'cifar10':
        data = cifar10(args.data, n_train=args.n, n_test=2000)
        data = show_labels(data, args.labels, file=args.splits, split=10 if args.splits else None)
        dls, model, lr = image_dls(data, 100, 50, device='cpu'), net(data.n_classes), 5e-3
    else:
        data = digits(labels=20)
        dls, model, lr = digits_dls(data, device='cpu'), small_convnet(10), 1e-2
    set_seed(0)
    learn = Learner(dls, model.to(memory_format=torch.channels_last), metrics=accuracy, cbs=ChannelsLast())
    np.savez(args.folder/f'{args.name}.npz', y=data.shown, truth=data.train_truth.numpy())
    start = time.perf_counter()
    learn.fit_one_cycle(args.epochs+4, lr, cbs=LPCallback(labeler, warmup=4, truth=data.train_truth))
    print(learn.lp_record.to_df().to_string(), f'\n{time.perf_counter()-start:.0f} s')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('do', choices=['record'])
    parser.add_argument('name', choices=['cifar10', 'digits'])
    parser.add_argument('--data', type=Path)
    parser.add_argument('--splits', type=Path)
    parser.add_argument('--labels', type=int, default=4000)
    parser.add_argument('--n', type=int)
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--folder', type=Path, default='results/drift')
    record(parser.parse_args())
