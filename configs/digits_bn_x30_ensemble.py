"""Member 1 to 6 of the ensemble in miniature on scikit-learn's digits; see digits_inception.py.

    bn-keras train --config=digits_bn_x30_ensemble:1 --workdir=runs/digits_ensemble_1

bn_x30_ensemble.py describes the members. Half a minute on one core each. Expected: 93% to 99%
validation accuracy at best. Evaluate the six together with

    bn-keras evaluate --workdir=runs/digits_ensemble_1 ... --workdir=runs/digits_ensemble_6
"""

from ml_collections import ConfigDict

from bn_keras.training import networks

from . import digits_inception


def get_config(number: str = "1") -> ConfigDict:
    return networks.derive_member(digits_inception.get_config(), number)
