"""Loads the weights of a saved network into another network by layer name."""

import io
import operator
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import h5py
import keras
import numpy as np

from bn_keras import storage
from bn_keras.errors import StorageError, UsageError
from bn_keras.text import counted, first_line, first_of

# Prefixes of the names of the head's layers: the classifier and the auxiliary classifier.
HEAD = ("logits", "auxiliary_")

_Shape = TypeVar("_Shape")


def load_weights(model: keras.Model, path: str | os.PathLike, optional: Sequence[str] = ()) -> None:
    """Loads the weights of a network from a file. If any do not fit, the model is unchanged.

    Keras' own `load_weights` matches layers by class and number: an additional layer shifts the
    weights of the others, and a mismatch causes a warning or a message of many lines.

    Args:
      model: model without nested models.
      path: path of a .weights.h5 or .keras file of Keras 3, local or in a bucket.
      optional: prefixes of layer names that the file may contain although the model does not.

    Raises:
      UsageError: the path is not one, or the file cannot be read or does not fit. The message lists
        the first layers that are missing, extra or of the wrong shape.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(
            f"weights={path!r} is invalid: expected the path of a .weights.h5 or .keras file"
        )
    name = os.fspath(path)
    assign_layers(layers_with_weights(model), read_layers(name), f"weights {name!r} do", optional)


def layers_with_weights(model: keras.Model) -> dict[str, keras.Layer]:
    """Returns the layers of a model that have weights, by name, in the model's order."""
    return {layer.name: layer for layer in model.layers if layer.weights}


def assign_layers(
    layers: Mapping[str, keras.Layer],
    given: Mapping[str, Sequence[np.ndarray]],
    subject: str,
    optional: Sequence[str],
) -> None:
    """Assigns weights to layers by name. If any do not fit, no layer is changed.

    Args:
      layers: layers that are assigned, by name.
      given: weights by layer name.
      subject: beginning of the error message, such as "weights 'a.keras' do".
      optional: prefixes of names that may be in `given` although they are not in `layers`.

    Raises:
      UsageError: the weights do not fit. The message lists the first layers that are missing,
        extra or of the wrong shape.
    """
    check_shapes(
        f"{subject} not fit the {counted(len(layers), 'layer')} of this network",
        {name: _shapes(layer.weights) for name, layer in layers.items()},
        {
            name: _shapes(weights)
            for name, weights in given.items()
            if name in layers or not name.startswith(tuple(optional))
        },
    )
    for name, layer in layers.items():
        layer.set_weights(given[name])


def check_shapes(
    mismatch: str,
    expected: Mapping[str, _Shape],
    given: Mapping[str, _Shape],
    equal: Callable[[_Shape, _Shape], bool] = operator.eq,
) -> None:
    """Checks that exactly the expected names and shapes are given.

    Args:
      mismatch: beginning of the error message.
      expected: expected shapes by name.
      given: given shapes by name.
      equal: returns whether a given and an expected shape match.

    Raises:
      UsageError: names are missing or extra, or shapes are wrong. The message lists the first ones.
    """
    faults = {
        "missing": [name for name in expected if name not in given],
        "extra": [name for name in given if name not in expected],
        "of the wrong shape": [
            f"{name} of {given[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in given and not equal(given[name], shape)
        ],
    }
    found = [
        f"{len(names)} {fault} ({first_of(names)})" for fault, names in faults.items() if names
    ]
    if found:
        raise UsageError(f"{mismatch}: {', '.join(found)}")


def read_layers(path: str) -> dict[str, list[np.ndarray]]:
    """Reads the weights of each layer that has any, by layer name.

    Args:
      path: path of a .weights.h5 or .keras file of Keras 3, local or in a bucket.

    Raises:
      UsageError: the file cannot be read.
    """
    if path == "imagenet":
        raise UsageError(
            "weights 'imagenet' do not exist: the package includes no trained weights; train them"
            " with `bn-keras train --config=bn_x5`, or convert those of another project with"
            " `bn-keras convert`, and pass the path of the file"
        )
    try:
        return _read_layers(path)
    except StorageError:
        raise
    # HDF5 raises many kinds of errors for a damaged file.
    except Exception as error:
        raise UsageError(
            f"weights {path!r} cannot be read ({first_line(error)}): expected a .weights.h5 or"
            " .keras file"
        ) from error


def _read_layers(path: str) -> dict[str, list[np.ndarray]]:
    layers = {}

    def add(place: str, group: h5py.Group | h5py.Dataset) -> None:
        # Keras numbers the layers by class and stores each layer's name next to its own variables.
        # Deeper groups, such as the seeds of a dropout, are not among a layer's weights.
        parts = place.split("/")
        if parts[0] == "layers" and parts[2:] == ["vars"] and len(group):
            layers[group.attrs["name"]] = [group[str(i)][()] for i in range(len(group))]

    content = storage.read(path)
    if content is None:
        raise FileNotFoundError("no such file")
    if path.endswith(".keras"):
        # A full read of a zip entry verifies its checksum.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read("model.weights.h5")
    with h5py.File(io.BytesIO(content)) as opened:
        opened.visititems(add)
    return layers


def _shapes(arrays: Sequence[np.ndarray | keras.Variable]) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in arrays]
