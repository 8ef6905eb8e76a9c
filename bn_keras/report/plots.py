"""How a report's plots look."""

from collections.abc import Mapping

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

# Okabe and Ito's colours, which colour-blind readers can tell apart, and dashes for grey print.
STYLES = {
    INCEPTION: dict(color="#000000", linestyle="-"),
    BASELINE: dict(color="#E69F00", linestyle=(0, (6, 2))),
    X5: dict(color="#0072B2", linestyle="-"),
    X30: dict(color="#009E73", linestyle=(0, (6, 2, 1, 2))),
    X5_SIGMOID: dict(color="#CC79A7", linestyle=(0, (1.5, 1.5))),
    WITHOUT_BN: dict(color="#D55E00", linestyle=(0, (5, 1.5))),
    WITH_BN: dict(color="#0072B2", linestyle="-"),
}


def draw_bands(axes: Axes, bands: Mapping[str, Mapping[int, Spread]]) -> None:
    """Draws the means over the seeds against steps, and from the lowest to the highest.

    Args:
      axes: to draw on.
      bands: by the titles in STYLES.
    """
    for title, band in bands.items():
        steps, spreads, style = list(band), band.values(), STYLES[title]
        axes.plot(steps, [spread.mean for spread in spreads], linewidth=1.7, **style)
        lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.18, linewidth=0)


def lighten(axes: Axes) -> None:
    """Draws a faint grid in place of the frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
