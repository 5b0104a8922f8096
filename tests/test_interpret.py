"LPInterpretation: its tables equal the record, for any Learner, from a file or a run; warnings about pseudo-labels that look wrong."
import json
import re
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.tabular.all import CategoryBlock, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from PIL import Image

from conftest import blob_learner, blobs
from fastai_lp.experiments.commands import run_experiment
from fastai_lp.experiments.datasets import digits_folder
from fastai_lp.experiments.models import small_convnet
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.streams import semi_dls
from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.curation import label_issues, suggest
from fastai_lp.transductive.labelers import NetworkPrediction
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.transductive.propagate import propagate


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def fitted(truth=True, epochs=3, **kwargs):
    data = blobs()
    learn = blob_learner(data)
    learn.fit(epochs, 1e-2, cbs=LPCallback(truth=data.truth[:data.n_train] if truth else None, **kwargs))
    return learn, data


def test_tables_equal_the_record():
    learn, data = fitted()
    interp, p = LPInterpretation.from_learner(learn), learn.lp_record.pseudo
    df = interp.to_df()
    assert df.item.tolist() == list(range(data.n_train))
    assert df.label.tolist() == p.labels.tolist()
    assert df.truth.tolist() == data.truth[:data.n_train].tolist()
    assert df.labeled.sum() == 9
    assert df.reached.all()
    np.testing.assert_array_equal(df[['certainty', 'weight']], torch.stack([p.certainty, p.weights], 1))
    assert interp.history == learn.lp_record.history


def test_suggestions_and_issues_are_those_of_curation():
    learn, data = fitted()
    interp, p = LPInterpretation.from_learner(learn), learn.lp_record.pseudo
    items, gain = suggest(p.W, p.labeled, p.certainty, 5)
    asked = interp.suggest(5)
    assert asked.index.tolist() == asked.item.tolist() == items.tolist()
    assert asked.gain.tolist() == gain.tolist()
    p.labels[4] = (p.labels[4]+1) % 3
    issues, found = interp.label_issues(), label_issues(p.W, torch.where(p.labeled, p.labels, -1), 3)
    assert issues.index.tolist() == found.items.tolist()
    assert issues.index[0] == 4
    assert issues.suggested.iloc[0] == data.truth[4]


def test_errors_have_names_and_the_most_certain_come_first():
    p = fitted()[0].lp_record.pseudo
    wrong = [5, 70, 71]  # item 5 is labeled
    truth = p.labels.clone()
    truth[wrong] = (truth[wrong]+1) % 3
    df = LPInterpretation(p, truth=truth, vocab='abc').errors()
    assert df.index.tolist() == sorted(wrong[1:], key=lambda i: -p.certainty[i])
    assert [(r.label, r.truth) for r in df.itertuples()] == [('abc'[p.labels[i]], 'abc'[truth[i]]) for i in df.index]


def test_saved_file_needs_no_pickle(tmp_path):
    interp = LPInterpretation.from_learner(fitted()[0])
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    pd.testing.assert_frame_equal(back.label_issues(), interp.label_issues())
    with np.load(tmp_path/'a.npz', allow_pickle=False) as f: assert all(f[k].dtype != object for k in f)
    assert torch.equal(PseudoLabels.load(tmp_path/'a.npz').labels, interp.pseudo.labels)


def test_images_are_named_by_path(tmp_path):
    dls = SemiImageDataLoaders.from_folder(digits_folder(tmp_path, labels=20), bs=64, num_workers=0, device='cpu')
    learn = blob_learner(path=tmp_path)
    learn.dls, learn.model = dls, small_convnet(10, n_in=3, width=8)
    with learn.no_bar(): learn.fit(1, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    df = interp.to_df()
    assert df.item.tolist() == [str(o) for o in dls.train_ds.items]
    assert set(df.label) <= set('0123456789')
    assert 'truth' not in df
    read = pd.read_csv(interp.to_csv(tmp_path/'labels.csv'), dtype=dict(label=str))
    pd.testing.assert_frame_equal(read[['item', 'label']], df[['item', 'label']], check_dtype=False)
    shown = interp.show([3, 5, 8]).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(Image.open(df.item[3]).convert('RGB')))
    with pytest.raises(ValueError, match='no items to show'): interp.show([])


def test_rows_of_a_table_join_by_their_index():
    data = blobs(seed=1)
    df = pd.DataFrame(data.x.numpy(), columns=list('abcdefgh')).assign(y=[None if o is None else 'uvw'[o] for o in data.labels])
    df.index = df.index + 1000
    dls = TabularDataLoaders.from_df(df, procs=[FillMissing, Normalize], cont_names=list('abcdefgh'), y_names='y',
        y_block=CategoryBlock(), bs=16, valid_idx=list(range(data.n_train, len(df))))
    learn = tabular_learner(semi_dls(dls), layers=[16])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    joined = df.join(interp.to_df().set_index('item')[['label', 'certainty']])
    known = joined[:data.n_train].dropna(subset='y')
    assert len(known) == 9
    assert (known.y == known.label).all()
    assert set(joined.label.dropna()) == set('uvw')
    shown = interp.show([0, 4])
    assert shown.item.tolist() == [1000, 1004]
    assert interp.show(shown.index).equals(shown)
    values = df.loc[[1000, 1004], list('abcdefgh')]
    np.testing.assert_allclose(shown[list('abcdefgh')], values, atol=1e-3)  # as given, not normalized


