"""How good is each feedback? What it tells from the truth, and whether it finds the better of a model's own candidates.

ROC-AUC   truth against wrong views, one reward an object: P(reward of a truth > reward of a wrong set), ties half
paired    the same, but each truth against its own wrong set: what a preference sees
rank      Spearman's correlation of reward and PSNR (four unseen views) among the five candidates of a reference: mean
          over references and its 95 % bootstrap interval
nearer    how often the candidate with the best reward is nearer to the truth than the one with the worst

Run:
    python -m runs.feedback --scorers out/table1/scorer out/table1/scorer_pre --out results/table1/feedback
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import cli, get_device, key_seed, provenance, save_json, write_atomic
from data import load_split
from evaluate import bootstrap_interval, closeness, hull_iou
from matcher import matching_reward
from model import load
from sample import sample, sample_images
from scorer import Scorer, contrastive_reward
from train_d3po import Config as D3PO
from train_scorer import auc, wrong_views


@dataclass(frozen=True)
class Config:
    """Which feedbacks, on what."""

    scorers: tuple[str, ...] = ("out/scorer",)  # scorer folders
    matching: bool = True  # also SIFT matches (0.3 s a set of views)
    model: str = "checkpoints/toy"  # the model whose candidates are ranked
    other_model: str = "checkpoints/toy_independent"  # whose images are told from the truth, too
    data: str = "toys"  # toys, or a folder of renders
    split: str = "heldout"  # none of the scorers' objects
    n: int = 64  # objects
    num_steps: int = D3PO.num_steps  # network calls
    noise_scales: tuple[float, ...] = D3PO.noise_scales  # of the candidates
    common_noise: bool = D3PO.common_noise  # of the candidates
    out: str = "out/feedback"  # writes .md and .json
    device: str = "auto"  # auto, cpu or cuda


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last dimension, equal values sharing their mean rank."""
    less, equal = (x[..., None, :] < x[..., None]).sum(-1), (x[..., None, :] == x[..., None]).sum(-1)
    return less + (equal - 1) / 2


def spearman(x: Tensor, y: Tensor) -> Tensor:  # (N, G), (N, G) -> (N,), 0 where one of them is constant
    """Rank correlation in each row."""
    a, b = (ranks(z) - (z.shape[-1] - 1) / 2 for z in (x, y))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)


def main(cfg: Config) -> dict:
    """Draw, score, print and write the table."""
    device = get_device(cfg.device)
    model, other = load(cfg.model, device), load(cfg.other_model, device)
    truth = load_split(cfg.data, cfg.split, cfg.n, model.cfg.image_size).float() / 255
    ref, G = truth[:, 0], len(cfg.noise_scales)
    sets = {
        "truth": truth,
        f"{Path(cfg.other_model).name}'s": sample_images(other, ref, 1, cfg.num_steps),
        f"{Path(cfg.model).name}'s": sample_images(model, ref, 1, cfg.num_steps),
        **wrong_views(truth),
    }
    drawn = []
    for i in tqdm(range(len(truth)), desc="candidates", disable=None):
        view, seeds = ref[i : i + 1].to(device).expand(G, -1, -1, -1), [key_seed(1, 8, i)] * G
        scales = list(cfg.noise_scales)
        chain = sample(model, view, seeds, cfg.num_steps, list(range(G)), scales, common_noise=cfg.common_noise)
        drawn.append(chain.images.cpu())
    candidates = torch.stack(drawn)  # (N, G, V, 3, S, S)
    quality = torch.stack([closeness(x, y) for x, y in zip(candidates, truth, strict=True)])

    feedbacks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for folder in cfg.scorers:
        scorer = Scorer.load(folder, device)
        feedbacks[Path(folder).name] = lambda y, x, scorer=scorer: contrastive_reward(scorer, y, x).cpu()
    if cfg.matching:
        feedbacks["matching (SIFT)"] = lambda y, x: matching_reward(y, x, "sift")
    feedbacks["hull"] = lambda y, x: hull_iou(x)
    control = "least noise"  # ranks candidates without looking at them
    feedbacks[control] = lambda y, x: -torch.tensor(cfg.noise_scales)

    lines, rows = [], {}
    wrong = list(sets)[1:]
    for name, reward in feedbacks.items():
        row, cells = {}, ["-"] * len(wrong)
        if name != control:
            rewards = {
                k: torch.cat([reward(y[None], x[None]) for y, x in zip(ref, v, strict=True)]).double()
                for k, v in sets.items()
            }
            margin = {k: rewards["truth"] - rewards[k] for k in wrong}
            row |= {f"auc_{k}": auc(rewards["truth"], rewards[k]) for k in wrong}
            # (equal sums of equal numbers, added in another order, are a tie)
            row |= {
                f"paired_{k}": ((m > 1e-6).double() + (m.abs() <= 1e-6) / 2).mean().item() for k, m in margin.items()
            }
            cells = [f"{row[f'auc_{k}']:.2f} ({row[f'paired_{k}']:.2f})" for k in wrong]
        each = torch.stack([reward(y.expand(G, -1, -1, -1), x) for y, x in zip(ref, candidates, strict=True)]).double()
        rank = spearman(each, quality)
        best, worst = (quality.gather(1, i[:, None]).flatten() for i in (each.argmax(1), each.argmin(1)))
        low, high = bootstrap_interval(rank)
        row |= {"rank": rank.mean().item(), "rank_low": low, "rank_high": high}
        row |= {"nearer": (best > worst).double().mean().item(), "gap": (best - worst).mean().item()}
        rows[name] = row
        print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
        cells += [f"{row['rank']:+.2f} [{low:+.2f}, {high:+.2f}]", f"{row['nearer']:.0%}", f"{row['gap']:+.2f} dB"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    head = "| AUC (paired) against | " + " | ".join(wrong) + " | rank | nearer | PSNR, best - worst |"
    text = [head, "|---" * (len(wrong) + 4) + "|", *lines]
    text += ["", f"{len(ref)} {cfg.split} objects; candidates with reference noise {cfg.noise_scales}."]
    write_atomic(f"{cfg.out}.md", lambda p: p.write_text("\n".join(text) + "\n"))
    save_json(f"{cfg.out}.json", {**provenance(cfg), "rows": rows})
    return rows


if __name__ == "__main__":
    cli(main, Config, __doc__)
