"""A network as it was trained or exported, for whoever evaluates, exports or examines it."""

import os
import pathlib
from typing import NamedTuple

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data.images import Preprocessing
from bn_keras.data.pipeline import make_preprocessing
from bn_keras.errors import UsageError
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.workdir import Workdir
from bn_keras.training.build import build_model


class TrainedNetwork(NamedTuple):
    """The network of a run: as it was finished, of the latest checkpoint, or the best.

    Attributes:
      model: from images float32 [N, *input_shape] to logits [N, classes].
      config: of the run.
      step: of the checkpoint.
      statistics: by which its BatchNormalization layers normalize: "moving", or "population"
        where the run took these.
      input_shape: (height, width, channels).
      class_names: one a logit, in their order.
      preprocessing: what brings an image to input_shape.
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
        """Of the logits."""
        return len(self.class_names)


def load_trained(
    workdir: str | os.PathLike,
    strategy: tf.distribute.Strategy | None = None,
    best: bool = False,
) -> TrainedNetwork:
    """Loads the network of a run; its data set need not be at hand.

    Args:
      workdir: of the run.
      strategy: in whose scope the model is made; None is TensorFlow's default, one device.
      best: takes the one of the evaluation with the highest accuracy, as it was evaluated, in
        place of the finished or the latest one.

    Raises:
      UsageError: no run or no checkpoint in the folder, or one that can't be read.
    """
    run = Workdir(workdir)
    config = run.read_config()
    input_shape, class_names = run.read_interface()
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = build_model(config, input_shape, len(class_names))
    parts = {"model": model.variables}
    folders = [run.best] if best else [run.finished, run.checkpoints]
    saved = [Checkpoints(folder, parts) for folder in folders]
    step = next((checkpoints.restore() for checkpoints in saved if checkpoints.latest), 0)
    # The checkpoint of step 0 is of a network that has learned nothing.
    if not step:
        raise UsageError(
            f"the run in {run.path} has no {'best ' if best else ''}checkpoint of a trained network"
            " yet, or none that can be read: let it train on"
        )
    statistics = "moving"
    if best or saved[0].latest:
        # The line of an evaluation goes when the run goes back to a checkpoint before it.
        when = ("evaluations",) if best else ("end", "evaluations")
        statistics = "population" if config.population.when in when else "moving"
        if lines := run.evaluations(step):
            line = max(lines, key=lambda line: line["validation/accuracy"]) if best else lines[-1]
            statistics = line["validation/statistics"]
    preprocessing = make_preprocessing(config.data, input_shape[:2])
    return TrainedNetwork(model, config, step, statistics, input_shape, class_names, preprocessing)


class ExportedNetwork(NamedTuple):
    """A network that launch.export has written, or any other Keras model for images.

    Attributes:
      model: from images float32 [N, *input_shape] to logits or probabilities [N, classes].
      input_shape: (height, width, channels).
      num_classes: of its output.
      class_names: in their order; None for a .keras file, which doesn't hold them.
    """

    model: keras.Model
    input_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None


def load_exported(
    path: str | os.PathLike, strategy: tf.distribute.Strategy | None = None
) -> ExportedNetwork:
    """Loads a .keras file or a SavedModel of launch.export.

    Args:
      path: of the file, or of the SavedModel's folder.
      strategy: as in `load_trained`.

    Raises:
      UsageError: there is neither, it can't be read, or it doesn't map images to classes.
    """
    path = pathlib.Path(path)
    is_saved_model = (path / "saved_model.pb").is_file()
    if not (is_saved_model or path.suffix == ".keras" and path.is_file()):
        raise UsageError(
            f"{path} is no exported network: accepted are .keras files and folders of SavedModels"
        )
    strategy = strategy or tf.distribute.get_strategy()
    try:
        with strategy.scope():
            model, names = _read_saved_model(path) if is_saved_model else _read_keras(path)
    # What Keras and TensorFlow raise on a damaged or a foreign file is of many kinds.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} can't be read as a network: {reason}") from error
    shapes = [tensor.shape for tensor in (*model.inputs, *model.outputs)]
    if [len(shape) for shape in shapes] != [4, 2] or None in shapes[0][1:]:
        raise UsageError(
            f"{path} maps {', '.join(map(str, shapes))}: it has to map images [N, height, width,"
            " channels] of one size to one output [N, classes]"
        )
    images, outputs = shapes
    return ExportedNetwork(model, tuple(images[1:]), outputs[1], names)


def _read_keras(path: pathlib.Path) -> tuple[keras.Model, None]:
    return keras.saving.load_model(path, compile=False), None


def _read_saved_model(path: pathlib.Path) -> tuple[keras.Model, tuple[str, ...]]:
    signatures = tf.saved_model.load(path).signatures
    names = signatures["class_names"]()["class_names"].numpy()
    _, arguments = signatures["images"].structured_input_signature
    images = keras.Input(arguments["images"].shape[1:])
    network = keras.layers.TFSMLayer(path, call_endpoint="images")
    return keras.Model(images, network(images)["logits"]), tuple(name.decode() for name in names)
