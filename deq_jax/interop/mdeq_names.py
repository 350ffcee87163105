"""PyTorch names of an MDEQ's variables, and the way to and from them.

`from_torch` and `to_torch` only rename and transpose: one undoes the other bitwise, in any dtype. The names come
from the published MDEQ implementations (``state_dict`` of the classification network).
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.tree_util import DictKey

from deq_jax.core.errors import require
from deq_jax.core.types import AnyArray
from deq_jax.models.base import Variables

STEM = "downsample.0.weight"  # of the first convolution, [channels, channels of the images, 3, 3]

IGNORED = "num_batches_tracked"  # a counter that PyTorch keeps and nothing reads

_ENTRIES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "v": "weight_v",
    "g": "weight_g",
    "mean": "running_mean",
    "var": "running_var",
}

_SHOWN = 4  # names per kind of mismatch in an error message


def from_torch(arrays: dict[str, np.ndarray], like: Variables) -> Variables:
    """Variables from arrays under their torch names.

    Args:
      arrays: arrays by torch name; convolutions OIHW, dense layers [out, in]. Counters of seen batches are ignored.
      like: variables, or their shapes (``jax.eval_shape(classifier.init, key, x)``), of the MDEQ to be filled.

    Raises:
      InputError: listing the entries that are missing, unexpected or of another shape.

    Examples:
      >>> import jax, numpy as np
      >>> import deq_jax as dj
      >>> from deq_jax.interop import from_torch, mdeq_shapes, to_torch
      >>> mdeq = dj.models.mdeq(10, channels=(8, 16), head_channels=(4, 8), final_channels=16)
      >>> model = dj.Equilibrium(*mdeq, dj.Dynamics(dj.Broyden(8)))
      >>> like = mdeq_shapes(dj.TrainConfig(model, dj.Standard(), dj.data.Digits()))
      >>> arrays = to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), like))
      >>> from_torch(arrays, like)["params"]["decoder"]["classifier"]["bias"].shape
      (10,)
    """
    arrays = {name: array for name, array in arrays.items() if not name.endswith(IGNORED)}
    names, expected = _torch_names(like), torch_shapes(like)
    misshaped = [
        f"{name} {arrays[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    problems = [
        _listing("missing", expected.keys() - arrays.keys()),
        _listing("unexpected", arrays.keys() - expected.keys()),
        _listing("mis-shaped", misshaped),
    ]
    problems = [problem for problem in problems if problem]
    require(not problems, f"the PyTorch entries do not fit this MDEQ: {'; '.join(problems)}")

    def entry(keys: tuple[DictKey, ...], _: AnyArray) -> np.ndarray:
        path = tuple(key.key for key in keys)
        return _from_torch(path, arrays[names[path]])

    variables: Variables = jax.tree_util.tree_map_with_path(entry, like)
    return variables


def to_torch(variables: Variables) -> dict[str, np.ndarray]:
    """Arrays under their torch names, without the counters of seen batches: the inverse of `from_torch`.

    Args:
      variables: variables of an MDEQ, ``{"params", "batch_stats"}``.

    Examples:
      >>> import jax, numpy as np
      >>> import deq_jax as dj
      >>> from deq_jax.interop import mdeq_shapes, to_torch
      >>> mdeq = dj.models.mdeq(10, channels=(8, 16), head_channels=(4, 8), final_channels=16)
      >>> model = dj.Equilibrium(*mdeq, dj.Dynamics(dj.Broyden(8)))
      >>> shapes = mdeq_shapes(dj.TrainConfig(model, dj.Standard(), dj.data.Digits()))
      >>> arrays = to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))
      >>> arrays["downsample.0.weight"].shape
      (8, 3, 3, 3)
    """
    names = _torch_names(variables)
    return {names[path]: _to_torch(path, np.asarray(leaf)) for path, leaf in flatten_dict(variables).items()}


def torch_shapes(like: Variables) -> dict[str, tuple[int, ...]]:
    """Shape of every entry in PyTorch, by its name.

    Args:
      like: as in `from_torch`.

    Examples:
      >>> import deq_jax as dj
      >>> from deq_jax.interop import mdeq_shapes, torch_shapes
      >>> mdeq = dj.models.mdeq(10, channels=(8, 16), head_channels=(4, 8), final_channels=16)
      >>> model = dj.Equilibrium(*mdeq, dj.Dynamics(dj.Broyden(8)))
      >>> torch_shapes(mdeq_shapes(dj.TrainConfig(model, dj.Standard(), dj.data.Digits())))["classifier.weight"]
      (10, 16)
    """
    names = _torch_names(like)
    return {names[path]: _torch_shape(path, leaf.shape) for path, leaf in flatten_dict(like).items()}


def torch_modules(branches: int) -> dict[str, str]:
    """Name of each of our modules in PyTorch.

    Args:
      branches: number of branches of the MDEQ.

    Returns:
      ``{"part/module/...": "torch.module..."}``.
    """
    modules = {
        "encoder/injection_conv": "stage0.0",
        "encoder/injection_norm": "stage0.1",
        "decoder/final_conv": "final_layer.0",
        "decoder/final_norm": "final_layer.1",
        "decoder/classifier": "classifier",
    }
    for k in range(2):
        modules |= {
            f"encoder/stem_conv{k}": f"downsample.{3 * k}",
            f"encoder/stem_norm{k}": f"downsample.{3 * k + 1}",
        }
    for i in range(branches):
        modules |= _branch_modules(i)
        for j in range(branches):
            modules |= _fusion_modules(j, i)
    return modules


def _branch_modules(i: int) -> dict[str, str]:
    block, head = f"fullstage.branches.{i}.blocks.0", f"incre_modules.{i}.0"
    modules = {
        f"cell/post_fuse{i}": f"fullstage.post_fuse_layers.{i}.conv",
        f"decoder/head{i}/shortcut_conv": f"{head}.downsample.0",
        f"decoder/head{i}/shortcut_norm": f"{head}.downsample.1",
        f"decoder/merge_conv{i}": f"downsamp_modules.{i}.0",
        f"decoder/merge_norm{i}": f"downsamp_modules.{i}.1",
    }
    for k in (1, 2, 3):
        modules |= {f"cell/block{i}/conv{k}": f"{block}.conv{k}", f"cell/block{i}/norm{k}": f"{block}.gn{k}"}
        modules |= {f"decoder/head{i}/conv{k}": f"{head}.conv{k}", f"decoder/head{i}/norm{k}": f"{head}.bn{k}"}
    return modules


def _fusion_modules(source: int, target: int) -> dict[str, str]:
    ours, theirs = f"cell/fuse{source}_to_{target}", f"fullstage.fuse_layers.{target}.{source}.net"
    if source > target:
        return {f"{ours}/conv": f"{theirs}.conv", f"{ours}/norm": f"{theirs}.gnorm"}
    modules: dict[str, str] = {}
    for k in range(target - source):
        modules |= {f"{ours}/conv{k}": f"{theirs}.{k}.conv", f"{ours}/norm{k}": f"{theirs}.{k}.gnorm"}
    return modules


def _torch_names(variables: Variables) -> dict[tuple[str, ...], str]:
    """Torch name of every leaf, by its path (collection, part, module, ..., entry)."""
    branches = sum(name.startswith("block") for name in variables["params"]["cell"])
    modules = torch_modules(branches)
    return {path: f"{modules['/'.join(path[1:-1])]}.{_ENTRIES[path[-1]]}" for path in flatten_dict(variables)}


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(_torch_view(path, array))


def _torch_view(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] == "g":
        return array.reshape(-1, 1, 1, 1)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] == "g":
        return array.reshape(-1)
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T)


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _torch_view(path, np.broadcast_to(np.zeros(()), shape)).shape


def _listing(kind: str, names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}" if names else ""
