"""User errors, reported in one line."""

from __future__ import annotations


class InputError(ValueError):
    """An error that the user can fix: one line that says what was wrong, what was expected, and where.

    The command lines print it without a traceback and exit with 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)
