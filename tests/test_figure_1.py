"""Figure 1 says what its runs wrote, whatever they wrote."""

import io
import re

import numpy as np
import pytest

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import WITH_BN, WITHOUT_BN
from bn_keras.report import Run, figure_1
from configs import mnist_bn

STEPS = 5_000


def make_run(title, seed=0, accuracies=(), inputs=(), extra=()):
    """A run that was evaluated, and whose layer's input was recorded, at even intervals."""
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
    """What stands in the tables' rows: without BN, and with it."""
    rows = [[cell.strip() for cell in row.split("|")] for row in body.splitlines() if "|" in row]
    return {name: (without, with_bn) for _, name, without, with_bn, _ in rows}


def verdicts(section):
    """Of each statement: the verdict, and in how many seeds it holds."""
    return re.findall(r"\| \*\*(.*?)\*\* *\| *(\S.*?) \|$", section.body, re.MULTILINE)


def lines(axes):
    return [np.stack(line.get_data()) for line in axes.lines]


def test_its_tables_are_what_the_runs_wrote():
    shown = cells(figure_1(AS_IN_THE_PAPER).body)
    assert shown["after 1,666 steps"] == ("90.00%", "92.50% (92.00% to 93.00%)")
    assert shown["after 5,000 steps"] == ("96.00%", "98.00% (97.50% to 98.50%)")
    assert shown["the best of all evaluations"] == shown["after 5,000 steps"]
    assert shown["median moved"] == ("1.50", "0.25")
    assert shown["smallest spread"] == ("0.10", "2.00")
    assert shown["largest spread"] == ("3.00", "2.50")
    assert shown["largest over smallest"] == ("30.00", "1.25")
    # Without the first of three.
    later = {k.split(",")[0]: v for k, v in shown.items() if k.endswith("10% of the training on")}
    assert later["median moved"] == ("1.50", "0.25")
    assert later["smallest spread"] == ("2.00", "2.50")
    assert later["largest spread"] == ("3.00", "2.50")
    assert later["largest over smallest"] == ("1.50", "1.00")


def test_its_statements_follow_the_runs():
    section = figure_1(AS_IN_THE_PAPER)
    assert verdicts(section) == [("holds", "2 of 2")] * 7
    assert "was not tested" not in section.body
    swapped = {
        WITH_BN: AS_IN_THE_PAPER[WITHOUT_BN],
        WITHOUT_BN: AS_IN_THE_PAPER[WITH_BN],
    }
    assert verdicts(figure_1(swapped)) == [("does not hold here", "0 of 2")] * 7
    assert "was not tested" in figure_1(swapped).body
    # Of the second seed no network is better than the other.
    mixed = {title: list(runs) for title, runs in AS_IN_THE_PAPER.items()}
    mixed[WITHOUT_BN][1] = make_run(WITHOUT_BN, 1, [0.92, 0.97, 0.985], STEADY)
    assert verdicts(figure_1(mixed)) == [("within the spread of the seeds", "1 of 2")] * 7


def test_its_panels_show_the_mean_over_the_seeds_and_the_first_seeds_percentiles():
    figure = figure_1(AS_IN_THE_PAPER).plots["figure_1.png"]
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
    # The last third is above what the inset covers, and so there is one.
    (inset,) = accuracy.child_axes
    np.testing.assert_allclose(lines(inset)[1], [steps[1:], [0.965, 0.98]])


DIVERGED = make_run(WITHOUT_BN, 0, (), (), [{"step": 7, "train/loss": None, "diverged": True}])


@pytest.mark.parametrize(
    "runs, expected",
    [
        (results([([0.9, 0.95],)], [([0.5, 0.6],)]), ("undecided", "-")),
        (results([((), STEADY)], [((), DRIFTING)]), ("holds", "1 of 1")),
        (results([([0.9], STEADY)], [()]) | {WITHOUT_BN: [DIVERGED]}, ("undecided", "-")),
        (results([([0.9], STEADY[:1])], [([0.9], STEADY[:1])]), ("undecided", "-")),
        (results([([0.9], [(1.0, 1.0, 1.0)] * 2)], [([0.9], STEADY)]), ("holds", "1 of 1")),
    ],
    ids=["not recorded", "not evaluated", "diverged", "recorded once", "nothing spread"],
)
def test_it_shows_what_there_is(runs, expected):
    section = figure_1(runs)
    assert verdicts(section)[2] == expected
    (figure,) = section.plots.values()
    figure.savefig(io.BytesIO(), dpi=30)
    assert "nan" not in section.body and "None" not in section.body
    assert ("Diverged:** without BN (seed 0) at step 7" in section.body) == (
        DIVERGED in runs[WITHOUT_BN]
    )


def test_a_network_that_is_missing():
    with pytest.raises(UsageError, match="there is no run 'without BN'"):
        figure_1({WITH_BN: AS_IN_THE_PAPER[WITH_BN]})
