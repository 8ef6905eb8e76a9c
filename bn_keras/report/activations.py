"""The paper's Figure 1: the network of section 4.1 on MNIST, with and without BN."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import WITH_BN, WITHOUT_BN
from bn_keras.report import verdicts
from bn_keras.report.page import Section, escape, table, tell_diverged
from bn_keras.report.plots import STYLES, draw_bands, lighten
from bn_keras.report.published import CITATION
from bn_keras.runs.history import ACCURACY, Results, Run, Spread, over_seeds

_PERCENTILES = (15, 50, 85)
# The paper's panel begins there.
_LOWEST_ACCURACY = 0.7
# An inset shows what comes from this part of the training on, if that is all above what it covers.
_LATE, _ABOVE_INSET = 0.35, 0.89
# Fractions of the training at which the table shows the accuracy.
_MOMENTS = (0.02, 0.2, 1.0)
# The part of the training in which both networks change fast, and what comes after it.
_BEGINNING = 0.1
_LATER = f"from {_BEGINNING:.0%} of the training on"


def figure_1(results: Results) -> Section:
    """Draws the paper's three panels, and compares what they show with what the paper says.

    Of runs that recorded nothing, or diverged, it shows what there is.

    Args:
      results: of WITH_BN and WITHOUT_BN; what else there is isn't looked at. The first run of each
        gives the panel of the layer's input.

    Raises:
      UsageError: one of the two is missing.

    Source: Ioffe & Szegedy 2015, section 4.1 and Figure 1.
    """
    missing = [title for title in (WITHOUT_BN, WITH_BN) if not results.get(title)]
    if missing:
        raise UsageError(f"Figure 1 compares two networks, but there is no run {missing[0]!r}")
    runs = {title: results[title] for title in (WITHOUT_BN, WITH_BN)}
    body = [
        _tell_setting(runs),
        "![Test accuracy against training steps, and percentiles of a sigmoid's input without BN"
        " and with it](figure_1.png)",
        _tell_panels(runs),
        "### Accuracy",
        _compare_accuracy(runs),
        "### The input of the sigmoid",
        _compare_inputs(runs),
        _TERMS,
        "### What the paper states, one by one",
        f"The paper ({CITATION}, section 4.1) has no numbers for its Figure 1. It says that with BN"
        " the network trains faster and reaches a higher test accuracy, and that the distribution"
        " of a sigmoid's input is much more stable than without BN, where its mean and variance"
        " change a lot over time.",
        *_compare_statements(runs),
        *tell_diverged(runs),
    ]
    return Section(
        "Figure 1: activations over time", "\n\n".join(body), {"figure_1.png": _draw(runs)}
    )


# --- What the runs gave.


class _Input(NamedTuple):
    """What came into the unit over a run's training.

    Attributes:
      steps: rising; [S].
      percentiles: float64 [3, S].
    """

    steps: np.ndarray
    percentiles: np.ndarray

    @classmethod
    def of(cls, run: Run) -> "_Input | None":
        """Gives None where fewer than two points were recorded."""
        curves = [run.curve(f"record/{percentile}") for percentile in _PERCENTILES]
        steps = sorted(set.intersection(*map(set, curves)))
        if len(steps) < 2:
            return None
        return cls(np.array(steps), np.array([[curve[s] for s in steps] for curve in curves]))

    def after_beginning(self) -> "_Input":
        later = self.steps >= _BEGINNING * self.steps[-1]
        return _Input(self.steps[later], self.percentiles[:, later])

    @property
    def median_range(self) -> float:
        """How far the highest median is above the lowest."""
        return float(np.ptp(self.percentiles[1]))

    @property
    def spreads(self) -> tuple[float, float]:
        """The smallest and the largest distance of the outer percentiles."""
        distances = self.percentiles[2] - self.percentiles[0]
        return float(distances.min()), float(distances.max())

    @property
    def spread_range(self) -> float:
        """The largest distance of the outer percentiles minus the smallest."""
        return self.spreads[1] - self.spreads[0]

    @property
    def spread_ratio(self) -> float:
        """The largest distance of the outer percentiles over the smallest."""
        smallest, largest = self.spreads
        return largest / smallest if smallest else np.inf


# --- The plot.


def _draw(runs: Results) -> Figure:
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    accuracy, without, with_ = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
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
    steps = max(run.config.train.steps for each in runs.values() for run in each)
    for axes in (accuracy, without, with_):
        axes.set(xlabel="training steps", xlim=(0, steps))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        lighten(axes)
    return figure


def _draw_accuracy(axes: Axes, runs: Results) -> None:
    bands = {title: over_seeds(each, ACCURACY) for title, each in runs.items()}
    axes.set_title("(a) test accuracy", loc="left")
    draw_bands(axes, bands)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    last = max((step for band in bands.values() for step in band), default=0)
    late = {title: _from(_LATE * last, band) for title, band in bands.items()}
    lowest = min((spread.low for band in late.values() for spread in band.values()), default=0.0)
    axes.set_ylim(_LOWEST_ACCURACY if lowest > _LOWEST_ACCURACY else 0, 1.005)
    if lowest < _ABOVE_INSET or not all(late.values()):
        _name_lines(axes, bands)
        return
    inset = axes.inset_axes([_LATE, 0.1, 0.97 - _LATE, 0.5])
    draw_bands(inset, late)
    _name_lines(inset, late)
    inset.xaxis.set_major_formatter(EngFormatter(sep=""))
    inset.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    inset.margins(x=0, y=0.35)
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.25)
    axes.indicate_inset_zoom(inset, edgecolor="0.4")


def _from(step: float, band: Mapping[int, Spread]) -> dict[int, Spread]:
    return {at: spread for at, spread in band.items() if at >= step}


def _name_lines(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Writes what a line is: the upper one's name above its rising middle, the other's below."""
    middles = {t: list(band.items())[len(band) // 2] for t, band in bands.items() if band}
    upper = max(middles, key=lambda title: middles[title][1].mean, default=None)
    for title, (step, accuracy) in middles.items():
        is_upper = title == upper
        axes.annotate(
            title,
            (step, accuracy.mean),
            xytext=(-4, 10) if is_upper else (4, -8),
            textcoords="offset points",
            horizontalalignment="right" if is_upper else "left",
            verticalalignment="bottom" if is_upper else "top",
            color=STYLES[title]["color"],
        )


def _draw_input(axes: Axes, run: Run, title: str, caption: str) -> None:
    axes.set_title(caption, loc="left")
    recorded = _Input.of(run)
    if recorded is None:
        axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        return
    color, steps = STYLES[title]["color"], recorded.steps
    low, _, high = recorded.percentiles
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    places = ("top", "center", "bottom")
    for percentile, values, place in zip(_PERCENTILES, recorded.percentiles, places, strict=True):
        axes.plot(steps, values, color=color, linewidth=1.6 if percentile == 50 else 0.8)
        axes.annotate(
            f"{percentile}%",
            (steps[-1], values[-1]),
            xytext=(3, 0),
            textcoords="offset points",
            verticalalignment=place,
            fontsize=8,
            annotation_clip=False,
        )


# --- The words.


def _tell_setting(runs: Results) -> str:
    config = runs[WITH_BN][0].config
    seeds = len(runs[WITH_BN])
    return (
        f"Data: {escape(config.data.name)}. Network: three fully connected hidden layers of 100"
        f" sigmoids and a linear classifier. Training: {config.train.steps:,} steps of"
        f" {config.train.global_batch_size} images by plain SGD at a rate of"
        f" {config.schedule.base_rate:g}; weights begin as Gaussians of deviation"
        f" {config.model.initializer_stddev:g}. The paper gives neither the rate nor the deviation:"
        f" both are ours, and the same with and without BN. Seeds: {seeds}."
    )


def _tell_panels(runs: Results) -> str:
    config = runs[WITH_BN][0].config
    record, batch = config.record, config.train.global_batch_size
    examples = math.ceil(record.num_examples / batch) * batch
    several = len(runs[WITH_BN]) > 1
    lines = (
        "lines are means over the seeds, bands go from the lowest to the highest"
        if several
        else "a single seed, so that what another one would change can't be seen"
    )
    return (
        f"(a) Accuracy on the test images; {lines}. (b) and (c), to the same scale and of the first"
        f" seed: the 15th, 50th and 85th percentiles of the input of unit {record.unit} of the"
        f" layer {escape(record.layer)} over {examples:,} training images, the same each time; BN"
        " normalizes by mini-batches there, as in training."
    )


_TERMS = (
    "*Median moved*: the highest median of the training minus the lowest, in units of the"
    " sigmoid's input. *Spread*: the distance between the 15th and the 85th percentile, where it"
    f" was smallest and where it was largest. *{_LATER.capitalize()}* leaves out the beginning, in"
    " which both networks change fast. In brackets: the lowest and the highest of a seed."
)

_NOT_TESTED = (
    "Whether that is so at other learning rates and initial weights, which the paper doesn't give,"
    " was not tested."
)


def _format_seeds(values: Sequence[float | None], spec: str) -> str:
    """Formats mean and spread of what the seeds gave, and says how many gave nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = format(Spread.of(known), spec)
    return text if len(known) == len(values) else f"{text}; {len(known)} of {len(values)} seeds"


def _compare_accuracy(runs: Results) -> str:
    accuracies = {title: over_seeds(each, ACCURACY) for title, each in runs.items()}
    common = sorted(set.intersection(*map(set, accuracies.values())))
    moments = sorted({next(s for s in common if s >= m * common[-1]) for m in _MOMENTS if common})
    rows = [
        (f"after {step:,} steps", *(format(a[step], ".2%") for a in accuracies.values()))
        for step in moments
    ]
    best = [
        _format_seeds([run.best_accuracy or None for run in each], ".2%") for each in runs.values()
    ]
    return table(("test accuracy", *runs), [*rows, ("the best of all evaluations", *best)])


def _compare_inputs(runs: Results) -> str:
    numbers: tuple[tuple[str, Callable[[_Input], float]], ...] = (
        ("median moved", lambda i: i.median_range),
        ("smallest spread", lambda i: i.spreads[0]),
        ("largest spread", lambda i: i.spreads[1]),
        ("largest over smallest", lambda i: i.spread_ratio),
    )
    inputs = {title: [_Input.of(run) for run in each] for title, each in runs.items()}
    later = {title: [i and i.after_beginning() for i in each] for title, each in inputs.items()}
    rows = [
        (
            name + when,
            *(_format_seeds([i and number(i) for i in each], ".2f") for each in of.values()),
        )
        for of, when in ((inputs, ""), (later, f", {_LATER}"))
        for name, number in numbers
    ]
    return table(("input of the sigmoid", *runs), rows)


# Of a pair of runs with the same seed, first the one with BN; None where it can't be told.
_Holds = Callable[[Run, Run], bool | None]


def _is_faster(with_bn: Run, without: Run) -> bool | None:
    goal = without.best_accuracy
    if not goal:
        return None
    steps = with_bn.steps_to_accuracy(goal)
    return steps is not None and steps < without.steps_to_accuracy(goal)


def _is_better(with_bn: Run, without: Run) -> bool | None:
    if not (with_bn.best_accuracy and without.best_accuracy):
        return None
    return with_bn.best_accuracy > without.best_accuracy


def _is_steadier(number: Callable[[_Input], float]) -> _Holds:
    def holds(with_bn: Run, without: Run) -> bool | None:
        inputs = _Input.of(with_bn), _Input.of(without)
        return None if None in inputs else number(inputs[0]) < number(inputs[1])

    return holds


_STATEMENTS: Mapping[str, _Holds] = {
    "With BN training is faster: the other network's best accuracy takes fewer steps": _is_faster,
    "With BN the best test accuracy is higher": _is_better,
    "With BN the median of the input moves less": _is_steadier(lambda i: i.median_range),
    f"With BN it moves less, too, {_LATER}": _is_steadier(
        lambda i: i.after_beginning().median_range
    ),
    "With BN the spread changes by a smaller factor": _is_steadier(lambda i: i.spread_ratio),
    f"With BN it changes by a smaller factor, too, {_LATER}": _is_steadier(
        lambda i: i.after_beginning().spread_ratio
    ),
    "With BN the spread changes by less, the largest minus the smallest": _is_steadier(
        lambda i: i.spread_range
    ),
}


def _compare_statements(runs: Results) -> list[str]:
    by_seed = {run.config.seed: run for run in runs[WITHOUT_BN]}
    pairs = [(r, by_seed[r.config.seed]) for r in runs[WITH_BN] if r.config.seed in by_seed]
    told = {
        statement: [answer for pair in pairs if (answer := holds(*pair)) is not None]
        for statement, holds in _STATEMENTS.items()
    }
    rows = verdicts.tabulate(told)
    return [rows] if all(map(all, told.values())) else [rows, _NOT_TESTED]
