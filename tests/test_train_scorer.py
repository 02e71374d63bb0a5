"""Training of the scorer: the loss and AUC by hand, data, resumption."""


import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
import scorer as scorer_module
import train_scorer
from common import InputError, load_tensors, save_tensors
from data import VIEWS, make_toys, pack, render_primitives, write_views
from model import ModelConfig, MultiViewUNet
from train_scorer import Config, auc, loss_fn

# --- loss and AUC by hand ---


def test_loss_by_hand():
    f_true, f_fake = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-2.0, 0.5]])
    assert loss_fn(f_true, f_fake).item() == pytest.approx((0 + 0.25 + 1 + 1) / 4 + (0 + 1 + 4 + 0.25) / 4)
    assert loss_fn(torch.ones(3, 4), torch.zeros(3, 4)).item() == 0


def test_auc_by_hand():
    # pairs: .8 > .3, .8 > .5, .8 > .1;  .5 > .3, .5 = .5 (half), .5 > .1
    assert auc(torch.tensor([0.8, 0.5]), torch.tensor([0.3, 0.5, 0.1])) == pytest.approx(5.5 / 6)
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0])) == 1
    assert auc(torch.zeros(3), torch.zeros(4)) == 0.5


# --- training ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten toys in a folder, and "another model's" views of them, of the simplest kind: inverted colours."""
    root, toys = tmp_path_factory.mktemp("renders"), make_toys(10, 16, seed=7)
    for i, views in enumerate(toys):
        write_views(root / "true" / f"object_{i}", views)
        write_views(root / "fake" / f"object_{i}", 255 - views)
    return root


def config(folders: Path, out: Path) -> Config:
    return Config(
        data=str(folders / "true"),
        negatives=str(folders / "fake"),
        num_objects=4,
        num_val=2,
        image_size=16,
        shrink=2,
        patch_size=4,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        steps=6,
        batch_size=2,
        save_every=2,
        eval_every=4,
        log_every=1,
        device="cpu",
        out=str(out),
    )


def test_scorer_sees_images_shrunk(folders: Path, tmp_path: Path):
    """Fine stripes (mean grey) look grey to it, broad ones do not; images of any size are taken."""
    scorer = train_scorer.new_scorer(replace(config(folders, tmp_path), image_size=64, shrink=4, patch_size=4))
    fine, broad = (
        torch.arange(64)[:, None].div(n, rounding_mode="floor").remainder(2).expand(1, 3, 64, 64) for n in (1, 16)
    )
    grey = scorer.embed(torch.full((1, 3, 64, 64), 0.5))
    assert scorer.cfg.image_size == 16
    assert (scorer.embed(fine.float()) - grey).norm() < 0.1 * (scorer.embed(broad.float()) - grey).norm()
    assert torch.allclose(scorer.embed(torch.full((1, 3, 128, 128), 0.5)), grey, atol=1e-5)


