"""Figure 1 shows what its runs recorded, even if they recorded little."""

import io
import re

import numpy as np
import pytest

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import WITH_BN, WITHOUT_BN
from bn_keras.report import Run, build_figure_1
from configs import mnist_bn

STEPS = 5_000


def make_run(title, seed=0, accuracies=(), inputs=(), extra=()):
    """Builds a run with accuracies and percentiles of the layer's input at even intervals."""
    config = mnist_bn.get_config().copy_and_resolve_references()
    config.seed = seed
    config.train.steps = STEPS
    metrics = [
        {"step": STEPS * (i + 1) // len(accuracies), "validation/accuracy": accuracy}
        for i, accuracy in enumerate(accuracies)
    ]
    metrics += [
        {"step": STEPS * i // max(1, len(inputs) - 1)}
        | {f"record/{p}": v for p, v in zip((15, 50, 85), values, strict=True)}
        for i, values in enumerate(inputs)
    ]
    return Run(title, config, [*metrics, *extra])


STEADY = [(-1.0, 0.0, 1.0), (-1.25, 0.25, 1.25), (-1.0, 0.0, 1.5)]
DRIFTING = [(0.0, 0.05, 0.1), (-1.0, 0.5, 1.0), (-2.0, -1.0, 1.0)]


def results(with_bn, without):
    return {
        WITH_BN: [make_run(WITH_BN, i, *run) for i, run in enumerate(with_bn)],
        WITHOUT_BN: [make_run(WITHOUT_BN, i, *run) for i, run in enumerate(without)],
    }


AS_IN_THE_PAPER = results(
    [([0.93, 0.96, 0.975], STEADY), ([0.92, 0.97, 0.985], STEADY)],
    [([0.90, 0.95, 0.96], DRIFTING), ([0.90, 0.93, 0.96], DRIFTING)],
)


def cells(body):
    """Returns the cells of the tables' rows: without BN, with BN."""
    rows = [[cell.strip() for cell in row.split("|")] for row in body.splitlines() if "|" in row]
    return {name: (without, with_bn) for _, name, without, with_bn, _ in rows}


def verdicts(section):
    """Returns each statement's verdict, and in how many seeds it holds."""
    return re.findall(r"\| \*\*(.*?)\*\* *\| *(\S.*?) *\|$", section.body, re.MULTILINE)


def lines(axes):
    return [np.stack(line.get_data()) for line in axes.lines]


def test_tables_show_what_the_runs_recorded():
    shown = cells(build_figure_1(AS_IN_THE_PAPER).body)
    assert shown["after 1,666 steps"] == ("90.00%", "92.50% (92.00% to 93.00%)")
    assert shown["after 5,000 steps"] == ("96.00%", "98.00% (97.50% to 98.50%)")
    assert shown["best"] == shown["after 5,000 steps"]
    assert shown["median range"] == ("1.50", "0.25")
    assert shown["smallest spread"] == ("0.10", "2.00")
    assert shown["largest spread"] == ("3.00", "2.50")
    assert shown["largest / smallest spread"] == ("30.00", "1.25")
    # Without the first of three points.
    later = {
        k.split(",")[0]: v
        for k, v in shown.items()
        if k.endswith("after the first 10% of training")
    }
    assert later["median range"] == ("1.50", "0.25")
    assert later["smallest spread"] == ("2.00", "2.50")
    assert later["largest spread"] == ("3.00", "2.50")
    assert later["largest / smallest spread"] == ("1.50", "1.00")


def test_verdicts_follow_the_runs():
    section = build_figure_1(AS_IN_THE_PAPER)
    assert verdicts(section) == [("holds", "2 of 2 seeds")] * 7
    swapped = {
        WITH_BN: AS_IN_THE_PAPER[WITHOUT_BN],
        WITHOUT_BN: AS_IN_THE_PAPER[WITH_BN],
    }
    assert verdicts(build_figure_1(swapped)) == [("does not hold", "0 of 2 seeds")] * 7
    for runs in (AS_IN_THE_PAPER, swapped):
        assert "other than ours were not tested" in build_figure_1(runs).body
    # In the second seed the networks are equal.
    mixed = {title: list(runs) for title, runs in AS_IN_THE_PAPER.items()}
    mixed[WITHOUT_BN][1] = make_run(WITHOUT_BN, 1, [0.92, 0.97, 0.985], STEADY)
    assert verdicts(build_figure_1(mixed)) == [("too close to call", "1 of 2 seeds, 1 tie")] * 7


def test_panels_show_means_over_seeds_and_percentiles_of_the_first_seed():
    figure = build_figure_1(AS_IN_THE_PAPER).plots["figure_1.svg"]
    accuracy, without, with_bn = figure.axes
    steps = [1666, 3333, 5000]
    np.testing.assert_allclose(lines(accuracy)[0], [steps, [0.90, 0.94, 0.96]])
    np.testing.assert_allclose(lines(accuracy)[1], [steps, [0.925, 0.965, 0.98]])
    for axes, inputs in ((without, DRIFTING), (with_bn, STEADY)):
        shown = np.stack(lines(axes))
        np.testing.assert_allclose(shown[:, 1], np.transpose(inputs))
        np.testing.assert_allclose(shown[:, 0], [[0, 2500, 5000]] * 3)
        assert axes.get_ylim() == with_bn.get_ylim()
        assert axes.get_ylim()[0] < -2 and axes.get_ylim()[1] > 1.5
    # Late accuracies are above the area of the inset, so it is drawn.
    (inset,) = accuracy.child_axes
    np.testing.assert_allclose(lines(inset)[1], [steps[1:], [0.965, 0.98]])


DIVERGED = make_run(WITHOUT_BN, 0, (), (), [{"step": 7, "train/loss": None, "diverged": True}])


@pytest.mark.parametrize("start", [0.92, 0.3], ids=["with an inset", "without"])
def test_the_titles_of_the_lines_are_inside_the_figure_and_not_above_the_axes(start):
    runs = results([([start, 0.97, 0.985],)], [([start - 0.05, 0.95, 0.98],)])
    figure = build_figure_1(runs).plots["figure_1.svg"]
    figure.draw_without_rendering()
    accuracy = figure.axes[0]
    boxes = {t.get_text(): t.get_bbox_patch().get_window_extent() for t in accuracy.texts}
    assert boxes.keys() == {WITH_BN, WITHOUT_BN}
    assert not boxes[WITH_BN].overlaps(boxes[WITHOUT_BN])
    for box in boxes.values():
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1
        # A title is centred on its line, at most half its height above the axes.
        assert (box.y0 + box.y1) / 2 <= accuracy.bbox.y1


@pytest.mark.parametrize(
    "runs, expected",
    [
        (results([([0.9, 0.95],)], [([0.5, 0.6],)]), ("no verdict", "-")),
        (results([((), STEADY)], [((), DRIFTING)]), ("holds", "1 of 1 seed")),
        (results([([0.9], STEADY)], [()]) | {WITHOUT_BN: [DIVERGED]}, ("no verdict", "-")),
        (results([([0.9], STEADY[:1])], [([0.9], STEADY[:1])]), ("no verdict", "-")),
        (results([([0.9], [(1.0, 1.0, 1.0)] * 2)], [([0.9], STEADY)]), ("holds", "1 of 1 seed")),
    ],
    ids=["not recorded", "not evaluated", "diverged", "recorded once", "constant input"],
)
def test_runs_with_little_data_are_shown(runs, expected):
    section = build_figure_1(runs)
    assert verdicts(section)[2] == expected
    (figure,) = section.plots.values()
    figure.savefig(io.BytesIO(), dpi=30)
    assert "nan" not in section.body and "None" not in section.body
    assert ("Diverged:** without BN (seed 0) at step 7" in section.body) == (
        DIVERGED in runs[WITHOUT_BN]
    )


def test_two_constant_inputs_are_a_tie():
    """The ratio of the largest to the smallest spread is infinite for both."""
    constant = [([0.9], [(1.0, 1.0, 1.0)] * 2)]
    found = verdicts(build_figure_1(results(constant, constant)))
    assert "does not hold" not in [verdict for verdict, _ in found[2:]]


def test_a_missing_network_is_an_error():
    with pytest.raises(UsageError, match="no run 'without BN': Figure 1 compares two"):
        build_figure_1({WITH_BN: AS_IN_THE_PAPER[WITH_BN]})
