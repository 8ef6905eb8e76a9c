"""A training step with each kind of BatchNormalization lowers for TPU.

See test_networks_tpu for what that proves and what it does not.
"""

import keras
import lowering
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization
from bn_keras.training.step import Trainer

pytest.importorskip("libtpu", reason="the wheel tensorflow-tpu is not installed: make tpu-check")


@pytest.mark.parametrize(
    "arguments, collectives",
    [
        ({}, 0),
        ({"axis": [1, 2, 3]}, 0),
        ({"virtual_batch_size": 2}, 0),
        ({"renorm": True}, 0),
        ({"momentum": None}, 0),
        ({"synchronized": True}, 2),
        ({"synchronized": True, "sync_group_size": 4}, 2),
        ({"synchronized": True, "virtual_batch_size": 2, "momentum": None}, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_training_step_lowers(on_a_core, policy, arguments, collectives):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((16, 16, 3), batch_size=8)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = keras.layers.ReLU()(BatchNormalization(**arguments)(x))
    outputs = keras.layers.Dense(10, dtype="float32")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    trainer = Trainer(model, keras.optimizers.SGD(0.1), tf.distribute.get_strategy(), 64)
    batch = tf.zeros([8, 16, 16, 3]), tf.zeros([8], tf.int32)
    hlo, assigned = lowering.lower(trainer.step, batch)
    lowering.check_runs_on_a_core(hlo)
    assert {id(v.value) for v in model.variables} <= {id(v) for v in assigned}
    gradients = len(model.trainable_variables)
    assert lowering.opcodes(hlo)["all-reduce"] == gradients + collectives
