"""How fast is it, how exact, does it fit? Against the published structure, and at the paper's scale.

Measured: two forms of one computation, with equal weights and one batch; what trains are the attention
layers, as in the main job. First both run once in float32: losses and gradients must be equal to 1e-4. Then
they take turns, in bfloat16 where it is fast.

    pair step     published order of calls: policy on the winner, frozen policy on the winner, the same two
                  on the loser. Ours: one forward (train_d3po.step_log_ratio); the frozen means are stored
    pairs of G    published: that in a loop over all pairs. Ours: one forward. Candidates have states of their
                  own (--candidates noised), or one for all (branch)
    reference     published: the reference alone, then the views with its stored tokens. Ours: one forward
    sampling      five views of one object, by either form of that

A loop over more than 4 pairs is timed on 4 and scaled: it is linear in them. Seconds are the process's on a
CPU, so that other programs do not count, the clock's on CUDA. Peak: a product of two 2048 x 2048 matrices,
measured anew at each turn. A second table says what bfloat16 does to the log-ratios of Eq. (2).

Scaling: seconds, operations and memory of Eq. (2)'s forward and backward against its sizes. Attention is
quadratic in views times pixels, all else is linear: the counted operations say which exponent that makes.

Counted: SDXL's step on tensors without data. Every allocation is followed to its peak, every product and
convolution counted. What a GPU adds is not in it: a GB of context, the allocator's gaps, the VAE at work.
Its seconds are an estimate: 40 % of an A100's bfloat16.

Run:
    python bench.py --out results/bench                    # a few minutes of one CPU core
    python bench.py --scaling True --out results/bench     # a minute
    python bench.py --count True --out results/memory      # a few minutes; also with --lora 16

Letters: B objects, P pairs, G candidates, R states, V views. A state is V rows of the UNet; a reference is
one more, which its candidates share.
"""

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_d3po as D
from candidates import Batch, make_batch, read_rollouts
from common import InputError, check_at_least, check_output, cli, get_device, keyed_generator, located
from common import provenance, save_json, use_bf16, write_atomic
from model import NUM_VIEWS, PRESETS, ModelConfig, MultiViewUNet, from_pipeline, load
from sample import Schedule, log_ratio, policy_mean, sample
from train_sft import simple_loss

TIMED_PAIRS = 4
BETA = 0.1
JOB: dict[str, Any] = {"num_references": 24, "num_candidates": 4, "pairs": "all", "steps": 20}
SWEEPS = {  # what grows: its letters (S pixels), its values
    "views": ("V", (2, 3, 5, 8)),
    "pixels": ("S", (32, 64, 128)),
    "candidates, states of their own": ("RG", (1, 2, 5, 9, 16)),
    "candidates, one state": ("G", (1, 2, 5, 9, 16)),
    "objects": ("B", (1, 2, 4, 8)),
}


@dataclass(frozen=True)
class Config:
    """What to measure, or to count."""

    model: str = "checkpoints/objects"  # the network that is measured
    groups: tuple[int, ...] = (2, 5, 9, 16)  # G, candidates of one reference
    repeats: int = 5  # turns of each form
    bf16: Literal["auto", "on", "off"] = "auto"  # auto (where it is fast), on or off
    device: str = "auto"  # auto, cpu or cuda
    scaling: bool = False  # measure one step against its sizes instead

    count: bool = False  # count SDXL's step instead
    base: str = "tests/sdxl"  # hub id or folder with unet/config.json; no weights are read
    sizes: tuple[int, ...] = (256, 512)  # pixels
    lora: int = 0  # rank; 0: train the attention layers themselves
    checkpointing: bool = True  # gradient checkpointing, as in runs/paper.sh

    out: str = ""  # folder for tables and plot; empty: print only


# --- the published forms, and ours ---


