"""Pictures of a confusion matrix and of the most confident mistakes."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from bn_keras.pictures.drawing import draw_image, fonts, shorten

# More classes have no room for their names and numbers.
_MAX_NAMED_CLASSES = 40
_MAX_NUMBERED_CLASSES = 20
_COLUMNS = 6
_CELL_INCHES = 1.9
_TEXT_INCHES = 0.5
_MAX_NAME_LENGTH = 22
# In the gallery, a line has about 30 characters.
_MAX_GALLERY_LENGTH = 16


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

    The colours are proportional to the root of the share, so that rare confusions are visible.

    Args:
      class_names: name of each class, in order.
      confusion: int64 [classes, classes], images by true class (row) and predicted class (column).
    """
    count = len(class_names)
    side = min(14.0, max(4.0, 1.8 + 0.38 * count))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    drawn = axes.imshow(shares, cmap="Blues", norm=norm)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    numbers = "" if count <= _MAX_NAMED_CLASSES else " (row of confusion.csv, from 0)"
    axes.set_xlabel(f"predicted class{numbers}")
    axes.set_ylabel(f"true class{numbers}")
    if count <= _MAX_NAMED_CLASSES:
        names = [shorten(name, _MAX_NAME_LENGTH) for name in class_names]
        style: dict[str, Any] = dict(fontsize=8, fontfamily=fonts(), parse_math=False)
        axes.set_xticks(range(count), names, rotation=90, **style)
        axes.set_yticks(range(count), names, **style)
    if count <= _MAX_NUMBERED_CLASSES:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                colour = "white" if norm(shares[row, column]) > 0.6 else "black"
                axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=7)
    return figure


def draw_mistakes(mistakes: Sequence[Mistake], binary: bool) -> Figure:
    """Draws a gallery of mistakes in their order; without any, a line of text.

    Args:
      mistakes: mistakes to draw.
      binary: whether pixels are 0 and 1 instead of in [-1, 1].
    """
    columns = max(2, min(_COLUMNS, len(mistakes)))
    rows = max(1, math.ceil(len(mistakes) / columns))
    height = _CELL_INCHES + _TEXT_INCHES
    figure = Figure(figsize=(_CELL_INCHES * columns, height * rows))
    if not mistakes:
        figure.text(0.5, 0.5, "no mistakes", ha="center")
        return figure
    image_size = (0.94 / columns, 0.94 * _CELL_INCHES / height / rows)
    for index, mistake in enumerate(mistakes):
        row, column = divmod(index, columns)
        # A layout engine and titles would take most of the time.
        axes = figure.add_axes(
            ((column + 0.03) / columns, 1 - (row + 0.98) / rows, *image_size), frame_on=False
        )
        axes.set_axis_off()
        draw_image(axes, mistake.image, binary)
        label, predicted = (
            shorten(name, _MAX_GALLERY_LENGTH) for name in (mistake.label, mistake.predicted)
        )
        figure.text(
            (column + 0.5) / columns,
            1 - (row + 0.03) / rows,
            f"{shorten(os.path.basename(mistake.name), _MAX_NAME_LENGTH)}\ntrue: {label}\n"
            f"predicted {mistake.probability:.0%}: {predicted}",
            ha="center",
            va="top",
            fontsize=7,
            fontfamily=fonts(),
            parse_math=False,
        )
    return figure
