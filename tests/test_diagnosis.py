"""The diagnosis names the first non-finite tensor of a step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization, BNInception, SigmoidMLP
from bn_keras.keras_internals import all_layers
from bn_keras.models import bn_inception
from bn_keras.training.diagnosis import first_non_finite
from bn_keras.training.step import Trainer


class Steep(keras.layers.Layer):
    """The square root of |x|, whose derivative at 0 is infinite."""

    def call(self, inputs):
        return tf.sqrt(tf.abs(inputs))


class Failing(keras.layers.Layer):
    """A layer that fails once `fails` is set."""

    fails = False

    def call(self, inputs):
        if self.fails:
            raise RuntimeError("planted")
        return inputs


def build_trainer(model, strategy=None, **options):
    strategy = strategy or tf.distribute.get_strategy()
    return Trainer(model, keras.optimizers.SGD(0.1), strategy, 8, **options)


def diagnose(model, images, labels=None, strategy=None, **options):
    trainer = build_trainer(model, strategy, **options)
    before = [v.numpy() for v in trainer.variables]
    labels = np.arange(len(images), dtype=np.int32) % 4 if labels is None else labels
    batch = tf.constant(images), tf.constant(labels)
    found = first_non_finite(model, trainer.compute_gradients, *batch, trainer.strategy)
    for variable, value in zip(trainer.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value, variable.path)
    assert not any("call" in vars(layer) for layer in all_layers(model))
    return found


def random_images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mlp(**options):
    return SigmoidMLP(classes=4, input_shape=(6,), units=(5, 5), **options)


@pytest.fixture
def short_inception(monkeypatch):
    rows = [row for row in bn_inception.FIGURE_5 if row.name in ("3a", "4d")]
    monkeypatch.setattr(bn_inception, "FIGURE_5", rows)


def test_nothing_is_named_in_a_finite_step():
    assert diagnose(mlp(), random_images(8, 6)) is None


@pytest.mark.parametrize("layer, weight", [("dense_2", "kernel"), ("bn_2", "moving_variance")])
def test_a_weight_is_named(layer, weight):
    model = mlp()
    variable = getattr(model.get_layer(layer), weight)
    value = variable.numpy()
    value.flat[-1] = np.inf
    variable.assign(value)
    assert diagnose(model, random_images(8, 6)) == f"the weight {layer}/{weight}"


def test_the_batch_is_named():
    images = random_images(8, 6)
    images[3, 2] = np.nan
    assert diagnose(mlp(), images) == "the images"
    labels = np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 2]
    labels[0, 0] = np.nan
    assert diagnose(mlp(), random_images(8, 6), labels) == "the labels"


@pytest.mark.parametrize("variant", ["inception", "bn_x5"])
def test_the_first_output_is_named(short_inception, variant):
    """The following outputs and the gradients are NaN, too."""
    model = BNInception(
        variant,
        classes=4,
        input_shape=(8, 8, 1),
        width=0.03,
        stem="digits",
        auxiliary=True,
    )
    kernel = model.get_layer("4d_double_1_conv").kernel
    kernel.assign(tf.fill(kernel.shape, 3e38))
    found = diagnose(model, random_images(8, 8, 8, 1), auxiliary_weight=0.4)
    assert found == "the output of 4d_double_1_conv"


@pytest.mark.parametrize(
    "policy, scale, expected",
    [
        ("mixed_float16", 1e4, "the output of dense_1"),
        ("mixed_bfloat16", 1e4, None),
        ("mixed_bfloat16", 3e37, "the output of dense_1"),
    ],
)
def test_the_range_of_half_precision_counts(policy, scale, expected):
    keras.config.set_dtype_policy(policy)
    model = mlp(variant="baseline")
    kernel = model.get_layer("dense_1").kernel
    kernel.assign(tf.fill(kernel.shape, scale))
    assert diagnose(model, np.full((8, 6), 5, np.float32)) == expected


def test_the_loss_scale_counts():
    """In float16 the loss is finite, and its scaled gradient is not."""
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp(variant="baseline")
    model.get_layer("logits").kernel.assign(tf.fill([5, 4], 1e3) * [1, -1, 1, -1])
    images = random_images(8, 6)
    assert diagnose(model, images) is None
    found = diagnose(model, images, loss_scaling=True)
    assert found == "the gradient of the output of sigmoid_2"


def test_the_first_gradient_is_named():
    """The derivative of the square root is infinite at 0, and times 0 it is NaN."""
    x = inputs = keras.Input([6])
    x = keras.layers.Dense(5, name="before")(x)
    x = Steep(name="steep")(x)
    x = keras.layers.Dense(5, name="between")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))
    assert diagnose(model, random_images(8, 6)) is None
    assert diagnose(model, np.zeros((8, 6), np.float32)) == "the gradient of the input of steep"


def weight_gradient_overflows(x):
    """Applies layers whose kernel has a gradient that overflows at an input of 1e30."""
    x = keras.layers.Dense(1, use_bias=False, kernel_initializer=tiny, name="tiny")(x)
    x = keras.layers.Rescaling(1e20, name="large")(x)
    return keras.layers.Dense(4, kernel_initializer=one_to_four, name="logits")(x)


def tiny(shape, dtype=None):
    return tf.fill(shape, 2e-38)


def one_to_four(shape, dtype=None):
    return tf.reshape(tf.range(1.0, 5.0), shape)


def test_the_gradient_of_the_first_layers_weight_is_named():
    """The layer's input, the images, has no gradient."""
    inputs = keras.Input([1])
    model = keras.Model(inputs, weight_gradient_overflows(inputs))
    found = diagnose(model, np.full((8, 1), 1e30, np.float32))
    assert found == "the gradient of tiny/kernel"


