"""Restores the networks that runs saved, and reads the weights that a run starts from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from bn_keras import storage
from bn_keras.errors import UsageError
from bn_keras.models.weights_file import layers_with_weights, read_layers
from bn_keras.runs.checkpoint import Checkpoints
from bn_keras.runs.workdir import Workdir
from bn_keras.training.build import build_model
from bn_keras.training.config_files import read_run_config
from bn_keras.training.fine_tuning import Initialization, PretrainedWeights, initialize
from bn_keras.training.networks import value_of
from bn_keras.training.step import Trainer

# Settings that must be equal for the same weights to compute the same function.
_STRUCTURE = (
    "model.variant",
    "model.preset",
    "model.stem",
    "model.local_response_normalization",
    "batch_norm.epsilon",
    "data.binary",
)


class RestoredNetwork(NamedTuple):
    """A network that a run saved.

    Attributes:
      model: network from images float32 [N, *input_shape] to logits [N, classes].
      config: config of the run.
      step: step of the checkpoint.
      folder: folder of the checkpoint.
      input_shape: (height, width, channels).
      class_names: name of each logit, in order.
    """

    model: keras.Model
    config: ConfigDict
    step: int
    folder: epath.Path
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def restore_network(
    run: Workdir,
    choose_folders: Callable[[Workdir], Sequence[epath.Path]],
    strategy: tf.distribute.Strategy | None = None,
) -> RestoredNetwork | None:
    """Restores a network of a run; the run's data set is not needed.

    Args:
      run: folder of the run.
      choose_folders: returns the folders of checkpoints to try, in order.
      strategy: strategy in whose scope the model is made; None uses TensorFlow's default, one
        device.

    Returns:
      The network; None if no folder has a checkpoint of a trained network.

    Raises:
      UsageError: no run in the folder, or all checkpoints are damaged.
      StorageError: a checkpoint cannot be read.
    """
    config = read_run_config(run)
    input_shape, class_names, *_ = run.read_interface()
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = build_model(config, input_shape, len(class_names))
    for folder in choose_folders(run):
        # The checkpoint of step 0 contains the initial weights.
        if step := Checkpoints(folder, {"model": model.variables}).restore():
            return RestoredNetwork(model, config, step, folder, input_shape, class_names)
    return None


def initialize_trainer(
    config: ConfigDict, trainer: Trainer, class_names: Sequence[str]
) -> Initialization | None:
    """Loads the weights of config.model.init_from into a new trainer.

    Returns:
      What was loaded; None without config.model.init_from.

    Raises:
      UsageError: the source cannot be read or does not fit the network.
      StorageError: a file of the source cannot be read.
    """
    if not config.model.init_from:
        return None
    initialization = initialize(trainer.model, _read_pretrained(config), class_names)
    trainer.restart_averages()
    for difference in initialization.weights.differences:
        logging.warning("the weights of model.init_from were trained with %s", difference)
    return initialization


def _read_pretrained(config: ConfigDict) -> PretrainedWeights:
    """Reads the weights of config.model.init_from, a workdir or a file."""
    source = config.model.init_from
    run = Workdir(source)
    if not run.exists():
        # `read_layers` says why there are no "imagenet" weights.
        if storage.is_folder(source) or not (
            source == "imagenet" or source.endswith((".keras", ".weights.h5"))
        ):
            raise UsageError(
                f"model.init_from={source!r} is invalid: expected the workdir of a run, or a .keras"
                " or .weights.h5 file"
            )
        return PretrainedWeights(source, source, read_layers(source), None)
    network = restore_network(run, lambda run: [run.best, run.finished, run.checkpoints])
    if network is None:
        raise UsageError(
            f"model.init_from={source!r} is a run without a trained network: train it first"
        )
    best = "best network" if network.folder == run.best else "network"
    return PretrainedWeights(
        source,
        f"{source} ({best}, step {network.step:,})",
        {
            name: [w.numpy() for w in layer.weights]
            for name, layer in layers_with_weights(network.model).items()
        },
        network.class_names,
        tuple(
            f"{key}={theirs!r}, here {ours!r}"
            for key in _STRUCTURE
            if (theirs := value_of(network.config, key)) != (ours := value_of(config, key))
        ),
    )
