"""The training step computes what its settings say, on one replica and on two."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras.data import pipeline
from bn_keras.distribute import make_strategy
from bn_keras.models import SigmoidMLP
from bn_keras.training.build import build_trainer_for
from bn_keras.training.step import Trainer

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(12, 3, 3, 1)).astype(np.float32)
LABELS = RNG.integers(0, 4, 12).astype(np.int32)
REPLICAS = pytest.mark.parametrize("replicas", [1, 2])


def small_trainer(replicas=1, variant="baseline", policy="float32", rate=1.0, **settings):
    strategy = make_strategy("mirrored", replicas)
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    with strategy.scope():
        model = SigmoidMLP(variant, classes=4, input_shape=(3, 3, 1), units=(5,))
        optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    return Trainer(model, optimizer, strategy, len(IMAGES), **settings)


def batches(trainer, images=IMAGES, labels=LABELS, micro_batches=1):
    size = len(images) // trainer.strategy.num_replicas_in_sync // micro_batches

    def open_dataset(_):
        # Each replica in turn gets a part of the first micro-batch, then of the second, and so on.
        return tf.data.Dataset.from_tensor_slices((images, labels)).batch(size, True).repeat()

    return iter(trainer.strategy.distribute_datasets_from_function(open_dataset))


def weights(trainer):
    return [v.numpy() for v in trainer.model.trainable_variables]


def close(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@REPLICAS
def test_accumulated_micro_batches_equal_the_whole_batch(replicas):
    whole, parts = (small_trainer(replicas, l2=0.1, micro_batches=k) for k in (1, 3))
    assert whole.train(batches(whole), 2) == pytest.approx(
        parts.train(batches(parts, micro_batches=3), 2)
    )
    # Three float32 sums instead of one.
    close(weights(whole), weights(parts), rtol=1e-5, atol=1e-6)
    assert parts.optimizer.iterations.numpy() == 2


@REPLICAS
def test_the_ema_follows_the_weights_and_forgets_the_initial_ones(replicas):
    trainer = small_trainer(replicas, variant="bn", ema=0.5)
    feed, expected = batches(trainer), [w.astype(np.float64) for w in weights(trainer)]
    for step in range(1, 7):
        trainer.train(feed, 1)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = [
            kept * e + (1 - kept) * w for e, w in zip(expected, weights(trainer), strict=True)
        ]
    close([a.numpy() for a in trainer.averages], expected, rtol=1e-5, atol=1e-7)
    trainer.assign_averages()
    for variable, value in zip(trainer.model.trainable_variables, expected, strict=True):
        for component in trainer.strategy.experimental_local_results(variable.value):
            np.testing.assert_allclose(component.numpy(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixtures"])
def test_the_objective_uses_smoothed_labels_and_the_reported_loss_does_not(smoothing, mixed):
    """The gradient equals that of Keras' smoothed loss."""
    shares = np.eye(4, dtype=np.float32)[LABELS]
    if mixed:
        shares = (0.7 * shares + 0.3 * shares[::-1]).astype(np.float32)
    trainer = small_trainer(label_smoothing=smoothing)
    model, before = trainer.model, weights(trainer)
    plain, smooth = (
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=s)
        for s in (0.0, smoothing)
    )
    with tf.GradientTape() as tape:
        logits = model(IMAGES, training=True)
        loss, objective = plain(shares, logits), smooth(shares, logits)
    gradients = tape.gradient(objective, [v.value for v in model.trainable_variables])
    hits = np.mean(np.argmax(logits, -1) == np.argmax(shares, -1))
    reported = trainer.train(batches(trainer, labels=shares if mixed else LABELS), 1)
    assert reported == pytest.approx((float(loss), hits, 1))
    steps = [b - a for b, a in zip(before, weights(trainer), strict=True)]
    close(steps, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("replicas, overflowing", [(1, 0), (2, 0), (2, 1)])
def test_a_step_that_overflows_on_any_replica_is_skipped(replicas, overflowing):
    trainer = small_trainer(replicas, variant="bn", policy="mixed_float16", loss_scaling=True)
    scale, steps_at_scale = trainer.parts["scaling"]
    steps_at_scale.assign(7.0)
    changing = {id(v) for v in (scale, steps_at_scale, *trainer.model.non_trainable_variables)}
    before = [v.numpy() for v in trainer.variables]
    shares = np.eye(4, dtype=np.float32)[LABELS]
    # The loss and the other replica's gradients stay finite.
    shares[overflowing * len(IMAGES) // replicas] *= 1e6
    _, _, finite_steps = trainer.train(batches(trainer, labels=shares), 1)
    assert finite_steps == 1
    for variable, value in zip(trainer.variables, before, strict=True):
        if id(variable) not in changing:
            np.testing.assert_array_equal(variable.numpy(), value)
    assert (scale.numpy(), steps_at_scale.numpy()) == (2.0**14, 0)


def test_the_loss_scale_doubles_after_two_thousand_steps_and_changes_nothing_else():
    trainer, plain = (
        small_trainer(policy="mixed_float16", rate=0.1, loss_scaling=scaled)
        for scaled in (True, False)
    )
    scale, steps_at_scale = trainer.parts["scaling"]
    steps_at_scale.assign(1998.0)
    trainer.train(batches(trainer), 3)
    plain.train(batches(plain), 3)
    assert (scale.numpy(), steps_at_scale.numpy()) == (2.0**16, 1)
    close(weights(trainer), weights(plain), rtol=1e-2, atol=1e-4)


@REPLICAS
def test_a_snapshot_restores_everything(replicas):
    trainer = small_trainer(
        replicas, variant="bn", policy="mixed_float16", ema=0.9, loss_scaling=True
    )
    feed = batches(trainer)
    trainer.train(feed, 3)
    before, snapshot = [v.numpy() for v in trainer.variables], trainer.snapshot()
    trainer.train(feed, 3)
    assert any(np.any(v.numpy() != b) for v, b in zip(trainer.variables, before, strict=True))
    trainer.restore(snapshot)
    for variable, value in zip(trainer.variables, before, strict=True):
        for component in trainer.strategy.experimental_local_results(variable.value):
            np.testing.assert_array_equal(component.numpy(), value)


def test_a_trainer_is_built_from_a_config():
    config = small_mlp(
        **{"train.ema": 0.9, "train.micro_batches": 2, "train.precision": "mixed_float16"}
    )
    data = pipeline.open_data(config.data, seed=0)
    trainer = build_trainer_for(config, make_strategy("one_device"), data, rate_factor=0.5)
    assert trainer.micro_batches == 2
    assert float(trainer.optimizer.learning_rate) == pytest.approx(0.5 * 0.5 * 60 / 60)
    parts = trainer.parts
    assert len(parts["averages"]) == len(trainer.model.trainable_variables)
    assert [v.name for v in parts["scaling"]] == ["loss_scale", "steps_at_scale"]
    assert {id(v) for v in trainer.variables} >= {id(v) for v in trainer.model.variables}
