"""Stage 1: L_simple-MV. Pre-training, of the multi-view and of the independent-view model (paper Sec. 3.2.1).

    L_simple-MV = E_{X_0, Y, t, noise} | grad log q_t(X_t | X_0) - s_theta(X_t, Y_t, t) |^2        V views jointly

One of the four side views is drawn as the reference Y and the others are renamed relative to it (data.relative_views).
Views and reference get independent noise at one common t. The toy network predicts the clean image, so the loss above
is its squared error times a weight; we weight it as v-prediction would, which is 1 / (1 - alpha_bar_t).

`python train_sft.py` trains the toy model from nothing, and --preset sdxl starts from published weights. With --init it
fine-tunes all weights of a model of ours, with --attention_only the attention layers alone. (Table 1's SFT row is not
made here but by `train_d3po.py --beta_dpo 0`, with all else equal.)

Run:
    python train_sft.py                                                    # toy, from nothing
    python train_sft.py --cross_view False --out out/sft_independent       # the Zero123-style baseline
    python train_sft.py --init checkpoints/toy --attention_only True --lr 2e-5 --steps 60 --out out/sft_finetuned

Expect (toy, 63 minutes on one CPU core, 16 validation objects):
    psnr_unseen 14.9 at step 500, 15.5 at 1000, 16.6 at 2000, 18.4 at 4000, 19.2 at 6000; white 7.8, a copy 13.3

    Writes out/sft/{config.json, model.safetensors (EMA), log.jsonl, run.json, state.pt, grid.png}; the same command
    resumes.
"""

import math
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    InputError,
    claim,
    cli,
    get_device,
    keyed_generator,
    load_state,
    log_line,
    provenance,
    save_json,
    trim_log,
    use_bf16,
    write_atomic,
)
from data import SPLITS, Views, lazy_split, load_split, relative_views
from evaluate import grid, hull_iou, psnr
from model import PRESETS, MultiViewUNet, from_base, load
from sample import Schedule, forward_noise, noised_reference, sample_images, split_prediction


@dataclass(frozen=True)
class Config:
    """Defaults train the shipped multi-view toy model; checkpoints/README.md says how it was made."""

    preset: str = "toy"  # toy or small, trained from nothing, or sdxl, which starts from published weights
    base: str = ""  # hub id or folder of the SDXL pipeline to start from; empty: the preset's
    image_size: int = 0  # pixels; 0: the preset's
    cross_view: bool = True  # False: views do not see each other (the Zero123-style baseline)
    init: str = ""  # start from this model folder instead
    attention_only: bool = False  # train the attention layers only (App. B), and a fresh SDXL's view embedding
    lora: int = 0  # train a change of this rank of the attention projections only: less memory; 0: no
    data: str = "toys"  # toys, or a folder of renders (see data.py)
    split: str = "train"  # objects to train on: train, or preference
    num_objects: int = 4096  # how many of them
    out: str = "out/sft"  # where everything goes

    steps: int = 6000  # optimizer steps
    batch_size: int = 6  # objects a step, each with its V views
    lr: float = 1e-3  # peak learning rate of AdamW; linear warm-up, then cosine to 0
    muon_lr: float = 0.02  # of Muon, for the matrices of a network that starts from nothing
    warmup: int = 200  # steps of warm-up
    ema: float = 0.999  # decay of the averaged weights, which are the ones saved and evaluated
    seed: int = 0  # of weights, batches and noise

    eval_every: int = 500  # evaluate, save weights and grid
    eval_objects: int = 16  # validation objects
    log_every: int = 50  # log the mean loss
    num_steps: int = 20  # network calls when sampling for evaluation
    bf16: str = "auto"  # run the forward in bfloat16: auto (where it is fast), on or off
    checkpointing: bool = False  # keep few activations and compute the others again: half the speed, far less memory
    compile: bool = False  # torch.compile the UNet
    threads: int = 0  # torch threads; 0 leaves torch's choice (1 can be much faster on a busy machine)
    device: str = "auto"  # auto, cpu or cuda


