"""The batch-normalizing transform as functions of tensors, forward and backward.

Everything here takes activations with the channels last, [N, ..., C], and knows no layer and no
strategy: what crosses replicas comes in as a callable, `gather`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

# What TensorFlow's fused kernels take; they compute in float32 for all three.
_FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)

# [P] of this replica -> [R, P], the same on each of the R replicas that share their statistics,
# in one collective. Has to be differentiable.
Gather = Callable[[tf.Tensor], tf.Tensor]


class Moments(NamedTuple):
    """Statistics of a batch, or of each of the G ghost batches that it is split into.

    Attributes:
      count: [G, 1], or [G, C] where a mask differs by channel: how many values went in.
      mean: [G, C].
      variance: [G, C], biased: over count, as the paper's Algorithm 1. Where count is 0, so are
        mean and variance.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype in which activations of a dtype are summed: float32, or float64 for float64."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
) -> tf.Tensor:
    """Maps x to gamma * (x - mean) / sqrt(variance + epsilon) + beta, given the statistics.

    Computed in float32 (float64 for float64) whatever the dtype of x.

    Args:
      x: [N, ..., C] activations.
      mean, variance: [C].
      gamma, beta: [C]; None is 1 and 0.
      epsilon: added under the root, > 0.

    Returns:
      Same shape and dtype as x.

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4.
    """
    dtype = statistics_dtype(x.dtype)
    gamma, beta = _or_default(gamma, beta, mean)
    if x.dtype in _FUSED_DTYPES:
        return tf.reshape(
            _fused_inference(_as_images(x), mean, variance, gamma, beta, epsilon), tf.shape(x)
        )
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    return tf.cast((tf.cast(x, dtype) - mean) * scale + beta, x.dtype)


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    *,
    mask: tf.Tensor | None = None,
    num_groups: int | tf.Tensor = 1,
    gather: Gather | None = None,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes x by the statistics of the batch itself.

    Decisions: statistics are in float32, or float64 for float64. The replicas' counts, means and
    sums of squared deviations are merged, never sums of squares, so that no mean is too large.
    One collective forward and one backward. The gradients of gamma and beta are this replica's
    own: adding up the replicas' is the optimizer's business, and doing it here would count it
    twice. The gradient has a gradient.

    Args:
      x: [N, ..., C] activations; N may be 0.
      gamma, beta: [C]; None is 1 and 0.
      epsilon: added under the root, > 0.
      mask: True where a value counts, broadcastable to x; None is everywhere. What doesn't count
        is normalized all the same.
      num_groups: G, into how many ghost batches of N / G consecutive examples x is split.
      gather: brings the replicas together; None is this replica alone.

    Returns:
      y, of the shape and dtype of x, and the moments, which carry no gradient.

    Source: Ioffe & Szegedy 2015, Algorithm 1, and the gradients in section 3.
    """
    dtype = statistics_dtype(x.dtype)
    channels = tf.ones([tf.shape(x)[-1]], dtype)
    gamma, beta = _or_default(gamma, beta, channels)
    weights = None if mask is None else _weights(mask, x, num_groups, dtype)
    fused = x.dtype in _FUSED_DTYPES and mask is None and _is_one(num_groups)

    @tf.custom_gradient
    def transform(x, gamma, beta):
        if fused and gather is None:
            y, moments, reserved = _fused_training(_as_images(x), gamma, beta, epsilon)
        elif fused:
            moments = _merge(gather, _fused_training(_as_images(x), gamma, beta, epsilon)[1])
            y = _fused_inference(
                _as_images(x), moments.mean[0], moments.variance[0], gamma, beta, epsilon
            )
        else:
            rows = _as_rows(x, num_groups, dtype)
            moments = _merge(gather, _moments(rows, weights))
            x_hat = _x_hat(rows, moments, epsilon)
            y = tf.cast(x_hat * gamma + beta, x.dtype)
        y = tf.reshape(y, tf.shape(x))

        @tf.custom_gradient
        def backward(dy, x, gamma):
            if fused and gather is None:
                gradients = _fused_training_backward(
                    _as_images(dy), _as_images(x), gamma, reserved, epsilon
                )
            elif fused:
                gradients = _fused_synchronized_backward(
                    _as_images(dy), _as_images(x), gamma, moments, epsilon, gather
                )
            else:
                gradients = _backward(
                    _as_rows(dy, num_groups, dtype),
                    _as_rows(x, num_groups, dtype),
                    gamma,
                    moments,
                    weights,
                    epsilon,
                    gather,
                )
            dx, dgamma, dbeta = gradients

            def second_order(*upstream):
                with tf.GradientTape() as tape:
                    tape.watch([dy, x, gamma])
                    dy_rows = _as_rows(dy, num_groups, dtype)
                    rows = _as_rows(x, num_groups, dtype)
                    # Anew from x, since they too change with it.
                    moments = _merge(gather, _moments(rows, weights))
                    dx, dgamma, dbeta = _backward(
                        dy_rows, rows, gamma, moments, weights, epsilon, gather
                    )
                    outputs = (tf.cast(tf.reshape(dx, tf.shape(x)), x.dtype), dgamma, dbeta)
                return tape.gradient(outputs, [dy, x, gamma], upstream)

            return (tf.cast(tf.reshape(dx, tf.shape(x)), x.dtype), dgamma, dbeta), second_order

        return (y, *moments), lambda dy, *_: backward(dy, x, gamma)

    y, *moments = transform(x, gamma, beta)
    return y, Moments(*map(tf.stop_gradient, moments))


# --- What every device and dtype can do. Rows are [G, M, C] in the statistics' dtype.


def _moments(rows: tf.Tensor, weights: tf.Tensor | None) -> Moments:
    if weights is None:
        count = tf.cast(tf.shape(rows)[1], rows.dtype) * tf.ones([tf.shape(rows)[0], 1], rows.dtype)
        kept = rows
    else:
        count = tf.reduce_sum(weights, axis=1)
        kept = tf.where(weights > 0, rows, 0.0)
    mean = tf.math.divide_no_nan(tf.reduce_sum(kept, axis=1), count)
    deviation = rows - mean[:, None]
    if weights is not None:
        deviation = tf.where(weights > 0, deviation, 0.0)
    squares = tf.reduce_sum(tf.square(deviation), axis=1)
    return Moments(count, mean, tf.math.divide_no_nan(squares, count))


def _x_hat(rows: tf.Tensor, moments: Moments, epsilon: float) -> tf.Tensor:
    return (rows - moments.mean[:, None]) * tf.math.rsqrt(moments.variance + epsilon)[:, None]


def _backward(
    dy: tf.Tensor,
    rows: tf.Tensor,
    gamma: tf.Tensor,
    moments: Moments,
    weights: tf.Tensor | None,
    epsilon: float,
    gather: Gather | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    x_hat = _x_hat(rows, moments, epsilon)
    sum_dy = tf.reduce_sum(dy, axis=1)
    # A position that doesn't count may hold NaN; with dy = 0 it adds nothing.
    product = dy * x_hat if weights is None else tf.math.multiply_no_nan(x_hat, dy)
    sum_dy_x_hat = tf.reduce_sum(product, axis=1)
    mean_dy, mean_dy_x_hat = _shared_means(sum_dy, sum_dy_x_hat, moments.count, gather)
    through_moments = mean_dy[:, None] + x_hat * mean_dy_x_hat[:, None]
    if weights is not None:
        through_moments = tf.where(weights > 0, through_moments, 0.0)
    scale = gamma * tf.math.rsqrt(moments.variance + epsilon)
    dx = scale[:, None] * (dy - through_moments)
    return dx, tf.reduce_sum(sum_dy_x_hat, axis=0), tf.reduce_sum(sum_dy, axis=0)


# --- What crosses replicas.


def _merge(gather: Gather | None, moments: Moments) -> Moments:
    """Merges the replicas' moments: the law of total variance, exact at any mean."""
    if gather is None:
        return moments
    count, mean, variance = _gathered(gather, moments)
    total = tf.reduce_sum(count, axis=0)
    share = tf.math.divide_no_nan(count, total)
    merged_mean = tf.reduce_sum(share * mean, axis=0)
    within = tf.reduce_sum(share * variance, axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged_mean), axis=0)
    return Moments(total, merged_mean, within + between)


