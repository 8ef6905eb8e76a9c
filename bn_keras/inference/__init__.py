"""Uses of a trained network: loading, evaluation, prediction, export and a check of its BN."""
