"""Batch normalization (Ioffe & Szegedy 2015) for TensorFlow and Keras.

Importing this package loads only the layer library and its dependencies: TensorFlow, Keras, NumPy
and h5py. The trainer is in the subpackages `data`, `distribute`, `experiments`, `inference`,
`pictures`, `report`, `runs` and `training`.
"""

import importlib.util
import os

__version__ = "0.2.0"

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "bn_keras needs TensorFlow, which is not installed: install exactly one of the extras"
        " 'bn_keras[cpu]', 'bn_keras[gpu]' and 'bn_keras[tpu]'."
    )

# Keras reads this variable on import. Without it, ~/.keras/keras.json could select another backend.
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

from bn_keras.batch_norm import BatchNormalization  # noqa: E402
from bn_keras.convert import (  # noqa: E402
    convert_weights,
    from_pytorch,
    from_slim,
    replace_batch_norm,
)
from bn_keras.cost import Cost, LayerCost, count_cost  # noqa: E402
from bn_keras.errors import UsageError  # noqa: E402
from bn_keras.fold import FoldReport, fold_batch_norm  # noqa: E402
from bn_keras.health import Finding, HealthReport, check_batch_norm  # noqa: E402
from bn_keras.merge import MergeMovingStatistics, merge_moving_statistics  # noqa: E402
from bn_keras.models import BNInception, SigmoidMLP  # noqa: E402
from bn_keras.population import (  # noqa: E402
    LayerReport,
    PopulationReport,
    estimate_population_statistics,
)

__all__ = [
    "BNInception",
    "BatchNormalization",
    "Cost",
    "Finding",
    "FoldReport",
    "HealthReport",
    "LayerCost",
    "LayerReport",
    "MergeMovingStatistics",
    "PopulationReport",
    "SigmoidMLP",
    "UsageError",
    "check_batch_norm",
    "convert_weights",
    "count_cost",
    "estimate_population_statistics",
    "fold_batch_norm",
    "from_pytorch",
    "from_slim",
    "merge_moving_statistics",
    "replace_batch_norm",
]
