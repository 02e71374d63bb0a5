"""Meshes of other people: read .glb, .gltf and .obj files, draw them, keep what is drawn up to date.

In: a file with its textures and materials beside it. Out: its views, uint8 (V, 3, size, size) on white. A
texture that is missing or a number that is not finite raises InputError. A missing .mtl file leaves its parts
grey, which is said; missing texture coordinates leave a part plain: so are some of furniture/.
trimesh parses, the rest is here: no OpenGL, and the same pixels on every machine.
"""

import logging
import math
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cache import code, damage
from common import InputError, digest, explained, load_json, regular
from pictures import write_views
from render import ANTIALIAS, CAMERAS, VIEWS, fragments, nearest, project, shaded, to_uint8

# --- reading ---


def to_srgb(linear: Tensor) -> Tensor:
    """glTF factors and vertex colours are linear, textures and PNGs sRGB: unconverted, GLBs are too dark."""
    curve = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curve)


def read_surface(mesh: Any, gltf: bool) -> tuple[Tensor, Image.Image | None, Tensor, float]:
    """(N, 3, 4) sRGB corner colours, texture, (N, 3, 2) coordinates, alpha threshold (0 opaque, -1 blend)."""
    visual, faces = mesh.visual, torch.as_tensor(mesh.faces)
    material, uv = getattr(visual, "material", None), getattr(visual, "uv", None)
    color, texture, threshold = torch.ones(len(faces), 3, 4), None, 0.0
    if gltf and material is not None:
        texture, factor = material.baseColorTexture, material.baseColorFactor
        if factor is not None:  # trimesh gives 0..255
            color = color * torch.tensor(factor / 255.0, dtype=torch.float32)
        cutoff = 0.5 if material.alphaCutoff is None else material.alphaCutoff
        threshold = {"OPAQUE": 0.0, "MASK": cutoff, "BLEND": -1.0}[material.alphaMode or "OPAQUE"]
    elif material is not None:
        texture, more, threshold = material.image, material.kwargs, -1.0
        if texture is None:  # Kd beside map_Kd is often a leftover of the exporter, black or grey
            color = color * torch.tensor(material.diffuse / 255.0, dtype=torch.float32)
        color[..., 3] = float(more["d"][0]) if "d" in more else 1 - float(more.get("tr", [0])[0])
    # Vertex colours multiply the material; a mesh with nothing at all is light grey.
    vertex = getattr(visual, "vertex_attributes", {}).get("color")
    if material is None and visual.kind == "face":
        color = color * torch.as_tensor(visual.face_colors / 255.0).float()[:, None]
    elif material is None:
        grey = np.full((len(mesh.vertices), 4), 180, np.uint8)
        vertex = visual.vertex_colors if visual.kind == "vertex" else grey
    if vertex is not None:
        scale = np.iinfo(vertex.dtype).max if np.issubdtype(vertex.dtype, np.integer) else 1.0
        corner = torch.as_tensor(vertex / scale).float()[faces]
        color[..., : corner.shape[-1]] *= corner
    if gltf:
        color[..., :3] = to_srgb(color[..., :3])
    if uv is None or len(uv) != len(mesh.vertices):
        texture, uv = None, np.zeros((len(mesh.vertices), 2))
    uv = torch.as_tensor(uv).float()[faces]
    if not (color.isfinite().all() and uv.isfinite().all()):
        raise ValueError("a colour or texture coordinate is not finite")
    return color, texture, uv, threshold


def find_beside(path: Path, name: str) -> Path | None:
    """The texture or material that a mesh names, beside it or below; of a foreign path, its last part."""
    folder = path.parent.resolve()
    for candidate in (name.strip(), name.strip().lstrip("/"), Path(name).name):
        with suppress(OSError, ValueError):  # too long, or not a path at all
            found = (folder / candidate).resolve()
            if found.is_relative_to(folder) and found.is_file():
                return found
    return None


