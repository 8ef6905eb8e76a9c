"""Titles of the runs, used in reports and in the names of their folders."""

from bn_keras.training.networks import NETWORKS

WITH_BN, WITHOUT_BN = "with BN", "without BN"

INCEPTION = NETWORKS["inception"].title
BASELINE = NETWORKS["bn_baseline"].title
X5 = NETWORKS["bn_x5"].title
X30 = NETWORKS["bn_x30"].title
X5_SIGMOID = NETWORKS["bn_x5_sigmoid"].title

# Trained for the paper's ratio of Inception's steps to BN-x30's.
LONGER_INCEPTION = "Inception trained longer"
INCEPTION_X5 = "Inception at 5 times the rate"
INCEPTION_X30 = "Inception at 30 times the rate"
SIGMOID = "Inception with sigmoids"
SIGMOID_X5 = "Inception with sigmoids at 5 times the rate"
CONTROL = "Inception with section 4.2.1's changes"
X5_AT_RATE_1 = "BN-x5 at Inception's rate"
X30_AT_HALF = "BN-x30 at half its rate"
# BN-x5 with one change of section 4.2.1 undone, by change.
ABLATIONS = {
    "dropout": "BN-x5 with 40% dropout",
    "decay": "BN-x5 with Inception's decay",
    "distortions": "BN-x5 with full distortions",
    "shuffling": "BN-x5 shuffled by shards only",
    "l2": "BN-x5 with Inception's L2",
    "lrn": "BN-x5 with local response normalization",
}
LONG_MEMORY = "BN-x5 with BN momentum 0.9997"
POPULATION = "BN-x5 with population statistics"
# Factors on the initial weights of the convolutions, besides 1.
WEIGHT_FACTORS = (0.25, 0.5, 2.0, 4.0)


def with_weight_factor(title: str, factor: float) -> str:
    """Returns the title of a network's run with a factor on its initial weights."""
    return f"{title}, initial weights times {factor:g}"


def with_statistical_batch(size: int) -> str:
    """Returns the title of the run of BN-x5 whose statistics come from this many examples."""
    return f"BN-x5 normalized by {size} examples"
