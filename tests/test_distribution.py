"""Strategies by name, and one line for what can't be had."""

import subprocess
import sys

import pytest
import tensorflow as tf

from bn_keras.distribution import make_strategy
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


def test_it_splits_a_cpu_that_nobody_has_touched():
    program = (
        "from bn_keras.distribution import make_strategy;"
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
            "unknown distribution.strategy 'cluster': accepted are one_device, mirrored, tpu",
        ),
        (("one_device", 2), "one_device has one"),
        (("mirrored", -1), "has to be 0 or more"),
        (("tpu", 2), "strategy tpu takes all cores"),
        (("tpu",), "this machine has no TPU.*set distribution.strategy=mirrored"),
        (("mirrored", 64), "TensorFlow has already started with 2 CPU"),
    ],
)
def test_what_cannot_be_had_is_refused(arguments, message):
    tf.config.list_logical_devices()
    with pytest.raises(UsageError, match=message):
        make_strategy(*arguments)
