"""Table 1: how close are generated views to the truth, do they show one object? (paper Sec. 6, "Metrics")

In: a model, or a folder of views that any other model made. Out: a row of numbers (metrics.py explains each;
`contrastive` is the scorer's reward), rows of known quality, the difference from an earlier run. A metric is
taken on whole pictures, then averaged over views and objects. `_unseen` leaves out view 0, which shows the
reference and is easy to copy.

White background makes PSNR and SSIM look high. So the table shows the scale: truth, all white, the reference
copied into every view, and spoilt truth, which a judge of consistency must mark down. Geometry needs no
truth: an independent judge of every method but the one that used it as feedback.

Letters: N objects, V views, R sampler seeds, S side of a square picture. Images and truth are (N, V, 3, S, S)
in [0, 1], references (N, 3, S, S).

Run:
    python evaluate.py --model checkpoints/objects --out out/pre.json --grid out/pre.png
    python evaluate.py --model out/d3po_contrastive --scorer out/scorer --against out/pre.json
    python evaluate.py --images DIR --data renders     # any other model's views: DIR/<object>/{view}.png

    Writes --out (means by row, numbers of each seed and object, differences with intervals) and --grid.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from common import InputError, check_at_least, check_output, cli, digest, explained, hardware, load_json
from common import located, provenance, save_json
from data import in_memory, read_split
from grid import grid
from metrics import Lpips, bootstrap_interval, psnr, spoilt_views
from model import load
from pictures import load_views, open_image
from render import VIEWS
from sample import sample_images
from scorer import Scorer, contrastive_reward


@dataclass(frozen=True)
class Config:
    """Evaluate a model, or a folder of views that any other model made."""

    model: str = ""  # model folder to sample from
    images: str = ""  # or: folder of views, <object>/{front,right,back,left,top}.png, named as in --data
    data: str = "furniture"  # ground truth: furniture, toys, or a folder of renders in the same format
    split: Literal["all", "train", "preference", "validation", "heldout"] = "validation"  # tables: heldout
    n: int = 200  # objects, the first ones (paper: 200)
    seed: int = 0  # first seed of the sampler
    seeds: int = 1  # samples of each object, with seeds seed, seed + 1, ...
    num_steps: int = 10  # network calls a sample (paper: 50)
    batch_size: int = 8  # objects sampled at a time
    bf16: Literal["auto", "on", "off"] = "auto"  # sample in bfloat16: auto (where it is fast), on or off
    scorer: tuple[str, ...] = ()  # scorer folders: column contrastive, the others contrastive_<folder's name>
    lpips: str = ""  # "hub" (downloads 244 MB once), or a folder with alexnet-owt-7be5be79.pth and alex.pth
    known_rows: bool = True  # also measure truth, white, copied and spoilt views: the same for every model
    against: str = ""  # JSON file of an earlier run on the same objects: adds paired differences to it
    out: str = "out/evaluation.json"  # JSON file to write
    grid: str = ""  # picture of the first objects to write (PNG)
    device: str = "auto"  # auto, cpu or cuda


# --- numbers ---


def measure(
    images: Tensor,
    truth: Tensor,
    ref: Tensor,
    scorers: Mapping[str, Scorer] | None = None,  # column -> scorer
    lpips: Lpips | None = None,
) -> dict[str, Tensor]:  # name -> (N,)
    """One number an object and metric. FORK: another metric is another line here.

    Thresholds of contradiction are known for 64 pixels. At other sizes the truth of this call gives them."""
    if not torch.isfinite(images).all():
        raise InputError("the views hold numbers that are not finite, expected [0, 1]. The model diverged.")
    thresholds = metrics.THRESHOLDS if truth.shape[-1] == 64 else metrics.truth_thresholds(truth)
    compared = {"psnr": psnr, "ssim": metrics.ssim, "lpips": lpips, "silhouette": metrics.silhouette_iou}
    parts: list[dict[str, Tensor]] = []
    for i in range(0, len(images), 16):  # a few objects at a time: SSIM holds a dozen float64 copies
        x, y, reference = images[i : i + 16], truth[i : i + 16], ref[i : i + 16]
        part: dict[str, Tensor] = {}
        for name, metric in compared.items():
            if metric is not None:
                by_view = metric(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])  # (N, V)
                part[name], part[f"{name}_unseen"] = by_view.mean(1), by_view[:, 1:].mean(1)
        part |= {name: check(x) for name, check in metrics.GEOMETRY.items()}
        part["geometry"] = metrics.geometry(x, reference)
        part["contradiction"] = metrics.contradicts(x, thresholds)
        part["covered"] = metrics.covered(x)
        for name, scorer in (scorers or {}).items():
            part[name] = contrastive_reward(scorer, reference, x)
        parts.append({k: v.double().cpu() for k, v in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(measured: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over objects of each metric."""
    return {name: values.mean().item() for name, values in measured.items()}


