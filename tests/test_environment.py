"""A run says with what, and where, it was made, at each of its starts."""

import subprocess

import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras.errors import UsageError
from bn_keras.report import Run
from bn_keras.runs import environment
from bn_keras.runs.workdir import Workdir
from bn_keras.training.loop import train_and_evaluate


def test_what_it_says(tmp_path, monkeypatch):
    said = environment.describe.__wrapped__()
    assert said["versions"]["tensorflow"] == tf.__version__
    assert said["machine"]["cores"] >= 1 and said["machine"]["devices"] == ["CPU"]

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.describe.__wrapped__()["commit"] is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-m", "first")
    said = environment.describe.__wrapped__()
    assert len(said["commit"]) == 40 and said["modified"] is False
    (tmp_path / "file").write_text("two")
    assert environment.describe.__wrapped__()["modified"] is True


def test_each_start_of_a_run_is_noted(tmp_path):
    config = small_mlp(**{"train.steps": 10, "checkpoint.every_steps": 5})
    train_and_evaluate(config, tmp_path)
    (start,) = Run.read("x", tmp_path).environment
    assert start["step"] == 0 and start["started"] <= start["ended"]
    assert {key: start[key] for key in environment.describe()} == environment.describe()
    # The last loop again, as after a kill.
    run = Workdir(tmp_path)
    run.drop_metrics_after(5)
    (tmp_path / "checkpoints" / "10.npz").unlink(missing_ok=True)
    train_and_evaluate(config, tmp_path)
    first, second = Run.read("x", tmp_path).environment
    assert first == start and second["step"] in (5, 10)
    assert Run.read("x", tmp_path).wall_seconds >= 0


def test_an_end_is_noted_whatever_it_is(tmp_path):
    run = Workdir(tmp_path)
    with pytest.raises(ZeroDivisionError), run.noting_start(3, {"commit": None}):
        (begun,) = run.read_environment()
        assert begun["ended"] is None
        raise ZeroDivisionError
    assert run.read_environment()[0]["ended"]
    (tmp_path / "environment.json").write_text("{")
    assert run.read_environment() == []
    assert Run("x", None, [], [begun]).wall_seconds == 0


def test_a_worker_that_does_not_write_notes_nothing(tmp_path):
    run = Workdir(tmp_path)
    run.writes = False
    with run.noting_start(0, {}):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bn_keras.runs.workdir.write_atomically", full)
    with pytest.raises(UsageError, match="No space left"), Workdir(tmp_path).noting_start(0, {}):
        pass
