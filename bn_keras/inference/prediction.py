"""The classes that trained networks see in single images."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf
from absl import logging

from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.data.single_image import read_image
from bn_keras.errors import UsageError
from bn_keras.inference.evaluation import make_scorer
from bn_keras.inference.loading import load_trained

# Crops that a network is called with.
_BATCH_SIZE = 36


class Prediction(NamedTuple):
    """A class, and the probability that the networks give it."""

    class_name: str
    probability: float


def make_predictor(
    workdirs: Sequence[str | os.PathLike],
    crops: Crops = SINGLE_CROP,
    num_classes: int = 5,
    best: bool = False,
) -> Callable[[str | os.PathLike], list[Prediction]]:
    """Makes a function that looks at one image, with several networks' and crops' mean probability.

    Args:
      workdirs: of the runs whose networks are asked, as `load_trained` takes them.
      crops: of each image.
      num_classes: how many of the most probable classes it gives, or all if there are fewer.
      best: takes each run's network of its best evaluation, as `load_trained` does.

    Returns:
      A function of an image's path. It gives the most probable classes, best first, and raises
      UsageError if there is no image that can be read.

    Raises:
      UsageError: no network in a workdir, networks that differ in their classes or in how they see
        an image, or crops that can't be cut.
    """
    networks = [load_trained(workdir, best=best) for workdir in workdirs]
    first = networks[0]
    for workdir, network in zip(workdirs, networks, strict=True):
        logging.info("%s: step %d, %s statistics", workdir, network.step, network.statistics)
        seen = (network.class_names, network.input_shape, network.preprocessing.binary)
        if seen != (first.class_names, first.input_shape, first.preprocessing.binary):
            raise UsageError(
                f"the network in {workdir} has other classes or sees images otherwise than that in"
                f" {workdirs[0]}: ask each by itself"
            )
    preprocessing = CropPreprocessing(first.preprocessing, crops)
    score = make_scorer([network.model for network in networks], preprocessing, _BATCH_SIZE)

    @tf.function
    def most_probable(shown: tf.Tensor | tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, tf.Tensor]:
        # The last row is the ensemble's, or that of the only network.
        logs = score(tf.nest.map_structure(lambda tensor: tensor[tf.newaxis], shown))[-1, 0]
        return tf.nn.top_k(tf.exp(logs), min(num_classes, len(first.class_names)))

    def predict(path: str | os.PathLike) -> list[Prediction]:
        channels = first.input_shape[-1]
        encoded, _ = read_image(path, channels)
        probabilities, classes = most_probable(preprocessing.from_encoded(encoded, None, channels))
        return [
            Prediction(first.class_names[number], float(probability))
            for probability, number in zip(probabilities, classes.numpy(), strict=True)
        ]

    return predict
