"Two processes with gloo, in fastai's `distrib_ctx`: same pseudo-labels, weights and history, equal to those of one process."
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
from fastai.distributed import distrib_ctx  # chkstyle: ignore (adds Learner.distrib_ctx)
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import blob_learner, blobs, flat_weights
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.fixmatch import FixMatchCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.transductive.labelers import Diffusion
from fastai_lp.utils.distributed import gather_rows, place, unwrapped, work_shared

pytestmark = pytest.mark.slow  # two processes

DATA = dict(n=151, per_class=4)  # 121 training items, 12 labeled and 109 not: no share is even
BS, LABELED_BS, N_LABELED, N_TRAIN = 16, 6, 12, 121


def learner(path, two_stream=True, seed=0, plain=False, workers=0):
    "A Learner with initial weights by `seed`; `plain`: SGD, without BatchNorm and dropout, which depend on the batch"
    data = blobs(**DATA)
    model = nn.Sequential(nn.Linear(data.d, 16), nn.ReLU(), nn.Linear(16, data.c)) if plain else None
    learn = blob_learner(data, bs=BS, two_stream=two_stream, num_workers=workers, path=path, model=model)
    set_seed(seed)
    for m in learn.model.modules(): getattr(m, 'reset_parameters', lambda: None)()
    if two_stream: learn.dls.loaders[0] = learn.dls.train.new(labeled_bs=LABELED_BS, drop_last=False)
    else: learn.dls.train.drop_last = False
    if plain: learn.opt_func = SGD
    return learn


class Batches(Callback):
    "Per epoch the items of each batch and the number of labeled ones, and whether the targets are those of the items"
    order = -4.5  # after LPCallback, before MeanTeacherCallback splits the views
    def __init__(self): self.items, self.labeled, self.right = [], [], []
    def before_train(self): self.items.append([]), self.labeled.append([])
    def before_batch(self):
        if not self.training: return
        dataset = getattr(self.dls.train, 'dl', self.dls.train).dataset
        x = torch.stack([dataset.tls[0][i] for i in range(len(dataset))])
        items = (self.xb[0][:, None] == x).all(-1).int().argmax(1)
        self.items[-1].append(items.tolist())
        self.labeled[-1].append((items < N_LABELED).sum().item())
        p = getattr(getattr(self.learn, 'lp_record', None), 'pseudo', None)
        if p is None: return
        weights = p.weights[items]
        expected = torch.zeros_like(self.yb[0])
        expected[torch.arange(len(items)), p.labels[items].clamp(min=0)] = weights
        self.right.append(torch.equal(self.yb[0], expected))


class Shift(Callback):
    "Makes the BatchNorm statistics differ between processes"
    order = -20
    def before_epoch(self):
        if dist.get_rank() and self.epoch: unwrapped(self.learn.model)[1].running_mean.add_(3.)


class Seen:
    "A labeler that keeps its inputs, and gives wrong results in all processes but the first"
    def __init__(self): self.feats, self.states = [], []
    def __call__(self, feats, logits, y):
        self.feats.append(feats)
        self.states.append({k: v.clone() for k, v in unwrapped(self.learn.model).state_dict().items()})
        p = Diffusion()(feats, logits, y)
        if not dist.get_rank(): return p
        return replace(p, labels=p.labels.flip(0), certainty=p.certainty*.5, Z=p.Z+1, n_iter=-1)


class FirstTeacher(Callback):
    "The teacher in the first step"
    order = -3
    def before_batch(self):
        if not hasattr(self, 'teacher'): self.teacher = [p.clone() for p in self.learn.mt_record.teacher.parameters()]


class Off(Callback):
    order = 99
    def after_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


def is_restored(learn):
    dl = learn.dls.train
    return (not isinstance(learn.model, DistributedDataParallel) and place(dl) == (0, 1) and len(learn.metrics) == 1
        and type(learn.loss_func).__name__ == 'CrossEntropyLossFlat' and getattr(dl, 'ranks', 1) == 1 and 'get_idxs' not in vars(dl))


