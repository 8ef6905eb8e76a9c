"""The paper's BN-Baseline on ImageNet: Inception with BN before each nonlinearity.

    bn-keras train --config=bn_baseline --workdir=runs/imagenet_bn_baseline

Expected: 72.2% top-1 after 13.3e6 steps, 72.7% at best (the paper's numbers).
Not run by us; on CPUs it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    return networks.derive(inception.get_config(), "bn_baseline")
