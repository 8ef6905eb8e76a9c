"""Batch normalization (Ioffe & Szegedy 2015) for TensorFlow and Keras."""

import importlib.util
import os

__version__ = "0.1.0"

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "bn_keras needs TensorFlow and found none: install exactly one of its extras,"
        " 'bn_keras[cpu]', 'bn_keras[gpu]' or 'bn_keras[tpu]'."
    )

# Keras reads it when it is imported; unset, a keras.json could name another backend.
_backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
if _backend != "tensorflow":
    raise ImportError(
        f"bn_keras needs Keras on TensorFlow, but KERAS_BACKEND is {_backend!r}:"
        " set KERAS_BACKEND=tensorflow."
    )

import keras  # noqa: E402

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"bn_keras needs Keras on TensorFlow, but Keras already runs on"
        f" {keras.backend.backend()!r}: import bn_keras first, or set KERAS_BACKEND=tensorflow."
    )

from bn_keras import health  # noqa: E402
from bn_keras.batch_norm import BatchNormalization  # noqa: E402
from bn_keras.convert import replace_batch_norm  # noqa: E402
from bn_keras.fold import fold_batch_norm  # noqa: E402
from bn_keras.models import BNInception, SigmoidMLP  # noqa: E402
from bn_keras.population import estimate_population_statistics  # noqa: E402

__all__ = [
    "BNInception",
    "BatchNormalization",
    "SigmoidMLP",
    "estimate_population_statistics",
    "fold_batch_norm",
    "health",
    "replace_batch_norm",
]
