"Any dataset in a DataLoader of fastai or torch works; targets that are not one class per item are refused in one sentence."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.utils.data as td
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, GrandparentSplitter, IndexSplitter, RandomSplitter, get_files, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.core import TabularPandas
from fastai.torch_core import set_seed

from conftest import Spy, Stop, blob_learner, blob_model, flat_weights, item_numbers, quiet, same_run, state_of
from fastai_lp.interpret import LPInterpretation
from fastai_lp.learner.callback import LPCallback
from fastai_lp.learner.data import SemiCategoryBlock
from fastai_lp.learner.features import Extractor
from fastai_lp.learner.images import FolderLabel, SemiImageDataLoaders
from fastai_lp.learner.mean_teacher import MeanTeacherCallback
from fastai_lp.learner.resume import ResumeCallback
from fastai_lp.learner.streams import semi_dls

E = pytest.raises


class Plain:
    "A dataset as torch knows it: `dataset[i]`, `len(dataset)` and no more"
    def __init__(self, data, start, end): self.x, self.y = data.x[start:end], data.labels[start:end]
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[i], -100 if self.y[i] is None else self.y[i]


KINDS = dict(fastai=DataLoader, torch=td.DataLoader)


def plain_dls(data, kind, **kwargs):
    train, valid = Plain(data, 0, data.n_train), Plain(data, data.n_train, len(data.x))
    kwargs = dict(shuffle=True) | kwargs
    dls = DataLoaders(KINDS[kind](train, batch_size=16, **kwargs), KINDS[kind](valid, batch_size=16))
    dls.c = data.c
    return dls


def plain_learner(data, kind, dls=None, **kwargs):
    set_seed(0, reproducible=True)
    dls = dls or plain_dls(data, kind, **kwargs)
    return quiet(Learner(dls, blob_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy))


