"""Errors that are reported in one line."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any


class InputError(ValueError):
    """An error that the user can fix: one line with the place, the expected and the given value.

    The command lines print it without a traceback and exit with 2.

    Examples:
      >>> from deq_jax import Broyden, InputError
      >>> try:
      ...     Broyden(steps=0)
      ... except InputError as error:
      ...     print(error)
      Broyden: steps must be a positive integer, got 0
    """

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))  # a config of Flax takes several


class WriteError(OSError):
    """A file cannot be written, as on a full disk: one line with the file and the reason.

    Earlier files are whole. The command lines print the line without a traceback and exit with 74.

    Examples:
      >>> from deq_jax.core import WriteError
      >>> str(WriteError("runs/a/config.json: cannot be written (No space left on device)"))
      'runs/a/config.json: cannot be written (No space left on device)'
    """


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless the condition holds.

    Args:
      condition: a Python bool, not a traced array.
      message: one line: the place, the expected and the given value.

    Examples:
      >>> from deq_jax.core import require
      >>> require(8 % 3 == 0, "batch_size 8 is not divisible by 3")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: batch_size 8 is not divisible by 3
    """
    if not condition:
        raise InputError(message)


def require_count(what: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raises `InputError` unless the value is an integer and at least `least`; `what` begins the message.

    Args:
      what: the place, such as ``PGD: steps``.
      value: the given value.
      least: the smallest number that will do.
      optional: whether None will do as well.
    """
    is_count = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    expected = "a positive integer" if least == 1 else f"an integer >= {least}"
    fits = is_count or (optional and value is None)
    require(fits, f"{what} must be {expected}{' or None' if optional else ''}, got {value!r}")


def require_role(what: str, value: Any, traits: Iterable[str], expected: str) -> None:
    """Raises `InputError` unless the value can play a role: an object, not a class, that has the role's traits.

    Args:
      what: the place, such as ``PGD: threat``.
      value: the given value.
      traits: names of methods and fields; ``__call__`` for a function.
      expected: the expected value in words, with an example.
    """
    fits = not isinstance(value, type) and all(hasattr(value, trait) for trait in traits)
    require(fits, f"{what}: expected {expected}, got {described(value)}")


def described(value: Any) -> str:
    """A value in a few words of one line: arrays by dtype and shape, containers by their parts, objects by class."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, dict):
        return f"a dict with keys {', '.join(map(str, value))}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    name = type(value).__name__
    kind = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    parts = ", ".join(map(described, value)) if isinstance(value, tuple | list) else ""
    return f"{kind} of {parts}" if parts else kind


def escaped(text: str) -> str:
    """The text with escapes in place of characters that steer a terminal, new lines excepted."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of its message, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
