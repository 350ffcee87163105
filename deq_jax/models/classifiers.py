"""Classifiers: networks with `init` and `__call__` as pure functions of their variables.

`Equilibrium` is the one place where modules and dynamics meet; `Explicit` is any ordinary network.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError
from jax import lax

from deq_jax.core.cells import apply
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import InputError, described, require, require_role
from deq_jax.core.gradients import Phantom
from deq_jax.core.keys import Keys, Purpose, flat_draws, prng_key
from deq_jax.core.layer import deq
from deq_jax.core.readouts import FinalState, RandomIntermediateState
from deq_jax.core.types import Array, Cell, Gradient, Injection, PyTree, Readout, Solver, check_solver
from deq_jax.models.base import Prediction, Variables
from deq_jax.models.layers import dropout_by_image
from deq_jax.models.penalty import JacobianRegularization

COLLECTIONS = ("params", "batch_stats")


@dataclass(frozen=True)
class Dynamics:
    """How a DEQ is run: its solver, the state that is read out, and its gradient.

    Attributes:
      solver: computes the trajectory; None for no solver.
      readout: chooses a state of the trajectory.
      gradient: differentiates that state.
      compute_dtype: in which the cell computes, e.g. ``jax.numpy.bfloat16``; parameters, states and the solver's
        arithmetic keep theirs. None: as the parameters.
      rematerialize: keep nothing from inside the cell for the backward pass, and compute all of it again: about a third
        more computation for a fraction of the memory. Otherwise convolutions and matrix products are kept, and the rest
        is computed again.

    Examples:
      >>> from deq_jax import Anderson, Dynamics, Implicit, LastState
      >>> Dynamics(Anderson(10), readout=LastState(), gradient=Implicit()).solver.steps
      10
    """

    solver: Solver | None
    readout: Readout = FinalState()
    gradient: Gradient = Phantom(steps=5, damping=0.5)
    compute_dtype: Any = None
    rematerialize: bool = False

    def __post_init__(self) -> None:
        if self.solver is not None:
            check_solver("Dynamics: solver", self.solver)
        require_role("Dynamics: readout", self.readout, ("__call__",), "a readout, such as FinalState()")
        estimator = "a gradient estimator, such as Implicit()"
        require_role("Dynamics: gradient", self.gradient, ("applications",), estimator)


@dataclass(frozen=True)
class Equilibrium:
    """A DEQ classifier: logits = decoder(z*), z* = cell(z*; encoder(x)), from z_0 = 0.

    Attributes:
      encoder: ``(x, train, keys, axis_name) -> Injection``.
      cell: ``(z, injection) -> z``.
      decoder: ``(z, train, axis_name) -> logits``.
      dynamics: how the equilibrium is found, read out and differentiated.
      jacobian: penalises the cell's Jacobian at the state that is read out, in training mode; None for no penalty.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax import Dynamics, Equilibrium, FixedPoint
      >>> from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder
      >>> model = Equilibrium(SmallEncoder(4), SmallCell(4), SmallDecoder(10), Dynamics(FixedPoint(8)))
      >>> variables = jax.eval_shape(model.init, 0, jnp.ones((2, 8, 8, 1)))
      >>> sorted(variables["params"])
      ['cell', 'decoder', 'encoder']
    """

    encoder: nn.Module
    cell: nn.Module
    decoder: nn.Module
    dynamics: Dynamics
    jacobian: JacobianRegularization | None = None

    def __post_init__(self) -> None:
        is_dynamics = isinstance(self.dynamics, Dynamics)
        expected = "expected Dynamics of a solver, such as Dynamics(Broyden(8))"
        require(is_dynamics, f"Equilibrium: dynamics: {expected}, got {described(self.dynamics)}")

    def init(self, key: int | Array, x: Array) -> Variables:
        """Variables ``{"params", "batch_stats"}``, each with the entries encoder, cell and decoder.

        Args:
          key: PRNG key, or an integer seed.
          x: images [B, H, W, C]; only their shape and dtype matter.

        Raises:
          InputError: a part has other variables than these, the cell more than parameters, or f(z) is not like z.
        """
        return self._init(prng_key(key), _at_least_one(x))

    @compiled("self")
    def _init(self, key: Array, x: Array) -> Variables:
        keys = jax.random.split(flat_draws(key), 3)
        u, encoder = self.encoder.init_with_output(keys[0], x)
        z, cell = self.cell.init_with_output(keys[1], zero_state(u), u)
        _check_collections(self.cell, cell, ("params",), "a cell has parameters only: GroupNorm in place of BatchNorm")
        jax.eval_shape(self.apply_cell, cell.get("params", {}), zero_state(u), u)
        decoder = self.decoder.init(keys[2], z)
        for module, variables in ((self.encoder, encoder), (self.decoder, decoder)):
            _check_collections(module, variables)
        parts = {"encoder": encoder, "cell": cell, "decoder": decoder}
        return {
            collection: {name: variables.get(collection, {}) for name, variables in parts.items()}
            for collection in COLLECTIONS
        }

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction:
        """Classifies images.

        Args:
          variables: as `init` makes them.
          x: images [B, H, W, C] in [0, 1].
          train: normalise by the batch's statistics, update the running ones, draw dropout masks.
          keys: randomness for dropout and random readouts, drawn for each image by its number; None: deterministic.
            Flax's ``nn.Dropout`` also draws for each image; other draws of ``make_rng("dropout")`` are for the batch.
          axis_name: mapped axis of the devices that share the batch (for batch statistics).
        """
        u, encoder_stats = self._encode(variables, x, train, keys, axis_name)
        jacobian = self.jacobian if train else None
        dynamics = self.dynamics if jacobian is None else _jittered(self.dynamics, jacobian)
        params = variables["params"]["cell"]
        drawn = None if keys is None else keys.fold(Purpose.READOUT)
        z, solution = deq(
            self.apply_cell,
            params,
            u,
            zero_state(u),
            solver=dynamics.solver,
            readout=dynamics.readout,
            gradient=dynamics.gradient,
            keys=drawn,
        )
        logits, decoder_stats = self._decode(variables, z, train, keys and keys.fold(Purpose.DECODER), axis_name)
        batch_stats = variables["batch_stats"] | {"encoder": encoder_stats, "decoder": decoder_stats}
        evaluations = solution.evaluations + dynamics.gradient.applications
        prediction = Prediction(logits, batch_stats, solution._replace(evaluations=evaluations))
        if jacobian is None:
            return prediction
        if keys is None:
            raise InputError("Equilibrium: a penalty in training mode needs keys, for its probes")
        solved = dynamics.readout(solution, drawn)
        return prediction._replace(penalty=jacobian.penalty(self.apply_cell, params, u, solved, keys))

    @property
    def apply_cell(self) -> Cell:
        """``(params, z, u) -> f(z; u)``, as a pure function of the cell's parameters."""
        return _ModuleCell(self.cell, self.dynamics.compute_dtype, self.dynamics.rematerialize)

    def with_dynamics(self, **changes: Any) -> Equilibrium:
        """The network with other dynamics; see `Dynamics`.

        Examples:
          >>> from deq_jax import Broyden, Dynamics, EnsembleState, Equilibrium
          >>> from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder
          >>> model = Equilibrium(SmallEncoder(4), SmallCell(4), SmallDecoder(10), Dynamics(Broyden(8)))
          >>> model.with_dynamics(readout=EnsembleState()).dynamics.readout
          EnsembleState()
        """
        return replace(self, dynamics=replace(self.dynamics, **changes))

    def encode(self, variables: Variables, x: Array) -> Injection:
        """The injection u of images x, in evaluation mode."""
        return self._encode(variables, x, False, None, None)[0]

    def decode(self, variables: Variables, z: PyTree) -> Array:
        """The logits [B, K] of states z, in evaluation mode: no further application of the cell."""
        return self._decode(variables, z, False, None, None)[0]

    def _encode(
        self, variables: Variables, x: Array, train: bool, keys: Keys | None, axis_name: str | None
    ) -> tuple[Injection, PyTree]:
        return _apply(self.encoder, _part(variables, "encoder"), x, train, keys, axis_name)

    def _decode(
        self, variables: Variables, z: PyTree, train: bool, keys: Keys | None, axis_name: str | None
    ) -> tuple[Array, PyTree]:
        return _apply(self.decoder, _part(variables, "decoder"), z, train, keys, axis_name, takes_keys=False)


