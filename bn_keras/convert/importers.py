"""The weights of other projects' BN-Inception, read into the preset that is built like theirs.

Weights mean what they did only with the images that they were trained on. Nothing here alters the
images or the first kernel; bring RGB images of 0 to 255 into the form of

| project | channels | values |
|---|---|---|
| pytorchcv | RGB | (x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) |
| Cadene's pretrainedmodels, and TSN's from which it comes | BGR | x - (104, 117, 128) |
| TF-Slim | RGB | x / 127.5 - 1 |

TF-Slim's published weights have 1001 classes, of which the first is "background", before
ImageNet's 1000; all of them are kept.
"""

import contextlib
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from bn_keras.convert.projects import CADENE, PYTORCHCV, SLIM, SLIM_SCOPE, Project
from bn_keras.errors import UsageError
from bn_keras.models.bn_inception import BNInception
from bn_keras.models.weights_file import check_shapes

Shape = tuple[int, ...]


def from_pytorch(
    source: str | os.PathLike | Mapping[str, object],
    input_shape: Sequence[int | None] = (224, 224, 3),
) -> keras.Model:
    """Reads the weights of a PyTorch port of the Caffe model into the preset "caffe".

    The ports are pytorchcv's `bninception` and that of Cadene's pretrainedmodels; which one is
    seen from the names. "module." of DataParallel in front of every name, BN vectors of [1, C] as
    PyTorch had them before 0.4, and a checkpoint that holds a "state_dict" are understood; the
    counts of num_batches_tracked are left out.

    A .pth file needs PyTorch, with weights_only=True. Where there is none, write the tensors where
    there is one: numpy.savez(PATH, **{k: v.numpy() for k, v in model.state_dict().items()}).

    Args:
      source: path of an .npz or of a file of torch.save; or a state dict, of tensors or arrays.
      input_shape: of the images, as BNInception takes it.

    Returns:
      A new model with as many classes as the classifier in the file, from images in the project's
      form (see the module's table) to logits.

    Raises:
      UsageError: no such file, no state dict in it, or not exactly the tensors of this network.

    Source: [1, C] is yjxiong/tsn-pytorch#62.
    """
    if isinstance(source, Mapping):
        origin, state = "the state dict", source
    else:
        origin, state = os.fspath(source), _load(pathlib.Path(source))
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise UsageError(
            f"{origin} holds a {type(state).__name__}, no state dict: save model.state_dict()"
        )
    tensors = {
        str(name).removeprefix("module."): tensor
        for name, tensor in state.items()
        if not str(name).endswith("num_batches_tracked")
    }
    owners = {name.rpartition(".")[0] for name in tensors}
    project = max(
        (PYTORCHCV, CADENE), key=lambda project: len(owners.intersection(project.layers.values()))
    )
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    model = _network(project, shapes, input_shape, preset="caffe")
    _fill(model, project, origin, shapes, lambda name: _to_numpy(tensors[name]))
    return model


def from_slim(
    path: str | os.PathLike,
    input_shape: Sequence[int | None] = (224, 224, 3),
) -> keras.Model:
    """Reads a checkpoint of TF-Slim's inception_v2 into the preset "slim".

    Of a training's checkpoint the variables themselves are taken, not their moving averages;
    slots and what lies outside of the scope InceptionV2 are left out.

    Args:
      path: of the checkpoint, in TensorFlow's first or second format; one of its files, or its
        folder, will do.
      input_shape: of the images, as BNInception takes it.

    Returns:
      A new model with as many classes as the classifier in the file (with the published weights
      1001, "background" first), from RGB images in [-1, 1] to logits. The file tells what its
      arg scope was: whether the stem is separable, and then whether BN follows it (no, in
      inception_v2_arg_scope), and whether BN has a gamma (no, but with batch_norm_scale).

    Raises:
      UsageError: no such checkpoint, or not exactly the variables of this network.
    """
    origin = os.fspath(path)
    prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", origin)
    with _reading(origin, "a TensorFlow checkpoint"):
        reader = tf.train.load_checkpoint(prefix)
    shapes = {
        name: tuple(shape)
        for name, shape in reader.get_variable_to_shape_map().items()
        if name.startswith(SLIM_SCOPE)
    }
    # An optimizer's slots and moving averages are called VARIABLE/SLOT.
    shapes = {n: shape for n, shape in shapes.items() if n.rpartition("/")[0] not in shapes}
    model = _network(
        SLIM,
        shapes,
        input_shape,
        preset="slim",
        separable_stem=SLIM.layers["stem_1_conv"] + SLIM.variables["kernel"] not in shapes,
        separable_bn=SLIM.layers["stem_1_bn"] + SLIM.variables["beta"] in shapes,
        gamma=any(name.endswith(SLIM.variables["gamma"]) for name in shapes),
    )
    _fill(model, SLIM, origin, shapes, reader.get_tensor)
    return model


