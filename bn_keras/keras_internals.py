"""All uses of Keras' private attributes, each with the reason for it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf


class Call(Protocol):
    """One call of an operation in a graph: Keras' Node, which has no public name.

    Attributes:
      operation: the called operation.
      arguments: `args` and `kwargs` of the call.
      input_tensors, outputs: flat lists of symbolic tensors.
      is_input: whether the operation is an InputLayer.
    """

    operation: keras.Operation
    arguments: Any
    input_tensors: Sequence[keras.KerasTensor]
    outputs: Sequence[keras.KerasTensor]
    is_input: bool


def all_layers(model: keras.Layer, include_self: bool = True) -> list[keras.Layer]:
    """Returns the layers of a model, including those of nested models, wrappers and cells.

    `model.layers` contains only the outermost layers, and Keras has no public access to the others.

    Args:
      model: model or layer.
      include_self: whether the list starts with `model` itself.
    """
    return list(model._flatten_layers(include_self=include_self))


def graph_of(layer: keras.Operation) -> keras.Function | None:
    """Returns the graph of a functional or sequential model, or None for any other layer.

    A Sequential keeps its graph in a private attribute, which is None until the model is built.
    """
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, keras.Model) and isinstance(layer, keras.Function) else None


def graph_calls(graph: keras.Function) -> list[Call]:
    """Returns the calls of a graph in the order of execution.

    The public `operations` lists each operation once, however often it is called.
    """
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


def run_graph(
    graph: keras.Function, inputs: Any, operation_fn: Callable[[keras.Operation], Callable]
) -> Any:
    """Runs a graph on new inputs, with each operation replaced by `operation_fn(operation)`.

    The public way to run a graph, calling it, cannot replace its operations.

    Args:
      graph: graph of a model.
      inputs: tensors, in the structure of graph.input.
      operation_fn: returns the function to call in place of an operation.

    Returns:
      The outputs, in the structure of graph.output.
    """
    return graph._run_through_graph(inputs, operation_fn=operation_fn)


def producer(tensor: keras.KerasTensor) -> keras.Operation:
    """Returns the operation that computes a symbolic tensor."""
    return tensor._keras_history.operation


@contextlib.contextmanager
def replaced_method(layer: keras.Layer, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a method of one layer inside a `with` block; other layers keep theirs.

    Keras calls `layer.call`, `layer._moments` and the like on the instance, whose attributes take
    precedence over the class's methods.

    Args:
      layer: layer to change.
      name: method name.
      function: replacement, called without `self`.
    """
    setattr(layer, name, function)
    try:
        yield
    finally:
        # Restores the class's method.
        delattr(layer, name)


def observed_moments(
    layer: keras.layers.BatchNormalization,
    observer: Callable[[tf.Tensor, tf.Tensor | None, tf.Tensor, tf.Tensor], None],
) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which `observer` receives the moments that a layer computes.

    keras.layers.BatchNormalization computes its moments in a private method.

    Args:
      layer: Keras' layer.
      observer: called with the inputs, mask, mean and variance of each training-mode call.
    """

    def compute_moments(inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        mean, variance = type(layer)._moments(layer, inputs, mask)
        observer(inputs, mask, mean, variance)
        return mean, variance

    return replaced_method(layer, "_moments", compute_moments)
