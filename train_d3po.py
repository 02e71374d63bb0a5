"""Stage 3: MV-D3PO. Collect candidates, prefer by 3D-consistency feedback, fine-tune (paper Sec. 3.2.2, Eq. 2, App. B).

    L = -log sigmoid( beta [log pi_theta/pi_pre (a_w|s_w) - log pi_theta/pi_pre (a_l|s_l)] ) + lambda L_simple-MV

    pi(a|s) = N(a; mean(x_t, Y, t), var)     one DDPM step: the state s is x_t, the action a the x_s that it went to

For each reference Y the pre-trained model draws five candidates, which share all noises of the chain and see the
reference through more and more noise of their own (App. B). A feedback ranks the finished images; of every two the
better is the winner (w), the other the loser (l), each with the x_t of its own chain. At the last denoising step that
has a density (--first_call: at more of them) the policy is moved towards the winner's action and away from the
loser's. What keeps it near pi_pre is the number and size of the steps; L_simple-MV, on the ground truth of the same
objects, is no leash at weight 1: its gradient is thousands of times shorter. Why these defaults: results/ablations.md.

The stages, each reused when it is there already (out/ is the default of --out):

    out/scorer_*/            the contrastive scorer, made by train_scorer.py when --feedback contrastive asks for it
    out/candidates/          five trajectories an object, and pi_pre's means along them, whatever the feedback
    out/pairs_<feedback>_*/  who won and who lost
    out/before/              pi_pre's images of the validation objects
    out/d3po_<feedback>/     log.jsonl, config.json and model.safetensors, results.json, grid.png

Run:
    python train_d3po.py --feedback contrastive                             # 9 minutes on 2 quiet CPU cores
    python train_d3po.py --feedback matching                                # or hull: no training, no weights
    python train_d3po.py --beta_dpo 0                                       # L_simple-MV alone: the SFT row, out/sft

Expect (defaults, 1 seed):
    margin 0 -> 4.5 in 60 steps, accuracy .5 -> .7; log_ratio_w and log_ratio_l both fall, to -490 and -534;
    on 32 validation objects contrastive score +.52 [.45, .59], silhouette consistency +.0012 [.0002, .0028], GMSD of
    unseen views +.0017 [.0007, .0031] (worse); the intervals of PSNR and SSIM contain 0

Letters: P pairs, G candidates of a reference, K network calls of which J are trained, V views, c h w latent sizes.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import (
    InputError,
    claim,
    cli,
    digest,
    get_device,
    key_seed,
    keyed_generator,
    load_json,
    load_state,
    load_tensors,
    log_line,
    open_tensors,
    provenance,
    save_json,
    save_tensors,
    trim_log,
    use_bf16,
    write_atomic,
)
from data import load_split, relative_views
from evaluate import bootstrap_interval, closeness, grid, hull_iou, score_images
from matcher import loftr_model, matching_reward
from model import MultiViewUNet, load
from sample import Schedule, ddpm_step, log_ratio, noised_reference, sample, sample_images
from scorer import Scorer, contrastive_reward
from train_scorer import Config as ScorerTraining
from train_scorer import main as train_scorer
from train_sft import simple_loss, training_batch


@dataclass(frozen=True)
class Config:
    """Defaults are the toy run on a CPU; paper values are named in the comments."""

    feedback: str = "contrastive"  # contrastive, matching, hull; controls: random, noise_scale, oracle
    model: str = "checkpoints/toy"  # pi_pre: a folder that train_sft.py wrote
    negatives: str = "zero123"  # what the scorer learns to tell from truth: zero123, pretrained (C (pre)), or a folder
    zero123: str = "checkpoints/toy_independent"  # the independent-view model that zero123 means
    scorer: str = ""  # a trained scorer's folder; empty: train one
    matcher: str = "sift"  # sift or loftr, for --feedback matching
    matcher_weights: str = ""  # LoFTR weights (empty: from torch's hub cache, downloaded if absent)
    data: str = "toys"  # toys, or a folder of renders (see data.py)
    num_objects: int = 240  # preference objects, as in the paper
    eval_objects: int = 32  # validation objects
    out: str = "out"  # where everything goes
    name: str = ""  # folder of this run in out; empty: d3po_<feedback>, or sft. Runs share candidates, scorer and pairs

    num_steps: int = 10  # network calls K of the sampler (paper: 50)
    first_call: int = 8  # train calls first_call .. K - 2 (paper: the last 40); the very last has no density
    noise_scales: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.8)  # a of the candidates (App. B)
    common_noise: bool = True  # candidates share the step noises, too: only the reference's noise tells them apart
    pairs: Literal["best_worst", "all"] = "all"  # which candidates of one reference are compared
    condition: Literal["clean", "sampled"] = "clean"  # the reference that the loss sees: noiseless, or as sampled

    steps: int = 60  # optimizer steps (paper: 1800)
    batch_objects: int = 8  # preference objects a step, and as many ground-truth objects for L_simple-MV
    lr: float = 5e-5  # AdamW; falls to 0 in a straight line
    attention_only: bool = False  # train the attention layers only, as the paper does (App. B)
    lora: int = 0  # train a change of this rank of the attention projections only: less memory; 0: no
    beta_dpo: float = 0.1  # beta of Eq. 2 on the log-ratio SUMMED over V c h w; 0: no preferences, the SFT baseline
    lambda_simple: float = 1.0  # weight of L_simple-MV (paper: 1)
    step_weight: Literal["none", "root", "equal"] = "none"  # on the log-ratio of each trained step: see step_weights
    seed: int = 0  # of candidates, pairs, batches and noise

    save_every: int = 25  # save what a killed run goes on from
    log_every: int = 10  # log means of the last steps
    eval_every: int = 0  # log all metrics of the validation objects as val_*; 0: only before and after
    batch_size: int = 8  # objects at a time when sampling
    bf16: str = "auto"  # draw samples in bfloat16: auto (where it is fast), on or off. A small model's loss is float32
    checkpointing: bool = False  # keep few activations and compute the others again: half the speed, far less memory
    compile: bool = False  # torch.compile the UNet
    threads: int = 0  # torch threads; 0 leaves torch's choice (1 can be much faster on a busy machine)
    device: str = "auto"  # auto, cpu or cuda


# --- the loss ---


def d3po_loss(
    log_ratio_w: Tensor,  # (P,) log pi_theta/pi_pre of the winner's action, summed over V c h w
    log_ratio_l: Tensor,  # (P,) of the loser's
    beta: float,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 2, mean over pairs, each at one denoising step. No clip: the paper's equation has none (D3PO's code has).

    FORK: another loss on preferences is another function of these two.
    """
    # L = -log sigmoid( beta log_ratio_w - beta log_ratio_l )
    margin = beta * (log_ratio_w - log_ratio_l)
    loss = -F.logsigmoid(margin).mean()
    return loss, {
        "loss_d3po": loss.item(),  # log 2 = 0.693 at theta = pre
        "margin": margin.mean().item(),
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item(),
        "log_ratio_w": log_ratio_w.mean().item(),
        "log_ratio_l": log_ratio_l.mean().item(),
    }


