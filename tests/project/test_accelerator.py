"""A dry run, on the CPU, of what is prepared for an accelerator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accelerator
from deq_jax.storage import read_json

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_parity_and_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "BOUNDS", {"float32": 1e-3})
    accelerator.main(["--out", str(tmp_path), "--rows", "1", "--small", "2", "--repeats", "1"])
    found = read_json(tmp_path / "accelerator.json")
    (parity,) = found["parity"]
    differences = {name: value for name, value in parity.items() if name not in {"precision", "bound"}}
    assert differences.keys() == {"logits", "phantom gradient", "implicit gradient"}
    assert all(value <= 1e-6 for value in differences.values())  # both are the CPU's
    (cost,) = found["cost"]
    assert cost["config"] == "cifar10_small_pgd_at" and cost["attack"] == "PGD-3" and cost["finite"]
    assert cost["images_per_second"] == pytest.approx(2 / cost["step_seconds"], rel=0.1, abs=0.1)
    assert cost["planned_gigabytes"] > 0 and found["left_out"] == []


def test_rows_for_which_no_time_is_left_are_said_to_be_left_out(tmp_path):
    accelerator.main(["--out", str(tmp_path), "--rows", "2", "--minutes", "0", "--no-parity"])
    found = read_json(tmp_path / "accelerator.json")
    assert found["cost"] == [] and [row["compute_dtype"] for row in found["left_out"]] == [None, "bfloat16"]
    assert accelerator.tables(found).count("| left out | left out | left out | left out |") == 2


def test_a_difference_beyond_its_bound_is_exit_code_1(tmp_path, monkeypatch, capsys):
    near = {"precision": "float32", "bound": 1e-3} | dict.fromkeys(accelerator.COMPARED, 1e-4)
    far = {"precision": "bfloat16", "bound": 1e-2} | dict.fromkeys(accelerator.COMPARED, 1e-4) | {"logits": 2e-2}
    monkeypatch.setattr(accelerator, "parity", lambda: [near, far])
    with pytest.raises(SystemExit) as left:
        accelerator.main(["--out", str(tmp_path), "--rows", "0"])
    assert left.value.code == 1 and "beyond its bound: bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["measure"], ["train", "out", "configs/digits_pgd_at.py"], ["other", "out"]])
def test_the_script_without_its_arguments_says_how(arguments):
    said = subprocess.run([ROOT / "scripts/accelerator.sh", *arguments], capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "scripts/accelerator.sh train OUT CONFIG MINUTES" in said.stdout


@pytest.mark.slow
def test_a_run_in_parts_is_resumed_from_them(tmp_path):
    def train(epochs, *arguments):
        command = [ROOT / "scripts/accelerator.sh", "train", tmp_path, "configs/digits_cnn_standard.py", "30"]
        arguments = ["--set", f"epochs={epochs}", *arguments]
        environment = {**os.environ, "PYTHON": sys.executable, "PART": "20000"}
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    first = train(1)
    assert first.returncode == 0, first.stderr
    parts = sorted(tmp_path.glob("digits_cnn_standard.tgz.*"))
    assert len(parts) > 1 and all(part.stat().st_size <= 20_000 for part in parts)
    before = (tmp_path / "digits_cnn_standard/metrics.jsonl").read_text()
    (tmp_path / "digits_cnn_standard").rename(tmp_path / "elsewhere")
    again = train(1)
    assert again.returncode == 0 and (tmp_path / "digits_cnn_standard/metrics.jsonl").read_text() == before
    other = train(2)
    assert other.returncode == 2 and "config" in other.stderr  # what the command says, and its exit code
