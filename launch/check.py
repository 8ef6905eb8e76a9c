"""Checks the BatchNormalization layers of a run's network and prints the findings.

Each line says what a finding means and what to do; a fault makes inference wrong or a layer
useless, a note may be intended. The exit status is 1 if there are faults, and 0 otherwise.

Example:
  bn-keras check --workdir=runs/mnist_bn
"""

import dataclasses
import json
import sys

from absl import flags

from . import cli

_WORKDIR = cli.define_workdir()
_BATCHES = flags.DEFINE_integer(
    "batches",
    20,
    "Training batches to run the network on; 0 checks only the weights.",
    lower_bound=0,
)
_JSON = flags.DEFINE_boolean("json", False, "Print all findings and measurements as JSON.")


def main() -> None:
    """Checks the network and prints the report."""
    from bn_keras.inference.run_check import check_workdir

    batches = str(_BATCHES.value or "none, only weights")
    cli.log_lines({"network": _WORKDIR.value, "batches": batches})
    report = check_workdir(_WORKDIR.value, _BATCHES.value)
    if _JSON.value:
        values = {"has_faults": report.has_faults} | dataclasses.asdict(report)
        print(json.dumps(values, indent=2, allow_nan=False))
    else:
        print(report)
    if report.has_faults:
        sys.exit(1)


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
