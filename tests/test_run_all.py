"""Several configs: each network is trained once, and divergence stops no other network."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from small import small_mlp

from bn_keras.errors import UsageError
from bn_keras.experiments import parallel, run_all
from bn_keras.experiments.run_all import list_remaining, read_ended, train_all
from bn_keras.runs.metrics_log import FINISHED

FEW = {"train.steps": 4}


def test_each_network_is_trained_once_and_divergence_is_a_result(tmp_path, monkeypatch):
    configs = {
        "Good One": small_mlp(**FEW),
        "bad": small_mlp(**FEW, **{"model.variant": "baseline", "schedule.base_rate": 1e38}),
        "good-two": small_mlp(**FEW, seed=1),
    }
    first = train_all(configs, tmp_path, max_parallel=1)
    assert list(first) == [run.title for run in first.values()] == list(configs)
    assert [bool(run.diverged_at) for run in first.values()] == [False, True, False]
    assert {p.name for p in tmp_path.iterdir()} == {"good_one", "bad", "good_two"}
    good, _, other = first.values()
    assert good.metrics[-1][FINISHED] != other.metrics[-1][FINISHED]

    monkeypatch.setattr("bn_keras.data.pipeline.open_data", None)
    assert train_all(configs, tmp_path) == first
    assert [plan.steps for plan in list_remaining(configs, tmp_path)] == [0, 0, 0]
    assert read_ended(configs, tmp_path) == first
    # A run of a version without some setting is reported, but not one with another value.
    saved = tmp_path / "bad" / "config.json"
    older = json.loads(saved.read_text())
    del older["train"]["label_smoothing"]
    saved.write_text(json.dumps(older))
    assert list(read_ended(configs, tmp_path)) == list(first)
    with pytest.raises(UsageError, match="has no train.label_smoothing"):
        train_all(configs, tmp_path)
    with pytest.raises(UsageError, match="another config, with .*train.l2=0.0"):
        read_ended({"bad": small_mlp(**{"train.l2": 0.1})}, tmp_path)
    # Longer and new runs are due, and not reported.
    due = {"Good One": small_mlp(**{"train.steps": 6}), "new": small_mlp(**FEW, seed=2)}
    assert [tuple(plan) for plan in list_remaining(due, tmp_path)] == [
        ("Good One", 2, "extending from step 4 to 6"),
        ("new", 4, "new, to step 4"),
    ]
    assert read_ended(due, tmp_path) == {}
    assert not (tmp_path / "new").exists()


def test_all_configs_are_checked_before_any_training(tmp_path):
    configs = {"good": small_mlp(**FEW), "bad": small_mlp(**FEW, **{"schedule.base_rate": -1.0})}
    for use in (train_all, list_remaining):
        with pytest.raises(UsageError, match="schedule.base_rate=-1.0 is invalid"):
            use(configs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_data_are_prepared_once_before_the_processes_start(tmp_path, monkeypatch):
    """Otherwise each of them would download and prepare the same set."""
    order = []

    def run_tasks(tasks, shares):
        order.append(len(tasks))
        raise InterruptedError

    shares = [parallel.Share((0,), ()), parallel.Share((1,), ())]
    monkeypatch.setattr(run_all, "divide_machine", lambda *arguments: shares)
    monkeypatch.setattr(run_all, "prepare_input", lambda config: order.append(config.data.name))
    monkeypatch.setattr(run_all, "run_tasks", run_tasks)
    configs = {"a": small_mlp(**FEW), "b": small_mlp(**FEW, **{"train.l2": 0.1})}
    with pytest.raises(InterruptedError):
        train_all(configs, tmp_path)
    assert order == ["digits", 2]


@pytest.mark.job
def test_a_parallel_run_equals_a_run_alone(tmp_path):
    bad = small_mlp(**FEW, **{"model.variant": "baseline", "schedule.base_rate": 1e38})
    configs = {"good": small_mlp(**FEW), "bad": bad}
    together = train_all(configs, tmp_path / "together")
    alone = train_all({"good": configs["good"]}, tmp_path / "alone", max_parallel=1)

    def learned(run):
        return [
            {k: v for k, v in line.items() if k != "train/images_per_second"}
            for line in run.metrics
        ]

    assert list(together) == list(configs) and together["bad"].diverged_at
    assert learned(together["good"]) == learned(alone["good"])
    if len(os.sched_getaffinity(0)) > 1:
        cores = [run.environment[0]["machine"]["cores"] for run in together.values()]
        assert max(cores) < len(os.sched_getaffinity(0))


@pytest.mark.job
def test_networks_with_different_replicas_are_trained_in_one_call(tmp_path):
    """Runs in a new process with one CPU device; TensorFlow fixes its devices when it starts."""
    code = f"""
from small import small_mlp
from bn_keras.experiments.run_all import train_all

few = {FEW}
two = {{"distribution.strategy": "mirrored", "distribution.replicas": 2}}
configs = {{"one": small_mlp(**few), "two": small_mlp(**few, **two)}}
runs = train_all(configs, {os.fspath(tmp_path)!r}, max_parallel=1)
assert all(run.is_finished for run in runs.values())"""
    tests = pathlib.Path(__file__).resolve().parent
    path = os.pathsep.join(map(os.fspath, [tests, tests.parent]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_workdirs_are_checked_before_any_training(tmp_path):
    train_all({"two": small_mlp(**FEW)}, tmp_path)
    configs = {"one": small_mlp(**FEW), "two": small_mlp(**FEW, seed=1)}
    with pytest.raises(UsageError, match="another config, with seed=0"):
        train_all(configs, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_an_invalid_config_is_not_mistaken_for_divergence(tmp_path):
    with pytest.raises(UsageError, match="tiny"):
        train_all({"wrong": small_mlp(**{"data.crop": "tiny"})}, tmp_path)
