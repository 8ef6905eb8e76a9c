"""Percentiles of one unit's input during training: the paper's Figure 1b and c."""

import difflib
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers, replaced_method
from bn_keras.training.step import Trainer


class Recorder:
    """Computes percentiles of a layer's input at one unit, always over the same training examples.

    Decisions:
      - The network is in training mode: BN normalizes with the statistics of mini-batches of the
        training's size, per replica if it is not synchronized, and dropout is active. The
        percentiles show the network, not the lag of its moving statistics.
      - For a layer that is called several times, the input of its first call is recorded.
      - Training is unaffected: no variable changes, neither moving statistics nor the states of
        random generators.
      - One call on the device processes all mini-batches. The constructor builds its graph. The
        mini-batches stay in the device's memory as long as the recorder exists.

    Args:
      model: model as it is trained; the layer may be in a nested model.
      strategy: strategy in whose scope it was made.
      batches: image batches of one shape, elements of a distributed dataset; at least one.
      layer: name of the layer.
      unit: index into the last axis of its input: a unit, or a feature map, recorded over the
        batch and all locations.
      percentiles: numbers from 0 to 100.

    Raises:
      UsageError: no such layer, or a layer whose input has no such unit.

    Source: Ioffe & Szegedy 2015, section 4.1.
    """

    def __init__(
        self,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        batches: Sequence[Any],
        layer: str,
        unit: int = 0,
        percentiles: Sequence[float] = (15, 50, 85),
    ) -> None:
        self._model = model
        self._strategy = strategy
        self._layer = layer
        self._unit = unit
        self._percentiles = percentiles
        self._num_batches = len(batches)
        stack = tf.function(lambda parts: strategy.run(tf.stack, args=(parts,)), autograph=False)
        self._batches = stack(list(batches))
        self._first_input = _FirstInput()
        # Raised after the trace: TensorFlow does not recover from an error inside a replica.
        self._error = ""
        observed = _find_layer(model, layer)
        with replaced_method(observed, "call", self._first_input.observe(observed)):
            self._all_values = tf.function(self._values, autograph=False).get_concrete_function()
        if self._error:
            raise UsageError(self._error)

    def __call__(self) -> dict[str, float]:
        """Returns the percentiles of the current network by name, such as "record/15".

        A percentile between values that are not finite is NaN.
        """
        inputs = self._all_values().numpy().astype(np.float64)
        # Interpolating between infinities yields NaN, which is intended.
        with np.errstate(invalid="ignore"):
            values = np.percentile(inputs, self._percentiles)
        return {f"record/{p:g}": float(v) for p, v in zip(self._percentiles, values, strict=True)}

    def _values(self) -> tf.Tensor:
        """Returns the unit's inputs, float32 [num_batches, values per batch]."""

        def record(index: tf.Tensor) -> tf.Tensor:
            values = self._strategy.run(self._replica_values, args=(self._batches, index))
            return self._strategy.gather(values, axis=0)

        # Outside strategy.run: collectives cannot run under control flow inside a replica.
        indices = tf.range(self._num_batches)
        return tf.map_fn(record, indices, fn_output_signature=tf.float32, parallel_iterations=1)

    def _replica_values(self, batches: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Returns the unit's input for a replica's part of one mini-batch, float32 [...]."""
        self._first_input.value = None
        # In this scope, Keras assigns no variables.
        with keras.StatelessScope():
            self._model(batches[index], training=True)
        inputs = self._first_input.value
        self._error = self._find_error(inputs)
        if self._error:
            return tf.zeros([1])
        return tf.reshape(tf.cast(inputs[..., self._unit], tf.float32), [-1])

    def _find_error(self, inputs: Any) -> str:
        """Returns why the unit cannot be recorded; "" if it can."""
        if not isinstance(inputs, tf.Tensor):
            return (
                f"record.layer is {self._layer!r}, which is not called with a single tensor: name a"
                " layer before or after it"
            )
        if not 0 <= self._unit < inputs.shape[-1]:
            return (
                f"record.unit={self._unit} is invalid: the input of {self._layer!r} has units 0 to"
                f" {inputs.shape[-1] - 1}"
            )
        return ""


def open_recorder(
    trainer: Trainer, data: Data, settings: ConfigDict, num_examples: int | None = None
) -> Recorder | None:
    """Builds a recorder over the first training examples, in whole mini-batches of BN.

    Args:
      trainer: trainer of the model.
      data: training input.
      settings: config.record.
      num_examples: examples to record, rounded up to whole mini-batches; None uses the config's.

    Returns:
      The recorder; None if the config names no layer.
    """
    if not settings.layer:
        return None
    num_batches = math.ceil(
        (num_examples or settings.num_examples) / trainer.global_micro_batch_size
    )
    with data.reporting_errors():
        batches = data.train_batches(trainer.strategy, trainer.global_micro_batch_size)
        images = [images for images, _ in itertools.islice(batches, num_batches)]
        return Recorder(
            trainer.model,
            trainer.strategy,
            images,
            settings.layer,
            settings.unit,
            settings.percentiles,
        )


class _FirstInput(threading.local):
    """First input of a layer in each replica's trace; each replica is traced in its own thread."""

    value: Any = None

    def observe(self, layer: keras.Layer) -> Any:
        """Returns a replacement for `layer.call` that stores the input of the first call."""
        call = layer.call

        def observed_call(*args: Any, **kwargs: Any) -> Any:
            if self.value is None:
                self.value = (*args, *kwargs.values())[0]
            return call(*args, **kwargs)

        return observed_call


def _find_layer(model: keras.Model, name: str) -> keras.Layer:
    layers = {layer.name: layer for layer in reversed(all_layers(model, include_self=False))}
    if name not in layers:
        names = [n for n, layer in layers.items() if not isinstance(layer, keras.layers.InputLayer)]
        near = difflib.get_close_matches(name, names) or names[::-1][:5]
        raise UsageError(
            f"unknown record.layer {name!r}: expected one of the network's {len(names)} layers,"
            f" such as {', '.join(near)}"
        )
    return layers[name]
