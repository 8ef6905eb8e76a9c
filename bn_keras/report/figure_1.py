"""Figure 1 of the paper: the network of section 4.1 on MNIST, with and without BN."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import WITH_BN, WITHOUT_BN
from bn_keras.report.margins import reaches_sooner, tie_margin
from bn_keras.report.plots import (
    FIGURE_WIDTH,
    STYLES,
    draw_bands,
    format_percent,
    label_lines,
    replace_frame_by_grid,
)
from bn_keras.report.published import CITATION
from bn_keras.report.sections import Section, describe_divergence, escape, markdown_table
from bn_keras.report.verdicts import Outcome, exceeds, explain_verdicts, tabulate_verdicts
from bn_keras.runs.history import Results, Run, Spread, over_seeds
from bn_keras.runs.metrics_log import ACCURACY

_PERCENTILES = (15, 50, 85)
# Lower limit of the accuracy axis, as in the paper.
_LOWEST_SHOWN = 0.7
# An inset enlarges the accuracy after this fraction of training. It covers the area below this
# level, so it is drawn only if the curves stay above.
_INSET_START, _ABOVE_INSET = 0.35, 0.89
# Fractions of training at which the table shows the accuracy.
_TABLE_FRACTIONS = (0.02, 0.2, 1.0)
# Fraction of training in which both networks change fast, and the name of the rest.
_BEGINNING = 0.1
_LATER = f"after the first {_BEGINNING:.0%} of training"


def build_figure_1(results: Results) -> Section:
    """Draws the paper's three panels, and compares the measurements with its statements.

    Runs that recorded nothing or diverged are shown as far as they have data.

    Args:
      results: runs of WITH_BN and WITHOUT_BN; other titles are ignored. The panels of the layer's
        input show the first run of each.

    Raises:
      UsageError: one of the two networks is missing.

    Source: Ioffe & Szegedy 2015, section 4.1 and Figure 1.
    """
    missing = [title for title in (WITHOUT_BN, WITH_BN) if not results.get(title)]
    if missing:
        raise UsageError(f"no run {missing[0]!r}: Figure 1 compares two networks; train both")
    runs = {title: results[title] for title in (WITHOUT_BN, WITH_BN)}
    body = [
        _describe_setup(runs[WITH_BN]),
        "![Test accuracy against training steps, and percentiles of a sigmoid's input without and"
        " with BN](figure_1.svg)",
        _explain_panels(runs[WITH_BN]),
        "### Accuracy",
        _compare_accuracy(runs),
        "### Input of the sigmoid",
        _compare_inputs(runs),
        _TERMS,
        "### The paper's statements",
        f"The paper ({CITATION}, section 4.1) has no numbers for its Figure 1. It states that the"
        " network with BN trains faster and reaches a higher test accuracy. It also states that BN"
        " makes the distribution of a sigmoid's input much more stable: without BN, its mean and"
        " variance change considerably over time.",
        *_test_statements(runs),
        *describe_divergence(runs),
    ]
    return Section(
        "Figure 1: activations over time",
        "\n\n".join(body),
        {"figure_1.svg": _draw(runs)},
        _summarize(runs),
    )


class _RecordedInput(NamedTuple):
    """Percentiles of the unit's input over a run.

    Attributes:
      steps: ascending, [S].
      percentiles: one row for each of _PERCENTILES, float64 [3, S].
    """

    steps: np.ndarray
    percentiles: np.ndarray

    @classmethod
    def read(cls, run: Run) -> "_RecordedInput | None":
        """Reads a run's metrics; returns None if fewer than two points were recorded."""
        curves = [run.curve(f"record/{percentile}") for percentile in _PERCENTILES]
        steps = sorted(set.intersection(*map(set, curves)))
        if len(steps) < 2:
            return None
        return cls(np.array(steps), np.array([[curve[s] for s in steps] for curve in curves]))

    def after_beginning(self) -> "_RecordedInput":
        later = self.steps >= _BEGINNING * self.steps[-1]
        return _RecordedInput(self.steps[later], self.percentiles[:, later])

    @property
    def median_range(self) -> float:
        """Highest minus lowest median."""
        return float(np.ptp(self.percentiles[1]))

    @property
    def smallest_spread(self) -> float:
        """Smallest distance between the outer percentiles."""
        return float((self.percentiles[2] - self.percentiles[0]).min())

    @property
    def largest_spread(self) -> float:
        """Largest distance between the outer percentiles."""
        return float((self.percentiles[2] - self.percentiles[0]).max())

    @property
    def spread_ratio(self) -> float:
        """Largest spread divided by the smallest."""
        return self.largest_spread / self.smallest_spread if self.smallest_spread else math.inf

    @property
    def spread_change(self) -> float:
        """Largest spread minus the smallest."""
        return self.largest_spread - self.smallest_spread


