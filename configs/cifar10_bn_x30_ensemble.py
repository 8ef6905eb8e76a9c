"""A member, 1 to 6, of the ensemble in miniature on CIFAR-10; see cifar10_inception.py.

    python -m launch.train --config=configs/cifar10_bn_x30_ensemble.py:1 --workdir=runs/cifar10_ensemble_1

What the numbers mean is said in bn_x30_ensemble.py. Nobody has trained the six of them yet. Together
they are evaluated by

    python -m launch.evaluate --workdir=runs/cifar10_ensemble_1 ... --workdir=runs/cifar10_ensemble_6
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import cifar10_inception


def get_config(number: str = "1") -> ConfigDict:
    return networks.derive_member(cifar10_inception.get_config(), number)
