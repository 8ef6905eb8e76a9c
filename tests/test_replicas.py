"""Training computes the same numbers on any number of replicas, also with dropout."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras.models.dropout import Dropout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs train_on_replicas.py in a process with four replicas, and loads its results."""
    root = pathlib.Path(__file__).parent
    file = tmp_path_factory.mktemp("runs") / "runs.npz"
    process = subprocess.run(
        [sys.executable, str(root / "train_on_replicas.py"), str(file)],
        env={**os.environ, "PYTHONPATH": str(root.parent)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return np.load(file)


def variables_of(runs, replicas):
    """Returns the variables by index and name, after checking that all replicas' are equal."""
    found = {}
    for name in runs:
        prefix, _, rest = name.partition(" ")
        if prefix == str(replicas) and rest != "losses":
            for copy in runs[name]:
                np.testing.assert_array_equal(copy, runs[name][0], err_msg=name)
            found[rest] = runs[name][0]
    return found


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.job
def test_the_number_of_replicas_changes_only_rounding(runs, replicas):
    """Trains for eight steps on the same global batches with synchronized BN and dropout.

    Only the order of float32 sums differs, by about one rounding of each weight per step. On one
    replica, with eight seeds, one rounding error in each weight at the start changed variables by
    at most 8e-5 of their largest value after eight steps, and losses by 1.1e-7. The tolerances are
    eight times that, for a rounding at each of the eight steps.
    """
    np.testing.assert_allclose(runs[f"{replicas} losses"], runs["1 losses"], rtol=8.8e-7)
    one, several = variables_of(runs, 1), variables_of(runs, replicas)
    assert one.keys() == several.keys()
    kinds = {name.split()[-1].rpartition("_")[2] for name in one}
    assert {"kernel", "gamma", "mean", "variance", "momentum", "state"} <= kinds
    for name, value in one.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(
            several[name], value, atol=6.4e-4 * largest, rtol=0, err_msg=name
        )
    assert runs["1 losses"].std() > 0.1


# --- Dropout.


def apply_dropout(strategy, layer, x):
    """Returns the layer's output for the rows of x, split over the replicas, at two steps."""
    parts = np.split(x, strategy.num_replicas_in_sync)
    run = tf.function(lambda x: strategy.run(lambda x: layer(x, training=True), args=(x,)))
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )
    return [np.concatenate(strategy.experimental_local_results(run(values))) for _ in range(2)]


@pytest.mark.parametrize("noise_shape", [None, (None, 1, 4)])
def test_replicas_drop_the_same_values_as_one_replica(two_replicas, noise_shape):
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    one = keras.layers.Dropout(0.5, noise_shape, seed=3)
    with two_replicas.scope():
        ours = Dropout(0.5, noise_shape, seed=3)
        keras_own = keras.layers.Dropout(0.5, noise_shape, seed=3)
    expected = [one(x, training=True).numpy() for _ in range(2)]
    assert np.any(expected[0] != expected[1])
    np.testing.assert_array_equal(apply_dropout(two_replicas, ours, x), expected)
    # In the Keras layer both replicas have the same mask.
    first, second = np.split(apply_dropout(two_replicas, keras_own, x)[0] == 0, 2)
    np.testing.assert_array_equal(first, second)
    for copy in two_replicas.experimental_local_results(ours.seed_generator.state.value):
        np.testing.assert_array_equal(copy, one.seed_generator.state.value)


def test_the_gradient_of_dropout_is_its_mask(two_replicas):
    x = np.ones((4, 8), np.float32)
    with two_replicas.scope():
        layer = Dropout(0.5, seed=3)

    @tf.function
    def run():
        def step():
            inputs = tf.ones([2, 8])
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = layer(inputs, training=True)
            return y, tape.gradient(y, inputs)

        return two_replicas.run(step)

    y, dx = (np.concatenate(two_replicas.experimental_local_results(r)) for r in run())
    assert set(np.unique(y)) == {0, 2}
    np.testing.assert_array_equal(dx, y * x)


def test_dropout_without_replicas_or_training_equals_the_keras_layer(two_replicas):
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    ours, keras_own = Dropout(0.4, seed=1), keras.layers.Dropout(0.4, seed=1)
    for training in (True, False):
        np.testing.assert_array_equal(ours(x, training=training), keras_own(x, training=training))
    y = two_replicas.run(lambda: ours(x, training=False))
    for local in two_replicas.experimental_local_results(y):
        np.testing.assert_array_equal(local, x)


def test_a_saved_dropout_layer_loads(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Dropout(0.25, noise_shape=(None, 1), seed=7)])
    model.save(tmp_path / "model.keras")
    (layer,) = keras.saving.load_model(tmp_path / "model.keras").layers
    assert type(layer) is Dropout
    assert (layer.rate, layer.noise_shape, layer.seed) == (0.25, (None, 1), 7)
    # The same variables as the Keras layer, so that older checkpoints load.
    assert [v.shape for v in layer.variables] == [(2,)]


def test_dropout_keeps_shapes_static(two_replicas):
    """A TPU needs static shapes."""
    with two_replicas.scope():
        layer = Dropout(0.5)
    shapes = []

    @tf.function
    def run():
        two_replicas.run(lambda: shapes.append(layer(tf.zeros([3, 5]), training=True).shape))

    run()
    assert shapes == [(3, 5)] * 2
