"""Table 1 on furniture: every row trained and measured on held-out objects by other hands (paper Sec. 6).

One command does all of it, and goes on where it stopped: every stage is found by its content (cache.cached).
Rows share candidates; all but the two of 960 states have the same references, batches and steps. Only this
file, and evaluate.py if asked with --split heldout, looks at the held-out objects.

Run:
    python -m runs.table1                       # results/table1/{table.md, table.json, grid.png, curves.png}
    python -m runs.table1 --seeds 0 --results out/one    # one seed; two shells may share the work, then all

The rate of SFT is chosen with the first of --seeds: shells that share the work leave the row sft to the last.

Numbers are of the four unseen views where a metric has them. An interval is a 95 % bootstrap over seeds and
objects."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import train_d3po as D
import train_scorer as S
from cache import cached, code, machine
from candidates import draw_candidates
from common import InputError, check_at_least, check_output, cli, digest, get_device, hardware, key_seed
from common import load_json, load_tensors, located, provenance, save_json, save_tensors, write_atomic
from data import load_split
from evaluate import measure, with_interval
from grid import grid
from metrics import Lpips, grey_levels_changed
from model import load
from scorer import Scorer, contrastive_reward

FORWARD = {"loss": "diffusion_dpo"}
FRESH = {"num_references": 960, "steps": 240}
NOISED = {"candidates": "noised"}  # App. B
C = {"feedback": "contrastive"}
ONE_TOKEN = {  # the paper's e, and its negatives (Zero123-style, Sec. 5); f and other objects are ours
    "head": "bilinear",
    "texture": 0.0,
    "negatives": "checkpoints/objects_independent",
    "mismatch": 1.0,
}


class Row(NamedTuple):
    label: str
    options: dict[str, Any] = {}  # of train_d3po.py, where they are not at their defaults; none: not trained
    own: str = ""  # the column of its own reward
    control: str = ""  # the row of random preferences with its loss and candidates


ROWS = {
    "pre": Row("pre-trained"),
    "sft": Row("SFT", {"feedback": "none"}),
    # Eq. (2) on App. B's candidates: noise on the reference
    "noised_random": Row("control: random preferences, noised", {"feedback": "random", **NOISED}),
    "least_noise": Row("control: least noise", {"feedback": "least_noise", **NOISED}, "", "noised_random"),
    "m": Row("MV-D3PO-M", {"feedback": "matching", **NOISED}, "", "noised_random"),
    "c_pre": Row("MV-D3PO-C (pre)", {**C, **NOISED}, "contrastive_pre", "noised_random"),
    "c": Row("MV-D3PO-C", {**C, **NOISED}, "contrastive", "noised_random"),
    "c_epipolar": Row("MV-D3PO-C, epipolar lines (ours)", {**C, **NOISED}, "epipolar", "noised_random"),
    # Eq. (2) on branches: one action
    "random": Row("control: random preferences, branches", {"feedback": "random"}),
    "larger": Row("control: larger silhouettes, branches", {"feedback": "larger"}, "covered", "random"),
    "branch_epipolar": Row("C, epipolar lines (ours), branches", C, "epipolar", "random"),
    "geometry": Row("MV-D3PO, geometry (ours)", {"feedback": "geometry"}, "geometry", "random"),
    # the same from four times as many states, each seen twice, not four times
    "fresh_random": Row("control: random preferences, 960 branched states", {"feedback": "random", **FRESH}),
    "fresh_agreement": Row(
        "agreement (ours), 960 states", {"feedback": "agreement", **FRESH}, "", "fresh_random"
    ),
    "fresh_epipolar": Row("C, epipolar lines (ours), 960 states", {**C, **FRESH}, "epipolar", "fresh_random"),
}
FINISHED = {  # Diffusion-DPO on independent samples: name -> label, feedback, column of its reward
    "random": ("random preferences", "random", ""),
    "larger": ("larger silhouettes (control)", "larger", "covered"),
    "c": ("C", "contrastive", "contrastive"),
    "epipolar": ("C, epipolar lines (ours)", "contrastive", "epipolar"),
    "hull": ("hull (ours)", "hull", "hull"),
    "lean": ("geometry at equal size (ours)", "lean", ""),
    "geometry": ("geometry (ours)", "geometry", "geometry"),
    "colours": ("colours (ours)", "colours", ""),
    "agreement": ("geometry and colours (ours)", "agreement", ""),
}
# The start of a row's name -> the start of its label, options. Loose: the default KL, a quarter of the other.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward": ("Diffusion-DPO", {**FORWARD, "kl": 0.2}),
    "loose": ("Diffusion-DPO, --kl .05", FORWARD),
}
for kind, (how, options) in KINDS.items():
    for name, (label, feedback, own) in FINISHED.items():
        control = "" if name == "random" else f"{kind}_random"
        ROWS[f"{kind}_{name}"] = Row(f"{how}, {label}", {"feedback": feedback, **options}, own, control)
ROWS["best"] = Row("best of five by the scorer, no training", own="contrastive")
ROWS["truth"] = Row("ground truth")
METRICS = {  # column -> heading, digits, factor
    "psnr_unseen": ("PSNR, dB", 2, 1),
    "ssim_unseen": ("SSIM", 3, 1),
    "lpips_unseen": ("LPIPS (lower)", 3, 1),
    "silhouette_unseen": ("silhouette IoU with truth", 3, 1),
    "contradiction": ("contradictions, % (lower)", 1, 100),
    "geometry": ("geometry", 3, 1),
    "hull": ("hull IoU", 3, 1),
    "covered": ("silhouettes cover, %", 1, 100),
    "contrastive": ("contrastive score", 2, 1),
    "contrastive_pre": ("score of C (pre)", 2, 1),
    "epipolar": ("score of epipolar lines", 2, 1),
    "judge": ("score of a third scorer", 2, 1),
    "grey_levels": ("changed, grey levels", 1, 1),
}
BASES = {"pre": "pre-trained", "sft": "SFT", "random": "random preferences, same loss and candidates"}


@dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)  # of candidates, batches and samples; scorers are shared
    rows: tuple[str, ...] = tuple(ROWS)  # which rows
    rates: tuple[float, ...] = (5e-6, 2e-5, 5e-5, 1e-4)  # of SFT: the best on validation objects counts
    n: int = 96  # held-out objects
    lpips: str = ""  # "hub", or a folder with the two published files: adds that column
    out: str = "out/table1"  # where the runs go
    results: str = "results/table1"  # where the table goes
    bf16: Literal["auto", "on", "off"] = "auto"  # run networks in bfloat16; auto: where it is fast
    device: str = "auto"  # auto, cpu or cuda


def job(cfg: Config, **options: Any) -> D.Config:
    """The main job with some options."""
    return D.Config(out=cfg.out, device=cfg.device, bf16=cfg.bf16, **options)


def make_scorers(cfg: Config) -> dict[str, str]:
    """The paper's C and C (pre), ours, and a judge of no row: other seed, larger patches, no twins."""
    base = job(cfg)
    kinds: dict[str, dict[str, Any]] = {
        "contrastive": {"out": f"{cfg.out}/scorer", **ONE_TOKEN},
        "contrastive_pre": {**ONE_TOKEN, "out": f"{cfg.out}/scorer_pre", "negatives": base.model},
        "epipolar": {"out": f"{cfg.out}/scorer_epipolar"},
        "judge": {**ONE_TOKEN, "out": f"{cfg.out}/scorer_judge", "patch_size": 16, "twins": False, "seed": 1},
    }
    shared: dict[str, Any] = {"num_references": base.num_references, "num_steps": base.num_steps}
    shared |= {"device": cfg.device, "bf16": cfg.bf16}
    return {name: S.main(S.Config(**(shared | changes)))["folder"] for name, changes in kinds.items()}