def fit(learn, epochs, cbs, look=None, lr=1e-2):
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(epochs, lr, cbs=[*([look] if look else []), *cbs])
    record = getattr(learn, 'lp_record', None)
    res = dict(weights=flat_weights(learn), history=record and record.history, values=list(learn.recorder.values))
    res['restored'] = is_restored(learn)
    return res if look is None else dict(res, items=look.items, labeled=look.labeled, right=look.right)


# What each process does

def extraction(rank, path):
    learn, rows, extract = learner(path), [], Extractor()
    model = learn.model
    count = model.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    learn.model = DistributedDataParallel(model)
    rows.clear()
    with work_shared(rank, 2): shared = extract(learn)
    own = sum(rows)
    learn.model.eval()(torch.zeros(1, 8))  # the wrapper waits in the pass after one with gradients
    alone = extract(learn).feats if rank == 1 else None
    count.remove()
    return dict(feats=shared.feats, logits=shared.logits, own=own, alone=alone)


def whole_fit(rank, path):
    seen, learn = Seen(), learner(path, seed=rank)
    seen.learn = learn
    res = fit(learn, 3, [LPCallback(seen, warmup=1, truth=blobs(**DATA).truth[:N_TRAIN]), Shift()], Batches())
    pseudo = {k: v for k, v in vars(learn.lp_record.pseudo).items() if k not in ('W', 'seconds')}
    return dict(res, pseudo=pseudo, feats=seen.feats, states=seen.states)


def warned(rank, path):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(learner(path), 1, [LPCallback(max_iter=1)])
    return sum('LPCallback, epoch 0' in str(o.message) for o in w)


def teachers(rank, path, extra=()):
    learn, start = learner(path, seed=rank), FirstTeacher()
    res = fit(learn, 2, [*extra, MeanTeacherCallback(), start], Batches())
    teacher = {k: v.clone() for k, v in learn.mt_record.teacher.state_dict().items()}
    return dict(res, start=start.teacher, teacher=teacher, statistics=learn.mt_record.teacher[1].running_mean)


def matched(rank, path):
    return fit(learner(path, seed=rank), 2, [LPCallback(warmup=1), FixMatchCallback(.5, unlabeled_tfms=None)], Batches())


def resumed(rank, path):
    def cbs(file): return [LPCallback(warmup=1), MeanTeacherCallback(), ResumeCallback(path/file)]
    with patch('fastai_lp.learner.resume.torch.save', wraps=torch.save) as save:
        through = fit(learner(path, seed=rank), 4, cbs('through.pth'))
    saved = sum(hasattr(o.args[1], 'name') for o in save.call_args_list)  # torch also saves what it sends
    try: fit(learner(path, seed=rank), 4, [*cbs('off.pth'), Off()])
    except KeyboardInterrupt: pass
    names = list(torch.load(path/'off.pth', weights_only=True)['model'])
    again = fit(learner(path, seed=5), 4, cbs('off.pth'))
    errors = []
    try: fit(learner(path), 4, cbs('off.pth' if rank == 0 else 'nowhere.pth'))
    except ValueError as e: errors.append(str(e))
    try: learner(path).fit(4, cbs=cbs('off.pth'))  # as a single process
    except ValueError as e: errors.append(str(e))
    return dict(through=through, saved=saved, names=names, again=again, errors=errors)


def single(rank, path):
    os.environ['WORLD_SIZE'] = '1'  # fastai's metrics wait for other processes if this is 2
    if rank == 0: learner(path).fit(2, cbs=[LPCallback(), MeanTeacherCallback()])
    os.environ['WORLD_SIZE'] = '2'
    return True


