"""Attacks, training steps and entropy reduction in PyTorch: peers of benchmarks/peers.py.

They follow the modules of deq_jax: the same steps, projections, losses and optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.torch_mdeq import Tensor, TorchMdeq, flat_cell, start, tensors


def pgd(
    loss: Callable[[Tensor], Tensor], x: Tensor, begin: Tensor, steps: int, step_size: float, epsilon: float
) -> Tensor:
    """Images that maximise a loss: steps along the sign of its gradient, within the ball and [0, 1]."""
    x_adv = begin
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = projected(x_adv.detach() + step_size * gradient.sign(), x, epsilon)
    return x_adv


def projected(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Onto the ball around x and onto [0, 1]."""
    return torch.clamp(torch.clamp(x_adv, x - epsilon, x + epsilon), 0, 1)


class Training:
    """Training steps of a network on some images, with Adam.

    Attributes:
      network: its weights are changed.
      layer: torchdeq's layer.
      attack: steps, step size and radius of PGD.
    """

    def __init__(self, network: TorchMdeq, layer: Any, attack: tuple[int, float, float]) -> None:
        self.network, self.layer, self.attack = network, layer, attack
        self.optimizer = torch.optim.Adam(network.weights.values(), lr=1e-3, fused=True)

    def pgd_at(self, x: Tensor, labels: Tensor) -> None:
        """A step of PGD adversarial training."""
        attacked, epsilon = self.network.frozen(), self.attack[2]
        begin = projected(x + epsilon * (2 * torch.rand_like(x) - 1), x, epsilon)
        x_adv = pgd(
            lambda x: F.cross_entropy(attacked.logits(x, self.layer), labels, reduction="sum"), x, begin, *self.attack
        )
        self._update(F.cross_entropy(self.network.logits(x_adv, self.layer, train=True), labels))

    def trades(self, x: Tensor, labels: Tensor) -> None:
        """A step of TRADES."""
        attacked = self.network.frozen()
        with torch.no_grad():
            clean = attacked.logits(x, self.layer)
        begin = projected(x + 0.001 * torch.randn_like(x), x, self.attack[2])
        x_adv = pgd(lambda x: kl(attacked.logits(x, self.layer), clean).sum(), x, begin, *self.attack)
        natural, adversarial = (self.network.logits(images, self.layer, train=True) for images in (x, x_adv))
        self._update(F.cross_entropy(natural, labels) + 6 * kl(adversarial, natural).mean())

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each image."""
    log_p, log_q = reference.log_softmax(1), logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the prediction of each image, in nats."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


class Broyden:
    """Broyden's method on f(z) - z. Each step may have another f, as in entropy reduction.

    Attributes:
      z: the state [B, N].
    """

    def __init__(self, f: Callable[[Tensor], Tensor], z: Tensor) -> None:
        self.z, self.steps = z, [f(z) - z]

    def advance(self, f: Callable[[Tensor], Tensor]) -> None:
        """One step."""
        self.z = self.z + self.steps[-1]
        self.steps.append(self._next(f))

    def resume(self, f: Callable[[Tensor], Tensor]) -> None:
        """The next step again, for another cell."""
        self.steps.pop()
        self.steps.append(self._next(f))

    def _next(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """-B g, where each pair of consecutive steps is a factor of B."""
        step = f(self.z) - self.z
        for one, following in zip(self.steps, self.steps[1:], strict=False):
            step = step + following * (inner(one, step) / inner(one, one))
        last = self.steps[-1]
        square = inner(last, last)
        return step * (square / (square - inner(last, step)))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B, 1]."""
    return (a * b).sum(1, keepdim=True)


def entropy_reduced(network: TorchMdeq, x: Tensor, defence: Any) -> tuple[Tensor, Tensor]:
    """Logits and purified images of `defence`, an `EntropyReduced` with Broyden's method."""
    x_hat, u, kernels = x, network.encode(x), network.kernels()
    f, unravel = flat_cell(network.cell(u, kernels), u)
    solver = Broyden(f, start(u))
    for _ in range(defence.blocks):
        for _ in range(defence.every):
            solver.advance(f)
        z = unravel(solver.z)
        for _ in range(defence.steps):
            x_hat = x_hat.detach().requires_grad_()
            found = entropy(network.decode(network.cell(network.encode(x_hat), kernels)(*z))).sum()
            (gradient,) = torch.autograd.grad(found, x_hat)
            x_hat = projected(x_hat.detach() - defence.step_size * gradient.sign(), x, defence.epsilon)
        with torch.no_grad():
            f, unravel = flat_cell(network.cell(network.encode(x_hat), kernels), u)
            solver.resume(f)
    return network.decode(unravel(solver.z)), x_hat


def plain_network(params: Any) -> Any:
    """The network `plain` of benchmarks/peer_rows.py: two convolutions, a mean over the image, a dense layer."""
    weights = tensors(params)
    first, second, last = (weights[f"layers_{i}.kernel"] for i in (0, 2, 5))
    layers = [
        torch.nn.Conv2d(first.shape[1], len(first), 3, padding=1),
        torch.nn.Conv2d(second.shape[1], len(second), 3, stride=2, padding=1),
        torch.nn.Linear(last.shape[1], len(last)),
    ]
    for i, layer in zip((0, 2, 5), layers, strict=True):
        layer.load_state_dict({"weight": weights[f"layers_{i}.kernel"], "bias": weights[f"layers_{i}.bias"]})
    relu, mean = torch.nn.ReLU(), (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(layers[0], relu, layers[1], relu, *mean, layers[2]).eval()
