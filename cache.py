"""One rule for all that is kept: a result is found by the content of what made it.

A stage is a function make(folder), and `made_by`: settings, inputs by their content, code. Equal ones find
the same folder, others make another beside it. So nothing is mixed or stale, and the same command
goes on where it stopped.
"""

import ast
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import ROOT, STATE, InputError, body, digest, explained, hardware, load_json, save_json

SOURCES = {p.stem: p.read_text() for p in ROOT.glob("*.py")}  # as this program started: files may change


@cache
def without_comments(source: str) -> str:
    """What a file does, without comments, docstrings and how it is written."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return digest(ast.dump(tree))


def code(*modules: str) -> str:
    """The digest of files of ours: a result depends on the code that made it."""
    return digest([without_comments(SOURCES[name]) for name in modules])


@contextmanager
def locked(folder: Path, finished: Path | None = None) -> Iterator[None]:
    """One run at a time in a folder. If the file `finished` is there, others only read, and we wait."""
    with explained(f"--out {folder}: cannot be written. Expected another place."):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    try:
        try:
            refuse = 0 if finished and finished.is_file() else fcntl.LOCK_NB
            fcntl.flock(lock, fcntl.LOCK_EX | refuse)  # the system lets go of it when a run is killed
        except BlockingIOError:
            raise InputError(f"{folder}: another run writes there. Wait, or take another --out.") from None
        yield
    finally:
        os.close(lock)


def check_link(link: Path) -> Path:
    """A run moves the link to its result. Refuses what is there and is none: it is the user's."""
    with explained(f"--out {link}: cannot be made. Expected a place to write."):
        ours = link.is_symlink() and re.fullmatch(f"{re.escape(link.name)}-[0-9a-f]{{8}}", os.readlink(link))
        if link.name in ("", "..") or (os.path.lexists(link) and not ours):
            raise InputError(f"--out {link}: is there, and no link to a result. Expected a new name.")
    return link


def cached(root: str | Path, name: str, made_by: dict[str, Any], make: Callable[[Path], object]) -> Path:
    """root/name-<8 digits of made_by>/, filled by make(folder) unless it is complete. Returns the folder.

    `made_by` names inputs by their `digest`, never by their path, and our files by their `code`; the body
    of `make`, common.py, the cameras and torch's version always count. made_by.json is written last, with the
    digest of every file: without it the folder is unfinished and `make` goes on with it; if a file differs
    from it, the folder is made again. The link root/name points to the folder that was asked for last."""
    always = {"torch": torch.__version__, "common": code("common", "render")}  # render: the cameras
    always |= {"make": digest(body(getattr(make, "func", make)))}  # of a partial: its function
    made_by = json.loads(json.dumps({**made_by, **always}, default=str))  # as in the file
    folder = Path(root) / f"{name}-{digest(made_by)[:8]}"
    note, link = folder / "made_by.json", check_link(Path(root) / name)
    with locked(folder, note):
        if note.exists():
            if not (damaged := damage(folder, made_by)):
                print(f"{folder}: made before, reused")
            else:
                print(f"{folder}: {damaged} is missing or damaged, made again")
                for path in sorted(folder.iterdir(), key=lambda p: p == note):  # the note last
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name != ".lock":
                        path.unlink()
        if not note.exists():
            for path in folder.rglob(".[0-9]*.*"):  # what a killed run was writing
                path.unlink()
            make(folder)
            made = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            files = {str(p.relative_to(folder)): digest(p) for p in sorted(made) if p.name != STATE}
            save_json(note, {**made_by, "files": files})
        (folder / STATE).unlink(missing_ok=True)
    new = link.with_name(f".{os.getpid()}.{name}")  # moved in one step: another run may do the same
    new.unlink(missing_ok=True)  # of a killed run of equal number
    new.symlink_to(folder.name)
    new.replace(link)
    return folder


def damage(folder: Path, made_by: dict[str, Any]) -> str:
    """The first file of a finished folder that is not as its note says; empty if there is none."""
    try:
        noted = load_json(folder / "made_by.json")
        wrong = [f for f, d in noted.pop("files").items() if digest(folder / f) != d]
        return (wrong + ["made_by.json"] * (noted != made_by) + [""])[0]
    except (InputError, KeyError, TypeError, AttributeError):
        return "made_by.json"


def machine(cfg: Any) -> dict[str, Any]:
    """What rounding depends on: which kind of device computes, and in which precision."""
    device, bf16 = hardware(cfg)
    return {"on": device.type, "bf16": bf16}


def settings(cfg: Any, *without: str) -> dict[str, Any]:
    """The options of a config that a result depends on: all but those named, and where it goes."""
    return {k: v for k, v in asdict(cfg).items() if k not in (*without, "out", "device")}
