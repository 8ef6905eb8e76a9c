"""Training learns, resumes bit-exactly and stops cleanly."""

import functools
import os
import re
import shutil
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from small import small_mlp

from bn_keras.data import pipeline
from bn_keras.errors import (
    ResumeError,
    StorageError,
    TrainingDivergedError,
    TrainingStoppedError,
    UsageError,
)
from bn_keras.inference.evaluation import evaluate_networks
from bn_keras.inference.loading import load_trained
from bn_keras.models import SigmoidMLP
from bn_keras.population import estimate_population_statistics
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training import loop, resume_check
from bn_keras.training.config import default_config
from bn_keras.training.evaluator import Evaluator
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.step import Trainer
from configs import digits_bn_x5, digits_inception

# Building the graph is most of a short run's time.
THREE_MODULES = ("3a", "4e", "5b")
TWO_REPLICAS = {"distribution.strategy": "mirrored", "distribution.replicas": 2}
BY_POPULATION = {"population.when": "evaluations", "population.num_batches": 2}
ALL_FEATURES = {
    "train.precision": "mixed_float16",
    "train.micro_batches": 3,
    "train.ema": 0.9,
    "train.label_smoothing": 0.1,
    "train.momentum": 0.9,
    "schedule.base_rate": 0.1,
    "schedule.decay": "cosine",
}


def small_inception(**overrides):
    """A narrow BN network with dropout and distortions, on two replicas."""
    config = digits_bn_x5.get_config().copy_and_resolve_references()
    config.model.width = 0.03
    config.model.modules = THREE_MODULES
    config.model.dropout = 0.3
    config.distribution.strategy, config.distribution.replicas = "mirrored", 2
    config.train.steps = 4
    config.train.steps_per_loop = 2
    config.train.global_batch_size = 8
    config.evaluation.every_steps = 2
    config.checkpoint.every_steps = 2
    config.update_from_flattened_dict(overrides)
    return config


def kill_after(monkeypatch, steps):
    """Interrupts the trainer between two loops after a number of steps."""
    train, done = Trainer.train, 0

    def killed(self, batches, num_steps):
        nonlocal done
        done += num_steps
        if done > steps:
            raise KeyboardInterrupt
        return train(self, batches, num_steps)

    monkeypatch.setattr(Trainer, "train", killed)


def interrupt(*_):
    raise KeyboardInterrupt


def lines_without_times(workdir):
    lines = Workdir(workdir).read_metrics()
    return [{k: v for k, v in line.items() if k != "train/images_per_second"} for line in lines]


def test_a_run_learns_and_records_its_metrics(tmp_path):
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
    assert Workdir(tmp_path).read_config().to_dict() == config.to_dict()
    assert list(tmp_path.glob("events.out.tfevents.*"))


