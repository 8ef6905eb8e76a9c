"""Draws the crops that an image is evaluated by, for a look at what the network is shown.

Examples:
  python -m launch.crops --output=crops.png photograph.jpg
  python -m launch.crops --output=crops.png --crops=10 --size=32 photograph.jpg
"""

from absl import flags

from . import cli

_OUTPUT = flags.DEFINE_string("output", None, "Picture to write, such as x.png.", required=True)
_CROPS = flags.DEFINE_string("crops", "144", "Crops, as launch.evaluate takes them.")
_SIZE = flags.DEFINE_integer("size", 224, "Side of the network's input.", lower_bound=1)


def main(images: list[str]) -> None:
    """Draws what the flags say."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.pictures.crop_sheet import draw_crops

    if len(images) > 1:
        cli.fail(f"unexpected argument {images[1]!r}: the crops of one image are drawn", 2)
    cli.log_lines({"image": images[0], "crops": f"{_CROPS.value}, of {_SIZE.value} pixels"})
    draw_crops(images[0], Crops.parse(_CROPS.value), _SIZE.value, _OUTPUT.value)
    print(f"The picture is {_OUTPUT.value}.")


COMMAND = cli.Command(__name__, main, positional="IMAGE")

if __name__ == "__main__":
    COMMAND.run()
