"""Eq. (2) and what surrounds it: candidates, preferences, log-ratios, the gradient of the sum, the stages, resuming."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Asked, random_model

import cache
import common
import feedback
import train_d3po as D
import train_scorer
from bench import random_batch
from candidates import draw_candidates
from common import InputError, load_json, load_tensors, located
from data import load_split, make_references, make_toys, stretch
from model import load
from sample import Schedule, log_prob, sample
from scorer import small_scorer

CPU = torch.device("cpu")
SMALL = dict(
    num_references=5,
    eval_objects=2,
    num_steps=5,
    trained_calls=(0, 2),
    num_candidates=3,
    batch_size=2,
    pairs="all",
)


def config(tmp_path, **changes) -> D.Config:
    if not (tmp_path / "pre").exists():
        random_model().save(tmp_path / "pre")
    where = dict(
        model=str(tmp_path / "pre"), out=str(tmp_path / "out"), data="toys", bf16="off", feedback="oracle"
    )
    options = {**SMALL, **where, "steps": 2, "batch_objects": 2, **changes}
    if options.get("candidates") == "noised":  # always five
        options |= {"num_candidates": changes.get("num_candidates", 0)}
    return D.Config(**options)


def toy_references(n: int, seed: int) -> torch.Tensor:
    return make_references(load_split("toys", "preference", n, 16), n, seed)


def collected(tmp_path, **changes):
    cfg = config(tmp_path, **changes)
    references = toy_references(cfg.num_references, cfg.seed)
    folder = D.collect(Path(cfg.model), references, cfg, 0)
    return cfg, references, folder, D.read_rollouts(folder)


def every_state(rollouts):  # (N J, 2)
    return torch.cartesian_prod(*map(torch.arange, rollouts.call.shape))


def images_of(folder: Path) -> torch.Tensor:
    parts = [load_tensors(p) for p in sorted(folder.glob("*.safetensors"))]
    return torch.cat([p["images"] for p in parts])[torch.cat([p["reference"] for p in parts]).argsort()]


# --- the loss on log-ratios ---


def test_loss_is_log_2_at_theta_equal_pre():
    loss, metrics = D.d3po_loss(torch.zeros(3), torch.zeros(3), beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0.5


def test_loss_of_a_hand_computed_value():
    # beta 0.5: margins 0.5 (2 - 0) = 1, 0.5 (-1 - 3) = -2, 0.5 (4 - 0) = 2
    w, l = torch.tensor([2.0, -1.0, 4.0]), torch.tensor([0.0, 3.0, 0.0])  # noqa: E741
    loss, metrics = D.d3po_loss(w, l, beta=0.5)
    assert loss.item() == pytest.approx((0.3132617 + 2.1269280 + 0.1269280) / 3, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["margin"] == pytest.approx(1 / 3)
    assert metrics["log_ratio_w"] == pytest.approx(5 / 3) and metrics["log_ratio_l"] == 1
    assert metrics["loss_d3po"] == loss.item()


def test_pairs_by_hand():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0]])
    compared, wins = D.preference_pairs(rewards, "all")
    assert compared.tolist() == [[0, 1, 2]] * 2
    assert wins[0].nonzero().tolist() == [[1, 0], [1, 2], [2, 0]]  # winner, loser
    assert wins[1].nonzero().tolist() == [[0, 2], [1, 2]]  # ties are no pairs
    compared, wins = D.preference_pairs(torch.cat([rewards, torch.ones(1, 3)]), "extremes")
    assert compared[:2].tolist() == [[1, 0], [0, 2]]  # the best, the worst
    assert wins.tolist() == [[[False, True], [False, False]]] * 2 + [[[False, False]] * 2]
    compared, _ = D.preference_pairs(torch.tensor([[3.0, 5.0, 5.0, 3.0]]), "extremes")
    assert compared.tolist() == [[1, 0]]  # of equals the first
    with pytest.raises(InputError, match="--pairs extreme: unknown"):
        D.preference_pairs(rewards, "extreme")


# --- log-ratios of candidates ---


def batch_of(rollouts: D.Rollouts, model, chosen=(0, 3), js=(0, 0), num_steps=5) -> D.Batch:
    return D.make_batch(rollouts, torch.tensor(chosen), torch.tensor(js), Schedule(model.cfg), num_steps, CPU)


def other_model():
    """A policy a little away from random_model."""
    model = random_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize("candidates", ["branch", "noised", "independent"])
def test_log_ratios_are_those_of_the_plain_formula(tmp_path, candidates):
    """log N(a; mean_theta, var) - log N(a; mean_pre, var), candidate by candidate, each with a forward of its own."""
    _, _, _, rollouts = collected(tmp_path, candidates=candidates)
    pre, theta = random_model(), other_model()
    schedule, js = Schedule(pre.cfg), (0, 0) if candidates == "branch" else (2, 1)
    batch = batch_of(rollouts, pre, js=js)
    with torch.no_grad():
        mean_pre, _ = D.batch_means(pre, schedule, batch, False)
        ratio, kl = D.step_log_ratio(theta, schedule, batch, mean_pre.unflatten(0, (2, -1)), False)
        for n in range(2):
            call = int(rollouts.call[(0, 3)[n], js[n]])
            t, s = schedule.timesteps(5)[call]
            assert batch.t[n] == t and batch.s[n] == s
            kls = []
            for g in range(batch.action.shape[1]):
                x_t = batch.x_t[n, min(g, batch.x_t.shape[1] - 1)][None]
                args = (
                    batch.y[n : n + 1],
                    batch.ref_noise[n : n + 1],
                    batch.t[n : n + 1],
                    batch.s[n : n + 1],
                )
                (m1, var), (m0, _) = (D.policy_mean(z, schedule, x_t, *args) for z in (theta, pre))
                a = batch.action[n, g][None].double()
                plain = log_prob(a, m1.double(), var.double()) - log_prob(a, m0.double(), var.double())
                assert ratio[n, g].item() == pytest.approx(plain.item(), rel=1e-3, abs=1e-3)
                normal = [torch.distributions.Normal(m.double(), var.double().sqrt()) for m in (m1, m0)]
                kls.append(torch.distributions.kl_divergence(*normal).sum().item())
            assert kl[n].item() == pytest.approx(sum(kls) / len(kls), rel=1e-3)


def test_from_one_state_the_quadratic_parts_cancel(tmp_path):
    _, _, _, rollouts = collected(tmp_path)
    pre, theta = random_model(), other_model()
    schedule, batch = Schedule(pre.cfg), batch_of(rollouts, pre)
    with torch.no_grad():
        mean_pre, var = D.batch_means(pre, schedule, batch, False)
        mean, _ = D.batch_means(theta, schedule, batch, False)
        ratio, _ = D.step_log_ratio(theta, schedule, batch, mean_pre.unflatten(0, (2, 1)), False)
    linear = ((mean - mean_pre) * (batch.action[:, 1] - batch.action[:, 2]) / var).flatten(1).sum(1)
    torch.testing.assert_close(ratio[:, 1] - ratio[:, 2], linear, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("candidates", ["branch", "noised"])
def test_the_log_ratio_is_exactly_0_before_the_first_update(tmp_path, candidates, bf16):
    cfg, _, _, rollouts = collected(tmp_path, candidates=candidates)
    model, parameters = D.prepare(cfg.model, cfg)
    means = D.frozen_means(model, rollouts, every_state(rollouts), cfg, bf16, CPU)
    for chosen, js in (((4, 1), (0, 0)), ((1, 2), (rollouts.call.shape[1] - 1, 0))):
        batch = batch_of(rollouts, model, chosen, js)
        ratio, kl = D.step_log_ratio(model, Schedule(model.cfg), batch, means[list(chosen), list(js)], bf16)
        assert (ratio == 0).all() and (kl == 0).all() and ratio.requires_grad


def test_the_loss_sees_the_clean_reference(tmp_path, monkeypatch):
    cfg, references, _, rollouts = collected(tmp_path, candidates="noised")
    torch.testing.assert_close(rollouts.y, random_model().encode(references[:, 0].float() / 255))
    seen = []
    monkeypatch.setattr(
        D, "policy_mean", lambda m, s, x_t, y, ref_noise, t, u, bf16: seen.append((x_t, y, ref_noise))
    )
    batch = batch_of(rollouts, random_model(), js=(1, 2))
    D.batch_means(random_model(), Schedule(random_model().cfg), batch, False)
    (x_t, y, ref_noise) = seen[0]
    assert torch.equal(y, rollouts.y[[0, 3]]) and torch.equal(ref_noise, rollouts.ref_noise[[0, 3]])
    for row in range(10):  # candidate row % 5 of reference row // 5, in the order of the actions
        assert torch.equal(x_t[row], rollouts.x_t[(0, 3)[row // 5], (1, 2)[row // 5], row % 5])


class Paints(torch.nn.Module):
    """Predicts a constant x0; remembers what it was shown."""

    def __init__(self, value: float, cfg):
        super().__init__()
        self.cfg, self.seen = cfg, []
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, ref_t):
        self.seen.append((x_t, t, ref_t))
        return self.value.expand_as(x_t)


def test_diffusion_dpo_by_hand():
    cfg = random_model().cfg
    x0 = torch.stack([torch.full((3, 5, 48, 4, 4), v) for v in (0.0, 1.0)], 1)  # 3 references, 2 candidates
    batch = D.Batch(*[None] * 2, torch.zeros(3, 48, 4, 4), None, x0, torch.zeros(3, dtype=torch.long), None)  # type: ignore
    theta, pre, schedule = Paints(0.5, cfg), Paints(0.0, cfg), Schedule(cfg)
    ratio, kl = D.forward_log_ratio(theta, pre, batch, 0, 0, False)  # type: ignore
    x_t, t, ref_t = theta.seen[0]
    weight = 1 / (2 * (1 - schedule.alpha_bar[t].float())) * 5 * 48 * 16
    # candidate 0 is at distance 0 of pre and .5 of theta, candidate 1 at 1 and .5
    expected = weight * torch.tensor([-0.25, 0.75] * 3)
    torch.testing.assert_close(ratio.flatten(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kl, (weight * 0.25).view(3, 2).mean(1), rtol=1e-4, atol=1e-3)
    # one t and one noise for the candidates of a reference, others for another; both networks see the same
    assert torch.equal(t[::2], t[1::2]) and (t >= 100).all() and (t <= 950).all() and len(t.unique()) > 1
    ab = schedule.ab(t)
    noise = (x_t - ab.sqrt() * x0.flatten(0, 1)) / (1 - ab).sqrt()
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(noise[0], noise[2], atol=0.1)
    # y is 0: what is left of a reference is its noise, at its t, one for both candidates
    scale = (1 - ab).sqrt() / (ab * cfg.ref_scale**2 + 1 - ab).sqrt()
    ref_noise = ref_t / scale[::2, 0]
    assert ref_t.shape == batch.y.shape and (ref_noise.std((1, 2, 3)) - 1).abs().max() < 0.1
    assert not torch.allclose(ref_noise[0], ref_noise[1], atol=0.1)
    assert all(torch.equal(a, b) for a, b in zip(pre.seen[0], (x_t, t, ref_t)))
    ratio.sum().backward()
    assert theta.value.grad is not None and pre.value.grad is None
    again = D.forward_log_ratio(theta, pre, batch, 0, 1, False)[0]  # type: ignore
    assert not torch.equal(again, ratio)  # another step, another t


# --- candidates ---


def drawn(model, ref, seeds, call, **options):
    """`draw_candidates` with few options said: rollouts, and images."""
    cfg = D.Config(feedback="geometry", model="", num_steps=4, trained_calls=(0, 2), **options)
    return draw_candidates(model, ref, seeds, call, cfg, False)


def test_branches_share_all_but_one_action():
    """Objects keep their own noises, in the order of the references; alone an object is as among others."""
    model, ref = random_model(), make_toys(2, 16, 1)[:, 0].float() / 255
    b, images = drawn(model, ref, [3, 4], 1, num_candidates=3)
    plain = sample(model, ref, [3, 4], num_steps=4)
    assert b.x_t.shape == (2, 1, 1, 5, 48, 4, 4) and b.action.shape == (2, 1, 3, 5, 48, 4, 4)
    assert b.call.tolist() == [[1], [1]] and images.shape == (2, 3, 5, 3, 16, 16)
    torch.testing.assert_close(b.x_t[:, 0, 0], plain.states[:, 1])
    torch.testing.assert_close(b.action[:, 0, 0], plain.states[:, 2])  # branch 0 is the plain chain
    torch.testing.assert_close(b.x0[:, 0], plain.states[:, -1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(images[:, 0], plain.images, rtol=1e-3, atol=1e-3)
    assert (b.x0[:, 0] - b.x0[:, 1]).abs().amax((1, 2, 3, 4)).gt(1e-3).all()
    assert torch.equal(b.ref_noise, plain.ref_noise) and torch.equal(b.y, plain.y)
    alone, _ = drawn(model, ref[1:], [4], 1, num_candidates=3)
    for ours, theirs in zip(alone, b):
        torch.testing.assert_close(ours[0], theirs[1], rtol=0, atol=1e-3)
    t, s = (torch.full((2,), z) for z in Schedule(model.cfg).timesteps(4)[1])
    with torch.no_grad():
        mean, var = D.policy_mean(model, Schedule(model.cfg), b.x_t[:, 0, 0], b.y, b.ref_noise, t, s)
    z = (b.action[:, 0] - mean[:, None]) / var.sqrt()[:, None]  # each action is the policy's own draw
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    flat = z.flatten(0, 1).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.1  # six draws, none twice


def test_later_noises_are_shared(monkeypatch):
    """With a network that says 0 everywhere, the chain is linear: branches differ by the decayed difference of actions."""
    model, states = random_model(), []
    monkeypatch.setattr(
        type(model), "forward", lambda self, x_t, t, ref_t: states.append(x_t) or torch.zeros_like(x_t)
    )
    b, _ = drawn(model, make_toys(1, 16, 1)[:, 0].float() / 255, [3], 1, num_candidates=2)
    schedule, factor = Schedule(model.cfg), 1.0
    for t, s in schedule.timesteps(4)[2:3]:  # the last call's mean is x0 = 0
        ab_t, ab_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        var = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        factor *= ((1 - ab_s - var) / (1 - ab_t)).sqrt()
    difference = b.action[0, 0, 0] - b.action[0, 0, 1]
    torch.testing.assert_close(states[3][0] - states[3][1], difference * factor.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("candidates", ["noised", "independent"])
def test_what_candidates_have_of_their_own(candidates):
    """Noise on the reference, or all step noises; never both, and never x_T or the reference's forward noise."""
    model, ref = random_model(), make_toys(2, 16, 1)[:, 0].float() / 255
    scales = [0.0, 0.1, 0.3, 0.5, 0.8]  # a of App. B
    b, _ = drawn(model, ref, [3, 4], 2, candidates=candidates)
    assert b.call.tolist() == [[0, 1, 2]] * 2 and b.x_t.shape[:3] == (2, 3, 5)
    assert torch.equal(b.x_t[:, 0], b.x_t[:, 0, :1].expand_as(b.x_t[:, 0]))  # x_T
    assert torch.equal(b.x_t[:, 1:], b.action[:, :-1])  # an action is the next state
    for i, seed in enumerate((3, 4)):
        for g in range(5):
            own, row = ({"noise_scales": [scales[g]], "own": []}, 0)
            if candidates == "independent":
                own, row = {"G": 5}, g
            chain = sample(model, ref[i : i + 1], [seed], 4, **own)
            torch.testing.assert_close(b.action[i, :, g], chain.states[row, 1:4], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(b.x0[i, g], chain.states[row, -1], rtol=1e-3, atol=1e-3)


def test_candidates_depend_on_seed_round_and_object_alone(tmp_path):
    cfg, references, folder, rollouts = collected(tmp_path)
    x = rollouts.x_t.flatten(0, 2).flatten(1)
    assert (torch.corrcoef(x) - torch.eye(5)).abs().max() < 0.9  # objects have noises of their own
    rows = rollouts.ref_noise.flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(5)).abs().max() < 0.2
    other = D.read_rollouts(D.collect(Path(cfg.model), references, replace(cfg, seed=1), 0))
    later = D.read_rollouts(D.collect(Path(cfg.model), references, cfg, 1))
    assert not torch.equal(other.ref_noise, rollouts.ref_noise) and not torch.equal(
        later.ref_noise, rollouts.ref_noise
    )
    for key, one in (((0, 10, 0), rollouts), ((1, 10, 0), other), ((0, 10, 1), later)):
        assert torch.equal(one.call[:, 0], torch.randint(0, 3, (5,), generator=D.keyed_generator(*key)))
    alone = D.read_rollouts(D.collect(Path(cfg.model), references, replace(cfg, batch_size=1), 0))
    torch.testing.assert_close(alone.action, rollouts.action, rtol=1e-3, atol=1e-3)
    assert set(rollouts.call.flatten().tolist()) <= {0, 1, 2} and len(rollouts.call.unique()) > 1
    evaluation = sample(
        load(cfg.model), references[:, 0].float() / 255, [D.key_seed(cfg.seed, i) for i in range(5)], 5
    )
    assert not any(torch.allclose(evaluation.ref_noise[i], rollouts.ref_noise[i]) for i in range(5))


