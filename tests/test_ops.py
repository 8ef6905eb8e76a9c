"""Compares the transform with the paper in float64, and its gradients with finite differences."""

import numpy as np
import pytest
import reference
import tensorflow as tf

from bn_keras import ops
from bn_keras.ops import choice, kernels

EPSILON = 1e-3
TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}


pytestmark = pytest.mark.usefixtures("fuse_small_inputs")


def _random_parameters(channels, rng):
    return rng.uniform(0.5, 2, channels), rng.normal(size=channels)


def _assert_close(actual, expected, tolerance):
    """Compares with a tolerance relative to the largest expected value."""
    expected = np.asarray(expected, np.float64)
    scale = max(np.abs(expected).max(initial=0), 1e-6)
    actual = np.asarray(tf.cast(actual, tf.float64))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


JIT = pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "XLA"])


def _run(x, gamma, beta, dy, jit_compile=False, **kwargs):
    """Returns y, moments, and the gradients of x, gamma and beta, computed in a tf.function."""

    @tf.function(jit_compile=jit_compile)
    def run(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = ops.batch_normalize(x, gamma, beta, EPSILON, **kwargs)
        return y, moments, tape.gradient(y, [x, gamma, beta], dy)

    parameters = [tf.cast(p, ops.statistics_dtype(x.dtype)) for p in (gamma, beta)]
    return run(x, *parameters, tf.cast(dy, x.dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(16, 3), (6, 5, 3), (4, 3, 5, 2), (2, 3, 2, 4, 3)])
@JIT
def test_values_and_gradients_equal_the_paper(shape, dtype, jit_compile):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(2, 3, shape), dtype)
    dy = tf.cast(rng.normal(size=shape), dtype)
    gamma, beta = _random_parameters(shape[-1], rng)
    y, moments, gradients = _run(x, gamma, beta, dy, jit_compile)
    exact_x, exact_dy = (np.asarray(tf.cast(t, tf.float64)) for t in (x, dy))
    expected = reference.batch_normalize(exact_x, gamma, beta, EPSILON)
    tolerance = TOLERANCE[dtype]
    assert y.dtype == dtype
    _assert_close(y, expected[0], tolerance)
    # The statistics are at least float32, whatever the dtype of the activations.
    assert moments.mean.dtype == ("float64" if dtype == "float64" else "float32")
    _assert_close(moments.mean, expected[1], min(tolerance, 3e-6))
    _assert_close(moments.variance, expected[2], min(tolerance, 3e-6))
    assert moments.count == x.shape.num_elements() // shape[-1]
    exact = reference.gradients(exact_dy, exact_x, gamma, EPSILON)
    for actual, wanted in zip(gradients, exact, strict=True):
        _assert_close(actual, wanted, 10 * tolerance)


@pytest.mark.parametrize("is_graph", [False, True])
def test_gamma_and_beta_may_be_variables(is_graph):
    rng = np.random.default_rng(1)
    x, dy = (tf.constant(rng.normal(size=(6, 3)), tf.float32) for _ in range(2))
    variables = [tf.Variable(tf.cast(p, tf.float32)) for p in _random_parameters(3, rng)]

    def gradients(x, dy):
        with tf.GradientTape() as tape:
            y, _ = ops.batch_normalize(x, *variables, EPSILON)
        return tape.gradient(y, variables, dy)

    found = (tf.function(gradients) if is_graph else gradients)(x, dy)
    _, _, (_, *expected) = _run(x, *variables, dy)
    for actual, wanted in zip(found, expected, strict=True):
        _assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_normalize_computes_the_affine_map(dtype):
    rng = np.random.default_rng(1)
    x = tf.cast(rng.normal(size=(4, 3, 5, 2)), dtype)
    mean, variance = rng.normal(size=2), rng.uniform(0.1, 2, 2)
    gamma, beta = _random_parameters(2, rng)
    y = ops.normalize(x, mean, variance, gamma, beta, EPSILON)
    exact = np.asarray(tf.cast(x, tf.float64))
    _assert_close(y, gamma * (exact - mean) / np.sqrt(variance + EPSILON) + beta, TOLERANCE[dtype])
    assert y.dtype == dtype


