"""The papers' claims on photographs: a small MDEQ and its explicit twins, adversarially trained on CIFAR-10.

    python -m benchmarks.photographs --set dataset.path=cifar-10-python.tar.gz --seeds 1 --images 256 \\
        --batch-size 64 --out runs/photographs --page docs/results/photographs.md

Trains each config with each seed, evaluates it under a budget (`evaluate --budget`) as trained and with defences, and
compares the worst cases seed by seed and image by image. Attacks through the solver take some gigabytes at batches of
64. Interrupt it at any time: the same command resumes. --page writes the tables into the page, between its two marks,
and their numbers beside it, as JSON.
"""

from benchmarks.study import Entry, Study, other_states, reduced, run

LAST = ("--checkpoint", "latest")  # the best one is chosen under attack, where standard training has no accuracy
DEQS = {
    "PGD-AT": Entry("cifar10_small_pgd_at"),
    "PGD-AT, random states": Entry("cifar10_small_pgd_at_random"),
}
TWINS = {
    "PGD-AT, explicit twin": Entry("cifar10_small_twin_pgd_at"),
    "PGD-AT, twin of equal computation": Entry("cifar10_small_tied_pgd_at"),
}
PLAIN = {"standard": Entry("cifar10_small_standard", evaluation=LAST), **DEQS, **TWINS}
DEFENDED = {
    row: (name, one)
    for name, entry in DEQS.items()
    for row, one in (other_states(name, entry) | reduced(name, entry)).items()
}

STUDY = Study(
    PLAIN | {row: entry for row, (_, entry) in DEFENDED.items()},
    [
        ("PGD-AT, random states", "PGD-AT"),
        *((twin, "PGD-AT") for twin in TWINS),
        *((row, name) for row, (name, _) in DEFENDED.items()),
    ],
    states=("standard", *DEQS),
    curves=tuple(PLAIN),
)

if __name__ == "__main__":
    run(STUDY, __doc__)
