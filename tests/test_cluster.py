"""The cluster that the environment describes, and the meeting of its workers."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest
from commands import ROOT, launch

from bn_keras.distribute import cluster, detection
from bn_keras.distribute.cluster import Cluster
from bn_keras.distribute.detection import (
    check_alone,
    expand_host_list,
    find_cluster,
    is_evaluator,
    join_cluster,
    require_cluster,
)
from bn_keras.distribute.waiting import waiting_for
from bn_keras.errors import UsageError, WorkerLostError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Removes the variables of any cluster that these tests run in; returns a function that sets
    others."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SKYPILOT_")) or name in ("TF_CONFIG", "no_grpc_proxy"):
            monkeypatch.delenv(name)
    # Set by join_cluster and bypass_proxies; monkeypatch restores it.
    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setenv("no_proxy", "")

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def config(jobs, job, index, /, **more):
    return {
        "TF_CONFIG": json.dumps({"cluster": jobs, "task": {"type": job, "index": index}} | more)
    }


# TF_CONFIG as each engine documents or writes it.
TFJOB = [f"bn-worker-{i}.team.svc:2222" for i in range(2)]
VERTEX = {
    "chief": ["cmle-training-workerpool0-ab-0:2222"],
    "worker": ["cmle-training-workerpool1-ab-0:2222", "cmle-training-workerpool1-ab-1:2222"],
}
VERTEX_JOB = {
    "environment": "cloud",
    "job": json.dumps({"workerPoolSpecs": [{"containerSpec": {"args": ["SECRET"] * 1000}}]}),
}
SAGEMAKER = {"worker": ["algo-1:8890", "algo-2:8890"]}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[01-03]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    # With --distribution=cyclic, the rank is not the position among the nodes.
    "SLURM_PROCID": "4",
}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NODE_RANK": "1"}


@pytest.mark.parametrize(
    "variables, source, addresses, index",
    [
        pytest.param(
            config({"worker": ["a:1", "b:1"]}, "worker", 1),
            *("TF_CONFIG", ["a:1", "b:1"], 1),
            id="TensorFlow and Ray",
        ),
        pytest.param(
            config({"worker": TFJOB}, "worker", 1, environment="cloud"),
            *("TF_CONFIG", TFJOB, 1),
            id="TFJob",
        ),
        pytest.param(
            config({"chief": ["c:2222"], "worker": TFJOB}, "worker", 0, environment="cloud"),
            *("TF_CONFIG", ["c:2222", *TFJOB], 1),
            id="TFJob with a chief",
        ),
        pytest.param(
            config({"worker": TFJOB, "evaluator": ["e:2222"]}, "worker", 0),
            *("TF_CONFIG", TFJOB, 0),
            id="TFJob with an evaluator",
        ),
        pytest.param(
            config(VERTEX, "chief", 0, **VERTEX_JOB),
            *("TF_CONFIG", [*VERTEX["chief"], *VERTEX["worker"]], 0),
            id="Vertex AI, chief",
        ),
        pytest.param(
            {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": VERTEX,
                        "task": {"type": "worker", "index": 1, "cloud": "ab", "trial": "1"},
                        **VERTEX_JOB,
                    }
                )
            },
            *("TF_CONFIG", [*VERTEX["chief"], *VERTEX["worker"]], 2),
            id="Vertex AI, worker of a trial",
        ),
        pytest.param(
            config(SAGEMAKER, "worker", 1, environment="cloud"),
            *("TF_CONFIG", SAGEMAKER["worker"], 1),
            id="SageMaker",
        ),
        pytest.param(
            config({"worker": ["b:1", "[::1]:65535"], "chief": ["a:1"]}, "worker", "1"),
            *("TF_CONFIG", ["a:1", "b:1", "[::1]:65535"], 2),
            id="an index in quotes",
        ),
        pytest.param(
            config({"worker": ["a:1"]}, "worker", 0),
            *("TF_CONFIG", ["a:1"], 0),
            id="one worker",
        ),
        pytest.param(
            SLURM,
            "Slurm",
            [f"node0{node}:{10224 + i}" for i, node in enumerate((1, 1, 2, 2, 3))],
            3,
            id="Slurm",
        ),
        pytest.param(
            SLURM | {"SLURM_STEP_ID": "1", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"},
            "Slurm",
            [f"node0{node}:{10229 + i}" for i, node in enumerate((1, 1, 2, 2, 3))],
            4,
            id="Slurm, the second step of the same job",
        ),
        pytest.param(
            SLURM
            | {
                "SLURM_STEP_NODELIST": "here",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_TASKS_PER_NODE": "1",
                "SLURM_NODEID": "0",
                "SLURM_LOCALID": "0",
            },
            *("Slurm", ["here:10224"], 0),
            id="Slurm, one task",
        ),
        pytest.param(SKYPILOT, "SkyPilot", ["10.0.0.1:2222", "10.0.0.2:2222"], 1, id="SkyPilot"),
        pytest.param(
            {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"},
            *("SkyPilot", ["10.0.0.1:2222"], 0),
            id="SkyPilot, one node",
        ),
        pytest.param(
            SKYPILOT | SLURM | config({"worker": ["a:1"]}, "worker", 0),
            *("TF_CONFIG", ["a:1"], 0),
            id="TF_CONFIG goes first",
        ),
        pytest.param(
            SKYPILOT | SLURM | {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"},
            "Slurm",
            [f"node0{node}:{10224 + i}" for i, node in enumerate((1, 1, 2, 2, 3))],
            0,
            id="Slurm goes before SkyPilot",
        ),
    ],
)
def test_each_engine_is_understood(variables, source, addresses, index, environment):
    environment(variables)
    assert find_cluster() == Cluster(tuple(addresses), index, source)


def test_a_batch_script_of_slurm_is_no_step(environment):
    """Its variables describe the allocation, and it is a single process."""
    environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"})
    assert find_cluster() is None
    check_alone("mirrored")


@pytest.mark.parametrize(
    "variables, message",
    [
        ({}, "nothing describes the workers: start them with Slurm's srun"),
        ({"TF_CONFIG": "{"}, "TF_CONFIG is invalid, it is not JSON (Expecting property name"),
        ({"TF_CONFIG": "[]"}, "it is not a JSON object"),
        ({"TF_CONFIG": "{}"}, "it lists no workers"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, '"task" lacks a "type"'),
        (config(["a:1"], "worker", 0), '"cluster" is not a JSON object'),
        (config({"worker": "a:1"}, "worker", 0), '"worker" is not a list of addresses'),
        (config({"worker": [1]}, "worker", 0), '"worker" is not a list of addresses'),
        (config({"worker": []}, "worker", 0), "it lists no workers"),
        (config({"worker": ["a"]}, "worker", 0), "invalid address 'a' in TF_CONFIG: expected HOST"),
        (config({"worker": ["a:http"]}, "worker", 0), "invalid address 'a:http'"),
        (config({"worker": ["a:65536"]}, "worker", 0), "invalid address 'a:65536'"),
        (config({"worker": [":1"]}, "worker", 0), "invalid address ':1'"),
        (config({"worker": ["a:1"]}, "worker", "first"), 'lacks a "type" or an integer "index"'),
        (config({"worker": ["a:1"]}, "worker", None), 'lacks a "type" or an integer "index"'),
        (config({"worker": ["a:1", "a:1"]}, "worker", 0), "TF_CONFIG lists a:1 more than once"),
        (
            config({"worker": ["a:1", "b:1"]}, "worker", 2),
            "unknown task worker 2 in TF_CONFIG: expected one of worker 0, worker 1",
        ),
        (config({"worker": ["a:1"]}, "worker", -1), "unknown task worker -1"),
        (config({"worker": ["a:1"]}, "chief", 0), "unknown task chief 0"),
        (
            config({"worker": TFJOB, "ps": ["p:2222"]}, "ps", 0),
            "TF_CONFIG has unsupported tasks (ps): expected chief, worker and evaluator",
        ),
        (
            config({"master": ["algo-1:2222"], "ps": ["algo-1:2223"]}, "master", 0),
            "TF_CONFIG has unsupported tasks (master, ps)",
        ),
        (config({"worker": TFJOB}, "evaluator", 0), "an evaluator, which has nothing to do"),
        (
            {"TF_CONFIG": json.dumps({"sparseCluster": {"worker": {"0": "a:1"}}})},
            "it lists no workers",
        ),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_LOCALID": "2"}, "contradict each"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "contradict each other: 3 hosts"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two' is inv"),
        (SLURM | {"SLURM_NODEID": ""}, "SLURM_NODEID is not set, but other variables of Slurm are"),
        (SLURM | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is invalid: expected a non-negative"),
        (SLURM | {"SLURM_STEP_NODELIST": "node[1-b]"}, "host list 'node[1-b]' is invalid"),
        (SKYPILOT | {"SKYPILOT_NODE_RANK": "2"}, "SKYPILOT_NODE_RANK='2' is invalid"),
        ({"SKYPILOT_NODE_IPS": "10.0.0.1"}, "SKYPILOT_NODE_RANK='' is invalid"),
    ],
)
def test_an_invalid_cluster_is_explained_on_one_line(variables, message, environment):
    environment(variables)
    with pytest.raises(UsageError) as caught:
        require_cluster()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "variables",
    [
        config({"worker": [f"host{i}:2222" for i in range(256)]}, "worker", 256),
        config({"worker": ["a:1"], "p" * 5000: []}, "worker", 0),
        config({"worker": ["a" * 5000]}, "worker", 0),
        config({"worker": ["a:1"]}, "w" * 5000, 0),
        config(VERTEX, "worker", "first", **VERTEX_JOB),
        config(VERTEX, "worker", 9, **VERTEX_JOB),
        {"TF_CONFIG": json.dumps(VERTEX_JOB)[:-1]},
        SLURM | {"SLURM_STEP_NODELIST": "[" * 5000},
        SKYPILOT | {"SKYPILOT_NODE_RANK": "x" * 5000},
    ],
)
def test_no_message_prints_a_whole_job(variables, environment):
    environment(variables)
    with pytest.raises(UsageError) as caught:
        require_cluster()
    assert len(str(caught.value)) < 400 and "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a[1-3]", ["a1", "a2", "a3"]),
        ("a[08-10,3],b7", ["a08", "a09", "a10", "a3", "b7"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-[1,3]-ib,login", ["gpu-1-ib", "gpu-3-ib", "login"]),
    ],
)
def test_host_lists_are_expanded(text, hosts):
    assert expand_host_list(text) == hosts


@pytest.mark.parametrize("text", ["a[1-2", "a1-2]", "a[2-1]", "a[b]", "a[[1]]"])
def test_invalid_host_lists_are_rejected(text):
    with pytest.raises(UsageError, match=r"host list .* is invalid: expected a\[1-3,5\],b"):
        expand_host_list(text)


@pytest.mark.parametrize(
    "variables, variable",
    [
        (config({"worker": ["a:1", "b:1"]}, "worker", 0), "TF_CONFIG"),
        (config({"chief": ["a:1"], "worker": ["b:1"]}, "chief", 0), "TF_CONFIG"),
        (config({"master": ["a:1"], "ps": ["b:1"]}, "master", 0), "TF_CONFIG"),
        (SLURM, "SLURM_STEP_NUM_TASKS"),
        (SKYPILOT, "SKYPILOT_NODE_IPS"),
    ],
)
def test_several_processes_do_not_train_alone(variables, variable, environment):
    environment(variables)
    with pytest.raises(UsageError, match=f"mirrored is invalid for one of . processes.*{variable}"):
        check_alone("mirrored")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TF_CONFIG": "{}"},
        config({"worker": ["a:1"]}, "worker", 0),
        config({"worker": ["a:1"], "evaluator": ["b:1"]}, "worker", 0),
        config({"master": ["algo-1:2222"]}, "master", 0, environment="cloud"),
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SKYPILOT_NODE_IPS": "10.0.0.1"},
    ],
)
def test_a_single_process_may_train_alone(variables, environment):
    environment(variables)
    check_alone("mirrored")


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, False),
        ({"TF_CONFIG": "{}"}, False),
        (config({"worker": TFJOB}, "worker", 0), False),
        (config({"worker": TFJOB}, "evaluator", 0), True),
        (config(VERTEX, "evaluator", 0, **VERTEX_JOB), True),
        (SLURM, False),
    ],
)
def test_an_evaluator_is_recognized(variables, expected, environment):
    environment(variables)
    assert is_evaluator() is expected


def test_flags_describe_a_cluster(environment):
    environment(SLURM)
    join_cluster(["a:1", "b:2"], 1)
    assert find_cluster() == Cluster(("a:1", "b:2"), 1, "TF_CONFIG")
    with pytest.raises(UsageError, match="--workers and TF_CONFIG both describe the cluster"):
        join_cluster(["a:1"], 0)


@pytest.mark.parametrize(
    "workers, worker, message",
    [
        (["a:1", "b"], 0, "invalid address 'b' in --workers: expected HOST:PORT"),
        (["a:1", "a:1"], 0, "--workers lists a:1 more than once"),
        (["a:1", "b:1"], 2, "--worker=2 is invalid: expected an index from 0 to 1 in --workers"),
    ],
)
def test_invalid_flags_are_rejected(workers, worker, message):
    with pytest.raises(UsageError, match=message):
        join_cluster(workers, worker)
    assert not os.environ["TF_CONFIG"]


def test_one_module_reads_the_variables():
    """Otherwise two modules could disagree about the cluster."""
    package = pathlib.Path(detection.__file__).parents[1]
    variables = ("SLURM_STEP", "SKYPILOT_", 'environ["TF_CONFIG')
    readers = [
        path.name
        for path in package.rglob("*.py")
        if any(variable in path.read_text() for variable in variables)
    ]
    assert readers == ["detection.py"]


# Proxies


def test_workers_bypass_proxies(environment):
    workers = Cluster(("host1:1", "[::1]:2", "host1:3"), 0)
    environment({"no_proxy": "example.org,host1"})
    workers.bypass_proxies()
    assert os.environ["no_proxy"] == "example.org,host1,::1"
    assert "no_grpc_proxy" not in os.environ
    # gRPC ignores no_proxy if this is set.
    environment({"no_grpc_proxy": "internal"})
    workers.bypass_proxies()
    assert os.environ["no_grpc_proxy"] == "internal,host1,::1"


# Meeting


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
    with pytest.raises(WorkerLostError, match=r"worker 2 \(host.invalid:1\) did not start within"):
        Cluster(addresses, 0).meet()
    assert Cluster(addresses, 0).describe_others() == (
        "worker 2 (host.invalid:1), which cannot be reached"
    )
    assert Cluster(addresses[:2], 0).describe_others() == f"worker 1 ({addresses[1]})"


def test_a_port_in_use_is_named(servers):
    addresses = tuple(map(address_of, servers))
    with pytest.raises(UsageError, match=f"worker 1 cannot listen at .*{addresses[1]}.*already in"):
        Cluster(addresses, 1).meet()


def test_one_worker_waits_for_nobody(servers):
    Cluster((address_of(servers[0]),), 0).meet()


# Waits. The block sleeps in C, where Python's signal handlers do not run, as in TensorFlow.

SLEEP = """
    import ctypes, os, signal, sys
    from bn_keras.distribute import waiting
    from bn_keras.training.stop_signals import stop_requests
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(0 if {default} else 1))
    waiting._SECONDS_TO_FIRST_REPORT = waiting._GRACE_SECONDS = {seconds}
    waiting._SECONDS_BETWEEN_REPORTS = 600.0
    sleep = ctypes.CDLL(None).usleep
    ignoring = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)
    def wait():
        with waiting.waiting_for(lambda: "worker 1 (host:2222)"):
            if {replaced}:
                ctypes.CDLL(None).signal(signal.SIGTERM, ignoring)
                sleep(900_000)
            print("waiting", flush=True)
            for _ in range(600):
                sleep(100_000)
    if {listens}:
        with stop_requests():
            wait()
    else:
        wait()
