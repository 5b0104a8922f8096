"""Five rounds of labeling: 20 more labels in each, chosen at random, by least certainty, or with `suggest`.

Starts with one label per class. photos, sentences, digits: `LabelDiffusion` on embeddings or pixels (see real_data.py). network:
a network for the digits, trained again in each round with `LPCallback`. All choices of a draw start with the same labels. Each
line of results/rounds/rounds.jsonl has the errors of a draw and a choice after 0 to 5 rounds: on unlabeled items ("unlabeled") and on new
ones ("new"). Lines that are in the file are skipped. About an hour and a half on one core. `suggest` was chosen on draws from 100
on, with other photographs. Reproduces results/rounds/rounds.jsonl:

    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/rounds.py --data photos,digits --draws 0-19
    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/rounds.py --data sentences
    OMP_NUM_THREADS=1 python benchmarks/rounds.py --data network --draws 0-4"""
from pathlib import Path

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from real_data import rows, shown

from fastai_lp.estimator import LabelDiffusion
from fastai_lp.experiments.datasets import digits, digits_dls
from fastai_lp.experiments.models import small_convnet
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.utils.files import append_json_line, read_json_lines

DATA = 'photos', 'sentences', 'digits', 'network'
CHOICES = 'random', 'least certain', 'suggest'
ROUNDS, PER_ROUND = 5, 20


def labeled_rows(name, cache, seed):
    "(true classes of the training rows, a function that trains with some labels)"
    d = rows(name, cache, seed)
    def train(y, draw):
        model = LabelDiffusion().fit(d.x, y)
        unlabeled = (model.transduction_ != d.y)[y < 0].mean()
        return dict(unlabeled=unlabeled, new=(model.predict(d.new_x) != d.new_y).mean()), model.certainty_, model.suggest
    return d.y, train


def network():
    "The same for a network on the digits"
    d = digits(10)
    truth = d.truth[d.train]
    def train(y, draw):
        set_seed(draw, reproducible=True)
        d.shown[:] = y
        learn = Learner(digits_dls(d), small_convnet(10), metrics=accuracy)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(20, 5e-3, cbs=LPCallback(warmup=5, truth=d.train_truth))
            errors = dict(unlabeled=1-learn.lp_record.history[-1]['accuracy'], new=1-learn.validate()[1])
        interp = LPInterpretation.from_learner(learn)
        return errors, interp.pseudo.certainty.numpy(), lambda m: interp.suggest(m).index.to_numpy()
    return truth, train


def run(truth, train, draw, choice):
    "Errors after 0 to 5 rounds"
    y, rng, found = shown(truth, 1, draw), np.random.default_rng(draw), []
    for n in range(ROUNDS+1):
        errors, certainty, suggest = train(y, draw)
        found.append(errors)
        if n == ROUNDS: return {k: [o[k] for o in found] for k in errors}
        free = np.flatnonzero(y < 0)
        if choice == 'random': items = rng.permutation(free)[:PER_ROUND]
        elif choice == 'suggest': items = suggest(PER_ROUND)
        else: items = free[certainty[free].argsort(kind='stable')[:PER_ROUND]]
        y[items] = truth[items]


@call_parse
def main(
    data:str=','.join(DATA), # names of data sets, separated by commas
    draws:str='0-9', # range of the draws of the first labels
    photos:int=10, # seed of the choice of photographs; another for tuning
    cache:str=None, # folder for the embeddings; the folder of the data if not given
    out:str=str(Path(__file__).parent/'results/rounds/rounds.jsonl'), # file of the results
):
    torch.set_num_threads(1)
    done = {(o['data'], o['draw'], o['choice']) for _, o in read_json_lines(out)} if Path(out).exists() else set()
    first, last = map(int, draws.split('-'))
    for name in data.split(','):
        truth, train = network() if name == 'network' else labeled_rows(name, cache, photos)
        for draw in range(first, last+1):
            for choice in CHOICES:
                if (name, draw, choice) in done: continue
                found = run(truth, train, draw, choice)
                append_json_line(out, dict(data=name, draw=draw, choice=choice, **found))
                print(name, draw, choice, [f'{100*o:.1f}' for o in found['new']], flush=True)
