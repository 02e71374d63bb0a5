"""Metrics: how close are views to the truth, can they be views of one object, how much did they change?

    PSNR     10 log10(1 / mean squared error), dB; at most 58.9, the error of rounding to 8 bits
    SSIM     Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, no padding, in float64
    LPIPS    Zhang et al. 2018, AlexNet, v0.1; smaller is better; needs the published weights
    silhouette   IoU (intersection over union) with the true silhouette: the shape, whatever its colour

Geometry needs no weights. What must be equal follows exactly, for the cameras are orthographic, along axes:

    row      the four sides see the same heights: the same pixel rows must be occupied
    mirror   opposite cameras see one silhouette, mirrored
    width    the top sees the widths of the sides: columns of front and back, columns of right and left
    hull     the largest object that fits all silhouettes, drawn again, against them

Each is an IoU: 1 for an object, 0 for empty views. Views that are lower in one of the four than 39 of 40 true
objects contradict each other. Their share is the contradiction rate (`contradicts`).

Letters: N (or B) objects, V views, C H W pixels, S side of a square image, M masks of one thing.
FORK: another metric is a function here and a line in evaluate.py:measure. Cameras are read from CAMERAS.
"""

from collections.abc import Mapping
from pathlib import Path

import kornia.metrics as KM
import torch
from torch import Tensor, nn

from common import explained, published
from render import CAMERAS, VIEWS

# --- images against the truth ---


def psnr(x: Tensor, y: Tensor) -> Tensor:  # (N, ...) in [0, 1], the same or broadcast to it -> (N,) dB
    """10 log10(1 / mse). Rounding to 8 bits has a mse of 1 / (12 255^2), 58.9 dB, and counts as none.

    Without this limit one exact view, such as a copied reference, lifts the mean over views without bound."""
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1 / (12 * 255**2)).log10()


def closeness(images: Tensor, truth: Tensor) -> Tensor:  # (G, V, 3, S, S), (V, 3, S, S) -> (G,) dB
    """PSNR of the candidates' unseen views, their errors pooled: what a feedback should rank by."""
    return psnr(images[:, 1:].flatten(1, 2), truth[None, 1:].flatten(1, 2))


def ssim(x: Tensor, y: Tensor) -> Tensor:  # (N, C, H, W) in [0, 1] each, at least 11 x 11 -> (N,)
    """Mean over windows and channels. kornia's sigma is 1.5, its constants .01^2 and .03^2.

    In float64: var = E[x^2] - E[x]^2 cancels on flat white, and float32 is then wrong in the fourth digit."""
    return KM.ssim(x.double(), y.double(), 11, eps=0.0, padding="valid").mean((1, 2, 3))


