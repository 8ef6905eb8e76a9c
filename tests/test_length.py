"""The length of a run: epochs, early stopping, extension, other settings on a resume."""

import json
import logging
import re

import absl.logging
import pytest
from small import killed_after_a_loop, small_mlp

from bn_keras.errors import UsageError
from bn_keras.inference.loading import load_trained
from bn_keras.models import SigmoidMLP
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.workdir import Workdir
from bn_keras.training import plan
from bn_keras.training.length import early_stop_reason, finish_reason, num_steps
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.pitfalls import find_pitfalls
from bn_keras.training.schedule import ExamplesSchedule

SHORT = {"train.steps": 4, "train.steps_per_loop": 2, "evaluation.every_steps": 2}


@pytest.fixture(autouse=True)
def log_everything():
    """Lets absl pass on INFO lines, whatever an earlier test has set."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    yield
    absl.logging.set_verbosity(verbosity)


def short(**overrides):
    return small_mlp(**SHORT | overrides)


def saved(workdir):
    return Workdir(workdir).read_config()


@pytest.mark.parametrize(
    "epochs, examples, batch, steps",
    [(3.0, 96, 32, 9), (1.0, 97, 32, 4), (0.1, 10, 1, 1), (0.001, 10, 5, 1), (0.0, 96, 32, 7)],
)
def test_epochs_are_converted_to_steps(epochs, examples, batch, steps):
    config = small_mlp(
        **{"train.epochs": epochs, "train.steps": 7, "train.global_batch_size": batch}
    )
    assert num_steps(config, examples) == steps


@pytest.mark.parametrize(
    "settings, best, since, expected",
    [
        ({}, 1.0, 100, ""),
        ({"train.patience": 3}, 0.5, 2, ""),
        ({"train.patience": 3}, 0.5, 3, "no accuracy above 0.5000 in 3 evaluations"),
        ({"train.until_accuracy": 0.9}, 0.89, 0, ""),
        ({"train.until_accuracy": 0.9}, 0.9, 0, "reached train.until_accuracy=0.9"),
    ],
)
def test_the_reasons_of_an_early_stop(settings, best, since, expected):
    reason = early_stop_reason(best, since, small_mlp(**settings))
    assert expected in reason and bool(expected) == bool(reason)


def test_a_finished_run_is_extended_and_equals_a_longer_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    long = train_and_evaluate(short(**{"train.steps": 8}), tmp_path / "long")
    train_and_evaluate(short(), tmp_path / "run")
    extended = short(**{"train.steps": 8})
    assert "extending from step 4 to 8" in plan.describe_progress(
        Workdir(tmp_path / "run"), extended
    )
    last = train_and_evaluate(extended, tmp_path / "run")
    assert last[FINISHED] == long[FINISHED] and last["step"] == 8
    assert "train.steps=8 (was 4)" in caplog.text
    assert saved(tmp_path / "run").train.steps == 8
    assert Workdir(tmp_path / "run").read_environment()[1]["changed"] == {"train.steps": 8}
    # The same command again has nothing to do.
    assert train_and_evaluate(extended, tmp_path / "run") == last
    with pytest.raises(
        UsageError, match="has trained 8 steps, more than the 6 of this config: raise"
    ):
        train_and_evaluate(short(**{"train.steps": 6, "seed": 0}), tmp_path / "run")


def test_an_extended_run_that_was_stopped_is_loaded_at_its_latest_step(tmp_path, monkeypatch):
    """The finished network of the shorter run is in a folder of its own."""
    averaged = {"population.when": "end", "population.num_batches": 1, "checkpoint.every_steps": 2}
    train_and_evaluate(short(**averaged), tmp_path)
    assert load_trained(tmp_path).step == 4
    with killed_after_a_loop(monkeypatch):
        train_and_evaluate(short(**averaged | {"train.steps": 8}), tmp_path)
    network = load_trained(tmp_path)
    assert (network.step, network.statistics) == (6, "moving")


@pytest.mark.parametrize("kept", [False, True])
def test_the_log_says_what_extending_does_to_a_cosine(kept, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cosine = {"schedule.decay": "cosine"}
    train_and_evaluate(short(**cosine), tmp_path)
    longer = cosine | {"train.steps": 8, "schedule.cosine_steps": 4 if kept else 0}
    train_and_evaluate(short(**longer), tmp_path)
    lines = Workdir(tmp_path).read_metrics()
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/loss" in line}
    if kept:
        assert rates[6] == rates[8] == 0
    else:
        assert rates[6] == pytest.approx(0.25, rel=1e-5)  # Half of the cosine, from 0.5.
        assert "the learning rate at step 4 is 0.25 (was 0); schedule.cosine_steps=4" in caplog.text


def test_settings_that_do_not_change_what_is_trained_may_change_on_any_resume(tmp_path):
    expected = train_and_evaluate(short(**{"train.steps": 8}), tmp_path / "other")
    train_and_evaluate(short(**{"train.until_accuracy": 0.001}), tmp_path / "run")
    changed = {
        "checkpoint.keep": 1,
        "checkpoint.every_steps": 3,
        "evaluation.every_steps": 3,
        "evaluation.global_batch_size": 50,
        "data.max_bad_examples": 7,
        "record.layer": "sigmoid_3",
        "record.num_examples": 60,
        "record.every_steps": 3,
        "train.until_accuracy": 0.0,
        "train.steps_per_loop": 3,
        "train.steps": 8,
    }
    last = train_and_evaluate(short(**changed), tmp_path / "run")
    assert last[FINISHED] == expected[FINISHED]
    assert saved(tmp_path / "run").data.max_bad_examples == 7
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 8
    for key, value in {"train.l2": 0.5, "model.variant": "baseline", "seed": 1}.items():
        with pytest.raises(UsageError, match=f"another config, with {key}="):
            Workdir(tmp_path / "run").check(short(**changed | {key: value}))


def test_evaluations_are_counted_in_epochs(tmp_path):
    # 1,442 images are 24.03 steps of 60.
    config = short(**{"train.epochs": 1.0, "evaluation.every_epochs": 0.5})
    train_and_evaluate(config, tmp_path)
    lines = Workdir(tmp_path).read_metrics()
    assert [line["step"] for line in lines if "validation/accuracy" in line] == [13, 25]
    assert saved(tmp_path).evaluation.every_steps == 13


def test_epochs_extend_a_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    # 60 of about 1,300 images.
    fraction = {"train.epochs": 0.1}
    first = train_and_evaluate(short(**fraction), tmp_path)
    config = saved(tmp_path)
    assert first["step"] == config.train.steps == num_steps(short(**fraction), 1297)
    assert f"{first['step']} steps of 60" in caplog.text
    assert finish_reason(Workdir(tmp_path), short(**fraction))
    assert train_and_evaluate(short(**fraction), tmp_path) == first
    last = train_and_evaluate(short(**{"train.epochs": 0.2}), tmp_path)
    assert last["step"] == num_steps(short(**{"train.epochs": 0.2}), 1297) > first["step"]


def test_a_run_stops_early_and_more_patience_extends_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    # Nothing is learned: the first accuracy stays the best.
    nothing = {"schedule.base_rate": 1e-30, "train.l2": 0.0, "batch_norm.momentum": 0.9999999}
    config = short(**nothing | {"train.steps": 20, "train.patience": 2})
    last = train_and_evaluate(config, tmp_path)
    assert last["step"] == 6
    assert re.search(r"\S: stopped at step 6: no accuracy above", caplog.text)
    assert train_and_evaluate(config, tmp_path) == last
    reason = finish_reason(Workdir(tmp_path), config)
    assert reason.startswith("finished at step 6: no accuracy above") and "patience=2" in reason
    patient = short(**nothing | {"train.steps": 20, "train.patience": 4})
    assert train_and_evaluate(patient, tmp_path)["step"] == 10


@pytest.mark.job
def test_other_devices_continue_a_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    synchronized = {"batch_norm.synchronized": True}
    mirrored = {"distribution.strategy": "mirrored", "distribution.replicas": 2}
    expected = train_and_evaluate(short(**synchronized | {"train.steps": 8}), tmp_path / "one")
    train_and_evaluate(short(**synchronized), tmp_path / "both")
    last = train_and_evaluate(
        short(**synchronized | mirrored | {"train.steps": 8}), tmp_path / "both"
    )
    assert "2 replicas instead of 1: synchronized BN computes the same numbers" in caplog.text
    assert last["validation/loss"] == pytest.approx(expected["validation/loss"], rel=1e-4)
    train_and_evaluate(short(**mirrored), tmp_path / "plain")
    train_and_evaluate(short(**{"train.steps": 6}), tmp_path / "plain")
    assert "BN now normalizes 60 examples per replica instead of 30" in caplog.text
    ghosts = {"batch_norm.virtual_batch_size": 15}
    train_and_evaluate(short(**mirrored | ghosts), tmp_path / "ghosts")
    train_and_evaluate(short(**ghosts | {"train.steps": 6}), tmp_path / "ghosts")
    assert "1 replica instead of 2: BN still normalizes 15 examples together" in caplog.text


@pytest.mark.parametrize(
    "settings, steps, expected",
    [
        (dict(decay_factor=0.5, decay_examples=100), 100, 70),
        (dict(decay_factor=0.5, decay_examples=1000), 100, None),
        (dict(), 100, None),
        # The cosine is low in its last steps, as it should be.
        (dict(decay="cosine", cosine_examples=1000), 100, 94),
        (dict(decay="cosine", cosine_examples=200), 100, 19),
    ],
)
def test_the_step_from_which_on_the_rate_vanishes(settings, steps, expected):
    assert ExamplesSchedule(1.0, 10, **settings).vanishes_at(steps) == expected


def test_a_vanishing_rate_and_a_long_average_are_warned_of(tmp_path, caplog):
    settings = {
        "schedule.decay_factor": 0.1,
        "schedule.decay_epochs": 0.02,
        "batch_norm.momentum": 0.99,
    }
    train_and_evaluate(short(**settings | {"train.steps": 8}), tmp_path / "run")
    assert "the learning rate is below 1% of its highest value from step 2 of 8 on" in caplog.text
    assert "the 8 steps of this run: at the end, 92% of the average is still the" in caplog.text
    caplog.clear()
    train_and_evaluate(short(**{"batch_norm.momentum": 0.2}), tmp_path / "other")
    assert "below 1%" not in caplog.text and "the average is" not in caplog.text


@pytest.mark.parametrize(
    "momentum, steps, advised",
    [
        (0.9, 28, "batch_norm.momentum=0.85 instead of 0.9"),
        (0.95, 57, "batch_norm.momentum=0.922 instead of 0.95"),
        (0.9997, 3000, "batch_norm.momentum=0.9985 instead of 0.9997"),
        # A lower momentum would leave almost as much.
        (0.9, 29, None),
        (0.9, 43, None),
    ],
)
def test_the_momentum_that_is_advised_differs_from_the_configs(momentum, steps, advised):
    config = short(**{"batch_norm.momentum": momentum, "train.steps": steps})
    lines = find_pitfalls(config, ExamplesSchedule(0.1, 60), SigmoidMLP("bn"))
    assert [advised in line for line in lines] == ([True] if advised else [])


@pytest.mark.parametrize("has_log", [False, True])
def test_a_training_from_python_shows_its_progress_and_returns_its_files(
    has_log, tmp_path, capsys, caplog
):
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO if has_log else absl.logging.WARNING)
    try:
        result = train_and_evaluate(short(), tmp_path / "run")
    finally:
        absl.logging.set_verbosity(verbosity)
    printed = capsys.readouterr().err
    assert ("run: step 4/4" in printed) == (not has_log)
    assert ("run: step 4/4" in caplog.text) == has_log
    sizes = "run: 10 classes, 1,442 training images, 355 validation images"
    assert sizes in caplog.text if has_log else printed.startswith(sizes), printed
    assert result == Workdir(tmp_path / "run").read_metrics()[-1]
    best = load_trained(result.workdir, best=True)
    assert result.best_network.name == f"step-{best.step}"
    assert result.best_network.with_name(f"step-{best.step}.index").exists()
    assert result.best_accuracy >= result["validation/accuracy"]
    again = train_and_evaluate(short(), tmp_path / "run")
    assert again == result and again.best_network == result.best_network


def test_equal_splits_are_warned_of():
    schedule, model = ExamplesSchedule(0.1, 60), SigmoidMLP("baseline")
    for split, count in (("train", 1), ("validation", 0)):
        config = short(**{"data.train_split": "train", "data.validation_split": split})
        lines = find_pitfalls(config, schedule, model)
        assert len([line for line in lines if "are both 'train'" in line]) == count