# test_resume.py does the same with Inception, dropout and distortions.
@pytest.mark.parametrize(
    "make_config, killed_after",
    [
        (small_mlp, 33),
        pytest.param(
            functools.partial(small_mlp, **TWO_REPLICAS, **BY_POPULATION, **ALL_FEATURES),
            33,
            marks=pytest.mark.job,
        ),
    ],
    ids=["one device", "two replicas, all features"],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    make_config, killed_after, tmp_path, monkeypatch
):
    uninterrupted = train_and_evaluate(make_config(), tmp_path / "uninterrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, killed_after)
        train_and_evaluate(make_config(), tmp_path / "resumed")
    assert 0 < lines_without_times(tmp_path / "resumed")[-1]["step"] < uninterrupted["step"]
    resumed = train_and_evaluate(make_config(), tmp_path / "resumed")
    assert resumed["variables_sha256"] == uninterrupted["variables_sha256"]
    assert lines_without_times(tmp_path / "resumed") == lines_without_times(
        tmp_path / "uninterrupted"
    )


@pytest.mark.job
def test_population_statistics_do_not_affect_training(tmp_path):
    """With a momentum of 0.99 the moving statistics lag far behind after 60 steps."""
    lines, hashes = {}, set()
    for when in ("never", "end", "evaluations"):
        config = small_mlp(
            **TWO_REPLICAS,
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


def test_the_finished_network_has_population_statistics(tmp_path):
    """The statistics are those of the first training batches."""
    config = small_mlp(**BY_POPULATION, **{"batch_norm.momentum": 0.99})
    train_and_evaluate(config, tmp_path)
    data = pipeline.open_data(config.data, seed=config.seed)
    batches = data.train_batches(tf.distribute.get_strategy(), config.train.global_batch_size)
    finished = load_trained(tmp_path)
    assert (finished.step, finished.statistics) == (60, "population")
    report = estimate_population_statistics(finished.model, batches, 2)
    assert max(row.mean_distance_largest for row in report.rows) < 1e-5
    shutil.rmtree(tmp_path / "finished")
    checkpoint = load_trained(tmp_path)
    assert (checkpoint.step, checkpoint.statistics) == (60, "moving")
    report = estimate_population_statistics(checkpoint.model, batches, 2)
    assert min(row.mean_distance_largest for row in report.rows) > 0.1


def test_a_run_killed_between_the_last_checkpoint_and_the_last_line_resumes(tmp_path, monkeypatch):
    config = small_mlp(**BY_POPULATION)
    uninterrupted = train_and_evaluate(config, tmp_path / "uninterrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "hash", interrupt)
        train_and_evaluate(config, tmp_path / "resumed")
    assert load_trained(tmp_path / "resumed").statistics == "population"
    assert train_and_evaluate(config, tmp_path / "resumed") == uninterrupted


def test_an_unfinished_run_is_evaluated_with_its_configs_statistics(tmp_path, monkeypatch):
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


def test_another_seed_gives_other_weights(tmp_path):
    hashes = {
        train_and_evaluate(small_mlp(seed=seed, **{"train.steps": 2}), tmp_path / str(seed))[
            "variables_sha256"
        ]
        for seed in (0, 1)
    }
    assert len(hashes) == 2


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    config = small_mlp(**{"train.steps": 5})
    last = train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(loop, "build_data", None)
    assert train_and_evaluate(config, tmp_path) == last


def test_two_replicas_with_synchronized_bn_equal_one(tmp_path):
    shared = {"batch_norm.synchronized": True, "train.steps": 10, "evaluation.every_steps": 10}
    one = train_and_evaluate(small_mlp(**shared), tmp_path / "one")
    two = train_and_evaluate(small_mlp(**shared, **TWO_REPLICAS), tmp_path / "two")
    # The sums have another order; ten steps at a rate of one half amplify the rounding.
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
    # Without BN, the weights overflow at this rate within a few steps.
    config = small_mlp(**{"model.variant": "baseline", "schedule.base_rate": 1e38})
    with pytest.raises(TrainingDivergedError) as caught:
        train_and_evaluate(config, tmp_path)
    message = str(caught.value)
    assert f"at step {caught.value.step} " in message and "learning rate 1e+38" in message
    assert "first non-finite tensor: the " in message and "\n" not in message
    assert message.partition("checkpoint is ")[2].startswith(str(tmp_path / "checkpoints/step-0"))
    assert Workdir(tmp_path).read_metrics()[-1] == {
        "step": caught.value.step,
        "examples": 60 * caught.value.step,
        "diverged": True,
    }


def test_a_divergence_names_the_rate_of_its_own_step(tmp_path):
    config = small_mlp(
        **{"model.variant": "baseline", "schedule.base_rate": 1e38, "schedule.warmup_epochs": 1.0}
    )
    assert config.train.steps_per_loop > 2
    with pytest.raises(TrainingDivergedError) as caught:
        train_and_evaluate(config, tmp_path)
    step = caught.value.step
    assert step > 1
    rate = float(re.search(r"learning rate (\S+)\)", str(caught.value))[1])
    # The warm-up is linear over the 1,442 training images.
    assert rate == pytest.approx(1e38 * 60 * step / 1442, rel=1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({}, "at step 2 .*first non-finite tensor: the gradient of "),
        # Steps are skipped until the loss scale is 1.
        (
            {"train.precision": "mixed_float16"},
            "at step 17 .*first non-finite tensor: the gradient of ",
        ),
    ],
    ids=["float32", "mixed_float16"],
)
def test_non_finite_gradients_are_named(overrides, message, tmp_path, monkeypatch):
    """The loss of their step is finite; the weights of the next step are not."""
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits

    @tf.custom_gradient
    def overflowing(labels, logits):
        losses = cross_entropy(labels, logits)
        return losses, lambda dy: (None, tf.fill(tf.shape(logits), np.inf))

    monkeypatch.setattr(tf.nn, "sparse_softmax_cross_entropy_with_logits", overflowing)
    config = small_mlp(**{"evaluation.every_steps": 1000}, **overrides)
    with pytest.raises(TrainingDivergedError, match=message):
        train_and_evaluate(config, tmp_path)


def test_a_diverged_run_is_rolled_back_with_a_lower_rate(tmp_path, monkeypatch):
    """Up to the configured number of retries, counted over all starts of the run."""
    config = small_mlp(
        **{"train.retries": 2, "train.retry_factor": 0.1, "checkpoint.every_steps": 10}
    )
    train, attempts = Trainer.train, []

    def diverging(self, batches, num_steps):
        step = self.optimizer.iterations.numpy()
        if step == 20 and len(attempts) < 2:
            attempts.append(float(self.optimizer.learning_rate))
            self.model.trainable_variables[0].assign(self.model.trainable_variables[0] * np.inf)
        return train(self, batches, num_steps)

    monkeypatch.setattr(Trainer, "train", diverging)
    last = train_and_evaluate(config, tmp_path)
    lines = Workdir(tmp_path).read_metrics()
    assert attempts == pytest.approx([0.5, 0.05])
    retries = [line for line in lines if "retry" in line]
    assert retries == [{"step": 20, "examples": 1200, "retry": number} for number in (1, 2)]
    rates = {
        line["step"]: line.get("train/learning_rate") for line in lines if "train/loss" in line
    }
    assert rates == pytest.approx({10: 0.5, 20: 0.5, 30: 0.005, 40: 0.005, 50: 0.005, 60: 0.005})
    assert last["step"] == 60 and "variables_sha256" in last


def test_the_lower_rate_of_a_rollback_outlasts_the_loss_of_its_checkpoint(tmp_path, monkeypatch):
    config = small_mlp(**{"train.retries": 1, "checkpoint.every_steps": 10})
    train, is_spoiled = Trainer.train, [True]

    def diverging_then_killed(self, batches, num_steps):
        if self.optimizer.iterations.numpy() == 20:
            if not is_spoiled:
                raise KeyboardInterrupt
            is_spoiled.clear()
            self.model.trainable_variables[0].assign(self.model.trainable_variables[0] * np.inf)
        return train(self, batches, num_steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train", diverging_then_killed)
        train_and_evaluate(config, tmp_path)
    (tmp_path / "checkpoints" / "step-20.index").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 20)
        train_and_evaluate(config, tmp_path)
    train_and_evaluate(config, tmp_path)
    lines = Workdir(tmp_path).read_metrics()
    rates = {x["step"]: x["train/learning_rate"] for x in lines if "train/loss" in x}
    assert rates == pytest.approx({10: 0.5, 20: 0.25, 30: 0.25, 40: 0.25, 50: 0.25, 60: 0.25})


@pytest.mark.job
def test_inception_diverges_at_five_times_its_rate_and_bn_does_not(tmp_path):
    """As in section 4.2.2. After a rollback with a lower rate, Inception learns, too.

    0.16 is the highest rate at which this miniature trains without BN.
    """

    def miniature(make_config, rate, **overrides):
        config = make_config().copy_and_resolve_references()
        config.schedule.base_rate = rate
        config.model.modules = THREE_MODULES
        config.train.steps, config.train.steps_per_loop = 80, 40
        config.evaluation.every_steps = config.checkpoint.every_steps = 80
        config.update_from_flattened_dict(overrides)
        return config

    train_and_evaluate(
        miniature(digits_inception.get_config, 0.16, **{"train.steps": 20}), tmp_path / "highest"
    )
    config = miniature(digits_inception.get_config, 5 * 0.16)
    with pytest.raises(
        TrainingDivergedError, match="first non-finite tensor: the .*; the last good"
    ) as caught:
        train_and_evaluate(config, tmp_path / "diverges")
    assert caught.value.step <= 40
    train_and_evaluate(miniature(digits_bn_x5.get_config, 5 * 0.16), tmp_path / "bn")
    config.train.retries, config.train.retry_factor = 1, 0.025
    train_and_evaluate(config, tmp_path / "retries")
    for name in ("bn", "retries"):
        losses = [line.get("train/loss") for line in Workdir(tmp_path / name).read_metrics()]
        assert [loss for loss in losses if loss][-1] < 2.1


def test_training_stops_at_the_target_accuracy(tmp_path, monkeypatch):
    """Also if the run was killed between that evaluation and its end."""
    config = small_mlp(**{"train.until_accuracy": 0.8})
    uninterrupted = train_and_evaluate(config, tmp_path / "uninterrupted")
    accuracies = [
        line["validation/accuracy"]
        for line in Workdir(tmp_path / "uninterrupted").read_metrics()
        if "validation/accuracy" in line
    ]
    assert uninterrupted["step"] == 40 and accuracies[0] < 0.8 <= accuracies[1] == accuracies[2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "hash", interrupt)
        train_and_evaluate(config, tmp_path / "resumed")
    assert train_and_evaluate(config, tmp_path / "resumed") == uninterrupted


def test_the_ema_is_evaluated_and_does_not_affect_training(tmp_path):
    settings = {**TWO_REPLICAS, **BY_POPULATION, "train.steps": 20}
    plain, averaged = (
        train_and_evaluate(small_mlp(**settings, **{"train.ema": ema}), tmp_path / str(ema))
        for ema in (0.0, 0.95)
    )
    assert averaged["validation/weights"] == "averaged" and "validation/weights" not in plain
    assert averaged["validation/loss"] != plain["validation/loss"]
    losses = [
        [
            line["train/loss"]
            for line in Workdir(tmp_path / n).read_metrics()
            if "train/loss" in line
        ]
        for n in ("0.0", "0.95")
    ]
    assert losses[0] == losses[1]
    # The network that is loaded is the one that was evaluated.
    (found,) = evaluate_networks([tmp_path / "0.95"])
    assert found["loss"] == pytest.approx(averaged["validation/loss"], rel=1e-6)


def test_the_ema_of_a_network_without_bn_needs_no_population_statistics(tmp_path):
    config = small_mlp(**{"train.ema": 0.5, "model.variant": "baseline", "train.steps": 20})
    last = train_and_evaluate(config, tmp_path)
    assert last["validation/weights"] == "averaged"
    (found,) = evaluate_networks([tmp_path])
    assert found["loss"] == pytest.approx(last["validation/loss"], rel=1e-6)


def test_a_signal_ends_the_loop_and_saves(tmp_path, monkeypatch):
    uninterrupted = train_and_evaluate(small_mlp(**TWO_REPLICAS), tmp_path / "uninterrupted")
    train = Trainer.train

    def signalled(self, batches, num_steps):
        if self.optimizer.iterations.numpy() == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        result = train(self, batches, num_steps)
        # Lets the listening thread run.
        time.sleep(0.2)
        return result

    with monkeypatch.context() as patch, pytest.raises(TrainingStoppedError) as caught:
        patch.setattr(Trainer, "train", signalled)
        train_and_evaluate(small_mlp(**TWO_REPLICAS), tmp_path / "resumed")
    assert caught.value.signum == signal.SIGTERM
    assert f"stopped by {signal.SIGTERM.name} at step 40 of 60" in str(caught.value)
    assert (tmp_path / "resumed" / "checkpoints" / "step-40.index").exists()
    # The evaluation of step 40 might last longer than the process has left.
    assert not Workdir(tmp_path / "resumed").read_metrics().evaluations(40)
    resumed = train_and_evaluate(small_mlp(**TWO_REPLICAS), tmp_path / "resumed")
    assert resumed == uninterrupted
    assert lines_without_times(tmp_path / "resumed") == lines_without_times(
        tmp_path / "uninterrupted"
    )


def test_a_run_killed_in_an_evaluation_has_saved_and_evaluates_again(tmp_path, monkeypatch):
    config = small_mlp(**{"checkpoint.every_steps": 20})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluator, "__call__", interrupt)
        train_and_evaluate(config, tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoints" / "step-20.index").exists()
    train_and_evaluate(config, tmp_path / "killed")
    train_and_evaluate(config, tmp_path / "uninterrupted")
    assert lines_without_times(tmp_path / "killed") == lines_without_times(
        tmp_path / "uninterrupted"
    )


def test_a_signal_during_an_evaluation_stops_before_the_next_loop(tmp_path, monkeypatch):
    evaluate = Evaluator.__call__

    def kill_and_evaluate(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return evaluate(self)

    monkeypatch.setattr(Evaluator, "__call__", kill_and_evaluate)
    with pytest.raises(TrainingStoppedError, match="at step 20 of 60"):
        train_and_evaluate(small_mlp(), tmp_path)
    assert (tmp_path / "checkpoints" / "step-20.index").exists()
    monkeypatch.undo()
    resumed = train_and_evaluate(small_mlp(), tmp_path)
    assert resumed == train_and_evaluate(small_mlp(), tmp_path / "uninterrupted")


def test_the_best_network_is_that_of_the_best_evaluation(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.7])
    evaluate = Evaluator.__call__

    def with_accuracy(self):
        return [evaluate(self)[0] | {"accuracy": next(accuracies)}]

    monkeypatch.setattr(Evaluator, "__call__", with_accuracy)
    train_and_evaluate(small_mlp(), tmp_path)
    monkeypatch.undo()
    lines = Workdir(tmp_path).read_metrics()
    loss = [line["validation/loss"] for line in lines if line.get("validation/accuracy") == 0.9]
    best = load_trained(tmp_path, best=True)
    assert best.step == 40 and load_trained(tmp_path).step == 60
    (found,) = evaluate_networks([tmp_path], best=True)
    assert [found["loss"]] == pytest.approx(loss, rel=1e-6)


def test_a_profile_is_written_and_changes_nothing(tmp_path):
    config = small_mlp(**{"train.steps": 20})
    plain = train_and_evaluate(config, tmp_path / "plain")
    profiled = train_and_evaluate(config, tmp_path / "profiled", profile_steps=4)
    assert profiled == plain
    assert list((tmp_path / "profiled").rglob("*.xplane.pb"))
    assert not list((tmp_path / "plain").rglob("*.xplane.pb"))
    steps = [line["step"] for line in Workdir(tmp_path / "profiled").read_metrics()]
    assert steps == [6, 10, 20, 20]


@pytest.mark.job
def test_verify_resume_detects_a_resume_that_is_not_exact(monkeypatch):
    config = small_mlp(**TWO_REPLICAS)
    assert resume_check.verify_resume(config) == resume_check.verify_resume(config)
    assert len(resume_check.verify_resume(config)) == 64
    with monkeypatch.context() as patch:
        patch.setattr(resume_check.Checkpoints, "restore", lambda self: 2)
        with pytest.raises(ResumeError, match="stopped at step 2 and resumed, .* variables differ"):
            resume_check.verify_resume(config)
    # The input starts at the first step, whatever the step at which the run resumes.
    open_batches = Trainer.open_batches
    monkeypatch.setattr(
        Trainer, "open_batches", lambda self, data, step: open_batches(self, data, 0)
    )
    with pytest.raises(ResumeError, match="variables differ"):
        resume_check.verify_resume(config)


def test_divergence_after_a_checkpoint_names_it(tmp_path, monkeypatch):
    config = small_mlp()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 30)
        train_and_evaluate(config, tmp_path)
    train = Trainer.train

    def diverging(self, batches, num_steps):
        self.model.trainable_variables[0].assign(self.model.trainable_variables[0] * np.inf)
        return train(self, batches, num_steps)

    monkeypatch.setattr(Trainer, "train", diverging)
    with pytest.raises(TrainingDivergedError, match="at step 26 .*checkpoint is .*step-25"):
        train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize("steps, found_at", [(30, 30), (60, 40)], ids=["saved", "evaluated"])
def test_a_network_that_is_not_finite_is_neither_saved_nor_evaluated(
    steps, found_at, tmp_path, monkeypatch
):
    train = Trainer.train

    def overflowing(self, batches, num_steps):
        result = train(self, batches, num_steps)
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


def test_mixed_precision_trains_and_restores_the_dtype_policy(tmp_path):
    config = small_mlp(**{"train.precision": "mixed_bfloat16"})
    assert train_and_evaluate(config, tmp_path)["validation/accuracy"] > 0.8
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data.name": "digitz"}, "digitz"),
        ({"model.name": "vgg"}, "unknown model.name 'vgg': expected one of inception, mlp"),
        ({"model.variant": "bn_x7"}, "unknown variant 'bn_x7'"),
        ({"model.initializer": "he"}, "unknown model.initializer 'he'"),
        ({"distribution.strategy": "cluster"}, "unknown distribution.strategy 'cluster'"),
        ({"distribution.replicas": 2}, "one_device has one"),
        ({"distribution.strategy": "multi_worker", "distribution.replicas": 1}, "set it to 0"),
        ({"batch_norm.virtual_batch_size": 7}, "size=7 is invalid: expected a divisor of the 60 "),
        ({"batch_norm.virtual_batch_size": 20, "train.micro_batches": 2}, "divisor of the 30 exam"),
        ({**TWO_REPLICAS, "train.global_batch_size": 61}, "61"),
        ({"train.steps": 0}, "train.steps=0 is invalid: expected a positive integer"),
        ({"train.steps": 10**19}, "train.steps=10{19} is invalid: expected a number from -1,0"),
        ({"train.epochs": 1e300}, r"train.epochs=1e\+300 is invalid: expected a number"),
        ({"schedule.cosine_steps": 10**19}, "schedule.cosine_steps=10{19} is invalid"),
        ({"train.momentum": -0.5}, "train.momentum=-0.5 is invalid"),
        ({"train.momentum": 1.5}, "train.momentum=1.5 is invalid"),
        ({"train.l2": float("inf")}, "train.l2=inf is invalid: expected 0 or more"),
        ({"train.ema": 1.0}, "train.ema=1.0 is invalid: expected 0 or more and less than 1"),
        ({"train.ema": 0.9}, "train.ema is set and requires .* set population.when"),
        ({"train.label_smoothing": -0.1}, "train.label_smoothing=-0.1 is invalid"),
        ({"train.until_accuracy": 72.2}, "train.until_accuracy=72.2 is invalid"),
        ({"train.retries": -1}, "train.retries=-1 is invalid"),
        ({"train.retry_factor": 2.0}, "train.retry_factor=2.0 is invalid: expected at most 1"),
        ({"train.micro_batches": 7}, "micro_batches=7 is invalid: expected a divisor of .*size=60"),
        ({"schedule.decay": "linear"}, "unknown schedule.decay 'linear': expected steps or cos"),
        ({"seed": -1}, "seed=-1 is invalid"),
        ({"seed": 2**33}, "seed=8589934592 is invalid"),
        ({"model.width": float("inf")}, "model.width=inf is invalid"),
        ({"model.initializer": "constant"}, "unknown model.initializer 'constant'"),
        ({"model.initializer_stddev": -1.0}, "model.initializer_stddev=-1"),
        ({"train.precision": "float8"}, "unknown train.precision 'float8'"),
        ({"schedule.base_rate": float("nan")}, "schedule.base_rate=nan is invalid"),
        ({"population.when": "always"}, "unknown population.when 'always': expected never"),
        ({"population.num_batches": 0}, "population.num_batches=0 is invalid"),
        ({"population.when": "end", "model.variant": "baseline"}, "has no BatchNormalization"),
        ({"model.name": "inception", "model.variant": "bn_x5"}, "at least 32x32"),
    ],
)
def test_an_invalid_config_leaves_nothing_behind(overrides, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        train_and_evaluate(small_mlp(**overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_built_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, batches):
        raise ValueError("no such kernel")

    monkeypatch.setattr(Trainer, "trace", fail)
    with pytest.raises(ValueError, match="no such kernel"):
        train_and_evaluate(small_mlp(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused_and_unchanged(tmp_path):
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
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        train_and_evaluate(small_mlp(), tmp_path / "file" / "run")


def test_every_key_of_the_config_is_read(tmp_path, monkeypatch):
    config = small_inception(**{"model.initializer": "normal", "train.steps": 1})
    read = set()
    sections = {"": config} | {k: v for k, v in config.items() if isinstance(v, ConfigDict)}
    get = ConfigDict.__getitem__

    def recording(self, key):
        read.update((name, key) for name, section in sections.items() if section is self)
        return get(self, key)

    monkeypatch.setattr(ConfigDict, "__getitem__", recording)
    # Checking the range of a value does not count as reading it.
    monkeypatch.setattr(loop, "check_config", lambda config: None)
    monkeypatch.setattr(Workdir, "create", lambda self, *run: self.path.mkdir())
    train_and_evaluate(config, tmp_path / "run")
    monkeypatch.undo()

    schema = default_config()
    keys = {("", key) for key in schema} | {
        (name, key)
        for name, section in schema.items()
        if isinstance(section, ConfigDict)
        for key in section
    }
    assert keys - read == set()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    train_and_evaluate(small_mlp(**{"train.steps": 2}), tmp_path)
    for name in ("config.json", "interface.json"):
        (tmp_path / name).unlink()
    other = small_mlp(**{"train.steps": 2, "model.variant": "baseline"})
    Workdir(tmp_path).create(other, Interface((8, 8, 1), "0123456789"))
    with pytest.raises(UsageError, match="step-2 does not fit this network") as caught:
        load_trained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["index", "data-00000-of-00001"])
def test_a_truncated_checkpoint_is_named_and_no_untrained_network_loaded(ending, tmp_path, caplog):
    config = small_mlp(**{"train.steps": 2})
    train_and_evaluate(config, tmp_path)
    file = tmp_path / "checkpoints" / f"step-2.{ending}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UsageError, match="no checkpoint of a trained network") as caught:
        load_trained(tmp_path)
    assert "step-2 is damaged" in caplog.text
    assert "\n" not in str(caught.value)


def test_a_run_without_its_checkpoints_is_refused_and_keeps_its_metrics(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_after(patch, 33)
        train_and_evaluate(small_mlp(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UsageError, match="reached step 30, but its checkpoints are missing"):
        train_and_evaluate(small_mlp(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
