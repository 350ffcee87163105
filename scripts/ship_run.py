"""Puts the best checkpoint of an evaluated run into the package, for `deq_jax.models.pretrained`.

python scripts/ship_run.py runs/digits_pgd_at --evaluation test-quick
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from deq_jax._cli import command_line, console
from deq_jax.evaluation import read_record
from deq_jax.storage import from_tree, make_folder, to_tree, write_json
from deq_jax.training import Workdir, load_run

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Writes the weights and their measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="of the run")
    parser.add_argument("--evaluation", required=True, help="name of its evaluation")
    parser.add_argument("--out", type=Path, default=ROOT / "deq_jax/models/trained", help="folder of the weights")
    options = parser.parse_args()
    run, record = load_run(options.workdir), read_record(Workdir(options.workdir).evaluation(options.evaluation).record)
    arrays = traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(run.variables)), sep="/")
    written = io.BytesIO()
    np.savez(written, **arrays)
    folder, name = make_folder(options.out), options.workdir.name
    (folder / f"{name}.npz").write_bytes(written.getvalue())
    threat = from_tree(record.plan.threat)
    measured = {
        "norm": type(threat).__name__,
        "epsilon": threat.epsilon,
        "images": record.images,
        "budget": record.plan.budget,
        "clean_accuracy": record.accuracy["clean"]["deployed"],
        "robust_accuracy": record.robust_accuracy,
        "red_flags": [flag.name for flag in record.red_flags if flag.raised],
    }
    digest = hashlib.sha256(written.getvalue()).hexdigest()
    about = {"sha256": digest, "robustness": measured, "config": to_tree(run.config)}
    write_json(folder / f"{name}.json", about)
    console.print(f"{folder / name}.npz: {len(written.getvalue())} bytes, {measured}")


if __name__ == "__main__":
    with command_line():
        main()
