"""What a factor on the weights in front of BN changes, measured with the layer itself."""

import dataclasses
import functools
import itertools

import numpy as np
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.report.page import table

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
# The layer's own, and one that is nothing beside any variance here: the layer refuses 0.
EPSILONS = (1e-30, 1e-3)
KINDS = ("dense", "convolution")
DTYPES = ("float64", "float32")


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far BN((aW)u) is from BN(Wu), each as a part of the largest absolute value for W.

    Attributes:
      kind: of KINDS.
      dtype: that all was computed in.
      epsilon: of the layer.
      factor: a.
      output: of BN((aW)u) from BN(Wu).
      to_input: of the gradients with respect to u.
      to_weights: of a times the gradient with respect to aW, from the one with respect to W.
    """

    kind: str
    dtype: str
    epsilon: float
    factor: float
    output: float
    to_input: float
    to_weights: float


def measure() -> list[Deviation]:
    """Measures every kind of layer, dtype and epsilon at every factor.

    What is expected is computed in float64. The weights are drawn so that Wu has a variance of 1
    or so, and the loss is a random weighting of the outputs.

    Source: Ioffe & Szegedy 2015, section 3.3.
    """
    deviations = []
    for kind, epsilon in itertools.product(KINDS, EPSILONS):
        expected = _run(kind, "float64", epsilon, 1.0)
        for dtype, factor in itertools.product(DTYPES, FACTORS):
            parts = map(_relative, _run(kind, dtype, epsilon, factor), expected)
            deviations.append(Deviation(kind, dtype, epsilon, factor, *parts))
    return deviations


@functools.cache
def measured() -> list[Deviation]:
    """Measures once in a process."""
    return measure()


def worst(part: str, **conditions: object) -> float:
    """Gives the largest deviation of a part, under conditions.

    Args:
      part: "output", "to_input" or "to_weights".
      conditions: values of the other attributes of a `Deviation`.
    """
    return max(
        getattr(deviation, part)
        for deviation in measured()
        if all(getattr(deviation, name) == value for name, value in conditions.items())
    )


def describe() -> list[str]:
    """Gives what was measured as Markdown: a paragraph and a table."""
    parts = {
        "output": "BN((aW)u)",
        "to_input": "gradient to u",
        "to_weights": "a times that to aW",
    }
    columns = list(itertools.product(DTYPES, parts))
    header = ["epsilon", "a", *(f"{parts[part]}, {dtype}" for dtype, part in columns)]
    rows = [
        (
            f"{epsilon:g}",
            f"{factor:g}",
            *(
                f"{worst(part, epsilon=epsilon, factor=factor, dtype=dtype):.1g}"
                for dtype, part in columns
            ),
        )
        for epsilon, factor in itertools.product(EPSILONS, FACTORS)
    ]
    tiny, usual = EPSILONS
    terms = (
        "Measured with this package's layer when the report was made, behind a dense layer and a"
        " convolution with weights W times a, where the variance of Wu is about 1. Each number is"
        " the larger of the two layers' deviations from what float64 gives for a = 1, as a part of"
        " the largest value. Section 3.3 leaves epsilon out; our layer doesn't take 0, for which"
        f" {tiny:g} stands here. With the default, {usual:g}, the statements hold as long as the"
        " variance of aWu is large beside it."
    )
    return [terms, table(header, rows, left=0)]


def _run(kind: str, dtype: str, epsilon: float, a: float) -> tuple[np.ndarray, ...]:
    """Gives BN((aW)u), the gradient with respect to u, and a times that with respect to aW."""
    rng = np.random.default_rng(0)
    if kind == "dense":
        shape, kernel_shape, fan_in = (64, 20), (20, 10), 20
    else:
        shape, kernel_shape, fan_in = (8, 10, 10, 3), (3, 3, 3, 10), 27
    u = tf.Variable(rng.normal(size=shape), dtype=dtype)
    kernel = rng.normal(size=kernel_shape) / np.sqrt(fan_in)
    weights = tf.Variable(a * kernel, dtype=dtype)
    layer = BatchNormalization(epsilon=epsilon, dtype=dtype)
    with tf.GradientTape() as tape:
        x = u @ weights if kind == "dense" else tf.nn.conv2d(u, weights, 1, "SAME")
        y = layer(x, training=True)
        loss = tf.reduce_sum(tf.constant(rng.normal(size=y.shape), dtype) * y)
    to_input, to_weights = tape.gradient(loss, (u, weights))
    return y.numpy(), to_input.numpy(), a * to_weights.numpy()


def _relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
