"""The multi-view denoiser: a diffusers UNet whose self-attention looks across views and at the reference.

Sec. 3.2.1. One forward carries the V noised views of every object and, as further rows, their references
noised to the same t. All layers treat rows as a batch, except self-attention, which `MultiViewAttention`
replaces:

    O_views = softmax(Q_views [K_views, K_ref]^T / sqrt(d)) [V_views, V_ref]   views see all and the reference
    O_ref   = softmax(Q_ref K_ref^T / sqrt(d)) V_ref                           the reference sees itself

The paper (after Zero123++) runs the UNet on the reference first, and appends its keys and values to the
views' layers. The reference never looks at the views, so the single forward gives the same numbers and stores
no keys; and candidates of one reference share its row. A pre-trained UNet keeps its state dict: new are only
a view embedding and, for small networks, position tables. So the same class holds a toy that learns from
nothing and SDXL (Sec. 6.1), which starts out as the stock model.

Letters: B objects, V views, n references (n = B, or fewer, each shared by B / n neighbours), N tokens of one
image, C channels of a layer, c h w latent sizes.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import rearrange, repeat
from torch import Tensor, nn

from common import InputError, explained, load_json, load_weights, located, pretrained, save_json
from common import save_tensors, typed
from render import CAMERAS, VIEWS

NUM_VIEWS = len(VIEWS)


@dataclass(frozen=True)
class ModelConfig:
    """All that one must know to use saved weights: the network, the latent, the noise it was trained for."""

    base: str = ""  # hub id or folder of an SDXL pipeline with unet/ and vae/; empty: our own small network
    image_size: int = 64  # pixels of the square views
    patch: int = 8  # pixels by latent pixel: (3, S, S) unshuffled to (3 p^2, S/p, S/p), or the VAE's factor

    # the small network; SDXL's own config says these for SDXL
    channels: int = 160  # width of the UNet, which has one resolution, the latent's
    head_dim: int = 32  # channels of one attention head
    position: bool = True  # learned position embedding in attention (False for SDXL, which knows places)

    cross_view: bool = True  # False: a view sees itself and the reference only (the Zero123-style baseline)
    prediction: Literal["x0", "epsilon", "v"] = "x0"  # what the network predicts
    schedule_shift: float = 4.0  # s in ab / (ab + s^2 (1 - ab)): moves the noise schedule towards noise
    ref_scale: float = 100.0  # factor on the reference latent before it is noised: it shows before the views

    def __post_init__(self) -> None:
        for name in ("image_size", "patch", "channels", "head_dim", "schedule_shift", "ref_scale"):
            if not 0 < (value := getattr(self, name)) <= 10**4:
                raise InputError(f"{name} {value}: expected a finite number above 0, at most 10000.")
        if self.image_size % self.patch:
            raise InputError(f"image_size {self.image_size}: expected a multiple of patch, {self.patch}.")
        if self.channels % 16 or self.channels % self.head_dim:  # 16 groups are normalised together
            raise InputError(f"channels {self.channels}: not a multiple of 16 and head_dim, {self.head_dim}.")
        if self.prediction not in (known := ("x0", "epsilon", "v")):
            raise InputError(f"prediction {self.prediction}: expected one of {', '.join(known)}.")
        if self.is_sdxl and self.position:
            raise InputError("position True: expected False for SDXL, whose layers differ in size.")

    @property
    def is_sdxl(self) -> bool:
        """Built around a pre-trained SDXL, with its VAE and its conditioning."""
        return bool(self.base)

    @property
    def latent_channels(self) -> int:
        return 4 if self.is_sdxl else 3 * self.patch**2

    @property
    def latent_size(self) -> int:
        return self.image_size // self.patch


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# FORK: another size is another line here, and a word in train_sft.Config.
PRESETS = {
    "toy": ModelConfig(),
    "small": ModelConfig(image_size=128, channels=384, head_dim=64),
    # SDXL's own prediction and schedule. Zero123++ shows the reference latent without its scaling factor:
    # about 5 times larger. (At the literal ref_scale 1, noise hides the reference at large t.)
    "sdxl": ModelConfig(
        base=SDXL, image_size=512, position=False, prediction="epsilon", schedule_shift=1.0, ref_scale=5.0
    ),
}


def unmirrored(latents: Tensor, patch: int) -> Tensor:  # (B, V, 3 p^2, h, w) -> the same; its own inverse
    """Mirror the views whose columns run against a world axis: back and right.

    Back then shows a point where front shows it, in the same order of pixels. Attention has one linear map of
    patches for all views: it cannot keep a patch for the front and reverse it for the back."""
    against = [v for v, axes in enumerate(CAMERAS[: latents.shape[1]]) if axes[0].sum() < 0]
    images = F.pixel_shuffle(latents, patch)
    images[:, against] = images[:, against].flip(-1)
    return F.pixel_unshuffle(images, patch)


def position_table(size: int, channels: int) -> Tensor:  # (V + 1, size^2, channels)
    """What the position embedding starts from: the two world coordinates that a token's ray fixes.

    They are X and Y in the front view, Z and Y in a side view, X and Z in the top view; depth is unknown and
    left out. Two tokens that may see the same 3-D point share a coordinate, hence similar embeddings, and
    attention finds the pair early in training. The reference counts as a front view."""
    centre = (torch.arange(size) + 0.5) / size * 2 - 1
    up, right = torch.meshgrid(-centre, centre, indexing="ij")  # rows run downwards
    axes = CAMERAS[[*range(NUM_VIEWS), 0]]  # (V + 1, 3, 3): image right, image up, towards the camera
    axes[:, 0] = axes[:, 0].abs()  # after `unmirrored`
    world = torch.stack([right, up], -1).flatten(0, 1) @ axes[:, :2]  # (V + 1, size^2, 3)
    known = axes[:, :2].abs().sum(1)[:, None, :]  # (V + 1, 1, 3)
    angles = world[..., None] * torch.pi / 2 * 2 ** torch.arange(4)  # four octaves
    features = torch.cat([angles.sin(), angles.cos()], -1) * known[..., None]  # (V + 1, size^2, 3, 8)
    features = features.flatten(2)  # 16 of the 24 are not zero, with mean square 1/2
    return 2 * features @ torch.randn(features.shape[-1], channels) / 8**0.5


class MultiViewAttention(nn.Module):
    """Self-attention over the views of an object and its reference: takes the place of one diffusers `attn1`.

    It adopts the four projections of the layer it replaces under the same names: state dicts stay."""

    def __init__(self, stock: Any, cross_view: bool, size: int = 0):
        """size: the layer has size x size tokens and a position table; 0: no table."""
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = stock.to_q, stock.to_k, stock.to_v, stock.to_out
        self.heads, self.cross_view = stock.heads, cross_view
        # Attention looks views up by place: "the same place in the back view". A network from nothing learns
        # this far sooner when queries and keys carry their place. What to look up differs by view: each kind
        # of row has its own table.
        self.position = nn.Parameter(position_table(size, stock.to_q.in_features)) if size else None
        if size:  # equal projections make tokens of the same place attract each other from the start
            self.to_k.load_state_dict(self.to_q.state_dict())

    def forward(
        self,
        x: Tensor,  # (B V + n, N, C)
        layout: tuple[Tensor, int, int],  # each row's label, V, n: V views of each object, then n references
        encoder_hidden_states: None = None,  # diffusers passes these two, always None
        attention_mask: None = None,
    ) -> Tensor:  # (B V + n, N, C)
        """The layout is an argument, no attribute: gradient checkpointing calls this again in the backward,
        when a forward with other rows may have come between."""
        labels, V, n = layout
        placed = x if self.position is None else x + self.position[labels]
        q, k, v = (
            rearrange(project(z), "rows N (H d) -> rows H N d", H=self.heads)
            for project, z in ((self.to_q, placed), (self.to_k, placed), (self.to_v, x))
        )
        # One projection served all rows; what is left to say is who attends to whom.
        V = V if self.cross_view else 1  # 1: each view by itself
        (q, q_ref), (k, k_ref), (v, v_ref) = (z.split([len(x) - n, n]) for z in (q, k, v))
        q, k, v = (rearrange(z, "(B V) H N d -> B H (V N) d", V=V) for z in (q, k, v))
        if n:  # N more keys, the reference's
            k, v = (
                torch.cat([own, repeat(z, "n ... -> (n g) ...", g=len(own) // n)], dim=-2)
                for own, z in ((k, k_ref), (v, v_ref))
            )
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "B H (V N) d -> (B V) N (H d)", V=V)
        if n:
            out_ref = F.scaled_dot_product_attention(q_ref, k_ref, v_ref)
            out = torch.cat([out, rearrange(out_ref, "n H N d -> n N (H d)")])
        for module in self.to_out:  # a linear layer and a dropout
            out = module(out)
        return out


class PromptAttention(AttnProcessor2_0):
    """SDXL's stock attention to the prompt. diffusers hands it the layout too; it has no use for that."""

    def __call__(self, *args: Any, layout: tuple[Tensor, int, int] | None = None, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs)


