"""Replaces Keras' batch normalization with ours in any Keras model."""

from typing import Any

import keras

from bn_keras.arguments import check_model
from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.model_copy import ModelCopier


def replace_batch_norm(model: keras.Model) -> keras.Model:
    """Returns a copy of a model in which our layer replaces keras.layers.BatchNormalization.

    Layers keep their names, weights, frozen state and semantics: the moving variance stays biased,
    without Bessel's correction, as in Keras (unbiased=False). The layer is replaced wherever it
    occurs: in nested and subclassed models, in wrappers and in cells. Subclasses of it are copied,
    and so are a layer whose `call` has been replaced and one with epsilon=0, which ours rejects.

    Everything else is the same in the copy: other layers with their state, whether or not their
    classes have a get_config; shared layers; seeds; the arguments of compile() and the state of the
    optimizer. See ModelCopier. The given model is unchanged and shares no state with the copy.

    Args:
      model: built model: Functional, Sequential or subclassed.

    Returns:
      A model of the same class with the same outputs.

    Raises:
      UsageError: `model` is not a keras.Model, is not built, or contains an object that cannot be
        copied, such as a lock.
    """
    check_model(model)
    if not model.built:
        raise UsageError(
            f"model {model.name!r} is not built: call it, or start it with a keras.Input"
        )
    return _Replacer().copy_model(model)


class _Replacer(ModelCopier):
    def copy_operation(self, old: keras.Operation) -> Any:
        """Returns our layer as the copy of Keras', and a plain copy of any other."""
        # A subclass may compute something else, and so may a `call` replaced on the layer.
        is_keras_own = type(old) is keras.layers.BatchNormalization and "call" not in vars(old)
        if is_keras_own and old.epsilon > 0:
            return self.construct_like(old, BatchNormalization, unbiased=False)
        return super().copy_operation(old)