def read_surfaces(path: Path) -> tuple[list[tuple], list[str]]:
    """Of each part, corners (N, 3, 3) and what `read_surface` returns; the names of the files asked for."""
    import trimesh  # here, because only meshes need it
    from trimesh.resolvers import FilePathResolver
    from trimesh.visual import color

    asked, lost, surfaces, gltf = [], [], [], path.suffix.lower() in (".glb", ".gltf")
    resolver, log, colors = FilePathResolver(str(path)), trimesh.util.log, cast(Any, color)
    to_rgba = colors.to_rgba

    def get(name: str) -> bytes:
        asked.append(name)
        if (found := find_beside(path, name)) is None:
            raise FileNotFoundError(f"{name} is missing")
        return found.read_bytes()

    def listen(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if re.match("(failed|unable) to .*(image|texture|color|mesh)|.image/ktx2", message):
            lost.append(record.exc_info[1] if record.exc_info else message)
        return False  # nothing is printed

    def exact_rgba(values: Any, *args: Any, **kwargs: Any) -> Any:  # trimesh takes 0 for a NaN, 0 for 256
        if values is not None and not np.isfinite(values).all():
            lost.append("a number is not finite")
        if isinstance(values, np.ndarray) and values.dtype == np.uint16:
            values = values / 65535  # of floats it takes 1 for the largest
        return to_rgba(values, *args, **kwargs)

    resolver.get, colors.to_rgba = get, exact_rgba
    log.setLevel(logging.DEBUG)  # without a texture trimesh goes on, and only its debug log knows
    log.addFilter(listen)
    try:
        scene: Any = trimesh.load(str(path), process=False, force="scene", resolver=resolver)
    finally:
        colors.to_rgba = to_rgba
        log.removeFilter(listen)
        log.setLevel(logging.NOTSET)
    if lost:
        raise ValueError(f"a texture or colour: {lost[0]}")
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        mesh = scene.geometry[name]
        if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
            matrix = torch.tensor(transform.tolist(), dtype=torch.float64)
            corner = torch.as_tensor(mesh.vertices)[torch.as_tensor(mesh.faces)]
            surfaces.append((corner @ matrix[:3, :3].T + matrix[:3, 3], *read_surface(mesh, gltf)))
    if not surfaces:
        raise ValueError("no triangles")
    return surfaces, asked


def to_frame(corner: Tensor, up: str) -> Tensor:  # (N, 3, 3) -> the same
    """Centred, scaled to [-0.9, 0.9]^3, Y up."""
    low, high = corner.flatten(0, 1).amin(0), corner.flatten(0, 1).amax(0)
    extent = float((high - low).max())
    if not 0 < extent < math.inf:
        raise ValueError(f"the largest extent is {extent}")
    corner = ((corner - (low + high) / 2) * (1.8 / extent)).float()
    if up == "z":
        corner = torch.stack([corner[..., 0], corner[..., 2], -corner[..., 1]], -1)
    return corner


def read_texels(image: Image.Image | None, corner: Tensor, uv: Tensor, pixels: int) -> Tensor:
    """The texture of a part, (N, 3, 3) and (N, 3, 2) -> (height, width, 4); without one, a white texel.

    At most as fine as the pixels: a finer one would sparkle."""
    image = Image.new("RGBA", (1, 1), "white") if image is None else image.convert("RGBA")
    # Mip-map: compare the area in texels with that in pixels.
    edge, edge_uv = corner[:, 1:] - corner[:, :1], uv[:, 1:] - uv[:, :1]
    area = torch.linalg.cross(edge[:, 0], edge[:, 1]).norm(dim=-1).sum() * (pixels / 2) ** 2
    area_uv = torch.det(edge_uv).abs().sum() * image.width * image.height
    level = int(0.5 * math.log2(max(float(area_uv / area), 1))) if area > 0 else 0
    if level:
        image = image.reduce(min(2**level, image.width, image.height))
    return torch.from_numpy(np.array(image)).float() / 255


def normals(corner: Tensor) -> tuple[Tensor, Tensor]:  # (N, 3, 3) -> (N, 3) of faces, (N, 3, 3) of corners
    """A corner's normal is the mean of the faces that meet there, unless it is far off (26 degrees): an edge.

    Corners at the same place are one vertex: files split vertices at texture seams."""
    area = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])  # weighs the mean
    face = F.normalize(area, dim=-1)
    place = ((corner.flatten(0, 1) + 1) * 2**19).long()
    _, vertex = torch.unique((place[:, 0] << 42) | (place[:, 1] << 21) | place[:, 2], return_inverse=True)
    sums = torch.zeros(int(vertex.max()) + 1, 3).index_add_(0, vertex, area.repeat_interleave(3, 0))
    smooth = F.normalize(sums[vertex].view_as(corner), dim=-1)
    creased = (smooth * face[:, None]).sum(-1, keepdim=True) < 0.9
    return face, torch.where(creased, face[:, None], smooth)


