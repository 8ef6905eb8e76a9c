"""Devices and clusters: the only place that names a strategy class."""
