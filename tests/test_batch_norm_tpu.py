"""A training step lowers for TPU on any machine that has TensorFlow's TPU wheel.

Without a TPU, set TPU_SKIP_MDS_QUERY=1, or the wheel looks for one for minutes.
"""

import importlib.metadata

import keras
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization

try:
    importlib.metadata.version("tensorflow-tpu")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs the wheel tensorflow-tpu (extra: tpu)", allow_module_level=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"axis": [1, 2, 3]},
        {"virtual_batch_size": 2},
        {"renorm": True},
        {"momentum": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_training_step_lowers(arguments, policy):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((16, 16, 3), batch_size=8)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = keras.layers.ReLU()(BatchNormalization(**arguments)(x))
    outputs = keras.layers.Dense(10, dtype="float32")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    trainable = len(model.trainable_variables)

    def step(images, labels, *variables):
        weights, state = variables[:trainable], variables[trainable:]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits, new_state = model.stateless_call(weights, state, images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        return loss, *tape.gradient(loss, weights), *new_state

    variables = model.trainable_variables + model.non_trainable_variables
    specs = [tf.TensorSpec([8, 16, 16, 3]), tf.TensorSpec([8], tf.int32)]
    specs += [tf.TensorSpec(v.shape, v.dtype) for v in variables]
    compiled = tf.function(step, jit_compile=True)
    hlo = compiled.experimental_get_compiler_ir(*specs)(stage="hlo", platform_name="TPU")
    assert "HloModule" in hlo
    # No dynamic shapes, which a TPU could not take.
    assert "<=" not in hlo.split("ENTRY")[1].split("\n")[0]
