"""Classes of unequal size: balanced sampling and class weights, as functions of seed and step."""

import math

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from small import killed_after_a_loop, small_mlp
from test_data import ONE, Pipelines, assert_same, train_batches
from test_data_folder import encoded, write
from test_trainer import IMAGES, LABELS, REPLICAS, batches, close, small_trainer
from test_trainer import weights as weights_of

from bn_keras.data import pipeline, shard_batches
from bn_keras.data.balance import DRAWS_PER_BLOCK, BalancedOrder, class_weights
from bn_keras.data.random_numbers import RandomNumbers, Stream
from bn_keras.data.splits import Arrays, Source
from bn_keras.errors import UsageError
from bn_keras.training.config import default_config
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.pitfalls import describe_balance, find_class_pitfalls

# Class 1 has no examples; the grey level of an image identifies it.
SIZES = (9, 0, 2, 4)
LABELS_OF_EXAMPLES = np.repeat(range(len(SIZES)), SIZES)
PRESENT = [label for label, size in enumerate(SIZES) if size]
BLOCK = DRAWS_PER_BLOCK * len(PRESENT)
NUM_SHARDS = 4


def grey_level(example):
    return 10 * example


class TinyUnequal(tfds.core.GeneratorBasedBuilder):
    """Images of different sizes in the classes of SIZES."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=len(SIZES))
        features = {"image": tfds.features.Image(encoding_format="png"), "label": label}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for example, label in enumerate(LABELS_OF_EXAMPLES):
            image = np.full((8 + example, 9, 3), grey_level(example), np.uint8)
            yield example, {"image": image, "label": label}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the TFDS set, and one with a folder of images of the present classes."""
    folder = tmp_path_factory.mktemp("unequal")
    tfds.disable_progress_bar()
    download = tfds.download.DownloadConfig(num_shards=NUM_SHARDS)
    TinyUnequal(data_dir=folder).download_and_prepare(download_config=download)
    for example, label in enumerate(LABELS_OF_EXAMPLES):
        content = encoded(np.full((8, 9, 3), grey_level(example), np.uint8))
        for split in ("train", "validation"):
            write(folder / "images" / split / f"class {label}" / f"{example:02}.png", content)
    return folder


def settings(**changes):
    config = default_config().data.copy_and_resolve_references()
    plain = {"crop": "none", "mirror": False, "distortion": 0.0, "shuffle": "examples"}
    config.update({"image_size": 8, "balance": "sampling", **plain, **changes})
    return config


def make_arrays(num_examples=0):
    levels = np.arange(len(LABELS_OF_EXAMPLES)) * 10
    images = np.broadcast_to(levels[:, None, None, None], [len(levels), 8, 8, 3]).astype(np.uint8)
    split = Arrays(images, LABELS_OF_EXAMPLES.astype(np.int32), num_examples=num_examples)
    return Source(tuple(map(str, range(len(SIZES)))), split, split)


@pytest.fixture(params=["arrays", "folder", "records"])
def open_unequal(request, prepared):
    def open_data(**changes):
        source = make_arrays() if request.param == "arrays" else None
        if request.param == "folder":
            changes |= {"name": "folder", "data_dir": str(prepared / "images")}
        if request.param == "records":
            changes |= {"name": "tiny_unequal", "data_dir": str(prepared)}
        return pipeline.open_data(settings(**changes), seed=5, source=source)

    return open_data


def examples_of(batches):
    """Returns the numbers of the examples in batches, by their grey levels."""
    images = np.concatenate([images for images, *_ in batches])
    return np.round((images[:, 4, 4, 0] + 1) * 12.75).astype(int)


