"""Stage 3: MV-D3PO. Collect, prefer, fine-tune, report (paper Sec. 3.2.2, Eq. 2, App. B).

    L = -log sigmoid( beta [log pi_theta/pi_pre (a_w|s_w) - log pi_theta/pi_pre (a_l|s_l)] )
        + lambda L_simple-MV + kl beta KL(pi_theta || pi_pre)

    pi(a|s) = N(a; mean(x_t, Y, t), var)     one denoising step: the state s is x_t, the action a its x_s

1. collect: for each reference the policy draws G candidates. candidates.py says how they differ.
2. prefer: a feedback rates the finished images (feedback.py). The best beats the worst; or all pairs count.
3. train: Eq. (2), at calls of the first half of the chain, which decides the shape, moves the policy towards
   winners' actions. If candidates share a state, one forward serves all their pairs.
4. report: validation objects before and after, from equal noise.

D3PO's own code (yk7333/d3po, which the paper builds on) takes the elements' mean for a log-ratio, and clips.
Ours: candidates share a state, early calls train, and a KL is added. The paper's: --candidates noised, late
--trained_calls, --kl 0. (Which candidates make a pair it does not say.)

Run:
    python train_d3po.py --feedback contrastive --loss both    # main job: Eq. (2), then Diffusion-DPO
    python train_d3po.py --feedback agreement    # or geometry, hull, matching, redder: no scorer
    python train_d3po.py --feedback none         # L_simple-MV alone: the SFT baseline

    Writes out/<loss>_<feedback>-<content>/ (none: out/sft_baseline-<content>/): the model, log.jsonl,
    report/results.json, report/grid.png"""

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train_scorer
from candidates import NOISE_SCALES, Batch, Rollouts, draw_candidates, make_batch, read_rollouts
from cache import cached, check_link, code, machine, settings
from common import STATE, InputError, Log, check_at_least, cli, digest, hardware, key_seed
from common import keyed_generator, load_json, load_state, load_tensors, located, optimizer_step, provenance
from common import same_place, save_json, save_state, save_tensors, training_steps
from data import load_split, make_references
from evaluate import before_after, print_table
from feedback import FEEDBACKS, preference_pairs, rate
from grid import grid
from matcher import loftr_model
from metrics import closeness
from model import ModelConfig, MultiViewUNet, load
from sample import Schedule, forward_noise, kl_divergence, log_ratio, noised_reference, policy_mean
from sample import sample_images, split_prediction
from scorer import Scorer
from train_sft import simple_loss, trained_parameters, training_batch

RECIPES: dict[str, dict[str, Any]] = {  # values of options left at their default, by loss, then candidates
    "d3po": {"candidates": "branch", "beta_dpo": 1.0},
    "diffusion_dpo": {"candidates": "independent", "beta_dpo": 0.02},
    "branch": {"num_candidates": 8, "pairs": "all"},  # one forward serves all pairs
    "noised": {"num_candidates": len(NOISE_SCALES), "pairs": "extremes"},
    "independent": {"num_candidates": 5, "pairs": "extremes"},
}
Preferences = tuple[Path, Tensor] | None  # what `collect` and `prefer` return; None: there are none, SFT


