"""What the guidances of Section 4 do to samples, and when contrast helps. All of it is ours but Figure 3
and the check of Eq. (1).

The paper looks at directions; theory.py checks those. Here the guided sampler of Gaussian models is solved:
its laws, the exact condition under which the negative term helps, a comparison at equal similarity, and
random models. The sampler's moments propagate exactly, so no number below has a sampling error.

Run from the repository's folder:
    python -m runs.theory_extra                         # checks and table; exit status 1 if a line fails
    python -m runs.theory_extra --out results/theory    # also draws Figure 3

Letters beyond theory.py's: data are N(mu, C) in R^D; Q = I - a a^T takes the part off target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import theory
from common import check_output, cli, write_atomic
from theory import A1, A_SPAN, AP, F64, Check, Holds, Refuted, alpha_h, cosine, max_error, random_basis, vec


@dataclass(frozen=True)
class Config:
    seed: int = 0  # draws the random models; every seed has to pass
    out: str = ""  # draw Figure 3 to figure3.png in this folder; empty: no figure


# --- the sampler ---
#
# With tau as the time, running down, Section 3.1 is dX = [X/2 + score + G] dtau + dW. For Gaussian data the
# posterior mean is affine in x, Tweedie's formula gives the score back, and the guidances are affine in E. So
# an Euler-Maruyama step is an affine map plus noise.

Law = tuple[Tensor, Tensor]  # mean (..., D), covariance (..., D, D)
Guidance = Callable[[float, Tensor], tuple[Tensor, Tensor]]  # (tau, J (..., D, D)) -> F, f of G = F E + f
Number = float | Tensor  # one, or (..., 1)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Batched matrix times vector: (..., D, E), (..., E) -> (..., D)."""
    return (matrix @ vector[..., None])[..., 0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(..., D), (..., D) -> (..., 1)."""
    return (a * b).sum(-1, keepdim=True)


def posterior_map(tau: float, mu: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """J (..., D, D) and e (..., D) of E[X0 | Xt = x] = J x + e for data N(mu (..., D), C (..., D, D))."""
    alpha, h = alpha_h(tau)
    # E = mu + J (x - alpha mu), J = alpha C (alpha^2 C + h I)^{-1}
    J = alpha * torch.linalg.solve(alpha**2 * C + h * torch.eye(C.shape[-1], dtype=F64), C)
    return J, mu - alpha * matvec(J, mu)


def reverse_step(tau: float, dtau: float, mu: Tensor, C: Tensor, guide: Guidance) -> tuple[Tensor, Tensor]:
    """S (..., D, D), b (..., D) of one step X <- S X + b + sqrt(dtau) noise of Eq. (1) with guidance."""
    alpha, h = alpha_h(tau)
    J, e = posterior_map(tau, mu, C)
    F, f = guide(tau, J)
    eye = torch.eye(C.shape[-1], dtype=F64)
    # drift = x/2 + (alpha E - x)/h + (F E + f): beta multiplies the guidance as it does the score
    S = eye + dtau * (eye / 2 + (alpha * J - eye) / h + F @ J)
    return S, dtau * (alpha / h * e + matvec(F, e) + f)


def reverse_law(mu: Tensor, C: Tensor, guide: Guidance, steps: int = 100, start: float = 16) -> Law:
    """Law of the samples: N(0, I) at tau = start, log-spaced steps, then E[X0 | Xt]."""
    mean, cov = torch.zeros_like(mu), torch.eye(C.shape[-1], dtype=F64)
    levels = torch.logspace(math.log10(start), -5, steps + 1, dtype=F64).tolist()
    for tau, tau_next in pairwise(levels):
        S, b = reverse_step(tau, tau - tau_next, mu, C, guide)
        noise = (tau - tau_next) * torch.eye(C.shape[-1], dtype=F64)
        mean, cov = matvec(S, mean) + b, S @ cov @ S.mT + noise
    J, e = posterior_map(levels[-1], mu, C)
    return matvec(J, mean) + e, J @ cov @ J.mT


def sampler_law(mu: Tensor, C: Tensor, guide: Guidance) -> Law:
    """The same without the first-order error of the step size: Richardson's 2 f(400) - f(200)."""
    coarse, fine = (reverse_law(mu, C, guide, steps) for steps in (200, 400))
    return 2 * fine[0] - coarse[0], 2 * fine[1] - coarse[1]


def guide_simple(a: Tensor, y: Number, w: Number) -> Guidance:
    """w G_simple = 2 w (y - a^T E) J a (Corollary 1); a (..., D)."""

    def guide(tau: float, J: Tensor) -> tuple[Tensor, Tensor]:
        Ja = 2 * w * matvec(J, a)
        return -Ja[..., :, None] * a[..., None, :], y * Ja

    return guide


def guide_contrastive(a: Tensor, ap: Tensor, alpha1: Number, alpha2: Number) -> Guidance:
    """alpha1 a - alpha2 J ap: w times Theorem 1 is alpha1 = 2 w (y - a^T X0), alpha2 = 2 w."""
    # No X0 belongs to Xt while sampling: alpha1 takes the ground-truth mean for it and is a number
    return lambda tau, J: (torch.zeros_like(J), alpha1 * a - alpha2 * matvec(J, ap))


def check_reverse(seed: int) -> list[Check]:
    """The reverse process, with the right and with the printed index of the score."""
    gen = torch.Generator().manual_seed(seed)
    mu, C = torch.randn(3, generator=gen, dtype=F64), theory.random_spd(3, gen)
    unguided = guide_contrastive(mu, mu, 0.0, 0.0)
    right = [max_error(found, true) for found, true in zip(sampler_law(mu, C, unguided), (mu, C))]
    # Eq. (1) asks for s_theta(., t_k), the noise level at the other end; here beta = 1 and tau = T - t_k
    mean, dtau = torch.zeros(3, dtype=F64), 16 / 200
    for k in range(200):
        S, b = reverse_step((k + 0.5) * dtau, dtau, mu, C, unguided)
        mean = matvec(S, mean) + b
    wrong = max_error(mean, mu)
    return [
        Holds("Sec. 3.1", "the reverse process returns the data's mean, covariance", right, 3e-3),
        Refuted("Eq. (1)", '"s_theta(., t_k)": error of the mean', wrong, 0.05, "a slip of index: T - t_k"),
    ]


# --- the laws of the guided sampler ---
#
# Unguided, E is a martingale from mu to X0: dE = J dW with int J^2 dtau = C. Guidance adds J G dtau:
#     dE = J G dtau + J dW,    int J^2 dtau = C,    int J dtau = K(C),
# and each law below is an integral of this line. Along an eigenvector with variance s, with v = alpha,
#     K(s) = int_0^inf alpha s/(alpha^2 s + h) dtau = 2 s int_0^1 dv/(1 + (s - 1) v^2).


def field_response(C: Tensor) -> Tensor:
    """K(C) (..., D, D): a constant field b added to the score moves the samples' mean by K(C) b."""
    s, U = torch.linalg.eigh(C)
    # K(s) = 2 s atan(root)/root if s > 1, 2 s atanh(root)/root if s < 1, root = sqrt|s - 1|; K(1) = 2
    root = (s - 1).abs().clamp(min=1e-12).sqrt()
    angle = torch.where(s > 1, torch.atan(root), torch.atanh(root.clamp(max=1 - 1e-15)))
    K = 2 * s.clamp(min=0) * angle / root
    return U @ (K[..., None] * U.mT)


def law_contrastive(mu: Tensor, C: Tensor, a: Tensor, ap: Tensor, alpha1: Number, alpha2: Number) -> Law:
    """Law under alpha1 a - alpha2 J ap; mu, a, ap (..., D), C (..., D, D)."""
    # int J (alpha1 a - alpha2 J ap) dtau = alpha1 K(C) a - alpha2 C ap, and no covariance changes
    return mu + alpha1 * matvec(field_response(C), a) - alpha2 * matvec(C, ap), C


def check_laws(seed: int) -> list[Check]:
    """The laws against the moments of Euler-Maruyama."""
    gen, y = torch.Generator().manual_seed(seed), 2.5
    mu, C = torch.randn(3, generator=gen, dtype=F64), theory.random_spd(3, gen)
    a, ap = normalize(torch.randn(2, 3, generator=gen, dtype=F64), dim=-1)
    s, v = (t[..., 1] for t in torch.linalg.eigh(C))

    def on_eigenvector(w: float) -> Law:
        pull, variance = 1 - torch.exp(-2 * w * s), (1 - torch.exp(-4 * w * s)) / (4 * w)
        return mu + pull * (y - v @ mu) * v, C + (variance - s) * torch.outer(v, v)

    tilt, both = guide_contrastive(a, ap, 0.0, 0.6), guide_contrastive(a, ap, 0.7, 0.6)
    laws = {
        "w G_simple(a), a eigenvector": (guide_simple(v, y, 0.4), on_eigenvector(0.4)),
        "-alpha2 J ap shifts the mean by -alpha2 C ap": (tilt, (mu - 0.6 * C @ ap, C)),
        "Theorem 1: N(mu + alpha1 K(C) a - alpha2 C ap, C)": (both, law_contrastive(mu, C, a, ap, 0.7, 0.6)),
    }
    checks: list[Check] = []
    for name, (guide, law) in laws.items():
        errors = [max_error(found, true) for found, true in zip(sampler_law(mu, C, guide), law)]
        checks.append(Holds("ours", name, errors, 3e-3))
    return checks


# --- when does contrast help? ---
#
# Call |Q mean|^2 the energy off target: the covariance does not depend on this guidance. By the law above the
# mean off target is v - alpha2 q with v = Q (mu + alpha1 K(C) a), q = Q C ap. The negative term
# changes the energy by |v - alpha2 q|^2 - |v|^2 = alpha2 (alpha2 |q|^2 - 2 <v, q>), so it helps iff
#
#     0 < alpha2 < 2 <v, q>/|q|^2.
#
# It shifts the other components and shrinks no variance. It helps a model whose mean leans off target the way
# ap does, <v, q> > 0. If a_i is an eigenvector of C and the mean lies along it, v = 0: it always hurts.


def off_target(x: Tensor, a: Tensor) -> Tensor:
    """Q x (..., D)."""
    return x - dot(x, a) * a


def contrast_bound(mu: Tensor, C: Tensor, a: Tensor, ap: Tensor, alpha1: Number) -> Tensor:
    """2 <v, q>/|q|^2 (..., 1); mu, a, ap (..., D), C (..., D, D)."""
    v, q = off_target(mu + alpha1 * matvec(field_response(C), a), a), off_target(matvec(C, ap), a)
    return 2 * dot(v, q) / dot(q, q)


def check_condition(seed: int) -> list[Check]:
    """The condition on 48 random models, against the mean of the sampler."""
    gen, n, alpha1 = torch.Generator().manual_seed(seed), 48, 0.7
    mu = 1.5 * torch.randn(n, 4, generator=gen, dtype=F64)
    C = torch.stack([theory.random_spd(4, gen) for _ in range(n)])
    a, ap = normalize(torch.randn(2, n, 4, generator=gen, dtype=F64), dim=-1)
    alpha2 = 0.2 + 1.3 * torch.rand(n, 1, generator=gen, dtype=F64)
    means = [sampler_law(mu, C, guide_contrastive(a, ap, alpha1, x))[0] for x in (0.0, alpha2)]
    without, with_term = (off_target(mean, a).norm(dim=-1, keepdim=True) for mean in means)
    helps, share = with_term < without, alpha2 / contrast_bound(mu, C, a, ap, alpha1)
    judged = (share - 1).abs() > 0.02  # next to the bound the sampler's own error decides
    wrong = int((judged & (helps != ((share > 0) & (share < 1)))).sum())
    name = f"contrast helps iff 0 < alpha2 < 2 <v, q>/|q|^2: {int(helps.sum())} of {n}"
    # a model without error: Example 1's A, mean along a_1
    mu, C = vec(2, 0, 0), torch.diag(vec(1, 0.5, 0.3))
    empty = contrast_bound(mu, C, A1, AP, alpha1).abs().item()
    name_empty = "without model error that interval is empty"
    return [Holds("ours", name, [wrong], 0), Holds("ours", name_empty, [empty], 1e-12)]


# --- the comparison at equal similarity ---
#
# Any guidance raises the similarity if it is strong, and a strong one explodes something else. So each gets
# the strength at which E[a^T x] meets a target, and the question is the cosine to a.

MODELS = {  # name: basis, latent mean, latent variances, noise in all of R^3, target E[a_1^T x], y^Target
    "no error": (theory.A_TRUE, vec(2, 0), vec(1, 0.5), 0.0, 4.0, 5.5),
    "leans as ap": (theory.A_TRUE, vec(2, 0.9), vec(1, 0.5), 0.0, 4.0, 5.5),
    "leans away": (theory.A_TRUE, vec(2, -0.9), vec(1, 0.5), 0.0, 4.0, 5.5),
    "wrong span": (theory.A_MODEL, vec(2, 0), vec(1, 0.5), 0.0, 3.5, 5.5),
    "wrong span, noise": (theory.A_MODEL, vec(2, 0), vec(1, 0.5), 0.2, 3.5, 5.5),
    "Figure 3's": (theory.A_MODEL, vec(2, 0), vec(0.1, 0.05), 0.05, 2.4, 3.2),
}
RATIOS = (0.0, 0.25, 0.5, 0.8, 1.2)  # r of the contrastive guidances; 0 is "a_1 only", a constant field
COLUMNS = ("none", "simple ap", "simple a_1", "a_1 only", *(f"r = {r:g}" for r in RATIOS[1:]))


def draw(mean: Tensor, cov: Tensor, points: int) -> Tensor:
    """Quasi-random x (..., points, D) of N(mean, cov); all laws share the points."""
    u = torch.quasirandom.SobolEngine(mean.shape[-1], scramble=True, seed=0).draw(points, dtype=F64)
    normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12))  # (points, D)
    s, U = torch.linalg.eigh(cov)  # low-rank covariances have no Cholesky factor
    return mean[..., None, :] + (normal * s.clamp(min=0).sqrt()[..., None, :]) @ U.mT


