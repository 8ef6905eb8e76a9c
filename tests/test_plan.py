"""The description of a run before it starts, and the dry run on synthetic data."""

import json
import os
import pathlib
import re

import keras
import pytest
from small import small_mlp

from bn_keras.data import pipeline, sources
from bn_keras.data.splits import Description
from bn_keras.errors import StorageError, UsageError
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.metrics_log import FINISHED
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training.build import build_model
from bn_keras.training.dry_run import dry_run
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.pitfalls import find_pitfalls
from bn_keras.training.plan import describe_input, describe_length, describe_training
from bn_keras.training.schedule import ExamplesSchedule

PREPARED = (
    pathlib.Path(
        os.environ.get("BN_KERAS_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
    )
    / "tfds"
)


@pytest.fixture
def offline(monkeypatch):
    """Refuses all network access and all preparation of data sets."""

    def refuse(*args, **kwargs):
        raise AssertionError("network access or preparation")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", refuse)


def test_the_description_says_how_far_the_run_is(tmp_path):
    config = small_mlp()
    workdir = tmp_path / "a" / "run"
    described = describe_training(config, workdir)
    assert described["data"] == "digits: part of scikit-learn"
    assert re.fullmatch(
        r"one_device: 1 CPU replica: CPU \(\d+ cores?, [\d.]+ GiB\)", described["devices"]
    )
    assert described["workdir"] == f"{workdir}: new, to step 60"
    assert not list(tmp_path.iterdir())

    run = Workdir(workdir)
    run.create(config, Interface((8, 8, 1), "0123456789"))
    checkpoints = Checkpoints(run.checkpoints, {"model": [keras.Variable(0.0)]})
    checkpoints.save(0)
    assert describe_training(config, workdir)["workdir"] == f"{workdir}: new, to step 60"
    checkpoints.save(25)
    assert (
        describe_training(config, workdir)["workdir"] == f"{workdir}: resuming from step 25 to 60"
    )
    run.metrics.write_text(json.dumps({"step": 60, FINISHED: "0" * 64}) + "\n")
    assert "finished at step 60, nothing to do" in describe_training(config, workdir)["workdir"]
    with pytest.raises(UsageError, match="holds a run of another config, with seed=0"):
        describe_training(small_mlp(seed=1), workdir)


@pytest.mark.parametrize(
    "steps, epochs, described",
    [
        (60, 0.0, "60 steps"),
        (1, 0.0, "1 step"),
        (31_000_000, 40.0, "40 epochs"),
        (1, 1.0, "1 epoch"),
    ],
)
def test_the_length_of_a_run_is_in_the_unit_that_counts(steps, epochs, described):
    config = small_mlp(**{"train.steps": steps, "train.epochs": epochs})
    assert describe_length(config) == described


def test_an_invalid_config_is_an_error_before_anything_is_described(tmp_path):
    for key, value, message in (
        ("train.steps", -5, "train.steps=-5 is invalid: expected a positive integer"),
        ("distribution.strategy", "mirored", "unknown distribution.strategy 'mirored'"),
    ):
        with pytest.raises(UsageError, match=message):
            describe_training(small_mlp(**{key: value}), tmp_path)


def test_a_workdir_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="workdir .*run is invalid: .*file is not a folder"):
        describe_training(small_mlp(), tmp_path / "file" / "run")
    # The tests may run as root, who has every permission.
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(
        StorageError, match=f"run cannot be written: no permission to write {tmp_path}"
    ):
        describe_training(small_mlp(), tmp_path / "run")


@pytest.mark.parametrize(
    "name, described",
    [
        ("synthetic", "synthetic: generated"),
        ("folder", "folder: in DIR"),
        ("imagenet2012", "not prepared; `bn-keras prepare` makes it from the official archives"),
        ("stanford_dogs", "not prepared; TFDS downloads it into DIR/stanford_dogs"),
    ],
)
def test_the_description_says_where_the_data_is(name, described, tmp_path, offline):
    config = small_mlp(**{"data.name": name, "data.data_dir": str(tmp_path)})
    assert described.replace("DIR", str(tmp_path)) in describe_input(config)["data"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["digits", "synthetic", "mnist", "cifar10"])
