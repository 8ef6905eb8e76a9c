"""Data sets that need no files: scikit-learn's digits and synthetic images."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bn_keras.data.splits import Arrays
from bn_keras.errors import UsageError

SYNTHETIC_POOL = 64
SYNTHETIC_CLASSES = 1000
SYNTHETIC_VALIDATION_EXAMPLES = 1_000
# Training images of ImageNet (ILSVRC 2012).
IMAGENET_TRAIN_EXAMPLES = 1_281_167


class BuiltIn(NamedTuple):
    """A data set that needs no files.

    Attributes:
      origin: where the set comes from, as a phrase.
      num_classes: number of classes, called "0", "1", ...
      load: returns the splits by name; its argument is data.image_size.
    """

    origin: str
    num_classes: int
    load: Callable[[int], dict[str, Arrays]]


def _load_digits(image_size: int) -> dict[str, Arrays]:
    """Loads scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels.

    The 5th, 10th, 15th, ... example of each class, in scikit-learn's order, is for validation.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[4::5]] = True
    return {
        "train": Arrays(images[~held_out], labels[~held_out], white=16),
        "validation": Arrays(images[held_out], labels[held_out], white=16),
    }


def _make_synthetic(image_size: int) -> dict[str, Arrays]:
    """Generates as many training examples as ImageNet has; both splits repeat the same pool."""
    if image_size < 1:
        raise UsageError(
            f"data.image_size={image_size} is invalid for 'synthetic', whose images have no size of"
            " their own: expected a side in pixels"
        )
    pool = make_pool((image_size, image_size, 3), SYNTHETIC_CLASSES)
    return {
        "train": Arrays(*pool, num_examples=IMAGENET_TRAIN_EXAMPLES),
        "validation": Arrays(*pool, num_examples=SYNTHETIC_VALIDATION_EXAMPLES),
    }


def make_pool(image_shape: tuple[int, int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Generates images of coarse coloured noise, and labels spread evenly over the classes."""
    height, width, channels = image_shape
    random = np.random.default_rng(0)
    cells = (SYNTHETIC_POOL, math.ceil(height / 8), math.ceil(width / 8), channels)
    coarse = random.integers(0, 256, cells, np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    labels = np.arange(SYNTHETIC_POOL) * num_classes // SYNTHETIC_POOL
    return np.ascontiguousarray(images), labels.astype(np.int32)


BUILT_IN = {
    "digits": BuiltIn("part of scikit-learn", 10, _load_digits),
    "synthetic": BuiltIn("generated", SYNTHETIC_CLASSES, _make_synthetic),
}
# Names that TFDS does not have; "folder" is the user's own images.
NOT_IN_TFDS = (*BUILT_IN, "folder")
