"""What the toys are: twelve kinds of objects a child would recognise, made of balls, boxes and tubes.

In: a seed. Out: a list of primitives, dicts with center, half, quadric, color and perhaps turn, color2 and
bands, which `pack` makes into tensors. render.py draws them; its axes hold: Y up, front +Z.
"""

import math

import torch
from torch import Tensor

from common import keyed_generator

# --- primitives ---

# A primitive is a body inside the unit cube, stretched by `half`, turned, moved to `center`. All shapes are
#   { |x|, |y|, |z| <= 1 }  and  { x^2 + z^2 + e y^2 <= (m + k y)^2 }        quadric = (e, m, k)
# so that one formula draws them all. Of `more`: turn = (axis, degrees), color2 and bands = odd numbers of
# stripes along x, y, z (stripes are centred: an odd number is symmetric).


def ball(center, half, color, **more) -> dict:
    """An ellipsoid."""
    return {"center": center, "half": half, "color": color, "quadric": (1, 1, 0), **more}


def box(center, half, color, **more) -> dict:
    """A box: its quadric contains the whole cube."""
    return {"center": center, "half": half, "color": color, "quadric": (0, 2, 0), **more}


def tube(center, half, color, taper=1.0, **more) -> dict:
    """A cylinder, cone or frustum along y; `taper` is its radius on top (1 cylinder, 0 cone)."""
    quadric = (0, (1 + taper) / 2, (taper - 1) / 2)
    return {"center": center, "half": half, "color": color, "quadric": quadric, **more}


def rotation(axis: str, degrees: float) -> Tensor:  # (3, 3)
    """Right-handed, about one world axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }
    return torch.tensor(rows[axis], dtype=torch.float32)


def pack(primitives: list[dict]) -> dict[str, Tensor]:
    """One tensor per property, first dimension the n primitives: (n, 3), and "turn" (n, 3, 3)."""
    full = [{"color2": p["color"], "bands": (0, 0, 0), **p} for p in primitives]
    names = ("center", "half", "quadric", "color", "color2", "bands")
    packed = {k: torch.tensor([p[k] for p in full], dtype=torch.float32) for k in names}
    packed["turn"] = torch.stack([rotation(*p["turn"]) if "turn" in p else torch.eye(3) for p in full])
    return packed


def reach(packed: dict[str, Tensor]) -> Tensor:  # (n, 3)
    """How far each primitive extends from its center along the world's axes."""
    edges = (packed["turn"] * packed["half"][:, None]).abs()
    # A turned box reaches the sum of its three half-edges, an ellipsoid (e > 0) their Euclidean norm.
    return torch.where(packed["quadric"][:, :1] > 0, edges.norm(dim=-1), edges.sum(-1))


# --- kinds ---

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
DARK, GLASS, GOLD, FLAME = (0.12, 0.12, 0.16), (0.45, 0.75, 0.90), PALETTE["yellow"], PALETTE["orange"]

# Each kind is a fixed layout at any scale (make_toy fits it to the frame); a and b are its colours, u(low,
# high) draws a proportion, at most 8 of them. `for x in (-1, 1)` is the mirror symmetry of real things; eyes,
# doors and handles are on one side only, so that front and back differ.


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
    places = [(0.44 * x, -0.5, z) for x in (-1, 1) for z in (-0.48, 0, 0.48)]
    return parts + [tube(p, (wheel, 0.08, wheel), PALETTE["grey"], turn=("z", 90)) for p in places]


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
    corners = [(x * (w - 0.08), z * (d - 0.08)) for x in (-1, 1) for z in (-1, 1)]
    return parts + [box((x, -leg, z), (0.08, leg, 0.08), a) for x, z in corners]


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
    parts.append(ball((0, 0.93, 0), (0.12, 0.12, 0.12), b))
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


# FORK: a new kind is one function like those above, listed here. The kind of a toy is its seed modulo their
# number: after a change all toys are others, train the model anew.
KINDS = (bear, duck, dog, car, train, house, chair, lamp, tree, robot, mug, boat)


def toy_kind(seed: int) -> str:
    """The name of the kind that `make_toy(seed)` builds."""
    return KINDS[seed % len(KINDS)].__name__


def make_toy(seed: int) -> list[dict]:
    """A kind, two colours, a few proportions, all from the seed; centred and scaled to the frame."""
    g = keyed_generator(seed)
    colors = [list(PALETTE.values())[i] for i in torch.randperm(len(PALETTE), generator=g)[:2]]
    jitter = (torch.rand(2, generator=g) * 0.08 - 0.04).tolist()
    a, b = (tuple(min(max(c + j, 0), 1) for c in color) for color, j in zip(colors, jitter, strict=True))
    draws = iter(torch.rand(8, generator=g).tolist())
    parts = KINDS[seed % len(KINDS)](a, b, lambda low, high: low + (high - low) * next(draws))

    packed = pack(parts)
    low = (packed["center"] - reach(packed)).amin(0)
    high = (packed["center"] + reach(packed)).amax(0)
    middle, scale = ((low + high) / 2).tolist(), 1.76 / float((high - low).max())  # of 2: a white margin
    for part in parts:
        part["center"] = tuple((c - m) * scale for c, m in zip(part["center"], middle, strict=True))
        part["half"] = tuple(h * scale for h in part["half"])
    return parts