def shown(names: Iterable[str]) -> list[str]:
    """What is printed: of two columns that differ by view 0, the unseen one."""
    every = list(names)
    return [name for name in every if f"{name}_unseen" not in every]


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table with a row for each entry and a column for each metric."""
    names, width = shown(next(iter(rows.values()))), max(len(label) for label in rows)
    lines = [f"| {'':{width}} | " + " | ".join(f"{k:>6}" for k in names) + " |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        cells = [f"{row[k]:{max(len(k), 6)}.{2 if 'psnr' in k else 4}f}" for k in names]
        lines.append(f"| {label:{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_interval(values: Tensor, name: str = "difference") -> dict[str, float]:  # (N,) or (R, N)
    """Mean, under this name, and 95 % interval over objects, and seeds."""
    low, high = bootstrap_interval(values)
    return {name: values.double().mean().item(), "low": low, "high": high}


def before_after(
    before: Tensor,
    after: Tensor,
    truth: Tensor,
    scorers: Mapping[str, Scorer] | None = None,
    more: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,  # of an object's views and truth
) -> dict[str, dict[str, float]]:  # metric -> before, after, difference, low, high
    """What training changed, at equal seeds. The entry `change`: how much of the pictures it changed.

    more: metrics that `measure` may lack."""
    old, new = (measure(images, truth, truth[:, 0], scorers) for images in (before, after))
    table = {}
    for name, metric in (more or {}).items():
        if name not in old:
            old[name], new[name] = (torch.stack([*map(metric, z, truth)]).double() for z in (before, after))
    for name in old:
        means = {"before": old[name].mean().item(), "after": new[name].mean().item()}
        table[name] = means | with_interval(new[name] - old[name])
    changes = {"grey_levels": metrics.grey_levels_changed, "share": metrics.share_changed, "psnr": psnr}
    return table | {"change": {name: f(before, after).mean().item() for name, f in changes.items()}}


def print_table(table: Mapping[str, Mapping[str, float]], feedback: str = "") -> None:
    """`before_after` in a dozen lines."""
    print(f"{'metric':<16}{'before':>9}{'after':>9}   difference, 95 % interval over objects")
    for name in shown(table):
        if name != "change":
            t, mark = table[name], " (the feedback itself)" if name == feedback else ""
            interval = f"{t['difference']:+.4f} [{t['low']:+.4f}, {t['high']:+.4f}]"
            print(f"{name:<16}{t['before']:>9.4f}{t['after']:>9.4f}   {interval}{mark}")
    c = table["change"]
    changed = f"{c['grey_levels']:.1f} of 255 grey levels, {100 * c['share']:.0f} % of pixels by more than 8"
    print(f"pictures changed by {changed}; PSNR(before, after) {c['psnr']:.1f} dB")


# --- command line ---


def read_views(folder: str, names: list[str], size: int) -> Tensor:  # (N, V, 3, size, size) in [0, 1]
    """The named objects of a folder."""
    ids, views = load_views(folder, size)
    if missing := [name for name in names if name not in ids]:
        lacks = f"{folder}: lacks {len(missing)} objects of --data (first: {missing[0]}), expected all"
        raise InputError(f"{lacks} {len(names)}. Make them, or choose another --n or --split.")
    return torch.stack([views[ids.index(n)] for n in tqdm(names, desc=folder, disable=None)]).float() / 255


def check_outputs(cfg: Config) -> None:
    """Nothing of the user's is overwritten, and what cannot be written is said before an hour of sampling."""
    named = (cfg.model, cfg.images, cfg.data, cfg.lpips, *cfg.scorer)
    inputs = [str(located(p)) for p in named if p and located(p).is_dir()]
    outputs = {"out": (cfg.out, ".json")} | ({"grid": (cfg.grid, ".png")} if cfg.grid else {})
    for option, (path, suffix) in outputs.items():
        name = f"--{option} {path}"
        if cfg.against and Path(path).resolve() == Path(cfg.against).resolve():
            raise InputError(f"{name}: is --against itself. Choose another name.")
        place = check_output(option, path, suffix, inputs)
        if option == "out" and place.exists():
            with explained(f"{name}: exists, and is no evaluation. Choose another name."):
                if not {"objects", "ids"} <= {*load_json(place)}:
                    raise ValueError("it lacks objects or ids")


def read_earlier(path: str, judged: Mapping[str, Any]) -> dict[str, Tensor]:  # metric -> (R, N)
    """The numbers of another run, whose objects, pictures, scorers and sampler must be equal to ours."""
    with explained(f"--against {path}: not an evaluation, expected a file that this script wrote."):
        other = load_json(path)
        remedies = {
            "ids": "it has other objects. Use equal --data, --split and --n",
            "size": f"made at {other['size']} pixels, not {judged['size']}. Compare equal sizes",
            "truth": "pictures of the same names differ there. Use that run's --data, or make that run again",
            "sampler": f"sampled by {other['sampler']}, not {judged['sampler']}. Use equal seeds and steps",
        }
        for key, remedy in remedies.items():
            unknown = key == "sampler" and None in (other[key], judged[key])  # pictures of --images
            if other[key] != judged[key] and not unknown:
                raise InputError(f"--against {path}: {remedy}.")
        for name in judged["judges"].keys() & other["judges"].keys():
            if judged["judges"][name] != other["judges"][name]:
                raise InputError(f"--against {path}: column {name} is by other weights there.")
        shape = (len(other["sampler"]["seeds"]) if other["sampler"] else 1, len(judged["ids"]))
        theirs = {k: torch.tensor(v, dtype=torch.float64) for k, v in other["objects"].items()}
        if not all(v.shape == shape and v.isfinite().all() for v in [theirs["psnr"], *theirs.values()]):
            raise ValueError(f"expected {shape[0]} x {shape[1]} finite numbers of each metric")
    return theirs


