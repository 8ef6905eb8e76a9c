"""Builds what a config describes: the data, the model, the schedule, the trainer."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from bn_keras.data.pipeline import Data, open_data
from bn_keras.data.splits import Source
from bn_keras.errors import UsageError
from bn_keras.models import BNInception, SigmoidMLP
from bn_keras.runs.settings import replaced
from bn_keras.text import counted
from bn_keras.training.config import MLP_SETTINGS, default_config
from bn_keras.training.fine_tuning import freeze
from bn_keras.training.length import global_micro_batch_size, num_steps
from bn_keras.training.schedule import ExamplesSchedule
from bn_keras.training.step import Trainer


def build_data(
    config: ConfigDict, source: Source | None = None, validation_only: bool = False
) -> Data:
    """Opens the data of config.data; config.seed determines the order of its examples.

    Args:
      config: see `default_config`.
      source: replaces the source that the config names.
      validation_only: whether the training examples are not needed, and need not exist; those of
        the validation split take their place.

    Raises:
      UsageError: an invalid setting, or data that is not available.
    """
    if validation_only:
        config = replaced(config, {"data.train_split": config.data.validation_split})
    return open_data(config.data, config.seed, source)


def build_model(
    config: ConfigDict, input_shape: Sequence[int], classes: int, training: bool = False
) -> keras.Model:
    """Builds the network of config.model and config.batch_norm, in config.train.precision.

    The layers up to config.model.freeze are not trainable.

    Args:
      config: see `default_config`.
      input_shape: shape of one example, (height, width, channels).
      classes: number of logits.
      training: whether to add the auxiliary classifier if config.model.auxiliary_weight is not 0;
        its logits are then a second output.

    Raises:
      UsageError: an unknown name, or a value that the network does not accept.
    """
    builder = _BUILDERS.get(config.model.name)
    if builder is None:
        raise UsageError(
            f"unknown model.name {config.model.name!r}: expected one of {', '.join(_BUILDERS)}"
        )
    batch_norm = dict(
        momentum=config.batch_norm.momentum,
        synchronized=config.batch_norm.synchronized,
        virtual_batch_size=config.batch_norm.virtual_batch_size or None,
    )
    if config.batch_norm.epsilon:
        batch_norm["epsilon"] = config.batch_norm.epsilon
    previous_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.train.precision)
    try:
        model = builder(
            config.model,
            training,
            variant=config.model.variant,
            classes=classes,
            input_shape=input_shape,
            kernel_initializer=build_initializer(
                config.model.initializer, config.model.initializer_stddev
            ),
            **batch_norm,
        )
    finally:
        keras.config.set_dtype_policy(previous_policy)
    freeze(model, config.model.freeze)
    return model


def build_schedule(
    config: ConfigDict, num_train_examples: int, rate_factor: float = 1.0
) -> ExamplesSchedule:
    """Builds the schedule of config.schedule, with epochs converted to examples."""
    schedule = config.schedule
    cosine_steps = schedule.cosine_steps or num_steps(config, num_train_examples)
    return ExamplesSchedule(
        schedule.base_rate * rate_factor,
        config.train.global_batch_size,
        reference_batch_size=schedule.reference_batch_size,
        decay=schedule.decay,
        decay_factor=schedule.decay_factor,
        decay_examples=max(1, round(schedule.decay_epochs * num_train_examples)),
        warmup_examples=round(schedule.warmup_epochs * num_train_examples),
        cosine_examples=cosine_steps * config.train.global_batch_size,
    )


def build_trainer(
    config: ConfigDict,
    strategy: tf.distribute.Strategy,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    num_train_examples: int,
    rate_factor: float = 1.0,
    class_weights: Sequence[float] | np.ndarray | None = None,
) -> Trainer:
    """Builds the trainer that a config describes, with initial weights drawn from its seed.

    Args:
      config: see `default_config`.
      strategy: strategy that distributes the training.
      input_shape: shape of one example, (height, width, channels).
      num_classes: number of logits.
      num_train_examples: examples per epoch of the schedule.
      rate_factor: factor on the learning rate.
      class_weights: weight of each class in the loss; None weighs all equally.

    Raises:
      UsageError: a value that the network or the schedule does not accept.
    """
    _check_ghost_batches(config, strategy.num_replicas_in_sync)
    keras.utils.set_random_seed(config.seed)
    with strategy.scope():
        model = build_model(config, input_shape, num_classes, training=True)
        optimizer = keras.optimizers.SGD(
            build_schedule(config, num_train_examples, rate_factor), momentum=config.train.momentum
        )
    return Trainer(
        model,
        optimizer,
        strategy,
        config.train.global_batch_size,
        l2=config.train.l2,
        auxiliary_weight=config.model.auxiliary_weight,
        label_smoothing=config.train.label_smoothing,
        micro_batches=config.train.micro_batches,
        ema=config.train.ema,
        loss_scaling=config.train.precision == "mixed_float16",
        head_factor=config.schedule.head_factor,
        class_weights=class_weights,
    )


def build_trainer_for(
    config: ConfigDict, strategy: tf.distribute.Strategy, data: Data, rate_factor: float = 1.0
) -> Trainer:
    """Builds the trainer of a config for the examples and classes of `data`; see build_trainer."""
    return build_trainer(
        config,
        strategy,
        input_shape=data.input_shape,
        num_classes=data.num_classes,
        num_train_examples=data.num_train_examples,
        rate_factor=rate_factor,
        class_weights=data.class_weights,
    )


def _check_ghost_batches(config: ConfigDict, replicas: int) -> None:
    """Raises UsageError unless the ghost batches divide a replica's part of a mini-batch."""
    size = config.batch_norm.virtual_batch_size
    examples = global_micro_batch_size(config) // replicas
    if size and examples % size:
        raise UsageError(
            f"batch_norm.virtual_batch_size={size} is invalid: expected a divisor of the"
            f" {counted(examples, 'example')} of each replica's mini-batch"
            " (train.global_batch_size / train.micro_batches / replicas), or 0"
        )


