"""Functions that keep their compiled programs, so that calls outside `jax.jit` are also fast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

Given = ParamSpec("Given")
Result = TypeVar("Result")


def compiled(*static: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Decorator: compiles a function once for equal static arguments and shapes; within `jax.jit` it changes nothing.

    A callable that is not hashable, or made anew for every call, is compiled at every call.

    Args:
      static: names of the arguments that are not arrays. They are compared by value, and must be pure.
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        signature = inspect.signature(function)
        jitted: Callable[Given, Result] = jax.jit(function, static_argnames=static)

        @wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            keep = _is_hashable([given.get(name) for name in static])
            return (jitted if keep else function)(*args, **kwargs)

        return call

    return decorate


def _is_hashable(values: list[Any]) -> bool:
    try:
        hash(tuple(values))
    except TypeError:
        return False
    return True
