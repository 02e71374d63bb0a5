"""The one-pass reference attention against its definition, who sees whom, what is trained, what is kept."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from conftest import random_model
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from common import InputError
from data import VIEWS, make_toys
from model import NUM_VIEWS, PRESETS, LoRALinear, ModelConfig, load, position_table, unmirrored

B, V, c, h = 2, NUM_VIEWS, 48, 4


def inputs(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x, ref = torch.randn(B, V, c, h, h, generator=g), torch.randn(B, c, h, h, generator=g)
    return x, torch.tensor([300, 700]), ref


def turned(x):
    """(B, V, c, h, w) with the pictures of right and back mirrored, as the network sees them."""
    images = torch.nn.functional.pixel_shuffle(x, 4).clone()
    for name in ("right", "back"):
        images[:, VIEWS.index(name)] = images[:, VIEWS.index(name)].flip(-1)
    return torch.nn.functional.pixel_unshuffle(images, 4)


def test_what_front_and_back_show_at_one_place_is_at_one_place():
    """A toy's silhouettes from front and back, and from the two sides, are each other's mirror images."""
    views = make_toys(1, 16, 0).float() / 255
    seen = torch.nn.functional.pixel_shuffle(unmirrored(random_model().encode(views), 4), 4)
    mask = (seen[0].amin(1) < 0.8).float()
    front, right, back, left, _ = mask.flatten(1)
    for a, b in ((front, back), (right, left)):
        assert (a * b).sum() / (a + b).clamp(max=1).sum() > 0.9
    assert torch.equal(seen[:, [0, 3, 4]], views[:, [0, 3, 4]] * 2 - 1)
    assert torch.equal(seen[:, 1:3], views[:, 1:3].flip(-1) * 2 - 1)
    x = inputs()[0]
    assert torch.equal(unmirrored(x, 4), turned(x)) and torch.equal(unmirrored(unmirrored(x, 4), 4), x)


def stock_unet(model):
    """A UNet of unmodified diffusers layers with our model's weights."""
    unet = UNet2DConditionModel.from_config(model.unet.config, num_class_embeds=NUM_VIEWS + 1)
    for module in unet.modules():
        if hasattr(module, "attn2"):
            module.attn2 = module.norm2 = None
    unet.conv_norm_out = None  # ours is linear
    ours = {k: v for k, v in model.unet.state_dict().items() if not k.endswith(".position")}
    unet.load_state_dict(ours)  # strict: our attention keeps every name
    return unet.to(model.unet.dtype).eval()


@torch.no_grad()
def test_one_view_without_reference_is_the_stock_unet():
    model = random_model(position=False)
    x, t, _ = inputs()
    ours = model(x[:, :1], t, None)[:, 0]
    theirs = stock_unet(model)(x[:, 0], t, None, class_labels=torch.zeros(B, dtype=torch.long)).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_output_layer_is_linear():
    """It sees negative numbers as they are: SiLU's smallest is -.28."""
    model, seen = random_model(), []
    model.unet.conv_out.register_forward_hook(lambda _, given, __: seen.append(given[0].min().item()))
    model(*inputs())
    assert min(seen) < -0.5


