"""The method in one picture, in the manner of the paper's Figure 2: results/method.svg, written from strings.

It shows Eq. (2) with the default candidates, branches of one state (candidates.py). The pictures are drawn
for the eye: a true object, its right and left stretched to be worse, noise. The numbers beside them are real:
metrics.hull_iou of what is shown.

Run:
    python -m runs.diagram
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common import check_output, cli, keyed_generator, write_atomic
from data import load_furniture, stretch
from metrics import hull_iou

GREY, BLUE, GREEN, RED = "#666", "#1f5fa8", "#1a7f37", "#b3261e"
STRETCH = ((1.0, 1.0), (0.75, 1.0), (0.6, 0.7))  # depth and height of right and left, by candidate
HEADINGS = {  # title: middle of its column, and what stands below
    "reference Y": (52, ""),
    "one state x_t": (222, ""),
    "G actions": (372, "a step's own noise each"),
    "finished views": (590, "equal noises after the action"),
    "feedback": (758, "rates views"),
    "a pair": (896, "all pairs are trained"),
}
FOOT = (
    "Shown: --candidates branch, three of its G = 8.   π_p: pi_pre, frozen.   κ: --kl times β.",
    "The views are true ones and, for the eye, stretched ones; the numbers are their hull IoU.",
)


@dataclass(frozen=True)
class Config:
    out: str = "results/method.svg"


def text(x: float, y: float, words: str, size: int = 14, colour: str = "black") -> str:
    """Words; `_` makes the next character an index."""
    first, *rest = words.split("_")
    index = '<tspan dy="4" font-size="{}">{}</tspan><tspan dy="-4">{}</tspan>'
    inner = first + "".join(index.format(size - 4, part[0], part[1:] or "&#8203;") for part in rest)
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="middle">{inner}</text>'


def arrow(x0: float, y0: float, x1: float, y1: float, colour: str = GREY, dashed: bool = False) -> str:
    """A line with a head."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    ends = f'x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.6"{dash} marker-end="url(#{colour[1:]})"/>'


def box(x: float, y: float, w: float, h: float, colour: str = GREY, fill: str = "none") -> str:
    """A rounded frame."""
    place = f'x="{x}" y="{y}" width="{w}" height="{h}" rx="6"'
    return f'<rect {place} fill="{fill}" stroke="{colour}" stroke-width="1.4"/>'


def picture(x: float, y: float, views: Tensor, side: float) -> str:  # (V, 3, S, S) in [0, 1]
    """Views beside each other, inside the file."""
    pixels = (torch.cat(list(views), -1).permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(64).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    place = f'x="{x}" y="{y}" width="{side * len(views)}" height="{side}"'
    return f'<image {place} href="data:image/png;base64,{data}"/>'


def candidate(views: Tensor, depth: float, height: float) -> Tensor:  # (V, 3, S, S) -> the same
    """Front, back and top as they are; right and left of a thinner and lower object: they contradict."""
    other = stretch(views, torch.tensor([1.0, height, depth]))
    return torch.stack([other[v] if v in (1, 3) else views[v] for v in range(len(views))])


def noised(views: Tensor, amount: float, key: int) -> Tensor:
    """Views under noise."""
    noise = torch.randn(views.shape, generator=keyed_generator(key))
    return ((1 - amount) * views + amount * (0.5 + 0.3 * noise)).clamp(0, 1)


def main(cfg: Config) -> None:
    """Write the file."""
    check_output("out", cfg.out, ".svg")
    names, every = load_furniture("validation", 64)
    views = every[next(i for i, name in enumerate(names) if "armchair" in name.lower())].float() / 255
    shown = [candidate(views, *changes) for changes in STRETCH]
    rewards = hull_iou(torch.stack(shown)).tolist()
    rows, middle, bottom = (64, 164, 264), 188, 352  # of the candidates; of the reference; of the way back

    parts = [text(x, 30, title, 15) for title, (x, _) in HEADINGS.items()]
    parts += [text(x, 48, below, 12, GREY) for x, below in HEADINGS.values() if below]
    parts += [picture(20, middle - 32, views[:1], 64), box(18, middle - 34, 68, 68)]
    parts += [arrow(92, middle, 176, middle)]
    parts += [text(132, middle - 10, "policy π_θ", 13), text(132, middle + 20, "k steps", 13)]
    parts += [picture(182, middle - 40, noised(views, 0.8, 0)[:1], 80), box(180, middle - 42, 84, 84, BLUE)]
    for g, (y, x, reward) in enumerate(zip(rows, shown, rewards)):
        parts += [arrow(268, middle + (y - rows[1]) * 0.25, 340, y + 24)]
        parts += [text(302, y + (38, 16, 10)[g], f"a_{g + 1}", 14)]
        parts += [picture(346, y, noised(x, 0.65, g + 1)[:1], 48), box(345, y - 1, 50, 50, BLUE)]
        parts += [arrow(400, y + 24, 464, y + 24, dashed=True)]
        parts += [picture(470, y, x, 48), box(469, y - 1, 242, 50), arrow(716, y + 24, 732, y + 24)]
        parts += [text(758, y + 29, f"{reward:.2f}", 15, (GREEN, GREY, RED)[g])]

    # the pair, the loss, and the way back
    bracket = f"780,{rows[0] + 10} 786,{rows[0] + 10} 786,{rows[2] + 38} 780,{rows[2] + 38}"
    parts += [f'<polyline points="{bracket}" fill="none" stroke="{GREY}" stroke-width="1.6"/>']
    parts += [arrow(786, 100, 846, 100)]
    parts += [text(896, rows[0] + 40, "a_1 ≻ a_3", 15)]
    parts += [arrow(896, 142, 896, 172), box(800, 176, 192, 140, BLUE, "#f3f7fc")]
    parts += [text(896, 196, "Eq. (2)", 15, BLUE), text(896, 222, "−log σ( β [ r_w − r_l ] )", 15)]
    terms = {246: "r = log π_θ / π_p (a | x_t)", 276: "+ λ L(simple-MV)", 300: "+ κ KL(π_θ ‖ π_p)"}
    parts += [text(896, y, term, 14) for y, term in terms.items()]
    parts += [f'<path d="M896 316 V{bottom} H222" fill="none" stroke="{BLUE}" stroke-width="1.6"/>']
    parts += [arrow(222, bottom, 222, middle + 48, BLUE)]
    parts += [text(554, bottom - 8, "the policy's mean at x_t moves towards the winners' actions", 14, BLUE)]
    parts += [text(554, bottom + 22 + 18 * i, line, 12, GREY) for i, line in enumerate(FOOT)]

    tip = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"'
    head = '<marker id="{}" {}><path d="M0 0 L10 5 L0 10 z" fill="{}"/></marker>'
    heads = "".join(head.format(colour[1:], tip, colour) for colour in (GREY, BLUE))
    size = 'viewBox="0 0 1000 400" font-family="Helvetica, Arial, sans-serif"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    ground = '<rect width="1000" height="400" fill="white"/>'
    svg = "\n".join([opening, f"<defs>{heads}</defs>", ground, *parts, "</svg>", ""])
    write_atomic(Path(cfg.out), lambda p: p.write_text(svg))
    print(f"wrote {cfg.out}: silhouettes {', '.join(f'{reward:.2f}' for reward in rewards)}")


if __name__ == "__main__":
    cli(main, Config, __doc__)
