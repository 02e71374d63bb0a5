"""Training of the scorer: its losses by hand, whose objects it sees, batches, negatives, resuming."""

import json
import shutil
from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

import cache
import common
import train_scorer as T
from common import InputError, load_tensors, save_json, save_tensors
from data import MIRRORED_ORDER, load_split, make_references, make_toys, write_views
from metrics import hull_iou
from render import render_primitives
from sample import sample
from toys import pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten toys in a folder, and a random model that draws the negatives."""
    root = tmp_path_factory.mktemp("renders")
    for i, views in enumerate(make_toys(10, 16, seed=7)):
        write_views(root / "true" / f"object_{i}", views)
    random_model().save(root / "model")
    return root


def config(folders: Path, out: Path, **changes) -> T.Config:
    small = dict(num_references=4, num_val=2, image_size=16, patch_size=4, hidden_size=16, num_layers=1)
    small |= dict(
        head="bilinear",
        texture=0.0,
        num_heads=2,
        steps=6,
        batch_size=2,
        eval_every=4,
        device="cpu",
        bf16="off",
        twins=False,
    )
    small |= dict(data=str(folders / "true"), negatives=str(folders / "model"), num_steps=2, out=str(out))
    return T.Config(**{**small, **changes})


# --- objects and pairs ---


def test_negatives_of_another_model_are_read_from_a_folder(folders, tmp_path):
    views = make_toys(10, 16, seed=8)
    for i, drawn in enumerate(views):
        write_views(tmp_path / "drawn" / f"object_{i}", drawn)
    cfg = config(folders, tmp_path / "run" / "scorer", negatives=str(tmp_path / "drawn"))
    truth, fake, n = T.make_pairs(cfg)
    assert n == 4 and truth.shape == fake.shape == (6, 5, 3, 16, 16)
    order: list[list[int]] = []
    for loaded, source in (
        (truth, make_toys(10, 16, seed=7)),
        (fake, views),
    ):  # equal objects in equal places
        order.append([next(i for i, v in enumerate(source) if torch.equal(v, x)) for x in loaded])
    assert order[0] == order[1]
    (tmp_path / "drawn" / "object_3").rename(tmp_path / "drawn" / "chair")
    with pytest.raises(InputError, match="views of the objects of --data"):
        T.make_pairs(cfg)


# --- losses ---


def test_loss_by_hand():
    f_true, f_fake = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-2.0, 0.5]])
    want = (0 + 0.25 + 1 + 1) / 4 + (0 + 1 + 4 + 0.25) / 4
    assert T.consistency_loss(f_true, f_fake).item() == pytest.approx(want)
    assert T.consistency_loss(torch.ones(3, 4), torch.zeros(3, 4)).item() == 0
    assert T.consistency_loss(f_true, f_fake[:, :0]).item() == pytest.approx((0 + 0.25 + 1 + 1) / 4)


def test_auc_by_hand():
    # pairs: .8 > .3, .8 > .5, .8 > .1;  .5 > .3, .5 = .5 (half), .5 > .1
    assert T.auc(torch.tensor([0.8, 0.5]), torch.tensor([0.3, 0.5, 0.1])) == pytest.approx(5.5 / 6)
    assert T.auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0])) == 1
    assert T.auc(torch.zeros(3), torch.zeros(4)) == 0.5


@pytest.mark.parametrize("head", ["bilinear", "epipolar"])
@pytest.mark.parametrize("generated", [True, False])
def test_own_and_other_views_go_into_their_own_terms(folders, tmp_path, head, generated):
    """The three terms against one call of the scorer for every pair of a reference and a view."""
    scorer = T.new_scorer(config(folders, tmp_path, head=head))
    for name, parameter in scorer.named_parameters():
        if name in ("linear.weight", "W", "A", "b"):
            torch.nn.init.normal_(parameter, std=0.1)
    images = torch.rand(3, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss, mismatch = T.scorer_loss(scorer, images if generated else images[:, :5])

    def f(i: int, j: int, m: int) -> float:  # image m of object j at its place among the five
        views = images[j, m].expand(1, 5, -1, -1, -1)
        return scorer.score(images[i : i + 1, 0], views)[0, (m - 1) % 4 + 1].item()

    own = [(f(i, i, m) - 1) ** 2 for i in range(3) for m in range(1, 5)]
    fake = [f(i, i, m) ** 2 for i in range(3) for m in range(5, 9)]
    other = [f(i, j, m) ** 2 for i in range(3) for j in range(3) for m in range(1, 5) if i != j]
    assert loss.item() == pytest.approx(sum(own) / 12 + generated * sum(fake) / 12, rel=1e-4)
    assert mismatch.item() == pytest.approx(sum(other) / 24, rel=1e-4)


@pytest.mark.parametrize("mismatch, generated", [(0.0, True), (2.0, True), (2.0, False)])
def test_the_gradient_is_that_of_all_terms(folders, tmp_path, monkeypatch, mismatch, generated):
    cfg = config(folders, tmp_path / "run" / "scorer", steps=2, lr=1e-3, head_lr=1e-2, mismatch=mismatch)
    cfg = cfg if generated else replace(cfg, negatives="")
    seen = []

    def spy(optimizers, parameters, rate, step, clip=1.0):
        grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters]
        seen.append((rate, clip, grads, [g["lr"] for g in optimizers[0].param_groups]))
        return common.optimizer_step(optimizers, parameters, rate, step, clip)

    monkeypatch.setattr(T, "optimizer_step", spy)
    T.main(cfg)
    truth, fake, n = T.make_pairs(cfg)
    scorer = T.new_scorer(cfg)
    loss, other = T.scorer_loss(scorer, T.make_batch(cfg, truth[:n], fake[:n], 0))
    grads = torch.autograd.grad(loss + mismatch * other, list(scorer.parameters()), allow_unused=True)
    (rate, clip, first, lrs), (next_rate, *_) = seen
    for got, want in zip(first, grads):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    # warm-up times cosine; encoder and head have rates of their own
    assert (rate, next_rate, *lrs) == pytest.approx((1 / 20, 2 / 20 / 2, 1e-3, 1e-2)) and clip == float("inf")


def test_the_first_step_and_its_line_by_hand(folders, tmp_path):
    """Of Adam the first step is the gradient's sign; the weights decay besides."""
    cfg = config(folders, tmp_path / "run" / "scorer", mismatch=2.0, steps=1, weight_decay=10.0, seed=1)
    folder = Path(T.main(cfg)["folder"])
    truth, fake, n = T.make_pairs(cfg)
    scorer, trained = T.new_scorer(cfg), T.Scorer.load(folder)
    loss, other = T.scorer_loss(scorer, T.make_batch(cfg, truth[:n], fake[:n], 0))
    grads = torch.autograd.grad(loss + 2 * other, parameters := list(scorer.parameters()), allow_unused=True)
    norm = torch.cat([g.flatten() for g in grads if g is not None]).norm().item()
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    want = {"step": 1, "loss_consistency": loss.item(), "loss_mismatch": other.item(), "grad_norm": norm}
    assert line == pytest.approx(want, rel=1e-4)
    rate = cfg.lr / 20  # warm-up
    for before, g, after in zip(parameters, grads, trained.parameters()):
        step = 0 if g is None else rate * (cfg.weight_decay * before + g / (g.abs() + 1e-8))
        torch.testing.assert_close(after, before - step, rtol=0, atol=1e-6)


