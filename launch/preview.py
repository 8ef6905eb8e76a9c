"""Draws the augmented input: training examples by strength of distortion, and validation examples.

Example:
  bn-keras preview --config=cifar10_bn_x5 --output=preview.png
"""

from absl import flags

from . import cli

_CONFIG = cli.define_config()
_OUTPUT = flags.DEFINE_string("output", None, "Output picture, such as x.png.", required=True)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 8, "Number of training examples, and of validation examples.", lower_bound=1
)


def main() -> None:
    """Writes the picture."""
    from bn_keras.pictures.augmented_input import write_preview
    from bn_keras.training.plan import describe_input

    config = _CONFIG.config
    data = describe_input(config)["data"]
    cli.log_lines({"config": str(_CONFIG), "data": data, "output": _OUTPUT.value})
    write_preview(config, _OUTPUT.value, _EXAMPLES.value)
    print(f"wrote {_OUTPUT.value}")


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
