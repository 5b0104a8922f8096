"""Measures a training step of the 13-layer network and an update of the pseudo-labels on a GPU: time, share of the
device's limits, and what each choice gains.

step    synthetic images of CIFAR-10's size as bytes on the device. `network` is forward, backward and optimizer on one
        batch: in float32, bfloat16, bfloat16 with channels_last, as a CUDA graph, and with --compile through
        torch.compile. `batch` is a two-stream batch with its augmentation, `learner` a complete step of fastai with
        `LPCallback`, as in `lp_train cifar10 --bf16 --channels-last`. The bound is the number of floating-point operations
        of the network over the rate of a large matrix product in bfloat16. Variants take turns; medians over repeats.
update  `propagate` on `n` synthetic items with 128 dimensions (see step.py): seconds of each stage. Bounds: n²d
        multiplications and additions at the rate of a float32 matrix product for the search; one read of the neighbors'
        scores per edge and iteration at the rate of a copy for the diffusion. --peer adds the authors' algorithm on the CPU.
plan    the commands of the paper's tables, the most useful first. Each continues where it was interrupted.

Prints lines of JSON, and appends them to --out. Without a GPU everything runs on the CPU, for a trial with small
numbers. `step` and `update` have run on one H200, without FAISS on the GPU; the paper's tables have not. results/gpu/cifar10.jsonl
has three runs with 30 epochs of the second stage instead of 180 (`--epochs 180,30`, methods supervised, lp and network).

    python benchmarks/gpu.py step --compile --out benchmarks/results/gpu/gpu.jsonl
    python benchmarks/gpu.py update --c 10 --out benchmarks/results/gpu/gpu.jsonl
    python benchmarks/gpu.py plan"""
import argparse
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.progress import ProgressCallback  # chkstyle: ignore (adds Learner.no_bar)
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch.utils.flop_counter import FlopCounterMode

from fastai_lp.experiments.batches import image_dls
from fastai_lp.experiments.callbacks import BFloat16, LossOnDevice
from fastai_lp.experiments.models import ConvNet13
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.train import environment, optimizer_of
from fastai_lp.learner.callback import LPCallback
from fastai_lp.transductive.propagate import propagate, seed_matrix
from fastai_lp.utils.files import append_json_line
from strong_step import Clock, synthetic

PLAN = [  # Tables 1 and 2: what, methods, labels, splits, other options
    ('supervised and lp, 500 labels', 'supervised,lp', 500, '10', ''),
    ('no weights', 'lp', 500, '10', '--no-omega --no-zeta'),
    ('ζ only', 'lp', 500, '10', '--no-omega'),
    ('ω only', 'lp', 500, '10', '--no-zeta'),
    ('network and game', 'network,gtg', 500, '10', ''),
    ('Mean Teacher', 'mt,mt+lp', 500, '10', ''),
    ('beyond the paper', 'strong', 500, '10', ''),
    ('more splits', 'supervised,lp', 500, '11-12', ''),
    ('1,000 labels', 'supervised,lp', 1000, '10', ''),
    ('4,000 labels', 'supervised,lp', 4000, '10', '')]
COMMAND = ('lp_train cifar10 --data cifar10_jpeg.npz --labels {labels} --methods {methods} --split {split} '
    '--bf16 --channels-last --out benchmarks/results/cifar10 {more}')


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def timed(f, device):
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter()-start


def matrix_rate(device, dtype, size):
    "Floating-point operations per second of a large matrix product"
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2*size**3/min(timed(lambda: a @ a, device) for _ in range(9))


def copy_rate(device, numbers):
    "Bytes read and written per second"
    a = torch.randn(numbers, device=device)
    b = torch.empty_like(a)
    return 8*numbers/min(timed(lambda: b.copy_(a), device) for _ in range(9))


class Network:
    "Forward, backward and optimizer on one batch"
    def __init__(self, device, bs, bf16=False, channels_last=False, compiled=False, graph=False):
        set_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = ConvNet13(10).to(device).to(memory_format=layout)
        self.x = torch.randn(bs, 3, 32, 32, device=device).to(memory_format=layout)
        self.y = F.one_hot(torch.arange(bs, device=device) % 10, 10).float()
        self.opt = torch.optim.SGD(self.model.parameters(), .05, .9, weight_decay=2e-4, nesterov=True)
        self.cast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
        self.run = torch.compile(self.model) if compiled else self.model
        for _ in range(3): self.step()
        if graph: self.capture()

    def step(self):
        with self.cast(): pred = self.run(self.x)
        (-(self.y*pred.float().log_softmax(1)).sum(1)).mean().backward()
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)

    def capture(self):
        "Record the step as a CUDA graph, with a fixed learning rate"
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): self.step()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded): self.step()
        self.step = recorded.replay


def learner_step(dls):
    "Seconds per step of a Learner"
    set_seed(0)
    cbs = [clock := Clock(), LossOnDevice(), BFloat16(), ChannelsLast()]
    learn = Learner(dls, ConvNet13(10), opt_func=optimizer_of(RECIPES['cifar10']), cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05, cbs=LPCallback())
    return clock.sec


