"""Replaces Keras' BN layers in a model, and imports other projects' weights of BN-Inception."""

from bn_keras.convert.importers import convert_weights, from_pytorch, from_slim
from bn_keras.convert.replace import replace_batch_norm

__all__ = ["convert_weights", "from_pytorch", "from_slim", "replace_batch_norm"]
