"""Why a file cannot be decoded: its actual format, whatever its name says, or the damage."""

import re

import tensorflow as tf

# Bytes at the start of a file that identify its format.
_HEAD_BYTES = 512
_FOREIGN = (
    (rb"\Z", "an empty file"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC file: convert it to JPEG"),
    (rb"....ftypavi", "an AVIF file: convert it to JPEG"),
    (rb"II\*\0|MM\0\*", "a TIFF or raw file: convert it to PNG or JPEG"),
    (rb"\0\0\0\x0cjP  ", "a JPEG 2000 file: convert it to JPEG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL file: convert it to JPEG"),
    (rb"\0\0\x01\0", "an icon file: convert it to PNG"),
    (rb"%PDF", "a PDF file: save its images"),
    (rb"PK\x03\x04", "a ZIP archive: unpack it"),
    (rb"\s*(<\?xml.*)?<svg", "an SVG file: convert it to PNG"),
    (rb"(?i)\s*<(!doctype )?html", "an HTML page: download the image again"),
    (rb"version https://git-lfs", "a pointer of Git LFS: run `git lfs pull`"),
)
_SUPPORTED = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG", "PNG"),
    (rb"BM", "BMP"),
    (rb"GIF8", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
)


# Errors of files that cannot be read or decoded. TensorFlow raises UnicodeDecodeError if its
# message would contain bytes that are not UTF-8, such as those of a file name.
READ_ERRORS = (tf.errors.OpError, UnicodeDecodeError)

# An assertion of this package: in a graph, and in eager mode.
_ASSERTION = re.compile(r"assertion failed: \[(.*?)\]|Summarized data: b'(.*?)'")


def explain(content: bytes, error: Exception) -> str:
    """Returns why a file cannot be decoded, on one line, with advice where there is any.

    Args:
      content: content of the file.
      error: one of READ_ERRORS, raised by `Preprocessing.process_encoded` or `transforms.decode`.
    """
    if refused := _ASSERTION.search(str(error)):
        return refused[1] or refused[2]
    head = content[:_HEAD_BYTES]
    for pattern, reason in _FOREIGN:
        if re.match(pattern, head, re.DOTALL):
            return reason
    for pattern, name in _SUPPORTED:
        if re.match(pattern, head, re.DOTALL):
            return f"a damaged or incomplete {name} file"
    return "not an image: expected a JPEG, PNG, BMP, GIF or WebP file"