@dataclass(frozen=True)
class Explicit:
    """An ordinary network as a classifier.

    Attributes:
      module: ``(x [B, H, W, C], train, keys, axis_name) -> logits [B, K]``; it may leave out arguments after ``x``.

    Examples:
      >>> from deq_jax import Explicit
      >>> from deq_jax.models import ResNet18
      >>> Explicit(ResNet18(num_classes=100)).module.num_classes
      100
    """

    module: nn.Module

    def __post_init__(self) -> None:
        require_role("Explicit: module", self.module, ("init", "apply"), "a Flax module, such as ResNet18()")

    def init(self, key: int | Array, x: Array) -> Variables:
        """Variables ``{"params", "batch_stats"}``; see `Equilibrium.init`."""
        return self._init(prng_key(key), _at_least_one(x))

    @compiled("self")
    def _init(self, key: Array, x: Array) -> Variables:
        variables = self.module.init(flat_draws(key), x)
        _check_collections(self.module, variables)
        return {collection: variables.get(collection, {}) for collection in COLLECTIONS}

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction:
        """Classifies images; see `Equilibrium.__call__`."""
        logits, batch_stats = _apply(self.module, variables, x, train, keys, axis_name)
        return Prediction(logits, batch_stats, None)


def require_deq(classifier: Any, where: str) -> tuple[Equilibrium, Solver]:
    """The classifier and its solver.

    Args:
      classifier: any classifier.
      where: begins the message of an error.

    Raises:
      InputError: it is not an `Equilibrium` with a solver.

    Examples:
      >>> from deq_jax.models import require_deq, small_cnn
      >>> require_deq(small_cnn(num_classes=10, channels=12), "ThroughSolver")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: ThroughSolver: expected an Equilibrium with a solver, got an Explicit
    """
    if not isinstance(classifier, Equilibrium):
        raise InputError(f"{where}: expected an Equilibrium with a solver, got {described(classifier)}")
    solver = classifier.dynamics.solver
    if solver is None:
        raise InputError(f"{where}: expected an Equilibrium with a solver, got one with solver=None")
    return classifier, solver


