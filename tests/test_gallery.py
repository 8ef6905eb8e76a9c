"""The picture of the crops shows the crops, in their order, under their names."""

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure

from bn_keras.data.multi_crop import SINGLE_CROP, Crops
from bn_keras.errors import UsageError
from bn_keras.pictures.crop_sheet import draw_crops


@pytest.fixture
def image(tmp_path):
    coarse = np.random.default_rng(0).uniform(0, 255, (1, 7, 7, 3))
    pixels = tf.saturate_cast(tf.image.resize(coarse, (60, 90), "bicubic")[0], tf.uint8)
    # Dollars would be mathematics to matplotlib.
    (tmp_path / "a$b$.png").write_bytes(tf.io.encode_png(pixels).numpy())
    return tmp_path / "a$b$.png"


@pytest.mark.parametrize("text", ["10", "144", "2x3x1x1"])
def test_what_it_shows(text, image, tmp_path, monkeypatch):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: [saved.append(f), save(f, *a, **k)])
    crops = Crops.parse(text)
    draw_crops(image, crops, 32, tmp_path / "crops.png")
    assert tf.io.decode_png((tmp_path / "crops.png").read_bytes()).shape[-1] == 4

    scales, grid = (part.axes for part in saved[0].subfigs)
    assert saved[0].get_suptitle() == f"a$b$.png: {crops.count} crops of 32x32 pixels"
    pixels = tf.io.decode_png(image.read_bytes())
    expected = crops.cut(crops.take_squares(pixels[None], 32), 32)
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


def test_what_cannot_be_drawn(image, tmp_path):
    with pytest.raises(UsageError, match="give several crops"):
        draw_crops(image, SINGLE_CROP, 32, tmp_path / "crops.png")
    with pytest.raises(UsageError, match="missing.png can't be read"):
        draw_crops(tmp_path / "missing.png", Crops.parse("10"), 32, tmp_path / "crops.png")
    for output in ("crops.nonsense", "no/folder/crops.png"):
        with pytest.raises(UsageError, match=f"{output} can't be written") as caught:
            draw_crops(image, Crops.parse("10"), 32, tmp_path / output)
        assert "\n" not in str(caught.value)
