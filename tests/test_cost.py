"""Costs agree with the paper's table, with published counts and with TensorFlow's graphs."""

import functools
import importlib
import math
import pathlib
import re

import keras
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization, BNInception, SigmoidMLP, cost, count_cost
from bn_keras.errors import UsageError
from bn_keras.models.bn_inception import FIGURE_5

ROOT = pathlib.Path(__file__).resolve().parent.parent
L = keras.layers


@functools.cache
def _inception_cost():
    return count_cost(BNInception("bn_x30"))


def _figure_5_multiply_adds():
    """Counts from the paper's table, with a separable stem and projections of 96 in 4c and 4d."""
    total = 112**2 * (7 * 7 * 3 * 8 + 3 * 8 * 64)
    total += 56**2 * (64 * 64 + 3 * 3 * 64 * 192)
    side, channels = 28, 192
    for row in FIGURE_5:
        inside, outside = side**2, (side // row.stride) ** 2
        projection = 96 if row.name in ("4c", "4d") else row.projection
        total += inside * channels * (row.conv1x1 + row.reduce3x3 + row.reduce_double)
        total += outside * channels * projection
        total += outside * 9 * row.reduce3x3 * row.conv3x3
        total += inside * 9 * row.reduce_double * row.conv_double
        total += outside * 9 * row.conv_double**2
        side //= row.stride
        channels = row.conv1x1 + row.conv3x3 + row.conv_double + (projection or channels)
    return total + 1024 * 1000


def test_inception_costs_what_figure_5_says():
    counted = _inception_cost()
    assert counted.multiply_adds == _figure_5_multiply_adds()
    assert counted.flops == 2 * counted.multiply_adds
    assert counted.trainable == 11_188_288
    assert counted.uncounted == ()


def test_auxiliary_parameters_count_as_trainable_and_frozen_ones_do_not():
    model = BNInception("bn_x30", input_shape=(224, 224, 3), auxiliary=True)
    # Moving statistics: a mean and a variance for each beta.
    betas = sum(v.shape[0] for v in model.trainable_variables if v.name == "beta")
    counted = count_cost(model)
    assert (counted.trainable, counted.non_trainable) == (13_605_672, 2 * betas)
    model.get_layer("logits").trainable = False
    frozen = count_cost(model)
    assert frozen.trainable == 13_605_672 - 1_025_000
    assert frozen.non_trainable == 2 * betas + 1_025_000


@pytest.mark.parametrize(
    "name, parameters, multiply_adds, tolerance",
    [
        # He et al. 2015 (arXiv 1512.03385), table 1: 3.8e9. (4.1e9 is the count of version 1.5,
        # which strides in the 3x3 convolutions.)
        ("ResNet50", 25_636_712, 3.8e9, 0.02),
        # Sandler et al. 2018 (arXiv 1801.04381), table 4: 300 M.
        ("MobileNetV2", 3_538_984, 300e6, 0.01),
    ],
)
def test_applications_have_their_published_counts(name, parameters, multiply_adds, tolerance):
    counted = count_cost(getattr(keras.applications, name)(weights=None))
    assert counted.trainable + counted.non_trainable == parameters
    assert counted.multiply_adds == pytest.approx(multiply_adds, rel=tolerance)


def _every_kind():
    x = images = keras.Input((16, 16, 6))
    x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
    x = L.SeparableConv2D(10, 3, padding="same", depth_multiplier=3)(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2)(x)
    x = L.BatchNormalization()(x)
    x = L.Reshape((-1, 20))(x)
    x = L.Conv1D(7, 5, strides=2, padding="causal")(x)
    x = L.Dense(9)(x)
    x = L.Dense(4)(L.Flatten()(x))
    return keras.Model(images, x)


def test_multiply_adds_equal_those_of_tensorflows_profiler():
    model = _every_kind()
    images = tf.TensorSpec([1, *model.input_shape[1:]])
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(images).graph
    builder = tf.compat.v1.profiler.ProfileOptionBuilder
    options = builder(builder.float_operation()).with_empty_output().build()
    # The profiler nests the kinds of operations, each inside the previous one.
    kind = tf.compat.v1.profiler.profile(graph, cmd="op", options=options)
    flops = {}
    while kind.children:
        (kind,) = kind.children
        flops[kind.name] = kind.float_ops
    products = sum(flops[name] for name in ("Conv2D", "DepthwiseConv2dNative", "MatMul"))
    assert count_cost(model).flops == products


@pytest.mark.parametrize(
    "shape, layer, multiply_adds",
    # The profiler does not see these layers, or approximates their counts.
    [
        ((8, 8, 6), L.Conv2D(4, 3, groups=2), 36 * 4 * 9 * 3),
        ((8, 8, 6), L.Conv2D(4, 3, dilation_rate=2), 16 * 4 * 9 * 6),
        ((8, 8, 6), L.Conv2DTranspose(4, 3, strides=2), 64 * 6 * 9 * 4),
        ((6, 6, 6, 2), L.Conv3D(4, 3), 64 * 4 * 27 * 2),
        ((9, 2), L.SeparableConv1D(4, 3, depth_multiplier=5), 7 * (3 * 10 + 10 * 4)),
        ((5, 7, 3), L.Dense(4), 35 * 3 * 4),
    ],
)
def test_multiply_adds_equal_those_counted_by_hand(shape, layer, multiply_adds):
    images = keras.Input(shape)
    assert count_cost(keras.Model(images, layer(images))).multiply_adds == multiply_adds


def test_layers_of_nested_models_count_at_each_call():
    tower = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(4, 3, padding="same"), L.ReLU()])
    images = keras.Input((8, 8, 4))
    once = count_cost(keras.Model(images, tower(images)))
    twice = count_cost(keras.Model(images, tower(tower(images))))
    flat = count_cost(tower)
    assert [layer.name for layer in once.layers][1:] == [
        f"{tower.name}/{layer.name}" for layer in flat.layers[1:]
    ]
    assert once.multiply_adds == flat.multiply_adds == 64 * 4 * 9 * 4
    assert twice.multiply_adds == 2 * once.multiply_adds
    assert twice.trainable == once.trainable == 9 * 4 * 4 + 4
    # The images and the output of each ReLU.
    assert once.activation_bytes == 2 * 64 * 4 * 4
    assert twice.activation_bytes == 3 * 64 * 4 * 4