def step_weights(schedule: Schedule, calls: list[tuple[int, int]], mode: str) -> Tensor:  # (J,)
    """Factors on the log-ratio of each trained step.

    The step's mean depends on the predicted x0 as m x0, so an error d in x0 costs m^2 d^2 / (2 var) nats. Over calls 4
    to 18 of a toy chain of 20 m^2 / var grows from .002 to 35, and the last of them has 97 % of the sum: unweighted,
    as printed in Eq. (2), the loss is nearly that of one step. "equal" divides by it, so that an error of one size
    costs the same at every step, "root" by its square root, which evens out the noise of the gradient instead.
    """
    if mode == "none":
        return torch.ones(len(calls))
    t, s = (torch.tensor(z) for z in zip(*calls, strict=True))
    ab_t, ab_s = schedule.ab(t), schedule.ab(s)
    var = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
    # mean = sqrt(ab_s) x0 + sqrt(1 - ab_s - var) eps, and eps has -sqrt(ab_t / (1 - ab_t)) x0 in it
    m = ab_s.sqrt() - (1 - ab_s - var).sqrt() * (ab_t / (1 - ab_t)).sqrt()
    worth = (m**2 / var).flatten()
    weights = worth ** (-1.0 if mode == "equal" else -0.5)
    return weights / weights.mean()


