"""Decoding, crops, mirroring and colours against NumPy, Pillow and tf.image."""

import cmath
import io
import math
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from bn_keras.data import exif, transforms
from bn_keras.data.transforms import NUM_UNIFORMS, Preprocessing

COLUMNS = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}


def uniforms(n, columns=NUM_UNIFORMS, seed=0):
    return np.random.default_rng(seed).random((n, columns), np.float32)


def pool(n=5, height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)


def make_preprocessing(**changes):
    settings = {"size": (12, 10), "crop": "none", "mirror": False, "distortion": 0.0}
    return Preprocessing(**{**settings, "binary": False, **changes})


def bilinear(image, rows, columns):
    """Interpolates an image at real rows and columns, in float64."""
    image = image.astype(np.float64)
    top = np.clip(np.floor(rows).astype(int), 0, image.shape[0] - 2)
    left = np.clip(np.floor(columns).astype(int), 0, image.shape[1] - 2)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    rows_of = lambda i: image[i][:, left] * (1 - right) + image[i][:, left + 1] * right  # noqa: E731
    return rows_of(top) * (1 - down) + rows_of(top + 1) * down


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (224, 224), (100, 900)])
def test_inception_windows_have_the_stated_areas_and_aspects(height, width):
    windows = transforms.inception_windows(uniforms(20_000, 4), height, width).numpy()
    top, left, crop_height, crop_width = windows.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + crop_height <= height).all() and (left + crop_width <= width).all()

    largest = min(1, 4 / 3 * height / width, width / height / (3 / 4))
    areas = crop_height * crop_width / (height * width)
    # Sides are rounded to pixels: an error of 0.5 in at least 80.
    np.testing.assert_allclose(
        np.quantile(areas, [0, 0.25, 0.5, 0.75, 1]),
        np.interp([0, 0.25, 0.5, 0.75, 1], [0, 1], [0.08, largest]),
        atol=0.02,
    )
    aspects = crop_width / crop_height
    assert 3 / 4 * 0.98 < aspects.min() and aspects.max() < 4 / 3 * 1.02
    for place, room in ((top, height - crop_height), (left, width - crop_width)):
        wide = room >= 20
        np.testing.assert_allclose(np.mean(place[wide] / room[wide]), 0.5, atol=0.02)


def test_inception_windows_of_a_tiny_image_are_not_empty():
    windows = transforms.inception_windows(uniforms(100, 4), 1, 2).numpy()
    assert (windows[:, 2:] >= 1).all() and (windows[:, :2] + windows[:, 2:] <= [1, 2]).all()


@pytest.mark.parametrize(
    ("image", "size", "fraction", "expected"),
    [
        ((256, 256), (224, 224), (7, 8), (16, 16, 224, 224)),
        ((256, 400), (224, 224), (7, 8), (16, 88, 224, 224)),
        ((512, 400), (224, 224), (7, 8), (81, 25, 350, 350)),
        ((300, 400), (224, 224), (1, 1), (0, 50, 300, 300)),
        ((300, 400), (30, 40), (1, 1), (0, 0, 300, 400)),
        ((300, 400), (20, 40), (1, 1), (50, 0, 200, 400)),
        ((1, 1), (224, 224), (7, 8), (0, 0, 1, 1)),
    ],
)
def test_the_centre_window_has_the_requested_shape_and_fraction(image, size, fraction, expected):
    assert transforms.centre_window(*image, size, fraction) == expected
    as_tensors = transforms.centre_window(*map(tf.constant, image), size, fraction)
    assert tuple(int(number) for number in as_tensors) == expected


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (3, 2), (1, 1)])
def test_resample_equals_resizing_the_window_in_its_image(mirrored, size):
    images = pool()
    windows = np.array([[2, 1, 7, 5], [0, 0, 12, 10], [11, 9, 1, 1], [5, 0, 7, 4]])
    indices = [3, 0, 4, 0]
    got = transforms.resample(
        tf.constant(images), indices, windows, tf.constant([mirrored] * 4), size
    )
    for index, (top, left, height, width), result in zip(indices, windows, got, strict=True):
        expected = bilinear(
            images[index],
            np.clip(top + (np.arange(size[0]) + 0.5) * height / size[0] - 0.5, 0, 11),
            np.clip(left + (np.arange(size[1]) + 0.5) * width / size[1] - 0.5, 0, 9),
        )
        # A position is rounded to 2^-20 of the image's side.
        np.testing.assert_allclose(result, expected[:, ::-1] if mirrored else expected, atol=0.01)


