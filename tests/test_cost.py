"""What a network costs: against the paper's table, published counts, and TensorFlow's graphs."""

import functools
import importlib
import pathlib

import keras
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization, BNInception, SigmoidMLP, cost
from bn_keras.errors import UsageError
from bn_keras.models.bn_inception import FIGURE_5

ROOT = pathlib.Path(__file__).resolve().parent.parent
L = keras.layers


@functools.cache
def _inception_cost():
    return cost.count(BNInception("bn_x30"))


def _figure_5_multiply_adds():
    """By the paper's table and sizes, with a separable stem and 96 projected in 4c and 4d."""
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


def test_parameters_are_counted_with_the_auxiliary_classifier_and_without_what_is_frozen():
    model = BNInception("bn_x30", input_shape=(224, 224, 3), auxiliary=True)
    # The moving statistics: a mean and a variance for each beta.
    betas = sum(v.shape[0] for v in model.trainable_variables if v.name == "beta")
    counted = cost.count(model)
    assert (counted.trainable, counted.non_trainable) == (13_605_672, 2 * betas)
    model.get_layer("logits").trainable = False
    frozen = cost.count(model)
    assert frozen.trainable == 13_605_672 - 1_025_000
    assert frozen.non_trainable == 2 * betas + 1_025_000


@pytest.mark.parametrize(
    "name, parameters, multiply_adds, tolerance",
    [
        # He et al. 2015 (arXiv 1512.03385), table 1: 3.8e9. (4.1e9 is of version 1.5, whose
        # strides are in the 3x3 convolutions.)
        ("ResNet50", 25_636_712, 3.8e9, 0.02),
        # Sandler et al. 2018 (arXiv 1801.04381), table 4: 300 M.
        ("MobileNetV2", 3_538_984, 300e6, 0.01),
    ],
)
def test_published_counts(name, parameters, multiply_adds, tolerance):
    counted = cost.count(getattr(keras.applications, name)(weights=None))
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


def test_multiply_adds_are_those_of_tensorflows_profiler():
    model = _every_kind()
    images = tf.TensorSpec([1, *model.input_shape[1:]])
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(images).graph
    builder = tf.compat.v1.profiler.ProfileOptionBuilder
    options = builder(builder.float_operation()).with_empty_output().build()
    # Kinds of operations, each the child of the one before.
    kind = tf.compat.v1.profiler.profile(graph, cmd="op", options=options)
    flops = {}
    while kind.children:
        (kind,) = kind.children
        flops[kind.name] = kind.float_ops
    products = sum(flops[name] for name in ("Conv2D", "DepthwiseConv2dNative", "MatMul"))
    assert cost.count(model).flops == products


@pytest.mark.parametrize(
    "shape, layer, multiply_adds",
    # What the profiler doesn't see, or counts by an approximation.
    [
        ((8, 8, 6), L.Conv2D(4, 3, groups=2), 36 * 4 * 9 * 3),
        ((8, 8, 6), L.Conv2D(4, 3, dilation_rate=2), 16 * 4 * 9 * 6),
        ((8, 8, 6), L.Conv2DTranspose(4, 3, strides=2), 64 * 6 * 9 * 4),
        ((6, 6, 6, 2), L.Conv3D(4, 3), 64 * 4 * 27 * 2),
        ((9, 2), L.SeparableConv1D(4, 3, depth_multiplier=5), 7 * (3 * 10 + 10 * 4)),
        ((5, 7, 3), L.Dense(4), 35 * 3 * 4),
    ],
)
def test_multiply_adds_by_hand(shape, layer, multiply_adds):
    images = keras.Input(shape)
    assert cost.count(keras.Model(images, layer(images))).multiply_adds == multiply_adds


def test_layers_inside_of_models_count_where_they_are_called():
    tower = keras.Sequential([keras.Input((8, 8, 4)), L.Conv2D(4, 3, padding="same"), L.ReLU()])
    images = keras.Input((8, 8, 4))
    once = cost.count(keras.Model(images, tower(images)))
    twice = cost.count(keras.Model(images, tower(tower(images))))
    flat = cost.count(tower)
    assert [layer.name for layer in once.layers][1:] == [
        f"{tower.name}/{layer.name}" for layer in flat.layers[1:]
    ]
    assert once.multiply_adds == flat.multiply_adds == 64 * 4 * 9 * 4
    assert twice.multiply_adds == 2 * once.multiply_adds
    assert twice.trainable == once.trainable == 9 * 4 * 4 + 4
    # The images, and what each ReLU makes.
    assert once.activation_bytes == 2 * 64 * 4 * 4
    assert twice.activation_bytes == 3 * 64 * 4 * 4