# --- candidates: one file an object, the same for every feedback ---


def settings(cfg: Config, *names: str) -> dict:
    """The named fields of the config: what a stage depends on."""
    return {name: getattr(cfg, name) for name in names}


def collect(
    model: MultiViewUNet,
    views: Tensor,  # (N, V, 3, S, S) uint8, preference objects
    cfg: Config,
    folder: Path,
    device: torch.device,
) -> None:
    """Draw G candidates of every object and keep the part of their chains that is trained on."""
    made_by = settings(cfg, "model", "data", "num_steps", "first_call", "noise_scales", "common_noise", "seed", "bf16")
    claim(folder, made_by | {"weights": digest(Path(cfg.model) / "model.safetensors")})
    todo = []
    for i in range(len(views)):
        file = folder / f"{i:04d}.safetensors"
        if not file.is_file():
            todo.append(i)
        elif not open_tensors(file).get_tensor("ref").equal(views[i, 0]):
            raise InputError(f"{file}: made for another object, expected number {i} of {cfg.data}. Delete {folder}.")
    for i in tqdm(todo, desc="collect candidates", disable=None):
        ref = views[i, :1].to(device).float().expand(len(cfg.noise_scales), -1, -1, -1) / 255
        candidates = list(range(len(cfg.noise_scales)))
        seeds = [key_seed(cfg.seed, 8, i)] * len(candidates)  # 8: other noise than in evaluation
        scales, bf16 = list(cfg.noise_scales), use_bf16(cfg.bf16, device)
        chain = sample(model, ref, seeds, cfg.num_steps, candidates, scales, bf16, cfg.common_noise)
        tensors = {
            "states": chain.states[:, cfg.first_call : cfg.num_steps],  # (G, J + 1, V, c, h, w): x_t, and the actions
            "y": chain.y[:1],
            "candidate_noise": chain.candidate_noise,
            "ref_noise": chain.ref_noise[:1],
            "images": (chain.images * 255).round().to(torch.uint8),
            "ref": views[i, 0],
        }
        save_tensors(folder / f"{i:04d}.safetensors", tensors)


# --- feedback: one number for each candidate, larger is more consistent ---


FEEDBACKS = ("contrastive", "matching", "hull", "random", "noise_scale", "oracle")