def _summarize(runs: Results) -> str:
    """Compares the accuracies early and late in training in a sentence; "" if there are none."""
    bands = {title: over_seeds(seeds, ACCURACY) for title, seeds in runs.items()}
    steps = sorted(set.intersection(*map(set, bands.values())))
    if not steps:
        return ""
    early, last = next(s for s in steps if s >= _TABLE_FRACTIONS[0] * steps[-1]), steps[-1]
    at = [
        f"{bands[WITH_BN][step].mean:.1%} with BN and {bands[WITHOUT_BN][step].mean:.1%} without"
        f" after {step:,} steps"
        for step in dict.fromkeys((early, last))
    ]
    return f"The network of section 4.1 has an accuracy of {', and '.join(at)}."


# --- Plot.


def _draw(runs: Results) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 5.6), layout="constrained")
    accuracy, without, with_ = figure.subplot_mosaic("aa;bc").values()
    steps = max(run.config.train.steps for seeds in runs.values() for run in seeds)
    for axes in (accuracy, without, with_):
        axes.set(xlabel="training steps", xlim=(0, steps))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        replace_frame_by_grid(axes)
    _draw_accuracy(accuracy, runs)
    _draw_input(without, runs[WITHOUT_BN][0], WITHOUT_BN, f"(b) {WITHOUT_BN}")
    _draw_input(with_, runs[WITH_BN][0], WITH_BN, f"(c) {WITH_BN}")
    without.sharey(with_)
    limits = [axes.dataLim for axes in (without, with_) if axes.lines]
    if limits:
        low, high = min(box.y0 for box in limits), max(box.y1 for box in limits)
        margin = 0.05 * (high - low) or 1.0
        with_.set_ylim(low - margin, high + margin)
    without.set_ylabel("input of a sigmoid")
    with_.tick_params(labelleft=False)
    return figure


def _draw_accuracy(axes: Axes, runs: Results) -> None:
    bands = {title: over_seeds(seeds, ACCURACY) for title, seeds in runs.items()}
    axes.set_title("(a) test accuracy", loc="left")
    draw_bands(axes, bands)
    format_percent(axes.yaxis)
    last = max((step for band in bands.values() for step in band), default=0)
    late = {title: _from_step(_INSET_START * last, band) for title, band in bands.items()}
    lowest = min((spread.low for band in late.values() for spread in band.values()), default=0.0)
    axes.set_ylim(_LOWEST_SHOWN if lowest > _LOWEST_SHOWN else 0, 1.005)
    if lowest >= _ABOVE_INSET and all(late.values()):
        _draw_inset(axes, late)
    label_lines(axes, bands)


def _draw_inset(axes: Axes, late: Mapping[str, Mapping[int, Spread]]) -> None:
    inset = axes.inset_axes((_INSET_START, 0.1, 0.97 - _INSET_START, 0.5))
    draw_bands(inset, late)
    inset.xaxis.set_major_formatter(EngFormatter(sep=""))
    format_percent(inset.yaxis)
    inset.margins(x=0, y=0.1)
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.25)
    axes.indicate_inset_zoom(inset, edgecolor="0.4")


def _from_step(start: float, band: Mapping[int, Spread]) -> dict[int, Spread]:
    return {step: spread for step, spread in band.items() if step >= start}


def _draw_input(axes: Axes, run: Run, title: str, caption: str) -> None:
    axes.set_title(caption, loc="left")
    recorded = _RecordedInput.read(run)
    if recorded is None:
        axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        return
    color, steps = STYLES[title].color, recorded.steps
    low, _, high = recorded.percentiles
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    positions = ("top", "center", "bottom")
    for percentile, values, position in zip(
        _PERCENTILES, recorded.percentiles, positions, strict=True
    ):
        axes.plot(steps, values, color=color, linewidth=1.6 if percentile == 50 else 0.8)
        axes.annotate(
            f"{percentile}%",
            (steps[-1], values[-1]),
            xytext=(3, 0),
            textcoords="offset points",
            verticalalignment=position,
            fontsize=8,
            annotation_clip=False,
        )


# --- Text.


def _describe_setup(runs: Sequence[Run]) -> str:
    config = runs[0].config
    return (
        f"Data: {escape(config.data.name)}. Network: three fully connected hidden layers of 100"
        f" sigmoids and a linear classifier. Training: {config.train.steps:,} steps of"
        f" {config.train.global_batch_size} images with plain SGD, learning rate"
        f" {config.schedule.base_rate:g}. The initial weights are Gaussian with standard deviation"
        f" {config.model.initializer_stddev:g}. The paper states neither the learning rate nor the"
        f" standard deviation; our choices are the same with and without BN. Seeds: {len(runs)}."
    )


def _explain_panels(runs: Sequence[Run]) -> str:
    config = runs[0].config
    record, batch = config.record, config.train.global_batch_size
    examples = math.ceil(record.num_examples / batch) * batch
    lines = (
        "Lines are means over seeds; bands span the lowest to the highest seed."
        if len(runs) > 1
        else "Each line is a single run, so the variation between seeds is unknown."
    )
    return (
        f"(a) Accuracy on the test images. {lines} (b), (c) The 15th, 50th and 85th percentiles of"
        f" the input of unit {record.unit} in layer {escape(record.layer)}, for the first seed, on"
        f" a common axis. All points are computed from the same {examples:,} training images, with"
        " BN in training mode (mini-batch statistics)."
    )


