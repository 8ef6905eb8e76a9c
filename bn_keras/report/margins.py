"""When one network is better than another, by more than its seeds differ."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bn_keras.report.page import escape
from bn_keras.report.verdicts import FAILS, HOLDS, UNDECIDED, WITHIN_SPREAD
from bn_keras.runs.history import ACCURACY, Results, Run, Spread
from bn_keras.runs.workdir import Workdir


class NotRunError(Exception):
    """A run is missing, or has no number where one is needed; the text says which."""


def ended_runs(results: Results, title: str) -> Sequence[Run]:
    """Gives a network's runs, each of them at its end; raises NotRunError."""
    runs = results.get(title, ())
    if not runs:
        raise NotRunError(f"{escape(title)}: no run")
    if not all(run.diverged_at or Workdir.FINISHED in _last(run) for run in runs):
        raise NotRunError(f"{escape(title)}: not at its end")
    return runs


def _last(run: Run) -> Mapping[str, object]:
    return run.metrics[-1] if run.metrics else {}


def common_steps(*runs: Run) -> int:
    """Gives the length of the shortest: the others' first part is compared with it."""
    return min(run.config.train.steps for run in runs)


def best_by(run: Run, step: int) -> float:
    """Gives the best accuracy up to a step; 0 if the run diverged by then; raises NotRunError."""
    if _has_diverged(run, step):
        return 0.0
    accuracy_at(run, step)
    return max(accuracy for at, accuracy in run.curve(ACCURACY).items() if at <= step)


def accuracy_at(run: Run, step: int) -> float:
    """Gives the accuracy of the evaluation at a step; raises NotRunError."""
    accuracies = run.curve(ACCURACY)
    if step not in accuracies:
        raise NotRunError(f"{escape(run.title)}: no evaluation at step {step:,}")
    return accuracies[step]


def _has_diverged(run: Run, until: int) -> bool:
    return run.diverged_at is not None and run.diverged_at <= until


class Group(NamedTuple):
    """What the seeds of one network reach up to some step.

    Attributes:
      title: of the network.
      accuracies: one a seed; 0 where it diverged.
      standard_error: the highest of those of its accuracies.
      num_diverged: how many seeds did.
    """

    title: str
    accuracies: list[float]
    standard_error: float
    num_diverged: int

    @classmethod
    def of(cls, runs: Sequence[Run], step: int) -> "Group":
        """Raises NotRunError where a run has no evaluation at the step."""
        accuracies = [best_by(run, step) for run in runs]
        error = max(map(Run.standard_error, runs, accuracies))
        return cls(runs[0].title, accuracies, error, sum(_has_diverged(r, step) for r in runs))

    @property
    def spread(self) -> float:
        """How far the best seed is above the worst."""
        return max(self.accuracies) - min(self.accuracies)

    def __str__(self) -> str:
        count, title = len(self.accuracies), escape(self.title)
        if self.num_diverged == count:
            return f"{title} diverged"
        note = f", {self.num_diverged} of {count} diverged" if self.num_diverged else ""
        return f"{title} {Spread.of(self.accuracies):.1%}{note}"


def margin_of(groups: Sequence[Group]) -> float | None:
    """Gives the gap from which two groups differ; None where there is no second seed in either.

    It is the wider of the spreads over the seeds, and at least the standard error of an accuracy.
    """
    if all(len(group.accuracies) == 1 for group in groups):
        return None
    return max(max(group.spread, group.standard_error) for group in groups)


class Difference(NamedTuple):
    """How far a first network is ahead of a second.

    Attributes:
      measured: in words, as Markdown.
      gap: from the worst seed of the one to the best of the other: above 0 where all seeds of the
        first are better than all of the second, below 0 where all are worse, else 0.
      margin: as `margin_of`.
    """

    measured: str
    gap: float
    margin: float | None

    @property
    def verdict(self) -> str:
        """Whether the first is better."""
        if self.margin is None:
            return UNDECIDED
        if abs(self.gap) <= self.margin:
            return WITHIN_SPREAD
        return HOLDS if self.gap > 0 else FAILS

    @property
    def resolution(self) -> str:
        """Why it may not be decided."""
        if self.margin is None:
            return "There is one seed of each: what another one would change isn't known."
        if self.verdict == WITHIN_SPREAD:
            return f"Differences below {points(self.margin)} can't be decided by these runs."
        return ""


def compare(results: Results, title: str, other: str) -> Difference:
    """Compares two networks up to the end of the shorter of their runs; raises NotRunError."""
    runs = ended_runs(results, title), ended_runs(results, other)
    step = common_steps(*runs[0], *runs[1])
    first, second = groups = [Group.of(of_title, step) for of_title in runs]
    margin = margin_of(groups)
    measured = f"by step {step:,}: {first}, {second}"
    if margin is not None:
        measured += f"; margin {points(margin)}"
    ahead = min(first.accuracies) - max(second.accuracies)
    behind = min(second.accuracies) - max(first.accuracies)
    return Difference(measured, max(ahead, 0) - max(behind, 0), margin)


def points(difference: float) -> str:
    """Formats a difference of accuracies."""
    return f"{100 * difference:.1f} points"
