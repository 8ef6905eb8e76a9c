"""Finds the first non-finite tensor of a training step."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.keras_internals import all_layers, replaced_method

# (images, labels) -> (loss, hits, gradients of the trainable variables); hits are ignored.
ComputeGradients = Callable[
    [tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, Sequence[tf.Tensor | None]]
]


def first_non_finite(
    model: keras.Model,
    compute_gradients: ComputeGradients,
    images: tf.Tensor,
    labels: tf.Tensor,
    strategy: tf.distribute.Strategy | None = None,
) -> str | None:
    """Computes the gradients of one step again and names the first tensor that is not finite.

    Decisions:
      - The order is that of the computation: weights, batch, forward pass, loss, backward pass.
        Everything before the named tensor is finite: the divergence began there.
      - The training's own computation is examined: on its replicas, with its loss scale, and with
        each replica's part of the batch. A tensor counts if it is not finite on any replica.
      - Nothing changes: weights, moving statistics and random generators keep their values.
      - The optimizer's update is not examined. If the weights of a step are not finite, examine the
        step before: its gradients are not finite, or their product with the learning rate is not.
      - The inputs and outputs of each layer are examined; those of a nested model by its layers.

    Args:
      model: model as it was before the step.
      compute_gradients: calls the model in training mode on a replica's part of the batch and
        returns (loss, hits, gradients). The gradients are those of model.trainable_variables, in
        their order, with None for a variable without one; hits are ignored.
      images, labels: batch of the step, as passed to strategy.run: tensors, or an element of a
        distributed dataset.
      strategy: strategy in whose scope the model was made; None uses model.distribute_strategy.

    Returns:
      A description such as "the output of 4c_3x3_conv", "the gradient of 4c_3x3_conv/kernel", or
      "the gradient of the input of 4c_3x3_bn", computed by that layer. None if all is finite.
    """
    strategy = strategy or model.distribute_strategy
    record = _Record()
    names: list[str] = []

    def examine(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        named = _tensors_of_step(model, compute_gradients, images, labels, record)
        # Equal on all replicas.
        names[:] = [name for name, _ in named]
        non_finite = tf.stack([_is_non_finite(tensor) for _, tensor in named])
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, non_finite)

    run = tf.function(
        lambda *batch: strategy.experimental_local_results(strategy.run(examine, args=batch))[0],
        autograph=False,
    )
    with _recorded(model, record):
        counts = run(images, labels).numpy()
    return next((name for name, count in zip(names, counts, strict=True) if count), None)


# A tensor, preceded by its description.
_Named = tuple[str, tf.Tensor]


class _Record(threading.local):
    """The tensors that a replica has computed so far; each replica is traced in its own thread.

    Attributes:
      forward: inputs and outputs of the layers, in the order of the forward pass.
      backward: their gradients, in the order of the backward pass. The gradient of an input comes
        with the weights of its layer, whose gradients have been computed by then.
    """

    def __init__(self) -> None:
        self.forward: list[_Named] = []
        self.backward: list[tuple[_Named, Sequence[keras.Variable]]] = []

    def add(self, name: str, weights: Sequence[keras.Variable], value: Any) -> Any:
        """Records a value and, in the backward pass, its gradient; returns the value."""
        if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
            return value

        def gradient(dy: tf.Tensor) -> tf.Tensor:
            self.backward.append(((f"the gradient of {name}", dy), weights))
            return dy

        self.forward.append((name, value))
        return tf.custom_gradient(lambda x: (tf.identity(x), gradient))(value)


def _tensors_of_step(
    model: keras.Model,
    compute_gradients: ComputeGradients,
    images: tf.Tensor,
    labels: tf.Tensor,
    record: _Record,
) -> list[_Named]:
    """Returns every float tensor of a step, in the order of the computation."""
    weights = [(f"the weight {v.path}", tf.convert_to_tensor(v.value)) for v in model.variables]
    # In this scope, Keras assigns no variables.
    with keras.StatelessScope():
        loss, _, gradients = compute_gradients(images, labels)
    weight_gradients = {
        id(v): (f"the gradient of {v.path}", tf.convert_to_tensor(gradient))
        for v, gradient in zip(model.trainable_variables, gradients, strict=True)
        if gradient is not None
    }
    backward: list[_Named] = []
    for gradient, layer_weights in record.backward:
        backward += [
            weight_gradients.pop(id(v)) for v in layer_weights if id(v) in weight_gradients
        ]
        backward.append(gradient)
    # The rest belongs to the first layer, whose input has no gradient.
    backward += weight_gradients.values()
    batch = [("the images", images), ("the labels", labels)]
    losses = [("the loss (the outputs are finite)", loss)]
    # Without tensors of other graphs, such as that of the loop in keras.layers.RNN.
    return [
        (name, tensor)
        for name, tensor in (*weights, *batch, *record.forward, *losses, *backward)
        if tensor.dtype.is_floating and tensor.graph is tf.compat.v1.get_default_graph()
    ]


@contextlib.contextmanager
def _recorded(model: keras.Model, record: _Record) -> Iterator[None]:
    """Records the calls of all layers and leaves the moving statistics unchanged."""

    def call_layer(layer: keras.Layer, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Most layers without weights have no path.
        name = layer.path or layer.name
        add_input = functools.partial(record.add, f"the input of {name}", layer.trainable_variables)
        add_output = functools.partial(record.add, f"the output of {name}", ())
        args, kwargs = tf.nest.map_structure(add_input, (args, kwargs))
        return tf.nest.map_structure(add_output, call(*args, **kwargs))

    with contextlib.ExitStack() as stack:
        for layer in all_layers(model, include_self=False):
            if not isinstance(layer, keras.Model):
                recorded_call = functools.partial(call_layer, layer, layer.call)
                stack.enter_context(replaced_method(layer, "call", recorded_call))
            if isinstance(layer, BatchNormalization):
                stack.enter_context(
                    replaced_method(layer, "update_moving_statistics", lambda *_: None)
                )
        yield


def _is_non_finite(tensor: tf.Tensor) -> tf.Tensor:
    finite = tf.reduce_all(tf.math.is_finite(tensor))
    return tf.cast(tf.logical_not(finite), tf.float32)
