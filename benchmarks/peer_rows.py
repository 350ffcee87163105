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
from importlib.util import find_spec
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.kernels import cells, jaxopt_anderson, jaxopt_broyden, seconds, vmapped_jaxopt
from benchmarks.pages import Row
from benchmarks.steps import images
from configs.cifar import ATTACK, EPSILON, STEP_SIZE, recipe, with_trades
from deq_jax import Anderson, Broyden, Dynamics, EntropyReduced, Equilibrium, FixedPoint, Implicit, Phantom, deq, solve
from deq_jax.attacks import oracle_of
from deq_jax.core import Solver, cross_entropy, entropy, kl
from deq_jax.models import Variables, mdeq_large, mdeq_small
from deq_jax.training import Batch, TrainState, train_step

Run = Callable[[], Any]

Logits = Callable[[jax.Array], jax.Array]

STEPS, PHANTOM, BACKWARD = 8, 6, 7
"""Steps of the solver, applications that a phantom gradient differentiates, steps of the implicit gradient's solver."""

ATTACK_STEPS = {"step": 10, "plain": 20}

MODELS = {"small": mdeq_small, "LARGE": mdeq_large}

BATCHES = {"small": 16, "LARGE": 8, "plain": 64}


class Work(NamedTuple):
    """What a row measures: an operation, its bare computation, and its peers by name."""

    ours: Run
    limit: Run
    peers: dict[str, Run]


class Case:
    """An MDEQ without dropout, its variables, random images and labels.

    Attributes:
      modules: encoder, cell and decoder.
      model: the classifier made of them.
      variables: its variables.
      x: images [B, 32, 32, 3].
      labels: [B].
    """

    def __init__(self, size: str) -> None:
        dynamics = Dynamics(Broyden(STEPS, tolerance=0), gradient=Phantom(PHANTOM - 1, damping=0.5))
        self.modules = MODELS[size](10, dropout=0.0)
        self.model = Equilibrium(*self.modules, dynamics)
        x, self.labels = images(BATCHES[size])
        self.x = jnp.asarray(x)
        self.variables: Variables = drawn(jax.eval_shape(self.model.init, 0, self.x))
        self.params = self.variables["params"]["cell"]

    def injection(self) -> tuple[Any, Any]:
        """The injection u of the images, and the state 0."""
        u = jax.jit(self.model.encode)(self.variables, self.x)
        return u, jax.tree.map(jnp.zeros_like, u.features)

    def torch(self) -> Any:
        """The same network in PyTorch, its images and labels; None without PyTorch."""
        if not installed("torch", "torchdeq"):
            return None
        import torch  # noqa: PLC0415 (optional)

        from benchmarks import torch_mdeq  # noqa: PLC0415

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        network = torch_mdeq.TorchMdeq.of(self.variables, self.model.cell)
        return torch_mdeq, network, torch_mdeq.images(self.x), torch.tensor(self.labels)


def drawn(shapes: Any) -> Any:
    """Random variables of these shapes, which take no time to compile."""
    rng, constants = np.random.default_rng(0), {"g": 1, "scale": 1, "var": 1, "bias": 0, "mean": 0}

    def leaf(path: Any, like: Any) -> jax.Array:
        name = path[-1].key
        if name in constants:
            return jnp.full(like.shape, constants[name], like.dtype)
        return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(np.prod(like.shape[:-1])), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def installed(*packages: str) -> bool:
    """Whether all these packages are installed."""
    return all(find_spec(package) is not None for package in packages)


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

    def limit(params: Any, u: Any, z: Any, cotangent: Any) -> Any:
        state = cells(case.model.apply_cell, STEPS + 1, params, z, u)
        vjp = jax.vjp(lambda params, u: cells(case.model.apply_cell, PHANTOM, params, state, u), params, u)[1]
        return vjp(cotangent)

    return layer(case, case.model.dynamics.gradient, limit, phantom_layer)


def implicit(case: Case) -> Work:
    """The layer and its implicit gradient by the cell's parameters and the injection."""
    apply = case.model.apply_cell

    def limit(params: Any, u: Any, z: Any, cotangent: Any) -> Any:
        state = cells(apply, STEPS + 1, params, z, u)
        vjp_state = jax.vjp(lambda z: apply(params, z, u), state)[1]

        def step(w: Any, _: None) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, vjp_state(w)[0], cotangent), None

        w = lax.scan(step, cotangent, length=BACKWARD + 1)[0]
        return jax.vjp(lambda params, u: apply(params, state, u), params, u)[1](w)

    theirs: Callable[[Any], Any] = lambda torch_mdeq: torch_mdeq.implicit_layer(STEPS, BACKWARD)  # noqa: E731
    return layer(case, Implicit(Broyden(BACKWARD, tolerance=0)), limit, theirs)


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
        steps = torch_mdeq.Training(network, phantom_layer(torch_mdeq), attack)
        peers["torchdeq"] = partial({"pgd-at": steps.pgd_at, "trades": steps.trades}[name], x, labels)
    return Work(partial(ours, state, batch), partial(limit, state, case.x, case.labels), peers)


