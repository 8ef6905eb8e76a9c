"""Every command works with a bucket, whatever happens to the process and to the service.

The client is TensorFlow's own; the service is on this machine, see bucket.py.
"""

import json
import os
import random
import signal

import pytest
from bucket import Bucket, Commands
from usable_runs import check_usable, without_times

from bn_keras.runs.workdir import Workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bucket")


@pytest.fixture(scope="module")
def service(folder):
    bucket = Bucket(folder)
    yield bucket
    bucket.close()


@pytest.fixture
def bucket(service):
    """The bucket, without the faults that an earlier test has injected."""
    yield service
    service.reset_faults()


@pytest.fixture(scope="module")
def commands(service, folder):
    commands = Commands(service, folder)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def train(folder):
    """The arguments of a short training, without its workdir."""
    config = folder / "config.py"
    config.write_text(
        "from small import small_mlp\n\n\ndef get_config():\n    return small_mlp()\n"
    )
    return ["train", f"--config={config}"]


@pytest.fixture(scope="module")
def local(commands, train, folder):
    """The workdir of a run on this machine."""
    result = commands.run(*train, f"--workdir={folder}/local")
    assert result.status == 0, result.errors
    return Workdir(folder / "local")


@pytest.fixture(scope="module")
def trained(commands, train, service):
    """The workdir of a run in the bucket."""
    result = commands.run(*train, "--workdir=gs://trained/run")
    assert result.status == 0, result.errors
    return "gs://trained/run"


def lines_in(bucket, workdir):
    text = bucket.read(f"{workdir.removeprefix('gs://')}/metrics.jsonl").decode()
    assert text.endswith("\n")
    return without_times(map(json.loads, text.splitlines()))


def at_change(bucket, number, action):
    """Calls an action after the given change of an object, counted from now."""
    count = 0

    def count_changes(name):
        nonlocal count
        count += 1
        if count == number:
            action()

    bucket.after_change = count_changes


def kill_at_change(bucket, commands, arguments, number, signum):
    """Runs a command that receives a signal after some changes of objects; returns its result."""
    started = []
    at_change(bucket, number, lambda: os.kill(started[0], signum))
    started.append(commands.start(*arguments))
    return commands.wait(started[0])


def test_a_run_killed_at_random_changes_equals_a_local_one(bucket, commands, train, local):
    """With writes that the service limits to one per second and object, errors and latency."""
    bucket.latency, bucket.limits_writes = 0.002, True
    workdir = "gs://killed/run"
    numbers = random.Random(0).sample(range(1, 18), 3)
    for number in numbers:
        bucket.num_errors = 2
        result = kill_at_change(
            bucket, commands, [*train, f"--workdir={workdir}"], number, signal.SIGKILL
        )
        assert result.status == -signal.SIGKILL, (number, result.errors)
    result = kill_at_change(bucket, commands, [*train, f"--workdir={workdir}"], 9, signal.SIGTERM)
    assert result.status == 143, result.errors
    assert "stopped by SIGTERM at step" in result.last_line
    result = commands.run(*train, f"--workdir={workdir}")
    assert result.status == 0, result.errors
    assert lines_in(bucket, workdir) == without_times(local.read_metrics())
    # Each start has its own events; those of a killed process are kept up to its last save.
    assert not [name for name in bucket.names("killed/run/lock") if name.endswith(".claim")]


def test_every_state_of_a_bucket_is_usable(bucket, commands, train, local, tmp_path):
    """A process may end after any change; each state is checked in a local copy."""
    states = []
    bucket.after_change = lambda name: states.append(dict(bucket.objects))
    result = commands.run(*train, "--workdir=gs://states/run")
    assert result.status == 0, result.errors
    expected = without_times(local.read_metrics())
    steps = []
    for number, objects in enumerate(states):
        folder = tmp_path / str(number)
        for name, found in objects.items():
            if name.startswith("states/run/"):
                path = folder / name.removeprefix("states/run/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found.content)
        steps.append(check_usable(folder, expected))
    assert len(states) > 30
    # Once saved, a step is never lost.
    assert steps == sorted(steps) and set(steps) == {
        (0, 0),
        (0, 20),
        (25, 20),
        (25, 40),
        (50, 40),
        (60, 40),
        (60, 60),
    }
