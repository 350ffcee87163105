"""Converts PyTorch checkpoints of an MDEQ into the workdir of a training, and back.

python -m deq_jax.convert model_best.pth.tar --config configs/mine.py --out runs/a
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import flax
import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.checkpoints import Checkpoints
from deq_jax.classifiers import Equilibrium
from deq_jax.cli import add_set_option, command_line, console
from deq_jax.config import TrainConfig, load_config, set_fields, to_tree
from deq_jax.models.mdeq import MdeqCell, MdeqDecoder, MdeqEncoder
from deq_jax.normalized import Normalized
from deq_jax.records import make_folder, write_json
from deq_jax.runs import checkpoints_of, read_config
from deq_jax.state_dicts import check_writable, read_state_dict, write_state_dict
from deq_jax.steps import TrainState, optimizer_of
from deq_jax.torch_names import STEM, from_torch, to_torch, torch_shapes
from deq_jax.types import InputError, Variables, prng_key, require

STEPS = 1_000_000  # of a training whose data are not read: more than any warm-up
EPILOG = """\
CHECKPOINT is the state_dict of an MDEQ classifier, under the names of the published implementations:
  .pth.tar .pth .pt   read by torch >= 2.10 (pip install torch), tensors only: no code in the file is run
  .safetensors        read by safetensors (pip install safetensors)
  .npz                arrays by name
The state_dict may be an entry of a file of PyTorch, whatever its name, and all its names may have a prefix, such as
"module." or "_orig_mod.". Numbers become float32. The dataset is not needed; images may have any number of channels.

DIR gets config.json, checkpoints/latest and checkpoints/best, at step 0 and with a fresh optimiser, and can be
evaluated or trained on. A training that goes on chooses its best checkpoint anew, among its own epochs.
deq_jax gives images in [0, 1] to the network. Where it was trained on normalised ones, the config's classifier must be
normalized(Equilibrium(...), mean, std), of deq_jax.normalized.

The way back writes the variables of a WORKDIR, under their PyTorch names, into FILE.npz or FILE.safetensors.

examples:
  python -m deq_jax.convert model_best.pth.tar --config configs/mine.py --out runs/a
  python -m deq_jax.convert runs/a --out runs/a.npz --checkpoint latest
  python -m deq_jax.convert --config configs/mine.py --names     (names and shapes of the entries that are expected)
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
    source_help = "file to convert, or folder of a training"
    parser.add_argument("source", nargs="?", metavar="CHECKPOINT | WORKDIR", help=source_help)
    parser.add_argument("--out", metavar="DIR | FILE", help="what is written; never overwritten")
    parser.add_argument("--config", metavar="FILE", help="with CHECKPOINT: Python file with a function get_config()")
    add_set_option(
        parser,
        "with CHECKPOINT: replace a scalar field of the config, by dotted name; repeatable",
    )
    parser.add_argument("--checkpoint", choices=["best", "latest"], help="with WORKDIR; default: best")
    parser.add_argument("--names", action="store_true", help="with --config alone: list the expected entries")
    options = parser.parse_args(arguments)
    with command_line():
        if options.names:
            _list_names(options)
            return
        if options.source is None or options.out is None:
            raise InputError("CHECKPOINT or WORKDIR and --out are needed; see --help")
        if Path(options.source).is_dir():
            _run_export(options)
        else:
            _run_import(options)


def _list_names(options: argparse.Namespace) -> None:
    if options.config is None or options.source or options.out or options.checkpoint:
        raise InputError("--names goes with --config FILE, and with --set, alone")
    config = set_fields(load_config(options.config, TrainConfig), options.assignments)
    for name, shape in torch_shapes(mdeq_shapes(config)).items():
        print(name, shape)


def _run_import(options: argparse.Namespace) -> None:
    source = options.source
    require(Path(source).exists(), f"{source}: no such checkpoint or workdir")
    require(options.checkpoint is None, f"--checkpoint goes with a training's workdir; {source} is a file")
    if options.config is None:
        raise InputError(f"--config FILE is needed: it names the MDEQ to which {source} belongs")
    config = set_fields(load_config(options.config, TrainConfig), options.assignments)
    state = import_checkpoint(source, config, options.out, report=console.print)
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


def import_checkpoint(
    checkpoint: str | Path, config: TrainConfig, workdir: str | Path, report: Callable[[str], None] = lambda text: None
) -> TrainState:
    """Writes the workdir of a training that starts from a PyTorch checkpoint.

    Args:
      checkpoint: see `read_state_dict`.
      config: its classifier is the MDEQ of the checkpoint; its dataset is not read.
      workdir: gets ``config.json``, ``checkpoints/best`` and ``checkpoints/latest``.
      report: called with a line on entries beside the network, if there are any.

    Returns:
      The state at step 0 that was written, with a fresh optimiser; variables in float32.

    Raises:
      InputError: for another classifier, a checkpoint that cannot be read or does not fit, or a workdir that
        holds a training; nothing is written then.
    """
    workdir = Path(workdir)
    names, tree = torch_shapes(mdeq_shapes(config)), to_tree(config)
    taken = any((workdir / name).exists() for name in ("config.json", "checkpoints"))
    require(not taken, f"{workdir} holds a training already; choose another --out")
    arrays, left_out = read_state_dict(checkpoint, names)
    try:
        shapes = mdeq_shapes(config, _channels(arrays))
        variables = jax.tree_util.tree_map_with_path(_as_float32, from_torch(arrays, shapes))
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    state = _initial_state(config, variables)
    if left_out:
        report(f"left out: {', '.join(left_out[:8])}{', ...' if len(left_out) > 8 else ''} (beside the network)")
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
    config = read_config(workdir)
    mdeq_shapes(config)
    checkpoints = checkpoints_of(workdir, "best" if best else "latest")
    template = mdeq_shapes(config, _stored_channels(checkpoints))
    variables, _ = checkpoints.restore(template, only=list(template))
    make_folder(out.parent)
    write_state_dict(out, to_torch(variables))
    return cast(int, checkpoints.latest_step())


def _channels(arrays: dict[str, np.ndarray]) -> int | None:
    """How many channels the images have for which a network was made; None if it does not tell."""
    stem = arrays.get(STEM)
    return stem.shape[1] if stem is not None and stem.ndim == 4 else None


def _stored_channels(checkpoints: Checkpoints) -> int | None:
    try:
        return int(checkpoints.shapes()["params"]["encoder"]["stem_conv0"]["kernel"].shape[2])
    except (TypeError, KeyError, IndexError):
        return None  # damaged, or of another network: restoring it will tell


def mdeq_shapes(config: TrainConfig, channels: int | None = None) -> Variables:
    """Shapes and dtypes of the variables of the config's MDEQ.

    Args:
      config: its dataset is not read.
      channels: of the images; None for those of the config's normalisation, and for three without one.

    Raises:
      InputError: if the classifier is no MDEQ, or its parts do not fit together.
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
        raise InputError("the config's classifier is no MDEQ: expected Equilibrium(*mdeq(...), dynamics)")
    side = 2 ** (len(encoder.channels) - 1)  # the coarsest branch is one pixel
    images = jnp.zeros((1, side, side, own if channels is None else channels))
    try:
        return jax.eval_shape(classifier.init, prng_key(0), images)
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
    optimizer = optimizer_of(config, STEPS)
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))


if __name__ == "__main__":
    main()
