"""Metrics against scikit-image, scipy and recorded values; geometry against hand-made numbers and voxels."""

import os

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics
from common import InputError
from data import SPLITS, VIEWS, load_split, make_toys


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def toys(n: int = 3, size: int = 64) -> torch.Tensor:  # (n, V, 3, size, size)
    return make_toys(n, size, SPLITS["validation"]).float() / 255


def furniture(split: str) -> torch.Tensor:
    return load_split("furniture", split, 999, 64).float() / 255


# --- images against the truth ---


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, a shift of a picture on white, and a render against itself with a small stain."""
    view = toys(2)[:, 0]
    stained = view[1:].clone()
    stained[:, :, 20:24, 20:24] = 0.5
    x = torch.cat([rand(1, 3, 64, 64), view[:1], view[1:]])
    return x, torch.cat([rand(1, 3, 64, 64, seed=1), view[:1].roll(1, -1), stained])


def test_psnr_and_ssim_equal_scikit_image() -> None:
    x, y = pairs()
    for a, b, psnr, ssim in zip(x.double(), y.double(), metrics.psnr(x, y), metrics.ssim(x, y)):
        a, b = a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()
        how = dict(gaussian_weights=True, sigma=1.5, win_size=11, use_sample_covariance=False, full=True)
        full = structural_similarity(a, b, data_range=1, channel_axis=2, **how)[1]  # pyright: ignore
        assert ssim.item() == pytest.approx(np.asarray(full)[5:-5, 5:-5].mean(), abs=1e-9)
        assert psnr.item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
    assert torch.allclose(metrics.ssim(x, x), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert metrics.psnr(x, x).tolist() == pytest.approx([58.92] * 3, abs=0.01)  # capped
    one = y[:1]  # one truth, many candidates
    assert torch.equal(metrics.psnr(x, one), metrics.psnr(x, one.expand_as(x)))


def test_closeness_pools_the_unseen_views() -> None:
    truth = rand(5, 3, 8, 8) * 0.5
    images = truth.repeat(2, 1, 1, 1, 1)
    images[:, 0] += 0.4  # not looked at
    images[1, 2] += 0.2  # a mean squared error of .04 in one view of four
    assert metrics.closeness(images, truth).tolist() == pytest.approx([58.92, 20.0], abs=0.01)


def write_lpips(folder) -> None:
    """Random weights under the published names."""
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    shapes |= {10: (256, 256, 3, 3)}
    trunk, heads = {"classifier.1.weight": torch.zeros(2)}, {}  # the published file has more than is needed
    for i, (layer, shape) in enumerate(shapes.items()):  # uniform numbers of a seed, in no module's own order
        bound = (6 / (shape[1] * shape[2] * shape[3])) ** 0.5
        trunk[f"features.{layer}.weight"] = (2 * rand(*shape, seed=i) - 1) * bound
        trunk[f"features.{layer}.bias"] = (2 * rand(shape[0], seed=10 + i) - 1) * 0.1
        heads[f"lin{i}.model.1.weight"] = rand(1, shape[0], 1, 1, seed=20 + i)
    torch.save(trunk, folder / "alexnet-owt-7be5be79.pth")
    torch.save(heads, folder / "alex.pth")


def lpips_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images by formula: noise, a ramp of colours mirrored, and the ramp with a tenth of noise."""
    up, right = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    ramp, noise = torch.stack([right, up, right * up]), rand(3, 64, 64)
    changed = [rand(3, 64, 64, seed=1), ramp.flip(-1), 0.9 * ramp + 0.1 * noise]
    return torch.stack([noise, ramp, ramp]), torch.stack(changed)


def test_lpips_gives_the_published_packages_numbers(tmp_path) -> None:
    """What lpips 0.1.4 (PyPI) says of these images with these weights, recorded 2026-11-22."""
    write_lpips(tmp_path)
    lpips = metrics.Lpips.load(str(tmp_path))
    x, y = lpips_pairs()
    torch.testing.assert_close(lpips(x, y), torch.tensor([0.850650, 1.395388, 0.0307796]), rtol=1e-4, atol=0)
    assert torch.equal(lpips(x, x), torch.zeros(3))
    heads = torch.load(tmp_path / "alex.pth")
    heads["lin0.model.1.weight"][0, 3] = torch.nan  # one number of many
    torch.save(heads, tmp_path / "alex.pth")
    with pytest.raises(InputError, match="a weight is not finite"):
        metrics.Lpips.load(str(tmp_path))
    heads["lin0.model.1.weight"] = torch.ones(1, 64, 1, 1, dtype=torch.long)
    torch.save(heads, tmp_path / "alex.pth")
    with pytest.raises(InputError, match="a weight is no real number"):
        metrics.Lpips.load(str(tmp_path))
    torch.save({}, tmp_path / "alex.pth")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="(?s)--lpips .*expected the published file"):
            metrics.Lpips.load(str(folder))


