"""Adaptive attacks on defences: surrogates that give the gradient of a defended classifier.

A surrogate is a frozen object called as ``surrogate(classifier, variables) -> Oracle``, as in `deq_jax.surrogates`.
`BPDA` is for anyone's wrapper around a classifier, the others are for input entropy reduction (`EntropyReduced`);
success is still measured on the defended predictor (`attacks.gradient_from`).
Their oracles draw from the keys of a query, so a random defence is attacked through
`attacks.expectation`. Square and SPSA need no surrogate.

References: Athalye et al. 2018 (BPDA); Croce et al. 2022 (adaptive attacks on test-time defences).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.attacks.oracles import Oracle, oracle_of
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import InputError, described, require
from deq_jax.core.gradients import Phantom, straight_through
from deq_jax.core.keys import Keys
from deq_jax.core.solvers import differentiable
from deq_jax.core.types import Array, Gradient, Loss, PyTree
from deq_jax.defences.entropy import EntropyGradient, EntropyReduced, Purified, RandomDirection, reduce_entropy
from deq_jax.models.base import Prediction, Variables


def identity(x: Array) -> Array:
    """x itself."""
    return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BPDA:
    """The gradient of a predictor ``classifier(g(x))``, where the derivative of a proxy replaces the derivative of g.

    The logits are the predictor's own. The predictor is a frozen dataclass with the classifier in one field. It calls
    this field as any `Classifier`, and asks nothing else of it. So g need not be named: the classifier's input is g(x).
    It may be random.

    Attributes:
      proxy: ``x [B, H, W, C] -> [B, ...]``, differentiable, of the shape of g(x); a named function or a frozen
        dataclass.
      part: name of the predictor's field that holds the classifier.
      random: let the predictor draw from the keys of a query; for evaluations with `draws`.

    References: Athalye et al. 2018, section 4.1.

    Examples:
      >>> from dataclasses import dataclass
      >>> import jax.numpy as jnp
      >>> from deq_jax import Explicit
      >>> from deq_jax.models import SmallCNN
      >>> from deq_jax.surrogates import BPDA, judged
      >>> @dataclass(frozen=True)
      ... class Rounded:
      ...     base: Explicit
      ...     def __call__(self, variables, x, **options):
      ...         return self.base(variables, jnp.round(x), **options)
      >>> predictor = Rounded(Explicit(SmallCNN(num_classes=3, channels=4)))
      >>> oracle = judged(BPDA(), predictor, variables={})  # jnp.round passes its gradient on unchanged
    """

    proxy: Callable[[Array], Array] = field(default=identity, metadata={"static": True})
    part: str = field(default="base", metadata={"static": True})
    random: bool = field(default=False, metadata={"static": True})

    def __call__(self, classifier: Any, variables: Variables) -> Oracle:
        within = getattr(classifier, self.part, None)
        wraps = callable(within) and is_dataclass(classifier) and not isinstance(classifier, EntropyReduced)
        expected = f"BPDA: expected a dataclass that calls the classifier in its field {self.part!r}"
        require(wraps, f"{expected}, got {type(classifier).__name__}")

        def logits(x: Array, keys: Keys) -> Array:
            proxy = self.proxy(x)

            def classify(variables: Variables, seen: Array, **options: Any) -> Prediction:
                same = seen.shape == proxy.shape
                require(same, f"BPDA: the classifier is given images {seen.shape}, the proxy has {proxy.shape}")
                given = straight_through(seen, proxy.astype(seen.dtype))
                prediction: Prediction = cast(Any, within)(variables, given, **options)
                return prediction

            predictor = replace(classifier, **{self.part: classify})
            try:
                answer: Array = predictor(variables, x, keys=keys if self.random else None).logits
            except AttributeError as error:
                raise InputError(f"{expected} and asks nothing else of it ({error})") from None
            return answer

        return oracle_of(logits)


def require_defended(classifier: Any, where: str) -> EntropyReduced:
    """The classifier itself, if it has a defence.

    Args:
      classifier: any classifier.
      where: begins the message of an error.

    Raises:
      InputError: it has no input entropy reduction.

    Examples:
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.surrogates import require_defended
      >>> require_defended(small_cnn(num_classes=10, channels=12), "EndToEnd")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: EndToEnd: expected an EntropyReduced classifier, got an Explicit
    """
    if not isinstance(classifier, EntropyReduced):
        raise InputError(f"{where}: expected an EntropyReduced classifier, got {described(classifier)}")
    return classifier


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BPDAIdentity:
    """Forward the defence, backward the identity: the base classifies the purified input, which passes its gradient on.

    References: Athalye et al. 2018, section 4.1.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import with_surrogates
      >>> from deq_jax.surrogates import BPDAIdentity
      >>> with_surrogates("pgd", PGD(Linf(0.1)), [BPDAIdentity()])[0].name
      'pgd.BPDAIdentity'
    """

    def __call__(self, classifier: EntropyReduced, variables: Variables) -> Oracle:
        defence = require_defended(classifier, type(self).__name__)

        def logits(x: Array, keys: Keys) -> Array:
            found = _purified(defence, variables, x, keys)
            return defence.base(variables, straight_through(found.x, x)).logits

        return oracle_of(logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BPDAHead:
    """Forward the defence, backward through decoder(gradient(f, z; x)), with the regulated state z held constant.

    By default that is decoder(f(z; x)). Logits and gradient both come from this expression.

    Attributes:
      gradient: estimator that leads on from the state.

    Examples:
      >>> from deq_jax import Phantom
      >>> from deq_jax.surrogates import BPDAHead
      >>> BPDAHead(Phantom(5)).gradient.steps
      5
    """

    gradient: Gradient = field(default=Phantom(0), metadata={"static": True})

    def __call__(self, classifier: EntropyReduced, variables: Variables) -> Oracle:
        defence = require_defended(classifier, type(self).__name__)

        def logits(x: Array, keys: Keys) -> Array:
            found = _purified(defence, variables, x, keys)
            return self._lead_on(defence, variables, x, found.x, defence.read(found.solution, keys))

        return oracle_of(logits)

    @compiled("defence")
    def path(self, defence: EntropyReduced, variables: Variables, x: Array, keys: Keys) -> Array:
        """Logits [T, B, K] led on from each regulated state, with the input with which it was solved."""
        found = _purified(defence, variables, x, keys)
        inputs = jnp.repeat(found.inputs, defence.every, axis=0)

        def lead_on(pair: tuple[Array, PyTree]) -> Array:
            return self._lead_on(defence, variables, x, *pair)

        logits: Array = lax.map(lead_on, (inputs, found.solution.states))
        return logits

    def _lead_on(self, defence: EntropyReduced, variables: Variables, x: Array, x_hat: Array, z: PyTree) -> Array:
        u = defence.base.encode(variables, straight_through(x_hat, x))
        state = self.gradient(defence.base.apply_cell, variables["params"]["cell"], u, z)
        return defence.decode(variables, state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BPDASolver:
    """Forward the defence, backward through the solver's own steps; updates are constant: the sign's derivative is 0.

    It is to the defended classifier what `surrogates.ThroughSolver` is to the undefended one; without updates the two
    have the same gradient.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.evaluation import with_surrogates
      >>> from deq_jax.surrogates import BPDASolver
      >>> with_surrogates("pgd", PGD(Linf(0.1)), [BPDASolver()])[0].name
      'pgd.BPDASolver'
    """

    def __call__(self, classifier: EntropyReduced, variables: Variables) -> Oracle:
        return _regulated(_with_differentiable_solver(require_defended(classifier, type(self).__name__)), variables)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EndToEnd:
    """Differentiates the whole defence: every solver step and every update of the input, each computed again.

    The sign of an update is taken for ``tanh(g / (temperature mean|g|))`` in the backward pass, with the mean over
    the image. Projections have their own derivatives. Costs several times the defence itself.

    Attributes:
      temperature: softness of the smooth sign. A small one is nearer to the sign, but its gradient vanishes more often.
      smooth: also take the smooth sign in the forward pass.

    Examples:
      >>> from deq_jax.surrogates import EndToEnd
      >>> EndToEnd(temperature=0.5).smooth
      False
    """

    temperature: float = field(default=1.0, metadata={"static": True})
    smooth: bool = field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"EndToEnd: temperature must be > 0, got {self.temperature!r}")

    def __call__(self, classifier: EntropyReduced, variables: Variables) -> Oracle:
        return _regulated(self.differentiable(classifier), variables)

    @compiled("defence")
    def path(self, defence: EntropyReduced, variables: Variables, x: Array, keys: Keys) -> Array:
        """Logits [T, B, K] of the regulated states."""
        states = reduce_entropy(self.differentiable(defence), variables, x, keys).solution.states
        logits: Array = lax.map(partial(defence.decode, variables), states)
        return logits

    def differentiable(self, classifier: EntropyReduced) -> EntropyReduced:
        """The defence with a smooth sign and a solver that can be differentiated; of the same predictions.

        Raises:
          InputError: its direction has no smooth form.
        """
        defence = _with_differentiable_solver(require_defended(classifier, type(self).__name__))
        direction = defence.direction
        known = isinstance(direction, EntropyGradient | RandomDirection)
        require(known, f"EndToEnd: expected EntropyGradient or RandomDirection, got {direction!r}")
        if isinstance(direction, EntropyGradient):
            direction = replace(direction, steepest=SmoothSign(self.temperature, self.smooth))
        return replace(defence, direction=direction)


@dataclass(frozen=True)
class SmoothSign:
    """The sign of a gradient [B, ...], differentiated as ``tanh(g / (temperature mean|g|))``.

    Attributes:
      temperature: relative to each image's mean magnitude.
      smooth: also return the smooth sign.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax.surrogates import SmoothSign
      >>> SmoothSign(temperature=1.0)(jnp.array([[-2.0, 0.0, 4.0]])).tolist()
      [[-1.0, 0.0, 1.0]]
    """

    temperature: float
    smooth: bool = False

    def __call__(self, gradient: Array) -> Array:
        scale = jnp.mean(jnp.abs(gradient), axis=range(1, gradient.ndim), keepdims=True)
        soft = jnp.tanh(gradient / (self.temperature * jnp.where(scale > 0, scale, 1)))
        return soft if self.smooth else straight_through(jnp.sign(gradient), soft)


class _HasPath(Protocol):
    def path(self, defence: EntropyReduced, variables: Variables, x: Array, keys: Keys) -> Array: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PathAverage:
    """The mean of the losses of all regulated states z_1 .. z_T, so that no state on the way is right.

    The oracle's logits are the mean of the states' logits.

    Attributes:
      source: gives the logits along the path, and how they are differentiated: `BPDAHead` or `EndToEnd`.

    Examples:
      >>> from deq_jax.surrogates import EndToEnd, PathAverage
      >>> PathAverage(EndToEnd()).source.temperature
      1.0
    """

    source: _HasPath = BPDAHead()

    def __call__(self, classifier: EntropyReduced, variables: Variables) -> Oracle:
        path = partial(self.source.path, require_defended(classifier, type(self).__name__), variables)

        def grad(loss: Loss, x: Array, labels: Array, keys: Keys) -> tuple[Array, Array, Array]:
            def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
                logits = path(x, keys)
                losses = jnp.mean(jax.vmap(loss, (0, None))(logits, labels), axis=0)
                return jnp.sum(losses), (losses, jnp.mean(logits, axis=0))

            gradient, (losses, logits) = jax.grad(total, has_aux=True)(x)
            return losses, logits, gradient

        return Oracle(lambda x, keys: jnp.mean(path(x, keys), axis=0), grad)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnBase:
    """Any surrogate of the undefended classifier: attacks that are transferred to the defended one.

    Attributes:
      surrogate: ``(base, variables) -> Oracle``, any surrogate of an undefended classifier.

    Examples:
      >>> from deq_jax.surrogates import OnBase, ThroughSolver
      >>> OnBase(ThroughSolver()).surrogate
      ThroughSolver()
    """

    surrogate: Callable[[Any, Variables], Oracle]

    def __call__(self, classifier: EntropyReduced, variables: Variables) -> Oracle:
        return self.surrogate(require_defended(classifier, type(self).__name__).base, variables)


def _with_differentiable_solver(defence: EntropyReduced) -> EntropyReduced:
    """The same defence with a solver that can be differentiated."""
    return replace(defence, base=defence.base.with_dynamics(solver=differentiable(defence.solver)))


def _regulated(defence: EntropyReduced, variables: Variables) -> Oracle:
    """The defence's logits, differentiated through their actual computation."""

    def logits(x: Array, keys: Keys) -> Array:
        found = reduce_entropy(defence, variables, x, keys)
        return defence.decode(variables, defence.read(found.solution, keys))

    return oracle_of(logits)


def _purified(defence: EntropyReduced, variables: Variables, x: Array, keys: Keys) -> Purified:
    """The result of the defence for x, held constant."""
    return reduce_entropy(defence, *lax.stop_gradient((variables, x)), keys)
