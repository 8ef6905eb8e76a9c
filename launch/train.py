"""Trains a network, or goes on with a run that was stopped.

Example:
  python -m launch.train --config=configs/mnist_bn.py --workdir=runs/mnist_bn
"""

from absl import logging

from launch import cli

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()


def main() -> None:
    """Trains what the flags say and prints the run's last numbers."""
    from bn_keras.train import train_and_evaluate

    last = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    logging.info(
        "step %d: validation accuracy %.4f, loss %.4f; the run is in %s",
        last["step"],
        last["validation/accuracy"],
        last["validation/loss"],
        _WORKDIR.value,
    )


if __name__ == "__main__":
    cli.run(main)
