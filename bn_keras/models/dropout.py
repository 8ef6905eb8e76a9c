"""Dropout whose masks do not depend on the number of replicas that share a batch."""

import keras
import tensorflow as tf

from bn_keras.replicas import num_replicas


@keras.saving.register_keras_serializable("bn_keras")
class Dropout(keras.layers.Dropout):
    """keras.layers.Dropout with a different mask for each row of the global batch.

    Keras draws the same numbers on every replica: two replicas of 16 examples use 16 masks twice.
    Here each replica draws numbers for the rows of all replicas and uses its part, so the global
    batch has the same masks on any number of replicas. On one replica, and outside strategy.run,
    the layer is bit-identical to Keras'.

    R replicas draw R times as many numbers. That is negligible for the 1,024 features before the
    classifier, but not between convolutions.

    Args:
      rate, noise_shape, seed: see keras.layers.Dropout.
    """

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drops a fraction `rate` of the inputs in training and scales up the others.

        Args:
          inputs: [N, ...], the rows of this replica; N is the same on all replicas.
          training: whether to drop.
        """
        replicas = num_replicas()
        if not training or self.rate == 0 or replicas == 1:
            return super().call(inputs, training=training)
        ones = tf.tile(tf.ones_like(inputs), [replicas] + [1] * (inputs.shape.rank - 1))
        factors = tf.reshape(super().call(ones, training=True), [replicas, -1, *inputs.shape[1:]])
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return inputs * tf.gather(factors, replica)
