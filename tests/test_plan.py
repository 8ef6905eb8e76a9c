"""What is told of a training before it begins, and its try on made-up data."""

import json
import os
import pathlib

import keras
import pytest
from small import small_mlp

from bn_keras.data import pipeline, sources
from bn_keras.errors import UsageError
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.workdir import Workdir
from bn_keras.training.dry_run import dry_run
from bn_keras.training.plan import describe, plan

PREPARED = (
    pathlib.Path(
        os.environ.get("BN_KERAS_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
    )
    / "tfds"
)


@pytest.fixture
def offline(monkeypatch):
    """Nothing is asked of the network, and nothing is prepared."""

    def refuse(*args, **kwargs):
        raise AssertionError("it was to do without")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("tensorflow_datasets.core.DatasetBuilder.download_and_prepare", refuse)


def test_it_tells_where_the_run_stands(tmp_path):
    config = small_mlp()
    workdir = tmp_path / "a" / "run"
    told = plan(config, workdir)
    assert told["data"] == "digits: comes with scikit-learn"
    assert told["devices"] == "one_device: 1 CPU replica(s)"
    assert told["workdir"] == f"{workdir}: new, to step 60"
    assert not list(tmp_path.iterdir())

    run = Workdir(workdir)
    run.create(config, (8, 8, 1), "0123456789")
    checkpoints = Checkpoints(run.checkpoints, {"model": [keras.Variable(0.0)]})
    checkpoints.save(0)
    assert plan(config, workdir)["workdir"] == f"{workdir}: new, to step 60"
    checkpoints.save(25)
    assert plan(config, workdir)["workdir"] == f"{workdir}: goes on from step 25 to 60"
    run.metrics.write_text(json.dumps({"step": 60, Workdir.FINISHED: "0" * 64}) + "\n")
    assert "finished at step 60, nothing is left to do" in plan(config, workdir)["workdir"]
    with pytest.raises(UsageError, match="holds a run of another config, with seed=0"):
        plan(small_mlp(seed=1), workdir)


def test_a_workdir_below_a_file_or_a_locked_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written: .*file is not yours to write to"):
        plan(small_mlp(), tmp_path / "file" / "run")
    # Whoever runs this may be root, who may do anything.
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UsageError, match=f"run can't be written: {tmp_path} is not yours"):
        plan(small_mlp(), tmp_path / "run")


@pytest.mark.parametrize(
    "name, told",
    [
        ("synthetic", "synthetic: made up"),
        ("folder", "folder: in DIR"),
        ("imagenet2012", "not there: launch.prepare makes it from archives"),
        ("stanford_dogs", "not there: to be downloaded and prepared in DIR/stanford_dogs"),
    ],
)
def test_it_tells_where_the_data_is(name, told, tmp_path, offline):
    config = small_mlp(**{"data.name": name, "data.data_dir": str(tmp_path)})
    assert told.replace("DIR", str(tmp_path)) in describe(config)["data"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["digits", "synthetic", "mnist", "cifar10"])
def test_a_set_is_what_was_told_of_it(name, tmp_path):
    splits = ("train", "validation")
    if name not in sources.EMBEDDED:
        if not (PREPARED / name).exists():
            pytest.skip(f"no {name} in {PREPARED}: set BN_KERAS_DATA")
        splits = ("train[:1%]+test", "test[95%:]")
    source = sources.open_source(name, str(PREPARED), *splits, 8)
    # Both where the set is, and where it is not.
    for data_dir in (str(PREPARED), str(tmp_path)):
        told = sources.describe(name, data_dir, *splits, 8)
        assert told == sources.Description(
            source.train.image_shape,
            len(source.class_names),
            source.train.num_examples,
            source.validation.num_examples,
        )


def test_what_nobody_knows_is_not_told(tmp_path):
    told = sources.describe("stanford_dogs", str(tmp_path), "train", "test", 0)
    assert told == sources.Description((None, None, 3), 120, None, None)
    with pytest.raises(UsageError, match="no split 'test': it has 'train', 'validation'"):
        sources.describe("imagenet2012", str(tmp_path), "train", "test", 0)


def test_a_dry_run_without_imagenet(tmp_path, offline, monkeypatch):
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
    taken = []
    take = pipeline.Data.train_batches

    def train_batches(data, *args, **kwargs):
        taken.append((data.input_shape, data.num_classes, data.num_train_examples))
        return take(data, *args, **kwargs)

    monkeypatch.setattr(pipeline.Data, "train_batches", train_batches)
    network, schedule, step = dry_run(config)
    assert taken == [((6, 6, 3), 1000, 1_281_167)]
    weights = 108 * 100 + 2 * 100 * 100 + 100 * 1000
    assert f"{weights + 3 * 2 * 100 + 1000:,}" in network.splitlines()[-3]
    every = round(2 * 1_281_167 / config.train.global_batch_size)
    assert f"times 0.5 every {every:,} steps" in schedule
    assert "loss" in step and "not finite" not in step
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_set_that_nobody_knows_the_size_of(tmp_path, offline):
    config = small_mlp(**{"data.name": "cifar100", "data.data_dir": str(tmp_path)})
    network, schedule, step = dry_run(config)
    assert "shows when cifar100 is prepared" in schedule and "loss" in step


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"evaluation.global_batch_size": 0}, "evaluation.global_batch_size is 0"),
        ({"data.train_split": "tarin"}, "no split 'tarin'"),
        ({"data.crop": "random"}, "data.crop is 'random'"),
    ],
)
def test_a_dry_run_finds_what_a_training_would(overrides, message):
    with pytest.raises(UsageError, match=message):
        list(dry_run(small_mlp(**overrides)))
