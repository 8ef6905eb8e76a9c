"""Replacing Keras' layers does not change what a model computes."""

import functools

import keras
import numpy as np
import pytest

from bn_keras import BatchNormalization, replace_batch_norm
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers

KERAS_BN = keras.layers.BatchNormalization


def _block(inputs, name):
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    return keras.layers.ReLU()(KERAS_BN(name=name, momentum=0.8)(x))


def _functional():
    """A model with branches, a nested model that is called twice, and a shared layer."""
    inner_inputs = keras.Input((6, 6, 4))
    inner = keras.Model(inner_inputs, _block(inner_inputs, "inner_bn"), name="inner")
    shared = KERAS_BN(axis=1, scale=False, name="shared")
    inputs = keras.Input((6, 6, 4))
    x = keras.layers.Add()([inner(_block(inputs, "a")), inner(_block(inputs, "b"))])
    outputs = keras.layers.Concatenate()([shared(x), shared(inputs)])
    return keras.Model(inputs, [outputs, x], name="net")


def _sequential():
    return keras.Sequential(
        [keras.Input((5, 3)), keras.layers.Dense(4), KERAS_BN(epsilon=0.1), keras.layers.Flatten()]
    )


def _wrapped():
    inputs = keras.Input((5, 6, 4))
    x = keras.layers.TimeDistributed(KERAS_BN(name="wrapped", center=False))(inputs)
    nested = keras.Sequential([keras.Input((6, 4)), KERAS_BN(name="deep")])
    return keras.Model(inputs, keras.layers.TimeDistributed(nested)(x))


def _lambda():
    inputs = keras.Input((4,))
    x = keras.layers.Lambda(lambda t: 2 * t, output_shape=(4,))(inputs)
    return keras.Model(inputs, KERAS_BN(renorm=True)(x))


MODELS = {f.__name__: f for f in (_functional, _sequential, _wrapped, _lambda)}


def _random_weights(model):
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])


