"""Says which classes a trained network sees in images: the five most probable of each.

Takes JPEG, PNG, BMP and GIF files. An image that can't be read is an error of its own line, the
others are looked at all the same, and the exit status is 2. Classes go by the names that the data
set has for them: those of TFDS's imagenet2012 are WordNet ids, such as n01440764 for the tench.

Examples:
  python -m launch.predict --workdir=runs/bn_x30 photograph.jpg
  python -m launch.predict --workdir=runs/a --workdir=runs/b --crops=144 *.jpg
"""

import json
import sys

from absl import flags

from . import cli

_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", None, "Folder of a run; repeated, those of an ensemble's members.", required=True
)
_CROPS = flags.DEFINE_string("crops", "1", "Crops of each image, as launch.evaluate takes them.")
_BEST = flags.DEFINE_bool(
    "best", False, "Takes each run's network of its best evaluation in place of the last one."
)
_JSON = flags.DEFINE_bool("json", False, "Prints a line of JSON for each image instead.")


def main(images: list[str]) -> None:
    """Prints what is seen in each of the images."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.errors import UsageError
    from bn_keras.inference.prediction import make_predictor

    cli.log_lines({"networks": ", ".join(_WORKDIRS.value), "crops": _CROPS.value})
    predict = make_predictor(_WORKDIRS.value, Crops.parse(_CROPS.value), best=_BEST.value)
    failed = False
    for image in images:
        try:
            best = predict(image)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        if _JSON.value:
            top5 = [{"class": p.class_name, "probability": p.probability} for p in best]
            print(json.dumps({"image": image, "top5": top5}))
        else:
            lines = [f"{p.probability:8.2%}  {p.class_name}" for p in best]
            print("\n".join([image, *lines]), flush=True)
    if failed:
        sys.exit(2)


COMMAND = cli.Command(__name__, main, positional="IMAGE")

if __name__ == "__main__":
    COMMAND.run()
