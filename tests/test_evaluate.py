"""Tables, pictures and the command line: what is compared, what is refused, what is never overwritten."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import evaluate
import metrics
from common import InputError, digest, load_json, save_json
from data import SPLITS, VIEWS, make_toys, write_views
from grid import grid
from model import ModelConfig, MultiViewUNet
from sample import sample_images
from scorer import small_scorer


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def toys() -> torch.Tensor:  # (18, V, 3, 64, 64): more than `measure` takes at a time
    return make_toys(18, 64, SPLITS["validation"]).float() / 255


class Judge:
    """Stands for a scorer: how far is each view from the reference?"""

    def score(self, ref: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        return (views - ref[:, None]).square().mean((2, 3, 4))  # 0 for the reference's own view


JUDGES = {"contrastive": Judge()}

# --- numbers ---


def test_measure_by_view_and_by_part(toys) -> None:
    images = toys.clone()
    images[:, 1:] = 1.0  # the reference's view is right, the others are white
    images[3] = toys[3]
    got = evaluate.measure(images, toys, toys[:, 0], JUDGES, lambda x, y: (x - y).abs().mean((1, 2, 3)))  # pyright: ignore
    plain = ["psnr", "psnr_unseen", "ssim", "ssim_unseen", "lpips", "lpips_unseen"]
    plain += ["silhouette", "silhouette_unseen"]
    geometry = ["row", "mirror", "width", "hull", "geometry", "contradiction", "covered"]
    assert list(got) == [*plain, *geometry, "contrastive"]
    white = metrics.psnr(torch.ones(4, 3, 64, 64), toys[17, 1:])
    exact = metrics.psnr(toys[:1], toys[:1]).item()
    assert got["psnr_unseen"][17].item() == pytest.approx(white.mean().item())
    assert got["psnr"][17].item() == pytest.approx((white.sum().item() + exact) / 5)
    assert torch.allclose(got["lpips"] * 5, got["lpips_unseen"] * 4)
    assert got["silhouette_unseen"].tolist() == [0.0] * 3 + [1.0] + [0.0] * 14
    assert got["silhouette"].tolist() == pytest.approx([0.2] * 3 + [1.0] + [0.2] * 14)
    assert got["contradiction"].tolist() == [1.0] * 3 + [0.0] + [1.0] * 14
    assert got["covered"].nonzero().tolist() == [[3]]
    assert torch.equal(got["hull"], metrics.hull_iou(images).double())
    assert got["geometry"][3] > 0.99 and got["geometry"].sum() < 1.01
    want = (images - toys[:, :1]).square().mean((2, 3, 4))[:, 1:].sum(1)
    assert torch.allclose(got["contrastive"].float(), want)
    images[:, 0] = 0.5  # it is the reference that counts, not what the model made of it
    moved = evaluate.measure(images, toys, toys[:, 0], JUDGES)  # pyright: ignore
    assert torch.equal(moved["contrastive"], got["contrastive"])
    images[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        evaluate.measure(images, toys, toys[:, 0])


def test_other_sizes_take_their_thresholds_from_the_truth() -> None:
    truth = make_toys(20, 32, SPLITS["validation"]).float() / 255
    lower = truth.clone()
    lower[:, 1] = truth[:, 1].roll(2, -2)
    for images, against, low, high in [
        (truth, truth, 0, 0.15),
        (lower, truth, 0.9, 1),
        (lower, lower, 0, 0.15),
    ]:
        rate = evaluate.measure(images, against, against[:, 0])["contradiction"].mean().item()
        assert low <= rate <= high


@pytest.mark.parametrize("size, asked", [(32, 1), (64, 0), (96, 1)])
def test_thresholds_are_known_for_64_pixels_alone(size, asked, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(evaluate.metrics, "truth_thresholds", lambda _: made.append(1) or metrics.THRESHOLDS)
    truth = rand(1, 5, 3, size, size)
    evaluate.measure(truth, truth, truth[:, 0])
    assert len(made) == asked


def test_an_interval_draws_seeds_and_objects_apart() -> None:
    values = rand(3, 5) + torch.arange(3)[:, None]
    got = evaluate.with_interval(values, "mean")
    assert got["mean"] == pytest.approx(values.mean().item())
    assert (got["low"], got["high"]) == metrics.bootstrap_interval(values)
    alike = evaluate.with_interval(values.flatten(), "mean")
    assert got["high"] - got["low"] > 1.5 * (alike["high"] - alike["low"])


def test_before_after_and_its_lines(toys, capsys) -> None:
    truth = toys[:6]
    before, after = truth * 0.8 + 0.2, truth * 0.9 + 0.1
    table = evaluate.before_after(before, after, truth, JUDGES)  # pyright: ignore
    old, new = (evaluate.measure(x, truth, truth[:, 0], JUDGES) for x in (before, after))  # pyright: ignore
    judged = [x["contrastive"].mean().item() for x in (old, new)]  # against the reference, not its own front
    assert [table["contrastive"][k] for k in ("before", "after")] == pytest.approx(judged)
    old, new = old["psnr_unseen"], new["psnr_unseen"]
    means = {"before": old.mean().item(), "after": new.mean().item(), "difference": (new - old).mean().item()}
    row = table["psnr_unseen"]
    assert {k: row[k] for k in means} == pytest.approx(means) and row["difference"] > 5
    assert (row["low"], row["high"]) == metrics.bootstrap_interval(new - old)
    change = (after - before).abs()
    want = {"grey_levels": change.mean().item() * 255, "psnr": metrics.psnr(before, after).mean().item()}
    want |= {"share": (change.amax(2) > 8 / 255).float().mean().item()}
    assert table["change"] == pytest.approx(want)
    evaluate.print_table(table, "contrastive")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 14 and all(len(line) <= 110 for line in lines)
    assert [line.split()[0] for line in lines if "feedback itself" in line] == ["contrastive"]
    shown = next(line for line in lines if line.startswith("psnr_unseen")).split()
    assert [float(x) for x in shown[1:4]] == pytest.approx(list(means.values()), abs=1e-4)
    assert any(line.startswith("contradiction") for line in lines) and "grey levels" in lines[-1]
    assert f" {100 * table['change']['share']:.0f} % of pixels" in lines[-1]


def test_before_after_of_a_metric_of_ones_own(toys) -> None:
    truth = toys[:6]
    before, after = truth * 0.8 + 0.2, truth * 0.9 + 0.1
    mine = lambda views, true: (255 * (views - true).abs().sum()).long()  # noqa: E731  (a count is no float)
    more = {"mine": mine, "psnr": lambda views, true: views[0, 0, 0, 0]}
    table = evaluate.before_after(before, after, truth, more=more)
    for name, images in (("before", before), ("after", after)):
        own = [mine(x, y).item() for x, y in zip(images, truth)]
        assert table["mine"][name] == pytest.approx(sum(own) / 6)
    assert table["psnr"]["after"] > table["psnr"]["before"] > 5  # its own, not the one named so


def test_markdown_hides_columns_with_view_0() -> None:
    ours, white = {"psnr": 9, "psnr_unseen": 12.345, "hull": 0.5}, {"psnr_unseen": 1, "hull": 0}
    text = evaluate.markdown({"ours": ours, "white": white})
    assert [c.strip() for c in text.splitlines()[0].split("|")] == ["", "", "psnr_unseen", "hull", ""]
    assert [c.strip() for c in text.splitlines()[2].split("|")] == ["", "ours", "12.35", "0.5000", ""]
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_grid_shows_each_image_where_it_belongs(tmp_path, monkeypatch) -> None:
    images, labels, write = rand(3, 5, 3, 64, 64), [], ImageDraw.ImageDraw.text
    spy = lambda d, at, text, **k: labels.append((at[0], text)) or write(d, at, text, **k)  # noqa: E731
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    grid(tmp_path / "grid.png", {"truth": images, "ours": images.flip(0)[:2]}, images[:, 0])
    picture = np.asarray(Image.open(tmp_path / "grid.png")).astype(float) / 255
    assert picture.shape == (64 + 3 * 128, 128 + 2 * (12 + 5 * 128), 3)

    def at(row: int, x: int) -> torch.Tensor:
        return torch.tensor(picture[64 + row * 128 :, x:][:128:2, :128:2]).permute(2, 0, 1).float()

    torch.testing.assert_close(at(1, 0), images[1, 0], atol=0.003, rtol=0)  # the reference
    torch.testing.assert_close(at(1, 128 + 12 + 3 * 128), images[1, 3], atol=0.003, rtol=0)  # truth, left
    torch.testing.assert_close(at(0, picture.shape[1] - 128), images[2, 4], atol=0.003, rtol=0)  # ours, top
    written = [label for _, label in sorted(labels)]  # from left to right
    assert written == ["input", "front", "truth", *VIEWS, "ours", *VIEWS]
    grid(tmp_path / "shorter.png", {"ours": images[:2], "truth": images}, images[:, 0])  # it may be the first
    assert Image.open(tmp_path / "shorter.png").size == picture.shape[1::-1]
    grid(tmp_path / "96.png", {"truth": rand(1, 5, 3, 96, 96)}, rand(1, 3, 96, 96))  # twice, not once
    assert Image.open(tmp_path / "96.png").size == (192 + 12 + 5 * 192, 96 + 192)
    assert picture[:64].min() < 0.1 and picture[64 + 2 * 128 :, -640:].min() == 1  # labels; a shorter column


# --- command line ---


@pytest.fixture
def folder(tmp_path, toys) -> Path:
    for i, views in enumerate(toys[:3]):
        write_views(tmp_path / "data" / f"object{i}", views)
        write_views(tmp_path / "pale" / f"object{i}", views * 0.9 + 0.1)
    write_views(tmp_path / "pale" / "more", toys[3])
    return tmp_path


def config(folder: Path, **changes) -> evaluate.Config:
    data = str(folder / "data")
    base = evaluate.Config(images=data, data=data, split="all", out=str(folder / "a.json"), known_rows=False)
    return replace(base, **changes)


def test_folder_of_views(folder, capsys) -> None:
    cfg = config(folder, grid=str(folder / "a.png"), known_rows=True)
    rows = evaluate.main(cfg)["rows"]
    assert rows[cfg.images] == rows["truth"] and rows["truth"]["psnr"] == pytest.approx(58.92, abs=0.01)
    assert rows["all white"]["hull"] == 0 and rows["truth, shifted"]["contradiction"] == 1 and len(rows) == 10
    assert rows["reference copied"]["psnr"] > rows["reference copied"]["psnr_unseen"]
    assert (folder / "a.png").is_file() and "| truth, right_mirrored" in capsys.readouterr().out

    other = {"images": str(folder / "pale"), "against": cfg.out, "out": str(folder / "b.json")}
    pale = evaluate.main(config(folder, **other))
    own = pale["rows"][str(folder / "pale")]["psnr"]
    assert pale["difference"]["psnr"]["difference"] == pytest.approx(own - 58.9226, abs=1e-3)
    assert pale["difference"]["psnr"]["low"] <= own - 58.9226 <= pale["difference"]["psnr"]["high"] < -10
    written = json.loads((folder / "b.json").read_text())
    assert written["ids"] == ["object0", "object1", "object2"] and written["size"] == 64  # the pictures' own
    assert np.mean(written["objects"]["psnr"]) == pytest.approx(own)


def test_the_picture_shows_the_truth_and_beside_it_the_views(folder, toys, monkeypatch) -> None:
    shown: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(evaluate, "grid", lambda path, columns, ref: shown.update(columns))
    evaluate.main(config(folder, images=str(folder / "pale"), grid=str(folder / "a.png")))
    assert list(shown) == ["truth", "pale"] and torch.allclose(shown["truth"], toys[:3], atol=1e-3)
    assert torch.allclose(shown["pale"], toys[:3] * 0.9 + 0.1, atol=3e-3)


def test_a_column_of_scores_is_by_the_scorer_it_names(folder) -> None:
    for name in ("one", "two"):
        scorer = small_scorer("bilinear", 64, 16, 32, 1, 2)
        torch.nn.init.normal_(scorer.linear.weight)
        scorer.save(folder / name)
    one, two = str(folder / "one"), str(folder / "two")
    both, alone = (evaluate.main(config(folder, scorer=s))["objects"] for s in ((one, two), (two,)))
    assert both["contrastive"] != both["contrastive_two"] == alone["contrastive"]


def test_lpips_of_other_weights_is_not_compared(folder, monkeypatch) -> None:
    class StandIn(torch.nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().mean((1, 2, 3))

    first, network = config(folder, lpips="hub"), StandIn(2, 2)
    monkeypatch.setattr(evaluate.Lpips, "load", lambda *_: network)
    evaluate.main(first)
    again = replace(first, against=first.out, out=str(folder / "b.json"))
    assert "lpips" in evaluate.main(again)["difference"]
    network.reset_parameters()
    with pytest.raises(InputError, match="column lpips is by other weights"):
        evaluate.main(again)


def test_a_single_object_has_no_other(folder) -> None:
    rows = evaluate.main(config(folder, n=1, known_rows=True))["rows"]
    assert "truth, mirrored" in rows and not [name for name in rows if "other" in name]


def test_only_what_is_comparable_is_compared(folder, toys) -> None:
    for name in ("one", "two"):
        small_scorer("bilinear", 64, 16, 32, 1, 2).save(folder / name)
    for i in range(3):
        write_views(folder / "large" / f"object{i}", torch.ones(5, 3, 96, 96))
    first = config(folder, scorer=(str(folder / "one"),))
    evaluate.main(first)
    again = replace(first, against=first.out, out=str(folder / "b.json"))
    assert set(evaluate.main(again)["difference"]) >= {"psnr", "contrastive"}
    assert "contrastive" not in evaluate.main(replace(again, scorer=()))["difference"]
    stranger = folder / "stranger.json"
    save_json(stranger, {"ids": ["chair"], "objects": {}})
    save_json(folder / "odd.json", load_json(first.out) | {"objects": {"psnr": [[1.0]]}})
    for change, message in [
        ({"images": str(folder / "large"), "scorer": ()}, "made at 64 pixels, not 96"),
        ({"scorer": (str(folder / "two"),)}, "column contrastive is by other weights"),
        ({"n": 2}, "other objects"),
        ({"against": str(stranger)}, "not an evaluation"),
        ({"against": str(folder / "odd.json")}, "not an evaluation"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main(replace(again, **change))
    with pytest.raises(InputError, match="column contrastive is by other weights"):
        small_scorer("bilinear", 64, 16, 32, 1, 2).save(folder / "one")  # the same name, another scorer
        evaluate.main(again)
    mixed = torch.cat([toys[1, :1], toys[5, 1:]])
    for other in (mixed, toys[5]):  # the same name: other sides, another object
        write_views(folder / "data" / "object1", other)
        with pytest.raises(InputError, match="same names differ"):
            evaluate.main(again)


def test_model_over_seeds(tmp_path) -> None:
    torch.manual_seed(0)
    model = MultiViewUNet(ModelConfig(channels=32)).eval()
    model.save(tmp_path / "model")
    how = dict(data="toys", n=2, seed=3, seeds=2, num_steps=2, bf16="off", known_rows=False)
    how |= dict(model=str(tmp_path / "model"), out=str(tmp_path / "a.json"))
    cfg = evaluate.Config(**how)
    result = evaluate.main(cfg)
    psnr = torch.tensor(result["objects"]["psnr"])
    assert psnr.shape == (2, 2) and (psnr[0] != psnr[1]).all()
    assert result["weights"] == digest(tmp_path / "model")  # of what the numbers are
    assert result["rows"][cfg.model]["psnr"] == pytest.approx(psnr.mean().item()) and psnr.max() < 30
    truth = make_toys(2, 64, SPLITS["validation"]).float() / 255
    for row, seed in zip(psnr, (3, 4)):
        one = evaluate.measure(sample_images(model, truth[:, 0], seed, 2), truth, truth[:, 0])["psnr"]
        assert one.tolist() == pytest.approx(row.tolist(), abs=1e-4)

    again = replace(cfg, against=cfg.out, out=str(tmp_path / "b.json"))
    assert evaluate.main(again)["difference"]["psnr"]["low"] == 0
    earlier = load_json(cfg.out)  # one that was better by 0 and by 10 dB: seeds are in the interval, too
    earlier["objects"]["psnr"] = (psnr + torch.tensor([[0.0], [10.0]])).tolist()
    save_json(tmp_path / "c.json", earlier)
    d = evaluate.main(replace(again, against=str(tmp_path / "c.json")))["difference"]["psnr"]
    assert [d["difference"], d["low"], d["high"]] == pytest.approx([-5, -10, 0], abs=1e-3)
    for change in ({"seed": 1}, {"seeds": 1}, {"num_steps": 3}):
        with pytest.raises(InputError, match="sampled by"):
            evaluate.main(replace(again, **change))


@pytest.mark.parametrize("bf16", ["on", "off"])
def test_views_are_sampled_with_the_options_named(bf16, tmp_path, monkeypatch) -> None:
    asked, views, folder = [], rand(2, 5, 3, 64, 64), str(tmp_path / "model")
    monkeypatch.setattr(
        evaluate, "sample_images", lambda *a, label, **how: asked.append((a[2], how)) or views
    )
    MultiViewUNet(ModelConfig(channels=32)).save(folder)
    options = dict(num_steps=3, batch_size=5, bf16=bf16)
    evaluate.main(evaluate.Config(folder, data="toys", n=2, seed=6, known_rows=False, **options))
    assert asked == [(6, options | {"bf16": bf16 == "on"})]


def test_a_scorer_of_another_size_is_refused_before_sampling(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "sample_images", lambda *a, **how: pytest.fail("too late"))
    MultiViewUNet(ModelConfig(channels=32)).save(tmp_path / "model")
    small_scorer("bilinear", 32, 16, 32, 1, 2).save(tmp_path / "judge")
    options = dict(data="toys", n=2, scorer=(str(tmp_path / "judge"),))
    with pytest.raises(InputError, match="images of 64 x 64 px, expected 32 x 32"):
        evaluate.main(evaluate.Config(str(tmp_path / "model"), **options))


def test_nothing_is_overwritten(folder) -> None:
    data, model = folder / "data", folder / "model"
    MultiViewUNet(ModelConfig(channels=32)).save(model)
    earlier = config(folder, out=str(folder / "earlier.json"))
    evaluate.main(earlier)
    small_scorer("bilinear", 64, 16, 32, 1, 2).save(folder / "judge")
    save_json(folder / "notes.json", {"mine": 1})
    (folder / "file").write_text("a file")
    sampled = {"model": str(model), "images": "", "num_steps": 1}
    before = {p: digest(p) for p in folder.rglob("*") if p.is_file()}
    for change, message in [
        ({"out": str(model / "model.safetensors"), **sampled}, r"expected the name of a \.json"),
        ({"out": str(model / "config.json"), **sampled}, "--out .*is read"),
        ({"out": str(folder / "judge" / "a.json"), "scorer": (str(folder / "judge"),)}, "--out .*is read"),
        ({"out": str(data / "object0" / "top.png")}, r"expected the name of a \.json"),
        ({"out": str(folder / "notes.json")}, "is no evaluation"),
        ({"out": earlier.out, "against": earlier.out}, "is --against itself"),
        ({"out": str(data / ".." / "earlier.json"), "against": earlier.out}, "is --against itself"),
        ({"out": str(folder / "file" / "x.json")}, "cannot be written"),
        ({"out": str(folder / ("n" * 300 + ".json"))}, "cannot be written"),
        ({"out": ""}, r"expected the name of a \.json"),
        ({"grid": "g"}, r"expected the name of a \.png"),
        ({"grid": str(data / "object0" / "top.png")}, "--grid .*is read"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            evaluate.main(config(folder, **change))
        assert "\n" not in str(error.value)
    assert {p: digest(p) for p in before} == before


def test_wrong_input_is_one_line_before_any_work(folder) -> None:
    for name, missing in (("data2", "top"), ("data3", "")):
        (folder / name / "object7").mkdir(parents=True)
        for view in VIEWS:
            if view != missing:
                Image.new("RGB", (64, 64)).save(folder / name / "object7" / f"{view}.png")
    write_views(folder / "small" / "object7", torch.ones(5, 3, 16, 16))
    none, out = str(folder / "none"), folder / "o" / "x.json"
    for name in ("a/s", "b/s", "u"):
        small_scorer("bilinear", 64, 16, 32, 1, 2).save(folder / name)
    (folder / "t").symlink_to("a/s")
    one, name, same, other = (str(folder / place) for place in ("a/s", "b/s", "t", "u"))
    for change, message in [
        ({"images": ""}, "--model and --images"),
        ({"model": "m"}, "--model and --images"),
        ({"images": "", "model": none}, "none"),
        ({"images": none}, "no such folder"),
        ({"images": str(folder / "truth, shifted")}, "a known row has this name"),
        ({"images": str(folder / "data2")}, "no top; expected front"),
        ({"images": str(folder / "data3")}, r"lacks 3 objects of --data \(first: object0\)"),
        ({"data": none}, "no such folder"),
        (
            {"data": "toys"},
            "split all: unknown, expected one of train, preference, validation, heldout, or of a folder all",
        ),
        (
            {"data": "furniture"},
            "split all: unknown, expected one of train, preference, validation, heldout, or of a folder all",
        ),
        ({"n": 0}, "--n 0"),
        ({"seeds": 0}, "--seeds 0"),
        ({"seed": -1}, "--seed -1"),
        ({"images": str(folder / "small")}, "16 pixels, expected 32 or more"),
        ({"scorer": (none,)}, "none"),
        ({"scorer": (one, one)}, "two are one or have one name"),
        ({"scorer": (one, one, name)}, "two are one or have one name"),
        ({"scorer": (same, one, name)}, "two are one or have one name"),
        ({"scorer": (one, same)}, "two are one or have one name"),
        ({"scorer": (other, one, name)}, "two are one or have one name"),
        ({"lpips": none}, "--lpips"),
        ({"against": str(folder / "none.json")}, "not readable"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main(config(folder, **{"out": str(out), **change}))
    assert not out.parent.exists()
    for i, size in enumerate((32, 48)):  # 32 is the least for LPIPS; the first picture says the size
        write_views(folder / "sizes" / f"object{i}", torch.ones(5, 3, size, size))
    sizes = str(folder / "sizes")
    assert evaluate.main(config(folder, images=sizes, data=sizes))["size"] == 32
