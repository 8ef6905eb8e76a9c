"""Several replicas with different data equal one replica with all of the data.

The last section merges the moving statistics of replicas that are not synchronized.
"""

import gc
import json
import os
import pathlib
import socket
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from bn_keras import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.merge import MergeMovingStatistics, merge_moving_statistics

EPSILON = 1e-3
GAMMA, BETA = np.array([0.5, 1.0, 2.0]), np.array([1.0, -1.0, 0.0])


pytestmark = pytest.mark.usefixtures("fuse_small_inputs")


def _data(*shape, mean=0.0, seed=0):
    rng = np.random.default_rng(seed)
    # The mean grows from example to example, so that it differs between the replicas.
    drift = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (mean + drift + 3 * rng.normal(size=shape)).astype(np.float32)


def _split(strategy, array, at):
    """Distributes array[:at] to the first of two replicas and array[at:] to the second."""
    parts = [array[:at], array[at:]]
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def _local(strategy, value):
    return [v.numpy() for v in strategy.experimental_local_results(value)]


def _build(strategy, shape=(None, None, 3), **arguments):
    with strategy.scope():
        layer = BatchNormalization(momentum=0.5, unbiased=False, **arguments)
        layer.build(shape)
        layer.gamma.assign(GAMMA)
        layer.beta.assign(BETA)
    return layer


