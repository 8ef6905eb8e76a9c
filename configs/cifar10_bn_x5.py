"""BN-x5 in miniature on CIFAR-10; see cifar10_inception.py.

    bn-keras train --config=cifar10_bn_x5 --workdir=runs/cifar10_bn_x5

One to two and a half hours on one core. Expected: 82.3% test accuracy at best (two seeds).
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import cifar10_inception


def get_config() -> ConfigDict:
    return networks.derive(cifar10_inception.get_config(), "bn_x5")