# A plain dataset

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('kwargs', [{}, dict(drop_last=True), dict(shuffle=False), dict(num_workers=2)], ids=str)
def test_plain_datasets(data, kind, kwargs):
    learn, spy = plain_learner(data, kind, **kwargs), Spy()
    train = learn.dls.train
    learn.fit(2, 1e-2, cbs=[LPCallback(warmup=1, truth=data.truth[:120]), spy])
    assert learn.dls.train is train
    assert len(spy.seen) == 2*(120//16 + (not kwargs.get('drop_last')))
    p = learn.lp_record.pseudo
    for x, target in spy.seen[len(spy.seen)//2:]:
        i = item_numbers(data, x)
        torch.testing.assert_close(target[range(len(i)), p.labels[i]], p.weights[i])
    assert learn.validate()[1] > 0


@pytest.mark.parametrize('kind', KINDS)
def test_a_plain_dataset_trains_like_any_other(data, kind):
    "With the same items in each batch"
    learn = plain_learner(data, kind, shuffle=False)
    learn.fit(2, 1e-2, cbs=LPCallback())
    other = blob_learner(data, two_stream=False)
    other.dls = DataLoaders(other.dls.train.new(shuffle=False, drop_last=False), other.dls.valid, device='cpu')
    other.dls.c, other.loss_func = 3, CrossEntropyLossFlat()
    set_seed(0, reproducible=True)
    other.model = blob_model()
    other.fit(2, 1e-2, cbs=LPCallback())
    assert torch.equal(learn.lp_record.pseudo.labels, other.lp_record.pseudo.labels)
    torch.testing.assert_close(flat_weights(learn), flat_weights(other))


@pytest.mark.parametrize('kind', KINDS)
def test_two_streams_of_a_plain_dataset(data, kind):
    dls = semi_dls(plain_dls(data, kind), labeled_bs=4)
    dls.c = 3
    learn, spy = plain_learner(data, kind, dls), Spy()
    learn.fit(2, 1e-2, cbs=[LPCallback(), MeanTeacherCallback(), spy])
    assert learn.dls is dls
    assert max(len(x) for x, _ in spy.seen) == 16


@pytest.mark.parametrize('kind', KINDS)
def test_features_figures_and_files_of_a_plain_dataset(data, kind, tmp_path):
    learn = plain_learner(data, kind)
    with E(KeyboardInterrupt): learn.fit(3, cbs=[LPCallback(), ResumeCallback(tmp_path/'r.pth'), Stop('after_batch', 2)])
    assert state_of(learn)['metrics'] == [(type(learn.metrics[0]), 'accuracy')]
    learn.fit(3, cbs=[LPCallback(), ResumeCallback(tmp_path/'r.pth')])
    whole = plain_learner(data, kind)
    whole.fit(3, cbs=[LPCallback(), ResumeCallback(tmp_path/'w.pth')])
    same_run(learn, whole)
    assert Extractor()(learn).feats.shape == (120, 16)
    interp = LPInterpretation.from_learner(learn)
    assert len(interp.to_df()) == 120
    assert len(interp.suggest(3)) == 3


class Stream(td.IterableDataset):
    def __iter__(self): yield from ((torch.zeros(8), 0) for _ in range(20))


def sampled(sampler): return lambda ds: td.DataLoader(ds, 16, sampler=sampler)


@pytest.mark.parametrize('make, match', [
    (sampled(td.WeightedRandomSampler([1.]*120, 120)), 'draws its items with WeightedRandomSampler'),
    (sampled(td.SubsetRandomSampler(range(50))), 'draws its items with SubsetRandomSampler'),
    (sampled(td.RandomSampler(range(120), replacement=True)), 'draws its items with RandomSampler'),
    (lambda ds: td.DataLoader(ds, batch_size=None), 'no batch size'),
    (lambda ds: DataLoader(ds, bs=None), 'no batch size'),
    (lambda ds: td.DataLoader(Stream(), 16), 'can only be iterated over'),
    (lambda ds: DataLoader(Stream(), bs=16), 'can only be iterated over'),
    (lambda ds: DataLoader([dict(x=1, y=0)]*20, bs=4), 'items of type dict'),
    (lambda ds: DataLoader([torch.zeros(8)]*20, bs=4), 'items of type Tensor'),
    (lambda ds: [1, 2], 'of type list')])
def test_data_loaders_without_numbered_items(data, make, match):
    dls = plain_dls(data, 'torch')
    learn = plain_learner(data, 'torch', dls)
    before, weights = state_of(blob_learner())['metrics'], flat_weights(learn)
    dls.loaders[0] = make(dls.train_ds)
    with E(ValueError, match=match): learn.fit(1, cbs=LPCallback())
    with E(ValueError, match=match): semi_dls(dls)
    assert torch.equal(flat_weights(learn), weights)
    assert [(type(m), m.name) for m in learn.metrics] == before
    assert not hasattr(learn, 'lp_record')


def test_truth_of_a_plain_dataset(data):
    learn = plain_learner(data, 'fastai')
    with E(ValueError, match='Plain has no items to look the truth up: pass a list'): learn.fit(1, cbs=LPCallback(truth=lambda o: 0))


# Targets other than one class per item

def column(f, missing=np.nan): return [f(i) if i < 20 or i >= 50 else missing for i in range(60)]


TABLE = pd.DataFrame(dict(x=range(60), label=column(lambda i: 'abc'[i % 3]), tags=column(lambda i: ['a', 'b'], []),
    two=['uv'[i % 2] for i in range(60)], number=column(lambda i: i/3)))


def known(name, missing): return lambda row: row[name] if row[name] == row[name] else missing


def block(*targets, get_y, **kwargs):
    return DataBlock(blocks=(TransformBlock, *targets), get_x=lambda row: torch.full((8,), float(row['x'])), get_y=get_y, n_inp=1,
        splitter=IndexSplitter(range(50, 60)), **kwargs)


SEMI = "use SemiCategoryBlock instead"
WRONG = dict(multi_label=(block(MultiCategoryBlock, get_y=ColReader('tags')), 'MultiCategory'),
    multi_label_missing=(block(MultiCategoryBlock, get_y=known('label', np.nan)), 'MultiCategory'),
    multi_label_encoded=(block(MultiCategoryBlock(True, ['a', 'b']), get_y=lambda row: [1, 0]), 'MultiCategory'),
    two_targets=(block(CategoryBlock, SemiCategoryBlock, get_y=[ColReader('two'), ColReader('label')]), '2 targets per item'),
    two_semi=(block(SemiCategoryBlock, SemiCategoryBlock, get_y=[ColReader('label')]*2), '2 targets per item'),
    regression=(block(RegressionBlock, get_y=ColReader('number')), 'RegressionBlock|numbers such as'),
    two_numbers=(block(RegressionBlock(n_out=2), get_y=lambda row: [1., 2.]), r'RegressionBlock|Tensor of shape \(2,\)'),
    no_target=(DataBlock((TransformBlock,), get_x=ColReader('x'), splitter=IndexSplitter(range(50, 60))), '0 targets per item'),
    nan=(block(CategoryBlock, get_y=ColReader('label')), SEMI), none=(block(CategoryBlock, get_y=known('label', None)), SEMI),
    empty=(block(CategoryBlock, get_y=known('label', '')), SEMI), na=(block(CategoryBlock(add_na=True), get_y=ColReader('label')), SEMI))
BEFORE_US = 'multi_label_missing', 'none'  # fastai itself fails in `dataloaders`


@pytest.mark.parametrize('name', WRONG)
def test_other_targets_are_refused(name):
    dblock, match = WRONG[name]
    with E(ValueError, match=match): dblock.semi_dataloaders(TABLE, bs=8, num_workers=0)
    if name in BEFORE_US: return
    dls = dblock.dataloaders(TABLE, bs=8, num_workers=0)
    with E(ValueError, match=match): semi_dls(dls)
    learn = quiet(Learner(dls, blob_model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    weights = flat_weights(learn)
    with E(ValueError, match=match): learn.fit(1, cbs=LPCallback())
    assert torch.equal(flat_weights(learn), weights)
    assert [m.name for m in learn.metrics] == ['accuracy']


def test_two_inputs_and_one_target():
    two = DataBlock(blocks=(TransformBlock, TransformBlock, SemiCategoryBlock), n_inp=2, splitter=IndexSplitter(range(50, 60)),
        getters=[ColReader('x'), ColReader('two'), ColReader('label')])
    assert two.semi_dataloaders(TABLE, bs=8, num_workers=0).n_inp == 2


@pytest.mark.parametrize('y, match', [(torch.rand(40), 'numbers such as'), (torch.eye(3)[torch.arange(40) % 3], r'shape \(40, 3\)'),
    (torch.arange(40)[:, None] % 3, r'shape \(40, 1\)')])
def test_other_targets_of_tensors(y, match):
    dls = DataLoaders.from_dsets(*[td.TensorDataset(torch.rand(40, 8), y)]*2, bs=8, num_workers=0, device='cpu')
    dls.c = 3
    with E(ValueError, match=f'one integer target per item.*{match}'): semi_dls(dls)
    learn = quiet(Learner(dls, blob_model(), loss_func=CrossEntropyLossFlat()))
    with E(ValueError, match=f'one integer target per item.*{match}'): learn.fit(1, cbs=LPCallback())


@pytest.mark.parametrize('y_names, y_block, match', [('number', RegressionBlock(), 'numbers such as'),
    (['label', 'two'], SemiCategoryBlock(), '2 target columns'), (['number', 'half'], RegressionBlock(2), '2 target columns')], ids=str)
def test_other_targets_of_tables(y_names, y_block, match):
    df = TABLE.drop(columns='tags').assign(x=range(60), number=TABLE.number.fillna(0.), half=.5)
    splits = list(range(50)), list(range(50, 60))
    with E(ValueError, match=match):
        semi_dls(TabularPandas(df, cont_names=['x'], y_names=y_names, y_block=y_block, splits=splits).dataloaders(8))


@pytest.mark.parametrize('kwargs, match', [(dict(label_col=['label', 'two']), '2 label columns'),
    (dict(label_delim=' '), 'label_delim is not'), (dict(y_block=RegressionBlock), 'y_block is not'),
    (dict(y_block=MultiCategoryBlock), 'y_block is not'), (dict(label_col='number'), 'numbers such as'),
    (dict(label_col='tags'), r"the label \['a', 'b'\]")], ids=str)
@pytest.mark.parametrize('valid', [{}, dict(valid_col='valid')], ids=str)
def test_other_targets_of_image_tables(kwargs, valid, match):
    df = TABLE.assign(valid=[i >= 50 for i in range(60)])
    with E(ValueError, match=match): SemiImageDataLoaders.from_df(df, **dict(label_col='label') | kwargs | valid)


def test_classes_that_are_numbers_with_fractions():
    stars = [i % 9/2 if i < 40 or i >= 50 else None for i in range(60)]
    one_each = [i + .5 if i < 5 else None for i in range(50)] + [.5]*10
    for y in (stars, one_each):
        dls = block(SemiCategoryBlock, get_y=ColReader('y')).semi_dataloaders(TABLE.assign(y=y), bs=8, num_workers=0)
        assert len(dls.vocab) == len({o for o in y if o is not None})


@pytest.fixture
def reviews(tmp_path):
    "The folders of IMDB"
    for part, n in (('train/pos', 6), ('train/neg', 6), ('test/pos', 3), ('test/neg', 3), ('unsup', 20)):
        (tmp_path/part).mkdir(parents=True)
        for i in range(n): (tmp_path/part/f'{i}.txt').write_text('a film')
    return tmp_path


def of_files(y_block, get_y, splitter):
    return DataBlock(blocks=(TransformBlock, y_block), get_items=get_files, get_x=lambda o: torch.zeros(8), get_y=get_y, splitter=splitter)


def test_unlabeled_files_that_the_splitter_leaves_out(reviews):
    grandparent = GrandparentSplitter(valid_name='test')
    cause = 'all 12 training items are labeled: the files of .*unsup are not among them. A splitter such as GrandparentSplitter'
    with E(ValueError, match=cause):
        of_files(SemiCategoryBlock, FolderLabel(reviews/'unsup'), grandparent).semi_dataloaders(reviews, bs=4, num_workers=0)
    dls = of_files(CategoryBlock, parent_label, grandparent).dataloaders(reviews, bs=4, num_workers=0)
    with E(ValueError, match=cause): semi_dls(dls)
    learn = quiet(Learner(dls, blob_model(c=2), loss_func=CrossEntropyLossFlat()))
    with E(ValueError, match=cause): learn.fit(1, cbs=LPCallback())


def test_a_folder_of_unlabeled_files_as_a_class(reviews):
    dls = of_files(CategoryBlock, parent_label, RandomSplitter(seed=0)).dataloaders(reviews, bs=4, num_workers=0)
    with E(ValueError, match="the folder 'unsup' counts as a class"): semi_dls(dls)


# Validation of unlabeled items

def test_validate_warns_of_unlabeled_items(data):
    learn = blob_learner(data)
    learn.fit(1, cbs=LPCallback())
    for dl, n in ((learn.dls.train.new(shuffle=False, drop_last=False), 120), (learn.dls.train, len(learn.dls.train)*16)):
        with pytest.warns(UserWarning, match=rf'\d+ of {n} items that were validated are unlabeled'): learn.validate(dl=dl)
    with pytest.warns(UserWarning, match='are unlabeled'): learn.validate(ds_idx=0)
    plain = plain_learner(data, 'torch')
    with pytest.warns(UserWarning, match='111 of 120 items'): plain.validate(dl=plain.dls.train)
    only = learn.dls.train.new(torch.utils.data.Subset(Plain(data, 9, 120), range(20)), shuffle=False, drop_last=False)
    with pytest.warns(UserWarning, match='20 of 20 items'): learn.validate(dl=only)


def test_validate_does_not_warn_of_other_targets(data):
    learn = blob_learner(data)
    expected = learn.validate()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert learn.validate() == expected
        learn.loss_func, learn.metrics = torch.nn.MSELoss(), []
        numbers = td.TensorDataset(torch.zeros(10, 8), -torch.ones(10, 3))
        learn.validate(dl=DataLoader(numbers, bs=5))
    assert [type(cb).__name__ for cb in learn.cbs] == [type(cb).__name__ for cb in blob_learner(data).cbs]