def simple_loss(
    model: MultiViewUNet,
    schedule: Schedule,
    latents: Tensor,  # (B, V, c, h, w) clean views
    y: Tensor,  # (B, c, h, w) clean reference
    t: Tensor,  # (B,)
    noise: Tensor,  # (B, V, c, h, w)
    ref_noise: Tensor,  # (B, c, h, w)
) -> Tensor:  # (B,) weighted squared error, mean over V c h w
    """L_simple-MV of each object at one t."""
    x_t = forward_noise(schedule, latents, t, noise)
    prediction = model(x_t, t, noised_reference(schedule, model.cfg, y, t, ref_noise))
    if schedule.prediction == "epsilon":
        return ((prediction - noise) ** 2).flatten(1).mean(1)
    # With v = sqrt(ab) eps - sqrt(1 - ab) x0 and x_t fixed, an error d in x0 is an error -d / sqrt(1 - ab) in v.
    weight = 1 / (1 - schedule.ab(t).flatten())
    return weight * ((prediction - latents) ** 2).flatten(1).mean(1)


def training_batch(
    model: MultiViewUNet,
    schedule: Schedule,
    views: Tensor | Views,  # (N, V, 3, S, S) uint8 all training objects
    batch_size: int,
    seed: int,
    step: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The other arguments of `simple_loss`, a function of (seed, step) alone: resuming changes nothing."""
    g = keyed_generator(seed, step)
    index = torch.randint(len(views), (batch_size,), generator=g)
    sides = torch.randint(4, (batch_size,), generator=g)  # "randomly choose an image" of the four sides, Sec. 6.1
    batch = torch.stack([relative_views(views[i], r) for i, r in zip(index.tolist(), sides.tolist(), strict=True)])
    latents = model.encode(batch.to(device).float() / 255)  # (B, V, c, h, w)
    # Stratified t: one uniform draw, spread evenly over the batch. Same expectation, less noise in the gradient.
    u = (torch.rand((), generator=g) + torch.arange(batch_size) / batch_size) % 1
    t = 1 + (u * (schedule.num_train - 1)).long()
    noise = torch.randn(latents.shape, generator=g)
    ref_noise = torch.randn(latents[:, 0].shape, generator=g)
    return latents, latents[:, 0], t.to(device), noise.to(device), ref_noise.to(device)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates (Jordan et al. 2024), for matrices and, flattened, convolutions.

    Of the momentum's singular value decomposition U S V^T the step is U V^T: every direction moves equally far, not
    only the few that have large gradients. From nothing it took the toy network to the same error in half of AdamW's
    time. Fine-tuning takes AdamW alone, as the paper does.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"]
                m.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(m, group["momentum"]).flatten(1).bfloat16()  # Nesterov's; (out, in)
                tall = g.shape[0] > g.shape[1]
                x = (g.T if tall else g) / (g.norm() + 1e-7)
                # Newton-Schulz: x <- a x + b (x x^T) x + c (x x^T)^2 x brings all singular values near 1
                for _ in range(5):
                    xxt = x @ x.T
                    x = 3.4445 * x + (-4.7750 * xxt + 2.0315 * xxt @ xxt) @ x
                x = (x.T if tall else x).view_as(p).float()
                p.add_(x, alpha=-group["lr"] * max(1, g.shape[0] / g.shape[1]) ** 0.5)


@torch.no_grad()
def reference_use(
    model: MultiViewUNet,
    views: Tensor,  # (N, V, 3, S, S) uint8
    device: torch.device,
    batch_size: int,
    times: tuple[int, ...] = (200, 500, 800, 950),
) -> dict[str, float]:
    """Squared error of x0 with the right and with a wrong reference, by t: the first thing to look at in any run.

    A network that ignores its reference has equal numbers. At high t, where the views are all noise, only a network
    that has learned to look things up in the reference has a small first number.
    """
    schedule = Schedule(model.cfg)
    latents = model.encode(views.to(device).float() / 255)
    result = {}
    for t_int in times:
        t = torch.full((len(latents),), t_int, device=device)
        g = keyed_generator(t_int)
        noise = torch.randn(latents.shape, generator=g).to(device)
        ref_noise = torch.randn(latents[:, 0].shape, generator=g).to(device)
        x_t = forward_noise(schedule, latents, t, noise)
        for name, y in (("right", latents[:, 0]), ("wrong", latents[:, 0].roll(1, 0))):
            ref_t, errors = noised_reference(schedule, model.cfg, y, t, ref_noise), []
            for part in torch.arange(len(latents), device=device).split(batch_size):
                prediction = model(x_t[part], t[part], ref_t[part])
                x0, _ = split_prediction(schedule, prediction, x_t[part], t[part])
                errors.append(((x0 - latents[part]) ** 2).flatten(1).mean(1))
            result[f"x0_error_t{t_int}_{name}_ref"] = round(torch.cat(errors).mean().item(), 4)
    return result


def evaluate(model: MultiViewUNet, views: Tensor, cfg: Config, device: torch.device, picture: Path) -> dict[str, float]:
    """Sample the validation objects from their front view; numbers, and a picture of the first eight."""
    truth = views.float() / 255
    bf16 = use_bf16(cfg.bf16, device)
    images = sample_images(model, truth[:, 0], cfg.seed, cfg.num_steps, cfg.batch_size, "evaluate", bf16)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        use = reference_use(model, views, device, cfg.batch_size)

    def mean_psnr(candidate: Tensor, first: int) -> float:
        return psnr(candidate[:, first:].flatten(0, 1), truth[:, first:].flatten(0, 1)).mean().item()

    grid(picture, {"truth": truth[:8], "sampled": images[:8]}, truth[:8, 0])
    return {
        "psnr": mean_psnr(images, 0),
        "psnr_unseen": mean_psnr(images, 1),
        "psnr_unseen_white": mean_psnr(torch.ones_like(truth), 1),
        "psnr_unseen_copied_reference": mean_psnr(truth[:, :1].expand_as(truth), 1),
        "hull": hull_iou(images).mean().item(),
        "hull_truth": hull_iou(truth).mean().item(),
        **use,
    }


def new_model(cfg: Config) -> MultiViewUNet:
    """What training starts from."""
    if cfg.preset not in PRESETS:
        raise InputError(f"--preset {cfg.preset}: unknown, expected one of {', '.join(PRESETS)}.")
    if cfg.init:
        model = load(cfg.init)
        if (model.cfg.cross_view, model.cfg.image_size) != (cfg.cross_view, cfg.image_size or model.cfg.image_size):
            raise InputError(
                f"--cross_view {cfg.cross_view} --image_size {cfg.image_size}: {cfg.init} was made with "
                f"{model.cfg.cross_view} and {model.cfg.image_size}, expected those."
            )
        return model
    preset = PRESETS[cfg.preset]
    if cfg.base and not preset.base:
        raise InputError(f"--base {cfg.base}: --preset {cfg.preset} starts from nothing, expected --preset sdxl.")
    architecture = replace(
        preset,
        cross_view=cfg.cross_view,
        base=cfg.base or preset.base,
        image_size=cfg.image_size or preset.image_size,
    )
    return from_base(architecture) if architecture.base else MultiViewUNet(architecture)


def main(cfg: Config) -> dict:
    """Train until cfg.steps, resuming from cfg.out; returns the last evaluation."""
    if cfg.split not in SPLITS:
        raise InputError(f"--split {cfg.split}: unknown, expected one of {', '.join(SPLITS)}.")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, out = get_device(cfg.device), Path(cfg.out)
    torch.manual_seed(cfg.seed)
    model = new_model(cfg)
    if min(cfg.steps, cfg.batch_size, cfg.warmup, cfg.eval_every, cfg.log_every, cfg.num_objects, cfg.eval_objects) < 1:
        raise InputError(
            "--steps, --batch_size, --warmup, --eval_every, --log_every and object counts: expected 1 or more."
        )
    size, bf16 = model.cfg.image_size, use_bf16(cfg.bf16, device)
    read = load_split if cfg.data == "toys" else lazy_split
    train_views = read(cfg.data, cfg.split, cfg.num_objects, size)
    val_views = load_split(cfg.data, "validation", cfg.eval_objects, size)

    half = bf16 and bool(model.cfg.base and (cfg.attention_only or cfg.lora))
    parameters = model.train().freeze(cfg.attention_only, cfg.lora, half, view_embedding=not cfg.init)
    model.to(device)  # after what is frozen has lost half its size
    if cfg.checkpointing:
        model.unet.enable_gradient_checkpointing()
    if cfg.compile:
        model.unet.compile()
    from_nothing = not (cfg.init or model.cfg.base)
    inner = {
        p
        for n, p in model.named_parameters()
        if from_nothing and p.ndim > 1 and "_blocks." in n and not re.search("position|time_emb", n)
    }
    matrices, rest = [p for p in parameters if p in inner], [p for p in parameters if p not in inner]
    fused = device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=cfg.muon_lr))
    schedule = Schedule(model.cfg)
    ema = {k: v.clone() for k, v in model.trained_state().items()}

    free = ("out", "threads", "device", "eval_every", "log_every")  # what may change when a run goes on
    claim(out, {k: v for k, v in asdict(cfg).items() if k not in free})
    start, seconds, result = 0, 0.0, {}
    if (out / "state.pt").is_file():
        state = load_state(out / "state.pt")
        model.load_state_dict(state["model"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema = {k: v.to(device) for k, v in state["ema"].items()}
        start, seconds, result = state["step"], state["seconds"], state["result"]
        del state
        print(f"{out}: going on at step {start}")
    if start < cfg.steps:
        save_json(out / "run.json", provenance(cfg))
    trim_log(out / "log.jsonl", start)

    clock, losses = time.time() - seconds, []
    bar = tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, desc="train_sft", disable=None)
    for step in bar:
        # evaluate and save
        if (step % cfg.eval_every == 0 or step == cfg.steps) and step > start:
            weights = {k: v.to("cpu", copy=True) for k, v in model.trained_state().items()}
            model.load_state_dict(ema, strict=False)
            result = evaluate(model.eval(), val_views, cfg, device, out / "grid.png")
            model.save(out)
            model.train().load_state_dict(weights, strict=False)
            seconds = time.time() - clock
            log_line(out / "log.jsonl", step=step, seconds=round(seconds), **result)
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
            state = {"model": weights, "optimizers": [o.state_dict() for o in optimizers], "ema": ema}
            state |= {"step": step, "seconds": seconds, "result": result}
            write_atomic(out / "state.pt", lambda p, state=state: torch.save(state, p))
        if step == cfg.steps:
            break

        # batch, forward, backward, step
        rate = min(1, (step + 1) / cfg.warmup) * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.muon_lr)[: len(optimizers)], strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        batch = training_batch(model, schedule, train_views, cfg.batch_size, cfg.seed, step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = simple_loss(model, schedule, *batch).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise InputError(f"step {step}: the gradient is {norm.item()}, expected a finite one. Lower --lr.")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(cfg.ema, (1 + step) / (10 + step))  # a short memory first, so that the start is forgotten
        for name, value in model.trained_state().items():
            ema[name].lerp_(value, 1 - decay)

        # log
        losses.append(loss.item())
        if (step + 1) % cfg.log_every == 0:
            mean = sum(losses) / len(losses)
            losses = []
            log_line(
                out / "log.jsonl",
                step=step + 1,
                loss=mean,
                grad_norm=norm.item(),
                seconds=round(time.time() - clock),
            )
            bar.set_postfix(loss=f"{mean:.4f}")
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
