"Columns of the Recorder, and trackers on them: in every method of the Learner, in the warm-up, and without an update."
import re
import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.hook import summary  # chkstyle: ignore (adds Learner.summary)
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import lr_find  # chkstyle: ignore (adds Learner.lr_find)
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.learner import ValueMetric, load_learner

from conftest import Stop, blob_learner, blobs, flat_weights, quiet
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.scoped import in_fit

TRACKERS = [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau]
COLUMNS = ['lp_certainty', 'lp_sec']
MODES = dict(get_preds=lambda o: o.get_preds(), predict=lambda o: o.predict(3), validate=lambda o: o.validate(),
    tta=lambda o: o.tta(n=1), one_batch=lambda o: o.get_preds(dl=[o.dls.valid.one_batch()], with_decoded=True),
    lr_find=lambda o: o.lr_find(num_it=4, show_plot=False))


def tracking(tracker, monitor, path, **settings):
    learn = blob_learner(path=path, cbs=[tracker(monitor=monitor)])
    learn.add_cb(LPCallback(**settings))
    return learn


# In every method of the Learner

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('monitor', COLUMNS)
@pytest.mark.parametrize('tracker', TRACKERS)
def test_trackers_in_the_learner(tracker, monitor, mode, tmp_path):
    learn = tracking(tracker, monitor, tmp_path)
    learn.fit(1)
    before, files = flat_weights(learn), sorted(tmp_path.rglob('*'))
    best = learn.cbs[-2].best
    MODES[mode](learn)
    assert not learn.lock.locked()
    assert torch.equal(flat_weights(learn), before)
    assert {o for o in tmp_path.rglob('*') if o.suffix == '.pth'} == {o for o in files if o.suffix == '.pth'}
    if mode != 'lr_find': assert learn.cbs[-2].best == best
    assert [m.name for m in learn.metrics] == ['accuracy']
    learn.fit(1)


@pytest.mark.parametrize('mode', MODES)
def test_a_tracker_in_the_learner_and_lpcallback_in_fit(mode, tmp_path):
    learn = blob_learner(path=tmp_path, cbs=SaveModelCallback(monitor='lp_certainty'))
    learn.fit(1, cbs=LPCallback())
    before = flat_weights(learn)
    MODES[mode](learn)
    assert not learn.lock.locked()
    assert torch.equal(flat_weights(learn), before)


@pytest.mark.parametrize('mode', MODES)
def test_columns_exist_in_every_mode(mode):
    learn, names = blob_learner(cbs=LPCallback()), []
    learn.add_cb(Callback(before_epoch=lambda cb: names.append(list(cb.recorder.metric_names))))
    MODES[mode](learn)
    assert names[0][-3:] == ['lp_certainty', 'lp_sec', 'time']


def test_validate_returns_the_loss_and_the_metrics(tmp_path):
    learn = tracking(SaveModelCallback, 'lp_certainty', tmp_path)
    learn.fit(1)
    assert len(learn.validate()) == 2
    assert learn.validate()[1] == pytest.approx((learn.get_preds()[0].argmax(1) == learn.get_preds()[1]).float().mean().item())


def test_other_trackers_do_not_follow_validate(tmp_path):
    "fastai compares the value of another column then"
    learn = blob_learner(path=tmp_path, cbs=[SaveModelCallback(monitor='valid_loss'), LPCallback()])
    learn.fit(2)
    best = learn.save_model.best
    learn.validate()
    assert learn.save_model.best == best


def test_a_column_that_does_not_exist(tmp_path):
    learn = blob_learner(path=tmp_path)
    before = flat_weights(learn)
    def fit(monitor, *cbs): learn.fit(1, cbs=[*cbs, EarlyStoppingCallback(monitor=monitor)])
    for monitor, cbs in (('lp_certainty', []), ('lp_accuracy', [LPCallback()]), ('lp_cert', [LPCallback()])):
        with pytest.raises(ValueError, match=f'{monitor!r} of Early.* is not a column .* with LPCallback'): fit(monitor, *cbs)
    assert torch.equal(flat_weights(learn), before)
    assert [m.name for m in learn.metrics] == ['accuracy']


