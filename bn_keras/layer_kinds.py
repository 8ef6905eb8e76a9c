"""Keras' layers with a kernel, by kind."""

from typing import Any

import keras

Kind = tuple[type[Any], ...]

CONVOLUTIONS: Kind = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
DEPTHWISE: Kind = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE: Kind = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
TRANSPOSED: Kind = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
WITH_KERNEL: Kind = (*CONVOLUTIONS, *DEPTHWISE, *SEPARABLE, *TRANSPOSED, keras.layers.Dense)