def _random_mask(shape, rng):
    return (rng.random((*shape[:-1], 1)) < 0.6).astype(np.float32)


def _gather_of_one(packed):
    return packed[None]


PATHS = {
    "fused": {},
    "synchronized": {"gather": _gather_of_one},
    "ghost": {"virtual_batch_size": 2},
    "ghost, synchronized": {"virtual_batch_size": 2, "gather": _gather_of_one},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True])
@JIT
def test_every_path_computes_the_same_statistics(path, masked, jit_compile):
    rng = np.random.default_rng(2)
    shape, options = (6, 3, 2, 4), PATHS[path]
    x, dy = (tf.cast(rng.normal(1, 2, shape), tf.float32) for _ in range(2))
    gamma, beta = _random_parameters(4, rng)
    mask = _random_mask(shape, rng) if masked else None
    y, moments, gradients = _run(x, gamma, beta, dy, jit_compile, mask=mask, **options)
    size = options.get("virtual_batch_size", 6)
    groups = [slice(i, i + size) for i in range(0, 6, size)]
    parts = [mask if mask is None else np.broadcast_to(mask, shape)[g] for g in groups]
    expected = [
        reference.batch_normalize(x[g], gamma, beta, EPSILON, mask=m)
        for g, m in zip(groups, parts, strict=True)
    ]
    _assert_close(y, np.concatenate([e[0] for e in expected]), 3e-6)
    for i in (1, 2):
        stacked = np.stack([e[i] for e in expected])
        _assert_close(moments[i], stacked if "ghost" in path else stacked[0], 3e-6)
    exact = [
        reference.gradients(dy[g], x[g], gamma, EPSILON, mask=m)
        for g, m in zip(groups, parts, strict=True)
    ]
    _assert_close(gradients[0], np.concatenate([e[0] for e in exact]), 3e-5)
    for i in (1, 2):
        _assert_close(gradients[i], sum(e[i] for e in exact), 3e-5)


