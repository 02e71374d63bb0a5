"""Stage 2: train the contrastive 3D-consistency scorer on truth against generated views (paper Sec. 5).

    L_3D-Consistency = |f(e_Y, e_X_GT^m) - 1|^2  +  |f(e_Y, e_X_gen^m) - 0|^2          views m = 1..4

First a generator draws five views for each reference, once, kept as 8-bit images like the truth: any
difference in number format would be a trivial cue. Then encoder and head learn to tell them from the truth.
The objects are those of the preference split: of toys, not the generator's own training set, whose images
are better than what it makes of new ones. Beside the paper's two terms, `--mismatch` adds one with the truth of
another object as a negative.

Run:
    python train_scorer.py                               # negatives of the independent-view model ("C")
    python train_scorer.py --negatives pretrained        # of the multi-view model itself ("C (pre)")
    python train_scorer.py --negatives DIR               # of another model: DIR/<object>/{front,...,top}.png

Expect (240 objects, inside the main job, 1 seed):
    auc_generated .97, auc_other .82, auc_shifted .70; auc_mirrored, auc_swapped .50 (f does not see which view it is)

    Reads checkpoints/toy_independent or checkpoints/toy; writes out/scorer/{negatives.safetensors,
    negatives.json, state.pt, log.jsonl, results.json} and the scorer itself, {config.json,
    model.safetensors}. The same command goes on where it stopped, bitwise on the CPU, and returns at once
    when all is there.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

import model
import sample
from common import (
    InputError,
    claim,
    cli,
    digest,
    get_device,
    key_seed,
    keyed_generator,
    load_json,
    load_state,
    load_tensors,
    log_line,
    provenance,
    save_json,
    save_tensors,
    trim_log,
    use_bf16,
    write_atomic,
)
from data import load_split, load_views, relative_views
from scorer import Scorer, pretrained_scorer, small_scorer

MIRRORED_ORDER = [0, 3, 2, 1, 4]  # what a mirrored object shows on its right is the mirror image of its left


@dataclass(frozen=True)
class Config:
    """Defaults are the toy run on two CPU cores."""

    # --- data ---

    data: str = "toys"  # toys, or a folder <object>/{front,right,back,left,top}.png
    negatives: str = "zero123"  # zero123, pretrained, or a folder with another model's views of --data
    zero123: str = "checkpoints/toy_independent"  # the independent-view model that zero123 means
    pretrained: str = "checkpoints/toy"  # the multi-view model that pretrained means
    num_objects: int = 240  # objects to train on, each with one generated set (paper: not stated)
    num_val: int = 32  # objects of the validation split, to judge the scorer
    image_size: int = 64  # pixels; the generator's own size
    num_steps: int = 10  # sampling steps of the generator

    # --- scorer ---

    head: str = "bilinear"  # bilinear, or concat (the paper's, blind to whose view it is)
    backbone: str = ""  # pretrained DINOv2, hub id or folder; empty: a small one from scratch
    backbone_size: int = 224  # pixels at which a pretrained backbone sees the images
    shrink: int = 1  # the small encoder sees them this much smaller: 4 leaves shapes and colours, not textures
    patch_size: int = 16  # of the small encoder, as the next three
    hidden_size: int = 96  # width
    num_layers: int = 4  # transformer layers
    num_heads: int = 4  # attention heads

    # --- optimisation ---

    steps: int = 600  # optimizer steps
    batch_size: int = 8  # objects, all if there are fewer; each is one reference, four true and four generated views
    lr: float = 1e-3  # of the encoder; about 1e-5 for a pretrained one
    head_lr: float = 1e-3  # of f, which starts at zero also on a pretrained encoder
    weight_decay: float = 0.05  # of all weights
    mismatch: float = 1.0  # weight of the truth of another object as a negative; 0 is the paper's loss
    augment: bool = True  # permute colour channels and mirror objects, alike in all images of a batch

    # --- run ---

    seed: int = 0  # of weights, batches, frames and the generator
    eval_every: int = 200  # steps between evaluations
    save_every: int = 50  # steps between saved states
    log_every: int = 10  # steps between log lines
    bf16: str = "auto"  # draw the negatives in bfloat16: auto (where it is fast), on or off
    device: str = "auto"  # auto | cpu | cuda
    out: str = "out/scorer"  # folder for everything this script writes


# --- loss and metric ---


def loss_fn(f_true: Tensor, f_fake: Tensor) -> Tensor:
    """L_3D-Consistency, mean over objects and views; both (B, V-1)."""
    return ((f_true - 1) ** 2).mean() + (f_fake**2).mean()


def auc(positive: Tensor, negative: Tensor) -> float:
    """ROC-AUC = P(positive > negative) + P(equal) / 2, from the ranks of the pooled values (Mann-Whitney)."""
    n = len(positive)
    _, where, count = torch.cat([positive, negative]).unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2)[where]  # equal values share the mean of their ranks
    return float((ranks[:n].double().sum() - n * (n + 1) / 2) / (n * len(negative)))


# --- objects and negatives ---


def generator_folder(cfg: Config) -> str:
    """The model of ours that draws the negatives; empty if they come from a folder of views."""
    return {"zero123": cfg.zero123, "pretrained": cfg.pretrained}.get(cfg.negatives, "")


def generate(cfg: Config, refs: Tensor, device: torch.device) -> Tensor:
    """Five views of each reference by a model of ours: (N, 3, S, S) -> (N, V, 3, S, S), both uint8.

    Kept in `out` beside a note of what made them, and written after every batch: SDXL needs an hour for this.
    """
    folder = generator_folder(cfg)
    path, note = Path(cfg.out) / "negatives.safetensors", Path(cfg.out) / "negatives.json"
    made_by = {
        "model": folder,
        "weights_sha256": digest(Path(folder) / "model.safetensors"),
        "references_sha256": digest(refs),
        "num_steps": cfg.num_steps,
        "seed": cfg.seed,
    }
    same = path.exists() and note.exists() and load_json(note) == made_by
    fakes = load_tensors(path)["views"] if same else torch.empty(0, 5, *refs.shape[1:], dtype=torch.uint8)
    if len(fakes) == len(refs):
        return fakes

    generator = model.load(folder, device, half=use_bf16(cfg.bf16, device))
    if generator.cfg.image_size != cfg.image_size:
        raise InputError(
            f"{folder}: makes images of {generator.cfg.image_size} px, expected {cfg.image_size}. Name another model "
            f"by --{cfg.negatives}, or in train_scorer.py --image_size {generator.cfg.image_size}."
        )
    if not same:  # old views must not stand beside a new note, nor new views beside an old one
        path.unlink(missing_ok=True)
        save_json(note, made_by)
    for i in tqdm(range(len(fakes), len(refs), cfg.batch_size), desc="negatives", disable=None):
        ref = refs[i : i + cfg.batch_size].to(device).float() / 255
        seeds = [key_seed(cfg.seed, 9, i + j) for j in range(len(ref))]  # 9: other noise than in evaluation
        chain = sample.sample(generator, ref, seeds, num_steps=cfg.num_steps, bf16=use_bf16(cfg.bf16, device))
        images = chain.images  # (B, V, 3, S, S) in [0, 1]
        fakes = torch.cat([fakes, (images.cpu().clamp(0, 1) * 255).round().to(torch.uint8)])
        save_tensors(path, {"views": fakes})
    return fakes


def make_pairs(cfg: Config, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Truth and generated views in one frame, both (N, V, 3, S, S) uint8, and how many of N are to train on.

    An object has one reference, any of its four sides, and it stands in its positive and in its negative
    pairs. Were the truth shown in other frames too, "this reference comes with the truth" could be learned
    by heart instead.
    """

    def load(source: str) -> tuple[Tensor, int]:
        train = load_split(source, "preference", cfg.num_objects, cfg.image_size)
        val = load_split(source, "validation", cfg.num_val, cfg.image_size)
        if min(cfg.batch_size, len(train), len(val)) < 2:  # views of another object are needed
            raise InputError(
                f"--data {source}: got {len(train)} objects to train on, {len(val)} to validate and batches of "
                f"{cfg.batch_size}; expected 2 or more of each. Raise --num_objects, --num_val or --batch_size."
            )
        return torch.cat([train, val]), len(train)

    truth, n = load(cfg.data)
    if not generator_folder(cfg):
        # Another model's views, the front being its reference. Equal names mean equal splits.
        have = load_views(cfg.negatives, cfg.image_size)[0]
        names = [] if cfg.data == "toys" else load_views(cfg.data, cfg.image_size)[0]
        if have != names:
            odd = sorted(set(have) ^ set(names))
            raise InputError(
                f"--negatives {cfg.negatives}: {len(odd)} objects are only there or only in {cfg.data} "
                f"(first: {odd[0]}); expected one folder for each, of the same name. For toys: write them by "
                "data.py --toys N --out DIR, and give that folder as --data."
            )
        return truth, load(cfg.negatives)[0], n
    sides = torch.randint(4, (len(truth),), generator=keyed_generator(cfg.seed))
    sides[n:] = 0  # evaluation always takes side 0
    truth = torch.stack([relative_views(views, int(r)) for views, r in zip(truth, sides, strict=True)])
    return truth, generate(cfg, truth[:, 0], device), n


