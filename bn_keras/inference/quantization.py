"""Images for int8 quantization, and the accuracy before and after it."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from bn_keras.data import pipeline
from bn_keras.data.decode_errors import READ_ERRORS
from bn_keras.errors import AgreementError, BucketUnavailableError, UsageError
from bn_keras.runs.settings import replaced
from bn_keras.storage import is_temporary, reason_of
from bn_keras.text import first_line
from bn_keras.training.build import build_data
from bn_keras.training.evaluator import Evaluator


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Comparison of a network with its quantization; str() formats it in a few lines.

    Attributes:
      num_examples: number of training images that the ranges of the activations were found from.
      num_validation_examples: number of validation images that both networks were evaluated on.
      accuracy_before, accuracy_after: fraction of them whose most probable class is correct.
      same_class: fraction of them for which both networks predict the same class.
    """

    num_examples: int
    num_validation_examples: int
    accuracy_before: float
    accuracy_after: float
    same_class: float

    def __str__(self) -> str:
        return (
            f"quantized to int8 with {self.num_examples:,} training images: accuracy"
            f" {self.accuracy_after:.2%} on {self.num_validation_examples:,} validation images,"
            f" {self.accuracy_before:.2%} in float32; the same class for {self.same_class:.2%}"
        )


def read_training_images(config: ConfigDict, count: int) -> np.ndarray:
    """Reads training images as the network sees them in evaluation.

    Unreadable images are left out.

    Args:
      config: config of the run; its seed chooses the images.
      count: number of images; of a smaller split, all are read.

    Returns:
      float32 [n, H, W, C].

    Raises:
      UsageError: the data is not available, or no image can be read.
      BucketUnavailableError: an image is in a bucket that does not answer.
    """
    # The validation examples of the data are read one by one, in the preprocessing of evaluation.
    config = replaced(config, {"data.validation_split": config.data.train_split})
    data = build_data(config, validation_only=True)
    total = data.num_validation_examples
    images: list[np.ndarray] = []
    for index in np.random.default_rng(config.seed).permutation(total):
        if len(images) == count:
            break
        try:
            images.append(data.read_validation_example(int(index))[1])
        except READ_ERRORS as error:
            if is_temporary(error):
                # Another image in its place would calibrate the network differently.
                raise BucketUnavailableError(
                    f"training image {index} cannot be read: {reason_of(error)}"
                ) from None
            logging.warning("training image %d is left out: %s", index, first_line(error))
    if not images:
        raise UsageError(f"none of the {total:,} training images is readable: check the files")
    return np.stack(images)


def check_quantized(expected: np.ndarray, outputs: np.ndarray, source: str) -> tuple[float, float]:
    """Checks that quantized outputs still distinguish images.

    That is, the error is smaller than the differences between images, or than one step of 1/256.

    Args:
      expected: float32 [n, classes], probabilities of the network.
      outputs: those of its quantization, likewise.
      source: name of what computed them, for the error message.

    Returns:
      The largest difference and the largest probability.

    Raises:
      AgreementError: the error is larger.
    """
    error = float(np.sqrt(np.mean((outputs - expected) ** 2)))
    variation = float(np.sqrt(np.mean((expected - expected.mean(axis=0)) ** 2)))
    # Written so that a NaN fails too.
    if not error <= max(variation, 1 / 256):
        raise AgreementError(
            f"{source} has a root mean square error of {error:.3g} in its probabilities, but those"
            f" of different images differ by {variation:.3g} only: export it without quantization"
        )
    return float(np.max(np.abs(outputs - expected))), float(np.max(expected))


def compare_accuracy(
    model: keras.Model,
    quantized: keras.Model,
    data: pipeline.Data,
    class_names: tuple[str, ...],
    global_batch_size: int,
    num_examples: int,
) -> QuantizationReport:
    """Evaluates a network and its quantization on the validation images.

    Args:
      model, quantized: map images to logits.
      data: data whose validation examples are evaluated, with classes of the network only.
      class_names: classes of the outputs, in order.
      global_batch_size: images per step.
      num_examples: number of training images used for the quantization.
    """
    evaluate = Evaluator(
        [model, quantized],
        data,
        tf.distribute.get_strategy(),
        global_batch_size,
        class_names=class_names,
    )
    before, after, _ = evaluate(label="float32 and int8")
    classes = [predictions.classes for predictions in evaluate.predictions]
    return QuantizationReport(
        num_examples=num_examples,
        num_validation_examples=before["examples"],
        accuracy_before=before["accuracy"],
        accuracy_after=after["accuracy"],
        same_class=float(np.mean(classes[0] == classes[1])),
    )
