"""The networks agree with the paper's table, sizes, parameter counts and variants."""

import functools
import math
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import storage
from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import BucketUnavailableError, UsageError
from bn_keras.models import BNInception, SigmoidMLP
from bn_keras.models import bn_inception as inception
from bn_keras.models.bn_inception import (
    FIGURE_5,
    STEMS,
    VARIANTS,
    LocalResponseNormalization,
)
from bn_keras.models.weights_file import load_weights


def trainable_parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


# Counted by hand from Figure 5, for 1000 classes, with gamma and beta, without convolution biases.
@pytest.mark.parametrize(
    "pool_projection, separable_stem, parameters",
    [
        (96, False, 11_194_984),
        (96, True, 11_188_288),
        (128, False, 11_285_224),
        (128, True, 11_278_528),
    ],
)
def test_parameters_equal_the_counts_from_figure_5(pool_projection, separable_stem, parameters):
    model = BNInception(pool_projection=pool_projection, separable_stem=separable_stem)
    assert trainable_parameters(model) == parameters


def test_preset_caffe_has_the_parameters_of_its_ports():
    # pytorchcv asserts this count.
    assert trainable_parameters(BNInception(preset="caffe")) == 11_295_240


def test_preset_slim_has_the_variables_of_tf_slim():
    # TF-Slim's own test asserts this count, without the classifier, with the moving statistics.
    model = BNInception(preset="slim")
    assert model.count_params() - model.get_layer("logits").count_params() == 10_173_112


def test_auxiliary_classifier_adds_the_expected_parameters():
    assert trainable_parameters(BNInception(auxiliary=True)) == 13_605_672


def test_output_sizes_agree_with_figure_5():
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


@pytest.fixture
def short_figure_5(monkeypatch):
    """Reduces the network to one module of each kind; building all ten is slow."""
    rows = [row for row in FIGURE_5 if row.name in ("3a", "3c", "5b")]
    monkeypatch.setattr(inception, "FIGURE_5", rows)


WITHOUT_BN = ("inception", "inception_sigmoid")
ACCELERATED = ("bn_x5", "bn_x30", "bn_x5_sigmoid")


@pytest.mark.parametrize("variant", [*WITHOUT_BN, "bn_baseline", *ACCELERATED])
def test_variants_differ_as_the_paper_says(variant):
    model = small(variant)
    convolutions = layers_of(model, keras.layers.Conv2D)
    names = {layer.name for layer in model.layers}
    has_bn = variant not in WITHOUT_BN
    assert all(conv.use_bias != has_bn for conv in convolutions)
    for conv in convolutions:
        assert (conv.name.replace("_conv", "_bn") in names) == has_bn
    accelerated = variant in ACCELERATED
    assert bool(layers_of(model, LocalResponseNormalization)) != accelerated
    assert [d.rate for d in layers_of(model, keras.layers.Dropout)] == [0.4] * (not accelerated)
    nonlinearity = {
        layer.activation.__name__ for layer in layers_of(model, keras.layers.Activation)
    }
    assert nonlinearity == {"sigmoid" if variant.endswith("_sigmoid") else "relu"}


# Section 4.2.3 lists the changes; their assignment to the members is ours.
@pytest.mark.parametrize(
    "member, scale, dropout, per_activation",
    [
        (1, 2.0, [], False),
        (2, 1.0, [0.05], False),
        (3, 1.0, [0.1], False),
        (4, 1.0, [], True),
        (5, 2.0, [0.05], False),
        (6, 1.0, [0.1], True),
    ],
)
def test_ensemble_members_differ_as_listed(member, scale, dropout, per_activation, short_figure_5):
    assert sum("ensemble" in variant for variant in VARIANTS) == 6
    model = small(f"bn_x30_ensemble_{member}", kernel_initializer="ones")
    assert [d.rate for d in layers_of(model, keras.layers.Dropout)] == dropout
    assert {float(c.kernel[0, 0, 0, 0]) for c in layers_of(model, keras.layers.Conv2D)} == {scale}
    assert float(model.get_layer("logits").kernel[0, 0]) == 1.0
    for bn in layers_of(model, BatchNormalization):
        activations = tuple(bn.gamma.shape) == bn.output.shape[1:]
        assert activations == (per_activation and bn.name.startswith("5b_"))


