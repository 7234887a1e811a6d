"""Flax' msgpack files."""
