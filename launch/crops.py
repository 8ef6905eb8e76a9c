"""Draws the crops of an image that multi-crop evaluation averages over.

Examples:
  bn-keras crops --output=crops.png photograph.jpg
  bn-keras crops --output=crops.png --crops=10 --size=32 photograph.jpg
"""

from absl import flags

from . import cli
from .command_error import CommandError

_OUTPUT = flags.DEFINE_string("output", None, "Output picture, such as x.png.", required=True)
_CROPS = flags.DEFINE_string("crops", "144", "Crops: see `bn-keras evaluate --help`.")
_SIZE = flags.DEFINE_integer("size", 224, "Side of the network's input, in pixels.", lower_bound=1)


def main(images: list[str]) -> None:
    """Writes the picture."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.pictures.crop_sheet import write_crop_sheet

    if len(images) > 1:
        raise CommandError(f"unexpected argument {images[1]!r}: expected one image")
    cli.log_lines({"image": images[0], "crops": f"{_CROPS.value}, of {_SIZE.value} pixels"})
    write_crop_sheet(images[0], Crops.parse(_CROPS.value), _SIZE.value, _OUTPUT.value)
    print(f"wrote {_OUTPUT.value}")


COMMAND = cli.Command(__name__, main, positional="IMAGE")

if __name__ == "__main__":
    COMMAND.run()
