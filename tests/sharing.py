"""How tests are shared out between the processes of pytest-xdist (`--dist loadgroup --no-loadscope-reorder`)."""

from __future__ import annotations

import pytest

LONGEST = (
    "test_conformance.py", "test_readme.py", "test_train_command.py", "test_editor.py", "test_generate.py",
    "test_flax_sharding.py", "test_flax_sharding_processes.py", "test_loss_chunks.py", "test_loss_parts.py",
    "test_torch_compile.py", "test_tf_strategies.py", "test_whole_prompt.py", "test_training.py",
    "test_torch_sharding.py", "test_whole_call.py",
)  # fmt: skip
"""The files that several processes begin with, or one of them would be left alone with the last of these."""


def group(items, *, root):
    """The tests of a file go to one process, for what the first of them makes is there for the others."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(root).as_posix()))


def begin_with_the_longest(items):
    """Sort tests: pytest takes a file that is named before its folder with the folder, and sorts by fixtures."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
