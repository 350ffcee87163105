"""How far this project is from the authors' code on the golden model: runs tests/project/test_golden.py and tabulates.

    python benchmarks/parity.py --out runs/bench/parity.json

For each quantity the largest relative l2 error of its entries in float64 and in float32, and the largest rounding: the
distance between the authors' own float32 and float64 runs. The tests that compare may fail: the errors are listed
all the same. Runs on the CPU, for minutes; needs the extra `test`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.table import Table

from deq_jax._cli import command_line, console, fail
from deq_jax.storage import make_folder, write_json

ROOT = Path(__file__).parents[1]
QUANTITIES = {  # of the keys in tests/golden
    "encoder": r"layer/(stem|x_list/0)",
    "cell, one application": r"layer/fz_(sub|list_s0/\d)",
    "residual blocks": r"layer/block_out_s0/\d",
    "logits": r"layer/predict_fz|broyden/(result_)?logits",
    "Broyden states": r"broyden(_t\d+)?/results?_(sub|norm)",
    "Broyden residuals": r"broyden(_t\d+)?/(rel_trace|lowest)",
    "Anderson states, residuals, logits": r"anderson/.*",
    "phantom gradients": r"phantom/.*",
    "exact gradient": r"real/b\d+/(logits|loss|grad_x)",
    "adjoint states": r"real/(cotangent|b\d+/adjoint)_(sub|norm)",
    "adjoint residuals": r"real/b\d+/(rel_trace|lowest)",
    "Neumann gradient": r"neumann/.*",
    "unrolled-intermediate gradients": r"unroll/.*",
    "Jacobian norm": r"jac/.*",
    "power iteration": r"power/.*",
    "PGD trajectories": r"(pgd|ris_pgd_train)/.*",
    "TRADES attack": r"trades_adv/.*",
    "training: losses, logits": r"train/\w+/(loss.*|jac_loss|logits_\w+)",
    "training: BatchNorm statistics": r"train/\w+/bn/.*",
    "pre-training: parameter gradients": r"train/pretrain/grad.*",
    "PGD-AT: parameter gradients": r"train/pgdat_t\d/grad.*",
    "TRADES: parameter gradients": r"train/trades_t\d/grad.*",
    "TRADES with Jacobian norm: parameter gradients": r"train/trades_t\d_jac/grad.*",
}


class Errors:
    """A pytest plugin: the errors of every comparison, by precision and key."""

    def __init__(self) -> None:
        self.by_precision: dict[str, dict[str, dict[str, float]]] = {"float64": {}, "float32": {}}

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        case = getattr(item, "funcargs", {}).get("case")
        if case is not None:
            self.by_precision[case.dtype] |= case.errors


def main() -> None:
    """Runs the tests, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/parity.json"), metavar="FILE")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with command_line():
        make_folder(options.out.parent)
        errors = Errors()
        code = pytest.main(
            ["-q", f"--rootdir={ROOT}", str(ROOT / "tests" / "project" / "test_golden.py")], plugins=[errors]
        )
        rows = [row(name, pattern, errors.by_precision) for name, pattern in QUANTITIES.items()]
        write_json(options.out, {"jax": jax.__version__, "rows": rows, "errors": errors.by_precision})
        console.print(table(rows))
        if code:
            fail("some comparisons failed; see above", 1)
        unlisted = errors.by_precision["float64"].keys() - {key for row in rows for key in row["keys"]}
        assert not unlisted, f"no quantity has {sorted(unlisted)}"


def row(quantity: str, pattern: str, errors: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The largest errors of the keys that match, None where nothing was compared."""
    keys = [key for key in errors["float64"] | errors["float32"] if re.fullmatch(pattern, key)]

    def largest(precision: str, field: str) -> float | None:
        return max((errors[precision][key][field] for key in keys if key in errors[precision]), default=None)

    return {
        "quantity": quantity,
        "float64": largest("float64", "error"),
        "float32": largest("float32", "error"),
        "rounding": largest("float32", "rounding"),
        "keys": keys,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per quantity."""
    grid = Table("quantity", "float64 error", "float32 error", "rounding floor")
    for entry in rows:
        numbers = (entry[field] for field in ("float64", "float32", "rounding"))
        grid.add_row(entry["quantity"], *("-" if number is None else f"{number:.1e}" for number in numbers))
    return grid


if __name__ == "__main__":
    main()
