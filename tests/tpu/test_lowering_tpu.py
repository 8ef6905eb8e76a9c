"""Tests of `lowering`, which the other tests here rely on."""

import keras
import lowering
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import SigmoidMLP
from bn_keras.training.step import Trainer


def test_a_step_without_variables_equals_the_step():
    model = SigmoidMLP(classes=4, input_shape=(6,), units=(5, 5))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    trainer = Trainer(model, optimizer, tf.distribute.get_strategy(), 8, l2=1e-3, ema=0.9)
    images = tf.constant(np.random.default_rng(0).normal(size=(8, 6)), tf.float32)
    batch = images, tf.constant([0, 1, 2, 3] * 2)
    pure, inputs, assigned = lowering.without_variables(trainer.step, batch)
    given = [tf.convert_to_tensor(value) for value in (*batch, *inputs[2:])]
    loss, hits, *values = tf.function(pure)(*given)
    expected = tf.function(trainer.step)(*batch)
    np.testing.assert_allclose([loss, hits], expected, rtol=1e-6)
    moving = [v for v in trainer.variables if v is not optimizer.learning_rate]
    assert {id(v) for v in assigned} == {id(v.value) for v in moving}
    for variable, value in zip(assigned, values, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-6, atol=1e-7)


def test_an_unsupported_operation_on_a_variable_raises():
    variable = tf.Variable(tf.zeros([3, 2]))
    with pytest.raises(NotImplementedError, match="ResourceGather"):
        lowering.without_variables(lambda: tf.gather(variable, [0, 1]))


def test_a_size_that_depends_on_values_is_found():
    pytest.importorskip(
        "libtpu", reason="the wheel tensorflow-tpu is not installed: make tpu-check"
    )
    hlo, _ = lowering.lower(lambda x: 2 * tf.boolean_mask(x, x > 0)[:-1], [tf.zeros([8])])
    with pytest.raises(AssertionError, match="<=8"):
        lowering.check_runs_on_a_core(hlo)


def test_an_operation_of_the_host_does_not_lower():
    pytest.importorskip(
        "libtpu", reason="the wheel tensorflow-tpu is not installed: make tpu-check"
    )
    on_host = lambda x: tf.py_function(np.sort, [x], tf.float32)  # noqa: E731
    with pytest.raises(ValueError, match="EagerPyFunc"):
        lowering.lower(on_host, [tf.zeros([8])])
