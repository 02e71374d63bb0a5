"""The multi-view denoiser: a diffusers UNet whose self-attention looks across views and at the reference (Sec. 3.2.1).

One forward carries V + 1 rows per object: the V noised views and, as a last row, the reference noised to the same t.
All layers treat rows as a batch, except self-attention, which is replaced by `MultiViewAttention` below:

    O_views = softmax(Q_views [K_views, K_ref]^T / sqrt(d)) [V_views, V_ref]     views see all views and the reference
    O_ref   = softmax(Q_ref K_ref^T / sqrt(d)) V_ref                             the reference sees only itself

The paper (after Zero123++) runs the UNet on the reference first and appends its keys and values to the views' layers.
Because the reference never looks at the views, the single forward gives the same numbers, and needs no store of keys.
A pre-trained UNet keeps its state dict: new are only a view embedding and, for small networks, position tables. So the
same class holds a toy that learns from nothing and SDXL (Sec. 6.1), which starts out as the stock model.

Letters: B objects, V views, R = V + 1 rows, N tokens of one image, C channels of a layer, c h w latent sizes.

Run:
    python model.py                      # prints the presets' sizes
"""

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import rearrange, repeat
from safetensors import SafetensorError
from torch import Tensor, nn

from common import InputError, load_json, load_weights, save_json, save_tensors
from data import CAMERAS, VIEWS

NUM_VIEWS = len(VIEWS)


@dataclass(frozen=True)
class ModelConfig:
    """All that must be known to use saved weights: the network, the latent, and the diffusion it was trained for."""

    base: str = ""  # hub id or folder of an SDXL pipeline, for its unet/ and vae/; empty: our own small network
    image_size: int = 64  # pixels of the square views
    patch: int = 8  # pixels by latent pixel: pixel-unshuffle (3, S, S) -> (3 p^2, S/p, S/p), or what the VAE shrinks by

    # a small network; SDXL's own config says these for SDXL
    channels: tuple[int, ...] = (160,)  # UNet width by resolution, finest first
    layers: int = 1  # residual blocks by resolution
    depth: int = 1  # transformer blocks after each residual block of an attention level
    attention_levels: tuple[int, ...] = (0,)  # resolutions with attention: 0 is the latent's own, 1 half of it, ...
    head_dim: int = 32  # channels of one attention head
    position: bool = True  # learned position embedding in attention (False for SDXL, which found its own way)

    cross_view: bool = True  # False: each view sees itself and the reference only (the Zero123-style baseline)
    prediction: str = "x0"  # what the network predicts: x0 or epsilon
    schedule_shift: float = 4.0  # s in ab / (ab + s^2 (1 - ab)): moves the noise schedule towards noise
    ref_scale: float = 20.0  # factor on the reference latent before it is noised, so that it is seen before the views

    @property
    def latent_channels(self) -> int:
        return 4 if self.base else 3 * self.patch**2

    @property
    def latent_size(self) -> int:
        return self.image_size // self.patch


# FORK: another size is another line here.
PRESETS = {
    "toy": ModelConfig(),
    "small": ModelConfig(image_size=128, channels=(384,), head_dim=64),
    # SDXL's own prediction and schedule. Zero123++ shows the reference latent without its scaling factor, about 5 times
    # larger (deviation from the literal ref_scale 1, at which it is lost in the noise at large t).
    "sdxl": ModelConfig(
        base="stabilityai/stable-diffusion-xl-base-1.0",
        image_size=512,
        patch=8,
        position=False,
        prediction="epsilon",
        schedule_shift=1.0,
        ref_scale=5.0,
    ),
}


