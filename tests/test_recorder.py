"""A recorder reads an input of the network in training, and does not affect training."""

import re

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from small import small_mlp

from bn_keras import BatchNormalization
from bn_keras.distribute import make_strategy
from bn_keras.errors import UsageError
from bn_keras.models import SigmoidMLP
from bn_keras.runs.workdir import Workdir
from bn_keras.training.config import check_config, default_config
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.recorder import Recorder
from bn_keras.training.step import Trainer

EPSILON = 1e-3
PERCENTILES = (0, 15, 50, 97.5)


def images(num_batches, batch_size, *shape):
    """Batches with different means and standard deviations."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(rng.normal(size=shape), rng.uniform(1, 3, shape), (num_batches, 8, *shape))
    return drawn[:, :batch_size].astype(np.float32)


def randomize(model):
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(rng.normal(0.3, 0.5, v.shape))


def record(model, strategy, batches, layer, **options):
    """Records percentiles over NumPy batches; each replica processes its own rows."""

    def open_rows(context):
        size = batches.shape[1] // context.num_replicas_in_sync
        return tf.data.Dataset.from_tensor_slices(batches.reshape(-1, size, *batches.shape[2:]))

    distributed = strategy.distribute_datasets_from_function(open_rows)
    recorder = Recorder(model, strategy, list(distributed), layer, **options)
    return recorder()


def mlp(strategy, synchronized=False):
    with strategy.scope():
        model = SigmoidMLP("bn", 3, (5,), units=(4, 4), synchronized=synchronized)
    randomize(model)
    return model


def into_sigmoid_2(model, batch):
    """Computes the input of the second sigmoid layer by its definition, in float64."""
    x = batch.astype(np.float64)
    for i in (1, 2):
        kernel, gamma, beta = (
            v.numpy().astype(np.float64)
            for v in (*model.get_layer(f"dense_{i}").weights, *model.get_layer(f"bn_{i}").weights)
            if v.trainable
        )
        x = reference.batch_normalize(x @ kernel, gamma, beta, EPSILON)[0]
        if i == 1:
            x = 1 / (1 + np.exp(-x))
    return x


@pytest.mark.parametrize("replicas, synchronized", [(1, False), (2, False), (2, True)])
def test_percentiles_are_those_of_the_training_networks_input(replicas, synchronized):
    strategy = make_strategy("mirrored", replicas) if replicas > 1 else tf.distribute.get_strategy()
    model = mlp(strategy, synchronized)
    batches = images(3, 8, 5)
    before = [v.numpy() for v in model.variables]
    found = record(model, strategy, batches, "sigmoid_2", unit=2, percentiles=PERCENTILES)
    parts = replicas if not synchronized else 1
    mini_batches = batches.reshape(-1, 8 // parts, 5)
    expected = np.concatenate([into_sigmoid_2(model, batch)[:, 2] for batch in mini_batches])
    assert list(found) == ["record/0", "record/15", "record/50", "record/97.5"]
    np.testing.assert_allclose(
        list(found.values()), np.percentile(expected, PERCENTILES), rtol=1e-5, atol=1e-5
    )
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


class Twice(keras.layers.Layer):
    """Calls one layer on its input and, by keyword, on a hundred times its input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs) + self.layer(x=100 * inputs)


class Square(keras.layers.Layer):
    def call(self, x):
        return x * x


