"""The papers' claims on digits: DEQs and explicit networks of their size, each regulation and each defence, attacked.

    python -m benchmarks.digits --seeds 3 --images 120 --out runs/digits --page docs/results/digits.md

Trains each config with each seed, evaluates it under a budget (`evaluate --budget`) as trained and with defences, and
compares the worst cases seed by seed and image by image. Interrupt it at any time: the same command resumes. --page
writes the tables into the page, between its two marks, and their numbers beside it, as JSON.
"""

from benchmarks.study import Entry, Study, other_states, run

CONFIGS = {"PGD-AT": "pgd_at", "TRADES": "trades"}


def family(objective: str) -> tuple[dict[str, Entry], list[tuple[str, str]]]:
    """The rows of one objective and their pairs: the DEQ, other states, random states, and the explicit network."""
    explicit, config = f"{objective}, explicit network", CONFIGS[objective]
    deq = Entry(f"digits_{config}")
    rows = {
        explicit: Entry(f"digits_cnn_{config}"),
        objective: deq,
        f"{objective}, random states": Entry(f"digits_{config}_random"),
        **other_states(objective, deq, explicit=explicit),
    }
    return rows, [(name, objective) for name in rows if name != objective]


(PGD_AT, PGD_AT_PAIRS), (TRADES, TRADES_PAIRS) = family("PGD-AT"), family("TRADES")

EVERY = "PGD-AT, every white-box attack"

STUDY = Study(
    {"standard": Entry("digits_standard")}
    | PGD_AT
    | TRADES
    | {EVERY: Entry("digits_pgd_at", evaluation=("--config", "configs/eval_white_box.py"), seeds=1)},
    PGD_AT_PAIRS + TRADES_PAIRS,
    states=("standard", "PGD-AT", "PGD-AT, random states", "TRADES", "TRADES, random states"),
    attacks=(EVERY,),
)

if __name__ == "__main__":
    run(STUDY, __doc__)