def main(cfg: Config) -> dict:
    """Read all that can be wrong, sample, measure, print the table, write the files."""
    if bool(cfg.model) == bool(cfg.images):
        raise InputError("got both or neither of --model and --images, expected one of them.")
    label = cfg.model or cfg.images
    if (name := Path(label).name) in ("truth", "all white", "reference copied") or name.startswith("truth, "):
        raise InputError(f"{label}: a known row has this name, expected another. Rename the folder.")
    check_at_least(cfg, 1, "n", "seeds", "num_steps", "batch_size")
    check_at_least(cfg, 0, "seed")
    device, bf16 = hardware(cfg)
    model = load(cfg.model, device, half=bf16) if cfg.model else None
    if model:
        size = model.cfg.image_size
    else:  # as the first picture of --images has them
        size = open_image(load_views(cfg.images, 0)[1].folders[0] / f"{VIEWS[0]}.png").shape[-1]
    if size < 32:
        raise InputError(f"{label}: views of {size} pixels, expected 32 or more.")
    columns = [f"contrastive_{Path(f).name}" if i else "contrastive" for i, f in enumerate(cfg.scorer)]
    if min(len(set(columns)), len(set(map(located, cfg.scorer)))) < len(columns):
        raise InputError(f"--scorer {' '.join(cfg.scorer)}: two are one or have one name, expected neither.")
    scorers = {name: Scorer.load(folder, device) for name, folder in zip(columns, cfg.scorer)}
    lpips = Lpips.load(cfg.lpips, device) if cfg.lpips else None
    ids, objects = read_split(cfg.data, cfg.split, cfg.n, size)
    truth = in_memory(objects).float() / 255
    ref = truth[:, 0]  # evaluation always takes the front
    for scorer in scorers.values():  # does it see images of this size?
        scorer.score(ref[:1], truth[:1])
    views = [] if model else [read_views(cfg.images, ids, size)]
    seeds = list(range(cfg.seed, cfg.seed + cfg.seeds))
    judges = {name: digest(Path(folder)) for name, folder in zip(scorers, cfg.scorer)}
    if lpips:
        judges["lpips"] = digest([*lpips.state_dict().values()])
    sampler = {"seeds": seeds, "num_steps": cfg.num_steps} if model else None
    judged = {"ids": ids, "size": size, "truth": digest(truth), "judges": judges, "sampler": sampler}
    earlier = read_earlier(cfg.against, judged) if cfg.against else {}
    check_outputs(cfg)

    if model:
        how = {"num_steps": cfg.num_steps, "batch_size": cfg.batch_size, "bf16": bf16}
        views = [sample_images(model, ref, seed, label=f"sample, seed {seed}", **how) for seed in seeds]
    by_seed = [measure(images, truth, ref, scorers, lpips) for images in views]
    measured = {name: torch.stack([one[name] for one in by_seed]) for name in by_seed[0]}  # (R, N) each
    rows = {label: summary(measured)}
    if cfg.known_rows:
        copied = ref[:, None].expand_as(truth)
        known = {"truth": truth, "all white": torch.ones_like(truth), "reference copied": copied}
        known |= {f"truth, {name}": spoilt for name, spoilt in spoilt_views(truth).items()}
        rows |= {name: summary(measure(x, truth, ref, scorers, lpips)) for name, x in known.items()}
    text = f"\n{len(ids)} objects, {len(views)} seed(s), {size} px\n\n{markdown(rows)}\n"
    objects = {name: values.tolist() for name, values in measured.items()}
    weights = digest(Path(cfg.model)) if model else ""
    result = {**provenance(cfg), **judged, "weights": weights, "rows": rows, "objects": objects}
    if cfg.against:
        both = [name for name in measured if name in earlier]
        result["difference"] = {name: with_interval(measured[name] - earlier[name]) for name in both}
        text += f"\nminus {cfg.against}, mean and 95 % interval over objects and seeds:\n"
        for name, d in result["difference"].items():
            text += f"    {name:16s} {d['difference']:+.4f}   [{d['low']:+.4f}, {d['high']:+.4f}]\n"
    if cfg.grid:
        grid(cfg.grid, {"truth": truth[:8], Path(label).name: views[0][:8]}, ref[:8])
    save_json(cfg.out, result)  # last: a resumed experiment takes it for a sign that all is there
    print(f"{text}\nwrote {cfg.out}" + f" and {cfg.grid}" * bool(cfg.grid))
    return result


if __name__ == "__main__":
    cli(main, Config, __doc__)
