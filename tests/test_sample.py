"""The step against diffusers and torch.distributions; the log-ratio's accuracy; samples that depend on nothing else."""

import pytest
import torch
from conftest import TINY
from diffusers import DDIMScheduler
from PIL import Image

import sample as S
from common import InputError
from model import ModelConfig, load


def schedule(**changes) -> S.Schedule:
    return S.Schedule(ModelConfig(**{**vars(TINY), **changes}))


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_step_is_ddim_at_eta_1(prediction, num_steps):
    ours = schedule(prediction=prediction)
    theirs = DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=True,  # only the last step, into the clean image, sees this
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type={"x0": "sample", "epsilon": "epsilon"}[prediction],
    )
    theirs.alphas_cumprod = ours.alpha_bar.float()
    theirs.set_timesteps(num_steps)
    pairs = ours.timesteps(num_steps)
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(0)
    for t, s in pairs:
        x, out, z = (torch.randn(1, 5, 48, 4, 4, generator=g) for _ in range(3))
        mean, var = S.ddpm_step(ours, out, x, torch.tensor([t]), torch.tensor([s]))
        want_mean = theirs.step(out, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        want = theirs.step(out, t, x, eta=1.0, variance_noise=z).prev_sample
        scale = want_mean.abs().max().item()
        torch.testing.assert_close(mean, want_mean, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(mean + var.sqrt() * z, want, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(var.squeeze(), theirs._get_variance(t, t - 1000 // num_steps), rtol=1e-5, atol=1e-9)


def test_betas_are_stable_diffusions():
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    torch.testing.assert_close(schedule(schedule_shift=1.0).alpha_bar.float(), theirs, rtol=1e-5, atol=1e-6)


def test_only_the_last_step_has_no_variance():
    ours = schedule()
    t, s = (torch.tensor(z) for z in zip(*ours.timesteps(20), strict=True))
    x = torch.zeros(20, 1, 1, 1, 1)
    _, var = S.ddpm_step(ours, x, x, t, s)
    assert (var[:-1] > 0).all() and var[-1] == 0


def test_schedule_shift_divides_the_signal_to_noise_ratio():
    plain, shifted = schedule(schedule_shift=1.0).alpha_bar, schedule(schedule_shift=4.0).alpha_bar
    torch.testing.assert_close(plain / (1 - plain), 16 * shifted / (1 - shifted))


def test_split_prediction_is_consistent():
    x0, eps = torch.randn(2, 3, 1, 5, 4, 2, 2)[:, :, 0]
    t = torch.tensor([10, 500, 900])
    for prediction, out in (("x0", x0), ("epsilon", eps)):
        ours = schedule(prediction=prediction)
        x_t = S.forward_noise(ours, x0, t, eps)
        got_x0, got_eps = S.split_prediction(ours, out, x_t, t)
        torch.testing.assert_close(got_x0, x0, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got_eps, eps, rtol=1e-3, atol=1e-3)


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


def test_candidates_share_the_start_and_the_reference_noise_only(tiny):
    ref = refs(1).expand(3, -1, -1, -1)
    chain = S.sample(tiny, ref, [5, 5, 5], 4, candidates=[0, 1, 2], noise_scales=[0.0, 0.0, 0.8])
    assert chain.states.shape == (3, 5, 5, 48, 4, 4)
    assert torch.equal(chain.states[0, 0], chain.states[2, 0]) and torch.equal(chain.ref_noise[0], chain.ref_noise[2])
    assert not torch.allclose(chain.states[0, 1], chain.states[1, 1])  # step noises differ
    assert (chain.candidate_noise[:2] == 0).all()
    assert abs(chain.candidate_noise[2].std() - 0.8) < 0.1
    again = S.sample(tiny, ref, [5, 5, 5], 4, candidates=[0, 1, 2], noise_scales=[0.0, 0.0, 0.8])
    assert torch.equal(again.images, chain.images)


def test_common_noise_leaves_only_the_reference_to_tell_candidates_apart(tiny):
    ref, kinds = refs(1).expand(3, -1, -1, -1), {"candidates": [0, 1, 2], "common_noise": True}
    chain = S.sample(tiny, ref, [5, 5, 5], 4, noise_scales=[0.0, 0.0, 0.8], **kinds)
    assert torch.equal(chain.states[0], chain.states[1])
    assert not torch.equal(chain.states[0], chain.states[2])
    # under one condition the third would be the first: its noises are the same
    assert torch.equal(S.sample(tiny, ref, [5, 5, 5], 4, **kinds).states[2], chain.states[0])


def test_guidance_leads_away_from_the_noised_reference(tiny):
    """One call: latents are linear in the prediction, so guided = clean + w (clean - noised)."""
    seeds = [3, 4]
    clean, noised, guided = (
        S.sample(tiny, refs(2), seeds, 1, **kind).states[:, -1]
        for kind in ({}, {"noise_scales": [0.7, 0.7]}, {"guidance": 0.5, "guidance_noise": 0.7})
    )
    assert (clean - noised).abs().max() > 1e-3
    assert torch.allclose(guided, clean + 0.5 * (clean - noised), atol=1e-5)
    assert torch.equal(S.sample(tiny, refs(2), seeds, 1, guidance_noise=0.7).states[:, -1], clean)


def test_a_trajectory_can_be_replayed_bit_by_bit(tiny):
    """The stored states and noises are all that the policy depends on: its means come out the same, bit by bit."""
    ours = S.Schedule(tiny.cfg)
    chain = S.sample(tiny, refs(2), [1, 2], 5, noise_scales=[0.3, 0.8])
    generators = [S.keyed_generator(seed, 3, 0) for seed in (1, 2)]
    with torch.no_grad():
        for k, (t, s) in enumerate(ours.timesteps(5)[:-1]):
            times = torch.full((2,), t), torch.full((2,), s)
            y = chain.y + chain.candidate_noise
            ref_t = S.noised_reference(ours, tiny.cfg, y, times[0], chain.ref_noise)
            mean, var = S.ddpm_step(ours, tiny(chain.states[:, k], times[0], ref_t), chain.states[:, k], *times)
            noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            assert torch.equal(mean + var.sqrt() * noise, chain.states[:, k + 1])


def test_saved_and_loaded_it_draws_the_same(tiny, tiny_folder):
    assert torch.equal(S.sample(load(tiny_folder), refs(1), [4], 3).images, S.sample(tiny, refs(1), [4], 3).images)


def test_main_takes_any_picture(tiny_folder, tmp_path):
    Image.new("RGBA", (37, 21), (200, 30, 30, 128)).save(tmp_path / "photo.png")
    out = str(tmp_path / "views.png")
    S.main(S.Config(image=str(tmp_path / "photo.png"), model=tiny_folder, out=out, num_steps=2))
    assert Image.open(out).size == (5 * 16, 16)
    assert all(Image.open(tmp_path / "views" / f"{v}.png").size == (16, 16) for v in S.VIEWS)
    with pytest.raises(InputError):
        S.main(S.Config(image=str(tmp_path / "missing.png"), model=tiny_folder, out=out))


def test_wrong_counts_are_refused(tiny):
    with pytest.raises(InputError, match="num_steps"):
        schedule().timesteps(0)
    with pytest.raises(InputError, match="num_steps"):
        schedule().timesteps(1000)
    with pytest.raises(InputError, match="2 seeds for 1"):
        S.sample(tiny, refs(1), [1, 2], 2)
