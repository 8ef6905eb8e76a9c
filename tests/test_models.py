"""The networks have the paper's table, sizes, parameter counts and variants."""

import math

import keras
import numpy as np
import pytest

from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.models import BNInception, SigmoidMLP
from bn_keras.models.inception import (
    FIGURE_5,
    PRESETS,
    STEMS,
    VARIANTS,
    LocalResponseNormalization,
)


def trainable_parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


# Counted by hand from Figure 5: 1000 classes, gamma and beta, no convolution bias.
@pytest.mark.parametrize(
    "pool_projection, separable_stem, parameters",
    [
        (96, False, 11_194_984),
        (96, True, 11_188_288),
        (128, False, 11_285_224),
        (128, True, 11_278_528),
    ],
)
def test_parameter_counts(pool_projection, separable_stem, parameters):
    model = BNInception(pool_projection=pool_projection, separable_stem=separable_stem)
    assert trainable_parameters(model) == parameters


def test_parameters_of_the_caffe_ports():
    # The count that pytorchcv asserts of its own.
    assert trainable_parameters(BNInception(preset="caffe")) == 11_295_240


def test_variables_of_tf_slim():
    # The count that TF-Slim's own test asserts, of the base with its moving statistics.
    model = BNInception(preset="slim")
    assert model.count_params() - model.get_layer("logits").count_params() == 10_173_112


def test_output_sizes_are_those_of_figure_5():
    model = BNInception("bn_x5")
    sizes = {row.name: model.get_layer(row.name).output.shape[1:] for row in FIGURE_5}
    assert sizes == {
        "3a": (28, 28, 256),
        "3b": (28, 28, 320),
        "3c": (14, 14, 576),
        "4a": (14, 14, 576),
        "4b": (14, 14, 576),
        "4c": (14, 14, 576),
        "4d": (14, 14, 576),
        "4e": (7, 7, 1024),
        "5a": (7, 7, 1024),
        "5b": (7, 7, 1024),
    }
    assert model.output_shape == (None, 1000)


