"""The contrastive 3D-consistency scorer: how well does each view belong to the reference? (paper Sec. 5)

    score_m = f(e(Y), e(X_m))        e: an encoder                f: linear, or bilinear (see `Scorer`)
    reward  = sum_{m=1..4} score_m   the paper's "contrastive score", the feedback of MV-D3PO-C

The paper's e is the CLS token of DINOv2. Ours keeps what stands on each epipolar line (`Strips`): of the two,
trained from nothing in minutes, only this one comes to see shapes (LOG.md, 2026-11-30).

Images in, one number for each view out: near 1 for a view that looks like the reference's own object, near
0 for a wrong one. View 0 shows the reference itself, so the reward leaves it out.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.utils import logging

from common import InputError, explained, load_json, load_weights, located, pretrained, save_json
from common import save_tensors, typed
from render import CAMERAS, VIEWS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation that published weights expect
Colour = tuple[float, float, float]
Head = Literal["bilinear", "concat", "epipolar"]


@dataclass(frozen=True)
class EncoderConfig:
    """The fields of Dinov2Config that a scorer's file may set. Others could name code to fetch."""

    image_size: int = 64  # of the table of position embeddings
    patch_size: int = 8
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    mlp_ratio: int = 4
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-6
    layerscale_value: float = 1.0
    initializer_range: float = 0.02
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if not 1 <= getattr(self, name) <= 10**4:
                raise InputError(f"encoder {name} {getattr(self, name)}: expected 1 to 10000.")
        if min(self.mlp_ratio, self.layer_norm_eps, self.initializer_range) <= 0:
            raise InputError(f"encoder {self}: expected mlp_ratio, eps and range above 0.")
        if self.hidden_size % self.num_attention_heads:  # transformers would go on
            raise InputError(f"hidden_size {self.hidden_size}: expected a multiple of the heads.")


@dataclass(frozen=True)
class ScorerConfig:
    """What `config.json` holds: all that is needed to build the network again without its origin."""

    head: Head  # epipolar has an encoder of its own, which asks for image_size alone
    image_size: int = 64  # side of the square that the encoder sees, a multiple of its patch
    resize: bool = False  # True: any image is brought to image_size; False: another size is an error
    mean: Colour = (1.0, 1.0, 1.0)  # subtracted from each colour channel: here, white becomes 0
    std: Colour = (0.3, 0.3, 0.3)  # then divided by
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        size, patch = self.image_size, self.encoder.patch_size
        if self.head != "epipolar" and (size < patch or size % patch):
            raise InputError(f"scorer image_size {size}: expected a multiple of the patch, {patch}.")
        if min(self.std) <= 0:
            raise InputError(f"scorer std {self.std}: expected more than 0.")


# Do a view's rows (up to down), its columns (left to right) run against the front's? The back's columns do.
REVERSED = (CAMERAS[:, [1, 0]] * CAMERAS[0, [1, 0]]).sum(-1) < 0  # (V, 2)


class Strips(nn.Module):
    """e of `epipolar`: what stands on each row of pixels, and on each column.

    Orthographic cameras along the axes have epipolar lines that need no search. What one side shows at a
    height stands at this height in every other, the same row of pixels. A column of the front is one of the
    top and, in reverse, of the back (`REVERSED`). A CLS token would have to learn where things are; here the
    largest value along the line is kept."""

    def __init__(self, width: int = 32, dim: int = 16) -> None:
        super().__init__()

        def along() -> nn.Module:
            return nn.Sequential(nn.Conv1d(width, width, 3, 1, 1), nn.GELU(), nn.Conv1d(width, dim, 1))

        near = (nn.Conv2d(3, width, 3, 2, 1), nn.GELU(), nn.Conv2d(width, width, 3, 1, 1), nn.GELU())
        self.near, self.rows, self.columns = nn.Sequential(*near), along(), along()
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, 2, S / 2, dim): rows, then columns
        x = self.near(images)
        return self.norm(torch.stack([self.rows(x.amax(-1)).mT, self.columns(x.amax(-2)).mT], dim=1))


