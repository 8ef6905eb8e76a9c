"""The layer's laws wherever Keras runs it: eager, graph and XLA, known and unknown batch, dtypes.

Every case compares outputs, gradients and moving statistics with the paper in float64.
"""

import collections
import itertools
import re

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from bn_keras import BatchNormalization
from bn_keras.ops import choice

EPSILON = 1e-3
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}
KERAS_BN = keras.layers.BatchNormalization


@pytest.fixture
def implementation(request, monkeypatch):
    """Selects ordinary operations, the kernels for CPUs, or what the layer calls on a GPU.

    The kernels that run are always those for CPUs.
    """
    is_ordinary = request.param == "ordinary"
    monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_TRAINING", 2**60 if is_ordinary else 0)
    monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_INFERENCE", 2**60 if is_ordinary else 0)
    monkeypatch.setattr(choice, "MIN_CHANNELS_TO_FUSE", 1)
    if request.param == "accelerator":
        monkeypatch.setattr(choice, "is_on_accelerator", lambda: True)
    return request.param


def _compile(function, mode, is_known, *inputs):
    """Returns the function for tensors like `inputs`, or for a batch of unknown size."""
    if mode == "eager":
        assert is_known
        return function
    specs = [
        tf.TensorSpec([d if is_known or a else None for a, d in enumerate(t.shape)], t.dtype)
        for t in inputs
    ]
    return tf.function(function, input_signature=specs, jit_compile=mode == "XLA")


def _training_step(layer, mask=None):
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], tf.cast(dy, y.dtype))

    return step


def _built(shape, axis=-1, seed=0, **arguments):
    layer = BatchNormalization(axis=axis, epsilon=EPSILON, **arguments)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(seed)
    layer.gamma.assign(rng.uniform(0.5, 2, layer.gamma.shape))
    layer.beta.assign(rng.normal(size=layer.beta.shape))
    return layer


def _assert_close(actual, expected, tolerance):
    actual = np.asarray(tf.cast(actual, tf.float64))
    scale = max(np.abs(expected).max(initial=0), 1e-6)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


# --- Values, gradients and moving statistics.

CASES = {
    "plain": ((6, 4, 4, 3), {}),
    "rank 2": ((8, 3), {}),
    "rank 5": ((4, 2, 3, 2, 3), {}),
    "channels first": ((6, 3, 4, 4), {"axis": 1}),
    "channels first, rank 3": ((6, 3, 5), {"axis": 1}),
    "per activation": ((6, 2, 2, 3), {"axis": [1, 2, 3]}),
    "axes apart": ((6, 2, 4, 3), {"axis": [1, 3]}),
    "masked": ((6, 4, 3), {}),
    "biased": ((6, 4, 4, 3), {"unbiased": False}),
    "no momentum": ((6, 4, 4, 3), {"momentum": None}),
    "momentum of 0": ((6, 4, 4, 3), {"momentum": 0.0}),
    "momentum of 1": ((6, 4, 4, 3), {"momentum": 1.0}),
}


# Eager tensors have a known size. XLA compiles ordinary operations only.
SETTINGS = [
    (implementation, mode, is_known)
    for implementation in ("ordinary", "kernels", "accelerator")
    for mode, is_known in itertools.product(("eager", "graph", "XLA"), (True, False))
    if (mode != "eager" or is_known) and (mode != "XLA" or implementation == "ordinary")
]


