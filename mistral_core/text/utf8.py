"""Texts that have a form in UTF-8."""

from __future__ import annotations


def problem(text: str) -> str:
    """Why a text has no UTF-8, and what to do; empty where it has."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        return f"half a surrogate pair at {cause.start}, which is no character; read the text with errors='replace'"
    return ""
