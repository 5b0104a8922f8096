"LPCallback in a Learner's life: what it does, when, and that it leaves no trace."
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import Datasets, DataLoaders
from fastai.data.load import SkipItemException
from fastai.data.transforms import ColReader, IndexSplitter
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.text.data import SortedDL
from torch import nn

import fastai_lp.learner.callback
from conftest import Look, Spy, blob_learner, blob_model, blobs, flat_weights, item_numbers
from fastai_lp.transductive import diffusion, neighbors as search
from fastai_lp.utils import progress as work
from fastai_lp.learner.callback import LPCallback, truth_of
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock, semi_dls
from fastai_lp.transductive.labelers import Diffusion, NetworkPrediction
from fastai_lp.transductive.pseudo import PseudoLabels

E = pytest.raises


@pytest.fixture
def graphs(monkeypatch):
    "Counts the extractions, and so the graphs"
    calls, real = [], fastai_lp.learner.callback.extract_features
    monkeypatch.setattr(fastai_lp.learner.callback, 'extract_features', lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def traceless(learn):
    assert '_with_events' not in vars(learn)
    assert type(learn.loss_func) is CrossEntropyLossFlat
    assert [m.name for m in learn.metrics] == ['accuracy']
    assert 'get_idxs' not in learn.dls.train.__dict__
    assert not getattr(learn.dls.train, 'labeled_only', False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    learn.validate()
    assert learn.get_preds()[0].shape == (30, 3)


# The main path

def test_learns_more_than_the_labels_alone_teach(data):
    data = blobs(n=430, spread=1.4, per_class=1)
    def acc(cbs, epochs=15):
        learn = blob_learner(data, seed=3)
        learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
        return learn.validate()[1], learn
    with_lp, learn = acc(LPCallback(truth=data.truth[:400]))
    only, _ = acc(LPCallback(warmup=100))
    assert with_lp > only and learn.lp_record.history[-1]['accuracy'] > .8


def test_given_to_fit_or_to_the_learner(learn, data):
    cb = LPCallback()
    learn.fit_one_cycle(2, cbs=cb)
    assert learn.lp_record is cb.record and len(cb.record.history) == 2
    assert isinstance(cb.record.pseudo, PseudoLabels) and len(cb.record.pseudo.labels) == data.n_train
    traceless(learn)
    stays = blob_learner(cbs=LPCallback(every=2))
    stays.fit(3)
    assert [h['epoch'] for h in stays.lp_record.history] == [0, 2] and stays.lp.record is stays.lp_record
    traceless(stays)


def test_recorder_columns(data):
    learn = blob_learner(data)
    cb = LPCallback(truth=data.truth[:data.n_train])
    learn.fit(2, cbs=cb)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'lp_accuracy', 'lp_certainty', 'lp_sec', 'time']
    last = cb.record.history[-1]
    assert learn.recorder.values[-1][-3:] == [last['accuracy'], last['certainty'], last['sec']]
    assert set(last['seconds']) == {'features', 'graph', 'diffusion'} and all(v > 0 for v in last['seconds'].values())
    df = cb.record.to_df()
    assert len(df) == 2 and {'accuracy', 'network_accuracy', 's_graph'} <= set(df)


def test_shows_progress_with_a_bar(data, capsys):
    learn = blob_learner(data, bar=True)
    learn.fit(1, cbs=LPCallback())
    out = capsys.readouterr().out
    assert 'lp_certainty' in out and 'descriptors' in out and 'neighbors' in out and 'diffusion' in out


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('two_stream', [True, False])
def test_targets_are_the_items_own(data, workers, two_stream):
    learn = blob_learner(data, num_workers=workers, two_stream=two_stream)
    cb, spy = LPCallback(), Spy()
    learn.fit(1, cbs=[cb, spy])
    p = cb.record.pseudo
    for x, target in spy.seen:
        i = item_numbers(data, x)
        torch.testing.assert_close(target, F.one_hot(p.labels[i], 3)*p.weights[i, None])
    assert not spy.last_target.is_floating_point()
    assert torch.equal(spy.last_target.as_subclass(torch.Tensor), p.labels[item_numbers(data, spy.seen[-1][0])])


def test_two_streams_in_training(data):
    learn = blob_learner(data)
    cb, spy = LPCallback(warmup=1), Spy()
    learn.fit(2, cbs=[cb, spy])
    batches = [cb.record.pseudo.labeled[item_numbers(data, x)].sum().item() for x, _ in spy.seen]
    assert batches[0] == 16 and set(batches[1:]) == {8} and len(batches) == 1 + 111//8


def test_same_run_with_other_workers():
    runs = []
    for workers in (0, 2):
        learn = blob_learner(num_workers=workers)
        learn.fit(2, cbs=LPCallback())
        runs.append(flat_weights(learn))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


class Oracle:
    "True labels with weight 1"
    def __init__(self, truth): self.truth = truth
    def __call__(self, feats, logits, y):
        one = torch.ones(len(y))
        return PseudoLabels(self.truth, one, torch.ones(3), y >= 0, one.bool())


@pytest.mark.parametrize('extra', [None, MixUp, lambda: GradientAccumulation(32)])
@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat])
def test_true_labels_of_weight_one_train_as_fastai_does(data, extra, loss_func):
    def run(labels, *cbs):
        learn = blob_learner(data, two_stream=False, labels=labels, loss_func=loss_func())
        learn.opt_func = SGD  # Adam would blow up the rounding of gradients near zero
        learn.fit(2, .1, cbs=[*cbs, *([extra()] if extra else [])])
        return flat_weights(learn)
    torch.testing.assert_close(run(data.labels, LPCallback(Oracle(data.truth[:120]))), run(data.truth.tolist()), rtol=1e-5, atol=1e-6)


