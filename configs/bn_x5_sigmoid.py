"""The paper's BN-x5-Sigmoid on ImageNet: BN-x5 with sigmoids instead of ReLUs.

    bn-keras train --config=bn_x5_sigmoid --workdir=runs/imagenet_bn_x5_sigmoid

Expected: 69.8% top-1 at best (the paper's numbers).
Not run by us; on CPUs it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    config = networks.derive(inception.get_config(), "bn_x5_sigmoid")
    config.train.steps = 6_000_000
    return config
