"""Folders of images, and unreadable examples of any source."""

import csv
import io
import logging
import os
import pathlib
import unicodedata

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from small import small_mlp
from test_data import ONE, Pipelines, assert_same, labels_of, train_batches

from bn_keras.data import pipeline, shard_batches
from bn_keras.data.folder_walk import walk_classes
from bn_keras.data.unreadable_examples import UnreadableExamples
from bn_keras.errors import UsageError
from bn_keras.runs.workdir import Interface, Workdir
from bn_keras.training.config import default_config
from bn_keras.training.evaluator import Evaluator
from bn_keras.training.loop import train_and_evaluate
from bn_keras.training.plan import check_startable

CLASSES = ("cat", "dög 2", "zèbre")
NUM_TRAIN, NUM_VALIDATION = 10, 4
STEPS = 8


def encoded(pixels, file_format="PNG", **options):
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, file_format, **options)
    return stream.getvalue()


def grey_level(label, number):
    """Returns the grey level that identifies an image."""
    return 60 * label + 5 * number


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def root(tmp_path):
    """Three classes; several formats, nested folders, spaces and umlauts in names."""
    root = tmp_path / "my pictures"
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                pixels = np.full((20 + i, 30 - label, 3), grey_level(label, i), np.uint8)
                suffix, file_format = (("png", "PNG"), ("JPG", "JPEG"), ("bmp", "BMP"))[i % 3]
                folder = root / split / name / ("älter" if i % 4 == 0 else "")
                write(folder / f"bild {i}.{suffix}", encoded(pixels, file_format))
    return root


def settings(root, **changes):
    config = default_config().data.copy_and_resolve_references()
    config.update({"name": "folder", "data_dir": str(root), "image_size": 8, "crop": "none"})
    config.update({"mirror": False, "distortion": 0.0, **changes})
    return config


def open_folder(root, **changes):
    return pipeline.open_data(settings(root, **changes), seed=1)


def validate(data, global_batch_size=8, strategy=ONE):
    datasets, num_steps = data.validation_batches(strategy, global_batch_size)
    batches = strategy.global_batches(datasets, num_steps)
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def levels(images):
    """Returns the grey levels of images."""
    return np.round((images[:, 4, 4, 0] + 1) * 127.5).astype(int)


def test_classes_are_the_sorted_folders_with_all_their_images(root):
    write(root / "train" / CLASSES[0] / ".DS_Store", b"hidden")
    write(root / "train" / ".cache" / "x.png", b"hidden")
    data = open_folder(root)
    assert data.class_names == CLASSES and data.input_shape == (8, 8, 3)
    assert (data.num_train_examples, data.num_validation_examples) == (30, 12)
    images, labels, weights = validate(data)
    seen = {(label, level) for label, level in zip(labels, levels(images), strict=True)}
    assert weights.sum() == 12
    assert seen == {(c, grey_level(c, i)) for c in range(3) for i in range(NUM_VALIDATION)}
    batches = train_batches(data, 5, global_batch_size=6)
    seen = {level for images, _ in batches for level in levels(images)}
    assert seen == {grey_level(c, i) for c in range(3) for i in range(NUM_TRAIN)}


@pytest.mark.parametrize("shuffle", ["examples", "shards"])
def test_the_order_mixes_all_classes_and_is_resumable_anywhere(root, shuffle):
    data = open_folder(root, shuffle=shuffle, crop="inception", mirror=True, distortion=1.0)
    uninterrupted = train_batches(data, STEPS)
    # 30 examples of 3 classes: sorted by class, the first 8 would have one class.
    assert len(set(uninterrupted[0][1])) > 1
    for start_step in (3, 7):
        assert_same(train_batches(data, 1, start_step), uninterrupted[start_step : start_step + 1])
    for strategy in (Pipelines(1, 2), Pipelines(2, 2)):
        assert_same(train_batches(data, 2, 3, strategy=strategy), uninterrupted[3:5])


def test_batches_do_not_depend_on_the_piece_size(root, monkeypatch):
    whole = train_batches(open_folder(root), 2, global_batch_size=12)
    monkeypatch.setattr(shard_batches, "MAX_PIECE", 5)
    assert_same(train_batches(open_folder(root), 2, global_batch_size=12), whole)


