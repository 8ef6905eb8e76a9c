"""Export of a run's network as a .keras file, a SavedModel or a TFLite file."""

import dataclasses
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import StorageError, UsageError
from bn_keras.fold import FoldReport, check_agreement, fold_batch_norm
from bn_keras.inference.loading import TrainedNetwork, load_trained
from bn_keras.keras_internals import all_layers
from bn_keras.storage import is_local, replacing, writing
from bn_keras.training.build import build_model

# Images on which the network is compared with its export.
_NUM_EXAMPLES = 4


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
    """

    output: str
    num_bytes: int
    step: int
    statistics: str
    largest_difference: float
    largest_output: float
    reader: str
    fold: FoldReport | None

    def __str__(self) -> str:
        lines = [] if self.fold is None else [str(self.fold)]
        lines += [
            f"round trip verified: largest difference {self.largest_difference:.2g} in outputs of"
            f" up to {self.largest_output:.3g}",
            f"{self.output}: step {self.step}, {self.statistics} statistics,"
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
) -> ExportReport:
    """Exports the network of a run for inference.

    The export is read back and compared with the network before it is moved to `output`. After any
    failure, `output` is as it was.

    Formats:
      - "keras": the network from images [N, *input_shape], preprocessed, to logits. Loading it
        needs `import bn_keras`; a folded network usually needs Keras alone.
      - "saved_model": needs TensorFlow alone and includes the preprocessing. Signature
        "serving_default": `encoded`, string [N], JPEG, PNG, BMP or GIF files of any size, to
        `probabilities`, float32 [N, classes], and `class_name`, string [N], the most probable
        class. Signature "images": preprocessed `images` to `logits`. Signature "class_names": no
        input, to the names, string [classes].
      - "tflite": signature "serving_default": preprocessed `images` to `logits`. The weights of a
        network in mixed precision are stored in float32.

    Args:
      workdir: folder of the run.
      output: path, local or in a bucket, of a file that ends in .keras or .tflite, or of the folder
        of a SavedModel.
      file_format: "keras", "saved_model" or "tflite".
      fold: whether batch normalization is folded first; see `fold_batch_norm`.
      overwrite: whether an existing export is replaced.
      best: whether to export the network of the run's best evaluation; see `load_trained`.

    Raises:
      UsageError: an unknown format, no run in the workdir, or an invalid output.
      StorageError: the output cannot be written.
      ArithmeticError: the export does not compute what the network computes.
    """
    path = os.fspath(output).rstrip("/")
    _check_output(path, file_format, overwrite)
    trained = load_trained(workdir, best=best)
    model = _in_float32(trained) if file_format == "tflite" else trained.model
    fold_report = None
    if fold:
        model, fold_report = fold_batch_norm(model)
    with replacing(path) as unfinished:
        with writing(f"output {path}"):
            _FORMATS[file_format].write(model, trained, unfinished)
        largest_difference, largest_output = _verify(model, trained, unfinished, file_format)
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
    )


def _check_output(output: str, file_format: str, overwrite: bool) -> None:
    """Raises an error for an output that cannot be written, before any time is spent."""
    if file_format not in _FORMATS:
        raise UsageError(f"unknown format {file_format!r}: expected one of {', '.join(_FORMATS)}")
    suffix = _FORMATS[file_format].suffix
    if not os.path.basename(output).endswith(suffix):
        raise UsageError(
            f"output {output} is invalid: expected the path of a file that ends in {suffix}"
        )
    if tf.io.gfile.exists(output):
        if not overwrite:
            raise UsageError(f"output {output} exists: pass another path, or --overwrite")
        is_folder = tf.io.gfile.isdir(output)
        if suffix:
            is_export = not is_folder
        else:
            is_export = is_folder and tf.io.gfile.exists(os.path.join(output, "saved_model.pb"))
        if not is_export:
            raise UsageError(
                f"output {output} exists, is not in the format {file_format}, and is not"
                " overwritten: pass another path"
            )
    if is_local(output):
        parent = next(p for p in pathlib.Path(output).absolute().parents if p.exists())
        if not parent.is_dir():
            raise UsageError(f"output {output} is invalid: {parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise StorageError(f"output {output} cannot be written: {parent} is not writable")


def _in_float32(trained: TrainedNetwork) -> keras.Model:
    """Returns the network without mixed precision, for which TFLite has no kernels."""
    config = trained.config.copy_and_resolve_references()
    config.train.precision = "float32"
    model = build_model(config, trained.input_shape, trained.num_classes)
    model.set_weights(trained.model.get_weights())
    return model


def _write_keras(model: keras.Model, trained: TrainedNetwork, path: pathlib.Path) -> None:
    model.save(path)


def _write_saved_model(model: keras.Model, trained: TrainedNetwork, path: pathlib.Path) -> None:
    def predict(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = _probabilities(model, trained.preprocessing, encoded)
        best = tf.argmax(probabilities, axis=1)
        return {"probabilities": probabilities, "class_name": tf.gather(class_names(), best)}

    def class_names() -> tf.Tensor:
        return tf.constant(trained.class_names)

    archive = keras.export.ExportArchive()
    archive.track(model)
    files = tf.TensorSpec([None], tf.string, "encoded")
    archive.add_endpoint("serving_default", predict, [files])
    _add_network(archive, "images", model)
    archive.add_endpoint("class_names", lambda: {"class_names": class_names()}, [])
    archive.write_out(path, verbose=False)


def _write_tflite(model: keras.Model, trained: TrainedNetwork, path: pathlib.Path) -> None:
    archive = keras.export.ExportArchive()
    archive.track(model)
    _add_network(archive, "serving_default", model)
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def _add_network(archive: keras.export.ExportArchive, name: str, model: keras.Model) -> None:
    """Adds a signature from images to logits."""
    archive.add_endpoint(
        name,
        lambda images: {"logits": model(images, training=False)},
        [tf.TensorSpec(model.input.shape, tf.float32, "images")],
    )


def _probabilities(
    model: keras.Model, preprocessing: Preprocessing, encoded: tf.Tensor
) -> tf.Tensor:
    """Computes the probabilities, float32 [N, classes], of encoded images, string [N]."""
    shape = model.input.shape[1:]
    images = tf.map_fn(
        lambda image: preprocessing.process_encoded(image, None, channels=shape[-1]),
        encoded,
        fn_output_signature=tf.TensorSpec(shape, tf.float32),
    )
    return tf.nn.softmax(model(images, training=False))


def _read_keras(path: pathlib.Path) -> Callable[[np.ndarray], tf.Tensor]:
    model = keras.saving.load_model(path, compile=False)
    return lambda images: model(images, training=False)


def _read_saved_model(path: pathlib.Path) -> Callable[[np.ndarray], tf.Tensor]:
    network = tf.saved_model.load(path).signatures["images"]
    return lambda images: network(images=images)["logits"]


def _read_tflite(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    with warnings.catch_warnings():
        # The interpreter warns that it will move to another package.
        warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated")
        # The default delegate logs to standard error.
        resolver = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = tf.lite.Interpreter(os.fspath(path), experimental_op_resolver_type=resolver)
    network = interpreter.get_signature_runner("serving_default")
    return lambda images: network(images=images)["logits"]


class _Format(NamedTuple):
    """An export format.

    Attributes:
      suffix: end of the file's name; "" for a folder.
      write: writes a network to a path.
      read: loads an export as a function from images to logits.
    """

    suffix: str
    write: Callable[[keras.Model, TrainedNetwork, pathlib.Path], None]
    read: Callable[[pathlib.Path], Callable[[np.ndarray], tf.Tensor | np.ndarray]]


_FORMATS = {
    "keras": _Format(".keras", _write_keras, _read_keras),
    "saved_model": _Format("", _write_saved_model, _read_saved_model),
    "tflite": _Format(".tflite", _write_tflite, _read_tflite),
}


def _verify(
    model: keras.Model, trained: TrainedNetwork, path: pathlib.Path, file_format: str
) -> tuple[float, float]:
    """Compares the outputs of an export with those of its network.

    Returns:
      The largest difference and the largest absolute output.

    Raises:
      ArithmeticError: the outputs differ by more than rounding.
    """
    images = _random_images(trained.input_shape)
    expected = [model(images, training=False)]
    outputs = [_FORMATS[file_format].read(path)(images)]
    if file_format == "saved_model":
        encoded = _random_files(trained.input_shape)
        expected.append(_probabilities(model, trained.preprocessing, encoded))
        served = tf.saved_model.load(path).signatures["serving_default"](encoded=encoded)
        outputs.append(served["probabilities"])
    return check_agreement(
        model,
        [np.asarray(tensor, np.float64) for tensor in expected],
        [np.asarray(tensor, np.float64) for tensor in outputs],
        f"the exported {path.name}",
    )


def _random_images(shape: tuple[int, int, int]) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.uniform(-1, 1, size=(_NUM_EXAMPLES, *shape)).astype(np.float32)


def _random_files(shape: tuple[int, int, int]) -> tf.Tensor:
    """Returns JPEG files of noise in different sizes, string [N]."""
    generator = np.random.default_rng(0)
    height, width, channels = shape
    sizes = [(height + 3 * i, 2 * width + i, channels) for i in range(_NUM_EXAMPLES)]
    noise = [generator.integers(256, size=size, dtype=np.uint8) for size in sizes]
    return tf.stack([tf.io.encode_jpeg(image) for image in noise])


def _size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _reader(model: keras.Model, file_format: str) -> str:
    """Returns the software that loads an export."""
    if file_format != "keras":
        return {"saved_model": "TensorFlow", "tflite": "TFLite"}[file_format]
    types = {type(layer) for layer in all_layers(model)}
    ours = sorted(t.__name__ for t in types if t.__module__.startswith("bn_keras"))
    return f"Keras after import bn_keras (for {', '.join(ours)})" if ours else "Keras alone"
