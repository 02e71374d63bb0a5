"""The experiments' scripts, tiny: what is measured, what there is to gain, all through the command line."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model

import bench
from common import InputError, load_json
from runs import diagram, headroom, table1, theory_extra
from scorer import small_scorer

ROOT = Path(__file__).parent.parent


def test_bench_counts_and_measures_both_forms(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(bench, "JOB", {"num_references": 8, "num_candidates": 3, "min_gap": 0.0, "steps": 3})
    out = tmp_path / "bench"
    cfg = bench.Config(tiny_folder, groups=(2, 3), repeats=1, bf16="off", device="cpu", out=str(out))
    tables = bench.main(cfg)
    rows = tables["table"]
    assert [r["network calls"] for r in rows] == [(4, 1), (4, 1), (12, 1), (12, 1), (2, 1), (20, 10)]
    # in forwards of one object: 2 with gradient (3 each) and 2 without, against 1 with it for each state
    work = [r["GFLOP"][0] / r["GFLOP"][1] for r in rows]
    assert work[:4] == pytest.approx([8 / 6, 8 / 3, 24 / 9, 24 / 3], rel=0.05)
    assert all(r["min"] <= r["times faster"] <= r["max"] and 0 < r["share of peak"] < 1 for r in rows)
    assert (out / "table.md").read_text().count("\n") == 2 + len(rows)
    assert load_json(out / "table.json")["rows"]
    # bfloat16: no log-ratio at equal weights; otherwise an error, and a small one
    assert 2 <= len(tables["bf16"]) <= 5
    for row in tables["bf16"]:
        assert row["equal weights"] == 0 < row["error of bfloat16"] < row["deviation, nats"]


def test_bench_scales_as_its_operations_do(tiny_folder, tmp_path, monkeypatch):
    sweeps = {
        "views": ("V", (2, 8)),
        "pixels": ("S", (16, 64)),
        "own": ("RG", (1, 16)),
        "one": ("G", (1, 16)),
    }
    monkeypatch.setattr(bench, "SWEEPS", sweeps | {"objects": ("B", (1, 16))})
    cfg = bench.Config(tiny_folder, scaling=True, repeats=1, bf16="off", device="cpu", out=str(tmp_path))
    rows = {r["against"]: r for r in bench.main(cfg)["scaling"]}
    views, pixels, *rest = (r["exponent, GFLOP"] for r in rows.values())
    assert 0.7 < views < 2 < pixels < 4  # a reference is a view, too; attention is quadratic in tokens
    assert rest == pytest.approx([1, 0, 1], abs=0.01)
    assert rows["own"]["exponent, peak MB"] > 0.7 and rows["one"]["exponent, peak MB"] < 0.5
    assert (tmp_path / "scaling.png").stat().st_size > 10_000 and (tmp_path / "scaling.md").is_file()


def test_bench_refuses_forms_that_differ(tiny_folder, monkeypatch):
    original = bench.our_step
    monkeypatch.setattr(bench, "our_step", lambda *args: 1.01 * original(*args))
    with pytest.raises(InputError, match="the loss of the two forms differs"):
        bench.main(bench.Config(tiny_folder, groups=(2,), repeats=1, device="cpu"))
    monkeypatch.setattr(bench, "our_step", lambda p, b, m, half: original(p, b, 1.01 * m, half))
    with pytest.raises(InputError, match="differs by more than 1e-4"):
        bench.main(bench.Config(tiny_folder, groups=(2,), repeats=1, device="cpu"))


@pytest.mark.parametrize("cross_view", [True])
@torch.no_grad()
def test_the_published_reference_attention_is_ours_in_two_passes(cross_view):
    model = random_model(cross_view=cross_view)
    g = torch.Generator().manual_seed(0)
    x, ref = torch.randn(2, 5, 48, 4, 4, generator=g), torch.randn(2, 48, 4, 4, generator=g)
    t = torch.tensor([300, 700])
    want = model(x, t, ref)
    torch.testing.assert_close(bench.TwoPass(model)(x, t, ref), want, rtol=0, atol=1e-5)
    assert torch.equal(model(x, t, ref), want)  # and the layers are left as they were


def test_headroom_finds_the_better_candidates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model(image_size=64, patch=16).save("model")
    scorer = small_scorer("bilinear", 64, 16, 32, 1, 2)
    torch.nn.init.normal_(scorer.linear.weight)
    scorer.save("scorer")
    cfg = headroom.Config(
        "model", "toys", "scorer", ("contrastive", "hull"), 3, 3, 4, (1,), bf16="off", out="h"
    )
    result = headroom.main(cfg)
    designs = ["noised references (App. B)", "independent samples", "branch at call 1"]
    assert [r["candidates"] for r in result["rows"]] == [d for d in designs for _ in range(2)]
    for row in result["rows"]:  # by its own measure the best is never below the mean
        assert row[row["feedback"]]["difference"] >= 0
    assert (
        all(s["contrastive"] > 0 for s in result["spread"]) and "branch at call 1" in Path("h.md").read_text()
    )


@pytest.mark.parametrize(
    ("main", "cfg", "message"),
    [
        (bench.main, bench.Config(out="file/x"), "--out file/x"),
        (table1.main, table1.Config(rows=("pre", "nope")), "--rows nope"),
        (table1.main, table1.Config(rows=("sft",)), "--rows pre"),
        (table1.main, table1.Config(results="file/x"), "--results file/x"),
        (
            headroom.main,
            headroom.Config("MODEL", "toys", "SCORER", feedbacks=("taste",)),
            "--feedbacks taste",
        ),
        (
            headroom.main,
            headroom.Config("MODEL", "toys", "SCORER", feedbacks=("least_noise",)),
            "--feedbacks least",
        ),
        (
            headroom.main,
            headroom.Config("MODEL", "toys", "SCORER", out="own"),
            "--out own: exists, and is none",
        ),
        (table1.main, table1.Config(seeds=(0, 0)), "--seeds 0, 0"),
        (diagram.main, diagram.Config(out="file"), "--out file: expected the name of a .svg"),
        (headroom.main, headroom.Config("MODEL", "toys", "SCORER", branch_calls=(9,)), "--trained_calls 9 9"),
        (headroom.main, headroom.Config("MODEL", "toys", "SCORER", out="file/x"), "--out file/x"),
        (theory_extra.main, theory_extra.Config(out="file/x"), "--out file/x"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(tiny_folder, tmp_path, monkeypatch, main, cfg, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("own.md").write_text("mine")
    small_scorer("bilinear", 16, 8, 32, 1, 2).save("scorer")
    for name, path in (("model", tiny_folder), ("scorer", "scorer")):
        if getattr(cfg, name, "") == name.upper():
            cfg = replace(cfg, **{name: path})
    with pytest.raises(InputError, match=message):
        main(cfg)
    assert Path("file").read_text() == "mine"


@pytest.mark.slow
def test_every_script_runs_through_the_command_line(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    first, again = (
        subprocess.run(["bash", "runs/small.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr[-2000:]
    assert again.returncode == 0 and "negatives: 100%" not in again.stderr and "reused" in again.stdout


def test_table_1_on_tiny_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model(image_size=64, patch=16).save("model")
    for seed, name in enumerate(("contrastive", "contrastive_pre", "judge")):
        torch.manual_seed(seed)
        scorer = small_scorer("bilinear", 64, 16, 32, 1, 2)
        torch.nn.init.normal_(scorer.linear.weight)
        scorer.save(name)
    few = dict(
        num_references=4,
        eval_objects=2,
        num_steps=3,
        trained_calls=(0, 1),
        steps=2,
        batch_objects=2,
        bf16="off",
    )
    monkeypatch.setattr(table1, "base_config", lambda cfg: table1.D.Config(model="model", out=cfg.out, **few))
    monkeypatch.setattr(
        table1, "make_scorers", lambda cfg: {n: n for n in ("contrastive", "contrastive_pre", "judge")}
    )
    train, runs, after = table1.D.main, [], {1e-4: 1.0, 2e-4: 3.0, 3e-4: 2.0}

    def spy(cfg):
        runs.append(cfg)
        result = train(cfg)
        result["table"]["psnr_unseen"]["after"] = after[cfg.lr]
        return result

    monkeypatch.setattr(table1.D, "main", spy)
    rows = ("pre", "sft", "noised_random", "c", "best", "truth")
    result = table1.main(
        table1.Config(seeds=(3, 4), rows=rows, rates=tuple(after), n=4, out="o", results="r")
    )
    mean = lambda row, name: result["rows"][row][name]["mean"]  # noqa: E731
    sft = [(cfg.seed, cfg.lr, cfg.eval_objects) for cfg in runs if cfg.feedback == "none"]
    # the rate is chosen with the first seed on all validation objects, then kept
    assert sft[:3] == [(3, rate, 2) for rate in after] and sft[3] == (3, 2e-4, 2) and sft[-1] == (4, 2e-4, 2)
    assert {cfg.scorer for cfg in runs if cfg.feedback == "contrastive"} == {"contrastive"}
    assert mean("truth", "psnr_unseen") > 58 and mean("truth", "hull") > 0.9
    assert mean("pre", "grey_levels") == 0 < min(mean(row, "grey_levels") for row in rows if row != "pre")
    assert mean("best", "contrastive") > mean("pre", "contrastive")
    for base, other in (("pre", "pre"), ("sft", "sft"), ("random", "noised_random")):
        found = result["minus"][base]["c"]["contrastive"]["mean"]
        assert found == pytest.approx(mean("c", "contrastive") - mean(other, "contrastive"), abs=1e-6)
    assert {*result["minus"]["random"]} == {"c"} and {row: len(kl) for row, kl in result["kl"].items()} == {
        "noised_random": 2,
        "c": 2,
    }
    assert f"| MV-D3PO-C | {mean('c', 'psnr_unseen'):.2f} [" in Path("r/table.md").read_text()
    assert Path("r/curves.png").stat().st_size > 0 and Path("r/grid.png").stat().st_size > 0


def test_the_rows_of_table_1_are_the_recipes_of_the_command_line():
    """A row changes a config that its own feedback has filled: what it does not name would be another row's."""
    told = ("feedback", "loss", "candidates", "num_candidates", "beta_dpo", "min_gap")
    for row, (_, changes) in table1.ROWS.items():
        if changes and row not in ("sft", "noised_random"):
            made = replace(table1.base_config(table1.Config()), **changes)
            plain = table1.D.Config(feedback=made.feedback, loss=made.loss)
            assert [getattr(made, name) for name in told] == [getattr(plain, name) for name in told], row
