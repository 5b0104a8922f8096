"LPInterpretation: its tables equal the record, for any Learner, from a file or a run; warnings about pseudo-labels that look wrong."
import json
import re
import warnings
from dataclasses import replace
from datetime import date
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import ColReader, IntToFloatTensor, ItemGetter, ToTensor
from fastai.learner import Learner, load_learner
from fastai.tabular.all import CategoryBlock, FillMissing, Normalize, TabularDataLoaders, TabularPandas, tabular_learner
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastcore.basics import noop
from PIL import Image
from torch.utils.data import TensorDataset

from conftest import Look, blob_learner, blob_model, blobs, quiet
from fastai_lp.experiments.datasets import digits_folder
from fastai_lp.experiments.models import small_convnet
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.runs import run_experiment
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategorize, SemiCategoryBlock
from fastai_lp.learner.images import SemiImageDataLoaders
from fastai_lp.learner.record import item_names
from fastai_lp.learner.splitting import LabeledOnlySplitter
from fastai_lp.learner.streams import semi_dls
from fastai_lp.plots import image_grid, plot_confusion_matrix
from fastai_lp.transductive.advice import advice
from fastai_lp.transductive.curation import familiarity, label_issues, margin, suggest
from fastai_lp.transductive.ensemble import Ensemble
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
    items, gain = suggest(p.W, p.labeled, margin(p.Z), 5)
    asked = interp.suggest(5)
    assert asked.index.tolist() == asked.item.tolist() == items.tolist()
    assert asked.gain.tolist() == gain.tolist()
    without_scores = LPInterpretation(replace(p, Z=None)).suggest(5)
    assert without_scores.index.tolist() == suggest(p.W, p.labeled, p.certainty, 5).items.tolist()
    p.labels[4] = (p.labels[4]+1) % 3
    issues, found = interp.label_issues(), label_issues(p.W, torch.where(p.labeled, p.labels, -1), 3)
    assert issues.index.tolist() == found.items.tolist()
    assert issues.index[0] == 4
    assert issues.suggested.iloc[0] == data.truth[4]


def test_suspected_junk_is_the_least_familiar():
    learn, _ = fitted()
    interp, p = LPInterpretation.from_learner(learn), learn.lp_record.pseudo
    f = familiarity(p.W, p.labeled)
    df = interp.suspected_junk(7)
    assert not p.labeled[df.index.to_numpy()].any()
    assert df.familiarity.tolist() == f[~p.labeled].sort().values[:7].tolist()
    assert len(interp.suspected_junk(10**6)) == (~p.labeled).sum()
    with pytest.raises(ValueError, match='m must be an integer of at least 1, got 0'): interp.suspected_junk(0)


def test_pseudo_labels_of_an_ensemble_can_be_saved(tmp_path):
    interp = LPInterpretation.from_learner(fitted(labeler=Ensemble())[0])
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    pd.testing.assert_frame_equal(back.to_df(), interp.to_df())
    assert back.history == interp.history


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


def test_texts_and_rows_are_shown_with_what_a_table_says_of_them():
    data = blobs(seed=1)
    y = torch.tensor([-1 if o is None else o for o in data.labels[:data.n_train]])
    pseudo, truth = propagate(data.x[:data.n_train], y, k=7), data.truth[:data.n_train]
    doubtful = (y >= 0).nonzero()[0].item()
    pseudo.labels[doubtful] = (pseudo.labels[doubtful]+1) % 3
    texts = [f'Item {i} ' + 'is rather long, '*6 + 'and that is all' for i in range(data.n_train)]
    table = pd.DataFrame(data.x[:data.n_train].numpy(), columns=list('abcdefgh')).assign(y='u')
    sources = dict(text=Datasets(texts, [[noop]]), abcdefgh=TabularPandas(table, cont_names=list('abcdefgh'), y_names='y'))
    for columns, ds in sources.items():
        interp = LPInterpretation(pseudo, truth=(truth+1) % 3, vocab=['u', 'v', 'w'], dl=SimpleNamespace(dataset=ds))
        columns = [columns] if columns == 'text' else list(columns)
        for found, words in ((interp.suggest(5), r'[uvw] \([01]\.\d\d\)'), (interp.label_issues(), 'u, or [vw]|[vw], or u'),
            (interp.suspected_junk(4), r'[uvw] \([01]'), (interp.errors(), '[uvw], taken for [uvw]')):
            shown = interp.show(found)
            assert shown.index.equals(found.index) and {'item', *columns} <= set(shown)
            assert shown['pseudo-label'].str.match(words).all()
        assert interp.show_errors(3).equals(interp.show(interp.errors()[:3]))
        assert columns != ['text'] or texts[found.index[0]] in shown._repr_html_()  # not shortened
    with pytest.raises(ValueError, match='must be a table of LPInterpretation'): interp.show(interp.suggest(5).reset_index(drop=True))