def test_the_gradient_of_a_weight_is_named_before_later_gradients():
    inputs = keras.Input([1])
    x = keras.layers.Dense(1, kernel_initializer="ones", name="before")(inputs)
    x = Steep(name="steep")(x)
    x = keras.layers.Rescaling(1, offset=1e30, name="around")(x)
    model = keras.Model(inputs, weight_gradient_overflows(x))
    assert diagnose(model, np.zeros((8, 1), np.float32)) == "the gradient of tiny/kernel"


def test_the_loss_is_named():
    """The difference of finite logits can exceed the range of float32."""
    model = mlp()
    model.get_layer("logits").bias.assign([3e38, -3e38, 0, 0])
    assert diagnose(model, random_images(8, 6)) == "the loss (the outputs are finite)"


def test_layers_inside_layers_are_named():
    inner_inputs = keras.Input([6])
    inner = keras.Model(inner_inputs, keras.layers.Dense(5, name="deep")(inner_inputs))
    inputs = keras.Input([3, 6])
    x = keras.layers.TimeDistributed(inner)(inputs)
    x = keras.layers.SimpleRNN(5, activation="relu", name="recurrent")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))
    assert diagnose(model, random_images(8, 3, 6)) is None
    cell = model.get_layer("recurrent").cell
    cell.kernel.assign(tf.fill(cell.kernel.shape, 3e38))
    # The overflow happens in the loop over time steps, not in its first step.
    images = random_images(8, 3, 6) * np.array([0, 1, 1], np.float32)[:, None]
    assert diagnose(model, images) == "the output of recurrent"
    inner.get_layer("deep").kernel.assign(tf.fill([6, 5], 3e38))
    assert diagnose(model, images) == "the output of deep"


@pytest.mark.parametrize("synchronized", [False, True])
def test_any_replica_counts(two_replicas, synchronized):
    """Only the second replica's images overflow."""
    with two_replicas.scope():
        model = mlp(synchronized=synchronized)
        kernel = model.get_layer("dense_1").kernel
        kernel.assign(tf.fill(kernel.shape, 1e38))
        trainer = build_trainer(model, two_replicas)
    images = np.zeros((8, 6), np.float32)

    def find(images):
        dataset = tf.data.Dataset.from_tensors((images, np.zeros(8, np.int32)))
        batch = next(iter(two_replicas.experimental_distribute_dataset(dataset)))
        return first_non_finite(model, trainer.compute_gradients, *batch, two_replicas)

    count = model.get_layer("bn_1").values_since_merge
    before = None if count is None else float(count.read_value())
    assert find(images) is None
    images[7] = 1e10
    assert find(images) == "the output of dense_1"
    assert count is None or float(count.read_value()) == before


def test_an_error_restores_the_layers_methods():
    inputs = keras.Input([6])
    failing = Failing()
    x = failing(BatchNormalization(name="bn")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    failing.fails = True
    with pytest.raises(RuntimeError, match="planted"):
        diagnose(model, random_images(8, 6))
    for layer in model.layers:
        assert not {"call", "update_moving_statistics"} & set(vars(layer))
