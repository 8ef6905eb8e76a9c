"""Imports other projects' weights of BN-Inception, each into the preset that matches the project.

The weights are valid only for images like those of their training. The importers change neither the
images nor the first kernel. Convert RGB images of 0 to 255 to:

| project | channels | values |
|---|---|---|
| pytorchcv | RGB | (x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) |
| Cadene's pretrainedmodels, and TSN, its source | BGR | x - (104, 117, 128) |
| TF-Slim | RGB | x / 127.5 - 1 |

TF-Slim's published weights have 1001 classes: "background", then the 1000 of ImageNet. All are
kept.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from bn_keras.convert.projects import CADENE, PYTORCHCV, SLIM, SLIM_SCOPE, Project
from bn_keras.errors import UsageError
from bn_keras.models.bn_inception import BNInception
from bn_keras.models.weights_file import check_shapes
from bn_keras.storage import exists, local_copy, replacing, writing
from bn_keras.text import counted, first_line

Shape = tuple[int, ...]

_logger = logging.getLogger(__name__)
# The variant with neither dropout nor local response normalization.
_VARIANT = "bn_x5"


def from_pytorch(
    source: str | os.PathLike | Mapping[str, Any],
    input_shape: Sequence[int | None] = (224, 224, 3),
) -> keras.Model:
    """Builds the preset "caffe" with the weights of a PyTorch port of the Caffe model.

    Supported ports are pytorchcv's `bninception` and that of Cadene's pretrainedmodels; the tensor
    names determine which. The state dict may be an entry "state_dict" of a checkpoint, have the
    prefix "module." of DataParallel, and contain BN vectors of shape [1, C], as in PyTorch before
    0.4. num_batches_tracked is ignored.

    A .pth file requires PyTorch and is read with weights_only=True. Without PyTorch, convert the
    file elsewhere: numpy.savez(PATH, **{k: v.numpy() for k, v in model.state_dict().items()}).

    Args:
      source: path of an .npz file or of a file of torch.save, local or in a bucket, or a state dict
        of tensors or arrays.
      input_shape: (height, width, channels) of the images; see BNInception.

    Returns:
      A new model from images in the project's form (see the module's table) to logits. The file's
      classifier determines the number of classes.

    Raises:
      UsageError: the file does not exist, contains no state dict, or does not contain exactly the
        tensors of this network.

    Source: yjxiong/tsn-pytorch#62 for BN vectors of shape [1, C].
    """
    if isinstance(source, Mapping):
        origin, state = "the state dict", source
    else:
        origin = _as_path("source", source)
        with local_copy(source) as path:
            state = _load_file(path, origin)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise UsageError(
            f"{origin} contains a {type(state).__name__}: expected a state dict; save"
            " model.state_dict()"
        )
    tensors = {
        str(name).removeprefix("module."): tensor
        for name, tensor in state.items()
        if not str(name).endswith("num_batches_tracked")
    }
    layers = {name.rpartition(".")[0] for name in tensors}
    project = max((PYTORCHCV, CADENE), key=lambda p: len(layers.intersection(p.layers.values())))
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    model = BNInception(
        _VARIANT, _classes(project, shapes), input_shape, preset="caffe", name="bn_inception"
    )
    _assign_tensors(model, project, origin, shapes, lambda name: _to_numpy(tensors[name]))
    return model


def from_slim(
    path: str | os.PathLike,
    input_shape: Sequence[int | None] = (224, 224, 3),
) -> keras.Model:
    """Builds the preset "slim" with the weights of a checkpoint of TF-Slim's inception_v2.

    Optimizer slots, moving averages of the weights, and variables outside the scope InceptionV2 are
    ignored.

    Args:
      path: path of the checkpoint, in TensorFlow's first or second format: its prefix, one of its
        files, or its folder.
      input_shape: (height, width, channels) of the images; see BNInception.

    Returns:
      A new model from RGB images in [-1, 1] to logits. The file determines the number of classes
      (1001 in the published weights, "background" first) and the options: whether the stem is
      separable, whether BN follows a separable stem (not with inception_v2_arg_scope), and whether
      BN has a gamma (only with batch_norm_scale).

    Raises:
      UsageError: the checkpoint does not exist, or does not contain exactly the variables of this
        network.
    """
    origin = _as_path("path", path)
    prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", origin)
    with _reporting_unreadable(origin, "a TensorFlow checkpoint"):
        reader = tf.train.load_checkpoint(prefix)
    shapes = {
        name: tuple(shape)
        for name, shape in reader.get_variable_to_shape_map().items()
        if name.startswith(SLIM_SCOPE)
    }
    # Optimizer slots and moving averages are named VARIABLE/SLOT.
    shapes = {n: shape for n, shape in shapes.items() if n.rpartition("/")[0] not in shapes}
    model = BNInception(
        _VARIANT,
        _classes(SLIM, shapes),
        input_shape,
        preset="slim",
        separable_stem=SLIM.layers["stem_1_conv"] + SLIM.variables["kernel"] not in shapes,
        separable_bn=SLIM.layers["stem_1_bn"] + SLIM.variables["beta"] in shapes,
        gamma=any(name.endswith(SLIM.variables["gamma"]) for name in shapes),
        name="bn_inception",
    )
    _assign_tensors(model, SLIM, origin, shapes, reader.get_tensor)
    return model


def convert_weights(
    weights: str | os.PathLike,
    output: str | os.PathLike,
    source: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Imports another project's weights and saves the network, or only its weights.

    Args:
      weights: path that from_pytorch or from_slim accepts.
      output: path of the .keras or .weights.h5 file to write, local or in a bucket. Load a .keras
        file with keras.models.load_model after `import bn_keras`. Load a .weights.h5 file with
        BNInception(preset=..., classes=..., weights=...), and with separable_stem, separable_bn and
        gamma if a TF-Slim checkpoint differs from the preset.
      source: "pytorch" or "slim". None infers it from the extension of `weights`: .npz, .pt, .pth
        and .tar are PyTorch's.
      overwrite: whether to replace an existing output.

    Raises:
      UsageError: the weights cannot be read, the output exists or has another extension, or the
        source is unknown.
      StorageError: the output cannot be written. An existing output is unchanged.
    """
    output, weights = _as_path("output", output), _as_path("weights", weights)
    if not output.endswith((".keras", ".weights.h5")):
        raise UsageError(
            f"output {output} is invalid: expected a path ending in .keras or .weights.h5"
        )
    if exists(output) and not overwrite:
        raise UsageError(
            f"output {output} exists: pass another path, or overwrite=True (--overwrite)"
        )
    if source is None:
        endings = (".npz", ".pt", ".pth", ".tar")
        source = "pytorch" if weights.endswith(endings) else "slim"
    importers = {"pytorch": from_pytorch, "slim": from_slim}
    if source not in importers:
        raise UsageError(f"unknown source {source!r}: expected 'pytorch', 'slim' or None")
    model = importers[source](weights)

    with replacing(output) as unfinished, writing(f"output {output}"):
        if output.endswith(".keras"):
            model.save(unfinished)
        else:
            model.save_weights(unfinished)
    _logger.info("wrote %s", output)


