"""Mistakes of whoever gave an input, told in one line."""

from __future__ import annotations


class InputError(ValueError):
    """An input that whoever gave it can mend: one line with what was wrong, expected, and where.

    The command lines print it without a traceback and leave with exit code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)
