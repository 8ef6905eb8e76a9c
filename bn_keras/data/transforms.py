"""What is done to images: crops, mirrors and colours, as functions of tensors.

Nothing here draws a random number or knows where an image comes from: every random choice is a
function of uniform numbers in [0, 1) that the caller gives, one row an image, so that what an
example looks like depends on its place in the order alone.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from bn_keras.data import augment, exif

# Columns of an image's row of uniform random numbers.
CROP = slice(0, 4)
MIRROR = 4
COLOUR = slice(5, 9)
NUM_UNIFORMS = 9
# Where RandAugment is asked for, its numbers follow.
RAND_AUGMENT = slice(NUM_UNIFORMS, NUM_UNIFORMS + augment.RAND_AUGMENT_UNIFORMS)

CROPS = ("inception", "shift", "none")

# GoogLeNet's training crop (arXiv 1409.4842, section 6).
MIN_AREA = 0.08
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
# Side of the evaluation crop over the shorter side of the image: 224 of 256, as a fraction.
EVALUATION_FRACTION = (7, 8)
# "shift" moves an image by at most its side over this.
SHIFT_DIVISOR = 8

# Distortions at strength 1: TF-Slim's, for the same networks.
MAX_BRIGHTNESS = 32 / 255
MAX_CONTRAST = 0.5
MAX_SATURATION = 0.5
MAX_HUE_TURN = 0.2

_RGB_TO_YIQ = (
    (0.299, 0.587, 0.114),
    (0.59590059, -0.27455667, -0.32134392),
    (0.21153661, -0.52273617, 0.31119955),
)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to each image on its way to the network.

    Attributes:
      size: height and width of the result.
      crop: "inception", "shift" or "none", see bn_keras/training/config.py.
      mirror: whether half of the training images are mirrored.
      distortion: strength of the photometric distortions in training, 0 for none.
      binary: the result is 0 and 1, thresholded at one half, instead of within [-1, 1].
      random_augment: magnitude of RandAugment in training, 0 for none.
    """

    size: tuple[int, int]
    crop: str
    mirror: bool
    distortion: float
    binary: bool
    random_augment: float = 0.0

    @property
    def num_pixels(self) -> int:
        """Of the result."""
        return math.prod(self.size)

    def from_pool(
        self, pool: tf.Tensor, indices: tf.Tensor, uniforms: tf.Tensor | None, white: int
    ) -> tf.Tensor:
        """Takes images of one size from memory, as a whole batch.

        Args:
          pool: uint8 [N, H, W, C].
          indices: int32 [n] into the pool.
          uniforms: float32 [n, NUM_UNIFORMS] in [0, 1), with RAND_AUGMENT more columns if
            `random_augment`; or None for evaluation: no mirror, no distortion, the centre instead
            of a random crop.
          white: value of a fully lit pixel.

        Returns:
          float32 [n, *size, C].
        """
        image_size = tuple(pool.shape[1:3])
        training = uniforms is not None
        window = self._centre(*image_size)
        mirrored = uniforms[:, MIRROR] < 0.5 if training and self.mirror else None
        if training and self.crop == "inception":
            windows = inception_windows(uniforms[:, CROP], *image_size)
            pixels = resample(pool, indices, windows, mirrored, self.size, white / 2)
        elif training and (self.crop == "shift" or self.mirror) or window != (0, 0, *self.size):
            windows = tf.broadcast_to(tf.constant(window, tf.float32), [tf.size(indices), 4])
            if training and self.crop == "shift":
                moved = tf.cast(shifts(uniforms[:, CROP][:, :2], *self.size), tf.float32)
                scale = [window[2] / self.size[0], window[3] / self.size[1]]
                windows -= tf.pad(moved * scale, [[0, 0], [0, 2]])
            method = "nearest" if window[2:] == self.size else "bilinear"
            pixels = resample(pool, indices, windows, mirrored, self.size, white / 2, method)
        else:
            pixels = tf.gather(pool, indices)
        return self._finish(pixels, uniforms, white)

    def from_encoded(
        self, encoded: tf.Tensor, uniforms: tf.Tensor | None, channels: int
    ) -> tf.Tensor:
        """Decodes one image, of a JPEG only the part that is shown, and turns it upright.

        In training the decoder takes its fast integer transform and plain chroma upscaling.

        Args:
          encoded: a string: JPEG, PNG, BMP or GIF.
          uniforms: a row of those of `from_pool`, or None for evaluation.
          channels: of the result, 1 or 3.

        Returns:
          float32 [*size, channels].
        """
        training = uniforms is not None

        def window_in(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
            if training and self.crop == "inception":
                return inception_windows(uniforms[None, CROP], height, width)[0]
            return tf.stack(self._centre(height, width))

        def decode_window(window: tf.Tensor) -> tf.Tensor:
            return tf.io.decode_and_crop_jpeg(
                encoded,
                window,
                channels=channels,
                fancy_upscaling=not training,
                dct_method="INTEGER_FAST" if training else "INTEGER_ACCURATE",
            )

        def decode_part() -> tf.Tensor:
            shape = tf.io.extract_jpeg_shape(encoded)
            return decode_window(window_in(shape[0], shape[1]))

        def decode_turned() -> tf.Tensor:
            shape, orientation = tf.io.extract_jpeg_shape(encoded), exif.orientation(encoded)
            height, width = exif.turned_shape(shape[0], shape[1], orientation)
            window = exif.stored_window(window_in(height, width), height, width, orientation)
            return exif.turned(decode_window(window), orientation)

        def decode_jpeg() -> tf.Tensor:
            return tf.cond(exif.is_noted(encoded), _rarely(decode_turned), decode_part)

        def decode_all() -> tf.Tensor:
            image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
            shape = tf.shape(image)
            top, left, height, width = tf.unstack(window_in(shape[0], shape[1]))
            return image[top : top + height, left : left + width]

        pixels = tf.cond(tf.io.is_jpeg(encoded), decode_jpeg, decode_all)
        pixels = tf.image.resize(tf.ensure_shape(pixels, [None, None, channels]), self.size)
        if training and self.crop == "shift":
            pixels = shift(pixels, shifts(uniforms[None, CROP][:, :2], *self.size)[0], 255 / 2)
        if training and self.mirror:
            pixels = tf.cond(
                uniforms[MIRROR] < 0.5, lambda: tf.reverse(pixels, axis=[1]), lambda: pixels
            )
        return self._finish(pixels[None], uniforms[None] if training else None, 255)[0]

    def _centre(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The window that is shown where none is drawn."""
        fraction = EVALUATION_FRACTION if self.crop == "inception" else (1, 1)
        return centre_window(height, width, self.size, fraction)

    def _finish(self, pixels: tf.Tensor, uniforms: tf.Tensor | None, white: int) -> tf.Tensor:
        """Distorts pixels in [0, white] and brings them to the network's range."""
        pixels = tf.cast(pixels, tf.float32)
        if uniforms is not None and self.random_augment:
            scale = 255 / white
            pixels = augment.rand_augment(
                scale * pixels, uniforms[:, RAND_AUGMENT], self.random_augment
            )
            pixels /= scale
        if uniforms is not None and self.distortion:
            if not self.binary:
                return distort(pixels, uniforms[:, COLOUR], self.distortion, white, (-1.0, 1.0))
            pixels = distort(pixels, uniforms[:, COLOUR], self.distortion, white)
        return self.to_network_range(pixels, white)

    def to_network_range(self, pixels: tf.Tensor, white: float) -> tf.Tensor:
        """Brings float32 pixels in [0, white] to [-1, 1], or to 0 and 1 if `binary`."""
        if self.binary:
            return tf.cast(pixels >= white / 2, tf.float32)
        return pixels * (2 / white) - 1


def _rarely(branch: Callable[[], tf.Tensor]) -> Callable[[], tf.Tensor]:
    """Keeps a branch of a graph in one piece.

    TensorFlow walks through all parts of a branch that it does not take, too: 10 microseconds.
    """
    if tf.executing_eagerly():
        return branch
    return tf.function(branch, experimental_attributes={"_noinline": True})


def decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes a whole image, a JPEG by its accurate transform, and turns it upright.

    Args:
      encoded: a string: JPEG, PNG, BMP or GIF, of which it is the first frame.
      channels: of the result, 1 or 3.

    Returns:
      uint8 [H, W, channels].
    """

    def decode_jpeg() -> tf.Tensor:
        pixels = tf.io.decode_jpeg(encoded, channels=channels, dct_method="INTEGER_ACCURATE")
        return tf.cond(
            exif.is_noted(encoded),
            lambda: exif.turned(pixels, exif.orientation(encoded)),
            lambda: pixels,
        )

    pixels = tf.cond(
        tf.io.is_jpeg(encoded),
        decode_jpeg,
        lambda: tf.io.decode_image(encoded, channels=channels, expand_animations=False),
    )
    return tf.ensure_shape(pixels, [None, None, channels])


def inception_windows(uniforms: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """GoogLeNet's training crop: a window of random area, aspect ratio and place.

    The area is uniform between 8% of the image and the largest that an aspect ratio within
    3/4 to 4/3 leaves room for (all of it, in a photograph of 4:3); the aspect ratio is
    log-uniform among those whose window of that area fits. Nothing is drawn twice; the custom of
    drawing both until the window fits makes large areas rarer than the even distribution that
    GoogLeNet states.

    Args:
      uniforms: float32 [n, 4] in [0, 1): area, aspect ratio, vertical and horizontal place.
      height: of the image in pixels, a scalar or [n].
      width: likewise.

    Returns:
      int32 [n, 4]: top, left, height, width in pixels, inside the image.

    Source: Szegedy et al. 2014, arXiv 1409.4842, section 6.
    """
    image_height, image_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    image_aspect = image_width / image_height
    largest = tf.minimum(1.0, tf.minimum(MAX_ASPECT / image_aspect, image_aspect / MIN_ASPECT))
    area = MIN_AREA + uniforms[:, 0] * (largest - MIN_AREA)
    low = tf.math.log(tf.maximum(MIN_ASPECT, area * image_aspect))
    high = tf.math.log(tf.minimum(MAX_ASPECT, image_aspect / area))
    aspect = tf.exp(low + uniforms[:, 1] * (high - low))

    pixels = area * image_height * image_width
    crop_height = tf.clip_by_value(tf.round(tf.sqrt(pixels / aspect)), 1.0, image_height)
    crop_width = tf.clip_by_value(tf.round(tf.sqrt(pixels * aspect)), 1.0, image_width)
    # A float32 just under 1 may round the product up to the excluded end.
    top = tf.minimum(
        tf.floor(uniforms[:, 2] * (image_height - crop_height + 1)), image_height - crop_height
    )
    left = tf.minimum(
        tf.floor(uniforms[:, 3] * (image_width - crop_width + 1)), image_width - crop_width
    )
    return tf.cast(tf.stack([top, left, crop_height, crop_width], axis=-1), tf.int32)


def centre_window(
    height: int, width: int, size: tuple[int, int], fraction: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The centred window of a size's shape that fills a fraction of what fits into an image.

    Args:
      height: of the image in pixels, a number or a tensor.
      width: likewise.
      size: height and width whose ratio the window takes.
      fraction: numerator and denominator.

    Returns:
      Top, left, height and width in pixels, as numbers or tensors as the image's are.
    """
    tall, wide = height * size[1], width * size[0]
    numerator, denominator = fraction
    fitting = (tall + wide - abs(tall - wide)) // 2 * numerator
    # Rounded up, so that a tiny image still has a pixel to show.
    crop_height = -(-fitting // (denominator * size[1]))
    crop_width = -(-fitting // (denominator * size[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def shifts(uniforms: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Pixels to move an image by, at most an eighth of each side either way.

    Args:
      uniforms: float32 [n, 2] in [0, 1).
      height: of the image in pixels.
      width: likewise.

    Returns:
      int32 [n, 2]: down and right.
    """
    largest = tf.constant([height // SHIFT_DIVISOR, width // SHIFT_DIVISOR])
    choices = 2 * largest + 1
    drawn = tf.cast(uniforms * tf.cast(choices, tf.float32), tf.int32)
    return tf.minimum(drawn, choices - 1) - largest


def shift(image: tf.Tensor, moved: tf.Tensor, fill: float) -> tf.Tensor:
    """Moves one image [H, W, C] down and right by int32 [2] pixels, as `shifts` gives them."""
    height, width, _ = image.shape
    rows, columns = height // SHIFT_DIVISOR, width // SHIFT_DIVISOR
    padded = tf.pad(image, [[rows] * 2, [columns] * 2, [0, 0]], constant_values=fill)
    begin = tf.concat([[rows, columns] - moved, [0]], axis=0)
    return tf.slice(padded, begin, image.shape)


def resample(
    images: tf.Tensor,
    indices: tf.Tensor,
    windows: tf.Tensor,
    mirrored: tf.Tensor | None,
    size: tuple[int, int],
    fill: float,
    method: str = "bilinear",
) -> tf.Tensor:
    """Takes images from a pool, each through its own window, mirrored or not, to one size.

    One pass of one kernel does the choice, the crop, the scaling and the mirror. The corner
    pixels of a window land on the corner pixels of the result.

    Args:
      images: [N, H, W, C] of any real dtype.
      indices: int32 [n] into the pool.
      windows: real [n, 4]: top, left, height, width in pixels; may reach beyond the image.
      mirrored: bool [n], or None for never.
      size: height and width of the result.
      fill: value of what lies outside the image.
      method: "bilinear", or "nearest", which is exact for windows of the result's own size.

    Returns:
      float32 [n, *size, C].
    """
    top, left, height, width = tf.unstack(tf.cast(windows, tf.float32), axis=-1)
    # A thousandth of a pixel further in, so that rounding puts no edge pixel outside.
    inwards = tf.where(height > 1, 0.001, 0.0), tf.where(width > 1, 0.001, 0.0)
    top, bottom = top + inwards[0], top + height - 1 - inwards[0]
    left, right = left + inwards[1], left + width - 1 - inwards[1]
    if mirrored is not None:
        left, right = tf.where(mirrored, right, left), tf.where(mirrored, left, right)
    rows, columns = max(images.shape[1] - 1, 1), max(images.shape[2] - 1, 1)
    boxes = tf.stack([top / rows, left / columns, bottom / rows, right / columns], axis=-1)
    return tf.image.crop_and_resize(
        images, boxes, indices, size, method=method, extrapolation_value=fill
    )


def distort(
    images: tf.Tensor,
    uniforms: tf.Tensor,
    strength: float,
    white: float,
    shown_as: tuple[float, float] | None = None,
) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue by one affine map of each image's colours.

    Brightness adds, contrast scales about the image's own mean colour, saturation scales the
    chroma (I and Q of YIQ) and hue turns it. The four commute but for clipping, which happens
    once, at the end. Single-channel images get the first two.

    Args:
      images: float32 [n, H, W, 1 or 3] in [0, white].
      uniforms: float32 [n, 4] in [0, 1): brightness, contrast, saturation, hue.
      strength: 1 is TF-Slim's range (brightness within 32/255 of white, contrast and saturation
        within 0.5 to 1.5, hue within a fifth of a turn); smaller ranges in proportion.
      white: value of a fully lit pixel.
      shown_as: what 0 and white become, in the same pass; None leaves them.

    Returns:
      Same shape and dtype, in the range of shown_as.

    Source: Howard 2013, arXiv 1312.5402; TF-Slim's inception_preprocessing for the ranges.
    """
    _, height, width, channels = images.shape
    low, high = shown_as or (0.0, white)
    scale = (high - low) / white
    # A row of the image at a time, here and below: three numbers at a time take several times as
    # long.
    means = tf.reduce_mean(tf.reshape(images, [-1, height, width * channels]), axis=1)
    means = tf.reduce_mean(tf.reshape(means, [-1, width, channels]), axis=1)
    matrices, offsets = colour_maps(uniforms, strength, means, white)
    pixels = tf.reshape(images, [-1, height * width, channels])
    pixels = tf.matmul(pixels, scale * matrices, transpose_b=True)
    rows = tf.reshape(pixels, [-1, height, width * channels])
    rows += tf.tile(scale * offsets + low, [1, width])[:, None]
    return tf.reshape(tf.clip_by_value(rows, low, high), [-1, height, width, channels])


def colour_maps(
    uniforms: tf.Tensor, strength: float, means: tf.Tensor, white: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """The affine maps of `distort`: colour -> matrix @ colour + offset.

    Args:
      uniforms: as in `distort`.
      strength: as in `distort`.
      means: float32 [n, C], each image's mean colour, C 1 or 3.
      white: as in `distort`.

    Returns:
      Matrices [n, C, C] and offsets [n, C], float32.
    """
    signed = strength * (2 * uniforms - 1)
    brightness = white * MAX_BRIGHTNESS * signed[:, 0, None]
    contrast = 1 + MAX_CONTRAST * signed[:, 1, None]
    if means.shape[-1] == 1:
        chroma = tf.ones_like(contrast)[:, None]
    else:
        saturation = 1 + MAX_SATURATION * signed[:, 2]
        turn = 2 * math.pi * MAX_HUE_TURN * signed[:, 3]
        chroma = _chroma_maps(saturation * tf.cos(turn), saturation * tf.sin(turn))
    pivot = tf.linalg.matvec(chroma, means)
    return contrast[:, None] * chroma, (1 - contrast) * pivot + brightness


def _chroma_maps(cosine: tf.Tensor, sine: tf.Tensor) -> tf.Tensor:
    """RGB maps [n, 3, 3] that keep luma and turn (I, Q) by the given scaled rotation [n]."""
    to_yiq = np.array(_RGB_TO_YIQ)
    to_rgb = np.linalg.inv(to_yiq)
    y, i, q = (np.diag(row) for row in np.eye(3))
    quarter = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]])
    keep, scale, rotate = (
        tf.constant(to_rgb @ part @ to_yiq, tf.float32) for part in (y, i + q, quarter)
    )
    return keep + cosine[:, None, None] * scale + sine[:, None, None] * rotate