def test_training_runs_is_reused_and_resumes_bitwise(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, pieces = config(folders, tmp_path / "whole"), config(folders, tmp_path / "pieces")
    results = train_scorer.main(whole)
    assert {"auc_generated", "auc_other", "auc_mirrored", "auc_swapped"} <= results["metrics"].keys()
    assert results["metrics"]["auc_swapped"] == 0.5  # f does not see which view it scores
    before = os.stat(tmp_path / "whole" / "model.safetensors").st_mtime_ns
    assert train_scorer.main(whole)["metrics"] == results["metrics"]
    assert os.stat(tmp_path / "whole" / "model.safetensors").st_mtime_ns == before

    # killed in step 5, after the state of step 4 was written
    real = train_scorer.make_batch

    def killed(cfg, truth, fake, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(cfg, truth, fake, step)

    monkeypatch.setattr(train_scorer, "make_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_scorer.main(pieces)
    monkeypatch.setattr(train_scorer, "make_batch", real)
    with pytest.raises(InputError, match="made with lr"):
        train_scorer.main(replace(pieces, lr=0.5))
    again = train_scorer.main(pieces)
    assert again["metrics"] == results["metrics"]
    a, b = (Path(f"{tmp_path}/{name}/model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert a == b
    logs = [(tmp_path / name / "log.jsonl").read_text().count('"step"') for name in ("whole", "pieces")]
    assert logs[0] == logs[1]  # no step is logged twice


def test_training_learns(folders: Path, tmp_path: Path):
    results = train_scorer.main(replace(config(folders, tmp_path), steps=60, lr=3e-3))
    assert results["metrics"]["accuracy_generated"] == 1
    assert results["metrics"]["score_true"] > results["metrics"]["score_generated"] + 1
    # the command line reads what was written
    paths = {"ref": f"{folders}/true/object_5/front.png", "views": f"{folders}/true/object_5"}
    scores = scorer_module.main(scorer_module.Config(scorer=str(tmp_path), device="cpu", **paths))
    assert set(scores) == {*VIEWS, "sum"}
    assert scores["sum"] == pytest.approx(sum(scores[v] for v in VIEWS[1:]), abs=1e-5)


def test_augmentation_keeps_truth_and_generated_alike(folders: Path, tmp_path: Path):
    cfg = config(folders, tmp_path)
    truth = make_toys(6, 16, seed=7)
    seen = set()
    for step in range(8):
        batch = train_scorer.make_batch(cfg, truth, truth, step)  # "generated" = truth: must stay equal
        assert torch.equal(batch[:, 1:5], batch[:, 5:])
        plain = train_scorer.make_batch(replace(cfg, augment=False), truth, truth, step)
        seen.add(torch.equal(batch, plain))
        assert torch.equal(batch, train_scorer.make_batch(cfg, truth, truth, step))
    assert False in seen


def test_mirroring_the_world_is_what_a_mirrored_object_shows():
    # Mirror an object's geometry: its five views must be those that the augmentation makes.
    part = {"half": (0.3, 0.2, 0.1), "color": (0.9, 0.1, 0.1), "quadric": (0, 2, 0)}
    other = {"half": (0.1, 0.3, 0.2), "color": (0.1, 0.2, 0.8), "quadric": (0, 2, 0)}
    plain = [dict(part, center=(0.4, 0.1, 0.3)), dict(other, center=(-0.5, -0.3, -0.1))]
    mirrored = [dict(p, center=(-p["center"][0], *p["center"][1:])) for p in plain]
    light = torch.tensor([0.0, 0.8, 0.6])  # the light would have to be mirrored too
    a, b = (render_primitives([pack(p)], 32, light=light)[0] for p in (plain, mirrored))
    assert torch.equal(a[train_scorer.MIRRORED_ORDER].flip(-1), b)


def test_wrong_inputs_to_training_give_one_line(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the toys' cache
    cfg = config(folders, tmp_path / "out")
    for change, text in (
        ({"num_objects": 1}, "got 1 objects to train on"),
        ({"batch_size": 1}, "batches of 1; expected 2 or more"),
        ({"data": "toys"}, "10 objects are only there"),
        ({"negatives": "zero123", "zero123": str(tmp_path / "none")}, "expected a file of weights"),
        ({"head": "deep"}, "expected one of bilinear, concat"),
    ):
        with pytest.raises(InputError, match=text):
            train_scorer.main(replace(cfg, **change))
    assert not (tmp_path / "out" / "config.json").exists()


def test_negatives_are_made_once_and_again_when_the_model_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    shape = ModelConfig(image_size=16, patch=2, channels=(32, 32), depth=1, head_dim=16)
    MultiViewUNet(shape).save(tmp_path / "model")
    cfg = replace(
        config(tmp_path, tmp_path / "out"),
        data="toys",
        negatives="zero123",
        zero123=f"{tmp_path}/model",
        num_steps=2,
    )
    cpu, calls, real = torch.device("cpu"), [], sample.sample

    def counted(model, ref, seeds, **kwargs):
        calls.append(seeds)
        return real(model, ref, seeds, **kwargs)

    monkeypatch.setattr(sample, "sample", counted)
    monkeypatch.chdir(tmp_path)  # the toys' cache
    truth, fake, n = train_scorer.make_pairs(cfg, cpu)
    assert n == 4
    assert fake.dtype == torch.uint8 and fake.shape == truth.shape == (6, 5, 3, 16, 16) and len(calls) == 3
    assert torch.equal(train_scorer.make_pairs(cfg, cpu)[1], fake) and len(calls) == 3  # reused

    # a run killed after the first batch makes only what is missing, and the same
    save_tensors(tmp_path / "out" / "negatives.safetensors", {"views": fake[:2]})
    assert torch.equal(train_scorer.make_pairs(cfg, cpu)[1], fake) and len(calls) == 5

    MultiViewUNet(shape).save(tmp_path / "model")  # other weights
    assert not torch.equal(train_scorer.make_pairs(cfg, cpu)[1], fake) and len(calls) == 8
    with pytest.raises(InputError, match="makes images of 16 px"):
        train_scorer.make_pairs(replace(cfg, image_size=32), cpu)
    assert len(load_tensors(tmp_path / "out" / "negatives.safetensors")["views"]) == 6  # left as it was