def everything(rank, path):
    res = dict(rows=gather_rows(torch.arange(6).view(3, 2)[:3-rank] + 10*rank))
    for f in (extraction, whole_fit, warned, teachers, matched, resumed, single): res[f.__name__] = f(rank, path)
    res['both'] = teachers(rank, path, [LPCallback(warmup=1)])
    plain = dict(two_streams=learner(path, plain=True), one_stream=learner(path, two_stream=False, plain=True, workers=rank))
    for name, learn in plain.items(): res[name] = fit(learn, 3, [LPCallback(warmup=1)], Batches(), .1)
    options = LPCallback(warmup=1, features=Extractor(augment=True), temperature=.5, balance='sinkhorn', mixup=.4)
    res['options'] = fit(learner(path, seed=rank), 3, [options])
    return res


def process(rank, path):
    torch.multiprocessing.set_start_method('fork', force=True)  # for the workers of a DataLoader, as in a script
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT='29500')  # accelerate wants them and does not use them
    meet = f"file://{path/'meet'}"
    dist.init_process_group('gloo', init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(everything(rank, path), path/f'{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "The results of both processes"
    path = tmp_path_factory.mktemp('ranks')
    torch.multiprocessing.spawn(process, (path,), nprocs=2)
    return [torch.load(path/f'{rank}.pth', weights_only=False) for rank in (0, 1)]


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) or type(a).__name__ == 'L': return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


# Tests

def test_rows_are_gathered_in_the_order_of_ranks(ranks):
    for r in ranks: assert r['rows'].tolist() == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13]]


def test_shared_extraction_equals_that_of_one_process(ranks, tmp_path):
    one = Extractor()(learner(tmp_path))
    assert [r['extraction']['own'] for r in ranks] == [60, 61]
    for r in ranks:
        torch.testing.assert_close(r['extraction']['feats'], one.feats)
        torch.testing.assert_close(r['extraction']['logits'], one.logits)
    assert same(ranks[0]['extraction']['feats'], ranks[1]['extraction']['feats'])
    torch.testing.assert_close(ranks[1]['extraction']['alone'], one.feats)


def test_pseudo_labels_of_the_first_process_are_used_by_all(ranks):
    a, b = (r['whole_fit'] for r in ranks)
    assert len(a['feats']) == 2
    assert same(a['feats'], b['feats'])
    assert same(a['pseudo'], b['pseudo'])


