"""Fine-tunes a pretrained network on few images, with its BN layers frozen.

python examples/fine_tuning.py photos        # photos/CLASS/*.jpg

The first run downloads the ImageNet weights of MobileNetV2 (9 MB).
"""

import sys

import keras
import tensorflow as tf

import bn_keras

SIZE = (160, 160)


def freeze_batch_norm(model: keras.Model) -> None:
    """Freezes the parameters and the statistics of all BN layers of a model."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):  # bn_keras' layer is a subclass
            layer.trainable = False


def main(
    backbone: keras.Model, train: tf.data.Dataset, num_classes: int, epochs: int = 5
) -> keras.Model:
    """Trains a new classifier, then the whole network.

    Args:
      backbone: a network without classifier, from images of -1 to 1 to pooled features.
      train: batches of images from 0 to 255 and integer labels.
      num_classes: number of classes.
      epochs: number of epochs of each of the two stages.
    """
    backbone = bn_keras.replace_batch_norm(backbone)
    rescale = keras.layers.Rescaling(1 / 127.5, offset=-1)
    classifier = keras.layers.Dense(num_classes)
    model = keras.Sequential([rescale, backbone, classifier])
    for learning_rate, whole_network in ((1e-3, False), (1e-5, True)):
        backbone.trainable = whole_network
        # Training on few images would spoil the statistics that the weights were trained with.
        freeze_batch_norm(backbone)
        model.compile(  # after every change of `trainable`
            keras.optimizers.Adam(learning_rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.fit(train, epochs=epochs, shuffle=False, verbose=2)  # the dataset shuffles
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/fine_tuning.py FOLDER, which holds CLASS/IMAGE files")
    pictures = keras.utils.image_dataset_from_directory(sys.argv[1], image_size=SIZE, batch_size=16)
    network = keras.applications.MobileNetV2((*SIZE, 3), include_top=False, pooling="avg")
    main(network, pictures, len(pictures.class_names)).save("fine_tuned.keras")
