"""Data sets, preprocessing and the input pipeline."""
