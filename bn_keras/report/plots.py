"""Line styles and drawing functions that all plots share."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    NullLocator,
    StrMethodFormatter,
)

from bn_keras.experiments.titles import (
    BASELINE,
    INCEPTION,
    WITH_BN,
    WITHOUT_BN,
    X5,
    X5_SIGMOID,
    X30,
)
from bn_keras.runs.history import Spread

# Width in inches. On a phone, the page shrinks a plot to about three quarters, and 10 pt stay
# readable.
FIGURE_WIDTH = 5.2

_Dashes = tuple[float, tuple[float, ...]]


class LineStyle(NamedTuple):
    """Arguments of the same names for `Axes.plot`."""

    color: str
    linestyle: str | _Dashes = "-"


# Okabe and Ito's palette is safe for colour-blind readers; dashes keep lines apart in grey print.
STYLES = {
    INCEPTION: LineStyle("#000000"),
    BASELINE: LineStyle("#E69F00", (0, (6, 2))),
    X5: LineStyle("#0072B2"),
    X30: LineStyle("#009E73", (0, (6, 2, 1, 2))),
    X5_SIGMOID: LineStyle("#CC79A7", (0, (1.5, 1.5))),
    WITHOUT_BN: LineStyle("#D55E00", (0, (5, 1.5))),
    WITH_BN: LineStyle("#0072B2"),
}


def draw_bands(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Draws means over seeds against steps, with a band from the lowest to the highest seed.

    Args:
      axes: axes to draw on.
      bands: spread by step, for titles in STYLES.
    """
    for title, band in bands.items():
        steps, spreads, style = list(band), band.values(), STYLES[title]
        means = [spread.mean for spread in spreads]
        axes.plot(steps, means, linewidth=1.7, label=title, **style._asdict())
        lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
        axes.fill_between(steps, lows, highs, color=style.color, alpha=0.18, linewidth=0)


def format_percent(axis: Axis) -> None:
    """Formats an axis of fractions as percentages, with as many digits as they need."""
    axis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:g}%"))


def scale_logarithmically(axes: Axes, ticks: Sequence[float]) -> None:
    """Makes the x-axis logarithmic, with ticks at these numbers only."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def replace_frame_by_grid(axes: Axes) -> None:
    """Draws a faint grid and removes the top and right edges of the frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Draws bands as `draw_bands` does, on an axis of training steps that begins at 0."""
    draw_bands(axes, bands)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    replace_frame_by_grid(axes)


def label_lines(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Writes each line's title beside its end, or in a legend if lines end far from each other."""
    ends = [max(band) for band in bands.values() if band]
    if ends and min(ends) < max(ends) / 2:
        # Beside the end of a short line, its title would hide a longer one.
        axes.legend(loc="best")
    else:
        _label_ends(axes, bands)


def _label_ends(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Stacks the titles so that they do not overlap."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for title, band in bands.items():
        if band:
            end = max(band), band[max(band)].mean
            ends.append((*to_axes.transform(end), end, title))
    ends.sort(key=lambda end: end[1])
    # Height of a title, and its distance from the line's end, as fractions of the axes.
    font_size = rcParams["font.size"] / 72 * axes.figure.dpi
    height, distance = 1.3 * font_size / axes.bbox.height, 0.09
    level = -height
    for number, (x, y, end, title) in enumerate(ends, start=1):
        still_above = (len(ends) - number) * height
        level = max(min(max(y, 0.0), 1 - still_above), level + height)
        axes.annotate(
            title,
            end,
            xytext=(x + distance, level),
            textcoords="axes fraction",
            verticalalignment="center",
            annotation_clip=False,
            bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1),
            arrowprops=dict(
                arrowstyle="-",
                color=STYLES[title].color,
                linewidth=1,
                shrinkA=0,
                shrinkB=1,
                relpos=(0, 0.5),
            ),
        )
