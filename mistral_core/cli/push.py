"""`mistral push PATH REPO`: a checkpoint to the hub."""

from __future__ import annotations

import argparse
import json

from ..weights.push import push_to_hub
from . import put


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes; the token is that of `hf auth login` or HF_TOKEN."""
    command.add_argument("path", help="a checkpoint directory or a file of weights")
    command.add_argument("repository", help="the hub id, which is made if it is not there")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--revision", help="the branch, which is made if it is not there; default: main")
    command.add_argument("--create-pr", action="store_true", help="as a pull request")


def run(options: argparse.Namespace) -> int:
    """Upload, and print the address of the commit."""
    address = push_to_hub(
        options.path,
        options.repository,
        private=options.private,
        commit_message=options.message,
        revision=options.revision,
        create_pr=options.create_pr,
    )
    put(json.dumps({"commit": address}) if options.json else address)
    return 0
