"""Networks as TFLite files: conversion, int8 quantization, and execution by the interpreter."""

import contextlib
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from bn_keras.cores import num_usable_cores
from bn_keras.inference.network_description import NetworkDescription
from bn_keras.inference.tflite_metadata import add_metadata

_SIGNATURE = "serving_default"


def write_tflite(
    model: keras.Model,
    description: NetworkDescription,
    path: pathlib.Path,
    examples: np.ndarray | None = None,
) -> None:
    """Writes a TFLite file with the signature "serving_default": `images` to `probabilities`.

    Quantization is full-integer: weights, activations, input and output have 8 bits. The range of
    the input is that of the network and not that of the examples, so that the uint8 input is the
    value of a pixel, within half a level.

    Args:
      model: network from images to logits, in float32.
      description: description of the network, which is added as metadata.
      path: path of the file.
      examples: float32 [n, H, W, C], images from which the ranges of the activations are found, for
        int8 quantization; None for float32.
    """
    low, high = description.input_range

    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        if examples is not None:
            images = tf.quantization.fake_quant_with_min_max_args(images, low, high)
        return {"probabilities": tf.nn.softmax(model(images, training=False))}

    archive = keras.export.ExportArchive()
    archive.track(model)
    images = tf.TensorSpec(model.inputs[0].shape, tf.float32, "images")
    archive.add_endpoint(_SIGNATURE, predict, [images])
    # Variables of the model do not reach a converter that starts from the function.
    with tempfile.TemporaryDirectory(prefix="bn_keras_") as folder, _silenced_stderr():
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if examples is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ({"images": x[None]} for x in examples)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        with _accepting_interpreter():
            content = converter.convert()
    path.write_bytes(add_metadata(content, description))


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Drops what the converter prints from C++, without a log level."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _accepting_interpreter() -> Iterator[None]:
    """Drops the warning that TensorFlow's interpreter will move to another package."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated")
        yield


class TFLiteNetwork:
    """A TFLite file of `write_tflite`, executed by TensorFlow's interpreter.

    Args:
      content: the file.

    Attributes:
      input_shape: (height, width, channels).
      num_classes: size of its output.
    """

    def __init__(self, content: bytes) -> None:
        # The default delegate logs to standard error.
        resolver = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with _accepting_interpreter():
            interpreter = tf.lite.Interpreter(
                model_content=content,
                experimental_op_resolver_type=resolver,
                num_threads=num_usable_cores(),
            )
        self._run = interpreter.get_signature_runner(_SIGNATURE)
        self._input = self._run.get_input_details()["images"]
        self._output = self._run.get_output_details()["probabilities"]
        self.input_shape = tuple(self._input["shape"][1:].tolist())
        self.num_classes = int(self._output["shape"][-1])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns the probabilities, float32 [N, classes], of images float32 [N, *input_shape].

        An int8 file rounds them to steps of 1/256.
        """
        scale, zero_point = self._input["quantization"]
        if scale:
            levels = np.iinfo(self._input["dtype"])
            images = np.round(images / scale + zero_point).clip(levels.min, levels.max)
        found = self._run(images=images.astype(self._input["dtype"]))["probabilities"]
        scale, zero_point = self._output["quantization"]
        return scale * (found.astype(np.float32) - zero_point) if scale else found

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logarithms of the probabilities, none of them 0; see `restore_rounded`."""
        step, _ = self._output["quantization"]
        probabilities = self(images)
        if step:
            probabilities = restore_rounded(probabilities, step)
        return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))


def restore_rounded(probabilities: np.ndarray, step: float) -> np.ndarray:
    """Replaces the zeros among quantized probabilities by positive estimates.

    The classes that were rounded to 0 share equally what is missing from a sum of 1, up to half a
    step each. Where nothing is missing, they share half a step, the largest error of rounding. The
    other probabilities are thus kept, however many classes there are.

    Args:
      probabilities: float32 [N, classes], multiples of the step.
      step: step of the quantization.
    """
    num_zeros = np.sum(probabilities == 0, axis=1, keepdims=True)
    missing = np.maximum(1 - probabilities.sum(axis=1, keepdims=True), step / 2)
    share = np.minimum(missing / np.maximum(num_zeros, 1), step / 2)
    return np.where(probabilities == 0, share, probabilities).astype(np.float32)
