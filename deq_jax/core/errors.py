"""Errors that are reported in one line."""

from __future__ import annotations


class InputError(ValueError):
    """An error that the user can fix: one line that says what was wrong, what was expected, and where.

    The command lines print it without a traceback and exit with 2.

    Examples:
      >>> from deq_jax import Broyden, InputError
      >>> try:
      ...     Broyden(steps=0)
      ... except InputError as error:
      ...     print(error)
      Broyden: steps must be a positive integer, got 0
    """


class WriteError(OSError):
    """A file cannot be written, as on a full disk: one line with the file and the reason.

    What was there before is as it was. The command lines print the line without a traceback and exit with 74.

    Examples:
      >>> from deq_jax.core import WriteError
      >>> str(WriteError("runs/a/config.json: cannot be written (No space left on device)"))
      'runs/a/config.json: cannot be written (No space left on device)'
    """


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless the condition holds.

    Args:
      condition: a Python bool, not a traced array.
      message: one line: what was expected, what was given, and where.

    Examples:
      >>> from deq_jax.core import require
      >>> require(8 % 3 == 0, "batch_size 8 is not divisible by 3")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: batch_size 8 is not divisible by 3
    """
    if not condition:
        raise InputError(message)
