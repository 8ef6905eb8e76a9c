"""The order of examples for every kind of source: complete, without repeats, resumable anywhere."""

import concurrent.futures
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from bn_keras.data import pipeline, shard_batches, sources, tfds_sets
from bn_keras.data.array_batches import ArrayBatches
from bn_keras.data.random_numbers import RandomNumbers, Stream
from bn_keras.data.shard_batches import ShardBatches
from bn_keras.data.splits import FINGERPRINTS, spread_over_classes
from bn_keras.errors import UsageError
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training.config import default_config
from bn_keras.training.config_files import load_config

NUM_EXAMPLES = 47
NUM_VALIDATION_EXAMPLES = 21
NUM_SHARDS = 7
GLOBAL_BATCH_SIZE = 8


class TinyThumbnails(tfds.core.GeneratorBasedBuilder):
    """Images of one size, each with its own class, so that a label identifies its example."""

    VERSION = tfds.core.Version("1.0.0")
    ENCODING, SHAPE, LABEL = "png", (12, 10, 3), "label"

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.SHAPE, encoding_format=self.ENCODING),
            "label": tfds.features.ClassLabel(num_classes=NUM_EXAMPLES),
            "score": tfds.features.Scalar(tf.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", self.LABEL),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(NUM_EXAMPLES),
            "validation": self._generate_examples(NUM_VALIDATION_EXAMPLES),
        }

    def _generate_examples(self, count):
        for label in range(count):
            random = np.random.default_rng(label)
            height, width = self.SHAPE[:2]
            shape = (height or 20 + label % 7, width or 30 - label % 5, 3)
            image = random.integers(0, 256, shape, np.uint8)
            yield label, {"image": image, "label": label, "score": label / 2}


class TinyPhotographs(TinyThumbnails):
    """JPEG images of different sizes."""

    ENCODING, SHAPE = "jpeg", (None, None, 3)