@pytest.mark.parametrize("implementation, mode, is_known", SETTINGS, indirect=["implementation"])
@pytest.mark.parametrize(
    "case, dtype",
    [(case, "float32") for case in CASES]
    + [(c, d) for c in ("plain", "channels first", "masked") for d in TOLERANCE if d != "float32"],
)
def test_a_training_step_equals_the_paper(case, dtype, implementation, mode, is_known):
    shape, arguments = CASES[case]
    rng = np.random.default_rng(1)
    x, dy = (tf.cast(rng.normal(1, 2, shape), tf.as_dtype(_compute(dtype))) for _ in range(2))
    layer = _built(shape, dtype=dtype, **arguments)
    axis, momentum = arguments.get("axis", -1), arguments.get("momentum", 0.99)
    mask = None
    if case == "masked":
        mask = tf.constant(rng.random(shape[:-1]) < 0.6)
    step = _compile(_training_step(layer, mask), mode, is_known, x, dy)
    exact_x, exact_dy = (np.asarray(tf.cast(t, tf.float64)) for t in (x, dy))
    gamma, beta = (np.asarray(p, np.float64) for p in (layer.gamma, layer.beta))
    moving = [np.asarray(v, np.float64) for v in (layer.moving_mean, layer.moving_variance)]
    for number in (1, 2):
        y, gradients = step(x, dy)
        weights = None if mask is None else mask.numpy()[..., None]
        expected, mean, variance, count = reference.batch_normalize(
            exact_x, gamma, beta, EPSILON, axis, weights
        )
        if arguments.get("unbiased", True):
            variance = reference.unbiased(variance, count)
        kept = 1 - 1 / number if momentum is None else momentum
        moving = [
            reference.update_average(m, b, kept)
            for m, b in zip(moving, (mean, variance), strict=True)
        ]
    exact = reference.gradients(exact_dy, exact_x, gamma, EPSILON, axis, weights)
    tolerance = TOLERANCE[dtype]
    assert y.dtype == _compute(dtype)
    _assert_close(y, expected, tolerance)
    for actual, wanted in zip(gradients, exact, strict=True):
        _assert_close(actual, wanted, 10 * tolerance)
    # Statistics are at least float32, whatever the dtype of the activations.
    statistics_tolerance = min(tolerance, 1e-5)
    _assert_close(layer.moving_mean, moving[0], statistics_tolerance)
    _assert_close(layer.moving_variance, moving[1], statistics_tolerance)


def _compute(dtype):
    return keras.DTypePolicy(dtype).compute_dtype


