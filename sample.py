"""Hand-written DDPM: schedule, posterior step, step log-prob, log-ratio, a sampler that keeps trajectories.

The denoising chain is the Markov decision process of Sec. 3.2.2. At step k the state is s_k = (x_t, t, c),
where c is the reference, noised to the same t; the action a_k is the next, less noisy x_s; and the policy is
the sampler's own Gaussian

    pi_theta(a_k | s_k) = N(a_k; mean_theta(x_t, t, c), var_t I)          joint over the V views.

DEVIATION: the paper's step is its Eq. (1) with the score frozen between two times,

    dX = [beta/2 X + beta s_theta] dt + sqrt(beta) dB,      var = (ab_s - ab_t) / ab_t

and we take the DDPM posterior (Ho et al. 2020, Eq. 7), as D3PO's code and every peer does. Its variance is
smaller by the factor (ab_t / ab_s) (1 - ab_s) / (1 - ab_t), because the clean image is taken to be known.

Letters: B rows (in `sample` references, whose candidates are rows b G + g), G candidates of each, V views,
K network calls, c h w latent sizes.
Shapes: x, mean, noise, action (B, V, c, h, w); reference y and its noise (B, c, h, w); var (B, 1, 1, 1, 1);
timestep t and the next, lower one s (B,), where -1 is clean.

Run:
    python sample.py --image photo.png --out views.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common import InputError, check_output, cli, hardware, key_seed, keyed_generator, located
from model import ModelConfig, MultiViewUNet, load
from pictures import read_image, write_png
from render import VIEWS


class Schedule:
    """q(x_t | x_0) = N(sqrt(ab_t) x_0, (1 - ab_t) I): Stable Diffusion's scaled-linear betas, shifted."""

    num_train = 1000  # timesteps

    def __init__(self, cfg: ModelConfig):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.num_train, dtype=torch.float64) ** 2
        alpha_bar = (1 - betas).cumprod(0)
        # Small images are recognisable at noise levels where large ones are not, and if the noised views give
        # the object away at nearly every t, nothing teaches the network to look at the reference. Dividing
        # the signal-to-noise ratio ab / (1 - ab) by s^2 moves all of it down: ab' = ab / (ab + s^2 (1 - ab)).
        shift = cfg.schedule_shift
        self.alpha_bar = alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))  # (num_train,) float64
        self.prediction = cfg.prediction

    def ab(self, t: Tensor) -> Tensor:
        """alpha_bar at t (B,), shaped (B, 1, 1, 1, 1) to meet (B, V, c, h, w); t = -1 means clean, ab = 1."""
        padded = torch.cat([self.alpha_bar, self.alpha_bar.new_ones(1)])  # index -1 is the last: 1
        return padded.to(t.device)[t].float().view(-1, 1, 1, 1, 1)

    def timesteps(self, num_steps: int) -> list[tuple[int, int]]:
        """K pairs (t, s) from noise to clean: "leading" spacing, offset 1; s = -1 (clean) at the last call.

        Stable Diffusion's own habit. The first t is below the last of training (901 of 999 if K = 10), where
        pure noise is close to right: sqrt(ab) is .03 for the small models, .12 for SDXL."""
        if not 2 <= num_steps <= 500:  # 1 would start pure noise at t = 1; above 500 the stride is 1
            raise InputError(f"--num_steps {num_steps}: expected 2 to 500.")
        stride = self.num_train // num_steps
        times = [1 + stride * k for k in reversed(range(num_steps))]
        return list(zip(times, times[1:] + [-1], strict=True))


def forward_noise(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) noise, for x0 (B, V, c, h, w) or (B, c, h, w) and t (B,)."""
    ab = schedule.ab(t).view(-1, *[1] * (x0.ndim - 1))
    return ab.sqrt() * x0 + (1 - ab).sqrt() * noise


def noised_reference(schedule: Schedule, cfg: ModelConfig, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Y_t: the reference noised at the views' t, scaled up first so that it is seen before they are.

        Y_t = [ sqrt(ab_t) r y + sqrt(1 - ab_t) noise ] / sqrt(ab_t r^2 + 1 - ab_t)         r = ref_scale

    The division only brings the network's input back to unit size (r = 1 needs none). The paper's literal
    reading is r = 1, where the reference is as invisible as the views when they are all noise; Zero123++
    leaves out the latent's scaling factor, which makes r about 5."""
    ab = schedule.ab(t)[:, 0]
    return forward_noise(schedule, cfg.ref_scale * y, t, noise) / (ab * cfg.ref_scale**2 + 1 - ab).sqrt()


