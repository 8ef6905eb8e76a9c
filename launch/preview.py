"""Draws what the network is fed: training examples by strength of distortion, and validation.

Example:
  python -m launch.preview --config=configs/cifar10_bn_x5.py --output=fed.png
"""

from absl import flags

from launch import cli

_CONFIG = cli.define_config()
_OUTPUT = flags.DEFINE_string("output", None, "The picture to write, a .png.", required=True)
_EXAMPLES = flags.DEFINE_integer("examples", 8, "How many training and validation examples.")


def main() -> None:
    """Writes the picture."""
    from bn_keras.plan import describe
    from bn_keras.preview import write_preview

    data = describe(_CONFIG.value)["data"]
    cli.tell({"config": cli.describe_config(), "data": data, "output": _OUTPUT.value})
    write_preview(_CONFIG.value, _OUTPUT.value, _EXAMPLES.value)
    print(f"The picture is {_OUTPUT.value}.")


if __name__ == "__main__":
    cli.run(main)
