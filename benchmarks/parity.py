"""How far this project is from the authors' code on the golden model: runs tests/project/test_golden.py and tabulates.

    python -m benchmarks.parity --page docs/results/agreement.md

For each quantity the largest relative l2 error of its entries in float64 and in float32, and the largest rounding: the
distance between the authors' own float32 and float64 runs. A page is written only if no comparison failed; --out has
each error in any case. Runs on the CPU, for minutes; needs the extra `test`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import jax
import pytest

from benchmarks.pages import Row, check_page, made, write_page
from deq_jax._cli import command_line, console, fail
from deq_jax.storage import make_folder, write_json

ROOT = Path(__file__).parents[1]
ByPrecision = dict[str, dict[str, dict[str, float]]]
"""Precision -> key -> error and rounding."""

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
        self.by_precision: ByPrecision = {"float64": {}, "float32": {}}

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        case = getattr(item, "funcargs", {}).get("case")
        if case is not None:
            self.by_precision[case.dtype] |= case.errors


def main(argv: list[str] | None = None) -> None:
    """Runs the tests, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/parity.json"), metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page that shows the table")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    with command_line():
        check_page(options.page, "tables")
        make_folder(options.out.parent)
        record, errors = made(), Errors()
        code = pytest.main(
            ["-q", f"--rootdir={ROOT}", str(ROOT / "tests" / "project" / "test_golden.py")], plugins=[errors]
        )
        matched = {name: keys_of(pattern, errors.by_precision) for name, pattern in QUANTITIES.items()}
        rows = [row(name, keys, errors.by_precision) for name, keys in matched.items()]
        numbers = {"made": [record], "rows": rows}
        write_json(options.out, numbers | {"errors": errors.by_precision})
        console.print(tables(numbers))
        if code:
            fail("some comparisons failed; see above", 1)
        unlisted = errors.by_precision["float64"].keys() - {key for keys in matched.values() for key in keys}
        assert not unlisted, f"no quantity has {sorted(unlisted)}"
        if options.page:
            write_page(options.page, numbers, {"tables": tables(numbers)})


def keys_of(pattern: str, errors: ByPrecision) -> list[str]:
    """The keys of comparisons that match."""
    return [key for key in errors["float64"] | errors["float32"] if re.fullmatch(pattern, key)]


def row(quantity: str, keys: list[str], errors: ByPrecision) -> Row:
    """The largest errors of these keys, None where nothing was compared."""

    def largest(precision: str, field: str) -> float | None:
        return max((errors[precision][key][field] for key in keys if key in errors[precision]), default=None)

    return {
        "quantity": quantity,
        "float64": largest("float64", "error"),
        "float32": largest("float32", "error"),
        "rounding": largest("float32", "rounding"),
    }


def tables(numbers: Row) -> str:
    """One line per quantity, as Markdown."""
    lines = ["| quantity | float64 error | float32 error | rounding floor |", "|---|---|---|---|"]
    for entry in numbers["rows"]:
        found = (entry[field] for field in ("float64", "float32", "rounding"))
        shown = " | ".join("" if number is None else f"{number:.0e}" for number in found)
        lines.append(f"| {entry['quantity']} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
