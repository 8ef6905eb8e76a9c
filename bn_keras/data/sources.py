"""Data sets by name: scikit-learn's digits, synthetic images, a folder of images, or TFDS."""

import math

import numpy as np

from bn_keras.data.folder import open_folder
from bn_keras.data.splits import Arrays, Description, Source, unknown_split
from bn_keras.data.tfds_sets import (
    IMAGENET_TRAIN_EXAMPLES,
    NOT_IN_TFDS,
    describe_tfds,
    locate_tfds,
    open_tfds,
)
from bn_keras.errors import UsageError

SYNTHETIC_POOL = 64
SYNTHETIC_CLASSES = 1000
SYNTHETIC_VALIDATION_EXAMPLES = 1_000


def open_source(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Source:
    """Opens a data set by name.

    Args:
      name: "digits", "synthetic", "folder", or a name in TFDS.
      data_dir: folder of prepared TFDS sets, "" for TFDS's default; for "folder", see
        `open_folder`.
      train_split: name of the split. TFDS sets accept slices, such as "train[:90%]", and "folder"
        accepts percentages.
      validation_split: likewise.
      image_size: side of the images of "synthetic"; other sets ignore it.

    Raises:
      UsageError: there is no such data set or split, or it has no images with labels.
    """
    if name == "folder":
        return open_folder(data_dir, train_split, validation_split)
    if name == "digits":
        class_names, splits = _number_classes(10), _load_digits()
    elif name == "synthetic":
        class_names, splits = _number_classes(SYNTHETIC_CLASSES), _make_synthetic(image_size)
    else:
        return open_tfds(name, data_dir, train_split, validation_split)
    for split in (train_split, validation_split):
        if split not in splits:
            raise unknown_split(name, split, splits)
    return Source(class_names, splits[train_split], splits[validation_split])


def describe(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Description:
    """Describes the data set that `open_source` opens, without downloading it.

    A folder is listed. The arguments are those of `open_source`.

    Raises:
      UsageError: see `open_source`, for errors that do not depend on the data itself.
    """
    if name not in NOT_IN_TFDS:
        return describe_tfds(name, data_dir, train_split, validation_split)
    source = open_source(name, data_dir, train_split, validation_split, image_size)
    return Description(
        source.train.image_shape,
        len(source.class_names),
        source.train.num_examples,
        source.validation.num_examples,
    )


def synthesize(description: Description, image_size: int) -> Source:
    """Generates a source like the described data set, to try a config without its data.

    Args:
      description: description of the data set. A split of unknown size gets SYNTHETIC_POOL
        examples.
      image_size: side of the images if those of the data set differ in size; 0 is one pixel.
    """
    height, width, channels = description.image_shape
    shape = (height or image_size or 1, width or image_size or 1, channels)
    pool = _make_pool(shape, description.num_classes)
    return Source(
        _number_classes(description.num_classes),
        Arrays(*pool, num_examples=description.num_train_examples or 0),
        Arrays(*pool, num_examples=description.num_validation_examples or 0),
    )


def locate(name: str, data_dir: str) -> str:
    """Returns a phrase that says where a data set is, or how it is obtained.

    Raises:
      UsageError: there is no such data set, or data_dir is not a folder.
    """
    if name == "digits":
        return "part of scikit-learn"
    if name == "synthetic":
        return "generated"
    if name == "folder":
        return f"in {data_dir}"
    return locate_tfds(name, data_dir)


def _load_digits() -> dict[str, Arrays]:
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
    pool = _make_pool((image_size, image_size, 3), SYNTHETIC_CLASSES)
    return {
        "train": Arrays(*pool, num_examples=IMAGENET_TRAIN_EXAMPLES),
        "validation": Arrays(*pool, num_examples=SYNTHETIC_VALIDATION_EXAMPLES),
    }


def _make_pool(
    image_shape: tuple[int, int, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Generates images of coarse coloured noise, and labels spread evenly over the classes."""
    height, width, channels = image_shape
    random = np.random.default_rng(0)
    cells = (SYNTHETIC_POOL, math.ceil(height / 8), math.ceil(width / 8), channels)
    coarse = random.integers(0, 256, cells, np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    labels = np.arange(SYNTHETIC_POOL) * num_classes // SYNTHETIC_POOL
    return np.ascontiguousarray(images), labels.astype(np.int32)


def _number_classes(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
