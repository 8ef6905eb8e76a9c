"""Evaluates the latest checkpoint of a run on its validation set.

Without --config it goes by the run's own. The numbers go to standard output as JSON.

Example:
  python -m launch.evaluate --workdir=runs/mnist_bn
"""

import json

from launch import cli

_CONFIG = cli.define_config(required=False)
_WORKDIR = cli.define_workdir()


def main() -> None:
    """Evaluates what the flags say and prints the result as JSON."""
    from bn_keras.evaluate import evaluate_workdir

    print(json.dumps(evaluate_workdir(_WORKDIR.value, _CONFIG.value)))


if __name__ == "__main__":
    cli.run(main)
