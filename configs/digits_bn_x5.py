"""BN-x5 in miniature on scikit-learn's digits; see digits_inception.py.

python -m launch.train --config=configs/digits_bn_x5.py --workdir=runs/digits_bn_x5
"""

from ml_collections import ConfigDict

from configs import digits_inception, networks


def get_config() -> ConfigDict:
    return networks.derive(digits_inception.get_config(), "bn_x5")
