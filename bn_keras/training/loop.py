"""Trains a network as its config says; `train_and_evaluate` reads from top to bottom."""

import contextlib
import gc
import hashlib
import json
import math
import os
import signal
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from bn_keras.batch_norm import BATCH_NORMS
from bn_keras.cost import count
from bn_keras.data import pipeline
from bn_keras.distribute.strategy import (
    from_all_workers,
    is_chief,
    make_strategy,
    naming_lost_workers,
)
from bn_keras.errors import TrainingDivergedError, TrainingStoppedError, UsageError
from bn_keras.inference.evaluation import make_evaluator, open_mini_batches
from bn_keras.keras_internals import all_layers
from bn_keras.merge import merge_moving_statistics
from bn_keras.population import PopulationEstimator, preserved_state
from bn_keras.runs import environment
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.workdir import MetricsWriter, Workdir
from bn_keras.training.build import build_schedule, build_trainer
from bn_keras.training.config import check_config
from bn_keras.training.diagnosis import first_non_finite
from bn_keras.training.progress import Progress
from bn_keras.training.recorder import open_recorder
from bn_keras.training.step import Trainer
from bn_keras.training.stop_signals import StopRequest, stop_requests


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike, label: str = "", profile_steps: int = 0
) -> dict[str, float]:
    """Trains to config.train.steps, or goes on to there from the last checkpoint.

    A workdir is resumed if it holds a run of the same config, which then goes on as though it
    had never stopped: what metrics.jsonl has beyond the checkpoint is dropped and written again.
    TensorBoard's events can't be cut; it shows those steps twice.

    SIGTERM and SIGINT end the training after the loop of steps that it is in, and save; a second
    signal ends the process at once. A run that diverges goes back to its last checkpoint as often
    as config.train.retries says, each time with a lower rate.

    Where config.population says so, evaluations go by the population's statistics, and with
    config.train.ema by averaged weights. Training doesn't notice: afterwards its own are back, and
    they are what the checkpoints hold. At the end the network is saved once more, as it was
    evaluated, for what becomes of the run; and so it is whenever it is the best so far.

    Args:
      config: as bn_keras/training/config.py.
      workdir: folder of the run: config.json, metrics.jsonl, TensorBoard events, checkpoints,
        the best network, and the finished one.
      label: what the progress bar calls the run.
      profile_steps: how many steps TensorBoard's profile shows: the last ones of the first loop.

    Returns:
      The last line of metrics.jsonl: "step", "examples", "validation/accuracy" and others.

    Raises:
      UsageError: a value in the config that can't be meant, or a workdir of another run.
      TrainingDivergedError: the loss or a variable is no longer finite.
      TrainingStoppedError: a signal came, to any worker.
      WorkerLostError: another worker is gone.
    """
    check_config(config)
    run = Workdir(workdir)
    run.check(config)
    if run.is_finished():
        return run.read_metrics()[-1]
    strategy = make_strategy(**config.distribution)
    run.writes = is_chief(strategy)
    data = pipeline.open_data(config.data, seed=config.seed)
    label = label or run.path.name
    with run.locked(), stop_requests() as stop_request:
        while True:
            try:
                with naming_lost_workers(strategy):
                    return _train(config, run, strategy, data, label, profile_steps, stop_request)
            except TrainingDivergedError as error:
                retry = run.num_retries() + 1
                if retry > config.train.retries:
                    advice = "lower schedule.base_rate, or set train.retries, in a new workdir"
                    raise TrainingDivergedError(f"{error}; {advice}", error.step) from None
                factor = config.train.retry_factor
                logging.warning(
                    "%s: %s, to which the run goes back with %g times the rate: retry %d of %d",
                    *(label, error, factor, retry, config.train.retries),
                )
            # The network that failed, whose parts refer to each other, makes room for the next.
            gc.collect()