def test_percentages_split_each_class_separately(root):
    splits = {"train_split": "train[:70%]", "validation_split": "train[70%:]"}
    data = open_folder(root, **splits)
    assert (data.num_train_examples, data.num_validation_examples) == (21, 9)
    _, labels, weights = validate(data, global_batch_size=9)
    assert weights.all() and list(np.bincount(labels)) == [3, 3, 3]
    validated = set(levels(validate(data)[0]))
    trained = {
        level
        for images, _ in train_batches(data, 7, global_batch_size=3)
        for level in levels(images)
    }
    assert len(trained) == 21 and len(validated) == 9 and not trained & validated
    # A new image moves at most one other image to the other part.
    write(root / "train" / "cat" / "new.png", encoded(np.full((9, 9, 3), 255, np.uint8)))
    assert len(validated & set(levels(validate(open_folder(root, **splits))[0]))) >= 8
    flat = {"train_split": ".[:50%]", "validation_split": ".[50%:]"}
    data = open_folder(root / "validation", **flat)
    assert (data.num_train_examples, data.num_validation_examples) == (6, 6)


def test_the_validation_sample_has_images_of_all_classes(root):
    strategy = tf.distribute.get_strategy()
    data = open_folder(root)
    for count, expected in ((2, [0, 1]), (3, [0, 1, 2]), (7, [0, 0, 0, 1, 1, 2, 2])):
        images, labels, weights = next(iter(data.validation_sample(strategy, count)))
        assert labels.numpy().tolist() == expected and weights.numpy().all()
        assert len(np.unique(levels(images.numpy()))) == count


def remove(path):
    for child in sorted(path.rglob("*"), reverse=True):
        child.unlink() if child.is_file() else child.rmdir()
    path.rmdir()


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (
            None,
            {"data_dir": ""},
            "data.data_dir='' is not a folder: expected one that holds images as"
            " train/CLASS/IMAGE and validation/CLASS/IMAGE$",
        ),
        # As in an evaluation, which needs no training images.
        (
            None,
            {"data_dir": "", "train_split": "validation"},
            "images as validation/CLASS/IMAGE$",
        ),
        (
            None,
            {"data_dir": "", "train_split": ".[:90%]", "validation_split": ".[90%:]"},
            "images as CLASS/IMAGE$",
        ),
        (
            None,
            {"data_dir": "", "train_split": "labels.csv"},
            "images as the file labels.csv lists them and validation/CLASS/IMAGE$",
        ),
        (
            lambda r: (r / "validation" / "none").mkdir(),
            {"train_split": "validation"},
            "no validation image in class folder 'none' of 'validation'",
        ),
        (None, {"train_split": "trian"}, r"no folder 'trian' in .*has 'train', 'validation'"),
        (None, {"train_split": "train[:5]"}, r"'train\[:5\]' is invalid.*a percentage"),
        (None, {"train_split": "train[90%:80%]"}, "from 0 to 100, the first below the second"),
        (None, {"train_split": "train[:900%]"}, r"'train\[:900%\]' is invalid.*from 0 to 100"),
        (None, {"train_split": "train[0%:0%]"}, "from 0 to 100, the first below the second"),
        (None, {"train_split": "train/cat/älter"}, "has no class folders"),
        (None, {"image_size": 0}, "'folder' differ in size"),
        (
            lambda r: (r / "train" / "new").mkdir(),
            {},
            "'train' and 'validation' in .* differ: only 'train' has 'new': add",
        ),
        (lambda r: remove(r / "validation" / "cat"), {}, "differ: only 'train' has 'cat': add"),
        (
            lambda r: [(r / split / "none").mkdir() for split in ("train", "validation")],
            {},
            "no training image in class folder 'none'.*remove the folder",
        ),
        (
            lambda r: [file.unlink() for file in (r / "validation").rglob("*.*")],
            {},
            "'validation' in .* has no image",
        ),
    ],
)
def test_invalid_folders_are_reported_on_one_line(root, damage, changes, message):
    if damage:
        damage(root)
    with pytest.raises(UsageError, match=message) as caught:
        open_folder(root, **changes)
    assert "\n" not in str(caught.value)


def test_other_files_are_ignored_with_a_warning(root, caplog):
    write(root / "train" / "cat" / "notes.txt", b"no image")
    data = open_folder(root)
    assert data.num_train_examples == 30
    assert "ignoring 1 file in" in caplog.text and "notes.txt" in caplog.text
    # Two parts of a folder are one folder.
    caplog.clear()
    open_folder(root, train_split="train[:50%]", validation_split="train[50%:]")
    assert caplog.text.count("notes.txt") == 1


