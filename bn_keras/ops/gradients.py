"""Custom gradients of the transform, first-order and second-order."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from bn_keras.ops.moments import Moments
from bn_keras.ops.unfused import Backward, Unfused


def differentiable(
    unfused: Unfused, x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None
) -> tuple[tf.Tensor, Moments]:
    """Returns y and the moments. The gradient consists of differentiable operations."""
    moments = []
    is_given = [t is not None for t in (x, gamma, beta)]

    @tf.custom_gradient
    def transform(*given: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        remaining = iter(given)
        y, found, backward = unfused.forward(*(next(remaining) if g else None for g in is_given))
        moments.append(found)
        return y, lambda dy: [t for t, g in zip(backward(dy), is_given, strict=True) if g]

    y = transform(*_in_current_graph(*(t for t in (x, gamma, beta) if t is not None)))
    return y, moments[0]


def twice_differentiable(
    forward: Callable[..., tuple[tf.Tensor, Any, Backward]],
    unfused: Unfused,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
) -> tuple[tf.Tensor, Any]:
    """Returns y and the statistics that kernels compute.

    The kernels' gradient has no gradient of its own, which ordinary operations provide.
    """
    statistics = []

    @tf.custom_gradient
    def transform(x, gamma, beta):  # noqa: ANN001
        y, found, backward = forward(x, gamma, beta)
        statistics.append(found)

        @tf.custom_gradient
        def first_order(*given):  # noqa: ANN002
            def second_order(*upstream):
                inputs = dy, x, gamma = _in_current_graph(*given)
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    # The gradients do not depend on beta.
                    _, _, backward = unfused.forward(x, gamma, None)
                    outputs = backward(dy)
                return tape.gradient(outputs, inputs, upstream)

            return backward(given[0]), second_order

        return y, lambda dy: first_order(*_in_current_graph(dy, x, gamma))

    return transform(*_in_current_graph(x, gamma, beta)), statistics[0]


def _in_current_graph(*tensors: tf.Tensor) -> list[tf.Tensor]:
    """Returns the tensors in the graph that is being built.

    In a branch of tf.cond or a loop they may belong to the graph around it. tf.custom_gradient does
    not copy its arguments, a gradient may use only tensors of the branch, and a tape in a loop does
    not follow those from outside.
    """
    if tf.executing_eagerly():
        # tf.custom_gradient does not accept IndexedSlices, the gradient of tf.gather.
        return [tf.convert_to_tensor(t) for t in tensors]
    graph = tf.compat.v1.get_default_graph()
    # tape.jacobian builds a graph of the gradient of an eager call: the conversion captures eager
    # tensors.
    captured = map(tf.convert_to_tensor, tensors)
    return [t if t.graph is graph else tf.identity(t) for t in captured]