@dataclass(frozen=True)
class Config:
    """Defaults are Eq. (2) on a CPU; the comments name the paper's. Options left open are filled in from
    RECIPES at once, and printed by `collect`. dataclasses.replace keeps them: for another loss, make a new
    Config."""

    feedback: str = "contrastive"  # a name in feedback.FEEDBACKS, or none: the SFT baseline
    model: str = "checkpoints/objects"  # pi_pre: a folder that train_sft.py wrote
    data: str = "furniture"  # furniture, toys, or a folder of renders (see data.py)
    num_references: int = 240  # of preference objects (paper: 240)
    eval_objects: int = 64  # validation objects
    out: str = "out"  # where everything goes
    scorer: str = ""  # a trained scorer's folder; empty: --feedback contrastive trains one
    negatives: str = ""  # of the scorer that is trained here: train_scorer.py --negatives
    matcher: str = "sift"  # sift, loftr, or a file of LoFTR weights, for --feedback matching
    loss: Literal["d3po", "diffusion_dpo", "both"] = "d3po"  # which log-ratio Eq. (2) compares; both: in turn
    candidates: Literal["auto", "branch", "noised", "independent"] = "auto"  # by loss (paper: noised)
    num_candidates: int = 0  # G (noised: one for each scale of App. B); 0: RECIPES
    beta_dpo: float = 0.0  # beta of Eq. 2 on the log-ratio SUMMED over V c h w; 0: RECIPES
    kl: float = 0.05  # weight of KL(pi_theta || pi_pre), in betas (paper: 0)
    num_steps: int = 10  # network calls K of the sampler (paper: 50)
    trained_calls: tuple[int, int] = (0, 4)  # first and last call that Eq. (2) trains (paper: last 40 of 50)
    lambda_simple: float = 1.0  # weight of L_simple-MV (paper: 1)
    pairs: Literal["auto", "extremes", "all"] = "auto"  # extremes: the best against the worst; auto: RECIPES
    rounds: int = 1  # collect, prefer, train again with the policy of the round before
    anchor: Literal["pre", "last"] = "pre"  # log-ratio and KL are to pi_pre, or to the last round's policy

    steps: int = 120  # optimizer steps a round (paper: 1800)
    batch_objects: int = 8  # references a step, and as many ground-truth objects for L_simple-MV
    lr: float = 3e-4  # AdamW; falls to 0 in a straight line
    attention_only: bool = True  # train the attention layers only, as the paper does (App. B)
    lora: int = 0  # train a change of this rank of the attention projections only: less memory; 0: no
    seed: int = 0  # of candidates, batches and noise

    batch_size: int = 8  # references at a time when sampling
    bf16: Literal["auto", "on", "off"] = "auto"  # run the network in bfloat16; auto: where it is fast
    checkpointing: bool = False  # compute activations again in backward: half the speed, far less memory
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        if self.loss == "both":  # two configs, filled when they are made
            return
        for by in ("loss", "candidates"):
            for name, value in RECIPES[getattr(self, by)].items():
                if getattr(self, name) == getattr(type(self), name):
                    object.__setattr__(self, name, value)  # the dataclass is frozen


# --- 1. collect: candidates of every reference ---


def collect(policy: Path, references: Tensor, cfg: Config, round: int) -> Path:
    """Candidates of all references (N, V, 3, S, S) uint8; returns a folder, a file for every few of them."""
    chosen = (*RECIPES[cfg.loss], *RECIPES[cfg.candidates], "kl")
    print(*(f"--{name} {getattr(cfg, name)}" for name in chosen))
    device, bf16 = hardware(cfg)
    options = ("candidates", "num_candidates", "loss", "num_steps", "trained_calls", "seed", "batch_size")
    made_by = {name: getattr(cfg, name) for name in options} | {"policy": digest(policy), "round": round}
    made_by |= {"references": digest(references[:, 0]), "code": code("candidates", "model", "sample")}

    def make(folder: Path) -> None:
        # Each reference branches at one call, drawn once; those with equal calls are drawn together.
        (first, last), g = cfg.trained_calls, keyed_generator(cfg.seed, 10, round)
        calls = torch.randint(first, last + 1, (len(references),), generator=g)
        if cfg.candidates != "branch":
            calls = torch.full_like(calls, first)
        groups = [i for k in calls.unique() for i in (calls == k).nonzero()[:, 0].split(cfg.batch_size)]
        model = load(policy, device, half=bf16)
        for group in tqdm(groups, desc="candidates", disable=None):
            path = folder / f"{int(group[0]):06d}.safetensors"
            if path.is_file():  # a killed run goes on
                continue
            ref = references[group, 0].to(device).float() / 255
            seeds = [key_seed(cfg.seed, 8, round, int(i)) for i in group]  # 8: other noise than in evaluation
            rollouts, images = draw_candidates(model, ref, seeds, int(calls[group[0]]), cfg, bf16)
            images = (images * 255).round().to(torch.uint8)
            save_tensors(path, {**rollouts._asdict(), "images": images, "reference": group})

    return cached(cfg.out, "candidates", made_by | machine(cfg), make)


# --- 2. prefer: a reward for every candidate ---


