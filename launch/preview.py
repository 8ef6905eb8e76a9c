"""Draws what the network is fed: training examples by strength of distortion, and validation.

Example:
  python -m launch.preview --config=configs/cifar10_bn_x5.py --output=fed.png
"""

from absl import flags

from . import cli

_CONFIG = cli.define_config()
_OUTPUT = flags.DEFINE_string("output", None, "The picture to write, a .png.", required=True)
_EXAMPLES = flags.DEFINE_integer("examples", 8, "How many training and validation examples.")


def main() -> None:
    """Writes the picture."""
    from bn_keras.pictures.augmented_input import write_preview
    from bn_keras.training.plan import describe

    data = describe(_CONFIG.value)["data"]
    cli.log_lines({"config": str(_CONFIG), "data": data, "output": _OUTPUT.value})
    write_preview(_CONFIG.value, _OUTPUT.value, _EXAMPLES.value)
    print(f"The picture is {_OUTPUT.value}.")


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
