"""Table 1: how close are the generated views to the truth, and do they show one object? (paper Sec. 6, "Metrics")

    PSNR     10 log10(1 / mean squared error), dB; at most 58.9, the error of rounding to 8 bits
    SSIM     Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, no padding, in float64
    LPIPS    Zhang et al. 2018, AlexNet, v0.1; smaller is better; needs the published weights (--lpips)
    GMSD     Xue et al. 2014, gradient magnitude similarity deviation; smaller is better; perceptual like LPIPS but
             another number, for where those weights cannot be had
    hull     silhouette consistency: the largest object that fits the five silhouettes, drawn again, against them
    contrastive   sum of the scorer's output over views 1..4 (--scorer DIR)

All are computed on whole images, white background included, one number for each view, then averaged over views and
objects. Columns `_unseen` leave out view 0, which shows the reference itself and is easy to copy. White background
makes PSNR and SSIM look high, so the table has rows that show the scale: truth, all white, the reference copied into
every view, and ground truth with one view spoilt, which a judge of consistency must mark down. `hull` needs no
weights and no truth: an independent judge of every method but the one that used it as feedback. It cannot see
texture, and a frame filled to its edges is consistent, too (pure noise gets 1): read it beside PSNR.

Letters: N (or B) objects, V views, C H W pixels, S side of a square image.

Run:
    python evaluate.py --model checkpoints/toy --n 64 --grid out/views.png

    python evaluate.py --model out/d3po_contrastive --n 64 --scorer out/scorer_zero123 --against out/evaluation.json \
        --out out/after.json

    python evaluate.py --images DIR --data renders     # any other model's views: DIR/<object>/{view}.png

Expect (200 held-out toys):
    hull: truth 1.00, right mirrored .87, 3 px lower .94, of another object .79, all white 0.
    psnr_unseen: all white 8.5, reference copied 14.1.

    On one core an object takes 17 ms a row at 64 px, nearly all of it SSIM, and 11 ms more with LPIPS.

    Writes --out (means by row, numbers of each object, differences with intervals) and --grid.
"""

import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from common import InputError, cli, digest, get_device, load_json, provenance, save_json, use_bf16, write_atomic
from data import SPLITS, VIEWS, load_views, make_toys, open_image, split_of, toy_name, write_views
from model import load
from sample import sample_images
from scorer import Scorer, contrastive_reward


@dataclass(frozen=True)
class Config:
    """Evaluate a model, or a folder of views that any other model made."""

    model: str = ""  # model folder to sample from
    images: str = ""  # or: folder of views, <object>/{front,right,back,left,top}.png, named as in --data
    data: str = "toys"  # ground truth: toys, or a folder of renders in the same format
    split: Literal["all", "train", "preference", "validation", "heldout"] = "validation"  # heldout: for tables only
    n: int = 200  # objects, the first ones (paper: 200)
    size: int = 0  # pixels at which views are compared; 0: what the model makes, or what the pictures of --images have
    seed: int = 0  # first seed of the sampler
    seeds: int = 1  # samples of each object with seeds seed, seed + 1, ...; an object's numbers are their mean
    num_steps: int = 10  # network calls a sample (paper: 50)
    guidance: float = 0.0  # w of contrastive guidance: x0 + w (x0 - x0 of a noised reference)
    guidance_noise: float = 0.8  # scale of the noise on that reference's latent
    batch_size: int = 8  # objects sampled at a time
    bf16: str = "auto"  # sample in bfloat16: auto (where it is fast), on or off
    scorer: tuple[str, ...] = ()  # scorer folders: the first is column contrastive, others contrastive_<folder's name>
    lpips: str = ""  # "hub" (downloads 244 MB once), or a folder with alexnet-owt-7be5be79.pth and alex.pth
    known_rows: bool = True  # also score the truth, white, copied and spoilt images: the same for every model
    images_out: str = ""  # folder to write the first seed's views to, in the format that --images reads
    against: str = ""  # a JSON file of an earlier run on the same objects: adds paired differences to it
    out: str = "out/evaluation.json"  # JSON file to write
    grid: str = ""  # picture of the first objects to write (PNG)
    device: str = "auto"  # auto | cpu | cuda


# --- images against the truth ---


def psnr(
    x: Tensor,  # (N, ...) in [0, 1]
    y: Tensor,  # (N, ...) or broadcast to it
) -> Tensor:  # (N,) dB
    """10 log10(1 / mse). Rounding to 8 bits is a mean squared error of 1 / (12 255^2), 58.9 dB, and counts as none.

    Without the limit one exact view, such as a copied reference, would lift the mean over views without bound.
    """
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1 / (12 * 255**2)).log10()


