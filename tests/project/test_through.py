"""The tables on attacks through the solver in training: what they say, and that the page shows its numbers."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.through import BEGIN, END, PAIRS, TRAININGS, slug, stored, tables, with_tables

PAGE = Path(__file__).parents[2] / "docs" / "results" / "through.md"
ROW = {
    "training": "PGD-AT",
    "seeds": [0, 1],
    "clean": {"value": 99.44, "interval": [98.0, 99.9]},
    "robust": {"value": 76.67, "interval": None},
    "of_seeds": [0.75, 0.7833],
    "residual": 0.0542,
    "flags": {"no plateau": 1},
}
PAIR = {
    "first": "a",
    "second": "b",
    "clean": {"value": -0.56, "interval": [-1.6, 0.5]},
    "robust": {"value": 7.5, "interval": [4.2, 10.8]},
}


def test_a_training_and_a_difference_are_rows():
    text = tables({"trainings": [ROW], "differences": [PAIR]})
    assert "| PGD-AT | 99.4 [98.0, 99.9] | 76.7 | 75.0, 78.3 | 0.054 | no plateau 1/2 |" in text
    assert "| a, minus b | −0.6 [−1.6, +0.5] | +7.5 [+4.2, +10.8] |" in text


def test_tables_go_between_the_marks_alone():
    numbers: dict[str, Any] = {"trainings": [], "differences": []}
    page = with_tables(f"before\n{BEGIN}\nold\n{END}\nafter\n", numbers)
    assert "old" not in page and page.startswith("before\n") and page.endswith("\nafter\n")
    assert with_tables(page, numbers) == page
    with pytest.raises(SystemExit, match="has no lines"):
        with_tables("no marks", numbers)


def test_the_page_shows_its_numbers():
    assert stored(PAGE) == PAGE.read_text()


def test_each_training_has_a_folder_of_its_own_and_pairs_are_trainings():
    assert len({slug(name) for name in TRAININGS}) == len(TRAININGS)
    assert {name for pair in PAIRS for name in pair} <= TRAININGS.keys()
