"""Examines the BatchNormalization layers of a run's network: a table of what is wrong with them.

Nothing wrong is one line. Status 1 says that there is a fault; notes alone leave it at 0.

Example:
  python -m launch.check --workdir=runs/mnist_bn
"""

import dataclasses
import json
import sys

from absl import flags

from . import cli

_WORKDIR = cli.define_workdir()
_BATCHES = flags.DEFINE_integer(
    "batches", 20, "Training batches to run the network on; 0 looks at the weights alone."
)
_JSON = flags.DEFINE_boolean("json", False, "Everything that was found and measured, as JSON.")


def main() -> None:
    """Examines what the flags say and prints the report."""
    from bn_keras.inference.run_check import check_workdir

    batches = _BATCHES.value or "none: the weights alone"
    cli.log_lines({"network": _WORKDIR.value, "batches": f"{batches}"})
    report = check_workdir(_WORKDIR.value, _BATCHES.value)
    if _JSON.value:
        everything = {"has_faults": report.has_faults} | dataclasses.asdict(report)
        print(json.dumps(everything, indent=2, allow_nan=False))
    else:
        print(report)
    if report.has_faults:
        sys.exit(1)


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
