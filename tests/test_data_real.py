"""Real data sets, from the folder in BN_KERAS_DATA; skipped without them."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from commands import launch
from test_crops import googlenet_crops
from test_launch import assert_fails_on_one_line

from bn_keras.data import pipeline
from bn_keras.data.imagenet import ARCHIVES, prepare_imagenet
from bn_keras.data.multi_crop import CropPreprocessing, Crops
from bn_keras.errors import UsageError
from bn_keras.training.config import default_config

DATA = Path(os.environ.get("BN_KERAS_DATA") or Path(__file__).parents[2] / "shared" / "data")
STRATEGY = tf.distribute.get_strategy()


def settings(**changes):
    config = default_config().data.copy_and_resolve_references()
    config.update(changes)
    return config


def folder(*names):
    path = DATA.joinpath(*names)
    if not path.exists():
        pytest.skip(f"no {path}: set BN_KERAS_DATA to the folder of the data")
    return str(path)


@pytest.mark.parametrize(
    ("name", "num_train_examples", "input_shape"),
    [("mnist", 60_000, (28, 28, 1)), ("cifar10", 50_000, (32, 32, 3))],
)
def test_small_sets_are_read_completely(name, num_train_examples, input_shape):
    data_dir = folder("tfds", name) and str(DATA / "tfds")
    config = settings(name=name, data_dir=data_dir, validation_split="test", image_size=0)
    config.update({"crop": "none", "mirror": False, "distortion": 0.0})
    data = pipeline.open_data(config, seed=0)
    assert (data.input_shape, data.num_classes) == (input_shape, 10)
    assert (data.num_train_examples, data.num_validation_examples) == (num_train_examples, 10_000)
    dataset, num_steps = data.validation_batches(STRATEGY, 300)
    counts = np.zeros(10)
    for images, labels, weights in dataset.take(num_steps):
        counts += np.bincount(labels, weights, minlength=10)
        assert float(tf.reduce_min(images)) == -1 and float(tf.reduce_max(images)) == 1
    assert counts.sum() == 10_000 and counts.min() > 850

    # The first examples of the test set, read by TFDS itself.
    builder = tfds.builder(name, data_dir=data_dir)
    examples = builder.as_dataset(split="test[:300]", shuffle_files=False, batch_size=-1)
    images, labels, _ = next(iter(dataset))
    np.testing.assert_allclose(images, examples["image"].numpy() / np.float32(127.5) - 1, atol=1e-6)
    np.testing.assert_array_equal(labels, examples["label"])


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """TFDS's imagenet2012, prepared from archives in the official layout."""
    manual_dir = folder("imagenet_manual")
    data_dir = tmp_path_factory.mktemp("imagenet")
    tfds.disable_progress_bar()
    prepared = prepare_imagenet(manual_dir, data_dir)
    # A second call does nothing, even without the archives.
    assert prepare_imagenet("gone", data_dir) == prepared
    return tfds.builder("imagenet2012", data_dir=data_dir)


def test_imagenet_is_augmented_for_training_and_cropped_for_evaluation(imagenet):
    data_dir = str(Path(imagenet.data_dir).parents[1])
    data = pipeline.open_data(settings(data_dir=data_dir, shuffle="examples"), seed=0)
    assert (data.num_classes, data.input_shape) == (1000, (224, 224, 3))
    num_examples = {name: split.num_examples for name, split in imagenet.info.splits.items()}
    assert data.num_train_examples == num_examples["train"]

    batches = list(data.train_batches(STRATEGY, 50).take(4).as_numpy_iterator())
    resumed = list(data.train_batches(STRATEGY, 50, start_step=3).take(1).as_numpy_iterator())
    for got, expected in zip(resumed[0], batches[3], strict=True):
        np.testing.assert_array_equal(got, expected)
    for images, labels in batches:
        assert images.shape == (50, 224, 224, 3) and images.min() >= -1 and images.max() <= 1
        # Photographs: neither blank nor noise.
        assert (images.std(axis=(1, 2, 3)) > 0.02).all()
        assert np.abs(np.diff(images, axis=2)).mean() < 0.2
        assert labels.min() >= 0 and labels.max() < 1000

    # Evaluation uses a fixed crop; the reference decodes the whole image first.
    dataset, num_steps = data.validation_batches(STRATEGY, 32)
    validation = list(dataset.take(num_steps).as_numpy_iterator())
    assert sum(weights.sum() for *_, weights in validation) == num_examples["validation"]
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = imagenet.as_dataset(split="validation", shuffle_files=False, decoders=decoders)
    images, labels, _ = validation[0]
    for image, label, example in zip(images[:8], labels[:8], examples, strict=False):
        whole = tf.io.decode_jpeg(example["image"], channels=3, dct_method="INTEGER_ACCURATE")
        side = -(-min(whole.shape[:2]) * 7 // 8)
        top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
        crop = whole[top : top + side, left : left + side]
        np.testing.assert_allclose(image, tf.image.resize(crop, (224, 224)) / 127.5 - 1, atol=1e-5)
        assert label == example["label"]


def test_the_144_crops_of_imagenet_photographs_equal_the_reference(imagenet):
    data_dir = str(Path(imagenet.data_dir).parents[1])
    data = pipeline.open_data(settings(data_dir=data_dir), seed=0)
    preprocessing = CropPreprocessing(data.preprocessing, Crops.parse("144"))
    dataset, num_steps = data.validation_batches(STRATEGY, 3, preprocessing)
    num_examples = imagenet.info.splits["validation"].num_examples
    assert num_steps == -(-num_examples // 3)
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = imagenet.as_dataset(split="validation", shuffle_files=False, decoders=decoders)
    squares, labels, weights = next(iter(dataset))
    crops = preprocessing.cut(squares).numpy().reshape(3, 144, 224, 224, 3)
    for image, label, example in zip(crops, labels.numpy(), examples, strict=False):
        whole = tf.io.decode_jpeg(example["image"], channels=3, dct_method="INTEGER_ACCURATE")
        np.testing.assert_allclose(image, googlenet_crops(whole) / 127.5 - 1, atol=1e-5)
        assert label == example["label"]
    assert sum(float(tf.reduce_sum(w)) for *_, w in dataset.take(num_steps)) == num_examples


def test_missing_or_damaged_archives_are_named(tmp_path):
    with pytest.raises(
        UsageError, match="no ILSVRC2012_img_train.tar and no .*val.tar in"
    ) as error:
        prepare_imagenet(tmp_path, tmp_path / "data")
    assert "\n" not in str(error.value) and "image-net.org" in str(error.value)
    for name in ARCHIVES:
        (tmp_path / name).write_bytes(b"not a tar archive")
    with pytest.raises(UsageError, match="cannot be prepared in .*archives are complete") as error:
        prepare_imagenet(tmp_path, tmp_path / "data")
    assert "\n" not in str(error.value)


def test_the_command_names_missing_archives_on_one_line(tmp_path):
    done = launch("prepare", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path}")
    assert_fails_on_one_line(done, 2, "ILSVRC2012_img_train.tar", "image-net.org")