@pytest.mark.parametrize("implementation, mode, is_known", SETTINGS, indirect=["implementation"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_large_means_lose_nothing(unbiased, implementation, mode, is_known):
    """400,000 values near 1e4: float32 sums one by one are off by many deviations."""
    if implementation == "accelerator":
        pytest.skip("the kernels for GPUs, which do not run here, add in another order")
    rng = np.random.default_rng(2)
    x = (1e4 + rng.normal(size=(32, 112, 112, 1))).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    layer = BatchNormalization(momentum=0.5, epsilon=EPSILON, unbiased=unbiased)
    layer.build((None, *x.shape[1:]))
    y, gradients = _compile(_training_step(layer), mode, is_known, x, dy)(
        tf.constant(x), tf.constant(dy)
    )
    expected, mean, variance, count = reference.batch_normalize(x, 1.0, 0.0, EPSILON)
    exact = reference.gradients(dy, x, np.ones(1), EPSILON)
    spacing = 1e4 * 2**-24
    np.testing.assert_allclose(y, expected, atol=2 * spacing)
    np.testing.assert_allclose(gradients[0], exact[0], atol=2 * spacing)
    np.testing.assert_allclose(layer.moving_mean[0], 0.5 * mean, rtol=1e-6)
    if unbiased:
        variance = reference.unbiased(variance, count)
    np.testing.assert_allclose(layer.moving_variance[0], 0.5 + 0.5 * variance, rtol=1e-3)


@pytest.mark.parametrize("implementation, mode, is_known", SETTINGS, indirect=["implementation"])
@pytest.mark.parametrize("momentum", [0.9, 0.0, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_an_empty_batch_changes_nothing(unbiased, momentum, implementation, mode, is_known):
    layer = _built((4, 2, 2, 3), momentum=momentum, unbiased=unbiased)
    empty = tf.zeros([0, 2, 2, 3])
    step = _compile(_training_step(layer), mode, is_known, empty, empty)
    before = [v.numpy() for v in layer.weights]
    y, gradients = step(empty, empty)
    assert y.shape == empty.shape and all(np.isfinite(g).all() for g in gradients)
    for variable, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("implementation, mode, is_known", SETTINGS, indirect=["implementation"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 1)])
def test_a_single_value_has_a_variance_of_0(shape, implementation, mode, is_known):
    layer = _built(shape, momentum=0.5)
    x = tf.reshape(tf.range(1.0, 1 + shape[-1]), shape)
    y, _ = _compile(_training_step(layer), mode, is_known, x, x)(x, x)
    np.testing.assert_allclose(y, tf.broadcast_to(layer.beta, shape), atol=1e-6)
    np.testing.assert_allclose(layer.moving_mean, tf.reshape(x / 2, [-1]))
    np.testing.assert_allclose(layer.moving_variance, tf.fill(shape[-1:], 0.5))


@pytest.mark.parametrize("implementation, mode, is_known", SETTINGS, indirect=["implementation"])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 3}])
def test_every_mode_trains_like_eager_mode(options, implementation, mode, is_known):
    """Ghost batches and batch renormalization; a network of two layers, three steps."""
    rng = np.random.default_rng(3)
    x, dy = (rng.normal(size=(6, 4, 3)).astype(np.float32) for _ in range(2))

    def train(mode, is_known):
        keras.utils.set_random_seed(0)
        layers = [_built(x.shape, **options), _built(x.shape, seed=1, **options)]

        def step(x, dy):
            with tf.GradientTape() as tape:
                y = layers[1](tf.tanh(layers[0](x, training=True)), training=True)
            parameters = [v for layer in layers for v in layer.trainable_variables]
            gradients = tape.gradient(y, [p.value for p in parameters], dy)
            for p, g in zip(parameters, gradients, strict=True):
                p.assign(p - 0.1 * g)

        step = _compile(step, mode, is_known, x, dy)
        for _ in range(3):
            step(tf.constant(x), tf.constant(dy))
        return [v for layer in layers for v in layer.weights]

    for actual, expected in zip(train(mode, is_known), train("eager", True), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("implementation, mode, is_known", SETTINGS, indirect=["implementation"])
def test_second_derivatives_equal_those_of_float64(implementation, mode, is_known):
    rng = np.random.default_rng(4)
    x, dy = (rng.normal(size=(5, 2, 2, 3)) for _ in range(2))

    def second(dtype):
        layer = _built(x.shape, dtype=dtype)

        def gradient(x, dy):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(tf.sin(layer(x, training=True)) * dy)
                first = inner.gradient(loss, x)
            return outer.gradient(first, x, dy)

        tensors = [tf.constant(t, dtype) for t in (x, dy)]
        return _compile(gradient, mode, is_known, *tensors)(*tensors)

    _assert_close(second("float32"), second("float64").numpy(), 1e-4)


# --- Other transformations of TensorFlow.

IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", ["ordinary", "kernels"], indirect=["implementation"]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(5, 2, 2, 3), (None, 2, 2, 3)])
def test_jacobians_equal_those_of_float64(shape, implementation):
    def jacobian(dtype):
        layer = _built((5, 2, 2, 3), dtype=dtype)

        @tf.function(input_signature=[tf.TensorSpec(shape, dtype)])
        def compute(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return tape.jacobian(y, x)

        return compute(tf.cast(np.random.default_rng(6).normal(size=(5, 2, 2, 3)), dtype))

    _assert_close(jacobian("float32"), jacobian("float64").numpy(), 1e-5)


@pytest.mark.parametrize(
    "implementation", ["ordinary", "kernels", "accelerator"], indirect=["implementation"]
)
@pytest.mark.parametrize(
    "arguments", [{}, {"renorm": True}, {"trainable": False}, {"axis": 1, "momentum": None}]
)
def test_eager_jacobians_equal_those_of_float64(arguments, implementation):
    """Per example, and of the gradient: a Hessian."""

    def derivatives(dtype):
        shape = (5, 2, 2, 3)
        layer = _built(shape, dtype=dtype, **arguments)
        x = tf.cast(np.random.default_rng(6).normal(size=shape), dtype)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(tf.sin(y) * x)
            gradient = inner.gradient(loss, x)
        return outer.batch_jacobian(y, x), outer.jacobian(gradient, x)

    for actual, expected in zip(derivatives("float32"), derivatives("float64"), strict=True):
        _assert_close(actual, expected.numpy(), 1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("is_graph", [False, True])
def test_third_derivatives_equal_those_of_float64(is_graph, implementation):
    def third(dtype):
        layer = _built((5, 2, 2, 3), dtype=dtype)

        def squared_norm_of_gradient(function):
            def norm(x):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    value = function(x)
                return tf.reduce_sum(tape.gradient(value, x) ** 2)

            return norm

        def loss(x):
            return tf.reduce_sum(tf.sin(layer(x, training=True)) * x**2)

        function = squared_norm_of_gradient(squared_norm_of_gradient(loss))

        def derivative(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = function(x)
            return tape.gradient(value, x)

        x = tf.cast(np.random.default_rng(7).normal(size=(5, 2, 2, 3)), dtype)
        return (tf.function(derivative) if is_graph else derivative)(x)

    _assert_close(third("float32"), third("float64").numpy(), 1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("transformation", [tf.map_fn, tf.vectorized_map])
def test_mapped_calls_equal_single_ones(transformation, implementation):
    xs = tf.cast(np.random.default_rng(8).normal(size=(4, 5, 2, 2, 3)), tf.float32)

    @tf.function
    def mapped(xs, layer):
        with tf.GradientTape() as tape:
            tape.watch(xs)
            ys = transformation(lambda x: layer(x, training=True), xs)
            loss = tf.reduce_sum(ys**3)
        return ys, tape.gradient(loss, xs)

    ys, gradients = mapped(xs, _built(xs.shape[1:]))
    for x, y, gradient in zip(xs, ys, gradients, strict=True):
        layer = _built(x.shape)
        with tf.GradientTape() as tape:
            tape.watch(x)
            expected = layer(x, training=True)
            loss = tf.reduce_sum(expected**3)
        _assert_close(y, expected.numpy(), 1e-5)
        _assert_close(gradient, tape.gradient(loss, x).numpy(), 1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(5, 2, 2, 3), (None, 2, 2, 3)])
def test_a_while_loop_equals_a_python_loop(shape, implementation):
    x = tf.cast(np.random.default_rng(9).normal(size=(5, 2, 2, 3)), tf.float32)

    def gradient(repeat, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(repeat(_step, x) ** 3)
        return tape.gradient(loss, x)

    def python_loop(step, y):
        for _ in range(3):
            y = step(y)
        return y

    def while_loop(step, y):
        return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, step(y)), (0, y))[1]

    found = []
    for repeat in (python_loop, while_loop):
        layer = _built(x.shape)

        def _step(y, layer=layer):
            return layer(tf.sin(y), training=True)

        compute = tf.function(
            lambda x, repeat=repeat: gradient(repeat, x), input_signature=[tf.TensorSpec(shape)]
        )
        found.append((compute(x), layer.moving_mean.numpy()))
    (expected, mean), (actual, other_mean) = found
    _assert_close(actual, expected.numpy(), 1e-5)
    np.testing.assert_allclose(other_mean, mean, rtol=1e-5)


@IMPLEMENTATIONS
def test_a_layer_in_a_branch_trains_like_one_outside(implementation):
    """The branch uses tensors of the graph around it, as in a network with stochastic depth."""
    x = tf.cast(np.random.default_rng(11).normal(size=(5, 2, 2, 3)), tf.float32)

    def train(is_branch):
        layer = _built(x.shape)

        @tf.function
        def forward(x):
            if not is_branch:
                return layer(x, training=True)
            return tf.cond(x[0, 0, 0, 0] < 9.0, lambda: layer(x, training=True), lambda: x)

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(forward(x) ** 3)
            return tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

        return [*step(x), layer.moving_mean, layer.moving_variance]

    for actual, expected in zip(train(True), train(False), strict=True):
        _assert_close(actual, np.asarray(expected), 1e-5)


@IMPLEMENTATIONS
def test_a_saved_training_step_returns_the_same(implementation, tmp_path):
    module = tf.Module()
    module.layer = _built((5, 2, 2, 3))

    @tf.function(input_signature=[tf.TensorSpec([None, 2, 2, 3])])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(module.layer(x, training=True) ** 3)
        return tape.gradient(loss, x)

    module.step = step
    tf.saved_model.save(module, tmp_path)
    x = tf.cast(np.random.default_rng(10).normal(size=(5, 2, 2, 3)), tf.float32)
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_array_equal(loaded.step(x), step(x))


# --- Arguments of a call.


@pytest.mark.parametrize("make", [tf.constant, tf.Variable, np.bool_])
def test_a_constant_mode_equals_the_bool(make):
    """The other mode is not even computed: a static batch of incomplete ghost batches is accepted
    at inference, and training adds nothing to the graph of inference."""
    layer = BatchNormalization(virtual_batch_size=4)
    x = tf.ones([6, 3])
    np.testing.assert_array_equal(layer(x, training=make(False)), layer(x, training=False))
    assert float(layer.moving_mean[0]) == 0

    def operations(training):
        graph = tf.function(lambda x: layer(x, training=training())).get_concrete_function(x).graph
        return collections.Counter(op.type for op in graph.get_operations())

    if make is tf.constant:
        difference = operations(lambda: tf.constant(False)) - operations(lambda: False)
        assert not difference - collections.Counter(["Const"])


def test_a_replaced_update_gets_the_moments():
    """The kernel does not average behind the back of a method that does something else."""
    seen = []
    layer = BatchNormalization()
    x = np.random.default_rng(5).normal(size=(32, 16, 16, 16)).astype(np.float32)
    layer(x, training=True)
    before = layer.moving_mean.numpy()
    layer.update_moving_statistics = lambda moments, training=True: seen.append(moments)
    layer(x, training=True)
    np.testing.assert_array_equal(layer.moving_mean, before)
    np.testing.assert_allclose(seen[0].mean, x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(seen[0].variance, x.var((0, 1, 2)), rtol=1e-4)

    class Subclass(BatchNormalization):
        def update_moving_statistics(self, moments, training=True):
            seen.append(moments)

    Subclass()(x, training=True)
    assert len(seen) == 2


def test_code_that_freezes_the_keras_layer_finds_this_layer():
    layer = BatchNormalization(axis=[1, 2], momentum=None)
    assert isinstance(layer, keras.layers.BatchNormalization)
    assert layer.axis == [1, 2] and layer.momentum is None


# --- Graphs.


def _training_graph(layer, shape):
    spec = tf.TensorSpec(shape, layer.compute_dtype)
    layer.build(shape)
    return tf.function(_training_step(layer)).get_concrete_function(spec, spec).graph


def _nodes(graph):
    definition = graph.as_graph_def()
    functions = definition.library.function
    return [*definition.node, *(n for f in functions for n in f.node_def)]


@pytest.mark.parametrize(
    "shape, largest_share",
    [
        ((32, 28, 28, 256), 0.4),
        ((None, 28, 28, 256), 0.52),
        ((32, 112, 112, 64), 0.52),
        ((None, 100), 0.66),
        ((16, 8, 8, 16), 0.72),
    ],
)
def test_the_graph_is_lighter_than_that_of_the_keras_layer(shape, largest_share):
    ours, theirs = (
        len(_nodes(_training_graph(c(), shape))) for c in (BatchNormalization, KERAS_BN)
    )
    assert ours <= largest_share * theirs


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(
    "shape, axis", [((64, 16, 16, 8), -1), ((64, 8, 16, 16), 1), ((64, 15, 15, 8), -1)]
)
def test_xla_writes_no_more_large_tensors_than_for_the_keras_layer(shape, axis, is_known):
    x = tf.random.normal(shape)

    def num_written(cls):
        layer = cls(axis=axis)
        layer.build((None, *shape[1:]))
        compiled = _compile(_training_step(layer), "XLA", is_known, x, x)
        program = compiled.experimental_get_compiler_ir(x, x)(stage="optimized_hlo")
        size = ",".join(map(str, shape))
        entry = program[program.index("\nENTRY") :]
        return len(re.findall(rf"= f32\[{size}\]\S* (?!parameter)", entry))

    # y, dx, and two products before their sums, as of TensorFlow 2.21.
    assert 2 <= num_written(BatchNormalization) <= num_written(KERAS_BN)


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((4096, 32), -1),
        ((63, 5), -1),
        ((64, 14, 14, 8), -1),
        ((8, 35, 35, 3), -1),
        ((2, 149, 149, 2), -1),
        ((64, 8, 16, 16), 1),
        ((8, 3, 7), 1),
    ],
)
def test_large_means_lose_nothing_under_xla(shape, axis, is_known):
    """Means of parts are averaged, if a suitable number divides the size."""
    x = (1e4 + np.random.default_rng(2).normal(size=shape)).astype(np.float32)
    layer = BatchNormalization(axis=axis, epsilon=EPSILON)
    layer.build((None, *shape[1:]))
    y, _ = _compile(_training_step(layer), "XLA", is_known, x, x)(tf.constant(x), tf.constant(x))
    expected = reference.batch_normalize(x, 1.0, 0.0, EPSILON, axis)[0]
    np.testing.assert_allclose(y, expected, atol=2 * 1e4 * 2**-24)


@pytest.mark.parametrize("implementation", ["accelerator"], indirect=True)
def test_graphs_for_accelerators(implementation):
    """Channels stay where cuDNN takes them, and no gradient adds in an undefined order."""
    first = _nodes(_training_graph(BatchNormalization(axis=1), (None, 3, 8, 8)))
    assert "Transpose" not in {n.op for n in first}
    (kernel,) = (n for n in first if n.op == "FusedBatchNormV3")
    assert kernel.attr["data_format"].s == b"NCHW"
    for shape in ((None, 8, 8, 3), (None, 3)):
        frozen = BatchNormalization(trainable=False)
        # The frozen layer and inference consist of ordinary operations.
        assert "FusedBatchNormV3" not in {n.op for n in _nodes(_training_graph(frozen, shape))}
        # On GPUs BiasAddGrad adds in no fixed order.
        ordinary = BatchNormalization(dtype="float64")
        assert "BiasAddGrad" not in {n.op for n in _nodes(_training_graph(ordinary, shape))}


@pytest.mark.parametrize("scope, is_on_accelerator", [(None, True), ("CPU:0", False)])
@pytest.mark.parametrize("is_graph", [False, True])
def test_the_device_of_the_layer_decides(scope, is_on_accelerator, is_graph, monkeypatch):
    """A layer on the CPU of a machine with a GPU keeps the check of the mean."""
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda *_: [gpu])

    def ask():
        with tf.device(scope):
            return choice.is_on_accelerator()

    if is_graph:
        found = []
        tf.function(lambda: found.append(ask())).get_concrete_function()
    else:
        found = [ask()]
    assert found == [is_on_accelerator]


# --- Exports.


def _exported(layer, kind):
    """Returns a network around the layer, with moving statistics as after training."""
    keras.utils.set_random_seed(0)
    before = {
        "dense": [keras.Input((10,)), keras.layers.Dense(8)],
        "images": [keras.Input((128, 128, 3)), keras.layers.Conv2D(32, 3)],
        "sequences": [keras.Input((16, 3)), keras.layers.Conv1D(8, 3)],
        "channels first": [keras.Input((8, 6, 6))],
    }
    model = keras.Sequential([*before[kind], layer, keras.layers.ReLU()])
    rng, shape = np.random.default_rng(0), layer.gamma.shape
    layer.set_weights([rng.uniform(0.5, 2, shape) for _ in range(4)])
    return model


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("kind", ["dense", "images", "sequences", "channels first"])
def test_tflite_folds_this_layer_like_that_of_keras(kind, tmp_path):
    """The converter merges the affine map with the operation before it; int8 is as accurate."""
    x = np.random.default_rng(1).normal(size=(8, *_exported(KERAS_BN(), kind).input_shape[1:]))
    found = []
    for number, cls in enumerate((BatchNormalization, KERAS_BN)):
        model = _exported(cls(axis=1 if kind == "channels first" else -1), kind)
        model.export(tmp_path / str(number), verbose=False)
        for is_quantized in (False, True):
            converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / str(number)))
            if is_quantized:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
                converter.representative_dataset = lambda: ([t[None].astype("float32")] for t in x)
            interpreter = tf.lite.Interpreter(model_content=converter.convert())
            interpreter.allocate_tensors()
            names = [d["op_name"] for d in interpreter._get_ops_details()]
            operations = collections.Counter(n for n in names if n != "DELEGATE")
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x[:1].astype("f4"))
            interpreter.invoke()
            output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
            found.append((operations, output))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
