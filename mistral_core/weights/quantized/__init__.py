"""Packed matrices of quantised checkpoints, given as floats."""
