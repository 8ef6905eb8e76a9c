"""Figure 5 of the paper as a table of modules, and the builder of all its networks."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import keras
import tensorflow as tf

from bn_keras.arguments import (
    as_positive_integer,
    as_sizes,
    check_positive_number,
    check_rate,
)
from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.models.dropout import Dropout
from bn_keras.models.initializers import Initializer, as_initializer, clone_initializer
from bn_keras.models.weights_file import HEAD, load_weights


class Row(NamedTuple):
    """One Inception module of Figure 5; the numbers are output channels.

    Attributes:
      name: the paper's name of the module.
      stride: 1, or 2 for a module that halves the map.
      conv1x1: the 1x1 branch; 0 omits it.
      reduce3x3, conv3x3: the 1x1 and the 3x3 convolution of the 3x3 branch.
      reduce_double, conv_double: the 1x1 and both 3x3 convolutions of the double 3x3 branch.
      pool: "avg" or "max"; the window is 3x3, with the stride of the module.
      projection: the 1x1 convolution after the pool; 0 omits it.
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


# The paper's projection of 128 in 4c and 4d contradicts its output size of 576 channels; 96 agrees
# with every output size. A preset's pool_projection replaces these two values.
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
    """The layers before module 3a.

    Attributes:
      size, stride: kernel size and stride of the first convolution.
      separable: whether the first convolution is separable, with depth multiplier 8.
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
    """Model settings of one of the networks of sections 4.2.2 and 4.2.3.

    Attributes:
      batch_norm: whether BN replaces the bias before every nonlinearity.
      activation: the nonlinearity.
      dropout: fraction of the features dropped before the classifier.
      local_response_normalization: whether the stem has this layer, as in GoogLeNet.
      initializer_scale: factor on the initial weights of the convolutions.
      per_activation_bn: whether BN in the last hidden layers (module 5b) has statistics and
        parameters per activation instead of per feature map.
    """

    batch_norm: bool
    activation: str
    dropout: float
    local_response_normalization: bool
    initializer_scale: float = 1.0
    per_activation_bn: bool = False


_INCEPTION = Variant(False, "relu", dropout=0.4, local_response_normalization=True)
_ACCELERATED = Variant(True, "relu", dropout=0.0, local_response_normalization=False)

# Section 4.2.3 lists the changes in the ensemble's six networks, but not which network has which.
# The combinations are our choice, as are the factor 2 and module 5b as the "last hidden layers".
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
    """One implementation's choices where Figure 5 leaves the network open.

    Attributes:
      pool_projection: channels of the projection after the pools of 4c and 4d.
      separable_stem: whether the 7x7 convolution is separable.
      separable_bn: whether BN, instead of a bias, follows the separable convolution.
      conv_bias: whether the convolutions before BN have a bias too.
      gamma: whether BN has a gamma; it always has a beta.
      epsilon: added to BN's variance under the root.
      symmetric: whether padding follows Caffe: convolutions of stride 2 pad both sides alike, pools
        of stride 2 pad only the far side, and average pools count their padding as zeros.
        Otherwise padding is TensorFlow's "same", whose split depends on the map size, and
        averages exclude it.
    """

    pool_projection: int
    separable_stem: bool
    separable_bn: bool
    conv_bias: bool
    gamma: bool
    epsilon: float
    symmetric: bool


# BN, Concatenate and local response normalization use the last axis, so Keras' image_data_format
# must not choose another one for the convolutions and pools.
_CHANNELS_LAST: dict[str, Any] = {"data_format": "channels_last"}

# "slim": BN comes from inception_v2_arg_scope, which does not cover `separable_conv2d`.
PRESETS = {
    "paper": Preset(96, True, True, conv_bias=False, gamma=True, epsilon=1e-3, symmetric=False),
    "slim": Preset(96, True, False, conv_bias=False, gamma=False, epsilon=1e-3, symmetric=False),
    "caffe": Preset(128, False, True, conv_bias=True, gamma=True, epsilon=1e-5, symmetric=True),
}


@keras.saving.register_keras_serializable("bn_keras")
class LocalResponseNormalization(keras.layers.Layer):
    """GoogLeNet's local response normalization over 5 neighboring channels.

    Caffe divides its alpha of 1e-4 by the window size. TensorFlow does not, so alpha is 2e-5 here.
    Computed in float32, the only dtype with a CPU kernel of known accuracy.

    Source: GoogLeNet's public prototxt (local_size 5, alpha 1e-4, beta 0.75).
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalizes inputs [N, H, W, C]; the output has the same shape and dtype."""
        outputs = tf.nn.local_response_normalization(
            tf.cast(inputs, tf.float32), depth_radius=2, bias=1.0, alpha=2e-5, beta=0.75
        )
        return tf.cast(outputs, inputs.dtype)


@keras.saving.register_keras_serializable("bn_keras")
class Scaled(keras.initializers.Initializer):
    """Initializer that multiplies the values of another initializer by a factor.

    Args:
      initializer: the other initializer.
      scale: factor.
    """

    def __init__(
        self, initializer: str | dict[str, Any] | keras.initializers.Initializer, scale: float
    ) -> None:
        self.initializer = keras.initializers.get(initializer)
        self.scale = scale

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        """Returns scaled initial values."""
        return self.scale * self.initializer(shape, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor arguments."""
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "scale": self.scale,
        }


