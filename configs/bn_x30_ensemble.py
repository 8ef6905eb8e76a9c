"""A member, 1 to 6, of the paper's ensemble on ImageNet: BN-x30 with some changes.

    python -m launch.train --config=configs/bn_x30_ensemble.py:1 --workdir=runs/imagenet_ensemble_1

1: initial weights of the convolutions twice as large; 2: dropout 5%; 3: dropout 10%; 4: BN per
activation in module 5b; 5: as 1 and 2 together; 6: as 3 and 4 together. Which member has which
change is our choice: the paper only says what was changed. Each has a seed of its own.

Expected: 20.1% top-1 and 4.9% top-5 error of all six with 144 crops (the paper's numbers).
This run has not been made here; on CPUs alone it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config(number: str = "1") -> ConfigDict:
    config = networks.derive_member(inception.get_config(), number)
    config.train.steps = 6_000_000
    return config.lock()
