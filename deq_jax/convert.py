"""Converts PyTorch checkpoints of an MDEQ into the workdir of a training, and back.

python -m deq_jax.convert model_best.pth.tar --config configs/mine.py --out runs/a
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.checkpoints import Checkpoints
from deq_jax.classifiers import Equilibrium
from deq_jax.cli import add_set_option, command_line, console
from deq_jax.config import TrainConfig, from_tree, load_config, set_fields, to_tree
from deq_jax.models.mdeq import MdeqCell, MdeqDecoder, MdeqEncoder
from deq_jax.records import make_folder, read_json, write_json
from deq_jax.state_dicts import check_writable, read_state_dict, write_state_dict
from deq_jax.torch_names import from_torch, to_torch
from deq_jax.training import TrainState
from deq_jax.types import InputError, Variables, require

EPILOG = """\
CHECKPOINT is the state_dict of an MDEQ classifier, under the names of the published implementations:
  .pth.tar .pth .pt   read by torch >= 2.10 (pip install torch), tensors only: no code in the file is run
  .safetensors        read by safetensors (pip install safetensors)
  .npz                arrays by name
A file of PyTorch may have the state_dict itself, or under state_dict, model_state_dict or model; the
prefix "module." of DataParallel is left out. Numbers become float32. The dataset is not needed.

DIR gets config.json, checkpoints/latest and checkpoints/best, at step 0 and with a fresh optimiser, and can be
evaluated or trained on. A training that goes on chooses its best checkpoint anew, among its own epochs.
deq_jax gives images in [0, 1] to the network, without subtracting a mean or dividing by a deviation.

The way back writes the variables of a WORKDIR, under their PyTorch names, into FILE.npz or FILE.safetensors.

examples:
  python -m deq_jax.convert model_best.pth.tar --config configs/mine.py --out runs/a
  python -m deq_jax.convert runs/a --out runs/a.npz --checkpoint latest
then:
  python -m deq_jax.evaluate --workdir runs/a
  python -m deq_jax.train --config configs/mine.py --workdir runs/a
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.convert",
        description="Convert a PyTorch checkpoint of an MDEQ into the workdir of a training, or back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="CHECKPOINT | WORKDIR", help="file to convert, or folder of a training")
    parser.add_argument("--out", required=True, metavar="DIR | FILE", help="what is written; never overwritten")
    parser.add_argument("--config", metavar="FILE", help="with CHECKPOINT: Python file with a function get_config()")
    add_set_option(
        parser,
        "with CHECKPOINT: replace a scalar field of the config, by dotted name; repeatable",
    )
    parser.add_argument("--checkpoint", choices=["best", "latest"], help="with WORKDIR; default: best")
    options = parser.parse_args(arguments)
    with command_line():
        if Path(options.source).is_dir():
            _run_export(options)
        else:
            _run_import(options)


def _run_import(options: argparse.Namespace) -> None:
    source = options.source
    require(Path(source).exists(), f"{source}: no such checkpoint or workdir")
    require(options.checkpoint is None, f"--checkpoint goes with a training's workdir; {source} is a file")
    if options.config is None:
        raise InputError(f"--config FILE is needed: it names the MDEQ to which {source} belongs")
    config = set_fields(load_config(options.config), options.assignments)
    state = import_checkpoint(source, config, options.out)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    console.print(f"converted: {parameters:,} parameters, in {options.out}")
    assignments = "".join(f" --set {shlex.quote(item)}" for item in options.assignments)
    console.print(f"next: python -m deq_jax.evaluate --workdir {options.out}")
    console.print(f"or:   python -m deq_jax.train --config {options.config}{assignments} --workdir {options.out}")
    if config.pretrain_steps:
        phase = f"{config.pretrain_steps} pre-training steps of this config"
        console.print(f"note: training would begin with the {phase}; --set pretrain_steps=0 leaves them out")


def _run_export(options: argparse.Namespace) -> None:
    own = f"--config and --set go with a checkpoint file; {options.source} is a folder with a config of its own"
    require(options.config is None and not options.assignments, own)
    step = export_checkpoint(options.source, options.out, best=options.checkpoint != "latest")
    console.print(f"converted: {options.checkpoint or 'best'} checkpoint, step {step}, in {options.out}")