def test_errors_say_what_is_missing():
    learn, data = fitted(truth=False)
    interp = LPInterpretation.from_learner(learn)
    for call in (interp.plot_accuracy, interp.plot_confusion_matrix, interp.show_errors):
        with pytest.raises(ValueError, match='pass truth='): call()
    assert LPInterpretation.from_learner(learn, truth=data.truth[:data.n_train]).errors() is not None
    without_graph = LPInterpretation.from_learner(fitted(labeler=NetworkPrediction())[0])
    for call in (without_graph.suggest, without_graph.label_issues, without_graph.suspected_junk):
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


# The data of the Learner are replaced or changed after the fit

def reordered(data, order, vocab=(0, 1, 2)):
    "DataLoaders with the training items in another order, or some of them, and another vocab"
    n = len(data.labels)
    dsets = Datasets(range(n), [[Look(data.x)], [Look(data.labels), SemiCategorize(vocab=list(vocab), sort=False)]],
        splits=[list(order), list(range(data.n_train, n))])
    return dsets.semi_dataloaders(bs=16, num_workers=0, device='cpu')


def in_reverse(learn, data): learn.dls = reordered(data, range(data.n_train)[::-1])


def filtered(learn, data): learn.dls = reordered(data, range(100))


def with_another_vocab(learn, data): learn.dls = reordered(data, range(data.n_train), (2, 0, 1))


def with_more_classes(learn, data): learn.dls = reordered(data, range(data.n_train), range(5))


def train_replaced(learn, data): learn.dls.loaders[0] = reordered(data, range(data.n_train)[::-1]).train


def of_plain_tensors(learn, data):
    learn.dls = DataLoaders.from_dsets(TensorDataset(*(o[:120].flip(0) for o in (data.x, data.truth))), bs=16, device='cpu')


@pytest.mark.parametrize('replace_data', [in_reverse, filtered, with_another_vocab, with_more_classes, train_replaced,
    of_plain_tensors])
def test_pseudo_labels_keep_their_names_if_the_data_are_replaced(replace_data, tmp_path):
    learn, data = fitted()
    interp = LPInterpretation.from_learner(learn)
    before, shown = interp.to_df(), interp.show([3, 7])
    replace_data(learn, data)
    after = LPInterpretation.from_learner(learn)
    pd.testing.assert_frame_equal(after.to_df(), before)
    pd.testing.assert_frame_equal(after.show([3, 7]), shown)
    back = LPInterpretation.load(after.save(tmp_path/'a.npz'))
    pd.testing.assert_frame_equal(back.to_df(), before)


def test_an_interpretation_belongs_to_its_fit():
    data = blobs()
    learn = blob_learner(data, cbs=LPCallback())
    learn.fit(1, 1e-2)
    first = LPInterpretation.from_learner(learn)
    before = first.to_df()
    learn.dls = reordered(data, range(data.n_train)[::-1], (2, 0, 1))
    learn.fit(1, 1e-2)
    second = LPInterpretation.from_learner(learn).to_df()
    pd.testing.assert_frame_equal(first.to_df(), before)
    assert second.item.tolist() == list(range(data.n_train))[::-1]
    labeled = second[second.labeled]
    assert labeled.label.tolist() == data.truth[labeled.item.to_numpy()].tolist()


def test_a_failed_second_fit_keeps_the_names_of_the_first():
    data = blobs()
    learn = blob_learner(data, cbs=LPCallback())
    learn.fit(1, 1e-2)
    before = LPInterpretation.from_learner(learn).to_df()
    learn.dls = reordered(data, range(data.n_train)[::-1])
    learn.lp.warmup = 5
    learn.fit(1, 1e-2)  # only warm-up, no update
    pd.testing.assert_frame_equal(LPInterpretation.from_learner(learn).to_df(), before)


@pytest.mark.parametrize('replace_data', [in_reverse, filtered])
def test_a_file_is_not_shown_with_other_items(replace_data, tmp_path):
    learn, data = fitted()
    file = LPInterpretation.from_learner(learn).save(tmp_path/'a.npz')
    replace_data(learn, data)
    with pytest.raises(ValueError, match='does not have the 120 items'): LPInterpretation.load(file, learn.dls.train)