def _branches():
    """A network that uses every rule about saved activations."""
    x = images = keras.Input((16, 16, 8))
    x = L.Conv2D(16, 3, padding="same", use_bias=False)(x)
    x = L.Activation("relu")(BatchNormalization()(x))
    a = L.Activation("sigmoid")(L.SeparableConv2D(8, 3, padding="same", depth_multiplier=2)(x))
    b = L.Conv2D(8, 1, activation="tanh")(L.AveragePooling2D(3, 1, padding="same")(x))
    x = L.Concatenate()([a, L.Add()([b, a])])
    x = L.MaxPooling2D(2)(x)
    x = L.Activation("swish")(L.Conv2D(32, 3, padding="same")(x))
    return keras.Model(images, L.Dense(3)(L.GlobalAveragePooling2D()(x)))


def _elements_read_backward(model):
    """Returns how many values per image TensorFlow's backward pass reads from the forward pass."""
    forward = set()

    @tf.function
    def step(images):
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
        forward.update(op.name for op in outputs.graph.get_operations())
        return tape.gradient(outputs, [v.value for v in model.trainable_variables])

    def origin(tensor):
        while tensor.op.type in ("Identity", "IdentityN", "Reshape", "StopGradient"):
            tensor = tensor.op.inputs[tensor.value_index]
        return tensor.ref()

    # No other tensor has an axis of 17.
    graph = step.get_concrete_function(tf.TensorSpec([17, *model.input_shape[1:]])).graph
    read, seen, tensors = set(), set(), list(graph.outputs)
    while tensors:
        tensor = tensors.pop()
        if tensor.op.name in forward:
            read.add(origin(tensor))
        elif tensor.op.name not in seen:
            seen.add(tensor.op.name)
            tensors += tensor.op.inputs
    shapes = [r.deref().shape for r in read]
    return sum(shape.num_elements() for shape in shapes if 17 in shape[:1]) / 17


def test_saved_activations_are_those_that_tensorflows_backward_pass_reads():
    model = _branches()
    assert count_cost(model, "float32").activation_bytes == 4 * _elements_read_backward(model)


def test_activation_memory_follows_the_dtype():
    model = _branches()
    whole = count_cost(model).activation_bytes
    assert count_cost(model, "bfloat16").activation_bytes == whole / 2
    keras.config.set_dtype_policy("mixed_bfloat16")
    # The images remain float32.
    images = 16 * 16 * 8 * 4
    assert count_cost(_branches()).activation_bytes == (whole - images) / 2 + images


