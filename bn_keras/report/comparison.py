"""The paper's Figure 3: steps and best accuracy of its five networks, beside its own numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import BASELINE, INCEPTION, X5, X5_SIGMOID, X30
from bn_keras.report import published, verdicts
from bn_keras.report.page import Section, table, tell_diverged
from bn_keras.runs.history import ACCURACY, Results, Run, Spread, over_seeds
from bn_keras.training.schedule import PAPER_BATCH_SIZE


class Comparison(NamedTuple):
    """The paper's networks beside each other, in its order: the mean over the seeds, and each seed.

    Attributes:
      results: of those of the five that were trained; of no other.
      bands: their validation accuracies, by title and by step.
      by_seed: for each seed that all networks were trained with, the run of each, by title.
      goal: the highest point of Inception's mean, to which steps are counted; infinite where it
        has none, so that nothing gets there.
    """

    results: Results
    bands: Mapping[str, Mapping[int, Spread]]
    by_seed: Sequence[Mapping[str, Run]]
    goal: float

    @classmethod
    def of(cls, results: Results) -> "Comparison":
        """Raises UsageError if there is no Inception, or no seed that all of them have."""
        if not results.get(INCEPTION):
            raise UsageError(
                f"Figures 2 and 3 measure by {INCEPTION}, of which there is no run: train it beside"
                f" {', '.join(results) or 'the others'}"
            )
        results = {title: results[title] for title in published.FIGURE_3 if results.get(title)}
        runs = {title: {run.config.seed: run for run in seeds} for title, seeds in results.items()}
        seeds = sorted(set.intersection(*map(set, runs.values())))
        if not seeds:
            theirs = "; ".join(f"{title}: {sorted(of_title)}" for title, of_title in runs.items())
            raise UsageError(f"there is no seed that all networks were trained with: {theirs}")
        by_seed = [{title: runs[title][seed] for title in runs} for seed in seeds]
        bands = {title: over_seeds(seeds, ACCURACY) for title, seeds in results.items()}
        goal = max((spread.mean for spread in bands[INCEPTION].values()), default=math.inf)
        return cls(results, bands, by_seed, goal)

    def steps_to_goal(self, title: str) -> int | None:
        """First evaluated step at which the mean is at least the goal."""
        points = self.bands[title].items()
        return next((step for step, spread in points if spread.mean >= self.goal), None)

    def best(self, title: str) -> Spread | None:
        """The accuracies at the step at which their mean is highest, if there is one."""
        return max(self.bands[title].values(), key=lambda spread: spread.mean, default=None)


def figure_3(results: Results) -> Section:
    """Makes the table of steps and best accuracies, and tests what the paper's says.

    The table's numbers are those of the lines of `figure_2`, the means over the seeds; the
    statements are tested by the networks of each seed.

    Args:
      results: of Inception and others of the paper's five networks; of more, which are left out.

    Raises:
      UsageError: Inception is missing, or there is no seed that all networks were trained with.

    Source: Ioffe & Szegedy 2015, Figure 3.
    """
    comparison = Comparison.of(results)
    statements = _test_statements(comparison)
    body = [
        _tell_verdicts(comparison, statements),
        "### Steps and accuracy",
        _compare_numbers(comparison),
        *_tell_terms(comparison),
        *_tabulate_statements(statements),
        "### The training of each network",
        _describe_training(comparison.results),
        *tell_diverged(comparison.results),
    ]
    return Section("Figure 3: steps and best accuracy", "\n\n".join(body))


def figure_3_row(run: Run) -> str:
    """Gives a run's row of Figure 3 in words.

    Its best accuracy, and the steps to config.train.until_accuracy or, on ImageNet, to the 72.2%
    by which the paper measures; steps also as those of the paper's batch size.
    """
    batch = run.config.train.global_batch_size
    best, target = run.best_accuracy, run.config.train.until_accuracy
    if not target and published.is_comparable(run):
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


# --- The numbers.


def _compare_numbers(comparison: Comparison) -> str:
    goal = comparison.goal
    batch = comparison.results[INCEPTION][0].config.train.global_batch_size
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
    inceptions = comparison.steps_to_goal(INCEPTION)
    rows = []
    for title in comparison.results:
        paper = published.FIGURE_3[title]
        steps, best = comparison.steps_to_goal(title), comparison.best(title)
        of_seeds = [runs[title].steps_to_accuracy(goal) for runs in comparison.by_seed]
        rows.append(
            (
                title,
                _format_steps(steps, of_seeds),
                f"{paper.steps / 1e6:.1f} million" if paper.steps else "never",
                _times_fewer(inceptions, steps),
                _times_fewer(published.FIGURE_3[INCEPTION].steps, paper.steps),
                f"{best:.1%}" if best else "-",
                f"{paper.best_accuracy:.1%}",
            )
        )
    return table(header, rows)


def _times_fewer(inceptions: int | None, steps: int | None) -> str:
    return f"{inceptions / steps:.1f}" if steps else "-"


def _format_steps(of_mean: int | None, of_seeds: Sequence[int | None]) -> str:
    """Says how many steps the mean took, and in brackets the fewest and the most of a seed."""
    low, high = (pick(of_seeds, key=lambda steps: steps or math.inf) for pick in (min, max))
    mean, low, high = ("never" if n is None else f"{n:,}" for n in (of_mean, low, high))
    return mean if mean == low == high else f"{mean} ({low} to {high})"


def _tell_terms(comparison: Comparison) -> list[str]:
    """Says what the columns mean, and how fine the numbers in them can be."""
    inception, num_seeds = comparison.results[INCEPTION][0], len(comparison.by_seed)
    if num_seeds > 1:
        curves = "a network's line in Figure 2, the mean over its seeds"
        brackets = (
            " In brackets: the fewest and the most steps of a seed by itself to the same accuracy;"
            " the lowest and the highest accuracy of a seed at the step of the best mean."
        )
    else:
        curves, brackets = "a network's line in Figure 2, a single seed", ""
    terms = (
        f"*Steps* are those after which {curves}, is first as high as Inception's highest point;"
        " *never* is not within these runs. *Times fewer*: Inception's steps divided by the"
        f" network's. *Best accuracy*: the highest point of the line.{brackets}"
    )
    if comparison.steps_to_goal(INCEPTION) == max(comparison.bands[INCEPTION], default=None):
        terms += (
            " Inception is best at its last evaluation: longer runs would have a higher goal, and"
            " other ratios."
        )
    source = f"*In the paper*: {published.CITATION}, Figure 3; the ratios are those of its steps."
    if not published.is_comparable(inception):
        source += (
            " Its networks were larger, and trained on ImageNet: compare the order, and roughly the"
            " ratios, but not the steps and accuracies themselves."
        )
    if inception.config.train.global_batch_size != PAPER_BATCH_SIZE:
        source += f" Its steps are of {PAPER_BATCH_SIZE} images."
    return [terms, source, _tell_resolution(inception, comparison.goal)]


def _tell_resolution(inception: Run, accuracy: float) -> str:
    text = (
        f"An evaluation came every {inception.config.evaluation.every_steps:,} steps, so that steps"
        " are known no better."
    )
    counts = inception.curve("validation/examples").values()
    if not counts:
        return text
    return (
        f"{text} An accuracy of {accuracy:.1%} on {max(counts):,} validation images has a standard"
        f" error of {100 * inception.standard_error(accuracy):.2g} points."
    )


def _describe_training(results: Results) -> str:
    header = ("network", "first learning rate", "lowest training loss")
    rows = []
    for title, runs in results.items():
        rates = {_first_rate(run) for run in runs} - {None}
        losses = [run.lowest_loss for run in runs if math.isfinite(run.lowest_loss)]
        rows.append(
            (
                title,
                ", ".join(f"{rate:.4g}" for rate in sorted(rates)) or "-",
                f"{Spread.of(losses):#.3g}" if losses else "-",
            )
        )
    return table(header, rows)


def _first_rate(run: Run) -> float | None:
    return next(iter(run.curve("train/learning_rate").values()), None)


# --- What Figure 3 states.

# Of a seed's networks by title, and the accuracy to which steps are counted.
_Holds = Callable[[Mapping[str, Run], float], bool]


def _is_sooner(first: str, second: str) -> _Holds:
    def holds(networks: Mapping[str, Run], goal: float) -> bool:
        steps, others = (networks[title].steps_to_accuracy(goal) for title in (first, second))
        return steps is not None and (others is None or steps < others)

    return holds


def _x30_is_best(networks: Mapping[str, Run], goal: float) -> bool:
    best = {title: networks[title].best_accuracy for title in published.FIGURE_3}
    return best.pop(X30) > max(best.values())


def _sigmoid_never_gets_there(networks: Mapping[str, Run], goal: float) -> bool:
    return networks[X5_SIGMOID].steps_to_accuracy(goal) is None


def _sigmoid_comes_close(networks: Mapping[str, Run], goal: float) -> bool:
    return networks[X5_SIGMOID].best_accuracy > 0.9 * goal


_STATEMENTS: Mapping[str, _Holds] = {
    f"{BASELINE} reaches Inception's best accuracy in fewer steps than Inception": _is_sooner(
        BASELINE, INCEPTION
    ),
    f"{X5} reaches it in fewer steps than {BASELINE}": _is_sooner(X5, BASELINE),
    f"{X30} reaches it in fewer steps than {BASELINE}": _is_sooner(X30, BASELINE),
    f"{X30} reaches it later than {X5}": _is_sooner(X5, X30),
    f"{X30} alone has the best accuracy": _x30_is_best,
    f"{X5_SIGMOID} never reaches Inception's best": _sigmoid_never_gets_there,
    f"{X5_SIGMOID} gets beyond nine tenths of it (in the paper to 97%)": _sigmoid_comes_close,
}


def _test_statements(comparison: Comparison) -> dict[str, list[bool]]:
    """Tells whether each holds, seed by seed; nothing where one of the five is missing."""
    if published.FIGURE_3.keys() - comparison.results.keys():
        return {}
    return {
        statement: [holds(networks, comparison.goal) for networks in comparison.by_seed]
        for statement, holds in _STATEMENTS.items()
    }


def _tell_verdicts(comparison: Comparison, statements: Mapping[str, Sequence[bool]]) -> str:
    if not statements:
        missing = [title for title in published.FIGURE_3 if title not in comparison.results]
        return f"**What the paper's Figure 3 states isn't tested:** no run of {', '.join(missing)}."
    counts = verdicts.count(map(verdicts.judge, statements.values()))
    return f"**{len(statements)} statements of the paper's Figure 3; {counts}.**"


def _tabulate_statements(statements: Mapping[str, Sequence[bool]]) -> list[str]:
    if not statements:
        return []
    heading = "### What the paper's Figure 3 states, one by one"
    return [heading, verdicts.tabulate(statements)]
