"""The paper's Figures 2 and 3 from what runs wrote, beside the paper's own numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from bn_keras.errors import UsageError
from bn_keras.report import published
from bn_keras.report.page import Section, escape, format_seconds, table
from bn_keras.report.runs import Results, Run, Spread
from bn_keras.report.titles import BASELINE, INCEPTION, X5, X5_SIGMOID, X30
from bn_keras.schedule import PAPER_BATCH_SIZE

_ACCURACY = "validation/accuracy"

# Okabe and Ito's colours, which colour-blind readers can tell apart, and dashes for grey print.
_STYLES = (
    dict(color="#000000", linestyle="-"),
    dict(color="#E69F00", linestyle=(0, (6, 2))),
    dict(color="#0072B2", linestyle="-"),
    dict(color="#009E73", linestyle=(0, (6, 2, 1, 2))),
    dict(color="#CC79A7", linestyle=(0, (1.5, 1.5))),
)


def figure_2(results: Results) -> Section:
    """Draws validation accuracy, as the paper does, and training loss against steps.

    A diamond marks where the mean of a network's seeds gets to the highest point of Inception's.

    Args:
      results: of Inception and others of the paper's five networks; of more, which are left out.

    Raises:
      UsageError: Inception is missing, or there is no seed that all networks were trained with.
    """
    results = _of_the_five(results)
    accuracy = Figure(figsize=(6.6, 4.3), layout="constrained")
    _draw_accuracy(accuracy.subplots(), results)
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
        *_tell_diverged(results),
    ]
    plots = {"figure_2.png": accuracy, "figure_2_loss.png": loss}
    return Section("Figure 2: accuracy against steps", "\n\n".join(body), plots)


def figure_3(results: Results) -> Section:
    """Makes the table of steps and best accuracies, and compares it with what the paper's says.

    The numbers are those of the lines of `figure_2`, the means over the seeds. What the paper
    states holds here if it does of the means and of the networks of each seed by themselves.

    Args:
      results: as there.

    Raises:
      UsageError: as there.
    """
    results = _of_the_five(results)
    comparison = _Comparison.of(results)
    body = [
        _tell_order(comparison),
        "### Steps and accuracy",
        _compare_numbers(comparison),
        *_tell_terms(results[INCEPTION][0], comparison),
        *_compare_statements(comparison),
        "### The training of each network",
        _describe_training(results),
        *_tell_diverged(results),
    ]
    return Section("Figure 3: steps and best accuracy", "\n\n".join(body))


def figure_3_row(run: Run) -> str:
    """Gives a run's row of Figure 3 in words.

    Its best accuracy, and the steps to config.train.until_accuracy or, on ImageNet, to the 72.2%
    by which the paper measures; steps also as those of the paper's batch size.
    """
    batch = run.config.train.global_batch_size
    best, target = run.best_accuracy, run.config.train.until_accuracy
    if not target and run.config.data.name == "imagenet2012":
        target = published.INCEPTION_ON_IMAGENET
    parts = [f"best accuracy {best:.2%} {_after(run.steps_to_accuracy(best), batch)}"]
    if target:
        parts.append(f"{target:.1%} {_after(run.steps_to_accuracy(target), batch)}")
    return ", ".join(parts)


def _after(steps: int | None, batch: int) -> str:
    if steps is None:
        return "never"
    paper_steps = f" ({steps * batch / PAPER_BATCH_SIZE:,.0f} of {PAPER_BATCH_SIZE})"
    return f"after {steps:,} steps{paper_steps if batch != PAPER_BATCH_SIZE else ''}"


def _of_the_five(results: Results) -> dict[str, Sequence[Run]]:
    """Picks the paper's five networks, in its order; what else was trained is for others."""
    if not results.get(INCEPTION):
        raise UsageError(
            f"Figures 2 and 3 measure by {INCEPTION}, of which there is no run: train it beside"
            f" {', '.join(results) or 'the others'}"
        )
    return {title: results[title] for title in published.FIGURE_3 if results.get(title)}


