"""A folded network computes the same outputs without BatchNormalization."""

import functools
import random
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import (
    BatchNormalization,
    BNInception,
    SigmoidMLP,
    estimate_population_statistics,
    fold,
    fold_batch_norm,
)
from bn_keras.errors import UsageError
from bn_keras.fold import unfoldable_layers
from bn_keras.keras_internals import all_layers

KERAS_BN = keras.layers.BatchNormalization
L = keras.layers


def trained(model, seed=0):
    """Sets all weights to values that a trained network could have, including negative gammas."""
    rng = np.random.default_rng(seed)

    def value(variable):
        shape = variable.shape
        if variable.name == "gamma":
            return rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 0, 1], shape, p=[0.2, 0.1, 0.7])
        if variable.name == "moving_variance":
            return rng.uniform(0.2, 3, shape)
        if "kernel" in variable.name:
            return rng.normal(size=shape) * np.prod(shape[:-1]) ** -0.5
        return rng.normal(size=shape) * 0.5

    for variable in model.weights:
        variable.assign(value(variable))
    return model


def batch_norms(model):
    return [layer for layer in all_layers(model) if isinstance(layer, KERAS_BN)]


def example(model, batch=3):
    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, *model.input_shape[1:])).astype(np.float32)


def run(model, x, training=False):
    outputs = keras.tree.flatten(model(x, training=training))
    return [keras.ops.convert_to_numpy(y).astype(np.float64) for y in outputs]


