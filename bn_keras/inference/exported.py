"""Loads exported networks, to evaluate them or to serve them.

Serving needs the layer library and TensorFlow alone, not the extra "train".
"""

import os
import pathlib
import threading
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from bn_keras.data.decode_errors import READ_ERRORS, explain
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError
from bn_keras.inference.network_description import FILE_NAME, NetworkDescription
from bn_keras.inference.onnx_export import ONNXNetwork, check_onnx
from bn_keras.inference.tflite_export import TFLiteNetwork
from bn_keras.inference.tflite_metadata import read_description
from bn_keras.storage import exists, is_folder, literal_path, local_copy, local_folder, read
from bn_keras.text import first_line

# Folder of a SavedModel for files that TensorFlow does not read.
EXTRA_ASSETS = "assets.extra"


class ExportedNetwork(NamedTuple):
    """A network exported by `export_workdir`, or any other Keras model for images.

    Attributes:
      model: network from images float32 [N, *input_shape] to logits [N, classes]; those of a model
        that returns probabilities are their logarithms.
      input_shape: (height, width, channels).
      num_classes: size of its output.
      class_names: name of each class, in order; None if the file has none.
      preprocessing: turns an image into the network's input; None if the file does not describe it.
    """

    model: keras.Model
    input_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing | None

    def predict(self, files: Sequence[bytes]) -> np.ndarray:
        """Returns the probabilities of each class, float32 [N, classes], for image files.

        Args:
          files: contents of N JPEG, PNG, BMP, GIF or WebP files, of any size.

        Raises:
          UsageError: a file cannot be decoded, or the network's preprocessing is not known.
        """
        if not all(isinstance(file, bytes) for file in files):
            raise UsageError(
                "files are invalid: expected a list of the contents of image files, such as"
                " [open('image.jpg', 'rb').read()]"
            )
        if not files:
            return np.zeros([0, self.num_classes], np.float32)
        if self.preprocessing is None:
            raise UsageError(
                "the network's file does not describe its preprocessing: export it again from its"
                " run, or call its model with preprocessed images"
            )
        images = np.zeros([len(files), *self.input_shape], np.float32)
        for number, encoded in enumerate(files):
            try:
                images[number] = self.preprocessing.process_encoded(
                    tf.constant(encoded), None, self.input_shape[-1]
                )
            except READ_ERRORS as error:
                reason = explain(encoded, error)
                raise UsageError(f"image {number} cannot be decoded: {reason}") from None
        return tf.nn.softmax(self.model(images, training=False)).numpy()


def load_exported(
    path: str | os.PathLike, strategy: tf.distribute.Strategy | None = None
) -> ExportedNetwork:
    """Loads an export of `export_workdir`: a .keras, TFLite or ONNX file, or a SavedModel.

    A TFLite or ONNX file is executed on the CPU, by its own runtime.

    Args:
      path: path of the file, or of the SavedModel's folder, local or in a bucket.
      strategy: strategy in whose scope the model is made; None uses TensorFlow's default, one
        device.

    Raises:
      UsageError: no such file, a damaged one, a network that does not map images to classes, or an
        ONNX file without the extra "onnx".
      StorageError: the file is in a bucket that does not answer, or permissions are missing.
    """
    path = os.fspath(path)
    is_saved_model = exists(os.path.join(path, "saved_model.pb"))
    suffix = os.path.splitext(path)[1]
    is_file = suffix in _READERS and exists(path) and not is_folder(path)
    if not (is_saved_model or is_file):
        raise UsageError(
            f"{path} is not an exported network: expected a {', '.join(_READERS)} file or the"
            " folder of a SavedModel"
        )
    if suffix == ".onnx" and not is_saved_model:
        check_onnx()
    strategy = strategy or tf.distribute.get_strategy()
    # TensorFlow's loader reports an outage of a bucket like a damaged file; a copy fails before.
    copying = local_folder if is_saved_model else local_copy
    read_network = _read_saved_model if is_saved_model else _READERS[suffix]
    with copying(path) as copied:
        try:
            with strategy.scope():
                model, description = read_network(copied)
                if len(model.inputs) == len(model.outputs) == 1:
                    # A foreign model may return its only output in a list or a dict.
                    model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
        # Keras and the runtimes raise errors of many types for a damaged or foreign file.
        except Exception as error:
            raise UsageError(f"{path} cannot be read as a network: {first_line(error)}") from error
    shapes = [tensor.shape for tensor in (*model.inputs, *model.outputs)]
    if [len(shape) for shape in shapes] != [4, 2] or None in shapes[0][1:]:
        raise UsageError(
            f"{path} is a network with the shapes {', '.join(map(str, shapes))}: expected images"
            " [N, height, width, channels] of one size and one output [N, classes]"
        )
    if not keras.backend.is_float_dtype(model.inputs[0].dtype):
        raise UsageError(
            f"{path} is a network of {model.inputs[0].dtype} images, but the preprocessed images"
            " are floating-point numbers: give its input the dtype float32"
        )
    images, outputs = shapes
    names, preprocessing = None, None
    if description:
        names, preprocessing = description.class_names, description.preprocessing
    elif _returns_probabilities(model):
        with strategy.scope():
            model = _with_logits(model)
    return ExportedNetwork(model, tuple(images[1:]), outputs[1], names, preprocessing)