def test_classes_and_the_examples_of_each_class_are_drawn_equally_often(open_unequal):
    # A number of blocks with whole passes through each class.
    blocks = math.lcm(*(SIZES[label] for label in PRESENT))
    steps = blocks * BLOCK // 12
    drawn = examples_of(train_batches(open_unequal(), steps, global_batch_size=12))
    labels = LABELS_OF_EXAMPLES[drawn]
    for block in labels.reshape(-1, BLOCK):
        counts = np.bincount(block, minlength=len(SIZES))
        np.testing.assert_array_equal(counts[PRESENT], DRAWS_PER_BLOCK)
    for label in PRESENT:
        passes = drawn[labels == label].reshape(-1, DRAWS_PER_BLOCK * blocks)
        counts = np.bincount(passes[0] - np.searchsorted(LABELS_OF_EXAMPLES, label))
        assert set(counts) == {DRAWS_PER_BLOCK * blocks // SIZES[label]}
    # Neither the blocks nor the passes repeat.
    assert len({tuple(block) for block in labels.reshape(-1, BLOCK)}) == blocks
    assert len({tuple(block) for block in drawn.reshape(-1, BLOCK)}) == blocks


def test_an_example_is_drawn_again_only_after_all_others_of_its_class():
    order, random = BalancedOrder(tf.constant([3, 1, 3, 3, -1, 3, 3])), RandomNumbers(1)
    drawn = order.find_examples(tf.range(16 * 5, dtype=tf.int64), random).numpy()
    assert (drawn == 1).sum() == 8 * 5 and 4 not in drawn
    # Blocks are permuted: in each, all draws of a class belong to the same 8 draws of its passes.
    others = [list(block[block != 1]) for block in drawn.reshape(5, 16)]
    assert all(len(set(block)) == 5 for block in others)
    assert set(np.bincount(sum(others, []))[[0, 2, 3, 5, 6]]) == {8}


@pytest.mark.job
def test_balanced_batches_depend_on_seed_and_step_only(open_unequal, monkeypatch):
    # The records are in several groups, smaller than a batch.
    monkeypatch.setattr(shard_batches, "GROUP_BYTES", 150)
    random = {"mirror": True, "mixup": 0.2}
    data = open_unequal(**random)
    expected = train_batches(data, 7)
    for strategy, start_step in ((ONE, 1), (ONE, 6), (Pipelines(2, 4), 4)):
        resumed = train_batches(data, 1, start_step, strategy=strategy)
        assert_same(resumed, expected[start_step : start_step + 1])


def test_another_seed_draws_in_another_order():
    orders = [
        examples_of(train_batches(pipeline.open_data(settings(), seed=s, source=make_arrays()), 3))
        for s in (5, 6)
    ]
    assert (orders[0] != orders[1]).any()


def test_a_pipeline_without_a_row_in_a_group_reads_nothing():
    none = tf.constant([], tf.int64)
    assert RandomNumbers(0).permute(Stream.EXAMPLES, none, 5, tf.constant(0, tf.int64)).shape == (
        0,
    )


def test_mini_batches_and_pairs_of_rows_are_not_all_alike():
    """Pairs of rows are mixed: with strict turns, two classes would always mix with each other."""
    order, random = BalancedOrder(tf.constant([0] * 50 + [1] * 3)), RandomNumbers(0)
    drawn = order.find_examples(tf.range(1600, dtype=tf.int64), random).numpy()
    labels = (drawn >= 50).reshape(-1, 2)
    # 8 draws each: a second row has the other class with probability 8 / 15.
    assert 0.45 < (labels[:, 0] != labels[:, 1]).mean() < 0.61


def test_records_are_balanced_within_each_group_of_shards(prepared, monkeypatch):
    monkeypatch.setattr(shard_batches, "GROUP_BYTES", 0)
    config = settings(name="tiny_unequal", data_dir=str(prepared))
    data = pipeline.open_data(config, seed=5)
    assert data.num_balanced_groups == NUM_SHARDS
    drawn = examples_of(train_batches(data, len(LABELS_OF_EXAMPLES), global_batch_size=4))
    # Four epochs: each group has as many draws as records, all of them its own.
    for epoch in drawn.reshape(4, -1):
        assert len(epoch) == len(LABELS_OF_EXAMPLES)
    assert set(drawn) == set(range(len(LABELS_OF_EXAMPLES)))


def test_unreadable_examples_are_replaced_in_the_balanced_order(prepared, tmp_path):
    root = tmp_path / "images"
    for file in (prepared / "images").rglob("*.png"):
        write(root / file.relative_to(prepared / "images"), file.read_bytes())
    bad = sorted((root / "train" / "class 2").iterdir())[0]
    bad.write_bytes(b"?")
    config = settings(name="folder", data_dir=str(root), max_bad_examples=1)
    data = pipeline.open_data(config, seed=5)
    expected = train_batches(data, 4)
    assert int(bad.stem) not in examples_of(expected)
    assert_same(train_batches(data, 1, 3), expected[3:])


def test_records_with_a_label_that_is_no_class_are_not_drawn(prepared, monkeypatch):
    data = pipeline.open_data(
        settings(name="tiny_unequal", data_dir=str(prepared), balance="weights"), seed=5
    )
    split = data._source.train
    records = split.read(tf.range(NUM_SHARDS, dtype=tf.int64)).numpy()
    example = tf.train.Example.FromString(records[0])
    example.features.feature["label"].int64_list.value[:] = [len(SIZES)]
    labels = split.read_labels(tf.constant([example.SerializeToString(), *records[1:]]))
    assert labels[0] == -1 and (labels[1:].numpy() >= 0).all()


def test_each_source_knows_the_sizes_of_its_classes(open_unequal):
    data = open_unequal(balance="weights")
    sizes = [s for s in SIZES if s] if data.num_classes == len(PRESENT) else SIZES
    np.testing.assert_array_equal(data.class_counts, sizes)
    weights = data.class_weights
    # Each class contributes equally, and the mean over the examples is 1.
    np.testing.assert_allclose(
        weights * data.class_counts, np.where(data.class_counts, 15 / len(PRESENT), 0)
    )
    assert open_unequal(balance="sampling").class_weights is None


def test_the_labels_of_records_are_read_only_for_weights(prepared):
    for balance in ("none", "sampling"):
        config = settings(name="tiny_unequal", data_dir=str(prepared), balance=balance)
        assert pipeline.open_data(config, seed=5).class_counts is None


def test_a_repeated_pool_counts_every_repetition():
    split = make_arrays(num_examples=2 * len(LABELS_OF_EXAMPLES) + 10).train
    np.testing.assert_array_equal(split.count_classes(4), np.add(2 * np.array(SIZES), [9, 0, 1, 0]))


def test_weights_are_defined_exactly():
    np.testing.assert_allclose(class_weights([2, 1]), [0.75, 1.5])
    np.testing.assert_allclose(class_weights([4, 4, 4]), 1)
    np.testing.assert_allclose(class_weights([5, 0]), [1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": "both"}, "unknown data.balance 'both': expected one of none, weights, sampl"),
        ({"shuffle": "shards"}, "draws examples in random order.*data.shuffle='examples'"),
    ],
)
def test_a_balance_that_cannot_work_is_refused(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        pipeline.open_data(settings(**changes), seed=0, source=make_arrays())
    assert "\n" not in str(caught.value)


WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5], np.float32)


