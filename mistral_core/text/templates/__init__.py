"""Chat templates in jinja: a checkpoint's own, rendered in a sandbox, and the one that is saved where there is none."""
