"""Parallel processes have their own devices, and share errors and signals."""

import os
import pathlib
import signal
import threading
import time

import pytest
import tensorflow as tf

from bn_keras.errors import ProcessKilledError, TrainingStoppedError, UsageError
from bn_keras.experiments import parallel
from bn_keras.experiments.parallel import Share, Task, divide_machine, run_tasks

SHARES = [Share((0,), ()), Share((0,), ())]


@pytest.mark.parametrize(
    ("distributions", "gpus", "limit", "expected"),
    [
        ([("mirrored", 1)] * 3, 0, 0, [((0, 1), ()), ((2, 3), ()), ((4, 5), ())]),
        ([("mirrored", 1)] * 9, 0, 0, [((i,), ()) for i in range(6)]),
        ([("mirrored", 1)] * 9, 0, 2, [((0, 1, 2), ()), ((3, 4, 5), ())]),
        ([("mirrored", 2)] * 9, 0, 0, [((0, 1), ()), ((2, 3), ()), ((4, 5), ())]),
        ([("mirrored", 1), ("mirrored", 4)], 0, 0, [((0, 1, 2, 3, 4, 5), ())]),
        ([("one_device", 0)] * 2, 4, 0, [((0, 1, 2), (0, 1)), ((3, 4, 5), (2, 3))]),
        ([("one_device", 0)] * 9, 3, 0, [((0, 1), (0,)), ((2, 3), (1,)), ((4, 5), (2,))]),
        # With 0 replicas, "mirrored" uses every accelerator.
        ([("mirrored", 0)] * 9, 4, 0, [((0, 1, 2, 3, 4, 5), (0, 1, 2, 3))]),
        ([("tpu", 0)] * 2, 0, 0, [((0, 1, 2, 3, 4, 5), ())]),
        ([], 0, 0, [((0, 1, 2, 3, 4, 5), ())]),
    ],
)
def test_the_machine_is_divided_into_equal_shares(
    monkeypatch, distributions, gpus, limit, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [None] * gpus)
    assert divide_machine(distributions, limit) == expected


def write(path):
    pathlib.Path(path).write_text("started")


def fail(path):
    write(path)
    raise UsageError("one line")


def wait_for_signal(path):
    def end(number, frame):
        with open(path, "a") as file:
            file.write(" signal")
        # Longer than the parent waits between two looks at its processes.
        time.sleep(3 * parallel._POLL_SECONDS)
        raise TrainingStoppedError("saved", number)

    signal.signal(signal.SIGTERM, end)
    write(path)
    while True:
        time.sleep(0.01)


@pytest.mark.job
def test_an_error_ends_all_tasks(tmp_path):
    files = [str(tmp_path / name) for name in ("bad", "waits", "never")]
    functions = [fail, wait_for_signal, write]
    tasks = [Task(f, g, (f,)) for f, g in zip(files, functions, strict=True)]
    with pytest.raises(UsageError) as raised:
        run_tasks(tasks, SHARES)
    assert str(raised.value) == "one line" and "in fail" in raised.value.__notes__[0]
    assert not pathlib.Path(files[2]).exists()


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.job
def test_a_killed_process_is_reported_with_advice(tmp_path):
    with pytest.raises(ProcessKilledError, match="the process of one was killed .*--parallel"):
        run_tasks([Task("one", die, ("",))], SHARES)


@pytest.mark.job
def test_a_signal_reaches_each_task_once(tmp_path):
    files = [tmp_path / name for name in ("one", "two", "three")]

    def interrupt():
        while not all(file.exists() for file in files[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    tasks = [Task(f.name, wait_for_signal, (str(f),)) for f in files]
    with pytest.raises(TrainingStoppedError, match="SIGINT") as stopped:
        run_tasks(tasks, SHARES)
    assert stopped.value.signum == signal.SIGINT
    assert [f.exists() and f.read_text() for f in files] == ["started signal"] * 2 + [False]
