"""All uses of what Keras 3 keeps private, each with its reason."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras


def all_layers(model: keras.Layer, include_self: bool = True) -> list[keras.Layer]:
    """Returns the layers of a model, those of nested models, wrappers and cells included.

    `model.layers` has the outermost ones only, and Keras has no public way to the others.

    Args:
      model: a model or a layer.
      include_self: whether `model` itself is the first of them.
    """
    return list(model._flatten_layers(include_self=include_self))


def graph_of(layer: keras.Operation) -> keras.Function | None:
    """Returns the graph of operations that a functional or sequential model runs, else None.

    A Sequential wraps its graph in a private attribute, and has none before it is built.
    """
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, keras.Model) and isinstance(layer, keras.Function) else None


def graph_nodes(graph: keras.Function) -> list[Any]:
    """Returns the calls of a graph's operations, in the order of the computation.

    The public `operations` names each operation once, however often it is called.
    """
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
    ]


@contextlib.contextmanager
def replaced_method(layer: keras.Layer, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a method of one layer until the block ends; the class keeps its own.

    Keras calls `layer.call`, `layer._moments` and the like by attribute, so that an attribute of
    the instance takes precedence over the class's method.

    Args:
      layer: whose method is replaced.
      name: of the method.
      function: takes the method's arguments without `self`.
    """
    setattr(layer, name, function)
    try:
        yield
    finally:
        # Restores the class's method.
        delattr(layer, name)
