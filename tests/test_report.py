"The paper's tables and figures from made-up runs: what is averaged, what is named, what is kept apart, and what is said where something lacks."
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from fastai_lp.experiments.datasets import digits
from fastai_lp.interpret import LPInterpretation
from fastai_lp.transductive.pseudo import PseudoLabels
from fastai_lp.experiments.recipes import RECIPES
from fastai_lp.experiments.commands import COLORS, row_name
from fastai_lp.experiments.figures import Lacking, figure1, figure2, figure3, figure4, figure5, figure6, figure7, lp_figures
from fastai_lp.experiments.report import PAPER, as_paper, lp_tables, read_runs, settings, tables


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


def fake(method='lp', seed=10, error=.3, labels=500, dataset='cifar10', items=50000, kind='split', kept=(), history=(), data=None, teacher=None, n_test=None, **changes):
    "A line of `lp_train`, its numbers made up"
    teacher = {} if teacher is None else dict(teacher_error_rate=teacher, teacher_top5_error=teacher/10)
    return dict(dataset=dataset, name=f"{dataset}{'' if items == 50000 or dataset == 'digits' else f'_{items}'}-{labels}-{kind}{seed}", method=method, seed=seed, labels=labels, items=items, data=data,
        n_train=None if items == 50000 or dataset == 'digits' else items, n_test=n_test, recipe=asdict(replace(RECIPES[dataset], **changes).of(method)), environment={},
        splits='splits.npz' if kind == 'split' else None, error_rate=error, top5_error=error/2, stages=[], history=list(history), kept=list(kept), seconds={}, **teacher)


def write(folder, *runs):
    for dataset in {r['dataset'] for r in runs}:
        (folder/f'{dataset}.jsonl').write_text('\n'.join(json.dumps(r) for r in runs if r['dataset'] == dataset) + '\n')
    return read_runs(folder)


def sections(text):
    "Table by title: rows of cells, and notes"
    out = {}
    for part in re.split(r'^### ', text, flags=re.M)[1:]:
        lines = part.splitlines()
        out[lines[0]] = [[o.strip() for o in line.split('|')[1:-1]] for line in lines if line.startswith('|')][2:], [o for o in lines if o.startswith('- [')]
    return out


def table(text, start): return next(v for k, v in sections(text).items() if k.startswith(start))


def test_paper_numbers():
    text = tables([])
    assert PAPER['cifar10', 'error_rate', 500]['lp'] == (32.40, 1.80) and PAPER['cifar10', 'error_rate', 4000]['mt+lp'] == (10.61, .28)
    assert [r[-1] for r in table(text, 'Table 1')[0]] == ['36.53 ± 1.42', '36.17 ± 1.98', '33.32 ± 1.53', '32.40 ± 1.80', '35.20 ± 2.23', '35.17 ± 2.46']
    assert [r[1:3] for r in table(text, 'Table 1')[0]] == [['', ''], ['', '✓'], ['✓', ''], ['✓', '✓'], ['✓', '✓'], ['✓', '✓']]
    assert table(text, 'Table 2')[0][1] == ['network prediction', '–', '35.17 ± 2.46', '–', '23.79 ± 1.31', '–', '16.64 ± 0.48', '–', '13.21 ± 0.61']
    assert table(text, 'Table 3')[0][1][2::2] == ['46.20 ± 0.76', '38.43 ± 1.88', '70.29 ± 0.81', '57.58 ± 1.47', '47.58 ± 0.94', '36.14 ± 2.19']
    assert list(sections(text)) == ['Table 1. CIFAR-10, 500 labels: the weights, and ways of pseudo-labeling', 'Table 2. CIFAR-10', 'Table 3. CIFAR-100 and Mini-ImageNet']