def test_each_real_folder_is_visited_once_and_in_its_own_class(root, caplog):
    plain = open_folder(root)
    (root / "train" / "cat" / "up").symlink_to("../..")
    (root / "train" / "cat" / "neighbour").symlink_to("../zèbre")
    (root / "train" / "cat" / "again").symlink_to("älter")
    data = open_folder(root)
    assert data.num_train_examples == 30 and data.fingerprint == plain.fingerprint
    assert "ignoring 3 links" in caplog.text
    elsewhere = root.parent / "elsewhere"
    write(elsewhere / "new.png", encoded(np.zeros((9, 9, 3), np.uint8)))
    (root / "train" / "cat" / "linked").symlink_to(elsewhere)
    assert open_folder(root).num_train_examples == 31
    (root / "train" / "cow").symlink_to("cat")
    with pytest.raises(UsageError, match="cow' is a link to another class folder"):
        open_folder(root)


@pytest.mark.parametrize("workdir", ["train", "train/cat", "train/cat/../"])
def test_a_workdir_does_not_lie_among_the_images(workdir, root):
    config = small_mlp(
        **{"data.name": "folder", "data.data_dir": str(root), "data.train_split": "train[:90%]"}
    )
    with pytest.raises(UsageError, match="is a folder of the images of 'train.* use another"):
        train_and_evaluate(config, root / workdir)
    assert not list(root.rglob("config.json"))
    for apart in (root, root / "train" / "run"):
        check_startable(Workdir(apart), config)


def test_hidden_folders_and_those_of_runs_are_not_entered(root, caplog):
    content = encoded(np.zeros((9, 9, 3), np.uint8))
    for name in (".ipynb_checkpoints", "@eaDir", "a/.thumbnails", "a/run/plots"):
        write(root / "train" / "cat" / name / "x.png", content)
    for folder in (root / "train" / "cat" / "a" / "run", root / "train" / "my run"):
        for name in ("config.json", "metrics.jsonl", "plot.png"):
            write(folder / name, content)
    data = open_folder(root)
    assert data.class_names == CLASSES and data.num_train_examples == 30
    assert "ignoring 2 folders" in caplog.text and "my run" in caplog.text


def test_splits_are_not_taken_for_classes(root):
    with pytest.raises(UsageError, match="holds the splits 'train', 'validation', not class"):
        open_folder(root, train_split=".[:90%]", validation_split=".[90%:]")
    # A class of vehicles may have this name.
    for split in ("train", "validation"):
        write(root / split / "train" / "old" / "x.png", encoded(np.zeros((9, 9, 3), np.uint8)))
    assert open_folder(root).class_names == (CLASSES[0], CLASSES[1], "train", CLASSES[2])


@pytest.mark.parametrize("kind", ["part", "link"])
def test_images_in_both_splits_are_named_in_a_warning(root, caplog, kind):
    open_folder(root)
    assert "also in" not in caplog.text
    if kind == "part":
        open_folder(root, validation_split="train[50%:]")
        assert "15 images of 'train[50%:]' are also in 'train'" in caplog.text
    else:
        link = root / "validation" / "cat" / "link.png"
        link.symlink_to(root / "train" / "cat" / "älter" / "bild 0.png")
        open_folder(root)
        assert "1 image of 'validation' is also in 'train'" in caplog.text


def test_copies_of_training_images_are_named_in_a_warning(root, caplog):
    # All 12 validation images are; one more has another class.
    original = root / "train" / "cat" / "älter" / "bild 8.bmp"
    write(root / "validation" / "zèbre" / original.name, original.read_bytes())
    # Another content of the same size.
    write(root / "validation" / "cat" / "bild 7.JPG", b"?")
    write(root / "train" / "cat" / "bild 7.JPG", b"!")
    open_folder(root)
    assert "13 of 14 files with equal names and sizes in 'train' and 'validation'" in caplog.text


def test_odd_names_are_names_like_any_other(root):
    content = encoded(np.full((9, 9, 3), 255, np.uint8))
    for name in ("-rf.png", "new\nline.png", " spaces .PNG", "MIXED.JpEg", "x.jpg/inner.png"):
        write(root / "train" / "cat" / name, content)
    assert open_folder(root).num_train_examples == 35


def test_unicode_spellings_of_a_class_name_are_one(root):
    decomposed = unicodedata.normalize("NFD", CLASSES[1])
    (root / "validation" / CLASSES[1]).rename(root / "validation" / decomposed)
    assert open_folder(root).class_names == CLASSES
    write(root / "validation" / CLASSES[1] / "x.png", b"")
    with pytest.raises(UsageError, match="two class folders called 'dög 2'"):
        open_folder(root)


