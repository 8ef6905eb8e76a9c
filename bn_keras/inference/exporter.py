"""Export of a run's network: a .keras file, a SavedModel, a TFLite file or an ONNX file."""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.agreement import check_agreement
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import AgreementError, UsageError
from bn_keras.fold import FoldReport, fold_batch_norm
from bn_keras.inference.evaluation import check_classes
from bn_keras.inference.exported import EXTRA_ASSETS, ExportedNetwork, load_exported
from bn_keras.inference.loading import TrainedNetwork, describe_statistics, load_trained
from bn_keras.inference.network_description import FILE_NAME, NetworkDescription
from bn_keras.inference.onnx_export import ONNXNetwork, check_onnx, write_onnx
from bn_keras.inference.quantization import (
    QuantizationReport,
    check_quantized,
    compare_accuracy,
    read_training_images,
)
from bn_keras.inference.tflite_export import write_tflite
from bn_keras.keras_internals import all_layers
from bn_keras.runs.settings import replaced
from bn_keras.storage import check_writable, exists, is_folder, literal_path, replacing, writing
from bn_keras.training.build import build_data, build_model

# Images on which the network is compared with its export.
_NUM_IMAGES = 4
_QUANTIZATIONS = ("none", "int8")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Report of an export; str() formats it in a few lines.

    Attributes:
      output: path of the export.
      num_bytes: its size in bytes.
      step, statistics: step and statistics of the network; see `TrainedNetwork`.
      largest_difference: largest difference between the outputs of the network and of its export.
      largest_output: largest absolute value of these outputs.
      reader: software that loads the export.
      fold: report of the folding; None if nothing was folded.
      quantization: accuracy before and after; None if the export is not quantized.
    """

    output: str
    num_bytes: int
    step: int
    statistics: str
    largest_difference: float
    largest_output: float
    reader: str
    fold: FoldReport | None
    quantization: QuantizationReport | None

    def __str__(self) -> str:
        lines = [str(part) for part in (self.fold, self.quantization) if part is not None]
        lines += [
            f"round trip verified: largest difference {self.largest_difference:.2g} in outputs of"
            f" up to {self.largest_output:.3g}",
            f"{self.output}: step {self.step}, {describe_statistics(self.statistics)},"
            f" {self.num_bytes / 1e6:.1f} MB, loads with {self.reader}",
        ]
        return "\n".join(lines)


def export_workdir(
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    file_format: str = "keras",
    *,
    fold: bool = False,
    overwrite: bool = False,
    best: bool = False,
    quantize: str = "none",
    num_examples: int = 200,
    data_dir: str = "",
    validation_split: str = "",
) -> ExportReport:
    """Exports the network of a run for inference.

    The export is read back and compared with the network before it is moved to `output`. After any
    failure, `output` is as it was. Every format contains the class names and a description of the
    preprocessing, which `load_exported` reads.

    Formats:
      - "keras": the network from preprocessed images [N, *input_shape] to logits. Loading it
        needs `import bn_keras`; a folded network usually needs Keras alone.
      - "saved_model": needs TensorFlow alone and includes the preprocessing. Signature
        "serving_default": `encoded`, string [N], JPEG, PNG, BMP, GIF or WebP files of any size, to
        `probabilities`, float32 [N, classes], and `class_name`, string [N], the most probable
        class. Signature "images": preprocessed `images` to `logits`. Signature "class_names": no
        input, to the names, string [classes].
      - "tflite": signature "serving_default": preprocessed `images` to `probabilities`, with TFLite
        model metadata.
      - "onnx": preprocessed `images` to `logits` and `probabilities`. Needs the extra "onnx".

    TFLite and ONNX files of a network in mixed precision have weights in float32.

    Args:
      workdir: folder of the run.
      output: path, local or in a bucket, of a file that ends in .keras, .tflite or .onnx, or of the
        folder of a SavedModel.
      file_format: "keras", "saved_model", "tflite" or "onnx".
      fold: whether batch normalization is folded first; see `fold_batch_norm`.
      overwrite: whether an existing export is replaced.
      best: whether to export the network of the run's best evaluation; see `load_trained`.
      quantize: "none", or "int8" for a TFLite file whose weights, activations, input and output
        have 8 bits. Needs the run's data. The input is then uint8, the values of the pixels.
      num_examples: number of training images that the quantization finds the ranges of the
        activations from.
      data_dir: replaces the run's data.data_dir; "" keeps it.
      validation_split: replaces the split that the quantized network is evaluated on; "" keeps it.

    Raises:
      UsageError: an unknown format, no run in the workdir, an invalid output, or data that is not
        available or has a class that the network lacks.
      StorageError: the output cannot be written.
      AgreementError: the export does not compute what the network computes.
    """
    path = os.fspath(output).rstrip("/")
    _check_quantization(file_format, quantize, num_examples)
    _check_output(path, file_format, overwrite)
    trained = load_trained(workdir, best=best)
    description = NetworkDescription(
        trained.class_names,
        trained.input_shape,
        trained.preprocessing,
        trained.step,
        trained.statistics,
    )
    examples, validation = None, None
    if quantize == "int8":
        config = _with_data(trained.config, data_dir, validation_split)
        validation = build_data(config, validation_only=True)
        check_classes(validation, trained.class_names, os.fspath(workdir))
        examples = read_training_images(config, num_examples)
    model = _in_float32(trained) if file_format in ("tflite", "onnx") else trained.model
    fold_report = None
    if fold:
        model, fold_report = fold_batch_norm(model)
    with replacing(path, folder=not _FORMATS[file_format].suffix) as unfinished:
        with writing(f"output {path}"):
            if examples is None:
                _FORMATS[file_format].write(model, description, unfinished)
            else:
                write_tflite(model, description, unfinished, examples)
        exported = load_exported(unfinished)
        largest_difference, largest_output = _verify(
            model, description, exported, unfinished, examples
        )
        quantization = None
        if examples is not None and validation is not None:
            quantization = compare_accuracy(
                model,
                exported.model,
                validation,
                trained.class_names,
                trained.config.evaluation.global_batch_size,
                len(examples),
            )
        num_bytes = _size(unfinished)
    return ExportReport(
        output=path,
        num_bytes=num_bytes,
        step=trained.step,
        statistics=trained.statistics,
        largest_difference=largest_difference,
        largest_output=largest_output,
        reader=_reader(model, file_format),
        fold=fold_report,
        quantization=quantization,
    )


def _check_quantization(file_format: str, quantize: str, num_examples: int) -> None:
    if quantize not in _QUANTIZATIONS:
        raise UsageError(
            f"unknown quantize={quantize!r}: expected one of {', '.join(_QUANTIZATIONS)}"
        )
    if quantize != "none" and file_format != "tflite":
        raise UsageError(
            f"format {file_format} cannot be quantized: choose tflite, or quantize='none'"
        )
    if num_examples < 1:
        raise UsageError(f"num_examples={num_examples} is invalid: expected a positive integer")


def _check_output(output: str, file_format: str, overwrite: bool) -> None:
    """Raises an error for an output that cannot be written, before any time is spent."""
    if file_format not in _FORMATS:
        raise UsageError(f"unknown format {file_format!r}: expected one of {', '.join(_FORMATS)}")
    if file_format == "onnx":
        check_onnx()
    suffix = _FORMATS[file_format].suffix
    if not os.path.basename(output).endswith(suffix):
        raise UsageError(
            f"output {output} is invalid: expected the path of a file that ends in {suffix}"
        )
    if exists(output):
        if not overwrite:
            raise UsageError(
                f"output {output} exists: pass another path, or overwrite=True (--overwrite)"
            )
        if suffix:
            is_export = not is_folder(output)
        else:
            is_export = exists(os.path.join(output, "saved_model.pb"))
        if not is_export:
            raise UsageError(
                f"output {output} exists, is not in the format {file_format}, and is not"
                " overwritten: pass another path"
            )
    check_writable(os.path.dirname(output), f"output {output}")


def _with_data(config: ConfigDict, data_dir: str, validation_split: str) -> ConfigDict:
    """Returns a copy of a config with other data; "" keeps a setting."""
    given = {"data.data_dir": data_dir, "data.validation_split": validation_split}
    return replaced(config, {key: value for key, value in given.items() if value})


def _in_float32(trained: TrainedNetwork) -> keras.Model:
    """Returns the network without mixed precision, for which TFLite and ONNX lack kernels."""
    config = replaced(trained.config, {"train.precision": "float32"})
    model = build_model(config, trained.input_shape, trained.num_classes)
    model.set_weights(trained.model.get_weights())
    return model


def _write_keras(model: keras.Model, description: NetworkDescription, path: pathlib.Path) -> None:
    model.save(path)
    # Keras ignores further files in the archive.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(FILE_NAME, description.to_json())


def _write_saved_model(
    model: keras.Model, description: NetworkDescription, path: pathlib.Path
) -> None:
    def predict(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = _probabilities(model, description.preprocessing, encoded)
        best = tf.argmax(probabilities, axis=1)
        return {"probabilities": probabilities, "class_name": tf.gather(class_names(), best)}

    def class_names() -> tf.Tensor:
        return tf.constant(description.class_names)

    def logits(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": model(images, training=False)}

    archive = keras.export.ExportArchive()
    archive.track(model)
    files = tf.TensorSpec([None], tf.string, "encoded")
    images = tf.TensorSpec(model.inputs[0].shape, tf.float32, "images")
    archive.add_endpoint("serving_default", predict, [files])
    archive.add_endpoint("images", logits, [images])
    archive.add_endpoint("class_names", lambda: {"class_names": class_names()}, [])
    (path / EXTRA_ASSETS).mkdir(parents=True)
    (path / EXTRA_ASSETS / FILE_NAME).write_text(description.to_json())
    with literal_path(path) as folder:
        archive.write_out(os.fspath(folder), verbose=False)


def _probabilities(
    model: keras.Model, preprocessing: Preprocessing, encoded: tf.Tensor
) -> tf.Tensor:
    """Computes the probabilities, float32 [N, classes], of encoded images, string [N]."""
    shape = model.inputs[0].shape[1:]
    images = tf.map_fn(
        lambda image: preprocessing.process_encoded(image, None, channels=shape[-1]),
        encoded,
        fn_output_signature=tf.TensorSpec(shape, tf.float32),
    )
    return tf.nn.softmax(model(images, training=False))


class _Format(NamedTuple):
    """An export format.

    Attributes:
      suffix: end of the file's name; "" for a folder.
      reader: software that loads it.
      write: writes a network and its description to a path.
    """

    suffix: str
    reader: str
    write: Callable[[keras.Model, NetworkDescription, pathlib.Path], None]


_FORMATS = {
    "keras": _Format(".keras", "Keras", _write_keras),
    "saved_model": _Format("", "TensorFlow", _write_saved_model),
    "tflite": _Format(".tflite", "TFLite", write_tflite),
    "onnx": _Format(".onnx", "ONNX Runtime", write_onnx),
}


def _verify(
    model: keras.Model,
    description: NetworkDescription,
    exported: ExportedNetwork,
    path: pathlib.Path,
    examples: np.ndarray | None,
) -> tuple[float, float]:
    """Compares an export with its network.

    Args:
      model, description: the network.
      exported: the export, read back.
      path: its path.
      examples: images that it was quantized with; None if it is not quantized.

    Returns:
      The largest difference and the largest absolute output.

    Raises:
      AgreementError: the outputs differ by more than rounding or quantization, or the classes
        differ.
    """
    source = f"the exported {path.name}"
    if exported.class_names != description.class_names:
        raise AgreementError(f"{source} has other class names: this is a bug; please report it")
    if examples is not None:
        expected, found = (
            np.asarray(tf.nn.softmax(network.predict(examples, verbose=0)))
            for network in (model, exported.model)
        )
        return check_quantized(expected, found, source)
    images = _random_images(description.input_shape)
    logits, outputs = model(images, training=False), exported.model(images, training=False)
    probabilities = tf.nn.softmax(logits)
    pairs = [(logits, outputs)]
    if path.is_dir():
        encoded = _random_files(description.input_shape)
        with literal_path(path) as folder:
            served = tf.saved_model.load(os.fspath(folder)).signatures["serving_default"]
            found = served(encoded=encoded)["probabilities"]
        pairs.append((_probabilities(model, description.preprocessing, encoded), found))
    elif path.suffix == ".tflite":
        # The logits of probabilities differ by a constant from those that they were computed from.
        pairs = [(probabilities, tf.nn.softmax(outputs))]
    elif path.suffix == ".onnx":
        pairs.append((probabilities, ONNXNetwork(path.read_bytes())(images)[1]))
    return check_agreement(
        model,
        [np.asarray(expected, np.float64) for expected, _ in pairs],
        [np.asarray(found, np.float64) for _, found in pairs],
        source,
    )


def _random_images(shape: tuple[int, int, int]) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.uniform(-1, 1, size=(_NUM_IMAGES, *shape)).astype(np.float32)


def _random_files(shape: tuple[int, int, int]) -> tf.Tensor:
    """Returns JPEG files of noise in different sizes, string [N]."""
    generator = np.random.default_rng(0)
    height, width, channels = shape
    sizes = [(height + 3 * i, 2 * width + i, channels) for i in range(_NUM_IMAGES)]
    noise = [generator.integers(256, size=size, dtype=np.uint8) for size in sizes]
    return tf.stack([tf.io.encode_jpeg(image) for image in noise])


def _size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _reader(model: keras.Model, file_format: str) -> str:
    """Returns the software that loads an export."""
    reader = _FORMATS[file_format].reader
    if file_format != "keras":
        return reader
    types = {type(layer) for layer in all_layers(model)}
    ours = sorted(t.__name__ for t in types if t.__module__.startswith("bn_keras"))
    return f"{reader} after import bn_keras (for {', '.join(ours)})" if ours else f"{reader} alone"
