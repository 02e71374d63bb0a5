"""The README keeps its word: its examples run, its numbers are those in results/, nothing is left open."""

import functools
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import random_model

import model
import train_d3po as D
import train_scorer
import train_sft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(python|diff)\n(.*?)```", README, re.S)
COLUMNS = {  # heading -> metric, factor
    "PSNR": ("psnr_unseen", 1),
    "SSIM": ("ssim_unseen", 1),
    "LPIPS": ("lpips_unseen", 1),
    "contradictions, %": ("contradiction", 100),
    "shape": ("silhouette_unseen", 1),
    "cover, %": ("covered", 100),
    "score": ("contrastive", 1),
}
ROWS = {
    "pre-trained": "pre",
    "SFT": "sft",
    "MV-D3PO-M (SIFT)": "m",
    "MV-D3PO-C, one token": "c",
    "MV-D3PO-C, epipolar lines (ours)": "branch_epipolar",
    "the same by Diffusion-DPO": "loose_epipolar",
    "ground truth": "truth",
}
TINY = {"num_references": 3, "eval_objects": 2, "num_steps": 4, "trained_calls": (0, 1), "num_candidates": 3}
TINY |= {"steps": 2, "batch_objects": 2, "batch_size": 2, "bf16": "off"}


def the_block(language: str, word: str) -> str:
    found = [code for kind, code in BLOCKS if kind == language and word in code]
    assert len(found) == 1, word
    return found[0]


def run_block(word: str, folder: Path) -> dict:
    """As a script of one's own."""
    path = folder / "fork.py"
    path.write_text(the_block("python", word))
    return runpy.run_path(str(path))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The examples name no sizes: here all are tiny, the model included."""
    monkeypatch.chdir(tmp_path)
    random_model(image_size=64, patch=8).save(tmp_path / "tiny")
    options = {**TINY, "model": str(tmp_path / "tiny")}
    stock = D.Config
    monkeypatch.setattr(D, "Config", lambda **said: stock(**{**said, **options}))
    # the silhouettes of a random model all tie, which is an error: another feedback stands in
    monkeypatch.setattr(D, "FEEDBACKS", {**D.FEEDBACKS, "geometry": D.FEEDBACKS["redder"]})
    monkeypatch.setattr(D, "d3po_loss", D.d3po_loss)
    monkeypatch.setattr(model, "small_unet", model.small_unet)
    monkeypatch.setattr(model, "PRESETS", model.PRESETS)
    return tmp_path


def log_of(folder: Path, name: str) -> list[dict]:
    path = next(folder.glob(f"{name}-*/log.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_feedback(small, capsys):
    space = run_block("redder", small)
    assert D.FEEDBACKS["redder"] is space["redder"]
    assert "'before': " in capsys.readouterr().out.splitlines()[-1]
    assert log_of(small / "out" / "redder", "d3po_redder")[-1]["step"] == 2


def test_the_loss(small, monkeypatch):
    tiny = D.Config
    monkeypatch.setattr(D, "Config", lambda **said: replace(tiny(**said), steps=1))
    run_block("ipo_loss", small)
    line = log_of(small / "out" / "ipo", "d3po_geometry")[-1]
    assert line["loss_d3po"] == pytest.approx(1 / 4)  # (1 / (2 beta))^2 at theta = pre, beta 1


def test_the_backbone(small, monkeypatch):
    tiny = {"num_objects": 4, "eval_objects": 2, "num_steps": 3, "steps": 2, "batch_size": 2, "bf16": "off"}
    monkeypatch.setattr(train_sft, "Config", functools.partial(train_sft.Config, **tiny))
    monkeypatch.setitem(model.PRESETS, "toy", model.ModelConfig(channels=32, head_dim=8))
    run_block("deeper", small)
    made = model.load(next((small / "out").glob("deeper-*")))  # while small_unet is the example's
    layers = [m for m in made.modules() if isinstance(m, model.MultiViewAttention)]
    assert made.cfg.prediction == "v" and made.unet.conv_norm_out is None
    assert len(layers) == 2 + 3  # down, up; with one block a resolution it is 1 + 2
    del model.PRESETS["deeper"]


def test_the_loop_is_rounds(small):
    space = run_block("for round in range(3)", small)
    cfg = space["cfg"]
    again = D.main(D.Config(feedback=cfg.feedback, out=cfg.out, rounds=3))
    assert (
        Path(again["folder"]).resolve() == space["policy"].resolve()
    )  # found by its content: nothing was made twice
    assert len(list(Path(cfg.out).glob("candidates-*"))) == 3


def test_six_views(tmp_path):
    """The diff in a copy of the repository; then a model is trained, and fine-tuned, on six views."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    source = (tmp_path / "render.py").read_text()
    for hunk in re.split(r"^---.*\n", the_block("diff", "bottom"), flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "render.py").write_text(source)
    options = {**TINY, "data": "toys", "feedback": "redder", "steps": 1}
    code = f"""
from pathlib import Path
import model, train_sft, train_d3po
model.PRESETS["toy"] = model.ModelConfig(image_size=32, channels=32, head_dim=8)
tiny = dict(num_objects=4, eval_objects=2, num_steps=3, steps=1, batch_size=2, bf16="off", data=("toys",))
train_sft.main(train_sft.Config(out="out/sft", **tiny))
result = train_d3po.main(train_d3po.Config(model="out/sft", **{options}))
assert train_d3po.read_rollouts(next(Path("out").glob("candidates-*"))).x_t.shape[3] == 6
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_table_of_results_holds_the_numbers_of_table_1():
    """Number by number, to the digits shown; not character by character."""
    table = {}
    # of a row in several the last counts
    for name in ("table1_branches", "table1_epipolar", "table1_agreement", "table1"):
        table |= json.loads((ROOT / "results" / name / "table.json").read_text())["rows"]
    lines = next(part for part in README.split("\n\n") if "held-out objects" in part and part.startswith("|"))
    head, _, *rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines.splitlines()
    ]
    assert [row[0] for row in rows] == list(ROWS)
    compared = 0
    for row in rows:
        for heading, cell in zip((h.split(" (")[0] for h in head), row):
            if heading in COLUMNS and cell != "-":
                metric, factor = COLUMNS[heading]
                value = table[ROWS[row[0]]][metric]["mean"] * factor
                cell = cell.split()[0]  # in brackets: the paper's
                digits = len(cell.partition(".")[2])
                assert abs(float(cell) - value) <= 0.501 * 10**-digits, (row[0], heading, cell, value)
                compared += 1
    assert compared >= 30


RUNS = {  # a heading of the quick start's output -> the file it is from
    "--feedback contrastive --loss d3po --kl 0.05": "main/results_eq2.json",
    "--feedback contrastive --loss diffusion_dpo --kl 0.05": "main/results.json",
}


def test_the_quick_start_shows_what_the_runs_printed():
    output = next(part for part in README.split("```") if part.strip().startswith("--feedback"))
    for heading, file in RUNS.items():
        result = json.loads((ROOT / "results" / file).read_text())
        command = result["command"].split()
        assert command[command.index("--feedback") + 1] == heading.split()[1]
        lines = output.split(heading)[1].split("\n\n")[0].strip().splitlines()
        rows = [line for line in lines if not line.startswith(("pictures changed", "metric "))]
        assert len(rows) >= 3
        for line in rows:
            name, *numbers = line.replace("[", " ").replace("]", " ").replace(",", " ").split()
            row = result["table"][name]
            shown = [float(x) for x in numbers[:5]]
            kept = [row[k] for k in ("before", "after", "difference", "low", "high")]
            assert shown == pytest.approx(kept, abs=5.1e-5), (heading, line)


