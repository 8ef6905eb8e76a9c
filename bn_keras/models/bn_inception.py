"""Figure 5 of the paper as a table of rows, and the one builder of all its networks."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import keras
import tensorflow as tf

from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.models.dropout import Dropout
from bn_keras.models.weights_file import load_weights


class Row(NamedTuple):
    """An Inception module of Figure 5; the numbers are output channels.

    Attributes:
      name: the paper's name of the module.
      stride: 2 halves the map; such a module passes its pool on unprojected.
      conv1x1: of the 1x1 branch; 0 leaves the branch out.
      reduce3x3, conv3x3: of the 1x1 and the 3x3 convolution of the 3x3 branch.
      reduce_double, conv_double: of the 1x1 and of both 3x3 of the double branch.
      pool: "avg" or "max", 3x3 with the module's stride.
      projection: of the 1x1 convolution after the pool; 0 passes the pool on as it is.
    """

    name: str
    stride: int
    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce_double: int
    conv_double: int
    pool: str
    projection: int


# 4c and 4d with the paper's projection of 128 contradict its stated 576 output channels; 96
# satisfies every stated size, so that the builder's pool_projection replaces these two.
FIGURE_5 = (
    Row("3a", 1, 64, 64, 64, 64, 96, "avg", 32),
    Row("3b", 1, 64, 64, 96, 64, 96, "avg", 64),
    Row("3c", 2, 0, 128, 160, 64, 96, "max", 0),
    Row("4a", 1, 224, 64, 96, 96, 128, "avg", 128),
    Row("4b", 1, 192, 96, 128, 96, 128, "avg", 128),
    Row("4c", 1, 160, 128, 160, 128, 160, "avg", 128),
    Row("4d", 1, 96, 128, 192, 160, 192, "avg", 128),
    Row("4e", 2, 0, 128, 192, 192, 256, "max", 0),
    Row("5a", 1, 352, 192, 320, 160, 224, "avg", 128),
    Row("5b", 1, 352, 192, 320, 192, 224, "max", 128),
)


class Stem(NamedTuple):
    """What precedes module 3a.

    Attributes:
      size, stride: of the first convolution.
      separable: whether it is a separable one with depth multiplier 8.
      pools: whether a 3x3 max pool of stride 2 follows each of the stem's two stages.
    """

    size: int
    stride: int
    separable: bool
    pools: bool


STEMS = {
    "imagenet": Stem(size=7, stride=2, separable=True, pools=True),
    "cifar": Stem(size=3, stride=2, separable=False, pools=False),
    "digits": Stem(size=3, stride=1, separable=False, pools=False),
}


class Variant(NamedTuple):
    """What tells the networks of sections 4.2.2 and 4.2.3 apart inside the model.

    Attributes:
      batch_norm: BN before every nonlinearity, in place of the biases.
      activation: the nonlinearity.
      dropout: fraction dropped before the classifier.
      local_response_normalization: in the stem, as GoogLeNet has it.
      initializer_scale: factor on the initial weights of the convolutions.
      per_activation_bn: whether BN in the last hidden layers, which are those of module 5b, has
        statistics and parameters per activation instead of per feature map.
    """

    batch_norm: bool
    activation: str
    dropout: float
    local_response_normalization: bool
    initializer_scale: float = 1.0
    per_activation_bn: bool = False


_INCEPTION = Variant(False, "relu", dropout=0.4, local_response_normalization=True)
_ACCELERATED = Variant(True, "relu", dropout=0.0, local_response_normalization=False)

# Section 4.2.3 says what was changed in the ensemble's six networks, but not in which of them. The
# combinations are our choice, as are the factor 2 and module 5b as the "last hidden layers".
ENSEMBLE = {
    "bn_x30_ensemble_1": _ACCELERATED._replace(initializer_scale=2.0),
    "bn_x30_ensemble_2": _ACCELERATED._replace(dropout=0.05),
    "bn_x30_ensemble_3": _ACCELERATED._replace(dropout=0.1),
    "bn_x30_ensemble_4": _ACCELERATED._replace(per_activation_bn=True),
    "bn_x30_ensemble_5": _ACCELERATED._replace(initializer_scale=2.0, dropout=0.05),
    "bn_x30_ensemble_6": _ACCELERATED._replace(per_activation_bn=True, dropout=0.1),
}

VARIANTS = {
    "inception": _INCEPTION,
    "bn_baseline": _INCEPTION._replace(batch_norm=True),
    "bn_x5": _ACCELERATED,
    "bn_x30": _ACCELERATED,
    "bn_x5_sigmoid": _ACCELERATED._replace(activation="sigmoid"),
    # Section 4.2.2: Inception with sigmoids stayed at chance.
    "inception_sigmoid": _INCEPTION._replace(activation="sigmoid"),
    **ENSEMBLE,
}


class Preset(NamedTuple):
    """How the network of one origin is built where Figure 5 leaves it open.

    Attributes:
      pool_projection: channels projected after the pools of 4c and 4d.
      separable_stem: whether the 7x7 convolution is a separable one.
      separable_bn: whether BN follows the separable convolution, in place of a bias.
      conv_bias: whether the convolutions in front of BN have a bias as well.
      gamma: whether BN has a gamma; beta it has always.
      epsilon: added to BN's variance under the root.
      symmetric: convolutions of stride 2 pad both sides alike, pools of stride 2 only the far one,
        and the average pools count their padding as zeros; else all pad to TensorFlow's "same",
        which splits the padding by the size of the map, and averages leave it out.
    """

    pool_projection: int
    separable_stem: bool
    separable_bn: bool
    conv_bias: bool
    gamma: bool
    epsilon: float
    symmetric: bool


# slim: `separable_conv2d` is outside of inception_v2_arg_scope, which is what brings BN.
PRESETS = {
    "paper": Preset(96, True, True, conv_bias=False, gamma=True, epsilon=1e-3, symmetric=False),
    "slim": Preset(96, True, False, conv_bias=False, gamma=False, epsilon=1e-3, symmetric=False),
    "caffe": Preset(128, False, True, conv_bias=True, gamma=True, epsilon=1e-5, symmetric=True),
}


@keras.saving.register_keras_serializable("bn_keras")
class LocalResponseNormalization(keras.layers.Layer):
    """GoogLeNet's local response normalization over 5 neighbouring channels.

    Caffe's alpha 1e-4 is divided by the window there; TensorFlow's is not, so that it is 2e-5
    here. Computed in float32, for which alone the CPU has a kernel of known accuracy.

    Source: GoogLeNet's public prototxt (local_size 5, alpha 1e-4, beta 0.75).
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps [N, H, W, C] to the same shape and dtype."""
        outputs = tf.nn.local_response_normalization(
            tf.cast(inputs, tf.float32), depth_radius=2, bias=1.0, alpha=2e-5, beta=0.75
        )
        return tf.cast(outputs, inputs.dtype)


@keras.saving.register_keras_serializable("bn_keras")
class Scaled(keras.initializers.Initializer):
    """Another initializer's draws, times a factor.

    Args:
      initializer: whose draws.
      scale: the factor.
    """

    def __init__(self, initializer: str | dict | keras.initializers.Initializer, scale: float):
        self.initializer = keras.initializers.get(initializer)
        self.scale = scale

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        """Draws."""
        return self.scale * self.initializer(shape, dtype=dtype)

    def get_config(self) -> dict:
        """The arguments."""
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "scale": self.scale,
        }


def BNInception(
    variant: str = "bn_baseline",
    classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    width: float = 1.0,
    stem: str = "imagenet",
    *,
    preset: str = "paper",
    pool_projection: int | None = None,
    separable_stem: bool | None = None,
    separable_bn: bool | None = None,
    gamma: bool | None = None,
    kernel_initializer: str | keras.initializers.Initializer = "he_normal",
    initializer_scale: float | None = None,
    dropout: float | None = None,
    local_response_normalization: bool | None = None,
    per_activation_bn: bool | None = None,
    auxiliary: bool = False,
    include_top: bool = True,
    pooling: str | None = None,
    classifier_activation: str | None = None,
    weights: str | os.PathLike | None = None,
    momentum: float = 0.9997,
    epsilon: float | None = None,
    synchronized: bool = False,
    name: str | None = None,
) -> keras.Model:
    """Builds the network of Figure 5 in one of the variants of sections 4.2.2 and 4.2.3.

    Convolutions are followed by BN and the nonlinearity; the variants "inception" and
    "inception_sigmoid" have biases instead of BN. The output of module 3a is that of the layer
    "3a", and so on to "5b": `keras.Model(model.input, model.get_layer("4e").output)` extracts
    features. Logits come out, float32 under any dtype policy.

    A preset is built as the weights of its origin need it. They also need that origin's images:
    RGB in [-1, 1] for TF-Slim; for the ports of the Caffe model, whatever their weights say, as
    BGR in [0, 255] less (104, 117, 128) for Cadene's.

    Args:
      variant: "inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid", a member of the
        ensemble, "bn_x30_ensemble_1" to "bn_x30_ensemble_6", or "inception_sigmoid".
      classes: number of logits.
      input_shape: (height, width, channels) of the images; height and width may be None, else
        at least the network's total stride (32 with the ImageNet stem, 8 and 4 with the others).
      width: factor on every number of channels, which is rounded and at least 1.
      stem: "imagenet", as in the paper; "cifar", a 3x3 convolution with stride 2 in place of the
        7x7 and no pools; "digits", the same with stride 1.
      preset: "paper"; "slim", TF-Slim's inception_v2, whose BN has no gamma and whose separable
        convolution has a bias in place of BN; "caffe", its PyTorch ports (pytorchcv, Cadene), which
        have biases in front of BN, a plain stem, epsilon 1e-5 and Caffe's padding.
      pool_projection: channels projected after the pools of 4c and 4d; 96 gives the paper's
        output sizes, 128 is what its table says; None is the preset's.
      separable_stem: whether the first convolution is separable, with depth multiplier 8; None
        is as the preset has it with the stem "imagenet", and False with the others.
      separable_bn: whether BN follows a separable first convolution, in place of a bias; None is
        the preset's. BN follows all the others in any case.
      gamma: whether BN has a gamma (beta it has always); None is the preset's.
      kernel_initializer: for every kernel, each of which takes its own draw.
      initializer_scale: factor on the initial weights of the convolutions; None is the variant's.
      dropout: fraction of the features dropped before the classifier; None is the variant's.
      local_response_normalization: after the two stages of the stem; None is the variant's.
      per_activation_bn: whether BN in module 5b normalizes each activation by itself, which takes
        a known height and width; None is the variant's.
      auxiliary: whether a second output has the logits of an auxiliary classifier on module 4d,
        for training alone: `without_auxiliary` gives the network to be used.
      include_top: whether the classifier is there; without it, the output is the features.
      pooling: without the top: "avg" or "max" over the map of 5b, or None for the map itself.
      classifier_activation: after the logits, such as "softmax"; None, other than in
        keras.applications, gives the logits.
      weights: path of a .weights.h5 or .keras file of this network, read by the layers' names; it
        may also hold a classifier, or auxiliary one, that this network is built without.
      momentum: fraction of BN's moving statistics kept at each step; TF-Slim's by default.
      epsilon: added to BN's variance under the root; None is the preset's.
      synchronized: whether BN takes its batch statistics over all replicas.
      name: of the model; None is the variant's.

    Returns:
      A functional model from [N, height, width, channels] to [N, classes]; with auxiliary to two
      of these, without the top to [N, h, w, 1024 * width] or, pooled, [N, 1024 * width].

    Raises:
      UsageError: an unknown variant, stem or preset, a value outside of its range, or weights of
        another network.

    Source: Ioffe & Szegedy 2015, Figure 5 and section 4.2; GoogLeNet (arXiv 1409.4842) for
    dropout and local response normalization; Inception-v3 (arXiv 1512.00567) for the auxiliary
    classifier; the presets from the code of their origins.
    """
    chosen = _lookup(
        "variant",
        variant,
        VARIANTS,
        dropout=dropout,
        local_response_normalization=local_response_normalization,
        initializer_scale=initializer_scale,
        per_activation_bn=per_activation_bn,
    )
    origin = _lookup(
        "preset",
        preset,
        PRESETS,
        pool_projection=pool_projection,
        separable_bn=separable_bn,
        gamma=gamma,
        epsilon=epsilon,
    )
    entry = _lookup("stem", stem, STEMS)
    if separable_stem is None:
        separable_stem = entry.separable and origin.separable_stem
    entry = entry._replace(separable=separable_stem)
    _check(classes, input_shape, width, origin.pool_projection, chosen, entry)
    _check_top(include_top, pooling, classifier_activation, auxiliary)

    net = _Layers(
        origin,
        batch_norm=dict(
            momentum=momentum,
            epsilon=origin.epsilon,
            scale=origin.gamma,
            synchronized=synchronized,
        )
        if chosen.batch_norm
        else None,
        activation=chosen.activation,
        initializer=keras.initializers.get(kernel_initializer),
        initializer_scale=chosen.initializer_scale,
        width=width,
    )
    images = keras.Input(tuple(input_shape), name="images")
    x = _stem(net, images, entry, chosen.local_response_normalization)
    outputs = []
    for row in FIGURE_5:
        if row.name in ("4c", "4d"):
            row = row._replace(projection=origin.pool_projection)
        per_activation = chosen.per_activation_bn and row.name == "5b"
        x = _module(net.per_activation() if per_activation else net, x, row)
        # Where is open: the last map before the stride, as in Inception-v3.
        if auxiliary and row.name == "4d":
            features = _auxiliary_features(net, x)
            outputs = [net.classifier(features, classes, classifier_activation, "auxiliary_")]
    if include_top or pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(name="features")(x)
    if include_top:
        if chosen.dropout:
            x = Dropout(chosen.dropout, name="dropout")(x)
        x = net.classifier(x, classes, classifier_activation)
    model = keras.Model(images, [x, *outputs] if outputs else x, name=name or variant)
    if weights is not None:
        load_weights(model, weights, optional=("logits", "auxiliary_"))
    return model


def without_auxiliary(model: keras.Model) -> keras.Model:
    """Gives the network that shares all layers with `model` and has its first output alone.

    Args:
      model: of BNInception, or any other; one with one output is given back as it is.
    """
    if len(model.outputs) == 1:
        return model
    return keras.Model(model.input, model.outputs[0], name=model.name)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """What all convolutions of one network have in common.

    Each kernel gets a clone of the initializer, since one instance draws the same values for
    all kernels of the same shape.
    """

    preset: Preset
    batch_norm: dict | None
    activation: str
    initializer: keras.initializers.Initializer
    initializer_scale: float
    width: float

    def per_activation(self) -> "_Layers":
        """The same with BN per activation, where there is BN."""
        if self.batch_norm is None:
            return self
        return dataclasses.replace(self, batch_norm=self.batch_norm | {"axis": [1, 2, 3]})

    def conv(
        self,
        x: keras.KerasTensor,
        filters: int,
        size: int,
        name: str,
        strides: int = 1,
        separable: bool = False,
        padding: str = "same",
    ) -> keras.KerasTensor:
        """Convolution, BN in place of the bias, nonlinearity."""
        normalized = self.batch_norm is not None and (self.preset.separable_bn or not separable)
        arguments = dict(
            filters=max(1, round(filters * self.width)),
            kernel_size=size,
            strides=strides,
            padding=padding,
            use_bias=self.preset.conv_bias or not normalized,
            name=f"{name}_conv",
        )
        if self.preset.symmetric and strides > 1:
            x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
            arguments["padding"] = "valid"
        if separable:
            layer = keras.layers.SeparableConv2D(
                **arguments,
                depth_multiplier=8,
                depthwise_initializer=self._initializer(),
                pointwise_initializer=self._initializer(),
            )
        else:
            layer = keras.layers.Conv2D(**arguments, kernel_initializer=self._initializer())
        x = layer(x)
        if normalized:
            x = BatchNormalization(**self.batch_norm, name=f"{name}_bn")(x)
        return keras.layers.Activation(self.activation, name=f"{name}_{self.activation}")(x)

    def _initializer(self) -> keras.initializers.Initializer:
        initializer = self.initializer.clone()
        if self.initializer_scale == 1:
            return initializer
        return Scaled(initializer, self.initializer_scale)

    def classifier(
        self, x: keras.KerasTensor, classes: int, activation: str | None, prefix: str = ""
    ) -> keras.KerasTensor:
        """Linear layer to the logits, and what is to follow them."""
        x = keras.layers.Dense(
            classes,
            kernel_initializer=self.initializer.clone(),
            dtype="float32",
            name=f"{prefix}logits",
        )(x)
        if activation is None:
            return x
        return keras.layers.Activation(activation, dtype="float32", name=f"{prefix}predictions")(x)

    def pool(self, x: keras.KerasTensor, kind: str, strides: int, name: str) -> keras.KerasTensor:
        """Pool of 3x3, "avg" or "max"."""
        padding = "same"
        # A maximum of stride 1 takes the same values either way.
        if self.preset.symmetric and (kind == "avg" or strides > 1):
            # Caffe rounds sizes up, which is one row and column on the far side. A zero is no
            # maximum's loss there: whatever is pooled comes from nonlinearities that are never
            # negative.
            margin = 1 if kind == "avg" else ((0, 1), (0, 1))
            x = keras.layers.ZeroPadding2D(margin, name=f"{name}_pad")(x)
            padding = "valid"
        layer = {"avg": keras.layers.AveragePooling2D, "max": keras.layers.MaxPooling2D}[kind]
        return layer(3, strides=strides, padding=padding, name=name)(x)


def _stem(net: _Layers, x: keras.KerasTensor, stem: Stem, lrn: bool) -> keras.KerasTensor:
    x = net.conv(x, 64, stem.size, "stem_1", strides=stem.stride, separable=stem.separable)
    if stem.pools:
        x = net.pool(x, "max", 2, "stem_1_pool")
    if lrn:
        x = LocalResponseNormalization(name="stem_1_lrn")(x)
    x = net.conv(x, 64, 1, "stem_2_reduce")
    x = net.conv(x, 192, 3, "stem_2")
    if lrn:
        x = LocalResponseNormalization(name="stem_2_lrn")(x)
    if stem.pools:
        x = net.pool(x, "max", 2, "stem_2_pool")
    return x


def _module(net: _Layers, x: keras.KerasTensor, row: Row) -> keras.KerasTensor:
    branches = []
    if row.conv1x1:
        branches.append(net.conv(x, row.conv1x1, 1, f"{row.name}_1x1"))

    single = net.conv(x, row.reduce3x3, 1, f"{row.name}_3x3_reduce")
    branches.append(net.conv(single, row.conv3x3, 3, f"{row.name}_3x3", strides=row.stride))

    double = net.conv(x, row.reduce_double, 1, f"{row.name}_double_reduce")
    double = net.conv(double, row.conv_double, 3, f"{row.name}_double_1")
    branches.append(
        net.conv(double, row.conv_double, 3, f"{row.name}_double_2", strides=row.stride)
    )

    pool = net.pool(x, row.pool, row.stride, f"{row.name}_pool")
    if row.projection:
        pool = net.conv(pool, row.projection, 1, f"{row.name}_projection")
    branches.append(pool)
    if len({branch.shape[1:3] for branch in branches}) > 1:
        raise UsageError(
            f"module {row.name} gets maps of {x.shape[1]}x{x.shape[2]} from such images, which"
            " this preset does not halve evenly: give sides that are a multiple of 32 pixels (8 or"
            " 4 with the other stems), or another preset"
        )
    return keras.layers.Concatenate(name=row.name)(branches)


def _auxiliary_features(net: _Layers, x: keras.KerasTensor) -> keras.KerasTensor:
    """Inception-v3's way from a map to the features of its auxiliary classifier.

    A map of 14x14 becomes 4x4 and then 1x1; on a smaller one the windows are as large as it is,
    and what a larger one leaves is averaged.
    """

    def window(largest: int) -> int:
        return min([largest, *(side for side in x.shape[1:3] if side is not None)])

    x = keras.layers.AveragePooling2D(window(5), strides=3, name="auxiliary_pool")(x)
    x = net.conv(x, 128, 1, "auxiliary_reduce")
    x = net.conv(x, 768, window(4), "auxiliary", padding="valid")
    return keras.layers.GlobalAveragePooling2D(name="auxiliary_features")(x)


def _lookup(what: str, given: str, table: dict, **overrides: object) -> NamedTuple:
    """Gives the entry of the table, with what of the overrides is not None in its place."""
    if given not in table:
        raise UsageError(f"unknown {what} {given!r}: accepted are {', '.join(table)}")
    return table[given]._replace(**{k: v for k, v in overrides.items() if v is not None})


def _check(
    classes: int,
    input_shape: Sequence[int],
    width: float,
    pool_projection: int,
    variant: Variant,
    stem: Stem,
) -> None:
    if classes < 1:
        raise UsageError(f"classes is {classes}: it has to be at least 1")
    if not 0 < width < math.inf:
        raise UsageError(f"width is {width}: it has to be a number greater than 0")
    if pool_projection < 1:
        raise UsageError(f"pool_projection is {pool_projection}: it has to be at least 1")
    if not 0 < variant.initializer_scale < math.inf:
        raise UsageError(
            f"initializer_scale is {variant.initializer_scale}: it has to be a number greater"
            " than 0"
        )
    if not 0 <= variant.dropout < 1:
        raise UsageError(f"dropout is {variant.dropout}: it has to be at least 0 and less than 1")
    if len(input_shape) != 3 or (input_shape[2] or 0) < 1:
        raise UsageError(
            f"input_shape is {tuple(input_shape)}: it has to be (height, width, channels)"
        )
    strides = [stem.stride, *(row.stride for row in FIGURE_5)] + [2, 2] * stem.pools
    smallest = math.prod(strides)
    if any(side is not None and side < smallest for side in input_shape[:2]):
        raise UsageError(
            f"input_shape is {tuple(input_shape)}: this stem takes images of at least"
            f" {smallest}x{smallest} pixels; enlarge smaller ones, or take another stem of"
            f" {', '.join(STEMS)}"
        )


def _check_top(
    include_top: bool, pooling: str | None, classifier_activation: str | None, auxiliary: bool
) -> None:
    if pooling not in (None, "avg", "max"):
        raise UsageError(f"unknown pooling {pooling!r}: accepted are 'avg', 'max' and None")
    if include_top and pooling == "max":
        raise UsageError(
            "pooling='max' with include_top=True: the classifier takes the average; give"
            " include_top=False as well"
        )
    if auxiliary and not include_top:
        raise UsageError(
            "auxiliary=True with include_top=False: the auxiliary classifier is trained along with"
            " the classifier; leave one of them out"
        )
    try:
        keras.activations.get(classifier_activation)
    except (TypeError, ValueError):
        raise UsageError(
            f"unknown classifier_activation {classifier_activation!r}: accepted are None, for"
            " logits, and the names of Keras' activations, such as 'softmax'"
        ) from None
