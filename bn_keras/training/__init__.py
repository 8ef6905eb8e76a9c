"""Training: the config, the schedule, the step and the loop around it."""