class _Comparison(NamedTuple):
    """The networks beside each other: all seeds together, and seed by seed.

    Attributes:
      bands: the validation accuracies of the seeds, by title.
      means: the means of these as a run each, by title.
      by_seed: for each seed that all networks were trained with, the run of each, by title.
      goal: the highest point of Inception's mean, by which steps are counted; infinite where it
        has none, so that nothing gets there.
    """

    bands: dict[str, "_Band"]
    means: dict[str, Run]
    by_seed: list[dict[str, Run]]
    goal: float

    @classmethod
    def of(cls, results: Results) -> "_Comparison":
        bands = {title: _Band.of(runs, _ACCURACY) for title, runs in results.items()}
        means = {
            title: Run(title, runs[0].config, bands[title].as_metrics(_ACCURACY))
            for title, runs in results.items()
        }
        runs = {title: {run.config.seed: run for run in seeds} for title, seeds in results.items()}
        seeds = sorted(set.intersection(*map(set, runs.values())))
        if not seeds:
            theirs = "; ".join(f"{title}: {sorted(of_title)}" for title, of_title in runs.items())
            raise UsageError(f"there is no seed that all networks were trained with: {theirs}")
        by_seed = [{title: runs[title][seed] for title in runs} for seed in seeds]
        return cls(bands, means, by_seed, max(bands[INCEPTION].mean, default=math.inf))


# --- The plots.


class _Band(NamedTuple):
    """What several seeds' curves span, at the steps that all of them have.

    Attributes:
      steps: rising.
      mean, low, high: over the seeds, a value a step.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]

    @classmethod
    def of(cls, runs: Iterable[Run], name: str) -> "_Band":
        curves = [dict(zip(*run.curve(name), strict=True)) for run in runs]
        steps = sorted(set.intersection(*map(set, curves)))
        spreads = [Spread.of(curve[step] for curve in curves) for step in steps]
        return cls(
            steps,
            [spread.mean for spread in spreads],
            [spread.low for spread in spreads],
            [spread.high for spread in spreads],
        )

    def as_metrics(self, name: str) -> list[dict]:
        """Gives the mean as the lines that a run would have written."""
        return [
            {"step": step, name: mean} for step, mean in zip(self.steps, self.mean, strict=True)
        ]

    @property
    def best(self) -> Spread | None:
        """The seeds at the step at which the mean is highest, if there is one."""
        if not self.mean:
            return None
        place = self.mean.index(max(self.mean))
        return Spread(self.mean[place], self.low[place], self.high[place])


def _draw_accuracy(axes: Axes, results: Results) -> None:
    _, means, _, goal = comparison = _Comparison.of(results)
    _draw_bands(axes, comparison.bands)
    if math.isfinite(goal):
        axes.axhline(goal, color="0.6", linewidth=0.8, zorder=0)
        _draw_reached(axes, [_first_at(mean, goal) for mean in means.values()])
        # From where the errors are five times Inception's fewest, or else from below the network
        # that has the most of them: what is of interest may go on far above zero.
        worst = min(mean.best_accuracy for mean in means.values())
        bottom = max(0.0, min(1 - 5 * (1 - goal), worst - 0.05))
        axes.set_ylim(bottom, min(axes.get_ylim()[1], 1.0))
    if _has_published(results[INCEPTION][0]):
        _draw_published(axes, results)
    axes.set(xlabel="training steps", ylabel="validation accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label_ends(axes, comparison.bands)


def _draw_loss(axes: Axes, results: Results) -> None:
    bands = {title: _Band.of(runs, "train/loss") for title, runs in results.items()}
    _draw_bands(axes, bands)
    axes.set(xlabel="training steps", ylabel="training loss")
    if any(band.mean for band in bands.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(axes, bands)


def _draw_bands(axes: Axes, bands: Mapping[str, _Band]) -> None:
    for band, style in zip(bands.values(), cycle(_STYLES), strict=False):
        axes.plot(band.steps, band.mean, linewidth=1.7, **style)
        axes.fill_between(
            band.steps, band.low, band.high, color=style["color"], alpha=0.18, linewidth=0
        )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _first_at(mean: Run, goal: float) -> tuple[int, float] | None:
    """Gives the step and the accuracy of the first evaluation that is as good as the goal."""
    points = zip(*mean.curve(_ACCURACY), strict=True)
    return next((point for point in points if point[1] >= goal), None)


def _draw_reached(axes: Axes, points: Sequence[tuple[int, float] | None]) -> None:
    steps = [point and point[0] for point in points]
    for place, (point, style) in enumerate(zip(points, cycle(_STYLES), strict=False)):
        if point:
            # Those of the same step may lie on each other: the larger ones are seen behind.
            behind = steps[place + 1 :].count(point[0])
            _draw_diamond(axes, *point, style["color"], size=8 + 6 * behind)


def _draw_diamond(
    axes: Axes, step: float, accuracy: float, color: str, size: float = 8, full: bool = True
) -> None:
    face, edge = (color, "white") if full else ("white", color)
    look = dict(marker="D", color=face, markeredgecolor=edge, markersize=size)
    axes.plot(step, accuracy, **look, zorder=3, clip_on=False)


def _draw_published(axes: Axes, results: Results) -> None:
    """Draws the paper's points as hollow diamonds, at steps of our batch size."""
    per_step = PAPER_BATCH_SIZE / results[INCEPTION][0].config.train.global_batch_size
    for title, style in zip(results, cycle(_STYLES), strict=False):
        network = published.FIGURE_3[title]
        if network.steps:
            goal = published.INCEPTION_ON_IMAGENET
            _draw_diamond(axes, network.steps * per_step, goal, style["color"], full=False)
        if title == X30:
            steps, best = published.STEPS_OF_BN_X30, network.best_accuracy
            _draw_diamond(axes, steps * per_step, best, style["color"], full=False)


