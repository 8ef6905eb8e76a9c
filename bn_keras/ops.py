"""The batch-normalizing transform as functions of tensors, forward and backward.

Activations come with the channels last, [N, ..., C]. Nothing here knows a layer or a strategy:
what crosses replicas comes in as a callable, `gather`.

There are two ways to the same numbers. `_Fused` calls TensorFlow's fused kernels, which pass over
memory about as rarely as can be; `_Plain` is made of ordinary operations, takes every dtype and
mask, and is differentiable, so that it also serves as the gradient's gradient.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

# What the fused kernels take; they compute in float32 for all three.
_FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)

# From so many elements on, the kernels take less time on a CPU than ordinary operations do.
_PAYS_IN_TRAINING = 2**16
_PAYS_AT_INFERENCE = 2**18

# So many values of one channel are added up in float32 without a second look: up to a mean of a
# thousand standard deviations it comes out right to a thousandth of one.
_FEW_VALUES = 2**15

# [...] of this replica -> [R, ...] of the R replicas that share their statistics, the same on
# each, in one collective. Has to be differentiable.
Gather = Callable[[tf.Tensor], tf.Tensor]


class Moments(NamedTuple):
    """Statistics of a batch, or of each of the G ghost batches that it is split into.

    Attributes:
      count: [G, 1], or [G, C] where a mask differs by channel: how many values went in.
      mean: [G, C].
      variance: [G, C], biased: over count, as in Algorithm 1. Bessel's correction is not in it.
        Where count is 0, so are mean and variance.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Gives the dtype in which activations of a dtype are summed: float32, or their own float64."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
) -> tf.Tensor:
    """Maps x to gamma * (x - mean) / sqrt(variance + epsilon) + beta, by given statistics.

    Computed in float32 (float64 for float64) whatever the dtype of x. Mean and variance are
    constants to the gradient.

    Args:
      x: [N, ..., C] activations.
      mean: [C].
      variance: [C], >= 0.
      gamma: [C]; None is 1.
      beta: [C]; None is 0.
      epsilon: added under the root, > 0.

    Returns:
      Same shape and dtype as x.

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4.
    """
    x = tf.convert_to_tensor(x)
    dtype = statistics_dtype(x.dtype)
    mean, variance = (tf.stop_gradient(tf.cast(t, dtype)) for t in (mean, variance))
    gamma, beta = _or_default(gamma, beta, x)
    if _pays_to_fuse(x, _PAYS_AT_INFERENCE):
        return _like(_kernel_inference(_as_images(x), mean, variance, gamma, beta, epsilon), x)
    y = (tf.cast(x, dtype) - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta
    return tf.cast(y, x.dtype)


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    *,
    mask: tf.Tensor | None = None,
    group_size: int | None = None,
    gather: Gather | None = None,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes x by the statistics of the batch itself.

    Decisions: statistics are in float32, or float64 for float64. Parts are merged by count, mean
    and variance, never by sums of squares, so that no mean is too large. One collective forward
    and one backward. The gradients of gamma and beta are this replica's own: adding up the
    replicas' is the optimizer's business, and doing it here would count it twice. The gradient
    has a gradient.

    Args:
      x: [N, ..., C] activations; N may be 0.
      gamma: [C]; None is 1.
      beta: [C]; None is 0.
      epsilon: added under the root, > 0.
      mask: nonzero where a value counts, of x's rank, each axis as in x or 1; None is everywhere.
        What doesn't count is normalized all the same.
      group_size: how many consecutive examples make a ghost batch with statistics of its own; has
        to divide N. None is all.
      gather: brings the replicas together; None is this replica alone.

    Returns:
      y, of the shape and dtype of x, and the moments, which carry no gradient.

    Source: Ioffe & Szegedy 2015, Algorithm 1, and the gradients in section 3.
    """
    x = tf.convert_to_tensor(x)
    gamma, beta = _or_default(gamma, beta, x)
    plain = _Plain(epsilon, group_size, gather, mask, x)
    num_groups = _num_groups(x, group_size)
    # Splitting takes a number of groups that is known when the graph is built.
    fusable = _pays_to_fuse(x, _PAYS_IN_TRAINING) and mask is None and num_groups
    transform = _Fused(epsilon, num_groups, gather) if fusable else plain
    y, moments, residuals = transform.forward(tf.stop_gradient(x), gamma, beta)

    @tf.custom_gradient
    def differentiable(x, gamma, beta):  # noqa: ANN001
        @tf.custom_gradient
        def backward(dy, x, gamma):  # noqa: ANN001
            def second_order(*upstream):
                with tf.GradientTape() as tape:
                    tape.watch([dy, x, gamma])
                    # The moments anew from x, since they too change with it.
                    outputs = plain.backward(dy, x, gamma, plain.moments(x))
                return tape.gradient(outputs, [dy, x, gamma], upstream)

            return transform.backward(dy, x, gamma, residuals), second_order

        return y, lambda dy: backward(dy, x, gamma)

    return differentiable(x, gamma, beta), moments


class _Plain:
    """The transform in ordinary operations, in the statistics' dtype.

    Ghost batches get an axis of their own, the first. Statistics keep the axes that they are
    taken over, with one entry.
    """

    def __init__(
        self,
        epsilon: float,
        group_size: int | None,
        gather: Gather | None,
        mask: tf.Tensor | None,
        x: tf.Tensor,
    ) -> None:
        self._epsilon = epsilon
        self._group_size = group_size
        self._gather = gather
        self._axes = list(range(x.shape.rank - 1) if group_size is None else range(1, x.shape.rank))
        self._kept = None
        if mask is not None:
            mask = tf.cast(mask, tf.bool)
            like = _dims(x)[:-1] + _dims(mask)[-1:]
            self._kept = self._grouped(tf.broadcast_to(mask, like))

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Moments]:
        moments = self.moments(x)
        scale = gamma * tf.math.rsqrt(moments.variance + self._epsilon)
        y = (self._floats(x) - moments.mean) * scale + beta
        return _like(y, x), Moments(*map(_without_ones, moments)), moments

    def moments(self, x: tf.Tensor) -> Moments:
        """Takes the corrected two-pass algorithm: a mean, and the mean of what is left."""
        x = self._floats(x)
        if self._kept is None:
            dims = _dims(x)
            like = [1 if a in self._axes else d for a, d in enumerate(dims[:-1])] + [1]
            count = _constant(_product([dims[a] for a in self._axes]), like, x.dtype)
        else:
            count = self._sum(tf.cast(self._kept, x.dtype))
        mean = self._mean(self._keep(x), count)
        deviation = self._keep(x - mean)
        rest = self._mean(deviation, count)
        squares = self._mean(tf.square(deviation), count)
        moments = Moments(count, mean + rest, tf.nn.relu(squares - tf.square(rest)))
        return _merged(self._gather, moments)

    def backward(
        self, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor, moments: Moments
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        dy = self._floats(dy)
        deviation_scale = tf.math.rsqrt(moments.variance + self._epsilon)
        x_hat = (self._floats(x) - moments.mean) * deviation_scale
        if self._kept is not None:
            # What doesn't count may be NaN; where its dy is 0 it takes no part.
            x_hat = tf.where(self._kept | (dy != 0), x_hat, 0.0)
        dgamma, dbeta = self._sum(dy * x_hat), self._sum(dy)
        mean_dy, mean_dy_x_hat = _shared_means(self._gather, dbeta, dgamma, moments.count)
        through_moments = self._keep(mean_dy + x_hat * mean_dy_x_hat)
        dx = gamma * deviation_scale * (dy - through_moments)
        others = list(range(dx.shape.rank - 1))
        return _like(dx, x), tf.reduce_sum(dgamma, others), tf.reduce_sum(dbeta, others)

    def _grouped(self, x: tf.Tensor) -> tf.Tensor:
        if self._group_size is None:
            return x
        return tf.reshape(x, [-1, self._group_size, *_dims(x)[1:]])

    def _floats(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cast(self._grouped(x), statistics_dtype(x.dtype))

    def _keep(self, x: tf.Tensor) -> tf.Tensor:
        return x if self._kept is None else tf.where(self._kept, x, 0.0)

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(x, self._axes, keepdims=True)

    def _mean(self, x: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(self._sum(x), count)


class _Fused:
    """The transform by TensorFlow's fused kernels, on images [N, H, W, C], a group at a time."""

    def __init__(self, epsilon: float, num_groups: int, gather: Gather | None) -> None:
        self._epsilon = epsilon
        self._num_groups = num_groups
        self._gather = gather

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, object]:
        groups = self._groups(x)
        values = _product(_dims(groups[0])[:-1])
        trained = [_kernel_training(g, values, gamma, beta, self._epsilon) for g in groups]
        ys, means, variances, residuals = zip(*trained, strict=True)
        count = _constant(values, [self._num_groups, 1], gamma.dtype)
        moments = Moments(count, tf.stack(means), tf.stack(variances))
        if self._gather is not None:
            # The kernel was only asked for the moments.
            residuals = moments = _merged(self._gather, moments)
            ys = [
                _kernel_inference(images, mean, variance, gamma, beta, self._epsilon)
                for images, mean, variance in self._by_group(groups, *moments[1:])
            ]
        return _like(_joined(ys), x), moments, residuals

    def backward(
        self, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor, residuals: object
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        dys, groups = self._groups(dy), self._groups(x)
        if self._gather is None:
            gradients = [
                _kernel_gradient(dy, images, gamma, reserved, self._epsilon, is_training=True)
                for dy, (images, *reserved) in zip(dys, residuals, strict=True)
            ]
            dxs, dgammas, dbetas = zip(*gradients, strict=True)
        else:
            dxs, dgammas, dbetas = self._synchronized_backward(dys, groups, gamma, residuals)
        return _like(_joined(dxs), x), tf.add_n(dgammas), tf.add_n(dbetas)

    def _synchronized_backward(
        self,
        dys: Sequence[tf.Tensor],
        groups: Sequence[tf.Tensor],
        gamma: tf.Tensor,
        moments: Moments,
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        # With the statistics taken for constants, the kernel gives gamma / sigma * dy and this
        # replica's two sums in one go.
        gradients = [
            _kernel_gradient(
                dy, images, gamma, (mean, variance, []), self._epsilon, is_training=False
            )
            for dy, images, mean, variance in self._by_group(dys, groups, *moments[1:])
        ]
        direct, dgammas, dbetas = zip(*gradients, strict=True)
        means = _shared_means(self._gather, tf.stack(dbetas), tf.stack(dgammas), moments.count)
        scales = -gamma * tf.math.rsqrt(moments.variance + self._epsilon)
        # What passes through the moments, scale * (mean_dy + x_hat * mean_dy_x_hat), is an affine
        # map of x_hat, and so a normalization as well.
        dxs = [
            dx
            + _kernel_inference(
                images, mean, variance, scale * mean_dy_x_hat, scale * mean_dy, self._epsilon
            )
            for dx, images, mean, variance, scale, mean_dy, mean_dy_x_hat in self._by_group(
                direct, groups, *moments[1:], scales, *means
            )
        ]
        return dxs, dgammas, dbetas

    def _groups(self, x: tf.Tensor) -> list[tf.Tensor]:
        images = _as_images(x)
        return [images] if self._num_groups == 1 else tf.split(images, self._num_groups)

    def _by_group(self, *parts: tf.Tensor | Sequence[tf.Tensor]) -> zip:
        unstacked = [
            tf.unstack(p, self._num_groups) if isinstance(p, tf.Tensor) else p for p in parts
        ]
        return zip(*unstacked, strict=True)


# --- What parts of a batch make together.


def _merged(gather: Gather | None, moments: Moments) -> Moments:
    """Merges the replicas' moments by the law of total variance, exact at any mean."""
    if gather is None:
        return moments
    count, mean, variance = _gathered(gather, moments)
    total = tf.reduce_sum(count, axis=0)
    share = tf.math.divide_no_nan(count, total)
    rough = tf.reduce_sum(share * mean, axis=0)
    # Of differences from a rough mean, so that rounding is in proportion to those.
    merged = rough + tf.reduce_sum(share * (mean - rough), axis=0)
    within = tf.reduce_sum(share * variance, axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged), axis=0)
    return Moments(total, merged, within + between)


def _shared_means(
    gather: Gather | None, sum_dy: tf.Tensor, sum_dy_x_hat: tf.Tensor, count: tf.Tensor
) -> list[tf.Tensor]:
    """Gives the means of dy and dy * x_hat over everything that shares its statistics."""
    sums = [sum_dy, sum_dy_x_hat]
    if gather is not None:
        sums = [tf.reduce_sum(s, axis=0) for s in _gathered(gather, sums)]
    return [tf.math.divide_no_nan(s, count) for s in sums]


def _gathered(gather: Gather, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Gives each tensor with the replicas stacked in front, by a single collective."""
    packed = gather(tf.concat(tensors, axis=-1))
    return tf.split(packed, [t.shape[-1] for t in tensors], axis=-1)


# --- TensorFlow's fused kernels.


def _kernel_training(
    images: tf.Tensor, values: int | tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tuple]:
    """Gives y, mean and biased variance [C], and what the gradient needs: images and reserves.

    Args:
      images: [N, H, W, C].
      values: how many there are of each channel.
      gamma, beta, epsilon: as everywhere.
    """
    y, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=images, scale=gamma, offset=beta, mean=[], variance=[], epsilon=epsilon
    )
    known = isinstance(values, int)
    count = float(values) if known else tf.cast(values, tf.float32)
    # The kernel applies Bessel's correction to the variance that it returns (not to the one that
    # it normalizes by), with m - 1 no less than 1; and of nothing it returns NaN.
    if known and count:
        variance *= max(count - 1, 1) / count
    else:
        biased = tf.math.divide_no_nan(tf.maximum(count - 1.0, 1.0), count)
        variance = tf.math.multiply_no_nan(variance, biased)
        mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0))

    def around_a_value() -> tuple:
        value = images[0, 0, 0]
        rest = images - value
        mean, variance = tf.nn.moments(tf.cast(rest, tf.float32), [0, 1, 2])
        y = _kernel_inference(rest, mean, variance, gamma, beta, epsilon)
        return y, tf.cast(value, tf.float32) + mean, variance, rest, mean, variance, tf.zeros([0])

    outputs = y, mean, variance, images, *reserved
    if not _has_accelerator() and not (known and count <= _FEW_VALUES):
        # On the CPU the kernel adds up its values one by one in float32: where the sum's spacing
        # outgrows the deviations, they drown (at 400,000 values, a mean of 300 standard
        # deviations). A value of the batch, taken off, leaves a mean of the deviations' size.
        drowned = tf.reduce_any(tf.square(mean * (count * 2.0**-25)) > variance + epsilon)
        outputs = tf.cond(drowned, around_a_value, lambda: outputs)
    y, mean, variance, *residuals = outputs
    return y, mean, variance, residuals


def _pays_to_fuse(x: tf.Tensor, from_size: int) -> bool:
    size = x.shape.num_elements()
    if _kernel_threads() == 1:
        # Waking up the other threads is most of what a small call costs.
        from_size //= 16
    small = size is not None and size < from_size
    return x.dtype in _FUSED_DTYPES and (not small or _has_accelerator())


def _kernel_threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1


def _has_accelerator() -> bool:
    return any(d.device_type != "CPU" for d in tf.config.list_logical_devices())


def _kernel_inference(
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


def _kernel_gradient(
    dy: tf.Tensor,
    images: tf.Tensor,
    gamma: tf.Tensor,
    reserved: Sequence[tf.Tensor],
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


# --- Shapes. A dimension is an int where it is known, else a scalar tensor.


def channels_last(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Brings some axes to the end and makes one of them.

    Args:
      x: of any shape.
      axes: which, ascending, from 0 on.
    """
    rank = x.shape.rank
    reduced = [a for a in range(rank) if a not in axes]
    if reduced != list(range(len(reduced))):
        x = tf.transpose(x, [*reduced, *axes])
    if len(axes) == 1:
        return x
    dims = _dims(x)
    return tf.reshape(x, [*dims[: len(reduced)], _product(dims[len(reduced) :])])


def channels_back(y: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Undoes channels_last(x, axes) for a y of the same shape."""
    dims = _dims(x)
    order = [a for a in range(len(dims)) if a not in axes] + list(axes)
    if len(axes) > 1:
        y = tf.reshape(y, [dims[a] for a in order])
    if order != sorted(order):
        y = tf.transpose(y, [order.index(a) for a in range(len(order))])
    return y


def _dims(x: tf.Tensor) -> list[int | tf.Tensor]:
    if x.shape.is_fully_defined():
        return list(x.shape)
    actual = tf.unstack(tf.shape(x))
    return [a if d is None else d for a, d in zip(actual, x.shape, strict=True)]


def _product(dims: Sequence[int | tf.Tensor]) -> int | tf.Tensor:
    product = math.prod(d for d in dims if isinstance(d, int))
    for d in dims:
        if not isinstance(d, int):
            product = product * d
    return product


def _constant(
    value: int | tf.Tensor, dims: Sequence[int | tf.Tensor], dtype: tf.DType
) -> tf.Tensor:
    if all(isinstance(v, int) for v in (value, *dims)):
        # A single node, which tf.get_static_value reads.
        return tf.constant(value, dtype, dims)
    return tf.fill(dims, tf.cast(value, dtype))


def _as_images(x: tf.Tensor) -> tf.Tensor:
    """Views [N, ..., C] as [N, H, W, C], which is all that the kernels take."""
    rank = x.shape.rank
    if rank == 4:
        return x
    if rank < 4:
        return tf.reshape(x, [-1] + [1] * (4 - rank) + _dims(x)[1:])
    dims = _dims(x)
    return tf.reshape(x, [-1, _product(dims[1:-2]), dims[-2], dims[-1]])


def _without_ones(statistic: tf.Tensor) -> tf.Tensor:
    """Gives [G, 1, ..., 1, C] as [G, C], and a constant as a constant."""
    ones = tuple(range(1, statistic.shape.rank - 1))
    known = tf.get_static_value(statistic)
    if known is not None:
        return tf.constant(known.squeeze(ones))
    return tf.squeeze(statistic, ones) if ones else statistic


def _like(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Gives y in the shape and dtype of x."""
    y = tf.cast(y, x.dtype)
    return y if y.shape.rank == x.shape.rank else tf.reshape(y, tf.shape(x))


def _joined(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _num_groups(x: tf.Tensor, group_size: int | None) -> int:
    """Gives the number of ghost batches, 0 where it isn't known."""
    if group_size is None:
        return 1
    return (x.shape[0] or 0) // group_size


def _or_default(
    gamma: tf.Tensor | None, beta: tf.Tensor | None, x: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    dtype, channels = statistics_dtype(x.dtype), x.shape[-1]
    gamma = tf.ones([channels], dtype) if gamma is None else tf.cast(gamma, dtype)
    beta = tf.zeros([channels], dtype) if beta is None else tf.cast(beta, dtype)
    return gamma, beta
