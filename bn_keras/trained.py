"""A run's network as it was trained, for whoever evaluates, exports or examines it."""

import os
from typing import NamedTuple

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras import models
from bn_keras.checkpoint import Checkpoints
from bn_keras.data.images import Preprocessing
from bn_keras.data.pipeline import make_preprocessing
from bn_keras.errors import UsageError
from bn_keras.workdir import Workdir


class TrainedNetwork(NamedTuple):
    """The network of a run: as it was finished, or of the latest checkpoint.

    Attributes:
      model: from images float32 [N, *input_shape] to logits [N, classes].
      config: of the run.
      step: of the checkpoint.
      statistics: by which its BatchNormalization layers normalize: "moving", or "population"
        where the run took these at its end.
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


def load_trained(
    workdir: str | os.PathLike, strategy: tf.distribute.Strategy | None = None
) -> TrainedNetwork:
    """Loads the network of a run; its data set need not be at hand.

    Args:
      workdir: of the run.
      strategy: in whose scope the model is made; None is TensorFlow's default, one device.

    Raises:
      UsageError: no run or no checkpoint in the folder, or one that can't be read.
    """
    run = Workdir(workdir)
    config = run.read_config()
    input_shape, class_names = run.read_interface()
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = models.from_config(config, input_shape, len(class_names))
    statistics, checkpoints = "population", Checkpoints(run.population, model, None, strategy)
    if not checkpoints.latest:
        statistics, checkpoints = "moving", Checkpoints(run.checkpoints, model, None, strategy)
    if not checkpoints.latest:
        raise UsageError(f"the run in {run.path} has no checkpoint yet: let it train on")
    step = checkpoints.restore()
    preprocessing = make_preprocessing(config.data, input_shape[:2])
    return TrainedNetwork(model, config, step, statistics, input_shape, class_names, preprocessing)
