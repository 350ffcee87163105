"""A user's first steps, with the installed package: `make wheel-test` runs this outside of the checkout.

python -I scripts/smoke.py
"""

import subprocess
import sys
from importlib import resources
from pathlib import Path

import deq_jax as dj
from deq_jax import attacks, surrogates

COMMANDS = "train", "evaluate", "report", "convert"


def main() -> None:
    """Uses every file of the package that is not code, and starts every command."""
    assert Path(dj.__file__).is_relative_to(sys.prefix), f"{dj.__file__} is not the installed package"
    assert (resources.files("deq_jax") / "py.typed").is_file()
    assert all(hasattr(dj, name) for name in dj.__all__)
    assert "<!doctype html>" in dj.reporting.render(dj.reporting.Report.of([]))
    clean, attacked = attack_pretrained()
    assert clean > 0.9 > attacked, f"{clean:.1%} clean, {attacked:.1%} under attack"
    for command in COMMANDS:
        call = [sys.executable, "-I", "-m", f"deq_jax.{command}", "--help"]
        said = subprocess.run(call, check=True, capture_output=True, text=True).stdout
        assert said.startswith(f"usage: python -m deq_jax.{command}"), said
    print(f"deq_jax {dj.__version__} works as installed: {clean:.1%} clean, {attacked:.1%} under attack")


def attack_pretrained() -> tuple[float, float]:
    """Accuracy of the shipped network on 60 shipped images, clean and under PGD through its solver."""
    model, test = dj.models.pretrained("digits_pgd_at"), dj.data.Digits().load().test
    predictor = dj.Predictor(model.classifier, model.variables)
    x, y = test.x[:60], test.y[:60]
    x_adv = attacks.PGD(attacks.Linf(0.1))(predictor.oracle(surrogates.ThroughSolver()), x, y, 0)
    return float(predictor.accuracy(x, y)), float(predictor.accuracy(x_adv, y))


if __name__ == "__main__":
    main()
