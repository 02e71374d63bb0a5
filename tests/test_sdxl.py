"""The SDXL preset, on a tiny random network of SDXL's shape saved in the real folder format."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model

from common import InputError
from data import make_toys, write_views
from model import NUM_VIEWS, PRESETS, LoRALinear, MultiViewUNet, from_base, load

V, SIZE = NUM_VIEWS, 64


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """unet/ and vae/ as StableDiffusionXLPipeline.save_pretrained writes them, with random weights."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    unet = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1)
    unet |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4))
    unet |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2))
    unet |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True)
    unet |= dict(projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=64, norm_num_groups=8)
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    vae = dict(block_out_channels=(16, 32, 32, 32), latent_channels=4, norm_num_groups=8, sample_size=64)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    AutoencoderKL(**vae, **blocks, scaling_factor=0.13025).save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture
def tiny(base):
    return from_base(replace(PRESETS["sdxl"], base=base, image_size=SIZE))


def inputs(batch: int = 2):
    g = torch.Generator().manual_seed(0)
    x, ref = torch.randn(batch, V, 4, 8, 8, generator=g), torch.randn(batch, 4, 8, 8, generator=g)
    return x, torch.tensor([300, 700])[:batch], ref


def test_the_real_config_has_the_published_size():
    """2,567,463,684 parameters before our embedding, 70 self-attention layers (on the meta device)."""
    config = UNet2DConditionModel.load_config(str(Path(__file__).parent / "sdxl"), subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
        model = MultiViewUNet(PRESETS["sdxl"], unet)
    assert len(model.attention_layers()) == 70
    assert sum(p.numel() for p in model.parameters()) == 2_567_463_684 + (V + 1) * 1280


@torch.no_grad()
def test_one_view_without_reference_is_the_stock_sdxl(tiny, base):
    """With the 77 zero tokens, pooled embedding and time ids of its own pipeline for an empty prompt."""
    stock = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    x, t, _ = inputs()
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2).float()
    conditions = {"text_embeds": torch.zeros(2, 32), "time_ids": time_ids}
    tokens = torch.zeros(2, 77, 64)
    theirs = stock(x[:, 0], t, encoder_hidden_states=tokens, added_cond_kwargs=conditions).sample
    torch.testing.assert_close(tiny(x[:, :1], t, None)[:, 0], theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_reference_and_the_other_views_are_seen(tiny):
    x, t, ref = inputs()
    alone, with_ref, other_ref = tiny(x[:, :1], t, None), tiny(x, t, ref), tiny(x, t, -ref)
    assert (with_ref - other_ref).abs().max() > 1e-3
    assert (with_ref[:, :1] - alone).abs().max() > 1e-3


@torch.no_grad()
def test_latents_are_scaled_once(tiny, base):
    """Encoder mean times the scaling factor in, divided by it out, and in float32 whatever autocast says."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    images = torch.rand(2, V, 3, SIZE, SIZE)
    latents = tiny.encode(images)
    assert latents.shape == (2, V, 4, 8, 8)
    theirs = vae.encode(images[1, 2][None] * 2 - 1).latent_dist.mean * 0.13025
    torch.testing.assert_close(latents[1, 2][None], theirs)
    out = (vae.decode(latents[1, 2][None] / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiny.decode(latents)[1, 2][None], out)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.encode(images).equal(latents)
    assert not any("vae" in name for name in tiny.state_dict())


@torch.no_grad()
def test_save_and_load_change_nothing(tiny, tmp_path):
    for p in tiny.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    tiny.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.cfg == tiny.cfg
    assert again(*inputs()).equal(tiny(*inputs()))
    assert {p.device.type for p in again.parameters()} == {"cpu"}


def test_a_missing_base_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="--base .*cannot load its unet.*expected a hub id"):
        from_base(replace(PRESETS["sdxl"], base=str(tmp_path)))


@pytest.mark.parametrize("change", ["missing", "nan"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_base_without_all_its_weights_is_refused(base, tmp_path, part, change):
    """diffusers would go on with random ones."""
    shutil.copytree(base, tmp_path / "base")
    (file,) = (tmp_path / "base" / part).glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    weights[name].view(-1)[0] = torch.nan  # one number of many
    save_file({k: v for k, v in weights.items() if k != name or change == "nan"}, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=f"--base .*cannot load its {part}, expected a hub id.*{name} is missing or"
    ):
        from_base(replace(PRESETS["sdxl"], base=str(tmp_path / "base"))).with_vae(
            None, torch.zeros(1, 3, 8, 8)
        )


@torch.no_grad()
def test_weights_in_bfloat16_draw_nearly_the_same(tiny, tmp_path):
    tiny.save(tmp_path / "m")
    exact, small = tiny(*inputs()), load(tmp_path / "m", half=True)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        low = small(*inputs())
    assert low.dtype == torch.float32 and (low - exact).norm() / exact.norm() < 0.03


def test_the_prompt_attention_is_the_stock_one_and_does_not_complain(tiny, caplog):
    with caplog.at_level("WARNING"):
        tiny(*inputs())
    assert not caplog.records
    layers = [m.attn2 for m in tiny.modules() if hasattr(m, "attn2")]
    z, prompt = torch.randn(2, 3, 64), torch.randn(2, 5, 64)
    before = layers[0](z, prompt, layout=(torch.zeros(2), 1, 1))
    layers[0].set_processor(AttnProcessor2_0())
    assert before.equal(layers[0](z, prompt))


def gradients(model, parameters, half=False):
    """Of two forwards with different rows."""
    x, t, ref = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(x, t, ref).square().mean() + 0.1 * model(x[:, :2], t, None).square().mean()
    return torch.autograd.grad(loss, parameters)


def test_gradient_checkpointing_keeps_the_gradients(tiny):
    """The layers run again in the backward, and each sees its own forward's rows."""
    parameters = tiny.train().freeze(attention_only=True)
    before = gradients(tiny, parameters)
    tiny.unet.enable_gradient_checkpointing()
    calls = []
    tiny.attention_layers()[0].register_forward_hook(lambda *_: calls.append(1))
    after = gradients(tiny, parameters)
    assert len(calls) == 4  # two forwards, and both once more in the backward
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_weights_are_halved_and_gradients_are_not(tiny):
    parameters = tiny.freeze(attention_only=True, frozen_bf16=True)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for p in tiny.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients(tiny, parameters, half=True))