class TwoPass:
    """Reference attention as Zero123++ has it: a pass of the reference stores the tokens of each layer, a
    pass of the views appends them to its own keys and values."""

    def __init__(self, model: MultiViewUNet) -> None:
        self.model, self.cfg, self.encode, self.decode = model, model.cfg, model.encode, model.decode
        self.stored: dict[Any, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: Any, x: Tensor, **_: Any) -> Tensor:  # ((B R), N, C), R = 1 or V
        rows = [*range(NUM_VIEWS)] if layer in self.stored else [NUM_VIEWS]
        own = rearrange(x, "(B R) N C -> B R N C", R=len(rows))
        placed, own = (own + layer.position[rows]).flatten(1, 2), own.flatten(1, 2)
        keys, values = placed, own
        if layer in self.stored:  # all views of an object are one sequence, then the reference
            keys, values = (torch.cat(z, 1) for z in zip((placed, own), self.stored.pop(layer)))
        else:
            self.stored[layer] = placed, own
        qkv = (layer.to_q(placed), layer.to_k(keys), layer.to_v(values))
        q, k, v = (rearrange(z, "B N (H d) -> B H N d", H=layer.heads) for z in qkv)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "B H N d -> B N (H d)")
        return layer.to_out[0](out).reshape(x.shape)

    def __call__(self, x_t: Tensor, t: Tensor, ref_t: Tensor) -> Tensor:
        layers: list[Any] = self.model.attention_layers()
        for layer in layers:
            layer.forward = partial(self.attend, layer)
        label = torch.full((len(ref_t),), NUM_VIEWS, device=ref_t.device)
        self.model.unet(ref_t, t, class_labels=label, **self.model.conditions(ref_t))
        views = self.model(x_t, t, None)
        for layer in layers:
            del layer.forward
        return views


def published_loop(policy: MultiViewUNet, pre: MultiViewUNet, batch: Batch, limit: int, bf16: bool) -> Tensor:
    """Eq. (2) of all pairs, or of the first `limit`, in D3PO's order: four calls of a network for each."""
    pairs, R = torch.combinations(torch.arange(batch.action.shape[1])).tolist(), batch.x_t.shape[1]
    schedule, losses = Schedule(policy.cfg), []
    for pair in pairs[:limit]:
        ratios = []
        for g in pair:
            given = (batch.x_t[:, min(g, R - 1)], batch.y, batch.ref_noise, batch.t, batch.s, bf16)
            mean, var = policy_mean(policy, schedule, *given)
            with torch.no_grad():
                mean_pre, _ = policy_mean(pre, schedule, *given)
            ratios.append(log_ratio(batch.action[:, g], mean, mean_pre, var))
        losses.append(D.d3po_loss(ratios[0], ratios[1], BETA)[0] / len(pairs))
        losses[-1].backward()
    return torch.stack(losses).sum().detach()


def our_step(policy: MultiViewUNet, batch: Batch, mean_pre: Tensor, bf16: bool) -> Tensor:
    """All pairs of the candidates from one forward."""
    ratio, _ = D.step_log_ratio(policy, Schedule(policy.cfg), batch, mean_pre, bf16)
    loss, _ = D.d3po_loss(*pairs_of(ratio[0]), BETA)
    loss.backward()
    return loss.detach()


def eq2(model: MultiViewUNet, batch: Batch, bf16: bool) -> None:
    """Forward and backward without pairs: d3po_loss wants numbers, which tensors without data have not."""
    ratio, kl = D.step_log_ratio(model, Schedule(model.cfg), batch, 0 * batch.x_t, bf16)
    (ratio.mean() + kl.mean()).backward()


def pairs_of(ratio: Tensor) -> tuple[Tensor, Tensor]:  # (..., G) -> (..., P), (..., P)
    """The log-ratios of the first and the second of every two candidates."""
    first, second = torch.combinations(torch.arange(ratio.shape[-1])).T
    return ratio[..., first], ratio[..., second]


def random_batch(
    cfg: ModelConfig, device: Any = "cpu", B: int = 1, R: int = 1, G: int = 1, V: int = NUM_VIEWS
) -> Batch:
    """Noise in the shapes of a step, at the third call of ten."""
    g, shape = keyed_generator(B, R, G, V), (cfg.latent_channels, cfg.latent_size, cfg.latent_size)
    x, action, y, noise = (
        torch.randn(*rows, *shape, generator=g).to(device) for rows in ((B, R, V), (B, G, V), (B,), (B,))
    )
    t, s = (torch.full((B,), z, device=device) for z in Schedule(cfg).timesteps(10)[2])
    return Batch(x, action, y, noise, action, t, s)


# --- instruments ---


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of this process on a CPU; of the wall on CUDA, when all that was asked for is done."""
    gpu = device.type == "cuda"
    clock = (lambda: (torch.cuda.synchronize(), time.perf_counter())[1]) if gpu else time.process_time
    start = clock()
    run()
    return clock() - start


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations. The counter passes over fused attention: here it is plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside the block that are alive, and the most they ever were."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:  # what is there already and is not counted
        super().__init__()
        self.now = self.peak = 0
        self.alive = {id(tensor.untyped_storage()) for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.alive:
                storage = tensor.untyped_storage()  # views share one
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, id(storage), storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def peak_flops(device: torch.device, bf16: bool, size: int = 2048) -> float:
    """Floating-point operations a second of a matrix product, the best of three."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * size**3 / min(seconds_of(lambda: a @ a, device) for _ in range(3))