# --- batches and evaluation ---


def make_batch(cfg: Config, truth: Tensor, fake: Tensor, step: int) -> Tensor:
    """(B, 1+4+4, 3, S, S) in [0, 1]: reference, true and generated views 1..4; from (seed, step) alone."""
    g = keyed_generator(cfg.seed, step)
    chosen = torch.randperm(len(truth), generator=g)[: cfg.batch_size]
    images = torch.cat([truth[chosen], fake[chosen, 1:]], dim=1).float() / 255
    # Only what keeps five views five views of one object is allowed, and it is done to truth and generated
    # alike: renaming the colour channels and mirroring the world. A crop, a shift or a turn of single
    # images is not.
    if cfg.augment:
        images = images[:, :, torch.randperm(3, generator=g)]
        if torch.rand((), generator=g) < 0.5:
            order = MIRRORED_ORDER + [4 + m for m in MIRRORED_ORDER[1:]]
            images = images[:, order].flip(-1)
    return images


def wrong_views(truth: Tensor) -> dict[str, Tensor]:
    """True views (N, V, 3, S, S) made inconsistent with their reference, or with each other.

    `other` takes the views of another object: seen only by an f that looks at the reference. `mirrored` and
    `shifted` are the truth with a small geometric error, never shown in training. `swapped`, right and left
    exchanged, leaves the sum as it was, for f does not know which view it sees: the paper's reward is blind
    to it.
    """
    return {
        "other": truth.roll(1, dims=0),
        "mirrored": truth.flip(-1),
        "shifted": truth.roll(max(truth.shape[-1] // 16, 1), dims=-1),
        "swapped": truth[:, MIRRORED_ORDER],
    }


def evaluate(scorer: Scorer, truth: Tensor, fake: Tensor) -> dict[str, float]:
    """Truth against wrong views: AUC over single views, and how often the truth has the higher reward."""
    wrong = {"generated": fake, **wrong_views(truth)}

    def scores(views: Tensor) -> Tensor:  # (B, V, 3, S, S) uint8 -> (B, V-1)
        pairs = zip(truth[:, :1].float() / 255, views.float() / 255, strict=True)
        return torch.cat([scorer.score(y, x[None]) for y, x in pairs])[:, 1:].cpu()

    right = scores(truth)
    metrics = {"score_true": float(right.sum(1).mean())}
    for name, views in wrong.items():
        bad = scores(views)
        margin = right.double().sum(1) - bad.double().sum(1)
        margin[margin.abs() < 1e-6] = 0  # the same four numbers, added in another order
        metrics[f"score_{name}"] = float(bad.sum(1).mean())
        metrics[f"auc_{name}"] = auc(right.flatten(), bad.flatten())
        metrics[f"accuracy_{name}"] = float((margin.sign() + 1).mean() / 2)  # a tie is half
    return metrics


# --- training ---


def new_scorer(cfg: Config) -> Scorer:
    """The untrained network; its random weights depend on the seed alone."""
    torch.manual_seed(key_seed(cfg.seed))
    if cfg.backbone:
        return pretrained_scorer(cfg.backbone, cfg.head, cfg.backbone_size)
    if cfg.shrink < 1:
        raise InputError(f"--shrink {cfg.shrink}: expected 1 (as they are) or more.")
    size = cfg.image_size // cfg.shrink
    return small_scorer(cfg.head, size, cfg.patch_size, cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.shrink > 1)


def main(cfg: Config) -> dict[str, Any]:
    """Negatives, training, evaluation; returns the content of results.json."""
    out, device = Path(cfg.out), get_device(cfg.device)
    free = ("device", "eval_every", "save_every", "log_every", "out")  # what may change when a run goes on
    made_by = {k: v for k, v in asdict(cfg).items() if k not in free}
    if generator_folder(cfg):
        made_by["generator_weights"] = digest(Path(generator_folder(cfg)) / "model.safetensors")
    if (out / "made_by.json").is_file():  # other settings are refused before they replace the negatives
        claim(out, made_by)
    if (out / "results.json").exists():
        print(f"{out}: finished before, reused")
        return load_json(out / "results.json")
    state_path, log_path = out / "state.pt", out / "log.jsonl"
    begin = time.time()
    truth, fake, n = make_pairs(cfg, device)
    claim(out, made_by)
    seconds_negatives = time.time() - begin
    scorer = new_scorer(cfg).to(device)
    head = [p for name, p in scorer.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": scorer.encoder.parameters()}, {"params": head}]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    start, seconds = 0, 0.0
    if state_path.exists():
        state = load_state(state_path)
        scorer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        print(f"{out}: goes on at step {start}")
    trim_log(log_path, start - 1)
    half = device.type == "cuda" and use_bf16(cfg.bf16, device)

    begin, metrics = time.time() - seconds, {}
    bar = tqdm(total=cfg.steps, initial=start, desc="scorer", disable=None)
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        # --- evaluate and save ---
        if last or (step % cfg.eval_every == 0 and step > 0):
            metrics = evaluate(scorer, truth[n:], fake[n:])
            log_line(log_path, step=step, **{f"val/{k}": round(v, 4) for k, v in metrics.items()})
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "auc" in k))
        if last:
            break
        if step % cfg.save_every == 0 and step > start:
            state = {
                "model": scorer.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": time.time() - begin,
            }
            write_atomic(state_path, lambda path, state=state: torch.save(state, path))

        # --- batch, forward, backward, step ---
        images = make_batch(cfg, truth[:n], fake[:n], step).to(device)  # (B, 1+4+4, 3, S, S)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            e = rearrange(scorer.embed(images.flatten(0, 1)), "(B R) d -> B R d", B=len(images))
        e_ref, e_true, e_fake = e.float().split([1, 4, 4], dim=1)  # one reference serves both pairs
        # f of every reference with the true views of every object of the batch: the encoder's work is done
        # already.
        size = len(e_ref)
        every = scorer.head(e_ref[:, 0], repeat(e_true, "O m d -> B (O m) d", B=size))
        every = rearrange(every, "B (O m) -> B O m", O=size)
        own = torch.eye(size, dtype=torch.bool, device=device)
        loss = loss_fn(every[own], scorer.head(e_ref[:, 0], e_fake))
        # DEVIATION: a third term. In the paper's two, true and generated views come with the same, right
        # reference: nothing ever asks whether a view belongs to it, and no head learns to tell. True views
        # of the other objects, target 0, ask just that.
        mismatch = (every[~own] ** 2).mean()
        total = loss + cfg.mismatch * mismatch
        if not torch.isfinite(total):
            raise InputError(f"step {step}: loss is {float(total)}, expected a finite one. Lower --lr.")
        # Short warm-up, then cosine to zero.
        rate = min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        for group, lr in zip(optimizer.param_groups, (cfg.lr, cfg.head_lr), strict=True):
            group["lr"] = lr * rate
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

        # --- log ---
        if step % cfg.log_every == 0:
            values = {"loss": loss.item(), "mismatch": mismatch.item()}
            values["seconds"] = round(time.time() - begin, 1)
            log_line(log_path, step=step, **values)
            bar.set_postfix(loss=f"{values['loss']:.3f}")
        bar.update()
    bar.close()

    scorer.save(out)
    results = {
        "metrics": metrics,
        "seconds_negatives": round(seconds_negatives, 1),
        "seconds_training": round(time.time() - begin, 1),
        **provenance(cfg),
    }
    save_json(out / "results.json", results)
    state_path.unlink(missing_ok=True)
    return results


if __name__ == "__main__":
    cli(main, Config, __doc__)
