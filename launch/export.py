"""Writes the network of a run as a .keras file, a SavedModel or a TFLite file.

What is written is read again and compared with the network before it stands at --output.

Examples:
  python -m launch.export --workdir=runs/bn_x30 --output=bn_x30.keras --fold
  python -m launch.export --workdir=runs/a --output=net/1 --format=saved_model
"""

from absl import flags

from . import cli

_WORKDIR = cli.define_workdir()
_OUTPUT = flags.DEFINE_string(
    "output", None, "File, or folder of a SavedModel, to write.", required=True
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "keras",
    ["keras", "saved_model", "tflite"],
    "keras (images to logits), saved_model (JPEG files to probabilities, too) or tflite.",
)
_FOLD = flags.DEFINE_bool("fold", False, "Fold batch normalization into the layers before it.")
_BEST = flags.DEFINE_bool(
    "best", False, "Take the network of the run's best evaluation in place of the last one."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an output that is there.")


def main() -> None:
    """Exports what the flags say and prints what came of it."""
    from bn_keras.inference.exporter import export_workdir

    form = f"{_FORMAT.value}, folded" if _FOLD.value else _FORMAT.value
    cli.log_lines({"network": _WORKDIR.value, "output": f"{_OUTPUT.value}, {form}"})
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
