"""The batch-normalizing transform as functions of tensors, forward and backward.

This module knows no layer and no strategy: a callable, `gather`, exchanges tensors between
replicas.

Two implementations compute the same numbers. `_Fused` calls TensorFlow's fused kernels, which read
and write the activations as few times as possible. `_Unfused` consists of ordinary operations: it
accepts every dtype, axis and mask, and because it is differentiable it also provides the
second-order gradients. Small inputs use it too, because calling a kernel would cost them more than
it saves, and so does XLA, which fuses ordinary operations itself. XLA's version of the fused
kernels computes the variance as E[x^2] - E[x]^2, which cancels at large means.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf
from tensorflow.python.distribute import device_util
from tensorflow.python.eager import context, forwardprop_util, record
from tensorflow.python.ops import control_flow_util

# Dtypes that the fused kernels accept. They compute in float32 for all three.
_FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)

# Smallest numbers of elements and channels for which the kernels are faster on a CPU than ordinary
# operations.
_MIN_SIZE_TO_FUSE_TRAINING = 2**17
_MIN_SIZE_TO_FUSE_INFERENCE = 2**18
_MIN_CHANNELS_TO_FUSE = 4

# Batch sizes assumed where they are unknown while a graph is built.
_TRAINING_BATCH_SIZE = 32
_INFERENCE_BATCH_SIZE = 1

# Largest number of values per channel that are summed in float32 on a CPU. TensorFlow and its
# kernels add them one by one, so that squares are lost next to their sum: with this many the
# variance is up to 0.05% too small, with 16 times as many up to 3%.
_MAX_FLOAT32_COUNT = 2**20
# Size assumed for axes other than the batch axis where it is unknown.
_AXIS_SIZE = 256

# Largest number of values per channel whose float32 sum needs no check: at a mean of 1,000 standard
# deviations the computed mean is still accurate to a hundredth of a standard deviation.
_MAX_UNCHECKED_COUNT = 2**15

# Numbers of values in the parts of x that are summed first, where one float32 sum would be
# inaccurate: the sums of smaller parts would be nearly as large as x, and those of larger ones less
# accurate at large means. Parts have more than 64 values only if no power of two divides their
# number, as in images of 149 x 149.
_MIN_PART, _MAX_POWER_OF_TWO, _MAX_PART = 4, 64, 160

# Stacks the tensors, [...], of the R replicas that share statistics: returns the same [R, ...] on
# each of them. Differentiable; one collective per call.
Gather = Callable[[tf.Tensor], tf.Tensor]

# Maps dy to (dx, dgamma, dbeta).
_Backward = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]

# A Python float if it is known while a graph is built.
Count: TypeAlias = float | tf.Tensor


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

    Computed in float32 (float64 for float64) whatever the dtype of x. Small inputs are computed as
    x * scale + offset, which converters merge with a convolution or a dense layer before it.

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
    axes = _with_default_axes(axes, x)
    dtype = statistics_dtype(x.dtype)
    mean, variance = (tf.cast(t, dtype) for t in (mean, variance))
    gamma, beta = (_to_statistics_dtype(p, x) for p in (gamma, beta))
    if _should_fuse_inference(x, axes):
        gamma, beta = _with_defaults(gamma, beta, x, axes)
        statistics = mean, variance, gamma, beta
        if not tf.executing_eagerly() or record.could_possibly_record():
            statistics = _move_gradients(*statistics, epsilon)
        return _run_inference_kernel(x, *statistics, epsilon)
    scale = tf.math.rsqrt(variance + epsilon)
    scale = scale if gamma is None else gamma * scale
    offset = -mean * scale if beta is None else beta - mean * scale
    if not _are_last(axes, x.shape.rank):
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
    axes = _with_default_axes(axes, x)
    gamma, beta = (_to_statistics_dtype(p, x) for p in (gamma, beta))
    unfused = _Unfused(x, axes, epsilon, mask, virtual_batch_size, gather)
    if _has_tangents(x, gamma, beta):
        # A custom gradient would hide the operations from forward mode.
        y, moments, _ = unfused.forward(x, gamma, beta)
        return y, moments
    # The kernels run once per ghost batch, so the number of ghost batches must be static.
    num_ghosts = _static_num_ghosts(x, virtual_batch_size)
    has_kernel = mask is None and num_ghosts > 0
    if not has_kernel or not _should_fuse_training(x, axes, num_ghosts, gather is not None):
        return _differentiable(unfused, x, gamma, beta)

    def run(x, axis, gamma, beta):  # noqa: ANN001
        arguments = x, axis, epsilon, virtual_batch_size
        fused = _Fused(*arguments) if gather is None else _SynchronizedFused(*arguments, gather)
        unfused = _Unfused(x, [axis], epsilon, None, virtual_batch_size, gather)
        return _twice_differentiable(fused.forward, unfused, x, gamma, beta)

    return _run_fused(run, x, axes, gamma, beta)


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
    axes = _with_default_axes(axes, x)
    gamma, beta = (_to_statistics_dtype(p, x) for p in (gamma, beta))

    def run(x, axis, gamma, beta):  # noqa: ANN001
        fused = _Fused(x, axis, epsilon, None)
        forward = functools.partial(fused.forward_and_average, moving)
        unfused = _Unfused(x, [axis], epsilon)
        return _twice_differentiable(forward, unfused, x, gamma, beta)

    return _run_fused(run, x, axes, gamma, beta)


def uses_averaging_kernel(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    axes: Sequence[int] | None = None,
) -> bool:
    """Returns whether batch_normalize_and_average accepts these tensors: the kernels are used."""
    axes = _with_default_axes(axes, x)
    return _should_fuse_training(x, axes) and not _has_tangents(x, gamma, beta)


def _should_fuse_training(
    x: tf.Tensor, axes: Sequence[int], num_ghosts: int = 1, is_synchronized: bool = False
) -> bool:
    if x.dtype not in _FUSED_DTYPES or _is_compiled_by_xla():
        return False
    # Each ghost batch takes a call of its own, so that the graph grows with their number.
    ghost_size = _num_values(x, _TRAINING_BATCH_SIZE) / num_ghosts
    if num_ghosts > 1 and ghost_size < _MIN_SIZE_TO_FUSE_TRAINING / 2:
        return False
    if _is_on_accelerator():
        # The synchronized gradient needs the kernel's gradient of inference, which on GPUs adds in
        # no fixed order and is refused by tf.config.experimental.enable_op_determinism.
        return not is_synchronized
    return _is_large(x, axes, _TRAINING_BATCH_SIZE, _MIN_SIZE_TO_FUSE_TRAINING)


def _should_fuse_inference(x: tf.Tensor, axes: Sequence[int]) -> bool:
    # Only images with channels last, the layout in which converters recognize the kernel.
    if x.dtype not in _FUSED_DTYPES or x.shape.rank != 4 or list(axes) != [3]:
        return False
    if not _is_large(x, axes, _INFERENCE_BATCH_SIZE, _MIN_SIZE_TO_FUSE_INFERENCE):
        return False
    # On GPUs the kernel's gradient has no fixed order (see _should_fuse_training), and cuDNN limits
    # the batch size.
    return not (_is_compiled_by_xla() or _is_on_accelerator())


def _is_large(x: tf.Tensor, axes: Sequence[int], batch_size: int, min_size: int) -> bool:
    # All cores of the machine, even if the process may use only some of them: this choice affects
    # rounding, and a network trained in parallel with others must equal one trained alone.
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
    if threads == 1:
        # Waking other threads, most of the cost of a small call, is not needed.
        min_size //= 16
    channels = math.prod(x.shape[a] for a in axes)
    return _num_values(x, batch_size) >= min_size and channels >= _MIN_CHANNELS_TO_FUSE


def _is_long(x: tf.Tensor, axes: Sequence[int], virtual_batch_size: int | None = None) -> bool:
    """Returns whether a channel may have too many values for float32 sums on a CPU."""
    sizes = dict(enumerate(x.shape))
    sizes[0] = virtual_batch_size or sizes[0] or _TRAINING_BATCH_SIZE
    count = math.prod(_AXIS_SIZE if d is None else d for a, d in sizes.items() if a not in axes)
    return count > _MAX_FLOAT32_COUNT and not _is_on_accelerator()


def _num_values(x: tf.Tensor, batch_size: int) -> int:
    """Returns the number of values of x; batch_size replaces sizes that are not static."""
    return math.prod(batch_size if d is None else d for d in x.shape)


def _has_tangents(*tensors: tf.Tensor | None) -> bool:
    """Returns whether a tf.autodiff.ForwardAccumulator follows any of the tensors."""
    given = [t for t in tensors if t is not None]
    return bool(forwardprop_util.pack_tangents(given).tangents)


def _is_compiled_by_xla() -> bool:
    """Returns whether XLA compiles the graph being traced, for a jitted function or for a TPU."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def _is_on_accelerator() -> bool:
    """Returns whether operations created now run on a GPU or TPU, as far as is known."""
    if tf.executing_eagerly():
        device = context.context().device_name
    else:
        # The device scope of a graph has no public name.
        probe = device_util._FakeOperation()
        tf.compat.v1.get_default_graph()._apply_device_functions(probe)
        device = probe.device
    device_type = tf.DeviceSpec.from_string(device or "").device_type
    if device_type is not None:
        return device_type != "CPU"
    # TensorFlow places operations without a device on an accelerator, if there is one.
    return any(d.device_type != "CPU" for d in tf.config.list_logical_devices())


