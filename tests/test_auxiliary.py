"""The auxiliary classifier is trained and saved, and used only by the trainer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import killed_after_a_loop

from bn_keras.inference.loading import load_trained
from bn_keras.models import BNInception, without_auxiliary
from bn_keras.models import bn_inception as inception
from bn_keras.runs.workdir import Workdir
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.step import Trainer
from configs import digits_bn_x5

DIGITS = dict(classes=10, input_shape=(8, 8, 1), width=0.03, stem="digits")


def shorten_figure_5(monkeypatch, *modules):
    rows = [row for row in inception.FIGURE_5 if row.name in modules]
    monkeypatch.setattr(inception, "FIGURE_5", rows)


@pytest.fixture(autouse=True)
def short_figure_5(monkeypatch):
    shorten_figure_5(monkeypatch, "3a", "4d", "5b")


def small_config():
    config = digits_bn_x5.get_config().copy_and_resolve_references()
    config.model.width = DIGITS["width"]
    config.model.modules = ()
    config.model.auxiliary_weight = 0.4
    config.train.steps = 4
    config.train.steps_per_loop = 2
    config.train.global_batch_size = 8
    config.evaluation.every_steps = 4
    config.checkpoint.every_steps = 2
    return config


@pytest.mark.job
def test_auxiliary_classifier_is_saved_and_resumed_but_not_loaded(tmp_path, monkeypatch):
    # One module is enough and saves time, since the test traces three graphs.
    shorten_figure_5(monkeypatch, "4d")
    unbroken = train_and_evaluate(small_config(), tmp_path / "unbroken")
    with killed_after_a_loop(monkeypatch):
        train_and_evaluate(small_config(), tmp_path / "resumed")
    assert Workdir(tmp_path / "resumed").read_metrics().last_step == 2
    resumed = train_and_evaluate(small_config(), tmp_path / "resumed")
    assert resumed["variables_sha256"] == unbroken["variables_sha256"]

    model = load_trained(tmp_path / "resumed").model
    assert model.output_shape == (None, 10)
    assert not any("auxiliary" in layer.name for layer in model.layers)
    saved = tf.train.load_checkpoint(str(tmp_path / "resumed" / "checkpoints"))
    keys = sorted(saved.get_variable_to_shape_map())
    values = [saved.get_tensor(key) for key in keys if key.startswith("model/")]
    assert len(values) == len(model.variables)
    for value, variable in zip(values, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    # The auxiliary classifier has two convolutions with BN and a linear layer.
    assert sum(key.startswith("auxiliary/") for key in keys) == 2 * (1 + 4) + 2


def test_auxiliary_loss_enters_the_gradient_but_not_the_reported_loss():
    images = keras.Input([6])
    hidden = keras.layers.Dense(5, name="shared")(images)
    outputs = [keras.layers.Dense(3, name=name)(hidden) for name in ("logits", "auxiliary")]
    model = keras.Model(images, outputs)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(4, 6)).astype(np.float32)
    y = np.array([0, 2, 1, 2], np.int32)
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        main, other = (
            tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
            for logits in model(x)
        )
        objective = main + 0.4 * other
    gradients = tape.gradient(objective, variables)
    expected = [(v - g).numpy() for v, g in zip(variables, gradients, strict=True)]

    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(model.trainable_variables)
    trainer = Trainer(model, optimizer, tf.distribute.get_strategy(), 4, auxiliary_weight=0.4)
    dataset = tf.data.Dataset.from_tensors((x, y)).repeat()
    loss, _, _ = trainer.train(iter(dataset), 1)
    assert loss == pytest.approx(float(main))
    for value, variable in zip(expected, variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-5, atol=1e-6)


def test_without_auxiliary_equals_the_network_built_without_it():
    model = BNInception("bn_x5", auxiliary=True, **DIGITS)
    plain = BNInception("bn_x5", **DIGITS)
    assert model.output_names == ["logits", "auxiliary_logits"]
    stripped = without_auxiliary(model)
    assert [layer.name for layer in stripped.layers] == [layer.name for layer in plain.layers]
    assert [v.shape for v in stripped.variables] == [v.shape for v in plain.variables]
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(stripped(images), model(images)[0])
    assert without_auxiliary(plain) is plain


@pytest.mark.parametrize("shape", [(8, 8, 1), (24, 40, 3), (None, None, 3)])
def test_auxiliary_classifier_accepts_any_image_size(shape):
    model = BNInception("bn_x5", auxiliary=True, **DIGITS | dict(input_shape=shape))
    size = [side or 32 for side in shape]
    logits, auxiliary = model(np.ones((2, *size), np.float32))
    assert logits.shape == auxiliary.shape == (2, 10)


def test_auxiliary_classifier_trains_with_keras_fit():
    model = BNInception("bn_x5", auxiliary=True, **DIGITS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss=[loss, loss], loss_weights=[1.0, 0.4])
    before = model.get_layer("auxiliary_logits").kernel.numpy()
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 1))
    model.fit(images, [np.zeros(8), np.zeros(8)], batch_size=4, verbose=0)
    assert not np.array_equal(model.get_layer("auxiliary_logits").kernel.numpy(), before)
