"""Replaces Keras' batch normalization with ours in any Keras model."""

from typing import Any

import keras

from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.fold import copy_state
from bn_keras.keras_internals import all_layers

# Functional models are instances of keras.Function; subclassed models are of neither class.
_CLONABLE = (keras.Sequential, keras.Function)


def replace_batch_norm(model: keras.Model) -> keras.Model:
    """Returns a copy of a model in which our layer replaces keras.layers.BatchNormalization.

    Layers keep their names, weights, frozen state and semantics: the moving variance stays biased,
    without Bessel's correction, as in Keras (unbiased=False). Layers in nested models and wrappers
    are replaced too. The given model is unchanged and shares nothing with the copy. The copy of a
    compiled model is compiled with the same arguments and a new optimizer.

    Args:
      model: built Functional or Sequential model.

    Returns:
      A model of the same type with the same outputs.

    Raises:
      UsageError: the model is not built, is a subclassed one, or contains a layer whose config does
        not describe its BatchNormalization.
    """
    if not model.built:
        raise UsageError(
            f"model {model.name!r} is not built: call it, or start it with a keras.Input"
        )
    if not isinstance(model, _CLONABLE):
        raise UsageError(
            f"model {model.name!r} is a subclassed {type(model).__name__}, whose layers are only in"
            " its code: use bn_keras.BatchNormalization there"
        )
    replaced = keras.models.clone_model(model, clone_function=_clone)
    for layer in all_layers(replaced):
        if type(layer) is keras.layers.BatchNormalization:
            raise UsageError(
                f"layer {layer.path!r} is created by its parent's code, not by a config: use"
                " bn_keras.BatchNormalization in that code"
            )
    for new, old in zip(all_layers(replaced), all_layers(model), strict=True):
        copy_state(old, new)
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    return replaced


def _clone(layer: keras.Layer) -> keras.Layer:
    if type(layer) is keras.layers.BatchNormalization:
        return BatchNormalization.from_config(layer.get_config())
    if isinstance(layer, _CLONABLE):
        return replace_batch_norm(layer)
    # Keras rejects Python lambdas from files; this lambda is already in memory.
    options = {"safe_mode": False} if isinstance(layer, keras.layers.Lambda) else {}
    return type(layer).from_config(_replace_in_config(layer.get_config()), **options)


def _replace_in_config(config: Any) -> Any:
    """Returns a config whose serialized keras.layers.BatchNormalization are replaced by ours."""
    if isinstance(config, list | tuple):
        return type(config)(_replace_in_config(c) for c in config)
    if not isinstance(config, dict):
        return config
    if (config.get("module"), config.get("class_name")) == ("keras.layers", "BatchNormalization"):
        return keras.saving.serialize_keras_object(BatchNormalization.from_config(config["config"]))
    return {key: _replace_in_config(value) for key, value in config.items()}
