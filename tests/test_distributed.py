"Two processes over gloo, by fastai's own `distrib_ctx`: the same pseudo-labels, weights and history in both, and those of one process."
import os
import warnings
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

pytest.importorskip('accelerate')  # fastai.distributed needs it

from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.distributed import *
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.utils.distributed import gather_rows, place, unwrapped, work_shared
from fastai_lp.learner.features import extract_features
from fastai_lp.transductive.labelers import Diffusion
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback

DATA = dict(n=151, per_class=4)  # 121 items for training, 12 of them labeled, 109 not: neither share is even
LABELED, BS = 6, 16


def learner(path, two_stream=True, bs=BS, labeled_bs=LABELED, seed=0, plain=False, workers=0):
    "`plain`: no BatchNorm and no dropout, which see a batch and not an item, and SGD"
    data = blobs(**DATA)
    model = nn.Sequential(nn.Linear(data.d, 16), nn.ReLU(), nn.Linear(16, data.c)) if plain else None
    learn = blob_learner(data, bs=bs, two_stream=two_stream, num_workers=workers, path=path, model=model)
    set_seed(seed)
    for m in learn.model.modules(): getattr(m, 'reset_parameters', lambda: None)()
    dl = learn.dls.train
    dl.drop_last = False
    if two_stream: dl.labeled_bs = dl._given_bs = labeled_bs
    if plain: learn.opt_func = SGD
    return learn


class Batches(Callback):
    "Per epoch the items of each batch, how many are labeled, and whether the targets are those of the items"
    order = -4.5  # after LPCallback, before Mean Teacher parts the views
    def __init__(self): self.items, self.labeled, self.right = [], [], []
    def before_train(self): self.items.append([]), self.labeled.append([])
    def before_batch(self):
        if not self.training: return
        x = getattr(self.dls.train, 'dl', self.dls.train).dataset.tls[0]
        x = torch.stack([x[i] for i in range(len(x))])
        items = (self.xb[0][:, None] == x).all(-1).int().argmax(1)
        self.items[-1].append(items.tolist())
        self.labeled[-1].append((items < 12).sum().item())  # the labeled ones come first in blobs()
        lp = self.learn.cbs.filter(lambda o: isinstance(o, LPCallback))
        if lp and not lp[0]._fit.warm:
            p = lp[0].record.pseudo
            self.right.append(torch.equal(self.yb[0].sum(1), p.weights[items]) and torch.equal(self.yb[0].argmax(1), torch.where(p.weights[items] > 0, p.labels[items], 0)))


class Differ(Callback):
    "What is not the same in all processes: BatchNorm's statistics of their own batches, made plain to see"
    order = -20
    def before_epoch(self):
        if dist.get_rank() and self.epoch: unwrapped(self.learn.model)[1].running_mean.add_(3.)


class Seen:
    "A labeler that keeps what it was given, and is wrong in all processes but the first"
    def __init__(self): self.feats, self.states = [], []
    def __call__(self, feats, logits, y):
        self.feats.append(feats)
        self.states.append({k: v.clone() for k, v in unwrapped(self.learn.model).state_dict().items()})
        p = Diffusion()(feats, logits, y)
        return replace(p, labels=p.labels.flip(0), certainty=p.certainty*.5, Z=p.Z+1, n_iter=-1) if dist.get_rank() else p


def fields(p): return {k: v for k, v in vars(p).items() if k not in ('W', 'seconds')}


def fit(learn, epochs, cbs, look=None, lr=1e-2):
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(epochs, lr, cbs=[*([look] if look else []), *cbs])
    return dict(weights=flat_weights(learn), history=getattr(learn, 'lp_record', None) and learn.lp_record.history, values=list(learn.recorder.values),
        whole=not isinstance(learn.model, DistributedDataParallel) and place(learn.dls.train) == (0, 1) and len(learn.metrics) == 1
        and type(learn.loss_func).__name__ == 'CrossEntropyLossFlat' and getattr(learn.dls.train, 'ranks', 1) == 1 and 'get_idxs' not in vars(learn.dls.train),
        **({} if look is None else dict(items=look.items, labeled=look.labeled, right=look.right)))


