"""Two workers train as one process does, and react when one of them ends."""

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
from bn_keras.training import workers
from bn_keras.training.loop import train_and_evaluate

CONFIG = {"population.when": "evaluations", "population.num_batches": 2}
TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def pairs(folder):
    """Results of pairs of workers by name.

    One run is terminated, killed and finished; then it is evaluated. Another run diverges.
    """
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
    commands = {
        "terminated": train("run", "run", signum=int(signal.SIGTERM), at_step=12),
        "killed": train("run", "run", signum=int(signal.SIGKILL), at_step=45),
        "finished": train("run", "run"),
        "evaluated": {"command": "evaluate", "arguments": [evaluate, evaluate]},
        "diverged": train(
            "diverged", "diverged", spoiled_step=7, overrides=["--config.train.retries=1"]
        ),
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / "train_with_workers.py"), json.dumps(list(commands.values()))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


def statuses(pair):
    return [worker["status"] for worker in pair]


def errors(pair):
    """Returns the error of each worker, the last line of its output."""
    last_lines = []
    for worker in pair:
        lines = [line for line in worker["text"].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and worker["text"].splitlines()[-1] == lines[0], worker["text"]
        last_lines.append(lines[0])
    return last_lines


def test_a_signal_to_one_worker_stops_both_at_the_same_step(pairs):
    assert statuses(pairs["terminated"]) == [143, 143]
    for error in errors(pairs["terminated"]):
        assert "stopped by SIGTERM at step 20 of 60, saved in" in error


def test_a_worker_ends_when_the_other_is_killed(pairs):
    assert statuses(pairs["killed"]) == [5, -signal.SIGKILL]
    assert pairs["killed"][0]["seconds"] < 20
    line = pairs["killed"][0]["text"].splitlines()[-1]
    assert line.startswith("error: worker 1 of TF_CONFIG has ended or does not answer")


def test_restarted_workers_equal_two_replicas_of_one_process(pairs, folder):
    """Bit-exact, since the sum of two numbers does not depend on their order."""
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


def test_only_the_chief_writes(pairs, folder):
    assert statuses(pairs["finished"]) == [0, 0]
    # One file of events for each of the three starts.
    assert len(list((folder / "run").glob("events.*"))) == 3


def test_workers_evaluate_together(pairs, folder):
    assert statuses(pairs["evaluated"]) == [0, 0], pairs["evaluated"]
    last = Workdir(folder / "run").read_metrics()[-1]
    for worker in pairs["evaluated"]:
        found = json.loads(worker["text"].splitlines()[-1])
        assert found["accuracy"] == last["validation/accuracy"]
        assert found["examples"] == last["validation/examples"]


def test_a_divergence_on_one_worker_rolls_back_both(pairs, folder):
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
        (lambda number: number == 0, "the workers read the checkpoints of steps 0, 20 in workdir"),
    ],
    ids=["config", "step"],
)
def test_workers_of_different_runs_are_rejected(differs, message, tmp_path, monkeypatch):
    """The workers compare the hash of the config, then the step to resume from."""

    def gathered(strategy, number):
        return [number, number + 20 if differs(number) else number]

    monkeypatch.setattr(workers, "from_all_workers", gathered)
    with pytest.raises(UsageError, match=message):
        train_and_evaluate(small_mlp(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- TF_CONFIG and the meeting of workers


def test_the_chief_is_the_first_worker(monkeypatch):
    jobs = {"worker": ["b:1", "[::1]:65535"], "chief": ["a:1"]}
    task = {"type": "worker", "index": "1"}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": task}))
    assert Cluster.from_environment() == Cluster(("a:1", "b:1", "[::1]:65535"), 2)


def tf_config(addresses=("a:1", "b:1"), job="worker", index=0, **more):
    return json.dumps(
        {"cluster": {"worker": addresses} | more, "task": {"type": job, "index": index}}
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "TF_CONFIG is not set: set it for each process, for example TF_CONFIG='{"),
        ("{", "TF_CONFIG='{' is invalid: expected JSON with the HOST:PORT of each worker"),
        ("[]", "expected JSON"),
        ("{}", "expected JSON"),
        ('{"cluster": {"worker": ["a:1"]}}', "expected JSON"),
        ('{"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}', "expected JSON"),
        (tf_config([]), "expected JSON"),
        (tf_config(["a"]), "expected JSON with the HOST:PORT of each worker"),
        (tf_config(["a:http"]), "expected JSON with the HOST:PORT of each worker"),
        (tf_config(["a:65536"]), "expected JSON with the HOST:PORT of each worker"),
        (tf_config(index="first"), "expected JSON"),
        (tf_config(ps=["c:1"]), "expected JSON"),
        (tf_config(["a:1", "a:1"]), "TF_CONFIG lists a:1 more than once"),
        (
            tf_config(index=2),
            "unknown task worker 2 in TF_CONFIG: expected one of worker 0, worker 1",
        ),
        (
            tf_config(index=-1),
            "unknown task worker -1 in TF_CONFIG: expected one of worker 0, worker 1",
        ),
        (
            tf_config(job="chief"),
            "unknown task chief 0 in TF_CONFIG: expected one of worker 0, worker 1",
        ),
    ],
)
def test_an_invalid_tf_config_is_one_line(text, message, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError) as caught:
        Cluster.from_environment()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("job, index", [("worker", "first"), ("worker", 256)])
def test_errors_about_a_large_cluster_are_short(job, index, monkeypatch):
    addresses = [f"host{i}:2222" for i in range(256)]
    monkeypatch.setenv("TF_CONFIG", tf_config(addresses, job, index))
    with pytest.raises(UsageError) as caught:
        Cluster.from_environment()
    assert len(str(caught.value)) < 400


@pytest.fixture
def servers():
    """Two servers that listen at free ports."""
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
    # A worker that has met the other stops listening; TensorFlow's server takes its place.
    while all(thread.is_alive() for thread in threads):
        threads[0].join(0.01)
    index = [thread.is_alive() for thread in threads].index(False)
    with socket.create_server(("", int(addresses[index].rpartition(":")[2]))):
        for thread in threads:
            thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_missing_worker_is_named(servers, monkeypatch):
    addresses = tuple(map(address_of, servers))
    servers[0].close()
    # RFC 2606 reserves .invalid: no such host exists.
    addresses += ("host.invalid:1",)
    monkeypatch.setattr(cluster, "_MEETING_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(UsageError, match="no process listens at host.invalid:1 of TF_CONFIG"):
        Cluster(addresses, 0).meet()


def test_a_port_in_use_is_named(servers):
    addresses = tuple(map(address_of, servers))
    with pytest.raises(UsageError, match=f"worker 1 cannot listen at .*{addresses[1]}.*already in"):
        Cluster(addresses, 1).meet()
