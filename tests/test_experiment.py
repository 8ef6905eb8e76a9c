"""Runs that belong together: each is made once, and one that diverges stops none of the others."""

import os

import pytest
from small import small_mlp

from bn_keras.errors import UsageError
from bn_keras.experiments import run_all as experiment
from bn_keras.runs.workdir import Workdir

FEW = {"train.steps": 4}


def test_every_run_is_made_once_and_divergence_is_a_result(tmp_path, monkeypatch):
    configs = {
        "Good One": small_mlp(**FEW),
        "bad": small_mlp(**FEW, **{"model.variant": "baseline", "schedule.base_rate": 1e38}),
        "good-two": small_mlp(**FEW, seed=1),
    }
    first = experiment.run_all(configs, tmp_path, parallel=1)
    assert list(first) == [run.title for run in first.values()] == list(configs)
    assert [bool(run.diverged_at) for run in first.values()] == [False, True, False]
    assert {p.name for p in tmp_path.iterdir()} == {"good_one", "bad", "good_two"}
    good, _, other = first.values()
    assert good.metrics[-1][Workdir.FINISHED] != other.metrics[-1][Workdir.FINISHED]

    monkeypatch.setattr("bn_keras.data.pipeline.open_data", None)
    assert experiment.run_all(configs, tmp_path) == first


def test_side_by_side_a_run_learns_what_it_learns_alone(tmp_path):
    bad = small_mlp(**FEW, **{"model.variant": "baseline", "schedule.base_rate": 1e38})
    configs = {"good": small_mlp(**FEW), "bad": bad}
    together = experiment.run_all(configs, tmp_path / "together")
    alone = experiment.run_all({"good": configs["good"]}, tmp_path / "alone", parallel=1)

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


def test_a_folder_of_another_run_is_told_before_anything_is_trained(tmp_path):
    experiment.run_all({"two": small_mlp(**FEW)}, tmp_path)
    configs = {"one": small_mlp(**FEW), "two": small_mlp(**FEW, seed=1)}
    with pytest.raises(UsageError, match="another config, with seed=0"):
        experiment.run_all(configs, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_what_cannot_be_meant_is_not_taken_for_divergence(tmp_path):
    with pytest.raises(UsageError, match="tiny"):
        experiment.run_all({"wrong": small_mlp(**{"data.crop": "tiny"})}, tmp_path)
