"""A picture of the augmented input: training examples by distortion, and validation examples."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data, open_data
from bn_keras.errors import UsageError
from bn_keras.pictures.drawing import draw_image, fonts, shorten
from bn_keras.pictures.picture_file import check_picture, save_picture

# Strengths of the photometric distortions: none, and those of the configs of the paper's networks.
STRENGTHS = (0.0, 0.5, 1.0)

# Side of a cell of the grid.
_CELL_INCHES = 1.4
# Longer names of classes are shortened.
_MAX_TITLE_LENGTH = 16
# Smaller weights of a class are not shown for a mixed image.
_MIN_WEIGHT = 0.005


def write_preview(config: ConfigDict, path: str | os.PathLike, num_examples: int = 8) -> None:
    """Writes a picture of the first training examples and of some validation examples.

    Each column shows one training example. Rows show it at several strengths of distortion,
    including the config's own, with the same random numbers: the same crop, mirroring and colour
    changes. Further rows show the config's RandAugment, MixUp and CutMix, and the last row
    validation examples of as many classes as possible.

    Args:
      config: see bn_keras/training/config.py.
      path: path of the picture; its extension selects the format.
      num_examples: number of columns.

    Raises:
      UsageError: the data cannot be opened, or the path or the number of examples is invalid.
      StorageError: the picture cannot be written.
    """
    if num_examples < 1:
        raise UsageError(f"cannot show {num_examples} examples: expected a positive integer")
    check_picture(path)
    data = open_data(config.data, seed=config.seed)
    rows = list(_open_rows(data, num_examples))
    figure = Figure(
        figsize=(_CELL_INCHES * (num_examples + 0.3), _CELL_INCHES * (len(rows) + 0.6)),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), num_examples, squeeze=False)
    labels_above = np.empty(0)
    with data.reporting_errors():
        for cells, (name, batches) in zip(grid, rows, strict=True):
            images, labels, *_ = (part.numpy() for part in next(iter(batches)))
            cells[0].set_ylabel(name, fontsize=9)
            # Mixing needs pairs: the batch may have one image more than there are columns.
            for cell, image, label in zip(cells, images, labels, strict=False):
                draw_image(cell, image, data.preprocessing.binary)
                cell.set(xticks=[], yticks=[])
                if not np.array_equal(labels, labels_above):
                    title = _format_label(label, data.class_names)
                    # A "$" in the name of a class does not begin a formula.
                    cell.set_title(title, fontsize=9, fontfamily=fonts(), parse_math=False)
            labels_above = labels
    save_picture(figure, path)


def _open_rows(
    data: Data, num_examples: int
) -> Iterator[tuple[str, tf.distribute.DistributedDataset]]:
    """Yields the name of each row and a dataset whose first batch it shows."""
    strategy, own = tf.distribute.get_strategy(), data.preprocessing
    operations = [f"RandAugment {own.random_augment:g}"] if own.random_augment else []
    mixtures = []
    batch_size = num_examples
    if data.mixing:
        alphas = {"MixUp": data.mixing.mixup, "CutMix": data.mixing.cutmix}
        mixtures = [f"{name} {alpha:g}" for name, alpha in alphas.items() if alpha]
        batch_size += num_examples % 2
    for strength in sorted({*STRENGTHS, own.distortion}):
        plain = dataclasses.replace(own, distortion=strength, random_augment=0.0)
        is_own = strength == own.distortion and not (operations or mixtures)
        name = f"distortion {strength:g}" + ("\n(this config)" if is_own else "")
        yield name, data.train_batches(strategy, batch_size, preprocessing=plain)
    if operations and not mixtures:
        name = "\n".join([*operations, "(this config)"])
        yield name, data.train_batches(strategy, batch_size)
    # MixUp and CutMix alternate: the first two steps show both.
    for step, mixture in enumerate(mixtures):
        name = "\n".join([*operations, mixture, "(this config)"])
        yield name, data.train_batches(strategy, batch_size, step, mix=True)
    yield "validation", data.validation_sample(strategy, num_examples)


def _format_label(label: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns the name of a class, or the classes of a mixed image, the largest weight first."""
    if label.ndim == 0:
        return shorten(class_names[int(label)], _MAX_TITLE_LENGTH)
    order = [int(number) for number in np.argsort(-label) if label[number] >= _MIN_WEIGHT]
    return "\n".join(
        f"{label[number]:.0%} {shorten(class_names[number], _MAX_TITLE_LENGTH)}" for number in order
    )