def test_a_new_scorer_is_what_was_asked_for(folders, tmp_path, monkeypatch):
    new = lambda **changes: T.new_scorer(config(folders, tmp_path, **changes))  # noqa: E731
    assert new().W is not None and new(head="concat").W is None
    first, again, other = (new(seed=s).encoder.embeddings.cls_token for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    monkeypatch.setattr(T, "pretrained_scorer", lambda *args: args)
    assert new(backbone="dino", head="concat", backbone_size=28) == ("dino", "concat", 28)


# --- objects and batches ---


def test_it_trains_on_preference_objects_and_validates_on_others(folders, tmp_path, monkeypatch):
    cfg = config(folders, tmp_path / "run" / "scorer", data="toys", seed=1)
    truth, fake, n = T.make_pairs(cfg)
    assert n == 4 and truth.shape == fake.shape == (6, 5, 3, 16, 16)
    assert torch.equal(truth[:4], make_references(load_split("toys", "preference", 4, 16), 4, 1))
    assert torch.equal(truth[4:], make_toys(2, 16, 2))
    trained_on, judged_on = [], []
    batch, judge = T.make_batch, T.evaluate
    monkeypatch.setattr(T, "make_batch", lambda c, x, y, s: trained_on.append((x, y, s)) or batch(c, x, y, s))
    monkeypatch.setattr(T, "evaluate", lambda s, x, y: judged_on.append((x, y)) or judge(s, x, y))
    T.main(cfg)
    assert all(torch.equal(x, truth[:4]) and torch.equal(y, fake[:4]) for x, y, _ in trained_on)
    assert all(torch.equal(x, truth[4:]) and torch.equal(y, fake[4:]) for x, y in judged_on)
    assert [step for *_, step in trained_on] == [*range(6)] and len(judged_on) == 2


def test_negatives_are_the_generators_own_and_made_once(folders, tmp_path, monkeypatch):
    cfg = config(folders, tmp_path / "run" / "scorer", num_steps=3)
    truth, fake, n = T.make_pairs(cfg)
    assert torch.equal(truth[n:], load_split(cfg.data, "validation", 2, 16))
    for key, low, high in (((0, 9), 0, 0.35), ((0,), 1, 255)):  # rounded; other noise than in evaluation
        seeds = [T.key_seed(*key, i) for i in range(6)]
        images = sample(random_model(), truth[:, 0].float() / 255, seeds, 3).images
        assert low <= (images * 255 - fake.float()).abs().mean() <= high
    calls = []
    monkeypatch.setattr(T, "sample", lambda *args, **kw: calls.append(0))
    assert torch.equal(T.make_pairs(cfg)[1], fake) and not calls
    (path,) = (tmp_path / "run").glob("negatives-*/000000.safetensors")
    assert torch.equal(load_tensors(path)["views"], fake)
    with pytest.raises(InputError, match="makes images of 16 px"):
        T.make_pairs(replace(cfg, image_size=32))


def test_bfloat16_is_for_the_generator_but_on_a_cpu_not_for_the_scorer(
    folders, tmp_path, monkeypatch, autocasts
):
    asked, loss = [], T.scorer_loss
    monkeypatch.setattr(T, "scorer_loss", lambda *args: asked.append(args[2]) or loss(*args))
    T.main(config(folders, tmp_path / "run" / "scorer", bf16="on"))
    assert autocasts and all(autocasts) and asked and not any(asked)


def test_texture_is_on_every_view_but_the_reference_and_blotches_leave_white_white(folders, tmp_path):
    plain, truth = config(folders, tmp_path, batch_size=6), make_toys(6, 64, seed=7)
    cfg = replace(plain, texture=0.3)
    for step in range(3):
        smooth, rough = (T.make_batch(c, truth, truth.flip(0), step) for c in (plain, cfg))
        assert torch.equal(rough[:, 0], smooth[:, 0]) and 0 <= rough.min() and rough.max() <= 1
        change = (rough - smooth)[:, 1:]
        assert all(0.01 < c.abs().mean() < 0.3 for c in change.flatten(0, 1))  # of true and generated views
        assert not torch.equal(change[:, 0], change[:, 4])
        third = T.make_batch(replace(cfg, texture=0.1), truth, truth.flip(0), step)[:, 1:] - smooth[:, 1:]
        assert 2.2 < change.abs().mean() / third.abs().mean() < 3.1  # less than 3 where it is clamped
    white, grey, g = torch.ones(1, 1, 3, 64, 64), torch.full((1, 1, 3, 64, 64), 0.5), T.keyed_generator
    assert T.texture(white, 1.0, g(0)).mean() == pytest.approx(1 - 0.15 * 0.399, abs=2e-3)  # half a Gaussian
    weak, strong = (T.texture(grey, s, g(0)) - 0.5 for s in (0.1, 0.2))
    torch.testing.assert_close(strong, 2 * weak, atol=1e-5, rtol=0)
    blotches = torch.nn.functional.avg_pool2d(weak[0], 8)  # grain has a mean near 0
    assert blotches.std() > 0.02 and (weak[0, 0, :, :, 1:] - weak[0, 0, :, :, :-1]).std() < 0.03


def test_augmentation_keeps_truth_and_generated_alike(folders, tmp_path):
    cfg, truth = config(folders, tmp_path, batch_size=6), make_toys(6, 16, seed=7)
    batches = [T.make_batch(cfg, truth, truth, step) for step in range(8)]  # "generated" = truth: stays equal
    assert all(torch.equal(b[:, 1:5], b[:, 5:]) for b in batches)
    assert torch.equal(batches[3], T.make_batch(cfg, truth, truth, 3))
    assert not torch.equal(batches[3], T.make_batch(replace(cfg, seed=1), truth, truth, 3))
    mirrored = truth[:, MIRRORED_ORDER].flip(-1)
    versions = [x[:, list(p)] for x in (*truth, *mirrored) for p in permutations(range(3))]
    whole = {v.numpy().tobytes() for v in versions}
    found = [(b[0, :5] * 255).round().to(torch.uint8).numpy().tobytes() for b in batches]
    assert all(f in whole for f in found) and len(set(found)) > 2


def test_without_a_generator_a_batch_holds_true_views_alone(folders, tmp_path):
    cfg = config(folders, tmp_path / "run" / "scorer", negatives="", batch_size=4)
    truth, fake, n = T.make_pairs(cfg)
    assert torch.equal(fake, truth[:, :1]) and n == 4 and not (tmp_path / "run").exists()  # nothing drawn
    for each in (cfg, replace(cfg, twins=True)):
        alone, whole = ([T.make_batch(each, truth, f, step) for step in range(8)] for f in (fake, truth))
        assert all(a.shape[1] == 5 and torch.equal(a, w[:, :5]) for a, w in zip(alone, whole))
    metrics = T.evaluate(T.new_scorer(cfg), truth[n:], fake[n:])
    assert "auc_stretched" in metrics and "auc_generated" not in metrics


def test_twins_are_the_same_object_in_other_proportions(folders, tmp_path, monkeypatch):
    cfg, truth = config(folders, tmp_path, batch_size=4, twins=True), make_toys(6, 64, seed=7)
    batch = T.make_batch(cfg, truth, truth, 0)
    assert batch.shape == (4, 9, 3, 64, 64) and torch.equal(batch[2:, 1:5], batch[2:, 5:])
    assert (batch[:2] - batch[2:]).abs().flatten(1).mean(1).min() > 0.01
    assert hull_iou(batch[2:, :5]).min() > 0.95  # true views: they fit one object
    mixed = torch.cat([batch[:2, :1], batch[2:, 1:5]], 1)
    assert hull_iou(mixed).max() < hull_iou(batch[:2, :5]).min()  # and not the other one's reference
    monkeypatch.setattr(T, "stretch", lambda images, factors, cameras: factors)
    g = torch.Generator().manual_seed(0)
    low, high = torch.cat([T.twin(batch, g) for _ in range(100)]).aminmax()
    assert 0.6 <= low < 0.61 and 0.99 < high <= 1


def test_mirroring_the_world_is_what_a_mirrored_object_shows():
    # Mirror an object's geometry: its five views must be those that the augmentation makes.
    part = {"half": (0.3, 0.2, 0.1), "color": (0.9, 0.1, 0.1), "quadric": (0, 2, 0)}
    other = {"half": (0.1, 0.3, 0.2), "color": (0.1, 0.2, 0.8), "quadric": (0, 2, 0)}
    plain = [dict(part, center=(0.4, 0.1, 0.3)), dict(other, center=(-0.5, -0.3, -0.1))]
    mirrored = [dict(p, center=(-p["center"][0], *p["center"][1:])) for p in plain]
    light = torch.tensor([0.0, 0.8, 0.6])  # the light would have to be mirrored too
    a, b = (render_primitives([pack(p)], 32, light=light)[0] for p in (plain, mirrored))
    assert torch.equal(a[MIRRORED_ORDER].flip(-1), b)


# --- the script ---


def test_each_negative_has_its_noise_and_stands_beside_its_truth(folders, tmp_path, monkeypatch):
    """Also behind the first sixteen, which are drawn together, and however a file system lists them."""
    seen: list[int] = []

    def draw(model, ref, seeds, *_, **__):
        seen.extend(seeds)
        return SimpleNamespace(images=ref[:, None].expand(-1, 5, -1, -1, -1))

    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: sorted(listed(self, pattern), reverse=True))
    monkeypatch.setattr(T, "sample", draw)
    truth, fake, _ = T.make_pairs(
        config(folders, tmp_path / "run" / "scorer", data="toys", num_references=18)
    )
    assert torch.equal(fake[:, 1], truth[:, 0]) and len(set(seen)) == len(seen) == 20