def moons_in_a_row(sizes, shown, seed=0):
    "Long thin classes of `sizes` items, of which the first `shown` are labeled, those at one end; as `blobs` gives them"
    g = torch.Generator().manual_seed(seed)
    along = torch.cat([torch.linspace(-1, 1, n) for n in sizes])
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.stack([along*3, truth + .5*along.abs(), torch.ones_like(along)], 1) + .03*torch.randn(len(truth), 3, generator=g)
    labels = [int(t) if i < start+m else None for t, start, n, m in zip(range(len(sizes)), torch.tensor([0, *sizes]).cumsum(0).tolist(), sizes, shown) for i in range(start, start+n)]
    return SimpleNamespace(x=torch.cat([x, x[::5]]), truth=torch.cat([truth, truth[::5]]), labels=labels + truth[::5].tolist(), n_train=len(truth), c=len(sizes), d=3)


@pytest.mark.parametrize('sizes, shown', [((100, 100, 100), (1, 1, 1)), ((200, 60, 20), (10, 3, 1)), ((200, 60, 20), (1, 1, 1)), ((60, 60, 60), (30, 1, 1))], ids=str)
def test_one_label_per_class_and_imbalance(sizes, shown):
    "Over three random networks: a single one may begin with descriptors that mix the classes"
    data = moons_in_a_row(sizes, shown)
    truth, recalls = data.truth[:data.n_train], dict(alone=[], lp=[], pseudo=[])
    for seed in range(3):
        for name, cb in dict(alone=LPCallback(warmup=60), lp=LPCallback(max_iter=100)).items():
            learn = blob_learner(data, seed=seed)
            learn.fit(60 if name == 'alone' else 8, 1e-2, cbs=cb)
            pred = learn.get_preds()[0].argmax(1)
            recalls[name].append(torch.stack([(pred[t == c] == c).float().mean() for t in [data.truth[data.n_train:]] for c in range(3)]))
        p = learn.lp_record.pseudo
        recalls['pseudo'].append(torch.stack([(p.labels[truth == c] == c).float().mean() for c in range(3)]))
        assert p.labeled.sum() == sum(shown) and p.reached.all()
        count = torch.bincount(p.labels, minlength=3)
        torch.testing.assert_close(p.class_weights*count, torch.full((3,), data.n_train/3))
    recalls = {k: torch.stack(v).mean(0) for k, v in recalls.items()}
    assert recalls['pseudo'].min() > .45 and recalls['lp'].min() > .45 and recalls['lp'].mean() > recalls['alone'].mean() + .05, recalls


def test_weight_zero_moves_nothing(data):
    class Zero(Oracle):
        def __call__(self, feats, logits, y):
            p = super().__call__(feats, logits, y)
            p.certainty = torch.zeros(len(y))
            return p
    learn = blob_learner(data)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, 1e-2, wd=0, cbs=LPCallback(Zero(data.truth[:120])))
    for p, q in zip(learn.model.parameters(), before): assert torch.equal(p, q)