def _norms(model, cls):
    return [layer for layer in all_layers(model) if type(layer) is cls]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_replaced_model_computes_the_same(make):
    model = make()
    _random_weights(model)
    for index, layer in enumerate(_norms(model, KERAS_BN)):
        layer.trainable = index % 2 == 0
    replaced = replace_batch_norm(model)
    assert type(replaced) is type(model)
    assert not _norms(replaced, KERAS_BN)
    before, after = _norms(model, KERAS_BN), _norms(replaced, BatchNormalization)
    assert [(b.name, b.trainable) for b in before] == [(a.name, a.trainable) for a in after]
    assert not any(a.unbiased for a in after)
    assert [w.path for w in replaced.weights] == [w.path for w in model.weights]
    x = np.random.default_rng(1).normal(size=(4, *model.input_shape[1:])).astype(np.float32)
    for training in (False, True, False):
        # The last call shows the effect of training on the moving statistics.
        for a, b in zip(
            keras.tree.flatten(replaced(x, training=training)),
            keras.tree.flatten(model(x, training=training)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_replaced_model_shares_nothing_with_the_given_model():
    model = _sequential()
    replaced = replace_batch_norm(model)
    kept = model.get_weights()
    replaced.set_weights([w + 1 for w in kept])
    for a, b in zip(model.get_weights(), kept, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_frozen_model_stays_frozen():
    model = _functional()
    model.trainable = False
    assert not replace_batch_norm(model).trainable_variables
    model.get_layer("a").trainable = True
    assert len(replace_batch_norm(model).trainable_variables) == len(model.trainable_variables)


def test_mixed_precision_is_kept():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = _sequential()
    keras.config.set_dtype_policy("float32")
    (norm,) = _norms(replace_batch_norm(model), BatchNormalization)
    assert norm.compute_dtype == "bfloat16"
    assert norm.variable_dtype == "float32"


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50"])
def test_keras_applications_compute_the_same(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=10)
    _random_weights(model)
    replaced = replace_batch_norm(model)
    assert len(_norms(replaced, BatchNormalization)) == len(_norms(model, KERAS_BN)) > 50
    x = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    np.testing.assert_allclose(replaced(x), model(x), rtol=1e-3, atol=1e-5)


def test_an_unbuilt_model_is_rejected():
    with pytest.raises(UsageError, match="is not built"):
        replace_batch_norm(keras.Sequential([KERAS_BN()]))
    with pytest.raises(UsageError, match="expected a keras.Model"):
        replace_batch_norm(KERAS_BN())


def test_layers_that_a_subclassed_model_creates_are_replaced():
    class Hidden(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm = KERAS_BN()

        def call(self, x):
            return self.norm(x)

    hidden, inputs, x = Hidden(), keras.Input((3,)), np.ones((2, 3))
    hidden(x)
    for model in (hidden, keras.Model(inputs, Hidden()(inputs))):
        replaced = replace_batch_norm(model)
        assert len(_norms(replaced, BatchNormalization)) == 1 and not _norms(replaced, KERAS_BN)
        np.testing.assert_allclose(replaced(x), model(x))


def test_code_that_freezes_the_keras_layer_freezes_ours():
    replaced = replace_batch_norm(_functional())
    norms = [layer for layer in all_layers(replaced) if isinstance(layer, KERAS_BN)]
    assert norms == _norms(replaced, BatchNormalization) and len(norms) == 4
    for layer in norms:
        layer.trainable = False
    replaced.compile("sgd", "mse", run_eagerly=True)
    kept = [layer.get_weights() for layer in norms]
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 4))
    replaced.fit(x, [np.zeros((4, 6, 6, 8)), x], verbose=0)
    for layer, weights in zip(norms, kept, strict=True):
        for a, b in zip(layer.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(a, b)


def test_subclasses_of_the_keras_layer_are_copied():
    class Doubled(KERAS_BN):
        def call(self, x, training=None):
            return 2 * super().call(x, training=training)

    model = keras.Sequential([keras.Input((3,)), Doubled(), KERAS_BN()])
    replaced = replace_batch_norm(model)
    assert [type(layer) for layer in replaced.layers] == [Doubled, BatchNormalization]
    np.testing.assert_allclose(replaced(np.ones((2, 3))), model(np.ones((2, 3))), rtol=1e-6)


def test_a_call_replaced_on_one_layer_is_copied():
    model = keras.Sequential([keras.Input((3,)), KERAS_BN(name="pinned"), KERAS_BN(name="other")])
    pinned = model.get_layer("pinned")
    pinned.call = functools.partial(pinned.call, training=False)
    _random_weights(model)
    replaced = replace_batch_norm(model)
    assert [type(layer) for layer in replaced.layers] == [KERAS_BN, BatchNormalization]
    x = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    for training in (True, False):
        expected = model(x, training=training)
        np.testing.assert_allclose(replaced(x, training=training), expected, rtol=1e-4, atol=1e-5)
    copied = replaced.get_layer("pinned")
    pinned.moving_mean.assign([1, 2, 3])
    assert not np.array_equal(copied.moving_mean, pinned.moving_mean)


def test_a_layer_without_epsilon_is_copied():
    layers = [keras.Input((5, 3)), KERAS_BN(epsilon=0.0, name="exact"), KERAS_BN(name="usual")]
    replaced = replace_batch_norm(keras.Sequential(layers))
    assert [type(layer) for layer in replaced.layers] == [KERAS_BN, BatchNormalization]
    assert replaced.get_layer("exact").epsilon == 0


def test_changes_to_a_keras_layer_are_copied():
    model = keras.Sequential([keras.Input((5, 3)), KERAS_BN(name="bn")])
    norm = model.get_layer("bn")
    norm.supports_masking = False
    norm.note = "added"
    norm.get_config = functools.partial(dict, name="replaced")
    (copied,) = replace_batch_norm(model).layers
    assert type(copied) is BatchNormalization and not copied.supports_masking
    assert copied.note == "added" and copied.get_config() == {"name": "replaced"}


def test_state_derived_from_weights_is_copied():
    """Normalization derives state from its weights when it loads them."""
    inputs = keras.Input((4, 4, 3))
    normalization = keras.layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3.0, 2.0, [64, 4, 4, 3]))
    outputs = keras.layers.BatchNormalization()(normalization(inputs))
    model = keras.Model(inputs, outputs)
    replaced = replace_batch_norm(model)
    images = np.random.default_rng(1).normal(3.0, 2.0, [2, 4, 4, 3])
    np.testing.assert_allclose(replaced(images), model(images), rtol=1e-6, atol=1e-6)


def test_a_compiled_model_stays_compiled_with_its_frozen_layers():
    model = _sequential()
    model.layers[0].trainable = False
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    replaced = replace_batch_norm(model)
    images = np.random.default_rng(0).normal(size=[8, *model.input_shape[1:]])
    targets = np.zeros([8, *model.output_shape[1:]])
    losses = [
        network.fit(images, targets, batch_size=8, epochs=3, shuffle=False, verbose=0).history
        for network in (model, replaced)
    ]
    np.testing.assert_allclose(losses[0]["loss"], losses[1]["loss"], rtol=1e-4)
    frozen = (model.layers[0].get_weights(), replaced.layers[0].get_weights())
    for a, b in zip(*frozen, strict=True):
        np.testing.assert_array_equal(a, b)
