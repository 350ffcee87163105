"""``python -m deq_jax.evaluate --verify FOLDER``: whether a finished evaluation is what its files give."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from deq_jax._cli import console, fail, note
from deq_jax.core.errors import InputError, require
from deq_jax.data.datasets import Splits, class_names
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.record import read_record
from deq_jax.evaluation.verification import Check, verify
from deq_jax.storage.trees import first_difference, to_tree
from deq_jax.training.workdir import load_run


def verify_folder(folder: Path, workdir: Path | None, seed: int | None) -> None:
    """Prints a line for each check of an evaluation; exits with 65 if one fails.

    Args:
      folder: the evaluation.
      workdir: workdir of its training run; None for the one that it names.
      seed: chooses the images that are classified again; None for a new choice at each call.
    """
    own = EvaluationFolder(folder)
    where = read_record(own.record).provenance
    if where is None:
        raise InputError(f"{own.record}: names no workdir of a training run")
    kind = where.checkpoint.partition(",")[0]
    require(where.split in Splits._fields, f"{own.record}: no split is called {where.split!r}")
    run = load_run(workdir or where.workdir, best=kind == "best", say=note)
    seed = secrets.randbits(32) if seed is None else seed
    difference = first_difference(where.config, to_tree(run.config))
    trained = Check("training", difference is None, difference or f"{workdir or where.workdir} has the same config")
    checks = verify(
        own,
        run.config.classifier,
        run.variables,
        getattr(run.data, where.split),
        validation=run.data.validation,
        about={"checkpoint": f"{kind}, step {run.step}", "split": where.split},
        class_names=class_names(run.config.dataset),
        seed=seed,
    )
    for check in (trained, *checks):
        console.print(str(check))
    failed = [check.name for check in (trained, *checks) if not check.holds]
    if failed:
        fail(f"{folder}: not what its files give: {', '.join(failed)}; --seed {seed} repeats the choice", os.EX_DATAERR)
    console.print(f"verified: {folder} is what its files give; --seed {seed} repeats the choice")
