"""Finds the cluster that this process belongs to: the only module that reads its variables.

Sources, the first that is set:
  - TF_CONFIG, as TensorFlow, Kubeflow's TFJob, Vertex AI, Ray and SageMaker write it, and as the
    flags --workers and --worker set it.
  - The variables of a step that Slurm's srun starts.
  - The variables of a SkyPilot task.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bn_keras.distribute.cluster import Cluster, split_address
from bn_keras.errors import UsageError
from bn_keras.text import counted, first_of

# The jobs of TF_CONFIG that train, in the order of the workers.
_TRAINING_JOBS = ("chief", "worker")
_EVALUATOR = "evaluator"
_EXAMPLE = (
    '{"cluster": {"worker": ["HOST1:2222", "HOST2:2222"]}, "task": {"type": "worker", "index": 0}}'
)
# The ports of Slurm's jobs: below Linux's range of ephemeral ports, and a
# different block for each of 625 consecutive jobs, since jobs may share a node.
_SLURM_PORTS = range(10_000, 30_000)
_PORTS_PER_SLURM_JOB = 32
_SKYPILOT_PORT = 2222


def find_cluster() -> Cluster | None:
    """Returns the cluster that the environment describes, or None.

    One worker is a cluster of one.

    Raises:
      UsageError: the variables are invalid, or this process is not a worker.
    """
    if _is_tf_config_set():
        return _from_tf_config()
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return _from_slurm()
    if "SKYPILOT_NODE_IPS" in os.environ:
        return _from_skypilot()
    return None


def require_cluster() -> Cluster:
    """Returns the cluster that the environment describes.

    Raises:
      UsageError: there is none, the variables are invalid, or this process is not a worker.
    """
    cluster = find_cluster()
    if cluster is None:
        raise UsageError(
            "distribution.strategy is multi_worker, but nothing describes the workers: start them"
            " with Slurm's srun or with SkyPilot, pass --workers=HOST1:PORT,HOST2:PORT and"
            f" --worker=INDEX to each, or set TF_CONFIG='{_EXAMPLE}' for each"
        )
    return cluster


def join_cluster(workers: Sequence[str], worker: int) -> None:
    """Makes this process a worker of a cluster, by setting TF_CONFIG.

    Args:
      workers: HOST:PORT of each worker, the chief first; the same for all workers.
      worker: index of this process in `workers`.

    Raises:
      UsageError: an invalid address or index, or TF_CONFIG already describes a cluster.
    """
    if _is_tf_config_set():
        raise UsageError("--workers and TF_CONFIG both describe the cluster: remove one of them")
    _check_addresses(workers, "--workers")
    if not 0 <= worker < len(workers):
        raise UsageError(
            f"--worker={worker} is invalid: expected an index from 0 to {len(workers) - 1} in"
            " --workers"
        )
    task = {"type": "worker", "index": worker}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": list(workers)}, "task": task})


def is_evaluator() -> bool:
    """Returns whether TF_CONFIG makes this process an evaluator, which has nothing to do here.

    The workers evaluate by themselves.

    Raises:
      UsageError: TF_CONFIG is invalid.
    """
    values = _read_tf_config() if _is_tf_config_set() else {}
    return "task" in values and _task(values)[0] == _EVALUATOR


def check_alone(strategy: str) -> None:
    """Checks that this process is not one of several that were started to train together.

    Args:
      strategy: name of a strategy that does not connect workers.

    Raises:
      UsageError: it is one of several; each would train alone, in the same workdir.
    """
    if _is_tf_config_set():
        variable, jobs = "TF_CONFIG", _jobs(_read_tf_config())
        count = sum(len(tasks) for job, tasks in jobs.items() if job != _EVALUATOR)
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        variable, count = "SLURM_STEP_NUM_TASKS", _integer("SLURM_STEP_NUM_TASKS")
    else:
        variable, count = "SKYPILOT_NODE_IPS", len(_skypilot_hosts())
    if count > 1:
        raise UsageError(
            f"distribution.strategy={strategy} is invalid for one of {count:,} processes"
            f" ({variable}): each would train alone; set distribution.strategy=multi_worker, or"
            f" unset {variable} if they are independent"
        )


# TF_CONFIG


def _is_tf_config_set() -> bool:
    return bool(os.environ.get("TF_CONFIG"))


def _from_tf_config() -> Cluster:
    values = _read_tf_config()
    jobs = _jobs(values)
    if unsupported := sorted(job[:30] for job in jobs.keys() - {*_TRAINING_JOBS, _EVALUATOR}):
        raise UsageError(
            f"TF_CONFIG has unsupported tasks ({first_of(unsupported)}): expected chief, worker and"
            " evaluator; training is synchronous, without parameter servers"
        )
    tasks = [(name, i) for name in _TRAINING_JOBS for i in range(len(jobs.get(name, ())))]
    addresses = [jobs[name][i] for name, i in tasks]
    if not addresses:
        raise _invalid_tf_config("it lists no workers")
    _check_addresses(addresses, "TF_CONFIG")
    job, index = _task(values)
    if job == _EVALUATOR:
        raise UsageError(
            "TF_CONFIG makes this process an evaluator, which has nothing to do: the workers"
            " evaluate by themselves"
        )
    if (job, index) not in tasks:
        expected = first_of([f"{name} {i}" for name, i in tasks])
        raise UsageError(
            f"unknown task {job[:100]} {index} in TF_CONFIG: expected one of {expected}"
        )
    return Cluster(tuple(addresses), tasks.index((job, index)), "TF_CONFIG")


def _read_tf_config() -> dict[str, Any]:
    try:
        values = json.loads(os.environ["TF_CONFIG"])
    except ValueError as error:
        raise _invalid_tf_config(f"it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise _invalid_tf_config("it is not a JSON object")
    return values


def _jobs(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the addresses of each job in TF_CONFIG."""
    jobs = values.get("cluster", {})
    if not isinstance(jobs, dict):
        raise _invalid_tf_config('"cluster" is not a JSON object')
    for job, addresses in jobs.items():
        if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
            raise _invalid_tf_config(f'"{job}" is not a list of addresses')
    return jobs


