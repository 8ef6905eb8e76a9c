"""The paper's own results, all on ImageNet, for comparison with measured ones.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.2.
"""

from typing import NamedTuple

from bn_keras.experiments.titles import BASELINE, INCEPTION, X5, X5_SIGMOID, X30
from bn_keras.runs.history import Run

CITATION = "[Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167)"


class NetworkResult(NamedTuple):
    """A row of Figure 3.

    Attributes:
      steps: steps of 32 images to Inception's best accuracy; None if it is never reached.
      best_accuracy: single-crop validation accuracy.
    """

    steps: int | None
    best_accuracy: float


# Number of classes of ImageNet.
NUM_CLASSES = 1_000

# Learning rate of Inception. Source: Ioffe & Szegedy 2015, section 4.2.2.
INCEPTION_RATE = 0.0015

# Steps at which Inception reaches its best accuracy.
INCEPTION_STEPS = 31_000_000

# Source: Ioffe & Szegedy 2015, Figure 3. The steps and Inception's best accuracy are the diamonds
# of Figure 2.
FIGURE_3 = {
    INCEPTION: NetworkResult(INCEPTION_STEPS, 0.722),
    BASELINE: NetworkResult(13_300_000, 0.727),
    X5: NetworkResult(2_100_000, 0.730),
    X30: NetworkResult(2_700_000, 0.748),
    X5_SIGMOID: NetworkResult(None, 0.698),
}

# Target accuracy to which the steps of all networks are counted.
INCEPTION_ACCURACY = FIGURE_3[INCEPTION].best_accuracy

# Steps at which BN-x30 reaches its best accuracy. Source: Ioffe & Szegedy 2015, section 4.2.2.
X30_STEPS_TO_BEST = 6_000_000


def is_comparable(run: Run) -> bool:
    """Returns whether a run is on the paper's data, so that accuracies can be compared."""
    return run.config.data.name == "imagenet2012"


class ErrorRates(NamedTuple):
    """A row of Figure 4: errors on the 50,000 validation images.

    Attributes:
      model: name in the paper.
      crops: number of crops of each image.
      models: number of networks; 1 for a single network.
      top1, top5: errors as fractions; None if the paper has no number.
    """

    model: str
    crops: int
    models: int
    top1: float | None
    top5: float


# Source: Ioffe & Szegedy 2015, Figure 4.
GOOGLENET_ENSEMBLE = ErrorRates("GoogLeNet ensemble", 144, 7, None, 0.0667)
FIGURE_4 = (
    GOOGLENET_ENSEMBLE,
    ErrorRates("BN-Inception", 1, 1, 0.252, 0.0782),
    ErrorRates("BN-Inception", 144, 1, 0.2199, 0.0582),
    ErrorRates("BN-Inception ensemble", 144, 6, 0.201, 0.049),
)
# Top-5 error of the ensemble on the test images. Source: Ioffe & Szegedy 2015, section 4.2.3.
ENSEMBLE_TOP5_ON_TEST = 0.0482
