"The paper's tables and figures from made-up runs: what is averaged, named, kept apart, and missing."
import json
import re
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from fastai_lp.experiments.datasets import digits
from fastai_lp.experiments.figures import Lacking, figure4, figure5, figure6, figure7, lp_figures
from fastai_lp.experiments.flow import figure2
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.report import PAPER, as_paper, lp_tables, read_runs, settings, tables
from fastai_lp.experiments.results import COLORS, row_name
from fastai_lp.experiments.toy import figure1, figure3, plot_toy, toy
from fastai_lp.interpret import LPInterpretation
from fastai_lp.transductive.pseudo import PseudoLabels


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def fake(method='lp', seed=10, error=.3, labels=500, dataset='cifar10', kind='split', **kwargs):
    "A made-up line of `lp_train`; other arguments are fields of the line, or else settings of the recipe"
    full, fields = dict(digits=1347).get(dataset, 50000), dict(data=None, n_test=None, history=[], kept=[])
    fields |= {k: kwargs.pop(k) for k in ('data', 'n_test', 'history', 'kept', 'items') if k in kwargs}
    if teacher := kwargs.pop('teacher', None): fields |= dict(teacher_error_rate=teacher, teacher_top5_error=teacher/10)
    n_train = None if fields.setdefault('items', full) == full else fields['items']
    name = f"{dataset}{f'_{n_train}' if n_train else ''}-{labels}-{kind}{seed}"
    recipe = asdict(replace(RECIPES[dataset], **kwargs).of(method))
    return fields | dict(dataset=dataset, name=name, method=method, seed=seed, labels=labels, n_train=n_train, recipe=recipe,
        environment={}, splits='splits.npz' if kind == 'split' else None, error_rate=error, top5_error=error/2, stages=[], seconds={})


def digits_run(method='lp', seed=0, error=.2, labels=20, **kwargs): return fake(method, seed, error, labels, 'digits', 'seed', **kwargs)


def write(folder, *runs):
    for dataset in {r['dataset'] for r in runs}:
        (folder/f'{dataset}.jsonl').write_text('\n'.join(json.dumps(r) for r in runs if r['dataset'] == dataset) + '\n')
    return read_runs(folder)


def sections(text):
    "{title: (rows of cells, notes)}"
    out = {}
    for part in re.split(r'^### ', text, flags=re.M)[1:]:
        lines = part.splitlines()
        rows = [[o.strip() for o in line.split('|')[1:-1]] for line in lines if line.startswith('|')]
        out[lines[0]] = rows[2:], [o for o in lines if o.startswith('- [')]
    return out


def table(text, start): return next(v for k, v in sections(text).items() if k.startswith(start))


# Tables

def test_paper_numbers():
    text = tables([])
    assert PAPER['cifar10', 'error_rate', 4000]['mt+lp'] == (10.61, .28)
    rows = table(text, 'Table 1')[0]
    assert [r[-1] for r in rows] == ['36.53 ± 1.42', '36.17 ± 1.98', '33.32 ± 1.53', '32.40 ± 1.80', '35.20 ± 2.23', '35.17 ± 2.46']
    assert [r[1:3] for r in rows] == [['', ''], ['', '✓'], ['✓', ''], ['✓', '✓'], ['✓', '✓'], ['✓', '✓']]
    rows = table(text, 'Table 2')[0]
    assert rows[1] == ['network prediction', '–', '35.17 ± 2.46', '–', '23.79 ± 1.31', '–', '16.64 ± 0.48', '–', '13.21 ± 0.61']
    rows = table(text, 'Table 3')[0]
    assert rows[1][2::2] == ['46.20 ± 0.76', '38.43 ± 1.88', '70.29 ± 0.81', '57.58 ± 1.47', '47.58 ± 0.94', '36.14 ± 2.19']
    assert len(sections(text)) == 3


