"""Where the work runs: the only file that names a strategy class or sets up devices."""

import os

import tensorflow as tf

from bn_keras.errors import UsageError

STRATEGIES = ("one_device", "mirrored", "tpu")


def make_strategy(strategy: str, replicas: int = 0) -> tf.distribute.Strategy:
    """Makes the strategy that a run is distributed by.

    Called before TensorFlow has touched a device, it can split the CPU into several replicas.

    Args:
      strategy: "one_device": the first accelerator, or the CPU; "mirrored": the same on several;
        "tpu": all cores of the TPU that this machine is the one host of.
      replicas: how many devices "mirrored" takes; 0 is every accelerator there is, or one CPU
        replica where there is none.

    Raises:
      UsageError: an unknown name, more accelerators than there are, a TPU that is not there, or a
        CPU that can no longer be split.
    """
    if strategy not in STRATEGIES:
        raise UsageError(
            f"unknown distribution.strategy {strategy!r}: accepted are {', '.join(STRATEGIES)}"
        )
    if strategy == "one_device":
        if replicas > 1:
            raise UsageError(
                f"distribution.replicas is {replicas}, but strategy one_device has one:"
                " set distribution.strategy=mirrored"
            )
        # TensorFlow's default strategy runs on the first accelerator, or else on the CPU.
        return tf.distribute.get_strategy()
    if strategy == "tpu":
        return _on_tpu(replicas)
    if replicas < 0:
        raise UsageError(f"distribution.replicas is {replicas}: it has to be 0 or more")
    accelerators = tf.config.list_physical_devices("GPU")
    if not accelerators:
        return _mirrored_on_cpu(replicas or 1)
    if replicas > len(accelerators):
        raise UsageError(
            f"distribution.replicas is {replicas}, but there are {len(accelerators)} accelerators:"
            " set it to 0 to take them all"
        )
    count = replicas or len(accelerators)
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(count)])


def _on_tpu(replicas: int) -> tf.distribute.Strategy:
    if replicas:
        raise UsageError(
            f"distribution.replicas is {replicas}, but strategy tpu takes all cores: set it to 0"
        )
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
    try:
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except tf.errors.OpError:
        raise UsageError(
            "distribution.strategy is tpu, but this machine has no TPU, or not the TensorFlow of"
            " bn_keras[tpu]: set distribution.strategy=mirrored"
        ) from None
    return tf.distribute.TPUStrategy(resolver)


def _mirrored_on_cpu(count: int) -> tf.distribute.Strategy:
    _split_cpu(count)
    # The default for CPUs is a collective, whose keys clash between the strategies of one
    # process; summing on one device is as fast there.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(count)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _split_cpu(count: int) -> None:
    """Makes at least `count` logical devices out of the CPU."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(cpu)
    if len(configured or [None]) >= count:
        return
    try:
        # Each replica's kernels get their share of the cores; all of them contending for all
        # cores takes half as long again for a small network.
        cores = _usable_cores()
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cores // count))
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        raise UsageError(
            f"distribution.replicas is {count}, but TensorFlow has already started with"
            f" {len(configured or [None])} CPU device(s): make the strategy before anything else"
            " runs on a device"
        ) from None
