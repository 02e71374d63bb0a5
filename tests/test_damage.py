"""Damage and change: the next run ends with the weights of one made from nothing, or says one line. Nothing else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_model

import common
import data
import train_d3po as D
import train_scorer as S
import train_sft as T
from common import InputError, load_json
from data import load_toys, make_toys, write_views
from scorer import small_scorer

OBJECTS = [f"object{i}" for i in range(8)]
COMMON = dict(steps=2, batch_size=2, bf16="off")
STAGES = {
    "sft": (T, dict(init="init", data=("renders",), num_objects=4, eval_objects=2, warmup=1, eval_every=2, num_steps=2, out="out/sft")),
    "scorer": (S, dict(data="renders", negatives="init", num_references=2, num_val=2, image_size=16, hidden_size=16, num_layers=1,
                       num_heads=2, twins=False, num_steps=2, out="out/scorer")),
    "d3po": (D, dict(model="init", scorer="judge", data="renders", num_references=3, eval_objects=2, num_steps=3, trained_calls=(0, 1),
                     candidates="branch", num_candidates=2, pairs="all", batch_objects=2, lr=1e-3, out="out")),
}  # fmt: skip
WRITTEN = {
    "sft": ["sft/model.safetensors", "sft/config.json", "sft/made_by.json", "sft/log.jsonl", "sft/results.json", "sft/grid.png"],
    "scorer": ["scorer/model.safetensors", "scorer/config.json", "scorer/made_by.json", "scorer/log.jsonl", "scorer/results.json",
               "negatives/000000.safetensors", "negatives/made_by.json"],
    "d3po": ["d3po_contrastive/model.safetensors", "d3po_contrastive/config.json", "d3po_contrastive/made_by.json",
             "d3po_contrastive/log.jsonl", "d3po_contrastive/report/results.json", "candidates/000000.safetensors", "candidates/made_by.json",
             "rewards_contrastive/rewards.safetensors", "rewards_contrastive/made_by.json", "images/images.safetensors",
             "images/made_by.json"],
}  # fmt: skip


def run(stage: str, **changes) -> bytes:
    """A stage on tiny numbers; its weights."""
    module, tiny = STAGES[stage]
    folder = Path(module.main(module.Config(**{**COMMON, **tiny, **changes}))["folder"])
    results = "report/results.json" if stage == "d3po" else "results.json"
    assert all(load_json(folder / name) for name in (results, "made_by.json", "config.json"))
    return (folder / "model.safetensors").read_bytes()


def anew(stage: str, **changes) -> bytes:
    return run(stage, **changes, out="new" if stage == "d3po" else f"new/{stage}")


def equal_or_refused(stage: str, want) -> None:
    try:
        got = run(stage)
    except InputError as error:
        assert "xpected" in str(error) and "\n" not in str(error)
    else:
        assert got == want()


def damage(path: Path, how: str) -> None:
    content, middle = path.read_bytes(), path.stat().st_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.unlink()
    if how != "delete":
        path.write_bytes({"truncate": content[:middle], "flip": flipped, "empty": b""}[how])


HOW = ["flip", *(pytest.param(how, marks=pytest.mark.slow) for how in ("delete", "truncate", "empty"))]
damages = pytest.mark.parametrize("how", HOW)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A folder in which every stage ran, and the weights of each."""
    root, here = tmp_path_factory.mktemp("made"), os.getcwd()
    os.chdir(root)
    random_model().save("init")
    other_scorer(1)
    for name, views in zip(OBJECTS, make_toys(8, 16, 7)):
        write_views(f"renders/{name}", views)
    found = {stage: run(stage) for stage in STAGES}
    os.chdir(here)
    return root, found