class TinyScores(TinyThumbnails):
    """Images labelled with a number instead of a class."""

    LABEL = "score"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of prepared TFDS sets."""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for builder in (TinyThumbnails, TinyPhotographs, TinyScores):
        settings = tfds.download.DownloadConfig(num_shards=NUM_SHARDS)
        builder(data_dir=folder).download_and_prepare(download_config=settings)
    return str(folder)


def write_set(folder, images, labels, num_bytes=1000, name="odd", **feature):
    """Writes a TFDS set of two classes without its code, as a converter would.

    Args:
      folder: folder of prepared sets.
      images: images of the training split; the first half is the validation split, too.
      labels: labels of each split.
      num_bytes: what the metadata states as the size of each split.
      name: name of the set.
      **feature: arguments of the image feature.
    """
    root = f"{folder}/{name}/1.0.0"
    os.makedirs(root, exist_ok=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(**feature),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
    )
    splits = []
    for split, split_labels in labels.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=root, dataset_name=name, split=split, filetype_suffix="tfrecord"
        )
        path = str(template.sharded_filepath(shard_index=0, num_shards=1))
        with tf.io.TFRecordWriter(path) as writer:
            for image, label in zip(images, split_labels, strict=False):
                example = features.encode_example({"image": image, "label": label})
                writer.write(features.serialize_example(example))
        lengths = [len(split_labels)]
        splits.append(tfds.core.SplitInfo(split, lengths, num_bytes, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=root, features=features, split_infos=splits, supervised_keys=("image", "label")
    )


def random_images(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


LABELS = {"train": [0, 1] * 8, "validation": [1, 0] * 4}


def settings(**changes):
    config = default_config().data.copy_and_resolve_references()
    config.update({"image_size": 8, "shuffle": "examples", **changes})
    return config


@pytest.fixture(params=["arrays", "examples", "shards"])
def open_tiny(request, data_dir):
    """Opens the tiny set as each kind of source, with all random preprocessing."""
    name = "tiny_thumbnails" if request.param == "arrays" else "tiny_photographs"
    shuffle = "shards" if request.param == "shards" else "examples"
    kind = ArrayBatches if request.param == "arrays" else ShardBatches

    def open_data(seed=3, **changes):
        config = settings(name=name, data_dir=data_dir, shuffle=shuffle, **changes)
        data = pipeline.open_data(config, seed=seed)
        assert isinstance(data._train, kind)
        return data

    return open_data


class Pipelines:
    """A stand-in for a strategy on several hosts, with the datasets of all hosts in one process."""

    def __init__(self, num_pipelines, num_replicas):
        self.num_replicas_in_sync = num_replicas
        self._contexts = [
            tf.distribute.InputContext(num_pipelines, index, num_replicas)
            for index in range(num_pipelines)
        ]

    def distribute_datasets_from_function(self, dataset_fn):
        return [dataset_fn(context) for context in self._contexts]

    def replica_batches(self, datasets, steps):
        """Returns the batches of all replicas in order, step by step."""
        local = self.num_replicas_in_sync // len(self._contexts)
        iterators = [iter(dataset) for dataset in datasets]
        return [
            [[part.numpy() for part in next(it)] for it in iterators for _ in range(local)]
            for _ in range(steps)
        ]

    def global_batches(self, datasets, steps):
        """Returns the concatenated batches of all replicas, step by step."""
        return [
            [np.concatenate(parts) for parts in zip(*replicas, strict=True)]
            for replicas in self.replica_batches(datasets, steps)
        ]


ONE = Pipelines(1, 1)


def train_batches(data, steps, start_step=0, global_batch_size=GLOBAL_BATCH_SIZE, strategy=ONE):
    """Returns the global batches [images, labels] of `steps` steps from `start_step` on."""
    datasets = data.train_batches(strategy, global_batch_size, start_step)
    return strategy.global_batches(datasets, steps)


def labels_of(batches):
    return np.concatenate([labels for _, labels, *_ in batches])


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_data_describes_its_source(open_tiny):
    data = open_tiny()
    assert data.num_classes == NUM_EXAMPLES and data.input_shape == (8, 8, 3)
    assert data.class_names == tuple(str(label) for label in range(NUM_EXAMPLES))
    assert data.num_train_examples == NUM_EXAMPLES
    assert data.num_validation_examples == NUM_VALIDATION_EXAMPLES


def test_each_epoch_is_a_different_permutation(open_tiny):
    steps = NUM_EXAMPLES  # Eight epochs, in batches of 8.
    epochs = labels_of(train_batches(open_tiny(), steps)).reshape(GLOBAL_BATCH_SIZE, NUM_EXAMPLES)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(NUM_EXAMPLES))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other = labels_of(train_batches(open_tiny(seed=4), steps)).reshape(epochs.shape)
    assert (other != epochs).any(axis=1).all()


def test_shuffling_shards_keeps_the_stored_order_in_memory(data_dir):
    config = settings(name="tiny_thumbnails", data_dir=data_dir, shuffle="shards")
    data = pipeline.open_data(config, seed=3)
    assert isinstance(data._train, ArrayBatches)
    steps = NUM_EXAMPLES  # Eight epochs, in batches of 8.
    labels = labels_of(train_batches(data, steps))
    stored = data._source.train.labels
    np.testing.assert_array_equal(labels, np.tile(stored, GLOBAL_BATCH_SIZE))
    start = NUM_EXAMPLES // GLOBAL_BATCH_SIZE + 1
    later = labels_of(train_batches(data, 5, start))
    np.testing.assert_array_equal(later, labels[start * GLOBAL_BATCH_SIZE :][: later.size])
    # Random crops still differ between epochs.
    images = np.concatenate([images for images, *_ in train_batches(data, steps)])
    assert (images[:NUM_EXAMPLES] != images[NUM_EXAMPLES : 2 * NUM_EXAMPLES]).any()


def permuted_orders(count, seeds, epochs):
    """Returns the order of `count` examples, a row for each seed and epoch."""
    indices = tf.tile(tf.range(count, dtype=tf.int64), [len(epochs)])
    counters = tf.repeat(tf.constant(epochs, tf.int64), count)
    rows = [
        RandomNumbers(seed).permute(Stream.EXAMPLES, indices, count, counters) for seed in seeds
    ]
    return np.concatenate([row.numpy().reshape(-1, count) for row in rows])


def test_permutations_of_different_seeds_and_epochs_are_independent():
    """TensorFlow's index_shuffle alone repeats after 256 seeds, and neighbours correlate."""
    many = permuted_orders(47, seeds=[0], epochs=range(2000))
    assert len({tuple(order) for order in many}) == 2000
    # Each example is equally often at each position: chi-square over its degrees of freedom is
    # 1 +- 0.2 for one position, and its mean over 47 positions is close to 1.
    counts = np.stack([np.bincount(position, minlength=47) for position in many.T])
    np.testing.assert_allclose(((counts - 2000 / 47) ** 2).mean() * 47 / 2000, 1, atol=0.15)
    for large in (
        permuted_orders(60_000, [0], range(3)),
        permuted_orders(60_000, range(3), [0]),
    ):
        np.testing.assert_allclose(np.corrcoef(large), np.eye(3), atol=0.02)
        # By chance, one pair of stored neighbours stays together per epoch.
        assert ((np.diff(large, axis=1) == 1).sum(axis=1) < 10).all()