# --- measuring ---

Form = Callable[[bool], Tensor]  # bf16 -> loss or picture; its gradients are in p.grad


def compare(
    cfg: Config, networks: Any, label: str, *forms: Form, quick: Any = None, scale: float = 1
) -> dict[str, Any]:
    """Assert that the published form and ours are equal, count calls and operations, and time them in turn.

    quick is timed in place of the published form, which takes `scale` times as long."""
    device, policy, found, seconds, shares = get_device(cfg.device), networks[0], [], [], []
    bf16, calls = use_bf16(cfg.bf16, device), []
    hooks = [network.unet.register_forward_hook(lambda *_: calls.append(1)) for network in networks]
    for form in forms:
        value, before = [], len(calls)
        flop = flops_of(lambda form=form, value=value: value.append(form(False)))
        gradient = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        policy.zero_grad()
        found.append((value[0], torch.cat(gradient or value), len(calls) - before, flop / 1e9))
    for hook in hooks:
        hook.remove()
    for name, a, b in zip(("loss", "gradient"), *found):
        if (a - b).norm() > 1e-4 * a.norm():
            raise InputError(f"{label}: the {name} of the two forms differs by more than 1e-4.")
    for turn in range(cfg.repeats + 1):
        peak, took = peak_flops(device, bf16), []
        for form in (quick or forms[0], forms[1]):
            took.append(seconds_of(partial(form, bf16), device))
            policy.zero_grad()
        if turn:  # the first warms up
            seconds.append((scale * took[0], took[1]))
            shares.append(1e9 * found[1][3] / took[1] / peak)
    ratios = [a / b for a, b in seconds]
    row = {"published / ours": label, "times faster": median(ratios), "min": min(ratios), "max": max(ratios)}
    row |= {"seconds": tuple(map(median, zip(*seconds)))}
    row |= {"network calls": tuple(f[2] for f in found), "GFLOP": tuple(f[3] for f in found)}
    print(f"{label}: {row['times faster']:.2f}", flush=True)
    return row | {"share of peak": median(shares)}


def measure(cfg: Config, device: torch.device) -> list[dict[str, Any]]:
    """All comparisons."""
    pre, policy = load(cfg.model, device).requires_grad_(False), load(cfg.model, device)
    g, rows = torch.Generator().manual_seed(0), []
    with torch.no_grad():  # a policy that has moved a little, or the loss would be log 2 whatever is computed
        for p in policy.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=g).to(device) * p.std(unbiased=False))
    policy.freeze(attention_only=True)  # as the main job does

    to_row = partial(compare, cfg, (policy, pre))
    for G in cfg.groups:
        pairs = G * (G - 1) // 2
        for R, kind in ((G, "states of their own"), (1, "one state")):
            batch = random_batch(pre.cfg, device, R=R, G=G)
            with torch.no_grad():
                mean_pre = D.batch_means(pre, Schedule(pre.cfg), batch, False)[0][None]
            label = f"{'pair step' if G == 2 else f'{pairs} pairs of {G}'}, {kind}"
            loop = partial(published_loop, policy, pre, batch)
            forms = (partial(loop, pairs), partial(our_step, policy, batch, mean_pre))
            scale = max(1, pairs / TIMED_PAIRS)
            rows.append(to_row(label, *forms, quick=partial(loop, TIMED_PAIRS), scale=scale))

    two = random_batch(pre.cfg, device, B=2)
    ref = torch.rand(1, 3, pre.cfg.image_size, pre.cfg.image_size, generator=g).to(device)

    def step(network: Any, bf16: bool) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = network(two.x_t[:, 0], two.t, two.y).square().mean()
        loss.backward()
        return loss.detach()

    def draw(network: Any, bf16: bool) -> Tensor:
        return sample(network, ref, [0], bf16=bf16).images.flatten()

    for label, run in (("reference attention, step of 2 objects", step), ("sampling, 10 calls", draw)):
        rows.append(to_row(label, partial(run, TwoPass(policy)), partial(run, policy)))
    return rows