class Start(Callback):
    "The teacher of the first step"
    order = -3
    def before_batch(self):
        if not hasattr(self, 'teacher'): self.teacher = [p.clone() for p in self.learn.mt_record.teacher.parameters()]


class Off(Callback):
    order = 99
    def after_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


def extraction(rank, path):
    learn, rows = learner(path), []
    model = learn.model
    count = model.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    learn.model = DistributedDataParallel(model)
    rows.clear()
    with work_shared(rank, 2): shared = extract_features(learn)
    own = sum(rows)
    learn.model.eval()(torch.zeros(1, 8))  # a forward with gradients: at the next one the wrapper waits for the first process's buffers
    alone = extract_features(learn) if rank == 1 else None
    count.remove()
    return dict(feats=shared.feats, logits=shared.logits, own=own, alone=alone and alone.feats)


def whole_fit(rank, path):
    seen, truth = Seen(), blobs(**DATA).truth[:121]
    learn = learner(path, seed=rank)  # as scripts do: no two processes begin alike
    seen.learn = learn
    res = fit(learn, 3, [LPCallback(seen, warmup=1, truth=truth), Differ()], Batches())
    return dict(res, pseudo=fields(learn.lp_record.pseudo), feats=seen.feats, states=seen.states)


def warned(rank, path):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(learner(path), 1, [LPCallback(max_iter=1)])
    return dict(warned=[str(o.message) for o in w if 'the residual' in str(o.message)])


def teachers(rank, path):
    res = {}
    for name, cbs in dict(both=[LPCallback(warmup=1), MeanTeacherCallback()], alone=[MeanTeacherCallback()]).items():
        learn, start = learner(path, seed=rank), Start()
        res[name] = fit(learn, 2, [*cbs, start], Batches())
        res[name]['start'] = start.teacher
        res[name]['teacher'] = {k: v.clone() for k, v in learn.mt_record.teacher.state_dict().items()}
        res[name]['bn'] = learn.mt_record.teacher[1].running_mean
    return res


def resumed(rank, path):
    def cbs(file): return [LPCallback(warmup=1), MeanTeacherCallback(), ResumeCallback(path/file)]
    with patch('fastai_lp.learner.resume.torch.save', wraps=torch.save) as save: res = dict(through=fit(learner(path, seed=rank), 4, cbs('through.pth')))
    res['saved'] = sum(hasattr(o.args[1], 'name') for o in save.call_args_list)  # torch also saves what is sent
    try: fit(learner(path, seed=rank), 4, [*cbs('off.pth'), Off()])
    except KeyboardInterrupt: pass
    res['names'] = list(torch.load(path/'off.pth', weights_only=True)['model'])
    res['again'] = fit(learner(path, seed=5), 4, cbs('off.pth'))
    try: fit(learner(path), 4, cbs('off.pth' if rank == 0 else 'nowhere.pth'))
    except ValueError as e: res['error'] = str(e)
    try: learner(path).fit(4, cbs=cbs('off.pth'))  # as one process
    except ValueError as e: res['other'] = str(e)
    return res


def single(rank, path):
    "A process group alone is no reason to wait for others"
    os.environ['WORLD_SIZE'] = '1'  # fastai's own metrics wait for others by this alone
    if rank == 0: learner(path).fit(2, cbs=[LPCallback(), MeanTeacherCallback()])
    os.environ['WORLD_SIZE'] = '2'
    return dict(done=True)


