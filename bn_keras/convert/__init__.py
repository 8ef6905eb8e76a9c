"""What comes from elsewhere: Keras' layers in a model, other projects' weights of BN-Inception."""

from bn_keras.convert.layers import replace_batch_norm
from bn_keras.convert.weights import convert_weights, from_pytorch, from_slim

__all__ = ["convert_weights", "from_pytorch", "from_slim", "replace_batch_norm"]
