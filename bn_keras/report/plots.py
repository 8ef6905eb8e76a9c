"""Line styles and drawing functions that all plots share."""

from collections.abc import Mapping
from typing import NamedTuple

from matplotlib.axes import Axes

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
        axes.plot(steps, [spread.mean for spread in spreads], linewidth=1.7, **style._asdict())
        lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
        axes.fill_between(steps, lows, highs, color=style.color, alpha=0.18, linewidth=0)


def replace_frame_by_grid(axes: Axes) -> None:
    """Draws a faint grid and removes the top and right edges of the frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