def test_a_local_backbone_counts_by_content(folders, tmp_path, monkeypatch):
    found, cfg = [], config(folders, tmp_path / "scorer", backbone=str(tmp_path / "dino"))
    monkeypatch.setattr(T, "make_pairs", lambda *_: (torch.zeros(1), torch.zeros(1), 2))
    monkeypatch.setattr(T, "new_scorer", lambda _: None)
    monkeypatch.setattr(T, "cached", lambda root, name, note, make: found.append(note) or tmp_path)
    save_json(tmp_path / "results.json", {})
    for weights in (0.0, 1.0):
        save_json(tmp_path / "dino" / "config.json", {})
        save_tensors(tmp_path / "dino" / "model.safetensors", {"w": torch.full((1,), weights)})
        T.main(cfg)
    assert found[0] != found[1]


def test_the_notes_tell_all_that_results_depend_on_and_nothing_else(folders, tmp_path, monkeypatch):
    """Of negatives and scorer. Every option, and every module that they run."""
    save_json(tmp_path / "made" / "results.json", {})  # stands for both results, which are not made
    save_tensors(tmp_path / "made" / "000000.safetensors", {"views": torch.zeros(6, 5, dtype=torch.uint8)})
    found = []
    monkeypatch.setattr(T, "new_scorer", lambda _: None)
    monkeypatch.setattr(T, "cached", lambda root, name, note, make: found.append(note) or tmp_path / "made")

    def notes(**changes) -> list[dict]:
        found.clear()
        T.main(replace(config(folders, tmp_path / "scorer"), **changes))
        return list(found)

    both = dict(data="toys", num_references=3, num_steps=3, image_size=32, seed=1, bf16="on")
    scorers = dict(head="concat", backbone="dino", backbone_size=28, patch_size=8, hidden_size=8, steps=7)
    scorers |= dict(num_layers=2, num_heads=4, batch_size=3, lr=0.1, head_lr=0.1, weight_decay=0.1)
    scorers |= dict(mismatch=0.5, texture=0.1, twins=True)
    scorers |= dict(num_val=3)  # a third one is not there to be drawn
    options = both | scorers | dict(eval_every=3, out=str(tmp_path / "other"))
    assert {f.name for f in fields(T.Config)} == {*options, "negatives", "device"}  # by what they come to
    plain = notes()
    changed = {k: [a != b for a, b in zip(notes(**{k: v}), plain)] for k, v in options.items()}
    assert changed == {k: [k in both, k in both or k in scorers] for k in options}
    fewer, more = (notes(data="toys", num_val=n)[0] for n in (2, 3))
    assert fewer != more  # of validation objects, too, there are negatives
    (alone,) = notes(negatives="")  # or none at all, and that is another scorer
    assert alone["steps"] == 6 and alone != plain[1]
    for module in "model sample data metrics scorer train_scorer".split():
        with monkeypatch.context() as edited:
            edited.setitem(cache.SOURCES, module, cache.SOURCES[module] + "\nx = 1\n")
            which = [a != b for a, b in zip(notes(), plain)]
        assert which == ([True, False] if module in ("model", "sample") else [False, True]), module


