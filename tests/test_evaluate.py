"""Metrics against scikit-image and hand-made voxel shapes; tables, pictures and the command line."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import data
import evaluate
from common import InputError, save_json
from model import ModelConfig, MultiViewUNet
from scorer import small_scorer


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def toys(n: int = 3, size: int = 64) -> torch.Tensor:  # (n, V, 3, size, size)
    return data.make_toys(n, size, data.SPLITS["validation"]).float() / 255


# --- images against the truth ---


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, a shift of a picture on white, and a render against itself with a small stain."""
    view = toys(2)[:, 0]
    stained = view[1:].clone()
    stained[:, :, 20:24, 20:24] = 0.5
    x = torch.cat([rand(1, 3, 64, 64), view[:1], view[1:]])
    return x, torch.cat([rand(1, 3, 64, 64, seed=1), view[:1].roll(1, -1), stained])


def test_ssim_equals_scikit_image() -> None:
    x, y = pairs()
    got = evaluate.ssim(x, y)
    for i in range(len(x)):
        a, b = (image[i].double().permute(1, 2, 0).numpy() for image in (x, y))
        _, full = structural_similarity(  # pyright: ignore[reportAssignmentType]
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            win_size=11,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
            full=True,
        )
        assert got[i].item() == pytest.approx(np.asarray(full)[5:-5, 5:-5].mean(), abs=1e-9)
    assert torch.allclose(evaluate.ssim(x, x), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_psnr_equals_scikit_image_and_is_capped() -> None:
    x, y = pairs()
    want = [
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1) for a, b in zip(x, y, strict=True)
    ]
    assert evaluate.psnr(x, y).tolist() == pytest.approx(want, abs=1e-9)
    assert evaluate.psnr(x, x).tolist() == pytest.approx([58.92] * 3, abs=0.01)
    rounded = (x * 255).round() / 255
    assert evaluate.psnr(x[:1], rounded[:1]).item() == pytest.approx(58.92, abs=0.1)
    assert torch.equal(evaluate.psnr(x, y[:1]), evaluate.psnr(x, y[:1].expand_as(x)))  # one truth, many candidates


def test_gmsd_against_its_definition() -> None:
    """Pixel by pixel in numpy; and more noise is worse."""
    x, y = pairs()
    for a, b, got in zip(x, y, evaluate.gmsd(x, y), strict=True):
        lengths = []
        for image in (a, b):
            grey = np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), 1)
            half = (grey[::2, ::2] + grey[1::2, ::2] + grey[::2, 1::2] + grey[1::2, 1::2]) / 4
            g = np.zeros((30, 30))
            for r in range(30):
                for c in range(30):
                    part = half[r : r + 3, c : c + 3]
                    across, down = part[:, 0].sum() - part[:, 2].sum(), part[0].sum() - part[2].sum()
                    g[r, c] = np.hypot(across, down) / 3
            lengths.append(g)
        g, h = lengths
        c = 170 / 255**2
        assert got.item() == pytest.approx(((2 * g * h + c) / (g**2 + h**2 + c)).std(), abs=1e-5)
    view, noise = toys(1)[:, 0], rand(1, 3, 64, 64)
    none, little, much = (evaluate.gmsd(view, view + scale * noise).item() for scale in (0, 0.1, 0.5))
    assert none == 0 < little < much


def write_lpips(folder) -> dict[str, torch.Tensor]:
    """Random weights under the published names; the heads are never negative there."""
    torch.manual_seed(0)
    trunk = {k: v for k, v in evaluate.Lpips().state_dict().items() if k.startswith("features.")}
    heads = {f"lin{i}.model.1.weight": rand(1, c, 1, 1, seed=i) for i, c in enumerate((64, 192, 384, 256, 256))}
    torch.save({**trunk, "classifier.1.weight": torch.zeros(2)}, folder / "alexnet-owt-7be5be79.pth")
    torch.save(heads, folder / "alex.pth")
    return {**trunk, **heads}


