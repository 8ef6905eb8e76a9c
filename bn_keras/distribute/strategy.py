"""Distribution strategies: the only module that names a strategy class or configures devices."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.python.data.ops import multi_device_iterator_ops

from bn_keras.cores import num_usable_cores
from bn_keras.distribute.cluster import Cluster
from bn_keras.distribute.detection import check_alone, find_cluster, require_cluster
from bn_keras.distribute.gil import releasing_gil
from bn_keras.distribute.waiting import waiting_for
from bn_keras.errors import UsageError, WorkerLostError
from bn_keras.text import counted, first_line

STRATEGIES = ("one_device", "mirrored", "multi_worker", "tpu")


def check_strategy(strategy: str, replicas: int) -> None:
    """Raises UsageError for arguments that `make_strategy` accepts on no machine."""
    if strategy not in STRATEGIES:
        raise UsageError(
            f"unknown distribution.strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}"
        )
    invalid = f"distribution.replicas={replicas} is invalid"
    if replicas < 0:
        raise UsageError(f"{invalid}: expected a non-negative integer")
    if strategy == "one_device" and replicas > 1:
        raise UsageError(
            f"{invalid}: strategy one_device has one replica; set distribution.strategy=mirrored"
        )
    if strategy in ("multi_worker", "tpu") and replicas:
        raise UsageError(f"{invalid}: strategy {strategy} uses all devices; set it to 0")


def without_other_workers(strategy: str) -> str:
    """Returns "mirrored" for "multi_worker" if no workers are configured, else the strategy itself.

    For work that one process can do with the same result, such as evaluating the run of several.

    Raises:
      UsageError: the variables that describe the workers are invalid.
    """
    return "mirrored" if strategy == "multi_worker" and find_cluster() is None else strategy


def make_strategy(strategy: str, replicas: int = 0) -> tf.distribute.Strategy:
    """Builds the strategy that distributes a run.

    The CPU can be split into several replicas only before TensorFlow uses a device. Until then,
    GPUs that the strategy does not use are hidden from TensorFlow, which would take their memory;
    they remain hidden for the rest of the process.

    Args:
      strategy: one of STRATEGIES.
        "one_device": the first accelerator, or the CPU.
        "mirrored": several accelerators of this machine, or several CPU replicas.
        "multi_worker": all accelerators, or the CPU, of each process of the cluster that the
          environment describes; see `detection`.
        "tpu": all cores of a TPU with this machine as its only host.
      replicas: number of devices for "mirrored"; 0 uses all accelerators, or one CPU replica on a
        machine without accelerators. The other strategies accept 0 only ("one_device" also 1).

    Raises:
      UsageError: an unknown name, more replicas than visible accelerators, no TPU, a CPU that can
        no longer be split, no cluster or an invalid one, or a strategy other than "multi_worker" in
        one of several processes that were started together.
      WorkerLostError: another worker did not start in time, or the workers could not connect.
    """
    check_strategy(strategy, replicas)
    if strategy != "multi_worker":
        check_alone(strategy)
    _disable_device_iterator_autotuning()
    if strategy == "one_device":
        _hide_gpus_after(1)
        # TensorFlow's default strategy uses the first accelerator or the CPU.
        return tf.distribute.get_strategy()
    if strategy == "mirrored":
        return _mirrored(replicas)
    return _tpu() if strategy == "tpu" else _multi_worker()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process writes the files of a run; of several workers, one does."""
    return strategy.extended.should_checkpoint


def gather_from_workers(strategy: tf.distribute.Strategy, number: float) -> list[float]:
    """Gathers a number from each worker, in the order of the cluster.

    It waits until each worker has called it. All workers must make the same calls in the same
    order. Without other workers, the result is the given number alone.

    Args:
      strategy: result of `make_strategy`.
      number: this worker's number; integers up to 2**53 are exact.
    """
    cluster = _cluster_of(strategy)
    if cluster is None or not cluster.others:
        return [number]
    # Each worker fills its own place and leaves the others 0: the sum is exact.
    numbers = np.zeros(len(cluster.addresses))
    numbers[cluster.index] = number
    with waiting_for(cluster.describe_others):
        total = strategy.reduce(tf.distribute.ReduceOp.SUM, tf.constant(numbers), axis=None)
        return total.numpy().tolist()


