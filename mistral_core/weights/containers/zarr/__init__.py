"""Orbax directories: trees of arrays, read by tensorstore and written as plain zarr chunks."""
