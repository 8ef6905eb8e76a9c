"""MediaPipe reads the metadata of an exported TFLite file, and classifies images with it.

MediaPipe is large and not installed by `make test-peers`:
.venv-peers/bin/python -m pip install mediapipe
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization
from bn_keras.data.transforms import Preprocessing
from bn_keras.inference.network_description import NetworkDescription
from bn_keras.inference.tflite_export import write_tflite

mediapipe = pytest.importorskip("mediapipe", reason="MediaPipe is not installed")

NAMES = ("a dog", "two words", "\N{DOG FACE}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "int8"])
def test_mediapipe_classifies_with_labels_and_normalization(quantized, tmp_path):
    from mediapipe.tasks.python import core, vision

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(8, 3, strides=2), BatchNormalization(), keras.layers.ReLU()]
    layers += [keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((16, 16, 3)), *layers])
    preprocessing = Preprocessing((16, 16), "none")
    description = NetworkDescription(NAMES, (16, 16, 3), preprocessing, 1, "moving")
    examples = np.random.default_rng(0).uniform(-1, 1, (50, 16, 16, 3)).astype(np.float32)
    path = tmp_path / "net.tflite"
    write_tflite(model, description, path, examples if quantized else None)

    options = vision.ImageClassifierOptions(core.base_options.BaseOptions(str(path)))
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)
    with vision.ImageClassifier.create_from_options(options) as classifier:
        [found] = classifier.classify(image).classifications
    expected = tf.nn.softmax(model(pixels[None] / np.float32(127.5) - 1))[0].numpy()
    scores = {category.category_name: category.score for category in found.categories}
    assert scores.keys() == set(NAMES)
    np.testing.assert_allclose(
        [scores[name] for name in NAMES], expected, atol=0.03 if quantized else 1e-3
    )