def test_names_that_are_not_utf8(root):
    folder = root / "train" / "cat"
    data = os.fsencode(folder / "caf") + b"\xe9.png"
    (folder / "bild 1.JPG").rename(os.fsdecode(data))
    assert len(train_batches(open_folder(root), STEPS)) == STEPS
    pathlib.Path(os.fsdecode(data)).write_bytes(b"?")
    with pytest.raises(UsageError, match=r"caf\\xe9.png") as caught:
        unreadable = open_folder(root)
        with unreadable.reporting_errors():
            train_batches(unreadable, STEPS)
    str(caught.value).encode()
    os.unlink(data)
    os.symlink("nothing", data)
    with pytest.raises(UsageError, match=r"caf\\xe9.png: the file does not exist") as caught:
        broken = open_folder(root)
        with broken.reporting_errors():
            train_batches(broken, STEPS)
    folder.rename(os.fsdecode(os.fsencode(root / "train" / "caf") + b"\xe9"))
    with pytest.raises(UsageError, match="class folder .* is not UTF-8: rename it") as caught:
        open_folder(root)
    str(caught.value).encode()


def test_an_empty_class_folder_is_treated_as_a_missing_one(root, caplog):
    folder = root / "validation" / "cat"
    remove(folder)
    folder.mkdir()
    with pytest.raises(UsageError, match="no validation image in class folder 'cat'"):
        open_folder(root)
    # A percentage of few images may be none.
    splits = {"train_split": "train[:99%]", "validation_split": "train[99%:]"}
    write(root / "train" / "zèbre" / "x.png", b"")
    for i in range(60):
        write(root / "train" / "zèbre" / f"{i}.png", b"")
    open_folder(root, **splits)
    assert "leaves no validation image for 'cat', 'dög 2'" in caplog.text
    # An evaluation, which opens no training images, accepts what the training did.
    caplog.clear()
    open_folder(root, train_split="train[99%:]", validation_split="train[99%:]")
    assert "leaves no validation image for 'cat', 'dög 2'" in caplog.text


def test_images_that_are_listed_twice_are_counted_in_a_warning(root, caplog):
    for split in ("train", "validation"):
        (root / split / "cat" / "link.png").symlink_to(
            root / split / "cat" / "älter" / "bild 0.png"
        )
        caplog.clear()
        open_folder(root)
        assert f"'{split}' lists 1 image twice or more" in caplog.text
    assert "'train' lists 1 image twice or more" in caplog.text
    caplog.clear()
    open_folder(root, train_split="validation")
    assert caplog.text.count("twice or more") == 1


def test_swapped_class_folders_have_another_fingerprint(root):
    before = open_folder(root).fingerprint
    assert before == open_folder(root).fingerprint and len(before) == 2
    cat, zebra, other = (root / "train" / name for name in ("cat", "zèbre", "other"))
    cat.rename(other), zebra.rename(cat), other.rename(zebra)
    swapped = open_folder(root).fingerprint
    assert swapped["file_names"] == before["file_names"] and swapped != before
    moved = root.parent / "moved"
    root.rename(moved)
    assert open_folder(moved).fingerprint == swapped


