"""Multi-crop evaluation: several crops of each image instead of one.

A crop has a scale, a square, a window and a mirroring. The image is resized so that its shorter
side equals the scale. The square is cut from either end or the centre of the longer side. The
window, of the network's input size, is cut from a corner or the centre of the square, or is the
whole square resized to that size. It may be mirrored. The crops of an image are all combinations of
the chosen scales, squares, windows and mirrorings.

All shapes on the device are static, even if the images differ in size: the host decodes each image
once, resizes it once per scale and passes on the squares; the device cuts the windows.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from bn_keras.data import transforms
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError

# The image's shorter side is SCALES / SCALE_DIVISOR times the side of the network's input: 256,
# 288, 320 and 352 for 224.
SCALES = (8, 9, 10, 11)
SCALE_DIVISOR = 7
# Position of a square along the longer side: 0 is left or top, 1 the centre, 2 right or bottom.
SQUARES = (0, 1, 2)
# Vertical and horizontal position of a window in its square, likewise; None is the whole square.
WINDOWS = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1), None)
MIRRORS = (False, True)
# Images with a larger ratio of the longer side to the shorter are shortened before resizing.
_MAX_RATIO = 8

# Squares and windows for each accepted count; n scales are the first n, as are n mirrorings.
_SQUARES_BY_COUNT = {1: SQUARES[1:2], 3: SQUARES}
_WINDOWS_BY_COUNT = {1: WINDOWS[4:5], 5: WINDOWS[:5], 6: WINDOWS}


class Crop(NamedTuple):
    """One crop.

    Attributes:
      shorter_side: shorter side of the resized image, in pixels.
      square: one of SQUARES.
      window: one of WINDOWS.
      mirrored: whether left and right are swapped.
    """

    shorter_side: int
    square: int
    window: tuple[int, int] | None
    mirrored: bool


@dataclasses.dataclass(frozen=True)
class Crops:
    """Numbers of scales, squares, windows and mirrorings to combine; one of each by default.

    A single crop is not cut this way; it is the crop of the evaluation during training. Where that
    is the centre crop of 224 out of 256, both show the same part of the image.

    Attributes:
      scales: 1 to 4, the first of SCALES.
      squares: 1 (centre) or 3.
      windows: 1 (centre), 5 (with the corners) or 6 (with the whole square).
      mirrors: 1, or 2 with the mirror images.

    Source: Szegedy et al. 2014, arXiv 1409.4842, section 7, for 4x3x6x2 = 144; Krizhevsky et al.
    2012 for 1x1x5x2 = 10.
    """

    scales: int = 1
    squares: int = 1
    windows: int = 1
    mirrors: int = 1

    @classmethod
    def parse(cls, text: str) -> "Crops":
        """Returns the crops of "1", "10", "144" or four numbers such as "2x3x6x2".

        Raises:
          UsageError: the text is none of these.
        """
        numbers = _SHORT_FORMS.get(text, text).split("x")
        accepted = [range(1, 5), (1, 3), (1, 5, 6), (1, 2)]
        if len(numbers) == 4 and all(
            number in map(str, values) for number, values in zip(numbers, accepted, strict=True)
        ):
            return cls(*map(int, numbers))
        raise UsageError(
            f"unknown crops {text!r}: expected {', '.join(_SHORT_FORMS)}, or scales (1-4) x squares"
            " (1, 3) x windows (1, 5, 6) x mirrors (1, 2), such as 2x3x6x2"
        )

    @property
    def count(self) -> int:
        """Number of crops per image."""
        return self.scales * self.squares * self.windows * self.mirrors

    def shorter_sides(self, size: int) -> list[int]:
        """Returns the scales in pixels, for a network with inputs of this side."""
        return [round(size * scale / SCALE_DIVISOR) for scale in SCALES[: self.scales]]

    def list_crops(self, size: int) -> list[Crop]:
        """Returns all crops, in the order of `cut`, for a network with inputs of this side."""
        axes = (
            self.shorter_sides(size),
            _SQUARES_BY_COUNT[self.squares],
            _WINDOWS_BY_COUNT[self.windows],
            MIRRORS[: self.mirrors],
        )
        return [Crop(*choice) for choice in itertools.product(*axes)]

    def extract_squares(self, images: tf.Tensor, size: int) -> tuple[tf.Tensor, ...]:
        """Resizes images to each scale, bilinearly as for the single crop, and cuts the squares.

        Args:
          images: [n, H, W, C] of any real dtype; H and W need not be static.
          size: side of the network's input.

        Returns:
          A tensor for each scale, float32 [n, squares, side, side, C].
        """
        images = _shorten(images)
        return tuple(self._extract_squares(images, side) for side in self.shorter_sides(size))

    def _extract_squares(self, images: tf.Tensor, side: int) -> tf.Tensor:
        """Resizes images so that their shorter side is `side`, and cuts the squares."""
        lengths = tf.cast(tf.shape(images)[1:3], tf.float64)
        resized = tf.cast(tf.round(lengths * side / tf.reduce_min(lengths)), tf.int32)
        pixels = tf.image.resize(images, resized)
        squares = []
        for position in _SQUARES_BY_COUNT[self.squares]:
            top, left = tf.unstack((resized - side) * position // 2)
            squares.append(pixels[:, top : top + side, left : left + side])
        channels = images.shape[-1]
        return tf.ensure_shape(
            tf.stack(squares, axis=1), [images.shape[0], self.squares, side, side, channels]
        )

    def cut(self, squares: Sequence[tf.Tensor], size: int) -> tf.Tensor:
        """Cuts the crops from the squares.

        Args:
          squares: squares from `extract_squares`.
          size: side of the crops.

        Returns:
          float32 [n * count, size, size, C]: image by image, each in the order of `list_crops`.
        """
        windows = tf.stack([self._cut_windows(one_scale, size) for one_scale in squares], axis=1)
        mirrored = [tf.reverse(windows, axis=[5]) if mirror else windows for mirror in MIRRORS]
        crops = tf.stack(mirrored[: self.mirrors], axis=4)
        return tf.reshape(crops, [-1, size, size, crops.shape[-1]])

    def _cut_windows(self, squares: tf.Tensor, size: int) -> tf.Tensor:
        """Cuts [n, squares, windows, size, size, C] from [n, squares, side, side, C]."""
        num_images, num_squares, side, _, channels = squares.shape
        windows = []
        for position in _WINDOWS_BY_COUNT[self.windows]:
            if position is None:
                whole = tf.reshape(squares, [-1, side, side, channels])
                whole = tf.image.resize(whole, [size, size])
                windows.append(tf.reshape(whole, [num_images, num_squares, size, size, channels]))
            else:
                top, left = ((side - size) * halves // 2 for halves in position)
                windows.append(squares[:, :, top : top + size, left : left + size])
        return tf.stack(windows, axis=2)


def _shorten(images: tf.Tensor) -> tf.Tensor:
    """Cuts out what no square shows from images of an extreme aspect ratio, [n, H, W, C].

    Resized by their shorter side as a whole, they might not fit into memory: a line of 1x600 pixels
    takes gigabytes. Both ends and the centre are kept, each at least twice as long as a square.
    """
    height, width = tf.unstack(tf.shape(images)[1:3])
    shorter, longer = tf.minimum(height, width), tf.maximum(height, width)
    margin = (longer - 2 * shorter) // 2
    pieces = [(0, 2 * shorter), (margin, longer - margin), (longer - 2 * shorter, longer)]

    def gather_pieces() -> tf.Tensor:
        kept = tf.concat([tf.range(*piece) for piece in pieces], axis=0)
        shortened = tf.gather(images, kept, axis=tf.where(width > height, 2, 1))
        return tf.ensure_shape(shortened, [images.shape[0], None, None, images.shape[-1]])

    return tf.cond(longer > _MAX_RATIO * shorter, gather_pieces, lambda: images)


SINGLE_CROP = Crops()
_SHORT_FORMS = {"1": "1x1x1x1", "10": "1x1x5x2", "144": "4x3x6x2"}


@dataclasses.dataclass(frozen=True)
class CropPreprocessing:
    """Preprocessing of images for several crops; replaces `Preprocessing` in evaluation.

    Attributes:
      preprocessing: preprocessing for a single crop.
      crops: crops of each image.

    Raises:
      UsageError: several crops for a network input that is not square.
    """

    preprocessing: Preprocessing
    crops: Crops

    def __post_init__(self) -> None:
        height, width = self.preprocessing.size
        if self.crops.count > 1 and height != width:
            raise UsageError(
                f"{self.crops.count} crops are cut from squares, but the input of this network is"
                f" {height}x{width}: evaluate it with a single crop"
            )

    @property
    def num_pixels(self) -> int:
        """Number of pixels per image that are passed to the device."""
        if self.crops.count == 1:
            return self.preprocessing.num_pixels
        sides = self.crops.shorter_sides(self.preprocessing.size[0])
        return sum(self.crops.squares * side**2 for side in sides)

    def process_batch(
        self, pool: tf.Tensor, indices: tf.Tensor, uniforms: None, white: int
    ) -> tf.Tensor | tuple[tf.Tensor, ...]:
        """Preprocesses images in memory, as in `Preprocessing.process_batch`.

        Returns:
          For several crops, squares in [0, 1] for `cut`.
        """
        if self.crops.count == 1:
            return self.preprocessing.process_batch(pool, indices, uniforms, white)
        return self._scaled_squares(tf.gather(pool, indices), white)

    def process_encoded(
        self, encoded: tf.Tensor, uniforms: None, channels: int
    ) -> tf.Tensor | tuple[tf.Tensor, ...]:
        """Decodes and preprocesses one image, as in `Preprocessing.process_encoded`.

        Returns:
          For several crops, squares in [0, 1] for `cut`.
        """
        if self.crops.count == 1:
            return self.preprocessing.process_encoded(encoded, uniforms, channels)
        image = transforms.decode(encoded, channels)
        return tuple(squares[0] for squares in self._scaled_squares(image[None], 255))

    def _scaled_squares(self, images: tf.Tensor, white: int) -> tuple[tf.Tensor, ...]:
        squares = self.crops.extract_squares(images, self.preprocessing.size[0])
        return tuple(one_scale / white for one_scale in squares)

    def cut(self, images: tf.Tensor | tuple[tf.Tensor, ...]) -> tf.Tensor:
        """Cuts the crops of a batch of n images from `process_batch` or `process_encoded`.

        Returns:
          float32 [n * count, *size, C] for the network, image by image.
        """
        if self.crops.count == 1:
            return images
        pixels = self.crops.cut(images, self.preprocessing.size[0])
        return self.preprocessing.to_network_range(pixels, white=1)