def test_a_data_set_matches_its_description(name, tmp_path):
    splits = ("train", "validation")
    if name not in sources.NOT_IN_TFDS:
        if not (PREPARED / name).exists():
            pytest.skip(f"no {name} in {PREPARED}: set BN_KERAS_DATA")
        splits = ("train[:1%]+test", "test[95%:]")
    source = sources.open_source(name, str(PREPARED), *splits, 8)
    # In a folder with the prepared set, and in an empty one.
    for data_dir in (str(PREPARED), str(tmp_path)):
        described = sources.describe(name, data_dir, *splits, 8)
        assert described == Description(
            source.train.image_shape,
            len(source.class_names),
            source.train.num_examples,
            source.validation.num_examples,
        )


def test_the_sizes_of_a_data_set_are_a_line():
    assert str(Description((8, 8, 1), 1, 1, 0)) == "1 class, 1 training image, 0 validation images"


def test_unknown_sizes_are_none(tmp_path):
    described = sources.describe("stanford_dogs", str(tmp_path), "train", "test", 0)
    assert described == Description((None, None, 3), 120, None, None)
    with pytest.raises(UsageError, match="no split 'test': it has 'train', 'validation'"):
        sources.describe("imagenet2012", str(tmp_path), "train", "test", 0)


def test_a_dry_run_needs_no_data_set(tmp_path, offline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_mlp(
        **{
            "data.name": "imagenet2012",
            "data.image_size": 6,
            "data.crop": "inception",
            "data.mixup": 0.2,
            "schedule.decay_factor": 0.5,
            "schedule.decay_epochs": 2.0,
        }
    )
    opened = []
    train = pipeline.Data.train_batches

    def train_batches(data, *args, **kwargs):
        opened.append((data.input_shape, data.num_classes, data.num_train_examples))
        return train(data, *args, **kwargs)

    monkeypatch.setattr(pipeline.Data, "train_batches", train_batches)
    network, schedule, step = dry_run(config)
    assert opened == [((6, 6, 3), 1000, 1_281_167)]
    weights = 108 * 100 + 2 * 100 * 100 + 100 * 1000
    assert f"{weights + 3 * 2 * 100 + 1000:,}" in network.splitlines()[-3]
    every = round(2 * 1_281_167 / config.train.global_batch_size)
    assert f"multiplied by 0.5 every {every:,} steps" in schedule
    sizes = "1,000 classes, 1,281,167 training images, 50,000 validation images"
    assert schedule.splitlines()[0] == sizes
    assert "loss" in step and "not finite" not in step
    assert not list(tmp_path.iterdir())


def test_a_dry_run_warns_of_unlikely_settings():
    config = small_mlp(**{"train.global_batch_size": 10, "train.epochs": 40.0})
    _, _, warning, _ = dry_run(config)
    assert "BN normalizes only 10 examples together" in warning


def test_a_dry_run_works_for_a_data_set_of_unknown_size(tmp_path, offline):
    config = small_mlp(**{"data.name": "cifar100", "data.data_dir": str(tmp_path)})
    network, schedule, step = dry_run(config)
    assert "are known once cifar100 is prepared" in schedule and "loss" in step
    unknown = "an unknown number of training images, an unknown number of validation images"
    assert schedule.startswith(f"100 classes, {unknown}\n")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"evaluation.global_batch_size": 0}, "evaluation.global_batch_size=0 is invalid"),
        ({"data.train_split": "tarin"}, "no split 'tarin'"),
        ({"data.crop": "random"}, "unknown data.crop 'random': expected one of inception"),
        ({"record.layer": "nowhere"}, "unknown record.layer 'nowhere'"),
        ({"record.layer": "bn_1", "record.unit": 10**6}, "record.unit=1000000 is invalid: the inp"),
    ],
)
def test_a_dry_run_finds_invalid_settings(overrides, message):
    with pytest.raises(UsageError, match=message):
        list(dry_run(small_mlp(**overrides)))


