"""Stage 3: MV-D3PO. Collect candidates, prefer by 3D-consistency feedback, fine-tune (paper Sec. 3.2.2, Eq. 2, App. B).

    L = -log sigmoid( beta [log pi_theta/pi_pre (a_w|s_w) - log pi_theta/pi_pre (a_l|s_l)] ) + lambda L_simple-MV

    pi(a|s) = N(a; mean(x_t, Y, t), var)     one denoising step: the state s is x_t, the action a the x_s that it went to

1. collect: for each reference the policy draws G candidates. They share all noises but one: at a call k in the first half
   of the chain, where the object's shape is decided, each takes an action of its own.
2. prefer: a feedback rates the finished images. Of every two candidates the better is the winner, the other the loser.
3. train: Eq. (2) at call k moves the policy towards winners' actions. Winner and loser start from the SAME state, so one
   forward serves all pairs of a reference, and what the loss sees is linear in the change of the policy's mean.
4. report: sample validation objects before and after, from equal noise.

Differences from D3PO's code (yk7333/d3po, which the paper builds on): the action is joint over the views; its log-ratio is
a sum, not a mean, and has no clip; all pairs of G candidates share one forward; pi_pre's means are stored, so no second
network is held. Difference from the paper: its candidates differ in the noise on their reference (App. B), which is
`--candidates noised`; results/README.md shows what each design can teach.

Run:
    python train_d3po.py --feedback contrastive         # the main job
    python train_d3po.py --feedback geometry            # or matching, hull, redder: no scorer
    python train_d3po.py --feedback none                # L_simple-MV alone: the SFT baseline
    python train_d3po.py --loss diffusion_dpo           # contrast on finished candidates instead of actions

    Writes out/d3po_<feedback>-<content>/{config.json, model.safetensors, log.jsonl, results.json, grid.png}

Letters: N references, B of them in a batch, G candidates of each, J trained calls, V views, c h w latent sizes.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train_scorer
from common import (
    InputError,
    Log,
    cached,
    check_at_least,
    cli,
    digest,
    get_device,
    key_seed,
    keyed_generator,
    load_json,
    load_state,
    load_tensors,
    located,
    optimizer_step,
    provenance,
    save_json,
    save_state,
    save_tensors,
    training_steps,
    use_bf16,
)
from data import load_references, load_split
from evaluate import before_after, print_table
from grid import grid
from matcher import loftr_model, matching_reward
from metrics import closeness, geometry, hull_iou
from model import MultiViewUNet, load
from sample import (
    Schedule,
    branch,
    forward_noise,
    kl_divergence,
    log_ratio,
    noised_reference,
    policy_mean,
    sample,
    sample_images,
    split_prediction,
)
from scorer import Scorer, contrastive_reward
from train_sft import simple_loss, training_batch

NOISE_SCALES = (0.0, 0.1, 0.3, 0.5, 0.8)  # of the references of --candidates noised (App. B)


@dataclass(frozen=True)
class Config:
    """Defaults are the main job on a CPU; paper values are named in the comments."""

    feedback: str = "contrastive"  # a name in FEEDBACKS, or none: L_simple-MV alone, the SFT baseline
    model: str = "checkpoints/objects"  # pi_pre: a folder that train_sft.py wrote
    data: str = "furniture"  # furniture, toys, or a folder of renders (see data.py)
    num_references: int = 240  # of preference objects (paper: 240)
    eval_objects: int = 64  # validation objects
    out: str = "out"  # where everything goes

    scorer: str = ""  # a trained scorer's folder; empty: --feedback contrastive trains one
    negatives: str = "checkpoints/objects_independent"  # that scorer's: train_scorer.py --negatives
    matcher: str = "sift"  # sift, loftr, or a file of LoFTR weights, for --feedback matching

    candidates: Literal["branch", "noised", "independent"] = (
        "branch"  # what tells candidates apart: see `collect`
    )
    num_candidates: int = 8  # G of branch and independent (noised: one for each scale of App. B)
    num_steps: int = 10  # network calls K of the sampler (paper: 50)
    trained_calls: tuple[int, int] = (
        0,
        4,
    )  # first and last of the calls that Eq. (2) trains (paper: the last 40 of 50)

    loss: Literal["d3po", "diffusion_dpo"] = "d3po"  # which log-ratio of a candidate Eq. (2) compares
    beta_dpo: float = 1.0  # beta of Eq. 2 on the log-ratio SUMMED over V c h w
    kl: float = 0.1  # weight of KL(pi_theta || pi_pre) at the trained states (paper: 0)
    lambda_simple: float = 100.0  # weight of L_simple-MV (paper: 1, where its gradient is too short to count)
    min_gap: float = 0.0  # leave out pairs whose rewards differ by less than this many standard deviations
    rounds: int = 1  # collect, prefer, train again with the policy of the round before
    anchor: Literal["pre", "last"] = (
        "pre"  # log-ratios and KL are to pi_pre, or to the policy that drew the candidates
    )

    steps: int = 60  # optimizer steps a round (paper: 1800)
    batch_objects: int = 8  # references a step, and as many ground-truth objects for L_simple-MV
    lr: float = 5e-5  # AdamW; falls to 0 in a straight line
    attention_only: bool = False  # train the attention layers only, as the paper does (App. B)
    lora: int = 0  # train a change of this rank of the attention projections only: less memory; 0: no
    seed: int = 0  # of candidates, batches and noise

    batch_size: int = 8  # references at a time when sampling
    bf16: Literal["auto", "on", "off"] = "auto"  # run the network in bfloat16; auto: where it is fast
    checkpointing: bool = (
        False  # keep few activations and compute the others again: half the speed, far less memory
    )
    device: str = "auto"  # auto, cpu or cuda


# --- 1. candidates ---


class Rollouts(NamedTuple):
    """What the loss reads of all references: states and actions, in float32. R is 1 where candidates share a state."""

    call: Tensor  # (N, J) which call of the chain this is
    x_t: Tensor  # (N, J, R, V, c, h, w) the state
    action: Tensor  # (N, J, G, V, c, h, w)
    y: Tensor  # (N, c, h, w) clean reference latent
    ref_noise: Tensor  # (N, c, h, w) epsilon_Y
    x0: Tensor  # (N, G, V, c, h, w) the finished candidates


def draw_candidates(
    model: MultiViewUNet, ref: Tensor, seeds: list[int], call: int, cfg: Config, bf16: bool
) -> tuple[Rollouts, Tensor]:  # of B references (B, 3, S, S); images (B, G, V, 3, S, S)
    """Three designs of "candidates of one reference":

    branch       one state at call k, one action each, equal noise afterwards: they differ by that action alone
    noised       equal noise, but each sees the reference through noise of its own scale (App. B)
    independent  all noises of their own
    """
    first, last = cfg.trained_calls
    if cfg.candidates == "branch":
        b = branch(model, ref, seeds, call, cfg.num_candidates, cfg.num_steps, bf16)
        at = torch.full((len(ref), 1), call)
        rollouts = Rollouts(at, b.x_t[:, None, None], b.actions[:, None], b.y, b.ref_noise, b.x0)
        return Rollouts(*(z.cpu() for z in rollouts)), b.images
    G = len(NOISE_SCALES) if cfg.candidates == "noised" else cfg.num_candidates
    rows = torch.arange(len(ref)).repeat_interleave(G)
    scales = list(NOISE_SCALES) * len(ref) if cfg.candidates == "noised" else None
    own = None if cfg.candidates == "noised" else list(range(G)) * len(ref)
    chain = sample(model, ref[rows], [seeds[i] for i in rows], cfg.num_steps, own, scales, bf16)
    states = chain.states.unflatten(0, (len(ref), G)).transpose(1, 2)  # (B, K + 1, G, V, c, h, w)
    calls = torch.arange(first, last + 1).expand(len(ref), -1)
    states_of = (calls, states[:, first : last + 1], states[:, first + 1 : last + 2])
    rollouts = Rollouts(*states_of, chain.y[::G], chain.ref_noise[::G], states[:, -1])
    return Rollouts(*(z.cpu().contiguous() for z in rollouts)), chain.images.unflatten(0, (len(ref), G))


def collect(policy: Path, references: Tensor, cfg: Config, round: int) -> Path:
    """Candidates of every reference (N, V, 3, S, S) uint8 by the policy; a folder with a file for each few references."""
    device = get_device(cfg.device)
    bf16 = use_bf16(cfg.bf16, device)
    options = ("candidates", "num_candidates", "num_steps", "trained_calls", "seed", "batch_size")
    made_by = {name: getattr(cfg, name) for name in options} | {
        "policy": digest(policy),
        "bf16": bf16,
        "round": round,
    }
    made_by |= {
        "references": digest(references[:, 0]),
        "code": [digest(f) for f in (draw_candidates, branch, sample)],
    }
    # Each reference branches at one call, drawn once; those with equal calls go through the network together.
    first, last = cfg.trained_calls
    calls = torch.randint(first, last + 1, (len(references),), generator=keyed_generator(cfg.seed, 10, round))
    order = calls.sort(stable=True).indices if cfg.candidates == "branch" else torch.arange(len(references))

    def make(folder: Path) -> None:
        model = load(policy, device, half=bf16)
        groups = [
            g
            for k in calls[order].unique_consecutive()
            for g in order[calls[order] == k].split(cfg.batch_size)
        ]
        groups = groups if cfg.candidates == "branch" else list(order.split(cfg.batch_size))
        for group in tqdm(groups, desc="candidates", disable=None):
            path = folder / f"{int(group[0]):06d}.safetensors"
            if path.is_file():
                continue
            ref = references[group, 0].to(device).float() / 255
            seeds = [key_seed(cfg.seed, 8, round, int(i)) for i in group]  # 8: other noise than in evaluation
            rollouts, images = draw_candidates(model, ref, seeds, int(calls[group[0]]), cfg, bf16)
            images = (images * 255).round().to(torch.uint8)
            save_tensors(path, {**rollouts._asdict(), "images": images, "reference": group})

    return cached(cfg.out, "candidates", made_by, make)


def read_rollouts(folder: Path) -> Rollouts:
    """All rollouts of `collect`, in the order of the references. The images stay on disk."""
    parts = [load_tensors(path) for path in sorted(folder.glob("*.safetensors"))]
    order = torch.cat([p["reference"] for p in parts]).argsort()
    return Rollouts(*(torch.cat([p[name] for p in parts])[order] for name in Rollouts._fields))


# --- 2. preferences ---

# A feedback rates the G candidates of one reference: (reference (3,S,S), images (G,V,3,S,S), ground truth (V,3,S,S), cfg)
# -> (G,), larger is better. FORK: yours is one more function here and its line in FEEDBACKS.


def contrastive(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """MV-D3PO-C: the contrastive scorer's sum over the other views (Sec. 5)."""
    scorer = Scorer.load(cfg.scorer, ref.device)
    return contrastive_reward(scorer, ref.expand(len(images), -1, -1, -1), images)