def test_a_run_does_not_resume_on_other_files(root, tmp_path):
    config = small_mlp(
        **{"data." + key: value for key, value in settings(root).items()},
        **{"train.steps": 2, "train.steps_per_loop": 2},
    )
    data = open_folder(root)
    run = Workdir(tmp_path / "run")
    interface = Interface(
        data.input_shape, data.class_names, data.num_train_examples, data.fingerprint
    )
    other = interface._replace(fingerprint=data.fingerprint | {"file_sizes": "0"})
    # A run of an older version has no fingerprint; the next start adds it.
    run.create(config, interface._replace(fingerprint={}))
    run.create(config, interface)
    names = {"file_names": data.fingerprint["file_names"]}
    run.create(config, interface._replace(fingerprint=names))
    with pytest.raises(UsageError, match="started on data with other file_sizes: use that data"):
        run.create(config, other)
    with pytest.raises(UsageError, match="started on data with other file_sizes: use that data"):
        run.check_data(other)
    with pytest.raises(UsageError, match="with other class_names"):
        run.create(
            config, interface._replace(class_names=("a", "b", "c"), fingerprint={"new": "1"})
        )


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_are_read_from_a_csv_file(root, delimiter):
    rows = [
        f'"train/{name}/{file.relative_to(root / "train" / name)}"{delimiter}{name}'
        for name in CLASSES
        for file in (root / "train" / name).rglob("*.*")
    ]
    text = "\r\n".join([f"path{delimiter}label", *rows, ""])
    write(root / "labels.csv", text.encode("utf-8-sig"))
    splits = {"train_split": "labels.csv[:70%]", "validation_split": "labels.csv[70%:]"}
    data = open_folder(root, **splits)
    assert data.class_names == CLASSES
    assert (data.num_train_examples, data.num_validation_examples) == (21, 9)
    images, labels, _ = validate(data)
    assert all(level // 60 == c for c, level in zip(labels, levels(images), strict=True))


@pytest.mark.parametrize("first", ["{0};red, dark", '"{0}";"red, dark"', "\n{0};red, dark"])
def test_the_separator_is_recognized_from_many_rows(root, first):
    images = [file.relative_to(root) for file in (root / "train").rglob("*.*")]
    rows = [first.format(images[0]), *(f"{image};blue" for image in images[1:])]
    (root / "labels.csv").write_text("\n".join(rows))
    data = open_folder(root, train_split="labels.csv", validation_split="labels.csv")
    assert data.class_names == ("blue", "red, dark")


def test_a_space_before_a_quotation_mark_is_no_part_of_a_name(root):
    images = [file.relative_to(root) for file in (root / "train").rglob("*.*")]
    rows = [f'{i}, "{i.parts[1]}"' if n % 2 else f"{i},{i.parts[1]}" for n, i in enumerate(images)]
    (root / "labels.csv").write_text("\n".join(rows))
    data = open_folder(root, train_split="labels.csv[:70%]", validation_split="labels.csv[70%:]")
    assert data.class_names == CLASSES


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b", "a\x0cb", "a\nb", "a\r\nb", 'a"b'])
def test_names_in_a_csv_file_may_have_any_characters(root, name):
    for split in ("train", "validation"):
        image = next((root / split / CLASSES[0]).rglob("*.*"))
        image.rename(root / f"{name}{split}.png")
        text = io.StringIO(newline="")
        csv.writer(text).writerow([f"{name}{split}.png", CLASSES[0]])
        write(root / f"{split}.csv", text.getvalue().encode())
    data = open_folder(root, train_split="train.csv", validation_split="validation.csv")
    assert (data.num_train_examples, data.num_validation_examples) == (1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,label\n", "is empty"),
        ("\n\npath,label\n", "is empty"),
        ("validation/cat/bild 1.JPG", "line 1 .* expected a path and a label"),
        ("validation/cat/bild 1.JPG,a\nvalidation/cat/bild 1.JPG,b", "has the labels 'a' and 'b'"),
        ("validation/cat/bild 1.JPG,a\n./validation/cat/bild 1.JPG,b", "has the labels 'a' and"),
        ("missing.png,a", "1 of the images .* do not exist .*'missing.png'"),
        ("caf\udce9.png,a", "is not UTF-8"),
        ('validation/cat/bild 1.JPG,"a\nvalidation/cat/x.png,b', "line 2 .* quotation marks"),
    ],
)
def test_an_invalid_labels_file_is_reported_on_one_line(root, text, message):
    write(root / "labels.csv", text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message) as caught:
        open_folder(root, train_split="labels.csv", validation_split="labels.csv")
    assert "\n" not in str(caught.value)


def test_a_split_without_a_readable_image_is_an_error(root):
    for split in ("train", "validation"):
        for file in (root / split).rglob("*.*"):
            file.write_bytes(b"?")
    data = open_folder(root, max_bad_examples=100)
    with pytest.raises(UsageError, match="none of 30 training images is readable"):
        with data.reporting_errors():
            train_batches(data, 1)
    assert validate(data)[2].sum() == 0
    with pytest.raises(UsageError, match="none of the 12 validation images is readable"):
        data.check_counted(0)


