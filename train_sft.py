"""Stage 1: L_simple-MV. Pre-training, of the multi-view and of the independent-view model (paper Sec. 3.2.1).

    L_simple-MV = E_{X_0, Y, t, noise} | grad log q_t(X_t | X_0) - s_theta(X_t, Y_t, t) |^2

One of the side views is drawn as the reference Y and the others are renamed relative to it
(data.relative_views). Views and reference get independent noise at one common t. The small network predicts
the clean image. The loss is its squared error, weighted as v-prediction would: 1 / (1 - alpha_bar_t).

It starts from nothing, with --preset sdxl from published weights, with --init from a model of ours. (Table
1's SFT row is not made here but by `train_d3po.py --feedback none`, with all else equal.)

Run:
    python train_sft.py                                                      # checkpoints/objects
    python train_sft.py --cross_view False --steps 6000 --out out/independent     # objects_independent

    Writes out/sft-<content>/{config.json, model.safetensors, log.jsonl, results.json, grid.png}
"""

import math
import re
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cache import cached, check_link, code, machine, settings
from common import STATE, InputError, Log, check_at_least, cli, digest, hardware, keyed_generator, load_json
from common import load_state, optimizer_step, provenance, save_json, save_state, training_steps
from data import augment, load_split, read_split, relative_views
from grid import grid
from metrics import hull_iou, psnr
from model import PRESETS, MultiViewUNet, from_base, load
from muon import Muon
from pictures import Views, fingerprint
from render import NUM_SIDES
from sample import Schedule, forward_noise, noised_reference, sample_images, split_prediction


@dataclass(frozen=True)
class Config:
    """Defaults train checkpoints/objects from nothing."""

    preset: Literal["toy", "small", "sdxl"] = "toy"  # sdxl starts from published weights
    base: str = ""  # hub id or folder of the SDXL pipeline to start from; empty: the preset's
    image_size: int = 0  # pixels; 0: the preset's
    cross_view: bool = True  # False: views do not see each other (the Zero123-style baseline)
    init: str = ""  # start from this model folder instead
    attention_only: bool = False  # train the attention layers only, and a fresh SDXL's view embedding
    lora: int = 0  # train a change of this rank of the attention projections only: less memory; 0: no

    data: tuple[str, ...] = ("furniture", "furniture", "toys")  # or folders, in turn; the first validates
    augment: bool = True  # mirror, stretch and recolour every object at random (data.augment)
    num_objects: int = 4096  # training objects of each source, at most
    out: str = "out/sft"  # where everything goes

    steps: int = 9000  # optimizer steps
    batch_size: int = 6  # objects a step, each with its V views
    optimizer: Literal["auto", "adamw", "muon"] = "auto"  # muon (for matrices) is auto's from nothing
    lr: float = 5e-4  # peak learning rate of AdamW; linear warm-up, then cosine to 0
    muon_lr: float = 0.01  # of Muon
    warmup: int = 200  # steps of warm-up
    ema: float = 0.999  # decay of the averaged weights, which are the ones saved and evaluated
    seed: int = 0  # of weights, batches and noise

    eval_every: int = 500  # steps between evaluations
    eval_objects: int = 16  # validation objects
    num_steps: int = 10  # network calls when sampling for evaluation
    bf16: Literal["auto", "on", "off"] = "auto"  # run the forward in bfloat16; auto: where it is fast
    checkpointing: bool = False  # compute activations again in backward: half the speed, far less memory
    device: str = "auto"  # auto, cpu or cuda


# --- the loss ---


