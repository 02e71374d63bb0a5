"""Cameras, relative frame, toys, meshes, folders, furniture: known points, colours, mistakes."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial

import data
import meshes
import pictures
from cache import damage
from cache import code
from common import ROOT, InputError, key_seed, keyed_generator, load_json, save_json
from metrics import hull_iou
from render import LIGHT, project, render_primitives
from runs import diagram
from toys import KINDS, ball, box, make_toy, pack, reach, rotation, toy_kind, tube

torch.set_num_threads(1)
SHOWN = ROOT / "results" / "method.svg"
SIZE = 32
SHADE = 0.7 + 0.3 * data.CAMERAS[:, 2] @ LIGHT  # of a face that looks into the camera


@pytest.fixture(scope="module")
def toys() -> torch.Tensor:
    return data.make_toys(20, SIZE, seed=7)  # more than one batch of the renderer


def mask(images: torch.Tensor) -> torch.Tensor:  # (..., 3, H, W) -> (..., H, W)
    return images.amin(-3) < 0.9 * 255


def centre(view: torch.Tensor) -> torch.Tensor:  # (3, S, S) -> (column, row) of the middle of what is drawn
    rows, columns = mask(view).nonzero().float().add(0.5).unbind(1)
    return torch.stack([columns.mean(), rows.mean()])


def test_toys_are_kept_by_split_number_and_size(tmp_path):
    for split, n, size in (("train", 2, 16), ("train", 2, 24), ("train", 3, 16), ("heldout", 2, 16)):
        kept = data.load_toys(split, n, size)
        assert torch.equal(kept, data.make_toys(n, size, data.SPLITS[split]))


def test_known_point_lands_where_projection_says():
    point = (0.3, -0.5, 0.7)  # all different and signed: a swapped or mirrored axis moves it
    small = pack([ball(point, (0.06, 0.06, 0.06), (0.0, 0.0, 0.0))])
    views = render_primitives([small], 64, antialias=4)[0]
    pixel, depth = project(torch.tensor(point), 64)
    assert torch.allclose(torch.stack([centre(view) for view in views]), pixel, atol=0.3)
    # By hand: in the right view the camera stands on +X and sees -Z on its right.
    assert pixel[1].tolist() == pytest.approx([(-0.7 * 0.5 + 0.5) * 64, (0.5 * 0.5 + 0.5) * 64], abs=1e-4)
    assert depth.tolist() == pytest.approx([0.7, 0.3, -0.7, -0.3, -0.5])


def test_silhouettes_of_opposite_sides_are_mirrored_and_rows_are_shared(toys):
    m = mask(toys)
    for side in (0, 1):
        assert (m[:, side] ^ m[:, side + 2].flip(-1)).float().mean() < 1e-3
    rows = m[:, :4].any(-1)
    assert (rows ^ rows[:, :1]).float().mean() < 5e-3
    assert (m[:, 0] ^ m[:, 1]).float().mean() > 0.01  # and the two pairs do differ


@pytest.mark.parametrize("r", range(4))
def test_relative_views_equal_the_turned_object(r):
    parts = pack(make_toy(key_seed(7, 3)))
    plain = render_primitives([parts], SIZE)[0]
    turn = rotation("y", -90.0 * r)  # side r comes to the front, the light comes along
    turned = {**parts, "center": parts["center"] @ turn.T, "turn": turn @ parts["turn"]}
    expected = render_primitives([turned], SIZE, light=turn @ LIGHT)[0]
    difference = (data.relative_views(plain, r).float() - expected.float()).abs()
    assert (difference > 3).float().mean() < 5e-3  # rounding moves a few pixels on edges
    if r:
        assert ((plain.float() - expected.float()).abs() > 3).float().mean() > 0.02


def test_an_object_depends_on_its_number_alone(toys):
    assert torch.equal(render_primitives([pack(make_toy(key_seed(7, 3)))], SIZE)[0], toys[3])
    for first, n in ((0, 5), (4, 3), (17, 3)):
        assert torch.equal(data.make_toys(n, SIZE, seed=7, first=first), toys[first : first + n])


def test_splits_of_a_folder_are_disjoint_and_fixed(tmp_path):
    for i in range(10):
        data.write_views(tmp_path / f"{i:02d}", torch.full((5, 3, 8, 8), i, dtype=torch.uint8))
    parts = {s: {int(x[0, 0, 0, 0]) for x in data.load_split(str(tmp_path), s, 99, 8)} for s in data.SPLITS}
    assert parts["train"] == parts["preference"]
    assert parts["train"] | parts["validation"] | parts["heldout"] == set(range(10))
    assert sum(len(parts[s]) for s in ("train", "validation", "heldout")) == 10


def test_sizes_of_a_folders_splits():
    for n, sizes in ((3, (1, 1, 1)), (8, (2, 2, 4)), (1000, (64, 200, 736))):
        ids = [str(i) for i in range(n)]
        assert tuple(len(data.split_of(ids, s)) for s in ("validation", "heldout", "train")) == sizes
    with pytest.raises(InputError, match="2 objects leave none for the train split, expected 3 or more"):
        data.split_of(["a", "b"], "train")


def test_a_cache_is_used_only_for_what_made_it(tmp_path, monkeypatch):
    made, make = [], data.make_toys
    monkeypatch.setattr(data, "make_toys", lambda *a, **k: made.append(1) or make(*a, **k))
    truth = make(5, 16, data.SPLITS["validation"])
    load = lambda n: data.load_split("toys", "validation", n, 16)  # noqa: E731
    for n in (3, 2, 5, 3):  # fewer or more objects are other files; the last was made before
        assert torch.equal(load(n), truth[:n])
    assert len(made) == 3
    note = load_json(next(Path("out/data").glob("toys_validation-*/made_by.json")))
    assert note["renderer"] == code("render", "toys")
    for file in Path("out/data").glob("*/toys.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))  # damaged
    assert torch.equal(load(3), truth[:3]) and len(made) == 4
    monkeypatch.setattr(data, "code", lambda *names: names)
    assert torch.equal(load(3), truth[:3]) and len(made) == 5
    assert not torch.equal(data.load_split("toys", "train", 3, 16), truth[:3])
    many = data.load_split("toys", "validation", 66, 8)  # more than one batch, other pixels
    assert torch.equal(many, make(66, 8, data.SPLITS["validation"]))


def test_pictures_are_known_by_the_code_that_drew_them(tmp_path):
    data.main(data.Config(toys=1, size=8, out=str(tmp_path)))
    (note,) = tmp_path.glob("*/made_by.json")
    assert load_json(note)["renderer"] == code("common", "render", "toys")
    assert meshes.mesh_made_by(note, [], 8, "y")["renderer"] == code("render", "meshes")


@pytest.mark.parametrize("source", ["toys", "furniture", "folder"])
def test_names_and_lazy_reading_agree_with_the_split(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the furniture is found from anywhere
    if source == "folder":
        source = str(tmp_path / "folder")
        for i in range(6):
            data.write_views(Path(source) / f"{i}", torch.full((5, 3, 8, 8), i, dtype=torch.uint8))
    for split in data.SPLITS:
        names, lazy = data.read_split(source, split, 2, 8)
        views = data.load_split(source, split, 2, 8)
        assert len(names) == len(views) == 2 and torch.equal(torch.stack(list(lazy)), views)
        if source == "toys":
            assert names == [data.toy_name(data.SPLITS[split], i) for i in range(2)]
        if source not in ("toys", "furniture"):
            assert [int(v.amax()) for v in views] == [int(name) for name in names]
    with pytest.raises(
        InputError,
        match="split test: unknown, expected one of train, preference, validation, heldout, or of a folder all",
    ):
        data.load_split(source, "test", 2, 8)


def test_references_show_a_side_drawn_by_their_number_and_come_again_changed(tmp_path, toys, monkeypatch):
    for i in range(10):
        data.write_views(tmp_path / f"{i}", toys[i])
    objects = data.load_split(str(tmp_path), "preference", 99, SIZE)  # 6 of them
    references = data.make_references(objects, 8, 3)
    turned = [[data.relative_views(views, r) for r in range(4)] for views in objects]
    shown = [[torch.equal(references[i], view) for view in turned[i % 6]] for i in range(8)]
    assert all(map(any, shown[:6])) and len({tuple(sides) for sides in shown[:6]}) > 1
    assert not any(map(any, shown[6:]))
    assert not torch.equal(references, data.make_references(objects, 8, 4))
    changes = set()
    sides = [torch.randint(4, (), generator=data.keyed_generator(3, 5, i)) for i in range(40)]
    expected = [data.relative_views(objects[i % 6], int(side)) for i, side in enumerate(sides)]
    with monkeypatch.context() as plain:  # object 0 is reference 0, 6, 12...: from other sides
        plain.setattr(data, "augment", lambda views, g: views)
        assert torch.equal(data.make_references(objects, 40, 3), torch.stack(expected))
    spy = lambda views, g: changes.add(torch.rand((), generator=g).item()) or views  # noqa: E731
    monkeypatch.setattr(data, "augment", spy)
    for seed in (3, 4):
        data.make_references(objects, 8, seed)
    assert len(changes) == 4  # two of each seed, all others


def test_splits_share_no_object():
    assert len(set(data.SPLITS.values())) == 4
    objects = [data.make_toys(8, 16, s).flatten(1) for s in data.SPLITS.values()]
    assert len(torch.cat(objects).unique(dim=0)) == 32


def test_antialiasing_averages_sub_pixels():
    fine = data.make_toys(2, 48, seed=7, antialias=1).float()
    for factor in (2, 3):
        mean = torch.nn.functional.avg_pool2d(fine.flatten(0, 2), factor).view(2, 5, 3, 48 // factor, -1)
        coarse = data.make_toys(2, 48 // factor, seed=7, antialias=factor).float()
        assert (coarse - mean).abs().max() <= 1  # rounding


def test_background_is_exactly_white_and_objects_are_large(toys):
    for corner in (toys[..., :1, :], toys[..., -1:, :], toys[..., :, :1], toys[..., :, -1:]):
        assert (corner == 255).all()
    extent = torch.stack([mask(toys).any(-1).sum(-1), mask(toys).any(-2).sum(-1)]).amax((0, 2))
    assert (extent >= 0.75 * SIZE).all()


SHAPES = {"ball": ball, "box": box, "tube": tube, "cone": lambda *a, **m: tube(*a, taper=0.2, **m)}


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouette_is_the_shadow_of_the_body(shape):
    body = pack([SHAPES[shape]((0.1, 0.0, -0.1), (0.3, 0.6, 0.2), (1.0, 0.0, 0.0), turn=("z", 35))])
    drawn = mask(render_primitives([body], SIZE)[0])
    p = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    e, m, k = body["quadric"][0]
    p = p[p[:, 0] ** 2 + p[:, 2] ** 2 + e * p[:, 1] ** 2 <= (m + k * p[:, 1]) ** 2]
    pixel, _ = project((p * body["half"]) @ body["turn"][0].T + body["center"], SIZE)
    for v in range(5):
        shadow = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        shadow[pixel[v, :, 1].long(), pixel[v, :, 0].long()] = True
        assert (drawn[v] & ~shadow).sum() <= 2  # it holds every pixel touched, the mask those well covered
        assert (shadow & ~drawn[v]).sum() <= 0.25 * shadow.sum()


def test_shade_stripes_and_what_hides_what():
    def middle(*parts: dict) -> torch.Tensor:  # (V, 3) colours in the middle, light taken out
        image = render_primitives([pack(list(parts))], 33)[0, :, :, 16, 16]
        return image / 255 / SHADE[:, None]

    half, red, blue = (0.5, 0.5, 0.5), (0.8, 0.2, 0.2), (0.2, 0.2, 0.8)
    for shape in (ball, box, tube):
        assert torch.allclose(middle(shape((0, 0, 0), half, red)), torch.tensor(red).expand(5, 3), atol=0.02)
    seen = middle(box((0, 0, 0), half, red, color2=blue, bands=(0, 3, 0)))
    stripes = torch.tensor([blue] * 4 + [red])  # the middle one; the end from above
    assert torch.allclose(seen, stripes, atol=0.02)
    seen = middle(box((0, 0, 0), half, red), ball((0, 0, 0.5), (0.2, 0.2, 0.2), blue))
    assert torch.allclose(seen, torch.tensor([blue, red, red, red, red]), atol=0.02)


def test_every_kind_fits_the_frame_and_is_drawn():
    seeds = range(len(KINDS))
    assert len({toy_kind(s) for s in seeds}) == len(KINDS) >= 8
    for s in seeds:
        p = pack(make_toy(s))
        assert (p["center"].abs().amax(0) < 0.9).all() and len(p["center"]) >= 3


def test_reach_of_a_turned_body_is_where_it_ends():
    points = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1])] * 3)
    for shape, surface in ((ball, torch.nn.functional.normalize(points, dim=-1)), (box, corners)):
        body = pack([shape((0.1, 0.2, 0.3), (0.3, 0.6, 0.2), (1.0, 0.0, 0.0), turn=("z", 35))])
        farthest = ((surface * body["half"]) @ body["turn"][0].T).abs().amax(0)
        assert torch.allclose(reach(body)[0], farthest, atol=1e-3), shape


def test_the_toys_are_those_that_the_shipped_models_saw():
    """Means of 24 toys' views. checkpoints/objects learned these: after a change, train it anew."""
    means = data.make_toys(24, 16, 0).double().mean((0, 2, 3, 4)).tolist()
    assert means == pytest.approx([202.673, 198.960, 194.977, 193.583, 200.635], abs=0.01)


