"""GGUF files as a container: a header of keys and the places of tensors."""