def _build_inception(model: ConfigDict, training: bool, **options: Any) -> keras.Model:
    return BNInception(
        **options,
        preset=model.preset,
        pool_projection=model.pool_projection or None,
        width=model.width,
        stem=model.stem,
        modules=model.modules or None,
        initializer_scale=model.initializer_scale,
        dropout=model.dropout,
        local_response_normalization=model.local_response_normalization,
        per_activation_bn=model.per_activation_bn,
        auxiliary=training and model.auxiliary_weight > 0,
    )


def _build_mlp(model: ConfigDict, training: bool, **options: Any) -> keras.Model:
    defaults = default_config().model
    for key in set(defaults) - MLP_SETTINGS:
        if model.get(key, defaults[key]) != defaults[key]:
            raise UsageError(
                f"model.{key}={model[key]!r} has no effect on model.name='mlp': leave it at"
                f" {defaults[key]!r}"
            )
    return SigmoidMLP(**options)


_BUILDERS = {"inception": _build_inception, "mlp": _build_mlp}


def build_initializer(name: str, stddev: float) -> keras.initializers.Initializer:
    """Builds config.model.initializer; raises UsageError for an unknown name."""
    if name == "normal":
        return keras.initializers.RandomNormal(stddev=stddev)
    try:
        initializer = keras.initializers.get(name)
    except (ValueError, KeyError):  # KeyError: a name that needs arguments, such as "constant"
        initializer = None
    if initializer is None or "seed" not in initializer.get_config():
        raise UsageError(
            f"unknown model.initializer {name!r}: expected 'normal' or the name of one of Keras'"
            " random initializers, such as 'he_normal' or 'glorot_uniform'"
        )
    return initializer
