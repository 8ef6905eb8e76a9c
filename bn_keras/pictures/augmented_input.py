"""A gallery of what the network is fed."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

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
# Of a class in a mixed image, to be named.
_MIN_SHARE = 0.005


def write_preview(config: ConfigDict, path: str | os.PathLike, num_examples: int = 8) -> None:
    """Writes a picture of the first training examples, and of validation examples.

    Each training example stands in its column with the same crop and mirror, distorted by the same
    random numbers at several strengths, the config's own among them; below, with RandAugment and
    mixed, where the config says so. keras_cv's gallery would draw the images alike, but has no
    place for the names of the classes and of the rows.

    Args:
      config: as bn_keras/training/config.py.
      path: of the picture, in a format that matplotlib writes by its extension.
      num_examples: columns.

    Raises:
      UsageError: the data can't be had, or the picture can't be written.
    """
    if num_examples < 1:
        raise UsageError(f"{num_examples} examples can't be shown: take 1 or more")
    data = pipeline.open_data(config.data, seed=config.seed)
    rows = list(_rows(data, num_examples))
    figure, axes = plt.subplots(
        len(rows),
        num_examples,
        figsize=(_INCHES * (num_examples + 0.3), _INCHES * (len(rows) + 0.6)),
        layout="constrained",
        squeeze=False,
    )
    shown = None
    with data.naming_errors():
        for cells, (name, batches) in zip(axes, rows, strict=True):
            images, labels, *_ = (part.numpy() for part in next(iter(batches)))
            # Under the same names as the row above, none are needed.
            titled = not np.array_equal(labels, shown)
            shown = labels
            cells[0].set_ylabel(name, fontsize=9)
            # There may be one more than is shown, to make a pair of the last.
            for cell, image, label in zip(cells, images, labels, strict=False):
                _draw(cell, image, data.preprocessing.binary)
                if titled:
                    cell.set_title(_title(label, data.class_names), fontsize=9)
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't write the picture {path}: {error}") from None
    finally:
        plt.close(figure)


def _rows(data: pipeline.Data, num_examples: int) -> Iterator[tuple[str, tf.data.Dataset]]:
    """The names of the rows, and batches whose first is shown in each."""
    strategy, own = tf.distribute.get_strategy(), data.preprocessing
    operations = [f"RandAugment {own.random_augment:g}"] if own.random_augment else []
    mixtures, batch_size = [], num_examples
    if data.mixing:
        alphas = {"MixUp": data.mixing.mixup, "CutMix": data.mixing.cutmix}
        mixtures = [[f"{name} {alpha:g}"] for name, alpha in alphas.items() if alpha]
        batch_size += num_examples % 2
    for strength in sorted({*STRENGTHS, own.distortion}):
        plain = dataclasses.replace(own, distortion=strength, random_augment=0.0)
        is_all = strength == own.distortion and not (operations or mixtures)
        name = f"distortion {strength:g}" + ("\n(this config)" if is_all else "")
        yield name, data.train_batches(strategy, batch_size, preprocessing=plain)
    if operations or mixtures:
        # Two kinds take turns: they are seen in the first two steps.
        for step, mixture in enumerate(mixtures or [[]]):
            name = "\n".join([*operations, *mixture, "(this config)"])
            yield name, data.train_batches(strategy, batch_size, step, mixed=True)
    yield "validation", data.validation_batches(strategy, num_examples)[0]


def _title(label: np.ndarray, class_names: Sequence[str]) -> str:
    """The name of a class, or of those that share a mixed image, the largest first."""
    if label.ndim == 0:
        return _shortened(class_names[label])
    order = [number for number in np.argsort(-label) if label[number] >= _MIN_SHARE]
    return "\n".join(f"{label[n]:.0%} {_shortened(class_names[n])}" for n in order)


def _draw(cell: plt.Axes, image: np.ndarray, binary: bool) -> None:
    pixels = image if binary else (image + 1) / 2
    # What is brighter or darker than can be shown would be clipped with a warning.
    cell.imshow(np.clip(pixels, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
    cell.set_xticks([])
    cell.set_yticks([])


def _shortened(name: str) -> str:
    return name if len(name) <= _TITLE_LENGTH else name[: _TITLE_LENGTH - 1] + "…"