@pytest.mark.parametrize(
    "variant, preset",
    [(variant, "paper") for variant in VARIANTS]
    + [(variant, preset) for variant in ("inception", "bn_x30") for preset in ("slim", "caffe")],
)
def test_only_preset_caffe_has_a_bias_before_bn(variant, preset, short_figure_5):
    model = small(variant, preset=preset, stem="imagenet", input_shape=(32, 32, 3))
    for conv in layers_of(model, keras.layers.Conv2D):
        (following,) = (node.operation for node in conv._outbound_nodes)
        has_bn = isinstance(following, BatchNormalization)
        assert conv.use_bias == (not has_bn or preset == "caffe")
        separable = isinstance(conv, keras.layers.SeparableConv2D)
        assert has_bn == (variant not in WITHOUT_BN and not (preset == "slim" and separable))


@pytest.mark.parametrize(
    "preset, epsilon, gamma", [("paper", 1e-3, True), ("slim", 1e-3, False), ("caffe", 1e-5, True)]
)
def test_presets_configure_bn(preset, epsilon, gamma, short_figure_5):
    for bn in layers_of(small(preset=preset), BatchNormalization):
        assert (bn.epsilon, bn.scale, bn.center) == (epsilon, gamma, True)
    for bn in layers_of(small(preset=preset, epsilon=0.1, gamma=not gamma), BatchNormalization):
        assert (bn.epsilon, bn.scale) == (0.1, not gamma)


@pytest.mark.parametrize("preset", ["paper", "slim", "caffe"])
@pytest.mark.parametrize("separable_bn", [False, True])
def test_bn_after_the_separable_convolution_is_optional(preset, separable_bn, short_figure_5):
    model = small(preset=preset, separable_stem=True, separable_bn=separable_bn)
    (conv,) = layers_of(model, keras.layers.SeparableConv2D)
    assert conv.use_bias == (not separable_bn or preset == "caffe")
    normalized = {bn.name for bn in layers_of(model, BatchNormalization)}
    assert ("stem_1_bn" in normalized) == separable_bn
    assert {"stem_2_bn", "5b_1x1_bn"} < normalized


# PyTorch's rules: floor((n + 2p - k) / 2) + 1; for pools p = 0 and the ceiling.
@pytest.mark.parametrize("side", [32, 33, 64, 224])
def test_map_sizes_of_preset_caffe_agree_with_pytorch(side):
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


# A kernel of ones on ones counts the pixels under it: 7x7 minus the padding. For 32 pixels and
# stride 2, TensorFlow pads 2 before and 3 after; Caffe pads 3 and 3.
@pytest.mark.parametrize("preset, covered", [("paper", 5 * 5), ("caffe", 4 * 4)])
def test_presets_pad_convolutions_of_stride_2(preset, covered, short_figure_5):
    model = small(
        preset=preset,
        separable_stem=False,
        stem="imagenet",
        input_shape=(32, 32, 1),
        kernel_initializer="ones",
    )
    convolved = keras.Model(model.input, model.get_layer("stem_1_conv").output)
    assert float(convolved(np.ones((1, 32, 32, 1)))[0, 0, 0, 0]) == covered


# PyTorch counts the padding in (x[i-1] + x[i] + x[i+1]) / 3, in both directions.
@pytest.mark.parametrize("preset, corner", [("paper", 1.0), ("slim", 1.0), ("caffe", 4 / 9)])
def test_presets_average_over_the_padding_or_not(preset, corner):
    model = small(preset=preset)
    pool = model.get_layer("3a_pool")
    start = model.get_layer("3a_pool_pad") if preset == "caffe" else pool
    averages = keras.Model(start.input, pool.output)(np.ones((1, *start.input.shape[1:])))
    assert float(averages[0, 0, 0, 0]) == pytest.approx(corner)
    assert float(averages[0, 1, 1, 0]) == pytest.approx(1.0)


def test_width_scales_every_convolution():
    full, half = (
        [c.filters for c in layers_of(small(width=w), keras.layers.Conv2D)] for w in (1.0, 0.5)
    )
    assert [round(f / 2) for f in full] == half


def test_kernels_of_one_shape_have_different_initial_values():
    model = small(kernel_initializer=keras.initializers.HeNormal())
    first, second = (model.get_layer(f"{m}_3x3_conv").kernel.numpy() for m in ("4a", "3b"))
    assert first.shape == second.shape
    assert not np.allclose(first, second)


def test_logits_are_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small("inception")
    assert model.get_layer("3a_3x3_conv").compute_dtype == "bfloat16"
    assert model(np.ones((2, 8, 8, 1), np.float32)).dtype == "float32"