def test_a_fresh_sdxl_learns_which_view_is_which(tiny):
    """Frozen at zero, the view embedding would leave the five views exchangeable for ever."""
    x, t, ref = inputs()
    order = torch.arange(V).roll(2)
    with torch.no_grad():
        torch.testing.assert_close(tiny(x[:, order], t, ref), tiny(x, t, ref)[:, order], rtol=0, atol=1e-5)
    tiny.freeze(attention_only=True)
    assert "unet.class_embedding.weight" not in tiny.trained_state()
    for rank in (0, 2):
        if rank:
            tiny.add_lora(rank)
        parameters = tiny.freeze(attention_only=True, view_embedding=True)
        assert parameters[-1] is tiny.unet.class_embedding.weight
        assert gradients(tiny, parameters)[-1].abs().amax(1).gt(0).all()  # of each view and of the reference


def test_lora_starts_as_the_model_and_is_merged_on_save(tiny, tmp_path):
    with torch.no_grad():
        before = tiny(*inputs())
    names = set(tiny.state_dict())
    tiny.add_lora(2)
    parameters = tiny.freeze()
    layers = [m for m in tiny.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 4 * len(tiny.attention_layers()) and len(parameters) == 2 * len(layers)
    assert all(layer.merged().equal(layer.weight) for layer in layers)  # U = 0
    with torch.no_grad():
        assert tiny(*inputs()).equal(before)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):  # the first step moves U alone, for D has no gradient while U is 0
        for p, g in zip(parameters, gradients(tiny, parameters), strict=True):
            p.grad = g
        optimizer.step()
    tiny.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert set(again.state_dict()) == names
    with torch.no_grad():
        after = tiny(*inputs())
        assert (after - before).abs().max() > 1e-4
        torch.testing.assert_close(again(*inputs()), after, rtol=0, atol=1e-5)


def test_a_small_lora_change_survives_the_frozen_weights_being_bfloat16(tiny, tmp_path):
    before = {n: v.clone() for n, v in tiny.state_dict().items()}
    tiny.add_lora(2)
    tiny.freeze(frozen_bf16=True)
    layers = {f"{n}.weight": m for n, m in tiny.named_modules() if isinstance(m, LoRALinear)}
    for layer in layers.values():
        torch.nn.init.constant_(layer.up, 1e-5)  # less than half of a bfloat16 step of most weights
    tiny.save(tmp_path / "m")
    saved = load(tmp_path / "m").state_dict()
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.bfloat16
        torch.testing.assert_close(saved[name] - before[name], layer.up @ layer.down, rtol=0, atol=1e-7)


def test_peak_memory_follows_storages_not_tensors():
    import bench

    with FakeTensorMode():
        weight = torch.empty(100)
        with bench.PeakMemory([weight]) as memory:
            a = torch.empty(1000)
            view, _ = a.view(10, 100), weight.t()
            del a
            c = torch.empty(500)
            assert memory.now == memory.peak == 6000
            del view
            assert (memory.now, memory.peak, len(c)) == (2000, 6000, 500)


