"""The MDEQ of deq_jax.models in PyTorch, with torchdeq's solvers and layers: peers of benchmarks/peers.py.

Tensors are NCHW in the memory format "channels last", which is faster here than the default one. Weights are those of
the Flax modules, under their paths: ``cell.block0.conv1.v``. Weight normalisation is computed once per forward pass. No
operation is compiled (eager mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from torchdeq import get_deq
from torchdeq.solver import get_solver

Tensor = Any
"""A `torch.Tensor`: types are checked without PyTorch."""

State = list[Tensor]

Weights = dict[str, Tensor]


LAST = torch.channels_last


def tensors(tree: Any) -> Weights:
    """Tensors of Flax arrays by their path: convolutions OIHW, dense layers [out, in]."""
    orders: dict[int, tuple[int, ...]] = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    arrays = {name: np.asarray(array) for name, array in flatten_dict(tree, sep=".").items()}
    made = {name: torch.tensor(array.transpose(orders[array.ndim]).copy()) for name, array in arrays.items()}
    return {name: value.to(memory_format=LAST) if value.ndim == 4 else value for name, value in made.items()}


def images(x: Any) -> Tensor:
    """Images [B, H, W, C] as a tensor [B, C, H, W]."""
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


class TorchMdeq:
    """An MDEQ classifier: encoder, cell, decoder.

    Attributes:
      weights: parameters by their path, which require gradients.
      statistics: running means and variances of the batch normalisations, by their path.
      channels: number in each branch.
      groups: number of groups of the normalisations.
    """

    def __init__(self, weights: Weights, statistics: Weights, channels: tuple[int, ...], groups: int) -> None:
        self.weights, self.statistics = weights, statistics
        self.channels, self.groups = channels, groups

    @classmethod
    def of(cls, variables: Any, cell: Any) -> TorchMdeq:
        """The network with the variables of an `Equilibrium` whose cell this is."""
        weights = {name: value.requires_grad_() for name, value in tensors(variables["params"]).items()}
        return cls(weights, tensors(variables["batch_stats"]), cell.channels, cell.groups)

    def frozen(self) -> TorchMdeq:
        """The same network, whose weights require no gradients."""
        weights = {name: value.detach() for name, value in self.weights.items()}
        return TorchMdeq(weights, self.statistics, self.channels, self.groups)

    def logits(self, x: Tensor, layer: Any, train: bool = False) -> Tensor:
        """Logits [B, K] of images, with an equilibrium layer of torchdeq."""
        u = self.encode(x, train)
        f, unravel = flat_cell(self.cell(u, self.kernels()), u)
        return self.decode(unravel(layer(f, start(u))[0][-1]), train)

    def encode(self, x: Tensor, train: bool = False) -> State:
        """The injection of images."""
        for layer in ("stem_conv0", "stem_conv1", "injection_conv")[: 2 + (len(self.channels) > 2)]:
            x = self._conv(f"encoder.{layer}", x)
            x = F.relu(self._batch_norm(f"encoder.{layer.replace('conv', 'norm')}", x, train))
        batch, _, height, width = x.shape
        sides = [(height >> i, width >> i) for i in range(len(self.channels))]
        coarser = zip(self.channels[1:], sides[1:], strict=True)
        return [x, *(torch.empty(batch, c, *side).to(memory_format=LAST).zero_() for c, side in coarser)]

    def kernels(self) -> Weights:
        """The kernels with weight normalisation."""
        names = [name.removesuffix(".v") for name in self.weights if name.endswith(".v")]
        return {name: normalised(self.weights[f"{name}.v"], self.weights[f"{name}.g"]) for name in names}

    def cell(self, u: State, kernels: Weights) -> Callable[..., State]:
        """``(*z) -> f(z; u)``."""

        def block(i: int, z: Tensor) -> Tensor:
            name = f"cell.block{i}"
            o = F.conv2d(z, kernels[f"{name}.conv1"], padding=1)
            o = F.relu(self._group_norm(f"{name}.norm1", o))
            o = F.conv2d(o, kernels[f"{name}.conv2"], padding=1)
            o = self._group_norm(f"{name}.norm2", o + u[i])
            return self._group_norm(f"{name}.norm3", F.relu(o + z))

        def apply(*z: Tensor) -> State:
            branches = [block(i, branch) for i, branch in enumerate(z)]
            totals = [sum(self._moved(j, i, branch) for j, branch in enumerate(branches)) for i in range(len(branches))]
            fused = [F.conv2d(F.relu(total), kernels[f"cell.post_fuse{i}"]) for i, total in enumerate(totals)]
            return [F.group_norm(branch, self.groups // 2) for branch in fused]

        return apply

    def _moved(self, j: int, i: int, branch: Tensor) -> Tensor:
        """Branch j at the resolution of branch i."""
        name = f"cell.fuse{j}_to_{i}"
        if j > i:
            y = self._group_norm(f"{name}.norm", self._conv(f"{name}.conv", branch))
            return F.interpolate(y, scale_factor=2 ** (j - i), mode="nearest")
        for k in range(i - j):
            branch = self._group_norm(f"{name}.norm{k}", self._conv(f"{name}.conv{k}", branch, stride=2))
            branch = branch if k == i - j - 1 else F.relu(branch)
        return branch

    def decode(self, z: State, train: bool = False) -> Tensor:
        """Logits [B, K] of a state."""
        heads = [self._head(f"decoder.head{i}", branch, train) for i, branch in enumerate(z)]
        y = heads[0]
        for i, head in enumerate(heads[1:]):
            y = self._batch_norm(f"decoder.merge_norm{i}", self._conv(f"decoder.merge_conv{i}", y, stride=2), train)
            y = head + F.relu(y)
        y = F.relu(self._batch_norm("decoder.final_norm", self._conv("decoder.final_conv", y), train))
        kernel, bias = (self.weights[f"decoder.classifier.{name}"] for name in ("kernel", "bias"))
        return F.linear(y.mean((2, 3)), kernel, bias)

    def _head(self, name: str, z: Tensor, train: bool) -> Tensor:
        y = z
        for k in (1, 2, 3):
            y = self._batch_norm(f"{name}.norm{k}", self._conv(f"{name}.conv{k}", y), train)
            y = y if k == 3 else F.relu(y)
        shortcut = self._batch_norm(f"{name}.shortcut_norm", self._conv(f"{name}.shortcut_conv", z), train)
        return F.relu(y + shortcut)

    def _conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self.weights[f"{name}.kernel"]
        return F.conv2d(x, kernel, self.weights.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)

    def _group_norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weights[f"{name}.scale"], self.weights[f"{name}.bias"])

    def _batch_norm(self, name: str, x: Tensor, train: bool) -> Tensor:
        mean, var = (self.statistics[f"{name}.{kind}"] for kind in ("mean", "var"))
        scale, bias = (self.weights.get(f"{name}.{kind}") for kind in ("scale", "bias"))
        return F.batch_norm(x, mean, var, scale, bias, training=train, momentum=0.1)


def without_gradients(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """The function with these arguments, called without recording gradients."""

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return call


def normalised(v: Tensor, g: Tensor) -> Tensor:
    """The kernel g v / ||v|| of a convolution, OIHW."""
    return v * (g / v.flatten(1).norm(dim=1))[:, None, None, None]


def start(u: State) -> Tensor:
    """The state 0, flat."""
    return torch.zeros_like(flat(u))


def flat(state: State) -> Tensor:
    """A state as one vector per image [B, N], channels last."""
    return torch.cat([branch.permute(0, 2, 3, 1).flatten(1) for branch in state], dim=1)


def flat_cell(f: Callable[..., State], like: State) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], State]]:
    """A cell over flat states [B, N], and the way back to states."""
    shapes = [branch.permute(0, 2, 3, 1).shape for branch in like]
    sizes = [branch[0].numel() for branch in like]

    def unravel(z: Tensor) -> State:
        parts = zip(z.split(sizes, dim=1), shapes, strict=True)
        return [part.reshape(shape).permute(0, 3, 1, 2) for part, shape in parts]

    return lambda z: flat(f(*unravel(z))), unravel


def solved(network: TorchMdeq, u: State, solver: str, evaluations: int) -> Tensor:
    """A state [B, N] of torchdeq's solver that applies the cell so many times."""
    f, _ = flat_cell(network.cell(u, network.kernels()), u)
    count = evaluations - 1 if solver == "broyden" else evaluations  # its first evaluation does not count there
    with torch.no_grad():
        return get_solver(solver)(f, start(u), max_iter=count, tol=0.0, stop_mode="rel")[0]


