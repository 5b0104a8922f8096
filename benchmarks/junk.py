"""How well `familiarity` finds unlabeled items of no class: digits, photographs and texts of real_data.py, with 60 % of the
classes (drawn at random) known and items of the others added until they are 40 % of the unlabeled ones.

A line has the area under the ROC curve of the order by familiarity, the share of junk among the tenth that is least
familiar, and the area for the entropy of the pseudo-labels of `LabelDiffusion(None)`. Reproduces results/real/junk.jsonl:

    FASTAI_LP_DATA=folder OMP_NUM_THREADS=1 python benchmarks/junk.py"""
from pathlib import Path

from fastcore.script import call_parse
from real_data import rows, with_junk
from sklearn.metrics import roc_auc_score

from fastai_lp.transductive.curation import familiarity
from fastai_lp.transductive.propagate import propagate
from fastai_lp.utils.files import append_json_line


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
                kept, y, truth, _ = with_junk(d.y, labels, draw)
                p, free, junk = propagate(d.x[kept], y), y < 0, truth < 0
                f = familiarity(p.W, y >= 0).numpy()[free]
                least = f.argsort()[:len(f)//10]
                found = dict(data=name, labels=labels, draw=draw, junk=junk[free].mean(), auc=roc_auc_score(junk[free], -f))
                found |= dict(least=junk[free][least].mean(), entropy_auc=roc_auc_score(junk[free], -p.certainty.numpy()[free]))
                append_json_line(out, found)
                print(name, labels, draw, f"AUC {found['auc']:.2f}", flush=True)
