"""EXIF orientation of JPEGs.

Cameras store the image as the sensor recorded it and its orientation in an EXIF block, which
TensorFlow's decoders ignore. A damaged or invalid block is treated as missing.
"""

import tensorflow as tf

# Bytes at the start of a file that are searched for an EXIF block. Cameras write the block first;
# other software may write a thumbnail or a colour profile before it.
HEAD_BYTES = 4096
# The length of a block is stored in two bytes.
MAX_BLOCK_BYTES = 2**16

# Length of the block, its name, and the byte order of its content: little-endian or big-endian.
_BLOCK = r"\C\CExif\x00\x00(?:II\*\x00|MM\x00\*)"
_TIFF_BEGIN = 8
_ORIENTATION, _SHORT, _UPRIGHT = 0x0112, 3, 1


def has_exif(encoded: tf.Tensor) -> tf.Tensor:
    """Returns whether a JPEG (a scalar string) has an EXIF block; takes a few microseconds."""
    head = tf.strings.substr(encoded, 0, HEAD_BYTES)
    return tf.strings.regex_full_match(head, rf"\C*{_BLOCK}\C*")


def read_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Reads the orientation of the stored image, from 1 (upright) to 8.

    Args:
      encoded: scalar string, a JPEG for which `has_exif` is true.

    Returns:
      An int32 scalar.

    Source: CIPA DC-008 (Exif 2.32), sections 4.5.4 and 4.6.4.
    """
    head = tf.strings.substr(encoded, 0, HEAD_BYTES + MAX_BLOCK_BYTES)
    block = tf.strings.regex_replace(head, rf"\A\C*?({_BLOCK})", r"\1", replace_global=False)
    content = tf.cast(tf.io.decode_raw(block, tf.uint8), tf.int64)
    content = content[_TIFF_BEGIN : 256 * content[0] + content[1]]
    is_big_endian = tf.reduce_any(tf.equal(content[:1], ord("M")))

    def to_number(digits: tf.Tensor) -> tf.Tensor:
        """Converts bytes [..., k] to numbers [...]."""
        big_endian = tf.where(is_big_endian, digits, digits[..., ::-1])
        powers = 256 ** tf.range(tf.shape(digits)[-1] - 1, -1, -1)
        return tf.reduce_sum(big_endian * tf.cast(powers, tf.int64), axis=-1)

    # A slice beyond the end of the block is empty and converts to 0.
    begin = to_number(content[4:8])
    count = to_number(content[begin : begin + 2])
    entries = content[begin + 2 : begin + 2 + 12 * count]
    entries = tf.reshape(entries[: tf.size(entries) // 12 * 12], [-1, 12])
    tag, kind = to_number(entries[:, :2]), to_number(entries[:, 2:4])
    value = to_number(entries[:, 8:10])
    found = value[(tag == _ORIENTATION) & (kind == _SHORT) & (value >= 1) & (value <= 8)]
    return tf.cast(tf.concat([found, [_UPRIGHT]], axis=0)[0], tf.int32)


def rotate_upright(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Rotates and mirrors a stored image [H, W, C] upright."""
    pixels = tf.cond(
        _is_transposed(orientation),
        lambda: tf.transpose(pixels, [1, 0, 2]),
        lambda: tf.identity(pixels),
    )
    rows, columns = _are_reversed(orientation)
    return tf.reverse(pixels, tf.boolean_mask([0, 1], tf.stack([rows, columns])))


def upright_shape(height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor) -> list[tf.Tensor]:
    """Returns height and width after `rotate_upright`."""
    is_transposed = _is_transposed(orientation)
    return [tf.where(is_transposed, width, height), tf.where(is_transposed, height, width)]


def stored_window(
    window: tf.Tensor, height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor
) -> tf.Tensor:
    """Maps a window of the upright image to the stored image.

    Args:
      window: int32 [4]: top, left, height and width in the upright image.
      height, width: int32 size of the upright image.
      orientation: see `read_orientation`.

    Returns:
      int32 [4]: top, left, height and width in the stored image.
    """
    top, left, rows, columns = tf.unstack(window)
    rows_reversed, columns_reversed = _are_reversed(orientation)
    top = tf.where(rows_reversed, height - top - rows, top)
    left = tf.where(columns_reversed, width - left - columns, left)
    return tf.where(
        _is_transposed(orientation),
        tf.stack([left, top, columns, rows]),
        tf.stack([top, left, rows, columns]),
    )


def _is_transposed(orientation: tf.Tensor) -> tf.Tensor:
    """Returns whether the stored image must be transposed first."""
    return orientation >= 5


def _are_reversed(orientation: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns whether the rows and the columns must be reversed after the transposition."""

    def is_one_of(*numbers: int) -> tf.Tensor:
        return tf.reduce_any(tf.equal(orientation, numbers))

    return is_one_of(3, 4, 7, 8), is_one_of(2, 3, 6, 7)
