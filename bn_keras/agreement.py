"""Compares the outputs of a network with those of its folded or exported form."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import AgreementError, UsageError
from bn_keras.keras_internals import all_layers

# Distance between 1 and the next larger number.
_MACHINE_EPSILONS = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


def check_agreement(
    model: keras.Model,
    expected: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    source: str,
) -> tuple[float, float]:
    """Checks that outputs agree with a model's to half of their digits.

    That is, they differ by at most sqrt(machine epsilon) of the largest value.

    Args:
      model: model whose dtypes determine the number of digits.
      expected: outputs of the model.
      outputs: outputs to check, of the same shapes.
      source: name of what computed them, for the error message.

    Returns:
      The largest absolute difference, of the output where it is relatively largest, and the
      largest absolute value of that output.

    Raises:
      UsageError: the outputs of the model are not finite, or are 0 where the others are not.
      AgreementError: the outputs agree to fewer than half of their digits.
    """
    if not all(np.isfinite(x).all() for x in expected):
        raise UsageError(
            f"the outputs of model {model.name!r} on the inputs to compare on are not finite: look"
            " for NaN and infinity in the inputs and weights, or pass other inputs"
        )
    differences = [np.max(np.abs(a - b)) for a, b in zip(outputs, expected, strict=True)]
    sizes = [np.max(np.abs(a)) for a in expected]
    relative = [d / (size or 1) for d, size in zip(differences, sizes, strict=True)]
    largest = int(np.argmax(relative))
    difference, size = float(differences[largest]), float(sizes[largest])
    precision = max(_MACHINE_EPSILONS.get(x.compute_dtype, 0) for x in all_layers(model))
    # Written so that a NaN difference fails too.
    if not difference <= precision**0.5 * size:
        if not size:
            raise UsageError(
                f"the outputs of model {model.name!r} on the inputs to compare on are 0, and those"
                f" of {source} reach {difference:.3g}, which may be rounding errors: pass other"
                " inputs"
            )
        raise AgreementError(
            f"{source} computes outputs that differ by up to {difference:.3g} from those of model"
            f" {model.name!r}, which reach {size:.3g}: either the model amplifies rounding errors,"
            " or this is a bug; please report it"
        )
    return difference, size


def has_numbers(output: Any) -> bool:
    """Returns whether an output of a model can be compared: it is neither None nor text."""
    return output is not None and output.dtype != tf.string


def to_float64(values: Any) -> np.ndarray:
    """Returns a variable or tensor as a float64 array."""
    return keras.ops.convert_to_numpy(values).astype(np.float64)