@pytest.mark.parametrize(
    ("side", "size", "crop", "training"),
    [
        (32, 32, "none", True),
        (32, 32, "shift", True),
        (32, 64, "shift", True),
        (96, 32, "none", True),
        (96, 32, "shift", True),
        (32, 64, "shift", False),
        (96, 32, "none", False),
        (40, 35, "inception", False),
        (32, 32, "inception", False),
        (64, 224, "inception", False),
    ],
)
def test_an_image_in_memory_is_preprocessed_like_its_file(side, size, crop, training):
    images = np.stack([photograph(side, side + 8)] * 4)[:, :, 8:]
    images[1:] = images[1:, ::-1, :, ::-1]
    preprocessing = make_preprocessing(size=(size, size), crop=crop, mirror=True)
    draws = tf.constant(uniforms(4)) if training else None
    in_memory = preprocessing.process_batch(tf.constant(images), tf.range(4), draws, 255)
    for i in range(4):
        draw = draws[i] if training else None
        from_file = preprocessing.process_encoded(tf.io.encode_png(images[i]), draw, 3)
        # A two-hundredth of a grey level of 255.
        np.testing.assert_allclose(in_memory[i], from_file, atol=4e-5)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (64, 224), (256, 32)])
def test_the_interior_of_a_training_crop_in_memory_is_that_of_its_file(side, size):
    image = photograph(side, side)
    preprocessing = make_preprocessing(size=(size, size), crop="inception", mirror=True)
    draws = tf.constant(uniforms(20))
    in_memory = preprocessing.process_batch(
        tf.constant(image[None]), tf.zeros(20, tf.int32), draws, 255
    )
    edge = max(1, math.ceil(size / 2 / (0.25 * side)))  # Half a pixel of the smallest crop.
    inside = slice(edge, -edge)
    for draw, result in zip(draws, in_memory, strict=True):
        from_file = preprocessing.process_encoded(tf.io.encode_png(image), draw, 3)
        np.testing.assert_allclose(result[inside, inside], from_file[inside, inside], atol=4e-4)


def test_shift_in_memory_moves_whole_pixels_and_fills_with_grey():
    images, draws = pool(n=40, height=32, width=24), uniforms(40)
    preprocessing = make_preprocessing(size=(32, 24), crop="shift", mirror=True)
    got = preprocessing.process_batch(tf.constant(images), tf.range(40), tf.constant(draws), 255)
    moves = transforms.shift_offsets(draws[:, :2], 32, 24).numpy()
    assert set(moves[:, 0]) <= set(range(-4, 5)) and set(moves[:, 1]) <= set(range(-3, 4))
    assert len(set(moves[:, 0])) == 9 and len(set(moves[:, 1])) == 7
    for image, (down, right), draw, result in zip(images, moves, draws, got, strict=True):
        padded = np.pad(image.astype(np.float32), [(4, 4), (3, 3), (0, 0)], constant_values=127.5)
        expected = padded[4 - down : 36 - down, 3 - right : 27 - right]
        if draw[transforms.MIRROR_COLUMN] < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_allclose(result, expected / 127.5 - 1, atol=1e-6)


def test_shifting_one_image_equals_shifting_a_batch():
    images, draws = pool(height=32, width=24), uniforms(5)
    preprocessing = make_preprocessing(size=(32, 24), crop="shift", mirror=True, distortion=1.0)
    in_memory = preprocessing.process_batch(
        tf.constant(images), tf.range(5), tf.constant(draws), 255
    )
    for image, draw, expected in zip(images, draws, in_memory, strict=True):
        got = preprocessing.process_encoded(tf.io.encode_png(image), tf.constant(draw), 3)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_without_augmentation_images_are_only_scaled():
    images = pool()
    got = make_preprocessing().process_batch(
        tf.constant(images), [4, 2], tf.constant(uniforms(2)), 255
    )
    np.testing.assert_allclose(got, images[[4, 2]] / 127.5 - 1, atol=1e-6)


def test_evaluation_uses_no_augmentation():
    images = pool(height=16, width=16)
    preprocessing = make_preprocessing(size=(14, 14), crop="inception", mirror=True, distortion=1.0)
    got = preprocessing.process_batch(tf.constant(images), tf.range(5), None, 255)
    np.testing.assert_allclose(got, images[:, 1:15, 1:15] / 127.5 - 1, atol=1e-6)


