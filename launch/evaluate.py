"""Evaluates networks on a validation set, alone and as an ensemble.

--workdir loads the finished network of a run, or else its latest checkpoint; with --best, the
network with the highest validation accuracy. --model loads a file or SavedModel written by
`bn-keras export`. --config defaults to the config of the first run. The errors are printed as a
table like the paper's Figure 4.

Without --config, --config.KEY=VALUE overrides settings of the first run: any split of any data can
be evaluated, without training images. Classes are matched by name.

--crops: 1 is the centre crop, 10 the corners and the centre with their mirror images, 144 the crops
of GoogLeNet. Other choices are written as scales x squares x windows x mirrors: 10 is 1x1x5x2, and
144 is 4x3x6x2.

Examples:
  bn-keras evaluate --workdir=runs/mnist_bn
  bn-keras evaluate --workdir=runs/a --workdir=runs/b --crops=1,144
  bn-keras evaluate --workdir=runs/pets --per_class --config.data.data_dir=new
  bn-keras evaluate --config=bn_x30 --model=bn_x30.keras
"""

import json

from absl import flags

from . import cli, cluster_flags
from .command_error import CommandError

_CONFIG = cli.define_config(required=False)
_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", [], "Folder of a run; repeat it for each member of an ensemble."
)
_MODELS = flags.DEFINE_multi_string(
    "model", [], "Exported network; repeat it for each member of an ensemble."
)
_CROPS = flags.DEFINE_list("crops", ["1"], "Crops per image; commas separate alternatives.")
_BEST = flags.DEFINE_bool("best", False, "Use each run's network of highest validation accuracy.")
_PER_CLASS = flags.DEFINE_bool("per_class", False, "Add the accuracy of each class.")
_JSON = flags.DEFINE_bool("json", False, "Print each row of the table as a line of JSON.")
cluster_flags.define_cluster()


def main() -> None:
    """Evaluates the networks and prints their errors."""
    from bn_keras.data.multi_crop import Crops
    from bn_keras.inference.evaluation import choose_config, evaluate_networks, format_error_rates
    from bn_keras.training.plan import describe_input

    workdirs, models = _WORKDIRS.value, _MODELS.value
    if not workdirs + models:
        raise CommandError("--workdir or --model is missing: see --help")
    if not _CROPS.value:
        raise CommandError("--crops is empty: see --help")
    if not cluster_flags.apply_flags():
        return
    crops = [Crops.parse(text) for text in _CROPS.value]
    config = choose_config(_CONFIG.config, workdirs, _BEST.value)
    cli.log_lines(
        {
            "networks": ", ".join(workdirs + models),
            "config": str(_CONFIG) if _CONFIG.config else f"that of {workdirs[0]}",
        }
        | describe_input(config)
        | {"crops": ", ".join(_CROPS.value)}
    )
    rows = evaluate_networks(workdirs, config, crops, models, _BEST.value, _PER_CLASS.value)
    print("\n".join(map(json.dumps, rows)) if _JSON.value else format_error_rates(rows))


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
