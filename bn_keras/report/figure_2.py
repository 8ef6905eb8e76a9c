"""Figure 2 of the paper: accuracy of its five networks against training steps."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bn_keras.data.built_in import IMAGENET_TRAIN_EXAMPLES
from bn_keras.experiments.titles import INCEPTION, X30
from bn_keras.report import published
from bn_keras.report.five_networks import FiveNetworks
from bn_keras.report.plots import FIGURE_WIDTH, STYLES, draw_curves, format_percent, label_lines
from bn_keras.report.sections import Section, describe_divergence, escape, join_words
from bn_keras.runs.history import Results, Run
from bn_keras.training.networks import NETWORKS
from bn_keras.training.schedule import PAPER_BATCH_SIZE


def build_figure_2(results: Results) -> Section:
    """Draws validation accuracy against steps.

    A diamond marks where the mean over a network's seeds reaches the highest mean of Inception.

    Args:
      results: runs of Inception and others of the five networks; other titles are ignored.

    Raises:
      UsageError: Inception is missing, or no seed is shared by all networks.

    Source: Ioffe & Szegedy 2015, Figure 2.
    """
    networks = FiveNetworks.select(results)
    results = networks.results
    figure = Figure(figsize=(FIGURE_WIDTH, 3.6), layout="constrained")
    draw_accuracy(figure.subplots(), networks)
    body = [
        f"![Validation accuracy of {join_words(results)} against training steps](figure_2.svg)",
        f"{_explain_lines(results)} A diamond marks the first evaluation at which a network's line"
        " reaches Inception's highest point (thin grey line)."
        f"{_explain_published_points(results[INCEPTION][0])}",
        describe_setup(results[INCEPTION][0]),
        *describe_divergence(results),
    ]
    return Section("Figure 2: accuracy against steps", "\n\n".join(body), {"figure_2.svg": figure})


# --- Plots.


def draw_accuracy(axes: Axes, networks: FiveNetworks) -> None:
    """Draws validation accuracy against steps, with a diamond where a line reaches the target."""
    draw_curves(axes, networks.bands)
    if math.isfinite(networks.target):
        axes.axhline(networks.target, color="0.6", linewidth=0.8, zorder=0)
        _mark_target(axes, networks)
    if published.is_comparable(networks.results[INCEPTION][0]):
        _draw_published(axes, networks)
    axes.set(xlabel="training steps", ylabel="validation accuracy", ylim=(0, 1))
    format_percent(axes.yaxis)
    label_lines(axes, networks.bands)


def _mark_target(axes: Axes, networks: FiveNetworks) -> None:
    """Draws a diamond where a line reaches the target."""
    reached = {title: networks.steps_to_target(title) for title in networks.bands}
    steps = list(reached.values())
    for index, (title, step) in enumerate(reached.items()):
        if step is not None:
            # Diamonds at the same step may overlap: the earlier ones are larger, and stay visible.
            size = 8 + 6 * steps[index + 1 :].count(step)
            _draw_diamond(axes, title, step, networks.bands[title][step].mean, size)


def _draw_diamond(
    axes: Axes, title: str, step: float, accuracy: float, size: float = 8, hollow: bool = False
) -> None:
    color = STYLES[title].color
    axes.plot(
        step,
        accuracy,
        marker="D",
        color="white" if hollow else color,
        markeredgecolor=color if hollow else "white",
        markersize=size,
        zorder=3,
        clip_on=False,
    )


def _draw_published(axes: Axes, networks: FiveNetworks) -> None:
    """Draws the paper's points as hollow diamonds, with steps converted to our batch size."""
    points = [
        (title, steps, published.INCEPTION_ACCURACY)
        for title in networks.bands
        if (steps := published.FIGURE_3[title].steps)
    ]
    if X30 in networks.bands:
        best = published.FIGURE_3[X30].best_accuracy
        points.append((X30, published.X30_STEPS_TO_BEST, best))
    for title, steps, accuracy in points:
        our_steps = steps * PAPER_BATCH_SIZE / networks.global_batch_size
        _draw_diamond(axes, title, our_steps, accuracy, hollow=True)


# --- Text.


def describe_setup(run: Run) -> str:
    """Describes data, networks, training and validation by one run of the five networks."""
    config = run.config
    network = NETWORKS[config.model.variant]
    modules = config.model.modules
    which = f"modules {join_words(modules)} of the paper's" if modules else "the paper's"
    width = "" if config.model.width == 1 else f" at {config.model.width:g} times the width"
    return (
        f"Data: {escape(config.data.name)}. Networks: {which} Figure 5{width}, with the"
        f" *{escape(config.model.stem)}* stem. Training: {_describe_length(run)} Inception's"
        f" base learning rate is {config.schedule.base_rate / network.rate:g} (paper:"
        f" {published.INCEPTION_RATE:g}); the other networks use the paper's multiples of it."
        f" Validation: split *{escape(config.data.validation_split)}*, on whose images the best"
        f" accuracies are selected, with {_describe_statistics(run)}."
    )


def _describe_statistics(run: Run) -> str:
    """Describes the statistics that BN uses in evaluations."""
    population = run.config.population
    if population.when == "evaluations":
        return (
            f"population statistics, computed from {population.num_batches} training batches before"
            " each evaluation"
        )
    momentum = run.config.batch_norm.momentum
    return (
        f"moving averages of the BN statistics over about {1 / (1 - momentum):,.0f} steps"
        f" (momentum {momentum:g})"
    )


def _describe_length(run: Run) -> str:
    train = run.config.train
    images = train.steps * train.global_batch_size
    epochs = f" ({images / run.num_train_examples:,.1f} epochs)" if run.num_train_examples else ""
    x30, inception = published.X30_STEPS_TO_BEST, published.INCEPTION_STEPS
    return (
        f"{train.steps:,} steps of {train.global_batch_size} images{epochs}. In the paper, {X30}"
        f" reaches its best accuracy after {x30 / 1e6:.0f} million steps of {PAPER_BATCH_SIZE}"
        f" images ({_published_epochs(x30):.0f} epochs), Inception after"
        f" {inception / 1e6:.0f} million ({_published_epochs(inception):.0f} epochs)."
    )


def _published_epochs(steps: int) -> float:
    return steps * PAPER_BATCH_SIZE / IMAGENET_TRAIN_EXAMPLES


def _explain_lines(results: Results) -> str:
    counts = sorted({len(runs) for runs in results.values()})
    if counts == [1]:
        return "Each line is a single run, so the variation between seeds is unknown."
    least, most = counts[0], counts[-1]
    several = f"{most}" if least == most else f"{least} to {most}"
    return f"Lines are means over {several} seeds; bands span the lowest to the highest seed."


def _explain_published_points(run: Run) -> str:
    if not published.is_comparable(run):
        return ""
    batch = run.config.train.global_batch_size
    converted = f", with steps converted to batches of {batch}" if batch != PAPER_BATCH_SIZE else ""
    return (
        f" Hollow diamonds are the paper's results{converted}: where its networks reach"
        f" {published.INCEPTION_ACCURACY:.1%}, the best accuracy of its Inception, and where BN-x30"
        f" is best ({published.CITATION}, Figures 2 and 3, section 4.2.2)."
    )
