"""Decoding, crops, mirroring and photometric distortions as functions of tensors.

Nothing here draws random numbers or knows where an image comes from. Every random choice is a
function of uniform numbers in [0, 1), one row per image, that the caller passes: the result depends
only on the image and on its place in the order of examples.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from bn_keras.data import augment, exif, formats
from bn_keras.data.formats import outlined

# Columns of an image's row of uniform random numbers.
CROP_COLUMNS = slice(0, 4)
MIRROR_COLUMN = 4
COLOUR_COLUMNS = slice(5, 9)
NUM_UNIFORMS = 9
# Further columns, present if RandAugment is on.
RANDOM_AUGMENT_COLUMNS = slice(NUM_UNIFORMS, NUM_UNIFORMS + augment.RANDOM_AUGMENT_UNIFORMS)


# GoogLeNet's training crop (arXiv 1409.4842, section 6).
MIN_AREA = 0.08
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
# Side of the evaluation crop, as a fraction of the image's shorter side: 224 of 256.
EVALUATION_FRACTION = (7, 8)
# "shift" moves an image by at most its side divided by this.
SHIFT_DIVISOR = 8

# Distortions at strength 1 (TF-Slim's values for these networks).
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
    """Preprocessing of images for the network, in training and in evaluation.

    Attributes:
      size: height and width of the network's input.
      crop: "inception", "shift" or "none"; see bn_keras/training/config.py.
      binary: threshold at one half to 0 and 1 instead of scaling to [-1, 1].
      mirror: mirror half of the training images.
      distortion: strength of the photometric distortions in training, 0 for none.
      random_augment: magnitude of RandAugment in training, 0 for none.
    """

    size: tuple[int, int]
    crop: str
    _: dataclasses.KW_ONLY
    binary: bool = False
    mirror: bool = False
    distortion: float = 0.0
    random_augment: float = 0.0

    @property
    def num_pixels(self) -> int:
        """Number of pixels per image of the network's input."""
        return math.prod(self.size)

    def process_batch(
        self, pool: tf.Tensor, indices: tf.Tensor, uniforms: tf.Tensor | None, white: int
    ) -> tf.Tensor:
        """Preprocesses a batch of images in memory, all of one size.

        Args:
          pool: uint8 [N, H, W, C].
          indices: int32 [n], indices of the batch's images in the pool.
          uniforms: float32 [n, NUM_UNIFORMS] in [0, 1), with RANDOM_AUGMENT_COLUMNS appended if
            `random_augment`; None for evaluation: the centre crop, not mirrored, not distorted.
          white: value of a white pixel.

        Returns:
          float32 [n, *size, C].
        """
        image_size = tuple(pool.shape[1:3])
        mirrored = (
            uniforms[:, MIRROR_COLUMN] < 0.5 if uniforms is not None and self.mirror else None
        )
        if uniforms is not None and self.crop == "inception":
            windows = inception_windows(uniforms[:, CROP_COLUMNS], *image_size)
            pixels = resample(pool, indices, windows, mirrored, self.size)
            return self._finish(pixels, uniforms, white)
        window = self._centre_window(*image_size)
        if window != (0, 0, *self.size):
            cropped = _cut(tf.gather(pool, indices), window)
            pool, indices = tf.image.resize(cropped, self.size), tf.range(tf.size(indices))
        offsets = None
        if uniforms is not None and self.crop == "shift":
            offsets = shift_offsets(uniforms[:, CROP_COLUMNS][:, :2], *self.size)
        pixels = gather_shifted(pool, indices, offsets, mirrored, white / 2)
        return self._finish(pixels, uniforms, white)

    def process_encoded(
        self, encoded: tf.Tensor, uniforms: tf.Tensor | None, channels: int
    ) -> tf.Tensor:
        """Decodes and preprocesses one image.

        JPEGs are rotated upright. They are decoded as a whole, so that whether a damaged file can
        be decoded does not depend on the crop: decoding the crop alone saves only a tenth of the
        time, because the entropy coding has to be decoded up to its end anyway.

        Args:
          encoded: scalar string, a JPEG, PNG, BMP, GIF or WebP file.
          uniforms: one row as in `process_batch`, or None for evaluation.
          channels: channels of the result, 1 or 3.

        Returns:
          float32 [*size, channels].
        """

        def choose_window(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
            if uniforms is not None and self.crop == "inception":
                return inception_windows(uniforms[None, CROP_COLUMNS], height, width)[0]
            return tf.stack(self._centre_window(height, width))

        def crop_jpeg() -> tf.Tensor:
            stored = _decode_stored_jpeg(encoded, channels)
            rotate = outlined(lambda: crop_and_rotate(stored))
            return tf.cond(exif.has_exif(encoded), rotate, lambda: crop(stored))

        def crop(image: tf.Tensor) -> tf.Tensor:
            height, width, _ = tf.unstack(tf.shape(image))
            return _cut(image, choose_window(height, width))

        def crop_and_rotate(stored: tf.Tensor) -> tf.Tensor:
            # Rotating the crop instead of the whole image is faster.
            height, width, _ = tf.unstack(tf.shape(stored))
            orientation = exif.read_orientation(encoded)
            height, width = exif.upright_shape(height, width, orientation)
            window = exif.stored_window(choose_window(height, width), height, width, orientation)
            return exif.rotate_upright(_cut(stored, window), orientation)

        pixels = tf.cond(
            tf.io.is_jpeg(encoded),
            crop_jpeg,
            lambda: crop(formats.decode_other(encoded, channels)),
        )
        pixels = tf.image.resize(tf.ensure_shape(pixels, [None, None, channels]), self.size)
        if uniforms is not None and self.crop == "shift":
            offset = shift_offsets(uniforms[None, CROP_COLUMNS][:, :2], *self.size)[0]
            pixels = shift(pixels, offset, 255 / 2)
        if uniforms is not None and self.mirror:
            pixels = tf.cond(
                uniforms[MIRROR_COLUMN] < 0.5, lambda: tf.reverse(pixels, axis=[1]), lambda: pixels
            )
        return self._finish(pixels[None], None if uniforms is None else uniforms[None], 255)[0]

    def _centre_window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the evaluation crop: top, left, height and width."""
        if self.crop == "none":
            return 0, 0, height, width
        fraction = EVALUATION_FRACTION if self.crop == "inception" else (1, 1)
        return centre_window(height, width, self.size, fraction)

    def _finish(self, pixels: tf.Tensor, uniforms: tf.Tensor | None, white: int) -> tf.Tensor:
        """Augments the colours of pixels in [0, white] and scales them to the network's range."""
        pixels = tf.cast(pixels, tf.float32)
        if uniforms is not None and self.random_augment:
            scale = 255 / white
            pixels = augment.apply_random_augment(
                scale * pixels, uniforms[:, RANDOM_AUGMENT_COLUMNS], self.random_augment
            )
            pixels /= scale
        if uniforms is not None and self.distortion:
            if not self.binary:
                return distort(
                    pixels, uniforms[:, COLOUR_COLUMNS], self.distortion, white, (-1.0, 1.0)
                )
            pixels = distort(pixels, uniforms[:, COLOUR_COLUMNS], self.distortion, white)
        return self.to_network_range(pixels, white)

    def to_network_range(self, pixels: tf.Tensor, white: float) -> tf.Tensor:
        """Maps float32 pixels in [0, white] to [-1, 1], or to 0 and 1 if `binary`."""
        if self.binary:
            return tf.cast(pixels >= white / 2, tf.float32)
        return pixels * (2 / white) - 1


def decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes a whole image; JPEGs with the accurate DCT, rotated upright.

    Args:
      encoded: scalar string, a JPEG, PNG, BMP, GIF or WebP file; see `formats.decode_other`.
      channels: channels of the result, 1 or 3.

    Returns:
      uint8 [H, W, channels].
    """

    def decode_jpeg() -> tf.Tensor:
        pixels = _decode_stored_jpeg(encoded, channels)
        return tf.cond(
            exif.has_exif(encoded),
            lambda: exif.rotate_upright(pixels, exif.read_orientation(encoded)),
            lambda: pixels,
        )

    pixels = tf.cond(
        tf.io.is_jpeg(encoded),
        decode_jpeg,
        lambda: formats.decode_other(encoded, channels),
    )
    return tf.ensure_shape(pixels, [None, None, channels])


def _decode_stored_jpeg(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes a JPEG as it is stored, without rotation."""
    return tf.io.decode_jpeg(encoded, channels=channels, dct_method="INTEGER_ACCURATE")


def _cut(images: tf.Tensor, window: Sequence[int] | tf.Tensor) -> tf.Tensor:
    """Cuts a window, (top, left, height, width), out of images [..., H, W, C]."""
    top, left, height, width = tf.unstack(window)
    return images[..., top : top + height, left : left + width, :]


def inception_windows(uniforms: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Returns GoogLeNet's training crop: a window of random area, aspect ratio and position.

    The area is uniform between 8% of the image and the largest for which an aspect ratio between
    3/4 and 4/3 fits (100% for a 4:3 photograph). The aspect ratio is log-uniform over those that
    fit with that area. The usual implementation redraws both until the window fits, which makes
    large areas rarer than in the uniform distribution that the paper states.

    Args:
      uniforms: float32 [n, 4] in [0, 1): area, aspect ratio, vertical and horizontal position.
      height: height of the image in pixels, a scalar or [n].
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
    # For a number just below 1, the product may round up to the excluded end.
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
    """Returns the centred window with a given aspect ratio and relative size.

    Args:
      height: height of the image in pixels, a number or a tensor.
      width: likewise.
      size: height and width with the aspect ratio of the window.
      fraction: numerator and denominator of the window's side over the side of the largest window
        that fits.

    Returns:
      Top, left, height and width in pixels: numbers, or tensors if height and width are.
    """
    tall, wide = height * size[1], width * size[0]
    numerator, denominator = fraction
    fitting = (tall + wide - abs(tall - wide)) // 2 * numerator
    # Rounded up, so that the window has at least one pixel.
    crop_height = -(-fitting // (denominator * size[1]))
    crop_width = -(-fitting // (denominator * size[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def shift_offsets(uniforms: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Returns random shifts of at most 1/8 of each side, in either direction.

    Args:
      uniforms: float32 [n, 2] in [0, 1).
      height: height of the image in pixels.
      width: likewise.

    Returns:
      int32 [n, 2]: pixels down and right.
    """
    largest = tf.constant([height // SHIFT_DIVISOR, width // SHIFT_DIVISOR])
    choices = 2 * largest + 1
    drawn = tf.cast(uniforms * tf.cast(choices, tf.float32), tf.int32)
    return tf.minimum(drawn, choices - 1) - largest


def shift(image: tf.Tensor, offset: tf.Tensor, fill: float) -> tf.Tensor:
    """Shifts one image [H, W, C] down and right by int32 [2] pixels; see `shift_offsets`."""
    height, width, _ = image.shape
    rows, columns = height // SHIFT_DIVISOR, width // SHIFT_DIVISOR
    padded = tf.pad(image, [[rows] * 2, [columns] * 2, [0, 0]], constant_values=fill)
    begin = tf.concat([[rows, columns] - offset, [0]], axis=0)
    return tf.slice(padded, begin, image.shape)


def gather_shifted(
    images: tf.Tensor,
    indices: tf.Tensor,
    offsets: tf.Tensor | None,
    mirrored: tf.Tensor | None,
    fill: float,
) -> tf.Tensor:
    """Gathers, shifts and mirrors images of a pool with a single kernel.

    Args:
      images: [N, H, W, C] of any real dtype.
      indices: int32 [n], indices of the images to gather.
      offsets: int32 [n, 2], pixels down and right; see `shift_offsets`. None shifts none.
      mirrored: bool [n]; None mirrors none.
      fill: value of pixels outside the image.

    Returns:
      [n, H, W, C], float32 or of the dtype of images.
    """
    if offsets is None and mirrored is None:
        return tf.gather(images, indices)
    _, height, width, _ = images.shape
    if offsets is None:
        offsets = tf.zeros([tf.size(indices), 2])
    top, left = tf.unstack(-tf.cast(offsets, tf.float32), axis=-1)
    # The inset keeps rounding from moving edge pixels outside the image.
    inset = 0.001 if height > 1 else 0.0, 0.001 if width > 1 else 0.0
    boxes = _boxes(
        (top + inset[0], top + height - 1 - inset[0]),
        (left + inset[1], left + width - 1 - inset[1]),
        (height, width),
        mirrored,
    )
    return tf.image.crop_and_resize(
        images, boxes, indices, (height, width), method="nearest", extrapolation_value=fill
    )


def resample(
    images: tf.Tensor,
    indices: tf.Tensor,
    windows: tf.Tensor,
    mirrored: tf.Tensor | None,
    size: tuple[int, int],
) -> tf.Tensor:
    """Gathers, crops, resizes and mirrors images of a pool, as a batch.

    Positions and interpolation are those of `tf.image.resize` on the window: bilinear, with aligned
    edges. Only where an enlarged window ends inside the image, the half pixel along its edge
    differs: it is interpolated with the image's next pixel.

    Args:
      images: [N, H, W, C] of any real dtype.
      indices: int32 [n], indices of the images to gather.
      windows: real [n, 4]: top, left, height, width in pixels, inside the image.
      mirrored: bool [n]; None mirrors none.
      size: height and width of the result.

    Returns:
      float32 [n, *size, C].
    """

    def centres(start: tf.Tensor, length: tf.Tensor, cells: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the centres of the first and the last cell, as indices of padded pixels."""
        half_cell = length / (2 * cells)
        return start + half_cell + 0.5, start + length - half_cell + 0.5

    top, left, height, width = tf.unstack(tf.cast(windows, tf.float32), axis=-1)
    padded = tf.pad(tf.gather(images, indices), [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
    boxes = _boxes(
        centres(top, height, size[0]), centres(left, width, size[1]), padded.shape[1:3], mirrored
    )
    return tf.image.crop_and_resize(padded, boxes, tf.range(tf.size(indices)), size)


def _boxes(
    rows: tuple[tf.Tensor, tf.Tensor],
    columns: tuple[tf.Tensor, tf.Tensor],
    image_size: tuple[int, int],
    mirrored: tf.Tensor | None,
) -> tf.Tensor:
    """Returns the boxes of `tf.image.crop_and_resize` between first and last rows and columns."""
    left, right = columns
    if mirrored is not None:
        left, right = tf.where(mirrored, right, left), tf.where(mirrored, left, right)
    bottom_row, last_column = (max(side - 1, 1) for side in image_size)
    top, bottom = (row / bottom_row for row in rows)
    return tf.stack([top, left / last_column, bottom, right / last_column], axis=-1)


def distort(
    images: tf.Tensor,
    uniforms: tf.Tensor,
    strength: float,
    white: float,
    output_range: tuple[float, float] | None = None,
) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue with one affine colour map per image.

    Brightness adds; contrast scales about the image's mean colour; saturation scales the chroma (I
    and Q of YIQ); hue rotates it. The four commute except for clipping, which is done once, at the
    end. Single-channel images get only brightness and contrast.

    Args:
      images: float32 [n, H, W, 1 or 3] in [0, white].
      uniforms: float32 [n, 4] in [0, 1): brightness, contrast, saturation, hue.
      strength: 1 is TF-Slim's range (brightness within 32/255 of white, contrast and saturation
        within 0.5 to 1.5, hue within a fifth of a turn); the ranges are proportional to it.
      white: value of a white pixel.
      output_range: values that 0 and white are mapped to; None keeps them.

    Returns:
      Same shape and dtype, in output_range.

    Source: Howard 2013, arXiv 1312.5402; TF-Slim's inception_preprocessing for the ranges.
    """
    _, height, width, channels = images.shape
    low, high = output_range or (0.0, white)
    scale = (high - low) / white
    # Operating on whole image rows, here and below, is several times faster than on pixels of three
    # numbers.
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
    """Returns the affine maps of `distort`: colour -> matrix @ colour + offset.

    Args:
      uniforms, strength, white: see `distort`.
      means: float32 [n, C], mean colour of each image; C is 1 or 3.

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
    """Returns RGB maps [n, 3, 3] that keep luma and rotate and scale (I, Q).

    Args:
      cosine, sine: [n], of the rotation, multiplied by the scale.
    """
    to_yiq = np.array(_RGB_TO_YIQ)
    to_rgb = np.linalg.inv(to_yiq)
    y, i, q = (np.diag(row) for row in np.eye(3))
    quarter_turn = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]])
    keep, scale, rotate = (
        tf.constant(to_rgb @ part @ to_yiq, tf.float32) for part in (y, i + q, quarter_turn)
    )
    return keep + cosine[:, None, None] * scale + sine[:, None, None] * rotate