def _as_path(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name}={value!r} is invalid: expected a path")
    return os.fspath(value)


class _Expected(NamedTuple):
    """A tensor that the file must contain.

    Attributes:
      variable: variable to assign it to.
      shape: shape of the tensor, which may have more leading axes of size 1: TF-Slim's classifier
        is a 1x1 convolution, and BN vectors of old PyTorch versions are [1, C].
      axes: transposition from the tensor's layout to the variable's.
    """

    variable: keras.Variable
    shape: Shape
    axes: tuple[int, ...]


def _classes(project: Project, shapes: Mapping[str, Shape]) -> int:
    """Returns the number of classes of the file's classifier; 1000 if there is none."""
    return math.prod(shapes.get(project.layers["logits"] + project.variables["bias"], (1000,)))


def _assign_tensors(
    model: keras.Model,
    project: Project,
    origin: str,
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
) -> None:
    """Assigns a file's tensors to a network if they are exactly the ones it needs.

    Args:
      model: network to fill.
      project: project of the file.
      origin: name of the file in messages.
      shapes: shapes of all tensors in the file, by name.
      read: returns one tensor by name.
    """
    expected = dict(_expected_tensors(project, model))
    check_shapes(
        f"{origin} does not contain the {counted(len(expected), 'tensor')} of {project.network}",
        {name: tensor.shape for name, tensor in expected.items()},
        shapes,
        equal=lambda a, b: _strip_ones(a) == _strip_ones(b),
    )
    with _reporting_unreadable(origin, project.network):
        for name, (variable, shape, axes) in expected.items():
            variable.assign(np.reshape(read(name), shape).transpose(axes))
    _logger.info(
        "read %s with %d classes; input images: %s",
        project.network,
        model.output_shape[-1],
        project.images,
    )


def _expected_tensors(project: Project, model: keras.Model) -> Iterator[tuple[str, _Expected]]:
    for layer in model.layers:
        for variable in layer.weights:
            axes = project.axes[len(variable.shape)]
            shape = tuple(variable.shape[i] for i in np.argsort(axes))
            name = project.layers[layer.name] + project.variables[variable.name]
            yield name, _Expected(variable, shape, axes)


def _strip_ones(shape: Shape) -> Shape:
    """Returns a shape without its leading axes of size 1."""
    return shape[next((i for i, size in enumerate(shape) if size != 1), len(shape)) :]


def _load_file(path: pathlib.Path, origin: str) -> Any:
    """Reads an .npz file or a file of torch.save.

    Args:
      path: path of the file on this machine.
      origin: path that the user passed, for errors.
    """
    if not os.path.isfile(path):
        raise UsageError(f"file {origin} does not exist")
    if path.suffix == ".npz":
        # numpy.load would treat a file that is not a zip archive as a pickle, and would not close a
        # damaged one.
        with _reporting_unreadable(origin, "an .npz file"), path.open("rb") as file:
            return dict(np.lib.npyio.NpzFile(file, allow_pickle=False))
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{origin} cannot be read without PyTorch: install torch, or write an .npz file"
            " elsewhere with"
            " numpy.savez(PATH, **{k: v.numpy() for k, v in model.state_dict().items()})"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # PyTorch raises many kinds of errors. For contents other than tensors, its message explains
    # how to run the code in the file anyway.
    except Exception as error:
        raise UsageError(
            f"{origin} cannot be read as a file of torch.save: it is damaged or contains more than"
            " tensors; save model.state_dict()"
        ) from error


@contextlib.contextmanager
def _reporting_unreadable(origin: str | os.PathLike, kind: str) -> Iterator[None]:
    """Turns an error of another library into a UsageError of one line."""
    try:
        yield
    # For a damaged file, each library raises errors of its own, which are not documented.
    except Exception as error:
        raise UsageError(f"{origin} cannot be read as {kind}: {first_line(error)}") from error


def _to_numpy(tensor: Any) -> np.ndarray:
    # NumPy does not support PyTorch's bfloat16.
    return tensor.detach().float().cpu().numpy() if hasattr(tensor, "detach") else tensor
