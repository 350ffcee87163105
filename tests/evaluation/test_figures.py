"""The figures show the numbers of the evaluation: curves, grid and images, read back from matplotlib."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from deq_jax.evaluation import Outcomes, Row, Rows, correctness, figures, named

COUNT, STATES = 6, 3
LABELS = np.arange(COUNT)


def measured(seed, wrong):
    """Random measurements; the deployed predictor answers the next class on the images `wrong`."""
    rng = np.random.default_rng(seed)

    def row(*shape):
        label = np.where(rng.random(shape) < 0.5, LABELS.reshape(-1, *[1] * (len(shape) - 1)), 9)
        return Row(label, np.ones(shape), rng.random(shape), rng.uniform(0.01, 1, shape))

    deployed = row(COUNT)._replace(label=np.where(np.isin(LABELS, wrong), LABELS + 1, LABELS))
    return Rows(row(COUNT, STATES), row(COUNT), deployed)


X = np.random.default_rng(2).uniform(0.2, 0.8, (COUNT, 4, 4, 1))
NOISE = np.random.default_rng(3).uniform(-0.1, 0.1, X.shape)
OUTCOMES = Outcomes(LABELS, measured(0, wrong=[]), measured(1, wrong=[2, 5]), X + NOISE)


@pytest.fixture
def drawn(monkeypatch):
    """Figures, in place of their files."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: saved.append(figure))
    return saved


def test_curves_of_the_states(drawn, tmp_path):
    figures.plot_states(OUTCOMES, tmp_path / "states.png")
    clean, robust = (named(one) for one in correctness(OUTCOMES))
    names = ["z_1", "z_2", "z_3", "ensemble", "deployed"]
    conditions = [(clean, named(OUTCOMES.clean)), (robust, named(OUTCOMES.attacked))]
    expected = [
        [[100 * np.mean(right[name]) for name in names] for right, _ in conditions],
        [[np.mean(seen[name].entropy) for name in names] for _, seen in conditions],
        [[np.mean(seen[name].residual) for name in names] for _, seen in conditions],
    ]
    for axis, wanted in zip(drawn[0].axes, expected, strict=True):
        assert [text.get_text() for text in axis.get_xticklabels()] == ["z_1", "z_2", "z_3", "ens.", "dep."]
        found = [line.get_xydata() for line in axis.lines]  # states, then single ones, clean and then attacked
        curves = [np.concatenate(found[i : i + 2]) for i in (0, 2)]
        np.testing.assert_allclose(curves, [np.stack([np.arange(5), values], axis=1) for values in wanted])


def test_a_grid_of_accuracies(drawn, tmp_path):
    accuracies = {"clean": {"z_1": 0.5, "deployed": 1.0}, "pgd_$x": {"z_1": 0.25, "deployed": 0.125}}
    figures.plot_accuracies(accuracies, tmp_path / "trials.png")
    (axis,) = drawn[0].axes
    np.testing.assert_array_equal(axis.images[0].get_array(), [[50, 100], [25, 12.5]])
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == {(0, 0): "50.0", (1, 0): "100.0", (0, 1): "25.0", (1, 1): "12.5"}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["clean", r"pgd_\$x"]


def test_images_with_their_noise_the_broken_ones_first(drawn, tmp_path):
    figures.plot_images(OUTCOMES, X, tmp_path / "images.png", count=4)
    axes = np.reshape(drawn[0].axes, (3, 4))
    chosen = [2, 5, 0, 1]
    largest = np.abs(NOISE).max()
    for row, pictures in enumerate((X, NOISE / (2 * largest) + 0.5, X + NOISE)):
        for axis, i in zip(axes[row], chosen, strict=True):
            np.testing.assert_allclose(axis.images[0].get_array(), pictures[i, ..., 0])
            assert axis.images[0].get_clim() == (0, 1)
    assert [axis.get_title() for axis in axes[0]] == ["2", "5", "0", "1"]
    assert [axis.get_title() for axis in axes[2]] == ["3", "6", "0", "1"]


def test_images_need_an_attack(tmp_path):
    with pytest.raises(ValueError, match="expected an evaluation with an attack"):
        figures.plot_images(OUTCOMES._replace(attacked=None, x_adv=None), X, tmp_path / "images.png")