def test_an_example_is_augmented_differently_in_each_epoch(open_tiny):
    images = {}
    for batch_images, labels in train_batches(
        open_tiny(), 2 * NUM_EXAMPLES // GLOBAL_BATCH_SIZE + 2
    ):
        for image, label in zip(batch_images, labels, strict=True):
            images.setdefault(label, []).append(image)
    twice = [seen for seen in images.values() if len(seen) > 1]
    assert len(twice) == NUM_EXAMPLES
    assert all(np.abs(seen[0] - seen[1]).max() > 0.01 for seen in twice)


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(open_tiny):
    uninterrupted = train_batches(open_tiny(), 44)
    # A new Data, as in another process. Starts within the first epoch, around its end (47 examples,
    # step 5.9) and far beyond; in memory a chunk has 16 steps.
    data = open_tiny()
    for start_step in (1, 5, 6, 16, 39):
        assert_same(train_batches(data, 5, start_step), uninterrupted[start_step : start_step + 5])


@pytest.mark.parametrize(("num_pipelines", "num_replicas"), [(1, 2), (2, 4)])
def test_replicas_together_see_the_batches_of_one_replica(open_tiny, num_pipelines, num_replicas):
    data, strategy = open_tiny(), Pipelines(num_pipelines, num_replicas)
    rows = GLOBAL_BATCH_SIZE // num_replicas
    datasets = data.train_batches(strategy, GLOBAL_BATCH_SIZE, 3)
    for replicas, (images, labels) in zip(
        strategy.replica_batches(datasets, 14), train_batches(data, 14, start_step=3), strict=True
    ):
        for r, (own_images, own_labels) in enumerate(replicas):
            np.testing.assert_array_equal(own_images, images[r * rows : (r + 1) * rows])
            np.testing.assert_array_equal(own_labels, labels[r * rows : (r + 1) * rows])


def test_a_mirrored_strategy_sees_the_same_batches(open_tiny, two_replicas):
    data = open_tiny()
    distributed = iter(data.train_batches(two_replicas, GLOBAL_BATCH_SIZE, start_step=4))
    for expected in train_batches(data, 4, start_step=4):
        batch = next(distributed)
        got = [np.concatenate([value.numpy() for value in part.values]) for part in batch]
        assert_same([got], [expected])

    dataset, num_steps = data.validation_batches(two_replicas, GLOBAL_BATCH_SIZE)
    distributed, seen = iter(dataset), []
    for _ in range(num_steps):
        _, labels, weights = next(distributed)
        for own_labels, own_weights in zip(labels.values, weights.values, strict=True):
            seen += list(own_labels.numpy()[own_weights.numpy() == 1])
    assert sorted(seen) == list(range(NUM_VALIDATION_EXAMPLES))


def test_shapes_are_static_and_training_is_endless(open_tiny):
    data, half = open_tiny(), GLOBAL_BATCH_SIZE // 2
    (dataset,) = data.train_batches(Pipelines(1, 2), GLOBAL_BATCH_SIZE)
    images, labels = dataset.element_spec
    assert images == tf.TensorSpec([half, 8, 8, 3]) and labels == tf.TensorSpec([half], tf.int32)
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    (dataset,), _ = data.validation_batches(Pipelines(1, 2), GLOBAL_BATCH_SIZE)
    assert dataset.element_spec == (images, labels, tf.TensorSpec([half]))


