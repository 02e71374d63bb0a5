"""Five orthographic views of an object: cameras, a rasteriser for toys and meshes, folders of pictures.

World: Y is up, the front camera is on +Z (glTF's axes), objects fill [-0.9, 0.9]^3 of the [-1, 1] image.

In: toys (toys.py), meshes, or a folder of renders. Out: uint8 tensors (..., V, 3, size, size) on white, or such a
folder, DIR/<object>/{front,right,back,left,top}.png, the format that all files here share:

    python data.py --meshes DIR --out DIR --size 256   # renders .glb, .gltf, .obj; the same command resumes

    python data.py --toys 100 --seed 3 --out DIR       # writes toys

    python data.py --sheet toys.png                    # a picture of the toys; with --out, of that folder
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from common import InputError, cli, key_seed, keyed_generator, load_tensors, save_tensors, write_atomic
from toys import KINDS, make_toy, pack, reach, toy_kind


@dataclass(frozen=True)
class Config:
    """What to write, and where."""

    meshes: str = ""  # render every .glb, .gltf and .obj file below this folder
    toys: int = 0  # write this many procedural toys
    seed: int = 0  # of the toys: 0 training, 1 preference, 2 validation, 3 held out
    out: str = ""  # folder of renders to write; complete objects in it are kept
    size: int = 256  # pixels of a view
    up: Literal["y", "z"] = "y"  # up axis of the meshes; the front is +Z for y, -Y for z
    antialias: int = 2  # average this many sub-pixels squared
    sheet: str = ""  # write a contact sheet to this PNG: of --out, or without --out two toys of each kind


# --- cameras ---

VIEWS = ("front", "right", "back", "left", "top")

# Row 0: image right, row 1: image up, row 2: towards the camera; each as (x, y, z) of the world. The sides are in the
# order of a walk around the object: what is on the right of one view is in the middle of the next.
CAMERAS = torch.tensor(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, -1], [0, 1, 0], [1, 0, 0]],
        [[-1, 0, 0], [0, 1, 0], [0, 0, -1]],
        [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    ],
    dtype=torch.float32,
)  # (V, 3, 3)

# The light is fixed to the object, not to the camera: a point has one colour in all views, so that views of one object
# agree exactly, which is what the scorer, the matcher and the metrics look for.
LIGHT = F.normalize(torch.tensor([0.25, 0.9, 0.35]), dim=0)


def project(
    points: Tensor,  # (..., 3) world
    size: int,
) -> tuple[Tensor, Tensor]:  # (V, ..., 2) pixel (column, row), (V, ...) depth, larger is nearer
    """Orthographic projection into all five views; pixel centres lie at .5."""
    q = torch.einsum("Vij,...j->V...i", CAMERAS.to(points), points)
    return (torch.stack([q[..., 0], -q[..., 1]], -1) * 0.5 + 0.5) * size, q[..., 2]


def relative_views(views: Tensor, r: int) -> Tensor:  # (..., V, C, H, W), 0..3 -> the same shape
    """Call side VIEWS[r] the front: the frame is relative, nobody needs to know an object's true front."""
    sides = views[..., :4, :, :, :].roll(-r, dims=-4)
    # Walking a quarter turn to the right around the object turns its picture from above clockwise.
    top = torch.rot90(views[..., 4:, :, :, :], -r, dims=(-2, -1))
    return torch.cat([sides, top], dim=-4)


# --- rasterising: one row per (thing, pixel of its bounding box), then one scatter finds the nearest ---


def fragments(
    low: Tensor,  # (n, 2) int, first column and row
    high: Tensor,  # (n, 2) int, one past the last
) -> tuple[Tensor, Tensor, Tensor]:  # (F,) thing, (F,) column, (F,) row
    """Every pixel of every bounding box, flat: no loop over things, however different their sizes."""
    width, height = (high - low).clamp(min=0).unbind(1)
    count = width * height
    item = torch.repeat_interleave(torch.arange(len(count)), count)
    offset = torch.arange(len(item)) - (count.cumsum(0) - count)[item]
    return item, low[item, 0] + offset % width[item], low[item, 1] + offset // width[item]


