"""The table of limits and peers, and that the network in PyTorch is the one of Flax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peer_cases import Work
from benchmarks.peer_rows import ROWS, measure
from deq_jax import Broyden, Dynamics, EntropyReduced, Equilibrium, Phantom, solve
from deq_jax.defences import reduce_entropy
from deq_jax.models import mdeq


def ratio(value):
    return {"ratio": value, "smallest": value - 0.1, "largest": value + 0.25}


ROW = {"size": "small", "batch": 16, "threads": 2, "seconds": 0.25}
FOUND = {
    "not_installed": ["torchattacks"],
    "parts": {
        "broyden": {
            "rows": [ROW | {"ratios": {"limit": ratio(1.5), "torchdeq": ratio(0.5), "jaxopt": ratio(1.0)}}],
        },
        "pgd": {"rows": [ROW | {"size": "plain", "ratios": {"limit": ratio(1.0)}}]},
    },
}


def test_each_peer_has_a_line_and_the_limit_stands_once():
    _, _, *text = peers.table(FOUND).splitlines()
    start = "| solver alone: Broyden, 8 steps | small MDEQ, 16 | 2 | 0.250 |"
    assert text[0] == f"{start} 1.50 (1.40 to 1.75) | torchdeq | 0.50 (0.40 to 0.75) |"
    assert text[1] == f"{start}  | jaxopt | 1.00 (0.90 to 1.25) |"
    assert text[2] == "| PGD-20 on a plain network | convolutions, 16 | 2 | 0.250 | 1.00 (0.90 to 1.25) |  |  |"
    assert "Not installed: torchattacks." in text
    missed = "solver alone: Broyden, 8 steps, small MDEQ, 16, threads 2 (1.50)"
    assert f"**Above 1.25 x the limit**: {missed}." in text and "**Above 1.00 x the peer**: none." in text


def test_without_rows_the_table_says_so():
    assert peers.table({"not_installed": [], "parts": {}}) == "Not measured yet."


def test_all_rows_of_the_table_can_be_measured():
    assert peers.TABLE.keys() == ROWS.keys() | {"pgd"}


def test_runs_alternate_and_the_first_ones_do_not_count():
    calls = []
    work = Work(
        *(lambda name=name: calls.append(name) for name in ("ours", "limit")), {"other": lambda: calls.append("other")}
    )
    row = measure(work, repeats=2)
    assert calls == ["ours", "limit", "other"] * 3
    assert list(row["ratios"]) == ["limit", "other"] and row["seconds"] > 0


def test_rows_that_are_measured_again_replace_their_own(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ("stamp", "table")))
    monkeypatch.setattr(peers, "measured", lambda name, threads, repeats: iter(FOUND["parts"][name]["rows"]))
    command = ["--out", str(tmp_path / "peers.json"), "--page", str(page), "--only"]
    peers.main([*command, "pgd"])
    assert "Broyden" not in page.read_text()
    peers.main([*command, "broyden"])
    assert "Broyden" in page.read_text() and "PGD-20" in page.read_text()


@pytest.fixture(scope="module")
def networks():
    """Ours with its variables and images, and the same in PyTorch."""
    pytest.importorskip("torch")
    pytest.importorskip("torchdeq")
    from benchmarks import torch_mdeq  # noqa: PLC0415

    dynamics = Dynamics(Broyden(4, tolerance=0), gradient=Phantom(2, damping=0.5))
    modules = mdeq(3, (8, 16, 24), (4, 4, 8), final_channels=8, expansion=2, dropout=0.0)
    model, rng = Equilibrium(*modules, dynamics), np.random.default_rng(0)
    x = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.uniform(size=leaf.shape).astype(leaf.dtype), model.init(0, x)
    )
    network = torch_mdeq.TorchMdeq.of(variables, model.cell)
    return torch_mdeq, model, variables, x, network


def as_ours(state):
    return [branch.detach().permute(0, 2, 3, 1).numpy() for branch in state]


def test_encoder_cell_and_decoder_in_pytorch_equal_ours(networks):
    torch_mdeq, model, variables, x, network = networks
    u, features = model.encode(variables, x), network.encode(torch_mdeq.images(x))
    rng = np.random.default_rng(1)
    z = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), u.features)
    state = [torch_mdeq.images(branch) for branch in z]
    cell = network.cell(features, network.kernels())
    check = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4))
    check(list(u.features), as_ours(features))
    check(list(model.apply_cell(variables["params"]["cell"], z, u)), as_ours(cell(*state)))
    check(model.decode(variables, z), network.decode(state).detach().numpy())


def test_batch_statistics_in_training_equal_ours(networks):
    torch_mdeq, model, variables, x, _ = networks
    trained = torch_mdeq.TorchMdeq.of(variables, model.cell)
    trained.encode(torch_mdeq.images(x), train=True)
    found = model(variables, x, train=True).batch_stats["encoder"]
    for name, value in torch_mdeq.tensors({"encoder": found}).items():
        np.testing.assert_allclose(trained.statistics[name], value, rtol=1e-4, atol=1e-5)


def test_broyden_of_torchdeq_finds_our_states(networks):
    torch_mdeq, model, variables, x, network = networks
    u, features = model.encode(variables, x), network.encode(torch_mdeq.images(x))
    z = jax.tree.map(jnp.zeros_like, u.features)
    ours = solve(model.dynamics.solver, model.apply_cell, variables["params"]["cell"], z, u).z
    theirs = torch_mdeq.solved(network, features, "broyden", 5)
    unravel = torch_mdeq.flat_cell(None, features)[1]
    for a, b in zip(ours, as_ours(unravel(theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)


def test_entropy_reduction_in_pytorch_moves_images_as_ours(networks):
    from benchmarks import torch_work  # noqa: PLC0415

    torch_mdeq, model, variables, x, network = networks
    defence = EntropyReduced(model, steps=2)
    logits, purified = torch_work.entropy_reduced(network.frozen(), torch_mdeq.images(x), defence)
    found = reduce_entropy(defence, variables, x)
    (purified,) = as_ours([purified])
    assert np.mean(abs(found.x - purified) < 1e-4) > 0.9 and np.std(purified - x) > 0
    np.testing.assert_allclose(defence(variables, x).logits, logits.detach(), atol=0.05)
