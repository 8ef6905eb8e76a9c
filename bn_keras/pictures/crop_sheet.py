"""A picture of the crops that an image is evaluated by."""

import os

import matplotlib
import numpy as np
import tensorflow as tf

from bn_keras.data.multi_crop import Crops
from bn_keras.data.single_image import read_image
from bn_keras.errors import UsageError

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

# Okabe and Ito's, which colour-blind readers can tell apart.
_COLOURS = ("#E69F00", "#56B4E9", "#CC79A7")
_SQUARES = {True: ("left", "centre", "right"), False: ("top", "centre", "bottom")}
_WINDOWS = {
    (0, 0): "top left",
    (0, 2): "top right",
    (2, 0): "bottom left",
    (2, 2): "bottom right",
    (1, 1): "centre",
    None: "whole square",
}
# Inches of a crop, and of the resized images beside them.
_CROP, _IMAGE = 0.8, 3.2


def draw_crops(
    image: str | os.PathLike, crops: Crops, size: int, output: str | os.PathLike
) -> None:
    """Draws an image's squares at each scale, and every crop, as the network is shown them.

    A row has the crops of one square at one scale, and a column those of one window.

    Args:
      image: path of the image.
      crops: what to show, of which there are several.
      size: side of the network's input.
      output: path of the picture; its ending says in which format.

    Raises:
      UsageError: the image can't be read, or the picture can't be written.
    """
    if crops.count == 1:
        raise UsageError("a single crop is the centre of the image alone: give several crops")
    _, pixels = read_image(image)
    table = crops.table(size)
    shown = crops.cut(crops.take_squares(pixels[tf.newaxis], size), size).numpy()
    shown = np.clip(np.round(shown), 0, 255).astype(np.uint8)
    columns = crops.windows * crops.mirrors
    rows = len(table) // columns
    wide = pixels.shape[1] >= pixels.shape[0]
    figure = plt.figure(
        figsize=(_IMAGE + 1.2 + columns * _CROP, 1.1 + max(rows * _CROP, crops.scales * 1.2)),
        layout="constrained",
    )
    title = f"{os.path.basename(image)}: {crops.count} crops of {size}x{size} pixels"
    figure.suptitle(title, parse_math=False)
    left, right = figure.subfigures(1, 2, width_ratios=(_IMAGE, 1.2 + columns * _CROP))
    # All on one scale of pixels, that of the largest.
    scales = left.subplots(crops.scales, sharex=True, sharey=True, squeeze=False)
    for axes, side in zip(scales.flat, crops.shorter_sides(size), strict=True):
        _draw_scale(axes, pixels.numpy(), side, {crop.square for crop in table}, size)
        axes.set_axis_off()
    grid = right.subplots(rows, columns, squeeze=False)
    for axes, crop, picture in zip(grid.flat, table, shown, strict=True):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=_COLOURS[crop.square], linewidth=1.5)
    for axes, crop in zip(grid[0], table, strict=False):
        mirrored = ",\nmirrored" if crop.mirrored else ""
        axes.set_title(f"{_WINDOWS[crop.window]}{mirrored}", fontsize=7)
    for axes, crop in zip(grid[:, 0], table[::columns], strict=True):
        label = f"{crop.shorter_side}\n{_SQUARES[wide][crop.square]}"
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"picture {output} can't be written: {error}") from None
    finally:
        plt.close(figure)


def _draw_scale(
    axes: Axes, pixels: np.ndarray, shorter_side: int, squares: set[int], size: int
) -> None:
    """The image resized to a scale, with its squares and the size of a window, dashed."""
    height, width = (round(n * shorter_side / min(pixels.shape[:2])) for n in pixels.shape[:2])
    axes.imshow(pixels, extent=(0, width, height, 0))
    for square in sorted(squares):
        top, left = ((n - shorter_side) * square // 2 for n in (height, width))
        # Their common edges side by side, so that each can be seen.
        inset = shorter_side * (square + 1) / 100
        side = shorter_side - 2 * inset
        _draw_box(axes, left + inset, top + inset, side, color=_COLOURS[square], linewidth=1.8)
    _draw_box(axes, (width - size) / 2, (height - size) / 2, size, color="w", linestyle="--")
    axes.set_title(f"{height}x{width} pixels", fontsize=8)


def _draw_box(axes: Axes, left: float, top: float, side: float, **style: object) -> None:
    axes.add_patch(Rectangle((left, top), side, side, fill=False, **style))
