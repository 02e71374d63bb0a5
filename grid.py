"""A picture of many objects, which all scripts share.

In: views as tensors. Out: a PNG with a row for each object.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common import write_atomic
from render import VIEWS


def grid(
    path: str | Path,
    columns: Mapping[str, Tensor],  # label -> (N, V, 3, S, S) in [0, 1]; a shorter column ends earlier
    ref: Tensor,  # (N, 3, S, S), the first column
    side: int = 128,  # pixels of a view in the picture, at least: small views are enlarged by a whole factor
) -> None:
    """A PNG with a row for each object: the reference, then the views under each label."""
    size = next(iter(columns.values())).shape[-1]
    scale = math.ceil(side / size)
    side, gap = size * scale, 12
    big, small = ImageFont.load_default(side / 4), ImageFont.load_default(side / 8)
    head = side // 2  # height of the labels
    rows = max(len(images) for images in columns.values())
    width = side + len(columns) * (gap + len(VIEWS) * side)
    picture = Image.new("RGB", (width, head + rows * side), (255, 255, 255))
    draw = ImageDraw.Draw(picture)

    def paste(label: str, views: Sequence[str], images: Tensor, x: int) -> None:  # images (N, V, 3, S, S)
        draw.text((x + side / 16, 0), label, fill=(0, 0, 0), font=big)
        for i, view in enumerate(views):
            draw.text((x + (i + 0.08) * side, head * 0.68), view, fill=(110, 110, 110), font=small)
        strips = rearrange(images.detach().cpu().float(), "N V C H W -> N H (V W) C").clamp(0, 1)
        for n, strip in enumerate((strips * 255).round().byte().numpy()):
            tile = Image.fromarray(strip)
            tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
            picture.paste(tile, (x, head + n * side))

    paste("input", ("front",), ref[:rows, None], 0)
    for i, (label, images) in enumerate(columns.items()):
        x = side + gap + i * (len(VIEWS) * side + gap)
        paste(label, VIEWS, images, x)
        draw.line([(x - gap // 2, 0), (x - gap // 2, picture.height)], fill=(200, 200, 200), width=2)
    write_atomic(path, lambda p: picture.save(p))
