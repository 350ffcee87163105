"""The papers' claims on digits: DEQs and explicit networks of their size, each regulation and each defence, attacked.

    python -m benchmarks.digits --seeds 3 --images 120 --out runs/digits --page docs/results/digits.md

Trains each config with each seed, evaluates it under a budget (`evaluate --budget`) as trained and with defences, and
compares the worst cases seed by seed and image by image. Interrupt it at any time: the same command resumes. --page
writes the tables into the page, between its two marks, and their numbers beside it, as JSON.
"""

from benchmarks.study import Entry, Study, defended, run

EXPLICIT = {"PGD-AT": Entry("digits_cnn_pgd_at"), "TRADES": Entry("digits_cnn_trades")}
PLAIN = {"PGD-AT": Entry("digits_pgd_at"), "TRADES": Entry("digits_trades")}
RANDOM = {"PGD-AT": Entry("digits_pgd_at_random"), "TRADES": Entry("digits_trades_random")}


def family(objective: str) -> tuple[dict[str, Entry], list[tuple[str, str]]]:
    """The rows of one objective, and its pairs: the explicit network, the DEQ, and the one with random states."""
    explicit, random = f"{objective}, explicit network", f"{objective}, random states"
    rows = {explicit: EXPLICIT[objective]}
    pairs = [(explicit, objective), (random, objective)]
    for name, entry in {objective: PLAIN[objective], random: RANDOM[objective]}.items():
        others = defended(name, entry, explicit=explicit)
        rows |= {name: entry, **others}
        pairs += [(other, name) for other in others]
    return rows, pairs


(PGD_AT, PGD_AT_PAIRS), (TRADES, TRADES_PAIRS) = family("PGD-AT"), family("TRADES")

STUDY = Study(
    {"standard": Entry("digits_standard")} | PGD_AT | TRADES,
    PGD_AT_PAIRS + TRADES_PAIRS,
    states=("standard", "PGD-AT", "PGD-AT, random states", "TRADES", "TRADES, random states"),
)

if __name__ == "__main__":
    run(STUDY, __doc__)