def simple_loss(
    model: MultiViewUNet,
    schedule: Schedule,
    latents: Tensor,  # (B, V, c, h, w) clean views
    y: Tensor,  # (B, c, h, w) clean reference
    t: Tensor,  # (B,)
    noise: Tensor,  # of the views
    ref_noise: Tensor,  # of the reference
) -> Tensor:  # (B,) weighted squared error, mean over V c h w
    """L_simple-MV of each object at one t."""
    x_t = forward_noise(schedule, latents, t, noise)
    prediction = model(x_t, t, noised_reference(schedule, model.cfg, y, t, ref_noise))
    ab = schedule.ab(t)
    if schedule.prediction == "epsilon":
        error = (prediction - noise) ** 2
    elif schedule.prediction == "v":
        error = (prediction - (ab.sqrt() * noise - (1 - ab).sqrt() * latents)) ** 2
    else:  # v = (sqrt(ab) x_t - x0) / sqrt(1 - ab): an error d in x0 is an error -d / sqrt(1 - ab) in v
        error = (prediction - latents) ** 2 / (1 - ab)
    return error.flatten(1).mean(1)


def training_batch(
    model: MultiViewUNet,
    schedule: Schedule,
    sources: list[Tensor | Views],  # each (N, V, 3, S, S) uint8
    batch_size: int,
    seed: int,
    step: int,
    device: torch.device,
    augmented: bool = False,
) -> tuple[Tensor, ...]:
    """The other arguments of `simple_loss`, a function of (seed, step) alone: resuming changes nothing."""
    g = keyed_generator(seed, step)
    chosen = []
    for k in range(batch_size):  # the sources take turns
        source = sources[(step * batch_size + k) % len(sources)]
        views = source[int(torch.randint(len(source), (), generator=g))]
        views = augment(views, g) if augmented else views
        # "randomly choose an image" of the sides as the reference, Sec. 6.1
        chosen.append(relative_views(views, int(torch.randint(NUM_SIDES, (), generator=g))))
    latents = model.encode(torch.stack(chosen).to(device).float() / 255)  # (B, V, c, h, w)
    # Stratified t: one uniform draw, spread evenly over the batch. Same expectation, a less noisy gradient.
    u = (torch.rand((), generator=g) + torch.arange(batch_size) / batch_size) % 1
    t = 1 + (u * (schedule.num_train - 1)).long()
    noise, ref_noise = (torch.randn(z.shape, generator=g).to(device) for z in (latents, latents[:, 0]))
    return latents, latents[:, 0], t.to(device), noise, ref_noise


# --- evaluation ---


@torch.no_grad()
def reference_use(model: MultiViewUNet, views: Tensor, batch_size: int) -> dict[str, float]:
    """Squared error of x0 with the right and with a wrong reference, by t: the first thing to look at.

    A network that ignores its reference has equal numbers. At high t, where the views are all noise, only a
    network that has learned to look things up in the reference has a small first number."""
    schedule, device, result = Schedule(model.cfg), views.device, {}
    latents = model.encode(views.float() / 255)  # of (N, V, 3, S, S) uint8
    for t_int in (200, 500, 800, 950):
        t = torch.full((len(latents),), t_int, device=device)
        g, y = keyed_generator(t_int), latents[:, 0]
        noise, ref_noise = (torch.randn(z.shape, generator=g).to(device) for z in (latents, y))
        x_t = forward_noise(schedule, latents, t, noise)
        for name, shown in (("right", y), ("wrong", y.roll(1, 0))):
            ref_t, errors = noised_reference(schedule, model.cfg, shown, t, ref_noise), []
            for part in torch.arange(len(latents), device=device).split(batch_size):
                prediction = model(x_t[part], t[part], ref_t[part])
                x0, _ = split_prediction(schedule, prediction, x_t[part], t[part])
                errors.append(((x0 - latents[part]) ** 2).flatten(1).mean(1))
            result[f"x0_error_t{t_int}_{name}_ref"] = round(torch.cat(errors).mean().item(), 4)
    return result


