"""Where the work runs: the only file that names a strategy class or sets up devices."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from bn_keras.distribute.cluster import Cluster
from bn_keras.errors import UsageError, WorkerLostError

STRATEGIES = ("one_device", "mirrored", "multi_worker", "tpu")


def make_strategy(strategy: str, replicas: int = 0) -> tf.distribute.Strategy:
    """Makes the strategy that a run is distributed by.

    Called before TensorFlow has touched a device, it can split the CPU into several replicas.

    Args:
      strategy: "one_device": the first accelerator, or the CPU; "mirrored": the same on several;
        "multi_worker": all accelerators, or the CPU, of each process that TF_CONFIG names; "tpu":
        all cores of the TPU that this machine is the one host of.
      replicas: how many devices "mirrored" takes; 0 is every accelerator there is, or one CPU
        replica where there is none.

    Raises:
      UsageError: an unknown name, more accelerators than there are, a TPU that is not there, a CPU
        that can no longer be split, or workers that don't meet.
    """
    if strategy not in STRATEGIES:
        raise UsageError(
            f"unknown distribution.strategy {strategy!r}: accepted are {', '.join(STRATEGIES)}"
        )
    _leave_device_iterators_untuned()
    if strategy == "one_device":
        if replicas > 1:
            raise UsageError(
                f"distribution.replicas is {replicas}, but strategy one_device has one:"
                " set distribution.strategy=mirrored"
            )
        # TensorFlow's default strategy runs on the first accelerator, or else on the CPU.
        return tf.distribute.get_strategy()
    if strategy in ("multi_worker", "tpu"):
        if replicas:
            raise UsageError(
                f"distribution.replicas is {replicas}, but strategy {strategy} takes all devices:"
                " set it to 0"
            )
        return _on_tpu() if strategy == "tpu" else _on_workers()
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


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Tells whether this process is the one that writes: of several workers, the first."""
    return strategy.extended.should_checkpoint


def from_all_workers(strategy: tf.distribute.Strategy, number: float) -> list[float]:
    """Gives the numbers of all workers' processes in their order, once each has come by here.

    All of them have to make the same calls in the same order. Without other workers, it is the
    number given.

    Args:
      strategy: of `make_strategy`.
      number: of this process; whole ones up to 2**53 come out as they are.
    """
    if not _has_workers(strategy):
        return [number]
    cluster = Cluster.from_environment()
    if len(cluster.addresses) == 1:
        return [number]
    # Each fills a place of its own and leaves the others 0; the sum is then exact.
    numbers = np.zeros(len(cluster.addresses))
    numbers[cluster.index] = number
    total = strategy.reduce(tf.distribute.ReduceOp.SUM, tf.constant(numbers), axis=None)
    return total.numpy().tolist()


@contextlib.contextmanager
def naming_lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Where workers wait for each other: one that is gone is told on one line.

    TensorFlow finds out at once where a process has ended, and after ten seconds where it doesn't
    answer.

    Raises:
      WorkerLostError: in the place of TensorFlow's error.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not (_has_workers(strategy) and "Collective ops is aborted" in str(error)):
            raise
        own = (strategy.cluster_resolver.task_type, str(strategy.cluster_resolver.task_id))
        tasks = set(re.findall(r"/job:(\w+)(?:/replica:0)?/task:(\d+)", str(error))) - {own}
        lost = " ".join(tasks.pop()) if len(tasks) == 1 else "another worker"
        raise WorkerLostError(
            f"{lost} of TF_CONFIG has ended or does not answer: see what it says there, and start"
            " all workers again"
        ) from None


def _has_workers(strategy: tf.distribute.Strategy) -> bool:
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


# A process can be made a worker once.
@functools.cache
def _on_workers() -> tf.distribute.Strategy:
    cluster = Cluster.from_environment()
    cluster.meet()
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, ValueError):
        raise UsageError(
            "distribution.strategy is multi_worker, but TensorFlow has already started: make the"
            " strategy before anything else runs on a device"
        ) from None
    except tf.errors.OpError as error:
        # Such as that the other one is still there from before, and won't have this one back.
        raise WorkerLostError(
            f"the workers of TF_CONFIG don't come together ({error.message.splitlines()[0]}): end"
            " all of them, and start them again"
        ) from None


def _on_tpu() -> tf.distribute.Strategy:
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


@functools.cache
def _leave_device_iterators_untuned() -> None:
    """Makes what feeds each of several replicas from the one input end when it is told to.

    It has nothing to tune, but TensorFlow gives it the thread of tf.data's autotuning, which looks
    up at times that double to a minute. To be woken at the end, it has to see the cancellation
    that wakes it, which is marked only afterwards: about every second time it sleeps on, and the
    end of a training with it. No public option gets there.
    """
    create = multi_device_iterator_ops._create_device_dataset
    options = tf.data.Options()
    options.autotune.enabled = False

    def create_untuned(*arguments: object) -> tf.data.Dataset:
        return create(*arguments).with_options(options)

    multi_device_iterator_ops._create_device_dataset = create_untuned


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
