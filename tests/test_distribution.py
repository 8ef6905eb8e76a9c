"""Strategies by name, and one line for what can't be had."""

import json
import socket
import subprocess
import sys

import pytest
import tensorflow as tf

from bn_keras.distribute.strategy import (
    from_all_workers,
    is_chief,
    make_strategy,
    naming_lost_workers,
)
from bn_keras.errors import UsageError


def test_one_device_has_one_replica():
    assert make_strategy("one_device").num_replicas_in_sync == 1


@pytest.mark.parametrize("replicas, expected", [(0, 1), (1, 1), (2, 2)])
def test_mirrored_takes_so_many_cpu_replicas(replicas, expected):
    assert make_strategy("mirrored", replicas).num_replicas_in_sync == expected


def test_two_strategies_of_one_process_do_not_disturb_each_other():
    for size in (3, 5):
        strategy = make_strategy("mirrored", 2)
        sums = tf.function(
            lambda strategy=strategy, size=size: strategy.run(
                lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([size]))
            )
        )()
        assert [s.numpy().tolist() for s in strategy.experimental_local_results(sums)] == [
            [2.0] * size
        ] * 2


def test_what_feeds_a_replica_has_no_thread_to_wait_for(monkeypatch):
    """tf.data's autotuning, which would make the end of a run wait for up to a minute."""
    strategy = make_strategy("mirrored", 2)
    opened = []
    make_iterator = tf.data.Dataset.__iter__
    monkeypatch.setattr(
        tf.data.Dataset, "__iter__", lambda self: opened.append(self) or make_iterator(self)
    )
    dataset = strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.range(4))
    next(iter(dataset))
    assert len(opened) == 2 and not any(d.options().autotune.enabled is not False for d in opened)


def test_it_splits_a_cpu_that_nobody_has_touched():
    program = (
        "from bn_keras.distribute.strategy import make_strategy;"
        "print(make_strategy('mirrored', 3).num_replicas_in_sync)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("cluster",),
            "unknown distribution.strategy 'cluster': accepted are one_device, mirrored,"
            " multi_worker, tpu",
        ),
        (("one_device", 2), "one_device has one"),
        (("mirrored", -1), "has to be 0 or more"),
        (("tpu", 2), "strategy tpu takes all devices: set it to 0"),
        (("multi_worker", 2), "strategy multi_worker takes all devices: set it to 0"),
        (("multi_worker",), "TF_CONFIG is not set"),
        (("tpu",), "this machine has no TPU.*set distribution.strategy=mirrored"),
        (("mirrored", 64), "TensorFlow has already started with 2 CPU"),
    ],
)
def test_what_cannot_be_had_is_refused(arguments, message, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tf.config.list_logical_devices()
    with pytest.raises(UsageError, match=message):
        make_strategy(*arguments)


def test_a_worker_is_made_before_tensorflow_starts(monkeypatch):
    tf.config.list_logical_devices()
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    cluster = {"cluster": {"worker": [address]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    with pytest.raises(UsageError, match="multi_worker, but TensorFlow has already started"):
        make_strategy("multi_worker")


def test_a_process_without_other_workers_writes_and_waits_for_nobody(two_replicas):
    for strategy in (tf.distribute.get_strategy(), two_replicas):
        assert is_chief(strategy)
        assert from_all_workers(strategy, 7) == [7]
        with pytest.raises(tf.errors.UnavailableError), naming_lost_workers(strategy):
            raise tf.errors.UnavailableError(None, None, "Collective ops is aborted by: a test")