def _train(
    config: ConfigDict,
    run: Workdir,
    strategy: tf.distribute.Strategy,
    data: pipeline.Data,
    label: str,
    profile_steps: int,
    stop_request: StopRequest,
) -> dict[str, float]:
    """Trains until the end, a signal, or a loss that isn't finite."""
    _check_same_command(strategy, config, profile_steps)
    steps, global_batch_size = config.train.steps, config.train.global_batch_size
    retries = run.num_retries()
    if retries < config.train.retries and run.has_diverged():
        retries += 1
    rate_factor = config.train.retry_factor**retries
    trainer = build_trainer(
        config,
        strategy,
        data.input_shape,
        data.num_classes,
        data.num_train_examples,
        rate_factor,
    )
    checkpoints = Checkpoints(run.checkpoints, trainer.parts, config.checkpoint.keep, run.writes)
    step = checkpoints.restore()
    validate = _Validation(config, run, trainer, data, step)
    recorder = open_recorder(config, data, trainer)
    is_new = not run.read_metrics()
    if run.last_step() and not checkpoints.latest:
        raise UsageError(
            f"the run in {run.path} got to step {run.last_step()}, but its checkpoints are gone:"
            " put them back, or give a new workdir"
        )
    _check_same_state(strategy, run, step, retries, validate.best_accuracy)
    batches = trainer.open_batches(data, step)
    run.create(config, data.input_shape, data.class_names, data.num_train_examples)
    run.drop_metrics_after(step)
    if not checkpoints.latest:
        checkpoints.save(step)
    cost = count(trainer.inference_model).line()
    schedule = build_schedule(config, data.num_train_examples, rate_factor)
    for line in (cost, *schedule.describe(steps, data.num_train_examples).splitlines()):
        logging.info("%s: %s", label, line)
    profiled_from = _first_profiled(step, config, profile_steps)
    with (
        run.noting_start(step, environment.describe()),
        MetricsWriter(run, global_batch_size) as metrics,
        Progress(label, step, steps) as progress,
        data.naming_errors(),
    ):
        if retries > run.num_retries():
            metrics.write(step, {Workdir.RETRY: retries})
        if recorder and is_new:
            metrics.write(step, recorder())

        def check_finite() -> None:
            cause = _name_not_finite(trainer.variables)
            if cause:
                metrics.write(step, {Workdir.DIVERGED: True})
                raise _diverged("network", step, rate, cause, checkpoints)

        progress.building()
        trainer.trace(batches)
        progress.start()
        signum = _signal_to_any(strategy, stop_request)
        while step < steps and not validate.has_reached_target and not signum:
            due = _next_stop(step, config)
            stops = (due, profiled_from, _next_recorded(step, config))
            stop = min(stop for stop in stops if stop > step)
            before = trainer.snapshot()
            rate = float(trainer.optimizer.learning_rate)
            began = time.perf_counter()
            with _profile(run) if step == profiled_from else contextlib.nullcontext():
                loss, accuracy, finite_steps = trainer.train(batches, stop - step)
            images_per_second = (stop - step) * global_batch_size / (time.perf_counter() - began)
            if finite_steps < stop - step:
                metrics.write(step + finite_steps + 1, {Workdir.DIVERGED: True})
                cause = _find_cause(trainer, data, before, step, finite_steps)
                raise _diverged("loss", step + finite_steps + 1, rate, cause, checkpoints)
            step = stop
            values = {
                "train/loss": loss,
                "train/accuracy": accuracy,
                "train/learning_rate": rate,
                "train/images_per_second": images_per_second,
            }
            if recorder and step % config.record.every_steps == 0:
                values |= recorder()
            metrics.write(step, values)
            progress.update(step, loss, accuracy, images_per_second)
            if step != due:
                continue
            # At each loop's end, so that a run that is stopped there and goes on by what was
            # saved has replicas as equal as one that was never stopped.
            merge_moving_statistics(trainer.model, strategy)
            is_evaluated = step % config.evaluation.every_steps == 0 and step < steps
            if is_evaluated:
                check_finite()
                validation = validate(step)
                metrics.write(step, validation)
                progress.evaluated(step, validation["validation/accuracy"])
            signum = _signal_to_any(strategy, stop_request)
            is_last = step == steps or validate.has_reached_target or signum
            if is_last or step % config.checkpoint.every_steps == 0:
                if not is_evaluated:
                    check_finite()
                checkpoints.save(step)
        if signum:
            # The others wait for the chief's save.
            from_all_workers(strategy, step)
            raise TrainingStoppedError(
                f"stopped by {signal.Signals(signum).name} at step {step} of {steps}"
                f" and saved in {run.path}: the same command goes on from there",
                signum,
            )
        validation = validate(step, is_last=True)
        last = metrics.write(step, validation | {Workdir.FINISHED: _digest(trainer)})
    # No worker looks into the workdir before the chief is done with it.
    from_all_workers(strategy, step)
    return last