def lpips_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images by formula: noise, a ramp of colours mirrored, and the ramp with a tenth of noise."""
    up, right = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    ramp, noise = torch.stack([right, up, right * up]), rand(3, 64, 64)
    return torch.stack([noise, ramp, ramp]), torch.stack(
        [rand(3, 64, 64, seed=1), ramp.flip(-1), 0.9 * ramp + 0.1 * noise]
    )


def test_lpips_gives_the_published_packages_numbers(tmp_path) -> None:
    """What lpips 0.1.4 (PyPI) says of these images with these weights, recorded 2026-11-22."""
    trunk, heads = {}, {}
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    for i, (layer, shape) in enumerate(shapes.items()):  # by uniform numbers of a seed, in no module's own order
        bound = (6 / (shape[1] * shape[2] * shape[3])) ** 0.5
        trunk[f"features.{layer}.weight"] = (2 * rand(*shape, seed=i) - 1) * bound
        trunk[f"features.{layer}.bias"] = (2 * rand(shape[0], seed=10 + i) - 1) * 0.1
        heads[f"lin{i}.model.1.weight"] = rand(1, shape[0], 1, 1, seed=20 + i)
    torch.save(trunk, tmp_path / "alexnet-owt-7be5be79.pth")
    torch.save(heads, tmp_path / "alex.pth")
    distances = evaluate.Lpips.load(str(tmp_path))(*lpips_pairs())
    torch.testing.assert_close(distances, torch.tensor([0.850650, 1.395388, 0.0307796]), rtol=1e-4, atol=0)


@pytest.mark.weights
def test_lpips_with_the_published_weights() -> None:
    """The same package with its own weights. `LPIPS=FOLDER pytest -m weights`; else they come from the network."""
    lpips = evaluate.Lpips.load(os.environ.get("LPIPS", "hub"))
    distances = lpips(*lpips_pairs())
    torch.testing.assert_close(distances, torch.tensor([0.121430, 0.379979, 0.134329]), rtol=1e-4, atol=0)


def test_lpips_reads_the_published_files(tmp_path) -> None:
    weights = write_lpips(tmp_path)
    shapes = {i: tuple(weights[f"features.{i}.weight"].shape) for i in (0, 3, 6, 8, 10)}  # torchvision's AlexNet
    assert shapes == {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    lpips = evaluate.Lpips.load(str(tmp_path))
    x, y = pairs()
    d = lpips(x, y)
    assert (d > 0).all() and torch.equal(lpips(x, x), torch.zeros(3)) and torch.allclose(d, lpips(y, x), atol=1e-7)

    # All five layers written out by hand, without the stack's indices.
    total, a, b = torch.zeros(3), *((2 * z - 1 - lpips.shift) / lpips.scale for z in (x, y))
    for i, (name, stride, padding, pool) in enumerate(
        [(0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False)]
    ):
        w, bias = weights[f"features.{name}.weight"], weights[f"features.{name}.bias"]
        a, b = (F.relu(F.conv2d(F.max_pool2d(z, 3, 2) if pool else z, w, bias, stride, padding)) for z in (a, b))
        f, g = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
        total += ((f - g).square() * weights[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
    assert torch.allclose(d, total, rtol=1e-5)

    torch.save({}, tmp_path / "alex.pth")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="(?s)--lpips .*expected the published file"):
            evaluate.Lpips.load(str(folder))


# --- the views against each other ---

# Right and up of each image in world coordinates: the table of data.py written out once more, by hand.
AXES = {
    "front": ((1, 0, 0), (0, 1, 0)),
    "right": ((0, 0, -1), (0, 1, 0)),
    "back": ((-1, 0, 0), (0, 1, 0)),
    "left": ((0, 0, 1), (0, 1, 0)),
    "top": ((1, 0, 0), (0, 0, -1)),
}


def pixels(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Row and column, by view, of each voxel (x, y, z) of a cube."""
    axis = 2 * torch.arange(size) - size + 1  # centres of the cells, times two: -(size-1) .. size-1
    world = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)  # (x, y, z, 3)
    result = []
    for right, up in AXES.values():
        column = ((world * torch.tensor(right)).sum(-1) + size - 1) // 2
        row = (size - 1 - (world * torch.tensor(up)).sum(-1)) // 2
        result.append((row, column))
    return result


