"""Threat models: the geometry of a ball around an image, within the box [0, 1].

A threat model tells an attack everything about a norm: lengths, the projection onto the ball, the
direction of steepest ascent, and the shortest way to a hyperplane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.errors import require, require_role
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.types import Array


class Threat(Protocol):
    """A ball of radius epsilon, in the unit of x ([0, 1]). Arrays are images ``[B, H, W, C]``."""

    @property
    def epsilon(self) -> float: ...

    def length(self, delta: Array) -> Array:
        """Norm of each perturbation, [B]."""

    def dual_length(self, gradient: Array) -> Array:
        """Dual norm of each gradient, [B]: the rate of ascent per unit of length."""

    def project(self, x_adv: Array, x: Array) -> Array:
        """The nearest point of the ball around x, then of [0, 1]."""

    def steepest(self, gradient: Array) -> Array:
        """The perturbation of length 1 along which the loss rises fastest; 0 for a useless gradient."""

    def random(self, keys: Keys, x: Array) -> Array:
        """A random perturbation, uniform in the ball."""

    def random_direction(self, keys: Keys, x: Array) -> Array:
        """A random perturbation of length 1."""

    def to_hyperplane(self, x: Array, normal: Array, level: Array) -> Array:
        """The shortest delta with ``<normal, delta> = level`` [B] and x + delta in [0, 1].

        Where the hyperplane misses the box: the delta that comes nearest to it.
        """


@dataclass(frozen=True)
class Linf:
    """``max |delta| <= epsilon``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import Linf
      >>> x = jnp.zeros((1, 1, 1, 2))
      >>> Linf(0.25).project(x + jnp.array([0.125, 0.5]), x).tolist()
      [[[[0.125, 0.25]]]]
    """

    epsilon: float

    def __post_init__(self) -> None:
        _check_radius("Linf", self.epsilon)
        if is_traced(self.epsilon):
            return
        unit = f"did you mean {self.epsilon:g}/255?" if self.epsilon <= 255 else "1 is the whole range"
        require(self.epsilon <= 1, f"Linf: epsilon is in the unit of x, [0, 1], got {self.epsilon!r}; {unit}")

    def length(self, delta: Array) -> Array:
        """Largest absolute entry of each perturbation, [B]."""
        return jnp.max(jnp.abs(_flat(delta)), axis=1)

    def dual_length(self, gradient: Array) -> Array:
        """The ℓ1 norm of each gradient, [B]."""
        return jnp.sum(jnp.abs(_flat(gradient)), axis=1)

    def project(self, x_adv: Array, x: Array) -> Array:
        """Clips x_adv to the cube around x, then to [0, 1]."""
        return jnp.clip(jnp.clip(x_adv, x - self.epsilon, x + self.epsilon), 0, 1)

    def steepest(self, gradient: Array) -> Array:
        """The sign of the gradient."""
        return jnp.sign(_finite(gradient))

    def random(self, keys: Keys, x: Array) -> Array:
        """Uniform in the cube."""
        return self.epsilon * keys.draw(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, -1, 1))

    def random_direction(self, keys: Keys, x: Array) -> Array:
        """Uniform in the cube, stretched to its surface."""
        noise = Linf(1.0).random(keys, x)
        return noise / per_image(self.length(noise), x)

    def to_hyperplane(self, x: Array, normal: Array, level: Array) -> Array:
        """All pixels move alike, as far as the box lets them; see `Threat.to_hyperplane`."""
        sign, size, room = _ascent(x, normal, level)
        reach = _water_level(_flat(size), _flat(room), jnp.abs(level))
        return sign * jnp.minimum(per_image(reach, x), room)


@dataclass(frozen=True)
class L2:
    """``sqrt(sum delta^2) <= epsilon``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.attacks import L2
      >>> L2(1.0).length(jnp.array([[[[3.0, 4.0]]]])).tolist()
      [5.0]
    """

    epsilon: float

    def __post_init__(self) -> None:
        _check_radius("L2", self.epsilon)

    def length(self, delta: Array) -> Array:
        """Euclidean length of each perturbation, [B]."""
        lengths: Array = jnp.linalg.norm(_flat(delta), axis=1)
        return lengths

    def dual_length(self, gradient: Array) -> Array:
        """The ℓ2 norm of each gradient, [B]."""
        return self.length(gradient)

    def project(self, x_adv: Array, x: Array) -> Array:
        """Shortens the perturbation to epsilon, then clips to [0, 1]."""
        delta = x_adv - x
        shrink = jnp.minimum(1, self.epsilon / jnp.maximum(self.length(delta), 1e-12))
        return jnp.clip(x + delta * per_image(shrink, x), 0, 1)

    def steepest(self, gradient: Array) -> Array:
        """The normalised gradient."""
        gradient = _finite(gradient)
        scaled = gradient / per_image(jnp.maximum(Linf(0).length(gradient), 1e-30), gradient)  # no underflow
        return scaled / per_image(jnp.maximum(self.length(scaled), 1e-12), gradient)

    def random(self, keys: Keys, x: Array) -> Array:
        """A direction times the root of a uniform number that makes all volumes alike; see `Threat.random`."""
        uniform = keys.fold(Purpose.RADIUS).draw(lambda key: jax.random.uniform(key, (), x.dtype))
        size = math.prod(x.shape[1:])
        return self.epsilon * per_image(uniform ** (1 / size), x) * self.random_direction(keys, x)

    def random_direction(self, keys: Keys, x: Array) -> Array:
        """Uniform on the sphere."""
        noise = keys.draw(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))
        return noise / per_image(self.length(noise), x)

    def to_hyperplane(self, x: Array, normal: Array, level: Array) -> Array:
        """Pixels move in proportion to the normal, within the box; see `Threat.to_hyperplane`."""
        sign, size, room = _ascent(x, normal, level)
        caps = jnp.where(size > 0, room / jnp.where(size > 0, size, 1), 0)
        reach = _water_level(_flat(size**2), _flat(caps), jnp.abs(level))
        return sign * jnp.minimum(per_image(reach, x) * size, room)


def per_image(values: Array, x: Array) -> Array:
    """One value per image, [B], shaped to broadcast against images [B, ...]."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def is_traced(value: Any) -> bool:
    """Whether a value is not known yet, because it is an argument of a function that JAX traces."""
    return isinstance(value, jax.core.Tracer)


