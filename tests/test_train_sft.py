"""L_simple-MV: the loss by hand, batches, averaged weights, rates, the real script, resuming, wrong input."""

import json
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_model
from diffusers import UNet2DConditionModel

import cache
import common
import model
import train_sft as T
from common import InputError, digest
from data import load_furniture, make_toys, relative_views
from metrics import hull_iou
from model import load
from muon import Muon
from sample import Schedule, forward_noise, noised_reference

CPU = torch.device("cpu")


def without_text(options: dict) -> Any:
    """What README's fork of the backbone does."""
    unet: Any = UNet2DConditionModel.from_config(options)
    for block in [m for m in unet.modules() if hasattr(m, "attn2")]:
        block.attn2 = block.norm2 = None
    unet.conv_norm_out = None
    return unet


def config(tmp_path, **changes) -> T.Config:
    if not (tmp_path / "init").exists():
        random_model().save(tmp_path / "init")
    small = dict(
        init=str(tmp_path / "init"), out=str(tmp_path / "out" / "sft"), num_objects=4, eval_objects=2
    )
    small |= dict(data=("toys",), augment=False)
    small |= dict(steps=2, batch_size=2, warmup=1, eval_every=1, num_steps=2, bf16="off")
    return T.Config(**{**small, **changes})


# --- the loss and its batches ---


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_the_loss_is_the_squared_error_of_what_is_predicted(prediction):
    """x0 is weighted as v would be; epsilon and v are plain. All three from one plain formula for v and epsilon."""
    model = random_model(prediction=prediction)
    schedule = Schedule(model.cfg)
    latents, y, t, noise, ref_noise = T.training_batch(model, schedule, [make_toys(2, 16, 0)], 2, 0, 0, CPU)
    with torch.no_grad():
        got = T.simple_loss(model, schedule, latents, y, t, noise, ref_noise)
        ab = schedule.alpha_bar[t].float().view(-1, 1, 1, 1, 1)
        x_t = ab.sqrt() * latents + (1 - ab).sqrt() * noise
        r, ab_y = model.cfg.ref_scale, ab[:, 0]
        y_t = (ab_y.sqrt() * r * y + (1 - ab_y).sqrt() * ref_noise) / (ab_y * r**2 + 1 - ab_y).sqrt()
        output = model(x_t, t, y_t)
        v = ab.sqrt() * noise - (1 - ab).sqrt() * latents
        if prediction == "x0":  # the v that goes with this x0
            output = ab.sqrt() * (x_t - ab.sqrt() * output) / (1 - ab).sqrt() - (1 - ab).sqrt() * output
    want = (output - (noise if prediction == "epsilon" else v)).square().flatten(1).mean(1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_the_loss_shows_the_noised_reference_and_one_noise_a_view(monkeypatch):
    model, seen = random_model(), []
    monkeypatch.setattr(
        type(model), "forward", lambda self, x, t, ref: seen.extend((x, ref)) or torch.zeros_like(x)
    )
    schedule = Schedule(model.cfg)
    latents, y, t, noise, ref_noise = T.training_batch(model, schedule, [make_toys(2, 16, 0)], 2, 0, 3, CPU)
    T.simple_loss(model, schedule, latents, y, t, noise, ref_noise)
    assert torch.equal(seen[0], forward_noise(schedule, latents, t, noise))
    assert torch.equal(seen[1], noised_reference(schedule, model.cfg, y, t, ref_noise))
    rows = torch.cat([noise.flatten(0, 1), ref_noise]).flatten(1)  # views and reference: noises of their own
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.25


def test_batches_depend_on_seed_and_step_alone():
    model, views = random_model(), make_toys(3, 16, 0)
    draw = lambda seed, step: T.training_batch(model, Schedule(model.cfg), [views], 4, seed, step, CPU)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 5), draw(0, 5)))
    for other in (draw(0, 6), draw(1, 5)):
        assert not torch.equal(draw(0, 5)[3], other[3]) and not torch.equal(draw(0, 5)[0], other[0])
    latents, y, t, _, _ = draw(0, 5)
    assert torch.equal(y, latents[:, 0])  # the reference is the relative front
    assert (t >= 1).all() and (t < 1000).all()
    assert sorted((t * 4 // 1000).tolist()) == [0, 1, 2, 3]  # stratified
    with pytest.MonkeyPatch.context() as patch:
        for u, want in ((0.0, [1, 250, 500, 750]), (0.2499, [250, 500, 750, 999])):  # from 1 to 999
            patch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor(u))
            assert draw(0, 5)[2].tolist() == want


def test_every_side_becomes_the_reference_and_views_are_renamed():
    model, views = random_model(), make_toys(2, 16, 0)
    frames = [model.encode(relative_views(v, r).float() / 255) for v in views for r in range(4)]
    found = set()
    for step in range(20):
        for latents in T.training_batch(model, Schedule(model.cfg), [views], 2, 0, step, CPU)[0]:
            found.add(next(i for i, f in enumerate(frames) if torch.equal(f, latents)))
    assert found == set(range(8))


def test_sources_take_turns_and_augmentation_is_asked_for():
    model, schedule = random_model(), Schedule(random_model().cfg)
    black, grey = (torch.full((3, 5, 3, 16, 16), z, dtype=torch.uint8) for z in (0, 51))
    latents = T.training_batch(model, schedule, [black, grey, grey], 5, 0, 0, CPU)[0]
    torch.testing.assert_close(latents[:, 0, 0, 0, 0], torch.tensor([-1.0, -0.6, -0.6, -1.0, -0.6]))
    single = [T.training_batch(model, schedule, [black, grey, grey], 1, 0, i, CPU)[0] for i in range(4)]
    assert torch.allclose(torch.cat(single)[:, 0, 0, 0, 0], torch.tensor([-1.0, -0.6, -0.6, -1.0]))
    augmented = T.training_batch(model, schedule, [black], 4, 0, 0, CPU, True)[0]
    each = augmented.flatten(1).mean(1)  # shrunk by itself
    assert (augmented == 1).any() and each.unique().numel() == 4


# --- averaged weights, rates, optimizers ---


def test_the_average_by_hand():
    ema, weights = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    T.average(ema, weights, 0.9, step=0)  # decay min(.9, 1/10)
    assert ema["w"].item() == pytest.approx(0.9)
    T.average(ema, {"w": torch.tensor([0.0])}, 0.9, step=1000)  # decay .9
    assert ema["w"].item() == pytest.approx(0.81)


def test_saved_are_the_averaged_weights_and_training_goes_on_with_the_raw_ones(tmp_path, monkeypatch):
    raw, rates, models, stock = [], [], [], T.trained_parameters

    def kept(model, *args, **kwargs):
        models.append(model)
        return stock(model, *args, **kwargs)

    def spy(optimizers, parameters, rate, step, clip=1.0):
        assert models[0].training and models[0].unet.training  # otherwise nothing is checkpointed
        assert not raw or all(p.equal(w) for p, w in zip(parameters, raw[-1]))  # evaluation put them back
        norm = common.optimizer_step(optimizers, parameters, rate, step, clip)
        raw.append([p.detach().clone() for p in parameters])
        rates.append(rate)
        return norm

    monkeypatch.setattr(T, "optimizer_step", spy)
    monkeypatch.setattr(T, "trained_parameters", kept)
    folder = T.main(config(tmp_path, steps=4, warmup=2, ema=0.9, optimizer="adamw"))["folder"]
    warm_up, cosine = (0.5, 1, 1, 1), [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx([w * c for w, c in zip(warm_up, cosine)])
    average = [p.detach().clone() for p in load(config(tmp_path).init).parameters()]
    for step, weights in enumerate(raw):
        d = min(0.9, (1 + step) / (10 + step))
        average = [d * a + (1 - d) * w for a, w in zip(average, weights)]
    for saved, want in zip(load(folder).parameters(), average):
        torch.testing.assert_close(saved, want, rtol=1e-4, atol=1e-6)
    assert any((s - w).abs().max() > 1e-5 for s, w in zip(load(folder).parameters(), raw[-1]))


def test_a_fresh_model_is_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(T.PRESETS, "toy", random_model().cfg)
    made = T.new_model(config(tmp_path, init="", cross_view=False, image_size=32)).cfg
    assert (made.cross_view, made.image_size, made.channels) == (False, 32, 32)
    models = [T.new_model(config(tmp_path, init="", seed=seed)) for seed in (0, 0, 1)]
    first, again, other = (digest([*map(digest, model.parameters())]) for model in models)
    assert first == again != other


@pytest.mark.parametrize("shape", [(6, 6), (40, 8), (8, 4, 3, 3)])
def test_muon_moves_every_direction_equally_far(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    g = torch.randn(shape).flatten(1)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    p.grad = (u * torch.logspace(0, -1, len(s)) @ v).view(shape)  # singular values 1 to .1
    Muon([p], lr=0.1).step()
    moved = torch.linalg.svdvals(p.detach().flatten(1)) / (0.1 * max(1, g.shape[0] / g.shape[1]) ** 0.5)
    assert (moved > 0.6).all() and (moved < 1.3).all()
    assert (p * p.grad).sum() < 0  # downhill


def test_muons_second_step_is_along_nesterovs_momentum():
    first, second = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    p, q = (torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    muon = Muon([p], lr=0.1)
    for p.grad in (first, second):
        before = p.detach().clone()
        muon.step()
    momentum = 0.95 * 0.05 * first + 0.05 * second
    q.grad = 0.05 * second + 0.95 * momentum  # a first step's own momentum does not turn it
    Muon([q], lr=0.1).step()
    torch.testing.assert_close(p.detach() - before, q.detach(), atol=1e-5, rtol=0)


def test_muon_by_hand():
    """Keller Jordan's quintic, five times, on each singular value; in float32 to float32's rounding."""
    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.diag(torch.tensor([3.0, 4.0]))  # of norm 5
    Muon([p], lr=0.1).step()
    expected = []
    for s in (0.6, 0.8):
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected.append(-0.1 * s)
    torch.testing.assert_close(p.detach(), torch.diag(torch.tensor(expected)), atol=1e-5, rtol=0)


def test_muon_is_for_networks_from_nothing_unless_asked_for(tmp_path):
    model = random_model()
    parameters = list(model.parameters())

    def kinds(**changes) -> list[str]:
        return [type(o).__name__ for o in T.new_optimizers(model, parameters, config(tmp_path, **changes))]

    assert kinds() == kinds(init="", optimizer="adamw") == ["AdamW"]
    assert kinds(init="") == kinds(optimizer="muon") == ["AdamW", "Muon"]
    adamw, muon = T.new_optimizers(model, parameters, config(tmp_path, init="", lr=1e-3, muon_lr=0.02))
    groups = [{id(p) for p in o.param_groups[0]["params"]} for o in (adamw, muon)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == len(parameters)
    muons = {n for n, p in model.named_parameters() if id(p) in groups[1]}
    assert not [n for n in muons if "time_emb" in n or "position" in n] and any("conv" in n for n in muons)
    assert {p.ndim for p in muon.param_groups[0]["params"]} == {2, 4} and muon.param_groups[0]["lr"] == 0.02
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    adamw.step()
    muon.step()
    assert all(map(torch.equal, parameters, before))  # without a gradient nothing moves: no weight decays


# --- the script ---


def test_the_note_tells_all_that_weights_depend_on_and_nothing_else(tmp_path, monkeypatch):
    """Every option, and every module that the stage runs: another value is another run, but of two."""
    for preset in ("toy", "small"):
        monkeypatch.setitem(T.PRESETS, preset, random_model().cfg)
    notes = []  # of results that are not made
    monkeypatch.setattr(T, "cached", lambda root, name, made_by, make: notes.append(made_by) or 1 / 0)

    def note(**changes) -> dict:
        with pytest.raises(ZeroDivisionError):
            T.main(config(tmp_path, **{"init": "", **changes}))
        return notes.pop()

    options = dict(preset="small", image_size=32, cross_view=False, init=config(tmp_path).init, bf16="on")
    options |= dict(attention_only=True, lora=2, data=("toys", "toys"), augment=True, num_objects=3, steps=3)
    options |= dict(batch_size=3, optimizer="adamw", lr=0.1, muon_lr=0.1, warmup=2, ema=0.5, seed=1)
    options |= dict(eval_objects=3, num_steps=3, checkpointing=True, eval_every=2, out="other")
    assert {f.name for f in fields(T.Config)} == {*options, "base", "device"}  # by what they come to
    plain = note()
    assert [k for k, v in options.items() if note(**{k: v}) == plain] == ["eval_every", "out"]
    for module in "data grid metrics model muon pictures sample train_sft".split():
        with monkeypatch.context() as edited:
            edited.setitem(cache.SOURCES, module, cache.SOURCES[module] + "\nx = 1\n")
            assert note() != plain, module


@pytest.mark.parametrize("bf16", ["off", "on"])
def test_the_log_tells_the_loss_and_its_gradients_norm(tmp_path, bf16):
    cfg = config(tmp_path, steps=1, seed=1, bf16=bf16)
    model = load(cfg.init)
    batch = T.training_batch(model, Schedule(model.cfg), [make_toys(4, 16, 0)], 2, 1, 0, CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16 == "on"):
        loss = T.simple_loss(model, Schedule(model.cfg), *batch).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    line = json.loads((Path(T.main(cfg)["folder"]) / "log.jsonl").read_text().splitlines()[0])
    assert line == pytest.approx({"step": 1, "loss_simple": loss.item(), "grad_norm": norm}, rel=1e-5)


def test_two_steps_write_everything_and_are_reused(tmp_path, capsys):
    result = T.main(config(tmp_path))
    folder = Path(result["folder"])
    for name in ("config.json", "model.safetensors", "log.jsonl", "results.json", "grid.png", "made_by.json"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "state.pt").exists() and (tmp_path / "out" / "sft").resolve() == folder.resolve()
    assert {"psnr", "psnr_unseen", "psnr_unseen_white", "hull"} <= result["metrics"].keys()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_psnr" in line] == [1, 2] and "loss_simple" in lines[-2]
    before, after = load(tmp_path / "init").state_dict(), load(folder).state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert T.main(config(tmp_path)) == result and "reused" in capsys.readouterr().out
    assert T.main(config(tmp_path, lr=1e-5))["folder"] != str(folder)
    random_model(ref_scale=3.0).save(tmp_path / "init")
    assert T.main(config(tmp_path))["folder"] != str(folder)  # the start counts by its content


def test_stopped_in_the_last_evaluation_it_does_not_train_again(tmp_path, monkeypatch):
    want, losses = load(T.main(config(tmp_path, out="whole"))["folder"]).state_dict(), []
    with monkeypatch.context() as stopped, pytest.raises(ZeroDivisionError):
        stopped.setattr(T, "evaluate", lambda *args: 1 / 0)
        T.main(config(tmp_path, eval_every=9))
    monkeypatch.setattr(T, "simple_loss", lambda *args: losses.append(args))
    got = load(T.main(config(tmp_path, eval_every=9))["folder"]).state_dict()
    assert not losses and all(torch.equal(got[k], want[k]) for k in want)


def test_a_network_of_another_kind_is_another_run(tmp_path, monkeypatch):
    folders = set()
    for changes in ({}, {"prediction": "v"}, {"channels": 64}):
        monkeypatch.setitem(T.PRESETS, "toy", random_model(**changes).cfg)
        folders.add(T.main(config(tmp_path, init="", steps=1))["folder"])
    stock = model.small_unet

    def gelu(cfg):  # nothing of this fork is in the weights or the config
        options = {**stock(cfg).config, "_use_default_values": [], "act_fn": "gelu"}
        torch.manual_seed(0)
        return without_text(options)

    monkeypatch.setattr(model, "small_unet", gelu)
    folders.add(T.main(config(tmp_path, init="", steps=1))["folder"])
    assert len(folders) == 4


def test_the_evaluation_by_hand(tmp_path, monkeypatch):
    views, asked, shown = make_toys(10, 16, 2), [], []
    truth = views.float() / 255
    drawn = (truth + 0.1).clamp(0, 1)
    monkeypatch.setattr(T, "sample_images", lambda model, ref, *args: asked.append((ref, args)) or drawn)
    monkeypatch.setattr(T, "grid", lambda *args: shown.append(args))
    cfg = config(tmp_path, seed=5, num_steps=7, batch_size=3)
    result = T.evaluate(random_model(), views, cfg, tmp_path / "grid.png")
    ((ref, how),), ((path, columns, refs),) = asked, shown
    assert torch.equal(ref, truth[:, 0]) and how == (5, 7, 3, "evaluate", False)
    assert path == tmp_path / "grid.png" and torch.equal(refs, truth[:8, 0])
    assert torch.equal(columns["truth"], truth[:8]) and torch.equal(columns["sampled"], drawn[:8])
    for name, x in (("hull", drawn), ("hull_truth", truth)):
        assert result[name] == pytest.approx(hull_iou(x).mean().item())
    noisy = drawn - truth
    mean = lambda d: (-10 * d.square().flatten(2).mean(2).log10()).mean().item()  # noqa: E731
    assert result["psnr"] == pytest.approx(mean(noisy), rel=1e-4)
    assert result["psnr_unseen"] == pytest.approx(mean(noisy[:, 1:]), rel=1e-4)
    white = 1 - views[:, 1:].float() / 255
    assert result["psnr_unseen_white"] == pytest.approx(mean(white), rel=1e-4)
    copied = views[:, :1].float() / 255 - views[:, 1:].float() / 255
    assert result["psnr_unseen_copied_reference"] == pytest.approx(mean(copied), rel=1e-4)


def test_a_network_that_looks_at_its_reference_has_two_errors(monkeypatch):
    model = random_model()
    model.cfg.__dict__["ref_scale"] = 1e4  # then Y_t is the reference, scaled to unit size
    monkeypatch.setattr(type(model), "forward", lambda self, x_t, t, ref_t: ref_t[:, None].expand_as(x_t))
    views = make_toys(3, 16, 2)[:, :1].expand(-1, 5, -1, -1, -1)  # all views equal the reference
    errors = T.reference_use(model, views, 2)
    assert {name.split("_")[2] for name in errors} == {"t200", "t500", "t800", "t950"}
    assert errors["x0_error_t500_wrong_ref"] > 2 * errors["x0_error_t500_right_ref"]
    y = model.encode(views[:, 0].float() / 255)  # the wrong one is the object before
    want = ((y.roll(1, 0) - y) ** 2).mean().item()
    assert errors["x0_error_t500_wrong_ref"] == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("start", ["from_nothing", "from_a_model", "lora"])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, start):
    monkeypatch.setitem(T.PRESETS, "toy", random_model().cfg)
    changes = {"from_nothing": {"init": ""}, "from_a_model": {}, "lora": {"lora": 2}}[start]
    whole = T.main(config(tmp_path, out=str(tmp_path / "whole"), steps=4, eval_every=3, **changes))["folder"]
    killed = config(tmp_path, out=str(tmp_path / "parts"), steps=4, eval_every=3, **changes)
    monkeypatch.setattr(common, "SAVE_SECONDS", 0)
    original, calls = T.simple_loss, []

    def dies(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        clock[0] += 100
        return original(*args)

    clock = [0]  # a step takes 100 seconds
    monkeypatch.setattr(T, "simple_loss", dies)
    monkeypatch.setattr(T, "time", SimpleNamespace(time=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        T.main(killed)
    pieces = (result := T.main(killed))["folder"]
    assert len(calls) == 5 and result["seconds"] == 400
    whole, pieces = load(whole).state_dict(), load(pieces).state_dict()
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_bfloat16_is_for_every_forward(tmp_path, autocasts):
    T.main(config(tmp_path, bf16="on"))
    assert autocasts and all(autocasts)


@pytest.mark.parametrize("bf16", ["off", "on"])  # frozen weights of a small model keep their digits
@pytest.mark.parametrize("fresh", [False, True])
def test_attention_only_leaves_the_rest_alone_but_a_fresh_view_embedding(tmp_path, monkeypatch, fresh, bf16):
    monkeypatch.setitem(T.PRESETS, "toy", random_model().cfg)
    cfg = config(tmp_path, attention_only=True, bf16=bf16, **({"init": ""} if fresh else {}))
    before, after = T.new_model(cfg).state_dict(), load(T.main(cfg)["folder"]).state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    attention = {k for k in moved if ".attn1." in k}
    assert attention and moved - attention == ({"unet.class_embedding.weight"} if fresh else set())


def test_furniture_trains_on_its_training_split_and_is_judged_on_its_own(tmp_path, monkeypatch):
    random_model(image_size=64, patch=8).save(tmp_path / "init64")
    seen, original, judged = [], T.training_batch, []
    monkeypatch.setattr(T, "training_batch", lambda *args: seen.append(args) or original(*args))
    monkeypatch.setattr(T, "evaluate", lambda model, views, *rest: judged.append(views) or {})
    changes = dict(data=("furniture", "furniture", "toys"), augment=True, steps=1, num_objects=3)
    T.main(config(tmp_path, init=str(tmp_path / "init64"), **changes))
    furniture, again, toys = seen[0][2]
    assert again is furniture  # named twice, it takes two turns
    assert torch.equal(furniture, load_furniture("train", 64)[1][:3]) and seen[0][-1] is True
    assert torch.equal(toys, make_toys(3, 64, 0))
    assert torch.equal(judged[0], load_furniture("validation", 64)[1][:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "", "base": "x"}, "--base x: --preset toy starts from nothing"),
        ({"base": "x"}, "--base x and --init .*: expected one of them"),
        ({"cross_view": False}, "made with True and 16"),
        ({"data": ("nowhere",)}, "nowhere: no such folder"),
        ({"steps": 0}, "--steps"),
        ({"lr": float("nan")}, "--lr"),
        ({"ema": 1.5}, "--ema 1.5"),
        ({"num_steps": 1000}, "--num_steps 1000"),
        ({"init": "nowhere"}, "nowhere: no config.json"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        T.main(config(tmp_path, **changes))
    assert not list((tmp_path / "out").glob("sft*"))


def test_what_is_in_the_way_shows_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out" / "sft").mkdir(parents=True)
    monkeypatch.setattr(T, "new_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="sft: is there, and no link to a result"):
        T.main(config(tmp_path))
