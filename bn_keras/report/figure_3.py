"""Figure 3 of the paper: steps and best accuracy of its five networks, beside its own numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bn_keras.experiments.titles import BASELINE, INCEPTION, X5, X5_SIGMOID, X30
from bn_keras.report import published
from bn_keras.report.five_networks import FiveNetworks
from bn_keras.report.margins import reaches_sooner, tie_margin
from bn_keras.report.plots import FIGURE_WIDTH, draw_curves, label_lines
from bn_keras.report.sections import (
    Section,
    describe_divergence,
    join_words,
    markdown_table,
)
from bn_keras.report.verdicts import (
    Outcome,
    count_verdicts,
    exceeds,
    explain_verdicts,
    judge,
    tabulate_verdicts,
)
from bn_keras.runs.history import LOSS, Results, Run, Spread, over_seeds
from bn_keras.runs.metrics_log import ACCURACY
from bn_keras.training.networks import value_of
from bn_keras.training.schedule import PAPER_BATCH_SIZE


def build_figure_3(results: Results) -> Section:
    """Builds the table of steps and best accuracies, and tests the paper's statements about it.

    The table describes the lines of Figure 2, which are means over seeds. The statements are tested
    seed by seed.

    Args:
      results: runs of Inception and others of the five networks; other titles are ignored.

    Raises:
      UsageError: Inception is missing, or no seed is shared by all networks.

    Source: Ioffe & Szegedy 2015, Figure 3.
    """
    networks = FiveNetworks.select(results)
    outcomes = _test_statements(networks)
    figure = Figure(figsize=(FIGURE_WIDTH, 3.2), layout="constrained")
    _draw_loss(figure.subplots(), networks.results)
    body = [
        compare_numbers(networks),
        *_explain_terms(networks),
        "### The paper's statements",
        tabulate_verdicts(outcomes) if outcomes else _name_missing(networks),
        *([explain_verdicts(len(networks.by_seed)), *_explain_bias(networks)] if outcomes else []),
        "### Training of each network",
        _describe_training(networks.results),
        "![Training loss of the networks against steps](figure_3_loss.svg)",
        "Training loss. Each point is a mean over the steps since the previous point."
        f"{_mention_dropout(networks.results)}",
        *describe_divergence(networks.results),
    ]
    return Section(
        "Figure 3: steps and best accuracy",
        "\n\n".join(body),
        {"figure_3_loss.svg": figure},
        _summarize(networks, outcomes),
    )


def describe_accuracy(run: Run) -> str:
    """Describes one run as Figure 3 does: best accuracy, and steps to a target accuracy.

    The target is config.train.until_accuracy or, on ImageNet, the paper's 72.2%. Steps are also
    converted to the paper's batch size if the run has another.
    """
    batch = run.config.train.global_batch_size
    best, target = run.best_accuracy, run.config.train.until_accuracy
    if not target and published.is_comparable(run):
        target = published.INCEPTION_ACCURACY
    parts = [
        f"best validation accuracy {best:.2%} {_describe_step(run.steps_to_accuracy(best), batch)}"
    ]
    if target:
        parts.append(f"target {target:.1%} {_describe_step(run.steps_to_accuracy(target), batch)}")
    return ", ".join(parts)


def _describe_step(step: int | None, batch: int) -> str:
    if step is None:
        return "not reached"
    if batch == PAPER_BATCH_SIZE:
        return f"at step {step:,}"
    paper_steps = step * batch / PAPER_BATCH_SIZE
    return f"at step {step:,} ({paper_steps:,.0f} steps of {PAPER_BATCH_SIZE})"


# --- Numbers.


def compare_numbers(networks: FiveNetworks) -> str:
    """Returns the table of steps, speedups and best accuracies beside the paper's."""
    target, batch = networks.target, networks.global_batch_size
    unit = "steps" if batch == PAPER_BATCH_SIZE else f"steps of {batch} images"
    header = (
        "network",
        f"{unit} to {target:.1%}" if math.isfinite(target) else unit,
        f"paper: steps to {published.INCEPTION_ACCURACY:.1%}",
        "speedup over Inception",
        "paper: speedup",
        "best accuracy",
        "paper: best accuracy",
    )
    inception_steps = networks.steps_to_target(INCEPTION)
    rows = []
    for title, seeds in networks.results.items():
        paper = published.FIGURE_3[title]
        steps, best = networks.steps_to_target(title), networks.best(title)
        steps_by_seed = [run.steps_to_accuracy(target) for run in seeds]
        rows.append(
            (
                title,
                _format_steps(steps, steps_by_seed),
                f"{paper.steps / 1e6:.1f} million" if paper.steps else "never",
                _format_speedup(inception_steps, steps),
                _format_speedup(published.INCEPTION_STEPS, paper.steps),
                f"{best:.1%}" if best else "-",
                f"{paper.best_accuracy:.1%}",
            )
        )
    return markdown_table(header, rows)


