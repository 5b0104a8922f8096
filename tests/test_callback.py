"LPCallback in a fit: what each batch trains on, when pseudo-labels are renewed, and what it refuses."
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import fit_one_cycle  # chkstyle: ignore (adds Learner.fit_one_cycle)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import SkipItemException
from fastai.data.transforms import ColReader, IndexSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from fastai.text.data import SortedDL
from torch import nn

from conftest import Look, Spy, Stop, blob_learner, blob_model, blobs, flat_weights, item_numbers, quiet, traceless
from conftest import Break  # chkstyle: ignore (test_faults imports it from here)
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.record import truth_of
from fastai_lp.learner.streams import semi_dls
from fastai_lp.transductive import diffusion, neighbors
from fastai_lp.transductive.labelers import Diffusion, NetworkPrediction
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.utils import progress

E = pytest.raises


def epochs_of(cb): return [row['epoch'] for row in cb.record.history]


def targets_match(data, learn, seen):
    "Asserts that each item was trained with its own pseudo-label and weight"
    p = learn.lp_record.pseudo
    for x, target in seen:
        i = item_numbers(data, x)
        torch.testing.assert_close(target, F.one_hot(p.labels[i], 3)*p.weights[i, None])


# What it is for

def test_learns_more_than_from_the_labels_alone():
    data = blobs(n=430, spread=1.4, per_class=1)
    def accuracy_with(cb):
        learn = blob_learner(data, seed=3)
        learn.fit_one_cycle(15, 1e-2, cbs=cb)
        return learn.validate()[1]
    with_lp = accuracy_with(cb := LPCallback(truth=data.truth[:400]))
    assert with_lp > accuracy_with(LPCallback(warmup=100))
    assert cb.record.history[-1]['accuracy'] > .8


def arcs(sizes, shown, seed=0):
    "Data as from `blobs`, with long thin classes of `sizes` items; the first `shown` items, at one end, are labeled"
    g = torch.Generator().manual_seed(seed)
    along = torch.cat([torch.linspace(-1, 1, n) for n in sizes])
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.stack([along*3, truth + .5*along.abs(), torch.ones_like(along)], 1)
    x = x + .03*torch.randn(len(truth), 3, generator=g)
    labels = [t if i < m else None for t, (n, m) in enumerate(zip(sizes, shown)) for i in range(n)]
    x, labels, n_train = torch.cat([x, x[::5]]), labels + truth[::5].tolist(), len(truth)
    return SimpleNamespace(x=x, truth=torch.cat([truth, truth[::5]]), labels=labels, n_train=n_train, c=3, d=3)