def load_mesh(path: Path, up: str, pixels: int) -> tuple[dict[str, Tensor], list[str]]:
    """All N triangles of a file, all textures in one row of texels; the names of the files it asked for."""
    with explained(f"{path}: cannot be drawn, expected a whole .glb, .gltf or .obj beside its textures."):
        regular(path).close()
        surfaces, asked = read_surfaces(path)
        corners, colors, textures, uvs, thresholds = zip(*surfaces)
        corner, count = to_frame(torch.cat(corners), up), torch.tensor([len(part) for part in corners])
        parts = zip(textures, corner.split(count.tolist()), uvs)
        images = [read_texels(*part, pixels) for part in parts]
        first = np.cumsum([0, *(image[..., 0].numel() for image in images)])
        places = [(i, image.shape[1], image.shape[0]) for i, image in zip(first, images)]
        face, normal = normals(corner)
    return {
        "corner": corner,  # (N, 3, 3)
        "face": face,  # (N, 3)
        "normal": normal,  # (N, 3, 3)
        "color": torch.cat(colors),  # (N, 3, 4)
        "uv": torch.cat(uvs),  # (N, 3, 2)
        "place": torch.tensor(places).repeat_interleave(count, 0),  # (N, 3) first texel, width, height
        "threshold": torch.tensor(thresholds).repeat_interleave(count),  # (N,)
        "texels": torch.cat([image.flatten(0, 1) for image in images]),  # (all texels, 4)
    }, asked


# --- drawing: the z-buffer of render.py with triangles ---

BLOCK = 2**22  # candidate pixels at a time: they bound the memory


def surface_color(mesh: dict[str, Tensor], tri: Tensor, weight: Tensor) -> Tensor:  # (F,), (F, 3) -> (F, 4)
    """sRGB and alpha at barycentric weights: texture (nearest texel, repeats) times corner colours."""
    u, v = (mesh["uv"][tri] * weight[..., None]).sum(1).unbind(1)
    start, width, height = mesh["place"][tri].unbind(1)
    column = (u * width).floor().long().remainder(width)
    row = ((1 - v) * height).floor().long().remainder(height)  # v points up, rows go down
    return mesh["texels"][start + row * width + column] * (mesh["color"][tri] * weight[..., None]).sum(1)


