"""The paper's networks."""

from collections.abc import Sequence

import keras
from ml_collections import ConfigDict

from bn_keras.errors import UsageError
from bn_keras.models.inception import BNInception
from bn_keras.models.mlp import SigmoidMLP

__all__ = ["BNInception", "SigmoidMLP", "from_config"]


def from_config(config: ConfigDict, input_shape: Sequence[int], classes: int) -> keras.Model:
    """Builds the network that config.model and config.batch_norm describe.

    Args:
      config: as configs/default.py.
      input_shape: of one example, (height, width, channels).
      classes: number of logits.

    Raises:
      UsageError: an unknown name, or a value that the network can't take.
    """
    options = dict(
        variant=config.model.variant,
        classes=classes,
        input_shape=input_shape,
        kernel_initializer=_initializer(config.model),
        **config.batch_norm,
    )
    if config.model.name == "inception":
        return BNInception(
            **options,
            width=config.model.width,
            stem=config.model.stem,
            dropout=config.model.dropout,
            local_response_normalization=config.model.local_response_normalization,
        )
    if config.model.name == "mlp":
        return SigmoidMLP(**options)
    raise UsageError(f"unknown model.name {config.model.name!r}: accepted are inception, mlp")


def _initializer(model: ConfigDict) -> keras.initializers.Initializer:
    if model.initializer == "normal":
        return keras.initializers.RandomNormal(stddev=model.initializer_stddev)
    try:
        return keras.initializers.get(model.initializer)
    except ValueError:
        raise UsageError(
            f"unknown model.initializer {model.initializer!r}: accepted are 'normal' and the"
            " names of Keras initializers, such as 'he_normal' or 'glorot_uniform'"
        ) from None
