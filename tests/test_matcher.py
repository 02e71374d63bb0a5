"""Matching feedback: many matches with a warped copy, few with another picture, none with a blank one."""

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import matcher
from common import InputError


@functools.cache
def toys(n: int = 3) -> torch.Tensor:  # (n, V, 3, 64, 64)
    """Toys of different kinds: two cars do share points."""
    return data.make_toys(5, 64, data.SPLITS["validation"])[[0, 1, 4][:n]].float() / 255


def warp(images: torch.Tensor) -> torch.Tensor:
    """3 degrees, 5 % larger, 3 % to the side, with less contrast."""
    angle = torch.tensor(3 * torch.pi / 180)
    theta = torch.stack(
        [angle.cos(), -angle.sin(), angle.new_tensor(0.06), angle.sin(), angle.cos(), angle * 0]
    )
    grid = F.affine_grid(theta.view(1, 2, 3).expand(len(images), 2, 3) / 1.05, list(images.shape), False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False) * 0.8 + 0.2


def test_large_images_stay_large_and_threads_are_given_back() -> None:
    assert matcher.to_grey(torch.rand(1, 3, 300, 300)).shape[-1] == 300
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        matcher.count_matches(torch.ones(3, 16, 16), torch.ones(1, 1, 3, 16, 16))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_warped_copy_many_other_object_few() -> None:
    ref = toys()[:, 0]
    other, blank = ref.roll(1, 0), torch.ones_like(ref)
    for y, views in zip(ref, torch.stack([ref, warp(ref), other, blank], 1)):
        same, warped, another, empty = matcher.count_matches(y, views[None])[0]
        assert same > 100 and same >= warped > 2 * another and empty == 0
    assert (matcher.count_matches(blank[0], toys()) == 0).all()  # a blank reference, too
    turned = matcher.count_matches(ref[0], ref[:1].rot90(1, (-2, -1))[None])  # all sides share "up"
    assert 10 * int(turned) < int(matcher.count_matches(ref[0], ref[None, :1]))


def test_reward_leaves_out_the_references_own_view() -> None:
    views, blank = toys(), toys().clone()
    blank[:, 0] = 1.0
    for i, ref in enumerate(views[:, 0]):
        counts, reward = matcher.count_matches(ref, views), matcher.matching_reward(ref, views)
        assert torch.equal(reward, counts[:, 1:].sum(1).float())
        assert torch.equal(matcher.matching_reward(ref, blank), reward)
        assert reward.argmax() == i and (reward == reward[i]).sum() == 1  # truth beats another object


def test_grey_weighs_the_colours_as_the_eye_does() -> None:
    """Against PIL's, which rounds: green is the brightest, blue the darkest."""
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (20, 90, 200)):
        image = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 8, 8) / 255
        grey = Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0))
        assert torch.allclose(matcher.to_grey(image) * 255, torch.tensor(float(grey)), atol=0.51)


def test_descriptors_are_those_of_keypoints_alone() -> None:
    """kornia fills up to 500 with rows whose response is zero."""
    toy = matcher.to_grey(toys(1)[0, :1])
    _, response, _ = matcher.sift_model(toy.device)(toy)
    assert 0 < len(matcher.describe(toy)) == (response > 0).sum() < 500
    assert len(matcher.describe(torch.ones_like(toy))) == 0


@pytest.mark.parametrize(("second", "matched"), [(12.0, 1), (11.0, 0)])
def test_a_match_is_plainly_nearer_than_the_second_nearest(second, matched, monkeypatch) -> None:
    """The nearest is 10 away: 10 / 12 is below the ratio of 0.85, 10 / 11 above it."""
    on_a_line = lambda *x: F.pad(torch.tensor(x)[:, None], (0, 127))  # noqa: E731
    monkeypatch.setattr(matcher, "describe", lambda view: on_a_line(10.0, -second))
    counts = matcher.sift_counts(on_a_line(0.0, 1000.0), torch.zeros(2, 1, 8, 8))
    assert counts.tolist() == [matched] * 2


def test_a_match_is_nearest_in_both_directions(monkeypatch) -> None:
    own, view = ([[0.0], [1.0], [9999.0]], [[0.0], [900.0]])  # two of ours are nearest to its first
    monkeypatch.setattr(matcher, "describe", lambda _: F.pad(torch.tensor(view), (0, 127)))
    assert matcher.sift_counts(F.pad(torch.tensor(own), (0, 127)), torch.zeros(1, 1, 8, 8)).tolist() == [1]


