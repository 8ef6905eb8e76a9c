"""The report on the classes: accuracy by class, confusion matrix, most confident mistakes."""

import csv
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import small_mlp

from bn_keras.data import pipeline
from bn_keras.data.splits import Arrays, Source
from bn_keras.distribute import make_strategy
from bn_keras.inference.evaluation import evaluate_networks, format_error_rates
from bn_keras.models import SigmoidMLP
from bn_keras.pictures.classes import Mistake, draw_confusion, draw_mistakes
from bn_keras.pictures.picture_file import save_picture
from bn_keras.runs.workdir import Workdir
from bn_keras.training.build import build_data
from bn_keras.training.class_report import (
    ClassReport,
    Predictions,
    format_classes,
    name_rare_classes,
)
from bn_keras.training.evaluator import Evaluator
from bn_keras.training.loop import train_and_evaluate

NAMES = ("cat", "dog", "eel")


def report(labels, classes, probabilities=None, names=NAMES):
    probabilities = probabilities or [0.5] * len(labels)
    arrays = [np.array(a) for a in (range(len(labels)), labels, classes, probabilities)]
    return ClassReport(names, Predictions(*arrays))


def test_accuracy_and_confusion_by_class():
    found = report([0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2])
    np.testing.assert_array_equal(found.confusion, [[1, 2, 0], [0, 3, 1], [0, 0, 0]])
    assert found.rows() == [
        {"label": "cat", "images": 3, "accuracy": 1 / 3, "taken_for": "dog", "times": 2},
        {"label": "dog", "images": 4, "accuracy": 0.75, "taken_for": "eel", "times": 1},
        {"label": "eel", "images": 0, "accuracy": None},
    ]
    assert found.predictions.balanced_accuracy() == pytest.approx((1 / 3 + 3 / 4) / 2)
    text = format_classes(found.rows())
    assert "33.33%" in text and "dog (2)" in text


def test_a_class_name_with_a_line_break_is_shown_on_one_line():
    [row] = [row for row in report([0] * 10, [0] * 10).rows() if row["label"] == "cat"]
    text = format_classes([row | {"label": "big\ncat"}])
    assert "big cat" in text and len(text.splitlines()) == 2
    assert name_rare_classes(["big\ncat"], [0], "training", "to learn from") == [
        "no training image of: big cat"
    ]


def test_absent_and_rare_classes_are_named():
    lines = report([0] * 10 + [1] * 9, [0] * 19).name_rare_classes()
    assert lines[0] == "no validation image of: eel"
    assert lines[1].startswith("fewer than 10 validation images") and "dog (9)" in lines[1]
    assert report([0] * 10 + [1] * 10 + [2] * 10, [0] * 30).name_rare_classes() == []


def test_the_most_confident_mistakes_come_first():
    found = report([0, 1, 2, 0, 1], [1, 1, 0, 2, 0], [0.4, 0.99, 0.9, 0.4, 0.6])
    assert found.mistakes(10).tolist() == [2, 4, 0, 3]
    assert found.mistakes(2).tolist() == [2, 4]


def small_data(count=23):
    rng = np.random.default_rng(0)
    splits = [
        Arrays(
            rng.integers(0, 256, (count, 4, 4, 1), np.uint8), rng.integers(0, 3, count, np.int32)
        )
        for _ in range(2)
    ]
    config = small_mlp(**{"data.image_size": 4})
    return build_data(config, Source(NAMES, *splits)), splits[1]


@pytest.mark.parametrize("replicas, batch", [(1, 8), (2, 8), (2, 46), (1, 23)])
def test_predictions_are_in_the_order_of_the_split(replicas, batch):
    data, split = small_data()
    strategy = make_strategy("mirrored", replicas)
    with strategy.scope():
        models = [SigmoidMLP(classes=3, input_shape=data.input_shape, units=(5,)) for _ in range(2)]
    evaluate = Evaluator(models, data, strategy, batch)
    for _ in range(2):  # A second evaluation starts anew.
        results = evaluate()
    images, _, weights = next(iter(data.validation_batches(make_strategy("one_device"), 23)[0]))
    assert np.all(weights == 1)
    each = [tf.nn.softmax(model(images)).numpy() for model in models]
    for found, metrics, expected in zip(
        evaluate.predictions, results, [*each, np.mean(each, axis=0)], strict=True
    ):
        np.testing.assert_array_equal(found.indices, np.arange(23))
        np.testing.assert_array_equal(found.labels, split.labels)
        np.testing.assert_array_equal(found.classes, expected.argmax(-1))
        np.testing.assert_allclose(found.probabilities, expected.max(-1), rtol=1e-5)
        assert np.mean(found.labels == found.classes) == pytest.approx(metrics["accuracy"])
        assert metrics["balanced_accuracy"] == pytest.approx(found.balanced_accuracy())


