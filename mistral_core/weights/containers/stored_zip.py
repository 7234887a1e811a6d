"""A zip whose members lie in it as they are, so that numbers are read at their places: what torch.save writes."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple, NoReturn

from ...disk import limits
from ...errors import CorruptCheckpointError, LimitExceededError, TruncatedFileError, UnsafeFileError
from .tensor_file import check_size, quoted, read_at

MAX_DIRECTORY_BYTES = limits.ZIP_DIRECTORY_BYTES


class Member(NamedTuple):
    """Where the bytes of a member lie in the file."""

    start: int
    size: int


class StoredZip:
    """The checked members of a zip, by their names below its one folder."""

    def __init__(
        self, path: Path, descriptor: int, allowed: re.Pattern[str], max_members: int, *, root: str = ""
    ) -> None:
        """Check the table of contents and every header; nothing else is read.

        `root` is the folder, ending with a slash, that stands for the one that members without a folder lack.

        Raises UnsafeFileError (compressed, encrypted, twice, overlapping, another name than `allowed`),
        TruncatedFileError, LimitExceededError.
        """
        self.path, self.descriptor = path, descriptor
        self.members: dict[str, Member] = {}
        entries, limit = self._entries()
        if len(entries) > max_members:
            raise LimitExceededError(f"{path}: {len(entries)} members; at most {max_members} are read.")
        folders = {(root + entry.filename).partition("/")[0] for entry in entries}
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            name = (root + entry.filename).partition("/")[2]
            if len(folders) > 1 or folders & {"", ".", ".."} or not allowed.fullmatch(name):
                self._refuse(entry, "has no place in such a file")
            if name in self.members:
                self._refuse(entry, "appears twice")
            if entry.header_offset < end:
                self._refuse(entry, "overlaps another")
            member = self._located(entry)
            self.members[name], end = member, member.start + member.size
        if end > limit:
            self._refuse(entry, "goes on into the table of contents")

    def _entries(self) -> tuple[list[zipfile.ZipInfo], int]:
        """The table of contents and where it begins."""
        try:
            with _Bounded(self.descriptor, closefd=False) as file, zipfile.ZipFile(file) as archive:
                return archive.infolist(), archive.start_dir
        except LimitExceededError as cause:
            raise LimitExceededError(f"{self.path}: {cause}") from cause
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, OSError) as cause:
            raise TruncatedFileError(f"{self.path}: not a whole zip ({cause}); copy or download it again.") from cause

    def _located(self, entry: zipfile.ZipInfo) -> Member:
        """Where the bytes of a member lie, by the header before them."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            self._refuse(entry, "is compressed or encrypted")
        header = os.pread(self.descriptor, 30, entry.header_offset)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            self._refuse(entry, "has no header of its own")
        name, extra = (int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
        if os.pread(self.descriptor, name, entry.header_offset + 30) != entry.filename.encode():
            self._refuse(entry, "has another name in its own header")
        return Member(entry.header_offset + 30 + name + extra, entry.file_size)

    def _refuse(self, entry: zipfile.ZipInfo, fault: str) -> NoReturn:
        raise UnsafeFileError(
            f"{self.path}: members must be stored, each once, but {quoted(entry.filename)} {fault}. Re-save it as "
            "safetensors."
        )

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small member; raises UnsafeFileError if it is not there, LimitExceededError."""
        if name not in self.members:
            raise UnsafeFileError(f"{self.path} must be a file of torch.save, got a zip without {name}.")
        start, size = self.members[name]
        check_size(self.path, size, limit)
        data = bytearray(size)
        if not read_at(self.descriptor, memoryview(data), start):
            raise CorruptCheckpointError(f"{self.path}: changed while it was read; load it again.")
        return bytes(data)


class _Bounded(io.FileIO):
    """A file of which nothing large is read at once, whatever sizes stand in it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise LimitExceededError(f"a table of contents of {size} bytes; at most {MAX_DIRECTORY_BYTES} are read.")
        return super().read(MAX_DIRECTORY_BYTES if size is None or size < 0 else size) or b""