def test_cutmix_mixes_labels_and_weights():
    from fastai.vision.core import TensorImage
    n, x = 60, torch.rand(60, 3, 8, 8)
    labels = [i % 3 if i < 9 or i >= 48 else None for i in range(n)]
    dls = Datasets(range(n), [[lambda i: TensorImage(x[i])], [lambda i: labels[i], SemiCategorize()]], splits=[range(48), range(48, n)])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    learn = Learner(dls.semi_dataloaders(bs=8, num_workers=0, device='cpu'), model)
    spy = Spy()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[LPCallback(), CutMix(), spy])
    weights = learn.lp_record.pseudo.weights
    assert all(t.shape == (8, 3) and (t >= 0).all() and (t.sum(1) <= weights.max()+1e-5).all() for _, t in spy.seen)
    assert any((t > 0).sum(1).max() > 1 for _, t in spy.seen)


# The course of epochs

def test_warmup_and_every_count_over_the_callbacks_life(graphs):
    learn, cb = blob_learner(), LPCallback(warmup=2, every=2)
    learn.fit(1, cbs=cb)
    assert len(graphs) == 0
    learn.fit(4, cbs=cb)
    assert [h['epoch'] for h in cb.record.history] == [2, 4] and len(graphs) == 2


def test_fine_tune_is_one_course():
    learn = blob_learner()
    learn.freeze()
    cb = LPCallback(warmup=1)
    learn.fine_tune(2, cbs=cb)
    assert [h['epoch'] for h in cb.record.history] == [1, 2]


def test_start_epoch_counts_skipped_epochs_and_builds_nothing_for_them(graphs):
    learn, cb = blob_learner(), LPCallback(warmup=2)
    learn.fit(4, cbs=cb, start_epoch=3)
    assert [h['epoch'] for h in cb.record.history] == [3] and len(graphs) == 1


def test_warmup_is_the_supervised_loss(data):
    spy = Spy()
    learn = blob_learner(data, two_stream=False)
    learn.fit(1, cbs=[LPCallback(warmup=1), spy])
    for x, target in spy.seen:
        labeled = target.sum(1) > 0
        assert labeled.sum() == sum(i < 9 for i in item_numbers(data, x))
        assert abs(target.sum() - (len(x) if labeled.any() else 0)) < 1e-4   # /batch size: the mean over labeled items


def test_lr_find_builds_no_graph(learn, graphs):
    learn.add_cb(LPCallback())
    res = learn.lr_find(show_plot=False)
    assert res.valley > 0 and len(learn.recorder.lrs) > 50 and not graphs
    assert learn.lp._course == 0 and not learn.lp_record.history
    traceless(learn)


# Inference

def test_inference_is_as_without_the_callback(tmp_path, data, graphs):
    learn = blob_learner(data, cbs=LPCallback(), path=tmp_path)
    learn.fit(2, 1e-2)
    preds, targs = learn.get_preds()
    built, valid = len(graphs), learn.validate()
    export = tmp_path/'export.pkl'
    learn.export(export)
    assert export.stat().st_size < 100_000
    loaded = load_learner(export)
    for o in (learn, loaded):
        cls, i, probs = o.predict(120)
        assert int(cls) == int(i) and abs(probs.sum() - 1) < 1e-5
        torch.testing.assert_close(probs, preds[0], rtol=1e-4, atol=1e-5)
    assert loaded.lp_record.pseudo is None and loaded.lp_record.history == learn.lp_record.history
    learn.remove_cb(LPCallback)
    torch.testing.assert_close(learn.get_preds()[0], preds)
    assert learn.validate() == valid
    assert len(graphs) == built
    train_preds, train_targs = learn.get_preds(ds_idx=0)
    assert len(train_preds) == data.n_train and (train_targs < 0).sum() == data.n_train-9


# Interruptions

class Break(Callback):
    "Raises `error` in the `at`-th batch, or at an event"
    order = 10
    def __init__(self, error, event='after_pred', at=3):
        self.error, self.at = error, at
        setattr(self, event, self.go)
    def go(self):
        self.at -= 1
        if self.at == 0: raise self.error


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_batch', 'before_train', 'after_train',
    'before_validate', 'before_epoch', 'after_epoch'])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('boom')])
@pytest.mark.parametrize('permanent', [False, True])
def test_interrupted_anywhere(event, error, permanent):
    learn = blob_learner(cbs=LPCallback() if permanent else None)
    before, loss = set(vars(learn)), learn.loss_func
    with E(type(error)): learn.fit(3, cbs=[Break(error, event, at=2)] + ([] if permanent else [LPCallback()]))
    assert learn.loss_func is loss and '_with_events' not in vars(learn)      # at once, whatever comes next
    assert set(vars(learn)) - before <= {'lp_record', 'epoch', 'loss', 'train_iter', 'pct_train', 'n_iter', 'n_epoch', 'dl', 'iter', 'xb', 'yb', 'pred',
        'loss_grad', 'smooth_loss', 'final_record', 'recorder'}
    traceless(learn)
    learn.fit(1, cbs=None if permanent else LPCallback())
    assert len(learn.lp_record.history) >= 1
    traceless(learn)


# where fastai catches each of its exceptions
CANCELLED = [(error(), event) for error, events in {
    CancelBatchException: 'before_batch after_pred after_loss', CancelTrainException: 'before_batch after_pred after_loss before_train',
    CancelEpochException: 'before_batch after_pred after_loss before_train after_train before_epoch',
    CancelFitException: 'before_batch after_pred after_loss before_train after_train before_epoch after_epoch'}.items() for event in events.split()]


@pytest.mark.parametrize('error, event', CANCELLED)
@pytest.mark.parametrize('order', [10, -7])
def test_cancelled(error, event, order):
    learn = blob_learner()
    learn.recorder.train_metrics = True
    stop = Break(error, event, at=2)
    stop.order = order
    learn.fit(4, cbs=[LPCallback(every=2), stop])
    traceless(learn)
    orders = [learn.dls.train.get_idxs() for _ in range(2)]
    assert orders[0] != orders[1]                                             # no order is left frozen


@pytest.mark.parametrize('event', ['after_train', 'after_batch', 'before_train'])
def test_inference_within_a_fit(data, event):
    "A callback of the user's may evaluate in the middle of a fit"
    class Looks(Callback):
        order = 20
        def look(self):
            if self.training and not self.done:
                self.done = True
                self.learn.get_preds(inner=True)
                self.learn.validate()
                self.learn.model.train()
                self.learn.training, self.learn.dl = True, self.dls.train
    learn, cb = blob_learner(data), Looks()
    cb.done = False
    setattr(cb, event, cb.look)
    learn.fit(3, cbs=[LPCallback(), cb])
    assert cb.done and len(learn.lp_record.history) == 3
    traceless(learn)


def test_features_gone_wrong_are_named_before_the_first_step(data):
    for stream in (True, False):
        bad = blobs()
        bad.x[[33, 71]] = float('nan')
        learn = blob_learner(bad, two_stream=stream, cbs=LPCallback())
        before = flat_weights(learn)
        with E(ValueError, match=r'item\(s\) 33, 71'): learn.fit(2)
        assert torch.equal(flat_weights(learn), before)
        traceless(learn)


def test_extraction_interrupted(learn, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    learn.model.train()
    real = learn.model[1].forward
    learn.model[1].forward = stop
    with E(KeyboardInterrupt): learn.fit(1, cbs=LPCallback())
    learn.model[1].forward = real
    traceless(learn)


@pytest.mark.parametrize('stage', ['neighbors', 'diffusion'])
def test_a_stage_interrupted(learn, stage, monkeypatch):
    "Ctrl-C between two blocks of the search, or of the classes; the next fit is as if there had been none"
    state, order = flat_weights(learn), learn.dls.train.rng.getstate()
    real = work.blocks
    def stop(n, size, what, start=0):
        for o in real(n, size, what, start):
            yield o
            if what == stage: raise KeyboardInterrupt
    for module in (search, diffusion): monkeypatch.setattr(module, 'blocks', stop)
    learn.model.train()
    with E(KeyboardInterrupt): learn.fit(1, cbs=LPCallback())
    assert torch.equal(flat_weights(learn), state) and learn.dls.train.rng.getstate() == order and work._report.get() is None
    traceless(learn)
    monkeypatch.undo()
    learn.fit(1, cbs=LPCallback())
    assert len(learn.lp_record.history) == 1
    traceless(learn)


# Items and their order

class Skips(Look):
    def __call__(self, i):
        if i in (40, 77): raise SkipItemException
        return super().__call__(i)


def test_items_that_skip_themselves_are_refused(data):
    dsets = Datasets(range(150), [[Skips(data.x)], [Look(data.labels), SemiCategorize()]], splits=[list(range(120)), list(range(120, 150))])
    for make in (dsets.dataloaders, dsets.semi_dataloaders):
        learn = Learner(make(bs=16, num_workers=0, device='cpu'), blob_model())
        for warmup in (0, 1):
            with learn.no_bar(), learn.no_logging(), E(ValueError, match='skip themselves'): learn.fit(2, cbs=LPCallback(warmup=warmup))


@pytest.mark.parametrize('dl_type', [WeightedDL, SortedDL])
def test_other_data_loaders_keep_items_and_pseudo_labels_together(data, dl_type):
    extra = dict(wgts=torch.linspace(1, 9, 120).numpy()) if dl_type is WeightedDL else dict(sort_func=lambda o: float(o[0].norm()))
    dsets = Datasets(range(150), [[Look(data.x)], [Look(data.labels), SemiCategorize()]], splits=[list(range(120)), list(range(120, 150))])
    dls = DataLoaders(dl_type(dsets.train, bs=16, shuffle=True, num_workers=0, **extra), dsets.dataloaders(bs=16, num_workers=0).valid)
    for dls in ([dls, semi_dls(dls, 6)] if dl_type is SortedDL else [dls]):
        learn, spy = Learner(dls, blob_model()), Spy()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[LPCallback(), spy])
        p = learn.lp_record.pseudo
        for x, target in spy.seen:
            i = item_numbers(data, x)
            torch.testing.assert_close(target, F.one_hot(p.labels[i], 3)*p.weights[i, None])


