"""The D3PO loss, the pairs on disk, the check before the first update, and the whole script on two steps."""

import json
import math

import pytest
import torch
from conftest import random_model

import train_d3po as D
from common import InputError, load_json, load_tensors, save_tensors
from data import make_toys
from model import load
from sample import Schedule, log_ratio
from scorer import Scorer, small_scorer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # toys are cached under ./out/data


def config(tmp_path, **changes) -> D.Config:
    if not (tmp_path / "pre").exists():
        random_model().save(tmp_path / "pre")
    small = {
        "num_objects": 3,
        "eval_objects": 2,
        "num_steps": 5,
        "first_call": 1,
        "steps": 2,
        "batch_objects": 2,
    }
    defaults = {
        "model": str(tmp_path / "pre"),
        "out": str(tmp_path / "out"),
        "feedback": "noise_scale",
        "bf16": "off",
        "log_every": 1,
    }
    return D.Config(**{**defaults, **small, **changes})


# --- the loss ---


def test_loss_is_log_2_at_theta_equal_pre():
    loss, metrics = D.d3po_loss(torch.zeros(3), torch.zeros(3), beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0.5


def test_loss_of_a_hand_computed_value():
    # beta 0.5: margins 0.5 (2 - 0) = 1 and 0.5 (-1 - 3) = -2; mean of log(1 + e^-1) and log(1 + e^2)
    loss, metrics = D.d3po_loss(torch.tensor([2.0, -1.0]), torch.tensor([0.0, 3.0]), beta=0.5)
    assert loss.item() == pytest.approx((0.3132617 + 2.1269280) / 2, abs=1e-6)
    assert metrics["accuracy"] == 0.5 and metrics["margin"] == pytest.approx(-0.5)


def test_swapping_winner_and_loser_negates_the_margin():
    a, b = torch.randn(2, 4)
    one, swapped = D.d3po_loss(a, b, 0.3), D.d3po_loss(b, a, 0.3)
    assert one[1]["margin"] == pytest.approx(-swapped[1]["margin"])
    # softplus(-m) - softplus(m) = -m
    assert (one[0] - swapped[0]).item() == pytest.approx(-one[1]["margin"], abs=1e-6)


def test_descent_moves_the_winners_mean_to_its_action_and_the_losers_away():
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(2, 5, 4, 2, 2, generator=g)
    action = pre + 0.1 * torch.randn(pre.shape, generator=g)
    var = torch.full((2, 1, 1, 1, 1), 0.01)
    mean = pre.clone().requires_grad_(True)
    ratio = log_ratio(action, mean, pre, var)
    D.d3po_loss(ratio[:1], ratio[1:], beta=1.0)[0].backward()
    assert mean.grad is not None
    towards = torch.nn.functional.cosine_similarity(-mean.grad.flatten(1), (action - pre).flatten(1))
    torch.testing.assert_close(towards, torch.tensor([1.0, -1.0]))
    # dL/dmean_w = -beta/2 (a - mean) / var at theta = pre
    torch.testing.assert_close(mean.grad[0], -0.5 * (action - pre)[0] / 0.01)


def test_equal_step_weight_evens_out_an_error_in_x0():
    schedule = Schedule(random_model().cfg)
    calls = schedule.timesteps(20)[4:19]
    weights = D.step_weights(schedule, calls, "equal")
    t, s = (torch.tensor(z) for z in zip(*calls, strict=True))
    x = torch.randn(15, 5, 3, 2, 2)
    mean, var = D.ddpm_step(schedule, x, torch.zeros_like(x), t, s)
    moved, _ = D.ddpm_step(schedule, x + 0.1, torch.zeros_like(x), t, s)
    worth = weights * ((moved - mean).square() / var).flatten(1).mean(1)
    torch.testing.assert_close(worth, worth[:1].expand(15), rtol=1e-3, atol=0)
    assert D.step_weights(schedule, calls, "none").eq(1).all()
    root = D.step_weights(schedule, calls, "root")
    torch.testing.assert_close(root**2 / (root**2).mean(), weights)


# --- candidates, preferences, means ---


def collected(tmp_path, **changes):
    cfg = config(tmp_path, **changes)
    model, views = load(cfg.model), make_toys(3, 16, 1)
    folder = tmp_path / "candidates"
    D.collect(model, views, cfg, folder, CPU)
    return cfg, model, views, folder


def test_pairs_name_the_best_and_the_worst(tmp_path):
    cfg, _, views, folder = collected(tmp_path)
    ranked = D.prefer(cfg, views, folder, CPU)
    assert [(e["object"], e["order"]) for e in ranked] == [(i, [0, 1, 2, 3, 4]) for i in range(3)]
    assert D.pairs_of(ranked[0], "best_worst") == [(0, 4)]
    every = D.pairs_of(ranked[0], "all")
    assert len(set(every)) == 10 and all(win < lose for win, lose in every)
    tied = {"order": [2, 0, 1], "rewards": [1.0, 1.0, 3.0]}
    assert D.pairs_of(tied, "all") == [(2, 0), (2, 1)]


def test_pairs_find_their_rows():
    """Two objects, three candidates each, rows in the order of the candidates."""
    one = {"object": 7, "order": [2, 0, 1], "rewards": [2.0, 1.0, 3.0]}
    two = {"object": 4, "order": [1, 2, 0], "rewards": [1.0, 3.0, 1.0]}
    rows, winners, losers = D.lay_out([(one, 5), (two, 6)], "all")
    assert rows == [(7, 0, 5), (7, 1, 5), (7, 2, 5), (4, 0, 6), (4, 1, 6), (4, 2, 6)]
    assert list(zip(winners, losers, strict=True)) == [(2, 0), (2, 1), (0, 1), (4, 5), (4, 3)]
    rows, winners, losers = D.lay_out([(one, 5), (two, 6)], "best_worst")
    assert rows == [(7, 1, 5), (7, 2, 5), (4, 0, 6), (4, 1, 6)] and (winners, losers) == ([1, 3], [0, 2])


def test_ties_make_no_pair(tmp_path, monkeypatch):
    cfg, _, views, folder = collected(tmp_path)
    monkeypatch.setattr(D, "feedback_fn", lambda cfg, device: lambda ref, images, truth: torch.zeros(len(images)))
    with pytest.raises(InputError, match="tie"):
        D.prefer(cfg, views, folder, CPU)


def test_candidates_of_another_run_are_refused(tmp_path):
    cfg, model, views, folder = collected(tmp_path)
    with pytest.raises(InputError, match="made with seed 0; expected seed 1"):
        D.collect(model, views, config(tmp_path, seed=1), folder, CPU)


@pytest.mark.parametrize("condition", ["clean", "sampled"])
def test_log_ratio_is_exactly_zero_before_the_first_update(tmp_path, condition):
    cfg, model, views, folder = collected(tmp_path, condition=condition)
    schedule = Schedule(model.cfg)
    chains = D.Chains(folder, cfg, schedule)
    D.store_means(model, schedule, chains, {(i, g) for i in range(3) for g in (0, 4)}, CPU)
    with torch.no_grad():
        for rows in ([(0, 0, 0), (1, 0, 2), (0, 4, 0), (1, 4, 2)], [(2, 0, 1), (0, 0, 2), (2, 4, 1), (0, 4, 2)]):
            batch = chains.batch(rows, CPU)
            clean = load_tensors(folder / f"{rows[0][0]:04d}.safetensors")["y"][0]
            assert torch.equal(batch["y"][0], clean)  # the winner has a = 0,
            assert torch.equal(batch["y"][2], clean) == (condition == "clean")  # the loser a = 0.8
            mean, var = D.policy_mean(model, schedule, batch)
            assert (log_ratio(batch["action"], mean, chains.mean_pre(rows, CPU), var) == 0).all()
            if condition == "sampled":  # then the actions are the policy's own: standardised, they are its step noise
                z = (batch["action"] - mean) / var.sqrt()
                assert abs(z.std().item() - 1) < 0.02


def test_a_fixed_pair_is_learned(tmp_path):
    """The margin grows, and the winner's action becomes likelier under the clean condition.

    (Both candidates are drawn under it here. A noised loser's gradient is so much larger that the winner's likelihood
    may fall with the loser's: see "log_ratio_w" in the README.)
    """
    cfg, model, views, folder = collected(tmp_path, noise_scales=(0.0, 0.0), common_noise=False, feedback="random")
    schedule = Schedule(model.cfg)
    chains = D.Chains(folder, cfg, schedule)
    D.store_means(model, schedule, chains, {(0, 0), (0, 1)}, CPU)
    rows = [(0, g, j) for g in (0, 1) for j in (1, 2)]
    batch, pre = chains.batch(rows, CPU), chains.mean_pre(rows, CPU)
    optimizer = torch.optim.AdamW(model.attention_parameters(), lr=3e-5)
    margins = []
    for _ in range(15):
        mean, var = D.policy_mean(model, schedule, batch)
        ratio = log_ratio(batch["action"], mean, pre, var)
        loss, metrics = D.d3po_loss(*ratio.chunk(2), beta=0.1)
        margins.append(metrics["margin"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert margins[0] == 0 and margins[-1] > 0.5
    assert metrics["log_ratio_w"] > 0


@pytest.mark.parametrize("feedback", ["contrastive", "matching", "hull", "oracle"])
def test_feedbacks_rank_images(tmp_path, feedback):
    """Truth against truth with another object's right view; all but the untrained scorer must prefer the truth."""
    small_scorer("bilinear", 64, 16, 32, 1, 2).save(tmp_path / "scorer")
    cfg = config(tmp_path, feedback=feedback, scorer=str(tmp_path / "scorer"))
    truth = make_toys(3, 64, 1).float() / 255
    spoilt = truth[0].clone()
    spoilt[1] = truth[2, 1]
    reward = D.feedback_fn(cfg, CPU)(truth[:1, 0].expand(2, -1, -1, -1), torch.stack([truth[0], spoilt]), truth[0])
    assert reward.shape == (2,) and (reward[0] > reward[1] or feedback == "contrastive")


def test_the_scorer_is_asked_for_contrastive_feedback(tmp_path, monkeypatch):
    small_scorer("bilinear", 16, 8, 32, 1, 2).save(tmp_path / "scorer")
    monkeypatch.setattr(D, "contrastive_reward", lambda scorer, ref, images: torch.arange(5.0))  # the noisiest is best
    D.main(config(tmp_path, feedback="contrastive", scorer=str(tmp_path / "scorer")))
    (folder,) = (tmp_path / "out").glob("pairs_contrastive_*")
    assert all(e["order"] == [4, 3, 2, 1, 0] for e in load_json(folder / "pairs.json"))


def test_candidates_do_not_share_noise_with_evaluation(tmp_path):
    cfg, model, views, folder = collected(tmp_path)
    drawn = D.sample(model, views[:, 0].float() / 255, [D.key_seed(cfg.seed, i) for i in range(3)], cfg.num_steps)
    for i in range(3):
        y_noise = load_tensors(folder / f"{i:04d}.safetensors")["ref_noise"][0]
        assert not torch.allclose(y_noise, drawn.ref_noise[i])


# --- the script ---


def test_two_steps_of_main(tmp_path):
    result = D.main(config(tmp_path, feedback="oracle", lr=1e-3))
    out = tmp_path / "out" / "d3po_oracle"
    for name in ("config.json", "model.safetensors", "log.jsonl", "results.json", "grid.png"):
        assert (out / name).stat().st_size > 0
    assert {"psnr", "psnr_unseen", "ssim", "hull"} <= load_json(out / "results.json")["table"].keys()
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"loss_d3po", "margin", "accuracy", "loss_simple", "grad_d3po", "grad_simple"} <= logged[0].keys()
    assert logged[0]["loss_d3po"] == pytest.approx(math.log(2), abs=1e-3)
    # fine-tuned weights, saved and loaded, change the picture
    views = make_toys(1, 16, 2).float() / 255
    before, after = (D.sample(load(m), views[:, 0], [0], 3).images for m in (config(tmp_path).model, out))
    assert (before - after).abs().max() > 1e-3
    assert D.main(config(tmp_path, feedback="oracle", lr=1e-3))["table"] == result["table"]  # finished before, reused


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    D.main(config(tmp_path, out=str(tmp_path / "whole"), steps=3))
    parts = config(tmp_path, out=str(tmp_path / "parts"), steps=3, save_every=1)
    calls, original = [], D.simple_loss

    def dies(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(D, "simple_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        D.main(parts)
    D.main(parts)
    logs = [(tmp_path / name / "d3po_noise_scale" / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    whole, pieces = (load(tmp_path / name / "d3po_noise_scale").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_candidates_of_other_weights_are_refused(tmp_path):
    D.main(config(tmp_path, steps=1))
    random_model(ref_scale=1.0).save(tmp_path / "pre")
    with torch.no_grad():
        other = random_model()
        other.unet.conv_in.weight.mul_(1.1)
        other.save(tmp_path / "pre")
    for name in ("", "another"):
        with pytest.raises(InputError, match="made with weights"):
            D.main(config(tmp_path, steps=1, name=name))


def test_changed_data_and_scorers_are_noticed(tmp_path, monkeypatch):
    small_scorer("bilinear", 16, 8, 32, 1, 2).save(tmp_path / "scorer")
    cfg = config(tmp_path, steps=1, scorer=str(tmp_path / "scorer"))
    D.main(cfg)
    small_scorer("bilinear", 16, 8, 32, 1, 2).save(tmp_path / "scorer")
    with pytest.raises(InputError, match="made with scorer_weights"):
        D.main(cfg)
    monkeypatch.setattr(D, "load_split", lambda data, split, n, size: make_toys(n, size, 5))
    with pytest.raises(InputError, match="made with objects"):
        D.main(cfg)
    with pytest.raises(InputError, match="made for another object, expected number 0 of toys"):
        D.main(config(tmp_path, steps=1, name="another"))


def test_attention_layers_alone_can_be_trained(tmp_path):
    before = load(config(tmp_path).model)
    attention = {id(p) for p in before.attention_parameters()}
    for attention_only in (True, False):
        cfg = config(tmp_path, steps=1, lr=1e-3, attention_only=attention_only, name=f"run_{attention_only}")
        D.main(cfg)
        after = dict(load(tmp_path / "out" / cfg.name).named_parameters())
        changed = {id(p) in attention for n, p in before.named_parameters() if not torch.equal(p, after[n])}
        assert changed == {True, attention_only}


def test_beta_0_is_sft_and_needs_no_candidates(tmp_path):
    result = D.main(config(tmp_path, beta_dpo=0.0, feedback="contrastive"))
    assert not list((tmp_path / "out").glob("candidates*")) and not list((tmp_path / "out").glob("scorer*"))
    assert not list((tmp_path / "out").glob("pairs*")) and "candidates" not in result["seconds"]
    logged = json.loads((tmp_path / "out" / "sft" / "log.jsonl").read_text().splitlines()[0])
    assert logged["grad_d3po"] == 0 < logged["grad_simple"] and "loss_d3po" not in logged


def test_training_refuses_means_of_another_policy(tmp_path):
    cfg = config(tmp_path, steps=1)
    D.main(cfg)
    (tmp_path / "out" / "d3po_noise_scale" / "results.json").unlink()
    for path in (tmp_path / "out").glob("candidates/means_*/*.safetensors"):
        save_tensors(path, {"means": load_tensors(path)["means"] * 1.5})
    with pytest.raises(InputError, match="before the first update"):
        D.main(cfg)


@pytest.mark.slow
def test_contrastive_trains_its_own_scorer(tmp_path):
    random_model(image_size=64, channels=(16, 32)).save(tmp_path / "pre")
    result = D.main(config(tmp_path, feedback="contrastive", negatives="pretrained"))
    assert Scorer.load(tmp_path / "out" / "scorer_pretrained")
    assert math.isfinite(result["table"]["contrastive"]["after"])


def test_wrong_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--feedback taste: unknown, expected one of contrastive"):
        D.main(config(tmp_path, feedback="taste"))
    with pytest.raises(InputError, match="--first_call 4"):
        D.main(config(tmp_path, first_call=4))
    with pytest.raises(InputError, match="no config.json"):
        D.main(config(tmp_path, model=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="expected 1 or more"):
        D.main(config(tmp_path, steps=0))
    small_scorer("bilinear", 32, 8, 32, 1, 2).save(tmp_path / "scorer")
    with pytest.raises(InputError, match="not a scorer for 16 pixels"):
        D.main(config(tmp_path, feedback="contrastive", scorer=str(tmp_path / "scorer")))
    assert not (tmp_path / "out" / "candidates").exists()
    D.main(config(tmp_path, steps=2))
    with pytest.raises(InputError, match="made with steps 2; expected steps 1"):
        D.main(config(tmp_path, steps=1))
    (tmp_path / "out" / "d3po_noise_scale" / "results.json").unlink()
    (tmp_path / "out" / "d3po_noise_scale" / "state.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="not readable"):
        D.main(config(tmp_path, steps=2))
