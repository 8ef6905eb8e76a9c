"""Strategies by name, and one-line errors for invalid ones."""

import json
import socket
import subprocess
import sys

import pytest
import tensorflow as tf

from bn_keras.distribute.strategy import (
    gather_from_workers,
    is_chief,
    make_strategy,
    reporting_lost_workers,
)
from bn_keras.errors import UsageError


def test_one_device_has_one_replica():
    assert make_strategy("one_device").num_replicas_in_sync == 1


@pytest.mark.parametrize("replicas, expected", [(0, 1), (1, 1), (2, 2)])
def test_mirrored_splits_the_cpu_into_replicas(replicas, expected):
    assert make_strategy("mirrored", replicas).num_replicas_in_sync == expected


def test_two_strategies_work_in_one_process():
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


def test_iterators_of_several_replicas_are_not_autotuned(monkeypatch):
    """Autotuning would delay the end of a run by up to a minute."""
    strategy = make_strategy("mirrored", 2)
    opened = []
    make_iterator = tf.data.Dataset.__iter__
    monkeypatch.setattr(
        tf.data.Dataset, "__iter__", lambda self: opened.append(self) or make_iterator(self)
    )
    dataset = strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.range(4))
    next(iter(dataset))
    assert len(opened) == 2 and not any(d.options().autotune.enabled is not False for d in opened)


def test_an_unused_cpu_is_split_into_replicas():
    program = (
        "from bn_keras.distribute.strategy import make_strategy;"
        "print(make_strategy('mirrored', 3).num_replicas_in_sync)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that the machine has four GPUs; returns those that TensorFlow sees."""
    present = [f"GPU {i}" for i in range(4)]
    visible = list(present)

    def set_visible(devices, kind):
        assert kind == "GPU"
        visible[:] = devices

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: present)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: list(visible))
    monkeypatch.setattr(tf.config, "set_visible_devices", set_visible)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: devices)
    return visible


def test_tensorflow_sees_only_the_gpus_that_it_uses(gpus):
    """It takes the memory of all that it sees, even of those that another run uses."""
    assert make_strategy("mirrored") == ["GPU:0", "GPU:1", "GPU:2", "GPU:3"]
    assert gpus == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]
    assert make_strategy("mirrored", 3) == ["GPU:0", "GPU:1", "GPU:2"]
    assert gpus == ["GPU 0", "GPU 1", "GPU 2"]
    make_strategy("one_device")
    assert gpus == ["GPU 0"]


def test_a_run_keeps_to_the_gpus_of_its_share(gpus):
    """Runs in parallel each see other GPUs; see `Share.restrict_process`."""
    gpus[:] = ["GPU 2", "GPU 3"]
    assert make_strategy("mirrored", 2) == ["GPU:0", "GPU:1"]
    assert gpus == ["GPU 2", "GPU 3"]
    make_strategy("one_device")
    assert gpus == ["GPU 2"]


def test_gpus_stay_visible_once_tensorflow_has_started(gpus, monkeypatch):
    def refuse(devices, kind):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    assert make_strategy("one_device").num_replicas_in_sync == 1
    assert make_strategy("mirrored", 2) == ["GPU:0", "GPU:1"]


def test_gpus_hidden_by_an_earlier_strategy_are_missed(gpus, caplog):
    make_strategy("one_device")
    with pytest.raises(UsageError, match="sees 1 of 4 accelerators, because.*start a new process"):
        make_strategy("mirrored", 2)
    assert make_strategy("mirrored") == ["GPU:0"]
    assert "mirrored uses 1 of 4 accelerators" in caplog.text


def test_more_replicas_than_gpus_are_rejected(gpus):
    with pytest.raises(UsageError, match="this machine has 4 accelerators; set it to 0"):
        make_strategy("mirrored", 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("cluster",),
            "unknown distribution.strategy 'cluster': expected one of one_device, mirrored,"
            " multi_worker, tpu",
        ),
        (("one_device", 2), "one_device has one"),
        (("mirrored", -1), "replicas=-1 is invalid: expected a non-negative integer"),
        (("tpu", 2), "strategy tpu uses all devices; set it to 0"),
        (("multi_worker", 2), "strategy multi_worker uses all devices; set it to 0"),
        (("multi_worker",), "nothing describes the workers"),
        (("tpu",), "this machine has no TPU.*set distribution.strategy=mirrored"),
        (("mirrored", 64), "TensorFlow has already started with 2 CPU devices"),
    ],
)
def test_invalid_strategies_are_rejected(arguments, message, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    tf.config.list_logical_devices()
    with pytest.raises(UsageError, match=message):
        make_strategy(*arguments)


def test_a_worker_cannot_be_made_after_tensorflow_has_started(monkeypatch):
    tf.config.list_logical_devices()
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    cluster = {"cluster": {"worker": [address]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    with pytest.raises(UsageError, match="multi_worker, but TensorFlow has already started"):
        make_strategy("multi_worker")


def test_a_process_without_other_workers_is_the_chief_and_waits_for_nobody(two_replicas):
    for strategy in (tf.distribute.get_strategy(), two_replicas):
        assert is_chief(strategy)
        assert gather_from_workers(strategy, 7) == [7]
        with pytest.raises(tf.errors.UnavailableError), reporting_lost_workers(strategy):
            raise tf.errors.UnavailableError(None, None, "Collective ops is aborted by: a test")