def everything(rank, path):
    return dict(
        rows=gather_rows(torch.arange(6).view(3, 2)[:3-rank] + 10*rank),
        extraction=extraction(rank, path), fit=whole_fit(rank, path), warned=warned(rank, path), teachers=teachers(rank, path), resumed=resumed(rank, path),
        two=fit(learner(path, plain=True), 3, [LPCallback(warmup=1)], Batches(), .1), single=single(rank, path),
        beyond=fit(learner(path, seed=rank), 3, [LPCallback(warmup=1, ema=.9, steps=2, unlabeled_views=2, augment=2, temperature=.5, balance='sinkhorn')], Batches()),
        least=fit(learner(path, two_stream=False), 2, [LPCallback(min_labeled=4)], Batches()),
        one=fit(learner(path, two_stream=False, plain=True, workers=rank), 3, [LPCallback(warmup=1)], Batches(), .1))


def process(rank, path):
    torch.multiprocessing.set_start_method('fork', force=True)  # as in a script that torchrun starts: for the workers of a DataLoader
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='29500')  # accelerate asks for the last two, and uses the group that is there
    dist.init_process_group('gloo', init_method=f"file://{path/'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(everything(rank, path), path/f'{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What the two processes saw"
    path = tmp_path_factory.mktemp('ranks')
    torch.multiprocessing.spawn(process, (path,), nprocs=2)
    return [torch.load(path/f'{rank}.pth', weights_only=False) for rank in (0, 1)]


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) or type(a).__name__ == 'L': return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def test_rows_are_gathered_in_the_order_of_ranks(ranks):
    for r in ranks: assert r['rows'].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13]]


def test_shares_of_the_extraction_are_the_whole(ranks, tmp_path):
    learn = learner(tmp_path)
    one = extract_features(learn)
    assert [r['extraction']['own'] for r in ranks] == [60, 61]
    for r in ranks:
        torch.testing.assert_close(r['extraction']['feats'], one.feats)
        torch.testing.assert_close(r['extraction']['logits'], one.logits)
    assert same(ranks[0]['extraction']['feats'], ranks[1]['extraction']['feats'])
    torch.testing.assert_close(ranks[1]['extraction']['alone'], one.feats)


def test_pseudo_labels_are_the_first_process_s_and_those_of_one(ranks, tmp_path):
    a, b = (r['fit'] for r in ranks)
    assert same(a['pseudo'], b['pseudo']) and same(a['feats'], b['feats']) and len(a['feats']) == 2
    for feats, state in zip(a['feats'], a['states']):
        learn = learner(tmp_path)
        learn.model.load_state_dict(state)
        found = extract_features(learn)
        torch.testing.assert_close(feats, found.feats)
        one = Diffusion()(*found, learn.dls.train.targets)
    assert torch.equal(a['pseudo']['labels'], one.labels) and torch.equal(a['pseudo']['reached'], one.reached)
    for k in ('certainty', 'class_weights', 'Z'): torch.testing.assert_close(a['pseudo'][k], getattr(one, k), atol=1e-4, rtol=1e-4)


def test_a_fit_ends_alike_in_all_processes(ranks):
    a, b = (r['fit'] for r in ranks)
    assert same(a['weights'], b['weights'])
    assert len(a['history']) == 2 and same(a['history'], b['history']) and a['history'][-1]['accuracy'] > .8
    assert same(a['values'], b['values'])
    assert a['whole'] and b['whole']


@pytest.mark.parametrize('name', ['fit', 'two'])
def test_batches_of_two_streams_stay_whole(name, ranks):
    a, b = (r[name] for r in ranks)
    for r in (a, b):
        assert set(r['labeled'][0]) == {BS} == {len(o) for o in r['items'][0]}  # the warm-up
        assert {n for epoch in r['labeled'][1:] for n in epoch} == {LABELED}
        assert r['right'] and all(r['right'])
    for mine, others in zip(a['items'], b['items']): assert [len(o) for o in mine] == [len(o) for o in others]
    for mine, others in zip(a['items'][1:], b['items'][1:]):
        free = [[i for o in r for i in o if i >= 12] for r in (mine, others)]
        assert len(set(free[0])) == len(free[0]) == len(set(free[1])) == len(free[1]) == 55
        assert set(free[0]) | set(free[1]) == set(range(12, 121))  # 110 for 109: one to make them even