def test_mean_and_standard_deviation_and_names_of_the_runs(tmp_path):
    errors = (10, .30), (11, .31), (12, .35), (15, .32)
    runs = write(tmp_path, *(fake(seed=s, error=e) for s, e in errors), fake('supervised', 10, .5, 1000))
    rows, notes = table(tables(runs), 'Table 2')
    assert rows[2][1:3] == [f'32.00 ± {np.std([30, 31, 35, 32], ddof=1):.2f} (4) [2]', '32.40 ± 1.80']
    assert rows[0][3:5] == ['50.00 (1) [1]', '40.03 ± 1.11']
    assert notes == ['- [1] cifar10.jsonl, supervised: cifar10-1000-split10',
        '- [2] cifar10.jsonl, lp: cifar10-500-split10 … split12, cifar10-500-split15']
    assert table(tables(runs), 'Table 1')[0][3][3] == rows[2][1].replace('[2]', '[1]')
    assert {c for r in table(tables(runs), 'Table 3')[0] for c in r[1::2]} == {'–'}


def test_ablation_rows(tmp_path):
    "`supervised` has no ω to switch off"
    weights = (False, False), (False, True), (True, False)
    runs = [fake(error=.51+i/100, omega=omega, zeta=zeta) for i, (omega, zeta) in enumerate(weights)]
    runs += [fake(method, error=error) for method, error in (('lp', .54), ('gtg', .55), ('network', .56))]
    runs = write(tmp_path, *runs, fake('network', 11, .99, zeta=False), fake('supervised', error=.98, omega=False))
    text = tables(runs)
    assert [r[3][:5] for r in table(text, 'Table 1')[0]] == ['51.00', '52.00', '53.00', '54.00', '55.00', '56.00']
    assert [r[1][:5] for r in table(text, 'Table 2')[0][:3]] == ['98.00', '56.00', '54.00']
    assert [r[:2] for r in table(text, 'CIFAR-10: 50,000')[0]] == [['network prediction, ζ = 1', '99.00 (1) [1]']]


@pytest.mark.parametrize('changes, told', [(dict(items=2000), '2,000 training images'), (dict(stage2=20), '180 + 20 epochs'),
    (dict(network='small'), 'network small'), (dict(n_test=1000), '1,000 test images'), (dict(lr=.1), 'lr 0.1'),
    (dict(labels=250), '250 labels')], ids=str)
def test_other_experiments_are_not_compared_with_the_paper(tmp_path, changes, told):
    runs = write(tmp_path, *(fake(m, s, .77, **changes) for m in ('supervised', 'lp') for s in (10, 11)))
    text = tables(runs)
    *paper, other = sections(text).values()
    assert len(paper) == 3
    assert '77.00' not in str(paper)
    assert str(other).count('77.00 ± 0.00 (2)') == 2
    assert told in text.partition('## Other experiments')[2]
    assert not re.search(r'\bpaper\b', text.partition('## Other experiments')[2])


def test_digits_have_their_own_table(tmp_path):
    methods = 'diffusion', 'lp', 'supervised', 'strong'
    runs = write(tmp_path, *(digits_run(m, s, .1) for m in methods for s in (0, 1, 2)), digits_run(omega=False))
    rows, notes = table(tables(runs), 'Digits: 1,347 training images, network small, 5 + 15 epochs')
    assert [r[0] for r in rows] == ['fully supervised', 'diffusion', 'diffusion, ω = 1', 'strong preset', 'diffusion, no network']
    assert rows[2][1] == '20.00 (1) [3]'
    assert notes[0] == '- [1] digits.jsonl, supervised: digits-20-seed0 … seed2'
    assert not any(map(as_paper, runs))


def test_the_teacher_counts_and_the_student_is_mentioned(tmp_path):
    both = 'cifar10', 'mini_imagenet'
    runs = write(tmp_path, *(fake('mt', s, .6, 4000, d, teacher=.4+.02*s) for s in (0, 1) for d in both))
    rows, notes = table(tables(runs), 'Table 2')
    assert rows[3][7] == '41.00 ± 1.41 (2) [1]'
    assert notes == ['- [1] cifar10.jsonl, mt: cifar10-4000-split0 … split1; student 60.00 ± 0.00']
    rows, notes = table(tables(runs), 'Table 3')
    assert (rows[2][5], rows[2][9]) == ('41.00 ± 1.41 (2) [1]', '4.10 ± 0.14 (2) [2]')
    assert 'student 30.00 ± 0.00' in notes[1]