def test_prefer_says_what_its_winners_are(tmp_path, monkeypatch, capsys):
    cfg, references, folder, _ = collected(tmp_path, candidates="noised")

    def said(rate, pairs="all"):
        monkeypatch.setitem(D.FEEDBACKS, "mine", rate)
        D.prefer(folder, references, replace(cfg, feedback="mine", pairs=pairs))
        return capsys.readouterr().out.splitlines()[-1]

    assert "winners: 100% nearer to truth, " in said(feedback.oracle)
    assert "winners: 0% nearer to truth, " in said(lambda *args: -feedback.oracle(*args))
    assert said(feedback.least_noise).startswith("50 pairs of 5 references; ")
    assert said(lambda *args: -torch.tensor([0.0, 1, 3, 2, 4])).endswith(", 90% less noised")
    # the best against the worst alone
    assert "winners: 100% nearer to truth, " in said(feedback.oracle, "extremes")
    assert "winners: 0% nearer to truth, " in said(lambda *args: -feedback.oracle(*args), "extremes")
    told = said(lambda *args: -torch.tensor([1.0, 0, 3, 2, 4]), "extremes")
    assert told.startswith("5 pairs of 5 references; ") and told.endswith(", 100% less noised")
    assert said(lambda *args: torch.tensor([1.0, 0, 3, 2, 2]), "extremes").endswith(", 0% less noised")


