"""Our AutoAttack against the official numbers, torchattacks and foolbox, on one CPU core.

    pip install torch torchattacks foolbox && python benchmarks/auto_attack.py --out auto_attack.json

Prints, for each attack and for the whole, on a network of Flax's convolutions and on one of our own: robust accuracy
over the seeds, the official one, agreement per image, and CPU seconds (of this process, without compilation) as a ratio
to torchattacks on the same images.
torchattacks and foolbox are skipped, and named, if they are not installed.
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

from deq_jax import Keys
from deq_jax.attacks import PGD, AutoAttack, Linf, Stage, is_fooled, oracle_of
from deq_jax.models.convolution import conv

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "attacks"

Arrays = dict[str, np.ndarray]

Peer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(x, y) -> robust`` of another library's attack."""

NAMES = ("apgd-ce", "apgd-t", "fab-t", "square")


def main() -> None:
    """Runs everything, prints a table and writes the JSON."""
    args = parse_args()
    arrays, official = (
        dict(np.load(GOLDEN / "mnist_cnn.npz")),
        json.loads((GOLDEN / "official_autoattack.json").read_text()),
    )
    x, y = (arrays["x"] / 255).astype(np.float32)[: args.images], arrays["y"][: args.images]
    threat = Linf(official["epsilon"])
    truth = {name: np.array(official[name]["robust"][: args.images]) == 1 for name in NAMES}
    truth["autoattack"] = np.all([truth[name] for name in NAMES], axis=0)

    results: dict[str, Any] = {"images": len(x), "epsilon": threat.epsilon, "jax": jax.__version__, "rows": []}
    auto = AutoAttack.standard(threat, batch_size=args.batch_size)
    suites = {name: AutoAttack((attack,), args.batch_size) for name, attack in zip(NAMES, auto.attacks, strict=True)}
    suites["autoattack"] = auto
    peers = torch_attacks(arrays, threat.epsilon) if has("torchattacks") and not args.no_torch else {}
    for name in args.attacks:
        theirs = time_peer(peers[name], x, y) if name in peers else {}
        for kind in args.networks:
            run = suites[name].bind(oracle_of(network(arrays, kind)))
            row = {"name": name, "network": kind, **compare(run, x, y, truth[name], args.seeds), **theirs}
            results["rows"].append(row)
            print(describe(row), flush=True)
            save(args.out, results)
    if has("foolbox"):
        results["foolbox"] = against_foolbox(arrays, x, y, threat.epsilon)
        print("LinfPGD, 40 gradient calls, images fooled:", results["foolbox"], flush=True)
    missing = [package for package in ("torchattacks", "foolbox") if not has(package)]
    results["not_installed"] = missing
    print("not installed:", ", ".join(missing) or "nothing")
    save(args.out, results)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("auto_attack.json"), help="where the JSON goes")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of ours, at least 2: the first one compiles")
    parser.add_argument("--images", type=int, default=200, help="how many of the 200 images")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time in our attacks")
    parser.add_argument("--attacks", nargs="+", default=[*NAMES, "autoattack"], choices=[*NAMES, "autoattack"])
    parser.add_argument("--networks", nargs="+", default=["flax", "own"], choices=["flax", "own"], help="convolutions")
    parser.add_argument("--no-torch", action="store_true", help="leave torchattacks out")
    return parser.parse_args()


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the results so far."""
    path.write_text(json.dumps(results, indent=1) + "\n")


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
    return {"torch_robust": robust, "torch_seconds": time.process_time() - started}


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    ours = " ".join(f"{100 * value:.1f}" for value in row["robust"])
    line = f"{row['name']:<11} {row['network']:<4} ours [{ours}]  official {100 * row['official']:.1f}"
    seconds = float(np.median(row["seconds"]))
    line += f"  agree >= {100 * min(row['agreement']):.1f} %  {seconds:.1f} s"
    if "torch_seconds" in row:
        ratio = row["torch_seconds"] / seconds
        line += f"  torchattacks {100 * row['torch_robust']:.1f} in {row['torch_seconds']:.1f} s: {ratio:.2f} x"
    return line


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
        "autoattack": torchattacks.AutoAttack(model, eps=epsilon, norm="Linf", version="standard", n_classes=10),
    }

    def robust(attack: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        images, labels = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()
        with torch.no_grad():
            right: np.ndarray = (model(attack(images, labels)).argmax(1) == labels).numpy()
            return right

    return {name: partial(robust, attack) for name, attack in attacks.items()}


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
