"""Trains in a custom loop on all GPUs, with BN statistics over the global batch.

python examples/synchronized.py
"""

import keras
import numpy as np
import tensorflow as tf

from bn_keras import BatchNormalization, merge_moving_statistics


def build_model(num_features: int, num_classes: int) -> keras.Model:
    """Builds a hidden layer with synchronized BN, and a classifier."""
    inputs = keras.Input((num_features,))
    hidden = keras.layers.Dense(64, use_bias=False)(inputs)
    hidden = keras.layers.Activation("relu")(BatchNormalization(synchronized=True)(hidden))
    return keras.Model(inputs, keras.layers.Dense(num_classes)(hidden))


def main(
    strategy: tf.distribute.Strategy, x: np.ndarray, labels: np.ndarray, batch_size: int, steps: int
) -> tuple[keras.Model, list[float]]:
    """Returns the model and the loss of each step; batch_size is that of all replicas together."""
    with strategy.scope():
        model = build_model(x.shape[1], int(labels.max()) + 1)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
    data = tf.data.Dataset.from_tensor_slices((x, labels)).shuffle(len(x)).repeat()
    batches = iter(strategy.experimental_distribute_dataset(data.batch(batch_size)))

    def replica_step(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            # The optimizer sums the gradients of the replicas.
            loss = tf.reduce_sum(losses) / batch_size
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train_step() -> tf.Tensor:
        losses = strategy.run(replica_step, next(batches))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    history = [float(train_step()) for _ in range(steps)]
    # Needed before a save or an evaluation, but only by layers that are not synchronized.
    merge_moving_statistics(model, strategy)
    return model, history


if __name__ == "__main__":
    (images, digits), _ = keras.datasets.mnist.load_data()
    images = (images / 255).reshape(len(images), -1).astype("float32")
    network, losses = main(tf.distribute.MirroredStrategy(), images, digits, 256, 500)
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    network.save("synchronized.keras")