def train_row(row: str, seed: int, scorers: dict[str, str], cfg: Config) -> Path:
    """The model of a row."""
    changes = ROWS[row].options
    if not changes:
        return located(job(cfg).model)
    scorer = scorers.get(ROWS[row].own, scorers["contrastive"])
    options = job(cfg, seed=seed, scorer=scorer, **changes)
    if row == "sft":  # its rate is chosen once, on validation objects
        tried = {rate: D.main(replace(options, seed=cfg.seeds[0], lr=rate))["table"] for rate in cfg.rates}
        options = replace(options, lr=max(tried, key=lambda rate: tried[rate]["psnr_unseen"]["after"]))
    else:
        options = replace(options, eval_objects=2)  # validation objects are for choices, and there is none
    return Path(D.main(options)["folder"])


def draw(row: str, model: Path, seed: int, truth: Tensor, scorers: dict[str, str], cfg: Config) -> Tensor:
    """The row's images of the held-out objects (N, V, 3, S, S), from the front view."""
    base, five, ref = job(cfg, seed=seed), job(cfg, seed=seed, **FORWARD), truth[:, 0]
    if row == "truth":
        return truth
    if row != "best":
        return D.draw_images(model, (ref * 255).round().to(torch.uint8), base)

    def make(folder: Path) -> None:  # of the five candidates of Diffusion-DPO the scorer takes one
        device, bf16 = hardware(base)
        policy, scorer = load(model, device, half=bf16), Scorer.load(scorers["contrastive"], device)
        chosen = []
        for i, y in enumerate(ref.to(device)):
            _, drawn = draw_candidates(policy, y[None], [key_seed(seed, i)], 0, five, bf16)
            rewards = contrastive_reward(scorer, y.expand(drawn.shape[1], -1, -1, -1), drawn[0])
            chosen.append(drawn[0, rewards.argmax()].cpu())
        images = (torch.stack(chosen) * 255).round().to(torch.uint8)
        save_tensors(folder / "images.safetensors", {"images": images})

    made_by = {"model": digest(model), "ref": digest(ref), "seed": seed, "num_steps": base.num_steps}
    made_by |= {"scorer": digest(Path(scorers["contrastive"])), "G": five.num_candidates}
    made_by |= {"code": code("candidates", "model", "sample", "scorer")}
    folder = cached(cfg.out, "heldout_best", made_by | machine(base), make)
    return load_tensors(folder / "images.safetensors")["images"].float() / 255


