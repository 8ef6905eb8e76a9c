"""The paper's Inception on ImageNet: no BN, learning rate 0.0015.

    bn-keras train --config=inception --workdir=runs/imagenet_inception

Expected: 72.2% top-1 after 31.0e6 steps (the paper's numbers).
Not run by us; on CPUs it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training.config import default_config


def get_config() -> ConfigDict:
    return default_config()
