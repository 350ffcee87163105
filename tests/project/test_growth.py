"""How cost grows: exponents, tables, and that the page shows its numbers."""

from pathlib import Path

import pytest

from benchmarks import growth, series
from benchmarks.pages import stamp, with_parts
from deq_jax.storage import read_json

PAGE = Path(__file__).parents[2] / "docs" / "results" / "growth.md"


def rows_of(seconds, memory, sizes=(1, 2, 4, 8), work="prediction"):
    """Rows whose two repetitions take these seconds, and 10 % more."""
    return [
        {"work": work, "size": size, "seconds": [seconds(size), 1.1 * seconds(size)], "memory": memory(size)}
        | {"compiling": 2.0, "operations": 1e9 * size}
        for size in sizes
    ]


ROWS = rows_of(lambda size: 0.003 * size**1.5, lambda size: 5e6 * size)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    sizes = [4.0, 8.0, 16.0, 64.0]
    assert growth.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_exponents_are_of_the_largest_sizes_in_the_power_that_is_linear():
    rows = rows_of(lambda side: side**2 if side > 1 else 100.0, lambda side: side**4)
    found = growth.exponents(rows, power=2)
    assert [found[name] for name in ("seconds", "smallest", "largest")] == pytest.approx([1, 1, 1])
    assert [found[name] for name in ("memory", "operations")] == pytest.approx([2, 0.5])
    assert found["compiling"] == pytest.approx(0, abs=1e-12)


def test_time_is_worse_than_linear_if_every_repetition_is():
    noisy = [row | {"seconds": [row["seconds"][0], row["size"]]} for row in ROWS]
    verdicts = [growth.verdict(growth.exponents(rows, 1)) for rows in (ROWS, noisy)]
    assert verdicts == ["time", ""]
    assert growth.verdict(growth.exponents(ROWS, 2)) == ""
    assert growth.verdict(growth.exponents(rows_of(lambda size: 1.0, lambda size: size**2), 1)) == "memory"


def test_a_series_has_a_table_its_exponents_and_its_figure():
    text = growth.part("batch", {"parts": {"batch": {"rows": ROWS}}})
    assert "| prediction | 8 | 0.0713 (0.0679 to 0.0747) | 40.0 | 2.0 | 8.00 |" in text
    assert "| prediction | 1.50 (1.50 to 1.50) | 1.00 | 0.00 | 1.00 | time |" in text
    assert "](../figures/growth-batch.svg)" in text
    assert growth.part("image", {"parts": {}}) == "Not measured yet."


@pytest.mark.parametrize(("value", "text"), [(0.001234, "0.00123"), (0.5, "0.500"), (12.34, "12.3"), (1234.5, "1234")])
def test_numbers_have_three_digits(value, text):
    assert growth.shown(value) == text


def test_series_that_are_measured_again_leave_the_others_and_each_has_its_figure(tmp_path, monkeypatch):
    page = tmp_path / "results" / "growth.md"
    page.parent.mkdir()
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ["stamp", *series.ALL]))
    monkeypatch.setattr(growth, "made", lambda: {"work": "measured", "date": "2026-01-01"})
    monkeypatch.setattr(growth, "rows", lambda name, repeats: ROWS)
    command = ["--out", str(tmp_path / "growth.json"), "--page", str(page), "--only"]
    growth.main([*command, "batch"])
    growth.main([*command, "image"])
    numbers = read_json(page.with_suffix(".json"))
    assert numbers == read_json(tmp_path / "growth.json") and numbers["parts"].keys() == {"batch", "image"}
    assert page.read_text().count("Not measured yet.") == len(series.ALL) - 2
    figures = [tmp_path / "figures" / f"growth-{name}.svg" for name in numbers["parts"]]
    before = [figure.read_text() for figure in figures]
    growth.show(page, numbers)
    assert [figure.read_text() for figure in figures] == before


@pytest.mark.slow
def test_a_piece_of_work_is_measured_at_each_size():
    case = series.ALL["batch"].works["training step"]
    rows = series.measured(series.Series("batch", (1, 2), "small", {"step": case}), (1, 2), repeats=2)
    assert [(row["work"], row["size"], len(row["seconds"])) for row in rows] == [("step", 1, 2), ("step", 2, 2)]
    assert rows[1]["operations"] == 2 * rows[0]["operations"] and rows[1]["memory"] > rows[0]["memory"] > 0


def test_the_page_shows_its_numbers():
    numbers = PAGE.with_suffix(".json")
    found = read_json(numbers) if numbers.exists() else {"made": [], "parts": {}}
    parts = {"stamp": stamp(found["made"])} | {name: growth.part(name, found) for name in series.ALL}
    assert with_parts(PAGE, parts) == PAGE.read_text()
