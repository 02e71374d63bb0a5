"""Candidates of one reference: what a feedback chooses from (paper App. B).

Preferences can only teach what candidates differ in. They share x_T and the reference's forward noise, and
differ by

    branch       the step noise of one call: one state x_t, an action each, equal noises afterwards
    independent  all step noises
    noised       the noise on their reference, each at its own scale (the paper's)

Under "branch" ONE action differs, and Eq. (2) knows what to praise; under the others a trained call is
praised for what other calls did. "independent" shows the most different shapes, and Diffusion-DPO, which asks
for no action, can use them. "noised" contrasts conditions: the loser tends to be what a blurred reference
gives. That is Section 4's guidance, but little of an object's shape is at stake, and a feedback that looks at
likeness takes the less noised. results/README.md has what the best of G gains under each, and what training
makes of it.

Letters: N references, B of them at a time, G candidates of each (from `read_rollouts` on: those compared),
J trained calls, R states of a reference (1 if its candidates share it, otherwise G), V views, c h w latent
sizes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import InputError, load_tensors
from model import MultiViewUNet
from sample import Schedule, sample

NOISE_SCALES = (0.0, 0.1, 0.3, 0.5, 0.8)  # of the references of "noised" (App. B)


class Rollouts(NamedTuple):
    """What the loss reads of all references: states and actions, in float32."""

    call: Tensor  # (N, J) which call of the chain this is
    x_t: Tensor  # (N, J, R, V, c, h, w) the state
    action: Tensor  # (N, J, G, V, c, h, w)
    y: Tensor  # (N, c, h, w) clean reference latent
    ref_noise: Tensor  # (N, c, h, w) epsilon_Y
    x0: Tensor  # (N, G, V, c, h, w) the finished candidates


def draw_candidates(
    model: MultiViewUNet, ref: Tensor, seeds: list[int], call: int, cfg: Any, bf16: bool
) -> tuple[Rollouts, Tensor]:  # of B references (B, 3, S, S); images (B, G, V, 3, S, S)
    """G candidates of each, and what training needs of them: state and action of the trained calls."""
    one, every = range(call, call + 1), range(cfg.trained_calls[0], cfg.trained_calls[1] + 1)
    # calls whose noise is a candidate's own; calls to train; scales of noise on the reference
    own, trained, scales = {
        "branch": (one, one, ()),
        "independent": (range(cfg.num_steps), every, ()),
        "noised": (range(0), every, NOISE_SCALES),
    }[cfg.candidates]
    G = len(scales) or cfg.num_candidates
    if cfg.loss == "diffusion_dpo":  # it reads finished candidates, one state is enough
        trained = trained[:1]
    chain = sample(model, ref, seeds, cfg.num_steps, G, own, scales, bf16)
    states = chain.states.unflatten(0, (len(ref), G)).transpose(1, 2)  # (B, K + 1, G, V, c, h, w)
    calls = torch.tensor(trained)
    x_t, action = states[:, calls], states[:, calls + 1]
    if cfg.candidates == "branch":  # up to its call all candidates are one chain
        x_t = x_t[:, :, :1]
    made = (x_t, action, chain.y, chain.ref_noise, states[:, -1])
    rollouts = Rollouts(calls.expand(len(ref), -1), *made)
    return Rollouts(*(z.cpu().contiguous() for z in rollouts)), chain.images.unflatten(0, (len(ref), G))


def read_rollouts(folder: Path, which: Tensor | None = None) -> Rollouts:
    """All rollouts of `collect`, in the order of the references, without the images.

    which (N, C): of reference n, only the candidates which[n]."""
    parts = []
    for path in folder.glob("*.safetensors"):
        part = load_tensors(path)
        if which is not None:
            chosen = which[part["reference"]]  # (B, C)
            b = torch.arange(len(chosen))[:, None]
            part["x0"] = part["x0"][b, chosen]
            for name in ("x_t", "action"):
                if part[name].shape[2] > 1:  # (B, J, G or 1, ...): candidates of one state share it
                    part[name] = part[name][b, :, chosen].transpose(1, 2)
        parts.append({k: v.clone() for k, v in part.items() if k != "images"})  # the file is let go
    reference = torch.cat([p["reference"] for p in parts])
    if not torch.equal(reference.sort().values, torch.arange(len(reference))):  # a copy beside a file
        raise InputError(f"{folder}: not one part for each reference, expected that. Delete it.")
    order = reference.argsort()
    return Rollouts(*(torch.cat([p.pop(name) for p in parts])[order] for name in Rollouts._fields))


class Batch(NamedTuple):
    """B references of a step, each at one trained call."""

    x_t: Tensor  # (B, R, V, c, h, w)
    action: Tensor  # (B, G, V, c, h, w)
    y: Tensor  # (B, c, h, w)
    ref_noise: Tensor  # (B, c, h, w)
    x0: Tensor  # (B, G, V, c, h, w)
    t: Tensor  # (B,)
    s: Tensor  # (B,)


def make_batch(
    rollouts: Rollouts, chosen: Tensor, js: Tensor, schedule: Schedule, num_steps: int, device: Any
) -> Batch:
    """References `chosen` (B,), each at its trained call number `js` (B,)."""
    times = torch.tensor(schedule.timesteps(num_steps))[rollouts.call[chosen, js]]  # (B, 2) t and s
    states = (rollouts.x_t[chosen, js], rollouts.action[chosen, js])
    rest = (rollouts.y[chosen], rollouts.ref_noise[chosen], rollouts.x0[chosen], times[:, 0], times[:, 1])
    return Batch(*(z.to(device) for z in states + rest))
