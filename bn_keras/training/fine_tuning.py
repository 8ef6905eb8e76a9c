"""Fine-tuning: initial weights from a trained network, and layers that are not trained."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from bn_keras.errors import UsageError
from bn_keras.models.weights_file import HEAD, assign_layers, layers_with_weights
from bn_keras.storage import is_local
from bn_keras.text import counted, first_of


class PretrainedWeights(NamedTuple):
    """The weights of a trained network.

    Attributes:
      source: path of the workdir or the file.
      origin: the source in words, with the step of a run.
      layers: weights by layer name.
      class_names: name of each logit, in order; None if the source does not record them.
      differences: settings that change what the same weights compute, and that differ between the
        source and the network that is initialized, as one text each.
    """

    source: str
    origin: str
    layers: Mapping[str, Sequence[np.ndarray]]
    class_names: tuple[str, ...] | None
    differences: tuple[str, ...] = ()

    def hash(self) -> str:
        """Returns the SHA-256 over the names and weights of all layers."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            digest.update(name.encode())
            for weights in self.layers[name]:
                digest.update(np.ascontiguousarray(weights).tobytes())
        return digest.hexdigest()


class Initialization(NamedTuple):
    """Layers that were initialized from a trained network, and those that were not.

    Attributes:
      weights: the trained network.
      loaded: names of the layers that were loaded.
      new: reason why a layer keeps its random weights, by name.
      unused: names of the source's layers that the network does not have.
      frozen: names of the layers with weights that are not trained.
    """

    weights: PretrainedWeights
    loaded: tuple[str, ...]
    new: dict[str, str]
    unused: tuple[str, ...]
    frozen: tuple[str, ...]

    def describe(self) -> list[str]:
        """Returns lines for the log: what was loaded, what was not and why, what is frozen."""
        lines = [
            f"initial weights of {counted(len(self.loaded), 'layer')} from {self.weights.origin},"
            f" sha256 {self.weights.hash()[:12]}"
        ]
        for reason in dict.fromkeys(self.new.values()):
            names = [name for name, why in self.new.items() if why == reason]
            lines.append(f"new weights: {', '.join(names)} ({reason})")
        if self.unused:
            lines.append(f"not loaded: {', '.join(self.unused)} (not in this network)")
        if self.frozen:
            lines.append(f"frozen: {counted(len(self.frozen), 'layer')} ({first_of(self.frozen)})")
        return lines

    def to_record(self) -> dict[str, Any]:
        """Returns the source, its hash and the layers, for environment.json."""
        source = self.weights.source
        return {
            "source": os.path.abspath(source) if is_local(source) else source,
            "sha256": self.weights.hash(),
            "layers_loaded": len(self.loaded),
            "layers_new": self.new,
            "layers_frozen": len(self.frozen),
        }


def freeze(model: keras.Model, part: str) -> None:
    """Sets trainable=False on the layers up to and including a part of the network.

    BN in these layers is in inference mode.

    Args:
      model: BNInception or SigmoidMLP.
      part: "none", "all_but_head", or a part of the network: "stem" or a module such as "4e" of
        BNInception, the number of a hidden layer such as "2" of SigmoidMLP.

    Raises:
      UsageError: the network has no such part.
    """
    if part == "none":
        return
    part_of = {name: _part_of(name) for name in layers_with_weights(model)}
    parts = list(dict.fromkeys(p for p in part_of.values() if p))
    if part != "all_but_head" and part not in parts:
        raise UsageError(
            f"unknown model.freeze {part!r}: expected none, all_but_head, or one of"
            f" {', '.join(parts)}"
        )
    frozen = parts if part == "all_but_head" else parts[: parts.index(part) + 1]
    for layer in model.layers:
        if _part_of(layer.name) in frozen:
            layer.trainable = False


def _part_of(layer_name: str) -> str | None:
    """Returns the part of the network that a layer belongs to; None for the head."""
    found = re.match(r"(stem|\d[a-z])_", layer_name) or re.fullmatch(
        r"(?:dense|bn)_(\d+)", layer_name
    )
    return found[1] if found else None


def initialize(
    model: keras.Model, weights: PretrainedWeights, class_names: Sequence[str]
) -> Initialization:
    """Assigns the weights of a trained network to a model. If they do not fit, it is unchanged.

    Every layer below the head must be in both networks, with the same shapes. The classifier is
    loaded if it has the same classes, or the same number if the source does not record their names;
    otherwise it keeps its random weights. So does an auxiliary classifier that the source does not
    have.

    Args:
      model: model to initialize.
      weights: weights of the trained network.
      class_names: name of each logit of the model, in order.

    Raises:
      UsageError: the weights do not fit.
    """
    layers, given = layers_with_weights(model), weights.layers
    new = {
        name: reason
        for name, layer in layers.items()
        if name.startswith(HEAD) and (reason := _why_new(layer, weights, class_names))
    }
    loaded = {name: layer for name, layer in layers.items() if name not in new}
    assign_layers(loaded, given, f"weights of model.init_from={weights.source!r} do", HEAD)
    return Initialization(
        weights,
        tuple(loaded),
        new,
        tuple(name for name in given if name not in layers),
        tuple(name for name, layer in layers.items() if not layer.trainable),
    )


def _why_new(layer: keras.Layer, weights: PretrainedWeights, class_names: Sequence[str]) -> str:
    """Returns why a layer of the head cannot be loaded; "" if it can."""
    given = weights.layers.get(layer.name)
    if given is None:
        return "not in the source"
    shapes = [tuple(w.shape) for w in given]
    expected = [tuple(w.shape) for w in layer.weights]
    if layer.name.endswith("logits"):
        if shapes and shapes[0][-1] != len(class_names):
            return f"{shapes[0][-1]} classes in the source, {len(class_names)} here"
        if weights.class_names not in (None, tuple(class_names)):
            return "classes with other names in the source"
    return "" if shapes == expected else "another shape in the source"
