"""Accuracy by class, the confusion matrix, and the most confident mistakes of a network."""

import csv
import functools
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from etils import epath

from bn_keras import storage
from bn_keras.data.pipeline import Data
from bn_keras.text import first_of, on_one_line, table

# Classes with fewer images are named: one image changes their accuracy by a tenth or more.
_FEW_IMAGES = 10
# Mistakes in the gallery.
_GALLERY_SIZE = 24


class Predictions(NamedTuple):
    """The most probable class of each readable validation image.

    Attributes:
      indices: int64 [n], positions of the images in the validation split.
      labels: int64 [n], true classes.
      classes: int64 [n], predicted classes.
      probabilities: float32 [n], predicted probabilities of the predicted classes.
    """

    indices: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    def balanced_accuracy(self) -> float:
        """Returns the mean of the accuracies of all classes that have images."""
        counts = np.bincount(self.labels)
        hits = np.bincount(self.labels[self.labels == self.classes], minlength=len(counts))
        present = counts > 0
        return float(np.mean(hits[present] / counts[present]))


class ClassRow(TypedDict):
    """The result for one class; a class without images has no accuracy."""

    label: str
    images: int
    accuracy: float | None
    taken_for: NotRequired[str]
    times: NotRequired[int]


class ClassReport:
    """Accuracy by class, the confusion matrix, and the most confident mistakes.

    Args:
      class_names: name of each class, in order.
      predictions: predictions for a split.

    Attributes:
      class_names, predictions: as passed.
      confusion: int64 [classes, classes], numbers of images by true class (row) and predicted class
        (column).
    """

    def __init__(self, class_names: Sequence[str], predictions: Predictions) -> None:
        self.class_names = tuple(class_names)
        self.predictions = predictions
        self.confusion = np.zeros([len(class_names)] * 2, np.int64)
        np.add.at(self.confusion, (predictions.labels, predictions.classes), 1)

    def rows(self) -> list[ClassRow]:
        """Returns the result for each class, with the class it is most often predicted as."""
        rows: list[ClassRow] = []
        for number, (name, counts) in enumerate(zip(self.class_names, self.confusion, strict=True)):
            images, hits = int(counts.sum()), int(counts[number])
            row = ClassRow(label=name, images=images, accuracy=hits / images if images else None)
            if hits < images:
                other = int(np.argmax(np.where(np.arange(len(counts)) == number, -1, counts)))
                row |= {"taken_for": self.class_names[other], "times": int(counts[other])}
            rows.append(row)
        return rows

    def mistakes(self, limit: int) -> np.ndarray:
        """Returns which predictions are wrong, the most confident first, at most `limit`."""
        found = self.predictions
        [wrong] = np.nonzero(found.labels != found.classes)
        order = np.argsort(-found.probabilities[wrong], kind="stable")
        return wrong[order][:limit]

    def name_rare_classes(self) -> list[str]:
        """Returns lines that name the classes with no or few images."""
        counts = self.confusion.sum(axis=1)
        return name_rare_classes(self.class_names, counts, "validation", "to measure an accuracy")


def name_rare_classes(
    class_names: Sequence[str], counts: Sequence[int] | np.ndarray, split: str, purpose: str
) -> list[str]:
    """Returns lines that name the classes with no or few images.

    Args:
      class_names: name of each class, in order.
      counts: number of images of each class.
      split: "training" or "validation".
      purpose: what few images do not suffice for, such as "to measure an accuracy".
    """
    sizes = list(zip(map(on_one_line, class_names), counts, strict=True))
    absent = [name for name, count in sizes if count == 0]
    few = [f"{name} ({count})" for name, count in sizes if 0 < count < _FEW_IMAGES]
    lines = []
    if absent:
        lines.append(f"no {split} image of: {first_of(absent, limit=10)}")
    if few:
        lines.append(
            f"fewer than {_FEW_IMAGES} {split} images, too few {purpose}: {first_of(few, limit=10)}"
        )
    return lines


def format_classes(rows: Sequence[ClassRow]) -> str:
    """Formats the result of each class as a table."""
    header = ["class", "images", "accuracy", "most often predicted as"]
    cells = [
        [
            row["label"],
            f"{row['images']:,}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
            f"{row['taken_for']} ({row['times']})" if "taken_for" in row else "",
        ]
        for row in rows
    ]
    return "\n".join(table([header, *cells]))


def write_class_report(folder: epath.Path, report: ClassReport, data: Data) -> None:
    """Writes per_class.csv, confusion.csv, confusion.png, mistakes.csv and mistakes.png.

    Args:
      folder: folder of the files, local or in a bucket.
      report: report on the validation split of `data`.
      data: data set with the images of the mistakes.

    Raises:
      StorageError: a file cannot be written.
    """
    # matplotlib takes a while to import, and only this needs it.
    from bn_keras.pictures.classes import Mistake, draw_confusion, draw_mistakes
    from bn_keras.pictures.picture_file import save_picture

    names, found = report.class_names, report.predictions
    wrong = report.mistakes(_GALLERY_SIZE)
    mistakes = [
        Mistake(
            *data.read_validation_example(int(found.indices[i])),
            names[found.labels[i]],
            names[found.classes[i]],
            float(found.probabilities[i]),
        )
        for i in wrong
    ]
    rows = [
        [row["label"], row["images"], row["accuracy"], row.get("taken_for"), row.get("times")]
        for row in report.rows()
    ]
    write = functools.partial(_write_csv, folder)
    with storage.writing(f"the report on the classes in {folder}"):
        storage.make_folder(folder)
        write("per_class.csv", ["class", "images", "accuracy", "taken_for", "times"], rows)
        write(
            "confusion.csv",
            ["true class", *names],
            ([name, *counts] for name, counts in zip(names, report.confusion, strict=True)),
        )
        write(
            "mistakes.csv",
            ["image", "true class", "predicted class", "probability"],
            ([m.name, m.label, m.predicted, f"{m.probability:.4f}"] for m in mistakes),
        )
    save_picture(draw_confusion(names, report.confusion), folder / "confusion.png")
    save_picture(draw_mistakes(mistakes, data.preprocessing.binary), folder / "mistakes.png")


def _write_csv(
    folder: epath.Path, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    # A file name need not be UTF-8; Python then decodes it to surrogates.
    storage.write_atomically(folder / name, text.getvalue().encode(errors="backslashreplace"))