def test_different_settings_are_not_averaged(tmp_path):
    same = fake(error=.3), fake(seed=11, error=.3), fake(seed=14, error=.3, n_test=10000)
    others = fake(seed=12, error=.5, bf16=True), fake(seed=13, error=.4, data='/there/a.npz'), fake(kind='seed', error=.2)
    rows, notes = table(tables(write(tmp_path, *same, *others)), 'Table 2')
    assert rows[2][1] == '30.00 ± 0.00 (3) [1] / 50.00 (1) [2] / 40.00 (1) [3] / 20.00 (1) [4]'
    ends = 'split12; bf16 True', 'split13; images from a.npz', "seed10; other labels than the authors'"
    for note, end in zip(notes[1:], ends, strict=True): assert note.endswith(end)


def test_trials_with_different_settings_are_not_averaged(tmp_path):
    runs = write(tmp_path, fake(items=2000, error=.3), fake(items=2000, seed=11, error=.5, lr=.1))
    assert table(tables(runs), 'CIFAR-10: 2,000')[0][0][1] == '30.00 (1) [1] / 50.00 (1) [2]'
    assert [settings(r) for r in runs] == [{}, {'lr': .1}]


# Reading

def test_a_later_line_of_the_same_run_counts(tmp_path):
    same = fake('supervised', error=.6), fake('supervised', error=.5, omega=False, k=20)
    runs = write(tmp_path, fake(error=.3), fake(error=.4), *same)
    assert [(row_name(r), r['error_rate']) for r in runs] == [('lp', .4), ('supervised', .5)]


@pytest.mark.parametrize('line', ['{"dataset": "cifar10", ', '[]', '{"dataset": "cifar10"}',
    json.dumps(fake() | dict(method='vat')), json.dumps(fake() | dict(dataset='svhn'))],
    ids=['cut', 'list', 'keys', 'method', 'dataset'])
def test_a_broken_line_is_named(tmp_path, line):
    write(tmp_path, fake())
    with open(tmp_path/'cifar10.jsonl', 'a') as f: f.write(f'\n{line}\n')
    with pytest.raises(ValueError, match=r'cifar10\.jsonl, line 3'): read_runs(tmp_path)
    for command in (lp_tables, lp_figures):
        with pytest.raises(SystemExit, match='line 3'): command(str(tmp_path))


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder'): read_runs(tmp_path/'none')
    for command in (lp_tables, lp_figures):
        with pytest.raises(SystemExit, match='no .jsonl file'): command(str(tmp_path))


def test_tables_are_printed_and_written(tmp_path, capsys):
    runs = write(tmp_path, fake())
    lp_tables(str(tmp_path), out=str(tmp_path/'tables.md'))
    assert capsys.readouterr().out == (tmp_path/'tables.md').read_text() == tables(runs) + '\n'


# Figures

def test_toy():
    x, truth, p = toy(labels=3)
    assert np.bincount(truth[p.labeled]).tolist() == [3, 3]
    points, triangles = plot_toy(x, p.labels, p.labeled, p.certainty).collections
    assert (len(points.get_offsets()), len(triangles.get_offsets())) == (294, 6)


def test_figures_of_the_toy():
    assert len(figure3().axes) == 3
    given, pseudo = (ax.collections[0] for ax in figure1().axes)
    assert (given.get_facecolor() == given.get_facecolor()[0]).all()  # gray
    assert len(np.unique(pseudo.get_facecolor(), axis=0)) == 2
    assert len(np.unique(pseudo.get_sizes())) > 50


def test_flow_names_every_step():
    words = ' '.join(t.get_text() for t in figure2().axes[0].texts)
    steps = 'Random weights', 'labeled items only', 'Features', 'Graph', 'Label propagation', 'omega', 'zeta', 'one epoch'
    for o in (*steps, 'times'): assert o in words


