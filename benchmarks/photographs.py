"""The papers' claims on photographs: a small MDEQ and its explicit twin, adversarially trained on CIFAR-10.

    python -m benchmarks.photographs --set dataset.path=cifar-10-python.tar.gz --seeds 1 --images 256 \\
        --out runs/photographs --page docs/results/photographs.md

Trains each config with each seed, evaluates it under a budget (`evaluate --budget`), and compares the worst cases seed
by seed and image by image. Interrupt it at any time: the same command resumes. --page writes the tables into the page,
between its two marks, and their numbers beside it, as JSON.
"""

from benchmarks.study import Study, Training, run

FEW = ("--batch-size", "64")  # attacks through the solver take some gigabytes
LAST = ("--checkpoint", "latest")  # the best one is chosen under attack, where standard training has no accuracy

STUDY = Study(
    {
        "standard": Training("cifar10_small_standard", evaluation=(*FEW, *LAST)),
        "PGD-AT": Training("cifar10_small_pgd_at", evaluation=FEW),
        "PGD-AT, random states": Training("cifar10_small_pgd_at_random", evaluation=FEW),
        "PGD-AT, explicit twin": Training("cifar10_small_twin_pgd_at", evaluation=FEW),
    },
    [
        ("PGD-AT, random states", "PGD-AT"),
        ("PGD-AT, explicit twin", "PGD-AT"),
    ],
    details=True,
)

if __name__ == "__main__":
    run(STUDY, __doc__)