def precision(cfg: Config, device: torch.device) -> list[dict[str, Any]]:
    """What bfloat16 does to the differences of log-ratios that Eq. (2) compares, at each trained call of a
    small main job, and to the log-ratio of equal weights."""
    pre, rows = load(cfg.model, device), []
    with TemporaryDirectory() as out:
        job = D.Config("oracle", cfg.model, eval_objects=2, out=out, device=cfg.device, **JOB)
        policy = load(D.main(job)["folder"], device)
        rollouts, schedule = read_rollouts(next(Path(out).glob("candidates-*"))), Schedule(pre.cfg)
    for call in rollouts.call.unique().tolist():
        chosen, nats = (rollouts.call[:, 0] == call).nonzero()[:, 0], []
        batch = make_batch(rollouts, chosen, 0 * chosen, schedule, job.num_steps, device)
        for bf16 in (False, True):
            with torch.no_grad():
                old = D.batch_means(pre, schedule, batch, bf16)[0].unflatten(0, (len(chosen), -1))
                moved, equal = (D.step_log_ratio(p, schedule, batch, old, bf16)[0] for p in (policy, pre))
            nats.append(torch.sub(*pairs_of(moved)))
        row = {"call": call, "pairs": nats[0].numel(), "deviation, nats": nats[0].std().item()}
        error = (nats[1] - nats[0]).abs().mean().item()
        rows.append(row | {"error of bfloat16": error, "equal weights": equal.abs().max().item()})
    return rows


def scaling(cfg: Config, device: torch.device) -> list[dict[str, Any]]:
    """Seconds, operations and peak memory of Eq. (2)'s forward and backward along each sweep, random weights,
    all other sizes at 1 (V at 5, S at the model's). Exponents: least squares on logarithms."""
    bf16, rows = use_bf16(cfg.bf16, device), []
    architecture = replace(load(cfg.model).cfg, position=False)  # its tables know five views only
    for sweep, (letters, values) in SWEEPS.items():
        points = []
        for x in values:
            sizes: dict[str, int] = {letter: x for letter in letters}
            model = MultiViewUNet(replace(architecture, image_size=sizes.pop("S", architecture.image_size)))
            embedding: Any = model.unet.class_embedding
            model.unet.class_embedding = nn.Embedding(9, embedding.embedding_dim)  # of up to eight views
            step = partial(eq2, model.to(device), random_batch(model.cfg, device, **sizes), bf16)
            with PeakMemory() as memory:
                step()
            seconds = min(seconds_of(step, device) for _ in range(cfg.repeats))
            points.append((seconds, flops_of(step) / 1e9, memory.peak / 1e6))
        row: dict[str, Any] = {"against": sweep, "values": values}
        for name, y in zip(("seconds", "GFLOP", "peak MB"), zip(*points)):
            row |= {name: y, f"exponent, {name}": float(np.polyfit(np.log(values), np.log(y), 1)[0])}
        rows.append(row)
    return rows


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Above: seconds, and counted operations at the mean speed. Below: memory."""
    figure = Figure(figsize=(16, 6), layout="constrained")
    axes = figure.subplots(2, len(rows), sharey="row", squeeze=False)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak MB")
    for column, r in zip(axes.T, rows):
        flop_seconds = np.exp(np.mean(np.log(np.divide(r["seconds"], r["GFLOP"])))) * np.array(r["GFLOP"])
        curves = ((0, "seconds", r["seconds"], "C0o-"), (0, "GFLOP", flop_seconds, "k--"))
        for at, name, y, style in (*curves, (1, "peak MB", r["peak MB"], "C1o-")):
            column[at].loglog(r["values"], y, style, label=f"{name}: {r[f'exponent, {name}']:.2f}")
            column[at].set_xticks(r["values"], map(str, r["values"]))
            column[at].set_xlabel(r["against"])
            column[at].minorticks_off()
            column[at].legend(title="exponent")
    write_atomic(path, lambda p: figure.savefig(p, dpi=80, format="png"))


# --- counting ---


def float32_norms(model: nn.Module) -> None:
    """Normalise in float32 and hand that on, as autocast does on CUDA and does not on a CPU."""

    def norm(m: Any, x: Tensor) -> Tensor:
        group = isinstance(m, nn.GroupNorm)
        function: Any = F.group_norm if group else F.layer_norm
        shape = m.num_groups if group else m.normalized_shape
        return function(x.float(), shape, m.weight.float(), m.bias.float(), m.eps)

    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            setattr(module, "forward", partial(norm, module))  # noqa: B010  (a method, to a type checker)


def count(cfg: Config, size: int, kind: str = "") -> list[dict[str, Any]]:
    """Peak memory by owner in GB (10^9 bytes) and TFLOP of each kind of step, or of those with this name: the
    project's own functions on latents of the right shape."""

    def simple() -> None:
        b = random_batch(model.cfg)
        with torch.autocast("cpu", torch.bfloat16):
            loss = simple_loss(model, schedule, b.x_t[:, 0], b.y, b.t, b.action[:, 0], b.ref_noise)
        loss.mean().backward()

    def d3po(**sizes: int) -> None:
        eq2(model, random_batch(model.cfg, **sizes), True)
        simple()  # on top of these gradients, as in the loop

    @torch.no_grad()
    def collect() -> None:
        b = random_batch(model.cfg, B=5)
        policy_mean(model, schedule, b.x_t[:, 0], b.y, b.ref_noise, b.t, b.s, True)

    steps: dict[str, Callable[[], object]] = {
        "collect: one call for 5 candidates": collect,
        "SFT step: 1 object": simple,
        "D3PO step: 1 pair and 1 object": partial(d3po, R=2, G=2),
        "D3PO step: 8 candidates of one state and 1 object": partial(d3po, G=8),
    }
    base = str(located(cfg.base)) if located(cfg.base).is_dir() else cfg.base
    rows = []
    with FakeTensorMode():
        unet = from_pipeline(UNet2DConditionModel, base, "unet", weights=False)
        model = MultiViewUNet(replace(PRESETS["sdxl"], base=base, image_size=size), unet).train()
        if cfg.lora:
            model.add_lora(cfg.lora)
        parameters, schedule = model.freeze(attention_only=True, frozen_bf16=True), Schedule(model.cfg)
        float32_norms(model)
        if cfg.checkpointing:
            model.unet.enable_gradient_checkpointing()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        adam = 8 * sum(p.numel() for p in parameters)  # two float32 averages of each gradient
        for name, step in ((n, s) for n, s in steps.items() if n.startswith(kind)):
            with PeakMemory(model.parameters()) as memory:
                step()
            model.zero_grad()
            flop = flops_of(step)  # by itself: the counter keeps tensors alive
            model.zero_grad()
            owners = {"weights": weights, "Adam": 0 if "collect" in name else adam, "rest": memory.peak}
            row = {"px": size, "step": name, **{k: v / 1e9 for k, v in owners.items()}}
            row |= {"total GB": sum(owners.values()) / 1e9, "TFLOP": flop / 1e12}
            rows.append(row | {"seconds": flop / (0.4 * 312e12)})
    return rows