def test_memory_is_counted(base):
    """Against hand counts: bytes of weights and of Adam, a LoRA that saves Adam's, checkpointing."""
    import bench

    changes = ({}, {"lora": 2}, {"checkpointing": False})
    (full,), (lora,), (kept,) = (bench.count(bench.Config(base=base, **c), SIZE, "SFT") for c in changes)
    model = from_base(replace(PRESETS["sdxl"], base=base, image_size=SIZE))
    trained = sum(p.numel() for p in model.attention_parameters())
    every = sum(p.numel() for p in model.parameters())
    assert full["weights"] == pytest.approx((2 * every + 2 * trained) / 1e9)
    assert full["Adam"] == pytest.approx(8 * trained / 1e9)
    assert full["rest"] > 4 * trained / 1e9
    assert full["seconds"] == pytest.approx(full["TFLOP"] / (0.4 * 312))  # 40 % of an A100
    assert full["total GB"] > lora["total GB"] and kept["rest"] > full["rest"]


@pytest.mark.slow
def test_flops_are_counted(base):
    import bench

    collect, sft, d3po, branch = bench.count(bench.Config(base=base), SIZE)
    assert collect["Adam"] == 0 and collect["TFLOP"] < sft["TFLOP"] * 2.5
    assert 2.5 < d3po["TFLOP"] / sft["TFLOP"] < 3.5  # 18 rows against 6
    assert 1.7 < branch["TFLOP"] / sft["TFLOP"] < 2.3  # 12 rows, whatever the number of candidates


@pytest.mark.parametrize(("candidates", "changes"), [("branch", {"lora": 2}), ("noised", {})])
def test_stage_3_fine_tunes_sdxl(tiny, tmp_path, monkeypatch, candidates, changes):
    """In bfloat16, frozen weights stored so: the log-ratio is exactly 0 before the first update, then not."""
    import train_d3po as D

    monkeypatch.chdir(tmp_path)
    torch.nn.init.normal_(tiny.unet.class_embedding.weight, std=0.1)
    tiny.save("pre")
    options = dict(num_references=2, eval_objects=2, num_steps=4, trained_calls=(0, 1))
    options |= {"num_candidates": 5 if candidates == "noised" else 2}
    options |= dict(steps=2, batch_objects=2, lr=1e-3, bf16="on", feedback="oracle", data="toys")
    options |= dict(candidates=candidates, model="pre", attention_only=True, checkpointing=True)
    ratios, original = [], D.step_log_ratio

    def spy(policy, *rest):
        assert all(
            blocks[0].gradient_checkpointing for blocks in (policy.unet.down_blocks, policy.unet.up_blocks)
        )
        frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
        trained = {p.dtype for p in policy.parameters() if p.requires_grad}
        assert frozen == {torch.bfloat16} and trained == {torch.float32}
        ratio, kl = original(policy, *rest)
        ratios.append((ratio.detach(), kl.detach()))
        return ratio, kl

    monkeypatch.setattr(D, "step_log_ratio", spy)
    result = D.main(D.Config(out="out", **options, **changes))
    (first, kl), (second, _) = ratios
    assert (first == 0).all() and (kl == 0).all() and (second != 0).any()
    assert first.shape == (2, 2)  # the best and the worst of each reference
    before, after = (load(m).state_dict() for m in ("pre", result["folder"]))
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.allclose(before[k], after[k].to(before[k]), rtol=1e-2, atol=1e-3)}
    assert all(".attn1." in k for k in moved)


@pytest.mark.slow
def test_the_papers_script_runs_to_the_end(base, tmp_path):
    """runs/paper.sh on random models in the real formats and eight rendered objects."""
    from evaluate import Lpips

    for i, views in enumerate(make_toys(8, SIZE, 0)):
        write_views(tmp_path / "renders" / f"object{i}", views)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = Dinov2Config(**sizes, image_size=56, patch_size=14)
    Dinov2Model(encoder).save_pretrained(tmp_path / "dino")
    state = Lpips().state_dict()
    trunk = {k: v for k, v in state.items() if k.startswith("features")}
    (tmp_path / "lpips").mkdir()
    torch.save(trunk, tmp_path / "lpips" / "alexnet-owt-7be5be79.pth")
    torch.save({k: v for k, v in state.items() if k not in trunk}, tmp_path / "lpips" / "alex.pth")
    paths = {"DATA": "renders", "DINO": "dino", "LPIPS": "lpips", "OUT": "out"}
    environment = {k: str(tmp_path / v) for k, v in paths.items()} | {"BASE": base, "SIZE": str(SIZE)}
    environment |= {"MEMORY": "--lora 2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(Path(__file__).parent.parent / "runs" / "paper.sh"), "--small"]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for row in ("sft", "base", "m", "c_pre", "c"):
        run = (tmp_path / "out" / row).resolve().name
        (path,) = [
            p for p in (tmp_path / "out").glob(f"table_{run}*.json") if ("minus" in p.name) == (row != "sft")
        ]
        table = json.loads(path.read_text())
        metrics = table["rows"][str(tmp_path / "out" / row)]
        assert {"psnr", "ssim", "lpips", "hull", "contrastive"} <= metrics.keys()
        assert row == "sft" or table["difference"]