@pytest.mark.parametrize(
    "candidates, changes", [("branch", {}), ("noised", {}), ("independent", {"num_candidates": 2})]
)
def test_of_the_extremes_training_sees_the_best_and_the_worst_alone(
    tmp_path, monkeypatch, candidates, changes
):
    cfg, references, folder, rollouts = collected(tmp_path, candidates=candidates, **changes)
    G, seen = rollouts.action.shape[2], []
    rewards = torch.rand(5, G, generator=torch.Generator().manual_seed(0))

    def no_ratio(policy, schedule, batch, mean_pre, bf16):
        seen.append((batch, mean_pre))
        zero = 0 * sum(p.sum() for p in policy.parameters())
        return zero + torch.zeros(2, 2), torch.zeros(2)

    monkeypatch.setattr(D, "step_log_ratio", no_ratio)
    cfg, pre = replace(cfg, pairs="extremes"), Path(cfg.model)
    D.train(pre, pre, (folder, rewards), references, cfg, 0)
    for step, (batch, mean_pre) in enumerate(seen):
        g = D.keyed_generator(0, 6, step)
        chosen = torch.randint(5, (2,), generator=g).tolist()
        js = torch.randint(rollouts.call.shape[1], (2,), generator=g).tolist()
        for row, (n, j) in enumerate(zip(chosen, js)):
            two = [int(rewards[n].argmax()), int(rewards[n].argmin())]
            states = rollouts.x_t[n, j] if candidates == "branch" else rollouts.x_t[n, j, two]
            assert torch.equal(batch.x_t[row], states) and len(mean_pre[row]) == len(states)
            assert torch.equal(batch.action[row], rollouts.action[n, j, two])
            assert torch.equal(batch.x0[row], rollouts.x0[n, two])
    assert len(seen) == 2


def test_rollouts_are_in_the_order_of_the_references(tmp_path):
    cfg, references, folder, rollouts = collected(tmp_path)
    clean = random_model().encode(references[:, 0].float() / 255)
    torch.testing.assert_close(rollouts.y, clean)  # although the files are sorted by call
    images = random_model().decode(rollouts.x0.flatten(0, 1))
    torch.testing.assert_close((images * 255).round().to(torch.uint8), images_of(folder).flatten(0, 1))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    copy = files[0].with_name("000000 (1).safetensors")
    copy.write_bytes(files[0].read_bytes())
    with pytest.raises(InputError, match="not one part for each reference"):
        D.read_rollouts(folder)
    copy.unlink()
    files[-1].write_bytes(files[0].read_bytes())
    with pytest.raises(InputError, match="not one part for each reference"):
        D.read_rollouts(folder)
    with pytest.raises(InputError, match="rewards are not finite"):
        D.prefer(folder, references, cfg)


# --- preferences ---


def test_the_matching_feedback_hands_on_its_matcher(tmp_path, monkeypatch):
    monkeypatch.setattr("feedback.matching_reward", lambda ref, images, method: method)
    x = torch.zeros(1, 5, 3, 8, 8)
    assert D.FEEDBACKS["matching"](x[0, 0], x, x[0], config(tmp_path, matcher="w.ckpt")) == "w.ckpt"


def test_the_matchers_file_counts_by_content_and_sift_has_none(tmp_path, monkeypatch):
    cfg, references, folder, _ = collected(tmp_path, feedback="matching", matcher=str(tmp_path / "w.ckpt"))
    rates = lambda ref, images, method: images.mean((1, 2, 3, 4)) * int(Path(method).read_text())  # noqa: E731
    monkeypatch.setattr("feedback.matching_reward", rates)
    rewards = []
    for sign in ("1", "-1"):
        (tmp_path / "w.ckpt").write_text(sign)
        rewards.append(D.prefer(folder, references, cfg))
    assert torch.equal(rewards[0], -rewards[1])
    D.check(replace(cfg, matcher="sift"))
    with pytest.raises(InputError, match="matcher .*w.ckpt: expected sift, loftr or"):
        D.check(cfg)


NAMES = ["contrastive", "matching", "hull", "geometry", "lean", "colours", "agreement", "oracle"]


@pytest.mark.parametrize("feedback", NAMES)
def test_feedbacks_prefer_the_truth(tmp_path, feedback):
    """Truth against truth with another object's right view; all but the untrained scorer must prefer the truth. And
    what a candidate is compared with is the reference, not its own front: with another reference, another reward."""
    scorer = small_scorer("bilinear", 64, 16, 32, 1, 2)
    torch.nn.init.normal_(scorer.linear.weight)
    scorer.save(tmp_path / "scorer")
    cfg = config(tmp_path, feedback=feedback, scorer=str(tmp_path / "scorer"))
    truth = make_toys(3, 64, 1).float() / 255
    spoilt = truth[0].clone()
    spoilt[1] = truth[2, 1]
    reward = D.FEEDBACKS[feedback](truth[0, 0], torch.stack([spoilt, truth[0]]), truth[0], cfg)
    assert reward.shape == (2,) and (reward[1] > reward[0] or feedback == "contrastive")
    of_another = D.FEEDBACKS[feedback](truth[2, 0], torch.stack([spoilt, truth[0]]), truth[0], cfg)
    assert torch.equal(of_another, reward) == (feedback in ("hull", "oracle"))


