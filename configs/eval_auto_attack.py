"""AutoAttack on the deployed predictor, with the attacks that the red flags need.

    python -m deq_jax.evaluate --workdir runs/digits_pgd_at --config configs/eval_auto_attack.py

The norm and the radius come from the run's validation attack; --epsilon changes the radius.
"""

from deq_jax import TrainConfig
from deq_jax.evaluation import EvalConfig, auto_attack_trials, diagnostics
from deq_jax.training import threat_of


def get_config(train: TrainConfig) -> EvalConfig:
    threat = threat_of(train)
    return EvalConfig(threat, auto_attack_trials(threat), diagnostics(threat), batch_size=train.batch_size)