def nearest(
    pixel: Tensor,  # (F,) flat pixel index
    depth: Tensor,  # (F,) in [-2, 2], larger is nearer
    num_pixels: int,
) -> tuple[Tensor, Tensor]:  # (P,) covered pixels, (P,) the fragment that is seen there
    """Z-buffer. Depth and fragment number share one integer, so that the maximum is the same in every run."""
    key = (((depth.double() + 2) * 2**28).long() << 32) | torch.arange(len(depth))
    best = torch.full((num_pixels,), -1).scatter_reduce_(0, pixel, key, "amax")
    covered = (best >= 0).nonzero()[:, 0]
    return covered, best[covered] & 0xFFFFFFFF


def to_uint8(image: Tensor, factor: int) -> Tensor:  # (N, 3, H, W) in [0, 1] -> (N, 3, H / factor, W / factor)
    """Anti-aliasing: average factor x factor sub-pixels and round."""
    return (F.avg_pool2d(image, factor) * 255).round().to(torch.uint8)


def shaded(color: Tensor, normal: Tensor, light: Tensor = LIGHT) -> Tensor:  # (F, 3), (F, 3), (3,) -> (F, 3)
    """Diffuse light on normals of any length; what is turned away keeps 0.4 of its colour, never black."""
    return (color * (0.7 + 0.3 * F.normalize(normal, dim=-1) @ light)[:, None]).clamp(0, 1)


# --- toys: rays against the primitives of toys.py ---


