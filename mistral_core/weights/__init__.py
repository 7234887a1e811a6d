"""Weights on disk: safe writes, safetensors checkpoints, their manifest, and the hub, with no framework."""