def test_local_response_normalization_agrees_with_caffe():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 7)).astype(np.float32) * 50
    padded = np.pad(x.astype(np.float64) ** 2, [(0, 0)] * 3 + [(2, 2)])
    window = sum(padded[..., i : i + 7] for i in range(5))
    expected = x / (1 + 1e-4 / 5 * window) ** 0.75
    np.testing.assert_allclose(LocalResponseNormalization()(x), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "build",
    [small, SigmoidMLP, lambda: small("bn_x30_ensemble_1"), lambda: small("bn_x30_ensemble_4")],
)
def test_a_saved_network_has_the_same_logits(build, tmp_path, short_figure_5):
    model = build()
    images = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype(np.float32)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(images), loaded(images))


def test_mlp_has_bn_instead_of_a_bias_before_each_sigmoid():
    kinds = [type(layer).__name__ for layer in SigmoidMLP("bn").layers[2:-1]]
    assert kinds == ["Dense", "BatchNormalization", "Activation"] * 3
    biased = [layer.use_bias for layer in layers_of(SigmoidMLP("baseline"), keras.layers.Dense)]
    assert biased == [True] * 4
    biased = [layer.use_bias for layer in layers_of(SigmoidMLP("bn"), keras.layers.Dense)]
    assert biased == [False] * 3 + [True]


@pytest.mark.parametrize("stem, smallest", [("imagenet", 32), ("cifar", 8), ("digits", 4)])
def test_images_smaller_than_the_total_stride_are_rejected(stem, smallest):
    assert set(STEMS) == {"imagenet", "cifar", "digits"}
    model = small(stem=stem, input_shape=(smallest, smallest, 3))
    assert model.get_layer("5b").output.shape[1:3] == (1, 1)
    with pytest.raises(UsageError, match=f"at least {smallest}x{smallest}"):
        small(stem=stem, input_shape=(smallest, smallest - 1, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="bn_x7"), "unknown variant 'bn_x7': expected one of inception, bn_baseline"),
        (dict(stem="huge"), "unknown stem 'huge': expected one of imagenet, cifar, digits"),
        (dict(preset="mxnet"), "unknown preset 'mxnet': expected one of paper, slim, caffe"),
        (dict(preset="caffe", input_shape=(10, 10, 1)), "module 4e cannot halve its 5x5 maps"),
        (dict(classes=0), "classes=0 is invalid: expected a positive integer"),
        (dict(classes=10.5), "classes=10.5 is invalid: expected a positive integer"),
        (dict(classes="10"), "classes='10' is invalid: expected a positive integer"),
        (dict(width=0), "width=0 is invalid: expected a positive number"),
        (dict(pool_projection=-96), "pool_projection=-96 is invalid"),
        (dict(dropout=1.0), r"dropout=1.0 is invalid: expected a number in \[0, 1\)"),
        (dict(initializer_scale=0.0), "initializer_scale=0.0 is invalid"),
        (dict(pooling="sum"), "unknown pooling 'sum': expected 'avg', 'max' or None"),
        (dict(pooling="max"), "pooling='max' requires include_top=False"),
        (dict(auxiliary=True, include_top=False), "auxiliary=True requires include_top=True"),
        (dict(classifier_activation="sofmax"), "unknown classifier_activation 'sofmax'"),
        (
            dict(weights="nowhere.weights.h5"),
            r"'nowhere.weights.h5' cannot be read \(.*[Nn]o such file.*\): expected",
        ),
        (dict(variant="bn_x30_ensemble_4", input_shape=(None, None, 3)), "has an unknown size"),
        (dict(input_shape=(8, 8, None)), "expected \\(height, width, channels\\)"),
        (dict(input_shape=(8, 8, 0)), "expected \\(height, width, channels\\)"),
        (dict(input_shape=(8, 8)), "expected \\(height, width, channels\\)"),
        (dict(input_shape=None), r"input_shape=None is invalid: expected \(height, width"),
        (dict(input_shape=8), r"input_shape=8 is invalid: expected \(height, width"),
        (dict(input_shape=("a", 8, 1)), r"input_shape=\('a', 8, 1\) is invalid: expected \(height"),
        (dict(input_shape=(8.0, 8, 1)), r"input_shape=\(8.0, 8, 1\) is invalid: expected \(height"),
        (dict(width="1"), "width='1' is invalid: expected a positive number"),
        (dict(width=None), "width=None is invalid: expected a positive number"),
        (dict(width=math.nan), "width=nan is invalid: expected a positive number"),
        (dict(initializer_scale="1"), "initializer_scale='1' is invalid"),
        (dict(dropout="0.5"), r"dropout='0.5' is invalid: expected a number in \[0, 1\)"),
        (dict(kernel_initializer="foo"), "kernel_initializer='foo' is invalid: expected the name"),
        (dict(kernel_initializer=None), "kernel_initializer=None is invalid: expected the name"),
        (dict(kernel_initializer=object), "kernel_initializer=<class 'object'> is invalid"),
        (dict(modules=5), "modules=5 is invalid: expected names in this order"),
        (dict(variant=["bn_x5"]), r"unknown variant \['bn_x5'\]: expected one of inception"),
        (dict(weights=5), "weights=5 is invalid: expected the path of a .weights.h5 or .keras"),
    ],
)
def test_invalid_arguments_are_rejected(options, message):
    with pytest.raises(UsageError, match=message) as error:
        small(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="bn_x5"), "expected one of baseline, bn"),
        (dict(classes=0), "classes=0 is invalid: expected a positive integer"),
        (
            dict(units=(10, 1.5)),
            r"units=\(10, 1.5\) is invalid: expected the positive width of each",
        ),
        (dict(units=100), "units=100 is invalid: expected the positive width of each hidden layer"),
        (dict(input_shape=None), "input_shape=None is invalid: expected the positive sizes of one"),
        (dict(input_shape=(None, 3)), r"input_shape=\(None, 3\) is invalid: expected the positive"),
        (dict(kernel_initializer="foo"), "kernel_initializer='foo' is invalid: expected the name"),
    ],
)
def test_an_invalid_mlp_is_rejected(options, message):
    with pytest.raises(UsageError, match=message):
        SigmoidMLP(**options)


