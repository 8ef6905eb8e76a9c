"""Initializers of the networks' kernels."""

from collections.abc import Callable
from typing import Any

import keras

from bn_keras.errors import UsageError

# A keras.initializers.Initializer or a function with the arguments shape and dtype.
Initializer = Callable[..., Any]


def as_initializer(name: str, value: Any) -> Initializer:
    """Returns an argument as an initializer.

    Raises:
      UsageError: the value is neither an initializer nor the name of one.
    """
    try:
        initializer = keras.initializers.get(value)
    except (TypeError, ValueError):
        initializer = None
    if not callable(initializer):
        raise UsageError(
            f"{name}={value!r} is invalid: expected the name of a Keras initializer, such as"
            " 'he_normal', an Initializer, or a function of shape and dtype"
        )
    return initializer


def clone_initializer(initializer: Initializer) -> Initializer:
    """Returns an initializer for one kernel.

    One Initializer draws the same values for all kernels of the same shape, so each kernel needs a
    clone. A function is called for each kernel.
    """
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer
