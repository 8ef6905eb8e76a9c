"""Trains a network as its config says; `train_and_evaluate` reads from top to bottom."""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from bn_keras import distribution, models
from bn_keras.checkpoint import Checkpoints
from bn_keras.data import pipeline
from bn_keras.errors import TrainingDivergedError, UsageError
from bn_keras.evaluate import make_evaluator
from bn_keras.population import PopulationEstimator
from bn_keras.progress import Progress
from bn_keras.schedule import ExamplesSchedule
from bn_keras.workdir import MetricsWriter, Workdir


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike, label: str = ""
) -> dict[str, float]:
    """Trains to config.train.steps, or goes on to there from the last checkpoint.

    A workdir is resumed if it holds a run of the same config, which then goes on as though it
    had never stopped: what metrics.jsonl has beyond the checkpoint is dropped and written again.
    TensorBoard's events can't be cut; it shows those steps twice.

    Where config.population says so, evaluations go by the population's statistics. Training
    doesn't notice: afterwards the moving ones are back, and they are what the checkpoints hold.
    At the end the network is saved once more, with the population's, as what becomes of the run.

    Args:
      config: as configs/default.py.
      workdir: folder of the run: config.json, metrics.jsonl, TensorBoard events, checkpoints,
        and the network with population statistics.
      label: what the progress bar calls the run.

    Returns:
      The last line of metrics.jsonl: "step", "examples", "validation/accuracy" and others.

    Raises:
      UsageError: a value in the config that can't be meant, or a workdir of another run.
      TrainingDivergedError: the loss or a variable is no longer finite.
    """
    _check(config)
    run = Workdir(workdir)
    run.check(config)
    if run.is_finished():
        return run.read_metrics()[-1]
    strategy = distribution.make_strategy(**config.distribution)
    data = pipeline.open_data(config.data, seed=config.seed)

    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        training_model = models.from_config(
            config, data.input_shape, data.num_classes, training=True
        )
        model = models.without_auxiliary(training_model)
        optimizer = keras.optimizers.SGD(
            make_schedule(config, data.num_train_examples), momentum=config.train.momentum
        )
        optimizer.build(training_model.trainable_variables)
    steps, global_batch_size = config.train.steps, config.train.global_batch_size
    trainer = Trainer(
        training_model,
        optimizer,
        strategy,
        global_batch_size,
        config.train.l2,
        config.model.auxiliary_weight,
    )
    evaluate = make_evaluator(model, data, strategy, config.evaluation.global_batch_size)
    with_statistics = _make_statistics(config, model, data, strategy)

    checkpoints = Checkpoints(
        run.checkpoints, model, optimizer, strategy, config.checkpoint.keep, training_model
    )
    step = checkpoints.restore()
    if not checkpoints.latest and run.last_step() >= config.checkpoint.every_steps:
        raise UsageError(
            f"the run in {run.path} got to step {run.last_step()}, but its checkpoints are gone:"
            " put them back, or give a new workdir"
        )
    batches = iter(data.train_batches(strategy, global_batch_size, start_step=step))
    run.create(config, data.input_shape, data.class_names)
    run.drop_metrics_after(step)
    logging.info(
        "%s: %s with %s parameters on %s, %d replica(s), in %s, %s",
        label or run.path.name,
        model.name,
        f"{sum(math.prod(v.shape) for v in model.trainable_variables):,}",
        config.data.name,
        strategy.num_replicas_in_sync,
        run.path,
        f"goes on from step {step}" if step else "from the start",
    )
    with (
        MetricsWriter(run, global_batch_size) as metrics,
        Progress(label or run.path.name, step, steps) as progress,
        data.naming_errors(),
    ):
        progress.building()
        trainer.trace(batches)
        progress.start()
        while step < steps:
            stop = _next_stop(step, config)
            rate = float(optimizer.learning_rate)
            began = time.perf_counter()
            loss, accuracy, finite_steps = trainer.train(batches, stop - step)
            images_per_second = (stop - step) * global_batch_size / (time.perf_counter() - began)
            if finite_steps < stop - step:
                raise _diverged("loss", step + finite_steps + 1, rate, checkpoints, metrics)
            step = stop
            values = {
                "train/loss": loss,
                "train/accuracy": accuracy,
                "train/learning_rate": rate,
                "train/images_per_second": images_per_second,
            }
            metrics.write(step, values)
            progress.update(step, loss, accuracy, images_per_second)
            is_evaluated = step % config.evaluation.every_steps == 0 and step < steps
            is_saved = step % config.checkpoint.every_steps == 0 or step == steps
            if (is_evaluated or is_saved) and not _is_finite(
                training_model.variables + optimizer.variables
            ):
                raise _diverged("network", step, rate, checkpoints, metrics)
            if is_evaluated:
                with with_statistics(step) as statistics:
                    validation = evaluate() | {"statistics": statistics}
                metrics.write(step, _named("validation", validation))
                progress.evaluated(step, validation["accuracy"])
            if is_saved:
                checkpoints.save(step)
        with with_statistics(step) as statistics:
            validation = evaluate() | {"statistics": statistics}
            if statistics == "population":
                Checkpoints(run.population, model, None, strategy).save(step)
        finished = {Workdir.FINISHED: _digest(training_model, optimizer)}
        metrics.write(step, _named("validation", validation) | finished)
    return run.read_metrics()[-1]