def test_plain_batches(ranks):
    a, b = (r['one'] for r in ranks)
    for mine, others in zip(a['items'], b['items']):
        mine, others = sum(mine, []), sum(others, [])
        assert len(mine) == len(others) == 61 and set(mine) | set(others) == set(range(121))
    assert a['right'] and all(a['right']+b['right'])
    assert same(a['weights'], b['weights']) and same(a['history'], b['history']) and a['whole'] and b['whole']


@pytest.mark.parametrize('name', ['two', 'one'])
def test_two_processes_are_one_with_batches_twice_as_long(name, ranks, tmp_path):
    learn = learner(tmp_path, two_stream=name == 'two', bs=2*BS, labeled_bs=2*LABELED, plain=True)
    orders = iter([[i for pair in zip(*epochs) for o in pair for i in o] for epochs in zip(*(r[name]['items'] for r in ranks))])
    dl = learn.dls.train
    base = type(dl)
    dl.__class__ = type('Given', (base,), dict(get_idxs=lambda self: next(orders) if self.shuffle else super(type(self), self).get_idxs()))
    start = flat_weights(learn)
    learn.fit(3, .1, cbs=LPCallback(warmup=1))
    assert (flat_weights(learn)-start).abs().max() > .1
    for r in ranks: torch.testing.assert_close(r[name]['weights'], flat_weights(learn), atol=2e-5, rtol=1e-4)


def test_only_the_first_process_warns(ranks): assert [len(r['warned']['warned']) for r in ranks] == [1, 0]


@pytest.mark.parametrize('name', ['both', 'alone'])
def test_one_teacher(name, ranks):
    a, b = (r['teachers'][name] for r in ranks)
    for k in ('weights', 'start', 'teacher', 'values'): assert same(a[k], b[k]), k
    assert a['bn'].abs().max() > 0 and a['whole'] and b['whole']
    for r in (a, b):
        assert {n for epoch in r['labeled'] for n in epoch} == {2*LABELED}
        for batch in sum(r['items'], []): assert batch[:len(batch)//2] == batch[len(batch)//2:]


def test_a_resumed_run_is_the_run_that_was_never_stopped(ranks):
    for r in ranks:
        assert same(r['resumed']['through']['weights'], r['resumed']['again']['weights'])
        assert 'module' not in r['resumed']['names'][0]
        assert 'not all processes see the same file' in r['resumed']['error']
        assert 'processes 2 there, None here' in r['resumed']['other']
    assert [r['resumed']['saved'] for r in ranks] == [4, 0]
    a, b = (r['resumed']['again'] for r in ranks)
    assert same(a['weights'], b['weights']) and same(a['history'], b['history'])


def test_beyond_the_paper(ranks):
    a, b = (r['beyond'] for r in ranks)
    assert same(a['weights'], b['weights']) and same(a['history'], b['history']) and len({o['step'] for o in a['history']}) > 1 and a['whole'] and b['whole']
    for r in (a, b):
        assert r['right'] and all(r['right']) and {len(o) for o in r['items'][0]} == {BS}
        for batch in sum(r['items'][1:], []):
            free = batch[LABELED:]
            assert all(i < 12 for i in batch[:LABELED]) and free[:len(free)//2] == free[len(free)//2:] and all(i >= 12 for i in free)
        assert max(len(o) for o in r['items'][1]) == LABELED + 2*(BS-LABELED)


def test_at_least_so_many_labeled_items_in_each_process(ranks):
    a, b = (r['least'] for r in ranks)
    assert same(a['weights'], b['weights']) and a['whole'] and b['whole']
    for r in (a, b): assert all(r['right']) and min(n for epoch in r['labeled'] for n in epoch) >= 4


def test_nobody_waits_outside_distrib_ctx(ranks): assert all(r['single']['done'] for r in ranks)


def test_a_data_loader_that_fastai_has_not_wrapped_is_alone(): assert place(SimpleNamespace(rank=1, world_size=2)) == (0, 1) == place(SimpleNamespace(bs=8))