def feedback_fn(cfg: Config, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function (ref (G,3,S,S), images (G,V,3,S,S), truth (V,3,S,S)) -> (G,) that ranks candidates. Only the oracle
    looks at the truth.

    FORK: your own feedback is one more entry here, and its name in FEEDBACKS. After a change to it delete its
    out/pairs_<name>_*, or the old preferences are reused.
    """
    scorer = Scorer.load(cfg.scorer, device) if cfg.feedback == "contrastive" else None
    coin = keyed_generator(cfg.seed, 7, 0, 0)

    def contrastive(ref: Tensor, images: Tensor, truth: Tensor) -> Tensor:
        assert scorer is not None
        return contrastive_reward(scorer, ref, images)

    feedbacks = {
        "contrastive": contrastive,  # Sec. 5
        "matching": lambda ref, images, truth: matching_reward(
            ref, images, cfg.matcher, cfg.matcher_weights
        ),  # Sec. 6.1
        "hull": lambda ref, images, truth: hull_iou(images),  # ours: do the silhouettes fit one object?
        "random": lambda ref, images, truth: torch.rand(len(images), generator=coin),
        "noise_scale": lambda ref, images, truth: -torch.tensor(cfg.noise_scales),
        "oracle": lambda ref, images, truth: closeness(images, truth),
    }
    return feedbacks[cfg.feedback]


def prefer(cfg: Config, views: Tensor, candidates: Path, device: torch.device) -> list[dict]:
    """Rank the candidates of each object: a list of {object, order (best first), rewards, psnr}, without objects whose
    candidates all tie. The PSNR (four unseen views) is for the record: how good is the feedback?
    """
    reward_of = feedback_fn(cfg, device)
    ranked = []
    for i in tqdm(range(len(views)), desc=f"{cfg.feedback} feedback", disable=None):
        images = load_tensors(candidates / f"{i:04d}.safetensors")["images"].to(device).float() / 255
        truth = views[i].to(device).float() / 255
        rewards = reward_of(truth[:1].expand(len(images), -1, -1, -1), images, truth).cpu()
        quality = closeness(images, truth).tolist()
        if rewards.max() > rewards.min():
            entry = {"object": i, "order": rewards.argsort(descending=True).tolist()}
            entry |= {"rewards": rewards.tolist(), "psnr": [round(q, 3) for q in quality]}
            ranked.append(entry)
    if not ranked:
        raise InputError(
            f"--feedback {cfg.feedback}: all candidates of all {len(views)} objects tie, expected a preference. "
            "Use another feedback, or larger images."
        )
    return ranked


def pairs_of(entry: dict, mode: str) -> list[tuple[int, int]]:
    """(winner, loser) of one object: the best and the worst candidate, or every two that do not tie."""
    order, rewards = entry["order"], entry["rewards"]
    if mode == "best_worst":
        return [(order[0], order[-1])]
    return [(win, lose) for k, win in enumerate(order) for lose in order[k + 1 :] if rewards[win] > rewards[lose]]


Row = tuple[int, int, int]  # object, candidate, and j, which of the trained steps


def lay_out(batch: list[tuple[dict, int]], mode: str) -> tuple[list[Row], list[int], list[int]]:
    """Rows for a batch of (entry of `prefer`, j), and where in them each pair's winner and loser stand.

    A candidate has one row, however many pairs it is in: ten pairs of five candidates take five forwards, not twenty.
    """
    rows, winners, losers = [], [], []
    for entry, j in batch:
        pairs, at = pairs_of(entry, mode), {}
        for candidate in sorted({c for pair in pairs for c in pair}):
            at[candidate] = len(rows)
            rows.append((entry["object"], candidate, j))
        winners += [at[win] for win, _ in pairs]
        losers += [at[lose] for _, lose in pairs]
    return rows, winners, losers


# --- chains: what the loss reads, from disk ---


class Chains:
    """Candidates' states and pi_pre's means, read by memory map: only what a batch needs is ever loaded."""

    def __init__(self, candidates: Path, cfg: Config, schedule: Schedule):
        self.candidates, self.cfg = candidates, cfg
        # rows of a training step: pairs are made of two candidates of an object, or of all
        self.rows = cfg.batch_objects * (2 if cfg.pairs == "best_worst" else len(cfg.noise_scales))
        self.means = candidates / f"means_{cfg.condition}_{self.rows}"  # by batch: see store_means
        # J (t, s), without the last call: it has no density
        self.calls = schedule.timesteps(cfg.num_steps)[cfg.first_call : cfg.num_steps - 1]
        self.files: dict[int, Any] = {}

    def batch(self, rows: list[Row], device: torch.device) -> dict[str, Tensor]:
        """State, action, condition and times of each row."""
        parts: dict[str, list[Tensor]] = {"x_t": [], "action": [], "y": [], "ref_noise": []}
        for i, g, j in rows:
            if i not in self.files:
                self.files[i] = open_tensors(self.candidates / f"{i:04d}.safetensors")
            file = self.files[i]
            parts["x_t"].append(file.get_slice("states")[g, j])
            parts["action"].append(file.get_slice("states")[g, j + 1])
            # The condition of the loss. Under the one a candidate was sampled with, the noise scale alone can decide
            # the winner, and then the expected gradient at theta = pre is zero (E_pi[grad log pi] = 0, for winner and
            # loser each). Under the clean one, the policy that is used moves towards what won.
            noise = file.get_slice("candidate_noise")[g] if self.cfg.condition == "sampled" else 0
            parts["y"].append(file.get_tensor("y")[0] + noise)
            parts["ref_noise"].append(file.get_tensor("ref_noise")[0])
        batch = {k: torch.stack(v).to(device) for k, v in parts.items()}
        t, s = (torch.tensor([self.calls[j][z] for _, _, j in rows], device=device) for z in (0, 1))
        return batch | {"t": t, "s": s}

    def mean_pre(self, rows: list[Row], device: torch.device) -> Tensor:  # (rows, V, c, h, w)
        """The stored means of the frozen policy."""
        files = [open_tensors(self.means / f"{i:04d}_{g}.safetensors") for i, g, _ in rows]
        return torch.stack([f.get_slice("means")[j] for f, (_, _, j) in zip(files, rows, strict=True)]).to(device)


def policy_mean(
    model: MultiViewUNet,
    schedule: Schedule,
    batch: dict[str, Tensor],
    half: bool = False,  # run the network in bfloat16
) -> tuple[Tensor, Tensor]:
    """mean_theta (rows, V, c, h, w) and var of the rows of `Chains.batch`."""
    ref_t = noised_reference(schedule, model.cfg, batch["y"], batch["t"], batch["ref_noise"])
    with torch.autocast(ref_t.device.type, torch.bfloat16, enabled=half):
        prediction = model(batch["x_t"], batch["t"], ref_t)
    return ddpm_step(schedule, prediction, batch["x_t"], batch["t"], batch["s"])


@torch.no_grad()
def store_means(
    model: MultiViewUNet,
    schedule: Schedule,
    chains: Chains,
    needed: set[tuple[int, int]],  # object, candidate
    device: torch.device,
    half: bool = False,
) -> None:
    """mean_pre of every trained step of the needed chains: once, so that no second network is held while training.

    In batches of the training shape: then equal weights give exactly equal means, because kernels (and so their
    rounding) depend on the shape.
    """
    todo = [(i, g) for i, g in sorted(needed) if not (chains.means / f"{i:04d}_{g}.safetensors").is_file()]
    rows = [(i, g, j) for i, g in todo for j in range(len(chains.calls))]
    means: list[Tensor] = []
    for first in tqdm(range(0, len(rows), chains.rows), desc="means of the pre-trained policy", disable=None):
        part = rows[first : first + chains.rows]
        filled = part + part[-1:] * (chains.rows - len(part))
        mean, _ = policy_mean(model, schedule, chains.batch(filled, device), half)
        means += mean[: len(part)].cpu()
        while len(means) >= len(chains.calls):  # a chain is complete
            i, g = todo.pop(0)
            done, means = means[: len(chains.calls)], means[len(chains.calls) :]
            save_tensors(chains.means / f"{i:04d}_{g}.safetensors", {"means": torch.stack(done)})  # (J, V, c, h, w)


# --- evaluation and the loop ---


def sample_validation(model: MultiViewUNet, views: Tensor, cfg: Config) -> Tensor:
    """Images (N, V, 3, S, S) of validation objects, drawn from their front view."""
    ref, bf16 = views[:, 0].float() / 255, use_bf16(cfg.bf16, next(model.parameters()).device)
    return sample_images(model, ref, cfg.seed, cfg.num_steps, cfg.batch_size, "sample validation objects", bf16)


def grad_norm(gradients: list[Tensor]) -> float:
    """The norm of all gradients as one vector."""
    return torch.stack([g.norm() for g in gradients]).norm().item()


def check(cfg: Config) -> None:
    """What can be wrong with the options alone is said before any work."""
    if cfg.feedback not in FEEDBACKS:
        raise InputError(f"--feedback {cfg.feedback}: unknown, expected one of {', '.join(FEEDBACKS)}.")
    if cfg.matcher not in ("sift", "loftr"):
        raise InputError(f"--matcher {cfg.matcher}: unknown, expected sift or loftr.")
    if cfg.feedback == "matching" and cfg.matcher == "loftr":
        loftr_model(cfg.matcher_weights, torch.device("cpu"))  # are its weights there?
    if not 0 <= cfg.first_call < cfg.num_steps - 1:
        raise InputError(f"--first_call {cfg.first_call}: expected 0 to {cfg.num_steps - 2}, below --num_steps - 1.")
    if min(cfg.steps, cfg.batch_objects, cfg.save_every, cfg.log_every, cfg.num_objects, cfg.eval_objects) < 1:
        raise InputError("--steps, --batch_objects, --save_every, --log_every and object counts: expected 1 or more.")


def main(cfg: Config) -> dict:
    """All stages, those already there reused. Returns what results.json holds."""
    check(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, clock, seconds = get_device(cfg.device), time.time(), {}
    out = Path(cfg.out) / (cfg.name or (f"d3po_{cfg.feedback}" if cfg.beta_dpo else "sft"))

    def stage(name: str) -> None:  # print what the stage took
        seconds[name] = round(time.time() - clock - sum(seconds.values()), 1)
        print(f"[{name}: {seconds[name]:.0f} s]")

    model = load(cfg.model)
    # Small log-ratios want float32. SDXL needs a bfloat16 forward to fit, with what is frozen stored so.
    half = bool(model.cfg.base) and use_bf16(cfg.bf16, device)
    torch.manual_seed(cfg.seed)  # of LoRA's start; all other noise has keys of its own
    parameters = model.freeze(cfg.attention_only, cfg.lora, half)
    model.to(device)
    if cfg.checkpointing:
        model.unet.enable_gradient_checkpointing()
    if cfg.compile:
        model.unet.compile()
    schedule, size = Schedule(model.cfg), model.cfg.image_size
    raw = load_split(cfg.data, "preference", cfg.num_objects, size)
    # Like in pre-training, one of the four sides is the reference, drawn once for each object.
    sides = torch.randint(4, (len(raw),), generator=keyed_generator(cfg.seed, 5, 0, 0)).tolist()
    views = torch.stack([relative_views(v, r) for v, r in zip(raw, sides, strict=True)])
    val_views = load_split(cfg.data, "validation", cfg.eval_objects, size)
    stage("data")

    if cfg.feedback == "contrastive" and cfg.beta_dpo and not cfg.scorer:
        if model.cfg.base:
            raise InputError(
                "--feedback contrastive: expected --scorer. Train one: python train_scorer.py --backbone ..."
            )
        cfg = replace(cfg, scorer=str(Path(cfg.out) / f"scorer_{Path(cfg.negatives).name}"))
        shared = settings(cfg, "negatives", "zero123", "data", "num_objects", "num_steps", "bf16", "device")
        train_scorer(ScorerTraining(**shared, pretrained=cfg.model, image_size=size, out=cfg.scorer))
    scorers = {"contrastive": Scorer.load(cfg.scorer)} if cfg.scorer else {}  # on the CPU until it is asked for
    if any(not z.cfg.resize and z.cfg.image_size != size for z in scorers.values()):
        raise InputError(
            f"{cfg.scorer}: not a scorer for {size} pixels, which {cfg.model} makes. "
            f"Train one: python train_scorer.py --image_size {size}"
        )
    stage("scorer")

    # What this run is made of, files by their content. A finished run, or another's, is known before any work.
    free = ("out", "name", "threads", "device", "save_every", "log_every", "eval_every", "batch_size")  # may change
    run: dict[str, Any] = {k: v for k, v in asdict(cfg).items() if k not in free}
    weights_pre = {"weights": digest(Path(cfg.model) / "model.safetensors")}
    run |= weights_pre | {"objects": digest(raw), "scorer_weights": ""}
    if cfg.scorer:
        run["scorer_weights"] = digest(Path(cfg.scorer) / "model.safetensors")
    if (out / "made_by.json").is_file():
        claim(out, run)
    if (out / "results.json").is_file():
        print(f"{out}: finished before, reused")
        return load_json(out / "results.json")

    candidates = Path(cfg.out) / "candidates"
    chains, ranked = Chains(candidates, cfg, schedule), []
    if cfg.beta_dpo:
        collect(model, views, cfg, candidates, device)
        stage("candidates")

        # What was preferred: in a folder for each setting that it depends on.
        made_by = load_json(candidates / "made_by.json") | settings(cfg, "feedback", "num_objects")
        if cfg.feedback == "contrastive":
            made_by |= {"scorer": run["scorer_weights"]}
        if cfg.feedback == "matching":
            made_by |= settings(cfg, "matcher", "matcher_weights")
        name = hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()[:8]
        folder = Path(cfg.out) / f"pairs_{cfg.feedback}_{name}"
        claim(folder, made_by)
        if (folder / "pairs.json").is_file():
            print(f"{folder}: preferences made before, reused")
        else:
            save_json(folder / "pairs.json", prefer(cfg, views, candidates, device))
        ranked = load_json(folder / "pairs.json")
        best = [cfg.noise_scales[e["order"][0]] for e in ranked]
        worst = [cfg.noise_scales[e["order"][-1]] for e in ranked]
        shares = {a: f"{best.count(a)}/{worst.count(a)}" for a in sorted(set(cfg.noise_scales))}
        print(f"{len(ranked)} of {len(views)} objects have a preference; noise scale: times best/worst: {shares}")
        nearer = [e["psnr"][win] > e["psnr"][lose] for e in ranked for win, lose in pairs_of(e, cfg.pairs)]
        share = sum(nearer) / len(nearer)
        print(f"{len(nearer)} pairs; in {share:.0%} of them the winner is nearer to the truth (PSNR of unseen views)")
        stage("feedback")

        rows, _, _ = lay_out([(entry, 0) for entry in ranked], cfg.pairs)
        store_means(model, schedule, chains, {(i, candidate) for i, candidate, _ in rows}, device, half)
        stage("means")

    folder = Path(cfg.out) / "before"
    made_by = settings(cfg, "model", "data", "eval_objects", "num_steps", "seed", "bf16")
    claim(folder, made_by | weights_pre | {"objects": digest(val_views)})
    if not (folder / "images.safetensors").is_file():
        save_tensors(folder / "images.safetensors", {"images": sample_validation(model, val_views, cfg)})
    before_images = load_tensors(folder / "images.safetensors")["images"]
    truth = val_views.float() / 255
    stage("sample before")

    def measure(images: Tensor) -> dict[str, Tensor]:  # the scorer is on the GPU no longer than that
        for scorer in scorers.values():
            scorer.to(device)
        scores = score_images(images, truth, truth[:, 0], scorers)
        for scorer in scorers.values():
            scorer.to("cpu")
        return scores

    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
    )
    weights = step_weights(schedule, chains.calls, cfg.step_weight).to(device)
    J, start = len(chains.calls), 0
    claim(out, run)
    if (out / "state.pt").is_file():
        state = load_state(out / "state.pt")
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"{out}: going on at step {start}")
    trim_log(out / "log.jsonl", start)
    dims = model.cfg.latent_channels * model.cfg.latent_size**2 * views.shape[1]
    print(
        f"beta {cfg.beta_dpo:g} on the summed log-ratio is beta {cfg.beta_dpo * dims:.3g} on its mean over {dims} dims"
    )

    sums: dict[str, list[float]] = {}
    bar = tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, desc="train_d3po", disable=None)
    for step in bar:
        # save
        if (step % cfg.save_every == 0 or step == cfg.steps) and step > start:
            state = {"model": model.trained_state(), "optimizer": optimizer.state_dict(), "step": step}
            write_atomic(out / "state.pt", lambda p, state=state: torch.save(state, p))
        if step == cfg.steps:
            break

        # Eq. 2. Without beta it has no gradient, and what is left is SFT
        optimizer.zero_grad()  # frees the old gradients before a forward
        metrics = {"grad_d3po": 0.0}
        if cfg.beta_dpo:
            # batch: objects, each at one random step of its chains; a function of (seed, step) alone
            g = keyed_generator(cfg.seed, 6, step)
            chosen = torch.randint(len(ranked), (cfg.batch_objects,), generator=g).tolist()
            js = torch.randint(J, (cfg.batch_objects,), generator=g).tolist()
            rows, winners, losers = lay_out([(ranked[n], j) for n, j in zip(chosen, js, strict=True)], cfg.pairs)
            batch = chains.batch(rows, device)

            # forward: all rows in one call, then one loss for each pair
            mean_theta, var = policy_mean(model, schedule, batch, half)
            ratio = log_ratio(batch["action"], mean_theta, chains.mean_pre(rows, device), var)  # (rows,)
            ratio = ratio * weights[[j for _, _, j in rows]]
            ratio_w, ratio_l = ratio[winners], ratio[losers]
            if step == 0 and ratio.abs().max() * cfg.beta_dpo > 1e-3:
                raise InputError(
                    f"before the first update beta * log-ratio is {cfg.beta_dpo * ratio.abs().max():.2g}, expected "
                    f"below 1e-3: the stored means are not this policy's (another device? another torch?). "
                    f"Delete {chains.means} and start again."
                )
            loss_d3po, metrics = d3po_loss(ratio_w, ratio_l, cfg.beta_dpo)
            # each loss goes backward at once: its activations are gone before the next, and gradients are seen apart
            loss_d3po.backward()
            metrics["grad_d3po"] = grad_norm([p.grad for p in parameters if p.grad is not None])
            for (_, _, j), value in zip(rows, ratio.tolist(), strict=True):
                sums.setdefault(f"abs_log_ratio_call_{cfg.first_call + j}", []).append(abs(value))

        # L_simple-MV on the truth
        real = training_batch(model, schedule, raw, cfg.batch_objects, cfg.seed, step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss_simple = simple_loss(model, schedule, *real).mean()
        from_simple = torch.autograd.grad(cfg.lambda_simple * loss_simple, parameters)

        metrics |= {"loss_simple": loss_simple.item(), "grad_simple": grad_norm(list(from_simple))}

        # step
        for p, g in zip(parameters, from_simple, strict=True):
            p.grad = g if p.grad is None else p.grad.add_(g)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise InputError(
                f"step {step}: the gradient is {norm.item()}, expected a finite one. Lower --lr or --beta_dpo."
            )
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - step / cfg.steps)
        optimizer.step()

        # log
        for name, value in metrics.items():
            sums.setdefault(name, []).append(value)
        if (step + 1) % cfg.log_every == 0:
            means = {k: sum(v) / len(v) for k, v in sorted(sums.items())}
            sums = {}
            log_line(out / "log.jsonl", step=step + 1, **means)
            bar.set_postfix({k: f"{means[k]:.3f}" for k in ("loss_d3po", "accuracy", "loss_simple") if k in means})
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            scores = measure(sample_validation(model, val_views, cfg))
            log_line(out / "log.jsonl", step=step + 1, **{f"val_{k}": v.mean().item() for k, v in scores.items()})
    model.save(out)
    stage("train")

    after_images = sample_validation(model, val_views, cfg)
    before, after = measure(before_images), measure(after_images)
    grid(
        out / "grid.png",
        {"truth": truth[:8], "before": before_images[:8], "after": after_images[:8]},
        truth[:8, 0],
    )
    stage("sample after and evaluate")

    table = {}
    print(f"\n{'metric':<14}{'before':>9}{'after':>9}   difference, 95 % interval over {len(truth)} validation objects")
    for name in before:
        difference = after[name] - before[name]
        low, high = bootstrap_interval(difference)
        values = {"before": before[name].mean(), "after": after[name].mean(), "difference": difference.mean()}
        table[name] = {k: float(v) for k, v in values.items()} | {"low": low, "high": high}
        mark = " (the feedback itself)" if name == cfg.feedback and cfg.beta_dpo else ""
        print(
            f"{name:<14}{table[name]['before']:>9.4f}{table[name]['after']:>9.4f}   "
            f"{table[name]['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{mark}"
        )
    result = {**provenance(cfg), "table": table, "seconds": seconds}
    save_json(out / "results.json", result)
    (out / "state.pt").unlink(missing_ok=True)
    print(f"total {sum(seconds.values()):.0f} s; {out}/grid.png shows the first eight objects")
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
