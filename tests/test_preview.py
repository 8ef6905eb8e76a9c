"""The gallery of what the network is fed."""

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_launch import assert_fails_on_one_line, launch

from bn_keras.data import pipeline
from bn_keras.errors import UsageError
from bn_keras.pictures import augmented_input as preview
from configs import digits_bn_x5


def digits(**changes):
    config = digits_bn_x5.get_config().copy_and_resolve_references()
    config.data.update(changes)
    return config


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plt.close("all")


def test_it_shows_what_the_network_is_fed_under_the_right_names(tmp_path, figures):
    config = digits(distortion=0.25, crop="shift")
    preview.write_preview(config, tmp_path / "new" / "x.png", num_examples=5)
    picture = matplotlib.image.imread(tmp_path / "new" / "x.png")
    assert picture.ndim == 3 and picture.std() > 0.1
    rows = np.array(figures[0].axes).reshape(-1, 5)
    names = [row[0].get_ylabel() for row in rows]
    expected = ["distortion 0", "distortion 0.25\n(this config)", "distortion 0.5", "distortion 1"]
    assert names == [*expected, "validation"]

    data = pipeline.open_data(config.data, seed=config.seed)
    strategy = preview.tf.distribute.get_strategy()
    train = next(iter(data.train_batches(strategy, 5)))
    validation = next(iter(data.validation_batches(strategy, 5)[0]))
    fed = ((rows[1], rows[0], train), (rows[4], rows[4], validation))
    for row, titled, (images, labels, *_) in fed:
        shown = np.stack([cell.images[0].get_array() for cell in row])
        np.testing.assert_allclose(shown, (images[..., 0] + 1) / 2, atol=1e-6)
        assert [cell.get_title() for cell in titled] == [str(label) for label in labels.numpy()]
    # The same example in each column, more and more distorted.
    plain, *others = ([cell.images[0].get_array() for cell in row] for row in rows[:4])
    distances = [np.abs(np.subtract(other, plain)).mean() for other in others]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_it_shows_what_goes_beyond_the_paper_with_the_shares_of_the_classes(tmp_path, figures):
    """Three examples, the last of which is mixed with a fourth."""
    config = digits(random_augment=0.5, mixup=0.4, cutmix=1.0, distortion=0.5)
    preview.write_preview(config, tmp_path / "x.png", num_examples=3)
    rows = np.array(figures[0].axes).reshape(-1, 3)
    names = [row[0].get_ylabel() for row in rows]
    mixtures = [f"RandAugment 0.5\n{name}\n(this config)" for name in ("MixUp 0.4", "CutMix 1")]
    plain = [f"distortion {strength}" for strength in ("0", "0.5", "1")]
    assert names == [*plain, *mixtures, "validation"]

    data = pipeline.open_data(config.data, seed=config.seed)
    batches = iter(data.train_batches(preview.tf.distribute.get_strategy(), 4, mixed=True))
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
    preview.write_preview(digits(binary=True), tmp_path / "x.png", num_examples=3)
    for cell in figures[0].axes:
        assert set(np.unique(cell.images[0].get_array())) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "num_examples", "message"),
    [
        ("x.nope", 2, "can't write the picture .*x.nope"),
        ("file/x.png", 2, "can't write the picture"),
        ("x.png", 0, "0 examples can't be shown"),
    ],
)
def test_what_cannot_be_written_is_one_clear_line(tmp_path, name, num_examples, message):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=message):
        preview.write_preview(digits(), tmp_path / name, num_examples)
    assert not plt.get_fignums()


def test_as_a_command(tmp_path):
    path = tmp_path / "x.png"
    done = launch("preview", "--config=configs/digits_bn_x5.py", f"--output={path}", "--examples=2")
    assert done.returncode == 0 and str(path) in done.stdout and path.stat().st_size > 1000
    done = launch("preview", "--config=configs/digits_bn_x5.py")
    assert_fails_on_one_line(done, 2, "--output is missing")


def test_preparing_without_archives_is_one_clear_line(tmp_path):
    done = launch("prepare", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}")
    assert_fails_on_one_line(done, 2, "ILSVRC2012_img_train.tar", "image-net.org")