def test_examples_are_read_by_position(tmp_path):
    data, split = small_data()
    name, image = data.read_validation_example(7)
    assert name == "example 7" and image.shape == (4, 4, 1)
    images, *_ = next(iter(data.validation_batches(make_strategy("one_device"), 23)[0]))
    np.testing.assert_array_equal(image, images[7])
    for folder, colour in {"train/a": 10, "train/b": 200, "validation/a": 10}.items():
        (tmp_path / folder).mkdir(parents=True)
        keras.utils.save_img(tmp_path / folder / "x.png", np.full((9, 9, 3), colour), scale=False)
    (tmp_path / "validation" / "b").mkdir()
    keras.utils.save_img(tmp_path / "validation/b/y.png", np.full((9, 9, 3), 200), scale=False)
    settings = small_mlp().data
    settings.update(name="folder", data_dir=str(tmp_path), image_size=8, train_split="train")
    data = pipeline.open_data(settings, seed=0)
    name, image = data.read_validation_example(1)
    assert name.endswith("validation/b/y.png") and image.mean() > 0


def read_csv(path):
    return list(csv.reader(io.StringIO(path.read_text(), newline="")))


def test_a_run_writes_the_report_and_evaluate_prints_it(tmp_path):
    last = train_and_evaluate(
        small_mlp(**{"evaluation.per_class": True, "train.steps": 4}), tmp_path
    )
    folder = Workdir(tmp_path).classes
    rows = read_csv(folder / "per_class.csv")
    assert rows[0] == ["class", "images", "accuracy", "taken_for", "times"] and len(rows) == 11
    accuracies = [float(row[2]) for row in rows[1:]]
    assert last["validation/balanced_accuracy"] == pytest.approx(np.mean(accuracies))
    confusion = np.array([row[1:] for row in read_csv(folder / "confusion.csv")[1:]], int)
    assert confusion.sum() == last["validation/examples"]
    assert np.trace(confusion) / confusion.sum() == pytest.approx(last["validation/accuracy"])
    mistakes = read_csv(folder / "mistakes.csv")[1:]
    probabilities = [float(row[3]) for row in mistakes]
    assert probabilities == sorted(probabilities, reverse=True) and len(mistakes) == 24
    for name in ("confusion.png", "mistakes.png"):
        assert tf.io.decode_png((folder / name).read_bytes()).shape[0] > 100
    [row] = evaluate_networks([tmp_path], per_class=True)
    assert [r["accuracy"] for r in row["per_class"]] == pytest.approx(accuracies)
    assert "most often predicted as" in format_error_rates([row])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_names_can_be_drawn(count, tmp_path):
    names = ("$x", "a" * 300, "two\nlines", "bad\udcff", "日本 🐱", "", "<b>")[: max(2, count)]
    image = np.zeros((4, 4, 3), np.float32)
    mistakes = [Mistake(f"/x/{n}", image, n, n, 0.5) for n in names[:count]]
    save_picture(draw_mistakes(mistakes, binary=False), tmp_path / "mistakes.png")
    save_picture(
        draw_confusion(names, np.ones([len(names)] * 2, np.int64)), tmp_path / "confusion.png"
    )


def test_titles_of_the_gallery_fit_their_columns_and_missing_characters_are_numbers():
    names = ["Golden_Retriever_" * 9, "日本語のクラス名です", "🐸"]
    image = np.zeros((4, 4, 3), np.float32)
    mistakes = [Mistake(f"/x/{'w' * 90}.jpg", image, n, n, 1.0) for n in names]
    figure = draw_mistakes(mistakes, binary=False)
    figure.draw_without_rendering()
    column = figure.bbox.width / len(names)
    for title, name in zip(figure.texts, names, strict=True):
        assert title.get_window_extent().width <= column
        assert title.get_text().startswith("ww") and title.get_text().split("\n")[0].endswith(
            ".jpg"
        )
        drawn = {character for character in title.get_text() if ord(character) > 0x2FFF}
        assert not drawn or name in title.get_text()
