"""The trainer learns, resumes to the bit, and stops cleanly where it has to."""

import functools
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras import train
from bn_keras.data import pipeline
from bn_keras.errors import TrainingDivergedError, UsageError
from bn_keras.evaluate import evaluate_networks
from bn_keras.models import SigmoidMLP, inception
from bn_keras.population import estimate_population_statistics
from bn_keras.train import train_and_evaluate
from bn_keras.trainer import Trainer
from bn_keras.trained import load_trained
from bn_keras.workdir import Workdir
from configs import default, digits_bn_x5


@pytest.fixture
def short_figure_5(monkeypatch):
    """Three modules in place of ten, since most of a short run's time goes into the graph."""
    rows = [row for row in inception.FIGURE_5 if row.name in ("3a", "4e", "5b")]
    monkeypatch.setattr(inception, "FIGURE_5", rows)


TWO_REPLICAS = {"distribution.strategy": "mirrored", "distribution.replicas": 2}
BY_POPULATION = {"population.when": "evaluations", "population.num_batches": 2}


def small_inception(**overrides):
    """A narrow BN network that has dropout and distortions, on two replicas."""
    config = digits_bn_x5.get_config().copy_and_resolve_references()
    config.model.width = 0.03
    config.model.dropout = 0.3
    config.train.steps = 4
    config.train.steps_per_loop = 2
    config.train.global_batch_size = 8
    config.evaluation.every_steps = 2
    config.checkpoint.every_steps = 2
    config.update_from_flattened_dict(overrides)
    return config


def kill_after(monkeypatch, steps):
    """Makes the trainer stop between two loops once it has taken so many steps."""
    take_steps, taken = Trainer.train, 0

    def killed(self, batches, num_steps):
        nonlocal taken
        taken += num_steps
        if taken > steps:
            raise KeyboardInterrupt
        return take_steps(self, batches, num_steps)

    monkeypatch.setattr(Trainer, "train", killed)


def interrupt(*_):
    raise KeyboardInterrupt


def lines_without_times(workdir):
    lines = Workdir(workdir).read_metrics()
    return [{k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines]


def test_a_run_learns_and_writes_what_it_did(tmp_path):
    config = small_mlp()
    last = train_and_evaluate(config, tmp_path)
    assert last["validation/accuracy"] > 0.8
    assert last["step"] == 60 and last["examples"] == 3600
    lines = Workdir(tmp_path).read_metrics()
    assert lines[-1] == last and len(last["variables_sha256"]) == 64
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0] / 2
    assert [line["step"] for line in lines if "train/loss" in line] == [10, 20, 25, 30, 40, 50, 60]
    assert [line["step"] for line in lines if "validation/accuracy" in line] == [20, 40, 60]
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "make_config, killed_after",
    [
        (small_mlp, 33),
        (small_inception, 3),
        (functools.partial(small_mlp, **TWO_REPLICAS, **BY_POPULATION), 33),
    ],
    ids=[
        "mlp on one device",
        "inception with dropout on two replicas",
        "mlp on two replicas, evaluated by population statistics",
    ],
)
def test_killed_and_resumed_equals_never_killed(
    make_config, killed_after, tmp_path, monkeypatch, short_figure_5
):
    unbroken = train_and_evaluate(make_config(), tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, killed_after)
        train_and_evaluate(make_config(), tmp_path / "resumed")
    assert 0 < lines_without_times(tmp_path / "resumed")[-1]["step"] < unbroken["step"]
    resumed = train_and_evaluate(make_config(), tmp_path / "resumed")
    assert resumed["variables_sha256"] == unbroken["variables_sha256"]
    assert lines_without_times(tmp_path / "resumed") == lines_without_times(tmp_path / "unbroken")


