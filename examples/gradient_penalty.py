"""Trains a WGAN-GP on points of a circle, with exact second derivatives through BN.

python examples/gradient_penalty.py
"""

import keras
import tensorflow as tf

from bn_keras import BatchNormalization


def build_network(outputs: int) -> keras.Model:
    """Builds a network on points in the plane, with two hidden layers and BN."""
    model = keras.Sequential([keras.Input((2,))])
    for _ in range(2):
        model.add(keras.layers.Dense(64, use_bias=False))
        model.add(BatchNormalization())
        model.add(keras.layers.Activation("softplus"))  # has a second derivative, unlike ReLU
    model.add(keras.layers.Dense(outputs))
    return model


def gradient_penalty(critic: keras.Model, points: tf.Tensor) -> tf.Tensor:
    """Returns the mean of (norm of the critic's gradient - 1)²."""
    with tf.GradientTape() as tape:
        tape.watch(points)
        scores = critic(points, training=True)
    return tf.reduce_mean((tf.norm(tape.gradient(scores, points), axis=1) - 1) ** 2)


def main(steps: int = 2000, batch_size: int = 128) -> tuple[keras.Model, keras.Model]:
    """Prints how far the generated points are from the circle; returns generator and critic."""
    generator, critic = networks = build_network(2), build_network(1)
    optimizers = [keras.optimizers.Adam(rate, beta_1=0.5, beta_2=0.9) for rate in (1e-4, 1e-3)]

    @tf.function
    def train_step() -> tf.Tensor:
        angles = tf.random.uniform((batch_size, 1), maxval=6.2831855)
        real = tf.concat([3 + tf.cos(angles), tf.sin(angles)], axis=1)
        share = tf.random.uniform((batch_size, 1))
        with tf.GradientTape(persistent=True) as tape:
            fake = generator(tf.random.normal((batch_size, 2)), training=True)
            scores = critic(tf.concat([real, fake], axis=0), training=True)
            distance = tf.reduce_mean(scores[:batch_size]) - tf.reduce_mean(scores[batch_size:])
            penalty = gradient_penalty(critic, share * real + (1 - share) * fake)
            losses = distance, 10 * penalty - distance
        for network, loss, optimizer in zip(networks, losses, optimizers, strict=True):
            gradients = tape.gradient(loss, network.trainable_variables)
            optimizer.apply(gradients, network.trainable_variables)
        return tf.reduce_mean(tf.abs(tf.norm(fake - [3.0, 0.0], axis=1) - 1))

    for step in range(1, steps + 1):
        error = train_step()
        if step == 1 or step % 200 == 0:  # falls to about 0.35
            print(f"step {step:,}: mean distance from the circle {error:.2f}")
    return networks


if __name__ == "__main__":
    main()