def test_batch_equals_one_by_one() -> None:
    views = toys()
    for ref in views[:2, 0]:  # features of one reference must not leak into the next
        batch = matcher.count_matches(ref, views)
        for i in range(3):
            for m in range(len(data.VIEWS)):
                assert matcher.count_matches(ref, views[i : i + 1, m : m + 1]) == batch[i, m]


def test_loftr_from_a_file_counts_pairs_in_a_batch(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = matcher.KF.LoFTR(pretrained=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "loftr.ckpt")
    monkeypatch.setattr(matcher, "MIN_SIZE", 64)
    views = toys(1)
    # Random weights are hardly ever confident: take what is nearest both ways, however far.
    loaded = matcher.loftr_model(str(tmp_path / "loftr.ckpt"), torch.device("cpu"))
    loaded.coarse_matching.thr = 0.0
    weights = str(tmp_path / "loftr.ckpt")
    same, other = matcher.count_matches(views[0, 0], views[:, :2], weights)[0]
    one = matcher.count_matches(views[0, 0], views[:, 1:2], weights)
    assert same > 0 and abs(int(one) - int(other)) <= 1
    matcher.loftr_model.cache_clear()


def test_loftr_computes_the_features_of_a_reference_once(monkeypatch) -> None:
    """With a stand-in that counts 10 times the reference's brightness plus the view's."""

    class StandIn:
        seen: list[int] = []

        def extract_features(self, image):
            self.seen.append(round(image.mean().item() * 10))
            return {"feature": image}

        def __call__(self, pairs):
            ref, views = pairs["features0"]["feature"], pairs["image1"]
            counts = (10 * ref.mean((1, 2, 3)) * 10 + views.mean((1, 2, 3)) * 10).round().long()
            return {"batch_indexes": torch.arange(len(counts)).repeat_interleave(counts)}

    stand_in = StandIn()
    monkeypatch.setattr(matcher, "loftr_model", lambda name, device: stand_in)
    grey = torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 8, 8) / 10
    views = grey[[1, 2, 4, 0]].unflatten(0, (2, 2))
    assert matcher.count_matches(grey[3], views, "loftr").tolist() == [[31, 32], [34, 30]]
    assert stand_in.seen == [3]  # not again for the second candidate
    assert matcher.count_matches(grey[5], views, "loftr").tolist() == [[51, 52], [54, 50]]
    assert stand_in.seen == [3, 5]  # but of another reference
    assert matcher.matching_reward(grey[3], views, "loftr").tolist() == [32, 30]
    assert matcher.count_matches(grey[0], views, "loftr").tolist() == [[1, 2], [4, 0]]  # the last has none


def test_missing_weights_and_wrong_names_are_one_line(tmp_path) -> None:
    views = toys(1)
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    state = matcher.KF.LoFTR(pretrained=None).state_dict()
    next(iter(state.values())).fill_(float("nan"))
    torch.save({"state_dict": state}, tmp_path / "nan.ckpt")
    for name in ("absent.ckpt", "broken.ckpt", "empty.ckpt", "nan.ckpt"):
        with pytest.raises(InputError, match="loftr_outdoor.ckpt.*--matcher.*sift"):
            matcher.count_matches(views[0, 0], views, str(tmp_path / name))
    with pytest.raises(InputError, match="matcher surf: expected sift, loftr or"):
        matcher.count_matches(views[0, 0], views, "surf")
    for ref, batch in ((views[:, 0], views), (views[0, 0], views[0])):
        with pytest.raises(InputError, match=r"expected \(3,H,W\) and \(G,V,3,H,W\)"):
            matcher.count_matches(ref, batch)


def test_loftr_offline_says_where_the_weights_go(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # Nobody listens: as if offline.
    monkeypatch.setattr(matcher, "LOFTR_URL", "http://localhost:9/loftr_outdoor.ckpt")
    monkeypatch.delenv("http_proxy", raising=False)
    with pytest.raises(InputError, match=f"Put it into {os.path.join(str(tmp_path), 'hub')}/checkpoints"):
        matcher.count_matches(toys(1)[0, 0], toys(1), "loftr")
