"""Two processes train as one: by what comes out, and when one of them ends."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest
from small import small_mlp

from bn_keras.distribute import cluster
from bn_keras.distribute.cluster import Cluster
from bn_keras.errors import UsageError
from bn_keras.runs.workdir import Workdir
from bn_keras.training import loop
from bn_keras.training.loop import train_and_evaluate

CONFIG = {"population.when": "evaluations", "population.num_batches": 2}
TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def pairs(folder):
    """A run's pairs of workers, by what befell them, until it got to its end; and others."""
    config = folder / "config.py"
    settings = {"distribution.strategy": "multi_worker", "distribution.replicas": 0} | CONFIG
    config.write_text(
        f"from small import small_mlp\n\n\ndef get_config():\n    return small_mlp(**{settings})\n"
    )

    def train(*workdirs, overrides=(), **disturbance):
        arguments = [
            [f"--config={config}", f"--workdir={folder / w}", *overrides] for w in workdirs
        ]
        return {"command": "train", "arguments": arguments} | disturbance

    evaluate = [f"--workdir={folder / 'run'}", "--json"]
    given = {
        "terminated": train("run", "run", signum=int(signal.SIGTERM), at_step=12),
        "killed": train("run", "run", signum=int(signal.SIGKILL), at_step=45),
        "finished": train("run", "run"),
        "evaluated": {"command": "evaluate", "arguments": [evaluate, evaluate]},
        "diverged": train(
            "diverged", "diverged", spoiled_step=7, overrides=["--config.train.retries=1"]
        ),
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / "train_with_workers.py"), json.dumps(list(given.values()))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(given, json.loads(done.stdout.splitlines()[-1]), strict=True))


def statuses(pair):
    return [worker["status"] for worker in pair]


