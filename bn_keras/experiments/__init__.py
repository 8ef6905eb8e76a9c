"""The paper's experiments: configs of their runs, and parallel training."""
