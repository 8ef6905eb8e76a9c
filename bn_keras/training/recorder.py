"""What comes into one unit of a layer while the network is trained: the paper's Figure 1b, c."""

import contextlib
import difflib
import itertools
import math
import threading
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data
from bn_keras.errors import UsageError
from bn_keras.inference.evaluation import open_mini_batches
from bn_keras.keras_internals import all_layers
from bn_keras.training.step import Trainer


class Recorder:
    """Gives percentiles of a layer's input at one unit, over the same training examples each time.

    Decisions:
      - The network is as training has it: BN normalizes by the statistics of mini-batches of the
        training's size, each replica's part where it isn't synchronized, and dropout drops. So the
        percentiles show the network, and not how far its moving averages lag behind.
      - Of a layer that is called several times it is the first call's input.
      - Training doesn't notice: nothing that Keras would assign on the way is assigned, neither
        moving statistics nor the states of random generators.
      - All mini-batches are taken in one call on the device, by a graph that is built once, here.
        They lie there as long as the recorder does.

    Args:
      model: as it is trained; nested models may have the layer.
      strategy: in whose scope it was made.
      batches: of images, all of one shape, as what a distributed dataset gives; at least one.
      layer: name of the layer.
      unit: index into the last axis of its input: a unit, or a feature map, which is taken over
        the batch and all locations.
      percentiles: from 0 to 100.

    Raises:
      UsageError: no such layer, or one without an input that has such a unit.

    Source: Ioffe & Szegedy 2015, section 4.1.
    """

    def __init__(
        self,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        batches: Sequence,
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
        self._seen = _Seen()
        # Raised only here: TensorFlow does not recover from what a replica raises in its trace.
        self._error = ""
        with _observed(_find_layer(model, layer), self._seen):
            self._take_all = tf.function(self._values, autograph=False).get_concrete_function()
        if self._error:
            raise UsageError(self._error)

    def __call__(self) -> dict[str, float]:
        """Gives "record/15" and so on, of the network as it is now; NaN where it isn't finite."""
        values = self._take_all().numpy().astype(np.float64)
        # Between two infinities there is no percentile.
        with np.errstate(invalid="ignore"):
            found = np.percentile(values, self._percentiles)
        return {f"record/{p:g}": float(v) for p, v in zip(self._percentiles, found, strict=True)}

    def _values(self) -> tf.Tensor:
        """Gives float32 [num_batches, values in one of them]."""

        def take(index: tf.Tensor) -> tf.Tensor:
            values = self._strategy.run(self._replica_values, args=(self._batches, index))
            return self._strategy.gather(values, axis=0)

        # The loop is around strategy.run, because collectives inside of a replica stand none.
        indices = tf.range(self._num_batches)
        return tf.map_fn(take, indices, fn_output_signature=tf.float32, parallel_iterations=1)

    def _replica_values(self, batches: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Gives what comes into the unit for a replica's part of one mini-batch, float32 [...]."""
        self._seen.inputs = None
        # What Keras assigns in this scope goes nowhere.
        with keras.StatelessScope():
            self._model(batches[index], training=True)
        inputs = self._seen.inputs
        self._error = self._find_error(inputs)
        if self._error:
            return tf.zeros([1])
        return tf.reshape(tf.cast(inputs[..., self._unit], tf.float32), [-1])

    def _find_error(self, inputs: object) -> str:
        """Says what keeps the unit from being recorded; "" if nothing does."""
        if not isinstance(inputs, tf.Tensor):
            return (
                f"record.layer is {self._layer!r}, which isn't called with one tensor: name a layer"
                " before or behind it"
            )
        if not 0 <= self._unit < inputs.shape[-1]:
            return (
                f"record.unit is {self._unit}, but what comes into {self._layer!r} has"
                f" {inputs.shape[-1]} units: give one from 0 to {inputs.shape[-1] - 1}"
            )
        return ""


def open_recorder(config: ConfigDict, data: Data, trainer: Trainer) -> Recorder | None:
    """Makes the recorder that config.record asks for; None where it asks for none.

    It takes the first examples of the training, in whole mini-batches as BN has them there.
    """
    record = config.record
    if not record.layer:
        return None
    num_batches = math.ceil(record.num_examples / trainer.global_micro_batch_size)
    with data.naming_errors():
        batches = itertools.islice(open_mini_batches(config, data, trainer.strategy), num_batches)
        return Recorder(
            trainer.model,
            trainer.strategy,
            [images for images, _ in batches],
            record.layer,
            record.unit,
            record.percentiles,
        )


class _Seen(threading.local):
    """What the layer was called with, to each replica's trace, which has a thread of its own."""

    inputs: object = None


@contextlib.contextmanager
def _observed(layer: keras.Layer, seen: _Seen) -> Iterator[None]:
    """Has the input of the layer's first call seen."""

    def call(*args: object, **kwargs: object) -> object:
        if seen.inputs is None:
            seen.inputs = (*args, *kwargs.values())[0]
        return type(layer).call(layer, *args, **kwargs)

    layer.call = call
    try:
        yield
    finally:
        # The class' own comes to light again.
        del layer.call


def _find_layer(model: keras.Model, name: str) -> keras.Layer:
    layers = {layer.name: layer for layer in reversed(all_layers(model, include_self=False))}
    if name not in layers:
        names = [n for n, layer in layers.items() if not isinstance(layer, keras.layers.InputLayer)]
        near = difflib.get_close_matches(name, names) or names[::-1][:5]
        raise UsageError(
            f"record.layer is {name!r}, which the network doesn't have: name one of its"
            f" {len(names)} layers, such as {', '.join(near)}"
        )
    return layers[name]
