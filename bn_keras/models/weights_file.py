"""Weights of a saved network, read into another one by the names of the layers."""

import io
import operator
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence

import h5py
import keras
import numpy as np
from etils import epath

from bn_keras.errors import UsageError


def load_weights(model: keras.Model, path: str | os.PathLike, optional: Sequence[str] = ()) -> None:
    """Fills a network with the weights of a file; unless all fit, it is left as it was.

    Keras' own `load_weights` counts layers by class, so that a network with a layer more or less
    gets the weights of other layers, and what does not fit at all is a warning or many lines.

    Args:
      model: whose layers lie side by side, not in one another.
      path: of a .weights.h5 or a .keras file, as Keras 3 writes them.
      optional: beginnings of names of layers which the file may hold though the model does not.

    Raises:
      UsageError: no such file, or one that does not fit; it names what is missing, extra or
        misshapen.
    """
    path = epath.Path(path)
    try:
        given = _read(path)
    # What HDF5 raises on a damaged file is of many kinds.
    except Exception as error:
        raise UsageError(
            f"weights {str(path)!r} can't be read: give the path of a .weights.h5 or .keras file"
        ) from error
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    check_shapes(
        f"weights {str(path)!r} are not of this network: of its {len(layers)} layers",
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
    refusal: str,
    wanted: Mapping[str, object],
    given: Mapping[str, object],
    equal: Callable[[object, object], bool] = operator.eq,
) -> None:
    """Raises UsageError, which names them, if anything is missing, extra or misshapen.

    Args:
      refusal: what the message begins with.
      wanted: the shapes of what has to be there, by name.
      given: the shapes of what is there.
      equal: whether two shapes are as good as equal.
    """
    faults = {
        "missing": [name for name in wanted if name not in given],
        "extra": [name for name in given if name not in wanted],
        "misshapen": [
            f"{name} of {given[name]} instead of {shape}"
            for name, shape in wanted.items()
            if name in given and not equal(given[name], shape)
        ],
    }
    told = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if told:
        raise UsageError(f"{refusal}, {', '.join(told)}")


def _read(path: epath.Path) -> dict[str, list[np.ndarray]]:
    """Gives the weights of each layer that has any, by name."""
    layers = {}

    def add(place: str, group: h5py.Group | h5py.Dataset) -> None:
        # Keras numbers the layers by class and keeps a layer's name beside its own variables; what
        # lies deeper, such as the seeds of a dropout, is not among its weights.
        parts = place.split("/")
        if parts[0] == "layers" and parts[2:] == ["vars"] and len(group):
            layers[group.attrs["name"]] = [group[str(i)][()] for i in range(len(group))]

    with path.open("rb") as file:
        if path.suffix == ".keras":
            # Only what is read from end to end is compared with its checksum.
            with zipfile.ZipFile(file) as archive:
                file = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(file) as opened:
            opened.visititems(add)
    return layers


def _shapes(arrays: Sequence[np.ndarray | keras.Variable]) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in arrays]


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *rest])