def prefer(candidates: Path, references: Tensor, cfg: Config) -> Tensor:  # (N, G) rewards
    """Rate all candidates. Says how often the winner of a pair is nearer to the truth, or less noised."""
    feedback = FEEDBACKS[cfg.feedback]
    made_by = {"candidates": digest(load_json(candidates / "made_by.json")), "feedback": cfg.feedback}
    made_by |= {"code": [digest(feedback), code("feedback", "matcher", "metrics", "scorer")]}
    made_by |= {"references": digest(references), "seed": cfg.seed}
    if cfg.feedback == "contrastive":
        made_by["scorer"] = digest(Path(cfg.scorer))
    if cfg.feedback == "matching":
        made_by["matcher"] = digest(Path(cfg.matcher)) if Path(cfg.matcher).is_file() else cfg.matcher
    if feedback.__module__ != "feedback":  # yours: it may read any option
        made_by = settings(cfg) | made_by | {"scorer": digest(Path(cfg.scorer)) if cfg.scorer else ""}

    def make(folder: Path) -> None:
        files = sorted(candidates.glob("*.safetensors"))
        G = load_tensors(files[0])["images"].shape[1]
        rewards, psnr = (torch.full((len(references), G), torch.nan) for _ in range(2))
        for path in tqdm(files, desc=f"{cfg.feedback} feedback", disable=None):
            part = load_tensors(path)
            for i, images in zip(part["reference"].tolist(), part["images"]):
                images, truth = images.float() / 255, references[i].float() / 255
                rewards[i], psnr[i] = rate(feedback, images, truth, cfg), closeness(images, truth)
        if bad := int(rewards.isfinite().logical_not().sum()):
            raise InputError(f"--feedback {cfg.feedback}: {bad} rewards are not finite, expected numbers.")
        save_tensors(folder / "rewards.safetensors", {"rewards": rewards, "psnr": psnr})

    kept = load_tensors(cached(cfg.out, f"rewards_{cfg.feedback}", made_by, make) / "rewards.safetensors")
    compared, wins = preference_pairs(kept["rewards"], cfg.pairs)
    if not wins.any():
        raise InputError(f"--feedback {cfg.feedback}: all tie, expected a winner. Is --model trained?")
    psnr = kept["psnr"].gather(1, compared)
    nearer, p = ((z[:, :, None] > z[:, None])[wins].float().mean() for z in (psnr, -compared))
    less = f", {p:.0%} less noised" if cfg.candidates == "noised" else ""  # -compared is the order of noise
    print(f"{int(wins.sum())} pairs of {len(wins)} references; winners: {nearer:.0%} nearer to truth{less}")
    return kept["rewards"]


# --- 3. train: Eq. (2) ---