@pytest.fixture
def copy(made, tmp_path, monkeypatch) -> dict[str, bytes]:
    shutil.copytree(made[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(D, "grid", lambda *_: None)  # half of the time
    monkeypatch.setattr(D, "FEEDBACKS", dict(D.FEEDBACKS))
    return made[1]


# --- the real command line: stopped, and twice at once ---


def start() -> subprocess.Popen:
    """The main job on tiny numbers, in a process of its own."""
    tiny = {**COMMON, **STAGES["d3po"][1], "trained_calls": "0 1"}
    options = [word for k, v in tiny.items() for word in (f"--{k}", *str(v).split())]
    script = str(common.ROOT / "train_d3po.py")
    return subprocess.Popen([sys.executable, script, *options], stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["candidates", "rewards", "d3po", "images"])
def test_a_stopped_job_goes_on(copy, stage):
    """SIGTERM as soon as a stage's folder is there: one line, and the same command ends as if nothing had been."""
    shutil.rmtree("out")
    first = start()
    while first.poll() is None and not list(Path().glob(f"out/{stage}*")):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and said.startswith("stopped") and said.count("\n") == 1, said
    second = start()
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert Path("out/d3po_contrastive/model.safetensors").read_bytes() == copy["d3po"]
    assert load_json("out/d3po_contrastive/report/results.json")["table"]


@pytest.mark.slow
def test_two_jobs_at_once(copy):
    """One of them does the work. The other says that it is being done, or finds it done."""
    shutil.rmtree("out")
    both = [start(), start()]
    ends = [(job.communicate(timeout=120)[1], job.returncode) for job in both]
    assert 0 in [code for _, code in ends]
    for said, code in ends:
        assert code == 0 or (code == 1 and "another run writes there" in said and said.count("\n") == 1), said
    assert run("d3po") == copy["d3po"]


# --- damage ---


@damages
@pytest.mark.parametrize(("stage", "file"), [(s, f) for s, files in WRITTEN.items() for f in files])
def test_a_damaged_result_is_made_again(copy, stage, file, how):
    damage(Path("out", file), how)
    assert run(stage) == copy[stage]
    (Path("plain")).write_text("")
    assert {p.stat().st_mode for p in Path("out").rglob("*.*") if p.is_file()} == {
        Path("plain").stat().st_mode
    }


@damages
@pytest.mark.parametrize("file", ["state.pt", "log.jsonl"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_state_starts_again_or_is_refused(copy, made, tmp_path, monkeypatch, stage, file, how):
    def dies(path, *args, **rest):
        common.save_state(path, *args, **rest)
        common.Log(path.with_name("log.jsonl"), 1, 2).line(1, loss=0.0)
        raise KeyboardInterrupt

    folder = Path("out", "d3po_contrastive" if stage == "d3po" else stage).resolve()
    shutil.rmtree(folder)
    monkeypatch.setattr(common, "SAVE_SECONDS", 0)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(STAGES[stage][0], "save_state", dies)
        run(stage)
    damage(folder / file, how)
    equal_or_refused(stage, lambda: copy[stage])
    logs = [(root / folder.relative_to(tmp_path) / "log.jsonl").read_text() for root in (tmp_path, made[0])]
    got, want = ([re.sub(', "seconds".*', "", line) for line in log.splitlines()] for log in logs)
    assert got == want  # a log that was lost or spoilt is written again from the state


@pytest.mark.parametrize("how", ["delete", *HOW[:1], *HOW[2:]])  # a lost part is done again, quickly
@pytest.mark.parametrize(("stage", "part"), [("d3po", "candidates"), ("scorer", "negatives")])
def test_a_damaged_part_of_unfinished_work_is_noticed(copy, stage, part, how):
    file = Path("out", part, "000000.safetensors")
    file.with_name("made_by.json").unlink()
    shutil.copy(file, file.with_name(".12.000000.safetensors"))  # a killed run was at it
    damage(file, how)
    if how != "delete":
        with pytest.raises(InputError, match="000000.safetensors: .*expected a whole file. Delete it"):
            run(stage)
        file.unlink()
    assert run(stage) == copy[stage]
    assert not list(file.parent.glob(".12.*"))


@damages
@pytest.mark.parametrize(("stage", "file"), [
    ("sft", "init/model.safetensors"), ("sft", "init/config.json"), ("sft", "renders/object3/top.png"),
    ("d3po", "judge/model.safetensors"), ("d3po", "judge/config.json"), ("d3po", "renders/object3/top.png"),
])  # fmt: skip
def test_a_damaged_input_is_refused_or_is_another_input(copy, stage, file, how):
    damage(Path(file), how)
    equal_or_refused(stage, lambda: anew(stage))


@pytest.mark.parametrize("how", ["flip", "delete", "truncate", "empty"])
def test_damaged_toys_and_pictures_are_made_again(tmp_path, how):
    toys, cfg = load_toys("train", 2, 8).clone(), data.Config(toys=2, size=8, out=str(tmp_path / "o"))
    for name in ("toys.safetensors", "made_by.json"):
        damage(Path("out/data/toys_train") / name, how)
        assert torch.equal(load_toys("train", 2, 8), toys)
    data.main(cfg)
    files = {p: p.read_bytes() for p in (tmp_path / "o").rglob("*.*")}
    for path in files:
        if path.name == "front.png" or (path.name == "made_by.json" and how != "delete"):
            damage(path, how)
    data.main(cfg)
    assert {p: p.read_bytes() for p in (tmp_path / "o").rglob("*.*")} == files


# --- what depends on a change is made again, the rest is reused ---


def other_model() -> None:
    model = random_model()
    torch.nn.init.normal_(model.unet.class_embedding.weight)
    model.save("init")


def other_scorer(sign: float = -1, **changes) -> None:
    torch.manual_seed(0)
    judge = small_scorer("bilinear", 16, 8, 16, 1, 2)
    judge.linear.weight.data = sign * torch.randn(judge.linear.weight.shape)
    judge.cfg = replace(judge.cfg, **changes)
    judge.save("judge")


def other_picture(split: str) -> None:
    write_views(f"renders/{data.split_of(OBJECTS, split)[0]}", make_toys(1, 16, 9)[0])


def darker(ref, images, truth, cfg):
    return -images.mean((1, 2, 3, 4))


ALL = {"candidates", "rewards_contrastive", "d3po_contrastive", "images"}
CHANGES = {  # stage, a change, options, what is made again
    "model's weights": ("d3po", other_model, {}, ALL),
    "scorer's weights": ("d3po", other_scorer, {}, ALL - {"candidates"}),
    "feedback's code": ("d3po", lambda: D.FEEDBACKS.update(contrastive=darker), {}, ALL - {"candidates"}),
    "d3po's rate": ("d3po", None, {"lr": 2e-3}, {"d3po_contrastive", "images"}),
    "sft's start": ("sft", other_model, {}, {"sft"}),
    "sft's validation picture": ("sft", lambda: other_picture("validation"), {}, {"sft"}),
    "negatives": ("scorer", other_model, {}, {"scorer", "negatives"}),
    "scorer's rate": ("scorer", None, {"lr": 1e-4}, {"scorer"}),
    "precision": ("d3po", None, {"bf16": "on"}, ALL),
    # slow
    "sft's precision": ("sft", None, {"bf16": "on"}, {"sft"}),
    "scorer's precision": ("scorer", None, {"bf16": "on"}, {"scorer", "negatives"}),
    "model's config": ("d3po", lambda: random_model(ref_scale=3.0).save("init"), {}, ALL),
    "scorer's config": ("d3po", lambda: other_scorer(-1, std=(0.5, 0.5, 0.5)), {}, ALL - {"candidates"}),
    "preference picture": ("d3po", lambda: other_picture("preference"), {}, ALL),
    "validation picture": ("d3po", lambda: other_picture("validation"), {}, {"images"}),
    **{name: ("d3po", None, {name: 4}, ALL) for name in ("seed", "num_steps", "num_candidates", "num_references")},
    "sft's rate": ("sft", None, {"lr": 1e-4}, {"sft"}),
    "sft's seed": ("sft", None, {"seed": 1}, {"sft"}),
    "sft's picture": ("sft", lambda: other_picture("train"), {}, {"sft"}),
    "scorer's seed": ("scorer", None, {"seed": 1}, {"scorer", "negatives"}),
    "scorer's picture": ("scorer", lambda: other_picture("validation"), {}, {"scorer", "negatives"}),
}  # fmt: skip


@pytest.mark.parametrize("what", [pytest.param(w, marks=pytest.mark.slow if i > 8 else ()) for i, w in enumerate(CHANGES)])  # fmt: skip
def test_what_depends_on_a_change_is_made_again(copy, what):
    stage, change, options, expected = CHANGES[what]
    before = set(Path("out").glob("*-*"))
    if change:
        change()
    got = run(stage, **options)
    assert {p.name.rsplit("-", 1)[0] for p in set(Path("out").glob("*-*")) - before} == expected
    assert got == anew(stage, **options)


@pytest.mark.slow
def test_the_matchers_file_and_the_backbone_count_by_content(copy, monkeypatch):
    def matching(ref, images, truth, cfg):
        return images.mean((1, 2, 3, 4)) * float(Path(cfg.matcher).read_text())

    monkeypatch.setattr(D, "loftr_model", lambda *_: None)
    D.FEEDBACKS["matching"] = matching
    found = []
    for seed in (1, -1, 1):
        Path("loftr").write_text(str(seed))
        torch.manual_seed(seed % 9)
        small_scorer("bilinear", 16, 8, 16, 1, 2).encoder.save_pretrained("dino")
        found.append(
            (
                run("d3po", feedback="matching", matcher="loftr"),
                run("scorer", backbone="dino", backbone_size=16),
            )
        )
    assert found[0] == found[2] and all(a != b for a, b in zip(*found[:2]))


def test_pictures_of_meshes_follow_the_mesh_and_every_option(tmp_path):
    mesh, seen = tmp_path / "meshes" / "a.obj", []
    mesh.parent.mkdir()
    mesh.write_text("v 0 0 0\nv 1 0 0.5\nv 0 1 0\nf 1 2 3\n")
    for i, changes in enumerate(({}, {"size": 16}, {"up": "z"}, {"size": 8})):
        if i == 3:
            mesh.write_text(mesh.read_text().replace("1 0 0.5", "1 0 2"))
        drawn = []
        for out in ("out", str(i)):
            data.main(
                data.Config(**{"meshes": str(mesh.parent), "size": 8, "out": str(tmp_path / out), **changes})
            )
            drawn.append([p.read_bytes() for p in sorted((tmp_path / out).glob("a/*.png"))])
        assert drawn[0] == drawn[1] and drawn[0] not in seen
        seen.append(drawn[0])
