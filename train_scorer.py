"""Stage 2: train the contrastive 3D-consistency scorer, true views against wrong ones (paper Sec. 5).

    L_3D-Consistency = |f(e_Y, e_X_GT^m) - 1|^2  +  |f(e_Y, e_X_gen^m) - 0|^2          views m = 1..4
    L                = L_3D-Consistency  +  mismatch |f(e_Y, e_X_other^m) - 0|^2

DEVIATION: the last term, for true views of ANOTHER object. In the paper's two terms, true and generated views
come with the same, right reference, so nothing asks whether a view belongs to it, and no head learns to tell.
Half of a batch are stretched copies of its other half (--twins, data.stretch). So one of the others is a
reference's *twin*: true views that differ from the right ones in their proportions alone. Only they make the
scorer look at geometry.

DEVIATION: without --negatives the middle term is left out. A generator gives itself away by its texture, and
a scorer that has learned it finds less of what samples of one model differ by (LOG.md, 2026-11-30). So the
default learns from true views alone, line by line (scorer.Strips), all with some texture (`texture`).

With --negatives a generator draws five views for each reference, once, kept as 8-bit images like the ground
truth: any difference in number format would be a trivial cue. The objects are those of the preference split,
which the generator has not seen (of a folder of renders it has): it draws what it was trained on better.

Run:
    python train_scorer.py
    python train_scorer.py --negatives checkpoints/objects_independent --mismatch 1    # both kinds
    python train_scorer.py --negatives DIR --data RENDERS    # any other model's views of the renders
    python train_scorer.py --negatives checkpoints/objects_independent --head concat --texture 0 \
        --mismatch 0 --twins False    # the paper's loss and f

    Writes out/scorer-<content>/{config.json, model.safetensors, log.jsonl, results.json}, and negatives-*/
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from cache import cached, check_link, code, machine, settings
from common import STATE, InputError, Log, check_at_least, cli, digest, hardware, key_seed, keyed_generator
from common import load_json, load_state, load_tensors, located, optimizer_step, provenance, save_json
from common import save_state, save_tensors, training_steps
from data import MIRRORED_ORDER, load_split, make_references, stretch
from metrics import spoilt_views
from model import load
from pictures import load_views
from render import VIEWS
from sample import sample
from scorer import Head, Scorer, pretrained_scorer, small_scorer


@dataclass(frozen=True)
class Config:
    """Defaults train the scorer that train_d3po.py --feedback contrastive asks for."""

    data: str = "furniture"  # furniture, toys, or a folder of renders
    negatives: str = ""  # who draws generated views: a model, or a folder of views; empty: there are none
    num_references: int = 240  # of the preference split
    num_val: int = 64  # validation objects
    num_steps: int = 10  # network calls when the generator draws

    head: Head = "epipolar"  # ours, line by line; concat: the paper's, blind to whose view it is; bilinear
    backbone: str = ""  # pretrained DINOv2, hub id or folder; empty: a small one from scratch
    image_size: int = 64  # pixels of the views
    backbone_size: int = 224  # pixels at which a pretrained backbone sees them
    patch_size: int = 8  # of the small DINOv2, as the next three
    hidden_size: int = 96  # width
    num_layers: int = 4  # transformer layers
    num_heads: int = 4  # attention heads

    steps: int = 600  # optimizer steps
    batch_size: int = 8  # objects, twins among them; each is a reference, its true and any generated views
    lr: float = 1e-3  # of the encoder; about 1e-5 for a pretrained one
    head_lr: float = 1e-3  # of f, which starts at zero also on a pretrained encoder
    weight_decay: float = 0.05  # of all weights
    mismatch: float = 0.3  # weight of the last term (paper: 0, with --negatives)
    texture: float = 0.3  # strength of blotches and grain on all views but the reference
    twins: bool = True  # half of a batch are stretched copies of the other half

    seed: int = 0  # of weights, batches, frames and the generator
    eval_every: int = 300  # steps between evaluations
    bf16: Literal["auto", "on", "off"] = "auto"  # of the generator, on CUDA of training too; auto: if fast
    device: str = "auto"  # auto, cpu or cuda
    out: str = "out/scorer"  # where everything goes


# --- the loss ---


def consistency_loss(f_true: Tensor, f_fake: Tensor) -> Tensor:
    """L_3D-Consistency, mean over objects and views: (B, V-1), and (B, V-1) or, of no generator, (B, 0)."""
    loss = ((f_true - 1) ** 2).mean()
    return loss + (f_fake**2).mean() if f_fake.numel() else loss


def scorer_loss(scorer: Scorer, images: Tensor, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """L_3D-Consistency and the mismatch term of a batch (make_batch), from one pass of the encoder."""
    B, others = len(images), len(VIEWS) - 1
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        e = rearrange(scorer.embed(images.flatten(0, 1)), "(B R) ... -> B R ...", B=B).float()
    e_ref, e_true, e_fake = e[:, 0], e[:, 1 : 1 + others], e[:, 1 + others :]
    # f of every reference i with the true views of every object j: the encoder's work is done already.
    m = torch.arange(1, 1 + others, device=images.device)
    every = scorer.head(e_ref, repeat(e_true, "O m ... -> B (O m) ...", B=B), m.repeat(B))
    every = rearrange(every, "B (O m) -> B O m", O=B)  # every[i, j] = f(Y_i, X_j)
    own = torch.eye(B, dtype=torch.bool, device=images.device)
    loss = consistency_loss(every[own], scorer.head(e_ref, e_fake, m[: e_fake.shape[1]]))
    return loss, (every[~own] ** 2).mean()


# --- objects, negatives, batches ---


def generate(cfg: Config, references: Tensor, folder: Path) -> None:
    """Five views of each reference (N, 3, S, S) uint8 by the model cfg.negatives, a file for every few."""
    device, bf16 = hardware(cfg)
    generator = load(cfg.negatives, device, half=bf16)
    if (size := generator.cfg.image_size) != cfg.image_size:
        made = f"{cfg.negatives}: makes images of {size} px, expected {cfg.image_size}."
        raise InputError(f"{made} Name another model, or --image_size {size}.")
    for i in tqdm(range(0, len(references), 16), desc="negatives", disable=None):
        path = folder / f"{i:06d}.safetensors"
        if path.is_file():  # a killed run goes on
            continue
        ref = references[i : i + 16].to(device).float() / 255
        seeds = [key_seed(cfg.seed, 9, i + j) for j in range(len(ref))]  # 9: other noise than in evaluation
        images = sample(generator, ref, seeds, cfg.num_steps, bf16=bf16).images  # (B, V, 3, S, S) in [0, 1]
        save_tensors(path, {"views": (images * 255).round().to(torch.uint8)})


def make_pairs(cfg: Config) -> tuple[Tensor, Tensor, int]:
    """True and generated views, both (N, V, 3, S, S) uint8, and how many of N are to train on. Without
    --negatives the second are the references alone (N, 1, 3, S, S).

    An object has one reference, any of its four sides, and it stands in its positive and in its negative
    pairs. Were the truth shown in other frames too, f could learn which references come with the truth."""
    if cfg.negatives and not (located(cfg.negatives) / "model.safetensors").is_file():
        return read_pairs(cfg)
    train = load_split(cfg.data, "preference", cfg.num_references, cfg.image_size)
    train = make_references(train, cfg.num_references, cfg.seed)
    truth = torch.cat([train, load_split(cfg.data, "validation", cfg.num_val, cfg.image_size)])
    if not cfg.negatives:
        return truth, truth[:, :1], len(train)
    made_by = {"generator": digest(Path(cfg.negatives)), "references": digest(truth[:, 0])}
    made_by |= {"num_steps": cfg.num_steps, "seed": cfg.seed, "code": code("model", "sample")}
    make = partial(generate, cfg, truth[:, 0])
    folder = cached(Path(cfg.out).parent, "negatives", made_by | machine(cfg), make)
    fake = torch.cat([load_tensors(path)["views"] for path in sorted(folder.glob("*.safetensors"))])
    return truth, fake, len(train)


def read_pairs(cfg: Config) -> tuple[Tensor, Tensor, int]:
    """`make_pairs` with another model's pictures of --data, such as Zero123's, drawn from the front views."""
    shipped = cfg.data in ("toys", "furniture") or not Path(cfg.negatives).is_dir()
    if shipped or load_views(cfg.data, 8)[0] != load_views(cfg.negatives, 8)[0]:
        expected = f"expected a model's folder, or views of the objects of --data {cfg.data}"
        raise InputError(f"--negatives {cfg.negatives}: {expected}.")
    parts = (("preference", cfg.num_references), ("validation", cfg.num_val))
    truth, fake = ([load_split(d, s, n, cfg.image_size) for s, n in parts] for d in (cfg.data, cfg.negatives))
    return torch.cat(truth), torch.cat(fake), len(truth[0])


def twin(images: Tensor, g: torch.Generator, cameras: Sequence[int] = range(len(VIEWS))) -> Tensor:
    """The same object in other proportions: images (R, 3, S, S) in [0, 1], by one camera each."""
    return stretch(images, 0.6 + 0.4 * torch.rand(3, generator=g), cameras)


def texture(views: Tensor, strength: float, g: torch.Generator) -> Tensor:
    """Blotches and grain such as a sampler leaves: true and wrong views get them alike, to be ignored.

    views (B, M, 3, S, S) in [0, 1]. A blotch is an eighth of the side, has its own colour, and leaves white
    white: strength is its deviation, relative to how dark the view is. Grain, .15 of that, is everywhere."""
    smooth = torch.randn(*views.shape[:2], 3, 8, 8, generator=g).flatten(0, 1)
    smooth = F.interpolate(smooth, views.shape[-2:], mode="bilinear").view_as(views)
    grain = 0.15 * torch.randn(views.shape, generator=g)
    return (1 - (1 - views) * (1 + strength * smooth) + strength * grain).clamp(0, 1)


def make_batch(cfg: Config, truth: Tensor, fake: Tensor, step: int) -> Tensor:
    """(B, 1 + 2 (V-1), 3, S, S) in [0, 1]: reference, true and generated views; from (seed, step) alone.
    Without generated views (B, V, 3, S, S)."""
    g = keyed_generator(cfg.seed, step)
    size, views = min(cfg.batch_size, len(truth)), truth.shape[1]
    chosen = torch.randperm(len(truth), generator=g)[: size // 2 if cfg.twins else size]
    images = torch.cat([truth[chosen], fake[chosen, 1:]], dim=1).float() / 255
    if cfg.twins:  # another object with the same face: its own truth, and a wrong one for its twin
        cameras = [*range(views), *range(1, fake.shape[1])]
        images = torch.cat([images, torch.stack([twin(x, g, cameras) for x in images])])
    # Only what keeps five views five views of one object is allowed, and it is done to true and generated
    # ones alike: renaming the colour channels and mirroring the world. A crop, a shift or a turn is not.
    images = images[:, :, torch.randperm(3, generator=g)]
    if torch.rand((), generator=g) < 0.5:
        order = MIRRORED_ORDER + [views - 1 + m for m in MIRRORED_ORDER[1:]]  # generated ones stand behind
        images = images[:, order[: images.shape[1]]].flip(-1)
    if cfg.texture:
        images = torch.cat([images[:, :1], texture(images[:, 1:], cfg.texture, g)], dim=1)
    return images


# --- evaluation ---


def auc(positive: Tensor, negative: Tensor) -> float:
    """ROC-AUC = P(positive > negative) + P(equal) / 2, from the ranks of the pooled values (Mann-Whitney)."""
    n = len(positive)
    _, where, count = torch.cat([positive, negative]).unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2)[where]  # equal values share the mean of their ranks
    return float((ranks[:n].double().sum() - n * (n + 1) / 2) / (n * len(negative)))


def evaluate(scorer: Scorer, truth: Tensor, fake: Tensor) -> dict[str, float]:
    """Truth against wrong views: AUC over single views, and how often the truth has the higher reward."""
    g = keyed_generator(0)
    twins = torch.stack([(twin(x.float() / 255, g) * 255).round().to(torch.uint8) for x in truth])
    wrong = {"stretched": twins, **spoilt_views(truth)}
    wrong |= {"generated": fake} if fake.shape[1] > 1 else {}

    def scores(views: Tensor) -> Tensor:  # (B, V, 3, S, S) uint8 -> (B, V-1)
        pairs = zip(truth[:, :1].float() / 255, views.float() / 255)
        return torch.cat([scorer.score(y, x[None]) for y, x in pairs])[:, 1:].cpu()

    right = scores(truth)
    metrics = {"reward_truth": float(right.sum(1).mean())}
    for name, views in wrong.items():
        bad = scores(views)
        margin = right.double().sum(1) - bad.double().sum(1)
        margin[margin.abs() < 1e-6] = 0  # the same four numbers, added in another order
        metrics[f"reward_{name}"] = float(bad.sum(1).mean())
        metrics[f"auc_{name}"] = auc(right.flatten(), bad.flatten())
        metrics[f"accuracy_{name}"] = float((margin.sign() + 1).mean() / 2)  # a tie is half
    return metrics


# --- the loop ---


def new_scorer(cfg: Config) -> Scorer:
    """The untrained network; its random weights depend on the seed alone."""
    torch.manual_seed(key_seed(cfg.seed))
    if cfg.backbone:
        return pretrained_scorer(cfg.backbone, cfg.head, cfg.backbone_size)
    sizes = (cfg.image_size, cfg.patch_size, cfg.hidden_size, cfg.num_layers, cfg.num_heads)
    return small_scorer(cfg.head, *sizes)


def run(scorer: Scorer, truth: Tensor, fake: Tensor, n: int, cfg: Config, folder: Path) -> None:
    """The loop: train on the first n objects, evaluate on the others; weights, log, results in `folder`."""
    device, bf16 = hardware(cfg)
    bf16, scorer = bf16 and device.type == "cuda", scorer.to(device)
    parameters = list(scorer.parameters())
    head = [p for name, p in scorer.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": scorer.encoder.parameters(), "lr": cfg.lr}, {"params": head, "lr": cfg.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=device.type == "cuda")

    if state := load_state(folder / STATE):
        scorer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log = Log(folder / "log.jsonl", 10, cfg.steps, state.get("log"))
    clock = time.time() - state.get("seconds", 0)

    def save(done: int) -> None:
        parts = {"model": scorer.state_dict(), "optimizer": optimizer.state_dict(), "log": log.state}
        save_state(folder / STATE, parts, step=done, seconds=time.time() - clock)

    def validate(step: int) -> None:
        result, seconds = evaluate(scorer, truth[n:], fake[n:]), round(time.time() - clock)
        log.line(step, **{f"val_{k}": round(v, 4) for k, v in result.items()}, seconds=seconds)
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items() if "auc" in k))
        save_json(folder / "results.json", {**provenance(cfg), "metrics": result, "seconds": seconds})

    for step in training_steps(state.get("step", 0), cfg.steps, "train_scorer", save):
        # batch, forward, backward
        images = make_batch(cfg, truth[:n], fake[:n], step).to(device)
        loss, mismatch = scorer_loss(scorer, images, bf16)
        (loss + cfg.mismatch * mismatch).backward()

        # step, log: short warm-up, then cosine to 0
        rate = min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        norm = optimizer_step([optimizer], parameters, rate, step, clip=math.inf)
        log.add(step, loss_consistency=loss.item(), loss_mismatch=mismatch.item(), grad_norm=norm)

        if (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            validate(step + 1)
    validate(cfg.steps)
    scorer.save(folder)


def main(cfg: Config) -> dict[str, Any]:
    """Negatives, training, evaluation; returns the content of results.json and the folder."""
    check_at_least(cfg, 1, "steps", "eval_every", "image_size", "backbone_size")
    check_at_least(cfg, 1, "patch_size", "hidden_size", "num_layers", "num_heads")
    check_at_least(cfg, 2, "num_references", "num_val", "batch_size", "num_steps")  # another object is needed
    check_at_least(cfg, 0, "lr", "head_lr", "weight_decay", "mismatch", "texture")
    if not (cfg.negatives or cfg.mismatch):
        raise InputError("--mismatch 0: nothing is wrong then, expected --negatives, or more than 0.")
    out, made_on = check_link(Path(cfg.out)), machine(cfg)
    scorer = new_scorer(cfg)  # what is impossible shows now, not after the negatives
    truth, fake, n = make_pairs(cfg)
    if n < 2:
        raise InputError(f"--data {cfg.data}: one object to train on, expected another.")
    local = cfg.backbone and Path(cfg.backbone).is_dir()
    made_by = settings(cfg, "eval_every", "bf16", "data", "negatives", "backbone") | {
        "truth": digest(truth),
        "negatives": digest(fake),
        "backbone": digest(Path(cfg.backbone)) if local else cfg.backbone,
        "code": code("data", "metrics", "scorer", "train_scorer"),
    }
    make = partial(run, scorer, truth, fake, n, cfg)
    folder = cached(out.parent, out.name, made_by | made_on, make)
    return {**load_json(folder / "results.json"), "folder": str(folder)}


if __name__ == "__main__":
    cli(main, Config, __doc__)