def d3po_loss(
    log_ratio_w: Tensor,  # (P,) log pi_theta/pi_pre of the winner's action, summed over V c h w
    log_ratio_l: Tensor,  # (P,) of the loser's
    beta: float,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 2, mean over pairs, each at one denoising step. No clip: the equation has none (D3PO's code has).

    FORK: another loss on pairs of log-ratios (IPO, hinge...) is another function of these two."""
    # L = -log sigmoid( beta log_ratio_w - beta log_ratio_l )
    margin = beta * (log_ratio_w - log_ratio_l)
    loss = -F.logsigmoid(margin).mean()
    return loss, {
        "loss_d3po": loss.item(),  # log 2 = 0.693 at theta = pre
        "margin": margin.mean().item(),
        "accuracy": (margin.sign() + 1).mean().item() / 2,
        "log_ratio_w": log_ratio_w.mean().item(),
        "log_ratio_l": log_ratio_l.mean().item(),
    }


def batch_means(policy: MultiViewUNet, schedule: Schedule, batch: Batch, bf16: bool) -> tuple[Tensor, Tensor]:
    """Mean (B R, V, c, h, w) and variance of the policy at a batch's states: one forward for all candidates.

    The loss always shows it the CLEAN reference, without App. B's noise, so the actions of "noised" are not
    its own. Under the reference that a candidate was drawn with, each action is a sample of pi_pre, and
    E_pi[grad log pi] = 0: where the noise scale alone decides who wins, no gradient is expected at theta =
    pre, neither of winners nor of losers."""
    t, s = (z.repeat_interleave(batch.x_t.shape[1], 0) for z in (batch.t, batch.s))
    return policy_mean(policy, schedule, batch.x_t.flatten(0, 1), batch.y, batch.ref_noise, t, s, bf16)


def step_log_ratio(
    policy: MultiViewUNet,
    schedule: Schedule,
    batch: Batch,
    mean_pre: Tensor,  # (B, R, V, c, h, w) pi_pre's mean at these states
    bf16: bool,
) -> tuple[Tensor, Tensor]:  # (B, G) log pi_theta/pi_pre of each action, (B,) KL; both in nats
    """D3PO's log-ratio: of the action that led to the candidate.

    With one state for all candidates (R = 1) the difference of two of them is linear in theta's mean,
    < mean_theta - mean_pre, a_w - a_l > / var: the quadratic parts cancel. So nothing in Eq. (2) itself keeps
    the policy near pi_pre; the KL term does."""
    B, R, G = *batch.x_t.shape[:2], batch.action.shape[1]  # R is G or 1
    mean, var = batch_means(policy, schedule, batch, bf16)
    mean, pre, var = (z.repeat_interleave(G // R, 0) for z in (mean, mean_pre.flatten(0, 1), var))  # B G rows
    ratio = log_ratio(batch.action.flatten(0, 1), mean, pre, var)
    return ratio.view(B, G), kl_divergence(mean, pre, var).view(B, G).mean(1)


def forward_log_ratio(
    policy: MultiViewUNet, pre: MultiViewUNet, batch: Batch, seed: int, step: int, bf16: bool
) -> tuple[Tensor, Tensor]:  # (B, G), (B,)
    """Diffusion-DPO's log-ratio (Wallace et al. 2023): of the finished candidate, noised again.

        w_t [ |x0 - x0_pre(x_t)|^2 - |x0 - x0_theta(x_t)|^2 ],     w_t as in L_simple-MV, halved

    at one draw of t and noise, the same for all candidates of a reference. Eq. (2) then asks: whose picture
    does the policy denoise better than pi_pre? No action is needed, but pi_pre's network. t leaves out both
    ends: there nothing of the shape is at stake, or hardly anything is seen. The second number is
    w_t |x0_theta - x0_pre|^2, in place of a KL."""
    schedule, (B, G), g = Schedule(policy.cfg), batch.x0.shape[:2], keyed_generator(seed, 11, step)
    t = torch.randint(100, 951, (B,), generator=g).to(batch.t)
    noise, ref_noise = (torch.randn(z.shape, generator=g).to(t.device) for z in (batch.x0[:, 0], batch.y))
    ref_t = noised_reference(schedule, policy.cfg, batch.y, t, ref_noise)  # one for all candidates
    x0, t, noise = batch.x0.flatten(0, 1), *(z.repeat_interleave(G, 0) for z in (t, noise))  # B G rows
    x_t = forward_noise(schedule, x0, t, noise)

    def predict(network: MultiViewUNet) -> Tensor:
        with torch.autocast(t.device.type, torch.bfloat16, enabled=bf16):
            output = network(x_t, t, ref_t)
        return split_prediction(schedule, output, x_t, t)[0]

    theta = predict(policy)
    with torch.no_grad():
        old = predict(pre)
    ab = schedule.ab(t)  # an error d in x0 is one of sqrt(ab / (1 - ab)) d in epsilon, d / sqrt(1 - ab) in v
    weight = (ab if schedule.prediction == "epsilon" else 1) / (2 * (1 - ab))
    ratio = (weight * ((x0 - old) ** 2 - (x0 - theta) ** 2)).flatten(1).sum(1)
    return ratio.view(B, G), (weight * (theta - old) ** 2).flatten(1).sum(1).view(B, G).mean(1)


def draw_states(usable: Tensor, J: int, cfg: Config, round: int) -> Tensor:  # (steps, B, 2)
    """Each step's references, each at one of its J trained calls: a function of (seed, step) alone."""
    drawn = []
    for n in range(round * cfg.steps, (round + 1) * cfg.steps):
        g = keyed_generator(cfg.seed, 6, n)
        chosen = usable[torch.randint(len(usable), (cfg.batch_objects,), generator=g)]
        drawn.append(torch.stack([chosen, torch.randint(J, chosen.shape, generator=g)], 1))
    return torch.stack(drawn)


def frozen_means(
    model: MultiViewUNet, rollouts: Rollouts, visited: Tensor, cfg: Config, bf16: bool, device: Any
) -> Tensor:  # (N, J, R, V, c, h, w), NaN elsewhere
    """pi_pre's mean at the states (reference, j) that training visits: once, and no second network is held.

    In batches of the training shape and with gradients switched on, because kernels, and so their rounding,
    depend on both: then equal weights give exactly equal means."""
    schedule, means = Schedule(model.cfg), torch.full_like(rollouts.x_t, torch.nan)
    for part in tqdm(visited.split(cfg.batch_objects), desc="means of pi_pre", disable=None):
        filled = torch.cat([part, part[-1:].expand(cfg.batch_objects - len(part), 2)])
        batch = make_batch(rollouts, filled[:, 0], filled[:, 1], schedule, cfg.num_steps, device)
        mean, _ = batch_means(model, schedule, batch, bf16)
        means[part[:, 0], part[:, 1]] = mean.detach().cpu().unflatten(0, (len(filled), -1))[: len(part)]
    return means


def prepare(folder: Path, cfg: Config) -> tuple[MultiViewUNet, list[Any]]:
    """A model to fine-tune, and its trained parameters."""
    model = load(folder)
    torch.manual_seed(cfg.seed)  # of LoRA's start; all other noise has keys of its own
    return model, trained_parameters(model, cfg)


def run_name(cfg: Config) -> str:
    """A run's folder, without its content, and the link to the last one."""
    return "sft_baseline" if cfg.feedback == "none" else f"{cfg.loss}_{cfg.feedback}"


def train(start: Path, pre: Path, preferences: Preferences, objects: Tensor, cfg: Config, round: int) -> Path:
    """Fine-tune the policy in `start` by `run`; returns the folder. No preferences: the SFT baseline."""
    options = "lambda_simple steps batch_objects lr attention_only lora seed checkpointing".split()
    options += "loss beta_dpo kl pairs num_steps".split() if preferences else []
    made_by = {name: getattr(cfg, name) for name in options} | {"start": digest(start)}
    made_by |= {"objects": digest(objects)} | machine(cfg)
    yours = (d3po_loss, step_log_ratio, forward_log_ratio, batch_means, preference_pairs, simple_loss)
    ours = code("candidates", "data", "feedback", "model", "sample", "train_d3po", "train_sft")
    made_by |= {"code": [ours, *map(digest, yours)], "round": round}
    if preferences:
        made_by |= {"pre": digest(pre), "rewards": digest(preferences[1]), "feedback": cfg.feedback}
        made_by |= {"candidates": digest(load_json(preferences[0] / "made_by.json"))}
    return cached(cfg.out, run_name(cfg), made_by, partial(run, start, pre, preferences, objects, cfg, round))


def run(
    start: Path, pre: Path, preferences: Preferences, objects: Tensor, cfg: Config, round: int, folder: Path
) -> None:
    """The loop: L = L_MV-D3PO + lambda L_simple-MV + kl beta KL."""
    device, bf16 = hardware(cfg)
    policy, parameters = prepare(start, cfg)
    schedule = Schedule(policy.cfg)
    if preferences:
        compared, wins = preference_pairs(preferences[1], cfg.pairs)
        rollouts = read_rollouts(preferences[0], compared)
        usable = wins.flatten(1).any(1).nonzero()[:, 0]  # references whose candidates do not all tie
        at_pre = digest(pre) == digest(start)  # the policy starts as pi_pre
        frozen = policy if at_pre else prepare(pre, cfg)[0]
        drawn = draw_states(usable, rollouts.call.shape[1], cfg, round)
        if cfg.loss == "d3po":
            mean_pre = frozen_means(frozen, rollouts, drawn.flatten(0, 1).unique(dim=0), cfg, bf16, device)
            del frozen  # no second network is held
        else:
            frozen = copy.deepcopy(frozen).requires_grad_(False)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, cfg.lr, (0.9, 0.99), weight_decay=0.0, fused=fused)

    if state := load_state(folder / STATE):
        policy.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    log = Log(folder / "log.jsonl", 10, cfg.steps, state.get("log"))

    def save(done: int) -> None:
        parts = {"model": policy.trained_state(), "optimizer": optimizer.state_dict(), "log": log.state}
        save_state(folder / STATE, parts, step=done)

    for step in training_steps(state.get("step", 0), cfg.steps, "train_d3po", save):
        metrics, n = {}, round * cfg.steps + step  # n counts on: another round has other batches and noise
        if preferences:
            # batch: references, each at one of its trained calls
            chosen, js = drawn[step].unbind(1)
            batch = make_batch(rollouts, chosen, js, schedule, cfg.num_steps, device)

            # forward: Eq. (2), one log-ratio for each candidate, one term for each pair
            if cfg.loss == "d3po":
                ratio, kl = step_log_ratio(policy, schedule, batch, mean_pre[chosen, js].to(device), bf16)
            else:
                ratio, kl = forward_log_ratio(policy, frozen, batch, cfg.seed, n, bf16)
            if at_pre and step == 0 and (top := ratio.abs().max()) * cfg.beta_dpo > 1e-3:
                raise InputError(f"before the first update the log-ratio is {top:.2g}, expected 0.")
            b, w, l = wins[chosen].nonzero(as_tuple=True)  # noqa: E741
            loss_d3po, metrics = d3po_loss(ratio[b, w], ratio[b, l], cfg.beta_dpo)

            # backward: L = L_MV-D3PO + kl beta KL + lambda L_simple-MV. Gradients add up in p.grad, so each
            # part goes backward at once, and its activations are gone before the next.
            (loss_d3po + cfg.kl * cfg.beta_dpo * kl.mean()).backward()
            norms = [p.grad.norm() for p in parameters if p.grad is not None]
            metrics |= {"kl": kl.mean().item(), "grad_d3po": torch.stack(norms).norm().item()}
        real = training_batch(policy, schedule, [objects], cfg.batch_objects, cfg.seed, n, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss_simple = simple_loss(policy, schedule, *real).mean()
        (cfg.lambda_simple * loss_simple).backward()

        # step, log
        norm = optimizer_step([optimizer], parameters, 1 - step / cfg.steps, step)
        log.add(step, **metrics, loss_simple=loss_simple.item(), grad_norm=norm)
    policy.save(folder)


# --- 4. report ---


def draw_images(model: Path, ref: Tensor, cfg: Config) -> Tensor:  # (N, V, 3, S, S) in [0, 1]
    """What a model makes of references (N, 3, S, S) uint8."""
    device, bf16 = hardware(cfg)
    made_by = {"model": digest(model), "ref": digest(ref), "num_steps": cfg.num_steps, "seed": cfg.seed}
    made_by |= {"batch_size": cfg.batch_size, "code": code("model", "sample")}

    def make(folder: Path) -> None:
        policy, how = load(model, device, half=bf16), (cfg.batch_size, "draw", bf16)
        images = sample_images(policy, ref.float() / 255, cfg.seed, cfg.num_steps, *how)
        save_tensors(folder / "images.safetensors", {"images": (images * 255).round().to(torch.uint8)})

    folder = cached(cfg.out, "images", made_by | machine(cfg), make)
    return load_tensors(folder / "images.safetensors")["images"].float() / 255


def report(pre: Path, policy: Path, size: int, cfg: Config, clock: float) -> dict:
    """Before against after on validation objects: results.json and grid.png in the run's folder `report`."""
    views = load_split(cfg.data, "validation", cfg.eval_objects, size)
    truth, (before, after) = views.float() / 255, (draw_images(m, views[:, 0], cfg) for m in (pre, policy))
    feedback: Any = FEEDBACKS.get(cfg.feedback)  # of SFT there is none
    made_by = {"views": [digest(z) for z in (before, after, truth)], "feedback": digest(feedback)}
    made_by |= {"code": code("evaluate", "feedback", "grid", "matcher", "metrics", "scorer")}
    made_by["scorer"] = digest(Path(cfg.scorer)) if cfg.scorer else ""

    def make(folder: Path) -> None:
        scorers = {"contrastive": Scorer.load(cfg.scorer)} if cfg.scorer else {}
        reward = {cfg.feedback: lambda x, y: rate(feedback, x[None], y, cfg)[0]} if feedback else {}
        table = before_after(before, after, truth, scorers, reward)
        most = (after - before).abs().flatten(1).mean(1).argsort(descending=True)[:8]
        columns = {"ground truth": truth, "before": before, "after": after}
        grid(folder / "grid.png", {k: v[most] for k, v in columns.items()}, truth[most, 0])
        result = {**provenance(cfg), "table": table, "seconds": round(time.time() - clock)}
        save_json(folder / "results.json", result)

    folder = cached(policy, "report", made_by, make)
    result = load_json(folder / "results.json")
    print(f"--feedback {cfg.feedback} --loss {cfg.loss} --kl {cfg.kl}")
    print_table(result["table"], cfg.feedback)
    print(f"total {time.time() - clock:.0f} s; {folder}/grid.png shows the eight objects that changed most")
    return result | {"folder": str(policy)}


def find_scorer(cfg: Config, model: ModelConfig) -> str:
    """The scorer of --feedback contrastive: given, or trained now (stage 2)."""
    if cfg.scorer or cfg.feedback != "contrastive":
        return str(located(cfg.scorer)) if cfg.scorer else ""
    if model.is_sdxl:
        raise InputError("--feedback contrastive: expected --scorer. Make one as runs/paper.sh does.")
    names = ("negatives", "data", "num_references", "num_steps", "bf16", "device", "seed")
    shared: dict[str, Any] = {name: getattr(cfg, name) for name in names} | {"image_size": model.image_size}
    return train_scorer.main(train_scorer.Config(**shared, out=str(Path(cfg.out) / "scorer")))["folder"]


def check(cfg: Config) -> ModelConfig:
    """Refuse impossible options before any computation. Returns what the model is."""
    if cfg.feedback not in (*FEEDBACKS, "none"):
        raise InputError(f"--feedback {cfg.feedback}: unknown, expected one of {', '.join(FEEDBACKS)}, none.")
    if cfg.feedback == "least_noise" and cfg.candidates != "noised":
        raise InputError("--feedback least_noise: expected --candidates noised.")
    if cfg.candidates == "noised" and cfg.num_candidates != (G := len(NOISE_SCALES)):
        raise InputError(f"--num_candidates {cfg.num_candidates}: expected {G} (or 0) if they are noised.")
    if cfg.feedback == "matching" and cfg.matcher != "sift":  # are LoFTR's weights there?
        loftr_model(cfg.matcher, torch.device("cpu"))
    check_at_least(cfg, 2, "num_candidates", "num_steps")
    (first, last), limit = cfg.trained_calls, cfg.num_steps - 2  # the last call of a chain has no density
    if not 0 <= first <= last <= limit:
        raise InputError(f"--trained_calls {first} {last}: expected 0 <= first <= last <= {limit}.")
    link = Path(cfg.out) / run_name(cfg)
    if same_place(cfg.model, link):
        raise InputError(f"--model {link}: this run moves that link. Expected its folder, {link.resolve()}.")
    check_link(link)
    check_at_least(cfg, 1, "steps", "batch_objects", "batch_size", "num_references", "eval_objects", "rounds")
    check_at_least(cfg, 0, "beta_dpo", "kl", "lambda_simple", "lr", "lora")
    model = load(cfg.model)
    if cfg.lora:
        model.add_lora(cfg.lora)  # is that rank possible?
    Schedule(model.cfg).timesteps(cfg.num_steps)
    if cfg.scorer:  # does it see the model's images?
        views = torch.zeros(1, 1, 3, model.cfg.image_size, model.cfg.image_size)
        Scorer.load(cfg.scorer).score(views[:, 0], views)
    return model.cfg


def main(cfg: Config) -> dict:
    """Collect, prefer, train, report. A stage that equal inputs made before is read, not done again."""
    if cfg.loss == "both":
        runs: dict[Any, Config] = {loss: replace(cfg, loss=loss) for loss in ("d3po", "diffusion_dpo")}
        for one in runs.values():
            check(one)
        return {loss: main(one) for loss, one in runs.items()}
    clock = time.time()
    model = check(cfg)
    pre = policy = located(cfg.model)
    n, size = cfg.num_references, model.image_size
    objects = load_split(cfg.data, "preference", n, size)  # (N, V, 3, S, S) uint8, also for L_simple-MV
    references = make_references(objects, n, cfg.seed)  # (n, V, 3, S, S)
    cfg, preferences = replace(cfg, scorer=find_scorer(cfg, model)), None
    for round in range(cfg.rounds):
        if cfg.feedback != "none":
            candidates = collect(policy, references, cfg, round)
            preferences = candidates, prefer(candidates, references, cfg)
        anchor = pre if cfg.anchor == "pre" else policy
        policy = train(policy, anchor, preferences, objects, cfg, round)
    return report(pre, policy, size, cfg, clock)


if __name__ == "__main__":
    cli(main, Config, __doc__)
