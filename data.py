"""Views of objects: the relative frame, augmentation, folders of pictures, the shipped furniture, splits.

In: toys (toys.py), meshes, folders of renders, or furniture/. Out: uint8 tensors (..., V, 3, size, size) on
white, or such a folder, DIR/<object>/{front,right,back,left,top}.png, the format that all files here share.
The cameras and axes stand in render.py.

    python data.py --meshes DIR --out DIR --size 256   # renders .glb, .gltf, .obj; the same command resumes
    python data.py --toys 100 --seed 3 --out DIR       # writes toys
    python data.py --strip furniture/x.png --out DIR   # packs a folder of renders as furniture/README.md says
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from cache import cached, code, damage, locked
from common import ROOT, InputError, check_at_least, check_output, cli, explained, key_seed, keyed_generator
from common import load_tensors, save_tensors, write_atomic
from meshes import find_meshes, update_mesh
from pictures import Views, load_views, open_image, resize, write_png, write_views
from render import CAMERAS, NUM_SIDES, VIEWS, make_toys
from toys import toy_kind


@dataclass(frozen=True)
class Config:
    meshes: str = ""  # render every .glb, .gltf and .obj file below this folder
    toys: int = 0  # write this many procedural toys
    seed: int = 0  # of the toys: 0 training, 1 preference, 2 validation, 3 held out
    out: str = ""  # folder of renders to write; what the same command made before is kept
    size: int = 256  # pixels of a view
    up: Literal["y", "z"] = "y"  # up axis of the meshes; the front is +Z for y, -Y for z
    strip: str = ""  # pack --out into this PNG, an object a row, their names in a .txt beside it (furniture/)


# --- many views of one object ---


def relative_views(views: Tensor, r: int) -> Tensor:  # (..., V, C, H, W), 0..3 -> the same shape
    """Call side VIEWS[r] the front: the frame is relative, nobody needs to know an object's true front."""
    relative = views.clone()
    relative[..., :NUM_SIDES, :, :, :] = views[..., :NUM_SIDES, :, :, :].roll(-r, dims=-4)
    for v in range(NUM_SIDES, len(VIEWS)):
        # Walking a quarter turn to the right around the object turns its picture from above clockwise, and
        # the one from below the other way: +Y points away from that camera.
        sense = int(CAMERAS[v, 2, 1])
        relative[..., v, :, :, :] = torch.rot90(views[..., v, :, :, :], -r * sense, dims=(-2, -1))
    return relative


# A world mirrored at x = 0, seen in a view that is mirrored back, is the true world seen by another camera.
# (Cameras without that other one fail here: they cannot tell what a mirrored object looks like.)
MIRROR = torch.diag(torch.tensor([-1.0, 1, 1]))
MIRRORED_ORDER = [int((CAMERAS == MIRROR @ c @ MIRROR).all(-1).all(-1).nonzero()) for c in CAMERAS]


def stretch(images: Tensor, factors: Tensor, cameras: Sequence[int] = range(len(VIEWS))) -> Tensor:
    """(R, 3, S, S) in [0, 1], taken by `cameras`, of an object scaled along X, Y, Z by factors up to 1.

    Its views stay views of one object."""
    # A view's columns run along one world axis, its rows along another; a pixel looks up where it came from.
    scale = CAMERAS[list(cameras), :2].abs() @ factors  # (R, 2)
    theta = F.pad(torch.diag_embed(1 / scale), (0, 1))  # (R, 2, 3): no shift
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, places, align_corners=False)  # outside is white


def augment(views: Tensor, generator: torch.Generator) -> Tensor:  # (V, 3, S, S) uint8 -> the same
    """Another object that the cameras could have seen, changed in all views alike.

    The world is mirrored or not, each of its three axes shrinks by a factor of its own, the colour channels
    change places and each gets a gamma of its own. White stays white."""
    coin, order = torch.rand((), generator=generator), torch.randperm(3, generator=generator)
    gamma = torch.exp(torch.rand(3, generator=generator) - 0.5)  # .61 to 1.65
    factors = 0.6 + 0.4 * torch.rand(3, generator=generator)
    image = views.float() / 255
    if coin < 0.5:
        image = image[MIRRORED_ORDER].flip(-1)
    image = stretch(image[:, order] ** gamma.view(3, 1, 1), factors)
    return (image * 255).round().to(torch.uint8)


# --- furniture: real objects that come along (furniture/README.md) ---

FURNITURE_SIZE = 64  # pixels of a view in a strip
LEAST_PIXELS = 40  # an object that covers fewer of the 64 x 64 in some view is too thin to learn from


