"""How well `familiarity` finds unlabeled items of no class: digits, photographs and texts of real_data.py, with 60 % of the
classes (drawn at random) known and items of the others added until they are 40 % of the unlabeled ones.

A line has the area under the ROC curve of the order by familiarity, the share of junk among the tenth that is least
familiar, and the area for the entropy of the pseudo-labels of `LabelDiffusion(None)`. Reproduces results/real/junk.jsonl:

    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/junk.py"""
from pathlib import Path

import numpy as np
from fastcore.script import call_parse
from real_data import rows
from sklearn.metrics import roc_auc_score

from fastai_lp.transductive.curation import familiarity
from fastai_lp.transductive.propagate import propagate
from fastai_lp.utils.files import append_json_line


def with_junk(data, labels, draw):
    "(features, labels of known classes or −1, whether an item is junk)"
    rng, c = np.random.default_rng(1000+draw), data.y.max()+1
    known = rng.permutation(c)[:round(.6*c)]
    good = np.isin(data.y, known)
    junk = rng.permutation(np.flatnonzero(~good))[:(good.sum()-labels*len(known))*2//3]
    y = np.full(len(data.y), -1)
    for j, k in enumerate(known): y[rng.permutation(np.flatnonzero(data.y == k))[:labels]] = j
    kept = np.sort(np.concatenate([np.flatnonzero(good), junk]))
    return data.x[kept], y[kept], ~good[kept]


@call_parse
def main(
    data:str='digits,photos,sentences', # names of data sets, separated by commas
    draws:str='0-4', # range of the draws
    cache:str=None, # folder for the embeddings; the folder of the data if not given
    out:str=str(Path(__file__).parent/'results/real/junk.jsonl'), # file of the results
):
    first, last = map(int, draws.split('-'))
    for name in data.split(','):
        d = rows(name, cache)
        for labels in (4, 10):
            for draw in range(first, last+1):
                x, y, junk = with_junk(d, labels, draw)
                p, free = propagate(x, y), y < 0
                f = familiarity(p.W, y >= 0).numpy()[free]
                least = f.argsort()[:len(f)//10]
                found = dict(data=name, labels=labels, draw=draw, junk=junk[free].mean(), auc=roc_auc_score(junk[free], -f))
                found |= dict(least=junk[free][least].mean(), entropy_auc=roc_auc_score(junk[free], -p.certainty.numpy()[free]))
                append_json_line(out, found)
                print(name, labels, draw, f"AUC {found['auc']:.2f}", flush=True)