def test_the_table_has_the_rows_of_figure_5_and_fits_a_screen():
    counted = _inception_cost()
    lines = str(counted).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert [name for name in rows if name[0].isdigit()] == [row.name for row in FIGURE_5]
    assert rows["3c"][1] == "14x14x576" and rows["5b"][1] == "7x7x1024"
    assert rows["total"][1:5] == ["1000", "11,188,288", "1.93", "G"]
    parameters = [int(row[2].replace(",", "")) for name, row in rows.items() if _is_row(row)]
    # The rows include the total.
    assert sum(parameters) == 2 * counted.trainable


def _is_row(words):
    return len(words) > 2 and words[2].replace(",", "").isdigit()


def test_summary_is_one_line():
    line = count_cost(SigmoidMLP()).summary()
    assert line == (
        "100,010 parameters; per image: 99,400 multiply-adds forward, 0.00528 MiB activation"
        " memory in training"
    )


def test_a_network_with_automatic_names_is_grouped_by_map_size():
    x = images = keras.Input((8, 8, 3))
    for i in range(60):
        x = L.Conv2D(3, 3, padding="same", strides=1 + (i == 30), name=f"conv_{i}")(x)
    lines = str(count_cost(keras.Model(images, x))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["8x8", "4x4"]
    assert len(lines) <= 24


def test_uncounted_layers_are_listed():
    x = images = keras.Input((8, 4))
    x = L.LSTM(3, name="memory", return_sequences=True)(x)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = L.LayerNormalization(axis=[1, 2])(L.PReLU()(x))
    x = L.AdditiveAttention(name="additive")([x, x])
    x = L.Attention(name="luong")([x, x])
    products = [
        L.Dot(2, name="dot")([x, x]),
        keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))),
        keras.ops.einsum("bij,bkj->bik", x, x),
        keras.ops.tensordot(x, keras.ops.ones((3, 8)), axes=1),
    ]
    counted = count_cost(keras.Model(images, L.Dense(2)(L.Add()(products))))
    names = [re.sub(r"_\d+$", "", name) for name in counted.uncounted]
    assert names[:4] == ["memory", "attention", "additive", "luong"]
    assert set(names[4:]) == {"dot", "matmul", "einsum", "tensordot"}
    assert "Multiply-adds not counted: memory, attention, additive, luong" in str(counted)


def test_frozen_and_quantized_layers_are_listed_as_uncounted():
    x = images = keras.Input((8, 4))
    x = L.LSTM(3, name="memory", return_sequences=True)(x)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    einsum = L.EinsumDense("abc,cd->abd", (8, 3), name="einsum")
    x = L.TimeDistributed(L.Dense(2), name="wrapper")(einsum(x))
    model = keras.Model(images, x)
    names = ("memory", "attention", "einsum", "wrapper")
    assert count_cost(model).uncounted == names
    model.trainable = False
    assert count_cost(model).uncounted == names
    # Quantization replaces the kernel by integers, which no optimizer trains.
    einsum.quantize("int8")
    assert count_cost(model).uncounted == names


def test_adapted_statistics_multiply_elementwise():
    x = images = keras.Input((8, 4))
    model = keras.Model(images, L.Normalization(axis=(1, 2))(x))
    assert count_cost(model).uncounted == ()


@pytest.mark.parametrize("shape", [(50, 6), (5, 10, 6)])
def test_axes_that_are_moved_into_the_batch_axis_are_counted(shape):
    """As in a partition into windows, or in video frames folded into the batch."""
    rows = math.prod(shape[:-1])
    inputs, images = keras.Input(shape), keras.Input(shape)
    norm, dense = BatchNormalization(), L.Dense(8)
    inner = keras.Sequential([keras.Input((6,)), dense, norm])
    folded = keras.ops.reshape(inner(keras.ops.reshape(inputs, (-1, 6))), (-1, *shape[:-1], 8))
    cost = count_cost(keras.Model(inputs, folded))
    expected = count_cost(keras.Model(images, BatchNormalization()(L.Dense(8)(images))))
    assert cost.multiply_adds == expected.multiply_adds == rows * 6 * 8
    by_kind = {layer.kind: layer.activation_bytes for layer in cost.layers}
    assert by_kind["Dense"] == rows * 8 * 4


