"""Training from a config to a finished run: `train_and_evaluate` and the loop inside it."""

import contextlib
import dataclasses
import gc
import os
import signal
import time
from typing import Any

import tensorflow as tf
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from bn_keras.cost import count_cost
from bn_keras.data.pipeline import Data
from bn_keras.distribute import (
    gather_from_workers,
    is_chief,
    reporting_lost_workers,
)
from bn_keras.errors import TrainingDivergedError, TrainingStoppedError, UsageError
from bn_keras.merge import merge_moving_statistics
from bn_keras.runs import environment
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.metrics_log import DIVERGED, FINISHED, RETRY, MetricsLine
from bn_keras.runs.metrics_writer import MetricsWriter
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training import divergence
from bn_keras.training.build import build_data, build_schedule, build_trainer_for
from bn_keras.training.config import check_config
from bn_keras.training.fine_tuning import Initialization
from bn_keras.training.graphs import Graphs
from bn_keras.training.length import early_stop_reason, finish_reason, with_steps
from bn_keras.training.pitfalls import describe_balance, find_class_pitfalls, find_pitfalls
from bn_keras.training.plan import check_startable, describe_changes, describe_replicas
from bn_keras.training.progress import Progress, log
from bn_keras.training.recorder import Recorder, open_recorder
from bn_keras.training.restoring import initialize_trainer
from bn_keras.training.schedule import ExamplesSchedule
from bn_keras.training.step import Trainer
from bn_keras.training.stop_signals import StopRequest, stop_requests
from bn_keras.training.timetable import Timetable
from bn_keras.training.validation import Validation
from bn_keras.training.workers import (
    check_same_command,
    check_same_data,
    check_same_state,
    signal_of_any_worker,
)


