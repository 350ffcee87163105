"""Input entropy reduction [Yang et al. 2023] under a small budget: gradients through the defence and around it.

    python -m deq_jax.evaluate --workdir RUN --config configs/eval_entropy_quick.py

The attacks are the default ones of the budget "quick", adapted to the defence; `eval_entropy_reduced` has many more.
"""

from configs import eval_entropy_reduced
from deq_jax import TrainConfig
from deq_jax.evaluation import EvalConfig, default_trials
from deq_jax.training import threat_of


def get_config(train: TrainConfig) -> EvalConfig:
    return within(train, "quick")


def within(train: TrainConfig, budget: str) -> EvalConfig:
    """The evaluation within another budget."""
    predictor, threat = eval_entropy_reduced.defence(train), threat_of(train)
    return EvalConfig(
        threat,
        default_trials(predictor, threat, budget),
        predictor=predictor,
        defence="entropy reduction",
        batch_size=train.batch_size,
        budget=budget,
    )