def test_binary_images_are_thresholded_at_one_half():
    images = np.arange(17, dtype=np.uint8).reshape(1, 1, 17, 1)
    preprocessing = make_preprocessing(size=(1, 17), binary=True)
    got = preprocessing.process_batch(tf.constant(images), [0], None, 16).numpy().ravel()
    np.testing.assert_array_equal(got, [0.0] * 8 + [1.0] * 9)


def photograph(height=90, width=120):
    """Returns a smooth image with some noise."""
    rows, columns = np.mgrid[:height, :width]
    waves = [rows / height, columns / width, (rows + columns) / (height + width)]
    noise = np.random.default_rng(0).random((height, width, 3))
    return (200 * np.stack(waves, axis=-1) + 55 * noise).astype(np.uint8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("downsampling", [False, True])
def test_a_crop_of_a_jpeg_equals_a_crop_of_the_decoded_image(training, downsampling):
    encoded = tf.io.encode_jpeg(photograph(), chroma_downsampling=downsampling)
    whole = tf.io.encode_png(tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"))
    preprocessing = make_preprocessing(size=(32, 32), crop="inception", mirror=True)
    for draw in uniforms(5):
        draw = tf.constant(draw) if training else None
        got, expected = (preprocessing.process_encoded(each, draw, 3) for each in (encoded, whole))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("damage", ["truncated", "marker"])
def test_every_crop_of_a_damaged_jpeg_is_judged_like_the_whole_image(damage):
    intact = jpeg(photograph())
    decode = tf.function(
        lambda encoded, uniforms: make_preprocessing(crop="inception").process_encoded(
            encoded, uniforms, 3
        )
    )
    for place in (0.7, 0.97):
        place = int(len(intact) * place)
        content = intact[:place] if damage == "truncated" else bytearray(intact)
        if damage == "marker":
            content[place : place + 2] = b"\xff\xc0"
            content = bytes(content)
        with pytest.raises(tf.errors.InvalidArgumentError):
            tf.io.decode_jpeg(content)
        # The smallest crop at the top, which ends long before the damage.
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(content), tf.zeros([NUM_UNIFORMS]))
    decode(tf.constant(intact), tf.zeros([NUM_UNIFORMS]))


def jpeg(pixels, block=None):
    """Encodes a JPEG with the content of an EXIF block; Pillow writes a JFIF block first."""
    stream = io.BytesIO()
    exif_option = {} if block is None else {"exif": block}
    Image.fromarray(pixels).save(stream, "JPEG", subsampling=0, quality=95, **exif_option)
    return stream.getvalue()


def exif_block(order="<", entries=((0x0112, 3, 1, 6),), begin=8, count=None):
    """Builds an EXIF block with entries (tag, type, count, value); values are 16-bit."""
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", begin)
    block += struct.pack(f"{order}H", len(entries) if count is None else count)
    for entry in entries:
        block += struct.pack(f"{order}HHIHxx", *entry)
    return b"Exif\0\0" + block + bytes(4)


def upright(encoded):
    """Decodes and rotates an image with Pillow."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))


@pytest.fixture(scope="module")
def decoder():
    """transforms.decode as a tf.function, as in the input pipeline."""
    return tf.function(lambda encoded: transforms.decode(encoded, 3))


@pytest.mark.parametrize("order", ["<", ">"])
def test_photographs_are_rotated_upright_from_every_orientation(decoder, order):
    pixels, seen = photograph(48, 64), set()
    for orientation in range(1, 9):
        # The orientation is among other entries, as in a photograph.
        entries = [(0x010F, 3, 1, 6), (0x0112, 3, 1, orientation), (0x0128, 3, 1, 2)]
        encoded = jpeg(pixels, exif_block(order, entries))
        got, expected = decoder(encoded).numpy(), upright(encoded)
        np.testing.assert_array_equal(got, expected)
        seen.add(got.tobytes())
    assert len(seen) == 8


def test_exif_blocks_written_by_pillow_are_read(decoder):
    for orientation in range(1, 9):
        block = Image.Exif()
        block[0x010F], block[0x0112] = "A maker", orientation
        encoded = jpeg(photograph(48, 64), block)
        np.testing.assert_array_equal(decoder(encoded), upright(encoded))


def test_an_exif_block_behind_a_colour_profile_is_read(decoder):
    plain, block = jpeg(photograph(48, 64)), exif_block()
    segments = b"\xff\xe2" + struct.pack(">H", 3002) + bytes(3000)
    segments += b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    encoded = plain[:20] + segments + plain[20:]
    np.testing.assert_array_equal(decoder(encoded), upright(encoded))
    assert decoder(encoded).shape == (64, 48, 3)


@pytest.mark.parametrize(
    "block",
    [
        exif_block(entries=[(0x0112, 3, 1, 0)]),
        exif_block(entries=[(0x0112, 3, 1, 9)]),
        exif_block(entries=[(0x0112, 3, 1, 0x0600)]),
        exif_block(entries=[(0x0112, 2, 1, 6)]),
        exif_block(entries=[(0x0113, 3, 1, 6)]),
        exif_block(entries=[]),
        exif_block(count=0),
        exif_block(begin=2**32 - 1),
        exif_block(begin=2**31),
        exif_block(begin=40),
        exif_block()[:-9],
        exif_block()[:16],
        exif_block()[:10],
        exif_block()[:6],
        b"Exif\0\0" + b"XX*\0" + exif_block()[10:],
    ],
)
def test_an_invalid_exif_block_is_ignored(decoder, block):
    plain = jpeg(photograph(48, 64))
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    encoded = plain[:2] + segment + plain[2:]
    np.testing.assert_array_equal(decoder(encoded), decoder(plain))


def test_an_exif_block_of_length_zero_is_ignored(decoder):
    plain = jpeg(photograph(48, 64))
    encoded = plain[:2] + b"\xff\xe1" + struct.pack(">H", 8) + exif_block() + plain[2:]
    np.testing.assert_array_equal(decoder(encoded), decoder(plain))


def test_an_exif_directory_longer_than_its_block_is_read_up_to_the_end(decoder):
    encoded = jpeg(photograph(48, 64), exif_block(count=2**16 - 1))
    assert decoder(encoded).shape == (64, 48, 3)


def test_bytes_beyond_the_exif_block_are_ignored(decoder):
    plain, header, directory = (
        jpeg(photograph(48, 64)),
        exif_block(begin=12)[:14],
        exif_block()[14:],
    )
    segments = b"\xff\xe1" + struct.pack(">H", len(header) + 2) + header
    segments += b"\xff\xfe" + struct.pack(">H", len(directory) + 2) + directory
    encoded = plain[:2] + segments + plain[2:]
    np.testing.assert_array_equal(decoder(encoded), decoder(plain))


@pytest.mark.parametrize("training", [False, True])
def test_crops_are_cut_from_the_upright_image(training):
    preprocessing = make_preprocessing(size=(32, 32), crop="inception", mirror=True)
    crop = tf.function(lambda *arguments: preprocessing.process_encoded(*arguments, 3))
    for orientation, draw in zip(range(1, 9), uniforms(8), strict=True):
        encoded = jpeg(photograph(), exif_block(entries=[(0x0112, 3, 1, orientation)]))
        stored = tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE")
        whole = tf.io.encode_png(exif.rotate_upright(stored, tf.constant(orientation)))
        draw = tf.constant(draw) if training else None
        np.testing.assert_array_equal(crop(encoded, draw), crop(whole, draw))


@pytest.mark.parametrize("encode", [tf.io.encode_png, tf.io.encode_jpeg])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_are_decoded_to_the_requested_channels(encode, channels):
    encoded = encode(np.full((20, 30, 1), 204, np.uint8))
    got = make_preprocessing(size=(8, 8)).process_encoded(encoded, None, channels)
    np.testing.assert_allclose(got, np.full((8, 8, channels), 0.6), atol=2 / 127.5)


def colours(**amounts):
    """Returns a row of uniform numbers for these signed amounts at strength 1."""
    row = np.full((1, 4), 0.5, np.float32)
    for name, amount in amounts.items():
        row[0, COLUMNS[name]] = (amount + 1) / 2
    return tf.constant(row)


@pytest.fixture
def mild():
    """An image so far from black and white that no distortion clips it."""
    return np.random.default_rng(1).uniform(0.4, 0.6, (1, 9, 7, 3)).astype(np.float32)


@pytest.mark.parametrize("amount", [-1.0, 0.3, 1.0])
def test_brightness_and_contrast_agree_with_tf_image(mild, amount):
    brightness = transforms.distort(mild, colours(brightness=amount), 1.0, 1.0)
    expected = tf.image.adjust_brightness(mild, amount * transforms.MAX_BRIGHTNESS)
    np.testing.assert_allclose(brightness, expected, atol=2e-6)
    contrast = transforms.distort(mild, colours(contrast=amount), 1.0, 1.0)
    expected = tf.image.adjust_contrast(mild, 1 + amount * transforms.MAX_CONTRAST)
    np.testing.assert_allclose(contrast, expected, atol=2e-6)


def with_chroma(image, change):
    """Multiplies V + jU, the chroma of YUV (ITU-R BT.470), by a complex number, in float64.

    I + jQ is the same number rotated by 33 degrees. tf.image's YIQ uses rounded tables.
    """
    luma = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    chroma = 0.877283 * (image[..., 0] - luma) + 0.492111j * (image[..., 2] - luma)
    chroma = change * chroma
    red, blue = luma + chroma.real / 0.877283, luma + chroma.imag / 0.492111
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return np.stack([red, green, blue], axis=-1)


@pytest.mark.parametrize("amount", [-1.0, 0.3, 1.0])
def test_saturation_scales_and_hue_rotates_the_chroma(mild, amount):
    saturation = transforms.distort(mild, colours(saturation=amount), 1.0, 1.0)
    factor = 1 + amount * transforms.MAX_SATURATION
    expected = with_chroma(mild, factor)
    np.testing.assert_allclose(saturation, expected, atol=1e-5)
    hue = transforms.distort(mild, colours(hue=amount), 1.0, 1.0)
    turn = 2 * math.pi * amount * transforms.MAX_HUE_TURN
    expected = with_chroma(mild, cmath.exp(1j * turn))
    np.testing.assert_allclose(hue, expected, atol=1e-5)


def test_saturation_blends_the_image_with_its_luma(mild):
    """As in torchvision and Pillow."""
    got = transforms.distort(mild, colours(saturation=-0.8), 1.0, 1.0)
    grey = tf.image.rgb_to_grayscale(mild)
    np.testing.assert_allclose(got, 0.6 * mild + 0.4 * grey, atol=2e-4)


def test_the_four_distortions_together_equal_a_sequence_of_them(mild):
    amounts = {"hue": 0.7, "brightness": -0.6, "saturation": 0.5, "contrast": -0.9}
    together = transforms.distort(mild, colours(**amounts), 1.0, 1.0)
    for names in (list(amounts), list(amounts)[::-1]):
        image = mild
        for name in names:
            image = transforms.distort(image, colours(**{name: amounts[name]}), 1.0, 1.0)
        np.testing.assert_allclose(image, together, atol=2e-6)


def test_distortion_clips_and_treats_images_independently():
    images = tf.constant(pool(4).astype(np.float32))
    draws = tf.constant(uniforms(4, 4))
    got = transforms.distort(images, draws, 1.0, 255.0).numpy()
    assert got.min() == 0 and got.max() == 255
    for i in range(4):
        alone = transforms.distort(images[i : i + 1], draws[i : i + 1], 1.0, 255.0)
        np.testing.assert_allclose(got[i], alone[0], atol=1e-4)


def test_strength_scales_the_distortion(mild):
    draws = tf.constant(uniforms(1, 4))
    np.testing.assert_allclose(transforms.distort(mild, draws, 0.0, 1.0), mild, atol=2e-6)
    half = transforms.distort(mild, (draws - 0.5) / 2 + 0.5, 1.0, 1.0)
    np.testing.assert_allclose(transforms.distort(mild, draws, 0.5, 1.0), half, atol=2e-6)
    assert np.abs(half - mild).max() > 0.01


def test_grey_images_change_only_in_brightness_and_contrast():
    images = tf.constant(pool(3, channels=1).astype(np.float32) / 2 + 64)
    draws = uniforms(3, 4)
    got = transforms.distort(images, tf.constant(draws), 1.0, 255.0)
    contrast, brightness = 0.5 + draws[:, 1], (2 * draws[:, 0] - 1) * 32
    means = images.numpy().mean(axis=(1, 2, 3))
    expected = (images - means[:, None, None, None]) * contrast[:, None, None, None]
    expected += (means + brightness)[:, None, None, None]
    np.testing.assert_allclose(got, np.clip(expected, 0, 255), atol=1e-3)