def _train(strategy, layer, x, dy, mask=None):
    """Calls the layer once on each replica; returns y, dx, dgamma and dbeta of all replicas."""

    @tf.function(reduce_retracing=True)
    def train(x, dy, mask):
        def step(x, dy, mask):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
            return y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

        return strategy.run(step, args=(x, dy, mask))

    return [_local(strategy, r) for r in train(x, dy, mask)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at", [4, 6, 8])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_synchronized_replicas_equal_the_joined_batch(two_replicas, at, mean, masked):
    """Compares outputs, gradients and statistics for equal, unequal and empty parts."""
    x, dy = _data(8, 5, 3, mean=mean), _data(8, 5, 3, seed=1)
    mask = np.random.default_rng(2).random((8, 5)) < 0.6 if masked else None
    full = np.broadcast_to(mask[..., None], x.shape) if masked else None
    layer = _build(two_replicas, synchronized=True)
    masks = None if mask is None else _split(two_replicas, mask, at)
    y, dx, dgamma, dbeta = _train(
        two_replicas, layer, _split(two_replicas, x, at), _split(two_replicas, dy, at), masks
    )
    expected = reference.batch_normalize(x, GAMMA, BETA, EPSILON, mask=full)
    exact = reference.gradients(dy, x, GAMMA, EPSILON, mask=full)
    spacing = 8 * mean * 2**-24
    np.testing.assert_allclose(np.concatenate(y), expected[0], atol=1e-5 + spacing)
    np.testing.assert_allclose(np.concatenate(dx), exact[0], atol=1e-4 + 4 * spacing)
    # The gradients of each replica are its own; the optimizer sums them.
    np.testing.assert_allclose(sum(dgamma), exact[1], atol=1e-3 + 200 * spacing)
    np.testing.assert_allclose(sum(dbeta), exact[2], rtol=1e-4)
    np.testing.assert_allclose(dbeta[0], dy[:at].sum((0, 1)), rtol=1e-4, atol=1e-3)
    for means, variances in zip(
        _local(two_replicas, layer.moving_mean.value),
        _local(two_replicas, layer.moving_variance.value),
        strict=True,
    ):
        np.testing.assert_allclose(means, 0.5 * expected[1], rtol=1e-5, atol=1e-5)
        # The replicas' means differ by about a standard deviation, rounded to the spacing.
        np.testing.assert_allclose(variances, 0.5 + 0.5 * expected[2], rtol=1e-5 + spacing / 10)


@pytest.mark.parametrize("masked", [False, True])
def test_synchronized_keras_layers_differ_from_the_joined_batch(two_replicas, masked):
    """The Keras layer loses digits at large means, and a mask turns its synchronization off."""
    x = _data(8, 5, 3, mean=0.0 if masked else 1e4)
    mask = _split(two_replicas, np.ones((8, 5), bool), 4) if masked else None
    with two_replicas.scope():
        layer = keras.layers.BatchNormalization(synchronized=True)
        layer.build((None, None, 3))
    run = tf.function(
        lambda x, m: two_replicas.run(lambda x, m: layer(x, training=True, mask=m), args=(x, m))
    )
    y = np.concatenate(_local(two_replicas, run(_split(two_replicas, x, 4), mask)))
    expected = reference.batch_normalize(x, 1, 0, EPSILON)[0]
    assert np.abs(y - expected).max() > 0.1


def test_ghost_batches_join_across_replicas(two_replicas):
    """The k-th ghost batches of all replicas share statistics."""
    x, dy = _data(8, 5, 3), _data(8, 5, 3, seed=1)
    layer = _build(two_replicas, synchronized=True, virtual_batch_size=2)
    y, dx, dgamma, _ = _train(
        two_replicas, layer, _split(two_replicas, x, 4), _split(two_replicas, dy, 4)
    )
    y, dx = np.concatenate(y), np.concatenate(dx)
    exact_dgamma = 0
    for members in ([0, 1, 4, 5], [2, 3, 6, 7]):
        expected = reference.batch_normalize(x[members], GAMMA, BETA, EPSILON)
        exact = reference.gradients(dy[members], x[members], GAMMA, EPSILON)
        np.testing.assert_allclose(y[members], expected[0], atol=1e-5)
        np.testing.assert_allclose(dx[members], exact[0], atol=1e-4)
        exact_dgamma = exact_dgamma + exact[1]
    np.testing.assert_allclose(sum(dgamma), exact_dgamma, atol=1e-3)


def test_unequal_numbers_of_ghost_batches_raise(two_replicas):
    """TensorFlow itself would fail only at run time, with an aborted collective."""
    layer = _build(two_replicas, synchronized=True, virtual_batch_size=2)

    # AutoGraph would wrap the error in one of its own.
    @tf.function(autograph=False)
    def run(x):
        return two_replicas.run(lambda x: layer(x, training=True), args=(x,))

    with pytest.raises(UsageError, match="replicas 0 and 1 have 2 and 1 ghost batches"):
        run(_split(two_replicas, _data(6, 5, 3), 4))


def test_replicas_synchronize_if_training_is_a_tensor(two_replicas):
    x = _data(8, 5, 3)
    layer = _build(two_replicas, synchronized=True)

    @tf.function
    def run(x, training):
        return two_replicas.run(lambda x: layer(x, training=training), args=(x,))

    y = _local(two_replicas, run(_split(two_replicas, x, 3), tf.constant(True)))
    expected = reference.batch_normalize(x, GAMMA, BETA, EPSILON)[0]
    np.testing.assert_allclose(np.concatenate(y), expected, atol=1e-5)
    before = layer.moving_mean.numpy()
    run(_split(two_replicas, x, 3), tf.constant(False))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


def test_second_order_gradients_cross_replicas(two_replicas):
    """The gradients of the sum of the replicas' losses equal those of one replica with all data."""
    x = _data(8, 5, 3)
    layer = _build(two_replicas, synchronized=True)
    single = BatchNormalization()
    single.build((None, None, 3))
    single.gamma.assign(GAMMA)
    single.beta.assign(BETA)

    def penalty(layer, x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            norm = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(norm, x)

    run = tf.function(
        lambda x: two_replicas.run(lambda x: penalty(layer, x), args=(x,)), reduce_retracing=True
    )
    actual = np.concatenate(_local(two_replicas, run(_split(two_replicas, x, 5))))
    expected = penalty(single, tf.constant(x)).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_one_packed_collective_each_way_in_a_fixed_order(two_replicas, monkeypatch):
    """The collectives of two parallel layers could start in any order (tensorflow#42111)."""
    calls = []
    context_class = type(_context_of(two_replicas))
    original = context_class.all_reduce

    def counted(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append((tf.get_static_value(self.replica_id_in_sync_group), args[1], result))
        return result

    monkeypatch.setattr(context_class, "all_reduce", counted)
    layers = [_build(two_replicas, synchronized=True) for _ in range(2)]

    @tf.function
    def run(x):
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layers[0](x, training=True) * layers[1](x, training=True)
            return tape.gradient(y, x)

        return two_replicas.run(step, args=(x,))

    run.get_concrete_function(_split(two_replicas, _data(8, 5, 3), 4))
    for replica in (0, 1):
        own = [(given, result) for r, given, result in calls if r == replica]
        assert len(own) == 4  # two layers, forward and backward
        for (_, before), (given, _) in zip(own, own[1:], strict=False):
            assert before.op in _ancestors(given.op)


def test_keras_needs_more_collectives_and_uses_no_kernel(two_replicas, monkeypatch):
    context_class, calls = type(_context_of(two_replicas)), []
    original = context_class.all_reduce

    def counted(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(context_class, "all_reduce", counted)
    x = _split(two_replicas, _data(8, 5, 3), 4)
    found = {}
    for cls in (BatchNormalization, keras.layers.BatchNormalization):
        with two_replicas.scope():
            layer = cls(synchronized=True)
            layer.build((None, None, 3))
        calls.clear()
        run = tf.function(
            lambda x, layer=layer: two_replicas.run(lambda x: layer(x, training=True), args=(x,))
        )
        op_types = {op.type for op in run.get_concrete_function(x).graph.get_operations()}
        found[cls] = len(calls) / 2, "FusedBatchNormV3" in op_types
    assert found[BatchNormalization] == (1, True)
    collectives, fused = found[keras.layers.BatchNormalization]
    assert collectives > 1 and not fused


def _context_of(strategy):
    contexts = []
    strategy.run(lambda: contexts.append(tf.distribute.get_replica_context()))
    return contexts[0]


def _ancestors(op):
    seen, stack = set(), [op]
    while stack:
        op = stack.pop()
        if op not in seen:
            seen.add(op)
            stack += [t.op for t in op.inputs] + list(op.control_inputs)
    return seen


# --- Merging moving statistics.


def _model(strategy, **arguments):
    with strategy.scope():
        inner_inputs = keras.Input((3,))
        inner = keras.Model(
            inner_inputs, BatchNormalization(name="inner", **arguments)(inner_inputs)
        )
        inputs = keras.Input((3,))
        return keras.Model(inputs, BatchNormalization(name="outer", **arguments)(inner(inputs)))


def _step(strategy, model, x):
    tf.function(lambda x: strategy.run(lambda x: model(x, training=True), args=(x,)))(x)


@pytest.mark.parametrize("renorm", [False, True])
def test_merged_statistics_equal_those_of_the_mixture(two_replicas, renorm):
    model = _model(two_replicas, momentum=0.5, unbiased=False, renorm=renorm)
    x = _data(8, 3)
    _step(two_replicas, model, _split(two_replicas, x, 6))
    layers = [v for v in model._flatten_layers() if isinstance(v, BatchNormalization)]
    assert len(layers) == 2
    before = [
        [_local(two_replicas, v.value) for v in (layer.moving_mean, layer.moving_variance)]
        for layer in layers
    ]
    assert np.abs(before[0][0][0] - before[0][0][1]).max() > 1
    merge_moving_statistics(model, two_replicas)
    for layer, (means, variances) in zip(layers, before, strict=True):
        # The first replica has seen 6 examples, the second 2.
        mean, variance = reference.mixture([6, 2], np.stack(means), np.stack(variances))
        for value in _local(two_replicas, layer.moving_mean.value):
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)
        for value in _local(two_replicas, layer.moving_variance.value):
            np.testing.assert_allclose(value, variance, rtol=1e-5)
        if renorm:
            np.testing.assert_allclose(
                layer.moving_stddev.value, np.sqrt(variance + EPSILON), rtol=1e-5
            )
    # Merging equal statistics does not change them, bit for bit.
    merged = [_local(two_replicas, v.value) for v in model.variables]
    merge_moving_statistics(model, two_replicas)
    for a, b in zip(merged, [_local(two_replicas, v.value) for v in model.variables], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_replica_without_data_has_no_weight(two_replicas):
    model = _model(two_replicas, momentum=0.5)
    x = _data(8, 3)
    _step(two_replicas, model, _split(two_replicas, x, 8))
    expected = _local(two_replicas, model.get_layer("outer").moving_variance.value)[0]
    assert np.isfinite(expected).all()
    merge_moving_statistics(model, two_replicas)
    for value in _local(two_replicas, model.get_layer("outer").moving_variance.value):
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_one_collective_merges_a_model_and_is_traced_once(two_replicas, monkeypatch):
    model = _model(two_replicas, momentum=None)
    _step(two_replicas, model, _split(two_replicas, _data(8, 3), 6))
    context_class, calls = type(_context_of(two_replicas)), []
    original = context_class.all_reduce
    monkeypatch.setattr(
        context_class,
        "all_reduce",
        lambda self, *args, **kw: calls.append(self) or original(self, *args, **kw),
    )
    for _ in range(3):
        merge_moving_statistics(model, two_replicas)
    assert len(calls) == 2  # one for each replica's trace
    assert _local(two_replicas, model.get_layer("outer").num_updates.value) == [1, 1]


def test_merging_uses_the_strategy_that_the_model_remembers(two_replicas):
    model = _model(two_replicas, momentum=0.5)
    _step(two_replicas, model, _split(two_replicas, _data(8, 3), 6))
    mean = model.get_layer("outer").moving_mean.value
    assert not np.array_equal(*_local(two_replicas, mean))
    merge_moving_statistics(model)
    np.testing.assert_array_equal(*_local(two_replicas, mean))
    with pytest.raises(UsageError, match="another strategy, a MirroredStrategy with 2 replicas"):
        merge_moving_statistics(model, tf.distribute.get_strategy())
    with pytest.raises(UsageError, match="model=None is invalid"):
        merge_moving_statistics(None)


def test_merging_does_not_keep_the_merged_alive(two_replicas):
    for build in (_build, lambda strategy: _model(strategy, momentum=0.5)):
        merged = build(two_replicas)
        merge_moving_statistics(merged)
        merge_moving_statistics(merged)
        reference = weakref.ref(merged)
        del merged
        gc.collect()
        assert reference() is None


def test_a_model_without_an_input_shape_trains_on_replicas(two_replicas):
    """Its variables are created in the graph of the first step."""
    with two_replicas.scope():
        model = keras.Sequential([BatchNormalization(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(_data(8, 3), np.zeros((8, 1)), batch_size=8, verbose=0)
    counter = model.layers[0].values_since_merge
    assert _local(two_replicas, counter) == [4, 4]


def test_a_model_that_creates_its_variables_in_a_step_trains_on_replicas(two_replicas):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormalization()

        def call(self, inputs, training=None):
            return self.norm(inputs, training=training)

    with two_replicas.scope():
        model = Model()
    _step(two_replicas, model, _split(two_replicas, _data(8, 3), 6))
    assert _local(two_replicas, model.norm.values_since_merge) == [6, 2]
    merge_moving_statistics(model)


def test_training_mode_outside_of_a_step_updates_every_replica(two_replicas):
    layer = _build(two_replicas, (None, 3))
    x = _data(8, 3)
    with two_replicas.scope():
        layer(x, training=True)
    for mean in _local(two_replicas, layer.moving_mean.value):
        np.testing.assert_allclose(mean, x.mean(0) / 2, rtol=1e-5)
    merge_moving_statistics(layer)


def test_merging_one_replica_or_synchronized_layers_changes_nothing(two_replicas):
    single = _model(tf.distribute.get_strategy())
    merge_moving_statistics(single)
    model = _model(two_replicas, synchronized=True)
    x = _data(8, 3)
    _step(two_replicas, model, _split(two_replicas, x, 5))
    before = [_local(two_replicas, v.value) for v in model.variables]
    for first, second in before:
        np.testing.assert_array_equal(first, second)
    merge_moving_statistics(model, two_replicas)
    for a, b in zip(before, [_local(two_replicas, v.value) for v in model.variables], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_callback_merges_in_fit(two_replicas):
    """With nine examples in batches of eight, one replica has no example in the last batch."""
    x, y = _data(9, 3), np.zeros((9, 3), np.float32)
    for cls, merged in ((BatchNormalization, True), (keras.layers.BatchNormalization, False)):
        with two_replicas.scope():
            model = keras.Sequential([keras.Input((3,)), cls()])
            model.compile("sgd", "mse")
        callbacks = [MergeMovingStatistics()] if merged else []
        model.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=callbacks)
        first, second = _local(two_replicas, model.layers[0].moving_variance.value)
        assert (np.isfinite(second).all() and np.array_equal(first, second)) == merged


def test_a_group_size_that_does_not_divide_the_replicas_raises(two_replicas):
    layer = _build(two_replicas, synchronized=True, sync_group_size=3)
    x = _split(two_replicas, _data(4, 5, 3), 2)
    with pytest.raises(UsageError, match="sync_group_size=3 does not divide the 2 replicas"):
        two_replicas.run(lambda x: layer(x, training=True), args=(x,))


# --- Four replicas, and two workers, in processes of their own.


def _start_script(name, environment, *arguments):
    root = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(root.parent), str(root)])
    return subprocess.Popen(
        [sys.executable, str(root / name), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(processes):
    try:
        outputs = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
    return outputs


@pytest.mark.job
def test_groups_of_two_of_four_replicas_share_statistics():
    _wait_for([_start_script("four_replicas.py", {})])


@pytest.mark.job
def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("localhost", 0))
        cluster = {"worker": [f"localhost:{s.getsockname()[1]}" for s in (a, b)]}
    files = [str(tmp_path / f"{index}.npz") for index in (0, 1)]
    _wait_for(
        [
            _start_script(
                "two_workers.py",
                {
                    "TF_CONFIG": json.dumps(
                        {"cluster": cluster, "task": {"type": "worker", "index": i}}
                    )
                },
                files[i],
            )
            for i in (0, 1)
        ]
    )
    workers = [np.load(f) for f in files]
    from two_workers import DATA, train

    expected = train(tf.distribute.get_strategy(), DATA)
    for worker in workers:
        for name, value in expected.items():
            np.testing.assert_allclose(worker[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    for name in expected:
        np.testing.assert_array_equal(workers[0][name], workers[1][name])
