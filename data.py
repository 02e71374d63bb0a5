"""Five orthographic views of an object: cameras, procedural toys, meshes, folders of pictures.

World: Y is up, the front camera is on +Z (glTF's axes), objects fill [-0.9, 0.9]^3 of the [-1, 1] image.

A folder of renders, DIR/<object>/{front,right,back,left,top}.png, is the format that all files here share:

    python data.py --meshes DIR --out DIR --size 256   # renders .glb, .gltf, .obj; the same command resumes

    python data.py --toys 100 --seed 3 --out DIR       # writes toys

    python data.py --sheet toys.png                    # a picture of the toys; with --out, of that folder
"""

import math
from collections import Counter
from collections.abc import Callable
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

# Row 0: image right, row 1: image up, row 2: towards the camera; each as (x, y, z) of the world. The sides
# are in the order of a walk around the object: what is on the right of one view is in the middle of the
# next.
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

# The light is fixed to the object, not to the camera: a point has one colour in all views, so that views of
# one object agree exactly, which is what the scorer, the matcher and the metrics look for.
LIGHT = F.normalize(torch.tensor([0.25, 0.9, 0.35]), dim=0)


def project(
    points: Tensor,  # (..., 3) world
    size: int,
) -> tuple[Tensor, Tensor]:  # (V, ..., 2) pixel (column, row), (V, ...) depth, larger is nearer
    """Orthographic projection into all five views; pixel centres lie at .5."""
    q = torch.einsum("Vij,...j->V...i", CAMERAS.to(points), points)
    return (torch.stack([q[..., 0], -q[..., 1]], -1) * 0.5 + 0.5) * size, q[..., 2]


def relative_views(
    views: Tensor,  # (..., V, C, H, W)
    r: int,  # 0..3, index of a side in VIEWS
) -> Tensor:  # the same shape
    """Call side r the front: the frame is relative, nobody needs to know an object's true front."""
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


def to_uint8(
    image: Tensor,  # (N, 3, H, W) in [0, 1]
    factor: int,  # anti-aliasing: average factor x factor pixels
) -> Tensor:  # (N, 3, H / factor, W / factor)
    """Average the sub-pixels and round."""
    return (F.avg_pool2d(image, factor) * 255).round().to(torch.uint8)


# --- toys: analytic primitives ---

# A primitive is a body inside the unit cube, stretched by `half`, turned, and moved to `center`. All shapes
# are
#   { |x|, |y|, |z| <= 1 }  and  { x^2 + z^2 + e y^2 <= (m + k y)^2 }        quadric = (e, m, k)
# A box takes a quadric that contains the cube; `taper` is a tube's radius on top (1 cylinder, 0 cone).


def ball(center, half, color, **more) -> dict:
    """An ellipsoid."""
    return {"center": center, "half": half, "color": color, "quadric": (1, 1, 0), **more}


def box(center, half, color, **more) -> dict:
    """A box."""
    return {"center": center, "half": half, "color": color, "quadric": (0, 2, 0), **more}


def tube(center, half, color, taper=1.0, **more) -> dict:
    """A cylinder, cone or frustum; half[1] is along its axis."""
    quadric = (0, (1 + taper) / 2, (taper - 1) / 2)
    return {"center": center, "half": half, "color": color, "quadric": quadric, **more}


