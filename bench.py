"""Does it fit, and how long will it take? Memory and arithmetic of a step at the paper's scale, counted without a GPU.

The real step runs on tensors without data (PyTorch's FakeTensorMode): every allocation is followed to its peak, every
matrix product and convolution is counted. What a GPU adds is not in it: about 1 GB of context and libraries, the
allocator's rounding and gaps, and the VAE, which is there while it encodes or decodes and otherwise not.

    time = floating-point operations / (--utilisation x --tflops)         an estimate; memory is the count

Run:
    python bench.py                                        # the table of results/memory, a few minutes on a CPU
    python bench.py --sizes 512 --lora 16                  # another line of it

Letters: B objects, P pairs, G candidates, V views. One object is V + 1 = 6 rows of the UNet.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import cli, provenance, save_json
from model import NUM_VIEWS, PRESETS, MultiViewUNet, from_pipeline
from sample import Schedule, ddpm_step, log_ratio, noised_reference
from train_d3po import policy_mean
from train_sft import simple_loss


@dataclass(frozen=True)
class Config:
    """What to count."""

    base: str = "tests/sdxl"  # hub id or folder with unet/config.json; no weights are read
    sizes: tuple[int, ...] = (256, 512)  # pixels
    lora: int = 0  # rank; 0: train the attention layers themselves
    checkpointing: bool = True  # gradient checkpointing, as in runs/paper.sh
    tflops: float = 312  # what the GPU can do in bfloat16 at best (A100: 312, H100: 989, RTX 4090: 165)
    utilisation: float = 0.4  # the share of it that such a network reaches
    out: str = ""  # JSON file to write; empty: none


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside the block that are alive, and the most they ever were."""

    def __init__(self, before: Iterable[Tensor]) -> None:  # what is there already and is not counted
        super().__init__()
        self.now = self.peak = 0
        self.alive = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # views share one
                key, size = storage._cdata, storage.nbytes()
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
    """The three kinds of step, with the project's own functions on latents of the right shape."""
    cfg, schedule = model.cfg, Schedule(model.cfg)
    t = torch.ones(1, dtype=torch.long)

    def latents(rows: int) -> Tensor:
        return torch.randn(rows, NUM_VIEWS, cfg.latent_channels, cfg.latent_size, cfg.latent_size)

    def simple() -> list[Tensor]:
        x, noise = latents(1), latents(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = simple_loss(model, schedule, x, x[:, 0], t, noise, noise[:, 0]).mean()
        return list(torch.autograd.grad(loss, parameters))

    def d3po() -> list[Tensor]:
        x, action, mean_pre, two = latents(2), latents(2), latents(2), t.expand(2)
        batch = {"x_t": x, "y": x[:, 0], "ref_noise": action[:, 0], "t": two * 500, "s": two * 480}
        mean, var = policy_mean(model, schedule, batch, half=True)
        w, l = log_ratio(action, mean, mean_pre, var).chunk(2)  # noqa: E741
        # metrics want numbers, and these tensors have none: the loss alone
        loss = -F.logsigmoid(0.01 * (w - l)).mean()
        return list(torch.autograd.grad(loss, parameters))

    @torch.no_grad()
    def collect() -> None:
        x, five = latents(5), t.expand(5)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(x, five, noised_reference(schedule, cfg, x[:, 0], five, x[:, 1]))
        ddpm_step(schedule, prediction, x, five * 500, five * 480)

    return {
        "collect: one call for 5 candidates": collect,
        "SFT step: 1 object": simple,
        "D3PO step: 1 pair and 1 object": lambda: (d3po(), simple()),
    }


def count(cfg: Config, size: int) -> list[dict[str, Any]]:
    """Peak memory by owner in GB (10^9 bytes) and TFLOP of each kind of step."""
    rows = []
    architecture = replace(PRESETS["sdxl"], base=cfg.base, image_size=size)
    stock: Any = from_pipeline(UNet2DConditionModel.load_config, cfg.base, subfolder="unet")
    with FakeTensorMode():
        unet: Any = UNet2DConditionModel.from_config(stock)
        model = MultiViewUNet(architecture, unet).train()
        parameters = model.freeze(lora=cfg.lora, half=True)
        float32_norms(model)
        if cfg.checkpointing:
            model.unet.enable_gradient_checkpointing()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        adam = 8 * sum(p.numel() for p in parameters)  # two float32 averages of each gradient
        for name, step in steps_of(model, parameters).items():
            with PeakMemory(model.parameters()) as memory:
                step()
            with FlopCounterMode(display=False) as flops:  # by itself: it keeps tensors alive
                step()
            tflop = flops.get_total_flops() / 1e12
            gb = {"weights": weights, "adam": 0 if "collect" in name else adam, "rest": memory.peak}
            gb = {k: v / 1e9 for k, v in gb.items()}
            seconds = tflop / (cfg.tflops * cfg.utilisation)
            rows.append(
                {
                    "size": size,
                    "step": name,
                    **gb,
                    "total": sum(gb.values()),
                    "tflop": tflop,
                    "seconds": seconds,
                }
            )
    return rows


def main(cfg: Config) -> dict:
    """Count, print a Markdown table, write it."""
    rows = [row for size in cfg.sizes for row in count(cfg, size)]
    print("| px | step | weights | Adam | gradients and activations | total GB | TFLOP | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        gb = " | ".join(f"{r[k]:.1f}" for k in ("weights", "adam", "rest", "total", "tflop"))
        print(f"| {r['size']} | {r['step']} | {gb} | {r['seconds']:.2f} |")
    result = {**provenance(cfg), "computed": True, "rows": rows}
    if cfg.out:
        save_json(cfg.out, result)
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