PHOTOGRAPH = (
    np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8).repeat(8, 0).repeat(8, 1)
)
TRANSPARENT = Image.fromarray(PHOTOGRAPH).convert("RGBA")
TRANSPARENT.putalpha(128)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.fromarray(PHOTOGRAPH).convert("CMYK"), "JPEG", quality=98), PHOTOGRAPH),
        (encoded(PHOTOGRAPH, "JPEG", quality=98, progressive=True), PHOTOGRAPH),
        (encoded(PHOTOGRAPH[..., 0], "JPEG", quality=98), PHOTOGRAPH[..., :1].repeat(3, -1)),
        (encoded(PHOTOGRAPH[..., 0]), PHOTOGRAPH[..., :1].repeat(3, -1)),
        (encoded(PHOTOGRAPH[..., 0].astype(np.uint16) * 257), PHOTOGRAPH[..., :1].repeat(3, -1)),
        (encoded(Image.fromarray(PHOTOGRAPH).quantize(64)), PHOTOGRAPH),
        (encoded(Image.fromarray(PHOTOGRAPH).convert("RGBA")), PHOTOGRAPH),
        (encoded(PHOTOGRAPH, "BMP"), PHOTOGRAPH),
        (encoded(PHOTOGRAPH[:1, :1]), PHOTOGRAPH[:1, :1]),
        (encoded(Image.fromarray(PHOTOGRAPH).quantize(64), "BMP"), PHOTOGRAPH),
        (encoded(Image.fromarray(PHOTOGRAPH[..., 0]), "BMP"), PHOTOGRAPH[..., :1].repeat(3, -1)),
        (encoded(PHOTOGRAPH, "WEBP", lossless=True), PHOTOGRAPH),
        (encoded(TRANSPARENT, "WEBP", lossless=True, exact=True), PHOTOGRAPH),
        (encoded(Image.fromarray(PHOTOGRAPH).quantize(64), "GIF"), PHOTOGRAPH),
    ],
    ids="cmyk progressive grey-jpeg grey-png 16-bit palette alpha bmp one-pixel palette-bmp"
    " grey-bmp webp transparent-webp gif".split(),
)
def test_all_formats_are_decoded_correctly(tmp_path, content, expected):
    for split in ("train", "validation"):
        write(tmp_path / split / "one" / "image.jpg", content)
    images, _, _ = validate(open_folder(tmp_path, image_size=48), global_batch_size=1)
    # crop="none": the whole image.
    expected = tf.image.resize(expected, (48, 48)) / 127.5 - 1
    # JPEG blurs edges between colours, but not on average.
    assert np.abs(images[0] - expected).mean() < 0.08


