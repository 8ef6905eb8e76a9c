"""Plots of the runs that test the paper's claims."""

from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bn_keras.experiments.titles import (
    ABLATIONS,
    BASELINE,
    INCEPTION,
    WEIGHT_FACTORS,
    X5,
)
from bn_keras.report.claim_tests import (
    accuracies_by_factor,
    steps_by_factor,
)
from bn_keras.report.margins import (
    Group,
    NotRunError,
    common_steps,
    ended_runs,
    seed_variation,
)
from bn_keras.report.plots import (
    FIGURE_WIDTH,
    STYLES,
    format_percent,
    replace_frame_by_grid,
    scale_logarithmically,
)
from bn_keras.runs.history import Results


class Plot(NamedTuple):
    """A plot with its caption.

    Attributes:
      description: content of the plot, without a full stop.
      key: sentences that explain its marks.
      figure: the plot.
    """

    description: str
    key: str
    figure: Figure


def draw_plots(results: Results) -> dict[str, Plot]:
    """Draws the plots for which there are runs; returns them by file name."""
    plots = {}
    for name, draw in (
        ("claims_initialization.svg", _draw_sweep),
        ("claims_ablations.svg", _draw_ablations),
    ):
        try:
            plots[name] = draw(results)
        except NotRunError:
            continue
    return plots


def _draw_sweep(results: Results) -> Plot:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for title, marker in ((INCEPTION, "o"), (BASELINE, "s")):
        sweep = accuracies_by_factor(results, title)
        means = [spread.mean for spread in sweep.values()]
        bars = [
            [spread.mean - spread.low for spread in sweep.values()],
            [spread.high - spread.mean for spread in sweep.values()],
        ]
        style = STYLES[title]._asdict()
        axes.errorbar(list(sweep), means, bars, capsize=3, marker=marker, label=title, **style)
    factors = sorted((*WEIGHT_FACTORS, 1.0))
    axes.set(xlabel="factor on the initial weights", ylim=(0, None))
    axes.set_ylabel(f"accuracy by step {steps_by_factor(results, INCEPTION):,}")
    scale_logarithmically(axes, factors)
    format_percent(axes.yaxis)
    replace_frame_by_grid(axes)
    axes.legend(loc="best")
    description = (
        "Validation accuracy of Inception and BN-Baseline against the factor on the initial weights"
    )
    key = (
        "The points at factor 1 are means over seeds with their ranges; all others are single runs."
        " A point at 0 is a diverged run."
    )
    return Plot(description, key, figure)


def _draw_ablations(results: Results) -> Plot:
    titles = [title for title in ABLATIONS.values() if results.get(title)]
    if not titles:
        raise NotRunError("no ablations")
    networks = [ended_runs(results, title) for title in (X5, *titles)]
    groups = [Group.of(runs, common_steps(*runs)) for runs in networks]
    figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + 0.36 * len(groups)), layout="constrained")
    axes = figure.subplots()
    color = STYLES[X5].color
    step = common_steps(*(run for runs in networks for run in runs))
    margin = seed_variation(results, step, *groups).margin(len(groups[0].accuracies), 1)
    axes.axvline(groups[0].mean, color=color, linewidth=1)
    if margin is not None:
        edges = groups[0].mean - margin, groups[0].mean + margin
        axes.axvspan(*edges, color=color, alpha=0.2, linewidth=0)
    for row, group in enumerate(groups):
        for accuracy in group.accuracies:
            marker = "o" if accuracy else "x"
            axes.plot(accuracy, row, marker, color=color if row == 0 else "black")
    axes.set_yticks(range(len(groups)), [group.title for group in groups])
    # The first network at the top.
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("best validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    format_percent(axes.xaxis)
    replace_frame_by_grid(axes)
    description = (
        "Validation accuracy of BN-x5, and of BN-x5 with one change of section 4.2.1 undone"
    )
    key = (
        "Each point is a run. The line is the mean of BN-x5. The band extends by one margin to"
        " either side; a network outside it differs from BN-x5. A cross at 0 is a diverged run."
    )
    return Plot(description, key, figure)