def _shared_means(
    sum_dy: tf.Tensor, sum_dy_x_hat: tf.Tensor, count: tf.Tensor, gather: Gather | None
) -> list[tf.Tensor]:
    sums = [sum_dy, sum_dy_x_hat]
    if gather is not None:
        sums = [tf.reduce_sum(s, axis=0) for s in _gathered(gather, sums)]
    return [tf.math.divide_no_nan(s, count) for s in sums]


def _gathered(gather: Gather, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Gives each tensor with the replicas stacked in front, by a single collective."""
    packed = gather(tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0))
    parts = tf.split(packed, [tf.size(t) for t in tensors], axis=1)
    return [
        tf.reshape(p, tf.concat([tf.shape(p)[:1], tf.shape(t)], axis=0))
        for p, t in zip(parts, tensors, strict=True)
    ]


# --- TensorFlow's fused kernels. Images are [N, H, W, C]; there is one group.


def _fused_training(
    images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, Moments, list[tf.Tensor]]:
    empty = tf.zeros([0])
    y, mean, unbiased, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=empty,
        variance=empty,
        epsilon=epsilon,
        is_training=True,
    )
    count = tf.cast(tf.reduce_prod(tf.shape(images)[:-1]), tf.float32)
    # The kernel applies Bessel's correction to the variance that it returns (not to the one it
    # normalizes by), with m - 1 no less than 1; and of nothing it returns NaN.
    variance = unbiased * tf.math.divide_no_nan(tf.maximum(count - 1, 1), count)
    mean, variance = (tf.where(count > 0, t, 0.0)[None] for t in (mean, variance))
    return y, Moments(tf.reshape(count, [1, 1]), mean, variance), reserved


def _fused_inference(
    images: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    return tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )[0]


def _fused_training_backward(
    dy: tf.Tensor,
    images: tf.Tensor,
    gamma: tf.Tensor,
    reserved: Sequence[tf.Tensor],
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    return _fused_gradient(dy, images, gamma, *reserved, epsilon=epsilon, is_training=True)


def _fused_synchronized_backward(
    dy: tf.Tensor,
    images: tf.Tensor,
    gamma: tf.Tensor,
    moments: Moments,
    epsilon: float,
    gather: Gather,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    mean, variance = moments.mean[0], moments.variance[0]
    # With the statistics taken for constants, the kernel gives gamma / sigma * dy and this
    # replica's two sums in one go.
    direct, dgamma, dbeta = _fused_gradient(
        dy, images, gamma, mean, variance, tf.zeros([0]), epsilon=epsilon, is_training=False
    )
    mean_dy, mean_dy_x_hat = _shared_means(dbeta[None], dgamma[None], moments.count, gather)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    # -scale * (mean_dy + x_hat * mean_dy_x_hat) is an affine map of x, so it is a normalization.
    through_moments = _fused_inference(
        images, mean, variance, -scale * mean_dy_x_hat[0], -scale * mean_dy[0], epsilon
    )
    return direct + through_moments, dgamma, dbeta


def _fused_gradient(
    dy: tf.Tensor,
    images: tf.Tensor,
    gamma: tf.Tensor,
    *reserved: tf.Tensor,
    epsilon: float,
    is_training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    return tuple(
        tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=dy,
            x=images,
            scale=gamma,
            reserve_space_1=reserved[0],
            reserve_space_2=reserved[1],
            reserve_space_3=reserved[2],
            epsilon=epsilon,
            is_training=is_training,
        )[:3]
    )


# --- Shapes.


def _as_images(x: tf.Tensor) -> tf.Tensor:
    """Views [N, ..., C] as [N, H, W, C], which is all that the kernels take."""
    if x.shape.rank == 4:
        return x
    shape = tf.shape(x)
    middle = tf.reduce_prod(shape[1:-1])
    images = tf.reshape(x, tf.stack([shape[0], middle, 1, shape[-1]]))
    images.set_shape([x.shape[0], None, 1, x.shape[-1]])
    return images


def _as_rows(x: tf.Tensor, num_groups: int | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Views [N, ..., C] as [G, M, C]."""
    shape = tf.shape(x)
    rows = tf.reduce_prod(shape[:-1]) // num_groups
    return tf.cast(tf.reshape(x, tf.stack([num_groups, rows, shape[-1]])), dtype)


def _weights(
    mask: tf.Tensor, x: tf.Tensor, num_groups: int | tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """Gives the mask as [G, M, 1], or as [G, M, C] where it differs by channel."""
    per_channel = mask.shape[-1] != 1
    shape = tf.shape(x) if per_channel else tf.concat([tf.shape(x)[:-1], [1]], axis=0)
    return _as_rows(tf.broadcast_to(tf.cast(mask, dtype), shape), num_groups, dtype)


def _or_default(
    gamma: tf.Tensor | None, beta: tf.Tensor | None, like: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    gamma = tf.ones_like(like) if gamma is None else tf.cast(gamma, like.dtype)
    beta = tf.zeros_like(like) if beta is None else tf.cast(beta, like.dtype)
    return gamma, beta


def _is_one(num_groups: int | tf.Tensor) -> bool:
    return isinstance(num_groups, int) and num_groups == 1
