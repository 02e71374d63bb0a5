"""The scorer: what each head can tell apart, its reward, its files, a published backbone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from common import InputError
from data import VIEWS
from render import project
from scorer import REVERSED, EncoderConfig, Scorer, ScorerConfig, contrastive_reward
from scorer import pretrained_scorer, small_scorer

V = len(VIEWS)


def tiny(head: str = "bilinear", size: int = 16) -> Scorer:
    """A scorer whose head is not at its zero start, so that every term of f counts."""
    torch.manual_seed(0)
    scorer = small_scorer(head, size, patch_size=8, hidden_size=16, num_layers=1, num_heads=2)
    for name, parameter in scorer.named_parameters():
        if name in ("linear.weight", "W", "A", "b"):
            torch.nn.init.normal_(parameter)
    return scorer.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


# --- heads ---


def test_concat_cannot_see_an_exchange_of_objects_and_bilinear_can():
    """f(Y1, X1) + f(Y2, X2) against f(Y1, X2) + f(Y2, X1)."""
    y, x = images(2, 3, 16, 16), images(2, V, 3, 16, 16) ** 3
    for head, low, high in (("concat", 0, 1e-4), ("bilinear", 1e-2, 1e9)):
        own, exchanged = (tiny(head).score(y, z).double().sum() for z in (x, x.flip(0)))
        assert low <= abs(own - exchanged) <= high


def test_bilinear_without_w_is_concat():
    scorer, concat = tiny("bilinear"), tiny("concat")
    concat.load_state_dict({k: v for k, v in scorer.state_dict().items() if k != "W"})
    y, x = images(2, 3, 16, 16), images(2, V, 3, 16, 16)
    assert not torch.allclose(scorer.score(y, x), concat.score(y, x))
    torch.nn.init.zeros_(scorer.W)  # type: ignore
    assert torch.allclose(scorer.score(y, x), concat.score(y, x), atol=1e-6)


def test_head_by_hand():
    scorer = small_scorer("bilinear", 16, 8, hidden_size=2, num_layers=1, num_heads=1)
    scorer.linear.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # w = (1, 2), u = (3, 4)
    scorer.linear.bias.data = torch.tensor([0.5])
    assert scorer.W is not None
    scorer.W.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    e_ref, e_view = torch.tensor([[1.0, -1.0]]), torch.tensor([[[2.0, 1.0], [0.0, 0.0]]])
    # w.e_Y = -1, u.e_X = 10, e_Y^T W e_X = (1-3, 2-4).(2, 1) = -6, b = .5
    assert torch.allclose(scorer.head(e_ref, e_view, torch.tensor([1, 2])), torch.tensor([[3.5, -0.5]]))


def test_epipolar_head_by_hand():
    """Each view has a form for rows and one for columns, and each line meets its own alone."""
    scorer = small_scorer("epipolar", 16, 8, 16, 1, 2)
    dim = scorer.A.shape[-1]
    e_ref, e_views = torch.zeros(1, 2, 3, dim), torch.zeros(1, 3, 2, 3, dim)
    e_ref[0, 0, :, 0] = torch.tensor([1.0, 2.0, 0.0])  # channel 0 of the three rows
    e_ref[0, 1, :, 1] = torch.tensor([3.0, 4.0, 0.0])  # channel 1 of the three columns
    e_views[0, :, 0, :, 2] = torch.tensor([5.0, 6.0, 0.0])
    e_views[0, :, 1, :, 3] = torch.tensor([7.0, 8.0, 0.0])
    scorer.A.data[1, 0, 0, 2], scorer.A.data[1, 1, 1, 3] = 1, 10
    scorer.A.data[4, 0, 0, 2], scorer.b.data[4] = -1, 2
    scorer.A.data[2, 0, 0, 2], scorer.A.data[2, 1, 1, 3] = 1, 10
    # view 1: (1 5 + 2 6) / 3 of rows, 10 (3 7 + 4 8) / 3 of columns; view 4: rows alone; view 2, the back: its
    # first column is the front's last, 10 (3 0 + 4 8 + 0 7) / 3
    want = torch.tensor([[0.5 + 17 / 3 + 530 / 3, 2 - 17 / 3, 0.5 + 17 / 3 + 320 / 3]])
    assert torch.allclose(scorer.head(e_ref, e_views, torch.tensor([1, 4, 2])), want)


def test_strips_keep_the_place_along_one_axis_and_forget_it_along_the_other():
    scorer, x = tiny("epipolar", 32), torch.ones(1, 3, 32, 32)
    x[..., 8:16, 12:20] = images(3, 8, 8)
    rows, columns = scorer.embed(x)[0]
    (right_rows, right_columns), (lower_rows, lower_columns) = (
        scorer.embed(x.roll(4, axis))[0] for axis in (-1, -2)
    )
    assert torch.allclose(right_rows, rows, atol=1e-5) and torch.allclose(lower_columns, columns, atol=1e-5)
    # two strips of two pixels each further on
    assert torch.allclose(right_columns[4:-2], columns[2:-4], atol=1e-5)
    assert torch.allclose(lower_rows[4:-2], rows[2:-4], atol=1e-5)
    assert not torch.allclose(lower_rows, rows, atol=0.1)
    assert not torch.allclose(right_columns, columns, atol=0.1)
    for parameter in scorer.encoder.columns.parameters():  # rows and columns have weights of their own
        parameter.data.zero_()
    still, nothing = scorer.embed(x)[0]
    assert torch.equal(still, rows) and not nothing.any()


def test_epipolar_knows_which_view_it_sees_and_the_others_do_not():
    y, x = images(2, 3, 16, 16), images(2, V, 3, 16, 16)
    swapped = x[:, [0, 3, 2, 1, 4]]
    for head, equal in (("bilinear", True), ("epipolar", False)):
        scores, exchanged = (tiny(head).score(y, z) for z in (x, swapped))
        assert torch.allclose(scores[:, [0, 3, 2, 1, 4]], exchanged, atol=1e-5) is equal


def test_epipolar_lines_are_those_of_the_cameras():
    """A point at a height, to the right, marks one line of the front; where is it in the other views?"""
    point = torch.tensor([[0.3, 0.6, 0.4]])
    (x, y), *others = project(point, 64)[0][:, 0].long().tolist()
    assert not REVERSED[0].any() and REVERSED.sum() == 1
    for m, (u, v) in enumerate(others, 1):
        reverse = REVERSED[m].tolist()
        row, column = (63 - k if r else k for k, r in zip((v, u), reverse))
        assert (row == y) is (m < 4), m  # heights: all sides
        assert (column == x) is (m in (2, 4)), m  # the front's left to right: the back and the top


# --- reward ---


def test_reward_leaves_out_the_view_of_the_reference():
    scorer, y, x = tiny(), images(2, 3, 16, 16), images(2, V, 3, 16, 16)
    reward = contrastive_reward(scorer, y, x)
    other = x.clone()
    other[:, 0] = 1 - other[:, 0]
    assert torch.allclose(contrastive_reward(scorer, y, other), reward, atol=1e-5)
    for m in range(1, V):  # each other view counts
        other = x.clone()
        other[:, m] = 1 - other[:, m]
        assert not torch.allclose(contrastive_reward(scorer, y, other), reward, atol=1e-3)
    assert torch.allclose(reward, scorer.score(y, x)[:, 1:].sum(1))


# --- files ---


def test_save_and_load_change_nothing(tmp_path: Path):
    for head in ("bilinear", "concat", "epipolar"):
        scorer, y, x = tiny(head), images(2, 3, 16, 16), images(2, V, 3, 16, 16)
        scorer.save(tmp_path / head)
        assert torch.equal(Scorer.load(tmp_path / head).score(y, x), scorer.score(y, x))


def test_wrong_files_and_sizes_give_one_line(tmp_path: Path):
    scorer = tiny()
    scorer.save(tmp_path)
    with pytest.raises(InputError, match="32 x 32 px, expected 16 x 16"):
        scorer.score(images(1, 3, 32, 32), images(1, V, 3, 32, 32))
    for shape in ((24, 16), (16, 24)):  # also if one side alone differs
        with pytest.raises(InputError, match=f"{shape[0]} x {shape[1]} px, expected 16 x 16"):
            scorer.score(images(1, 3, *shape), images(1, V, 3, *shape))
    with pytest.raises(InputError, match="not finite"):  # one of two is enough
        scorer.score(images(2, 3, 16, 16) / torch.tensor([1, 0]).view(2, 1, 1, 1), images(2, V, 3, 16, 16))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="model.safetensors"):
        Scorer.load(tmp_path)
    tiny(size=32).save(tmp_path)
    weights.write_bytes(whole)  # weights of a scorer for 16 px beside a config for 32 px
    with pytest.raises(InputError, match="size mismatch"):
        Scorer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"image_size": 64, "channels": [64]}')  # a multi-view model's
    with pytest.raises(InputError, match="unknown .*channels.*; expected the fields of Scorer"):
        Scorer.load(tmp_path)
    with pytest.raises(InputError, match="config.json"):
        Scorer.load(tmp_path / "nowhere")


def test_a_config_cannot_ask_for_code_or_nonsense(tmp_path: Path):
    tiny().save(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    Scorer.load(tmp_path)
    encoder = good["encoder"]
    for name, value, text in (
        ("_attn_implementation", "someone/kernel", "encoder: unknown _attn_implementation"),
        ("auto_map", {"AutoModel": "theirs--code.Model"}, "encoder: unknown auto_map"),
        ("hidden_act", "someone/activation", "hidden_act.*expected.*gelu"),
        ("hidden_size", 0, "hidden_size 0"),
        ("num_attention_heads", 7, "hidden_size 16: expected a multiple"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps nan"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, "encoder": {**encoder, name: value}}))
        with pytest.raises(InputError, match=text):
            Scorer.load(tmp_path)
    for change, text in (
        ({"encoder": "dinov2"}, "encoder: unknown none; missing .*num_hidden_layers"),
        ({"std": [0.3, 0.0, 0.3]}, "std .*more than 0"),
        ({"std": [0.3, float("inf"), 0.3]}, "std .*inf"),
        ({"mean": [0.5, 0.5]}, r"mean \[0.5, 0.5\], expected"),
        ({"image_size": "64"}, "image_size '64'"),
        ({"image_size": 17}, "expected a multiple of the patch"),
        ({"resize": 1}, "resize 1"),
        ({"head": "deep"}, "head 'deep'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=text):
            Scorer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(good))
    weights = load_file(tmp_path / "model.safetensors")
    weights["W"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="W is not finite"):
        Scorer.load(tmp_path)


def test_a_small_encoder_reads_64_pixels_in_65_tokens():
    scorer = small_scorer("bilinear", 64, 8, hidden_size=8, num_layers=1, num_heads=1)
    assert scorer.encoder.embeddings.position_embeddings.shape == (1, 65, 8)
    assert scorer.score(images(1, 3, 64, 64), images(1, V, 3, 64, 64)).shape == (1, V)
    with pytest.raises(InputError, match="multiple of the heads"):
        small_scorer("bilinear", 16, 8, hidden_size=8, num_layers=1, num_heads=3)
    with pytest.raises(InputError, match="multiple of the patch, 8"):
        small_scorer("bilinear", 60, 8, hidden_size=8, num_layers=1, num_heads=1)
    strips = small_scorer("epipolar", 60, 8, hidden_size=8, num_layers=1, num_heads=1)  # has no patches
    assert strips.score(images(1, 3, 60, 60), images(1, V, 3, 60, 60)).shape == (1, V)


def test_a_small_scorer_starts_at_one_half_with_white_as_zero_and_weights_that_pass_the_image_on():
    scorer, seen = small_scorer("bilinear", 16, 8, hidden_size=64, num_layers=1, num_heads=2), []
    assert (scorer.score(images(2, 3, 16, 16), images(2, V, 3, 16, 16)) == 0.5).all()
    scorer.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    scorer.embed(torch.ones(1, 3, 16, 16))
    assert (seen[0] == 0).all()
    weights = [p for p in scorer.encoder.encoder.parameters() if p.ndim == 2]
    assert weights and all(abs(w.std() * 64**0.5 - 1) < 0.05 for w in weights)


def test_a_larger_image_is_averaged_not_sampled():
    sizes = EncoderConfig(16, 8, 16, 1, 2)
    scorer, seen = Scorer(ScorerConfig("bilinear", 16, True, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), sizes)), []
    scorer.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    scorer.embed((torch.arange(48) % 3 == 0).float().expand(1, 3, 48, 48))  # every third column is lit
    torch.testing.assert_close(seen[0][..., 2:-2], torch.full((1, 3, 16, 12), 1 / 3))
    scorer.embed((torch.arange(48) > 23).float().expand(1, 3, 48, 48))  # a step, which bicubic overshoots
    assert 0 == seen[1].min() < seen[1].max() == 1


# --- a pretrained backbone, in the published format ---


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
    Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14)).save_pretrained(tmp_path / "dino")  # type: ignore
    return str(tmp_path / "dino")


def test_backbone_takes_any_size_and_is_preprocessed_as_published(backbone: str, tmp_path: Path):
    scorer = pretrained_scorer(backbone, "bilinear", image_size=60)
    assert scorer.cfg.image_size == 56  # whole patches
    assert scorer.W is not None
    torch.nn.init.normal_(scorer.W)
    for size in (64, 56, 100):
        assert scorer.score(images(1, 3, size, size), images(1, V, 3, size, size)).shape == (1, V)
    x = images(2, 3, 56, 56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    stock = Dinov2Model.from_pretrained(backbone).eval()
    with torch.no_grad():
        expected = stock((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
        assert torch.allclose(scorer.embed(x), expected, atol=1e-6)
    # what is saved needs the backbone's folder no more
    y, x = images(1, 3, 64, 64), images(1, V, 3, 64, 64)
    scorer.save(tmp_path / "scorer")
    assert torch.equal(Scorer.load(tmp_path / "scorer").score(y, x), scorer.score(y, x))


def test_wrong_backbone_gives_one_line(backbone: str, tmp_path: Path):
    with pytest.raises(InputError, match="expected a hub id"):
        pretrained_scorer(str(tmp_path / "nothing"), "bilinear")
    weights = Path(backbone) / "model.safetensors"
    tensors = load_file(weights)
    some = {k: v for k, v in tensors.items() if "layernorm" not in k}
    save_file(some, weights, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="is missing or not finite"
    ):  # transformers itself would go on with random ones
        pretrained_scorer(backbone, "bilinear")
    save_file({k: v * torch.nan for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is missing or not finite"):
        pretrained_scorer(backbone, "bilinear")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert pretrained_scorer(backbone, "bilinear").cfg.image_size == 224
    with pytest.raises(InputError, match="--head epipolar has its own"):
        pretrained_scorer(backbone, "epipolar")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="expected a hub id"):
        pretrained_scorer(backbone, "bilinear")