def named_images(folder, n=40, c=2, n_labeled=4):
    "Gray images, one brightness per class, and a DataFrame of their names and labels"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.new('RGB', (8, 8), (200*(i % c) + i % 7,)*3).save(folder/f'{i:02}.png')
    labels = ['uv'[i % c] if i < n_labeled*c else None for i in range(n)]
    return pd.DataFrame(dict(name=[f'{i:02}.png' for i in range(n)], label=labels))


def image_learner(df, folder, epochs=1):
    dls = SemiImageDataLoaders.from_df(df, folder, valid_pct=.25, seed=0, bs=8, num_workers=0, device='cpu')
    learn = quiet(Learner(dls, small_convnet(2, n_in=3, width=4)))
    learn.fit(epochs, 1e-2, cbs=LPCallback())
    return learn


def sorted_in_place(df): df.sort_index(ascending=False, inplace=True)


def renamed(df): df['name'] = df['name'].to_numpy()[::-1]


def some_dropped(df): df.drop(index=df.index[:3], inplace=True)


@pytest.mark.parametrize('change', [sorted_in_place, renamed, some_dropped])
def test_items_changed_in_place_keep_their_names_and_are_not_shown(change, tmp_path):
    learn = image_learner(named_images(tmp_path/'x'), tmp_path/'x')
    before = LPInterpretation.from_learner(learn).to_df()
    for tl in learn.dls.train_ds.tls: change(tl.items)
    interp = LPInterpretation.from_learner(learn)
    pd.testing.assert_frame_equal(interp.to_df(), before)
    with pytest.raises(ValueError, match='replaced or changed'): interp.show([0, 1])


def test_moved_images_are_shown(tmp_path):
    df = named_images(tmp_path/'old')
    learn = image_learner(df, tmp_path/'old')
    file = LPInterpretation.from_learner(learn).save(tmp_path/'a.npz')
    (tmp_path/'old').rename(tmp_path/'new')
    dls = SemiImageDataLoaders.from_df(df, tmp_path/'new', valid_pct=.25, seed=0, bs=8, num_workers=0, device='cpu')
    assert LPInterpretation.load(file, dls.train).show([0, 1]) is not None
    unnamed = learn.lp_record.pseudo.save(tmp_path/'b.npz')
    assert LPInterpretation.load(unnamed, dls.train).show([0, 1]) is not None


def test_a_loaded_learner_has_no_pseudo_labels(tmp_path):
    learn, _ = fitted()
    learn.path = tmp_path
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    with pytest.raises(ValueError, match='fit it with LPCallback first'): LPInterpretation.from_learner(loaded)


@pytest.mark.parametrize('idxs', [lambda df: (df.certainty < .5).tolist(), lambda df: df.certainty < .5,
    lambda df: df.head(3).assign(item=-1), lambda df: [-1], lambda df: [500], lambda df: df.head(2).label],
    ids=['mask', 'series', 'table', 'negative', 'large', 'text'])
def test_only_positions_are_shown(idxs):
    interp = LPInterpretation(fitted()[0].lp_record.pseudo, vocab='abc', dl=fitted()[0].dls.train)
    idxs = idxs(interp.to_df())
    with pytest.raises(ValueError, match='a table of LPInterpretation, or positions from 0 to 119, got .* pass df.index'): interp.show(idxs)


# Names that a file cannot hold as they are

class Color(Enum): RED, GREEN, BLUE = range(3)


class Shade(str, Enum): LIGHT, MID, DARK = 'light', 'mid', 'dark'


CLASSES = {  # chkstyle: ignore-node
    'dates': [date(2024, 1, i) for i in (1, 2, 3)], 'timestamps': list(pd.date_range('2024-01-01', periods=3)),
    'nanoseconds': list(np.array(['2024-01-01', '2024-01-02', '2024-01-03'], 'M8[ns]')),
    'timedeltas': [np.timedelta64(i, 'D') for i in range(3)], 'intervals': list(pd.cut(pd.Series(range(30)), 3).cat.categories),
    'paths': [Path('a'), Path('b'), Path('c')], 'decimals': [Decimal('0.1'), Decimal('0.2'), Decimal('0.3')], 'enums': list(Color),
    'shades': list(Shade), 'tuples': [('a', 1), ('b', 2), ('c', 3)], 'ragged': [('a',), ('b', 2), ('c', 3)],
    'mixed': [1, 'a', 2.5], 'none': [None, 'a', 'b'], 'large': [2**70, 2**71, 2**72],
    'words': ['a', 'b', 'c'], 'numbers': [5, 7, 9], 'floats': [.5, 1.5, 2.5], 'scalars': list(np.array([5, 7, 9], 'uint8')),
    'bools': [False, True, 2]}
