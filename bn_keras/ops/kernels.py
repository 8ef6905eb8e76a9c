"""TensorFlow's fused kernel, and its outputs where float32 sums would be inaccurate."""

import functools
from collections.abc import Sequence

import tensorflow as tf

from bn_keras.ops import choice
from bn_keras.ops.moments import (
    Count,
    MovingStatistics,
    bessel_correction,
    count_elements,
    divide,
)
from bn_keras.ops.unfused import Unfused

# Largest number of values per channel whose float32 sum needs no check: at a mean of 1,000 standard
# deviations the computed mean is still accurate to a hundredth of a standard deviation.
_MAX_UNCHECKED_COUNT = 2**15


def run_training_kernel(
    images: tf.Tensor,
    size: Count,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    data_format: str = "NHWC",
    moving: MovingStatistics | None = None,
) -> Sequence[tf.Tensor]:
    """Normalizes images by their own statistics.

    Args:
      images: [N, H, W, C], or [N, C, H, W] with the data format NCHW.
      size: number of elements of images.
      gamma, beta: [C], float32.
      epsilon: added under the root.
      data_format: NHWC or, on accelerators, NCHW.
      moving: moving statistics before this batch.

    Returns:
      y, mean, variance and three reserve spaces. Mean and variance are those of the batch, the
      variance with Bessel's correction, or, with `moving`, the moving statistics after this batch.
    """
    if moving is not None and moving.momentum:
        old, factor = [moving.mean, moving.variance], 1 - moving.momentum
    else:
        # With exponential_avg_factor=1, the kernel requires empty moving statistics.
        old, factor = [tf.zeros([0])] * 2, 1.0
    parameters = [gamma, beta, *old]
    if choice.is_long(images, [images.shape.rank - 1]):
        # On CPUs the last reserve space is empty.
        return [*_train_exactly(images, parameters, epsilon, factor), tf.zeros([0])]
    outputs = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=old[0],
        variance=old[1],
        epsilon=epsilon,
        exponential_avg_factor=factor,
        data_format=data_format,
    )
    is_small = isinstance(size, float) and size <= _MAX_UNCHECKED_COUNT * images.shape[-1]
    if is_small or choice.is_on_accelerator():
        return outputs
    return _correct_if_lost(images, size, parameters, outputs, epsilon, factor)


def _correct_if_lost(
    images: tf.Tensor,
    size: Count,
    parameters: Sequence[tf.Tensor],
    outputs: Sequence[tf.Tensor],
    epsilon: float,
    factor: float,
) -> Sequence[tf.Tensor]:
    """Recomputes the training kernel's outputs if float32 sums have lost the deviations.

    On the CPU the kernel adds values one by one in float32. Once the spacing of the sum exceeds the
    deviations, they are lost (400,000 values: at a mean of about 300 standard deviations).

    Args:
      images: [N, H, W, C].
      size: number of elements of images.
      parameters: gamma, beta, and the moving mean and variance before this batch.
      outputs: outputs of the kernel.
      epsilon: added under the root.
      factor: exponential_avg_factor of the kernel.
    """
    *checked, last = outputs
    mean, variance = outputs[3:5]
    inverse = 2.0**25 * images.shape[-1] / size
    # A variance of 0, for which the ratio is 0 too, is right at any mean: the kernel averages the
    # squares of x - mean, which are all 0 only if every value equals the mean (within 1e-19).
    ratio = tf.math.divide_no_nan(tf.square(mean), variance)
    is_lost = tf.reduce_any(ratio > inverse * inverse)
    if tf.executing_eagerly():
        if not is_lost:
            return outputs
        return [*_recompute(images, parameters, epsilon, factor), last]
    recompute, keep = _branches(images.dtype, epsilon, factor)
    chosen = tf.raw_ops.StatelessIf(
        cond=is_lost,
        input=[*checked, *parameters, images],
        Tout=[t.dtype for t in checked],
        then_branch=recompute,
        else_branch=keep,
        output_shapes=[t.shape for t in checked],
    )
    return [*chosen, last]


@functools.cache
def _branches(
    dtype: tf.DType, epsilon: float, factor: float
) -> tuple[tf.types.experimental.ConcreteFunction, tf.types.experimental.ConcreteFunction]:
    """Returns the branches of _correct_if_lost, traced once for all layers."""
    images = tf.TensorSpec([None] * 4, dtype)
    vector = tf.TensorSpec([None])
    checked, parameters = [images] + [vector] * 4, [vector] * 4

    def recompute(*tensors: tf.Tensor) -> Sequence[tf.Tensor]:
        *parameters, images = tensors[5:]
        return _recompute(images, parameters, epsilon, factor)

    def keep(*tensors: tf.Tensor) -> Sequence[tf.Tensor]:
        return tensors[:5]

    signature = [*checked, *parameters, images]
    with tf.init_scope():
        # tf.function would add an operation per output.
        return tuple(tf.compat.v1.wrap_function(f, signature) for f in (recompute, keep))


