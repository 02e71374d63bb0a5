"""The step against diffusers and torch.distributions; the log-ratio's accuracy; what samples depend on."""

import os
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_model
from diffusers import DDIMScheduler
from PIL import Image

import sample as S
from common import InputError
from model import ModelConfig


def schedule(**changes) -> S.Schedule:
    return S.Schedule(ModelConfig(**{**vars(TINY), **changes}))


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_step_is_ddim_at_eta_1(prediction, num_steps):
    ours = schedule(prediction=prediction)
    theirs = DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=True,  # only the last step, into the clean image, sees this
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type={"x0": "sample", "epsilon": "epsilon", "v": "v_prediction"}[prediction],
    )
    theirs.alphas_cumprod = ours.alpha_bar.float()
    theirs.set_timesteps(num_steps)
    pairs = ours.timesteps(num_steps)
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(0)
    for t, s in pairs:
        x, out, z = (torch.randn(1, 5, 48, 4, 4, generator=g) for _ in range(3))
        mean, var = S.ddpm_step(ours, out, x, torch.tensor([t]), torch.tensor([s]))
        assert (var == 0) == (s == -1)  # only the last step has no variance
        want_mean = theirs.step(out, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        want = theirs.step(out, t, x, eta=1.0, variance_noise=z).prev_sample
        scale = want_mean.abs().max().item()
        torch.testing.assert_close(mean, want_mean, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(mean + var.sqrt() * z, want, rtol=0, atol=1e-6 * scale)
        want_var = theirs._get_variance(t, t - 1000 // num_steps)
        torch.testing.assert_close(var.squeeze(), want_var, rtol=1e-5, atol=1e-9)


def test_betas_are_stable_diffusions():
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    torch.testing.assert_close(schedule(schedule_shift=1.0).alpha_bar.float(), theirs, rtol=1e-5, atol=1e-6)


def test_schedule_shift_divides_the_signal_to_noise_ratio():
    plain, shifted = schedule(schedule_shift=1.0).alpha_bar, schedule(schedule_shift=4.0).alpha_bar
    torch.testing.assert_close(plain / (1 - plain), 16 * shifted / (1 - shifted))


def test_split_prediction_is_consistent():
    x0, eps = torch.randn(2, 3, 1, 5, 4, 2, 2)[:, :, 0]
    t = torch.tensor([10, 500, 900])
    ab = schedule().ab(t)
    for prediction, out in (("x0", x0), ("epsilon", eps), ("v", ab.sqrt() * eps - (1 - ab).sqrt() * x0)):
        ours = schedule(prediction=prediction)
        x_t = S.forward_noise(ours, x0, t, eps)
        got_x0, got_eps = S.split_prediction(ours, out, x_t, t)
        torch.testing.assert_close(got_x0, x0, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got_eps, eps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ref_scale", [1.0, 20.0])
def test_the_reference_is_scaled_up_before_it_is_noised(ref_scale):
    ours = schedule(ref_scale=ref_scale)
    cfg, t = ModelConfig(**{**vars(TINY), "ref_scale": ref_scale}), torch.tensor([1, 500, 999])
    y, noise = torch.randn(2, 3, 48, 32, 32, generator=torch.Generator().manual_seed(0))
    y_t = S.noised_reference(ours, cfg, y, t, noise)
    assert (y_t.flatten(1).std(1) - 1).abs().max() < 0.02  # unit size at every t
    for i in range(3):
        ab = ours.alpha_bar[t[i]].item()
        size = (ab * ref_scale**2 + 1 - ab) ** 0.5
        torch.testing.assert_close(y_t[i], (ab**0.5 * ref_scale * y[i] + (1 - ab) ** 0.5 * noise[i]) / size)


def gaussians(distance: float, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    mean, z, d = (torch.randn(3, 5, 48, 16, 16, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.tensor([0.3, 0.02, 1e-3], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    action, other = mean + var.sqrt() * z, mean + distance * d
    return tuple(x.to(dtype) for x in (action, other, mean, var))


def test_log_prob_is_the_density_summed_over_everything():
    action, other, _, var = gaussians(0.1, torch.float64)
    want = torch.distributions.Normal(other, var.sqrt()).log_prob(action).sum((1, 2, 3, 4))
    torch.testing.assert_close(S.log_prob(action, other, var), want, rtol=1e-12, atol=0)
    action, other, _, var = gaussians(0.1)
    torch.testing.assert_close(S.log_prob(action, other, var).double(), want, rtol=1e-5, atol=0)


def test_log_ratio_is_exactly_zero_at_equal_means():
    action, _, mean, var = gaussians(0.0)
    assert (S.log_ratio(action, mean, mean.clone(), var) == 0).all()


def test_log_ratio_beats_subtraction_in_fp32():
    exact = S.log_ratio(*gaussians(1e-5, torch.float64))
    a, theta, pre, v = gaussians(1e-5, torch.float64)
    torch.testing.assert_close(exact, S.log_prob(a, theta, v) - S.log_prob(a, pre, v), rtol=1e-4, atol=1e-9)
    # The same float32 inputs for both, so that only the arithmetic differs.
    action, theta, pre, var = gaussians(1e-5)
    exact = S.log_ratio(action.double(), theta.double(), pre.double(), var.double())
    factored = (S.log_ratio(action, theta, pre, var) - exact).abs().max()
    subtracted = ((S.log_prob(action, theta, var) - S.log_prob(action, pre, var)) - exact).abs().max()
    assert factored < 1e-4 * exact.abs().max()
    assert subtracted > 100 * factored


def refs(n: int):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def test_a_sample_does_not_depend_on_its_batch(tiny):
    batched = S.sample(tiny, refs(3), [11, 12, 13], 5)
    alone = S.sample(tiny, refs(3)[1:2], [12], 5)
    torch.testing.assert_close(alone.images[0], batched.images[1], rtol=0, atol=1e-5)
    assert torch.equal(alone.states[0, 0], batched.states[1, 0])


def test_candidates_differ_by_their_step_noises_alone(tiny):
    chain = S.sample(tiny, refs(2), [5, 6], 4, G=3)
    assert chain.states.shape == (6, 5, 5, 48, 4, 4) and chain.images.shape == (6, 5, 3, 16, 16)
    assert torch.equal(chain.states[0, 0], chain.states[1, 0])
    assert len(chain.ref_noise) == len(chain.y) == 2
    for k in range(1, 5):
        flat = chain.states[:, k].flatten(1)
        assert torch.pdist(flat).min() > 0.01 * flat.norm(dim=1).mean()  # no two are one
    # the first is the plain chain, also if all are one
    plain = S.sample(tiny, refs(2), [5, 6], 4).states
    torch.testing.assert_close(chain.states[::3], plain, rtol=0, atol=1e-3)
    same = S.sample(tiny, refs(2), [5, 6], 4, G=3, own=[]).states
    assert torch.equal(same, plain.repeat_interleave(3, 0))


def test_one_forward_serves_candidates_that_share_a_state(tiny, monkeypatch):
    rows, original = [], S.policy_mean
    spy = lambda *args: rows.append((len(args[2]), len(args[3]))) or original(*args)  # noqa: E731
    monkeypatch.setattr(S, "policy_mean", spy)
    one, part, all_own = (2, 2), (6, 2), (6, 6)  # rows of views, and of references
    cases = [({}, [one, part, part, part]), ({"own": [2]}, [one, one, one, part])]
    cases += [({"noise_scales": [0.0, 0.1, 0.8]}, [all_own] * 4)]
    for how, expected in cases:
        rows.clear()
        S.sample(tiny, refs(2), [5, 6], 4, G=3, **how)
        assert rows == expected, how


def test_a_noise_scale_moves_the_reference_that_is_seen_and_nothing_else(tiny, monkeypatch):
    seen = []
    original = S.policy_mean

    def spy(model, schedule, x_t, y, *rest):
        seen.append(y)
        return original(model, schedule, x_t, y, *rest)

    monkeypatch.setattr(S, "policy_mean", spy)
    chain = S.sample(tiny, refs(1), [5], 3, G=3, own=[], noise_scales=[0.0, 0.4, 0.8])
    assert torch.equal(chain.states[0, 0], chain.states[2, 0])
    assert not torch.equal(chain.states[0, 1], chain.states[2, 1])
    torch.testing.assert_close(chain.states[0], S.sample(tiny, refs(1), [5], 3).states[0], rtol=0, atol=1e-5)
    noise = [(seen[0][i] - chain.y[0]) / a for i, a in ((1, 0.4), (2, 0.8))]
    assert all(abs(n.std() - 1) < 0.1 for n in noise) and torch.equal(seen[0][0], chain.y[0])
    assert not torch.allclose(*noise, atol=0.1)  # n_g: each candidate has its own
    assert all(torch.equal(y, seen[0]) for y in seen[:3])  # one draw for the whole chain


def test_every_noise_has_a_key_of_its_own(monkeypatch, tiny):
    keys = []
    original = S.draw
    monkeypatch.setattr(S, "draw", lambda shape, k: keys.extend(k) or original(shape, k))
    S.sample(tiny, refs(2), [7, 8], 3, G=2, noise_scales=[0.1, 0.3])
    steps = [(seed, 3, call, g) for call in range(3) for seed in (7, 8) for g in (0, 1)]
    scales = [(seed, 2, a) for seed in (7, 8) for a in (100, 300)]
    assert keys == [(7, 0), (8, 0), (7, 1), (8, 1), *scales, *steps]
    keys.clear()
    S.sample(tiny, refs(2), [7, 8], 3, G=2, own=[1])  # the others are shared
    steps = [(7, 3, 0, 0), (8, 3, 0, 0)]
    steps += [(seed, 3, call, g) for call, gs in ((1, (0, 1)), (2, (0, 0))) for seed in (7, 8) for g in gs]
    assert keys == [(7, 0), (8, 0), (7, 1), (8, 1), *steps]
    chain = S.sample(tiny, refs(2), [7, 8], 2)  # nor do two views share one
    rows = torch.cat([chain.states[:, 0].flatten(0, 1), chain.ref_noise]).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.25


def test_drawing_keeps_no_graph():
    model = random_model()
    assert model.freeze() and not S.sample(model, refs(1), [0], 2).states.requires_grad


def test_a_trajectory_can_be_replayed_bit_by_bit(tiny):
    """The stored states and noises are all that the policy depends on: its means are the same, bit by bit."""
    ours = S.Schedule(tiny.cfg)
    chain = S.sample(tiny, refs(2), [1, 2], 5, G=2, own=range(1, 5))
    with torch.no_grad():
        for k, (t, s) in enumerate(ours.timesteps(5)):
            x, y, ref_noise = chain.states[:, k], chain.y, chain.ref_noise
            x = x[::2] if k < 2 else x  # one row for both candidates
            times = torch.full((len(x),), t), torch.full((len(x),), s)
            mean, var = S.policy_mean(tiny, ours, x, y, ref_noise, *times)
            mean, var = (z.repeat_interleave(4 // len(x), 0) for z in (mean, var))
            noise = S.draw(mean.shape[1:], [(seed, 3, k, g * (k > 0)) for seed in (1, 2) for g in (0, 1)])
            assert torch.equal(mean + var.sqrt() * noise, chain.states[:, k + 1])
    assert torch.equal(tiny.decode(chain.states[:, -1]), chain.images)


def test_kl_is_that_of_two_gaussians_and_what_the_log_ratio_lacks_of_a_linear_part():
    action, theta, pre, var = gaussians(0.1, torch.float64)
    two = [torch.distributions.Normal(m, var.sqrt()) for m in (theta, pre)]
    want = torch.distributions.kl_divergence(*two).sum((1, 2, 3, 4))
    torch.testing.assert_close(S.kl_divergence(theta, pre, var), want, rtol=1e-10, atol=0)
    linear = ((theta - pre) * (action - pre) / var).flatten(1).sum(1)
    torch.testing.assert_close(S.log_ratio(action, theta, pre, var), linear - want)


def test_every_object_of_sample_images_has_its_own_noise(tiny):
    same = refs(1).expand(3, -1, -1, -1)
    images = S.sample_images(tiny, same, 5, 2, batch_size=2)
    assert images.shape == (3, 5, 3, 16, 16) and torch.equal((images * 255).round() / 255, images)
    for i in range(3):
        alone = S.sample(tiny, refs(1), [S.key_seed(5, i)], 2).images[0]
        torch.testing.assert_close(images[i], (alone * 255).round() / 255, rtol=0, atol=1.01 / 255)
    assert not torch.allclose(images[0], images[2], atol=0.05)


def test_one_image_that_is_no_number_is_refused(tiny, monkeypatch):
    broken = torch.zeros(2, 5, 3, 16, 16)
    broken[1, 2] = torch.nan
    monkeypatch.setattr(type(tiny), "decode", lambda self, latents: broken)
    with pytest.raises(InputError, match="not finite"):
        S.sample(tiny, refs(2), [0, 1], 2)


def test_main_takes_any_picture(tiny_folder, tmp_path):
    Image.new("RGBA", (37, 21), (200, 30, 30, 128)).save(tmp_path / "photo.png")
    out = str(tmp_path / "views.png")
    S.main(S.Config(image=str(tmp_path / "photo.png"), model=tiny_folder, out=out, num_steps=2))
    strip = Image.open(out)
    assert strip.size == (5 * 16, 16)
    for i, view in enumerate(S.VIEWS):
        alone = Image.open(tmp_path / "views" / f"{view}.png")
        assert alone.tobytes() == strip.crop((16 * i, 0, 16 * i + 16, 16)).tobytes()
    drawn = set()
    for changes in ({}, {"bf16": "on"}, {"num_steps": 3}, {"seed": 1}):
        how = {"num_steps": 2, "bf16": "off"} | changes
        S.main(S.Config(str(tmp_path / "photo.png"), tiny_folder, out, **how))  # pyright: ignore
        drawn.add(Path(out).read_bytes())
    assert len(drawn) == 4
    with pytest.raises(InputError):
        S.main(S.Config(image=str(tmp_path / "missing.png"), model=tiny_folder, out=out))
    os.link(tmp_path / "views.png", tmp_path / "same.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "top.png").write_bytes(b"")
    for taken in ("mine.png", "tiny.png", "tiny/x.png"):  # a user's views, the model's folder
        with pytest.raises(InputError, match="mine/top.png is there|lies in .*tiny, which is read"):
            S.main(S.Config(str(tmp_path / "photo.png"), tiny_folder, str(tmp_path / taken)))
    with pytest.raises(InputError, match=r"--out .*views.jpg: expected the name of a .png file"):
        S.main(S.Config(str(tmp_path / "photo.png"), tiny_folder, str(tmp_path / "views.jpg")))
    for image in ("views.png", "views/top.png", "same.png"):  # its own output
        with pytest.raises(InputError, match="would overwrite --image"):
            S.main(S.Config(image=str(tmp_path / image), model=tiny_folder, out=out))


def test_wrong_counts_are_refused():
    for wrong in (0, 1, 501, 1000):
        with pytest.raises(InputError, match=f"--num_steps {wrong}: expected 2 to 500"):
            schedule().timesteps(wrong)
    assert [len(schedule().timesteps(k)) for k in (2, 50, 500)] == [2, 50, 500]
    assert schedule().timesteps(7)[:2] == [(853, 711), (711, 569)]  # 1000 / 7 is 142.9
    assert schedule().timesteps(2) == [(501, 1), (1, -1)] and schedule().timesteps(500)[0] == (999, 997)
