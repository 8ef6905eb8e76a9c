"""Draws images of a network's input, and names of classes and files in any script."""

import functools

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes

# Installed on some machines; matplotlib's own font has neither Chinese, Japanese and Korean
# characters nor emoji.
_OTHER_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Emoji",
    "Segoe UI Emoji",
)


def draw_image(axes: Axes, image: np.ndarray, binary: bool) -> None:
    """Draws an image [H, W, C] of a network's input.

    Args:
      axes: where it is drawn.
      image: the image.
      binary: whether pixels are 0 and 1 instead of in [-1, 1].
    """
    pixels = image if binary else (image + 1) / 2
    # Clipped because matplotlib warns about values outside [0, 1].
    axes.imshow(np.clip(pixels, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)


def shorten(name: str, max_length: int) -> str:
    """Returns a name that can be drawn; a long one keeps its beginning and its end."""
    # A name that is not UTF-8 contains surrogates, which cannot be drawn.
    name = name.encode(errors="backslashreplace").decode().replace("\n", " ")
    name = "".join(c if ord(c) in _glyphs() else f"U+{ord(c):04X} " for c in name).strip()
    if len(name) <= max_length:
        return name
    end = max_length // 3
    return f"{name[: max_length - end - 1]}…{name[-end:]}"


@functools.cache
def fonts() -> list[str]:
    """Returns the fonts to draw names with, in order of preference."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in _OTHER_FONTS if name in installed)]


@functools.cache
def _glyphs() -> frozenset[int]:
    """Returns the code points of the characters that the fonts have."""
    files = (font_manager.findfont(name) for name in fonts())
    return frozenset().union(*(font_manager.get_font(file).get_charmap() for file in files))
