"""Augmentation beyond the paper: RandAugment, MixUp and CutMix.

Like all preprocessing, these are functions of uniform numbers in [0, 1) that the caller draws.
RandAugment passes explicit values to keras-cv's layers: their own random generators are stateful,
so that an augmented image would depend on everything drawn before it. MixUp and CutMix are
implemented here for the same reason, and because keras-cv 0.9's CutMix computes the label weights
from a box that may extend beyond the image, an error of 0.17 on average at alpha=1.
"""

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

# Operations applied to each image in sequence, and the standard deviation of their magnitudes
# (keras-cv's defaults).
NUM_OPERATIONS = 3
MAGNITUDE_STDDEV = 0.15
# Largest value that keras-cv's policy adds to pixels before Solarization inverts them.
MAX_ADDITION = 110.0
# Per operation: one number for its choice, two for its magnitude and direction.
RANDOM_AUGMENT_UNIFORMS = 3 * NUM_OPERATIONS

# Per mixed image: the weight of the other image, and the box's centre, vertical and horizontal.
MIXING_UNIFORMS = 3

_WHITE = 255.0
_VALUE_RANGE = (0.0, _WHITE)
# Bisections of [0, 1] that find a quantile.
_BISECTIONS = 30

# Maps an image [1, H, W, C] and two uniform numbers [1, 1] to an image of the same shape.
Operation = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def apply_random_augment(images: tf.Tensor, uniforms: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Applies randomly chosen operations to each image.

    Each operation is one of the ten of `random_augment_operations`, or none, with equal
    probability, which corresponds to keras-cv's rate of 10/11.

    Args:
      images: float32 [n, H, W, 1 or 3] in [0, 255].
      uniforms: float32 [n, RANDOM_AUGMENT_UNIFORMS] in [0, 1).
      magnitude: in (0, 1].

    Returns:
      Same shape, dtype and range.

    Source: Cubuk et al. 2019, arXiv 1909.13719.
    """
    operations = [*random_augment_operations(magnitude).values(), lambda image, *_: image]

    def augment_one(arguments: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, row = arguments[0][tf.newaxis], arguments[1]
        shape = image.shape
        for draws in tf.unstack(tf.reshape(row, [NUM_OPERATIONS, 3, 1, 1])):
            choice, first, second = tf.unstack(draws)
            branches = [
                functools.partial(operation, image, first, second) for operation in operations
            ]
            index = tf.cast(choice[0, 0] * len(operations), tf.int32)
            image = tf.ensure_shape(tf.switch_case(index, branches), shape)
        return image[0]

    return tf.map_fn(
        augment_one,
        (images, uniforms),
        fn_output_signature=tf.TensorSpec(images.shape[1:], images.dtype),
    )


def random_augment_operations(magnitude: float) -> dict[str, Operation]:
    """Returns the operations of keras_cv.layers.RandAugment by their names in its policy.

    Their values are distributed as in keras-cv: normally around the magnitude, clipped to [0, 1],
    or uniformly between -magnitude and magnitude. Equalization and auto-contrast have no magnitude.
    Color degeneration leaves grey images unchanged.
    """
    # Imported here because it is slow and rarely needed.
    from keras_cv import layers

    # Whatever the dtype policy of the network.
    dtype = "float32"
    auto_contrast = layers.AutoContrast(_VALUE_RANGE, dtype=dtype).augment_images
    # Equalization branches on the value of a tensor, which requires a tf.function.
    equalize = tf.function(layers.Equalization(_VALUE_RANGE, dtype=dtype).augment_images)
    solarize = layers.Solarization(_VALUE_RANGE, dtype=dtype).augment_images
    color = layers.RandomColorDegeneration(1.0, dtype=dtype).augment_images
    contrast = layers.RandomContrast(_VALUE_RANGE, 1.0, dtype=dtype).augment_images
    brightness = layers.RandomBrightness(1.0, _VALUE_RANGE, dtype=dtype).augment_images
    shear = layers.RandomShear(1.0, 1.0, dtype=dtype).augment_images
    translate = layers.RandomTranslation(1.0, 1.0, dtype=dtype).augment_images

    def normal_magnitude(uniform: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(magnitude + MAGNITUDE_STDDEV * tf.math.ndtri(uniform), 0.0, 1.0)

    def with_random_sign(uniform: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        return tf.where(uniform < 0.5, -value, value)

    def uniform_magnitude(uniform: tf.Tensor) -> tf.Tensor:
        return magnitude * (2 * uniform - 1)

    zero = tf.zeros([1, 1])
    return {
        "auto_contrast": lambda image, *_: auto_contrast(image),
        "equalize": lambda image, *_: equalize(image),
        "solarize": lambda image, first, second: solarize(
            image,
            {
                "additions": MAX_ADDITION * normal_magnitude(first),
                "thresholds": _WHITE * (1 - normal_magnitude(second)),
            },
        ),
        "color": lambda image, first, _: (
            image if image.shape[-1] == 1 else color(image, normal_magnitude(first))
        ),
        "contrast": lambda image, first, _: contrast(image, 1 + uniform_magnitude(first)),
        "brightness": lambda image, first, _: brightness(image, _WHITE * uniform_magnitude(first)),
        "shear_x": lambda image, first, second: shear(
            image, {"shear_x": with_random_sign(second, normal_magnitude(first)), "shear_y": None}
        ),
        "shear_y": lambda image, first, second: shear(
            image, {"shear_x": None, "shear_y": with_random_sign(second, normal_magnitude(first))}
        ),
        "translate_x": lambda image, first, _: translate(
            image, {"width_translations": uniform_magnitude(first), "height_translations": zero}
        ),
        "translate_y": lambda image, first, _: translate(
            image, {"width_translations": zero, "height_translations": uniform_magnitude(first)}
        ),
    }


@dataclasses.dataclass(frozen=True)
class Mixing:
    """MixUp, CutMix, or both in alternating steps: mixes images and their labels in pairs.

    Rows 0 and 1 of the global batch form a pair, as do rows 2 and 3, and so on. Each image of a
    pair is mixed with the other one, with a weight of its own. If each replica has an even number
    of examples, no pair is split between replicas.

    Attributes:
      mixup: alpha of MixUp, which blends the images; 0 turns it off.
      cutmix: alpha of CutMix, which pastes a box of the other image; 0 turns it off.
      num_classes: number of classes.

    Source: Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899.
    """

    mixup: float
    cutmix: float
    num_classes: int

    def mix(
        self, images: tf.Tensor, labels: tf.Tensor, uniforms: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes the examples of a global batch, or of one replica's part of it.

        Args:
          images: float32 [n, H, W, C], n even.
          labels: int32 [n].
          uniforms: float32 [n, MIXING_UNIFORMS] in [0, 1).
          step: integer scalar; with both kinds of mixing, odd steps use CutMix.

        Returns:
          Images of the same shape, and soft labels, float32 [n, num_classes].
        """
        count, height, width, channels = images.shape
        kinds = [(_mixup_weights, self.mixup), (_cutmix_weights, self.cutmix)]
        branches = [
            functools.partial(compute_weights, uniforms, alpha, height, width)
            for compute_weights, alpha in kinds
            if alpha
        ]
        rows, columns = tf.switch_case(tf.cast(step % len(branches), tf.int32), branches)
        weights = tf.reduce_mean(rows, axis=1) * tf.reduce_mean(columns, axis=1)
        labels = _blend(tf.one_hot(labels, self.num_classes), weights[:, tf.newaxis])
        # Blending whole image rows is several times faster than blending pixels of three numbers.
        pixels = tf.reshape(images, [count, height, width * channels])
        columns = tf.repeat(columns, channels, axis=1)
        pixels = _blend(pixels, rows[:, :, tf.newaxis] * columns[:, tf.newaxis])
        return tf.reshape(pixels, images.shape), labels


def _blend(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Blends the values of each row with those of the other row of its pair.

    Args:
      values: real [n, ...].
      weights: weights of the other row, broadcast to the values.
    """
    others = tf.gather(values, tf.bitwise.bitwise_xor(tf.range(values.shape[0]), 1))
    return (1 - weights) * values + weights * others


def _mixup_weights(
    uniforms: tf.Tensor, alpha: float, height: int, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns MixUp's weights of the other image: a factor per row [n, H] and column [n, W]."""
    count = uniforms.shape[0]
    weights = beta_quantiles(uniforms[:, :1], alpha)
    return tf.broadcast_to(weights, [count, height]), tf.ones([count, width])


def _cutmix_weights(
    uniforms: tf.Tensor, alpha: float, height: int, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns CutMix's weights of the other image, 1 inside the box; see `_mixup_weights`.

    The box has a Beta-distributed fraction of the image's area, and its centre may be anywhere in
    the image. Only the part of the box inside the image counts, also in the labels.
    """
    side = tf.sqrt(beta_quantiles(uniforms[:, :1], alpha))

    def inside(length: int, centre: tf.Tensor) -> tf.Tensor:
        pixels = tf.round(side * length)
        begin = tf.floor(centre * length) - tf.floor(pixels / 2)
        index = tf.range(length, dtype=tf.float32)
        return tf.cast((index >= begin) & (index < begin + pixels), tf.float32)

    return inside(height, uniforms[:, 1:2]), inside(width, uniforms[:, 2:3])


def beta_quantiles(uniforms: tf.Tensor, alpha: float) -> tf.Tensor:
    """Computes the quantiles of Beta(alpha, alpha) by bisection in float64, accurate to 1e-9.

    Args:
      uniforms: float32 of any shape, in [0, 1): cumulative probabilities.
      alpha: greater than 0.

    Returns:
      float32 of the same shape, in [0, 1].
    """
    targets = tf.cast(uniforms, tf.float64)
    parameter = tf.fill(tf.shape(targets), tf.constant(alpha, tf.float64))
    quantiles = tf.zeros_like(targets)
    for power in range(1, _BISECTIONS + 1):
        candidates = quantiles + 0.5**power
        is_below = tf.math.betainc(parameter, parameter, candidates) <= targets
        quantiles = tf.where(is_below, candidates, quantiles)
    return tf.cast(quantiles, tf.float32)