def split_prediction(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Whatever the network predicts -> (x0, eps), tied by x_t = sqrt(ab) x0 + sqrt(1 - ab) eps."""
    ab = schedule.ab(t)
    if schedule.prediction == "x0":
        return prediction, (x_t - ab.sqrt() * prediction) / (1 - ab).sqrt()
    if schedule.prediction == "v":  # v = sqrt(ab) eps - sqrt(1 - ab) x0
        x0 = ab.sqrt() * x_t - (1 - ab).sqrt() * prediction
        return x0, (1 - ab).sqrt() * x_t + ab.sqrt() * prediction
    return (x_t - (1 - ab).sqrt() * prediction) / ab.sqrt(), prediction


def ddpm_step(
    schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:  # mean, var
    """The Gaussian of one denoising step: q(x_s | x_t, x_0) with the predicted x0 in place of x_0.

    Into the clean image (s = -1) the variance is 0: that step has no density, and nothing trains on it."""
    x0, eps = split_prediction(schedule, prediction, x_t, t)
    ab_t, ab_s = schedule.ab(t), schedule.ab(s)
    var = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
    # mean = sqrt(ab_s) x0 + sqrt(1 - ab_s - var) eps      (DDIM at eta = 1; the clamp is for rounding)
    # With eps = (x_t - sqrt(ab_t) x0) / sqrt(1 - ab_t) it is Ho et al.'s Eq. 7, in x0 and x_t.
    mean = ab_s.sqrt() * x0 + (1 - ab_s - var).clamp(min=0).sqrt() * eps
    return mean, var


def log_prob(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:  # (B,) nats
    """log N(x; mean, var I), SUMMED over V c h w, all dimensions of all views: the joint action's density.

    (D3PO's and DDPO's code take the mean over c h w, the same number divided by their count.)"""
    # log N = -1/2 [ |x - mean|^2 / var + D log(2 pi var) ]
    return -0.5 * ((x - mean) ** 2 / var + (2 * torch.pi * var).log()).flatten(1).sum(1)


def log_ratio(action: Tensor, mean_theta: Tensor, mean_pre: Tensor, var: Tensor) -> Tensor:  # (B,) nats
    """log pi_theta(a|s) - log pi_pre(a|s), summed over V c h w, as a factored difference of squares:

        [ |a - mean_pre|^2 - |a - mean_theta|^2 ] / (2 var)
            = < mean_theta - mean_pre, a - (mean_theta + mean_pre) / 2 > / var

    Subtracting two log-densities of size 10^5 would leave no digit of a difference of size 10^-3 in float32;
    here nothing large is ever formed, and equal means give exactly 0."""
    return ((mean_theta - mean_pre) * (action - (mean_theta + mean_pre) / 2) / var).flatten(1).sum(1)


def kl_divergence(mean_theta: Tensor, mean_pre: Tensor, var: Tensor) -> Tensor:  # (B,) nats
    """KL(pi_theta || pi_pre) of one step: |mean_theta - mean_pre|^2 / (2 var), summed over V c h w.

    It is what the log-ratio loses on the average action of pi_pre: log_ratio = lin - KL with
    lin = <mean_theta - mean_pre, a - mean_pre> / var, whose expectation under pi_pre is 0."""
    return ((mean_theta - mean_pre) ** 2 / (2 * var)).flatten(1).sum(1)


def policy_mean(
    model: MultiViewUNet,
    schedule: Schedule,
    x_t: Tensor,
    y: Tensor,  # the reference as shown (n, c, h, w): n = B, or fewer if B / n neighbours share it and t
    ref_noise: Tensor,  # of each y
    t: Tensor,
    s: Tensor,
    bf16: bool = False,  # run the network in bfloat16; the step itself stays float32
) -> tuple[Tensor, Tensor]:  # mean, var
    """The policy pi_theta(. | x_t, t, c) = N(mean, var I) of one call of the network."""
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
        ref_t = noised_reference(schedule, model.cfg, y, t[:: len(t) // len(y)], ref_noise)
        prediction = model(x_t, t, ref_t)
    return ddpm_step(schedule, prediction, x_t, t, s)


# --- drawing: every noise has a key of its own, so no sample depends on its batch ---


def draw(shape: tuple[int, ...], keys: list[tuple[int, ...]]) -> Tensor:
    """Standard normal (len(keys), *shape), each row from its own key; equal keys are drawn once."""
    noise = {key: torch.randn(shape, generator=keyed_generator(*key)) for key in set(keys)}
    return torch.stack([noise[key] for key in keys])


class Trajectory(NamedTuple):
    """What the chain did, in float32: half precision would move the log-ratio at equal weights from 0."""

    states: Tensor  # (B G, K + 1, V, c, h, w): x_T first, the clean latent last; action k is states[:, k + 1]
    y: Tensor  # (B, c, h, w) clean reference latent
    ref_noise: Tensor  # (B, c, h, w) epsilon_Y, one draw for the whole chain
    images: Tensor  # (B G, V, 3, H, W) in [0, 1]


@torch.no_grad()
def sample(
    model: MultiViewUNet,
    ref: Tensor,  # (B, 3, H, W) reference images in [0, 1]
    seeds: list[int],  # one a reference: x_T and epsilon_Y depend on it alone
    num_steps: int = 10,  # K
    G: int = 1,  # candidates of each reference
    own: Sequence[int] | None = None,  # calls at which each draws its own step noise (None: all); else 0's
    noise_scales: Sequence[float] = (),  # a_g of App. B: scale of candidate g's noise on the reference latent
    bf16: bool = False,  # run the network in bfloat16; states and steps stay float32
) -> Trajectory:
    """Run the chain for G candidates of each of B references; candidate g of reference b is row b G + g."""
    device, B, schedule = ref.device, len(ref), Schedule(model.cfg)
    own = range(num_steps) if own is None else own
    y = model.encode(ref)
    x = draw((len(VIEWS), *y.shape[1:]), [(seed, 0) for seed in seeds]).to(device)  # x_T
    ref_noise = draw(y.shape[1:], [(seed, 1) for seed in seeds]).to(device)  # epsilon_Y
    seen, noise = y, ref_noise
    if noise_scales:  # candidate g of an object sees its reference through a_g n_g
        x, seen, noise = (z.repeat_interleave(G, 0) for z in (x, y, ref_noise))
        scales = torch.tensor([*noise_scales] * B, device=device).view(-1, 1, 1, 1)
        keys = [(seed, 2, round(1000 * a)) for seed in seeds for a in noise_scales]
        seen = seen + scales * draw(y.shape[1:], keys).to(device)
    states = [x]
    for call, (t_int, s_int) in enumerate(schedule.timesteps(num_steps)):
        t, s = (torch.full((len(x),), z, device=device) for z in (t_int, s_int))
        mean, var = policy_mean(model, schedule, x, seen, noise, t, s, bf16)
        if call in own and len(x) < B * G:  # candidates part here: up to now one row was all of theirs
            mean, var = (z.repeat_interleave(G, 0) for z in (mean, var))
        keys = [(seed, 3, call, g * (call in own)) for seed in seeds for g in range(len(mean) // B)]
        x = mean + var.sqrt() * draw(mean.shape[1:], keys).to(device)
        states.append(x)
    states = torch.stack([z.repeat_interleave(B * G // len(z), 0) for z in states], 1)
    images = model.decode(states[:, -1])
    if not images.isfinite().all():  # PNGs of them would be black
        raise InputError("the model's images are not finite, expected numbers. Its weights are broken.")
    return Trajectory(states, y, ref_noise, images)


def sample_images(
    model: MultiViewUNet,
    ref: Tensor,  # (N, 3, H, W) in [0, 1]
    seed: int,  # object i is drawn with key (seed, i)
    num_steps: int = 10,
    batch_size: int = 8,
    label: str = "sample",
    bf16: bool = False,
) -> Tensor:  # (N, V, 3, H, W) in [0, 1], on the CPU, rounded to 8 bits as a PNG would be
    """`sample` over many references in batches, with a progress bar."""
    device = next(model.parameters()).device
    images = []
    for i in tqdm(range(0, len(ref), batch_size), desc=label, leave=False, disable=None):
        part = ref[i : i + batch_size].to(device)
        seeds = [key_seed(seed, i + j) for j in range(len(part))]
        images.append(sample(model, part, seeds, num_steps, bf16=bf16).images.cpu())
    return (torch.cat(images) * 255).round() / 255


@dataclass(frozen=True)
class Config:
    image: str  # any picture of any size; transparency becomes white, and it is padded to a square
    model: str = "checkpoints/objects"  # folder that train_sft.py or train_d3po.py wrote
    out: str = "views.png"  # strip of the five views; each view also goes to <out without suffix>/<view>.png
    seed: int = 0  # of x_T and all noises
    num_steps: int = 10  # network calls K: as many as it was fine-tuned with (runs/paper.sh: 50)
    bf16: Literal["auto", "on", "off"] = "auto"  # run the network in bfloat16; auto: where it is fast
    device: str = "auto"  # auto, cpu or cuda


def main(cfg: Config) -> dict:
    """Image -> five views. Returns the paths that were written."""
    read = (str(located(cfg.model)),)
    check_output("out", cfg.out, ".png", read)
    out, folder = Path(cfg.out), Path(cfg.out).with_suffix("")
    there = [path for path in (out, *(folder / f"{view}.png" for view in VIEWS)) if path.exists()]
    if Path(cfg.image).exists() and any(path.samefile(cfg.image) for path in there):  # by a hard link, too
        raise InputError(f"--out {cfg.out}: would overwrite --image {cfg.image}. Take another name.")
    if there and not out.exists():
        raise InputError(f"--out {cfg.out}: {there[0]} is there, and not of this command. Take another name.")
    check_output("out", folder, inputs=read)
    device, bf16 = hardware(cfg)
    model = load(cfg.model, device, half=bf16)
    ref = read_image(cfg.image, model.cfg.image_size)[None].float() / 255
    images = sample_images(model, ref, cfg.seed, cfg.num_steps, bf16=bf16)[0]  # (V, 3, H, W)
    write_png(out, torch.cat(list(images), dim=-1))  # first: it says that the folder's pictures are ours
    for view, image in zip(VIEWS, images, strict=True):
        write_png(folder / f"{view}.png", image)
    print(f"wrote {cfg.out} ({' | '.join(VIEWS)}) and {folder}/{{{','.join(VIEWS)}}}.png")
    return {"out": cfg.out, "folder": str(folder)}


if __name__ == "__main__":
    cli(main, Config, __doc__)
