"""Attacks: frozen objects called as ``attack(oracle, x, target, key) -> x_adv``."""

from deq_jax.attacks.apgd import APGD as APGD
from deq_jax.attacks.auto import AutoAttack as AutoAttack
from deq_jax.attacks.auto import auto_attack as auto_attack
from deq_jax.attacks.combine import average as average
from deq_jax.attacks.combine import expectation as expectation
from deq_jax.attacks.combine import surrogate as surrogate
from deq_jax.attacks.fab import FAB as FAB
from deq_jax.attacks.oracle import classifier_oracle as classifier_oracle
from deq_jax.attacks.oracle import oracle_of as oracle_of
from deq_jax.attacks.pgd import PGD as PGD
from deq_jax.attacks.pgd import clean_start as clean_start
from deq_jax.attacks.pgd import gaussian_start as gaussian_start
from deq_jax.attacks.pgd import uniform_start as uniform_start
from deq_jax.attacks.spsa import SPSA as SPSA
from deq_jax.attacks.square import Square as Square
from deq_jax.attacks.targeted import Targeted as Targeted
from deq_jax.attacks.targeted import logit_difference as logit_difference
from deq_jax.attacks.targeted import targeted_dlr as targeted_dlr
from deq_jax.attacks.threat import L2 as L2
from deq_jax.attacks.threat import Linf as Linf