@REPLICAS
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixtures"])
def test_the_objective_is_weighted_and_the_reported_loss_is_not(replicas, mixed):
    """The gradient equals that of weighted cross-entropies, smoothed, divided by their number."""
    shares = np.eye(4, dtype=np.float32)[LABELS]
    if mixed:
        shares = (0.7 * shares + 0.3 * shares[::-1]).astype(np.float32)
    smoothing = 0.1
    trainer = small_trainer(
        replicas, class_weights=WEIGHTS, label_smoothing=smoothing, micro_batches=2
    )
    before = weights_of(trainer)
    with tf.GradientTape() as tape:
        logits = trainer.model(IMAGES, training=True)
        logs = tf.nn.log_softmax(logits)
        # For each label on its own: the weight of its class times its smoothed cross-entropy.
        by_label = -(1 - smoothing) * logs - smoothing * tf.reduce_mean(logs, -1, keepdims=True)
        objective = tf.reduce_sum(shares * WEIGHTS * by_label) / len(LABELS)
        loss = -tf.reduce_sum(shares * logs) / len(LABELS)
    gradients = tape.gradient(objective, [v.value for v in trainer.model.trainable_variables])
    hits = np.mean(np.argmax(logits, -1) == np.argmax(shares, -1))
    fed = batches(trainer, labels=shares if mixed else LABELS, micro_batches=2)
    assert trainer.train(fed, 1) == pytest.approx((float(loss), hits, 1))
    steps = [b - a for b, a in zip(before, weights_of(trainer), strict=True)]
    close(steps, gradients, rtol=1e-4, atol=1e-6)


