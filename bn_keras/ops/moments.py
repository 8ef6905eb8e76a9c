"""Moments of batches: their counts, Bessel's correction, and merging them over replicas."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import tensorflow as tf

# A Python float if it is known while a graph is built.
Count: TypeAlias = float | tf.Tensor


# Stacks the tensors, [...], of the R replicas that share statistics: returns the same [R, ...] on
# each of them. Differentiable; one collective per call.
Gather = Callable[[tf.Tensor], tf.Tensor]


class Moments(NamedTuple):
    """Statistics of a batch, or of each of the G ghost batches that it is split into.

    Several axes with statistics of their own are flattened into C channels. Mean and variance are 0
    where count is 0.

    Attributes:
      count: number of values per channel: a scalar, or [1] or [C] with a mask; with ghost batches
        [G, 1] or [G, C].
      mean: [C], or [G, C] with ghost batches.
      variance: like mean; biased: divided by count, as in Algorithm 1, without Bessel's correction.
    """

    count: Count  # type: ignore[assignment]  # a tuple has a method of this name
    mean: tf.Tensor
    variance: tf.Tensor


class MovingStatistics(NamedTuple):
    """Moving mean and variance, and how a batch enters them.

    Attributes:
      mean, variance: [C], float32.
      momentum: fraction that is kept, in [0, 1].
      unbiased: whether the variance averages unbiased (Bessel-corrected) batch variances.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    momentum: float
    unbiased: bool


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype of the statistics of activations: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def merge_moments(gather: Gather, moments: Moments) -> Moments:
    """Merges the replicas' moments by the law of total variance, which is exact at any mean."""
    count, mean, variance = moments
    if isinstance(count, float) or not count.shape.rank:
        count *= tf.ones_like(mean[:1])
    count, mean, variance = gather_packed(gather, [count, mean, variance])
    total = tf.reduce_sum(count, axis=0)
    share = tf.math.divide_no_nan(count, total)
    rough = tf.reduce_sum(share * mean, axis=0)
    # Differences from a rough mean are small, and so are their rounding errors.
    merged = rough + tf.reduce_sum(share * (mean - rough), axis=0)
    within = tf.reduce_sum(share * variance, axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged), axis=0)
    return Moments(total, merged, within + between)


def gather_packed(gather: Gather, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns each tensor stacked over the replicas, [R, ...], by a single collective."""
    packed = gather(tf.concat(tensors, axis=-1))
    return tf.split(packed, [t.shape[-1] for t in tensors], axis=-1)


def count_elements(x: tf.Tensor) -> Count:
    """Returns the number of elements."""
    if x.shape.is_fully_defined():
        return float(x.shape.num_elements())
    return tf.cast(tf.size(x, tf.int64), tf.float32)


def divide(t: tf.Tensor, count: Count) -> tf.Tensor:
    """Divides by a count. An empty sum divided by 0 is 0."""
    if isinstance(count, float):
        return t / max(count, 1.0)
    return tf.math.divide_no_nan(t, tf.cast(count, t.dtype))


def unbias(variance: tf.Tensor, count: Count) -> tf.Tensor:
    """Applies Bessel's correction. The variance of a single value stays 0."""
    if isinstance(count, float):
        return variance * bessel_correction(count)
    return tf.math.divide_no_nan(variance * count, count - 1)


def bessel_correction(count: Count) -> Count:
    """Returns Bessel's correction of m values as the kernels compute it, with m - 1 at least 1."""
    if isinstance(count, float):
        return count / max(count - 1, 1.0)
    return count / tf.maximum(count - 1, 1)


def remove_bessel_correction(
    mean: tf.Tensor, variance: tf.Tensor, count: Count
) -> tuple[tf.Tensor, ...]:
    """Undoes Bessel's correction, and the NaN that the kernel returns for an empty batch."""
    if isinstance(count, float):
        if not count:
            return tf.zeros_like(mean), tf.zeros_like(variance)
        return mean, variance / bessel_correction(count)
    inverse = tf.math.divide_no_nan(tf.maximum(count - 1, 1), count)
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1))
    return mean, tf.math.multiply_no_nan(variance, inverse)
