"""What runs wrote, for whoever makes something of it."""

import dataclasses
import datetime
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from bn_keras.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """One network's run, as its workdir tells it.

    Attributes:
      title: the paper's name of the network.
      config: of the run.
      metrics: the lines of its metrics.jsonl.
      environment: what each of its starts noted, as `Workdir.noting_start` has it.
      num_classes, num_train_examples: of its data; 0 where the workdir doesn't say.
    """

    title: str
    config: ConfigDict
    metrics: list[dict]
    environment: list[dict] = dataclasses.field(default_factory=list)
    num_classes: int = 0
    num_train_examples: int = 0

    @classmethod
    def read(cls, title: str, workdir: str | os.PathLike) -> "Run":
        """Reads a workdir; raises UsageError if it holds no run."""
        run = Workdir(workdir)
        environment, sizes = run.read_environment(), run.read_data_sizes()
        return cls(title, run.read_config(), run.read_metrics(), environment, *sizes)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Gives the steps at which a number was written, and the number at each."""
        points = [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy; 0 where there was no evaluation yet."""
        return max(self.curve("validation/accuracy")[1], default=0.0)

    @property
    def lowest_loss(self) -> float:
        """Lowest training loss, as the mean over a loop of steps."""
        return min(self.curve("train/loss")[1], default=float("inf"))

    @property
    def diverged_at(self) -> int | None:
        """Step at which the loss stopped being finite, if it did."""
        return next((line["step"] for line in self.metrics if Workdir.DIVERGED in line), None)

    def steps_to_accuracy(self, accuracy: float) -> int | None:
        """First evaluated step with at least that validation accuracy."""
        points = zip(*self.curve("validation/accuracy"), strict=True)
        return next((step for step, value in points if value >= accuracy), None)

    def steps_to_loss(self, loss: float) -> int | None:
        """First step by which the training loss is at most that."""
        points = zip(*self.curve("train/loss"), strict=True)
        return next((step for step, value in points if value <= loss), None)

    @property
    def seconds(self) -> float:
        """Time spent in training steps."""
        steps, rates = self.curve("train/images_per_second")
        batch = self.config.train.global_batch_size
        before = [0, *steps]
        return sum((s - b) * batch / r for s, b, r in zip(steps, before, rates, strict=False))

    @property
    def wall_seconds(self) -> float:
        """Time from start to end, over all starts that noted both."""
        moment = datetime.datetime.fromisoformat
        return sum(
            (moment(start["ended"]) - moment(start["started"])).total_seconds()
            for start in self.environment
            if start["ended"]
        )


# By what was trained, such as "BN-x5": a run for each seed.
Results = Mapping[str, Sequence[Run]]


@dataclasses.dataclass(frozen=True)
class Spread:
    """What several seeds gave for one number; of a single seed all three are the same.

    Attributes:
      mean, low, high: over the seeds.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Takes one value a seed, of which there is at least one."""
        values = list(values)
        return cls(statistics.mean(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        """Formats the mean, and the lowest and the highest behind it where they differ in print."""
        mean, low, high = (format(value, spec) for value in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"
