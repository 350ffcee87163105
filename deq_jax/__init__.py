"""Deep equilibrium models in JAX: the layer, its solvers, readouts and gradients, and classifiers of them.

Attacks are in `deq_jax.attacks`, models in `deq_jax.models`, objectives in `deq_jax.objectives`.
"""

from deq_jax.classifiers import Dynamics as Dynamics
from deq_jax.classifiers import Equilibrium as Equilibrium
from deq_jax.classifiers import Explicit as Explicit
from deq_jax.gradients import Implicit as Implicit
from deq_jax.gradients import Neumann as Neumann
from deq_jax.gradients import Phantom as Phantom
from deq_jax.gradients import Unrolled as Unrolled
from deq_jax.gradients import deq as deq
from deq_jax.readouts import EnsembleState as EnsembleState
from deq_jax.readouts import FinalState as FinalState
from deq_jax.readouts import IntermediateState as IntermediateState
from deq_jax.readouts import RandomIntermediateState as RandomIntermediateState
from deq_jax.solvers import Anderson as Anderson
from deq_jax.solvers import Broyden as Broyden
from deq_jax.solvers import FixedPoint as FixedPoint
from deq_jax.solvers import solve as solve
