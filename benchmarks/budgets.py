"""Is the default evaluation strong enough? The worst cases under the budgets `quick` and `full`, on digits.

    python -m benchmarks.budgets --seeds 3 --images 60 --batch-size 60 --out runs/digits --page docs/results/budgets.md

Trains DEQs and explicit networks with each seed, evaluates each under both budgets, and compares the worst cases seed
by seed and image by image. Interrupt it at any time: the same command resumes. --page writes the tables into the page,
between its two marks, and their numbers beside it, as JSON.
"""

from benchmarks.study import Entry, Study, run

CONFIGS = {
    "PGD-AT": "digits_pgd_at",
    "PGD-AT, explicit network": "digits_cnn_pgd_at",
    "TRADES": "digits_trades",
    "TRADES, explicit network": "digits_cnn_trades",
}

STUDY = Study(
    {
        f"{name}, {budget}": Entry(config, evaluation=("--budget", budget))
        for name, config in CONFIGS.items()
        for budget in ("quick", "full")
    },
    [(f"{name}, full", f"{name}, quick") for name in CONFIGS],
)

if __name__ == "__main__":
    run(STUDY, __doc__)
