"""The transform in TensorFlow's fused kernels: ghost batches, and statistics of replicas."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from bn_keras.ops import choice
from bn_keras.ops.kernels import run_gradient_kernel, run_inference_kernel, run_training_kernel
from bn_keras.ops.moments import (
    Count,
    Gather,
    Moments,
    MovingStatistics,
    bessel_correction,
    count_elements,
    divide,
    gather_packed,
    merge_moments,
    remove_bessel_correction,
    statistics_dtype,
)
from bn_keras.ops.shapes import (
    are_last,
    flatten_parameter,
    get_num_ghosts,
    get_reshape_dims,
    move_channels_back,
    move_channels_last,
    multiply_dims,
)
from bn_keras.ops.unfused import Backward


def run_fused(
    run: Callable[..., tuple[tf.Tensor, Any]],
    x: tf.Tensor,
    axes: Sequence[int],
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
) -> tuple[tf.Tensor, Any]:
    """Calls run(x, axis, gamma, beta) with the channels on an axis that the kernels accept."""
    gamma, beta = fill_parameters(gamma, beta, x, axes)
    # The kernels for CPUs are fast with channels last only.
    is_accepted = len(axes) == 1 and (are_last(axes, x.shape.rank) or choice.is_on_accelerator())
    if is_accepted:
        return run(x, axes[0], gamma, beta)
    moved = move_channels_last(x, axes)
    y, statistics = run(
        moved, moved.shape.rank - 1, flatten_parameter(gamma), flatten_parameter(beta)
    )
    return move_channels_back(y, x, axes), statistics


def fill_parameters(
    gamma: tf.Tensor | None, beta: tf.Tensor | None, x: tf.Tensor, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns gamma and beta; those that are None become ones and zeros."""
    shape = [x.shape[a] for a in axes]
    dtype = statistics_dtype(x.dtype)
    return (
        tf.ones(shape, dtype) if gamma is None else gamma,
        tf.zeros(shape, dtype) if beta is None else beta,
    )


class Fused:
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
        self._num_ghosts = get_num_ghosts(x, virtual_batch_size)
        self._data_format = "NHWC" if axis == x.shape.rank - 1 else "NCHW"

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Backward]:
        """Returns y in the shape of x, the moments, and the function of the gradients."""
        ghosts = self._split(x)
        ys, moments, reserved = self._train(ghosts, gamma, beta)
        backward = functools.partial(self._backward, x, ghosts, gamma, reserved)
        return self._join(ys, x), moments, backward

    def forward_and_average(
        self, moving: MovingStatistics, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor], Backward]:
        """Like forward, but returns the moving statistics after this batch."""
        (images,) = self._split(x)
        size, old = count_elements(images), moving
        if not moving.unbiased:
            # The kernel averages Bessel-corrected variances, m / (m - 1) times the biased ones. To
            # average biased ones, the moving variance is multiplied by the same factor meanwhile.
            factor = bessel_correction(size / self._num_channels(images))
            old = moving._replace(variance=moving.variance * factor)
        y, mean, variance, *reserved = self._run(images, size, gamma, beta, old)
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
        size = count_elements(ghosts[0])
        results = [self._run(g, size, gamma, beta) for g in ghosts]
        ys, means, variances, *reserved = zip(*results, strict=True)
        count = size / self._num_channels(ghosts[0])
        means, variances = zip(
            *(remove_bessel_correction(*t, count) for t in zip(means, variances, strict=True)),
            strict=True,
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
            run_gradient_kernel(dy, images, gamma, spaces, self._epsilon, self._data_format)
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
        return images if self._is_image(x) else tf.reshape(images, get_reshape_dims(x))

    def _is_image(self, x: tf.Tensor) -> bool:
        return x.shape.rank == 4 and self._axis in (1, 3)

    def _as_images(self, x: tf.Tensor) -> tf.Tensor:
        if self._is_image(x):
            return x
        dims = get_reshape_dims(x)
        before, channels, after = dims[: self._axis], dims[self._axis], dims[self._axis + 1 :]
        if self._data_format == "NCHW":
            return tf.reshape(x, [multiply_dims(before), channels, multiply_dims(after), 1])
        if len(before) == 1 and not self._has_ghosts:
            # cuDNN limits the size of the first axis.
            return tf.reshape(x, [1, before[0], 1, channels])
        return tf.reshape(x, [before[0], multiply_dims(before[1:]), 1, channels])

    def _run(
        self,
        images: tf.Tensor,
        size: Count,
        gamma: tf.Tensor,
        beta: tf.Tensor,
        moving: MovingStatistics | None = None,
    ) -> Sequence[tf.Tensor]:
        return run_training_kernel(
            images, size, gamma, beta, self._epsilon, self._data_format, moving
        )

    def _num_channels(self, images: tf.Tensor) -> int:
        return images.shape[1 if self._data_format == "NCHW" else 3]


class SynchronizedFused(Fused):
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
    ) -> tuple[tf.Tensor, Moments, Backward]:
        """Returns y in the shape of x, the moments, and the function of the gradients."""
        ghosts = self._split(x)
        # The training kernel only provides this replica's moments; its y is discarded.
        _, local, _ = self._train(ghosts, gamma, beta)
        moments = merge_moments(self._gather, local)
        ys = [
            run_inference_kernel(images, mean, variance, gamma, beta, self._epsilon)
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
            run_gradient_kernel(
                dy, images, gamma, (mean, variance, []), self._epsilon, is_training=False
            )
            for dy, images, mean, variance in self._zip_ghosts(
                self._split(dy), ghosts, *moments[1:]
            )
        ]
        direct, dgammas, dbetas = zip(*gradients, strict=True)
        stacked = [self._stack(t) for t in (dbetas, dgammas)]
        sums = [tf.reduce_sum(t, axis=0) for t in gather_packed(self._gather, stacked)]
        dy_means = [divide(t, moments.count) for t in sums]
        scales = -gamma * tf.math.rsqrt(moments.variance + self._epsilon)
        # The gradient through the moments, scale * (mean_dy + x_hat * mean_dy_x_hat), is affine in
        # x_hat, so the inference kernel computes it.
        dxs = [
            dx
            + run_inference_kernel(
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


def _add(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tensors[0] if len(tensors) == 1 else tf.add_n(tensors)
