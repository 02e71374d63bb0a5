"""Before any training: what is there to gain? The best of G candidates by each feedback, in every metric.

No loss can teach what the candidates do not show. For each design of candidates (candidates.draw_candidates)
and each feedback this prints, on validation objects, the mean over objects of [metric of the candidate that
the feedback rates best] - [mean of the metric over the G candidates], and how far the reward spreads among
the candidates, by design.

Run:
    python -m runs.headroom --scorer out/scorer --out results/headroom
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tqdm import tqdm

import train_d3po as D
from candidates import NOISE_SCALES, draw_candidates
from common import InputError, check_at_least, check_output, cli, explained, hardware, key_seed, load_json
from common import provenance, save_json, write_atomic
from data import load_split
from evaluate import measure, with_interval
from feedback import rate
from model import load
from scorer import Scorer


@dataclass(frozen=True)
class Config:
    model: str = "checkpoints/objects"  # whose candidates
    data: str = "furniture"  # furniture, toys, or a folder of renders
    scorer: str = "out/scorer"  # a folder that train_scorer.py wrote
    feedbacks: tuple[str, ...] = ("contrastive", "geometry", "hull", "oracle", "random")
    n: int = 32  # validation objects
    num_candidates: int = 8  # G
    num_steps: int = 10  # network calls K
    branch_calls: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)  # k of the design "branch"
    seed: int = 1
    bf16: Literal["auto", "on", "off"] = "auto"
    out: str = "out/headroom"  # writes .md and .json
    device: str = "auto"  # auto, cpu or cuda


METRICS = ("psnr_unseen", "ssim_unseen", "hull", "geometry", "contradiction", "contrastive")


def main(cfg: Config) -> dict:
    """Draw, rate, print and write the table."""
    check_at_least(cfg, 1, "n")
    check_at_least(cfg, 2, "num_candidates")
    known = [name for name in D.FEEDBACKS if name != "least_noise"]  # which means nothing but for "noised"
    if strange := [name for name in cfg.feedbacks if name not in known]:
        raise InputError(f"--feedbacks {strange[0]}: expected some of {', '.join(known)}.")
    names = ("model", "scorer", "num_candidates", "num_steps", "seed", "out")
    shared: dict[str, Any] = {name: getattr(cfg, name) for name in names}
    calls = (min(cfg.branch_calls), max(cfg.branch_calls))
    if not 0 <= calls[0] <= calls[1] <= cfg.num_steps - 2:
        raise InputError(f"--branch_calls {cfg.branch_calls}: expected 0 to {cfg.num_steps - 2}.")
    base = D.Config(**shared, candidates="branch", trained_calls=calls)
    D.check(base)
    table, numbers = (check_output("out", cfg.out + suffix, suffix) for suffix in (".md", ".json"))
    with explained(f"--out {cfg.out}: exists, and is none of ours. Choose another name."):
        if table.exists() and "| best by |" not in table.read_text():
            raise ValueError(f"{table} is no table of gains")
        if numbers.exists():
            load_json(numbers)["spread"]
    device, bf16 = hardware(cfg)
    model = load(cfg.model, device)
    truth = load_split(cfg.data, "validation", cfg.n, model.cfg.image_size).float() / 255
    scorers = {"contrastive": Scorer.load(cfg.scorer, device)}
    designs = {"noised references (App. B)": ("noised", 0), "independent samples": ("independent", 0)}
    designs |= {f"branch at call {k}": ("branch", k) for k in cfg.branch_calls}

    rows, spreads = [], []
    for label, (candidates, call) in designs.items():
        options = replace(base, candidates=candidates, trained_calls=(call, call))
        images = []
        for part in tqdm(torch.arange(len(truth)).split(2), desc=label, disable=None):
            seeds, ref = [key_seed(cfg.seed, 8, int(i)) for i in part], truth[part, 0].to(device)
            images.append(draw_candidates(model, ref, seeds, call, options, bf16)[1].cpu())
        images = torch.cat(images)  # (N, G, V, 3, S, S)
        N, G = images.shape[:2]
        flat = truth.repeat_interleave(G, 0)
        values = measure(images.flatten(0, 1), flat, flat[:, 0], scorers)
        values = {k: values[k].view(N, G) for k in METRICS}
        spreads.append({"candidates": label})
        for name in cfg.feedbacks:
            rewards = [rate(D.FEEDBACKS[name], x, y, options).double() for x, y in zip(images, truth)]
            rewards = torch.stack(rewards)  # (N, G)
            spreads[-1][name] = rewards.std(1).mean().item()
            best = rewards.argmax(1, keepdim=True)
            gains = {k: with_interval(v.gather(1, best)[:, 0] - v.mean(1)) for k, v in values.items()}
            rows.append({"candidates": label, "feedback": name, **gains})

    best_of = f"Best of {cfg.num_candidates} (of {len(NOISE_SCALES)} under noised references)"
    text = [f"{best_of} by a feedback minus their mean; {len(truth)} validation objects."]
    text += ["", "| candidates | best by | " + " | ".join(METRICS) + " |", "|---" * (2 + len(METRICS)) + "|"]
    for row in rows:
        cells = ("{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row[k]) for k in METRICS)
        text.append(f"| {row['candidates']} | {row['feedback']} | {' | '.join(cells)} |")
    text += ["", "Standard deviation of the reward among a reference's candidates, mean over references:"]
    text += ["", "| candidates | " + " | ".join(cfg.feedbacks) + " |"]
    text += ["|---" * (1 + len(cfg.feedbacks)) + "|"]
    for row in spreads:
        text.append(f"| {row['candidates']} | " + " | ".join(f"{row[k]:.3f}" for k in cfg.feedbacks) + " |")
    write_atomic(table, lambda p: p.write_text("\n".join(text) + "\n"))
    result = {**provenance(cfg), "rows": rows, "spread": spreads}
    save_json(numbers, result)
    print("\n".join(text))
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
