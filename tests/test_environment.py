"""A run records its software and hardware at each start."""

import subprocess

import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras.errors import StorageError
from bn_keras.report import Run
from bn_keras.runs import environment
from bn_keras.runs.workdir import Workdir
from bn_keras.training.loop import train_and_evaluate


def test_versions_machine_and_commit_are_recorded(tmp_path, monkeypatch):
    recorded = environment.describe.__wrapped__()
    assert recorded["versions"]["tensorflow"] == tf.__version__
    assert recorded["machine"]["cores"] >= 1 and recorded["machine"]["devices"] == ["CPU"]
    assert (environment._CHECKOUT / "bn_keras" / "runs" / "environment.py").is_file()

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(environment, "_CHECKOUT", tmp_path)
    assert environment.describe.__wrapped__()["commit"] is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-m", "first")
    recorded = environment.describe.__wrapped__()
    assert len(recorded["commit"]) == 40 and recorded["modified"] is False
    (tmp_path / "file").write_text("two")
    assert environment.describe.__wrapped__()["modified"] is True
    (tmp_path / ".git" / "index").write_text("damaged")
    recorded = environment.describe.__wrapped__()
    assert len(recorded["commit"]) == 40 and recorded["modified"] is None


def test_each_start_of_a_run_is_recorded(tmp_path):
    config = small_mlp(**{"train.steps": 10, "checkpoint.every_steps": 5})
    train_and_evaluate(config, tmp_path)
    (start,) = Run.read("x", tmp_path).environment
    assert start["step"] == 0 and start["started"] <= start["ended"]
    assert {key: start[key] for key in environment.describe()} == environment.describe()
    # Repeats the last loop, as after a kill.
    run = Workdir(tmp_path)
    run.drop_metrics_after(5)
    (tmp_path / "checkpoints" / "10.npz").unlink(missing_ok=True)
    train_and_evaluate(config, tmp_path)
    first, second = Run.read("x", tmp_path).environment
    assert first == start and second["step"] in (5, 10)
    assert Run.read("x", tmp_path).wall_seconds >= 0


def test_an_end_is_recorded_after_any_error(tmp_path):
    run = Workdir(tmp_path)
    with pytest.raises(ZeroDivisionError), run.recording_start(3, {"commit": None}):
        (begun,) = run.read_environment()
        assert begun["ended"] is None
        raise ZeroDivisionError
    assert run.read_environment()[0]["ended"]
    (tmp_path / "environment.json").write_text("{")
    assert run.read_environment() == []
    assert Run("x", None, [], [begun]).wall_seconds == 0


def test_a_worker_other_than_the_chief_records_nothing(tmp_path):
    run = Workdir(tmp_path)
    run.writes = False
    with run.recording_start(0, {}):
        pass
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_reported(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bn_keras.storage.write_atomically", full)
    with (
        pytest.raises(StorageError, match="No space left"),
        Workdir(tmp_path).recording_start(0, {}),
    ):
        pass
