"""A finished evaluation as files: its record, the measurements of each image, and figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deq_jax.evaluation.figures import plot_accuracies, plot_images, plot_states
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.record import EvaluationRecord
from deq_jax.evaluation.results import WorstCase
from deq_jax.evaluation.rows import to_columns
from deq_jax.storage.files import write_json, write_npz, writing


def write_evaluation(out: Path, record: EvaluationRecord, result: WorstCase, x: np.ndarray) -> None:
    """Writes numbers, per-image results and figures into the folder `out`.

    Args:
      out: gets evaluation.npz, states.png, with trials also trials.png and images.png, and last evaluation.json.
      record: the numbers.
      result: the results of all trials.
      x: the images [N, H, W, C] in [0, 1].

    Raises:
      WriteError: one of the files cannot be written.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import (
      ...     Cost, EvalConfig, EvaluationRecord, Probe, Row, Rows, WorstCase, read_record, write_evaluation
      ... )
      >>> row = Row(np.array([3]), np.array([-1.0]), np.array([0.25]), np.array([np.nan]))
      >>> logits, clean, x = np.array([[0.0, 1.0]]), Rows(None, None, row), np.zeros((1, 8, 8, 1))
      >>> result = WorstCase(
      ...     config=EvalConfig(Linf(0.1), trials=()),
      ...     y=np.array([3]),
      ...     clean=clean,
      ...     zero_gradient=np.array([False]),
      ...     spectral_radius=np.array([0.5]),
      ...     probe=Probe(logits, logits, logits, logits),
      ...     cost=Cost(np.array([15.0]), np.array([0.5])),
      ...     attempts={},
      ...     x_adv=x,
      ...     worst=clean,
      ... )
      >>> record = EvaluationRecord.of(result)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_evaluation(Path(folder), record, result, x)
      ...     read_record(Path(folder, "evaluation.json")) == record
      True
    """
    folder, outcomes = EvaluationFolder(out), result.outcomes
    with writing(out):
        if outcomes.attacked is not None:
            plot_images(outcomes, x, folder.figure("images"))
            plot_accuracies(record.accuracy, folder.figure("trials"))
        plot_states(outcomes, folder.figure("states"))
        write_npz(folder.arrays, arrays_of(result))
        write_json(folder.record, record.to_json())


def arrays_of(result: WorstCase) -> dict[str, np.ndarray]:
    """The measurements of each image, as evaluation.npz has them."""
    outcomes = result.outcomes
    correct = {name: row.deployed for name, row in result.robust().items()}
    arrays = {"y": outcomes.y, "rows": np.array(list(correct)), "correct": np.stack(list(correct.values()))}
    arrays["spectral_radius"] = result.spectral_radius
    further = {"radius_settled": result.radius_settled, "adjoint_residual": result.adjoint_residual}
    arrays |= {name: values for name, values in further.items() if values is not None}
    arrays |= {f"clean_{name}": value for name, value in to_columns(outcomes.clean).items()}
    if outcomes.attacked is not None:
        arrays |= {f"attacked_{name}": value for name, value in to_columns(outcomes.attacked).items()}
        arrays["x_adv"] = outcomes.x_adv
    return arrays
