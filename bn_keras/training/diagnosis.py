"""Where a step that diverges stops being finite."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.keras_internals import all_layers


def first_non_finite(
    model: keras.Model,
    differentiate: Callable[
        [tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, Sequence[tf.Tensor]]
    ],
    images: tf.Tensor,
    labels: tf.Tensor,
    strategy: tf.distribute.Strategy | None = None,
) -> str | None:
    """Takes the gradients of one step once more and names the first place that isn't finite.

    Decisions:
      - The order is that of the computation: weights, batch, forward pass, loss, backward pass.
        What comes before the place named is finite, so that it began there and not elsewhere.
      - It is the training's own computation that is looked at, on the replicas that it runs on,
        with the loss scaled as it is there, and each replica's part of the batch where it lies;
        any replica counts.
      - Nothing changes: weights, moving statistics and random generators stay as they are.
      - What the optimizer then does isn't looked at. Where weights of a step aren't finite
        already, the gradients of the step before say where they come from; if these are finite,
        it is their product with the learning rate that is not.
      - Layers are seen by their calls; a nested model through its layers.

    Args:
      model: as it was before the step.
      differentiate: calls the model in training mode, on a replica's part of the batch, and gives
        (loss, anything, gradients): the gradients are those of model.trainable_variables, in
        their order, and None where there is none.
      images, labels: the step's batch, as strategy.run takes them: a replica's part, or what a
        distributed dataset gives.
      strategy: in whose scope the model was made; None is the one that the model remembers.

    Returns:
      Such as "the output of 4c_3x3_conv", "the gradient of 4c_3x3_conv/kernel", or "the gradient
      of the input of 4c_3x3_bn": that layer's own doing. None if all of it is finite.
    """
    strategy = strategy or model.distribute_strategy
    record = _Record()
    names = []

    def look(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        places = _places(model, differentiate, images, labels, record)
        # All replicas are the same; the last one's stay.
        names[:] = [name for name, _ in places]
        spoiled = tf.stack([_is_spoiled(tensor) for _, tensor in places])
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, spoiled)

    run = tf.function(
        lambda *batch: strategy.experimental_local_results(strategy.run(look, args=batch))[0],
        autograph=False,
    )
    with _observed(model, record):
        spoiled = run(images, labels).numpy()
    return next((name for name, count in zip(names, spoiled, strict=True) if count), None)


# What a place is called, and what is there.
_Place = tuple[str, tf.Tensor]


class _Record(threading.local):
    """What a replica has computed so far; each is traced in a thread of its own.

    Attributes:
      forward: what went into and came out of the layers, in this order.
      backward: the gradients of these in theirs, and with the one of an input the weights whose
        gradients the layer has made by then.
    """

    def __init__(self) -> None:
        self.forward: list[_Place] = []
        self.backward: list[tuple[_Place, Sequence[keras.Variable]]] = []

    def add(self, name: str, weights: Sequence[keras.Variable], value: object) -> object:
        """Gives the value on, and has its gradient added too."""
        if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
            return value

        def gradient(dy: tf.Tensor) -> tf.Tensor:
            self.backward.append(((f"the gradient of {name}", dy), weights))
            return dy

        self.forward.append((name, value))
        return tf.custom_gradient(lambda x: (tf.identity(x), gradient))(value)


def _places(
    model: keras.Model,
    differentiate: Callable,
    images: tf.Tensor,
    labels: tf.Tensor,
    record: _Record,
) -> list[_Place]:
    """Gives every tensor of floats in a step, in the order of the computation."""
    weights = [(f"the weight {v.path}", tf.convert_to_tensor(v.value)) for v in model.variables]
    # What Keras assigns in this scope goes nowhere.
    with keras.StatelessScope():
        loss, _, gradients = differentiate(images, labels)
    of_weights = {
        id(v): (f"the gradient of {v.path}", tf.convert_to_tensor(gradient))
        for v, gradient in zip(model.trainable_variables, gradients, strict=True)
        if gradient is not None
    }
    backward = []
    for place, made in record.backward:
        backward += [of_weights.pop(id(v)) for v in made if id(v) in of_weights]
        backward.append(place)
    # Of the first layer, whose input has no gradient.
    backward += of_weights.values()
    batch = [("the images", images), ("the labels", labels)]
    loss = ("the loss, of finite outputs", loss)
    # A layer that a loop runs in its own graph, as keras.layers.RNN does, shows no tensors here.
    return [
        (name, tensor)
        for name, tensor in (*weights, *batch, *record.forward, loss, *backward)
        if tensor.dtype.is_floating and tensor.graph is tf.compat.v1.get_default_graph()
    ]


@contextlib.contextmanager
def _observed(model: keras.Model, record: _Record) -> Iterator[None]:
    """Has the layers' calls recorded, and no moving statistics moved."""

    def call(layer: keras.Layer, *args: object, **kwargs: object) -> object:
        # Without weights, a layer mostly has no path.
        name = layer.path or layer.name
        enter = functools.partial(record.add, f"the input of {name}", layer.trainable_variables)
        leave = functools.partial(record.add, f"the output of {name}", ())
        args, kwargs = tf.nest.map_structure(enter, (args, kwargs))
        return tf.nest.map_structure(leave, type(layer).call(layer, *args, **kwargs))

    with contextlib.ExitStack() as replaced:

        def replace(layer: keras.Layer, name: str, function: Callable) -> None:
            setattr(layer, name, function)
            # The class' own comes to light again.
            replaced.callback(delattr, layer, name)

        for layer in all_layers(model, include_self=False):
            if not isinstance(layer, keras.Model):
                replace(layer, "call", functools.partial(call, layer))
            if isinstance(layer, BatchNormalization):
                replace(layer, "update_moving_statistics", lambda *_: None)
        yield


def _is_spoiled(tensor: tf.Tensor) -> tf.Tensor:
    finite = tf.reduce_all(tf.math.is_finite(tensor))
    return tf.cast(tf.logical_not(finite), tf.float32)