def _returns_probabilities(model: keras.Model) -> bool:
    """Returns whether the outputs for a few images are probabilities.

    The structure of a foreign model does not show this: a softmax may be in a nested model, in an
    operation, or before the mean of several outputs.
    """
    batch_size, *shape = model.inputs[0].shape
    batch_size = batch_size or 4
    noise = np.random.default_rng(0).uniform(size=(batch_size, *shape))
    # The range of the model's input is not known.
    scales = np.geomspace(255, 1, batch_size).reshape(-1, 1, 1, 1)
    call = tf.function(lambda images: model(images, training=False), autograph=False)
    outputs = tf.cast(call(tf.cast(scales * noise, tf.float32)), tf.float32).numpy()
    # The tolerance is that of bfloat16.
    return bool(np.all(outputs >= 0) and np.allclose(outputs.sum(axis=1), 1, rtol=0, atol=0.01))


def _with_logits(model: keras.Model) -> keras.Model:
    """Returns a model of the logarithms of a model's probabilities."""
    images = keras.Input(batch_shape=model.inputs[0].shape)
    probabilities = keras.ops.cast(model(images), "float32")
    # A probability that underflows to 0 would make the mean loss of all images infinite.
    tiny = float(np.finfo(np.float32).tiny)
    return keras.Model(images, keras.ops.log(keras.ops.maximum(probabilities, tiny)))


_Read = tuple[keras.Model, NetworkDescription | None]


def _read_keras(path: pathlib.Path) -> _Read:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        text = archive.read(FILE_NAME) if FILE_NAME in names else None
    description = NetworkDescription.from_json(text) if text else None
    return keras.saving.load_model(path, compile=False), description


def _read_saved_model(path: pathlib.Path) -> _Read:
    with literal_path(path) as folder:
        signatures = tf.saved_model.load(folder).signatures
        _, arguments = signatures["images"].structured_input_signature
        network = keras.layers.TFSMLayer(folder, call_endpoint="images")
    images = keras.Input(arguments["images"].shape[1:])
    text = read(path / EXTRA_ASSETS / FILE_NAME)
    description = NetworkDescription.from_json(text) if text else None
    return keras.Model(images, network(images)["logits"]), description


def _read_tflite(path: pathlib.Path) -> _Read:
    content = path.read_bytes()
    network = TFLiteNetwork(content)
    model = _as_model(network.logits, network.input_shape, network.num_classes)
    return model, read_description(content)


def _read_onnx(path: pathlib.Path) -> _Read:
    network = ONNXNetwork(path.read_bytes())
    model = _as_model(lambda x: network(x)[0], network.input_shape, network.num_classes)
    return model, network.description


_READERS: dict[str, Callable[[pathlib.Path], _Read]] = {
    ".keras": _read_keras,
    ".tflite": _read_tflite,
    ".onnx": _read_onnx,
}


def _as_model(
    function: Callable[[np.ndarray], np.ndarray], input_shape: Sequence[int], num_classes: int
) -> keras.Model:
    """Returns a Keras model that calls a function from images to logits."""
    images = keras.Input(tuple(input_shape))
    return keras.Model(images, _FunctionLayer(function, num_classes)(images))


class _FunctionLayer(keras.layers.Layer):
    """Calls a function of NumPy arrays, from images to [N, classes], one call at a time."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], num_classes: int) -> None:
        super().__init__(dtype="float32")
        self._function = function
        self._num_classes = num_classes
        self._one_call = threading.Lock()

    def call(self, images: tf.Tensor) -> tf.Tensor:
        outputs = tf.numpy_function(self._call_alone, [images], tf.float32)
        return tf.ensure_shape(outputs, [images.shape[0], self._num_classes])

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, int]:
        return input_shape[0], self._num_classes

    def _call_alone(self, images: np.ndarray) -> np.ndarray:
        # Replicas run in threads; the runtimes of TFLite are not safe to be shared by threads.
        with self._one_call:
            return self._function(images)
