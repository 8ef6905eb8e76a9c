"""The picture of the augmented input."""

import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from commands import launch
from full_disk import files_of_at_most
from matplotlib.figure import Figure
from test_launch import assert_fails_on_one_line

from bn_keras.data.pipeline import open_data
from bn_keras.errors import StorageError, UsageError
from bn_keras.pictures import augmented_input
from bn_keras.pictures.augmented_input import write_preview
from configs import digits_bn_x5

STRATEGY = tf.distribute.get_strategy()


def digits(**changes):
    config = digits_bn_x5.get_config().copy_and_resolve_references()
    config.data.update(changes)
    return config


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: [saved.append(f), save(f, *a, **k)])
    return saved


def test_the_picture_shows_the_input_of_the_network_with_its_names(tmp_path, figures):
    config = digits(distortion=0.25, crop="shift")
    write_preview(config, tmp_path / "new" / "x.png", num_examples=5)
    picture = matplotlib.image.imread(tmp_path / "new" / "x.png")
    assert picture.ndim == 3 and picture.std() > 0.1
    rows = np.array(figures[0].axes).reshape(-1, 5)
    names = [row[0].get_ylabel() for row in rows]
    expected = ["distortion 0", "distortion 0.25\n(this config)", "distortion 0.5", "distortion 1"]
    assert names == [*expected, "validation"]

    data = open_data(config.data, seed=config.seed)
    train = next(iter(data.train_batches(STRATEGY, 5)))
    validation = next(iter(data.validation_sample(STRATEGY, 5)))
    assert [cell.get_title() for cell in rows[4]] == ["0", "2", "4", "6", "8"]
    expected = ((rows[1], rows[0], train), (rows[4], rows[4], validation))
    for row, titled, (images, labels, *_) in expected:
        shown = np.stack([cell.images[0].get_array() for cell in row])
        np.testing.assert_allclose(shown, (images[..., 0] + 1) / 2, atol=1e-6)
        assert [cell.get_title() for cell in titled] == [str(label) for label in labels.numpy()]
    # Each column shows one example with increasing distortion.
    plain, *others = ([cell.images[0].get_array() for cell in row] for row in rows[:4])
    distances = [np.abs(np.subtract(other, plain)).mean() for other in others]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.job
def test_the_picture_shows_mixed_images_with_the_shares_of_their_classes(tmp_path, figures):
    """The last of three examples is mixed with a fourth."""
    config = digits(random_augment=0.5, mixup=0.4, cutmix=1.0, distortion=0.5)
    write_preview(config, tmp_path / "x.png", num_examples=3)
    rows = np.array(figures[0].axes).reshape(-1, 3)
    names = [row[0].get_ylabel() for row in rows]
    mixtures = [f"RandAugment 0.5\n{name}\n(this config)" for name in ("MixUp 0.4", "CutMix 1")]
    plain = [f"distortion {strength}" for strength in ("0", "0.5", "1")]
    assert names == [*plain, *mixtures, "validation"]

    data = open_data(config.data, seed=config.seed)
    batches = iter(data.train_batches(STRATEGY, 4, mix=True))
    for row in rows[3:5]:
        images, shares = (part.numpy() for part in next(batches))
        shown = np.stack([cell.images[0].get_array() for cell in row])
        np.testing.assert_allclose(shown, (images[:3, ..., 0] + 1) / 2, atol=1e-6)
        for cell, share in zip(row, shares, strict=False):
            lines = [line.split("% ") for line in cell.get_title().split("\n")]
            named = {int(name): int(percent) for percent, name in lines}
            assert 99 <= sum(named.values()) <= 101 and len(named) <= 2
            np.testing.assert_allclose([named.get(n, 0) for n in range(10)], 100 * share, atol=0.6)


def test_binary_images_are_shown_as_they_are(tmp_path, figures):
    write_preview(digits(binary=True), tmp_path / "x.png", num_examples=3)
    for cell in figures[0].axes:
        assert set(np.unique(cell.images[0].get_array())) == {0.0, 1.0}


def test_class_names_are_drawn_as_they_are(tmp_path, figures):
    names = ("a$b_$", "\\alpha$", "x" * 40)
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((8, 8, 1), 60 * number, np.uint8)
            content = tf.io.encode_png(pixels).numpy()
            (tmp_path / "set" / name / f"{number}.png").write_bytes(content)
    changes = {"train_split": ".[:50%]", "validation_split": ".[50%:]", "image_size": 8}
    config = digits(name="folder", data_dir=f"{tmp_path / 'set'}", **changes)
    write_preview(config, tmp_path / "x.png", num_examples=3)
    titles = {cell.get_title() for cell in figures[0].axes}
    assert {"a$b_$", "\\alpha$"} < titles and max(map(len, titles)) == 16


@pytest.mark.parametrize(
    ("name", "num_examples", "message"),
    [
        ("x.nope", 2, "x.nope is invalid: expected one of the extensions .*.png"),
        ("file/x.png", 2, "file/x.png is invalid: .*file is not a folder"),
        ("x.png", 0, "cannot show 0 examples"),
    ],
)
def test_invalid_arguments_are_reported_on_one_line(
    tmp_path, name, num_examples, message, monkeypatch
):
    """Before the data is opened."""
    monkeypatch.setattr(augmented_input, "open_data", None)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=message) as caught:
        write_preview(digits(), tmp_path / name, num_examples)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_a_storage_error(tmp_path):
    with files_of_at_most(50), pytest.raises(StorageError, match="x.png cannot be written: "):
        write_preview(digits(), tmp_path / "x.png", 2)


def test_the_command_writes_the_picture(tmp_path):
    path = tmp_path / "x.png"
    done = launch("preview", "--config=configs/digits_bn_x5.py", f"--output={path}", "--examples=2")
    assert done.returncode == 0 and str(path) in done.stdout and path.stat().st_size > 1000
    done = launch("preview", "--config=configs/digits_bn_x5.py")
    assert_fails_on_one_line(done, 2, "--output is missing")
