"""MDEQ checkpoints of PyTorch into a run's workdir, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.core.errors import InputError, require
from deq_jax.core.keys import prng_key
from deq_jax.interop.mdeq_names import STEM, from_torch, to_torch, torch_shapes
from deq_jax.interop.state_dicts import check_writable, read_state_dict, write_state_dict
from deq_jax.models.base import Variables
from deq_jax.models.classifiers import Equilibrium
from deq_jax.models.mdeq import MdeqCell, MdeqDecoder, MdeqEncoder
from deq_jax.models.normalized import Normalized
from deq_jax.storage.checkpoints import Checkpoint
from deq_jax.storage.files import make_folder, write_json
from deq_jax.storage.locks import sole_writer
from deq_jax.storage.trees import to_tree
from deq_jax.training.config import TrainConfig
from deq_jax.training.step import TrainState, optimizer_of
from deq_jax.training.workdir import Workdir

STEPS = 1_000_000  # of a run without data: more than any warm-up


def import_checkpoint(
    checkpoint: str | Path, config: TrainConfig, workdir: str | Path, report: Callable[[str], None] = lambda text: None
) -> TrainState:
    """Writes the workdir of a run that starts from a PyTorch checkpoint.

    Args:
      checkpoint: see `read_state_dict`.
      config: config with the MDEQ of the checkpoint as its classifier; its dataset is not read.
      workdir: gets ``config.json``, ``checkpoints/best`` and ``checkpoints/latest``.
      report: called with a line on entries beside the network, if there are any.

    Returns:
      The state at step 0 that was written, with a fresh optimiser; variables in float32.

    Raises:
      InputError: for another classifier, a checkpoint that cannot be read or does not fit, or a workdir that
        holds a run; nothing is written then.

    Examples:
      >>> import deq_jax as dj
      >>> from deq_jax.interop import import_checkpoint
      >>> mdeq = dj.models.mdeq(10, channels=(8, 16), head_channels=(4, 8), final_channels=16)
      >>> model = dj.Equilibrium(*mdeq, dj.Dynamics(dj.Broyden(8)))
      >>> config = dj.TrainConfig(model, dj.Standard(), dj.data.Digits())
      >>> import_checkpoint("none.npz", config, "runs/none")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: none.npz: no such file
    """
    folder = Workdir(Path(workdir))
    names, tree = torch_shapes(mdeq_shapes(config)), to_tree(config)
    require(not folder.holds_a_run, f"{workdir} holds a run already; choose another --out")
    arrays, left_out = read_state_dict(checkpoint, names)
    try:
        shapes = mdeq_shapes(config, _channels(arrays))
        variables = jax.tree_util.tree_map_with_path(_as_float32, from_torch(arrays, shapes))
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    state = _initial_state(config, variables)
    if left_out:
        report(f"left out: {', '.join(left_out[:8])}{', ...' if len(left_out) > 8 else ''} (beside the network)")
    with sole_writer(folder.path):
        for checkpoints in (folder.best, folder.latest):
            checkpoints.save(0, state, {"config": tree, "best_accuracy": -1.0})  # not measured yet
        write_json(folder.config_file, tree)
    return state


def export_checkpoint(
    workdir: str | Path, out: str | Path, *, best: bool = True, say: Callable[[str], None] = warnings.warn
) -> int:
    """Writes the variables of a run under their PyTorch names; the dataset is not read.

    Args:
      workdir: folder of a training run of an MDEQ.
      out: new file, ``.npz`` or ``.safetensors``.
      best: the best checkpoint, or else the latest.
      say: called with a line for each checkpoint that is damaged; the one before it is written then.

    Returns:
      The step of the checkpoint.

    Raises:
      InputError: if the workdir holds no such checkpoint of an MDEQ, or `out` exists or has another ending.

    Examples:
      >>> from deq_jax.interop import export_checkpoint
      >>> export_checkpoint("runs/none", "mdeq.npz")
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: runs/none: not the workdir of a run (no config.json)
    """
    folder, out = Workdir(Path(workdir)), Path(out)
    check_writable(out)
    config = folder.config
    mdeq_shapes(config)
    found = folder.trained("best" if best else "latest").read(say)
    template = mdeq_shapes(config, _stored_channels(found))
    variables = found.shaped_like(template, only=list(template))
    make_folder(out.parent)
    write_state_dict(out, to_torch(variables))
    return found.step


def _channels(arrays: dict[str, np.ndarray]) -> int | None:
    """Number of channels of a network's images; None if it does not tell."""
    stem = arrays.get(STEM)
    return stem.shape[1] if stem is not None and stem.ndim == 4 else None


def _stored_channels(checkpoint: Checkpoint) -> int | None:
    try:
        return int(checkpoint.state["params"]["encoder"]["stem_conv0"]["kernel"].shape[2])
    except (TypeError, KeyError, IndexError, AttributeError):
        return None  # of another network: the comparison with its shapes will tell


def mdeq_shapes(config: TrainConfig, channels: int | None = None) -> Variables:
    """Shapes and dtypes of the variables of the config's MDEQ.

    Args:
      config: config with an MDEQ as its classifier; its dataset is not read.
      channels: number of channels of the images; None for the config's normalisation, or three without one.

    Raises:
      InputError: the classifier is not an MDEQ, or its parts do not fit together.

    Examples:
      >>> import deq_jax as dj
      >>> from deq_jax.interop import mdeq_shapes
      >>> mdeq = dj.models.mdeq(10, channels=(8, 16), head_channels=(4, 8), final_channels=16)
      >>> model = dj.Equilibrium(*mdeq, dj.Dynamics(dj.Broyden(8)))
      >>> shapes = mdeq_shapes(dj.TrainConfig(model, dj.Standard(), dj.data.Digits()))
      >>> shapes["params"]["encoder"]["stem_conv0"]["kernel"].shape
      (3, 3, 3, 8)
    """
    classifier = config.classifier
    encoder = classifier.encoder if isinstance(classifier, Equilibrium) else None
    own = len(encoder.mean) if isinstance(encoder, Normalized) else 3
    encoder = encoder.module if isinstance(encoder, Normalized) else encoder
    if not (
        isinstance(classifier, Equilibrium)
        and isinstance(encoder, MdeqEncoder)
        and isinstance(classifier.cell, MdeqCell)
        and isinstance(classifier.decoder, MdeqDecoder)
    ):
        raise InputError("the config's classifier is not an MDEQ: expected Equilibrium(*mdeq(...), dynamics)")
    side = 2 ** (len(encoder.channels) - 1)  # the coarsest branch is one pixel
    images = jax.ShapeDtypeStruct((1, side, side, own if channels is None else channels), jnp.float32)
    try:
        shapes: Variables = jax.eval_shape(classifier.init, prng_key(0), images)
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, ZeroDivisionError, flax.errors.FlaxError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the parts of the config's MDEQ do not fit together: {reason}") from None
    return shapes


def _as_float32(path: tuple[jax.tree_util.DictKey, ...], array: np.ndarray) -> np.ndarray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    require(jnp.issubdtype(array.dtype, jnp.floating), f"{name}: expected floating numbers, found {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    require(bool(np.isfinite(array).all()), f"{name}: holds numbers that are not finite in float32")
    return array


def _initial_state(config: TrainConfig, variables: Variables) -> TrainState:
    """The state before the first training step; the optimiser's state does not depend on the number of steps."""
    params = variables["params"]
    optimizer = optimizer_of(config, STEPS)
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