def test_training_learns_and_is_reused(folders, tmp_path):
    cfg = config(folders, tmp_path / "scorer", steps=60, lr=3e-3)
    results = T.main(cfg)
    metrics = results["metrics"]
    assert metrics["accuracy_generated"] == 1 and metrics["reward_truth"] > metrics["reward_generated"] + 1
    assert metrics["auc_swapped"] == 0.5  # f does not see which view it rates
    assert T.main(cfg) == results  # reused


def test_resumed_equals_uninterrupted(folders, tmp_path, monkeypatch):
    whole = Path(T.main(config(folders, tmp_path / "whole"))["folder"])
    pieces = config(folders, tmp_path / "pieces")
    monkeypatch.setattr(common, "SAVE_SECONDS", 0)
    real = T.make_batch

    clock = [0]  # a step takes 100 seconds

    def killed(cfg, truth, fake, step):
        if step == 5 and clock == [500]:
            clock.append(0)
            raise KeyboardInterrupt
        clock[0] += 100
        return real(cfg, truth, fake, step)

    monkeypatch.setattr(T, "make_batch", killed)
    monkeypatch.setattr(T, "time", SimpleNamespace(time=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        T.main(pieces)
    again = Path((result := T.main(pieces))["folder"])
    assert result["seconds"] == 600
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    first, second = (
        [x.split('"seconds"')[0] for x in (f / "log.jsonl").read_text().splitlines()] for f in (whole, again)
    )
    assert first == second


@pytest.mark.parametrize("what", ["true", "model"])
def test_changed_inputs_are_another_scorer(folders, tmp_path, what):
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    cfg = config(tmp_path, tmp_path / "scorer")
    first = T.main(cfg)["folder"]
    if what == "model":
        random_model(ref_scale=3.0).save(tmp_path / "model")
    else:
        for folder in (tmp_path / "true").iterdir():  # the same names, other pictures
            write_views(folder, make_toys(1, 16, seed=9)[0])
    assert T.main(cfg)["folder"] != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_references": 1}, "--num_references 1: expected 2 or more"),
        ({"batch_size": 1}, "--batch_size"),
        ({"steps": 0}, "--steps"),
        ({"mismatch": float("inf")}, "--mismatch"),
        ({"negatives": "nowhere"}, "--negatives nowhere: expected a model's folder, or views"),
        ({"negatives": "", "mismatch": 0.0}, "--mismatch 0: nothing is wrong then, expected --negatives"),
        ({"image_size": 0}, "--image_size 0: expected 1 or more"),
        ({"hidden_size": 15}, "hidden_size|width"),
        ({"patch_size": 3}, "patch"),
    ],
)
def test_wrong_input_is_one_line(folders, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        T.main(config(folders, tmp_path / "run" / "scorer", **changes))
    assert not list((tmp_path / "run").glob("*"))  # no negatives either, which take long


def test_one_object_has_no_other(folders, tmp_path):
    for i in range(3):
        shutil.copytree(folders / "true" / f"object_{i}", tmp_path / "few" / f"object_{i}")
    few = str(tmp_path / "few")  # of another model's pictures no augmented copies are made
    for twins in (True, False):
        with pytest.raises(InputError, match="few: one object to train on"):
            T.main(config(folders, tmp_path / "run" / "scorer", data=few, negatives=few, twins=twins))


def test_accuracy_counts_objects_whose_truth_has_the_higher_reward(monkeypatch):
    class Brightness:
        def score(self, ref, views):
            return views.mean((2, 3, 4))

    monkeypatch.setattr(T, "twin", lambda x, g: torch.full_like(x, 101.6 / 255))  # rounded, it has .4
    dark, bright = (torch.full((2, 5, 3, 16, 16), value, dtype=torch.uint8) for value in (50, 200))
    for truth, fake, accuracy in ((dark, bright, 0.0), (bright, dark, 1.0), (dark, dark, 0.5)):
        found = T.evaluate(Brightness(), truth, fake)
        assert (found["accuracy_generated"], found["auc_generated"]) == (accuracy, accuracy)
        rewards = [found[f"reward_{name}"] for name in ("truth", "generated", "stretched")]
        sums = [4 * x[0, 0, 0, 0, 0].item() / 255 for x in (truth, fake)]  # over the other views
        assert rewards == pytest.approx([*sums, 4 * 0.4])
    rounding = iter(torch.arange(99) * 1e-9)  # the same number, computed in another batch
    monkeypatch.setattr(
        Brightness, "score", lambda self, ref, views: views.double().mean((2, 3, 4)) + next(rounding)
    )
    assert T.evaluate(Brightness(), dark, dark)["accuracy_generated"] == 0.5


def test_what_is_in_the_way_shows_before_the_work(folders, tmp_path, monkeypatch):
    (tmp_path / "scorer").mkdir()
    monkeypatch.setattr(T, "make_pairs", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match="scorer: is there, and no link to a result"):
        T.main(config(folders, tmp_path / "scorer"))