def test_controls_by_hand(tmp_path):
    cfg, images = config(tmp_path), torch.rand(3, 5, 3, 8, 8)
    images[:, :, 1], images[:, :, 2] = 0.3, 0.7  # mean .5
    images[:, :, 0] = torch.tensor([0.2, 0.9, 0.5]).view(3, 1, 1, 1)
    args = (images[0, 0], images, images[0], cfg)
    torch.testing.assert_close(D.FEEDBACKS["redder"](*args), torch.tensor([-0.3, 0.4, 0.0]))
    assert D.FEEDBACKS["least_noise"](*args).argmax() == 0
    assert D.FEEDBACKS["oracle"](*args).argmax() == 0  # the "truth" here is candidate 0
    views = torch.ones(2, 5, 3, 8, 8)
    views[0, 0], views[0, 1, :, :2], views[1, 2, 1, :4] = 0, 0, 0.5  # the reference's own view does not count
    larger = D.FEEDBACKS["larger"](views[0, 0], views, views[0], cfg)
    torch.testing.assert_close(larger, torch.tensor([1, 2]) * 16 / 256)
    truth = make_toys(1, 64, 1)[0].float() / 255
    pair, lean = torch.stack([truth, stretch(truth, torch.tensor([0.5, 0.9, 0.7]))]), D.FEEDBACKS["lean"]
    sized = lean(truth[0], pair, truth, cfg) + 0.32 * D.FEEDBACKS["larger"](truth[0], pair, truth, cfg)
    torch.testing.assert_close(sized, D.FEEDBACKS["geometry"](truth[0], pair, truth, cfg))
    tricks = torch.stack(
        [truth, truth[:1].expand_as(truth), torch.ones_like(truth), 0.5 * torch.ones_like(truth)]
    )
    both, *each = (D.FEEDBACKS[f](truth[0], tricks, truth, cfg) for f in ("agreement", "geometry", "colours"))
    assert torch.equal(both, each[0] + each[1]) and (both[0] > 0.5 + both[1:]).all()  # a copy, white, grey
    draw = D.FEEDBACKS["random"](*args)
    assert len(draw.unique()) == 3 and torch.equal(draw, D.FEEDBACKS["random"](*args))
    assert torch.equal(draw[[2, 0, 1]], D.FEEDBACKS["random"](args[0], images[[2, 0, 1]], args[2], cfg))
    assert not torch.equal(draw, D.FEEDBACKS["random"](*args[:3], replace(cfg, seed=1)))


def test_rewards_belong_to_their_candidates(tmp_path, monkeypatch, capsys):
    cfg, references, folder, _ = collected(tmp_path)
    monkeypatch.setitem(
        D.FEEDBACKS, "oracle", lambda ref, images, truth, cfg: images.mean((1, 2, 3, 4)) + ref.mean()
    )
    rewards = D.prefer(folder, references, cfg)
    expected = (
        images_of(folder).float().div(255).mean((2, 3, 4, 5))
        + references[:, 0].float().div(255).mean((1, 2, 3))[:, None]
    )
    torch.testing.assert_close(rewards, expected)
    assert "15 pairs of 5 references" in capsys.readouterr().out


def test_useless_feedbacks_are_refused(tmp_path, monkeypatch):
    cfg, references, folder, _ = collected(tmp_path)
    monkeypatch.setitem(D.FEEDBACKS, "hull", lambda ref, images, truth, cfg: torch.zeros(len(images)))
    with pytest.raises(InputError, match="tie"):
        D.prefer(folder, references, replace(cfg, feedback="hull"))
    for bad in (torch.nan, torch.inf):
        monkeypatch.setitem(D.FEEDBACKS, "redder", lambda ref, images, *_, bad=bad: torch.full((3,), bad))
        with pytest.raises(InputError, match="15 rewards are not finite"):
            D.prefer(folder, references, replace(cfg, feedback="redder"))


# --- the loop ---


def captured(monkeypatch, cfg):
    """Gradients, rates and arguments of every step of a run."""
    steps = []

    def spy(optimizers, parameters, rate, step, clip=1.0):
        steps.append({"rate": rate, "grad": [p.grad.clone() for p in parameters], "clip": clip})
        return common.optimizer_step(optimizers, parameters, rate, step, clip)

    monkeypatch.setattr(D, "optimizer_step", spy)
    D.main(cfg)
    return steps


@pytest.mark.parametrize(("kl", "lambda_simple", "beta"), [(0.3, 7.0, 0.8), (0.0, 0.0, 0.4)])
def test_the_gradient_is_that_of_the_sum(tmp_path, monkeypatch, kl, lambda_simple, beta):
    """p.grad at step 1 = d/dp [ L_MV-D3PO + kl beta KL + lambda L_simple-MV ], built here by one backward."""
    cfg = config(tmp_path, kl=kl, lambda_simple=lambda_simple, beta_dpo=beta, lr=1e-2, steps=2)
    monkeypatch.setattr(common, "SAVE_SECONDS", 0)
    states = []
    monkeypatch.setattr(
        D,
        "save_state",
        lambda path, parts, **rest: states.append({k: v.clone() for k, v in parts["model"].items()}),
    )
    logged = []
    monkeypatch.setattr(D.Log, "add", lambda self, step, **values: logged.append(values))
    steps = captured(monkeypatch, cfg)
    policy, parameters = D.prepare(cfg.model, cfg)
    references = toy_references(5, 0)
    folder = D.collect(Path(cfg.model), references, cfg, 0)
    rollouts, wins = D.read_rollouts(folder), D.preference_pairs(D.prefer(folder, references, cfg), "all")[1]
    means = D.frozen_means(policy, rollouts, every_state(rollouts), cfg, False, CPU)
    schedule = Schedule(policy.cfg)
    policy.load_state_dict(states[0], strict=False)
    g = D.keyed_generator(0, 6, 1)
    chosen, js = torch.randint(5, (2,), generator=g), torch.randint(1, (2,), generator=g)
    batch = D.make_batch(rollouts, chosen, js, schedule, 5, CPU)
    mean, var = D.policy_mean(policy, schedule, batch.x_t[:, 0], *batch[2:4], batch.t, batch.s)
    now, before = (
        torch.distributions.Normal(m.double(), var.double().sqrt()) for m in (mean, means[chosen, js][:, 0])
    )
    actions = batch.action.double().unbind(1)
    ratio = torch.stack([now.log_prob(a) - before.log_prob(a) for a in actions], 1).flatten(2).sum(2)
    divergence = torch.distributions.kl_divergence(now, before).flatten(1).sum(1)
    b, w, l = wins[chosen].nonzero(as_tuple=True)  # noqa: E741
    preference = -torch.log(torch.sigmoid(beta * (ratio[b, w] - ratio[b, l]))).mean()
    real = D.training_batch(policy, schedule, [D.load_split("toys", "preference", 5, 16)], 2, 0, 1, CPU)
    ours, simple = preference + kl * beta * divergence.mean(), D.simple_loss(policy, schedule, *real).mean()
    graph: dict[str, Any] = dict(allow_unused=True, retain_graph=True)
    parts = [g.flatten() for g in torch.autograd.grad(ours, parameters, **graph) if g is not None]
    values = {"loss_d3po": preference, "kl": divergence.mean(), "loss_simple": simple}
    values |= {
        "grad_d3po": torch.cat(parts).norm(),
        "grad_norm": torch.cat([g.flatten() for g in steps[1]["grad"]]).norm(),
    }
    assert {k: logged[1][k] for k in values} == pytest.approx(
        {k: v.item() for k, v in values.items()}, rel=2e-3
    )
    expected = torch.autograd.grad(ours + lambda_simple * simple, parameters, **graph)
    for got, want in zip(steps[1]["grad"], expected):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=2e-3, atol=1e-5)
    assert [s["rate"] for s in steps] == [1.0, 0.5]  # falls to 0 in a straight line
    assert any(
        (a - b).abs().max() > 1e-6 for a, b in zip(steps[0]["grad"], steps[1]["grad"])
    )  # another batch


def test_the_update_is_adams_without_weight_decay(tmp_path, monkeypatch):
    cfg = config(tmp_path, steps=3, lr=1e-2)
    steps, (model, parameters) = captured(monkeypatch, cfg), D.prepare(Path(cfg.model), cfg)
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for k, step in enumerate(steps):
        cut = min(1, 1 / torch.cat([g.flatten() for g in step["grad"]]).norm().item())
        for i, (p, g) in enumerate(zip(parameters, step["grad"])):
            m[i], v[i] = 0.9 * m[i] + 0.1 * cut * g, 0.99 * v[i] + 0.01 * (cut * g) ** 2
            mean, square = m[i] / (1 - 0.9 ** (k + 1)), v[i] / (1 - 0.99 ** (k + 1))
            p.data -= cfg.lr * (1 - k / 3) * mean / (square.sqrt() + 1e-8)
    after = load(tmp_path / "out" / "d3po_oracle").state_dict()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(after[name], p, rtol=1e-5, atol=1e-6)