def _constant(shape, dtype=None):
    return tf.fill(shape, tf.constant(0.25, dtype))


@pytest.mark.parametrize("build", [small, SigmoidMLP])
def test_an_initializer_may_be_a_function(build, short_figure_5):
    model = build(kernel_initializer=_constant)
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    assert len(kernels) > 3 and all(np.all(kernel.numpy() == 0.25) for kernel in kernels)


def test_an_initializer_function_is_scaled(short_figure_5):
    model = small(kernel_initializer=_constant, initializer_scale=2.0)
    assert np.all(model.get_layer("stem_1_conv").kernel.numpy() == 0.5)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(small, stem="imagenet", input_shape=(32, 32, 3), auxiliary=True),
        functools.partial(small, "inception", preset="caffe", include_top=False, pooling="max"),
        SigmoidMLP,
    ],
)
def test_networks_have_channels_last_whatever_keras_default_is(build, monkeypatch):
    rows = [row for row in FIGURE_5 if row.name in ("3a", "3c", "4d", "5b")]
    monkeypatch.setattr(inception, "FIGURE_5", rows)
    expected = build().to_json()
    keras.config.set_image_data_format("channels_first")
    try:
        assert build().to_json() == expected
    finally:
        keras.config.set_image_data_format("channels_last")


def images_of(model, sides=(8, 8)):
    generator = np.random.default_rng(0)
    return generator.normal(size=(2, *sides, model.input_shape[-1])).astype(np.float32)


def test_features_and_logits_are_parts_of_one_network(tmp_path, short_figure_5):
    whole = small(classifier_activation="softmax")
    whole.save_weights(tmp_path / "whole.weights.h5")
    part = functools.partial(small, include_top=False, weights=tmp_path / "whole.weights.h5")
    images = images_of(whole)
    maps = part()(images)
    assert maps.shape == (2, 4, 4, 128)
    np.testing.assert_allclose(part(pooling="max")(images), np.max(maps, (1, 2)), rtol=1e-6)
    average = part(pooling="avg")(images)
    np.testing.assert_allclose(average, np.mean(maps, (1, 2)), rtol=1e-5)
    kernel, bias = whole.get_layer("logits").get_weights()
    logits = np.matmul(average, kernel) + bias
    expected = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
    np.testing.assert_allclose(whole(images), expected, rtol=1e-4)
    np.testing.assert_allclose(
        small(weights=tmp_path / "whole.weights.h5")(images), logits, rtol=1e-4, atol=1e-5
    )


