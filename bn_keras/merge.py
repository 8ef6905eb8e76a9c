"""Merging the moving statistics of replicas that are not synchronized."""

import functools
import itertools
import weakref
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.keras_internals import all_layers
from bn_keras.replicas import gather_replicas


class MergeMovingStatistics(keras.callbacks.Callback):
    """Merges the replicas' moving statistics in `fit`, `evaluate` and `predict`.

    Before each evaluation and at the end of each epoch; list it before whatever saves.
    """

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Merges for what is saved after an epoch."""
        self._merge()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Merges for what is saved after training."""
        self._merge()

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Merges for the evaluation."""
        self._merge()

    def on_predict_begin(self, logs: dict | None = None) -> None:
        """Merges for the prediction."""
        self._merge()

    def _merge(self) -> None:
        merge_moving_statistics(self.model, self.model.distribute_strategy)


def merge_moving_statistics(
    model: keras.Model, strategy: tf.distribute.Strategy | None = None
) -> None:
    """Gives all replicas the same moving statistics: mean and variance of their mixture.

    Call it from Python, outside strategy.run, before each save and each evaluation: layers that
    aren't synchronized keep the statistics of their own replica's batches, and only the first
    replica's would be saved. Each replica weighs as much as the values that it has seen since
    the last merge. One collective for the whole model; nothing to do at one replica.

    Args:
      model: with BatchNormalization layers anywhere inside.
      strategy: under which the model was made; None is the current one.

    Source: the law of total variance.
    """
    strategy = strategy or tf.distribute.get_strategy()
    layers = [
        layer
        for layer in all_layers(model)
        if isinstance(layer, BatchNormalization) and layer.built and layer._merge_weight is not None
    ]
    if strategy.num_replicas_in_sync == 1 or not layers:
        return
    key = (strategy, *map(id, layers))
    merges = _merges.setdefault(model, {})
    if key not in merges:
        merges[key] = tf.function(
            lambda: strategy.run(functools.partial(_merge_in_replica, layers)), autograph=False
        )
    merges[key]()


# The traced merges of each model; gone with the model.
_merges: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _merge_in_replica(layers: Sequence[BatchNormalization]) -> None:
    """Mixes all channels of all layers at once."""
    mixed = [layer._mixed() for layer in layers]
    means, variances = zip(*itertools.chain(*mixed), strict=True)
    parts = (
        [layer._merge_weight for layer in layers],
        means,
        variances,
        [layer.num_updates for layer in layers if layer.momentum is None],
    )
    dtype = tf.float64 if any(m.dtype == tf.float64 for m in means) else tf.float32
    flat = [tf.reshape(tf.cast(t, dtype), [-1]) for part in parts for t in part]
    channels = [m.shape[0] for m in means]
    lengths = [len(layers), sum(channels), sum(channels), len(parts[-1])]
    gathered = gather_replicas(tf.concat(flat, axis=0))
    weight, mean, variance, num_updates = tf.split(gathered, lengths, axis=1)
    of_layer = [sum(mean.shape[0] for mean, _ in pairs) for pairs in mixed]
    weight = tf.gather(weight, np.repeat(np.arange(len(layers)), of_layer), axis=1)
    merged = zip(*(tf.split(t, channels) for t in _mixture(weight, mean, variance)), strict=True)
    num_updates = iter(tf.unstack(tf.reduce_max(num_updates, axis=0)))
    for layer in layers:
        layer._take_merged(merged, num_updates)


def _mixture(
    weight: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Gives mean and variance [C] of a mixture of R parts, each argument being [R, C].

    In differences from the first part, so that parts that agree come out as they went in, to the
    bit. Without any weight, all weigh the same.
    """
    total = tf.reduce_sum(weight, axis=0)
    share = tf.where(total > 0, weight / tf.maximum(total, 1), 1 / weight.shape[0])
    merged = mean[0] + tf.reduce_sum(share * (mean - mean[0]), axis=0)
    within = variance[0] + tf.reduce_sum(share * (variance - variance[0]), axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged), axis=0)
    return merged, within + between
