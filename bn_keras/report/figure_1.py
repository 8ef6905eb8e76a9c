"""The paper's Figure 1: the network of section 4.1 on MNIST, with and without BN."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from bn_keras.errors import UsageError
from bn_keras.report.page import Section, escape, table
from bn_keras.report.published import CITATION
from bn_keras.report.runs import Results, Run, Spread

WITH_BN = "with BN"
WITHOUT_BN = "without BN"

# Okabe and Ito's colours; for grey print one is dashed.
_STYLES = {
    WITHOUT_BN: dict(color="#D55E00", linestyle=(0, (5, 1.5))),
    WITH_BN: dict(color="#0072B2", linestyle="-"),
}
_PERCENTILES = (15, 50, 85)
# The paper's panel begins there.
_LOWEST_ACCURACY = 0.7
# An inset shows what comes from this part of the training on, if that is all above what it covers.
_LATE, _ABOVE_INSET = 0.35, 0.89
# Fractions of the training at which the table shows the accuracy.
_MOMENTS = (0.02, 0.2, 1.0)
# The part of the training after which what was learned at once is learned.
_BEGINNING = 0.1


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
    missing = [title for title in (WITH_BN, WITHOUT_BN) if not results.get(title)]
    if missing:
        raise UsageError(f"Figure 1 compares two networks, but there is no run {missing[0]!r}")
    runs = {title: results[title] for title in _STYLES}
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
        f"The paper ({CITATION}, section 4.1) has no numbers for its Figure 1. In words it says"
        " that the network with BN trains faster and reaches a higher test accuracy, and that"
        " without BN the distributions change a lot over time, in their mean and their variance,"
        " while those with BN are much more stable.",
        *_compare_statements(runs),
        *_tell_diverged(runs),
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
        names = [f"record/{p}" for p in _PERCENTILES]
        points = [
            (line["step"], *(line[name] for name in names))
            for line in run.metrics
            if all(line.get(name) is not None for name in names)
        ]
        if len(points) < 2:
            return None
        steps, *percentiles = np.array(points, np.float64).T
        return cls(steps, np.stack(percentiles))

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


def _best(run: Run) -> float | None:
    """The best accuracy, if there was an evaluation."""
    return max(run.curve("validation/accuracy")[1], default=None)


def _accuracies(runs: Sequence[Run]) -> dict[int, Spread]:
    """Gives the accuracy at each step at which all of the runs were evaluated."""
    curves = [dict(zip(*run.curve("validation/accuracy"), strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: Spread.of(curve[step] for curve in curves) for step in steps}


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
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_accuracy(axes: Axes, runs: Results) -> None:
    bands = {title: _accuracies(each) for title, each in runs.items()}
    axes.set_title("(a) test accuracy", loc="left")
    _draw_bands(axes, bands, decimals=0)
    last = max((max(band) for band in bands.values() if band), default=0)
    late = {t: {s: a for s, a in band.items() if s >= _LATE * last} for t, band in bands.items()}
    lowest = min((a.low for band in late.values() for a in band.values()), default=0.0)
    axes.set_ylim(_LOWEST_ACCURACY if lowest > _LOWEST_ACCURACY else 0, 1.005)
    if lowest < _ABOVE_INSET or not all(late.values()):
        _name_lines(axes, bands)
        return
    inset = axes.inset_axes([_LATE, 0.1, 0.97 - _LATE, 0.5])
    _draw_bands(inset, late, decimals=1)
    _name_lines(inset, late)
    inset.margins(x=0, y=0.35)
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.25)
    axes.indicate_inset_zoom(inset, edgecolor="0.4")


def _draw_bands(axes: Axes, bands: dict[str, dict[int, Spread]], decimals: int) -> None:
    """Draws the means over the seeds, and from the lowest to the highest."""
    for title, band in bands.items():
        style, steps, spreads = _STYLES[title], list(band), band.values()
        axes.plot(steps, [a.mean for a in spreads], linewidth=1.6, **style)
        lows, highs = [a.low for a in spreads], [a.high for a in spreads]
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def _name_lines(axes: Axes, bands: dict[str, dict[int, Spread]]) -> None:
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
            color=_STYLES[title]["color"],
        )


def _draw_input(axes: Axes, run: Run, title: str, caption: str) -> None:
    axes.set_title(caption, loc="left")
    recorded = _Input.of(run)
    if recorded is None:
        axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        return
    style, steps = _STYLES[title], recorded.steps
    low, _, high = recorded.percentiles
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    places = ("top", "center", "bottom")
    for percentile, values, place in zip(_PERCENTILES, recorded.percentiles, places, strict=True):
        axes.plot(steps, values, color=style["color"], linewidth=1.6 if percentile == 50 else 0.8)
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
        f" both are ours, and the same with and without BN. {seeds} seed{'s' if seeds > 1 else ''}."
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
        f"(a) Accuracy on the test images; {lines}. (b) and (c), to the same scale: the 15th, 50th"
        f" and 85th percentiles of what comes into unit {record.unit} of the layer"
        f" {escape(record.layer)}, over the same {examples:,} training images each time,"
        " by the batch statistics of the training; of the first seed. The unit is simply the first"
        " one: it wasn't chosen by how it looks."
    )


_TERMS = (
    "*Median moved*: the highest median of the training minus the lowest, in units of the"
    " sigmoid's input, which mean the same in both networks. *Spread*: the distance between the"
    " 15th and the 85th percentile, where it was smallest and where it was largest. *From"
    f" {_BEGINNING:.0%} of the training on* is when what is learned at once is behind. Unit and"
    " weights are others in each seed, so that the range over the seeds shows how typical one is."
)

_WHY_OTHERWISE = (
    "What may be behind what is otherwise: how soon the network without BN settles depends on the"
    " learning rate and the initial weights, which the paper doesn't give; with BN the spread of"
    " a sigmoid's input is a parameter of its own, gamma, which begins at 1 and is free to grow."
)


def _over_seeds(values: Sequence[float | None], spec: str) -> str:
    """Formats mean and spread of what the seeds gave, and says how many gave nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = format(Spread.of(known), spec)
    return text if len(known) == len(values) else f"{text}; {len(known)} of {len(values)} seeds"


