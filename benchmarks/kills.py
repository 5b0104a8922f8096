"""Does a run that is killed again and again end as one that never was?

A run of Mean Teacher with label propagation on the digits, in two stages, as `lp_train` does it, goes through once. Then the same run is killed
(SIGKILL) at a random moment, started again, killed again, until it ends; and the whole again in a new folder, until so many kills are done. After
every kill each file that has its final name must be whole; after every end each file must hold what that of the first run holds, to the last
bit, but for the seconds that it took. Every process is a fork of one that has imported everything, so that the kills fall on the work.

With --places it does not wait for chance: a process kills itself while it does this or that, each so many times, and is started again.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200 --out benchmarks/results/kills.json
    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 0 --places 5 --out benchmarks/results/kill_places.json
"""
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastcore.script import call_parse

from fastai_lp.transductive import diffusion, graph, neighbors as search
from fastai_lp.experiments import commands as experiments
from fastai_lp.learner import features, losses
from fastai_lp.experiments.commands import run_experiment
from fastai_lp.utils.files import checked, read_json_lines, read_npz
from fastai_lp.experiments.recipes import RECIPES

TIMES = 'sec', 'seconds', 'lp_sec', 'time', 'values'  # the Recorder's rows, which have seconds among them, stand in the .jsonl file with their names


def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def half(f, **kwargs): f.write(b'half'), f.flush(), die()


def after(f, *args): f(*args), die()


PLACES = {  # what is replaced, by what; the chance that a call is the last
    'descriptors': (features, '_pooled', die, .02), 'search': (search, '_drop_self', die, .1), 'graph': (graph, '_plus_transpose', die, .1), 'diffusion': (diffusion, 'spmm', die, .01),
    'training step': (losses, 'weighted_cross_entropy', die, .01), 'state half written': (torch, 'save', lambda o, f: half(f), .2), 'pseudo-labels half written': (np, 'savez_compressed', half, .4),
    'before the new file takes its place': (os, 'replace', die, .15), 'after it has taken its place': (os, 'replace', partial(after, os.replace), .15), 'result': (experiments, 'append_json_line', die, 1.)}


def plant(place, rng):
    "From now on each call of the place may be the last thing that this process does"
    module, name, end, chance = PLACES[place]
    real = getattr(module, name)
    def risky(*args, **kwargs): return (end if rng.random() < chance else real)(*args, **kwargs)
    setattr(module, name, risky)


def fork(folder, epochs, place=None, rng=None):
    "The process that runs, or goes on with, the run in `folder`"
    if pid := os.fork(): return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
        if place: plant(place, rng)
        run_experiment('digits', 20, ['mt+lp'], [0], replace(RECIPES['digits'], stage1=epochs, stage2=2*epochs), out=folder)
        code = 0
    finally: os._exit(code)


def update(sha, o):
    "A digest of nested lists, dicts, tensors and numbers, seconds left out"
    if isinstance(o, dict):
        for k in sorted(o, key=str):
            if k not in TIMES and not str(k).startswith('seconds'): update(sha, k), update(sha, o[k])
    elif isinstance(o, (list, tuple)):
        for x in o: update(sha, x)
    elif isinstance(o, (torch.Tensor, np.ndarray)):
        o = np.ascontiguousarray(o)
        sha.update(f'{o.dtype}{o.shape}'.encode() + o.tobytes())
    else: sha.update(repr(o).encode())


def contents(file):
    "What is in a file; an error where it is not whole"
    if file.suffix == '.pth': return torch.load(checked(file), weights_only=True)
    if file.suffix == '.npz':
        f = read_npz(file, checksum=True)
        return {**f, 'history': json.loads(f['history'].item())}
    return [{k: v for k, v in o.items() if k != 'environment'} for _, o in read_json_lines(file)]


def state(folder):
    "{name: digest} of the files of a run"
    res = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in ('.tmp', '.lock'): continue
        update(sha := hashlib.sha256(), contents(file))
        res[file.name] = sha.hexdigest()
    return res


def at_places(folders, epochs, times, expected, rng):
    "{place: kills}, and what ended otherwise than expected"
    done, different = dict.fromkeys(PLACES, 0), []
    for place in PLACES:
        while done[place] < times:
            folder = next(folders)
            status = os.waitpid(fork(folder, epochs, place, random.Random(rng.random())), 0)[1]
            if status != signal.SIGKILL: continue  # chance spared it
            done[place] += 1
            state(folder)
            if os.waitpid(fork(folder, epochs), 0)[1] or state(folder) != expected or list(folder.glob('*.tmp')): different.append(place)
        print(f'{place}: killed {times} times, {different.count(place)} lost or different', flush=True)
    return done, different


@call_parse
def main(
    kills:int=200, # how many, at random moments
    places:int=0, # how many at each of `PLACES`
    epochs:int=3, # of the first stage; the second has twice as many
    seed:int=0, # of the moments
    out:str=None, # add the result to this .json file
):
    torch.set_num_threads(1)
    rng, moments, ends, different, swept = random.Random(seed), [], 0, [], 0
    with tempfile.TemporaryDirectory() as tmp:
        folders = (Path(tmp)/f'run{i}' for i in range(10**6))
        start = time.perf_counter()
        assert os.waitpid(fork(folder := next(folders), epochs), 0)[1] == 0, 'the run fails without being killed'
        length, expected = time.perf_counter()-start, state(folder)
        print(f'a run: {length:.1f} s, {len(expected)} files', flush=True)
        if places: done, different = at_places(folders, epochs, places, expected, rng)
        folder = next(folders)
        while kills:
            pid, moment = fork(folder, epochs), rng.uniform(0, length)
            if len(moments) < kills:
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if status == signal.SIGKILL:
                moments.append(round(moment, 2))
                if folder.exists():
                    swept += len(list(folder.glob('*.tmp')))
                    state(folder)  # whole, all of them
                continue
            found, ends = state(folder), ends+1
            if status or found != expected or list(folder.glob('*.tmp')): different.append(dict(run=ends, status=status, files=[k for k in {**found, **expected} if found.get(k) != expected.get(k)]))
            if ends % 5 == 0 or len(moments) == kills: print(f'{len(moments)} kills, {ends} runs ended, {len(different)} lost or different, {swept} kills while a file was written', flush=True)
            if len(moments) == kills: break
            folder = next(folders)
    res = dict(kills=len(moments), ends=ends, different=different, while_written=swept, seconds_of_a_run=round(length, 1), files=len(expected), moments=moments, **(dict(places=done) if places else {}))
    if out: Path(out).write_text(json.dumps(res) + '\n')
    sys.exit(bool(different))