"""


def start_waiting(default=True, replaced=False, listens=False, seconds=600.0):
    program = textwrap.dedent(SLEEP).format(
        default=default, replaced=replaced, listens=listens, seconds=seconds
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    return process


def read_until(lines, text):
    assert any(text in line for line in lines)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait(signum):
    process = start_waiting()
    process.send_signal(signum)
    _, log = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert f"{signum.name}: ending while waiting for worker 1 (host:2222)" in log


@pytest.mark.job
def test_a_signal_ends_a_wait_of_a_process_that_ignores_it():
    """The first process of a container ignores SIGTERM by default."""
    process = start_waiting(default=False)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.job
def test_a_signal_ends_a_wait_that_replaces_its_handler():
    """TensorFlow does so when it connects workers."""
    process = start_waiting(replaced=True)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.job
def test_a_wait_during_a_training_passes_the_signal_on_and_ends_later():
    process = start_waiting(listens=True, seconds=1.0)
    read_until(process.stderr, "waiting for worker 1 (host:2222), for 1 seconds so far")
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert process.returncode == 143
    assert log.index("stopping after this loop") < log.index("SIGTERM: ending while waiting for")


@pytest.mark.job
def test_a_second_signal_ends_a_training_that_waits():
    process = start_waiting(listens=True)
    process.terminate()
    read_until(process.stderr, "stopping after this loop")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_wait_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with waiting_for(lambda: "nobody"):
        pass
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_may_wait():
    """Ray runs the training outside the main thread, where Python cannot handle signals."""
    done = []

    def wait():
        with waiting_for(lambda: "nobody"):
            done.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(10)
    assert done


CONNECT = """
    from bn_keras.distribute import make_strategy, waiting
    waiting._SECONDS_TO_FIRST_REPORT = 1.0
    make_strategy("multi_worker")
