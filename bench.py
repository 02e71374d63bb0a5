"""How fast is it, and does it fit? Measured against the published structure; counted at the paper's scale.

Measured: two forms of one computation, on one network, with equal weights and one batch. First both run once
in float32, and their losses and gradients must be equal to 1e-4. Then they take turns, in bfloat16 where the
hardware has it.

    pair step     published order of calls: policy on the winner, frozen policy on the winner, the same two
                  on the loser. Ours: one forward (train_d3po.step_log_ratio); the frozen means are stored
    pairs of G    published: that step in a loop over all pairs of G candidates. Ours: one forward for all.
                  Candidates have states of their own (--candidates noised), or one for all (branch)
    reference     published: the reference alone, then the views with its stored tokens. Ours: one forward
    sampling      five views of one object, by either form of that

A loop over more than 12 pairs is timed on 12 and scaled: it is linear in them. On a CPU the seconds are those
of the process, so that other programs do not count; on CUDA they are the clock's. Peak: a product of two
2048 x 2048 matrices, measured anew at each turn.

Counted (--count True): the step of SDXL runs on tensors without data. Every allocation is followed to its
peak, every product and convolution counted. What a GPU adds is not in it: a GB of context, the allocator's
gaps, the VAE at work.

    time = floating-point operations / (--utilisation x --tflops)         an estimate; memory is the count

Run:
    python bench.py --out results/bench                    # a few minutes of one CPU core
    python bench.py --device cuda
    python bench.py --count True --out results/memory      # a few minutes; also with --lora 16

Letters: B objects, P pairs, G candidates, R states, V views. One object is V + 1 = 6 rows of the UNet.
"""

import copy
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common import InputError, check_at_least, check_output, cli, get_device, keyed_generator, provenance
from common import save_json, use_bf16, write_atomic
from model import NUM_VIEWS, PRESETS, MultiViewAttention, MultiViewUNet, from_pipeline, load
from sample import Schedule, ddpm_step, log_ratio, noised_reference, policy_mean, sample
from train_d3po import Batch, batch_means, d3po_loss, step_log_ratio
from train_sft import simple_loss

TIMED_PAIRS = 12
BETA = 0.1


@dataclass(frozen=True)
class Config:
    """What to measure, or to count."""

    model: str = "checkpoints/objects"  # the network that is measured
    groups: tuple[int, ...] = (2, 5, 9, 16)  # G, candidates of one reference
    num_steps: int = 10  # network calls of a sample
    repeats: int = 5  # turns of each form
    bf16: Literal["auto", "on", "off"] = "auto"  # auto (where it is fast), on or off
    device: str = "auto"  # auto, cpu or cuda

    count: bool = False  # count SDXL's step instead
    base: str = "tests/sdxl"  # hub id or folder with unet/config.json; no weights are read
    sizes: tuple[int, ...] = (256, 512)  # pixels
    lora: int = 0  # rank; 0: train the attention layers themselves
    checkpointing: bool = True  # gradient checkpointing, as in runs/paper.sh
    tflops: float = 312  # what the GPU can do in bfloat16 at best (A100: 312, H100: 989, RTX 4090: 165)
    utilisation: float = 0.4  # the share of it that such a network reaches

    out: str = ""  # folder for the table, as Markdown and JSON; empty: print only


# --- the published forms ---


