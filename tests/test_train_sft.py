"""L_simple-MV: its weight, its batches, two steps of the real script, resuming, wrong input."""

import json

import pytest
import torch
from conftest import random_model

import train_sft as T
from common import InputError
from data import make_toys
from model import load
from sample import Schedule


def config(tmp_path, **changes) -> T.Config:
    random_model().save(tmp_path / "init")
    defaults = {
        "init": str(tmp_path / "init"),
        "out": str(tmp_path / "out"),
        "num_objects": 4,
        "eval_objects": 2,
    }
    small = {
        "steps": 2,
        "batch_size": 2,
        "eval_every": 1,
        "log_every": 1,
        "num_steps": 2,
        "bf16": "off",
        "warmup": 1,
    }
    return T.Config(**{**defaults, **small, **changes})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # toys are cached under ./out/data


def test_the_weight_makes_it_the_v_prediction_loss():
    model, views = random_model(), make_toys(2, 16, 0)
    schedule = Schedule(model.cfg)
    latents, y, t, noise, ref_noise = T.training_batch(model, schedule, views, 2, 0, 0, torch.device("cpu"))
    with torch.no_grad():
        got = T.simple_loss(model, schedule, latents, y, t, noise, ref_noise)
        ab = schedule.ab(t)
        x_t = ab.sqrt() * latents + (1 - ab).sqrt() * noise
        r, ab_y = model.cfg.ref_scale, ab[:, 0]
        y_t = (ab_y.sqrt() * r * y + (1 - ab_y).sqrt() * ref_noise) / (ab_y * r**2 + 1 - ab_y).sqrt()
        x0 = model(x_t, t, y_t)
        eps = (x_t - ab.sqrt() * x0) / (1 - ab).sqrt()
        v_error = (ab.sqrt() * eps - (1 - ab).sqrt() * x0) - (ab.sqrt() * noise - (1 - ab).sqrt() * latents)
    torch.testing.assert_close(got, v_error.square().flatten(1).mean(1), rtol=1e-3, atol=1e-5)


def test_batches_depend_on_seed_and_step_alone():
    model, views = random_model(), make_toys(3, 16, 0)
    draw = lambda seed, step: T.training_batch(model, Schedule(model.cfg), views, 4, seed, step, torch.device("cpu"))  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 5), draw(0, 5), strict=True))
    assert not torch.equal(draw(0, 5)[3], draw(0, 6)[3]) and not torch.equal(draw(0, 5)[3], draw(1, 5)[3])
    latents, y, t, _, _ = draw(0, 5)
    assert torch.equal(y, latents[:, 0])  # the reference is the relative front
    assert (t >= 1).all() and (t < 1000).all()
    assert sorted((t * 4 // 1000).tolist()) == [0, 1, 2, 3]  # stratified


def test_two_steps_write_everything_and_move_the_weights(tmp_path):
    result = T.main(config(tmp_path))
    out = tmp_path / "out"
    for name in ("config.json", "model.safetensors", "log.jsonl", "run.json", "grid.png", "state.pt"):
        assert (out / name).stat().st_size > 0
    assert {"psnr", "psnr_unseen", "psnr_unseen_white", "hull"} <= result.keys()
    assert any("loss" in json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    before, after = load(tmp_path / "init").state_dict(), load(out).state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_attention_only_leaves_the_rest_alone(tmp_path):
    T.main(config(tmp_path, attention_only=True))
    before, after = load(tmp_path / "init").state_dict(), load(tmp_path / "out").state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(".attn1." in k for k in moved)


@pytest.mark.parametrize("shape", [(6, 6), (40, 8), (8, 4, 3, 3)])
def test_muon_moves_every_direction_equally_far(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    g = torch.randn(shape).flatten(1)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    p.grad = (u * torch.logspace(0, -1, len(s)) @ v).view(shape)  # singular values 1 to .1
    T.Muon([p], lr=0.1).step()
    moved = torch.linalg.svdvals(p.detach().flatten(1)) / (0.1 * max(1, g.shape[0] / g.shape[1]) ** 0.5)
    assert (moved > 0.6).all() and (moved < 1.3).all()
    assert (p * p.grad).sum() < 0  # downhill


def test_muon_is_for_networks_from_nothing_only(tmp_path, monkeypatch):
    made = []

    class Spy(T.Muon):
        def __init__(self, params, lr):
            made.append([p.ndim for p in params])
            super().__init__(params, lr)

    monkeypatch.setattr(T, "Muon", Spy)
    T.main(config(tmp_path, steps=1))
    assert not made
    monkeypatch.setitem(T.PRESETS, "toy", random_model().cfg)
    T.main(config(tmp_path, steps=1, init="", out=str(tmp_path / "new")))
    assert {2, 4} == set(made[0])


@pytest.mark.parametrize("start", ["from_nothing", "from_a_model", "lora"])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, start):
    monkeypatch.setitem(T.PRESETS, "toy", random_model().cfg)
    changes = {"from_nothing": {"init": ""}, "from_a_model": {}, "lora": {"lora": 2}}[start]
    T.main(config(tmp_path, out=str(tmp_path / "whole"), steps=4, **changes))
    whole = load(tmp_path / "whole").state_dict()
    killed = config(tmp_path, out=str(tmp_path / "parts"), steps=4, **changes)
    original = T.simple_loss
    calls = []

    def dies(*args):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    T.simple_loss = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            T.main(killed)
    finally:
        T.simple_loss = original
    T.main(killed)
    parts = load(tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_another_config_is_not_resumed(tmp_path):
    T.main(config(tmp_path))
    with pytest.raises(InputError, match="made with lr 0.001; expected lr 1e-05"):
        T.main(config(tmp_path, lr=1e-5))


def test_wrong_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--preset huge"):
        T.main(config(tmp_path, preset="huge"))
    with pytest.raises(InputError, match="--base x: --preset toy starts from nothing"):
        T.main(config(tmp_path, init="", base="x"))
    with pytest.raises(InputError, match="made with True and 16"):
        T.main(config(tmp_path, cross_view=False))
    with pytest.raises(InputError, match="--split test"):
        T.main(config(tmp_path, split="test"))
    with pytest.raises(InputError):
        T.main(config(tmp_path, data=str(tmp_path / "nowhere")))
