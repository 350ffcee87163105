"""A control of input entropy reduction: updates of the same size in random directions.

    python -m deq_jax.evaluate --workdir RUN --config configs/eval_entropy_random.py

The predictor is random. Attacks average over 20 draws, which makes them 20 times as slow: there are only four, and no
diagnostics. Differentiating the updates gains nothing, because their directions are constants.
"""

from dataclasses import replace

from configs import eval_entropy_reduced
from deq_jax import TrainConfig
from deq_jax.defences import RandomDirection
from deq_jax.evaluation import EvalConfig


def get_config(train: TrainConfig) -> EvalConfig:
    config = eval_entropy_reduced.get_config(train)
    predictor = replace(eval_entropy_reduced.defence(train), direction=RandomDirection())
    by_name = {trial.name: trial for trial in config.trials}
    names = ("apgd.bpda-identity", "apgd.bpda-solver", "apgd.base", "pgd-50.from-worst.bpda-solver")
    trials = tuple(by_name[name] for name in names)
    return replace(config, trials=trials, diagnostics=None, predictor=predictor, defence="random direction", draws=20)