def test_what_the_feedback_example_prints_is_what_its_run_printed():
    row = json.loads((ROOT / "results" / "redder.json").read_text())["table"]["redder"]
    printed, grey = re.search(r"It prints (.*?): from (.*?) grey levels of 255", README, re.S).groups()
    assert [float(x) for x in re.findall(r"\.\d+", printed)] == pytest.approx([*row.values()], abs=5.1e-5)
    shown = [float(x) for x in grey.split(" to ")]
    assert shown == pytest.approx([255 * row["before"], 255 * row["after"]], abs=0.051)


@pytest.mark.parametrize(
    "file",
    [*RUNS.values(), "agreement/results.json", "geometry/results.json", "main/scorer.json", "redder.json"],
)
def test_the_numbers_shown_are_those_of_the_defaults(file):
    """A default that is changed needs new numbers."""
    then = json.loads((ROOT / "results" / file).read_text())["config"]
    how = {} if "scorer" in file else {"feedback": then["feedback"], "loss": then["loss"]}
    how |= {"num_references": 32, "eval_objects": 16} if file == "redder.json" else {}
    now = json.loads(json.dumps(asdict((train_scorer if "scorer" in file else D).Config(**how))))
    names = {"out", "scorer"} | (
        {"negatives"} if how.get("feedback", "contrastive") != "contrastive" else set()
    )
    assert {k: v for k, v in now.items() if k not in names}.items() <= then.items()


@pytest.mark.parametrize(
    "name, says", [("sft", {}), ("sft_independent", {"cross_view": False, "steps": 6000})]
)
def test_the_models_that_come_along_are_those_of_the_defaults(name, says):
    then = json.loads((ROOT / "results" / "objects" / f"{name}_run.json").read_text())
    now = json.loads(json.dumps(asdict(train_sft.Config(**says))))
    how = ("out", "eval_every", "eval_objects")  # what does not change the weights
    assert {k: v for k, v in now.items() if k not in how} == {
        k: v for k, v in then["config"].items() if k not in how
    }
    last = (ROOT / "results" / "objects" / f"{name}.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == now["steps"]
    assert json.loads(last)["val_psnr_unseen"] == then["metrics"]["psnr_unseen"]


def test_nothing_is_left_to_fill_in():
    for path in [*ROOT.glob("*.md"), *(ROOT / "results").glob("*.md"), *(ROOT / "checkpoints").glob("*.md")]:
        assert not re.findall(r"<<.*?>>", path.read_text(), re.S), path


def test_it_is_short():
    assert len(README.split()) <= 1700