# --- augmentation ---


def draws(seed: int) -> tuple[bool, list[int], torch.Tensor, torch.Tensor]:
    """What `augment` draws: mirrored, order of the channels, their gammas, factors of X, Y, Z."""
    g = torch.Generator().manual_seed(seed)
    coin, order = torch.rand((), generator=g), torch.randperm(3, generator=g)
    gamma = torch.exp(torch.rand(3, generator=g) - 0.5)
    return bool(coin < 0.5), order.tolist(), gamma, 0.6 + 0.4 * torch.rand(3, generator=g)


def augment(views: torch.Tensor, seed: int) -> torch.Tensor:
    return data.augment(views, torch.Generator().manual_seed(seed))


SEEDS = range(8)


def test_a_point_of_a_changed_object_lands_where_it_should():
    point = torch.tensor([0.5, -0.3, 0.7])
    ball_there = pack([ball(point.tolist(), (0.08, 0.08, 0.08), (0.0, 0.0, 0.0))])
    views = render_primitives([ball_there], 64)[0]
    for seed in SEEDS:
        mirrored, _, _, shrink = draws(seed)
        pixel, _ = project(point * shrink * torch.tensor([-1.0 if mirrored else 1.0, 1, 1]), 64)
        changed = torch.stack([centre(view) for view in augment(views, seed)])
        assert torch.allclose(changed, pixel, atol=0.5), seed


