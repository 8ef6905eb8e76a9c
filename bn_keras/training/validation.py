"""Evaluation during training, and the networks that it saves."""

import contextlib
from collections.abc import Iterator
from typing import cast

from absl import logging

from bn_keras.data.pipeline import Data
from bn_keras.errors import UsageError
from bn_keras.keras_internals import batch_norm_layers, trains_batch_norm
from bn_keras.population import PopulationEstimator, preserved_state
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.metrics_log import MetricsLine
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import writing
from bn_keras.training.class_report import ClassReport, write_class_report
from bn_keras.training.config import uses_population
from bn_keras.training.evaluator import Evaluator
from bn_keras.training.step import Trainer


class Validation:
    """Evaluates a network during training, and saves the best and the finished one.

    The network is evaluated with population statistics and the EMA of its weights where the config
    asks for them. Training is unaffected: its own state is restored after each evaluation.

    Args:
      trainer: trainer of the network.
      data: data set whose validation examples are evaluated.
      run: run in whose folder the networks are saved.
      step: step at which the run resumes; the best accuracy ignores later evaluations.
      global_batch_size: examples per evaluation step, over all replicas.
      population: when population statistics replace the moving ones: "never", "end" or
        "evaluations".
      population_batches: training batches that population statistics are computed from.
      per_class: whether the last evaluation writes a report on the classes.
      evaluator: evaluator of the trainer's network, already traced; None makes a new one.

    Attributes:
      evaluator: as passed, or the new one.
      accuracy, best_accuracy: accuracy of the last evaluation, and the highest so far; 0 without an
        evaluation.
      evaluations_since_best: evaluations after the first one with the highest accuracy.

    Raises:
      UsageError: population statistics of a network without BN, or an EMA of the weights of a
        network with BN but without population statistics.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Data,
        run: Workdir,
        step: int,
        *,
        global_batch_size: int,
        population: str,
        population_batches: int,
        per_class: bool,
        evaluator: Evaluator | None,
    ) -> None:
        self._trainer = trainer
        self._model = model = trainer.inference_model
        self._population_batches = population_batches
        self.evaluator = evaluator or Evaluator([model], data, trainer.strategy, global_batch_size)
        self._data = data
        self._run = run
        self._per_class = per_class
        parts = {"model": model.variables}
        self._best, self._finished = (
            Checkpoints(folder, parts, writes=run.writes, verify_owner=run.verify_owner)
            for folder in (run.best, run.finished)
        )
        self.accuracy = 0.0
        earlier = run.read_metrics().up_to(step)
        self.best_accuracy = earlier.best_accuracy
        self.evaluations_since_best = earlier.evaluations_since_best
        self._has_batch_norm = bool(batch_norm_layers(model))
        is_frozen = self._has_batch_norm and not trains_batch_norm(model)
        # Frozen BN keeps its moving statistics.
        self._population = "never" if is_frozen else population
        if trainer.averages and trains_batch_norm(model) and population == "never":
            raise UsageError(
                "train.ema is set and requires population statistics, because BN's moving"
                " statistics are those of the trained weights, not of their averages: set"
                " population.when to 'end' or 'evaluations', or train.ema=0"
            )
        if self._population != "never":
            self._estimator = PopulationEstimator(model, trainer.strategy)
            # Always the same batches, so that evaluations differ only in the network.
            self._batches = data.train_batches(trainer.strategy, trainer.global_micro_batch_size)

    def __call__(self, step: int, is_last: bool = False) -> MetricsLine:
        """Evaluates the network after a step and returns the metrics under "validation/"."""
        by_population = uses_population(self._population, is_last)
        by_ema = bool(self._trainer.averages) and (by_population or self._population == "never")
        with self._evaluation_state(by_population, by_ema):
            [found] = self.evaluator()
            self.accuracy = found["accuracy"]
            self.evaluations_since_best += 1
            if self.accuracy > self.best_accuracy:
                self.best_accuracy = self.accuracy
                self.evaluations_since_best = 0
                self._best.save(step)
            if is_last and (by_population or by_ema):
                self._finished.save(step)
        if is_last and self._per_class:
            self._report_classes()
        metrics = cast(MetricsLine, dict(found))
        statistics = "moving" if self._has_batch_norm else "none"
        metrics["statistics"] = "population" if by_population else statistics
        if self._trainer.averages:
            metrics["weights"] = "averaged" if by_ema else "trained"
        return {f"validation/{name}": value for name, value in metrics.items()}

    def _report_classes(self) -> None:
        """Writes the report on the classes into the run's folder, and logs what limits it."""
        if not self._run.writes:
            return
        report = ClassReport(self._data.class_names, self.evaluator.predictions[0])
        with writing(f"the report on the classes in {self._run.classes}"):
            self._run.verify_owner()
        write_class_report(self._run.classes, report, self._data)
        for line in report.name_rare_classes():
            logging.warning("%s", line)

    @contextlib.contextmanager
    def _evaluation_state(self, by_population: bool, by_ema: bool) -> Iterator[None]:
        """Replaces the model's statistics or weights until the block ends."""
        with contextlib.ExitStack() as stack:
            if by_population or by_ema:
                stack.enter_context(preserved_state(self._model, self._trainer.strategy))
            if by_ema:
                self._trainer.assign_averages()
            if by_population:
                self._estimator.estimate(self._batches, self._population_batches)
            yield
