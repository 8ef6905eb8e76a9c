"""The functions of this package that the layer calls."""

import functools
from collections.abc import Sequence

import tensorflow as tf
from tensorflow.python.eager import record

from bn_keras.ops import choice
from bn_keras.ops.fused import Fused, SynchronizedFused, fill_parameters, run_fused
from bn_keras.ops.gradients import differentiable, twice_differentiable
from bn_keras.ops.kernels import move_gradients, run_inference_kernel
from bn_keras.ops.moments import Gather, Moments, MovingStatistics, statistics_dtype
from bn_keras.ops.shapes import are_last, fill_axes, get_num_ghosts
from bn_keras.ops.unfused import Unfused


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    axes: Sequence[int] | None = None,
) -> tf.Tensor:
    """Computes gamma * (x - mean) / sqrt(variance + epsilon) + beta for given statistics.

    Computed in float32 (float64 for float64) whatever the dtype of x. On CPUs, large images with
    channels last use the fused kernel. Everything else is x * scale + offset, which converters
    merge with a convolution or a dense layer before it.

    Args:
      x: activations of any shape.
      mean: in the shape of `axes`, such as [C].
      variance: like mean, >= 0.
      gamma: like mean; None means 1.
      beta: like mean; None means 0.
      epsilon: added under the root, > 0.
      axes: axes with statistics of their own, non-negative and ascending. None means the last.

    Returns:
      Same shape and dtype as x.

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4.
    """
    x = tf.convert_to_tensor(x)
    axes = fill_axes(axes, x)
    dtype = statistics_dtype(x.dtype)
    mean, variance = (tf.cast(t, dtype) for t in (mean, variance))
    gamma, beta = (_to_statistics_dtype(p, x) for p in (gamma, beta))
    if choice.should_fuse_inference(x, axes):
        gamma, beta = fill_parameters(gamma, beta, x, axes)
        statistics = mean, variance, gamma, beta
        if not tf.executing_eagerly() or record.could_possibly_record():
            statistics = move_gradients(*statistics, epsilon)
        return run_inference_kernel(x, *statistics, epsilon)
    scale = tf.math.rsqrt(variance + epsilon)
    scale = scale if gamma is None else gamma * scale
    offset = -mean * scale if beta is None else beta - mean * scale
    if not are_last(axes, x.shape.rank):
        shape = [d if a in axes else 1 for a, d in enumerate(x.shape)]
        scale, offset = tf.reshape(scale, shape), tf.reshape(offset, shape)
    return tf.cast(tf.cast(x, dtype) * scale + offset, x.dtype)


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    *,
    axes: Sequence[int] | None = None,
    mask: tf.Tensor | None = None,
    virtual_batch_size: int | None = None,
    gather: Gather | None = None,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes x by the statistics of the batch itself.

    Decisions:
      - Statistics are float32, or float64 for float64.
      - The statistics of replicas are merged from count, mean and variance, never from sums of
        squares, so that large means lose no digits.
      - Replicas need one collective forward and one backward.
      - The gradients of gamma and beta are this replica's own. The optimizer sums them over the
        replicas; summing them here too would count each of them once per replica.
      - Second-order gradients and forward mode are supported. Around a tf.function, forward mode
        returns None, as for any tf.custom_gradient.

    Args:
      x: activations of any shape; may be empty.
      gamma: in the shape of `axes`, such as [C]; None means 1.
      beta: like gamma; None means 0.
      epsilon: added under the root, > 0.
      axes: axes with statistics of their own, non-negative and ascending. None means the last.
      mask: same rank as x and broadcastable to it; only values where it is nonzero enter the
        statistics. Masked values are normalized too. None means no mask.
      virtual_batch_size: number of consecutive examples in a ghost batch, which has statistics of
        its own; divides the size of axis 0. None means the whole batch.
      gather: exchanges statistics with other replicas; None means this replica alone.

    Returns:
      y, with the shape and dtype of x, and the moments. Stop the gradient of the moments before a
      loss depends on them: whether one flows through them depends on the implementation chosen.

    Source: Ioffe & Szegedy 2015, Algorithm 1, and the gradients in section 3.
    """
    x = tf.convert_to_tensor(x)
    axes = fill_axes(axes, x)
    gamma, beta = (_to_statistics_dtype(p, x) for p in (gamma, beta))
    unfused = Unfused(x, axes, epsilon, mask, virtual_batch_size, gather)
    if choice.has_tangents(x, gamma, beta):
        # A custom gradient would hide the operations from forward mode.
        y, moments, _ = unfused.forward(x, gamma, beta)
        return y, moments
    # The kernels run once per ghost batch, so the number of ghost batches must be static.
    num_ghosts = get_num_ghosts(x, virtual_batch_size)
    has_kernel = mask is None and num_ghosts > 0
    if not has_kernel or not choice.should_fuse_training(x, axes, num_ghosts, gather is not None):
        return differentiable(unfused, x, gamma, beta)

    def run(x, axis, gamma, beta):  # noqa: ANN001
        arguments = x, axis, epsilon, virtual_batch_size
        fused = Fused(*arguments) if gather is None else SynchronizedFused(*arguments, gather)
        unfused = Unfused(x, [axis], epsilon, None, virtual_batch_size, gather)
        return twice_differentiable(fused.forward, unfused, x, gamma, beta)

    return run_fused(run, x, axes, gamma, beta)


def batch_normalize_and_average(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    moving: MovingStatistics,
    axes: Sequence[int] | None = None,
) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """Like batch_normalize, and averages the moments into moving statistics.

    The fused kernel does both in one call; call this function only where uses_averaging_kernel
    returns True. An empty batch leaves the moving statistics unchanged.

    Args:
      x, gamma, beta, epsilon, axes: like those of batch_normalize.
      moving: moving statistics before this batch.

    Returns:
      y, and moving mean and variance after this batch, [C].
    """
    x = tf.convert_to_tensor(x)
    axes = fill_axes(axes, x)
    gamma, beta = (_to_statistics_dtype(p, x) for p in (gamma, beta))

    def run(x, axis, gamma, beta):  # noqa: ANN001
        fused = Fused(x, axis, epsilon, None)
        forward = functools.partial(fused.forward_and_average, moving)
        unfused = Unfused(x, [axis], epsilon)
        return twice_differentiable(forward, unfused, x, gamma, beta)

    return run_fused(run, x, axes, gamma, beta)


def uses_averaging_kernel(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    axes: Sequence[int] | None = None,
) -> bool:
    """Returns whether batch_normalize_and_average accepts these tensors: the kernels are used."""
    axes = fill_axes(axes, x)
    return choice.should_fuse_training(x, axes) and not choice.has_tangents(x, gamma, beta)


def _to_statistics_dtype(parameter: tf.Tensor | None, x: tf.Tensor) -> tf.Tensor | None:
    if parameter is None:
        return None
    # tf.cast returns a variable unchanged if it already has the dtype.
    return tf.convert_to_tensor(tf.cast(parameter, statistics_dtype(x.dtype)))