def bare(model: Equilibrium, variables: Any, x: jax.Array, train: bool = False) -> tuple[jax.Array, Any]:
    """Logits of as many bare cells, and batch statistics: the last cells are differentiated."""
    parts = [
        {"params": variables["params"][name], "batch_stats": variables["batch_stats"][name]}
        for name in ("encoder", "decoder")
    ]
    u, encoder = model.encoder.apply(parts[0], x, train, mutable=["batch_stats"])
    start, params = jax.tree.map(jnp.zeros_like, u.features), variables["params"]["cell"]
    state = cells(model.apply_cell, STEPS + 1, *lax.stop_gradient((params, start, u)))
    state = cells(model.apply_cell, PHANTOM, params, state, u)
    logits, decoder = model.decoder.apply(parts[1], state, train, mutable=["batch_stats"])
    return logits, {"encoder": encoder["batch_stats"], "cell": {}, "decoder": decoder["batch_stats"]}


def bare_attack(loss: Logits, x: jax.Array, steps: int) -> jax.Array:
    """Steps along the sign of the gradient of a summed loss."""

    def step(x_adv: jax.Array, _: None) -> tuple[jax.Array, None]:
        moved = x_adv + STEP_SIZE * jnp.sign(jax.grad(lambda x: jnp.sum(loss(x)))(x_adv))
        return projected(moved, x), None

    return lax.scan(step, x + 1e-3, length=steps)[0]


def projected(x_adv: jax.Array, x: jax.Array) -> jax.Array:
    """Onto the ball around x and onto [0, 1]."""
    return jnp.clip(jnp.clip(x_adv, x - EPSILON, x + EPSILON), 0, 1)


def bare_step(
    model: Equilibrium,
    trades: bool,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    x: jax.Array,
    labels: jax.Array,
) -> tuple[Any, Any, Any]:
    """A training step of bare cells."""
    logits: Logits = lambda x: bare(model, state.variables, x)[0]  # noqa: E731
    reference = logits(x) if trades else labels
    against = kl if trades else cross_entropy
    x_adv = bare_attack(lambda x: against(logits(x), reference), x, ATTACK_STEPS["step"])

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        if not trades:
            found, statistics = bare(model, variables, x_adv, train=True)
            return jnp.mean(cross_entropy(found, labels)), statistics
        natural, statistics = bare(model, variables, x, train=True)
        found, statistics = bare(model, {"params": params, "batch_stats": statistics}, x_adv, train=True)
        return jnp.mean(cross_entropy(natural, labels)) + 6 * jnp.mean(kl(found, natural)), statistics

    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return value, statistics, (optax.apply_updates(state.params, updates), opt_state)


def entropy_reduction(case: Case) -> Work:
    """A prediction with input entropy reduction: ten updates of the input after every second step."""
    defence = EntropyReduced(case.model)
    ours = jax.jit(lambda variables, x: defence(variables, x).logits)
    limit, given = jax.jit(partial(bare_entropy_reduction, defence)), (case.variables, case.x)
    peers: dict[str, Run] = {}
    found = case.torch()
    if found:
        torch_mdeq, network, x, _ = found
        peers["PyTorch"] = partial(torch_mdeq.entropy_reduced, network.frozen(), x, defence)
    return Work(partial(ours, *given), partial(limit, *given), peers)


def bare_entropy_reduction(defence: EntropyReduced, variables: Any, x: jax.Array) -> Any:
    """As many cells, gradients of the entropy, encoders and decoders, one after the other."""
    model, params = defence.base, variables["params"]["cell"]

    def block(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
        z, x_hat = carry
        z = cells(model.apply_cell, defence.every, params, z, model.encode(variables, x_hat))

        def total(x: jax.Array) -> jax.Array:
            fz = model.apply_cell(params, z, model.encode(variables, x))
            return jnp.sum(entropy(model.decode(variables, fz)))

        def update(x_hat: jax.Array, _: None) -> tuple[jax.Array, None]:
            return projected(x_hat - defence.step_size * jnp.sign(jax.grad(total)(x_hat)), x), None

        x_hat = lax.scan(update, x_hat, length=defence.steps)[0]
        return (model.apply_cell(params, z, model.encode(variables, x_hat)), x_hat), None

    u = model.encode(variables, x)
    z = model.apply_cell(params, jax.tree.map(jnp.zeros_like, u.features), u)
    last = lax.scan(block, (z, x), length=defence.blocks)[0][0]
    return model.decode(variables, last)


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
    limit = jax.jit(lambda x, labels: bare_attack(lambda x: cross_entropy(logits(x), labels), x, steps))
    peers = dict(attack_libraries(params, x, labels, steps)) if installed("torch", "torchdeq") else {}
    return Work(partial(ours, x, labels), partial(limit, x, labels), peers)


def attack_libraries(params: Any, x: jax.Array, labels: jax.Array, steps: int) -> Iterator[tuple[str, Run]]:
    """The same attack by other libraries, on the same network in PyTorch."""
    import torch  # noqa: PLC0415 (optional)

    from benchmarks import torch_mdeq  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, inputs, classes = (
        torch_mdeq.plain_network(params),
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
