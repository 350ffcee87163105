"""Convolutions that are fast inside loops on the CPU, whoever wrote the network.

XLA's fast kernel takes images [B, H, W, C] and kernels [h, w, I, O]. At the top level of a program XLA brings the axes
of every convolution into that order. Inside a loop or a branch it does not, and a convolution in another order, such as
the gradient of one, falls onto a naive kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

import jax
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, primitives

from deq_jax.core.types import Array, PyTree

Answer = TypeVar("Answer")


def fast_in_loops(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """The same function of arrays; its convolutions are as fast inside a loop as outside.

    It is traced, and the axes of its convolutions are brought into XLA's order where they are in another. On GPU and
    TPU they do not change. So does a part that is written for each platform already, with `lax.platform_dependent`.
    The derivatives are the function's own.
    """

    @wraps(function)
    def call(*args: PyTree) -> Answer:
        if jax.config.jax_disable_jit:
            return function(*args)
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.core.eval_jaxpr(_rewritten(traced.jaxpr, {}), traced.consts, *jax.tree.leaves(args))
        answer: Answer = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        return answer

    return call


def _rewritten(program: Any, known: dict[int, Any]) -> Any:
    """A program, or a parameter of an equation that may hold some; itself if there is nothing to do.

    Args:
      program: anything.
      known: by their `id` the programs that were rewritten; a program stays one however often it is called.
    """
    if isinstance(program, tuple):  # the branches of a condition
        parts = [_rewritten(part, known) for part in program]
        return program if all(map(_is, parts, program)) else tuple(parts)
    if isinstance(program, Jaxpr):
        if id(program) not in known:
            equations = [_equation(equation, known) for equation in program.eqns]
            same = all(map(_is, equations, program.eqns))
            known[id(program)] = program if same else program.replace(eqns=equations)
        return known[id(program)]
    open_program = getattr(program, "jaxpr", None)  # of a closed one, which JAX 0.12 no longer tells from a Jaxpr
    if isinstance(open_program, Jaxpr):
        inner = _rewritten(open_program, known)
        return program if inner is open_program else program.replace(jaxpr=inner)
    return program


def _equation(equation: JaxprEqn, known: dict[int, Any]) -> Any:
    if equation.primitive is primitives.conv_general_dilated_p:
        order = _order(len(equation.params["window_strides"]))
        if equation.params["dimension_numbers"] == order:
            return equation
        convolution = jax.jit(partial(_convolution, order, equation.params))
        call = jax.make_jaxpr(convolution)(*(variable.aval for variable in equation.invars)).eqns[0]
        return equation.replace(primitive=call.primitive, params=call.params)
    if "branches_platforms" in equation.params:
        return equation
    params = {name: _rewritten(value, known) for name, value in equation.params.items()}
    same = all(params[name] is value for name, value in equation.params.items())
    return equation if same else equation.replace(params=params)


def _convolution(order: lax.ConvDimensionNumbers, params: dict[str, Any], images: Array, kernel: Array) -> Any:
    """The convolution with these parameters, its axes on the CPU in this order."""
    given = params["dimension_numbers"]

    def native(images: Array, kernel: Array) -> Any:
        return primitives.conv_general_dilated_p.bind(images, kernel, **params)

    def ordered(images: Array, kernel: Array) -> Any:
        to_order = [_permutation(*pair) for pair in zip(given, order, strict=True)]
        images, kernel = images.transpose(to_order[0]), kernel.transpose(to_order[1])
        found = primitives.conv_general_dilated_p.bind(images, kernel, **{**params, "dimension_numbers": order})
        return found.transpose(_permutation(order.out_spec, given.out_spec))

    return lax.platform_dependent(images, kernel, cpu=ordered, default=native)


def _order(dimensions: int) -> lax.ConvDimensionNumbers:
    """Where XLA's fast kernel has the axes (batch, channels, space), (outputs, inputs, space) and as the first."""
    images = (0, dimensions + 1, *range(1, dimensions + 1))
    return lax.ConvDimensionNumbers(images, (dimensions + 1, dimensions, *range(dimensions)), images)


def _permutation(given: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Transposes an array from axes at `given` to axes at `wanted`."""
    return [given[wanted.index(position)] for position in range(len(given))]


def _is(one: Any, other: Any) -> bool:
    return one is other
