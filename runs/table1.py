"""What runs/table1.sh measured, as a table, a picture and curves.

Reads the evaluations OUT/eval/<row>_<seed>.json and the training logs OUT/seed0/<row>/log.jsonl. An object's number is
the mean over seeds, a row's the mean over objects; +- is the standard deviation between the seeds' means, and [a, b] a
95 % bootstrap interval over objects, of differences paired by object and noise.

Run:
    python -m runs.table1 --out out/table1 --results results/table1
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import cli, load_json, save_json, write_atomic
from data import load_views
from evaluate import bootstrap_interval, grid

ROWS = {  # file name -> label in the table
    "pre": "pre-trained",
    "sft_all": "SFT",
    "m_all": "MV-D3PO-M",
    "c_pre_all": "MV-D3PO-C (pre)",
    "c_all": "MV-D3PO-C",
    "c_nine_all": "MV-D3PO-C, nine candidates",
    "hull_all": "MV-D3PO, hull feedback (ours)",
    "ns_all": "control: the less noised reference wins",
    "sft": "attention layers: SFT",
    "sft_low": "attention layers: SFT, learning rate 2e-5",
    "m": "attention layers: MV-D3PO-M",
    "c_pre": "attention layers: MV-D3PO-C (pre)",
    "c": "attention layers: MV-D3PO-C",
    "hull": "attention layers: hull feedback",
    "independent": "independent views (Zero123-style), from a folder",
}
BASES = {  # differences are shown to these rows, for these rows
    "sft_all": ("pre", "m_all", "c_pre_all", "c_all", "c_nine_all", "hull_all", "ns_all", "independent"),
    "pre": tuple(row for row in ROWS if row != "pre"),
    "m_all": ("c_pre_all", "c_all", "c_nine_all", "hull_all", "ns_all"),
    "ns_all": ("c_pre_all", "c_all", "c_nine_all"),
    "c_all": ("c_pre_all", "c_nine_all"),
    "sft": ("pre", "sft_low", "m", "c_pre", "c", "hull"),
    "sft_low": ("m", "c_pre", "c", "hull"),
    "m": ("c_pre", "c", "hull"),
}
METRICS = {  # column -> heading, digits (of differences one more)
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS (lower is better)", 3),
    "gmsd": ("GMSD (lower is better)", 3),
    "contrastive": ("contrastive score", 2),
    "contrastive_scorer_pre": ("score of C (pre)", 2),
    "hull": ("silhouette consistency", 3),
}
FEEDBACK = {  # the column a row was trained on
    "c_pre_all": "contrastive_scorer_pre",
    "c_all": "contrastive",
    "c_nine_all": "contrastive",
    "hull_all": "hull",
    "c_pre": "contrastive_scorer_pre",
    "c": "contrastive",
    "hull": "hull",
}
SHOWN = ("sft_all", "m_all", "c_all", "ns_all")  # in the picture


@dataclass(frozen=True)
class Config:
    """Where the measurements are, and where the table goes."""

    out: str = "out/table1"
    results: str = "results/table1"


def read(out: Path, row: str, seeds: list[int]) -> dict[str, Tensor]:  # metric -> (seeds, N)
    """The numbers of every object and seed."""
    files = [load_json(out / "eval" / f"{row}_{seed}.json") for seed in seeds]
    return {k: torch.tensor([f["objects"][k] for f in files], dtype=torch.float64) for k in files[0]["objects"]}


def table(scores: dict[str, dict[str, Tensor]], names: list[str], known: dict[str, dict[str, float]]) -> list[str]:
    """Markdown lines: means +- spread between seeds, then the rows of known quality."""
    heads = [METRICS[n.removesuffix("_unseen")][0] for n in names]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(names) + 1) + "|"]
    for row, values in scores.items():
        cells = []
        for n in names:
            digits, seeds = METRICS[n.removesuffix("_unseen")][1], values[n].mean(1)
            spread = f" ± {seeds.std().item():.{digits}f}" if len(seeds) > 1 else ""
            cells.append(f"{seeds.mean().item():.{digits}f}{spread}{' *' * (FEEDBACK.get(row) == n)}")
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    for label, values in known.items():
        cells = [f"{values[n]:.{METRICS[n.removesuffix('_unseen')][1]}f}" for n in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def differences(scores: dict[str, dict[str, Tensor]], names: list[str], base: str) -> tuple[list[str], dict]:
    """Markdown lines and numbers: `base`, then others minus it, object by object. Bold: the interval leaves out 0."""
    lines, numbers = table({base: scores[base]}, names, {}), {}
    lines[0] = lines[0].replace("| |", "| the others minus the first row |", 1)
    for row in BASES[base]:
        if row not in scores:
            continue
        cells, numbers[row] = [], {}
        for n in names:
            digits = METRICS[n.removesuffix("_unseen")][1] + 1
            difference = scores[row][n].mean(0) - scores[base][n].mean(0)
            low, high = bootstrap_interval(difference)
            mean = difference.mean().item()
            numbers[row][n] = {"mean": mean, "low": low, "high": high}
            cell = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append((f"**{cell}**" if low > 0 or high < 0 else cell) + " *" * (FEEDBACK.get(row) == n))
        lines.append(f"| {ROWS[row]} | " + " | ".join(cells) + " |")
    return lines, numbers


def picture(cfg: Config, scores: dict[str, dict[str, Tensor]], ids: list[str]) -> list[int]:
    """grid.png: truth and the shown methods on the objects at fixed quantiles of SFT's PSNR of unseen views."""
    order = scores[SHOWN[0]]["psnr_unseen"].mean(0).argsort()
    chosen = [int(order[round(q * (len(order) - 1))]) for q in (0.95, 0.8, 0.65, 0.5, 0.35, 0.2, 0.05)]
    columns, size = {}, load_json(Path(cfg.out) / "eval" / "pre_0.json")["size"]
    for row, label in {"truth": "truth", **{row: ROWS[row] for row in SHOWN}}.items():
        folder = Path(cfg.out) / "images" / (row if row == "truth" else f"{row}_0")
        names, views = load_views(str(folder), size)
        columns[label] = torch.stack([torch.as_tensor(views[names.index(ids[i])]) for i in chosen]).float() / 255
    grid(Path(cfg.results) / "grid.png", columns, columns["truth"][:, 0])
    return chosen