def render_primitives(
    objects: list[dict[str, Tensor]],  # as `pack` returns them
    size: int,
    antialias: int = 2,
    light: Tensor = LIGHT,
) -> Tensor:  # (B, V, 3, size, size) uint8
    """Exact orthographic ray casting of all primitives of all objects in all views at once."""
    S, B, V = size * antialias, len(objects), len(VIEWS)
    prim = {k: torch.cat([o[k] for o in objects]) for k in objects[0]}
    owner = torch.repeat_interleave(torch.arange(B), torch.tensor([len(o["half"]) for o in objects]))
    n = len(owner)

    # Unit frame of a primitive: p = turn^T (o - center) / half. The ray's direction gets the same map and is not made
    # unit length again, so that t stays a distance in the world and primitives can be compared.
    to_unit = prim["turn"].mT / prim["half"][:, :, None]  # (n, 3, 3)
    right, up, toward = (torch.einsum("nij,Vj->nVi", to_unit, CAMERAS[:, i]) for i in range(3))
    start = 2 * toward - torch.einsum("nij,nj->ni", to_unit, prim["center"])[:, None]  # rays start at depth 2
    v = torch.where(toward.abs() < 1e-6, 1e-6, -toward)  # not 0: the slabs divide by it
    table = torch.cat([start, right, up, v, prim["quadric"][:, None].expand(n, V, 3)], -1)
    table = table.reshape(n * V, 15).T.contiguous()  # (15, n V)

    extent = torch.einsum("Vij,nj->nVi", CAMERAS[:, :2].abs(), reach(prim)).reshape(n * V, 2) * 0.5 * S
    middle = project(prim["center"], S)[0].transpose(0, 1).reshape(n * V, 2)
    low = (middle - extent - 0.5).ceil().long().clamp(0, S)
    high = (middle + extent - 0.5).floor().long().add(1).clamp(0, S)
    item, column, row = fragments(low, high)

    start, right, up, v, quadric = table.index_select(1, item).view(5, 3, -1)  # (3, F) each
    image_x, image_y = (column + 0.5) * (2 / S) - 1, 1 - (row + 0.5) * (2 / S)
    p = start + image_x * right + image_y * up
    # Slabs: the ray is inside the cube from the last of three entries to the first of three exits.
    inverse = 1 / v
    middle_t, half_t = -p * inverse, inverse.abs()
    enter, side = (middle_t - half_t).max(0)
    leave = (middle_t + half_t).amin(0)
    # Quadric: a t^2 + 2 b t + c, t counted from the entry. Inside already (c <= 0): the cube's face is seen. If not,
    # t = c / (sqrt(b^2 - a c) - b), the form of the first root that also holds for a <= 0 (cones, tubes end on).
    (x, y, z), (vx, vy, vz), (e, m, k) = p + enter * v, v, quadric
    radius = m + k * y
    a = vx * vx + vz * vz + (e - k * k) * vy * vy
    b = x * vx + z * vz + e * y * vy - radius * k * vy
    c = x * x + z * z + e * y * y - radius * radius
    root = b * b - a * c
    divisor = root.clamp(min=0).sqrt() - b
    face = c <= 0
    t = torch.where(face, 0, c / divisor)
    hit = (enter < leave) & (face | ((root >= 0) & (divisor > 0) & (enter + t <= leave)))

    kept = hit.nonzero()[:, 0]
    t = (enter + t)[kept]
    item, pixel = item[kept], (row * S + column)[kept]
    pixel = pixel + (owner[item // V] * V + item % V) * (S * S)
    covered, seen = nearest(pixel, 2 - t, B * V * S * S)

    # Shade only what is seen.
    kept, t, which = kept[seen], t[seen], item[seen] // V
    x, y, z = q = p[:, kept] + t * v[:, kept]
    e, m, k = quadric[:, kept]
    curved = torch.stack([x, e * y - (m + k * y) * k, z])
    flat = F.one_hot(side[kept], 3).T * -v[:, kept].sign()
    normal = torch.where(face[kept], flat, curved)
    normal = torch.einsum("Fij,iF->Fj", to_unit[which], normal)
    odd = (((q * 0.9999 + 1) / 2 * prim["bands"][which].T).floor().sum(0) % 2) > 0
    color = torch.where(odd[:, None], prim["color2"][which], prim["color"][which])

    image = torch.ones(B * V * S * S, 3)
    image[covered] = shaded(color, normal, light)
    image = image.view(B * V, S, S, 3).permute(0, 3, 1, 2)
    return to_uint8(image, antialias).view(B, V, 3, size, size)


def make_toys(
    n: int, size: int, seed: int, antialias: int = 2, first: int = 0
) -> Tensor:  # (n, V, 3, size, size) uint8
    """Objects first..first + n - 1 of a split. Object i depends on (seed, i) alone."""
    images = torch.empty(n, len(VIEWS), 3, size, size, dtype=torch.uint8)
    chunk = max(1, 4 * 128**2 // (size * antialias) ** 2)  # objects at a time: more would leave the processor's cache
    for i in range(0, n, chunk):
        objects = [pack(make_toy(key_seed(seed, first + j))) for j in range(i, min(i + chunk, n))]
        images[i : i + chunk] = render_primitives(objects, size, antialias)
    return images


def toy_name(seed: int, i: int) -> str:
    """What object i of a split is called wherever it is written: its number, then its kind."""
    return f"{i:06d}_{toy_kind(key_seed(seed, i))}"


# --- meshes: the same z-buffer with triangles ---


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
        vertex = visual.vertex_colors if visual.kind == "vertex" else np.full((len(mesh.vertices), 4), 180, np.uint8)
    if vertex is not None:
        scale = np.iinfo(vertex.dtype).max if np.issubdtype(vertex.dtype, np.integer) else 1.0
        corner = torch.as_tensor(vertex / scale).float()[faces]
        color[..., : corner.shape[-1]] *= corner
    if gltf:
        color[..., :3] = to_srgb(color[..., :3])
    if uv is None or len(uv) != len(mesh.vertices):
        return color, None, torch.zeros(len(faces), 3, 2), threshold
    return color, texture, torch.as_tensor(uv).float()[faces], threshold


def load_mesh(path: str | Path, up: str, pixels: int) -> dict[str, Tensor]:
    """All triangles of a file, centred and scaled to [-0.9, 0.9]^3; all textures in one row of texels."""
    import trimesh
    from trimesh.resolvers import FilePathResolver

    class Resolver(FilePathResolver):
        def get(self, name: str) -> bytes:
            try:
                return super().get(name)
            except Exception:  # trimesh would draw without it and say nothing
                missing.append(name)
                raise

    missing, surfaces = [], []
    try:
        scene: Any = trimesh.load(str(path), process=False, force="scene", resolver=Resolver(str(path)))
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            mesh = scene.geometry[name]
            if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
                matrix = torch.tensor(transform.tolist(), dtype=torch.float64)
                corner = torch.as_tensor(mesh.vertices)[torch.as_tensor(mesh.faces)] @ matrix[:3, :3].T + matrix[:3, 3]
                surfaces.append((corner, *read_surface(mesh, str(path).lower().endswith(("glb", "gltf")))))
    except Exception as error:  # a parser of foreign files raises anything
        raise InputError(f"{path}: not readable as a mesh ({type(error).__name__}: {error}).") from None
    missing = [name for name in missing if not name.lower().endswith(".mtl")]  # without materials it is a bare shape
    if missing:
        raise InputError(f"{path}: its texture {missing[0]} is missing, expected it beside or below the mesh.")
    if not surfaces:
        raise InputError(f"{path}: found no triangles, expected at least one.")

    corner = torch.cat([s[0] for s in surfaces])  # (N, 3, 3)
    low, high = corner.flatten(0, 1).amin(0), corner.flatten(0, 1).amax(0)
    extent = float((high - low).max())
    if not 0 < extent < math.inf:
        raise InputError(f"{path}: its largest extent is {extent}, expected a finite positive number.")
    corner = ((corner - (low + high) / 2) * (1.8 / extent)).float()
    if up == "z":
        corner = torch.stack([corner[..., 0], corner[..., 2], -corner[..., 1]], -1)

    texels, places, first, total = [], [], 0, 0
    for own, _, texture, uv, _ in surfaces:
        xyz, first = corner[first : first + len(own)], first + len(own)
        image = texture.convert("RGBA") if texture is not None else Image.new("RGBA", (1, 1), (255, 255, 255, 255))
        # Mip-map: a texture finer than the pixels would sparkle. Compare the area in texels with that in pixels.
        edge, edge_uv = xyz[:, 1:] - xyz[:, :1], uv[:, 1:] - uv[:, :1]
        area = torch.linalg.cross(edge[:, 0], edge[:, 1]).norm(dim=-1).sum() * (pixels / 2) ** 2
        area_uv = torch.det(edge_uv).abs().sum() * image.width * image.height
        level = int(0.5 * math.log2(max(float(area_uv / area), 1))) if area > 0 else 0
        image = image.reduce(min(2**level, image.width, image.height)) if level else image
        texels.append(torch.from_numpy(np.array(image)).flatten(0, 1).float() / 255)
        places += [torch.tensor([[total, image.width, image.height]]).expand(len(own), 3)]
        total += image.width * image.height

    # Corner normals: the mean of the faces that meet there, unless it is far off (26 degrees): then it is an edge.
    # Corners at the same place are one vertex: files split vertices at texture seams.
    area = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])  # weighs the mean
    face = F.normalize(area, dim=-1)
    place = ((corner.flatten(0, 1) + 1) * 2**19).long()
    _, vertex = torch.unique((place[:, 0] << 42) | (place[:, 1] << 21) | place[:, 2], return_inverse=True)
    sums = torch.zeros(int(vertex.max()) + 1, 3).index_add_(0, vertex, area.repeat_interleave(3, 0))
    smooth = F.normalize(sums[vertex].view_as(corner), dim=-1)
    creased = (smooth * face[:, None]).sum(-1, keepdim=True) < 0.9
    return {
        "corner": corner,
        "face": face,
        "normal": torch.where(creased, face[:, None], smooth),
        "color": torch.cat([s[1] for s in surfaces]),
        "uv": torch.cat([s[3] for s in surfaces]),
        "place": torch.cat(places),
        "threshold": torch.cat([torch.full((len(s[0]),), s[4]) for s in surfaces]),
        "texels": torch.cat(texels),
    }


def surface_color(mesh: dict[str, Tensor], tri: Tensor, weight: Tensor) -> Tensor:  # (F,), (F, 3) -> (F, 4)
    """sRGB and alpha at barycentric weights: texture (nearest texel, repeated outside [0, 1]) times corner colours."""
    u, v = (mesh["uv"][tri] * weight[..., None]).sum(1).unbind(1)
    start, width, height = mesh["place"][tri].unbind(1)
    column = (u * width).floor().long().remainder(width)
    row = ((1 - v) * height).floor().long().remainder(height)  # v points up, rows go down
    return mesh["texels"][start + row * width + column] * (mesh["color"][tri] * weight[..., None]).sum(1)


def render_mesh(path: str | Path, size: int, up: str = "y", antialias: int = 2) -> Tensor:  # (V, 3, size, size) uint8
    """Five views of a .glb, .gltf or .obj file. Skins, animation and emission are ignored."""
    S = size * antialias
    mesh = load_mesh(path, up, S)
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
        low = (pixel[view].amin(1) - 0.5).ceil().long().clamp(0, S)
        high = (pixel[view].amax(1) + 0.5).floor().long().clamp(0, S)
        high = torch.where(det[:, None].abs() > 1e-12, high, low)  # seen edge on: nothing to draw
        count = (high - low).clamp(min=0).prod(1).cumsum(0)
        found = []
        for block in range(int(count[-1]) // 2**22 + 1):  # 4M candidate pixels at a time bound the memory
            inside = (count // 2**22 == block).nonzero()[:, 0]
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
            solid = torch.ones(len(tri), dtype=torch.bool)
            test = (threshold > 0).nonzero()[:, 0]
            solid[test] = surface_color(mesh, tri[test], weight[test])[:, 3] >= threshold[test]
            found.append((tri[solid], weight[solid], (row * S + column)[solid]))
        tri, weight, flat = (torch.cat(x) for x in zip(*found, strict=True))
        covered, seen = nearest(flat, (depth[view][tri] * weight).sum(1), S * S)
        tri, weight = tri[seen], weight[seen]
        # Files disagree about winding, so a surface has two sides; each keeps one colour in all views that see it.
        facing = torch.where(mesh["face"][tri] @ CAMERAS[view, 2] < 0, -1.0, 1.0)
        normal = (mesh["normal"][tri] * weight[..., None]).sum(1) * facing[:, None]
        image[view, covered] = shaded(surface_color(mesh, tri, weight)[:, :3], normal)
    return to_uint8(image.view(-1, S, S, 3).permute(0, 3, 1, 2), antialias)


# --- pictures and folders of pictures ---


def open_image(path: str | Path) -> Tensor:  # (3, H, W) uint8
    """Any picture Pillow reads; transparency is composited on white."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # phones store a photo lying and a note to turn it
            if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip instead of scaling
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a picture.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not readable as a picture ({error}). Replace or re-render it.") from None
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


def write_views(folder: str | Path, views: Tensor) -> None:
    """(V, 3, S, S) to folder/{front,right,back,left,top}.png. The folder appears whole or not at all."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    for name, view in zip(VIEWS, views, strict=True):
        write_png(partial / f"{name}.png", view)
    if folder.exists():
        for name in VIEWS:
            (partial / f"{name}.png").replace(folder / f"{name}.png")
        partial.rmdir()
    else:
        partial.rename(folder)


def missing_views(folder: Path) -> list[str]:
    """Which of the five views a folder lacks."""
    return [v for v in VIEWS if not (folder / f"{v}.png").is_file()]


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
    folder = Path(folder)
    content = f"expected <object>/{{{','.join(VIEWS)}}}.png in it"
    remedy = "Re-render: python data.py --meshes DIR --out DIR"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, {content}. {remedy}")
    objects = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(missing_views(folder)) < len(VIEWS):
        objects = [folder]
    if not objects:
        raise InputError(f"{folder}: found no object, {content}. {remedy}")
    for path in objects:  # all of them now, not after an hour of training
        if missing := missing_views(path):
            found = ", ".join(v for v in VIEWS if v not in missing) or "no view"
            raise InputError(f"{path}: found {found}; expected {', '.join(missing)} too. {remedy}")
        for view in VIEWS:
            check_png(path / f"{view}.png")
    return [p.name for p in objects], Views(objects, size)


def check_png(path: Path) -> None:
    """Square and whole, from its first and last bytes only."""
    try:
        with Image.open(path) as image:
            width, height = image.size
        with open(path, "rb") as file:
            file.seek(-12, 2)
            whole = file.read()[4:8] == b"IEND"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        whole, width, height = False, 0, 0
    if not whole:
        raise InputError(f"{path}: truncated or not a PNG, expected a whole PNG. Delete its folder and re-render it.")
    if width != height:
        raise InputError(f"{path}: {width} x {height} pixels, expected a square. Pad or re-render it.")


# --- splits ---

SPLITS = {"train": 0, "preference": 1, "validation": 2, "heldout": 3}  # the seed of make_toys


def split_of(ids: list[str], split: str) -> list[str]:
    """The objects of a folder that belong to a split: N of them shuffled once by a fixed key, then cut.

    The first fifth, rounded up (64 at most), validates, the second fifth (200 at most) is held out, and the rest both
    trains and is the preference set, as in the paper (App. B).
    """
    order = torch.randperm(len(ids), generator=keyed_generator(0)).tolist()
    fifth = -(-len(ids) // 5)  # rounded up
    held = [min(64, fifth), min(200, fifth)]
    part = {"validation": order[: held[0]], "heldout": order[held[0] : sum(held)]}.get(split, order[sum(held) :])
    if not part:
        raise InputError(f"{len(ids)} objects leave none for the {split} split, expected 3 or more objects.")
    return [ids[i] for i in part]


def load_split(
    source: str,  # "toys" or a folder of renders
    split: str,  # a key of SPLITS
    n: int,
    size: int,
    cache: str | Path = "out/data",
) -> Tensor:  # (n or fewer, V, 3, size, size) uint8
    """The first n objects of a split, in memory. Toys are rendered once and cached. Toys' four splits
    are disjoint; of a folder, train and preference are one (split_of)."""
    if source == "toys":
        path = Path(cache) / f"toys_{split}_{n}_{size}.safetensors"
        if not path.is_file():
            bar = tqdm(range(0, n, 64), desc=f"{n} {split} toys", leave=False, disable=None)
            parts = [make_toys(min(64, n - i), size, SPLITS[split], first=i) for i in bar]
            save_tensors(path, {"views": torch.cat(parts)})
        return load_tensors(path)["views"]
    views = lazy_split(source, split, n, size)
    bar = tqdm(range(len(views)), desc=f"read {split} renders", leave=False, disable=None)
    return torch.stack([views[i] for i in bar])


def lazy_split(source: str, split: str, n: int, size: int) -> Views:
    """The same of a folder of renders, left on disk until indexed: 100,000 objects at 512 px would be 390 GB."""
    ids, views = load_views(source, size)
    folders = dict(zip(ids, views.folders, strict=True))
    return Views([folders[name] for name in split_of(ids, split)[:n]], size)


# --- command line ---


def render_folder(cfg: Config) -> tuple[int, list[str]]:
    """Render what is not there yet. Returns how many objects are there now, and why each missing one is."""
    root, out = Path(cfg.meshes), Path(cfg.out)
    if not root.is_dir():
        raise InputError(f"--meshes {root}: no such folder, expected one with .glb, .gltf or .obj files.")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".glb", ".gltf", ".obj"))
    if not paths:
        raise InputError(f"--meshes {root}: found no .glb, .gltf or .obj file, expected at least one.")
    names = ["__".join(p.relative_to(root).with_suffix("").parts) for p in paths]
    count, skipped = Counter(names), []  # chair.obj beside chair.glb: both get their suffix
    names = [f"{n}_{p.suffix[1:].lower()}" if count[n] > 1 else n for n, p in zip(names, paths, strict=True)]
    for name, path in tqdm(list(zip(names, paths, strict=True)), desc="meshes", disable=None):
        if not missing_views(out / name):
            continue
        try:
            write_views(out / name, render_mesh(path, cfg.size, cfg.up, cfg.antialias))
        except InputError as error:
            skipped.append(str(error))
    return len(paths) - len(skipped), skipped


def write_sheet(path: str | Path, names: list[str], views: list[Tensor], columns: int = 3) -> None:
    """A contact sheet: five views of each object side by side, its name above."""
    S, label = views[0].shape[-1], 14
    rows = math.ceil(len(names) / columns)
    sheet = Image.new("RGB", (columns * (5 * S + 8), rows * (S + label)), (255, 255, 255))
    for i, (name, strip) in enumerate(zip(names, views, strict=True)):
        x, y = i % columns * (5 * S + 8), i // columns * (S + label)
        ImageDraw.Draw(sheet).text((x + 4, y + 1), name[: S // 2], fill=(90, 90, 90))
        sheet.paste(Image.fromarray(strip.permute(2, 0, 3, 1).flatten(1, 2).contiguous().numpy()), (x, y + label))
    write_atomic(path, lambda p: sheet.save(p, optimize=True))


def main(cfg: Config) -> dict:
    """Render meshes or toys into `cfg.out`, then draw the sheet."""
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    if not (cfg.meshes or cfg.toys or cfg.sheet):
        raise InputError("nothing to do: got none of --meshes, --toys, --sheet; expected one. See --help.")
    if (cfg.meshes or cfg.toys) and (bool(cfg.meshes) == bool(cfg.toys) or not cfg.out):
        raise InputError("expected --out DIR and either --meshes DIR or --toys N.")
    if cfg.size < 8 or cfg.antialias < 1 or cfg.toys < 0:
        raise InputError(f"--size {cfg.size} --antialias {cfg.antialias} --toys {cfg.toys}: expected at least 8, 1, 0.")

    result: dict = {"objects": cfg.toys, "skipped": []}
    if cfg.meshes:
        result["objects"], result["skipped"] = render_folder(cfg)
        for line in result["skipped"]:
            print("skipped " + " ".join(line.split()))
        if not result["objects"]:
            raise InputError(f"--meshes {cfg.meshes}: none of {len(result['skipped'])} files could be rendered.")
        print(f"{cfg.out}: {result['objects']} objects, {len(result['skipped'])} skipped")
    for i in tqdm(range(cfg.toys), desc="toys", disable=None):
        folder = Path(cfg.out) / toy_name(cfg.seed, i)
        if missing_views(folder):
            write_views(folder, make_toys(1, cfg.size, cfg.seed, cfg.antialias, first=i)[0])
    if cfg.toys:
        first, last = toy_name(cfg.seed, 0), toy_name(cfg.seed, cfg.toys - 1)
        print(f"{cfg.out}: {cfg.toys} toys, {first} to {last}")

    if cfg.sheet and cfg.out:
        names, views = load_views(cfg.out, cfg.size)
        write_sheet(cfg.sheet, names[:24], [views[i] for i in range(min(24, len(views)))])
    elif cfg.sheet:
        kinds = [toy_kind(key_seed(cfg.seed, i)) for i in range(40 * len(KINDS))]
        chosen = [i for kind in KINDS for i in [i for i, k in enumerate(kinds) if k == kind.__name__][:2]]
        views = [make_toys(1, cfg.size, cfg.seed, cfg.antialias, first=i)[0] for i in chosen]
        write_sheet(cfg.sheet, [toy_name(cfg.seed, i) for i in chosen], views, columns=4)
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
