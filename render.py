"""The cameras, and how toys become pictures: a ray caster and a z-buffer.

World: Y is up, the front camera is on +Z (glTF's axes), objects lie in [-0.9, 0.9]^3 of the [-1, 1] image.

In: primitives (toys.py). Out: uint8 tensors (..., V, 3, size, size) on white. meshes.py draws triangles with
the same z-buffer; data.py is the command line.

FORK: another camera is a name in VIEWS and three axes in CAMERAS. Whatever depends on the cameras here, in
meshes.py and in data.py is derived from them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import key_seed
from toys import make_toy, pack, reach

# --- cameras ---

VIEWS = ("front", "right", "back", "left", "top")
NUM_SIDES = 4  # the first ones, a walk around the object: the right of one is the middle of the next

# Row 0: image right, row 1: image up, row 2: towards the camera; each as (x, y, z) of the world.
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

# The light is fixed to the object, not to the camera: a point has one colour in all views. So views of one
# object agree exactly, which is what the scorer, the matcher and the metrics look for.
LIGHT = F.normalize(torch.tensor([0.25, 0.9, 0.35]), dim=0)


def project(points: Tensor, size: int) -> tuple[Tensor, Tensor]:  # (..., 3) -> (V, ..., 2), (V, ...)
    """Orthographic, into all views: pixel (column, row), whose centre lies at .5; depth, larger is nearer."""
    q = torch.einsum("Vij,...j->V...i", CAMERAS.to(points), points)
    return (torch.stack([q[..., 0], -q[..., 1]], -1) * 0.5 + 0.5) * size, q[..., 2]


ANTIALIAS = 2  # the average of this many sub-pixels squared is a pixel

# --- rasterising: one row per (thing, pixel of its bounding box), then one scatter finds the nearest ---


def fragments(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (n, 2) int -> 3 of (F,)
    """Box, column and row of each pixel of n boxes low to high - 1, flat: no loop, whatever their sizes."""
    width, height = (high - low).clamp(min=0).unbind(1)
    count = width * height
    item = torch.repeat_interleave(torch.arange(len(count)), count)
    offset = torch.arange(len(item)) - (count.cumsum(0) - count)[item]
    return item, low[item, 0] + offset % width[item], low[item, 1] + offset // width[item]


def nearest(pixel: Tensor, depth: Tensor, num_pixels: int) -> tuple[Tensor, Tensor]:  # 2 (F,) -> 2 (P,)
    """Z-buffer: the pixels that are covered, and the fragment seen in each; depth lies in [-2, 2].

    Depth and fragment number share one integer, so that the maximum is the same in every run."""
    key = (((depth.double() + 2) * 2**28).long() << 32) | torch.arange(len(depth))
    best = torch.full((num_pixels,), -1).scatter_reduce_(0, pixel, key, "amax")
    covered = (best >= 0).nonzero()[:, 0]
    return covered, best[covered] & 0xFFFFFFFF


def to_uint8(image: Tensor, factor: int) -> Tensor:  # (N, 3, S, S) in [0, 1] -> (N, 3, size, size)
    """Anti-aliasing: average factor x factor sub-pixels and round."""
    return (F.avg_pool2d(image, factor) * 255).round().to(torch.uint8)


def shaded(color: Tensor, normal: Tensor, light: Tensor = LIGHT) -> Tensor:  # (F, 3), (F, 3), (3,) -> (F, 3)
    """Diffuse light on normals of any length; what is turned away keeps 0.4 of its colour, never black."""
    return (color * (0.7 + 0.3 * F.normalize(normal, dim=-1) @ light)[:, None]).clamp(0, 1)


# --- toys: rays against the primitives of toys.py ---


def render_primitives(
    objects: list[dict[str, Tensor]], size: int, antialias: int = ANTIALIAS, light: Tensor = LIGHT
) -> Tensor:  # B of what `pack` returns -> (B, V, 3, size, size) uint8
    """Exact orthographic ray casting of all primitives of all objects in all views at once."""
    S, B, V = size * antialias, len(objects), len(VIEWS)
    prim = {k: torch.cat([o[k] for o in objects]) for k in objects[0]}
    owner = torch.repeat_interleave(torch.arange(B), torch.tensor([len(o["half"]) for o in objects]))
    n = len(owner)

    # Each primitive is the unit shape in its own frame, p = turn^T (o - center) / half. The ray's direction
    # is mapped too but not made unit length: t stays a distance in the world and can be compared.
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
    # Quadric: a t^2 + 2 b t + c, t counted from the entry. Inside already (c <= 0): the cube's face is seen.
    # If not, t = c / (sqrt(b^2 - a c) - b): this form of the first root holds for a <= 0 too (cones, tubes).
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


def make_toys(n: int, size: int, seed: int, antialias: int = ANTIALIAS, first: int = 0) -> Tensor:
    """Objects first..first + n - 1 of a split, (n, V, 3, size, size). Object i depends on (seed, i) alone."""
    chunk = max(1, 4 * 128**2 // (size * antialias) ** 2)  # objects at a time: more would leave the cache
    toys = [pack(make_toy(key_seed(seed, first + j))) for j in range(n)]
    parts = [render_primitives(toys[i : i + chunk], size, antialias) for i in range(0, n, chunk)]
    return torch.cat(parts)
