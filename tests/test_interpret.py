"LPInterpretation: what it says is what the record holds, for any Learner, from a file, from a run; advice where something looks wrong."
import json
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
from fastai_lp.learner.callback import LPCallback
from fastai_lp.transductive.curation import label_issues, suggest
from fastai_lp.learner.data import semi_dls
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.experiments.datasets import digits_folder
from fastai_lp.experiments.commands import run_experiment
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.interpret import LPInterpretation, plot_certainty, plot_toy, toy
from fastai_lp.transductive.labelers import NetworkPrediction
from fastai_lp.experiments.models import small_convnet
from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.propagate import propagate
from fastai_lp.transductive.pseudo import PseudoLabels


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def fitted(path='.', truth=True, epochs=3, **kwargs):
    data = blobs()
    learn = blob_learner(data, path=path)
    learn.fit(epochs, 1e-2, cbs=LPCallback(truth=data.truth[:data.n_train] if truth else None, **kwargs))
    return learn, data


def test_tables_say_what_the_record_holds():
    learn, data = fitted()
    interp, p = LPInterpretation.from_learner(learn), learn.lp_record.pseudo
    df = interp.to_df()
    assert df.item.tolist() == list(range(data.n_train)) and df.label.tolist() == p.labels.tolist() and df.truth.tolist() == data.truth[:data.n_train].tolist()
    np.testing.assert_array_equal(df[['certainty', 'weight']], torch.stack([p.certainty, p.weights], 1))
    assert df.labeled.sum() == 9 and df.reached.all() and interp.history == learn.lp_record.history
    items, gain = suggest(p.W, p.labeled, p.certainty, 5)
    asked = interp.suggest(5)
    assert asked.index.tolist() == asked.item.tolist() == items.tolist() and not p.labeled[items].any() and asked.gain.tolist() == gain.tolist()
    p.labels[4] = (p.labels[4]+1) % 3
    issues, found = interp.label_issues(), label_issues(p.W, torch.where(p.labeled, p.labels, -1), 3)
    assert issues.index.tolist() == found.items.tolist() and issues.index[0] == 4 and issues.suggested.iloc[0] == data.truth[4]


def test_errors_are_the_most_certain_first():
    interp = LPInterpretation.from_learner(fitted()[0])
    wrong = [5, 70, 71]
    truth = interp.pseudo.labels.clone()
    truth[wrong] = (truth[wrong]+1) % 3
    interp = LPInterpretation(interp.pseudo, truth=truth, vocab='abc')
    df = interp.errors()
    expected = sorted((i for i in wrong if not interp.pseudo.labeled[i]), key=lambda i: -interp.pseudo.certainty[i])
    assert df.index.tolist() == expected
    assert [(r.label, r.truth) for r in df.itertuples()] == [('abc'[interp.pseudo.labels[i]], 'abc'[truth[i]]) for i in expected]


def test_figures_count_what_there_is():
    learn, data = fitted()
    interp = LPInterpretation.from_learner(learn)
    unlabeled = int((~interp.pseudo.labeled).sum())
    assert sum(o.get_height() for o in interp.plot_certainty(bins=10).patches) == unlabeled          # stacked: the upper ones' heights add
    assert sum(o.get_height() for o in plot_certainty(interp.pseudo, bins=10).patches) == unlabeled  # without the truth: one color
    lines = interp.plot_accuracy().lines
    np.testing.assert_allclose(lines[0].get_ydata(), [100*r['accuracy'] for r in interp.history])
    np.testing.assert_allclose(lines[1].get_ydata(), [100*r['network_accuracy'] for r in interp.history])
    assert sum(int(o.get_text()) for o in interp.plot_confusion_matrix().texts) == unlabeled
    x, truth, p = toy(labels=3)
    points, seeds = plot_toy(x, p.labels, p.labeled, p.certainty).collections
    assert len(points.get_offsets()) == 294 and len(seeds.get_offsets()) == 6


