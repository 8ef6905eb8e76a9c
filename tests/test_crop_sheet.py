"""The picture of the crops of an image."""

import numpy as np
import pytest
import tensorflow as tf
from full_disk import files_of_at_most
from matplotlib.figure import Figure

from bn_keras.data.multi_crop import SINGLE_CROP, Crops
from bn_keras.errors import StorageError, UsageError
from bn_keras.pictures.crop_sheet import write_crop_sheet


@pytest.fixture
def image(tmp_path):
    coarse = np.random.default_rng(0).uniform(0, 255, (1, 7, 7, 3))
    pixels = tf.saturate_cast(tf.image.resize(coarse, (60, 90), "bicubic")[0], tf.uint8)
    # matplotlib would parse dollar signs as mathematics.
    (tmp_path / "a$b$.png").write_bytes(tf.io.encode_png(pixels).numpy())
    return tmp_path / "a$b$.png"


@pytest.mark.parametrize("text", ["10", "144", "2x3x1x1"])
def test_the_picture_shows_all_crops_with_their_names(text, image, tmp_path, monkeypatch):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: [saved.append(f), save(f, *a, **k)])
    crops = Crops.parse(text)
    output = tmp_path / "new" / "crops.png"
    write_crop_sheet(image, crops, 32, output)
    assert tf.io.decode_png(output.read_bytes()).shape[-1] == 4

    scales, grid = (part.axes for part in saved[0].subfigs)
    assert saved[0].get_suptitle() == f"a$b$.png: {crops.count} crops of 32x32 pixels"
    pixels = tf.io.decode_png(image.read_bytes())
    expected = crops.cut(crops.extract_squares(pixels[None], 32), 32)
    assert len(grid) == crops.count
    for axes, crop in zip(grid, expected.numpy(), strict=True):
        shown = axes.images[0].get_array().astype(float)
        np.testing.assert_allclose(shown, np.clip(crop, 0, 255), atol=0.501)
    columns = crops.windows * crops.mirrors
    labels = [axes.get_ylabel() for axes in grid[::columns]]
    sides = crops.shorter_sides(32)
    places = ["centre"] if crops.squares == 1 else ["left", "centre", "right"]
    assert labels == [f"{side}\n{place}" for side in sides for place in places]
    assert [axes.get_title() for axes in scales] == [
        f"{side}x{round(side * 1.5)} pixels" for side in sides
    ]


def test_invalid_arguments_are_reported_on_one_line(image, tmp_path):
    with pytest.raises(UsageError, match="choose several crops"):
        write_crop_sheet(image, SINGLE_CROP, 32, tmp_path / "crops.png")
    with pytest.raises(UsageError, match="missing.png cannot be read"):
        write_crop_sheet(tmp_path / "missing.png", Crops.parse("10"), 32, tmp_path / "crops.png")
    (tmp_path / "file").write_text("not a folder")
    for output in ("crops.nonsense", "file/crops.png"):
        with pytest.raises(UsageError, match=f"{output} is invalid: ") as caught:
            write_crop_sheet(image, Crops.parse("10"), 32, tmp_path / output)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_a_storage_error(image, tmp_path):
    with files_of_at_most(50), pytest.raises(StorageError, match="crops.png cannot be written: "):
        write_crop_sheet(image, Crops.parse("10"), 32, tmp_path / "crops.png")