def phantom_layer(steps: int, phantom_steps: int, damping: float) -> Any:
    """torchdeq's layer: Broyden's method, then damped steps that are differentiated."""
    return _layer(steps, grad=phantom_steps, tau=damping)


def implicit_layer(steps: int, backward_steps: int) -> Any:
    """torchdeq's layer: Broyden's method, and Broyden's method for the implicit gradient."""
    return _layer(steps, ift=True, b_solver="broyden", b_max_iter=backward_steps, b_tol=0.0, b_stop_mode="rel")


def _layer(steps: int, **options: Any) -> Any:
    """Made in training mode: in evaluation mode the layer leaves out the steps after the solver."""
    return get_deq(f_solver="broyden", f_max_iter=steps, f_tol=0.0, f_stop_mode="rel", **options).train()


def layer_gradient(network: TorchMdeq, u: State, layer: Any, cotangent: State) -> list[Tensor]:
    """Gradients by the cell's parameters and by the injection."""
    u = [branch.detach().requires_grad_() for branch in u]
    f, unravel = flat_cell(network.cell(u, network.kernels()), u)
    z = unravel(layer(f, start(u))[0][-1])
    params = [value for name, value in network.weights.items() if name.startswith("cell.")]
    return list(torch.autograd.grad(z, [*params, *u], cotangent))
