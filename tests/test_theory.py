"""theory.py and runs/theory_extra.py pass on every seed, and each planted mistake makes a check fail."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

import theory
from runs import theory_extra


@pytest.mark.parametrize("seed", range(10))
def test_all_checks_pass(seed):
    runs = theory.CHECKS + list(theory_extra.CHECKS) * (seed < 2)
    checks = [check for run in runs for check in run(seed)]
    assert [theory.format_line(check) for check in checks if not check.passed] == []


def test_a_nan_or_nothing_never_passes():
    assert not theory.Holds("", "", [0.0, math.nan, 1e-20], 1.0).passed
    assert not theory.Holds("", "", [], 1.0).passed
    assert not theory.Refuted("", "", math.nan, 1.0, "").passed
    assert theory.format_line(theory.Holds("", "", [math.nan], 1.0)).startswith("FAIL")
    assert " 2.0e-01 <= 1e+00" in theory.format_line(theory.Holds("", "", [1e-9, 0.2], 1.0))  # the largest


def test_lines_and_failures_are_counted(capsys):
    assert theory.run_checks(theory.CHECKS, 0) == 0
    out = capsys.readouterr().out
    passed = re.findall("^PASS (holds|refuted)", out, re.M)
    assert 25 <= len(passed) <= 40
    counts = [passed.count("holds"), passed.count("refuted")]
    assert "{}, 0 failed; {} hold, {} refute".format(f"{sum(counts)} lines", *counts) in out
    assert theory.run_checks([lambda seed: [theory.Holds("Eq. (0)", "wrong", [1.0], 0.5)]], 0) == 1
    assert "FAIL holds   Eq. (0)" in capsys.readouterr().out
    assert theory.run_checks([lambda seed: [theory.Refuted("Eq. (0)", "right", 0.1, 0.5, "")]], 0) == 1
    seeds = []
    assert theory.run_checks([lambda seed: seeds.append(seed) or []], 7) == 0 and seeds == [7]


# --- the planted mistakes ---


def scaled(factor):
    """Multiply the result by factor(alpha, h); tau is the last argument."""
    return lambda right: lambda *args: factor(*theory.alpha_h(args[-1])) * right(*args)


def without_transpose(x, a, y, A, m, tau):
    return 2 * (y - a @ theory.posterior_mean(x, A, m, tau)) * theory.mean_jacobian(x, A, m, tau) @ a


def contrastive(combine):
    """combine(positive, negative, y - ap^T E, the positive term at Xt) -> the mistaken G."""

    def wrong(right):
        def contrastive_guidance(x0, x, a, ap, y, A, m, tau):
            positive = 2 * (y - a @ x0) * a
            negative = right(x0, x, a, ap, y, A, m, tau) - positive
            factor = y - ap @ theory.posterior_mean(x, A, m, tau)
            return combine(positive, negative, factor, 2 * (y - a @ x) * a)

        return contrastive_guidance

    return wrong


def half_score(right):
    def reverse_step(tau, dtau, mu, C, guide):
        S, b = right(tau, dtau, mu, C, guide)
        S0, b0 = right(tau, dtau, mu, C, theory_extra.guide_contrastive(mu, mu, 0.0, 0.0))
        return S - (S0 - (1 + dtau / 2) * torch.eye(C.shape[-1], dtype=torch.float64)) / 2, b - b0 / 2

    return reverse_step


def guidance_without_beta(right):
    """beta = 2: the guidance is added to the drift and not to the score."""
    half = lambda guide: lambda tau, J: tuple(part / 2 for part in guide(tau, J))  # noqa: E731
    return lambda tau, dtau, mu, C, guide: right(tau, dtau, mu, C, half(guide))


def law_without_C(right):
    return lambda mu, C, a, ap, *alphas: right(mu, C, a, ap, alphas[0], 0.0)[:1] + (C,)


def law_tilted_by_ap(right):
    return lambda mu, C, a, ap, alpha1, alpha2: (right(mu, C, a, ap, alpha1, 0.0)[0] - alpha2 * ap, C)


# mistake: the check that catches it, the function it is planted in, what makes the wrong from the right one
MISTAKES = {
    "cov_no_h": ("check_quadrature", "posterior_cov", scaled(lambda alpha, h: 1 / h)),
    "eq4_as_printed": ("check_corollary1", "mean_jacobian", lambda right: lambda *args: right(*args).T),
    "no_h_over_alpha_G": ("check_corollary1", "simple_guidance", scaled(lambda alpha, h: alpha / h)),
    "drop_2": ("check_corollary1", "simple_guidance", scaled(lambda alpha, h: 0.5)),
    "no_transpose": ("check_corollary1", "simple_guidance", lambda right: without_transpose),
    "sign": ("check_conclusions", "simple_guidance", scaled(lambda alpha, h: -1)),
    "thm_keep_factor": ("check_theorem1", "contrastive_guidance", contrastive(lambda p, n, f, at: p + f * n)),
    "thm_pos_at_xt": ("check_theorem1", "contrastive_guidance", contrastive(lambda p, n, f, at: at + n)),
    "thm_sign": ("check_example1", "contrastive_guidance", contrastive(lambda p, n, f, at: p - n)),
    "principal_axes": ("check_assumptions", "random_basis", lambda right: lambda *args: 1.1 * right(*args)),
    "plus_ap": ("check_direction", "direction", lambda right: lambda r: right(-r)),
    "half_score": ("check_reverse", "reverse_step", half_score),
    "guid_unscaled": ("check_laws", "reverse_step", guidance_without_beta),
    "tilt_sign": ("check_laws", "guide_contrastive", lambda right: lambda a, ap, x, y: right(a, ap, x, -y)),
    "claim_no_C": ("check_laws", "law_contrastive", law_tilted_by_ap),
    "claim_no_K": ("check_laws", "field_response", lambda right: lambda C: torch.eye(C.shape[-1]).double()),
    "bound_no_2": ("check_condition", "contrast_bound", lambda right: lambda *args: right(*args) / 2),
    "wins_no_C": ("check_wins", "law_contrastive", law_without_C),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(mistake, monkeypatch):
    check, function, wrong = MISTAKES[mistake]
    module = theory if hasattr(theory, check) else theory_extra
    monkeypatch.setattr(module, function, wrong(getattr(module, function)))
    assert any(not line.passed for line in getattr(module, check)(0))


def test_every_check_catches_a_mistake():
    checks = {run.__name__ for run in [*theory.CHECKS, *theory_extra.CHECKS]}
    assert {check for check, _, _ in MISTAKES.values()} == checks


@pytest.mark.parametrize("mistake", ["no_transpose", "eq4_as_printed"])
def test_exact_scores_hide_the_transpose(mistake, monkeypatch):
    _, function, wrong = MISTAKES[mistake]
    monkeypatch.setattr(theory, function, wrong(getattr(theory, function)))
    assert all(line.passed for line in theory.check_quadrature(0))
    assert [line.source for line in theory.check_corollary1(0) if not line.passed] == ["App. A"]


# --- the numbers that the documents quote ---


def test_matched_comparison_and_figure(tmp_path, monkeypatch):
    expected = {  # simple ap, simple a_1, contrast with r = .8
        "no error": (0.974, 0.984, 0.979),
        "leans as ap": (0.926, 0.961, 0.969),
        "leans away": (0.981, 0.961, 0.941),
        "wrong span": (0.789, 0.831, 0.865),
        "Figure 3's": (0.793, 0.846, 0.872),
    }
    laws = theory_extra.matched_laws()
    columns = ("simple ap", "simple a_1", "r = 0.8")
    found = torch.stack([theory_extra.mean_cosine(laws[c], theory.A1) for c in columns], 1)
    for name, row in expected.items():
        k = list(theory_extra.MODELS).index(name)
        assert found[k].tolist() == pytest.approx(row, abs=3e-3)
    dotted = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **_: dotted.append(y))
    assert theory_extra.plot_figure(laws, tmp_path).stat().st_size > 10_000
    simple = theory_extra.mean_cosine(laws["simple a_1"], theory.A1)
    assert dotted == pytest.approx(simple[:4].tolist())


def test_contrast_helps_if_it_beats_all_that_has_no_negative_term(capsys):
    for best, says in ((0.4, "helps"), (0.9, "HURTS")):
        for i in (1, 2, 3):  # simple ap, simple a_1, a_1 only
            row = [0.95, 0.1, 0.1, 0.1, 0.99, 0.99, 0.5, 0.99]
            row[i] = best
            theory_extra.print_table({"m": row})
            assert capsys.readouterr().out.splitlines()[-1].endswith(says)


def test_overshoot():
    step = torch.tensor([0.75, 5.0], dtype=torch.float64)
    assert theory.step_cosine(step, theory.direction(0.8)).tolist() == pytest.approx([1.0, 0.745], abs=1e-3)


def test_eq_4_is_compared_with_the_quadrature(monkeypatch):
    right = theory.mean_jacobian
    monkeypatch.setattr(theory, "mean_jacobian", lambda *args: 1.01 * right(*args))  # as symmetric as before
    assert "Eq. (4)" in [check.source for check in theory.check_quadrature(0) if not check.passed]


def test_contrast_wins_if_it_beats_both_simple_guidances(monkeypatch):
    cosines = iter([0.5, 0.4, 0.6])  # of contrast, of the guidance by ap, of that by a
    monkeypatch.setattr(
        theory_extra,
        "mean_cosine",
        lambda law, a, n: torch.full((len(a),), next(cosines), dtype=torch.float64),
    )
    statements = [check.statement for check in theory_extra.check_wins(0)]
    assert any("(c) beats (a), (b) in 0 of" in s and s.endswith("lean above 1") for s in statements)


def test_a_line_that_fails_is_exit_status_1(tmp_path):
    folder, bound = Path(theory.__file__).parent, "scores, 1e-9)"
    text = (folder / "theory.py").read_text()
    assert text.count(bound) == 1
    shutil.copy(folder / "common.py", tmp_path)
    (tmp_path / "theory.py").write_text(text.replace(bound, "scores, 0.0)"))
    command = [sys.executable, tmp_path / "theory.py", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("FAIL") == 1 and "seed 3, float64" in done.stdout
