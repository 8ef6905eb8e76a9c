"""Image formats that TensorFlow's decoders misread.

TensorFlow reads the palette indices of a BMP as grey levels, refuses WebP with transparency or
animation, and decodes BMP, GIF and WebP to colour only. Everything here is a TensorFlow function
without state, so that an exported network decodes exactly as training does.
"""

from collections.abc import Callable

import tensorflow as tf

# Bytes at the start of a file that identify its format.
_HEAD_BYTES = 21
# Offset of the flags in an extended WebP, and one of them.
_WEBP_FLAGS, _WEBP_ANIMATION = 20, 2

# Offsets in a BMP: the first pixel, the size of the second header and its fields.
_BMP_PIXELS, _BMP_HEADER, _BMP_COLOURS = 10, 14, 46
_BMP_WIDTH, _BMP_HEIGHT, _BMP_BITS, _BMP_COMPRESSION = 18, 22, 28, 30
# Older headers have other fields.
_BMP_MIN_HEADER = 40
_BMP_UNCOMPRESSED, _BMP_BITFIELDS = 0, 3
_BMP_MAX_SIDE = 2**16


def decode_other(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes an image that is not a JPEG.

    Transparency is dropped; transparent pixels of a GIF are black. Of an animated GIF or PNG the
    first frame is decoded. An animated WebP is an error, as is a compressed BMP.

    Args:
      encoded: scalar string, a PNG, BMP, GIF or WebP file.
      channels: channels of the result, 1 or 3.

    Returns:
      uint8 [H, W, channels].
    """
    head = _head(encoded)
    is_webp = tf.equal(tf.strings.substr(head, 8, 4), "WEBP")
    is_bmp = tf.equal(tf.strings.substr(head, 0, 2), "BM")
    is_gif = tf.equal(tf.strings.substr(head, 0, 4), "GIF8")

    def decode_by_tensorflow(native: int) -> tf.Tensor:
        pixels = tf.io.decode_image(encoded, channels=native, expand_animations=False)
        return _convert(tf.ensure_shape(pixels, [None, None, native]), channels)

    pixels = tf.cond(
        is_webp,
        outlined(lambda: _convert(_decode_webp(encoded), channels)),
        lambda: tf.cond(
            is_bmp,
            outlined(lambda: _convert(_decode_bmp(encoded), channels)),
            lambda: (
                tf.cond(
                    is_gif, lambda: decode_by_tensorflow(3), lambda: decode_by_tensorflow(channels)
                )
                if channels == 1
                else decode_by_tensorflow(3)
            ),
        ),
    )
    return tf.ensure_shape(pixels, [None, None, channels])


def _head(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the first bytes of a file, padded with zeros.

    TensorFlow's error for a substring beyond the end of a string would contain the string, and
    raise UnicodeDecodeError if that is not UTF-8.
    """
    start = tf.strings.substr(encoded, 0, _HEAD_BYTES)
    return tf.strings.substr(tf.strings.join([start, b"\0" * _HEAD_BYTES]), 0, _HEAD_BYTES)


def outlined(branch: Callable[[], tf.Tensor]) -> Callable[[], tf.Tensor]:
    """Wraps a rare branch in a function that is not inlined.

    TensorFlow visits each operation of an inlined branch even if the branch is not taken, at a cost
    of 10 microseconds.
    """
    if tf.executing_eagerly():
        return branch
    return tf.function(branch, autograph=False, experimental_attributes={"_noinline": True})


def _convert(pixels: tf.Tensor, channels: int) -> tf.Tensor:
    """Converts colours to the requested number of channels."""
    if channels == 1 and pixels.shape[-1] == 3:
        return tf.image.rgb_to_grayscale(pixels)
    return pixels


def _decode_webp(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a WebP; refuses animations, for which TensorFlow 2.21 corrupts its memory."""
    head = _head(encoded)
    is_extended = tf.equal(tf.strings.substr(head, 12, 4), "VP8X")
    flags = tf.io.decode_raw(head, tf.uint8)[_WEBP_FLAGS]
    is_animated = is_extended & tf.not_equal(flags & _WEBP_ANIMATION, 0)
    check = tf.debugging.Assert(~is_animated, ["an animated WebP: save one frame of it"])
    with tf.control_dependencies([check]):
        frames = tf.image.decode_webp(encoded)
    return tf.ensure_shape(frames[0, :, :, :3], [None, None, 3])


def _decode_bmp(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a BMP; one with a palette is decoded here, others by TensorFlow."""
    header = tf.strings.substr(encoded, 0, _BMP_COLOURS + 4)
    header = tf.cast(tf.io.decode_raw(header, tf.uint8), tf.int64)
    check = tf.debugging.Assert(
        tf.equal(tf.size(header), _BMP_COLOURS + 4), ["an incomplete BMP header"]
    )
    with tf.control_dependencies([check]):
        header = tf.identity(header)
    bits, compression = _number(header, _BMP_BITS, 2), _number(header, _BMP_COMPRESSION)
    is_plain = tf.equal(compression, _BMP_UNCOMPRESSED) | (
        tf.equal(compression, _BMP_BITFIELDS) & tf.equal(bits, 32)
    )
    check = tf.debugging.Assert(
        is_plain & (_number(header, _BMP_HEADER) >= _BMP_MIN_HEADER) & (bits != 16),
        ["an unsupported BMP: compressed, of 16 bits, or with an OS/2 header"],
    )
    with tf.control_dependencies([check]):
        bits = tf.identity(bits)
    return tf.cond(
        bits <= 8,
        lambda: _decode_palette_bmp(encoded, header, bits),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )


def _decode_palette_bmp(encoded: tf.Tensor, header: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Decodes an uncompressed BMP of 1, 4 or 8 bits per pixel."""
    width, height = _number(header, _BMP_WIDTH), _number(header, _BMP_HEIGHT)
    # A negative height stores the rows from top to bottom.
    is_top_down = height >= 2**31
    height = tf.where(is_top_down, 2**32 - height, height)
    bytes_per_row = (width * bits + 31) // 32 * 4
    begin = _number(header, _BMP_PIXELS)
    content = tf.io.decode_raw(encoded, tf.uint8)
    is_complete = (
        (width > 0) & (height > 0) & (width < _BMP_MAX_SIDE) & (height < _BMP_MAX_SIDE)
    ) & (tf.size(content, tf.int64) >= begin + height * bytes_per_row)
    check = tf.debugging.Assert(is_complete, ["an incomplete BMP"])
    with tf.control_dependencies([check]):
        rows = tf.reshape(content[begin:][: height * bytes_per_row], [height, bytes_per_row])
    # The first pixel is in the highest bits of a byte.
    shifts = tf.cast(tf.range(8 - bits, -1, -bits), tf.uint8)
    mask = tf.cast(2**bits - 1, tf.uint8)
    indices = tf.bitwise.right_shift(rows[:, :, tf.newaxis], shifts) & mask
    indices = tf.reshape(indices, [height, -1])[:, :width]
    indices = tf.cond(is_top_down, lambda: indices, lambda: indices[::-1])

    stored = _number(header, _BMP_COLOURS)
    num_colours = tf.where(tf.equal(stored, 0), 2**bits, stored)
    palette_begin = _BMP_HEADER + _number(header, _BMP_HEADER)
    palette = content[palette_begin : tf.minimum(palette_begin + 4 * num_colours, begin)]
    palette = tf.reshape(palette[: tf.size(palette) // 4 * 4], [-1, 4])[:, 2::-1]
    check = tf.debugging.Assert(
        tf.cast(tf.reduce_max(indices), tf.int32) < tf.shape(palette)[0],
        ["a BMP whose palette lacks colours"],
    )
    with tf.control_dependencies([check]):
        return tf.gather(palette, tf.cast(indices, tf.int32))


def _number(header: tf.Tensor, begin: int, count: int = 4) -> tf.Tensor:
    """Returns an unsigned little-endian number of a header, int64."""
    weights = tf.constant([256**i for i in range(count)], tf.int64)
    return tf.reduce_sum(header[begin : begin + count] * weights)