def project(voxels: torch.Tensor) -> torch.Tensor:  # (x, y, z) bool -> (V, 3, S, S), black on white
    views = torch.ones(5, 3, *voxels.shape[:2])
    for view, (row, column) in zip(views, pixels(len(voxels)), strict=True):
        view[:, row[voxels], column[voxels]] = 0
    return views


def shape(seed: int, size: int = 32) -> torch.Tensor:  # (x, y, z) bool
    """A few boxes anywhere: no symmetry."""
    voxels = torch.zeros(size, size, size, dtype=torch.bool)
    for low, high in (rand(4, 2, 3, seed=seed) * 0.5 + torch.tensor([[[0.1], [0.4]]])).mul(size).long().tolist():
        x, y, z = (slice(a, max(a + 1, b)) for a, b in zip(low, high, strict=True))
        voxels[x, y, z] = True
    return voxels


def test_hull_is_1_for_any_object_and_less_for_spoilt_views() -> None:
    views = torch.stack([project(shape(seed)) for seed in range(20)])
    assert evaluate.hull_iou(views).tolist() == [1.0] * 20
    for name, images in evaluate.corruptions(views):
        assert (evaluate.hull_iou(images) < 1).float().mean() >= 0.95, name
        assert evaluate.hull_iou(images).mean() < 0.96, name
    for m in range(5):  # whichever view is of another object
        mixed = views.clone()
        mixed[:, m] = views[:, m].roll(1, 0)
        assert (evaluate.hull_iou(mixed) < 1).all()
    assert evaluate.hull_iou(torch.ones_like(views[:1])).item() == 0  # no object at all
    assert evaluate.hull_iou(torch.zeros_like(views[:1])).item() == 1  # known: a filled frame is a consistent cube
    apart = torch.ones(1, 5, 3, 8, 8)
    apart[:, (0, 2), :, :2], apart[:, (1, 3), :, -2:], apart[:, 4, :, :2] = 0, 0, 0
    assert evaluate.hull_iou(apart).item() == 0  # silhouettes that share no row: an empty hull


def test_hull_equals_carving_voxels() -> None:
    views = torch.stack([project(shape(seed, 16)) for seed in range(5)])
    views[:, 1], views[:, 4] = views[:, 1].roll(1, 0), views[:, 4].roll(2, 0)  # inconsistent
    for object_views, got in zip(views, evaluate.hull_iou(views), strict=True):
        masks = evaluate.silhouettes(object_views)
        hull = torch.stack([m[row, column] for m, (row, column) in zip(masks, pixels(16), strict=True)]).all(0)
        drawn = evaluate.silhouettes(project(hull))
        iou = (drawn & masks).sum((1, 2)) / (drawn | masks).sum((1, 2))
        assert got.item() == pytest.approx(iou.mean().item(), abs=1e-6) and 0 < got < 1


def test_hull_tells_real_toys_from_spoilt_ones() -> None:
    truth = toys(24)
    hull = evaluate.hull_iou(truth)
    assert hull.min() > 0.9 and hull.mean() > 0.97
    for name, images in evaluate.corruptions(truth):
        assert images.shape == truth.shape and not torch.equal(images, truth)
        assert evaluate.hull_iou(images).mean() < hull.mean() - 0.002, name


# --- tables ---


def test_bootstrap_interval_covers_the_mean() -> None:
    samples = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) + 0.3
    hits = [low < 0.3 < high for low, high in (evaluate.bootstrap_interval(s, seed=1, n=500) for s in samples)]
    assert 0.88 <= sum(hits) / len(hits) <= 0.99
    low, high = evaluate.bootstrap_interval(samples[0], seed=1)
    assert (high - low) / 2 == pytest.approx(1.96 * samples[0].std().item() / 40**0.5, rel=0.1)
    assert evaluate.bootstrap_interval(torch.full((5,), 2.0)) == (2.0, 2.0)