class _Validation:
    """Evaluates a network while it is trained, and keeps the best and the last of what it saw.

    Args:
      config: of the run.
      run: where the best and the finished network are saved.
      trainer: of the network, which is the same afterwards.
      data: whose validation examples are taken.
      step: from which the run goes on, so that later evaluations do not count yet.

    Attributes:
      best_accuracy: the highest so far; 0 where there was no evaluation.

    Raises:
      UsageError: population statistics of a network without BN, or averaged weights of one with
        BN but without these.
    """

    def __init__(
        self,
        config: ConfigDict,
        run: Workdir,
        trainer: Trainer,
        data: pipeline.Data,
        step: int,
    ) -> None:
        self._model = model = trainer.inference_model
        self._trainer = trainer
        self._when = config.population.when
        self._num_batches = config.population.num_batches
        self._target = config.train.until_accuracy or math.inf
        self._evaluate = make_evaluator(
            model, data, trainer.strategy, config.evaluation.global_batch_size
        )
        parts = {"model": model.variables}
        self._best = Checkpoints(run.best, parts, writes=run.writes)
        self._finished = Checkpoints(run.finished, parts, writes=run.writes)
        self.best_accuracy = run.best_accuracy(step)
        has_batch_norm = any(isinstance(layer, BATCH_NORMS) for layer in all_layers(model))
        if trainer.averages and has_batch_norm and self._when == "never":
            raise UsageError(
                f"train.ema is {config.train.ema}, but the moving statistics of BN are not those of"
                " averaged weights: set population.when to 'end' or 'evaluations'"
            )
        if self._when != "never":
            self._estimator = PopulationEstimator(model, trainer.strategy)
            # The same each time, so that two evaluations differ by the network alone.
            self._batches = open_mini_batches(config, data, trainer.strategy)

    @property
    def has_reached_target(self) -> bool:
        """Whether some evaluation gave train.until_accuracy."""
        return self.best_accuracy >= self._target

    def __call__(self, step: int, is_last: bool = False) -> dict[str, float | str]:
        """Gives what metrics.jsonl says of an evaluation."""
        by_population = self._when == "evaluations" or (self._when == "end" and is_last)
        by_averages = bool(self._trainer.averages) and (by_population or self._when == "never")
        with self._by(by_population, by_averages):
            found = self._evaluate()
            if found["accuracy"] > self.best_accuracy:
                self.best_accuracy = found["accuracy"]
                self._best.save(step)
            if is_last and (by_population or by_averages):
                self._finished.save(step)
        found["statistics"] = "population" if by_population else "moving"
        if self._trainer.averages:
            found["weights"] = "averaged" if by_averages else "trained"
        return {f"validation/{name}": value for name, value in found.items()}

    @contextlib.contextmanager
    def _by(self, population: bool, averages: bool) -> Iterator[None]:
        """Gives the model other statistics or weights for a while."""
        with contextlib.ExitStack() as restored:
            if population or averages:
                restored.enter_context(preserved_state(self._model, self._trainer.strategy))
            if averages:
                self._trainer.assign_averages()
            if population:
                self._estimator.estimate(self._batches, self._num_batches)
            yield


def verify_resume(config: ConfigDict, steps: int = 4) -> str:
    """Trains a few steps twice, once at a stretch and once stopped, saved and read again.

    The second time, another network goes on with what the first half left in a checkpoint.

    Args:
      config: as bn_keras/training/config.py.
      steps: at least 2.

    Returns:
      The hash over all variables, which both have.

    Raises:
      UsageError: the two differ.
    """
    check_config(config)
    strategy = make_strategy(**config.distribution)
    data = pipeline.open_data(config.data, seed=config.seed)
    shape, classes, examples = data.input_shape, data.num_classes, data.num_train_examples

    half = steps // 2

    def train(trainer: Trainer, batches: tf.distribute.DistributedIterator, steps: int) -> None:
        trainer.train(batches, steps)
        merge_moving_statistics(trainer.model, strategy)

    with tempfile.TemporaryDirectory() as folder, data.naming_errors():
        unbroken = build_trainer(config, strategy, shape, classes, examples)
        batches = unbroken.open_batches(data, 0)
        train(unbroken, batches, half)
        Checkpoints(epath.Path(folder), unbroken.parts).save(half)
        train(unbroken, batches, steps - half)
        resumed = build_trainer(config, strategy, shape, classes, examples)
        step = Checkpoints(epath.Path(folder), resumed.parts).restore()
        train(resumed, resumed.open_batches(data, step), steps - step)
    differing = [
        one.path
        for one, other in zip(unbroken.variables, resumed.variables, strict=True)
        if one.numpy().tobytes() != other.numpy().tobytes()
    ]
    if differing:
        raise UsageError(
            f"stopped at step {half} and resumed, {len(differing)} of"
            f" {len(unbroken.variables)} variables differ at step {steps}, the first of them"
            f" {differing[0]}: a run with this config can't be resumed exactly on these devices"
        )
    return _digest(resumed)