def assert_same(folded, model, rtol=1e-5, batch=3):
    x = example(model, batch)
    for a, b in zip(run(folded, x), run(model, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def chain(input_shape, *layers):
    x = inputs = keras.Input(input_shape)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x, name="chain")


FOLDABLE = {
    "Conv1D": ((7, 3), lambda **k: L.Conv1D(4, 3, strides=2, padding="causal", **k)),
    "Conv2D": ((6, 7, 3), lambda **k: L.Conv2D(4, 3, padding="same", **k)),
    "Conv2D grouped": ((6, 7, 4), lambda **k: L.Conv2D(6, 3, groups=2, dilation_rate=2, **k)),
    "Conv3D": ((4, 5, 6, 2), lambda **k: L.Conv3D(3, 2, **k)),
    "DepthwiseConv1D": ((7, 3), lambda **k: L.DepthwiseConv1D(3, depth_multiplier=2, **k)),
    "DepthwiseConv2D": ((6, 7, 3), lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, **k)),
    "SeparableConv1D": ((7, 3), lambda **k: L.SeparableConv1D(4, 3, **k)),
    "SeparableConv2D": ((6, 7, 3), lambda **k: L.SeparableConv2D(4, 3, depth_multiplier=8, **k)),
    "Conv1DTranspose": ((7, 3), lambda **k: L.Conv1DTranspose(4, 3, strides=2, **k)),
    "Conv2DTranspose": ((6, 7, 3), lambda **k: L.Conv2DTranspose(4, 3, strides=2, **k)),
    "Conv3DTranspose": ((3, 4, 5, 3), lambda **k: L.Conv3DTranspose(2, 2, **k)),
    "Dense": ((5,), lambda **k: L.Dense(4, **k)),
    "Dense of a sequence": ((6, 5), lambda **k: L.Dense(4, **k)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape, make", FOLDABLE.values(), ids=FOLDABLE)
def test_batch_norm_folds_into_every_layer_with_a_kernel(shape, make, bias):
    """In float64, rounding cannot hide an error."""
    norm = KERAS_BN(epsilon=0.1, dtype="float64") if bias else BatchNormalization(dtype="float64")
    model = trained(chain(shape, make(use_bias=bias, dtype="float64"), norm))
    folded, report = fold_batch_norm(model, example(model))
    assert [type(x) for x in folded.layers] == [type(x) for x in model.layers[:-1]]
    assert report.folded == (norm.name,) and not report.kept
    assert_same(folded, model, rtol=1e-12)


def test_folded_weights_are_computed_in_float64_and_rounded_once():
    model = trained(chain((6, 6, 3), L.Conv2D(4, 3), KERAS_BN(scale=False)))
    kernel, bias, beta, mean, variance = (w.astype(np.float64) for w in model.get_weights())
    scale = 1 / np.sqrt(variance + 1e-3)
    folded, _ = fold_batch_norm(model)
    expected = [kernel * scale, (bias - mean) * scale + beta]
    for weight, value in zip(folded.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, value.astype(np.float32))


def _application(name):
    return getattr(keras.applications, name)(
        weights=None, input_shape=(64, 64, 3), classes=10, classifier_activation=None
    )


NETWORKS = {
    "bn_baseline": (lambda: BNInception("bn_baseline", 10, (32, 32, 3), 0.1), 69, 0),
    # The last module normalizes per activation.
    "ensemble": (lambda: BNInception("bn_x30_ensemble_4", 10, (8, 8, 3), 0.1, "cifar"), 62, 7),
    "mlp": (lambda: SigmoidMLP(), 3, 0),
    "ResNet50": (lambda: _application("ResNet50"), 53, 0),
    "MobileNetV2": (lambda: _application("MobileNetV2"), 52, 0),
}


@pytest.mark.parametrize("make, folded_layers, kept", NETWORKS.values(), ids=NETWORKS)
def test_networks_fold(make, folded_layers, kept):
    model = trained(make())
    folded, report = fold_batch_norm(model, example(model))
    assert (len(report.folded), len(report.kept)) == (folded_layers, kept)
    assert not batch_norms(folded) and len(batch_norms(model)) == folded_layers + kept
    assert report.top1_agreement == 1
    assert_same(folded, model)
    names = {layer.name for layer in model.layers} - set(report.folded)
    assert {layer.name for layer in folded.layers} == names
    assert {w.path for w in folded.weights} >= {
        w.path for w in model.weights if w.path.split("/")[-2] in names - set(report.kept)
    }


@pytest.mark.parametrize("name", ["MobileNetV2"])
def test_folding_is_as_accurate_in_half_precision(name):
    """Both bfloat16 networks deviate from the float32 network by about the same amount."""
    make, *_ = NETWORKS[name]
    exact = trained(make())
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make()
    keras.config.set_dtype_policy("float32")
    model.set_weights(exact.get_weights())
    folded, _ = fold_batch_norm(model, example(model))
    assert all(w.dtype == "float32" for w in folded.weights)
    for layer in folded.layers[1:]:
        assert layer.compute_dtype == model.get_layer(layer.name).compute_dtype
    x = example(model, 8)
    truth, before, after = (run(m, x)[0] for m in (exact, model, folded))
    assert 0 < np.std(after - truth) < 1.5 * np.std(before - truth)


def test_the_given_model_is_unchanged():
    model = trained(chain((6, 6, 3), L.Conv2D(4, 3), BatchNormalization(), L.ReLU()))
    model.compile("sgd", "mse")
    kept, calls = model.get_weights(), [len(x._inbound_nodes) for x in model.layers]
    folded, _ = fold_batch_norm(model)
    expected = run(folded, example(model))
    for a, b in zip(model.get_weights(), kept, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len(x._inbound_nodes) for x in model.layers] == calls
    trained(model, seed=1)
    np.testing.assert_array_equal(run(folded, example(model)), expected)


class Custom(L.Conv2D):
    pass


def _two_outputs():
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    y = L.ReLU()(KERAS_BN(name="bn")(x))
    return keras.Model(inputs, {"before": x, "after": y})


def _branch():
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3, name="conv")(inputs)
    return keras.Model(inputs, L.Add(name="add")([x, KERAS_BN(name="bn")(x)]))


def _concatenated():
    inputs = keras.Input((6, 6, 3))
    x = L.Concatenate(name="cat")([L.Conv2D(4, 3)(inputs), L.Conv2D(2, 3)(inputs)])
    return keras.Model(inputs, BatchNormalization(name="bn")(x))


def _shared_conv():
    inputs = keras.Input((6, 6, 3))
    conv = L.Conv2D(4, 3, name="conv")
    return keras.Model(
        inputs, [KERAS_BN(name="bn")(conv(inputs)), L.ReLU()(conv(keras.ops.flip(inputs, 1)))]
    )


def _shared_also_after_the_input():
    inputs = keras.Input((6, 6, 4))
    bn = KERAS_BN(name="bn")
    return keras.Model(inputs, [bn(L.Conv2D(4, 3)(inputs)), bn(inputs)])


def _after_nested():
    inner = keras.Sequential([keras.Input((6, 6, 3)), L.Conv2D(4, 3)], name="inner")
    return chain((6, 6, 3), inner, KERAS_BN(name="bn"))


def _lora():
    conv = L.Conv2D(4, 3, name="conv")
    model = chain((6, 6, 3), conv, KERAS_BN(name="bn"))
    conv.enable_lora(2)
    return model


KEPT = {
    "input": (lambda: chain((6, 6, 3), KERAS_BN(name="bn"), L.Conv2D(4, 3)), "InputLayer"),
    "pooling": (lambda: chain((6, 6, 3), L.MaxPooling2D(), KERAS_BN(name="bn")), "MaxPooling2D"),
    "activation": (
        lambda: chain((6, 6, 3), L.Conv2D(4, 3, activation="relu"), KERAS_BN(name="bn")),
        "which includes an activation",
    ),
    "per activation": (
        lambda: chain((6, 6, 3), L.Conv2D(4, 3), BatchNormalization([1, 2, 3], name="bn")),
        "whose channel axis is not axis=[1, 2, 3]",
    ),
    "other axis": (
        lambda: chain((6, 6, 3), L.Conv2D(4, 3), KERAS_BN(axis=1, name="bn")),
        "whose channel axis is not axis=1",
    ),
    "other axis of Dense": (
        lambda: chain((6, 3), L.Dense(4), KERAS_BN(axis=1, name="bn")),
        "whose channel axis is not axis=1",
    ),
    "subclass": (lambda: chain((6, 6, 3), Custom(4, 3), KERAS_BN(name="bn")), "follows Custom"),
    "precision": (
        lambda: chain((5,), L.Dense(3, dtype="mixed_bfloat16"), KERAS_BN(name="bn")),
        "Dense 'dense', which computes in bfloat16",
    ),
    "vector": (lambda: chain((5,), BatchNormalization(name="bn")), "InputLayer"),
    "outputs": (_two_outputs, "Conv2D 'conv', whose output is also used by the model's outputs"),
    "branch": (_branch, "Conv2D 'conv', whose output is also used by Add 'add'"),
    "concatenated": (_concatenated, "follows Concatenate 'cat'"),
    "shared convolution": (_shared_conv, "Conv2D 'conv', which is also used elsewhere"),
    "shared": (_shared_also_after_the_input, "is shared, and in one place follows InputLayer"),
    "after nested": (_after_nested, "follows Sequential 'inner'"),
    "lora": (_lora, "LoRA"),
}


@pytest.mark.parametrize("make, reason", KEPT.values(), ids=KEPT)
def test_an_unfoldable_layer_becomes_one_affine_layer(make, reason):
    model = trained(make())
    folded, report = fold_batch_norm(model)
    assert not report.folded and list(report.kept) == ["bn"] and reason in report.kept["bn"]
    kept = {layer.name: reason for layer, reason in unfoldable_layers(model).items()}
    assert kept == report.kept
    assert type(folded.get_layer("bn")) in (L.DepthwiseConv2D, L.Rescaling)
    assert_same(folded, model)
    # The same holds while the rest of the model trains.
    x = example(model)
    for a, b in zip(run(folded, x, training=True), run(model, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_affine_layer_has_the_dtype_of_the_layer_that_it_replaces():
    keras.config.set_dtype_policy("mixed_bfloat16")
    for model in (_concatenated(), chain((6, 5), L.ReLU(), KERAS_BN(name="bn"))):
        folded, _ = fold_batch_norm(trained(model))
        assert folded.get_layer("bn").compute_dtype == folded.output.dtype == "bfloat16"
        assert_same(folded, model, rtol=2**-6)


def _block(x, conv, bn):
    return L.ReLU()(bn(conv(x)))


def _siamese():
    """One convolution and one BN, called in the same order in two places."""
    conv, bn = L.Conv2D(4, 3), KERAS_BN()
    inputs = keras.Input((6, 6, 3))
    return keras.Model(
        inputs, L.Add()([_block(x, conv, bn) for x in (inputs, keras.ops.flip(inputs, 1))])
    )


def _one_norm_after_two_convolutions():
    bn = BatchNormalization()
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, [_block(inputs, L.Conv2D(4, size), bn) for size in (1, 3)])


def _nested():
    """A nested model called twice, a model inside it, a BN as an output, and keyword arguments."""
    deep = keras.Sequential([keras.Input((4, 4, 4)), L.DepthwiseConv2D(2), KERAS_BN()], name="deep")
    inner = chain((6, 6, 3), L.Conv2D(4, 3), BatchNormalization(), deep)
    inputs = keras.Input((6, 6, 3))
    y = inner(inputs, training=False)
    z = inner(keras.ops.flip(inputs, 1))
    x = L.Conv2D(4, 3)(inputs)
    return keras.Model(inputs, (y, [z, KERAS_BN()(inputs=x)]))


def _nested_models_with_shared_layers(first_end=3):
    """Two nested models that share layers and calls."""
    x = inputs = keras.Input((6, 6, 3))
    for i in range(2):
        x = _block(x, L.Conv2D(3, 3, padding="same"), KERAS_BN(name=f"bn_{i}"))
    whole = keras.Model(inputs, x, name="whole")
    piece = keras.Model(inputs, whole.layers[first_end].output, name="piece")
    outer = keras.Input((6, 6, 3))
    return keras.Model(outer, [whole(outer), piece(outer)])


SHARED = {
    f.__name__: f
    for f in (
        _siamese,
        _one_norm_after_two_convolutions,
        _nested,
        _nested_models_with_shared_layers,
    )
}


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_shared_and_nested_layers_fold_if_every_place_allows_it(make):
    model = trained(make())
    folded, report = fold_batch_norm(model)
    assert not report.kept and not batch_norms(folded)
    assert keras.tree.map_structure(lambda t: t.shape, folded.output) == (
        keras.tree.map_structure(lambda t: t.shape, model.output)
    )
    kernels = [w for w in model.weights if "kernel" in w.name]
    assert len([w for w in folded.weights if "kernel" in w.name]) == len(kernels)
    assert_same(folded, model)


def test_a_convolution_that_ends_a_nested_model_is_not_folded_into():
    model = trained(_nested_models_with_shared_layers(first_end=1))
    folded, report = fold_batch_norm(model)
    assert report.folded == ("whole/bn_1",)
    assert list(report.kept) == ["whole/bn_0"]
    assert report.kept["whole/bn_0"].endswith("whose output is also used by the model's outputs")
    assert_same(folded, model)


class Doubled(BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


class KerasDoubled(KERAS_BN):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize("cls", [Doubled, KerasDoubled])
@pytest.mark.parametrize("before", [lambda: L.Dense(3), L.ReLU], ids=["Dense", "ReLU"])
def test_a_subclass_that_computes_something_else_is_kept_and_frozen(cls, before):
    model = trained(chain((4,), before(), cls(name="bn")))
    folded, report = fold_batch_norm(model)
    assert report.kept == {"bn": "has a call of its own"}
    assert type(folded.get_layer("bn")) is cls and not folded.get_layer("bn").trainable
    assert_same(folded, model)


def test_a_call_replaced_on_one_layer_is_kept():
    model = trained(chain((4,), L.Dense(3), BatchNormalization(name="bn")))
    bn = model.get_layer("bn")
    bn.call = lambda inputs, training=None, mask=None: inputs + 1
    folded, report = fold_batch_norm(model)
    assert not report.folded
    assert_same(folded, model)


class Tied(L.Layer):
    """Multiplies by the transpose of another layer's kernel, as in a tied autoencoder."""

    def __init__(self, get_kernel, **attributes):
        super().__init__(name="tied")
        self.get_kernel = get_kernel
        for name, value in attributes.items():
            setattr(self, name, value)

    def call(self, x):
        return x @ keras.ops.transpose(self.get_kernel(self))


class Holder:
    """An object whose attributes Keras does not track."""

    def __init__(self, layer):
        self.layer = layer

    def get_kernel(self, _):
        return self.layer.kernel


# The ways to use a kernel that ModelCopier follows.
TIED = {
    "weight": lambda dense: Tied(lambda self: self.k, k=dense.kernel),
    "list of weights": lambda dense: Tied(lambda self: self.k[0], k=[dense.kernel]),
    "matmul": lambda dense: lambda x: x @ dense.kernel,
    "function": lambda dense: Tied(lambda _: dense.kernel),
    "default": lambda dense: Tied(lambda _, layer=dense: layer.kernel),
    "method": lambda dense: Tied(Holder(dense).get_kernel),
    "partial": lambda dense: Tied(functools.partial(lambda layer, _: layer.kernel, dense)),
    "tf.function": lambda dense: Tied(tf.function(lambda _: dense.kernel.value)),
    "object": lambda dense: Tied(lambda self: self.held.layer.kernel, held=Holder(dense)),
    "weak reference": lambda dense: Tied(lambda self: self.ref().kernel, ref=weakref.ref(dense)),
}


@pytest.mark.parametrize("tie", TIED.values(), ids=TIED)
def test_batch_norm_is_not_folded_into_a_kernel_that_another_layer_uses(tie):
    dense, inputs = L.Dense(3, name="encoder"), keras.Input((3,))
    x = L.ReLU()(KERAS_BN(name="bn")(dense(inputs)))
    model = trained(keras.Model(inputs, tie(dense)(x)))
    folded, report = fold_batch_norm(model)
    assert list(report.kept) == ["bn"]
    assert report.kept["bn"].startswith("follows Dense 'encoder', wh")
    assert "is also used by " in report.kept["bn"]
    assert type(folded.get_layer("bn")) is L.Rescaling
    assert_same(folded, model)


def test_the_user_of_a_kernel_is_named():
    for tie, what in (("weight", "whose kernel"), ("function", "which")):
        dense, inputs = L.Dense(3, name="encoder"), keras.Input((4,))
        x = KERAS_BN(name="bn")(dense(inputs))
        model = keras.Model(inputs, TIED[tie](dense)(x))
        (reason,) = unfoldable_layers(model).values()
        assert reason == f"follows Dense 'encoder', {what} is also used by Tied 'tied'"


def test_a_batch_norm_that_a_function_of_another_layer_uses_is_kept():
    norm = KERAS_BN(name="bn")
    odd = L.Lambda(lambda t: t * norm.gamma, output_shape=(3,), name="odd")
    model = trained(chain((4,), L.Dense(3), norm, odd))
    folded, report = fold_batch_norm(model)
    assert report.kept == {"bn": "is also used by Lambda 'odd'"}
    assert type(folded.get_layer("bn")) is KERAS_BN and not folded.get_layer("bn").trainable
    assert_same(folded, model)


def test_references_to_a_layer_that_it_or_a_model_has_do_not_prevent_folding():
    model = trained(chain((4,), L.Dense(3, name="dense"), KERAS_BN(), L.ReLU()))
    dense = model.get_layer("dense")
    vars(dense)["function"] = lambda: dense.kernel
    vars(model)["function"] = lambda: dense.kernel
    vars(model.layers[-1])["parents"] = [model]
    folded, report = fold_batch_norm(model)
    assert not report.kept
    assert folded.function() is folded.get_layer("dense").kernel
    assert_same(folded, model)


def test_a_call_replaced_on_a_layer_with_a_kernel_is_not_folded_into():
    dense = L.Dense(3, name="dense")
    dense.call = lambda x, training=None: tf.square(L.Dense.call(dense, x))
    model = trained(chain((4,), dense, KERAS_BN(name="bn")))
    folded, report = fold_batch_norm(model)
    assert report.kept == {"bn": "follows Dense 'dense', which has a call of its own"}
    assert_same(folded, model)


@pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning")
@pytest.mark.parametrize("supports_masking", [True, False])
@pytest.mark.parametrize("before", [L.Dense(3), L.ReLU()], ids=["folded", "affine"])
def test_masks_are_passed_on_as_before(before, supports_masking):
    norm = KERAS_BN()
    norm.supports_masking = supports_masking
    model = trained(chain((4, 3), L.Masking(), before, norm, L.LSTM(2)))
    x = example(model)
    x[:, 2:] = 0
    folded, _ = fold_batch_norm(model, x)
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-5)


def test_an_affine_layer_for_images_passes_masks_on():
    model = trained(chain((4, 2, 3), L.Masking(), KERAS_BN(name="bn")))
    folded, _ = fold_batch_norm(model)
    assert type(folded.get_layer("bn")) is L.DepthwiseConv2D
    assert folded.get_layer("bn").supports_masking


def test_folding_does_not_change_the_states_of_recurrent_layers():
    inputs = keras.Input(batch_shape=(4, 5, 3))
    lstm = L.LSTM(2, stateful=True)
    model = trained(keras.Model(inputs, lstm(KERAS_BN()(L.Dense(3)(inputs)))))
    x = np.ones((4, 5, 3), np.float32)
    model(x)
    states = [state.numpy() for state in lstm.states]
    folded, _ = fold_batch_norm(model, x)
    for layer in (lstm, folded.layers[-1]):
        for state, expected in zip(layer.states, states, strict=True):
            np.testing.assert_array_equal(state, expected)


class OwnCode(keras.Model):
    """A Functional model whose `call` uses a layer in an attribute."""

    def __init__(self):
        inputs = keras.Input((4,))
        dense, norm = L.Dense(3), KERAS_BN(name="bn")
        super().__init__(inputs, norm(dense(inputs)), name="own")
        self.dense, self.norm = dense, norm

    def call(self, inputs, training=None):
        return 2 * self.norm(self.dense(inputs), training=training)


def test_layers_of_a_functional_model_with_code_of_its_own_are_kept():
    with pytest.raises(UsageError, match="'own' is a subclassed OwnCode"):
        fold_batch_norm(OwnCode())
    model = trained(chain((4,), OwnCode()))
    folded, report = fold_batch_norm(model)
    assert list(report.kept) == ["own/bn"] and "is inside a layer" in report.kept["own/bn"]
    assert_same(folded, model)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 5, 4), (5, 5, 5, 4)])