def small(variant="bn_x5", **options):
    options = dict(classes=10, input_shape=(8, 8, 1), width=0.125, stem="digits") | options
    return BNInception(variant, **options)


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_differ_as_the_paper_says(variant):
    model = small(variant)
    convolutions = layers_of(model, keras.layers.Conv2D)
    names = {layer.name for layer in model.layers}
    has_bn = variant != "inception"
    assert all(conv.use_bias != has_bn for conv in convolutions)
    for conv in convolutions:
        assert (conv.name.replace("_conv", "_bn") in names) == has_bn
    accelerated = variant in ("bn_x5", "bn_x30", "bn_x5_sigmoid")
    assert bool(layers_of(model, LocalResponseNormalization)) != accelerated
    assert bool(layers_of(model, keras.layers.Dropout)) != accelerated
    nonlinearity = {
        layer.activation.__name__ for layer in layers_of(model, keras.layers.Activation)
    }
    assert nonlinearity == {"sigmoid" if variant == "bn_x5_sigmoid" else "relu"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_bias_stands_in_front_of_bn_but_in_caffes_ports(variant, preset):
    model = small(variant, preset=preset, stem="imagenet", input_shape=(32, 32, 3))
    for conv in layers_of(model, keras.layers.Conv2D):
        (following,) = (node.operation for node in conv._outbound_nodes)
        has_bn = isinstance(following, BatchNormalization)
        assert conv.use_bias == (not has_bn or preset == "caffe")
        assert has_bn or variant == "inception"


# PyTorch's rules: floor((n + 2p - k) / 2) + 1, and for the pools, with p = 0, the ceiling.
@pytest.mark.parametrize("side", [32, 33, 64, 224])
def test_caffes_sizes_are_those_of_pytorch(side):
    def conv(n, k):
        return (n + 2 * (k // 2) - k) // 2 + 1

    def pool(n):
        return math.ceil((n - 3) / 2) + 1

    model = small(preset="caffe", stem="imagenet", input_shape=(side, side, 3))
    first = conv(side, 7)
    second = pool(first)
    third = pool(second)
    assert model.get_layer("stem_1_conv").output.shape[1] == first
    assert model.get_layer("stem_1_pool").output.shape[1] == second
    assert model.get_layer("3a").output.shape[1] == third
    assert model.get_layer("3c").output.shape[1] == conv(third, 3)
    assert model.get_layer("5b").output.shape[1] == conv(conv(third, 3), 3)


def test_width_scales_every_convolution():
    full, half = (
        [c.filters for c in layers_of(small(width=w), keras.layers.Conv2D)] for w in (1.0, 0.5)
    )
    assert [round(f / 2) for f in full] == half


def test_kernels_of_one_shape_are_drawn_apart():
    model = small(kernel_initializer=keras.initializers.HeNormal())
    first, second = (model.get_layer(f"{m}_3x3_conv").kernel.numpy() for m in ("4a", "3b"))
    assert first.shape == second.shape
    assert not np.allclose(first, second)


def test_logits_are_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small("inception")
    assert model.get_layer("3a_3x3_conv").compute_dtype == "bfloat16"
    assert model(np.ones((2, 8, 8, 1), np.float32)).dtype == "float32"


def test_local_response_normalization_is_caffes():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 7)).astype(np.float32) * 50
    padded = np.pad(x.astype(np.float64) ** 2, [(0, 0)] * 3 + [(2, 2)])
    window = sum(padded[..., i : i + 7] for i in range(5))
    expected = x / (1 + 1e-4 / 5 * window) ** 0.75
    np.testing.assert_allclose(LocalResponseNormalization()(x), expected, rtol=1e-4)


@pytest.mark.parametrize("build", [small, SigmoidMLP])
def test_a_saved_network_gives_the_same_logits(build, tmp_path):
    model = build()
    images = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype(np.float32)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(images), loaded(images))


def test_mlp_has_bn_before_each_sigmoid_and_no_bias_there():
    kinds = [type(layer).__name__ for layer in SigmoidMLP("bn").layers[2:-1]]
    assert kinds == ["Dense", "BatchNormalization", "Activation"] * 3
    biased = [layer.use_bias for layer in layers_of(SigmoidMLP("baseline"), keras.layers.Dense)]
    assert biased == [True] * 4
    biased = [layer.use_bias for layer in layers_of(SigmoidMLP("bn"), keras.layers.Dense)]
    assert biased == [False] * 3 + [True]


@pytest.mark.parametrize("stem, smallest", [("imagenet", 32), ("cifar", 8), ("digits", 4)])
def test_the_smallest_image_is_accepted_and_a_smaller_one_refused(stem, smallest):
    assert set(STEMS) == {"imagenet", "cifar", "digits"}
    model = small(stem=stem, input_shape=(smallest, smallest, 3))
    assert model.get_layer("5b").output.shape[1:3] == (1, 1)
    with pytest.raises(UsageError, match=f"at least {smallest}x{smallest}"):
        small(stem=stem, input_shape=(smallest, smallest - 1, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="bn_x7"), "unknown variant 'bn_x7': accepted are inception, bn_baseline"),
        (dict(stem="huge"), "unknown stem 'huge': accepted are imagenet, cifar, digits"),
        (dict(preset="mxnet"), "unknown preset 'mxnet': accepted are paper, slim, caffe"),
        (dict(preset="caffe", input_shape=(10, 10, 1)), "module 4e gets maps of 5x5"),
        (dict(classes=0), "classes is 0"),
        (dict(width=0), "width is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(input_shape=(8, 8)), "has to be \\(height, width, channels\\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        small(**options)


def test_an_unknown_mlp_is_refused():
    with pytest.raises(UsageError, match="accepted are baseline, bn"):
        SigmoidMLP("bn_x5")