class LoRALinear(nn.Linear):
    """W x + U D x with W frozen and rank(U D) = r: for GPUs too small for Adam's state of every weight."""

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)
        if rank > (full := min(linear.weight.shape)):
            raise InputError(f"--lora {rank}: expected a rank of at most {full}, which can say any change.")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # old names: the state dict only grows
        # `merged` adds U D, about 1e-4, to this float32 copy: a `weight` in bfloat16 would round it away.
        self.exact = linear.weight.detach().cpu()
        new = {"device": linear.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, **new) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **new))  # zero: starts as W x

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)

    def merged(self) -> Tensor:
        """One weight that does the same, in float32, on the CPU."""
        return self.exact.float() + (self.up @ self.down).detach().cpu()


# FORK: another backbone needs four things.
#   1. Self-attention layers that are told the layout. `MultiViewUNet.__init__` replaces every `attn1`, and
#      diffusers hands those `cross_attention_kwargs`.
#   2. A label for each row: `class_embedding`, which a diffusers UNet adds to its embedding of t.
#   3. A map between images and latents (`encode`, `decode`, `latent_channels`; where those are no unshuffled
#      pixels, no `unmirrored` in `forward`), and what else the network takes (`conditions`).
#   4. What it predicts, at which noise: `prediction`, `schedule_shift`, and the betas in sample.Schedule.