@pytest.mark.weights
def test_lpips_with_the_published_weights() -> None:
    """The same package with its own weights. `LPIPS=FOLDER pytest -m weights`, or from the network."""
    lpips = metrics.Lpips.load(os.environ.get("LPIPS", "hub"))
    distances = lpips(*lpips_pairs())
    torch.testing.assert_close(distances, torch.tensor([0.121430, 0.379979, 0.134329]), rtol=1e-4, atol=0)


# --- the views against each other: by hand ---

# A box on a grid of 10: x 2..5, y 1..4 (rows 5..8), z 3. Rows and columns of each view, written down by hand
# from the cameras: right of front +X, of right -Z, of back -X, of left +Z, of top +X; up of top -Z.
BOX = {
    "front": (slice(5, 9), slice(2, 6)),
    "right": (slice(5, 9), slice(6, 7)),
    "back": (slice(5, 9), slice(4, 8)),
    "left": (slice(5, 9), slice(3, 4)),
    "top": (slice(3, 4), slice(2, 6)),
}
EMPTY = (slice(0), slice(0))


def draw(**changed: tuple[slice, slice]) -> torch.Tensor:  # (1, 5, 3, 10, 10)
    views = torch.ones(1, 5, 3, 10, 10)
    for v, (rows, columns) in enumerate((BOX | changed).values()):
        views[0, v, v % 3, rows, columns] = 0.5  # one dark channel is enough
    return views


def doubled(views: torch.Tensor) -> torch.Tensor:
    """Four pixels for each: a place along an axis counts with two."""
    return views.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(
    ("changed", "row", "mirror", "width", "hull"),
    [
        ({}, 1, 1, 1, 1),
        # back drawn as front, x 4..7: with the front 2 of 6 columns agree, with the top, too
        ({"back": BOX["front"]}, 1, (1 / 3 + 1) / 2, (1 / 3 + 1) / 2, (0.5 * 3 + 2) / 5),
        # right with its columns along +Z: z 6
        ({"right": BOX["left"]}, 1, 0.5, 0.5, 0),
        # top upside down: z 6, and the hull is empty
        ({"top": (slice(6, 7), slice(2, 6))}, 1, 1, 0.5, 0),
        # top mirrored: x 4..7
        ({"top": (slice(3, 4), slice(4, 8))}, 1, 1, (1 / 3 + 1) / 2, (0.5 * 3 + 2) / 5),
        # left one row lower: 3 of 5 rows agree; the hull has 3 of the 4 rows of each side
        ({"left": (slice(6, 10), slice(3, 4))}, 3 / 5, (1 + 3 / 5) / 2, 1, (4 * 3 / 4 + 1) / 5),
        # top wider, x 2..8: 4 of 7
        ({"top": (slice(3, 4), slice(2, 9))}, 1, 1, (4 / 7 + 1) / 2, (4 + 4 / 7) / 5),
        ({"top": EMPTY}, 1, 1, 0, 0),
        ({"right": EMPTY}, 0, 0.5, 0.5, 0),
        (dict.fromkeys(VIEWS, EMPTY), 0, 0, 0, 0),
    ],
)
def test_geometry_by_hand(changed, row, mirror, width, hull) -> None:
    views = doubled(draw(**changed))
    got = {name: check(views).item() for name, check in metrics.GEOMETRY.items()}
    assert got == pytest.approx({"row": row, "mirror": mirror, "width": width, "hull": hull}, abs=1e-6)


def test_a_single_pixel_occupies_no_row() -> None:
    views = doubled(draw())
    views[0, 1, :, 0, 0] = 0.5  # a speck in the right view, far from the object
    assert metrics.row_iou(views) == 1 and metrics.width_iou(views) == 1
    views[0, 1, :, 0, 1] = 0.5  # two pixels of one row: 8 rows of 9, and still no column
    assert metrics.row_iou(views) == pytest.approx(8 / 9) and metrics.width_iou(views) == 1


