"""The paper's BN-x5 on ImageNet: 5 times the learning rate, and section 4.2.1's changes.

    python -m launch.train --config=configs/bn_x5.py --workdir=runs/imagenet_bn_x5

Expected: 72.2% top-1 after 2.1e6 steps, 73.0% at best (the paper's numbers).
This run has not been made here; on CPUs alone it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    config = networks.derive(inception.get_config(), "bn_x5")
    config.train.steps = 6_000_000
    return config
