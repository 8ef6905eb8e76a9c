"""Evaluates networks on a validation set, by themselves and as an ensemble.

Of each run it takes the network as it was finished, or the latest checkpoint, or with --best the
one that was evaluated with the highest accuracy; --model takes what launch.export has written, a
.keras file or a SavedModel. Without --config it goes by the first run's own. The errors go to
standard output as a table like the paper's Figure 4.

--crops is 1 for the single crop, 10 for the corners and the centre with their mirror images, 144
for GoogLeNet's, or scales x squares x windows x mirrors: 10 is 1x1x5x2, and 144 is 4x3x6x2.

Examples:
  python -m launch.evaluate --workdir=runs/mnist_bn
  python -m launch.evaluate --workdir=runs/a --workdir=runs/b --crops=1,144
  python -m launch.evaluate --config=configs/bn_x30.py --model=bn_x30.keras
"""

import json

from absl import flags

from . import cli

_CONFIG = cli.define_config(required=False)
_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", [], "Folder of a run; repeated, those of an ensemble's members."
)
_MODELS = flags.DEFINE_multi_string("model", [], "An exported network; repeated, more members.")
_CROPS = flags.DEFINE_list("crops", ["1"], "Crops of each image, one or more of such numbers.")
_BEST = flags.DEFINE_bool(
    "best", False, "Takes each run's network of its best evaluation in place of the last one."
)
_JSON = flags.DEFINE_bool("json", False, "Prints a line of JSON for each row of the table instead.")


def main() -> None:
    """Evaluates what the flags say and prints the result."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.inference.evaluation import evaluate_networks, format_errors
    from bn_keras.runs.workdir import Workdir
    from bn_keras.training.plan import describe

    if not _WORKDIRS.value + _MODELS.value:
        cli.fail("--workdir or --model is missing: see --help", 2)
    crops = [Crops.parse(text) for text in _CROPS.value]
    config, given_by = _CONFIG.value, str(_CONFIG)
    if config is None and _WORKDIRS.value:
        given_by = f"that of {_WORKDIRS.value[0]}"
        config = Workdir(_WORKDIRS.value[0]).read_config()
    cli.log_lines(
        {"networks": ", ".join(_WORKDIRS.value + _MODELS.value), "config": given_by}
        | (describe(config) if config else {})
        | {"crops": ", ".join(_CROPS.value)}
    )
    rows = evaluate_networks(_WORKDIRS.value, _CONFIG.value, crops, _MODELS.value, _BEST.value)
    print("\n".join(map(json.dumps, rows)) if _JSON.value else format_errors(rows))


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
