"""Accuracy on a validation set, in which every example counts exactly once."""

from collections.abc import Callable

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras import distribution
from bn_keras.batch_norm import merge_moving_statistics
from bn_keras.data import pipeline
from bn_keras.errors import UsageError
from bn_keras.population import estimate_population_statistics
from bn_keras.trained import load_trained
from bn_keras.workdir import Workdir


def evaluate_workdir(workdir: str, config: ConfigDict | None = None) -> dict[str, float]:
    """Evaluates the network of a run as it was finished, or its latest checkpoint.

    That is by the statistics of the population where the run took these, or where the config
    asks for them in whatever way; they are then taken here. Else it is by the moving ones.

    Args:
      workdir: of the run.
      config: to evaluate by; None is the run's own. Its model has to be the run's; the data may
        lie elsewhere, and the devices may be others.

    Returns:
      As make_evaluator, with the "step" and the "statistics": "moving" or "population".

    Raises:
      UsageError: no run or no checkpoint in the folder, a config of another network, or data of
        other classes.
    """
    trained = Workdir(workdir).read_config()
    config = config or trained
    if (config.model, config.batch_norm) != (trained.model, trained.batch_norm):
        raise UsageError(
            f"the config's network is not that of the run in {workdir}: leave the config out to"
            " evaluate with the run's own"
        )
    strategy = distribution.make_strategy(**config.distribution)
    network = load_trained(workdir, strategy)
    data = pipeline.open_data(config.data, seed=config.seed)
    if (data.class_names, data.input_shape) != (network.class_names, network.input_shape):
        raise UsageError(
            f"{config.data.name} has {data.num_classes} classes and images of {data.input_shape},"
            f" but the network in {workdir} was trained for {len(network.class_names)} classes,"
            f" which may go by other names, and {network.input_shape}: give the data it was"
            " trained for"
        )
    evaluate = make_evaluator(network.model, data, strategy, config.evaluation.global_batch_size)
    statistics = network.statistics
    if statistics == "moving" and config.population.when != "never":
        batches = data.train_batches(strategy, config.train.global_batch_size)
        estimate_population_statistics(
            network.model, batches, config.population.num_batches, strategy
        )
        statistics = "population"
    return {"step": network.step, "statistics": statistics, **evaluate()}


def make_evaluator(
    model: keras.Model,
    data: pipeline.Data,
    strategy: tf.distribute.Strategy,
    global_batch_size: int,
) -> Callable[[], dict[str, float]]:
    """Makes a function that evaluates a model, traced once however often it is called.

    The replicas' moving statistics are merged first, so that all of them judge by the same.

    Args:
      model: from images to logits.
      data: whose validation examples are taken.
      strategy: in whose scope the model was made.
      global_batch_size: examples at a time, over all replicas; the last ones are padded.

    Returns:
      A function without arguments whose result maps "examples" to how many there are, and
      "loss", "accuracy" and "top5_accuracy" to means over them: softmax cross-entropy in nats,
      and fractions of one.
    """
    batches, num_steps = data.validation_batches(strategy, global_batch_size)
    with strategy.scope():
        # Summed on each replica by itself, and over the replicas when read.
        sums = tf.Variable(
            tf.zeros([4]),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    def eval_step(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> None:
        logits = model(images, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        # The classes in order of falling logits; equal ones can't all be hits.
        _, best = tf.nn.top_k(logits, k=min(5, logits.shape[-1]))
        hits = tf.cast(best == labels[:, tf.newaxis], tf.float32)
        per_example = [tf.ones_like(losses), losses, hits[:, 0], tf.reduce_sum(hits, axis=1)]
        sums.assign_add(tf.linalg.matvec(tf.stack(per_example), weights))

    @tf.function
    def eval_loop(iterator: tf.distribute.DistributedIterator) -> None:
        for _ in tf.range(num_steps):
            strategy.run(eval_step, args=next(iterator))

    def evaluate() -> dict[str, float]:
        merge_moving_statistics(model, strategy)
        sums.assign(tf.zeros([4]))
        eval_loop(iter(batches))
        examples, *totals = (float(s) for s in sums.read_value())
        if examples != data.num_validation_examples:
            raise AssertionError(f"{examples:.0f} of {data.num_validation_examples} were counted")
        names = ("loss", "accuracy", "top5_accuracy")
        return {"examples": int(examples)} | {
            name: total / examples for name, total in zip(names, totals, strict=True)
        }

    return evaluate
