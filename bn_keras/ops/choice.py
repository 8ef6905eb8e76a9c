"""Chooses the implementation of the transform by size, dtype, device and compiler."""

import math
import os
from collections.abc import Sequence

import tensorflow as tf
from tensorflow.python.distribute import device_util
from tensorflow.python.eager import context, forwardprop_util
from tensorflow.python.ops import control_flow_util

# Dtypes that the fused kernels accept. They compute in float32 for all three.
_FUSED_DTYPES = (tf.float16, tf.bfloat16, tf.float32)

# Smallest numbers of elements and channels for which the kernels are faster on a CPU than ordinary
# operations.
MIN_SIZE_TO_FUSE_TRAINING = 2**17
MIN_SIZE_TO_FUSE_INFERENCE = 2**18
MIN_CHANNELS_TO_FUSE = 4

# Batch sizes assumed where they are unknown while a graph is built.
_TRAINING_BATCH_SIZE = 32
_INFERENCE_BATCH_SIZE = 1

# Largest number of values per channel that are summed in float32 on a CPU. TensorFlow and its
# kernels add them one by one, so that squares are lost next to their sum: with this many the
# variance is up to 0.05% too small, with 16 times as many up to 3%.
_MAX_FLOAT32_COUNT = 2**20
# Size assumed for axes other than the batch axis where it is unknown.
_AXIS_SIZE = 256


def should_fuse_training(
    x: tf.Tensor, axes: Sequence[int], num_ghosts: int = 1, is_synchronized: bool = False
) -> bool:
    """Returns whether kernels normalize by the statistics of the batch."""
    if x.dtype not in _FUSED_DTYPES or is_compiled_by_xla():
        return False
    # Each ghost batch takes a call of its own, so that the graph grows with their number.
    ghost_size = _num_values(x, _TRAINING_BATCH_SIZE) / num_ghosts
    if num_ghosts > 1 and ghost_size < MIN_SIZE_TO_FUSE_TRAINING / 2:
        return False
    if is_on_accelerator():
        # The synchronized gradient needs the kernel's gradient of inference, which on GPUs adds in
        # no fixed order and is refused by tf.config.experimental.enable_op_determinism.
        return not is_synchronized
    return _is_large(x, axes, _TRAINING_BATCH_SIZE, MIN_SIZE_TO_FUSE_TRAINING)


def should_fuse_inference(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Returns whether the kernel normalizes by given statistics."""
    # Only images with channels last, the layout in which converters recognize the kernel.
    if x.dtype not in _FUSED_DTYPES or x.shape.rank != 4 or list(axes) != [3]:
        return False
    if not _is_large(x, axes, _INFERENCE_BATCH_SIZE, MIN_SIZE_TO_FUSE_INFERENCE):
        return False
    # On GPUs the kernel's gradient has no fixed order (see should_fuse_training), and cuDNN limits
    # the batch size.
    return not (is_compiled_by_xla() or is_on_accelerator())


def _is_large(x: tf.Tensor, axes: Sequence[int], batch_size: int, min_size: int) -> bool:
    # All cores of the machine, even if the process may use only some of them: this choice affects
    # rounding, and a network trained in parallel with others must equal one trained alone.
    threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
    if threads == 1:
        # Waking other threads, most of the cost of a small call, is not needed.
        min_size //= 16
    channels = math.prod(x.shape[a] for a in axes)
    return _num_values(x, batch_size) >= min_size and channels >= MIN_CHANNELS_TO_FUSE


def is_long(x: tf.Tensor, axes: Sequence[int], virtual_batch_size: int | None = None) -> bool:
    """Returns whether a channel may have too many values for float32 sums on a CPU."""
    sizes = dict(enumerate(x.shape))
    sizes[0] = virtual_batch_size or sizes[0] or _TRAINING_BATCH_SIZE
    count = math.prod(_AXIS_SIZE if d is None else d for a, d in sizes.items() if a not in axes)
    return count > _MAX_FLOAT32_COUNT and not is_on_accelerator()


def _num_values(x: tf.Tensor, batch_size: int) -> int:
    """Returns the number of values of x; batch_size replaces sizes that are not static."""
    return math.prod(batch_size if d is None else d for d in x.shape)


def has_tangents(*tensors: tf.Tensor | None) -> bool:
    """Returns whether a tf.autodiff.ForwardAccumulator follows any of the tensors."""
    given = [t for t in tensors if t is not None]
    return bool(forwardprop_util.pack_tangents(given).tangents)


def is_compiled_by_xla() -> bool:
    """Returns whether XLA compiles the graph being traced, for a jitted function or for a TPU."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def is_on_accelerator() -> bool:
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
