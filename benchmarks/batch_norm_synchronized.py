"""Compares synchronized layers on two CPU replicas with Keras and without synchronization.

python benchmarks/batch_norm_synchronized.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from _timing import compare, print_table

from bn_keras import BatchNormalization

# Shapes of each replica.
SHAPES = [(16, 112, 112, 64), (16, 28, 28, 256), (16, 7, 7, 1024)]


def _training(strategy, cls, shape, synchronized):
    with strategy.scope():
        layer = cls(synchronized=synchronized)
        layer.build(shape)
    x, dy = (
        strategy.experimental_distribute_values_from_function(lambda _: tf.random.normal(shape))
        for _ in range(2)
    )

    @tf.function
    def run(x, dy):
        def step(x, dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            variables = [v.value for v in layer.trainable_variables]
            return y, tape.gradient(y, [x, *variables], dy)

        return strategy.run(step, args=(x, dy))

    return lambda: run(x, dy)


def main():
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    ours, theirs = BatchNormalization, keras.layers.BatchNormalization
    rows = {
        "×".join(map(str, shape)): compare(
            {
                "bn_keras": _training(strategy, ours, shape, synchronized=True),
                "Keras": _training(strategy, theirs, shape, synchronized=True),
                "bn_keras, unsynchronized": _training(strategy, ours, shape, synchronized=False),
            }
        )
        for shape in SHAPES
    }
    ratios = {
        "speedup over Keras": ("Keras", "bn_keras"),
        "bn_keras/unsynchronized": ("bn_keras", "bn_keras, unsynchronized"),
    }
    print_table("Two CPU replicas, forward and backward, float32", rows, ratios)


if __name__ == "__main__":
    main()
