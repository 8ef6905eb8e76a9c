"""Runs `bn-keras slurm` as `python -m launch.slurm`."""

from . import COMMAND

COMMAND.run()
