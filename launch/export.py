"""Exports the network of a run as a .keras file, a SavedModel or a TFLite file.

The export is read back and compared with the network before it is moved to --output.

Examples:
  bn-keras export --workdir=runs/bn_x30 --output=bn_x30.keras --fold
  bn-keras export --workdir=runs/a --output=net/1 --format=saved_model
"""

from absl import flags

from . import cli

_WORKDIR = cli.define_workdir()
_OUTPUT = flags.DEFINE_string(
    "output", None, "Output file, or folder for a SavedModel.", required=True
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "keras",
    ["keras", "saved_model", "tflite"],
    "Each maps images to logits; saved_model also maps JPEG files to probabilities.",
)
_FOLD = flags.DEFINE_bool("fold", False, "Fold batch normalization into the preceding layers.")
_BEST = flags.DEFINE_bool("best", False, "Export the run's network of highest validation accuracy.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing export.")


def main() -> None:
    """Exports the network and prints a report."""
    from bn_keras.inference.exporter import export_workdir

    description = f"{_FORMAT.value}, folded" if _FOLD.value else _FORMAT.value
    cli.log_lines({"network": _WORKDIR.value, "output": f"{_OUTPUT.value}, {description}"})
    report = export_workdir(
        _WORKDIR.value,
        _OUTPUT.value,
        _FORMAT.value,
        fold=_FOLD.value,
        overwrite=_OVERWRITE.value,
        best=_BEST.value,
    )
    print(report)


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
