"""Loads the networks of runs; `exported` loads those that were exported."""

import os
from typing import NamedTuple

import keras
import tensorflow as tf
from etils import epath
from ml_collections import ConfigDict

from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError
from bn_keras.keras_internals import batch_norm_layers, trains_batch_norm
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.metrics_log import ACCURACY
from bn_keras.runs.workdir import Workdir
from bn_keras.training.config import uses_population
from bn_keras.training.restoring import restore_network


class TrainedNetwork(NamedTuple):
    """The finished, the latest or the best network of a run.

    Attributes:
      model: network from images float32 [N, *input_shape] to logits [N, classes].
      config: config of the run.
      step: step of the checkpoint.
      statistics: the statistics of its BatchNormalization layers: "moving", "population" if the run
        estimated them, or "none" without such layers.
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
    def lacks_population_statistics(self) -> bool:
        """Whether it has moving statistics in layers that are not frozen."""
        return self.statistics == "moving" and trains_batch_norm(self.model)


def describe_statistics(statistics: str) -> str:
    """Returns a network's statistics in words, such as "moving statistics"."""
    return "no BN" if statistics == "none" else f"{statistics} statistics"


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
        # A finished run has no training to continue: its checkpoints were deleted, or not copied.
        advice = (
            "restore it from a copy of the run"
            if run.read_metrics().is_finished
            else "continue its training"
        )
        raise UsageError(
            f"the run in {run.path} has no {'best ' if best else ''}checkpoint of a trained network"
            f" that can be read: {advice}"
        )
    config, step, input_shape = network.config, network.step, network.input_shape
    statistics = "moving" if batch_norm_layers(network.model) else "none"
    if statistics == "moving" and network.folder != run.checkpoints:
        statistics = _evaluated_statistics(run, step, best, config.population.when)
    preprocessing = Preprocessing(input_shape[:2], crop=config.data.crop, binary=config.data.binary)
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
    lines = run.read_metrics().evaluations(step)
    if best and lines:
        lines = [max(lines, key=lambda line: line[ACCURACY])]
    if lines and "validation/statistics" in lines[-1]:
        return lines[-1]["validation/statistics"]
    # Resuming from an earlier checkpoint drops the later lines, but keeps the networks.
    return "population" if uses_population(population_when, is_last=not best) else "moving"