AS_THEY_ARE = 'words', 'numbers', 'floats', 'scalars', 'bools'


def three_clusters():
    x = torch.eye(3).repeat_interleave(10, 0) + .01*torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    return propagate(x, torch.where(torch.arange(30) % 10 == 0, torch.arange(30)//10, -1), k=5)


@pytest.mark.parametrize('kind', CLASSES)
def test_a_saved_file_can_be_loaded_whatever_the_classes_are(kind, tmp_path):
    "Numbers and text come back as they are, anything else as its text"
    vocab = CLASSES[kind]
    interp = LPInterpretation(three_clusters(), vocab=vocab)
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    assert back.vocab == (vocab if kind in AS_THEY_ARE else [str(o) for o in vocab])
    assert back.to_df().label.tolist() == [back.vocab[i] for i in interp.pseudo.labels]
    if kind != 'none': assert interp.to_df().label.tolist() == [vocab[i] for i in interp.pseudo.labels]


@pytest.mark.parametrize('kind', [o for o in CLASSES if o not in ('bools', 'none', 'mixed', 'ragged')])
def test_a_saved_file_can_be_loaded_whatever_the_items_are(kind, tmp_path):
    items = CLASSES[kind]*10
    interp = LPInterpretation(three_clusters(), items=items)
    assert interp.to_df().item.nunique() == 3
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    assert [str(o) for o in back.items] == [str(o) for o in items]


@pytest.mark.parametrize('vocab', [[1, '1', 2], [date(2024, 1, 1), '2024-01-01', 'b'], [Path('a'), 'a', 'b'], ['a\0', 'a', 'b']],
    ids=['number', 'date', 'path', 'null'])
def test_classes_with_equal_text_are_refused_and_the_file_is_unchanged(vocab, tmp_path):
    file = LPInterpretation(three_clusters()).save(tmp_path/'a.npz')
    before = file.read_bytes()
    for name in ('a.npz', 'new.npz'):
        interp = LPInterpretation(three_clusters(), vocab=vocab)
        with pytest.raises(ValueError, match='two classes .* same text'): interp.save(tmp_path/name)
    assert file.read_bytes() == before
    assert [o.name for o in tmp_path.iterdir()] == ['a.npz']


def test_a_learner_with_classes_of_dates(tmp_path):
    data = blobs()
    days = [None if o is None else date(2024, 1, 1+o) for o in data.labels]
    dsets = Datasets(range(len(days)), [[Look(data.x)], [Look(days), SemiCategorize()]],
        splits=[list(range(data.n_train)), list(range(data.n_train, len(days)))])
    learn = quiet(Learner(dsets.semi_dataloaders(bs=16, num_workers=0, device='cpu'), blob_model()))
    learn.fit(1, 1e-2, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    back = LPInterpretation.load(interp.save(tmp_path/'a.npz'))
    assert back.to_df().label.tolist() == [str(o) for o in interp.to_df().label]


def test_a_history_with_scalars_of_numpy_and_torch_is_saved(tmp_path):
    history = [dict(epoch=np.int64(0), accuracy=np.float32(.5), recall=torch.tensor(.25), sec=1.)]
    back = LPInterpretation.load(LPInterpretation(three_clusters(), history).save(tmp_path/'a.npz'))
    assert back.history == [dict(epoch=0, accuracy=.5, recall=.25, sec=1.)]


@pytest.mark.parametrize('more, match', [(dict(names=np.array([Path('a')])), 'names .* Python objects'),
    (dict(note=None), 'note'), (dict(labels=np.zeros(3)), 'labels is a part of the pseudo-labels'),
    (dict(ragged=[[1], [1, 2]]), 'ragged')], ids=['paths', 'none', 'twice', 'ragged'])
def test_arrays_that_could_not_be_loaded_are_not_saved(more, match, tmp_path):
    file = three_clusters().save(tmp_path/'a.npz')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=match): three_clusters().save(file, **more)
    assert file.read_bytes() == before
    pseudo = replace(three_clusters(), graph=dict(recall=None))
    with pytest.raises(ValueError, match='graph_recall'): pseudo.save(tmp_path/'b.npz')
    assert not (tmp_path/'b.npz').exists()


# Nothing is left, and other values that say nothing

def all_labeled(): return replace(three_clusters(), labeled=torch.ones(30, dtype=torch.bool))


def none_labeled(): return replace(three_clusters(), labeled=torch.zeros(30, dtype=torch.bool))


clusters = torch.arange(30)//10


@pytest.mark.parametrize('method', ['suggest', 'plot_certainty', 'plot_confusion_matrix'])
def test_nothing_is_left_to_label(method):
    with pytest.raises(ValueError, match='nothing (is left to label|to plot).*all 30 items are labeled'):
        getattr(LPInterpretation(all_labeled(), truth=clusters), method)()
    assert not plt.get_fignums()


@pytest.mark.parametrize('method', ['plot_certainty', 'plot_confusion_matrix'])
def test_no_true_class_is_known(method):
    with pytest.raises(ValueError, match='true class is known of no unlabeled item'):
        getattr(LPInterpretation(three_clusters(), truth=-torch.ones(30, dtype=torch.long)), method)()


def test_no_label_is_given():
    with pytest.raises(ValueError, match='no item is labeled'): LPInterpretation(none_labeled()).label_issues()
    assert len(LPInterpretation(none_labeled()).suggest(30)) == 30


def test_no_pseudo_label_is_wrong():
    interp = LPInterpretation(three_clusters(), truth=clusters)
    assert len(interp.errors()) == 0
    with pytest.raises(ValueError, match='no pseudo-label .* is wrong'): interp.show_errors()


@pytest.mark.parametrize('n', [0, -1, 2.5, '3'])
def test_the_number_of_errors_shown_is_checked(n):
    with pytest.raises(ValueError, match='n must be an integer of at least 1'):
        LPInterpretation(three_clusters(), truth=(clusters+1) % 3).show_errors(n)


@pytest.mark.parametrize('history, lines', [([dict(epoch=0, accuracy=.5, network_accuracy=None)], 1),
    ([dict(epoch=0, accuracy=.5)], 1), ([dict(epoch=0)], 0), ([dict(epoch=0, accuracy=float('nan'))], 0), ([], 0)])
def test_accuracies_that_are_unknown_are_not_plotted(history, lines):
    interp = LPInterpretation(three_clusters(), history)
    if lines:
        assert len(interp.plot_accuracy().lines) == lines
        return
    with pytest.raises(ValueError, match='the accuracy is unknown'): interp.plot_accuracy()


def test_figures_of_images_need_a_title_for_each():
    for images, titles in (([], []), ([torch.rand(3, 8, 8)], ['a', 'b'])):
        with pytest.raises(ValueError, match='no images|a title for each of 1'): image_grid(images, titles)
    with pytest.raises(ValueError, match='vocab must have 3'): plot_confusion_matrix(three_clusters(), clusters, 'ab')


@pytest.mark.parametrize('vocab', [['Ba$$in', 'b', 'c'], ['$5 to $10', 'over $10', '$'], ['$x_$', '%', '_']], ids=str)
def test_dollar_signs_in_class_names_are_drawn(vocab, tmp_path):
    plot_confusion_matrix(three_clusters(), clusters, vocab).figure.savefig(tmp_path/'a.png')
    image_grid([torch.rand(3, 8, 8)]*3, vocab).savefig(tmp_path/'b.png')


# True classes

@pytest.mark.parametrize('truth, match', [('label', r"truth=lambda row: row\['label'\]"), (b'abc', 'the string'),
    (3, 'truth is int'), ([[0]]*30, 'not in the vocab'), ([.5]*30, 'contains 0.5'), ([3]*30, 'class 3, expected 0 to 2'),
    (['z']*30, "class 'z'"), (pd.DataFrame(dict(y=range(30))), 'truth is DataFrame')])
def test_truth_that_is_not_a_class_per_item(truth, match):
    with pytest.raises(ValueError, match=match): LPInterpretation(three_clusters(), truth=truth, vocab='abc')


@pytest.mark.parametrize('name', ['label', 'abc'*40])
@pytest.mark.parametrize('two_stream', [True, False])
def test_truth_is_not_read_letter_by_letter(name, two_stream):
    learn = blob_learner(two_stream=two_stream, cbs=LPCallback(truth=name))
    with pytest.raises(ValueError, match=f"the string '{name}'"): learn.fit(1)
    with pytest.raises(ValueError, match=f"the string '{name}'"): LPInterpretation.from_learner(fitted()[0], truth=name)


@pytest.mark.parametrize('kind', ['words', 'dates', 'tuples', 'paths'])
def test_truth_is_read_by_name(kind):
    vocab = CLASSES[kind]
    truth = [None if i == 5 else vocab[o] for i, o in enumerate(clusters)]
    interp = LPInterpretation(three_clusters(), truth=truth, vocab=vocab)
    assert interp.truth.tolist() == [-1 if i == 5 else o for i, o in enumerate(clusters.tolist())]


# What an item is called

def image_data(folder, kind):
    df = named_images(folder)
    kwargs = dict(bs=8, num_workers=0, device='cpu')
    files = [folder/o for o in df.name]
    if kind == 'from_df': return SemiImageDataLoaders.from_df(df, folder, valid_pct=.25, **kwargs)
    if kind == 'index': return SemiImageDataLoaders.from_df(df.set_index(df.index+1000), folder, valid_pct=.25, **kwargs)
    if kind == 'suffix':
        df['name'] = df['name'].str[:2]
        return SemiImageDataLoaders.from_df(df, folder.parent, folder='x', suff='.png', valid_pct=.25, **kwargs)
    if kind == 'from_lists': return SemiImageDataLoaders.from_lists(folder, df.name, df.label, valid_pct=.25, **kwargs)
    if kind == 'from_csv':
        df.to_csv(folder/'labels.csv', index=False)
        return SemiImageDataLoaders.from_csv(folder, valid_pct=.25, **kwargs)
    splits = LabeledOnlySplitter('label', .25)(df)
    if kind == 'tuples':
        first, second = [ItemGetter(0), PILImage.create], [ItemGetter(1), SemiCategorize()]
        dsets = Datasets(list(zip(files, df.label)), [first, second], splits=splits)
        return dsets.semi_dataloaders(after_item=[ToTensor], after_batch=[IntToFloatTensor], **kwargs)
    get_x, get_y = lambda r: folder/r['name'], ColReader('label')
    block = DataBlock((ImageBlock, SemiCategoryBlock), get_x=get_x, get_y=get_y, splitter=lambda o: splits)
    return block.semi_dataloaders(df, **kwargs)


@pytest.mark.parametrize('kind', ['from_df', 'index', 'suffix', 'from_lists', 'from_csv', 'tuples', 'block'])
def test_an_image_is_named_by_its_path(kind, tmp_path):
    learn = quiet(Learner(image_data(tmp_path/'x', kind), small_convnet(2, n_in=3, width=4)))
    learn.fit(1, 1e-2, cbs=LPCallback())
    interp = LPInterpretation.from_learner(learn)
    read = pd.read_csv(interp.to_csv(tmp_path/'a.csv'))
    items = [Path(o) for df in (read, interp.suggest(5)) for o in df.item]
    assert all(o.is_file() and o.parent == tmp_path/'x' for o in items)
    shown = interp.show([3]).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(Image.open(read.item[3]).convert('RGB')))


def named_items(items, first=None):
    dsets = Datasets(items, [[first or noop], [lambda o: 0]])
    return None if (found := item_names(SimpleNamespace(dataset=dsets))) is None else found.tolist()


def test_other_items_are_named_by_text_index_or_position():
    texts = ['a good film', 'a bad one', 'so/so', 'fine']
    table = pd.DataFrame(dict(text=texts))
    assert named_items(texts) == texts
    assert named_items(table, ColReader('text')) == [0, 1, 2, 3]
    assert named_items(table.set_index(pd.Index(list('wxyz')))) == list('wxyz')
    pairs = pd.MultiIndex.from_product([[1, 2], list('ab')])
    assert named_items(table.set_index(pairs)) == ["(1, 'a')", "(1, 'b')", "(2, 'a')", "(2, 'b')"]
    assert named_items(table.set_index(pd.Index([7, 8, 9, 10], dtype='Int64'))) == [7, 8, 9, 10]
    assert named_items(table.set_index(pd.Index([7, 8, 9, None], dtype='Int64')))[:3] == ['7', '8', '9']
    assert named_items([(1, 2), (3, 4), (5, 6), (7, 8)]) is None
    assert named_items([3, 1, 2, 0]) == [3, 1, 2, 0]