def test_a_feature_map_of_a_nested_layers_first_call_is_recorded_over_batch_and_locations():
    inner = keras.Sequential([BatchNormalization(), Twice(Square(name="square"))])
    model = keras.Sequential([keras.Input((3, 4, 2)), keras.layers.Dropout(0.5), inner])
    batches = images(2, 8, 3, 4, 2)
    # Each recording draws the same dropout mask: the generator keeps its state.
    states = [v.numpy() for v in model.variables]
    found = record(model, tf.distribute.get_strategy(), batches, "square", unit=1)
    again = record(model, tf.distribute.get_strategy(), batches, "square", unit=1)
    assert found == again
    for variable, value in zip(model.variables, states, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    expected = []
    for batch in batches:
        dropped = model.layers[0](batch, training=True).numpy().astype(np.float64)
        for variable, value in zip(model.variables, states, strict=True):
            variable.assign(value)
        expected.append(reference.batch_normalize(dropped, 1, 0, EPSILON)[0][..., 1])
    np.testing.assert_allclose(
        list(found.values()), np.percentile(expected, (15, 50, 85)), rtol=1e-5, atol=1e-5
    )


def test_values_that_are_not_finite_have_no_percentile():
    model = mlp(tf.distribute.get_strategy())
    model.get_layer("bn_2").beta.assign(np.full(4, np.inf))
    found = record(model, tf.distribute.get_strategy(), images(1, 8, 5), "sigmoid_2")
    assert np.isnan(list(found.values())).all()


TWO_REPLICAS = {"distribution.strategy": "mirrored", "distribution.replicas": 2}
SHORT = {"train.steps": 30, "evaluation.every_steps": 15, "checkpoint.every_steps": 10}
RECORD = {"record.layer": "sigmoid_2", "record.every_steps": 7, "record.num_examples": 100}


@pytest.mark.job
def test_recording_does_not_affect_training_and_resuming_repeats_it(tmp_path, monkeypatch):
    """On two replicas, whose moving statistics differ between the merges at the ends of loops."""
    unrecorded, recorded = tmp_path / "unrecorded", tmp_path / "recorded"
    train_and_evaluate(small_mlp(**TWO_REPLICAS, **SHORT), unrecorded)

    def lines(workdir, name):
        return [line for line in Workdir(workdir).read_metrics() if name in line]

    def killed(self, batches, num_steps, train=Trainer.train):
        result = train(self, batches, num_steps)
        if self.optimizer.iterations.numpy() > 28:
            raise KeyboardInterrupt
        return result

    config = small_mlp(**TWO_REPLICAS, **SHORT, **RECORD)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train", killed)
        train_and_evaluate(config, recorded)
    # The lines after the checkpoint of step 20 are written again.
    before = lines(recorded, "record/50")
    train_and_evaluate(config, recorded)
    after = lines(recorded, "record/50")
    assert [line["step"] for line in after] == [0, 7, 14, 21, 28]
    assert len({line["record/50"] for line in after}) == 5
    for one, other in zip(before, after, strict=True):
        assert one["record/15"] < one["record/50"] < one["record/85"]
        assert all(one[key] == other[key] for key in one if key.startswith("record/"))
    assert not lines(unrecorded, "record/50")
    # The last line contains the hash over all variables.
    assert lines(recorded, "validation/loss") == lines(unrecorded, "validation/loss")


@pytest.mark.parametrize(
    "layer, unit, message",
    [
        (
            "sigmod_2",
            0,
            "unknown record.layer 'sigmod_2': expected one of the network's 8 layers, such as"
            " sigmoid_2",
        ),
        ("zzz", 0, "network's 8 layers, such as flatten, dense_1, bn_1, sigmoid_1, dense_2"),
        ("images", 0, "record.layer is 'images', which is not called with a single tensor: name"),
        ("sigmoid_2", 4, "record.unit=4 is invalid: the input of 'sigmoid_2' has units 0 to 3"),
        ("sigmoid_2", -1, "record.unit=-1 is invalid: the input of 'sigmoid_2' has units 0 to 3"),
    ],
)
def test_an_unknown_layer_or_unit_is_refused(layer, unit, message):
    strategy = tf.distribute.get_strategy()
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        record(mlp(strategy), strategy, images(1, 8, 5), layer, unit=unit)
    assert "\n" not in str(caught.value)


def test_a_refused_layer_leaves_tensorflow_usable(two_replicas):
    model = mlp(two_replicas)
    with pytest.raises(UsageError, match="record.layer is 'images'"):
        record(model, two_replicas, images(1, 8, 5), "images")
    # After an error inside a replica, TensorFlow would refuse new variables.
    with two_replicas.scope():
        keras.Variable(0.0, synchronization="on_read", aggregation="only_first_replica")
    assert record(mlp(two_replicas), two_replicas, images(1, 8, 5), "sigmoid_2")


def test_a_run_with_an_unknown_layer_writes_nothing(tmp_path):
    with pytest.raises(UsageError, match="unknown record.layer 'sigmoid_4'"):
        train_and_evaluate(small_mlp(**{"record.layer": "sigmoid_4"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "percentiles",
            (),
            r"record.percentiles=\(\) is invalid: expected one or more numbers from 0 to 100",
        ),
        (
            "percentiles",
            (15, 101),
            r"record.percentiles=\(15, 101\) is invalid: expected one or more numbers",
        ),
        ("percentiles", ("a",), r"record.percentiles=\('a',\) is invalid: expected one or more"),
        ("every_steps", 0, "record.every_steps=0 is invalid: expected a positive integer"),
        ("num_examples", 0, "record.num_examples=0 is invalid: expected a positive integer"),
    ],
)
def test_invalid_settings_are_refused(key, value, message):
    config = default_config().copy_and_resolve_references()
    config.record[key] = value
    with pytest.raises(UsageError, match=message):
        check_config(config)
