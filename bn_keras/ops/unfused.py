"""The transform in ordinary operations: every dtype, axis and mask."""

import functools
import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from bn_keras.ops import choice
from bn_keras.ops.moments import (
    Count,
    Gather,
    Moments,
    divide,
    gather_packed,
    merge_moments,
    statistics_dtype,
)
from bn_keras.ops.shapes import are_last, get_dims, get_reshape_dims, multiply_dims, restore

# Numbers of values in the parts of x that are summed first, where one float32 sum would be
# inaccurate: the sums of smaller parts would be nearly as large as x, and those of larger ones less
# accurate at large means. Parts have more than 64 values only if no power of two divides their
# number, as in images of 149 x 149.
_MIN_PART, _MAX_POWER_OF_TWO, _MAX_PART = 4, 64, 160

# Maps dy to (dx, dgamma, dbeta).
Backward = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]


class Unfused:
    """The transform in ordinary operations, in the dtype of the statistics.

    With ghost batches, tensors have an additional first axis, with an entry per ghost batch.
    """

    def __init__(
        self,
        x: tf.Tensor,
        axes: Sequence[int],
        epsilon: float,
        mask: tf.Tensor | None = None,
        virtual_batch_size: int | None = None,
        gather: Gather | None = None,
    ) -> None:
        self._axes = axes
        self._epsilon = epsilon
        self._virtual_batch_size = virtual_batch_size
        self._gather = gather
        self._is_long = choice.is_long(x, axes, virtual_batch_size)
        first = 0 if virtual_batch_size is None else 1
        rank = x.shape.rank
        self._reduced = [a + first for a in range(rank) if a not in axes]
        # The sums over all other axes broadcast with x if these are the first.
        self._keepdims = bool(first) or not are_last(axes, rank)
        # Shape of a statistic that broadcasts with x, without the axis of the ghost batches.
        self._shape = [x.shape[a] for a in axes]
        if self._keepdims:
            self._shape = [x.shape[a] if a in axes else 1 for a in range(rank)]
        self._mask = None
        if mask is not None:
            shape = [mask.shape[a] if a in axes else d for a, d in enumerate(get_dims(x))]
            self._mask = self._split(tf.broadcast_to(tf.cast(mask, tf.bool), shape))

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None
    ) -> tuple[tf.Tensor, Moments, Backward]:
        """Returns y in the shape of x, the moments, and the function of the gradients."""
        original, x = x, self._split_and_cast(x)
        count, mean, variance, deviation = self._compute_moments(x)
        moments = self._flatten_moments(count, mean, variance)
        if self._gather is not None:
            moments = merge_moments(self._gather, moments)
            count, mean, variance = map(self._expand, moments)
            deviation = x - mean
        inverse_stddev = tf.math.rsqrt(variance + self._epsilon)
        scale, offset = map(self._broadcast, (gamma, beta))
        slope = inverse_stddev if scale is None else inverse_stddev * scale
        y = deviation * slope
        y = y if offset is None else y + offset

        def backward(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            dy, finite = self._split_and_cast(dy), deviation
            if self._mask is not None:
                # A masked value may be NaN; where its dy is 0 it must not reach any sum.
                finite = tf.where(self._mask | (dy != 0), deviation, 0.0)
            dgamma, dbeta = self._sum(dy * finite) * inverse_stddev, self._sum(dy)
            mean_dy, mean_dy_x_hat = (divide(t, count) for t in self._over_replicas(dbeta, dgamma))
            through_moments = mean_dy + finite * (mean_dy_x_hat * inverse_stddev)
            dx = (dy - self._apply_mask(through_moments)) * slope
            return restore(dx, original), self._sum_ghosts(dgamma), self._sum_ghosts(dbeta)

        return restore(y, original), moments, backward

    def _compute_moments(self, x: tf.Tensor) -> tuple[Count, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns count, mean, variance, and the deviations from the mean."""
        count = self._count_values(x)
        if self._is_compiled_by_xla:
            # XLA adds values one by one in float32, so a large mean would lose the deviations. The
            # differences from one value of the batch are small, unless that value is an outlier;
            # those from their mean always are.
            parts, size = self._average_parts(x)
            mean = self._some_value(parts)
            for _ in range(2):
                mean = tf.stop_gradient(mean)
                mean += divide(self._sum(self._apply_mask(parts - mean)), count / size)
        else:
            mean = tf.cast(divide(self.sum_in_float64(self._apply_mask(x)), count), x.dtype)
        deviation = x - mean
        variance = divide(self._sum(tf.square(self._apply_mask(deviation))), count)
        return count, mean, variance, deviation

    def _average_parts(self, x: tf.Tensor) -> tuple[tf.Tensor, int]:
        """Returns the means of equal parts of x, and the number of values in each.

        XLA's CPU compiler writes x minus a shift to memory, as large as x, before it sums it. The
        means of parts are few, and a part is so small that its sum is accurate.
        """
        if self._mask is not None or choice.is_on_accelerator():
            return x, 1
        sums, size = self._sum_parts(x)
        return (sums / size, size) if size > 1 else (x, 1)

    def _sum_parts(self, x: tf.Tensor) -> tuple[tf.Tensor, int]:
        """Returns the sums of equal parts of x, with its rank, and the number of values in each."""
        last = first = self._reduced[-1]
        while first - 1 in self._reduced and x.shape[first - 1] is not None:
            first -= 1
        if x.shape[last] is None:
            return x, 1
        num_values = math.prod(x.shape[first : last + 1])
        size = _part_size(num_values)
        if size == 1:
            return x, 1
        dims = get_reshape_dims(x)
        parts = [1] * (last - first) + [num_values // size, size]
        x = tf.reshape(x, [*dims[:first], *parts, *dims[last + 1 :]])
        return tf.reduce_sum(x, last + 1), size

    def _count_values(self, x: tf.Tensor) -> Count:
        if self._mask is not None:
            # Float32 cannot count beyond 2^24.
            mask = tf.cast(self._mask, tf.int64)
            count = tf.reduce_sum(mask, self._reduced, keepdims=self._keepdims)
            return tf.cast(count, x.dtype)
        sizes = [x.shape[a] for a in self._reduced]
        if None not in sizes:
            return float(math.prod(sizes))
        if self._virtual_batch_size is None:
            return tf.cast(tf.size(x, tf.int64), x.dtype) / math.prod(self._shape)
        dims = get_dims(x)
        return tf.cast(multiply_dims([dims[a] for a in self._reduced]), x.dtype)

    def _some_value(self, x: tf.Tensor) -> tf.Tensor:
        """Returns one value per channel that enters the statistics, or 0 if there is none."""
        if self._mask is None:
            axes = range(x.shape.rank)
            first = x[tuple(slice(1) if a in self._reduced else slice(None) for a in axes)]
            # The sum of one value, or of none in an empty batch.
            return self._sum(first)
        masked = tf.where(self._mask, x, x.dtype.min)
        largest = tf.reduce_max(masked, self._reduced, keepdims=self._keepdims)
        return tf.where(largest > x.dtype.min, largest, 0.0)

    def _over_replicas(self, *sums: tf.Tensor) -> Sequence[tf.Tensor]:
        """Returns the totals over all replicas that share statistics."""
        if self._gather is None:
            return sums
        gathered = gather_packed(self._gather, [self._flatten(s) for s in sums])
        return [self._expand(tf.reduce_sum(t, axis=0)) for t in gathered]

    def _split(self, x: tf.Tensor) -> tf.Tensor:
        if self._virtual_batch_size is None:
            return x
        shape = [-1, self._virtual_batch_size, *get_dims(x)[1:]]
        # XLA drops assertions, but its errors cite names of operations.
        return tf.reshape(x, shape, name="virtual_batch_size_must_divide_the_batch_size")

    def _split_and_cast(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cast(self._split(x), statistics_dtype(x.dtype))

    def _apply_mask(self, x: tf.Tensor) -> tf.Tensor:
        return x if self._mask is None else tf.where(self._mask, x, 0.0)

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        if self._is_long:
            return tf.cast(self.sum_in_float64(x), x.dtype)
        return self._add(x)

    def _add(self, x: tf.Tensor) -> tf.Tensor:
        # The kernel accepts fewer than 2^31 elements; unknown sizes are taken to be below that.
        if self._sums_like_bias_gradient and (x.shape.num_elements() or 0) < 2**31:
            # The same sum without a constant for the axes.
            return tf.raw_ops.BiasAddGrad(out_backprop=x)
        return tf.reduce_sum(x, self._reduced, keepdims=self._keepdims)

    @functools.cached_property
    def _sums_like_bias_gradient(self) -> bool:
        # For one channel that sum is less accurate, and on GPUs it adds in no fixed order.
        is_last = len(self._shape) == 1 and self._shape != [1]
        return is_last and not self._is_compiled_by_xla and not choice.is_on_accelerator()

    @functools.cached_property
    def _is_compiled_by_xla(self) -> bool:
        return choice.is_compiled_by_xla()

    def sum_in_float64(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the sums over all axes but the channels', in float64, whose dtype they have.

        The innermost axes and small parts are summed in float32 first, where that is accurate
        enough: TensorFlow adds sums of pairs along the innermost axes, and single values along the
        others.
        """
        end = x.shape.rank
        while end and x.shape[end - 1] == 1:  # Axes of size 1 do not break contiguity.
            end -= 1
        inner = [a for a in self._reduced if a < end]
        while inner and inner != list(range(inner[0], end)):
            inner = inner[1:]
        if inner and not self._is_compiled_by_xla:
            x = tf.reduce_sum(x, inner, keepdims=True)
        elif self._is_long:
            x, _ = self._sum_parts(x)
        return self._add(tf.cast(x, tf.float64))

    def _sum_ghosts(self, gradient: tf.Tensor) -> tf.Tensor:
        """Sums a parameter's gradient over the ghost batches, in the shape of the parameter."""
        if self._virtual_batch_size is not None:
            gradient = tf.reduce_sum(gradient, axis=0)
        if not self._keepdims:
            return gradient
        return tf.reshape(gradient, [self._shape[a] for a in self._axes])

    def _flatten_moments(self, count: Count, mean: tf.Tensor, variance: tf.Tensor) -> Moments:
        mean, variance = self._flatten(mean), self._flatten(variance)
        if isinstance(count, tf.Tensor) and count.shape.rank:
            count = self._flatten(count)
        elif self._virtual_batch_size is not None:
            count *= tf.ones_like(mean[:, :1])
        return Moments(count, mean, variance)

    def _flatten(self, statistic: tf.Tensor) -> tf.Tensor:
        """Reshapes a statistic to [C], or to [G, C] with ghost batches."""
        if self._virtual_batch_size is not None:
            return tf.reshape(statistic, [-1, math.prod(statistic.shape[1:])])
        return statistic if statistic.shape.rank == 1 else tf.reshape(statistic, [-1])

    def _expand(self, statistic: tf.Tensor) -> tf.Tensor:
        """Reshapes [C], or [G, C] with ghost batches, so that it broadcasts with x.

        With [1] in place of [C], the result has size 1 along all axes of x.
        """
        channels = statistic.shape[-1]
        shape = [1] * len(self._shape) if channels == 1 else self._shape
        if self._virtual_batch_size is not None:
            return tf.reshape(statistic, [-1, *shape])
        return statistic if shape == [channels] else tf.reshape(statistic, shape)

    def _broadcast(self, parameter: tf.Tensor | None) -> tf.Tensor | None:
        if parameter is None or not self._keepdims:
            return parameter
        return tf.reshape(parameter, self._shape)


def _part_size(num_values: int) -> int:
    """Returns the number of values in each of the equal parts that are summed first; 1: none."""
    # The division by a power of two adds no rounding error.
    size = min(num_values & -num_values, _MAX_POWER_OF_TWO)
    if size >= _MIN_PART:
        return size
    sizes = range(_MAX_PART, _MIN_PART - 1, -1)
    return next((size for size in sizes if num_values % size == 0), 1)