def BNInception(
    variant: str = "bn_baseline",
    classes: int = 1000,
    input_shape: Sequence[int | None] = (224, 224, 3),
    width: float = 1.0,
    stem: str = "imagenet",
    *,
    modules: Sequence[str] | None = None,
    preset: str = "paper",
    pool_projection: int | None = None,
    separable_stem: bool | None = None,
    separable_bn: bool | None = None,
    gamma: bool | None = None,
    kernel_initializer: str | Initializer = "he_normal",
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
    virtual_batch_size: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """Builds the network of Figure 5 in one of the variants of sections 4.2.2 and 4.2.3.

    BN and the nonlinearity follow each convolution; the variants "inception" and
    "inception_sigmoid" have biases instead of BN. The layers "3a" to "5b" are the outputs of the
    modules: `keras.Model(model.input, model.get_layer("4e").output)` extracts features. The model
    returns logits, float32 under any dtype policy.

    A preset matches the weights of its origin. These weights also need the origin's images: RGB in
    [-1, 1] for TF-Slim; for a port of the Caffe model, what its documentation says, such as BGR in
    [0, 255] minus (104, 117, 128) for Cadene's.

    Images and maps have channels last, whatever keras.config.image_data_format() is.

    Args:
      variant: "inception", "bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid", a member of the
        ensemble, "bn_x30_ensemble_1" to "bn_x30_ensemble_6", or "inception_sigmoid".
      classes: number of logits.
      input_shape: (height, width, channels) of the images. Height and width may be None; otherwise
        they are at least the network's total stride: with all modules, 32 with stem "imagenet", 8
        with "cifar", 4 with "digits".
      width: factor on the number of channels of each convolution; the product is rounded and at
        least 1.
      stem: "imagenet", as in the paper; "cifar", a 3x3 convolution of stride 2 instead of the 7x7
        convolution, without pools; "digits", the same with stride 1.
      modules: names of the modules to build, in the order of Figure 5, such as ("3a", "3c", "5b"),
        for a smaller network. None builds all ten.
      preset: "paper"; "slim", TF-Slim's inception_v2, whose BN has no gamma and whose separable
        convolution has a bias instead of BN; "caffe", the PyTorch ports (pytorchcv, Cadene) of the
        Caffe model, with biases before BN, a plain stem, epsilon 1e-5 and Caffe's padding.
      pool_projection: channels of the projection after the pools of 4c and 4d. 96 agrees with the
        paper's output sizes; 128 is the value in its table. None uses the preset's value.
      separable_stem: whether the first convolution is separable, with depth multiplier 8. None uses
        the preset's value with stem "imagenet", and False with the other stems.
      separable_bn: whether BN, instead of a bias, follows a separable first convolution. None uses
        the preset's value. BN always follows the other convolutions.
      gamma: whether BN has a gamma; it always has a beta. None uses the preset's value.
      kernel_initializer: initializer of all kernels, each of which is drawn independently; a name,
        an Initializer, or a function of shape and dtype.
      initializer_scale: factor on the initial weights of the convolutions. None uses the variant's
        value.
      dropout: fraction of the features dropped before the classifier. None uses the variant's
        value.
      local_response_normalization: whether this layer follows both stages of the stem. None uses
        the variant's value.
      per_activation_bn: whether BN in module 5b normalizes each activation by itself, which needs
        a known height and width. None uses the variant's value.
      auxiliary: whether the model has a second output, the logits of an auxiliary classifier on
        module 4d. It serves only training; `without_auxiliary` returns the model without it.
      include_top: whether the model has a classifier; otherwise it returns the features.
      pooling: pooling of the features without the top: "avg", "max", or None for the last module's
        map.
      classifier_activation: activation after the logits, such as "softmax". None, unlike in
        keras.applications, returns logits.
      weights: path of a .weights.h5 or .keras file of this network, matched by layer name. The file
        may also contain a classifier or auxiliary classifier that this model does not have.
      momentum: fraction of BN's moving statistics kept at each step; the default is TF-Slim's.
      epsilon: added to BN's variance under the root. None uses the preset's value.
      synchronized: whether BN computes its batch statistics over all replicas.
      virtual_batch_size: number of examples per ghost batch, each normalized by its own statistics.
        None means the whole batch.
      name: model name. None uses the variant's name.

    Returns:
      A functional model from [N, height, width, channels] to [N, classes]; with auxiliary, to two
      such outputs; without the top, to [N, h, w, C] or, pooled, [N, C], where C is about
      1024 * width after module 5b.

    Raises:
      UsageError: an unknown variant, stem or preset, an invalid value, or weights of another
        network.

    Source: Ioffe & Szegedy 2015, Figure 5 and section 4.2; GoogLeNet (arXiv 1409.4842) for
    dropout and local response normalization; Inception-v3 (arXiv 1512.00567) for the auxiliary
    classifier; the source code of each preset's origin.
    """
    variant_settings = _lookup(
        "variant",
        variant,
        VARIANTS,
        dropout=dropout,
        local_response_normalization=local_response_normalization,
        initializer_scale=initializer_scale,
        per_activation_bn=per_activation_bn,
    )
    preset_settings = _lookup(
        "preset",
        preset,
        PRESETS,
        pool_projection=pool_projection,
        separable_bn=separable_bn,
        gamma=gamma,
        epsilon=epsilon,
    )
    stem_settings = _lookup("stem", stem, STEMS)
    if separable_stem is None:
        separable_stem = stem_settings.separable and preset_settings.separable_stem
    stem_settings = stem_settings._replace(separable=separable_stem)
    _check_numbers(classes, width, variant_settings, preset_settings)
    _check_top(include_top, pooling, classifier_activation, auxiliary)
    rows = _select_modules(modules, auxiliary, variant_settings.per_activation_bn)
    input_shape = _check_input_shape(input_shape, stem, rows)

    build = _LayerBuilder(
        variant_settings,
        preset_settings,
        width,
        as_initializer("kernel_initializer", kernel_initializer),
        momentum,
        synchronized,
        virtual_batch_size,
    )
    images = keras.Input(input_shape, name="images")
    x = _build_stem(build, images, stem_settings)
    auxiliary_logits = []
    for row in rows:
        x = _build_module(build, x, row)
        # The paper does not describe the auxiliary classifier. As in Inception-v3, it follows the
        # last map before a module of stride 2.
        if auxiliary and row.name == "4d":
            features = _build_auxiliary_features(build, x)
            auxiliary_logits.append(
                build.classifier(features, classes, classifier_activation, "auxiliary_")
            )
    if include_top or pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(name="features", **_CHANNELS_LAST)(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(name="features", **_CHANNELS_LAST)(x)
    if include_top:
        if variant_settings.dropout:
            x = Dropout(variant_settings.dropout, name="dropout")(x)
        x = build.classifier(x, classes, classifier_activation)
    outputs = [x, *auxiliary_logits] if auxiliary_logits else x
    model = keras.Model(images, outputs, name=name or variant)
    if weights is not None:
        load_weights(model, weights, optional=HEAD)
    return model


def without_auxiliary(model: keras.Model) -> keras.Model:
    """Returns a model with only the first output of `model`; both share all layers.

    Args:
      model: BNInception or any other model. A model with one output is returned unchanged.
    """
    if len(model.outputs) == 1:
        return model
    return keras.Model(model.input, model.outputs[0], name=model.name)


@dataclasses.dataclass(frozen=True)
class _LayerBuilder:
    """Builds the layers of one network with their common settings."""

    variant: Variant
    preset: Preset
    width: float
    initializer: Initializer
    momentum: float
    synchronized: bool
    virtual_batch_size: int | None
    bn_axis: int | list[int] = -1

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
        """Builds a convolution, BN instead of its bias, and the nonlinearity."""
        has_bn = self.variant.batch_norm and (self.preset.separable_bn or not separable)
        if self.preset.symmetric and strides > 1:
            x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad", **_CHANNELS_LAST)(x)
            padding = "valid"
        options: dict[str, Any] = dict(
            filters=max(1, round(filters * self.width)),
            kernel_size=size,
            strides=strides,
            padding=padding,
            use_bias=self.preset.conv_bias or not has_bn,
            name=f"{name}_conv",
            **_CHANNELS_LAST,
        )
        if separable:
            x = keras.layers.SeparableConv2D(
                **options,
                depth_multiplier=8,
                depthwise_initializer=self._conv_initializer(),
                pointwise_initializer=self._conv_initializer(),
            )(x)
        else:
            x = keras.layers.Conv2D(**options, kernel_initializer=self._conv_initializer())(x)
        if has_bn:
            x = self._batch_norm(f"{name}_bn")(x)
        activation = self.variant.activation
        return keras.layers.Activation(activation, name=f"{name}_{activation}")(x)

    def classifier(
        self, x: keras.KerasTensor, classes: int, activation: str | None, prefix: str = ""
    ) -> keras.KerasTensor:
        """Builds the linear layer to the logits and the activation after it, if any."""
        x = keras.layers.Dense(
            classes,
            kernel_initializer=clone_initializer(self.initializer),
            dtype="float32",
            name=f"{prefix}logits",
        )(x)
        if activation is None:
            return x
        return keras.layers.Activation(activation, dtype="float32", name=f"{prefix}predictions")(x)

    def pool(self, x: keras.KerasTensor, kind: str, strides: int, name: str) -> keras.KerasTensor:
        """Builds a 3x3 pool, "avg" or "max"."""
        padding = "same"
        # Max pools of stride 1 are the same under both kinds of padding.
        if self.preset.symmetric and (kind == "avg" or strides > 1):
            # Caffe rounds sizes up: one more row and column on the far side. Zeros there do not
            # change a maximum, since the nonlinearities before the pools are never negative.
            margin = 1 if kind == "avg" else ((0, 1), (0, 1))
            x = keras.layers.ZeroPadding2D(margin, name=f"{name}_pad", **_CHANNELS_LAST)(x)
            padding = "valid"
        layer = {"avg": keras.layers.AveragePooling2D, "max": keras.layers.MaxPooling2D}[kind]
        return layer(3, strides=strides, padding=padding, name=name, **_CHANNELS_LAST)(x)

    def _batch_norm(self, name: str) -> BatchNormalization:
        return BatchNormalization(
            axis=self.bn_axis,
            momentum=self.momentum,
            epsilon=self.preset.epsilon,
            scale=self.preset.gamma,
            synchronized=self.synchronized,
            virtual_batch_size=self.virtual_batch_size,
            name=name,
        )

    def _conv_initializer(self) -> Initializer:
        initializer = clone_initializer(self.initializer)
        if self.variant.initializer_scale == 1:
            return initializer
        return Scaled(initializer, self.variant.initializer_scale)


def _build_stem(build: _LayerBuilder, x: keras.KerasTensor, stem: Stem) -> keras.KerasTensor:
    lrn = build.variant.local_response_normalization
    x = build.conv(x, 64, stem.size, "stem_1", strides=stem.stride, separable=stem.separable)
    if stem.pools:
        x = build.pool(x, "max", 2, "stem_1_pool")
    if lrn:
        x = LocalResponseNormalization(name="stem_1_lrn")(x)
    x = build.conv(x, 64, 1, "stem_2_reduce")
    x = build.conv(x, 192, 3, "stem_2")
    if lrn:
        x = LocalResponseNormalization(name="stem_2_lrn")(x)
    if stem.pools:
        x = build.pool(x, "max", 2, "stem_2_pool")
    return x


def _build_module(build: _LayerBuilder, x: keras.KerasTensor, row: Row) -> keras.KerasTensor:
    if row.name in ("4c", "4d"):
        row = row._replace(projection=build.preset.pool_projection)
    if row.name == "5b" and build.variant.per_activation_bn:
        build = dataclasses.replace(build, bn_axis=[1, 2, 3])
    branches = []
    if row.conv1x1:
        branches.append(build.conv(x, row.conv1x1, 1, f"{row.name}_1x1"))

    single = build.conv(x, row.reduce3x3, 1, f"{row.name}_3x3_reduce")
    branches.append(build.conv(single, row.conv3x3, 3, f"{row.name}_3x3", strides=row.stride))

    double = build.conv(x, row.reduce_double, 1, f"{row.name}_double_reduce")
    double = build.conv(double, row.conv_double, 3, f"{row.name}_double_1")
    branches.append(
        build.conv(double, row.conv_double, 3, f"{row.name}_double_2", strides=row.stride)
    )

    pool = build.pool(x, row.pool, row.stride, f"{row.name}_pool")
    if row.projection:
        pool = build.conv(pool, row.projection, 1, f"{row.name}_projection")
    branches.append(pool)
    if len({branch.shape[1:3] for branch in branches}) > 1:
        raise UsageError(
            f"module {row.name} cannot halve its {x.shape[1]}x{x.shape[2]} maps evenly with this"
            " preset: choose image sides that are multiples of 32 pixels (8 with stem 'cifar', 4"
            " with 'digits'), or another preset"
        )
    return keras.layers.Concatenate(name=row.name)(branches)


def _build_auxiliary_features(build: _LayerBuilder, x: keras.KerasTensor) -> keras.KerasTensor:
    """Builds the features of Inception-v3's auxiliary classifier.

    A 14x14 map becomes 4x4 and then 1x1. On smaller maps the windows are as large as the map; on
    larger ones the remaining map is averaged.
    """

    def window(largest: int) -> int:
        return min([largest, *(side for side in x.shape[1:3] if side is not None)])

    x = keras.layers.AveragePooling2D(
        window(5), strides=3, name="auxiliary_pool", **_CHANNELS_LAST
    )(x)
    x = build.conv(x, 128, 1, "auxiliary_reduce")
    x = build.conv(x, 768, window(4), "auxiliary", padding="valid")
    return keras.layers.GlobalAveragePooling2D(name="auxiliary_features", **_CHANNELS_LAST)(x)


_Entry = TypeVar("_Entry", bound=NamedTuple)


def _lookup(kind: str, name: str, table: Mapping[str, _Entry], **overrides: float | None) -> _Entry:
    """Returns the entry of a table, with the overrides that are not None."""
    if not isinstance(name, str) or name not in table:
        raise UsageError(f"unknown {kind} {name!r}: expected one of {', '.join(table)}")
    return table[name]._replace(**{k: v for k, v in overrides.items() if v is not None})


def _check_numbers(classes: int, width: float, variant: Variant, preset: Preset) -> None:
    as_positive_integer("classes", classes)
    as_positive_integer("pool_projection", preset.pool_projection)
    check_positive_number("width", width)
    check_positive_number("initializer_scale", variant.initializer_scale)
    check_rate("dropout", variant.dropout)


def _select_modules(
    modules: Sequence[str] | None, auxiliary: bool, per_activation_bn: bool
) -> list[Row]:
    """Returns the rows of Figure 5 to build."""
    if modules is None:
        return list(FIGURE_5)
    given = list(modules) if isinstance(modules, Iterable) else []
    rows = [row for row in FIGURE_5 if row.name in given]
    names = [row.name for row in rows]
    if not names or names != given:
        raise UsageError(
            f"modules={modules!r} is invalid: expected names in this order, each once:"
            f" {', '.join(row.name for row in FIGURE_5)}"
        )
    for name, needed in (("4d", auxiliary), ("5b", per_activation_bn)):
        if needed and name not in names:
            what = "auxiliary=True" if name == "4d" else "per_activation_bn=True"
            raise UsageError(
                f"{what} needs module {name}, which modules={modules!r} leaves out: add it"
            )
    return rows


def _check_input_shape(
    input_shape: Sequence[int | None], stem: str, modules: Sequence[Row]
) -> tuple[int | None, ...]:
    """Returns the input shape as a tuple if a network with these modules accepts it."""
    expected = "(height, width, channels), each positive; height and width may be None"
    input_shape = as_sizes("input_shape", input_shape, expected, unknown=True)
    invalid = f"input_shape={input_shape} is invalid"
    if len(input_shape) != 3 or input_shape[2] is None:
        raise UsageError(f"{invalid}: expected {expected}")
    pool_strides = [2, 2] if STEMS[stem].pools else []
    min_side = math.prod([STEMS[stem].stride, *pool_strides, *(row.stride for row in modules)])
    if any(side is not None and side < min_side for side in input_shape[:2]):
        raise UsageError(
            f"{invalid}: stem {stem!r} needs images of at least {min_side}x{min_side} pixels;"
            f" enlarge the images or choose another stem ({', '.join(STEMS)})"
        )
    return input_shape


def _check_top(
    include_top: bool, pooling: str | None, classifier_activation: str | None, auxiliary: bool
) -> None:
    if pooling not in (None, "avg", "max"):
        raise UsageError(f"unknown pooling {pooling!r}: expected 'avg', 'max' or None")
    if include_top and pooling == "max":
        raise UsageError(
            "pooling='max' requires include_top=False: the classifier uses average pooling"
        )
    if auxiliary and not include_top:
        raise UsageError(
            "auxiliary=True requires include_top=True: the auxiliary classifier is trained together"
            " with the classifier"
        )
    try:
        keras.activations.get(classifier_activation)
    except (TypeError, ValueError):
        raise UsageError(
            f"unknown classifier_activation {classifier_activation!r}: expected None for logits, or"
            " the name of a Keras activation such as 'softmax'"
        ) from None
