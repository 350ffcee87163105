"""Our AutoAttack against the official numbers, torchattacks and foolbox, on one CPU core.

    pip install torch torchattacks foolbox gitpython
    python -m benchmarks.auto_attack --out runs/auto-attack.json --page docs/results/auto-attack.md

For each attack and for the whole, on a network of Flax's convolutions and on one of our own: robust accuracy over the
seeds, the official one, agreement per image, and CPU seconds of this process, without compilation, beside torchattacks
on the same images. The passes through the network alone are the limit. Libraries that are not installed are named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

with contextlib.suppress(AttributeError):  # before any library starts its threads; Linux only
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pages import check_page, made, write_page
from deq_jax import Keys
from deq_jax._cli import command_line, console
from deq_jax.attacks import PGD, AutoAttack, Linf, Stage, is_fooled, oracle_of
from deq_jax.models.convolution import conv
from deq_jax.storage import make_folder, write_json

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "attacks"

Arrays = dict[str, np.ndarray]

Peer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(x, y) -> robust`` of another library's attack."""

NAMES = ("apgd-ce", "apgd-t", "fab-t", "square")

PASSES = 1000
"""Passes of all images through the network, forwards and for gradients of images, that are timed."""


def main() -> None:
    """Runs everything, prints a table and writes the JSON."""
    args = parse_args()
    with command_line():
        check_page(args.page, "table")
        make_folder(args.out.parent)
        official = json.loads((GOLDEN / "official_autoattack.json").read_text())
        arrays = dict(np.load(GOLDEN / "mnist_cnn.npz"))
        x, y = (arrays["x"] / 255).astype(np.float32)[: args.images], arrays["y"][: args.images]
        missing = [package for package in ("torchattacks", "foolbox") if not has(package)]
        numbers = {"made": [made()], "images": len(x), "epsilon": official["epsilon"], "not_installed": missing}
        numbers["rows"] = []
        for row in rows(args, arrays, official, x, y):
            numbers["rows"].append(row)
            console.print(line(row))
            write_json(args.out, numbers)
        if has("foolbox"):
            numbers["foolbox"] = against_foolbox(arrays, x, y, official["epsilon"])
            write_json(args.out, numbers)
        if args.page:
            write_page(args.page, numbers, {"table": table(numbers)})


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("auto_attack.json"), help="where the JSON goes")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the table")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of ours, at least 2: the first one compiles")
    parser.add_argument("--images", type=int, default=200, help="how many of the 200 images")
    parser.add_argument("--batch-size", type=int, help="images at a time in our attacks (default: that of AutoAttack)")
    parser.add_argument("--attacks", nargs="+", default=[*NAMES, "autoattack"], choices=[*NAMES, "autoattack"])
    parser.add_argument("--networks", nargs="+", default=["flax", "own"], choices=["flax", "own"], help="convolutions")
    parser.add_argument("--no-torch", action="store_true", help="leave torchattacks out")
    return parser.parse_args()


def rows(
    args: argparse.Namespace, arrays: Arrays, official: dict[str, Any], x: np.ndarray, y: np.ndarray
) -> Iterator[dict[str, Any]]:
    """The rows of the table, one after another: the passes, then the attacks."""
    threat = Linf(official["epsilon"])
    truth = {name: np.array(official[name]["robust"][: len(x)]) == 1 for name in NAMES}
    truth["autoattack"] = np.all([truth[name] for name in NAMES], axis=0)
    auto = AutoAttack.standard(threat, args.batch_size)
    suites = {name: AutoAttack((attack,), args.batch_size) for name, attack in zip(NAMES, auto.attacks, strict=True)}
    suites["autoattack"] = auto
    with_torch = has("torchattacks") and not args.no_torch
    peers = torch_attacks(arrays, threat.epsilon) if with_torch else {}
    for kind in args.networks:
        yield from passes(arrays, kind, x, y, with_torch)
    for name in args.attacks:
        theirs = time_peer(peers[name], x, y) if name in peers else {}
        for kind in args.networks:
            run = suites[name].bind(oracle_of(network(arrays, kind)))
            yield {"name": name, "network": kind, **compare(run, x, y, truth[name], args.seeds), **theirs}