@pytest.mark.parametrize(
    ("global_batch_size", "strategy"),
    [(7, ONE), (4, Pipelines(2, 2)), (16, Pipelines(2, 4))],
)
def test_validation_counts_every_example_once(open_tiny, global_batch_size, strategy):
    data = open_tiny()
    datasets, num_steps = data.validation_batches(strategy, global_batch_size)
    assert num_steps == math.ceil(NUM_VALIDATION_EXAMPLES / global_batch_size)
    batches = strategy.global_batches(datasets, 2 * num_steps)
    for one_pass in (batches[:num_steps], batches[num_steps:]):
        labels, weights = (np.concatenate([batch[i] for batch in one_pass]) for i in (1, 2))
        assert set(weights) <= {0.0, 1.0}
        np.testing.assert_array_equal(
            np.sort(labels[weights == 1]), np.arange(NUM_VALIDATION_EXAMPLES)
        )
    assert_same(batches[num_steps:], batches[:num_steps])


def test_images_from_files_equal_images_in_memory(data_dir, monkeypatch):
    config = settings(name="tiny_thumbnails", data_dir=data_dir, image_size=0, crop="none")
    in_memory = pipeline.open_data(config, seed=0)
    monkeypatch.setattr(tfds_sets, "MEMORY_LIMIT_BYTES", 0)
    streamed = pipeline.open_data(config, seed=0)
    assert isinstance(streamed._train, ShardBatches)
    assert streamed.input_shape == in_memory.input_shape == (12, 10, 3)
    both = []
    for data in (in_memory, streamed):
        datasets, num_steps = data.validation_batches(ONE, 7)
        assert num_steps == 3
        images, labels, _ = zip(*ONE.global_batches(datasets, num_steps), strict=True)
        order = np.argsort(np.concatenate(labels))
        both.append(np.concatenate(images)[order])
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)
    expected = [
        np.random.default_rng(label).integers(0, 256, (12, 10, 3), np.uint8)
        for label in range(NUM_VALIDATION_EXAMPLES)
    ]
    np.testing.assert_allclose(both[1], np.stack(expected) / 127.5 - 1, atol=1e-6)


def shards_in_order(data_dir, split):
    """Returns the labels of each shard in stored order."""
    config = settings(name="tiny_photographs", data_dir=data_dir)
    source = sources.open_source(config.name, data_dir, split, "validation", 0)
    return [
        [
            int(source.train.parse(record)[1])
            for record in source.train.read(tf.constant([shard], tf.int64))
        ]
        for shard in range(len(source.train.lengths))
    ]


def split_at_whole_shards(shards, epoch):
    """Splits the labels of an epoch wherever those since the last split form whole shards.

    Returns:
      The numbers of the shards and the labels of each piece.
    """
    shard_of = {label: number for number, shard in enumerate(shards) for label in shard}
    pieces, numbers, labels = [], set(), []
    for label in epoch:
        numbers.add(shard_of[label])
        labels.append(label)
        if len(labels) == sum(len(shards[number]) for number in numbers):
            pieces.append((tuple(sorted(numbers)), labels))
            numbers, labels = set(), []
    assert not labels
    return pieces


def test_shuffling_shards_keeps_the_order_within_each_shard(data_dir):
    config = settings(name="tiny_photographs", data_dir=data_dir, shuffle="shards")
    shards = shards_in_order(data_dir, "train")
    assert len(shards) == NUM_SHARDS
    epochs = labels_of(train_batches(pipeline.open_data(config, seed=0), NUM_EXAMPLES)).reshape(
        8, -1
    )
    orders = set()
    for epoch in epochs:
        pieces = split_at_whole_shards(shards, epoch)
        assert [labels for _, labels in pieces] == [shards[number] for (number,), _ in pieces]
        orders.add(tuple(numbers for numbers, _ in pieces))
    assert len(orders) > 1


@pytest.mark.parametrize("group_shards", [1, 2])
def test_shuffling_examples_permutes_within_groups_of_shards(data_dir, monkeypatch, group_shards):
    config = settings(name="tiny_photographs", data_dir=data_dir, shuffle="examples")
    shards = shards_in_order(data_dir, "train")
    info = TinyPhotographs(data_dir=data_dir).info
    shard_bytes = info.splits["train"].num_bytes / NUM_SHARDS
    monkeypatch.setattr(shard_batches, "GROUP_BYTES", int((group_shards + 0.5) * shard_bytes))
    epochs = labels_of(train_batches(pipeline.open_data(config, seed=0), NUM_EXAMPLES)).reshape(
        8, -1
    )
    orders = set()
    for epoch in epochs:
        pieces = split_at_whole_shards(shards, epoch)
        sizes = [len(numbers) for numbers, _ in pieces]
        assert sizes == ([1] * NUM_SHARDS if group_shards == 1 else [2, 2, 2, 1])
        for numbers, labels in pieces:
            assert list(labels) != [label for number in numbers for label in shards[number]]
        orders.add(tuple(numbers for numbers, _ in pieces))
    assert len(orders) > 1