@pytest.mark.parametrize("devices", [{}, TWO_REPLICAS], ids=["one device", "two replicas"])
def test_population_statistics_leave_the_training_alone(devices, tmp_path):
    """A long memory, of which 60 steps fill the half: what is moving is far behind."""
    lines, hashes = {}, set()
    for when in ("never", "end", "evaluations"):
        config = small_mlp(
            **devices,
            **{"population.when": when, "population.num_batches": 10, "batch_norm.momentum": 0.99},
        )
        last = train_and_evaluate(config, tmp_path / when)
        hashes.add(last["variables_sha256"])
        lines[when] = [
            [line for line in lines_without_times(tmp_path / when) if name in line]
            for name in ("train/loss", "validation/loss")
        ]
        (evaluated,) = evaluate_networks([tmp_path / when])
        assert evaluated["statistics"] == last["validation/statistics"]
        assert evaluated["loss"] == pytest.approx(last["validation/loss"], rel=1e-6)
    assert len(hashes) == 1
    assert lines["never"][0] == lines["end"][0] == lines["evaluations"][0]

    never, end, evaluations = (lines[when][1] for when in lines)
    names = [[line["validation/statistics"] for line in run] for run in (never, end, evaluations)]
    assert names == [["moving"] * 3, ["moving", "moving", "population"], ["population"] * 3]
    assert end[:2] == never[:2]
    assert end[2]["validation/loss"] == evaluations[2]["validation/loss"]
    for moving, population in zip(never, evaluations, strict=True):
        assert population["validation/accuracy"] > moving["validation/accuracy"] + 0.3


def test_the_finished_network_has_the_population_statistics(tmp_path):
    """They are those of the first batches of the training, of whatever may be loaded of a run."""
    config = small_mlp(**BY_POPULATION, **{"batch_norm.momentum": 0.99})
    train_and_evaluate(config, tmp_path)
    data = pipeline.open_data(config.data, seed=config.seed)
    batches = data.train_batches(tf.distribute.get_strategy(), config.train.global_batch_size)
    finished = load_trained(tmp_path)
    assert (finished.step, finished.statistics) == (60, "population")
    report = estimate_population_statistics(finished.model, batches, 2)
    assert max(row.mean_distance_largest for row in report.rows) < 1e-5
    shutil.rmtree(tmp_path / "population")
    checkpoint = load_trained(tmp_path)
    assert (checkpoint.step, checkpoint.statistics) == (60, "moving")
    report = estimate_population_statistics(checkpoint.model, batches, 2)
    assert min(row.mean_distance_largest for row in report.rows) > 0.1


def test_killed_between_the_last_checkpoint_and_the_last_line(tmp_path, monkeypatch):
    config = small_mlp(**BY_POPULATION)
    unbroken = train_and_evaluate(config, tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_digest", interrupt)
        train_and_evaluate(config, tmp_path / "resumed")
    assert load_trained(tmp_path / "resumed").statistics == "population"
    assert train_and_evaluate(config, tmp_path / "resumed") == unbroken


def test_an_unfinished_run_is_evaluated_as_its_config_has_it(tmp_path, monkeypatch):
    config = small_mlp(**BY_POPULATION)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 40)
        train_and_evaluate(config, tmp_path)
    (found,) = evaluate_networks([tmp_path])
    assert (found["step"], found["statistics"]) == (25, "population")
    config = config.copy_and_resolve_references()
    config.population.when = "never"
    (by_moving,) = evaluate_networks([tmp_path], config)
    assert by_moving["statistics"] == "moving" and by_moving["loss"] != found["loss"]


def test_another_seed_is_another_run(tmp_path):
    hashes = {
        train_and_evaluate(small_mlp(seed=seed, **{"train.steps": 2}), tmp_path / str(seed))[
            "variables_sha256"
        ]
        for seed in (0, 1)
    }
    assert len(hashes) == 2


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    config = small_mlp(**{"train.steps": 5})
    last = train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(pipeline, "open_data", None)
    assert train_and_evaluate(config, tmp_path) == last


