"""Records the features of every epoch of a training run on real data, for index.py.

    python benchmarks/record_features.py cifar10 --data cifar10_jpeg.npz --splits cifar10_splits.npz
    python benchmarks/record_features.py digits

Writes NAME-EPOCH.npy (float16 [n, d], 13 MB for 50,000 items) and NAME.npz (labels, truth) to --folder. On CIFAR-10
it trains a network small enough for two cores (128 feature dimensions), for 4 epochs on the labeled items and then
for --epochs on all."""
import time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from torch import nn

from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.experiments.readers import cifar10
from fastai_lp.experiments.splits import show_labels
from fastai_lp.learner.callback import LPCallback
from fastai_lp.transductive.labelers import Diffusion


class Recording(Diffusion):
    "`Diffusion` that saves the features it receives"
    def __call__(self, feats, logits, y):
        np.save(self.files.format(self.epoch), feats.half().cpu().numpy())
        self.epoch += 1
        return super().__call__(feats, logits, y)


def conv(n_in, n_out):
    layer = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))


def network(c):
    stages = conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 128)
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, c))


@call_parse
def main(
    name:str, # 'cifar10' or 'digits'
    data:str=None, # folder or .npz file of CIFAR-10; default: download it
    splits:str=None, # .npz file with splits, of which row 10 is used; default: a random draw
    labels:int=4000, # labeled images of CIFAR-10
    n:int=None, # training images of CIFAR-10; default: all
    epochs:int=20, # with label propagation, after 4 epochs on labeled items
    folder:Path='results/drift', # for the files
):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labeler = Recording()
    labeler.files, labeler.epoch = str(folder/f'{name}-{{}}.npy'), 0
    if name == 'cifar10':
        d = show_labels(cifar10(data, n_train=n, n_test=2000), labels, file=splits, split=10 if splits else None)
        dls, model, lr = image_dls(d, 100, 50, device='cpu'), network(d.n_classes), 5e-3
    else:
        d = digits(labels=20)
        dls, model, lr = digits_dls(d, device='cpu'), small_convnet(10), 1e-2
    set_seed(0)
    learn = Learner(dls, model.to(memory_format=torch.channels_last), metrics=accuracy, cbs=ChannelsLast())
    np.savez(folder/f'{name}.npz', y=d.shown, truth=d.train_truth.numpy())
    start = time.perf_counter()
    learn.fit_one_cycle(epochs+4, lr, cbs=LPCallback(labeler, warmup=4, truth=d.train_truth))
    print(learn.lp_record.to_df().to_string(), f'\n{time.perf_counter()-start:.0f} s')