class Scorer(nn.Module):
    """f(e_Y, e_X), both trained.

    The paper's f is "a linear layer" on the two embeddings. On their concatenation it is additive,

        f(Y, X) = w.e_Y + u.e_X + b   =>   f(Y1, X1) + f(Y2, X2) = f(Y1, X2) + f(Y2, X1)   for all images,

    so exchanging the views of two objects never changes the total: `concat` can say "X looks real", never
    "X belongs to Y". The least that can is linear in the outer product e_Y (x) e_X, the bilinear form e_Y^T
    W e_X, which changes that total by (e_Y1 - e_Y2)^T W (e_X1 - e_X2). `bilinear` adds it to the terms
    above; with W = 0 it is `concat`.

    The paper's f does not see which view m is, so right and left exchanged score the same. `epipolar` does,
    for which lines must agree depends on it. Rows and columns have a form A_m each:

        f_m(Y, X) = b_m + sum over both of  mean over lines l of  e_Y,l^T A_m e_X,l

    FORK: a row of w, u, b and a W for each m would let `bilinear` see m."""

    mean: Tensor
    std: Tensor
    reverse: Tensor

    def __init__(self, cfg: ScorerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        # f starts at 1/2, the best constant for targets 0 and 1: a random head would have to be unlearned.
        if cfg.head == "epipolar":
            self.encoder = Strips()
            (dim,) = self.encoder.norm.normalized_shape
            self.A = nn.Parameter(torch.zeros(len(VIEWS), 2, dim, dim))
            self.b = nn.Parameter(torch.full((len(VIEWS),), 0.5))
        else:
            self.encoder = Dinov2Model(Dinov2Config(**asdict(cfg.encoder)))
            dim = cfg.encoder.hidden_size
            self.linear = nn.Linear(2 * dim, 1)
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, 0.5)
            self.W = nn.Parameter(torch.zeros(dim, dim)) if cfg.head == "bilinear" else None
        # Constants, not weights.
        self.register_buffer("reverse", REVERSED[..., None, None], persistent=False)
        self.register_buffer("mean", torch.tensor(cfg.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.std).view(3, 1, 1), persistent=False)

    def embed(self, images: Tensor) -> Tensor:
        """e: (N, 3, H, W) in [0, 1] -> (N, d), the CLS token after the last LayerNorm; or `Strips`."""
        size = self.cfg.image_size
        if images.shape[-2:] != (size, size):
            if not self.cfg.resize:  # trained at one size, it would return meaningless numbers at another
                h, w = images.shape[-2:]
                raise InputError(f"scorer: images of {h} x {w} px, expected {size} x {size}, as in training.")
            # DINOv2's stock image processor would crop the edges of a centred object
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        e = self.encoder((images - self.mean) / self.std)
        return e if isinstance(e, Tensor) else e.pooler_output

    def head(self, e_ref: Tensor, e_views: Tensor, m: Tensor) -> Tensor:
        """f: e_Y (B, d) and e_X (B, V, d) -> (B, V). m (V,) says which of VIEWS each is: `epipolar` asks."""
        if self.cfg.head == "epipolar":  # e_Y (B, 2, L, d), e_X (B, V, 2, L, d)
            e_views = torch.where(self.reverse[m], e_views.flip(3), e_views)
            f = torch.einsum("b a l d, v a d e, b v a l e -> b v", e_ref, self.A[m], e_views)
            return self.b[m] + f / e_ref.shape[2]
        e_ref = repeat(e_ref, "B d -> B V d", V=e_views.shape[1])
        f = self.linear(torch.cat([e_ref, e_views], dim=-1)).squeeze(-1)  # w.e_Y + u.e_X + b
        if self.W is not None:
            f = f + ((e_ref @ self.W) * e_views).sum(-1)  # + e_Y^T W e_X
        return f

    def forward(self, ref: Tensor, views: Tensor) -> Tensor:
        """References Y (B, 3, H, W) and views X_m (B, V, 3, H, W), in [0, 1] -> a score a view (B, V)."""
        both = torch.cat([ref[:, None], views], dim=1)  # (B, 1+V, 3, H, W): one pass of the encoder for all
        e = self.embed(rearrange(both, "B R C H W -> (B R) C H W"))
        e = rearrange(e, "(B R) ... -> B R ...", B=len(ref))
        return self.head(e[:, 0], e[:, 1:], torch.arange(views.shape[1], device=e.device))

    @torch.no_grad()
    def score(self, ref: Tensor, views: Tensor) -> Tensor:
        """`forward` without gradient, on the scorer's device. (There is no dropout to turn off.)"""
        scores = self(ref.to(self.mean.device), views.to(self.mean.device))
        if not scores.isfinite().all():
            raise InputError("the scorer's scores are not finite, expected numbers. Its weights are broken.")
        return scores

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_json(Path(folder) / "config.json", asdict(self.cfg))
        save_tensors(Path(folder) / "model.safetensors", self.state_dict())

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu") -> "Scorer":
        """Read what `save` wrote, for evaluation."""
        folder = located(folder)
        config = folder / "config.json"
        if not config.is_file():
            raise InputError(f"{folder}: no config.json, expected a scorer's. Make one: train_scorer.py")
        cfg = typed(ScorerConfig, load_json(config), str(config))
        with explained(f"{config}: makes no scorer, expected one of train_scorer.py."):
            scorer = Scorer(cfg)
        load_weights(scorer, folder / "model.safetensors")
        return scorer.to(device).eval()


