"""Batch normalization exchanged in any Keras model."""

import keras

from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.keras_internals import all_layers

# Functional models are Functions; a subclassed model is neither.
_CLONABLE = (keras.Sequential, keras.Function)


def replace_batch_norm(model: keras.Model) -> keras.Model:
    """Gives the same network with each keras.layers.BatchNormalization replaced by ours.

    Layers keep their names, weights, frozen state and meaning: the moving variance stays biased,
    as in Keras (unbiased=False). Nested models and wrappers are gone through. The given model is
    left alone and shares nothing with the new one, which is compiled likewise if that is, with a
    new optimizer.

    Args:
      model: Functional or Sequential, built.

    Returns:
      A model of the same kind, with the same outputs.

    Raises:
      UsageError: the model isn't built, or holds a layer that its config doesn't describe, such as
        a subclassed model with a BatchNormalization in its code.
    """
    if not model.built:
        raise UsageError(
            f"model {model.name!r} has no weights yet: call it, or give it a keras.Input, first"
        )
    if not isinstance(model, _CLONABLE):
        raise UsageError(
            f"model {model.name!r} is a subclassed {type(model).__name__}, whose layers its code"
            " makes: use bn_keras.BatchNormalization in that code"
        )
    replaced = keras.models.clone_model(model, clone_function=_clone)
    for layer in all_layers(replaced):
        if type(layer) is keras.layers.BatchNormalization:
            raise UsageError(
                f"{layer.path!r} is made by its parent's code, not by a config, and can't be"
                " replaced from outside: use bn_keras.BatchNormalization in that code"
            )
    for new, old in zip(all_layers(replaced), all_layers(model), strict=True):
        # As in a file: some layers, such as Normalization, make more of it than their weights.
        values = {}
        old.save_own_variables(values)
        new.load_own_variables(values)
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    return replaced


def _clone(layer: keras.Layer) -> keras.Layer:
    if type(layer) is keras.layers.BatchNormalization:
        return BatchNormalization.from_config(layer.get_config())
    if isinstance(layer, _CLONABLE):
        return replace_batch_norm(layer)
    # Keras refuses Python lambdas from a file; this one is in memory already.
    unsafe = {"safe_mode": False} if isinstance(layer, keras.layers.Lambda) else {}
    return type(layer).from_config(_replaced(layer.get_config()), **unsafe)


def _replaced(config: object) -> object:
    """Replaces the serialized layers inside a config."""
    if isinstance(config, list | tuple):
        return type(config)(_replaced(c) for c in config)
    if not isinstance(config, dict):
        return config
    if (config.get("module"), config.get("class_name")) == ("keras.layers", "BatchNormalization"):
        return keras.saving.serialize_keras_object(BatchNormalization.from_config(config["config"]))
    return {key: _replaced(value) for key, value in config.items()}
