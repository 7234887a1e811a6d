"""GGUF files: the container, and a Mistral's config and tokenizer as its keys."""
