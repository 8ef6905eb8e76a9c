"""A run's network in a file that others can run: .keras, SavedModel or TFLite."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from bn_keras.data.images import Preprocessing
from bn_keras.errors import UsageError
from bn_keras.fold import FoldReport, check_agreement, fold_batch_norm
from bn_keras.inference.loading import TrainedNetwork, load_trained
from bn_keras.keras_internals import all_layers
from bn_keras.training.build import build_model

# The ending that a file has to have; a SavedModel is a folder.
ENDINGS = {"keras": ".keras", "saved_model": "", "tflite": ".tflite"}

# Images that the network and its file are compared on.
_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written; str() gives a few lines.

    Attributes:
      output: where it lies.
      num_bytes: its size.
      step, statistics: of the network, as in TrainedNetwork.
      largest_difference: between the outputs of the network and of what was written.
      largest_output: the largest absolute value of these outputs.
      reader: what it takes to read it.
      fold: of the folding; None where nothing was folded.
    """

    output: pathlib.Path
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
            f"read again, it differs by at most {self.largest_difference:.2g} from the network, in"
            f" outputs of up to {self.largest_output:.3g}",
            f"{self.output}: step {self.step}, {self.statistics} statistics,"
            f" {self.num_bytes / 1e6:.1f} MB, to be read with {self.reader}",
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
    """Writes the network of a run in a format for inference.

    What is written is read again and compared with the network, and only then stands at `output`;
    whatever goes wrong before leaves nothing there, or what was there.

    Formats:
      - "keras": the network, from images [N, *input_shape] in the range of its preprocessing to
        logits. Reading it takes `import bn_keras`; folded, mostly Keras alone.
      - "saved_model": TensorFlow alone reads it. Its signature "serving_default" takes `encoded`,
        strings [N] that are JPEG (or PNG, BMP, GIF) files of any size, prepares them as for the
        evaluation, and gives `probabilities`, float32 [N, classes], and `class_name`, string [N],
        of the most probable; "images" takes `images` as the network does and gives `logits`;
        "class_names" takes nothing and gives the names, string [classes].
      - "tflite": its signature "serving_default" takes `images` as the network does, and gives
        `logits`. Of a network in mixed precision it holds the float32 weights in float32.

    Args:
      workdir: of the run.
      output: a local path that ends in .keras, in .tflite, or anyhow for a SavedModel, a folder.
      file_format: "keras", "saved_model" or "tflite".
      fold: whether fold_batch_norm goes before.
      overwrite: whether an output that is there is replaced.
      best: takes the run's network of its best evaluation, as `load_trained` does.

    Raises:
      UsageError: an unknown format, no run in the workdir, or an output that can't be written.
      ArithmeticError: what was read again is not the network.
    """
    output = _checked(os.fspath(output), file_format, overwrite)
    trained = load_trained(workdir, best=best)
    model, report = _in_float32(trained) if file_format == "tflite" else trained.model, None
    if fold:
        model, report = fold_batch_norm(model)
    with _complete(output) as unfinished:
        try:
            _WRITERS[file_format](model, trained, unfinished)
        except tf.errors.OpError as error:  # TensorFlow's name for what the system says
            raise OSError(error.message) from None
        difference, size = _compare(model, trained, unfinished, file_format)
        num_bytes = _size(unfinished)
    return ExportReport(
        output=output,
        num_bytes=num_bytes,
        step=trained.step,
        statistics=trained.statistics,
        largest_difference=difference,
        largest_output=size,
        reader=_reader(model, file_format),
        fold=report,
    )


def _checked(path: str, file_format: str, overwrite: bool) -> pathlib.Path:
    """Finds out what can't go well before it takes time."""
    if file_format not in ENDINGS:
        raise UsageError(f"unknown format {file_format!r}: accepted are {', '.join(ENDINGS)}")
    ending, output = ENDINGS[file_format], pathlib.Path(path)
    if "://" in path or not output.name.endswith(ending):
        ends = f" that ends in {ending}" if ending else ""
        raise UsageError(f"output {path} has to be a local path{ends}")
    if output.exists():
        if not overwrite:
            raise UsageError(f"output {output} exists: give another one, or --overwrite")
        is_its_kind = output.is_file() if ending else (output / "saved_model.pb").is_file()
        if not is_its_kind:
            raise UsageError(
                f"output {output} is there and no {file_format}, and is not overwritten: give"
                " another one"
            )
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"output {output} can't be written: {parent} is no folder to write to")
    return output


