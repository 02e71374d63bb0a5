"""What the documents promise exists: functions, flags, links, help for every option."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro

import mutants
from common import InputError

ROOT = Path(__file__).parent.parent
SCRIPTS = [p.stem for p in ROOT.glob("*.py") if "\nclass Config:" in p.read_text()]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("runs/*.py")]
DOCUMENTS = ["README.md", "PAPER.md", "LOG.md", "results/README.md", "runs/paper.md", "checkpoints/README.md"]


def definitions(path: Path) -> set[str]:
    """Names at top level, and Class.member."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    names.add(f"{node.name}.{member.name}")
                if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    names.add(f"{node.name}.{member.target.id}")
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_function_a_document_names_exists(document):
    found = re.findall(r"`(\w+\.py):([\w.]+)`", (ROOT / document).read_text())
    assert found or document != "PAPER.md"
    missing = [f"{file}:{name}" for file, name in found if name not in definitions(ROOT / file)]
    assert not missing


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d != "LOG.md"]
)  # the log names options that are gone
def test_every_flag_a_document_shows_exists(document):
    text = (ROOT / document).read_text()
    files = [ROOT / f"{s}.py" for s in SCRIPTS] + list((ROOT / "runs").glob("*.py"))
    fields = {f.split(".")[1] for path in files for f in definitions(path) if f.startswith("Config.")}
    flags = set(re.findall(r"--(\w+)", text)) - {"help"}
    assert flags <= fields, flags - fields


@pytest.mark.parametrize("document", [*DOCUMENTS, "results/ablations.md", "furniture/README.md"])
def test_every_file_a_document_links_exists(document):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_help(script, capsys):
    config = importlib.import_module(script).Config
    with pytest.raises(SystemExit) as stop:
        tyro.cli(config, args=["--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    source = (ROOT / f"{script}.py").read_text()
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for node in body.body:
        if isinstance(node, ast.AnnAssign):
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            comment = next(line for line in lines if "#" in line).split("#", 1)[1]
            assert "".join(comment.split()) in shown, f"{script}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_is_read_in_one_sitting(path):
    """At most 500 lines, 80 a function, and 30 options a script."""
    source = path.read_text()
    assert source.count("\n") <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            options = [member for member in node.body if isinstance(member, ast.AnnAssign)]
            assert len(options) <= 30


LEAST = {  # script -> least value -> options
    "bench": {1: "repeats sizes", 2: "groups", 0: "lora"},
    "data": {8: "size", 0: "toys seed"},
    "evaluate": {1: "n seeds num_steps batch_size", 0: "seed"},
    "train_d3po": {
        1: "steps batch_objects batch_size num_references eval_objects rounds",
        2: "num_candidates",
        0: "beta_dpo kl lambda_simple lr lora",
    },
    "train_scorer": {
        1: "steps eval_every backbone_size patch_size hidden_size num_layers num_heads",
        2: "num_references num_val batch_size num_steps",
        0: "lr head_lr weight_decay mismatch",
    },
    "train_sft": {
        1: "steps batch_size warmup eval_every num_objects eval_objects",
        0: "lr muon_lr ema lora image_size",
    },
    "runs.headroom": {1: "n", 2: "num_candidates"},
    "runs.table1": {1: "n", 0: "rates"},
}


@pytest.mark.parametrize("script", LEAST)
def test_numbers_below_their_least_are_refused(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    for least, names in LEAST[script].items():
        for name in names.split():
            wrong = least - (0.5 if least == 0 else 1)
            default = getattr(module.Config, name)
            options = {name: (wrong,) if isinstance(default, tuple) else wrong}
            options |= {"evaluate": {"model": "x"}}.get(script, {})
            with pytest.raises(InputError, match=f"--{name} "):
                module.main(module.Config(**options))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample.py --image nowhere.png", "nowhere.png"),
        ("evaluate.py --images nowhere", "nowhere"),
        ("train_d3po.py --feedback taste", "--feedback taste: unknown, expected one of contrastive"),
    ],
)
def test_wrong_input_is_one_line_on_stderr(command, message):
    environment = {"OMP_NUM_THREADS": "1", "PATH": ""}  # no git either
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("name", ["objects", "objects_independent"])
def test_the_shipped_models_load_and_are_small(name):
    from model import load

    folder = ROOT / "checkpoints" / name
    assert (folder / "model.safetensors").stat().st_size < 10e6
    model = load(folder)
    assert model.cfg.cross_view == ("independent" not in name)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_every_planted_fault_fits():
    """So that tests/mutants.py, which is slow, can be run on any day."""
    assert len(mutants.FAULTS) >= 120 and not mutants.misplaced()
