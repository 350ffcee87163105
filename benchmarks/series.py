"""Predictions and training steps of growing size: a part of benchmarks/growth.py.

The networks are small and have random weights. Every solver takes all its steps. A training step is that of the
training loop, but its result has memory of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import seconds
from benchmarks.memory import planned_bytes
from benchmarks.pages import Row
from benchmarks.scale import mapped, work
from deq_jax import Anderson, Backprop, Broyden, Dynamics, Equilibrium, FixedPoint, Implicit, Phantom, TrainConfig
from deq_jax.models import Variables, mdeq, small_deq
from deq_jax.parallel import AXIS
from deq_jax.storage import load_config
from deq_jax.training import Batch, TrainState

STEPS, BATCH, SIDE, CHANNELS = 8, 8, 16, 16  # of every series but the one that varies it
SHARED = 64  # images that the devices share
WIDTHS, HEADS, LARGER = (8, 16, 32, 64), (4, 8, 16, 32), 32  # of the branches, and the side of their images


class Case(NamedTuple):
    """A prediction or a training step of a network."""

    classifier: Equilibrium
    trains: bool
    batch: int = BATCH
    side: int = SIDE
    devices: int = 1


class Series(NamedTuple):
    """Pieces of work at several sizes; they are linear where they grow as the size to this power."""

    size: str
    sizes: tuple[int, ...]
    setting: str
    works: dict[str, Callable[[int], Case]]
    power: int = 1


def phantom(solver: Any) -> Equilibrium:
    """The small DEQ with the phantom gradient."""
    return small_deq(10, CHANNELS, Dynamics(solver, gradient=Phantom(steps=5, damping=0.5)))


def exact(solver: Any) -> Equilibrium:
    """The small DEQ with the implicit gradient, whose equation the same solver solves."""
    return small_deq(10, CHANNELS, Dynamics(solver, gradient=Implicit(solver)))


def through(solver: Any) -> Equilibrium:
    """The small DEQ with the gradient through the solver's steps."""
    return small_deq(10, CHANNELS, Dynamics(solver, gradient=Backprop(Phantom(steps=5, damping=0.5))))


def branched(count: int) -> Equilibrium:
    """An MDEQ with so many branches, each of half the resolution and twice the channels of the one before."""
    modules = mdeq(10, WIDTHS[:count], HEADS[:count], 64, expansion=2, dropout=0.0)
    return Equilibrium(*modules, Dynamics(broyden(STEPS), gradient=Phantom(steps=5, damping=0.5)))


def broyden(steps: int, **settings: Any) -> Broyden:
    """Broyden's method, which takes all these steps."""
    return Broyden(steps, tolerance=0, **settings)


def both(case: Callable[[int, bool], Case]) -> dict[str, Callable[[int], Case]]:
    """A prediction and a training step."""
    return {"prediction": lambda size: case(size, False), "training step": lambda size: case(size, True)}


def small(trains: bool, **sizes: int) -> Case:
    """A case of the small DEQ with its usual steps."""
    return Case(phantom(broyden(STEPS)), trains, **sizes)


NETWORK, IMAGES = f"small DEQ with {CHANNELS} channels", f"images of {SIDE}x{SIDE}"
USUAL = f"{STEPS} steps of Broyden"
ALL = {
    "steps": Series(
        "steps",
        (4, 8, 16, 32, 64),
        f"{NETWORK}, batch {BATCH}, {IMAGES}",
        {
            "prediction, FixedPoint": lambda steps: Case(phantom(FixedPoint(steps, tolerance=0)), False),
            "prediction, Anderson": lambda steps: Case(phantom(Anderson(steps, tolerance=0)), False),
            "prediction, Broyden": lambda steps: Case(phantom(broyden(steps)), False),
            "prediction, Broyden that keeps 8": lambda steps: Case(phantom(broyden(steps, history_size=8)), False),
            "training step, Phantom": lambda steps: Case(phantom(broyden(steps)), True),
            "training step, Implicit": lambda steps: Case(exact(broyden(steps)), True),
            "training step, Backprop": lambda steps: Case(through(broyden(steps)), True),
        },
    ),
    "batch": Series(
        "batch",
        (1, 4, 16, 64, 256),
        f"{NETWORK}, {USUAL}, {IMAGES}",
        both(lambda batch, trains: small(trains, batch=batch)),
    ),
    "image": Series(
        "side",
        (8, 16, 32, 64),
        f"{NETWORK}, {USUAL}, batch {BATCH}",
        both(lambda side, trains: small(trains, side=side)),
        power=2,
    ),
    "branches": Series(
        "branches",
        (1, 2, 3, 4),
        f"MDEQ with {', '.join(map(str, WIDTHS))} channels, {USUAL}, batch {BATCH}, images of {LARGER}x{LARGER}",
        both(lambda count, trains: Case(branched(count), trains, side=LARGER)),
    ),
    "devices": Series(
        "devices",
        (1, 2, 4, 8),
        f"{NETWORK}, {USUAL}, {SHARED} {IMAGES} for all devices together",
        both(lambda devices, trains: small(trains, batch=SHARED, devices=devices)),
    ),
}


def measured(series: Series, sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """A row for each piece of work at each size."""
    found = []
    for name, case in series.works.items():
        runs, facts = zip(*(compiled(case(size)) for size in sizes), strict=True)
        rounds = [[seconds(run, ()) for run in runs] for _ in range(repeats + 1)][1:]  # the first one warms up
        for size, fact, times in zip(sizes, facts, zip(*rounds, strict=True), strict=True):
            found.append({"work": name, "size": size, "seconds": list(times), **fact})
    return found


def compiled(case: Case) -> tuple[Callable[[], Any], Row]:
    """A call of the compiled program; seconds of compilation, bytes of one device, operations of all of them."""
    function, arguments = program(case)
    jax.clear_caches()  # so that nothing is traced already
    started = time.perf_counter()
    run = function.lower(*arguments).compile()
    compiling = time.perf_counter() - started
    operations = case.devices * work(jax.make_jaxpr(function)(*arguments).jaxpr)["operations"]
    return lambda: run(*arguments), {"compiling": compiling, "memory": planned_bytes(run), "operations": operations}


def program(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """A function on all devices, and its arguments: random images, and a network with random weights."""
    base = load_config("configs/digits_standard.py", TrainConfig)
    config = replace(base, classifier=case.classifier, batch_size=case.batch, pretrain_steps=0)
    rng, each = np.random.default_rng(0), (case.devices, case.batch // case.devices)
    x = rng.uniform(size=(*each, case.side, case.side, 3)).astype(np.float32)
    variables = initial(case.classifier.with_dynamics(solver=None, gradient=Phantom()), case.side)
    if not case.trains:
        predict = jax.pmap(lambda variables, x: case.classifier(variables, x).logits, AXIS, in_axes=(None, 0))
        return predict, (variables, x)
    params, optimizer = variables["params"], config.optimizer.transformation(1000)
    state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
    labels = rng.integers(10, size=each, dtype=np.int32)
    return mapped(config), (state, Batch(x, labels, np.arange(case.batch, dtype=np.int32).reshape(each)))


@cache
def initial(classifier: Equilibrium, side: int) -> Variables:
    """Random variables of a network, which do not depend on its dynamics."""
    variables: Variables = jax.jit(classifier.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return variables
