"""TFLite model metadata: labels and normalization in the standard format.

The format is a FlatBuffer in the model, and a ZIP archive of the associated files after it. Android
and MediaPipe read it. TensorFlow has the schema of models, but not that of metadata, so this
module lists the numbers of the fields that it uses.

Source: https://ai.google.dev/edge/litert/conversion/tensorflow/metadata and its
metadata_schema.fbs, version 1.5.0.
"""

import io
import zipfile
from typing import Any

import flatbuffers
import numpy as np

from bn_keras.inference.network_description import FILE_NAME, NetworkDescription
from bn_keras.text import on_one_line

LABELS = "labels.txt"

_METADATA_NAME = "TFLITE_METADATA"
_IDENTIFIER = b"M001"
# The first version of the format has all of these fields.
_MIN_PARSER_VERSION = "1.0.0"

# Fields of the tables, by number.
_NAME, _DESCRIPTION = 0, 1
_SUBGRAPHS, _MODEL_FILES, _PARSER_VERSION = 3, 6, 7
_INPUTS, _OUTPUTS = 2, 3
_CONTENT, _PROCESS_UNITS, _STATS, _TENSOR_FILES = 3, 4, 5, 6
_FILE_TYPE = 2
_UNION_TYPE, _UNION = 0, 1
_COLOUR_SPACE, _DEFAULT_SIZE = 0, 1
_WIDTH, _HEIGHT = 0, 1
_MEAN, _STD = 0, 1
_MAX, _MIN = 0, 1
# Members of enumerations and unions.
_RGB, _GREY = np.uint8(1), np.uint8(2)
_FEATURE_PROPERTIES, _IMAGE_PROPERTIES = np.uint8(1), np.uint8(2)
_NORMALIZATION = np.uint8(1)
_AXIS_LABELS = np.uint8(2)


def add_metadata(model: bytes, description: NetworkDescription) -> bytes:
    """Adds labels, normalization and the network's description to a TFLite model.

    Args:
      model: model with one input, images, and one output, probabilities.
      description: description of the network.
    """
    # Internal imports of TensorFlow are slow; only this format needs them.
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    parsed = flatbuffer_utils.convert_bytearray_to_object(model)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(_metadata(description), np.uint8)
    entry.name, entry.buffer = _METADATA_NAME, len(parsed.buffers)
    parsed.buffers.append(buffer)
    parsed.metadata = [*(parsed.metadata or []), entry]
    content = io.BytesIO(flatbuffer_utils.convert_object_to_bytearray(parsed))
    # Appended to the model; readers map the files into memory, so they are not compressed.
    with zipfile.ZipFile(content, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(LABELS, "".join(f"{name}\n" for name in labels(description)).encode())
        archive.writestr(FILE_NAME, description.to_json())
    return content.getvalue()


def read_description(model: bytes) -> NetworkDescription | None:
    """Returns the description in a TFLite model; None if it has none."""
    if not zipfile.is_zipfile(io.BytesIO(model)):
        return None
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        if FILE_NAME not in archive.namelist():
            return None
        return NetworkDescription.from_json(archive.read(FILE_NAME))


def labels(description: NetworkDescription) -> list[str]:
    """Returns the class names for the file of labels, in which each has one line."""
    names = map(on_one_line, description.class_names)
    # A name of a folder that is not UTF-8 contains surrogates, which cannot be encoded.
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def _metadata(description: NetworkDescription) -> bytes:
    height, width, channels = description.input_shape
    low, high = description.input_range
    properties = {
        _COLOUR_SPACE: _RGB if channels == 3 else _GREY,
        _DEFAULT_SIZE: {_WIDTH: np.uint32(width), _HEIGHT: np.uint32(height)},
    }
    images: dict[int, Any] = {
        _NAME: "images",
        _DESCRIPTION: description.describe_preprocessing(),
        _CONTENT: {_UNION_TYPE: _IMAGE_PROPERTIES, _UNION: properties},
        _STATS: {_MAX: _floats(high, channels), _MIN: _floats(low, channels)},
    }
    if not description.preprocessing.binary:
        half = 255 / 2
        options = {_MEAN: _floats(half, channels), _STD: _floats(half, channels)}
        images[_PROCESS_UNITS] = [{_UNION_TYPE: _NORMALIZATION, _UNION: options}]
    probabilities = {
        _NAME: "probabilities",
        _DESCRIPTION: "Probability of each class.",
        _CONTENT: {_UNION_TYPE: _FEATURE_PROPERTIES, _UNION: {}},
        _STATS: {_MAX: _floats(1), _MIN: _floats(0)},
        _TENSOR_FILES: [
            {
                _NAME: LABELS,
                _DESCRIPTION: "Name of each class, in order.",
                _FILE_TYPE: _AXIS_LABELS,
            }
        ],
    }
    model = {
        _NAME: "bn_keras image classifier",
        _DESCRIPTION: "Computes the probability of each class of an image.",
        _SUBGRAPHS: [{_INPUTS: [images], _OUTPUTS: [probabilities]}],
        _MODEL_FILES: [
            {_NAME: FILE_NAME, _DESCRIPTION: "Class names and preprocessing, for bn_keras."}
        ],
        _PARSER_VERSION: _MIN_PARSER_VERSION,
    }
    builder = flatbuffers.Builder()
    builder.Finish(_write(builder, model), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _floats(value: float, count: int = 1) -> np.ndarray:
    return np.full(count, value, np.float32)


def _write(builder: flatbuffers.Builder, value: Any) -> int:
    """Writes a string, a vector or a table, and all that it refers to.

    Args:
      builder: receives the value.
      value: a string; an array, for a vector of numbers; a list, for a vector of tables; or a
        mapping from the numbers of a table's fields to their values, which may also be scalars of
        uint8 or uint32.

    Returns:
      Its offset.
    """
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        return builder.CreateNumpyVector(value)
    if isinstance(value, list):
        offsets = [_write(builder, item) for item in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    # A table's strings, vectors and tables precede it.
    fields: dict[int, Any] = {
        number: item if isinstance(item, np.unsignedinteger) else _write(builder, item)
        for number, item in value.items()
    }
    builder.StartObject(max(fields, default=-1) + 1)
    for number, item in fields.items():
        if isinstance(item, np.uint8):
            builder.PrependUint8Slot(number, int(item), 0)
        elif isinstance(item, np.uint32):
            builder.PrependUint32Slot(number, int(item), 0)
        else:
            builder.PrependUOffsetTRelativeSlot(number, item, 0)
    return builder.EndObject()
