"""The room that opens files: what may be read, how much of it, and how it is written."""
