"""Input entropy reduction on digits, attacked: after training as in the papers, and through the solver.

    python -m benchmarks.entropy_reduction --seeds 3 --images 60 --out runs/digits \\
        --page docs/results/entropy-reduction.md

Trains each config with each seed, evaluates it with and without the defence, and compares the worst cases seed by seed
and image by image. The runs are those of `benchmarks.digits`. Interrupt it at any time: the same command resumes.
--page writes the tables into the page, between its two marks, and their numbers beside it, as JSON.
"""

from benchmarks.digits import CONFIGS
from benchmarks.study import Entry, Study, reduced, run


def family(objective: str) -> dict[str, Entry]:
    """The rows of one objective: the explicit network, and both kinds of training, each with the defence on top."""
    explicit, through, config = f"{objective}, explicit network", f"{objective}, through the solver", CONFIGS[objective]
    deq, trained_through = Entry(f"digits_{config}"), Entry(f"digits_{config}_through")
    return {
        explicit: Entry(f"digits_cnn_{config}"),
        objective: deq,
        **reduced(objective, deq, explicit=explicit),
        through: trained_through,
        **reduced(through, trained_through, explicit=explicit),
    }


ROWS = {name: entry for objective in CONFIGS for name, entry in family(objective).items()}

REDUCED = [name for name in ROWS if name.endswith(", entropy reduction")]

LONGER = f"{REDUCED[0]}, budget standard"

STANDARD = ROWS[REDUCED[0]]._replace(evaluation=("--config", "configs/eval_entropy_standard.py"), seeds=1)

STUDY = Study(
    ROWS | {LONGER: STANDARD},
    [*((name, name.removesuffix(", entropy reduction")) for name in REDUCED), (LONGER, REDUCED[0])],
    attacks=tuple(REDUCED),
)

if __name__ == "__main__":
    run(STUDY, __doc__)
