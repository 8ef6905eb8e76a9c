"""The comparison of Figure 3 with an Inception that is trained as long as the paper's."""

from matplotlib.figure import Figure

from bn_keras.errors import UsageError
from bn_keras.experiments.titles import INCEPTION, LONGER_INCEPTION
from bn_keras.report import published
from bn_keras.report.figure_2 import draw_accuracy
from bn_keras.report.figure_3 import compare_numbers, describe_fastest
from bn_keras.report.five_networks import FiveNetworks
from bn_keras.report.margins import NotRunError, ended_runs
from bn_keras.report.plots import FIGURE_WIDTH
from bn_keras.report.sections import Section
from bn_keras.runs.history import Results

_PLOT = "claims_longer_inception.svg"


def select_with_longer_inception(results: Results) -> FiveNetworks:
    """Selects the five networks, with the longer run in place of Inception's.

    Raises:
      NotRunError: the longer run is missing or unfinished, or the networks share no seed with it.
    """
    longer = ended_runs(results, LONGER_INCEPTION)
    try:
        return FiveNetworks.select({**results, INCEPTION: longer})
    except UsageError as error:
        raise NotRunError(str(error)) from None


def build_longer_inception(networks: FiveNetworks) -> Section:
    """Builds Figures 2 and 3 with the longer run.

    Args:
      networks: see `select_with_longer_inception`.
    """
    figure = Figure(figsize=(FIGURE_WIDTH, 3.6), layout="constrained")
    draw_accuracy(figure.subplots(), networks)
    body = (
        _explain_length(networks.results[INCEPTION][0].config.train.steps),
        f"![Validation accuracy against training steps, with a longer run of Inception]({_PLOT})",
        "A diamond marks the first evaluation at which a line reaches Inception's highest point"
        " (thin grey line).",
        compare_numbers(networks),
    )
    return Section(
        "Inception trained as long as in the paper",
        "\n\n".join(body),
        {_PLOT: figure},
        " ".join(f"With a longer run of Inception: {s}" for s in describe_fastest(networks)),
    )


def _explain_length(steps: int) -> str:
    inception, x30 = published.INCEPTION_STEPS, published.X30_STEPS_TO_BEST
    return (
        f"The paper's Inception trains for {inception / 1e6:.0f} million steps, where BN-x30 is"
        f" best after {x30 / 1e6:.0f} million. In this proportion, Inception trains for {steps:,}"
        " steps here. Its first steps, and the other networks, are those of Figure 2."
    )