def _task(values: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the job and the index of this process in TF_CONFIG."""
    try:
        return str(values["task"]["type"]), int(values["task"]["index"])
    except (KeyError, TypeError, ValueError):
        raise _invalid_tf_config('"task" lacks a "type" or an integer "index"') from None


def _invalid_tf_config(reason: str) -> UsageError:
    return UsageError(
        f"TF_CONFIG is invalid, {reason}: expected JSON with the HOST:PORT of each worker and the"
        f" task of this process, for example {_EXAMPLE}"
    )


def _check_addresses(addresses: Sequence[str], source: str) -> None:
    """Raises UsageError unless the addresses are different and each is HOST:PORT."""
    for address in addresses:
        try:
            split_address(address)
        except ValueError:
            raise UsageError(
                f"invalid address {address[:100]!r} in {source}: expected HOST:PORT"
            ) from None
    if repeated := [address for address in addresses if addresses.count(address) > 1]:
        raise UsageError(
            f"{source} lists {repeated[0]} more than once: expected a different address for each"
            " worker"
        )


# Slurm


def _from_slurm() -> Cluster:
    """Returns the cluster of the tasks of a Slurm step, in the order of its nodes.

    The index of a task does not use SLURM_PROCID, whose order follows srun's --distribution.
    """
    hosts = expand_host_list(_variable("SLURM_STEP_NODELIST"))
    tasks = _expand_tasks_per_node(_variable("SLURM_STEP_TASKS_PER_NODE"))
    node, local = _integer("SLURM_NODEID"), _integer("SLURM_LOCALID")
    if len(tasks) != len(hosts) or not (node < len(hosts) and local < tasks[node]):
        raise UsageError(
            f"Slurm's variables contradict each other: {counted(len(hosts), 'host')} in"
            f" SLURM_STEP_NODELIST, {counted(len(tasks), 'number')} in SLURM_STEP_TASKS_PER_NODE,"
            f" task {local} of node {node}; start the workers with srun"
        )
    first = _PORTS_PER_SLURM_JOB * _integer("SLURM_JOB_ID") % len(_SLURM_PORTS)
    # Steps of one job that run at the same time use different ports of its block.
    first += _integer("SLURM_STEP_ID") * sum(tasks) % _PORTS_PER_SLURM_JOB
    task_hosts = [host for host, n in zip(hosts, tasks, strict=True) for _ in range(n)]
    addresses = tuple(
        f"{host}:{_SLURM_PORTS[(first + i) % len(_SLURM_PORTS)]}"
        for i, host in enumerate(task_hosts)
    )
    return Cluster(addresses, sum(tasks[:node]) + local, "Slurm")


def expand_host_list(text: str) -> list[str]:
    """Expands Slurm's notation for hosts: "a[1-2,07],b" is a1, a2, a07, b.

    Several brackets in a name, as in "rack[1-2]node[1-4]", and a suffix are allowed.

    Raises:
      UsageError: the text does not follow the notation.
    """
    hosts = []
    if not re.fullmatch(r"([^\[\]]|\[[^\[\]]*\])*", text):
        raise _invalid_hosts(text)
    # Commas inside brackets do not separate hosts.
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        prefixes = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            endings = [literal] if literal else _expand_ranges(ranges, text)
            prefixes = [prefix + ending for prefix in prefixes for ending in endings]
        hosts += prefixes
    return hosts


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise _invalid_hosts(text)
        first, last = match[1], match[2] or match[1]
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def _invalid_hosts(text: str) -> UsageError:
    return UsageError(f"Slurm's host list {text[:100]!r} is invalid: expected a[1-3,5],b")


def _expand_tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's notation for counts: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UsageError(
                f"SLURM_STEP_TASKS_PER_NODE={text[:100]!r} is invalid: expected numbers such as"
                " 2(x3),1"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UsageError(f"{name} is not set, but other variables of Slurm are: start with srun")
    return value


def _integer(name: str) -> int:
    value = _variable(name)
    if not value.isdecimal():
        raise UsageError(f"{name}={value[:100]!r} is invalid: expected a non-negative integer")
    return int(value)


# SkyPilot


def _from_skypilot() -> Cluster:
    hosts = _skypilot_hosts()
    rank = os.environ.get("SKYPILOT_NODE_RANK", "")
    if not (rank.isdecimal() and int(rank) < len(hosts)):
        raise UsageError(
            f"SKYPILOT_NODE_RANK={rank[:100]!r} is invalid: expected an index from 0 to"
            f" {len(hosts) - 1} in SKYPILOT_NODE_IPS"
        )
    addresses = tuple(f"{host}:{_SKYPILOT_PORT}" for host in hosts)
    return Cluster(addresses, int(rank), "SkyPilot")


def _skypilot_hosts() -> list[str]:
    """Returns the addresses of SkyPilot's nodes, one a line; none outside SkyPilot."""
    return os.environ.get("SKYPILOT_NODE_IPS", "").split()
