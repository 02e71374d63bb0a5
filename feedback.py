"""Feedbacks: which of a reference's candidates is the most 3D-consistent? (paper Sec. 5, Sec. 6.1)

A feedback rates the G candidates of one reference, larger is better:

    feedback(reference (3,S,S), images (G,V,3,S,S), ground truth (V,3,S,S), cfg) -> (G,)

G is 1 in the report, which shows the feedback itself before and after. cfg is train_d3po.Config. Only the
oracle may look at the ground truth. FORK: yours is one more function here, and stands in EVERY. Rewards are
made anew whenever its code changes (of a file of yours: the function's own, not what it calls).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metrics
from common import InputError, digest, get_device, keyed_generator, located
from matcher import matching_reward
from scorer import Scorer, contrastive_reward


@cache
def scorer_at(folder: Path, modified: int, device: torch.device) -> Scorer:
    """Read once, not for every reference."""
    return Scorer.load(folder, device)


def contrastive(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """MV-D3PO-C: the contrastive scorer's sum over the other views (Sec. 5)."""
    folder = located(cfg.scorer)
    scorer = scorer_at(folder, (folder / "model.safetensors").stat().st_mtime_ns, ref.device)
    return contrastive_reward(scorer, ref.expand(len(images), -1, -1, -1), images)


def matching(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """MV-D3PO-M: the number of keypoints that the other views share with the reference (Sec. 6.1)."""
    return matching_reward(ref, images, cfg.matcher)


def hull(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Ours: do the five silhouettes fit one object?"""
    return metrics.hull_iou(images)


def geometry(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Ours: exact geometry of silhouettes, guarded against blank, square and copied views (metrics.py)."""
    return metrics.geometry(images, ref)


def lean(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Ours: geometry as far as size does not explain it. Larger silhouettes fit each other better; .32 is the
    slope of geometry over covered area among five samples of each of 240 preference references."""
    return geometry(ref, images, truth, cfg) - 0.32 * larger(ref, images, truth, cfg)


def colours(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Ours: have the other views the reference's colours? (A copy of it has, see metrics.py.)"""
    return metrics.colours(images, ref)


def agreement(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Ours: do shapes agree with each other, and colours with the reference? A copy has 1, truth 1.9."""
    return geometry(ref, images, truth, cfg) + colours(ref, images, truth, cfg)


def redder(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """The control that everybody understands. If this does not work, the loop is at fault."""
    return (images[:, :, 0] - images[:, :, 1:].mean(2)).mean((1, 2, 3))


def random(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Control: what do preferences without content do? A function of the images, so that it is drawn once."""
    keys = [int(digest(x), 16) % 2**62 for x in images.cpu()]
    return torch.stack([torch.rand((), generator=keyed_generator(cfg.seed, key)) for key in keys])


def least_noise(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Control for --candidates noised: the less noised reference wins, no image is looked at."""
    return -torch.arange(len(images)).float()


def larger(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Control: the larger silhouettes win. Fat views fit each other: this, too, lowers the contradiction
    rate, and pays in SSIM and LPIPS (results/README.md)."""
    return metrics.covered(images)


def oracle(ref: Tensor, images: Tensor, truth: Tensor, cfg: Any) -> Tensor:
    """Control: distance to the ground truth, which no feedback may see."""
    return metrics.closeness(images, truth)


def rate(feedback: Callable[..., Tensor], images: Tensor, truth: Tensor, cfg: Any) -> Tensor:  # (G,)
    """Rewards of one reference's candidates (G, V, 3, S, S): computed on --device, returned on the CPU.

    truth (V, 3, S, S): view 0 is the reference."""
    images, truth = (z.to(get_device(cfg.device)) for z in (images, truth))
    return feedback(truth[0], images, truth, cfg).cpu()


OURS = (hull, geometry, lean, colours, agreement)
EVERY = (contrastive, matching, *OURS, redder, random, least_noise, larger, oracle)
FEEDBACKS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in EVERY}


def preference_pairs(rewards: Tensor, pairs: str) -> tuple[Tensor, Tensor]:  # of (N, G)
    """Which candidates are compared, (N, C), and who wins: [n, w, l] of (N, C, C) bool, w beats l.

    pairs: all (C = G), or extremes, the best against the worst alone (C = 2), because near ties are noise. Of
    equal rewards the first is taken."""
    compared = torch.arange(rewards.shape[1]).expand_as(rewards)
    if pairs == "extremes":
        compared = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)
    elif pairs != "all":
        raise InputError(f"--pairs {pairs}: unknown, expected extremes or all.")
    rewards = rewards.gather(1, compared)
    return compared, rewards[:, :, None] > rewards[:, None]
