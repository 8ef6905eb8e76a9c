"""Tests of the layer on one device: statistics, modes, weights, files, errors."""

import json

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from bn_keras import BatchNormalization, replace_batch_norm
from bn_keras.errors import UsageError

EPSILON = 1e-3


pytestmark = pytest.mark.usefixtures("fuse_small_inputs")


def _data(*shape, seed=0, mean=2.0):
    return np.random.default_rng(seed).normal(mean, 3, shape).astype(np.float32)


def _build(layer, rank=2):
    """Builds the layer for three channels and changes its parameters from their initial values."""
    layer.build((None,) * (rank - 1) + (3,))
    layer.gamma.assign([0.5, 1, 2])
    layer.beta.assign([1, -1, 0])
    return layer


# --- Moving statistics.


@pytest.mark.parametrize("unbiased", [False, True])
def test_moving_statistics_average_the_batches(unbiased):
    layer = BatchNormalization(momentum=0.7, unbiased=unbiased)
    mean, variance = np.zeros(3), np.ones(3)
    for step in range(4):
        x = _data(5, 2, 3, seed=step)
        layer(x, training=True)
        _, batch_mean, batch_variance, count = reference.batch_normalize(x, 1, 0, EPSILON)
        if unbiased:
            batch_variance = reference.unbiased(batch_variance, count)
        mean = reference.update_average(mean, batch_mean, 0.7)
        variance = reference.update_average(variance, batch_variance, 0.7)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
    # Inference uses them.
    x = _data(4, 2, 3, seed=9)
    np.testing.assert_allclose(
        layer(x), (x - mean) / np.sqrt(variance + EPSILON), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moving_statistics_of_a_half_precision_layer_do_not_stall(dtype):
    """In bfloat16 the moving mean of a constant 3 stalls at 2."""
    layer = BatchNormalization(dtype=dtype)
    x = tf.fill([4, 3], tf.cast(3.0, dtype))
    for _ in range(600):
        y = layer(x, training=True)
    assert y.dtype == dtype and all(v.dtype == "float32" for v in layer.weights)
    np.testing.assert_allclose(layer.moving_mean, 3 * (1 - 0.99**600), rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integer_inputs_are_normalized_in_the_compute_dtype(dtype, training):
    x = tf.cast([[0], [2], [2], [5]], dtype)
    layer, keras_layer = BatchNormalization(), keras.layers.BatchNormalization()
    for bn in (layer, keras_layer):
        bn.build((None, 1))
        bn.moving_mean.assign([0.3])
    y = layer(x, training=training)
    expected = keras_layer(tf.cast(x, tf.float32), training=training)
    assert y.dtype == tf.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    model = keras.Sequential([keras.Input((1,), dtype=dtype), keras_layer])
    replaced = replace_batch_norm(model)
    np.testing.assert_allclose(replaced(x), model(x), rtol=1e-5, atol=1e-6)


def test_large_integers_are_normalized_under_mixed_precision():
    """float16 ends at 65,504."""
    x = np.arange(100_000, 100_032).reshape(8, 4)
    y = BatchNormalization(dtype="mixed_float16")(x, training=True)
    expected, *_ = reference.batch_normalize(x, 1, 0, EPSILON)
    assert y.dtype == tf.float16
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)


def test_arrays_and_keras_variables_are_accepted_as_tensors_are():
    x = _data(6, 3)
    layer = _build(BatchNormalization())
    expected = layer(tf.constant(x), training=True)
    layer = _build(BatchNormalization())
    y = layer(keras.Variable(x), training=keras.Variable(True, dtype="bool"))
    np.testing.assert_array_equal(y, expected)
    variables = (layer.trainable_variables, layer.non_trainable_variables)
    y, _ = layer.stateless_call(*([v.value for v in vs] for vs in variables), x, training=True)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axis, shape", [(-1, (6, 3)), (-1, (2, 5, 5, 3)), ([1, 2], (4, 5, 3))])
def test_a_graph_need_not_know_the_number_of_channels(axis, shape, training):
    layer = BatchNormalization(axis=axis)
    layer.build(shape)
    x = _data(*shape)
    signature = [tf.TensorSpec([None] * len(shape))]
    run = tf.function(lambda x: layer(x, training=training), input_signature=signature)
    np.testing.assert_allclose(run(x), layer(x, training=training), rtol=1e-5, atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        run(np.concatenate([x, x], axis=-1 if axis == -1 else 1))


def test_the_unbiased_variance_of_0_and_2_is_2():
    x = np.array([[0.0], [2.0]], np.float32)
    for unbiased, expected in ((True, 2), (False, 1)):
        layer = BatchNormalization(momentum=0.0, unbiased=unbiased)
        layer(x, training=True)
        assert layer.moving_variance.numpy() == pytest.approx(expected)
    keras_layer = keras.layers.BatchNormalization(momentum=0.0)
    keras_layer(x, training=True)
    assert keras_layer.moving_variance.numpy() == pytest.approx(1)


def test_large_float32_inputs_of_a_float64_layer_need_no_cast():
    x = _data(16, 8, 8, 4)
    layer = BatchNormalization(dtype="float64", autocast=False, unbiased=False)
    y = layer(x, training=True)
    theirs = keras.layers.BatchNormalization(dtype="float64", autocast=False)
    assert y.dtype == tf.float64
    np.testing.assert_allclose(y, theirs(x, training=True), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.moving_variance, theirs.moving_variance, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"renorm": True}, {"momentum": None}])
