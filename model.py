"""The multi-view denoiser: a diffusers UNet whose self-attention looks across views and at the reference (Sec. 3.2.1).

One forward carries V + 1 rows per object: the V noised views and, as a last row, the reference noised to the same t.
All layers treat rows as a batch, except self-attention, which is replaced by `MultiViewAttention` below:

    O_views = softmax(Q_views [K_views, K_ref]^T / sqrt(d)) [V_views, V_ref]     views see all views and the reference
    O_ref   = softmax(Q_ref K_ref^T / sqrt(d)) V_ref                             the reference sees only itself

The paper (after Zero123++) runs the UNet on the reference first and appends its keys and values to the views' layers.
Because the reference never looks at the views, the single forward gives the same numbers, and needs no store of keys.
A pre-trained UNet keeps its state dict: new are only a view embedding and, for small networks, position tables.

Letters: B objects, V views, R = V + 1 rows, N tokens of one image, C channels of a layer, c h w latent sizes.

Run:
    python model.py                      # prints the presets' sizes
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import rearrange, repeat
from torch import Tensor, nn

from common import InputError, load_json, load_weights, save_json, save_tensors
from data import CAMERAS, VIEWS

NUM_VIEWS = len(VIEWS)


@dataclass(frozen=True)
class ModelConfig:
    """All that must be known to use saved weights: the network, the latent, and the diffusion it was trained for."""

    image_size: int = 64  # pixels of the square views
    patch: int = 4  # pixel-unshuffle factor: image (3, S, S) -> latent (3 p^2, S/p, S/p)
    channels: tuple[int, ...] = (64, 128)  # UNet width by resolution, finest first
    layers: int = 1  # residual blocks by resolution
    depth: int = 2  # transformer blocks after each residual block of an attention level
    attention_levels: tuple[int, ...] = (1,)  # resolutions with attention: 0 is the latent's own, 1 half of it, ...
    mid_block: bool = False  # one more residual-attention-residual block at the coarsest resolution
    head_dim: int = 32  # channels of one attention head
    position: bool = True  # learned position embedding in attention (False for SDXL, which found its own way)
    cross_view: bool = True  # False: each view sees itself and the reference only (the Zero123-style baseline)

    prediction: str = "x0"  # what the network predicts: x0 or epsilon
    schedule_shift: float = 4.0  # s in ab / (ab + s^2 (1 - ab)): moves the noise schedule towards noise
    ref_scale: float = 20.0  # factor on the reference latent before it is noised, so that it is seen before the views

    @property
    def latent_channels(self) -> int:
        return 3 * self.patch**2

    @property
    def latent_size(self) -> int:
        return self.image_size // self.patch


# FORK: another size is another line here.
PRESETS = {
    "toy": ModelConfig(),
    "small": ModelConfig(image_size=128, channels=(128, 256, 384), attention_levels=(1, 2), head_dim=64),
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


class MultiViewUNet(nn.Module):
    """s_theta(X_t^(1:M), Y_t, t) of Sec. 3.2.1, and the map between images and latents."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        levels = range(len(cfg.channels))
        with_attention = [level in cfg.attention_levels for level in levels]
        self.unet = UNet2DConditionModel(
            sample_size=cfg.latent_size,
            in_channels=cfg.latent_channels,
            out_channels=cfg.latent_channels,
            block_out_channels=cfg.channels,
            layers_per_block=cfg.layers,
            mid_block_type="UNetMidBlock2DCrossAttn" if cfg.mid_block else None,
            transformer_layers_per_block=cfg.depth,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in with_attention[::-1]),
            attention_head_dim=tuple(c // cfg.head_dim for c in cfg.channels),  # type: ignore  # diffusers: head count
            cross_attention_dim=8,
            use_linear_projection=True,
            norm_num_groups=16,
            num_class_embeds=NUM_VIEWS + 1,
        )
        module: Any
        for module in self.unet.modules():
            if hasattr(module, "attn2"):  # attention to a text prompt: these models have none
                module.attn2 = module.norm2 = None
        self.layout = SimpleNamespace(views=NUM_VIEWS, has_ref=1, cross_view=cfg.cross_view)
        self.install_attention()
        # Which row is which view (or the reference) is told by an embedding added to that of t. It starts at zero:
        # a pre-trained UNet starts out as itself. (diffusers leaves it uninitialised when it loads a checkpoint.)
        view_embedding: Any = self.unet.class_embedding
        nn.init.zeros_(view_embedding.weight)

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

        output = self.unet(
            rearrange(rows, "B R c h w -> (B R) c h w"),
            repeat(t, "B -> (B R)", R=len(labels)),
            encoder_hidden_states=None,
            class_labels=repeat(labels, "R -> (B R)", B=batch),
        ).sample
        return rearrange(output, "(B R) c h w -> B R c h w", B=batch)[:, :views].float()

    def encode(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) in [0, 1] -> latents (..., c, h, w), here in [-1, 1]."""
        if images.shape[-1] != self.cfg.image_size or images.shape[-2] != self.cfg.image_size:
            raise InputError(
                f"image of {images.shape[-1]}x{images.shape[-2]} pixels, expected {self.cfg.image_size}x"
                f"{self.cfg.image_size}, the size this model was trained for. Resize it or take another model."
            )
        return F.pixel_unshuffle(images * 2 - 1, self.cfg.patch)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (..., c, h, w) -> images (..., 3, H, W) in [0, 1]."""
        return (F.pixel_shuffle(latents.float(), self.cfg.patch) / 2 + 0.5).clamp(0, 1)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors, each whole or not at all."""
        save_tensors(Path(folder) / "model.safetensors", {k: v.to(dtype) for k, v in self.state_dict().items()})
        save_json(Path(folder) / "config.json", asdict(self.cfg))


def load(folder: str | Path, device: torch.device | str = "cpu") -> MultiViewUNet:
    """Read a model that `MultiViewUNet.save` wrote. Wrong or broken files raise InputError."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json found, expected a model folder. Make one: python train_sft.py")
    values = load_json(folder / "config.json")
    known = {field.name for field in fields(ModelConfig)}
    if not isinstance(values, dict) or values.keys() - known:
        raise InputError(f"{folder}/config.json: expected entries of model.ModelConfig only, got {values}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        model = MultiViewUNet(ModelConfig(**values))
    except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise InputError(f"{folder}/config.json: makes no model ({error}); expected one this project wrote.") from None
    load_weights(model, folder / "model.safetensors")
    return model.to(device).eval()


if __name__ == "__main__":
    for name, cfg in PRESETS.items():
        model = MultiViewUNet(cfg)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        attention = sum(p.numel() for p in model.attention_parameters()) / 1e6
        latent = f"{cfg.latent_channels} x {cfg.latent_size} x {cfg.latent_size}"
        print(f"{name}: {count:.2f} M parameters, {attention:.2f} M in attention, {cfg.image_size} px, latent {latent}")
