"""Converts a network of keras.applications, folds its BN layers, and exports it.

python examples/convert_and_export.py
"""

import pathlib

import keras
import numpy as np
import tensorflow as tf

import bn_keras


def main(model: keras.Model, folder: str = "served") -> keras.Model:
    """Writes FOLDER/network.keras and a SavedModel in FOLDER/1; returns the folded network."""
    # The same weights and outputs, with bn_keras' layer, which trains faster.
    model = bn_keras.replace_batch_norm(model)

    # For inference, BN is part of the convolutions' weights.
    folded, report = bn_keras.fold_batch_norm(model)
    print(report)

    images = np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype("float32")
    np.testing.assert_allclose(folded(images), model(images), rtol=1e-3, atol=1e-3)

    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    folded.save(path / "network.keras")  # for Keras, with or without bn_keras
    folded.export(path / "1", verbose=False)  # for TensorFlow Serving

    served = tf.saved_model.load(str(path / "1"))
    np.testing.assert_allclose(served.serve(images), folded(images), rtol=1e-3, atol=1e-3)
    print(f"written to {path}")
    return folded


if __name__ == "__main__":
    main(keras.applications.MobileNetV2(weights="imagenet"))