def rotation(axis: str, degrees: float) -> Tensor:
    """(3, 3) right-handed rotation about one world axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }
    return torch.tensor(rows[axis], dtype=torch.float32)


def pack(primitives: list[dict]) -> dict[str, Tensor]:
    """One tensor per property, first dimension the primitives."""
    rows = {
        "center": [p["center"] for p in primitives],
        "half": [p["half"] for p in primitives],
        "quadric": [p["quadric"] for p in primitives],
        "color": [p["color"] for p in primitives],
        "color2": [p.get("color2", p["color"]) for p in primitives],
        "bands": [p.get("bands", (0, 0, 0)) for p in primitives],  # odd number of stripes along x, y, z; 0 for none
    }
    packed = {k: torch.tensor(v, dtype=torch.float32) for k, v in rows.items()}
    turns = [p.get("turn") for p in primitives]  # None, or (axis, degrees)
    packed["turn"] = torch.stack([torch.eye(3) if t is None else rotation(*t) for t in turns])
    return packed


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

    # Unit frame of a primitive: p = turn^T (o - center) / half. The ray's direction gets the same map and
    # is not made unit length again, so that t stays a distance in the world and primitives can be compared.
    to_unit = prim["turn"].mT / prim["half"][:, :, None]  # (n, 3, 3)
    right, up, toward = (torch.einsum("nij,Vj->nVi", to_unit, CAMERAS[:, i]) for i in range(3))
    start = 2 * toward - torch.einsum("nij,nj->ni", to_unit, prim["center"])[:, None]  # rays start at depth 2
    v = torch.where(toward.abs() < 1e-6, 1e-6, -toward)  # not 0: the slabs divide by it
    table = torch.cat([start, right, up, v, prim["quadric"][:, None].expand(n, V, 3)], -1)
    table = table.reshape(n * V, 15).T.contiguous()  # (15, n V)

    # Bounding boxes: a turned box reaches the sum of its three half-edges, an ellipsoid their Euclidean
    # norm.
    edges = torch.einsum("Vki,nij->nVkj", CAMERAS, prim["turn"] * prim["half"][:, None]).abs()
    reach = torch.where(prim["quadric"][:, None, None, 0] > 0, edges.norm(dim=-1), edges.sum(-1))[..., :2]
    middle, _ = project(prim["center"], S)  # (V, n, 2)
    middle, reach = middle.transpose(0, 1).reshape(n * V, 2), reach.reshape(n * V, 2) * 0.5 * S
    low = (middle - reach - 0.5).ceil().long().clamp(0, S)
    high = (middle + reach - 0.5).floor().long().add(1).clamp(0, S)
    item, column, row = fragments(low, high)

    px, py, pz, rx, ry, rz, ux, uy, uz, vx, vy, vz, e, m, k = table.index_select(1, item)
    image_x, image_y = (column + 0.5) * (2 / S) - 1, 1 - (row + 0.5) * (2 / S)
    p = torch.stack(
        [px + image_x * rx + image_y * ux, py + image_x * ry + image_y * uy, pz + image_x * rz + image_y * uz]
    )
    v = torch.stack([vx, vy, vz])
    # Slabs: the ray is inside the cube from the last of three entries to the first of three exits.
    inverse = 1 / v
    middle_t, half_t = -p * inverse, inverse.abs()
    enter, side = (middle_t - half_t).max(0)
    leave = (middle_t + half_t).amin(0)
    # Quadric: a t^2 + 2 b t + c, t counted from the entry. Inside already (c <= 0): the cube's face is
    # seen. If not, t = c / (sqrt(b^2 - a c) - b), the form of the first root that also holds for a <= 0
    # (cones, tubes end on).
    x, y, z = p + enter * v
    vx, vy, vz = v
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
    x, y, z = p[:, kept] + t * v[:, kept]
    e, m, k = e[kept], m[kept], k[kept]
    curved = torch.stack([x, e * y - (m + k * y) * k, z])
    flat = F.one_hot(side[kept], 3).T * -v[:, kept].sign()
    normal = torch.where(face[kept], flat, curved)
    normal = torch.einsum("Fij,iF->Fj", to_unit[which], normal)
    shade = 0.7 + 0.3 * F.normalize(normal, dim=-1) @ light
    bands = prim["bands"][which].T  # stripes are centred: an odd number is symmetric
    odd = (((torch.stack([x, y, z]) * 0.9999 + 1) / 2 * bands).floor().sum(0) % 2) > 0
    color = torch.where(odd[:, None], prim["color2"][which], prim["color"][which]) * shade[:, None]

    image = torch.ones(B * V * S * S, 3)
    image[covered] = color.clamp(0, 1)
    image = image.view(B * V, S, S, 3).permute(0, 3, 1, 2)
    return to_uint8(image, antialias).view(B, V, 3, size, size)


# --- toys: what a child would recognise ---

# Far from white (a mask is "smallest channel < 0.9") and from each other. Unseen sides must be predictable
# from one view, so an object has two of these colours, the same all around.
PALETTE = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.50, 0.10),
    "yellow": (0.95, 0.80, 0.15),
    "green": (0.25, 0.65, 0.25),
    "teal": (0.10, 0.65, 0.65),
    "blue": (0.15, 0.40, 0.85),
    "purple": (0.50, 0.25, 0.70),
    "pink": (0.95, 0.45, 0.65),
    "brown": (0.55, 0.33, 0.15),
    "grey": (0.50, 0.50, 0.55),
}
DARK, GLASS, GOLD, FLAME = (0.12, 0.12, 0.16), (0.45, 0.75, 0.90), (0.95, 0.80, 0.15), (0.95, 0.50, 0.10)

# Each kind is a fixed layout; a and b are its colours, u(low, high) draws a proportion. `for x in (-1, 1)`
# is the mirror symmetry of real things; eyes, doors and handles are on one side only.


def bear(a, b, u) -> list[dict]:
    """Face, belly and paws in front, a tail behind; short ears make a bear, long ones a rabbit."""
    w, head, ear = u(0.9, 1.15), u(0.9, 1.1), u(0.13, 0.32)
    parts = [
        ball((0, -0.45, 0), (0.42 * w, 0.46, 0.36 * w), a),
        ball((0, -0.45, 0.14 * w), (0.28 * w, 0.34, 0.27 * w), b),
        ball((0, 0.3, 0), (0.42 * head, 0.36, 0.36 * head), a),
        ball((0, 0.2, 0.26 * head), (0.2, 0.15, 0.2), b),
        ball((0, 0.27, 0.43 * head), (0.08, 0.07, 0.07), DARK),
        ball((0, -0.65, -0.36 * w), (0.13, 0.13, 0.13), b),
    ]
    for x in (-1, 1):
        parts += [
            ball((0.27 * x, 0.6 + ear * 0.7, 0), (0.14, ear, 0.1), a),
            ball((0.16 * x, 0.4, 0.3 * head), (0.075, 0.09, 0.08), DARK),
            ball((0.46 * w * x, -0.3, 0.12), (0.13, 0.27, 0.15), a),
            ball((0.24 * w * x, -0.85, 0.18), (0.17, 0.13, 0.26), a),
        ]
    return parts


def duck(a, b, u) -> list[dict]:
    """Beak and eyes in front, a tail up behind, wings on the sides."""
    long, head, neck = u(0.55, 0.65), u(0.3, 0.36), u(0.3, 0.42)
    z = long * 0.55
    parts = [
        ball((0, -0.35, 0), (0.5, 0.38, long), a),
        tube((0, 0.0, -long * 0.9), (0.22, 0.25, 0.16), a, taper=0.2, turn=("x", -35)),
        tube((0, neck - 0.3, z * 0.9), (0.17, 0.3, 0.17), a),
        ball((0, neck, z), (head, head, head), a),
        tube((0, neck - 0.05, z + head + 0.1), (0.17, 0.16, 0.09), FLAME, taper=0.5, turn=("x", 90)),
    ]
    for x in (-1, 1):
        parts += [
            ball((head * 0.6 * x, neck + 0.1, z + head * 0.7), (0.07, 0.08, 0.07), DARK),
            ball((0.46 * x, -0.28, -0.1), (0.1, 0.22, long * 0.6), b),
            ball((0.2 * x, -0.72, 0.1), (0.15, 0.07, 0.25), FLAME),
        ]
    return parts


def dog(a, b, u) -> list[dict]:
    """Head in front, tail up behind, four legs, hanging ears of the second colour."""
    long, leg, head = u(0.4, 0.52), u(0.17, 0.26), u(0.36, 0.42)
    y, z = head * 0.9 + 0.05, long * 0.8
    parts = [
        ball((0, -0.15, 0), (0.36, 0.3, long), a),
        ball((0, y, z), (head, head, head * 0.9), a),
        ball((0, y - 0.1, z + head * 0.8), (0.17, 0.14, 0.22), b),
        ball((0, y - 0.03, z + head * 0.8 + 0.19), (0.08, 0.07, 0.07), DARK),
        tube((0, 0.2, -long - 0.05), (0.09, 0.26, 0.09), b, turn=("x", -30)),
    ]
    for x in (-1, 1):
        parts += [
            ball((head * 0.45 * x, y + 0.12, z + head * 0.75), (0.075, 0.085, 0.075), DARK),
            ball((head * x, y, z - 0.05), (0.1, 0.25, 0.14), b),
            tube((0.2 * x, -0.3 - leg, long * 0.55), (0.13, leg, 0.13), a),
            tube((0.2 * x, -0.3 - leg, -long * 0.55), (0.13, leg, 0.13), a),
        ]
    return parts


def car(a, b, u) -> list[dict]:
    """Yellow headlights in front, red ones behind, a cabin of glass under a roof."""
    w, long, tall = u(0.5, 0.6), u(0.75, 0.88), u(0.18, 0.26)
    wheel, z = u(0.22, 0.27), -0.12
    parts = [
        box((0, -0.15, 0), (w, 0.2, long), a),
        box((0, 0.05 + tall, z), (w * 0.85, tall, long * 0.5), GLASS),
        box((0, 0.1 + 2 * tall, z), (w * 0.9, 0.07, long * 0.53), b),
        box((0, -0.27, long), (w * 1.02, 0.08, 0.06), b),
        box((0, -0.27, -long), (w * 1.02, 0.08, 0.06), b),
    ]
    for x in (-1, 1):
        parts += [
            tube(((w - 0.04) * x, -0.35, long * 0.58), (wheel, 0.12, wheel), DARK, turn=("z", 90)),
            tube(((w - 0.04) * x, -0.35, -long * 0.58), (wheel, 0.12, wheel), DARK, turn=("z", 90)),
            tube((w * 0.65 * x, -0.07, long), (0.11, 0.05, 0.11), GOLD, turn=("x", 90)),
            box((w * 0.75 * x, -0.07, -long), (0.09, 0.07, 0.04), PALETTE["red"]),
        ]
    return parts


def train(a, b, u) -> list[dict]:
    """Boiler and lamp in front, cab behind."""
    r, cab, chimney, wheel = u(0.34, 0.4), u(0.3, 0.4), u(0.14, 0.24), 0.2
    parts = [
        box((0, -0.38, 0), (0.42, 0.1, 0.75), DARK),
        tube((0, r - 0.3, 0.2), (r, 0.5, r), a, turn=("x", 90), color2=b, bands=(0, 3, 0)),
        box((0, 0.08, -0.48), (0.46, 0.4, 0.28), a),
        box((0, 0.53, -0.48), (0.53, 0.07, cab), b),
        box((0, 0.28, -0.48), (0.48, 0.12, 0.16), GLASS),
        tube((0, 2 * r - 0.3 + chimney, 0.45), (0.15, chimney, 0.15), b),
        tube((0, r - 0.3, 0.73), (0.14, 0.06, 0.14), GOLD, turn=("x", 90)),
        box((0, -0.5, 0.75), (0.42, 0.14, 0.08), b, turn=("x", 25)),
    ]
    for x in (-1, 1):
        parts += [
            tube((0.44 * x, -0.5, z), (wheel, 0.08, wheel), PALETTE["grey"], turn=("z", 90)) for z in (-0.48, 0, 0.48)
        ]
    return parts


def house(a, b, u) -> list[dict]:
    """Door and two windows in front, one window on each side, a chimney on the right."""
    w, tall, deep = u(0.55, 0.7), u(0.35, 0.5), u(0.5, 0.6)
    roof = (w + 0.1) / math.sqrt(2)
    top = tall - 0.6
    parts = [
        box((0, -0.6, 0), (w, tall, deep), a),
        box((0, top, 0), (roof, roof, deep * 0.98), b, turn=("z", 45)),
        box((0, -0.6 - tall + 0.27, deep), (0.14, 0.27, 0.05), b),
        tube((w * 0.55, top + 0.5, -deep * 0.4), (0.1, 0.3, 0.1), PALETTE["grey"]),
    ]
    for x in (-1, 1):
        parts += [
            box((w * 0.62 * x, -0.6 + tall * 0.2, deep), (0.12, 0.12, 0.04), GLASS),
            box((w * x, -0.6, 0), (0.04, 0.14, 0.18), GLASS),
        ]
    return parts


def chair(a, b, u) -> list[dict]:
    """The back rest is at the back, the cushion has the second colour."""
    w, leg, back = u(0.42, 0.55), u(0.28, 0.4), u(0.38, 0.55)
    d = w * 0.95
    parts = [
        box((0, 0, 0), (w, 0.07, d), a),
        box((0, 0.1, 0.05), (w * 0.85, 0.06, d * 0.85), b),
        box((0, back + 0.1, -d), (w, back, 0.07), a),
        box((0, back + 0.18, -d + 0.06), (w * 0.7, back * 0.6, 0.06), b),
    ]
    return parts + [box((x * (w - 0.08), -leg, z * (d - 0.08)), (0.08, leg, 0.08), a) for x in (-1, 1) for z in (-1, 1)]


def lamp(a, b, u) -> list[dict]:
    """A striped shade; the switch is in front of the foot."""
    shade, tall, pole = u(0.45, 0.6), u(0.28, 0.4), u(0.3, 0.45)
    return [
        tube((0, -0.85, 0), (0.4, 0.08, 0.4), a),
        tube((0, pole - 0.85, 0), (0.08, pole, 0.08), a),
        tube((0, 2 * pole - 0.9 + tall, 0), (shade, tall, shade), b, taper=0.55, color2=a, bands=(0, 3, 0)),
        ball((0, 2 * pole - 0.85 + 2 * tall, 0), (0.1, 0.1, 0.1), a),
        box((0, -0.78, 0.27), (0.11, 0.08, 0.12), PALETTE["red"]),
    ]


def tree(a, b, u) -> list[dict]:
    """Three cones, a ball on top, three balls in front."""
    w, trunk = u(0.5, 0.65), u(0.12, 0.2)
    green = PALETTE["green"] if u(0, 1) < 0.5 else PALETTE["teal"]
    parts = [tube((0, -0.75, 0), (trunk, 0.2, trunk), PALETTE["brown"])]
    for i in range(3):
        r = w * (1 - 0.22 * i)
        parts.append(tube((0, -0.25 + 0.38 * i, 0), (r, 0.36, r), green, taper=0.15))
    parts += [ball((0, 0.93, 0), (0.12, 0.12, 0.12), b)]
    spots = ((-0.2, -0.32, 0.8), (0.18, 0.05, 0.6), (-0.05, 0.42, 0.45))
    return parts + [ball((x, y, z * w), (0.11, 0.11, 0.11), b) for x, y, z in spots]


def robot(a, b, u) -> list[dict]:
    """Eyes, mouth and a dial in front, a pack on its back."""
    w, head, leg = u(0.42, 0.54), u(0.34, 0.42), u(0.14, 0.22)
    parts = [
        box((0, -0.15, 0), (w, 0.36, w * 0.7), a),
        box((0, 0.48, 0), (head, 0.24, head * 0.85), a),
        box((0, 0.38, head * 0.85), (head * 0.6, 0.055, 0.03), DARK),
        tube((0, -0.12, w * 0.7), (0.17, 0.05, 0.17), b, turn=("x", 90)),
        box((0, -0.1, -w * 0.7 - 0.1), (w * 0.7, 0.24, 0.12), b),
        tube((0, 0.74, 0), (0.06, 0.08, 0.06), DARK),
        ball((0, 0.84, 0), (0.11, 0.11, 0.11), b),
    ]
    for x in (-1, 1):
        parts += [
            tube((head * 0.5 * x, 0.56, head * 0.85), (0.09, 0.05, 0.09), GOLD, turn=("x", 90)),
            box(((w + 0.12) * x, -0.15, 0), (0.1, 0.32, 0.12), b),
            box((w * 0.5 * x, -0.5 - leg, 0.03), (w * 0.35, leg, w * 0.55), b),
        ]
    return parts


def mug(a, b, u) -> list[dict]:
    """A smile in front, the handle on the right, coffee on top."""
    r, tall, reach = u(0.5, 0.6), u(0.5, 0.65), u(0.2, 0.3)
    arm = tall * 0.5
    parts = [
        tube((0, 0, 0), (r, tall, r), a),
        tube((0, tall - 0.1, 0), (r + 0.03, 0.1, r + 0.03), b),
        tube((0, tall, 0), (r * 0.8, 0.03, r * 0.8), PALETTE["brown"]),
        box((r + reach, 0, 0), (0.08, arm + 0.08, 0.1), b),
        box((r + reach / 2, arm, 0), (reach / 2 + 0.1, 0.08, 0.1), b),
        box((r + reach / 2, -arm, 0), (reach / 2 + 0.1, 0.08, 0.1), b),
        box((0, -0.22, r * 0.95), (0.17, 0.05, 0.08), DARK),
    ]
    return parts + [ball((0.2 * x, 0.08, r * 0.9), (0.08, 0.1, 0.08), DARK) for x in (-1, 1)]


def boat(a, b, u) -> list[dict]:
    """The bow is in front, the wheelhouse behind."""
    w, cabin, funnel = u(0.42, 0.5), u(0.2, 0.28), u(0.12, 0.2)
    edge = w / math.sqrt(2)
    return [
        box((0, -0.45, -0.15), (w, 0.22, 0.5), a),
        box((0, -0.45, 0.35), (edge, 0.22, edge), a, turn=("y", 45)),
        box((0, -0.2, -0.15), (w + 0.04, 0.06, 0.52), b),
        box((0, -0.2, 0.35), (edge + 0.03, 0.06, edge + 0.03), b, turn=("y", 45)),
        box((0, cabin - 0.15, -0.25), (w * 0.72, cabin, 0.32), GOLD),
        box((0, cabin - 0.08, -0.25), (w * 0.5, 0.11, 0.35), GLASS),
        box((0, cabin - 0.08, -0.2), (w * 0.75, 0.11, 0.2), GLASS),
        box((0, 2 * cabin - 0.1, -0.25), (w * 0.85, 0.06, 0.4), b),
        tube((0, 2 * cabin + funnel, -0.3), (0.17, funnel + 0.05, 0.17), a, color2=b, bands=(0, 3, 0)),
        ball((0, -0.42, 0.35 + w), (0.09, 0.09, 0.09), GOLD),
    ]


KINDS: tuple[Callable[..., list[dict]], ...] = (
    bear,
    duck,
    dog,
    car,
    train,
    house,
    chair,
    lamp,
    tree,
    robot,
    mug,
    boat,
)
SPLITS = {"train": 0, "preference": 1, "validation": 2, "heldout": 3}  # the seed of make_toys


def toy_kind(seed: int) -> str:
    """The name of the kind that `make_toy(seed)` builds."""
    return KINDS[seed % len(KINDS)].__name__


def make_toy(seed: int) -> list[dict]:
    """A kind, two colours, a few proportions, all from the seed; centred and scaled to the frame."""
    g = keyed_generator(seed)
    first, second = torch.randperm(len(PALETTE), generator=g)[:2].tolist()
    jitter = (torch.rand(2, generator=g) * 0.08 - 0.04).tolist()
    a, b = (
        tuple(min(max(c + j, 0), 1) for c in list(PALETTE.values())[i])
        for i, j in zip((first, second), jitter, strict=True)
    )
    draws = iter(torch.rand(8, generator=g).tolist())
    parts = KINDS[seed % len(KINDS)](a, b, lambda low, high: low + (high - low) * next(draws))
    packed = pack(parts)
    edges = (packed["turn"] * packed["half"][:, None]).abs()
    reach = torch.where(packed["quadric"][:, :1] > 0, edges.norm(dim=-1), edges.sum(-1))
    low, high = (packed["center"] - reach).amin(0), (packed["center"] + reach).amax(0)
    middle, scale = ((low + high) / 2).tolist(), 1.76 / float((high - low).max())
    for part in parts:
        part["center"] = tuple((c - m) * scale for c, m in zip(part["center"], middle, strict=True))
        part["half"] = tuple(h * scale for h in part["half"])
    return parts


def make_toys(
    n: int,
    size: int,
    seed: int,
    antialias: int = 2,
    first: int = 0,
) -> Tensor:  # (n, V, 3, size, size) uint8
    """Objects first..first + n - 1 of a split. Object i depends on (seed, i) alone."""
    images = torch.empty(n, len(VIEWS), 3, size, size, dtype=torch.uint8)
    # Objects at a time: more would leave the processor's cache.
    chunk = max(1, 4 * 128**2 // (size * antialias) ** 2)
    for i in range(0, n, chunk):
        objects = [pack(make_toy(key_seed(seed, first + j))) for j in range(i, min(i + chunk, n))]
        images[i : i + chunk] = render_primitives(objects, size, antialias)
    return images


def load_split(
    source: str,  # "toys" or a folder of renders
    split: str,  # a key of SPLITS
    n: int,
    size: int,
    cache: str | Path = "out/data",
) -> Tensor:  # (n or fewer, V, 3, size, size) uint8
    """The first n objects of a split. Toys are rendered once and cached; the splits never share an object.

    A folder of N renders is shuffled once by a fixed key: the first fifth (64 at most) validates, the second
    fifth (200 at most) is held out, the rest both trains and is the preference set, as in the paper (App. B).
    """
    if source == "toys":
        path = Path(cache) / f"toys_{split}_{n}_{size}.safetensors"
        if not path.is_file():
            bar = tqdm(range(0, n, 64), desc=f"{n} {split} toys", leave=False, disable=None)
            parts = [make_toys(min(64, n - i), size, SPLITS[split], first=i) for i in bar]
            save_tensors(path, {"views": torch.cat(parts)})
        return load_tensors(path)["views"]
    ids, views = load_views(source, size)
    order = torch.randperm(len(ids), generator=keyed_generator(0)).tolist()
    held = [min(64, len(ids) // 5), min(200, len(ids) // 5)]
    part = {"validation": order[: held[0]], "heldout": order[held[0] : sum(held)]}.get(split, order[sum(held) :])
    if not part:
        raise InputError(f"{source}: {len(ids)} objects leave none for the {split} split, expected 5 or more objects.")
    bar = tqdm(part[:n], desc=f"read {split} renders", leave=False, disable=None)
    return torch.stack([views[i] for i in bar])


# --- meshes: the same z-buffer with triangles ---


def to_srgb(linear: Tensor) -> Tensor:
    """glTF factors and vertex colours are linear, textures and PNGs sRGB: unconverted, GLBs are too dark."""
    curve = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curve)


def read_surface(mesh: Any, gltf: bool) -> tuple[Tensor, Image.Image | None, Tensor, float]:
    """(N, 3, 4) sRGB corner colours, texture, (N, 3, 2) coordinates, alpha threshold (0 opaque, -1 blend)."""
    visual, faces = mesh.visual, torch.as_tensor(mesh.faces)
    material = getattr(visual, "material", None)
    uv = getattr(visual, "uv", None)
    color, texture, threshold = torch.ones(len(faces), 3, 4), None, 0.0
    if gltf and material is not None:
        texture, factor = material.baseColorTexture, material.baseColorFactor
        if factor is not None:  # trimesh gives 0..255
            color = color * torch.tensor(factor / 255.0, dtype=torch.float32)
        mode = material.alphaMode or "OPAQUE"
        cutoff = 0.5 if material.alphaCutoff is None else material.alphaCutoff
        threshold = {"OPAQUE": 0.0, "MASK": cutoff, "BLEND": -1.0}[mode]
    elif material is not None:
        texture, opacity = material.image, 1.0
        if "d" in material.kwargs or "tr" in material.kwargs:
            opacity = float(material.kwargs["d"][0] if "d" in material.kwargs else 1 - float(material.kwargs["tr"][0]))
        if texture is None:  # Kd beside map_Kd is often a leftover of the exporter, black or grey
            color = color * torch.tensor(material.diffuse / 255.0, dtype=torch.float32)
        color[..., 3] = opacity
        threshold = -1.0
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

    try:
        scene: Any = trimesh.load(str(path), process=False, force="scene")
        surfaces = []
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            mesh = scene.geometry[name]
            if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
                matrix = torch.tensor(transform.tolist(), dtype=torch.float64)
                corner = torch.as_tensor(mesh.vertices)[torch.as_tensor(mesh.faces)] @ matrix[:3, :3].T + matrix[:3, 3]
                surfaces.append((corner, *read_surface(mesh, str(path).lower().endswith(("glb", "gltf")))))
    except Exception as error:  # a parser of foreign files raises anything
        raise InputError(f"{path}: not readable as a mesh ({type(error).__name__}: {error}).") from None
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
        # Mip-map: a texture finer than the pixels would sparkle. Compare the area in texels with that in
        # pixels.
        edge, edge_uv = xyz[:, 1:] - xyz[:, :1], uv[:, 1:] - uv[:, :1]
        area = torch.linalg.cross(edge[:, 0], edge[:, 1]).norm(dim=-1).sum() * (pixels / 2) ** 2
        area_uv = torch.det(edge_uv).abs().sum() * image.width * image.height
        level = int(0.5 * math.log2(max(float(area_uv / area), 1))) if area > 0 else 0
        image = image.reduce(min(2**level, image.width, image.height)) if level else image
        texels.append(torch.from_numpy(np.array(image)).flatten(0, 1).float() / 255)
        places += [torch.tensor([[total, image.width, image.height]]).expand(len(own), 3)]
        total += image.width * image.height

    # Corner normals: the mean of the faces that meet there, unless it is far off (26 degrees): then it is
    # an edge. Corners at the same place are one vertex: files split vertices at texture seams.
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


def surface_color(
    mesh: dict[str, Tensor],
    tri: Tensor,  # (F,)
    weight: Tensor,  # (F, 3) barycentric
) -> Tensor:  # (F, 4) sRGB and alpha
    """Texture (nearest texel, repeated outside of [0, 1]) times corner colours."""
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
    # A z-buffer cannot blend. An alpha of 0.5 covers every second sub-pixel, which the averaging then
    # mixes.
    screen_door = torch.tensor([[0.125, 0.625], [0.875, 0.375]])
    for view in range(len(VIEWS)):
        a, b, c = pixel[view].unbind(1)  # (N, 2)
        # Barycentric weights are affine in the pixel: w = G (q - a), G the inverse of the edge matrix.
        det = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
        g1 = torch.stack([(c - a)[:, 1], -(c - a)[:, 0]], 1) / det[:, None]
        g2 = torch.stack([-(b - a)[:, 1], (b - a)[:, 0]], 1) / det[:, None]
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
        # Files disagree about winding, so a surface has two sides; each keeps one colour in all views that
        # see it.
        facing = torch.where(mesh["face"][tri] @ CAMERAS[view, 2] < 0, -1.0, 1.0)
        normal = F.normalize((mesh["normal"][tri] * weight[..., None]).sum(1), dim=-1) * facing[:, None]
        shade = 0.7 + 0.3 * normal @ LIGHT
        image[view, covered] = (surface_color(mesh, tri, weight)[:, :3] * shade[:, None]).clamp(0, 1)
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
    remedy = "Re-render: python data.py --meshes DIR --out DIR"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected <object>/{{{','.join(VIEWS)}}}.png in it. {remedy}")
    objects = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if any((folder / f"{v}.png").exists() for v in VIEWS):
        objects = [folder]
    if not objects:
        raise InputError(f"{folder}: found no object, expected <object>/{{{','.join(VIEWS)}}}.png in it. {remedy}")
    for path in objects:  # all of them now, not after an hour of training
        found = [v for v in VIEWS if (path / f"{v}.png").is_file()]
        missing = [v for v in VIEWS if v not in found]
        if missing:
            got, lacks = ", ".join(found) or "no view", ", ".join(missing)
            raise InputError(f"{path}: found {got}; expected {lacks} too. {remedy}")
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
    twice = Counter(names)  # chair.obj beside chair.glb
    names = [
        n + (p.suffix.lower().replace(".", "_") if twice[n] > 1 else "") for n, p in zip(names, paths, strict=True)
    ]
    skipped = []
    for name, path in tqdm(list(zip(names, paths, strict=True)), desc="meshes", disable=None):
        if all((out / name / f"{v}.png").exists() for v in VIEWS):
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
    for i in tqdm(range(cfg.toys), desc="toys", disable=None):
        seed = key_seed(cfg.seed, i)
        folder = Path(cfg.out) / f"{i:06d}_{toy_kind(seed)}"
        if not all((folder / f"{v}.png").exists() for v in VIEWS):
            write_views(folder, render_primitives([pack(make_toy(seed))], cfg.size, cfg.antialias)[0])
    if cfg.out and (cfg.meshes or cfg.toys):
        print(f"{cfg.out}: {result['objects']} objects, {len(result['skipped'])} skipped")

    if cfg.sheet and cfg.out:
        names, views = load_views(cfg.out, cfg.size)
        write_sheet(cfg.sheet, names[:24], [views[i] for i in range(min(24, len(views)))])
    elif cfg.sheet:
        seeds = [key_seed(cfg.seed, i) for i in range(40 * len(KINDS))]
        chosen = [s for kind in KINDS for s in [s for s in seeds if toy_kind(s) == kind.__name__][:2]]
        views = render_primitives([pack(make_toy(s)) for s in chosen], cfg.size, cfg.antialias)
        write_sheet(cfg.sheet, [toy_kind(s) for s in chosen], list(views), columns=4)
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