class Lpips(nn.Module):
    """Sum over layers of mean over pixels of w . (f(x) - f(y))^2, f unit-length features of AlexNet."""

    # Names are torchvision's and, of the heads, the lpips package's: the published files load strictly.
    GITHUB = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
    URLS = {
        "alexnet-owt-7be5be79.pth": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "alex.pth": f"{GITHUB}/alex.pth",
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
        # One weight a channel. The published name is lin0.model.1.weight: 0 was a dropout.
        for i, channels in enumerate((64, 192, 384, 256, 256)):
            head = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    @staticmethod
    def load(source: str, device: str | torch.device = "cpu") -> "Lpips":
        """`source` is "hub", or a folder that holds the two published files."""
        net, state = Lpips(), {}
        remedy = f"Get {' and '.join(Lpips.URLS.values())} and name their folder."
        with explained(f"--lpips {source}: cannot load it, expected the published files. {remedy}"):
            for name, url in Lpips.URLS.items():
                tensors = published(url, "" if source == "hub" else Path(source) / name)
                state |= {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
            if not all(v.is_floating_point() for v in state.values()):
                raise ValueError("a weight is no real number")
            net.load_state_dict(state)
        return net.to(device).eval()

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (N, 3, H, W) in [0, 1], at least 32 x 32 -> (N,)
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


def silhouettes(views: Tensor) -> Tensor:  # (..., 3, H, W) on white -> (..., H, W) bool
    """A pixel belongs to the object if any channel is below 0.9."""
    return views.amin(dim=-3) < 0.9


def iou(masks: Tensor, dims: tuple[int, ...]) -> Tensor:  # (M, B, ...) bool -> (B,)
    """What all masks cover over what any of them covers; 0 if that is nothing."""
    return masks.all(0).sum(dims) / masks.any(0).sum(dims).clamp(min=1)


def silhouette_iou(x: Tensor, y: Tensor) -> Tensor:  # (B, 3, S, S), the same or broadcast to it -> (B,)
    """Of two images of one view. Against the truth: is it the right shape, whatever its colour?"""
    return iou(torch.stack(torch.broadcast_tensors(silhouettes(x), silhouettes(y))), (-2, -1))


def covered(views: Tensor) -> Tensor:  # (B, V, 3, S, S) -> (B,)
    """Share of the unseen views that is object, not background. Fat views fit each other: read it beside
    the contradiction rate."""
    return silhouettes(views[:, 1:]).float().mean((1, 2, 3))


def world_masks(views: Tensor) -> dict[tuple[int, int], Tensor]:  # (B, V, 3, S, S) -> (M, B, S, S) each
    """The silhouettes by the plane that they lie in: opposite views share one. Its two world axes are i < j,
    and a mask is [along i, along j] in rising order.

    Image rows go down, so they are flipped. So is what runs along a falling axis: the columns of `back` run
    along -X, those of `right` along -Z, and `top` has -Z upwards."""
    planes: dict[tuple[int, int], list[Tensor]] = {}
    for camera, mask in zip(CAMERAS, silhouettes(views).unbind(1), strict=True):
        mask = mask.flip(-2).mT  # (B, image right, image up)
        mask = mask.flip([1 + d for d in (0, 1) if camera[d].sum() < 0])
        i, j = camera[:2].abs().argmax(1).tolist()
        planes.setdefault((min(i, j), max(i, j)), []).append(mask if i < j else mask.mT)
    return {plane: torch.stack(masks) for plane, masks in planes.items()}


def profile_iou(views: Tensor, axis: int) -> Tensor:  # (B, V, 3, S, S), 0 X 1 Y 2 Z -> (B,)
    """Which places along one world axis are occupied: IoU of all views that see this axis.

    A place counts with two pixels: a single one may be a speck of the sampler's."""
    masks = [(m, 3 - plane.index(axis)) for plane, m in world_masks(views).items() if axis in plane]
    return iou(torch.cat([m.sum(other) > 1 for m, other in masks]), (-1,))


def row_iou(views: Tensor) -> Tensor:  # (B, V, 3, S, S) -> (B,)
    """The four sides have Y upwards: the same pixel rows must be occupied in all of them."""
    return profile_iou(views, 1)


def width_iou(views: Tensor) -> Tensor:  # (B, V, 3, S, S) -> (B,)
    """X is seen by front, back and top, Z by right, left and top: mean of both."""
    return (profile_iou(views, 0) + profile_iou(views, 2)) / 2


def mirror_iou(views: Tensor) -> Tensor:  # (B, V, 3, S, S) -> (B,)
    """Front must be back, mirrored, and right must be left, mirrored: mean of both."""
    return torch.stack([iou(m, (-2, -1)) for m in world_masks(views).values() if len(m) > 1]).mean(0)


def hull_iou(views: Tensor) -> Tensor:  # (B, V, 3, S, S) -> (B,)
    """Mean over views of IoU(silhouette, silhouette of the visual hull).

    Orthographic silhouettes cut prisms out of space, opposite ones the same:

        H(x, y, z) = A(x, y) B(y, z) C(x, z),     A = front and back,  B = right and left,  C = top

    Seen from the front it is A(x, y) [exists z: B(y, z) C(x, z)], a product of matrices: no voxels needed."""
    seen = world_masks(views)
    a, b, c = (seen[plane].all(0).float() for plane in ((0, 1), (1, 2), (0, 2)))
    hull = {(0, 1): a * (c @ b.mT > 0), (1, 2): b * (a.mT @ c > 0), (0, 2): c * (a @ b > 0)}
    # the hull never sticks out of a mask: their union is the mask
    parts = [hull[p].sum((-2, -1)) / m.sum((-2, -1)).clamp(min=1) for p, m in seen.items()]  # (M, B) each
    return torch.cat(parts).mean(0)


GEOMETRY = {"row": row_iou, "mirror": mirror_iou, "width": width_iou, "hull": hull_iou}

# Truth is not always 1: what is thin vanishes between pixels, what is nearly white is background in one view
# and not in the next. A threshold is what one true object in 40 falls below:
#     truth_thresholds(load_split("furniture", "train", 233, 64) / 255)
# Below one of the four or more are .082 of these 233, .109 of the 64 validation objects, .104 of the 96
# held-out ones, none of 200 toys.
THRESHOLDS = {"row": 0.861, "mirror": 0.915, "width": 0.683, "hull": 0.909}


def truth_thresholds(truth: Tensor) -> dict[str, float]:  # (N, V, 3, S, S)
    """What one true object in 40 falls below. Other sizes than 64 pixels need their own."""
    return {name: check(truth).quantile(0.025).item() for name, check in GEOMETRY.items()}


def no_object(views: Tensor) -> Tensor:  # (B, V, 3, S, S) -> (B,) bool
    """Two tricks that agree with themselves and show nothing: a filled frame, one picture in all views.

    Objects end at .9 of the frame: a true view leaves its edge white. Each of 713 true objects has a view
    that differs from the front by 21 grey levels or more, in the mean over pixels where either shows it. The
    limit is 8: copies with stronger noise of their own pass."""
    seen = silhouettes(views)
    edge = torch.cat([seen[..., 0, :], seen[..., -1, :], seen[..., :, 0], seen[..., :, -1]], -1)
    either = seen[:, 1:] | seen[:, :1]  # (B, V-1, S, S)
    change = ((views[:, 1:] - views[:, :1]).abs().mean(2) * either).sum((-2, -1))
    change = change / either.sum((-2, -1)).clamp(min=1)  # (B, V-1)
    return (edge.float().mean(-1) > 0.5).any(1) | (change < 8 / 255).all(1)


def contradicts(views: Tensor, thresholds: Mapping[str, float] = THRESHOLDS) -> Tensor:  # -> (B,) bool
    """Hardly views of one object: below a threshold (as empty views are), or no object at all."""
    below = [check(views) < thresholds[name] for name, check in GEOMETRY.items()]
    return torch.stack(below).any(0) | no_object(views)


def geometry(views: Tensor, ref: Tensor) -> Tensor:  # (B, V, 3, S, S), ([B,] 3, S, S) -> (B,)
    """A feedback without weights, in [0, 1]: mean of the four, times the IoU of front and reference.

    The four alone have optima that nobody wants. All white has 0. A square, and noise that fills the frame,
    have 1: the last factor leaves them the share that the reference covers, and `no_object` makes a filled
    frame, and one picture in all views, 0. What stays: silhouettes see neither colour nor hollows, and a
    box, or the reference's outline pushed straight through space, is one object, too (feedback.larger)."""
    four = torch.stack([check(views) for check in GEOMETRY.values()]).mean(0)
    return four * silhouette_iou(views[:, 0], ref) * ~no_object(views)


def colours(views: Tensor, ref: Tensor) -> Tensor:  # (B, V, 3, S, S), ([B,] 3, S, S) -> (B,)
    """Have the unseen views the reference's colours, white included? In [0, 1], without weights.

    1 minus the Wasserstein-1 distance of a channel's values to the reference's, mean over views and channels.
    In one dimension that is the mean difference of the sorted values. Where a colour is does not matter, so a
    copied reference has 1: a feedback of it alone has an optimum that nobody wants."""
    values, own = (z.flatten(-2).sort(-1).values for z in (views[:, 1:], ref.expand(len(views), -1, -1, -1)))
    return 1 - (values - own[:, None]).abs().mean((1, 2, 3))


# --- how much did pictures change? A gain that nobody can see is no gain ---


def grey_levels_changed(a: Tensor, b: Tensor) -> Tensor:  # (N, V, 3, S, S) in [0, 1] -> (N,)
    """Mean |a - b| over views, channels and pixels, in levels of 255."""
    return (a - b).abs().flatten(1).mean(1) * 255


def share_changed(a: Tensor, b: Tensor) -> Tensor:  # (N, V, 3, S, S) in [0, 1] -> (N,)
    """Share of all pixels, white ones included, of which a channel differs by more than 8 levels of 255."""
    return ((a - b).abs().amax(-3) > 8 / 255).flatten(1).float().mean(1)


# --- views of known quality; how sure a difference is ---


def spoilt_views(truth: Tensor) -> dict[str, Tensor]:  # (N, V, 3, S, S), uint8 or float
    """Truth that contradicts its reference or itself. View 0, the reference's own, stays.

    A scorer that does not know which view it sees, as the paper's, is blind to `swapped` and nearly so to
    `mirrored`. The two named `right_` spoil one view only."""
    pixels, view = max(1, truth.shape[-1] * 3 // 64), torch.arange(truth.shape[1]).view(-1, 1, 1, 1)
    unseen, right = view > 0, view == VIEWS.index("right")
    swap = {"right": "back", "back": "right"}
    changes = {
        "mirrored": (unseen, truth.flip(-1)),
        "shifted": (unseen, truth.roll(pixels, -1)),
        "swapped": (unseen, truth[:, [VIEWS.index(swap.get(name, name)) for name in VIEWS]]),
        "right_mirrored": (right, truth.flip(-1)),
        "right_lower": (right, truth.roll(pixels, -2)),
    }
    if len(truth) > 1:  # otherwise the other object is the same one
        changes = {"other": (unseen, truth.roll(1, 0)), **changes}
    return {name: torch.where(where, change, truth) for name, (where, change) in changes.items()}


def bootstrap_interval(differences: Tensor, seed: int = 0, n: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of (N,) or (seeds, N): objects, and seeds, are drawn again n times.

    Seeds and objects are drawn apart and crossed, for an object is as hard for every seed. A resample is how
    often each was drawn: its mean is seed_counts . differences . object_counts / (seeds N)."""
    d = torch.atleast_2d(differences.double().cpu())
    generator = torch.Generator().manual_seed(seed)

    def counts(m: int) -> Tensor:  # (n, m)
        drawn = torch.randint(m, (n, m), generator=generator)
        return d.new_zeros(n, m).scatter_add_(1, drawn, d.new_ones(n, m))

    means = ((counts(d.shape[0]) @ d) * counts(d.shape[1])).sum(1) / d.numel()
    low, high = means.quantile(d.new_tensor([0.025, 0.975])).tolist()
    return low, high