@contextlib.contextmanager
def reporting_lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns TensorFlow's error about a lost worker into WorkerLostError.

    TensorFlow detects the end of a process immediately, and a process that does not answer after
    ten seconds.

    Raises:
      WorkerLostError: another worker has ended or does not answer.
    """
    try:
        yield
    except tf.errors.OpError as error:
        cluster = _cluster_of(strategy)
        if cluster is None or "Collective ops is aborted" not in str(error):
            raise
        tasks = set(map(int, re.findall(r"/job:worker(?:/replica:0)?/task:(\d+)", str(error))))
        lost = [cluster.name(index) for index in tasks if index in cluster.others]
        raise WorkerLostError(
            f"{lost[0] if len(lost) == 1 else 'another worker'} has ended or does not answer: read"
            " its output, and restart all workers"
        ) from None


def _cluster_of(strategy: tf.distribute.Strategy) -> Cluster | None:
    """Returns the cluster of a strategy that `make_strategy` made; None without workers."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    resolver = strategy.cluster_resolver
    addresses = resolver.cluster_spec().job_tasks("worker")
    return Cluster(tuple(addresses), resolver.task_id)


def _mirrored(replicas: int) -> tf.distribute.Strategy:
    num_present = len(tf.config.list_physical_devices("GPU"))
    num_visible = len(tf.config.get_visible_devices("GPU"))
    if not num_visible:
        return _mirrored_on_cpu(replicas or 1)
    visible = f"{num_visible} of {counted(num_present, 'accelerator')}"
    if num_visible < replicas <= num_present:
        raise UsageError(
            f"distribution.replicas={replicas} is invalid: TensorFlow sees {visible}, because the"
            " others were hidden earlier in this process; start a new process"
        )
    if replicas > num_present:
        raise UsageError(
            f"distribution.replicas={replicas} is invalid: this machine has"
            f" {counted(num_present, 'accelerator')}; set it to 0 to use them all"
        )
    if not replicas and num_visible < num_present:
        logging.warning("mirrored uses %s: the others were hidden earlier in this process", visible)
    count = replicas or num_visible
    _hide_gpus_after(count)
    return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(count)])


def _hide_gpus_after(count: int) -> None:
    """Hides GPUs from TensorFlow, which takes the memory of all that it sees when it starts."""
    visible = tf.config.get_visible_devices("GPU")
    # It has already started: the memory is taken.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices(visible[:count], "GPU")


def _mirrored_on_cpu(count: int) -> tf.distribute.Strategy:
    _split_cpu(count)
    # The default on CPUs is a collective, whose keys clash between the strategies of one process.
    # Summing on one device is as fast.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(count)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def _split_cpu(count: int) -> None:
    """Splits the CPU into at least `count` logical devices."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(cpu)
    existing = len(configured) if configured else 1
    if existing >= count:
        return
    try:
        # Each replica gets its share of the cores. A small network takes 1.5 times as long if all
        # replicas compete for all cores.
        threads = max(1, num_usable_cores() // count)
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        raise UsageError(
            f"distribution.replicas={count} cannot be applied: TensorFlow has already started with"
            f" {counted(existing, 'CPU device')}; make the strategy before anything else runs on a"
            " device"
        ) from None


# Cached: a process can become a worker only once.
@functools.cache
def _multi_worker() -> tf.distribute.Strategy:
    cluster = require_cluster()
    cluster.bypass_proxies()
    cluster.meet()
    # The chief is the first worker, whatever TF_CONFIG calls it.
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        rpc_layer="grpc",
    )
    try:
        with waiting_for(cluster.describe_others), releasing_gil():
            return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            "distribution.strategy is multi_worker, but TensorFlow has already started"
            f" ({first_line(error)}): make the strategy before anything else runs on a device"
        ) from error
    except tf.errors.OpError as error:
        # For example, a worker still runs from an earlier start and rejects this process.
        raise WorkerLostError(
            f"the workers of {cluster.source} cannot connect ({first_line(error)}): stop and"
            " restart all of them"
        ) from None


def _tpu() -> tf.distribute.Strategy:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
    try:
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except tf.errors.OpError:
        raise UsageError(
            "distribution.strategy is tpu, but this machine has no TPU, or TensorFlow was installed"
            " without bn_keras[tpu]: set distribution.strategy=mirrored"
        ) from None
    return tf.distribute.TPUStrategy(resolver)


@functools.cache
def _disable_device_iterator_autotuning() -> None:
    """Makes the iterators that feed several replicas end without delay.

    These iterators have nothing to tune, but TensorFlow starts tf.data's autotuning thread for
    them. The thread sleeps for intervals that double up to a minute. At the end it is woken before
    the cancellation is marked, so that about every second time it sleeps again, and the training
    waits for it. No public option reaches these iterators.
    """
    create = multi_device_iterator_ops._create_device_dataset
    options = tf.data.Options()
    options.autotune.enabled = False

    def create_untuned(*arguments: Any) -> tf.data.Dataset:
        return create(*arguments).with_options(options)

    multi_device_iterator_ops._create_device_dataset = create_untuned
