"""Training against attacks on the computation: does a DEQ then reach the explicit network of its size?

    python -m benchmarks.through --seeds 3 --out runs/through --page docs/results/through.md

Trains each config with each seed, evaluates it under a budget (`evaluate --budget`), and compares the worst cases seed
by seed and image by image. Interrupt it at any time: the same command resumes. --page writes the tables into the page,
between its two marks, and their numbers beside it, as JSON.
"""

from benchmarks.study import Entry, Study, run

STUDY = Study(
    {
        "PGD-AT": Entry("digits_pgd_at"),
        "PGD-AT, through the solver": Entry("digits_pgd_at_through"),
        "PGD-AT, parameters as well": Entry("digits_pgd_at_backprop"),
        "PGD-AT, explicit network": Entry("digits_cnn_pgd_at"),
        "TRADES": Entry("digits_trades"),
        "TRADES, through the solver": Entry("digits_trades_through"),
        "TRADES, explicit network": Entry("digits_cnn_trades"),
        "PGD-AT, 16 solver steps": Entry("digits_pgd_at", ("classifier.dynamics.solver.steps=16",)),
        "PGD-AT, through 4 solver steps": Entry("digits_pgd_at_through", ("classifier.dynamics.solver.steps=4",)),
        "PGD-AT, random states": Entry("digits_pgd_at_random"),
        "PGD-AT, through the solver, random states": Entry("digits_pgd_at_through_random"),
    },
    [
        ("PGD-AT, through the solver", "PGD-AT"),
        ("PGD-AT, parameters as well", "PGD-AT, through the solver"),
        ("PGD-AT, explicit network", "PGD-AT, through the solver"),
        ("TRADES, through the solver", "TRADES"),
        ("TRADES, explicit network", "TRADES, through the solver"),
        ("PGD-AT, 16 solver steps", "PGD-AT"),
        ("PGD-AT, through 4 solver steps", "PGD-AT, through the solver"),
        ("PGD-AT, random states", "PGD-AT"),
        ("PGD-AT, through the solver, random states", "PGD-AT, through the solver"),
    ],
)

if __name__ == "__main__":
    run(STUDY, __doc__)