def small_unet(cfg: ModelConfig) -> UNet2DConditionModel:
    """A diffusers UNet of the same class as SDXL's, with one resolution and no attention to a text prompt."""
    unet = UNet2DConditionModel(
        sample_size=cfg.latent_size,
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        block_out_channels=(cfg.channels,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=cfg.channels // cfg.head_dim,  # diffusers' name for the number of heads
        cross_attention_dim=8,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    module: Any
    for module in unet.modules():
        if hasattr(module, "attn2"):
            module.attn2 = module.norm2 = None
    # A linear output. The usual SiLU before it cuts off negative values, so a number of either sign would
    # take two channels; and toy's 160 channels are fewer than the numbers in a patch (192) as it is.
    unet.conv_norm_out = None
    return unet


def from_pipeline(kind: Any, base: str, part: str, weights: bool = True) -> Any:
    """A part of a diffusers pipeline: with all its published weights, or by its configuration alone."""
    remedy = f"expected a hub id such as {SDXL}, or a local folder with unet/ and vae/ in it."
    with explained(f"--base {base}: cannot load its {part}, {remedy}"):
        if not weights:
            return kind.from_config(kind.load_config(base, subfolder=part))
        # (low_cpu_mem_usage asks for one more package, and only spares main memory while loading)
        return pretrained(kind, base, subfolder=part, low_cpu_mem_usage=False)


class MultiViewUNet(nn.Module):
    """s_theta(X_t^(1:M), Y_t, t) of Sec. 3.2.1, and the map between images and latents."""

    def __init__(self, cfg: ModelConfig, unet: UNet2DConditionModel | None = None):
        """A small network from nothing, or around `unet`, the stock one of cfg.base (see `from_base`)."""
        super().__init__()
        self.cfg = cfg
        self.unet = unet or small_unet(cfg)
        size = cfg.latent_size if cfg.position else 0
        module: Any
        for module in list(self.unet.modules()):
            if hasattr(module, "attn1"):
                module.attn1 = MultiViewAttention(module.attn1, cfg.cross_view, size)
                if module.attn2 is not None:
                    module.attn2.set_processor(PromptAttention())
        # An embedding, added to that of t, tells which row is which view or the reference. It starts at zero:
        # a pre-trained UNet starts out as itself.
        width: Any = self.unet.time_embedding.linear_2.out_features
        self.unet.class_embedding = nn.Embedding(NUM_VIEWS + 1, width)
        nn.init.zeros_(self.unet.class_embedding.weight)

    # --- what is trained ---

    def attention_layers(self) -> list[MultiViewAttention]:
        """All self-attention layers, in the order of the network."""
        return [m for m in self.unet.modules() if isinstance(m, MultiViewAttention)]

    def attention_parameters(self) -> list[nn.Parameter]:
        """What the paper fine-tunes: the self-attention layers (App. B)."""
        return [p for layer in self.attention_layers() for p in layer.parameters()]

    def add_lora(self, rank: int) -> None:
        """Give every attention projection a change of this rank; `freeze` then trains nothing else."""
        for layer in self.attention_layers():
            for name in ("to_q", "to_k", "to_v"):
                setattr(layer, name, LoRALinear(getattr(layer, name), rank))
            layer.to_out[0] = LoRALinear(layer.to_out[0], rank)

    def freeze(
        self, attention_only: bool = False, frozen_bf16: bool = False, view_embedding: bool = False
    ) -> list[nn.Parameter]:
        """Say what is trained, and return it: all, the attention layers only, or LoRA after `add_lora`.

        frozen_bf16: store frozen weights in bfloat16, 2 bytes each. Trained ones stay float32: a step of 1e-5
        of a weight is lost in bfloat16's three digits. view_embedding: train that embedding, too. A fresh
        SDXL needs it: while it is zero, nothing tells one view from another."""
        chosen = [p for n, p in self.named_parameters() if n.endswith((".down", ".up"))]
        if not chosen:
            chosen = self.attention_parameters() if attention_only else list(self.parameters())
        embedding: Any = self.unet.class_embedding
        if view_embedding and all(p is not embedding.weight for p in chosen):
            chosen.append(embedding.weight)
        trained = {id(p) for p in chosen}
        for p in self.parameters():
            p.requires_grad_(id(p) in trained)
            p.data = p.data.to(torch.bfloat16 if frozen_bf16 and id(p) not in trained else torch.float32)
        return chosen

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: all that a resume needs besides the model it started from."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    # --- the network ---

    def forward(
        self,
        x_t: Tensor,  # (B, V, c, h, w) noised views
        t: Tensor,  # (B,) integer timesteps, shared by an object's views and its reference
        ref_t: Tensor | None,  # (n, c, h, w) references noised to the same t, or None for none at all
    ) -> Tensor:  # (B, V, c, h, w) prediction of x0, epsilon or v, in float32
        """Predict an object's views jointly. No reference, no row: a blank one would still be seen."""
        (B, V), n = x_t.shape[:2], 0 if ref_t is None else len(ref_t)
        if not self.cfg.is_sdxl:  # a VAE's latent, turned over, is not the latent of a mirrored view
            x_t = unmirrored(x_t, self.cfg.patch)
        rows, times = x_t.flatten(0, 1), t.repeat_interleave(V)
        if ref_t is not None:
            rows, times = torch.cat([rows, ref_t]), torch.cat([times, t[:: B // n]])
        labels = torch.tensor([*range(V)] * B + [NUM_VIEWS] * n, device=rows.device)
        output = self.unet(
            rows,
            times,
            class_labels=labels,
            cross_attention_kwargs={"layout": (labels, V, n)},  # reaches every MultiViewAttention
            **self.conditions(rows),
        ).sample
        output = output[: B * V].unflatten(0, (B, V)).float()
        return output if self.cfg.is_sdxl else unmirrored(output, self.cfg.patch)

    def conditions(self, rows: Tensor) -> dict[str, Any]:
        """SDXL's conditioning without a text: zero embeddings, as in its own pipeline, and the pixels.

        Attention to zero values is zero whatever the weights: one zero token equals an empty prompt's 77."""
        if not self.cfg.is_sdxl:
            return {"encoder_hidden_states": None}
        config: Any = self.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        size = self.cfg.image_size  # original size, crop corner, target size
        time_ids = rows.new_tensor([size, size, 0, 0, size, size]).expand(len(rows), 6)
        return {
            "encoder_hidden_states": rows.new_zeros(len(rows), 1, config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": rows.new_zeros(len(rows), pooled), "time_ids": time_ids},
        }

    # --- images and latents ---

    @cached_property  # which is no submodule: not saved, not trained, and moved by `with_vae` alone
    def vae(self) -> AutoencoderKL:
        """SDXL's autoencoder, frozen, in float32: in half precision it overflows."""
        return from_pipeline(AutoencoderKL, self.cfg.base, "vae").requires_grad_(False)

    @torch.no_grad()
    def with_vae(self, function: Any, z: Tensor) -> Tensor:
        """function(vae, z), image by image and in float32. The VAE stays on the GPU for this call only."""
        vae: Any = self.vae
        vae.to(z.device)
        with torch.autocast(z.device.type, enabled=False):
            out = torch.cat([function(vae, part) for part in z.flatten(0, -4).float().split(1)])
        vae.to("cpu")
        return out.unflatten(0, z.shape[:-3])

    def encode(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [0, 1] -> latents (..., c, h, w): in [-1, 1], or SDXL's of unit size."""
        (height, width), size = images.shape[-2:], self.cfg.image_size
        if (height, width) != (size, size):
            raise InputError(f"image of {width}x{height} pixels, expected {size}x{size}. Resize it.")
        if not self.cfg.is_sdxl:
            return F.pixel_unshuffle(images * 2 - 1, self.cfg.patch)
        # The scaling factor comes in here, goes out in `decode`, and is nowhere else.
        mean = self.with_vae(lambda vae, x: vae.encode(x).latent_dist.mean, images * 2 - 1)
        return mean * self.vae.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., c, h, w) -> images (..., 3, H, W) in [0, 1]."""
        if self.cfg.is_sdxl:
            scale = self.vae.config["scaling_factor"]
            images = self.with_vae(lambda vae, z: vae.decode(z / scale).sample, latents)
        else:
            images = F.pixel_shuffle(latents.float(), self.cfg.patch)
        return (images / 2 + 0.5).clamp(0, 1)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, LoRA merged, weights in another dtype if asked.

        Of SDXL the UNet is written; its configuration and the VAE are read from cfg.base again."""
        tensors = {k: v for k, v in self.state_dict().items() if not k.endswith((".down", ".up"))}
        tensors |= {f"{n}.weight": m.merged() for n, m in self.named_modules() if isinstance(m, LoRALinear)}
        tensors = {k: v.to(dtype or v.dtype) for k, v in tensors.items()}
        save_tensors(Path(folder) / "model.safetensors", tensors)
        save_json(Path(folder) / "config.json", asdict(self.cfg))


def from_base(cfg: ModelConfig) -> MultiViewUNet:
    """The pre-trained SDXL of cfg.base with our attention: stage 1 starts from it."""
    return MultiViewUNet(cfg, from_pipeline(UNet2DConditionModel, cfg.base, "unet")).eval()


def load(folder: str | Path, device: torch.device | str = "cpu", half: bool = False) -> MultiViewUNet:
    """Read a model that `MultiViewUNet.save` wrote. Wrong or broken files raise InputError.

    half: of SDXL, weights in bfloat16, half the memory: to draw with, not to train."""
    folder = located(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if missing := [p.name for p in (config, weights) if not p.is_file()]:
        raise InputError(f"{folder}: no {missing[0]}, expected a model's folder. Make one: train_sft.py")
    cfg = typed(ModelConfig, load_json(config), str(config))
    with explained(f"{config}: makes no model, expected one that this project wrote."):
        with torch.device("meta" if cfg.is_sdxl else "cpu"):  # meta: no memory, the file's weights move in
            unet = from_pipeline(UNet2DConditionModel, cfg.base, "unet", weights=False) if cfg.base else None
            model = MultiViewUNet(cfg, unet)
    load_weights(model, weights, assign=cfg.is_sdxl)
    model = model.bfloat16() if half and cfg.is_sdxl else model.float()
    return model.to(device).eval()