def convert_weights(
    weights: str | os.PathLike,
    output: str | os.PathLike,
    source: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Reads a file of another project's weights and writes the network.

    Args:
      weights: path, as from_pytorch or from_slim takes it.
      output: path to write. A .keras file is read by keras.models.load_model after
        `import bn_keras`; a .weights.h5 file by BNInception(preset=..., classes=..., weights=...),
        with separable_stem, separable_bn and gamma where a TF-Slim checkpoint is not the preset's.
      source: "pytorch" or "slim"; None takes paths that end in .npz, .pt, .pth or .tar for
        PyTorch's.
      overwrite: whether an output that is there is replaced.

    Raises:
      UsageError: weights that can't be read, or an output that can't be written; what was there
        stays.
    """
    output = pathlib.Path(output)
    if not output.name.endswith((".keras", ".weights.h5")):
        raise UsageError(f"output {output} has to end in .keras or .weights.h5")
    if output.exists() and not overwrite:
        raise UsageError(f"output {output} exists: give another one, or --overwrite")
    if source is None:
        endings = (".npz", ".pt", ".pth", ".tar")
        source = "pytorch" if os.fspath(weights).endswith(endings) else "slim"
    model = {"pytorch": from_pytorch, "slim": from_slim}[source](weights)

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, since only within one file system a move is at once.
        with tempfile.TemporaryDirectory(prefix=".", dir=output.parent) as folder:
            unfinished = pathlib.Path(folder) / output.name
            if output.name.endswith(".keras"):
                model.save(unfinished)
            else:
                model.save_weights(unfinished)
            unfinished.replace(output)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UsageError(f"output {output} can't be written: {reason}") from error
    logging.info("Written: %s.", output)


class _Expected(NamedTuple):
    """A tensor that has to be in the file.

    Attributes:
      variable: where it goes.
      shape: that it has to have there; leading axes of size 1 don't count, since TF-Slim's
        classifier is a 1x1 convolution and old PyTorch's BN vectors are [1, C].
      axes: which of its axes become those of the variable.
    """

    variable: keras.Variable
    shape: Shape
    axes: tuple[int, ...]


def _network(
    project: Project,
    shapes: Mapping[str, Shape],
    input_shape: Sequence[int | None],
    **options: object,
) -> keras.Model:
    """Makes the preset with as many classes as the file has."""
    classes = shapes.get(project.layers["logits"] + project.variables["bias"], (1000,))
    # The variant with neither dropout nor local response normalization.
    return BNInception("bn_x5", math.prod(classes), input_shape, name="bn_inception", **options)


def _fill(
    model: keras.Model,
    project: Project,
    origin: str,
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
) -> None:
    """Fills the network, if the file's tensors are exactly those that it needs.

    Args:
      model: the network.
      project: whose file it is.
      origin: what messages call the file.
      shapes: of all tensors in the file, by name.
      read: gives one of them.
    """
    expected = dict(_expected(project, model))
    check_shapes(
        f"{origin} does not hold {project.network}: of its {len(expected)} tensors",
        {name: tensor.shape for name, tensor in expected.items()},
        shapes,
        equal=lambda a, b: _significant(a) == _significant(b),
    )
    with _reading(origin, project.network):
        for name, (variable, shape, axes) in expected.items():
            variable.assign(np.reshape(read(name), shape).transpose(axes))
    logging.info(
        "Read %s with %d classes; it takes images as %s.",
        project.network,
        model.output_shape[-1],
        project.images,
    )


def _expected(project: Project, model: keras.Model) -> Iterator[tuple[str, _Expected]]:
    for layer in model.layers:
        for variable in layer.weights:
            axes = project.axes[len(variable.shape)]
            shape = tuple(variable.shape[i] for i in np.argsort(axes))
            name = project.layers[layer.name] + project.variables[variable.name]
            yield name, _Expected(variable, shape, axes)


def _significant(shape: Shape) -> Shape:
    return shape[next((i for i, size in enumerate(shape) if size != 1), len(shape)) :]


def _load(path: pathlib.Path) -> object:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix == ".npz":
        # numpy.load takes what is no zip file for a pickle, and leaves a damaged one open.
        with _reading(path, "an .npz file"), path.open("rb") as file:
            return dict(np.lib.npyio.NpzFile(file, allow_pickle=False))
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{path} takes PyTorch to be read, which is not installed: install torch, or write an"
            " .npz where it is, by numpy.savez(PATH, **{k: v.numpy() for k, v in"
            " model.state_dict().items()})"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Of any kind; for what is no tensor, PyTorch explains how to run the code in the file anyway.
    except Exception as error:
        raise UsageError(
            f"{path} can't be read as a file of torch.save: it is damaged, or holds more than"
            " tensors; save model.state_dict()"
        ) from error


@contextlib.contextmanager
def _reading(origin: str | os.PathLike, kind: str) -> Iterator[None]:
    """Tells in one line what another library could not read."""
    try:
        yield
    # Each library has errors of its own for a damaged file, and none documents them.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{origin} can't be read as {kind}: {reason[0]}") from error


def _to_numpy(tensor: object) -> np.ndarray:
    # NumPy has no bfloat16 of PyTorch's.
    return tensor.detach().float().cpu().numpy() if hasattr(tensor, "detach") else tensor
