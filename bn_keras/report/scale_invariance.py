"""Measures how BN responds to a factor on the weights of the layer before it (section 3.3)."""

import dataclasses
import functools
import itertools

import numpy as np
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.report.sections import markdown_table

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
# A negligible epsilon (the layer does not accept 0), and the layer's default.
EPSILONS = (1e-30, 1e-3)
KINDS = ("dense", "convolution")
DTYPES = ("float64", "float32")


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Deviation of BN((aW)u) and its gradients from BN(Wu), relative to the largest absolute value.

    Attributes:
      kind: kind of the layer before BN, one of KINDS.
      dtype: dtype of the computation.
      epsilon: epsilon of the BN layer.
      factor: a.
      output: deviation of BN((aW)u) from BN(Wu).
      to_input: deviation of the gradient with respect to u.
      to_weights: deviation of a times the gradient with respect to aW from the gradient with
        respect to W.
    """

    kind: str
    dtype: str
    epsilon: float
    factor: float
    output: float
    to_input: float
    to_weights: float


@functools.cache
def measure_deviations() -> list[Deviation]:
    """Measures every kind of layer, dtype and epsilon at every factor, once per process.

    The reference is computed in float64 with factor 1. The weights are drawn so that Wu has a
    variance of about 1; the loss is a random weighting of the outputs.

    Source: Ioffe & Szegedy 2015, section 3.3.
    """
    deviations = []
    for kind, epsilon in itertools.product(KINDS, EPSILONS):
        expected = _run_layer(kind, "float64", epsilon, 1.0)
        for dtype, factor in itertools.product(DTYPES, FACTORS):
            parts = map(_relative, _run_layer(kind, dtype, epsilon, factor), expected)
            deviations.append(Deviation(kind, dtype, epsilon, factor, *parts))
    return deviations


def largest_deviation(part: str, **conditions: str | float) -> float:
    """Returns the largest deviation of a part among the measurements that meet the conditions.

    Args:
      part: "output", "to_input" or "to_weights".
      **conditions: values of other attributes of `Deviation`.
    """
    return max(
        getattr(deviation, part)
        for deviation in measure_deviations()
        if all(getattr(deviation, name) == value for name, value in conditions.items())
    )


def describe_deviations() -> list[str]:
    """Returns the measurements in Markdown: a paragraph and a table."""
    parts = {
        "output": "BN((aW)u)",
        "to_input": "gradient w.r.t. u",
        "to_weights": "a x gradient w.r.t. aW",
    }
    columns = list(itertools.product(DTYPES, parts))
    header = ["epsilon", "a", *(f"{parts[part]}, {dtype}" for dtype, part in columns)]
    rows = [
        (
            f"{epsilon:g}",
            f"{factor:g}",
            *(
                f"{largest_deviation(part, epsilon=epsilon, factor=factor, dtype=dtype):.1g}"
                for dtype, part in columns
            ),
        )
        for epsilon, factor in itertools.product(EPSILONS, FACTORS)
    ]
    tiny, default = EPSILONS
    terms = (
        "Measured with this package's layer when this report was made, after a dense layer and a"
        " convolution with weights aW, where the variance of Wu is about 1. The table shows the"
        " larger deviation of the two from the float64 result for a = 1, relative to that result's"
        " largest absolute value. Section 3.3 omits epsilon; the layer requires epsilon > 0, so"
        f" {tiny:g} replaces 0. With the default epsilon, {default:g}, the statements hold as long"
        " as the variance of aWu is large compared with epsilon."
    )
    return [terms, markdown_table(header, rows, left=0)]


def _run_layer(kind: str, dtype: str, epsilon: float, a: float) -> tuple[np.ndarray, ...]:
    """Computes BN((aW)u), the gradient with respect to u, and a times that with respect to aW."""
    rng = np.random.default_rng(0)
    shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
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
