"""Prepares ImageNet for training from its official archives. Takes a few hours, once.

Example:
  bn-keras prepare --manual_dir=archives --data_dir=tfds
"""

from absl import flags

from . import cli

_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir",
    None,
    "Folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.",
    required=True,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    "",
    "Folder for the prepared data set, as in --config.data.data_dir; without it, TFDS's default.",
)


def main() -> None:
    """Prepares the data set and prints its folder."""
    from bn_keras.data.imagenet import prepare_imagenet

    folder = _DATA_DIR.value or "TFDS's default folder"
    cli.log_lines({"archives": _MANUAL_DIR.value, "output": f"imagenet2012 in {folder}"})
    print(f"imagenet2012 is in {prepare_imagenet(_MANUAL_DIR.value, _DATA_DIR.value)}")


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