@pytest.mark.parametrize(
    "settings, replicas, size, advised",
    [
        # As in the ImageNet configs, which have 6,000,000 steps of 32 images.
        (
            {"train.global_batch_size": 32, "train.steps": 6_000_000},
            8,
            "4 examples together (train.global_batch_size=32 on 8 replicas)",
            "set train.global_batch_size=256 and train.steps=750000 (the learning rate becomes 8"
            " times as high), or batch_norm.synchronized=True",
        ),
        (
            {"train.global_batch_size": 32, "train.epochs": 3.0},
            4,
            "8 examples together (train.global_batch_size=32 on 4 replicas)",
            "set train.global_batch_size=128 (the learning rate becomes 4 times as high), or"
            " batch_norm.synchronized=True",
        ),
        (
            {"train.global_batch_size": 8, "train.steps": 60},
            1,
            "8 examples together (train.global_batch_size=8)",
            "set train.global_batch_size=32 and train.steps=15 (the learning rate becomes 4 times"
            " as high)",
        ),
        # Synchronized statistics would still be those of 8 examples.
        (
            {"train.global_batch_size": 8, "train.epochs": 3.0},
            8,
            "1 example together (train.global_batch_size=8 on 8 replicas)",
            "set train.global_batch_size=256 (the learning rate becomes 32 times as high)",
        ),
        (
            {
                "train.global_batch_size": 64,
                "train.micro_batches": 8,
                "train.epochs": 3.0,
                "batch_norm.synchronized": True,
            },
            2,
            "8 examples together (train.global_batch_size=64 in 8 micro-batches)",
            "set train.global_batch_size=256 (the learning rate becomes 4 times as high)",
        ),
        (
            {"train.global_batch_size": 64, "batch_norm.virtual_batch_size": 8},
            2,
            "8 examples together (batch_norm.virtual_batch_size=8)",
            "set a larger batch_norm.virtual_batch_size, or batch_norm.synchronized=True",
        ),
        (
            {
                "train.global_batch_size": 16,
                "train.epochs": 3.0,
                "batch_norm.virtual_batch_size": 4,
            },
            2,
            "4 examples together (train.global_batch_size=16 on 2 replicas)",
            "set train.global_batch_size=64 and batch_norm.virtual_batch_size=0 (the learning rate"
            " becomes 4 times as high)",
        ),
        ({"train.global_batch_size": 256}, 8, None, None),
        ({"train.global_batch_size": 32, "batch_norm.synchronized": True}, 8, None, None),
        ({"train.global_batch_size": 32, "model.variant": "baseline"}, 8, None, None),
        ({"train.global_batch_size": 128, "train.micro_batches": 4}, 2, None, None),
        ({"train.global_batch_size": 64, "batch_norm.virtual_batch_size": 16}, 2, None, None),
    ],
)
def test_small_mini_batches_of_bn_are_warned_of(settings, replicas, size, advised):
    config = small_mlp(**{"population.when": "end"} | settings)
    model = build_model(config, (8, 8, 1), 10)
    lines = find_pitfalls(config, ExamplesSchedule(0.1, 60), model, replicas)
    statistics = "and the statistics of fewer than 16 are noisy: in a new workdir"
    assert lines == ([f"BN normalizes only {size}, {statistics}, {advised}"] if size else [])


@pytest.mark.parametrize(
    "micro_batches, steps, warns", [(1, 16, True), (4, 16, False), (4, 4, True)]
)
def test_initial_moving_statistics_fade_with_each_micro_batch(micro_batches, steps, warns):
    settings = {"train.micro_batches": micro_batches, "train.steps": steps}
    config = small_mlp(**{"train.global_batch_size": 128} | settings)
    model = build_model(config, (8, 8, 1), 10)
    lines = find_pitfalls(config, ExamplesSchedule(0.1, 128), model)
    # 0.9 ** 16 is 19%, and 0.75 ** 16 is 1%.
    advice = "19% of the average is still the initial value"
    assert any(advice in line and "momentum=0.75 instead" in line for line in lines) == warns


@pytest.mark.parametrize("key, value", [("dropout", 0.5), ("width", 2.0), ("modules", ("3a",))])
def test_settings_without_effect_on_the_mlp_are_refused(key, value):
    message = rf"model.{key}=.* has no effect on model.name='mlp': leave it at"
    with pytest.raises(UsageError, match=message):
        build_model(small_mlp(**{f"model.{key}": value}), (8, 8, 1), 10)


def test_frozen_bn_has_no_mini_batch():
    config = small_mlp(**{"train.global_batch_size": 8, "population.when": "end"})
    model = build_model(config, (8, 8, 1), 10)
    model.trainable = False
    assert not find_pitfalls(config, ExamplesSchedule(0.1, 60), model)


def test_the_log_of_a_training_warns_of_small_mini_batches(tmp_path, caplog):
    settings = {
        "distribution.strategy": "mirrored",
        "distribution.replicas": 2,
        "train.global_batch_size": 20,
        "train.steps": 1,
    }
    train_and_evaluate(small_mlp(**settings), tmp_path)
    assert "BN normalizes only 10 examples together" in caplog.text