def matching(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """MV-D3PO-M: the number of keypoints that the other views share with the reference (Sec. 6.1)."""
    method = "sift" if cfg.matcher == "sift" else "loftr"
    weights = "" if cfg.matcher in ("sift", "loftr") else cfg.matcher
    return matching_reward(ref.expand(len(images), -1, -1, -1), images, method, weights)


def hull(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """Ours: do the five silhouettes fit one object?"""
    return hull_iou(images)


def geometric(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """Ours: exact geometry of the silhouettes, guarded against blank, square and copied views (metrics.geometry)."""
    return geometry(images, ref.expand(len(images), -1, -1, -1))


def redder(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """The control that everybody understands: more red than green and blue. If this does not work, the loop is at fault."""
    return (images[:, :, 0] - images[:, :, 1:].mean(2)).mean((1, 2, 3))


def random(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """Control: what do preferences without content do? A function of the images, so that it is drawn once."""
    return torch.stack(
        [
            torch.rand((), generator=keyed_generator(cfg.seed, int(digest(x), 16) % 2**62))
            for x in images.cpu()
        ]
    )


def least_noise(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """Control for --candidates noised: the less noised reference wins, no image is looked at."""
    return -torch.arange(len(images)).float()


def oracle(ref: Tensor, images: Tensor, truth: Tensor, cfg: Config) -> Tensor:
    """Control: distance to the ground truth, which no feedback may see."""
    return closeness(images, truth)


FEEDBACKS: dict[str, Callable[[Tensor, Tensor, Tensor, Config], Tensor]] = {
    "contrastive": contrastive,
    "matching": matching,
    "hull": hull,
    "geometry": geometric,
    "redder": redder,
    "random": random,
    "least_noise": least_noise,
    "oracle": oracle,
}


def prefer(candidates: Path, references: Tensor, cfg: Config) -> Tensor:  # (N, G) rewards
    """Rate the candidates of each reference. Says how often the winner of a pair is nearer to the ground truth."""
    device, feedback = get_device(cfg.device), FEEDBACKS[cfg.feedback]
    made_by = {"candidates": digest(load_json(candidates / "made_by.json")), "feedback": cfg.feedback}
    made_by |= {"code": digest(feedback), "references": digest(references), "seed": cfg.seed}
    if cfg.feedback == "contrastive":
        made_by["scorer"] = digest(Path(cfg.scorer))
    if cfg.feedback == "matching":
        made_by["matcher"] = digest(Path(cfg.matcher)) if Path(cfg.matcher).is_file() else cfg.matcher

    def make(folder: Path) -> None:
        G = load_tensors(min(candidates.glob("*.safetensors")))["images"].shape[1]
        rewards, psnr = torch.empty(len(references), G), torch.empty(len(references), G)
        for path in tqdm(
            sorted(candidates.glob("*.safetensors")), desc=f"{cfg.feedback} feedback", disable=None
        ):
            part = load_tensors(path)
            for i, images in zip(part["reference"].tolist(), part["images"]):
                images, truth = images.to(device).float() / 255, references[i].to(device).float() / 255
                rewards[i] = feedback(truth[0], images, truth, cfg).cpu()
                psnr[i] = closeness(images, truth).cpu()
        if not torch.isfinite(rewards).all():
            raise InputError(
                f"--feedback {cfg.feedback}: {rewards.isfinite().logical_not().sum()} rewards are not finite."
            )
        save_tensors(folder / "rewards.safetensors", {"rewards": rewards, "psnr": psnr})

    kept = load_tensors(cached(cfg.out, f"rewards_{cfg.feedback}", made_by, make) / "rewards.safetensors")
    wins = preference_pairs(kept["rewards"], cfg.min_gap)
    if not wins.any():
        raise InputError(
            f"--feedback {cfg.feedback}: all candidates of all references tie, expected a preference."
        )
    nearer = (kept["psnr"][:, :, None] > kept["psnr"][:, None])[wins].float().mean()
    print(
        f"{int(wins.sum())} pairs of {len(wins)} references; in {nearer:.0%} the winner is nearer to the ground truth"
    )
    return kept["rewards"]


def preference_pairs(rewards: Tensor, min_gap: float) -> Tensor:  # (N, G) -> (N, G, G) bool
    """[n, w, l]: candidate w of reference n beats l, by more than min_gap typical standard deviations among candidates."""
    gap = rewards[:, :, None] - rewards[:, None]
    return gap > min_gap * rewards.std(1).mean()


# --- 3. the loss ---


def d3po_loss(
    log_ratio_w: Tensor,  # (P,) log pi_theta/pi_pre of the winner's action, summed over V c h w
    log_ratio_l: Tensor,  # (P,) of the loser's
    beta: float,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 2, mean over pairs, each at one denoising step. No clip: the paper's equation has none (D3PO's code has).

    FORK: another loss on pairs of log-ratios (IPO, hinge...) is another function of these two.
    """
    # L = -log sigmoid( beta log_ratio_w - beta log_ratio_l )
    margin = beta * (log_ratio_w - log_ratio_l)
    loss = -F.logsigmoid(margin).mean()
    return loss, {
        "loss_d3po": loss.item(),  # log 2 = 0.693 at theta = pre
        "margin": margin.mean().item(),
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
        "log_ratio_w": log_ratio_w.mean().item(),
        "log_ratio_l": log_ratio_l.mean().item(),
    }


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
    parts = (
        rollouts.x_t[chosen, js],
        rollouts.action[chosen, js],
        rollouts.y[chosen],
        rollouts.ref_noise[chosen],
    )
    return Batch(*(z.to(device) for z in (*parts, rollouts.x0[chosen], times[:, 0], times[:, 1])))


def batch_means(policy: MultiViewUNet, schedule: Schedule, batch: Batch, bf16: bool) -> tuple[Tensor, Tensor]:
    """The policy's mean (B R, V, c, h, w) and var at the states of a batch: one forward for all candidates.

    The loss always shows it the CLEAN reference. With the noised one that a candidate was drawn with, the noise scale
    alone may decide who wins, and then the expected gradient vanishes at theta = pre: E_pi[grad log pi] = 0 for winner and
    loser each.
    """
    R = batch.x_t.shape[1]
    rows = (z.repeat_interleave(R, 0) for z in (batch.y, batch.ref_noise, batch.t, batch.s))
    return policy_mean(policy, schedule, batch.x_t.flatten(0, 1), *rows, bf16)


def step_log_ratio(
    policy: MultiViewUNet, schedule: Schedule, batch: Batch, mean_pre: Tensor, bf16: bool
) -> tuple[Tensor, Tensor]:  # (B, G) log pi_theta/pi_pre of each action, (B,) KL; both in nats
    """D3PO's: of the action that led to the candidate. mean_pre (B, R, V, c, h, w) is pi_pre's mean at these states.

    With one state for all candidates (R = 1) the difference of two log-ratios is <mean_theta - mean_pre, a_w - a_l> / var:
    linear, the quadratic parts cancel. So nothing in Eq. (2) itself keeps the policy near pi_pre; `--kl` does.
    """
    B, R, G = *batch.x_t.shape[:2], batch.action.shape[1]
    mean, var = batch_means(policy, schedule, batch, bf16)
    times = G // R  # G candidates share a state, or each has its own
    mean, pre, var = (z.repeat_interleave(times, 0) for z in (mean, mean_pre.flatten(0, 1), var))  # (B G, ...)
    ratio = log_ratio(batch.action.flatten(0, 1), mean, pre, var)  # (B G,)
    return ratio.view(B, G), kl_divergence(mean, pre, var).view(B, G).mean(1)


def forward_log_ratio(
    policy: MultiViewUNet,
    pre: MultiViewUNet,
    schedule: Schedule,
    batch: Batch,
    seed: int,
    step: int,
    bf16: bool,
) -> tuple[Tensor, Tensor]:  # (B, G), (B,)
    """Diffusion-DPO's (Wallace et al. 2023): of the finished candidate, noised again. Needs no action, but pi_pre's network.

    log p_theta/p_pre (x0) >= E_{t, noise} w_t [ |x0 - x0_pre(x_t)|^2 - |x0 - x0_theta(x_t)|^2 ], one draw of t and noise,
    the same for all candidates of a reference. Eq. (2) with these in place of the log-ratios of one step asks: whose
    picture does the policy now denoise better than pi_pre did? w_t = 1 / (2 (1 - ab_t)), as in L_simple-MV.
    """
    (B, G), g = batch.x0.shape[:2], keyed_generator(seed, 11, step)
    t = torch.randint(100, 951, (B,), generator=g).to(batch.t)
    noise, ref_noise = (
        torch.randn(z[:, 0].shape, generator=g).to(t.device) for z in (batch.x0, batch.x0[:, :, 0])
    )
    rows = lambda z: z.repeat_interleave(G, 0)  # noqa: E731  # (B, ...) -> (B G, ...)
    x0, t, y, noise, ref_noise = batch.x0.flatten(0, 1), rows(t), rows(batch.y), rows(noise), rows(ref_noise)
    x_t = forward_noise(schedule, x0, t, noise)
    predictions = []
    for network in (policy, pre):
        with (
            torch.set_grad_enabled(network is policy),
            torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16),
        ):
            output = network(x_t, t, noised_reference(schedule, policy.cfg, y, t, ref_noise))
        predictions.append(split_prediction(schedule, output, x_t, t)[0])
    theta, old = predictions
    weight = 1 / (2 * (1 - schedule.ab(t)))
    ratio = (weight * ((x0 - old) ** 2 - (x0 - theta) ** 2)).flatten(1).sum(1)
    return ratio.view(B, G), (weight * (theta - old) ** 2).flatten(1).sum(1).view(B, G).mean(1)


def frozen_means(model: MultiViewUNet, rollouts: Rollouts, cfg: Config, bf16: bool, device: Any) -> Tensor:
    """pi_pre's mean at every trained state (N, J, R, V, c, h, w): once, so that no second network is held while training.

    In batches of the training shape and with gradients switched on, because kernels, and so their rounding, depend on
    both: then equal weights give exactly equal means.
    """
    schedule, means = Schedule(model.cfg), torch.empty_like(rollouts.x_t)
    N, J = rollouts.call.shape
    index = torch.cartesian_prod(torch.arange(N), torch.arange(J))  # (N J, 2)
    for part in tqdm(index.split(cfg.batch_objects), desc="means of pi_pre", disable=None):
        filled = torch.cat([part, part[-1:].expand(cfg.batch_objects - len(part), 2)])
        batch = make_batch(rollouts, *filled.unbind(1), schedule, cfg.num_steps, device)
        mean, _ = batch_means(model, schedule, batch, bf16)
        means[part[:, 0], part[:, 1]] = mean.detach().cpu().unflatten(0, (len(filled), -1))[: len(part)]
    return means


def prepare(folder: str | Path, cfg: Config, device: Any) -> tuple[MultiViewUNet, list[Any]]:
    """A model to fine-tune, and its trained parameters. Of SDXL what is frozen is stored in bfloat16."""
    model = load(folder)
    torch.manual_seed(cfg.seed)  # of LoRA's start; all other noise has keys of its own
    if cfg.lora:
        model.add_lora(cfg.lora)
    parameters = model.freeze(cfg.attention_only, model.cfg.is_sdxl and use_bf16(cfg.bf16, device))
    model.to(device)
    if cfg.checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model, parameters


def train(
    start: Path, pre: Path, candidates: Path | None, rewards: Tensor | None, objects: Tensor, cfg: Config
) -> Path:
    """Fine-tune the policy in `start` on L = L_MV-D3PO + lambda L_simple-MV + kl KL; returns the folder of the run."""
    device = get_device(cfg.device)
    bf16 = use_bf16(cfg.bf16, device)
    own = (
        ("loss", "beta_dpo", "kl", "min_gap", "batch_objects", "num_steps")
        if candidates
        else ("batch_objects",)
    )
    options = (*own, "lambda_simple", "steps", "lr", "attention_only", "lora", "seed", "checkpointing")
    made_by = {name: getattr(cfg, name) for name in options} | {
        "start": digest(start),
        "objects": digest(objects),
    }
    made_by |= {
        "bf16": bf16,
        "on": device.type,
        "code": [digest(f) for f in (run, d3po_loss, step_log_ratio)],
    }
    if candidates and rewards is not None:
        made_by |= {"pre": digest(pre), "rewards": digest(rewards), "feedback": cfg.feedback}
        made_by |= {"candidates": digest(load_json(candidates / "made_by.json"))}
    name = f"d3po_{cfg.feedback}" if candidates else "sft"
    return cached(cfg.out, name, made_by, partial(run, start, pre, candidates, rewards, objects, cfg))


def run(
    start: Path,
    pre: Path,
    candidates: Path | None,
    rewards: Tensor | None,
    objects: Tensor,
    cfg: Config,
    folder: Path,
) -> None:
    """The loop. Without candidates what is left is L_simple-MV: the SFT baseline, with all else equal."""
    device = get_device(cfg.device)
    bf16 = use_bf16(cfg.bf16, device)
    policy, parameters = prepare(start, cfg, device)
    schedule = Schedule(policy.cfg)
    if candidates and rewards is not None:
        rollouts, wins = read_rollouts(candidates), preference_pairs(rewards, cfg.min_gap)
        usable = wins.flatten(1).any(1).nonzero()[:, 0]  # references whose candidates do not all tie
        pre_policy = policy if digest(pre) == digest(start) else prepare(pre, cfg, device)[0]
        if cfg.loss == "d3po":
            mean_pre = frozen_means(pre_policy, rollouts, cfg, bf16, device)
        else:
            pre_policy = copy.deepcopy(pre_policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        parameters, cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
    )

    state = load_state(folder / "state.pt")
    if state:
        policy.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        print(f"{folder}: goes on at step {state['step']}")
    log = Log(folder / "log.jsonl", state.get("step", 0), 10, cfg.steps, sums=state.get("log"))

    def save(done: int) -> None:
        parts = {"model": policy.trained_state(), "optimizer": optimizer.state_dict(), "log": log.sums}
        save_state(folder / "state.pt", parts, step=done)

    for step in training_steps(state.get("step", 0), cfg.steps, "train_d3po", save):
        metrics = {}
        if candidates:
            # batch: references, each at one of its trained calls; a function of (seed, step) alone
            g = keyed_generator(cfg.seed, 6, step)
            chosen = usable[torch.randint(len(usable), (cfg.batch_objects,), generator=g)]
            js = torch.randint(rollouts.call.shape[1], (cfg.batch_objects,), generator=g)
            batch = make_batch(rollouts, chosen, js, schedule, cfg.num_steps, device)

            # forward: Eq. (2), one log-ratio for each candidate, one term for each pair
            if cfg.loss == "d3po":
                ratio, kl = step_log_ratio(policy, schedule, batch, mean_pre[chosen, js].to(device), bf16)
            else:
                ratio, kl = forward_log_ratio(policy, pre_policy, schedule, batch, cfg.seed, step, bf16)
            if step == 0 and cfg.anchor == "pre" and start == pre and ratio.abs().max() * cfg.beta_dpo > 1e-3:
                raise InputError(
                    f"before the first update the log-ratio is {ratio.abs().max():.2g}, expected 0."
                )
            b, w, l = wins[chosen].nonzero(as_tuple=True)  # noqa: E741
            loss_d3po, metrics = d3po_loss(ratio[b, w], ratio[b, l], cfg.beta_dpo)
            # backward: L = L_MV-D3PO + kl KL + lambda L_simple-MV. Gradients add up in p.grad, so each loss goes backward
            # at once, and its activations are gone before the next.
            (loss_d3po + cfg.kl * kl.mean()).backward()
            norms = [p.grad.norm() for p in parameters if p.grad is not None]
            metrics |= {"kl": kl.mean().item(), "grad_d3po": torch.stack(norms).norm().item()}
        real = training_batch(policy, schedule, [objects], cfg.batch_objects, cfg.seed, step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss_simple = simple_loss(policy, schedule, *real).mean()
        (cfg.lambda_simple * loss_simple).backward()

        # step, log
        norm = optimizer_step([optimizer], parameters, 1 - step / cfg.steps, step)
        log.add(step, **metrics, loss_simple=loss_simple.item(), grad_norm=norm)
    policy.save(folder)
    (folder / "state.pt").unlink(missing_ok=True)


# --- 4. the report ---


def draw_validation(model: Path, views: Tensor, cfg: Config) -> Tensor:
    """Images (N, V, 3, S, S) of validation objects (N, V, 3, S, S) uint8, drawn from their front view."""
    device = get_device(cfg.device)
    bf16 = use_bf16(cfg.bf16, device)
    made_by = {
        "model": digest(model),
        "objects": digest(views[:, 0]),
        "num_steps": cfg.num_steps,
        "seed": cfg.seed,
    }

    def make(folder: Path) -> None:
        policy = load(model, device, half=bf16)
        ref = views[:, 0].float() / 255
        images = sample_images(
            policy, ref, cfg.seed, cfg.num_steps, cfg.batch_size, "validation objects", bf16
        )
        save_tensors(folder / "images.safetensors", {"images": (images * 255).round().to(torch.uint8)})

    folder = cached(cfg.out, "validation", made_by | {"bf16": bf16, "on": device.type}, make)
    return load_tensors(folder / "images.safetensors")["images"].float() / 255


def report(pre: Path, policy: Path, cfg: Config, clock: float) -> dict:
    """Before against after on validation objects, with equal noise: table, results.json, grid.png in the run's folder."""
    views = load_split(cfg.data, "validation", cfg.eval_objects, load(pre).cfg.image_size)
    truth, before, after = (
        views.float() / 255,
        draw_validation(pre, views, cfg),
        draw_validation(policy, views, cfg),
    )
    scorers = {"contrastive": Scorer.load(cfg.scorer)} if cfg.scorer else {}
    table = before_after(before, after, truth, scorers)
    print_table(table, cfg.feedback)
    # the objects that changed most, so that a reader sees what changed
    most = (after - before).abs().flatten(1).mean(1).argsort(descending=True)[:8]
    columns = {"ground truth": truth, "before": before, "after": after}
    grid(policy / "grid.png", {k: v[most] for k, v in columns.items()}, truth[most, 0])
    result = {
        **provenance(cfg),
        "table": table,
        "folder": str(policy),
        "seconds": round(time.time() - clock, 1),
    }
    save_json(policy / "results.json", result)
    print(f"total {result['seconds']:.0f} s; {policy}/grid.png shows the eight objects that changed most")
    return result


def find_scorer(cfg: Config) -> str:
    """The scorer of --feedback contrastive: given, or trained now (stage 2)."""
    if cfg.scorer or cfg.feedback != "contrastive":
        return cfg.scorer
    model = load(cfg.model).cfg
    if model.is_sdxl:
        raise InputError(
            "--feedback contrastive: expected --scorer. Train one: python train_scorer.py --backbone ..."
        )
    shared = {
        k: getattr(cfg, k)
        for k in ("negatives", "data", "num_references", "num_steps", "bf16", "device", "seed")
    }
    out = str(Path(cfg.out) / "scorer")
    return train_scorer.main(train_scorer.Config(**shared, image_size=model.image_size, out=out))["folder"]


def check(cfg: Config) -> None:
    """Refuse impossible options before any computation."""
    if cfg.feedback not in (*FEEDBACKS, "none"):
        raise InputError(f"--feedback {cfg.feedback}: unknown, expected one of {', '.join(FEEDBACKS)}, none.")
    if cfg.feedback == "least_noise" and cfg.candidates != "noised":
        raise InputError("--feedback least_noise: expected --candidates noised.")
    if cfg.feedback == "matching" and cfg.matcher != "sift":
        loftr_model(
            "" if cfg.matcher == "loftr" else cfg.matcher, torch.device("cpu")
        )  # are its weights there?
    first, last = cfg.trained_calls
    if not 0 <= first <= last < cfg.num_steps - 1:  # the last call of a chain has no density
        raise InputError(
            f"--trained_calls {first} {last}: expected 0 <= first <= last <= {cfg.num_steps - 2}."
        )
    check_at_least(cfg, 1, "steps", "batch_objects", "batch_size", "num_references", "eval_objects", "rounds")
    check_at_least(cfg, 2, "num_candidates")
    check_at_least(cfg, 0, "beta_dpo", "kl", "lambda_simple", "min_gap", "lr", "lora")


def main(cfg: Config) -> dict:
    """Collect, prefer, fine-tune, report. A stage that was made before by the same inputs is read, not done again."""
    check(cfg)
    clock = time.time()
    pre = policy = located(cfg.model)
    model = load(pre).cfg
    Schedule(model).timesteps(cfg.num_steps)  # a wrong number of them shows now
    size = model.image_size
    references = load_references(cfg.data, cfg.num_references, size, cfg.seed)  # (N, V, 3, S, S) uint8
    objects = load_split(
        cfg.data, "preference", cfg.num_references, size
    )  # their ground truth, for L_simple-MV
    cfg = replace(cfg, scorer=find_scorer(cfg))
    for round in range(cfg.rounds):
        if cfg.feedback == "none":
            policy = train(policy, pre, None, None, objects, cfg)
            continue
        candidates = collect(policy, references, cfg, round)
        rewards = prefer(candidates, references, cfg)
        policy = train(policy, pre if cfg.anchor == "pre" else policy, candidates, rewards, objects, cfg)
    return report(pre, policy, cfg, clock)


if __name__ == "__main__":
    cli(main, Config, __doc__)