def test_pseudo_labels_equal_those_of_one_process(ranks, tmp_path):
    a, learn = ranks[0]['whole_fit'], learner(tmp_path)
    for feats, state in zip(a['feats'], a['states']):
        learn.model.load_state_dict(state)
        found = Extractor()(learn)
        torch.testing.assert_close(feats, found.feats)
    one = Diffusion()(*found, learn.dls.train.targets)
    for k in ('labels', 'reached'): assert torch.equal(a['pseudo'][k], getattr(one, k)), k
    floats = ('certainty', 'class_weights', 'Z')
    torch.testing.assert_close([a['pseudo'][k] for k in floats], [getattr(one, k) for k in floats], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name', ['whole_fit', 'one_stream', 'options', 'both', 'teachers', 'matched'])
def test_all_processes_end_with_the_same_learner(name, ranks):
    a, b = (r[name] for r in ranks)
    for k in ('weights', 'history', 'values'): assert same(a[k], b[k]), k
    assert a['restored']
    assert b['restored']


def test_history_has_the_accuracy(ranks):
    history = ranks[0]['whole_fit']['history']
    assert [row['epoch'] for row in history] == [1, 2]
    assert history[-1]['accuracy'] > .8


@pytest.mark.parametrize('name', ['whole_fit', 'two_streams'])
def test_two_stream_batches_are_complete(name, ranks):
    a, b = (r[name] for r in ranks)
    for r in (a, b):
        assert set(r['labeled'][0]) == {BS} == {len(o) for o in r['items'][0]}  # warm-up
        assert {n for epoch in r['labeled'][1:] for n in epoch} == {LABELED_BS}
        assert len(r['right']) > 0
        assert all(r['right'])
    for mine, others in zip(a['items'], b['items']): assert [len(o) for o in mine] == [len(o) for o in others]


def test_an_epoch_has_each_unlabeled_item_once(ranks):
    "With one repeated: 110 places for 109 items"
    for epoch in zip(*(r['two_streams']['items'][1:] for r in ranks)):
        shares = [[i for batch in batches for i in batch if i >= N_LABELED] for batches in epoch]
        for o in shares: assert len(set(o)) == len(o) == 55
        assert set(sum(shares, [])) == set(range(N_LABELED, N_TRAIN))


def test_plain_batches(ranks):
    for epoch in zip(*(r['one_stream']['items'] for r in ranks)):
        shares = [sum(batches, []) for batches in epoch]
        assert [len(o) for o in shares] == [61, 61]
        assert set(sum(shares, [])) == set(range(N_TRAIN))
    for r in ranks:
        assert r['one_stream']['right']
        assert all(r['one_stream']['right'])


@pytest.mark.parametrize('name', ['two_streams', 'one_stream'])
def test_two_processes_equal_one_with_batches_twice_as_large(name, ranks, tmp_path):
    learn = learner(tmp_path, two_stream=name == 'two_streams', plain=True)
    if name == 'two_streams': learn.dls.loaders[0] = learn.dls.train.new(bs=2*BS, labeled_bs=2*LABELED_BS)
    else: learn.dls.train.bs = 2*BS
    both = zip(*(r[name]['items'] for r in ranks))
    orders = iter([[i for pair in zip(*batches) for o in pair for i in o] for batches in both])
    dl, start = learn.dls.train, flat_weights(learn)
    class Given(type(dl)):
        def get_idxs(self): return next(orders) if self.shuffle else super().get_idxs()
    dl.__class__ = Given
    learn.fit(3, .1, cbs=LPCallback(warmup=1))
    assert (flat_weights(learn)-start).abs().max() > .1
    for r in ranks: torch.testing.assert_close(r[name]['weights'], flat_weights(learn), atol=2e-5, rtol=1e-4)


def test_only_the_first_process_warns(ranks): assert [r['warned'] > 0 for r in ranks] == [True, False]


@pytest.mark.parametrize('name', ['both', 'teachers'])
def test_all_processes_have_the_same_teacher(name, ranks):
    a, b = (r[name] for r in ranks)
    for k in ('start', 'teacher'): assert same(a[k], b[k]), k
    assert a['statistics'].abs().max() > 0
    for r in (a, b):
        for batch in sum(r['items'], []): assert batch[:len(batch)//2] == batch[len(batch)//2:]
        assert {n for epoch in r['labeled'] for n in epoch} == {2*LABELED_BS}


def test_a_resumed_fit_equals_one_that_was_not_interrupted(ranks):
    for r in ranks: assert same(r['resumed']['through']['weights'], r['resumed']['again']['weights'])
    a, b = (r['resumed']['again'] for r in ranks)
    assert same(a['weights'], b['weights'])
    assert same(a['history'], b['history'])


def test_the_first_process_saves(ranks):
    assert [r['resumed']['saved'] for r in ranks] == [5, 0]  # four epochs, and the result of the fit
    assert 'module' not in ranks[0]['resumed']['names'][0]


def test_resuming_needs_the_same_file_and_as_many_processes(ranks):
    for r in ranks:
        different, alone = r['resumed']['errors']
        assert 'the processes see different files' in different
        assert 'processes 2 in the file, None now' in alone


def test_nobody_waits_outside_distrib_ctx(ranks): assert [r['single'] for r in ranks] == [True, True]


def test_a_data_loader_that_fastai_has_not_wrapped_is_not_shared():
    assert place(SimpleNamespace(rank=1, world_size=2)) == (0, 1)
    assert place(SimpleNamespace(bs=8)) == (0, 1)
