"""The batch-normalizing transform as functions of tensors, forward and backward.

This package knows no layer and no strategy: a callable, `gather`, exchanges tensors between
replicas.

Two implementations compute the same numbers. `fused` calls TensorFlow's fused kernels, which read
and write the activations as few times as possible. `unfused` consists of ordinary operations: it
accepts every dtype, axis and mask, and because it is differentiable it also provides the
second-order gradients. Small inputs use it too, because calling a kernel would cost them more than
it saves, and so does XLA, which fuses ordinary operations itself. XLA's version of the fused
kernels computes the variance as E[x^2] - E[x]^2, which cancels at large means.
"""

from bn_keras.ops.moments import Count, Gather, Moments, MovingStatistics, statistics_dtype, unbias
from bn_keras.ops.shapes import move_channels_back, move_channels_last
from bn_keras.ops.transform import (
    batch_normalize,
    batch_normalize_and_average,
    normalize,
    uses_averaging_kernel,
)

__all__ = [
    "Count",
    "Gather",
    "Moments",
    "MovingStatistics",
    "batch_normalize",
    "batch_normalize_and_average",
    "move_channels_back",
    "move_channels_last",
    "normalize",
    "statistics_dtype",
    "unbias",
    "uses_averaging_kernel",
]
