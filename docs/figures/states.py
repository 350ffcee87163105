"""Draws states.svg: the accuracy of every state of a DEQ, clean and under attack.

python docs/figures/states.py runs/quickstart/evaluation/test-pgd/evaluation.json
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from deq_jax.evaluation import read_record

matplotlib.rcParams.update({"svg.hashsalt": "states", "font.size": 9})


def draw(evaluation: Path, out: Path) -> None:
    """The accuracies in the evaluation.json of a DEQ with eight states, as an SVG."""
    accuracy = read_record(evaluation).accuracy
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    places, names = range(1, 9), [f"$z_{t}$" for t in range(1, 9)]
    rows = {"clean": ("clean", "#2a6f97"), "union": ("attacked: PGD, 50 steps, 5 restarts", "#c8553d")}
    for row, (label, color) in rows.items():
        values = {name: 100 * share for name, share in accuracy[row].items()}
        axes.plot(places, [values[f"z_{t}"] for t in places], "o-", color=color, label=label)
        axes.plot([9], [values["deployed"]], "D", color=color)
        text = f"{values['deployed']:.1f} %"
        axes.annotate(text, (9, values["deployed"]), (7, -3), textcoords="offset points", color=color)
    axes.set(xlim=(0.7, 9.9), ylim=(60, 102), ylabel="accuracy (%)")
    axes.set_xticks([*places, 9], [*names, "deployed"])
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).with_name("states.svg"))