def _branches():
    """Every rule of what is kept."""
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
    """Elements of an image that TensorFlow's backward pass takes from the forward pass."""
    forward = set()

    @tf.function
    def step(images):
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
        forward.update(op.name for op in outputs.graph.get_operations())
        return tape.gradient(outputs, [v.value for v in model.trainable_variables])

    def made(tensor):
        while tensor.op.type in ("Identity", "IdentityN", "Reshape", "StopGradient"):
            tensor = tensor.op.inputs[tensor.value_index]
        return tensor.ref()

    # A batch of a size that nothing else has.
    graph = step.get_concrete_function(tf.TensorSpec([17, *model.input_shape[1:]])).graph
    read, seen, tensors = set(), set(), list(graph.outputs)
    while tensors:
        tensor = tensors.pop()
        if tensor.op.name in forward:
            read.add(made(tensor))
        elif tensor.op.name not in seen:
            seen.add(tensor.op.name)
            tensors += tensor.op.inputs
    shapes = [r.deref().shape for r in read]
    return sum(shape.num_elements() for shape in shapes if 17 in shape[:1]) / 17


def test_what_is_kept_is_what_tensorflows_backward_pass_reads():
    model = _branches()
    assert cost.count(model, "float32").activation_bytes == 4 * _elements_read_backward(model)


def test_kept_at_another_precision():
    model = _branches()
    whole = cost.count(model).activation_bytes
    assert cost.count(model, "bfloat16").activation_bytes == whole / 2
    keras.config.set_dtype_policy("mixed_bfloat16")
    # The images are float32 as before.
    images = 16 * 16 * 8 * 4
    assert cost.count(_branches()).activation_bytes == (whole - images) / 2 + images


def test_the_table_has_the_rows_of_figure_5_and_fits_a_screen():
    counted = _inception_cost()
    lines = str(counted).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert [name for name in rows if name[0].isdigit()] == [row.name for row in FIGURE_5]
    assert rows["3c"][1] == "14x14x576" and rows["5b"][1] == "7x7x1024"
    assert rows["all"][1:5] == ["1000", "11,188,288", "1.93", "G"]
    parameters = [int(row[2].replace(",", "")) for name, row in rows.items() if _is_row(row)]
    assert sum(parameters) == 2 * counted.trainable  # the sum's own row included


def _is_row(words):
    return len(words) > 2 and words[2].replace(",", "").isdigit()


def test_one_line_says_the_same():
    line = cost.count(SigmoidMLP()).line()
    assert line == (
        "100,010 parameters, 99,400 multiply-adds an image forward, 0.00528 MiB of it kept for the"
        " way back"
    )


def test_a_network_without_names_is_shown_by_the_size_of_its_maps():
    x = images = keras.Input((8, 8, 3))
    for i in range(60):
        x = L.Conv2D(3, 3, padding="same", strides=1 + (i == 30), name=f"conv_{i}")(x)
    lines = str(cost.count(keras.Model(images, x))).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["8x8", "4x4"]
    assert len(lines) <= 24


def test_what_is_not_counted_is_named():
    x = images = keras.Input((8, 4))
    x = L.LSTM(3, name="memory", return_sequences=True)(x)
    x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    counted = cost.count(keras.Model(images, L.Dense(2)(L.PReLU()(x))))
    assert counted.uncounted == ("memory", "attention")
    assert "Not counted: the multiply-adds of memory, attention" in str(counted)


class _Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _Subclassed(name="own"), "model 'own' is no Functional or Sequential"),
        (lambda: keras.Sequential([L.Dense(2)], name="unbuilt"), "model 'unbuilt' is no"),
        (
            lambda: keras.Sequential([keras.Input((None, None, 3)), L.Conv2D(2, 3)]),
            r"shape \(None, None, None, 3\): .* build the model for images of a known size",
        ),
    ],
)
def test_what_cannot_be_counted(make, message):
    with pytest.raises(UsageError, match=message):
        cost.count(make())


def test_the_tables_of_the_page_on_scaling_are_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("scaling").main()
    printed = capsys.readouterr().out
    assert printed.count("|\n") > 10
    assert printed in (ROOT / "docs" / "scaling.md").read_text()
