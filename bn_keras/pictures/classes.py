"""Pictures of a confusion matrix and of the most confident mistakes."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

# More classes have no room for their names and numbers.
_MAX_NAMED_CLASSES = 40
_MAX_NUMBERED_CLASSES = 20
_COLUMNS = 6
_CELL_INCHES = 1.9
_MAX_NAME_LENGTH = 22


class Mistake(NamedTuple):
    """An image that the network assigns to a wrong class.

    Attributes:
      name: name by which a user can find the image.
      image: float32 [H, W, C], the network's input.
      label, predicted: names of the true and of the predicted class.
      probability: probability of the predicted class.
    """

    name: str
    image: np.ndarray
    label: str
    predicted: str
    probability: float


def draw_confusion(class_names: Sequence[str], confusion: np.ndarray) -> Figure:
    """Draws a confusion matrix; colours show the shares of each true class.

    Args:
      class_names: name of each class, in order.
      confusion: int64 [classes, classes], images by true class (row) and predicted class (column).
    """
    count = len(class_names)
    side = min(14.0, max(4.0, 1.8 + 0.38 * count))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if count <= _MAX_NAMED_CLASSES:
        names = [_shorten(name) for name in class_names]
        axes.set_xticks(range(count), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=8, parse_math=False)
    if count <= _MAX_NUMBERED_CLASSES:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=7)
    return figure


def draw_mistakes(mistakes: Sequence[Mistake], binary: bool) -> Figure:
    """Draws a gallery of mistakes in their order; without any, a line of text.

    Args:
      mistakes: mistakes to draw.
      binary: whether pixels are 0 and 1 instead of in [-1, 1].
    """
    rows = max(1, math.ceil(len(mistakes) / _COLUMNS))
    figure = Figure(
        figsize=(_CELL_INCHES * _COLUMNS, (_CELL_INCHES + 0.5) * rows), layout="constrained"
    )
    if not mistakes:
        figure.text(0.5, 0.5, "no mistakes", ha="center")
        return figure
    cells = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for cell in cells:
        cell.axis("off")
    for cell, mistake in zip(cells, mistakes, strict=False):
        pixels = mistake.image if binary else (mistake.image + 1) / 2
        cell.imshow(np.clip(pixels, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
        cell.set_title(
            f"{_shorten(os.path.basename(mistake.name))}\ntrue: {_shorten(mistake.label)}\n"
            f"predicted: {_shorten(mistake.predicted)} ({mistake.probability:.0%})",
            fontsize=7,
            parse_math=False,
        )
    return figure


def _shorten(name: str) -> str:
    # A name that is not UTF-8 contains surrogates, which cannot be drawn.
    name = name.encode(errors="backslashreplace").decode().replace("\n", " ")
    return name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…"
