"""The safe write by the name that the writers of weights know it by; it lies in `disk`, with all that opens files."""

from ..disk.files import (
    WEIGHT_FILES,
    PathLike,
    as_path,
    atomic_directory,
    check_bare_name,
    is_weights,
    os_errors,
    require_space,
    sync_tree,
    write_at,
    write_file,
)

__all__ = [
    "WEIGHT_FILES",
    "PathLike",
    "as_path",
    "atomic_directory",
    "check_bare_name",
    "is_weights",
    "os_errors",
    "require_space",
    "sync_tree",
    "write_at",
    "write_file",
]
