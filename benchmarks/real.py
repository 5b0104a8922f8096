"""Compares `LabelDiffusion` with scikit-learn's classifiers on photographs, texts, digits and tables: 1, 4, 10 and 25 labels
per class. Settings were chosen on draws from 100 on, with other photographs.

Each line of results/real/real.jsonl has the errors of a model on one draw: on the unlabeled training rows ("unlabeled") and on
new rows ("new"). Peers get what they need most: logistic regression and kNN see the labels only, on rows as they are and
ℓ2-normalized, with several C and k. `LabelSpreading` has several k. The results page takes the best setting of each peer in
hindsight. Lines that are in the file are skipped. Data: see real_data.py. Reproduces results/real/real.jsonl:

    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/real.py --data photos,sentences,tfidf
    OMP_NUM_THREADS=1 python benchmarks/real.py --data digits,iris,wine,cancer --draws 0-19"""
import time
from functools import partial
from pathlib import Path

import numpy as np
from fastcore.script import call_parse
from real_data import DATA, rows, shown
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

from fastai_lp.estimator import LabelDiffusion
from fastai_lp.utils.files import append_json_line, read_json_lines

logistic = partial(LogisticRegression, max_iter=1000)
PEERS = {  # chkstyle: ignore-node
    # family: {setting: model}; a family's best setting is chosen in hindsight
    'logistic regression': {f'C={C}': logistic(C=C) for C in (.01, .1, 1, 10, 100, 1000)},
    'kNN': {f'k={k}': KNeighborsClassifier(k, weights='distance') for k in (1, 3, 5, 10)},
    'self-training': {f'C={C}': SelfTrainingClassifier(logistic(C=C)) for C in (1, 10, 100)},
    'LabelSpreading': {f'k={k}': LabelSpreading(kernel='knn', alpha=.9, n_neighbors=k, max_iter=200) for k in (7, 10, 20, 50)}}
OURS = {'LabelDiffusion()': LabelDiffusion(), 'LabelDiffusion(None)': LabelDiffusion(None)}
ON_LABELS = 'logistic regression', 'kNN'


def error(model, family, data, y):
    "Errors on unlabeled and on new rows, if there are any, and seconds"
    hidden, start = y < 0, time.perf_counter()
    if family in ON_LABELS:
        if getattr(model, 'n_neighbors', 0) > (~hidden).sum(): return None
        model = clone(model).fit(data.x[~hidden], y[~hidden])
    else: model = clone(model).fit(data.x, y)
    found = model.transduction_ if hasattr(model, 'transduction_') else model.predict(data.x)
    new = (model.predict(data.new_x) != data.new_y).mean() if len(data.new_x) else None
    return dict(unlabeled=(found != data.y)[hidden].mean(), new=new, sec=round(time.perf_counter()-start, 2))


def runs(data):
    "(family, setting, model, rows)"
    unit = data._replace(x=normalize(data.x), new_x=normalize(data.new_x) if len(data.new_x) else data.new_x)
    for name, model in OURS.items(): yield name, '', model, data
    for family, models in PEERS.items():
        for setting, model in models.items():
            yield family, setting, model, data
            yield family, f'{setting}, unit rows', model, unit


@call_parse
def main(
    data:str=','.join(DATA), # names of data sets, separated by commas
    draws:str='0-4', # range of the draws
    cache:str=None, # folder for the embeddings; the folder of the data if not given
    only:str='', # families, separated by commas; all if empty
    out:str=str(Path(__file__).parent/'results/real/real.jsonl'), # file of the results
):
    done = {(o['data'], o['labels'], o['draw'], o['model'], o['setting']) for _, o in read_json_lines(out)} if Path(out).exists() else set()
    first, last = map(int, draws.split('-'))
    for name in data.split(','):
        d = rows(name, cache)
        for labels in (1, 4, 10, 25):
            if np.bincount(d.y).min() <= labels: continue
            for draw in range(first, last+1):
                y = shown(d.y, labels, draw)
                for family, setting, model, o in runs(d):
                    key = name, labels, draw, family, setting
                    if key in done or only and family not in only.split(','): continue
                    found = error(model, family, o, y)
                    if found is None: continue
                    append_json_line(out, dict(zip(('data', 'labels', 'draw', 'model', 'setting'), key), **found))
            print(name, labels, flush=True)
