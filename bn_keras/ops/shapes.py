"""Shapes and axes of activations.

A dimension is an int where it is static, else a scalar tensor.
"""

import math
from collections.abc import Sequence

import tensorflow as tf


def fill_axes(axes: Sequence[int] | None, x: tf.Tensor) -> Sequence[int]:
    """Returns the axes with statistics of their own; None stands for the last one."""
    return [x.shape.rank - 1] if axes is None else axes


def are_last(axes: Sequence[int], rank: int) -> bool:
    """Returns whether the axes are the last ones of a tensor."""
    return list(axes) == list(range(rank - len(axes), rank))


def move_channels_last(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Moves some axes to the end and flattens them into one.

    Args:
      x: any shape.
      axes: non-negative and ascending.

    Returns:
      [remaining axes of x..., C].
    """
    rank = x.shape.rank
    reduced = [a for a in range(rank) if a not in axes]
    if reduced != list(range(len(reduced))):
        x = tf.transpose(x, [*reduced, *axes])
    if len(axes) == 1:
        return x
    dims = get_dims(x)
    return tf.reshape(x, [*dims[: len(reduced)], multiply_dims(dims[len(reduced) :])])


def move_channels_back(y: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns y in the shape of x: the inverse of move_channels_last(x, axes)."""
    dims = get_dims(x)
    order = [a for a in range(len(dims)) if a not in axes] + list(axes)
    if len(axes) > 1:
        y = tf.reshape(y, [dims[a] for a in order])
    if order != sorted(order):
        y = tf.transpose(y, [order.index(a) for a in range(len(order))])
    return y


def get_dims(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns the dimensions of x."""
    if x.shape.is_fully_defined():
        return list(x.shape)
    dynamic = tf.unstack(tf.shape(x))
    return [a if d is None else d for a, d in zip(dynamic, x.shape, strict=True)]


def get_reshape_dims(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns the dimensions for a reshape, which adds least to a graph with -1 for an unknown."""
    if list(x.shape).count(None) > 1:
        return get_dims(x)
    return [-1 if d is None else d for d in x.shape]


def multiply_dims(dims: Sequence[int | tf.Tensor]) -> int | tf.Tensor:
    """Returns the product, or -1 if a dimension is -1."""
    static = [d for d in dims if isinstance(d, int)]
    product = -1 if -1 in static else math.prod(static)
    for d in dims:
        if not isinstance(d, int):
            product = product * d
    return product


def restore(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns y with the shape and dtype of x."""
    y = tf.cast(y, x.dtype)
    return y if y.shape.rank == x.shape.rank else tf.reshape(y, get_reshape_dims(x))


def flatten_parameter(parameter: tf.Tensor) -> tf.Tensor:
    """Returns a parameter of several axes as [C]."""
    return parameter if parameter.shape.rank == 1 else tf.reshape(parameter, [-1])


def get_num_ghosts(x: tf.Tensor, virtual_batch_size: int | None) -> int:
    """Returns the number of ghost batches, or 0 if it is unknown."""
    if virtual_batch_size is None:
        return 1
    return (x.shape[0] or 0) // virtual_batch_size