def curves(cfg: Config) -> None:
    """curves.png: what training did, and whether the validation images followed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "margin": "margin of Eq. (2)",
        "accuracy": "share of pairs with positive margin",
        "loss_simple": "L_simple-MV on the preference objects",
        "grad_d3po": "gradient norm of Eq. (2)",
        "val_contrastive": "contrastive score, validation objects",
        "val_hull": "silhouette consistency, the same",
        "val_psnr_unseen": "PSNR of unseen views, the same",
    }
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.5), layout="constrained")
    methods = list(dict.fromkeys(row.removesuffix("_all") for row in ROWS))  # a colour each; attention layers: dashed
    style = {
        row: {"color": f"C{methods.index(row.removesuffix('_all'))}", "ls": "-" if row.endswith("_all") else "--"}
        for row in ROWS
    }
    logs = {}
    for row in ROWS:
        folder = Path(cfg.out) / "seed0" / row
        if (folder / "results.json").is_file():
            before = {f"val_{k}": v["before"] for k, v in load_json(folder / "results.json")["table"].items()}
            if FEEDBACK.get(row) == "contrastive_scorer_pre":  # another scorer: not on one axis with the others
                before.pop("val_contrastive", None)
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            logs[row] = [{"step": 0, **before}] + [
                {k: z[k] for k in z if k in before or k[:4] != "val_"} for z in lines
            ]
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=False):
        for row, lines in logs.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if any(value for _, value in points):  # SFT's gradient of Eq. (2) is 0 throughout
                axis.plot(*zip(*points, strict=True), label=ROWS[row], **style[row])
        axis.set(title=title, xlabel="step")
    axis = axes.flat[-1]
    for row, lines in logs.items():  # is the reward a measure of quality? one path through the plane by method
        points = [(z["val_contrastive"], z["val_psnr_unseen"]) for z in lines if "val_contrastive" in z]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", **style[row])
            axis.plot(*points[-1], "o", color=style[row]["color"])
    axis.set(title="reward against quality, dot: the end", xlabel="contrastive score", ylabel="PSNR of unseen views")
    figure.legend(*axes.flat[2].get_legend_handles_labels(), loc="outside lower center", ncols=4)  # has every row
    write_atomic(Path(cfg.results) / "curves.png", lambda p: figure.savefig(p, dpi=80, format="png"))
    plt.close(figure)


def main(cfg: Config) -> dict:
    """Write table.md, table.json, grid.png and curves.png."""
    out, results = Path(cfg.out), Path(cfg.results)
    present = [row for row in ROWS if (out / "eval" / f"{row}_0.json").is_file()]
    seeds = [s for s in range(10) if all((out / "eval" / f"{row}_{s}.json").is_file() for row in present)]
    scores = {row: read(out, row, seeds) for row in present}
    first = load_json(out / "eval" / "pre_0.json")
    known = {k: v for k, v in first["rows"].items() if k != first["config"]["model"]}
    chosen = picture(cfg, scores, first["ids"])
    curves(cfg)

    columns = [k for k in METRICS if all(k in values for values in scores.values())]
    unseen = [f"{k}_unseen" if f"{k}_unseen" in scores["pre"] else k for k in columns]
    text = [
        f"{len(first['ids'])} held-out objects, {len(seeds)} seeds "
        "(of candidates, batches, samples; scorers are shared).",
        "± is the standard deviation between seeds, [a, b] a 95 % bootstrap interval over objects; bold: without 0.",
        "\\* the row's own feedback. Silhouette consistency is of all five views in every table.",
        f"`bash runs/table1.sh`; {first['hardware']}, {first['config']['num_steps']} network calls a sample.",
        "",
        "**The four unseen views**",
    ]
    numbers: dict[str, dict] = {}
    for base in BASES:
        lines, numbers[base] = differences(scores, unseen, base)
        text += ["", *lines]
    text += ["", *table(scores, unseen, known)]
    text += ["", "**All five views**, the copy of the reference included", "", *table(scores, columns, known)]
    names = ", ".join(first["ids"][i] for i in chosen)
    text += ["", f"`grid.png`: the objects at the 95, 80, 65, 50, 35, 20 and 5 % quantiles of SFT's PSNR ({names})."]
    write_atomic(results / "table.md", lambda p: p.write_text("\n".join(text) + "\n"))
    rows = {row: {k: v.mean(1).tolist() for k, v in values.items()} for row, values in scores.items()}
    result = {"rows": rows, "known": known, "differences": numbers, "objects_in_grid": chosen}
    save_json(results / "table.json", result)
    print("\n".join(text))
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
