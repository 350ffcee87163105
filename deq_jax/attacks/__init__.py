"""Attacks: frozen objects called as ``attack(oracle, x, target, key) -> x_adv``."""

from deq_jax.attacks.oracle import classifier_oracle as classifier_oracle
from deq_jax.attacks.oracle import oracle_of as oracle_of
from deq_jax.attacks.pgd import PGD as PGD
from deq_jax.attacks.pgd import clean_start as clean_start
from deq_jax.attacks.pgd import gaussian_start as gaussian_start
from deq_jax.attacks.pgd import uniform_start as uniform_start