def test_extraction_and_frozen_order_do_not_change_the_run(data):
    "The callback draws the epoch's order as the DataLoader would, and no random number is spent"
    class State(Callback):
        order = 100
        def before_fit(self): self.states = []
        def before_batch(self):
            if self.training: self.states.append(torch.get_rng_state())
    runs = []
    for cbs in ([], [LPCallback()]):
        spy, state = Spy(), State()
        blob_learner(data).fit(2, 0., cbs=[spy, state, *cbs])
        runs.append((spy.seen, state.states))
    assert len(runs[0][0]) == len(runs[1][0]) > 20
    for (x, _), (z, _) in zip(runs[0][0], runs[1][0]): assert torch.equal(x, z)
    for s, t in zip(runs[0][1], runs[1][1]): assert torch.equal(s, t)


def test_pseudo_labels_of_other_data_are_not_used(data):
    cb = LPCallback(every=5)
    for other in (data, blobs(seed=5), blobs(n=200)): blob_learner(other).fit(1, cbs=cb)
    assert [h['epoch'] for h in cb.record.history] == [0, 1, 2]
    learn = blob_learner(data)
    learn.fit(1, cbs=cb)
    learn.fit(1, cbs=cb)
    assert [h['epoch'] for h in cb.record.history] == [0, 1, 2, 3]           # the same data: the last ones hold


def test_columns_of_epochs_without_an_update(data, tmp_path):
    learn = blob_learner(data, path=tmp_path)
    learn.fit(4, cbs=[LPCallback(warmup=1, every=2), SaveModelCallback(monitor='lp_certainty', fname='best')])
    certainty, sec = zip(*[v[-2:] for v in learn.recorder.values])
    assert certainty[0] != certainty[0] and certainty[1] == certainty[2]
    assert [s > 0 for s in sec] == [False, True, False, True]


# Refused before any training

def test_mixing_a_labeler_with_graph_arguments():
    with E(ValueError, match='pass k, gamma to it'): LPCallback(NetworkPrediction(), k=5, gamma=2)
    with E(TypeError): LPCallback(neighbours=5)
    for bad, match in ((dict(alpha=1.5), 'alpha must be'), (dict(warmup=-1), 'warmup=-1'), (dict(backend='zz'), 'backend must be')):
        with E(ValueError, match=match): LPCallback(**bad)
    assert LPCallback(k=5).labeler == Diffusion(k=5)


@pytest.mark.parametrize('change, match', [
    (dict(labels=[0, 1, 2]*50), 'all 120 training items are labeled'),
    (dict(labels=[None]*120 + [0, 1, 2]*10), 'no item is labeled'),
    (dict(labels=[0, 1]*4 + [None]*112 + [0, 1, 2]*10), 'class 2 has no labeled item'),
    (dict(loss_func=nn.MSELoss()), 'need cross-entropy'),
    (dict(loss_func=nn.NLLLoss()), 'need cross-entropy'),
    (dict(model=nn.Linear(8, 5)), 'no nn.Linear with 3 outputs'),
    (dict(model=nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))), 'no nn.Linear with 3 outputs'),
])
def test_refused(change, match):
    learn = blob_learner(two_stream=False, **change)
    before, loss = flat_weights(learn), learn.loss_func
    with E(ValueError, match=match): learn.fit(1, cbs=LPCallback())
    assert torch.equal(flat_weights(learn), before) and learn.loss_func is loss and not hasattr(learn, 'lp_record')
    assert [m.name for m in learn.metrics] == ['accuracy'] and 'get_idxs' not in learn.dls.train.__dict__


