"""Writes another project's weights of BN-Inception as a Keras model.

These are the PyTorch ports of pytorchcv and Cadene's pretrainedmodels (.pth, or .npz where PyTorch
is not installed) and TF-Slim's inception_v2. The log tells what images the network takes.

Examples:
  python -m launch.convert --weights=inception_v2.ckpt --output=slim.keras
  python -m launch.convert --weights=bninception.pth --output=caffe.weights.h5
"""

from absl import flags

from . import cli

_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "File of PyTorch's (.npz, .pth, .pt, .tar), or a TensorFlow checkpoint: its prefix, one of its"
    " files or its folder.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "File to write, ending in .keras or .weights.h5.", required=True
)
_SOURCE = flags.DEFINE_enum(
    "source", None, ["pytorch", "slim"], "Whose weights they are; without it, the ending tells."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an output that is there.")


def main() -> None:
    """Converts what the flags name."""
    from bn_keras.convert import convert_weights

    cli.log_lines({"weights": _WEIGHTS.value, "output": _OUTPUT.value})
    convert_weights(_WEIGHTS.value, _OUTPUT.value, _SOURCE.value, overwrite=_OVERWRITE.value)


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