def _compare_accuracy(runs: Results) -> str:
    accuracies = {title: _accuracies(each) for title, each in runs.items()}
    common = sorted(set.intersection(*map(set, accuracies.values())))
    moments = sorted({next(s for s in common if s >= m * common[-1]) for m in _MOMENTS if common})
    rows = [
        (f"after {step:,} steps", *(format(a[step], ".2%") for a in accuracies.values()))
        for step in moments
    ]
    best = [_over_seeds([_best(run) for run in each], ".2%") for each in runs.values()]
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
            *(_over_seeds([i and number(i) for i in each], ".2f") for each in of.values()),
        )
        for of, when in ((inputs, ""), (later, f", from {_BEGINNING:.0%} of the training on"))
        for name, number in numbers
    ]
    return table(("input of the sigmoid", *runs), rows)


# Of a pair of runs with the same seed, first the one with BN; None where it can't be told.
_Holds = Callable[[Run, Run], bool | None]


def _is_faster(with_bn: Run, without: Run) -> bool | None:
    goal = _best(without)
    if goal is None:
        return None
    steps = with_bn.steps_to_accuracy(goal)
    return steps is not None and steps < without.steps_to_accuracy(goal)


def _is_better(with_bn: Run, without: Run) -> bool | None:
    best = _best(with_bn), _best(without)
    return None if None in best else best[0] > best[1]


def _is_steadier(number: Callable[[_Input], float]) -> _Holds:
    def holds(with_bn: Run, without: Run) -> bool | None:
        inputs = _Input.of(with_bn), _Input.of(without)
        return None if None in inputs else number(inputs[0]) < number(inputs[1])

    return holds


_STATEMENTS: tuple[tuple[str, _Holds], ...] = (
    ("BN trains faster: it reaches the other network's best accuracy in fewer steps", _is_faster),
    ("BN reaches a higher test accuracy: its best is above the other network's best", _is_better),
    (
        "with BN the location of the input is more stable: its median moves less",
        _is_steadier(lambda i: i.median_range),
    ),
    (
        f"so it is from {_BEGINNING:.0%} of the training on",
        _is_steadier(lambda i: i.after_beginning().median_range),
    ),
    (
        "with BN the spread of the input is more stable: it changes by a smaller factor",
        _is_steadier(lambda i: i.spread_ratio),
    ),
    (
        f"so it is from {_BEGINNING:.0%} of the training on",
        _is_steadier(lambda i: i.after_beginning().spread_ratio),
    ),
    (
        "so it is in units of the input, the largest spread minus the smallest",
        _is_steadier(lambda i: i.spread_range),
    ),
)


def _compare_statements(runs: Results) -> list[str]:
    by_seed = {run.config.seed: run for run in runs[WITHOUT_BN]}
    pairs = [(r, by_seed[r.config.seed]) for r in runs[WITH_BN] if r.config.seed in by_seed]
    lines = []
    for statement, holds in _STATEMENTS:
        told = [answer for answer in (holds(*pair) for pair in pairs) if answer is not None]
        lines.append((f"- **{_judge(told)}:** {statement}.", all(told)))
    text = "\n".join(line for line, _ in lines)
    return [text] if all(holds for _, holds in lines) else [text, _WHY_OTHERWISE]


def _judge(told: Sequence[bool]) -> str:
    if not told:
        return "Not to be told from these runs"
    seeds = f"{len(told)} seed{'s' if len(told) > 1 else ''}"
    if all(told):
        return f"As in the paper ({seeds})"
    if not any(told):
        return f"Otherwise than in the paper ({seeds})"
    return f"Not decided (so in {sum(told)} of {seeds})"


def _tell_diverged(runs: Results) -> list[str]:
    diverged = [
        f"{title} (seed {run.config.seed}) at step {run.diverged_at:,}"
        for title, each in runs.items()
        for run in each
        if run.diverged_at is not None
    ]
    return [f"**Diverged:** {', '.join(diverged)}. Up to there it counts."] if diverged else []