def _format_speedup(inception_steps: int | None, steps: int | None) -> str:
    return f"{inception_steps / steps:.1f}" if inception_steps and steps else "-"


def _format_steps(mean: int | None, by_seed: Sequence[int | None]) -> str:
    """Formats the steps of the mean, with the fewest and most steps of a seed in parentheses."""
    counts = [math.inf if steps is None else steps for steps in by_seed]
    middle, low, high = (
        "never" if steps is None or math.isinf(steps) else f"{steps:,}"
        for steps in (mean, min(counts), max(counts))
    )
    return middle if middle == low == high else f"{middle} ({low} to {high})"


def _explain_terms(networks: FiveNetworks) -> list[str]:
    """Explains the columns, the source of the paper's numbers, and the resolution of ours."""
    inception = networks.results[INCEPTION][0]
    line, parentheses = "single seed", ""
    if any(len(seeds) > 1 for seeds in networks.results.values()):
        line = "mean over its seeds"
        parentheses = (
            " In parentheses: the fewest and the most steps of any seed to the same accuracy, and"
            " the lowest and the highest accuracy of any seed at the step with the best mean."
        )
    terms = (
        f"*Steps*: training steps until a network's line in Figure 2 ({line}) first reaches"
        " Inception's highest point; *never*: not within these runs. *Speedup*: Inception's steps"
        " divided by the network's. *Best accuracy*: highest point of the line, among all"
        f" evaluations on the validation images, as in the paper.{parentheses}"
    )
    if _is_still_rising(networks):
        terms += (
            " Inception is best at its last evaluation: a longer run of Inception would raise the"
            " target accuracy and change the speedups."
        )
    source = f"*Paper*: {published.CITATION}, Figure 3. Speedups are computed from its steps."
    if not published.is_comparable(inception):
        source += (
            " The paper's networks are larger and were trained on ImageNet: compare which networks"
            " are faster and more accurate than Inception, not the numbers."
        )
    if networks.global_batch_size != PAPER_BATCH_SIZE:
        source += f" The paper's steps are steps of {PAPER_BATCH_SIZE} images."
    return [terms, source, _describe_resolution(inception, networks.target)]


def _is_still_rising(networks: FiveNetworks) -> bool:
    """Returns whether Inception is best at its last evaluation."""
    steps = networks.steps_to_target(INCEPTION)
    return steps is not None and steps == max(networks.bands[INCEPTION])


def _describe_resolution(inception: Run, accuracy: float) -> str:
    text = (
        f"Networks are evaluated every {inception.config.evaluation.every_steps:,} steps, so step"
        " counts are no finer than that."
    )
    counts = inception.curve("validation/examples").values()
    if not counts or not math.isfinite(accuracy):
        return text
    error = 100 * inception.standard_error(accuracy)
    return (
        f"{text} An accuracy of {accuracy:.1%} on {max(counts):,} validation images has a standard"
        f" error of {error:.2g} percentage points; for the difference of two such accuracies, it is"
        f" {math.sqrt(2) * error:.2g}."
    )


def _explain_bias(networks: FiveNetworks) -> list[str]:
    """Returns a sentence on moving averages; none with population statistics."""
    runs = [run for seeds in networks.results.values() for run in seeds]
    if all(run.config.population.when == "evaluations" for run in runs):
        return []
    return [
        "Statements that compare two networks with BN rest on moving averages, which are too low at"
        " high learning rates: population statistics might change these verdicts."
    ]


def _describe_training(results: Results) -> str:
    header = (
        "network",
        "first logged learning rate",
        "last logged learning rate",
        "lowest training loss",
        "last accuracy",
    )
    rows = []
    for title, runs in results.items():
        rates, accuracies = (
            [list(curve.values()) for run in runs if (curve := run.curve(key))]
            for key in ("train/learning_rate", ACCURACY)
        )
        losses = [run.lowest_loss for run in runs if math.isfinite(run.lowest_loss)]
        rows.append(
            (
                title,
                _list_rates(curve[0] for curve in rates),
                _list_rates(curve[-1] for curve in rates),
                f"{Spread.of(losses):#.3g}" if losses else "-",
                f"{statistics.mean(curve[-1] for curve in accuracies):.1%}" if accuracies else "-",
            )
        )
    return markdown_table(header, rows)


def _list_rates(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:.4g}" for rate in sorted(set(rates))) or "-"


def _mention_dropout(results: Results) -> str:
    titles = [t for t, runs in results.items() if value_of(runs[0].config, "model.dropout")]
    if not titles or len(titles) == len(results):
        return ""
    return f" Dropout raises the training loss of these networks: {', '.join(titles)}."


