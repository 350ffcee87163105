"""Files, config trees and checkpoints; for contributors. Orbax is loaded with `deq_jax.storage.checkpoints` alone."""

from deq_jax.storage.briefs import brief, duration, number
from deq_jax.storage.configs import load_config, set_fields
from deq_jax.storage.environment import decisive_settings, environment
from deq_jax.storage.files import digest, make_folder, read_json, read_npz, write_json, write_npz
from deq_jax.storage.trees import first_difference, from_tree, public_name, to_tree

__all__ = [
    "brief",
    "decisive_settings",
    "digest",
    "duration",
    "environment",
    "first_difference",
    "from_tree",
    "load_config",
    "make_folder",
    "number",
    "public_name",
    "read_json",
    "read_npz",
    "set_fields",
    "to_tree",
    "write_json",
    "write_npz",
]