def test_two_replicas_with_synchronized_bn_equal_one(tmp_path):
    shared = {"batch_norm.synchronized": True, "train.steps": 10, "evaluation.every_steps": 10}
    one = train_and_evaluate(small_mlp(**shared), tmp_path / "one")
    two = train_and_evaluate(small_mlp(**shared, **TWO_REPLICAS), tmp_path / "two")
    # The same sums in another order, amplified by ten steps at a rate of one half.
    assert two["validation/loss"] == pytest.approx(one["validation/loss"], rel=1e-4)
    losses = [
        [line.get("train/loss") for line in lines_without_times(tmp_path / n)]
        for n in ("one", "two")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


def test_l2_enters_the_gradient_of_kernels_only():
    model = SigmoidMLP("bn", classes=3, input_shape=(2, 2, 1), units=(4,))
    before = [v.numpy() for v in model.trainable_variables]
    images, labels = tf.zeros([5, 2, 2, 1]), tf.zeros([5], tf.int32)
    steps = []
    for l2 in (0.0, 0.25):
        for variable, value in zip(model.trainable_variables, before, strict=True):
            variable.assign(value)
        optimizer = keras.optimizers.SGD(1.0)
        trainer = Trainer(model, optimizer, tf.distribute.get_strategy(), 5, l2=l2)
        trainer.step(images, labels)
        steps.append(
            [b - v.numpy() for b, v in zip(before, model.trainable_variables, strict=True)]
        )
    for variable, old, plain, penalized in zip(
        model.trainable_variables, before, *steps, strict=True
    ):
        expected = 0.25 * old if variable.name == "kernel" else np.zeros_like(old)
        np.testing.assert_allclose(penalized - plain, expected, atol=1e-6)


def test_divergence_names_step_rate_and_checkpoint(tmp_path):
    # Without BN a rate this high takes the weights to infinity within a few steps.
    config = small_mlp(**{"model.variant": "baseline", "schedule.base_rate": 1e38})
    with pytest.raises(TrainingDivergedError) as caught:
        train_and_evaluate(config, tmp_path)
    message = str(caught.value)
    assert f"at step {caught.value.step} " in message and "learning rate 1e+38" in message
    assert "first of all the " in message and "\n" not in message
    assert message.partition("checkpoint is ")[2].startswith(str(tmp_path / "checkpoints/step-0"))
    assert Workdir(tmp_path).read_metrics()[-1] == {
        "step": caught.value.step,
        "examples": 60 * caught.value.step,
        "diverged": True,
    }


def test_divergence_after_a_checkpoint_names_it(tmp_path, monkeypatch):
    config = small_mlp()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 30)
        train_and_evaluate(config, tmp_path)
    take_steps = Trainer.train

    def diverging(self, batches, num_steps):
        self.model.trainable_variables[0].assign(self.model.trainable_variables[0] * np.inf)
        return take_steps(self, batches, num_steps)

    monkeypatch.setattr(Trainer, "train", diverging)
    with pytest.raises(TrainingDivergedError, match="at step 26 .*checkpoint is .*step-25"):
        train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize("steps, found_at", [(30, 30), (60, 40)], ids=["saved", "evaluated"])
def test_a_network_that_is_not_finite_is_not(steps, found_at, tmp_path, monkeypatch):
    take_steps = Trainer.train

    def overflowing(self, batches, num_steps):
        result = take_steps(self, batches, num_steps)
        if int(self.optimizer.iterations) == found_at:
            self.model.trainable_variables[0].assign(self.model.trainable_variables[0] * np.inf)
        return result

    monkeypatch.setattr(Trainer, "train", overflowing)
    config = small_mlp(**{"train.steps": steps}, **BY_POPULATION)
    with pytest.raises(TrainingDivergedError, match=f"network is not finite at step {found_at}"):
        train_and_evaluate(config, tmp_path)
    names = sorted(p.stem for p in (tmp_path / "checkpoints").glob("*.index"))
    assert names == ["step-0", "step-25"]
    assert Workdir(tmp_path).read_metrics()[-1]["diverged"]