def errors(pair):
    """The one line of each worker's error."""
    found = []
    for worker in pair:
        lines = [line for line in worker["text"].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and worker["text"].splitlines()[-1] == lines[0], worker["text"]
        found.append(lines[0])
    return found


def test_a_signal_to_one_stops_both_at_the_same_step(pairs):
    assert statuses(pairs["terminated"]) == [143, 143]
    for error in errors(pairs["terminated"]):
        assert "stopped by SIGTERM at step 20 of 60 and saved" in error


def test_where_one_is_killed_the_other_ends(pairs):
    assert statuses(pairs["killed"]) == [5, -signal.SIGKILL]
    assert pairs["killed"][0]["seconds"] < 20
    line = pairs["killed"][0]["text"].splitlines()[-1]
    assert line.startswith("error: worker 1 of TF_CONFIG has ended or does not answer")


def test_killed_and_restarted_workers_end_as_two_replicas_of_one_process(pairs, folder):
    """To the bit: the sum of two numbers has no order."""
    assert statuses(pairs["finished"]) == [0, 0], pairs["finished"]
    config = small_mlp(**CONFIG, **{"distribution.strategy": "mirrored"})
    config.distribution.replicas = 2
    expected = train_and_evaluate(config, folder / "mirrored")
    lines = [
        [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
        for lines in (Workdir(folder / n).read_metrics() for n in ("run", "mirrored"))
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1]["variables_sha256"] == expected["variables_sha256"]


def test_the_chief_alone_writes(pairs, folder):
    assert statuses(pairs["finished"]) == [0, 0]
    # One file of events for each of the three starts that got so far.
    assert len(list((folder / "run").glob("events.*"))) == 3


def test_workers_evaluate_together(pairs, folder):
    assert statuses(pairs["evaluated"]) == [0, 0], pairs["evaluated"]
    last = Workdir(folder / "run").read_metrics()[-1]
    for worker in pairs["evaluated"]:
        found = json.loads(worker["text"].splitlines()[-1])
        assert found["accuracy"] == last["validation/accuracy"]
        assert found["examples"] == last["validation/examples"]


def test_what_diverges_on_one_worker_diverges_and_goes_back_on_both(pairs, folder):
    assert statuses(pairs["diverged"]) == [3, 3]
    first, second = errors(pairs["diverged"])
    assert "the loss is not finite at step 7 " in first
    assert first == second
    lines = Workdir(folder / "diverged").read_metrics()
    assert [(line["step"], line.keys() - {"step", "examples"}) for line in lines] == [
        (0, {"retry"}),
        (7, {"diverged"}),
    ]


@pytest.mark.parametrize(
    "differs, message",
    [
        (lambda number: number > 0, "the workers have different configs"),
        (lambda number: number == 0, "the workers found the checkpoints of steps 0, 20 in workdir"),
    ],
    ids=["config", "step"],
)
def test_workers_that_are_not_of_one_run_are_refused(differs, message, tmp_path, monkeypatch):
    """They compare the hash of the config, and then the step to go on from."""

    def found(strategy, number):
        return [number, number + 20 if differs(number) else number]

    monkeypatch.setattr(loop, "from_all_workers", found)
    with pytest.raises(UsageError, match=message):
        train_and_evaluate(small_mlp(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- TF_CONFIG, and how workers meet.


def test_the_chief_comes_first(monkeypatch):
    given = {"worker": ["b:1", "[::1]:65535"], "chief": ["a:1"]}
    task = {"type": "worker", "index": "1"}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": given, "task": task}))
    assert Cluster.from_environment() == (("a:1", "b:1", "[::1]:65535"), 2)


def tf_config(addresses=("a:1", "b:1"), job="worker", index=0, **more):
    return json.dumps(
        {"cluster": {"worker": addresses} | more, "task": {"type": job, "index": index}}
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "TF_CONFIG is not set: give each process its own, such as TF_CONFIG='{"),
        ("{", "it has to be JSON that names a cluster of workers"),
        ("[]", "it has to be JSON"),
        ("{}", "it has to be JSON"),
        ('{"cluster": {"worker": ["a:1"]}}', "it has to be JSON"),
        ('{"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}', "it has to be JSON"),
        (tf_config([]), "it has to be JSON"),
        (tf_config(["a"]), "each with HOST:PORT"),
        (tf_config(["a:http"]), "each with HOST:PORT"),
        (tf_config(["a:65536"]), "each with HOST:PORT"),
        (tf_config(index="first"), "it has to be JSON"),
        (tf_config(ps=["c:1"]), "it has to be JSON"),
        (tf_config(["a:1", "a:1"]), "two workers have the same address"),
        (tf_config(index=2), "worker 2: the cluster has worker 0, worker 1"),
        (tf_config(index=-1), "worker -1: the cluster has worker 0, worker 1"),
        (tf_config(job="chief"), "chief 0: the cluster has worker 0, worker 1"),
    ],
)
def test_what_cannot_be_meant_is_one_line(text, message, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError) as caught:
        Cluster.from_environment()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def servers():
    """Listen at two free ports."""
    with socket.create_server(("", 0)) as first, socket.create_server(("", 0)) as second:
        yield first, second


def address_of(server):
    return f"localhost:{server.getsockname()[1]}"


def test_workers_meet_in_any_order(servers):
    addresses = tuple(map(address_of, servers))
    for server in servers:
        server.close()
    threads = [threading.Thread(target=Cluster(addresses, i).meet) for i in (0, 1)]
    for thread in threads:
        thread.start()
    # The first one that has met the other listens no more; in its place comes TensorFlow.
    while all(thread.is_alive() for thread in threads):
        threads[0].join(0.01)
    index = [thread.is_alive() for thread in threads].index(False)
    with socket.create_server(("", int(addresses[index].rpartition(":")[2]))):
        for thread in threads:
            thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_worker_that_does_not_come_is_named(servers, monkeypatch):
    addresses = tuple(map(address_of, servers))
    servers[0].close()
    # RFC 2606: there is no such host.
    addresses += ("host.invalid:1",)
    monkeypatch.setattr(cluster, "_SECONDS_TO_MEET", 0.0)
    with pytest.raises(UsageError, match="no process listens at host.invalid:1 of TF_CONFIG"):
        Cluster(addresses, 0).meet()


def test_a_port_that_is_taken_is_named(servers):
    addresses = tuple(map(address_of, servers))
    with pytest.raises(UsageError, match=f"worker 1 can't listen at .*{addresses[1]}.*already in"):
        Cluster(addresses, 1).meet()
