"""The devices of this machine, with their memory."""

import ctypes
import os
from typing import NamedTuple

import tensorflow as tf

from bn_keras.cgroups import memory_limits
from bn_keras.cores import num_usable_cores
from bn_keras.distribute.detection import require_cluster
from bn_keras.text import counted

_GIB = 2**30


class Device(NamedTuple):
    """A device that TensorFlow can use.

    Attributes:
      name: such as "GPU:0".
      model: such as "NVIDIA H100 80GB HBM3"; "" if unknown.
      memory: bytes; None if unknown.
    """

    name: str
    model: str
    memory: int | None


def list_gpus() -> list[Device]:
    """Returns the GPUs that TensorFlow sees, as it numbers them; does not initialize them."""
    gpus = tf.config.list_physical_devices("GPU")
    memories = _cuda_memories(len(gpus))
    return [
        Device(f"GPU:{i}", _model(gpu), memories[gpus.index(gpu)])
        for i, gpu in enumerate(tf.config.get_visible_devices("GPU"))
    ]


def cpu() -> Device:
    """Returns the CPU, with the cores and the memory that this process may use."""
    return Device("CPU", counted(num_usable_cores(), "core"), _cpu_memory())


def describe_devices(strategy: str, replicas: int) -> str:
    """Describes the devices that `make_strategy` would use; does not initialize them.

    Args:
      strategy, replicas: see `make_strategy`.

    Raises:
      UsageError: strategy is multi_worker, and the cluster is invalid.
    """
    if strategy == "tpu":
        return "all cores of this machine's TPU"
    gpus = list_gpus()
    if strategy == "multi_worker":
        return f"{require_cluster()}, on {_describe(gpus, 1)}"
    count = 1 if strategy == "one_device" else replicas
    return _describe(gpus[: count or None], count or 1)


def _describe(gpus: list[Device], cpu_replicas: int) -> str:
    if gpus:
        return "; ".join(map(_format, gpus))
    return f"{counted(cpu_replicas, 'CPU replica')}: {_format(cpu())}"


def _format(device: Device) -> str:
    memory = f"{device.memory / _GIB:.1f} GiB" if device.memory else "memory unknown"
    return f"{device.name} ({', '.join(filter(None, (device.model, memory)))})"


def _model(gpu: tf.config.PhysicalDevice) -> str:
    return tf.config.experimental.get_device_details(gpu).get("device_name", "")


def _cuda_memories(count: int) -> list[int | None]:
    """Returns the memory of the first CUDA devices in bytes, None where it is unknown.

    TensorFlow reports only the memory that it has allocated. The driver respects
    CUDA_VISIBLE_DEVICES as TensorFlow does.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1") if count else None
    except OSError:  # the GPUs are not NVIDIA's
        driver = None
    if driver is None or driver.cuInit(0):
        return [None] * count
    return [_cuda_memory(driver, i) for i in range(count)]


def _cuda_memory(driver: ctypes.CDLL, ordinal: int) -> int | None:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    failed = driver.cuDeviceGet(ctypes.byref(device), ordinal) or driver.cuDeviceTotalMem_v2(
        ctypes.byref(memory), device
    )
    return None if failed else memory.value


def _cpu_memory() -> int | None:
    """Returns the machine's memory in bytes, or the limit of this process's container if lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None
    return min([total, *memory_limits()])
