"""Checks groups of two of four replicas; run by test_batch_norm_distributed."""

import numpy as np
import reference
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

from bn_keras.batch_norm import BatchNormalization  # noqa: E402
from bn_keras.merge import merge_moving_statistics  # noqa: E402
from bn_keras.ops import choice  # noqa: E402


def main():
    # Runs the kernels on small inputs too.
    choice.MIN_SIZE_TO_FUSE_TRAINING = 0
    choice.MIN_CHANNELS_TO_FUSE = 1
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)])
    rng = np.random.default_rng(0)
    x = (10 * np.arange(8)[:, None] + rng.normal(size=(8, 3))).astype(np.float32)
    dy = rng.normal(size=(8, 3)).astype(np.float32)
    with strategy.scope():
        layer = BatchNormalization(
            momentum=0.5, unbiased=False, synchronized=True, sync_group_size=2
        )
        layer.build((None, 3))

    @tf.function
    def run():
        def step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            own = slice(2 * replica, 2 * replica + 2)
            inputs, upstream = tf.constant(x)[own], tf.constant(dy)[own]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = layer(inputs, training=True)
            return y, tape.gradient(y, inputs, upstream)

        return strategy.run(step)

    y, dx = (strategy.experimental_local_results(r) for r in run())
    means = strategy.experimental_local_results(layer.moving_mean.value)
    for group in (0, 1):
        part, replicas = slice(4 * group, 4 * group + 4), slice(2 * group, 2 * group + 2)
        expected, mean, _, _ = reference.batch_normalize(x[part], 1, 0, 1e-3)
        exact = reference.gradients(dy[part], x[part], 1, 1e-3)[0]
        np.testing.assert_allclose(np.concatenate(y[replicas]), expected, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(dx[replicas]), exact, atol=1e-5)
        for value in means[replicas]:
            np.testing.assert_allclose(value, 0.5 * mean, rtol=1e-5)

    # Each group has statistics of its own until they are merged.
    merge_moving_statistics(layer, strategy)
    for value in strategy.experimental_local_results(layer.moving_mean.value):
        np.testing.assert_allclose(value, 0.5 * x.mean(0), rtol=1e-5)


main()
