"""Member 1 to 6 of the ensemble in miniature on CIFAR-10; see cifar10_inception.py.

    bn-keras train --config=cifar10_bn_x30_ensemble:1 --workdir=runs/cifar10_ensemble_1

bn_x30_ensemble.py describes the members. Not run by us. Evaluate the six together with

    bn-keras evaluate --workdir=runs/cifar10_ensemble_1 ... --workdir=runs/cifar10_ensemble_6
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import cifar10_inception


def get_config(number: str = "1") -> ConfigDict:
    return networks.derive_member(cifar10_inception.get_config(), number)
