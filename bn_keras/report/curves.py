"""The paper's Figure 2: accuracy against steps, from what runs wrote."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from bn_keras.experiments.titles import INCEPTION, X30
from bn_keras.report import published
from bn_keras.report.comparison import Comparison
from bn_keras.report.page import Section, escape, tell_diverged
from bn_keras.report.plots import STYLES, draw_bands, lighten
from bn_keras.runs.history import LOSS, Results, Run, Spread, over_seeds
from bn_keras.training.schedule import PAPER_BATCH_SIZE


def figure_2(results: Results) -> Section:
    """Draws validation accuracy, as the paper does, and training loss against steps.

    A diamond marks where the mean of a network's seeds gets to the highest point of Inception's.

    Args:
      results: of Inception and others of the paper's five networks; of more, which are left out.

    Raises:
      UsageError: Inception is missing, or there is no seed that all networks were trained with.
    """
    comparison = Comparison.of(results)
    results = comparison.results
    accuracy = Figure(figsize=(6.6, 4.3), layout="constrained")
    _draw_accuracy(accuracy.subplots(), comparison)
    loss = Figure(figsize=(6.6, 3.4), layout="constrained")
    _draw_loss(loss.subplots(), results)
    body = [
        _tell_setting(results),
        f"![Validation accuracy of {len(results)} networks against training steps](figure_2.png)",
        f"{_tell_lines(results)} A diamond marks the first evaluation at which a network's line is"
        " as high as the highest point of Inception's, the level of the thin grey line."
        f"{_tell_published_points(results[INCEPTION][0])}",
        "![Training loss of the same networks against steps](figure_2_loss.png)",
        "The training loss of the same runs, each point a mean over the steps since the one before"
        f" it.{_tell_dropout(results)}",
        *tell_diverged(results),
    ]
    plots = {"figure_2.png": accuracy, "figure_2_loss.png": loss}
    return Section("Figure 2: accuracy against steps", "\n\n".join(body), plots)


# --- The plots.


def _draw_accuracy(axes: Axes, comparison: Comparison) -> None:
    _draw_curves(axes, comparison.bands)
    if math.isfinite(comparison.goal):
        axes.axhline(comparison.goal, color="0.6", linewidth=0.8, zorder=0)
        _draw_reached(axes, comparison)
        axes.set_ylim(_bottom(comparison), min(axes.get_ylim()[1], 1.0))
    inception = comparison.results[INCEPTION][0]
    if published.is_comparable(inception):
        _draw_published(axes, comparison)
    axes.set(xlabel="training steps", ylabel="validation accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label_ends(axes, comparison.bands)


def _bottom(comparison: Comparison) -> float:
    """Gives where the accuracies begin: what is of interest may go on far above zero.

    It is where the errors are five times Inception's fewest, or below the network with the most.
    """
    best = [comparison.best(title) for title in comparison.bands]
    worst = min(spread.mean if spread else 0.0 for spread in best)
    return max(0.0, min(1 - 5 * (1 - comparison.goal), worst - 0.05))


def _draw_loss(axes: Axes, results: Results) -> None:
    bands = {title: over_seeds(runs, LOSS) for title, runs in results.items()}
    _draw_curves(axes, bands)
    axes.set(xlabel="training steps", ylabel="training loss")
    if any(bands.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(axes, bands)


def _draw_curves(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    draw_bands(axes, bands)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    lighten(axes)


def _draw_reached(axes: Axes, comparison: Comparison) -> None:
    """Draws a diamond where a line gets to the goal."""
    reached = {title: comparison.steps_to_goal(title) for title in comparison.bands}
    steps = list(reached.values())
    for place, (title, step) in enumerate(reached.items()):
        if step is not None:
            # Those of the same step may lie on each other: the larger ones are seen behind.
            size = 8 + 6 * steps[place + 1 :].count(step)
            _draw_diamond(axes, title, step, comparison.bands[title][step].mean, size)


def _draw_diamond(
    axes: Axes, title: str, step: float, accuracy: float, size: float = 8, full: bool = True
) -> None:
    color = STYLES[title]["color"]
    face, edge = (color, "white") if full else ("white", color)
    look = dict(marker="D", color=face, markeredgecolor=edge, markersize=size)
    axes.plot(step, accuracy, **look, zorder=3, clip_on=False)


def _draw_published(axes: Axes, comparison: Comparison) -> None:
    """Draws the paper's points as hollow diamonds, at steps of our batch size."""
    points = [
        (title, published.FIGURE_3[title].steps, published.INCEPTION_ON_IMAGENET)
        for title in comparison.bands
        if published.FIGURE_3[title].steps
    ]
    if X30 in comparison.bands:
        best = published.FIGURE_3[X30].best_accuracy
        points.append((X30, published.STEPS_OF_BN_X30, best))
    batch = comparison.results[INCEPTION][0].config.train.global_batch_size
    for title, steps, accuracy in points:
        _draw_diamond(axes, title, steps * PAPER_BATCH_SIZE / batch, accuracy, full=False)