def markdown(rows: dict, columns: list[str], sign: str = "") -> list[str]:
    """A table: a row for each, with intervals; bold if an interval of a difference leaves out 0."""
    lines = ["| | " + " | ".join(METRICS[c][0] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, values in rows.items():
        cells = []
        for c in columns:
            _, digits, factor = METRICS[c]
            mean, low, high = (values[c][k] * factor for k in ("mean", "low", "high"))
            digits += bool(sign)
            cell = f"{mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
            cell = f"**{cell}**" if sign and low * high > 0 else cell
            cells.append(cell + " *" * (ROWS[row].own == c))
        lines.append(f"| {ROWS[row].label} | " + " | ".join(cells) + " |")
    return lines


def curves(path: Path, kls: dict[str, list[float]], measured: dict[str, dict[str, Tensor]]) -> None:
    """Each run's change of every judge over sqrt(KL to pi_pre), the fair axis for rows that drift.

    The KL is the one in the row's loss: of one denoising step for Eq. (2), crosses, of a noised candidate's
    prediction for Diffusion-DPO, dots and, with the smaller --kl, squares. Compare within a loss."""
    columns = [c for c in METRICS if c in measured["pre"] and c not in ("grey_levels", "ssim_unseen")]
    figure = Figure(figsize=(17, 7), layout="constrained")
    axes = figure.subplots(2, -(-len(columns) // 2), squeeze=False)
    rated = {r: "epipolar" if ROWS[r].own == "epipolar" else ROWS[r].options["feedback"] for r in kls}
    feedbacks = list(dict.fromkeys(rated.values()))
    for axis, c in zip(axes.flat, columns):
        means: dict[str, list[tuple[float, float]]] = {}  # a curve for each feedback of Diffusion-DPO
        for row, runs in kls.items():
            change = (measured[row][c] - measured["pre"][c]).mean(1) * METRICS[c][2]  # (seeds,)
            x, kind, feedback = [kl**0.5 for kl in runs], row.split("_")[0], rated[row]
            mark = {"forward": "o", "loose": "s"}.get(kind, "+" if row == "c_pre" else "x")
            axis.plot(x, change.tolist(), mark, color=f"C{feedbacks.index(feedback)}", label=feedback)
            if kind in KINDS:
                means.setdefault(feedback, []).append((sum(x) / len(x), change.mean().item()))
        for feedback, points in means.items():
            axis.plot(*zip(*points), "-", color=f"C{feedbacks.index(feedback)}")
        axis.axhline(0, color="grey", lw=0.5)
        axis.set_xscale("log")
        axis.set_xticks((0.3, 1, 3, 6), ("0.3", "1", "3", "6"))
        axis.minorticks_off()
        axis.set(title=METRICS[c][0], xlabel="sqrt(KL / nats)")
    lines = dict(zip(*axes.flat[0].get_legend_handles_labels()[::-1]))
    marks = "x Eq. (2), + with C (pre)'s scorer; o Diffusion-DPO, squares with --kl .05"
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), title=marks)
    figure.suptitle("minus pre-trained")
    write_atomic(path, lambda p: figure.savefig(p, dpi=80, format="png"))


def main(cfg: Config) -> dict:
    """Train, draw, measure, write."""
    check_at_least(cfg, 1, "n")
    check_at_least(cfg, 0, "rates")
    if "pre" not in cfg.rows or {*cfg.rows} - {*ROWS}:
        raise InputError(f"--rows {' '.join(cfg.rows)}: expected pre and others of {', '.join(ROWS)}.")
    seeds = ", ".join(map(str, cfg.seeds))
    if len(set(cfg.seeds)) < len(cfg.seeds):
        raise InputError(f"--seeds {seeds}: one is there twice, expected it once.")
    check_output("results", cfg.results)
    lpips = Lpips.load(cfg.lpips) if cfg.lpips else None
    scorers = make_scorers(cfg)
    judges = {name: Scorer.load(folder, get_device(cfg.device)) for name, folder in scorers.items()}
    truth = load_split("furniture", "heldout", cfg.n, judges["contrastive"].cfg.image_size).float() / 255

    measured: dict[str, dict[str, Tensor]] = {}  # row -> metric -> (seeds, N)
    first: dict[str, Tensor] = {}  # row -> images of the first seed
    kls: dict[str, list[float]] = {}  # row -> of each seed
    rate = 0.0  # the one chosen for SFT
    for row in cfg.rows:
        by_seed = []
        for seed in cfg.seeds:
            model = train_row(row, seed, scorers, cfg)
            images = draw(row, model, seed, truth, scorers, cfg)
            before = draw("pre", located(job(cfg).model), seed, truth, scorers, cfg)
            values = measure(images, truth, truth[:, 0], judges, lpips)
            by_seed.append(values | {"grey_levels": grey_levels_changed(images, before).double()})
            first.setdefault(row, images)
            rate = load_json(model / "made_by.json")["lr"] if row == "sft" else rate
            if ROWS[row].options and row != "sft":
                last = (model / "log.jsonl").read_text().splitlines()[-1]
                kls.setdefault(row, []).append(json.loads(last)["kl"])
        measured[row] = {k: torch.stack([v[k] for v in by_seed]) for k in by_seed[0]}

    columns = [c for c in METRICS if c in measured["pre"]]
    rows = {row: {c: with_interval(values[c], "mean") for c in columns} for row, values in measured.items()}
    minus: dict[str, dict] = {"pre": {}, "sft": {}, "random": {}}
    for row, values in measured.items():
        for name, base in (("pre", "pre"), ("sft", "sft"), ("random", ROWS[row].control)):
            if row not in (base, "pre", "truth") and base in measured:
                minus[name][row] = {c: with_interval(values[c] - measured[base][c], "mean") for c in columns}
    text = [f"{len(truth)} held-out objects, seeds {seeds}; [95 % interval over both]."]
    made = provenance(cfg)  # before the tree holds new results
    text += [f"\\* the row's own reward. `{made['command']}`.", "", *markdown(rows, columns)]
    for base, differences in {b: d for b, d in minus.items() if d}.items():
        title = f"**Minus {BASES[base]}** (bold: the interval leaves out 0)"
        text += ["", title, "", *markdown(differences, columns, "+")]
    results = Path(cfg.results)
    result = {**made, "rows": rows, "minus": minus, "kl": kls, "sft_rate": rate}
    save_json(results / "table.json", result)
    write_atomic(results / "table.md", lambda p: p.write_text("\n".join(text) + "\n"))
    # the first ten objects, as they come
    order = "truth pre forward_c forward_geometry branch_epipolar loose_epipolar loose_agreement".split()
    pictures = {ROWS[row].label: first[row][:10] for row in order if row in first}
    grid(results / "grid.png", pictures, truth[:10, 0], side=64)
    if kls:
        curves(results / "curves.png", kls, measured)
    print("\n".join(text))
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