def position_table(size: int, channels: int) -> Tensor:  # (V + 1, size^2, channels)
    """What the position embedding starts from: the two world coordinates that a token's ray fixes.

    A pixel of the front view fixes X and Y of what it shows, a side view Z and Y, the top view X and Z; the third
    coordinate is the unknown depth, and is left out. So tokens of two views that can show the same point share
    features, in front and back at mirrored places. The reference is in the frame of the front view.
    """
    centre = (torch.arange(size) + 0.5) / size * 2 - 1
    up, right = torch.meshgrid(-centre, centre, indexing="ij")  # rows run downwards
    axes = CAMERAS[[*range(NUM_VIEWS), 0]]  # (V + 1, 3, 3): image right, image up, towards the camera
    world = torch.stack([right, up], -1).flatten(0, 1) @ axes[:, :2]  # (V + 1, size^2, 3)
    known = axes[:, :2].abs().sum(1)[:, None, :]  # (V + 1, 1, 3)
    angles = world[..., None] * torch.pi / 2 * 2 ** torch.arange(4)  # four octaves
    features = torch.cat([angles.sin(), angles.cos()], -1) * known[..., None]  # (V + 1, size^2, 3, 8)
    features = features.flatten(2)  # 16 of the 24 are not zero, with mean square 1/2
    return 2 * features @ torch.randn(features.shape[-1], channels) / 8**0.5


class MultiViewAttention(nn.Module):
    """Self-attention over the views of an object and its reference: takes the place of one diffusers `attn1`.

    It adopts the four projections of the layer it replaces under the same names, so state dicts do not change.
    """

    def __init__(self, stock: Any, layout: SimpleNamespace, size: int = 0):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = stock.to_q, stock.to_k, stock.to_v, stock.to_out
        self.heads = stock.heads
        self.layout = layout  # shared with MultiViewUNet.forward, which says how the rows of this call are made up
        # Views are looked up by place: "the same row of the reference", "my mirror image in the back view". A network
        # trained from nothing learns this far sooner when queries and keys carry their place; each kind of row
        # has its own table, because what to look up differs by view. (size x size tokens; 0: no table)
        self.position = nn.Parameter(position_table(size, stock.to_q.in_features)) if size else None
        if size:  # equal projections make tokens of the same place attract each other from the start
            self.to_k.load_state_dict(self.to_q.state_dict())

    def forward(self, x: Tensor, encoder_hidden_states: None = None, attention_mask: None = None) -> Tensor:
        """x ((B R), N, C) -> the same shape. The two other arguments are diffusers' and must be None."""
        views, has_ref, cross_view = self.layout.views, self.layout.has_ref, self.layout.cross_view
        placed = x
        if self.position is not None:
            tables = self.position[[*range(views)] + [NUM_VIEWS] * has_ref]  # (R, N, C)
            placed = x + repeat(tables, "R N C -> (B R) N C", B=len(x) // len(tables))
        q, k, v = (
            rearrange(project(z), "(B R) N (H d) -> B R H N d", R=views + has_ref, H=self.heads)
            for project, z in ((self.to_q, placed), (self.to_k, placed), (self.to_v, x))
        )
        # One projection served all rows; what is left to say is who attends to whom.
        if cross_view:  # V N queries against (V + 1) N keys: all views, and the reference when there is one
            keys, values = (rearrange(z, "B R H N d -> B H (R N) d") for z in (k, v))
            queries = rearrange(q[:, :views], "B V H N d -> B H (V N) d")
            out = F.scaled_dot_product_attention(queries, keys, values)
            out = rearrange(out, "B H (V N) d -> B V N (H d)", V=views)
        else:  # each view by itself: N queries against 2 N keys, its own and the reference's
            keys, values = k[:, :views], v[:, :views]
            if has_ref:
                keys, values = (
                    torch.cat([own, repeat(z[:, views], "B H N d -> B V H N d", V=views)], dim=-2)
                    for own, z in ((keys, k), (values, v))
                )
            queries = rearrange(q[:, :views], "B V H N d -> (B V) H N d")
            keys, values = (rearrange(z, "B V H N d -> (B V) H N d") for z in (keys, values))
            out = F.scaled_dot_product_attention(queries, keys, values)
            out = rearrange(out, "(B V) H N d -> B V N (H d)", V=views)
        if has_ref:
            out_ref = F.scaled_dot_product_attention(q[:, views], k[:, views], v[:, views])
            out = torch.cat([out, rearrange(out_ref, "B H N d -> B 1 N (H d)")], dim=1)
        out = rearrange(out, "B R N C -> (B R) N C")
        for module in self.to_out:  # a linear layer and a dropout
            out = module(out)
        return out


class LoRALinear(nn.Linear):
    """W x + U D x with W frozen and rank(U D) = r: for GPUs too small for Adam's state of every attention weight."""

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # under their old names: the state dict only grows
        # W as it is now, on the CPU and in no state dict: the weight may go to bfloat16, in which most of U D is lost
        self.exact = linear.weight.detach().cpu()
        new = {"device": linear.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, **new) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **new))  # zero: theta = pre at the start

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)

    def merged(self) -> Tensor:
        """One weight that does the same, in float32."""
        return self.exact.float() + (self.up @ self.down).detach().cpu()


