"""What becomes of a trained network: loading, evaluation, prediction, export, check-up."""