def test_a_column_of_the_user_stays():
    learn = blob_learner()
    learn.metrics = learn.metrics + [ValueMetric(lambda: 1., 'lp_norm')]
    learn.fit(1, cbs=LPCallback())
    assert [m.name for m in learn.metrics] == ['accuracy', 'lp_norm']


def test_an_error_in_validate_leaves_no_column(tmp_path):
    learn = tracking(SaveModelCallback, 'lp_certainty', tmp_path)
    learn.fit(1)
    with pytest.raises(KeyError): learn.validate(cbs=Callback(before_validate=lambda cb: {}['x']))
    assert not learn.lock.locked()
    assert [m.name for m in learn.metrics] == ['accuracy']
    learn.fit(1)
    assert learn.recorder.metric_names[-3:] == ['lp_certainty', 'lp_sec', 'time']


def test_in_fit():
    learn, seen = blob_learner(), {}
    cb = Callback(before_fit=lambda cb: seen.setdefault(mode, in_fit(cb.learn)))
    learn.add_cb(cb)
    for mode in MODES: MODES[mode](learn)
    assert {k for k, v in seen.items() if v} == {'lr_find'}
    mode = 'interrupted'
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop('before_train', 0))
    assert seen[mode]
    assert not in_fit(learn)


# Waiting

@pytest.mark.parametrize('monitor', COLUMNS)
def test_early_stopping_waits_for_the_first_update(monitor, tmp_path, capsys):
    stop = EarlyStoppingCallback(monitor=monitor, patience=1, min_delta=100)
    learn = blob_learner(path=tmp_path)
    learn.fit(9, cbs=[LPCallback(warmup=3), stop])
    assert len(learn.recorder.values) == 5  # the update of epoch 3 is the best one, that of epoch 4 no better
    assert re.search('since epoch 3', capsys.readouterr().out)


def test_the_learning_rate_stays_in_the_warmup():
    learn, rates = blob_learner(), []
    plateau = ReduceLROnPlateau(monitor='lp_certainty', patience=1, min_delta=100)
    seen = Callback(after_epoch=lambda cb: rates.append(cb.opt.hypers[-1]['lr']))
    seen.order = 99
    learn.fit(6, 1e-2, cbs=[LPCallback(warmup=3), plateau, seen])
    assert rates == pytest.approx([1e-2]*4 + [1e-3, 1e-4])


@pytest.mark.parametrize('every', [2, 3])
def test_epochs_without_an_update_are_not_counted(every):
    stop = EarlyStoppingCallback(monitor='lp_certainty', patience=2, min_delta=100)
    learn = blob_learner()
    learn.fit(20, cbs=[LPCallback(every=every), stop])
    assert len(learn.recorder.values) == 2*every+1
    certainty = [v[-2] for v in learn.recorder.values]
    assert certainty[:every] == [certainty[0]]*every


@pytest.mark.parametrize('settings, saved', [({}, []), (dict(at_end=True), ['model']),
    (dict(every_epoch=True), ['model_0', 'model_1'])], ids=str)
def test_a_fit_that_is_all_warmup(settings, saved, tmp_path):
    "No model is loaded if none was saved, not even one that an earlier fit has left"
    learn = blob_learner(path=tmp_path)
    save = SaveModelCallback(monitor='lp_certainty', **settings)
    learn.fit(2, cbs=[LPCallback(warmup=2), save])
    assert sorted(o.stem for o in tmp_path.rglob('*.pth')) == saved
    learn.save('model')
    learn.fit(2, 1e-2, cbs=[LPCallback(warmup=9), save])
    trained = flat_weights(learn)
    learn.load('model')
    assert torch.equal(flat_weights(learn), trained) == bool(settings.get('at_end'))


def test_the_best_model_after_the_warmup_is_loaded(tmp_path):
    learn = blob_learner(path=tmp_path)
    save = SaveModelCallback(monitor='lp_certainty')
    learn.fit(6, cbs=[LPCallback(warmup=2), save])
    certainty = [v[-2] for v in learn.recorder.values]
    assert save.best == max(certainty[2:])