def test_mean_and_standard_deviation_over_splits_and_the_runs_by_name(tmp_path):
    runs = write(tmp_path, *[fake(seed=s, error=e) for s, e in ((10, .30), (11, .31), (12, .35), (15, .32))], fake('supervised', 10, .5, 1000))
    rows, notes = table(tables(runs), 'Table 2')
    assert rows[2][1:3] == [f'32.00 ± {np.std([30, 31, 35, 32], ddof=1):.2f} (4) [2]', '32.40 ± 1.80'] and rows[0][3:5] == ['50.00 (1) [1]', '40.03 ± 1.11']
    assert notes == ['- [1] cifar10.jsonl, supervised: cifar10-1000-split10', '- [2] cifar10.jsonl, lp: cifar10-500-split10 … split12, cifar10-500-split15']
    assert table(tables(runs), 'Table 1')[0][3][3] == rows[2][1].replace('[2]', '[1]')
    assert all(c == '–' for r in table(tables(runs), 'Table 3')[0] for c in r[1::2])


def test_ablation_rows(tmp_path):
    kinds = [('lp', False, False, .51), ('lp', False, True, .52), ('lp', True, False, .53), ('lp', True, True, .54), ('gtg', True, True, .55), ('network', True, True, .56)]
    runs = write(tmp_path, *[fake(m, error=e, omega=omega, zeta=zeta) for m, omega, zeta, e in kinds], fake('network', 11, .99, zeta=False), fake('supervised', error=.98, omega=False))
    text = tables(runs)
    assert [r[3][:5] for r in table(text, 'Table 1')[0]] == [f'{100*e:.2f}' for *_, e in kinds]
    assert [r[1][:5] for r in table(text, 'Table 2')[0][:3]] == ['98.00', '56.00', '54.00'], 'supervised has no ω to switch off'
    assert [r[:2] for r in table(text, 'CIFAR-10: 50,000')[0]] == [['network prediction, ζ = 1', '99.00 (1) [1]']]


@pytest.mark.parametrize('changes, told', [(dict(items=2000), '2,000 training images'), (dict(stage1=20, stage2=20), '20 + 20 epochs'), (dict(stage2=20), '180 + 20 epochs'),
    (dict(network='small'), 'network small'), (dict(n_test=1000), '1,000 test images'), (dict(lr=.1), 'lr 0.1'), (dict(labels=250), '250 labels')])
def test_other_experiments_never_stand_beside_the_paper(tmp_path, changes, told):
    runs = write(tmp_path, *[fake(m, s, .77, **changes) for m in ('supervised', 'lp') for s in (10, 11)])
    text = tables(runs)
    *paper, other = sections(text).values()
    assert len(paper) == 3 and '77.00' not in str(paper) and str(other).count('77.00 ± 0.00 (2)') == 2
    assert told in text.partition('## Other experiments')[2] and not re.search(r'\bpaper\b', text.partition('## Other experiments')[2])


def test_digits_have_their_own_table(tmp_path):
    runs = write(tmp_path, *[fake(m, s, .1, 20, 'digits', 1347, 'seed') for m in ('diffusion', 'lp', 'supervised') for s in (0, 1, 2)], fake('lp', 0, .2, 20, 'digits', 1347, 'seed', omega=False))
    rows, notes = table(tables(runs), 'Digits: 1,347 training images, network small, 5 + 15 epochs')
    assert [r[0] for r in rows] == ['fully supervised', 'diffusion (ours)', 'diffusion (ours), ω = 1', 'diffusion, no network'] and rows[2][1] == '20.00 (1) [3]'
    assert notes[0] == '- [1] digits.jsonl, supervised: digits-20-seed0 … seed2'
    assert not any(map(as_paper, runs))


def test_teacher_counts_and_student_is_told(tmp_path):
    runs = write(tmp_path, *[fake('mt', s, .6, 4000, d, teacher=.4+.02*s) for s in (0, 1) for d in ('cifar10', 'mini_imagenet')])
    rows, notes = table(tables(runs), 'Table 2')
    assert rows[3][7] == '41.00 ± 1.41 (2) [1]' and notes == ['- [1] cifar10.jsonl, mt: cifar10-4000-split0 … split1; the student 60.00 ± 0.00']
    rows, notes = table(tables(runs), 'Table 3')
    assert rows[2][5] == '41.00 ± 1.41 (2) [1]' and rows[2][9] == '4.10 ± 0.14 (2) [2]' and 'the student 30.00 ± 0.00' in notes[1]