_TERMS = (
    "*Median range*: the highest minus the lowest median of the input during training. *Spread*:"
    f" the distance between the 15th and the 85th percentile. *{_LATER.capitalize()}*: without the"
    " beginning, in which both networks change fast. Seeds that differ are shown as mean (lowest to"
    " highest)."
)

_NOT_TESTED = (
    "The statements on the input concern the recorded unit alone. The paper states neither the"
    " learning rate nor the scale of the initial weights, and values other than ours were not"
    " tested."
)


def _format_seeds(values: Sequence[float | None], spec: str) -> str:
    """Formats the spread over seeds, and how many seeds have a value if some have none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = format(Spread.of(known), spec)
    return text if len(known) == len(values) else f"{text}; {len(known)} of {len(values)} seeds"


def _compare_accuracy(runs: Results) -> str:
    accuracies = {title: over_seeds(seeds, ACCURACY) for title, seeds in runs.items()}
    common = sorted(set.intersection(*map(set, accuracies.values())))
    shown = sorted(
        {next(s for s in common if s >= f * common[-1]) for f in _TABLE_FRACTIONS if common}
    )
    rows = [
        (f"after {step:,} steps", *(format(a[step], ".2%") for a in accuracies.values()))
        for step in shown
    ]
    best = [
        _format_seeds([run.best_accuracy or None for run in seeds], ".2%")
        for seeds in runs.values()
    ]
    return markdown_table(("test accuracy", *runs), [*rows, ("best", *best)])


_Measure = Callable[[_RecordedInput], float]


def _compare_inputs(runs: Results) -> str:
    measures: Mapping[str, _Measure] = {
        "median range": lambda recorded: recorded.median_range,
        "smallest spread": lambda recorded: recorded.smallest_spread,
        "largest spread": lambda recorded: recorded.largest_spread,
        "largest / smallest spread": lambda recorded: recorded.spread_ratio,
    }
    rows = [
        (
            name + period,
            *(
                _format_seeds([_measure(run, measure, later) for run in seeds], ".2f")
                for seeds in runs.values()
            ),
        )
        for later, period in ((False, ""), (True, f", {_LATER}"))
        for name, measure in measures.items()
    ]
    return markdown_table(("input of the sigmoid", *runs), rows)


def _measure(run: Run, measure: _Measure, later: bool) -> float | None:
    """Returns a measure of a run's input, after the beginning if `later`; None if not recorded."""
    recorded = _RecordedInput.read(run)
    if recorded is None:
        return None
    return measure(recorded.after_beginning() if later else recorded)


# --- Statements.

# Returns the outcome of a statement for two runs of the same seed, with and without BN, in a list;
# an empty list if they lack the data.
_Test = Callable[[Run, Run], list[Outcome]]


def _is_faster(with_bn: Run, without: Run) -> list[Outcome]:
    if not without.best_accuracy:
        return []
    return [reaches_sooner(with_bn, without, without.best_accuracy)]


def _is_better(with_bn: Run, without: Run) -> list[Outcome]:
    own, other = with_bn.best_accuracy, without.best_accuracy
    if not (own and other):
        return []
    return [exceeds(own - other, tie_margin(with_bn, without))]


def _is_steadier(measure: _Measure, later: bool = False) -> _Test:
    def test(with_bn: Run, without: Run) -> list[Outcome]:
        own, other = (_measure(run, measure, later) for run in (with_bn, without))
        if own is None or other is None:
            return []
        # The ratio of two constant inputs is infinite.
        return [None if own == other else exceeds(other - own)]

    return test


_STATEMENTS: Mapping[str, _Test] = {
    "The network with BN reaches the other network's best accuracy in fewer steps": _is_faster,
    "The best test accuracy is higher with BN": _is_better,
    "The median of the input varies less with BN": _is_steadier(lambda r: r.median_range),
    f"The median varies less with BN {_LATER}": _is_steadier(lambda r: r.median_range, later=True),
    "The spread changes by a smaller factor with BN": _is_steadier(lambda r: r.spread_ratio),
    f"The spread changes by a smaller factor with BN {_LATER}": _is_steadier(
        lambda r: r.spread_ratio, later=True
    ),
    "The spread changes less with BN (largest minus smallest)": _is_steadier(
        lambda r: r.spread_change
    ),
}


def _test_statements(runs: Results) -> list[str]:
    by_seed = {run.config.seed: run for run in runs[WITHOUT_BN]}
    pairs = [(r, by_seed[r.config.seed]) for r in runs[WITH_BN] if r.config.seed in by_seed]
    outcomes = {
        statement: [outcome for pair in pairs for outcome in test(*pair)]
        for statement, test in _STATEMENTS.items()
    }
    return [tabulate_verdicts(outcomes), explain_verdicts(len(pairs)), _NOT_TESTED]