def test_silhouettes_lie_in_the_world() -> None:
    planes, cells = metrics.world_masks(draw()), {0: range(2, 6), 1: range(1, 5), 2: range(3, 4)}
    assert {plane: len(masks) for plane, masks in planes.items()} == {(0, 1): 2, (1, 2): 2, (0, 2): 1}
    for (i, j), masks in planes.items():
        want = torch.zeros(10, 10, dtype=torch.bool)
        want[cells[i].start : cells[i].stop, cells[j].start : cells[j].stop] = True
        assert all(torch.equal(mask, want) for mask in masks[:, 0])


def test_silhouettes_end_at_nine_tenths() -> None:
    views = torch.tensor([0.89, 0.91]).view(2, 1, 1, 1) * torch.ones(2, 3, 1, 1)
    assert metrics.silhouettes(views).flatten().tolist() == [True, False]


# Right and up of each image in world coordinates: the table of render.py written out once more, by hand.
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
    for view, (row, column) in zip(views, pixels(len(voxels))):
        view[:, row[voxels], column[voxels]] = 0
    return views


def shape(seed: int, size: int = 32) -> torch.Tensor:  # (x, y, z) bool
    """A few boxes anywhere: no symmetry."""
    voxels = torch.zeros(size, size, size, dtype=torch.bool)
    boxes = rand(4, 2, 3, seed=seed) * 0.5 + torch.tensor([[[0.1], [0.4]]])
    for low, high in boxes.mul(size).long().tolist():
        x, y, z = (slice(a, max(a + 1, b)) for a, b in zip(low, high))
        voxels[x, y, z] = True
    return voxels


def test_any_object_agrees_with_itself_and_a_view_of_another_does_not() -> None:
    views = doubled(torch.stack([project(shape(seed)) for seed in range(20)]))
    for check in metrics.GEOMETRY.values():
        assert check(views).tolist() == pytest.approx([1.0] * 20)
    assert not metrics.contradicts(views).any()
    for m in range(5):  # whichever view is of another object
        mixed = views.clone()
        mixed[:, m] = views[:, m].roll(1, 0)
        assert (metrics.hull_iou(mixed) < 1).all() and metrics.contradicts(mixed).float().mean() > 0.75


def test_silhouette_iou_by_hand() -> None:
    x, y = torch.ones(2, 2, 3, 4, 4)
    x[0, 1, :2], y[0, 2, 1:] = 0.0, 0.89  # 2 rows and 3, one in common, of other colours
    y[1, :, 0] = 0.91  # as good as white
    assert metrics.silhouette_iou(x, y).tolist() == [1 / 4, 0]
    assert metrics.silhouette_iou(x, x[0]).tolist() == [1, 0]


def test_hull_equals_carving_voxels() -> None:
    views = torch.stack([project(shape(seed, 16)) for seed in range(5)])
    views[:, 1], views[:, 4] = views[:, 1].roll(1, 0), views[:, 4].roll(2, 0)  # inconsistent
    for object_views, got in zip(views, metrics.hull_iou(views)):
        masks = metrics.silhouettes(object_views)
        hull = torch.stack([m[row, column] for m, (row, column) in zip(masks, pixels(16))]).all(0)
        drawn = metrics.silhouettes(project(hull))
        want = (drawn & masks).sum((1, 2)) / (drawn | masks).sum((1, 2))
        assert got.item() == pytest.approx(want.mean().item(), abs=1e-6) and 0 < got < 1


# --- contradiction, and geometry as a feedback ---


def test_thresholds_are_what_furniture_gives_and_truth_seldom_contradicts() -> None:
    assert metrics.truth_thresholds(furniture("train")) == pytest.approx(metrics.THRESHOLDS, abs=5.1e-4)
    validation = furniture("validation")
    assert metrics.contradicts(validation).sum() == 7  # of 64, as metrics.py says
    assert not metrics.contradicts(toys(12)).any()
    assert not metrics.no_object(validation).any()
    for name, views in metrics.spoilt_views(validation[:32]).items():
        assert metrics.contradicts(views).float().mean() >= (0.25 if name == "mirrored" else 0.6), name
        assert metrics.geometry(views, validation[:32, 0]).mean() < 0.97, name