def evaluate(model: MultiViewUNet, views: Tensor, cfg: Config, picture: Path) -> dict[str, float]:
    """Sample the validation objects from their front view; numbers, and a picture of the first eight."""
    truth, (device, bf16) = views.float() / 255, hardware(cfg)
    images = sample_images(model, truth[:, 0], cfg.seed, cfg.num_steps, cfg.batch_size, "evaluate", bf16)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        use = reference_use(model, views.to(device), cfg.batch_size)
    grid(picture, {"truth": truth[:8], "sampled": images[:8]}, truth[:8, 0])

    def mean_psnr(x: Tensor, first: int) -> float:
        return psnr(x[:, first:].flatten(0, 1), truth[:, first:].flatten(0, 1)).mean().item()

    copy = truth[:, :1].expand_as(truth)
    unseen = {"": images, "_white": torch.ones_like(truth), "_copied_reference": copy}
    result = {"psnr": mean_psnr(images, 0)}
    result |= {f"psnr_unseen{name}": mean_psnr(x, 1) for name, x in unseen.items()}
    result |= {"hull": hull_iou(images).mean().item(), "hull_truth": hull_iou(truth).mean().item()}
    return result | use


# --- the loop ---


def new_model(cfg: Config) -> MultiViewUNet:
    """What training starts from."""
    torch.manual_seed(cfg.seed)
    if cfg.init:
        if cfg.base:
            raise InputError(f"--base {cfg.base} and --init {cfg.init}: expected one of them.")
        model = load(cfg.init)
        made = (model.cfg.cross_view, model.cfg.image_size)
        if made != (cfg.cross_view, cfg.image_size or model.cfg.image_size):
            asked = f"--cross_view {cfg.cross_view} --image_size {cfg.image_size}"
            raise InputError(f"{asked}: {cfg.init} was made with {made[0]} and {made[1]}, expected those.")
        return model
    preset = PRESETS[cfg.preset]
    if cfg.base and not preset.base:
        raise InputError(f"--base {cfg.base}: --preset {cfg.preset} starts from nothing, expected sdxl.")
    base, size = cfg.base or preset.base, cfg.image_size or preset.image_size
    architecture = replace(preset, cross_view=cfg.cross_view, base=base, image_size=size)
    return from_base(architecture) if architecture.is_sdxl else MultiViewUNet(architecture)