def test_sizes_that_only_a_call_shows_are_counted():
    images = keras.Input((5, 6))
    einsum = L.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d", name="einsum")
    cost = count_cost(keras.Model(images, L.Dense(3)(einsum(images))))
    assert cost.multiply_adds == 5 * 4 * 3 and cost.uncounted == ("einsum",)


def test_a_model_with_a_call_of_its_own_is_not_counted_by_its_graph():
    class Twice(keras.Model):
        def call(self, x, training=None, mask=None):
            x = super().call(x, training=training)
            return super().call(x, training=training)

    inputs, images = keras.Input((6,)), keras.Input((6,))
    twice = Twice(inputs, L.Dense(6)(inputs), name="twice")
    with pytest.raises(UsageError, match="expected a Functional or Sequential model"):
        count_cost(twice)
    assert count_cost(keras.Model(images, twice(images))).uncounted == ("twice",)


def test_tied_weights_count_once():
    class Tied(L.Layer):
        def __init__(self, dense):
            super().__init__()
            self.dense = dense

        def call(self, x):
            return x @ keras.ops.transpose(self.dense.kernel)

    images, dense = keras.Input((6,)), L.Dense(4)
    model = keras.Model(images, Tied(dense)(dense(images)))
    assert count_cost(model).trainable == model.count_params() == 6 * 4 + 4


class _Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: None,
            "model=None is invalid: expected a keras.Model",
        ),
        (
            lambda: _Subclassed(name="own"),
            "'own' cannot be counted: expected a Functional or Sequential",
        ),
        (
            lambda: keras.Sequential([L.Dense(2)], name="unbuilt"),
            "'unbuilt' cannot be counted",
        ),
        (
            lambda: keras.Sequential([keras.Input((None, None, 3)), L.Conv2D(2, 3)]),
            r"unknown size, \(None, None, None, 3\): build the model for images of a fixed size",
        ),
    ],
)
def test_uncountable_models_are_rejected(make, message):
    with pytest.raises(UsageError, match=message):
        count_cost(make())


def test_a_mask_is_no_activation():
    """Keras passes the mask of an embedding on to the layers after it."""

    def cost_of(mask_zero):
        tokens = keras.Input((10,))
        x = L.Embedding(100, 8, mask_zero=mask_zero)(tokens)
        nested = keras.Sequential([keras.Input((10, 8)), L.Dense(4)])
        nested.supports_masking = True
        return count_cost(keras.Model(tokens, L.BatchNormalization()(nested(x))))

    with_mask, without = cost_of(True), cost_of(False)
    layers = {layer.kind: layer.input_shapes for layer in with_mask.layers}
    assert layers["Dense"] == ((10, 8),) and layers["BatchNormalization"] == ((10, 4),)
    assert with_mask.multiply_adds == without.multiply_adds == 10 * 8 * 4


@pytest.mark.parametrize("names", [("aa", "bb"), ("bb", "aa")])
def test_inputs_of_a_nested_model_may_be_passed_by_name(names):
    large, small = keras.Input((8, 8, 3), name=names[0]), keras.Input((6, 6, 2), name=names[1])
    outputs = [L.Conv2DTranspose(4, 3, strides=2)(small), L.Conv2DTranspose(8, 3)(large)]
    nested = keras.Model([small, large], outputs)
    x, y = keras.Input((8, 8, 3)), keras.Input((6, 6, 2))
    by_name = count_cost(keras.Model([y, x], nested({names[0]: x, names[1]: y})))
    in_order = count_cost(keras.Model([y, x], nested([y, x])))
    assert by_name.multiply_adds == in_order.multiply_adds


def test_an_unknown_dtype_is_rejected():
    with pytest.raises(UsageError, match="dtype='float17' is invalid: expected a dtype"):
        count_cost(SigmoidMLP(), dtype="float17")


def test_the_tables_in_the_scaling_page_are_what_the_benchmark_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("scaling").main()
    printed = capsys.readouterr().out
    assert printed.count("|\n") > 10
    assert printed in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    "number, text",
    [
        (999_999, "999,999"),
        (1_000_000, "1 M"),
        (33_412_345, "33.4 M"),
        (999_700_000, "1 G"),
        (1_930_000_000, "1.93 G"),
        (1.2e12, "1.2 T"),
    ],
)
def test_large_numbers_are_short(number, text):
    assert cost._short(number) == text