def _next_stop(step: int, config: ConfigDict) -> int:
    """Gives the step up to which nothing but training is due."""
    periods = (
        config.train.steps_per_loop,
        config.evaluation.every_steps,
        config.checkpoint.every_steps,
    )
    return min(config.train.steps, *(step - step % period + period for period in periods))


def _next_recorded(step: int, config: ConfigDict) -> int:
    """Gives the next step at which a layer's input is recorded; -1 is never."""
    period = config.record.every_steps
    return step - step % period + period if config.record.layer else -1


def _first_profiled(step: int, config: ConfigDict, profile_steps: int) -> int:
    """Gives the step from which on the rest of a run's first loop is profiled; -1 is never."""
    if not profile_steps:
        return -1
    stops = (_next_stop(step, config), _next_recorded(step, config))
    return max(step, min(stop for stop in stops if stop > step) - profile_steps)


def _profile(run: Workdir) -> contextlib.AbstractContextManager:
    if not run.writes:
        return contextlib.nullcontext()
    return tf.profiler.experimental.Profile(os.fspath(run.path))


def _check_same_command(
    strategy: tf.distribute.Strategy, config: ConfigDict, profile_steps: int
) -> None:
    """Raises UsageError if the workers were given different configs or steps to profile."""
    settings = config.to_dict() | {"profile_steps": profile_steps}
    # Each machine may have the data where it likes.
    del settings["data"]["data_dir"]
    digest = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    if len(set(from_all_workers(strategy, digest))) > 1:
        raise UsageError("the workers have different configs: give all of them the same command")


def _check_same_state(
    strategy: tf.distribute.Strategy,
    run: Workdir,
    step: int,
    retries: int,
    best_accuracy: float,
) -> None:
    """Waits until all workers have read the workdir, in which the chief then writes.

    Raises:
      UsageError: they didn't find the same in it.
    """
    state = {
        "checkpoints of steps": step,
        "numbers of retries": retries,
        "best accuracies": best_accuracy,
    }
    for what, number in state.items():
        found = from_all_workers(strategy, number)
        if len(set(found)) > 1:
            raise UsageError(
                f"the workers found the {what} {', '.join(f'{n:.10g}' for n in found)} in workdir"
                f" {run.path}: give one that lies on storage that all of them share"
            )


def _signal_to_any(strategy: tf.distribute.Strategy, stop_request: StopRequest) -> int:
    """Gives the signal that stops the training, of whichever worker; 0 where there is none."""
    return int(max(from_all_workers(strategy, stop_request.signum or 0)))


def _find_cause(
    trainer: Trainer,
    data: pipeline.Data,
    before: Sequence[tf.Tensor],
    step: int,
    finite_steps: int,
) -> str:
    """Takes the steps of a loop again, up to the one that failed, and says where that began.

    First the step before it is looked at: gradients that aren't finite show in the next loss.
    """
    for steps in range(max(0, finite_steps - 1), finite_steps + 1):
        trainer.restore(before)
        batches = trainer.open_batches(data, step)
        if steps:
            trainer.train(batches, steps)
        for _ in range(trainer.micro_batches):
            cause = first_non_finite(
                trainer.model, trainer.gradients, *next(batches), strategy=trainer.strategy
            )
            if cause:
                return cause
    # By what the sums of several replicas or micro-batches come to.
    return "an update of the weights"


def _name_not_finite(variables: Sequence[keras.Variable]) -> str:
    """Names the first of the variables that is not finite; "" if all are."""
    return next((f"variable {v.path}" for v in variables if not np.isfinite(v.numpy()).all()), "")


def _diverged(
    what: str, step: int, rate: float, cause: str, checkpoints: Checkpoints
) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"the {what} is not finite at step {step} (learning rate {rate:.6g}), and first of all"
        f" {cause}; the last good checkpoint is {checkpoints.latest}",
        step,
    )


def _digest(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for variable in trainer.variables:
        digest.update(variable.name.encode())
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()
