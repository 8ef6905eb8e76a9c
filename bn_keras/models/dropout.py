"""Dropout whose masks don't depend on how many replicas share a batch."""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("bn_keras")
class Dropout(keras.layers.Dropout):
    """keras.layers.Dropout, but no two rows of the global batch share a mask.

    Keras' draws the same numbers on every replica: two replicas of 16 examples have 16 masks, each
    used twice. Here each replica draws for all replicas' rows and takes its own, so that a global
    batch has the masks that it has on one replica, where this is Keras' layer to the bit. Outside
    of strategy.run it is that too.

    It costs the drawing of R times as many numbers on R replicas. For the 1,024 features before
    the classifier that is next to nothing; between convolutions it would not be.

    Args:
      rate, noise_shape, seed: as there.
    """

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drops a fraction `rate` while training, and scales up the rest.

        Args:
          inputs: [N, ...], this replica's rows; N is the same on all of them.
          training: whether it does.
        """
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync if context else 1
        if not training or self.rate == 0 or replicas == 1:
            return super().call(inputs, training=training)
        ones = tf.tile(tf.ones_like(inputs), [replicas] + [1] * (inputs.shape.rank - 1))
        factors = tf.reshape(super().call(ones, training=True), [replicas, -1, *inputs.shape[1:]])
        return inputs * tf.gather(factors, context.replica_id_in_sync_group)