def mean_cosine(law: Law, a: Tensor, points: int = 2048) -> Tensor:
    """E cos(x, a), (...,)."""
    return cosine(draw(*law, points), a[..., None, :]).mean(-1)


def law_matched(mu: Tensor, C: Tensor, a: Tensor, guide: Tensor, y: Tensor, target: Tensor) -> Law:
    """Law under w G_simple(guide) at the w where E[a^T x] = target (..., 1), found by bisection."""
    low, high = torch.zeros_like(target), 4 / dot(guide, matvec(C, guide))
    for _ in range(14):
        w = (low + high) / 2
        below = dot(reverse_law(mu, C, guide_simple(guide, y, w))[0], a) < target
        low, high = torch.where(below, w, low), torch.where(below, high, w)
    return reverse_law(mu, C, guide_simple(guide, y, (low + high) / 2))


def match_contrastive(mu: Tensor, C: Tensor, a: Tensor, ap: Tensor, target: Tensor, r: Number) -> Tensor:
    """alpha1 (..., 1) at which alpha1 (a - r J ap) gives E[a^T x] = target (..., 1)."""
    # beyond r* = a^T K(C) a/(a^T C ap) the field lowers the similarity and no alpha1 > 0 does it
    return (target - dot(a, mu)) / (dot(a, matvec(field_response(C), a)) - r * dot(a, matvec(C, ap)))