def write_strip(path: Path, folder: str | Path) -> list[str]:
    """All objects of a folder of renders in one picture, an object a row; their names in a .txt beside it.

    Returns what is left out and why."""
    text = path.with_suffix(".txt")
    if text.exists() != path.exists():  # a strip of ours has both
        alone = path if path.exists() else text
        raise InputError(f"{alone}: is there, and no strip, would be overwritten. Move or delete it.")
    every, views = load_views(folder, FURNITURE_SIZE)
    if wrong := [name for name in every if not name.isprintable()]:  # a line break, or no text at all
        raise InputError(f"{folder}: object {wrong[0]!r}, expected a name of printable text. Rename it.")
    last = [name.split("__")[-1] for name in every]
    rows, dropped = {}, []
    for i, name in enumerate(last if len(set(last)) == len(last) else every):
        row = views[i]
        covered = (row.amin(1) < 0.9 * 255).flatten(1).sum(1).tolist()
        if min(covered) >= LEAST_PIXELS:
            rows[name] = row
        else:
            dropped.append(f"{name}: covers {min(covered)} pixels of {VIEWS[covered.index(min(covered))]}")
            print(f"left out {dropped[-1]}")
    if not rows:
        raise InputError(f"{folder}: no object of {len(every)} covers {LEAST_PIXELS} pixels in every view.")
    write_atomic(text, lambda p: p.write_text("".join(f"{name}\n" for name in rows), "utf-8"))
    write_png(path, rearrange(list(rows.values()), "N V c h w -> c (N h) (V w)"))
    print(f"{path}: {len(rows)} objects, {len(dropped)} left out")
    return dropped


def load_furniture(split: str, size: int) -> tuple[list[str], Tensor]:  # names, (N, V, 3, size, size) uint8
    """One library trains and teaches preferences. The other, by other hands, only validates and tests."""
    library, cut = {
        "preference": ("scopia", slice(0, 120)),
        "train": ("scopia", slice(120, None)),
        "validation": ("blendswap", slice(0, 64)),
        "heldout": ("blendswap", slice(64, None)),
    }[known(split)]
    path = ROOT / "furniture" / f"{library}.png"
    picture, S = open_image(path), FURNITURE_SIZE
    got = f"{picture.shape[2]} x {picture.shape[1]} pixels"
    with explained(f"{path}: {got}, expected {len(VIEWS)} views of {S} of each name in {library}.txt."):
        names = path.with_suffix(".txt").read_text("utf-8").splitlines()
        sizes = {"N": len(names), "V": len(VIEWS), "h": S, "w": S}
        views = rearrange(picture, "c (N h) (V w) -> N V c h w", **sizes)
    # FORK: a library of your own is a strip (--strip) and a row in the table above.
    order = torch.randperm(len(names), generator=keyed_generator(0))[cut].tolist()
    views = torch.stack([torch.stack([resize(view, size, size) for view in views[i]]) for i in order])
    return [names[i] for i in order], views


# --- splits ---

SPLITS = {"train": 0, "preference": 1, "validation": 2, "heldout": 3}  # the seed of make_toys


def known(split: str) -> str:
    """The split, if there is one of that name."""
    if split not in SPLITS:
        raise InputError(f"split {split}: unknown, expected one of {', '.join(SPLITS)}, or of a folder all.")
    return split


