"""The paper's experiments: which runs each takes, and how they are run."""