def test_errors_say_what_is_missing():
    learn, data = fitted(truth=False)
    interp = LPInterpretation.from_learner(learn)
    for call in (interp.plot_accuracy, interp.plot_confusion_matrix, interp.show_errors):
        with pytest.raises(ValueError, match='pass truth='): call()
    assert LPInterpretation.from_learner(learn, truth=data.truth[:data.n_train]).errors() is not None
    without_graph = LPInterpretation.from_learner(fitted(labeler=NetworkPrediction())[0])
    for call in (without_graph.suggest, without_graph.label_issues):
        with pytest.raises(ValueError, match='have no graph'): call()


def test_unreached_items_have_no_class(tmp_path):
    x = torch.eye(2).repeat_interleave(20, 0)
    x[30:] = torch.tensor([-1., 0])
    y = torch.full((40,), -1)
    y[0], y[20] = 0, 1
    interp = LPInterpretation(propagate(x, y, k=5), vocab=['cat', 'dog'], truth=torch.arange(40)//20)
    read = pd.read_csv(interp.to_csv(tmp_path/'a.csv'))
    for df in (interp.to_df(), read, LPInterpretation.load(interp.save(tmp_path/'a.npz')).to_df()):
        assert df.label[:30].notna().all()
        assert df.label[30:].isna().all()
        assert (df.weight[30:] == 0).all()
    assert not set(range(30, 40)) & set(interp.errors().index)


def test_from_results_of_a_run(tmp_path):
    recipe = replace(RECIPES['digits'], stage1=1, stage2=2, width=8)
    lp, _ = run_experiment(methods=['lp', 'diffusion'], splits=[0], recipe=recipe, out=tmp_path, device='cpu')
    file = tmp_path/'digits.jsonl'
    for epoch, row in ((None, -1), (0, 0)):
        interp = LPInterpretation.from_results(file, 'lp', 0, epoch)
        assert interp.pseudo.accuracy(interp.truth) == lp['history'][row]['accuracy']
        assert [r['accuracy'] for r in interp.history] == [r['accuracy'] for r in lp['history']][:len(interp.history)]
    with file.open('a') as f: f.write(json.dumps(lp | dict(name='digits-40-seed0', labels=40)) + '\n')
    with pytest.raises(ValueError, match='several runs .* digits-40-seed0'): LPInterpretation.from_results(file, 'lp', 0)
    assert LPInterpretation.from_results(file, 'lp', 0, labels=20).pseudo.accuracy(interp.truth) == lp['history'][-1]['accuracy']
    with pytest.raises(ValueError, match='kept no pseudo-labels'): LPInterpretation.from_results(file, 'diffusion')
    with pytest.raises(ValueError, match=r'one of \[0, 1\].* got 9'): LPInterpretation.from_results(file, 'lp', 0, 9, labels=20)


def unwell(n=200):
    "Pseudo-labels for each kind of advice"
    g = torch.Generator().manual_seed(0)
    few = torch.where(torch.arange(n) < 10, torch.arange(n), -1)
    islands = torch.eye(4).repeat_interleave(n//4, 0)
    two = torch.full((n,), -1)
    two[0], two[n//4] = 0, 1
    x = torch.randn(n, 16, generator=g)
    return dict(certainty=propagate(x, few), residual=propagate(x, torch.where(torch.arange(n) < 100, torch.arange(n) % 4, -1), max_iter=2),
        reached=propagate(islands, two, k=5), **{'class': propagate(torch.ones(n, 16), few)})


@pytest.mark.parametrize('what,match', [('certainty', 'mean certainty.*below 0.05.*warmup='), ('class', 'class .* takes over: 100%'),
    ('residual', 'after 2 .*increase max_iter='), ('reached', 'no label reaches 100 of 198 unlabeled items')])
def test_advice(what, match): assert re.search(match, advice(unwell()[what])[what])


def test_no_advice_for_good_pseudo_labels(): assert advice(fitted()[0].lp_record.pseudo) == {}


class Collapse(Callback):
    "Gives all items the same features before each of the first epochs"
    order = -10
    def __init__(self, epochs): self.epochs = epochs
    def before_train(self):
        layer = self.learn.model[0]
        self.saved = layer.weight.detach().clone()
        if self.epoch < self.epochs: torch.nn.init.zeros_(layer.weight)
    def after_train(self):
        if self.epoch < self.epochs: self.learn.model[0].weight.data.copy_(self.saved)


@pytest.mark.parametrize('epochs,collapsed,warned', [(1, 1, 1), (4, 4, 1), (3, 1, 0)])
def test_one_warning_per_fit_and_none_for_a_single_epoch(epochs, collapsed, warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        blob_learner().fit(epochs, 1e-3, cbs=[LPCallback(), Collapse(collapsed)])
    assert len([o for o in seen if 'takes over' in str(o.message)]) == warned
