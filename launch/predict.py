"""Predicts the five most probable classes of each image.

Accepts JPEG, PNG, BMP and GIF files. An unreadable image is reported on one line, the remaining
images are still processed, and the exit status is 2. Classes are named as in the data set: TFDS's
imagenet2012 uses WordNet ids, such as n01440764 for the tench.

Examples:
  bn-keras predict --workdir=runs/bn_x30 photograph.jpg
  bn-keras predict --workdir=runs/a --workdir=runs/b --crops=144 *.jpg
"""

import json
import sys

from absl import flags

from . import cli

_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", None, "Folder of a run; repeat it for each member of an ensemble.", required=True
)
_CROPS = flags.DEFINE_string("crops", "1", "Crops per image: see `bn-keras evaluate --help`.")
_BEST = flags.DEFINE_bool("best", False, "Use each run's network of highest validation accuracy.")
_JSON = flags.DEFINE_bool("json", False, "Print each image as a line of JSON.")


def main(images: list[str]) -> None:
    """Prints the predictions for all images."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.errors import BucketUnavailableError, StorageError, UsageError
    from bn_keras.inference.prediction import make_predictor

    cli.log_lines({"networks": ", ".join(_WORKDIRS.value), "crops": _CROPS.value})
    predict = make_predictor(_WORKDIRS.value, Crops.parse(_CROPS.value), best=_BEST.value)
    failed = False
    for image in images:
        try:
            predictions = predict(image)
        except BucketUnavailableError:
            # Each further image would take minutes.
            raise
        except (UsageError, StorageError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        if _JSON.value:
            top5 = [{"class": p.class_name, "probability": p.probability} for p in predictions]
            print(json.dumps({"image": image, "top5": top5}))
        else:
            lines = [f"{p.probability:8.2%}  {p.class_name}" for p in predictions]
            print("\n".join([image, *lines]), flush=True)
    if failed:
        sys.exit(2)


COMMAND = cli.Command(__name__, main, positional="IMAGE")

if __name__ == "__main__":
    COMMAND.run()
