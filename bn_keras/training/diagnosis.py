"""Where a step that diverges first stops being finite."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.keras_internals import all_layers, replaced_method

# (images, labels) -> (loss, anything, gradients of the trainable variables)
Differentiate = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, Sequence[tf.Tensor]]]


def first_non_finite(
    model: keras.Model,
    differentiate: Differentiate,
    images: tf.Tensor,
    labels: tf.Tensor,
    strategy: tf.distribute.Strategy | None = None,
) -> str | None:
    """Computes the gradients of one step again and names the first tensor that is not finite.

    Decisions:
      - The order is that of the computation: weights, batch, forward pass, loss, backward pass.
        Everything before the named tensor is finite, so that the divergence began there.
      - The training's own computation is examined: on the replicas it runs on, with its loss
        scale, and each replica's own part of the batch. Any replica counts.
      - Nothing changes: weights, moving statistics and random generators keep their values.
      - The optimizer's update is not examined. Where the weights of a step are not finite, the
        gradients of the step before say where that came from; if those are finite, their product
        with the learning rate is not.
      - Layers are observed by their calls; a nested model by the calls of its layers.

    Args:
      model: model as it was before the step.
      differentiate: calls the model in training mode on a replica's part of the batch and returns
        (loss, anything, gradients); the gradients are those of model.trainable_variables, in
        their order, and None where there is none.
      images, labels: batch of the step, as strategy.run takes it: a replica's part, or an element
        of a distributed dataset.
      strategy: strategy in whose scope the model was made; None is the one the model remembers.

    Returns:
      A description such as "the output of 4c_3x3_conv", "the gradient of 4c_3x3_conv/kernel", or
      "the gradient of the input of 4c_3x3_bn", computed by that layer. None if all is finite.
    """
    strategy = strategy or model.distribute_strategy
    record = _Record()
    names: list[str] = []

    def examine(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        places = _places(model, differentiate, images, labels, record)
        # The same on every replica; the last one's remain.
        names[:] = [name for name, _ in places]
        non_finite = tf.stack([_is_non_finite(tensor) for _, tensor in places])
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, non_finite)

    run = tf.function(
        lambda *batch: strategy.experimental_local_results(strategy.run(examine, args=batch))[0],
        autograph=False,
    )
    with _recorded(model, record):
        counts = run(images, labels).numpy()
    return next((name for name, count in zip(names, counts, strict=True) if count), None)


# A description, and the tensor that it describes.
_Place = tuple[str, tf.Tensor]


class _Record(threading.local):
    """What a replica has computed so far; each replica is traced in its own thread.

    Attributes:
      forward: inputs and outputs of the layers, in the order of the computation.
      backward: their gradients in order; with the gradient of an input, the weights whose
        gradients the layer has computed by then.
    """

    def __init__(self) -> None:
        self.forward: list[_Place] = []
        self.backward: list[tuple[_Place, Sequence[keras.Variable]]] = []

    def add(self, name: str, weights: Sequence[keras.Variable], value: Any) -> Any:
        """Records a value and, in the backward pass, its gradient; returns the value."""
        if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
            return value

        def gradient(dy: tf.Tensor) -> tf.Tensor:
            self.backward.append(((f"the gradient of {name}", dy), weights))
            return dy

        self.forward.append((name, value))
        return tf.custom_gradient(lambda x: (tf.identity(x), gradient))(value)


def _places(
    model: keras.Model,
    differentiate: Differentiate,
    images: tf.Tensor,
    labels: tf.Tensor,
    record: _Record,
) -> list[_Place]:
    """Returns every float tensor of a step, in the order of the computation."""
    weights = [(f"the weight {v.path}", tf.convert_to_tensor(v.value)) for v in model.variables]
    # Inside this scope Keras assigns nothing.
    with keras.StatelessScope():
        loss, _, gradients = differentiate(images, labels)
    of_weights = {
        id(v): (f"the gradient of {v.path}", tf.convert_to_tensor(gradient))
        for v, gradient in zip(model.trainable_variables, gradients, strict=True)
        if gradient is not None
    }
    backward: list[_Place] = []
    for place, computed in record.backward:
        backward += [of_weights.pop(id(v)) for v in computed if id(v) in of_weights]
        backward.append(place)
    # The first layer's weights, whose input has no gradient.
    backward += of_weights.values()
    batch = [("the images", images), ("the labels", labels)]
    losses = [("the loss, of finite outputs", loss)]
    # Layers that a loop runs in a graph of its own, as keras.layers.RNN does, show no tensors here.
    return [
        (name, tensor)
        for name, tensor in (*weights, *batch, *record.forward, *losses, *backward)
        if tensor.dtype.is_floating and tensor.graph is tf.compat.v1.get_default_graph()
    ]


@contextlib.contextmanager
def _recorded(model: keras.Model, record: _Record) -> Iterator[None]:
    """Records the calls of all layers, and keeps the moving statistics from changing."""

    def call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        # Most layers without weights have no path.
        name = layer.path or layer.name
        enter = functools.partial(record.add, f"the input of {name}", layer.trainable_variables)
        leave = functools.partial(record.add, f"the output of {name}", ())
        args, kwargs = tf.nest.map_structure(enter, (args, kwargs))
        return tf.nest.map_structure(leave, type(layer).call(layer, *args, **kwargs))

    with contextlib.ExitStack() as replaced:
        for layer in all_layers(model, include_self=False):
            if not isinstance(layer, keras.Model):
                recorded = functools.partial(call, layer)
                replaced.enter_context(replaced_method(layer, "call", recorded))
            if isinstance(layer, BatchNormalization):
                replaced.enter_context(
                    replaced_method(layer, "update_moving_statistics", lambda *_: None)
                )
        yield


def _is_non_finite(tensor: tf.Tensor) -> tf.Tensor:
    finite = tf.reduce_all(tf.math.is_finite(tensor))
    return tf.cast(tf.logical_not(finite), tf.float32)
