"""The batch-normalizing transform as functions of tensors, forward and backward.

Activations are channels-last, [N, ..., C]. This module knows no layer and no strategy: a callable,
`gather`, exchanges tensors between replicas.

Two implementations compute the same numbers. `_Fused` calls TensorFlow's fused kernels, which read
and write the activations as few times as possible. `_Unfused` consists of ordinary operations: it
accepts every dtype and mask, and because it is differentiable it also provides the second-order
gradients. XLA compiles `_Unfused` only: it fuses ordinary operations itself, and its version of the
fused kernels computes the variance as E[x^2] - E[x]^2, which cancels at large means.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util
from tensorflow.python.ops import control_flow_util

# Dtypes that the fused kernels accept. They compute in float32 for all three.
_FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)

# Smallest number of elements for which the kernels are faster than ordinary operations on a CPU.
_MIN_SIZE_TO_FUSE_TRAINING = 2**16
_MIN_SIZE_TO_FUSE_INFERENCE = 2**18

# Largest number of values per channel whose float32 sum needs no check: at a mean of 1,000 standard
# deviations the computed mean is still accurate to a hundredth of a standard deviation.
_MAX_UNCHECKED_COUNT = 2**15

# Stacks the tensors, [...], of the R replicas that share statistics: returns the same [R, ...] on
# each of them. Differentiable; one collective per call.
Gather = Callable[[tf.Tensor], tf.Tensor]

# Maps (dy, x, gamma) to (dx, dgamma, dbeta).
_Backward = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]


class Moments(NamedTuple):
    """Statistics of a batch, or of each of the G ghost batches that it is split into.

    Mean and variance are 0 where count is 0.

    Attributes:
      count: number of values per channel, [G, C] if the mask differs by channel, else [G, 1].
      mean: [G, C].
      variance: [G, C], biased: divided by count, as in Algorithm 1, without Bessel's correction.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """Returns the dtype of the statistics of activations: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
) -> tf.Tensor:
    """Computes gamma * (x - mean) / sqrt(variance + epsilon) + beta for given statistics.

    Computed in float32 (float64 for float64) whatever the dtype of x. No gradient flows to mean
    and variance.

    Args:
      x: [N, ..., C] activations.
      mean: [C].
      variance: [C], >= 0.
      gamma: [C]; None means 1.
      beta: [C]; None means 0.
      epsilon: added under the root, > 0.

    Returns:
      Same shape and dtype as x.

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4.
    """
    x = tf.convert_to_tensor(x)
    dtype = statistics_dtype(x.dtype)
    mean, variance = (tf.stop_gradient(tf.cast(t, dtype)) for t in (mean, variance))
    gamma, beta = _with_defaults(gamma, beta, x)
    if _should_fuse(x, _MIN_SIZE_TO_FUSE_INFERENCE):
        y = _run_inference_kernel(_as_images(x), mean, variance, gamma, beta, epsilon)
        return _restore(y, x)
    y = (tf.cast(x, dtype) - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta
    return tf.cast(y, x.dtype)


def batch_normalize(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    *,
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
      x: [N, ..., C] activations; N may be 0.
      gamma: [C]; None means 1.
      beta: [C]; None means 0.
      epsilon: added under the root, > 0.
      mask: same rank as x and broadcastable to it; only values where it is nonzero enter the
        statistics. Masked values are normalized too. None means no mask.
      virtual_batch_size: number of consecutive examples in a ghost batch, which has statistics of
        its own; divides N. None means the whole batch.
      gather: exchanges statistics with other replicas; None means this replica alone.

    Returns:
      y, with the shape and dtype of x, and the moments, through which no gradient flows.

    Source: Ioffe & Szegedy 2015, Algorithm 1, and the gradients in section 3.
    """
    x = tf.convert_to_tensor(x)
    gamma, beta = _with_defaults(gamma, beta, x)
    unfused = _Unfused(epsilon, virtual_batch_size, gather, mask, x)
    # The kernels run once per ghost batch, so the number of ghost batches must be static.
    num_ghosts = _static_num_ghosts(x, virtual_batch_size)
    forward = unfused.forward
    is_forward_mode = _has_tangents(x, gamma, beta)
    can_fuse = mask is None and num_ghosts and not is_forward_mode
    if can_fuse and _should_fuse(x, _MIN_SIZE_TO_FUSE_TRAINING):
        forward = (
            _Fused(epsilon, num_ghosts).forward
            if gather is None
            else _SynchronizedFused(epsilon, num_ghosts, gather).forward
        )
    if is_forward_mode:
        # Forward mode differentiates these operations; reverse mode uses the custom gradient below.
        y, moments, backward = forward(x, gamma, beta)
        moments = Moments(moments.count, *map(tf.stop_gradient, moments[1:]))
    else:
        y, moments, backward = forward(tf.stop_gradient(x), gamma, beta)

    @tf.custom_gradient
    def differentiable(x, gamma, beta):  # noqa: ANN001
        @tf.custom_gradient
        def first_order(dy, x, gamma):  # noqa: ANN001
            def second_order(*upstream):
                with tf.GradientTape() as tape:
                    tape.watch([dy, x, gamma])
                    # The moments depend on x, so they are computed again under this tape.
                    outputs = unfused.backward(unfused.compute_moments(x), dy, x, gamma)
                return tape.gradient(outputs, [dy, x, gamma], upstream)

            return backward(dy, x, gamma), second_order

        return y, lambda dy: first_order(dy, x, gamma)

    return differentiable(x, gamma, beta), moments


class _Unfused:
    """The transform in ordinary operations, in the dtype of the statistics.

    With ghost batches, tensors have an additional first axis, with an entry per ghost batch.
    Statistics keep their reduced axes, with size 1.
    """

    def __init__(
        self,
        epsilon: float,
        virtual_batch_size: int | None,
        gather: Gather | None,
        mask: tf.Tensor | None,
        x: tf.Tensor,
    ) -> None:
        self._epsilon = epsilon
        self._virtual_batch_size = virtual_batch_size
        self._gather = gather
        rank = x.shape.rank
        self._axes = list(range(rank - 1) if virtual_batch_size is None else range(1, rank))
        self._mask = None
        if mask is not None:
            mask = tf.cast(mask, tf.bool)
            self._mask = self._split(tf.broadcast_to(mask, _dims(x)[:-1] + _dims(mask)[-1:]))

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, _Backward]:
        moments = self.compute_moments(x)
        scale = gamma * tf.math.rsqrt(moments.variance + self._epsilon)
        y = (self._split_and_cast(x) - moments.mean) * scale + beta
        squeezed = Moments(*map(_squeeze_statistic, moments))
        return _restore(y, x), squeezed, functools.partial(self.backward, moments)

    def compute_moments(self, x: tf.Tensor) -> Moments:
        """Computes the mean, then the variance from the deviations from it.

        Outside XLA, the mean of the deviations corrects the rounding error of the first mean.
        """
        x = self._split_and_cast(x)
        if self._mask is None:
            dims = _dims(x)
            shape = [1 if a in self._axes else d for a, d in enumerate(dims[:-1])] + [1]
            count = _constant(_product([dims[a] for a in self._axes]), shape, x.dtype)
        else:
            count = self._sum(tf.cast(self._mask, x.dtype))
        if _is_compiled_by_xla():
            # XLA adds values one by one in float32, so a large mean would lose the deviations.
            # Subtracting one value of the batch first leaves a mean that needs no correction.
            shift = self._some_value(x)
            mean = shift + self._mean(self._apply_mask(x - shift), count)
            variance = self._mean(tf.square(self._apply_mask(x - mean)), count)
        else:
            mean = self._mean(self._apply_mask(x), count)
            deviation = self._apply_mask(x - mean)
            correction = self._mean(deviation, count)
            squares = self._mean(tf.square(deviation), count)
            variance = tf.nn.relu(squares - tf.square(correction))
            mean += correction
        return _merge_moments(self._gather, Moments(count, mean, variance))

    def backward(
        self, moments: Moments, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        dy = self._split_and_cast(dy)
        inverse_stddev = tf.math.rsqrt(moments.variance + self._epsilon)
        x_hat = (self._split_and_cast(x) - moments.mean) * inverse_stddev
        if self._mask is not None:
            # A masked value may be NaN; where its dy is 0 it must not reach any sum.
            x_hat = tf.where(self._mask | (dy != 0), x_hat, 0.0)
        dgamma, dbeta = self._sum(dy * x_hat), self._sum(dy)
        mean_dy, mean_dy_x_hat = _compute_dy_means(self._gather, dbeta, dgamma, moments.count)
        through_moments = self._apply_mask(mean_dy + x_hat * mean_dy_x_hat)
        dx = gamma * inverse_stddev * (dy - through_moments)
        axes = list(range(dx.shape.rank - 1))
        return _restore(dx, x), tf.reduce_sum(dgamma, axes), tf.reduce_sum(dbeta, axes)

    def _some_value(self, x: tf.Tensor) -> tf.Tensor:
        """Returns one value per channel that enters the statistics, or 0 if there is none."""
        if self._mask is None:
            first = x[
                tuple(slice(1) if a in self._axes else slice(None) for a in range(len(x.shape)))
            ]
            # The sum of one value, or of none in an empty batch.
            return tf.stop_gradient(self._sum(first))
        largest = tf.reduce_max(tf.where(self._mask, x, x.dtype.min), self._axes, keepdims=True)
        return tf.stop_gradient(tf.where(largest > x.dtype.min, largest, 0.0))

    def _split(self, x: tf.Tensor) -> tf.Tensor:
        if self._virtual_batch_size is None:
            return x
        return tf.reshape(x, [-1, self._virtual_batch_size, *_dims(x)[1:]])

    def _split_and_cast(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cast(self._split(x), statistics_dtype(x.dtype))

    def _apply_mask(self, x: tf.Tensor) -> tf.Tensor:
        return x if self._mask is None else tf.where(self._mask, x, 0.0)

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(x, self._axes, keepdims=True)

    def _mean(self, x: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        return tf.math.divide_no_nan(self._sum(x), count)


class _Fused:
    """The transform in TensorFlow's fused kernels, called once per ghost batch."""

    def __init__(self, epsilon: float, num_ghosts: int) -> None:
        self._epsilon = epsilon
        self._num_ghosts = num_ghosts

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, _Backward]:
        ys, moments, residuals = self._run_training(self._split(x), gamma, beta)
        return _restore(_concat(ys), x), moments, functools.partial(self._backward, residuals)

    def _run_training(
        self, ghosts: Sequence[tf.Tensor], gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[Sequence[tf.Tensor], Moments, Sequence[Sequence[tf.Tensor]]]:
        """Returns y of each ghost batch, the moments, and the residuals of each ghost batch."""
        count = _product(_dims(ghosts[0])[:-1])
        results = [_run_training_kernel(g, count, gamma, beta, self._epsilon) for g in ghosts]
        ys, means, variances, residuals = zip(*results, strict=True)
        counts = _constant(count, [self._num_ghosts, 1], gamma.dtype)
        return ys, Moments(counts, tf.stack(means), tf.stack(variances)), residuals

    def _backward(
        self,
        residuals: Sequence[Sequence[tf.Tensor]],
        dy: tf.Tensor,
        x: tf.Tensor,
        gamma: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        gradients = [
            _run_gradient_kernel(dy, images, gamma, reserved, self._epsilon, is_training=True)
            for dy, (images, *reserved) in zip(self._split(dy), residuals, strict=True)
        ]
        dxs, dgammas, dbetas = zip(*gradients, strict=True)
        return _restore(_concat(dxs), x), tf.add_n(dgammas), tf.add_n(dbetas)

    def _split(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Returns the ghost batches as images [N, H, W, C]."""
        images = _as_images(x)
        return [images] if self._num_ghosts == 1 else tf.split(images, self._num_ghosts)

    def _zip_ghosts(self, *parts: tf.Tensor | Sequence[tf.Tensor]) -> Iterable[tuple]:
        """Zips over the ghost batches, which are the first axis of a tensor."""
        unstacked = [
            tf.unstack(p, self._num_ghosts) if isinstance(p, tf.Tensor) else p for p in parts
        ]
        return zip(*unstacked, strict=True)


class _SynchronizedFused(_Fused):
    """The transform in fused kernels, with statistics shared by several replicas."""

    def __init__(self, epsilon: float, num_ghosts: int, gather: Gather) -> None:
        super().__init__(epsilon, num_ghosts)
        self._gather = gather

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, _Backward]:
        ghosts = self._split(x)
        # The training kernel only provides this replica's moments; its y is discarded.
        _, local, _ = self._run_training(ghosts, gamma, beta)
        moments = _merge_moments(self._gather, local)
        ys = [
            _run_inference_kernel(images, mean, variance, gamma, beta, self._epsilon)
            for images, mean, variance in self._zip_ghosts(ghosts, *moments[1:])
        ]
        backward = functools.partial(self._synchronized_backward, moments)
        return _restore(_concat(ys), x), moments, backward

    def _synchronized_backward(
        self, moments: Moments, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        ghosts = self._split(x)
        # With is_training=False the kernel treats the statistics as constants. It returns
        # gamma / sigma * dy and both sums of this replica in one call.
        gradients = [
            _run_gradient_kernel(
                dy, images, gamma, (mean, variance, []), self._epsilon, is_training=False
            )
            for dy, images, mean, variance in self._zip_ghosts(
                self._split(dy), ghosts, *moments[1:]
            )
        ]
        direct, dgammas, dbetas = zip(*gradients, strict=True)
        dy_means = _compute_dy_means(
            self._gather, tf.stack(dbetas), tf.stack(dgammas), moments.count
        )
        scales = -gamma * tf.math.rsqrt(moments.variance + self._epsilon)
        # The gradient through the moments, scale * (mean_dy + x_hat * mean_dy_x_hat), is affine in
        # x_hat, so the inference kernel computes it.
        dxs = [
            dx
            + _run_inference_kernel(
                images, mean, variance, scale * mean_dy_x_hat, scale * mean_dy, self._epsilon
            )
            for dx, images, mean, variance, scale, mean_dy, mean_dy_x_hat in self._zip_ghosts(
                direct, ghosts, *moments[1:], scales, *dy_means
            )
        ]
        return _restore(_concat(dxs), x), tf.add_n(dgammas), tf.add_n(dbetas)


# --- Merging the statistics of replicas.


def _merge_moments(gather: Gather | None, moments: Moments) -> Moments:
    """Merges the replicas' moments by the law of total variance, which is exact at any mean."""
    if gather is None:
        return moments
    count, mean, variance = _gather_packed(gather, moments)
    total = tf.reduce_sum(count, axis=0)
    share = tf.math.divide_no_nan(count, total)
    rough = tf.reduce_sum(share * mean, axis=0)
    # Differences from a rough mean are small, and so are their rounding errors.
    merged = rough + tf.reduce_sum(share * (mean - rough), axis=0)
    within = tf.reduce_sum(share * variance, axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged), axis=0)
    return Moments(total, merged, within + between)


def _compute_dy_means(
    gather: Gather | None, sum_dy: tf.Tensor, sum_dy_x_hat: tf.Tensor, count: tf.Tensor
) -> list[tf.Tensor]:
    """Computes the means of dy and dy * x_hat over all replicas that share statistics."""
    sums = [sum_dy, sum_dy_x_hat]
    if gather is not None:
        sums = [tf.reduce_sum(s, axis=0) for s in _gather_packed(gather, sums)]
    return [tf.math.divide_no_nan(s, count) for s in sums]


def _gather_packed(gather: Gather, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns each tensor stacked over the replicas, [R, ...], by a single collective."""
    packed = gather(tf.concat(tensors, axis=-1))
    return tf.split(packed, [t.shape[-1] for t in tensors], axis=-1)


# --- TensorFlow's fused kernels.


def _run_training_kernel(
    images: tf.Tensor, count: int | tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, Sequence[tf.Tensor]]:
    """Returns y, mean, biased variance, and the residuals: images and three reserve spaces.

    Args:
      images: [N, H, W, C].
      count: number of values per channel.
      gamma, beta: [C].
      epsilon: added under the root, > 0.
    """
    y, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
        x=images, scale=gamma, offset=beta, mean=[], variance=[], epsilon=epsilon
    )
    is_static = isinstance(count, int)
    num_values = float(count) if isinstance(count, int) else tf.cast(count, tf.float32)
    # The kernel applies Bessel's correction, with m - 1 at least 1, to the variance that it returns
    # (not to the one that it normalizes by). Undo it, and the NaN returned for an empty batch.
    if is_static and num_values:
        variance *= max(num_values - 1, 1) / num_values
    else:
        inverse = tf.math.divide_no_nan(tf.maximum(num_values - 1.0, 1.0), num_values)
        variance = tf.math.multiply_no_nan(variance, inverse)
        mean = tf.math.multiply_no_nan(mean, tf.minimum(num_values, 1.0))
    outputs = y, mean, variance, images, *reserved
    if not _has_accelerator() and not (is_static and num_values <= _MAX_UNCHECKED_COUNT):
        # On the CPU the kernel adds values one by one in float32. Once the spacing of the sum
        # exceeds the deviations, they are lost (400,000 values: at a mean of about 300 standard
        # deviations). Subtracting one value of the batch first leaves a small mean.
        is_lost = tf.reduce_any(tf.square(mean * (num_values * 2.0**-25)) > variance + epsilon)
        outputs = tf.cond(
            is_lost, lambda: _train_shifted(images, gamma, beta, epsilon), lambda: outputs
        )
    y, mean, variance, *residuals = outputs
    return y, mean, variance, residuals


def _train_shifted(
    images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, ...]:
    """Returns y, mean, variance and residuals, computed after subtracting the first value."""
    shift = images[0, 0, 0]
    shifted = images - shift
    mean, variance = tf.nn.moments(tf.cast(shifted, tf.float32), [0, 1, 2])
    y = _run_inference_kernel(shifted, mean, variance, gamma, beta, epsilon)
    reserved = mean, variance, tf.zeros([0])
    return y, tf.cast(shift, tf.float32) + mean, variance, shifted, *reserved


def _run_inference_kernel(
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


def _run_gradient_kernel(
    dy: tf.Tensor,
    images: tf.Tensor,
    gamma: tf.Tensor,
    reserved: Sequence[tf.Tensor],
    epsilon: float,
    is_training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy,
        x=images,
        scale=gamma,
        reserve_space_1=reserved[0],
        reserve_space_2=reserved[1],
        reserve_space_3=reserved[2],
        epsilon=epsilon,
        is_training=is_training,
    )
    return dx, dgamma, dbeta


def _should_fuse(x: tf.Tensor, min_size: int) -> bool:
    if x.dtype not in _FUSED_DTYPES or _is_compiled_by_xla():
        return False
    if _has_accelerator():
        return True
    if _num_kernel_threads() == 1:
        # Waking other threads, most of the cost of a small call, is not needed.
        min_size //= 16
    size = x.shape.num_elements()
    return size is None or size >= min_size


def _num_kernel_threads() -> int:
    # All cores of the machine, even if the process may use only some of them: this choice affects
    # rounding, and a network trained in parallel with others must equal one trained alone.
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1


def _has_tangents(*tensors: tf.Tensor) -> bool:
    """Returns whether a tf.autodiff.ForwardAccumulator follows any of the tensors."""
    return bool(forwardprop_util.pack_tangents(tensors).tangents)


def _is_compiled_by_xla() -> bool:
    """Returns whether XLA compiles the graph being traced, for a jitted function or for a TPU."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def _has_accelerator() -> bool:
    return any(d.device_type != "CPU" for d in tf.config.list_logical_devices())


# --- Shapes. A dimension is an int where it is static, else a scalar tensor.


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
    dims = _dims(x)
    return tf.reshape(x, [*dims[: len(reduced)], _product(dims[len(reduced) :])])


def move_channels_back(y: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns y in the shape of x: the inverse of move_channels_last(x, axes)."""
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
    dynamic = tf.unstack(tf.shape(x))
    return [a if d is None else d for a, d in zip(dynamic, x.shape, strict=True)]


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
        # A single node, whose value tf.get_static_value can read.
        return tf.constant(value, dtype, dims)
    return tf.fill(dims, tf.cast(value, dtype))


def _as_images(x: tf.Tensor) -> tf.Tensor:
    """Reshapes [N, ..., C] to [N, H, W, C], the only layout that the kernels accept."""
    rank = x.shape.rank
    if rank == 4:
        return x
    if rank < 4:
        return tf.reshape(x, [-1] + [1] * (4 - rank) + _dims(x)[1:])
    dims = _dims(x)
    return tf.reshape(x, [-1, _product(dims[1:-2]), dims[-2], dims[-1]])


def _squeeze_statistic(statistic: tf.Tensor) -> tf.Tensor:
    """Reshapes [G, 1, ..., 1, C] to [G, C]. A constant stays a constant."""
    ones = tuple(range(1, statistic.shape.rank - 1))
    static = tf.get_static_value(statistic)
    if static is not None:
        return tf.constant(static.squeeze(ones))
    return tf.squeeze(statistic, ones) if ones else statistic


def _restore(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns y with the shape and dtype of x."""
    y = tf.cast(y, x.dtype)
    return y if y.shape.rank == x.shape.rank else tf.reshape(y, tf.shape(x))


def _concat(ghosts: Sequence[tf.Tensor]) -> tf.Tensor:
    return ghosts[0] if len(ghosts) == 1 else tf.concat(ghosts, axis=0)


def _static_num_ghosts(x: tf.Tensor, virtual_batch_size: int | None) -> int:
    """Returns the number of ghost batches, or 0 if it is unknown."""
    if virtual_batch_size is None:
        return 1
    return (x.shape[0] or 0) // virtual_batch_size


def _with_defaults(
    gamma: tf.Tensor | None, beta: tf.Tensor | None, x: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    dtype, channels = statistics_dtype(x.dtype), x.shape[-1]
    gamma = tf.ones([channels], dtype) if gamma is None else tf.cast(gamma, dtype)
    beta = tf.zeros([channels], dtype) if beta is None else tf.cast(beta, dtype)
    # tf.cast returns a variable that has the dtype already as it is.
    return tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta)