def test_different_settings_are_not_averaged(tmp_path):
    runs = write(tmp_path, fake(error=.3), fake(seed=11, error=.3), fake(seed=12, error=.5, bf16=True), fake(seed=13, error=.4, data='/there/cifar10_jpeg.npz'), fake(seed=14, error=.3, n_test=10000))
    rows, notes = table(tables(runs), 'Table 2')
    assert rows[2][1] == '30.00 ± 0.00 (3) [1] / 50.00 (1) [2] / 40.00 (1) [3]'
    assert notes[1].endswith('split12; bf16 True') and notes[2].endswith('split13; images from cifar10_jpeg.npz')
    trials = write(tmp_path, fake(items=2000, error=.3), fake(items=2000, seed=11, error=.5, lr=.1))
    assert table(tables(trials), 'CIFAR-10: 2,000')[0][0][1] == '30.00 (1) [1] / 50.00 (1) [2]'
    assert [settings(r) for r in trials] == [{}, {'lr': .1}]


def test_own_draws_of_labels_are_not_averaged_with_the_authors(tmp_path):
    runs = write(tmp_path, fake(error=.3), fake(seed=11, error=.3), fake(kind='seed', error=.4))
    rows, notes = table(tables(runs), 'Table 2')
    assert rows[2][1] == '30.00 ± 0.00 (2) [1] / 40.00 (1) [2]' and notes[1].endswith("cifar10-500-seed10; draws of the labels other than the authors'")


def test_a_later_line_of_the_same_run_counts(tmp_path):
    runs = write(tmp_path, fake(error=.3), fake(error=.4), fake('supervised', error=.6), fake('supervised', error=.5, omega=False, k=20))
    assert [(row_name(r), r['error_rate']) for r in runs] == [('lp', .4), ('supervised', .5)]


@pytest.mark.parametrize('line', ['{"dataset": "cifar10", ', '[]', '{"dataset": "cifar10"}', json.dumps(fake() | dict(method='vat')), json.dumps(fake() | dict(dataset='svhn'))])
def test_a_broken_line_is_named(tmp_path, line):
    write(tmp_path, fake())
    file = tmp_path/'cifar10.jsonl'
    file.write_text(file.read_text() + '\n' + line + '\n')
    with pytest.raises(ValueError, match=r'cifar10\.jsonl, line 3: this is not'): read_runs(tmp_path)
    for command in (lp_tables, lp_figures):
        with pytest.raises(SystemExit, match='line 3'): command(str(tmp_path))


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'): read_runs(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='no .jsonl file'): read_runs(tmp_path)
    for command in (lp_tables, lp_figures):
        with pytest.raises(SystemExit, match='no .jsonl file'): command(str(tmp_path))


def test_commands(tmp_path):
    def call(command, *args): return subprocess.run([Path(sys.executable).with_name(command), *args], capture_output=True, text=True)
    (tmp_path/'results').mkdir()
    runs = write(tmp_path/'results', fake(error=.3))
    res = call('lp_tables', tmp_path/'results', '--out', tmp_path/'tables.md')
    assert res.returncode == 0 and res.stdout == (tmp_path/'tables.md').read_text() == tables(runs) + '\n'
    res = call('lp_figures', tmp_path/'results', '--dataset', 'cifar100')
    assert res.returncode == 0 and 'figure6 skipped: no run on cifar100' in res.stdout
    for command in ('lp_tables', 'lp_figures'):
        res = call(command, tmp_path/'nowhere')
        assert res.returncode == 1 and 'there is no folder' in res.stderr and 'Traceback' not in res.stderr


