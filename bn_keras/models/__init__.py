"""The paper's networks."""

from bn_keras.models.bn_inception import BNInception, without_auxiliary
from bn_keras.models.mlp import SigmoidMLP

__all__ = ["BNInception", "SigmoidMLP", "without_auxiliary"]
