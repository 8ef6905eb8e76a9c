"""Compares population statistics (Algorithm 2, lines 7 to 10) with the paper in float64."""

import functools
import re
import sys

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from bn_keras import BatchNormalization, estimate_population_statistics, fold_batch_norm
from bn_keras.errors import UsageError
from bn_keras.health import check_batch_norm
from bn_keras.population import PopulationEstimator, preserved_state

KERAS_BN = keras.layers.BatchNormalization
EPSILON = 1e-3


def _batches(sizes, *shape, mean=0.0):
    """Returns batches of the given sizes with different means."""
    rng = np.random.default_rng(0)
    return [
        (mean + rng.normal() + rng.uniform(1, 3, shape[-1:]) * rng.normal(size=(n, *shape))).astype(
            np.float32
        )
        for n in sizes
    ]


def _dataset(batches):
    spec = tf.TensorSpec([None, *batches[0].shape[1:]], tf.float32)
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)


def _algorithm_2(batches, axis=-1):
    """Computes E[x] and Var[x] over mini-batches from the definition."""
    moments = [reference.batch_normalize(x, 1, 0, EPSILON, axis)[1:] for x in batches if x.size]
    means, variances, counts = (np.stack(m) for m in zip(*moments, strict=True))
    several = counts.min(axis=tuple(range(1, counts.ndim))) > 1
    unbiased = reference.unbiased(variances[several], counts[several])
    return np.average(means, 0, counts), np.average(unbiased, 0, counts[several])


def _model(layers, *shape):
    return keras.Sequential([keras.Input(shape), *layers])


def _batch_norms(model):
    return [x for x in model._flatten_layers() if isinstance(x, BatchNormalization | KERAS_BN)]


def _randomize(model):
    rng = np.random.default_rng(1)
    for v in model.weights:
        v.assign(rng.uniform(0.5, 1.5, v.shape))


def _check_statistics(layer, expected, rtol=1e-5, atol=1e-6):
    mean, variance = expected
    np.testing.assert_allclose(layer.moving_mean, mean.reshape(layer.moving_mean.shape), rtol, atol)
    np.testing.assert_allclose(layer.moving_variance, variance.reshape(mean.shape), rtol)


def _local(strategy, variable):
    return [c.numpy() for c in strategy.experimental_local_results(variable.value)]


def _state(model, strategy):
    return {v.path: _local(strategy, v) for v in model.variables}


