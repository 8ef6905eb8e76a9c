"""Networks as ONNX files, converted by tf2onnx and executed by ONNX Runtime: the extra `onnx`."""

import importlib.util
import pathlib

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import UsageError
from bn_keras.inference.network_description import NetworkDescription

# TensorRT and other runtimes support it; tf2onnx supports up to 18.
OPSET = 17
_MODULES = ("onnx", "onnxruntime", "tf2onnx")
_DESCRIPTION_KEY = "bn_keras"


def check_onnx() -> None:
    """Raises UsageError if a package of the extra is not installed."""
    if missing := [name for name in _MODULES if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"ONNX needs the extra 'onnx': install bn_keras[onnx] beside the other extras; missing"
            f" modules: {', '.join(missing)}"
        )


def write_onnx(model: keras.Model, description: NetworkDescription, path: pathlib.Path) -> None:
    """Writes an ONNX file from `images` to `logits` and `probabilities`.

    The batch axis is free; images are [N, H, W, C], as in TensorFlow. The description of the
    network is in metadata_props.

    Args:
      model: network from images to logits, in float32.
      description: description of the network.
      path: path of the file.
    """
    import onnx
    import tf2onnx

    @tf.function(input_signature=[tf.TensorSpec(model.inputs[0].shape, tf.float32, "images")])
    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = model(images, training=False)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    converted, _ = tf2onnx.convert.from_function(
        predict, input_signature=predict.input_signature, opset=OPSET
    )
    for value in (*converted.graph.input, *converted.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(converted, {_DESCRIPTION_KEY: description.to_json()})
    onnx.checker.check_model(converted)
    path.write_bytes(converted.SerializeToString())


class ONNXNetwork:
    """An ONNX file of `write_onnx`, executed by ONNX Runtime on the CPU.

    Args:
      content: the file.

    Attributes:
      input_shape: (height, width, channels).
      num_classes: size of its output.
      description: description of the network.
    """

    def __init__(self, content: bytes) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        [images] = self._session.get_inputs()
        outputs = {output.name: output for output in self._session.get_outputs()}
        self.input_shape = tuple(images.shape[1:])
        self.num_classes = outputs["logits"].shape[-1]
        properties = self._session.get_modelmeta().custom_metadata_map
        self.description = NetworkDescription.from_json(properties[_DESCRIPTION_KEY])

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits and probabilities, float32 [N, classes], of images [N, *input_shape]."""
        logits, probabilities = self._session.run(["logits", "probabilities"], {"images": images})
        return logits, probabilities
