"""Loads trained and exported networks."""

import os
from typing import NamedTuple

import keras
import tensorflow as tf
from etils import epath
from ml_collections import ConfigDict

from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.workdir import Workdir
from bn_keras.storage import local_copy
from bn_keras.text import first_line
from bn_keras.training.restoring import restore_network


class TrainedNetwork(NamedTuple):
    """The finished, the latest or the best network of a run.

    Attributes:
      model: network from images float32 [N, *input_shape] to logits [N, classes].
      config: config of the run.
      step: step of the checkpoint.
      statistics: the statistics of its BatchNormalization layers: "moving", or "population" if the
        run estimated them.
      input_shape: (height, width, channels).
      class_names: name of each logit, in order.
      preprocessing: turns an image into the network's input.
    """

    model: keras.Model
    config: ConfigDict
    step: int
    statistics: str
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    @property
    def is_frozen(self) -> bool:
        """Returns whether all BatchNormalization layers are frozen and keep their statistics."""
        layers = [v for v in self.model.layers if isinstance(v, keras.layers.BatchNormalization)]
        return bool(layers) and not any(layer.trainable for layer in layers)


def load_trained(
    workdir: str | os.PathLike,
    strategy: tf.distribute.Strategy | None = None,
    best: bool = False,
) -> TrainedNetwork:
    """Loads the network of a run; the run's data set is not needed.

    Args:
      workdir: folder of the run.
      strategy: strategy in whose scope the model is made; None uses TensorFlow's default, one
        device.
      best: whether to load the network of the evaluation with the highest accuracy, as it was
        evaluated. By default the finished network is loaded, or else the latest checkpoint.

    Raises:
      UsageError: no run or no checkpoint in the folder, or all checkpoints are damaged.
      StorageError: a checkpoint cannot be read.
    """
    run = Workdir(workdir)
    network = restore_network(run, _best if best else _finished_or_latest, strategy)
    if network is None:
        raise UsageError(
            f"the run in {run.path} has no {'best ' if best else ''}checkpoint of a trained network"
            " yet, or none that can be read: continue its training"
        )
    config, step, input_shape = network.config, network.step, network.input_shape
    statistics = "moving"
    if network.folder != run.checkpoints:
        statistics = _evaluated_statistics(run, step, best, config.population.when)
    preprocessing = Preprocessing(
        input_shape[:2],
        crop=config.data.crop,
        mirror=config.data.mirror,
        distortion=config.data.distortion,
        binary=config.data.binary,
        random_augment=config.data.random_augment,
    )
    return TrainedNetwork(
        network.model, config, step, statistics, input_shape, network.class_names, preprocessing
    )


def _best(run: Workdir) -> list[epath.Path]:
    return [run.best]


def _finished_or_latest(run: Workdir) -> list[epath.Path]:
    """Returns the folders of the finished and of the latest network, the later one first."""
    # A run that is being extended has later checkpoints than its finished network.
    folders = [run.finished, run.checkpoints]
    return sorted(folders, key=lambda folder: -Checkpoints(folder, {}).latest_step)


def _evaluated_statistics(run: Workdir, step: int, best: bool, population_when: str) -> str:
    """Returns the statistics that the best or the finished network was evaluated with."""
    lines = run.evaluations(step)
    if best and lines:
        lines = [max(lines, key=lambda line: line["validation/accuracy"])]
    if lines:
        return lines[-1]["validation/statistics"]
    # Resuming from an earlier checkpoint drops the later lines, but keeps the networks.
    with_population = ("evaluations",) if best else ("end", "evaluations")
    return "population" if population_when in with_population else "moving"


class ExportedNetwork(NamedTuple):
    """A network exported by `export_workdir`, or any other Keras model for images.

    Attributes:
      model: network from images float32 [N, *input_shape] to logits or probabilities [N, classes].
      input_shape: (height, width, channels).
      num_classes: size of its output.
      class_names: name of each class, in order; None for a .keras file, which has none.
    """

    model: keras.Model
    input_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None


def load_exported(
    path: str | os.PathLike, strategy: tf.distribute.Strategy | None = None
) -> ExportedNetwork:
    """Loads a .keras file or a SavedModel from `export_workdir`.

    Args:
      path: path of the file, or of the SavedModel's folder, local or in a bucket.
      strategy: as in `load_trained`.

    Raises:
      UsageError: no such file, a damaged one, or a network that does not map images to classes.
    """
    path = os.fspath(path)
    is_saved_model = tf.io.gfile.exists(os.path.join(path, "saved_model.pb"))
    is_keras = path.endswith(".keras") and not tf.io.gfile.isdir(path)
    if not (is_saved_model or (is_keras and tf.io.gfile.exists(path))):
        raise UsageError(
            f"{path} is not an exported network: expected a .keras file or the folder of a"
            " SavedModel"
        )
    strategy = strategy or tf.distribute.get_strategy()
    try:
        with strategy.scope():
            model, names = _read_saved_model(path) if is_saved_model else _read_keras(path)
    # Keras and TensorFlow raise errors of many types for a damaged or foreign file.
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a network: {first_line(error)}") from error
    shapes = [tensor.shape for tensor in (*model.inputs, *model.outputs)]
    if [len(shape) for shape in shapes] != [4, 2] or None in shapes[0][1:]:
        raise UsageError(
            f"{path} is a network with the shapes {', '.join(map(str, shapes))}: expected images"
            " [N, height, width, channels] of one size and one output [N, classes]"
        )
    images, outputs = shapes
    return ExportedNetwork(model, tuple(images[1:]), outputs[1], names)


def _read_keras(path: str) -> tuple[keras.Model, tuple[str, ...] | None]:
    with local_copy(path) as copied:
        return keras.saving.load_model(copied, compile=False), None


def _read_saved_model(path: str) -> tuple[keras.Model, tuple[str, ...] | None]:
    signatures = tf.saved_model.load(path).signatures
    names = signatures["class_names"]()["class_names"].numpy()
    _, arguments = signatures["images"].structured_input_signature
    images = keras.Input(arguments["images"].shape[1:])
    network = keras.layers.TFSMLayer(path, call_endpoint="images")
    return keras.Model(images, network(images)["logits"]), tuple(name.decode() for name in names)
