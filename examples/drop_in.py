"""Trains a small convolutional network with bn_keras' layer on MNIST, with `fit`.

python examples/drop_in.py
"""

import keras
import numpy as np

from bn_keras import BatchNormalization  # instead of keras.layers.BatchNormalization


def build_model(input_shape: tuple[int, ...], num_classes: int) -> keras.Model:
    """Builds three blocks of convolution, BN and ReLU, and a classifier."""
    model = keras.Sequential([keras.Input(input_shape), keras.layers.Rescaling(1 / 255)])
    for filters in (16, 32, 64):
        # Without a bias: beta of the next layer replaces it.
        model.add(keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False))
        # 0.9 keeps 90% of the moving statistics at each step, which suits short runs.
        model.add(BatchNormalization(momentum=0.9))
        model.add(keras.layers.Activation("relu"))
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(num_classes))
    return model


def main(images: np.ndarray, labels: np.ndarray, epochs: int = 3) -> keras.Model:
    """Trains on nine tenths of the images, [N, height, width, channels] from 0 to 255."""
    model = build_model(images.shape[1:], int(labels.max()) + 1)
    model.compile(
        # With BN, a network tolerates higher learning rates than without.
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=64, epochs=epochs, validation_split=0.1, verbose=2)
    return model


if __name__ == "__main__":
    (images, labels), _ = keras.datasets.mnist.load_data()
    main(images[..., None], labels)