def matched_laws() -> dict[str, Law]:
    """Column: mean (models, 3) and covariance (models, 3, 3)."""
    rows = [
        (A @ mu, A @ torch.diag(s) @ A.T + noise * torch.eye(3, dtype=F64), vec(target), vec(y))
        for A, mu, s, noise, target, y in MODELS.values()
    ]
    mu, C, target, y = (torch.stack(list(t)) for t in zip(*rows, strict=True))
    laws = {"none": (mu, C), "simple ap": law_matched(mu, C, A1, AP, y, target)}
    laws["simple a_1"] = law_matched(mu, C, A1, A1, y, target)
    for column, r in zip(COLUMNS[3:], RATIOS, strict=True):
        alpha1 = match_contrastive(mu, C, A1, AP, target, r)
        laws[column] = law_contrastive(mu, C, A1, AP, alpha1, r * alpha1)
    return laws


def print_table(table: dict[str, list[float]]) -> None:
    """The mean cosine to a_1, and whether contrast (r = c) beats all that uses no negative term."""
    print("\nEach guidance at the strength where E[a_1^T x] meets the model's target; mean cosine to a_1:\n")
    print(" " * 20 + "".join(f"{name:>12}" for name in COLUMNS) + "   contrast, r = c")
    for name, row in table.items():
        helps = row[COLUMNS.index("r = 0.8")] > max(row[1:4])
        print(f"{name:<20}" + "".join(f"{x:12.3f}" for x in row) + f"   {'helps' if helps else 'HURTS'}")