def updates(accuracy, network=None):
    networks = [None if network is None else network-i/100 for i in range(len(accuracy))]
    return [dict(epoch=i, accuracy=a, network_accuracy=n) for i, (a, n) in enumerate(zip(accuracy, networks))]


def test_accuracy_against_epoch(tmp_path):
    lp = [fake(seed=s, history=updates([.6+.02*s, .8], .5), items=2000) for s in (0, 1)]
    fig = figure4(write(tmp_path, *lp))
    (diffusion, own), band = fig.axes[0].lines, fig.axes[0].collections[0]
    np.testing.assert_allclose(diffusion.get_ydata(), [61, 80])
    np.testing.assert_allclose(own.get_ydata(), [50, 49])
    np.testing.assert_allclose(band.get_paths()[0].get_extents().intervaly, [61-2**.5, 80])
    assert own.get_label() == 'network prediction (lp); runs: 2'
    assert 'cifar10_2000-500-split0 … split1' in re.sub(r'\s+', ' ', fig.get_supxlabel())
    with pytest.raises(Lacking, match='with 4000 labels has an accuracy.*lp_train cifar10 --labels 4000'):
        figure4(read_runs(tmp_path), 'cifar10', 4000)


def test_network_runs_are_only_drawn_for_the_same_experiment(tmp_path):
    lp = fake(history=updates([.6, .8], .5), items=2000)
    other = fake('network', history=updates([.1, .1]), items=2000, stage1=3, stage2=3)
    assert '(lp)' in figure4(write(tmp_path, lp, other)).axes[0].lines[1].get_label()
    same = fake('network', history=updates([.4, .3]), items=2000)
    network = figure4(write(tmp_path, lp, other, same)).axes[0].lines[1]
    np.testing.assert_allclose(network.get_ydata(), [40, 30])
    assert network.get_label() == 'network prediction (network); runs: 1'


def test_error_against_labels(tmp_path):
    full = [fake(m, s, e+s/100, n) for m, e in (('supervised', .4), ('lp', .2)) for s in (0, 2) for n in (500, 1000)]
    trial = [fake('lp', s, .9, n, items=2000) for s in (0, 1) for n in (500, 1000)] + [fake('lp', 5, .99, lr=.1)]
    ax = figure6(write(tmp_path, *full, *trial)).axes[0]
    means = {c.lines[0].get_color(): c.lines[0].get_ydata().astype(float) for c in ax.containers}
    np.testing.assert_allclose(means[COLORS['lp']], [21, 21])
    np.testing.assert_allclose(means[COLORS['supervised']], [41, 41])
    bars = [o[:, 1] for c in ax.containers for o in c.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[41-2**.5, 41+2**.5]]*2 + [[21-2**.5, 21+2**.5]]*2)
    paper = [list(o.get_ydata()) for o in ax.lines if o.get_linestyle() == '--']
    assert paper == [[49.08, 40.03, 29.58, 21.63], [32.40, 22.02, 15.66, 12.69]]


def test_error_against_labels_of_a_trial_is_without_the_papers(tmp_path):
    trial = [fake(m, s, .9, n, items=2000) for m in ('lp', 'strong') for s in (0, 1) for n in (500, 1000)]
    ax = figure6(write(tmp_path, *trial)).axes[0]
    assert not any(len(o.get_xdata()) for o in ax.lines if o.get_linestyle() == '--')


def keep(folder, name, truth, wrong, labeled=2):
    "A file of pseudo-labels as a run leaves it; wrong items are the most certain, in descending order"
    truth = torch.as_tensor(truth)
    labels, omega, mask = truth.clone(), torch.full((len(truth),), .5), torch.arange(len(truth)) < labeled
    for rank, i in enumerate(wrong): labels[i], omega[i] = (truth[i]+1) % 2, .9 - .1*rank
    pseudo = PseudoLabels(labels, omega, torch.ones(int(truth.max())+1), mask, torch.ones_like(mask))
    LPInterpretation(pseudo, truth=truth).save(folder/name)
    return name