def test_weights_equal_to_one_change_nothing():
    plain, weighted = small_trainer(), small_trainer(class_weights=np.ones(4))
    for trainer in (plain, weighted):
        trainer.train(batches(trainer), 2)
    close(weights_of(plain), weights_of(weighted), rtol=1e-6, atol=1e-7)


def test_weighted_examples_count_like_repeated_ones():
    """Weights of 3/4 and 3/2 for two examples and one: as if the one were there twice."""
    images, labels = IMAGES[:3], np.array([0, 0, 1], np.int32)
    trainer = small_trainer(class_weights=[*class_weights([2, 1]), 1, 1])
    trainer.global_batch_size = 3
    _, _, weighted = trainer.compute_gradients(tf.constant(images), tf.constant(labels))
    repeated = small_trainer()
    repeated.global_batch_size = 4
    twice = [0, 1, 2, 2]
    _, _, expected = repeated.compute_gradients(
        tf.constant(images[twice]), tf.constant(labels[twice])
    )
    close(weighted, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.job
@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_an_interrupted_balanced_run_ends_like_an_uninterrupted_one(balance, tmp_path, monkeypatch):
    config = small_mlp(
        **{"data.balance": balance, "data.mixup": 0.2, "train.label_smoothing": 0.1},
        **{"train.micro_batches": 2, "train.global_batch_size": 40, "train.steps": 6},
        **{"train.steps_per_loop": 2, "evaluation.every_steps": 100, "checkpoint.every_steps": 3},
    )
    expected = train_and_evaluate(config, tmp_path / "whole")
    with killed_after_a_loop(monkeypatch):
        train_and_evaluate(config, tmp_path / "run")
    resumed = train_and_evaluate(config, tmp_path / "run")
    assert resumed["variables_sha256"] == expected["variables_sha256"]


def test_unequal_absent_and_rare_classes_are_named():
    data = pipeline.open_data(settings(balance="none"), seed=0, source=make_arrays())
    lines = "\n".join(find_class_pitfalls(data))
    assert "no training image of: 1" in lines
    assert "fewer than 10 training images, too few to learn from: 0 (9), 2 (2), 3 (4)" in lines
    assert "data.balance" not in lines
    data.class_counts = np.array([300, 0, 25, 90])
    assert "from 25 to 300 training images" in find_class_pitfalls(data)[-1]
    data.balance = "sampling"
    assert len(find_class_pitfalls(data)) == 1
    data.class_counts = np.array([0, 0, 25, 0])
    assert "all training images have the class '2'" in find_class_pitfalls(data)[-1]


def test_the_log_says_what_balances_the_classes():
    for balance, text in (("weights", "from 0.556 to 2.5"), ("sampling", "an epoch has 15 draws")):
        data = pipeline.open_data(settings(balance=balance), seed=0, source=make_arrays())
        assert text in " ".join(describe_balance(data))
