"""What a format cannot say of a config, kept in the manifest for the way back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import MistralConfig, rope
from ..disk import limits, strict_json
from ..disk.into import MANIFEST
from ..errors import CorruptCheckpointError

MAX_MANIFEST_BYTES = limits.MANIFEST_BYTES


def config(directory: Path, told: Mapping[str, Any]) -> MistralConfig:
    """The config of a manifest, if there is one, with the fields that the format's own files tell.

    Where both describe the same windows or the same rotation in other words, the manifest's words are kept; a format
    that tells no model type says nothing of how queries are scaled.
    """
    own = MistralConfig(**told)
    path = directory / MANIFEST
    if not path.exists():
        return own
    manifest = strict_json.read_object(path, error=CorruptCheckpointError, max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(manifest.get("config"), dict):
        return own
    kept = MistralConfig.from_dict(manifest["config"], where=str(path))
    changes = dict(told)
    if kept.layer_windows == own.layer_windows:
        changes = _without(changes, "sliding_window", "layer_types")
    else:
        changes.setdefault("layer_types", None)
    same_queries = "model_type" not in told or rope.query_scaling(kept) == rope.query_scaling(own)
    if same_queries and kept.head_dim == own.head_dim and rope.rotary_table(kept) == rope.rotary_table(own):
        changes = _without(changes, "rope_theta", "rope_scaling", "model_type")
    else:
        changes.setdefault("rope_scaling", None)
    return kept.replace(**changes)


def _without(changes: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name not in names}
