"""Eager calls that compile once: whatever compiles to the same program shares an executable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
from jax.extend.core import Jaxpr

from deq_jax.core.types import Array, PyTree

KEPT = 64  # executables


@dataclass(frozen=True, eq=False)
class Compiled:
    """A function of arrays, compiled for each combination of shapes that it is called with.

    `jax.jit` knows a function by its identity, so a new lambda is compiled anew. It reads arrays that a function closes
    over once and for all, so a model that was trained further would be attacked with its old parameters. Here the
    function is traced when it is first called, which is cheap, and its program is looked up among the programs of all
    functions. Arrays that it closes over become arguments of that program, so other values reuse the executable. A
    program with callbacks into Python shares nothing.

    Attributes:
      function: ``(*args) -> arrays``, pure, of pytrees of arrays.
    """

    function: Callable[..., PyTree]
    _programs: dict[Any, Callable[..., PyTree]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, *args: PyTree) -> PyTree:
        return self.trace(*args)(*args)

    def trace(self, *args: PyTree) -> Callable[..., PyTree]:
        """The program for arguments of these shapes; nothing is compiled or run yet."""
        shapes = jax.tree.structure(args), *map(jax.typeof, jax.tree.leaves(args))
        if shapes not in self._programs:
            self._programs[shapes] = _program(self.function, *args)
        return self._programs[shapes]


def _program(function: Callable[..., PyTree], *args: PyTree) -> Callable[..., PyTree]:
    if jax.config.jax_disable_jit:
        return function
    leaves, tree = jax.tree.flatten(args)

    def flat(*leaves: Any) -> PyTree:  # a new function, since jax also knows traces by their identity
        return function(*jax.tree.unflatten(tree, leaves))

    traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    if any(isinstance(constant, jax.core.Tracer) for constant in traced.consts):
        return function  # part of another trace, which compiles it
    with_arguments = jax.make_jaxpr(partial(jax.core.eval_jaxpr, traced.jaxpr))(traced.consts, *leaves)
    run = jax.jit(lambda consts, *leaves: jax.core.eval_jaxpr(with_arguments.jaxpr, [], *consts, *leaves))
    if not _calls_python(traced.jaxpr):
        text = run.lower(traced.consts, *leaves).as_text()
        run = _kept(_Executable(hashlib.sha256(text.encode()).digest(), run))
    result = jax.tree.structure(shapes)
    return lambda *args: jax.tree.unflatten(result, run(traced.consts, *jax.tree.leaves(args)))


def _calls_python(program: Any) -> bool:
    """Whether a program, or a parameter of an equation, has a callback, such as that of `jax.pure_callback`.

    The text of a program does not tell one callback from another.
    """
    if isinstance(program, tuple):
        return any(map(_calls_python, program))
    program = getattr(program, "jaxpr", program)
    if not isinstance(program, Jaxpr):
        return False
    inner = (value for equation in program.eqns for value in equation.params.values())
    named = any("callback" in equation.primitive.name for equation in program.eqns)
    return bool(program.effects) or named or any(map(_calls_python, inner))


@dataclass(frozen=True)
class _Executable:
    digest: bytes
    run: Callable[..., list[Array]] = field(compare=False)


@lru_cache(maxsize=KEPT)
def _kept(executable: _Executable) -> Callable[..., list[Array]]:
    """The first one with this digest."""
    return executable.run