def recall(predicted, truth): return torch.stack([(predicted[truth == c] == c).float().mean() for c in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize('sizes, shown', [((100, 100, 100), (1, 1, 1)), ((200, 60, 20), (10, 3, 1)),
    ((200, 60, 20), (1, 1, 1)), ((60, 60, 60), (30, 1, 1))], ids=str)
def test_one_label_per_class_and_imbalance(sizes, shown):
    "Mean over three random networks, as the first features of a single one may mix the classes"
    data = arcs(sizes, shown)
    train, valid = data.truth.split([data.n_train, len(data.truth)-data.n_train])
    recalls = dict(alone=[], lp=[], pseudo=[])
    for seed in range(3):
        for name, cb, epochs in (('alone', LPCallback(warmup=60), 60), ('lp', LPCallback(max_iter=100), 8)):
            learn = blob_learner(data, seed=seed)
            learn.fit(epochs, 1e-2, cbs=cb)
            recalls[name].append(recall(learn.get_preds()[0].argmax(1), valid))
        p = learn.lp_record.pseudo
        recalls['pseudo'].append(recall(p.labels, train))
        assert p.labeled.sum() == sum(shown)
        assert p.reached.all()
        torch.testing.assert_close(p.class_weights*torch.bincount(p.labels, minlength=3), torch.full((3,), data.n_train/3))
    recalls = {k: torch.stack(v).mean(0) for k, v in recalls.items()}
    assert recalls['pseudo'].min() > .45, recalls
    assert recalls['lp'].min() > .45, recalls
    assert recalls['lp'].mean() > recalls['alone'].mean() + .05, recalls


def test_given_to_fit_or_to_the_learner(learn, data):
    cb = LPCallback()
    learn.fit_one_cycle(2, cbs=cb)
    assert learn.lp_record is cb.record
    assert epochs_of(cb) == [0, 1]
    assert len(cb.record.pseudo.labels) == data.n_train
    stays = blob_learner(cbs=LPCallback(every=2))
    stays.fit(3)
    assert stays.lp_record is stays.lp.record
    assert epochs_of(stays.lp) == [0, 2]


def test_recorder_columns(data):
    learn, cb = blob_learner(data), LPCallback(truth=data.truth[:data.n_train])
    learn.fit(2, cbs=cb)
    assert learn.recorder.metric_names[4:-1] == ['lp_accuracy', 'lp_certainty', 'lp_sec']
    last = cb.record.history[-1]
    assert learn.recorder.values[-1][-3:] == [last['accuracy'], last['certainty'], last['sec']]
    assert set(last['seconds']) == {'features', 'graph', 'diffusion'}
    assert min(last['seconds'].values()) > 0
    df = cb.record.to_df()
    assert len(df) == 2
    assert {'accuracy', 'network_accuracy', 's_graph'} <= set(df)


def test_columns_of_epochs_without_an_update(data, tmp_path):
    learn = blob_learner(data, path=tmp_path)
    learn.fit(4, cbs=[LPCallback(warmup=1, every=2), SaveModelCallback(monitor='lp_certainty', fname='best')])
    certainty, sec = zip(*[v[-2:] for v in learn.recorder.values])
    assert certainty[0] != certainty[0]  # NaN in the warm-up
    assert certainty[1] == certainty[2]
    assert [s > 0 for s in sec] == [False, True, False, True]


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_bars_are_not_for_log_files(terminal, data, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal)
    learn = blob_learner(data, bar=True)
    learn.fit(1, cbs=LPCallback())
    out = capsys.readouterr().out
    assert 'lp_certainty' in out
    for word in ('features', 'neighbors', 'diffusion'): assert (word in out) == terminal


# What each batch trains on

@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('two_stream', [True, False])
def test_each_item_has_its_own_target(data, workers, two_stream):
    learn, cb, spy = blob_learner(data, num_workers=workers, two_stream=two_stream), LPCallback(), Spy()
    learn.fit(1, cbs=[cb, spy])
    targets_match(data, learn, spy.seen)
    last = item_numbers(data, spy.seen[-1][0])
    assert torch.equal(torch.as_tensor(spy.last_target), cb.record.pseudo.labels[last])  # an integer again, for metrics


def test_targets_are_integers_after_a_cancelled_batch(learn):
    learn.recorder.train_metrics = True  # accuracy needs them
    learn.fit(2, cbs=[LPCallback(), Stop('after_pred', 1, CancelBatchException)])


def test_half_of_each_batch_is_labeled_after_the_warmup(data):
    learn, cb, spy = blob_learner(data), LPCallback(warmup=1), Spy()
    learn.fit(2, cbs=[cb, spy])
    labeled = [cb.record.pseudo.labeled[item_numbers(data, x)].sum().item() for x, _ in spy.seen]
    assert labeled == [16] + [8]*(111//8)


def test_warmup_has_the_supervised_loss(data):
    learn, spy = blob_learner(data, two_stream=False), Spy()
    learn.fit(1, cbs=[LPCallback(warmup=1), spy])
    for x, target in spy.seen:
        labeled = target.sum(1) > 0
        assert labeled.sum() == sum(i < 9 for i in item_numbers(data, x))
        expected = len(x) if labeled.any() else 0  # for the mean over labeled items
        assert abs(target.sum() - expected) < 1e-4


class Oracle:
    "True labels, all with the same weight"
    def __init__(self, truth, weight=1.): self.truth, self.weight = truth, weight
    def __call__(self, feats, logits, y):
        one = torch.ones(len(y))
        return PseudoLabels(self.truth, self.weight*one, torch.ones(3), y >= 0, one.bool())


@pytest.mark.parametrize('extra', [lambda: [], lambda: [MixUp()], lambda: [GradientAccumulation(32)]])
@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat])
def test_true_labels_with_weight_one_train_like_fastai(data, extra, loss_func):
    def run(labels, *cbs):
        learn = blob_learner(data, two_stream=False, labels=labels, loss_func=loss_func())
        learn.opt_func = SGD  # Adam would amplify the rounding of gradients near zero
        learn.fit(2, .1, cbs=[*cbs, *extra()])
        return flat_weights(learn)
    ours = run(data.labels, LPCallback(Oracle(data.truth[:120])))
    torch.testing.assert_close(ours, run(data.truth.tolist()), rtol=1e-5, atol=1e-6)


def test_weight_zero_trains_nothing(data):
    learn = blob_learner(data)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1, 1e-2, wd=0, cbs=LPCallback(Oracle(data.truth[:120], weight=0.)))
    for p, q in zip(learn.model.parameters(), before): assert torch.equal(p, q)