@pytest.mark.parametrize("mode", ["eager", "graph", "XLA"])
@pytest.mark.parametrize("path", ["fused", "synchronized", "ghost", "masked", "float64"])
def test_second_order_gradients_equal_finite_differences(path, mode):
    """The objective is a function of dx, dgamma and dbeta; x, gamma, beta and dy are varied."""
    rng = np.random.default_rng(3)
    shape = (4, 3, 2)
    # Finite differences need float64, which the fused kernels do not support: the test compares the
    # float64 gradient with the differences, and the float32 paths with the float64 gradient.
    kwargs = dict(PATHS.get(path, {}))
    if path == "masked":
        kwargs["mask"] = _random_mask(shape, rng)
    inputs = [rng.normal(size=shape), *_random_parameters(2, rng), rng.normal(size=shape)]
    probes = [rng.normal(size=s) for s in (shape, (2,), (2,))]

    def objective(x, gamma, beta, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, _ = ops.batch_normalize(x, gamma, beta, EPSILON, **kwargs)
            loss = tf.reduce_sum(y * dy + tf.sin(y))
        gradients = tape.gradient(loss, [x, gamma, beta])
        return tf.add_n(
            [
                tf.reduce_sum(tf.cast(p, g.dtype) * g**2)
                for p, g in zip(probes, gradients, strict=True)
            ]
        )

    def second(dtype):
        def gradient(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = objective(*tensors)
            return tape.gradient(value, tensors)

        tensors = [tf.constant(i, dtype) for i in inputs]
        if mode == "eager":
            return gradient(*tensors)
        return tf.function(gradient, jit_compile=mode == "XLA")(*tensors)

    def difference(index, direction, step=1e-5):
        moved = [
            [i + s * step * direction if n == index else i for n, i in enumerate(inputs)]
            for s in (1, -1)
        ]
        values = [float(objective(*map(tf.constant, m))) for m in moved]
        return (values[0] - values[1]) / (2 * step)

    exact = second(tf.float64)
    for index, gradient in enumerate(exact):
        direction = rng.normal(size=inputs[index].shape)
        expected = difference(index, direction)
        assert np.sum(gradient.numpy() * direction) == pytest.approx(expected, rel=2e-6)
    if path != "float64":
        for actual, wanted in zip(second(tf.float32), exact, strict=True):
            _assert_close(actual, wanted, 3e-4)


@pytest.mark.parametrize("is_graph", [False, True])
@pytest.mark.parametrize("path", ["fused", "unfused", "synchronized", "ghost", "masked", "float64"])
def test_forward_mode_equals_reverse_mode(path, is_graph, monkeypatch):
    """Compares the derivative of a scalar, and a Hessian-vector product (forward over backward)."""
    rng = np.random.default_rng(3)
    shape = (4, 3, 2)
    kwargs = dict(PATHS.get(path, {}))
    if path == "unfused":
        monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_TRAINING", 2**30)
    if path == "masked":
        kwargs["mask"] = _random_mask(shape, rng)
    dtype = "float64" if path == "float64" else "float32"
    inputs = [tf.constant(i, dtype) for i in (rng.normal(size=shape), *_random_parameters(2, rng))]
    directions = [tf.constant(rng.normal(size=i.shape), dtype) for i in inputs]

    def loss(x, gamma, beta):
        y, _ = ops.batch_normalize(x, gamma, beta, EPSILON, **kwargs)
        return tf.reduce_sum(tf.sin(y) * x)

    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = loss(*inputs)
        return tape.gradient(value, inputs)

    def forward(*inputs):
        with tf.autodiff.ForwardAccumulator([*inputs], directions) as accumulator:
            value, gradients = loss(*inputs), gradient(*inputs)
        return accumulator.jvp(value), accumulator.jvp(gradients)

    def reverse(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            gradients = gradient(*inputs)
            product = sum(map(tf.reduce_sum, map(tf.multiply, gradients, directions)))
        return product, tape.gradient(product, inputs)

    found = (tf.function(forward) if is_graph else forward)(*inputs)
    for actual, expected in zip(
        tf.nest.flatten(found), tf.nest.flatten(reverse(*inputs)), strict=True
    ):
        _assert_close(actual, expected, 1e-11 if path == "float64" else 1e-5)


@pytest.mark.parametrize("path", [*PATHS, "masked"])
def test_eager_jacobians_and_hessians_equal_those_of_float64(path):
    """The tape traces the gradient, which holds tensors of the eager call, in a graph."""
    rng = np.random.default_rng(13)
    shape = (4, 3, 2)
    kwargs = dict(PATHS.get(path, {}))
    if path == "masked":
        kwargs["mask"] = _random_mask(shape, rng)
    inputs = [rng.normal(size=shape), rng.uniform(0.5, 2, 2)]

    def derivatives(dtype):
        x, gamma = (tf.constant(i, dtype) for i in inputs)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch([x, gamma])
            with tf.GradientTape() as inner:
                inner.watch([x, gamma])
                y, _ = ops.batch_normalize(x, gamma, None, EPSILON, **kwargs)
                loss = tf.reduce_sum(tf.sin(y) * x)
            gradient = inner.gradient(loss, x)
        return [*outer.jacobian(y, [x, gamma]), *outer.jacobian(gradient, [x, gamma])]

    for actual, expected in zip(derivatives("float32"), derivatives("float64"), strict=True):
        _assert_close(actual, expected.numpy(), 3e-6)


def _in_branch(transform, *tensors):
    return tf.cond(tf.reduce_all(tensors[0] < 1e9), lambda: transform(*tensors), lambda: tensors[0])


def _in_loop(transform, *tensors):
    def add(i, total):
        return i + 1, total + transform(*tensors)

    return tf.while_loop(lambda i, _: i < 2, add, [0, tf.zeros_like(tensors[0])])[1] / 2


@pytest.mark.parametrize(
    "path, control_flow",
    [(path, _in_branch) for path in ("fused", "synchronized", "unfused")] + [("fused", _in_loop)],
)
def test_branches_and_loops_use_tensors_of_the_graph_around_them(path, control_flow, monkeypatch):
    """The gradients, built in another function, are those of a call outside of the branch."""
    rng = np.random.default_rng(11)
    shape = (4, 3, 2)
    if path == "unfused":
        monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_TRAINING", 2**30)
    inputs = [
        tf.cast(i, tf.float32)
        for i in (rng.normal(size=shape), *_random_parameters(2, rng), rng.normal(size=shape))
    ]

    def transform(x, gamma, beta):
        return ops.batch_normalize(x, gamma, beta, EPSILON, **PATHS.get(path, {}))[0]

    signature = [tf.TensorSpec([4, None, 2]), tf.TensorSpec([2]), tf.TensorSpec([2])]
    inside = tf.function(lambda *t: control_flow(transform, *t), signature, autograph=False)

    def gradients(function, *inputs):
        *tensors, dy = inputs
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                y = tf.sin(function(*tensors))
            first = inner.gradient(y, tensors, dy)
            penalty = tf.add_n([tf.reduce_sum(g**2) for g in first])
        return [*first, *outer.gradient(penalty, tensors)]

    expected = gradients(transform, *inputs)
    for actual, wanted in zip(gradients(inside, *inputs), expected, strict=True):
        _assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("path", ["fused", "synchronized", "ghost", "masked"])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@JIT
def test_large_means_lose_no_more_than_the_rounding_of_float32(path, mean, jit_compile):
    """XLA's own version of the fused kernels returns NaN at a mean of 3,000 deviations."""
    rng = np.random.default_rng(4)
    x = (mean + rng.normal(size=(64, 7, 7, 3))).astype(np.float32)
    kwargs = dict(PATHS.get(path, {}))
    if path == "masked":
        kwargs["mask"] = np.ones((1, 1, 1, 1))
    if path == "ghost":
        kwargs["virtual_batch_size"] = 64
    dy = rng.normal(size=x.shape)
    y, moments, gradients = _run(x, np.ones(3), np.zeros(3), dy, jit_compile, **kwargs)
    expected = reference.batch_normalize(x, 1.0, 0.0, EPSILON)
    # 16 roundings of a float32 mean; the kernel sums 3,136 values.
    spacing = 16 * mean * 2**-24
    np.testing.assert_allclose(y, expected[0], atol=1e-5 + spacing)
    np.testing.assert_allclose(
        tf.reshape(moments.variance, [-1]), expected[2], rtol=1e-5 + spacing**2
    )
    exact = reference.gradients(dy, x.astype(np.float64), np.ones(3), EPSILON)
    np.testing.assert_allclose(gradients[0], exact[0], atol=1e-4 + spacing)


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("path", ["fused", "synchronized", "masked"])
@JIT
def test_large_means_do_not_lose_the_deviations_of_a_large_batch(mean, path, jit_compile):
    """The Keras layer computes the mean of 400,000 float32 values near 1e4 with an error of 12."""
    rng = np.random.default_rng(5)
    x = (mean + rng.normal(size=(32, 112, 112, 1))).astype(np.float32)
    kwargs = dict(PATHS.get(path, {}))
    if path == "masked":
        kwargs["mask"] = np.ones((1, 1, 1, 1))
    ones, zeros = np.ones(1), np.zeros(1)
    y, moments, _ = _run(tf.constant(x), ones, zeros, x - mean, jit_compile, **kwargs)
    expected = reference.batch_normalize(x, 1.0, 0.0, EPSILON)
    np.testing.assert_allclose(moments.variance, expected[2], rtol=1e-3)
    np.testing.assert_allclose(y, expected[0], atol=2e-3 + 4 * mean * 2**-24)


MILLIONS = {
    # Shape, axes, mask, and the signature of x in a graph.
    "ordinary": ([5, 512, 512, 3], [3], False, None),
    "kernel": ([5, 512, 512, 4], [3], False, None),
    "kernel, unknown batch size": ([5, 512, 512, 4], [3], False, [None, 512, 512, 4]),
    "channels first": ([5, 4, 512, 512], [1], False, None),
    "sequences": ([20, 2**16 + 1, 4], [2], False, None),
    "masked": ([5, 512, 512, 4], [3], True, None),
}


@pytest.mark.parametrize("path", MILLIONS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
@JIT
def test_the_squares_of_millions_of_values_are_not_lost(path, mean, jit_compile):
    """The variance of so many is about 0.05% too small if they are summed in float32."""
    shape, axes, is_masked, signature = MILLIONS[path]
    x = (mean + np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    gamma, beta = tf.ones([shape[axes[0]]]), tf.zeros([shape[axes[0]]])
    mask = tf.ones([1] * len(shape)) if is_masked else None

    @tf.function(input_signature=[tf.TensorSpec(signature or shape)], jit_compile=jit_compile)
    def run(x):
        y, moments = ops.batch_normalize(x, gamma, beta, EPSILON, axes=axes, mask=mask)
        return tf.gather(y, [0], axis=axes[0]), moments.mean, moments.variance

    y, mean, variance = run(x)
    exact = np.moveaxis(x, axes[0], -1).reshape(-1, shape[axes[0]]).astype(np.float64)
    deviation = np.abs(mean - exact.mean(0)).max()
    assert deviation <= 1e-6 + 2 * exact.max() * 2**-24
    np.testing.assert_allclose(variance, exact.var(0), rtol=2e-5 + deviation**2)
    np.testing.assert_allclose(np.var(y.numpy().astype(np.float64)), 1, rtol=1.1 * EPSILON)


@pytest.mark.parametrize("unbiased", [False, True])
def test_moving_statistics_of_millions_of_values_are_exact(unbiased):
    x = np.random.default_rng(0).normal(1, 2, [8, 512, 512, 4]).astype(np.float32)
    old = tf.constant([0.5, 1.0, 2.0, 4.0])
    moving = ops.MovingStatistics(old, old, 0.25, unbiased)
    _, averages = ops.batch_normalize_and_average(
        tf.constant(x), tf.ones([4]), tf.zeros([4]), EPSILON, moving
    )
    exact = x.reshape(-1, 4).astype(np.float64)
    for average, new in zip(averages, (exact.mean(0), exact.var(0, ddof=unbiased)), strict=True):
        np.testing.assert_allclose(average, 0.25 * old + 0.75 * new, rtol=1e-6)


@JIT
def test_a_mask_counts_beyond_the_integers_of_float32(jit_compile):
    """Float32 cannot count beyond 2^24, one by one."""
    x = tf.ones([2**12, 3 * 2**11, 1])
    _, moments, gradients = _run(x, [1.0], [0.0], x, jit_compile, mask=tf.ones([2**12, 1, 1]))
    assert moments.count.numpy() == gradients[2][0] == 3 * 2**23
    np.testing.assert_allclose(moments.mean, [1.0])
    np.testing.assert_array_equal(moments.variance, [0.0])


@pytest.mark.parametrize("path", ["fused", "ghost"])
def test_second_order_gradients_accept_the_gradient_of_a_gather(path):
    """The gradient of tf.gather is an IndexedSlices."""
    x = tf.random.stateless_normal([32, 32, 32, 4], (1, 2))
    kwargs = {"virtual_batch_size": 16} if path == "ghost" else {}

    def penalty(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = ops.batch_normalize(x, tf.ones([4]), tf.zeros([4]), EPSILON, **kwargs)
            rows = tf.reduce_sum(tf.gather(y, [0, 1]) ** 3)
        return tf.reduce_sum(tape.gradient(rows, x) ** 2)

    def gradient(x, function):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return tape.gradient(value, x)

    _assert_close(gradient(x, penalty), gradient(x, tf.function(penalty)), 1e-5)


@pytest.mark.parametrize("is_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("size", [4, 64])
def test_gradients_reach_given_statistics_at_any_size(size, is_graph):
    """The inference kernel, which serves large images, has no gradients of its statistics."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 32, 32, 8))
    parameters = [rng.uniform(0.5, 2, 8) for _ in range(4)]

    def gradients(dtype, function=ops.normalize):
        inputs = [tf.constant(t, dtype) for t in (x, *parameters)]
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y = tf.sin(function(*inputs, EPSILON))
            first = inner.gradient(y, inputs)
            penalty = tf.reduce_sum(first[1] * first[2])
        return [*first, *outer.gradient(penalty, inputs)]

    function = tf.function(ops.normalize) if is_graph else ops.normalize
    for actual, wanted in zip(gradients(tf.float32, function), gradients(tf.float64), strict=True):
        _assert_close(actual, wanted, 1e-4)


OUTLIERS = {
    # Batches of 149 x 149 and 35 x 35 are averaged in parts; a prime number of values is not.
    "first value": ((8, 149, 149, 2), np.s_[:1, :1, :1]),
    "first row": ((32, 35, 35, 2), np.s_[:1, :1]),
    "corners": ((32, 64, 64, 2), np.s_[:, :1, :1]),
    "prime": ((180_001, 2), np.s_[:1]),
    "masked": ((8, 149, 149, 2), np.s_[:1, :1, :1]),
    "synchronized": ((180_001, 2), np.s_[:1]),
    "ghost": ((8, 22_807, 2), np.s_[::4, :1]),
}


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("path", OUTLIERS)
def test_outliers_do_not_move_the_mean_under_xla(path, mean):
    """The value that is subtracted first may be far from all others."""
    shape, place = OUTLIERS[path]
    rng = np.random.default_rng(14)
    x = (mean + rng.normal(size=shape)).astype(np.float32)
    x[place] = mean + 1000
    kwargs, mask = dict(PATHS.get(path, {})), None
    if path == "ghost":
        kwargs["virtual_batch_size"] = 4
    if path == "masked":
        mask = (rng.random((*shape[:-1], 1)) < 0.9) | (x[..., :1] == mean + 1000)
        kwargs["mask"] = mask
    _, moments, _ = _run(tf.constant(x), np.ones(2), np.zeros(2), x, True, **kwargs)
    if path == "ghost":
        x = x.reshape(2, 4, -1, 2).transpose(1, 2, 0, 3).reshape(-1, 2, 2)
    weights = np.ones(x.shape[:-1] + (1,)) if mask is None else mask
    axes = (0,) if path == "ghost" else tuple(range(x.ndim - 1))
    exact = np.sum(x.astype(float) * weights, axes) / np.sum(weights, axes)
    stddev = np.sqrt(np.sum((x - exact) ** 2 * weights, axes) / np.sum(weights, axes))
    np.testing.assert_allclose(moments.mean, exact, rtol=0, atol=3e-6 * stddev.min() + mean * 1e-7)
    np.testing.assert_allclose(tf.sqrt(moments.variance), stddev, rtol=1e-4)


@pytest.mark.parametrize("path", ["plain", "masked"])
def test_heavy_tails_do_not_move_the_mean_under_xla(path):
    rng = np.random.default_rng(15)
    shape = (256, 251, 2)
    x = rng.lognormal(sigma=2, size=shape).astype(np.float32)
    x = -np.sort(-x, axis=0)  # the largest first
    mask = _random_mask(shape, rng) if path == "masked" else None
    y, moments, _ = _run(tf.constant(x), np.ones(2), np.zeros(2), x, True, mask=mask)
    expected = reference.batch_normalize(x, 1.0, 0.0, EPSILON, mask=mask)
    np.testing.assert_allclose(moments.mean, expected[1], rtol=1e-6)
    np.testing.assert_allclose(y, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mean, step, is_recomputed",
    [(0.0, 0.0, False), (1.0, 0.0, False), (0.1, 0.0, True), (1e6, 0.0625, True)],
)
@pytest.mark.parametrize("is_graph", [False, True])
def test_only_lost_deviations_are_recomputed(mean, step, is_recomputed, is_graph, monkeypatch):
    """A constant channel whose sum is exact costs nothing, and its variance is exactly 0.

    The values near 1e6 differ by the spacing of float32, in 1% of the places.
    """
    recompute, calls = kernels._recompute, []

    def counted(*arguments):
        tf.py_function(lambda: calls.append(1), [], [])
        return recompute(*arguments)

    monkeypatch.setattr(kernels, "_recompute", counted)
    kernels._branches.cache_clear()
    rng = np.random.default_rng(12)
    x = rng.normal(size=(16, 64, 64, 2)).astype(np.float32)
    x[..., 0] = mean + step * (rng.random(x.shape[:-1]) < 0.01)
    expected = reference.batch_normalize(x, 1.0, 0.0, EPSILON)

    def normalize(x):
        return ops.batch_normalize(x, None, None, EPSILON)

    y, moments = (tf.function(normalize) if is_graph else normalize)(x)
    kernels._branches.cache_clear()
    assert bool(calls) == is_recomputed
    np.testing.assert_allclose(moments.mean, expected[1], rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(moments.variance, expected[2], rtol=1e-5, atol=1e-14)
    np.testing.assert_allclose(y, expected[0], atol=2e-5)


def test_tiny_variances_lose_no_digits():
    rng = np.random.default_rng(6)
    x = (1 + 1e-4 * rng.normal(size=(256, 4))).astype(np.float32)
    y, moments = ops.batch_normalize(x, None, None, 1e-10)
    expected = reference.batch_normalize(x, 1.0, 0.0, 1e-10)
    # The mean is off by a few times 2**-24, which is 0.2% of the deviations.
    np.testing.assert_allclose(moments.variance, expected[2], rtol=1e-4)
    np.testing.assert_allclose(y, expected[0], atol=5e-3)


@pytest.mark.parametrize("path", [*PATHS, "masked"])
@JIT
def test_empty_and_masked_batches_produce_no_nan(path, jit_compile):
    kwargs = dict(PATHS.get(path, {}))
    x = tf.zeros([4 if path == "masked" else 0, 3, 2])
    if path == "masked":
        kwargs["mask"] = np.zeros((4, 3, 1))
    y, moments, gradients = _run(x, np.ones(2), np.zeros(2), x, jit_compile, **kwargs)
    for t in (y, *moments, *gradients):
        assert np.isfinite(t).all()
    assert y.shape == x.shape
    assert tf.reduce_sum(moments.count) == 0


@JIT
def test_masked_values_may_be_nan(jit_compile):
    """A masked NaN reaches neither the statistics nor the other gradients."""
    rng = np.random.default_rng(7)
    shape = (6, 4, 3)
    mask = _random_mask(shape, rng)
    x = np.where(mask > 0, rng.normal(size=shape), np.nan).astype(np.float32)
    dy = (rng.normal(size=shape) * mask).astype(np.float32)
    y, moments, gradients = _run(
        tf.constant(x), np.ones(3), np.zeros(3), dy, jit_compile, mask=mask
    )
    valid = np.nan_to_num(x)
    expected = reference.batch_normalize(valid, 1.0, 0.0, EPSILON, mask=mask)
    _assert_close(moments.mean, expected[1], 3e-6)
    _assert_close(tf.where(mask > 0, y, 0.0), expected[0] * mask, 3e-6)
    exact = reference.gradients(dy, valid, np.ones(3), EPSILON, mask=mask)
    _assert_close(tf.where(mask > 0, gradients[0], 0.0), exact[0] * mask, 3e-5)
    _assert_close(gradients[1], exact[1], 3e-5)


def test_a_batch_of_unknown_size_equals_one_of_static_size():
    rng = np.random.default_rng(8)
    x, dy = (rng.normal(size=(6, 3, 2)).astype(np.float32) for _ in range(2))
    for options in PATHS.values():

        @tf.function(input_signature=[tf.TensorSpec([None, None, 2])] * 2)
        def dynamic(x, dy, options=options):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y, moments = ops.batch_normalize(x, None, None, EPSILON, **options)
            return y, moments, tape.gradient(y, x, dy)

        y, moments, (dx, *_) = _run(tf.constant(x), np.ones(2), np.zeros(2), dy, **options)
        for actual, expected in zip(
            tf.nest.flatten(dynamic(x, dy)), [y, *moments, dx], strict=True
        ):
            _assert_close(actual, expected, 3e-6)


@pytest.mark.parametrize("jit_compile, is_fused", [(False, True), (True, False)])
@pytest.mark.parametrize("is_nested", [False, True])
def test_xla_gets_no_fused_kernel(jit_compile, is_fused, is_nested):
    def transform(x):
        y, _ = ops.batch_normalize(x, None, None, EPSILON)
        return ops.normalize(y, [0.0, 0.0], [1.0, 1.0], None, None, EPSILON)

    inner = tf.function(transform) if is_nested else transform
    outer = tf.function(lambda x: inner(x), jit_compile=jit_compile)
    graph = outer.get_concrete_function(tf.TensorSpec([4, 3, 3, 2])).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    assert ("FusedBatchNormV3" in {node.op for node in nodes}) == is_fused


@pytest.mark.parametrize("axes", [[1], [3], [1, 2, 3], [0, 2]])
def test_channels_move_last_and_back(axes):
    x = tf.reshape(tf.range(120), [2, 3, 4, 5])
    moved = ops.move_channels_last(x, axes)
    reduced = tuple(a for a in range(4) if a not in axes)
    expected = np.sum(x, reduced).reshape(-1)
    np.testing.assert_array_equal(np.sum(moved, tuple(range(len(reduced)))), expected)
    np.testing.assert_array_equal(ops.move_channels_back(moved, x, axes), x)


def test_small_inputs_use_ordinary_operations_and_compute_the_same_numbers(monkeypatch):
    """Below some size the kernels are slower than ordinary operations."""
    rng = np.random.default_rng(10)
    x, dy = (tf.constant(rng.normal(size=(6, 3, 2)), tf.float32) for _ in range(2))
    fused = _run(x, np.ones(2), np.zeros(2), dy)
    monkeypatch.undo()
    unfused = tf.function(lambda x: ops.batch_normalize(x, None, None, EPSILON)[0])
    graph = unfused.get_concrete_function(x).graph
    assert "FusedBatchNormV3" not in {op.type for op in graph.get_operations()}
    for actual, expected in zip(
        tf.nest.flatten(_run(x, np.ones(2), np.zeros(2), dy)), tf.nest.flatten(fused), strict=True
    ):
        _assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("threads, fused", [(1, True), (2, False)])
def test_small_inputs_use_the_kernel_if_it_has_no_other_threads_to_wake(
    threads, fused, monkeypatch
):
    monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_TRAINING", 2**16)
    monkeypatch.setattr(choice.os, "cpu_count", lambda: threads)

    @tf.function
    def transform(x):
        return ops.batch_normalize(x, None, None, 1e-3)[0]

    graph = transform.get_concrete_function(tf.TensorSpec([16, 8, 8, 16])).graph
    assert ("FusedBatchNormV3" in {op.type for op in graph.get_operations()}) == fused


@pytest.mark.parametrize(
    ("shape", "size", "uses_kernels"),
    [((1024, 64), 8, False), ((64, 32, 32, 64), 8, True), ((64, 32, 32, 64), 64, True)],
)
def test_small_ghost_batches_do_not_unroll_the_graph(shape, size, uses_kernels, monkeypatch):
    """A static batch size must not cost a call of the kernel per ghost batch."""
    monkeypatch.setattr(choice, "MIN_SIZE_TO_FUSE_TRAINING", 2**17)

    def operations(first):
        signature = [tf.TensorSpec([first, *shape[1:]])]

        @tf.function(input_signature=signature)
        def normalize(x):
            y, _ = ops.batch_normalize(x, None, None, EPSILON, virtual_batch_size=size)
            return y

        return [op.type for op in normalize.get_concrete_function().graph.get_operations()]

    static = operations(shape[0])
    assert ("FusedBatchNormV3" in static) == uses_kernels
    if not uses_kernels:
        assert len(static) <= len(operations(None))


@pytest.mark.parametrize("is_known", [False, True], ids=["unknown size", "known size"])
def test_an_empty_batch_of_large_images_produces_no_nan(is_known):
    shape = [0 if is_known else None, 512, 512, 4]
    moving = ops.MovingStatistics(tf.fill([4], 2.0), tf.fill([4], 3.0), 0.5, True)

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def run(x):
        return ops.batch_normalize_and_average(x, tf.ones([4]), tf.zeros([4]), EPSILON, moving)

    y, averages = run(tf.zeros([0, 512, 512, 4]))
    assert y.shape == (0, 512, 512, 4)
    np.testing.assert_array_equal(averages, [[2.0] * 4, [3.0] * 4])
