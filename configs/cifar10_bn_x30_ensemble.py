"""Member 1 to 6 of the ensemble in miniature on CIFAR-10; see cifar10_inception.py.

    bn-keras train --config=cifar10_bn_x30_ensemble:1 --workdir=runs/cifar10_ensemble_1

bn_x30_ensemble.py describes the members. They have a third of the other networks' steps, with a
decay that is faster in proportion: about half an hour on one core each. As in the paper, they are
trained on crops of varying size, since evaluation with many crops enlarges parts of the images.
Evaluate the six together with

    bn-keras evaluate --crops=4x1x6x2 --workdir=runs/cifar10_ensemble_1 ... --workdir=runs/cifar10_ensemble_6
"""

from ml_collections import ConfigDict

from bn_keras.runs.settings import replaced
from bn_keras.training import networks

from . import cifar10_inception


def get_config(number: str = "1") -> ConfigDict:
    config = networks.derive_member(cifar10_inception.get_config(), number)
    return networks.shortened(replaced(config, {"data.crop": "inception"}), 3)