def test_mixed_precision_trains_and_leaves_keras_as_it_was(tmp_path):
    config = small_mlp(**{"train.precision": "mixed_bfloat16"})
    assert train_and_evaluate(config, tmp_path)["validation/accuracy"] > 0.8
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data.name": "digitz"}, "digitz"),
        ({"model.name": "vgg"}, "unknown model.name 'vgg': accepted are inception, mlp"),
        ({"model.variant": "bn_x7"}, "unknown variant 'bn_x7'"),
        ({"model.initializer": "he"}, "unknown model.initializer 'he'"),
        ({"distribution.strategy": "cluster"}, "unknown distribution.strategy 'cluster'"),
        ({"distribution.replicas": 2}, "one_device has one"),
        ({**TWO_REPLICAS, "train.global_batch_size": 61}, "61"),
        ({"train.steps": 0}, "train.steps is 0"),
        ({"train.momentum": -0.5}, "train.momentum is -0.5"),
        ({"train.momentum": 1.5}, "train.momentum is 1.5"),
        ({"train.l2": float("inf")}, "train.l2 is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**33}, "seed is 8589934592"),
        ({"model.width": float("inf")}, "model.width is inf"),
        ({"model.initializer": "constant"}, "unknown model.initializer 'constant'"),
        ({"model.initializer_stddev": -1.0}, "model.initializer_stddev is -1"),
        ({"train.precision": "float8"}, "unknown train.precision 'float8'"),
        ({"schedule.base_rate": float("nan")}, "schedule.base_rate is nan"),
        ({"population.when": "always"}, "unknown population.when 'always': accepted are never"),
        ({"population.num_batches": 0}, "population.num_batches is 0"),
        ({"population.when": "end", "model.variant": "baseline"}, "has no BatchNormalization"),
        ({"model.name": "inception", "model.variant": "bn_x5"}, "at least 32x32"),
    ],
)
def test_a_config_that_cannot_be_meant_leaves_nothing_behind(overrides, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        train_and_evaluate(small_mlp(**overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused_and_kept(tmp_path):
    config = small_mlp(**{"train.steps": 2})
    train_and_evaluate(config, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="another config, with schedule.base_rate=0.5 \\(now 0.25"):
        train_and_evaluate(small_mlp(**{"train.steps": 2, "schedule.base_rate": 0.25}), tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        train_and_evaluate(small_mlp(), tmp_path / "file")
    with pytest.raises(UsageError, match="can't be written: Not a directory"):
        train_and_evaluate(small_mlp(), tmp_path / "file" / "run")


def test_every_key_of_the_config_is_read(tmp_path, monkeypatch, short_figure_5):
    config = small_inception(**{"model.initializer": "normal", "train.steps": 1})
    read = set()
    kind = type(config)
    get = kind.__getitem__

    def recording(self, key):
        read.update((name, key) for name, section in sections.items() if section is self)
        return get(self, key)

    sections = {"": config} | {k: v for k, v in config.items() if isinstance(v, kind)}
    monkeypatch.setattr(kind, "__getitem__", recording)
    # It looks at many keys, but only at what they may be.
    monkeypatch.setattr(train, "_check", lambda config: None)
    monkeypatch.setattr(Workdir, "create", lambda self, *run: self.path.mkdir())
    train_and_evaluate(config, tmp_path / "run")
    monkeypatch.undo()

    schema = default.get_config()
    keys = {("", key) for key in schema} | {
        (name, key)
        for name, section in schema.items()
        if isinstance(section, kind)
        for key in section
    }
    assert keys - read == set()


def test_a_checkpoint_of_another_network_is_one_line(tmp_path):
    train_and_evaluate(small_mlp(**{"train.steps": 2}), tmp_path)
    Workdir(tmp_path).path.joinpath("config.json").unlink()
    other = small_mlp(**{"train.steps": 2, "model.variant": "baseline"})
    Workdir(tmp_path).create(other, (8, 8, 1), "0123456789")
    with pytest.raises(UsageError, match="step-2 does not fit this network") as caught:
        load_trained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["index", "data-00000-of-00001"])
def test_a_truncated_checkpoint_is_one_line(ending, tmp_path):
    config = small_mlp(**{"train.steps": 2})
    train_and_evaluate(config, tmp_path)
    file = tmp_path / "checkpoints" / f"step-2.{ending}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UsageError, match="step-2 .*damaged") as caught:
        load_trained(tmp_path)
    assert "\n" not in str(caught.value)


def test_lost_checkpoints_do_not_cost_the_metrics(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 33)
        train_and_evaluate(small_mlp(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UsageError, match="got to step 30, but its checkpoints are gone"):
        train_and_evaluate(small_mlp(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