def _draw_loss(axes: Axes, results: Results) -> None:
    bands = {title: over_seeds(runs, LOSS) for title, runs in results.items()}
    draw_curves(axes, bands)
    axes.set(xlabel="training steps", ylabel="training loss")
    if any(bands.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    label_lines(axes, bands)


# --- Statements.

# Returns the outcome of a statement for one seed's runs by title, and the target accuracy.
_Test = Callable[[Mapping[str, Run], float], Outcome]


def _is_faster(first: str, second: str) -> _Test:
    return lambda runs, target: reaches_sooner(runs[first], runs[second], target)


def _x30_is_best(runs: Mapping[str, Run], target: float) -> Outcome:
    others = [runs[title] for title in published.FIGURE_3 if title != X30]
    best = max(others, key=lambda run: run.best_accuracy)
    return exceeds(runs[X30].best_accuracy - best.best_accuracy, tie_margin(runs[X30], best))


def _sigmoid_misses_target(runs: Mapping[str, Run], target: float) -> Outcome:
    sigmoid = runs[X5_SIGMOID]
    return exceeds(target - sigmoid.best_accuracy, tie_margin(sigmoid, runs[INCEPTION]))


_STATEMENTS: Mapping[str, _Test] = {
    **{
        f"{first} reaches Inception's best accuracy in fewer steps than {second}": _is_faster(
            first, second
        )
        for first, second in ((BASELINE, INCEPTION), (X5, BASELINE), (X30, BASELINE), (X5, X30))
    },
    f"{X30} has the highest best accuracy of the five": _x30_is_best,
    f"{X5_SIGMOID} never reaches Inception's best accuracy": _sigmoid_misses_target,
}


def _test_statements(networks: FiveNetworks) -> dict[str, list[Outcome]]:
    """Tests each statement seed by seed; returns no outcomes if one of the five is missing."""
    if published.FIGURE_3.keys() - networks.results.keys():
        return {}
    return {
        statement: [test(runs, networks.target) for runs in networks.by_seed]
        for statement, test in _STATEMENTS.items()
    }


def _name_missing(networks: FiveNetworks) -> str:
    missing = [title for title in published.FIGURE_3 if title not in networks.results]
    return f"The paper's statements are not tested: no run of {', '.join(missing)}."


# --- Summary.


def _summarize(networks: FiveNetworks, outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Summarizes the results in up to three sentences."""
    parts = [*describe_fastest(networks), *_describe_best(networks)]
    if outcomes:
        counts = count_verdicts(map(judge, outcomes.values()))
        parts.append(f"Of {len(outcomes)} statements of the paper's Figure 3, {counts}.")
    return " ".join(parts)


def describe_fastest(networks: FiveNetworks) -> list[str]:
    """Compares the networks that first reach Inception's best accuracy with Inception."""
    steps = {t: s for t in networks.results if (s := networks.steps_to_target(t)) is not None}
    if len(steps) < 2:
        return []
    fewest = min(steps.values())
    fastest = [title for title in steps if steps[title] == fewest]
    if INCEPTION in fastest:
        return ["No network with BN reaches Inception's best accuracy sooner than Inception."]
    verb = "reaches" if len(fastest) == 1 else "reach"
    speedup = _format_speedup(steps[INCEPTION], fewest)
    paper = [published.FIGURE_3[title].steps for title in fastest]
    speedups = [f"{published.INCEPTION_STEPS / s:.1f}" if s else "never" for s in paper]
    still_rising = "; Inception still improves at its end" if _is_still_rising(networks) else ""
    return [
        f"{join_words(fastest)} {verb} Inception's best accuracy, {networks.target:.1%}, in"
        f" {fewest:,} steps instead of {steps[INCEPTION]:,}, a speedup of {speedup}"
        f" (paper: {join_words(speedups)}){still_rising}."
    ]


def _describe_best(networks: FiveNetworks) -> list[str]:
    """Compares the most accurate network with Inception."""
    best = {t: spread.mean for t in networks.results if (spread := networks.best(t))}
    if len(best) < 2 or INCEPTION not in best:
        return []
    paper = {title: result.best_accuracy for title, result in published.FIGURE_3.items()}
    ours, theirs = (_compare_with_inception(accuracies) for accuracies in (best, paper))
    return [f"Best accuracies: {ours} (paper: {theirs})."]


def _compare_with_inception(accuracies: Mapping[str, float]) -> str:
    """Names the highest accuracy, and Inception's if it is another."""
    first = max(accuracies, key=lambda title: accuracies[title])
    titles = dict.fromkeys((first, INCEPTION))
    return join_words(f"{title} with {accuracies[title]:.1%}" for title in titles)
