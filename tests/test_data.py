"""Cameras, relative frame, toys, meshes, folders: known points, colours, mistakes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial

import data
from common import InputError, key_seed
from toys import KINDS, ball, box, make_toy, pack, rotation, toy_kind, tube

torch.set_num_threads(1)
SIZE = 32
SHADE = 0.7 + 0.3 * data.CAMERAS[:, 2] @ data.LIGHT  # of a face that looks into the camera


@pytest.fixture(scope="module")
def toys() -> torch.Tensor:
    return data.make_toys(20, SIZE, seed=7)  # more than one batch of the renderer


def mask(images: torch.Tensor) -> torch.Tensor:  # (..., 3, H, W) -> (..., H, W)
    return images.amin(-3) < 0.9 * 255


def test_known_point_lands_where_projection_says():
    point = (0.3, -0.5, 0.7)  # all different and signed: a swapped or mirrored axis moves it
    small = pack([ball(point, (0.06, 0.06, 0.06), (0.0, 0.0, 0.0))])
    views = data.render_primitives([small], 64, antialias=4)[0]
    pixel, depth = data.project(torch.tensor(point), 64)
    for v in range(5):
        rows, columns = mask(views[v]).nonzero().float().add(0.5).unbind(1)
        assert torch.allclose(torch.stack([columns.mean(), rows.mean()]), pixel[v], atol=0.3), data.VIEWS[v]
    # By hand: in the right view the camera stands on +X and sees -Z on its right.
    assert pixel[1].tolist() == pytest.approx([(-0.7 * 0.5 + 0.5) * 64, (0.5 * 0.5 + 0.5) * 64], abs=1e-4)
    assert depth.tolist() == pytest.approx([0.7, 0.3, -0.7, -0.3, -0.5])


def test_silhouettes_of_opposite_sides_are_mirrored_and_rows_are_shared(toys):
    m = mask(toys)
    assert (m[:, 0] ^ m[:, 2].flip(-1)).float().mean() < 1e-3
    assert (m[:, 1] ^ m[:, 3].flip(-1)).float().mean() < 1e-3
    rows = m[:, :4].any(-1)
    assert (rows ^ rows[:, :1]).float().mean() < 5e-3
    assert (m[:, 0] ^ m[:, 1]).float().mean() > 0.01  # and the two pairs do differ


@pytest.mark.parametrize("r", range(4))
def test_relative_views_equal_the_turned_object(r):
    parts = pack(make_toy(key_seed(7, 3)))
    plain = data.render_primitives([parts], SIZE)[0]
    turn = rotation("y", -90.0 * r)  # side r comes to the front, the light comes along
    turned = {**parts, "center": parts["center"] @ turn.T, "turn": turn @ parts["turn"]}
    expected = data.render_primitives([turned], SIZE, light=turn @ data.LIGHT)[0]
    difference = (data.relative_views(plain, r).float() - expected.float()).abs()
    assert (difference > 3).float().mean() < 5e-3  # rounding moves a few pixels on edges
    if r:
        assert ((plain.float() - expected.float()).abs() > 3).float().mean() > 0.02


def test_object_is_independent_of_number_and_of_its_batch(toys):
    assert torch.equal(data.make_toys(5, SIZE, seed=7), toys[:5])
    alone = data.render_primitives([pack(make_toy(key_seed(7, 3)))], SIZE)[0]
    assert torch.equal(alone, toys[3])


def test_later_objects_do_not_need_the_earlier_ones(toys):
    assert torch.equal(data.make_toys(3, SIZE, seed=7, first=4), toys[4:7])
    assert torch.equal(data.make_toys(3, SIZE, seed=7, first=17), toys[17:20])


def test_splits_of_a_folder_are_disjoint_and_fixed(tmp_path):
    for i in range(10):
        data.write_views(tmp_path / f"{i:02d}", torch.full((5, 3, 8, 8), i, dtype=torch.uint8))
    parts = {s: {int(x[0, 0, 0, 0]) for x in data.load_split(str(tmp_path), s, 99, 8)} for s in data.SPLITS}
    assert parts["train"] == parts["preference"]
    assert parts["train"] | parts["validation"] | parts["heldout"] == set(range(10))
    assert sum(len(parts[s]) for s in ("train", "validation", "heldout")) == 10


@pytest.mark.parametrize(("n", "sizes"), [(3, (1, 1, 1)), (8, (2, 2, 4)), (1000, (64, 200, 736))])
def test_sizes_of_a_folders_splits(n, sizes):
    ids = [str(i) for i in range(n)]
    assert tuple(len(data.split_of(ids, s)) for s in ("validation", "heldout", "train")) == sizes


def test_two_objects_leave_none_to_train_on():
    with pytest.raises(InputError, match="2 objects leave none for the train split, expected 3 or more"):
        data.split_of(["a", "b"], "train")


def test_toy_split_is_cached(tmp_path):
    first = data.load_split("toys", "validation", 3, 16, cache=tmp_path)
    assert torch.equal(first, data.make_toys(3, 16, data.SPLITS["validation"]))
    assert torch.equal(data.load_split("toys", "validation", 3, 16, cache=tmp_path), first)


def test_splits_share_no_object():
    assert len(set(data.SPLITS.values())) == 4
    objects = [data.make_toys(8, 16, s).flatten(1) for s in data.SPLITS.values()]
    assert len(torch.cat(objects).unique(dim=0)) == 32


def test_background_is_exactly_white_and_objects_are_large(toys):
    for corner in (toys[..., :1, :], toys[..., -1:, :], toys[..., :, :1], toys[..., :, -1:]):
        assert (corner == 255).all()
    extent = torch.stack([mask(toys).any(-1).sum(-1), mask(toys).any(-2).sum(-1)]).amax((0, 2))
    assert (extent >= 0.75 * SIZE).all()


SHAPES = {"ball": ball, "box": box, "tube": tube, "cone": lambda *a, **m: tube(*a, taper=0.2, **m)}


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouette_is_the_shadow_of_the_body(shape):
    body = pack([SHAPES[shape]((0.1, 0.0, -0.1), (0.3, 0.6, 0.2), (1.0, 0.0, 0.0), turn=("z", 35))])
    drawn = mask(data.render_primitives([body], SIZE)[0])
    p = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    e, m, k = body["quadric"][0]
    p = p[p[:, 0] ** 2 + p[:, 2] ** 2 + e * p[:, 1] ** 2 <= (m + k * p[:, 1]) ** 2]
    pixel, _ = data.project((p * body["half"]) @ body["turn"][0].T + body["center"], SIZE)
    for v in range(5):
        shadow = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        shadow[pixel[v, :, 1].long(), pixel[v, :, 0].long()] = True
        assert (drawn[v] & ~shadow).sum() <= 2  # the shadow holds every pixel touched, the mask those well covered
        assert (shadow & ~drawn[v]).sum() <= 0.25 * shadow.sum()


def test_shade_stripes_and_what_hides_what():
    def middle(*parts: dict) -> torch.Tensor:  # (V, 3) colours in the middle, light taken out
        image = data.render_primitives([pack(list(parts))], 33)[0, :, :, 16, 16]
        return image / 255 / SHADE[:, None]

    half, red, blue = (0.5, 0.5, 0.5), (0.8, 0.2, 0.2), (0.2, 0.2, 0.8)
    for shape in (ball, box, tube):
        assert torch.allclose(middle(shape((0, 0, 0), half, red)), torch.tensor(red).expand(5, 3), atol=0.02)
    seen = middle(box((0, 0, 0), half, red, color2=blue, bands=(0, 3, 0)))
    assert torch.allclose(seen, torch.tensor([blue] * 4 + [red]), atol=0.02)  # the middle stripe; the end from above
    seen = middle(box((0, 0, 0), half, red), ball((0, 0, 0.5), (0.2, 0.2, 0.2), blue))
    assert torch.allclose(seen, torch.tensor([blue, red, red, red, red]), atol=0.02)


def test_every_kind_fits_the_frame_and_is_drawn():
    seeds = range(len(KINDS))
    assert len({toy_kind(s) for s in seeds}) == len(KINDS) >= 8
    for s in seeds:
        p = pack(make_toy(s))
        assert (p["center"].abs().amax(0) < 0.9).all() and len(p["center"]) >= 3


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


def quarters(
    view: torch.Tensor,
) -> torch.Tensor:  # (3, S, S) -> (2, 2, 3) colours in the middle of each quarter
    S = view.shape[-1]
    return view[:, [S // 4, 3 * S // 4]][:, :, [S // 4, 3 * S // 4]].permute(1, 2, 0).float()


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_textured_box_has_the_right_colours_at_the_right_places(kind, tmp_path):
    path = tmp_path / f"box.{kind}"
    mesh = textured_box(baseColorFactor=[0.5, 0.5, 0.5, 1.0]) if kind == "glb" else textured_box()
    if kind == "glb":
        mesh.export(path)
    else:
        Image.fromarray(np.array([[RED, GREEN], [BLUE, YELLOW]], np.uint8)).save(tmp_path / "t.png")
        (tmp_path / "m.mtl").write_text("newmtl m\nKd 0 0 0\nmap_Kd t.png\n")  # Kd beside a texture is ignored
        lines = ["mtllib m.mtl", *("v {} {} {}".format(*v) for v in mesh.vertices)]
        lines += [*("vt {} {}".format(*t) for t in mesh.visual.uv), "usemtl m"]
        lines += ["f " + " ".join(f"{i + 1}/{i + 1}" for i in f) for f in mesh.faces]
        path.write_text("\n".join(lines))
    views = data.render_mesh(path, SIZE)
    factor = (1.055 * 0.5 ** (1 / 2.4) - 0.055) if kind == "glb" else 1.0  # a linear factor, an sRGB texture
    for v in range(5):
        expected = torch.tensor([[RED, GREEN], [BLUE, YELLOW]]) * factor * SHADE[v]
        assert torch.allclose(quarters(views[v]), expected, atol=2), data.VIEWS[v]
    extent = mask(views).any(-1).sum(-1)
    assert (extent == 30).all()  # 0.9 * 32 = 28.8, centred: 28 whole pixels and two partly covered


def test_alpha_is_tested_before_depth(tmp_path):
    textured_box(alphaMode="MASK").export(tmp_path / "mask.glb")
    front = quarters(data.render_mesh(tmp_path / "mask.glb", SIZE)[0])
    # Through the hole one sees the inside of the back, whose lower left quarter is on our lower right.
    assert torch.allclose(front[1, 1], torch.tensor(BLUE) * SHADE[0], atol=2)


def test_half_transparent_surface_mixes_with_what_is_behind(tmp_path):
    mesh = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    surface = PBRMaterial(baseColorFactor=[1.0, 0.0, 0.0, 0.5], alphaMode="BLEND")
    mesh.visual = trimesh.visual.TextureVisuals(uv=np.zeros((4, 2)), material=surface)
    mesh.export(tmp_path / "glass.glb")
    front = quarters(data.render_mesh(tmp_path / "glass.glb", SIZE)[0])
    expected = (torch.tensor([255.0, 0, 0]) * SHADE[0] + 255) / 2
    assert torch.allclose(front, expected.expand(2, 2, 3), atol=2)


def test_vertex_colours_and_up_axis(tmp_path):
    mesh = textured_box()
    mesh.vertices = mesh.vertices * [1, 1, 2]  # tall along Z
    color = np.full((24, 4), 255, np.uint8)
    color[mesh.vertices[:, 2] > 0] = (255, 55, 55, 255)  # 55 / 255 linear is 0.502 in sRGB
    mesh.visual = trimesh.visual.ColorVisuals(vertex_colors=color)
    mesh.export(tmp_path / "colour.glb")
    views = data.render_mesh(tmp_path / "colour.glb", SIZE, up="z")
    assert torch.allclose(views[4, :, SIZE // 2, SIZE // 2] / SHADE[4], torch.tensor([255.0, 128, 128]), atol=3)
    for v in range(4):  # tall, and redder above
        assert mask(views[v]).any(-1).sum() > 1.8 * mask(views[v]).any(0).sum()
        assert views[v, 1, SIZE // 5, SIZE // 2] + 45 < views[v, 1, -SIZE // 5, SIZE // 2]


def test_front_of_a_z_up_mesh_is_minus_y(tmp_path):
    mesh = trimesh.creation.box((2, 2, 2))
    mesh.visual.face_colors = [RED + (255,) if n[1] < -0.5 else BLUE + (255,) for n in mesh.face_normals]
    mesh.export(tmp_path / "z.glb")
    front = data.render_mesh(tmp_path / "z.glb", SIZE, up="z")[:, :, SIZE // 2, SIZE // 2]
    assert front[0, 0] > 100 and (front[1:, 0] < 100).all()


def test_fine_texture_is_averaged_and_does_not_sparkle(tmp_path):
    mesh = textured_box()
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    mesh.visual.material.baseColorTexture = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    mesh.export(tmp_path / "fine.glb")
    front = data.render_mesh(tmp_path / "fine.glb", SIZE)[0, 0, 4:-4, 4:-4].float()
    assert (front - 127.5 * SHADE[0]).abs().max() < 4


def test_smooth_mesh_equals_the_analytic_ball(tmp_path):
    mesh = trimesh.creation.icosphere(3)
    mesh.visual.vertex_colors = np.tile(np.array([255, 0, 0, 255], np.uint8), (len(mesh.vertices), 1))
    mesh.export(tmp_path / "ball.glb")
    analytic = data.render_primitives([pack([ball((0, 0, 0), (0.9, 0.9, 0.9), (1.0, 0.0, 0.0))])], SIZE)[0]
    difference = (data.render_mesh(tmp_path / "ball.glb", SIZE).float() - analytic.float()).abs()
    assert (difference > 3).float().mean() < 0.03  # the outline
    assert difference[:, 0, 8:-8, 8:-8].mean() < 0.5  # flat faces would give 1.06


def test_folder_resumes_and_lists_bad_files(tmp_path, capsys):
    meshes, out = tmp_path / "meshes", tmp_path / "out"
    (meshes / "deep").mkdir(parents=True)
    textured_box().export(meshes / "good.glb")
    textured_box().export(meshes / "deep" / "other.glb")
    (meshes / "bad.glb").write_bytes(b"not a mesh")
    (meshes / "point.obj").write_text("v 0 0 0\n")
    cfg = data.Config(meshes=str(meshes), out=str(out), size=16)
    result = data.main(cfg)
    assert result["objects"] == 2 and len(result["skipped"]) == 2
    printed = capsys.readouterr().out.splitlines()
    assert "bad.glb" in printed[0] and "point.obj" in printed[1] and len(printed) == 3
    assert data.load_views(out, 16)[0] == ["deep__other", "good"]

    before = (out / "good" / "top.png").stat().st_mtime_ns
    (out / "deep__other" / "left.png").unlink()  # an incomplete object is made again, a complete one is kept
    data.main(cfg)
    assert (out / "good" / "top.png").stat().st_mtime_ns == before
    assert len(data.load_views(out, 16)[0]) == 2

    (meshes / "good.glb").unlink()
    (meshes / "deep" / "other.glb").unlink()
    with pytest.raises(InputError, match="none of 2 files could be rendered"):
        data.main(cfg)


def test_missing_texture_is_reported_and_a_missing_material_is_not(tmp_path):
    (tmp_path / "m.mtl").write_text("newmtl m\nmap_Kd gone.png\n")
    shape = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nusemtl m\nf 1/1 2/1 3/1\n"
    (tmp_path / "a.obj").write_text("mtllib m.mtl\n" + shape)
    with pytest.raises(InputError, match="a.obj: its texture gone.png is missing"):
        data.render_mesh(tmp_path / "a.obj", 16)
    (tmp_path / "b.obj").write_text("mtllib gone.mtl\n" + shape)
    assert mask(data.render_mesh(tmp_path / "b.obj", 16)[0]).any()


def test_killed_write_leaves_no_half_object(tmp_path, monkeypatch):
    write = data.write_png

    def killed(path, image):
        if path.name == "left.png":
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(data, "write_png", killed)
    views = torch.zeros(5, 3, 8, 8)
    with pytest.raises(KeyboardInterrupt):
        data.write_views(tmp_path / "a", views)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    data.write_views(tmp_path / "a", views)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and len(list((tmp_path / "a").iterdir())) == 5


# --- pictures and folders ---


@pytest.fixture
def folder(tmp_path, toys) -> Path:
    for i in range(2):
        data.write_views(tmp_path / "renders" / f"toy{i}", toys[i])
    return tmp_path / "renders"


def test_folder_round_trip_is_exact_and_resizes(folder, toys):
    ids, views = data.load_views(folder, SIZE)
    assert ids == ["toy0", "toy1"] and len(views) == 2
    assert torch.equal(torch.stack(list(views)), toys[:2]) and views[0].dtype == torch.uint8
    data.write_png(folder / "toy0" / "top.png", torch.ones(3, 50, 50))  # mixed sizes
    assert data.load_views(folder, 16)[1][0].shape == (5, 3, 16, 16)
    assert data.load_views(folder / "toy1", SIZE)[0] == ["toy1"]  # one object's own folder


def break_missing(folder: Path) -> None:
    (folder / "toy1" / "left.png").unlink()
    (folder / "toy1" / "top.png").unlink()


def break_shape(folder: Path) -> None:
    data.write_png(folder / "toy1" / "back.png", torch.ones(3, 8, 9))


def break_truncated(folder: Path) -> None:
    path = folder / "toy1" / "back.png"
    path.write_bytes(path.read_bytes()[:-20])


def break_empty(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()
    for path in list(folder.iterdir()):
        path.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, "toy1: found front, right, back; expected left, top too"),
        (break_shape, "back.png: 9 x 8 pixels, expected a square"),
        (break_truncated, "back.png: truncated or not a PNG"),
        (break_empty, "found no object, expected <object>"),
    ],
)
def test_wrong_folder_is_refused_before_it_is_used(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        data.load_views(folder, SIZE)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_any_picture_becomes_a_square_on_white(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((20, 40), 128 * 256, np.uint16)).save(path)
    elif mode == "P":
        Image.new("RGB", (40, 20), (128, 128, 128)).quantize().save(path)
    else:
        Image.new("L" if mode == "1" else "RGB", (40, 20), 128 if mode == "1" else (128, 128, 128)).convert(mode).save(
            path
        )
    image = data.read_image(path, 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert (image[:, :6] == 255).all() and (image[:, -6:] == 255).all()
    if mode != "1":
        assert (image[:, 12:20].float() - 128).abs().max() <= 1


def test_transparent_pixels_become_white(tmp_path):
    picture = np.zeros((4, 4, 4), np.uint8)  # transparent black, one half-transparent black pixel
    picture[1, 2, 3] = 128
    Image.fromarray(picture).save(tmp_path / "x.png")
    image = data.read_image(tmp_path / "x.png", 4)
    assert image[0, 1, 2] == 127 and (image == 255).sum() == 3 * 15


def test_unreadable_picture_gives_one_line(tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(InputError, match="x.png: not readable as a picture"):
        data.read_image(tmp_path / "x.png", 8)
    with pytest.raises(InputError, match="y.png: no such file"):
        data.read_image(tmp_path / "y.png", 8)


def test_command_line(tmp_path):
    script = [sys.executable, data.__file__]
    wrong = subprocess.run([*script, "--meshes", "no/such", "--out", "x"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "no such folder" in wrong.stderr
    out, sheet = tmp_path / "toys", tmp_path / "sheet.png"
    data.main(data.Config(toys=3, seed=7, size=SIZE, out=str(out), sheet=str(sheet)))
    ids, views = data.load_views(out, SIZE)
    assert torch.equal(torch.stack(list(views)), data.make_toys(3, SIZE, seed=7))
    assert ids[0] == f"000000_{toy_kind(key_seed(7, 0))}" and sheet.exists()
    for cfg in (data.Config(), data.Config(toys=3), data.Config(toys=3, meshes="a", out="b")):
        with pytest.raises(InputError, match="expected"):
            data.main(cfg)
