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
        # A file name need not be UTF-8; Python then decodes it to surrogates.
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            if extension == ".jsonl":
                yield lambda image: print(_to_json(image), file=file)
            else:
                yield _csv_writer(csv.writer(file), class_names)


def _csv_writer(writer: Any, class_names: Sequence[str]) -> Callable[["ImagePrediction"], None]:
    """Writes the header, and returns a function that writes a row.

    All probabilities are in a column for each class; otherwise, the most probable classes are in
    pairs of columns.
    """
    if _TOP_K.value == 0:
        writer.writerow(["image", "error", *class_names])

        def write_all(image: "ImagePrediction") -> None:
            found = dict(image.classes)
            writer.writerow([image.path, image.error, *(found.get(n, "") for n in class_names)])

        return write_all
    numbers = range(1, min(_TOP_K.value, len(class_names)) + 1)
    names = (name for i in numbers for name in (f"class_{i}", f"probability_{i}"))
    writer.writerow(["image", "error", *names])

    def write(image: "ImagePrediction") -> None:
        writer.writerow([image.path, image.error, *(v for pair in image.classes for v in pair)])

    return write


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
