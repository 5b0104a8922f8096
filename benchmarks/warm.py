"""Twenty consecutive epochs of recorded descriptors: the whole step with refresh='auto' against the authors' algorithm and against refresh='exact'.

    python benchmarks/drift.py record cifar10 …                            # first: 20 epochs of training, see there
    OMP_NUM_THREADS=2 python benchmarks/warm.py results/drift/cifar10 [--c 10 100] [--save]
    OMP_NUM_THREADS=2 python benchmarks/warm.py results/drift/cifar10 --wobble .02 .05   # the last epoch's, moved at random in each epoch

With --c 100 each class is cut into ten by k-means on the last epoch's descriptors, a label for ten items of each: CIFAR-10 has ten
classes, the cost of a hundred is what is wanted. Contestants in every epoch, turn about: `authors` (step.py), `exact`, `auto`, and both
with index='HNSW16'. Times are sums over all epochs, searches included; ratio is the authors' sum over the contestant's.
Accuracy is that of the pseudo-labels, in percent, its difference to `exact` the largest over the epochs, and the mean."""
import argparse
import json
import time
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from fastai_lp.transductive.pseudo import propagate, seed_matrix
from fastai_lp.transductive.warm import Neighbors
from step import authors_step, machine


def hundred(x, truth):
    "Each class in ten"
    res = torch.empty_like(truth)
    for j in range(10):
        own = (truth == j).nonzero()[:, 0]
        km = faiss.Kmeans(x.shape[1], 10, seed=0)
        km.train(x[own].numpy())
        res[own] = 10*j + torch.from_numpy(km.index.search(x[own].numpy(), 1)[1][:, 0])
    return res


def epochs(args, wobble):
    "The descriptors of each epoch"
    def load(i): return F.normalize(torch.from_numpy(np.load(f'{args.record}-{i}.npy')).float())
    for i in range(args.epochs):
        if wobble is None: yield load(i)
        else:
            x = load(args.epochs-1)
            yield F.normalize(x + wobble*torch.randn(x.shape, generator=torch.Generator().manual_seed(i))/x.shape[1]**.5)


def run(args, c, wobble):
    known = np.load(f'{args.record}.npz')
    y, truth = torch.from_numpy(known['y']), torch.from_numpy(known['truth'])
    if c == 100:
        truth, y = hundred(F.normalize(torch.from_numpy(np.load(f'{args.record}-{args.epochs-1}.npy')).float()), truth), torch.full_like(y, -1)
        for j in range(100): y[(truth == j).nonzero()[:10, 0]] = j
    Y, free, k = seed_matrix(y, c).numpy(), y < 0, args.k
    kinds = {f'{refresh} {index}'.strip(): (Neighbors(refresh), index or 'auto') for index in ('', 'HNSW16') for refresh in ('exact', 'auto')}
    names = [o for o in ('authors', *kinds) if not args.only or o in args.only]
    seconds, accuracy, info = {o: [] for o in names}, {o: [] for o in names}, {o: [] for o in kinds}
    for i, x in enumerate(epochs(args, wobble)):
        for name in list(seconds)[::-1 if i % 2 else 1]:
            start = time.perf_counter()
            if name == 'authors': labels = torch.from_numpy(authors_step(x.numpy(), Y, k)[0])
            else:
                neighbors, index = kinds[name]
                p = propagate(x, y, c, k=k, index=index, neighbors=neighbors)
                labels = p.labels
            seconds[name].append(time.perf_counter() - start)
            accuracy[name].append(100*(labels == truth)[free].float().mean().item())
            if name in info: info[name].append(p.graph)
        print(i, {o: f'{t[-1]:.2f} s' for o, t in seconds.items()}, {o: f'{a[-1]:.2f}' for o, a in accuracy.items()}, info['auto'][-1], flush=True)
    res = dict(record=Path(args.record).name, epochs=args.epochs, n=len(y), d=x.shape[1], k=k, c=c, wobble=wobble, machine=machine(), date=time.strftime('%Y-%m-%d'), rows=[])
    for name, t in seconds.items():
        diff = [a - b for a, b in zip(accuracy[name], accuracy['exact'])]
        res['rows'].append(dict(name=name, mean=sum(t)/len(t), ratio=sum(seconds['authors'])/sum(t) if 'authors' in seconds else None, accuracy=sum(accuracy[name])/len(t), mean_diff=sum(diff)/len(t),
            worst_diff=min(diff), searched=sum(o['searched'] for o in info[name]) if name in info else None, seconds=t,
            recall=[o['recall'] for o in info.get(name, [])], overlap=[o.get('overlap') for o in info.get(name, [])]))
        print('{name:<14} mean {mean:6.2f} s, ratio {ratio}; accuracy {accuracy:.2f} %, to exact {mean_diff:+.2f} (worst {worst_diff:+.2f}); searched in {searched} epochs'.format(**res['rows'][-1]))
    return res


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('record', help='what benchmarks/drift.py recorded, without -EPOCH.npy')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--c', type=int, nargs='+', default=[10], choices=[10, 100])
    parser.add_argument('--k', type=int, default=50)
    parser.add_argument('--only', nargs='+', help="contestants; 'exact' must be among them")
    parser.add_argument('--wobble', type=float, nargs='+', default=[None])
    parser.add_argument('--save', action='store_true')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'warm.json')
    args = parser.parse_args()
    for c in args.c:
        for wobble in args.wobble:
            res = run(args, c, wobble)
            if not args.save: continue
            old = json.loads(args.out.read_text()) if args.out.exists() else []
            same = ('record', 'epochs', 'n', 'c', 'k', 'wobble')
            args.out.write_text(json.dumps([o for o in old if any(o[s] != res[s] for s in same)] + [res], indent=1) + '\n')