# --- the script ---


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of rows with equal keys."""

    def cell(v: Any) -> str:
        several = isinstance(v, (list, tuple))
        return " / ".join(map(cell, v)) if several else f"{v:.3g}" if isinstance(v, float) else f"{v}"

    lines = [[*rows[0]], ["---"] * len(rows[0]), *(map(cell, r.values()) for r in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(cfg: Config) -> dict:
    """Measure or count; each table goes to the screen and, with the plot, to the folder."""
    check_at_least(cfg, 1, "repeats", "sizes")
    check_at_least(cfg, 2, "groups")
    check_at_least(cfg, 0, "lora")
    if cfg.out:
        check_output("out", cfg.out)
    device = get_device(cfg.device)
    if cfg.count:
        name = f"lora{cfg.lora}" if cfg.lora else "attention"
        tables = {name: [row for size in cfg.sizes for row in count(cfg, size)]}
    else:
        model = load(cfg.model).cfg
        if not (model.position and model.cross_view):  # SDXL has no position tables
            raise InputError(f"--model {cfg.model}: expected a small one whose views see each other.")
        if cfg.scaling:
            tables = {"scaling": scaling(cfg, device)}
        else:
            tables = {"speed": measure(cfg, device), "bf16": precision(cfg, device)}
    for name, rows in tables.items():
        if cfg.out:
            save_json(Path(cfg.out) / f"{name}.json", provenance(cfg) | {"computed": cfg.count, "rows": rows})
            write_atomic(Path(cfg.out) / f"{name}.md", lambda p, rows=rows: p.write_text(table(rows)))
            if name == "scaling":
                plot(Path(cfg.out) / "scaling.png", rows)
        print(f"\n{table(rows)}")
    return tables


if __name__ == "__main__":
    cli(main, Config, __doc__)
