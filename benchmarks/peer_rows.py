"""The rows of benchmarks/peers.py: each operation of ours, its limit in bare JAX, and its peers, timed in one process.

    python -m benchmarks.peer_rows broyden small 5

The process takes all cores that it may use: benchmarks/peers.py chooses them. Prints JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bare import (
    ATTACK_STEPS,
    BACKWARD,
    PHANTOM,
    STEPS,
    bare,
    bare_entropy_reduction,
    bare_implicit,
    bare_phantom,
    bare_step,
    bare_update,
)
from benchmarks.kernels import cells, jaxopt_anderson, jaxopt_broyden, seconds, vmapped_jaxopt
from benchmarks.pages import Row
from benchmarks.peer_cases import BATCHES, Case, Run, Work, installed
from benchmarks.steps import images
from configs.cifar import ATTACK, EPSILON, STEP_SIZE, recipe, with_trades
from deq_jax import Anderson, Broyden, EntropyReduced, FixedPoint, Implicit, deq, solve
from deq_jax.attacks import oracle_of
from deq_jax.core import Solver, cross_entropy
from deq_jax.training import Batch, TrainState, train_step


def prediction(case: Case) -> Work:
    """Encoder, solver, phantom steps without their gradient, decoder."""
    ours = jax.jit(lambda variables, x: case.model(variables, x).logits)
    limit = jax.jit(lambda variables, x: bare(case.model, variables, x)[0])
    given, found = (case.variables, case.x), case.torch()
    peers = {}
    if found:
        torch_mdeq, network, x, _ = found
        peers["torchdeq"] = torch_mdeq.without_gradients(network.frozen().logits, x, phantom_layer(torch_mdeq))
    return Work(partial(ours, *given), partial(limit, *given), peers)


def solver(ours: Solver, theirs: str, make: Callable[..., Any] | None, case: Case) -> Work:
    """A solver alone, from the state 0."""
    u, z = case.injection()
    apply, given = case.model.apply_cell, (case.params, z, u)

    def run(params: Any, z: Any, u: Any) -> tuple[Any, Any, jax.Array]:
        solution = solve(ours, apply, params, z, u)
        return solution.z, solution.states, solution.residuals

    peers: dict[str, Run] = {}
    found = case.torch()
    if found:
        torch_mdeq, network, x, _ = found
        features = torch_mdeq.without_gradients(network.encode, x)()
        peers["torchdeq"] = partial(torch_mdeq.solved, network.frozen(), features, theirs, STEPS + 1)
    if make is not None:
        vmapped = jax.jit(partial(vmapped_jaxopt, case.model.cell, make=make))
        peers["jaxopt under vmap"] = partial(vmapped, {"params": case.params}, z, u)
    limit = jax.jit(partial(cells, apply, STEPS + 1))
    return Work(partial(jax.jit(run), *given), partial(limit, *given), peers)


def phantom(case: Case) -> Work:
    """The layer and its phantom gradient by the cell's parameters and the injection."""
    return layer(case, case.model.dynamics.gradient, partial(bare_phantom, case.model.apply_cell), phantom_layer)


def implicit(case: Case) -> Work:
    """The layer and its implicit gradient by the cell's parameters and the injection."""
    limit = partial(bare_implicit, case.model.apply_cell)
    return layer(case, Implicit(Broyden(BACKWARD, tolerance=0)), limit, implicit_layer)


def layer(case: Case, gradient: Any, limit: Callable[..., Any], theirs: Callable[[Any], Any]) -> Work:
    """A layer and its gradient."""
    u, z = case.injection()
    cotangent = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), z)
    given = (case.params, u, z, cotangent)

    def ours(params: Any, u: Any, z: Any, cotangent: Any) -> Any:
        dynamics = case.model.dynamics
        run = partial(deq, case.model.apply_cell, solver=dynamics.solver, gradient=gradient)
        return jax.vjp(lambda params, u: run(params, u, z)[0], params, u)[1](cotangent)

    peers: dict[str, Run] = {}
    found = case.torch()
    if found:
        torch_mdeq, network, x, _ = found
        features = torch_mdeq.without_gradients(network.encode, x)()
        directions = [torch_mdeq.images(leaf) for leaf in cotangent]
        peers["torchdeq"] = partial(torch_mdeq.layer_gradient, network, features, theirs(torch_mdeq), directions)
    return Work(partial(jax.jit(ours), *given), partial(jax.jit(limit), *given), peers)


def implicit_layer(torch_mdeq: Any) -> Any:
    """torchdeq's layer with as many backward steps as ours."""
    return torch_mdeq.implicit_layer(STEPS, BACKWARD)


def phantom_layer(torch_mdeq: Any) -> Any:
    """torchdeq's layer with as many applications of the cell as ours."""
    return torch_mdeq.phantom_layer(STEPS, PHANTOM, 0.5)