"""


@pytest.mark.job
def test_a_signal_ends_the_connection_to_a_worker_that_does_not_answer(servers):
    """TensorFlow holds Python's lock then, and replaces the handler of SIGTERM."""
    chief, own = map(address_of, servers)
    servers[1].close()
    variables = config({"worker": [chief, own]}, "worker", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CONNECT)],
        env=os.environ | variables,
        stderr=subprocess.PIPE,
        text=True,
    )
    read_until(process.stderr, f"waiting for worker 0 ({chief}), for 1 seconds so far")
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert process.returncode == 143
    assert f"SIGTERM: ending while waiting for worker 0 ({chief})" in log


@pytest.mark.job
def test_a_cluster_of_one_trains_alone(servers):
    program = """
        from bn_keras.distribute import gather_from_workers, is_chief, make_strategy
        strategy = make_strategy("multi_worker")
        print(strategy.num_replicas_in_sync, is_chief(strategy), gather_from_workers(strategy, 7))
    """
    address = address_of(servers[0])
    servers[0].close()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | config({"chief": [address]}, "chief", 0, environment="cloud"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1 True [7]\n"


# Commands.

TRAIN = ["--config=mnist_bn", "--config.data.name=digits"]


@pytest.mark.parametrize("name, flags", [("train", TRAIN), ("evaluate", [])])
def test_an_evaluator_has_nothing_to_do(name, flags, tmp_path):
    variables = config({"worker": TFJOB}, "evaluator", 0, environment="cloud")
    done = launch(name, *flags, f"--workdir={tmp_path}/run", **variables)
    assert done.returncode == 0, done.stderr
    assert (
        "nothing to do: the workers evaluate, so the evaluator of TF_CONFIG is not needed"
        in done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, variables, message",
    [
        (["--workers=a:1,b:1"], {}, "--worker is missing: --workers and --worker belong together"),
        (["--worker=0"], {}, "--workers is missing: --workers and --worker belong together"),
        (["--worker=0", "--workers=a:1,b:1"], {}, "one_device is invalid for one of 2 processes"),
        (
            [],
            config({"worker": TFJOB}, "worker", 0),
            "one_device is invalid for one of 2 processes",
        ),
    ],
)
def test_a_command_explains_an_invalid_cluster(flags, variables, message, tmp_path):
    done = launch("train", *TRAIN, f"--workdir={tmp_path}/run", *flags, **variables)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_the_first_process_of_a_container():
    """By default the kernel drops a signal that this process does not handle."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("no permission for a process namespace")
    program = (
        "import os, signal, time; from launch import cli; cli._accept_sigterm();"
        " os.kill(1, signal.SIGTERM); time.sleep(60)"
    )
    done = subprocess.run([*unshare, sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == 143
