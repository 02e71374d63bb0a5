"""Plumbing: keyed noise, whole files, the content rule, states, logs, the step of an optimizer, errors in one line."""

import fcntl
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

import cache as K
import common as C
from common import InputError

# --- randomness ---


def test_keyed_generators_differ_by_key_and_by_nothing_else():
    draw = lambda *key: torch.randn(8, generator=C.keyed_generator(*key))  # noqa: E731
    assert torch.equal(draw(1, 2), draw(1, 2))
    others = [draw(2, 1), draw(1), draw(1, 2, 0), draw(1, 3), draw(0, 2), draw(-1, 2)]
    assert not any(torch.equal(draw(1, 2), other) for other in others)  # (2, 1): the order counts
    seeds = {C.key_seed(a, b) for a in range(100) for b in range(100)}
    assert len(seeds) == 10000 and all(0 <= s < 2**63 for s in seeds)
    assert C.key_seed(1, 2) == 6050395267108742785  # results depend on it


# --- files ---


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    C.save_json(tmp_path / "a.json", {"old": 1})

    def breaks(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        C.write_atomic(tmp_path / "a.json", breaks)
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".{os.getpid()}.a.json").symlink_to(tmp_path / "precious")
    C.save_json(tmp_path / "a.json", {"new": 1})
    assert (tmp_path / "precious").read_text() == "mine" and C.load_json(tmp_path / "a.json") == {"new": 1}


def test_written_weights_have_ordinary_permissions(tmp_path):
    C.save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_broken_files_are_input_errors(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="not readable as JSON"):
        C.load_json(tmp_path / "a")
    with pytest.raises(InputError, match="not readable as safetensors"):
        C.load_tensors(tmp_path / "a")


def test_what_is_not_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    for read in (C.load_json, C.load_tensors, C.regular):
        with pytest.raises((InputError, OSError), match="no such file"):
            read(tmp_path / "a")


