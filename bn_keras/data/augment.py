"""Beyond the paper: RandAugment for each image by itself, and images mixed in pairs.

As all that is done to images, these are functions of uniform numbers in [0, 1) that the caller
draws. RandAugment's operations are keras-cv's kernels, given the values that its layers would draw:
their generators have a state, which no seed of theirs determines, and what an example looks like
would follow from all that was drawn before it. MixUp and CutMix are written out here: keras-cv 0.9
draws them the same way, and its CutMix takes the shares of the labels from a box of which a part
may lie outside the image, at alpha 1 by 0.17 off on average.
"""

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

# Operations that an image goes through, one after the other, and by how much their magnitudes
# deviate: keras-cv's defaults.
NUM_OPERATIONS = 3
MAGNITUDE_STDDEV = 0.15
# What keras-cv's policy lets Solarization add, at the most, before it inverts.
MAX_ADDITION = 110.0
# For each operation: which one, and two for its magnitude and direction.
RAND_AUGMENT_UNIFORMS = 3 * NUM_OPERATIONS

# For each mixed image: its share, and the place of a box down and to the right.
MIXING_UNIFORMS = 3

_WHITE = 255.0
_RANGE = (0.0, _WHITE)
# Halvings of [0, 1] in the search for a share.
_BISECTIONS = 30

# Of an image [1, H, W, C] and two uniform numbers [1, 1]; gives such an image.
Operation = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


