"""The paper's networks."""

from collections.abc import Sequence

import keras
from ml_collections import ConfigDict

from bn_keras.errors import UsageError
from bn_keras.models.inception import BNInception, without_auxiliary
from bn_keras.models.mlp import SigmoidMLP

__all__ = ["BNInception", "SigmoidMLP", "from_config", "without_auxiliary"]


def from_config(
    config: ConfigDict, input_shape: Sequence[int], classes: int, training: bool = False
) -> keras.Model:
    """Builds the network of config.model and config.batch_norm, in config.train.precision.

    Args:
      config: as configs/default.py.
      input_shape: of one example, (height, width, channels).
      classes: number of logits.
      training: whether to build what only training needs: the auxiliary classifier, if
        config.model.auxiliary_weight is not 0, whose logits are then a second output.

    Raises:
      UsageError: an unknown name, or a value that the network can't take.
    """
    build = _BUILDERS.get(config.model.name)
    if build is None:
        raise UsageError(
            f"unknown model.name {config.model.name!r}: accepted are {', '.join(_BUILDERS)}"
        )
    if config.train.precision not in _PRECISIONS:
        raise UsageError(
            f"unknown train.precision {config.train.precision!r}: accepted are"
            f" {', '.join(_PRECISIONS)}"
        )
    batch_norm = dict(
        momentum=config.batch_norm.momentum, synchronized=config.batch_norm.synchronized
    )
    if config.batch_norm.epsilon:
        batch_norm["epsilon"] = config.batch_norm.epsilon
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.train.precision)
    try:
        return build(
            config.model,
            training,
            variant=config.model.variant,
            classes=classes,
            input_shape=input_shape,
            kernel_initializer=_initializer(config.model),
            **batch_norm,
        )
    finally:
        keras.config.set_dtype_policy(before)


def _inception(model: ConfigDict, training: bool, **options: object) -> keras.Model:
    return BNInception(
        **options,
        preset=model.preset,
        pool_projection=model.pool_projection or None,
        width=model.width,
        stem=model.stem,
        initializer_scale=model.initializer_scale,
        dropout=model.dropout,
        local_response_normalization=model.local_response_normalization,
        per_activation_bn=model.per_activation_bn,
        auxiliary=training and model.auxiliary_weight > 0,
    )


def _mlp(model: ConfigDict, training: bool, **options: object) -> keras.Model:
    return SigmoidMLP(**options)


_BUILDERS = {"inception": _inception, "mlp": _mlp}
_PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def _initializer(model: ConfigDict) -> keras.initializers.Initializer:
    if model.initializer == "normal":
        return keras.initializers.RandomNormal(stddev=model.initializer_stddev)
    try:
        initializer = keras.initializers.get(model.initializer)
    except (ValueError, KeyError):  # what a name asks for beyond itself, as constant does
        initializer = None
    if initializer is None or "seed" not in initializer.get_config():
        raise UsageError(
            f"unknown model.initializer {model.initializer!r}: accepted are 'normal' and the"
            " names of Keras' random initializers, such as 'he_normal' or 'glorot_uniform'"
        )
    return initializer