def draw_mesh(mesh: dict[str, Tensor], size: int) -> Tensor:  # (V, 3, size, size) uint8
    """All views of what `load_mesh` returned."""
    S = size * ANTIALIAS
    pixel, depth = project(mesh["corner"], S)  # (V, N, 3, 2), (V, N, 3)
    image = torch.ones(len(VIEWS), S * S, 3)
    # A z-buffer cannot blend. An alpha of 0.5 covers every second sub-pixel, which the averaging then mixes.
    screen_door = torch.tensor([[0.125, 0.625], [0.875, 0.375]])
    for view in range(len(VIEWS)):
        # Barycentric weights are affine in the pixel: w = G (q - a), G the inverse of the edge matrix.
        a, b, c = pixel[view].unbind(1)  # (N, 2)
        (bx, by), (cx, cy) = (b - a).unbind(1), (c - a).unbind(1)
        det = bx * cy - by * cx
        g1, g2 = torch.stack([cy, -cx], 1) / det[:, None], torch.stack([-by, bx], 1) / det[:, None]
        low = (pixel[view].amin(1) - 0.5).ceil().long()  # `to_frame` leaves a margin
        high = (pixel[view].amax(1) + 0.5).floor().long()
        high = torch.where(det[:, None].abs() > 1e-12, high, low)  # seen edge on: nothing to draw
        count = (high - low).clamp(min=0).prod(1).cumsum(0)
        found = []
        for block in range(int(count[-1]) // BLOCK + 1):
            inside = (count // BLOCK == block).nonzero()[:, 0]
            tri, column, row = fragments(low[inside], high[inside])
            tri = inside[tri]
            q = torch.stack([column, row], 1) + 0.5 - a[tri]
            w1, w2 = (q * g1[tri]).sum(1), (q * g2[tri]).sum(1)
            kept = ((w1 >= 0) & (w2 >= 0) & (w1 + w2 <= 1)).nonzero()[:, 0]
            tri, column, row = tri[kept], column[kept], row[kept]
            weight = torch.stack([1 - w1[kept] - w2[kept], w1[kept], w2[kept]], 1)
            # Alpha before depth: else a transparent pixel of a leaf hides what is behind it.
            threshold = mesh["threshold"][tri]
            threshold = torch.where(threshold < 0, screen_door[row % 2, column % 2], threshold)
            solid = surface_color(mesh, tri, weight)[:, 3] >= threshold
            found.append((tri[solid], weight[solid], (row * S + column)[solid]))
        tri, weight, flat = (torch.cat(x) for x in zip(*found, strict=True))
        covered, seen = nearest(flat, (depth[view][tri] * weight).sum(1), S * S)
        tri, weight = tri[seen], weight[seen]
        # Files disagree about winding: a surface has two sides, each of one colour in all views that see it.
        facing = torch.where(mesh["face"][tri] @ CAMERAS[view, 2] < 0, -1.0, 1.0)
        normal = (mesh["normal"][tri] * weight[..., None]).sum(1) * facing[:, None]
        image[view, covered] = shaded(surface_color(mesh, tri, weight)[:, :3], normal)
    return to_uint8(image.view(-1, S, S, 3).permute(0, 3, 1, 2), ANTIALIAS)


def render_mesh(path: Path, size: int, up: str = "y") -> tuple[Tensor, list[str]]:  # (V, 3, size, size)
    """All views of a file, without skins and animation; the names of the files that it asked for."""
    mesh, asked = load_mesh(path, up, size * ANTIALIAS)
    views = draw_mesh(mesh, size)
    if (views == 255).all():
        raise InputError(f"{path}: nothing of it is seen, expected triangles of some size and colour.")
    return views, asked


# --- folders of meshes ---


def find_meshes(root: Path) -> dict[str, Path]:
    """The mesh files below a folder, each by the name of its object: its path, joined by "__".

    A name that two files share (also where A and a are one), or that is too long for a file, gets a digest of
    the path. A leading dot would hide the object or lead out of the folder."""
    found = (p for p in root.rglob("*") if p.suffix.lower() in (".glb", ".gltf", ".obj") and not p.is_dir())
    paths = sorted(p.relative_to(root) for p in found)
    names = ["__".join([*p.parts[:-1], p.stem]) for p in paths]
    names = [re.sub(r"^\.+|\s", "_", name) for name in names]
    count = Counter(name.lower() for name in names)
    for i, (name, path) in enumerate(zip(names, paths, strict=True)):
        if count[name.lower()] > 1 or len(os.fsencode(name)) > 200:
            names[i] = f"{name[:40]}_{digest([str(path)])}"
    return {name: root / path for name, path in zip(names, paths, strict=True)}


def mesh_made_by(path: Path, asked: list[str], size: int, up: str) -> dict:
    """All that the pictures of a mesh depend on, by content: also a file it asked for that is not there."""
    found = {name: find_beside(path, name) for name in asked}
    beside = {name: digest(p) if p else None for name, p in found.items()}
    made_by = {"size": size, "up": up, "renderer": code("render", "meshes")}
    return {**made_by, "mesh": digest(path), "beside": beside}


def update_mesh(folder: Path, path: Path, size: int, up: str) -> str:
    """Render a mesh, unless its pictures are there, made by the same files and settings. Returns why it
    cannot be drawn, or nothing."""
    made_by: dict = {}
    with suppress(InputError, OSError, TypeError, KeyError, AttributeError):  # none or damaged: made again
        made_by = mesh_made_by(path, list(load_json(folder / "made_by.json")["beside"]), size, up)
    if damage(folder, made_by):
        try:
            views, asked = render_mesh(path, size, up)
        except InputError as error:
            for name in ("made_by.json", *(f"{view}.png" for view in VIEWS)):  # what it showed before
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # there is no folder, or a user's file in it
                folder.rmdir()
            return str(error)
        made_by = mesh_made_by(path, asked, size, up)
        write_views(folder, views, made_by)
    if missing := [name for name, found in made_by["beside"].items() if not found]:
        print(f"{path}: {missing[0]!r} is missing, its parts are grey")  # without a texture it is an error
    return ""
