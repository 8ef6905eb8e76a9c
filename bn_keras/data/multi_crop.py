"""Several crops of each image, in place of the one that a network is shown otherwise.

A crop is a scale, a square, a window and a mirror: the image is resized until its shorter side has
the scale; a square is taken of it, at one end of the longer side, at the other or in the middle; a
window of the network's size is taken of the square, at a corner or in the middle, or the whole
square is resized to it; and it may be mirrored. Every combination of the scales, squares, windows
and mirrors that are asked for is one crop.

The work is divided so that every shape on the device is static, however the images differ in size:
the host decodes an image once, resizes it once per scale and passes the squares on, and the device
cuts the windows out of them.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from bn_keras.data import transforms
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError

# Shorter side of the image over the side of the network's input: 256, 288, 320 and 352 of 224.
SCALES = (8, 9, 10, 11)
SCALE_UNIT = 7
# Place of a square along the longer side, in halves of the way: left or top, centre, right or
# bottom.
SQUARES = (0, 1, 2)
# Place of a window in its square, down and to the right, in halves of the way. None is the whole
# square.
WINDOWS = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1), None)
MIRRORS = (False, True)

# The squares and windows that are taken where fewer than all are asked for; of the scales and the
# mirrors it is the first.
_SQUARES_BY_NUMBER = {1: SQUARES[1:2], 3: SQUARES}
_WINDOWS_BY_NUMBER = {1: WINDOWS[4:5], 5: WINDOWS[:5], 6: WINDOWS}


class Crop(NamedTuple):
    """What one crop shows.

    Attributes:
      shorter_side: of the resized image, in pixels.
      square: one of SQUARES.
      window: one of WINDOWS.
      mirrored: left to right.
    """

    shorter_side: int
    square: int
    window: tuple[int, int] | None
    mirrored: bool


@dataclasses.dataclass(frozen=True)
class Crops:
    """How many scales, squares, windows and mirrors are combined; one of each by default.

    A single crop is not cut by this geometry: it is what the network is shown in the evaluations
    of its training. Where that is the centre at 224 of 256 it is the same part of the image.

    Attributes:
      scales: 1 to 4, the first of SCALES.
      squares: 1, the one in the middle, or 3.
      windows: 1, the one in the middle; 5, with the corners; or 6, with the whole square.
      mirrors: 1, or 2 for the mirror image as well.

    Source: Szegedy et al. 2014, arXiv 1409.4842, section 7, for 4x3x6x2 = 144; Krizhevsky et al.
    2012 for 1x1x5x2 = 10.
    """

    scales: int = 1
    squares: int = 1
    windows: int = 1
    mirrors: int = 1

    @classmethod
    def parse(cls, text: str) -> "Crops":
        """Reads "1", "10", "144", or the four numbers such as "2x3x6x2"; raises UsageError."""
        numbers = _SHORT_FORMS.get(text, text).split("x")
        accepted = (range(1, 5), _SQUARES_BY_NUMBER, _WINDOWS_BY_NUMBER, range(1, 3))
        if len(numbers) == 4 and all(
            number in map(str, values) for number, values in zip(numbers, accepted, strict=True)
        ):
            return cls(*map(int, numbers))
        raise UsageError(
            f"unknown crops {text!r}: accepted are {', '.join(_SHORT_FORMS)}, or scales (1-4) x"
            " squares (1, 3) x windows (1, 5, 6) x mirrors (1, 2), such as 2x3x6x2"
        )

    @property
    def count(self) -> int:
        """Crops of each image."""
        return self.scales * self.squares * self.windows * self.mirrors

    def shorter_sides(self, size: int) -> list[int]:
        """The scales in pixels, for a network that takes images of this side."""
        return [round(size * scale / SCALE_UNIT) for scale in SCALES[: self.scales]]

    def table(self, size: int) -> list[Crop]:
        """Every crop, in the order in which they are computed, for a network of this side."""
        axes = (
            self.shorter_sides(size),
            _SQUARES_BY_NUMBER[self.squares],
            _WINDOWS_BY_NUMBER[self.windows],
            MIRRORS[: self.mirrors],
        )
        return [Crop(*choice) for choice in itertools.product(*axes)]

    def take_squares(self, images: tf.Tensor, size: int) -> tuple[tf.Tensor, ...]:
        """Resizes images to each scale and takes the squares; bilinear, as the single crop is.

        Args:
          images: [n, H, W, C] of any real dtype; H and W need not be static.
          size: side of the network's input.

        Returns:
          A scale each, float32 [n, squares, side, side, C].
        """
        return tuple(self._squares(images, side) for side in self.shorter_sides(size))

    def _squares(self, images: tf.Tensor, side: int) -> tf.Tensor:
        lengths = tf.cast(tf.shape(images)[1:3], tf.float64)
        resized = tf.cast(tf.round(lengths * side / tf.reduce_min(lengths)), tf.int32)
        pixels = tf.image.resize(images, resized)
        squares = []
        for place in _SQUARES_BY_NUMBER[self.squares]:
            top, left = tf.unstack((resized - side) * place // 2)
            squares.append(pixels[:, top : top + side, left : left + side])
        channels = images.shape[-1]
        return tf.ensure_shape(
            tf.stack(squares, axis=1), [images.shape[0], self.squares, side, side, channels]
        )

    def cut(self, squares: Sequence[tf.Tensor], size: int) -> tf.Tensor:
        """Cuts the crops out of the squares.

        Args:
          squares: as from `take_squares`.
          size: side of the crops.

        Returns:
          float32 [n * count, size, size, C]: image by image, each one's in the order of `table`.
        """
        windows = tf.stack([self._windows(of_scale, size) for of_scale in squares], axis=1)
        mirrored = [tf.reverse(windows, axis=[5]) if mirror else windows for mirror in MIRRORS]
        crops = tf.stack(mirrored[: self.mirrors], axis=4)
        return tf.reshape(crops, [-1, size, size, crops.shape[-1]])

    def _windows(self, squares: tf.Tensor, size: int) -> tf.Tensor:
        """Of squares [n, squares, side, side, C]: [n, squares, windows, size, size, C]."""
        num_images, num_squares, side, _, channels = squares.shape
        windows = []
        for place in _WINDOWS_BY_NUMBER[self.windows]:
            if place is None:
                whole = tf.reshape(squares, [-1, side, side, channels])
                whole = tf.image.resize(whole, [size, size])
                windows.append(tf.reshape(whole, [num_images, num_squares, size, size, channels]))
            else:
                top, left = ((side - size) * halves // 2 for halves in place)
                windows.append(squares[:, :, top : top + size, left : left + size])
        return tf.stack(windows, axis=2)


SINGLE_CROP = Crops()
_SHORT_FORMS = {"1": "1x1x1x1", "10": "1x1x5x2", "144": "4x3x6x2"}


@dataclasses.dataclass(frozen=True)
class CropPreprocessing:
    """Brings images to what several crops are cut from; takes Preprocessing's place in evaluation.

    Attributes:
      preprocessing: of the single crop.
      crops: of each image.
    """

    preprocessing: Preprocessing
    crops: Crops

    def __post_init__(self):
        height, width = self.preprocessing.size
        if self.crops.count > 1 and height != width:
            raise UsageError(
                f"{self.crops.count} crops are cut from squares, but this network takes images of"
                f" {height}x{width}: evaluate it with a single crop"
            )

    @property
    def num_pixels(self) -> int:
        """Of what goes to the device, per image."""
        if self.crops.count == 1:
            return self.preprocessing.num_pixels
        sides = self.crops.shorter_sides(self.preprocessing.size[0])
        return sum(self.crops.squares * side**2 for side in sides)

    def from_pool(
        self, pool: tf.Tensor, indices: tf.Tensor, uniforms: None, white: int
    ) -> tf.Tensor | tuple[tf.Tensor, ...]:
        """As Preprocessing.from_pool; several crops give squares in [0, 1] instead, for `cut`."""
        if self.crops.count == 1:
            return self.preprocessing.from_pool(pool, indices, uniforms, white)
        return self._scaled_squares(tf.gather(pool, indices), white)

    def from_encoded(
        self, encoded: tf.Tensor, uniforms: None, channels: int
    ) -> tf.Tensor | tuple[tf.Tensor, ...]:
        """As Preprocessing.from_encoded; several crops give squares in [0, 1], for `cut`."""
        if self.crops.count == 1:
            return self.preprocessing.from_encoded(encoded, uniforms, channels)
        image = transforms.decode(encoded, channels)
        return tuple(squares[0] for squares in self._scaled_squares(image[None], 255))

    def _scaled_squares(self, images: tf.Tensor, white: int) -> tuple[tf.Tensor, ...]:
        squares = self.crops.take_squares(images, self.preprocessing.size[0])
        return tuple(of_scale / white for of_scale in squares)

    def cut(self, images: tf.Tensor | tuple[tf.Tensor, ...]) -> tf.Tensor:
        """Gives the crops of a batch of n of what the other two functions give.

        Returns:
          float32 [n * count, *size, C], as the network takes it: image by image.
        """
        if self.crops.count == 1:
            return images
        pixels = self.crops.cut(images, self.preprocessing.size[0])
        return self.preprocessing.to_network_range(pixels, white=1)