def rand_augment(images: tf.Tensor, uniforms: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Takes each image through operations of its own draw.

    Each is one of the ten of `rand_augment_operations`, or none, all equally likely: what
    keras-cv's rate of 10/11 comes to.

    Args:
      images: float32 [n, H, W, 1 or 3] in [0, 255].
      uniforms: float32 [n, RAND_AUGMENT_UNIFORMS] in [0, 1).
      magnitude: in (0, 1].

    Returns:
      Same shape, dtype and range.

    Source: Cubuk et al. 2019, arXiv 1909.13719.
    """
    operations = [*rand_augment_operations(magnitude).values(), lambda image, *_: image]

    def augmented(arguments: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
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
        augmented,
        (images, uniforms),
        fn_output_signature=tf.TensorSpec(images.shape[1:], images.dtype),
    )


def rand_augment_operations(magnitude: float) -> dict[str, Operation]:
    """The operations of keras_cv.layers.RandAugment, by the names of its policy.

    Their values are distributed as there: normally around the magnitude, within [0, 1], or evenly
    up to it either way. Equalization and the stretching of contrast have none, and are done in full
    at any magnitude. Colours of grey images have nothing to lose.
    """
    # It takes its time, and few runs need it.
    from keras_cv import layers

    # In float32 whatever policy the network is built under.
    dtype = "float32"
    auto_contrast = layers.AutoContrast(_RANGE, dtype=dtype).augment_images
    # It branches by a tensor's value, for which it has to be a function by itself.
    equalize = tf.function(layers.Equalization(_RANGE, dtype=dtype).augment_images)
    solarize = layers.Solarization(_RANGE, dtype=dtype).augment_images
    color = layers.RandomColorDegeneration(1.0, dtype=dtype).augment_images
    contrast = layers.RandomContrast(_RANGE, 1.0, dtype=dtype).augment_images
    brightness = layers.RandomBrightness(1.0, _RANGE, dtype=dtype).augment_images
    shear = layers.RandomShear(1.0, 1.0, dtype=dtype).augment_images
    translate = layers.RandomTranslation(1.0, 1.0, dtype=dtype).augment_images

    def around(uniform: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(magnitude + MAGNITUDE_STDDEV * tf.math.ndtri(uniform), 0.0, 1.0)

    def either_way(uniform: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        return tf.where(uniform < 0.5, -value, value)

    def up_to(uniform: tf.Tensor) -> tf.Tensor:
        return magnitude * (2 * uniform - 1)

    zero = tf.zeros([1, 1])
    return {
        "auto_contrast": lambda image, *_: auto_contrast(image),
        "equalize": lambda image, *_: equalize(image),
        "solarize": lambda image, first, second: solarize(
            image,
            {
                "additions": MAX_ADDITION * around(first),
                "thresholds": _WHITE * (1 - around(second)),
            },
        ),
        "color": lambda image, first, _: (
            image if image.shape[-1] == 1 else color(image, around(first))
        ),
        "contrast": lambda image, first, _: contrast(image, 1 + up_to(first)),
        "brightness": lambda image, first, _: brightness(image, _WHITE * up_to(first)),
        "shear_x": lambda image, first, second: shear(
            image, {"shear_x": either_way(second, around(first)), "shear_y": None}
        ),
        "shear_y": lambda image, first, second: shear(
            image, {"shear_x": None, "shear_y": either_way(second, around(first))}
        ),
        "translate_x": lambda image, first, _: translate(
            image, {"width_translations": up_to(first), "height_translations": zero}
        ),
        "translate_y": lambda image, first, _: translate(
            image, {"width_translations": zero, "height_translations": up_to(first)}
        ),
    }


@dataclasses.dataclass(frozen=True)
class Mixing:
    """MixUp, CutMix or both by turns: images that give way to others in part, labels likewise.

    Each image is mixed with its neighbour in the global batch, the first with the second and so
    on, and the other way round, with a share of its own. So a pair lies on one replica, however
    many there are, as long as each has an even number of examples.

    Attributes:
      mixup: alpha of MixUp, which fades the other image in; 0 is none.
      cutmix: alpha of CutMix, which shows the other image in a box; 0 is none.
      num_classes: of the labels.

    Source: Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899.
    """

    mixup: float
    cutmix: float
    num_classes: int

    def mix(
        self, images: tf.Tensor, labels: tf.Tensor, uniforms: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes the examples of a step, or a part of them that splits no pair.

        Args:
          images: float32 [n, H, W, C], n even.
          labels: int32 [n].
          uniforms: float32 [n, MIXING_UNIFORMS] in [0, 1).
          step: an integer; where both are asked for, CutMix has the odd ones.

        Returns:
          Images as before, and labels float32 [n, num_classes]: of each class its share.
        """
        count, height, width, channels = images.shape
        kinds = [(_faded, self.mixup), (_boxed, self.cutmix)]
        branches = [
            functools.partial(weigh, uniforms, alpha, height, width)
            for weigh, alpha in kinds
            if alpha
        ]
        rows, columns = tf.switch_case(tf.cast(step % len(branches), tf.int32), branches)
        weights = tf.reduce_mean(rows, axis=1) * tf.reduce_mean(columns, axis=1)
        labels = _blended(tf.one_hot(labels, self.num_classes), weights[:, tf.newaxis])
        # A row of the image at a time: three numbers at a time take several times as long.
        pixels = tf.reshape(images, [count, height, width * channels])
        columns = tf.repeat(columns, channels, axis=1)
        pixels = _blended(pixels, rows[:, :, tf.newaxis] * columns[:, tf.newaxis])
        return tf.reshape(pixels, images.shape), labels


def _blended(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Gives way to the neighbour's values [n, ...] by these weights, which broadcast to them."""
    neighbours = tf.gather(values, tf.bitwise.bitwise_xor(tf.range(values.shape[0]), 1))
    return (1 - weights) * values + weights * neighbours


def _faded(
    uniforms: tf.Tensor, alpha: float, height: int, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The other image's weights by MixUp: one factor a row [n, H], one a column [n, W]."""
    count = uniforms.shape[0]
    others = beta_quantiles(uniforms[:, :1], alpha)
    return tf.broadcast_to(others, [count, height]), tf.ones([count, width])


def _boxed(
    uniforms: tf.Tensor, alpha: float, height: int, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The same by CutMix: 1 inside the box. Its centre may be anywhere, its share is of the area.

    What lies outside the image counts for nothing, in the labels either.
    """
    side = tf.sqrt(beta_quantiles(uniforms[:, :1], alpha))

    def inside(length: int, place: tf.Tensor) -> tf.Tensor:
        pixels = tf.round(side * length)
        begin = tf.floor(place * length) - tf.floor(pixels / 2)
        index = tf.range(length, dtype=tf.float32)
        return tf.cast((index >= begin) & (index < begin + pixels), tf.float32)

    return inside(height, uniforms[:, 1:2]), inside(width, uniforms[:, 2:3])


def beta_quantiles(uniforms: tf.Tensor, alpha: float) -> tf.Tensor:
    """Turns uniform numbers into shares that follow Beta(alpha, alpha), each into one.

    By bisection, to a billionth, in float64.

    Args:
      uniforms: float32 of any shape, in [0, 1).
      alpha: greater than 0.

    Returns:
      float32 of the same shape: where the cumulative distribution has these values.
    """
    wanted = tf.cast(uniforms, tf.float64)
    parameter = tf.fill(tf.shape(wanted), tf.constant(alpha, tf.float64))
    share = tf.zeros_like(wanted)
    for power in range(1, _BISECTIONS + 1):
        further = share + 0.5**power
        is_below = tf.math.betainc(parameter, parameter, further) <= wanted
        share = tf.where(is_below, further, share)
    return tf.cast(share, tf.float32)