def keep(folder, name, truth, wrong, labeled=2):
    "A file of pseudo-labels as a run leaves it; the wrong items the most certain, in falling order"
    truth = torch.as_tensor(truth)
    labels, omega = truth.clone(), torch.full((len(truth),), .5)
    for rank, i in enumerate(wrong): labels[i], omega[i] = (truth[i]+1) % 2, .9 - .1*rank
    mask = torch.arange(len(truth)) < labeled
    LPInterpretation(PseudoLabels(labels, omega, torch.ones(int(truth.max())+1), mask, torch.ones_like(mask)), truth=truth).save(folder/name)
    return name


def updates(accuracy, network=None): return [dict(epoch=i, accuracy=a, network_accuracy=None if network is None else network-i/100) for i, a in enumerate(accuracy)]


def test_figures_that_need_no_run():
    for make, panels in ((figure1, 2), (figure3, 3)):
        fig = make()
        assert len(fig.axes) == panels and all(ax.collections for ax in fig.axes)
    top, bottom = figure1().axes
    assert (top.collections[0].get_facecolor() == top.collections[0].get_facecolor()[0]).all(), 'unlabeled points are all gray'
    assert len(np.unique(bottom.collections[0].get_facecolor(), axis=0)) == 2 and len(np.unique(bottom.collections[0].get_sizes())) > 50
    words = ' '.join(t.get_text() for t in figure2().axes[0].texts)
    for o in ('Random weights', 'labeled items only', 'Descriptors', 'Graph', 'Label propagation', 'omega', 'zeta', 'one epoch', 'times'): assert o in words


def test_accuracy_against_epoch(tmp_path):
    lp = [fake(seed=s, history=updates([.6+.02*s, .8], .5), items=2000) for s in (0, 1)]
    fig = figure4(write(tmp_path, *lp))
    diffusion, own = fig.axes[0].lines
    np.testing.assert_allclose(diffusion.get_ydata(), [61, 80])
    np.testing.assert_allclose(own.get_ydata(), [50, 49])
    np.testing.assert_allclose(fig.axes[0].collections[0].get_paths()[0].get_extents().intervaly, [61-2**.5, 80])
    assert "of the lp runs' own network" in own.get_label() and 'cifar10_2000-500-split0 … split1' in re.sub(r'\s+', ' ', fig._supxlabel.get_text())
    other = fake('network', 0, history=updates([.1, .1]), items=2000, stage1=3, stage2=3)  # of another experiment
    assert "of the lp runs' own network" in figure4(write(tmp_path, *lp, other)).axes[0].lines[1].get_label()
    fig = figure4(write(tmp_path, *lp, other, fake('network', 0, history=updates([.4, .3]), items=2000)))
    np.testing.assert_allclose(fig.axes[0].lines[1].get_ydata(), [40, 30])
    assert fig.axes[0].lines[1].get_label() == 'network prediction (network); runs: 1'
    with pytest.raises(Lacking, match='with 4000 labels knows the accuracy.*lp_train cifar10 --labels 4000'): figure4(read_runs(tmp_path), 'cifar10', 4000)


def test_error_against_labels(tmp_path):
    full = [fake(m, s, e+s/100, n) for m, e in (('supervised', .4), ('lp', .2)) for s in (0, 2) for n in (500, 1000)]
    trial = [fake('lp', s, .9, n, items=2000) for s in (0, 1) for n in (500, 1000)] + [fake('lp', 5, .99, lr=.1)]
    ax = figure6(write(tmp_path, *full, *trial)).axes[0]
    means = {c.lines[0].get_color(): c.lines[0].get_ydata().astype(float) for c in ax.containers}
    np.testing.assert_allclose(means[COLORS['lp']], [21, 21])
    np.testing.assert_allclose(means[COLORS['supervised']], [41, 41])
    np.testing.assert_allclose([o[:, 1] for c in ax.containers for o in c.lines[2][0].get_segments()], [[41-2**.5, 41+2**.5]]*2 + [[21-2**.5, 21+2**.5]]*2)
    assert [list(o.get_ydata()) for o in ax.lines if o.get_linestyle() == '--'] == [[49.08, 40.03, 29.58, 21.63], [32.40, 22.02, 15.66, 12.69]]
    (tmp_path/'trial').mkdir()
    ax = figure6(write(tmp_path/'trial', *trial[:4])).axes[0]
    assert not any(len(o.get_xdata()) for o in ax.lines if o.get_linestyle() == '--'), "the paper's lines beside a trial"


