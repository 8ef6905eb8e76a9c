"""Reads single image files."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import tensorflow as tf
from etils import epath

from bn_keras.data import transforms
from bn_keras.data.decode_errors import READ_ERRORS, explain
from bn_keras.errors import BucketUnavailableError, UsageError
from bn_keras.storage import is_local, is_temporary, reason_of
from bn_keras.text import first_line

# Largest ratio of the longer side to the shorter. Images are resized by the shorter side, and the
# result has to fit into memory.
_MAX_SIDE_RATIO = 100


def read_image(path: str | os.PathLike) -> tf.Tensor:
    """Reads and decodes an image file: JPEG, PNG, BMP, WebP, or the first frame of a GIF.

    Grey images and CMYK are converted to RGB, and 16 bits per channel to 8; transparency is
    dropped.

    Args:
      path: path of the file; gs://... is accepted.

    Returns:
      The image, uint8 [H, W, 3].

    Raises:
      UsageError: the file does not exist, is not a complete image in one of these formats, or has
        an extreme aspect ratio.
      BucketUnavailableError: it is in a bucket that does not answer.
    """
    encoded = read_encoded(path)
    with reporting_undecodable(path, encoded):
        image = transforms.decode(encoded, channels=3)
    height, width, _ = image.shape
    if max(height, width) > _MAX_SIDE_RATIO * min(height, width):
        raise UsageError(
            f"image {path} is {height} pixels high and {width} wide: expected sides with a ratio of"
            f" at most {_MAX_SIDE_RATIO}"
        )
    return image


def read_encoded(path: str | os.PathLike) -> tf.Tensor:
    """Reads a file into a scalar string; raises like `read_image`."""
    try:
        if is_local(path):
            # TensorFlow's file system accepts only names in UTF-8.
            return tf.constant(pathlib.Path(path).read_bytes())
        return tf.constant(epath.Path(path).read_bytes())
    except (OSError, tf.errors.OpError) as error:
        if is_temporary(error):
            raise BucketUnavailableError(
                f"image {path} cannot be read: {reason_of(error)}"
            ) from None
        raise UsageError(f"image {path} cannot be read: {first_line(error)}") from None


@contextlib.contextmanager
def reporting_undecodable(path: str | os.PathLike, encoded: tf.Tensor) -> Iterator[None]:
    """Wraps the decoding of a file; raises UsageError if it cannot be decoded."""
    try:
        yield
    except READ_ERRORS as error:
        reason = explain(encoded.numpy(), error)
        raise UsageError(f"image {path} cannot be decoded: {reason}") from None
