"""Scorer and its training: what each head can tell apart, the loss and AUC by hand, files, resumption."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

import sample
import scorer as scorer_module
import train_scorer
from common import InputError, load_tensors, save_tensors
from data import VIEWS, make_toys, pack, render_primitives, write_views
from model import ModelConfig, MultiViewUNet
from scorer import Scorer, contrastive_reward, pretrained_scorer, small_scorer
from train_scorer import Config, auc, loss_fn


def tiny(head: str = "bilinear", size: int = 16) -> Scorer:
    """A scorer whose head is not at its zero start, so that every term of f counts."""
    torch.manual_seed(0)
    scorer = small_scorer(head, size, patch_size=8, hidden_size=16, num_layers=1, num_heads=2)
    for parameter in (scorer.linear.weight, scorer.W):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return scorer.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


# --- heads ---


def exchange(scorer: Scorer) -> tuple[float, float]:
    """f(Y1, X1) + f(Y2, X2) and f(Y1, X2) + f(Y2, X1)."""
    y, x = images(2, 3, 16, 16), images(2, 5, 3, 16, 16) ** 3
    return float(scorer.score(y, x).double().sum()), float(scorer.score(y, x.flip(0)).double().sum())


def test_concat_cannot_see_an_exchange_of_objects_and_bilinear_can():
    own, exchanged = exchange(tiny("concat"))
    assert abs(own - exchanged) < 1e-4
    own, exchanged = exchange(tiny("bilinear"))
    assert abs(own - exchanged) > 1e-2


def test_bilinear_without_w_is_concat():
    scorer, concat = tiny("bilinear"), tiny("concat")
    concat.load_state_dict({k: v for k, v in scorer.state_dict().items() if k != "W"})
    y, x = images(2, 3, 16, 16), images(2, 5, 3, 16, 16)
    assert not torch.allclose(scorer.score(y, x), concat.score(y, x))
    assert scorer.W is not None
    torch.nn.init.zeros_(scorer.W)
    assert torch.allclose(scorer.score(y, x), concat.score(y, x), atol=1e-6)


def test_head_by_hand():
    scorer = small_scorer("bilinear", 16, 8, hidden_size=2, num_layers=1, num_heads=1)
    scorer.linear.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # w = (1, 2), u = (3, 4)
    scorer.linear.bias.data = torch.tensor([0.5])
    assert scorer.W is not None
    scorer.W.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    e_ref, e_view = torch.tensor([[1.0, -1.0]]), torch.tensor([[[2.0, 1.0], [0.0, 0.0]]])
    # w.e_Y = -1, u.e_X = 10, e_Y^T W e_X = (1-3, 2-4).(2, 1) = -6, b = .5
    assert torch.allclose(scorer.head(e_ref, e_view), torch.tensor([[3.5, -0.5]]))


@pytest.mark.parametrize("head", ["bilinear", "concat"])
def test_only_bilinear_learns_whose_view_it_is(head: str):
    # Views are noisy copies of their reference's embedding; wrong pairs are views of another object. What
    # concat scores for right and for wrong pairs is the same on average.
    torch.manual_seed(0)
    scorer = small_scorer(head, 16, 8, hidden_size=8, num_layers=1, num_heads=1)
    head_parameters = [p for n, p in scorer.named_parameters() if not n.startswith("encoder")]
    optimizer = torch.optim.Adam(head_parameters, lr=0.02)

    def pairs(seed: int):
        g = torch.Generator().manual_seed(seed)
        e = torch.randn(256, 8, generator=g)
        return e, e[:, None] + 0.3 * torch.randn(256, 2, 8, generator=g)

    for step in range(300):
        e, x = pairs(step)
        loss = loss_fn(scorer.head(e, x), scorer.head(e.roll(1, 0), x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    e, x = pairs(1000)
    right, wrong = scorer.head(e, x).detach(), scorer.head(e.roll(1, 0), x).detach()
    result = auc(right.flatten(), wrong.flatten())
    assert result > 0.95 if head == "bilinear" else abs(result - 0.5) < 0.02
    if head == "concat":
        assert torch.allclose(right.sum(), wrong.sum(), atol=1e-2)


# --- loss, reward, AUC by hand ---


def test_loss_by_hand():
    f_true, f_fake = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-2.0, 0.5]])
    assert loss_fn(f_true, f_fake).item() == pytest.approx((0 + 0.25 + 1 + 1) / 4 + (0 + 1 + 4 + 0.25) / 4)
    assert loss_fn(torch.ones(3, 4), torch.zeros(3, 4)).item() == 0


def test_auc_by_hand():
    # pairs: .8 > .3, .8 > .5, .8 > .1;  .5 > .3, .5 = .5 (half), .5 > .1
    assert auc(torch.tensor([0.8, 0.5]), torch.tensor([0.3, 0.5, 0.1])) == pytest.approx(5.5 / 6)
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0])) == 1
    assert auc(torch.zeros(3), torch.zeros(4)) == 0.5


def test_reward_leaves_out_the_view_of_the_reference():
    scorer, y, x = tiny(), images(2, 3, 16, 16), images(2, 5, 3, 16, 16)
    reward = contrastive_reward(scorer, y, x)
    other = x.clone()
    other[:, 0] = 1 - other[:, 0]
    assert torch.allclose(contrastive_reward(scorer, y, other), reward, atol=1e-5)
    other = x.clone()
    other[:, 4] = 1 - other[:, 4]
    assert not torch.allclose(contrastive_reward(scorer, y, other), reward, atol=1e-3)
    assert torch.allclose(reward, scorer.score(y, x)[:, 1:].sum(1))


# --- files ---


def test_save_and_load_change_nothing(tmp_path: Path):
    for head in ("bilinear", "concat"):
        scorer, y, x = tiny(head), images(2, 3, 16, 16), images(2, 5, 3, 16, 16)
        scorer.save(tmp_path / head)
        assert torch.equal(Scorer.load(tmp_path / head).score(y, x), scorer.score(y, x))


def test_wrong_files_and_sizes_give_one_line(tmp_path: Path):
    scorer = tiny()
    scorer.save(tmp_path)
    with pytest.raises(InputError, match="32 x 32 px, expected 16 x 16"):
        scorer.score(images(1, 3, 32, 32), images(1, 5, 3, 32, 32))
    with pytest.raises(InputError, match="expected"):
        scorer.score(images(1, 3, 16, 16), images(2, 5, 3, 16, 16))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="model.safetensors"):
        Scorer.load(tmp_path)
    tiny(size=32).save(tmp_path)
    weights.write_bytes(whole)  # weights of a scorer for 16 px beside a config for 32 px
    with pytest.raises(InputError, match="another shape"):
        Scorer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"image_size": 64, "channels": [64]}')  # a multi-view model's
    with pytest.raises(InputError, match="not a scorer's"):
        Scorer.load(tmp_path)
    with pytest.raises(InputError, match="config.json"):
        Scorer.load(tmp_path / "nowhere")


# --- a pretrained backbone, in the published format ---


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    return str(tmp_path / "dino")


def test_backbone_takes_any_size_and_is_preprocessed_as_published(backbone: str, tmp_path: Path):
    scorer = pretrained_scorer(backbone, "bilinear", image_size=60)
    assert scorer.cfg.image_size == 56  # whole patches
    assert scorer.W is not None
    torch.nn.init.normal_(scorer.W)
    for size in (64, 56, 100):
        assert scorer.score(images(1, 3, size, size), images(1, 5, 3, size, size)).shape == (1, 5)
    x = images(2, 3, 56, 56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    stock = Dinov2Model.from_pretrained(backbone).eval()
    with torch.no_grad():
        expected = stock((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
        assert torch.allclose(scorer.embed(x), expected, atol=1e-6)
    # what is saved needs the backbone's folder no more
    y, x = images(1, 3, 64, 64), images(1, 5, 3, 64, 64)
    scorer.save(tmp_path / "scorer")
    assert torch.equal(Scorer.load(tmp_path / "scorer").score(y, x), scorer.score(y, x))


def test_wrong_backbone_gives_one_line(backbone: str, tmp_path: Path):
    with pytest.raises(InputError, match="expected a hub id"):
        pretrained_scorer(str(tmp_path / "nothing"), "bilinear")
    weights = Path(backbone) / "model.safetensors"
    tensors = load_file(weights)
    some = {k: v for k, v in tensors.items() if "layernorm" not in k}
    save_file(some, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="are missing"):  # transformers itself would go on with random ones
        pretrained_scorer(backbone, "bilinear")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert pretrained_scorer(backbone, "bilinear").cfg.image_size == 224
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="expected a hub id"):
        pretrained_scorer(backbone, "bilinear")


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
