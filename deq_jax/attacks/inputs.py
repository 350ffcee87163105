"""The entry of every attack: it checks the inputs, brings them to one precision, and compiles once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.attacks.oracles import Oracle, require_oracle
from deq_jax.attacks.programs import Compiled
from deq_jax.attacks.threats import Threat, check_threat, is_traced, per_image
from deq_jax.core.box import BOX_TOLERANCE, clip_to_box
from deq_jax.core.convolutions import fast_in_loops
from deq_jax.core.errors import described, require, require_role
from deq_jax.core.keys import Keys, Purpose
from deq_jax.core.types import AnyArray, Array, Loss

Run = Callable[[Oracle, Array, Array, Keys, Array | None], Array]
"""``(oracle, x, labels, keys, start) -> x_adv``: the attack itself, on checked inputs."""


def carry_out(
    run: Run,
    oracle: Oracle,
    x: AnyArray,
    labels: AnyArray,
    key: int | Array | Keys,
    start: AnyArray | None = None,
    *,
    threat: Threat | None = None,
    pairs: bool = True,
    reference: bool = False,
    asks: bool = True,
) -> Array:
    """Checks the inputs of an attack and carries it out.

    `run` works in float32, in float64 only if the images are; labels are int32; the oracle's answers come in these
    types. Outside of `jax.jit` it is compiled as a whole, and once for the same program (see `programs.Compiled`), and
    meaningless inputs are refused. Within `jax.jit` values are not known: there images outside [0, 1] come back as NaN;
    images with a label that is not a class, or with logits that are not finite, come back unchanged.

    Args:
      run: the attack itself.
      oracle, x, labels, key, start: as given to the attack; see `Attack`.
      threat: the ball in which the start must lie; None where the attack declares none, then only [0, 1] counts.
      pairs: whether the labels may also be pairs (label, class aimed at).
      reference: whether it may be reference logits.
      asks: whether the attack asks for the logits of the images themselves, which then must be finite.

    Returns:
      Images of the dtype of x. Half-precision images are rounded towards x, so they stay in the ball; the oracle is
      asked about the rounded images.

    Raises:
      InputError: the inputs are not as in `Attack`.
    """
    if isinstance(oracle, Guard):  # part of another attack
        return run(cast(Oracle, replace(oracle, centre=x)), x, labels, Keys.of(key, len(x)), cast(Any, start))
    given, (x, labels) = x, check_inputs(x, labels, pairs=pairs, reference=reference)
    start = None if start is None else check_start(start, x, threat)
    if len(x) == 0:
        unchanged: Array = given
        return unchanged
    keys = Keys.of(key, len(x))

    def attack(x: Array, labels: Array, keys: Keys, start: Array | None) -> Array:
        guard = Guard.of(oracle, x, checked)
        begin = None if start is None else project_start(start, guard.centre, threat)
        kind = jnp.int32 if has_labels(labels) else working_type(x)  # narrower types cannot hold all class numbers
        return guard.rounded(run(cast(Oracle, guard), guard.centre, labels.astype(kind), keys, begin))

    def finite(x: Array, keys: Keys) -> Array:
        guard = Guard.of(oracle, x, checked)
        return all_finite(guard.logits(guard.centre, keys))

    checked = labels
    if has_labels(labels) and not is_traced(labels):
        labels = np.asarray(labels).astype(np.int32)  # of every integer type the same program
    if any(is_traced(leaf) for leaf in jax.tree.leaves((x, labels, keys, start))):
        x_adv = attack(jnp.asarray(x), jnp.asarray(labels), keys, cast(Any, start))
        return jnp.where(per_image(_is_outside(given), x_adv), jnp.nan, x_adv) if is_traced(x) else x_adv
    if asks:
        refuse_not_finite(Compiled(finite)(x, keys.fold(Purpose.QUERY)))
    found: Array = Compiled(attack)(x, labels, keys, start)
    return found


@dataclass(frozen=True, eq=False)
class Guard:
    """An `Oracle` with checked answers in the working precision; queries are in the precision of the images.

    Attributes:
      oracle: answers the queries.
      centre: the images [B, H, W, C] around which the attack looks, in the working precision.
      given: dtype of the images before conversion.
      labels: labels of the whole attack, checked against the number of classes; None if they are checked elsewhere.
    """

    oracle: Oracle
    centre: Array
    given: Any
    labels: AnyArray | None = None

    @classmethod
    def of(cls, oracle: Oracle, x: Array, labels: AnyArray | None = None) -> Guard:
        """The guard of an attack on the images x, which it takes into the working precision."""
        require_oracle("attack: oracle", oracle)
        return cls(oracle, x.astype(working_type(x)), x.dtype, labels)

    def logits(self, x: Array, keys: Keys) -> Array:
        """Checked logits [B, K]; see `Oracle`."""
        return fast_in_loops(self._logits)(x, keys)

    def _logits(self, x: Array, keys: Keys) -> Array:
        return self._checked(self.oracle.logits(self.rounded(x), keys), len(x))

    def grad(self, loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        """Checked losses [B], logits [B, K] and gradient [B, H, W, C]; see `Oracle`."""
        return fast_in_loops(partial(self._grad, loss))(x, labels, keys)

    def _grad(self, loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
        def judge(logits: Array, labels: Array) -> Array:
            logits = self._checked(logits)
            losses = loss(logits, labels)
            expected = f"attack: expected a loss of shape [{len(logits)}], one per image, got {described(losses)}"
            require(jnp.shape(losses) == logits.shape[:1], expected)
            return losses

        answer = self.oracle.grad(judge, self.rounded(x), labels, keys)
        expected = "attack: expected Oracle.grad to give (losses [B], logits [B, K], gradient [B, H, W, C])"
        require(isinstance(answer, tuple) and len(answer) == 3, f"{expected}, got {described(answer)}")
        losses, logits, gradient = answer
        same = jnp.shape(losses) == x.shape[:1] and jnp.shape(gradient) == x.shape
        require(same, f"{expected} of images {x.shape}, got {', '.join(described(part) for part in answer)}")
        return losses.astype(x.dtype), self._checked(logits, len(x)), gradient.astype(x.dtype)

    def rounded(self, x: Array) -> Array:
        """x in the dtype of the images, rounded towards them."""
        if self.given == x.dtype:
            return x
        kind, distance = jnp.finfo(self.given), jnp.abs(x - self.centre)
        nearest = lax.reduce_precision(x, kind.nexp, kind.nmant).astype(self.given)  # XLA may drop pairs of casts
        found = self.centre.astype(self.given)
        for candidate in (jnp.nextafter(nearest, found), nearest):
            near = jnp.abs(candidate.astype(x.dtype) - self.centre) <= distance
            found = jnp.where(near, candidate, found)
        return found

    def _checked(self, logits: Any, batch_size: int | None = None) -> Array:
        is_array = isinstance(logits, jax.Array | np.ndarray)
        shape: tuple[int, ...] = logits.shape if is_array else ()
        fits = len(shape) == 2 and batch_size in (None, shape[0])
        size = "B" if batch_size is None else batch_size
        require(fits, f"attack: expected logits [{size}, K], got {described(logits)}")
        way = "if that is one output s [B, 1] per image, two logits are jnp.concatenate([0 * s, s], axis=1)"
        require(shape[1] >= 2, f"attack: expected logits [B, K] with K >= 2, got {described(logits)}; {way}")
        if self.labels is not None:
            check_classes(self.labels, shape[1])
        checked: Array = logits.astype(self.centre.dtype)
        return checked


def check_settings(attack: Any) -> None:
    """Refuses an attack with a threat, or a loss if it has one, that is not of that kind."""
    name = type(attack).__name__
    check_threat(name, attack.threat)
    if hasattr(attack, "loss"):
        expected = "a function of logits and labels, such as core.cross_entropy"
        require_role(f"{name}: loss", attack.loss, ("__call__",), expected)


def check_inputs(
    x: AnyArray, labels: AnyArray, *, pairs: bool = True, reference: bool = False
) -> tuple[AnyArray, AnyArray]:
    """Images, clipped to [0, 1] by no more than rounding, and their labels; traced ones are unchanged.

    Args:
      x, labels, pairs, reference: see `carry_out`.

    Raises:
      InputError: with the expected and the given value.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import check_inputs
      >>> x, labels = check_inputs(np.full((1, 2, 2, 1), 1.0000001), np.array([3]))
      >>> float(x.max())
      1.0
    """
    x, labels = (value if is_traced(value) else np.asarray(value) for value in (x, labels))
    is_image = x.ndim == 4 and jnp.issubdtype(x.dtype, jnp.floating)
    require(is_image, f"attack: expected float images [B, H, W, C], got {described(x)}")
    _, rows, height, width = x.shape
    first = min(height, width) > 4 and (rows == 3 or (rows == 1 and height == width))
    way = "x.transpose(0, 2, 3, 1) is [B, H, W, C]"
    require(not first, f"attack: expected images [B, H, W, C], and {x.shape} looks like [B, C, H, W]: {way}")
    if not (reference and jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == 2):
        _check_labels(labels, len(x), pairs)
    require(len(labels) == len(x), f"attack: expected {len(x)} reference logits [B, K], got {described(labels)}")
    return clip_to_box(x, "attack"), labels


def check_start(start: AnyArray, x: AnyArray, threat: Threat | None) -> AnyArray:
    """The images from which an attack begins, clipped to [0, 1] by no more than rounding; see `carry_out`.

    Raises:
      InputError: they are not float images of the shape of x, or lie outside of [0, 1] or of the ball around x by more
        than 1e-6. Traced values are not known, and are projected by `carry_out`.
    """
    start = start if is_traced(start) else np.asarray(start)
    fits = start.shape == x.shape and jnp.issubdtype(start.dtype, jnp.floating)
    require(fits, f"attack: expected a start of float images {x.shape}, got {described(start)}")
    start = clip_to_box(start, "attack: start")
    if threat is not None and x.size > 0 and not (is_traced(start) or is_traced(x)):
        kind = np.float64 if x.dtype == np.float64 else np.float32
        lengths = np.asarray(threat.length(start.astype(kind) - x.astype(kind)))
        far = np.flatnonzero(~(lengths <= threat.epsilon + BOX_TOLERANCE))
        found = f"found {lengths[far[0]]:g} for image {far[0]}" if len(far) else ""
        require(len(far) == 0, f"attack: start must lie within {threat} of the images, {found}")
    return start


def project_start(start: Array, x: Array, threat: Threat | None) -> Array:
    """The start in the dtype of the images, and in the ball around them where one is given."""
    start = start.astype(x.dtype)
    return start if threat is None else threat.project(start, x)


def check_oracle(oracle: Oracle, x: AnyArray, labels: AnyArray) -> None:
    """Refuses a predictor that attacks would refuse, by the shapes of its logits; nothing is computed.

    Args:
      oracle: answers for the predictor.
      x: images [B, H, W, C] in [0, 1], a few of the images to attack.
      labels: [N], labels of all of them.
    """

    def logits(x: Array, keys: Keys) -> Array:
        guard = Guard.of(oracle, x, labels)
        return guard.logits(guard.centre, keys)

    jax.eval_shape(logits, x, Keys.of(0, len(x)))


def check_classes(labels: AnyArray, num_classes: int) -> None:
    """Refuses labels, or pairs, that do not lie below the number of classes; traced values are not checked."""
    if not has_labels(labels):
        expected = f"attack: expected reference logits of {num_classes} classes, as the predictor's"
        require(labels.shape[1] == num_classes, f"{expected}, got {described(labels)}")
        return
    both = "which pairs (label, class aimed at) and one-hot rows could both be"
    ambiguous = f"attack: with 2 classes expected labels [B], got {described(labels)}, {both}"
    require(labels.ndim == 1 or num_classes > 2, f"{ambiguous}: take pairs[:, 0] or rows.argmax(axis=1)")
    if not is_traced(labels) and labels.size > 0:
        low, high = (int(end) for end in (np.min(np.asarray(labels)), np.max(np.asarray(labels))))
        found = low if low < 0 else high
        require(0 <= found < num_classes, f"attack: labels must lie in 0..{num_classes - 1}, found {found}")


def working_type(x: AnyArray) -> Any:
    """The dtype in which images are attacked: float32, or float64 if they are."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def has_labels(labels: AnyArray) -> bool:
    """Whether these are labels or pairs, rather than reference logits."""
    return jnp.issubdtype(labels.dtype, jnp.integer)


