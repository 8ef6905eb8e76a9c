"""The files of a run: its folder, checkpoints, metrics and environment."""
