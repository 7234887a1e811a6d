"""Chat templates are rendered in a process of their own, which has limits of time and memory.

transformers, vLLM and mlx-lm render them in their own process, by jinja2's sandbox. That sandbox keeps a template away
from Python's insides, but not from looping for ever or from filling the memory, and a template is a stranger's program.
"""