def test_any_of_the_four_makes_a_contradiction() -> None:
    lower = doubled(draw(left=(slice(6, 10), slice(3, 4))))
    flipped = doubled(draw(top=(slice(6, 7), slice(2, 6))))
    nothing = dict.fromkeys(metrics.GEOMETRY, 0.0)
    assert not metrics.contradicts(torch.cat([lower, flipped]), nothing).any()
    for views, name, limit in [(lower, "row", 0.61), (lower, "mirror", 0.81), (flipped, "width", 0.51)]:
        assert metrics.contradicts(views, nothing | {name: limit}).all()
        assert not metrics.contradicts(views, nothing | {name: limit - 0.02}).any()
    assert metrics.contradicts(flipped, nothing | {"hull": 0.1}).all()


def test_no_trick_wins_as_feedback() -> None:
    truth = torch.cat([furniture("validation")[:24], toys(8)])
    ref = truth[:, 0]
    square, painted = torch.zeros_like(truth), torch.ones_like(truth)
    painted[..., 3:-3, 3:-3] = rand(*truth.shape[:3], 1, 1) * 0.8  # another colour in each view
    blank_right = truth.clone()
    blank_right[:, 1] = 1
    best = metrics.geometry(truth, ref)
    assert best.mean() > 0.97
    for name, views, most in [
        ("all white", torch.ones_like(truth), 0),
        ("a filled frame", square, 0),
        ("pure noise", rand(*truth.shape), 0),
        ("the reference copied", ref[:, None].expand_as(truth), 0),
        ("nearly copied", (ref[:, None] + 0.02 * (rand(*truth.shape) - 0.5)).clamp(0, 1), 0),
        ("a square", painted, 0.9),
        ("one empty view", blank_right, 0.5),
        ("a consistent other object", truth.roll(1, 0), 0.9),
    ]:
        got = metrics.geometry(views, ref)
        assert (got <= most).all() and (got < best - 0.05).all(), name
        if most == 0:
            assert metrics.contradicts(views).all(), name
    # known: a copy with noise of its own in each view is not found; an object of rotation may gain a little
    noisy = metrics.geometry((ref[:, None] + 0.2 * (rand(*truth.shape) - 0.5)).clamp(0, 1), ref)
    assert noisy.mean() < best.mean() - 0.08
    # another object, consistent in itself, has the share of the reference that it covers
    both = metrics.silhouettes(torch.stack([ref, ref.roll(1, 0)]))
    share = both.all(0).sum((1, 2)) / both.any(0).sum((1, 2))
    torch.testing.assert_close(metrics.geometry(truth.roll(1, 0), ref), best.roll(1) * share)
    three, same = truth[:3], ref[:1].expand(3, -1, -1, -1)
    assert torch.equal(metrics.geometry(three, ref[0]), metrics.geometry(three, same))


def test_limits_of_no_object() -> None:
    views = draw()
    assert not metrics.no_object(views)
    views[:, 3, :, :, 0] = views[:, 3, :, 1:9, 9] = 0  # 10 + 1 + 1 + 8 of the 40 pixels of four edges: half
    assert not metrics.no_object(views)
    views[:, 3, :, 9, 5] = 0
    assert metrics.no_object(views)
    for levels, want in ((7, True), (9, False)):  # four copies, one of them a little darker
        copies = draw()[:, :1].repeat(1, 5, 1, 1, 1)
        copies[:, 2] -= (metrics.silhouettes(copies[:, 2])[:, None] * levels) / 255
        assert metrics.no_object(copies).item() is want
    copies = draw()[:, :1].repeat(1, 5, 1, 1, 1)
    copies[:, 2, 0] -= metrics.silhouettes(copies[:, 2]) * 20 / 255  # one channel: 6.7 on average
    assert metrics.no_object(copies)
    copies[:, 2, 0] -= (
        metrics.silhouettes(copies[:, 2]) * 10 / 255
    )  # and another the other way: 20 of 2 channels
    copies[:, 2, 1] += metrics.silhouettes(copies[:, 2]) * 30 / 255
    assert not metrics.no_object(copies)


# --- how much changed, spoilt truth, intervals ---