def _recompute(
    images: tf.Tensor, parameters: Sequence[tf.Tensor], epsilon: float, factor: float
) -> Sequence[tf.Tensor]:
    """Returns the first five outputs of the training kernel for images with a large mean.

    The kernel gets the deviations from the mean, whose sum loses nothing.
    """
    gamma, beta, old_mean, old_variance = parameters
    axes = [0, 1, 2]
    exact_mean = tf.reduce_mean(tf.cast(images, tf.float64), axes)
    shift = tf.cast(exact_mean, tf.float32)
    # Float32 suffices: the difference is rounded only once.
    deviation = tf.cast(images, tf.float32) - shift
    y, mean, variance, _, biased, _ = tf.raw_ops.FusedBatchNormV3(
        x=deviation,
        scale=gamma,
        offset=beta,
        mean=old_mean if factor == 1 else old_mean - shift,
        variance=old_variance,
        epsilon=epsilon,
        exponential_avg_factor=factor,
    )
    if factor == 1:
        # Near a large mean float32 has few values. The kernel's rounding of the squares, the same
        # for equal values, then adds up.
        squares = tf.reduce_mean(tf.square(tf.cast(deviation, tf.float64)), axes)
        rounding = tf.cast(shift, tf.float64) - exact_mean
        kernel, biased = biased, tf.cast(squares - tf.square(rounding), tf.float32)
        variance *= tf.math.divide_no_nan(biased, kernel)
    # For the gradient, `shift` is the mean: the mean of the deviations is no more than a rounding
    # error.
    return tf.cast(y, images.dtype), mean + shift, variance, shift, biased


def _train_exactly(
    images: tf.Tensor, parameters: Sequence[tf.Tensor], epsilon: float, factor: float
) -> tuple[tf.Tensor, ...]:
    """Returns the first five outputs of the training kernel, from sums that lose nothing."""
    gamma, beta, old_mean, old_variance = parameters
    x = tf.cast(images, tf.float32)
    sum_in_float64 = Unfused(x, [3], epsilon).sum_in_float64
    count = count_elements(x) / x.shape[3]
    exact_mean = divide(sum_in_float64(x), count)
    mean = tf.cast(exact_mean, tf.float32)
    # Float32 suffices: the difference is rounded only once. The rest of the mean counts where it is
    # large, since float32 has few values there.
    deviation, rest = x - mean, exact_mean - tf.cast(mean, tf.float64)
    squares = divide(sum_in_float64(tf.square(deviation)), count)
    variance = tf.cast(tf.nn.relu(squares - tf.square(rest)), tf.float32)
    rest = tf.cast(rest, tf.float32)
    y = run_inference_kernel(deviation, rest, variance, gamma, beta, epsilon)
    y = tf.cast(y, images.dtype)
    unbiased = variance * bessel_correction(count)
    if factor == 1:
        return y, mean, unbiased, mean, variance
    averages = (
        old * (1 - factor) + new * factor
        for old, new in ((old_mean, mean), (old_variance, unbiased))
    )
    return y, *averages, mean, variance


def run_inference_kernel(
    images: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    """Normalizes images, [N, H, W, C], by the given statistics, [C]."""
    return tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=False,
    )[0]


def run_gradient_kernel(
    dy: tf.Tensor,
    images: tf.Tensor,
    gamma: tf.Tensor,
    reserved: Sequence[tf.Tensor],
    epsilon: float,
    data_format: str = "NHWC",
    is_training: bool = True,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns dx, dgamma and dbeta.

    Args:
      dy, images: in the data format, like gamma, epsilon and data_format those of the forward call.
      reserved: the training kernel's three reserve spaces, or mean, variance and [].
      is_training: whether a gradient flows through the statistics.
    """
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy,
        x=images,
        scale=gamma,
        reserve_space_1=reserved[0],
        reserve_space_2=reserved[1],
        reserve_space_3=reserved[2],
        epsilon=epsilon,
        data_format=data_format,
        is_training=is_training,
    )
    return dx, dgamma, dbeta


def move_gradients(
    mean: tf.Tensor, variance: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, ...]:
    """Returns the same values, with the gradients of mean and variance in gamma and beta.

    The inference kernel has no gradients of its statistics. These enter gamma and beta in terms
    whose values are exactly 1 and 0.
    """
    inverse_stddev = tf.math.rsqrt(variance + epsilon)
    fixed_mean, fixed_variance, fixed_inverse = map(
        tf.stop_gradient, (mean, variance, inverse_stddev)
    )
    beta -= (mean - fixed_mean) * gamma * inverse_stddev
    return fixed_mean, fixed_variance, gamma * (inverse_stddev / fixed_inverse), beta