def small_unet(cfg: ModelConfig) -> UNet2DConditionModel:
    """A diffusers UNet of the same class as SDXL's, of any size, without attention to a text prompt.

    FORK: another backbone is another function like this or `from_base`; `install_attention` finds its attn1 layers.
    """
    with_attention = [level in cfg.attention_levels for level in range(len(cfg.channels))]
    unet = UNet2DConditionModel(
        sample_size=cfg.latent_size,
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        block_out_channels=cfg.channels,
        layers_per_block=cfg.layers,
        mid_block_type=None,
        transformer_layers_per_block=cfg.depth,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in with_attention[::-1]),
        attention_head_dim=tuple(c // cfg.head_dim for c in cfg.channels),  # type: ignore  # diffusers: head count
        cross_attention_dim=8,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    module: Any
    for module in unet.modules():
        if hasattr(module, "attn2"):
            module.attn2 = module.norm2 = None
    return unet


def from_pipeline(kind: Any, base: str, **options: Any) -> Any:
    """diffusers' `kind.from_pretrained` or `kind.load_config` on a part of a pipeline; InputError if that fails."""
    try:
        return kind(base, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # absent, no network, another format
        raise InputError(
            f"--base {base}: cannot load its {options['subfolder']} ({str(error).splitlines()[0]}); expected a hub id "
            "such as stabilityai/stable-diffusion-xl-base-1.0, or a local folder with unet/ and vae/ in it."
        ) from None


class MultiViewUNet(nn.Module):
    """s_theta(X_t^(1:M), Y_t, t) of Sec. 3.2.1, and the map between images and latents."""

    def __init__(self, cfg: ModelConfig, unet: UNet2DConditionModel | None = None):
        """A small network from nothing, or around `unet`, the stock one of cfg.base (`from_base` brings it)."""
        super().__init__()
        if cfg.image_size % cfg.patch:
            raise InputError(f"image_size {cfg.image_size}: expected a multiple of {cfg.patch}.")
        self.cfg = cfg
        self.unet = unet or small_unet(cfg)
        self.layout = SimpleNamespace(views=NUM_VIEWS, has_ref=1, cross_view=cfg.cross_view)
        self.install_attention()
        # Which row is which view (or the reference) is told by an embedding added to that of t. It starts at zero:
        # a pre-trained UNet starts out as itself.
        width: Any = self.unet.time_embedding.linear_2.out_features
        self.unet.class_embedding = nn.Embedding(NUM_VIEWS + 1, width)
        nn.init.zeros_(self.unet.class_embedding.weight)

    def install_attention(self) -> None:
        """Put `MultiViewAttention` in the place of every self-attention layer of the UNet."""
        for name, module in list(self.unet.named_modules()):
            if hasattr(module, "attn1"):
                # "down_blocks.1.attentions..." counts resolutions from the finest, "up_blocks.0..." from the coarsest
                kind, index = name.split(".")[:2]
                coarsest = len(self.cfg.channels) - 1
                level = (
                    int(index) if kind == "down_blocks" else coarsest - int(index) if kind == "up_blocks" else coarsest
                )
                size = self.cfg.latent_size // 2**level if self.cfg.position else 0
                module.attn1 = MultiViewAttention(module.attn1, self.layout, size)

    def attention_parameters(self) -> list[nn.Parameter]:
        """What fine-tuning trains: the attention layers only (App. B)."""
        blocks = [m for m in self.unet.modules() if isinstance(m, MultiViewAttention)]
        return [p for block in blocks for p in block.parameters()]

    def freeze(
        self, attention_only: bool = True, lora: int = 0, half: bool = False, view_embedding: bool = False
    ) -> list[nn.Parameter]:
        """Say what is trained, and return it: all, the attention layers, or a rank-`lora` change of their projections.

        half: what is frozen goes to bfloat16, 2 bytes a weight. What is trained stays float32: a step of 1e-5 of a
        weight is lost in bfloat16's three digits.
        view_embedding: that too, which a fresh SDXL needs: while it is zero, nothing tells one view from another.
        """
        if lora:
            for block in [m for m in self.unet.modules() if isinstance(m, MultiViewAttention)]:
                for owner, name in ((block, "to_q"), (block, "to_k"), (block, "to_v"), (block.to_out, "0")):
                    owner._modules[name] = LoRALinear(owner.get_submodule(name), lora)  # type: ignore
        chosen = [p for n, p in self.named_parameters() if n.endswith((".down", ".up"))]
        if not lora:
            chosen = self.attention_parameters() if attention_only else list(self.parameters())
        embedding: Any = self.unet.class_embedding
        if view_embedding and all(p is not embedding.weight for p in chosen):
            chosen.append(embedding.weight)
        trained = {id(p) for p in chosen}
        for p in self.parameters():
            p.requires_grad_(id(p) in trained)
            p.data = p.data.to(torch.bfloat16 if half and id(p) not in trained else torch.float32)
        return chosen

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: all that a resume needs besides the model it started from."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def forward(
        self,
        x_t: Tensor,  # (B, V, c, h, w) noised views
        t: Tensor,  # (B,) integer timesteps, shared by an object's views and its reference
        ref_t: Tensor | None,  # (B, c, h, w) reference noised to the same t, or None for no reference at all
    ) -> Tensor:  # (B, V, c, h, w) prediction of x0 or epsilon
        """Predict an object's views jointly. No reference means no row for it: a blank one would still be seen."""
        batch, views = x_t.shape[:2]
        rows, labels = x_t, torch.arange(views, device=x_t.device)
        if ref_t is not None:
            rows = torch.cat([x_t, ref_t[:, None]], dim=1)  # (B, R, c, h, w)
            labels = torch.cat([labels, labels.new_tensor([NUM_VIEWS])])
        self.layout.views, self.layout.has_ref = views, int(ref_t is not None)

        rows = rearrange(rows, "B R c h w -> (B R) c h w")
        output = self.unet(
            rows,
            repeat(t, "B -> (B R)", R=len(labels)),
            class_labels=repeat(labels, "R -> (B R)", B=batch),
            **self.empty_prompt(rows),
        ).sample
        return rearrange(output, "(B R) c h w -> B R c h w", B=batch)[:, :views].float()

    def empty_prompt(self, rows: Tensor) -> dict[str, Any]:
        """SDXL's conditioning without a text: zero embeddings, as its own pipeline has them, and the size in pixels.

        A value that is zero is zero whatever its weight in the softmax, so one token does for the 77 of a prompt.
        """
        if not self.cfg.base:
            return {"encoder_hidden_states": None}
        config: Any = self.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        size = self.cfg.image_size  # original size, crop corner, target size
        time_ids = rows.new_tensor([size, size, 0, 0, size, size]).expand(len(rows), 6)
        return {
            "encoder_hidden_states": rows.new_zeros(len(rows), 1, config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": rows.new_zeros(len(rows), pooled), "time_ids": time_ids},
        }

    @cached_property  # which is no submodule: not saved, not trained, and moved by `with_vae` alone
    def vae(self) -> AutoencoderKL:
        """SDXL's autoencoder, frozen, in float32: in half precision it overflows."""
        return from_pipeline(
            AutoencoderKL.from_pretrained, self.cfg.base, subfolder="vae", low_cpu_mem_usage=False
        ).requires_grad_(False)

    @torch.no_grad()
    def with_vae(self, function: Any, z: Tensor) -> Tensor:
        """function(vae, z) image by image, in float32; the VAE is on the GPU no longer than that."""
        vae: Any = self.vae
        vae.to(z.device)
        with torch.autocast(z.device.type, enabled=False):
            out = torch.cat([function(vae, part) for part in z.flatten(0, -4).float().split(1)])
        vae.to("cpu")
        return out.unflatten(0, z.shape[:-3])

    def encode(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [0, 1] -> latents (..., c, h, w): in [-1, 1] on toys, of unit size for SDXL."""
        if images.shape[-1] != self.cfg.image_size or images.shape[-2] != self.cfg.image_size:
            raise InputError(
                f"image of {images.shape[-1]}x{images.shape[-2]} pixels, expected {self.cfg.image_size}x"
                f"{self.cfg.image_size}, the size this model was trained for. Resize it or take another model."
            )
        if not self.cfg.base:
            return F.pixel_unshuffle(images * 2 - 1, self.cfg.patch)
        # the scaling factor comes in here, goes out in `decode`, and is nowhere else
        return self.with_vae(lambda vae, x: vae.encode(x).latent_dist.mean * vae.config.scaling_factor, images * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., c, h, w) -> images (..., 3, H, W) in [0, 1]."""
        if self.cfg.base:
            images = self.with_vae(lambda vae, z: vae.decode(z / vae.config.scaling_factor).sample, latents)
        else:
            images = F.pixel_shuffle(latents.float(), self.cfg.patch)
        return (images / 2 + 0.5).clamp(0, 1)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors, each whole or not at all; LoRA is merged. dtype: another to save in.

        Of SDXL the UNet is written; its configuration and the VAE are read from cfg.base again.
        """
        tensors = {k: v for k, v in self.state_dict().items() if not k.endswith((".down", ".up"))}
        tensors |= {f"{n}.weight": m.merged() for n, m in self.named_modules() if isinstance(m, LoRALinear)}
        save_tensors(Path(folder) / "model.safetensors", {k: v.to(dtype or v.dtype) for k, v in tensors.items()})
        save_json(Path(folder) / "config.json", asdict(self.cfg))


def from_base(cfg: ModelConfig) -> MultiViewUNet:
    """The pre-trained SDXL of cfg.base with our attention: stage 1 starts from it."""
    # (low_cpu_mem_usage asks for one more package, and only spares main memory while loading)
    unet = from_pipeline(UNet2DConditionModel.from_pretrained, cfg.base, subfolder="unet", low_cpu_mem_usage=False)
    return MultiViewUNet(cfg, unet).eval()


def load(folder: str | Path, device: torch.device | str = "cpu", half: bool = False) -> MultiViewUNet:
    """Read a model that `MultiViewUNet.save` wrote. Wrong or broken files raise InputError.

    half: of SDXL, weights in bfloat16, half the memory: to draw with, not to train.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json found, expected a model folder. Make one: python train_sft.py")
    values = load_json(folder / "config.json")
    known = {field.name for field in fields(ModelConfig)}
    if not isinstance(values, dict) or values.keys() - known:
        raise InputError(f"{folder}/config.json: expected entries of model.ModelConfig only, got {values}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        cfg = ModelConfig(**values)
        if cfg.base:  # no weights yet, and no memory for them: the file's own take their place
            with torch.device("meta"):
                stock: Any = from_pipeline(UNet2DConditionModel.load_config, cfg.base, subfolder="unet")
                unet: Any = UNet2DConditionModel.from_config(stock)
                model = MultiViewUNet(cfg, unet)
        else:
            model = MultiViewUNet(cfg)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise InputError(f"{folder}/config.json: makes no model ({error}); expected one this project wrote.") from None
    load_weights(model, folder / "model.safetensors", assign=bool(cfg.base))
    model = model.bfloat16() if half and cfg.base else model.float()
    return model.to(device).eval()


if __name__ == "__main__":
    for name, cfg in PRESETS.items():
        latent = f"{cfg.latent_channels} x {cfg.latent_size} x {cfg.latent_size}"
        if cfg.base:
            print(f"{name}: {cfg.base}, {cfg.image_size} px, latent {latent}")
            continue
        model = MultiViewUNet(cfg)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        attention = sum(p.numel() for p in model.attention_parameters()) / 1e6
        print(f"{name}: {count:.2f} M parameters, {attention:.2f} M in attention, {cfg.image_size} px, latent {latent}")
