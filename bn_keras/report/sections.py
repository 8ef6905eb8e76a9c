"""Sections of a report, and functions that write their Markdown."""

import dataclasses
import html
import re
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from bn_keras.runs.history import Results
from bn_keras.text import align


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
      title: heading, plain text.
      body: Markdown; HTML in it is shown as text. A plot appears as an image,
        ![description](name.svg). Names chosen by a user are passed through `escape`.
      plots: figures by file name, each shown once in the body.
      summary: the results in one or two sentences, for the beginning of the report; Markdown.
    """

    title: str
    body: str
    plots: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    summary: str = ""


def escape(text: str) -> str:
    """Returns Markdown that shows a text literally and on one line, even in a table cell."""
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return html.escape(text, quote=False)


def join_words(words: Iterable[str]) -> str:
    """Returns an enumeration, such as "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Returns a table in Markdown, padded so that its columns are aligned in a terminal too.

    Args:
      header: Markdown, one entry per column.
      rows: Markdown, one entry per column.
      left: number of leading text columns, aligned left; the other columns are numbers, aligned
        right.
    """
    lines = align([header, *rows], left, min_width=3)
    widths = map(len, lines[0])
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe_divergence(results: Results) -> list[str]:
    """Returns one paragraph on the diverged runs; none if no run diverged."""
    diverged = [
        f"{escape(run.name)} at step {run.diverged_at:,}"
        for runs in results.values()
        for run in runs
        if run.diverged_at is not None
    ]
    if not diverged:
        return []
    return [
        f"**Diverged:** {', '.join(diverged)}. Results up to that step are included. A mean over"
        " seeds ends where the first seed diverges."
    ]