def test_train_metrics(tmp_path):
    stop = EarlyStoppingCallback(monitor='valid_lp_certainty', patience=1, min_delta=100)
    learn = blob_learner(path=tmp_path, cbs=[stop, LPCallback(warmup=2)])
    learn.recorder.train_metrics = True
    learn.fit(6)
    assert len(learn.recorder.values) == 4
    names = list(learn.recorder.metric_names)
    assert {'train_lp_certainty', 'valid_lp_certainty'} <= set(names)
    learn.get_preds()
    learn.validate()
    with pytest.raises(ValueError, match="'lp_certainty' of SaveModelCallback.*valid_lp_certainty"):
        learn.fit(1, cbs=SaveModelCallback(monitor='lp_certainty'))


def test_without_validation_items(tmp_path):
    data = blobs(n_valid=0)
    learn = blob_learner(data, path=tmp_path, cbs=[SaveModelCallback(monitor='lp_certainty'), LPCallback(warmup=1)])
    learn.fit(3)
    assert learn.save_model.best == max(v[-2] for v in learn.recorder.values[1:])


def test_a_cancelled_validation(tmp_path):
    "Its row of the Recorder has no columns"
    learn = blob_learner(path=tmp_path)
    def cancel(cb):
        if cb.epoch == 1: raise CancelValidException
    learn.fit(3, cbs=[LPCallback(), SaveModelCallback(monitor='lp_certainty'), Callback(before_validate=cancel)])
    assert len(learn.recorder.values) == 3


@pytest.mark.parametrize('short_valid', [True, False])
def test_short_epochs(short_valid, tmp_path):
    "fastai's Recorder leaves columns out of the row, so that a tracker would read another one"
    learn, save = blob_learner(path=tmp_path), SaveModelCallback(monitor='lp_certainty')
    with pytest.warns(UserWarning, match='SaveModelCallback cannot read lp_certainty.*ShortEpochCallback') as seen:
        learn.fit(2, cbs=[LPCallback(), ShortEpochCallback(.5, short_valid), save])
    assert sum('cannot read' in str(o.message) for o in seen) == 1
    assert len(learn.lp_record.history) == 2


def test_epochs_that_are_skipped(tmp_path):
    learn, save = blob_learner(path=tmp_path), SaveModelCallback(monitor='lp_certainty')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(4, cbs=[LPCallback(), save], start_epoch=2)
    assert [row['epoch'] for row in learn.lp_record.history] == [2, 3]
    assert save.best == max(row['certainty'] for row in learn.lp_record.history)


def test_summary_with_callbacks(tmp_path):
    learn = tracking(SaveModelCallback, 'lp_certainty', tmp_path)
    assert 'Linear' in learn.summary()
    learn.fit(1)
    before = flat_weights(learn)
    assert 'Linear' in learn.summary()
    assert torch.equal(flat_weights(learn), before)


def test_a_loaded_learner(tmp_path):
    learn = tracking(SaveModelCallback, 'lp_certainty', tmp_path)
    learn.fit(1)
    learn.export(tmp_path/'export.pkl')
    loaded = quiet(load_learner(tmp_path/'export.pkl'))
    assert torch.equal(loaded.predict(3)[2], learn.predict(3)[2])
    assert len(loaded.validate(dl=learn.dls.valid)) == 2
    assert not loaded.lock.locked()
    loaded.dls, loaded.opt = learn.dls, None
    loaded.fit(1)
    assert loaded.recorder.metric_names[-3:] == ['lp_certainty', 'lp_sec', 'time']


def test_csv_logger(tmp_path):
    learn = blob_learner(path=tmp_path)
    logger = CSVLogger()
    learn.fit(3, cbs=[LPCallback(warmup=1), SaveModelCallback(monitor='lp_certainty'), logger])
    logger.learn = learn
    df = logger.read_log()
    assert list(df)[-3:] == ['lp_certainty', 'lp_sec', 'time']
    assert df.lp_certainty.isna().tolist() == [True, False, False]


def test_an_interrupted_warmup_leaves_no_tracker_waiting(tmp_path):
    learn = tracking(EarlyStoppingCallback, 'lp_certainty', tmp_path, warmup=3)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Stop('after_epoch', 0))
    assert all(cb.run for cb in learn.cbs)
