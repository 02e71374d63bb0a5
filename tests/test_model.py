"""The one-pass reference attention against its definition, and who may see whom."""

import pytest
import torch
from conftest import random_model
from diffusers import UNet2DConditionModel

from common import InputError
from model import NUM_VIEWS, MultiViewAttention, load

B, V, c, h = 2, NUM_VIEWS, 48, 4


def inputs(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, V, c, h, h, generator=g),
        torch.tensor([300, 700]),
        torch.randn(B, c, h, h, generator=g),
    )


def stock_unet(model):
    """The unmodified diffusers UNet with our model's weights."""
    unet = UNet2DConditionModel.from_config(model.unet.config, num_class_embeds=NUM_VIEWS + 1)
    for module in unet.modules():
        if hasattr(module, "attn2"):
            module.attn2 = module.norm2 = None
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
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("cross_view", [True, False])
def test_one_pass_equals_two_pass(cross_view, position):
    """The paper's form: run the UNet on Y_t, keep what each attention layer saw, append its keys and values."""
    model = random_model(cross_view=cross_view, position=position).double()  # so that only a wrong formula can differ
    x, t, ref = (z.double() if z.is_floating_point() else z for z in inputs())
    unet = stock_unet(model)
    layers = [m.attn1 for m in unet.modules() if hasattr(m, "attn1")]
    tables = [m.position if position else torch.zeros(V + 1, 1, 1) for m in model.modules() if hasattr(m, "position")]
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
            own_ref, placed_ref = (z.repeat_interleave(copies, 0) for z in (stored[i], stored[i] + tables[i][V]))
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
    theirs = unet(x.flatten(0, 1), t.repeat_interleave(V), None, class_labels=torch.arange(V).repeat(B)).sample
    torch.testing.assert_close(model(x, t, ref).flatten(0, 1), theirs.float(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_permuting_views_with_their_labels_permutes_the_output(tiny):
    x, t, ref = inputs()
    before = tiny(x, t, ref)
    order = torch.tensor([3, 0, 4, 2, 1])
    labels = [tiny.unet.class_embedding.weight, *(m.position for m in tiny.modules() if hasattr(m, "position"))]
    for weight in labels:
        weight[:V] = weight[order].clone()
    after = tiny(x[:, order], t, ref)
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
    for m in tiny.modules():
        if isinstance(m, MultiViewAttention):
            m.register_forward_hook(lambda m, args, out: rows.append(out.unflatten(0, (B, V + 1))))
    tiny(x, t, ref)
    tiny(inputs(1)[0], t, ref)
    n = len(rows) // 2
    for first, second in zip(rows[:n], rows[n:], strict=True):
        assert torch.equal(first[:, V], second[:, V])
        assert not torch.allclose(first[:, :V], second[:, :V])


@torch.no_grad()
def test_views_see_each_other_only_with_cross_view(tiny):
    x, t, ref = inputs()
    changed = x.clone()
    changed[:, 3] = 0
    assert (tiny(x, t, ref) - tiny(changed, t, ref))[:, 0].abs().max() > 1e-4
    alone = random_model(cross_view=False)
    torch.testing.assert_close(alone(x, t, ref)[:, 0], alone(changed, t, ref)[:, 0], rtol=0, atol=1e-6)


def test_the_gradient_reaches_the_reference(tiny):
    x, t, ref = inputs()
    ref.requires_grad_(True)
    tiny(x, t, ref)[:, 2].square().sum().backward()
    assert ref.grad is not None and (ref.grad.flatten(1).norm(dim=1) > 1e-4).all()


@torch.no_grad()
def test_no_reference_is_not_a_blank_reference(tiny):
    x, t, ref = inputs()
    assert (tiny(x, t, None) - tiny(x, t, torch.zeros_like(ref))).abs().max() > 1e-4


def test_latents_round_trip(tiny):
    images = torch.rand(2, 5, 3, 16, 16)
    assert tiny.encode(images).shape == (2, 5, c, h, h)
    torch.testing.assert_close(tiny.decode(tiny.encode(images)), images)
    with pytest.raises(InputError, match="32x32 pixels, expected 16x16"):
        tiny.encode(torch.rand(3, 32, 32))


@torch.no_grad()
def test_save_and_load_change_nothing(tiny, tmp_path):
    tiny.save(tmp_path)
    x, t, ref = inputs()
    assert torch.equal(load(tmp_path)(x, t, ref), tiny(x, t, ref))


def test_broken_folders_say_what_is_wrong(tiny, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        load(tmp_path)
    tiny.save(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(InputError, match="not readable as safetensors"):
        load(tmp_path)
    random_model(channels=(16, 48)).save(tmp_path / "wide")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "wide" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="of another shape"):
        load(tmp_path)


def test_attention_parameters_are_the_attention_layers(tiny):
    names = {n for n, p in tiny.named_parameters() if any(p is q for q in tiny.attention_parameters())}
    assert names == {n for n, _ in tiny.named_parameters() if ".attn1." in n}
    assert tiny.unet.class_embedding.weight.abs().min() > 0  # random_model did its part