def passes(arrays: Arrays, kind: str, x: np.ndarray, y: np.ndarray, with_torch: bool) -> Iterator[dict[str, Any]]:
    """Seconds of the passes of all images, 32 at a time, forwards and for the gradient of a loss."""
    logits, batches = network(arrays, kind), [slice(i, i + 32) for i in range(0, len(x), 32)]
    forward = jax.jit(lambda x, y: logits(x))
    gradient = jax.jit(jax.grad(lambda x, y: jnp.sum(jax.nn.log_softmax(logits(x))[jnp.arange(len(y)), y])))
    for name, function in {"forward": forward, "gradient": gradient}.items():
        ours = partial(lambda f, part: jax.block_until_ready(f(x[part], y[part])), function)
        row = {"name": name, "network": kind, "seconds": [repeated(ours, batches)]}
        if with_torch:
            row["torch_seconds"] = [repeated(torch_pass(arrays, name, x, y), batches)]
        yield row


def repeated(run: Callable[[slice], Any], batches: list[slice]) -> float:
    """CPU seconds of `PASSES` over the batches, after one that is not timed."""
    for part in batches:
        run(part)
    started = time.process_time()
    for _ in range(PASSES):
        for part in batches:
            run(part)
    return time.process_time() - started


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def network(arrays: Arrays, kind: str = "flax") -> Callable[..., jax.Array]:
    """The golden network, ``(x, keys) -> logits``, with Flax's convolutions or our own."""

    def flax(x: jax.Array, kernel: np.ndarray, bias: np.ndarray) -> Any:
        layer = nn.Conv(kernel.shape[-1], kernel.shape[:2], (2, 2))
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    def own(x: jax.Array, kernel: np.ndarray, bias: np.ndarray) -> jax.Array:  # "SAME" with stride 2 on an even side
        return conv(x, jnp.asarray(kernel), (2, 2), ((1, 2), (1, 2))) + bias

    def logits(x: jax.Array, keys: Keys | None = None) -> jax.Array:
        for layer in ("1", "2"):
            x = jax.nn.relu({"flax": flax, "own": own}[kind](x, arrays["w" + layer], arrays["b" + layer]))
        x = jax.nn.relu(x.reshape(len(x), -1) @ arrays["w3"] + arrays["b3"])
        return x @ arrays["w4"] + arrays["b4"]

    return logits


def compare(
    run: Callable[..., Iterator[Stage]], x: np.ndarray, y: np.ndarray, truth: np.ndarray, seeds: int
) -> dict[str, Any]:
    """Ours over the seeds beside the official outcome."""
    robust, seconds = [], []
    for seed in range(seeds):
        started = time.process_time()
        *_, last = run(x, y, jax.random.key(seed))
        seconds.append(time.process_time() - started)
        robust.append(last.robust)
    return {
        "robust": [float(np.mean(r)) for r in robust],
        "official": float(np.mean(truth)),
        "agreement": [float(np.mean(r == truth)) for r in robust],
        "seconds_with_compilation": seconds[0],
        "seconds": seconds[1:],
    }


def time_peer(peer: Peer, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The outcome of another library's attack, and its time."""
    started = time.process_time()
    robust = float(np.mean(peer(x, y)))
    return {"torch_robust": robust, "torch_seconds": [time.process_time() - started]}


def line(row: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    seconds, theirs = float(np.median(row["seconds"])), row.get("torch_seconds", [])
    peer, ratio = (f"{theirs[0]:.1f}", f"{seconds / theirs[0]:.2f}") if theirs else ("", "")
    accuracies = ("", "", "")
    if "robust" in row:
        ours = " to ".join(f"{100 * end:.1f}" for end in sorted({min(row["robust"]), max(row["robust"])}))
        others = (row["official"], row.get("torch_robust"))
        accuracies = (ours, *("" if other is None else f"{100 * other:.1f}" for other in others))
    network = {"flax": "Flax", "own": "ours"}[row["network"]]
    return f"| {row['name']} | {network} | {' | '.join(accuracies)} | {seconds:.1f} | {peer} | {ratio} |"


def table(numbers: dict[str, Any]) -> str:
    """The table, as Markdown."""
    columns = ["", "convolutions", "robust, %", "official code", "torchattacks"]
    columns += ["CPU seconds", "of torchattacks", "**ratio**"]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *map(line, numbers["rows"])])