@torch.no_grad()
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("cross_view", [True, False])
def test_one_pass_equals_two_pass(cross_view, position):
    """The paper's form: run the UNet on Y_t, keep what each layer saw, append its keys and values."""
    # In double precision, so that only a wrong formula can differ.
    model = random_model(cross_view=cross_view, position=position).double()
    x, t, ref = (z.double() if z.is_floating_point() else z for z in inputs())
    unet = stock_unet(model)
    layers = [m.attn1 for m in unet.modules() if hasattr(m, "attn1")]
    tables = [
        torch.zeros(V + 1, 1, 1) if m.position is None else m.position for m in model.attention_layers()
    ]
    stored = {}

    def attend(attn, tokens, placed, context, placed_context):
        q, k, v = (
            z.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for z in (attn.to_q(placed), attn.to_k(placed_context), attn.to_v(context))
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return attn.to_out[0]((weights @ v).transpose(1, 2).reshape(tokens.shape))

    def first_pass(attn, i):
        def forward(tokens, encoder_hidden_states=None, attention_mask=None):
            stored[i] = tokens
            placed = tokens + tables[i][V]
            return attend(attn, tokens, placed, tokens, placed)

        return forward

    def second_pass(attn, i):
        def forward(hidden, encoder_hidden_states=None, attention_mask=None):
            placed = (hidden.unflatten(0, (B, V)) + tables[i][:V]).flatten(0, 1)
            copies = 1 if cross_view else V
            own_ref = stored[i].repeat_interleave(copies, 0)
            placed_ref = own_ref + tables[i][V]
            if cross_view:  # all views of an object are one sequence
                tokens, placed = (z.reshape(B, -1, z.shape[-1]) for z in (hidden, placed))
            else:
                tokens = hidden
            context, placed_context = torch.cat([tokens, own_ref], 1), torch.cat([placed, placed_ref], 1)
            return attend(attn, tokens, placed, context, placed_context).reshape(hidden.shape)

        return forward

    for i, attn in enumerate(layers):
        attn.forward = first_pass(attn, i)
    unet(ref, t, None, class_labels=torch.full((B,), V))
    for i, attn in enumerate(layers):
        attn.forward = second_pass(attn, i)
    labels = torch.arange(V).repeat(B)
    theirs = unet(turned(x).flatten(0, 1), t.repeat_interleave(V), None, class_labels=labels).sample
    theirs = turned(theirs.float().unflatten(0, (B, V)))
    torch.testing.assert_close(model(x, t, ref), theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_permuting_views_with_their_labels_permutes_the_output(tiny):
    x, t, ref = inputs()
    before = turned(tiny(turned(x), t, ref))
    order = torch.arange(V).roll(2)
    for weight in (tiny.unet.class_embedding.weight, *(m.position for m in tiny.attention_layers())):
        weight[:V] = weight[order].clone()
    after = turned(tiny(turned(x[:, order]), t, ref))
    torch.testing.assert_close(after, before[:, order], rtol=0, atol=2e-6)
    assert (after - before).abs().max() > 1e-3  # and the labels do tell views apart


@torch.no_grad()
def test_objects_do_not_see_each_other(tiny):
    x, t, ref = inputs()
    other, _, other_ref = inputs(1)
    x2, ref2 = torch.stack([x[0], other[1]]), torch.stack([ref[0], other_ref[1]])
    torch.testing.assert_close(tiny(x, t, ref)[0], tiny(x2, t, ref2)[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_reference_does_not_see_the_views(tiny):
    x, t, ref = inputs()
    rows = []
    for m in tiny.attention_layers():
        m.register_forward_hook(lambda m, args, out: rows.append(out.split([B * V, B])))
    tiny(x, t, ref)
    tiny(inputs(1)[0], t, ref)
    n = len(rows) // 2
    for (views, first), (others, second) in zip(rows[:n], rows[n:], strict=True):
        assert torch.equal(first, second)
        assert not torch.allclose(views, others)


@torch.no_grad()
@pytest.mark.parametrize("cross_view", [True, False])
def test_candidates_of_a_reference_may_share_its_row(cross_view):
    """The same numbers as with a row for each: candidates in a row have one reference, at their t."""
    model, (x, t, ref) = random_model(cross_view=cross_view), inputs()
    x = torch.cat([x, inputs(1)[0], inputs(2)[0]])[[0, 2, 4, 1, 3, 5]]  # three of each reference
    own = model(x, t.repeat_interleave(3), ref.repeat_interleave(3, 0))
    rows = []
    model.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    shared = model(x, t.repeat_interleave(3), ref)
    assert rows == [6 * V + 2]
    torch.testing.assert_close(shared, own, rtol=0, atol=1e-6)
    assert (own[:3] - model(x, t.repeat_interleave(3), ref.flip(0))[:3]).abs().max() > 1e-4


@torch.no_grad()
def test_views_see_each_other_only_with_cross_view(tiny):
    x, t, ref = inputs()
    changed = x.clone()
    changed[:, 3] = 0
    assert (tiny(x, t, ref) - tiny(changed, t, ref))[:, 0].abs().max() > 1e-4
    alone = random_model(cross_view=False)
    torch.testing.assert_close(alone(x, t, ref)[:, 0], alone(changed, t, ref)[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cross_view", [True, False])
def test_every_view_sees_the_reference(cross_view):
    model = random_model(cross_view=cross_view)
    x, t, ref = inputs()
    ref.requires_grad_(True)
    for v in range(V):
        (gradient,) = torch.autograd.grad(model(x, t, ref)[:, v].square().sum(), ref)
        assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()


@torch.no_grad()
def test_each_object_has_its_own_t(tiny):
    x, t, ref = inputs()
    before, after = tiny(x, t, ref), tiny(x, t + torch.tensor([0, 100]), ref)
    assert torch.equal(before[0], after[0])
    assert ((before - after)[1].abs().amax((1, 2, 3)) > 1e-4).all()


@torch.no_grad()
def test_rows_are_labelled_views_first_and_the_reference_last(tiny):
    x, t, ref = inputs()
    seen = []
    tiny.unet.class_embedding.register_forward_hook(lambda m, args, out: seen.append(args[0].tolist()))
    tiny(x, t, ref)
    blank = tiny(x, t, None) - tiny(x, t, torch.zeros_like(ref))
    assert seen.pop() == seen[0] and blank.abs().max() > 1e-4  # no reference is not a blank reference
    tiny(x[:, :2], t, ref)
    assert seen == [[*range(V)] * B + [V] * B, [*range(V)] * B, [0, 1] * B + [V] * B]


# --- the position table ---


def features(monkeypatch, size):  # (V + 1, size, size, 3 axes, 8)
    """What `position_table` multiplies by a random matrix."""
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.eye(*shape))
    return position_table(size, 24).view(V + 1, size, size, 3, 8)


def test_tokens_that_can_see_one_point_share_features(monkeypatch):
    table = features(monkeypatch, 4)
    # Each view shows the point (x, y, z) = (0.25, 0.75, -0.75) at this (row, column), right and back mirrored.
    seen_at = {"front": (0, 2), "right": (0, 0), "back": (0, 2), "left": (0, 0), "top": (0, 2)}
    tokens = {view: table[(i, *seen_at[view])] for i, view in enumerate(VIEWS)}
    unknown = {"front": 2, "right": 0, "back": 2, "left": 0, "top": 1}  # the axis along the view's rays
    octaves = torch.pi / 2 * torch.tensor([1.0, 2, 4, 8])
    for view, token in tokens.items():
        for axis, value in enumerate((0.25, 0.75, -0.75)):
            known = torch.cat([(value * octaves).sin(), (value * octaves).cos()]) * 2 / 8**0.5
            torch.testing.assert_close(token[axis], known * (axis != unknown[view]), rtol=0, atol=1e-6)
    assert table[V].equal(table[0])


def test_the_position_table_tells_places_apart_and_is_not_upside_down(monkeypatch):
    table = features(monkeypatch, 8)
    front = table[0].flatten(0, 1).flatten(1)
    assert torch.cdist(front, front).add(10 * torch.eye(64)).min() > 0.1
    height = table[:4, :, :, 1, 0]  # sin(pi / 2 * y) in the side views
    assert (height[:, :-1] > height[:, 1:]).all() and (height == height[:, :, :1]).all()
    # 16 of 24 features of mean square 1/2, times (2 / 8^0.5)^2
    torch.testing.assert_close(table.square().mean((-1, -2)), torch.full((V + 1, 8, 8), 1 / 6))


@torch.no_grad()
def test_attention_starts_from_the_table_and_equal_projections():
    layers = random_model().attention_layers()
    assert len(layers) == 3
    for layer in layers:
        assert layer.position is not None and layer.position.shape == (V + 1, h * h, 32)
        assert torch.equal(layer.to_q.weight, layer.to_k.weight)
        assert not torch.equal(layer.to_q.weight, layer.to_v.weight)


# --- gradients ---


def test_two_forwards_before_one_backward_under_checkpointing(tiny):
    """The layers run again in the backward: each must see the rows of its own forward."""
    x, t, ref = inputs()

    def gradients():
        loss = tiny(x, t, ref).square().mean() + tiny(x[:, :2], t, None).square().mean()
        loss = loss + tiny(x[:, :3], t, ref).square().mean()
        return torch.autograd.grad(loss, parameters)

    parameters = tiny.freeze()
    before = gradients()
    tiny.unet.enable_gradient_checkpointing()
    for a, b in zip(before, gradients()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_needs_one_device_only(rank):
    """On the meta device, where a tensor left on the CPU is an error, as it is beside a GPU."""
    model = random_model()
    if rank:
        model.add_lora(rank)
    parameters = model.freeze(attention_only=True, view_embedding=True)
    model.to("meta")
    x, t, ref = (z.to("meta") for z in inputs())
    out = model(x, t, model.encode(torch.empty(B, 3, 16, 16, device="meta")))
    (out - x).square().mean().backward()
    devices = {p.grad.device.type for p in model.parameters() if p.grad is not None}
    assert out.shape == x.shape and devices == {model.decode(out).device.type} == {"meta"}
    assert sum(p.grad is not None for p in model.parameters()) == len(parameters)


@torch.no_grad()
def test_autocast_returns_float32_near_the_exact_output(tiny):
    exact = tiny(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        low = tiny(*inputs())
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() / exact.norm() < 0.02


# --- what is trained ---


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_freeze_trains_what_it_is_asked_to(tiny):
    everything, embedding = {n for n, _ in tiny.named_parameters()}, "unet.class_embedding.weight"
    attention = {n for n in everything if ".attn1." in n}
    assert len(attention) == 3 * 6  # q, k, v, out with its bias, position table
    for attention_only, view_embedding, names in (
        (False, False, everything),
        (False, True, everything),
        (True, False, attention),
        (True, True, attention | {embedding}),
    ):
        parameters = tiny.freeze(attention_only, view_embedding=view_embedding)
        assert trained(tiny) == set(tiny.trained_state()) == names and len(parameters) == len(names)
        assert {id(p) for p in parameters} == {id(p) for p in tiny.parameters() if p.requires_grad}
        assert {p.dtype for p in tiny.parameters()} == {torch.float32}
    tiny.freeze(attention_only=True, frozen_bf16=True)
    dtypes = {n: p.dtype for n, p in tiny.named_parameters()}
    assert all(dtypes[n] == (torch.float32 if n in attention else torch.bfloat16) for n in everything)


@torch.no_grad()
def test_lora_trains_two_factors_of_each_projection_and_is_merged(tiny, tmp_path):
    before, names = tiny(*inputs()), set(tiny.state_dict())
    tiny.add_lora(2)
    parameters = tiny.freeze()
    new = {n for n, _ in tiny.named_parameters()} - names
    assert trained(tiny) == new and len(parameters) == len(new) == 3 * 4 * 2
    assert tiny(*inputs()).equal(before)  # the change starts at zero
    layer = next(m for m in tiny.modules() if isinstance(m, LoRALinear))
    assert layer.down.shape == (2, 32) and layer.up.shape == (32, 2)
    wide = LoRALinear(torch.nn.Linear(400, 300), 200).down  # D x starts as large as x
    assert abs((torch.randn(100, 400) @ wide.T).std() - 1) < 0.1
    for m in (m for m in tiny.modules() if isinstance(m, LoRALinear)):
        torch.nn.init.normal_(m.up, std=0.1)
    z = torch.randn(5, 32)
    expected = z @ (layer.weight + layer.up @ layer.down).T
    torch.testing.assert_close(layer(z), expected if layer.bias is None else expected + layer.bias)
    tiny.save(tmp_path)
    merged = load(tmp_path)
    assert set(merged.state_dict()) == names
    after = tiny(*inputs())
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(merged(*inputs()), after, rtol=0, atol=2e-5)


# --- latents and files ---


def test_latents_round_trip(tiny, tmp_path):
    images = torch.rand(2, V, 3, 16, 16)
    assert tiny.encode(images).shape == (2, V, c, h, h)
    torch.testing.assert_close(tiny.decode(tiny.encode(images)), images)
    with pytest.raises(InputError, match="32x32 pixels, expected 16x16"):
        tiny.encode(torch.rand(3, 32, 32))
    with pytest.raises(InputError, match="32x16 pixels"):
        tiny.encode(torch.rand(3, 16, 32))
    tiny.save(tmp_path)
    assert {p.dtype for p in load(tmp_path, half=True).parameters()} == {torch.float32}  # half is for SDXL


@torch.no_grad()
def test_save_and_load_change_nothing(tiny, tmp_path):
    tiny.save(tmp_path)
    assert torch.equal(load(tmp_path)(*inputs()), tiny(*inputs()))
    tiny.save(tmp_path, torch.bfloat16)
    assert all(
        v.equal(tiny.state_dict()[k].bfloat16().float()) for k, v in load(tmp_path).state_dict().items()
    )


def test_wrong_configs_are_refused(tiny, tmp_path):
    tiny.save(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    assert good == asdict(tiny.cfg)
    nan = float("nan")
    for change, text in (
        ({"depth": 2}, "unknown depth; missing .*; expected the fields of ModelConfig"),
        ({"channels": [32]}, "channels .32., expected int"),
        ({"channels": 40}, "not a multiple of 16"),
        ({"channels": 48, "head_dim": 32}, "multiple of 16 and head_dim, 32"),
        ({"channels": 0}, "channels 0: expected a finite number above 0"),
        ({"channels": True}, "channels True, expected int"),
        ({"image_size": 18}, "expected a multiple of patch, 4"),
        ({"image_size": 16.0}, "image_size 16.0, expected int"),
        ({"patch": 0}, "patch 0"),
        ({"prediction": "x1"}, "prediction 'x1', expected .*epsilon"),
        ({"ref_scale": nan}, "ref_scale nan"),
        ({"ref_scale": "20"}, "ref_scale '20', expected float"),
        ({"schedule_shift": -1.0}, "schedule_shift -1.0"),
        ({"schedule_shift": 10**400}, "schedule_shift 1000"),
        ({"cross_view": 1}, "cross_view 1, expected bool"),
        ({"base": "somewhere"}, "position True: expected False"),
        ({"base": "/nowhere", "position": False}, "--base /nowhere: cannot load its unet"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=text):
            load(tmp_path)
    incomplete = json.dumps({k: v for k, v in good.items() if k != "prediction"})
    for text in ("[]", "null", incomplete):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match="missing .*prediction"):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**good, "ref_scale": 20}))  # a whole number for a float
    assert load(tmp_path).cfg == replace(tiny.cfg, ref_scale=20)
    with pytest.raises(InputError):
        ModelConfig(ref_scale=nan)
    with pytest.raises(InputError, match="prediction v_prediction: expected one of x0, epsilon, v"):
        replace(PRESETS["toy"], prediction="v_prediction")  # pyright: ignore


def test_wrong_weights_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load(tmp_path)
    tiny.save(tmp_path)
    path, wide = tmp_path / "model.safetensors", random_model(channels=48).state_dict()
    whole, tensors = path.read_bytes(), load_file(path)
    infinite = {**tensors, "unet.conv_in.bias": torch.full((32,), float("inf"))}
    fewer = {k: v for k, v in tensors.items() if "class_embedding" not in k}
    for content, message in (
        (whole[:1000], "not readable as safetensors"),
        (safetensors.torch.save(wide), "size mismatch"),
        (safetensors.torch.save(infinite), "unet.conv_in.bias is not finite"),
        (
            safetensors.torch.save(fewer),
            "expected the weights of MultiViewUNet.*Missing key.*unet.class_embedding.weight",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load(tmp_path)


def test_sdxl_keeps_its_prediction_and_schedule_and_is_shown_a_louder_reference():
    """Five times: Zero123++ leaves out the factor that scales latents."""
    sdxl = PRESETS["sdxl"]
    assert (sdxl.prediction, sdxl.schedule_shift, sdxl.ref_scale) == ("epsilon", 1, 5)


def test_the_shipped_models_are_of_the_toy_preset():
    for name, cross_view in (("objects", True), ("objects_independent", False)):
        model = load(f"checkpoints/{name}")
        assert model.cfg == replace(PRESETS["toy"], cross_view=cross_view)
