"""Which way up a photograph belongs, as the EXIF block of its JPEG says.

Cameras store what their sensor saw and note how they were held; TensorFlow's decoders don't look
at that. What is damaged, or says nothing that makes sense, counts as not being there.
"""

import tensorflow as tf

# The first bytes of a file, in which its EXIF block has to begin. Cameras begin with it; others put
# a thumbnail or a colour profile before it.
HEAD_BYTES = 4096
# A block with its length fits into two bytes.
MAX_BLOCK_BYTES = 2**16

# The block's length, its name, and the byte order of what follows, Intel's or Motorola's.
_BLOCK = r"\C\CExif\x00\x00(?:II\*\x00|MM\x00\*)"
_TIFF_BEGIN = 8
_ORIENTATION, _SHORT, _UPRIGHT = 0x0112, 3, 1


def is_noted(encoded: tf.Tensor) -> tf.Tensor:
    """Whether a JPEG, a string tensor, has an EXIF block; takes some microseconds."""
    head = tf.strings.substr(encoded, 0, HEAD_BYTES)
    return tf.strings.regex_full_match(head, rf"\C*{_BLOCK}\C*")


def orientation(encoded: tf.Tensor) -> tf.Tensor:
    """How the stored image has to be turned, by EXIF's number from 1, not at all, to 8.

    Args:
      encoded: a string: a JPEG that `is_noted`.

    Returns:
      An int32 scalar, as `turned` takes it.

    Source: CIPA DC-008 (Exif 2.32), sections 4.5.4 and 4.6.4.
    """
    head = tf.strings.substr(encoded, 0, HEAD_BYTES + MAX_BLOCK_BYTES)
    block = tf.strings.regex_replace(head, rf"\A\C*?({_BLOCK})", r"\1", replace_global=False)
    values = tf.cast(tf.io.decode_raw(block, tf.uint8), tf.int64)
    values = values[_TIFF_BEGIN : 256 * values[0] + values[1]]
    motorola = tf.reduce_any(tf.equal(values[:1], ord("M")))

    def number(digits: tf.Tensor) -> tf.Tensor:
        """Of bytes [..., k]."""
        first_is_high = tf.where(motorola, digits, digits[..., ::-1])
        powers = 256 ** tf.range(tf.shape(digits)[-1] - 1, -1, -1)
        return tf.reduce_sum(first_is_high * tf.cast(powers, tf.int64), axis=-1)

    # Beyond the block's end a slice is empty, and its number 0.
    begin = number(values[4:8])
    count = number(values[begin : begin + 2])
    entries = values[begin + 2 : begin + 2 + 12 * count]
    entries = tf.reshape(entries[: tf.size(entries) // 12 * 12], [-1, 12])
    tag, kind, value = number(entries[:, :2]), number(entries[:, 2:4]), number(entries[:, 8:10])
    found = value[(tag == _ORIENTATION) & (kind == _SHORT) & (value >= 1) & (value <= 8)]
    return tf.cast(tf.concat([found, [_UPRIGHT]], axis=0)[0], tf.int32)


def turned(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns and mirrors an image [H, W, C] until it stands as it was seen."""
    pixels = tf.cond(
        _lies(orientation), lambda: tf.transpose(pixels, [1, 0, 2]), lambda: tf.identity(pixels)
    )
    down, right = _reversed(orientation)
    return tf.reverse(pixels, tf.boolean_mask([0, 1], tf.stack([down, right])))


def turned_shape(height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor) -> list[tf.Tensor]:
    """Height and width after `turned`."""
    lies = _lies(orientation)
    return [tf.where(lies, width, height), tf.where(lies, height, width)]


def stored_window(
    window: tf.Tensor, height: tf.Tensor, width: tf.Tensor, orientation: tf.Tensor
) -> tf.Tensor:
    """Where a window of the turned image lies in the stored one.

    Args:
      window: int32 [4]: top, left, height and width in the turned image.
      height: of the turned image, int32.
      width: likewise.
      orientation: as from `orientation`.

    Returns:
      int32 [4]: the same of the stored image.
    """
    top, left, rows, columns = tf.unstack(window)
    down, right = _reversed(orientation)
    top = tf.where(down, height - top - rows, top)
    left = tf.where(right, width - left - columns, left)
    return tf.where(
        _lies(orientation),
        tf.stack([left, top, columns, rows]),
        tf.stack([top, left, rows, columns]),
    )


def _lies(orientation: tf.Tensor) -> tf.Tensor:
    """Whether rows have to become columns, which comes first."""
    return orientation >= 5


def _reversed(orientation: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether, then, the order of the rows is reversed, and that of the columns."""
    one_of = lambda *numbers: tf.reduce_any(tf.equal(orientation, numbers))  # noqa: E731
    return one_of(3, 4, 7, 8), one_of(2, 3, 6, 7)