def _label_ends(axes: Axes, bands: Mapping[str, _Band]) -> None:
    """Writes each line's name beside its end, the names above each other as the ends are."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for (title, band), style in zip(bands.items(), cycle(_STYLES), strict=False):
        if band.steps:
            end = band.steps[-1], band.mean[-1]
            ends.append((*to_axes.transform(end), end, title, style["color"]))
    ends.sort(key=lambda end: end[1])
    # The height of a name, and the way from a line's end to it, in parts of the axes.
    height, way = 0.065, 0.09
    place = -height
    for number, (x, y, end, title, color) in enumerate(ends, start=1):
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
                arrowstyle="-", color=color, linewidth=1, shrinkA=0, shrinkB=1, relpos=(0, 0.5)
            ),
        )


# --- The words of Figure 2.


def _tell_setting(results: Results) -> str:
    inception = results[INCEPTION][0]
    config = inception.config
    width = "" if config.model.width == 1 else f" at {config.model.width:g} times its width"
    text = (
        f"Data: {escape(config.data.name)}. Network: the paper's Figure 5{width}, with the stem for"
        f" {escape(config.model.stem)}."
        f" Training: {_tell_length(inception)} Inception's learning rate begins at"
        f" {config.schedule.base_rate:g}, and the others' at the paper's multiples of it."
    )
    if config.population.when == "evaluations":
        return (
            f"{text} The BN networks are evaluated by population statistics, taken over"
            f" {config.population.num_batches} batches of the training before each evaluation."
        )
    memory = 1 / (1 - config.batch_norm.momentum)
    return (
        f"{text} The BN networks are evaluated by moving averages that remember about"
        f" {memory:,.0f} steps (momentum {config.batch_norm.momentum:g})."
    )


def _tell_length(run: Run) -> str:
    train = run.config.train
    images = train.steps * train.global_batch_size
    epochs = ""
    if run.num_train_examples:
        epochs = (
            f", which is {images / run.num_train_examples:,.1f} epochs of"
            f" {run.num_train_examples:,}"
        )
    papers = ", and ".join(
        f"{title} {steps / 1e6:.0f} million"
        f" ({steps * PAPER_BATCH_SIZE / published.NUM_TRAIN_EXAMPLES:.0f} epochs)"
        for title, steps in (
            (X30, published.STEPS_OF_BN_X30),
            (INCEPTION, published.FIGURE_3[INCEPTION].steps),
        )
    )
    return (
        f"{train.steps:,} steps of {train.global_batch_size} images{epochs}. To their best accuracy"
        f" in the paper, {papers} of {PAPER_BATCH_SIZE} images."
    )


def _tell_lines(results: Results) -> str:
    counts = sorted({len(runs) for runs in results.values()})
    if counts == [1]:
        return "Each line is a single run: what another seed would change can't be seen."
    several = " to ".join(map(str, counts))
    return f"Lines are means over {several} seeds, and the bands go from the lowest to the highest."


def _has_published(run: Run) -> bool:
    return run.config.data.name == "imagenet2012"


def _tell_published_points(run: Run) -> str:
    if not _has_published(run):
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


def _tell_diverged(results: Results) -> list[str]:
    diverged = [
        f"{title} (seed {run.config.seed}) at step {run.diverged_at:,}"
        for title, runs in results.items()
        for run in runs
        if run.diverged_at is not None
    ]
    if not diverged:
        return []
    return [
        f"**Diverged:** {', '.join(diverged)}. What was before that counts; a mean over the seeds"
        " ends where the first of them does."
    ]


# --- The words and tables of Figure 3.


def _compare_numbers(comparison: _Comparison) -> str:
    _, means, by_seed, goal = comparison
    batch = means[INCEPTION].config.train.global_batch_size
    unit = "steps" if batch == PAPER_BATCH_SIZE else f"steps of {batch} images"
    header = (
        "network",
        f"{unit} to {goal:.1%}" if math.isfinite(goal) else unit,
        f"in the paper, to {published.INCEPTION_ON_IMAGENET:.1%}",
        "times fewer than Inception",
        "in the paper",
        "best accuracy",
        "in the paper",
    )
    rows = []
    for title, mean in means.items():
        paper = published.FIGURE_3[title]
        steps, best = mean.steps_to_accuracy(goal), comparison.bands[title].best
        rows.append(
            (
                title,
                _steps(steps, [runs[title].steps_to_accuracy(goal) for runs in by_seed]),
                f"{paper.steps / 1e6:.1f} million" if paper.steps else "never",
                _times_fewer(means[INCEPTION].steps_to_accuracy(goal), steps),
                _times_fewer(published.FIGURE_3[INCEPTION].steps, paper.steps),
                f"{best:.1%}" if best else "-",
                f"{paper.best_accuracy:.1%}",
            )
        )
    return table(header, rows)


def _times_fewer(inceptions: int | None, steps: int | None) -> str:
    return f"{inceptions / steps:.1f}" if steps else "-"


def _steps(of_mean: int | None, of_seeds: Sequence[int | None]) -> str:
    """Says how many steps the mean took, and in brackets the fewest and the most of a seed."""
    low, high = (pick(of_seeds, key=lambda steps: steps or math.inf) for pick in (min, max))
    mean, low, high = ("never" if n is None else f"{n:,}" for n in (of_mean, low, high))
    return mean if mean == low == high else f"{mean} ({low} to {high})"


def _tell_terms(inception: Run, comparison: _Comparison) -> list[str]:
    """Says what the columns mean, and how fine the numbers in them can be."""
    num_seeds = len(comparison.by_seed)
    if num_seeds > 1:
        curves = f"a network's line in Figure 2, the mean over its {num_seeds} seeds"
        brackets = (
            " In brackets: the fewest and the most steps of a seed by itself to the same accuracy;"
            " the lowest and the highest accuracy of a seed at the step of the best mean."
        )
    else:
        curves, brackets = "a network's line in Figure 2, a single seed", ""
    terms = (
        f"All of it is read off {curves}. *Steps*: to the first evaluation with at least the best"
        " accuracy of Inception. *Times fewer*: Inception's steps to that, divided by the"
        f" network's. *Best accuracy*: the highest point of the line.{brackets}"
    )
    source = f"*In the paper*: {published.CITATION}, Figure 3; the ratios are those of its steps."
    if not _has_published(inception):
        source += (
            " Its networks were larger, and trained on ImageNet: what can be compared with ours is"
            " the order, and roughly the ratios, but not the steps and accuracies themselves."
        )
    if inception.config.train.global_batch_size != PAPER_BATCH_SIZE:
        source += f" Its steps are of {PAPER_BATCH_SIZE} images."
    return [terms, source, _tell_resolution(inception, comparison.goal)]


def _tell_resolution(inception: Run, accuracy: float) -> str:
    text = (
        "How fine that is: an evaluation came every"
        f" {inception.config.evaluation.every_steps:,} steps, and steps are known no better."
    )
    _, counts = inception.curve("validation/examples")
    if not counts:
        return text
    count = counts[-1]
    # Agresti and Coull's estimate, which isn't 0 where no image is mistaken.
    share = (accuracy * count + 2) / (count + 4)
    error = math.sqrt(share * (1 - share) / (count + 4))
    return (
        f"{text} There are {count:,} validation images: one of them is {100 / count:.2g}% of an"
        f" accuracy, and an accuracy such as {accuracy:.1%} on so many has a standard error of"
        f" {100 * error:.2g}% as an estimate for all images of the kind."
    )


def _describe_training(results: Results) -> str:
    header = ("network", "first learning rate", "lowest training loss", "time in training steps")
    rows = []
    for title, runs in results.items():
        rates = {rate for run in runs for rate in run.curve("train/learning_rate")[1][:1]}
        losses = [run.lowest_loss for run in runs if math.isfinite(run.lowest_loss)]
        rows.append(
            (
                title,
                ", ".join(f"{rate:.4g}" for rate in sorted(rates)) or "-",
                f"{Spread.of(losses):.2g}" if losses else "-",
                format_seconds(Spread.of(run.seconds for run in runs).mean),
            )
        )
    return table(header, rows)


# --- What Figure 3 states.

# Of the networks by title, and the accuracy to which steps are counted: 1 where a statement holds,
# -1 where the opposite does, and 0 for a tie.
_Judge = Callable[[Mapping[str, Run], float], int]


def _compare(a: float, b: float) -> int:
    return (a > b) - (a < b)


def _is_sooner(first: str, second: str) -> _Judge:
    def judge(networks: Mapping[str, Run], goal: float) -> int:
        steps = [networks[title].steps_to_accuracy(goal) or math.inf for title in (first, second)]
        return -_compare(*steps)

    return judge


def _x30_is_best(networks: Mapping[str, Run], goal: float) -> int:
    best = {title: networks[title].best_accuracy for title in published.FIGURE_3}
    return _compare(best.pop(X30), max(best.values()))


def _sigmoid_never_gets_there(networks: Mapping[str, Run], goal: float) -> int:
    return 1 if networks[X5_SIGMOID].steps_to_accuracy(goal) is None else -1


def _sigmoid_comes_close(networks: Mapping[str, Run], goal: float) -> int:
    return _compare(networks[X5_SIGMOID].best_accuracy, 0.9 * goal)


_STATEMENTS = {
    f"{BASELINE} reaches Inception's best accuracy in fewer steps than it": _is_sooner(
        BASELINE, INCEPTION
    ),
    f"{X5} reaches it in fewer steps than {BASELINE}": _is_sooner(X5, BASELINE),
    f"{X30} reaches it in fewer steps than {BASELINE}": _is_sooner(X30, BASELINE),
    f"{X30} reaches it later than {X5}": _is_sooner(X5, X30),
    f"{X30} alone has the best accuracy": _x30_is_best,
    f"{X5_SIGMOID} never reaches Inception's best": _sigmoid_never_gets_there,
    f"{X5_SIGMOID} gets beyond nine tenths of it (in the paper to 97%)": _sigmoid_comes_close,
}

_AS_IN_THE_PAPER = "as in the paper"
_OTHERWISE = "otherwise than in the paper"
_TIE = "a tie, other than in the paper"
_SEEDS_DISAGREE = "within the spread of the seeds"


class _Outcome(NamedTuple):
    """What became of a statement.

    Attributes:
      verdict: one of the four.
      num_seeds: in how many it holds.
    """

    verdict: str
    num_seeds: int


def _judge(comparison: _Comparison) -> dict[str, _Outcome]:
    """Judges each statement; none where one of the five networks is missing."""
    if published.FIGURE_3.keys() - comparison.means.keys():
        return {}
    judged = {}
    for statement, judge in _STATEMENTS.items():
        of_seeds = [judge(networks, comparison.goal) for networks in comparison.by_seed]
        of_all = {judge(comparison.means, comparison.goal), *of_seeds}
        verdicts = {1: _AS_IN_THE_PAPER, 0: _TIE, -1: _OTHERWISE}
        verdict = verdicts[of_all.pop()] if len(of_all) == 1 else _SEEDS_DISAGREE
        judged[statement] = _Outcome(verdict, of_seeds.count(1))
    return judged


def _tell_order(comparison: _Comparison) -> str:
    verdicts = [outcome.verdict for outcome in _judge(comparison).values()]
    if not verdicts:
        return "**The order isn't compared with the paper's:** one of its five networks is missing."
    if set(verdicts) == {_AS_IN_THE_PAPER}:
        says = "is the paper's"
    elif set(verdicts) == {_AS_IN_THE_PAPER, _SEEDS_DISAGREE}:
        says = "is the paper's as far as the seeds agree"
    else:
        says = "is not the paper's in all respects"
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    return (
        f"**The order of the five networks {says}.** Of {len(verdicts)} statements that the paper's"
        f" Figure 3 makes: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}."
    )


def _compare_statements(comparison: _Comparison) -> list[str]:
    rows = [
        (statement, outcome.verdict, f"{outcome.num_seeds} of {len(comparison.by_seed)} seeds")
        for statement, outcome in _judge(comparison).items()
    ]
    if not rows:
        return []
    note = (
        f"*{_SEEDS_DISAGREE.capitalize()}*: the lines of Figure 2 and the seeds by themselves don't"
        " all say the same."
    )
    return [
        "### What the paper's Figure 3 states, one by one",
        table(("statement", "here", "holds in"), rows, left=2),
        *([note] if any(_SEEDS_DISAGREE in row for row in rows) else []),
    ]
