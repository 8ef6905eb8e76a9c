"""Reads what runs wrote, and summarizes it over seeds."""

import dataclasses
import datetime
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bn_keras.runs.metrics_log import ACCURACY, MetricsLog
from bn_keras.runs.workdir import Workdir

LOSS = "train/loss"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, as recorded in its workdir.

    Attributes:
      title: name of the network, as in experiments/titles.py.
      config: config of the run.
      metrics: lines of metrics.jsonl.
      environment: entries of environment.json, one for each start of the run.
      num_classes, num_train_examples: sizes of the data set; 0 if the workdir does not record them.
    """

    title: str
    config: ConfigDict
    metrics: MetricsLog
    environment: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_classes: int = 0
    num_train_examples: int = 0

    def __post_init__(self) -> None:
        # Any lines are accepted.
        object.__setattr__(self, "metrics", MetricsLog(self.metrics))

    @classmethod
    def read(cls, title: str, workdir: str | os.PathLike) -> "Run":
        """Reads a workdir; raises UsageError if it holds no run."""
        run = Workdir(workdir)
        environment, sizes = run.read_environment(), run.read_data_sizes()
        return cls(title, run.read_config(), run.read_metrics(), environment, *sizes)

    @property
    def name(self) -> str:
        """Title and seed, such as "BN-x5 (seed 0)"."""
        return f"{self.title} (seed {self.config.seed})"

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended normally: at its last step, or by an early stop."""
        return self.metrics.is_finished

    @property
    def diverged_at(self) -> int | None:
        """Step at which the loss or a weight became non-finite; None if the run did not diverge."""
        return self.metrics.diverged_at

    def curve(self, key: str) -> dict[int, float]:
        """Returns a metric by step, at the steps where it was written."""
        return self.metrics.curve(key)

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy; 0 before the first evaluation."""
        return self.metrics.best_accuracy

    @property
    def lowest_loss(self) -> float:
        """Lowest training loss, each value being the mean over one loop of steps."""
        return min(self.curve(LOSS).values(), default=float("inf"))

    def steps_to_accuracy(self, accuracy: float) -> int | None:
        """Returns the step of the first evaluation with at least this accuracy, or None."""
        points = self.curve(ACCURACY).items()
        return next((step for step, value in points if value >= accuracy), None)

    def standard_error(self, accuracy: float) -> float:
        """Returns the standard error of a validation accuracy, due to the number of images.

        It is 0 if that number is unknown. The estimate, by Agresti and Coull, is positive even for
        an accuracy of 0 or 1.
        """
        count = max(self.curve("validation/examples").values(), default=0)
        if not count:
            return 0.0
        share = (accuracy * count + 2) / (count + 4)
        return math.sqrt(share * (1 - share) / (count + 4))

    @property
    def seconds(self) -> float:
        """Time spent in training steps."""
        rates = self.curve("train/images_per_second")
        batch = self.config.train.global_batch_size
        loops = itertools.pairwise([0, *rates])
        return sum((step - before) * batch / rates[step] for before, step in loops)

    @property
    def wall_seconds(self) -> float:
        """Time from start to end, summed over all starts with a recorded end."""
        moment = datetime.datetime.fromisoformat
        return sum(
            (moment(start["ended"]) - moment(start["started"])).total_seconds()
            for start in self.environment
            if start["ended"]
        )


# The runs of each network, one per seed, by title.
Results = Mapping[str, Sequence[Run]]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest value over seeds; all are equal for a single seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Computes the spread of one or more values, one per seed."""
        values = list(values)
        return cls(statistics.mean(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        """Formats the mean, followed by "(lowest to highest)" if they differ in print."""
        mean, low, high = (format(value, spec) for value in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


def over_seeds(runs: Sequence[Run], key: str) -> dict[int, Spread]:
    """Computes the spread of a metric over runs, at each step that all of them have."""
    curves = [run.curve(key) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: Spread.of(curve[step] for curve in curves) for step in steps}
