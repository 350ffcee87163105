"""The table of results in README, made from docs/results/digits.json.

python -m benchmarks.readme
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.digits import EVERY
from benchmarks.pages import Row, with_parts
from deq_jax.storage import read_json

ROOT = Path(__file__).parents[1]
COLUMNS = {"": "worst case", ", early state": "early", ", ensemble state": "ensemble"}


def table(numbers: Row) -> str:
    """Clean accuracy and worst cases of the networks of the digits study, also of other states, as Markdown."""
    found = {row["training"]: row for row in numbers["rows"]}
    others = tuple(suffix for suffix in COLUMNS if suffix)
    names = [name for name in found if name != EVERY and not name.endswith(others)]
    lines = [f"| training | clean | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name in names:
        cells = [_worst(found[name + suffix]) if name + suffix in found else "" for suffix in COLUMNS]
        lines.append(f"| {name} | {found[name]['clean']['value']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _worst(row: Row) -> str:
    low, high = row["robust"]["interval"]
    return f"{row['robust']['value']:.1f} [{low:.0f}, {high:.0f}]{' ⚑' if row['flags'] else ''}"


def readme() -> str:
    """README with this table."""
    return with_parts(ROOT / "README.md", {"digits": table(read_json(ROOT / "docs" / "results" / "digits.json"))})


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
