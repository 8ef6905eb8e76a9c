"""The paper's BN-Baseline on ImageNet: Inception with BN before each nonlinearity.

    python -m launch.train --config=configs/bn_baseline.py --workdir=runs/imagenet_bn_baseline

Expected: 72.2% top-1 after 13.3e6 steps, 72.7% at best (the paper's numbers).
This run has not been made here; on CPUs alone it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config() -> ConfigDict:
    return networks.derive(inception.get_config(), "bn_baseline")