def test_another_number_in_a_file_of_tensors_is_noticed(tmp_path):
    tensors = {"w": torch.arange(4.0), "n": torch.tensor(3), "half": torch.ones(2).bfloat16()}
    C.save_tensors(tmp_path / "a", tensors)
    assert all(torch.equal(v, tensors[k]) for k, v in C.load_tensors(tmp_path / "a").items())
    turned = torch.arange(6.0).view(2, 3).T  # its numbers do not lie in a row
    C.save_tensors(tmp_path / "b", {"turned": turned})
    assert C.load_tensors(tmp_path / "b")["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="not those that were written"):
        C.load_tensors(tmp_path / "a")


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, suffix, message in (
        ("file/x.json", ".json", "cannot be written"),
        ("n" * 300 + ".json", ".json", "cannot be written"),
        ("file", "", "cannot be written"),
        ("x.txt", ".json", "the name of a .json file"),
        ("read/x.json", ".json", "which is read"),
    ):
        with pytest.raises(InputError, match=f"--out .*{message}"):
            C.check_output("out", tmp_path / path, suffix, [str(tmp_path / "read")])
    C.check_output("out", tmp_path / "new" / "x.json", ".json")
    with pytest.raises(InputError, match="file/a.json: cannot be written. Expected a place"):
        C.save_json(tmp_path / "file" / "a.json", {})
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "new").iterdir())


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path):
    module = torch.nn.Linear(2, 1)
    for tensors, message in (
        ({"weight": torch.zeros(1, 2)}, 'expected the weights of Linear.*Missing key.*"bias"'),
        ({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, "size mismatch for weight"),
        ({"weight": torch.zeros(1, 2), "bias": torch.tensor([torch.nan])}, "bias is not finite"),
        ({"weight": torch.zeros(1, 2), "bias": torch.tensor([1])}, "bias .*expected real numbers"),
    ):
        C.save_tensors(tmp_path / "w", tensors)
        with pytest.raises(InputError, match=message):
            C.load_weights(module, tmp_path / "w")
    C.save_tensors(tmp_path / "w", {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    C.load_weights(module, tmp_path / "w")
    assert module(torch.ones(2)).item() == 3


# --- results by content ---


def test_what_was_found_at_the_start_is_meant_at_the_end(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "one").mkdir()
    found = C.located(tmp_path / "link")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "two")
    assert (
        found == tmp_path / "one" and C.located("checkpoints/objects") == C.ROOT / "checkpoints" / "objects"
    )


def test_digest_tells_contents_apart(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert C.digest(tmp_path / "f") == "ba7816bf8f01cfea"  # SHA-256 of "abc"
    a = torch.arange(4.0)
    assert C.digest(a) == C.digest(a.clone()) != C.digest(a + 1)
    assert C.digest(a.bfloat16()) != C.digest(a)
    assert C.digest({"a": 1, "b": (2,)}) == C.digest({"b": [2], "a": 1}) != C.digest({"a": 2, "b": [2]})

    def one(x):
        return x + 1

    def two(x):
        return x + 2

    def closing(n, start=0):
        return lambda x, y=start: x + y + n

    table = {"a lambda of a dict": lambda x: x}  # has no source of its own
    functions = [one, two, closing(1), closing(2), closing(1, 1), *table.values()]
    functions += [lambda x: x.amin(), lambda x: x.amax()]  # the same but for a name
    functions += [functools.partial(one, 1), functools.partial(one, 2)]
    assert len({C.digest(f) for f in functions}) == len(functions) and C.digest(closing(1)) == C.digest(
        closing(1)
    )
    (tmp_path / "config.json").write_text("{}")
    C.save_tensors(tmp_path / "model.safetensors", {"w": a})
    before = C.digest(tmp_path)
    (tmp_path / "config.json").write_text('{"x": 1}')
    assert C.digest(tmp_path) != before  # the config counts, too
    with pytest.raises(InputError, match="not found"):
        C.digest(tmp_path / "nowhere")


def count(folder: Path) -> None:
    """A stage that says how often it ran."""
    runs = folder.parent / "runs"
    runs.write_text(str(int(runs.read_text() or 0) + 1 if runs.is_file() else 1))
    C.save_json(folder / "result.json", {"run": int(runs.read_text())})


def test_a_result_is_made_once_for_each_content(tmp_path):
    one = K.cached(tmp_path, "x", {"lr": 1}, count)
    assert K.cached(tmp_path, "x", {"lr": 1}, count) == one and (tmp_path / "runs").read_text() == "1"
    other = K.cached(tmp_path, "x", {"lr": 2}, count)
    assert other != one and one.is_dir() and (tmp_path / "runs").read_text() == "2"
    assert (tmp_path / "x").resolve() == other.resolve()  # the link: what was asked for last
    K.cached(tmp_path, "x", {"lr": 1}, count)
    assert (tmp_path / "x").resolve() == one.resolve() and (tmp_path / "runs").read_text() == "2"


@pytest.mark.parametrize("name", ["", "..", "mine", "file/x"])
def test_a_result_takes_nobodys_place(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out .*xpected"):
        K.cached(tmp_path, name, {}, count)


def test_a_link_in_place_of_the_lock_empties_nothing(tmp_path):
    (tmp_path / "precious").write_text("mine")
    folder = K.cached(tmp_path, "x", {}, count)
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="cannot be written"):
        K.cached(tmp_path, "x", {}, count)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_link_of_the_users_is_not_moved(tmp_path):
    for name, target in (("x", "precious"), ("y", "nowhere"), ("z", "z")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(InputError, match="no link to a result"):
            K.cached(tmp_path, name, {}, count)
        assert os.readlink(tmp_path / name) == target
    for made_by in ({}, {"lr": 1}):  # ours is, whatever its name
        folder = K.cached(tmp_path, "c++", made_by, count)
    assert (tmp_path / "c++").resolve() == folder


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "note", "claim", "folder", "link"])
def test_a_damaged_result_is_made_again(tmp_path, damage, capsys):
    folder = K.cached(tmp_path, "x", {}, count)
    lock = (folder / ".lock").stat().st_ino
    file = folder / ("made_by.json" if damage in ("note", "claim") else "result.json")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "link":  # to a folder, which must stay
        (tmp_path / "mine").mkdir()
        file.symlink_to(tmp_path / "mine")
    elif damage != "delete":
        claim = json.dumps({"torch": "1.0", "files": {}}).encode()
        damaged = {"truncate": content[:3], "flip": content, "note": content[:9], "claim": claim}
        file.write_bytes(damaged[damage])
    assert K.cached(tmp_path, "x", {}, count) == folder
    assert (tmp_path / "runs").read_text() == "2" and C.load_json(folder / "result.json") == {"run": 2}
    assert "made again" in capsys.readouterr().out and (damage != "link" or (tmp_path / "mine").is_dir())
    assert (folder / ".lock").stat().st_ino == lock  # another lock would let another run in


def test_a_kill_while_a_damaged_result_is_cleared_leaves_nothing_of_it(tmp_path, monkeypatch):
    folder = K.cached(tmp_path, "x", {}, count)
    (folder / "result.json").write_text("damaged")
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda p, **how: unlink(p, **how) if p.name != "made_by.json" else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        K.cached(tmp_path, "x", {}, count)
    assert not (folder / "result.json").exists()  # the note goes last: what is left does not count as begun


def test_what_a_run_goes_on_from_is_no_part_of_its_result(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        for name in ("weights", C.STATE):
            (folder / name).write_text("x")

    for _ in range(2):
        folder = K.cached(tmp_path, "run", {}, make)
    assert len(made) == 1 and not (folder / C.STATE).exists()


def test_an_unfinished_result_goes_on(tmp_path):
    def make(folder: Path) -> None:
        if (folder / "part").is_file():
            return
        (folder / "part").write_text("half the work")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        K.cached(tmp_path, "x", {}, make)
    folder = K.cached(tmp_path, "x", {}, make)
    assert (folder / "part").read_text() == "half the work" and (folder / "made_by.json").is_file()


def test_two_runs_in_one_folder_at_a_time_are_refused(tmp_path):
    def make(folder: Path) -> None:  # while it runs, another asks for the same
        if not (folder / "made").is_file():
            (folder / "made").touch()
            K.cached(tmp_path, "x", {}, make)

    with pytest.raises(InputError, match="another run writes there"):
        K.cached(tmp_path, "x", {}, make)
    K.cached(tmp_path, "x", {}, make)  # the lock went with the run


# --- loops ---


def test_states_come_back_and_damaged_ones_are_noticed(tmp_path, capsys):
    C.save_state(tmp_path / "state.pt", {"model": {"w": torch.ones(2)}}, step=3)
    state = C.load_state(tmp_path / "state.pt")
    assert state["step"] == 3 and torch.equal(state["model"]["w"], torch.ones(2))
    content = bytearray((tmp_path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "state.pt").write_bytes(content)
    assert C.load_state(tmp_path / "state.pt") == {} and "damaged" in capsys.readouterr().out
    assert C.load_state(tmp_path / "nothing") == {}
    C.save_state(tmp_path / "run-1" / "state.pt", {}, step=3)
    (tmp_path / "run-2").mkdir()
    shutil.copy(tmp_path / "run-1" / "state.pt", tmp_path / "run-2")  # another run's
    assert C.load_state(tmp_path / "run-1" / "state.pt") == {"step": 3}
    assert C.load_state(tmp_path / "run-2" / "state.pt") == {}


def test_the_log_writes_means_and_forgets_what_is_done_again(tmp_path):
    log = C.Log(tmp_path / "log.jsonl", every=2, last=5)
    for step, loss in enumerate([1.0, 3.0, 5.0, 9.0, 7.0]):
        log.add(step, loss=loss)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 7.0}, {"step": 5, "loss": 7.0}]
    log = C.Log(tmp_path / "log.jsonl", every=2, last=9)
    for step in range(3):
        log.add(step, loss=5.0)
    state = json.loads(json.dumps(log.state))
    (tmp_path / "log.jsonl").write_bytes(b"{\n\xff")  # whatever happened to it: the state knows
    again = C.Log(tmp_path / "log.jsonl", 2, 9, state)
    again.add(3, loss=1.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 5.0}, {"step": 4, "loss": 3.0}]


def test_code_counts_without_its_comments_and_as_the_program_started(monkeypatch):
    before = K.code("sample", "model")
    assert before != K.code("model", "sample") and before != K.code("sample")
    said = (
        K.SOURCES["model"]
        .replace("views see all", "views see each other")
        .replace("Read a model", "Reads a model")
    )
    assert said != K.SOURCES["model"]
    monkeypatch.setitem(K.SOURCES, "model", said + "\n\n# a comment\n")
    assert K.code("sample", "model") == before
    monkeypatch.setitem(K.SOURCES, "model", K.SOURCES["model"] + "x = 1\n")
    assert K.code("sample", "model") != before


def test_the_stage_and_the_plumbing_always_count(tmp_path, monkeypatch):
    """Also where made_by does not name them: another make, or another common.py, is another result."""

    def write(folder, what):
        """Once."""
        (folder / "result").write_text(what)

    def write_twice(folder, what):
        """Once."""
        (folder / "result").write_text(2 * what)

    def write_as_said(folder, what):
        """The same in other words."""
        (folder / "result").write_text(what)

    one, same, other = (
        K.cached(tmp_path, "x", {}, functools.partial(f, what="a"))
        for f in (write, write_as_said, write_twice)
    )
    assert C.digest(write) == C.digest(write_as_said) != C.digest(write_twice)
    assert one == same != other and (other / "result").read_text() == "aa"
    monkeypatch.setitem(
        K.SOURCES, "common", K.SOURCES["common"].replace("clip: float = 1.0", "clip: float = 0.1")
    )
    again = functools.partial(K.cached, tmp_path, "x", {}, functools.partial(write, what="a"))
    third = again()
    monkeypatch.setitem(K.SOURCES, "render", K.SOURCES["render"] + "x = 1\n")  # cameras, which all files use
    fourth = again()
    monkeypatch.setattr(torch, "__version__", "0.0")
    (tmp_path / f".{os.getpid()}.x").symlink_to("nowhere")  # of a killed run that had our number
    assert len({one, other, third, fourth, again()}) == 5


FACTOR = 1.0


def test_a_functions_digest_counts_the_constants_it_names(monkeypatch):
    def scaled(x):
        return FACTOR * x

    seen = []
    for value in (1.0, 2.0, 2, "2", torch.ones(2), 1.0):
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", value)
        seen.append(C.digest(scaled))
    assert len(set(seen)) == 5 and seen[0] == seen[-1]


def test_a_models_digest_is_of_its_config_and_its_weights(tmp_path):
    seen = set()
    for config, weight in ((1, 1.0), (2, 1.0), (1, 2.0)):
        C.save_json(tmp_path / "config.json", {"size": config})
        C.save_tensors(tmp_path / "model.safetensors", {"w": torch.tensor([weight])})
        seen.add(C.digest(tmp_path))
    assert len(seen) == 3


def test_a_models_digest_counts_the_vae_of_its_local_base(tmp_path):
    C.save_json(tmp_path / "config.json", {"base": str(tmp_path / "base")})
    C.save_tensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    seen = {C.digest(tmp_path)}  # nothing there: as if it named a hub id
    for content in (b"one", b"two"):
        (tmp_path / "base" / "vae").mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
        seen.add(C.digest(tmp_path))
    C.save_json(tmp_path / "base" / "unet" / "config.json", {"act_fn": "gelu"})  # not in the weights
    assert len({*seen, C.digest(tmp_path)}) == 4


def test_cuda_computes_in_float32(monkeypatch):
    """TF32 has 10 bits of mantissa: log-ratios are differences of small numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for backend in backends:
        backend.allow_tf32 = True
    C.get_device("cuda")
    assert not any(backend.allow_tf32 for backend in backends)


@pytest.mark.parametrize(("flags", "fast"), [("avx2 amx_bf16", True), ("avx2 fma", False)])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(tmp_path, monkeypatch, flags, fast):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(C, "Path", lambda path: tmp_path / Path(path).name)
    modes = [C.use_bf16(mode, torch.device("cpu")) for mode in ("auto", "on", "off")]
    assert modes == [fast, True, False]


def test_steps_save_when_asked_to_stop(monkeypatch):
    saved, seen = [], []
    monkeypatch.setattr(C, "SAVE_SECONDS", 1e9)
    with pytest.raises(KeyboardInterrupt, match="train at step 3"):
        for step in C.training_steps(1, 9, "train", saved.append):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            seen.append(step)
    assert seen == [1, 2] and saved == [3]  # the step under way was finished, then saved
    monkeypatch.setattr(C, "SAVE_SECONDS", 0)
    assert list(C.training_steps(2, 4, "train", saved.append)) == [2, 3] and saved == [3, 3, 4]
    monkeypatch.setattr(C, "SAVE_SECONDS", 100)
    clock = iter(range(0, 5000, 30))  # each look at it is 30 seconds later
    monkeypatch.setattr(C, "time", SimpleNamespace(time=lambda: next(clock)))
    saved.clear()
    assert list(C.training_steps(0, 9, "train", saved.append)) and saved == [4, 8, 9]


def test_a_finished_result_that_another_run_reads_is_waited_for(tmp_path):
    folder = K.cached(tmp_path, "x", {}, count)
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        timer.start()
        assert K.cached(tmp_path, "x", {}, count) == folder
        timer.join()


def test_a_result_says_when_the_tree_had_changes(monkeypatch):
    asked = []
    monkeypatch.setattr(
        C.subprocess, "run", lambda args, **_: asked.extend(args) or SimpleNamespace(stdout="x")
    )
    assert C.provenance(Config((1.0,)))["commit"] == "x" and "--dirty" in asked


def test_optimizer_step_clips_scales_the_rate_and_clears():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.5)
    p.grad = torch.tensor([3.0, 4.0])
    norm = C.optimizer_step([optimizer], [p], rate=0.1, step=0)
    assert norm == pytest.approx(5)
    torch.testing.assert_close(p.detach(), -0.05 * torch.tensor([0.6, 0.8]))  # the gradient cut to length 1
    assert p.grad is None
    p.grad = torch.tensor([0.3, 0.4])
    C.optimizer_step([optimizer], [p], rate=1.0, step=1)  # of the peak, not of the last rate; short ones stay
    torch.testing.assert_close(p.detach(), torch.tensor([-0.03 - 0.15, -0.04 - 0.2]))
    before, p.grad = p.detach().clone(), torch.tensor([3.0, 4.0])
    C.optimizer_step([optimizer], [p], 1.0, step=2, clip=math.inf)
    torch.testing.assert_close(p.detach(), before - 0.5 * torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([torch.nan, 0.0])
    with pytest.raises(InputError, match="step 7: the gradient is nan"):
        C.optimizer_step([optimizer], [p], 1.0, step=7)


# --- the command line ---


@dataclass(frozen=True)
class Config:
    n: tuple[float, ...] = (1.0,)  # numbers
    seed: int = 0  # of nothing
    read: str = ""  # a file
    out: str = "out"  # another
    device: str = "auto"  # which


@pytest.mark.parametrize("said", [{"feedback": "w"}, {"kind": "w"}, {"data": "toys"}])
def test_a_word_that_is_the_name_of_the_output_is_no_path(said, monkeypatch, tmp_path):
    """Otherwise the second run of `--feedback w --out w` would be refused."""
    monkeypatch.chdir(tmp_path)
    kinds = {"feedback": str, "kind": Literal["w", "z"], "data": str, "other": str}
    place = next(iter(said.values()))
    Path(place).mkdir()
    made = make_dataclass("Words", [*kinds.items(), ("out", str)])
    C.check_options(made(**{**dict.fromkeys(kinds, "z"), **said}, out=place))
    with pytest.raises(InputError, match="is --other, too"):
        C.check_options(made(**dict.fromkeys(kinds, "z") | {"other": place}, out=place))


def test_settings_are_all_options_but_those_named_and_where_it_goes():
    assert K.settings(Config(), "read") == {"n": (1.0,), "seed": 0}


@pytest.mark.parametrize("value", [(), (0.0,), (float("nan"),), (float("inf"),), (2.0, -1.0)])
def test_numbers_out_of_range_are_refused(value):
    with pytest.raises(InputError, match="--n"):
        C.check_at_least(Config(value), 1, "n")
    C.check_at_least(Config((1.0, 2.0)), 1, "n")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--n", "x"], "error: .*--n.* --n "),
        (["--m", "1"], "error: .*--m, 1 .*See --help."),
        (["--n", "nan"], "error: --n nan: expected a number below 1000000000"),
        (["--n"], "error: --n: is empty, expected one or more"),
        (["--seed", str(2**63)], "error: --seed 9223372036854775808: expected a number below"),
        (["--read", "there", "--out", "./there"], "error: --out ./there: is --read, too. Expected"),
        (["--read", "there", "--out", "there/x"], "error: --out there/x: lies in --read. Expected"),
        (["--read", "there", "--out", "HERE/there/x"], "error: --out .*/there/x: lies in --read. Expected"),
    ],
)
def test_every_wrong_option_is_one_line(monkeypatch, capsys, tmp_path, args, line):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    monkeypatch.setattr(sys, "argv", ["x.py", *(arg.replace("HERE", str(tmp_path)) for arg in args)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        C.cli(lambda cfg: None, Config, "doc")
    errors = capsys.readouterr().err
    assert stop.value.code and re.match(line, errors) and errors.count("\n") == 1
    Path("link").symlink_to("there")  # a run may read what its link points to, for it moves the link alone
    given = ["--seed", str(2**63 - 1), "--read", "there", "--out", "link"]
    monkeypatch.setattr(sys, "argv", ["x.py", *given])
    assert C.cli(lambda cfg: cfg.seed, Config, "doc") == 2**63 - 1


SCRIPT = """
import os, signal, sys, time
from dataclasses import dataclass, make_dataclass
sys.path.insert(0, {root!r})
import common

@dataclass(frozen=True)
class Config:
    what: str = "x"  # what to do

def main(cfg):
    if cfg.what == "train":
        for step in common.training_steps(0, 10**6, "train", lambda done: print("saved", done, flush=True)):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                print("the step ends", flush=True)
    if cfg.what == "sleep":
        print("ready", flush=True)
        time.sleep(60)
    raise {{"input": common.InputError("no chair:\\n expected one"), "system": OSError(28, "No space left")}}[cfg.what]

common.cli(main, Config, "doc")
"""


def script(tmp_path: Path, *args: str) -> list[str]:
    (tmp_path / "s.py").write_text(SCRIPT.format(root=str(C.ROOT)))
    return [sys.executable, str(tmp_path / "s.py"), *args]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--what", "input"), "error: no chair: expected one"),
        (("--what", "system"), "error: OSError: [Errno 28] No space left"),
        (("--what", ""), "error: --what: is empty, expected one or more."),
        (("--what", "input", "--what=system"), "error: --what is given twice, expected once."),
    ],
)
def test_what_goes_wrong_is_one_line(tmp_path, args, line):
    done = subprocess.run(script(tmp_path, *args), capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, line)
    if "--what=system" not in args:
        assert (
            "Traceback"
            in subprocess.run(script(tmp_path, *args, "--debug"), capture_output=True, text=True).stderr
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_script_says_one_line(tmp_path, number):
    process = subprocess.Popen(script(tmp_path, "--what", "sleep"), stdout=-1, stderr=-1, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors.strip().startswith("stopped") and "\n" not in errors.strip()


def test_help_into_a_closed_pipe_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    run = subprocess.run(script(tmp_path, "--help"), stdout=write, stderr=-1, text=True, env=env)
    os.close(write)
    assert run.returncode and not run.stderr


def test_sigterm_in_a_training_loop_saves_after_the_step(tmp_path):
    done = subprocess.run(script(tmp_path, "--what", "train"), capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout.split("\n") == ["the step ends", "saved 4", ""]


def test_a_partial_is_its_function_and_what_it_was_given():
    one = functools.partial(count, "x", y=1)
    others = [
        functools.partial(*args, y=y)
        for args, y in (((count, "x"), 2), ((count, "z"), 1), ((C.body, "x"), 1))
    ]
    assert C.digest(one) == C.digest(functools.partial(count, "x", y=1)) not in map(C.digest, others)


def test_weights_of_other_tools_are_read(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")  # without what our files say of themselves
    assert torch.equal(C.load_tensors(tmp_path / "w.safetensors")["w"], torch.ones(2))


def test_a_set_is_digested_in_one_order_in_every_process():
    assert C.parts(frozenset("edcba")) == list("abcde")  # its own order changes from process to process


@pytest.mark.parametrize("fast", [True, False])
def test_provenance_says_what_auto_came_to(monkeypatch, fast):
    @dataclass
    class Table:  # no option: its runs take "auto"
        seed: int = 0

    @dataclass
    class Sampler:
        bf16: str = "off"

    monkeypatch.setattr(C, "use_bf16", lambda mode, device: mode == "auto" and fast)
    assert C.provenance(Table())["bf16"] is fast and C.provenance(Sampler())["bf16"] is False