def test_a_mirrored_object_has_its_right_side_on_its_left():
    assert {draws(seed)[0] for seed in SEEDS} == {True, False}
    red, blue = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    parts = pack([box((0.4, 0, 0), (0.4, 0.7, 0.7), red), box((-0.4, 0, 0), (0.4, 0.7, 0.7), blue)])
    views = render_primitives([parts], SIZE)[0]
    for seed in SEEDS:
        mirrored, order, _, _ = draws(seed)
        changed = augment(views, seed)[:, torch.tensor(order).argsort()]  # channels back in place
        middle = changed[:, :, SIZE // 2, SIZE // 2].float()
        right, left = middle[1], middle[3]
        assert (right[2] > right[0]) == mirrored and (left[0] > left[2]) == mirrored


def test_silhouettes_of_a_changed_object_still_agree(toys):
    changed = torch.stack([augment(toys[i], seed) for i, seed in enumerate(SEEDS)])
    mixed = changed.clone()
    mixed[:, 4] = toys[: len(SEEDS), 4]  # the top without the change
    before, after, wrong = (hull_iou(views / 255) for views in (toys[: len(SEEDS)], changed, mixed))
    assert min(before.min(), after.min()) > 0.99 > wrong.max()


def test_colours_change_place_and_gamma_and_white_stays_white():
    white = torch.full((5, 3, 16, 16), 255, dtype=torch.uint8)
    flat = torch.tensor([10, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(5, 3, 16, 16)
    for seed in SEEDS:
        assert torch.equal(augment(white, seed), white)
        _, order, gamma, _ = draws(seed)
        expected = (torch.tensor([10.0, 100, 200])[order] / 255) ** gamma * 255
        assert torch.allclose(augment(flat, seed)[:, :, 8, 8].float(), expected.expand(5, 3), atol=0.51)
    assert min(float(draws(s)[3].min()) for s in range(99)) < 0.62  # and the draws do reach their ends


def test_the_same_generator_gives_the_same_and_the_input_is_kept(toys):
    before, g = toys[0].clone(), torch.Generator().manual_seed(1)
    first, second = data.augment(toys[0], g), data.augment(toys[0], g)  # it moves on
    assert torch.equal(augment(toys[0], 1), first) and not torch.equal(first, second)
    assert torch.equal(toys[0], before)


SIX_VIEWS = """
import torch, data
from pathlib import Path
from common import key_seed
from meshes import render_mesh
from render import LIGHT, render_primitives
from toys import make_toy, pack, rotation
torch.set_num_threads(1)
mask = lambda x: x.amin(-3) < 0.9 * 255
assert data.VIEWS[5] == "bottom" and data.MIRRORED_ORDER == [0, 3, 2, 1, 4, 5]
parts = pack(make_toy(key_seed(7, 3)))
plain = render_primitives([parts], 32)[0]
assert plain.shape == (6, 3, 32, 32) == data.make_toys(1, 32, 0)[0].shape
for r in range(4):
    turn = rotation("y", -90.0 * r)
    turned = {**parts, "center": parts["center"] @ turn.T, "turn": turn @ parts["turn"]}
    expected = render_primitives([turned], 32, light=turn @ LIGHT)[0]
    wrong = ((data.relative_views(plain, r).float() - expected.float()).abs() > 3).float().mean((1, 2, 3))
    assert wrong.max() < 0.02, (r, wrong)
for seed in range(6):
    changed = data.augment(plain, torch.Generator().manual_seed(seed))
    both, one = mask(changed[5]), mask(changed[4]).flip(0)
    assert (both ^ one).sum() < 0.1 * (both & one).sum(), (both ^ one).sum()
    assert (changed[5] != changed[4].flip(1)).float().mean() > 0.02
open("a.obj", "w").write("v 0 0 0\\nv 1 0 1\\nv 0 1 1\\nf 1 2 3\\n")
views = render_mesh(Path("a.obj"), 16)[0]
assert views.shape == (6, 3, 16, 16) and mask(views[5]).any()
data.write_views("out/a", views)
assert torch.equal(data.load_views("out", 16)[1][0], views)
"""


def test_a_sixth_view_is_a_name_and_a_camera(tmp_path):
    for name in ("common", "cache", "toys", "render", "pictures", "meshes", "data"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = (tmp_path / "render.py").read_text()
    six = code.replace('"left", "top")', '"left", "top", "bottom")')
    six = six.replace("[0, 1, 0]],\n    ],", "[0, 1, 0]], [[1, 0, 0], [0, 0, 1], [0, -1, 0]]],")
    assert len(six) > len(code) + 30
    (tmp_path / "render.py").write_text(six)
    done = subprocess.run([sys.executable, "-c", SIX_VIEWS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- meshes ---

RED, GREEN, BLUE, YELLOW = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)


def textured_box(**material) -> trimesh.Trimesh:
    """12 triangles; every side that a camera sees (and the floor) carries RED GREEN / BLUE YELLOW upright."""
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])  # (right, up)
    floor = torch.tensor([[[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]])
    axes = torch.cat([data.CAMERAS, floor])
    vertices = torch.cat([corners @ a[:2] + a[2] for a in axes])
    faces = torch.cat([torch.tensor([[0, 1, 2], [0, 2, 3]]) + 4 * i for i in range(6)])
    picture = np.array([[RED + (255,), GREEN + (255,)], [BLUE + (255,), YELLOW + (0,)]], np.uint8)
    surface = PBRMaterial(baseColorTexture=Image.fromarray(picture), **material)
    visual = trimesh.visual.TextureVisuals(uv=((corners + 1) / 2).repeat(6, 1).numpy(), material=surface)
    return trimesh.Trimesh(vertices.numpy(), faces.numpy(), visual=visual, process=False)


def render_mesh(path: Path, size: int = SIZE, up: str = "y") -> torch.Tensor:
    return meshes.render_mesh(path, size, up)[0]


def quarters(view: torch.Tensor) -> torch.Tensor:  # (3, S, S) -> (2, 2, 3), in the middle of each quarter
    S = view.shape[-1]
    return view[:, [S // 4, 3 * S // 4]][:, :, [S // 4, 3 * S // 4]].permute(1, 2, 0).float()


@pytest.mark.parametrize("kind", ["glb", "obj", "wide", "tiled"])
def test_textured_box_has_the_right_colours_at_the_right_places(kind, tmp_path):
    path = tmp_path / ("box.obj" if kind == "obj" else "box.glb")
    mesh = textured_box(baseColorFactor=[0.5, 0.5, 0.5, 1.0])
    if kind != "obj":
        material, uv = mesh.visual.material, mesh.visual.uv
        if kind == "wide":
            material.baseColorTexture = material.baseColorTexture.resize((8, 2), Image.Resampling.NEAREST)
        uv += [1, -2] if kind == "tiled" else [0, 0]  # a texture repeats
        mesh.export(path)
    else:
        Image.fromarray(np.array([[RED, GREEN], [BLUE, YELLOW]], np.uint8)).save(tmp_path / "t.png")
        material = "newmtl m\nKd 0 0 0\nmap_Kd t.png\n"  # Kd beside a texture is ignored
        (tmp_path / "m.mtl").write_text(material)
        lines = ["mtllib m.mtl", *("v {} {} {}".format(*v) for v in mesh.vertices)]
        lines += [*("vt {} {}".format(*t) for t in mesh.visual.uv), "usemtl m"]
        lines += ["f " + " ".join(f"{i + 1}/{i + 1}" for i in f) for f in mesh.faces]
        path.write_text("\n".join(lines))
    views = render_mesh(path, SIZE)
    factor = 1.0 if kind == "obj" else 1.055 * 0.5 ** (1 / 2.4) - 0.055  # a linear factor, an sRGB texture
    for v in range(5):
        expected = torch.tensor([[RED, GREEN], [BLUE, YELLOW]]) * factor * SHADE[v]
        assert torch.allclose(quarters(views[v]), expected, atol=2), data.VIEWS[v]
    extent = mask(views).any(-1).sum(-1)
    assert (extent == 30).all()  # 0.9 * 32 = 28.8, centred: 28 whole pixels and two partly covered


def test_a_file_may_be_named_in_capitals(tmp_path):
    textured_box(baseColorFactor=[0.5, 0.5, 0.5, 1.0]).export(tmp_path / "box.glb")
    shutil.copy(tmp_path / "box.glb", tmp_path / "LOUD.GLB")
    assert torch.equal(render_mesh(tmp_path / "box.glb"), render_mesh(tmp_path / "LOUD.GLB"))


def test_a_texture_may_be_higher_than_wide(tmp_path):
    mesh = textured_box()
    bands = np.array([[RED], [GREEN], [BLUE], [YELLOW]], np.uint8)
    mesh.visual.material.baseColorTexture = Image.fromarray(bands)
    mesh.export(tmp_path / "bands.glb")
    seen = render_mesh(tmp_path / "bands.glb")[0, :, [5, 12, 19, 26], SIZE // 2].T
    assert torch.allclose(seen.float(), torch.tensor([RED, GREEN, BLUE, YELLOW]) * SHADE[0], atol=2)


def test_triangles_drawn_a_few_at_a_time_are_all_drawn(tmp_path, monkeypatch):
    textured_box().export(tmp_path / "box.glb")
    whole = render_mesh(tmp_path / "box.glb")
    monkeypatch.setattr(meshes, "BLOCK", 1000)
    assert torch.equal(render_mesh(tmp_path / "box.glb"), whole)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_colours_of_corners_are_shares_of_their_types_largest(kind):
    full = np.iinfo(kind).max if kind != np.float32 else 1
    material = SimpleNamespace(baseColorTexture=None, baseColorFactor=None, alphaCutoff=None, alphaMode=None)
    visual = SimpleNamespace(
        material=material, uv=None, vertex_attributes={"color": np.full((3, 4), full, kind)}
    )
    mesh = SimpleNamespace(visual=visual, faces=np.array([[0, 1, 2]]), vertices=np.zeros((3, 3)))
    assert torch.allclose(meshes.read_surface(mesh, True)[0], torch.ones(1, 3, 4))


def test_a_mesh_is_centred_and_what_is_no_surface_is_passed_over(tmp_path):
    box = textured_box()
    trimesh.Scene([box]).export(tmp_path / "box.glb")
    moved = box.copy().apply_transform(trimesh.transformations.scale_and_translate(3, [5, -7, 2]))
    points = trimesh.PointCloud([[9.0, 9, 9]])
    trimesh.Scene([moved, points]).export(tmp_path / "moved.glb")
    assert torch.equal(render_mesh(tmp_path / "box.glb"), render_mesh(tmp_path / "moved.glb"))


def test_a_part_is_turned_as_its_node_says(tmp_path):
    turn = trimesh.transformations.rotation_matrix(
        1.0, [1, 0.3, 0.2], [0.5, 0, 0]
    )  # its inverse looks otherwise
    cone = trimesh.creation.cone(0.3, 1)
    trimesh.Scene([cone.copy().apply_transform(turn)]).export(tmp_path / "turned.glb")
    scene = trimesh.Scene()
    scene.add_geometry(cone, transform=turn)
    scene.export(tmp_path / "node.glb")
    difference = (render_mesh(tmp_path / "turned.glb").int() - render_mesh(tmp_path / "node.glb").int()).abs()
    assert difference.float().mean() < 0.5


def test_of_surfaces_that_cross_each_is_seen_where_it_is_in_front(tmp_path):
    wall = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    slope = trimesh.Trimesh(wall.vertices + wall.vertices[:, :1] * [0, 0, 1], wall.faces)  # z = x
    for mesh, color in ((wall, RED), (slope, BLUE)):
        mesh.visual.vertex_colors = [*color, 255]
    trimesh.Scene([wall, slope]).export(tmp_path / "crossing.glb")
    front = render_mesh(tmp_path / "crossing.glb")[0]
    left, right = (mask(front) & (torch.arange(SIZE) < n) for n in (SIZE // 2 - 1, SIZE))
    right = right & (torch.arange(SIZE) > SIZE // 2)
    assert (front[0] > front[2])[left].all() and (front[2] > front[0])[right].all()
    assert left.sum() > 200 < right.sum()


def test_alpha_is_tested_before_depth(tmp_path):
    textured_box(alphaMode="MASK").export(tmp_path / "mask.glb")
    front = quarters(render_mesh(tmp_path / "mask.glb")[0])
    # Through the hole one sees the inside of the back, whose lower left quarter is on our lower right.
    assert torch.allclose(front[1, 1], torch.tensor(BLUE) * SHADE[0], atol=2)


def test_a_mask_cuts_at_the_cutoff_of_its_file(tmp_path):
    for cutoff in (0.6, 0.9):
        mesh = textured_box(alphaMode="MASK", alphaCutoff=cutoff)
        mesh.visual.material.baseColorTexture = Image.new("RGBA", (2, 2), RED + (200,))  # alpha 0.78
        mesh.export(tmp_path / f"{cutoff}.glb")
    assert mask(render_mesh(tmp_path / "0.6.glb")).any()
    mesh.visual.material.alphaCutoff = 0.0  # which is not "none given"
    mesh.visual.material.baseColorTexture = Image.new("RGBA", (2, 2), RED + (9,))
    mesh.export(tmp_path / "0.glb")
    assert torch.equal(mask(render_mesh(tmp_path / "0.glb")), mask(render_mesh(tmp_path / "0.6.glb")))
    with pytest.raises(InputError, match="nothing of it is seen"):
        render_mesh(tmp_path / "0.9.glb")


def test_srgb_of_linear_light_undoes_what_a_screen_does():
    levels = torch.arange(256) / 255
    light = torch.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    assert torch.allclose(meshes.to_srgb(light), levels, atol=1e-4)


@pytest.mark.parametrize("old, new", [(b"\x89PNG", b"\x89XXX"), (b'Factor":[1.0', b'Factor":[NaN')])
def test_a_broken_texture_or_colour_inside_a_glb_is_noticed(old, new, tmp_path):
    textured_box(baseColorFactor=[1.0, 0.0, 0.0, 1.0]).export(tmp_path / "box.glb")
    content = (tmp_path / "box.glb").read_bytes()
    assert content.count(old) == 1
    (tmp_path / "box.glb").write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match="box.glb: cannot be drawn.*a texture or colour"):
        render_mesh(tmp_path / "box.glb")


def test_parts_keep_their_textures_and_their_transparency(tmp_path):
    scene = trimesh.Scene()
    parts = ((-3, RED + (0,), 3, "OPAQUE"), (0, GREEN + (0,), 1, "MASK"), (3, BLUE + (255,), 2, "MASK"))
    for x, color, size, mode in parts:
        mesh = textured_box(alphaMode=mode)
        mesh.visual.material.baseColorTexture = Image.new("RGBA", (size, size), color)
        scene.add_geometry(mesh, transform=trimesh.transformations.translation_matrix((x, 0, 0)))
    scene.export(tmp_path / "parts.glb")
    row = render_mesh(tmp_path / "parts.glb")[0, :, SIZE // 2, [5, 16, 26]].T.float()
    expected = torch.tensor([RED, (255 / SHADE[0],) * 3, BLUE]) * SHADE[0]
    assert torch.allclose(row, expected, atol=2)


def test_half_transparent_surface_mixes_with_what_is_behind(tmp_path):
    corners = [[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]
    mesh = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)
    surface = PBRMaterial(baseColorFactor=[1.0, 0.0, 0.0, 0.5], alphaMode="BLEND")
    mesh.visual = trimesh.visual.TextureVisuals(uv=np.zeros((4, 2)), material=surface)
    mesh.export(tmp_path / "glass.glb")
    front = quarters(render_mesh(tmp_path / "glass.glb")[0])
    expected = (torch.tensor([255.0, 0, 0]) * SHADE[0] + 255) / 2
    assert torch.allclose(front, expected.expand(2, 2, 3), atol=2)


def test_vertex_colours_and_up_axis(tmp_path):
    mesh = textured_box()
    mesh.vertices = mesh.vertices * [1, 1, 2]  # tall along Z
    color = np.full((24, 4), 255, np.uint8)
    color[mesh.vertices[:, 2] > 0] = (255, 55, 55, 255)  # 55 / 255 linear is 0.502 in sRGB
    mesh.visual = trimesh.visual.ColorVisuals(vertex_colors=color)
    mesh.export(tmp_path / "colour.glb")
    views = render_mesh(tmp_path / "colour.glb", up="z")
    above = views[4, :, SIZE // 2, SIZE // 2] / SHADE[4]
    assert torch.allclose(above, torch.tensor([255.0, 128, 128]), atol=3)
    for v in range(4):  # tall, and redder above
        assert mask(views[v]).any(-1).sum() > 1.8 * mask(views[v]).any(0).sum()
        assert views[v, 1, SIZE // 5, SIZE // 2] + 45 < views[v, 1, -SIZE // 5, SIZE // 2]


@pytest.mark.parametrize("material", [True, False])
def test_colours_of_16_bits_are_those_of_8(tmp_path, material):
    box = trimesh.creation.box((2, 2, 2))
    box.visual.vertex_colors = np.tile(np.array([255, 128, 0, 255], np.uint8), (8, 1))
    for name, content in box.export(file_type="gltf").items():
        (tmp_path / name).write_bytes(content)
    scene, colours = load_json(tmp_path / "model.gltf"), tmp_path / "gltf_buffer_2.bin"
    if material:
        scene["materials"], scene["meshes"][0]["primitives"][0]["material"] = [{}], 0
    save_json(tmp_path / "model.gltf", scene)
    of_8 = render_mesh(tmp_path / "model.gltf")
    wide = np.frombuffer(colours.read_bytes(), np.uint8).astype(np.uint16) * 257
    wide[wide == 128 * 257] -= 100  # its last eight bits alone would pass for those of 8
    colours.write_bytes(wide.tobytes())
    scene["accessors"][2] |= {"componentType": 5123, "max": [65535] * 4, "min": [0] * 4}  # unsigned short
    scene["buffers"][2]["byteLength"] = scene["bufferViews"][2]["byteLength"] = 64
    save_json(tmp_path / "model.gltf", scene)
    assert (render_mesh(tmp_path / "model.gltf").float() - of_8.float()).abs().max() <= 1
    assert len(of_8.unique()) > 3


def test_front_of_a_z_up_mesh_is_minus_y(tmp_path):
    mesh = trimesh.creation.box((2, 2, 2))
    mesh.visual.face_colors = [RED + (255,) if n[1] < -0.5 else BLUE + (255,) for n in mesh.face_normals]
    mesh.export(tmp_path / "z.glb")
    front = render_mesh(tmp_path / "z.glb", up="z")[:, :, SIZE // 2, SIZE // 2]
    assert front[0, 0] > 100 and (front[1:, 0] < 100).all()


def test_fine_texture_is_averaged_and_does_not_sparkle(tmp_path):
    mesh = textured_box()
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    mesh.visual.material.baseColorTexture = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    mesh.export(tmp_path / "fine.glb")
    front = render_mesh(tmp_path / "fine.glb")[0, 0, 4:-4, 4:-4].float()
    assert (front - 127.5 * SHADE[0]).abs().max() < 4


def test_smooth_mesh_equals_the_analytic_ball(tmp_path):
    mesh = trimesh.creation.icosphere(3)
    mesh.visual.vertex_colors = np.tile(np.array([255, 0, 0, 255], np.uint8), (len(mesh.vertices), 1))
    mesh.export(tmp_path / "ball.glb")
    analytic = render_primitives([pack([ball((0, 0, 0), (0.9, 0.9, 0.9), (1.0, 0.0, 0.0))])], SIZE)[0]
    difference = (render_mesh(tmp_path / "ball.glb").float() - analytic.float()).abs()
    assert (difference > 3).float().mean() < 0.03  # the outline
    assert difference[:, 0, 8:-8, 8:-8].mean() < 0.5  # flat faces would give 1.06


FACE = "f 1/1 2/2 3/3\n"
UV = "vt 0 0\nvt 1 0\nvt 0 1\n"
TRIANGLE = "v 0 0 0\nv 1 0 0.5\nv 0 1 0.5\n"


def write_obj(path: Path, color: tuple = RED, shape: str = TRIANGLE + UV) -> Path:
    """A triangle with a material and a texture of one colour beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), color).save(path.with_suffix(".jpg"), quality=95)
    path.with_suffix(".mtl").write_text(f"newmtl m\nKd 1 1 1\nmap_Kd {path.stem}.jpg\n")
    path.write_text(f"mtllib {path.stem}.mtl\n{shape}usemtl m\n{FACE}")
    return path


def test_tr_of_a_material_is_the_rest_of_d(tmp_path):
    drawn = []
    for line in ("", "d 0.25", "Tr 0.75"):
        path = write_obj(tmp_path / "a.obj")
        path.with_suffix(".mtl").write_text(f"newmtl m\nKd 1 0 0\n{line}\n")
        drawn.append(render_mesh(path))
    assert torch.equal(drawn[1], drawn[2]) and (drawn[1].float().mean() > drawn[0].float().mean() + 1)


def test_a_lost_mtl_is_said(tmp_path, capsys):
    whole, lost = write_obj(tmp_path / "whole.obj"), write_obj(tmp_path / "lost.obj")
    lost.with_suffix(".mtl").unlink()
    for _ in ("made", "kept"):
        assert [meshes.update_mesh(tmp_path / path.stem, path, 16, "y") for path in (whole, lost)] == ["", ""]
        said = capsys.readouterr().out
        assert re.fullmatch(".*lost.obj: 'lost.mtl' is missing, its parts are grey\n", said)


def pictures_of(folder: Path) -> dict[str, bytes]:
    """Every picture below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}


def test_folder_resumes_and_lists_bad_files(tmp_path, capsys):
    found, out = tmp_path / "meshes", tmp_path / "out"
    write_obj(found / "good.obj")
    write_obj(found / "deep" / "other.obj")
    (found / "bad.glb").write_bytes(b"not a mesh")
    (found / "point.obj").write_text("v 0 0 0\n")
    (found / "elsewhere").symlink_to(tmp_path)
    cfg = data.Config(meshes=str(found), out=str(out), size=16)
    assert len(data.main(cfg)) == 3
    printed = capsys.readouterr().out.splitlines()
    expected = ("skipped .*bad.glb: ", "skipped .*point.obj: ", "skipped .*elsewhere: a link", ".*: 2 obj")
    assert len(printed) == 4 and all(map(re.match, expected, printed))
    assert data.load_views(out, 16)[0] == ["deep__other", "good"]

    before = (out / "good" / "top.png").stat().st_mtime_ns
    (out / "deep__other" / "left.png").unlink()  # an incomplete object is made again, a complete one is kept
    data.main(cfg)
    assert (out / "good" / "top.png").stat().st_mtime_ns == before
    assert len(data.load_views(out, 16)[0]) == 2

    (out / "good" / "top.png").unlink()
    (out / "good" / "top.png").mkdir()
    with pytest.raises(InputError, match="good: cannot be written, expected"):  # the mesh is not to blame
        data.main(cfg)
    (out / "good" / "top.png").rmdir()
    (found / "good.obj").write_text("now bad")  # what it showed before does not pass for it
    data.main(cfg)
    assert data.load_views(out, 16)[0] == ["deep__other"]
    (out / "deep__other" / "notes.txt").write_text("a user's")  # is not ours to delete
    (found / "deep" / "other.obj").write_text("now bad")
    with pytest.raises(InputError, match="none of 4 files could be rendered"):
        data.main(cfg)
    assert [p.name for p in (out / "deep__other").iterdir()] == ["notes.txt"]
    (found / "good.obj").unlink()
    (found / "deep" / "other.obj").unlink()
    with pytest.raises(InputError, match="1 folders in it are not this command's .first: deep__other"):
        data.main(cfg)
    shutil.rmtree(out)
    with pytest.raises(InputError, match="none of 2 files could be rendered"):
        data.main(cfg)
    assert capsys.readouterr().out.count("bad.glb: ") == 4


def spoil(path: Path) -> None:  # its end stays whole
    path.write_bytes(path.read_bytes()[:-30] + bytes(30))


CHANGES = {
    "size": {"size": 24},
    "up": {"up": "z"},
    "mesh": lambda meshes, out: write_obj(meshes / "a.obj", shape=TRIANGLE.replace("0.5", "1.0") + UV),
    "texture": lambda meshes, out: write_obj(meshes / "a.obj", BLUE),
    "material": lambda meshes, out: (meshes / "a.mtl").write_text("newmtl m\nKd 0 1 0\n"),
    "no material": lambda meshes, out: (meshes / "a.mtl").unlink(),
    "picture": lambda meshes, out: spoil(out / "a" / "front.png"),
    "note": lambda meshes, out: (out / "a" / "made_by.json").write_text("[1]"),
    "in the note": lambda meshes, out: (out / "a" / "made_by.json").write_text('{"beside": [1]}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_any_change_the_pictures_are_those_made_from_nothing(change, tmp_path):
    out, how = tmp_path / "out", CHANGES[change]
    write_obj(tmp_path / "meshes" / "a.obj")
    cfg = data.Config(meshes=str(tmp_path / "meshes"), out=str(out), size=16)
    data.main(cfg)
    before = pictures_of(out)
    if callable(how):
        how(tmp_path / "meshes", out)
    changed = cfg if callable(how) else replace(cfg, **how)
    data.main(changed)
    data.main(replace(changed, out=str(tmp_path / "new")))
    assert pictures_of(out) == pictures_of(tmp_path / "new")
    assert (pictures_of(out) == before) == (change in ("picture", "note", "in the note"))
    write_obj(tmp_path / "meshes" / "a.obj")  # and back, also of a material that comes later
    data.main(cfg)
    assert pictures_of(out) == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    out = tmp_path / "out"
    toy = out / data.toy_name(7, 1)
    cfg = data.Config(toys=2, seed=7, size=8, out=str(out))

    def refused(**changes) -> None:
        with pytest.raises(InputError, match="are not this command's"):
            data.main(replace(cfg, **changes))

    data.main(cfg)
    before = pictures_of(out)
    refused(seed=8)
    refused(toys=1)
    refused(toys=0, meshes=str(write_obj(tmp_path / "m" / "a.obj").parent))
    assert pictures_of(out) == before
    data.main(replace(cfg, size=16))  # the same toys, drawn again
    assert pictures.open_image(toy / "top.png").shape == (3, 16, 16)
    toy.rename(tmp_path / "elsewhere")  # a link would lead out of the folder
    toy.symlink_to(tmp_path / "elsewhere")
    refused()
    toy.unlink()
    (tmp_path / "elsewhere").rename(toy)
    (toy / "made_by.json").unlink()  # a user's own renders of that name
    refused()


def test_names_that_collide_or_lead_away_are_kept_apart_below_the_folder(tmp_path):
    root, out = tmp_path / "meshes", tmp_path / "deep" / "out"
    files = ["a/b.obj", "a__b.obj", "c.obj", "c.OBJ", "d.glb", "d.obj", "...obj", ".hidden/e.obj", "C.obj"]
    files += ["Table.obj", "Table.OBJ"]  # alike in upper case, too
    files += ["x" * 200 + "/" + "y" * 200 + ".obj", "two words.obj"]
    files += ["\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 100 + "/z.obj"]  # 203 bytes, 103 letters
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"v 0 0 0\nv {i + 1} 0 1\nv 0 1 1\nf 1 2 3\n")
    found = data.find_meshes(root)
    assert sorted(str(p.relative_to(root)) for p in found.values()) == sorted(files)
    assert len({name.lower() for name in found}) == len(files)
    assert all("/" not in n and n[0] != "." and len(n) < 200 for n in found) and "two_words" in found
    assert all(len(os.fsencode(n)) <= 200 for n in found)
    (root / "d.glb").unlink()
    assert data.main(data.Config(meshes=str(root), out=str(out), size=8)) == []
    assert len(data.load_views(out, 8)[0]) == len(files) - 1
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]


def test_what_a_killed_run_left_goes(tmp_path):
    (tmp_path / "out" / ".x.partial").mkdir(parents=True)
    data.main(data.Config(toys=1, size=8, out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / ".x.partial").exists()


def test_a_texture_is_as_fine_as_the_pixels():
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    two = torch.tensor([[0, 1, 2], [1, 3, 2]])  # triangles, a square
    uv, corner = corners[:, :2][two], 1.8 * corners[two]
    image = Image.new("RGBA", (256, 256))
    assert len(meshes.read_texels(image, corner, uv, 64)) == 64  # 1.8 of 2 units are 58 of 64 pixels
    assert len(meshes.read_texels(image, corner, uv, 256)) == 256


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-80])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def above(path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(path.parent.parent / "x.jpg")
    path.with_suffix(".mtl").write_text("newmtl m\nmap_Kd ../x.jpg\n")


FAULTS = {
    "texture cut off": lambda p: cut(p.with_suffix(".jpg")),
    "texture is no picture": lambda p: p.with_suffix(".jpg").write_text("hello"),
    "texture missing": lambda p: p.with_suffix(".jpg").unlink(),
    "texture is a pipe": lambda p: pipe(p.with_suffix(".jpg")),
    "texture outside": lambda p: p.with_suffix(".mtl").write_text("newmtl m\nmap_Kd ../x\\0.jpg\n"),
    "texture above its folder": above,
    "NaN in a texture coordinate": lambda p: write_obj(p, shape=TRIANGLE + UV.replace("1 0", "nan 0")),
    "NaN in a colour": lambda p: p.with_suffix(".mtl").write_text("newmtl m\nKd nan 1 1\n"),
    "NaN in a vertex colour": lambda p: p.write_text(TRIANGLE.replace("\n", " nan 1 1\n") + "f 1 2 3\n"),
    "no number in a colour": lambda p: p.with_suffix(".mtl").write_text("newmtl m\nKd 1 x 1\n"),
    "NaN in a vertex": lambda p: write_obj(p, shape=TRIANGLE.replace("0.5", "nan") + UV),
    "infinite vertex": lambda p: write_obj(p, shape=TRIANGLE.replace("1 0 0.5", "inf 0 0") + UV),
    "all in one point": lambda p: write_obj(p, shape="v 1 1 1\n" * 3 + UV),
    "no area": lambda p: write_obj(p, shape="v 0 0 0\nv 1 0 0\nv 2 0 0\n" + UV),
    "transparent": lambda p: p.with_suffix(".mtl").write_text("newmtl m\nKd 1 0 0\nd 0\n"),
    "no triangles": lambda p: p.write_text("v 0 0 0\n"),
    "is a pipe": pipe,
    "is empty": lambda p: p.write_text(""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mesh_that_cannot_be_drawn_is_skipped_and_listed(fault, tmp_path, capsys):
    write_obj(tmp_path / "meshes" / "good.obj")
    FAULTS[fault](write_obj(tmp_path / "meshes" / "bad.obj"))
    data.main(data.Config(meshes=str(tmp_path / "meshes"), out=str(tmp_path / "out"), size=8))
    assert [p.name for p in (tmp_path / "out").glob("*/")] == ["good"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert "bad.obj: " in line and "expected" in line
    assert (": bad.jpg is missing" in line) == (fault in ("texture missing", "texture is a pipe"))


def test_killed_write_leaves_no_half_object_and_nothing_to_trip_over(tmp_path, monkeypatch):
    write = pictures.write_png

    def killed(path, image):
        if path.name == "left.png":
            raise KeyboardInterrupt
        write(path, image)

    views = torch.zeros(5, 3, 8, 8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "write_png", killed)
        data.write_views(tmp_path / "a", views)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.partial").mkdir()  # what SIGKILL leaves
    (tmp_path / ".a.partial" / ".7.front.png").write_text("half")
    for _ in range(2):  # also over one that is there
        data.write_views(tmp_path / "a", views, made_by={"x": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and len(list((tmp_path / "a").iterdir())) == 6
    assert not damage(tmp_path / "a", {"x": 1}) and damage(tmp_path / "a", {"x": 2})
    data.write_views(tmp_path / "a", 1 - views)  # by someone else: the note does not vouch for it
    assert damage(tmp_path / "a", {"x": 1}) == "back.png"


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    with data.locked(tmp_path), pytest.raises(InputError, match="another run writes there"):
        data.main(data.Config(toys=1, size=8, out=str(tmp_path)))
    (tmp_path / ".a.partial").mkdir()  # what SIGKILL leaves
    data.main(data.Config(toys=1, size=8, out=str(tmp_path)))
    assert not list(tmp_path.glob("*.partial"))


# --- furniture ---


def test_furniture_is_split_as_its_readme_says():
    sizes = {}
    libraries = (("scopia", "preference", "train", 120), ("blendswap", "validation", "heldout", 64))
    for library, *splits, cut in libraries:
        names = (ROOT / "furniture" / f"{library}.txt").read_text().splitlines()
        picture = np.asarray(Image.open(ROOT / "furniture" / f"{library}.png"))
        order = torch.randperm(len(names), generator=keyed_generator(0)).tolist()
        for split, rows in zip(splits, (order[:cut], order[cut:])):
            sizes[split] = len(rows)
            assert data.read_split("furniture", split, 999, 8)[0] == [names[i] for i in rows]
            views = data.load_split("furniture", split, 999, 64)
            assert views.shape == (len(rows), 5, 3, 64, 64) and views.dtype == torch.uint8
            assert mask(views).flatten(2).sum(-1).min() >= 40
            for k in (0, len(rows) - 1):
                row = picture[64 * rows[k] : 64 * rows[k] + 64].reshape(64, 5, 64, 3).transpose(1, 3, 0, 2)
                assert np.array_equal(views[k].numpy(), row)
    assert sizes == {"preference": 120, "train": 233, "validation": 64, "heldout": 96}
    small = data.load_split("furniture", "heldout", 3, 32).float()
    mean = torch.nn.functional.avg_pool2d(views[:3].float().flatten(0, 1), 2).view(3, 5, 3, 32, 32)
    assert small.shape == mean.shape and (small - mean).abs().mean() < 4


def test_a_strip_keeps_every_pixel_and_leaves_thin_objects_out(tmp_path, toys):
    def thin(pixels: int, value: int) -> torch.Tensor:
        views = torch.full((5, 3, 64, 64), 255, dtype=torch.uint8)
        views[:, 2, :10, :10] = 0  # plenty
        views[3] = 255
        views[3, 1].flatten()[:pixels] = value
        return views

    cases = {"x__a__kept": (40, 229), "x__b__few": (39, 0), "x__c__pale": (100, 230)}
    for name, (pixels, value) in cases.items():
        data.write_views(tmp_path / "out" / name, thin(pixels, value))
    toy = data.make_toys(1, 64, 7)[0]
    data.write_views(tmp_path / "out" / "toy", toy)
    cfg = data.Config(strip=str(tmp_path / "strip.png"), out=str(tmp_path / "out"))
    assert data.main(cfg) == ["few: covers 39 pixels of left", "pale: covers 0 pixels of left"]
    assert (tmp_path / "strip.txt").read_text() == "toy\nkept\n"
    strip = pictures.open_image(tmp_path / "strip.png")
    rows = [torch.cat(list(views), -1) for views in (toy, thin(40, 229))]
    assert torch.equal(strip, torch.cat(rows, 1))
    shutil.copytree(tmp_path / "out" / "toy", tmp_path / "out" / "y__kept")  # the last part no longer tells
    data.main(cfg)
    assert (tmp_path / "strip.txt").read_text().split() == ["toy", "x__a__kept", "y__kept"]
    before = pictures_of(tmp_path)
    with data.locked(tmp_path / "out"), pytest.raises(InputError, match="another run writes there"):
        data.main(cfg)
    (tmp_path / "other.txt").write_text("a user's")
    (tmp_path / "photo.png").write_text("a user's, too")
    for name in ("other.txt", "photo.png"):
        with pytest.raises(InputError, match=f"{name}: is there, and no strip"):
            data.main(replace(cfg, strip=str((tmp_path / name).with_suffix(".png"))))
    assert (tmp_path / "photo.png").read_text() == "a user's, too"
    (tmp_path / "photo.png").unlink()
    for name in (b"two\nlines", b"no\xfftext"):
        shutil.copytree(tmp_path / "out" / "toy", wrong := tmp_path / "out" / os.fsdecode(name))
        with pytest.raises(InputError, match="expected a name of printable text"):
            data.main(cfg)
        shutil.rmtree(wrong)
    assert pictures_of(tmp_path) == before and (tmp_path / "other.txt").read_text() == "a user's"
    with pytest.raises(InputError, match="no such folder, expected one of renders"):
        data.main(replace(cfg, out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_furniture_of_other_cameras_or_names_is_refused(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "furniture", tmp_path / "furniture")
    monkeypatch.setattr(data, "ROOT", tmp_path)
    names = tmp_path / "furniture" / "scopia.txt"
    names.write_text(names.read_text() + "one too many\n")
    for message, gone in (
        ("scopia.png: 320 x 22592 pixels, expected 5 views of 64 of each name in scopia.txt", names),
        ("each name in scopia.txt. .FileNotFound", names.with_suffix(".png")),
        ("scopia.png: no such file", tmp_path / "furniture" / "README.md"),
    ):
        with pytest.raises(InputError, match=message):
            data.load_split("furniture", "train", 1, 64)
        gone.unlink()
    names.write_text("a\nb\n")  # two objects of six views
    data.write_png(names.with_suffix(".png"), torch.zeros(3, 2 * 64, 6 * 64))
    with pytest.raises(InputError, match="384 x 128 pixels, expected 5 views of 64"):
        data.load_split("furniture", "train", 1, 64)


# --- pictures and folders ---


@pytest.fixture
def folder(tmp_path, toys) -> Path:
    for i in range(2):
        data.write_views(tmp_path / "renders" / f"toy{i}", toys[i])
    return tmp_path / "renders"


def test_folder_round_trip_is_exact_and_resizes(folder, toys):
    (folder / ".hidden").mkdir()  # a notebook's, or what a killed run left
    ids, views = data.load_views(folder, SIZE)
    assert ids == ["toy0", "toy1"] and len(views) == 2
    assert torch.equal(torch.stack(list(views)), toys[:2]) and views[0].dtype == torch.uint8
    data.write_png(folder / "toy0" / "top.png", torch.ones(3, 50, 50))  # mixed sizes
    assert data.load_views(folder, 16)[1][0].shape == (5, 3, 16, 16)
    assert data.load_views(folder / "toy1", SIZE)[0] == ["toy1"]  # one object's own folder


OBLONG = torch.ones(3, 8, 9)
DAMAGES = {  # message: what is done to the folder of toy1
    "toy1: no left, top; expected front, right, back, left, top": lambda f: [
        p.unlink() for p in f.glob("[lt]*")
    ],
    "toy1: no back; expected front, right, back, left, top": lambda f: pipe(f / "back.png"),
    "back.png: 9 x 8 pixels, expected a square": lambda f: data.write_png(f / "back.png", OBLONG),
    "back.png: truncated or not a PNG": lambda f: cut(f / "back.png"),
    "found no object, expected <object>": lambda f: [shutil.rmtree(toy) for toy in f.parent.iterdir()],
    "no such folder, expected one of renders": lambda f: shutil.rmtree(f.parent),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_wrong_folder_is_refused_before_it_is_used(folder, message):
    DAMAGES[message](folder / "toy1")
    with pytest.raises(InputError, match=message):
        data.load_views(folder, SIZE)


def test_a_picture_damaged_in_the_middle_gives_one_line_when_read(folder):
    path = folder / "toy0" / "back.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="back.png: not readable as a picture"):
        data.load_views(folder, SIZE)[1][0]


def test_fingerprint_follows_the_pictures(folder, toys):
    of = lambda place, size=SIZE: pictures.fingerprint(data.load_views(place, size)[1])  # noqa: E731
    first = of(folder)
    assert first == of(folder) != of(folder, 16)
    moved = folder.rename(folder.with_name("elsewhere"))
    assert first == of(moved)
    path = moved / "toy1" / "top.png"
    path.write_bytes(path.read_bytes())  # at another time
    assert first == of(moved)
    time, image = path.stat().st_mtime_ns, data.open_image(path).clone()
    image[0, 3, 3] ^= 1
    data.write_png(path, image)
    os.utime(path, ns=(time, time))  # as if nothing was written
    assert first != of(moved)
    seen = []
    for value in (10, 11):  # of one length
        data.write_png(path, torch.full((3, SIZE, SIZE), value, dtype=torch.uint8))
        seen.append((path.stat().st_size, of(moved)))
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # also what no checksum at the end would tell, such as a palette
    path.write_bytes(content)
    assert of(moved) != seen[1][1]
    assert (
        pictures.fingerprint(toys[:2])
        == pictures.fingerprint(toys[:2].clone())
        != pictures.fingerprint(toys[1:3])
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_any_picture_becomes_a_square_on_white(tmp_path, mode):
    path, picture = tmp_path / "x.tif", Image.new("RGB", (40, 20), (128, 128, 128))
    path = path if mode == "CMYK" else path.with_suffix(".png")
    deep = Image.fromarray(np.full((20, 40), 128 * 256, np.uint16))
    grey = picture if mode in ("RGB", "RGBA", "CMYK") else picture.convert("L")
    (deep if mode == "I;16" else grey.convert(mode)).save(path)
    image = pictures.read_image(path, 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert (image[:, :6] == 255).all() and (image[:, -6:] == 255).all()
    if mode != "1":
        assert (image[:, 12:20].float() - 128).abs().max() <= 1


def test_a_photo_is_turned_a_picture_of_unknown_white_refused_and_a_fine_one_averaged(tmp_path):
    photo, exif = Image.new("RGB", (20, 10), RED), Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter": phones do so
    photo.save(tmp_path / "x.jpg", exif=exif)
    assert pictures.open_image(tmp_path / "x.jpg").shape == (3, 20, 10)
    for black, white, kind in (
        (0, 2**16, np.int32),
        (0, 255, np.int32),
        (0, 1, np.float32),
        (-1, 999, np.int32),
    ):
        Image.fromarray(np.array([[black, white]], kind)).save(tmp_path / "x.tif")
        with pytest.raises(InputError, match="x.tif: not readable as a picture.*expected 8 or 16 bits"):
            pictures.open_image(tmp_path / "x.tif")
    Image.fromarray(np.array([[256, 65535]], np.int32)).save(tmp_path / "x.tif")
    assert pictures.open_image(tmp_path / "x.tif")[0].tolist() == [[1, 255]]
    Image.new("L", (30000, 1)).save(tmp_path / "x.png")  # a square of it would be 2.7 GB
    assert (pictures.read_image(tmp_path / "x.png", 9)[0] == 0).any(1).nonzero().tolist() == [[4]]
    beyond = torch.tensor([-0.2, 0.5, 1.2]).expand(3, 1, 3)  # cut at black and white
    data.write_png(tmp_path / "x.png", beyond)
    assert pictures.open_image(tmp_path / "x.png")[0].tolist() == [[0, 128, 255]]
    data.write_png(tmp_path / "x.png", torch.full((3, 20, 10), 0.999))  # rounded, not cut
    tall = pictures.read_image(tmp_path / "x.png", 20)
    Image.new("RGB", (10, 20), RED).save(tmp_path / "x.png")
    wide = pictures.read_image(tmp_path / "x.png", 20)  # in the middle of white
    assert (tall == 255).all() and (wide[1, 0] == 0).nonzero()[[0, -1]].tolist() == [[5], [14]]
    lines = torch.zeros(3, 64, 64, dtype=torch.uint8)
    lines[:, ::4] = 200  # one row of four
    assert (pictures.resize(lines, 16, 16).float() - 50).abs().max() <= 20
    three = torch.tensor([100, 101, 101], dtype=torch.uint8).expand(3, 3, 3)
    assert (pictures.resize(three, 1, 1) == 101).all()  # rounded, not cut


def test_transparent_pixels_become_white(tmp_path):
    picture = np.zeros((4, 4, 4), np.uint8)  # transparent black, one half-transparent black pixel
    picture[1, 2, 3] = 128
    Image.fromarray(picture).save(tmp_path / "x.png")
    image = pictures.read_image(tmp_path / "x.png", 4)
    assert image[0, 1, 2] == 127 and (image == 255).sum() == 3 * 15


def test_unreadable_picture_gives_one_line(tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(InputError, match="x.png: not readable as a picture"):
        pictures.read_image(tmp_path / "x.png", 8)
    pipe(tmp_path / "x.png")  # would be waited for
    for path in (tmp_path / "y.png", tmp_path / "x.png", tmp_path):
        with pytest.raises(InputError, match=f"{path}: no such file, expected a picture"):
            pictures.read_image(path, 8)


def test_command_line(tmp_path):
    script = [sys.executable, data.__file__, "--meshes", "no/such", "--out", "x"]
    wrong = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "no/such: found no" in wrong.stderr
    out = tmp_path / "toys"
    assert data.main(data.Config(toys=3, seed=7, size=SIZE, out=str(out))) == []
    ids, views = data.load_views(out, SIZE)
    assert torch.equal(torch.stack(list(views)), data.make_toys(3, SIZE, seed=7))
    assert ids[0] == f"000000_{toy_kind(key_seed(7, 0))}"
    before, here, inside = pictures_of(out), {"out": str(out)}, str(out / ids[0] / "front.png")
    wrong = [{}, {"toys": 3}, {"strip": "a.png"}, {"strip": inside, **here}]
    wrong += [{"toys": 3, "meshes": "a", **here}, {"strip": "a.txt", **here}]
    for options in [*wrong, {"toys": -1, **here}, {"toys": 3, "size": 7, **here}]:
        with pytest.raises(InputError, match="expected"):
            data.main(data.Config(**options))
    assert pictures_of(out) == before


def test_the_diagram_is_the_one_shown(tmp_path):
    diagram.main(diagram.Config(out=str(tmp_path / "method.svg")))
    drawn, shown = (re.sub("base64,.*", "", path.read_text()) for path in (tmp_path / "method.svg", SHOWN))
    assert drawn == shown  # but for what a PNG's compression makes of its pixels
