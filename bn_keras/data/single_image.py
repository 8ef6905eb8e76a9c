"""Single images in files of the user's."""

import os

import tensorflow as tf
from etils import epath

from bn_keras.data import transforms
from bn_keras.errors import UsageError

# Longer side over the shorter; what is resized by its shorter side is to fit into memory.
MAX_ASPECT = 100


def read_image(path: str | os.PathLike, channels: int = 3) -> tuple[tf.Tensor, tf.Tensor]:
    """Reads and decodes the image in a file: JPEG, PNG, BMP, or the first frame of a GIF.

    Grey images get three equal channels where three are asked for, and colours become grey where
    one is; CMYK becomes RGB, 16 bits a channel become 8, and transparency is left out.

    Args:
      path: of the file; gs://... works as well.
      channels: of the result, 1 or 3.

    Returns:
      The file's contents, a string tensor, and the image, uint8 [H, W, channels].

    Raises:
      UsageError: no such file, or not such an image, whole and of a reasonable shape.
    """
    try:
        encoded = tf.constant(epath.Path(path).read_bytes())
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", error)
        raise UsageError(f"image {path} can't be read: {reason}") from None
    try:
        image = transforms.decode(encoded, channels)
    except tf.errors.OpError:
        # TensorFlow's reason names the kernel that gave up, and is no better than this.
        raise UsageError(
            f"image {path} can't be decoded: it is damaged, cut short, or none of JPEG, PNG, BMP,"
            " GIF"
        ) from None
    height, width, _ = image.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UsageError(
            f"image {path} is {height} pixels high and {width} wide: one side may be at most"
            f" {MAX_ASPECT} times the other"
        )
    return encoded, image