def closeness(
    images: Tensor,  # (G, V, 3, S, S) candidates of one object
    truth: Tensor,  # (V, 3, S, S)
) -> Tensor:  # (G,) dB
    """PSNR of the unseen views, their errors pooled: what a feedback should rank by."""
    return psnr(images[:, 1:].flatten(1, 2), truth[None, 1:].flatten(1, 2))


def ssim(
    x: Tensor,  # (N, C, H, W) in [0, 1], H and W at least 11
    y: Tensor,  # (N, C, H, W)
) -> Tensor:  # (N,)
    """(2 a b + c1) (2 cov + c2) / ((a^2 + b^2 + c1) (var_x + var_y + c2)), mean over windows and channels.

    In float64: var = E[x^2] - E[x]^2 cancels on flat white, and float32 is then wrong in the fourth digit.
    """
    x, y = x.double(), y.double()
    window = torch.exp(-((torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 1, 11)

    def mean(image: Tensor) -> Tensor:  # Gaussian-weighted, separable: rows, then columns
        rows = F.conv2d(image, window, groups=image.shape[1])
        return F.conv2d(rows, window.mT, groups=image.shape[1])

    a, b = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (var_x + var_y + c2))
    return similarity.mean((1, 2, 3))


def gmsd(
    x: Tensor,  # (N, 3, H, W) in [0, 1]
    y: Tensor,  # (N, 3, H, W)
) -> Tensor:  # (N,)
    """Standard deviation over pixels of (2 g_x g_y + c) / (g_x^2 + g_y^2 + c), g the length of the grey gradient.

    On the luminance at half size, with Prewitt's filters and c = 170 / 255^2, as published; no padding.
    """

    def gradient(image: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 1, H/2 - 2, W/2 - 2)
        grey = (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        rise = torch.tensor([1.0, 1.0, 1.0]).outer(torch.tensor([1.0, 0.0, -1.0])).to(image) / 3
        return F.conv2d(F.avg_pool2d(grey, 2), torch.stack([rise, rise.T])[:, None]).norm(dim=1)

    g_x, g_y, c = gradient(x), gradient(y), 170 / 255**2
    similarity = (2 * g_x * g_y + c) / (g_x**2 + g_y**2 + c)
    return similarity.flatten(1).std(1, correction=0)


class Lpips(nn.Module):
    """sum over layers l of mean over pixels of w_l . (f_l(x) - f_l(y))^2, f_l unit-length features of AlexNet."""

    # The trunk's names are torchvision's, the heads' the lpips package's, so that the published files load strictly.
    URLS = {
        "alexnet-owt-7be5be79.pth": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "alex.pth": "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
    }
    TAPS = (1, 4, 7, 9, 11)  # after each ReLU
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(3, 64, 11, 4, 2),
            nn.MaxPool2d(3, 2),
            *conv(64, 192, 5, 1, 2),
            nn.MaxPool2d(3, 2),
            *conv(192, 384, 3, 1, 1),
            *conv(384, 256, 3, 1, 1),
            *conv(256, 256, 3, 1, 1),
        )
        # One weight a channel. Sequential only for the published name, lin0.model.1.weight (0 was a dropout).
        for i, channels in enumerate((64, 192, 384, 256, 256)):
            head = nn.ModuleDict({"model": nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))})
            self.add_module(f"lin{i}", head)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    @staticmethod
    def load(source: str, device: str | torch.device = "cpu") -> "Lpips":
        """`source` is "hub", or a folder that holds the two published files."""
        net, state, name = Lpips(), {}, ""
        try:
            for name, url in Lpips.URLS.items():
                if source == "hub":
                    tensors = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
                else:
                    tensors = torch.load(Path(source) / name, map_location="cpu", weights_only=True)
                state |= {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
            net.load_state_dict(state)
        except (OSError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"--lpips {source}: cannot load {name} ({type(error).__name__}: {str(error)[:120]}); expected the "
                f"published file. Get {' and '.join(Lpips.URLS.values())} and name their folder."
            ) from None
        return net.to(device).eval()

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,  # (N, 3, H, W) in [0, 1], H and W at least 32
        y: Tensor,  # (N, 3, H, W)
    ) -> Tensor:  # (N,)
        total = torch.zeros(len(x))
        both = (torch.cat([x, y]).to(self.shift) * 2 - 1 - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            both = layer(both)
            if i in self.TAPS:
                f, g = (both / (both.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
                head = self.get_submodule(f"lin{self.TAPS.index(i)}.model")
                total = total + head((f - g) ** 2).mean((1, 2, 3)).cpu()
        return total


# --- the views against each other ---


def silhouettes(
    views: Tensor,  # (..., 3, H, W) on white
) -> Tensor:  # (..., H, W) bool
    """A pixel belongs to the object if any channel is below 0.9."""
    return views.amin(dim=-3) < 0.9


def hull_iou(
    views: Tensor,  # (B, 5, 3, S, S): front, right, back, left, top
) -> Tensor:  # (B,)
    """Mean over views of IoU(silhouette, silhouette of the visual hull); 1 if one object can cast all five, 0 if none.

    Orthographic silhouettes cut prisms out of space. Front and back cut the same two axes, so do right and left:

        H(x, y, z) = A(x, y) B(y, z) C(x, z),       A = front and back,  B = right and left,  C = top

    and seen from the front it is A(x, y) [exists z: B(y, z) C(x, z)], a product of two matrices: no voxels needed.
    """
    front, right, back, left, top = rearrange(silhouettes(views).float(), "B V h w -> V B h w")
    # Each mask with the world's axes as its own, in rising order. Image rows go down: those that go along y are
    # flipped. Then columns are flipped where the camera's right is a falling axis (the table in data.py).
    front = rearrange(front.flip(-2), "B y x -> B x y")
    back = rearrange(back.flip(-2).flip(-1), "B y x -> B x y")  # its right is -x
    right = rearrange(right.flip(-2).flip(-1), "B y z -> B y z")  # its right is -z
    left = rearrange(left.flip(-2), "B y z -> B y z")
    top = rearrange(top, "B z x -> B x z")  # its up is -z, so its rows run along +z as they are

    a, b, c = front * back, right * left, top
    along_z = a * ((c @ b.mT) > 0)  # (B, x, y)
    along_x = b * ((a.mT @ c) > 0)  # (B, y, z)
    along_y = c * ((a @ b) > 0)  # (B, x, z)

    def iou(hull: Tensor, mask: Tensor) -> Tensor:  # the hull never sticks out, so the union is the mask
        return hull.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    pairs = ((along_z, front), (along_x, right), (along_z, back), (along_x, left), (along_y, top))
    return torch.stack([iou(hull, mask) for hull, mask in pairs]).mean(0)


def corruptions(
    truth: Tensor,  # (N, V, 3, S, S)
) -> Iterator[tuple[str, Tensor]]:
    """Name and images, one kind after the other: ground truth with one or two views spoilt."""
    right, back = VIEWS.index("right"), VIEWS.index("back")
    order = list(range(len(VIEWS)))
    order[right], order[back] = back, right
    yield "truth, right and back swapped", truth[:, order]
    for name, change in {
        "mirrored": lambda view: view.flip(-1),
        "3 px lower": lambda view: view.roll(3, -2),
        "of another object": lambda view: view.roll(1, 0),
    }.items():
        images = truth.clone()
        images[:, right] = change(truth[:, right])
        yield f"truth, right {name}", images


# --- tables ---


def score_images(
    images: Tensor,  # (N, 5, 3, S, S) in [0, 1]
    truth: Tensor,  # (N, 5, 3, S, S)
    ref: Tensor,  # (N, 3, S, S)
    scorers: Mapping[str, Scorer] | None = None,  # column -> scorer
    lpips: Lpips | None = None,
) -> dict[str, Tensor]:  # name -> (N,)
    """One number an object and metric. FORK: another metric is another line here."""
    parts: list[dict[str, Tensor]] = []
    for i in range(0, len(images), 16):  # a few objects at a time: SSIM holds a dozen float64 copies
        x, y, reference = images[i : i + 16], truth[i : i + 16], ref[i : i + 16]
        part: dict[str, Tensor] = {}
        for name, metric in {"psnr": psnr, "ssim": ssim, "gmsd": gmsd, "lpips": lpips}.items():
            if metric is not None:
                by_view = metric(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])  # (N, V)
                part[name], part[f"{name}_unseen"] = by_view.mean(1), by_view[:, 1:].mean(1)
        part["hull"] = hull_iou(x)
        for name, scorer in (scorers or {}).items():
            part[name] = contrastive_reward(scorer, reference, x)
        parts.append({k: v.double().cpu() for k, v in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def bootstrap_interval(
    differences: Tensor,  # (N,) one an object
    seed: int = 0,
    n: int = 10_000,
) -> tuple[float, float]:
    """95 % interval of the mean over objects: objects drawn again with replacement, n times."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.cat(
        [
            differences[torch.randint(len(differences), (100, len(differences)), generator=generator)].mean(1)
            for _ in range(math.ceil(n / 100))
        ]
    )
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return low, high


def summary(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over objects of each metric."""
    return {name: values.mean().item() for name, values in scores.items()}


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table with a row for each entry and a column for each metric."""
    names = list(dict.fromkeys(f"{name:>6}" for row in rows.values() for name in row))
    width = max(len(label) for label in rows)
    lines = [f"| {'':{width}} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        row = {f"{name:>6}": value for name, value in row.items()}
        cells = [f"{row[k]:{len(k)}.{2 if 'psnr' in k else 4}f}" if k in row else " " * len(k) for k in names]
        lines.append(f"| {label:{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grid(
    path: str | Path,
    columns: Mapping[str, Tensor],  # label -> (N, V, 3, S, S) in [0, 1]
    ref: Tensor,  # (N, 3, S, S)
    side: int = 128,  # pixels of a view in the picture, at least: small views are enlarged by a whole factor
) -> None:
    """A PNG with a row for each object: the reference, then five views for each label."""
    rows = min(len(images) for images in columns.values())
    scale = math.ceil(side / ref.shape[-1])
    side, gap = ref.shape[-1] * scale, 12
    big, small = ImageFont.load_default(side / 4), ImageFont.load_default(side / 8)
    head = side // 2  # height of the labels
    width = side + len(columns) * (gap + len(VIEWS) * side)
    picture = Image.new("RGB", (width, head + rows * side), (255, 255, 255))
    draw = ImageDraw.Draw(picture)

    def paste(label: str, names: tuple[str, ...], images: Tensor, x: int) -> None:  # images (N, V, 3, S, S)
        draw.text((x + side / 16, 0), label, fill=(0, 0, 0), font=big)
        for i, name in enumerate(names):
            draw.text((x + (i + 0.08) * side, head * 0.68), name, fill=(110, 110, 110), font=small)
        strip = rearrange(images.detach().cpu().float(), "N V C H W -> (N H) (V W) C").clamp(0, 1)
        tile = Image.fromarray((strip * 255).round().byte().numpy())
        picture.paste(tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST), (x, head))

    paste("input", ("front",), ref[:rows, None], 0)
    for i, (label, images) in enumerate(columns.items()):
        x = side + gap + i * (len(VIEWS) * side + gap)
        paste(label, VIEWS, images[:rows], x)
        draw.line([(x - gap // 2, 0), (x - gap // 2, picture.height)], fill=(200, 200, 200), width=2)
    write_atomic(path, lambda p: picture.save(p, optimize=True))


# --- command line ---


def read_views(folder: str, names: list[str], size: int) -> tuple[list[str], Tensor]:
    """The named objects of a folder: names, (N, V, 3, size, size) in [0, 1]."""
    ids, views = load_views(folder, size)
    missing = [name for name in names if name not in ids]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} objects of --data are missing (first: {missing[0]}), expected one folder for "
            f"each of the {len(names)} that are evaluated. Make them, or choose another --n or --split."
        )
    return names, torch.stack([views[ids.index(name)] for name in tqdm(names, desc=folder, disable=None)]).float() / 255


def stored_size(folder: str) -> int:
    """Pixels of the pictures in a folder of views, as its first one has them."""
    return open_image(load_views(folder, 0)[1].folders[0] / f"{VIEWS[0]}.png").shape[-1]


def paired_difference(scores: dict[str, Tensor], judged: dict, path: str, seed: int) -> dict[str, dict[str, float]]:
    """Ours minus the other run's, by metric: mean and 95 % interval over objects. `judged` must be equal: the objects,
    their size, and the weights of the scorers that both runs have.
    """
    other = load_json(path)
    if not isinstance(other, dict) or other.get("ids") != judged["ids"]:
        raise InputError(
            f"--against {path}: was not made on these {len(judged['ids'])} objects. Use equal --data, --split and --n."
        )
    if other.get("size") != judged["size"]:
        raise InputError(f"--against {path}: made at {other.get('size')} pixels, not {judged['size']}. Name a --size.")
    for name in judged["scorers"].keys() & other.get("scorers", {}).keys():
        if judged["scorers"][name] != other["scorers"][name]:
            raise InputError(f"--against {path}: column {name} is another scorer's there. Use equal --scorer.")
    result = {}
    for name in [name for name in scores if name in other["objects"]]:
        difference = scores[name] - torch.tensor(other["objects"][name], dtype=torch.float64)
        low, high = bootstrap_interval(difference, seed)
        result[name] = {"mean": difference.mean().item(), "low": low, "high": high}
    return result


def main(cfg: Config) -> dict:
    """Score, print the table, write the files."""
    if bool(cfg.model) == bool(cfg.images):
        raise InputError("got both or neither of --model and --images, expected one of them.")
    if cfg.n < 1 or cfg.seeds < 1 or cfg.batch_size < 1:
        raise InputError(f"--n {cfg.n} --seeds {cfg.seeds} --batch_size {cfg.batch_size}: expected at least 1 each.")
    # Everything that can be wrong is read first: sampling takes minutes.
    device = get_device(cfg.device)
    bf16 = use_bf16(cfg.bf16, device)
    model = load(cfg.model, device, half=bf16) if cfg.model else None
    names = [f"contrastive_{Path(f).name}" if i else "contrastive" for i, f in enumerate(cfg.scorer)]
    scorers = {name: Scorer.load(folder, device) for name, folder in zip(names, cfg.scorer, strict=True)}
    lpips = Lpips.load(cfg.lpips, device) if cfg.lpips else None
    size = cfg.size or (model.cfg.image_size if model else stored_size(cfg.images))
    if model and size != model.cfg.image_size:
        raise InputError(f"--size {size}: this model makes {model.cfg.image_size} pixels. Leave --size away.")
    if size < 32:
        raise InputError(f"--size {size}: expected at least 32 pixels.")
    if cfg.data == "toys":
        if cfg.split == "all":
            raise InputError("--split all: toys have no end, expected one of their splits.")
        truth = make_toys(cfg.n, size, SPLITS[cfg.split]).float() / 255
        ids = [toy_name(SPLITS[cfg.split], i) for i in range(cfg.n)]
    else:
        every = load_views(cfg.data, size)[0]
        ids, truth = read_views(cfg.data, (every if cfg.split == "all" else split_of(every, cfg.split))[: cfg.n], size)
    ref = truth[:, 0]  # evaluation always takes the front
    weights = [digest(Path(folder) / "model.safetensors") for folder in cfg.scorer]
    judged = {"ids": ids, "size": size, "scorers": dict(zip(names, weights, strict=True))}
    if cfg.against:
        paired_difference({}, judged, cfg.against, 0)  # is it there, and comparable?

    def fixed_rows() -> Iterator[tuple[str, Tensor]]:
        yield "truth", truth
        yield "all white", torch.ones_like(truth)
        yield "reference copied", ref[:, None].expand_as(truth)
        yield from corruptions(truth)

    rows: dict[str, dict[str, float]] = {}
    if cfg.known_rows:
        for name, images in tqdm(fixed_rows(), desc="rows of known quality", total=7, disable=None):
            rows[name] = summary(score_images(images, truth, ref, scorers, lpips))

    if model:
        label = cfg.model
        how = {"bf16": bf16, "guidance": cfg.guidance, "guidance_noise": cfg.guidance_noise}
        samples = [
            sample_images(model, ref, seed, cfg.num_steps, cfg.batch_size, f"sample, seed {seed}", **how)
            for seed in range(cfg.seed, cfg.seed + cfg.seeds)
        ]
    else:
        label, samples = cfg.images, [read_views(cfg.images, ids, size)[1]]
    by_seed = [score_images(images, truth, ref, scorers, lpips) for images in samples]
    scores = {name: torch.stack([one[name] for one in by_seed]).mean(0) for name in by_seed[0]}  # (N,) each

    rows = {label: summary(scores), **rows}
    print(f"\n{len(ids)} objects, {len(samples)} seed(s), {size} px\n\n{markdown(rows)}")
    result = {
        **provenance(cfg),
        **judged,
        "rows": rows,
        "seeds": [summary(one) for one in by_seed],
        "objects": {name: values.tolist() for name, values in scores.items()},
    }
    if cfg.against:
        result["difference"] = paired_difference(scores, judged, cfg.against, 0)
        print(f"\nminus {cfg.against}, mean and 95 % interval over objects:")
        for name, d in result["difference"].items():
            print(f"    {name:16s} {d['mean']:+.4f}   [{d['low']:+.4f}, {d['high']:+.4f}]")
    if cfg.images_out:
        for name, views in zip(ids, samples[0], strict=True):
            write_views(Path(cfg.images_out) / name, views)
    if cfg.grid:
        grid(cfg.grid, {"truth": truth[:8], Path(label).name: samples[0][:8]}, ref[:8])
    save_json(cfg.out, result)  # last: a resumed experiment takes it for a sign that all is there
    print(f"\nwrote {' and '.join(filter(None, (cfg.out, cfg.grid)))}")
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
