"""The scripts in examples/ do what they say, at a small size."""

import json
import pathlib
import runpy
import sys
import threading
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
MAX_LINES = 60


def load(name):
    """Returns the names that a script defines; its last block, which needs data, does not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def images_of_two_classes(count=64, side=8, channels=1):
    """Returns dark and bright images from 0 to 255, and their labels."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).uniform(0, 100, size=(count, side, side, channels))
    return (noise + 120 * labels[:, None, None, None]).astype("float32"), labels


def batch_norm_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, BatchNormalization)]


SCRIPTS = sorted({*EXAMPLES.glob("*.py")} - {EXAMPLES / "tour.py"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_to_copy_is_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_drop_in_learns():
    images, labels = images_of_two_classes(count=320)
    model = load("drop_in")["main"](images, labels, epochs=4)
    assert len(batch_norm_layers(model)) == 3
    assert np.mean(np.argmax(model.predict(images, verbose=0), axis=1) == labels) > 0.9


def test_convert_and_export_writes_two_files_of_the_same_network(tmp_path):
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False)(images)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    folded = load("convert_and_export")["main"](keras.Model(images, x), str(tmp_path))
    assert not batch_norm_layers(folded)
    read = keras.saving.load_model(tmp_path / "network.keras")
    example = np.ones((1, 8, 8, 3), "float32")
    np.testing.assert_allclose(read(example), folded(example), rtol=1e-6)
    assert (tmp_path / "1" / "saved_model.pb").is_file()


def test_fine_tuning_keeps_the_statistics_and_changes_the_convolutions():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = keras.layers.BatchNormalization(moving_mean_initializer="ones")(x)
    backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    images, labels = images_of_two_classes(channels=3)
    train = tf.data.Dataset.from_tensor_slices((images, labels)).batch(16)
    model = load("fine_tuning")["main"](backbone, train, num_classes=2, epochs=1)
    [layer] = batch_norm_layers(model)
    np.testing.assert_array_equal(layer.moving_mean, np.ones(4))
    np.testing.assert_array_equal(layer.gamma, np.ones(4))
    trained, kernel = (m.get_layer(index=1).kernel for m in (model.layers[1], backbone))
    assert np.abs(trained - kernel).max() > 0


@pytest.mark.parametrize("name", ["fine_tuning", "serve"])
def test_a_script_without_its_argument_prints_its_usage(name, monkeypatch):
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit, match=f"usage: python examples/{name}.py FOLDER"):
        runpy.run_path(path, run_name="__main__")


class Brightness(tf.Module):
    """Has the signature of an exported network: class "1" is as probable as the image is bright."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="encoded")])
    def classify(self, encoded):
        image = tf.io.decode_image(encoded[0], channels=1, expand_animations=False)
        bright = tf.reduce_mean(tf.cast(image, tf.float32)) / 255
        class_name = tf.where(bright > 0.5, "1", "0")[None]
        return {"class_name": class_name, "probabilities": tf.stack([1 - bright, bright])[None]}


def test_the_server_answers_images_and_refuses_other_files(tmp_path):
    network = Brightness()
    tf.saved_model.save(network, str(tmp_path), {"serving_default": network.classify})
    bright = tf.io.encode_png(np.full((2, 2, 1), 204, np.uint8)).numpy()
    with load("serve")["make_server"](str(tmp_path), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}"
        for _ in range(2):  # a refused file does not end the server
            with urllib.request.urlopen(address, bright) as answer:
                assert json.load(answer) == {"class": "1", "probability": pytest.approx(0.8)}
            with pytest.raises(urllib.error.HTTPError, match="400: not an image"):
                urllib.request.urlopen(address, b"no image")
            for length in ("-1", "many"):
                request = urllib.request.Request(address, bright, {"Content-Length": length})
                with pytest.raises(urllib.error.HTTPError, match="400: not an image"):
                    urllib.request.urlopen(request, timeout=60)
        server.shutdown()


def in_float64(build):
    """Builds a model whose inputs and layers are float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        return build()
    finally:
        keras.config.set_floatx("float32")


@pytest.fixture
def eager():
    """Runs tf.functions eagerly: two steps take less time than tracing one."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def test_gradient_penalty_has_exact_second_derivatives(eager):
    example = load("gradient_penalty")
    generator, critic = example["main"](steps=2, batch_size=4)
    assert len(batch_norm_layers(generator)) == len(batch_norm_layers(critic)) == 2

    # The derivative of the penalty along a direction of the first kernel, by finite differences.
    critic = in_float64(lambda: example["build_network"](1))
    rng = np.random.default_rng(0)
    points = tf.constant(rng.normal(size=(16, 2)))
    kernel = critic.trainable_variables[0]
    direction = rng.normal(size=kernel.shape)
    with tf.GradientTape() as tape:
        penalty = example["gradient_penalty"](critic, points)
    slope = np.sum(tape.gradient(penalty, kernel.value) * direction)
    values = []
    for step in (1e-5, -2e-5):
        kernel.assign_add(step * direction)
        values.append(float(example["gradient_penalty"](critic, points)))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_synchronized_equals_one_replica(two_replicas):
    main = load("synchronized")["main"]
    images, labels = images_of_two_classes(side=4)
    x = images.reshape(len(images), -1) / 255
    keras.utils.set_random_seed(0)
    # A batch has all examples, so that their order does not matter.
    model, losses = main(two_replicas, x, labels, batch_size=64, steps=8)
    keras.utils.set_random_seed(0)
    alone, losses_alone = main(tf.distribute.get_strategy(), x, labels, batch_size=64, steps=8)
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-3)
    assert losses[-1] < losses[0] / 2
    [layer], [layer_alone] = batch_norm_layers(model), batch_norm_layers(alone)
    np.testing.assert_allclose(layer.moving_variance, layer_alone.moving_variance, rtol=1e-3)