def split_of(ids: list, split: str) -> list:
    """The objects of a folder that belong to a split: N of them shuffled once by a fixed key, then cut.

    The first fifth, rounded up (64 at most), validates, the second fifth (200 at most) is held out, and the
    rest both trains and is the preference set, as in the paper (App. B). "all" is all N."""
    if split == "all":
        return ids
    order = torch.randperm(len(ids), generator=keyed_generator(0)).tolist()
    fifth = -(-len(ids) // 5)  # rounded up
    a = min(64, fifth)
    b = a + min(200, fifth)
    part = {"validation": order[:a], "heldout": order[a:b]}.get(known(split), order[b:])
    if not part:
        raise InputError(f"{len(ids)} objects leave none for the {split} split, expected 3 or more objects.")
    return [ids[i] for i in part]


def toy_name(seed: int, i: int) -> str:
    """What object i of a split is called wherever it is written: its number, then its kind."""
    return f"{i:06d}_{toy_kind(key_seed(seed, i))}"


def load_toys(split: str, n: int, size: int) -> Tensor:  # (n, V, 3, size, size) uint8
    """Rendered once. A cache is used only for what it was made for, by the same code."""
    seed = SPLITS[known(split)]

    def make(folder: Path) -> None:
        bar = tqdm(range(0, n, 64), desc=f"{n} {split} toys", leave=False, disable=None)
        parts = [make_toys(min(64, n - i), size, seed, first=i) for i in bar]
        save_tensors(folder / "toys.safetensors", {"views": torch.cat(parts)})

    made_by = {"n": n, "size": size, "seed": seed, "renderer": code("render", "toys")}
    return load_tensors(cached("out/data", f"toys_{split}", made_by, make) / "toys.safetensors")["views"]


def read_split(source: str, split: str, n: int, size: int) -> tuple[list[str], Tensor | Views]:
    """Names and views, (n, V, 3, size, size) uint8, of the first n objects, or fewer, of a split of toys,
    furniture or a folder.

    The four splits of toys, and of furniture, share no object; of a folder, train and preference are one
    (split_of). A folder is left on disk until indexed: 100,000 objects of 512 pixels would be 390 GB."""
    if source == "toys":
        return [toy_name(SPLITS[known(split)], i) for i in range(n)], load_toys(split, n, size)
    if source == "furniture":
        names, views = load_furniture(split, size)
        return names[:n], views[:n]
    folders = split_of(load_views(source, size)[1].folders, split)[:n]
    return [folder.name for folder in folders], Views(folders, size)


def in_memory(views: Tensor | Views) -> Tensor:
    """All of them, read now."""
    bar = tqdm(range(len(views)), desc="read renders", leave=False, disable=None)
    return views if isinstance(views, Tensor) else torch.stack([views[i] for i in bar])


def load_split(source: str, split: str, n: int, size: int) -> Tensor:
    """The views of `read_split`, in memory."""
    return in_memory(read_split(source, split, n, size)[1])


def make_references(objects: Tensor, n: int, seed: int) -> Tensor:  # (N, V, 3, S, S) uint8 -> (n, ...)
    """What preferences are about: n references of N objects of the preference split, view 0 being the
    reference.

    Each shows its object from one of its sides, drawn by (seed, number). If N is below n, objects come again,
    augmented (`augment`)."""
    references = []
    for i in range(n):
        g = keyed_generator(seed, 5, i)
        side, views = int(torch.randint(NUM_SIDES, (), generator=g)), objects[i % len(objects)]
        references.append(relative_views(views if i < len(objects) else augment(views, g), side))
    return torch.stack(references)


# --- command line ---


def check_strangers(out: Path, names: Iterable[str]) -> None:
    """A folder holds what its command makes and nothing else: else old objects would pass for new ones."""
    expected, strange = set(names), []
    for p in sorted(p for p in out.iterdir() if not p.name.startswith(".")):
        ours = p.name in expected and not p.is_symlink() and (p / "made_by.json").is_file()
        if not ours and (p.name in expected or p.is_dir()):
            strange.append(p.name)
    if strange:
        first = f"{out}: {len(strange)} folders in it are not this command's (first: {strange[0]})"
        raise InputError(f"{first}, expected none. Delete them, or take another --out.")


def render_meshes(root: Path, out: Path, size: int, up: str) -> list[str]:
    """Render what is not there yet. Returns what cannot be, and why."""
    meshes = find_meshes(root)
    if not meshes:
        raise InputError(f"--meshes {root}: found no .glb, .gltf or .obj file, expected a folder with some.")
    check_strangers(out, meshes)
    bar = tqdm(meshes.items(), desc="meshes", disable=None)
    skipped = [wrong for name, path in bar if (wrong := update_mesh(out / name, path, size, up))]
    done = len(meshes) - len(skipped)
    links = [p for p in root.rglob("*") if p.is_symlink() and p.is_dir()]
    skipped += [f"{p}: a link to a folder, not followed" for p in links]
    for line in skipped:  # as text on one line, whatever bytes a name is made of
        print("skipped " + " ".join(line.encode(errors="replace").decode().split()))
    if not done:
        raise InputError(f"--meshes {root}: none of {len(meshes)} files could be rendered.")
    print(f"{out}: {done} objects, {len(skipped)} skipped")
    return skipped


def render_toys(out: Path, n: int, seed: int, size: int) -> list[str]:
    """Write the toys that are not there yet. Nothing is left out."""
    names, drawn_by = [toy_name(seed, i) for i in range(n)], code("common", "render", "toys")
    check_strangers(out, names)
    for i, name in enumerate(tqdm(names, desc="toys", disable=None)):
        made_by = {"toy": [seed, i], "size": size, "renderer": drawn_by}
        if damage(out / name, made_by):
            write_views(out / name, make_toys(1, size, seed, first=i)[0], made_by)
    print(f"{out}: {n} toys, {names[0]} to {names[-1]}")
    return []


def main(cfg: Config) -> list[str]:
    """Do the one thing asked for. Returns what was left out, and why."""
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    check_at_least(cfg, 8, "size")
    check_at_least(cfg, 0, "toys", "seed")
    out, strip = Path(cfg.out), Path(cfg.strip)
    if not cfg.out or sum(map(bool, (cfg.meshes, cfg.toys, cfg.strip))) != 1:
        raise InputError("expected --out DIR and one of --meshes DIR, --toys N, --strip PNG. See --help.")
    if cfg.strip:
        check_output("strip", strip, ".png", (cfg.out,))
        if not out.is_dir():  # the lock would make it
            raise InputError(f"--out {out}: no such folder, expected one of renders.")
    with locked(out):  # also to read: another run may be rendering it
        if cfg.strip:
            return write_strip(strip, out)
        for path in out.glob(".*.partial"):  # of a killed run
            shutil.rmtree(path, ignore_errors=True)
        if cfg.meshes:
            return render_meshes(Path(cfg.meshes), out, cfg.size, cfg.up)
        return render_toys(out, cfg.toys, cfg.seed, cfg.size)


if __name__ == "__main__":
    cli(main, Config, __doc__)
