"""Checks that a run that is killed again and again ends with the same files as an uninterrupted run.

Mean Teacher with label propagation trains on the digits in two stages, as in `lp_train`. After an uninterrupted run,
the same run is killed (SIGKILL) at random moments and started again until it ends; this repeats in new folders until
there were enough kills. After every kill, each file with a final name must be complete. After every end, each file
must have the contents of the first run, bit for bit, apart from durations. Every process is a fork of one that has
imported everything, so that the kills hit the work.

With --places, a process kills itself in the middle of a certain operation instead, a number of times for each of
`PLACES`. Reproduces results/kills.json:

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200 --out benchmarks/results/kills.json"""
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

from fastai_lp.experiments import results
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.runs import run_experiment
from fastai_lp.learner import features, losses
from fastai_lp.transductive import diffusion, graph, neighbors
from fastai_lp.utils.files import checked, read_json_lines, read_npz

TIMES = 'sec', 'seconds', 'lp_sec', 'time', 'cached', 'values'  # the Recorder's `values` include seconds, and the .jsonl file has the rest


def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def write_half(f, **kwargs):
    f.write(b'half')
    f.flush()
    die()


def die_after(f, *args):
    f(*args)
    die()


PLACES = {  # chkstyle: ignore-node
    # what is replaced, by what, and the probability that a call is the last
    'features': (features, '_pooled', die, .02),
    'search': (neighbors, '_drop_self', die, .1),
    'graph': (graph, '_plus_transpose', die, .1),
    'diffusion': (diffusion, 'spmm', die, .01),
    'training step': (losses, 'weighted_cross_entropy', die, .01),
    'state half written': (torch, 'save', lambda o, f: write_half(f), .2),
    'pseudo-labels half written': (np, 'savez_compressed', write_half, .4),
    'before a file is replaced': (os, 'replace', die, .15),
    'after a file is replaced': (os, 'replace', partial(die_after, os.replace), .15),
    'result': (results, 'append_json_line', die, 1.)}


def plant(place, rng):
    "From now on, each call of the place may be the last thing that this process does"
    module, name, end, chance = PLACES[place]
    real = getattr(module, name)
    def risky(*args, **kwargs): return (end if rng.random() < chance else real)(*args, **kwargs)
    setattr(module, name, risky)


def fork(folder, epochs, place=None, rng=None):
    "Start or continue the run in `folder`, in a new process"
    if pid := os.fork(): return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
        if place: plant(place, rng)
        recipe = replace(RECIPES['digits'], stage1=epochs, stage2=2*epochs)
        run_experiment('digits', 20, ['mt+lp'], [0], recipe, out=folder)
        code = 0
    finally: os._exit(code)


def update(sha, o):
    "Add nested lists, dicts, tensors and numbers to a digest, without durations"
    if isinstance(o, dict):
        for k in sorted(o, key=str):
            if k in TIMES or str(k).startswith('seconds'): continue
            update(sha, k)
            update(sha, o[k])
    elif isinstance(o, (list, tuple)):
        for x in o: update(sha, x)
    elif isinstance(o, (torch.Tensor, np.ndarray)):
        o = np.ascontiguousarray(o)
        sha.update(f'{o.dtype}{o.shape}'.encode() + o.tobytes())
    else: sha.update(repr(o).encode())


def contents(file):
    "The contents of a file; an error if it is incomplete"
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


def wait(pid): return os.waitpid(pid, 0)[1]


def at_places(folders, epochs, times, expected, rng):
    "Kills per place, and the places after which the files were not as expected"
    done, different = dict.fromkeys(PLACES, 0), []
    for place in PLACES:
        while done[place] < times:
            folder = next(folders)
            status = wait(fork(folder, epochs, place, random.Random(rng.random())))
            if status != signal.SIGKILL: continue  # it was lucky
            done[place] += 1
            state(folder)
            status = wait(fork(folder, epochs))
            if status or state(folder) != expected or list(folder.glob('*.tmp')): different.append(place)
        print(f'{place}: killed {times} times, {different.count(place)} lost or different', flush=True)
    return done, different


def at_moments(folders, epochs, kills, expected, length, rng):
    "Moments of the kills, number of finished runs, differences, and number of kills while a file was written"
    moments, ends, different, swept, folder = [], 0, [], 0, next(folders)
    while kills:
        pid, moment = fork(folder, epochs), rng.uniform(0, length)
        if len(moments) < kills:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        if status == signal.SIGKILL:
            moments.append(round(moment, 2))
            if not folder.exists(): continue
            swept += len(list(folder.glob('*.tmp')))
            state(folder)  # an error if any file is incomplete
            continue
        found, ends = state(folder), ends+1
        if status or found != expected or list(folder.glob('*.tmp')):
            files = [k for k in {**found, **expected} if found.get(k) != expected.get(k)]
            different.append(dict(run=ends, status=status, files=files))
        if ends % 5 == 0 or len(moments) == kills:
            print(f'{len(moments)} kills, {ends} runs ended, {len(different)} lost or different, '
                f'{swept} kills while a file was written', flush=True)
        if len(moments) == kills: break
        folder = next(folders)
    return moments, ends, different, swept


@call_parse
def main(
    kills:int=200, # number of kills at random moments
    places:int=0, # number of kills at each of `PLACES`
    epochs:int=3, # of the first stage; the second has twice as many
    seed:int=0, # of the random moments
    out:str=None, # .json file of the result
):
    torch.set_num_threads(1)
    rng, done = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as tmp:
        folders = (Path(tmp)/f'run{i}' for i in range(10**6))
        start = time.perf_counter()
        assert wait(fork(folder := next(folders), epochs)) == 0, 'the run fails without being killed'
        length, expected = time.perf_counter()-start, state(folder)
        print(f'one run: {length:.1f} s, {len(expected)} files', flush=True)
        lost = []
        if places: done, lost = at_places(folders, epochs, places, expected, rng)
        moments, ends, different, swept = at_moments(folders, epochs, kills, expected, length, rng)
    res = dict(kills=len(moments), ends=ends, different=lost+different, while_written=swept,
        seconds_of_a_run=round(length, 1), files=len(expected), moments=moments, **(dict(places=done) if places else {}))
    if out: Path(out).write_text(json.dumps(res) + '\n')
    sys.exit(bool(lost + different))