@pytest.mark.parametrize("axis", [1, -1])
def test_affine_layers_are_right_with_channels_first(shape, axis):
    """With this setting, keras.layers.Rescaling adds axes to a scale with fewer than three."""
    keras.config.set_image_data_format("channels_first")
    try:
        model = trained(chain(shape, L.ReLU(), KERAS_BN(axis=axis, name="bn")))
        folded, report = fold_batch_norm(model)
        assert not report.folded
        assert_same(folded, model)
    finally:
        keras.config.set_image_data_format("channels_last")


def test_folding_draws_nothing_from_the_global_generators():
    model = trained(chain((6, 6, 3), L.Conv2D(4, 3), KERAS_BN(), L.ReLU(), KERAS_BN()))
    random.seed(1)
    expected = random.random()
    random.seed(1)
    fold_batch_norm(model)
    assert random.random() == expected


def test_layers_of_the_same_name_are_distinguished():
    inner = [chain((5,), L.ReLU(), KERAS_BN(name="bn")) for _ in range(2)]
    for i, model in enumerate(inner):
        model.name = f"inner_{i}"
    model = chain((5,), *inner, L.Dense(3), KERAS_BN(name="bn"))
    _, report = fold_batch_norm(model)
    assert report.folded == ("bn",) and set(report.kept) == {"inner_0/bn", "inner_1/bn"}