class TwoPass:
    """Reference attention as Zero123++ has it: a pass of the reference stores the tokens of each layer, a
    pass of the views appends them to its own keys and values."""

    def __init__(self, model: MultiViewUNet) -> None:
        self.model, self.cfg, self.encode, self.decode = model, model.cfg, model.encode, model.decode
        self.layers = [m for m in model.modules() if isinstance(m, MultiViewAttention)]
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: Any, storing: bool, x: Tensor, **_: Any) -> Tensor:  # ((B R), N, C)
        tables = 0 if layer.position is None else layer.position[NUM_VIEWS if storing else slice(NUM_VIEWS)]
        if storing:
            placed, own = x + tables, x
            self.stored[id(layer)] = placed, own
            keys, values = placed, own
        else:  # all views of an object are one sequence
            placed, own = (
                z.flatten(1, 2)
                for z in (x.unflatten(0, (-1, NUM_VIEWS)) + tables, x.unflatten(0, (-1, NUM_VIEWS)))
            )
            keys, values = (torch.cat(z, 1) for z in zip((placed, own), self.stored[id(layer)]))
        q, k, v = (
            project(z).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for project, z in ((layer.to_q, placed), (layer.to_k, keys), (layer.to_v, values))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return layer.to_out[0](out).reshape(x.shape)

    def __call__(self, x_t: Tensor, t: Tensor, ref_t: Tensor) -> Tensor:
        try:
            for layer in self.layers:
                layer.forward = partial(self.attend, layer, True)  # type: ignore
            label = torch.full((len(ref_t),), NUM_VIEWS, device=ref_t.device)
            self.model.unet(ref_t, t, class_labels=label, **self.model.conditions(ref_t))
            for layer in self.layers:
                layer.forward = partial(self.attend, layer, False)  # type: ignore
            return self.model(x_t, t, None)
        finally:
            for layer in self.layers:
                del layer.forward


def published_pair(
    policy: MultiViewUNet, pre: MultiViewUNet, batch: Batch, pair: tuple[int, int], bf16: bool
) -> Tensor:
    """Eq. (2) of one pair: four calls of a network, as in D3PO's loop."""
    schedule, R, ratios = Schedule(policy.cfg), batch.x_t.shape[1], []
    for g in pair:
        given = (batch.x_t[:, min(g, R - 1)], batch.y, batch.ref_noise, batch.t, batch.s, bf16)
        mean, var = policy_mean(policy, schedule, *given)
        with torch.no_grad():
            mean_pre, _ = policy_mean(pre, schedule, *given)
        ratios.append(log_ratio(batch.action[:, g], mean, mean_pre, var))
    return d3po_loss(ratios[0], ratios[1], BETA)[0]


def published_loop(
    policy: MultiViewUNet, pre: MultiViewUNet, batch: Batch, bf16: bool, timed: bool = False
) -> Tensor:
    """All pairs of the candidates, one after the other; the loss is their mean."""
    pairs = list(combinations(range(batch.action.shape[1]), 2))
    total = torch.zeros(())
    for pair in pairs[:TIMED_PAIRS] if timed else pairs:
        loss = published_pair(policy, pre, batch, pair, bf16) / len(pairs)
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def our_step(policy: MultiViewUNet, batch: Batch, mean_pre: Tensor, bf16: bool) -> Tensor:
    """All pairs of the candidates from one forward."""
    ratio, _ = step_log_ratio(policy, Schedule(policy.cfg), batch, mean_pre, bf16)
    w, l = torch.tensor(list(combinations(range(ratio.shape[1]), 2))).T  # noqa: E741
    loss, _ = d3po_loss(ratio[0, w], ratio[0, l], BETA)
    loss.backward()
    return loss.detach()


def toy_batch(pre: MultiViewUNet, G: int, R: int, device: Any) -> tuple[Batch, Tensor]:
    """One reference, R states, G actions that the frozen policy could have taken; and its means there."""
    g, cfg, schedule = keyed_generator(G, R), pre.cfg, Schedule(pre.cfg)
    shape = (cfg.latent_channels, cfg.latent_size, cfg.latent_size)
    draw = lambda *rows: torch.randn(*rows, *shape, generator=g).to(device)  # noqa: E731
    t, s = (torch.full((1,), z, device=device) for z in schedule.timesteps(10)[2])
    x = draw(1, R, NUM_VIEWS)
    batch = Batch(x, x, draw(1), draw(1), x, t, s)
    with torch.no_grad():
        mean, var = batch_means(pre, schedule, batch, False)
    action = mean.repeat_interleave(G // R, 0)[None] + var[0].sqrt() * draw(1, G, NUM_VIEWS)
    return batch._replace(action=action), mean[None]


# --- measuring ---


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, of the wall on CUDA, when all that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_flops(device: torch.device, bf16: bool, size: int = 2048) -> float:
    """Floating-point operations a second of a matrix product, the best of three."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = []
    for _ in range(3):
        start = clock(device)
        torch.matmul(a, a)
        seconds.append(clock(device) - start)
    return 2 * size**3 / min(seconds)


Run = Callable[..., Tensor]  # (bf16, timed) -> loss or picture; its gradients are in p.grad


def compare(
    label: str,
    published: Run,
    ours: Run,
    scale: float,
    networks: list[MultiViewUNet],
    cfg: Config,
    bf16: bool,
) -> dict[str, Any]:
    """Assert that both forms are equal, count their calls and operations, and time them in turn."""
    device, policy, results = get_device(cfg.device), networks[0], []
    for form in (published, ours):
        calls: list[int] = []
        hooks = [n.unet.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for n in networks]
        # the plain backend: not all fused attentions are counted
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            value = form(False)
        for hook in hooks:
            hook.remove()
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        policy.zero_grad()
        results.append(
            (value, torch.cat(grads) if grads else value.new_zeros(1), len(calls), flops.get_total_flops())
        )
    (value, grad, *theirs), (our_value, our_grad, *own) = results
    for name, a, b in (("loss", value, our_value), ("gradient", grad, our_grad)):
        if (a.cpu() - b.cpu()).norm() > 1e-4 * a.cpu().norm():
            raise InputError(
                f"{label}: the {name} of the two forms differs by more than 1e-4, expected equal ones."
            )

    seconds: list[tuple[float, float]] = []
    shares: list[float] = []
    for turn in range(cfg.repeats + 1):  # the first warms up
        peak, took = peak_flops(device, bf16), []
        for form in (published, ours):
            start = clock(device)
            form(bf16, True)
            took.append(clock(device) - start)
            policy.zero_grad()
        if turn:
            seconds.append((scale * took[0], took[1]))
            shares.append(own[1] / took[1] / peak)
    ratios = sorted(a / b for a, b in seconds)
    middle = len(ratios) // 2
    return {
        "label": label,
        "ratio": ratios[middle],
        "low": ratios[0],
        "high": ratios[-1],
        "seconds": [sorted(z)[middle] for z in zip(*seconds)],
        "calls": [theirs[0], own[0]],
        "gflop": [theirs[1] / 1e9, own[1] / 1e9],
        "of_peak": sorted(shares)[middle],
    }


def measure(cfg: Config) -> list[dict[str, Any]]:
    """All comparisons."""
    device = get_device(cfg.device)
    bf16 = use_bf16(cfg.bf16, device)
    pre = load(cfg.model, device).requires_grad_(False)
    Schedule(pre.cfg).timesteps(cfg.num_steps)  # a wrong number of them shows now
    policy = copy.deepcopy(pre).requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a policy that has moved a little, or the loss would be log 2 whatever is computed
        for p in policy.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=g).to(device) * p.std(unbiased=False))
    rows = []

    def add(label: str, published: Run, ours: Run, scale: float = 1.0) -> None:
        rows.append(compare(label, published, ours, scale, [policy, pre], cfg, bf16))
        print(line(rows[-1]), flush=True)

    for G in cfg.groups:
        pairs = G * (G - 1) // 2
        for R, kind in ((G, "states of their own"), (1, "one state")):
            batch, means = toy_batch(pre, G, R, device)
            loop = partial(published_loop, policy, pre, batch)
            label = "pair step" if G == 2 else f"{pairs} pairs of {G}"
            ours = lambda half, timed=False, b=batch, m=means: our_step(policy, b, m, half)  # noqa: E731
            add(f"{label}, {kind}", loop, ours, max(1, pairs / TIMED_PAIRS))

    batch, _ = toy_batch(pre, 2, 2, device)
    given = batch.x_t[0], batch.t.expand(2), batch.action[0, :, 0]

    def step(network: Any, half: bool, timed: bool = False) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = network(*given).square().mean()
        loss.backward()
        return loss.detach()

    two = TwoPass(policy)
    add("reference attention, step of 2 objects", partial(step, two), partial(step, policy))
    ref = torch.rand(1, 3, pre.cfg.image_size, pre.cfg.image_size, generator=g).to(device)
    draw = lambda network, half, timed=False: sample(network, ref, [0], cfg.num_steps, bf16=half).images  # noqa: E731
    add(f"sampling five views, {cfg.num_steps} steps", partial(draw, two), partial(draw, policy))
    return rows


HEAD = "| | times faster (min to max) | seconds | network calls | GFLOP | per cent of peak |\n"
HEAD += "|---" * 6 + "|"


def line(r: dict[str, Any]) -> str:
    """A row of the measured table; two numbers are published and ours."""
    pairs = [f"{a:.{d}f} / {b:.{d}f}" for (a, b), d in ((r["seconds"], 3), (r["calls"], 0), (r["gflop"], 1))]
    ratio = f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
    return f"| {r['label']} | {ratio} | " + " | ".join(pairs) + f" | {100 * r['of_peak']:.0f} |"


# --- counting ---


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside the block that are alive, and the most they ever were."""

    def __init__(self, before: Iterable[Tensor]) -> None:  # what is there already and is not counted
        super().__init__()
        self.now = self.peak = 0
        self.alive = {id(tensor.untyped_storage()) for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # views share one
                key, size = id(storage), storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, key, size)
        return out

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def float32_norms(model: nn.Module) -> None:
    """Normalise in float32 and hand that on, as autocast does on CUDA and does not on a CPU."""

    def group(m: Any, input: Tensor) -> Tensor:
        return F.group_norm(input.float(), m.num_groups, m.weight.float(), m.bias.float(), m.eps)

    def layer(m: Any, input: Tensor) -> Tensor:
        return F.layer_norm(input.float(), m.normalized_shape, m.weight.float(), m.bias.float(), m.eps)

    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.forward = partial(group if isinstance(module, nn.GroupNorm) else layer, module)


def steps_of(model: MultiViewUNet, parameters: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """The kinds of step, with the project's own functions on latents of the right shape."""
    cfg, schedule = model.cfg, Schedule(model.cfg)
    t = torch.ones(1, dtype=torch.long)

    def latents(*rows: int) -> Tensor:
        return torch.randn(*rows, NUM_VIEWS, cfg.latent_channels, cfg.latent_size, cfg.latent_size)

    def simple() -> None:
        x, noise = latents(1), latents(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = simple_loss(model, schedule, x, x[:, 0], t, noise, noise[:, 0]).mean()
        torch.autograd.grad(loss, parameters)

    def d3po(states: int, candidates: int) -> None:
        x, action = latents(1, states), latents(1, candidates)
        batch = Batch(x, action, x[:, 0, 0], action[:, 0, 0], action, 500 * t, 480 * t)
        ratio, kl = step_log_ratio(model, schedule, batch, latents(1, states), True)
        # d3po_loss's metrics want numbers, and these tensors have none: the loss alone
        loss = -F.logsigmoid(0.01 * (ratio[:, 0] - ratio[:, 1])).mean() + kl.mean()
        torch.autograd.grad(loss, parameters)

    @torch.no_grad()
    def collect() -> None:
        x, five = latents(5), t.expand(5)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(x, five, noised_reference(schedule, cfg, x[:, 0], five, x[:, 1]))
        ddpm_step(schedule, prediction, x, five * 500, five * 480)

    return {
        "collect: one call for 5 candidates": collect,
        "SFT step: 1 object": simple,
        "D3PO step: 1 pair and 1 object": lambda: (d3po(2, 2), simple()),
        "D3PO step: 8 candidates of one state and 1 object": lambda: (d3po(1, 8), simple()),
    }


def count(cfg: Config, size: int, kind: str = "") -> list[dict[str, Any]]:
    """Peak memory by owner in GB (10^9 bytes) and TFLOP of each kind of step, or of those with this name."""
    rows = []
    architecture = replace(PRESETS["sdxl"], base=cfg.base, image_size=size)
    stock: Any = from_pipeline(UNet2DConditionModel.load_config, cfg.base, subfolder="unet")
    with FakeTensorMode():
        unet: Any = UNet2DConditionModel.from_config(stock)
        model = MultiViewUNet(architecture, unet).train()
        if cfg.lora:
            model.add_lora(cfg.lora)
        parameters = model.freeze(attention_only=True, frozen_bf16=True)
        float32_norms(model)
        if cfg.checkpointing:
            model.unet.enable_gradient_checkpointing()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        adam = 8 * sum(p.numel() for p in parameters)  # two float32 averages of each gradient
        for name, step in ((n, s) for n, s in steps_of(model, parameters).items() if n.startswith(kind)):
            with PeakMemory(model.parameters()) as memory:
                step()
            with FlopCounterMode(display=False) as flops:  # by itself: it keeps tensors alive
                step()
            owners = {"weights": weights, "adam": 0 if "collect" in name else adam, "rest": memory.peak}
            gb, tflop = {k: v / 1e9 for k, v in owners.items()}, flops.get_total_flops() / 1e12
            more = {
                "total": sum(gb.values()),
                "tflop": tflop,
                "seconds": tflop / (cfg.tflops * cfg.utilisation),
            }
            rows.append({"size": size, "step": name, **gb, **more})
    return rows


def counted_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| px | step | weights | Adam | gradients and activations | total GB | TFLOP | seconds |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        gb = " | ".join(f"{r[k]:.1f}" for k in ("weights", "adam", "rest", "total", "tflop"))
        lines.append(f"| {r['size']} | {r['step']} | {gb} | {r['seconds']:.2f} |")
    return "\n".join(lines)


def main(cfg: Config) -> dict:
    """Measure or count, print a Markdown table, write it."""
    check_at_least(cfg, 1, "repeats", "sizes", "tflops")
    check_at_least(cfg, 2, "groups", "num_steps")
    check_at_least(cfg, 0, "lora")
    if not 0 < cfg.utilisation <= 1:
        raise InputError(f"--utilisation {cfg.utilisation}: expected more than 0, at most 1.")
    if cfg.out:
        check_output("out", cfg.out)
    if cfg.count:
        rows = [row for size in cfg.sizes for row in count(cfg, size)]
        table, name = counted_table(rows), f"lora{cfg.lora}" if cfg.lora else "attention"
        print(table)
    else:
        print(HEAD)
        rows = measure(cfg)
        table, name = "\n".join([HEAD, *map(line, rows)]), "table"
    result = {**provenance(cfg), "computed": cfg.count, "rows": rows}
    if cfg.out:
        save_json(Path(cfg.out) / f"{name}.json", result)
        write_atomic(Path(cfg.out) / f"{name}.md", lambda p: p.write_text(table + "\n"))
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
