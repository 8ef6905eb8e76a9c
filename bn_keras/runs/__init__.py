"""What a run writes and reads: its folder, checkpoints, metrics and environment."""