def _label_ends(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Writes each line's name beside its end, the names above each other as the ends are."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for title, band in bands.items():
        if band:
            end = max(band), band[max(band)].mean
            ends.append((*to_axes.transform(end), end, title))
    ends.sort(key=lambda end: end[1])
    # The height of a name, and the way from a line's end to it, in parts of the axes.
    height, way = 0.065, 0.09
    place = -height
    for number, (x, y, end, title) in enumerate(ends, start=1):
        still_above = (len(ends) - number) * height
        place = max(min(max(y, 0.0), 1 - still_above), place + height)
        axes.annotate(
            title,
            end,
            xytext=(x + way, place),
            textcoords="axes fraction",
            verticalalignment="center",
            annotation_clip=False,
            bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1),
            arrowprops=dict(
                arrowstyle="-",
                color=STYLES[title]["color"],
                linewidth=1,
                shrinkA=0,
                shrinkB=1,
                relpos=(0, 0.5),
            ),
        )


# --- The words.


def _tell_setting(results: Results) -> str:
    inception = results[INCEPTION][0]
    config = inception.config
    width = "" if config.model.width == 1 else f" at {config.model.width:g} times their width"
    return (
        f"Data: {escape(config.data.name)}. Networks: those of the paper's Figure 5{width}, with"
        f" the *{escape(config.model.stem)}* stem. Training: {_tell_length(inception)} Inception's"
        f" learning rate begins at {config.schedule.base_rate:g}, the others' at the paper's"
        " multiples of it. Validation: on the split"
        f" *{escape(config.data.validation_split)}*, by {_tell_statistics(inception)}."
    )


def _tell_statistics(run: Run) -> str:
    """Says by which statistics BN normalizes in evaluations."""
    population = run.config.population
    if population.when == "evaluations":
        return (
            f"population statistics, which are taken over {population.num_batches} batches of the"
            " training before each evaluation"
        )
    momentum = run.config.batch_norm.momentum
    return (
        f"moving averages of BN's statistics over about the last {1 / (1 - momentum):,.0f} steps"
        f" (momentum {momentum:g})"
    )


def _tell_length(run: Run) -> str:
    train = run.config.train
    images = train.steps * train.global_batch_size
    epochs = f" ({images / run.num_train_examples:,.1f} epochs)" if run.num_train_examples else ""
    x30, inceptions = published.STEPS_OF_BN_X30, published.FIGURE_3[INCEPTION].steps
    return (
        f"{train.steps:,} steps of {train.global_batch_size} images{epochs}; in the paper {X30} has"
        f" its best accuracy after {x30 / 1e6:.0f} million steps of {PAPER_BATCH_SIZE}"
        f" ({_papers_epochs(x30):.0f} epochs), and Inception after {inceptions / 1e6:.0f} million"
        f" ({_papers_epochs(inceptions):.0f} epochs)."
    )


def _papers_epochs(steps: int) -> float:
    return steps * PAPER_BATCH_SIZE / published.NUM_TRAIN_EXAMPLES


def _tell_lines(results: Results) -> str:
    counts = sorted({len(runs) for runs in results.values()})
    if counts == [1]:
        return "Each line is a single run: what another seed would change can't be seen."
    several = " to ".join(map(str, counts))
    return f"Lines are means over {several} seeds, and the bands go from the lowest to the highest."


def _tell_published_points(run: Run) -> str:
    if not published.is_comparable(run):
        return ""
    batch = run.config.train.global_batch_size
    at = f", at as many images in batches of {batch}" if batch != PAPER_BATCH_SIZE else ""
    return (
        " Hollow diamonds are the paper's"
        f"{at}: where its networks reach its Inception's {published.INCEPTION_ON_IMAGENET:.1%}, and"
        f" BN-x30 its best ({published.CITATION}, Figures 2 and 3, section 4.2.2)."
    )


def _tell_dropout(results: Results) -> str:
    titles = [title for title, runs in results.items() if runs[0].config.model.dropout]
    if not titles or len(titles) == len(results):
        return ""
    return f" In training {' and '.join(titles)} have dropout, with which the loss is higher."
