"""Tensor names and layouts of BN-Inception in other projects."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bn_keras.models.bn_inception import FIGURE_5


class Project(NamedTuple):
    """Tensor names and layouts of one project's network.

    Attributes:
      network: name of the network in messages.
      images: form of the images that the network was trained on and expects.
      layers: the project's name of each of our layers.
      variables: suffix for each kind of variable, separator included.
      axes: for each rank, the transposition from the project's tensors to our variables.
    """

    network: str
    images: str
    layers: Mapping[str, str]
    variables: Mapping[str, str]
    axes: Mapping[int, tuple[int, ...]]


def _layer_names(
    stem: Sequence[str],
    modules: Sequence[str],
    branches: Mapping[str, str],
    halving_branches: Mapping[str, str],
    conv: str,
    batch_norm: str,
    logits: str,
) -> dict[str, str]:
    """Returns the project's name of each layer, by our name.

    Args:
      stem: names of the stem's three convolutions.
      modules: prefix of each module, in the order of Figure 5.
      branches: names of the convolutions inside a module, by our name.
      halving_branches: the same for the modules of stride 2.
      conv, batch_norm: suffixes of a convolution and of its BN.
      logits: name of the classifier.
    """
    convolutions = dict(zip(("stem_1", "stem_2_reduce", "stem_2"), stem, strict=True))
    for row, module in zip(FIGURE_5, modules, strict=True):
        for ours, theirs in (branches if row.stride == 1 else halving_branches).items():
            convolutions[f"{row.name}_{ours}"] = module + theirs
    names = {"logits": logits}
    for ours, theirs in convolutions.items():
        names[f"{ours}_conv"] = theirs + conv
        names[f"{ours}_bn"] = theirs + batch_norm
    return names


_TORCH_VARIABLES = {
    "kernel": ".weight",
    "bias": ".bias",
    "gamma": ".weight",
    "beta": ".bias",
    "moving_mean": ".running_mean",
    "moving_variance": ".running_var",
}
# From PyTorch's layouts, [out, in, height, width] and [out, in].
_TORCH_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}

PYTORCHCV = Project(
    network="pytorchcv's bninception",
    images="RGB, (x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) of x in 0..255",
    layers=_layer_names(
        stem=[f"features.init_block.{name}" for name in ("conv1", "conv2.conv1", "conv2.conv2")],
        # Stages: 3a, 3b; 3c, 4a to 4d; 4e, 5a, 5b.
        modules=[
            f"features.stage{stage}.unit{unit + 1}.branches."
            for stage, units in ((1, 2), (2, 5), (3, 3))
            for unit in range(units)
        ],
        branches={
            "1x1": "branch1",
            "3x3_reduce": "branch2.conv1",
            "3x3": "branch2.conv2",
            "double_reduce": "branch3.conv1",
            "double_1": "branch3.conv2",
            "double_2": "branch3.conv3",
            "projection": "branch4.conv",
        },
        halving_branches={
            "3x3_reduce": "branch1.conv1",
            "3x3": "branch1.conv2",
            "double_reduce": "branch2.conv1",
            "double_1": "branch2.conv2",
            "double_2": "branch2.conv3",
        },
        conv=".conv",
        batch_norm=".bn",
        logits="output",
    ),
    variables=_TORCH_VARIABLES,
    axes=_TORCH_AXES,
)

_CAFFE_BRANCHES = {
    "1x1": "1x1",
    "3x3_reduce": "3x3_reduce",
    "3x3": "3x3",
    "double_reduce": "double_3x3_reduce",
    "double_1": "double_3x3_1",
    "double_2": "double_3x3_2",
    "projection": "pool_proj",
}

CADENE = Project(
    network="Cadene's bninception",
    images="BGR, x - (104, 117, 128) of x in 0..255",
    layers=_layer_names(
        stem=("conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3"),
        modules=[f"inception_{row.name}_" for row in FIGURE_5],
        branches=_CAFFE_BRANCHES,
        halving_branches=_CAFFE_BRANCHES,
        conv="",
        batch_norm="_bn",
        logits="last_linear",
    ),
    variables=_TORCH_VARIABLES,
    axes=_TORCH_AXES,
)

SLIM_SCOPE = "InceptionV2/"

SLIM = Project(
    network="TF-Slim's inception_v2",
    images="RGB, x / 127.5 - 1 of x in 0..255",
    layers=_layer_names(
        stem=[f"{SLIM_SCOPE}Conv2d_{name}" for name in ("1a_7x7", "2b_1x1", "2c_3x3")],
        modules=[
            f"{SLIM_SCOPE}Mixed_{name}/"
            for name in ("3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "5c")
        ],
        branches={
            "1x1": "Branch_0/Conv2d_0a_1x1",
            "3x3_reduce": "Branch_1/Conv2d_0a_1x1",
            "3x3": "Branch_1/Conv2d_0b_3x3",
            "double_reduce": "Branch_2/Conv2d_0a_1x1",
            "double_1": "Branch_2/Conv2d_0b_3x3",
            "double_2": "Branch_2/Conv2d_0c_3x3",
            "projection": "Branch_3/Conv2d_0b_1x1",
        },
        halving_branches={
            "3x3_reduce": "Branch_0/Conv2d_0a_1x1",
            "3x3": "Branch_0/Conv2d_1a_3x3",
            "double_reduce": "Branch_1/Conv2d_0a_1x1",
            "double_1": "Branch_1/Conv2d_0b_3x3",
            "double_2": "Branch_1/Conv2d_1a_3x3",
        },
        conv="",
        batch_norm="/BatchNorm",
        logits=f"{SLIM_SCOPE}Logits/Conv2d_1c_1x1",
    ),
    variables={
        "kernel": "/weights",
        "depthwise_kernel": "/depthwise_weights",
        "pointwise_kernel": "/pointwise_weights",
        "bias": "/biases",
        "gamma": "/gamma",
        "beta": "/beta",
        "moving_mean": "/moving_mean",
        "moving_variance": "/moving_variance",
    },
    axes={rank: tuple(range(rank)) for rank in (1, 2, 4)},
)