def zero_state(u: Injection) -> PyTree:
    """The start z_0 = 0 of the dynamics, shaped like the injection's features."""
    return jax.tree.map(jnp.zeros_like, u.features)


def _jittered(dynamics: Dynamics, jacobian: JacobianRegularization) -> Dynamics:
    """The dynamics of a penalised training pass; see `JacobianRegularization`."""
    solver: Any = dynamics.solver
    if solver is None or not isinstance(dynamics.readout, FinalState):
        return dynamics
    first = max(1, solver.steps - jacobian.fewer)
    longer = replace(solver, steps=solver.steps + jacobian.more)
    return replace(dynamics, solver=longer, readout=RandomIntermediateState(first=first))


@dataclass(frozen=True)
class _ModuleCell:
    """A module's f(z; u), computed as the dynamics say; see `Dynamics`."""

    module: nn.Module
    compute_dtype: Any
    rematerialize: bool

    def __call__(self, params: PyTree, z: PyTree, u: PyTree) -> PyTree:
        keep = None if self.rematerialize else _is_costly
        f = jax.checkpoint(self._compute, prevent_cse=False, policy=keep)
        return apply(f, params, z, u)  # CSE is prevented by the loops in which f is differentiated

    def _compute(self, params: PyTree, z: PyTree, u: PyTree) -> PyTree:
        if self.compute_dtype is not None:
            params, z, u = jax.tree.map(self._cast, (params, z, u))
        _check_signature(self.module, "z, injection", (z, u))
        try:
            return self.module.apply({"params": params}, z, u)
        except InvalidRngError:
            name = type(self.module).__name__
            raise InputError(f"{name}: a cell draws nothing at random: dropout belongs in Injection.masks") from None

    def _cast(self, leaf: Array) -> Array:
        return leaf.astype(self.compute_dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _is_costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: the outputs of these are kept for the backward pass."""
    return primitive in (lax.conv_general_dilated_p, lax.dot_general_p)


def _part(variables: Variables, name: str) -> Variables:
    """The variables of the encoder, cell or decoder."""
    return {collection: parts[name] for collection, parts in variables.items()}


@compiled("module", "train", "axis_name", "takes_keys")
def _apply(
    module: nn.Module,
    variables: Variables,
    x: PyTree,
    train: bool,
    keys: Keys | None,
    axis_name: str | None,
    takes_keys: bool = True,
) -> tuple[PyTree, PyTree]:
    """The output of ``module(x, train, keys, axis_name)`` and its batch statistics, updated in training."""
    if any(leaf.shape[0] == 0 for leaf in jax.tree.leaves(x)):
        one = _at_least_one((x, keys))
        output, _ = _apply(module, variables, one[0], train, one[1], axis_name, takes_keys)
        return jax.tree.map(lambda leaf: leaf[:0], output), variables.get("batch_stats", {})
    offered = {"train": train, **({"keys": keys} if takes_keys else {}), "axis_name": axis_name}
    args, kwargs = _arguments(module, x, offered)
    mutable = ["batch_stats"] if train else []
    rngs = {} if keys is None else {"dropout": keys.fold(Purpose.MODULE).shared}
    try:
        with dropout_by_image(keys):
            output, updated = module.apply(variables, *args, **kwargs, mutable=mutable, rngs=rngs)
    except InvalidRngError as error:
        reason = str(error).split(" (")[0]
        raise InputError(f"{reason}; a module draws from the collection 'dropout', when called with keys") from None
    return output, updated.get("batch_stats", variables.get("batch_stats", {}))


def _at_least_one(batch: PyTree) -> PyTree:
    """The batch, leaves [B, ...], or one sample of zeros where it is empty."""

    def fill(leaf: Array) -> Array:
        return jnp.zeros((1, *leaf.shape[1:]), leaf.dtype) if leaf.shape[:1] == (0,) else leaf

    return jax.tree.map(fill, batch)


def _arguments(module: nn.Module, x: PyTree, offered: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The module's arguments: x, and the offered ones that it names, or all of them in order."""
    named = list(inspect.signature(type(module).__call__).parameters)[2:]  # after self and x
    if set(named) <= set(offered):
        return (x,), {name: offered[name] for name in named}
    inputs = (x, *offered.values())
    _check_signature(module, ", ".join(["x" if "keys" in offered else "z", *offered]), inputs)
    return inputs, {}


def _check_signature(module: nn.Module, names: str, inputs: tuple[Any, ...]) -> None:
    """Refuses a module that cannot be called with these inputs."""
    try:
        inspect.signature(type(module).__call__).bind(module, *inputs)
    except TypeError as error:
        raise InputError(f"{type(module).__name__}: expected a module called as ({names}), {error}") from None


def _check_collections(
    module: nn.Module, variables: Any, allowed: Collection[str] = COLLECTIONS, advice: str = ""
) -> None:
    """Refuses variables that are neither trained nor kept."""
    other, name = sorted(set(variables) - set(allowed)), type(module).__name__
    advice = advice or f"a classifier has {' and '.join(COLLECTIONS)} only"
    require(not other, f"{name}: has variables of the kind {', '.join(other)}, but {advice}")
