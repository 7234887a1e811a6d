"""The one way to open a checkpoint: what is downloaded, which format it is, and its headers, once and of one moment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..config import MistralConfig
from ..disk import files, reading
from . import formats
from .contents import Contents
from .sources import resolve_checkpoint


class Checkpoint(Contents):
    """An opened checkpoint of any format: checked headers, and tensors that are read when they are asked for."""

    @classmethod
    def open(
        cls,
        path_or_id: files.PathLike,
        *,
        format: str | None = None,
        one_format: bool = False,
        config: MistralConfig | None = None,
        **hub_arguments: Any,
    ) -> Checkpoint:
        """Open a directory, an index, one file of weights, or a hub id; only headers are read.

        `format` is one of `formats.FORMATS`; None asks names and content, and takes `hf` where there are several,
        unless there should be `one_format`. `config` is for a format that needs one and has none, `hub_arguments` are
        those of `hub.download.resolve`. All is read of one moment, whatever replaces the directory meanwhile.
        Raises CheckpointNotFoundError, ConversionError (several formats), UnsupportedFeatureError, HubError and its
        kinds, CheckpointIndexError, ShardMissingError, UnsafeFileError, LimitExceededError, and what a header raises.
        """
        path = resolve_checkpoint(path_or_id, format=format, one_format=one_format, **hub_arguments)

        def opened(path: Path) -> Checkpoint:
            found = (
                formats.FoundFormat(format) if format is not None else formats.only_format(path, one_format=one_format)
            )
            contents = formats.format_named(found.format).open(path, config, found.seen)
            contents.keep_open()
            return Checkpoint(*(getattr(contents, field.name) for field in dataclasses.fields(contents)))

        return reading.of_one_moment(path, opened)