# --- Gradients.


def _differentiable(
    unfused: "_Unfused", x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None
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


def _twice_differentiable(
    forward: Callable[..., tuple[tf.Tensor, Any, _Backward]],
    unfused: "_Unfused",
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


# --- Ordinary operations.


class _Unfused:
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
        self._is_long = _is_long(x, axes, virtual_batch_size)
        first = 0 if virtual_batch_size is None else 1
        rank = x.shape.rank
        self._reduced = [a + first for a in range(rank) if a not in axes]
        # The sums over all other axes broadcast with x if these are the first.
        self._keepdims = bool(first) or not _are_last(axes, rank)
        # Shape of a statistic that broadcasts with x, without the axis of the ghost batches.
        self._shape = [x.shape[a] for a in axes]
        if self._keepdims:
            self._shape = [x.shape[a] if a in axes else 1 for a in range(rank)]
        self._mask = None
        if mask is not None:
            shape = [mask.shape[a] if a in axes else d for a, d in enumerate(_dims(x))]
            self._mask = self._split(tf.broadcast_to(tf.cast(mask, tf.bool), shape))

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None
    ) -> tuple[tf.Tensor, Moments, _Backward]:
        original, x = x, self._split_and_cast(x)
        count, mean, variance, deviation = self._compute_moments(x)
        moments = self._flatten_moments(count, mean, variance)
        if self._gather is not None:
            moments = _merge_moments(self._gather, moments)
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
            mean_dy, mean_dy_x_hat = (_divide(t, count) for t in self._over_replicas(dbeta, dgamma))
            through_moments = mean_dy + finite * (mean_dy_x_hat * inverse_stddev)
            dx = (dy - self._apply_mask(through_moments)) * slope
            return _restore(dx, original), self._sum_ghosts(dgamma), self._sum_ghosts(dbeta)

        return _restore(y, original), moments, backward

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
                mean += _divide(self._sum(self._apply_mask(parts - mean)), count / size)
        else:
            mean = tf.cast(_divide(self.sum_exactly(self._apply_mask(x)), count), x.dtype)
        deviation = x - mean
        variance = _divide(self._sum(tf.square(self._apply_mask(deviation))), count)
        return count, mean, variance, deviation

    def _average_parts(self, x: tf.Tensor) -> tuple[tf.Tensor, int]:
        """Returns the means of equal parts of x, and the number of values in each.

        XLA's CPU compiler writes x minus a shift to memory, as large as x, before it sums it. The
        means of parts are few, and a part is so small that its sum is accurate.
        """
        if self._mask is not None or _is_on_accelerator():
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
        dims = _reshape_dims(x)
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
        dims = _dims(x)
        return tf.cast(_product([dims[a] for a in self._reduced]), x.dtype)

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
        gathered = _gather_packed(self._gather, [self._flatten(s) for s in sums])
        return [self._expand(tf.reduce_sum(t, axis=0)) for t in gathered]

    def _split(self, x: tf.Tensor) -> tf.Tensor:
        if self._virtual_batch_size is None:
            return x
        shape = [-1, self._virtual_batch_size, *_dims(x)[1:]]
        # XLA drops assertions, but its errors cite names of operations.
        return tf.reshape(x, shape, name="virtual_batch_size_must_divide_the_batch_size")

    def _split_and_cast(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cast(self._split(x), statistics_dtype(x.dtype))

    def _apply_mask(self, x: tf.Tensor) -> tf.Tensor:
        return x if self._mask is None else tf.where(self._mask, x, 0.0)

    def _sum(self, x: tf.Tensor) -> tf.Tensor:
        if self._is_long:
            return tf.cast(self.sum_exactly(x), x.dtype)
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
        return is_last and not self._is_compiled_by_xla and not _is_on_accelerator()

    @functools.cached_property
    def _is_compiled_by_xla(self) -> bool:
        return _is_compiled_by_xla()

    def sum_exactly(self, x: tf.Tensor) -> tf.Tensor:
        """Sums without losing large means, in float64.

        TensorFlow adds float32 values one by one, except along the innermost axes, where it adds
        sums of pairs and float32 is accurate enough, as it is for small parts.
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


# --- Merging the statistics of replicas.


def _merge_moments(gather: Gather, moments: Moments) -> Moments:
    """Merges the replicas' moments by the law of total variance, which is exact at any mean."""
    count, mean, variance = moments
    if isinstance(count, float) or not count.shape.rank:
        count *= tf.ones_like(mean[:1])
    count, mean, variance = _gather_packed(gather, [count, mean, variance])
    total = tf.reduce_sum(count, axis=0)
    share = tf.math.divide_no_nan(count, total)
    rough = tf.reduce_sum(share * mean, axis=0)
    # Differences from a rough mean are small, and so are their rounding errors.
    merged = rough + tf.reduce_sum(share * (mean - rough), axis=0)
    within = tf.reduce_sum(share * variance, axis=0)
    between = tf.reduce_sum(share * tf.square(mean - merged), axis=0)
    return Moments(total, merged, within + between)


def _gather_packed(gather: Gather, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns each tensor stacked over the replicas, [R, ...], by a single collective."""
    packed = gather(tf.concat(tensors, axis=-1))
    return tf.split(packed, [t.shape[-1] for t in tensors], axis=-1)


# --- Fused kernels.


def _run_fused(
    run: Callable[..., tuple[tf.Tensor, Any]],
    x: tf.Tensor,
    axes: Sequence[int],
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
) -> tuple[tf.Tensor, Any]:
    """Calls run(x, axis, gamma, beta) with the channels on an axis that the kernels accept."""
    gamma, beta = _with_defaults(gamma, beta, x, axes)
    # The kernels for CPUs are fast with channels last only.
    is_accepted = len(axes) == 1 and (_are_last(axes, x.shape.rank) or _is_on_accelerator())
    if is_accepted:
        return run(x, axes[0], gamma, beta)
    moved = move_channels_last(x, axes)
    y, statistics = run(moved, moved.shape.rank - 1, _flatten(gamma), _flatten(beta))
    return move_channels_back(y, x, axes), statistics


class _Fused:
    """The transform in TensorFlow's fused kernels, called once per ghost batch.

    Gamma, beta and statistics are [C]. The channels are the last axis or, on an accelerator, any
    one axis.
    """

    def __init__(
        self, x: tf.Tensor, axis: int, epsilon: float, virtual_batch_size: int | None
    ) -> None:
        self._axis = axis
        self._epsilon = epsilon
        self._has_ghosts = virtual_batch_size is not None
        self._num_ghosts = _static_num_ghosts(x, virtual_batch_size)
        self._data_format = "NHWC" if axis == x.shape.rank - 1 else "NCHW"

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, _Backward]:
        ghosts = self._split(x)
        ys, moments, reserved = self._train(ghosts, gamma, beta)
        backward = functools.partial(self._backward, x, ghosts, gamma, reserved)
        return self._join(ys, x), moments, backward

    def forward_and_average(
        self, moving: MovingStatistics, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor], _Backward]:
        """Like forward, but returns the moving statistics after this batch."""
        (images,) = self._split(x)
        size, old = _size(images), moving
        if not moving.unbiased:
            # The kernel averages Bessel-corrected variances, m / (m - 1) times the biased ones. To
            # average biased ones, the moving variance is multiplied by the same factor meanwhile.
            factor = _bessel(size, self._num_channels(images))
            old = moving._replace(variance=moving.variance * factor)
        y, mean, variance, *reserved = self._run_training_kernel(images, size, gamma, beta, old)
        if not moving.unbiased:
            variance /= factor
        if not (isinstance(size, float) and size):
            # The kernel returns NaN for an empty batch.
            has_values = tf.cast(size, tf.bool)
            mean = tf.where(has_values, mean, moving.mean)
            variance = tf.where(has_values, variance, moving.variance)
        backward = functools.partial(self._backward, x, [images], gamma, [reserved])
        return self._join([y], x), (mean, variance), backward

    def _train(
        self, ghosts: Sequence[tf.Tensor], gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[Sequence[tf.Tensor], Moments, Sequence[Sequence[tf.Tensor]]]:
        """Returns y of each ghost batch, the moments, and each ghost batch's reserve spaces."""
        size = _size(ghosts[0])
        results = [self._run_training_kernel(g, size, gamma, beta) for g in ghosts]
        ys, means, variances, *reserved = zip(*results, strict=True)
        count = size / self._num_channels(ghosts[0])
        means, variances = zip(
            *(_remove_bessel(*t, count) for t in zip(means, variances, strict=True)), strict=True
        )
        if self._has_ghosts:
            count = tf.fill([self._num_ghosts, 1], count)
        moments = Moments(count, self._stack(means), self._stack(variances))
        return ys, moments, list(zip(*reserved, strict=True))

    def _backward(
        self,
        x: tf.Tensor,
        ghosts: Sequence[tf.Tensor],
        gamma: tf.Tensor,
        reserved: Sequence[Sequence[tf.Tensor]],
        dy: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        gradients = [
            self._run_gradient_kernel(dy, images, gamma, spaces, is_training=True)
            for dy, images, spaces in zip(self._split(dy), ghosts, reserved, strict=True)
        ]
        dxs, dgammas, dbetas = zip(*gradients, strict=True)
        return self._join(dxs, x), _add(dgammas), _add(dbetas)

    def _stack(self, ghosts: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.stack(ghosts) if self._has_ghosts else ghosts[0]

    def _split(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Returns the ghost batches as images: [N, H, W, C], or [N, C, H, W] on an accelerator."""
        images = self._as_images(x)
        return [images] if self._num_ghosts == 1 else tf.split(images, self._num_ghosts)

    def _join(self, ghosts: Sequence[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
        """Returns the ghost batches as one tensor in the shape of x."""
        images = ghosts[0] if len(ghosts) == 1 else tf.concat(ghosts, axis=0)
        return images if self._is_image(x) else tf.reshape(images, _reshape_dims(x))

    def _is_image(self, x: tf.Tensor) -> bool:
        return x.shape.rank == 4 and self._axis in (1, 3)

    def _as_images(self, x: tf.Tensor) -> tf.Tensor:
        if self._is_image(x):
            return x
        dims = _reshape_dims(x)
        before, channels, after = dims[: self._axis], dims[self._axis], dims[self._axis + 1 :]
        if self._data_format == "NCHW":
            return tf.reshape(x, [_product(before), channels, _product(after), 1])
        if len(before) == 1 and not self._has_ghosts:
            # cuDNN limits the size of the first axis.
            return tf.reshape(x, [1, before[0], 1, channels])
        return tf.reshape(x, [before[0], _product(before[1:]), 1, channels])

    def _run_training_kernel(
        self,
        images: tf.Tensor,
        size: Count,
        gamma: tf.Tensor,
        beta: tf.Tensor,
        moving: MovingStatistics | None = None,
    ) -> Sequence[tf.Tensor]:
        """Returns y, mean, variance and three reserve spaces.

        Mean and variance are those of the batch, the variance with Bessel's correction, or, with
        `moving`, the moving statistics after this batch.
        """
        if moving is not None and moving.momentum:
            old, factor = [moving.mean, moving.variance], 1 - moving.momentum
        else:
            # With exponential_avg_factor=1, the kernel requires empty moving statistics.
            old, factor = [tf.zeros([0])] * 2, 1.0
        parameters = [gamma, beta, *old]
        if _is_long(images, [images.shape.rank - 1]):
            # On CPUs the last reserve space is empty.
            return [*_train_exactly(images, parameters, self._epsilon, factor), tf.zeros([0])]
        outputs = tf.raw_ops.FusedBatchNormV3(
            x=images,
            scale=gamma,
            offset=beta,
            mean=old[0],
            variance=old[1],
            epsilon=self._epsilon,
            exponential_avg_factor=factor,
            data_format=self._data_format,
        )
        is_small = isinstance(size, float) and size <= _MAX_UNCHECKED_COUNT * images.shape[-1]
        if is_small or _is_on_accelerator():
            return outputs
        return _correct_if_lost(images, size, parameters, outputs, self._epsilon, factor)

    def _num_channels(self, images: tf.Tensor) -> int:
        return images.shape[1 if self._data_format == "NCHW" else 3]

    def _run_gradient_kernel(
        self,
        dy: tf.Tensor,
        images: tf.Tensor,
        gamma: tf.Tensor,
        reserved: Sequence[tf.Tensor],
        is_training: bool,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=dy,
            x=images,
            scale=gamma,
            reserve_space_1=reserved[0],
            reserve_space_2=reserved[1],
            reserve_space_3=reserved[2],
            epsilon=self._epsilon,
            data_format=self._data_format,
            is_training=is_training,
        )
        return dx, dgamma, dbeta


class _SynchronizedFused(_Fused):
    """The transform in fused kernels, with statistics shared by several replicas. On CPUs only."""

    def __init__(
        self,
        x: tf.Tensor,
        axis: int,
        epsilon: float,
        virtual_batch_size: int | None,
        gather: Gather,
    ) -> None:
        super().__init__(x, axis, epsilon, virtual_batch_size)
        self._gather = gather

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, _Backward]:
        ghosts = self._split(x)
        # The training kernel only provides this replica's moments; its y is discarded.
        _, local, _ = self._train(ghosts, gamma, beta)
        moments = _merge_moments(self._gather, local)
        ys = [
            _run_inference_kernel(images, mean, variance, gamma, beta, self._epsilon)
            for images, mean, variance in self._zip_ghosts(ghosts, *moments[1:])
        ]
        backward = functools.partial(self._synchronized_backward, x, ghosts, gamma, moments)
        return self._join(ys, x), moments, backward

    def _synchronized_backward(
        self,
        x: tf.Tensor,
        ghosts: Sequence[tf.Tensor],
        gamma: tf.Tensor,
        moments: Moments,
        dy: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # With is_training=False the kernel treats the statistics as constants. It returns
        # gamma / sigma * dy and both sums of this replica in one call.
        gradients = [
            self._run_gradient_kernel(dy, images, gamma, (mean, variance, []), is_training=False)
            for dy, images, mean, variance in self._zip_ghosts(
                self._split(dy), ghosts, *moments[1:]
            )
        ]
        direct, dgammas, dbetas = zip(*gradients, strict=True)
        stacked = [self._stack(t) for t in (dbetas, dgammas)]
        sums = [tf.reduce_sum(t, axis=0) for t in _gather_packed(self._gather, stacked)]
        dy_means = [_divide(t, moments.count) for t in sums]
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
        return self._join(dxs, x), _add(dgammas), _add(dbetas)

    def _zip_ghosts(self, *parts: tf.Tensor | Sequence[tf.Tensor]) -> Iterable[tuple]:
        """Zips over the ghost batches, which are the first axis of a statistic."""

        def unstack(part: tf.Tensor | Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
            if not isinstance(part, tf.Tensor):
                return part
            return tf.unstack(part, self._num_ghosts) if self._has_ghosts else [part]

        return zip(*map(unstack, parts), strict=True)


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
    # The mean of the deviations, which is no more than a rounding error, is left out.
    return tf.cast(y, images.dtype), mean + shift, variance, shift, biased


def _train_exactly(
    images: tf.Tensor, parameters: Sequence[tf.Tensor], epsilon: float, factor: float
) -> tuple[tf.Tensor, ...]:
    """Returns the first five outputs of the training kernel, from sums that lose nothing."""
    gamma, beta, old_mean, old_variance = parameters
    x = tf.cast(images, tf.float32)
    sum_exactly = _Unfused(x, [3], epsilon).sum_exactly
    count = _size(x) / x.shape[3]
    exact_mean = _divide(sum_exactly(x), count)
    mean = tf.cast(exact_mean, tf.float32)
    # Float32 suffices: the difference is rounded only once. The rest of the mean counts where it is
    # large, since float32 has few values there.
    deviation, rest = x - mean, exact_mean - tf.cast(mean, tf.float64)
    squares = _divide(sum_exactly(tf.square(deviation)), count)
    variance = tf.cast(tf.nn.relu(squares - tf.square(rest)), tf.float32)
    rest = tf.cast(rest, tf.float32)
    y = _run_inference_kernel(deviation, rest, variance, gamma, beta, epsilon)
    y = tf.cast(y, images.dtype)
    unbiased = variance * _bessel(count)
    if factor == 1:
        return y, mean, unbiased, mean, variance
    averages = (
        old * (1 - factor) + new * factor
        for old, new in ((old_mean, mean), (old_variance, unbiased))
    )
    return y, *averages, mean, variance


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


def _move_gradients(
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


# --- Arithmetic with counts.


def _size(x: tf.Tensor) -> Count:
    """Returns the number of elements."""
    if x.shape.is_fully_defined():
        return float(x.shape.num_elements())
    return tf.cast(tf.size(x, tf.int64), tf.float32)


def _part_size(num_values: int) -> int:
    """Returns the number of values in each of the equal parts that XLA averages; 1 means none."""
    # The division by a power of two adds no rounding error.
    size = min(num_values & -num_values, _MAX_POWER_OF_TWO)
    if size >= _MIN_PART:
        return size
    sizes = range(_MAX_PART, _MIN_PART - 1, -1)
    return next((size for size in sizes if num_values % size == 0), 1)


def _divide(t: tf.Tensor, count: Count) -> tf.Tensor:
    """Divides by a count. An empty sum divided by 0 is 0."""
    if isinstance(count, float):
        return t / max(count, 1.0)
    return tf.math.divide_no_nan(t, tf.cast(count, t.dtype))


def unbias(variance: tf.Tensor, count: Count) -> tf.Tensor:
    """Applies Bessel's correction. The variance of a single value stays 0."""
    if isinstance(count, float):
        return variance * _bessel(count)
    return tf.math.divide_no_nan(variance * count, count - 1)


def _bessel(count: Count, unit: float = 1.0) -> Count:
    """Returns Bessel's correction as the kernels compute it, with m - 1 at least 1.

    Args:
      count: number m of values, times `unit`.
      unit: number that each value counts as.
    """
    if isinstance(count, float):
        return count / max(count - unit, unit)
    unit = tf.constant(unit, count.dtype)
    return count / tf.maximum(count - unit, unit)


def _remove_bessel(mean: tf.Tensor, variance: tf.Tensor, count: Count) -> tuple[tf.Tensor, ...]:
    """Undoes Bessel's correction, and the NaN that the kernel returns for an empty batch."""
    if isinstance(count, float):
        if not count:
            return tf.zeros_like(mean), tf.zeros_like(variance)
        return mean, variance / _bessel(count)
    inverse = tf.math.divide_no_nan(tf.maximum(count - 1, 1), count)
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1))
    return mean, tf.math.multiply_no_nan(variance, inverse)


# --- Shapes. A dimension is an int where it is static, else a scalar tensor.


def _with_default_axes(axes: Sequence[int] | None, x: tf.Tensor) -> Sequence[int]:
    return [x.shape.rank - 1] if axes is None else axes


def _are_last(axes: Sequence[int], rank: int) -> bool:
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


def _reshape_dims(x: tf.Tensor) -> list[int | tf.Tensor]:
    """Returns the dimensions for a reshape, which adds least to a graph with -1 for an unknown."""
    if list(x.shape).count(None) > 1:
        return _dims(x)
    return [-1 if d is None else d for d in x.shape]


def _product(dims: Sequence[int | tf.Tensor]) -> int | tf.Tensor:
    """Returns the product, or -1 if a dimension is -1."""
    static = [d for d in dims if isinstance(d, int)]
    product = -1 if -1 in static else math.prod(static)
    for d in dims:
        if not isinstance(d, int):
            product = product * d
    return product


def _restore(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns y with the shape and dtype of x."""
    y = tf.cast(y, x.dtype)
    return y if y.shape.rank == x.shape.rank else tf.reshape(y, _reshape_dims(x))


def _flatten(parameter: tf.Tensor) -> tf.Tensor:
    return parameter if parameter.shape.rank == 1 else tf.reshape(parameter, [-1])


def _add(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tensors[0] if len(tensors) == 1 else tf.add_n(tensors)


def _static_num_ghosts(x: tf.Tensor, virtual_batch_size: int | None) -> int:
    """Returns the number of ghost batches, or 0 if it is unknown."""
    if virtual_batch_size is None:
        return 1
    return (x.shape[0] or 0) // virtual_batch_size


def _to_statistics_dtype(parameter: tf.Tensor | None, x: tf.Tensor) -> tf.Tensor | None:
    if parameter is None:
        return None
    # tf.cast returns a variable unchanged if it already has the dtype.
    return tf.convert_to_tensor(tf.cast(parameter, statistics_dtype(x.dtype)))


def _with_defaults(
    gamma: tf.Tensor | None, beta: tf.Tensor | None, x: tf.Tensor, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    shape = [x.shape[a] for a in axes]
    dtype = statistics_dtype(x.dtype)
    return (
        tf.ones(shape, dtype) if gamma is None else gamma,
        tf.zeros(shape, dtype) if beta is None else beta,
    )