def test_extraction_and_the_planned_order_do_not_change_the_run(data):
    "The callback draws the order of an epoch as the DataLoader would, and uses no random number"
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


def datasets(data, look=Look):
    tfms = [look(data.x)], [Look(data.labels), SemiCategorize()]
    return Datasets(range(150), tfms, splits=[range(120), range(120, 150)])


@pytest.mark.parametrize('dl_type', [WeightedDL, SortedDL])
def test_other_data_loaders(data, dl_type):
    weights = dict(wgts=torch.linspace(1, 9, 120).numpy())
    more = weights if dl_type is WeightedDL else dict(sort_func=lambda o: float(o[0].norm()))
    dsets = datasets(data)
    train = dl_type(dsets.train, bs=16, shuffle=True, num_workers=0, **more)
    dls = DataLoaders(train, dsets.dataloaders(bs=16, num_workers=0).valid)
    for dls in ([dls, semi_dls(dls, 6)] if dl_type is SortedDL else [dls]):
        learn, spy = quiet(Learner(dls, blob_model())), Spy()
        learn.fit(1, cbs=[LPCallback(), spy])
        targets_match(data, learn, spy.seen)


# When pseudo-labels are renewed

@pytest.fixture
def extractions(monkeypatch):
    "One entry per extraction of features"
    calls, real = [], Extractor.__call__
    monkeypatch.setattr(Extractor, '__call__', lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_warmup_and_every_count_over_all_fits(extractions):
    learn, cb = blob_learner(), LPCallback(warmup=2, every=2)
    learn.fit(1, cbs=cb)
    assert not extractions
    learn.fit(4, cbs=cb)
    assert epochs_of(cb) == [2, 4]
    assert len(extractions) == 2


def test_start_epoch_counts_the_skipped_epochs(extractions):
    learn, cb = blob_learner(), LPCallback(warmup=2)
    learn.fit(4, cbs=cb, start_epoch=3)
    assert epochs_of(cb) == [3]
    assert len(extractions) == 1


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_train', 'before_validate'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_callback_looks_at_a_batch(data, event, workers):
    "Between the planning and the first batch, it is one of the planned batches"
    learn, spy, seen = blob_learner(data, num_workers=workers), Spy(), []
    looks = Callback(**{event: lambda cb: seen.append(cb.dls.train.one_batch())})
    looks.order = 30
    learn.fit(2, cbs=[LPCallback(), spy, looks])
    assert len(seen) >= 1
    targets_match(data, learn, spy.seen[len(spy.seen)//2:])
    assert 'get_idxs' not in vars(learn.dls.train)


@pytest.mark.parametrize('two_stream', [True, False])
@pytest.mark.parametrize('event', ['before_train', 'after_train'])
def test_a_callback_predicts_the_training_items(data, event, two_stream):
    learn, found = blob_learner(data, two_stream=two_stream), []
    predicts = Callback(**{event: lambda cb: found.append(cb.learn.get_preds(ds_idx=0, inner=True)[1]) if not found else None})
    predicts.order = 30
    learn.fit(1, cbs=[LPCallback(), predicts])
    assert found[0].clamp(min=-1).tolist() == [-1 if o is None else o for o in data.labels[:120]]


def test_other_data_get_new_pseudo_labels(data):
    cb = LPCallback(every=5)
    for other in (data, blobs(seed=5), blobs(n=200)): blob_learner(other).fit(1, cbs=cb)
    assert epochs_of(cb) == [0, 1, 2]
    learn = blob_learner(data)
    learn.fit(1, cbs=cb)
    learn.fit(1, cbs=cb)
    assert epochs_of(cb) == [0, 1, 2, 3]  # the same data: the last ones are kept


@pytest.mark.parametrize('event', ['after_train', 'after_batch', 'before_train'])
def test_inference_within_a_fit(data, event):
    class Looks(Callback):
        order, done = 20, False
        def look(self):
            if not self.training or self.done: return
            self.done = True
            self.learn.get_preds(inner=True)
            self.learn.validate()
            self.learn.model.train()
            self.learn.training, self.learn.dl = True, self.dls.train
    learn, cb = blob_learner(data), Looks()
    setattr(cb, event, cb.look)
    learn.fit(3, cbs=[LPCallback(), cb])
    assert cb.done
    assert len(learn.lp_record.history) == 3
    traceless(learn)


@pytest.mark.parametrize('stage', ['features', 'neighbors', 'diffusion'])
def test_an_interrupted_update_changes_nothing(learn, stage, monkeypatch):
    weights, order = flat_weights(learn), learn.dls.train.rng.getstate()
    blocks = progress.blocks
    def interrupted(n, size, what, start=0):
        for o in blocks(n, size, what, start):
            yield o
            if what == stage: raise KeyboardInterrupt
    def stop(*args): raise KeyboardInterrupt
    for module in (neighbors, diffusion): monkeypatch.setattr(module, 'blocks', interrupted)
    hook = learn.model[1].register_forward_hook(stop) if stage == 'features' else None
    learn.model.train()
    with E(KeyboardInterrupt): learn.fit(1, cbs=LPCallback())
    if hook: hook.remove()
    assert torch.equal(flat_weights(learn), weights)
    assert learn.dls.train.rng.getstate() == order
    assert learn.model.training
    traceless(learn)


# The labeler and its settings

def test_labeler_and_features_are_used(data):
    seen = []
    def labeler(feats, logits, y):
        seen.append((feats, logits, y))
        return NetworkPrediction()(feats, logits, y)
    blob_learner(data).fit(1, cbs=LPCallback(labeler, features=Extractor('1')))
    feats, logits, y = seen[0]
    assert feats.shape == (120, 16)
    assert logits.shape == (120, 3)
    assert (y >= 0).sum() == 9
    torch.testing.assert_close(feats.norm(dim=1), torch.ones(120))


def test_settings_go_to_the_labeler():
    assert LPCallback(k=5).labeler == Diffusion(k=5)
    with E(ValueError, match='pass k, gamma to NetworkPrediction'): LPCallback(NetworkPrediction(), k=5, gamma=2)
    with E(TypeError): LPCallback(neighbors=5)


@pytest.mark.parametrize('name, bad', dict(warmup=-1, every=0, mixup=-1., alpha=1.5, backend='zz', temperature=0,
    balance='even', k=0, prior='even').items())
def test_invalid_settings(name, bad):
    with E(ValueError, match=f'{name} must be'): LPCallback(**{name: bad})


# Errors before training

@pytest.mark.parametrize('change, match', [
    (dict(labels=[0, 1, 2]*50), 'all 120 training items are labeled'),
    (dict(loss_func=nn.MSELoss()), 'need cross-entropy'),
    (dict(loss_func=nn.NLLLoss()), 'need cross-entropy')])
def test_refused(change, match):
    learn = blob_learner(two_stream=False, **change)
    before, loss = flat_weights(learn), learn.loss_func
    with E(ValueError, match=match): learn.fit(1, cbs=LPCallback())
    assert torch.equal(flat_weights(learn), before)
    assert learn.loss_func is loss
    assert not hasattr(learn, 'lp_record')
    assert [m.name for m in learn.metrics] == ['accuracy']


def test_more_outputs_than_classes():
    learn = blob_learner(model=blob_model(c=5))
    with E(ValueError, match='no nn.Linear with 3 outputs'): learn.fit(1, cbs=LPCallback())
    with E(ValueError, match='5 outputs for 3 classes'): learn.fit(1, cbs=LPCallback(features=Extractor('0')))


def test_unlabeled_validation_items_are_warned_of(data):
    learn = blob_learner(data, labels=[None if i > 140 else o for i, o in enumerate(data.labels)], two_stream=False)
    with pytest.warns(UserWarning, match='9 validation items are unlabeled'): learn.fit(1, cbs=LPCallback())


class Skips(Look):
    "Items 40 and 77 skip themselves"
    def __call__(self, i):
        if i in (40, 77): raise SkipItemException
        return super().__call__(i)


@pytest.mark.parametrize('two_stream', [True, False])
@pytest.mark.parametrize('warmup', [0, 1])
def test_items_that_skip_themselves_are_refused(data, two_stream, warmup):
    dsets = datasets(data, Skips)
    make = dsets.semi_dataloaders if two_stream else dsets.dataloaders
    learn = quiet(Learner(make(bs=16, num_workers=0, device='cpu'), blob_model()))
    with E(ValueError, match='skip themselves'): learn.fit(2, cbs=LPCallback(warmup=warmup))


# Truth

def test_truth_as_array_function_or_dict(data):
    known, runs = data.truth[:120], []
    for truth in (known, known.numpy(), known.tolist().__getitem__, dict(enumerate(known.tolist()))):
        learn = blob_learner(data)
        learn.fit(1, cbs=LPCallback(truth=truth))
        runs.append((learn.lp_record.history[-1]['accuracy'], learn.lp_record.history[-1]['network_accuracy']))
    assert len(set(runs)) == 1
    assert runs[0][0] > .5


def test_truth_of_the_rows_of_a_dataframe(data):
    truth = ['abc'[t] for t in data.truth]
    df = pd.DataFrame(dict(i=range(150), t=truth, y=[None if o is None else 'abc'[o] for o in data.labels]))
    block = DataBlock(blocks=(TransformBlock, SemiCategoryBlock), get_x=ColReader('i'), get_y=ColReader('y'),
        splitter=IndexSplitter(range(120, 150)))
    dls = block.semi_dataloaders(df, bs=16, num_workers=0, device='cpu')
    def found(truth): return truth_of(truth, dls.train, dls.train.targets, dls.vocab)
    known = data.truth[:120]
    for given in (lambda row: row['t'], df.t[:120], truth[:120], known): assert torch.equal(found(given), known)
    with E(ValueError, match='class .z., which is not in the vocab'): found(lambda row: 'z')


def test_truth_that_knows_no_item(learn):
    with E(ValueError, match='knows none of the 120'): learn.fit(1, cbs=LPCallback(truth={'other': 1}))