def test_a_resumed_run_reads_only_the_shards_that_follow(tmp_path, monkeypatch):
    """The other files are truncated and could not be read."""
    tfds.disable_progress_bar()
    download = tfds.download.DownloadConfig(num_shards=NUM_SHARDS)
    TinyPhotographs(data_dir=tmp_path).download_and_prepare(download_config=download)
    monkeypatch.setattr(shard_batches, "GROUP_BYTES", 0)
    data = pipeline.open_data(settings(name="tiny_photographs", data_dir=str(tmp_path)), seed=0)
    whole = train_batches(data, 22, global_batch_size=2)
    shards = shards_in_order(str(tmp_path), "train")
    last = next(n for n, shard in enumerate(shards) if whole[-1][1][-1] in shard)
    paths = data._train._shards.paths
    for path in (path for number, path in enumerate(paths) if number != last):
        records = list(tf.data.TFRecordDataset(path).as_numpy_iterator())
        with tf.io.TFRecordWriter(path) as writer:
            writer.write(records[0])
    assert_same(train_batches(data, 1, start_step=21, global_batch_size=2), whole[-1:])
    with pytest.raises(tf.errors.OpError, match="fewer readable records.*tiny_photographs-train"):
        train_batches(data, 1)


def test_splits_may_be_slices(data_dir, monkeypatch):
    config = settings(
        name="tiny_thumbnails",
        data_dir=data_dir,
        train_split="train[10:40]",
        validation_split="train[:10]+train[40:]",
    )
    for limit in (tfds_sets.MEMORY_LIMIT_BYTES, 0):
        monkeypatch.setattr(tfds_sets, "MEMORY_LIMIT_BYTES", limit)
        data = pipeline.open_data(config, seed=0)
        assert (data.num_train_examples, data.num_validation_examples) == (30, 17)
        trained = set(labels_of(train_batches(data, 5, global_batch_size=6)))
        datasets, num_steps = data.validation_batches(ONE, 17)
        validated = set(labels_of(ONE.global_batches(datasets, num_steps)))
        assert len(trained) == 30 and len(validated) == 17 and not trained & validated


def test_digits_are_those_of_scikit_learn():
    plain = {"image_size": 0, "crop": "none", "mirror": False, "distortion": 0.0}
    data = pipeline.open_data(settings(name="digits", **plain), seed=0)
    assert data.input_shape == (8, 8, 1) and data.num_classes == 10
    assert (data.num_train_examples, data.num_validation_examples) == (1442, 355)

    from sklearn.datasets import load_digits

    digits = load_digits()
    datasets, num_steps = data.validation_batches(ONE, 355)
    [(images, labels, weights)] = ONE.global_batches(datasets, num_steps)
    assert weights.all()
    held_out = np.concatenate([np.flatnonzero(digits.target == d)[4::5] for d in range(10)])
    held_out = np.sort(held_out)
    np.testing.assert_array_equal(labels, digits.target[held_out])
    # Exact in float32: 17 grey levels, white is 16.
    np.testing.assert_array_equal(images[..., 0], digits.images[held_out] / 8 - 1)
    assert np.bincount(labels).min() >= 34 and np.bincount(labels).max() <= 36

    [(trained, _)] = train_batches(data, 1, global_batch_size=1442)
    assert len({image.tobytes() for image in [*trained, *images]}) == 1797

    binary = pipeline.open_data(settings(name="digits", **plain, binary=True), seed=0)
    [(images, _)] = train_batches(binary, 1)
    assert set(images.ravel()) == {0.0, 1.0}