class Trainer:
    """The training step, and a loop of such steps that stays on the device.

    The loss is the mean softmax cross-entropy over the global batch. L2 enters as l2 * w in the
    gradients of kernels, which is what the penalty l2/2 * |w|^2 amounts to; the loss that is
    reported is without it, and without that of an auxiliary classifier. Each replica's gradients
    are of its part of the global mean, and the optimizer sums them over the replicas.

    Args:
      model: from images to logits, or to these and the logits of an auxiliary classifier.
      optimizer: built on the model's trainable variables.
      strategy: in whose scope both were made.
      global_batch_size: examples per step, over all replicas.
      l2: weight of the penalty.
      auxiliary_weight: of the auxiliary classifier's cross-entropy in the loss.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        strategy: tf.distribute.Strategy,
        global_batch_size: int,
        l2: float = 0.0,
        auxiliary_weight: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.strategy = strategy
        self.global_batch_size = global_batch_size
        self._auxiliary_weight = auxiliary_weight
        self._l2_per_replica = l2 / strategy.num_replicas_in_sync
        with strategy.scope():
            # Loss, hits, and steps until the loss stopped being finite. Each replica adds up its
            # own: reading them sums over the replicas, which then costs nothing in a step.
            self._sums = tf.Variable(
                tf.zeros([3]),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )

    def train_step(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        """Takes one step on a replica's part of the global batch.

        Args:
          images: float32 [N, H, W, C].
          labels: int32 [N].
        """
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits, *auxiliary = tf.nest.flatten(self.model(images, training=True))
            loss = objective = self._cross_entropy(labels, logits)
            for other in auxiliary:
                objective += self._auxiliary_weight * self._cross_entropy(labels, other)
        gradients = tape.gradient(objective, [v.value for v in variables])
        if self._l2_per_replica:
            gradients = [
                g + self._l2_per_replica * v.value if v.name.endswith("kernel") else g
                for g, v in zip(gradients, variables, strict=True)
            ]
        self.optimizer.apply(gradients, variables)

        hits = tf.argmax(logits, axis=-1, output_type=tf.int32) == labels
        # The sum stays non-finite once it is, so that this counts up to the first such step.
        finite = tf.math.is_finite(self._sums[0] + loss)
        self._sums.assign_add(
            [loss, tf.reduce_sum(tf.cast(hits, tf.float32)), tf.cast(finite, tf.float32)]
        )

    def _cross_entropy(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(losses) / self.global_batch_size

    @tf.function
    def _train_loop(self, batches: tf.distribute.DistributedIterator, num_steps: tf.Tensor) -> None:
        for _ in tf.range(num_steps):
            self.strategy.run(self.train_step, args=next(batches))

    def trace(self, batches: tf.distribute.DistributedIterator) -> None:
        """Builds the graph of the loop, which takes seconds, without taking a step."""
        self._train_loop.get_concrete_function(batches, tf.constant(0))

    def train(
        self, batches: tf.distribute.DistributedIterator, num_steps: int
    ) -> tuple[float, float, int]:
        """Takes steps on the next batches.

        Returns:
          Mean loss and mean accuracy over the steps, and how many of the steps came before the
          first whose loss was not finite.
        """
        self._sums.assign(tf.zeros([3]))
        self._train_loop(batches, tf.constant(num_steps))
        loss, hits, _ = (float(s) for s in self._sums.read_value())
        local = self.strategy.experimental_local_results(self._sums)
        finite_steps = int(min(float(s[2]) for s in local))
        return loss / num_steps, hits / (num_steps * self.global_batch_size), finite_steps


def make_schedule(config: ConfigDict, num_train_examples: int) -> ExamplesSchedule:
    """Makes the schedule of config.schedule, whose epochs become examples."""
    schedule = config.schedule
    return ExamplesSchedule(
        schedule.base_rate,
        config.train.global_batch_size,
        reference_batch_size=schedule.reference_batch_size,
        decay_factor=schedule.decay_factor,
        decay_examples=max(1, round(schedule.decay_epochs * num_train_examples)),
        warmup_examples=round(schedule.warmup_epochs * num_train_examples),
    )


def _make_statistics(
    config: ConfigDict, model: keras.Model, data: pipeline.Data, strategy: tf.distribute.Strategy
) -> Callable[[int], contextlib.AbstractContextManager[str]]:
    """Makes what gives the model, for a while, the statistics to evaluate a step by.

    It yields which ones these are, "moving" or "population".
    """
    when, num_batches = config.population.when, config.population.num_batches
    if when == "never":
        return lambda step: contextlib.nullcontext("moving")
    estimator = PopulationEstimator(model, strategy)
    # The same each time, so that two evaluations differ by the network alone.
    batches = data.train_batches(strategy, config.train.global_batch_size)

    @contextlib.contextmanager
    def with_statistics(step: int) -> Iterator[str]:
        if when == "end" and step < config.train.steps:
            yield "moving"
        else:
            with estimator.applied(batches, num_batches):
                yield "population"

    return with_statistics


def _check(config: ConfigDict) -> None:
    positive = (
        "train.steps",
        "train.global_batch_size",
        "train.steps_per_loop",
        "schedule.reference_batch_size",
        "schedule.base_rate",
        "schedule.decay_factor",
        "model.width",
        "model.initializer_stddev",
        "schedule.decay_epochs",
        "evaluation.every_steps",
        "evaluation.global_batch_size",
        "population.num_batches",
        "checkpoint.every_steps",
        "checkpoint.keep",
    )
    for key in positive:
        section, name = key.split(".")
        if not 0 < config[section][name] < math.inf:
            raise UsageError(f"{key} is {config[section][name]}: it has to be greater than 0")
    for key in ("train.l2", "schedule.warmup_epochs", "model.auxiliary_weight"):
        section, name = key.split(".")
        if not 0 <= config[section][name] < math.inf:
            raise UsageError(f"{key} is {config[section][name]}: it has to be 0 or more")
    if not 0 <= config.train.momentum < 1:
        raise UsageError(
            f"train.momentum is {config.train.momentum}: it has to be at least 0 and less than 1"
        )
    if config.population.when not in ("never", "end", "evaluations"):
        raise UsageError(
            f"unknown population.when {config.population.when!r}: accepted are never, end,"
            " evaluations"
        )
    if not 0 <= config.seed < 2**32:
        raise UsageError(f"seed is {config.seed}: it has to be from 0 to {2**32 - 1}")


def _next_stop(step: int, config: ConfigDict) -> int:
    """Gives the step up to which nothing but training is due."""
    periods = (
        config.train.steps_per_loop,
        config.evaluation.every_steps,
        config.checkpoint.every_steps,
    )
    return min(config.train.steps, *(step - step % period + period for period in periods))


def _is_finite(variables: list[keras.Variable]) -> bool:
    return all(np.isfinite(v.numpy()).all() for v in variables)


def _diverged(
    what: str, step: int, rate: float, checkpoints: Checkpoints, metrics: MetricsWriter
) -> TrainingDivergedError:
    metrics.write(step, {Workdir.DIVERGED: True})
    good = f"the last good checkpoint is {checkpoints.latest}"
    return TrainingDivergedError(
        f"the {what} is not finite at step {step} (learning rate {rate:.6g});"
        f" {good if checkpoints.latest else 'there is no checkpoint yet'};"
        " lower schedule.base_rate and give a new workdir",
        step,
    )


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _digest(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> str:
    digest = hashlib.sha256()
    for variable in (*model.variables, *optimizer.variables):
        digest.update(variable.name.encode())
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()
