"""A training step of the 13-layer network and an epoch's update, on a GPU: time, share of what the device could do at most, and what each choice adds.

    python benchmarks/gpu.py step [--bs 100] [--repeats 5] [--compile] [--trace trace.json]
    python benchmarks/gpu.py update [--n 50000] [--c 10 100] [--peer]
    python benchmarks/gpu.py plan

step    made-up images of CIFAR-10's size, as bytes on the device. `network` is forward, backward and optimizer on a batch that stays where it is: in
        float32, in bfloat16, in bfloat16 with channels_last, then captured as a CUDA graph, and with `--compile` through `torch.compile`. `batch` is a batch of two streams with
        its augmentation, `learner` a whole step of fastai with `LPCallback`, as `lp_train cifar10 --bf16 --channels-last` runs it. The bound is the
        network's floating-point operations, counted by torch, over the best rate of a large matrix product in bfloat16 here. The variants take
        turns; medians over the repeats.
update  `propagate` on `n` made-up items of 128 numbers (those of `step.py`): seconds of each stage, the device waited for after each; bounds are n²d multiplications and
        additions at the best rate of a matrix product in float32 for the search, and for the diffusion one reading of the neighbours' scores per edge and
        iteration at the best rate of a copy. `--peer` adds the authors' algorithm on the CPU of the same machine. From 200,000 items on the graph takes FAISS's index where FAISS is, as everywhere.
plan    the commands of the paper's tables, in the order of their worth: each goes on where it was stopped.

Lines of JSON on standard output, and appended to `--out`. Without a GPU everything runs on the CPU, to try the program: take small numbers. On a GPU none of it has run yet."""
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
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch.utils.flop_counter import FlopCounterMode

from fastai_lp.experiments.batches import LossOnDevice, image_dls
from fastai_lp.learner.callback import LPCallback
from fastai_lp.utils.files import append_json_line
from fastai_lp.experiments.models import ConvNet13
from fastai_lp.transductive.propagate import propagate
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.train import _BFloat16, _optimizer, environment
from strong_step import Clock, made_up  # beside this script

PLAN = [  # the paper's Table 1 and 2, CIFAR-10: command of a run, in the order of their worth
    ('supervised and lp, 500 labels', 'supervised,lp', 500, '10', ''),
    ('no weights', 'lp', 500, '10', '--no-omega --no-zeta'), ('ζ alone', 'lp', 500, '10', '--no-omega'), ('ω alone', 'lp', 500, '10', '--no-zeta'),
    ('network and game', 'network,gtg', 500, '10', ''), ('Mean Teacher', 'mt,mt+lp', 500, '10', ''), ('beyond the paper', 'strong', 500, '10', ''),
    ('more splits', 'supervised,lp', 500, '11-12', ''), ('1,000 labels', 'supervised,lp', 1000, '10', ''), ('4,000 labels', 'supervised,lp', 4000, '10', '')]


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def timed(f, device):
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter()-start


def best_rate(device, dtype, size):
    "Floating-point operations per second of a large matrix product"
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2*size**3/min(timed(lambda: a @ a, device) for _ in range(9))


def best_copy(device, numbers):
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
        "The step as one CUDA graph; its learning rate is fixed in it"
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): self.step()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded): self.step()
        self.step = recorded.replay


