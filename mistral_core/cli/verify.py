"""`mistral verify PATH`: a checkpoint against the SHA-256 sums of its manifest."""

from __future__ import annotations

import argparse
import json

from ..disk import files
from ..weights import manifest
from . import put


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", help="a directory with a mistral_manifest.json")


def run(options: argparse.Namespace) -> int:
    """Hash every file; one flipped bit is an error that names the file and the tensor."""
    directory = files.as_path(options.path)
    manifest.verify(directory, "full")
    found = manifest.read(directory)
    facts = {
        "path": str(directory),
        "files": len(found["files"]),
        "bytes": sum(entry["size"] for entry in found["files"].values()),
        "tensors": len(found.get("tensors", {})),
        "source": found.get("source"),
        "losses": found.get("losses", {}),
    }
    if options.json:
        put(json.dumps(facts, indent=1))
    else:
        put(f"{directory}: {facts['files']} files, {facts['bytes']:,} bytes, {facts['tensors']} tensors: as written")
    return 0
