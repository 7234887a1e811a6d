"""The specification: a whole Mistral in float64 NumPy, written to be read; slow on purpose, used by every proof."""