def test_synthetic_images_have_the_size_of_imagenet_and_learnable_labels():
    data = pipeline.open_data(settings(name="synthetic", image_size=20), seed=0)
    assert data.input_shape == (20, 20, 3) and data.num_classes == 1000
    assert data.num_train_examples == 1_281_167
    batches = train_batches(data, 4, global_batch_size=64)
    labels = labels_of(batches)
    assert labels.min() >= 0 and labels.max() < 1000 and len(set(labels)) > 32
    datasets, num_steps = data.validation_batches(ONE, 300)
    validation = ONE.global_batches(datasets, num_steps)
    assert sum(weights.sum() for *_, weights in validation) == data.num_validation_examples
    # Images with the same label are equal, so that the labels can be learned.
    images, seen, _ = validation[0]
    for label in set(seen):
        same = images[seen == label]
        np.testing.assert_array_equal(same, np.broadcast_to(same[:1], same.shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cifar11"}, "unknown data set 'cifar11': did you mean .*'cifar10'.*'digits'"),
        ({"name": "qqqqqqqqq"}, "unknown data set 'qqqqqqqqq': expected 'digits'"),
        ({"train_split": "trian"}, "no split 'trian': it has 'train', 'validation'"),
        (
            {"validation_split": "test"},
            "no split 'test': it has .*, 'validation'; set data.train_split",
        ),
        ({"train_split": "train[:"}, r"no split 'train\[:'"),
        ({"name": "digits", "train_split": "all"}, "'digits' has no split 'all': it has 'train'"),
        ({"crop": "center"}, "unknown data.crop 'center': expected one of inception, shift, none"),
        ({"shuffle": "all"}, "unknown data.shuffle 'all': expected one of examples, shards"),
        ({"name": "tiny_scores"}, "'tiny_scores' has no image with a class label.*image, label"),
        ({"image_size": 0}, "those of 'tiny_photographs' differ in size: set the side"),
        ({"image_size": -1}, "data.image_size=-1 is invalid"),
        (
            {"name": "synthetic", "image_size": 0},
            "'synthetic', whose images have no size",
        ),
        ({"distortion": -0.5}, r"data.distortion=-0.5 is invalid: expected a number in \[0, 1\]"),
        ({"max_bad_examples": -1}, "data.max_bad_examples=-1 is invalid: expected 0 or more"),
        ({"data_dir": "no/such/folder"}, "data.data_dir='no/such/folder' is not a folder"),
    ],
)
def test_invalid_settings_are_reported_on_one_line(data_dir, changes, message):
    config = settings(name="tiny_photographs", data_dir=data_dir)
    config.update(changes)
    with pytest.raises(UsageError, match=message) as caught:
        pipeline.open_data(config, seed=0)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_failed_download_suggests_a_config_without_one(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    config = settings(name="cifar100", data_dir=str(tmp_path))
    with pytest.raises(UsageError) as caught:
        pipeline.open_data(config, seed=0)
    message = str(caught.value)
    assert "\n" not in message and "'cifar100'" in message and str(tmp_path) in message
    assert "no connection to www.cs.toronto.edu" in message
    assert not list(tmp_path.iterdir())
    suggested = load_config(re.search(r"--config=(\w+)$", message)[1])
    assert suggested.data.name in sources.NOT_IN_TFDS
    assert pipeline.open_data(suggested.data, seed=0).num_train_examples == 1442


class SlowThumbnails(TinyThumbnails):
    """A set that two processes prepare at the same time: both read its examples before any ends."""

    BARRIER = threading.Barrier(2, timeout=60)

    def _generate_examples(self, count):
        yield from super()._generate_examples(count)
        if count == NUM_VALIDATION_EXAMPLES:
            self.BARRIER.wait()


def test_a_set_is_prepared_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_sets, "_read_arrays", None)
    sources.prepare("tiny_photographs", str(tmp_path))
    assert TinyPhotographs(data_dir=tmp_path).is_prepared()
    for name in ("digits", "synthetic", "folder"):
        sources.prepare(name, "")


def test_a_set_may_be_prepared_by_two_processes_at_the_same_time(tmp_path):
    splits = ("train", "validation")
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        sources = list(
            threads.map(
                lambda _: tfds_sets.open_tfds("slow_thumbnails", str(tmp_path), *splits), range(2)
            )
        )
    assert [source.train.num_examples for source in sources] == [NUM_EXAMPLES] * 2


def test_the_error_for_missing_imagenet_says_how_to_prepare_it(tmp_path):
    config = settings(name="imagenet2012", data_dir=str(tmp_path))
    with pytest.raises(UsageError, match="imagenet2012.*bn-keras prepare --manual_dir") as caught:
        pipeline.open_data(config, seed=0)
    assert "\n" not in str(caught.value)


