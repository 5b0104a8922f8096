"However a fit ends, our callbacks leave no trace: the next fit gives the same weights as the first fit of a new Learner."
from functools import cache

import pytest
import torch
from fastai.callback.core import (CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
    CancelStepException, CancelTrainException, CancelValidException)
from fastai.torch_core import set_seed

from conftest import Mark, Stop, blob_learner, blobs, flat_weights, state_of
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.fixmatch import FixMatchCallback
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.mixing import StreamMixUp
from fastai_lp.learner.resume import ResumeCallback

pytestmark = pytest.mark.filterwarnings('ignore')  # about networks that are hardly trained

CALLBACKS = dict(  # chkstyle: ignore-node (one kind per line)
    lp=lambda file: [LPCallback(warmup=1)],
    strong=lambda file: [LPCallback.strong(unlabeled_tfms=Mark())],
    mean_teacher=lambda file: [MeanTeacherCallback()],
    fixmatch=lambda file: [LPCallback(warmup=1), FixMatchCallback(.5, unlabeled_tfms=Mark())],
    mixup=lambda file: [LPCallback(), StreamMixUp()],
    resume=lambda file: [LPCallback(), MeanTeacherCallback(), ResumeCallback(file)])

# fastai's events in their order, and where it catches each of its exceptions
BATCH = 'before_batch after_pred after_loss before_backward before_step after_step'.split()
TRAIN = ['before_train', *BATCH, 'after_batch']
EPOCH = ['before_epoch', *TRAIN, 'after_train', 'before_validate', 'after_validate']
EVENTS = ['before_fit', *EPOCH, 'after_epoch', 'after_fit']
CAUGHT = {KeyboardInterrupt: EVENTS, CancelBatchException: BATCH, CancelBackwardException: ['before_backward'],
    CancelStepException: ['before_step'], CancelTrainException: TRAIN, CancelValidException: ['before_validate'],
    CancelEpochException: EPOCH, CancelFitException: EVENTS[:-1]}

FIRST, LAST = -7, 70  # order of a callback that is called before, or after, all of ours
FAST = {(CancelBatchException, 'after_pred', LAST), (CancelTrainException, 'before_batch', FIRST),
    (CancelTrainException, 'before_train', LAST), (CancelEpochException, 'before_epoch', LAST),
    (CancelEpochException, 'after_loss', FIRST), (CancelFitException, 'before_epoch', FIRST),
    (CancelFitException, 'after_epoch', LAST)} | {(KeyboardInterrupt, event, LAST) for event in EVENTS}


def ending(error, event, order):
    name = f"{error.__name__}-{event}-{'first' if order == FIRST else 'last'}"
    return pytest.param(error, event, order, id=name, marks=[] if (error, event, order) in FAST else [pytest.mark.slow])


ENDINGS = [ending(error, event, order) for error, events in CAUGHT.items() for event in events for order in (LAST, FIRST)
    if (error, event, order) != (CancelEpochException, 'before_epoch', FIRST)]  # fastai's Recorder needs this event


def small_learner(): return blob_learner(blobs(n=48, n_valid=12))


def trained(learn, cbs):
    "Weights after a fit from a fixed start"
    torch.manual_seed(0)
    for m in learn.model.modules():
        if hasattr(m, 'reset_parameters'): m.reset_parameters()
    dl = learn.dls.train
    dl.rng.seed(0)
    dl.pool, learn.opt = [], None
    set_seed(0)
    learn.fit(2, 1e-2, cbs=cbs)
    return flat_weights(learn)


@pytest.fixture(scope='module')
def of_a_new_learner(tmp_path_factory):
    @cache
    def weights(name): return trained(small_learner(), CALLBACKS[name](tmp_path_factory.mktemp('new')/'run.pth'))
    return weights


@pytest.fixture(scope='module')
def fastais_attributes():
    learn = small_learner()
    learn.fit(1)
    return set(vars(learn))


@pytest.mark.parametrize('error, event, order', ENDINGS)
@pytest.mark.parametrize('name', CALLBACKS)
def test_leaves_no_trace(name, error, event, order, of_a_new_learner, fastais_attributes, tmp_path):
    learn, cbs, stop = small_learner(), CALLBACKS[name](tmp_path/'run.pth'), Stop(event, 1, error)
    stop.order = order
    learn.add_cbs(cbs)
    before = state_of(learn)
    if error is KeyboardInterrupt:
        with pytest.raises(error): learn.fit(3, cbs=stop)
    else: learn.fit(3, cbs=stop)
    assert stop.done
    assert state_of(learn) == before
    learn.fit(3)  # with the same callbacks
    assert state_of(learn) == before
    learn.remove_cbs(cbs)
    vars(learn).pop('mt_record', None)  # whose teacher the next fit would continue with
    assert set(vars(learn)) - fastais_attributes <= {'lp_record'}
    assert torch.equal(trained(learn, CALLBACKS[name](tmp_path/'next.pth')), of_a_new_learner(name))
