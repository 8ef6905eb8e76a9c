"""Prints derivatives of batch normalization: by finite differences, by our layer and by Keras'.

    python benchmarks/derivatives.py

The function is the sum of y³ in training mode, for 8 examples of 3 values in float64, along one
direction. Where tf_keras or PyTorch is installed, their derivatives follow.
"""

import importlib.util
import os
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from bn_keras import BatchNormalization

EPSILON = 1e-3
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(1, 2, (8, 3))
DIRECTION = RANDOM.normal(size=X.shape)

# First forward mode; second, reverse over reverse; second, forward over reverse.
Derivatives = tuple[float, float, float]


def finite_differences(step: float = 1e-4) -> tuple[float, float]:
    """Returns the first and the second derivative along DIRECTION, from central differences."""

    def loss(distance: float) -> float:
        x = X + distance * DIRECTION
        return ((x - x.mean(0)) ** 3 / (x.var(0) + EPSILON) ** 1.5).sum()

    low, middle, high = (loss(s * step) for s in (-1, 0, 1))
    return (high - low) / (2 * step), (high - 2 * middle + low) / step**2


def tensorflow_derivatives(layer: Callable[..., tf.Tensor]) -> Derivatives:
    """Returns the derivatives of a Keras layer."""
    x, direction = tf.constant(X), tf.constant(DIRECTION)

    def loss(x):
        return tf.reduce_sum(layer(x, training=True) ** 3)

    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return tf.reduce_sum(tape.gradient(value, x) * direction)

    with tf.autodiff.ForwardAccumulator(x, direction) as first:
        value = loss(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        reverse = slope(x)
    second = tf.reduce_sum(tape.gradient(reverse, x) * direction)
    with tf.autodiff.ForwardAccumulator(x, direction) as forward:
        reverse = slope(x)
    return tuple(float(d) for d in (first.jvp(value), second, forward.jvp(reverse)))


def pytorch_derivatives() -> Derivatives:
    """Returns the derivatives of PyTorch's batch normalization."""
    import torch

    x, direction = torch.tensor(X), torch.tensor(DIRECTION)

    def loss(x):
        y = torch.nn.functional.batch_norm(x, None, None, training=True, eps=EPSILON)
        return (y**3).sum()

    gradient = torch.func.grad(loss)
    second = torch.func.grad(lambda x: (gradient(x) * direction).sum())
    return (
        float(torch.func.jvp(loss, (x,), (direction,))[1]),
        float((second(x) * direction).sum()),
        float((torch.func.jvp(gradient, (x,), (direction,))[1] * direction).sum()),
    )


def main() -> None:
    first, second = finite_differences()
    rows = {
        "finite differences": (first, second, second),
        "bn_keras": tensorflow_derivatives(BatchNormalization(dtype="float64")),
        "Keras": tensorflow_derivatives(keras.layers.BatchNormalization(dtype="float64")),
    }
    if importlib.util.find_spec("tf_keras"):
        import tf_keras

        layer = tf_keras.layers.BatchNormalization(dtype="float64")
        rows["tf_keras"] = tensorflow_derivatives(layer)
    if importlib.util.find_spec("torch"):
        rows["PyTorch"] = pytorch_derivatives()
    print("| | first, forward mode | second, reverse over reverse | second, forward over reverse |")
    print("|---|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |")


if __name__ == "__main__":
    main()