def torch_attacks(arrays: Arrays, epsilon: float) -> dict[str, Peer]:
    """The same attacks from torchattacks, as functions ``(x, y) -> robust``."""
    import torch  # noqa: PLC0415 (optional)
    import torchattacks  # noqa: PLC0415

    torch.set_num_threads(1)
    model = torch_network(arrays, torch)
    attacks = {
        "apgd-ce": torchattacks.APGD(model, eps=epsilon, norm="Linf", steps=100, n_restarts=1, loss="ce"),
        "apgd-t": torchattacks.APGDT(model, eps=epsilon, norm="Linf", steps=100, n_restarts=1, n_classes=10),
        "fab-t": torchattacks.FAB(
            model, eps=epsilon, norm="Linf", steps=100, n_restarts=1, n_classes=10, multi_targeted=True
        ),
        "square": torchattacks.Square(model, eps=epsilon, norm="Linf", n_queries=5000, n_restarts=1),
    }
    # Its AutoAttack has other defaults: ten steps of APGD and FAB.
    attacks["autoattack"] = torchattacks.MultiAttack(list(attacks.values()))

    def robust(attack: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        images, labels = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()
        with torch.no_grad():
            right: np.ndarray = (model(attack(images, labels)).argmax(1) == labels).numpy()
            return right

    return {name: partial(robust, attack) for name, attack in attacks.items()}


def torch_pass(arrays: Arrays, name: str, x: np.ndarray, y: np.ndarray) -> Callable[[slice], Any]:
    """A pass of a part of the images in PyTorch: forwards, or for the gradient of a loss."""
    import torch  # noqa: PLC0415 (optional)

    model = torch_network(arrays, torch)
    images, labels = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()

    def forward(part: slice) -> Any:
        with torch.no_grad():
            return model(images[part])

    def gradient(part: slice) -> Any:
        inputs = images[part].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels[part], reduction="sum")
        return torch.autograd.grad(loss, inputs)

    return {"forward": forward, "gradient": gradient}[name]


def torch_network(arrays: Arrays, torch: Any) -> Any:
    """The golden network in PyTorch, NCHW."""
    weights = {name: torch.tensor(value) for name, value in arrays.items() if name not in ("x", "y")}

    class Network(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # by which torchattacks finds the device

        def forward(self, x: Any) -> Any:
            for layer in ("1", "2"):
                kernel = weights["w" + layer].permute(3, 2, 0, 1)
                x = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 2, 1, 2)), kernel, stride=2)
                x = torch.relu(x + weights["b" + layer][:, None, None])
            x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
            return torch.relu(x @ weights["w3"] + weights["b3"]) @ weights["w4"] + weights["b4"]

    return Network().eval()


def against_foolbox(arrays: Arrays, x: np.ndarray, y: np.ndarray, epsilon: float) -> dict[str, int]:
    """How many images foolbox's LinfPGD and ours fool with 40 gradient calls, step size epsilon / 10."""
    import foolbox  # noqa: PLC0415 (optional)

    logits = network(arrays)
    images, labels = jnp.asarray(x), jnp.asarray(y)
    start_of = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 10, steps=40, random_start=True)
    _, theirs, _ = start_of(foolbox.JAXModel(logits, bounds=(0, 1)), images, labels, epsilons=epsilon)
    pgd = PGD(Linf(epsilon), steps=40, step_size=epsilon / 10)
    x_adv = jax.jit(lambda x, y: pgd(oracle_of(logits), x, y, jax.random.key(0)))(images, labels)
    return {
        "foolbox": int(jnp.sum(is_fooled(logits(theirs), labels))),
        "ours": int(jnp.sum(is_fooled(logits(x_adv), labels))),
    }


if __name__ == "__main__":
    main()