@pytest.fixture
def digits_results(tmp_path):
    "A run on the digits whose pseudo-labels of three epochs are kept; 25, 18 and 11 of them are wrong"
    truth = digits(20, 0).train_truth
    names = [keep(tmp_path, f'digits-20-seed0-lp-{e}.npz', truth, range(5+e, 30)) for e in (0, 7, 14)]
    write(tmp_path, digits_run(kept=names[::-1], history=updates([.5, .6], .4)))
    return tmp_path, truth


def test_certainty_of_two_epochs(digits_results):
    fig = figure5(read_runs(digits_results[0]))
    found = [(ax.get_title(), ax.get_legend().texts[1].get_text()) for ax in fig.axes]
    assert found == [('epoch 0 of stage 2', 'wrong (25)'), ('epoch 7 of stage 2', 'wrong (18)')]


def test_confident_errors_as_images(digits_results):
    folder, truth = digits_results
    fig, d = figure7(read_runs(folder), n=4), digits(20, 0)
    labels = [int(truth[i]+1) % 2 for i in range(19, 23)]
    assert [ax.get_xlabel() for ax in fig.axes] == [f'{o} ({w:.2f})' for o, w in zip(labels, (.9, .8, .7, .6))]
    assert 'epoch 14' in fig.get_suptitle()
    np.testing.assert_array_equal(np.asarray(fig.axes[0].images[0].get_array()).squeeze(), d.images[d.train[19], 0])


def test_all_figures_are_written(digits_results, capsys):
    folder, _ = digits_results
    lp_figures(str(folder), out=str(folder/'few'))
    assert re.findall('figure. skipped: .{13}', capsys.readouterr().out) == ['figure6 skipped: no experiment']
    assert len(list((folder/'few').iterdir())) == 6
    with open(folder/'digits.jsonl', 'a') as f: f.write(json.dumps(digits_run(labels=40)) + '\n')
    lp_figures(str(folder), out=str(folder/'all'))
    assert 'skipped' not in capsys.readouterr().out
    for i in range(1, 8):
        pixels = np.asarray(Image.open(folder/'all'/f'figure{i}.png').convert('L'))
        assert (pixels < 250).mean() > .005
    assert not plt.get_fignums()


@pytest.fixture
def cifar_results(tmp_path):
    "A function that writes a run on 8 images with given truth, and where its images are"
    for i, o in enumerate(np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype='uint8')):
        folder = tmp_path/'images'/('train' if i < 8 else 'test')/('cat', 'dog')[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(o).save(folder/f'{i}.png')
    def make(data, truth, wrong):
        kept = [keep(tmp_path, 'cifar10_8-2-seed0-lp-0.npz', truth, wrong)]
        return write(tmp_path, fake(seed=0, labels=2, items=8, kind='seed', kept=kept, data=str(data)))
    return tmp_path, make


def test_images_are_read_from_where_the_run_read_them_or_from_data(cifar_results):
    folder, make = cifar_results
    runs = make(folder/'gone', torch.arange(8) % 2, [4, 5])
    with pytest.raises(Lacking, match='gone.*pass --data'): figure7(runs)
    assert [ax.get_xlabel() for ax in figure7(runs, data=folder/'images').axes[:2]] == ['dog (0.90)', 'cat (0.80)']
    assert len(figure7(make(folder/'images', torch.arange(8) % 2, [4])).axes[0].images) == 1


def test_images_of_other_classes_are_refused(cifar_results):
    folder, make = cifar_results
    with pytest.raises(Lacking, match='the classes differ'): figure7(make(folder/'images', torch.arange(8)//4, [4]))


def test_missing_pseudo_labels(cifar_results, capsys):
    folder, make = cifar_results
    runs = make(folder/'images', torch.arange(8) % 2, [4])
    (folder/'cifar10_8-2-seed0-lp-0.npz').unlink()
    for figure in (figure5, figure7):
        with pytest.raises(Lacking, match='no run of lp has its pseudo-labels'): figure(runs)
    lp_figures(str(folder))
    out = capsys.readouterr().out
    for i in (4, 5, 6, 7): assert f'figure{i} skipped: no ' in out
    assert (folder/'figure3.png').exists()
