"""Runs one of two MultiWorkerMirroredStrategy processes of test_batch_norm_distributed."""

import json
import os
import sys

import numpy as np
import tensorflow as tf

_rng = np.random.default_rng(0)
DATA = (np.arange(12)[:, None, None, None] + _rng.normal(size=(12, 4, 4, 2))).astype(np.float32)


def train(strategy, data):
    """Trains three parallel synchronized branches for three steps and returns all variables."""
    # Imported after the strategy is created, which must be the first to use TensorFlow's devices.
    import keras

    from bn_keras.batch_norm import BatchNormalization

    keras.utils.set_random_seed(0)
    with strategy.scope():
        inputs = keras.Input((4, 4, 2))
        branches = [
            BatchNormalization(synchronized=True, momentum=0.5, name=f"bn_{i}")(
                keras.layers.Conv2D(3, 3, use_bias=False, name=f"conv_{i}")(inputs)
            )
            for i in range(3)
        ]
        pooled = keras.layers.GlobalMaxPooling2D()(keras.layers.Add()(branches))
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(pooled))
        optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
        optimizer.build(model.trainable_variables)

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x, training=True) - 1) ** 2) / len(DATA)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    @tf.function
    def loop(x):
        for _ in tf.range(3):
            strategy.run(step, args=(x,))

    loop(tf.constant(data))
    return {v.path: v.numpy() for v in model.variables}


def main():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    # The parts are unequal.
    np.savez(sys.argv[1], **train(strategy, DATA[:8] if index == 0 else DATA[8:]))


if __name__ == "__main__":
    main()
