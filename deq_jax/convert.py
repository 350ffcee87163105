"""Converts PyTorch checkpoints of an MDEQ into workdirs, and back.

python -m deq_jax.convert model_best.pth.tar --config configs/mine.py --out runs/a
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

from deq_jax._cli import add_set_option, command_line, console, note
from deq_jax.core.errors import InputError, require
from deq_jax.interop.checkpoints import export_checkpoint, import_checkpoint, mdeq_shapes
from deq_jax.interop.mdeq_names import torch_shapes
from deq_jax.storage.configs import load_config, set_fields
from deq_jax.training.config import TrainConfig

DESCRIPTION = """\
Convert a PyTorch checkpoint of an MDEQ into a workdir, or back.

examples:
  python -m deq_jax.convert model_best.pth.tar --config configs/mine.py --out runs/a
  python -m deq_jax.convert runs/a --out runs/a.npz --checkpoint latest
  python -m deq_jax.convert --config configs/mine.py --names     (names and shapes of the expected entries)
Then evaluate it, or continue training:
  python -m deq_jax.evaluate --workdir runs/a
  python -m deq_jax.train --config configs/mine.py --workdir runs/a
"""

EPILOG = """\
files that are read:
  .pth.tar .pth .pt   by torch >= 2.10 (pip install torch), tensors only: no code in the file is run
  .safetensors        by safetensors (pip install safetensors)
  .npz                arrays by name

files that are written:
  DIR                 config.json, checkpoints/latest and checkpoints/best, at step 0 and with a fresh optimiser
  FILE                .npz or .safetensors: the variables of a WORKDIR under their PyTorch names

notes:
  CHECKPOINT is the state_dict of an MDEQ classifier, under the names of the published implementations. It may be an
  entry of the file, whatever its name, and all its names may have a prefix, such as "module." or "_orig_mod.".
  Numbers become float32. The dataset is not needed. Images may have any number of channels.
  If training continues, the best checkpoint is chosen among the new epochs.
  deq_jax gives images in [0, 1] to the network. If it was trained on normalised ones, the config's classifier must be
  normalized(Equilibrium(...), mean, std), of deq_jax.models.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.convert",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source_help = "file to convert, or folder of a training run"
    parser.add_argument("source", nargs="?", metavar="CHECKPOINT | WORKDIR", help=source_help)
    parser.add_argument("--out", metavar="DIR | FILE", help="folder or file to write; must not exist")
    parser.add_argument("--config", metavar="FILE", help="with CHECKPOINT: Python file with a function get_config()")
    add_set_option(
        parser,
        "with CHECKPOINT: replace a scalar field of the config, by dotted name; repeatable",
    )
    parser.add_argument(
        "--checkpoint", choices=["best", "latest"], help="with WORKDIR: which checkpoint to export; default: best"
    )
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
    require(options.checkpoint is None, f"--checkpoint goes with the workdir of a run; {source} is a file")
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
        note(f"training would begin with the {phase}; --set pretrain_steps=0 skips them")


def _run_export(options: argparse.Namespace) -> None:
    own = f"--config and --set go with a checkpoint file; {options.source} is a folder with a config of its own"
    require(options.config is None and not options.assignments, own)
    step = export_checkpoint(options.source, options.out, best=options.checkpoint != "latest", say=note)
    console.print(f"converted: {options.checkpoint or 'best'} checkpoint, step {step}, in {options.out}")


if __name__ == "__main__":
    main()
