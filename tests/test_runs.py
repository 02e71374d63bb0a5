"""Table 1's runner and report, and the table of feedbacks."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from common import load_json
from runs import feedback, table1

ROOT = Path(__file__).parent.parent


def test_spearman_is_the_correlation_of_ranks() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    y = torch.tensor([[10.0, 20.0, 25.0, 99.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    # third row: ranks 4 1 2.5 2.5 and 1 3.5 3.5 2, deviations 1.5 -1.5 0 0 and -1.5 1 1 -.5
    want = [1.0, -1.0, -3.75 / (4.5**0.5 * 4.5**0.5), 0.0]
    assert feedback.spearman(x, y).tolist() == pytest.approx(want)


def test_differences_are_paired_by_object() -> None:
    """A gain that is small beside the objects' own spread is found, and only a sure one is printed bold."""
    hard = 10 * torch.rand(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = {"sft": {"psnr": hard}, "c": {"psnr": hard + 0.1 + 0.01 * noise}, "m": {"psnr": hard + 0.1 * noise}}
    lines, numbers = table1.differences(scores, ["psnr"], "sft")
    assert numbers["c"]["psnr"]["mean"] == pytest.approx(0.1, abs=0.005)
    assert 0.095 < numbers["c"]["psnr"]["low"] < numbers["c"]["psnr"]["high"] < 0.105
    assert [line.count("**") for line in lines[2:]] == [0, 0, 2]  # sft itself, m, c
    assert "± 0" in table1.table(scores, ["psnr"], {})[2]


@pytest.mark.slow
def test_table1_runs_to_the_end_and_resumes(tmp_path) -> None:
    """bash runs/table1.sh --small in a copy of the repository, twice."""
    for path in [*ROOT.glob("*.py"), ROOT / "runs", ROOT / "checkpoints"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    outputs = []
    for _ in range(2):
        run = subprocess.run(
            ["bash", "runs/table1.sh", "--small"], cwd=tmp_path, capture_output=True, text=True, timeout=1500
        )
        assert run.returncode == 0, run.stderr[-2000:]
        outputs.append(run.stdout)
    results = tmp_path / "out" / "table1_small" / "results"
    for name in ("table.md", "grid.png", "curves.png", "feedback.md"):
        assert (results / name).stat().st_size > 0
    result = load_json(results / "table.json")
    layers = {"sft", "m", "c_pre", "c", "hull"}  # each with the attention layers and with all
    other = {"pre", "sft_low", "c_nine_all", "ns_all", "independent"}
    assert set(result["rows"]) == layers | {f"{row}_all" for row in layers} | other
    assert all(len(seeds) == 2 for row in result["rows"].values() for seeds in row.values())
    assert result["known"]["truth"]["ssim"] == pytest.approx(1)
    assert "[train:" in outputs[0] and "[train:" not in outputs[1]  # nothing was done again