def test_saved_and_loaded_without_pickle(tmp_path):
    learn, _ = fitted()
    interp = LPInterpretation.from_learner(learn)
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    pd.testing.assert_frame_equal(back.to_df(), interp.to_df())
    pd.testing.assert_frame_equal(back.suggest(7), interp.suggest(7))
    pd.testing.assert_frame_equal(back.label_issues(), interp.label_issues())
    assert back.history == interp.history and not list(tmp_path.glob('*.tmp'))
    with np.load(tmp_path/'a.npz', allow_pickle=False) as f: assert all(f[k].dtype != object for k in f)
    alone = LPInterpretation.load(interp.pseudo.save(tmp_path/'b.npz'))
    assert alone.truth is None and alone.suggest(7).index.tolist() == interp.suggest(7).index.tolist()
    assert torch.equal(PseudoLabels.load(tmp_path/'a.npz').labels, interp.pseudo.labels)


def test_images_by_their_path_with_class_names(tmp_path):
    path = digits_folder(tmp_path, labels=20)
    dls = SemiImageDataLoaders.from_folder(path, bs=64, num_workers=0, device='cpu')
    learn = blob_learner(path=tmp_path)
    learn.dls, learn.model = dls, small_convnet(10, n_in=3, width=8)
    with learn.no_bar(): learn.fit(1, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    df = interp.to_df()
    assert df.item.tolist() == [str(o) for o in dls.train_ds.items] and set(df.label) <= set('0123456789') and 'truth' not in df
    read = pd.read_csv(interp.to_csv(tmp_path/'labels.csv'), dtype=dict(label=str))
    assert read.item.tolist() == df.item.tolist() and read.label.tolist() == df.label.tolist()
    first = interp.show([3, 5, 8]).axes[0]
    assert first.get_title() == f'{df.label[3]} ({df.certainty[3]:.2f})'
    np.testing.assert_array_equal(np.asarray(first.images[0].get_array()), np.asarray(Image.open(df.item[3]).convert('RGB')))
    with pytest.raises(ValueError, match='pass truth='): interp.show_errors()
    with pytest.raises(ValueError, match='no item to show'): interp.show([])


def test_rows_of_a_table_join_by_their_index():
    data = blobs(seed=1)
    df = pd.DataFrame(data.x.numpy(), columns=list('abcdefgh')).assign(y=[None if o is None else 'uvw'[o] for o in data.labels])
    df.index = df.index + 1000
    dls = TabularDataLoaders.from_df(df, procs=[FillMissing, Normalize], cont_names=list('abcdefgh'), y_names='y', y_block=CategoryBlock(), bs=16,
        valid_idx=list(range(data.n_train, len(df))))
    learn = tabular_learner(semi_dls(dls), layers=[16])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    joined = df.join(interp.to_df().set_index('item')[['label', 'certainty']])
    known = joined[:data.n_train].dropna(subset='y')
    assert len(known) == 9 and (known.y == known.label).all() and set(joined.label.dropna()) == set('uvw')
    shown = interp.show([0, 4])
    assert shown.item.tolist() == interp.to_df().item[[0, 4]].tolist() == [1000, 1004] and interp.show(shown.index).equals(shown)
    np.testing.assert_allclose(shown[list('abcdefgh')], df.loc[[1000, 1004], list('abcdefgh')], atol=1e-3)   # as they came, not normalised


def test_what_is_not_there_is_said():
    learn, data = fitted(truth=False)
    interp = LPInterpretation.from_learner(learn)
    for call in (interp.plot_accuracy, interp.plot_confusion_matrix, interp.errors):
        with pytest.raises(ValueError, match='pass truth='): call()
    assert LPInterpretation.from_learner(learn, truth=data.truth[:data.n_train]).errors() is not None
    with pytest.raises(ValueError, match='no pseudo-labels'): LPInterpretation.from_learner(blob_learner())
    with pytest.raises(ValueError, match='3 entries in items, pseudo-labels of 120 items'): LPInterpretation(interp.pseudo, items=[1, 2, 3])
    without = LPInterpretation.from_learner(fitted(labeler=NetworkPrediction())[0])
    for call in (without.suggest, without.label_issues):
        with pytest.raises(ValueError, match='without a graph'): call()


def test_unreached_items_have_no_class(tmp_path):
    x = torch.eye(2).repeat_interleave(20, 0)
    x[30:] = torch.tensor([-1., 0])                      # like no other
    y = torch.full((40,), -1)
    y[0], y[20] = 0, 1
    interp = LPInterpretation(propagate(x, y, k=5), vocab=['cat', 'dog'], truth=torch.arange(40)//20)
    df = interp.to_df()
    assert df.label[30:].isna().all() and not df.reached[30:].any() and df.label[:30].notna().all()
    read = pd.read_csv(interp.to_csv(tmp_path/'a.csv'))
    assert read.label[30:].isna().all() and (read.weight[30:] == 0).all()
    assert not set(range(30, 40)) & set(interp.errors().index)
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    assert back.to_df().label[30:].isna().all()


def test_from_results_of_a_run(tmp_path):
    recipe = replace(RECIPES['digits'], stage1=1, stage2=3, width=8)
    runs = run_experiment(methods=['network', 'lp', 'diffusion'], splits=[0], recipe=recipe, out=tmp_path, device='cpu')
    file = tmp_path/'digits.jsonl'
    for run in runs[:2]:
        interp = LPInterpretation.from_results(file, run['method'], 0)
        assert interp.pseudo.accuracy(interp.truth) == run['history'][-1]['accuracy'] and [r['accuracy'] for r in interp.history] == [r['accuracy'] for r in run['history']]
        first = LPInterpretation.from_results(file, run['method'], epoch=0)
        assert first.pseudo.accuracy(first.truth) == run['history'][0]['accuracy'] and len(first.history) == 1
    both = tmp_path/'both.jsonl'
    both.write_text(file.read_text() + ''.join(json.dumps(r | dict(name='digits-40-seed0', labels=40)) + '\n' for r in runs))
    with pytest.raises(ValueError, match='several runs .* digits-40-seed0'): LPInterpretation.from_results(both, 'lp', 0)
    assert LPInterpretation.from_results(both, 'lp', 0, labels=20).pseudo.accuracy(interp.truth) == interp.pseudo.accuracy(interp.truth)
    for args, said in ((('lp', 7), "no run of 'lp' with seed 7"), (('diffusion', 0), "'diffusion' .* has no pseudo-labels"), (('lp', 0, 9), 'kept the pseudo-labels of epochs .0, 1, 2., not those of 9')):
        with pytest.raises(ValueError, match=said): LPInterpretation.from_results(file, *args)


def unwell(n=200):
    "One set of pseudo-labels for each thing that can look wrong"
    g = torch.Generator().manual_seed(0)
    few = torch.where(torch.arange(n) < 10, torch.arange(n), -1)
    islands = torch.eye(4).repeat_interleave(n//4, 0)
    two = torch.full((n,), -1)
    two[0], two[n//4] = 0, 1
    x = torch.randn(n, 16, generator=g)
    return dict(certainty=propagate(x, few), residual=propagate(x, torch.where(torch.arange(n) < 100, torch.arange(n) % 4, -1), max_iter=2),
        reached=propagate(islands, two, k=5), **{'class': propagate(torch.ones(n, 16), few)})


@pytest.mark.parametrize('what,match', [('certainty', 'is next to nothing.*warmup='), ('class', 'class .* takes over: 100%'), ('residual', 'after 2 .*Raise max_iter='),
    ('reached', 'no label reaches 100 of 198 unlabeled items')])
def test_advice_names_what_looks_wrong(what, match):
    import re
    found = advice(unwell()[what])
    assert re.search(match, found[what])


def test_advice_is_silent_where_all_is_well():
    learn, _ = fitted()
    assert advice(learn.lp_record.pseudo) == {}


class Constant(Callback):
    "Makes all descriptors alike, as after a collapse"
    def before_fit(self): torch.nn.init.zeros_(self.learn.model[0].weight)
    before_train = before_fit
    order = -10


@pytest.mark.parametrize('epochs,warned', [(1, 1), (4, 1)])
def test_one_warning_per_fit(epochs, warned):
    learn = blob_learner()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(epochs, 0., cbs=[LPCallback(), Constant()])
    assert len([o for o in seen if 'takes over' in str(o.message)]) == warned


def test_no_warning_for_a_single_bad_epoch():
    class Once(Constant):
        def before_train(self):
            if self.epoch == 0: self.saved = self.learn.model[0].weight.detach().clone(); torch.nn.init.zeros_(self.learn.model[0].weight)
        def after_train(self):
            if self.epoch == 0: self.learn.model[0].weight.data.copy_(self.saved)
        def before_fit(self): pass
    learn = blob_learner()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(3, 1e-3, cbs=[LPCallback(), Once()])
    assert not [o for o in seen if 'LPCallback' in str(o.message)]
