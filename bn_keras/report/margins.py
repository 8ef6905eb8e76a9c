"""Compares networks by accuracy: a difference counts if seeds alone hardly explain it."""

import contextlib
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import scipy.stats

from bn_keras.report.sections import escape
from bn_keras.report.verdicts import (
    FAILS,
    HOLDS,
    NO_VERDICT,
    TOO_CLOSE,
    Outcome,
    exceeds,
    judge,
)
from bn_keras.runs.history import Results, Run, Spread
from bn_keras.runs.metrics_log import ACCURACY


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
    steps, others = run.steps_to_accuracy(accuracy), other.steps_to_accuracy(accuracy)
    if steps is None:
        return False
    return None if steps == others else others is None or steps < others


def tie_margin(*runs: Run) -> float:
    """Returns the difference of two runs' best accuracies below which they tie.

    It is half the width of the difference's 95% confidence interval due to the number of validation
    images. Both runs classify the same images, which makes the true interval narrower.
    """
    errors = (run.standard_error(run.best_accuracy) for run in runs)
    return 1.96 * math.hypot(*errors)


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
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    def __str__(self) -> str:
        count, title = len(self.accuracies), escape(self.title)
        if self.num_diverged == count:
            return f"{title} diverged"
        note = f", {self.num_diverged} of {count} diverged" if self.num_diverged else ""
        return f"{title} {Spread.of(self.accuracies):.1%}{note}"


class SeedVariation(NamedTuple):
    """Variation between seeds, taken to be equal for all networks.

    Attributes:
      stddev: standard deviation of an accuracy, pooled over networks with several seeds.
      degrees_of_freedom: number of their runs minus the number of the networks; 0 if no network has
        several seeds.
      standard_error: highest standard error of a compared accuracy due to the number of images.
    """

    stddev: float
    degrees_of_freedom: int
    standard_error: float

    @classmethod
    def of(cls, compared: Sequence[Group], others: Iterable[Group] = ()) -> "SeedVariation":
        """Estimates the variation from groups with several seeds; a diverged run counts as 0.

        A group whose seeds all diverged says nothing about the variation, and is left out.
        """
        deviations = [
            [accuracy - group.mean for accuracy in group.accuracies]
            for group in (*compared, *others)
            if len(group.accuracies) > 1 and group.num_diverged < len(group.accuracies)
        ]
        freedom = sum(len(values) - 1 for values in deviations)
        squares = sum(d * d for values in deviations for d in values)
        stddev = math.sqrt(squares / freedom) if freedom else math.nan
        return cls(stddev, freedom, max((group.standard_error for group in compared), default=0.0))

    def margin(self, *num_seeds: int) -> float | None:
        """Computes the margin of a sum or difference of mean accuracies over so many seeds each.

        Returns:
          Half the width of its 95% confidence interval, due to the seeds (Student's t distribution)
          or to the number of validation images, whichever is wider; None if the variation between
          seeds is unknown. All seeds classify the same images, so more seeds do not narrow the
          latter.
        """
        if not self.degrees_of_freedom:
            return None
        by_seeds = self.quantile * self.stddev * math.sqrt(sum(1 / count for count in num_seeds))
        by_images = 1.96 * self.standard_error * math.sqrt(len(num_seeds))
        return max(by_seeds, by_images)

    @property
    def quantile(self) -> float:
        """0.975 quantile of Student's t distribution."""
        return float(scipy.stats.t.ppf(0.975, self.degrees_of_freedom))

    @property
    def stddev_interval(self) -> tuple[float, float]:
        """95% confidence interval of the standard deviation, by the chi-squared distribution."""
        quantiles = scipy.stats.chi2.ppf((0.975, 0.025), self.degrees_of_freedom)
        low, high = (self.stddev * math.sqrt(self.degrees_of_freedom / q) for q in quantiles)
        return low, high


def seed_variation(results: Results, step: int, *groups: Group) -> SeedVariation:
    """Estimates the variation between seeds up to a step.

    Args:
      results: runs by title. Those with several seeds count if each has an evaluation at the step.
      step: step up to which best accuracies are compared.
      *groups: the compared groups. A diverged seed counts as 0 in these; other networks with one
        are left out.
    """
    others = []
    for title in results:
        if title in {group.title for group in groups}:
            continue
        with contextlib.suppress(NotRunError):
            others.append(Group.of(ended_runs(results, title), step))
    return SeedVariation.of(groups, (group for group in others if not group.num_diverged))


class Difference(NamedTuple):
    """Difference between two networks, tested against a margin.

    Attributes:
      accuracies: description of the networks' accuracies, Markdown.
      gap: signed difference; positive if it supports the claim.
      margin: see `SeedVariation.margin`.
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
        return NO_VERDICT if self.margin is None else judge([exceeds(self.gap, self.margin)])

    def verdict_not_worse(self, tolerance: float) -> str:
        """Returns the verdict on the claim that a loss of `tolerance` or more is excluded."""
        if self.margin is None:
            return NO_VERDICT
        if self.gap - self.margin > -tolerance:
            return HOLDS
        return FAILS if self.gap < -self.margin else TOO_CLOSE

    @property
    def resolution(self) -> str:
        """Sentence on what these runs cannot resolve; empty if the verdict is clear."""
        if self.margin is None:
            return "With one seed of every network, the variation between seeds is unknown."
        if abs(self.gap) <= self.margin:
            return f"These runs cannot resolve differences below {format_points(self.margin)}."
        return ""


def compare(results: Results, title: str, other: str) -> Difference:
    """Tests whether a network's mean accuracy is higher than another's, by the shorter run's end.

    Raises:
      NotRunError: a run is missing or unfinished, or has no evaluation at that step.
    """
    runs = ended_runs(results, title), ended_runs(results, other)
    step = common_steps(*runs[0], *runs[1])
    first, second = (Group.of(seeds, step) for seeds in runs)
    accuracies = f"by step {step:,}: {first}, {second}"
    margin = seed_variation(results, step, first, second).margin(*map(len, runs))
    return Difference(accuracies, first.mean - second.mean, margin)


def format_points(difference: float, decimals: int = 1) -> str:
    """Formats a difference between accuracies in percentage points."""
    return f"{100 * difference:.{decimals}f} points"