UNREADABLE = {
    "animated-webp": encoded(
        PHOTOGRAPH, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PHOTOGRAPH)]
    ),
    "zero-byte": b"",
    # The start of a JPEG and of a PNG, not UTF-8.
    "two-bytes": b"\xff\xd8",
    "four-bytes": b"\x89PNG",
    "text": b"no image at all",
    "truncated-jpeg": encoded(PHOTOGRAPH, "JPEG")[:300],
    "truncated-png": encoded(PHOTOGRAPH)[:60],
    "corrupt-png": encoded(PHOTOGRAPH).replace(b"IDAT", b"IDXT"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_image_stops_the_run_and_is_named(root, kind):
    path = root / "train" / "dög 2" / "bild 1.JPG"
    path.write_bytes(UNREADABLE[kind])
    data = open_folder(root)
    with pytest.raises(UsageError) as caught, data.reporting_errors():
        train_batches(data, STEPS)
    message = str(caught.value)
    assert str(path) in message and "data.max_bad_examples=0 is exceeded" in message
    assert "\n" not in message and "{{" not in message and "Op:" not in message


def corrupt(root):
    """Corrupts three training images, two of them neighbours by name, and a validation image."""
    paths = [root / "train" / "cat" / f"bild {i}.{s}" for i, s in ((1, "JPG"), (2, "bmp"))]
    paths += [root / "train" / "zèbre" / "bild 5.bmp", root / "validation" / "cat" / "bild 1.JPG"]
    for path, content in zip(
        paths, [*list(UNREADABLE.values())[:2], UNREADABLE["two-bytes"], b"?"], strict=True
    ):
        path.write_bytes(content)
    return paths


@pytest.mark.job
def test_unreadable_training_examples_are_replaced_and_nothing_else_changes(root, caplog):
    random = {"crop": "inception", "mirror": True, "distortion": 1.0}
    intact = train_batches(open_folder(root, **random), STEPS)
    corrupt_paths = corrupt(root)
    data = open_folder(root, max_bad_examples=3, **random)
    with data.reporting_errors():
        got = train_batches(data, STEPS)
    changed = [
        (step, row)
        for step, (new, old) in enumerate(zip(got, intact, strict=True))
        for row in range(len(new[1]))
        if (new[0][row] != old[0][row]).any()
    ]
    # Two epochs and four examples of a third; in each epoch three examples are replaced.
    assert 6 <= len(changed) <= 9
    corrupt_levels = {grey_level(0, 1), grey_level(0, 2), grey_level(2, 5)}
    plain = train_batches(open_folder(root, max_bad_examples=3), STEPS)
    assert not corrupt_levels & {level for images, _ in plain for level in levels(images)}
    for path in corrupt_paths[:3]:
        assert sum(str(path) in record.message for record in caplog.records) == 2

    # The substitutes are the same for a resumed run and for any number of replicas.
    for strategy, start_step in ((ONE, 4), (Pipelines(1, 2), 0), (Pipelines(2, 2), 2)):
        again = open_folder(root, max_bad_examples=3, **random)
        steps = STEPS - start_step
        assert_same(train_batches(again, steps, start_step, strategy=strategy), got[start_step:])


def test_more_unreadable_examples_than_the_limit_stop_the_run(root):
    corrupt_paths = corrupt(root)
    data = open_folder(root, max_bad_examples=2)
    with pytest.raises(UsageError, match="data.max_bad_examples=2") as caught:
        with data.reporting_errors():
            train_batches(data, STEPS)
    assert any(str(path) in str(caught.value) for path in corrupt_paths)


@pytest.mark.parametrize(
    ("global_batch_size", "strategy"), [(5, ONE), (12, ONE), (4, Pipelines(2, 2))]
)
def test_unreadable_validation_examples_do_not_count(root, global_batch_size, strategy):
    for name in ("bild 1.JPG", "bild 2.bmp"):
        (root / "validation" / "zèbre" / name).write_bytes(b"?")
    data = open_folder(root, max_bad_examples=2)
    images, labels, weights = validate(data, global_batch_size, strategy)
    assert weights.sum() == 10 and np.isfinite(images).all()
    assert set(levels(images[(weights == 1) & (labels == 2)])) == {
        grey_level(2, 0),
        grey_level(2, 3),
    }
    data.check_counted(10)
    for wrong in (9, 11, 12):
        # Each of two pipelines knows only its own unreadable examples.
        if strategy is ONE or wrong > 10:
            with pytest.raises(AssertionError, match="but 2 are unreadable"):
                data.check_counted(wrong)


def test_a_pass_counts_the_examples_that_it_reads(root):
    """An image may be repaired between two passes, or be listed twice."""
    rows = [
        f"train/{p.relative_to(root / 'train')},{p.parts[-2]}" for p in files_of(root / "train")
    ]
    broken = root / "train" / "cat" / "bild 1.JPG"
    whole = broken.read_bytes()
    write(broken, b"?")
    text = "\n".join([*rows, "train/cat/bild 1.JPG,cat"])
    write(root / "labels.csv", text.encode())
    data = open_folder(
        root, train_split="labels.csv", validation_split="labels.csv", max_bad_examples=1
    )
    assert data.num_validation_examples == len(rows) + 1
    for content, missing in ((b"?", 2), (whole, 0), (b"?", 2)):
        write(broken, content)
        data.begin_validation()
        num_examples = validate(data)[2].sum()
        assert num_examples == len(rows) + 1 - missing
        data.check_counted(num_examples)
        with pytest.raises(AssertionError, match=f"but {missing} are unreadable"):
            data.check_counted(num_examples - 1)


def files_of(folder):
    """Returns the images directly in the class folders."""
    return sorted(path for path in folder.glob("*/*.*") if path.is_file())


def test_an_evaluation_accepts_an_image_that_was_repaired(root, tmp_path, monkeypatch):
    broken = root / "validation" / "cat" / "bild 1.JPG"
    whole = broken.read_bytes()
    write(broken, b"?")
    config = small_mlp(
        **{"data." + key: value for key, value in settings(root, max_bad_examples=3).items()},
        **{"train.steps": 4, "train.steps_per_loop": 2, "evaluation.global_batch_size": 8},
        **{"evaluation.every_steps": 2},
    )
    evaluate = Evaluator.__call__

    def repair_afterwards(self, *arguments):
        found = evaluate(self, *arguments)
        write(broken, whole)
        return found

    monkeypatch.setattr(Evaluator, "__call__", repair_afterwards)
    train_and_evaluate(config, tmp_path / "run")
    lines = Workdir(tmp_path / "run").read_metrics()
    examples = [line["validation/examples"] for line in lines if "validation/examples" in line]
    assert examples == [11, 12]


def test_a_run_reports_the_number_of_readable_validation_examples(root, tmp_path):
    corrupt(root)
    config = small_mlp(
        **{"data." + key: value for key, value in settings(root, max_bad_examples=3).items()},
        **{"train.steps": 4, "train.steps_per_loop": 2, "evaluation.global_batch_size": 8},
    )
    last = train_and_evaluate(config, tmp_path / "run")
    assert last["validation/examples"] == 11 and np.isfinite(last["validation/loss"])
    config.data.max_bad_examples = 0
    with pytest.raises(UsageError, match="data.max_bad_examples=0"):
        train_and_evaluate(config, tmp_path / "strict")


class Damaged(tfds.core.GeneratorBasedBuilder):
    """Grey images in three classes, to be damaged by a test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=3),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            pixels = np.full((8, 8, 3), 20 * i, np.uint8)
            yield i, {"image": pixels, "label": i % 3, "file_name": f"{i}.png"}


@pytest.fixture
def damaged(tmp_path):
    """The folder of the TFRecord set `Damaged`, and a function that changes one of its records."""
    tfds.disable_progress_bar()
    builder = Damaged(data_dir=tmp_path)
    download = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=download)

    def change(number, **features):
        path = builder.info.splits["train"].filepaths[1]
        records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
        example = tf.train.Example.FromString(records[number])
        for name, value in features.items():
            feature = example.features.feature[name]
            feature.Clear()
            kind = feature.bytes_list if isinstance(value, bytes) else feature.int64_list
            kind.value.append(value)
        records[number] = example.SerializeToString()
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
        name = example.features.feature["file_name"].bytes_list.value[0].decode()
        return f"{name} (record {number} of {path})"

    return str(tmp_path), change


@pytest.mark.parametrize(
    "shuffle, features",
    [("examples", {"image": b""}), ("shards", {"label": 3}), ("shards", {"label": -1})],
)
def test_an_unreadable_record_is_named_by_its_file_name_and_place(damaged, shuffle, features):
    data_dir, change = damaged
    name = change(2, **features)
    changes = {"name": "damaged", "shuffle": shuffle, "max_bad_examples": 1}
    data = open_folder(data_dir, **changes)
    labels = labels_of(train_batches(data, 3, global_batch_size=4))
    assert len(labels) == 12 and data._unreadable_train._names == {name}
    data = open_folder(data_dir, **changes | {"max_bad_examples": 0})
    with pytest.raises(UsageError) as caught, data.reporting_errors():
        train_batches(data, 3, global_batch_size=4)
    assert name in str(caught.value)


# A byte of the second record, and of the first.
@pytest.mark.parametrize("position", [200, 20])
def test_a_damaged_file_of_records_is_named(damaged, monkeypatch, position):
    monkeypatch.setattr(shard_batches, "GROUP_BYTES", 0)
    data_dir, _ = damaged
    [path] = pathlib.Path(data_dir).rglob("*train*00001-of*")
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    data = open_folder(data_dir, name="damaged")
    with pytest.raises(
        UsageError, match="fewer readable records.*prepare the data set again"
    ) as caught:
        with data.reporting_errors():
            train_batches(data, 3, global_batch_size=4)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_an_unreadable_example_counts_once(caplog):
    caplog.set_level(logging.WARNING)
    unreadable = UnreadableExamples(limit=1)
    for _ in range(3):
        unreadable.add("a", ValueError("first line\nsecond"))
    assert unreadable.count == 1 and unreadable.error is None
    assert [record.message for record in caplog.records] == [
        "unreadable example a: first line (1 of at most 1)"
    ]
    with pytest.raises(UsageError, match="b: other"):
        unreadable.add("b", ValueError("other"))
    assert unreadable.error is not None


def test_other_tensorflow_errors_pass_through(root):
    data = open_folder(root)
    with pytest.raises(tf.errors.AbortedError, match="not ours"), data.reporting_errors():
        raise tf.errors.AbortedError(None, None, "not ours")


def test_a_run_in_a_bucket_hides_only_its_own_images(memory_bucket):
    files = {
        "cat/run1/config.json": "{}",
        "cat/run1/metrics.jsonl": "",
        "cat/run1/pictures/a.png": "",
        "cat/run10/b.png": "",
    }
    for name, content in files.items():
        file = memory_bucket / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    contents = walk_classes(str(memory_bucket), ["cat"])["cat"]
    assert [os.path.basename(image.path) for image in contents.images] == ["b.png"]