def random_models(scale: float, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mu (n, 12), C (n, 12, 12), a, ap (n, 12): a basis turned away from A, ap in it, a random mean in it."""
    D, M, models = 12, 4, []
    for _ in range(n):
        A, N = random_basis(D, 2 * M, gen).split(M, dim=1)
        S = torch.randn(M, M, generator=gen, dtype=F64)
        turn = torch.linalg.matrix_exp(0.5 * (S - S.T) / torch.linalg.matrix_norm(S - S.T))
        basis = (math.cos(0.5) * A + math.sin(0.5) * N) @ turn
        C = basis @ torch.diag(vec(1, 0.7, 0.5, 0.3)) @ basis.T + 0.02 * torch.eye(D, dtype=F64)
        mu = scale * basis @ random_basis(M, 1, gen)[:, 0]
        models.append((mu * torch.sign(mu @ A[:, 0]), C, A[:, 0], basis[:, 0]))
    mu, C, a, ap = (torch.stack(list(t)) for t in zip(*models, strict=True))
    return mu, C, a, ap


def check_wins(seed: int) -> list[Check]:
    """Figure 3's ranking at equal similarity, by how far the model's mean leans off target as ap does."""
    mu, C, a, ap = random_models(3.0, 60, torch.Generator().manual_seed(seed))
    sd = dot(a, matvec(C, a)).sqrt()
    target, c = dot(a, mu) + 1.5 * sd, dot(a, ap)
    alpha1 = match_contrastive(mu, C, a, ap, target, c)
    contrast = mean_cosine(law_contrastive(mu, C, a, ap, alpha1, c * alpha1), a, 512)
    laws = [law_matched(mu, C, a, guide, target + 1.5 * sd, target) for guide in (ap, a)]
    matched = [max_error(dot(law[0], a) / sd, target / sd) for law in laws]
    wins = contrast > torch.maximum(*(mean_cosine(law, a, 512) for law in laws))
    lean = dot(off_target(mu, a), normalize(off_target(matvec(C, ap), a), dim=-1))[:, 0]
    none, weak, strong = wins[lean <= 0], wins[(lean > 0) & (lean < 0.5)], wins[lean > 1]
    won = [f"{int(group.sum())} of {len(group)}" for group in (none, strong)]
    lost = [1 - group.double().mean().item() for group in (weak, strong)]
    weakly = '"(c) beats (a), (b)": share lost, lean < .5'
    return [
        Holds("ours", "random models: (a), (b) reached the similarity", matched, 0.01),
        Holds("Fig. 3", f"(c) beats (a), (b) in {won[0]} models that do not lean", [int(none.sum())], 0),
        Refuted("Fig. 3", weakly, lost[0], 0.8, "leaning is not enough"),
        Holds("Fig. 3", f"(c) beats (a), (b) in {won[1]} models, lean above 1", [lost[1]], 0.5),
    ]


# --- Figure 3 ---


def plot_figure(laws: dict[str, Law], folder: Path) -> Path:
    """(a)-(c) at equal similarity; (d) a step that overshoots; (e) where contrast helps or hurts."""
    from matplotlib.figure import Figure  # here, because only this needs it

    figure = Figure(figsize=(12, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    cosines = {column: mean_cosine(law, A1).tolist() for column, law in laws.items()}  # one for each model
    k = list(MODELS).index("Figure 3's")
    mu, C = (t[k] for t in laws["none"])
    panels = {"(a) simple, $a^{appro}$": "simple ap", "(b) simple, $a_1$": "simple a_1"}
    panels["(c) contrastive, $r = c$"] = "r = 0.8"
    dots = {"marker": ".", "ls": "", "ms": 4, "mew": 0, "alpha": 0.7}
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012, "zorder": 3}
    axes = [figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3)]
    for axis, (title, column) in zip(axes, panels.items()):
        mean, cov = (t[k] for t in laws[column])
        label = f"unguided (mean cosine {cosines['none'][k]:.3f})"
        axis.plot(*(draw(mu, C, 256) @ A_SPAN).T, color="0.65", label=label, **dots)
        axis.plot(*(draw(mean, cov, 256) @ A_SPAN).T, color="C0", label="guided, equal similarity", **dots)
        moved = (mu, mean, "black", "what the guidance does to the mean")
        arrows = ((0 * A1, A1, "tab:green", "$a_1$"), (0 * A1, AP, "tab:red", "$a^{appro}$"), moved)
        for start, end, colour, label in arrows:
            axis.quiver(*(start @ A_SPAN), *((end - start) @ A_SPAN), color=colour, label=label, **style)
        axis.set_title(f"{title}: mean cosine {cosines[column][k]:.3f}", fontsize=11)
        axis.set(xlim=(-0.2, 3.4), ylim=(-0.2, 2.6), aspect="equal", xlabel="along $a_1$")
    axes[0].set_ylabel("rest of $a^{appro}$")
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=5, frameon=False, markerscale=3)

    axis, s = figure.add_subplot(grid[1, :3]), torch.linspace(0, 5, 201, dtype=F64)
    directions = {"$a^{appro}$": AP, "$a_1$": A1}
    directions |= {rf"$a_1 - {r}\,a^{{appro}}$": theory.direction(r) for r in (0.8, 1.4)}
    for label, g in directions.items():
        axis.plot(s, theory.step_cosine(s, g), lw=2, label=label)
    axis.set_title("(d) a step of length s from $a^{appro}$: contrast is faster and overshoots")
    axis.set(xlabel="s", ylabel="cosine to $a_1$", ylim=(0, 1.02))
    axis.legend(title="along", loc="lower left")

    axis = figure.add_subplot(grid[1, 3:])
    for k, name in enumerate(list(MODELS)[:4]):
        axis.plot(RATIOS, [cosines[column][k] for column in COLUMNS[3:]], "o-", color=f"C{k}", label=name)
        axis.axhline(cosines["simple a_1"][k], ls=":", color=f"C{k}")
    axis.set_title("(e) at equal similarity contrast helps some models, hurts others")
    axis.set(xlabel="r = alpha2/alpha1 (dotted: simple guidance, $a_1$)", ylabel="mean cosine to $a_1$")
    axis.legend(loc="lower right", ncols=2)
    write_atomic(folder / "figure3.png", lambda p: figure.savefig(p, dpi=110))
    return folder / "figure3.png"


CHECKS = (check_reverse, check_laws, check_condition, check_wins)


def main(cfg: Config) -> int:
    """Run and print everything; returns the number of failures."""
    if cfg.out:
        check_output("out", cfg.out)
    failed, laws = theory.run_checks(CHECKS, cfg.seed), matched_laws()
    cosines = torch.stack([mean_cosine(law, A1) for law in laws.values()], 1)  # (models, columns)
    print_table(dict(zip(MODELS, cosines.tolist(), strict=True)))
    if cfg.out:
        print(f"\nfigure: {plot_figure(laws, Path(cfg.out))}")
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny
    raise SystemExit(cli(main, Config, __doc__) > 0)