def _changed(before, after):
    return {
        path.split("/")[-1]
        for path, values in before.items()
        if not np.array_equal(values, after[path])
    }


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
@pytest.mark.parametrize("shape, axis", [((3,), -1), ((4, 5, 3), -1), ((3, 5), 1)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_one_layer_equals_the_definition(cls, shape, axis, mean):
    batches = _batches([6] * 5, *shape, mean=mean)
    model = _model([cls(axis=axis, momentum=0.9)], *shape)
    estimate_population_statistics(model, _dataset(batches), num_batches=4)
    # A float32 mean near 1e4 is accurate to its spacing, and so are the deviations from it.
    rtol, atol = (1e-5, 1e-6) if mean == 0 else (0, 1e-3)
    found = model.layers[0]
    expected_mean, expected_variance = _algorithm_2(batches[:4], axis)
    np.testing.assert_allclose(found.moving_mean, expected_mean, rtol, atol)
    np.testing.assert_allclose(found.moving_variance, expected_variance, max(rtol, atol))


def test_many_batches_lose_no_digits():
    batch = _batches([7], 3, mean=0.1)[0]
    found = []
    for times in (1, 200):
        model = _model([BatchNormalization()], 3)
        estimate_population_statistics(model, [batch] * times, times)
        found.append([w.numpy() for w in model.layers[0].non_trainable_weights])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("precision, rtol", [("float32", 1e-5), ("mixed_bfloat16", 2e-2)])
def test_the_second_layer_sees_its_training_mode_inputs(precision, rtol):
    keras.config.set_dtype_policy(precision)
    model = _model(
        [
            keras.layers.Dense(5, use_bias=False),
            BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(4),
            BatchNormalization(unbiased=False),
        ],
        3,
    )
    _randomize(model)
    batches = _batches([8] * 6, 3)
    dense_1, first, _, dense_2, second = model.layers
    kernel_1, kernel_2, bias_2 = (np.float64(w) for w in [dense_1.kernel, *dense_2.weights])
    gamma, beta = np.float64(first.gamma), np.float64(first.beta)
    hidden = [x @ kernel_1 for x in batches]
    normalized = [reference.batch_normalize(h, gamma, beta, EPSILON)[0] for h in hidden]
    deep = [np.maximum(n, 0) @ kernel_2 + bias_2 for n in normalized]
    estimate_population_statistics(model, _dataset(batches), num_batches=6)
    _check_statistics(first, _algorithm_2(hidden), rtol, atol=rtol)
    _check_statistics(second, _algorithm_2(deep), rtol)
    # In the inference network, the second layer would see other inputs.
    mean, variance = _algorithm_2(hidden)
    folded = [gamma * (h - mean) / np.sqrt(variance + EPSILON) + beta for h in hidden]
    other = _algorithm_2([np.maximum(f, 0) @ kernel_2 + bias_2 for f in folded])
    assert np.abs(other[1] / second.moving_variance - 1).min() > 2 * rtol


def test_the_mean_does_not_depend_on_the_split():
    x = np.concatenate(_batches([24], 3))
    found = []
    for sizes in ([6, 6, 6, 6], [24], [11, 3, 1, 9]):
        model = _model([BatchNormalization()], 3)
        parts = np.split(x, np.cumsum(sizes)[:-1])
        estimate_population_statistics(model, _dataset(parts), num_batches=len(parts))
        _check_statistics(model.layers[0], _algorithm_2(parts))
        found.append(model.layers[0])
    for layer in found[1:]:
        np.testing.assert_allclose(layer.moving_mean, found[0].moving_mean, atol=1e-6)


def test_the_variance_is_the_one_within_batches():
    """Shifting whole batches does not change it, unlike the variance of all values pooled."""
    batches = _batches([8] * 4, 3)
    variances = []
    for spread in (0, 10):
        model = _model([BatchNormalization()], 3)
        moved = [x + spread * i for i, x in enumerate(batches)]
        estimate_population_statistics(model, _dataset(moved), num_batches=4)
        variances.append(model.layers[0].moving_variance.numpy())
    np.testing.assert_allclose(*variances, rtol=1e-4)
    assert np.all(np.concatenate(moved).var(0) > 10 * variances[1])


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_batches_are_weighted_by_size(cls):
    """A batch of one value counts in the mean only; an empty batch does not count."""
    batches = _batches([8, 3, 1, 0, 5], 3)
    model = _model([cls()], 3)
    estimate_population_statistics(model, _dataset(batches), num_batches=5)
    _check_statistics(model.layers[0], _algorithm_2(batches))


def test_each_use_of_a_shared_layer_is_a_mini_batch():
    a, b = keras.Input([3]), keras.Input([3])
    shared = BatchNormalization()
    model = keras.Model([a, b], [shared(a), shared(b)])
    batches = _batches([6] * 8, 3)
    pairs = list(zip(batches[:4], batches[4:], strict=True))
    estimate_population_statistics(model, [((x, y), 0) for x, y in pairs], num_batches=4)
    _check_statistics(shared, _algorithm_2(batches))


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_layers_in_nested_models_and_wrappers_are_estimated(cls):
    nested = _model([cls(name="deep")], 2, 3)
    wrapped = keras.layers.TimeDistributed(cls(name="wrapped"))
    inputs = keras.Input([4, 2, 3])
    model = keras.Model(inputs, keras.layers.TimeDistributed(nested)(wrapped(inputs)))
    batches = _batches([6] * 4, 4, 2, 3)
    report = estimate_population_statistics(model, batches, num_batches=4)
    assert [row.layer.split("/")[-1] for row in report.rows] == ["wrapped", "deep"]
    steps = [x[:, t] for x in batches for t in range(4)]
    _check_statistics(wrapped.layer, _algorithm_2(steps))
    normalized = [reference.batch_normalize(x, 1, 0, EPSILON)[0] for x in steps]
    _check_statistics(nested.layers[0], _algorithm_2(normalized), atol=1e-5)


def test_layers_in_a_graph_loop_are_estimated():
    """Moments cannot leave the loop as tensors."""

    class Loop(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormalization()

        def build(self, shape):
            self.norm.build((shape[0], *shape[2:]))

        def call(self, inputs, training=None):
            def body(t, total):
                return total + self.norm(inputs[:, t], training=training)

            return keras.ops.fori_loop(0, inputs.shape[1], body, tf.zeros_like(inputs[:, 0]))

    loop = Loop()
    model = _model([loop], 4, 3)
    batches = _batches([6] * 3, 4, 3)
    estimate_population_statistics(model, batches, num_batches=3)
    _check_statistics(loop.norm, _algorithm_2([x[:, t] for x in batches for t in range(4)]))


def test_axis_lists_and_ghost_batches_are_estimated_from_labelled_images():
    layer = BatchNormalization(axis=[1, 2], virtual_batch_size=2)
    model = _model([layer], 4, 3, 5)
    batches = _batches([6] * 3, 4, 3, 5)
    labels = [np.zeros(6)] * 3
    estimate_population_statistics(model, list(zip(batches, labels, strict=True)), num_batches=3)
    ghosts = [ghost for x in batches for ghost in np.split(x, 3)]
    _check_statistics(layer, _algorithm_2(ghosts, axis=[1, 2]))


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_masked_values_are_excluded(cls):
    model = _model([keras.layers.Masking(), cls()], 4, 3)
    batches = _batches([5] * 4, 4, 3)
    kept = []
    for i, x in enumerate(batches):
        mask = np.random.default_rng(i).random(x.shape[:2]) < (0.6 if i else 0)
        x[~mask] = 0
        kept.append(x[mask])
    assert kept[0].size == 0
    estimate_population_statistics(model, batches, num_batches=4)
    # Keras divides by the count plus 1e-7; the tolerance covers it.
    _check_statistics(model.layers[1], _algorithm_2(kept))


@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
@pytest.mark.parametrize("synchronized, distributed", [(False, True), (True, False)])
def test_replicas_count_separately_unless_synchronized(
    two_replicas, cls, synchronized, distributed
):
    batches = _batches([8, 8, 5, 4], 3)
    with two_replicas.scope():
        layer = cls(synchronized=synchronized)
        model = _model([layer], 3)
    data = _dataset(batches)
    if distributed:
        data = iter(two_replicas.experimental_distribute_dataset(data))
    # None means the strategy that the model was created under.
    given = two_replicas if distributed else None
    estimate_population_statistics(model, data, num_batches=4, strategy=given)
    halves = [half for x in batches for half in np.split(x, [-(-len(x) // 2)])]
    mean, variance = _algorithm_2(batches if synchronized else halves)
    for values, expected in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        for local in _local(two_replicas, values):
            np.testing.assert_allclose(local, expected, rtol=1e-5)


def _stateful_model():
    frozen = BatchNormalization(name="frozen", trainable=False)
    return _model(
        [
            keras.layers.Dropout(0.5),
            BatchNormalization(momentum=None),
            keras.layers.Dense(3),
            BatchNormalization(renorm=True),
            frozen,
            keras.layers.SpectralNormalization(keras.layers.Dense(3)),
            KERAS_BN(),
        ],
        3,
    )


def test_nothing_else_changes(two_replicas):
    with two_replicas.scope():
        model = _stateful_model()
    _randomize(model)
    batches = _batches([8] * 3, 3)
    before = _state(model, two_replicas)
    report = estimate_population_statistics(model, _dataset(batches), 3, update=False)
    assert not _changed(before, _state(model, two_replicas))
    assert "frozen" not in str(report)
    estimate_population_statistics(model, _dataset(batches), 3)
    after = _state(model, two_replicas)
    expected = {"moving_mean", "moving_variance", "moving_stddev"}
    assert _changed(before, after) == expected
    assert not any("frozen" in p for p in before if not np.array_equal(before[p], after[p]))
    renorm = model.layers[3]
    stddev = np.sqrt(renorm.moving_variance.numpy() + EPSILON)
    np.testing.assert_allclose(renorm.moving_stddev, stddev, rtol=1e-6)


class Counters(keras.layers.Layer):
    """Counts its calls in variables that Keras does not list."""

    def __init__(self):
        super().__init__()
        self.own = tf.Variable(0, trainable=False)
        self.listed = [{"nested": (tf.Variable(0, trainable=False),)}]
        self.module = tf.Module()
        self.module.count = tf.Variable(0, trainable=False)
        self.metric = keras.metrics.Sum()

    def count(self):
        counts = self.own, self.listed[0]["nested"][0], self.module.count, self.metric.total
        return [int(count) for count in counts]

    def call(self, inputs):
        for variable in (self.own, self.listed[0]["nested"][0], self.module.count):
            variable.assign_add(1)
        self.metric.update_state(1.0)
        return inputs


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: estimate_population_statistics(model, [x], 1),
        lambda model, x: check_batch_norm(model, [x], 1),
        fold_batch_norm,
    ],
    ids=["estimate", "check", "fold"],
)
def test_state_outside_of_the_models_variables_does_not_change(function):
    counters, recurrent = Counters(), keras.layers.LSTM(2, stateful=True)
    inputs = keras.Input(batch_shape=(4, 5, 3))
    model = keras.Model(inputs, recurrent(counters(BatchNormalization()(inputs))))
    x = _batches([4], 5, 3)[0]
    model(x)
    counts, states = counters.count(), [np.array(s) for s in recurrent.states]
    assert min(counts) == 1
    function(model, x)
    assert counters.count() == counts
    np.testing.assert_array_equal(recurrent.states, states)


def test_replicas_with_the_same_new_statistics_have_the_same_weight_in_a_merge(two_replicas):
    """An estimate replaces what the replicas have seen; otherwise their counts are restored."""
    with two_replicas.scope():
        model = _model([BatchNormalization()], 3)
    data = _dataset(_batches([7, 7], 3))

    @tf.function
    def train(x):
        two_replicas.run(lambda x: model(x, training=True), args=(x,))

    for x in two_replicas.experimental_distribute_dataset(data):
        train(x)

    def counts():
        counter = model.layers[0].values_since_merge
        return [int(c) for c in two_replicas.experimental_local_results(counter)]

    assert counts() == [8, 6]
    estimate_population_statistics(model, data, 2, update=False)
    check_batch_norm(model, data, 2)
    with preserved_state(model):
        estimate_population_statistics(model, data, 2)
        assert counts() == [0, 0]
    assert counts() == [8, 6]


def test_dropout_draws_a_new_mask_for_each_batch():
    model = _model([keras.layers.Dropout(0.5, seed=1), BatchNormalization()], 50)
    ones = [np.ones([4, 50], np.float32)] * 2
    mean = []
    for num_batches in (1, 2):
        estimate_population_statistics(model, ones, num_batches)
        mean.append(model.layers[1].moving_mean.numpy())
    assert np.abs(mean[0] - mean[1]).max() > 0.2


def test_an_error_restores_the_state(two_replicas):
    with two_replicas.scope():
        model = _stateful_model()
    _randomize(model)
    for v in model.non_trainable_variables:
        if v.name == "moving_mean":
            for i, local in enumerate(two_replicas.experimental_local_results(v.value)):
                local.assign_add(tf.fill([3], float(i)))
    before = _state(model, two_replicas)

    def broken():
        yield from _batches([8] * 2, 3)
        raise RuntimeError("the disk is gone")

    data = tf.data.Dataset.from_generator(broken, output_signature=tf.TensorSpec([8, 3]))
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        estimate_population_statistics(model, data, num_batches=9)
    assert not _changed(before, _state(model, two_replicas))
    with pytest.raises(UsageError, match="ended after 2 of num_batches=3 batches"):
        estimate_population_statistics(model, _dataset(_batches([8] * 2, 3)), num_batches=3)
    assert not _changed(before, _state(model, two_replicas))
    # The layers update their moving statistics again.
    data = two_replicas.experimental_distribute_dataset(_dataset(_batches([8], 3)))
    two_replicas.run(lambda x: model(x, training=True), args=(next(iter(data)),))
    after = _state(model, two_replicas)
    for layer in _batch_norms(model):
        path = layer.moving_mean.path
        assert np.array_equal(before[path], after[path]) == (layer.name == "frozen")


@pytest.mark.parametrize(
    "sizes, bad, message",
    [
        ([1, 1], 1.0, "saw no mini-batch with two or more values .* larger batches"),
        ([0, 0], 1.0, "saw no mini-batch with two or more values"),
        ([4, 4], np.nan, "not finite"),
    ],
)
def test_too_little_or_non_finite_data_raises(sizes, bad, message):
    model = _model([BatchNormalization(), BatchNormalization()], 3)
    before = _state(model, tf.distribute.get_strategy())
    with pytest.raises(UsageError, match=message) as error:
        estimate_population_statistics(model, [bad * x for x in _batches(sizes, 3)], 2)
    assert "\n" not in str(error.value)
    assert not _changed(before, _state(model, tf.distribute.get_strategy()))


def test_an_invalid_argument_raises(two_replicas):
    with pytest.raises(UsageError, match="expected a keras.Model"):
        estimate_population_statistics(BatchNormalization(), [], 1)
    for dataset, kind in ((5, "int"), (np.zeros((4, 3)), "ndarray"), ({"x": 1}, "dict")):
        with pytest.raises(UsageError, match=f"dataset has type {kind}: expected an iterable of"):
            estimate_population_statistics(_model([BatchNormalization()], 3), dataset, 1)
    dense = _model([keras.layers.Dense(2), BatchNormalization()], 3)
    for function in (estimate_population_statistics, check_batch_norm):
        with pytest.raises(
            UsageError, match=r"does not accept a batch of the .*\(4, 5\)"
        ) as caught:
            function(dense, [np.zeros((4, 5), np.float32)], 1)
        assert "\n" not in str(caught.value)
    for number in (0, 1.5):
        with pytest.raises(UsageError, match=f"num_batches={number} .* a positive integer"):
            estimate_population_statistics(_model([BatchNormalization()], 3), [], number)
    with pytest.raises(UsageError, match="1 found, none both built and trainable"):
        estimate_population_statistics(_model([BatchNormalization(trainable=False)], 3), [], 1)
    with two_replicas.scope():
        model = _model([BatchNormalization()], 3)
    with pytest.raises(UsageError, match="a list, which 2 replicas cannot share"):
        estimate_population_statistics(model, _batches([4], 3), 1)


def test_an_error_of_a_layer_is_reported_on_one_line():
    model = _model([BatchNormalization(virtual_batch_size=5)], 3)
    for function in (estimate_population_statistics, check_batch_norm):
        with pytest.raises(UsageError, match=r"^[^\x1b\n]+: virtual_batch_size=5 does not [^\n]+$"):
            function(model, _batches([8], 3), 1)


def test_layers_that_the_model_does_not_run_keep_their_statistics():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = BatchNormalization(), BatchNormalization(name="unused")

        def build(self, shape):
            self.used.build(shape)
            self.unused.build(shape)

        def call(self, inputs, training=None):
            return self.used(inputs, training=training)

    model = Model()
    model.build((None, 3))
    report = estimate_population_statistics(model, _batches([4], 3), 1)
    assert len(report.rows) == 1 and "unused" not in report.rows[0].layer
    np.testing.assert_array_equal(model.unused.moving_variance, np.ones(3))


class Compiled(keras.Model):
    """Runs its layer in a method that is a tf.function, compiled by XLA, called by another one."""

    def __init__(self, cls):
        super().__init__()
        self.norm = cls()

    def build(self, shape):
        self.norm.build(shape)

    @tf.function
    def call(self, inputs, training=None):
        return self.train(inputs) if training else self.norm(inputs, training=False)

    @tf.function(jit_compile=True)
    def train(self, inputs):
        return self.norm(inputs, training=True)


@pytest.mark.parametrize("is_traced_before", [False, True])
@pytest.mark.parametrize("cls", [BatchNormalization, KERAS_BN])
def test_layers_inside_a_tf_function_are_estimated(cls, is_traced_before):
    batches = _batches([8] * 3, 3)
    model = Compiled(cls)
    model.build((None, 3))
    if is_traced_before:
        model(batches[0], training=True)
    estimate_population_statistics(model, batches, 3)
    _check_statistics(model.norm, _algorithm_2(batches))
    # Training updates the moving statistics again.
    model(batches[0], training=True)
    mean = 0.99 * _algorithm_2(batches)[0] + 0.01 * batches[0].mean(0)
    np.testing.assert_allclose(model.norm.moving_mean, mean, rtol=1e-5)


def test_layers_inside_a_tf_function_are_estimated_on_replicas(two_replicas):
    with two_replicas.scope():
        model = Compiled(BatchNormalization)
        model.build((None, 3))
    batches = _batches([8] * 3, 3)
    estimate_population_statistics(model, _dataset(batches), 3)
    halves = [half for x in batches for half in (x[:4], x[4:])]
    _check_statistics(model.norm, _algorithm_2(halves))


def test_a_model_that_never_trains_its_layers_raises():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)

        def call(self, inputs):
            return self.norm(inputs, training=False)

    model = Model()
    model.build((None, 3))
    with pytest.raises(UsageError, match="'model' calls no BatchNormalization in training mode"):
        estimate_population_statistics(model, _batches([8], 3), 1)


def test_a_method_replaced_on_one_layer_stays_replaced():
    model = _model([BatchNormalization()], 3)
    layer = model.layers[0]
    layer.update_moving_statistics = lambda moments, training=True: None
    layer.call = functools.partial(BatchNormalization.call, layer)
    before = dict(vars(layer))
    estimate_population_statistics(model, _batches([8], 3), 1)
    check_batch_norm(model, _batches([8], 3), 1)
    assert vars(layer)["call"] is before["call"]
    update = before["update_moving_statistics"]
    assert vars(layer)["update_moving_statistics"] is update


def test_the_report_measures_the_distance(two_replicas):
    with two_replicas.scope():
        model = _model([BatchNormalization(epsilon=0.5), BatchNormalization(name="other")], 2)
    layer = model.layers[0]
    moving_mean = np.array([[0, 1], [-3, 2]])
    moving_variance = np.array([[1, 2], [0.5, 8]])
    for i in range(2):
        for v, values in (
            (layer.moving_mean, moving_mean),
            (layer.moving_variance, moving_variance),
        ):
            two_replicas.experimental_local_results(v.value)[i].assign(values[i])
    batches = _batches([8] * 3, 2)
    report = estimate_population_statistics(model, _dataset(batches), 3)
    mean, variance = _algorithm_2([half for x in batches for half in np.split(x, 2)])
    distance = np.abs(moving_mean - mean) / np.sqrt(variance + 0.5)
    ratio = (moving_variance + 0.5) / (variance + 0.5)
    row = report.rows[0]
    assert (report.num_batches, row.layer, row.channels) == (3, layer.path, 2)
    found = [
        row.mean_distance_average,
        row.mean_distance_largest,
        row.variance_ratio_smallest,
        row.variance_ratio_average,
        row.variance_ratio_largest,
    ]
    expected = [distance.mean(), distance.max(), ratio.min(), ratio.prod() ** 0.25, ratio.max()]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # After the update the distance is zero.
    again = estimate_population_statistics(model, _dataset(batches), 3)
    assert max(row.mean_distance_largest for row in again.rows) < 1e-6
    assert max(abs(row.variance_ratio_largest - 1) for row in again.rows) < 1e-6


def test_the_report_is_an_aligned_table():
    model = _model([BatchNormalization(name="a"), BatchNormalization(name="a_longer_name")], 2)
    title, *_, above, head, first, second = str(
        estimate_population_statistics(model, _batches([8], 2), 1)
    ).splitlines()
    body = [first, second]
    assert title.endswith("num_batches=1")
    assert [line.split()[0] for line in body] == [layer.path for layer in model.layers]
    ends = [[m.end() for m in re.finditer(r"\S+", line)][1:] for line in (head, *body)]
    assert ends[0] == ends[1] == ends[2] and len(ends[0]) == 6
    # Each title ends with the last of its columns.
    assert [m.end() for m in re.finditer(r"distance|ratio", above)] == [ends[0][2], ends[0][5]]


def test_an_estimator_is_traced_once_and_starts_from_zero():
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, inputs):
            traces.append(inputs.shape)
            return inputs

    model = _model([Traced(), BatchNormalization()], 3)
    estimator = PopulationEstimator(model)
    traces.clear()
    for seed in range(3):
        batches = [x + seed for x in _batches([6] * 2, 3)]
        with preserved_state(model):
            estimator.estimate(batches, 2)
            _check_statistics(model.layers[1], _algorithm_2(batches))
        np.testing.assert_array_equal(model.layers[1].moving_mean, np.zeros(3))
    assert len(traces) == 1


@pytest.mark.parametrize("terminal, installed", [(True, True), (False, True), (True, False)])
def test_a_progress_bar_needs_a_terminal_and_tqdm(terminal, installed, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    if not installed:
        # None in sys.modules makes an import fail.
        monkeypatch.setitem(sys.modules, "tqdm", None)
    model = _model([BatchNormalization()], 3)
    estimate_population_statistics(model, _batches([4] * 2, 3), 2)
    shown = capsys.readouterr().err
    assert ("population statistics" in shown and "2/2" in shown) == (terminal and installed)
    assert (terminal and installed) or not shown