@pytest.mark.parametrize("kind", ["known", "unknown", "masked"])
@pytest.mark.parametrize(
    "dtype, given", [("float32", "float64"), ("float64", "float32"), ("mixed_float16", "float64")]
)
def test_inputs_of_any_dtype_train_without_autocast(dtype, given, kind, arguments):
    x = tf.cast(_data(8, 3), given)
    mask = np.arange(8) > 2 if kind == "masked" else None
    layer, expected = (
        _build(BatchNormalization(dtype=d, autocast=False, **arguments)) for d in (dtype, "float64")
    )
    signature = [tf.TensorSpec([None if kind == "unknown" else 8, 3], given)]
    step = tf.function(lambda x: layer(x, training=True, mask=mask), input_signature=signature)
    y = step(x)
    assert y.dtype == layer.compute_dtype
    tolerance = 2e-3 if dtype == "mixed_float16" else 1e-5
    exact = expected(tf.cast(x, tf.float64), training=True, mask=mask)
    np.testing.assert_allclose(tf.cast(y, tf.float64), exact, rtol=tolerance, atol=tolerance)
    for actual, wanted in zip(layer.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", ["float16", "bfloat16"])
def test_outputs_are_not_rounded_to_the_dtype_of_the_inputs(given, training):
    """In float16, which ends at 65,504, they would be infinite."""
    x = tf.cast(_data(8, 3), given)
    layer, keras_layer = (
        cls(autocast=False, gamma_initializer=keras.initializers.Constant(1e5))
        for cls in (BatchNormalization, keras.layers.BatchNormalization)
    )
    y = layer(x, training=training)
    assert y.dtype == tf.float32
    np.testing.assert_allclose(y, keras_layer(x, training=training), rtol=1e-4, atol=1)


def test_without_momentum_all_batches_weigh_the_same():
    layer = BatchNormalization(momentum=None, unbiased=False)
    batches = [_data(6, 3, seed=s) for s in range(5)]
    for x in batches:
        layer(x, training=True)
    np.testing.assert_allclose(layer.moving_mean, np.mean(batches, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        layer.moving_variance, np.mean([b.var(0) for b in batches], 0), rtol=1e-5
    )
    assert layer.num_updates.numpy() == 5
    layer(np.zeros((0, 3), np.float32), training=True)
    assert layer.num_updates.numpy() == 5


@pytest.mark.parametrize("empty", ["no examples", "all masked"])
@pytest.mark.parametrize("renorm", [False, True])
def test_an_empty_or_masked_batch_changes_nothing(empty, renorm):
    x = _data(0 if empty == "no examples" else 4, 5, 3)
    kwargs = {"mask": np.zeros((4, 5), bool)} if empty == "all masked" else {}

    def change(layer):
        layer(_data(8, 5, 3), training=True)
        before = [v.numpy() for v in layer.non_trainable_variables]
        layer(x, training=True, **kwargs)
        after = [v.numpy() for v in layer.non_trainable_variables]
        return [np.abs(a - b).max() for a, b in zip(after, before, strict=True)]

    assert change(BatchNormalization(momentum=0.5, renorm=renorm)) == [0] * (5 if renorm else 2)
    theirs = change(keras.layers.BatchNormalization(momentum=0.5))
    assert not max(theirs) == 0  # NaN, or pulled towards 0


@pytest.mark.parametrize("case", ["no examples", "all masked", "inference"])
def test_the_first_statistics_of_batch_renormalization_stay_without_an_update(case):
    layer = BatchNormalization(renorm=True)
    layer.build((None, 5, 3))
    before = [v.numpy() for v in layer.non_trainable_variables]
    x = tf.constant(_data(0 if case == "no examples" else 4, 5, 3))
    mask = tf.zeros([4, 5], tf.bool) if case == "all masked" else None
    call = tf.function(lambda x, training: layer(x, training=training, mask=mask))
    call(x, tf.constant(case != "inference"))
    for old, new in zip(before, layer.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("options", [{}, {"momentum": 1.0}])
def test_without_weight_a_batch_leaves_the_variance_of_batch_renormalization(options):
    """The mode is known, and the weight of the batch is a number."""
    layer = _build(BatchNormalization(renorm=True, **options))
    layer.moving_variance.assign([4.0, 5.0, 6.0])
    layer(_data(4 if options else 0, 3), training=True)
    np.testing.assert_array_equal(layer.moving_variance, [4, 5, 6])


def test_a_tensor_for_the_mode_does_not_hide_the_mask_of_a_masking_layer():
    x = _data(6, 5, 3)
    x[:, 3:] = 0.0
    masking = keras.layers.Masking()
    for training in (True, tf.constant(True), np.bool_(True)):
        for compiled in (False, True):
            layer = BatchNormalization(momentum=0.5)
            layer.build((None, 5, 3))

            def call(mode, layer=layer):
                return layer(masking(x), training=mode)

            (tf.function(call) if compiled else call)(training)
            expected = 0.5 * x[:, :3].mean((0, 1))
            np.testing.assert_allclose(layer.moving_mean, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"synchronized": True}, {"virtual_batch_size": 2}])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_elements_are_counted_in_64_bits(options, jit_compile):
    """Their number overflows int32 in large 3-D images."""
    layer = BatchNormalization(**options)
    layer.build((None, None, 3))
    call = tf.function(lambda x: layer(x, training=True), jit_compile=jit_compile)
    graph = call.get_concrete_function(tf.TensorSpec([None, None, 3])).graph
    sizes = [op for op in every_operation(graph) if op.type == "Size"]
    assert all(op.outputs[0].dtype == tf.int64 for op in sizes)
    assert sizes or options


def every_operation(graph):
    """Returns the operations of a graph and of the functions that it calls."""
    functions = [f.graph for f in graph._functions.values()]
    return [op for each in (graph, *functions) for op in each.get_operations()]


def test_sums_of_more_values_than_int32_do_not_use_the_bias_gradient():
    layer = _build(BatchNormalization())
    graphs = [
        tf.function(lambda x, m: layer(x, training=True, mask=m))
        .get_concrete_function(tf.TensorSpec([rows, 3]), tf.TensorSpec([rows], tf.bool))
        .graph
        # The last is a prime number: its values have no equal parts to be summed first.
        for rows in (2**20, 2**30, 2**30 + 3)
    ]
    sizes = [
        max(
            (
                op.inputs[0].shape.num_elements()
                for op in every_operation(graph)
                if op.type == "BiasAddGrad"
            ),
            default=0,
        )
        for graph in graphs
    ]
    assert sizes == [3 * 2**20, 3 * 2**24, 0]


def test_a_frozen_layer_runs_in_inference_mode():
    layer = _build(BatchNormalization())
    layer.trainable = False
    x, before = _data(6, 3), layer.get_weights()
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    run = tf.function(lambda training: layer(x, training=training))
    np.testing.assert_array_equal(run(tf.constant(True)), layer(x, training=False))
    for after, old in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(after, old)


# --- Modes.


@pytest.mark.parametrize(
    "arguments", [{}, {"synchronized": True}, {"renorm": True, "dtype": "mixed_bfloat16"}]
)
def test_training_may_be_a_tensor(arguments):
    layers = [_build(BatchNormalization(momentum=0.5, **arguments)) for _ in range(2)]
    x = tf.cast(_data(6, 3), layers[0].compute_dtype)

    @tf.function
    def run(x, training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layers[0](x, training=training)
        return y, tape.gradient(y, x, y)

    for training in (True, False):
        y, dx = run(x, tf.constant(training))
        with tf.GradientTape() as tape:
            tape.watch(x)
            expected = layers[1](x, training=training)
        for actual, wanted in ((y, expected), (dx, tape.gradient(expected, x, expected))):
            assert actual.dtype == x.dtype
            wanted = tf.cast(wanted, tf.float32)
            tolerance = 1e-5 if x.dtype == tf.float32 else 2e-2
            np.testing.assert_allclose(tf.cast(actual, tf.float32), wanted, atol=tolerance)
        for a, b in zip(*(layer.get_weights() for layer in layers), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(Exception, match="symbolic"):
        layer = keras.layers.BatchNormalization()
        layer.build((None, 3))
        tf.function(lambda t: layer(x, training=t))(tf.constant(True))


@pytest.mark.parametrize("dtype", ["float16", "mixed_bfloat16", "float32", "float64"])
def test_statistics_are_exact_in_every_dtype(dtype):
    layer = BatchNormalization(dtype=dtype, momentum=0.5)
    # In float16 the squares of these values would overflow.
    x = tf.cast(_data(64, 3, mean=500.0), layer.compute_dtype)
    y = layer(x, training=True)
    assert y.dtype == layer.compute_dtype
    expected = reference.batch_normalize(tf.cast(x, tf.float64), 1, 0, EPSILON)
    np.testing.assert_allclose(
        tf.cast(y, tf.float64), expected[0], atol={"mixed_bfloat16": 2e-2}.get(dtype, 3e-3)
    )
    np.testing.assert_allclose(layer.moving_mean, expected[1] / 2, rtol=2e-3)


# --- Axes.


@pytest.mark.parametrize(
    "axis, shape",
    [
        (1, (4, 3, 5)),
        (1, (4, 3, 5, 2)),
        ([1, 2, 3], (6, 2, 3, 2)),
        ([-1, 1], (3, 2, 4, 3)),
        (0, (3, 5)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_any_axes_equal_the_reference(axis, shape, masked):
    layer = BatchNormalization(axis=axis, momentum=0.0, unbiased=False)
    x, rng = _data(*shape), np.random.default_rng(1)
    keep = sorted(a % len(shape) for a in np.atleast_1d(axis))
    mask = full = None
    if masked:
        mask = rng.random([d for a, d in enumerate(shape) if a not in keep]) < 0.7
        full = np.broadcast_to(np.expand_dims(mask, keep), shape)
    layer.build(shape)
    assert layer.gamma.shape == tuple(shape[a] for a in keep)
    layer.gamma.assign(rng.uniform(0.5, 2, layer.gamma.shape))
    with tf.GradientTape() as tape:
        x = tf.constant(x)
        tape.watch(x)
        y = layer(x, training=True, mask=mask)
    gamma = layer.gamma.numpy()
    expected = reference.batch_normalize(x, gamma, 0, EPSILON, axis, full)
    np.testing.assert_allclose(y, expected[0], atol=3e-5)
    np.testing.assert_allclose(layer.moving_mean, expected[1], rtol=1e-4)
    np.testing.assert_allclose(layer.moving_variance, expected[2], rtol=1e-4)
    dy = rng.normal(size=shape).astype(np.float32)
    dx, dgamma = tape.gradient(y, [x, layer.gamma.value], dy)
    exact = reference.gradients(dy, x, gamma, EPSILON, axis, full)
    np.testing.assert_allclose(dx, exact[0], atol=3e-5)
    np.testing.assert_allclose(dgamma, exact[1], atol=3e-4)
    np.testing.assert_allclose(layer(x), y, atol=1e-4)


def test_keras_supports_masks_on_the_last_axis_only():
    x, mask = _data(4, 3, 5), np.ones((4, 5), bool)
    BatchNormalization(axis=1)(x, training=True, mask=mask)
    with pytest.raises(Exception, match="(?i)incompatible|broadcast"):
        keras.layers.BatchNormalization(axis=1)(x, training=True, mask=mask)
    with pytest.raises(TypeError):
        keras.layers.BatchNormalization(axis=[1, 2])


def test_a_mask_of_a_keras_masking_layer_fits_any_axis():
    x = _data(5, 2, 4)
    x[:, 1] = 0
    layer = BatchNormalization(axis=1, momentum=0.0)
    layer(keras.layers.Masking()(x), training=True)
    # The second channel is masked, so its statistics do not change.
    np.testing.assert_allclose(layer.moving_mean, [x[:, 0].mean(), 0], rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance[1], 1)


@pytest.mark.parametrize("make", [bool, np.bool_, tf.constant, tf.Variable, keras.Variable])
def test_a_mask_of_a_keras_masking_layer_counts_in_every_form_of_the_mode(make):
    x = np.float32([[[1], [1], [0]], [[1], [0], [0]]])
    layer = BatchNormalization(momentum=0.0)
    layer(keras.layers.Masking()(x), training=make(True))
    np.testing.assert_allclose(layer.moving_mean, [1.0])


# --- Ghost batches.


def test_ghost_batches_equal_separate_batches():
    plain, ghost = (
        _build(BatchNormalization(momentum=0.5, virtual_batch_size=v), rank=3) for v in (None, 4)
    )
    x = _data(12, 5, 3)
    y = ghost(x, training=True)
    means, variances = [], []
    for part, expected in zip(np.split(x, 3), np.split(y, 3), strict=True):
        np.testing.assert_allclose(plain(part, training=True), expected, atol=1e-5)
        _, mean, variance, count = reference.batch_normalize(part, 1, 0, EPSILON)
        means.append(mean)
        variances.append(reference.unbiased(variance, count))
    # One update per step: Algorithm 2 averages over the batches.
    np.testing.assert_allclose(ghost.moving_mean, 0.5 * np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(ghost.moving_variance, 0.5 + 0.5 * np.mean(variances, 0), rtol=1e-5)
    # Inference has no ghost batches and accepts any batch.
    plain.set_weights(ghost.get_weights())
    np.testing.assert_allclose(ghost(x[:7]), plain(x[:7]), rtol=1e-6)


# --- Renorm.


def test_renorm_equals_keras():
    clipping = {"rmin": 0.6, "rmax": 1.5, "dmax": 0.4}
    ours, theirs = (
        _build(
            cls(renorm=True, renorm_clipping=clipping, renorm_momentum=0.6, momentum=0.8, **kw),
            rank=3,
        )
        for cls, kw in (
            (BatchNormalization, {"unbiased": False}),
            (keras.layers.BatchNormalization, {}),
        )
    )
    for step in range(4):
        x, results = tf.constant(_data(6, 4, 3, seed=step)), []
        for layer in (ours, theirs):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(tf.sin(y))
            variables = [v.value for v in layer.trainable_variables]
            results.append([y, *tape.gradient(loss, [x, *variables])])
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 5), (64, 64, 64, 8)], ids=["ordinary", "kernel"])
@pytest.mark.parametrize("is_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("make", [None, tf.Variable, keras.Variable])
def test_a_variable_schedules_the_momentum(shape, is_graph, make):
    x = _data(*shape) + 1
    layer = BatchNormalization(momentum=make(0.75) if make else 0.9)
    layer.build((None, *shape[1:]))
    assert len(layer.weights) == 4
    if make is None:
        layer.momentum = tf.Variable(0.75, trainable=False)
    run = tf.function(lambda x: layer(x, training=True)) if is_graph else layer
    mean = x.reshape(-1, shape[-1]).mean(0, dtype=np.float64)
    for momentum, expected in ((0.75, mean / 4), (1.0, mean / 4), (0.0, mean)):
        layer.momentum.assign(momentum)
        run(x) if is_graph else run(x, training=True)
        np.testing.assert_allclose(layer.moving_mean, expected, rtol=1e-5)
    assert json.loads(json.dumps(layer.get_config()))["momentum"] == 0


@pytest.mark.parametrize("name", ["momentum", "renorm_momentum"])
@pytest.mark.parametrize("is_assigned", [False, True], ids=["passed", "assigned"])
def test_a_variable_schedules_each_momentum_of_renorm(name, is_assigned):
    variable = tf.Variable(0.0, trainable=False)
    layer = BatchNormalization(renorm=True, **({} if is_assigned else {name: variable}))
    x = _data(64, 3) + 1
    layer.build(x.shape)
    if is_assigned:
        setattr(layer, name, variable)
    run = tf.function(lambda x: layer(x, training=True))
    average = layer.moving_mean if name == "momentum" else layer.renorm_mean
    run(x)
    np.testing.assert_allclose(average, x.mean(0), rtol=1e-5)
    variable.assign(1.0)
    run(x + 5)
    np.testing.assert_allclose(average, x.mean(0), rtol=1e-5)
    assert json.loads(json.dumps(layer.get_config()))[name] == 1


def test_a_variable_as_epsilon_raises():
    with pytest.raises(UsageError, match="epsilon=.* is invalid: expected a positive number"):
        BatchNormalization(epsilon=tf.Variable(0.1))


def test_a_built_layer_does_not_accept_momentum_none():
    layer = _build(BatchNormalization())
    layer.momentum = None
    with pytest.raises(UsageError, match="momentum=None was set after the layer was built"):
        layer(_data(6, 3), training=True)


@pytest.mark.parametrize("training", ["False", np.array([True, False]), tf.constant("a")], ids=str)
def test_a_mode_that_is_no_truth_value_raises(training):
    with pytest.raises(UsageError, match="training=.* is invalid: expected True, False or None"):
        _build(BatchNormalization())(_data(6, 3), training=training)
    with pytest.raises(Exception, match="is invalid: expected True, False or None"):
        run = tf.function(lambda t: _build(BatchNormalization())(_data(6, 3), training=t))
        run(tf.constant([True, False, True]))


@pytest.mark.parametrize("make", [tf.Variable, keras.Variable])
def test_variables_schedule_the_bounds_of_batch_renormalization(make, tmp_path):
    """They are no weights, and no gradient reaches them."""
    bounds = {"rmin": make(1.0), "rmax": make(1.0), "dmax": make(0.0)}
    layer = _build(BatchNormalization(renorm=True, renorm_clipping=bounds))
    plain = _build(BatchNormalization())
    free = _build(BatchNormalization(renorm=True))
    step = tf.function(lambda x: layer(x, training=True))
    x = _data(64, 3)
    np.testing.assert_allclose(step(x), plain(x, training=True), rtol=1e-4, atol=1e-4)
    layer.set_weights(free.get_weights())
    for name, bound in (("rmin", 0.0), ("rmax", 1e6), ("dmax", 1e6)):
        bounds[name].assign(bound)
    config = layer.get_config()
    assert json.loads(json.dumps(config))["renorm_clipping"]["rmax"] == 1e6
    np.testing.assert_allclose(step(x), free(x, training=True), rtol=1e-4, atol=1e-4)
    assert [v.name for v in layer.weights] == [v.name for v in free.weights]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, training=True) ** 3)
    sources = [b.value if make is keras.Variable else b for b in bounds.values()]
    assert tape.gradient(loss, sources) == [None] * 3
    model = keras.Sequential([keras.Input((3,)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").layers[-1]
    assert loaded.renorm_clipping == {"rmin": 0.0, "rmax": 1e6, "dmax": 1e6}


def test_a_masked_nan_does_not_reach_the_gradients_of_batch_renormalization():
    x, mask = _data(8, 3), np.arange(8) > 0
    x[0] = np.nan
    layer = _build(BatchNormalization(renorm=True))
    with tf.GradientTape() as tape:
        y = layer(x, training=True, mask=mask)
        loss = tf.reduce_sum(tf.sin(y[1:]))
    gradients = tape.gradient(loss, layer.trainable_weights)
    assert np.isnan(y[0]).all()
    layer = _build(BatchNormalization(renorm=True))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(layer(x[1:], training=True)))
    for gradient, expected in zip(
        gradients, tape.gradient(loss, layer.trainable_weights), strict=True
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


# --- Weights, configs, files.


def test_a_subclass_with_other_arguments_is_built_from_its_config():
    class Scaled(BatchNormalization):
        def __init__(self, factor=2.0, name=None):
            super().__init__(name=name)
            self.factor = factor

        def get_config(self):
            return {"factor": self.factor, "name": self.name}

    class Open(BatchNormalization):
        def __init__(self, factor=2.0, **kwargs):
            super().__init__(**kwargs)
            self.factor = factor

    class KerasLike(BatchNormalization):
        def __init__(self, **kwargs):
            super().__init__(unbiased=False, **kwargs)

    assert not KerasLike.from_config(KerasLike().get_config()).unbiased
    model = keras.Sequential([keras.Input((3,)), KerasLike(momentum=0.5)])
    copied = keras.models.clone_model(model).layers[0]
    assert type(copied) is KerasLike and copied.momentum == 0.5 and not copied.unbiased
    assert Scaled.from_config(Scaled(3.0).get_config()).factor == 3
    # As for the layer itself, a config of Keras means biased moving variances.
    assert not Open.from_config({"factor": 3.0}).unbiased
    assert Open.from_config(Open().get_config()).unbiased


def _network(layer):
    inputs = keras.Input((4, 4, 2))
    x = keras.layers.Conv2D(3, 3, use_bias=False, name="conv")(inputs)
    outputs = keras.layers.Dense(2, name="out")(keras.layers.Flatten()(layer(x)))
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("renorm", [False, True])
def test_weights_load_into_the_keras_layer_and_back(tmp_path, suffix, renorm):
    x = _data(3, 4, 4, 2)
    pair = [BatchNormalization, keras.layers.BatchNormalization]
    for source, target in (pair, pair[::-1]):
        saved = _network(source(renorm=renorm, name="bn"))
        path = str(tmp_path / f"{source.__module__}{suffix}")
        saved.save_weights(path) if suffix == ".weights.h5" else saved.save(path)
        loaded = _network(target(renorm=renorm, name="bn"))
        loaded.set_weights([0 * w for w in loaded.get_weights()])
        loaded.load_weights(path)
        assert [w.path for w in saved.weights] == [w.path for w in loaded.weights]
        np.testing.assert_allclose(loaded(x), saved(x), rtol=1e-5, atol=1e-5)


def test_saved_models_convert_to_this_layer_and_back(tmp_path):
    x = _data(3, 4, 4, 2)
    theirs = _network(keras.layers.BatchNormalization(name="bn"))
    theirs.save(tmp_path / "theirs.keras")
    ours = replace_batch_norm(keras.models.load_model(tmp_path / "theirs.keras"))
    ours.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    assert isinstance(again.get_layer("bn"), BatchNormalization)
    assert not again.get_layer("bn").unbiased
    back = keras.layers.BatchNormalization.from_config(again.get_layer("bn").get_config())
    back.build((None, 2, 2, 3))
    back.set_weights(again.get_layer("bn").get_weights())
    features = _data(2, 2, 2, 3)
    np.testing.assert_allclose(back(features), again.get_layer("bn")(features), atol=1e-5)
    for model in (ours, again):
        np.testing.assert_allclose(model(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"axis": [1, 2], "momentum": None, "scale": False},
        {"unbiased": False, "synchronized": True, "sync_group_size": 2},
        {"virtual_batch_size": 4, "gamma_regularizer": "l2", "beta_constraint": "non_neg"},
        {"renorm": True, "renorm_clipping": {"rmax": 2.0}, "renorm_momentum": 0.9},
    ],
)
def test_a_layer_equals_the_one_built_from_its_config(arguments):
    layer = BatchNormalization(**arguments)
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert isinstance(again, BatchNormalization)
    for name in ("axis", "momentum", "unbiased", "sync_group_size", "virtual_batch_size", "renorm"):
        assert getattr(again, name) == getattr(layer, name)
    assert again.get_config() == layer.get_config()


def test_an_exported_model_returns_the_same_outputs(tmp_path):
    model = _network(BatchNormalization())
    x = _data(3, 4, 4, 2)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_trains_like_the_keras_layer(jit_compile):
    x, y = _data(24, 4, 4, 2), _data(24, 2, seed=1)
    weights = []
    for layer in (BatchNormalization(unbiased=False), keras.layers.BatchNormalization()):
        model = _network(layer)
        model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_trains_on_a_channel_far_from_zero(jit_compile):
    """On a GPU, Keras' fit compiles with XLA by default."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 8, 3)).astype(np.float32)
    x[..., 2] = 300 + 0.18 * x[..., 2]
    layer = BatchNormalization(momentum=0.5)
    model = keras.Sequential([keras.Input((8, 8, 3)), layer, keras.layers.Flatten()])
    model.add(keras.layers.Dense(2))
    model.compile(keras.optimizers.SGD(0.001), "mse", jit_compile=jit_compile)
    losses = model.fit(x, rng.normal(size=(64, 2)), epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(layer.moving_mean[2], 300, atol=3)
    np.testing.assert_allclose(layer.moving_variance[2], 0.18**2, rtol=0.3)


def test_second_derivatives_equal_finite_differences_unlike_those_of_the_keras_layer():
    rng = np.random.default_rng(0)
    x, direction = (tf.constant(rng.normal(size=(8, 3))) for _ in range(2))

    def directional_derivatives(layer, x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            first = tf.reduce_sum(inner.gradient(loss, x) * direction)
        return float(first), float(tf.reduce_sum(outer.gradient(first, x) * direction))

    def second_difference(layer, step=1e-5):
        forward, backward = (
            directional_derivatives(layer, x + s * step * direction)[0] for s in (1, -1)
        )
        return (forward - backward) / (2 * step)

    layer = BatchNormalization(dtype="float64")
    keras_layer = keras.layers.BatchNormalization(dtype="float64")
    expected = second_difference(layer)
    assert directional_derivatives(layer, x)[1] == pytest.approx(expected, rel=1e-6)
    assert second_difference(keras_layer) == pytest.approx(expected, rel=1e-6)
    assert directional_derivatives(keras_layer, x)[1] == pytest.approx(19.359, rel=1e-3)
    assert expected == pytest.approx(7.835, rel=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_forward_mode_equals_reverse_mode(training):
    layer = _build(BatchNormalization())
    x, direction = tf.constant(_data(6, 3)), tf.constant(_data(6, 3, seed=1))
    with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
        y = layer(x, training=training)
    with tf.GradientTape() as outer:
        weights = tf.ones_like(y)
        outer.watch(weights)
        with tf.GradientTape() as inner:
            inner.watch(x)
            product = tf.reduce_sum(layer(x, training=training) * weights)
        gradient = inner.gradient(product, x)
    expected = outer.gradient(gradient, weights, direction)
    np.testing.assert_allclose(accumulator.jvp(y), expected, rtol=1e-4, atol=1e-5)


def test_scaling_the_kernel_before_the_layer_changes_nothing():
    """Section 3.3: BN((aW)u) = BN(Wu), and the gradient of aW is 1/a of that of W."""
    u, kernel = _data(64, 5), np.random.default_rng(1).normal(size=(5, 3))
    layer = BatchNormalization(epsilon=1e-12)
    outputs, gradients = [], []
    for a in (1.0, 8.0):
        w = tf.Variable(a * kernel, dtype=tf.float32)
        with tf.GradientTape() as tape:
            y = layer(tf.constant(u) @ w, training=True)
            loss = tf.reduce_sum(tf.sin(y))
        outputs.append(y)
        gradients.append(a * tape.gradient(loss, w))
    np.testing.assert_allclose(*outputs, atol=1e-5)
    np.testing.assert_allclose(*gradients, rtol=1e-2, atol=1e-3)


# --- Errors.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"momentum": 1.1}, r"momentum=1\.1 is invalid: expected the fraction kept, in \[0, 1\]"),
        ({"renorm_momentum": -1}, "renorm_momentum=-1"),
        ({"renorm_momentum": None}, r"renorm_momentum=None is invalid: expected the fraction kept"),
        ({"momentum": "x"}, "momentum=x is invalid: expected the fraction kept"),
        ({"renorm_momentum": "x"}, "renorm_momentum=x is invalid: expected the fraction kept"),
        ({"epsilon": 0}, "epsilon=0 is invalid: expected a positive number"),
        ({"epsilon": None}, "epsilon=None is invalid: expected a positive number"),
        ({"epsilon": np.inf}, "epsilon=inf is invalid: expected a positive number"),
        ({"epsilon": np.nan}, "epsilon=nan is invalid: expected a positive number"),
        ({"axis": 1.5}, r"axis=1\.5 is invalid: expected an integer or a list of integers"),
        ({"axis": [1, 1.7]}, r"axis=\[1, 1\.7\] is invalid: expected an integer or a list"),
        ({"axis": None}, "axis=None is invalid: expected an integer or a list of integers"),
        ({"axis": "last"}, "axis='last' is invalid: expected an integer or a list of integers"),
        *(
            ({name: value}, f"{name}={value!r} is invalid: expected True or False")
            for name in ("center", "scale", "renorm", "synchronized", "unbiased")
            for value in ("False", None, 2, 1.0)
        ),
        ({"virtual_batch_size": 0}, "virtual_batch_size=0 is invalid: expected a positive integer"),
        ({"virtual_batch_size": True}, "virtual_batch_size=True is invalid"),
        ({"sync_group_size": 2}, "synchronized=True"),
        ({"renorm": True, "virtual_batch_size": 2}, "mutually exclusive"),
        ({"renorm": True, "renorm_clipping": {"max": 1}}, "invalid keys.*rmax"),
        ({"renorm": True, "renorm_clipping": [1, 2, 3]}, "expected a dict of .*rmax"),
        *(
            (
                {"renorm": True, "renorm_clipping": {name: value}},
                f"{name} should be non-negative",
            )
            for name in ("rmin", "rmax", "dmax")
            for value in (-1, np.nan, "x", tf.Variable(-1.0), keras.Variable([1.0, 2.0]))
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmin": 2, "rmax": tf.Variable(1.5)}},
            r"rmax should be at least rmin in renorm_clipping: rmax=1\.5, rmin=2",
        ),
    ],
)
def test_an_invalid_argument_raises(arguments, message):
    with pytest.raises(UsageError, match=message):
        BatchNormalization(**arguments)


def test_numbers_of_numpy_become_numbers_of_python():
    layer = BatchNormalization(
        axis=np.array([1, -1]),
        momentum=np.float32(0.5),
        epsilon=np.float32(0.25),
        center=np.True_,
        scale=0,
        renorm=True,
        renorm_clipping={"rmax": np.float32(2), "dmax": None},
        renorm_momentum=np.float32(0.75),
    )
    config = layer.get_config()
    assert json.loads(json.dumps(config))["renorm_clipping"] == {"rmax": 2.0, "dmax": None}
    assert (config["axis"], config["momentum"], config["epsilon"]) == ([1, -1], 0.5, 0.25)
    assert config["center"] is True and config["scale"] is False
    assert BatchNormalization(axis=np.array(1)).get_config()["axis"] == 1


@pytest.mark.parametrize(
    "arguments, shape, message",
    [
        ({"axis": 3}, (2, 3, 4), r"axis=3 is out of bounds.*-3 to 2"),
        ({"axis": [1, -2]}, (2, 3, 4), "repeats an axis"),
        ({"axis": [0, 1, 2]}, (2, 3, 4), "covers all axes"),
        ({"axis": []}, (2, 3), "out of bounds"),
        ({"axis": 1}, (2, None, 4), "unknown size"),
        ({"axis": 0, "virtual_batch_size": 2}, (2, 3), "includes the batch axis"),
        ({}, (3,), r"input shape \(3,\) is invalid: expected two or more axes"),
        ({}, (), r"input shape \(\) is invalid: expected two or more axes"),
        ({}, None, "has the shape None: expected a single tensor"),
        ({}, {"a": (2, 3)}, r"has the shape \{'a': \(2, 3\)\}: expected a single tensor"),
        ({}, [(2, 3), (2, 3)], "expected a single tensor"),
    ],
)
def test_an_input_shape_that_does_not_fit_raises(arguments, shape, message):
    with pytest.raises(UsageError, match=message):
        BatchNormalization(**arguments).build(shape)


def test_a_mask_shape_that_does_not_fit_raises():
    with pytest.raises(UsageError, match=r"mask shape \(2, 3, 4\).*\(2, 3, 4\)"):
        BatchNormalization()(np.zeros((2, 3, 4), np.float32), mask=np.ones((2, 3, 4)))
    with pytest.raises(UsageError, match=r"mask shape \(2, 5\)"):
        BatchNormalization()(np.zeros((2, 3, 4), np.float32), mask=np.ones((2, 5)))


def test_a_mask_of_unknown_rank_raises():
    layer = _build(BatchNormalization())
    signature = [tf.TensorSpec([None, 3]), tf.TensorSpec(None, tf.bool)]
    run = tf.function(
        lambda x, mask: layer(x, training=True, mask=mask),
        input_signature=signature,
        autograph=False,
    )
    with pytest.raises(UsageError, match="mask shape <unknown> does not fit"):
        run(_data(6, 3), np.ones(6, bool))


@pytest.mark.parametrize(
    "inputs, message",
    [
        (tf.ragged.constant([[1.0, 2.0], [3.0]]), r"a RaggedTensor.*inputs\.to_tensor\(\)"),
        (
            tf.sparse.from_dense([[1.0, 2.0], [0.0, 3.0]]),
            r"a SparseTensor.*tf\.sparse\.to_dense\(inputs\)",
        ),
        (tf.constant([[1j, 2j]]), "dtype complex128: expected real numbers"),
        (tf.constant([["a", "b"]]), "dtype string: expected real numbers"),
    ],
)
def test_inputs_that_are_no_dense_real_numbers_raise(inputs, message):
    layer = BatchNormalization()
    layer.build((None, 2))
    with pytest.raises(UsageError, match=message):
        layer.call(inputs, training=True)


def test_a_batch_of_incomplete_ghost_batches_raises():
    layer = BatchNormalization(virtual_batch_size=np.int64(4))
    with pytest.raises(UsageError, match="virtual_batch_size=4 does not divide.*has 6 examples"):
        layer(_data(6, 3), training=True)
    run = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 3])])
    assert run(_data(8, 3)).shape == (8, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="virtual_batch_size=4"):
        run(_data(6, 3))


def test_a_batch_of_incomplete_ghost_batches_has_a_hint_under_xla():
    layer = BatchNormalization(virtual_batch_size=4)
    signature = [tf.TensorSpec([None, 3])]
    run = tf.function(lambda x: layer(x, training=True), signature, jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="virtual_batch_size_must_divide"):
        run(_data(6, 3))
