"""A member, 1 to 6, of the ensemble in miniature on scikit-learn's digits; see digits_inception.py.

    python -m launch.train --config=configs/digits_bn_x30_ensemble.py:1 --workdir=runs/digits_ensemble_1

What the numbers mean is said in bn_x30_ensemble.py. A minute of CPU time each; 96.9% to 98.0%
validation accuracy. Together, by

    python -m launch.evaluate --workdir=runs/digits_ensemble_1 ... --workdir=runs/digits_ensemble_6

98.9% (one run of each).
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import digits_inception


def get_config(number: str = "1") -> ConfigDict:
    return networks.derive_member(digits_inception.get_config(), number)