def small_scorer(
    head: Head, image_size: int, patch_size: int, hidden_size: int, num_layers: int, num_heads: int
) -> Scorer:
    """A scorer from scratch: `epipolar`, which asks for image_size alone, or a small DINOv2 architecture.

    The latter has minutes to learn, so the start matters more than the size. DINOv2's own start is made for
    widths near 1000. At width 96 its weights (deviation .02) shrink what passes through a layer to a fifth,
    and CLS hardly depends on the image; a deviation of 1 / sqrt(width) passes it on. And white must be 0, or
    the background is most of every token."""
    sizes = (image_size, patch_size, hidden_size, num_layers, num_heads)
    encoder = EncoderConfig(*sizes, initializer_range=max(hidden_size, 1) ** -0.5)
    return Scorer(ScorerConfig(head, image_size, encoder=encoder))


def pretrained_scorer(backbone: str, head: Head, image_size: int = 224) -> Scorer:
    """A published DINOv2 (hub id or folder) and a new head; image_size is rounded down to whole patches."""
    if head == "epipolar":
        raise InputError(f"--backbone {backbone}: --head epipolar has its own, expected bilinear or concat.")
    expected = "expected a hub id such as facebook/dinov2-base, or a local folder with a whole DINOv2."
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with explained(f"--backbone {backbone}: cannot load, {expected}"):
        stock = pretrained(Dinov2Model, backbone)
    values = {f.name: getattr(stock.config, f.name) for f in fields(EncoderConfig)}
    encoder = typed(EncoderConfig, values, f"--backbone {backbone}")
    size = max(image_size // encoder.patch_size, 1) * encoder.patch_size
    scorer = Scorer(ScorerConfig(head, size, True, *IMAGENET, encoder=encoder))
    scorer.encoder.load_state_dict(stock.float().state_dict())
    return scorer


def contrastive_reward(scorer: Scorer, ref: Tensor, views: Tensor) -> Tensor:  # (B,)
    """The paper's contrastive score: the sum over the other views; view 0 would reward a copy of ref."""
    return scorer.score(ref, views)[:, 1:].sum(dim=1)
