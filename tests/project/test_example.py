"""The example of the package's docstring runs, in small."""

import re
import textwrap
from typing import Any

import numpy as np
import pytest

import deq_jax as dj
from deq_jax.attacks import PGD, Square
from deq_jax.evaluation import Trial

SMALLER = {"channels=12": "channels=4", "Broyden(8)": "Broyden(4)", "epochs=6": "epochs=1", "[:120]": "[:12]"}


def example():
    """The code of the docstring."""
    block = dj.__doc__.split("::\n\n", 1)[1]
    return textwrap.dedent(block).strip()


def test_it_is_short_and_takes_all_names_from_faces():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15 and max(map(len, lines)) <= 120
    assert [line for line in lines if "import" in line] == [
        "import deq_jax as dj",
        "from deq_jax import attacks, surrogates",
    ]


@pytest.mark.slow
def test_it_runs(monkeypatch, capsys, tmp_path):
    def short(ball):
        return Trial("pgd", PGD(ball, steps=3)), Trial("square", Square(ball, queries=10))

    monkeypatch.setattr(dj.evaluation, "auto_attack_trials", short)
    monkeypatch.chdir(tmp_path)
    code = example()
    for whole, small in SMALLER.items():
        assert whole in code
        code = code.replace(whole, small)
    names: dict[str, Any] = {}
    exec(code, names)
    accuracy, last = capsys.readouterr().out.splitlines()
    assert 0 <= float(accuracy) <= 1
    robust, flags = last.split(" ", 1)
    assert float(robust) == names["result"].robust_accuracy <= names["result"].clean_accuracy
    assert len(re.findall("Flag", flags)) == 9
    assert float(np.abs(names["x_adv"] - names["x"]).max()) <= 0.1 + 1e-6
    assert not list(tmp_path.iterdir())
