"""The paper's BN-x30 on ImageNet: 30 times the learning rate and the changes of section 4.2.1.

    bn-keras train --config=bn_x30 --workdir=runs/imagenet_bn_x30

Expected: 72.2% top-1 after 2.7e6 steps, 74.8% after 6e6 (the paper's numbers).
Not run by us; on CPUs it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    config = networks.derive(inception.get_config(), "bn_x30")
    config.train.steps = 6_000_000
    return config
