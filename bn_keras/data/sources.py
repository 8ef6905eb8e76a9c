"""Where examples come from: scikit-learn's digits, generated images, TFDS."""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds

from bn_keras.errors import UsageError

EMBEDDED = ("digits", "synthetic")

# Sets whose decoded images take more than this are read from their files as training goes on.
MEMORY_LIMIT_BYTES = 2**30

SYNTHETIC_POOL = 64
SYNTHETIC_CLASSES = 1000
# ImageNet's number of training examples.
SYNTHETIC_TRAIN_EXAMPLES = 1_281_167
SYNTHETIC_VALIDATION_EXAMPLES = 1_000


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A split held in memory.

    Attributes:
      images: uint8 [pool, H, W, C].
      labels: int32 [pool].
      white: the value of a fully lit pixel.
      num_examples: the pool repeats up to this number: example i is entry i mod pool.
    """

    images: np.ndarray
    labels: np.ndarray
    white: int = 255
    num_examples: int = 0

    def __post_init__(self):
        if not self.num_examples:
            object.__setattr__(self, "num_examples", len(self.labels))


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: its classes and the two splits that are used of it."""

    class_names: tuple[str, ...]
    train: Arrays
    validation: Arrays


def open_source(
    name: str, data_dir: str, train_split: str, validation_split: str, image_size: int
) -> Source:
    """Opens a data set by name.

    Args:
      name: "digits", "synthetic", or a TFDS name.
      data_dir: the folder of prepared TFDS sets; "" is TFDS's own default.
      train_split: its name; TFDS's slices ("train[:90%]") work for TFDS's sets.
      validation_split: likewise.
      image_size: side of the images that "synthetic" generates; others ignore it.

    Raises:
      UsageError: there is no such set or split, or it has no images with labels.
    """
    if name in EMBEDDED:
        if name == "digits":
            class_names, splits = tuple("0123456789"), _digits()
        else:
            class_names, splits = _synthetic(image_size)
        for split in (train_split, validation_split):
            if split not in splits:
                raise _unknown_split(name, split, splits)
        return Source(class_names, splits[train_split], splits[validation_split])
    return _open_tfds(name, data_dir, train_split, validation_split)


def _digits() -> dict[str, Arrays]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels.

    Of each class the 5th, 10th, 15th, ... example in scikit-learn's order is for validation.
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


def _synthetic(image_size: int) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Coloured noise on a coarse grid, as many examples as ImageNet from a small pool.

    The labels belong to the pool's images, so they can be learned; validation shows the same.
    """
    if image_size < 1:
        raise UsageError(
            f"data.image_size is {image_size}, but 'synthetic' images have no size of their own: "
            "give the side in pixels"
        )
    random = np.random.default_rng(0)
    cells = math.ceil(image_size / 8)
    coarse = random.integers(0, 256, (SYNTHETIC_POOL, cells, cells, 3), np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :image_size, :image_size]
    labels = np.arange(SYNTHETIC_POOL) * SYNTHETIC_CLASSES // SYNTHETIC_POOL
    images, labels = np.ascontiguousarray(images), labels.astype(np.int32)
    return tuple(str(label) for label in range(SYNTHETIC_CLASSES)), {
        "train": Arrays(images, labels, num_examples=SYNTHETIC_TRAIN_EXAMPLES),
        "validation": Arrays(images, labels, num_examples=SYNTHETIC_VALIDATION_EXAMPLES),
    }


def _open_tfds(name: str, data_dir: str, train_split: str, validation_split: str) -> Source:
    tfds.disable_progress_bar()
    builder = _prepared_builder(name, data_dir)
    image, label = _image_and_label(name, builder.info)
    features = builder.info.features
    splits = [
        _tfds_arrays(builder, split, image, label) for split in (train_split, validation_split)
    ]
    return Source(tuple(features[label].names), *splits)


def _prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a set that is on disk, after preparing it where that is needed."""
    if data_dir and not os.path.isdir(data_dir):
        raise UsageError(
            f"data.data_dir {data_dir!r} is not a folder: give the folder that holds the prepared "
            "TFDS sets, or '' for TFDS's default"
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError:
        raise _unknown_name(name) from None
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise UsageError(
                f"data set {name!r} is not in {builder.data_dir} and could not be prepared there "
                f"({_first_line(error)}): set data.data_dir to a folder that holds it, or take "
                "'digits', which needs no download"
            ) from error
    return builder


def _image_and_label(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """The names of the set's image and label features."""
    features = info.features
    keys = info.supervised_keys or ("image", "label")
    if (
        len(keys) == 2
        and all(key in features for key in keys)
        and isinstance(features[keys[0]], tfds.features.Image)
        and isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        return keys
    raise UsageError(
        f"data set {name!r} has no image with a class label (its features: "
        f"{', '.join(features)}): take an image classification set"
    )


def _tfds_arrays(builder: tfds.core.DatasetBuilder, split: str, image: str, label: str) -> Arrays:
    """Reads a whole split, in the order of its files."""
    try:
        builder.info.splits[split]
    except (KeyError, ValueError):
        raise _unknown_split(builder.name, split, builder.info.splits) from None
    examples = builder.as_dataset(split=split, shuffle_files=False, batch_size=-1)
    return Arrays(examples[image].numpy(), examples[label].numpy().astype(np.int32))


def _unknown_name(name: str) -> UsageError:
    known = [*EMBEDDED, *tfds.list_builders()]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return UsageError(
        f"unknown data set {name!r}: {hint}accepted are 'digits' and 'synthetic', which need no "
        "download, and the names of TFDS's image classification sets"
    )


def _unknown_split(name: str, split: str, splits: Iterable[str]) -> UsageError:
    return UsageError(
        f"data set {name!r} has no split {split!r}: it has {', '.join(map(repr, splits))}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
