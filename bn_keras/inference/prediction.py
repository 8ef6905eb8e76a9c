"""Predicts the classes of single images."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.data.single_image import read_image
from bn_keras.errors import UsageError
from bn_keras.inference.loading import load_trained
from bn_keras.training.evaluator import make_scorer

# Largest number of crops that a network is called with.
_MAX_BATCH_SIZE = 36


class Prediction(NamedTuple):
    """A class and its predicted probability."""

    class_name: str
    probability: float


def make_predictor(
    workdirs: Sequence[str | os.PathLike],
    crops: Crops = SINGLE_CROP,
    top_k: int = 5,
    best: bool = False,
) -> Callable[[str | os.PathLike], list[Prediction]]:
    """Builds a function that predicts the class of an image.

    Its probabilities are the mean over all networks and crops.

    Args:
      workdirs: folders of the runs whose networks predict; see `load_trained`.
      crops: crops of each image.
      top_k: number of most probable classes to return, or all if there are fewer.
      best: whether to use the network of each run's best evaluation; see `load_trained`.

    Returns:
      A function from the path of an image to its most probable classes, in descending order. It
      raises what `read_image` raises.

    Raises:
      UsageError: no network in a workdir, networks with different classes or preprocessing, or
        crops that the network's input does not allow.
    """
    networks = [load_trained(workdir, best=best) for workdir in workdirs]
    first = networks[0]
    for workdir, network in zip(workdirs, networks, strict=True):
        logging.info("%s: step %d, %s statistics", workdir, network.step, network.statistics)
        kind = (network.class_names, network.input_shape, network.preprocessing.binary)
        if kind != (first.class_names, first.input_shape, first.preprocessing.binary):
            raise UsageError(
                f"the network in {workdir} differs from that in {workdirs[0]} in its classes or its"
                " preprocessing: predict with each network alone"
            )
    preprocessing = CropPreprocessing(first.preprocessing, crops)
    score = make_scorer([network.model for network in networks], preprocessing, _MAX_BATCH_SIZE)

    @tf.function
    def most_probable(image: tf.Tensor | tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, tf.Tensor]:
        # The last row belongs to the ensemble or to the only network.
        logs = score(tf.nest.map_structure(lambda tensor: tensor[tf.newaxis], image))[-1, 0]
        return tf.nn.top_k(tf.exp(logs), min(top_k, len(first.class_names)))

    def predict(path: str | os.PathLike) -> list[Prediction]:
        channels = first.input_shape[-1]
        encoded, _ = read_image(path, channels)
        probabilities, classes = most_probable(
            preprocessing.process_encoded(encoded, None, channels)
        )
        return [
            Prediction(first.class_names[number], float(probability))
            for probability, number in zip(probabilities, classes.numpy(), strict=True)
        ]

    return predict
