"""The experiments' scripts, tiny: what is measured, what there is to gain, all through the command line."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Asked, random_model
from matplotlib.axes import Axes

import bench
import cache
from common import InputError, digest, key_seed, load_json
from runs import diagram, headroom, table1, theory_extra
from scorer import small_scorer

ROOT = Path(__file__).parent.parent


def test_bench_counts_and_measures_both_forms(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(bench, "JOB", {"num_references": 8, "num_candidates": 3, "pairs": "all", "steps": 3})
    out = tmp_path / "bench"
    cfg = bench.Config(tiny_folder, groups=(2, 3), repeats=1, bf16="off", device="cpu", out=str(out))
    tables = bench.main(cfg)
    rows = tables["speed"]
    assert [r["network calls"] for r in rows] == [(4, 1), (4, 1), (12, 1), (12, 1), (2, 1), (20, 10)]
    # in rows of the UNet: a pair has 2 x 6 with gradient and 2 x 6 without, ours 5 a state and 1, all with it
    work = [r["GFLOP"][0] / r["GFLOP"][1] for r in rows]
    # a backward of the attention layers costs about a forward: (2 forwards + backward) / (1 + backward) = 3/2
    assert work[:4] == pytest.approx([1.5 * r for r in (12 / 11, 12 / 6, 36 / 16, 36 / 6)], rel=0.05)
    assert all(r["min"] <= r["times faster"] <= r["max"] and 0 < r["share of peak"] < 1 for r in rows)
    assert (out / "speed.md").read_text().count("\n") == 2 + len(rows)
    assert load_json(out / "speed.json")["rows"]
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
    assert rest == pytest.approx([0.94, 0, 1], abs=0.01)  # all candidates share the reference's row
    assert rows["own"]["exponent, peak MB"] > 0.7 and rows["one"]["exponent, peak MB"] < 0.5
    assert (tmp_path / "scaling.png").stat().st_size > 10_000 and (tmp_path / "scaling.md").is_file()
    peak = SimpleNamespace(peak=3e6)
    monkeypatch.setattr(bench, "PeakMemory", lambda: contextlib.nullcontext(peak))
    monkeypatch.setattr(bench, "SWEEPS", {"objects": ("B", (1, 2))})
    assert bench.scaling(cfg, torch.device("cpu"))[0]["peak MB"] == (3, 3)


def test_bench_refuses_forms_that_differ(tiny_folder, monkeypatch):
    original = bench.our_step
    monkeypatch.setattr(bench, "our_step", lambda *args: 1.01 * original(*args))
    with pytest.raises(InputError, match="the loss of the two forms differs"):
        bench.main(bench.Config(tiny_folder, groups=(2,), repeats=1, device="cpu"))
    monkeypatch.setattr(bench, "our_step", lambda p, b, m, half: original(p, b, 1.01 * m, half))
    with pytest.raises(InputError, match="differs by more than 1e-4"):
        bench.main(bench.Config(tiny_folder, groups=(2,), repeats=1, device="cpu"))

    def other_gradient(policy, *rest):
        loss = original(policy, *rest)
        for p in policy.parameters():
            if p.grad is not None:
                p.grad *= 1.01
        return loss

    monkeypatch.setattr(bench, "our_step", other_gradient)
    with pytest.raises(InputError, match="the gradient of the two forms differs"):
        bench.main(bench.Config(tiny_folder, groups=(2,), repeats=1, device="cpu"))


def test_bench_times_each_form_by_itself_and_scales_the_one_it_cut_short(tiny_folder, monkeypatch):
    cpu, took = torch.device("cpu"), iter([5.0, 4.0, 8.0, 100.0, 100.0, 6.0, 2.0])
    monkeypatch.setattr(bench, "seconds_of", lambda run, device: next(took))
    assert bench.peak_flops(cpu, False, 8) == 2 * 8**3 / 4  # multiply and add, in the least time
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e3)
    network, cfg = torch.nn.Module(), bench.Config(tiny_folder, (2, 7), repeats=1, device="cpu")
    network.unet = torch.nn.Linear(4, 2)

    def form(bf16: bool) -> torch.Tensor:
        (loss := network.unet(torch.ones(3, 4)).sum()).backward()
        return loss.detach()

    row = bench.compare(cfg, [network], "", form, form, scale=5)  # the first turn warms up
    assert row["times faster"] == 5 * 6 / 2 and row["seconds"] == (5 * 6, 2)
    assert row["share of peak"] == pytest.approx(1e9 * row["GFLOP"][1] / 2 / 1e3)
    monkeypatch.setattr(bench, "compare", lambda *a, quick=None, scale=1: (a[2].split(",")[0], scale))
    scales = dict(bench.measure(cfg, cpu))
    assert (scales["pair step"], scales["21 pairs of 7"]) == (1, 21 / bench.TIMED_PAIRS)


def test_the_error_of_bfloat16_is_that_of_differences_of_log_ratios(monkeypatch):
    ratios = {("policy", False): [1.0, 3, 8], ("policy", True): [1.0, 4, 8], ("pre", True): [0.0, -2, 1]}
    ratio = lambda p, *a: (torch.tensor([ratios.get((p.name, a[-1]), [0.0] * 3)]), 0)  # noqa: E731
    trained = lambda job: (Path(job.out) / "candidates-0").mkdir() or {"folder": "policy"}  # noqa: E731
    monkeypatch.setattr(bench, "load", lambda name, device: SimpleNamespace(name=name, cfg=None))
    monkeypatch.setattr(bench, "read_rollouts", lambda folder: SimpleNamespace(call=torch.tensor([[4]])))
    monkeypatch.setattr(bench, "make_batch", lambda *_: None)
    monkeypatch.setattr(bench, "Schedule", lambda cfg: None)
    monkeypatch.setattr(bench.D, "main", trained)
    monkeypatch.setattr(bench.D, "batch_means", lambda *_: torch.zeros(1, 1))
    monkeypatch.setattr(bench.D, "step_log_ratio", ratio)
    (row,) = bench.precision(bench.Config("pre"), torch.device("cpu"))
    exact, rounded = torch.tensor([-2.0, -7, -5]), torch.tensor([-3.0, -7, -4])  # all pairs
    assert row["deviation, nats"] == exact.std().item() and row["equal weights"] == 2
    assert row["error of bfloat16"] == pytest.approx((rounded - exact).abs().mean().item())


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


def test_headroom_is_the_best_minus_the_mean_of_each_reference(monkeypatch):
    """Shades stand for pictures, and the darkest is rated best."""
    shades = torch.tensor([[0.2, 0.1, 0.6], [0.9, 0.5, 0.1], [0.4, 0.3, 0.2]])
    truth, seen, splits = torch.arange(3).byte().view(3, 1, 1, 1, 1).expand(3, 5, 3, 4, 4), [], []
    told, how = set(), dict(num_steps=6, bf16="on", seed=7)
    shade = lambda x, *_: x.mean((1, 2, 3, 4))  # noqa: E731

    def draw(model, ref, seeds, call, options, bf16):
        seen.extend(seeds)
        told.add((options.num_steps, options.seed, bf16))
        rows = shades[(ref[:, 0, 0, 0] * 255).round().long()]
        return None, rows.view(-1, 3, 1, 1, 1, 1).expand(-1, 3, 5, 3, 4, 4)

    numbers = lambda x, *_: dict.fromkeys(headroom.METRICS, shade(x).double())  # noqa: E731
    monkeypatch.setattr(headroom, "draw_candidates", draw)
    monkeypatch.setattr(headroom, "measure", numbers)
    monkeypatch.setattr(headroom, "load_split", lambda *asked: splits.append(asked) or truth)
    monkeypatch.setattr(headroom, "load", lambda *_: SimpleNamespace(cfg=SimpleNamespace(image_size=4)))
    monkeypatch.setattr(headroom.Scorer, "load", lambda *_: None)
    monkeypatch.setattr(headroom.D, "check", lambda cfg: None)
    monkeypatch.setitem(headroom.D.FEEDBACKS, "hull", lambda ref, x, y, options: -shade(x))
    cfg = headroom.Config(feedbacks=("hull",), n=3, num_candidates=3, branch_calls=(1,), **how)
    result, gain = headroom.main(cfg), (shades.amin(1) - shades.mean(1)).mean().item()
    for row, spread in zip(result["rows"], result["spread"], strict=True):
        assert all(row[k]["difference"] == pytest.approx(gain) for k in headroom.METRICS)
        assert spread["hull"] == pytest.approx(shades.std(1).mean().item())
    assert seen == [key_seed(7, 8, i) for i in range(3)] * 3  # every design from the same noise
    assert told == {(6, 7, True)}
    assert splits == [("furniture", "validation", 3, 4)]  # held-out objects are for table 1


@pytest.mark.parametrize(
    ("main", "cfg", "message"),
    [
        (bench.main, bench.Config(out="file/x"), "--out file/x"),
        (table1.main, table1.Config(rows=("pre", "nope")), "--rows pre nope: expected pre and"),
        (table1.main, table1.Config(rows=("sft",)), "--rows sft: expected pre and"),
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
        (headroom.main, headroom.Config("MODEL", "toys", "SCORER", branch_calls=(9,)), "--branch_calls .9,."),
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


SCORERS = ("contrastive", "contrastive_pre", "epipolar", "judge")


def test_table_1_on_tiny_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_model(image_size=64, patch=16).save("model")
    for seed, name in enumerate(SCORERS):
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
    monkeypatch.setattr(
        table1, "job", lambda cfg, **options: table1.D.Config(model="model", out=cfg.out, **few, **options)
    )
    monkeypatch.setattr(table1, "make_scorers", lambda cfg: {n: n for n in SCORERS})
    train, runs, after = table1.D.main, [], {1e-4: 1.0, 2e-4: 3.0, 3e-4: 2.0}
    split, draw, splits, drawn, kls = table1.load_split, table1.draw, [], {}, {}

    def spy(cfg):
        runs.append(cfg)
        result = train(cfg)
        last = (Path(result["folder"]) / "log.jsonl").read_text().splitlines()[-1]
        kls[cfg.feedback, cfg.seed] = json.loads(last).get("kl")  # SFT has none
        result["table"]["psnr_unseen"]["after"] = after[cfg.lr]
        return result

    def keep(row, model, seed, *rest):
        drawn[row, seed] = draw(row, model, seed, *rest), rest
        return drawn[row, seed][0]

    monkeypatch.setattr(table1.D, "main", spy)
    monkeypatch.setattr(table1, "load_split", lambda *asked: splits.append(asked) or split(*asked))
    monkeypatch.setattr(table1, "draw", keep)
    five, seeds, picture, shown = table1.draw_candidates, [], table1.grid, []
    monkeypatch.setattr(table1, "draw_candidates", lambda *args: seeds.extend(args[2]) or five(*args))
    monkeypatch.setattr(table1, "grid", lambda *args, **more: shown.append(args[1]) or picture(*args, **more))
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
    assert {*result["rows"]["pre"]} == {*table1.METRICS} - {"lpips_unseen"}  # none is misspelt
    assert {*result["minus"]["random"]} == {"c"} and result["sft_rate"] == 2e-4
    trained = {"noised_random": "random", "c": "contrastive"}
    assert result["kl"] == {row: [kls[name, seed] for seed in (3, 4)] for row, name in trained.items()}
    assert all(v["low"] <= v["mean"] <= v["high"] for row in result["rows"].values() for v in row.values())
    assert splits == [("furniture", "heldout", 4, 64)]
    for row in ("pre", "best"):  # every seed has samples of its own
        assert not torch.equal(drawn[row, 3][0], drawn[row, 4][0])
    truth, scorers, cfg = drawn["best", 3][1]
    other = draw("best", Path("model"), 3, truth, scorers | {"contrastive": "judge"}, cfg)
    assert not torch.equal(other, drawn["best", 3][0])  # another scorer takes others of the five
    assert f"| MV-D3PO-C | {mean('c', 'psnr_unseen'):.2f} [" in Path("r/table.md").read_text()
    assert Path("r/curves.png").stat().st_size > 0 and Path("r/grid.png").stat().st_size > 0
    assert "sft" not in result["minus"]["sft"]
    assert seeds[:8] == [key_seed(seed, i) for seed in (3, 4) for i in range(4)]  # each object has its own
    assert torch.equal(shown[0]["pre-trained"], drawn["pre", 3][0])  # of the first seed


def test_the_best_of_five_is_known_by_all_that_it_depends_on(tmp_path, monkeypatch):
    def ends(root, name, made_by, make):
        raise Asked(digest(made_by))

    def note() -> str:
        with pytest.raises(Asked) as made_by:
            table1.draw("best", tmp_path / "model", 3, truth, {"contrastive": str(tmp_path / "s")}, cfg)
        return str(made_by.value)

    monkeypatch.setattr(table1, "cached", ends)
    random_model().save(tmp_path / "model")
    cfg, truth, found = table1.Config(device="cpu"), torch.zeros(2, 5, 3, 16, 16), set()
    for change in ("", "truth", "scorer", "candidates", "G"):
        torch.manual_seed(change == "scorer")
        small_scorer("bilinear", 16, 8, 32, 1, 2).save(tmp_path / "s")
        truth[1, 0] = change == "truth"
        with monkeypatch.context() as edited:
            edited.setitem(cache.SOURCES, "candidates", f"x = {change == 'candidates'}")
            recipe = {**table1.D.RECIPES["independent"], "num_candidates": 5 + (change == "G")}
            edited.setitem(table1.D.RECIPES, "independent", recipe)
            found.add(note())
    assert len(found) == 5


FEEDBACK = dict(sft="none", noised_random="random", least_noise="least_noise", m="matching")
FEEDBACK |= dict(c_pre="contrastive", c="contrastive", random="random", geometry="geometry")
FEEDBACK |= dict(fresh_random="random", fresh_agreement="agreement", fresh_epipolar="contrastive")
FEEDBACK |= dict(c_epipolar="contrastive", branch_epipolar="contrastive", larger="larger")
NOISED = ("noised_random", "least_noise", "m", "c_pre", "c", "c_epipolar")
FORWARD = dict(
    random="random",
    larger="larger",
    c="contrastive",
    epipolar="contrastive",
    hull="hull",
    lean="lean",
    geometry="geometry",
    colours="colours",
    agreement="agreement",
)
FEEDBACK |= {
    f"{kind}_{name}": feedback for kind in ("forward", "loose") for name, feedback in FORWARD.items()
}


def test_each_row_of_table_1_has_its_feedback_and_its_scorer(monkeypatch):
    told, ran = {"folder": "x", "table": {"psnr_unseen": {"after": 0.0}}}, {}
    assert FEEDBACK.keys() == {name for name, row in table1.ROWS.items() if row.options}
    for row, feedback in FEEDBACK.items():
        monkeypatch.setattr(table1.D, "main", lambda cfg, row=row: ran.update({row: cfg}) or told)
        scorers = {name: name for name in SCORERS}
        table1.train_row(row, 5, scorers, table1.Config())
        ours = "epipolar" if row.endswith("epipolar") else "contrastive"
        scorer = "contrastive_pre" if row == "c_pre" else ours
        assert (ran[row].feedback, ran[row].scorer) == (feedback, scorer), row
        kind = row.split("_")[0]
        assert ran[row].kl == (0.2 if kind == "forward" else 0.05), row
        assert ran[row].loss == ("diffusion_dpo" if kind in ("forward", "loose") else "d3po"), row
        own = {"d3po": "branch", "diffusion_dpo": "independent"}[ran[row].loss]
        assert ran[row].candidates == ("noised" if row in NOISED else own), row
    asked = []
    monkeypatch.setattr(table1.D, "main", lambda cfg: asked.append((cfg.seed, cfg.lr)) or told)
    table1.train_row("sft", 5, {"contrastive": "c"}, table1.Config(seeds=(4, 5), rates=(1e-5, 1e-4)))
    assert asked == [(4, 1e-5), (4, 1e-4), (5, 1e-5)]  # the rate is chosen with the first seed
    judges = {"geometry": "geometry", "hull": "hull", "contrastive": "contrastive", "larger": "covered"}
    own = {row: judges[f] for row, f in FEEDBACK.items() if f in judges} | {"best": "contrastive"}
    own |= {row: "epipolar" for row in FEEDBACK if row.endswith("epipolar")}
    marked = {name: row.own for name, row in table1.ROWS.items() if row.own}
    assert marked == own | {"c_pre": "contrastive_pre"}  # which the table marks


def test_a_control_of_table_1_differs_in_its_feedback_alone():
    rows = {name: row.options for name, row in table1.ROWS.items() if row.options and name != "sft"}
    trained = {row: table1.job(table1.Config(), **changes) for row, changes in rows.items()}
    random = {row for row, cfg in trained.items() if cfg.feedback == "random"}
    controls = {name: row.control for name, row in table1.ROWS.items() if row.control}
    assert controls.keys() == trained.keys() - random
    for row, control in controls.items():
        assert control in random and trained[control] == replace(trained[row], feedback="random"), row


def test_the_scorers_of_table_1_differ_as_their_columns_say(monkeypatch):
    made, plain, job = [], table1.S.Config(), table1.job
    model = job(table1.Config()).model
    monkeypatch.setattr(table1, "job", lambda cfg: job(cfg, num_steps=7, num_references=9))
    monkeypatch.setattr(table1.S, "main", lambda cfg: made.append(cfg) or {"folder": cfg.out})
    folders = table1.make_scorers(table1.Config(out="o"))
    names = dict(contrastive="o/scorer", contrastive_pre="o/scorer_pre", judge="o/scorer_judge")
    assert folders == names | {"epipolar": "o/scorer_epipolar"}
    kinds = [(x.head, x.texture, x.negatives, x.mismatch) for x in made]
    papers, single = ("bilinear", 0.0), "checkpoints/objects_independent"
    told = [(*papers, single, 1), (*papers, model, 1), ("epipolar", 0.3, "", 0.3), (*papers, single, 1)]
    assert kinds == told
    assert {(cfg.num_steps, cfg.num_references) for cfg in made} == {(7, 9)}
    told, usual = ([(x.seed, x.patch_size, x.twins) for x in y] for y in (made, [plain]))
    assert told == [*usual * 3, (1, 16, False)]


def test_table_1_prints_percentages_and_marks_differences_and_own_rewards():
    assert all((factor == 100) == ("%" in heading) for heading, _, factor in table1.METRICS.values())
    above, below, across = ([0.25, 0.125, 0.5], [-0.5, -0.75, -0.25], [0.25, -0.25, 0.5])
    numbers = {"contradiction": above, "hull": below, "contrastive": across}
    rows = {"c": {c: dict(zip(("mean", "low", "high"), v)) for c, v in numbers.items()}}
    plain, signed = (table1.markdown(rows, list(numbers), sign)[2].split(" | ")[1:] for sign in ("", "+"))
    assert plain == ["25.0 [12.5, 50.0]", "-0.500 [-0.750, -0.250]", "0.25 [-0.25, 0.50] * |"]
    assert signed[0] == "**+25.00 [+12.50, +50.00]**" and signed[1].startswith("**-0.5")
    assert signed[2] == "+0.250 [-0.250, +0.500] * |"  # its interval holds 0


def test_the_curves_of_table_1_show_what_rose_and_at_which_kl(monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(a) or plot(self, *a, **k))
    old, new = torch.tensor([[0.25, 0.25], [0.0, 0.5]]), torch.tensor([[0.5, 0.5], [1.0, 0.5]])
    measured = {"pre": {"contradiction": old}, "c": {"contradiction": new}}
    table1.curves(Path("curves.png"), {"c": [4.0, 9.0]}, measured)
    assert drawn == [([2.0, 3.0], [25.0, 50.0], "x")]  # percent, one point a seed
    drawn.clear()  # of Diffusion-DPO also a line, through the means of both weights of the KL
    measured = {
        "pre": {"contradiction": old},
        "forward_c": {"contradiction": old},
        "loose_c": {"contradiction": new},
    }
    table1.curves(Path("curves.png"), {"forward_c": [1.0, 4.0], "loose_c": [4.0, 9.0]}, measured)
    assert [(*x, *rest) for x, *rest in drawn[:2]] == [
        (1.0, 2.0, [0.0, 0.0], "o"),
        (2.0, 3.0, [25.0, 50.0], "s"),
    ]
    assert drawn[2:] == [((1.5, 2.5), (0.0, 37.5), "-")]
    labels = []  # a scorer of ours is a feedback of its own
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: labels.append(k["label"]) or plot(self, *a, **k))
    table1.curves(
        Path("curves.png"),
        {"c": [4.0, 9.0], "c_epipolar": [4.0, 9.0]},
        {"pre": {"contradiction": old}, "c": {"contradiction": new}, "c_epipolar": {"contradiction": new}},
    )
    assert labels == ["contrastive", "epipolar"]
