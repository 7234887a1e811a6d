"""What the installed transformers makes of conversations with a saved tokenizer: python check_saved.py DIRECTORY.

Reads a JSON list of conversations (dicts of arguments of apply_chat_template) from stdin, and writes a JSON list to
stdout: for each the ids, or the words of the error.
"""

from __future__ import annotations

import copy
import json
import sys

import transformers


def ids(tokenizer, conversation):
    """The ids of a conversation, or the words of the error."""
    arguments = copy.deepcopy(conversation)
    messages = arguments.pop("messages")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    except Exception as error:  # whatever a template raises
        return f"{type(error).__name__}: {error}"


def main():
    """Encode what stdin asks for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    json.dump([ids(tokenizer, each) for each in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