def all_finite(logits: AnyArray) -> Array:
    """[B], whether all logits of an image are finite."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def refuse_not_finite(finite: AnyArray) -> None:
    """Raises `InputError` with the number of images that have logits that are not finite, if there are any."""
    if not is_traced(finite):
        bad = np.flatnonzero(~np.asarray(finite))
        require(len(bad) == 0, f"attack: logits of {len(bad)} images are not finite (first: {bad[:1]})")


def _check_labels(labels: AnyArray, size: int, pairs: bool) -> None:
    shapes = [(size,), (size, 2)] if pairs else [(size,)]
    kind = "integer labels (or pairs of them)" if pairs else "integer labels [B]"
    way = "of one-hot rows take rows.argmax(axis=1)" if labels.ndim == 2 else "one per image"
    fits = labels.shape in shapes and has_labels(labels)
    require(fits, f"attack: expected {size} {kind}, got {described(labels)}; {way}")
    if labels.ndim == 2 and not is_traced(labels):
        same = np.flatnonzero(labels[:, 0] == labels[:, 1])
        found = f"found {tuple(labels[same[0]].tolist())} for image {same[0]}" if len(same) else ""
        require(len(same) == 0, f"attack: in a pair (label, class aimed at) the two must differ, {found}")


def _is_outside(x: Array) -> Array:
    """[B], whether an image has a pixel that is NaN or outside [0, 1] by more than rounding."""
    inside = (x >= -BOX_TOLERANCE) & (x <= 1 + BOX_TOLERANCE)
    return ~jnp.all(inside, axis=(1, 2, 3))