def test_a_backbone_in_a_sequential_model_folds():
    backbone = keras.applications.MobileNetV2(
        weights=None, input_shape=(32, 32, 3), include_top=False, alpha=0.35
    )
    layers = [backbone, L.GlobalAveragePooling2D(), L.Dense(3), L.Softmax()]
    model = trained(keras.Sequential(layers))
    folded, report = fold_batch_norm(model)
    assert isinstance(folded, keras.Sequential) and len(report.folded) == 52
    assert_same(folded, model)


def test_layers_that_always_use_batch_statistics_are_kept():
    inner = chain((6, 6, 3), L.Conv2D(4, 3), KERAS_BN(name="nested"))
    inputs = keras.Input((6, 6, 3))
    x = KERAS_BN(name="called")(L.Conv2D(4, 3)(inputs), training=True)
    frozen = KERAS_BN(name="frozen", trainable=False)(L.Conv2D(4, 3)(inputs), training=True)
    model = trained(keras.Model(inputs, [x, inner(inputs, training=True), frozen]))
    folded, report = fold_batch_norm(model)
    assert report.folded == ("frozen",)
    assert set(report.kept) == {"called", "chain/nested"}
    assert all("training=True" in reason for reason in report.kept.values())
    assert_same(folded, model)


@keras.saving.register_keras_serializable("test_fold")
class AddAndNormalize(L.Layer):
    """A layer whose second argument is not `training`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = KERAS_BN(name="norm")

    def call(self, a, b, training=None):
        return self.norm(a + b, training=training)


def test_only_the_argument_called_training_chooses_the_mode():
    a, b = keras.Input((6, 3)), keras.Input((6, 3))
    model = keras.Model([a, b], AddAndNormalize()(a, b))
    (reason,) = unfoldable_layers(model).values()
    assert reason.startswith("is inside a layer")


@keras.saving.register_keras_serializable("test_fold")
class Block(keras.Model):
    """A subclassed model inside a functional one."""

    def __init__(self, cls=KERAS_BN, **kwargs):
        super().__init__(**kwargs)
        self.norm = cls(name="hidden")

    def build(self, input_shape):
        self.norm.build(input_shape)

    def call(self, x, training=None):
        return self.norm(x, training=training)


def test_batch_norm_inside_other_layers_is_kept_and_frozen():
    wrapped = L.TimeDistributed(BatchNormalization(name="wrapped"))
    model = trained(chain((2, 6, 3), L.Dense(4), wrapped, Block()))
    folded, report = fold_batch_norm(model)
    assert set(report.kept) == {"time_distributed/wrapped", "block/hidden"}
    assert all("is inside a layer" in reason for reason in report.kept.values())
    assert_same(folded, model)
    x = example(model)
    np.testing.assert_allclose(run(folded, x, training=True), run(folded, x))


@keras.saving.register_keras_serializable("test_fold")
class AlwaysTraining(Block):
    """Normalizes by the statistics of its batch in every mode, as in pix2pix."""

    def call(self, x):
        return self.norm(x, training=True)


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_code_that_always_normalizes_by_batch_statistics_is_kept(cls):
    blocks = [AlwaysTraining(cls, name="always"), Block(cls, name="by_mode")]
    model = trained(chain((6, 6, 3), L.Conv2D(4, 3), *blocks))
    folded, report = fold_batch_norm(model)
    assert set(report.kept) == {"always/hidden", "by_mode/hidden"}
    assert folded.get_layer("always").norm.trainable
    assert not folded.get_layer("by_mode").norm.trainable
    assert_same(folded, model)


def test_batch_norm_of_integer_images_becomes_a_layer_that_casts():
    images = keras.Input((6, 6, 3), dtype="uint8")
    x = L.Conv2D(4, 3)(KERAS_BN(name="of_images")(images))
    model = trained(keras.Model(images, x))
    folded, report = fold_batch_norm(model)
    assert list(report.kept) == ["of_images"]
    x = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-4, atol=1e-2)


def test_trainable_flags_and_adapted_layers_are_kept():
    normalization = L.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 5, (100, 4)))
    inner = chain((3,), L.Dense(3, name="thawed"), KERAS_BN(), KERAS_BN(name="affine"))
    model = chain((4,), normalization, L.Dense(3, name="frozen"), KERAS_BN(), inner)
    model.get_layer("frozen").trainable = inner.trainable = False
    inner.get_layer("thawed").trainable = True
    folded, _ = fold_batch_norm(model)
    new = folded.get_layer(inner.name)
    assert folded.trainable and not folded.get_layer("frozen").trainable
    assert not new.trainable and not new.get_layer("affine").trainable
    assert new.get_layer("thawed").trainable
    assert_same(folded, model)


def test_a_model_made_on_two_replicas_folds(two_replicas):
    with two_replicas.scope():
        model = SigmoidMLP(input_shape=(4, 4, 1))
    folded, _ = fold_batch_norm(trained(model))
    assert_same(folded, model)


def test_the_report_contains_the_measurements():
    model = trained(SigmoidMLP(input_shape=(4, 4, 1)))
    x = example(model, 5)
    folded, report = fold_batch_norm(model, x)
    (before,), (after,) = run(model, x), run(folded, x)
    # tf.function may sum in another order.
    assert report.largest_difference == pytest.approx(np.abs(after - before).max(), abs=1e-6)
    assert report.largest_output == pytest.approx(np.abs(before).max(), rel=1e-5)
    assert report.input_shapes == ((5, 4, 4, 1),)
    assert report.speedup == report.milliseconds_before / report.milliseconds_after
    lines = str(report).splitlines()
    assert lines[0] == "3 of 3 BatchNormalization layers folded"
    assert "same top class in 100.0%" in lines[1] and "[5, 4, 4, 1]" in lines[2]
    _, report = fold_batch_norm(_branch())
    assert str(report).splitlines()[-1] == (
        "not folded: bn  follows Conv2D 'conv', whose output is also used by Add 'add'"
    )


def test_wrong_folded_weights_are_detected(monkeypatch):
    right = fold._folded_weights

    def wrong(*args):
        weights = right(*args)
        return weights | {"bias": weights["bias"] + 1}

    monkeypatch.setattr(fold, "_folded_weights", wrong)
    with pytest.raises(ArithmeticError, match="folded model 'chain' .* differ by up to 1 from"):
        fold_batch_norm(chain((4,), L.Dense(3), KERAS_BN()))


def test_random_inputs_have_a_size_where_the_model_has_none():
    model = chain((None, None, 3), L.Conv2D(2, 3), KERAS_BN(), L.GlobalAveragePooling2D())
    _, report = fold_batch_norm(model)
    assert report.input_shapes == ((8, 224, 224, 3),)


class Subclassed(keras.Model):
    def call(self, x):
        return x


def _locked():
    layer = L.Dense(3, name="odd")
    layer.resource = threading.Lock()
    return chain((4,), layer, L.ReLU(), KERAS_BN())


def _not_finite():
    model = chain((4,), L.Dense(3), BatchNormalization(name="bn"))
    model.get_layer("bn").moving_variance.assign([1, -1, 1])
    return model


def _integers():
    inputs = keras.Input((4,), dtype="int32")
    return keras.Model(inputs, KERAS_BN()(L.Dense(3)(inputs)))


@pytest.mark.parametrize(
    "make, inputs, message",
    [
        (Subclassed, None, "is a subclassed Subclassed"),
        (lambda: KERAS_BN(name="bn"), None, "expected a keras.Model"),
        (lambda: keras.Sequential([L.Dense(3), KERAS_BN()]), None, "is not built"),
        (lambda: chain((4,), L.Dense(3)), None, "has no BatchNormalization to fold"),
        (_not_finite, None, "'bn' has no finite scale"),
        (_integers, None, "has an input of int32"),
        (
            lambda: chain((4,), L.Dense(3), KERAS_BN()),
            np.zeros((2, 5)),
            "not accept the inputs",
        ),
        (
            lambda: keras.Sequential([keras.Input((4,)), L.Dense(3), KERAS_BN()]),
            np.zeros((2, 5)),
            r"compare on \(Input 0.*expected axis -1 of input shape to have value 4.*\(2, 5\)",
        ),
        (
            lambda: chain((4,), L.Dense(3), KERAS_BN()),
            tf.data.Dataset.from_tensors(np.zeros((2, 4))),
            "type _TensorDataset: expected one batch",
        ),
        (lambda: chain((4,), L.Dense(3), KERAS_BN()), [None], "does not accept the inputs"),
        (lambda: _with_text_output()[1], None, "has no output of numbers to compare"),
        (
            lambda: _drawing_noise(),
            None,
            "computes other outputs in each call",
        ),
        (lambda: chain((4,), L.Dense(3), KERAS_BN()), np.zeros((0, 4)), "batch .* is empty"),
        (
            lambda: chain((4,), L.Dense(3), KERAS_BN()),
            np.full((2, 4), np.nan),
            "outputs of model 'chain'.*are not finite",
        ),
        (lambda: None, None, "model=None is invalid: expected a keras.Model"),
        (_locked, None, "'resource' of Dense 'odd' cannot be copied"),
    ],
)
def test_invalid_models_and_inputs_are_rejected(make, inputs, message):
    with pytest.raises(UsageError, match=message) as caught:
        fold_batch_norm(make(), inputs)
    assert "\n" not in str(caught.value)


def _with_text_output():
    """Two models that share their layers: of logits and the name of a class, and of the name."""
    inputs = keras.Input((5,))
    logits = KERAS_BN()(L.Dense(3)(inputs))
    names = L.StringLookup(vocabulary=["a", "b", "c"], invert=True, num_oov_indices=0)
    name = names(keras.ops.argmax(logits, axis=-1))
    return keras.Model(inputs, [logits, name]), keras.Model(inputs, name)


def _drawing_noise():
    class Noise(L.Layer):
        def call(self, x):
            # Unlike tf.random, the time does not depend on the seed of the tests.
            return x + tf.cast(tf.sin(1e4 * tf.timestamp()), x.dtype)

    return chain((4,), L.Dense(3), KERAS_BN(), Noise())


def test_outputs_of_text_are_not_compared():
    model = trained(_with_text_output()[0])
    _, report = fold_batch_norm(model)
    assert len(report.folded) == 1 and report.largest_difference < 1e-5


def test_an_optional_input_may_be_none():
    class Sum(L.Layer):
        def call(self, inputs):
            x, other = inputs
            return x if other is None else x + other

        def compute_output_shape(self, input_shape):
            return input_shape[0]

    inputs = [keras.Input((4,)), keras.Input((3,), optional=True)]
    model = keras.Model(inputs, Sum()([KERAS_BN()(L.Dense(3)(inputs[0])), inputs[1]]))
    _, report = fold_batch_norm(trained(model), [np.ones((2, 4), np.float32), None])
    assert len(report.folded) == 1 and report.input_shapes == ((2, 4),)


def test_a_folded_network_consists_of_keras_layers_only(tmp_path):
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3)(BatchNormalization()(inputs))
    x = BatchNormalization([1, 2, 3])(BatchNormalization()(x))
    model = trained(keras.Model(inputs, L.Dense(3)(L.Flatten()(x))))
    folded, report = fold_batch_norm(model)
    assert (len(report.folded), len(report.kept)) == (1, 2)
    assert all(type(x).__module__.startswith("keras.") for x in all_layers(folded))
    folded.save(tmp_path / "folded.keras")
    assert_same(keras.saving.load_model(tmp_path / "folded.keras"), model)


def test_activity_regularizers_penalize_the_same_values():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, activity_regularizer=keras.regularizers.L2(0.1))(inputs)
    x = L.ReLU()(BatchNormalization(activity_regularizer=keras.regularizers.L2(0.01))(x))
    x = L.Dense(5)(L.Flatten()(x))
    x = BatchNormalization(activity_regularizer=keras.regularizers.L1(0.02))(x)
    model = trained(keras.Model(inputs, x))
    folded, report = fold_batch_norm(model)
    assert not batch_norms(folded)
    reasons = sorted(report.kept.values())
    assert reasons == ["has an activity_regularizer"] * 2
    penalties = []
    for network in (model, folded):
        network(example(model), training=False)
        penalties.append(sum(float(loss) for loss in network.losses))
    assert penalties[1] == pytest.approx(penalties[0], rel=1e-5)


def test_a_layer_with_an_activity_regularizer_is_not_scaled():
    inputs = keras.Input((6,))
    x = L.Dense(4, name="dense", activity_regularizer="l2")(inputs)
    assert list(unfoldable_layers(keras.Model(inputs, BatchNormalization()(x))).values()) == [
        "follows Dense 'dense', which has an activity_regularizer"
    ]


def test_layers_inside_a_layer_have_different_names():
    @keras.saving.register_keras_serializable("test_fold")
    class Stage(L.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.blocks = [
                keras.Sequential([L.Dense(6, name="d"), BatchNormalization(name="bn")], name=name)
                for name in ("b1", "b2")
            ]

        def build(self, shape):
            for block in self.blocks:
                block.build(shape)

        def call(self, x):
            return self.blocks[1](self.blocks[0](x))

    inputs = keras.Input((6,))
    _, report = fold_batch_norm(keras.Model(inputs, Stage(name="stage")(inputs)))
    assert set(report.kept) == {"stage/b1/bn", "stage/b2/bn"}
    assert str(report).startswith("0 of 2 BatchNormalization layers folded")


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_models_of_sparse_and_ragged_inputs_are_folded(kind):
    if kind == "sparse":
        inputs = x = keras.Input((6,), sparse=True)
        batch = tf.sparse.from_dense(np.eye(6, dtype=np.float32))
    else:
        inputs = keras.Input((None,), dtype="int32", ragged=True)
        x = L.GlobalAveragePooling1D()(L.Embedding(5, 3)(inputs))
        batch = tf.ragged.constant([[1, 2], [3], [0, 4, 2]], dtype=tf.int32)
    model = trained(keras.Model(inputs, BatchNormalization()(L.Dense(4)(x))))
    folded, report = fold_batch_norm(model, batch)
    assert len(report.folded) == 1 and not batch_norms(folded)
    np.testing.assert_allclose(run(folded, batch), run(model, batch), rtol=1e-4, atol=1e-5)


def test_outputs_of_zero_are_no_basis_for_a_comparison():
    model = trained(keras.Sequential([keras.Input((6,)), L.Dense(4), BatchNormalization()]))
    batch = np.repeat(example(model, 1), 8, 0)
    estimate_population_statistics(model, [batch], 1)
    model.layers[1].beta.assign(np.zeros(4))
    with pytest.raises(UsageError, match="are 0, .* may be rounding errors: pass other inputs"):
        fold_batch_norm(model, batch)
