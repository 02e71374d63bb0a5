"""Folders of pictures, DIR/<object>/{front,right,back,left,top}.png: the format that all files here share.

A folder is checked at once and read later. It is written whole, with a note of what it was made by.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from common import InputError, digest, explained, save_json, write_atomic
from render import VIEWS

# --- pictures ---


def open_image(path: str | Path) -> Tensor:  # (3, H, W) uint8
    """Any picture Pillow reads; transparency is composited on white."""
    if not Path(path).is_file():  # a named pipe would be waited for
        raise InputError(f"{path}: no such file, expected a picture.")
    with explained(f"{path}: not readable as a picture. Replace or re-render it."), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)  # phones store a photo lying and a note to turn it
        if image.mode in ("I", "F"):  # 32 bits: only the numbers tell what white is
            low, high = np.asarray(image).min(), np.asarray(image).max()
            if image.mode == "F" or low < 0 or not 255 < high < 2**16:
                raise ValueError(f"grey from {low} to {high}, expected 8 or 16 bits")
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return torch.from_numpy(np.array(Image.alpha_composite(white, image))[..., :3]).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:  # (3, H, W) uint8 -> (3, height, width) uint8
    """Anti-aliased: a plain resize of a large render drops the thin parts."""
    if image.shape[-2:] == (height, width):
        return image
    smooth = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return smooth.round().clamp(0, 255).to(torch.uint8)


def read_image(path: str | Path, size: int) -> Tensor:  # (3, size, size) uint8
    """A user's picture as a reference: padded to a square with white, so that nothing is cut or stretched."""
    image = open_image(path)
    scale = size / max(image.shape[-2:])  # before it is padded: 30000 x 1 would become 30000 x 30000
    image = resize(image, *(max(1, round(n * scale)) for n in image.shape[-2:]))
    y, x = (size - n for n in image.shape[-2:])
    return F.pad(image, (x // 2, x - x // 2, y // 2, y - y // 2), value=255)


def write_png(path: str | Path, image: Tensor) -> None:
    """(3, H, W), uint8 or float in [0, 1]."""
    if image.is_floating_point():
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    write_atomic(path, lambda p: picture.save(p))


# --- folders ---


def write_views(folder: str | Path, views: Tensor, made_by: dict | None = None) -> None:
    """(V, 3, S, S) to folder/{front,right,back,left,top}.png. A new folder appears whole or not at all.

    made_by: what the pictures depend on. It is written beside them with the digest of each, for
    `cache.damage`."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    try:
        for name, view in zip(VIEWS, views, strict=True):
            write_png(partial / f"{name}.png", view)
        if made_by is not None:
            files = {path.name: digest(path) for path in partial.iterdir()}
            save_json(partial / "made_by.json", {**made_by, "files": files})
        with explained(f"{folder}: cannot be written, expected files and room. Delete what is in the way."):
            if folder.exists():
                for path in partial.iterdir():  # if killed between, the digests in the note say so
                    path.replace(folder / path.name)
            else:
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Views:
    """A folder of renders, read when indexed: views[i] is (V, 3, size, size) uint8."""

    def __init__(self, folders: list[Path], size: int) -> None:
        self.folders, self.size = folders, size

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, i: int) -> Tensor:
        images = [open_image(self.folders[i] / f"{view}.png") for view in VIEWS]
        return torch.stack([resize(image, self.size, self.size) for image in images])


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
        if missing := [view for view in VIEWS if not (path / f"{view}.png").is_file()]:
            raise InputError(f"{path}: no {', '.join(missing)}; expected {', '.join(VIEWS)}. {remedy}")
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
    """Changes with the pictures. Of a folder all files are read, which an epoch of training does, too."""
    if isinstance(views, Tensor):
        return digest(views)
    paths = [folder / f"{view}.png" for folder in views.folders for view in VIEWS]
    return digest([views.size, [(p.parent.name, p.name, digest(p)) for p in paths]])
