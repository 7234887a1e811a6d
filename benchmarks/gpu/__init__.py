"""What a GPU is asked: one command that measures all of it in parts, each a process of its own, and writes a page.

A part is `python -m benchmarks.gpu.NAME TASK`: TASK is JSON, each line that begins with a brace is a result. What a
part has printed counts when it fails or its time is up.
"""
