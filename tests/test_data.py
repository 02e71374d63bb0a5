"""Cameras, relative frame, toys: a known point lands where projection says, and views of one object agree."""

import pytest
import torch

import data
from common import key_seed

torch.set_num_threads(1)
SIZE = 32


@pytest.fixture(scope="module")
def toys() -> torch.Tensor:
    return data.make_toys(16, SIZE, seed=7)


def mask(images: torch.Tensor) -> torch.Tensor:  # (..., 3, H, W) -> (..., H, W)
    return images.amin(-3) < 0.9 * 255


def test_known_point_lands_where_projection_says():
    point = (0.3, -0.5, 0.7)  # all different and signed: a swapped or mirrored axis moves it
    small = data.pack([data.ball(point, (0.06, 0.06, 0.06), (0.0, 0.0, 0.0))])
    views = data.render_primitives([small], 64, antialias=4)[0]
    pixel, depth = data.project(torch.tensor(point), 64)
    for v in range(5):
        rows, columns = mask(views[v]).nonzero().float().add(0.5).unbind(1)
        assert torch.allclose(torch.stack([columns.mean(), rows.mean()]), pixel[v], atol=0.3), data.VIEWS[v]
    # By hand: in the right view the camera stands on +X and sees -Z on its right.
    assert pixel[1].tolist() == pytest.approx([(-0.7 * 0.5 + 0.5) * 64, (0.5 * 0.5 + 0.5) * 64], abs=1e-4)
    assert depth.tolist() == pytest.approx([0.7, 0.3, -0.7, -0.3, -0.5])


def test_silhouettes_of_opposite_sides_are_mirrored_and_rows_are_shared(toys):
    m = mask(toys)
    assert (m[:, 0] ^ m[:, 2].flip(-1)).float().mean() < 1e-3
    assert (m[:, 1] ^ m[:, 3].flip(-1)).float().mean() < 1e-3
    rows = m[:, :4].any(-1)
    assert (rows ^ rows[:, :1]).float().mean() < 5e-3
    assert (m[:, 0] ^ m[:, 1]).float().mean() > 0.01  # and the two pairs do differ


@pytest.mark.parametrize("r", range(4))
def test_relative_views_equal_the_turned_object(r):
    parts = data.pack(data.make_toy(key_seed(7, 3)))
    plain = data.render_primitives([parts], SIZE)[0]
    turn = data.rotation("y", -90.0 * r)  # side r comes to the front, the light comes along
    turned = {**parts, "center": parts["center"] @ turn.T, "turn": turn @ parts["turn"]}
    expected = data.render_primitives([turned], SIZE, light=turn @ data.LIGHT)[0]
    difference = (data.relative_views(plain, r).float() - expected.float()).abs()
    assert (difference > 3).float().mean() < 5e-3  # rounding moves a few pixels on edges
    if r:
        assert ((plain.float() - expected.float()).abs() > 3).float().mean() > 0.02


def test_object_is_independent_of_number_and_of_its_batch(toys):
    assert torch.equal(data.make_toys(5, SIZE, seed=7), toys[:5])
    alone = data.render_primitives([data.pack(data.make_toy(key_seed(7, 3)))], SIZE)[0]
    assert torch.equal(alone, toys[3])


def test_splits_share_no_object():
    assert len(set(data.SPLITS.values())) == 4
    objects = [data.make_toys(8, 16, s).flatten(1) for s in data.SPLITS.values()]
    assert len(torch.cat(objects).unique(dim=0)) == 32


def test_background_is_exactly_white_and_objects_are_large(toys):
    for corner in (toys[..., :1, :], toys[..., -1:, :], toys[..., :, :1], toys[..., :, -1:]):
        assert (corner == 255).all()
    extent = torch.stack([mask(toys).any(-1).sum(-1), mask(toys).any(-2).sum(-1)]).amax((0, 2))
    assert (extent >= 0.75 * SIZE).all()


def test_every_kind_fits_the_frame_and_is_drawn():
    seeds = range(len(data.KINDS))
    assert len({data.toy_kind(s) for s in seeds}) == len(data.KINDS) >= 8
    for s in seeds:
        p = data.pack(data.make_toy(s))
        assert (p["center"].abs().amax(0) < 0.9).all() and len(p["center"]) >= 3