def test_a_sample_spreads_over_the_classes():
    labels = np.array([2, 0, 0, 0, 2, 1, 0, 4])
    for count, expected in ((1, [1]), (2, [1, 0]), (4, [1, 5, 0, 7]), (6, [1, 2, 5, 0, 4, 7])):
        assert spread_over_classes(labels, count).tolist() == expected
    assert spread_over_classes(labels, 99).tolist() == [1, 2, 3, 6, 5, 0, 4, 7]
    many = spread_over_classes(np.repeat(np.arange(1000), 3), 8)
    assert many.tolist() == [375 * i for i in range(8)]


def test_the_validation_sample_is_spread_over_the_split(open_tiny):
    """In memory, classes are chosen; in files of records, positions. Each class has one example."""
    data, total = open_tiny(), NUM_VALIDATION_EXAMPLES
    order = np.arange(total)
    if isinstance(data._train, ShardBatches):
        order = labels_of(ONE.global_batches(data.validation_batches(ONE, total)[0], 1))
    for count in (1, 4, total):
        sample = ONE.global_batches(data.validation_sample(ONE, count), 2)
        assert labels_of(sample[:1]).tolist() == [order[i * total // count] for i in range(count)]
        assert_same(sample[:1], sample[1:])
    # A sample that is larger than the split is padded.
    [(*_, weights)] = ONE.global_batches(data.validation_sample(ONE, total + 3), 1)
    assert weights.tolist() == [1] * total + [0] * 3


@pytest.mark.parametrize("global_batch_size", [9, 0, -2])
def test_replicas_must_divide_the_global_batch(two_replicas, global_batch_size):
    data = pipeline.open_data(settings(name="digits"), seed=0)
    for open_batches in (data.train_batches, data.validation_batches):
        with pytest.raises(UsageError, match=f"batch of {global_batch_size} .* 2 replicas"):
            open_batches(two_replicas, global_batch_size)


@pytest.mark.job
def test_dropping_an_iterator_that_reads_ahead_does_not_crash():
    """Runs in a separate process, which a crash of TensorFlow's multi-device iterator would end."""
    program = """
import tensorflow as tf
from bn_keras.data import pipeline
from bn_keras.distribute import make_strategy
from configs import bn_x5
config = bn_x5.get_config().data.copy_and_resolve_references()
config.name = "synthetic"
strategy = make_strategy("mirrored", 1)
data = pipeline.open_data(config, seed=0)
for step in range(12):
    next(iter(data.train_batches(strategy, 32, step)))
"""
    root = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("name", ["tiny_thumbnails", "tiny_photographs"])
def test_damaged_files_of_records_are_reported_on_one_line(data_dir, tmp_path, name, damage):
    """Small images are read into memory when the set is opened, photographs batch by batch."""
    copied = shutil.copytree(data_dir, tmp_path / "tfds")
    path = sorted((copied / name).rglob("*train*-of-*"))[0]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match=": prepare the data set again") as caught:
        data = pipeline.open_data(settings(name=name, data_dir=str(copied)), seed=0)
        with data.reporting_errors():
            train_batches(data, NUM_EXAMPLES // GLOBAL_BATCH_SIZE)
    assert "\n" not in str(caught.value)


def test_a_damaged_description_of_a_set_is_reported_on_one_line(data_dir, tmp_path):
    copied = shutil.copytree(data_dir, tmp_path / "tfds")
    for info in copied.rglob("dataset_info.json"):
        info.write_text("{")
    with pytest.raises(UsageError, match="'tiny_thumbnails' .* cannot be opened .* prepare it"):
        pipeline.open_data(settings(name="tiny_thumbnails", data_dir=str(copied)), seed=0)


@pytest.mark.parametrize(
    ("dtype", "shape", "found"),
    [
        (np.uint16, (8, 8, 1), "uint16 images with 1 channel:"),
        (np.uint16, (None, None, 3), "uint16 images with 3 channels:"),
        (np.uint8, (8, 8, 4), "uint8 images with 4 channels:"),
        (np.uint8, (None, None, 4), "uint8 images with 4 channels:"),
    ],
)
def test_images_that_would_be_misread_are_rejected(tmp_path, dtype, shape, found):
    images = random_images(16, 8, 8, shape[-1], dtype=dtype)
    write_set(tmp_path, images, LABELS, dtype=dtype, shape=shape)
    config = settings(name="odd", data_dir=str(tmp_path))
    for open_set in (lambda: pipeline.open_data(config, seed=0), lambda: describe(config)):
        with pytest.raises(UsageError, match=f"'odd' has {found} expected uint8.*1 or 3") as caught:
            open_set()
        assert "\n" not in str(caught.value)


def describe(config):
    names = ("name", "data_dir", "train_split", "validation_split", "image_size")
    return sources.describe(*(config[name] for name in names))


@pytest.mark.parametrize("shape", [(8, 8, 1), (None, None, 1)], ids=["arrays", "shards"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_labels_is_rejected_at_the_start(tmp_path, shape, split):
    """TFDS stores hidden labels as -1."""
    hidden = LABELS | {split: [-1] * len(LABELS[split])}
    write_set(tmp_path, random_images(16, 8, 8, 1), hidden, shape=shape)
    config = settings(name="odd", data_dir=str(tmp_path))
    with pytest.raises(UsageError, match=f"split '{split}' of data set 'odd' has no labels") as e:
        pipeline.open_data(config, seed=0)
    assert "\n" not in str(e.value)


def test_a_few_invalid_labels_in_a_small_set_count_as_unreadable_examples(tmp_path):
    labels = LABELS | {"train": [0, -1, *LABELS["train"][2:]]}
    write_set(tmp_path, random_images(16, 8, 8, 1), labels, shape=(8, 8, 1))
    config = settings(name="odd", data_dir=str(tmp_path), max_bad_examples=1)
    data = pipeline.open_data(config, seed=0)
    assert labels_of(train_batches(data, 2)).min() == 0
    config.max_bad_examples = 0
    data = pipeline.open_data(config, seed=0)
    expected = "unreadable example record 1 of .*max_bad_examples=0 is exceeded"
    with pytest.raises(UsageError, match=expected), data.reporting_errors():
        train_batches(data, 2)


@pytest.mark.parametrize("num_bytes", [0, 1], ids=["unknown", "wrong"])
def test_a_set_may_not_state_its_size(tmp_path, num_bytes):
    images = random_images(16, 8, 8, 3)
    write_set(tmp_path, images, LABELS, num_bytes=num_bytes, shape=(None, None, 3))
    data = pipeline.open_data(settings(name="odd", data_dir=str(tmp_path)), seed=0)
    assert labels_of(train_batches(data, 2)).tolist().count(0) == 8
    shards = data._source.train
    assert shards.example_bytes == (1 if num_bytes else os.path.getsize(shards.paths[0]) // 16)


@pytest.mark.parametrize("shape", [(8, 8, 1), (None, None, 1)], ids=["arrays", "shards"])
def test_other_examples_under_the_same_name_have_another_fingerprint(tmp_path, shape):
    def fingerprint(folder, seed=0, labels=LABELS, num_bytes=1000):
        images = random_images(16, 8, 8, 1, seed=seed)
        write_set(tmp_path / folder, images, labels, num_bytes, shape=shape)
        splits = ("train", "validation")
        return tfds_sets.open_tfds("odd", str(tmp_path / folder), *splits).fingerprint

    first = fingerprint("one")
    assert first and first == fingerprint("another")
    assert first.keys() <= FINGERPRINTS.keys()
    fewer = LABELS | {"validation": [1, 0]}
    changes = {"labels": fewer}, {"seed": 1, "num_bytes": 1001}
    for number, change in enumerate(changes):
        other = fingerprint(str(number), **change)
        assert other.keys() == first.keys() and other != first


def test_a_run_does_not_resume_on_other_images_of_the_same_set(tmp_path):
    def open_tfds(seed):
        write_set(tmp_path, random_images(16, 8, 8, 1, seed=seed), LABELS, shape=(8, 8, 1))
        return pipeline.open_data(settings(name="odd", data_dir=str(tmp_path)), seed=0)

    run, config = Workdir(tmp_path / "run"), default_config()
    interface = Interface((8, 8, 1), ("cat", "dog"), 16)

    def opened(seed):
        return interface._replace(fingerprint=open_tfds(seed).fingerprint)

    # A run of an older version has no fingerprint.
    run.create(config, interface)
    run.create(config, opened(0))
    run.check_data(opened(0))
    with pytest.raises(UsageError, match="was started on data with other examples"):
        run.check_data(opened(1))
