"""Multi-crop evaluation against explicitly listed windows, pixel by pixel."""

import numpy as np
import pytest
import tensorflow as tf

from bn_keras.data.multi_crop import SINGLE_CROP, CropPreprocessing, Crops
from bn_keras.data.transforms import Preprocessing
from bn_keras.errors import UsageError

GOOGLENET = Crops.parse("144")
IMAGENET = Preprocessing((224, 224), "inception", mirror=True, distortion=1.0)


def photograph(height, width, channels=3, seed=0):
    """Returns smooth noise: a wrong pixel makes a large difference, rounding a small one."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (1, 9, 9, channels))
    return tf.saturate_cast(tf.image.resize(coarse, (height, width), "bicubic"), tf.uint8)[0]


def resized(image, shorter_side):
    """Resizes an image to a shorter side; the longer side is rounded to the nearest pixel."""
    height, width = image.shape[:2]
    if height <= width:
        shape = shorter_side, round(width * shorter_side / height)
    else:
        shape = round(height * shorter_side / width), shorter_side
    return tf.image.resize(image, shape).numpy()


def googlenet_crops(image):
    """Returns the 144 crops of GoogLeNet, written out; see the Source of `Crops`."""
    crops = []
    for side in (256, 288, 320, 352):
        whole = resized(image, side)
        height, width = whole.shape[:2]
        if height <= width:  # left, centre, right
            starts = [(0, 0), (0, (width - side) // 2), (0, width - side)]
        else:  # top, centre, bottom
            starts = [(0, 0), ((height - side) // 2, 0), (height - side, 0)]
        for top, left in starts:
            square = whole[top : top + side, left : left + side]
            far, middle = side - 224, (side - 224) // 2
            corners = [(0, 0), (0, far), (far, 0), (far, far)]
            for y, x in [*corners, (middle, middle)]:
                window = square[y : y + 224, x : x + 224]
                crops += [window, window[:, ::-1]]
            shrunk = tf.image.resize(square, (224, 224)).numpy()
            crops += [shrunk, shrunk[:, ::-1]]
    return np.stack(crops)


@pytest.mark.parametrize("height, width", [(301, 450), (100, 67), (280, 280)])
def test_the_144_crops_equal_the_reference(height, width):
    image = photograph(height, width)
    expected = googlenet_crops(image)
    squares = GOOGLENET.extract_squares(image[None], 224)
    crops = GOOGLENET.cut(squares, 224).numpy()
    assert crops.shape == expected.shape == (144, 224, 224, 3)
    # The reference resizes whole squares in other batches, with different rounding.
    np.testing.assert_allclose(crops, expected, atol=1e-3)
    slices = [i for i, crop in enumerate(GOOGLENET.list_crops(224)) if crop.window is not None]
    assert len(slices) == 120
    np.testing.assert_array_equal(crops[slices], expected[slices])
    # Neighbours in the order of the crops are mirror images of each other.
    np.testing.assert_array_equal(crops[::2], crops[1::2, :, ::-1])


@pytest.mark.parametrize("height, width", [(20, 161), (21, 1000), (400, 10), (1, 40), (60, 1)])
def test_images_of_extreme_aspect_ratio_have_the_same_crops(height, width):
    """Their middle is cut out first, after which the longer side is rounded differently."""
    image = photograph(height, width)
    squares = GOOGLENET.extract_squares(image[None], 224)
    crops = GOOGLENET.cut(squares, 224).numpy()
    difference = np.abs(crops - googlenet_crops(image))
    assert difference.max() < 8 and difference.mean() < 0.1


def test_the_memory_does_not_grow_with_the_aspect_ratio(monkeypatch):
    """A line of 1x6000 pixels, resized to 352 pixels by its shorter side, would take 9 GB."""
    sizes = []
    resize = tf.image.resize
    monkeypatch.setattr(
        tf.image, "resize", lambda x, size: sizes.append(np.prod(size)) or resize(x, size)
    )
    for shape in [(1, 6000), (6000, 1), (7, 100_000)]:
        GOOGLENET.extract_squares(tf.zeros([1, *shape, 3], tf.uint8), 224)
    assert len(sizes) == 12 and max(sizes) <= 8 * 352**2


def test_the_list_describes_the_crops():
    image = photograph(300, 470)
    crops = GOOGLENET.cut(GOOGLENET.extract_squares(image[None], 224), 224).numpy()
    table = GOOGLENET.list_crops(224)
    assert len(set(table)) == len(table) == 144 == GOOGLENET.count
    for row, crop in zip(table, crops, strict=True):
        whole = resized(image, row.shorter_side)
        left = [0, (whole.shape[1] - row.shorter_side) // 2, whole.shape[1] - row.shorter_side]
        square = whole[:, left[row.square] :][:, : row.shorter_side]
        if row.window is None:
            window = tf.image.resize(square, (224, 224)).numpy()
        else:
            y, x = (
                [0, (row.shorter_side - 224) // 2, row.shorter_side - 224][w] for w in row.window
            )
            window = square[y : y + 224, x : x + 224]
        np.testing.assert_allclose(crop, window[:, ::-1] if row.mirrored else window, atol=1e-3)


def test_ten_crops_are_the_corners_and_the_centre_of_the_central_square():
    image = photograph(256, 400)
    ten = Crops.parse("10")
    crops = ten.cut(ten.extract_squares(image[None], 224), 224).numpy()
    square = image.numpy()[:, 72 : 72 + 256].astype(np.float32)
    expected = [
        square[y : y + 224, x : x + 224] for y, x in [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    ]
    np.testing.assert_array_equal(crops[::2], expected)
    np.testing.assert_array_equal(crops[1::2], crops[::2, :, ::-1])


@pytest.mark.parametrize("text", ["1", "10", "144", "1x1x1x2", "2x3x6x2", "4x1x5x1", "3x3x1x1"])
def test_fewer_crops_are_a_subset_of_the_144(text):
    crops = Crops.parse(text)
    images = tf.stack([photograph(40, 61, seed=s) for s in (0, 1)])
    cut = crops.cut(crops.extract_squares(images, 32), 32)
    assert cut.shape == (2 * crops.count, 32, 32, 3) == (2 * len(crops.list_crops(32)), 32, 32, 3)
    # Image by image, in the order of the list.
    of_144 = GOOGLENET.cut(GOOGLENET.extract_squares(images, 32), 32)
    rows = [GOOGLENET.list_crops(32).index(row) for row in crops.list_crops(32)]
    rows += [GOOGLENET.count + row for row in rows]
    np.testing.assert_allclose(cut, tf.gather(of_144, rows), atol=1e-3)


@pytest.mark.parametrize("text", ["", "0", "12", "5x1x1x1", "1x2x1x1", "1x1x4x1", "1x1x1x3", "x"])
def test_invalid_crops_are_reported_on_one_line(text):
    with pytest.raises(UsageError, match="unknown crops .*expected 1, 10, 144") as caught:
        Crops.parse(text)
    assert "\n" not in str(caught.value)


def test_several_crops_need_a_square_input():
    oblong = Preprocessing((224, 192), "none")
    with pytest.raises(UsageError, match="10 crops .* 224x192: .* single crop"):
        CropPreprocessing(oblong, Crops.parse("10"))
    assert CropPreprocessing(oblong, SINGLE_CROP).num_pixels == 224 * 192


def encode(image, kind):
    return getattr(tf.io, f"encode_{kind}")(image)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_crops_of_an_encoded_image_are_in_the_networks_range(kind):
    encoded = encode(photograph(300, 400), kind)
    preprocessing = CropPreprocessing(IMAGENET, GOOGLENET)
    squares = preprocessing.process_encoded(encoded, None, 3)
    crops = preprocessing.cut(tuple(s[None] for s in squares))
    decoded = tf.io.decode_image(encoded)
    if kind == "jpeg":
        decoded = tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE")
    np.testing.assert_allclose(crops, googlenet_crops(decoded) / 127.5 - 1, atol=1e-5)
    assert preprocessing.num_pixels == sum(s.shape[0] * s.shape[1] * s.shape[2] for s in squares)


def test_the_single_crop_is_the_centre_window_of_the_first_scale():
    # 512 is a multiple of 256, so that both crops are resized from the same pixels.
    image = photograph(512, 800)
    encoded = encode(image, "png")
    single = CropPreprocessing(IMAGENET, SINGLE_CROP)
    shown = single.cut(single.process_encoded(encoded, None, 3)[None])[0]
    squares = SINGLE_CROP.extract_squares(image[None], 224)
    cut = SINGLE_CROP.cut(squares, 224)[0] / 127.5 - 1
    np.testing.assert_allclose(shown, cut, atol=1e-5)


@pytest.mark.parametrize("binary", [False, True])
def test_crops_of_images_in_memory_are_in_the_networks_range(binary):
    # Like the digits: one channel, 17 grey levels, 8x8.
    pool = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1), np.uint8)
    preprocessing = CropPreprocessing(Preprocessing((8, 8), "none", binary=binary), GOOGLENET)
    squares = preprocessing.process_batch(tf.constant(pool), tf.constant([3, 1]), None, 16)
    crops = preprocessing.cut(squares).numpy().reshape(2, 144, 8, 8, 1)
    pixels = GOOGLENET.cut(GOOGLENET.extract_squares(pool[[3, 1]], 8), 8).numpy()
    pixels = pixels.reshape(crops.shape)
    if binary:
        settled = abs(pixels - 8) > 1e-3
        np.testing.assert_array_equal(crops[settled], pixels[settled] > 8)
    else:
        np.testing.assert_allclose(crops, pixels / 8 - 1, atol=1e-6)
    assert preprocessing.num_pixels == sum(np.prod(s.shape[1:4]) for s in squares)
