"""What is done to images: crops, mirrors and colours, as functions of tensors.

Nothing here draws a random number or knows where an image comes from: every random choice is a
function of uniform numbers in [0, 1) that the caller gives, one row an image, so that what an
example looks like depends on its place in the order alone.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

# Columns of an image's row of uniform random numbers.
CROP = slice(0, 4)
MIRROR = 4
COLOUR = slice(5, 9)
NUM_UNIFORMS = 9

CROPS = ("inception", "shift", "none")

# GoogLeNet's training crop (arXiv 1409.4842, section 6).
MIN_AREA = 0.08
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
# Side of the evaluation crop over the shorter side of the image (224 of 256).
EVALUATION_FRACTION = 224 / 256
# Farthest that "shift" moves an image, as a fraction of its side.
MAX_SHIFT = 1 / 8

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
      crop: "inception", "shift" or "none", see configs/default.py.
      mirror: whether half of the training images are mirrored.
      distortion: strength of the photometric distortions in training, 0 for none.
      binary: the result is 0 and 1, thresholded at one half, instead of within [-1, 1].
    """

    size: tuple[int, int]
    crop: str
    mirror: bool
    distortion: float
    binary: bool

    def from_pool(
        self, pool: tf.Tensor, indices: tf.Tensor, uniforms: tf.Tensor | None, white: int
    ) -> tf.Tensor:
        """Takes images of one size from memory, as a whole batch.

        Args:
          pool: uint8 [N, H, W, C].
          indices: int32 [n] into the pool.
          uniforms: float32 [n, NUM_UNIFORMS] in [0, 1), or None for evaluation: no mirror, no
            distortion, the centre instead of a random crop.
          white: value of a fully lit pixel.

        Returns:
          float32 [n, *size, C].
        """
        training = uniforms is not None
        moving = training and (self.crop != "none" or self.mirror)
        if not moving and self._evaluation_window(pool.shape[1:3]) == (0, 0, *self.size):
            pixels = tf.gather(pool, indices)
        else:
            windows, exact = self._windows(pool.shape[1:3], uniforms)
            mirrored = uniforms[:, MIRROR] < 0.5 if training and self.mirror else None
            pixels = resample(
                pool,
                indices,
                tf.broadcast_to(windows, [tf.shape(indices)[0], 4]),
                mirrored,
                self.size,
                fill=white / 2,
                method="nearest" if exact else "bilinear",
            )
        if training and self.distortion:
            pixels = distort(
                tf.cast(pixels, tf.float32) / white, uniforms[:, COLOUR], self.distortion
            )
            white = 1
        return to_network(pixels, white, self.binary)

    def _windows(
        self, image_size: tuple[int, int], uniforms: tf.Tensor | None
    ) -> tuple[tf.Tensor, bool]:
        """Windows [n or 1, 4], and whether all of them have the result's size."""
        if uniforms is not None and self.crop == "inception":
            return inception_windows(uniforms[:, CROP], *image_size), False
        window = self._evaluation_window(image_size)
        windows = tf.constant([window], tf.float32)
        if uniforms is not None and self.crop == "shift":
            moved = shifts(uniforms[:, CROP][:, :2], *self.size)
            scale = tf.constant(window[2:], tf.float32) / tf.constant(self.size, tf.float32)
            windows -= tf.pad(moved * scale, [[0, 0], [0, 2]])
        return windows, window[2:] == self.size

    def _evaluation_window(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part of an image that is shown where nothing is random."""
        height, width = image_size
        if self.crop == "inception":
            return centre_window(height, width, EVALUATION_FRACTION)
        if self.size[0] * width == self.size[1] * height:
            return 0, 0, height, width
        return centre_window(height, width, 1.0)


def inception_windows(uniforms: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """GoogLeNet's training crop: a window of random area, aspect ratio and place.

    The area is uniform between 8% of the image and the largest that an aspect ratio within
    3/4 to 4/3 leaves room for (all of it, in a photograph of 4:3); the aspect ratio is
    log-uniform among those whose window of that area fits. That is the law of drawing both until
    the window fits, without the loop.

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


def centre_window(height: int, width: int, fraction: float) -> tuple[int, int, int, int]:
    """The centred square of the given fraction of the shorter side: top, left, height, width."""
    side = max(round(min(height, width) * fraction), 1)
    return (height - side) // 2, (width - side) // 2, side, side


def shifts(uniforms: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Whole pixels to move an image by, at most an eighth of each side either way.

    Args:
      uniforms: float32 [n, 2] in [0, 1).
      height: of the image in pixels.
      width: likewise.

    Returns:
      float32 [n, 2] of whole numbers: down and right.
    """
    largest = tf.constant([int(height * MAX_SHIFT), int(width * MAX_SHIFT)], tf.float32)
    return tf.minimum(tf.floor(uniforms * (2 * largest + 1)), 2 * largest) - largest


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
    # Shrunk by a thousandth of a pixel, so that rounding puts no edge pixel outside.
    top, bottom = top + 0.001, top + height - 1.001
    left, right = left + 0.001, left + width - 1.001
    if mirrored is not None:
        left, right = tf.where(mirrored, right, left), tf.where(mirrored, left, right)
    rows, columns = max(images.shape[1] - 1, 1), max(images.shape[2] - 1, 1)
    boxes = tf.stack([top / rows, left / columns, bottom / rows, right / columns], axis=-1)
    return tf.image.crop_and_resize(
        images, boxes, indices, size, method=method, extrapolation_value=fill
    )


def distort(images: tf.Tensor, uniforms: tf.Tensor, strength: float) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue by one affine map of each image's colours.

    Brightness adds, contrast scales about the image's own mean colour, saturation scales the
    chroma (I and Q of YIQ) and hue turns it. The four commute but for clipping, which happens
    once, at the end. Single-channel images get the first two.

    Args:
      images: float32 [n, H, W, 1 or 3] in [0, 1].
      uniforms: float32 [n, 4] in [0, 1): brightness, contrast, saturation, hue.
      strength: 1 is TF-Slim's range (brightness within 32/255, contrast and saturation within
        0.5 to 1.5, hue within a fifth of a turn); smaller ranges in proportion.

    Returns:
      Same shape and dtype, in [0, 1].

    Source: Howard 2013, arXiv 1312.5402; TF-Slim's inception_preprocessing for the ranges.
    """
    matrices, offsets = colour_maps(uniforms, strength, tf.reduce_mean(images, axis=[1, 2]))
    if images.shape[-1] == 1:
        distorted = images * matrices[:, None] + offsets[:, None, None]
    else:
        pixels = tf.reshape(images, [-1, images.shape[1] * images.shape[2], 3])
        pixels = tf.matmul(pixels, matrices, transpose_b=True) + offsets[:, None]
        distorted = tf.reshape(pixels, tf.shape(images))
    return tf.clip_by_value(distorted, 0.0, 1.0)


def colour_maps(
    uniforms: tf.Tensor, strength: float, means: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The affine maps of `distort`: colour -> matrix @ colour + offset.

    Args:
      uniforms: as in `distort`.
      strength: as in `distort`.
      means: float32 [n, C], each image's mean colour, C 1 or 3.

    Returns:
      Matrices [n, C, C] and offsets [n, C], float32.
    """
    signed = strength * (2 * uniforms - 1)
    brightness = MAX_BRIGHTNESS * signed[:, 0, None]
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


def to_network(pixels: tf.Tensor, white: float, binary: bool) -> tf.Tensor:
    """Pixels in [0, white] to what a network is fed: [-1, 1], or 0 and 1 when binary."""
    pixels = tf.cast(pixels, tf.float32)
    if binary:
        return tf.cast(pixels >= white / 2, tf.float32)
    return pixels * (2 / white) - 1
