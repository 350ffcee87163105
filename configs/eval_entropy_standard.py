"""Input entropy reduction [Yang et al. 2023] under the budget "standard", five times that of `eval_entropy_quick`.

python -m deq_jax.evaluate --workdir RUN --config configs/eval_entropy_standard.py
"""

from configs import eval_entropy_quick
from deq_jax import TrainConfig
from deq_jax.evaluation import EvalConfig


def get_config(train: TrainConfig) -> EvalConfig:
    return eval_entropy_quick.within(train, "standard")
