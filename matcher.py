"""Matching feedback: how many points does each view share with the reference? (paper Sec. 6, MV-D3PO-M)

    count_m = number of correspondences between the reference Y and view X_m
    reward  = sum_{m=1..4} count_m         never view 0, the reference's own: it would reward copying

The paper counts with LoFTR (Sun et al., 2021), here through kornia with published weights. SIFT needs none,
so it is the default. It never stands in silently: without LoFTR's file, `loftr` is an error.

What the number cannot see: matches are points that look alike, wherever they lie. A mirrored back view lines
up with the front's outline and gets as many matches as the true one; a copy of the front gets most of all.

About 45 ms for an image with SIFT, 1.3 s for a pair with LoFTR, on one core (rewards: LOG.md, 2026-11-22).

Letters: G candidates, V views, n keypoints of one image.
"""

from functools import cache, partial
from typing import Any

import kornia.feature as KF
import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from common import InputError, explained, published

MIN_SIZE = 256  # both methods find next to nothing on a 64-pixel image: smaller ones are enlarged to this
LOFTR_URL = "https://huggingface.co/kornia/loftr/resolve/main/loftr_outdoor.ckpt"


def to_grey(images: Tensor) -> Tensor:  # (N, 3, H, W) in [0, 1] -> (N, 1, S, S), S at least MIN_SIZE
    """What both methods read: one channel, large enough for features of a dozen pixels."""
    size = max(MIN_SIZE, images.shape[-1])
    images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


# --- SIFT: no weights ---


@cache
def sift_model(device: torch.device) -> KF.SIFTFeature:
    """Keypoints and descriptors, with the settings that best told truth from blur, noise and other objects.

    Upright, because all side views share "up". Not upscaled again (up_levels), and neighbours kept down
    to 5 pixels: the picture is smooth after `to_grey`. The threshold drops the noise of flat areas."""
    places: Any = dict(nms_size=5, pyramid_levels=4, up_levels=0, scale_factor_levels=2**0.5, s_mult=22.0)
    # "pyramid" is seven times as fast as the default, patches, and no worse here
    how: Any = dict(score_threshold=0.02, descriptor_backend="pyramid", config=places)
    return KF.SIFTFeature(500, True, **how).to(device)


def describe(image: Tensor) -> Tensor:  # (1, 1, S, S) -> (n, 128)
    """Descriptors of an image's keypoints; a blank one has none."""
    _, response, descriptors = sift_model(image.device)(image)  # padded with zero responses to num_features
    return descriptors[0][response[0] > 0]


def sift_counts(own: Any, views: Tensor) -> Tensor:  # (n, 128), (V, 1, S, S) -> (V,)
    """A match: nearest in both directions, and plainly nearer than the second nearest."""
    pairs = [KF.match_smnn(own, describe(view), 0.85)[0] for view in views.split(1)]  # one image a call
    return torch.tensor([len(matched) for matched in pairs])


# --- LoFTR: the paper's ---


@cache
def loftr_model(name: str, device: torch.device) -> KF.LoFTR:
    """The outdoor model from a file; "loftr": from torch's hub cache ($TORCH_HOME), downloaded if absent."""
    model = KF.LoFTR(pretrained=None)
    remedy = f"Put it into {torch.hub.get_dir()}/checkpoints, name the file (--matcher), or choose sift."
    with explained(f"matcher {name}: expected sift, loftr or loftr_outdoor.ckpt of {LOFTR_URL}. {remedy}"):
        model.load_state_dict(published(LOFTR_URL, "" if name == "loftr" else name))
    return model.to(device).eval()  # in training mode it asks for ground truth


def loftr_counts(own: Any, views: Tensor, model: KF.LoFTR) -> Tensor:  # features, (V, 1, S, S) -> (V,)
    """All views in one pass."""
    rows = {name: repeat(x, "1 ... -> V ...", V=len(views)) for name, x in own.items()}
    pairs = model({"features0": rows, "image1": views})
    return torch.bincount(pairs["batch_indexes"], minlength=len(views)).cpu()


# --- both ---


@torch.no_grad()
def count_matches(ref: Tensor, views: Tensor, method: str = "sift") -> Tensor:
    """(3, H, W) and (G, V, 3, H, W) in [0, 1] -> (G, V): correspondences of a reference with views of it.

    method: sift, loftr, or a file of LoFTR's weights. FORK: another matcher is another branch here."""
    if ref.ndim != 3 or views.ndim != 5:
        raise InputError(f"{tuple(ref.shape)}, {tuple(views.shape)}: expected (3,H,W) and (G,V,3,H,W).")
    if method == "sift":
        features, count = describe, sift_counts
    else:
        model = loftr_model(method, ref.device)
        features, count = model.extract_features, partial(loftr_counts, model=model)
    grey = to_grey(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    # SIFT is thousands of tiny operations: a second thread is no faster, and on busy cores ten times slower
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if method == "sift" else threads)
    try:
        own = features(to_grey(ref[None]))
        return torch.stack([count(own, candidate) for candidate in grey])
    finally:
        torch.set_num_threads(threads)


def matching_reward(ref: Tensor, views: Tensor, method: str = "sift") -> Tensor:
    """MV-D3PO-M's feedback, (G,): the sum over all views but 0, the reference's own."""
    return count_matches(ref, views[:, 1:], method).sum(dim=1).float()