def test_the_seed_draws_references_and_the_start_of_lora(tmp_path, monkeypatch):
    def ends(*args):
        raise Asked(*args)

    cfg = config(tmp_path, seed=3, lora=2)
    start = [D.prepare(Path(cfg.model), replace(cfg, seed=seed))[1] for seed in (3, 3, 4)]
    assert all(map(torch.equal, start[0], start[1])) and not all(map(torch.equal, start[0], start[2]))
    monkeypatch.setattr(D, "make_references", ends)
    with pytest.raises(Asked) as asked:
        D.main(cfg)
    objects, *rest = asked.value.args
    assert torch.equal(objects, load_split("toys", "preference", 5, 16)) and rest == [5, 3]


def test_diffusion_dpo_draws_by_seed_and_step(tmp_path, monkeypatch):
    cfg, references, folder, _ = collected(tmp_path, loss="diffusion_dpo", seed=3)
    pre, keys, original = Path(cfg.model), [], D.forward_log_ratio
    monkeypatch.setattr(D, "forward_log_ratio", lambda *args: keys.append(args[3:5]) or original(*args))
    rates, step = [], D.optimizer_step
    monkeypatch.setattr(D, "optimizer_step", lambda *args: rates.append(args[2]) or step(*args))
    D.train(pre, pre, (folder, D.prefer(folder, references, cfg)), references, cfg, 2)
    assert keys == [(3, 4), (3, 5)] and rates == [1, 0.5]  # two steps a round, each from the full rate to 0


def test_recipes_fill_what_is_not_said():
    def recipe(**options):
        cfg = D.Config(**options)
        return cfg.candidates, cfg.num_candidates, cfg.pairs, cfg.beta_dpo, cfg.kl

    for name in ("contrastive", "matching", "geometry", "redder"):
        assert recipe(feedback=name) == ("branch", 8, "all", 1.0, 0.05)
        assert recipe(feedback=name, candidates="noised") == ("noised", 5, "extremes", 1.0, 0.05)
    assert recipe(feedback="geometry", beta_dpo=0.5, kl=0.0) == ("branch", 8, "all", 0.5, 0.0)
    assert recipe(loss="diffusion_dpo", num_candidates=3) == ("independent", 3, "extremes", 0.02, 0.05)
    # candidates that are said bring their own number
    assert recipe(candidates="branch", loss="diffusion_dpo") == ("branch", 8, "all", 0.02, 0.05)
    said = recipe(candidates="noised", loss="diffusion_dpo", beta_dpo=0.5)
    assert said == ("noised", 5, "extremes", 0.5, 0.05)
    assert recipe(feedback="geometry", pairs="extremes")[2] == "extremes"
    assert recipe(loss="both") == ("auto", 0, "auto", 0.0, 0.05)  # filled for each of the two


@pytest.mark.parametrize(("seed", "round"), [(0, 0), (3, 0), (3, 2)])
def test_batches_by_seed_and_step_never_of_references_that_tie(tmp_path, monkeypatch, seed, round):
    """Of several trained calls, others than the first are visited, too; stage 1's batch is of the same step."""
    references = toy_references(5, 0)
    tied = references[1].float() / 255

    def rate(ref, images, truth, cfg):
        return feedback.oracle(ref, images, truth, cfg) * (0 if torch.equal(truth, tied) else 1)

    def no_ratio(policy, schedule, batch, mean_pre, bf16):
        zero = 0 * sum(p.sum() for p in policy.parameters())
        return zero + torch.zeros(2, 5), torch.zeros(2)

    monkeypatch.setitem(D.FEEDBACKS, "oracle", rate)
    cfg = config(tmp_path, candidates="noised", steps=8)
    pre = Path(cfg.model)
    candidates = D.collect(pre, references, cfg, 0)
    rewards = D.prefer(candidates, references, cfg)
    drawn, keys, make_batch, training_batch = [], [], D.make_batch, D.training_batch
    monkeypatch.setattr(D, "step_log_ratio", no_ratio)
    visited, frozen = [], lambda model, r, states, *_: visited.extend(states.tolist()) or 0 * r.x_t
    monkeypatch.setattr(D, "frozen_means", frozen)
    monkeypatch.setattr(
        D, "make_batch", lambda r, c, j, *rest: drawn.append((c, j)) or make_batch(r, c, j, *rest)
    )
    monkeypatch.setattr(D, "training_batch", lambda *args: keys.append(args[4:6]) or training_batch(*args))
    D.train(pre, pre, (candidates, rewards), references, replace(cfg, seed=seed), round)
    assert keys == [(seed, 8 * round + step) for step in range(8)]
    usable, seen = torch.tensor([0, 2, 3, 4]), set()
    for step, (chosen, js) in enumerate(drawn):
        g = D.keyed_generator(seed, 6, 8 * round + step)
        assert torch.equal(chosen, usable[torch.randint(4, (2,), generator=g)])
        assert torch.equal(js, torch.randint(3, (2,), generator=g))
        seen |= set(js.tolist())
    assert len(drawn) == 8 and len(seen) > 1
    pairs = {(n, j) for chosen, js in drawn for n, j in zip(chosen.tolist(), js.tolist())}
    assert sorted(map(tuple, visited)) == sorted(pairs)  # each once


def test_means_of_pi_pre_only_where_training_comes(tmp_path):
    cfg, _, _, rollouts = collected(tmp_path, candidates="noised")
    visited = torch.tensor([[0, 1], [2, 0], [4, 2]])
    means, every = (
        D.frozen_means(random_model(), rollouts, states, cfg, False, CPU)
        for states in (visited, every_state(rollouts))
    )
    filled = means.isfinite().flatten(2).all(2)
    assert filled.nonzero().tolist() == visited.tolist() and means.isnan().flatten(2).all(2).sum() == 12
    assert torch.equal(means[filled], every[filled])


def test_the_report_compares_after_with_before(tmp_path):
    cfg = config(tmp_path, lr=0.1)
    result = D.main(cfg)
    views = D.load_split("toys", "validation", 2, 16)
    truth = views.float() / 255
    seeds = [D.key_seed(cfg.seed, i) for i in range(2)]
    for name, model in (("before", cfg.model), ("after", result["folder"])):
        images = (sample(load(model), truth[:, 0], seeds, 5).images * 255).round() / 255
        pooled = result["table"]["psnr_unseen"][name]
        by_view = [
            -10 * (x[1:] - y[1:]).square().flatten(1).mean(1).log10().mean() for x, y in zip(images, truth)
        ]
        assert pooled == pytest.approx(float(sum(by_view) / 2), abs=0.02)
    t = result["table"]["psnr_unseen"]
    assert t["difference"] == pytest.approx(t["after"] - t["before"], abs=1e-6)
    assert abs(t["difference"]) > 0.05  # more than the tolerance above


def test_the_picture_shows_the_objects_that_changed_most(tmp_path, monkeypatch):
    views, shown = make_toys(10, 16, 2), []
    truth, share = views.float() / 255, torch.tensor([3, 9, 1, 7, 5, 0, 8, 2, 6, 4]) / 9
    drawn = {"pre": 0.9 * truth, "policy": 0.9 * truth - 0.5 * share.view(-1, 1, 1, 1, 1) * truth.mean()}
    monkeypatch.setattr(D, "load_split", lambda *_: views)
    monkeypatch.setattr(D, "draw_images", lambda model, ref, cfg: drawn[model.name])
    monkeypatch.setattr(D, "grid", lambda path, columns, ref: shown.append(columns | {"ref": ref}))
    cfg = config(tmp_path, feedback="larger")
    row = D.report(tmp_path / "pre", tmp_path / "policy", 16, cfg, 0.0)["table"][
        "larger"
    ]  # the feedback itself
    own = [D.FEEDBACKS["larger"](truth[0, 0], drawn[m], truth[0], cfg).mean() for m in ("pre", "policy")]
    assert [row["before"], row["after"]] == pytest.approx([float(z) for z in own]) and own[1] != own[0]
    most = [1, 6, 3, 8, 4, 9, 0, 7]
    expected = {"ground truth": truth, "before": drawn["pre"], "after": drawn["policy"], "ref": truth[:, 0]}
    assert list(shown[0]) == list(expected) and all(
        torch.equal(shown[0][k], v[most]) for k, v in expected.items()
    )