def test_more_outputs_than_classes_with_a_layer_of_ones_own(data):
    learn = blob_learner(model=nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5)))
    with E(ValueError, match='5 outputs and the data 3 classes'): learn.fit(1, cbs=LPCallback(layer='0'))
    assert type(learn.loss_func) is CrossEntropyLossFlat and [m.name for m in learn.metrics] == ['accuracy']


def test_unlabeled_validation_items_are_warned_of(data):
    labels = [None if i > 140 else o for i, o in enumerate(data.labels)]
    with pytest.warns(UserWarning, match='9 validation items are unlabeled'): blob_learner(data, labels=labels, two_stream=False).fit(1, cbs=LPCallback())


def test_an_ordinary_torch_loader_is_refused(data):
    tds = torch.utils.data.TensorDataset(data.x, data.truth)
    dls = DataLoaders(torch.utils.data.DataLoader(tds, 16), torch.utils.data.DataLoader(tds, 16))
    dls.c = 3
    learn = Learner(dls, blob_model(), CrossEntropyLossFlat())
    with learn.no_bar(), E(ValueError, match='DataLoaders.from_dsets'): learn.fit(1, cbs=LPCallback())


def test_large_k_is_clamped_with_a_warning(learn):
    with pytest.warns(UserWarning, match='k=200 is not below'): learn.fit(1, cbs=LPCallback(k=200))


def test_labeler_and_layer_are_used(data):
    learn = blob_learner(data)
    seen = []
    def labeler(feats, logits, y):
        seen.append((feats, logits, y))
        return NetworkPrediction()(feats, logits, y)
    learn.fit(1, cbs=LPCallback(labeler, layer='1'))
    feats, logits, y = seen[0]
    assert feats.shape == (120, 16) and logits.shape == (120, 3) and (y >= 0).sum() == 9
    torch.testing.assert_close(feats.norm(dim=1), torch.ones(120))


# Truth

def test_truth_as_array_function_or_dict(data):
    runs = []
    for truth in (data.truth[:120], data.truth[:120].numpy(), data.truth.tolist().__getitem__, dict(enumerate(data.truth.tolist()))):
        learn = blob_learner(data)
        learn.fit(1, cbs=LPCallback(truth=truth))
        runs.append((learn.lp_record.history[-1]['accuracy'], learn.lp_record.history[-1]['network_accuracy']))
    assert len(set(runs)) == 1 and runs[0][0] > .5


def test_truth_of_rows_of_a_dataframe(data):
    df = pd.DataFrame(dict(i=range(150), y=pd.Series(data.labels, dtype=object), t=['abc'[t] for t in data.truth]))
    df['y'] = [None if o is None else 'abc'[o] for o in df.y]
    block = DataBlock(blocks=(TransformBlock, SemiCategoryBlock), get_x=ColReader('i'), get_y=ColReader('y'), splitter=IndexSplitter(range(120, 150)))
    dls = block.semi_dataloaders(df, bs=16, num_workers=0, device='cpu')
    acc = []
    for truth in (lambda row: row['t'], df.t[:120], df.t[:120].tolist(), data.truth[:120]):
        y = dls.train.targets
        acc.append(truth_of(truth, dls.train, y, dls.vocab))
    for a in acc: assert torch.equal(a, data.truth[:120])
    with E(ValueError, match='class .z., which is not in the vocab'): truth_of(lambda row: 'z', dls.train, dls.train.targets, dls.vocab)


def test_truth_must_fit_the_known_labels(data):
    for truth, match in (((data.truth[:120]+1) % 3, 'contradicts the known label of 9'), (data.truth, 'expected one class each'),
        ({'other': 1}, 'knows none of the 120')):
        learn = blob_learner(data)
        with E(ValueError, match=match): learn.fit(1, cbs=LPCallback(truth=truth))
        traceless(learn)


def test_descriptors_in_a_file_are_the_same(data, tmp_path):
    weights = []
    for max_bytes in (2**32, 100):
        learn = blob_learner(data, path=tmp_path)
        learn.fit(2, cbs=LPCallback(max_bytes=max_bytes))
        weights.append(flat_weights(learn))
    assert torch.equal(*weights)
