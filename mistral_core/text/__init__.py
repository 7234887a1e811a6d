"""Text to token ids and back: tokenizers and streams of text."""
