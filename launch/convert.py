"""Converts another project's weights of BN-Inception to a Keras model.

Supports TF-Slim's inception_v2 and the PyTorch ports in pytorchcv and Cadene's pretrainedmodels
(.pth, which requires PyTorch, or .npz). The log describes the images that the network expects.

Examples:
  bn-keras convert --weights=inception_v2.ckpt --output=slim.keras
  bn-keras convert --weights=bninception.pth --output=caffe.weights.h5
"""

from absl import flags

from . import cli

_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "PyTorch file (.npz, .pth, .pt, .tar), or TensorFlow checkpoint: its prefix, folder or one of"
    " its files.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Output file, ending in .keras or .weights.h5.", required=True
)
_SOURCE = flags.DEFINE_enum(
    "source",
    None,
    ["pytorch", "slim"],
    "Origin of the weights; inferred from the file extension by default.",
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing output.")


def main() -> None:
    """Converts the weights."""
    from bn_keras.convert import convert_weights

    cli.log_lines({"weights": _WEIGHTS.value, "output": _OUTPUT.value})
    convert_weights(_WEIGHTS.value, _OUTPUT.value, _SOURCE.value, overwrite=_OVERWRITE.value)


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