def import_checkpoint(checkpoint: str | Path, config: TrainConfig, workdir: str | Path) -> TrainState:
    """Writes the workdir of a training that starts from a PyTorch checkpoint.

    Args:
      checkpoint: see `read_state_dict`.
      config: its classifier is the MDEQ of the checkpoint; its dataset is not read.
      workdir: gets ``config.json``, ``checkpoints/best`` and ``checkpoints/latest``.

    Returns:
      The state at step 0 that was written, with a fresh optimiser; variables in float32.

    Raises:
      InputError: for another classifier, a checkpoint that cannot be read or does not fit, or a workdir that
        holds a training; nothing is written then.
    """
    workdir = Path(workdir)
    shapes, tree = mdeq_shapes(config), to_tree(config)
    taken = any((workdir / name).exists() for name in ("config.json", "checkpoints"))
    require(not taken, f"{workdir} holds a training already; choose another --out")
    arrays = read_state_dict(checkpoint)
    try:
        variables = jax.tree_util.tree_map_with_path(_as_float32, from_torch(arrays, shapes))
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    state = _initial_state(config, variables)
    make_folder(workdir)
    for name, keep in (("best", 1), ("latest", 2)):
        meta = {"config": tree, "best_accuracy": -1.0}  # not measured yet
        Checkpoints(workdir / "checkpoints" / name, keep).save(0, state, meta)
    write_json(workdir / "config.json", tree)
    return state


def export_checkpoint(workdir: str | Path, out: str | Path, *, best: bool = True) -> int:
    """Writes a training's variables under their PyTorch names; the dataset is not read.

    Args:
      workdir: of the training of an MDEQ.
      out: new file, ``.npz`` or ``.safetensors``.
      best: the best checkpoint, or else the latest.

    Returns:
      The step of the checkpoint.

    Raises:
      InputError: if the workdir holds no such checkpoint of an MDEQ, or `out` exists or has another ending.
    """
    workdir, out = Path(workdir), Path(out)
    check_writable(out)
    require((workdir / "config.json").is_file(), f"{workdir}: not a training's workdir (no config.json)")
    config = from_tree(read_json(workdir / "config.json"))
    if not isinstance(config, TrainConfig):
        raise InputError(f"{workdir / 'config.json'}: expected a TrainConfig")
    template = jax.eval_shape(partial(_initial_state, config), mdeq_shapes(config))
    name = "best" if best else "latest"
    checkpoints = Checkpoints(workdir / "checkpoints" / name, keep=1 if best else 2)
    require(checkpoints.latest_step() is not None, f"{workdir}: has no {name} checkpoint yet")
    state, _ = checkpoints.restore(template)
    make_folder(out.parent)
    write_state_dict(out, to_torch(state.variables))
    return int(state.step)


def mdeq_shapes(config: TrainConfig) -> Variables:
    """Shapes and dtypes of the variables of the config's MDEQ, for images of three channels.

    Raises:
      InputError: if the classifier is no MDEQ, or its parts do not fit together.
    """
    classifier = config.classifier
    if not (
        isinstance(classifier, Equilibrium)
        and isinstance(classifier.encoder, MdeqEncoder)
        and isinstance(classifier.cell, MdeqCell)
        and isinstance(classifier.decoder, MdeqDecoder)
    ):
        raise InputError("the config's classifier is no MDEQ: expected Equilibrium(*mdeq(...), dynamics)")
    side = 2 ** (len(classifier.encoder.channels) - 1)  # the coarsest branch is one pixel
    try:
        return jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, ZeroDivisionError, flax.errors.FlaxError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the parts of the config's MDEQ do not fit together: {reason}") from None


def _as_float32(path: tuple, array: np.ndarray) -> np.ndarray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    require(jnp.issubdtype(array.dtype, jnp.floating), f"{name}: expected floating numbers, found {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    require(bool(np.isfinite(array).all()), f"{name}: holds numbers that are not finite in float32")
    return array


def _initial_state(config: TrainConfig, variables: Variables) -> TrainState:
    """As before the first step of a training; the optimiser's state does not depend on the number of steps."""
    params = variables["params"]
    optimizer = config.optimizer.transformation(1)
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))


if __name__ == "__main__":
    main()
