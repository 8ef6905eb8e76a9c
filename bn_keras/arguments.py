"""Checks and converts arguments of the layer's constructor and of the functions of models."""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bn_keras.errors import UsageError

_RENORM_BOUNDS = ("rmax", "rmin", "dmax")


def check_model(model: Any) -> None:
    """Raises UsageError unless an argument is a keras.Model."""
    if not isinstance(model, keras.Model):
        raise UsageError(f"model={model!r} is invalid: expected a keras.Model")


def as_axis(axis: Any) -> int | list[int]:
    """Returns an axis as an int, or several as a list of ints.

    Raises:
      UsageError: an axis is not an integer.
    """
    given = axis.tolist() if isinstance(axis, np.ndarray) else axis
    is_single = isinstance(given, str) or not isinstance(given, Sequence)
    try:
        axes = [operator.index(a) for a in ([given] if is_single else given)]
    except TypeError:
        raise UsageError(
            f"axis={axis!r} is invalid: expected an integer or a list of integers"
        ) from None
    # A list of one axis becomes an int, so that the Keras layer accepts the config.
    return axes[0] if is_single or len(axes) == 1 else axes


def as_bool(name: str, value: Any) -> bool:
    """Returns an argument as a bool; 0 and 1 are accepted.

    Raises:
      UsageError: the value is neither true nor false, such as "False".
    """
    if isinstance(value, bool | np.bool_ | numbers.Integral) and value in (0, 1):
        return bool(value)
    raise UsageError(f"{name}={value!r} is invalid: expected True or False")


def as_momentum(name: str, value: Any) -> Any:
    """Returns a momentum as a float, or the variable that schedules it.

    Raises:
      UsageError: the value is not in [0, 1].
    """
    number = _to_float(read_variables(value))
    if not 0 <= number <= 1:
        raise UsageError(
            f"{name}={value} is invalid: expected the fraction kept, in [0, 1]"
            " (PyTorch's momentum is 1 minus it)"
        )
    return value if is_variable(value) else number


def as_epsilon(value: Any) -> float:
    """Returns epsilon as a float.

    Raises:
      UsageError: the value is not positive and finite.
    """
    number = math.nan if is_variable(value) else _to_float(value)
    if not 0 < number < math.inf:
        raise UsageError(f"epsilon={value} is invalid: expected a positive number")
    return number


def as_positive_integer(name: str, value: Any) -> int:
    """Returns an argument as an int.

    Raises:
      UsageError: the value is not a positive integer.
    """
    if not _is_positive_integer(value):
        raise UsageError(f"{name}={value!r} is invalid: expected a positive integer")
    return int(value)


def as_sizes(name: str, value: Any, expected: str, unknown: bool = False) -> tuple[Any, ...]:
    """Returns an argument as a tuple of positive integers; with `unknown`, a size may be None.

    Raises:
      UsageError: the value is not a sequence of sizes. The message says what is `expected`.
    """

    def is_size(size: Any) -> bool:
        return _is_positive_integer(size) or (unknown and size is None)

    sizes = tuple(value) if isinstance(value, Iterable) else None
    if sizes is None or not all(map(is_size, sizes)):
        raise UsageError(f"{name}={value!r} is invalid: expected {expected}")
    return sizes


def check_positive_number(name: str, value: Any) -> None:
    """Raises UsageError unless an argument is a positive and finite number."""
    if not (isinstance(value, int | float | np.number) and 0 < value < math.inf):
        raise UsageError(f"{name}={value!r} is invalid: expected a positive number")


def check_rate(name: str, value: Any) -> None:
    """Raises UsageError unless an argument is a number in [0, 1), such as the rate of a dropout."""
    if not (isinstance(value, int | float | np.number) and 0 <= value < 1):
        raise UsageError(f"{name}={value!r} is invalid: expected a number in [0, 1)")


def as_size(name: str, value: Any) -> int | None:
    """Returns a number of examples or replicas as an int, or None if none was passed.

    Raises:
      UsageError: the value is not a positive integer.
    """
    return None if value is None else as_positive_integer(name, value)


def as_renorm_clipping(clipping: Any) -> dict[str, Any]:
    """Returns the bounds of batch renormalization by name: floats, None, or variables as they are.

    Raises:
      UsageError: a bound is unknown, negative or not a number, or rmax is less than rmin. Variables
        are checked at their current values.
    """
    if not isinstance(clipping or {}, dict):
        raise UsageError(
            f"renorm_clipping={clipping!r} is invalid: expected a dict of {list(_RENORM_BOUNDS)}"
        )
    bounds = dict(clipping or {})
    if set(bounds) - set(_RENORM_BOUNDS):
        raise UsageError(
            f"Received invalid keys for renorm_clipping: {bounds}; expected {list(_RENORM_BOUNDS)}"
        )
    values = {name: value for name, value in read_variables(bounds).items() if value is not None}
    floats = {name: _to_float(value) for name, value in values.items()}
    for name, number in floats.items():
        if not number >= 0:
            raise UsageError(
                f"{name} should be non-negative in renorm_clipping: {name}={values[name]}; expected"
                " a number, a variable or None"
            )
    rmin, rmax = floats.get("rmin", 0.0), floats.get("rmax", math.inf)
    if rmax < rmin:
        raise UsageError(
            f"rmax should be at least rmin in renorm_clipping: rmax={rmax}, rmin={rmin}"
        )
    return {n: v if is_variable(v) else floats.get(n) for n, v in bounds.items()}


def is_variable(value: Any) -> bool:
    """Returns whether an argument is a variable, whose value may change during training."""
    return isinstance(value, tf.Variable | keras.Variable)


def read_variables(bounds: Any) -> Any:
    """Returns the bounds with the current values of variables in their place."""
    return tf.nest.map_structure(
        # A variable with a copy on each replica has no float().
        lambda bound: _to_float(tf.convert_to_tensor(bound)) if is_variable(bound) else bound,
        bounds,
    )


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0


def _to_float(value: Any) -> float:
    """Returns a number, or NaN, which no check accepts, for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