def png(file):
    pixels = np.asarray(Image.open(file).convert('L'))
    return (pixels < 250).mean()


def test_all_figures_of_digits(tmp_path, capsys):
    truth = digits(20, 0).train_truth
    names = [keep(tmp_path, f'digits-20-seed0-lp-{e}.npz', truth, range(5+e, 30)) for e in (0, 7, 14)]
    write(tmp_path, fake(seed=0, labels=20, dataset='digits', items=1347, kind='seed', kept=reversed(names), history=updates([.5, .6], .4)))
    lp_figures(str(tmp_path), out=str(tmp_path/'few'))
    assert re.findall('figure. skipped: no experiment with several', capsys.readouterr().out) == ['figure6 skipped: no experiment with several'] and len(list((tmp_path/'few').iterdir())) == 6
    with open(tmp_path/'digits.jsonl', 'a') as f: f.write(json.dumps(fake(seed=0, labels=40, dataset='digits', items=1347, kind='seed')) + '\n')
    lp_figures(str(tmp_path), out=str(tmp_path/'new'))
    assert 'skipped' not in capsys.readouterr().out
    for i in range(1, 8): assert png(tmp_path/'new'/f'figure{i}.png') > .005
    assert not plt.get_fignums(), 'the command closes its figures'
    fig = figure5(read_runs(tmp_path))
    assert [(ax.get_title(), ax.get_legend().texts[1].get_text()) for ax in fig.axes] == [('epoch 0 of stage 2', 'wrong (25)'), ('epoch 7 of stage 2', 'wrong (18)')]
    fig = figure7(read_runs(tmp_path), n=4)
    labels = [int(truth[i]+1) % 2 for i in range(19, 23)]
    assert [ax.get_xlabel() for ax in fig.axes] == [f'{o} ({w:.2f})' for o, w in zip(labels, (.9, .8, .7, .6))] and 'epoch 14' in fig._suptitle.get_text()
    np.testing.assert_array_equal(np.asarray(fig.axes[0].images[0].get_array()).squeeze(), digits(20, 0).images[digits(20, 0).train[19], 0])


def test_images_come_from_where_the_run_read_them_or_from_data(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part, n in (('train', 8), ('test', 2)):
        for i in range(n):
            (folder := tmp_path/'images'/part/('cat', 'dog')[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype='uint8')).save(folder/f'{i}.png')
    kept = [keep(tmp_path, 'cifar10_8-2-seed0-lp-0.npz', torch.arange(8) % 2, [4, 5])]
    def run(data): return write(tmp_path, fake(seed=0, labels=2, items=8, kind='seed', kept=kept, data=str(data)) | dict(n_train=8))
    run(tmp_path/'gone')
    lp_figures(str(tmp_path))
    out = capsys.readouterr().out
    assert re.search(r'^figure7 skipped: .*gone.*pass --data', out, re.M) and re.search(r'^figure4 skipped: no run of lp knows', out, re.M)
    assert not (tmp_path/'figure7.png').exists() and (tmp_path/'figure3.png').exists()
    assert [ax.get_xlabel() for ax in figure7(run(tmp_path/'gone'), data=tmp_path/'images').axes[:2]] == ['dog (0.90)', 'cat (0.80)']
    assert len(figure7(run(tmp_path/'images')).axes[0].images) == 1
    keep(tmp_path, kept[0], torch.arange(8) // 4, [4])
    with pytest.raises(Lacking, match='has not the images'): figure7(run(tmp_path/'images'))
    (tmp_path/kept[0]).unlink()
    for figure in (figure5, figure7):
        with pytest.raises(Lacking, match='no run of lp has its pseudo-labels beside it'): figure(run(tmp_path/'images'))
