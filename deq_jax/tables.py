"""Tables of texts, for pages and for CSV files, and how means and differences are written in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deq_jax.comparisons import Difference, Mean

ERROR, INTERVAL = ("", "standard error"), ("", "95 % interval low", "95 % interval high")
Form = Callable[[float], str]


class Cell(NamedTuple):
    """Texts that become one cell of a page and as many of a CSV file.

    Attributes:
      parts: a text; a mean and its standard error; or a difference and the ends of its interval.
      warning: beside it, on the page.
    """

    parts: tuple[str, ...]
    warning: str = ""

    def __str__(self) -> str:
        match self.parts:
            case (value, low, high):
                return f"{value} [{low}, {high}]"
            case (value, error):
                return f"{value} ± {error}"
            case (value,):
                return value or "–"
        raise ValueError(f"Cell: expected 1 to 3 texts, got {self.parts!r}")


class Column(NamedTuple):
    """Of a table.

    Attributes:
      name: its heading.
      parts: suffixes of its columns in a CSV file.
      kind: "text" or "number", and "main" for the number to look at.
    """

    name: str
    parts: tuple[str, ...] = ("",)
    kind: str = "number"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading.

    Attributes:
      name: of its CSV file.
      caption: what it shows.
      section: what the titles of the sections are, as a heading in a CSV file.
      columns: one per cell of a row.
      sections: title -> rows; a single section may have the title "".
    """

    name: str
    caption: str
    section: str
    columns: tuple[Column, ...]
    sections: dict[str, list[tuple[Cell, ...]]]

    def csv(self) -> str:
        """The same texts, every number in a column of its own."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        titled = any(self.sections)
        names = [f"{column.name} {part}".strip() for column in self.columns for part in column.parts]
        writer.writerow([self.section, *names] if titled else names)
        for title, rows in self.sections.items():
            for row in rows:
                cells = [_filled(cell, column) for cell, column in zip(row, self.columns, strict=True)]
                parts = [part for cell in cells for part in cell]
                writer.writerow([title, *parts] if titled else parts)
        return text.getvalue()


def text_cell(text: str) -> Cell:
    """A text, or a number as it is to be written."""
    return Cell((text,))


def mean_cell(mean: Mean | None, form: Form = "{:.2f}".format) -> Cell:
    """A mean and, if there is one, its standard error."""
    if mean is None:
        return text_cell("")
    error = () if mean.standard_error is None else (form(mean.standard_error),)
    return Cell((form(mean.value), *error))


def mean_of(values: Mapping[int, float]) -> Mean | None:
    """The mean over seeds; None if there are none."""
    return Mean.of(list(values.values())) if values else None


def difference_cell(difference: Difference | None) -> Cell:
    """A difference with its sign and, if there is one, its interval."""
    if difference is None:
        return text_cell("")
    return Cell((f"{difference.value:+.2f}", *(f"{end:.2f}" for end in difference.interval or ())))


def _filled(cell: Cell, column: Column) -> tuple[str, ...]:
    return (*cell.parts, *[""] * (len(column.parts) - len(cell.parts)))
