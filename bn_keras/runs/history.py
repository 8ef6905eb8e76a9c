"""What runs wrote, for whoever makes something of it."""

import dataclasses
import datetime
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from bn_keras.runs.workdir import Workdir

ACCURACY, LOSS = "validation/accuracy", "train/loss"


@dataclasses.dataclass(frozen=True)
class Run:
    """One network's run, as its workdir tells it.

    Attributes:
      title: of what is trained, as in titles.py.
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

    @property
    def name(self) -> str:
        """The title and the seed."""
        return f"{self.title} (seed {self.config.seed})"

    def curve(self, key: str) -> dict[int, float]:
        """Gives the values of a number in the metrics, by the steps at which they were written."""
        return {line["step"]: line[key] for line in self.metrics if line.get(key) is not None}

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy; 0 where there was no evaluation yet."""
        return max(self.curve(ACCURACY).values(), default=0.0)

    @property
    def lowest_loss(self) -> float:
        """Lowest training loss, as the mean over a loop of steps."""
        return min(self.curve(LOSS).values(), default=float("inf"))

    @property
    def diverged_at(self) -> int | None:
        """Step at which the loss stopped being finite, if it did."""
        return next((line["step"] for line in self.metrics if Workdir.DIVERGED in line), None)

    def steps_to_accuracy(self, accuracy: float) -> int | None:
        """First evaluated step with at least that validation accuracy."""
        points = self.curve(ACCURACY).items()
        return next((step for step, value in points if value >= accuracy), None)

    def standard_error(self, accuracy: float) -> float:
        """That of an accuracy on the validation images, as an estimate for all images of the kind.

        0 where it isn't known how many there are.
        """
        count = max(self.curve("validation/examples").values(), default=0)
        if not count:
            return 0.0
        # Agresti and Coull's estimate, which isn't 0 where no image is mistaken.
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


def over_seeds(runs: Sequence[Run], key: str) -> dict[int, Spread]:
    """Gives what the seeds' curves span, at each step that all of them have."""
    curves = [run.curve(key) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: Spread.of(curve[step] for curve in curves) for step in steps}