@contextlib.contextmanager
def _complete(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to, and moves what is there to `output` at the end, unless it fails."""
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, since only within one file system a move is at once.
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        unfinished = folder / output.name
        yield unfinished
        if output.is_dir():
            output.rename(folder / "before")
        unfinished.replace(output)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UsageError(f"output {output} can't be written: {reason}") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _in_float32(trained: TrainedNetwork) -> keras.Model:
    """Gives the network without mixed precision, for which TFLite has no kernels."""
    config = trained.config.copy_and_resolve_references()
    config.train.precision = "float32"
    model = build_model(config, trained.input_shape, len(trained.class_names))
    model.set_weights(trained.model.get_weights())
    return model


def _write_keras(model: keras.Model, trained: TrainedNetwork, path: pathlib.Path) -> None:
    model.save(path)


def _write_saved_model(model: keras.Model, trained: TrainedNetwork, path: pathlib.Path) -> None:
    def serve(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = _probabilities(model, trained.preprocessing, encoded)
        best = tf.argmax(probabilities, axis=1)
        return {"probabilities": probabilities, "class_name": tf.gather(names(), best)}

    def names() -> tf.Tensor:
        return tf.constant(trained.class_names)

    archive = keras.export.ExportArchive()
    archive.track(model)
    strings = tf.TensorSpec([None], tf.string, "encoded")
    archive.add_endpoint("serving_default", serve, [strings])
    _add_network(archive, "images", model)
    archive.add_endpoint("class_names", lambda: {"class_names": names()}, [])
    archive.write_out(path, verbose=False)


def _add_network(archive: keras.export.ExportArchive, name: str, model: keras.Model) -> None:
    archive.add_endpoint(
        name,
        lambda images: {"logits": model(images, training=False)},
        [tf.TensorSpec(model.input.shape, tf.float32, "images")],
    )


def _probabilities(
    model: keras.Model, preprocessing: Preprocessing, encoded: tf.Tensor
) -> tf.Tensor:
    """Maps encoded images, string [N], to probabilities, float32 [N, classes]."""
    shape = model.input.shape[1:]
    images = tf.map_fn(
        lambda image: preprocessing.from_encoded(image, None, channels=shape[-1]),
        encoded,
        fn_output_signature=tf.TensorSpec(shape, tf.float32),
    )
    return tf.nn.softmax(model(images, training=False))


def _write_tflite(model: keras.Model, trained: TrainedNetwork, path: pathlib.Path) -> None:
    archive = keras.export.ExportArchive()
    archive.track(model)
    _add_network(archive, "serving_default", model)
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


_WRITERS = {"keras": _write_keras, "saved_model": _write_saved_model, "tflite": _write_tflite}


def _compare(
    model: keras.Model, trained: TrainedNetwork, path: pathlib.Path, file_format: str
) -> tuple[float, float]:
    """Reads what was written, and gives what check_agreement says of its outputs."""
    images = _random_images(trained.input_shape)
    pairs = [(model(images, training=False), _READERS[file_format](path)(images))]
    if file_format == "saved_model":
        encoded = _random_files(trained.input_shape)
        served = tf.saved_model.load(path).signatures["serving_default"](encoded=encoded)
        probabilities = _probabilities(model, trained.preprocessing, encoded)
        pairs.append((probabilities, served["probabilities"]))
    expected, read = (
        [np.asarray(t, np.float64) for t in side] for side in zip(*pairs, strict=True)
    )
    return check_agreement(model, expected, read, f"{path.name}, read again,")


def _read_keras(path: pathlib.Path) -> Callable[[np.ndarray], tf.Tensor]:
    model = keras.saving.load_model(path, compile=False)
    return lambda images: model(images, training=False)


def _read_saved_model(path: pathlib.Path) -> Callable[[np.ndarray], tf.Tensor]:
    network = tf.saved_model.load(path).signatures["images"]
    return lambda images: network(images=images)["logits"]


def _read_tflite(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    with warnings.catch_warnings():
        # That it goes to a package of its own one day.
        warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated")
        # Without the delegate, which says on standard error that it is there.
        resolver = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        interpreter = tf.lite.Interpreter(os.fspath(path), experimental_op_resolver_type=resolver)
    network = interpreter.get_signature_runner("serving_default")
    return lambda images: network(images=images)["logits"]


_READERS = {"keras": _read_keras, "saved_model": _read_saved_model, "tflite": _read_tflite}


def _random_images(shape: tuple[int, int, int]) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.uniform(-1, 1, size=(_EXAMPLES, *shape)).astype(np.float32)


def _random_files(shape: tuple[int, int, int]) -> tf.Tensor:
    """Gives JPEG files of noise, each of another size, string [N]."""
    generator = np.random.default_rng(0)
    height, width, channels = shape
    sizes = [(height + 3 * i, 2 * width + i, channels) for i in range(_EXAMPLES)]
    noise = [generator.integers(256, size=size, dtype=np.uint8) for size in sizes]
    return tf.stack([tf.io.encode_jpeg(image) for image in noise])


def _size(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _reader(model: keras.Model, file_format: str) -> str:
    if file_format != "keras":
        return {"saved_model": "TensorFlow", "tflite": "TFLite"}[file_format]
    types = {type(layer) for layer in all_layers(model)}
    ours = sorted(t.__name__ for t in types if t.__module__.startswith("bn_keras"))
    return f"Keras after import bn_keras (for {', '.join(ours)})" if ours else "Keras alone"
