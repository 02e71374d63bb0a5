"""Folders of pictures, DIR/<object>/{front,right,back,left,top}.png: the format that all files here share.

A folder is checked at once and read later. It is written whole, with a note of what it was made by.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from common import InputError, digest, explained, load_json, save_json, write_atomic
from render import VIEWS

# --- pictures ---


def open_image(path: str | Path) -> Tensor:  # (3, H, W) uint8
    """Any picture Pillow reads; transparency is composited on white."""
    if not Path(path).is_file():  # a named pipe would be waited for
        raise InputError(f"{path}: no such file, expected a picture.")
    with explained(f"{path}: not readable as a picture. Replace or re-render it."), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)  # phones store a photo lying and a note to turn it
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return torch.from_numpy(np.array(Image.alpha_composite(white, image))[..., :3]).permute(2, 0, 1)


def resize(image: Tensor, size: int) -> Tensor:  # (3, H, W) uint8 -> (3, size, size) uint8
    """Anti-aliased: a plain resize of a large render drops the thin parts."""
    if image.shape[-2:] == (size, size):
        return image
    smooth = F.interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True)[0]
    return smooth.round().clamp(0, 255).to(torch.uint8)


def read_image(path: str | Path, size: int) -> Tensor:  # (3, size, size) uint8
    """A user's picture as a reference: padded to a square with white, so that nothing is cut or stretched."""
    image = open_image(path)
    height, width = image.shape[-2:]
    x, y = max(height - width, 0), max(width - height, 0)
    return resize(F.pad(image, (x // 2, x - x // 2, y // 2, y - y // 2), value=255), size)


def write_png(path: str | Path, image: Tensor) -> None:
    """(3, H, W), uint8 or float in [0, 1]."""
    if image.is_floating_point():
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    write_atomic(path, lambda p: picture.save(p))


# --- folders ---


def write_views(folder: str | Path, views: Tensor, made_by: dict | None = None) -> None:
    """(V, 3, S, S) to folder/{front,right,back,left,top}.png. A new folder appears whole or not at all.

    made_by: what the pictures depend on, for `kept`. It is written beside them with the digest of each.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    try:
        for name, view in zip(VIEWS, views, strict=True):
            write_png(partial / f"{name}.png", view)
        if made_by is not None:
            save_json(partial / "made_by.json", {**made_by, "files": picture_digests(partial)})
        if folder.exists():
            for path in partial.iterdir():  # if killed between, the digests in the note say so
                path.replace(folder / path.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def picture_digests(folder: Path) -> dict[str, str]:
    """Of all views of one object."""
    return {view: digest(folder / f"{view}.png") for view in VIEWS}


def kept(folder: Path, made_by: dict) -> bool:
    """Whether the pictures in a folder are whole and were made by just this."""
    try:
        return load_json(folder / "made_by.json") == {**made_by, "files": picture_digests(folder)}
    except InputError:  # nothing there, or not whole
        return False


class Views:
    """A folder of renders, read when indexed: views[i] is (V, 3, size, size) uint8."""

    def __init__(self, folders: list[Path], size: int) -> None:
        self.folders, self.size = folders, size

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, i: int) -> Tensor:
        return torch.stack([resize(open_image(self.folders[i] / f"{v}.png"), self.size) for v in VIEWS])


def load_views(folder: str | Path, size: int) -> tuple[list[str], Views]:
    """Names and views of all objects in a folder of renders, or of the one object whose folder it is."""
    folder, remedy = Path(folder), "Re-render: python data.py --meshes DIR --out DIR"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one of renders. {remedy}")
    objects = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if any((folder / f"{view}.png").is_file() for view in VIEWS):
        objects = [folder]
    if not objects:
        raise InputError(f"{folder}: found no object, expected <object>/{{{','.join(VIEWS)}}}.png. {remedy}")
    for path in objects:  # all of them now, not after an hour of training
        missing = [view for view in VIEWS if not (path / f"{view}.png").is_file()]
        if missing:
            found = ", ".join(view for view in VIEWS if view not in missing) or "no view"
            raise InputError(f"{path}: found {found}; expected {', '.join(missing)} too. {remedy}")
        for view in VIEWS:
            check_png(path / f"{view}.png")
    return [p.name for p in objects], Views(objects, size)


def check_png(path: Path) -> None:
    """Square and whole, from its first and last bytes only."""
    wrong = f"{path}: truncated or not a PNG, expected a whole PNG. Delete its folder and re-render it."
    with explained(wrong), Image.open(path) as image, open(path, "rb") as file:
        width, height = image.size
        file.seek(-12, os.SEEK_END)
        if file.read()[4:8] != b"IEND":
            raise ValueError("its end is missing")
    if width != height:
        raise InputError(f"{path}: {width} x {height} pixels, expected a square. Pad or re-render it.")


def fingerprint(views: Tensor | Views) -> str:
    """Changes with the pictures. Of a folder names, sizes and times count: to read all would take hours."""
    if isinstance(views, Tensor):
        return digest(views)
    paths = [folder / f"{view}.png" for folder in views.folders for view in VIEWS]
    seen = [(p.parent.name, p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return digest([views.size, seen])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time in a folder; the system lets go of the lock when a run is killed."""
    with explained(f"--out {folder}: cannot be written, expected another place."):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # "w" would empty what a link leads to
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{folder}: another run writes there. Wait for it, or take another --out."
            raise InputError(message) from None
        yield