def test_score_images_by_view_and_by_part(tmp_path) -> None:
    truth = toys(18)  # more than one part
    images = truth.clone()
    images[:, 1:] = 1.0  # the reference's view is right, the others are white
    scores = evaluate.score_images(images, truth, truth[:, 0])
    assert list(scores) == ["psnr", "psnr_unseen", "ssim", "ssim_unseen", "gmsd", "gmsd_unseen", "hull"]
    one = evaluate.psnr(torch.ones(4, 3, 64, 64), truth[17, 1:])
    assert scores["psnr_unseen"][17].item() == pytest.approx(one.mean().item())
    assert scores["psnr"][17].item() == pytest.approx(
        (one.sum().item() + evaluate.psnr(truth[:1], truth[:1]).item()) / 5
    )

    class Stub:
        def score(self, ref: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
            return (views - ref[:, None]).square().mean((2, 3, 4))  # 0 for the reference's own view

    write_lpips(tmp_path)
    lpips = evaluate.Lpips.load(str(tmp_path))
    more = evaluate.score_images(images[:2], truth[:2], truth[:2, 0], {"contrastive": Stub()}, lpips)  # pyright: ignore
    want = (1 - truth[:2, :1]).square().mean((1, 2, 3, 4)) * 4
    assert torch.allclose(more["contrastive"].float(), want) and torch.equal(more["hull"], scores["hull"][:2])
    assert torch.allclose(more["lpips"] * 5, more["lpips_unseen"] * 4, atol=1e-6)

    table = evaluate.markdown({"ours": evaluate.summary(more), "white": evaluate.summary(scores)})
    assert len(table.splitlines()) == 4 and len({line.count("|") for line in table.splitlines()}) == 1


def test_grid_shows_each_image_where_it_belongs(tmp_path) -> None:
    images = rand(3, 5, 3, 64, 64)
    evaluate.grid(tmp_path / "grid.png", {"truth": images, "ours": images.flip(0)[:2]}, images[:, 0])
    picture = np.asarray(Image.open(tmp_path / "grid.png")).astype(float) / 255
    assert picture.shape == (64 + 2 * 128, 128 + 2 * (12 + 5 * 128), 3)
    tile = picture[64 + 128 :, 128 + 12 + 3 * 128 :][:128:2, :128:2]  # second object, truth, left
    assert np.abs(tile - images[1, 3].permute(1, 2, 0).numpy()).max() < 0.003
    tile = picture[64:, -128:][:128:2, ::2]  # first row, ours, top
    assert np.abs(tile - images[2, 4].permute(1, 2, 0).numpy()).max() < 0.003
    assert picture[:64].min() < 0.1  # labels


# --- command line ---


@pytest.fixture
def folder(tmp_path):
    for i, views in enumerate(toys(3)):
        data.write_views(tmp_path / "data" / f"object{i}", views)
    return tmp_path


def test_folder_of_views(folder, capsys) -> None:
    common = {"data": str(folder / "data"), "split": "all", "size": 64, "device": "cpu"}
    cfg = evaluate.Config(images=str(folder / "data"), out=str(folder / "a.json"), grid=str(folder / "a.png"), **common)
    result = evaluate.main(cfg)
    assert result["rows"][cfg.images] == result["rows"]["truth"] and result["rows"]["truth"]["psnr"] == pytest.approx(
        58.92, abs=0.01
    )
    assert result["rows"]["all white"]["hull"] == 0 and len(result["rows"]) == 8 and (folder / "a.png").is_file()
    assert "| truth, right mirrored" in capsys.readouterr().out

    for i, views in enumerate(toys(3)):  # another model: paler, and with more objects than asked for
        data.write_views(folder / "pale" / f"object{i}", views * 0.9 + 0.1)
        data.write_views(folder / "pale" / f"other{i}", views)
    pale = evaluate.main(
        evaluate.Config(images=str(folder / "pale"), against=cfg.out, out=str(folder / "b.json"), **common)
    )
    assert -45 < pale["difference"]["psnr"]["low"] <= pale["difference"]["psnr"]["high"] < -10
    assert pale["difference"]["psnr"]["mean"] == pytest.approx(
        pale["rows"][str(folder / "pale")]["psnr"] - 58.9226, abs=1e-3
    )
    assert json.loads((folder / "b.json").read_text())["ids"] == ["object0", "object1", "object2"]


def test_only_what_is_comparable_is_compared(folder) -> None:
    small_scorer("bilinear", 64, 16, 32, 1, 2).save(folder / "one")
    small_scorer("bilinear", 64, 16, 32, 1, 2).save(folder / "two")
    common = {"data": str(folder / "data"), "images": str(folder / "data"), "split": "all", "known_rows": False}
    first = evaluate.Config(scorer=(str(folder / "one"),), out=str(folder / "a.json"), **common)
    assert evaluate.main(first)["size"] == 64  # the pictures' own
    again = replace(first, against=first.out, out=str(folder / "b.json"))
    assert set(evaluate.main(again)["difference"]) >= {"psnr", "contrastive"}
    with pytest.raises(InputError, match="made at 64 pixels, not 96"):
        evaluate.main(replace(again, size=96, scorer=()))
    with pytest.raises(InputError, match="column contrastive is another scorer's"):
        evaluate.main(replace(again, scorer=(str(folder / "two"),)))
    assert "contrastive" not in evaluate.main(replace(again, scorer=()))["difference"]


def test_model(tmp_path) -> None:
    torch.manual_seed(0)
    MultiViewUNet(ModelConfig(channels=(32, 32), depth=1)).save(tmp_path / "model")
    cfg = evaluate.Config(model=str(tmp_path / "model"), n=2, seeds=2, num_steps=2, out=str(tmp_path / "a.json"))
    result = evaluate.main(cfg)
    assert len(result["seeds"]) == 2 and result["seeds"][0] != result["seeds"][1]
    mean = sum(one["psnr"] for one in result["seeds"]) / 2
    assert result["rows"][cfg.model]["psnr"] == pytest.approx(mean) and mean < 30
    with pytest.raises(InputError, match="--size 32"):
        evaluate.main(evaluate.Config(model=cfg.model, size=32))


def test_wrong_input_is_one_line_before_any_work(folder) -> None:
    good = {
        "data": str(folder / "data"),
        "images": str(folder / "data"),
        "split": "all",
        "size": 64,
        "out": str(folder / "o" / "x.json"),
    }
    save_json(folder / "other.json", {"ids": ["chair"], "objects": {}})
    (folder / "data2" / "object0").mkdir(parents=True)
    (folder / "data3" / "object7").mkdir(parents=True)
    for view in data.VIEWS:
        Image.new("RGB", (64, 64)).save(folder / "data3" / "object7" / f"{view}.png")
        if view != "top":
            Image.new("RGB", (64, 64)).save(folder / "data2" / "object0" / f"{view}.png")
    for change, message in [
        ({"images": ""}, "--model and --images"),
        ({"model": "m"}, "--model and --images"),
        ({"images": "", "model": str(folder / "none")}, "none"),
        ({"images": str(folder / "none")}, "no such folder"),
        ({"images": str(folder / "data2")}, "expected top too"),
        ({"images": str(folder / "data3")}, r"3 objects of --data are missing \(first: object0\)"),
        ({"data": str(folder / "none")}, "no such folder"),
        ({"n": 0}, "at least 1"),
        ({"size": 16}, "at least 32"),
        ({"scorer": (str(folder / "none"),)}, "none"),
        ({"lpips": str(folder / "none")}, "--lpips"),
        ({"against": str(folder / "none.json")}, "not readable"),
        ({"against": str(folder / "other.json")}, "was not made on these 3 objects"),
        ({"images": str(folder / "none"), "size": 0}, "no such folder"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main(evaluate.Config(**{**good, **change}))
    assert not (folder / "o").exists()
