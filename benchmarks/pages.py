"""Pages of results: their tables lie between two marks and are made from the JSON file beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deq_jax.core import require
from deq_jax.storage import write_json

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def with_tables(page: Path, tables: str) -> str:
    """The text of a page with these tables between its marks; refuses a page without them."""
    require(page.is_file(), f"{page}: no such file")
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    require(bool(mark), f"{page}: the page has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def write_page(page: Path, numbers: dict[str, Any], tables: str) -> None:
    """Puts the tables into a page, and their numbers into the JSON file beside it."""
    text = with_tables(page, tables)
    write_json(page.with_suffix(".json"), numbers)
    page.write_text(text)