def test_every_module_is_a_layer_to_extract_features_from():
    model = small(input_shape=(None, None, 3))
    outputs = [model.get_layer(row.name).output for row in FIGURE_5]
    features = keras.Model(model.input, outputs)(images_of(model, (24, 40)))
    strides = {"3a": 1, "3b": 1, "5a": 4, "5b": 4}
    for row, feature in zip(FIGURE_5, features, strict=True):
        stride = strides.get(row.name, 4 if row.name == "4e" else 2)
        assert feature.shape[1:3] == (24 // stride, 40 // stride)


@pytest.mark.parametrize("name", ["network.weights.h5", "network.keras"])
def test_weights_survive_a_round_trip(name, tmp_path, short_figure_5):
    model = small("bn_baseline")
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(np.random.default_rng(0).uniform(0.5, 1.5, variable.shape))
    save = model.save if name.endswith(".keras") else model.save_weights
    save(tmp_path / name)
    loaded = small("bn_baseline", weights=tmp_path / name)
    np.testing.assert_array_equal(loaded(images_of(model)), model(images_of(model)))


def test_weights_load_from_any_file_system_of_tensorflow(tmp_path, short_figure_5):
    """ram:// replaces gs://, which needs a network."""
    model = small()
    model.save_weights(tmp_path / "network.weights.h5")
    tf.io.gfile.copy(str(tmp_path / "network.weights.h5"), "ram://network.weights.h5")
    loaded = small(weights="ram://network.weights.h5")
    np.testing.assert_array_equal(loaded(images_of(model)), model(images_of(model)))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(classes=12),
            "1 of the wrong shape \\(logits of \\[\\(128, 10\\), .* instead of \\[\\(128, 12\\)",
        ),
        (
            dict(variant="inception"),
            "29 extra \\(stem_1_bn, .*, 26 more\\), 29 of the wrong shape \\(stem_1_conv",
        ),
        (dict(auxiliary=True), "5 missing \\(auxiliary_reduce_conv, .*, 2 more\\)"),
    ],
)
def test_weights_of_another_network_are_rejected(options, message, tmp_path, monkeypatch):
    rows = [row for row in FIGURE_5 if row.name in ("3a", "3c", "4d", "5b")]
    monkeypatch.setattr(inception, "FIGURE_5", rows)
    small().save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(UsageError, match=message) as raised:
        small(**options, weights=tmp_path / "other.weights.h5")
    assert "\n" not in str(raised.value)


def test_other_files_are_rejected_as_weights(tmp_path, short_figure_5):
    (tmp_path / "a.weights.h5").write_text("no weights")
    (tmp_path / "a.keras").write_text("no weights")
    for name in ("a.weights.h5", "a.keras"):
        with pytest.raises(UsageError, match=r"cannot be read \(.+\): expected a .weights.h5"):
            load_weights(small(), tmp_path / name)


def test_a_bucket_that_does_not_answer_is_not_a_damaged_file(monkeypatch):
    def fail(path):
        raise BucketUnavailableError(f"{path} cannot be read: no answer")

    monkeypatch.setattr(storage, "read", fail)
    with pytest.raises(BucketUnavailableError):
        load_weights(small(), "gs://bucket/a.keras")


def test_a_file_of_weights_may_have_any_bytes_in_its_name(tmp_path, short_figure_5):
    model = small()
    model.save_weights(tmp_path / "a.weights.h5")
    name = os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.weights.h5")
    os.rename(tmp_path / "a.weights.h5", name)
    load_weights(small(), name)


def test_a_damaged_file_is_rejected(tmp_path, short_figure_5):
    model = small()
    model.save_weights(tmp_path / "a.weights.h5")
    model.save(tmp_path / "a.keras")
    hdf5 = (tmp_path / "a.weights.h5").read_bytes()
    archive = bytearray((tmp_path / "a.keras").read_bytes())
    archive[archive.index(model.get_layer("logits").kernel.numpy().tobytes())] ^= 1
    damaged = {
        "short.weights.h5": hdf5[: len(hdf5) // 2],
        # The heap contains the names of the groups.
        "nameless.weights.h5": hdf5.replace(b"HEAP", b"PAEH"),
        "flipped.keras": archive,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot be read \(.+\): expected a .weights.h5"):
            load_weights(model, tmp_path / name)


def test_weights_that_do_not_fit_leave_the_model_unchanged(tmp_path, short_figure_5):
    small(classes=12).save_weights(tmp_path / "other.weights.h5")
    model = small()
    before = model.get_weights()
    with pytest.raises(UsageError):
        load_weights(model, tmp_path / "other.weights.h5")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
