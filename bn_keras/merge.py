"""Merging the moving statistics of replicas that are not synchronized."""

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers
from bn_keras.replicas import gather_replicas


class MergeMovingStatistics(keras.callbacks.Callback):
    """Merges the replicas' moving statistics in `fit`, `evaluate` and `predict`.

    Runs before each evaluation and prediction, after each epoch and after training. List it before
    any callback that saves the model. A save within an epoch, as with a number as save_freq of
    keras.callbacks.ModelCheckpoint, has the moving statistics of the first replica.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Merges after an epoch, before other callbacks save the model."""
        self._merge()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Merges after training."""
        self._merge()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Merges before an evaluation."""
        self._merge()

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Merges before a prediction."""
        self._merge()

    def _merge(self) -> None:
        merge_moving_statistics(self.model)


def merge_moving_statistics(
    model: keras.Layer, strategy: tf.distribute.Strategy | None = None
) -> None:
    """Assigns all replicas the mean and variance of the mixture of their moving statistics.

    In a layer that is not synchronized, each replica has moving statistics of its own, and only
    those of the first replica are saved. Call this before each save and each evaluation, outside
    strategy.run. Each replica is weighted by the number of values that it has seen since the last
    merge. The whole model needs one collective; a single replica needs none.

    Args:
      model: model or layer with BatchNormalization layers at any depth.
      strategy: strategy that the model was created under; None means the one that its variables
        remember.

    Raises:
      UsageError: `model` is neither a model nor a layer, or was not created under `strategy`.

    Source: the law of total variance.
    """
    if not isinstance(model, keras.Layer):
        raise UsageError(f"model={model!r} is invalid: expected a keras.Model or a layer")
    counters = {
        layer: counter
        for layer in all_layers(model)
        if isinstance(layer, BatchNormalization)
        and (counter := layer.values_since_merge) is not None
    }
    if not counters:
        # The replicas, if any, are synchronized.
        return
    own = next(iter(counters.values())).distribute_strategy
    if strategy not in (None, own):
        raise UsageError(
            f"model {model.name!r} was created under another strategy, a {type(own).__name__} with"
            f" {own.num_replicas_in_sync} replicas: pass that one, or none"
        )
    strategy = own
    key = (strategy, *map(id, counters))
    merges = _traced_merges.setdefault(model, {})
    if key not in merges:
        merges[key] = tf.function(
            functools.partial(_merge, strategy, list(map(weakref.ref, counters))), autograph=False
        )
    merges[key]()


# The traced functions of each model, released together with it: they have no other references to
# its layers.
_traced_merges: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _merge(
    strategy: tf.distribute.Strategy, layers: Sequence[weakref.ref[BatchNormalization]]
) -> None:
    counters = {layer: layer.values_since_merge for get in layers if (layer := get()) is not None}
    strategy.run(lambda: _merge_in_replica(counters))


def _merge_in_replica(counters: Mapping[BatchNormalization, tf.Variable]) -> None:
    """Merges all channels of all layers in one collective, and resets their counters.

    Args:
      counters: number of values that each layer has seen since the last merge.
    """
    weights, means, variances = zip(
        *(
            (counter, mean, variance)
            for layer, counter in counters.items()
            for mean, variance in _read_statistics(layer)
        ),
        strict=True,
    )
    updates = [layer.num_updates for layer in counters if layer.momentum is None]
    dtype = tf.float64 if any(mean.dtype == tf.float64 for mean in means) else tf.float32
    packed = [tf.reshape(tf.cast(t, dtype), [-1]) for t in (*weights, *means, *variances, *updates)]
    channels = [mean.shape[0] for mean in means]
    sizes = [len(weights), sum(channels), sum(channels), len(updates)]
    gathered = gather_replicas(tf.concat(packed, axis=0))
    weight, mean, variance, num_updates = tf.split(gathered, sizes, axis=1)
    weight = tf.gather(weight, np.repeat(np.arange(len(channels)), channels), axis=1)
    merged = zip(*(tf.split(t, channels) for t in _mix(weight, mean, variance)), strict=True)
    merged_updates = iter(tf.unstack(tf.reduce_max(num_updates, axis=0)))
    for layer, counter in counters.items():
        _assign_statistics(layer, merged, merged_updates)
        counter.assign(0.0)


def _read_statistics(layer: BatchNormalization) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Returns the pairs of mean and variance, each [C], that a merge mixes."""
    pairs = [(layer.moving_mean, layer.moving_variance)]
    if layer.renorm:
        pairs.append((layer.renorm_mean, tf.square(layer.renorm_stddev)))
    return [(tf.reshape(mean, [-1]), tf.reshape(variance, [-1])) for mean, variance in pairs]


def _assign_statistics(
    layer: BatchNormalization,
    merged: Iterator[tuple[tf.Tensor, tf.Tensor]],
    num_updates: Iterator[tf.Tensor],
) -> None:
    """Assigns a layer its share of the merged statistics.

    Args:
      layer: layer to assign to.
      merged: yields pairs of mean and variance, [C], in the order of `_read_statistics`.
      num_updates: yields the update counts of the layers with momentum=None.
    """

    def assign(variable: keras.Variable, value: tf.Tensor) -> None:
        variable.assign(tf.cast(tf.reshape(value, variable.shape), variable.dtype))

    mean, variance = next(merged)
    assign(layer.moving_mean, mean)
    assign(layer.moving_variance, variance)
    if layer.renorm:
        assign(layer.moving_stddev, tf.sqrt(variance + layer.epsilon))
        mean, variance = next(merged)
        assign(layer.renorm_mean, mean)
        assign(layer.renorm_stddev, tf.sqrt(variance))
    if layer.momentum is None:
        assign(layer.num_updates, next(num_updates))


def _mix(weight: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes mean and variance, [C], of a mixture of R parts.

    Computed from differences to the first part, so that equal parts are returned bit for bit.
    Where all weights are 0, all parts count equally.

    Args:
      weight, mean, variance: [R, C].
    """
    total = tf.reduce_sum(weight, axis=0)
    share = tf.where(total > 0, weight / tf.maximum(total, 1), 1 / weight.shape[0])
    merged = mean[0] + tf.reduce_sum(share * (mean - mean[0]), axis=0)
    within = variance[0] + tf.reduce_sum(share * (variance - variance[0]), axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged), axis=0)
    return merged, within + between
