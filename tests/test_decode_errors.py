"""Files that are not what their names say are named by their actual format."""

import io

import pytest
import tensorflow as tf
from PIL import Image

from bn_keras.data import transforms
from bn_keras.data.decode_errors import explain


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "a HEIC file: convert it to JPEG"),
        (b"\0\0\0\x18ftypavif", "an AVIF file: convert"),
        (b"MM\0*\0\0", "a TIFF or raw file"),
        (b"%PDF-1.4", "a PDF file"),
        (b"\n<?xml version='1.0'?>\n<svg>", "an SVG file"),
        (b"<!DOCTYPE html><p>404", "an HTML page: download the image again"),
        (b"version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
        (b"\xff\xd8\xff\xe0 and more", "a damaged or incomplete JPEG file"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a damaged or incomplete WebP file"),
        (b"\xff\xfe text", "not an image: expected a JPEG, PNG"),
    ],
)
def test_the_reason_is_the_actual_format(content, reason):
    error = tf.errors.InvalidArgumentError(None, None, "Unknown image file format.\nmore")
    assert reason in explain(content, error)


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_refusal_of_this_package_takes_precedence(in_graph):
    """TensorFlow words a failed assertion differently in eager mode."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])

    def decode(encoded):
        return transforms.decode(encoded, 3)

    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        (tf.function(decode) if in_graph else decode)(tf.constant(file.getvalue()))
    assert explain(file.getvalue(), caught.value) == "an animated WebP: save one frame of it"