def learner_step(dls, device):
    set_seed(0)
    clock = Clock()
    learn = Learner(dls, ConvNet13(10), opt_func=_optimizer(RECIPES['cifar10']), cbs=[clock, LossOnDevice(), _BFloat16(), ChannelsLast()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05, cbs=LPCallback())
    return clock.sec


def step(args):
    device, bs = args.device, args.bs
    dls = image_dls(made_up(max(bs//2, 20), (bs-bs//2)*args.steps, 20), bs, bs//2, device=device)
    with FlopCounterMode(display=False) as counter:
        net = Network(device, bs)
        counted = counter.get_total_flops()/3  # it has made three steps
    rate = best_rate(device, torch.bfloat16, args.matrix)
    variants = dict(float32=net, bfloat16=Network(device, bs, True), channels_last=Network(device, bs, True, True))
    if args.compile: variants['compiled'] = Network(device, bs, True, True, compiled=True)
    if device.type == 'cuda': variants['cuda_graph'] = Network(device, bs, True, True, graph=True)
    batches = iter(dls.train)
    next(batches)
    def many(f, n): return timed(lambda: [f() for _ in range(n)], device)/n
    def batch(): return [None for _ in zip(range(args.steps-1), batches)]
    seconds = {k: [] for k in [*(f'network {o}' for o in variants), 'batch', 'learner']}
    for i in range(args.repeats):
        for name, v in variants.items(): seconds[f'network {name}'].append(many(v.step, args.steps))
        batches = iter(dls.train)
        seconds['batch'].append(timed(batch, device)/(args.steps-1))
        seconds['learner'].append(learner_step(dls, device))
    if args.trace:
        with torch.profiler.profile() as prof: learner_step(dls, device)
        prof.export_chrome_trace(str(args.trace))
    bound = counted/rate
    return [dict(part='step', bs=bs, gflop=counted/1e9, tflops_at_best=rate/1e12, bound_ms=1000*bound,
        **{k: dict(ms=1000*median(v), img_per_s=bs/median(v), **({} if k == 'batch' else dict(share_of_bound=bound/median(v)))) for k, v in seconds.items()})]


def update(args):
    from step import NOISE, authors_step, items  # FAISS and SciPy, which the rest does without
    from fastai_lp.transductive.propagate import seed_matrix
    device, rows = args.device, []
    flops, copied = best_rate(device, torch.float32, args.matrix), best_copy(device, args.numbers)
    for n in args.n:
        for c in args.c:
            x, truth, y = items(n, 128, c, NOISE.get(c, 2.))
            on, labels = x.to(device), y.to(device)
            runs = []
            for i in range(args.repeats+1):
                total = timed(lambda: runs.append(propagate(on, labels, c, k=args.k)), device)
                runs[-1].seconds['all'] = total
            res = runs[-1]
            row = dict(part='update', n=n, c=c, k=args.k, edges=len(res.W.values()), accuracy=res.accuracy(truth), graph=res.graph,
                seconds={o: median(r.seconds[o] for r in runs[1:]) for o in res.seconds},
                bound=dict(neighbours=2*n*n*128/flops, diffusion=20*len(res.W.values())*4*c/copied, tflops=flops/1e12, gb_per_s=copied/1e9))
            if args.peer:
                start = time.perf_counter()
                labels, _ = authors_step(x.numpy(), seed_matrix(y, c).numpy(), args.k)
                free = (y < 0).numpy()
                row['authors'] = dict(seconds=time.perf_counter()-start, accuracy=float((labels == truth.numpy())[free].mean()))
            rows.append(row)
    return rows


def plan(args):
    for what, methods, labels, split, more in PLAN:
        print(f"# {what}\nlp_train cifar10 --data cifar10_jpeg.npz --labels {labels} --methods {methods} --split {split} --bf16 --channels-last --out benchmarks/results/cifar10 {more}".rstrip())
    return []


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=['step', 'update', 'plan'])
    parser.add_argument('--device', type=torch.device, default=torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
    parser.add_argument('--bs', type=int, default=100)
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--trace', type=Path)
    parser.add_argument('--n', type=int, nargs='+', default=[50_000])
    parser.add_argument('--c', type=int, nargs='+', default=[10, 100])
    parser.add_argument('--k', type=int, default=50)
    parser.add_argument('--peer', action='store_true')
    parser.add_argument('--matrix', type=int, default=8192, help='rows and columns of the matrix product that gives the best rate')
    parser.add_argument('--numbers', type=int, default=2**28, help='numbers of the copy that gives the best rate')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    for row in dict(step=step, update=update, plan=plan)[args.part](args):
        row['environment'], row['date'] = environment(args.device), time.strftime('%Y-%m-%d')
        print(json.dumps(row), flush=True)
        if args.out: append_json_line(args.out, row)
