"""A gallery of what the network is fed."""

import dataclasses
import os
import pathlib

import matplotlib
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data import pipeline
from bn_keras.errors import UsageError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Of the photometric distortion: none, the accelerated networks', the others'.
STRENGTHS = (0.0, 0.5, 1.0)

_INCHES = 1.4
_TITLE_LENGTH = 16


def write_preview(config: ConfigDict, path: str | os.PathLike, num_examples: int = 8) -> None:
    """Writes a picture of the first training examples, and of validation examples.

    Each training example stands in its column with the same crop and mirror, distorted by the same
    random numbers at several strengths, the config's own among them. keras_cv's gallery would draw
    the images alike, but has no place for the names of the classes and of the rows.

    Args:
      config: as configs/default.py.
      path: of the picture, in a format that matplotlib writes by its extension.
      num_examples: columns.

    Raises:
      UsageError: the data can't be had, or the picture can't be written.
    """
    if num_examples < 1:
        raise UsageError(f"{num_examples} examples can't be shown: take 1 or more")
    data = pipeline.open_data(config.data, seed=config.seed)
    strategy = tf.distribute.get_strategy()
    rows = []
    for strength in sorted({*STRENGTHS, config.data.distortion}):
        preprocessing = dataclasses.replace(data.preprocessing, distortion=strength)
        batches = data.train_batches(strategy, num_examples, preprocessing=preprocessing)
        is_own = strength == config.data.distortion
        name = f"distortion {strength:g}" + ("\n(this config)" if is_own else "")
        rows.append((name, batches))
    rows.append(("validation", data.validation_batches(strategy, num_examples)[0]))

    figure, axes = plt.subplots(
        len(rows),
        num_examples,
        figsize=(_INCHES * (num_examples + 0.3), _INCHES * (len(rows) + 0.6)),
        layout="constrained",
        squeeze=False,
    )
    shown = ()
    with data.naming_errors():
        for cells, (name, batches) in zip(axes, rows, strict=True):
            images, labels, *_ = (part.numpy() for part in next(iter(batches)))
            # Under the same names as the row above, none are needed.
            titled = not np.array_equal(labels, shown)
            shown = labels
            cells[0].set_ylabel(name, fontsize=9)
            for cell, image, label in zip(cells, images, labels, strict=True):
                _draw(cell, image, data.preprocessing.binary)
                if titled:
                    cell.set_title(_shortened(data.class_names[label]), fontsize=9)
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't write the picture {path}: {error}") from None
    finally:
        plt.close(figure)


def _draw(cell: plt.Axes, image: np.ndarray, binary: bool) -> None:
    pixels = image if binary else (image + 1) / 2
    # What is brighter or darker than can be shown would be clipped with a warning.
    cell.imshow(np.clip(pixels, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
    cell.set_xticks([])
    cell.set_yticks([])


def _shortened(name: str) -> str:
    return name if len(name) <= _TITLE_LENGTH else name[: _TITLE_LENGTH - 1] + "…"
