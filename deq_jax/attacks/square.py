"""The Square attack [Andriushchenko et al. 2020]: random search with square-shaped steps, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.best import Best, labels_of, until_fooled
from deq_jax.attacks.inputs import carry_out
from deq_jax.attacks.oracles import Oracle
from deq_jax.attacks.threats import L2, Linf, Threat
from deq_jax.core.errors import require, require_count
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.losses import margin
from deq_jax.core.types import Array

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10 000, after which the share of pixels that a step changes is halved."""

PART = 500
"""Queries after which `AutoAttack` takes the images that are fooled out of the batch."""


@dataclass(frozen=True)
class Square:
    """Accepts a random square-shaped change where it raises the margin loss; asks for logits only.

    Attributes:
      threat: norm and radius.
      queries: number of queries of the logits, per image.
      p_init: share of the pixels that the first steps change.
      rescaled: compress the schedule of that share, made for 10 000 queries, to `queries`, as the paper of
        Square does; AutoAttack does not, and is weaker for it.

    Examples:
      >>> from deq_jax.attacks import Linf, Square
      >>> attack = Square(Linf(8 / 255), queries=1000)
      >>> attack.queries, attack.gradient_queries
      (1000, 0)
    """

    threat: Threat
    queries: int = 5000
    p_init: float = 0.8
    rescaled: bool = False

    uses_gradients: ClassVar[bool] = False
    gradient_queries: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(isinstance(self.threat, Linf | L2), f"Square: threat must be Linf or L2, got {self.threat!r}")
        require_count("Square: queries", self.queries)
        require(0 < self.p_init <= 1, f"Square: p_init must be in (0, 1], got {self.p_init!r}")

    def __call__(
        self, oracle: Oracle, x: Array, labels: Array, key: int | Array | Keys, start: Array | None = None
    ) -> Array:
        """Adversarial images; see `APGD.__call__`. Only the label of a pair (label, class aimed at) counts.

        An image is not attacked further once it is misclassified. A start takes the place of the first random pattern.
        """
        return carry_out(self._run, oracle, x, labels, key, start, threat=self.threat)

    def attempts(self, num_classes: int) -> int:
        """The number of its parts, of `PART` queries; see `InParts`."""
        return -(-self.queries // PART)

    def attempt(
        self,
        number: int | Array,
        so_far: Best,
        oracle: Oracle,
        x: Array,
        labels: Array,
        keys: Keys,
        start: Array | None,
    ) -> Best:
        """The state after the queries of one part; see `InParts`. The very first query is the start."""
        labels, epsilon, first = labels_of(labels), self.threat.epsilon, number * PART
        pattern, change = (_stripes, _squares) if isinstance(self.threat, Linf) else (_tiles, _bumps)
        sides = jnp.asarray(self._sides(x.shape))

        def query(number: Array, best: Best) -> Best:
            number = first + number
            own = keys.fold(1 + number)

            def begin(own: Keys) -> Array:
                return pattern(own, x, epsilon) if start is None else start

            def move(own: Keys) -> Array:
                return change(own, x, best.x, sides[number - 1], epsilon)

            x_adv = self.threat.project(lax.cond(number == 0, begin, move, own), x)
            logits = oracle.logits(x_adv, own.fold(Purpose.QUERY))
            best = best._replace(loss=jnp.where(number == 0, -jnp.inf, best.loss))  # of the image itself
            return best.update(x_adv, margin(logits, labels), logits, labels)

        return until_fooled(query, so_far, jnp.minimum(PART, self.queries - first))

    def _run(self, oracle: Oracle, x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        def attempt(number: Array, best: Best) -> Best:
            return self.attempt(number, best, oracle, x, labels, keys, start)

        clean = Best.clean(oracle, margin, x, labels_of(labels), keys.fold(Purpose.QUERY), start)
        found = until_fooled(attempt, clean, self.attempts(0))  # for any number of classes
        best: Array = found.where(found.fooled | (found.loss > clean.loss), clean).x
        return best

    def _sides(self, shape: tuple[int, ...]) -> np.ndarray:
        """[queries], side of the square at each query, in pixels; odd and at least 3 in ℓ2."""
        _, height, width, _ = shape
        query = np.arange(1, self.queries + 1)
        query = query * 10_000 // self.queries if self.rescaled else query
        share = self.p_init / 2 ** np.sum(query[:, None] > np.array(HALVINGS), axis=1)
        sides = np.clip(np.round(np.sqrt(share * height * width)), 1, min(height, width)).astype(np.int32)
        if isinstance(self.threat, Linf):
            return sides
        largest = max(min(height, width) - 1 + min(height, width) % 2, 1)
        odd: np.ndarray = np.clip(sides + 1 - sides % 2, min(3, largest), largest)
        return odd


def _stripes(keys: Keys, x: Array, epsilon: float) -> Array:
    """x plus vertical stripes, one pixel wide, of ±epsilon."""
    shape = (1, *x.shape[2:])
    return x + epsilon * keys.draw(lambda key: jax.random.rademacher(key, shape, x.dtype))


def _squares(keys: Keys, x: Array, x_adv: Array, side: Array, epsilon: float) -> Array:
    """x_adv with each channel at ±epsilon in one square (2 epsilon further, before the projection)."""

    def change(key: Array) -> Array:
        corner_key, sign_key = jax.random.split(key)
        row, column = _window(corner_key, x.shape[1:3], side)
        signs = jax.random.rademacher(sign_key, (1, 1, x.shape[3]), x.dtype)
        return 2 * epsilon * signs * _inside(row, column, side)

    return x_adv + keys.draw(change)


def _tiles(keys: Keys, x: Array, epsilon: float) -> Array:
    """x plus a 5 x 5 grid of bumps with random signs, of length epsilon."""
    _, height, width, channels = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = np.arange(height), np.arange(width)
    bumps = _bump(jnp.asarray(rows % side), jnp.asarray(columns % side), side, max(height, width))
    grid = -(-height // side), -(-width // side), channels

    def tiles(key: Array) -> Array:
        signs = jax.random.rademacher(key, grid, x.dtype)
        delta = bumps.astype(x.dtype)[:, :, None] * signs[rows // side][:, columns // side]
        scaled: Array = delta * epsilon / jnp.linalg.norm(delta)
        return scaled

    return x + keys.draw(tiles)


def _bumps(keys: Keys, x: Array, x_adv: Array, side: Array, epsilon: float) -> Array:
    """x_adv with the perturbation of one window (and the unused part) moved into a bump in another.

    References: Andriushchenko et al. 2020, algorithm 3.
    """
    channels = x.shape[3]

    def move(key: Array, delta: Array) -> Array:
        to_key, from_key, sign_key, turn_key = jax.random.split(key, 4)
        row, column = _window(to_key, x.shape[1:3], side)
        other_row, other_column = _window(from_key, x.shape[1:3], side)
        target, source = _inside(row, column, side), _inside(other_row, other_column, side)
        upright = _bump(row, column, side, max(x.shape[1:3]))
        lying = _bump(column, row, side, max(x.shape[1:3])).T
        bump = jnp.where(jax.random.bernoulli(turn_key), upright, lying).astype(x.dtype)[:, :, None] * target
        signs = jax.random.rademacher(sign_key, (1, 1, channels), x.dtype)
        shape = signs * bump / _channel_norm(bump) + delta * target / _channel_norm(delta * target)
        unused = jnp.maximum(epsilon**2 - jnp.sum(delta**2), 0) / channels
        available = jnp.sqrt(_channel_norm(delta * (target | source)) ** 2 + unused)
        return jnp.where(target, available * shape / _channel_norm(shape), jnp.where(source, 0, delta))

    return x + jax.vmap(move)(keys.each(), x_adv - x)


def _bump(row: Array, column: Array, side: int | Array, size: int) -> Array:
    """Two opposite halves, each falling off from its centre like a sum of 1 / distance^2, [H, W].

    Args:
      row, column: [H] and [W], pixel coordinates in the window; outside it the values mean nothing.
      side: length of the side of the window.
      size: an upper bound of side.

    References: Andriushchenko et al. 2020, section 3.4.
    """
    sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(1 / jnp.arange(1, size + 2) ** 2)])
    half = side // 2
    is_upper = row < half
    centre = jnp.where(is_upper, half // 2, half + (side - half) // 2)
    distance = jnp.maximum(jnp.abs(row - centre)[:, None], jnp.abs(column - side // 2)[None, :])
    height = sums[half + 1] - sums[jnp.minimum(distance, half + 1)]
    return jnp.where(is_upper[:, None], height, -height)


def _window(key: Array, size: tuple[int, ...], side: Array) -> tuple[Array, Array]:
    """Coordinates [H] and [W] of the pixels relative to the corner of a random window."""
    height, width = size
    corner = jax.random.randint(key, (2,), 0, jnp.stack([height - side + 1, width - side + 1]))
    return jnp.arange(height) - corner[0], jnp.arange(width) - corner[1]


def _inside(row: Array, column: Array, side: Array) -> Array:
    """[H, W, 1], whether a pixel is in the window."""
    return (((row >= 0) & (row < side))[:, None] & ((column >= 0) & (column < side))[None, :])[:, :, None]


def _channel_norm(delta: Array) -> Array:
    return jnp.maximum(jnp.sqrt(jnp.sum(delta**2, axis=(0, 1), keepdims=True)), 1e-12)