class TrainingResult(dict[str, float | str | None]):
    """The last line of metrics.jsonl, such as result["validation/accuracy"], and the run's files.

    Attributes:
      workdir: folder of the run, which `load_trained`, `evaluate_networks` and `export_workdir`
        accept.
    """

    def __init__(self, metrics: MetricsLine, workdir: epath.Path) -> None:
        super().__init__(metrics)
        self.workdir = workdir

    @property
    def best_network(self) -> epath.Path | None:
        """Checkpoint of the evaluation with the highest accuracy, without file extension.

        None if no evaluation had an accuracy above 0.
        `load_trained(result.workdir, best=True).model` is the network.
        """
        best = Workdir(self.workdir).best
        latest = Checkpoints(best, {}).latest
        return epath.Path(latest) if latest else None

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy, a fraction."""
        return Workdir(self.workdir).read_metrics().best_accuracy


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | os.PathLike,
    label: str = "",
    profile_steps: int = 0,
    graphs: Graphs | None = None,
) -> TrainingResult:
    """Trains to the last step of the config, from the last checkpoint if there is one.

    Decisions:
      - A workdir with a run of the same config is resumed bit-exactly. Settings that do not change
        what is trained may differ. A finished run is extended by more steps or epochs. Lines of
        metrics.jsonl after the checkpoint are dropped and written again; TensorBoard's events
        cannot be truncated and show those steps twice.
      - SIGTERM and SIGINT end the training after the current loop of steps, and save. A second
        signal ends the process immediately.
      - A diverged run is rolled back to its last checkpoint up to config.train.retries times, each
        time with a lower learning rate.
      - Evaluations use population statistics (config.population) and the EMA of the weights
        (config.train.ema) where the config asks for them. Training is unaffected: its own state is
        restored afterwards, and checkpoints contain only that. The best network and the finished
        one are saved separately, as evaluated.

    Args:
      config: see `default_config`.
      workdir: folder of the run: config.json, metrics.jsonl, TensorBoard events, checkpoints, the
        best network and the finished one.
      label: name of the run in the log and the progress bar; the folder's name by default.
      profile_steps: number of steps to profile for TensorBoard: the last ones of the first loop.
      graphs: graphs of an earlier run in this process, used if the configs differ in the seed
        alone, and replaced by those of this run.

    Returns:
      The last line of metrics.jsonl, "step", "examples", "validation/accuracy" and others, with
      the paths of the run's files. The progress is shown as a bar on a terminal, and as lines in a
      log or on stderr.

    Raises:
      UsageError: an invalid value in the config, or a workdir with another run.
      StorageError: the workdir cannot be written.
      BucketUnavailableError: the workdir is in a bucket that does not answer.
      WorkdirInUseError: another process trains in the workdir.
      TrainingDivergedError: the loss or a variable is no longer finite.
      TrainingStoppedError: a signal stopped the training, on any worker.
      WorkerLostError: another worker has ended.
    """
    check_config(config)
    run = Workdir(workdir)
    check_startable(run, config)
    if finish_reason(run, config):
        return TrainingResult(run.read_metrics()[-1], run.path)
    graphs = graphs or Graphs()
    strategy = graphs.make_strategy(config)
    run.writes = is_chief(strategy)
    data = build_data(config)
    config = with_steps(config, data.num_train_examples)
    run.check_length(config.train.steps)
    label = label or run.name
    log(f"{label}: {data.description}")
    start = _Start(config, run, strategy, data, label, profile_steps, graphs)
    with (
        stop_requests() as stop_request,
        run.locked(lambda: _check_stopped(stop_request, run)),
    ):
        while True:
            try:
                with reporting_lost_workers(strategy):
                    return TrainingResult(_train(start, stop_request), run.path)
            except TrainingDivergedError as error:
                graphs.clear()
                _check_retry(start, error)
            # Frees the diverged network, whose parts refer to each other, before the next is built.
            gc.collect()


def _check_stopped(stop_request: StopRequest, run: Workdir) -> None:
    """Raises TrainingStoppedError if a signal arrived while the run waits for its lock."""
    if stop_request.signum is not None:
        raise TrainingStoppedError(
            f"stopped by {stop_request.name} while waiting for {run.path}: nothing was trained",
            stop_request.signum,
        )


@dataclasses.dataclass(frozen=True)
class _Start:
    """A start of a run: what stays the same until it ends, also after a rollback."""

    config: ConfigDict
    run: Workdir
    strategy: tf.distribute.Strategy
    data: Data
    label: str
    profile_steps: int
    graphs: Graphs

    @property
    def num_replicas(self) -> int:
        return self.strategy.num_replicas_in_sync


def _check_retry(start: _Start, error: TrainingDivergedError) -> None:
    """Logs a rollback, or raises the error with advice if no retries are left."""
    retry, retries = start.run.read_metrics().num_retries + 1, start.config.train.retries
    if retry > retries:
        advice = "lower schedule.base_rate, or set train.retries, in a new workdir"
        raise TrainingDivergedError(f"{error}; {advice}", error.step) from None
    logging.warning(
        "%s: %s; rolling back to it with %g times the learning rate, retry %d of %d",
        start.label,
        error,
        start.config.train.retry_factor,
        retry,
        retries,
    )


def _train(start: _Start, stop_request: StopRequest) -> MetricsLine:
    """Builds a run, or restores it from its last checkpoint, and trains it to its end."""
    config, run, strategy, data = start.config, start.run, start.strategy, start.data
    check_same_command(strategy, config, start.profile_steps)
    check_same_data(strategy, data)
    interface = Interface(
        data.input_shape, data.class_names, data.num_train_examples, data.fingerprint
    )
    # Before the graph is built, which takes time.
    run.check_data(interface)
    before = run.read_metrics()
    is_rollback = before.has_diverged and before.num_retries < config.train.retries
    retries = before.num_retries + is_rollback
    rate_factor = config.train.retry_factor**retries
    schedule = build_schedule(config, data.num_train_examples, rate_factor)
    training = _build(start, stop_request, schedule, rate_factor)
    check_same_state(strategy, run, training.step, retries, training.validation.best_accuracy)

    record = _describe_start(start, training)
    _log_start(start, training)

    with Progress(start.label, training.step, config.train.steps) as progress:
        progress.show_building()
        # Before anything is written: a network that cannot be built leaves no workdir behind.
        training.trainer.trace(training.batches)
        run.create(config, interface)
        run.drop_metrics_after(training.step)
        if not training.checkpoints.latest:
            training.checkpoints.save(training.step)
        with (
            run.recording_start(training.step, record),
            MetricsWriter(run, training.trainer.global_batch_size) as metrics,
            data.reporting_errors(),
        ):
            # After a rollback, or if an older checkpoint than the rollback's has been restored.
            if run.read_metrics().num_retries < retries:
                metrics.write(training.step, {RETRY: retries})
            if not before and training.recorder:
                metrics.write(training.step, training.recorder())
            last = training.train(progress, metrics)
    # No worker reads the workdir before the chief has closed its files.
    gather_from_workers(strategy, training.step)
    start.graphs.keep(config, rate_factor, training.trainer, training.validation.evaluator)
    return last


def _describe_start(start: _Start, training: "_Training") -> dict[str, Any]:
    """Returns the record of a start, for environment.json."""
    record: dict[str, Any] = environment.describe() | {"replicas": start.num_replicas}
    if changes := start.run.changes(start.config):
        record["changed"] = {key: new for key, (_, new) in changes.items()}
    if training.initialization:
        record["init_from"] = training.initialization.to_record()
    return record


def _log_start(start: _Start, training: "_Training") -> None:
    """Logs what is trained, what differs from the last start, and likely mistakes."""
    config, run, data, label = start.config, start.run, start.data, start.label
    num_examples, model = data.num_train_examples, training.trainer.inference_model
    for line in (
        *describe_changes(run, config, num_examples, training.step),
        *describe_replicas(run, config, start.num_replicas),
        count_cost(model).summary(),
        *(training.initialization.describe() if training.initialization else ()),
        *training.schedule.describe(config.train.steps, num_examples).splitlines(),
        *describe_balance(data),
    ):
        log(f"{label}: {line}")
    pitfalls = find_pitfalls(config, training.schedule, model, start.num_replicas)
    for line in (*pitfalls, *find_class_pitfalls(data)):
        logging.warning("%s: %s", label, line)


def _build(
    start: _Start, stop_request: StopRequest, schedule: ExamplesSchedule, rate_factor: float
) -> "_Training":
    """Builds everything that the config describes and restores the last checkpoint.

    Writes nothing, and raises UsageError for anything that is invalid.
    """
    config, run, data = start.config, start.run, start.data
    trainer = build_trainer_for(config, start.strategy, data, rate_factor)
    trainer = start.graphs.reuse(config, rate_factor, trainer)
    checkpoints = Checkpoints(
        run.checkpoints, trainer.parts, config.checkpoint.keep, run.writes, run.verify_owner
    )
    step = checkpoints.restore()
    if not checkpoints.latest and (last_step := run.read_metrics().last_step):
        raise UsageError(
            f"the run in {run.path} reached step {last_step}, but its checkpoints are"
            " missing: restore them, or use a new workdir"
        )
    initialization = None
    if not checkpoints.latest:
        initialization = initialize_trainer(config, trainer, data.class_names)
    validation = Validation(
        trainer,
        data,
        run,
        step,
        global_batch_size=config.evaluation.global_batch_size,
        population=config.population.when,
        population_batches=config.population.num_batches,
        per_class=config.evaluation.per_class,
        evaluator=start.graphs.evaluator,
    )
    recorder = open_recorder(trainer, data, config.record)
    timetable = Timetable(
        steps=config.train.steps,
        steps_per_loop=config.train.steps_per_loop,
        evaluation_steps=config.evaluation.every_steps,
        checkpoint_steps=config.checkpoint.every_steps,
        record_steps=config.record.every_steps if recorder else None,
        profile_steps=start.profile_steps,
    )
    return _Training(
        start=start,
        schedule=schedule,
        trainer=trainer,
        batches=trainer.open_batches(data, step),
        checkpoints=checkpoints,
        validation=validation,
        recorder=recorder,
        initialization=initialization,
        timetable=timetable,
        stop_request=stop_request,
        step=step,
        saved_step=step,
        profile_from=timetable.profile_from(step),
    )


@dataclasses.dataclass
class _Training:
    """A run in progress.

    Attributes:
      schedule: learning rate of the steps.
      initialization: weights that this start has loaded from a trained network; None without.
      step: last step trained.
      saved_step: step of the last checkpoint.
      profile_from: step after which the profiler starts; None if it does not run.
      signum: number of the signal that stops the training; 0 without one.
      metrics, progress: open while `train` runs.
    """

    start: _Start
    schedule: ExamplesSchedule
    trainer: Trainer
    batches: tf.distribute.DistributedIterator
    checkpoints: Checkpoints
    validation: Validation
    recorder: Recorder | None
    initialization: Initialization | None
    timetable: Timetable
    stop_request: StopRequest
    step: int
    saved_step: int
    profile_from: int | None
    signum: int = 0
    metrics: MetricsWriter = dataclasses.field(init=False)
    progress: Progress = dataclasses.field(init=False)

    def train(self, progress: Progress, metrics: MetricsWriter) -> MetricsLine:
        """Trains to the end and returns the last line of metrics.

        Args:
          progress: shows each loop of steps.
          metrics: gets the lines of the loops and the evaluations.

        Raises:
          TrainingStoppedError: a signal stopped the training, which has been saved.
          TrainingDivergedError: the loss or a variable is no longer finite.
        """
        self.progress, self.metrics = progress, metrics
        self.progress.start()
        self.check_for_signal()
        if self.step and not self.start.run.read_metrics().evaluations(self.step):
            # The previous start saved this step, but was stopped before its evaluation.
            self.evaluate_if_due()
        while not self.is_over:
            self.train_to_next_stop()
            if self.timetable.is_loop_end(self.step):
                # At every loop's end, saved or not: a resumed run starts with equal replicas, and
                # an uninterrupted run must match it.
                merge_moving_statistics(self.trainer.model, self.trainer.strategy)
                self.check_for_signal()
                self.save_if_due()
                self.evaluate_if_due()
                # The evaluation, or a signal during it, may have ended the training.
                self.save_if_due()
        if self.signum:
            self.raise_stopped()
        return self.finish()

    @property
    def is_over(self) -> bool:
        """Whether the last step, an early stop or a signal ends the training."""
        is_last_step = self.step >= self.timetable.steps
        return is_last_step or bool(self.stop_reason) or bool(self.signum)

    @property
    def stop_reason(self) -> str:
        """Reason to end the training before its last step; "" for none."""
        best, since = self.validation.best_accuracy, self.validation.evaluations_since_best
        return early_stop_reason(best, since, self.start.config)

    def check_for_signal(self) -> None:
        """Sets signum if any worker has received a signal."""
        self.signum = signal_of_any_worker(self.trainer.strategy, self.stop_request)

    def train_to_next_stop(self) -> None:
        """Trains without interruption to the next stop of the timetable, and logs the metrics."""
        stop = self.timetable.next_stop(self.step, self.profile_from)
        steps = stop - self.step
        before = self.trainer.snapshot()
        rate = float(self.trainer.optimizer.learning_rate)
        began = time.perf_counter()
        with self.profiler() if self.step == self.profile_from else contextlib.nullcontext():
            loss, accuracy, finite_steps = self.trainer.train(self.batches, steps)
        seconds = time.perf_counter() - began
        if finite_steps < steps:
            self.raise_diverged_loss(before, finite_steps)
        self.step = stop
        self.report(loss, accuracy, rate, steps * self.trainer.global_batch_size / seconds)

    def profiler(self) -> contextlib.AbstractContextManager:
        """Returns a context that profiles; only the chief does."""
        if not self.start.run.writes:
            return contextlib.nullcontext()
        return tf.profiler.experimental.Profile(os.fspath(self.start.run.path))

    def report(self, loss: float, accuracy: float, rate: float, images_per_second: float) -> None:
        """Writes a loop's line of metrics and updates the progress bar.

        Args:
          loss, accuracy: means over the loop.
          rate: learning rate of the loop's first step.
          images_per_second: over all replicas.
        """
        metrics: MetricsLine = {
            "train/loss": loss,
            "train/accuracy": accuracy,
            "train/learning_rate": rate,
            "train/images_per_second": images_per_second,
        }
        if self.recorder and self.timetable.is_recording(self.step):
            metrics |= self.recorder()
        self.metrics.write(self.step, metrics)
        self.progress.update(self.step, loss, accuracy, images_per_second)

    def evaluate_if_due(self) -> None:
        """Evaluates if the timetable says so.

        After a signal, the next start evaluates: the process may be killed before an evaluation
        ends.
        """
        if self.signum or not self.timetable.is_evaluation(self.step):
            return
        if self.step != self.saved_step:
            self.check_finite()
        self.metrics.write(self.step, self.validation(self.step))
        self.progress.set_validation_accuracy(self.validation.accuracy)
        self.check_for_signal()

    def save_if_due(self) -> None:
        """Saves if the timetable says so, and before the training ends."""
        if self.step == self.saved_step:
            return
        if self.is_over or self.timetable.is_checkpoint(self.step):
            self.check_finite()
            # A run that resumes from the checkpoint does not write these lines again.
            self.metrics.sync()
            self.checkpoints.save(self.step)
            self.saved_step = self.step

    def finish(self) -> MetricsLine:
        """Runs the last evaluation and writes the line that marks the run as finished."""
        if self.step < self.timetable.steps:
            log(f"{self.start.label}: stopped at step {self.step:,}: {self.stop_reason}")
        metrics = self.validation(self.step, is_last=True)
        return self.metrics.write(self.step, metrics | {FINISHED: self.trainer.hash()})

    def raise_stopped(self) -> None:
        """Raises TrainingStoppedError once the chief has saved."""
        gather_from_workers(self.trainer.strategy, self.step)
        raise TrainingStoppedError(
            f"stopped by {signal.Signals(self.signum).name} at step {self.step} of"
            f" {self.timetable.steps}, saved in {self.start.run.path}: the same command resumes it",
            self.signum,
        )

    def check_finite(self) -> None:
        """Raises TrainingDivergedError if a variable is not finite."""
        cause = divergence.non_finite_variable(self.trainer.variables)
        if cause:
            self.metrics.write(self.step, {DIVERGED: True})
            raise self.make_divergence_error("network", self.step, cause)

    def raise_diverged_loss(self, before: list[tf.Tensor], finite_steps: int) -> None:
        """Raises TrainingDivergedError for a loss that is not finite, with its cause.

        Args:
          before: snapshot of the trainer before the loop.
          finite_steps: steps of the loop whose loss was finite.
        """
        step = self.step + finite_steps + 1
        self.metrics.write(step, {DIVERGED: True})
        data = self.start.data
        cause = divergence.find_cause(self.trainer, data, before, self.step, finite_steps)
        raise self.make_divergence_error("loss", step, cause)

    def make_divergence_error(self, what: str, step: int, cause: str) -> TrainingDivergedError:
        """Returns the error of a loss or network, `what`, that is not finite after a step."""
        rate = float(self.schedule(step - 1))
        return divergence.make_error(what, step, rate, cause, self.checkpoints)
