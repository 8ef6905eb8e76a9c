r"""Exports the network of a run as a .keras, TFLite or ONNX file, or as a SavedModel.

The export is read back and compared with the network before it is moved to --output. It contains
the class names and describes the preprocessing. A .keras file maps preprocessed images to logits. A
SavedModel also maps JPEG, PNG, BMP, GIF or WebP files to probabilities and the most probable class.
TFLite maps preprocessed images to probabilities, with TFLite metadata. ONNX maps them to logits and
probabilities, and needs the extra "onnx".

--quantize=int8 makes a TFLite file of 8-bit integers. It needs the run's data: training images to
find the ranges of the activations, and validation images to report the accuracy before and after.

Examples:
  bn-keras export --workdir=runs/bn_x30 --output=bn_x30.keras --fold
  bn-keras export --workdir=runs/a --output=net/1 --format=saved_model
  bn-keras export --workdir=runs/a --output=a.tflite --format=tflite \
      --quantize=int8
"""

from absl import flags

from . import cli

_WORKDIR = cli.define_workdir()
_OUTPUT = flags.DEFINE_string(
    "output", None, "Output file, or folder for a SavedModel.", required=True
)
_FORMAT = flags.DEFINE_enum(
    "format", "keras", ["keras", "saved_model", "tflite", "onnx"], "Format of the output."
)
_FOLD = flags.DEFINE_bool("fold", False, "Fold batch normalization into the preceding layers.")
_BEST = flags.DEFINE_bool("best", False, "Export the run's network of highest validation accuracy.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing export.")
_QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8"], "Quantization, of tflite only.")
_NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples", 200, "Training images for the quantization.", lower_bound=1
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "Folder of the run's data, if it has moved; for the quantization."
)
_VALIDATION_SPLIT = flags.DEFINE_string(
    "validation_split",
    "",
    "Split that the quantized network is evaluated on; the run's by default.",
)


def main() -> None:
    """Exports the network and prints a report."""
    from bn_keras.inference.exporter import export_workdir

    kind = [_FORMAT.value] + ["folded"] * _FOLD.value
    kind += [_QUANTIZE.value] if _QUANTIZE.value != "none" else []
    cli.log_lines({"network": _WORKDIR.value, "output": f"{_OUTPUT.value}, {', '.join(kind)}"})
    report = export_workdir(
        _WORKDIR.value,
        _OUTPUT.value,
        _FORMAT.value,
        fold=_FOLD.value,
        overwrite=_OVERWRITE.value,
        best=_BEST.value,
        quantize=_QUANTIZE.value,
        num_examples=_NUM_EXAMPLES.value,
        data_dir=_DATA_DIR.value,
        validation_split=_VALIDATION_SPLIT.value,
    )
    print(report)


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
