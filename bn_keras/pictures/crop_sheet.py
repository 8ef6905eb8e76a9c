"""A picture of the crops of an image in multi-crop evaluation."""

import os
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from bn_keras.data.multi_crop import Crop, Crops
from bn_keras.data.single_image import read_image
from bn_keras.errors import UsageError
from bn_keras.pictures.picture_file import check_picture, save_picture

# From Okabe and Ito's palette, which is safe for colour-blind readers; a colour for each square.
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
# Widths of a crop, and of the resized images to the left of the crops.
_CROP_INCHES, _IMAGE_INCHES = 0.8, 3.2


def write_crop_sheet(
    image: str | os.PathLike, crops: Crops, size: int, output: str | os.PathLike
) -> None:
    """Writes a picture of an image's squares at each scale, and of all its crops.

    Each row has the crops of one square at one scale, each column those of one window, mirrored or
    not.

    Args:
      image: path of the image.
      crops: crops to show, more than one.
      size: side of the network's input.
      output: path of the picture; its extension selects the format.

    Raises:
      UsageError: the image cannot be read, or the crops or the path are invalid.
      StorageError: the picture cannot be written.
    """
    if crops.count == 1:
        raise UsageError("a single crop is the centre of the image: choose several crops")
    check_picture(output)
    decoded = read_image(image)
    listed = crops.list_crops(size)
    cut = crops.cut(crops.extract_squares(decoded[tf.newaxis], size), size).numpy()
    cut = np.clip(np.round(cut), 0, 255).astype(np.uint8)
    pixels = decoded.numpy()
    columns = crops.windows * crops.mirrors
    rows = len(listed) // columns
    figure = Figure(
        figsize=(
            _IMAGE_INCHES + 1.2 + columns * _CROP_INCHES,
            1.1 + max(rows * _CROP_INCHES, crops.scales * 1.2),
        ),
        layout="constrained",
    )
    title = f"{os.path.basename(image)}: {crops.count} crops of {size}x{size} pixels"
    figure.suptitle(title, parse_math=False)
    widths = (_IMAGE_INCHES, 1.2 + columns * _CROP_INCHES)
    [[left, right]] = figure.subfigures(1, 2, squeeze=False, width_ratios=widths)
    # With shared axes, all images are drawn to the scale of the largest.
    scales = left.subplots(crops.scales, sharex=True, sharey=True, squeeze=False)
    for axes, side in zip(scales.flat, crops.shorter_sides(size), strict=True):
        _draw_scale(axes, pixels, side, {crop.square for crop in listed}, size)
    _draw_grid(right, listed, cut, columns, is_wide=pixels.shape[1] >= pixels.shape[0])
    save_picture(figure, output)


def _draw_scale(
    axes: Axes, pixels: np.ndarray, shorter_side: int, squares: set[int], size: int
) -> None:
    """Draws the image at one scale with its squares and, dashed, the centre window."""
    height, width = (round(n * shorter_side / min(pixels.shape[:2])) for n in pixels.shape[:2])
    axes.imshow(pixels, extent=(0, width, height, 0))
    for square in sorted(squares):
        top, left = ((n - shorter_side) * square // 2 for n in (height, width))
        # Different insets keep shared edges of the squares apart.
        inset = shorter_side * (square + 1) / 100
        side = shorter_side - 2 * inset
        _draw_box(axes, left + inset, top + inset, side, color=_COLOURS[square], linewidth=1.8)
    _draw_box(axes, (width - size) / 2, (height - size) / 2, size, color="w", linestyle="--")
    axes.set_title(f"{height}x{width} pixels", fontsize=8)
    axes.set_axis_off()


def _draw_box(axes: Axes, left: float, top: float, side: float, **style: Any) -> None:
    axes.add_patch(Rectangle((left, top), side, side, fill=False, **style))


def _draw_grid(
    figure: SubFigure, listed: list[Crop], cut: np.ndarray, columns: int, is_wide: bool
) -> None:
    """Draws all crops, with windows named on top, and scales and squares on the left."""
    grid = figure.subplots(len(listed) // columns, columns, squeeze=False)
    for axes, crop, picture in zip(grid.flat, listed, cut, strict=True):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=_COLOURS[crop.square], linewidth=1.5)
    for axes, crop in zip(grid[0], listed, strict=False):
        mirrored = ",\nmirrored" if crop.mirrored else ""
        axes.set_title(f"{_WINDOWS[crop.window]}{mirrored}", fontsize=7)
    for axes, crop in zip(grid[:, 0], listed[::columns], strict=True):
        label = f"{crop.shorter_side}\n{_SQUARES[is_wide][crop.square]}"
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
