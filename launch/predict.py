"""Predicts the most probable classes of images.

Accepts JPEG, PNG, BMP, GIF and WebP files, folders, which are searched recursively, and with --list
files with one path per line; all may be in a bucket (gs://). An unreadable image is reported on one
line, or is a row with the reason in --output; the remaining images are still processed, and the
exit status is 2. Classes are named as in the data set: TFDS's imagenet2012 uses WordNet ids, such
as n01440764 for the tench.

--output writes a table instead of printing: FILE.csv, or FILE.jsonl with one JSON object per
line. The file appears once all images are predicted.

Examples:
  bn-keras predict --workdir=runs/bn_x30 photograph.jpg
  bn-keras predict --workdir=runs/a --workdir=runs/b --crops=144 *.jpg
  bn-keras predict --workdir=runs/pets --output=classes.csv --top_k=0 pictures
"""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from . import cli
from .command_error import CommandError

if TYPE_CHECKING:
    from bn_keras.inference.prediction import ImagePrediction

_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", None, "Folder of a run; repeat it for each member of an ensemble.", required=True
)
_CROPS = flags.DEFINE_string("crops", "1", "Crops per image: see `bn-keras evaluate --help`.")
_BEST = flags.DEFINE_bool("best", False, "Use each run's network of highest validation accuracy.")
_LISTS = flags.DEFINE_multi_string("list", [], "File with one image path per line.")
_TOP_K = flags.DEFINE_integer(
    "top_k", 5, "Classes per image, the most probable ones; 0: all.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string("output", "", "Table to write: FILE.csv or FILE.jsonl.")
_JSON = flags.DEFINE_bool("json", False, "Print each image as a line of JSON.")


def main(arguments: list[str]) -> None:
    """Prints or writes the predictions for all images."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.inference.prediction import find_images, make_predictor
    from bn_keras.training.progress import progress_bar

    if not (arguments or _LISTS.value):
        raise CommandError("IMAGE is missing: see --help")
    extension = os.path.splitext(_OUTPUT.value)[1].lower()
    if _OUTPUT.value and extension not in (".csv", ".jsonl"):
        raise CommandError(f"--output={_OUTPUT.value} is invalid: expected FILE.csv or FILE.jsonl")
    images = find_images(arguments, _LISTS.value)
    if not images:
        raise CommandError(
            f"--list={','.join(_LISTS.value)} names no images: expected one path per line"
        )
    cli.log_lines(
        {
            "networks": ", ".join(_WORKDIRS.value),
            "crops": _CROPS.value,
            "images": f"{len(images):,}",
        }
    )
    predict = make_predictor(_WORKDIRS.value, Crops.parse(_CROPS.value), _TOP_K.value, _BEST.value)
    writes_table = bool(_OUTPUT.value)
    unreadable = 0
    with (
        _open_output(extension, predict.class_names) as write,
        progress_bar("predicting", len(images), unit=" images", is_shown=writes_table) as bar,
    ):
        for image in predict.predict_all(images):
            unreadable += bool(image.error)
            write(image)
            bar.update()
    if unreadable:
        if _OUTPUT.value:
            print(
                f"error: {unreadable:,} of {len(images):,} images are unreadable", file=sys.stderr
            )
        sys.exit(2)


@contextlib.contextmanager
def _open_output(
    extension: str, class_names: Sequence[str]
) -> Iterator[Callable[["ImagePrediction"], None]]:
    """Yields a function that prints an image's predictions, or writes them into --output."""
    from bn_keras import storage

    if not extension:
        yield _print
        return
    with storage.replacing(_OUTPUT.value) as path:

        def append(line: str) -> None:
            # Closed after each line, so that a full disk is noticed where it is reported. A file
            # name need not be UTF-8; Python then decodes it to surrogates.
            form: Any = dict(newline="", encoding="utf-8", errors="backslashreplace")
            with storage.writing(f"output {_OUTPUT.value}"), open(path, "a", **form) as file:
                file.write(line)

        if extension == ".jsonl":
            yield lambda image: append(_to_json(image) + "\n")
            return
        append(_csv_line("image", "error", *_csv_columns(class_names)))
        yield lambda image: append(
            _csv_line(image.path, image.error, *_csv_values(image, class_names))
        )


def _csv_line(*values: object) -> str:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(values)
    return line.getvalue()


def _csv_columns(class_names: Sequence[str]) -> Sequence[str]:
    """Returns a column for each class with --top_k=0, else pairs of columns for the top classes."""
    if _TOP_K.value == 0:
        # Two columns must not have the same name.
        return [f"class {n}" if n in ("image", "error") else n for n in class_names]
    numbers = range(1, min(_TOP_K.value, len(class_names)) + 1)
    return [name for i in numbers for name in (f"class_{i}", f"probability_{i}")]


def _csv_values(image: "ImagePrediction", class_names: Sequence[str]) -> list[object]:
    if _TOP_K.value == 0:
        found = dict(image.classes)
        return [found.get(name, "") for name in class_names]
    return [value for prediction in image.classes for value in prediction]


def _print(image: "ImagePrediction") -> None:
    if image.error:
        print(f"error: {image.error}", file=sys.stderr)
    elif _JSON.value:
        print(_to_json(image))
    else:
        lines = [f"{p.probability:8.2%}  {p.class_name}" for p in image.classes]
        print("\n".join([image.path, *lines]), flush=True)


def _to_json(image: "ImagePrediction") -> str:
    if image.error:
        return json.dumps({"image": image.path, "error": image.error})
    found = [{"class": p.class_name, "probability": p.probability} for p in image.classes]
    return json.dumps({"image": image.path, "predictions": found})


COMMAND = cli.Command(__name__, main, positional="IMAGE", optional=True)

if __name__ == "__main__":
    COMMAND.run()
