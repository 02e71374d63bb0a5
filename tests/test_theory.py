"""theory.py passes on every seed, and each planted mistake makes at least one check fail."""

import math

import pytest
import torch

import theory

NAMES = [check.__name__ for check in theory.CHECKS]


@pytest.mark.parametrize("seed", range(20))
def test_all_checks_pass(seed):
    checks = [check for run in theory.CHECKS for check in run(seed)]
    assert [theory.line(check) for check in checks if not check.passed] == []
    assert len(checks) > 60


def test_a_nan_never_passes():
    nan = theory.worst([0.0, math.nan, 1e-20])
    assert math.isnan(nan)
    assert not theory.Check("", "", nan, 1.0).passed
    assert not theory.Check("", "", nan, 1.0, "true statement").passed
    assert theory.line(theory.Check("", "", nan, 1.0)).startswith("FAIL")


# --- the planted mistakes: name -> {function of theory.py: what makes the mistaken one from the right one} ---


def latent(change):
    """Change the latent before latent_score sees it: change(alpha, h, latent) -> mean, cov."""

    def wrong(right):
        def latent_score(u, q, B):
            mean, cov = change(math.exp(-B / 2), 1 - math.exp(-B), q)
            return right(u, theory.Latent(q.weight, mean, cov), B)

        return latent_score

    return {"latent_score": wrong}


def swap_alpha_h(alpha, h, q):
    return q.mean, (h * q.cov + (alpha**2 - h) * torch.eye(q.cov.shape[-1], dtype=torch.float64)) / alpha**2


def in_span(x, A):
    return A @ (A.T @ x)


def scaled(factor):
    """Multiply the result by factor(alpha, h); B is the last argument."""
    return lambda right: lambda *args: factor(math.exp(-args[-1] / 2), 1 - math.exp(-args[-1])) * right(*args)


def without_transpose(right):
    def simple_guidance(x, a, y, A, m, B):
        return 2 * (y - a @ theory.posterior_mean(x, A, m, B)) * theory.mean_jacobian(x, A, m, B) @ a

    return simple_guidance


def contrastive(combine):
    """combine(positive, negative, y - ap^T E, the positive term at Xt) -> the mistaken G."""

    def wrong(right):
        def contrastive_guidance(x0, x, a, ap, y, A, m, B):
            positive = 2 * (y - a @ x0) * a
            negative = right(x0, x, a, ap, y, A, m, B) - positive
            factor = y - ap @ theory.posterior_mean(x, A, m, B)
            return combine(positive, negative, factor, 2 * (y - a @ x) * a)

        return contrastive_guidance

    return {"contrastive_guidance": wrong}


def half_score(right):
    def reverse_step(B, dB, m, C, guidance):
        S, b = right(B, dB, m, C, guidance)
        S0, b0 = right(B, dB, m, C, theory.guide_nothing)
        eye = torch.eye(C.shape[-1], dtype=torch.float64)
        return S - (S0 - (1 + dB / 2) * eye) / 2, b - b0 / 2

    return reverse_step


def guidance_without_beta(right):
    """beta = 2: the guidance is added to the drift and not to the score."""
    return lambda B, dB, m, C, guidance: right(B, dB, m, C, lambda B, J: tuple(part / 2 for part in guidance(B, J)))


def contrastive_law(shift):
    """shift(K(C) a, C ap, ap, alpha1, alpha2) -> change of the mean."""

    def wrong(right):
        def law_contrastive(m, C, a, ap, alpha1, alpha2):
            Ka, Cap = theory.mv(theory.field_response(C), a), theory.mv(C, ap)
            return m + shift(Ka, Cap, ap, alpha1, alpha2), C

        return law_contrastive

    return {"law_contrastive": wrong}


MUTATIONS = {
    "eq3_sign": {"score": lambda f: lambda x, A, q, B: 2 * in_span(f(x, A, q, B), A) - f(x, A, q, B)},
    "eq3_no_offspan": {"score": lambda f: lambda x, A, q, B: in_span(f(x, A, q, B), A)},
    "mu_not_scaled": latent(lambda alpha, h, q: (q.mean / alpha, q.cov)),
    "sigma_inverse": latent(lambda alpha, h, q: (q.mean, torch.linalg.inv(q.cov))),
    "sigma_is_std": {"schedule": lambda f: lambda B: (f(B)[0], f(B)[1] ** 2)},
    "alpha_h_swapped": latent(swap_alpha_h),
    "A_not_orthonormal": {"random_basis": lambda f: lambda D, M, gen: 1.1 * f(D, M, gen)},
    "m_without_u_over_h": {"latent_m": lambda f: theory.latent_score},
    "no_h_over_alpha": {"posterior_mean": scaled(lambda alpha, h: alpha / h)},
    "no_h_over_alpha_J": {"mean_jacobian": scaled(lambda alpha, h: alpha / h)},
    "no_h_over_alpha_G": {"simple_guidance": scaled(lambda alpha, h: alpha / h)},
    "cov_no_h": {"posterior_cov": scaled(lambda alpha, h: 1 / h)},
    "eq4_as_printed": {"mean_jacobian": lambda f: lambda *args: f(*args).T},
    "sign": {"simple_guidance": scaled(lambda alpha, h: -1)},
    "drop_2": {"simple_guidance": scaled(lambda alpha, h: 0.5)},
    "no_transpose": {"simple_guidance": without_transpose},
    "thm_sign": contrastive(lambda positive, negative, factor, at_xt: positive - negative),
    "thm_keep_factor": contrastive(lambda positive, negative, factor, at_xt: positive + factor * negative),
    "thm_pos_at_xt": contrastive(lambda positive, negative, factor, at_xt: at_xt + negative),
    "half_score": {"reverse_step": half_score},
    "guid_unscaled": {"reverse_step": guidance_without_beta},
    "tilt_sign": {"guide_contrastive": lambda f: lambda a, ap, alpha1, alpha2: f(a, ap, alpha1, -alpha2)},
    "claim_K_is_2C": {"field_response": lambda f: lambda C: 2 * C},
    "claim_no_K": {"field_response": lambda f: lambda C: torch.eye(C.shape[-1], dtype=torch.float64)},
    "claim_2r": contrastive_law(lambda Ka, Cap, ap, alpha1, alpha2: alpha1 * Ka - 2 * alpha2 * Cap),
    "claim_no_C": contrastive_law(lambda Ka, Cap, ap, alpha1, alpha2: alpha1 * Ka - alpha2 * ap),
    "claim_sign": contrastive_law(lambda Ka, Cap, ap, alpha1, alpha2: alpha1 * Ka + alpha2 * Cap),
}

