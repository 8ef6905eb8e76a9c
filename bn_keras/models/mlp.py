"""The network of the paper's section 4.1."""

from collections.abc import Sequence

import keras

from bn_keras.arguments import as_positive_integer, as_sizes
from bn_keras.batch_norm import BatchNormalization
from bn_keras.errors import UsageError
from bn_keras.models.initializers import Initializer, as_initializer, clone_initializer

_MLP_VARIANTS = ("baseline", "bn")


def SigmoidMLP(
    variant: str = "bn",
    classes: int = 10,
    input_shape: Sequence[int] = (28, 28, 1),
    *,
    units: Sequence[int] = (100, 100, 100),
    kernel_initializer: str | Initializer | None = None,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    synchronized: bool = False,
    virtual_batch_size: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """Builds fully connected sigmoid layers and a linear classifier, with or without BN.

    BN precedes each sigmoid and replaces the bias. Figure 1 shows percentiles of the last hidden
    layer's sigmoid inputs, the inputs of the layer "sigmoid_3".

    Args:
      variant: "bn" or "baseline", which has biases instead of BN.
      classes: number of logits.
      input_shape: shape of one example, which is flattened.
      units: width of each hidden layer, in order.
      kernel_initializer: initializer of all kernels, each of which is drawn independently; a name,
        an Initializer, or a function of shape and dtype. None uses a Gaussian of standard deviation
        0.1 (the paper: "small random Gaussian values"; the number is ours).
      momentum: fraction of BN's moving statistics kept at each step.
      epsilon: added to BN's variance under the root.
      synchronized: whether BN computes its batch statistics over all replicas.
      virtual_batch_size: number of examples per ghost batch, each normalized by its own statistics.
        None means the whole batch.
      name: model name. None uses "mlp_" followed by the variant.

    Returns:
      A functional model from [N, *input_shape] to logits [N, classes], float32.

    Raises:
      UsageError: an unknown variant or initializer, or a size that is not a positive integer.

    Source: Ioffe & Szegedy 2015, section 4.1.
    """
    if variant not in _MLP_VARIANTS:
        raise UsageError(f"unknown variant {variant!r}: expected one of {', '.join(_MLP_VARIANTS)}")
    as_positive_integer("classes", classes)
    units = as_sizes("units", units, "the positive width of each hidden layer, such as (100, 100)")
    input_shape = as_sizes(
        "input_shape", input_shape, "the positive sizes of one example, such as (28, 28, 1)"
    )
    if kernel_initializer is None:
        kernel_initializer = keras.initializers.RandomNormal(stddev=0.1)
    initializer = as_initializer("kernel_initializer", kernel_initializer)
    x = images = keras.Input(input_shape, name="images")
    # Flattened in the order of the axes, whatever keras.config.image_data_format() is.
    x = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
    for i, width in enumerate(units, start=1):
        x = keras.layers.Dense(
            width,
            use_bias=variant == "baseline",
            kernel_initializer=clone_initializer(initializer),
            name=f"dense_{i}",
        )(x)
        if variant == "bn":
            x = BatchNormalization(
                momentum=momentum,
                epsilon=epsilon,
                synchronized=synchronized,
                virtual_batch_size=virtual_batch_size,
                name=f"bn_{i}",
            )(x)
        x = keras.layers.Activation("sigmoid", name=f"sigmoid_{i}")(x)
    logits = keras.layers.Dense(
        classes,
        kernel_initializer=clone_initializer(initializer),
        dtype="float32",
        name="logits",
    )(x)
    return keras.Model(images, logits, name=name or f"mlp_{variant}")
