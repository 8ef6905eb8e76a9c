"""The paper's own numbers, all of ImageNet: what ours stand beside, and never among.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 4.2.
"""

from typing import NamedTuple

from bn_keras.experiments.titles import BASELINE, INCEPTION, X5, X5_SIGMOID, X30
from bn_keras.runs.history import Run

CITATION = "[Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167)"


class Network(NamedTuple):
    """A row of Figure 3.

    Attributes:
      steps: of 32 images, to Inception's best accuracy; None: it is never reached.
      best_accuracy: on the validation images, of a single crop.
    """

    steps: int | None
    best_accuracy: float


# Source: Ioffe & Szegedy 2015, Figure 3; the steps and Inception's best are Figure 2's diamonds.
FIGURE_3 = {
    INCEPTION: Network(31_000_000, 0.722),
    BASELINE: Network(13_300_000, 0.727),
    X5: Network(2_100_000, 0.730),
    X30: Network(2_700_000, 0.748),
    X5_SIGMOID: Network(None, 0.698),
}

# By which the others are measured there.
INCEPTION_ON_IMAGENET = FIGURE_3[INCEPTION].best_accuracy

# Training images of ImageNet: ILSVRC 2012.
NUM_TRAIN_EXAMPLES = 1_281_167

# Steps after which BN-x30 has its best accuracy. Source: Ioffe & Szegedy 2015, section 4.2.2.
STEPS_OF_BN_X30 = 6_000_000


def is_comparable(run: Run) -> bool:
    """Tells whether a run is of the paper's data, so that its accuracies are of the same kind."""
    return run.config.data.name == "imagenet2012"


class Errors(NamedTuple):
    """A row of Figure 4: errors on the 50,000 validation images.

    Attributes:
      model: as the paper calls it.
      crops: of each image.
      models: of an ensemble, or 1.
      top1, top5: fractions; None where the paper has none.
    """

    model: str
    crops: int
    models: int
    top1: float | None
    top5: float


# Source: Ioffe & Szegedy 2015, Figure 4.
FIGURE_4 = (
    Errors("GoogLeNet ensemble", 144, 7, None, 0.0667),
    Errors("BN-Inception", 1, 1, 0.252, 0.0782),
    Errors("BN-Inception", 144, 1, 0.2199, 0.0582),
    Errors("BN-Inception ensemble", 144, 6, 0.201, 0.049),
)
# Of the ensemble on the test images. Source: Ioffe & Szegedy 2015, section 4.2.3.
ENSEMBLE_TOP5_ON_TEST = 0.0482
