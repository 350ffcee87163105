"""PyTorch networks: state dicts, and the published names of MDEQ's parameters."""

from deq_jax.interop.checkpoints import export_checkpoint, import_checkpoint, mdeq_shapes
from deq_jax.interop.mdeq_names import from_torch, to_torch, torch_shapes
from deq_jax.interop.state_dicts import read_state_dict, write_state_dict

__all__ = [
    "export_checkpoint",
    "from_torch",
    "import_checkpoint",
    "mdeq_shapes",
    "read_state_dict",
    "to_torch",
    "torch_shapes",
    "write_state_dict",
]
