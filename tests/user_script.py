"""A typed script as a user writes it: `make lint` checks its types, test_wheel.py runs it."""

import keras
import numpy as np
import tensorflow as tf

import bn_keras
from bn_keras import BatchNormalization


def build_network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            BatchNormalization(momentum=0.9),
            keras.layers.Activation("relu"),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )


def main() -> None:
    images = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    labels = np.arange(32) % 2

    network = bn_keras.replace_batch_norm(build_network())
    network.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(images, labels, batch_size=8, verbose=0)

    dataset = tf.data.Dataset.from_tensor_slices(images).batch(8)
    population = bn_keras.estimate_population_statistics(network, dataset, num_batches=4)
    layer_names: list[str] = [row.layer for row in population.rows]
    print(population, layer_names)

    health = bn_keras.check_batch_norm(network, dataset, num_batches=4)
    faults: list[str] = [finding.text for finding in health.findings if finding.is_fault]
    print(health, faults)

    folded, report = bn_keras.fold_batch_norm(network)
    largest_difference: float = report.largest_difference
    print(report, largest_difference)
    np.testing.assert_allclose(folded(images), network(images), rtol=1e-4, atol=1e-4)

    inception = bn_keras.BNInception("bn_x5", classes=10, input_shape=(32, 32, 3), stem="cifar")
    multiply_adds: int = bn_keras.count_cost(inception).multiply_adds
    print(f"{multiply_adds:,} multiply-adds")


if __name__ == "__main__":
    main()
