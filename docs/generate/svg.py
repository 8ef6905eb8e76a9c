"""SVG drawings of boxes and arrows, inline in a page and in its colours (docs/style.css)."""

import dataclasses
import html
from collections.abc import Sequence

_LINE_HEIGHT = 16


@dataclasses.dataclass(frozen=True)
class Box:
    """A drawn box; the properties are the points that arrows begin and end at.

    Attributes:
      x, y: the upper left corner, in pixels.
      width, height: in pixels.
    """

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> tuple[float, float]:
        """Middle of the upper edge."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> tuple[float, float]:
        """Middle of the lower edge."""
        return self.x + self.width / 2, self.y + self.height

    @property
    def left(self) -> tuple[float, float]:
        """Middle of the left edge."""
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> tuple[float, float]:
        """Middle of the right edge."""
        return self.x + self.width, self.y + self.height / 2


class Drawing:
    """A drawing of a width and height in pixels.

    Args:
      title: what the drawing shows, for readers who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str = ""
    ) -> Box:
        """Draws a rounded box with centred lines of text; `kind` is a class of style.css."""
        self._parts.append(
            f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            ' rx="4"/>'
        )
        first = y + height / 2 - (len(lines) - 1) * _LINE_HEIGHT / 2
        for i, line in enumerate(lines):
            self.text(x + width / 2, first + i * _LINE_HEIGHT, line)
        return Box(x, y, width, height)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> None:
        """Writes a line of text, vertically centred on y."""
        self._parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
            f' dominant-baseline="central">{html.escape(text)}</text>'
        )

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], kind: str = "", label: str = ""
    ) -> None:
        """Draws a straight arrow, with a label above its middle."""
        self._line(f"M{start[0]:g} {start[1]:g}L{end[0]:g} {end[1]:g}", kind)
        if label:
            self.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 11, label, kind="small")

    def curve(self, start: tuple[float, float], end: tuple[float, float], kind: str = "") -> None:
        """Draws an arrow that leaves and arrives vertically."""
        middle = (start[1] + end[1]) / 2
        self._line(
            f"M{start[0]:g} {start[1]:g}C{start[0]:g} {middle:g} {end[0]:g} {middle:g}"
            f" {end[0]:g} {end[1]:g}",
            kind,
        )

    def _line(self, path: str, kind: str) -> None:
        self._parts.append(f'<path class="line {kind}" d="{path}" marker-end="url(#arrowhead)"/>')

    def __str__(self) -> str:
        """Returns a <figure> with the drawing, in one line as Markdown requires."""
        width, height = self._size
        head = (
            '<marker id="arrowhead" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            ' markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"/></marker>'
        )
        title = html.escape(self._title)
        return (
            f'<figure class="diagram"><svg viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
            f' role="img" aria-label="{title}"><title>{title}</title><defs>{head}</defs>'
            f"{''.join(self._parts)}</svg></figure>"
        )