def test_the_scorer_it_trains_is_of_its_own_objects_and_sampler(tmp_path, monkeypatch):
    same: dict[str, Any] = dict(
        negatives="n", data="toys", num_references=7, num_steps=6, bf16="on", device="cpu", seed=3
    )
    cfg = config(tmp_path, feedback="contrastive", **same)
    monkeypatch.setattr(train_scorer, "main", lambda cfg: {"folder": cfg})
    asked = D.find_scorer(cfg, load(cfg.model).cfg)
    assert asked == train_scorer.Config(**same, image_size=16, out=str(tmp_path / "out" / "scorer"))


def test_independent_candidates_have_step_noises_of_their_own(tmp_path):
    _, _, _, rollouts = collected(tmp_path, candidates="independent")
    assert (rollouts.x0[:, 0] - rollouts.x0[:, 1]).abs().amax((1, 2, 3, 4)).gt(1e-2).all()
    actions = rollouts.action[:, 0] - rollouts.action[:, 0, :1]  # one state at call 0, G actions
    assert actions[:, 1:].abs().amax((2, 3, 4, 5)).gt(1e-2).all()


def test_main_writes_everything_and_reuses_it(tmp_path, capsys):
    cfg = config(tmp_path, lr=1e-3)
    result = D.main(cfg)
    folder = Path(result["folder"])
    names = ("config.json", "model.safetensors", "log.jsonl", "made_by.json")
    for name in (*names, "report/results.json", "report/grid.png"):
        assert (folder / name).stat().st_size > 0
    assert {"psnr", "psnr_unseen", "ssim", "hull", "contradiction", "change"} <= load_json(
        folder / "report/results.json"
    )["table"].keys()
    # saved weights change the picture
    views = make_toys(1, 16, 2).float() / 255
    before, after = (sample(load(m), views[:, 0], [0], 3).images for m in (cfg.model, folder))
    assert (before - after).abs().max() > 1e-3
    capsys.readouterr()
    again = D.main(cfg)
    assert again["table"] == result["table"] and again["folder"] == result["folder"]
    out = capsys.readouterr().out
    assert "--candidates branch --beta_dpo 1.0 --num_candidates 3 --pairs all --kl 0.05\n" in out
    assert (
        len([line for line in out.splitlines() if line.endswith("reused") and "toys_" not in line]) == 6
    )  # candidates, rewards, run, two sets of validation images, report


def test_another_rate_stands_beside_and_reuses_the_candidates(tmp_path, capsys):
    one = D.main(config(tmp_path, lr=1e-3))
    capsys.readouterr()
    two = D.main(config(tmp_path, lr=1e-4))
    assert one["folder"] != two["folder"] and Path(one["folder"]).is_dir()
    out = capsys.readouterr().out
    reused = [line for line in out.splitlines() if line.endswith("reused") and "toys_" not in line]
    assert len(reused) == 3  # candidates, rewards, images before
    assert len(list((tmp_path / "out").glob("candidates-*"))) == 1


DRAWN = "num_steps seed batch_size bf16 device model.py sample.py policy references "
TUNED = """steps batch_objects lr lambda_simple attention_only lora checkpointing seed bf16 device feedback policy
    objects unseen round candidates.py data.py feedback.py model.py sample.py train_d3po.py train_sft.py """
RATED = "feedback seed collected references unseen feedback.py matcher.py metrics.py scorer.py "
NOTED = {  # stage: the options, inputs and files that its result depends on
    "candidates": DRAWN + "candidates num_candidates loss trained_calls round candidates.py",
    "rewards": RATED,
    "rewards, contrastive": RATED + "scorer",
    "rewards, matching": RATED + "matcher",
    "run": TUNED + "loss beta_dpo kl pairs num_steps pre collected rewards",
    "baseline": TUNED,
    "images": DRAWN,
    "report": "scorer feedback policy pre objects unseen evaluate.py feedback.py grid.py matcher.py metrics.py scorer.py",
}
EVERY = set(D.Config.__dataclass_fields__) - {"out", "device", "candidates"}
NOTED["rewards, mine"] = RATED + " ".join(EVERY)  # your feedback may read any option


@pytest.mark.parametrize("stage", NOTED)
def test_a_result_is_known_by_all_that_it_depends_on_and_by_nothing_else(tmp_path, monkeypatch, stage):
    """One option, one input, one file of ours at a time is another: does the stage ask for another result?"""

    def asked(cfg, x) -> str:
        preferences = None if stage == "baseline" else (x["collected"], x["rewards"])
        with pytest.raises(Asked) as made_by:
            if stage == "candidates":
                D.collect(x["policy"], x["references"], cfg, x["round"])
            elif stage.startswith("rewards"):
                D.prefer(x["collected"], x["references"], cfg)
            elif stage in ("run", "baseline"):
                D.train(x["policy"], x["pre"], preferences, x["objects"], cfg, x["round"])
            elif stage == "images":
                draw_images(x["policy"], x["references"][:, 0], cfg)
            else:
                monkeypatch.setattr(D, "load_split", lambda *_: x["objects"])
                D.report(x["pre"], x["policy"], 16, cfg, 0.0)
        return str(made_by.value)

    def ends(out, name, made_by, make):
        raise Asked(common.digest([name, made_by]))

    def picture(model, *_):
        return torch.tensor(list(common.digest(model).encode()))

    draw_images = D.draw_images
    monkeypatch.setattr(D, "cached", ends)
    monkeypatch.setattr(D, "draw_images", picture)
    for module in (D, cache):
        monkeypatch.setattr(module, "hardware", lambda cfg: (torch.device(cfg.device), cfg.bf16 == "on"))
    monkeypatch.setitem(D.FEEDBACKS, "mine", lambda *_: None)
    for i, name in enumerate("ab"):
        random_model(ref_scale=1.0 + i).save(tmp_path / name)
        common.save_json(tmp_path / f"candidates_{name}" / "made_by.json", {"seed": i})
    views, front = torch.zeros(2, 5, 3, 16, 16), torch.zeros(2, 5, 3, 16, 16)
    front[1, 0] = 1  # of the second object
    x, other = (
        dict(policy=tmp_path / name, pre=tmp_path / name, collected=tmp_path / f"candidates_{name}")
        | dict(references=z, objects=z, rewards=z[:, :, 0, 0, 0], round=i)
        for i, name, z in ((0, "a", views), (1, "b", front))
    )
    new = dict(feedback="redder", model="m", data="furniture", out="o", scorer=str(tmp_path / "b"))
    new |= dict(negatives="n", matcher="loftr", loss="diffusion_dpo", candidates="noised", bf16="on")
    new |= dict(trained_calls=(0, 1), anchor="last", device="cuda", pairs="extremes")
    feedback = "none" if stage == "baseline" else stage.partition(", ")[2] or "oracle"
    cfg = config(tmp_path, device="cpu", scorer=str(tmp_path / "a"), feedback=feedback)
    new |= {name: value + 1 for name, value in vars(cfg).items() if name not in new}
    first = asked(cfg, x)
    found = {name: asked(replace(cfg, **{name: value}), x) for name, value in new.items()}
    found |= {name: asked(cfg, x | {name: value}) for name, value in other.items()}
    back = views.clone()
    back[1, 2] = 1  # the same fronts
    found["unseen"] = asked(cfg, x | dict(references=back, objects=back))
    for name, source in list(cache.SOURCES.items()):
        with monkeypatch.context() as changed:
            changed.setitem(cache.SOURCES, name, source + "\nx = 1\n")
            found[f"{name}.py"] = asked(cfg, x)
    assert {name for name, made_by in found.items() if made_by != first} == set(NOTED[stage].split())


