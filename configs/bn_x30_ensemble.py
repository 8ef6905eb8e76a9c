"""Member 1 to 6 of the paper's ensemble on ImageNet: BN-x30 with one or two changes.

    bn-keras train --config=bn_x30_ensemble:1 --workdir=runs/imagenet_ensemble_1

1: initial weights of the convolutions twice as large; 2: dropout 5%; 3: dropout 10%; 4: BN per
activation in module 5b; 5: the changes of 1 and 2; 6: the changes of 3 and 4. The paper lists the
changes but not which member has which; that is our choice. The member's number is its seed.

Expected: 20.1% top-1 and 4.9% top-5 error of all six with 144 crops (the paper's numbers).
Not run by us; on CPUs it would take years.
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import inception


def get_config(number: str = "1") -> ConfigDict:
    config = networks.derive_member(inception.get_config(), number)
    config.train.steps = 6_000_000
    return config