def new_optimizers(model: MultiViewUNet, parameters: list[Any], cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW, and for a network from nothing Muon for the matrices inside its blocks."""
    names, inner = {p: n for n, p in model.named_parameters()}, []
    if cfg.optimizer == "muon" or (cfg.optimizer == "auto" and not cfg.init and not model.cfg.is_sdxl):
        inner = [p for p in parameters if p.ndim > 1 and "_blocks." in names[p]]
        inner = [p for p in inner if not re.search("position|time_emb", names[p])]
    chosen = set(inner)
    rest, fused = [p for p in parameters if p not in chosen], parameters[0].is_cuda
    adamw = torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    return [adamw, Muon(inner, lr=cfg.muon_lr)] if inner else [adamw]


def trained_parameters(model: MultiViewUNet, cfg: Any, view_embedding: bool = False) -> list[Any]:
    """Say what is trained, and return it. Of SDXL what is frozen is stored in bfloat16."""
    device, bf16 = hardware(cfg)
    if cfg.lora:
        model.add_lora(cfg.lora)
    parameters = model.train().freeze(cfg.attention_only, model.cfg.is_sdxl and bf16, view_embedding)
    model.to(device)  # after what is frozen has lost half its size
    if cfg.checkpointing:
        model.unet.enable_gradient_checkpointing()
    return parameters


def average(ema: dict[str, Tensor], weights: dict[str, Tensor], decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) weights, in place; d grows from 1/10 to `decay`, so the start is forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    for name, value in weights.items():
        ema[name].lerp_(value, 1 - d)


def run(model: MultiViewUNet, sources: list[Any], val_views: Tensor, cfg: Config, folder: Path) -> None:
    """The loop: train, evaluate, and leave averaged weights, log and results in `folder`."""
    device, bf16 = hardware(cfg)
    parameters = trained_parameters(model, cfg, view_embedding=not cfg.init)
    schedule = Schedule(model.cfg)
    optimizers = new_optimizers(model, parameters, cfg)
    ema = {k: v.clone() for k, v in model.trained_state().items()}

    if state := load_state(folder / STATE):
        model.load_state_dict(state["model"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        ema = {k: v.to(device) for k, v in state["ema"].items()}
    log = Log(folder / "log.jsonl", 50, cfg.steps, state.get("log"))
    clock = time.time() - state.get("seconds", 0)

    def save(done: int) -> None:
        parts = {"model": model.trained_state(), "ema": ema, "log": log.state}
        parts["optimizers"] = [o.state_dict() for o in optimizers]
        save_state(folder / STATE, parts, step=done, seconds=time.time() - clock)

    def validate(step: int) -> None:  # with the averaged weights, which are saved
        weights = {k: v.clone() for k, v in model.trained_state().items()}
        model.load_state_dict(ema, strict=False)
        result = evaluate(model.eval(), val_views, cfg, folder / "grid.png")
        model.save(folder)
        model.train().load_state_dict(weights, strict=False)
        seconds = round(time.time() - clock)
        log.line(step, **{f"val_{k}": v for k, v in result.items()}, seconds=seconds)
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
        save_json(folder / "results.json", {**provenance(cfg), "metrics": result, "seconds": seconds})

    for step in training_steps(state.get("step", 0), cfg.steps, "train_sft", save):
        # batch, forward, backward
        batch = training_batch(model, schedule, sources, cfg.batch_size, cfg.seed, step, device, cfg.augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = simple_loss(model, schedule, *batch).mean()
        loss.backward()

        # step, log: linear warm-up, then cosine to 0
        rate = min(1, (step + 1) / cfg.warmup) * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        norm = optimizer_step(optimizers, parameters, rate, step)
        average(ema, model.trained_state(), cfg.ema, step)
        log.add(step, loss_simple=loss.item(), grad_norm=norm)

        if (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            validate(step + 1)
    validate(cfg.steps)


def main(cfg: Config) -> dict:
    """Train a model unless it is there; returns its results and folder."""
    check_at_least(cfg, 1, "steps", "batch_size", "warmup", "eval_every", "num_objects", "eval_objects")
    check_at_least(cfg, 0, "lr", "muon_lr", "ema", "lora", "image_size")
    if not cfg.ema <= 1:
        raise InputError(f"--ema {cfg.ema}: expected at most 1.")
    out = check_link(Path(cfg.out))  # what is wrong shows now, not after training
    made_on = machine(cfg)
    model = new_model(cfg)
    Schedule(model.cfg).timesteps(cfg.num_steps)
    size = model.cfg.image_size
    by_name = {source: read_split(source, "train", cfg.num_objects, size)[1] for source in cfg.data}
    sources = [by_name[source] for source in cfg.data]  # one may take several turns
    pictures = {source: fingerprint(views) for source, views in by_name.items()}
    val_views = load_split(cfg.data[0], "validation", cfg.eval_objects, size)
    networks = [model.unet, model.vae] if model.cfg.is_sdxl else [model.unet]
    built = [{k: v for k, v in n.config.items() if k[0] != "_"} for n in networks]
    weights = model.state_dict() | (model.vae.state_dict() if model.cfg.is_sdxl else {})
    made_by = settings(cfg, "eval_every", "bf16", "init", "base", "data") | {
        "start": [digest(weights), asdict(model.cfg), built],
        "code": code("data", "grid", "metrics", "model", "muon", "pictures", "sample", "train_sft"),
        "objects": [pictures[source] for source in cfg.data],
        "validation": digest(val_views),
    }
    folder = cached(out.parent, out.name, made_by | made_on, partial(run, model, sources, val_views, cfg))
    return {**load_json(folder / "results.json"), "folder": str(folder)}


if __name__ == "__main__":
    cli(main, Config, __doc__)
