"""Containers of weights: a header that leads to the bytes of named arrays, whatever the names mean."""