def test_changes_by_hand() -> None:
    a = torch.full((2, 5, 3, 4, 4), 0.5)
    b = a.clone()
    b[0, 1, 0, :2] += 10 / 255  # 8 of 80 pixels, one channel of three
    b[1] += 8 / 255 - 1e-4
    assert metrics.grey_levels_changed(a, b).tolist() == pytest.approx([10 * 8 / 240, 7.9745], abs=1e-4)
    assert metrics.share_changed(a, b).tolist() == pytest.approx([0.1, 0])
    assert torch.equal(metrics.share_changed(b, a), metrics.share_changed(a, b))


def test_spoilt_views_are_spoilt_as_they_are_called() -> None:
    truth = (rand(3, 5, 3, 64, 64) * 255).byte()
    front, right, back, left, top = truth.unbind(1)
    want = {
        "other": torch.stack([front, *(v[[2, 0, 1]] for v in (right, back, left, top))], 1),
        "mirrored": torch.stack([front, *(v.flip(-1) for v in (right, back, left, top))], 1),
        "shifted": torch.stack([front, *(v.roll(3, 3) for v in (right, back, left, top))], 1),
        "swapped": torch.stack([front, back, right, left, top], 1),
        "right_mirrored": torch.stack([front, right.flip(-1), back, left, top], 1),
        "right_lower": torch.stack([front, right.roll(3, 2), back, left, top], 1),
    }
    before, got = truth.clone(), metrics.spoilt_views(truth)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert torch.equal(truth, before) and "other" not in metrics.spoilt_views(truth[:1])
    large = rand(1, 5, 3, 128, 128)  # as far as the object is large
    assert torch.equal(metrics.spoilt_views(large)["right_lower"][:, 1], large[:, 1].roll(6, -2))


def test_bootstrap_interval_covers_the_mean() -> None:
    samples = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) + 0.3
    hits = [low < 0.3 < high for low, high in (metrics.bootstrap_interval(s, seed=1, n=500) for s in samples)]
    assert 0.88 <= sum(hits) / len(hits) <= 0.99
    low, high = metrics.bootstrap_interval(samples[0], seed=1)
    assert (high - low) / 2 == pytest.approx(1.96 * samples[0].std().item() / 40**0.5, rel=0.1)
    again, other = (metrics.bootstrap_interval(samples[0], seed=seed) for seed in (1, 0))
    assert again == (low, high) != other
    assert metrics.bootstrap_interval(torch.full((5,), 2.0)) == pytest.approx((2.0, 2.0))


def test_two_way_bootstrap_equals_a_slow_loop() -> None:
    by_seed, by_object = (torch.Generator().manual_seed(seed) for seed in (2, 3))
    d = torch.randn(3, 1, generator=by_seed) + 0.3 * torch.randn(3, 12, generator=by_object)
    rng, means = np.random.default_rng(0), []
    for _ in range(10_000):  # seeds and objects crossed: every drawn object under every drawn seed
        means.append(d.numpy()[rng.integers(3, size=3)][:, rng.integers(12, size=12)].mean())
    got = metrics.bootstrap_interval(d)
    assert got == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    pooled = metrics.bootstrap_interval(d.flatten())
    assert got[1] - got[0] > 2 * (pooled[1] - pooled[0])  # to forget the seeds is to be too sure
    by_seed = torch.tensor([[0.0] * 6, [1.0] * 6])
    assert metrics.bootstrap_interval(by_seed) == pytest.approx((0, 1))  # 1 of 4 draws has no other seed
    assert metrics.bootstrap_interval(d[:1]) == pytest.approx(metrics.bootstrap_interval(d[0]), abs=0.03)


def test_colours_by_hand():
    ref, views = torch.ones(3, 4, 4), torch.ones(2, 5, 3, 4, 4)
    ref[0, :2] = 0.2  # half of red
    views[:, :, 0, :, :2] = 0.2  # the same, elsewhere
    assert torch.equal(metrics.colours(views, ref), torch.ones(2))
    views[1, 4, 1, 0] = 0.5  # a quarter of green in one of four views
    views[:, 0] = 0.0  # the reference's own view does not count
    found = metrics.colours(views, torch.stack([ref, ref]))
    torch.testing.assert_close(found, torch.tensor([1.0, 1 - 0.5 / 4 / 3 / 4]))
    torch.testing.assert_close(metrics.colours(views, ref), found)
    white = metrics.colours(torch.ones(1, 5, 3, 4, 4), ref)
    torch.testing.assert_close(white, torch.tensor([1 - 0.8 / 2 / 3]))