def training(name: str, case: Case) -> Work:
    """A training step: PGD-10 through phantom gradients, then Adam."""
    config = replace(recipe("cifar10", case.modules), classifier=case.model, augmentation=None)
    config = with_trades(config) if name == "trades" else config
    optimizer = optax.adam(1e-3)
    params, statistics = case.variables["params"], case.variables["batch_stats"]
    state = TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))
    batch = Batch(case.x, case.labels, jnp.arange(len(case.x)))
    ours = jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))
    limit = jax.jit(partial(bare_step, case.model, name == "trades", optimizer))
    peers: dict[str, Run] = {}
    found = case.torch()
    if found:
        torch_mdeq, network, x, labels = found
        attack = (ATTACK_STEPS["step"], STEP_SIZE, EPSILON)
        from benchmarks import torch_work  # noqa: PLC0415

        steps = torch_work.Training(network, phantom_layer(torch_mdeq), attack)
        peers["torchdeq"] = partial({"pgd-at": steps.pgd_at, "trades": steps.trades}[name], x, labels)
    return Work(partial(ours, state, batch), partial(limit, state, case.x, case.labels), peers)


def entropy_reduction(case: Case) -> Work:
    """A prediction with input entropy reduction: ten updates of the input after every second step."""
    defence = EntropyReduced(case.model)
    ours = jax.jit(lambda variables, x: defence(variables, x).logits)
    limit, given = jax.jit(partial(bare_entropy_reduction, defence)), (case.variables, case.x)
    peers: dict[str, Run] = {}
    found = case.torch()
    if found:
        from benchmarks import torch_work  # noqa: PLC0415

        _, network, x, _ = found
        peers["PyTorch"] = partial(torch_work.entropy_reduced, network.frozen(), x, defence)
    return Work(partial(ours, *given), partial(limit, *given), peers)


def plain_attack() -> Work:
    """PGD on a plain convolutional network, last iterate."""
    plain = nn.Sequential(
        [
            nn.Conv(32, (3, 3), padding=1),
            nn.relu,
            nn.Conv(64, (3, 3), strides=2, padding=1),
            nn.relu,
            partial(jnp.mean, axis=(1, 2)),
            nn.Dense(10),
        ]
    )
    x, labels = map(jnp.asarray, images(BATCHES["plain"]))
    variables: Any = plain.init(jax.random.key(0), x)
    params, steps = variables["params"], ATTACK_STEPS["plain"]
    attack, key = replace(ATTACK, steps=steps), jax.random.key(1)

    def logits(x: jax.Array) -> Any:
        return plain.apply(variables, x)

    ours = jax.jit(lambda x, labels: attack(oracle_of(logits), x, labels, key))
    update = jax.jit(lambda x_adv, x, labels: bare_update(lambda x: cross_entropy(logits(x), labels), x_adv, x))

    def limit() -> jax.Array:
        x_adv = x + 1e-3
        for _ in range(steps):  # XLA's own gradients of convolutions are slower in a compiled loop
            x_adv = update(x_adv, x, labels)
        return x_adv

    peers = dict(attack_libraries(params, x, labels, steps)) if installed("torch", "torchdeq") else {}
    return Work(partial(ours, x, labels), limit, peers)


def attack_libraries(params: Any, x: jax.Array, labels: jax.Array, steps: int) -> Iterator[tuple[str, Run]]:
    """The same attack by other libraries, on the same network in PyTorch."""
    import torch  # noqa: PLC0415 (optional)

    from benchmarks import torch_mdeq, torch_work  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, inputs, classes = (
        torch_work.plain_network(params),
        torch_mdeq.images(x),
        torch.tensor(np.asarray(labels)).long(),
    )
    if installed("torchattacks"):
        import torchattacks  # noqa: PLC0415

        attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=steps)
        yield "torchattacks", partial(attack, inputs, classes)
    if installed("foolbox"):
        import foolbox  # noqa: PLC0415

        pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps)
        yield "foolbox", partial(pgd.run, foolbox.PyTorchModel(model, bounds=(0, 1)), inputs, classes, epsilon=EPSILON)


ROWS: dict[str, Callable[[Case], Work]] = {
    "prediction": prediction,
    "fixed-point": partial(solver, FixedPoint(STEPS, tolerance=0), "fixed_point_iter", None),
    "anderson": partial(solver, Anderson(STEPS, tolerance=0), "anderson", jaxopt_anderson),
    "broyden": partial(solver, Broyden(STEPS, tolerance=0), "broyden", jaxopt_broyden),
    "phantom": phantom,
    "implicit": implicit,
    "pgd-at": partial(training, "pgd-at"),
    "trades": partial(training, "trades"),
    "entropy": entropy_reduction,
}


def work(name: str, size: str) -> Work:
    """The work of a row."""
    return plain_attack() if name == "pgd" else ROWS[name](Case(size))


def measure(work: Work, repeats: int) -> Row:
    """Seconds of ours, and the ratios of alternating runs: median, smallest, largest of a pair."""
    runs = {"ours": work.ours, "limit": work.limit, **work.peers}
    times = [{name: seconds(run, ()) for name, run in runs.items()} for _ in range(repeats + 1)][1:]  # first compiles
    row: Row = {"seconds": statistics.median(one["ours"] for one in times), "ratios": {}}
    for name in runs:
        ratios = [one["ours"] / one[name] for one in times]
        found = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
        row["ratios"] |= {} if name == "ours" else {name: found}
    return row


if __name__ == "__main__":
    name, size, repeats = sys.argv[1:]
    print(json.dumps({"batch": BATCHES[size], **measure(work(name, size), int(repeats))}))
