"""Compares networks by accuracy: a difference counts if it exceeds the margin between seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from bn_keras.report.sections import escape
from bn_keras.report.verdicts import FAILS, HOLDS, NO_VERDICT, TOO_CLOSE, Outcome
from bn_keras.runs.history import ACCURACY, Results, Run, Spread


class NotRunError(Exception):
    """A comparison lacks a run, or a number of a run; the message names it."""


def ended_runs(results: Results, title: str) -> Sequence[Run]:
    """Returns a network's runs; raises NotRunError unless each has finished or diverged."""
    runs = results.get(title, ())
    if not runs:
        raise NotRunError(f"{escape(title)}: no run")
    if not all(run.diverged_at is not None or run.is_finished for run in runs):
        raise NotRunError(f"{escape(title)}: unfinished")
    return runs


def common_steps(*runs: Run) -> int:
    """Returns the length of the shortest run in steps, up to which the runs are compared."""
    return min(run.config.train.steps for run in runs)


def best_accuracy_by(run: Run, step: int) -> float:
    """Returns the best accuracy up to a step, or 0 if the run diverged by then.

    Raises:
      NotRunError: the run has no evaluation at the step.
    """
    if _has_diverged(run, step):
        return 0.0
    accuracy_at(run, step)
    return max(accuracy for at, accuracy in run.curve(ACCURACY).items() if at <= step)


def accuracy_at(run: Run, step: int) -> float:
    """Returns the accuracy at a step; raises NotRunError if there was no evaluation."""
    accuracies = run.curve(ACCURACY)
    if step not in accuracies:
        raise NotRunError(f"{escape(run.title)}: no evaluation at step {step:,}")
    return accuracies[step]


def reaches_sooner(run: Run, other: Run, accuracy: float) -> Outcome:
    """Returns whether a run reaches an accuracy in fewer steps than another.

    Equal numbers of steps are a tie, since evaluations are that far apart.
    """
    steps = run.steps_to_accuracy(accuracy)
    if steps is not None and steps == other.steps_to_accuracy(accuracy):
        return None
    return run.is_faster(other, accuracy)


def _has_diverged(run: Run, step: int) -> bool:
    return run.diverged_at is not None and run.diverged_at <= step


class Group(NamedTuple):
    """Best accuracies of a network's seeds up to some step.

    Attributes:
      title: title of the network.
      accuracies: one per seed; 0 if it diverged.
      standard_error: highest standard error of the accuracies.
      num_diverged: number of diverged seeds.
    """

    title: str
    accuracies: list[float]
    standard_error: float
    num_diverged: int

    @classmethod
    def of(cls, runs: Sequence[Run], step: int) -> "Group":
        """Builds the group of a network's runs; raises NotRunError as `best_accuracy_by` does."""
        accuracies = [best_accuracy_by(run, step) for run in runs]
        error = max(map(Run.standard_error, runs, accuracies))
        return cls(runs[0].title, accuracies, error, sum(_has_diverged(r, step) for r in runs))

    @property
    def range(self) -> float:
        """Accuracy of the best seed minus that of the worst."""
        return max(self.accuracies) - min(self.accuracies)

    def __str__(self) -> str:
        count, title = len(self.accuracies), escape(self.title)
        if self.num_diverged == count:
            return f"{title} diverged"
        note = f", {self.num_diverged} of {count} diverged" if self.num_diverged else ""
        return f"{title} {Spread.of(self.accuracies):.1%}{note}"


def margin_of(groups: Sequence[Group]) -> float | None:
    """Computes the gap above which groups differ; None if no group has a second seed.

    It is the widest range over seeds, and at least the standard error of an accuracy.
    """
    if all(len(group.accuracies) == 1 for group in groups):
        return None
    return max(max(group.range, group.standard_error) for group in groups)


class Difference(NamedTuple):
    """Difference between two networks, tested against a margin.

    Attributes:
      accuracies: description of the networks' accuracies, Markdown.
      gap: signed difference; positive if it supports the claim.
      margin: see `margin_of`.
    """

    accuracies: str
    gap: float
    margin: float | None

    @property
    def measured(self) -> str:
        """Accuracies and margin, Markdown."""
        margin = "" if self.margin is None else f"; margin {format_points(self.margin)}"
        return f"{self.accuracies}{margin}"

    @property
    def verdict(self) -> str:
        """Verdict on the claim."""
        if self.margin is None:
            return NO_VERDICT
        if abs(self.gap) <= self.margin:
            return TOO_CLOSE
        return HOLDS if self.gap > 0 else FAILS

    @property
    def resolution(self) -> str:
        """Sentence on what these runs cannot resolve; empty if the verdict is clear."""
        if self.margin is None:
            return "With one seed of each network, the variation between seeds is unknown."
        if self.verdict == TOO_CLOSE:
            return f"These runs cannot resolve differences below {format_points(self.margin)}."
        return ""


def compare(results: Results, title: str, other: str) -> Difference:
    """Tests whether a network is better than another, up to the end of the shorter runs.

    The gap is the distance between the nearest two seeds, one of each network; 0 if they overlap.

    Raises:
      NotRunError: a run is missing or unfinished, or has no evaluation at that step.
    """
    runs = ended_runs(results, title), ended_runs(results, other)
    step = common_steps(*runs[0], *runs[1])
    first, second = groups = [Group.of(seeds, step) for seeds in runs]
    ahead = min(first.accuracies) - max(second.accuracies)
    behind = min(second.accuracies) - max(first.accuracies)
    accuracies = f"by step {step:,}: {first}, {second}"
    return Difference(accuracies, max(ahead, 0) - max(behind, 0), margin_of(groups))


def format_points(difference: float) -> str:
    """Formats a difference between accuracies in percentage points."""
    return f"{100 * difference:.1f} points"