def networks(args):
    "Variants of the network, and its floating-point operations per step"
    with FlopCounterMode(display=False) as counter:
        res = dict(float32=Network(args.device, args.bs))
        flops = counter.get_total_flops()/3  # of three steps
    make = partial(Network, args.device, args.bs, bf16=True)
    res |= dict(bfloat16=make(), channels_last=make(channels_last=True))
    if args.compile: res['compiled'] = make(channels_last=True, compiled=True)
    if args.device.type == 'cuda': res['cuda_graph'] = make(channels_last=True, graph=True)
    return res, flops


def step(args):
    device, bs = args.device, args.bs
    dls = image_dls(synthetic(max(bs//2, 20), (bs-bs//2)*args.steps, 20), bs, bs//2, device=device)
    variants, flops = networks(args)
    rate = matrix_rate(device, torch.bfloat16, args.matrix)
    batches = iter(dls.train)
    next(batches)
    def many(f): return timed(lambda: [f() for _ in range(args.steps)], device)/args.steps
    def read_batches(): return [None for _ in zip(range(args.steps-1), batches)]
    seconds = {k: [] for k in [*(f'network {o}' for o in variants), 'batch', 'learner']}
    for _ in range(args.repeats):
        for name, v in variants.items(): seconds[f'network {name}'].append(many(v.step))
        batches = iter(dls.train)
        seconds['batch'].append(timed(read_batches, device)/(args.steps-1))
        seconds['learner'].append(learner_step(dls))
    if args.trace:
        with torch.profiler.profile() as prof: learner_step(dls)
        prof.export_chrome_trace(str(args.trace))
    bound, res = flops/rate, {}
    for k, v in seconds.items():
        res[k] = dict(ms=1000*median(v), img_per_s=bs/median(v))
        if k != 'batch': res[k]['share_of_bound'] = bound/median(v)
    return [dict(part='step', bs=bs, gflop=flops/1e9, tflops_at_best=rate/1e12, bound_ms=1000*bound, **res)]


def update(args):
    from step import NOISE, items  # needs FAISS and SciPy, unlike the other parts
    rates = matrix_rate(args.device, torch.float32, args.matrix), copy_rate(args.device, args.numbers)
    return [update_row(args, items(n, 128, c, NOISE.get(c, 2.)), c, *rates) for n in args.n for c in args.c]


def update_row(args, data, c, flops, copied):
    x, truth, y = data
    on, labels, runs = x.to(args.device), y.to(args.device), []
    for _ in range(args.repeats+1):
        total = timed(lambda: runs.append(propagate(on, labels, c, k=args.k)), args.device)
        runs[-1].seconds['all'] = total
    res, n = runs[-1], len(x)
    edges = len(res.W.values())
    bound = dict(neighbors=2*n*n*128/flops, diffusion=20*edges*4*c/copied, tflops=flops/1e12, gb_per_s=copied/1e9)
    row = dict(part='update', n=n, c=c, k=args.k, edges=edges, accuracy=res.accuracy(truth), graph=res.graph,
        seconds={o: median(r.seconds[o] for r in runs[1:]) for o in res.seconds}, bound=bound)
    return row | (dict(authors=authors(x, truth, y, c, args.k)) if args.peer else {})


def authors(x, truth, y, c, k):
    from step import authors_step
    start = time.perf_counter()
    labels, _ = authors_step(x.numpy(), seed_matrix(y, c).numpy(), k)
    seconds, unlabeled = time.perf_counter()-start, (y < 0).numpy()
    return dict(seconds=seconds, accuracy=float((labels == truth.numpy())[unlabeled].mean()))


def plan(args):
    for what, methods, labels, split, more in PLAN:
        print(f'# {what}')
        print(COMMAND.format(methods=methods, labels=labels, split=split, more=more).rstrip())
    return []


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('part', choices=['step', 'update', 'plan'])
    parser.add_argument('--device', type=torch.device, default=device, help='default: the GPU if there is one')
    parser.add_argument('--bs', type=int, default=100, help='batch size')
    parser.add_argument('--steps', type=int, default=200, help='steps per repeat')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--compile', action='store_true', help='also with torch.compile')
    parser.add_argument('--trace', type=Path, help='write a trace of torch.profiler to this file')
    parser.add_argument('--n', type=int, nargs='+', default=[50_000], help='items of an update')
    parser.add_argument('--c', type=int, nargs='+', default=[10, 100], help='classes of an update')
    parser.add_argument('--k', type=int, default=50, help='neighbors')
    parser.add_argument('--peer', action='store_true', help="also the authors' algorithm on the CPU")
    parser.add_argument('--matrix', type=int, default=8192, help='rows and columns of the matrix product')
    parser.add_argument('--numbers', type=int, default=2**28, help='numbers in the copy')
    parser.add_argument('--out', type=Path, help='.jsonl file of the results')
    args = parser.parse_args(argv)
    for row in dict(step=step, update=update, plan=plan)[args.part](args):
        row |= dict(environment=environment(args.device), date=time.strftime('%Y-%m-%d'))
        print(json.dumps(row), flush=True)
        if args.out: append_json_line(args.out, row)


if __name__ == '__main__': main()
