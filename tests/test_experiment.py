"""Runs that belong together: each is made once, and one that diverges stops none of the others."""

import pytest
from small import small_mlp

from bn_keras import experiment
from bn_keras.errors import UsageError
from bn_keras.workdir import Workdir

FEW = {"train.steps": 4}


def test_every_run_is_made_once_and_divergence_is_a_result(tmp_path, monkeypatch):
    configs = {
        "Good One": small_mlp(**FEW),
        "bad": small_mlp(**FEW, **{"model.variant": "baseline", "schedule.base_rate": 1e38}),
        "good-two": small_mlp(**FEW, seed=1),
    }
    first = experiment.run_all(configs, tmp_path)
    assert [run.title for run in first] == list(configs)
    assert [bool(run.diverged_at) for run in first] == [False, True, False]
    assert {p.name for p in tmp_path.iterdir()} == {"good_one", "bad", "good_two"}
    assert first[0].metrics[-1][Workdir.FINISHED] != first[2].metrics[-1][Workdir.FINISHED]

    monkeypatch.setattr("bn_keras.data.pipeline.open_data", None)
    again = experiment.run_all(configs, tmp_path)
    assert [run.metrics for run in again] == [run.metrics for run in first]


def test_what_cannot_be_meant_is_not_taken_for_divergence(tmp_path):
    with pytest.raises(UsageError, match="tiny"):
        experiment.run_all({"wrong": small_mlp(**{"data.crop": "tiny"})}, tmp_path)