def check_threat(where: str, threat: Any) -> None:
    """Refuses anything but a threat model, such as a bare radius; `where` begins the message."""
    require_role(f"{where}: threat", threat, ("epsilon", "project"), "a threat model, such as Linf(8 / 255)")


def _check_radius(name: str, epsilon: Any) -> None:
    is_number = isinstance(epsilon, Real | jax.Array) and not isinstance(epsilon, bool)
    fits = is_number and (is_traced(epsilon) or 0 <= epsilon < math.inf)
    require(fits, f"{name}: epsilon must be >= 0 and finite, got {epsilon!r}")


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _finite(gradient: Array) -> Array:
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


def _ascent(x: Array, normal: Array, level: Array) -> tuple[Array, Array, Array]:
    """Direction, rate and room of each pixel's move that changes ``<normal, x>`` by level."""
    normal = _finite(normal)
    sign = jnp.sign(normal) * per_image(jnp.sign(level), x)
    return sign, jnp.abs(normal), jnp.where(sign > 0, 1 - x, x)


def _water_level(weights: Array, caps: Array, total: Array) -> Array:
    """The level l with ``sum_i weights_i min(l, caps_i) = total``, per row; max(caps) where there is none.

    Newton's method on that concave, piecewise linear function: from below, in finitely many steps.

    Args:
      weights, caps: [B, D], >= 0.
      total: [B], >= 0.
    """

    def level(full: Array) -> Array:
        rate = jnp.sum(jnp.where(full, 0, weights), axis=1)
        missing = total - jnp.sum(jnp.where(full, weights * caps, 0), axis=1)
        return jnp.where(rate > 0, missing / jnp.where(rate > 0, rate, 1), jnp.max(caps, axis=1))

    def fill(carry: tuple[Array, Array | bool]) -> tuple[Array, Array | bool]:
        full, _ = carry
        filled = full | (caps <= level(full)[:, None])
        return filled, jnp.any(filled != full)

    empty: tuple[Array, Array | bool] = jnp.zeros_like(caps, bool), True
    full, _ = lax.while_loop(lambda carry: carry[1], fill, empty)
    return level(full)
