"""Pages of results: their parts are made from the JSON file beside them.

A part lies between its two marks, `<!-- NAME -->` and `<!-- end of NAME -->`. Each page has a part `stamp`: the numbers
were made by this code, with these versions, on this machine.
"""

from __future__ import annotations

import os
import platform
import re
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

from deq_jax.core import require
from deq_jax.storage import environment, write_json

Row = dict[str, Any]


def made(work: str = "measured") -> Row:
    """A record of this process for the stamp: the day, the processors, and the environment.

    Args:
      work: what the process does, in the past tense.
    """
    found = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    processor = found[1] if found else platform.processor()
    days = {"work": work, "date": date.today().isoformat()}
    return days | {"processor": processor, "processors": os.cpu_count(), **environment()}


def distinct(work: str, environments: list[Row]) -> list[Row]:
    """Records of the environments of earlier processes, those with the same code, versions and devices once."""
    shown = [{part: one.get(part, {}) for part in ("code", "versions", "platform")} for one in environments]
    return [{"work": work, **one} for i, one in enumerate(shown) if one not in shown[:i]]


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def stamp(records: list[Row]) -> str:
    """The stamp of a page.

    Args:
      records: as of `made`; entries that were not recorded may be absent.
    """
    text = "> **Stamp.** " + (" ".join(f"{_stamped(record)}." for record in records) or "Not measured yet.")
    return textwrap.fill(text, 120, subsequent_indent="> ", break_long_words=False, break_on_hyphens=False)


def _stamped(record: Row) -> str:
    code, versions, kind = (record.get(part, {}) for part in ("code", "versions", "platform"))
    revision = code.get("revision")
    commit = f"commit {revision[:7]}" if revision else "a commit that was not recorded"
    changed = " with changes" if code.get("unchanged") is False else ""
    machine = [f"{kind['devices']} x {kind['device_kind']}"] if kind.get("platform", "cpu") != "cpu" else []
    if "processors" in record:
        processor = f" ({record['processor']})" if record.get("processor") else ""
        machine.append(f"{record['processors']} CPU cores{processor}")
    elif kind.get("platform") == "cpu":
        machine.append("CPU")
    numbers = [f"{name} {versions[key]}" for name, key in (("Python", "python"), ("jax", "jax")) if key in versions]
    day = f" on {record['date']}" if "date" in record else ""
    by = ", ".join([commit + changed, *numbers, *machine])
    return f"{record['work'].capitalize()}{day} by {by}"


def with_parts(page: Path, parts: dict[str, str]) -> str:
    """The text of a page with these parts between their marks; refuses a page without them."""
    require(page.is_file(), f"{page}: no such file")
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        require(bool(mark), f"{page}: the page has no lines {begin!r} and {end!r}")
        text = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    return text


def check_page(page: Path | None, *names: str) -> None:
    """Refuses a page without the marks of its stamp and of these parts, before anything is measured."""
    if page:
        with_parts(page, dict.fromkeys(("stamp", *names), ""))


def write_page(page: Path, numbers: Row, parts: dict[str, str]) -> None:
    """Puts the stamp and these parts into a page, and their numbers into the JSON file beside it.

    Args:
      page: has the marks of `stamp` and of each part.
      numbers: content of the JSON file; its entry ``made`` is the list of records for the stamp.
      parts: Markdown by the name of the part.
    """
    text = with_parts(page, {"stamp": stamp(numbers["made"])} | parts)
    write_json(page.with_suffix(".json"), numbers)
    page.write_text(text)
