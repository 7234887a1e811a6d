"""Checkpoints of models that also see: which of their tensors are the text part's, and which ours have no place for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..config import MistralConfig, params_json
from ..config import towers as config_towers
from ..disk import strict_json
from ..errors import ConfigError, ConversionError, CorruptCheckpointError
from .containers.tensor_file import DTYPES, quoted
from .contents import Contents


class Whole(NamedTuple):
    """How a family of formats names the tensors of a model of which our classes are the text part."""

    is_told: Callable[[MistralConfig], bool]
    """Whether a config is that of such a text part."""
    towers: tuple[str, ...]
    """How the names of all other tensors begin, each up to its first dot."""
    outer: str = ""
    """What may stand before those names."""
    text: Mapping[str, str] = {}
    """How a name of the text part begins in a file -> how the table's does; the first that fits is taken."""
    written: Mapping[str, str] = {}
    """The table's -> that of a file that is written."""

    def tower(self, name: str) -> str | None:
        """The tower of a tensor in a file, None for one of the text part."""
        first = name.removeprefix(self.outer).partition(".")[0]
        return first if first in self.towers else None

    def canonical(self, name: str) -> str:
        """The table's name of a tensor of the text part, or its own where it has no prefix."""
        return _replaced(name, self.text)

    def stored(self, name: str) -> str:
        """The name in a file that is written, of the table's."""
        return _replaced(name, self.written)

    def is_named(self, name: str) -> bool:
        """Whether a name is one that a text part alone has not."""
        return self.tower(name) is not None or name.startswith(tuple(self.text))


def _replaced(name: str, beginnings: Mapping[str, str]) -> str:
    for before, after in beginnings.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


_HUGGING_FACE = Whole(
    lambda config: isinstance(config.extra.get(config_towers.MODEL_TYPE), Mapping),
    ("vision_tower", "multi_modal_projector"),
    "model.",
    {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "language_model.": "model.",
        "model.language_model.": "model.",
    },
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
"""Mistral3ForConditionalGeneration as transformers writes it, as it has it in memory, and Mistral3Model."""


def _has_vision(config: MistralConfig) -> bool:
    others = config.extra.get(params_json.PARAMS)
    return isinstance(others, Mapping) and any(others.get(key) for key in params_json.VISION)


_RAW = Whole(_has_vision, ("vision_encoder", "vision_language_adapter", "patch_merger", "pre_mm_projector_norm"))
"""Mistral's own names: those of the text part have no prefix."""

WHOLES: Mapping[str, Whole] = {"hf": _HUGGING_FACE, "hf-bin": _HUGGING_FACE, "raw": _RAW, "raw-pth": _RAW}
"""Format -> its names; formats that share them hold the same layout too."""
WRITTEN = ("hf", "raw")
"""Those of them that are written."""


def whole_of(format: str, names: Iterable[str], config: Callable[[], MistralConfig | None]) -> Whole | None:
    """The names of a model that also sees, where the files have such and the config tells of one.

    The config is asked only where a name asks for it.
    """
    whole = WHOLES.get(format)
    if whole is None or not any(map(whole.is_named, names)):
        return None
    found = config()
    return whole if found is not None and whole.is_told(found) else None


def canonical(whole: Whole, names: Iterable[str], where: Path) -> dict[str, str]:
    """Name in the files -> the table's, of the text part; raises CorruptCheckpointError where two have one."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(whole.canonical(name), name)
        if other != name:
            raise CorruptCheckpointError(
                f"{where}: {quoted(other)} and {quoted(name)} are one tensor of the text part; remove the stale one."
            )
    return {name: canonical for canonical, name in found.items()}


def with_ties(config: MistralConfig, names: Iterable[str], file: Path) -> MistralConfig:
    """The config with tied embeddings where its file says nothing of them and the files of weights have no head.

    That is what transformers takes such a model for. Raises ConfigError.
    """
    data = strict_json.read_object(file, error=ConfigError)
    text = data.get("text_config")
    told = [each.get("tie_word_embeddings") for each in (data, text) if isinstance(each, Mapping)]
    if any(value is not None for value in told) or any("lm_head." in name for name in names):
        return config
    return config.replace(tie_word_embeddings=True)


def check_kept(checkpoint: Contents, to: str) -> None:
    """Raise ConversionError where a checkpoint's other towers cannot be written as they are."""
    if to not in WHOLES:
        raise ConversionError(
            f"keep_vision: to must be {' or '.join(WRITTEN)}, got {to!r}, which holds the text part only; leave out "
            "keep_vision (--keep-vision)."
        )
    if not checkpoint.skipped:
        raise ConversionError(
            f"{checkpoint.path}: must hold the towers of a model that also sees; leave out keep_vision (--keep-vision)."
        )
    if WHOLES[checkpoint.format] is not WHOLES[to]:
        raise ConversionError(
            f"{checkpoint.path}: the vision tensors of {checkpoint.format} have other names and another layout than "
            f"those of {to}; leave out keep_vision (--keep-vision), or convert with it to the same format."
        )
    packed = sorted({tensor.dtype for tensor in checkpoint.skipped.values() if tensor.dtype not in DTYPES})
    if packed:
        raise ConversionError(
            f"{checkpoint.path}: the vision tensors must be {', '.join(DTYPES)} to be kept, got {', '.join(packed)}; "
            "leave out keep_vision (--keep-vision)."
        )


def counted(skipped: Collection[str], format: str) -> dict[str, int]:
    """Tower -> how many tensors it has, of the names that `Contents.skipped` has."""
    if not skipped:
        return {}
    whole = WHOLES[format]
    found = [whole.tower(name) for name in skipped]
    return {tower: found.count(tower) for tower in whole.towers if tower in found}


def told(counts: Mapping[str, int]) -> str:
    """Such counts in words."""
    total = sum(counts.values())
    return f"{total} tensor{'s' if total > 1 else ''} of {', '.join(counts)}"