@pytest.mark.parametrize(
    "what", ["weights", "config", "seed", "references", "feedback's code", "scorer", "own feedback's scorer"]
)
def test_whatever_is_upstream_is_noticed(tmp_path, monkeypatch, what):
    """The same command after a change gives what it gives in an empty folder."""

    def new_scorer() -> None:
        scorer = small_scorer("bilinear", 16, 8, 32, 1, 2)
        torch.nn.init.normal_(scorer.linear.weight)
        scorer.save(tmp_path / "scorer")

    def darker(sign: int) -> None:
        monkeypatch.setitem(D.FEEDBACKS, "darker", lambda ref, images, *_: sign * images.mean((1, 2, 3, 4)))

    new_scorer()
    darker(-1)
    feedback = {"feedback's code": "darker", "scorer": "contrastive", "own feedback's scorer": "mine"}.get(
        what, "oracle"
    )
    monkeypatch.setitem(D.FEEDBACKS, "mine", lambda *args: D.FEEDBACKS["contrastive"](*args))
    cfg = config(tmp_path, feedback=feedback, scorer=str(tmp_path / "scorer"))
    first = D.main(cfg)
    if what == "weights":
        other_model().save(tmp_path / "pre")
    elif what == "config":
        random_model(ref_scale=3.0).save(tmp_path / "pre")
    elif what == "seed":
        cfg = replace(cfg, seed=1)
    elif what == "references":
        monkeypatch.setattr(D, "make_references", lambda objects, n, seed: make_toys(n, 16, 5))
    elif what == "feedback's code":
        darker(1)
    else:
        new_scorer()
    second, fresh = D.main(cfg), D.main(replace(cfg, out=str(tmp_path / "new")))
    assert second["folder"] != first["folder"]
    got, want = (load(r["folder"]).state_dict() for r in (second, fresh))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    whole = D.main(config(tmp_path, out=str(tmp_path / "whole"), steps=3))["folder"]
    parts = config(tmp_path, out=str(tmp_path / "parts"), steps=3)
    monkeypatch.setattr(common, "SAVE_SECONDS", 0)
    calls, original = [], D.optimizer_step

    def dies(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(D, "optimizer_step", dies)
    with pytest.raises(KeyboardInterrupt):
        D.main(parts)
    pieces = D.main(parts)["folder"]
    assert len(calls) == 4  # two steps, the one that died, and that one again
    assert (Path(whole) / "log.jsonl").read_text() == (Path(pieces) / "log.jsonl").read_text()
    whole, pieces = load(whole).state_dict(), load(pieces).state_dict()
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_training_refuses_means_of_another_policy(tmp_path, monkeypatch):
    original, ratios = D.frozen_means, D.step_log_ratio
    monkeypatch.setattr(D, "frozen_means", lambda *args: original(*args) * 1.01)
    with pytest.raises(InputError, match="before the first update"):
        D.main(config(tmp_path))
    D.main(config(tmp_path, beta_dpo=1e-9))  # beta times the log-ratio is what the loss sees
    for sign in (-1, 1):
        monkeypatch.setattr(
            D, "step_log_ratio", lambda *args, sign=sign: [sign * z.abs() for z in ratios(*args)]
        )
        with pytest.raises(InputError, match="before the first update"):
            D.main(config(tmp_path))


def test_without_feedback_it_is_sft_and_needs_no_candidates(tmp_path, monkeypatch):
    steps = captured(monkeypatch, config(tmp_path, feedback="none", lambda_simple=2.0))
    out = tmp_path / "out"
    assert (
        not list(out.glob("candidates*"))
        and not list(out.glob("scorer*"))
        and list(out.glob("sft_baseline-*"))
    )
    log = [json.loads(line) for line in (out / "sft_baseline" / "log.jsonl").read_text().splitlines()]
    assert log and "loss_d3po" not in log[0]
    policy, parameters = D.prepare(config(tmp_path).model, config(tmp_path))
    real = D.training_batch(
        policy, Schedule(policy.cfg), [D.load_split("toys", "preference", 5, 16)], 2, 0, 0, CPU
    )
    grads = torch.autograd.grad(
        2 * D.simple_loss(policy, Schedule(policy.cfg), *real).mean(), parameters, allow_unused=True
    )
    for got, want in zip(steps[0]["grad"], grads):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("anchor", ["pre", "last"])
def test_rounds_collect_with_the_present_policy(tmp_path, monkeypatch, anchor):
    cfg = config(tmp_path, rounds=2, anchor=anchor, lr=1e-3)
    collected_by, anchored_to = [], []
    collect, train = D.collect, D.train
    monkeypatch.setattr(
        D, "collect", lambda policy, *rest: collected_by.append(policy) or collect(policy, *rest)
    )
    monkeypatch.setattr(
        D, "train", lambda start, pre, *rest: anchored_to.append((start, pre)) or train(start, pre, *rest)
    )
    result = D.main(cfg)
    first = anchored_to[1][0]  # where round 2 starts is where round 1 ended
    pre = Path(cfg.model)
    assert collected_by == [pre, first] and anchored_to == [
        (pre, pre),
        (first, pre if anchor == "pre" else first),
    ]
    assert first != pre and result["folder"] != str(first)
    for folder in (first, Path(result["folder"])):  # each round's log counts its own steps
        assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"] == cfg.steps


@pytest.mark.parametrize(
    "name",
    [
        "d3po_loss",
        "step_log_ratio",
        "forward_log_ratio",
        "batch_means",
        "preference_pairs",
        "simple_loss",
        "run",
    ],
)
def test_a_loss_of_ones_own_is_another_run(tmp_path, monkeypatch, name):
    cfg = config(tmp_path, steps=1)
    first, stock = D.main(cfg)["folder"], getattr(D, name)

    def own(*args):
        return stock(*args)

    monkeypatch.setattr(D, name, own)
    assert D.main(cfg)["folder"] != first


def test_both_losses_in_turn(tmp_path):
    cfg = config(tmp_path, loss="both", num_candidates=2, steps=1)
    both = D.main(cfg)
    for loss in ("d3po", "diffusion_dpo"):
        assert both[loss]["config"]["loss"] == loss
        assert both[loss]["folder"] == D.main(replace(cfg, loss=loss))["folder"]
    assert both["d3po"]["folder"] != both["diffusion_dpo"]["folder"]
    with pytest.raises(InputError, match="--feedback least_noise: expected --candidates noised"):  # at once
        D.main(config(tmp_path, loss="both", feedback="least_noise", out="new"))
    assert not Path("new").exists()


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_diffusion_dpo_compares_the_simple_losses(prediction):
    """Its log-ratio is half of what L_simple-MV, summed, is larger for pi_pre: whatever the network predicts."""
    policy, pre = random_model(prediction=prediction), random_model(prediction=prediction)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    schedule, batch = Schedule(policy.cfg), random_batch(policy.cfg, B=2, G=1)
    seen = []
    hook = policy.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        ratio, _ = D.forward_log_ratio(policy, pre, batch, 0, 0, False)
        hook.remove()
        (x_t, t, _), x0, ab = seen[0], batch.x0[:, 0], schedule.ab(seen[0][1])
        noise = (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
        g = D.keyed_generator(0, 11, 0)
        torch.randint(100, 951, (2,), generator=g), torch.randn(x0.shape, generator=g)
        given = (schedule, x0, batch.y, t, noise, torch.randn(batch.y.shape, generator=g))
        expected = (D.simple_loss(pre, *given) - D.simple_loss(policy, *given)) * x0[0].numel() / 2
    torch.testing.assert_close(ratio[:, 0], expected, rtol=2e-3, atol=1e-2)
    assert ratio.abs().min() > 1


def test_diffusion_dpo_keeps_one_state(tmp_path):
    _, _, _, rollouts = collected(tmp_path, loss="diffusion_dpo", candidates="independent")
    assert rollouts.x_t.shape[1] == rollouts.action.shape[1] == 1 and rollouts.x0.shape[1] > 1


def test_diffusion_dpo_runs_and_the_frozen_copy_stays(tmp_path):
    result = D.main(config(tmp_path, loss="diffusion_dpo", beta_dpo=0.05, lr=1e-3, steps=10))
    (line,) = [json.loads(x) for x in (Path(result["folder"]) / "log.jsonl").read_text().splitlines()]
    assert line["kl"] > 0 and line["loss_d3po"] > 0


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("loss", ["d3po", "diffusion_dpo"])
def test_the_whole_step_needs_one_device_only(monkeypatch, loss, lora):
    """Both parts of L, their backward and the update on the meta device, where a tensor left on the CPU is an error as
    it is beside a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know that device
    policy, pre = random_model(), random_model().to("meta")
    if lora:
        policy.add_lora(lora)
    policy.freeze(attention_only=True)
    policy.to("meta")
    parameters, schedule = [p for p in policy.parameters() if p.requires_grad], Schedule(policy.cfg)
    batch = random_batch(policy.cfg, "meta", B=2, R=3, G=3)
    if loss == "d3po":
        ratio, kl = D.step_log_ratio(policy, schedule, batch, 0 * batch.x_t, True)
    else:
        ratio, kl = D.forward_log_ratio(policy, pre, batch, 0, 0, True)
    (-torch.nn.functional.logsigmoid(ratio[:, 0] - ratio[:, 1]).mean() + kl.mean()).backward()
    views = make_toys(2, 16, 0)
    real = D.training_batch(policy, schedule, [views], 2, 0, 0, torch.device("meta"))
    D.simple_loss(policy, schedule, *real).mean().backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters) > 0
    assert {z.device.type for z in (ratio, kl, *gradients)} == {"meta"}
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, 1e-4).step()


def test_attention_layers_or_lora_alone_can_be_trained(tmp_path):
    before = load(config(tmp_path).model)
    attention = {id(p) for p in before.attention_parameters()}
    for changes, kinds in (({}, {True}), ({"attention_only": False}, {True, False}), ({"lora": 2}, {True})):
        after = dict(load(D.main(config(tmp_path, lr=1e-3, **changes))["folder"]).named_parameters())
        assert {
            id(p) in attention for n, p in before.named_parameters() if not torch.equal(p, after[n])
        } == kinds


@pytest.mark.slow
def test_redder_makes_pictures_redder(tmp_path):
    """The control that everybody understands: a minute on the shipped model, the same loop and loss."""
    cfg = D.Config(
        feedback="redder", num_references=32, eval_objects=16, out=str(tmp_path), lambda_simple=0.0
    )
    result = D.main(cfg)
    views = D.load_split("furniture", "validation", 16, 64)
    none = torch.zeros(0)
    redness = lambda m: D.FEEDBACKS["redder"](none, D.draw_images(Path(m), views[:, 0], cfg), none, cfg)  # noqa: E731
    gain = redness(result["folder"]) - redness(located(cfg.model))
    assert gain.mean() > 0.01 and (gain > 0).float().mean() > 0.8
    assert result["table"]["redder"]["difference"] == pytest.approx(gain.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedback": "taste"}, "--feedback taste: unknown, expected one of contrastive"),
        ({"feedback": "least_noise", "loss": "diffusion_dpo"}, "--candidates noised"),
        ({"trained_calls": (0, 4)}, "--trained_calls 0 4"),
        ({"trained_calls": (2, 1)}, "--trained_calls 2 1"),
        ({"num_steps": 1}, "--num_steps"),
        ({"steps": 0}, "--steps"),
        ({"rounds": 0}, "--rounds"),
        ({"num_candidates": 1}, "--num_candidates"),
        ({"candidates": "noised", "num_candidates": 9}, "--num_candidates 9: expected 5"),
        ({"lora": 33}, "--lora 33: expected a rank of at most 32"),
        ({"feedback": "matching", "matcher": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"lr": math.nan}, "--lr"),
        ({"kl": -0.5}, "--kl"),
        ({"num_steps": 1000, "trained_calls": (0, 2)}, "--num_steps 1000"),
        ({"model": "nowhere"}, "no config.json"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        D.main(config(tmp_path, **changes))
    assert not list((tmp_path / "out").glob("candidates*"))


@pytest.mark.parametrize("feedback", ["contrastive", "oracle"])  # of oracle it is a judge
def test_a_scorer_of_another_size_is_refused(tmp_path, feedback):
    small_scorer("bilinear", 32, 8, 32, 1, 2).save(tmp_path / "scorer")
    with pytest.raises(InputError, match="expected 32 x 32"):
        D.main(config(tmp_path, feedback=feedback, scorer=str(tmp_path / "scorer")))
    assert not list((tmp_path / "out").glob("candidates*"))  # before any work


@pytest.mark.parametrize("loss", ["d3po", "diffusion_dpo"])
def test_bfloat16_is_for_every_forward(tmp_path, autocasts, loss):
    D.main(config(tmp_path, loss=loss, bf16="on"))
    assert autocasts and all(autocasts)


def test_each_report_is_kept_beside_the_others(tmp_path):
    """The SFT baseline does not depend on the number of calls, its report does."""
    found = []
    for changes in ({}, {"num_steps": 4}, {"eval_objects": 3}):
        result = D.main(config(tmp_path, feedback="none", **changes))
        kept = load_json(Path(result["folder"]) / "report" / "results.json")
        assert kept["table"] == result["table"]
        found.append((result["folder"], result["table"]["psnr_unseen"]["before"]))
    assert len({folder for folder, _ in found}) == 1 and len({psnr for _, psnr in found}) == 3
    assert len(list(Path(found[0][0]).glob("report-*/results.json"))) == 3


def test_what_is_in_the_way_shows_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out" / "d3po_oracle").mkdir(parents=True)
    monkeypatch.setattr(D, "collect", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="d3po_oracle: is there, and no link to a result"):
        D.main(config(tmp_path))


def test_a_run_does_not_move_the_link_it_starts_from(tmp_path):
    random_model().save(tmp_path / "out" / "other")
    (tmp_path / "out" / "d3po_oracle").symlink_to("other")
    with pytest.raises(InputError, match="this run moves that link. Expected its folder, .*/other"):
        D.main(config(tmp_path, model=str(tmp_path / "out" / "d3po_oracle")))


@pytest.mark.slow
def test_contrastive_trains_its_own_scorer(tmp_path):
    random_model(image_size=64).save(tmp_path / "pre64")
    cfg = config(
        tmp_path, feedback="contrastive", model=str(tmp_path / "pre64"), negatives=str(tmp_path / "pre64")
    )
    assert math.isfinite(D.main(cfg)["table"]["contrastive"]["after"])
    assert located("checkpoints/objects").is_dir()


@pytest.mark.parametrize("loss, expected", [("d3po", (74.906, 38.287)), ("diffusion_dpo", (66.813, 83.504))])
def test_the_tiny_main_job_ends_where_it_always_did(tmp_path, loss, expected):
    """A net under rearrangements: the change of all weights, by its length and along one random direction. Digits
    instead of a hash, because kernels round differently from machine to machine. Whoever changes the mathematics
    changes these numbers; the tests above say whether it is right."""
    cfg = config(tmp_path, loss=loss, steps=3)
    folder = D.main(cfg)["folder"]
    before, after = (load_tensors(Path(f) / "model.safetensors") for f in (cfg.model, folder))
    change = torch.cat([(after[k] - before[k]).flatten().double() for k in sorted(after)])
    along = torch.randn(len(change), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (1e3 * change.norm().item(), 1e3 * (change @ along).item()) == pytest.approx(expected, rel=1e-2)


def test_the_frozen_means_are_those_of_the_anchor(tmp_path, monkeypatch):
    """Also when training starts from another policy than pi_pre, as later rounds do."""
    cfg, references, folder, _ = collected(tmp_path)
    other_model().save(tmp_path / "start")
    seen, original = [], D.frozen_means

    def spy(model, *rest):
        seen.append([p.detach().clone() for p in model.parameters()])
        return original(model, *rest)

    monkeypatch.setattr(D, "frozen_means", spy)
    preferences = folder, D.prefer(folder, references, cfg)
    D.train(tmp_path / "start", Path(cfg.model), preferences, references, cfg, 0)
    assert all(map(torch.equal, seen[0], random_model().parameters()))
