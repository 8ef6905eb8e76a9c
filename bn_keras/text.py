"""Formats plain text: aligned tables, counted nouns, the first line of an error."""

import math
import re
from collections.abc import Iterable, Sequence


def align(rows: Iterable[Sequence[str]], left: int = 1, min_width: int = 0) -> list[list[str]]:
    """Pads the cells of each column to a common width.

    Args:
      rows: rows of equal length, header included.
      left: number of leading columns to left-align; the others are right-aligned.
      min_width: minimum column width in characters.

    Returns:
      The padded cells, row by row.
    """
    rows = list(rows)
    widths = [max(min_width, *map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def table(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Returns the lines of a table with two spaces between columns; see `align`.

    Line breaks in cells become spaces.
    """
    rows = [[on_one_line(cell) for cell in row] for row in rows]
    return ["  ".join(cells).rstrip() for cells in align(rows, left)]


def on_one_line(text: str) -> str:
    """Replaces line breaks, such as those of a class name, by spaces."""
    return " ".join(text.splitlines())


def counted(count: int, noun: str, plural: str = "") -> str:
    """Returns a number and its noun, such as "1 layer", "1,024 layers" or "2 classes".

    Args:
      count: the number.
      noun: the noun in the singular.
      plural: the noun in the plural; "" appends "s".
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def format_duration(seconds: float) -> str:
    """Formats a duration in its two largest units, such as "2 h 30 min", "3 min 20 s" or "4 s"."""
    # A short time does not round to nothing.
    seconds = round(seconds) or math.ceil(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def first_of(names: Sequence[str], limit: int = 3, separator: str = ", ") -> str:
    """Returns the first names and the number of the others, such as "a, b, c, 2 more"."""
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return separator.join([*names[:limit], *more])


def quoted(names: Sequence[str], limit: int = 5) -> str:
    """Returns the first names in quotation marks and the number of the others; see `first_of`."""
    return first_of([repr(name) for name in names], limit)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class name if the message is empty.

    Drops TensorFlow's prefix "{{node ...}}" and suffix "[Op:...]", and Keras' line before the
    message and its bold type.
    """
    text = getattr(error, "strerror", None) or getattr(error, "message", None) or str(error)
    text = re.sub(r"\x1b\[\d*m|^Exception encountered when calling .*", "", text)
    line = text.strip().partition("\n")[0]
    return re.sub(r"\{\{.*?\}\} ?|\s*\[Op:.*", "", line) or type(error).__name__