LATENT = ["mu_not_scaled", "sigma_inverse", "sigma_is_std", "alpha_h_swapped"]
POSTERIOR = ["no_h_over_alpha", "no_h_over_alpha_J", "m_without_u_over_h"]
CAUGHT_BY = {
    "check_forward": ["sigma_is_std"],
    "check_reverse": ["half_score", "sigma_is_std"],
    "check_score": ["eq3_sign", "eq3_no_offspan", "A_not_orthonormal", *LATENT],
    "check_posterior": [*POSTERIOR, *LATENT],
    "check_quadrature": ["eq3_sign", "eq3_no_offspan", "A_not_orthonormal", "cov_no_h", *LATENT, *POSTERIOR],
    "check_corollary1": ["sign", "drop_2", "no_h_over_alpha_G", "no_transpose", "eq4_as_printed"],
    "check_coefficient": ["m_without_u_over_h", "no_h_over_alpha_J", "sigma_inverse"],
    "check_direction": ["sign", "sigma_inverse"],
    "check_theorem1": ["thm_sign", "thm_keep_factor", "thm_pos_at_xt"],
    "check_example1": ["thm_sign"],
    "check_laws": ["half_score", "guid_unscaled", "tilt_sign", "m_without_u_over_h", "claim_K_is_2C"],
    "check_condition": ["claim_K_is_2C", "claim_no_K", "claim_2r", "claim_no_C", "claim_sign"],
    "check_wins": ["claim_2r", "claim_sign"],
}


PAIRS = [(name, mutation) for name, mutations in CAUGHT_BY.items() for mutation in mutations]


@pytest.mark.parametrize("name, mutation", PAIRS)
def test_mutation_is_caught(name, mutation, monkeypatch):
    for function, wrong in MUTATIONS[mutation].items():
        monkeypatch.setattr(theory, function, wrong(getattr(theory, function)))
    run = getattr(theory, name)
    assert any(not check.passed for check in run(0))


def test_every_mutation_is_caught_somewhere():
    assert {mutation for some in CAUGHT_BY.values() for mutation in some} == set(MUTATIONS)
    assert set(CAUGHT_BY) <= set(NAMES)


@pytest.mark.parametrize("mutation", ["no_transpose", "eq4_as_printed"])
def test_exact_scores_hide_the_transpose(mutation, monkeypatch):
    for function, wrong in MUTATIONS[mutation].items():
        monkeypatch.setattr(theory, function, wrong(getattr(theory, function)))
    assert all(check.passed for name in ("check_posterior", "check_quadrature") for check in getattr(theory, name)(0))
    failed = [check.name for check in theory.check_corollary1(0) if not check.passed]
    assert failed == ["Corollary 1 and J if m is no gradient"]


# --- the numbers the README and PAPER.md quote ---


def test_matched_comparison():
    # studies x guidances: none, simple ap, simple a_i, a_i only, r = .25, .5, .8, 1.2
    expected = {
        "S1": (0.881, 0.974, 0.984, 0.982, 0.982, 0.981, 0.979, 0.973),
        "S3": (0.813, 0.926, 0.961, 0.957, 0.960, 0.964, 0.969, 0.977),
        "S4": (0.815, 0.981, 0.961, 0.956, 0.953, 0.949, 0.941, 0.923),
        "S5": (0.705, 0.789, 0.831, 0.840, 0.846, 0.854, 0.865, 0.874),
        "S6": (0.654, 0.781, 0.843, 0.860, 0.870, 0.884, 0.904, 0.927),
        "S7": (0.784, 0.793, 0.846, 0.855, 0.860, 0.865, 0.872, 0.884),
    }
    table = theory.matched_table()
    for name, row in expected.items():
        assert [cell[0] for cell in table[name]] == pytest.approx(row, abs=5e-3)


def test_overshoot():
    step = torch.tensor([0.75, 5.0], dtype=torch.float64)
    assert theory.step_cosine(step, theory.direction(0.8)).tolist() == pytest.approx([1.0, 0.745], abs=1e-3)
    assert theory.step_cosine(step, theory.direction(1.4))[1].item() == pytest.approx(0.021, abs=1e-3)
    assert theory.step_cosine(step, theory.A1)[1].item() == pytest.approx(0.995, abs=1e-3)


def test_main_reports_failures_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "CHECKS", (lambda seed: [theory.Check("Eq. (0)", "wrong", 1.0, 0.5)],))
    result = theory.main(theory.Config(plot=True, out=str(tmp_path), trajectories=20))
    assert result["failed"] == 1
    assert "FAIL    Eq. (0)" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"figure3.png", "figure3.svg"}
